"""Measures the speed of this project on your machine, and computes the cost of the paper's experiments.

    python -m extras.benchmark operator                     deformable attention, all ways to compute it
    python -m extras.benchmark kernel                       what its GPU kernel needs, without a GPU
    python -m extras.benchmark finetune --data coco         training, with any flags of finetune.py
    python -m extras.benchmark pretrain --data imagenet     training, with any flags of pretrain.py
    python -m extras.benchmark hours                        FLOP, A100 hours and memory, by arithmetic
    python -m extras.benchmark --gpu                        all that matters on a new GPU, in minutes

`finetune` and `pretrain` also take --seconds, the length of a measurement (default 15). They build the
same things as the stage's main() and call its train_step. Weights do not change the speed, so
--pretrained and --init are ignored. They write nothing. `--gpu` prints a page and writes it as JSON too.
With --quick it measures once, and also runs on a CPU, as a check of the command itself.
"""
import argparse
import functools
import importlib
import itertools
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

import deform_attn
import engine
import finetune
import pretrain
from data import classification_set, detection_set, micro_batches
from engine import InputError, one_line
from extras import released
from extras.tables import markdown
from model import VARIANTS, Classifier, Config, Detector


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


# --------------------------------------------------------------------------------------------- operator

def measure_operator(result: dict, device: torch.device, quick: bool, deadline: float = math.inf,
                     repeats: int = 20) -> None:
    """Times the kernel with warm and cold caches, and the other ways to compute it."""
    config = deform_attn.KernelConfig(deform_attn.architecture(device), *[torch.float32] * 3,
                                      channels=32, heads=8, levels=4, points=4)
    try:
        deform_attn.build_kernel(config)  # fills the cache
        for what, function in (("compilation", deform_attn.compile_kernel),
                               ("loading from the cache", deform_attn.load_kernel)):
            start = time.perf_counter()
            function(config)
            print(f"{what}: {1000 * (time.perf_counter() - start):.1f} ms")
    except OSError as e:
        raise InputError(f"the kernel cannot be built here: {one_line(e)}") from None
    repeats = 1 if quick else repeats
    bandwidth, call = copy_bandwidth(device, repeats), call_microseconds(device)
    print(f"{config.arch}; copy: {bandwidth / 1e9:.0f} GB/s; a call on tiny inputs: forward "
          f"{call[0]:.0f} us, forward and backward {call[1]:.0f} us")
    result.update(architecture=config.arch, copy_bytes_per_second=bandwidth, call_microseconds=call,
                  rows=[])
    ways = {"kernel": deform_attn.ms_deform_attn, "cold": deform_attn.ms_deform_attn,
            "reference": deform_attn.ms_deform_attn_reference, "stacked": stacked_attention,
            **public_operators(device)}
    # variant, height, width, extra tokens, batch. The rows that matter most come first.
    sizes = [("lite", 512, 512, 0, 1), ("tiny", 64, 64, 12, 16)]
    if device.type == "cuda":
        sizes = [(variant, height, width, extra, batch) for batch in ((1,) if quick else (1, 2, 4, 8))
                 for height, width, extra in ((800, 1344, 300), (224, 224, 1))
                 for variant in ("lite", "base")]
    cases = [(*size, dtype) for size in sizes for dtype in (torch.bfloat16, torch.float32)]
    table = []
    for variant, height, width, extra, batch, dtype in cases:
        if time.monotonic() > deadline:
            print(f"the last {len(cases) - len(table)} rows would take too long")
            break
        M = VARIANTS[variant].heads
        case = height, width, M, VARIANTS[variant].dim // M, batch, extra, dtype, device
        row = {"variant": variant, "height": height, "width": width, "batch": batch,
               "dtype": str(dtype)[6:], "seconds": {}}
        for name, function in ways.items():
            timer = partial(median_seconds, device=device, repeats=repeats, cold=name == "cold")
            try:
                row["seconds"][name], moved = time_operator(function, *case, timer)
                row["bounds"] = [max(n / bandwidth, t) for n, t in zip(moved, gpu_limits(*case))]
            except RuntimeError as e:  # too little memory, or a dtype that it does not know
                row["seconds"][name] = None
                print(f"{name}, {variant}, batch {batch}, {row['dtype']}: {str(e).splitlines()[0][:80]}")
        result["rows"].append(row)
        table.append((f"{variant}, {height} x {width}, batch {batch}, {row['dtype']}", row_cells(row)))
    header = [title for direction in ("forward", "backward")
              for title in (direction, "of bound", *list(ways)[1:])]
    print("Microseconds per image: the kernel with warm and with cold caches, and the other ways.\n"
          "Of bound: the time that the hardware needs at least, of the time with warm caches.\n"
          "Stacked: the grid_sample formulation of Deformable DETR and Hugging Face.")
    print(markdown("kernel", tuple(header), table))


