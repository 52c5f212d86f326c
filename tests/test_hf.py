"""Other detectors, small and with random weights, against the post-processing of transformers."""
import json

import pytest
import torch

import evaluate
from engine import InputError
from evaluate import best_boxes
from extras.hf import HuggingFaceDetector, load_hugging_face
from extras.shapes import SHAPES

transformers = pytest.importorskip("transformers", reason="transformers is optional and not installed")

NAMES = {0: "N/A", 1: "person", 2: "bicycle", 3: "car", 4: "N/A"}  # with gaps, like COCO's
CLASSES = {"detr": "Detr", "conditional_detr": "ConditionalDetr", "deformable_detr": "DeformableDetr",
           "yolos": "Yolos"}


def small_detector(kind: str):
    torch.manual_seed(0)
    make_config = getattr(transformers, CLASSES[kind] + "Config")
    if kind == "yolos":
        config = make_config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                             intermediate_size=32, image_size=[64, 96], num_detection_tokens=7,
                             id2label=NAMES)
    else:
        stages = ["stage2", "stage3", "stage4"] if kind == "deformable_detr" else ["stage4"]
        backbone = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16],
                                             depths=[1] * 4, layer_type="basic", out_features=stages)
        config = make_config(backbone_config=backbone, use_timm_backbone=False, backbone=None,
                             use_pretrained_backbone=False, encoder_layers=1, decoder_layers=2,
                             d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=7,
                             encoder_attention_heads=2, decoder_attention_heads=2, id2label=NAMES)
    return getattr(transformers, CLASSES[kind] + "ForObjectDetection")(config).eval()


@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_detections_are_those_of_transformers(kind):
    detector = small_detector(kind)
    for name, p in detector.named_parameters():  # otherwise all queries are alike
        if "backbone" not in name:
            p += 0.3 * torch.randn_like(p)
    ours = HuggingFaceDetector(detector, ["person", "bicycle", "car"])
    images = torch.randn(1, 3, 64, 96)
    found = best_boxes(ours(images), [(192, 128)])[0]

    processor = getattr(transformers, CLASSES[kind] + "ImageProcessor")()
    more = {} if kind in ("detr", "yolos") else {"top_k": 35}
    theirs = processor.post_process_object_detection(detector(pixel_values=images), threshold=0,
                                                     target_sizes=[(128, 192)], **more)[0]
    order = theirs["scores"].argsort(descending=True).tolist()
    named = [i for i in order if 1 <= theirs["labels"][i] <= 3]
    assert len(named) > 3
    found = {k: v[:len(named)] for k, v in found.items()}  # ours go on with scores of 1e-9
    torch.testing.assert_close(found["scores"], theirs["scores"][named], atol=1e-5, rtol=1e-4)
    assert (found["labels"] + 1).tolist() == theirs["labels"][named].tolist()
    size = torch.tensor([192, 128, 192, 128])
    expected = theirs["boxes"][named].clamp(min=0).minimum(size)
    torch.testing.assert_close(found["boxes"], expected, atol=1e-3, rtol=1e-4)


def test_classes_and_folders(tmp_path):
    detector = small_detector("detr")
    assert HuggingFaceDetector(detector).classes == list(dict.fromkeys(NAMES.values()))
    with pytest.raises(InputError, match="no class 'unicorn'"):
        HuggingFaceDetector(detector, ["person", "unicorn"])
    detector.save_pretrained(tmp_path / "detr")
    assert load_hugging_face(str(tmp_path / "detr"), ["car"]).classes == ["car"]
    with pytest.raises(InputError, match="cannot load"):
        load_hugging_face(str(tmp_path / "none"), ["car"])


def test_the_command_evaluates_it_like_any_detector(tmp_path, monkeypatch):
    """`--model hf:FOLDER` writes the files of an evaluation, on clean and on corrupted pictures."""
    detector = small_detector("detr")
    detector.config.id2label = {0: "N/A", **dict(enumerate(SHAPES, 1))}
    detector.class_labels_classifier = torch.nn.Linear(32, 10)  # eight kinds, N/A and "no object"
    detector.config.num_labels = 9
    detector.save_pretrained(tmp_path / "detr")
    command = ["evaluate.py", "--model", f"hf:{tmp_path / 'detr'}", "--data", "shapes",
               "--image-size", "64", "--limit-val", "3", "--workers", "0", "--device", "cpu"]
    monkeypatch.chdir(tmp_path)
    for more, name in (([], "results.json"), (["--corruptions", "fog", "--severities", "1"],
                                              "corruptions.json")):
        monkeypatch.setattr("sys.argv", command + more)
        evaluate.main()
        assert len(list(tmp_path.glob(f"runs/*/evaluation/{name}"))) == 1
    results = next(tmp_path.glob("runs/*/evaluation/results.json"))
    assert len(json.loads(results.read_text())) == 3 * 7 * 8
