"""The released layout against tensors of the authors' own code in float64; the authors' checkpoints."""
from argparse import Namespace

import numpy as np
import pytest
import torch

from engine import InputError, copy_weights, describe_run
from extras.released import load_released, read_checkpoint, released_layout
from model import VARIANTS, Detector


@torch.no_grad()
def test_every_activation_matches_the_authors_code(shared):
    z = np.load(shared("goldens/golden_detector_a.npz"))
    golden = {k: torch.from_numpy(z[k]) for k in z.files if k != "cfg_json"}
    weights = {k[2:]: golden.pop(k) for k in list(golden) if k.startswith("w/")}
    detector = load_released({"meta": {}, "state_dict": weights}, gn_groups=8)
    assert not detector.training and detector.encoder.config.heads == 4
    seen, tokenizer = {}, detector.encoder.tokenizer
    for name, modules in (("layer", detector.encoder.layers), ("tokenizer_lvl", tokenizer.out_norms),
                          ("neck_lvl", tokenizer.group_norms)):
        for i, module in enumerate(modules):
            module.register_forward_hook(lambda m, x, y, key=f"{name}{i}": seen.update({key: y}))
    detector.adaptor.norms[0].register_forward_pre_hook(  # first it sees the queries, then the image
        lambda m, x: seen.update(adapted=seen.get("adapted", x[0])))
    mask = torch.ones(golden["image"].shape[0], *golden["image"].shape[-2:], dtype=torch.bool)
    for m, (h, w) in zip(mask, golden["img_hw"].tolist()):
        m[:h, :w] = False

    def close(got, expected):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    outputs = detector(golden["image"], mask)
    layers = [*outputs["aux_outputs"], outputs]
    close(torch.stack([layer["pred_logits"] for layer in layers]), golden["out/cls_logits"])
    close(torch.stack([layer["pred_boxes"] for layer in layers]), golden["out/boxes_cxcywh"])
    for i in range(3):
        close(seen[f"tokenizer_lvl{i}"].permute(0, 3, 1, 2), golden[f"inter/tokenizer_lvl{i}"])
    for i in range(4):
        close(seen[f"neck_lvl{i}"], golden[f"inter/neck_lvl{i}"])
    close(seen["layer5"], golden["inter/encoder1_output"])
    close(seen["adapted"], golden["inter/enc2_layer0_after_adaptor_before_norm0"])
    queries = golden["out/cls_logits"].shape[2]
    for i in range(5):  # the authors put the queries last
        close(seen[f"layer{6 + i}"].roll(-queries, dims=1), golden[f"inter/enc2_layer{i}"])
    # Nobody reads the image tokens after the last layer.
    close(seen["layer11"], golden["inter/enc2_layer5"][:, -queries:])

    image = detector.encoder.embed(golden["image"], mask)
    n = image.content.shape[1]
    assert image.shapes == [tuple(s) for s in golden["inter/spatial_shapes"].tolist()[:4]]
    close(image.valid_ratios, golden["inter/valid_ratios"][:, :4])
    close(image.references, golden["inter/reference_points"][:, :n, :4])
    close(image.positions, golden["inter/pos_with_level_and_query"][:, :n])
    assert torch.equal(image.padding, golden["inter/query_key_padding_mask"][:, :n])


@pytest.mark.parametrize("variant", ["lite", "small", "base"])
def test_released_checkpoints_of_all_variants_load_and_detect(shared, variant, tmp_path):
    """Random weights under the authors' names and shapes. Lite's list is their own; the other two follow
    from it by the sizes of Table 1."""
    c, state = VARIANTS[variant], {}
    sizes = {256: c.dim, 192: c.tokenizer_dim, 1024: c.mlp_dim, 320: c.heads * 40, 160: c.heads * 20,
             128: c.heads * 16, 768: 3 * c.dim, 512: 2 * c.dim}
    for line in shared("goldens/official_lite_state_dict_keys.tsv").read_text().splitlines():
        key, shape = line.split("\t")
        shape = [int(n) for n in shape.strip("(),").split(",")]
        shape = [c.heads * 32 if n == 256 and i == 0 and "sampling_offsets" in key else sizes.get(n, n)
                 for i, n in enumerate(shape)]
        state[key] = torch.randn(shape, generator=torch.Generator().manual_seed(len(state))) * 0.02
    for key in [k for k in state if "_branches." in k]:  # six names for each tensor of the heads
        before, after = key.split("branches.")
        state[key] = state[f"{before}branches.0{after[1:]}"]
    names = [f"thing {i}" for i in range(80)]
    torch.save({"meta": {"CLASSES": tuple(names)}, "state_dict": state}, tmp_path / "x.pth")
    assert read_checkpoint(tmp_path / "x.pth")["classes"] == names
    detector = load_released(tmp_path / "x.pth")
    assert detector.encoder.config == c and not detector.training
    fresh = released_layout(Detector(VARIANTS["tiny"], 2)).encoder.tokenizer.group_norms
    assert {norm.num_groups for norm in (*fresh, *detector.encoder.tokenizer.group_norms)} == {32}
    with torch.no_grad():
        assert detector(torch.randn(1, 3, 64, 96))["pred_logits"].shape == (1, 300, 80)
    state["bbox_head.cls_branches.3.bias"] = state["bbox_head.cls_branches.3.bias"] + 1
    with pytest.raises(InputError, match="cls_branches.3.bias"):
        load_released(state)


@pytest.mark.parametrize("processed", [False, True])
def test_released_pretraining_checkpoints_give_their_encoder(shared, tmp_path, processed):
    """As trained, or as the authors' script postprocess_ckpt.py leaves them."""
    generator, state = torch.Generator().manual_seed(0), {}
    for line in shared("goldens/implied_pretrain_lite_state_dict_keys.tsv").read_text().splitlines():
        key, shape = line.split("\t")[:2]
        if shape.startswith("("):
            shape = [int(n) for n in shape.strip("(),").split(",")]
            state[key.replace("<i>", "0")] = torch.randn(shape, generator=generator)
    norm2 = "bbox_head.transformer.encoder2.layers.5.norms.1.weight"
    theirs = state[norm2]
    if processed:
        heads = ("reference_points", "cls_branches", "query_embedding")
        state = {k: v for k, v in state.items() if not any(head in k for head in heads)}
        for key in sorted((k for k in state if "encoder2" in k and ".norms." in k), reverse=True):
            before, after = key.split(".norms.")
            state[f"{before}.norms.{int(after[0]) + 1}{after[1:]}"] = state.pop(key)
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "p.pth")
    checkpoint = read_checkpoint(tmp_path / "p.pth")
    assert checkpoint["stage"] == "pretrain"
    detector = released_layout(Detector(VARIANTS["lite"], 80))
    args = Namespace(layout="released")
    description = describe_run(detector, args, "finetune", list("abc"), images=1)
    message = copy_weights(detector, checkpoint, description, "p.pth")
    assert message.endswith("p.pth: encoder; starting fresh: queries, adaptor, class_head, box_head")
    assert torch.equal(detector.encoder.layers[11].norm2.weight, theirs)
    assert torch.equal(detector.encoder.level_embed, state["bbox_head.transformer.level_embeds"])
    with pytest.raises(InputError, match="change --variant, --structure or --layout"):
        copy_weights(detector, checkpoint, {**description, "layout": "paper"}, "p.pth")
