"""The operator against a brute-force loop and finite differences."""
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, deform_attn_inputs
from torch.library import opcheck

import deform_attn
import deform_attn_jit
from deform_attn import MSDeformAttn, ms_deform_attn, ms_deform_attn_reference
from deform_attn_jit import InputError

SHAPES = [(5, 7), (3, 4), (2, 2), (1, 1)]


def make_inputs(dtype=torch.float64, **sizes):
    return deform_attn_inputs(SHAPES, **{**dict(B=2, Q=6, M=3, C=5, P=2), **sizes}, dtype=dtype)


def brute_force(value, references, offsets, logits):
    """The docstring of ms_deform_attn, pixel by pixel."""
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
    """Every device on which the kernel, and not the reference, should serve."""
    if request.param == "cpu" and not any(map(shutil.which, ("c++", "g++"))):
        pytest.skip("no C++ compiler here")
    return request.param


def on(device, inputs):
    return [x.detach().to(device).requires_grad_() for x in inputs]


def test_operator_is_registered_as_pytorch_wants_it(kernel_device):
    inputs = on(kernel_device, make_inputs(C=16, dtype=torch.float32))
    opcheck(deform_attn.kernel_forward, (*inputs, FLAT))
    output = deform_attn.kernel_forward(*inputs, FLAT)
    opcheck(deform_attn.kernel_backward, (output.detach(), *(x.detach() for x in inputs), FLAT))


def test_compiled_graph_equals_eager(kernel_device):
    def layer(value, *rest):
        return ms_deform_attn(value * 2, SHAPES, *rest).sin().sum()
    graph = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for B, Q in ((2, 6), (3, 9), (4, 5)):  # from the second on, these sizes are symbols
        inputs = on(kernel_device, make_inputs(B=B, Q=Q, C=16, dtype=torch.float32))
        assert torch.equal(graph(*inputs), layer(*inputs))
        for got, want in zip(*(torch.autograd.grad(f(*inputs), inputs) for f in (graph, layer))):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_any_strides_and_alignments(kernel_device):
    """Expanded, transposed and misaligned inputs and gradients, against their plain copies."""
    value, references, offsets, logits = on(kernel_device, make_inputs(Q=6, C=16, dtype=torch.float32))
    # not at a multiple of 16 bytes
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
    """16-bit values, offsets and logits, float32 references: near to float32 throughout, and bfloat16
    out."""
    torch.manual_seed(0)
    layer = MSDeformAttn(dim=64, heads=4).to(kernel_device)
    torch.nn.init.normal_(layer.sampling_offsets.weight, std=0.2)
    query, memory = torch.randn(2, 9, 64, device=kernel_device), torch.randn(2, 52, 64, device=kernel_device)
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
    grad, = torch.autograd.grad(output.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError):
        grad.square().sum().backward()


@no_gpu
def test_cuda_graph():
    inputs = on("cuda", make_inputs(C=32, dtype=torch.float32))

    def step():
        return torch.autograd.grad(ms_deform_attn(inputs[0], SHAPES, *inputs[1:]).square().sum(), inputs)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # the warm-up compiles and loads
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
    for got, want in zip(torch.autograd.grad(output.sum(), inputs), torch.autograd.grad(truth.sum(), wide)):
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
    assert "fpdetr" not in type(ms_deform_attn(value, SHAPES, *rest).grad_fn).__name__
    monkeypatch.setenv("FPDETR_DEFORM_ATTN", "cuda")
    with pytest.raises(InputError, match="the tensors are on cpu"):
        ms_deform_attn(value, SHAPES, *rest)
    monkeypatch.setenv("FPDETR_DEFORM_ATTN", "fast")
    with pytest.raises(InputError, match="FPDETR_DEFORM_ATTN=fast is unknown: give reference, cpu or cuda"):
        ms_deform_attn(value, SHAPES, *rest)


def test_without_a_compiler_the_reference_serves_and_says_so_once(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for cached in (deform_attn_jit.load, deform_attn_jit.failure, deform_attn_jit.warn_once):
        cached.cache_clear()
    value, *rest = make_inputs(C=11, dtype=torch.float32)
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler") as caught:
        outputs = [ms_deform_attn(value, SHAPES, *rest) for _ in range(2)]
    assert len(caught) == 1
    deform_attn_jit.failure.cache_clear()  # it must be possible again for the tests that follow
    torch.testing.assert_close(outputs[0], brute_force(value, *rest), rtol=1e-5, atol=1e-5)
    monkeypatch.setenv("FPDETR_DEFORM_ATTN", "cpu")
    with pytest.raises(InputError, match="cannot work here: there is no C"):
        ms_deform_attn(value, SHAPES, *rest)


def test_many_processes_may_build_at_once(tmp_path):
    """Four processes with an empty cache: each ends with a right result, and one file is left."""
    code = ("import torch, deform_attn as d\n"
            "x = torch.ones(1, 4, 1, 2), torch.full((1, 1, 1, 2), .5), torch.zeros(1, 1, 1, 1, 1, 2)\n"
            "print(d.ms_deform_attn(x[0], [(2, 2)], *x[1:], torch.zeros(1, 1, 1, 1, 1)).tolist())")
    if not any(map(shutil.which, ("c++", "g++"))):
        pytest.skip("no C++ compiler here")
    env = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT), "FPDETR_DEFORM_ATTN": "cpu"}
    running = [subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
               for _ in range(4)]
    assert [p.communicate()[0].strip() for p in running] == ["[[[1.0, 1.0]]]"] * 4
    left = [p.suffix for folder in tmp_path.glob("fpdetr-*") for p in folder.iterdir()]
    assert left == [".bin"]


def test_wrong_number_of_tokens_is_an_error():
    value, *rest = make_inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match="tokens"):
        ms_deform_attn(value[:, 1:], SHAPES, *rest)
    with pytest.raises(ValueError, match="should be"):
        ms_deform_attn(value, SHAPES, rest[0][:, 1:], *rest[1:])


def test_offsets_start_on_the_radial_grid():
    """As the released code: direction (cos, sin) of 2 pi m / M scaled to max-norm 1, times the point's
    number."""
    bias = MSDeformAttn(dim=32, heads=8).sampling_offsets.bias.view(8, 4, 4, 2)
    for m, direction in enumerate([(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]):
        for p in range(4):
            expected = torch.tensor(direction, dtype=torch.float32) * (p + 1)
            torch.testing.assert_close(bias[m, :, p], expected.expand(4, 2), rtol=0, atol=1e-5)
