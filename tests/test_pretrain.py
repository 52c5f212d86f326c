"""The semantic softmax against the reference losses, the schedules and the sampler against their
definitions."""
import json
import math
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoints
import engine
import pretrain
from augment import ClassificationTransform
from data import ClassificationSet, classification_set, image_folder
from model import VARIANTS, Classifier, Detector, DropPath, InputError
from pretrain import RepeatedSampler, linear_baseline, load_tree, semantic_softmax_loss

# ------------------------------------------------------------------------------------------ semantic softmax

@pytest.mark.parametrize("name", ["fall11", "winter21"])
def test_semantic_softmax_equals_the_authors_code(shared, name):
    folder = shared("data/imagenet21k_tree")
    truth = json.loads((folder / "reference_loss.json").read_text())[name]
    tree = load_tree(folder / f"imagenet21k_p_{name}_tree.json")
    assert [len(c) for c in tree.columns] == truth["level_sizes"]
    target, classes = torch.tensor(truth["targets"]), len(tree.targets)
    assert tree.targets[target].tolist() == truth["semantic_targets"]
    logits = 3 * torch.sin(0.37 * torch.arange(len(target) * classes, dtype=torch.float64)).view(-1, classes)
    for smoothing, key in ((0.2, "loss_label_smooth_0_2"), (0, "loss_label_smooth_0")):
        assert semantic_softmax_loss(
            logits, target, tree, smoothing).item() == pytest.approx(truth[key], rel=1e-7)


# animal 0 > bird 1 > duck 2; plant 3 > tree 4; 5 stands alone
CHAINS = [[0], [1, 0], [2, 1, 0], [3], [4, 3], [5]]


@pytest.fixture
def tree_file(tmp_path):
    (tmp_path / "tree.json").write_text(json.dumps({"class_tree_list": CHAINS}))
    return tmp_path / "tree.json"


def test_a_small_tree_by_hand(tree_file):
    tree = load_tree(tree_file)
    assert [c.tolist() for c in tree.columns] == [[0, 3, 5], [1, 4]]  # the third level has one class only
    assert tree.targets.tolist() == [[0, -1], [0, 0], [0, 0], [1, -1], [1, 1], [2, -1]]
    assert tree.weights == [1, 2]
    logits = torch.tensor([[1.0, 2, 3, 4, 5, 6], [0, 1, 0, 0, 3, 0]], dtype=torch.float64)
    first = -math.log(math.exp(4) / (math.exp(1) + math.exp(4) + math.exp(6)))  # a plant, no tree
    second = math.log(3) + 2 * -math.log(math.exp(3) / (math.exp(1) + math.exp(3)))  # a tree
    got = semantic_softmax_loss(logits, torch.tensor([3, 4]), tree, 0)
    assert got.item() == pytest.approx((first + second) / 2)
    # first: level 0 says class 5, wrong; second: level 0 says 0 (all are equal), wrong; level 1 says 4,
    # right
    assert [int(x) for x in pretrain.semantic_accuracy(logits, torch.tensor([3, 4]), tree)] == [1, 3]


def test_build_tree_makes_the_reference_tree_again(shared, tmp_path):
    truth = json.loads(shared("data/imagenet21k_tree/imagenet21k_p_fall11_tree.json").read_text())
    names, chains = truth["class_list"], truth["class_tree_list"]
    # an is_a list with a node between each class and its parent that is no class, and an older, overruled
    # parent
    lines = [f"{names[-1]} {names[c[0]]}\nx{names[c[0]]} {names[c[0]]}\n{names[c[1]]} x{names[c[0]]}"
             for c in chains if len(c) > 1]
    (tmp_path / "is_a.txt").write_text("\n".join(lines))
    (tmp_path / "classes.txt").write_text("\n".join(reversed(names)))
    pretrain.build_tree(tmp_path / "is_a.txt", tmp_path / "classes.txt", tmp_path / "tree.json")
    ours = json.loads((tmp_path / "tree.json").read_text())
    assert ours["class_tree_list"] == chains and ours["class_list"] == names


