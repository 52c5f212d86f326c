"""Checkpoints, weights that pass between the stages, batches over processes, flags, one-line errors."""
import argparse
import pickle
from argparse import Namespace
from dataclasses import replace

import pytest
import torch

import engine
from engine import InputError
from evaluate import load_detector
from extras.released import read_checkpoint, released_layout
from model import VARIANTS, Classifier, Detector

TINY = VARIANTS["tiny"]


def save(path, model, stage="finetune", layout="paper", classes=("a", "b")):
    description = engine.describe_run(model, Namespace(layout=layout), stage, list(classes), images=9)
    engine.save_checkpoint(path, {**description, "model": model.state_dict()})
    return path


def start_from(model, path, stage="finetune", layout="paper"):
    return engine.copy_weights(model, read_checkpoint(path), stage, layout, path)


# ------------------------------------------------------------------------------------------ checkpoints

def test_a_saved_detector_loads_with_the_same_outputs(tmp_path):
    model, images = Detector(TINY, 2).eval(), torch.randn(1, 3, 64, 64)
    loaded, checkpoint = load_detector(save(tmp_path / "a.pt", model))
    assert torch.equal(loaded(images)["pred_logits"], model(images)["pred_logits"])
    assert checkpoint["classes"] == ["a", "b"] and not loaded.training
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]  # no temporary file is left


def test_the_pretrained_encoder_is_copied_whole(tmp_path):
    classifier, detector = Classifier(TINY, 2), Detector(TINY, 2)  # as many classes, but other ones
    message = start_from(detector, save(tmp_path / "c.pt", classifier, stage="pretrain"))
    for k, v in classifier.encoder.state_dict().items():
        assert torch.equal(detector.encoder.state_dict()[k], v)
    assert message.endswith("c.pt: encoder; starting fresh: queries, adaptor, class_head, box_head")
    assert detector.class_head.bias.eq(detector.class_head.bias[0]).all()  # the 1 % of a fresh head


def test_a_detector_of_other_classes_gives_all_but_its_class_head(tmp_path):
    old, new = Detector(TINY, 7), Detector(TINY, 2)
    message = start_from(new, save(tmp_path / "d.pt", old, classes="abcdefg"))
    assert torch.equal(new.queries.content, old.queries.content)
    assert torch.equal(new.box_head[0].weight, old.box_head[0].weight)
    assert message.endswith("starting fresh: class_head")


@pytest.mark.parametrize("variant, layout, says", [
    ("lite", "paper", r"dim 64 \(here 256\)"), ("tiny", "released", r"layout paper \(here released\)")])
def test_another_size_or_layout_is_refused_by_name(tmp_path, variant, layout, says):
    model = Detector(VARIANTS[variant], 2)
    if layout == "released":
        released_layout(model)
    with pytest.raises(InputError, match=f"another encoder: .*{says}"):
        start_from(model, save(tmp_path / "a.pt", Detector(TINY, 2)), layout=layout)


class Evil:
    def __reduce__(self):
        return print, ("unpickled!",)


def test_pickles_are_refused_and_never_run(tmp_path, capsys):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"model": Evil()}, tmp_path / "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(InputError, match="not unpickled"):
            engine.load_checkpoint(tmp_path / name)
    assert "unpickled!" not in capsys.readouterr().out


