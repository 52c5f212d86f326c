"""Tests deform_attn_kernel.cu: its GPU half in an emulator, its launch by a fake driver, its CPU half,
and its compilation by NVRTC and nvcc where they are installed. The truth is the reference in float64,
which test_deform_attn.py compares with a loop over pixels."""
import contextlib
import ctypes
import math
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, deform_attn_inputs

import deform_attn
from deform_attn import KernelConfig, ms_deform_attn, ms_deform_attn_reference

COMPILER = shutil.which("g++")
SHAPES = [(5, 7), (1, 1), (4, 3), (2, 1), (1, 5)]
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# The largest error allowed, relative to the largest float64 result: somewhat more than rounding.
TOLERANCE = {F64: 1e-12, F32: 2e-6, BF16: 1e-2, F16: 1.5e-3}


def truth(inputs, shapes, grad_output):
    """Returns the reference's output and its gradients of value, offsets and logits, in float64."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    output = ms_deform_attn_reference(wide[0], shapes, *wide[1:])
    value, _, offset, logit = torch.autograd.grad(output, wide, grad_output.double())
    return output.detach(), value, offset, logit


def assert_near(results, expected, dtypes):
    for got, want, dtype in zip(results, expected, dtypes):
        assert torch.isfinite(got).all()
        error = (got.double() - want).abs().max() / want.abs().max().clamp(min=1e-30)
        assert error <= TOLERANCE[dtype], (error, dtype)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    """emulate(arch, inputs, shapes, grad_output) -> output, gradients of value, offset and logit.

    The kernel's tensors have NaNs before and behind them, so that reading or writing there shows.
    """
    if COMPILER is None:
        pytest.skip("no g++ here")
    folder, built = tmp_path_factory.mktemp("emulator"), {}

    def emulate(arch, inputs, shapes, grad_output):
        def fenced(like, fill):
            whole = torch.full([like.numel() + 2048], math.nan, dtype=like.dtype)
            whole[1024:-1024] = fill.flatten() if isinstance(fill, torch.Tensor) else fill
            return whole, whole[1024:-1024].view(like.shape)
        value, reference, offset, logit = inputs
        fences = {}
        tensors = dict(reference=reference, offset=offset, logit=logit, grad_output=grad_output)
        fences["value"], tensors["value"] = fenced(value, value)
        accumulated = torch.empty(value.shape, dtype=torch.promote_types(value.dtype, F32))
        for name, like, fill in (("output", grad_output, math.nan), ("grad_value", accumulated, 0),
                                 ("grad_offset", offset, math.nan), ("grad_logit", logit, math.nan)):
            fences[name], tensors[name] = fenced(like, fill)
        flat = [n for shape in shapes for n in shape]
        config, arguments = deform_attn.pack_arguments(arch, flat, tensors)
        if config not in built:
            path = folder / f"{len(built)}.so"
            definitions = {**config.definitions(), "__CUDA_ARCH__": f"{arch[3:]}0"}
            options = [f"-D{k}={v}" for k, v in definitions.items()]
            subprocess.run([COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", *options,
                            ROOT / "tests" / "gpu_emulator.cpp", "-o", path], check=True)
            built[config] = ctypes.CDLL(str(path)).emulate
            built[config].restype = ctypes.c_bool
        for direction in ("forward", "backward"):
            grid = deform_attn.launch_grid(config, direction, arguments.B, arguments.Q)
            assert built[config](ctypes.byref(arguments), direction == "backward", *grid), "a deadlock"
        for whole in fences.values():
            assert whole[:1024].isnan().all() and whole[-1024:].isnan().all(), "written beyond the end"
        return [tensors[name] for name in ("output", "grad_value", "grad_offset", "grad_logit")]
    return emulate


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])  # the two kinds of atomics
@pytest.mark.parametrize("dtype, C, L, P", [
    (F32, 32, 4, 4), (BF16, 32, 4, 4), (F16, 32, 2, 3),
    (F32, 48, 3, 2), (BF16, 48, 4, 4), (F16, 48, 1, 8),
    (F32, 7, 5, 8), (BF16, 7, 1, 1), (F64, 16, 3, 4),
    (F32, 30, 5, 1), (BF16, 30, 2, 5), (F16, 30, 1, 4)])
def test_gpu_half_equals_the_reference(emulator, arch, dtype, C, L, P):
    shapes = SHAPES[:L]
    inputs = deform_attn_inputs(shapes, B=2, Q=19, M=3, C=C, P=P, dtype=dtype)
    grad_output = torch.randn(2, 19, 3 * C, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = emulator(arch, inputs, shapes, grad_output)
    # the kernel leaves the gradient of a 16-bit value in float32
    assert_near(results, truth(inputs, shapes, grad_output), [dtype, results[1].dtype, dtype, dtype])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_gpu_half_takes_a_dtype_for_each_tensor(emulator, arch):
    inputs = deform_attn_inputs(SHAPES[:4], B=1, Q=70, M=2, C=32, P=4, dtype=F32)
    inputs = [x.to(dtype) for x, dtype in zip(inputs, (BF16, F32, F32, F16))]
    grad_output = torch.ones(1, 70, 64, dtype=BF16)
    results = emulator(arch, inputs, SHAPES[:4], grad_output)
    assert_near(results, truth(inputs, SHAPES[:4], grad_output), [BF16, F32, F32, F16])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30, -3e38, 1e9])
def test_gpu_half_reads_nothing_at_far_and_undefined_places(emulator, bad):
    inputs = list(deform_attn_inputs(SHAPES[:2], B=1, Q=3, M=1, C=32, P=2, dtype=F32))
    inputs[2] = torch.full_like(inputs[2], bad)
    inputs[2][:, 0] = 0  # the first query has good offsets
    grad_output = torch.ones(1, 3, 32)
    output, grad_value, grad_offset, grad_logit = emulator("sm_90", inputs, SHAPES[:2], grad_output)
    good = [x if x.shape[1] == 36 else x[:, :1] for x in inputs]
    expected = truth(good, SHAPES[:2], grad_output[:, :1])
    assert_near([output[:, :1], grad_value, grad_offset[:, :1], grad_logit[:, :1]], expected, [F32] * 4)
    for x in (output, grad_offset, grad_logit):
        assert torch.equal(x[:, 1:], torch.zeros_like(x[:, 1:]))


def test_gpu_half_walks_over_more_images_than_the_grid_has(emulator, monkeypatch):
    """The grid's third side has at most 65,535 blocks. Here it has 1."""
    grid = deform_attn.launch_grid
    monkeypatch.setattr(deform_attn, "launch_grid", lambda *args: (*grid(*args)[:2], 1))
    inputs = deform_attn_inputs(SHAPES[:2], B=3, Q=9, M=2, C=32, P=4, dtype=F32)
    grad_output = torch.ones(3, 9, 64)
    results = emulator("sm_90", inputs, SHAPES[:2], grad_output)
    assert_near(results, truth(inputs, SHAPES[:2], grad_output), [F32] * 4)


