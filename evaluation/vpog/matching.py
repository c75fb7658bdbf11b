"""How well query patches find their template patches: counts that can be added, and their figures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BACKGROUND = -1


@dataclass(frozen=True)
class PatchCounts:
    """Patches of the object, by what they are and what they were taken for.

    Args:
        seen: whose template patch exists.
        exact, within_one, recalled: of those, found exactly; found or a neighbour of it, diagonals included; taken for
            seen at all.
        unseen: whose surface the template does not show.
        found_unseen: of those, taken for unseen.
    """

    seen: int = 0
    exact: int = 0
    within_one: int = 0
    recalled: int = 0
    unseen: int = 0
    found_unseen: int = 0

    def __add__(self, other: PatchCounts) -> PatchCounts:
        return PatchCounts(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def figures(self) -> dict[str, float | None]:
        """`within_one_patch`, `exact`, `seen_recall` and `unseen_f1`; None where there was nothing to find.

        F1 counts patches of the object alone: always answering "unseen" has a recall of 1 and a low precision.
        """
        taken_for_unseen = self.found_unseen + self.seen - self.recalled
        return {
            "within_one_patch": share(self.within_one, self.seen),
            "exact": share(self.exact, self.seen),
            "seen_recall": share(self.recalled, self.seen),
            "unseen_f1": share(2 * self.found_unseen, self.unseen + taken_for_unseen) if self.unseen else None,
        }


def share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def count_patches(predicted: Tensor, labels: Tensor, columns: int) -> PatchCounts:
    """Compare the argmax over all N + 1 classes with the labels.

    Args:
        predicted: (..., N) in 0..N; N: unseen.
        labels: (..., N), as predicted, or -1 for background, which does not count.
        columns: patches in a row of the template's grid.

    Raises:
        ValueError: the shapes differ.
    """
    if predicted.shape != labels.shape:
        raise ValueError(f"`predicted` {tuple(predicted.shape)} and `labels` {tuple(labels.shape)} must have one shape")
    number = labels.shape[-1]
    seen, unseen = (labels >= 0) & (labels < number), labels == number
    recalled = seen & (predicted < number)
    rows = (predicted // columns - labels // columns).abs()
    apart = torch.maximum(rows, (predicted % columns - labels % columns).abs())
    counted = (
        seen,
        recalled & (apart == 0),
        recalled & (apart <= 1),
        recalled,
        unseen,
        unseen & (predicted == number),
    )
    return PatchCounts(*(int(each.sum()) for each in counted))