def test_other_files_are_no_checkpoints(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    (tmp_path / "text.pt").write_text("hello")
    whole = save(tmp_path / "whole.pt", Detector(TINY, 2)).read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("tensor.pt", "text.pt", "half.pt", "gone.pt", "empty.pt"):
        with pytest.raises(InputError, match=name) as e:
            engine.load_checkpoint(tmp_path / name)
        assert "\n" not in str(e.value)
    torch.save({"weights": 3}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="other.pt is neither"):
        start_from(Detector(TINY, 2), tmp_path / "other.pt")


def test_only_the_same_run_can_be_resumed(tmp_path):
    """Each part of the recipe differs once and is refused. Machine flags and more epochs are not."""
    def description(config=TINY, classes=("a", "b"), images=9, model=Detector, **flags):
        args = dict(layout="paper", lr=0.1, epochs=5, workers=2, pretrained=None)
        model = model(config, len(classes))
        return engine.describe_run(model, Namespace(**{**args, **flags}), "finetune", classes, images)
    saved = {**description(), "optimizer": {}, "epoch": 3}
    for same in (description(), description(workers=0, epochs=9), description(epochs=3)):
        engine.check_resumed(saved, same, tmp_path)
    for other, says in ((description(lr=0.2), r"--lr 0.1 \(now 0.2\)"),
                        (description(images=8), "images 9"),
                        (description(pretrained="x.pt"), "--pretrained None"),
                        (description(replace(TINY, dropout=0.3)), "dropout"),
                        (description(classes=("a", "c")), "classes"),
                        (description(epochs=2), "3 epochs"),
                        ({**description(), "stage": "pretrain"}, "stage finetune"),
                        (description(model=type("Mine", (Detector,), {})), "model_class Detector")):
        with pytest.raises(InputError, match=says):
            engine.check_resumed(saved, other, tmp_path)
    del saved["optimizer"]
    with pytest.raises(InputError, match="cannot be resumed"):
        engine.check_resumed(saved, description(), tmp_path)


# ---------------------------------------------------------------------------------- batches and flags

def test_batches_cover_an_epoch_once_whatever_the_number_of_processes(monkeypatch):
    def epoch(processes, seed=0, number=0, skip=0):
        batches = []
        for r in range(processes):
            monkeypatch.setattr(engine, "rank", lambda r=r: r)
            monkeypatch.setattr(engine, "world_size", lambda: processes)
            sampler = engine.BatchSampler(10, 4, seed)
            sampler.epoch, sampler.skip = number, skip
            batches.append(list(sampler))
        return [sorted(i for part in step for i in part) for step in zip(*batches)]
    assert sorted(i for batch in epoch(1) for i in batch) == list(range(10))
    assert [len(b) for b in epoch(1)] == [4, 4, 2]
    assert epoch(1) == epoch(2) == epoch(3)  # with three, one process has nothing in the last batch
    assert epoch(1) != epoch(1, number=1) and epoch(1) != epoch(1, seed=1)
    assert epoch(1, skip=2) == epoch(1)[2:]
    sampler = engine.BatchSampler(10, 4, 0)
    assert [sampler.images_after(step) for step in range(7)] == [0, 4, 8, 10, 14, 18, 20]


def test_numbers_of_flags_have_bounds():
    assert (engine.positive("1"), engine.natural("0"), engine.rate("0")) == (1, 0, 0)
    assert engine.fraction("0.9") == 0.9
    for kind, text in ((engine.positive, "0"), (engine.natural, "-1"), (engine.fraction, "1"),
                       (engine.rate, "nan"), (engine.rate, "inf"), (engine.rate, "-1")):
        with pytest.raises(argparse.ArgumentTypeError, match=text):
            kind(text)


def test_means_over_steps():
    means = engine.RunningMean()
    for a, b in ((1, 10), (2, 20), (6, 60)):
        means.add({"a": torch.tensor(a), "b": torch.tensor(b)})
    assert means.read() == {"a": 3, "b": 30}
    means.add({"a": torch.tensor(5)})
    assert means.read() == {"a": 5}


# -------------------------------------------------------------------------------------- one-line errors

class BrokenSet(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise InputError("image x.jpg cannot be read: replace it")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_data_loading_process_is_one_line_too(workers, capsys):
    def main():
        list(engine.read_batches(torch.utils.data.DataLoader(BrokenSet(), num_workers=workers)))
    with pytest.raises(SystemExit) as stop:
        engine.run_script(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: image x.jpg cannot be read: replace it\n"


def test_faults_of_the_program_keep_their_traceback(monkeypatch):
    def main(error):
        raise error
    for error in (ValueError("x"), RuntimeError("x"), KeyError("x")):
        with pytest.raises(type(error)):
            engine.run_script(main, error=error)
    with pytest.raises(SystemExit):
        engine.run_script(main, error=ValueError("FPDETR_DEFORM_ATTN=cpu: no compiler"))
