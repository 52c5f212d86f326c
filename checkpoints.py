"""Checkpoints: writing and reading them, what a run needs to go on, and what passes between the stages.

A checkpoint is a dict of tensors and plain containers: stage, config, layout, classes, weights and flags;
last.pt, from which a run goes on, also holds optimiser, epoch and step. See released.py for the authors'.
"""
import argparse
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from engine import rank
from model import VARIANTS, Classifier, Config, Detector, InputError
from released import (is_released, is_released_pretraining, load_checkpoint, load_released,
                      load_released_encoder, released_layout)


def save_checkpoint(path: Path, content: dict) -> None:
    """Written, by the first process, to a temporary name and renamed, so that a file of this name is always
    whole."""
    if rank():
        return
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        reason = getattr(e, "strerror", None) or str(e).splitlines()[0]
        raise InputError(f"cannot write {path} ({reason}): mend it and --resume; an older file is "
                         f"untouched") from None


def describe(model: nn.Module, args: argparse.Namespace, classes: list[str], stage: str) -> dict:
    """The part of a checkpoint from which a model can be built again."""
    return {"stage": stage, "kind": type(model).__name__, "config": asdict(model.encoder.config),
            "layout": args.layout, "classes": classes, "model": model.state_dict(),
            "args": plain_flags(args)}


def check_kind(content: dict, model: nn.Module, path: str | Path) -> None:
    """InputError unless the checkpoint is of the model's class: that of a fork may fit ours to the letter,
    and yet compute something else."""
    kind = content.get("kind", type(model).__name__)  # older ones do not say
    if kind != type(model).__name__:
        raise InputError(f"{path} holds a {kind}, not a {type(model).__name__}: use the script that made it")


def plain_flags(args: argparse.Namespace) -> dict:
    """The flags as a checkpoint holds them: paths as text."""
    return {k: v if isinstance(v, (int, float, str, bool, type(None))) else str(v)
            for k, v in vars(args).items()}


# Flags that may change when a run is resumed, because the result does not depend on them, or because that is
# their purpose.
FREE_ON_RESUME = {"resume", "overwrite", "out", "pretrained", "init", "compile", "data_root", "workers",
                  "device", "micro_batch", "activation_checkpointing", "benchmark", "epochs", "eval_every",
                  "split", "limit_val"}


def load_resumed(model: nn.Module, args: argparse.Namespace, stage: str, classes: list[str]) -> dict:
    """The run folder's last.pt, if it was made by the same stage with the same flags on the same classes."""
    path = args.out / "last.pt"
    state = load_checkpoint(path)
    if state.get("stage") != stage or "optimizer" not in state:
        raise InputError(f"{path} cannot be resumed by this script: it is no last.pt of it")
    check_kind(state, model, path)
    if state["classes"] != classes:
        raise InputError(f"{path} was trained on {len(state['classes'])} classes, the data have "
                         f"{len(classes)} "
                         f"({', '.join(map(str, sorted(set(state['classes']) ^ set(classes))))[:200]} "
                         f"differ)")
    now = plain_flags(args)
    changed = [f"--{k.replace('_', '-')} {v} (now {now.get(k)})" for k, v in state["args"].items()
               if k not in FREE_ON_RESUME and now.get(k) != v]
    if changed:
        raise InputError(f"{path} was trained with {', '.join(changed)}: give the same flags, or "
                         f"another --out")
    return state


def build(kind: Callable[[Config, int], Classifier | Detector], config: Config, layout: str,
          num_classes: int) -> Classifier | Detector:
    """A fresh model of a layout, "paper" or "released"."""
    model = kind(config, num_classes)
    return released_layout(model) if layout == "released" else model


def load_detector(path: str | Path,
                  kind: Callable[[Config, int], Detector] = Detector) -> tuple[Detector, dict]:
    """A detector in eval mode from a checkpoint of ours, made by `kind`, or of the authors (whatever `kind`
    is), with {"classes", "layout", "config"}. InputError if it is neither."""
    content = load_checkpoint(path)
    if is_released(content):
        detector = load_released(content)
        num_classes = detector.class_head.out_features
        names = (content.get("meta") or {}).get("CLASSES") or [f"class {i}" for i in range(num_classes)]
        return detector, {"classes": list(names), "layout": "released",
                          "config": asdict(detector.encoder.config)}
    if content.get("stage") != "finetune":
        raise InputError(f"{path} holds no detector: give a checkpoint of finetune.py or a released one")
    try:
        detector = build(kind, Config(**content["config"]), content["layout"], len(content["classes"]))
        check_kind(content, detector, path)
        detector.load_state_dict(content["model"])
    except (KeyError, TypeError, RuntimeError) as e:
        raise InputError(f"{path} is not a whole checkpoint of finetune.py: "
                         f"{' '.join(str(e).split())[:200]}") from None
    return detector.eval(), content


