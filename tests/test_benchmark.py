"""FLOP, hours and memory against counts by hand, speeds against known durations, and the command."""
import importlib
import json
import sys
import time
import warnings
from argparse import Namespace

import pytest
import torch
from torch.utils.data import DataLoader

import deform_attn
from conftest import deform_attn_inputs, refused
from deform_attn import ms_deform_attn_reference
from extras import benchmark
from model import VARIANTS, Classifier, Detector


def test_flop_of_pretraining():
    """Lite at 224 pixels with a class token. Two FLOP per multiplication and addition."""
    assert benchmark.forward_flops(Classifier, VARIANTS["lite"], (224, 224)) == 2 * (
        layers_of_lite([28 * 28, 14 * 14, 7 * 7, 4 * 4], extra=1) + 256 * 1000)


def test_flop_of_detection():
    """Lite at 800 x 1333 pixels, padded to 832 x 1344, with 300 queries and 80 classes."""
    # the projections to queries, keys, values and output; query times key and weight times value
    adaptor = 4 * 256 * 256 + 2 * 300 * 256
    heads = 256 * 80 + 256 * 256 + 256 * 256 + 256 * 4
    assert benchmark.forward_flops(Detector, VARIANTS["lite"], (800, 1333)) == 2 * (
        layers_of_lite([104 * 168, 52 * 84, 26 * 42, 13 * 21], extra=300) + 6 * 300 * (adaptor + heads))


def layers_of_lite(cells: list[int], extra: int) -> int:
    """Counts the multiplications of Lite by hand. cells: of the four maps."""
    D, D0, hidden, samples = 256, 192, 1024, 8 * 4 * 4
    N = sum(cells)
    kernels = zip(cells, (8, 2, 2, 2), (3, D0, D0, D0))
    tokenizer = sum(n * (k * k * c * D0 + D0 * D) for n, k, c in kernels)
    token = D * (2 * samples + samples) + D * D + 2 * D * hidden  # offsets, weights, output; MLP
    tokens = 6 * N + 5 * (N + extra) + extra  # the last layer updates the extra tokens alone
    values = 12 * N * D * D
    return tokenizer + tokens * token + values + extra * D * 2  # reference points