cpu_kernel = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")


@cpu_kernel
@pytest.mark.parametrize("dtype, C, L, P", [
    (F32, 16, 4, 4), (F32, 32, 4, 4), (F32, 48, 2, 3), (F32, 7, 5, 8), (F32, 30, 1, 1), (F64, 5, 3, 2),
    (BF16, 32, 4, 4), (F16, 16, 2, 2)])
def test_cpu_half_equals_the_reference(dtype, C, L, P):
    shapes = SHAPES[:L]
    inputs = deform_attn_inputs(shapes, B=2, Q=19, M=3, C=C, P=P, dtype=dtype)
    inputs = [x.requires_grad_() for x in inputs]
    output = ms_deform_attn(inputs[0], shapes, *inputs[1:])
    assert type(output.grad_fn).__name__ == "FusedAttentionBackward"  # not the reference itself
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    value, reference, offset, logit = torch.autograd.grad(output, inputs, grad_output)
    assert_near([output, value, offset, logit], truth(inputs, shapes, grad_output), [dtype] * 4)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(ms_deform_attn_reference(wide[0], shapes, *wide[1:]), wide[1],
                                   grad_output.double())
    assert_near([reference], expected, [dtype])


@cpu_kernel
def test_cpu_half_equals_finite_differences():
    shapes = SHAPES[:3]
    inputs = deform_attn_inputs(shapes, B=1, Q=2, M=2, C=3, P=2, dtype=F64)
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda value, *rest: ms_deform_attn(value, shapes, *rest), inputs)