def variant_of(config: dict) -> str:
    """The encoder's name: that of its variant, or the sizes that tell a changed one apart."""
    size_keys = ("dim", "mlp_dim", "heads", "tokenizer_dim", "layers", "entry_layer", "points")
    sizes = {k: config.get(k) for k in size_keys}
    names = [n for n, c in VARIANTS.items() if all(asdict(c)[k] == v for k, v in sizes.items())]
    decoder = " encoder-decoder" if config.get("structure") == "encoder-decoder" else ""
    return (names[0] if names else str(sizes)) + decoder


def load_pretrained(model: Classifier | Detector, layout: str, path: str | Path) -> str:
    """Copies a checkpoint's weights into a fresh model and returns a line that says what was loaded and what
    starts fresh. The encoder is loaded strictly. Between the stages that is all; from the same stage also
    those of the other parts that have the same shapes (another number of classes: all but the class head).

    Raises:
        InputError: if it is no checkpoint, or its encoder is of another variant or layout.
    """
    content = load_checkpoint(path)
    try:
        if is_released(content):
            theirs = load_released(content)
            content = {"stage": "finetune", "layout": "released", "config": asdict(theirs.encoder.config),
                       "model": theirs.state_dict()}
        elif is_released_pretraining(content):
            config, weights = load_released_encoder(content)
            content = {"stage": "pretrain", "layout": "released", "config": asdict(config), "model": weights}
    except RuntimeError as e:  # shapes that do not belong together
        raise InputError(f"{path} does not fit: {' '.join(str(e).split())[:200]}") from None
    whole = {"model", "config", "layout", "stage"} <= content.keys()
    if not whole or not all(isinstance(content[k], dict) for k in ("model", "config")):
        raise InputError(f"{path} is neither a checkpoint of this project nor one of the authors'")
    theirs, ours = variant_of(content["config"]), variant_of(asdict(model.encoder.config))
    if (theirs, content["layout"]) != (ours, layout):
        raise InputError(f"{path} holds the variant {theirs} in the {content['layout']} layout, not {ours} "
                         f"in the {layout} layout: change --variant, --structure or --layout")
    loaded, fresh, stage = [], [], "finetune" if isinstance(model, Detector) else "pretrain"
    for name, part in model.named_children():
        state = {k.removeprefix(name + "."): v for k, v in content["model"].items()
                 if k.startswith(name + ".")}
        fits = {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in part.state_dict().items()}
        if name == "encoder" or content["stage"] == stage and fits:
            try:
                part.load_state_dict(state)
            except RuntimeError as e:
                raise InputError(f"{path} does not fit: {' '.join(str(e).split())[:200]}") from None
            loaded.append(name)
        else:
            fresh.append(name)
    return f"loaded from {path}: {', '.join(loaded)}; starting fresh: {', '.join(fresh) or 'nothing'}"


def origin_of(pretrained: str | None) -> dict:
    """What Table 7 tells of a run's pre-training: how many class tokens, and their top-1 accuracy."""
    content = load_checkpoint(pretrained) if pretrained else {}
    config, scores = content.get("config"), content.get("scores")
    return {"class_tokens": config.get("class_tokens", 1) if isinstance(config, dict) else 1,
            "top1": scores.get("top1") if isinstance(scores, dict) else None}


def load_weights(model: Classifier | Detector, args: argparse.Namespace, stage: str, classes: list[str],
                 pretrained: str | None) -> dict | None:
    """A fresh model's weights: of the run to be resumed, whose last.pt is returned, or of `pretrained`,
    or neither. InputError as in `load_resumed` and `load_pretrained`."""
    if args.resume:
        state = load_resumed(model, args, stage, classes)
        model.load_state_dict(state["model"])
        return state
    if pretrained:
        message = load_pretrained(model, args.layout, pretrained)
        if not rank():
            print(message)
    return None
