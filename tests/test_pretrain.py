"""The semantic softmax against the authors' numbers; schedules, sampler and steps against their
definitions; and the loop, which has to apply the recipe of its flags."""
import json
import math
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import pretrain
from data import ClassificationSet
from engine import InputError
from extras.imagenet21k_tree import build_tree
from model import VARIANTS, Classifier
from pretrain import RepeatedSampler, load_tree, parse, semantic_softmax_loss, train_step


@pytest.mark.parametrize("name", ["fall11", "winter21"])
def test_the_semantic_softmax_equals_the_authors_code(shared, name):
    folder = shared("data/imagenet21k_tree")
    truth = json.loads((folder / "reference_loss.json").read_text())[name]
    tree = load_tree(folder / f"imagenet21k_p_{name}_tree.json")
    assert [len(c) for c in tree.members] == truth["level_sizes"]
    target, classes = torch.tensor(truth["targets"]), len(tree.targets)
    assert tree.targets[target].tolist() == truth["semantic_targets"]
    count = torch.arange(len(target) * classes, dtype=torch.float64)
    logits = 3 * torch.sin(0.37 * count).view(-1, classes)
    for smoothing, key in ((0.2, "loss_label_smooth_0_2"), (0, "loss_label_smooth_0")):
        loss = semantic_softmax_loss(logits, target, tree, smoothing)
        assert loss.item() == pytest.approx(truth[key], rel=1e-7)


@pytest.fixture
def tree(tmp_path):
    # animal 0 > bird 1 > duck 2; plant 3 > tree 4; 5 stands alone
    chains = [[0], [1, 0], [2, 1, 0], [3], [4, 3], [5]]
    (tmp_path / "tree.json").write_text(json.dumps({"class_tree_list": chains}))
    return load_tree(tmp_path / "tree.json")


def test_a_small_tree_by_hand(tree):
    assert [c.tolist() for c in tree.members] == [[0, 3, 5], [1, 4]]  # the third level has one class
    assert tree.targets.tolist() == [[0, -1], [0, 0], [0, 0], [1, -1], [1, 1], [2, -1]]
    assert tree.weights == [1, 2]
    logits = torch.tensor([[1.0, 2, 3, 4, 5, 6], [0, 1, 0, 0, 3, 0]], dtype=torch.float64)
    first = -math.log(math.exp(4) / (math.exp(1) + math.exp(4) + math.exp(6)))  # a plant, no tree
    second = math.log(3) + 2 * -math.log(math.exp(3) / (math.exp(1) + math.exp(3)))  # a tree
    got = semantic_softmax_loss(logits, torch.tensor([3, 4]), tree, 0)
    assert got.item() == pytest.approx((first + second) / 2)
    # The mean of -log p over the classes of a level: of (1, 4, 6), of (0, 0, 0) and of (1, 3).
    even = math.log(math.exp(1) + math.exp(4) + math.exp(6)) - 11 / 3
    even += math.log(3) + 2 * (math.log(math.exp(1) + math.exp(3)) - 2)
    got = semantic_softmax_loss(logits, torch.tensor([3, 4]), tree, 0.3)
    assert got.item() == pytest.approx((0.7 * (first + second) + 0.3 * even) / 2)


@pytest.mark.parametrize("content", [
    "{", "[]", '{"class_tree_list": [[1], [0]]}', '{"class_tree_list": [[0], [1, 7]]}',
    '{"class_tree_list": []}', '{"class_tree_list": [[0], [1, 0]]}'])
def test_a_broken_tree_is_refused(tmp_path, content):
    (tmp_path / "tree.json").write_text(content)
    with pytest.raises(InputError, match="tree .* is not"):
        load_tree(tmp_path / "tree.json")


def test_build_tree_makes_the_reference_tree_again(shared, tmp_path):
    truth = json.loads(shared("data/imagenet21k_tree/imagenet21k_p_fall11_tree.json").read_text())
    names, chains = truth["class_list"], truth["class_tree_list"]
    # Between each class and its parent stands a node that is no class. An older parent is overruled.
    lines = [f"{names[-1]} {names[c[0]]}\nx{names[c[0]]} {names[c[0]]}\n{names[c[1]]} x{names[c[0]]}"
             for c in chains if len(c) > 1]
    is_a, classes, out = (tmp_path / name for name in ("is_a.txt", "classes.txt", "tree.json"))
    is_a.write_text("\n".join(lines))
    classes.write_text("\n".join(reversed(names)))
    assert "levels" in build_tree(is_a, classes, out)
    ours = json.loads(out.read_text())
    assert ours["class_tree_list"] == chains and ours["class_list"] == names
    for text, says in (("a b c", "no is_a list"), ("a b\nb a", "a circle"), ("", "not belong together")):
        is_a.write_text(text)
        classes.write_text("a\nb")
        with pytest.raises(InputError, match=says):
            build_tree(is_a, classes, tmp_path / "new.json")


