"""The operator against a brute-force loop and finite differences."""
import math

import pytest
import torch

import deform_attn
from deform_attn import MSDeformAttn, ms_deform_attn, ms_deform_attn_reference

SHAPES = [(5, 7), (3, 4), (2, 2), (1, 1)]


def make_inputs(B=2, Q=6, M=3, C=5, P=2, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    S, L = sum(h * w for h, w in SHAPES), len(SHAPES)
    value = torch.randn(B, S, M, C, generator=g, dtype=dtype)
    references = torch.rand(B, Q, L, 2, generator=g, dtype=dtype) * 1.4 - 0.2  # some outside of the map
    offsets = torch.randn(B, Q, M, L, P, 2, generator=g, dtype=dtype) * 2
    return value, references, offsets, torch.randn(B, Q, M, L, P, generator=g, dtype=dtype)


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


@pytest.mark.skipif(deform_attn.compiled() is None, reason="no C++ compiler here")
@pytest.mark.parametrize("M, C, P", [(4, 16, 4), (8, 32, 4), (2, 48, 4), (3, 5, 2), (1, 7, 1)])
def test_compiled_path_equals_the_reference_in_float64(M, C, P):
    inputs = make_inputs(M=M, C=C, P=P)
    truth_in = [x.clone().requires_grad_() for x in inputs]
    fast_in = [x.float().requires_grad_() for x in inputs]
    truth = ms_deform_attn_reference(truth_in[0], SHAPES, *truth_in[1:])
    fast = ms_deform_attn(fast_in[0], SHAPES, *fast_in[1:])
    assert fast.grad_fn.name().startswith("CompiledAttention")
    torch.testing.assert_close(fast.double(), truth, rtol=1e-5, atol=1e-5)
    weights = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (truth * weights).sum().backward()
    (fast * weights.float()).sum().backward()
    for slow, quick in zip(truth_in, fast_in):
        torch.testing.assert_close(quick.grad.double(), slow.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_far_and_undefined_offsets_read_nothing(bad):
    value, references, offsets, logits = make_inputs(B=1, Q=1, M=1, C=16, P=1, dtype=torch.float32)
    if deform_attn.compiled() is None:
        pytest.skip("no C++ compiler here")
    offsets = torch.full_like(offsets, bad).requires_grad_()
    value.requires_grad_()
    out = ms_deform_attn(value, SHAPES, references, offsets, logits)
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(value.grad, torch.zeros_like(value)) and torch.isfinite(offsets.grad).all()


def test_wrong_number_of_tokens_is_an_error():
    value, *rest = make_inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match="tokens"):
        ms_deform_attn(value[:, 1:], SHAPES, *rest)


def test_offsets_start_on_the_radial_grid():
    """As the released code: direction (cos, sin) of 2 pi m / M scaled to max-norm 1, times the point's
    number."""
    bias = MSDeformAttn(dim=32, heads=8).sampling_offsets.bias.view(8, 4, 4, 2)
    for m, direction in enumerate([(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]):
        for p in range(4):
            expected = torch.tensor(direction, dtype=torch.float32) * (p + 1)
            torch.testing.assert_close(bias[m, :, p], expected.expand(4, 2), rtol=0, atol=1e-5)
