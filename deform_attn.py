"""Multi-scale deformable attention (Deformable DETR, Eq. 3), the attention in every layer of FP-DETR.

A token looks at a few points around its reference point, on every level of the feature pyramid,
instead of at all tokens. This file holds the operator and the module around it.

    ms_deform_attn            the operator: runs the compiled kernel where it can, else the reference
    ms_deform_attn_reference  the same by grid_sample: short and slow; the kernel's tests compare with it
    MSDeformAttn              the module: the linear projections around the operator (FP-DETR 3.2, 4.1)

The paper ends with MSDeformAttn. The rest of the file registers the kernel with PyTorch, compiles
deform_attn_kernel.cu at its first use and launches it. The environment variable
FPDETR_DEFORM_ATTN=reference, cpu or cuda forces one of the paths.
"""
import ctypes
import functools
import hashlib
import importlib.util
import math
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def at_least_float32(x: Tensor) -> Tensor:
    """Returns a 16-bit x in float32, and any other x unchanged.

    Locations and boxes are computed this way. bfloat16 has 8 bits of mantissa, which would move a
    sample by a third of a pixel on a map of 168 columns.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def ms_deform_attn(value: Tensor, spatial_shapes: list[tuple[int, int]], reference_points: Tensor,
                   sampling_offsets: Tensor, attention_logits: Tensor) -> Tensor:
    """Samples `value` at P points per query, head and level, and returns their weighted sum.

    With B images, S value tokens, Q queries (all tokens that attend, in the encoder E + N), M heads of C
    channels, L levels and P points per level:

        output = sum_lp softmax_lp(logits) * bilinear(value_l, reference + offset / (W_l, H_l))

    bilinear() follows align_corners=False (a pixel is a unit square with its centre at +0.5) and is
    zero outside the map. Dtypes may be mixed. Softmax, locations and sums are computed in float32 or
    wider.

    On GPUs the gradient of `value` is summed by atomics, so its last bits change from run to run. Under
    `torch.use_deterministic_algorithms(True)` this gradient is an error, as in PyTorch's own operators.
    All other results, and all results on CPUs, are the same in every run.

    Args:
        value: (B, S, M, C), floating point. The levels follow each other, each one row by row.
        spatial_shapes: [(H_l, W_l), ...]. Python ints, because reading a tensor would wait for the GPU.
        reference_points: (B, Q, L, 2) as (x, y), in [0, 1] of the map of level l, padding included.
        sampling_offsets: (B, Q, M, L, P, 2) as (x, y), in pixels of level l.
        attention_logits: (B, Q, M, L, P). The softmax is over all L * P samples of a query and head.
    Returns:
        (B, Q, M * C) in the dtype of `value`, heads concatenated.
    Raises:
        ValueError: if shapes do not fit together, or if FPDETR_DEFORM_ATTN names a path that is unknown
            or cannot run here.
    """
    B, S, M, C = value.shape
    _, Q, _, L, P, _ = sampling_offsets.shape
    tokens, flat_shapes = 0, []
    for h, w in spatial_shapes:
        tokens += h * w
        flat_shapes += h, w
    if S != tokens or L != len(spatial_shapes):
        raise ValueError(f"value has {S} tokens and the offsets have {L} levels, which does not fit "
                         f"the shapes {spatial_shapes}")
    expected = (B, Q, L, 2), (B, Q, M, L, P, 2), (B, Q, M, L, P)
    if (reference_points.shape, sampling_offsets.shape, attention_logits.shape) != expected:
        raise ValueError(f"reference points {tuple(reference_points.shape)}, offsets "
                         f"{tuple(sampling_offsets.shape)} and logits {tuple(attention_logits.shape)} "
                         f"should be {expected[0]}, {expected[1]} and {expected[2]} for a value "
                         f"{tuple(value.shape)}")
    device = value.device
    # The kernel packs the number of a token and four more bits into 32 bits.
    fits = (S < 2**26 and device == reference_points.device == sampling_offsets.device
            == attention_logits.device)
    if fits and can_use_kernel(device, value.dtype, reference_points.dtype, sampling_offsets.dtype,
                               attention_logits.dtype, C, M, L, P):
        compute = FusedAttention.apply if torch.is_grad_enabled() else forward_operator
        return compute(value, reference_points, sampling_offsets, attention_logits, flat_shapes)
    return ms_deform_attn_reference(value, spatial_shapes, reference_points, sampling_offsets,
                                    attention_logits)


def ms_deform_attn_reference(value: Tensor, spatial_shapes: list[tuple[int, int]],
                             reference_points: Tensor, sampling_offsets: Tensor,
                             attention_logits: Tensor) -> Tensor:
    """Computes `ms_deform_attn` by one grid_sample per level. Arguments and result are the same."""
    B, S, M, C = value.shape
    _, Q, _, L, P, _ = sampling_offsets.shape
    logits = at_least_float32(attention_logits)
    weights = logits.flatten(3).softmax(-1).unflatten(-1, (L, P))  # (B, Q, M, L, P)
    references = at_least_float32(reference_points)
    levels = at_least_float32(value).split([h * w for h, w in spatial_shapes], dim=1)
    output = value.new_zeros(B * M, C, Q, dtype=levels[0].dtype)
    for level, (h, w) in enumerate(spatial_shapes):
        maps = levels[level].permute(0, 2, 3, 1).reshape(B * M, C, h, w)
        x, y = sampling_offsets[:, :, :, level].unbind(-1)  # (B, Q, M, P)
        # Divides by Python numbers, because a tensor of sizes would have to be copied to the GPU.
        offsets = torch.stack([at_least_float32(x) / w, at_least_float32(y) / h], -1)
        locations = references[:, :, None, level, None] + offsets  # (B, Q, M, P, 2)
        grid = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (B * M, Q, P, 2) in [-1, 1]
        sampled = F.grid_sample(maps, grid.to(maps.dtype), mode="bilinear", padding_mode="zeros",
                                align_corners=False)  # (B * M, C, Q, P)
        level_weights = weights[:, :, :, level].transpose(1, 2).reshape(B * M, 1, Q, P)
        output = output + (sampled * level_weights.to(maps.dtype)).sum(-1)
    return output.reshape(B, M * C, Q).transpose(1, 2).to(value.dtype)


def sampling_locations_and_weights(spatial_shapes: list[tuple[int, int]], reference_points: Tensor,
                                   sampling_offsets: Tensor,
                                   attention_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns sampling locations (B, Q, M, L, P, 2) in [0, 1] and attention weights (B, Q, M, L, P).

    The arguments are those of `ms_deform_attn`, which never stores these two tensors. They are for
    pictures and for implementations that take them as inputs.
    """
    sizes = level_sizes(tuple(spatial_shapes), reference_points.device).flip(-1)  # (L, 2) as (W, H)
    locations = reference_points[:, :, None, :, None] + sampling_offsets / sizes[:, None]
    weights = attention_logits.flatten(3).softmax(-1).view_as(attention_logits)
    return locations, weights