def test_the_cosine_schedule_at_hand_computed_epochs():
    args = parse(["--data", "imagenet", "--variant", "lite"])
    assert (args.lr, args.epochs, args.batch_size, args.weight_decay) == (5e-4, 300, 1024, 0.05)
    assert (args.repeats, args.mixup, args.cutmix, args.smoothing, args.drop_path) == (3, 0.8, 1, 0.1, 0.1)
    assert (args.schedule, args.augment, args.image_size) == ("cosine", "deit", 224)
    large = vars(parse(["--data", "imagenet21k", "--tree", "x.json"]))  # as Ridnik et al. 2021
    assert large.items() >= dict(lr=3e-4, epochs=80, batch_size=4096, weight_decay=1e-4, repeats=1, mixup=0,
                                 cutmix=0, smoothing=0.2, drop_path=0, augment="21k", variant="base",
                                 schedule="one-cycle").items()

    def rate(epoch):
        return pretrain.learning_rate(args, epoch * 10 + 9, 10)  # constant within an epoch
    assert rate(0) == 1e-6 and rate(2) == pytest.approx(1e-6 + 0.4 * 4.99e-4)
    assert rate(5) == pytest.approx(1e-5 + 4.9e-4 * (1 + math.cos(math.pi * 5 / 300)) / 2)
    assert rate(150) == pytest.approx(2.55e-4) and rate(299) == pytest.approx(1e-5, abs=2e-8)


def test_one_cycle_equals_torchs():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=3e-4, steps_per_epoch=7, epochs=10, pct_start=0.1, cycle_momentum=False,
        div_factor=20)
    args = Namespace(schedule="one-cycle", lr=3e-4, epochs=10)
    for step in range(70):
        expected = optimizer.param_groups[0]["lr"]
        assert pretrain.learning_rate(args, step, 7) == pytest.approx(expected, rel=1e-9)
        optimizer.step()
        if step < 69:
            theirs.step()


def test_repeated_augmentation_shows_a_third_of_the_images_three_times():
    sampler = RepeatedSampler(1000, 64, seed=0, repeats=3)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 12 and all(len(b) == 64 for b in batches)  # 768 of 1000 draws
    indices = [i for b in batches for i in b]
    images = [i % 1000 for i in indices]
    assert len(set(indices)) == 768  # never the same copy twice
    assert images[:3] == [images[0]] * 3 and len(set(images)) == 256
    sampler.epoch = 1
    assert [i % 1000 for b in sampler for i in b] != images
    assert len(RepeatedSampler(1000, 64, seed=0, repeats=1)) == 15  # 960 images, once each


@pytest.mark.parametrize("structure", ["encoder-only", "encoder-decoder"])
def test_norms_biases_class_token_and_positions_do_not_decay(structure):
    model = Classifier(replace(VARIANTS["tiny"], structure=structure, adaptor="none"), 3)
    no_decay = {"class_token.content", "class_token.position", "encoder.level_embed"}
    groups = pretrain.build_optimizer(model, Namespace(lr=1.0, weight_decay=0.05)).param_groups
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    for name, p in model.named_parameters():
        spared = "norm" in name or name.endswith("bias") or name in no_decay
        assert decay[id(p)] == (0 if spared else 0.05), name


def test_a_step_follows_the_gradient_of_the_semantic_softmax(tree):
    """In one part and in micro-batches."""
    torch.manual_seed(0)
    model, labels = Classifier(VARIANTS["tiny"], 6), torch.tensor([3, 4, 0])
    images = torch.randn(3, 3, 64, 64)
    model.class_head.bias.data[4] += 2  # the answer to all three images is 4
    loss = semantic_softmax_loss(model(images), labels, tree, 0.1)
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    for size in (3, 2):
        args = Namespace(smoothing=0.1, amp="off", micro_batch=size)
        got = train_step(model, optimizer, images, labels, 6, None, tree, args)
        assert got["right"].item() == pytest.approx(1 / 3)
        torch.testing.assert_close(got["loss"], loss.detach())
        for p, g in zip(model.parameters(), gradient):
            torch.testing.assert_close(p.grad, g, rtol=1e-3, atol=1e-6)


def test_predictions_are_of_pictures_from_all_over_the_validation_set(monkeypatch, tmp_path):
    labels, shown = np.arange(40), []
    val = ClassificationSet([Image.new("RGB", (64, 64))] * 40, labels, list(map(str, labels)), "x", 64)
    monkeypatch.setattr(pretrain.pictures, "predictions_sheet",
                        lambda *arguments: shown.extend(arguments[1:3]) or Image.new("RGB", (1, 1)))
    pretrain.draw_predictions(lambda x: torch.zeros(1, 40), val, torch.device("cpu"), tmp_path / "x.png")
    assert torch.allclose(shown[0], torch.full((16, 40), 1 / 40)) and shown[1] == list(range(0, 32, 2))


def test_an_evaluation_counts_by_hand(tree):
    class Answers(torch.nn.Module):
        def forward(self, images):
            assert not self.training
            return torch.tensor([[1.0, 2, 3, 4, 5, 6], [0, 1, 0, 0, 3, 0], [0, 1, 2, 3, 4, 5]])[images]
    # The first label has the third place, the second one the first, the third one the last. On level 0
    # the tree's best classes are 5, 0 and 5, all wrong; on level 1 it is 4, which is right.
    dataset = [(0, 3), (1, 4), (2, 0)]
    args = Namespace(micro_batch=2, workers=0, amp="off")
    scores = pretrain.evaluate(Answers().train(), dataset, tree, args, torch.device("cpu"))
    assert scores == pytest.approx({"top1": 1 / 3, "top5": 2 / 3, "semantic_top1": 1 / 4})
