"""Other detectors, so that most other rows of Tables 2 and 4 come from the same data and metric: DETR,
Conditional DETR, Deformable DETR and YOLOS of the `transformers` package, which is optional.

    python evaluate.py --model hf:facebook/detr-resnet-50 --data coco --corruptions all

Their preprocessing is ours: short side 800, long side at most 1333, ImageNet's mean and deviation.
"""
import torch
from torch import Tensor, nn

from engine import InputError, one_line

# These have a sigmoid per class, as FP-DETR has; all others a softmax
# with "no object" as the last class.
SIGMOID = ("conditional_detr", "deformable_detr")


class HuggingFaceDetector(nn.Module):
    """A detector of `transformers` with the interface of model.Detector.

    Args:
        detector: any of its models for object detection.
        classes: the data set's class names in our order. The detector must know each of them; its other
            outputs ("N/A" in COCO's gaps) are left out. None: all of the detector's own.
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
        """As model.Detector: images (B, 3, H, W), padding_mask (B, H, W) or None ->
        {"pred_logits": (B, Q, K), "pred_boxes": (B, Q, 4) cxcywh in [0, 1] of the
        unpadded image}; sigmoid(logit) is the score."""
        # YOLOS takes no mask. Evaluate it with one image per batch, the default.
        mask = {} if padding_mask is None else {"pixel_mask": (~padding_mask).long()}
        out = self.detector(pixel_values=images, **mask)
        logits = out.logits.float()
        if self.detector.config.model_type not in SIGMOID:
            # A query has one class: the most probable one except "no object".
            p = logits.softmax(-1)[..., :-1]
            best = p == p.amax(-1, keepdim=True)
            logits = torch.where(best, p, 0).clamp(1e-9, 1 - 1e-6).logit()
        return {"pred_logits": logits[..., self.columns], "pred_boxes": out.pred_boxes.float()}


def load_hugging_face(name: str, classes: list[str] | None = None) -> HuggingFaceDetector:
    """The detector with this name on transformers' hub or in a local folder, in eval mode. InputError
    if it cannot be loaded."""
    try:
        from transformers import AutoModelForObjectDetection
    except ImportError:
        raise InputError("--model hf:NAME needs transformers: pip install transformers") from None
    try:
        detector = AutoModelForObjectDetection.from_pretrained(name)
    except Exception as e:  # the hub's dozen kinds of error: no such name, no network, not a detector
        raise InputError(f"transformers cannot load {name}: {one_line(e)}") from None
    return HuggingFaceDetector(detector, classes).eval()
