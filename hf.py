"""Other detectors, so that most other rows of Tables 2 and 4 come from the same data and metric: DETR,
Conditional DETR, Deformable DETR and YOLOS of the `transformers` package, which is optional.

    python evaluate.py --model hf:facebook/detr-resnet-50 --data coco --corruptions all
    python hf.py --benchmark        the speed of FP-DETR-Lite and of Deformable DETR R50, side by side

Their preprocessing is ours: short side 800, long side at most 1333, ImageNet's mean and deviation.
"""
import argparse
import importlib.metadata
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

import engine
import finetune
from inference import best_boxes
from model import VARIANTS, Detector, InputError
from report import markdown

# These have a sigmoid per class, as FP-DETR has; all others a softmax with "no object" as the last class.
SIGMOID = ("conditional_detr", "deformable_detr")


class HuggingFaceDetector(nn.Module):
    """A detector of `transformers` with the interface of model.Detector.

    Args:
        detector: any of its models for object detection. classes: the data set's class names in our order,
            which must be names of the detector's, whose other outputs ("N/A" in COCO's gaps) are left out;
            None: all of the detector's own.
    """

    def __init__(self, detector: nn.Module, classes: list[str] | None = None):
        super().__init__()
        self.detector = detector
        index_of = {name: i for i, name in detector.config.id2label.items()}
        self.classes = list(index_of) if classes is None else classes
        missing = [c for c in self.classes if c not in index_of]
        if missing:
            raise InputError(f"the detector knows no class {missing[0]!r} of this data set: evaluate it on "
                             f"the data that it was trained for")
        self.columns = [index_of[c] for c in self.classes]

    def forward(self, images: Tensor, padding_mask: Tensor | None = None) -> dict[str, Tensor]:
        """As model.Detector: images (B, 3, H, W), padding_mask (B, H, W) or None -> {"pred_logits":
        (B, Q, K), "pred_boxes": (B, Q, 4) cxcywh in [0, 1] of the unpadded image}; sigmoid(logit) is the
        score."""
        # YOLOS takes no mask: its batches must hold one image each.
        mask = {} if padding_mask is None else {"pixel_mask": (~padding_mask).long()}
        out = self.detector(pixel_values=images, **mask)
        logits = out.logits.float()
        if self.detector.config.model_type not in SIGMOID:
            # A query has one class here, the most probable one that is not "no object".
            p = logits.softmax(-1)[..., :-1]
            best = p == p.amax(-1, keepdim=True)
            logits = torch.where(best, p, 0).clamp(1e-9, 1 - 1e-6).logit()
        return {"pred_logits": logits[..., self.columns], "pred_boxes": out.pred_boxes.float()}


def load_hugging_face(name: str, classes: list[str] | None = None) -> HuggingFaceDetector:
    """The detector that transformers' hub or a local folder calls `name`, in eval mode. Raises InputError if
    it cannot be had."""
    try:
        from transformers import AutoModelForObjectDetection
    except ImportError:
        raise InputError("--model hf:NAME needs transformers: pip install transformers") from None
    try:
        detector = AutoModelForObjectDetection.from_pretrained(name)
    except Exception as e:  # the hub's dozen kinds of error: no such name, no network, not a detector
        raise InputError(f"transformers cannot load {name}: {' '.join(str(e).split())[:200]}") from None
    return HuggingFaceDetector(detector, classes).eval()


# -------------------------------------------------------------------------------------- speed, side by side

def deformable_detr(dropout: float) -> nn.Module:
    """Deformable DETR R50 of transformers, 80 classes, random weights: nothing is downloaded. Raises
    InputError where transformers is missing."""
    try:
        from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig
    except ImportError:
        raise InputError("--benchmark needs transformers: pip install transformers") from None
    backbone = ResNetConfig(out_features=["stage2", "stage3", "stage4"])  # all else is ResNet-50 by default
    # auxiliary_loss: each of its six decoder layers is supervised, as each of our last six layers is.
    config = DeformableDetrConfig(num_labels=80, dropout=dropout, auxiliary_loss=True, backbone=None,
                                  backbone_config=backbone, use_timm_backbone=False,
                                  use_pretrained_backbone=False)
    return unfreeze_backbone(DeformableDetrForObjectDetection(config))


