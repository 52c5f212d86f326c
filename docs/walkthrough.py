# %% [markdown]
# # FP-DETR along one picture
# This walk follows the paper along one picture of the generated data, and along a photograph if you
# give one. Each step prints a few numbers and leaves a slide.
#
# First run `python pretrain.py` and `python finetune.py`. Then, as a script:
# `python docs/walkthrough.py photo.jpg`. As a notebook: open this file in an editor that knows cells
# (VS Code, PyCharm, Spyder, jupytext).

# %%
import argparse
import itertools
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch

# The project's folder is above this file. A plain notebook does not know its file, but runs beside it.
sys.path.insert(0, str(Path(globals().get("__file__", "walkthrough.py")).resolve().parent.parent))
import engine
from data import EMBEDDED_SETS, corners, detection_set, read_image, to_tensor
from evaluate import best_boxes, coco_metrics, detect, load_detector, make_folder, resize_to_test
from extras import tables
from extras.pictures import STRIDE_COLOURS, WatchSampling, draw_samples
from extras.pictures import draw_table, keep_slide, new_slide, outline, show
from finetune import CLASS_WEIGHT, FOCAL_ALPHA, GIOU_WEIGHT, L1_WEIGHT, detection_loss, match
from model import Classifier, Config, Detector, pad_to_multiple, sine_positions

PHOTOGRAPH = None  # in a notebook: the path of a photograph

runs = Path(engine.__file__).parent / "runs"
parser = argparse.ArgumentParser(description="The paper along one picture: a slide for each step.")
parser.add_argument("photograph", nargs="?", default=PHOTOGRAPH)
parser.add_argument("--classifier", type=Path, default=runs / "pretrain-tiny-shapes" / "last.pt")
parser.add_argument("--detector", type=Path, default=runs / "finetune-tiny-shapes" / "last.pt")
parser.add_argument("--out", type=Path, default=runs / "walkthrough", help="folder of the slides")
is_script = Path(sys.argv[0]).name == "walkthrough.py"
if is_script:
    os.environ["MPLBACKEND"] = "agg"  # a notebook names one that only works inside of it
args = parser.parse_args(None if is_script else [])

try:
    for path, program in ((args.classifier, "pretrain.py"), (args.detector, "finetune.py")):
        if not path.exists():
            raise engine.InputError(f"{path} is missing: python {program} makes it")
    pretrained = engine.load_checkpoint(args.classifier)
    detector, finetuned = load_detector(args.detector)
    trained = finetuned.get("args", {})  # the flags of the training
    if pretrained.get("stage") != "pretrain" or pretrained["layout"] != "paper":
        raise engine.InputError(f"{args.classifier} is no classifier in the paper's layout")
    if trained.get("data") not in EMBEDDED_SETS or trained["adaptor"] != "self-attention":
        raise engine.InputError(f"{args.detector}: train it on shapes, with self-attention as adaptor")
    photograph = read_image(args.photograph) if args.photograph else None
    make_folder(args.out)
except engine.InputError as e:
    print("error:", e, file=sys.stderr)
    sys.exit(2)

torch.set_grad_enabled(False)
classifier = Classifier(Config(**pretrained["config"]), len(pretrained["classes"])).eval()
classifier.load_state_dict(pretrained["model"])
config, classes = detector.encoder.config, finetuned["classes"]
FOUND, OTHER = "#3ddc97", "#ff7f2a"  # colours of found boxes and of queries
NONE = "no photograph: this cell is skipped\n"

# %% [markdown]
# ## The picture
# The walk takes the validation picture with two objects that has the smallest loss.

# %%
val = detection_set(trained["data"], "val", image_size=trained["image_size"])


def loss_of(index):
    pixels, target = val[index]
    return sum(detection_loss(detector(pixels[None]), [target]).values())


with_two = [index for index, record in enumerate(val.records) if len(record.labels) == 2]
chosen = min(with_two, key=loss_of)
picture = val.records[chosen].image()
pixels, target = val[chosen]  # (3, H, W); {"labels": (2,), "boxes": (2, 4)}
names = [classes[label] for label in target["labels"]]
size = torch.tensor(picture.size * 2)  # (4,), from [0, 1] to pixels
print(f"validation picture {chosen}: {' and '.join(names)}\n")

