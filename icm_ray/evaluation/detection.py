"""Boxes from an image's patches: which patch answers for which box, losses, and decoding.

Anchor-free, as FCOS (arXiv 1904.01355) has it, on the one grid of a vision transformer. For each
patch a linear head gives a logit a class and four numbers, whose softplus are the distances of a
box's left, top, right and bottom from the patch's centre, in sides of a patch.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from icm_ray.base_model.readers import Batch
from icm_ray.errors import InputError

NEAR = 1.0
"""A patch answers for a box whose centre is at most so many sides away and that holds its own."""
ALPHA, GAMMA = 0.25, 2.0
"""Of the focal loss (arXiv 1708.02002)."""
LEAST_SCORE, MOST_OVERLAP = 0.05, 0.6
"""Boxes below this score, or that overlap a better one of their class by more, are dropped."""
MOST_BOXES = 100
"""Boxes kept of an image, as COCO has it."""
NO_BOX = -1.0
"""The class of a row that only fills an array up, and of a patch that answers for no box."""


class Grid(NamedTuple):
    """An image's patches: how many there are, and a patch's side in pixels."""

    rows: int
    columns: int
    side: int

    @property
    def centres(self) -> Float[Tensor, "patches 2"]:
        """The patches' centres `x, y` in pixels, in reading order."""
        y, x = torch.meshgrid(torch.arange(self.rows), torch.arange(self.columns), indexing="ij")
        return (torch.stack([x, y], -1).flatten(0, 1) + 0.5) * self.side

    @property
    def size(self) -> Float[Tensor, " 2"]:
        """The image's width and height in pixels."""
        return torch.tensor([float(self.columns), float(self.rows)]) * self.side


