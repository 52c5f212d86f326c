"""What test_distributed.py starts, alone or under torchrun: programs of this project, one after another in
the same processes, with their steps noted. Its argument is [[program, flags, {option of `record`: value}],
...] as JSON.
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
    """Runs a program's main(). With `notes`, every process of a training leaves NOTES-RANK.pt: {"gradient":
    {name: the first step's, summed up}, "losses": [of each step's total batch], "shares": [how many images
    of each step were this process's own], "weights": {name: at the end}}. The process `victim` is killed
    when it begins its third step."""
    module, noted = import_module(program), {"losses": [], "shares": []}
    train_step, sum_gradients = getattr(module, "train_step", None), engine.sum_gradients

    def noting_sum(model):
        sum_gradients(model)
        noted.setdefault("gradient", {k: p.grad.clone() for k, p in model.named_parameters()})

    def noting_step(model, optimizer, batch, *rest, **options):
        noted["shares"].append(len(batch) if torch.is_tensor(batch) else sum(len(x) for x, _, _ in batch))
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
    dist.init_process_group = lambda backend: dist.is_initialized() or begin(backend)  # one for all programs
    for program, flags, options in json.loads(sys.argv[1]):
        record(program, flags, **options)


if __name__ == "__main__":
    engine.run_script(main)