@cpu_kernel
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_cpu_half_reads_nothing_at_far_and_undefined_places(bad):
    inputs = deform_attn_inputs(SHAPES[:2], B=1, Q=1, M=1, C=16, P=1, dtype=F32)
    value, references, offsets, logits = inputs
    offsets = torch.full_like(offsets, bad).requires_grad_()
    value.requires_grad_()
    out = ms_deform_attn(value, SHAPES[:2], references, offsets, logits)
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(value.grad, torch.zeros_like(value)) and torch.isfinite(offsets.grad).all()


@cpu_kernel
def test_bfloat16_rounds_ties_to_even():
    """The mean of 1 and 1 + 2^-7, and of 1 + 2^-7 and 1 + 2^-6, rounds to the even mantissa."""
    value = torch.tensor([1, 1 + 2**-7, 1 + 2**-7, 1 + 2**-6], dtype=BF16).view(1, 4, 1, 1)
    # halfway between pixels 0 and 1, and between 2 and 3
    reference = torch.tensor([[0.25, 0.5], [0.75, 0.5]]).view(1, 2, 1, 2)
    zeros = torch.zeros(1, 2, 1, 1, 1, 2)
    output = ms_deform_attn(value, [(1, 4)], reference, zeros, zeros[..., 0])
    assert output.flatten().tolist() == [1, 1 + 2**-6]


def configs(arch):
    usual = [KernelConfig(arch, t, t, t, C, 8, 4, 4) for t in (F32, BF16, F16) for C in (32, 48)]
    return [*usual, KernelConfig(arch, F32, F32, F32, 7, 3, 5, 8),
            KernelConfig(arch, F64, F64, F64, 32, 8, 4, 4)]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_nvrtc_compiles_it(arch):
    try:
        deform_attn.nvrtc_library()
    except OSError as e:
        pytest.skip(f"NVRTC is not installed (pip install nvidia-cuda-nvrtc): {e}")
    for config in configs(arch):
        assert deform_attn.compile_kernel(config)[:4] == b"\x7fELF"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_nvcc_compiles_it_without_a_warning_or_spilled_registers(arch, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on this machine")
    config = configs(arch)[1]  # float32, 48 channels
    options = [f"-D{k}={v}" for k, v in config.definitions().items()]
    done = subprocess.run(["nvcc", "-cubin", "-std=c++17", f"-arch={arch}", "-Xptxas", "-v", *options,
                           str(deform_attn.SOURCE), "-o", str(tmp_path / "kernel.cubin")],
                          capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    assert done.stderr.count("0 bytes spill stores, 0 bytes spill loads") == 2, done.stderr


@pytest.fixture
def fake_gpu(fresh_kernels, monkeypatch):
    """fake_gpu() makes CPU tensors take the path of a GPU: the launch, through a driver that runs the
    emulator. -> the driver. fake_gpu("-DBEFORE_CUDA_12"): an old one."""
    if COMPILER is None:
        pytest.skip("no g++ here")

    def install(*options):
        config, path = KernelConfig("sm_90", F32, F32, F32, 32, 2, 2, 4), fresh_kernels / "libcuda.so"
        command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-D__CUDA_ARCH__=900", *options,
                   *config.options(), ROOT / "tests" / "fake_driver.cpp", "-o", path]
        subprocess.run(command, check=True)
        driver, open_library = ctypes.CDLL(str(path)), ctypes.CDLL
        monkeypatch.setattr(ctypes, "CDLL", lambda name, *rest: open_library(
            str(path) if name == "libcuda.so.1" else name, *rest))
        monkeypatch.setattr(deform_attn, "architecture", lambda device: "sm_90")
        monkeypatch.setattr(deform_attn, "compile_kernel", lambda config: b"machine code\0")
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
        monkeypatch.setattr(torch.cuda, "synchronize", driver.give_context)
        return driver
    return install


def launched_inputs():
    inputs = deform_attn_inputs(SHAPES[:2], B=2, Q=19, M=2, C=32, P=4, dtype=F32)
    return [x.requires_grad_() for x in inputs]


def test_launch_gives_the_driver_what_it_needs(fake_gpu):
    driver, inputs = fake_gpu(), launched_inputs()
    output = ms_deform_attn(inputs[0], SHAPES[:2], *inputs[1:])
    # 19 queries of 8 lanes are 2 blocks of 128 threads. There are 2 heads and 2 images.
    assert list((ctypes.c_ulong * 8).in_dll(driver, "launched")) == [2, 2, 2, 128, 1, 1, 0, 77]
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    value, _, offset, logit = torch.autograd.grad(output, inputs, grad_output)
    assert_near([output, value, offset, logit], truth(inputs, SHAPES[:2], grad_output), [F32] * 4)
    # A context belongs to a thread. The driver refuses launches in threads without one.
    with ThreadPoolExecutor(1) as pool:
        again = pool.submit(ms_deform_attn, inputs[0], SHAPES[:2], *inputs[1:]).result()
    assert torch.equal(again, output)


def test_error_of_a_launch_is_raised(fake_gpu, monkeypatch):
    fake_gpu()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)  # gives no context
    inputs = launched_inputs()
    with pytest.raises(OSError, match=r"CUDA driver: an error of the fake \(201\)"):
        ms_deform_attn(inputs[0], SHAPES[:2], *inputs[1:])


