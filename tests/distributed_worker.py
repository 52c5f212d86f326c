"""Runs programs of this project one after another and records their training steps. test_distributed.py
starts it, alone or under torchrun.

The argument is [[program, flags, options of `record`], ...] as JSON.
"""
import json
import os
import signal
import sys
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))
import engine


def record(program: str, flags: list[str], notes: str = "", victim: int = -1) -> None:
    """Runs a program's main(). The process `victim` kills itself at the start of its third step.

    notes: if given, each process writes NOTES-RANK.pt with {"gradient": {name: sum over processes in the
    first step}, "losses": [of the total batch, per step], "shares": [number of images of this process,
    per step], "weights": {name: at the end}}.
    """
    module, noted = import_module(program), {"losses": [], "shares": []}
    train_step, sum_gradients = getattr(module, "train_step", None), engine.sum_gradients

    def noting_sum(model):
        sum_gradients(model)
        noted.setdefault("gradient", {k: p.grad.clone() for k, p in model.named_parameters()})

    def noting_step(model, optimizer, batch, *rest, **options):
        images = [batch] if torch.is_tensor(batch) else [part for part, _, _ in batch]
        noted["shares"].append(sum(len(part) for part in images))
        if engine.rank() == victim and len(noted["shares"]) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        losses = train_step(model, optimizer, batch, *rest, **options)
        noted["weights"], loss = dict(model.named_parameters()), losses["loss"]
        noted["losses"].append(engine.sum_over_processes(loss.item(), loss.device).item())
        return losses
    module.train_step, engine.sum_gradients, sys.argv[1:] = noting_step, noting_sum, flags
    module.main()
    module.train_step, engine.sum_gradients = train_step, sum_gradients
    if notes:
        torch.save(noted, f"{notes}-{engine.rank()}.pt")


def main(begin=dist.init_process_group) -> None:
    # All programs share one process group.
    dist.init_process_group = lambda backend: dist.is_initialized() or begin(backend)
    for program, flags, options in json.loads(sys.argv[1]):
        record(program, flags, **options)


if __name__ == "__main__":
    engine.run_script(main)
