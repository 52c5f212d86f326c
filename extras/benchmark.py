"""Measures the speed of this project on your machine, and computes the cost of the paper's experiments.

    python -m extras.benchmark operator                     deformable attention, all ways to compute it
    python -m extras.benchmark kernel                       what its GPU kernel needs, without a GPU
    python -m extras.benchmark finetune --data coco         training, with any flags of finetune.py
    python -m extras.benchmark pretrain --data imagenet     training, with any flags of pretrain.py
    python -m extras.benchmark hours                        FLOP, A100 hours and memory, by arithmetic

`finetune` and `pretrain` also take --seconds, the length of a measurement (default 15). They build the
same things as the stage's main() and call its train_step. Weights do not change the speed, so
--pretrained and --init are ignored. Nothing is written.
"""
import argparse
import functools
import importlib
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
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
from engine import InputError
from extras import released
from extras.tables import markdown
from model import VARIANTS, Classifier, Config, Detector


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


# --------------------------------------------------------------------------------------------- operator

def measure_operator(device: torch.device, repeats: int) -> None:
    """Prints the times of compiling, loading and running the operator in every way.

    "of bound" is the time in which a plain copy would read and write the same
    tensors once, divided by the measured time.
    """
    if deform_attn.forced_path() == "reference":
        raise InputError("FPDETR_DEFORM_ATTN=reference leaves nothing to compare: unset it")
    print(device_name(device))
    source = torch.empty(2**28 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device, repeats)
    print(f"copy: {bandwidth / 1e9:.0f} GB/s")

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
        raise InputError(f"the kernel cannot be built here: {' '.join(str(e).split())[:400]}") from None

    # name, height, width, heads, channels per head, batch, queries besides the image tokens
    sizes = [("512x512, D 256", 512, 512, 8, 32, 1, 0), ("tiny, 64x64, batch 16", 64, 64, 4, 16, 16, 50)]
    if device.type == "cuda":
        sizes = [(f"{variant}, {h}x{w}, batch {batch}", h, w, heads, channels, batch, extra)
                 for variant, heads, channels in (("lite", 8, 32), ("base", 10, 48))
                 for h, w, extra in ((800, 1344, 300), (224, 224, 1)) for batch in (1, 2, 4, 8)]
    functions = {"kernel": deform_attn.ms_deform_attn, "reference": deform_attn.ms_deform_attn_reference,
                 "grid_sample and stack": stacked_attention, **public_operators(device)}
    print(f"{'size':26} {'path':22} {'dtype':9} {'forward':>11} {'of bound':>8} {'backward':>11} "
          f"{'of bound':>8}")
    for name, *size in sizes:
        for path, function in functions.items():
            for dtype in (torch.float32, torch.bfloat16) if path == "kernel" else (torch.float32,):
                try:
                    times, moved = time_operator(function, *size, dtype, device, repeats)
                except torch.OutOfMemoryError:
                    print(f"{name:26} {path:22} does not fit into memory")
                    continue
                columns = [f"{1e6 * t:8.0f} us {n / bandwidth / t:8.0%}" for t, n in zip(times, moved)]
                print(f"{name:26} {path:22} {str(dtype)[6:]:9} {' '.join(columns)}", flush=True)


def time_operator(function: Callable, height: int, width: int, M: int, C: int, B: int, extra: int,
                  dtype: torch.dtype, device: torch.device, repeats: int) -> tuple[list, list]:
    """Times an encoder layer's attention. All image tokens and `extra` tokens are queries.

    Returns:
        seconds of the forward and of the backward pass; the bytes that each must read or write.
    """
    g = torch.Generator().manual_seed(0)
    shapes = [(math.ceil(height / stride), math.ceil(width / stride)) for stride in (8, 16, 32, 64)]
    centres = [torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(-1)
               for h, w in shapes]
    references = torch.cat([*centres, torch.rand(extra, 2, generator=g)])  # (Q, 2)
    references = references[None, :, None].repeat(B, 1, 4, 1).to(device)  # (B, Q, 4, 2)
    S, Q = sum(h * w for h, w in shapes), references.shape[1]
    value = torch.randn(B, S, M, C, generator=g).to(device, dtype).requires_grad_()
    offsets = (3 * torch.randn(B, Q, M, 4, 4, 2, generator=g)).to(device, dtype).requires_grad_()
    logits = torch.randn(B, Q, M, 4, 4, generator=g).to(device, dtype).requires_grad_()
    grad_output = torch.randn(B, Q, M * C, generator=g).to(device, dtype)

    def forward() -> Tensor:
        return function(value, shapes, references, offsets, logits)

    def forward_and_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), (value, offsets, logits), grad_output)
    with torch.no_grad():
        first = median_seconds(forward, device, repeats)
    both = median_seconds(forward_and_backward, device, repeats)
    inputs = value.nbytes + offsets.nbytes + logits.nbytes
    once = inputs + references.nbytes + grad_output.nbytes  # the output is as large as its gradient
    return [first, both - first], [once, once + inputs]