def unfreeze_backbone(detector: nn.Module) -> nn.Module:
    """Lets the backbone of a Deformable DETR learn as in its paper: all but the stem and the first stage.

    So does transformers with a backbone of timm. With its own ResNet (5.23, DeformableDetrConvEncoder), it
    freezes each parameter whose name lacks "stage.1", "stage.2" and "stage.3", but they are called
    "encoder.stages.1. ...": all 53 are frozen. Norms have none, their statistics are constants."""
    for name, p in detector.model.backbone.named_parameters():
        p.requires_grad_(any(f"encoder.stages.{i}." in name for i in (1, 2, 3)))
    return detector


def random_batch(classes: int, size: tuple[int, int], device: torch.device) -> tuple[Tensor, list[dict]]:
    """Two images (2, 3, *size) and, as finetune.match takes them, five objects in each."""
    boxes = torch.cat([0.3 + 0.4 * torch.rand(2, 5, 2), 0.1 + 0.4 * torch.rand(2, 5, 2)], 2).to(device)
    labels = torch.randint(classes, (2, 5)).to(device)
    return torch.randn(2, 3, *size).to(device), [{"labels": l, "boxes": b} for l, b in zip(labels, boxes)]


def alternate(ours: Callable, theirs: Callable, repeats: int, device: torch.device) -> tuple[float, float]:
    """Median seconds of a call of each. They take turns: what else the machine does slows down both."""
    times = []
    for run in (ours, theirs) * (repeats + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2::2]), statistics.median(times[3::2])  # the first call of each warms up


def benchmark(ours: Detector, theirs: nn.Module, args: argparse.Namespace, device: torch.device,
              train_size: tuple[int, int] = (256, 256),
              detect_size: tuple[int, int] = (480, 640)) -> dict[str, tuple[float, float]]:
    """{what: median seconds (ours, theirs)} of a training step on two images of `train_size` (h, w) with the
    same objects (forward, matching, loss, backward, clipping, AdamW) and of the 100 best boxes of one image
    of `detect_size`. theirs: a Deformable DETR of transformers; args: repeats, amp, clip."""
    ours, theirs = ours.to(device).train(), theirs.to(device).train()
    images, targets = random_batch(theirs.config.num_labels, train_size, device)
    labels = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]
    our_optimizer, their_optimizer = (torch.optim.AdamW(m.parameters(), lr=1e-4) for m in (ours, theirs))

    def our_step():
        finetune.train_step(ours, our_optimizer, [(images, None, targets)], args, device)

    def their_step():
        their_optimizer.zero_grad(set_to_none=True)
        theirs(pixel_values=images, labels=labels).loss.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), args.clip)
        their_optimizer.step()
    training = alternate(our_step, their_step, args.repeats, device)

    image = torch.randn(1, 3, *detect_size, device=device)
    runs = (lambda m=m: best_boxes(m(image), [detect_size[::-1]])
            for m in (ours.eval(), HuggingFaceDetector(theirs).eval()))
    with torch.no_grad():
        detection = alternate(*runs, args.repeats, device)
    return {f"training step, 2 x 3 x {train_size[0]} x {train_size[1]}": training,
            f"detection, 3 x {detect_size[0]} x {detect_size[1]}": detection}


def main() -> None:
    parser = argparse.ArgumentParser(description="Times FP-DETR-Lite and Deformable DETR R50 of transformers"
                                     ", random weights, 80 classes, float32, side by side on this machine.")
    parser.add_argument("--benchmark", action="store_true", required=True, help="the only thing to do here")
    parser.add_argument("--device", choices=("cpu", "cuda"),
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=engine.positive, default=10, help="shown is the median of so many")
    parser.add_argument("--dropout", type=engine.fraction, default=0.1, help="of both models in training")
    parser.set_defaults(amp="off", clip=0.1, seed=0)  # what engine and finetune.train_step read
    args = parser.parse_args()
    device = engine.setup(args)
    theirs = deformable_detr(args.dropout)
    ours = Detector(replace(VARIANTS["lite"], dropout=args.dropout), 80)
    print(f"{device.type}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}, "
          f"transformers {importlib.metadata.version('transformers')}, dropout {args.dropout}")
    times = benchmark(ours, theirs, args, device).items()
    rows = [(what, (f"{a:.3f}", f"{b:.3f}", f"{b / a:.2f}")) for what, (a, b) in times]
    print(markdown("median seconds", ("FP-DETR-Lite", "Deformable DETR R50", "ratio"), rows))


if __name__ == "__main__":
    engine.run_script(main)