# %% [markdown]
# ## 1. Image tokens (Sections 3.1, 3.2 and A.1, Table 6)
# A simple multi-scale tokenizer replaces the backbone: four convolutions in a chain. Their patches do
# not overlap. The feature maps of the four levels are flattened to a sequence of N tokens. The slide
# shows each patch in its mean colour.


# %%
def tokens_slide(picture, name):
    images, mask = pad_to_multiple(to_tensor(picture)[None], None, detector.encoder.tokenizer.multiple)
    tokens = detector.encoder.embed(images, mask)
    figure, axes = new_slide("1  One token for each patch of a level (3.2, Table 6)", 2, 3)
    show(axes[0, 0], picture, f"{picture.height} x {picture.width} pixels")
    for level, (h, w) in enumerate(tokens.shapes):
        stride = 8 << level
        show(axes.flat[level + 1], picture.reduce(stride), f"stride {stride}: {h} x {w}")
        print(f"level {level + 1}, stride {stride}: {h} x {w} tokens")
    sequence = f"N = {tokens.content.shape[1]:,} tokens\nof {config.dim} channels"
    print(sequence)
    axes[1, 2].text(0.5, 0.5, sequence, ha="center", va="center", size=26)
    axes[1, 2].axis("off")
    return keep_slide(figure, args.out / f"{name}.png")


tokens_slide(picture, "1-tokens")

# %% The photograph at the size of an evaluation on COCO: 800 pixels on the short side.
tokens_slide(resize_to_test(photograph, 800), "1-tokens-photograph") if photograph else print(NONE)

# %% [markdown]
# ## 2. Positions (Section 3.1)
# Position and level embeddings are added to the sequence. The position is a sine embedding. One half
# of its channels encodes the row of a token, the other half the column.

# %%
tokens = detector.encoder.embed(pixels[None], None)
h, w = tokens.shapes[0]
everywhere = torch.ones(1, h, w, dtype=torch.bool)
sine = sine_positions(everywhere, torch.tensor([[w, h]]).float(), config.dim)[0]  # (h, w, D)
torch.testing.assert_close(sine[0, 0] + detector.encoder.level_embed[0], tokens.positions[0, 0])
row, column = h // 4, w // 4
likeness = torch.cosine_similarity(sine, sine[row, column], dim=-1)  # (h, w)
by_hand = math.sin(2 * math.pi * 0.5 / h)
print(f"first channel of the first token: {sine[0, 0, 0]:.4f}")
print(f"by hand, sin(2 pi 0.5 / {h}):      {by_hand:.4f}")
assert math.isclose(sine[0, 0, 0], by_hand, abs_tol=1e-5)

