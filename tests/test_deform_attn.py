"""Compares the operator with a loop over pixels and with finite differences."""
import math
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, deform_attn_inputs
from torch.library import opcheck

import deform_attn
from deform_attn import (MSDeformAttn, ms_deform_attn, ms_deform_attn_reference)

SHAPES = [(5, 7), (3, 4), (2, 2), (1, 1)]


def make_inputs(dtype=torch.float64, **sizes):
    return deform_attn_inputs(SHAPES, **{**dict(B=2, Q=6, M=3, C=5, P=2), **sizes}, dtype=dtype)


def brute_force(value, references, offsets, logits):
    """Computes the formula in the docstring of ms_deform_attn, pixel by pixel."""
    B, Q, M, L, P, _ = offsets.shape
    output = torch.zeros(B, Q, M, value.shape[-1], dtype=value.dtype)
    for b in range(B):
        for q in range(Q):
            for m in range(M):
                weights = [[math.exp(logits[b, q, m, l, p]) for p in range(P)] for l in range(L)]
                total, start = sum(map(sum, weights)), 0
                for l, (H, W) in enumerate(SHAPES):
                    for p in range(P):
                        x = (references[b, q, l, 0] + offsets[b, q, m, l, p, 0] / W).item() * W - 0.5
                        y = (references[b, q, l, 1] + offsets[b, q, m, l, p, 1] / H).item() * H - 0.5
                        for py in range(H):
                            for px in range(W):
                                near = max(0, 1 - abs(x - px)) * max(0, 1 - abs(y - py))
                                weight = weights[l][p] / total * near
                                output[b, q, m] += weight * value[b, start + py * W + px, m]
                    start += H * W
    return output.flatten(2)


def test_reference_equals_a_loop_over_pixels():
    inputs = make_inputs()
    got = ms_deform_attn_reference(inputs[0], SHAPES, *inputs[1:])
    torch.testing.assert_close(got, brute_force(*inputs), rtol=0, atol=1e-12)


def test_reference_gradients_equal_finite_differences():
    inputs = [x.requires_grad_() for x in make_inputs(B=1, Q=2, M=2, C=2)]
    assert torch.autograd.gradcheck(lambda v, *rest: ms_deform_attn_reference(v, SHAPES, *rest), inputs)


FLAT = [n for shape in SHAPES for n in shape]
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
DEVICES = ["cpu", pytest.param("cuda", marks=no_gpu)]


@pytest.fixture(params=DEVICES)
def kernel_device(request):
    """A device on which the kernel should run instead of the reference."""
    if request.param == "cpu" and not any(map(shutil.which, ("c++", "g++"))):
        pytest.skip("no C++ compiler here")
    return request.param


def on(device, inputs):
    return [x.detach().to(device).requires_grad_() for x in inputs]


def test_operator_is_registered_as_pytorch_wants_it(kernel_device):
    inputs = [x.detach() for x in on(kernel_device, make_inputs(C=16, dtype=torch.float32))]
    opcheck(torch.ops.fpdetr.ms_deform_attn.default, (*inputs, FLAT))
    output = torch.ops.fpdetr.ms_deform_attn(*inputs, FLAT)
    opcheck(torch.ops.fpdetr.ms_deform_attn_backward.default, (output, *inputs, FLAT))


def test_first_calls_do_not_import_the_compiler(kernel_device):
    """torch._dynamo takes more than a second to import."""
    code = ("import sys, torch; from deform_attn import MSDeformAttn\n"
            f"layer, query = MSDeformAttn(32, 2).to({kernel_device!r}), torch.ones(1, 4, 32, "
            f"device={kernel_device!r})\n"
            "layer(query, query[..., :8].unflatten(-1, (4, 2)), query, [(1, 1)] * 4).sum().backward()\n"
            "assert 'torch._dynamo' not in sys.modules")
    env = {**os.environ, "FPDETR_DEFORM_ATTN": kernel_device}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True)


