"""What Tables 3, 5 and 7 vary, through the programs themselves: adaptors, encoder-decoder, seeds."""
import json
import statistics
import sys

import pytest
import torch

import checkpoints
import evaluate
import finetune
import pretrain
from model import InputError

SHORT = ["--epochs", "1", "--limit-train", "8", "--limit-val", "2", "--device", "cpu"]


def call(program, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["program", *map(str, flags)])
    program.main()


@pytest.mark.parametrize("adaptor", [["--adaptor", "none"], ["--adaptor", "bilstm"],
                                     ["--adaptor", "bilstm", "--adaptor-per-layer"],
                                     ["--adaptor", "self-attention", "--adaptor-per-layer"]])
def test_rows_of_table_3_train_resume_evaluate_and_stand_in_it(adaptor, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    call(finetune, monkeypatch, *SHORT, *adaptor, "--out", out)
    call(finetune, monkeypatch, *SHORT, *adaptor, "--out", out, "--resume", "--epochs", "2")
    call(evaluate, monkeypatch, out / "last.pt", "--limit-val", "2", "--workers", "0", "--device", "cpu")
    capsys.readouterr()
    call(evaluate, monkeypatch, "--table", "3", out)
    row = [c.strip() for c in capsys.readouterr().out.splitlines()[-1].strip("|").split("|")]
    shared = "-" if adaptor[1] == "none" else "no" if len(adaptor) > 2 else "yes"
    model, _ = checkpoints.load_detector(out / "last.pt")
    parameters = sum(p.numel() for p in model.parameters())
    assert row[1] == shared and float(row[-1]) == pytest.approx(parameters / 1e6, abs=0.05)
    changed = ["--adaptor", "self-attention"]
    with pytest.raises(InputError, match="--adaptor"):
        call(finetune, monkeypatch, *SHORT, *changed, "--out", out, "--resume")


@pytest.mark.parametrize("tokens", [1, 5])
def test_an_encoder_decoder_is_pre_trained_and_transferred_whole(tokens, tmp_path, monkeypatch, capsys):
    """Table 7: what fine-tuning starts from is bit for bit what pre-training left, decoder included."""
    structure = ["--structure", "encoder-decoder"]
    call(pretrain, monkeypatch, *SHORT, *structure, "--class-tokens", tokens, "--out", tmp_path / "pre")
    started = {}
    real = finetune.prepare

    def prepare(*args):
        prepared = real(*args)
        started.update({k: v.clone() for k, v in prepared[2].encoder.state_dict().items()})
        return prepared
    monkeypatch.setattr(finetune, "prepare", prepare)
    flags = [*SHORT, "--pretrained", tmp_path / "pre" / "last.pt", "--out", tmp_path / "fine"]
    call(finetune, monkeypatch, *flags, *structure)
    left = checkpoints.load_checkpoint(tmp_path / "pre" / "last.pt")
    assert any("self_attention" in k for k in started)
    assert all(torch.equal(v, left["model"]["encoder." + k]) for k, v in started.items())
    metrics = json.loads((tmp_path / "fine" / "metrics.json").read_text())
    assert metrics["class_tokens"] == tokens and metrics["top1"] == left["scores"]["top1"]
    assert metrics["adaptor"] == "none"
    with pytest.raises(InputError, match="encoder-decoder"):
        call(finetune, monkeypatch, *flags, "--overwrite")  # an encoder-only detector
    with pytest.raises(InputError, match="adaptor bilstm in an encoder-decoder"):
        call(finetune, monkeypatch, *SHORT, *structure, "--adaptor", "bilstm", "--out", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_seeds_are_collected_or_resumed_and_summed_up(tmp_path, monkeypatch, capsys):
    flags = [*SHORT, "--limit-train", "16", "--seeds", "2", "--seed", "3", "--out", tmp_path / "five"]
    real, calls = finetune.train_epoch, []

    def train_epoch(*args):
        calls.append(args[4].seed)
        if len(calls) == 2:
            raise KeyboardInterrupt  # in the second seed
        return real(*args)
    monkeypatch.setattr(finetune, "train_epoch", train_epoch)
    with pytest.raises(KeyboardInterrupt):
        call(finetune, monkeypatch, *flags)
    call(finetune, monkeypatch, *flags)
    assert calls == [3, 4, 4]  # the first was not trained again
    runs = [json.loads((tmp_path / "five" / f"seed-{s}" / "metrics.json").read_text()) for s in (3, 4)]
    ap50 = [100 * r["AP50"] for r in runs]
    printed = capsys.readouterr().out.splitlines()
    row = [line for line in printed if line.startswith("| this model")][-1].split("|")
    assert row[3].strip() == f"{statistics.mean(ap50):.1f}±{statistics.stdev(ap50):.1f}"
    weights = [checkpoints.load_checkpoint(tmp_path / f"five/seed-{s}/last.pt")["model"] for s in (3, 4)]
    assert not torch.equal(weights[0]["queries.content"], weights[1]["queries.content"])


@pytest.mark.parametrize("flags, says", [
    (["--queries", "0"], "0 queries"), (["--adaptor", "none", "--adaptor-per-layer"], "adaptor none")])
def test_impossible_combinations_are_refused_before_anything_is_written(flags, says, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=says):
        call(finetune, monkeypatch, *SHORT, *flags, "--out", tmp_path / "no")
    assert not (tmp_path / "no").exists()
