"""Other detectors, small and with random weights, against transformers' own post-processing."""
import json
from argparse import Namespace

import pytest
import torch

import evaluate
from inference import best_boxes
from model import VARIANTS, Detector, InputError
from shapes import SHAPES

transformers = pytest.importorskip("transformers", reason="transformers is optional and not installed")

from hf import HuggingFaceDetector, benchmark, load_hugging_face, unfreeze_backbone  # noqa: E402

NAMES = {0: "N/A", 1: "person", 2: "bicycle", 3: "car", 4: "N/A"}  # as COCO's, with gaps
SMALL = dict(encoder_layers=1, decoder_layers=2, d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32,
             encoder_attention_heads=2, decoder_attention_heads=2, num_queries=7)


def small_detector(kind: str):
    torch.manual_seed(0)
    resnet = dict(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None)
    backbone = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1],
                                         layer_type="basic", out_features=["stage4"])
    if kind == "yolos":
        config = transformers.YolosConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                          intermediate_size=32, image_size=[64, 96], num_detection_tokens=7,
                                          id2label=NAMES)
        return transformers.YolosForObjectDetection(config).eval()
    if kind == "deformable_detr":
        backbone.out_features = ["stage2", "stage3", "stage4"]
    classes = {"detr": "Detr", "conditional_detr": "ConditionalDetr", "deformable_detr": "DeformableDetr"}
    make_config = getattr(transformers, classes[kind] + "Config")
    config = make_config(backbone_config=backbone, id2label=NAMES, **SMALL, **resnet)
    return getattr(transformers, classes[kind] + "ForObjectDetection")(config).eval()


@pytest.mark.parametrize("kind", ["detr", "conditional_detr", "deformable_detr", "yolos"])
@torch.no_grad()
def test_detections_are_those_of_transformers(kind):
    detector = small_detector(kind)
    for name, p in detector.named_parameters():  # else all queries say the same
        if "backbone" not in name:
            p += 0.3 * torch.randn_like(p)
    ours = HuggingFaceDetector(detector, ["person", "bicycle", "car"])
    images = torch.randn(1, 3, 64, 96)
    found = best_boxes(ours(images), [(192, 128)])[0]
    processor = {"detr": transformers.DetrImageProcessor, "yolos": transformers.YolosImageProcessor,
                 "conditional_detr": transformers.ConditionalDetrImageProcessor,
                 "deformable_detr": transformers.DeformableDetrImageProcessor}[kind]()
    more = {} if kind in ("detr", "yolos") else {"top_k": 35}
    theirs = processor.post_process_object_detection(detector(pixel_values=images), threshold=0,
                                                     target_sizes=[(128, 192)], **more)[0]
    named = [i for i in theirs["scores"].argsort(descending=True).tolist() if 1 <= theirs["labels"][i] <= 3]
    assert len(named) > 3
    best = {k: v[:len(named)] for k, v in found.items()}  # what we add below has a score of 1e-9
    torch.testing.assert_close(best["scores"], theirs["scores"][named], atol=1e-5, rtol=1e-4)
    assert (best["labels"] + 1).tolist() == theirs["labels"][named].tolist()
    size = torch.tensor([192, 128, 192, 128])
    expected = theirs["boxes"][named].clamp(min=0).minimum(size)
    torch.testing.assert_close(best["boxes"], expected, atol=1e-3, rtol=1e-4)


def test_own_classes_and_foreign_data():
    detector = small_detector("detr")
    assert HuggingFaceDetector(detector).classes == list(dict.fromkeys(NAMES.values()))
    with pytest.raises(InputError, match="no class 'unicorn'"):
        HuggingFaceDetector(detector, ["person", "unicorn"])


def test_a_folder_is_loaded_and_nonsense_is_refused(tmp_path):
    small_detector("detr").save_pretrained(tmp_path / "detr")
    assert load_hugging_face(str(tmp_path / "detr"), ["car"]).classes == ["car"]
    with pytest.raises(InputError, match="cannot load"):
        load_hugging_face(str(tmp_path / "none"), ["car"])


def test_the_command_scores_it_like_any_detector(tmp_path, monkeypatch):
    """`--model hf:FOLDER` on clean and corrupted pictures leaves the files of an evaluation."""
    detector = small_detector("detr")
    detector.config.id2label = {0: "N/A", **dict(enumerate(SHAPES, 1))}
    detector.class_labels_classifier = torch.nn.Linear(32, 10)  # eight kinds, N/A and no object
    detector.config.num_labels = 9
    detector.save_pretrained(tmp_path / "detr")
    command = ["evaluate.py", "--model", f"hf:{tmp_path / 'detr'}", "--data", "shapes", "--image-size", "64",
               "--limit-val", "3", "--workers", "0", "--device", "cpu"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", command)
    evaluate.main()
    found = list(tmp_path.glob("runs/*/evaluation/results.json"))
    assert len(found) == 1 and len(json.loads(found[0].read_text())) == 3 * 7 * 8
    monkeypatch.setattr("sys.argv", [*command, "--corruptions", "fog", "--severities", "1"])
    evaluate.main()
    assert (found[0].parent / "corruptions.json").exists()


def test_the_benchmark_trains_the_backbone_that_deformable_detr_trains():
    """Its paper's code trains the last three of a ResNet's four stages; a frozen backbone would be timed as
    faster than it is."""
    theirs = unfreeze_backbone(small_detector("deformable_detr"))
    ours = Detector(VARIANTS["tiny"], len(NAMES))
    before = {name: p.detach().clone() for name, p in theirs.model.backbone.named_parameters()}
    args = Namespace(repeats=1, amp="off", clip=0.1)
    times = benchmark(ours, theirs, args, torch.device("cpu"), train_size=(64, 64), detect_size=(64, 96))
    assert len(times) == 2 and all(len(pair) == 2 and min(pair) > 0 for pair in times.values())
    assert all(p.grad.any() for p in ours.encoder.tokenizer.convs.parameters())
    learns = {name: p.grad is not None and bool(p.grad.any()) and not torch.equal(p, before[name])
              for name, p in theirs.model.backbone.named_parameters()}
    stages = {i: [on for name, on in learns.items() if f".stages.{i}." in name] for i in range(4)}
    assert all(stages.values()) and not any(stages[0]) and all(stages[1] + stages[2] + stages[3])
    assert sum(learns.values()) == sum(len(stages[i]) for i in (1, 2, 3))  # the stem does not
