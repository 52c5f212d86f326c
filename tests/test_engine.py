"""Checkpoints, loading between stages, batches over processes."""
import pickle
from argparse import Namespace

import pytest
import torch

import checkpoints
import engine
from model import VARIANTS, Classifier, Detector, InputError
from released import load_released

TINY = VARIANTS["tiny"]


def save(path, model, stage="finetune", layout="paper", classes=("a", "b")):
    content = checkpoints.describe(model, Namespace(layout=layout), list(classes), stage)
    checkpoints.save_checkpoint(path, content)
    return path


def test_a_saved_detector_loads_with_the_same_outputs(tmp_path):
    model, images = Detector(TINY, 2).eval(), torch.randn(1, 3, 64, 64)
    loaded, info = checkpoints.load_detector(save(tmp_path / "a.pt", model))
    assert torch.equal(loaded(images)["pred_logits"], model(images)["pred_logits"])
    assert info["classes"] == ["a", "b"] and checkpoints.variant_of(info["config"]) == "tiny"
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]  # no temporary file is left


def test_pretrained_encoder_is_copied_whole(tmp_path):
    classifier, detector = Classifier(TINY, 2), Detector(TINY, 2)  # as many classes, but not the same ones
    message = checkpoints.load_pretrained(detector, "paper", save(tmp_path / "c.pt", classifier,
                                                             stage="pretrain"))
    for k, v in classifier.encoder.state_dict().items():
        assert torch.equal(detector.encoder.state_dict()[k], v)
    assert message.endswith("c.pt: encoder; starting fresh: queries, adaptor, class_head, box_head")
    # still the 1 % prior of a fresh head
    assert detector.class_head.bias.eq(detector.class_head.bias[0]).all()


def test_a_detector_of_other_classes_gives_all_but_its_class_head(tmp_path):
    old, new = Detector(TINY, 7), Detector(TINY, 2)
    message = checkpoints.load_pretrained(new, "paper", save(tmp_path / "d.pt", old, classes="abcdefg"))
    assert torch.equal(new.queries.content, old.queries.content)
    assert torch.equal(new.box_head[0].weight, old.box_head[0].weight)
    assert message.endswith("starting fresh: class_head")


class Evil:
    def __reduce__(self):
        return print, ("unpickled!",)


def test_pickles_are_refused_and_never_run(tmp_path, capsys):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"model": Evil()}, tmp_path / "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(InputError, match="not unpickled"):
            checkpoints.load_checkpoint(tmp_path / name)
    assert "unpickled!" not in capsys.readouterr().out


def test_other_things_are_no_checkpoints(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    (tmp_path / "text.pt").write_text("hello")
    whole = save(tmp_path / "whole.pt", Detector(TINY, 2)).read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[:len(whole) // 2])
    save(tmp_path / "classifier.pt", Classifier(TINY, 2), stage="pretrain")
    (tmp_path / "empty.pt").write_bytes(b"")
    checkpoints.save_checkpoint(tmp_path / "hollow.pt", {"stage": "finetune", "config": {"colour": 3}})
    torch.save({"state_dict": {"bbox_head.query_embedding.weight": 3}}, tmp_path / "odd.pt")
    for name in ("tensor.pt", "text.pt", "half.pt", "gone.pt", "classifier.pt", "empty.pt", "hollow.pt"):
        with pytest.raises(InputError, match=name) as e:
            checkpoints.load_detector(tmp_path / name)
        assert "\n" not in str(e.value)
    with pytest.raises(InputError, match="not a whole released"):
        checkpoints.load_detector(tmp_path / "odd.pt")


@pytest.mark.parametrize("variant, layout", [("lite", "paper"), ("tiny", "released")])
def test_another_variant_or_layout_is_refused_by_name(tmp_path, variant, layout):
    path = save(tmp_path / "a.pt", Detector(TINY, 2))
    with pytest.raises(InputError, match=f"tiny in the paper layout, not {variant} in the {layout}"):
        checkpoints.load_pretrained(checkpoints.build(Detector, VARIANTS[variant], layout, 2), layout, path)


def test_batches_cover_an_epoch_once_whatever_the_number_of_processes(monkeypatch):
    def epoch(processes, seed=0, number=0):
        batches = []
        for r in range(processes):
            monkeypatch.setattr(engine, "rank", lambda r=r: r)
            monkeypatch.setattr(engine, "world_size", lambda: processes)
            sampler = engine.BatchSampler(10, 4, seed)
            sampler.epoch = number
            batches.append(list(sampler))
        return [sorted(i for part in step for i in part) for step in zip(*batches)]
    assert sorted(i for batch in epoch(1) for i in batch) == list(range(10))
    assert [len(b) for b in epoch(1)] == [4, 4, 2]
    assert epoch(1) == epoch(2) == epoch(3)  # with three, one process has nothing in the last batch
    assert epoch(1) != epoch(1, number=1) and epoch(1) != epoch(1, seed=1)


@pytest.mark.parametrize("variant", ["lite", "small", "base"])
def test_released_checkpoints_of_all_variants_load_and_detect(shared, variant):
    """Random weights under their names and shapes: the real files are a download. Lite's list is the
    authors' own; the other two follow from it by the sizes of Table 1."""
    config = VARIANTS[variant]
    sizes = {256: config.dim, 192: config.tokenizer_dim, 1024: config.mlp_dim, 320: config.heads * 40,
             160: config.heads * 20, 128: config.heads * 16, 768: 3 * config.dim, 512: 2 * config.dim}
    state = {}
    for line in shared("goldens/official_lite_state_dict_keys.tsv").read_text().splitlines():
        key, shape = line.split("\t")
        shape = [int(n) for n in shape.strip("(),").split(",")]
        if "sampling_offsets" in key and shape[0] == 256:
            shape[0] = config.heads * 32
            shape[1:] = [config.dim for _ in shape[1:]]
        else:
            shape = [sizes.get(n, n) for n in shape]
        state[key] = torch.randn(shape, generator=torch.Generator().manual_seed(len(state))) * 0.02
    for kind in ("cls", "reg"):  # six names for each head's tensors
        for key in [k for k in state if f"{kind}_branches" in k]:
            before, after = key.split("branches.")
            state[key] = state[f"{before}branches.0{after[1:]}"]
    detector = load_released({"meta": {"CLASSES": ("x",)}, "state_dict": state})
    assert detector.encoder.config == config
    assert not detector.training
    with torch.no_grad():
        assert detector(torch.randn(1, 3, 64, 96))["pred_logits"].shape == (1, 300, 80)
    state["bbox_head.cls_branches.3.bias"] = state["bbox_head.cls_branches.3.bias"] + 1
    with pytest.raises(InputError, match="cls_branches.3.bias"):
        load_released(state)


class BrokenSet(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise engine.InputError("image x.jpg cannot be read: replace it")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_out_of_a_data_loading_process_is_one_line_too(workers, capsys):
    with pytest.raises(SystemExit) as stop:
        engine.run_script(lambda: list(torch.utils.data.DataLoader(BrokenSet(), num_workers=workers)))
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: image x.jpg cannot be read: replace it\n"
