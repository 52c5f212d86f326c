"""Matching and losses against the authors' own numbers and against their definitions written out; a
training step; and the loop, which has to apply the recipe of its flags."""
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from by_hand import cheapest_pairs, layer_losses, pair_giou

from extras.released import released_layout
from finetune import build_optimizer, detection_loss, giou, match, parse, train_step
from model import VARIANTS, Detector


@pytest.fixture
def golden(shared):
    """Computed by the authors' code in float64."""
    z = np.load(shared("goldens/golden_loss_a.npz"))
    return {k: torch.from_numpy(z[k]) for k in z.files if k != "cfg_json"}


@pytest.mark.parametrize("prefix", ["", "allempty/"])
def test_matches_losses_and_gradients_equal_the_authors(golden, prefix):
    targets = []
    for i, (h, w) in enumerate(golden["img_hw"].tolist()):
        boxes, labels = golden[f"gt/img{i}_boxes_xyxy"], golden[f"gt/img{i}_labels"]
        if prefix:  # no image has an object
            boxes, labels = boxes[:0], labels[:0]
        x0, y0, x1, y1 = (boxes / torch.tensor([w, h, w, h])).unbind(1)
        boxes = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], 1)
        targets.append({"labels": labels, "boxes": boxes})
    logits, boxes = (golden[k].clone().requires_grad_() for k in ("cls_logits", "boxes_cxcywh"))
    layers = [{"pred_logits": l, "pred_boxes": b} for l, b in zip(logits, boxes)]
    for layer, expected in zip(layers, golden[prefix + "match/query_to_gt"]):
        for (query, target), row in zip(match(**layer, targets=targets), expected):
            got = torch.full_like(row, -1)
            got[query] = target
            assert torch.equal(got, row)
    losses = detection_loss({**layers[-1], "aux_outputs": layers[:-1]}, targets)
    for ours, theirs, atol in (("class", "cls", 1e-9), ("bbox", "l1", 1e-9), ("giou", "giou", 1e-6)):
        expected = golden[f"{prefix}loss/{theirs}"].sum()
        torch.testing.assert_close(losses["loss_" + ours].double(), expected, rtol=0, atol=atol)
    sum(losses.values()).backward()
    torch.testing.assert_close(logits.grad, golden[prefix + "grad/cls_logits"], rtol=0, atol=1e-9)
    torch.testing.assert_close(boxes.grad, golden[prefix + "grad/boxes_cxcywh"], rtol=0, atol=1e-6)


def random_boxes(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, 4) * 0.4 + 0.1


def test_giou_by_hand_and_of_all_pairs():
    """Of the top left quarter and itself, a box inside, one across its corner, one far away."""
    quarter = torch.tensor([0.25, 0.25, 0.5, 0.5], dtype=torch.float64)
    others = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.125, 0.125, 0.25, 0.25], [0.5, 0.5, 0.5, 0.5],
                           [0.8, 0.9, 0.2, 0.2]], dtype=torch.float64)
    assert giou(quarter, others).tolist() == pytest.approx([1, 1 / 4, 1 / 7 - 2 / 9, -0.61 / 0.9])
    torch.manual_seed(0)
    a, b = random_boxes(3), random_boxes(4)
    for row, box in zip(giou(a[:, None], b).tolist(), a):
        assert row == pytest.approx([pair_giou(box, other).item() for other in b], abs=1e-6)


