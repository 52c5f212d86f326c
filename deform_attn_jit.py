"""Compiles deform_attn_kernel.cu at first use, keeps the result, and launches it. Used by deform_attn.py.

For a GPU by NVRTC, NVIDIA's run-time compiler, which comes with every CUDA build of torch; for a CPU by the
system's C++ compiler. No toolkit, no headers, no build step. One compilation, of about a second, per
architecture and shape family (head size, heads, levels, points, dtypes); the result stays in the temporary
folder, so that later processes load it in milliseconds.
"""
import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what, where, how to mend. Scripts
    exit with 2."""


class Family(NamedTuple):
    """What one compilation of deform_attn_kernel.cu is for."""
    arch: str  # "cpu", or as NVRTC names a GPU: "sm_90"
    value: torch.dtype
    offset: torch.dtype
    logit: torch.dtype
    channels: int
    heads: int
    levels: int
    points: int

    @property
    def real(self) -> torch.dtype:
        """What it computes in."""
        double = torch.float64 in (self.value, self.offset, self.logit)
        return torch.float64 if double else torch.float32

    def definitions(self) -> dict[str, str | int]:
        """The macros that the head of deform_attn_kernel.cu explains."""
        def lanes(vec: int) -> int:  # the more lanes, the more work is shared; 8 are enough
            return max(n for n in (1, 2, 4, 8) if self.channels // vec % n == 0)
        names = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bf16",
                 torch.float16: "fp16"}
        # Forward, the widest loads: 16 bytes. Backward, what the atomics like: from sm_90 on they take 16
        # bytes at once; before, neighbouring lanes should add to neighbouring floats.
        fits = [n for n in (8, 4, 2, 1) if self.channels % n == 0 and n * self.value.itemsize <= 16]
        forward, backward = fits[0], 1
        if self.real == torch.float32 and int(self.arch[3:] or 0) >= 90 and 4 in fits:
            backward = 4
        if self.arch == "cpu":
            forward = backward = self.channels
        return {"CHANNELS": self.channels, "HEADS": self.heads, "LEVELS": self.levels, "POINTS": self.points,
                "VALUE_T": names[self.value], "OFFSET_T": names[self.offset], "LOGIT_T": names[self.logit],
                "REAL": names[self.real], "FORWARD_VEC": forward, "FORWARD_LANES": lanes(forward),
                "BACKWARD_VEC": backward, "BACKWARD_LANES": lanes(backward)}


SOURCE = Path(__file__).with_name("deform_attn_kernel.cu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def nvrtc_library() -> ctypes.CDLL:
    """NVIDIA's run-time compiler, from the wheel that comes with torch or from the system. OSError if there
    is none."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(p) for p in (spec.submodule_search_locations if spec else [])]
    found = sorted(p for f in folders for p in f.glob("*/lib/libnvrtc.so.*"))
    major = (torch.version.cuda or "").split(".")[0]
    ours = [p for p in found if p.name.endswith("." + major)]
    path = (ours or found or [Path(f"libnvrtc.so.{major}" if major else "libnvrtc.so")])[-1]
    for part in path.parent.glob("libnvrtc-builtins.so*") if found else []:
        ctypes.CDLL(str(part), ctypes.RTLD_GLOBAL)  # some versions do not find their own second half
    return ctypes.CDLL(str(path))


def compile_for_gpu(definitions: dict[str, str | int], arch: str) -> bytes:
    """The kernel as machine code for `arch`. Needs no GPU. OSError with the compiler's words if it fails."""
    nvrtc, program, size = nvrtc_library(), ctypes.c_void_p(), ctypes.c_size_t()
    options = [f"-arch={arch}", "-std=c++17", *(f"-D{k}={v}" for k, v in definitions.items())]
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), SOURCE.read_bytes(), SOURCE.name.encode(), 0, None, None)
    status = nvrtc.nvrtcCompileProgram(program, len(options),
                                       (ctypes.c_char_p * len(options))(*(o.encode() for o in options)))
    result = "CUBIN" if status == 0 else "ProgramLog"
    getattr(nvrtc, f"nvrtcGet{result}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{result}")(program, text)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if status != 0:
        raise OSError(f"NVRTC: {text.value.decode(errors='replace').strip()}")
    return text.raw


