"""The released layout against tensors computed by the authors' own code in float64."""

import numpy as np
import pytest
import torch

from released import load_released

LEVELS = range(4)


@pytest.fixture
def golden(shared):
    z = np.load(shared("goldens/golden_detector_a.npz"))
    weights = {k[2:]: torch.from_numpy(z[k]) for k in z.files if k.startswith("w/")}
    return {k: torch.from_numpy(z[k]) for k in z.files if not k.startswith("w/")
            and k != "cfg_json"}, weights


def padding_of(golden):
    mask = torch.ones(golden["image"].shape[0], *golden["image"].shape[-2:], dtype=torch.bool)
    for m, (h, w) in zip(mask, golden["img_hw"].tolist()):
        m[:h, :w] = False
    return mask


@torch.no_grad()
def test_every_activation_matches_the_authors_code(golden):
    golden, weights = golden
    detector = load_released({"meta": {}, "state_dict": weights}, gn_groups=8)
    assert not detector.training and detector.encoder.config.heads == 4
    seen = {}
    for i, layer in enumerate(detector.encoder.layers):
        layer.register_forward_hook(lambda m, x, y, i=i: seen.__setitem__(f"layer{i}", y))
    for i, norm in enumerate(detector.encoder.tokenizer.out_norms):
        norm.register_forward_hook(
            lambda m, x, y, i=i: seen.__setitem__(f"tokenizer_lvl{i}", y.permute(0, 3, 1, 2)))
    for i, norm in enumerate(detector.encoder.tokenizer.group_norms):
        norm.register_forward_hook(lambda m, x, y, i=i: seen.__setitem__(f"neck_lvl{i}", y))
    detector.adaptor.norms[0].register_forward_pre_hook(
        lambda m, x: seen.__setitem__("adapted", seen.get("adapted", x[0])))
    mask = padding_of(golden)
    outputs = detector(golden["image"], mask)
    levels = [*outputs["aux_outputs"], outputs]
    assert len(levels) == 6
    for got, logits, boxes in zip(levels, golden["out/cls_logits"], golden["out/boxes_cxcywh"]):
        torch.testing.assert_close(got["pred_logits"], logits, rtol=0, atol=1e-9)
        torch.testing.assert_close(got["pred_boxes"], boxes, rtol=0, atol=1e-9)

    def close(mine, name):
        torch.testing.assert_close(mine, golden["inter/" + name], rtol=0, atol=1e-9)
    for i in range(3):
        close(seen[f"tokenizer_lvl{i}"], f"tokenizer_lvl{i}")
    for i in LEVELS:
        close(seen[f"neck_lvl{i}"], f"neck_lvl{i}")
    close(seen["layer5"], "encoder1_output")
    close(seen["adapted"], "enc2_layer0_after_adaptor_before_norm0")
    queries = golden["out/cls_logits"].shape[2]
    for i in range(5):  # the authors put the queries last
        close(seen[f"layer{6 + i}"].roll(-queries, dims=1), f"enc2_layer{i}")
    # after the last layer, nobody reads the image tokens
    torch.testing.assert_close(seen["layer11"], golden["inter/enc2_layer5"][:, -queries:], rtol=0, atol=1e-9)

    image = detector.encoder.embed(golden["image"], mask)
    assert image.shapes == [tuple(s) for s in golden["inter/spatial_shapes"].tolist()[:4]]
    torch.testing.assert_close(image.valid_ratios, golden["inter/valid_ratios"][:, :4], rtol=0, atol=1e-9)
    n = image.content.shape[1]
    torch.testing.assert_close(image.references, golden["inter/reference_points"][:, :n, :4], rtol=0,
                               atol=1e-9)
    torch.testing.assert_close(image.positions, golden["inter/pos_with_level_and_query"][:, :n], rtol=0,
                               atol=1e-9)
    assert torch.equal(image.padding, golden["inter/query_key_padding_mask"][:, :n])
