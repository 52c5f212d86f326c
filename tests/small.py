"""Small models of a few hundred parameters in float64, and runs of the real main() with them. They record
what reaches the model."""
import copy
import sys

import torch
from PIL import Image
from torch import nn

import finetune
import pretrain
from data import ClassificationSet, DetectionSet, classification_set, detection_set
from extras import pictures

CLASSES, IMAGES = 8, 5
record = []  # what the small models and the sets have seen, in order
drawn = {}  # function of extras/pictures.py -> the arguments of its last call


class SmallEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.checkpointing = config, None
        self.tokenizer = nn.ModuleDict({"convs": nn.Conv2d(3, 4, 16, 16), "norms": nn.LayerNorm(4)})
        self.level_embed = nn.Parameter(torch.randn(2, 2))
        self.sampling_offsets = nn.Linear(4, 4)

    def forward(self, images):
        record.append(("model", images.clone(), self.training, torch.rand(1).item(),
                       torch.is_autocast_enabled("cpu"), self.checkpointing))
        x = self.tokenizer["convs"](images.double()).flatten(2).transpose(1, 2)
        x = self.tokenizer["norms"](x + self.level_embed.flatten()).relu().mean(1)  # (B, 4)
        return x, x + self.sampling_offsets(x).tanh()


class SmallDetector(nn.Module):
    """A few hundred parameters, with the names that the recipe knows, and one auxiliary layer."""

    def __init__(self, config, num_classes):
        super().__init__()
        self.encoder = SmallEncoder(config)
        self.queries = nn.Parameter(torch.randn(config.queries, 4))
        self.class_head, self.box_head = nn.Linear(4, num_classes), nn.Linear(4, 4)
        self.double()

    def forward(self, images, padding_mask=None):
        layers = []
        for x in self.encoder(images):
            x = (x[:, None] + self.queries).tanh()
            layers.append({"pred_logits": self.class_head(x), "pred_boxes": self.box_head(x).sigmoid()})
        return {**layers[1], "aux_outputs": layers[:1]}


class SmallClassifier(nn.Module):
    def __init__(self, config, num_classes):
        super().__init__()
        self.encoder = SmallEncoder(config)
        self.class_token = nn.ParameterDict({"content": torch.randn(1, 4)})
        self.class_head = nn.Linear(4, num_classes)
        self.double()

    def forward(self, images):
        return self.class_head(self.encoder(images)[1] + self.class_token["content"])


def run(stage, tmp_path, monkeypatch, flags, scores=None):
    """Runs main(). Returns the model as it started, last.pt and best.pt. scores: of the evaluations, in
    place of the true ones."""
    kind, read = ((DetectionSet, detection_set) if stage is finetune else
                  (ClassificationSet, classification_set))
    started, record[:] = [], []
    drawn.clear()

    class Recorded(kind):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            record.append((self.name.split()[-1], self.epoch, index % len(self), item))
            return item

    def read_data(**flags):
        dataset = read(**flags)
        dataset.__class__ = Recorded
        return dataset

    def build(config, num_classes):
        model = (SmallDetector if stage is finetune else SmallClassifier)(config, num_classes)
        started.append(copy.deepcopy(model))
        return model
    given = scores is not None
    scores = iter(scores or [])
    if given and stage is finetune:
        monkeypatch.setattr(finetune, "coco_metrics", lambda *_: {"AP": next(scores), "AP50": 0.5})
    elif given:
        monkeypatch.setattr(pretrain, "evaluate", lambda model, *_: model.eval() and {"top1": next(scores)})
    for name in ("training_sheet", "draw_curves", "results_sheet", "predictions_sheet"):
        spy = lambda *given, name=name: drawn.update({name: given}) or Image.new("RGB", (8, 8))
        monkeypatch.setattr(pictures, name, spy)
    monkeypatch.setattr(torch, "compile", lambda model: record.append(("compiled",)) or model)
    usual = f"--limit-train {IMAGES} --limit-val 2 --device cpu --out {tmp_path}/run"
    monkeypatch.setattr(sys, "argv", [stage.__name__, *usual.split(), *flags.split()])
    stage.main(read_data=read_data, **{"detector" if stage is finetune else "classifier": build})
    return started[0], *(torch.load(tmp_path / "run" / f"{name}.pt", weights_only=True)
                         for name in ("last", "best"))