@pytest.mark.parametrize("content", ["{", "[]", '{"class_tree_list": [[1], [0]]}',
                                     '{"class_tree_list": [[0], [1, 7]]}', '{"class_tree_list": []}',
                                     '{"class_tree_list": [[0], [1, 0]]}'])
def test_a_broken_tree_is_refused(tmp_path, content):
    (tmp_path / "tree.json").write_text(content)
    with pytest.raises(InputError, match="tree .* is not"):
        load_tree(tmp_path / "tree.json")


# --------------------------------------------------------------------------------------------------- recipe

def flags(**changes):
    return Namespace(**{**dict(schedule="cosine", lr=5e-4, epochs=300, warmup_epochs=5, warmup_lr=1e-6,
                               min_lr=1e-5), **changes})


def test_cosine_schedule_at_hand_computed_epochs():
    def rate(epoch):
        return pretrain.learning_rate(flags(), epoch * 10 + 9, 10)  # constant within an epoch
    assert rate(0) == 1e-6 and rate(2) == pytest.approx(1e-6 + 0.4 * 4.99e-4)
    assert rate(5) == pytest.approx(1e-5 + 4.9e-4 * (1 + math.cos(math.pi * 5 / 300)) / 2)
    assert rate(150) == pytest.approx(2.55e-4) and rate(299) == pytest.approx(1e-5, abs=2e-8)


def test_one_cycle_equals_torchs():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-4, steps_per_epoch=7, epochs=10,
                                                 pct_start=0.1,
                                                 cycle_momentum=False, div_factor=20)
    for step in range(70):
        ours = pretrain.learning_rate(flags(schedule="one-cycle", lr=3e-4, epochs=10), step, 7)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step(), theirs.step() if step < 69 else None


def test_repeated_augmentation_shows_a_third_of_the_images_three_times():
    sampler = RepeatedSampler(1000, 64, seed=0, repeats=3)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 12 and all(len(b) == 64 for b in batches)  # 768 of 1000 draws
    indices = [i for b in batches for i in b]
    assert len(set(indices)) == 768  # never the same copy twice
    images = [i % 1000 for i in indices]
    assert images[:3] == [images[0]] * 3 and len(set(images)) == 256
    sampler.epoch = 1
    assert [i % 1000 for b in sampler for i in b] != images


