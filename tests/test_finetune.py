"""Matching and losses against values computed by the authors' own code in float64, and against brute
force."""
import itertools
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch

import engine
from finetune import detection_loss, giou, match, optimizer_of, parse, train_step
from model import VARIANTS, Detector
from released import released_layout


@pytest.fixture
def golden(shared):
    z = np.load(shared("goldens/golden_loss_a.npz"))
    return {k: torch.from_numpy(z[k]) for k in z.files if k != "cfg_json"}


def targets_of(golden, empty=False):
    targets = []
    for i, (h, w) in enumerate(golden["img_hw"].tolist()):
        boxes, labels = golden[f"gt/img{i}_boxes_xyxy"], golden[f"gt/img{i}_labels"]
        if empty:
            boxes, labels = boxes[:0], labels[:0]
        x0, y0, x1, y1 = (boxes / torch.tensor([w, h, w, h])).unbind(1)
        targets.append({"labels": labels, "boxes": torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1
                                                                - y0], 1)})
    return targets


@pytest.mark.parametrize("prefix", ["", "allempty/"])
def test_matches_losses_and_gradients_equal_the_authors(golden, prefix):
    targets = targets_of(golden, empty=bool(prefix))
    logits, boxes = (golden[k].clone().requires_grad_() for k in ("cls_logits", "boxes_cxcywh"))
    levels = [{"pred_logits": l, "pred_boxes": b} for l, b in zip(logits, boxes)]
    for level, expected in zip(levels, golden[prefix + "match/query_to_gt"]):
        for (query, target), row in zip(match(level["pred_logits"], level["pred_boxes"], targets), expected):
            got = torch.full_like(row, -1)
            got[query] = target
            assert torch.equal(got, row)
    losses = detection_loss({**levels[-1], "aux_outputs": levels[:-1]}, targets)
    for ours, theirs in (("loss_class", "cls"), ("loss_bbox", "l1"), ("loss_giou", "giou")):
        torch.testing.assert_close(losses[ours].double(), golden[f"{prefix}loss/{theirs}"].sum(), rtol=0,
                                   atol=1e-6 if theirs == "giou" else 1e-9)
    sum(losses.values()).backward()
    torch.testing.assert_close(logits.grad, golden[prefix + "grad/cls_logits"], rtol=0, atol=1e-9)
    torch.testing.assert_close(boxes.grad, golden[prefix + "grad/boxes_cxcywh"], rtol=0, atol=1e-6)


def box_giou(a, b):
    (ax, ay, aw, ah), (bx, by, bw, bh) = a.tolist(), b.tolist()
    width = max(0, min(ax + aw / 2, bx + bw / 2) - max(ax - aw / 2, bx - bw / 2))
    height = max(0, min(ay + ah / 2, by + bh / 2) - max(ay - ah / 2, by - bh / 2))
    union = aw * ah + bw * bh - width * height
    hull = (max(ax + aw / 2, bx + bw / 2) - min(ax - aw / 2, bx - bw / 2)) \
        * (max(ay + ah / 2, by + bh / 2) - min(ay - ah / 2, by - bh / 2))
    return width * height / union - (hull - union) / hull


def test_losses_equal_their_definitions_written_out():
    """Three queries; an image with two objects and one with five, of which two stay without a query; two
    layers. Sums over queries and classes, divided by the five matches of a layer."""
    g = torch.Generator().manual_seed(1)
    targets = [{"labels": torch.randint(4, (n,), generator=g), "boxes": torch.rand(n, 4, generator=g) * 0.4
                + 0.1} for n in (2, 5)]
    layers = [{"pred_logits": torch.randn(2, 3, 4, generator=g),
               "pred_boxes": torch.rand(2, 3, 4, generator=g) * 0.4 + 0.1} for _ in range(2)]
    expected = dict.fromkeys(("loss_class", "loss_bbox", "loss_giou"), 0.0)
    for layer in layers:
        pairs = match(layer["pred_logits"], layer["pred_boxes"], targets)
        assert [len(q) for q, _ in pairs] == [2, 3]
        for i, (query, target) in enumerate(pairs):
            true_class = {q: targets[i]["labels"][t].item() for q, t in zip(query.tolist(), target.tolist())}
            for q, k in itertools.product(range(3), range(4)):
                p = layer["pred_logits"][i, q, k].double().sigmoid().item()
                expected["loss_class"] += 2 / 5 * (-0.25 * (1 - p) ** 2 * np.log(p) if true_class.get(q) == k
                                                   else -0.75 * p ** 2 * np.log(1 - p))
            for q, t in zip(query, target):
                box, true = layer["pred_boxes"][i, q], targets[i]["boxes"][t]
                expected["loss_bbox"] += 5 / 5 * (box - true).abs().sum().item()
                expected["loss_giou"] += 2 / 5 * (1 - box_giou(box, true))
    losses = detection_loss({**layers[-1], "aux_outputs": layers[:-1]}, targets)
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_match_is_the_cheapest_of_all_assignments(seed):
    """The cost written out for single pairs, every assignment tried: 4 queries, 3 objects."""
    g = torch.Generator().manual_seed(seed)
    logits, boxes = torch.randn(1, 4, 6, generator=g), torch.rand(1, 4, 4, generator=g) * 0.4 + 0.1
    labels, true = torch.tensor([5, 0, 5]), torch.rand(3, 4, generator=g) * 0.4 + 0.1

    def cost(q, t):
        p = logits[0, q, labels[t]].sigmoid().item()
        focal = 0.25 * (1 - p) ** 2 * -np.log(p) - 0.75 * p ** 2 * -np.log(1 - p)
        distance = (boxes[0, q] - true[t]).abs().sum().item()
        return 2 * focal + 5 * distance - 2 * box_giou(boxes[0, q], true[t])
    best = min(itertools.permutations(range(4), 3), key=lambda p: sum(cost(q, t) for t, q in enumerate(p)))
    query, target = match(logits, boxes, [{"labels": labels, "boxes": true}])[0]
    assert {(q, t) for t, q in enumerate(best)} == set(zip(query.tolist(), target.tolist()))
    assert giou(boxes[0, 0], true[0]).item() == pytest.approx(box_giou(boxes[0, 0], true[0]), abs=1e-6)