def test_compiled_graph_equals_eager(kernel_device):
    def layer(value, *rest):
        return ms_deform_attn(value * 2, SHAPES, *rest).sin().sum()
    graph = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for B, Q in ((2, 6), (3, 9), (4, 5)):  # the second and third sizes are traced as symbols
        inputs = on(kernel_device, make_inputs(B=B, Q=Q, C=16, dtype=torch.float32))
        assert torch.equal(graph(*inputs), layer(*inputs))
        for got, want in zip(*(torch.autograd.grad(f(*inputs), inputs) for f in (graph, layer))):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_any_strides_and_alignments(kernel_device):
    """Compares expanded, transposed and misaligned inputs and gradients with their plain copies."""
    value, references, offsets, logits = on(kernel_device, make_inputs(Q=6, C=16, dtype=torch.float32))
    # starts 4 bytes after a multiple of 16 bytes
    odd = torch.empty(value.numel() + 1, device=kernel_device)[1:].view_as(value)
    strange = (odd.copy_(value.detach()), references[:, :1, :1].expand(-1, 6, 4, -1),
               offsets.detach().transpose(2, 3).contiguous().transpose(2, 3),
               logits[:1].expand(2, -1, -1, -1, -1))
    plain = [x.detach().clone().contiguous().requires_grad_() for x in strange]
    strange = [x.detach().requires_grad_() for x in strange]
    outputs = [ms_deform_attn(x[0], SHAPES, *x[1:]) for x in (strange, plain)]
    assert torch.equal(*outputs)
    # the gradient of a sum is an expanded scalar
    for got, want in zip(*(torch.autograd.grad(o.sum(), x) for o, x in zip(outputs, (strange, plain)))):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("B, Q", [(0, 5), (2, 0)])
def test_nothing_to_do(kernel_device, B, Q):
    inputs = on(kernel_device, make_inputs(B=B, Q=Q, C=16, dtype=torch.float32))
    output = ms_deform_attn(inputs[0], SHAPES, *inputs[1:])
    assert output.shape == (B, Q, 48)
    for x, grad in zip(inputs, torch.autograd.grad(output.sum(), inputs)):
        assert grad.shape == x.shape and not grad.any()


def test_autocast(kernel_device):
    """Values, offsets and logits of 16 bits with float32 references give nearly the float32 result."""
    torch.manual_seed(0)
    layer = MSDeformAttn(dim=64, heads=4).to(kernel_device)
    torch.nn.init.normal_(layer.sampling_offsets.weight, std=0.2)
    query = torch.randn(2, 9, 64, device=kernel_device)
    memory = torch.randn(2, 52, 64, device=kernel_device)
    references = torch.rand(2, 9, 4, 2, device=kernel_device)
    exact = layer(query, references, memory, SHAPES)
    with torch.autocast(kernel_device, torch.bfloat16):
        rough = layer(query, references, memory, SHAPES)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, rtol=0, atol=0.02 * exact.abs().max().item())
    rough.float().sum().backward()
    assert layer.sampling_offsets.weight.grad.abs().max() > 0


def test_second_derivatives_are_refused(kernel_device):
    inputs = on(kernel_device, make_inputs(C=16, dtype=torch.float32))
    output = ms_deform_attn(inputs[0], SHAPES, *inputs[1:])
    for loss in (output.square().sum(), output.sum()):  # the second one's gradient is a constant
        gradients = torch.autograd.grad(loss, inputs, create_graph=True, retain_graph=True)
        for gradient in gradients:
            with pytest.raises(RuntimeError, match="no second derivative"):
                (output.sum() + gradient.square().sum()).backward(retain_graph=True)


@no_gpu
def test_cuda_graph():
    inputs = on("cuda", make_inputs(C=32, dtype=torch.float32))

    def step():
        loss = ms_deform_attn(inputs[0], SHAPES, *inputs[1:]).square().sum()
        return torch.autograd.grad(loss, inputs)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compiles and loads the kernel before the capture
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        inputs[0].mul_(2)
    graph.replay()
    for got, want in zip(captured, step()):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@no_gpu
