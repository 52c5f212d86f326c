"""A fork with a new task adaptor: every query learns of the others by the maximum over all (as in PointNet).

    python fork_adaptor.py --data shapes-hard     (any flag of finetune.py)
"""
from torch import Tensor, nn

import engine
import finetune
from model import Config, Detector, TaskAdaptor


class MaxAdaptor(TaskAdaptor):
    def __init__(self, config: Config):
        super().__init__(config)
        del self.attention
        self.own, self.all = (nn.Linear(config.dim, config.dim) for _ in range(2))

    def relate(self, extra: Tensor, positions: Tensor) -> Tensor:
        return extra + self.own(extra) + self.all((extra + positions).amax(1, keepdim=True))  # (B, Q, D)


class MaxDetector(Detector):
    def __init__(self, config: Config, classes: int):
        super().__init__(config, classes)
        self.adaptor = MaxAdaptor(config)


if __name__ == "__main__":
    engine.run_script(finetune.main, detector=MaxDetector)