def row_cells(row: dict) -> tuple[str, ...]:
    """Returns the columns of a row of measure_operator."""
    texts = []
    for direction in (0, 1):
        for name, seconds in row["seconds"].items():
            if seconds is None:
                texts += ["-"] * (1 + (name == "kernel"))
                continue
            texts.append(f"{1e6 * seconds[direction] / row['batch']:.0f}")
            if name == "kernel":
                texts.append(f"{row['bounds'][direction] / seconds[direction]:.0%}")
    return tuple(texts)


# Multiprocessors, clock and slices of the second cache, by compute capability. The slices are assumed.
GPU_LIMITS = {(8, 0): (108, 1.41e9, 80), (9, 0): (132, 1.755e9, 96)}


def gpu_limits(height: int, width: int, M: int, C: int, B: int, extra: int, dtype: torch.dtype,
               device: torch.device) -> tuple[float, float]:
    """Returns the seconds that loads and atomics take at least, if all loads hit the first cache.

    A multiprocessor loads 128 bytes per clock. A slice of the second cache adds to 32 bytes per clock.
    """
    limits = GPU_LIMITS.get(torch.cuda.get_device_capability(device)) if device.type == "cuda" else None
    if limits is None:
        return 0.0, 0.0
    processors, clock, slices = limits
    queries = sum(math.ceil(height / s) * math.ceil(width / s) for s in (8, 16, 32, 64)) + extra
    channels = B * queries * M * 16 * 4 * C  # 16 samples of 4 corners
    return channels * dtype.itemsize / (128 * processors * clock), channels * 4 / (32 * slices * clock)


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """Returns the bytes per second that a plain copy reads and writes."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device, repeats)


def call_microseconds(device: torch.device) -> tuple[float, float]:
    """Returns how long Python takes for a forward pass, and for both passes, on tiny inputs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second thread would only have to be waited for
    # As on a CPU: on a GPU, a call returns when its kernel is launched.
    timer = partial(median_seconds, device=torch.device("cpu"), repeats=500)
    size = 16, 16, 1, 8, 1, 0, torch.float32, device
    (forward, backward), _ = time_operator(deform_attn.ms_deform_attn, *size, timer)
    torch.set_num_threads(threads)
    return 1e6 * forward, 1e6 * (forward + backward)


def time_operator(function: Callable, height: int, width: int, M: int, C: int, B: int, extra: int,
                  dtype: torch.dtype, device: torch.device, timer: Callable) -> tuple[list, list]:
    """Times an encoder layer's attention by timer(run). All image tokens and `extra` tokens are queries.

    Returns:
        seconds of the forward and of the backward pass; the bytes that each must read or write.
    """
    g = torch.Generator(device).manual_seed(0)
    random = partial(torch.randn, generator=g, device=device)
    shapes = [(math.ceil(height / stride), math.ceil(width / stride)) for stride in (8, 16, 32, 64)]
    centres = [torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(-1)
               for h, w in shapes]
    references = torch.cat([*centres, torch.rand(extra, 2)])  # (Q, 2)
    references = references[None, :, None].repeat(B, 1, 4, 1).to(device)  # (B, Q, 4, 2)
    S, Q = sum(h * w for h, w in shapes), references.shape[1]
    value = random(B, S, M, C).to(dtype).requires_grad_()
    offsets = (3 * random(B, Q, M, 4, 4, 2)).to(dtype).requires_grad_()
    logits = random(B, Q, M, 4, 4).to(dtype).requires_grad_()
    grad_output = random(B, Q, M * C).to(dtype)

    def forward() -> Tensor:
        return function(value, shapes, references, offsets, logits)

    def forward_and_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), (value, offsets, logits), grad_output)
    with torch.no_grad():
        first = timer(forward)
    both = timer(forward_and_backward)
    inputs = value.nbytes + offsets.nbytes + logits.nbytes
    once = inputs + references.nbytes + grad_output.nbytes  # the output is as large as its gradient
    return [first, both - first], [once, once + inputs]


