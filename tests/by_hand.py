"""Matching and losses of detection, written out for single pairs. They import nothing of what they check."""
import itertools

import torch


def pair_giou(a, b):
    """GIoU of two cxcywh boxes."""
    a, b = (torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2]) for x, y, w, h in (a, b))
    wide = (torch.minimum(a[2], b[2]) - torch.maximum(a[0], b[0])).clamp(min=0)
    high = (torch.minimum(a[3], b[3]) - torch.maximum(a[1], b[1])).clamp(min=0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - wide * high
    hull = ((torch.maximum(a[2], b[2]) - torch.minimum(a[0], b[0]))
            * (torch.maximum(a[3], b[3]) - torch.minimum(a[1], b[1])))
    return wide * high / union - (hull - union) / hull


def cheapest_pairs(logits, boxes, labels, true):
    """The cheapest assignment of an image, of all there are: [(query, object)]."""
    def cost(q, t):
        p = logits[q, labels[t]].sigmoid()
        focal = 0.25 * (1 - p) ** 2 * -p.log() - 0.75 * p ** 2 * -(1 - p).log()
        return 2 * focal + 5 * (boxes[q] - true[t]).abs().sum() - 2 * pair_giou(boxes[q], true[t])
    table = torch.tensor([[cost(q, t) for t in range(len(labels))] for q in range(len(logits))])
    choices = itertools.permutations(range(len(logits)), len(labels))
    best = min(choices, key=lambda queries: sum(table[q, t] for t, q in enumerate(queries)))
    return [(q, t) for t, q in enumerate(best)]


def layer_losses(logits, boxes, labels, true, pairs):
    """The losses of class, L1 and GIoU of an image in a layer, not divided by the number of matches."""
    positive = {(q, labels[t]) for q, t in pairs}
    focal = l1 = giou = 0
    for q, k in itertools.product(*map(range, logits.shape)):
        p = logits[q, k].sigmoid()
        focal += -0.25 * (1 - p) ** 2 * p.log() if (q, k) in positive else -0.75 * p ** 2 * (1 - p).log()
    for q, t in pairs:
        l1 += (boxes[q] - true[t]).abs().sum()
        giou += 1 - pair_giou(boxes[q], true[t])
    return 2 * focal, 5 * l1, 2 * giou
