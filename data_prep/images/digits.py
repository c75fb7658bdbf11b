"""The 1,797 handwritten digits of 8x8 pixels that come with scikit-learn: real data, no download."""

from __future__ import annotations

from functools import cached_property
from typing import SupportsInt

import numpy as np
import torch
from torch.utils.data import Dataset

from backlot.fingerprint import fingerprint

NUM_TRAIN = 1437
DIGITS_SPLITS = ("train", "validation", "all")


def load_digits(split: str = "train") -> tuple[torch.Tensor, torch.Tensor]:
    """Load one split of the digits.

    Args:
        split: "train" (1,437 images), "validation" (the other 360) or "all". The division is a fixed permutation.

    Returns:
        `pixel_values` (N, 1, 8, 8) float32 in [-1, 1] and `class_labels` (N,) int64 in 0..9.

    Raises:
        ValueError: for any other split.
    """
    if split not in DIGITS_SPLITS:
        raise ValueError(f"`split` of the digits must be one of {', '.join(DIGITS_SPLITS)}, got {split!r}")
    from sklearn import datasets as sklearn_datasets  # a second of import time that other data sets should not pay

    images, labels = sklearn_datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    rows = {"train": order[:NUM_TRAIN], "validation": order[NUM_TRAIN:], "all": order}[split]
    pixel_values = torch.from_numpy(images[rows]).float().div(8).sub(1).reshape(-1, 1, 8, 8)
    return pixel_values, torch.from_numpy(labels[rows]).long()


class DigitsDataset(Dataset):
    """The digits in memory. Items: `pixel_values` (1, 8, 8) float32 in [-1, 1], `class_labels` int64 scalar."""

    num_classes = 10

    def __init__(self, split: str = "train") -> None:
        self.pixel_values, self.class_labels = load_digits(split)

    @cached_property
    def fingerprint(self) -> str:
        """Of all pictures and labels."""
        return fingerprint(values.numpy().tobytes() for values in (self.pixel_values, self.class_labels))

    def __len__(self) -> int:
        return len(self.class_labels)

    def __getitem__(self, key: SupportsInt) -> dict[str, torch.Tensor]:
        row = int(key)
        return {"pixel_values": self.pixel_values[row], "class_labels": self.class_labels[row]}