@pytest.mark.parametrize("what, says", [
    ("no driver", "libcuda.so.1: cannot open"),
    ("an old driver", "the NVIDIA driver is older than CUDA 12.0"),
    ("code that the driver refuses", r"CUDA driver: an error of the fake \(200\)")])
def test_reference_runs_where_the_driver_cannot(fake_gpu, monkeypatch, what, says):
    fake_gpu(*["-DBEFORE_CUDA_12"] * (what == "an old driver"))
    if what == "no driver":
        def open_library(name, *rest):
            raise OSError(f"{name}: cannot open shared object file")
        monkeypatch.setattr(ctypes, "CDLL", open_library)
    if what == "code that the driver refuses":
        monkeypatch.setattr(deform_attn, "compile_kernel", lambda config: b"nonsense\0")
    inputs = launched_inputs()
    with pytest.warns(UserWarning, match=says):
        output = ms_deform_attn(inputs[0], SHAPES[:2], *inputs[1:])
    assert torch.equal(output, ms_deform_attn_reference(inputs[0], SHAPES[:2], *inputs[1:]))


@pytest.mark.parametrize("wanted, compiled", [
    ("sm_90", "sm_90"), ("sm_87", "sm_87"), ("sm_89", "sm_86"), ("sm_103", "sm_100"), ("sm_75", None),
    ("sm_120", None)])
def test_an_older_nvrtc_compiles_for_the_gpu_if_it_can(wanted, compiled):
    """A GPU runs code for its major version and an earlier minor one, except that of Jetsons."""
    known = [80, 86, 87, 90, 100, 101, 104]

    def number_of_architectures(count):
        count._obj.value = len(known)

    def architectures(numbers):
        numbers[:] = known
    nvrtc = SimpleNamespace(nvrtcGetNumSupportedArchs=number_of_architectures,
                            nvrtcGetSupportedArchs=architectures)
    if compiled:
        assert deform_attn.supported_architecture(nvrtc, wanted) == compiled
    else:
        with pytest.raises(OSError, match=f"NVRTC does not know {wanted}: install a newer"):
            deform_attn.supported_architecture(nvrtc, wanted)
