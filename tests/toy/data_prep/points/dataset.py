"""Reader of points for training."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from backlot.fingerprint import fingerprint
from backlot.samples import SampleKey
from data_prep.points.format import read_points


class PointDataset(Dataset):
    """The points of one split. Items: `points` (2,) float32.

    Args:
        folder, split: see `read_points`.
        turns: turn each point about the origin by a random multiple of 1 / `turns` of a circle; 1 for never. Drawn
            from `key.generator()`: a function of seed, epoch and index.

    Raises:
        ValueError: see `read_points`.
    """

    def __init__(self, folder: str | Path, split: str = "train", turns: int = 1):
        self.points, self.turns = read_points(Path(folder), split), turns

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, key: SampleKey) -> dict[str, Tensor]:
        point = self.points[int(key)]
        if self.turns > 1:
            angle = 2 * math.pi * int(torch.randint(self.turns, (), generator=key.generator())) / self.turns
            sine, cosine = math.sin(angle), math.cos(angle)
            point = torch.stack([cosine * point[0] - sine * point[1], sine * point[0] + cosine * point[1]])
        return {"points": point}

    @cached_property
    def fingerprint(self) -> str:
        """Of all points: other ones cannot continue a run."""
        return fingerprint([self.points.numpy().tobytes()])
