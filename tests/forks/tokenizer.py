"""A fork with another tokenizer: overlapping 3x3 convolutions instead of patches (Xiao et al. 2021).

    PYTHONPATH=. python tests/forks/tokenizer.py pretrain --data shapes-hard
    PYTHONPATH=. python tests/forks/tokenizer.py finetune --data shapes-hard --pretrained LAST.pt
"""
import sys
from functools import partial

from torch import nn

import engine
from model import Classifier, Config, Detector


def convolutional(kind: type[nn.Module], config: Config, num_classes: int) -> nn.Module:
    model, d = kind(config, num_classes), config.tokenizer_dim
    levels = [(3, 32), (32, 64), (64, d)], [(d, d)], [(d, d)], [(d, d)]  # strides 8, 16, 32, 64
    model.encoder.tokenizer.convs = nn.ModuleList(nn.Sequential(*(
        nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()) for a, b in level)) for level in levels)
    return model


if __name__ == "__main__":
    models = {"pretrain": ("classifier", Classifier), "finetune": ("detector", Detector)}
    if not set(sys.argv[1:2]) & models.keys():
        sys.exit("error: give pretrain or finetune first")
    stage = sys.argv.pop(1)
    name, kind = models[stage]
    engine.run_script(__import__(stage).main, **{name: partial(convolutional, kind)})