def median_seconds(run: Callable[[], object], device: torch.device, repeats: int,
                   cold: bool = False) -> float:
    """Returns the median time of run(). On GPUs a CUDA graph replays it, without Python's own time.

    cold: write more than the caches hold before each run.
    """
    times = []
    more_than_caches = torch.empty(2**28 if cold else 0, dtype=torch.uint8, device=device)
    if device.type == "cpu":
        for _ in range(repeats + 1):  # the first one warms up
            more_than_caches.zero_()
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(repeats + 3):  # the first three warm up
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        more_than_caches.zero_()
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times[3:])


def stacked_attention(value: Tensor, spatial_shapes: list[tuple[int, int]], reference_points: Tensor,
                      sampling_offsets: Tensor, attention_logits: Tensor) -> Tensor:
    """Computes `ms_deform_attn` as other projects do on CPUs (Deformable DETR, Hugging Face).

    Weights and locations become tensors. The samples of all levels are stacked, multiplied and summed.
    """
    locations, weights = deform_attn.sampling_locations_and_weights(spatial_shapes, reference_points,
                                                                    sampling_offsets, attention_logits)
    B, _, M, C = value.shape
    _, Q, _, L, P = weights.shape
    samples = []
    for level, tokens in enumerate(value.split([h * w for h, w in spatial_shapes], dim=1)):
        maps = tokens.permute(0, 2, 3, 1).reshape(B * M, C, *spatial_shapes[level])
        places = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)  # (B * M, Q, P, 2)
        samples.append(F.grid_sample(maps, places.to(maps.dtype), align_corners=False))
    samples = torch.stack(samples, -2).flatten(-2)  # (B * M, C, Q, L * P)
    weights = weights.transpose(1, 2).reshape(B * M, 1, Q, L * P)
    output = (samples * weights).sum(-1)  # (B * M, C, Q)
    return output.view(B, M * C, Q).transpose(1, 2).contiguous()


def public_operators(device: torch.device) -> dict[str, Callable]:
    """Finds installed CUDA operators of other projects. Returns functions like `ms_deform_attn`."""
    def adapt_inputs(operator: Callable) -> Callable:
        def run(value: Tensor, spatial_shapes: list[tuple[int, int]], *rest: Tensor) -> Tensor:
            shapes = deform_attn.level_sizes(tuple(spatial_shapes), value.device)
            starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
            locations, weights = deform_attn.sampling_locations_and_weights(spatial_shapes, *rest)
            return operator(value, shapes, starts, locations.to(value.dtype), weights, 64)
        return run
    found = {}
    for name, module, function in (
            ("mmcv", "mmcv.ops.multi_scale_deform_attn", "MultiScaleDeformableAttnFunction"),
            ("Deformable-DETR", "functions", "MSDeformAttnFunction")):
        try:
            found[name] = adapt_inputs(getattr(importlib.import_module(module), function).apply)
        except (ImportError, AttributeError):
            pass  # it is not installed
    return found if device.type == "cuda" else {}


# ----------------------------------------------------------------------------------------------- kernel

