"""The recipes of both stages, through the main() that users run. Each training loop is written out here
once more, from the paper's text, in float64. It imports nothing of what it checks. A run of a small model
must end at its weights."""
import json
import math
from dataclasses import replace

import pytest
import torch
from by_hand import cheapest_pairs, layer_losses
from small import CLASSES, IMAGES, drawn, record, run
from torch import nn

import finetune
import pretrain
from data import detection_set, to_tensor
from model import VARIANTS, Detector


class AdamW:
    """Loshchilov and Hutter 2019, written out: decay apart from the gradient, betas 0.9 and 0.999."""

    def __init__(self, model):
        self.state = {name: [0.0, 0.0] for name, _ in model.named_parameters()}
        self.steps = 0

    def step(self, model, gradients, rates, decays):
        self.steps += 1
        with torch.no_grad():
            for name, p in model.named_parameters():
                m, v = self.state[name]
                g = gradients[name]
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                self.state[name] = m, v
                p *= 1 - rates(name) * decays(name)
                p -= rates(name) * (m / (1 - 0.9 ** self.steps)) / (
                    (v / (1 - 0.999 ** self.steps)).sqrt() + 1e-8)


def gradients_of(model, loss):
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters)))


def same_weights(model, saved, tolerance):
    for name, p in model.named_parameters():
        torch.testing.assert_close(saved["model"][name], p.detach(), rtol=0, atol=tolerance, msg=name)


