"""A picture of an object as the network sees it: read from what users have, cropped, its patches known."""
# ruff: noqa: N803 - K is what everybody calls it

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from backlot.cameras import square_crop, warp
from backlot.pictures import to_rgb
from pipelines.vpog.correspondences import covered_patches

Picture = Image.Image | np.ndarray | Tensor


@dataclass(frozen=True)
class Query:
    """The crop of one detection.

    Args:
        image: (3, S, S) float32 in [0, 1].
        patches: (N,) bool, which show the object.
        box: (4,) float64 x1 y1 x2 y2, edges of pixels of the picture.
        crop_from_picture: (3, 3) float64, the affine of the crop.
        K: (3, 3) float64, the crop's camera.
    """

    image: Tensor
    patches: Tensor
    box: Tensor
    crop_from_picture: Tensor
    K: Tensor

    @property
    def box_in_crop(self) -> Tensor:
        """(4,), edges of pixels of the crop."""
        return (transform_2d(self.crop_from_picture, self.box.reshape(2, 2) - 0.5) + 0.5).flatten()


def transform_2d(M: Tensor, places: Tensor) -> Tensor:
    """Places (P, 2) through an affine (3, 3)."""
    return places @ M[:2, :2].T + M[:2, 2]


def read_picture(image: Picture) -> Tensor:
    """Any picture as (3, H, W) float32 in [0, 1].

    Args:
        image: of Pillow in any mode, an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), or a tensor (1, H, W),
            (3, H, W) or (4, H, W); uint8, or floats in [0, 1]. A fourth channel is not looked at.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(image, Image.Image):
        image = np.array(to_rgb(image))
    if isinstance(image, np.ndarray):
        values = torch.from_numpy(np.ascontiguousarray(image if image.ndim != 2 else image[..., None]))
        values = values.permute(2, 0, 1) if values.ndim == 3 else values
    elif isinstance(image, Tensor):
        values = image.cpu()
    else:
        raise ValueError(f"`image` must be a Pillow image, an array or a tensor, got {type(image).__name__}")
    if values.ndim != 3 or values.shape[0] not in (1, 3, 4) or 0 in values.shape:
        raise ValueError(f"`image` must be one picture of 1, 3 or 4 channels, got shape {tuple(image.shape)}")
    if values.dtype == torch.uint8:
        values = values.float() / 255
    elif not values.is_floating_point():
        raise ValueError(f"`image` must be uint8 or float, got {values.dtype}")
    values = values.float()
    if not (values.isfinite().all() and values.min() >= 0 and values.max() <= 1):
        raise ValueError(f"`image` must be in [0, 1], got values from {values.min():g} to {values.max():g}")
    return values[:3].expand(3, -1, -1).contiguous()


def read_mask(mask: Picture, height: int, width: int) -> Tensor:
    """A mask as (H, W) bool; what is not 0 is the object.

    Raises:
        ValueError: it is not of the picture's size, or empty.
    """
    values = torch.as_tensor(np.array(mask.convert("L")) if isinstance(mask, Image.Image) else mask)
    if tuple(values.shape) != (height, width):
        raise ValueError(f"`mask` must be of the picture's size {(height, width)}, got {tuple(values.shape)}")
    values = values.cpu() != 0
    if not values.any():
        raise ValueError("`mask` must show the object, got one without any pixel of it")
    return values


def read_box(box: object, height: int, width: int) -> Tensor:
    """A box as (4,) float64.

    Raises:
        ValueError: it is no box, or lies outside the picture.
    """
    values = torch.as_tensor(box, dtype=torch.float64).cpu()
    if tuple(values.shape) != (4,) or not values.isfinite().all():
        raise ValueError(f"`box` must be four numbers x1 y1 x2 y2, got {values.tolist()}")
    x1, y1, x2, y2 = values.tolist()
    if not (x1 < x2 and y1 < y2):
        raise ValueError(f"`box` must be x1 y1 x2 y2 with x1 < x2 and y1 < y2, got {values.tolist()}")
    if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
        raise ValueError(f"`box` must overlap the picture of {width} x {height} pixels, got {values.tolist()}")
    return values


def box_of(mask: Tensor) -> Tensor:
    """The edges (4,) of the pixels of a mask (H, W) that is not empty, float64."""
    rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
    edges = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return edges.double()


def mask_of(box: Tensor, height: int, width: int) -> Tensor:
    """The pixels (H, W) that lie in a box, at least the one at its centre."""
    x1, y1, x2, y2 = box.tolist()
    rows, columns = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    mask = ((rows >= y1) & (rows < y2))[:, None] & ((columns >= x1) & (columns < x2))
    mask[min(max(int((y1 + y2) / 2), 0), height - 1), min(max(int((x1 + x2) / 2), 0), width - 1)] = True
    return mask


def crop_query(
    picture: Tensor,
    K: Tensor,
    box: Tensor | None,
    mask: Tensor | None,
    *,
    size: int,
    patch_size: int,
    padding: float,
    remove_background: bool,
) -> Query:
    """One detection's crop.

    Args:
        picture: (3, H, W) in [0, 1]. K: (3, 3) of the picture, pixel centres at integers.
        box: (4,), that of the mask where it is None.
        mask: (H, W) bool, the box where it is None.
        size: side of the crop in pixels.
        padding: side of the crop over the box's longer side.
        remove_background: black where the mask is not, as the network knows it from training.

    Raises:
        ValueError: the mask has no pixel in the crop.
    """
    height, width = picture.shape[1:]
    is_object = mask_of(box, height, width) if mask is None else mask
    box = box_of(mask) if box is None else box
    M = square_crop(box[None], size, padding)
    in_crop = warp(is_object[None, None].float(), M, size, mode="nearest")[0, 0] > 0.5
    if not in_crop.any():
        raise ValueError("`mask` must show the object within `box`, got none of its pixels there")
    image = (warp(255 * picture[None], M, size)[0].round() / 255).clamp(0, 1)  # 8 bits, as in training
    if remove_background and mask is not None:
        image = image * in_crop
    patches = covered_patches(in_crop[None], patch_size)[0]
    return Query(image, patches, box, M[0], M[0] @ K.double())