@functools.cache  # copies to the GPU only once, so a CUDA graph can be captured after a first call
def level_sizes(spatial_shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Returns the (H_l, W_l) of all levels as a tensor (L, 2)."""
    return torch.tensor(spatial_shapes, device=device)


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention with its linear projections.

    Offsets and attention weights are projections of the query, values are projections of the memory.

    Args:
        dim: D, channels of query and memory. `heads` must divide it.
        heads, levels, points: M, L and P. The paper has 8 or 10 heads, 4 levels and 4 points.
    """

    def __init__(self, dim: int, heads: int, levels: int = 4, points: int = 4):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises as Deformable DETR (A.4) and the released code do.

        Head m looks in direction 2 pi m / M. Its point p is at distance p. All weights are equal.
        """
        nn.init.zeros_(self.sampling_offsets.weight)
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)  # (M, 2), on the unit circle
        direction = direction / direction.abs().amax(-1, keepdim=True)  # (M, 2), on a square around it
        distance = torch.arange(1, self.points + 1)  # (P,)
        offsets = direction[:, None, None, :] * distance[None, None, :, None]  # (M, 1, P, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.levels, -1, -1).reshape(-1))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, query: Tensor, reference_points: Tensor, memory: Tensor,
                spatial_shapes: list[tuple[int, int]], padding_mask: Tensor | None = None) -> Tensor:
        """Lets every query sample from the memory.

        Args:
            query: (B, Q, D), with its position added.
            reference_points: (B, Q, L, 2), as in `ms_deform_attn`.
            memory: (B, S, D), the tokens to sample from.
            spatial_shapes: [(H_l, W_l), ...], as in `ms_deform_attn`.
            padding_mask: (B, S), True where a memory token is padding, or None.
        Returns:
            (B, Q, D)
        """
        value = self.value_proj(memory)
        if padding_mask is not None:
            value = value.masked_fill(padding_mask[..., None], 0)  # zero, as outside the map
        value = value.unflatten(-1, (self.heads, -1))  # (B, S, M, C)
        offsets, logits = self.sampling(query)
        output = ms_deform_attn(value, spatial_shapes, reference_points, offsets, logits)
        return self.output_proj(output)

    def sampling(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Projects query (B, Q, D) to offsets (B, Q, M, L, P, 2) and logits (B, Q, M, L, P)."""
        B, Q, _ = query.shape
        # Under autocast both are 16-bit. An offset of 8 pixels is still right to 1/32 pixel, because it
        # is added to its reference point in float32. One cast here saves one in each linear layer.
        if torch.is_autocast_enabled(query.device.type):
            query = query.to(torch.get_autocast_dtype(query.device.type))
        offsets = self.sampling_offsets(query)
        logits = self.attention_weights(query)
        return (offsets.view(B, Q, self.heads, self.levels, self.points, 2),
                logits.view(B, Q, self.heads, self.levels, self.points))


# ------------------------------------------- the kernel as a PyTorch operator: the paper ends here

def kernel_forward(value: Tensor, reference: Tensor, offset: Tensor, logit: Tensor,
                   shapes: list[int]) -> Tensor:
    """Computes `ms_deform_attn` by the kernel. shapes: [H_1, W_1, H_2, ...]."""
    output = empty_output(value, reference, offset, logit, shapes)
    if output.numel():
        launch_kernel("forward", shapes, value=value, reference=reference, offset=offset, logit=logit,
                      output=output)
    return output


def empty_output(value, reference, offset, logit, shapes):
    """Returns the result of kernel_forward, not yet computed."""
    B, Q, *_ = logit.shape
    _, _, M, C = value.shape
    return value.new_empty(B, Q, M * C)


def kernel_backward(grad_output: Tensor, value: Tensor, reference: Tensor, offset: Tensor,
                    logit: Tensor, shapes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of value, offset and logit by the kernel."""
    if value.is_cuda and torch.are_deterministic_algorithms_enabled():
        message = "the gradient of ms_deform_attn's value has no deterministic implementation on a GPU"
        if not torch.is_deterministic_algorithms_warn_only_enabled():
            raise RuntimeError(f"{message}: run on the CPU, or give warn_only=True")
        warnings.warn(message, stacklevel=2)
    grad_offset, grad_logit = offset.new_empty(offset.shape), logit.new_empty(logit.shape)
    # 16 bits are too few for a sum of many terms.
    wide = compute_dtype(value.dtype, offset.dtype, logit.dtype)
    grad_value = torch.zeros(value.shape, dtype=wide, device=value.device)
    if grad_output.numel():
        launch_kernel("backward", shapes, value=value, reference=reference, offset=offset, logit=logit,
                      grad_output=grad_output, grad_value=grad_value, grad_offset=grad_offset,
                      grad_logit=grad_logit)
    return grad_value.to(value.dtype), grad_offset, grad_logit


def empty_gradients(grad_output, value, reference, offset, logit, shapes):
    """Returns the result of kernel_backward, not yet computed."""
    return value.new_empty(value.shape), offset.new_empty(offset.shape), logit.new_empty(logit.shape)


# torch.library.custom_op does the following in fewer lines. But its first call imports torch._dynamo,
# which takes more than a second.
INPUTS = "Tensor value, Tensor reference, Tensor offset, Tensor logit, SymInt[] shapes"
FORWARD, BACKWARD = "fpdetr::ms_deform_attn", "fpdetr::ms_deform_attn_backward"
library = torch.library.Library("fpdetr", "FRAGMENT")  # the registrations live as long as it does
library.define(f"ms_deform_attn({INPUTS}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
library.define(f"ms_deform_attn_backward(Tensor grad_output, {INPUTS}) -> (Tensor, Tensor, Tensor)",
               tags=torch.Tag.pt2_compliant_tag)
library.impl(FORWARD, kernel_forward, "CompositeExplicitAutograd")
library.impl(BACKWARD, kernel_backward, "CompositeExplicitAutograd")
# torch.compile traces with tensors that have no data.
torch.library.register_fake(FORWARD, empty_output, lib=library)
torch.library.register_fake(BACKWARD, empty_gradients, lib=library)
forward_operator = torch.ops.fpdetr.ms_deform_attn.default
backward_operator = torch.ops.fpdetr.ms_deform_attn_backward.default


# torch.library.register_autograd would do instead, but takes 40 us more per forward and backward pass.
class FusedAttention(torch.autograd.Function):
    """kernel_forward with its gradient."""

    @staticmethod
    def forward(ctx, value: Tensor, reference: Tensor, offset: Tensor, logit: Tensor,
                shapes: list[int]) -> Tensor:
        ctx.shapes = shapes
        ctx.save_for_backward(value, reference, offset, logit)
        return forward_operator(value, reference, offset, logit, shapes)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple:
        # Activation checkpointing gives the saved tensors only once.
        value, reference, offset, logit = ctx.saved_tensors
        # Grad mode is on here only with create_graph=True.
        compute = FusedGradient.apply if torch.is_grad_enabled() else backward_operator
        grad_value, grad_offset, grad_logit = compute(grad_output, value, reference, offset, logit,
                                                      ctx.shapes)
        grad_reference = None
        if ctx.needs_input_grad[1]:
            # A reference point moves all its samples on level l, by (W_l, H_l) pixels per unit.
            wide = torch.promote_types(reference.dtype, torch.float32)
            per_pixel = grad_offset.sum((2, 4), dtype=wide)
            levels = zip(per_pixel.unbind(2), ctx.shapes[::2], ctx.shapes[1::2])  # (B, Q, 2), H_l, W_l
            per_unit = [torch.stack([grad[..., 0] * w, grad[..., 1] * h], -1) for grad, h, w in levels]
            grad_reference = torch.stack(per_unit, 2).to(reference.dtype)  # (B, Q, L, 2)
        return grad_value, grad_reference, grad_offset, grad_logit, None


class FusedGradient(torch.autograd.Function):
    """kernel_backward, which has no gradient."""

    @staticmethod
    def forward(ctx, *inputs):
        return backward_operator(*inputs)

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError("ms_deform_attn has no second derivative")


# -------------------------------------------------------------- compiling and launching the kernel
# For a GPU the compiler is NVRTC, NVIDIA's run-time compiler, which comes with every CUDA build of
# torch. For a CPU it is the system's C++ compiler. No toolkit, headers or build step are needed. A
# compilation takes about a second, once per KernelConfig. The result stays in the temporary folder,
# where later processes load it in milliseconds.

SOURCE = Path(__file__).with_name("deform_attn_kernel.cu")
KERNEL_DTYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bf16",
                 torch.float16: "fp16"}


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Returns the dtype that the kernel computes in. The tensors may be narrower."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


class KernelConfig(NamedTuple):
    """The compile-time constants of one build of the kernel."""
    arch: str  # "cpu", or NVRTC's name of a GPU architecture: "sm_90"
    value: torch.dtype
    offset: torch.dtype
    logit: torch.dtype
    channels: int  # C, per head
    heads: int
    levels: int
    points: int

    @functools.cache  # noqa: B019 (there are few builds)
    def definitions(self) -> dict[str, str | int]:
        """Returns the macros of this build. The head of deform_attn_kernel.cu explains them."""
        real = compute_dtype(self.value, self.offset, self.logit)
        if self.arch == "cpu":
            forward_vec = backward_vec = self.channels
        else:
            # The forward pass takes the widest loads, 16 bytes. The backward pass depends on atomics:
            # sm_90 and later add 16 bytes at once. On earlier GPUs neighbouring lanes should add to
            # neighbouring floats.
            vecs = [n for n in (8, 4, 2, 1) if self.channels % n == 0 and n * self.value.itemsize <= 16]
            forward_vec = vecs[0]
            wide_atomics = int(self.arch[3:]) >= 90 and real == torch.float32
            backward_vec = 4 if wide_atomics and 4 in vecs else 1
        return {"CHANNELS": self.channels, "HEADS": self.heads, "LEVELS": self.levels,
                "POINTS": self.points, "VALUE_T": KERNEL_DTYPES[self.value],
                "OFFSET_T": KERNEL_DTYPES[self.offset], "LOGIT_T": KERNEL_DTYPES[self.logit],
                "REAL": KERNEL_DTYPES[real],
                "FORWARD_VEC": forward_vec, "FORWARD_LANES": self.lanes(forward_vec),
                "BACKWARD_VEC": backward_vec, "BACKWARD_LANES": self.lanes(backward_vec)}

    def options(self) -> list[str]:
        """Returns the definitions as the compilers take them."""
        return [f"-D{name}={value}" for name, value in self.definitions().items()]

    def lanes(self, vec: int) -> int:
        """Returns how many threads share a query and head: 8, 4, 2 or 1.

        They share its vectors of channels and its samples evenly.
        """
        return math.gcd(8, self.channels // vec, self.levels * self.points)


@functools.cache
def architecture(device: torch.device) -> str:
    """Returns "cpu" or, for example, "sm_90"."""
    if device.type == "cpu":
        return "cpu"
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


# ------------------------------------------------------------------------------- choosing the path

def forced_path() -> str:
    """Returns FPDETR_DEFORM_ATTN, or "" if it is not set. Raises ValueError if it is unknown."""
    path = os.environ.get("FPDETR_DEFORM_ATTN", "")
    if path not in ("", "reference", "cpu", "cuda"):
        raise ValueError(f"FPDETR_DEFORM_ATTN={path} is unknown: "
                         f"give reference, cpu or cuda, or unset it")
    return path


warned: set[str] = set()  # device types for which a warning was shown


def can_use_kernel(device: torch.device, value: torch.dtype, reference: torch.dtype,
                   offset: torch.dtype, logit: torch.dtype, C: int, M: int, L: int, P: int) -> bool:
    """Returns whether the kernel can run on such inputs. Loads it.

    Warns once per device type if it should run but cannot. Raises ValueError if FPDETR_DEFORM_ATTN
    demands it in vain.
    """
    forced = forced_path()
    if forced == "reference":
        return False
    supported = (device.type in ("cpu", "cuda") and min(C, M, L, P) > 0 and M < 2**16
                 and {value, reference, offset, logit} <= KERNEL_DTYPES.keys())
    problem = ""
    if forced and forced != device.type:
        problem = f"the tensors are on {device}"
    elif supported:
        problem = loading_error(KernelConfig(architecture(device), value, offset, logit, C, M, L, P))
    if forced and problem:
        raise ValueError(f"FPDETR_DEFORM_ATTN={forced} cannot work here: {problem}")
    if problem and device.type not in warned:
        warned.add(device.type)
        warnings.warn(f"deformable attention runs in grid_sample, several times more slowly: "
                      f"{problem[:400]}", stacklevel=2)
    return supported and not problem


# torch.compile calls it once, while tracing, and takes the result for a constant. The function
# torch.compiler.assume_constant_result sets the same flag, but imports torch._dynamo.
can_use_kernel._dynamo_marked_constant = True


def operator_path(model: nn.Module, device: torch.device, bf16: bool) -> str:
    """Names the path that the attention of a model on `device` takes. Loads the kernel."""
    attention = next((m for m in model.modules() if isinstance(m, MSDeformAttn)), None)
    if attention is None:
        return "the fork's own modules"
    dtype = torch.bfloat16 if bf16 else torch.float32
    channels = attention.value_proj.out_features // attention.heads
    sizes = channels, attention.heads, attention.levels, attention.points
    compiled = can_use_kernel(device, dtype, torch.float32, dtype, dtype, *sizes)
    return f"the compiled kernel ({architecture(device)})" if compiled else "grid_sample"


@functools.cache
def loading_error(config: KernelConfig) -> str:
    """Loads the kernel, once per process. Returns "", or the reason in one line if this fails."""
    try:
        load_kernel(config)
        return ""
    except OSError as e:
        return " ".join(str(e).split()) or type(e).__name__


# --------------------------------------------------------------------------------------- compiling

def compile_kernel(config: KernelConfig) -> bytes:
    """Compiles the kernel. Raises OSError with the compiler's message if this fails."""
    if config.arch == "cpu":
        return compile_for_cpu(config.options())
    code, _ = compile_for_gpu(config.arch, config.options())
    return code


def compile_for_gpu(arch: str, options: list[str]) -> tuple[bytes, str]:
    """Returns machine code for the architecture `arch`, and NVRTC's messages. No GPU is needed."""
    nvrtc, source, program = nvrtc_library(), SOURCE.read_bytes(), ctypes.c_void_p()

    def result(name: str) -> bytes:
        size = ctypes.c_size_t()
        getattr(nvrtc, f"nvrtcGet{name}Size")(program, ctypes.byref(size))
        content = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{name}")(program, content)
        return content.raw

    options = [f"-arch={supported_architecture(nvrtc, arch)}", "-std=c++17", *options]
    c_options = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, SOURCE.name.encode(), 0, None, None)
    status = nvrtc.nvrtcCompileProgram(program, len(options), c_options)
    messages = result("ProgramLog").rstrip(b"\0").decode(errors="replace").strip()
    code = result("CUBIN") if status == 0 else b""
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if status != 0:
        raise OSError(f"NVRTC: {messages}")
    return code, messages


JETSON = 72, 87, 101  # other GPUs of the same major version do not run their code


def supported_architecture(nvrtc: ctypes.CDLL, arch: str) -> str:
    """Returns `arch`, or the latest one before it that NVRTC knows and whose code the GPU runs.

    A GPU runs code for its major version and an earlier minor version. sm_86 runs code for sm_80.
    """
    count = ctypes.c_int()
    nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    nvrtc.nvrtcGetSupportedArchs(known)
    wanted = int(arch[3:])
    if wanted in known:
        return arch
    earlier = [n for n in known if n // 10 == wanted // 10 and n < wanted and n not in JETSON]
    if not earlier:
        raise OSError(f"NVRTC does not know {arch}: install a newer nvidia-cuda-nvrtc")
    return f"sm_{max(earlier)}"


def nvrtc_library() -> ctypes.CDLL:
    """Loads NVRTC, from the wheel that comes with torch or from the system, or raises OSError."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(p) for p in (spec.submodule_search_locations if spec else [])]
    found = sorted(p for folder in folders for p in folder.glob("*/lib/libnvrtc.so.*"))
    major = (torch.version.cuda or "").split(".")[0]
    matching = [p for p in found if p.name.endswith("." + major)]
    path = (matching or found or [Path(f"libnvrtc.so.{major}" if major else "libnvrtc.so")])[-1]
    if found:
        for builtins in path.parent.glob("libnvrtc-builtins.so*"):
            ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)  # some versions do not find it
    return ctypes.CDLL(str(path))


COMPILER_SECONDS = 120  # a compiler that takes longer has hung


def compile_for_cpu(definitions: list[str]) -> bytes:
    """Returns a shared library for this machine."""
    compiler = cpp_compiler()
    if not compiler:
        raise OSError("there is no C++ compiler")
    # The last four flags let the compiler vectorise sums. Infinities and NaNs still work.
    flags = ["-x", "c++", "-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-fno-math-errno",
             "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"]
    with tempfile.TemporaryDirectory() as folder:
        for openmp in (["-fopenmp"], []):  # Apple's clang has no OpenMP: one thread does all the work
            command = [compiler, *flags, *openmp, *definitions, str(SOURCE), "-o", f"{folder}/kernel"]
            try:
                done = subprocess.run(command, capture_output=True, text=True, errors="replace",
                                      timeout=COMPILER_SECONDS)
            except subprocess.TimeoutExpired:
                raise OSError(f"{compiler} took more than {COMPILER_SECONDS} seconds") from None
            if done.returncode == 0:
                return Path(folder, "kernel").read_bytes()
    raise OSError(f"{compiler}: {done.stderr.strip()}")


def cpp_compiler() -> str:
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or ""


def cpu_model() -> str:
    """Returns the name and instruction sets of this machine's CPU. -march=native depends on them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return str(sorted({x for x in lines if x.startswith(("model name", "flags", "Features"))}))


def build_kernel(config: KernelConfig, anew: bool = False) -> Path:
    """Returns the file of the compiled kernel: its code, then the SHA-256 of it in 32 bytes.

    Compiles it if the file is not there or damaged, or if it is to be made anew.
    """
    if not hasattr(os, "getuid"):
        raise OSError(f"the kernel is not built on {platform.system()}")
    compiler = os.path.realpath(cpp_compiler() or "/")  # the real name contains the version
    machine = f"{compiler} {cpu_model()} {torch.version.cuda}"
    build = f"{config.definitions()} {machine}".encode()
    key = hashlib.sha256(SOURCE.read_bytes() + Path(__file__).read_bytes() + build).hexdigest()
    folder = Path(tempfile.gettempdir(), f"fpdetr-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():  # never load code that another user wrote
        raise OSError(f"{folder} belongs to another user")
    path = folder / f"deform_attn-{config.arch}-{key[:16]}.bin"
    content = path.read_bytes() if path.exists() else b""
    if anew or hashlib.sha256(content[:-32]).digest() != content[-32:]:
        code = compile_kernel(config)
        # Several processes or threads may build it at once. Each writes and renames a file of its own.
        with tempfile.TemporaryDirectory(dir=folder) as own:
            Path(own, "kernel").write_bytes(code + hashlib.sha256(code).digest())
            os.replace(Path(own, "kernel"), path)
    return path


# ------------------------------------------------------------------------- loading and launching

@functools.cache
def load_kernel(config: KernelConfig) -> dict[str, object]:
    """Returns {"forward": ..., "backward": ...}: functions of a CPU kernel, handles of a GPU kernel.

    Builds the kernel first if necessary, and once more if it cannot be loaded. Raises OSError if it
    cannot be built or loaded.
    """
    if config.arch != "cpu":
        cuda_driver()  # raises OSError if building would be in vain
    path = build_kernel(config)
    try:
        return load_file(path, config.arch)
    except OSError:
        return load_file(build_kernel(config, anew=True), config.arch)


def load_file(path: Path, arch: str) -> dict[str, object]:
    """Loads a file of build_kernel. Arguments and result: as in load_kernel."""
    names = {"forward": "ms_deform_attn_forward", "backward": "ms_deform_attn_backward"}
    if arch == "cpu":
        library = ctypes.CDLL(str(path))
        return {direction: getattr(library, name) for direction, name in names.items()}
    # A library of the driver belongs to no device, so all GPUs of this architecture share it.
    driver, library = cuda_driver(), ctypes.c_void_p()
    code, no_options = path.read_bytes()[:-32], (None, None, 0)
    check_cuda(driver.cuLibraryLoadData(ctypes.byref(library), code, *no_options, *no_options))
    kernels = {direction: ctypes.c_void_p() for direction in names}
    for direction, name in names.items():
        check_cuda(driver.cuLibraryGetKernel(ctypes.byref(kernels[direction]), library, name.encode()))
    return kernels


@functools.cache
def cuda_driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    if not hasattr(driver, "cuLibraryLoadData"):
        raise OSError("the NVIDIA driver is older than CUDA 12.0")
    return driver


def check_cuda(status: int) -> None:
    """Raises OSError if a function of the driver returned an error."""
    if status != 0:
        text = ctypes.c_char_p()
        cuda_driver().cuGetErrorString(status, ctypes.byref(text))
        raise OSError(f"CUDA driver: {(text.value or b'error').decode()} ({status})")


@functools.cache
def argument_struct(levels: int) -> type[ctypes.Structure]:
    """The struct `Arguments` of deform_attn_kernel.cu."""
    pointers = ("value", "reference", "offset", "logit", "output", "grad_output", "grad_value",
                "grad_offset", "grad_logit")

    class Arguments(ctypes.Structure):
        _fields_ = [*((name, ctypes.c_void_p) for name in pointers),
                    *((name, ctypes.c_longlong) for name in ("B", "S", "Q", "threads")),
                    *((name, ctypes.c_int * levels) for name in ("height", "width", "start"))]
    return Arguments


@functools.cache
def level_arrays(shapes: tuple[int, ...]) -> dict[str, ctypes.Array]:
    """Returns the last three fields of `Arguments` for levels of these sizes."""
    heights, widths = shapes[::2], shapes[1::2]
    starts = [sum(h * w for h, w in zip(heights[:level], widths)) for level in range(len(heights))]
    integers = ctypes.c_int * len(heights)
    return {"height": integers(*heights), "width": integers(*widths), "start": integers(*starts)}


def pack_arguments(arch: str, shapes: list[int],
                   tensors: dict[str, Tensor]) -> tuple[KernelConfig, ctypes.Structure]:
    """Returns the build that these tensors need, and the kernel's arguments.

    The tensors are named as in the kernel's `Arguments`. Inputs may have any strides. The tensors that
    the kernel writes must be contiguous and aligned to 16 bytes. shapes: [H_1, W_1, H_2, ...].
    """
    value, offset, logit = tensors["value"], tensors["offset"], tensors["logit"]
    B, S, M, C = value.shape
    _, Q, _, L, P = logit.shape
    config = KernelConfig(arch, value.dtype, offset.dtype, logit.dtype, C, M, L, P)
    wide = compute_dtype(value.dtype, offset.dtype, logit.dtype)
    tensors = {**tensors, "reference": tensors["reference"].to(wide)}
    pointers, kept = {}, []
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        pointer = tensor.data_ptr()
        if pointer % 16 != 0:
            tensor = tensor.clone()
            pointer = tensor.data_ptr()
        pointers[name] = pointer
        kept.append(tensor)
    arguments = argument_struct(L)(B=B, S=S, Q=Q, threads=torch.get_num_threads(), **pointers,
                                   **level_arrays(tuple(shapes)))
    arguments.tensors = kept  # keeps the copies alive until the kernel has been launched
    return config, arguments


def launch_grid(config: KernelConfig, direction: str, B: int, Q: int) -> tuple[int, int, int]:
    """Returns the number of blocks of 128 threads: (for all queries, heads, images up to a limit)."""
    lanes = config.definitions()[f"{direction.upper()}_LANES"]
    return math.ceil(Q * lanes / 128), config.heads, min(B, 65535)


def launch_kernel(direction: str, shapes: list[int], **tensors: Tensor) -> None:
    """Runs the "forward" or "backward" pass on the current stream. Arguments: as in pack_arguments."""
    device = tensors["value"].device
    config, arguments = pack_arguments(architecture(device), shapes, tensors)
    kernel = load_kernel(config)[direction]
    if config.arch == "cpu":
        kernel(ctypes.byref(arguments))
        return
    driver, context = cuda_driver(), ctypes.c_void_p()
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    with torch.cuda.device(device):
        driver.cuCtxGetCurrent(ctypes.byref(context))
        if not context:  # in a new thread, which gets its context from any call of the CUDA runtime
            torch.cuda.synchronize()
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        blocks = launch_grid(config, direction, arguments.B, arguments.Q)
        check_cuda(driver.cuLaunchKernel(kernel, *blocks, 128, 1, 1, 0, stream, parameters, None))