def check_files(folder, losses, scores, shown):
    """Of a run on shapes with two steps an epoch. shown: the first images of the first epoch."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    means = [(a + b) / 2 for a, b in zip(losses[::2], losses[1::2])]
    assert [e["loss"] for e in log if "loss" in e] == pytest.approx(means, abs=1e-5)
    (train, indices, _), (_, curves, _) = drawn["training_sheet"], drawn["draw_curves"]
    assert (train.name, indices) == ("shapes train", shown) and list(scores) == list(curves)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"data": "shapes val", "images": 2, **scores}.items() <= metrics.items()


# ------------------------------------------------------------------------- stage 2 (4.1, Deformable DETR)

def set_loss(model, batch):
    """The loss of a whole batch, image by image and layer by layer, divided by the matched queries."""
    total, objects = 0, sum(len(target["labels"]) for _, target in batch)
    for image, target in batch:
        labels, true = target["labels"].tolist(), target["boxes"].double()
        out = model(image[None])
        for layer in (out["aux_outputs"][0], out):
            logits, boxes = layer["pred_logits"][0], layer["pred_boxes"][0]
            pairs = cheapest_pairs(logits.detach(), boxes.detach(), labels, true)
            total = total + sum(layer_losses(logits, boxes, labels, true, pairs))
    return total / max(objects, 1)


@pytest.mark.parametrize("flags, clip, decay, factor", [
    ("--schedule step --lr-drop 2 --epochs 3 --micro-batch 2 --weight-decay 0.3 --clip 0.1", 0.1, 0.3,
     lambda step, epoch: 0.1 if epoch >= 2 else 1),
    ("--schedule one-cycle --epochs 6 --micro-batch 3 --weight-decay 0 --clip 0", math.inf, 0,
     lambda step, epoch: 0.04 + 0.96 * 10 / 12 if step == 0 else
     (1 + math.cos(math.pi * ((step + 1) / 12 - 0.1) / 0.9)) / 2)])
def test_fine_tuning_follows_the_papers_recipe(flags, clip, decay, factor, tmp_path, monkeypatch):
    """Two steps an epoch, of three images and of two."""
    epochs, scores = int(flags.split("--epochs ")[1].split()[0]), [0.2, 0.6, 0.6, 0.3, 0.1, 0.5]
    flags += (" --lr 0.01 --backbone-lr 0.5 --sampling-lr 0.25 --batch-size 3 --queries 4 --seed 7"
              " --eval-every 1 --augment flip --image-size 64 --workers 0")
    model, last, best = run(finetune, tmp_path, monkeypatch, flags, scores)
    items = [r[1:] for r in record if r[0] == "train"]  # epoch, index, item
    draws = [r[3] for r in record if r[0] == "model" and r[2]]
    modes = {(r[0] == "model" and r[2]) for r in record}
    assert [e for e, _, _ in items] == [e for e in range(epochs) for _ in range(IMAGES)]
    assert len(set(draws)) == len(draws) and modes == {True, False}  # dropout is new in each step
    optimizer, losses = AdamW(model), []

    def rates(name):
        part = 0.5 if "tokenizer" in name else 0.25 if "sampling_offsets" in name else 1
        return 0.01 * part * factor(optimizer.steps - 1, epoch)
    for epoch in range(epochs):
        of_epoch = items[epoch * IMAGES:(epoch + 1) * IMAGES]
        assert {i for _, i, _ in of_epoch} == set(range(IMAGES))
        for batch in (of_epoch[:3], of_epoch[3:]):
            loss = set_loss(model, [item for _, _, item in batch])
            losses.append(loss.item())
            gradients = gradients_of(model, loss)
            norm = math.sqrt(sum((g ** 2).sum().item() for g in gradients.values()))
            assert clip == math.inf or norm > clip
            scale = min(1, clip / (norm + 1e-6))
            gradients = {name: g * scale for name, g in gradients.items()}
            optimizer.step(model, gradients, rates, lambda name: decay)
        if epoch == 1:
            same_weights(model, best, 1e-8)  # the first evaluation with the highest AP
    same_weights(model, last, 1e-8)
    assert (best["scores"]["AP"], last["scores"]["AP"]) == (0.6, scores[epochs - 1])
    assert [(c["epoch"], c["step"]) for c in (best, last)] == [(2, 4), (epochs, 2 * epochs)]
    first = [i for _, i, _ in items[:IMAGES]]
    check_files(tmp_path / "run", losses, {"AP": scores[epochs - 1], "AP50": 0.5}, first)
    assert drawn["results_sheet"][0].name == "shapes val"

    # Flips are new in each epoch, and nothing else changes the pictures.
    plain = detection_set("shapes", "train", limit=IMAGES, image_size=64)
    flipped = {}
    for epoch, index, (image, target) in items:
        original = to_tensor(plain.records[index].image())
        flipped[epoch, index] = not torch.equal(image, original)
        assert torch.equal(image, original.flip(-1) if flipped[epoch, index] else original)
    assert len({tuple(flipped[e, i] for i in range(IMAGES)) for e in range(epochs)}) > 1
    orders = {tuple(i for e, i, _ in items if e == epoch) for epoch in range(epochs)}
    assert len(orders) > 1

    # A resumed run remembers the best score.
    more = flags.replace(f"--epochs {epochs}", f"--resume --epochs {epochs + 1}")
    _, last, best = run(finetune, tmp_path, monkeypatch, more, [0.4])
    assert (best["scores"]["AP"], last["scores"]["AP"]) == (0.6, 0.4)

    # Another seed gives another order and other dropout; the same one gives the same.
    for seed, same in ((7, True), (8, False)):
        run(finetune, tmp_path / str(seed), monkeypatch, flags.replace("--seed 7", f"--seed {seed}"), scores)
        again = [(r[1], r[2]) for r in record if r[0] == "train"]
        assert (again == [(e, i) for e, i, _ in items]) == same
        assert ([r[3] for r in record if r[0] == "model" and r[2]] == draws) == same


# --------------------------------------------------------------------------------- stage 1 (4.1, DeiT)

def soft_targets(raw, mixed, labels, smoothing):
    """The targets that fit the pictures that the model saw. Image i is mixed with image B - 1 - i: mixup
    if all pixels are blended, CutMix if a rectangle is exchanged."""
    other = raw.flip(0)
    changed = (mixed != raw).any(1)  # (B, H, W)
    if torch.equal(mixed, torch.where(changed[:, None], other, raw)):
        rows, columns = (changed.any(0).any(axis).sum().item() for axis in (1, 0))
        share = 1 - rows * columns / changed[0].numel()
    else:
        share = (((mixed - other) * (raw - other)).sum() / ((raw - other) ** 2).sum()).item()
        torch.testing.assert_close(mixed, share * raw + (1 - share) * other, rtol=0, atol=1e-4)
    one_hot = torch.full((len(labels), CLASSES), smoothing / CLASSES).double()
    one_hot[range(len(labels)), labels] += 1 - smoothing
    return share * one_hot + (1 - share) * one_hot.flip(0), share


def cosine(epoch, epochs=4, warmup=1, top=0.02):
    if epoch < warmup:
        return 1e-6 + (top - 1e-6) * epoch / warmup
    return 1e-5 + (top - 1e-5) * (1 + math.cos(math.pi * epoch / epochs)) / 2


@pytest.mark.parametrize("mixing, micro_batch", [
    ("--mixup 0 --cutmix 0", 4), ("--mixup 0.8 --cutmix 0", 3), ("--mixup 0 --cutmix 1", 4),
    ("--mixup 0.8 --cutmix 0 --repeats 3", 4)])
def test_pre_training_follows_deits_recipe(mixing, micro_batch, tmp_path, monkeypatch):
    """Two steps of four images an epoch; the incomplete batch is dropped."""
    scores, smoothing = [0.1, 0.4, 0.4, 0.2], 0.1
    flags = (f"--micro-batch {micro_batch} --lr 0.02 --epochs 4 --batch-size 4 --weight-decay 0.5"
             " --limit-train 9 --schedule cosine --warmup-epochs 1 --repeats 1 --augment flip --seed 7"
             f" --image-size 64 --workers 0 --eval-every 1 --smoothing 0.1 {mixing}")
    model, last, best = run(pretrain, tmp_path, monkeypatch, flags, scores)
    items = [r for r in record if r[0] == "train"]
    inputs = [r[1] for r in record if r[0] == "model" and r[2]]
    draws = [r[3] for r in record if r[0] == "model" and r[2]]
    assert len(items) == 32 and len(set(draws)) == len(draws)
    optimizer, shares, losses, per_step = AdamW(model), [], [], math.ceil(4 / micro_batch)
    for step in range(8):
        batch, epoch = items[4 * step:4 * step + 4], step // 2
        assert {e for _, e, _, _ in batch} == {epoch}
        a, b, c, d = (index for _, _, index, _ in batch)
        if "--repeats" in mixing:
            assert a == b != c == d if step % 2 else a == b == c != d
        else:
            assert len({a, b, c, d}) == 4
        raw = torch.stack([image for _, _, _, (image, _) in batch])
        mixed = torch.cat(inputs[step * per_step:(step + 1) * per_step])
        targets, share = soft_targets(raw, mixed, [label for *_, (_, label) in batch], smoothing)
        shares.append(share)
        loss = -(targets * model(mixed).log_softmax(-1)).sum() / 4
        losses.append(loss.item())
        gradients = gradients_of(model, loss)
        decayed = ("convs.weight", "sampling_offsets.weight", "class_head.weight")
        optimizer.step(model, gradients, lambda name: cosine(epoch),
                       lambda name: 0.5 if name.endswith(decayed) else 0)
        if step == 3:  # after the second epoch
            same_weights(model, best, 1e-6)
    same_weights(model, last, 1e-6)
    assert (best["scores"], last["scores"]) == ({"top1": 0.4}, {"top1": 0.2})
    if "--repeats" not in mixing:
        check_files(tmp_path / "run", losses, {"top1": 0.2}, [index for _, _, index, _ in items[:8]])
    assert set(shares) == {1} if mixing == "--mixup 0 --cutmix 0" else len(set(shares)) == 8
    assert len({tuple(r[2] for r in items[i:i + 8]) for i in range(0, 32, 8)}) > 1  # the order
    _, last, best = run(pretrain, tmp_path, monkeypatch, f"{flags} --resume --epochs 5", [0.3])
    assert (best["scores"], last["scores"]) == ({"top1": 0.4}, {"top1": 0.3})


def test_the_rate_of_dropout_reaches_all_layers():
    for changes in ({}, dict(structure="encoder-decoder", adaptor="none")):
        modules = list(Detector(replace(VARIANTS["tiny"], dropout=0.3, **changes), 2).modules())
        found = [m.p for m in modules if isinstance(m, nn.Dropout)]
        attention = [m.dropout for m in modules if isinstance(m, nn.MultiheadAttention)]
        assert len(found) >= 12 and set(found) == set(attention) == {0.3}
