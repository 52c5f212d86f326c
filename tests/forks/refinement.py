"""A fork with iterative box refinement (Deformable DETR, A.4). Each layer predicts its boxes relative to
those of the layer before, and its queries look at their centres.

    PYTHONPATH=. python tests/forks/refinement.py --data shapes-hard     (any flag of finetune.py)
"""
from dataclasses import replace

from torch import Tensor, nn

import engine
import finetune
from model import Config, Detector, ExtraTokens


class RefiningDetector(Detector):
    def __init__(self, config: Config, num_classes: int):
        super().__init__(config, num_classes)
        nn.init.zeros_(self.box_head[-1].bias)  # it is added in each layer, so start at half the image

    def adapt(self, queries: ExtraTokens, memory: Tensor, index: int) -> tuple[ExtraTokens, Tensor]:
        if index:  # a layer has answered
            queries = replace(queries, references=self.boxes(queries).detach())  # (B, Q, 4)
        return super().adapt(queries, memory, index)


if __name__ == "__main__":
    engine.run_script(finetune.main, detector=RefiningDetector)
