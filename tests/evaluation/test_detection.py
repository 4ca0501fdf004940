"""Boxes from patches: who answers for what, what it costs to be wrong, and what is read back."""

import numpy as np
import pytest
import torch

from icm_ray.base_model.readers import Batch
from icm_ray.evaluation.detection import (
    NO_BOX,
    Grid,
    assigned,
    box_divergence,
    box_loss,
    decoded,
    giou,
    grid_of,
    overlaps,
)

GRID = Grid(4, 4, 10)


def logits_of(expected: torch.Tensor, classes: int) -> torch.Tensor:
    """Return the logits of a head that is sure of what it should say."""
    scores = torch.where(expected[..., :1] == torch.arange(classes), 6.0, -6.0)
    return torch.cat([scores, torch.log(torch.expm1(expected[..., 1:].clamp_min(1e-3)))], -1)


def test_a_grid_is_that_of_the_batch() -> None:
    mask = torch.ones(2, 1 + 8, dtype=torch.bool)
    batch = Batch(torch.zeros(2, 3, 28, 56), mask, torch.arange(2), prefix=1)
    grid = grid_of(batch)
    assert grid == Grid(2, 4, 14)
    assert grid.centres[5].tolist() == [21, 21]
    assert grid.size.tolist() == [56, 28]


def test_patches_near_a_centre_answer_for_the_smallest_box_there() -> None:
    boxes = torch.tensor([[[2.0, 2, 28, 28, 0], [11, 11, 19, 19, 1], [0, 0, 0, 0, -1]]])
    found = assigned(boxes, GRID)[0]
    kinds = found[:, 0].reshape(4, 4)
    assert kinds[1, 1] == 1  # the small box, whose centre lies in this patch
    assert kinds[0, 0] == kinds[2, 2] == kinds[0, 1] == 0
    assert (kinds[3] == NO_BOX).all()
    assert (kinds[:, 3] == NO_BOX).all()
    torch.testing.assert_close(found[5, 1:], torch.full((4,), 0.4))
    torch.testing.assert_close(found[0, 1:], torch.tensor([0.3, 0.3, 2.3, 2.3]))


def test_a_box_that_holds_no_patch_centre_has_its_own_patch() -> None:
    found = assigned(torch.tensor([[[6.0, 6, 9, 9, 2]]]), GRID)[0]
    assert (found[:, 0] != NO_BOX).nonzero().flatten().tolist() == [0]
    assert found[0].tolist() == pytest.approx([2, 0, 0, 0.4, 0.4])


def test_an_image_without_a_thing_has_no_patch_that_answers() -> None:
    nothing = torch.tensor([[[0.0, 0, 0, 0, -1]]])
    assert (assigned(nothing, GRID)[..., 0] == NO_BOX).all()


def test_giou_is_what_a_drawing_says() -> None:
    one = torch.tensor([[1.0, 1, 1, 1]])
    assert float(giou(one, one)) == pytest.approx(1)
    # Two by two beside three by two: shared 4, union 6, around 6.
    assert float(giou(one, torch.tensor([[1.0, 1, 2, 1]]))) == pytest.approx(4 / 6)
    # Crossed bars, 4 x 2 and 2 x 4: shared 4, union 12, around 16.
    crossed = giou(torch.tensor([[2.0, 1, 2, 1]]), torch.tensor([[1.0, 2, 1, 2]]))
    assert float(crossed) == pytest.approx(4 / 12 - 4 / 16)


def test_loss_is_least_where_the_head_is_right_and_falls_on_the_way() -> None:
    boxes = torch.tensor([[[3.0, 4, 25, 30, 1], [20, 2, 38, 18, 0]]])
    expected = assigned(boxes, GRID)[0]
    right = logits_of(expected, 2)
    assert float(box_loss(right, expected).max()) < 1e-3
    wrong = right.clone()
    wrong[:, :2] = -right[:, :2]
    assert float(box_loss(wrong, expected).mean()) > 1
    # One linear map on features that tell patches apart learns one image.
    torch.manual_seed(0)
    features, head = torch.randn(16, 32), torch.nn.Linear(32, 6)
    descent = torch.optim.Adam(head.parameters(), lr=0.01)
    losses = []
    for _ in range(400):
        loss = box_loss(head(features), expected).mean()
        descent.zero_grad()
        loss.backward()
        descent.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
    found = decoded(head(features).detach()[None], GRID).reshape(-1, 6)[:2]
    found = found[found[:, 4].argsort()]
    np.testing.assert_allclose(found[:, :4], [[20, 2, 38, 18], [3, 4, 25, 30]], atol=1.5)
    assert found[:, 4].tolist() == [0, 1]


def test_divergence_is_nothing_from_itself_and_a_box_counts_where_one_is_seen() -> None:
    torch.manual_seed(0)
    theirs = torch.randn(5, 7)
    assert float(box_divergence(theirs, theirs).abs().max()) < 1e-5
    other = theirs.clone()
    other[:, 3:] += 1
    theirs[:, :3] = other[:, :3] = torch.tensor([-20.0, -20, -20])
    assert float(box_divergence(other, theirs).max()) < 1e-6
    theirs[0, 0] = other[0, 0] = 20
    gaps = box_divergence(other, theirs)
    assert float(gaps[0]) > 0.1
    assert float(gaps[1:].max()) < 1e-6
    warm = box_divergence(other, theirs, temperature=2.0)
    torch.testing.assert_close(warm, gaps)  # of scores alone, and these are the same


def test_the_best_of_boxes_that_overlap_is_kept_in_each_class() -> None:
    logits = torch.full((1, 16, 6), -9.0)
    same = torch.tensor([[12.0, 12, 28, 28]])
    for patch, (first, second) in {5: (3.0, -9.0), 6: (2.0, 1.0), 15: (-2.5, -9.0)}.items():
        centre = GRID.centres[patch]
        reach = torch.cat([centre - same[0, :2], same[0, 2:] - centre]) / 10
        logits[0, patch, :2] = torch.tensor([first, second])
        logits[0, patch, 2:] = torch.log(torch.expm1(reach.abs().clamp_min(0.01)))
    found = decoded(logits, GRID).reshape(-1, 6)
    assert found[:, 4].tolist() == [0, 1, 0]  # another class may be at the same place
    np.testing.assert_allclose(found[0, :4], same[0], atol=1e-3)
    assert found[0, 5] > found[1, 5] > found[2, 5] > 0.05
    assert float(overlaps(torch.from_numpy(found[:, :4]).float())[0, 1]) == pytest.approx(1)


def test_images_with_fewer_boxes_are_filled_up_and_boxes_stay_inside() -> None:
    logits = torch.full((2, 16, 6), -9.0)
    logits[0, 0, 0], logits[0, 0, 2:] = 3.0, 50.0
    found = decoded(logits, GRID)
    assert found.shape == (2, 6)
    assert found[0, :5].tolist() == [0, 0, 40, 40, 0]
    assert found[1, 4] == NO_BOX