def test_gpu_equals_the_reference_and_refuses_to_be_deterministic():
    inputs = on("cuda", make_inputs(C=32, dtype=torch.float32))
    output = ms_deform_attn(inputs[0], SHAPES, *inputs[1:])
    wide = [x.detach().double().cpu().requires_grad_() for x in inputs]
    truth = ms_deform_attn_reference(wide[0], SHAPES, *wide[1:])
    torch.testing.assert_close(output.double().cpu(), truth, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(output.sum(), inputs)
    for got, want in zip(gradients, torch.autograd.grad(truth.sum(), wide)):
        torch.testing.assert_close(got.double().cpu(), want, rtol=1e-4, atol=1e-4)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="deterministic"):
            ms_deform_attn(inputs[0], SHAPES, *inputs[1:]).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


def test_cpu_is_deterministic_and_allowed_to_be():
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(2):
            inputs = on("cpu", make_inputs(C=16, dtype=torch.float32))
            output = ms_deform_attn(inputs[0], SHAPES, *inputs[1:])
            results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
        assert all(torch.equal(a, b) for a, b in zip(*results))
    finally:
        torch.use_deterministic_algorithms(False)


def test_environment_variable_forces_a_path(monkeypatch):
    value, *rest = make_inputs(dtype=torch.float32)
    value.requires_grad_()
    monkeypatch.setenv("FPDETR_DEFORM_ATTN", "reference")
    assert "Fused" not in type(ms_deform_attn(value, SHAPES, *rest).grad_fn).__name__
    monkeypatch.setenv("FPDETR_DEFORM_ATTN", "cuda")
    with pytest.raises(ValueError, match="FPDETR_DEFORM_ATTN=cuda .* the tensors are on cpu"):
        ms_deform_attn(value, SHAPES, *rest)
    monkeypatch.setenv("FPDETR_DEFORM_ATTN", "fast")
    with pytest.raises(ValueError, match="FPDETR_DEFORM_ATTN=fast is unknown: give reference, cpu or"):
        ms_deform_attn(value, SHAPES, *rest)


@pytest.mark.parametrize("compiler, says", [
    (None, "there is no C\\+\\+ compiler"), ("echo no room >&2; exit 1", "no room"),
    (r"printf 'a \377' >&2; exit 1", "a \N{REPLACEMENT CHARACTER}"), ("exec sleep 9", "took more than"),
    ("true", "No such file"), ('for file; do :; done; echo > "$file"', "kernel|file too short|header")])
def test_without_a_working_compiler_the_reference_warns_once(monkeypatch, fresh_kernels, compiler, says):
    script = fresh_kernels / "compiler"
    script.write_text(f"#!/bin/sh\n{compiler}\n")
    script.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: compiler and str(script))
    monkeypatch.setattr(deform_attn, "COMPILER_SECONDS", 0.5, raising=False)
    value, *rest = make_inputs(C=11, dtype=torch.float32)
    with pytest.warns(UserWarning, match=says) as caught:
        output = ms_deform_attn(value, SHAPES, *rest)
        ms_deform_attn(value.double(), SHAPES, *rest)  # another kernel
    assert len(caught) == 1
    torch.testing.assert_close(output, brute_force(value, *rest), rtol=1e-5, atol=1e-5)
    monkeypatch.setenv("FPDETR_DEFORM_ATTN", "cpu")
    with pytest.raises(ValueError, match=f"FPDETR_DEFORM_ATTN=cpu cannot work here: .*({says})"):
        ms_deform_attn(value, SHAPES, *rest)


CONFIG = deform_attn.KernelConfig("cpu", *[torch.float32] * 3, 13, 1, 1, 1)


def test_a_temporary_folder_that_is_full_or_no_folder_is_said(monkeypatch, fresh_kernels):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(deform_attn, "compile_kernel", lambda config: bytes(10**7))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))
    problem = deform_attn.loading_error(CONFIG)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    folder, = fresh_kernels.iterdir()
    assert "too large" in problem and not list(folder.iterdir())  # nothing half-written is left
    folder.rmdir()
    folder.touch()
    deform_attn.loading_error.cache_clear()
    assert str(folder) in deform_attn.loading_error(CONFIG)