def test_losses_without_an_object_by_hand():
    """All logits are 0, so each of 2 x 3 x 4 probabilities is 1/2."""
    outputs = {"pred_logits": torch.zeros(2, 3, 4), "pred_boxes": random_boxes(2, 3), "aux_outputs": []}
    targets = 2 * [{"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}]
    for matches, divisor in ((None, 1), (4, 4)):
        losses = {k: v.item() for k, v in detection_loss(outputs, targets, matches).items()}
        expected = 2 * 24 * 0.75 * (1 / 2) ** 2 * np.log(2) / divisor
        assert losses == pytest.approx({"loss_class": expected, "loss_bbox": 0, "loss_giou": 0})


def test_losses_have_the_gradients_of_finite_differences():
    torch.manual_seed(0)
    targets = [{"labels": torch.randint(4, (n,)), "boxes": random_boxes(n).double()} for n in (2, 0)]
    inputs = [x.double().requires_grad_() for x in (torch.randn(2, 3, 4), random_boxes(2, 3))]

    def losses(logits, boxes):
        outputs = {"pred_logits": logits, "pred_boxes": boxes, "aux_outputs": []}
        return tuple(detection_loss(outputs, targets).values())
    assert torch.autograd.gradcheck(losses, inputs)


def test_losses_equal_their_definitions_written_out():
    """Three queries; an image with two objects and one with five, of which two stay without a query; two
    layers. Sums over queries and classes, divided by the five matches of a layer."""
    torch.manual_seed(1)
    targets = [{"labels": torch.randint(4, (n,)), "boxes": random_boxes(n)} for n in (2, 5)]
    layers = [{"pred_logits": torch.randn(2, 3, 4), "pred_boxes": random_boxes(2, 3)} for _ in range(2)]
    expected = dict.fromkeys(("loss_class", "loss_bbox", "loss_giou"), 0.0)
    for layer in layers:
        matches = match(**layer, targets=targets)
        assert [len(query) for query, _ in matches] == [2, 3]
        for i, (query, target) in enumerate(matches):
            logits, boxes = layer["pred_logits"][i].double(), layer["pred_boxes"][i]
            labels, true = targets[i]["labels"].tolist(), targets[i]["boxes"]
            pairs = list(zip(query.tolist(), target.tolist()))
            for name, loss in zip(expected, layer_losses(logits, boxes, labels, true, pairs)):
                expected[name] += loss.item() / 5
    losses = detection_loss({**layers[-1], "aux_outputs": layers[:-1]}, targets)
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_match_is_the_cheapest_of_all_assignments(seed):
    """Of 4 queries to 3, no and 1 objects."""
    torch.manual_seed(seed)
    logits, boxes = torch.randn(3, 4, 6), random_boxes(3, 4)
    targets = [{"labels": torch.tensor(labels, dtype=torch.int64), "boxes": random_boxes(len(labels))}
               for labels in ([5, 0, 5], [], [2])]
    for i, (query, target) in enumerate(match(logits, boxes, targets)):
        best = cheapest_pairs(logits[i], boxes[i], targets[i]["labels"].tolist(), targets[i]["boxes"])
        assert sorted(best) == list(zip(query.tolist(), target.tolist()))


def test_matching_of_more_objects_than_queries_and_of_numbers_that_are_not_finite():
    targets = [{"labels": torch.zeros(5, dtype=torch.int64), "boxes": random_boxes(5)}]
    for logits in (torch.randn(1, 2, 3), torch.full((1, 2, 3), float("nan"))):
        query, target = match(logits, random_boxes(1, 2), targets)[0]
        assert query.tolist() == [0, 1] and len(set(target.tolist())) == 2
    nothing = [{k: v[:0] for k, v in targets[0].items()}]
    assert [len(x) for x in match(logits, random_boxes(1, 2), nothing)[0]] == [0, 0]


def small_batch(device: str = "cpu", **changes) -> tuple[Detector, list]:
    """A tiny detector and two micro-batches: two images with three and no objects, one with one."""
    torch.manual_seed(0)
    model = Detector(replace(VARIANTS["tiny"], queries=5, **changes), 3).to(device).train()
    targets = [{"labels": torch.zeros(n, dtype=torch.int64), "boxes": random_boxes(n)}
               for n in (3, 0, 1)]
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, :, 64:] = True
    images = torch.randn(2, 3, 64, 96) * ~mask[:, None]
    return model, [(images, mask, targets[:2]), (torch.randn(1, 3, 64, 64), None, targets[2:])]


def gradient(model: Detector, batch: list, amp: str = "off") -> torch.Tensor:
    """The gradient with which a step updates the weights, flat."""
    torch.manual_seed(1)  # of dropout
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    train_step(model, optimizer, batch, Namespace(amp=amp, clip=0), torch.device("cpu"))
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("structure, adaptor", [("encoder-only", "self-attention"),
                                                ("encoder-decoder", "none")])
def test_activation_checkpointing_does_not_change_the_gradient(structure, adaptor):
    """Dropout included: the backward pass draws the same numbers again."""
    model, batch = small_batch(structure=structure, adaptor=adaptor, dropout=0.1)
    calls = []
    model.encoder.layers[4].mlp.register_forward_hook(lambda *_: calls.append(1))
    plain = gradient(model, batch)
    model.encoder.checkpointing = True
    assert torch.equal(gradient(model, batch), plain)
    assert len(calls) == 2 + 4  # per micro-batch once, then twice


def test_mixed_precision_reaches_the_layers():
    model, batch = small_batch()
    seen = []
    model.encoder.layers[4].mlp.register_forward_hook(lambda m, x, y: seen.append(y.dtype))
    for amp in ("off", "bf16"):
        assert gradient(model, batch, amp=amp).isfinite().all()
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_waits_for_the_gpu_only_to_match_and_for_the_gradients_norm():
    model, batch = small_batch("cuda", dropout=0.1)
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
    assert len([w for w in found if "synchronizing" in str(w.message)]) == len(batch) + 1


def test_defaults_and_learning_rates_are_the_papers_and_the_released_codes():
    """In the authors' Lite, the tokenizer's convolutions and norms and the projections to offsets and
    reference points learn at a tenth of the rate. These are 1,223,362 parameters, 98,688 of them of the
    masked fifth level, which does not exist here."""
    args = parse(["--variant", "lite", "--data", "coco"])
    assert (args.lr, args.epochs, args.lr_drop, args.batch_size, args.clip) == (1e-4, 50, 40, 32, 0.1)
    assert (args.weight_decay, args.dropout, args.image_size, args.augment) == (1e-4, 0.1, 800, "paper")
    assert (args.schedule, args.adaptor, args.adaptor_per_layer) == ("step", "self-attention", False)
    optimizer = build_optimizer(released_layout(Detector(VARIANTS["lite"], 80)), args)
    slow, full = sorted(optimizer.param_groups, key=lambda g: g["lr"])
    assert (slow["lr"], full["lr"]) == (pytest.approx(1e-5), pytest.approx(1e-4))
    assert slow["weight_decay"] == full["weight_decay"] == 1e-4
    assert sum(p.numel() for p in slow["params"]) == 1_223_362 - 98_688 and len(slow["params"]) == 44
    city = [parse(["--data", "cityscapes", "--variant", v]) for v in ("lite", "base")]
    assert [(c.batch_size, c.lr, c.epochs) for c in city] == [(8, 2e-4, 50), (8, 1e-4, 50)]