def print_kernel() -> None:
    """Compiles the GPU kernel of Lite and Base, prints what it needs and checks it. No GPU is needed."""
    rows, checks = [], {}
    for arch in ("sm_80", "sm_90", "sm_100"):
        for dtype in (torch.float32, torch.bfloat16):
            for heads, channels in ((8, 32), (10, 48)):
                config = deform_attn.KernelConfig(arch, dtype, dtype, dtype, channels, heads, 4, 4)
                for direction, use in inspect_kernel(config).items():
                    name = f"{arch}, {str(dtype)[6:]}, C {channels}, {direction}"
                    rows.append((name, (use["registers"], use["stack"], use["spills"],
                                        f"{use['instructions']:.1f}")))
                    checks[f"{name}: no register is spilled"] = use["spills"] == 0
                    if direction == "forward":
                        checks[f"{name}: stores 16 bytes at once"] = use["narrow stores"] == 0
                    elif dtype == torch.bfloat16:
                        checks[f"{name}: at most 70 registers"] = use["registers"] <= 70
        config = config._replace(levels=2)
        generic = sum(use["generic"] for use in inspect_kernel(config).values())
        checks[f"{arch}: no generic access with 2 levels"] = generic == 0
    print(markdown("kernel", ("registers", "stack", "spilled bytes", "instructions"), rows))
    print("Instructions are those of a warp, per sample of a query and head, with all corners on the map.")
    failed = [name for name, passed in checks.items() if not passed]
    print(*(f"FAILED: {name}" for name in failed), f"{len(checks) - len(failed)} of {len(checks)} checks "
          f"passed", sep="\n")
    if failed:
        sys.exit(1)