def median_seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Returns the median time of run(). On GPUs a CUDA graph replays it, without Python's own time."""
    times = []
    if device.type == "cpu":
        for _ in range(repeats + 1):  # the first one warms up
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
    print("instructions: of a warp, per sample of a query and head, when all corners are on the map")
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
    loading, training = measure_speeds(loader, train_on, seconds)
    peak = peak_gib(device)
    images = loader.batch_sampler.images_after(args.epochs * len(loader))
    hours = images / training / 3600
    print(f"{stage} {args.variant} on {args.data}: {args.image_size} pixels, batch {args.batch_size} in "
          f"micro-batches of {args.micro_batch}, {args.workers} loading processes, --amp {args.amp}\n"
          f"{device_name(device)}\n"
          f"training          {training:10.2f} images/s, {args.batch_size / training:.3f} s per batch\n"
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
    tree = pretrain.read_tree(args, train)
    if tree is not None:
        tree = tree.to(device)
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
    try:
        config = replace(VARIANTS[args.variant], structure=args.structure, **changes)
    except ValueError as e:
        raise InputError(str(e)) from None
    model = model_class(config, num_classes).train()
    if args.layout == "released":
        released.released_layout(model)
    model.encoder.checkpointing = args.activation_checkpointing
    return model


def measure_speeds(loader: DataLoader, train_on: Callable, seconds: float) -> tuple[float, float]:
    """Returns the images per second of the loader alone and of training on its batches."""
    def repeat_epochs() -> Iterator:
        while True:
            yield from loader

    def load_only(batch: list) -> None:
        pass

    batches = repeat_epochs()
    images_per_second(batches, train_on, 0)  # compiles, and allocates memory
    # The loading processes work ahead. Their batches have queued up during these slow steps. If the
    # clock started now, it would count these batches, but not the time of loading them. That gives too
    # many images per second where loading is slower than training. So they are thrown away first. So is
    # one more: the processes may work in step, and the clock has to start and stop at the same place.
    for _ in range((loader.prefetch_factor or 0) * loader.num_workers + 1):
        next(batches)
    loading = images_per_second(batches, load_only, seconds)
    # The queue is empty now. If loading is slower than training, it stays empty. If not, it fills again
    # during some steps that do not count. Either way, the clock then starts as in the middle of a run.
    images_per_second(batches, train_on, seconds / 3)
    return loading, images_per_second(batches, train_on, seconds)


def images_per_second(batches: Iterator, use: Callable, seconds: float) -> float:
    """Calls use(batch) for so many seconds, at least twice. (A train_step waits for the GPU itself.)"""
    start, images, steps = time.perf_counter(), 0, 0
    while steps < 2 or time.perf_counter() - start < seconds:
        batch = next(batches)
        use(batch)
        steps += 1
        if torch.is_tensor(batch[0]):  # pretrain.py's [images, labels]
            images += len(batch[0])
        else:  # finetune.py's [(images, mask, targets), ...]
            images += sum(len(part) for part, _, _ in batch)
    return images / (time.perf_counter() - start)


# ------------------------------------------------------------------------------------------------ hours

A100_FLOPS = 312e12  # its peak in bfloat16, per second
UTILISATION = 0.25   # the part of the peak that training reaches: our assumption


def print_hours() -> None:
    """Prints FLOP and A100 hours of the paper's experiments, and the memory of a training step."""
    sizes = {variant: VARIANTS[variant] for variant in ("lite", "small", "base")}
    decoder = replace(VARIANTS["lite"], structure="encoder-decoder", adaptor="none")
    decoders = {f"FP-EncDec, class tokens: {n}": replace(decoder, class_tokens=n) for n in (1, 300)}
    # (height, width), images, and forward passes over each image. A training step counts as three: its
    # backward pass takes two.
    imagenet = Classifier, (224, 224), 1_281_167, 3 * 300
    imagenet_21k = Classifier, (224, 224), 11_060_223, 3 * 80
    coco = Detector, (800, 1333), 118_287, 3 * 50
    coco_c = Detector, (800, 1333), 5_000, 1 + 15 * 5  # clean, and 15 corruptions at 5 severities
    cityscapes = Detector, (667, 1333), 2_975, 5 * 3 * 50  # 1024 x 2048 pixels, resized to at most 1333
    rows = []
    for name, configs, (model_class, size, images, passes) in (
            ("ImageNet-1k", sizes | decoders, imagenet),
            ("ImageNet-21k-P of winter21", sizes, imagenet_21k),
            ("COCO", sizes | {"FP-EncDec": decoder}, coco),
            ("COCO-C", sizes, coco_c),
            ("Cityscapes, five seeds", sizes, cityscapes)):
        for variant, config in configs.items():
            flops = forward_flops(model_class, config, size)
            hours = flops * images * passes / (A100_FLOPS * UTILISATION) / 3600
            rows.append((f"{name}, {variant}", (f"{size[0]} x {size[1]}", f"{flops / 1e9:.1f}",
                                                f"{images:,}", passes, hours)))
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=engine.Help)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
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
    if args.command in ("finetune", "pretrain"):
        return measure_training(args.command, others, args.seconds)
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if args.command == "hours":
        return print_hours()
    if args.command == "kernel":
        return print_kernel()
    measure_operator(engine.setup(args), args.repeats)


if __name__ == "__main__":
    engine.run_script(main)
