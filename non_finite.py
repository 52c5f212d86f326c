"""Numbers going wrong: where, in a model and among the images, the first NaN or infinity came up."""
import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from engine import seed_step
from model import InputError


def first_non_finite(model: nn.Module, forward: Callable[[], object]) -> str | None:
    """Runs `forward`, a pass of `model`, and names the first of its modules whose output holds NaN or
    infinity; or the first weight that does, and then no pass is needed."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"the weight {name}"
    found = []

    def look(name: str):
        def hook(module, inputs, output):
            outputs = output if isinstance(output, (list, tuple)) else [output]
            if any(isinstance(t, Tensor) and not t.isfinite().all() for t in outputs):
                found.append(f"the output of {name}")
        return hook
    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def image_name(source: Path | Image.Image, number: int) -> str:
    """Of an item of a data set: its file, or its number if it was generated."""
    return str(source) if isinstance(source, Path) else str(number)


def stop_at_non_finite(model: nn.Module, parts: list[tuple[list[str], Callable[[], object]]],
                       args: argparse.Namespace, step: int) -> None:
    """Raises the InputError for a step whose loss is not finite. `parts`: per micro-batch the names of its
    images and a forward pass on them."""
    for names, forward in parts:
        seed_step(args.seed, step)
        if where := first_non_finite(model, forward):
            break
    else:  # what dropout drew in the step itself
        names, where = [n for part, _ in parts for n in part], "nothing, in a second pass"
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    raise InputError(f"the loss of step {step + 1} is not finite: the first that is not is {where}, at the "
                     f"images {shown}; try a lower --lr; the last checkpoint is untouched")