def inspect_kernel(config: deform_attn.KernelConfig) -> dict[str, dict[str, float]]:
    """Compiles a kernel for a GPU. Returns the properties of its "forward" and "backward" pass."""
    try:
        code, messages = deform_attn.compile_for_gpu(config.arch, [*config.options(), "-Xptxas=-v"])
        assembly = disassemble(code)
    except OSError as e:
        raise InputError(f"the kernel cannot be inspected here ({e}): "
                         f"pip install nvidia-cuda-nvrtc nvidia-cuda-nvdisasm") from None
    pattern = (r"entry function '\w+_(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores"
               r".*?Used (\d+) registers")
    uses = {name: {"registers": int(registers), "stack": int(stack), "spills": int(spills)}
            for name, stack, spills, registers in re.findall(pattern, messages, re.S)}
    _, *sections = re.split(r"^\.text\.\w+_(\w+):$", assembly, flags=re.M)
    for name, section in zip(sections[::2], sections[1::2]):
        lanes = config.definitions()[f"{name.upper()}_LANES"]
        samples = config.levels * config.points
        total = warp_instructions(section, (1, samples // lanes, lanes))
        uses[name]["instructions"] = total / (32 // lanes * samples)
        uses[name]["generic"] = len(re.findall(r"\b(?:LD|ST)\b", section))
        uses[name]["narrow stores"] = len(re.findall(r"\bSTG\b(?!\S*\.128)", section))
    return uses


def disassemble(code: bytes) -> str:
    """Returns the instructions of a GPU's machine code. Raises OSError if there is no nvdisasm."""
    wheels = [path for folder in sys.path for path in Path(folder).glob("nvidia/*/bin/nvdisasm")]
    program = shutil.which("nvdisasm") or next(iter(wheels), "nvdisasm")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(code)
        done = subprocess.run([program, "-c", path], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"nvdisasm: {done.stderr.strip()}")
    return done.stdout


def warp_instructions(assembly: str, trips: tuple[int, ...]) -> int:
    """Counts the instructions that a warp executes in a function.

    A branch backwards closes a loop. trips: how often the outermost loops run, those in them, and so on.
    In this kernel these are the loops over images, rounds and lanes.
    """
    instructions, labels = [], {}
    for line in assembly.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/", line) and not re.search(r"\bNOP\b", line):
            instructions.append(line)
    ends = {}  # of the loop that begins at an instruction
    for number, line in enumerate(instructions):
        target = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
        if target and labels[target[1]] < number:
            ends[labels[target[1]]] = number
    total = 0
    for number in range(len(instructions)):
        depth = sum(start <= number <= end for start, end in ends.items())
        total += math.prod(trips[:depth])
    return total


# --------------------------------------------------------------------------------------------- training

def measure_training(stage: str, arguments: list[str], seconds: float) -> None:
    """Prints the speed of finetune.py or pretrain.py with these flags: a page, then a line of JSON."""
    args = (finetune if stage == "finetune" else pretrain).parse(arguments)
    device = engine.setup(args)
    if engine.world_size() > 1:
        raise InputError("the benchmark measures one process: start it without torchrun")
    args.lr = 0.0  # takes as long as any other rate, and no step can diverge
    build = build_finetuning if stage == "finetune" else build_pretraining
    loader, train_on = build(args, device)
    images = loader.batch_sampler.images_after(args.epochs * len(loader))
    per_batch = images / args.epochs / len(loader)  # the last one of an epoch may be smaller
    loading, training = (per_batch * speed for speed in measure_speeds(loader, train_on, seconds))
    peak = peak_gib(device)
    hours = images / training / 3600
    print(f"{stage} {args.variant} on {args.data}: {args.image_size} pixels, batch {args.batch_size} in "
          f"micro-batches of {args.micro_batch}, {args.workers} loading processes, --amp {args.amp}\n"
          f"{device_name(device)}\n"
          f"training          {training:10.2f} images/s, {per_batch / training:.3f} s per batch\n"
          f"the loader alone  {loading:10.2f} images/s\n"
          f"peak memory       {'   unknown' if peak is None else f'{peak:10.2f} GiB'}\n"
          f"the whole run     {hours:10.2f} hours: {args.epochs} epochs, {images:,} images")
    flags = ("variant", "data", "image_size", "batch_size", "micro_batch", "workers", "amp", "epochs")
    print(json.dumps({"stage": stage, **{flag: getattr(args, flag) for flag in flags},
                      "device": device_name(device), "training_images_per_second": training,
                      "loader_images_per_second": loading, "peak_gib": peak, "hours": hours}))


def peak_gib(device: torch.device) -> float | None:
    """Returns the most memory that was in use, in GiB. None on Windows, which does not count it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB on Linux


def build_finetuning(args: argparse.Namespace, device: torch.device) -> tuple[DataLoader, Callable]:
    """Returns the loader of finetune.py, and a function that trains on one of its batches."""
    train = detection_set(args.data, "train", args.data_root, args.limit_train, args.image_size,
                          args.augment, args.seed)
    model = build_model(Detector, len(train.classes), args, dropout=args.dropout, adaptor=args.adaptor,
                        adaptor_per_layer=args.adaptor_per_layer,
                        queries=args.queries or VARIANTS[args.variant].queries).to(device)
    optimizer = finetune.build_optimizer(model, args)
    sampler = engine.BatchSampler(len(train), args.batch_size, args.seed)
    collate = partial(micro_batches, size=args.micro_batch)

    def train_on(batch: list) -> None:
        finetune.train_step(model, optimizer, batch, args, device)
    return engine.make_loader(train, collate, args, device, batch_sampler=sampler), train_on


def build_pretraining(args: argparse.Namespace, device: torch.device) -> tuple[DataLoader, Callable]:
    """Returns the loader of pretrain.py, and a function that trains on one of its batches."""
    train = classification_set(args.data, "train", args.data_root, args.limit_train, args.image_size,
                               args.augment, args.seed)
    tree = pretrain.read_tree(args, train, device)
    model = build_model(Classifier, len(train.classes), args, drop_path=args.drop_path,
                        class_tokens=args.class_tokens, adaptor="none").to(device)
    optimizer = pretrain.build_optimizer(model, args)
    forward = torch.compile(model) if args.compile else model
    sampler = pretrain.RepeatedSampler(len(train), args.batch_size, args.seed, args.repeats)
    rng = np.random.default_rng(args.seed)

    def train_on(batch: list[Tensor]) -> None:
        images, labels = (x.to(device, non_blocking=True) for x in batch)
        pretrain.train_step(forward, optimizer, images, labels, len(train.classes), rng, tree, args)
    return engine.make_loader(train, pretrain.collate, args, device, batch_sampler=sampler), train_on


def build_model(model_class: type[Classifier] | type[Detector], num_classes: int,
                args: argparse.Namespace, **changes) -> Classifier | Detector:
    """Builds the model of a stage. changes: to the Config of the variant."""
    config = replace(VARIANTS[args.variant], structure=args.structure, **changes)
    model = released.build_model(model_class, config, num_classes, args.layout).train()
    model.encoder.checkpointing = args.activation_checkpointing
    return model


def measure_speeds(loader: DataLoader, train_on: Callable, seconds: float) -> tuple[float, float]:
    """Returns the batches per second of the loader alone and of training on its batches."""
    batches = itertools.chain.from_iterable(itertools.repeat(loader))  # epoch after epoch
    batches_per_second(batches, train_on, 0)  # compiles, and allocates memory
    # The loading processes work ahead. Their batches have queued up during these slow steps. If the
    # clock started now, it would count these batches, but not the time of loading them. That gives too
    # many batches per second where loading is slower than training. So they are thrown away first. So is
    # one more: the processes may work in step, and the clock has to start and stop at the same place.
    for _ in range((loader.prefetch_factor or 0) * loader.num_workers + 1):
        next(batches)
    loading = batches_per_second(batches, lambda batch: None, seconds)
    # The queue is empty now. If loading is slower than training, it stays empty. If not, it fills again
    # during some steps that do not count. Either way, the clock then starts as in the middle of a run.
    batches_per_second(batches, train_on, seconds / 3)
    return loading, batches_per_second(batches, train_on, seconds)


def batches_per_second(batches: Iterator, use: Callable, seconds: float) -> float:
    """Calls use(batch) for so many seconds, at least twice. (A train_step waits for the GPU itself.)"""
    start, steps = time.perf_counter(), 0
    while steps < 2 or time.perf_counter() - start < seconds:
        use(next(batches))
        steps += 1
    return steps / (time.perf_counter() - start)


# ------------------------------------------------------------------------------------------------ hours

A100_FLOPS = 312e12  # its peak in bfloat16, per second
UTILISATION = 0.25   # the part of the peak that training reaches: our assumption


def print_hours() -> None:
    """Prints FLOP and A100 hours of the paper's experiments, and the memory of a training step."""
    sizes = {variant: VARIANTS[variant] for variant in ("lite", "small", "base")}
    decoder = replace(VARIANTS["lite"], structure="encoder-decoder", adaptor="none")
    decoders = {f"FP-EncDec, class tokens: {n}": replace(decoder, class_tokens=n) for n in (1, 300)}
    rows = []
    # (height, width), images, and forward passes over each image. A training step counts as three: its
    # backward pass takes two. COCO-C is clean images, and 15 corruptions at 5 severities. Images of
    # Cityscapes have 1024 x 2048 pixels and are resized to at most 1333.
    for name, configs, model_class, size, images, passes in (
            ("ImageNet-1k", sizes | decoders, Classifier, (224, 224), 1_281_167, 3 * 300),
            ("ImageNet-21k-P of winter21", sizes, Classifier, (224, 224), 11_060_223, 3 * 80),
            ("COCO", sizes | {"FP-EncDec": decoder}, Detector, (800, 1333), 118_287, 3 * 50),
            ("COCO-C", sizes, Detector, (800, 1333), 5_000, 1 + 15 * 5),
            ("Cityscapes, five seeds", sizes, Detector, (667, 1333), 2_975, 5 * 3 * 50)):
        for variant, config in configs.items():
            flops = forward_flops(model_class, config, size)
            hours = flops * images * passes / (A100_FLOPS * UTILISATION) / 3600
            rows.append((f"{name}, {variant}", (f"{size[0]} x {size[1]}", flops / 1e9, f"{images:,}",
                                                passes, hours)))
    print(f"A100 hours = FLOP x images x passes / {UTILISATION:.0%} of {A100_FLOPS / 1e12:.0f} TFLOP/s")
    print(markdown("experiment", ("pixels", "GFLOP of a pass", "images", "passes", "A100 hours"), rows))
    print("An epoch of training counts as three passes. Evaluations and loading are not counted.")
    print("\nActivations of one image of 800 x 1333 pixels, in bfloat16, with dropout 0.1")
    rows = [(variant, [f"{activation_bytes(config, flag) / 1e9:.2f}" for flag in (False, True)])
            for variant, config in sizes.items()]
    print(markdown("GB", ("kept for the backward pass", "with --activation-checkpointing"), rows))


@functools.cache
def forward_flops(model_class: type[Classifier] | type[Detector], config: Config,
                  size: tuple[int, int]) -> int:
    """Counts the FLOP of one image of `size` (height, width): two per multiplication and addition.

    It counts linear layers, convolutions and the products of attention among the extra tokens. Sampling
    is left out, because memory limits it.
    """
    # Imported here because that takes a second.
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    counter = FlopCounterMode(display=False)
    # Shapes only, nothing is computed. The counter sees the matrix products of the plain attention.
    with FakeTensorMode(), counter, sdpa_kernel(SDPBackend.MATH):
        model = model_class(config, 1000 if model_class is Classifier else 80)
        model(torch.zeros(1, 3, *size))
    return counter.get_total_flops()


def activation_bytes(config: Config, checkpointing: bool, size: tuple[int, int] = (800, 1333)) -> int:
    """Counts the bytes that a detector's forward pass on one image keeps for the backward pass.

    This is in bfloat16 with the rules of CPUs: a dropout mask takes 2 bytes per element, on GPUs 1.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor  # views of one memory count once
        return tensor
    with FakeTensorMode():
        model = Detector(replace(config, dropout=0.1), 80).train()
        model.encoder.checkpointing = checkpointing
        keep = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with keep, torch.autocast("cpu", torch.bfloat16):
            model(torch.zeros(1, 3, *size))
        for parameter in model.parameters():
            kept.pop(parameter.untyped_storage()._cdata, None)
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


# --------------------------------------------------------------------------- a GPU, in one command

COCO_IMAGES, EPOCHS = 118_287, 50
MINUTES = 8  # at most. Two of them are kept for the training step
GOALS = ("goals on an H100, in bfloat16 at 800 x 1344, per image: forward 80 us, backward 450 us; "
         "training of Lite at 800 x 1333: 70 images/s")


def measure_gpu(quick: bool, path: Path) -> None:
    """Prints a page about this GPU, and writes it as JSON. quick: tiny sizes, also on a CPU."""
    if not (quick or torch.cuda.is_available()):
        raise InputError("torch sees no GPU: give --quick to try the command on a CPU")
    start = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {"device": device_name(device), "quick": quick}
    print(f"{device_name(device)}{', quick: the numbers mean nothing' if quick else ''}")
    for name, measure in (("tests", run_gpu_tests), ("operator", measure_operator),
                          ("training", measure_training_step)):
        print(f"\n{name.upper()}", flush=True)
        result[name] = {}
        try:
            measure(result[name], device, quick, deadline=start + 60 * (MINUTES - 2))
        except Exception as e:  # whatever fails, the other parts are still worth their minutes
            result[name]["error"] = f"{type(e).__name__}: {e}"
            print(f"failed: {result[name]['error'][:400]}")
    result["seconds"] = time.monotonic() - start
    path.parent.mkdir(parents=True, exist_ok=True)
    engine.write_json(path, result)
    print(f"\n{GOALS}\n{result['seconds']:.0f} seconds; written to {path}")


def run_gpu_tests(result: dict, device: torch.device, quick: bool, deadline: float) -> None:
    """Runs the operator's tests on the GPU in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider",
               "tests/test_deform_attn.py", "-k", "cuda or gpu"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True,
                          timeout=180)
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    print(*failed, lines[-1], sep="\n")
    result.update(summary=lines[-1], failed=failed, exit_code=done.returncode)


def measure_training_step(result: dict, device: torch.device, quick: bool, deadline: float) -> None:
    """Times Lite's training step by parts. Data are random, so loading is not part of it."""
    height, width, repeats = (64, 96, 1) if quick else (800, 1333, 10)
    args = finetune.parse(["--data", "coco", "--variant", "lite", "--device", device.type])
    engine.setup(args)
    model = build_model(Detector, 80, args, dropout=args.dropout).to(device)
    args.lr = 0.0
    optimizer = finetune.build_optimizer(model, args)
    result.update(amp=args.amp, height=height, width=width, batches=[])
    for batch_size in ((1,) if quick else (2, 4, 8, 16)):
        images = torch.rand(batch_size, 3, height, width)
        mask = torch.zeros(batch_size, height, width, dtype=torch.bool)
        targets = [{"labels": torch.randint(80, (7,)), "boxes": torch.rand(7, 4) / 2 + 0.1}
                   for _ in range(batch_size)]
        batch = [finetune.to_device(images, mask, targets, device)]
        try:
            row = time_training_step(model, optimizer, batch, args, device, repeats)
        except torch.OutOfMemoryError:
            print(f"batch {batch_size} does not fit into memory")
            break
        row["batch"] = batch_size
        row["hours"] = COCO_IMAGES * EPOCHS / row["images_per_second"] / 3600
        result["batches"].append(row)
        parts = ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in row["parts"].items())
        memory = "unknown" if row["peak_gib"] is None else f"{row['peak_gib']:.2f} GiB"
        print(f"Lite, {height} x {width}, --amp {args.amp}, batch {batch_size}: "
              f"{row['images_per_second']:.2f} images/s, {EPOCHS} epochs of COCO in "
              f"{row['hours']:.1f} hours\n  milliseconds: {parts}; peak memory {memory}; "
              f"{row['syncs']} host syncs per step", flush=True)


def time_training_step(model: Detector, optimizer: torch.optim.Optimizer, batch: list,
                       args: argparse.Namespace, device: torch.device, repeats: int) -> dict:
    """Times train_step as it is, then a copy of it that waits after every part."""
    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step() -> None:
        finetune.train_step(model, optimizer, batch, args, device)
    for _ in range(3 if repeats > 1 else 1):
        step()  # allocates memory
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = wait()
    for _ in range(repeats):
        step()
    seconds = (wait() - start) / repeats

    images, mask, targets = batch[0]
    times = [wait()]
    optimizer.zero_grad(set_to_none=True)
    with engine.autocast(args, device):
        outputs = model(images, mask)
    times.append(wait())
    loss = sum(finetune.detection_loss(outputs, targets).values())
    times.append(wait())
    loss.backward()
    times.append(wait())
    torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
    optimizer.step()
    times.append(wait())
    names = "forward", "matching and loss", "backward", "clipping and AdamW"
    parts = {name: end - start for name, start, end in zip(names, times, times[1:])}
    return {"images_per_second": len(images) / seconds, "seconds": seconds, "parts": parts,
            "peak_gib": peak_gib(device), "syncs": count_host_syncs(step, device)}


def count_host_syncs(step: Callable[[], None], device: torch.device) -> int:
    """Counts how often Python waits for the GPU in a step."""
    if device.type == "cpu":
        return 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=engine.Help)
    parser.add_argument("--gpu", action="store_true", help="measure all that matters on a new GPU")
    parser.add_argument("--quick", action="store_true", help="with --gpu: tiny sizes, also on a CPU")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"), help="JSON file of --gpu")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    operator = commands.add_parser("operator", help="deformable attention", allow_abbrev=False,
                                   formatter_class=engine.Help)
    operator.add_argument("--device", choices=("cpu", "cuda"), help="where to compute",
                          default="cuda" if torch.cuda.is_available() else "cpu")
    operator.add_argument("--repeats", type=engine.positive, default=20, help="the median is shown")
    operator.set_defaults(amp="off", seed=0)  # for engine.setup
    for stage in ("finetune", "pretrain"):  # their --help is the stage's
        command = commands.add_parser(stage, add_help=False, allow_abbrev=False,
                                      help=f"training, with any flags of {stage}.py and --seconds")
        command.add_argument("--seconds", type=engine.rate, default=15.0)
    commands.add_parser("kernel", allow_abbrev=False, help="what the GPU kernel needs, without a GPU")
    commands.add_parser("hours", allow_abbrev=False, help="FLOP, A100 hours and memory, by arithmetic")
    args, others = parser.parse_known_args(arguments)
    if args.gpu == (args.command is not None):
        parser.error("give either a command or --gpu")
    if args.command in ("finetune", "pretrain"):
        return measure_training(args.command, others, args.seconds)
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if args.command == "hours":
        return print_hours()
    if args.command == "kernel":
        return print_kernel()
    if deform_attn.forced_path() == "reference":
        raise InputError("FPDETR_DEFORM_ATTN=reference leaves nothing to compare: unset it")
    if args.gpu:
        return measure_gpu(args.quick, args.out)
    device = engine.setup(args)
    print(device_name(device))
    measure_operator({}, device, quick=False, repeats=args.repeats)


if __name__ == "__main__":
    engine.run_script(main)