figure, (left, right) = new_slide("2  Sines tell each token its position (3.1)", 1, 2)
left.imshow(sine[0, :, config.dim // 2:][:, :12].T, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
left.set(xlabel="column of the token", ylabel="channel", title="sines and cosines of the column")
right.imshow(likeness, aspect="auto")
right.plot(column, row, "+", color="white", ms=30, mew=5)
right.set(xlabel="column", ylabel="row", title="cosine similarity to the position +")
keep_slide(figure, args.out / "2-positions.png")

# %% [markdown]
# ## 3. Reference points and samples (Sections 3.2 and 3.3)
# The query position embeddings are mapped to reference points. These points tell each query where to
# sample the image. The slide shows the query of the best detection,
# in the first and in the last layer that holds queries.


# %%
def samples_slide(picture, name):
    pixels = to_tensor(resize_to_test(picture, trained["image_size"]))[None]  # (1, 3, H, W)
    with WatchSampling(detector, config.queries) as watch:
        found = best_boxes(detector(pixels), [picture.size])[0]
    query, label, score = (found[k][0].item() for k in ("queries", "labels", "scores"))
    print(f"best detection: {classes[label]} {score:.2f}, of query {query}")
    images, _ = pad_to_multiple(pixels, None, detector.encoder.tokenizer.multiple)
    scale = picture.width / pixels.shape[3]
    padded = (scale * images.shape[3], scale * images.shape[2])  # (width, height) in pixels of picture
    title = f"3  Query {query} samples around its reference point + (3.3)"
    figure, axes = new_slide(title, 1, 2)
    for axis, layer in zip(axes, (config.entry_layer, config.layers)):
        # (Q, 2), (Q, M, L, P, 2), (Q, M, L, P)
        references, locations, weights = watch.layers[layer - config.entry_layer]
        show(axis, picture, f"layer {layer}", pale=True)
        outline(axis, found["boxes"][0], FOUND)
        draw_samples(axis, references[query], locations[query], weights[query], padded, 6)
    M, L, P = weights[query].shape
    print(f"{M} heads x {L} levels x {P} points = {M * L * P} samples in each layer")
    dots = [axes[0].scatter([], [], s=300, color=colour) for colour in STRIDE_COLOURS]
    strides = [f"stride {8 << level}" for level in range(4)]
    figure.legend(dots, strides, loc="outside lower center", ncols=4, frameon=False)
    return keep_slide(figure, args.out / f"{name}.png")


samples_slide(picture, "3-samples")

# %% The detector knows the generated shapes only, so its answer on a photograph means little.
samples_slide(photograph, "3-samples-photograph") if photograph else print(NONE)

# %% [markdown]
# ## 4. The class token's answer (Section 3.2, Eq. 1)
# In pre-training, a class token is concatenated with the image tokens. It aggregates global context.
# It gives one answer for the image, although this image has two objects.

# %%
with WatchSampling(classifier, classifier.encoder.config.class_tokens) as watch:
    probabilities = classifier(pixels[None])[0].softmax(-1)  # (K,)
best = probabilities.topk(min(5, len(probabilities)))
answers = [pretrained["classes"][label] for label in best.indices]
print(", ".join(f"{answer} {p:.2f}" for answer, p in zip(answers, best.values)))

figure, (left, right) = new_slide("4  The class token gives one answer (3.2, Eq. 1)", 1, 2)
references, locations, weights = watch.layers[-1]
show(left, picture, "its samples in the last layer", pale=True)
draw_samples(left, references[0], locations[0], weights[0], picture.size, 6)
right.barh(answers, best.values, color=FOUND)
right.invert_yaxis()
right.set(xlim=(0, 1), title="probability")
keep_slide(figure, args.out / "4-class-token.png")

# %% [markdown]
# ## 5. Queries as prompts (Section 3.3, Eq. 4)
# In fine-tuning, object queries replace the class token. A query's positional embedding is a visual
# prompt: it points out the image region to focus on. Training searches for these prompts. We build
# the detector again with the seed of the training, so the slide shows where the points started.

# %%
torch.manual_seed(trained["seed"])
untrained = Detector(config, len(classes))
before = untrained.queries(1).references[0]  # (Q, 2) as (x, y) in [0, 1]
after = detector.queries(1).references[0]  # (Q, 2)
moved = (after - before).norm(dim=-1)  # (Q,)
print(f"{len(moved)} points moved, by {moved.mean():.2f} of the image on average")

figure, (left, right) = new_slide("5  Training searches for the prompts (3.3, Eq. 4)", 1, 2)
start, end = before * size[:2] - 0.5, after * size[:2] - 0.5  # (Q, 2) in pixels
show(left, picture, "reference points before training", pale=True)
left.scatter(*start.T, s=250, color=OTHER, edgecolor="black")
show(right, picture, "after training, and the way there", pale=True)
right.plot(*torch.stack([start.T, end.T], 1), color="white", lw=4)
right.scatter(*end.T, s=250, color=OTHER, edgecolor="black", zorder=3)
keep_slide(figure, args.out / "5-prompts.png")

# %% [markdown]
# ## 6. The task adaptor's attention (Section 3.3, Eq. 5)
# The task adaptor is self-attention among the queries. It models the relationship between objects. One
# class token cannot learn this in pre-training. The slide shows the weights of the best detection's
# query before the last layer, averaged over the heads.

# %%
calls = []
adaptor = detector.adaptor[-1] if config.adaptor_per_layer else detector.adaptor
hook = adaptor.attention.register_forward_pre_hook(lambda module, inputs: calls.append(inputs))
outputs = detector(pixels[None])
hook.remove()
_, weights = adaptor.attention(*calls[-1])  # (1, Q, Q); each row sums to 1
query = best_boxes(outputs, [picture.size])[0]["queries"][0].item()
strongest = weights[0, query].topk(min(6, config.queries))
others, shares = strongest.indices.tolist(), strongest.values.tolist()
labels = [f"query {other}" if other != query else "itself" for other in others]
print(", ".join(f"{label} {share:.3f}" for label, share in zip(labels, shares)))

figure, (left, right) = new_slide("6  The adaptor relates queries to each other (3.3, Eq. 5)", 1, 2)
predicted = corners(outputs["pred_boxes"][0]).clamp(0, 1) * size  # (Q, 4)
show(left, picture, f"query {query} attends to ...", pale=True)
outline(left, predicted[query], FOUND)
for other, share in zip(others, shares):
    left.plot(*end[[query, other]].T, color=OTHER, lw=60 * share)
left.scatter(*end.T, s=120, color="white", edgecolor="black", zorder=3)
left.scatter(*end[query], s=400, color=FOUND, edgecolor="black", zorder=4)
right.barh(labels, shares, color=OTHER)
right.axvline(1 / config.queries, color="black", ls="--", lw=3)
right.invert_yaxis()
right.set(title="weight; dashed: if all were equal")
keep_slide(figure, args.out / "6-adaptor.png")

# %% [markdown]
# ## 7. Matching queries and objects (Section 4.1; Deformable DETR)
# Detection is a set prediction problem. A query costs little for an object if it scores the class high
# and its box is near. The assignment with the smallest total cost gives one query to each object.

# %%
scores = outputs["pred_logits"][0].double().sigmoid().tolist()  # Q lists of K numbers
boxes, true_boxes = outputs["pred_boxes"][0], target["boxes"]  # (Q, 4) and (2, 4) cxcywh in [0, 1]
true_labels = target["labels"].tolist()


def focal(score, answer):
    """The focal loss of one score for the right answer, 1 or 0."""
    if answer == 1:
        return FOCAL_ALPHA * (1 - score) ** 2 * -math.log(score)
    return (1 - FOCAL_ALPHA) * score ** 2 * -math.log(1 - score)


def iou_and_giou(a, b):
    """IoU and generalised IoU of two boxes: x0, y0, x1, y1."""
    overlap = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return overlap / union, overlap / union - (hull - union) / hull


def l1_and_giou(query, i):
    """How far the box of a query is from object i."""
    l1 = sum(abs(u - v) for u, v in zip(boxes[query].tolist(), true_boxes[i].tolist()))
    return l1, iou_and_giou(corners(boxes[query]).tolist(), corners(true_boxes[i]).tolist())[1]


def cost(query, i):
    """The cost of a query for object i."""
    score = scores[query][true_labels[i]]
    l1, giou = l1_and_giou(query, i)
    return CLASS_WEIGHT * (focal(score, 1) - focal(score, 0)) + L1_WEIGHT * l1 - GIOU_WEIGHT * giou


costs = [[cost(query, 0), cost(query, 1)] for query in range(config.queries)]
smallest = min(a[0] + b[1] for a, b in itertools.permutations(costs, 2))  # tries every pair of queries
queries, objects = match(outputs["pred_logits"], outputs["pred_boxes"], [target])[0]
matched = queries[objects.argsort()].tolist()  # the query of each object
total = costs[matched[0]][0] + costs[matched[1]][1]
assert math.isclose(total, smallest, abs_tol=1e-4)
cheap = sorted(range(config.queries), key=lambda query: min(costs[query]))[:5]
shown = sorted({*matched, *cheap})
rows = [[f"query {query}", *(f"{c:.2f}" for c in costs[query])] for query in shown]
print(tables.markdown("cost", tuple(names), [(row[0], row[1:]) for row in rows]))
print(f"finetune.match: queries {matched}, cost {total:.4f}; the cheapest of all pairs: {smallest:.4f}")


def draw_matches(axis, texts):
    """The boxes of the matched queries, with a text each, and of the objects."""
    show(axis, picture, "dashed: the true boxes", pale=True)
    for query, text, true_box in zip(matched, texts, true_boxes):
        outline(axis, predicted[query], FOUND, text=text)
        outline(axis, corners(true_box) * size, "white", "--")


figure, (left, right) = new_slide("7  The cheapest assignment: one query per object (4.1)", 1, 2)
draw_matches(left, [f"query {query}" for query in matched])
marked = [(shown.index(query), i + 1) for i, query in enumerate(matched)]
draw_table(right, ["cost", *names], rows, marked, FOUND)
keep_slide(figure, args.out / "7-matching.png")

# %% [markdown]
# ## 8. The losses of one image (Section 4.1; Deformable DETR)
# The focal loss asks each query about each class. The L1 and GIoU losses compare the boxes of the
# matched queries with the objects. Each sum is multiplied by its weight and divided by the number of
# matched queries. These are the losses of the last layer.

# %%
focal_sum = 0.0
for query in range(config.queries):
    for label in range(len(classes)):
        is_match = (query, label) in zip(matched, true_labels)
        focal_sum += focal(scores[query][label], 1 if is_match else 0)
l1s, gious = zip(l1_and_giou(matched[0], 0), l1_and_giou(matched[1], 1))
sums = {"loss_class": (focal_sum, CLASS_WEIGHT), "loss_bbox": (sum(l1s), L1_WEIGHT),
        "loss_giou": (2 - sum(gious), GIOU_WEIGHT)}
computed = detection_loss({**outputs, "aux_outputs": []}, [target])
rows = []
for name, (value, weight) in sums.items():
    by_hand = weight * value / len(matched)
    print(f"{name:10} by hand {by_hand:.5f}, by detection_loss {computed[name]:.5f}")
    assert math.isclose(by_hand, computed[name], rel_tol=1e-4, abs_tol=1e-5)
    rows.append([name[5:], f"{value:.3f}", f"{weight * value:.3f}", f"{by_hand:.3f}"])

figure, (left, right) = new_slide("8  The losses of the last layer, by hand (4.1)", 1, 2)
draw_matches(left, [f"GIoU {giou:.2f}" for giou in gious])
draw_table(right, ["loss", "sum", "weighted", "mean"], rows)
keep_slide(figure, args.out / "8-losses.png")

# %% [markdown]
# ## 9. Average precision (Section 4.2; COCO)
# The detections of a class are ranked by score. A detection is right if its IoU with an object is 0.5 or
# more and no better detection has found this object. At each of 101 recalls, COCO takes the highest
# precision at this recall or beyond. AP50 is the mean over these recalls and over the classes.

# %%
options = argparse.Namespace(amp="off", workers=0)
results = detect(detector, val, options, torch.device("cpu"), batch_size=16)


def precisions_and_recalls(label):
    """Precision and recall of the best detection of a class, of the two best, and so on."""
    missing = {record.id: record.boxes[record.labels == label].tolist() for record in val.records}
    objects = sum(len(boxes) for boxes in missing.values())
    mine = [r for r in results if r["category_id"] == val.category_ids[label]]
    precisions, recalls, right = [], [], 0
    for rank, found in enumerate(sorted(mine, key=lambda r: -r["score"]), 1):
        x, y, w, h = found["bbox"]
        boxes = missing[found["image_id"]]
        ious = [iou_and_giou([x, y, x + w, y + h], box)[0] for box in boxes]
        if max(ious, default=0) >= 0.5:
            boxes.pop(ious.index(max(ious)))
            right += 1
        precisions.append(right / rank)
        recalls.append(right / objects)
    return precisions, recalls


AT = np.linspace(0, 1, 101)  # COCO's recalls
curves, AP50s = [], []
for label, name in enumerate(classes):
    precisions, recalls = precisions_and_recalls(label)
    best = [max((p for p, r in zip(precisions, recalls) if r >= t), default=0) for t in AT]
    curves.append((precisions, recalls, best))
    AP50s.append(sum(best) / len(AT))
    print(f"{name:10} AP50 {100 * AP50s[-1]:.1f}")
AP50 = sum(AP50s) / len(AP50s)
expected = coco_metrics(val.ground_truth, results)["AP50"]
print(f"mean       AP50 {100 * AP50:.4f}, by coco_metrics {100 * expected:.4f}")
assert math.isclose(AP50, expected, abs_tol=1e-6)

figure, axis = new_slide("9  AP50 is the area under the highest precision (4.2)")
precisions, recalls, best = curves[true_labels[0]]
axis.fill_between(AT, best, color=FOUND, alpha=0.4, step="pre")
axis.plot(recalls, precisions, color=OTHER, lw=4, label="as ranked by score")
axis.step(AT, best, color="black", lw=4, label="highest precision at this recall or beyond")
axis.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.05), yticks=(0.5, 1),
         title=f"{names[0]}: {100 * AP50s[true_labels[0]]:.1f}, mean of all classes: {100 * AP50:.1f}")
axis.legend()
keep_slide(figure, args.out / "9-precision.png")
