"""Boxes on the host, and the one way in which an object is cut out of a picture.

References, the crops of a loss and those of an evaluation are the same pixels: all go through `cut`. Boxes are numpy
arrays and windows plain integers, so that choosing a crop never waits for an accelerator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data._utils.collate import default_collate_fn_map

from backlot.files import json_sha256

CONTEXT = 0.1
"""Of a box's width and height, added on each side."""
ROUNDING = 1e-4
"""Of a pixel: a box that ends this little behind an edge ends at it."""
RECIPE = {"context": CONTEXT, "rounding": ROUNDING, "padding": "edge", "resize": "bicubic antialias", "version": 1}
RECIPE_SHA256 = json_sha256(RECIPE)
"""Part of the fingerprint of whatever was computed from crops."""


class HostBoxes:
    """Boxes that stay in the host's memory through collation and moves of a batch.

    Args:
        values: (..., N, 4), x1 y1 x2 y2 in [0, 1] of the picture; kept as float32.
    """

    def __init__(self, values: np.ndarray | Sequence[Sequence[float]]):
        self.values = np.asarray(values, np.float32)

    def to(self, *args: object, **kwargs: object) -> HostBoxes:
        """These boxes, whatever the device."""
        return self

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        return f"HostBoxes({self.values.tolist()})"


def _collate(batch: list[HostBoxes], *, collate_fn_map: dict | None = None) -> HostBoxes:
    return HostBoxes(np.stack([boxes.values for boxes in batch]))


default_collate_fn_map[HostBoxes] = _collate


class Window(NamedTuple):
    """A rectangle of whole pixels, or of latent cells: rows top ... bottom - 1, columns left ... right - 1."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left

    def of(self, picture: Tensor) -> Tensor:
        """This part of a picture (..., H, W)."""
        return picture[..., self.top : self.bottom, self.left : self.right]

    def within(self, origin: Window, factor: int = 1) -> Window:
        """This window in a part of the picture: `origin`, in cells of `factor` pixels."""
        top, left = origin.top * factor, origin.left * factor
        return Window(self.top - top, self.bottom - top, self.left - left, self.right - left)


def span(low: float, high: float, size: int) -> tuple[int, int]:
    """The pixels (or cells) that an interval of [0, 1] touches on a side of `size`: half open, at least one."""
    first = int(np.floor(low * size + ROUNDING))
    last = int(np.ceil(high * size - ROUNDING))
    first = min(max(first, 0), size - 1)
    return first, min(max(last, first + 1), size)


def crop_window(box: Sequence[float], height: int, width: int) -> Window:
    """The pixels of a crop: the box with its context, as far as the picture goes.

    Args:
        box: x1 y1 x2 y2 in [0, 1], on the host.
    """
    x1, y1, x2, y2 = (float(value) for value in box)
    dx, dy = CONTEXT * (x2 - x1), CONTEXT * (y2 - y1)
    return Window(*span(y1 - dy, y2 + dy, height), *span(x1 - dx, x2 + dx, width))


def latent_window(window: Window, factor: int, margin: int, height: int, width: int) -> Window:
    """The latent cells that hold a window of pixels and `margin` cells around it, as far as the latent goes.

    Decoded, they are a picture in which the crop is `window.within(cells, factor)`.

    Args:
        factor: pixels along the side of one cell.
        height, width: of the latent, in cells.
    """
    return Window(
        max(window.top // factor - margin, 0),
        min(-(-window.bottom // factor) + margin, height),
        max(window.left // factor - margin, 0),
        min(-(-window.right // factor) + margin, width),
    )


def cut(picture: Tensor, window: Window, side: int) -> Tensor:
    """Cut a window out, make it square by repeating its edge pixels, and resize it (bicubic, antialiased).

    Differentiable. What overshoots the range of the picture's values by the resizing is left.

    Args:
        picture: (C, H, W), any float type.
        side: of the result in pixels.

    Returns:
        (C, side, side) float32.
    """
    patch = window.of(picture).float()
    longer = max(window.height, window.width)
    below, beside = longer - window.height, longer - window.width
    if below or beside:
        patch = F.pad(patch, (beside // 2, beside - beside // 2, below // 2, below - below // 2), mode="replicate")
    if longer == side:
        return patch
    return F.interpolate(patch[None], size=(side, side), mode="bicubic", antialias=True, align_corners=False)[0]


def crop(picture: Tensor, box: Sequence[float], side: int) -> Tensor:
    """The crop of an object: `cut` of its `crop_window`.

    Args:
        picture: (C, H, W), any float type.
        box: x1 y1 x2 y2 in [0, 1], on the host.
        side: of the result in pixels.

    Returns:
        (C, side, side) float32.
    """
    return cut(picture, crop_window(box, *picture.shape[-2:]), side)


def standardise(crops: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Crops (..., 3, side, side) in [-1, 1] -> as an image encoder takes them: clamped, (x - mean) / std of [0, 1].

    Made of Python numbers alone, so that nothing is copied to the device.
    """
    scaled = (crops.clamp(-1, 1) + 1) / 2
    channels = zip(scaled.unbind(-3), mean, std, strict=True)
    return torch.stack([(channel - centre) / spread for channel, centre, spread in channels], dim=-3)