def test_a_damaged_file_in_the_cache_is_built_anew(monkeypatch, fresh_kernels):
    code = bytes(range(256)) * 9
    monkeypatch.setattr(deform_attn, "compile_kernel", lambda config: code)
    path = deform_attn.build_kernel(CONFIG)
    whole = path.read_bytes()
    for bad in (b"", b"garbage", whole[:len(whole) // 2], whole[:-1], whole[:99] + b"x" + whole[100:]):
        path.write_bytes(bad)
        assert deform_attn.build_kernel(CONFIG) == path and path.read_bytes() == whole
    assert whole.startswith(code)


def test_a_whole_file_that_cannot_be_loaded_is_built_anew(monkeypatch, fresh_kernels, kernel_device):
    with monkeypatch.context() as patch:
        patch.setattr(deform_attn, "compile_kernel", lambda config: b"no library")
        deform_attn.build_kernel(CONFIG)
    assert deform_attn.loading_error(CONFIG) == ""


def test_each_kind_of_cpu_has_a_file_of_its_own(monkeypatch, fresh_kernels):
    monkeypatch.setattr(deform_attn, "compile_kernel", lambda config: b"code")
    monkeypatch.setattr(platform, "node", lambda: "a shared name")

    def file(*lines):
        text = "".join(f"{line}\n" for line in lines)
        monkeypatch.setattr(Path, "read_text", lambda path, **options: text)
        return deform_attn.build_kernel(CONFIG)
    names = ["model name\t: A", "flags\t\t: fpu sse"], ["model name\t: A", "flags\t\t: fpu avx512f"], [
        "model name\t: B", "flags\t\t: fpu sse"], ["Features\t: fp asimd"], ["Features\t: fp asimd sve"]
    assert len({file(*lines) for lines in names}) == 5
    assert file(*names[0], "cpu MHz\t\t: 2400.1") == file(*names[0] * 2, "cpu MHz\t\t: 3100.7")
    monkeypatch.setattr(Path, "read_text", lambda path, **options: open(fresh_kernels / "no such file"))
    monkeypatch.setattr(platform, "processor", lambda: "i386")
    first = deform_attn.build_kernel(CONFIG)
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    assert deform_attn.build_kernel(CONFIG) != first


def test_a_system_without_users_has_no_kernel(monkeypatch, fresh_kernels):
    monkeypatch.delattr(os, "getuid")
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    assert deform_attn.loading_error(CONFIG) == "the kernel is not built on Windows"


def test_many_processes_and_threads_may_build_at_once(tmp_path):
    """Four processes with an empty cache build in two threads each. One file is left."""
    code = ("import torch, deform_attn as d; from concurrent.futures import ThreadPoolExecutor\n"
            "x = torch.ones(1, 4, 1, 2), torch.full((1, 1, 1, 2), .5), torch.zeros(1, 1, 1, 1, 1, 2)\n"
            "config = d.KernelConfig('cpu', *[torch.float32] * 3, 2, 1, 1, 1)\n"
            "with ThreadPoolExecutor() as pool: list(pool.map(d.build_kernel, [config] * 2))\n"
            "print(d.ms_deform_attn(x[0], [(2, 2)], *x[1:], torch.zeros(1, 1, 1, 1, 1)).tolist())")
    if not any(map(shutil.which, ("c++", "g++"))):
        pytest.skip("no C++ compiler here")
    env = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT), "FPDETR_DEFORM_ATTN": "cpu"}
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [p.communicate()[0].strip() for p in running] == ["[[[1.0, 1.0]]]"] * 4
    left = [path.suffix for path in tmp_path.glob("fpdetr-*/*")]
    assert left == [".bin"]


def test_wrong_number_of_tokens_is_an_error():
    value, *rest = make_inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match="tokens"):
        ms_deform_attn(value[:, 1:], SHAPES, *rest)
    with pytest.raises(ValueError, match="should be"):
        ms_deform_attn(value, SHAPES, rest[0][:, 1:], *rest[1:])


def test_offsets_start_on_the_radial_grid():
    """Point p of head m starts at p times the direction 2 pi m / M, scaled to max-norm 1."""
    bias = MSDeformAttn(dim=32, heads=8).sampling_offsets.bias.view(8, 4, 4, 2)
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for m, direction in enumerate(directions):
        for p in range(4):
            expected = torch.tensor(direction, dtype=torch.float32) * (p + 1)
            torch.testing.assert_close(bias[m, :, p], expected.expand(4, 2), rtol=0, atol=1e-5)