def test_checkpointing_keeps_little_more_than_the_layers_inputs():
    """Twelve inputs of N tokens of D channels in float32, and the queries' part, which is small."""
    inputs = 12 * 4 * 256 * sum(832 // s * (1344 // s) for s in (8, 16, 32, 64))
    kept = benchmark.activation_bytes(VARIANTS["lite"], True)
    assert inputs < kept < 1.5 * inputs < benchmark.activation_bytes(VARIANTS["lite"], False) / 4


def test_hours_by_arithmetic(capsys):
    """17.7 GFLOP x 1,281,167 images x 300 epochs x 3 / 78 TFLOP/s = 262,000 s = 72.7 h, and so on."""
    benchmark.main(["hours"])
    rows = {}
    for line in capsys.readouterr().out.splitlines():
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[name] = cells
    assert rows["ImageNet-1k, lite"] == ["224 x 224", "17.7", "1,281,167", "900", "72.7"]
    assert rows["COCO, base"][-1] == "84.5"
    assert rows["Cityscapes, five seeds, lite"] == ["667 x 1333", "337.1", "2,975", "750", "2.7"]
    assert rows["COCO-C, small"][-1] == "1.2"
    assert [rows[f"ImageNet-1k, FP-EncDec, class tokens: {n}"][-1] for n in (1, 300)] == ["43.2", "59.5"]
    assert rows["COCO, FP-EncDec"][-1] == "15.0"
    assert rows["ImageNet-21k-P of winter21, base"][-1] == "563.3"
    assert rows["lite"] == ["2.82", "0.33"]


class SlowItems(torch.utils.data.Dataset):
    """Each item takes `seconds` to load."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        time.sleep(self.seconds)
        return torch.zeros(3, 1, 1), 0


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("loading, training, workers, expected", [
    (0.02, 0.002, 2, 100),   # loading is the limit: two processes, 50 images/s each
    (0.05, 0.002, 4, 80),    # the same, with few batches, which come four at once
    (0.002, 0.04, 2, 100)])  # training is the limit: four images in 0.04 s
def test_speeds_are_those_of_known_durations(loading, training, workers, expected):
    loader = DataLoader(SlowItems(loading), batch_size=4, num_workers=workers)
    durations = iter([0.5, 0.5])  # the first steps compile, and two batches per process queue up

    def train_on(batch: list) -> None:
        time.sleep(next(durations, training))
    alone, trained = (4 * speed for speed in benchmark.measure_speeds(loader, train_on, 0.6))
    assert 0.5 < alone * loading / workers < 1.1  # a busy machine is slower
    assert 0.5 < trained / expected < 1.1


FLAGS = ["--limit-train", "6", "--batch-size", "4", "--micro-batch", "2", "--device", "cpu"]


@pytest.mark.parametrize("stage, flags, images", [
    ("finetune", ["--workers", "1", "--epochs", "5"], 5 * 6),
    ("finetune", ["--layout", "released"], 7 * 6),
    ("pretrain", ["--mixup", "0.8"], 4 * 4)])  # an incomplete last batch is dropped
def test_a_stage_is_measured_and_nothing_is_written(tmp_path, monkeypatch, capsys, stage, flags, images):
    monkeypatch.chdir(tmp_path)
    benchmark.main([stage, "--seconds", "0", *FLAGS, *flags])
    *page, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    speed = result["training_images_per_second"]
    assert min(speed, result["loader_images_per_second"], result["peak_gib"]) > 0
    assert result["hours"] == pytest.approx(images / speed / 3600)
    for figure in f"{speed:.2f} images/s", f"{result['peak_gib']:.2f} GiB", f"{images} images":
        assert figure in "\n".join(page)
    assert not list(tmp_path.iterdir())


def test_the_model_is_measured_as_it_is_trained():
    args = benchmark.finetune.parse(["--activation-checkpointing", "--layout", "released"])
    model = benchmark.build_model(Detector, 3, args)
    assert model.training and model.encoder.checkpointing and hasattr(model.adaptor, "norms")


def test_without_the_module_resource_the_peak_is_unknown(monkeypatch, capsys):
    """Windows does not have it."""
    monkeypatch.setitem(sys.modules, "resource", None)  # importing it raises ImportError
    importlib.reload(benchmark).main(["finetune", "--seconds", "0", *FLAGS])
    *page, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["peak_gib"] is None and "peak memory          unknown" in page


def test_every_way_to_compute_the_operator_is_timed(capsys):
    benchmark.main(["operator", "--repeats", "1", "--device", "cpu"])
    out = capsys.readouterr().out
    header, _, *rows = [line for line in out.splitlines() if line.startswith("|")]
    for way in "kernel", "forward", "backward", "cold", "reference", "stacked":
        assert f" {way} " in header
    assert [row.split("|")[1].strip() for row in rows] == [
        f"{size}, {dtype}" for size in ("lite, 512 x 512, batch 1", "tiny, 64 x 64, batch 16")
        for dtype in ("bfloat16", "float32")]
    assert "compilation: " in out and "loading from the cache: " in out
    assert "a call on tiny inputs: forward " in out


def test_the_common_formulation_computes_the_same():
    shapes = [(5, 4), (3, 2), (1, 1)]
    value, *rest = deform_attn_inputs(shapes, 2, 7, 3, 4, 2, torch.float64)
    theirs = benchmark.stacked_attention(value, shapes, *rest)
    expected = ms_deform_attn_reference(value, shapes, *rest)
    torch.testing.assert_close(theirs, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("arguments, says", [
    (["operator"], "FPDETR_DEFORM_ATTN=reference leaves nothing to compare"),
    (["--gpu", "--quick"], "FPDETR_DEFORM_ATTN=reference leaves nothing to compare"),
    (["--gpu", "hours"], "give either a command or --gpu"),
    ([], "give either a command or --gpu"),
    (["operator", "--rep", "1"], "unrecognized arguments: --rep 1"),
    (["hours", "--fast"], "unrecognized arguments: --fast"),
    (["finetune", "--sec", "1"], "unrecognized arguments: --sec"),
    (["finetune", "--data", "nowhere"], "nowhere is missing"),
    (["finetune", *FLAGS, "--structure", "encoder-decoder", "--adaptor", "bilstm"], "adaptor bilstm"),
    (["pretrain", *FLAGS, "--tree", "no.json"], "no.json is missing")])
def test_bad_input_ends_in_one_line(monkeypatch, tmp_path, arguments, says):
    monkeypatch.setenv("FPDETR_DEFORM_ATTN", "reference")
    refused(tmp_path, "extras.benchmark", *arguments, says=says)


LOOPS = """
.text.ms_deform_attn_forward:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
.L_x_1:
        /*0020*/                   FFMA R4, R5, R6, R4 ;
        /*0030*/                   FFMA R4, R5, R6, R4 ;
        /*0040*/              @!P1 BRA `(.L_x_1) ;
        /*0050*/               @P2 BRA `(.L_x_3) ;
        /*0060*/              @!P0 BRA `(.L_x_0) ;
.L_x_3:
        /*0070*/                   EXIT ;
.L_x_2:
        /*0080*/                   BRA `(.L_x_2);
        /*0090*/                   NOP;
"""


def test_instructions_in_loops_count_once_per_trip():
    """3 outside of loops, one of them the endless loop behind the end; 3 in a loop; 3 in a loop in it."""
    assert benchmark.warp_instructions(LOOPS, (5, 7)) == 3 + 5 * (3 + 7 * 3)


def test_gpu_kernel_needs_few_registers_and_spills_none(capsys):
    try:
        deform_attn.nvrtc_library()
        benchmark.disassemble(b"")
    except OSError as e:
        if "cannot open" in str(e) or "No such file" in str(e):
            pytest.skip(f"pip install nvidia-cuda-nvrtc nvidia-cuda-nvdisasm: {e}")
    benchmark.main(["kernel"])
    table = capsys.readouterr().out.splitlines()
    assert len([line for line in table if line.startswith("| sm_")]) == 24
    assert table[-1] == "45 of 45 checks passed"


def test_a_kernel_that_fails_a_check_is_named(monkeypatch, capsys):
    fine = {"registers": 64, "stack": 0, "spills": 0, "instructions": 9.5, "narrow stores": 0,
            "generic": 0}

    def inspect(config):
        spilled = config.arch == "sm_90" and config.channels == 48 and config.levels == 4
        return {"forward": fine, "backward": {**fine, "spills": 8 * spilled}}
    monkeypatch.setattr(benchmark, "inspect_kernel", inspect)
    with pytest.raises(SystemExit):
        benchmark.main(["kernel"])
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    assert failed == [f"FAILED: sm_90, {dtype}, C 48, backward: no register is spilled"
                      for dtype in ("float32", "bfloat16")]


def test_a_machine_without_nvrtc_is_told_what_to_install(monkeypatch, tmp_path):
    def no_library():
        raise OSError("libnvrtc.so: cannot open shared object file")
    monkeypatch.setattr(deform_attn, "nvrtc_library", no_library)
    says = "pip install nvidia-cuda-nvrtc nvidia-cuda-nvdisasm"
    refused(tmp_path, "extras.benchmark", "kernel", says=says)


def test_one_command_for_a_gpu_runs_to_its_end_on_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "new" / "gpu.json"
    benchmark.main(["--gpu", "--quick", "--out", str(path)])
    page, result = capsys.readouterr().out, json.loads(path.read_text())
    assert not any("error" in result[part] for part in ("tests", "operator", "training")), page
    assert result["tests"]["exit_code"] == 0 and " skipped" in result["tests"]["summary"]
    rows = result["operator"]["rows"]
    assert len(rows) == 4 and page.count("512 x 512, batch 1, ") == page.count("batch 16, ") == 2
    for row in rows:
        assert set(row["seconds"]) == {"kernel", "cold", "reference", "stacked"}
        assert all(forward > 0 for forward, _ in row["seconds"].values())
        assert f"{1e6 * row['seconds']['reference'][0] / row['batch']:.0f} |" in page
    row = {"batch": 2, "seconds": {"kernel": [4e-6, 8e-6], "cold": None}, "bounds": [1e-6, 4e-6]}
    assert benchmark.row_cells(row) == ("2", "25%", "-", "4", "50%", "-")
    step, = result["training"]["batches"]
    parts = step["parts"]
    assert list(parts) == ["forward", "matching and loss", "backward", "clipping and AdamW"]
    assert f"milliseconds: forward {1000 * parts['forward']:.1f}, " in page
    assert step["images_per_second"] * step["seconds"] == pytest.approx(1)
    assert step["hours"] == pytest.approx(118_287 * 50 * step["seconds"] / 3600)


def test_the_other_parts_run_when_one_fails(tmp_path, monkeypatch, capsys):
    def broken(*arguments, deadline):
        raise RuntimeError("CUDA error: no luck")

    def fine(result, *arguments, deadline):
        result["rows"] = []
    monkeypatch.setattr(benchmark, "run_gpu_tests", broken)
    monkeypatch.setattr(benchmark, "measure_operator", fine)
    monkeypatch.setattr(benchmark, "measure_training_step", fine)
    benchmark.main(["--gpu", "--quick", "--out", str(tmp_path / "gpu.json")])
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["tests"] == {"error": "RuntimeError: CUDA error: no luck"}
    assert result["operator"] == result["training"] == {"rows": []}
    assert "failed: RuntimeError: CUDA error: no luck" in capsys.readouterr().out


def test_without_a_gpu_only_quick_is_accepted(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(tmp_path, "extras.benchmark", "--gpu", says="torch sees no GPU: give --quick")


@pytest.mark.parametrize("capability, loads, atomics", [
    ((8, 0), 76e-6, 411e-6), ((9, 0), 50e-6, 275e-6)])
def test_limits_of_an_a100_and_an_h100(monkeypatch, capability, loads, atomics):
    """Lite at 800 x 1344, float32: 2.90 million samples. Their corners have 1.483 GB."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    got = benchmark.gpu_limits(800, 1344, 8, 32, 1, 300, torch.float32, torch.device("cuda"))
    assert got == pytest.approx((loads, atomics), rel=0.01)
    got = benchmark.gpu_limits(800, 1344, 8, 32, 2, 300, torch.bfloat16, torch.device("cuda"))
    assert got == pytest.approx((loads, 2 * atomics), rel=0.01)  # two images, each with half the bytes


def test_times_and_bytes_by_hand(monkeypatch):
    """One head of 8 channels; 4 + 1 + 1 + 1 tokens, which are the queries, too."""
    cpu, times = torch.device("cpu"), iter((1.0, 3.0))
    sizes = 16, 16, 1, 8, 1, 0, torch.float32, cpu
    seconds, moved = benchmark.time_operator(ms_deform_attn_reference, *sizes, lambda run: next(times))
    inputs = 4 * 7 * (8 + 4 * 4 * 2 + 4 * 4)  # values, offsets and logits
    forward = inputs + 4 * 7 * (4 * 2 + 8)  # references and output
    assert (seconds, moved) == ([1, 2], [forward, forward + inputs])
    monkeypatch.setattr(benchmark, "time_operator", lambda *_: ((2e-6, 3e-6), None))
    assert benchmark.call_microseconds(cpu) == pytest.approx((2, 5))
    ticks = iter((0, 100, 200, 201, 300, 302, 400, 409))  # 100, 1, 2, 9 s; the first one warms up
    monkeypatch.setattr(benchmark, "time", Namespace(perf_counter=lambda: next(ticks)))
    assert benchmark.median_seconds(lambda: None, cpu, 3) == 2
    monkeypatch.setattr(benchmark, "median_seconds", lambda *_: 1)
    assert benchmark.copy_bandwidth(cpu, 1) == 2 * 2 ** 26  # it reads and writes


@pytest.mark.parametrize("stage, build, flags, changes", [
    ("finetune", "build_finetuning",
     "--dropout 0.3 --adaptor bilstm --adaptor-per-layer --queries 7 --augment paper --seed 3",
     dict(dropout=0.3, adaptor="bilstm", adaptor_per_layer=True, queries=7)),
    ("pretrain", "build_pretraining", "--drop-path 0.2 --class-tokens 3 --augment deit --seed 3",
     dict(drop_path=0.2, class_tokens=3, adaptor="none"))])
def test_model_and_data_are_those_of_the_flags(stage, build, flags, changes, monkeypatch):
    seen, model = {}, benchmark.build_model
    monkeypatch.setattr(benchmark, "build_model", lambda *x, **y: seen.update(y) or model(*x, **y))
    args = getattr(benchmark, stage).parse([*flags.split(), "--limit-train", "4"])
    loader, _ = getattr(benchmark, build)(args, torch.device("cpu"))
    data = loader.dataset
    assert seen == changes and data.seed == 3
    assert getattr(data, "transform", data).augment == args.augment


def test_host_syncs_are_counted(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step():
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert benchmark.count_host_syncs(step, torch.device("cuda")) == 3
    assert modes == ["warn", "default"]
