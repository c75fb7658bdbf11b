"""Patch counts by hand."""

from __future__ import annotations

import pytest
import torch

from evaluation.vpog.matching import PatchCounts, count_patches

UNSEEN = 9  # of a grid of 3 x 3
LABELS = torch.tensor([0, 2, 4, 8, 3, UNSEEN, UNSEEN, -1, -1])


def test_counts_by_hand():
    # 0 exact; 2 -> 3 is a neighbour in number but not in the grid; 4 -> 8 diagonal; 8 unseen; 3 -> 5 two aside
    predicted = torch.tensor([0, 3, 8, UNSEEN, 5, UNSEEN, 1, 4, UNSEEN])
    counts = count_patches(predicted, LABELS, columns=3)
    assert counts == PatchCounts(seen=5, exact=1, within_one=2, recalled=4, unseen=2, found_unseen=1)
    figures = counts.figures()
    assert figures["exact"] == pytest.approx(1 / 5)
    assert figures["within_one_patch"] == pytest.approx(2 / 5)
    assert figures["seen_recall"] == pytest.approx(4 / 5)
    # precision 1/2 and recall 1/2: background does not count
    assert figures["unseen_f1"] == pytest.approx(1 / 2)


def test_unseen_is_no_neighbour_of_the_last_patch():
    # of a grid of 3 x 3, number 9 would lie below number 6
    counts = count_patches(torch.full((9,), UNSEEN), torch.full((9,), 6), columns=3)
    assert counts.within_one == 0


def test_always_unseen_has_a_low_f1():
    labels = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, UNSEEN]])
    figures = count_patches(torch.full_like(labels, UNSEEN), labels, columns=3).figures()
    assert figures["seen_recall"] == 0
    assert figures["unseen_f1"] == pytest.approx(2 / 10)


def test_counts_add_up_and_perfection_is_one():
    counts = count_patches(LABELS.clamp(min=0), LABELS, columns=3)
    assert set((counts + counts).figures().values()) == {1.0}
    assert (counts + counts).seen == 2 * counts.seen


def test_nothing_to_find_gives_no_figure():
    background = torch.full((9,), -1)
    assert set(count_patches(background, background, 3).figures().values()) == {None}


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        count_patches(LABELS[:3], LABELS, 3)