def test_more_objects_than_queries_leaves_objects_unmatched():
    targets = [{"labels": torch.zeros(5, dtype=torch.int64), "boxes": torch.rand(5, 4) * 0.2 + 0.3}]
    query, target = match(torch.randn(1, 2, 3), torch.rand(1, 2, 4), targets)[0]
    assert query.tolist() == [0, 1] and len(set(target.tolist())) == 2


def test_not_a_number_does_not_stop_the_matching():
    pairs = match(torch.full((1, 3, 2), float("nan")), torch.rand(1, 3, 4),
                  [{"labels": torch.tensor([0]), "boxes": torch.rand(1, 4)}])
    assert len(pairs[0][0]) == 1


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    torch.manual_seed(0)
    logits, boxes = torch.randn(4, 6, 3, requires_grad=True), torch.rand(4, 6, 4).requires_grad_()
    targets = [{"labels": torch.zeros(n, dtype=torch.int64), "boxes": torch.rand(n, 4)}
               for n in (3, 0, 1, 5)]

    def grad(size):
        total = 0
        for i in range(0, 4, size):
            out = {"pred_logits": logits[i:i + size], "pred_boxes": boxes[i:i + size], "aux_outputs": []}
            total = total + sum(detection_loss(out, targets[i:i + size], num_matches=9).values())
        return torch.autograd.grad(total, (logits, boxes))
    for size in (1, 2):
        for a, b in zip(grad(size), grad(4)):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def small_batch(device: str = "cpu"):
    """A tiny detector with dropout and two micro-batches: two images with three and no objects, one with
    one."""
    torch.manual_seed(0)
    model = Detector(replace(VARIANTS["tiny"], queries=5, dropout=0.1), 3).to(device).train()
    targets = [{"labels": torch.zeros(n, dtype=torch.int64), "boxes": torch.rand(n, 4) / 2 + 0.2}
               for n in (3, 0, 1)]
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, :, 64:] = True
    return model, [(torch.randn(2, 3, 64, 96), mask, targets[:2]), (torch.randn(1, 3, 64, 64), None,
                                                                    targets[2:])]


@pytest.mark.parametrize("structure, adaptor", [("encoder-only", "self-attention"),
                                                ("encoder-decoder", "none")])
def test_activation_checkpointing_does_not_change_the_gradient(structure, adaptor):
    """Dropout included: what it drew in the forward pass is drawn again."""
    model, batch = small_batch()
    model = Detector(replace(model.encoder.config, structure=structure, adaptor=adaptor), 3).train()
    calls, gradients = [], []
    model.encoder.layers[4].mlp.register_forward_hook(lambda *_: calls.append(1))
    for model.encoder.checkpointing in (False, True):
        torch.manual_seed(1)
        train_step(model, torch.optim.SGD(model.parameters(), lr=0), batch, Namespace(amp="off", clip=1e9),
                   torch.device("cpu"))
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert len(calls) == 2 + 4  # per micro-batch once, then twice
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_waits_for_the_gpu_only_to_match():
    model, batch = small_batch("cuda")
    optimizer = torch.optim.AdamW(model.parameters())

    def step():
        train_step(model, optimizer, batch, Namespace(amp="bf16", clip=0.1), torch.device("cuda"))
    step()  # compiles the kernel
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning) as found:
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in found if "synchronizing" in str(w.message)]) == len(batch)


def test_learning_rates_follow_the_released_code(monkeypatch):
    """The authors' Lite: at a tenth of the rate are the tokenizer's convolutions and norms, the offsets' and
    the reference points' projections: 1,223,362 parameters, of which 98,688 of the masked fifth level do not
    exist here."""
    monkeypatch.setattr("sys.argv", ["finetune.py", "--variant", "lite", "--data", "coco"])
    args = parse()
    assert (args.lr, args.epochs, args.lr_drop, args.batch_size, args.clip) == (1e-4, 50, 40, 32, 0.1)
    assert (args.weight_decay, args.dropout, args.image_size, args.augment) == (1e-4, 0.1, 800, "paper")
    groups = optimizer_of(released_layout(Detector(VARIANTS["lite"], 80)), args).param_groups
    slow, full = sorted(groups, key=lambda g: g["lr"])
    assert (slow["lr"], full["lr"]) == (pytest.approx(1e-5), pytest.approx(1e-4))
    assert sum(p.numel() for p in slow["params"]) == 1_223_362 - 98_688
    assert len(slow["params"]) == 44


@pytest.mark.parametrize("epoch, factor", [(0, 1), (39, 1), (40, 0.1), (49, 0.1)])
def test_step_schedule_drops_at_epoch_40(epoch, factor):
    for step in (0, 99):
        assert engine.schedule_factor("step", epoch * 100 + step, 100, 50, 40) == factor


def test_one_cycle_rises_and_falls():
    factors = [engine.schedule_factor("one-cycle", s, 10, 10, 0) for s in range(100)]
    assert np.argmax(factors) in (8, 9, 10) and max(factors) == pytest.approx(1, abs=0.01)
    assert factors[0] < 0.2 and factors[-1] == pytest.approx(0, abs=1e-6)
    assert np.all(np.diff(factors[10:]) < 0)
