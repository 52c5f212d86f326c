"""A fork with a new task adaptor: each query sees the maximum over all queries, as in PointNet.

    PYTHONPATH=. python tests/forks/adaptor.py --data shapes-hard     (any flag of finetune.py)
"""
from torch import Tensor, nn

import engine
import finetune
from model import Config, Detector


class MaxAdaptor(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.own, self.all, self.norm = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.LayerNorm(dim)

    def forward(self, extra: Tensor, positions: Tensor, memory: Tensor, index: int) -> tuple:
        related = self.own(extra) + self.all((extra + positions).amax(1, keepdim=True))  # (B, Q, D)
        return self.norm(extra + related), memory


class MaxDetector(Detector):
    def __init__(self, config: Config, num_classes: int):
        super().__init__(config, num_classes)
        self.adaptor = MaxAdaptor(config.dim)


if __name__ == "__main__":
    engine.run_script(finetune.main, detector=MaxDetector)