def test_processes_share_a_batch_in_pairs_that_are_mixed_together(monkeypatch):
    whole = list(RepeatedSampler(64, 16, seed=0, repeats=1))
    monkeypatch.setattr(engine, "world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(engine, "rank", lambda: rank)
        shares.append(list(RepeatedSampler(64, 16, seed=0, repeats=1)))
    for batch, parts in zip(whole, zip(*shares)):
        assert sorted(sum(parts, [])) == sorted(batch)
        for part in parts:
            for a, b in zip(part, reversed(part)):  # the partner of a share is the partner of the batch
                assert batch.index(a) == 15 - batch.index(b)


def test_norms_and_biases_do_not_decay():
    model = Classifier(VARIANTS["tiny"], 3)
    groups = engine.parameter_groups(model, 1.0, {}, decay_vectors=False)
    still = {id(p) for g in groups if g.get("weight_decay") == 0 for p in g["params"]}
    for name, p in model.named_parameters():
        assert (id(p) in still) == ("norm" in name or name.endswith("bias")), name


def test_stochastic_depth_keeps_the_mean_and_grows_with_depth():
    torch.manual_seed(0)
    path, x = DropPath(0.3), torch.ones(20000, 1, 2)
    dropped = path(x)
    assert dropped.unique().tolist() == [0, pytest.approx(1 / 0.7)]
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(dropped[..., 0], dropped[..., 1])  # a whole branch of an image
    assert path.eval()(x) is x
    rates = [layer.drop_path.rate for layer in Classifier(replace(VARIANTS["tiny"], drop_path=0.11),
                                                          2).encoder.layers]
    assert rates == pytest.approx([0.01 * i for i in range(12)])


# ----------------------------------------------------------------------------------------------------- data

@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        for i, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for k in range(count):
                Image.new(
                    "L" if k else "RGB", (90, 70 + k), i * 200).save(tmp_path / split / name / f"{k}.jpg")
    return tmp_path


def test_any_image_folder(folder):
    dataset = classification_set(str(folder), "train", ClassificationTransform(64, "deit"))
    assert dataset.classes == ["cat", "dog"] and len(dataset) == 6
    image, label = dataset[4]
    assert image.shape == (3, 64, 64) and label == 1
    assert not torch.equal(image, dataset[4 + 6][0])  # the next copy of the same picture
    assert torch.equal(image, dataset[4][0])
    assert [label for _, label in image_folder(
        folder / "train", 4, name="", transform=None).items] == [0, 1, 0, 1]


def test_images_are_normalised(folder):
    expected = [(200 - m) / s for m, s in zip((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))]
    # the dog's second picture is grey
    assert classification_set(
        str(folder), "val", ClassificationTransform(64))[3][0].mean((1, 2)).tolist() == \
        pytest.approx(expected, abs=0.1)


def test_released_pretraining_checkpoints_give_their_encoder(shared, tmp_path):
    rows = [line.split("\t") for line in
            shared("goldens/implied_pretrain_lite_state_dict_keys.tsv").read_text().splitlines()]
    g = torch.Generator().manual_seed(0)
    state = {row[0].replace("<i>", "0"): torch.randn(eval(row[1]), generator=g) for row in rows
             if row[1][0] == "("}
    for processed in (False, True):
        if processed:  # as the authors' script does
            heads = ("reference_points", "cls_branches", "query_embedding")
            state = {k.replace(".norms.", ".norms.x").replace("x0", "1").replace("x1", "2")
                     if "encoder2" in k else k: v for k, v in state.items() if
                     not any(h in k for h in heads)}
        torch.save({"state_dict": state, "meta": {}}, tmp_path / "p.pth")
        detector = checkpoints.build(Detector, VARIANTS["lite"], "released", 80)
        message = checkpoints.load_pretrained(detector, "released", tmp_path / "p.pth")
        assert message.endswith("p.pth: encoder; starting fresh: queries, adaptor, class_head, box_head")
        norms = "bbox_head.transformer.encoder2.layers.5.norms."
        theirs = state[norms + ("2" if processed else "1") + ".weight"]
        assert torch.equal(detector.encoder.layers[11].norm2.weight, theirs)
        assert torch.equal(detector.encoder.level_embed, state["bbox_head.transformer.level_embeds"])
        with pytest.raises(InputError, match="change --variant, --structure or --layout"):
            checkpoints.load_pretrained(Detector(VARIANTS["lite"], 80), "paper", tmp_path / "p.pth")


def test_init_takes_the_head_too_where_it_fits(tmp_path):
    old = Classifier(VARIANTS["tiny"], 4)
    path = tmp_path / "a.pt"
    checkpoints.save_checkpoint(path, checkpoints.describe(old, Namespace(layout="paper"), list("abcd"),
                                                           "pretrain"))
    same, other = Classifier(VARIANTS["tiny"], 4), Classifier(VARIANTS["tiny"], 5)
    assert checkpoints.load_pretrained(same, "paper", path).endswith("starting fresh: nothing")
    assert torch.equal(same.class_head.weight, old.class_head.weight)
    assert checkpoints.load_pretrained(other, "paper", path).endswith("starting fresh: class_head")
    assert torch.equal(other.class_token.content, old.class_token.content)


def test_linear_baseline_learns_what_pixels_tell_and_nothing_else(tmp_path):
    """Two classes that differ in brightness: all right. Labels drawn by lot: about half."""
    rng = np.random.default_rng(0)
    transform = ClassificationTransform(64, "flip")

    def make(count, label_of):
        items = []
        for i in range(count):
            grey = rng.integers(0, 80) + 130 * (i % 2)
            items.append((Image.fromarray(np.full((64, 64, 3), grey, np.uint8)), label_of(i)))
        return ClassificationSet(items, ["a", "b"], "pictures", transform)
    assert "top1 100.0 %" in linear_baseline(make(40, lambda i: i % 2), make(20, lambda i: i % 2))
    lot = linear_baseline(make(40, lambda i: i // 2 % 2), make(40, lambda i: i // 2 % 2))
    assert 25 <= float(lot.split("top1 ")[1].split(" %")[0]) <= 75 and "chance: 50.0 %" in lot