def grid_of(batch: Batch) -> Grid:
    """Return the grid of patches of a batch of images."""
    height, width = batch.data.shape[-2:]
    side = math.isqrt(height * width // (batch.mask.shape[1] - batch.prefix))
    return Grid(height // side, width // side, side)


def check_size(task: str, images: np.ndarray, batch: Batch) -> None:
    """Raise InputError if the base resizes or cuts a task's images: boxes do not move along."""
    (height, width), (rows, columns) = images[0].shape[:2], batch.data.shape[-2:]
    if (height, width) != (rows, columns):
        raise InputError(
            f"{task}: images of {width} x {height} but the base reads {columns} x {rows} of them, "
            "and boxes do not move along. Resize images and boxes."
        )


def assigned(
    boxes: Float[Tensor, "examples boxes 5"], grid: Grid
) -> Float[Tensor, "examples patches 5"]:
    """Return what each patch should say: a class, and the distances of that class's box.

    A patch answers for the smallest of the boxes near whose centres it lies, and the patch that
    holds a box's centre always does; all others have the class `NO_BOX`.

    Args:
        boxes: Corners `x0, y0, x1, y1` in pixels and class.
        grid: The patches.
    """
    boxes, centres = boxes.float(), grid.centres.to(boxes.device)[:, None]
    low, high, classes = boxes[:, None, :, :2], boxes[:, None, :, 2:4], boxes[..., 4]
    distances = torch.cat([centres - low, high - centres], -1) / grid.side
    away = ((low + high) / 2 - centres).abs().amax(-1) / grid.side
    answers = (distances.amin(-1) > 0) & (away <= NEAR) | (away <= 0.5)
    area = (boxes[..., 2:4] - boxes[..., :2]).prod(-1)[:, None].expand(answers.shape)
    area = area.masked_fill(~answers | (classes == NO_BOX)[:, None], torch.inf)
    least, chosen = area.min(-1)
    own = distances.gather(2, chosen[..., None, None].expand(-1, -1, 1, 4))[:, :, 0]
    kinds = classes.gather(1, chosen).masked_fill(least.isinf(), NO_BOX)
    return torch.cat([kinds[..., None], own.clamp_min(0)], -1)


def box_loss(
    logits: Float[Tensor, "patches outputs"], expected: Float[Tensor, "patches 5"]
) -> Float[Tensor, " patches"]:
    """Return each patch's focal loss, and 1 - GIoU of its box where it answers for one.

    Args:
        logits: What the head gives.
        expected: What `assigned` says.
    """
    scores, sizes = logits[:, :-4].float(), F.softplus(logits[:, -4:].float())
    expected = expected.to(scores)
    right = (expected[:, :1] == torch.arange(scores.shape[1], device=scores.device)).to(scores)
    missed = F.binary_cross_entropy_with_logits(scores, right, reduction="none")
    weight = ALPHA * right + (1 - ALPHA) * (1 - right)
    focal = weight * missed * (1 - torch.exp(-missed)) ** GAMMA  # exp(-missed): p of what is right
    return focal.sum(-1) + right.sum(-1) * (1 - giou(sizes, expected[:, 1:]))


def box_divergence(
    logits: Float[Tensor, "patches outputs"],
    theirs: Float[Tensor, "patches outputs"],
    temperature: float = 1.0,
) -> Float[Tensor, " patches"]:
    """Return how far each patch's answer is from another head's or model's.

    The Kullback-Leibler divergence of each class's two probabilities, summed, and 1 - GIoU of the
    two boxes times the other's highest probability: a box that nobody sees does not matter.
    """
    own, wanted = logits[:, :-4].float() / temperature, theirs[:, :-4].float() / temperature
    p = wanted.sigmoid()
    gap = F.binary_cross_entropy_with_logits(own, p, reduction="none")
    gap = gap - F.binary_cross_entropy_with_logits(wanted, p, reduction="none")
    sizes, known = (F.softplus(side[:, -4:].float()) for side in (logits, theirs))
    sure = theirs[:, :-4].float().sigmoid().amax(-1)
    return gap.sum(-1) + sure * (1 - giou(sizes, known))


def giou(a: Float[Tensor, "boxes 4"], b: Float[Tensor, "boxes 4"]) -> Float[Tensor, " boxes"]:
    """Return the generalised IoU (arXiv 1902.09630) of boxes around the same points.

    Args:
        a: Distances of left, top, right and bottom.
        b: The other boxes'.
    """
    shared = (torch.minimum(a, b)[:, :2] + torch.minimum(a, b)[:, 2:]).prod(-1)
    around = (torch.maximum(a, b)[:, :2] + torch.maximum(a, b)[:, 2:]).prod(-1).clamp_min(1e-9)
    union = (a[:, :2] + a[:, 2:]).prod(-1) + (b[:, :2] + b[:, 2:]).prod(-1) - shared
    return shared / union.clamp_min(1e-9) - (around - union) / around


def overlaps(boxes: Float[Tensor, "boxes 4"]) -> Float[Tensor, "boxes boxes"]:
    """Return the intersection over union of boxes, given by their corners, with each other."""
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = (high - low).clamp_min(0).prod(-1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    return shared / (area[:, None] + area - shared).clamp_min(1e-9)


def decoded(logits: Float[Tensor, "examples patches outputs"], grid: Grid) -> np.ndarray:
    """Return the boxes that are found, float64 `(examples, 6 * most)`, best first in each image.

    Six numbers a box: its corners in pixels, its class and its score; rows are filled up with
    boxes of class `NO_BOX`.
    """
    found = [_found(one, grid) for one in logits.float().cpu()]
    most = max(1, *(len(one) for one in found))
    filled = torch.zeros(len(found), most, 6)
    filled[..., 4] = NO_BOX
    for place, one in enumerate(found):
        filled[place, : len(one)] = one
    return filled.flatten(1).double().numpy()


def _found(logits: Float[Tensor, "patches outputs"], grid: Grid) -> Float[Tensor, "boxes 6"]:
    """Return one image's boxes after non-maximum suppression within each class."""
    scores = logits[:, :-4].sigmoid()
    best, places = scores.flatten().topk(min(MOST_BOXES, scores.numel()))
    places = places[best >= LEAST_SCORE]
    patches, classes = places // scores.shape[1], places % scores.shape[1]
    reach = F.softplus(logits[patches, -4:]) * grid.side
    centres = grid.centres[patches]
    boxes = torch.cat([centres - reach[:, :2], centres + reach[:, 2:]], -1)
    boxes = torch.minimum(boxes.clamp_min(0), grid.size.repeat(2))
    rivals = (overlaps(boxes) > MOST_OVERLAP) & (classes[:, None] == classes)
    kept = torch.ones(len(boxes), dtype=torch.bool)
    for place in range(len(boxes)):
        if kept[place]:
            kept[place + 1 :] &= ~rivals[place, place + 1 :]
    rows = torch.cat([boxes, classes[:, None], best[: len(boxes), None]], -1)
    return rows[kept]