def compile_for_cpu(definitions: dict[str, str | int]) -> bytes:
    """The kernel as a shared library of this machine. OSError with the compiler's words if it fails."""
    compiler = cpp_compiler()
    if not compiler:
        raise OSError("there is no C++ compiler")
    # The last four let a compiler vectorise sums; infinities and NaNs still work.
    flags = ["-x", "c++", "-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-fno-math-errno",
             "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"]
    with tempfile.TemporaryDirectory() as folder:
        for openmp in (["-fopenmp"], []):  # without it (Apple's clang) one thread does the work
            command = [compiler, *flags, *openmp, *(f"-D{k}={v}" for k, v in definitions.items()),
                       str(SOURCE), "-o", f"{folder}/kernel"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                return Path(folder, "kernel").read_bytes()
    raise OSError(f"{compiler}: {done.stderr.strip()}")


def cpp_compiler() -> str:
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or ""


def compile_kernel(family: Family) -> bytes:
    if family.arch == "cpu":
        return compile_for_cpu(family.definitions())
    return compile_for_gpu(family.definitions(), family.arch)


def build(family: Family) -> Path:
    """The compiled kernel on disk, built if it is not there yet. OSError if it cannot be built."""
    compiler = os.path.realpath(cpp_compiler())  # its real name holds its version
    machine = f"{compiler} {platform.node()} {platform.machine()} {torch.version.cuda}"
    about = SOURCE.read_bytes() + Path(__file__).read_bytes() + f"{family.definitions()} {machine}".encode()
    folder = Path(tempfile.gettempdir()) / f"fpdetr-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():  # somebody else's: never load code from it
        raise OSError(f"{folder} belongs to another user")
    path = folder / f"deform_attn-{family.arch}-{hashlib.sha256(about).hexdigest()[:16]}.bin"
    if not path.exists():
        code = compile_kernel(family)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")  # several processes may build at once
        temporary.write_bytes(code)
        temporary.replace(path)
    return path


@functools.cache
def load(family: Family) -> dict[str, object]:
    """{"forward": function or handle, "backward": ...} of the kernel. OSError if that is impossible."""
    names = {"forward": "ms_deform_attn_forward", "backward": "ms_deform_attn_backward"}
    try:
        path = build(family)
    except AttributeError as e:  # no os.getuid: Windows
        raise OSError(str(e)) from None
    if family.arch == "cpu":
        library = ctypes.CDLL(str(path))
        return {key: getattr(library, name) for key, name in names.items()}
    library, kernels = ctypes.c_void_p(), {key: ctypes.c_void_p() for key in names}
    # A "library" of the driver belongs to no device: one load serves all GPUs of this architecture.
    code, no_options = path.read_bytes(), (None, None, 0)
    check(cuda_driver().cuLibraryLoadData(ctypes.byref(library), code, *no_options, *no_options))
    for key, name in names.items():
        check(cuda_driver().cuLibraryGetKernel(ctypes.byref(kernels[key]), library, name.encode()))
    return kernels


@functools.cache
def cuda_driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def check(status: int) -> None:
    if status != 0:
        text = ctypes.c_char_p()
        cuda_driver().cuGetErrorString(status, ctypes.byref(text))
        raise OSError(f"CUDA driver: {(text.value or b'error').decode()} ({status})")


@functools.cache
def warn_once(reason: str) -> None:
    warnings.warn(f"deformable attention runs in grid_sample, several times more slowly: {reason[:400]}",
                  stacklevel=2)


def forced_path() -> str:
    """FPDETR_DEFORM_ATTN, or "" if it is not set. InputError if it is something unknown."""
    path = os.environ.get("FPDETR_DEFORM_ATTN", "")
    if path not in ("", "reference", "cpu", "cuda"):
        raise InputError(f"FPDETR_DEFORM_ATTN={path} is unknown: give reference, cpu or cuda, or unset it")
    return path


def arch_of(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@functools.cache
def failure(family: Family) -> str:
    """Why the kernel cannot be had, in one line; "" if it is loaded. Found out once per process."""
    try:
        load(family)
        return ""
    except OSError as e:
        return " ".join(str(e).split()) or type(e).__name__


def kernel_serves(device: torch.device, value: torch.dtype, reference: torch.dtype, offset: torch.dtype,
                  logit: torch.dtype, C: int, M: int, L: int, P: int) -> bool:
    """Whether the compiled kernel takes such inputs; if it should but cannot, there is one warning."""
    forced = forced_path()
    if forced == "reference":
        return False
    reason = f"the tensors are on {device}" if forced and forced != device.type else ""
    fits = (device.type in ("cpu", "cuda") and {value, reference, offset, logit} <= set(DTYPES)
            and min(C, M, L, P) > 0 and M < 2**16)
    if fits and not reason:
        reason = failure(Family(arch_of(device), value, offset, logit, C, M, L, P))
    if forced and reason:
        raise InputError(f"FPDETR_DEFORM_ATTN={forced} cannot work here: {reason}")
    if reason:
        warn_once(reason)
    return fits and not reason


# torch.compile asks once, while it traces. (What torch.compiler.assume_constant_result does, without its
# import of all of torch._dynamo, which would double the start-up time of every script.)
kernel_serves._dynamo_marked_constant = True


# ------------------------------------------------------------------------------------------------ launching

@functools.cache
def arguments_type(levels: int) -> type[ctypes.Structure]:
    """The struct `Arguments` of deform_attn_kernel.cu. (NVIDIA's cuda-core package, which would launch
    kernels in fewer lines than ctypes, takes no structs; the CPU's half needs ctypes anyway; and it would be
    one more thing to install, while NVRTC comes with torch.)"""
    class Arguments(ctypes.Structure):
        _fields_ = [*((name, ctypes.c_void_p) for name in (
                        "value", "reference", "offset", "logit", "output", "grad_output", "grad_value",
                        "grad_offset", "grad_logit")),
                    *((name, ctypes.c_longlong) for name in ("B", "S", "Q", "threads")),
                    *((name, ctypes.c_int * levels) for name in ("height", "width", "start"))]
    return Arguments


def pack(arch: str, shapes: list[int], tensors: dict[str, Tensor]) -> tuple[Family, ctypes.Structure]:
    """The kernel's arguments. Tensors are named as in its `Arguments`; inputs may have any strides, outputs
    (`output`, `grad_value`, ...) are fresh and contiguous. shapes: [H_1, W_1, H_2, ...]."""
    value, offset, logit = tensors["value"], tensors["offset"], tensors["logit"]
    (B, S, M, C), (_, Q, _, L, P) = value.shape, logit.shape
    family = Family(arch, value.dtype, offset.dtype, logit.dtype, C, M, L, P)
    tensors = {name: x.contiguous() for name, x in tensors.items()}
    tensors["reference"] = tensors["reference"].to(family.real)
    tensors = {name: x if x.data_ptr() % 16 == 0 else x.clone() for name, x in tensors.items()}
    starts = [sum(h * w for h, w in zip(shapes[:2 * l:2], shapes[1:2 * l:2])) for l in range(L)]
    integers = ctypes.c_int * L
    arguments = arguments_type(L)(B=B, S=S, Q=Q, threads=torch.get_num_threads(), start=integers(*starts),
                                  height=integers(*shapes[::2]), width=integers(*shapes[1::2]),
                                  **{name: x.data_ptr() for name, x in tensors.items()})
    arguments.tensors = tensors  # copies must live until the kernel has been launched
    return family, arguments


def grid(family: Family, direction: str, B: int, Q: int) -> tuple[int, int, int]:
    """Blocks of 128 threads: (for all queries, heads, at most all images)."""
    lanes = family.definitions()[f"{direction.upper()}_LANES"]
    return -(-Q * lanes // 128), family.heads, min(B, 65535)


def launch(direction: str, shapes: list[int], **tensors: Tensor) -> None:
    """Runs the kernel's "forward" or "backward" pass (`pack` says on what), on the current stream."""
    device = tensors["value"].device
    family, arguments = pack(arch_of(device), shapes, tensors)
    kernel = load(family)[direction]
    if device.type == "cpu":
        kernel(ctypes.byref(arguments))
        return
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    with torch.cuda.device(device):
        context = ctypes.c_void_p()
        cuda_driver().cuCtxGetCurrent(ctypes.byref(context))
        if not context:  # a fresh thread: any call of the CUDA runtime gives it the device's context
            torch.cuda.synchronize()
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        blocks = grid(family, direction, arguments.B, arguments.Q)
        check(cuda_driver().cuLaunchKernel(kernel, *blocks, 128, 1, 1, 0, stream, parameters, None))
