"""What pixels alone tell of an image's class: pretrain.py --linear-baseline."""
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.data import default_collate

from data import ClassificationSet


def linear_baseline(train: ClassificationSet, val: ClassificationSet) -> str:
    """What pixels alone tell: softmax regression on the middle of every image, its L2 penalty the one of
    four that is best on a fifth of the training images."""
    def pixels(dataset: ClassificationSet) -> tuple[Tensor, Tensor]:
        dataset.transform = replace(dataset.transform, kind="none")
        images, labels = default_collate([dataset[i] for i in range(len(dataset))])
        return images.flatten(1), labels

    def fit(x: Tensor, y: Tensor, penalty: float) -> torch.nn.Linear:
        linear = torch.nn.Linear(x.shape[1], len(train.classes))
        torch.nn.init.zeros_(linear.weight)
        optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = torch.nn.functional.cross_entropy(linear(x), y) + penalty * linear.weight.square().sum()
            value.backward()
            return value
        optimizer.step(loss)
        return linear

    def top1(linear: torch.nn.Linear, x: Tensor, y: Tensor) -> float:
        return (linear(x).argmax(-1) == y).float().mean().item()
    (x, y), (x_val, y_val) = pixels(train), pixels(val)
    held_out = torch.arange(len(x)) % 5 == 0
    best = max((1e-3, 1e-2, 1e-1, 1.0), key=lambda penalty: top1(
        fit(x[~held_out], y[~held_out], penalty), x[held_out], y[held_out]))
    score = top1(fit(x, y, best), x_val, y_val)
    return (f"{val.name}, {len(val)} images: top1 {100 * score:.1f} % of a linear classifier on "
            f"{x.shape[1]} pixel values (penalty {best:g}); chance: {100 / len(train.classes):.1f} %")
