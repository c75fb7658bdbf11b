"""What users hand to ShortcutScenePipeline, as tensors; ValueError names what is wrong with it."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from backlot.pictures import to_images
from pipelines.shortcut_scene.codec import rotation_6d

Sample = dict[str, Tensor]


def split(name: str, value: object, batch_ndim: int) -> list | None:
    """One entry per scene: a list as it is, an array of `batch_ndim` axes by its first, anything else alone."""
    if value is None:
        return None
    if isinstance(value, list | tuple):
        if not value:
            raise ValueError(f"`{name}` must not be an empty list")
        return list(value)
    return list(value) if isinstance(value, Tensor | np.ndarray) and value.ndim == batch_ndim else [value]


def expand(name: str, values: list | None, batch: int) -> list | None:
    """As many entries as there are scenes."""
    if values is None or len(values) == batch:
        return values
    if len(values) != 1:
        raise ValueError(f"`{name}` must have one entry, or one per scene: {batch}, got {len(values)}")
    return values * batch


def object_rows(counts: list[int]) -> Tensor:
    """(B, N) bool, true for the objects that each scene has."""
    return torch.arange(max(counts)) < torch.tensor(counts)[:, None]


def pad(rows: Tensor, length: int) -> Tensor:
    """(N, ...) -> (length, ...) with zeros behind."""
    return torch.cat([rows, rows.new_zeros(length - len(rows), *rows.shape[1:])])


def to_pil(image: Image.Image | np.ndarray | Tensor) -> Image.Image:
    """RGB of PIL, uint8 (H, W, 3), or (3, H, W) in [-1, 1]; ValueError for anything else."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return Image.fromarray(image)
    if isinstance(image, Tensor | np.ndarray):
        tensor = torch.as_tensor(image)
        if tensor.ndim == 3 and len(tensor) == 3 and tensor.is_floating_point():
            return to_images((tensor[None].float() + 1) / 2)[0]
    raise ValueError(f"`image` must be PIL, uint8 (H, W, 3) or floats (3, H, W) in [-1, 1], got {describe(image)}")


def to_picture(image: Image.Image | np.ndarray | Tensor, side: int) -> Tensor:
    """(3, side, side) in [-1, 1]; floats of that size are not rounded."""
    if isinstance(image, Tensor | np.ndarray) and tuple(image.shape) == (3, side, side):
        tensor = torch.as_tensor(image)
        if tensor.is_floating_point():
            return tensor.float()
    picture = to_pil(image)
    if picture.width != picture.height:
        raise ValueError(f"`image` must be square, as in training, got {picture.width} x {picture.height}")
    if picture.width != side:
        picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 127.5 - 1


def to_pointmap(pointmap: np.ndarray | Tensor, side: int) -> Tensor:
    """(3, side, side), 0 where there is nothing."""
    if not isinstance(pointmap, Tensor | np.ndarray) or pointmap.ndim != 3 or len(pointmap) != 3:
        raise ValueError(f"`pointmap` must be (3, H, W), got {describe(pointmap)}")
    return resize_nearest(torch.as_tensor(pointmap).float().nan_to_num(0.0, 0.0, 0.0), side)


def to_masks(masks: np.ndarray | Tensor, side: int) -> Tensor:
    """(N, side, side) of 0 and 1."""
    return resize_nearest((torch.as_tensor(masks) != 0).float(), side)


def resize_nearest(planes: Tensor, side: int) -> Tensor:
    # a mean across an edge would be a point, or half an object, that is not there
    return F.interpolate(planes[None], (side, side), mode="nearest-exact")[0]


def gather_tokens(tokens: list[Tensor], channels: int, num_slots: int) -> Sample:
    """`cond_tokens` (B, L, C) or (B, N, L, C), and `cond_mask` (B, L) where their numbers differ."""
    for x in tokens:
        if not isinstance(x, Tensor) or x.ndim not in (2, 3) or x.shape[-1] != channels or x.ndim != tokens[0].ndim:
            got = " and ".join(describe(y) for y in (tokens[0], x))
            raise ValueError(f"`cond_tokens` must be (L, {channels}) or (N, L, {channels}) for all scenes, got {got}")
    lengths = torch.tensor([x.shape[-2] for x in tokens])
    longest = int(lengths.max())
    rows = [F.pad(x, (0, 0, 0, longest - x.shape[-2])) for x in tokens]
    told = {"cond_tokens": torch.stack(rows if rows[0].ndim == 2 else [pad(x, num_slots) for x in rows])}
    if (lengths != longest).any():
        told["cond_mask"] = torch.arange(longest) < lengths[:, None]
    return told


def read_rotation(rotation: Tensor, where: str) -> Tensor:
    """A rotation (3, 3) or 6D -> 6D."""
    if tuple(rotation.shape) == (3, 3):
        if not torch.allclose(rotation.T @ rotation, torch.eye(3), atol=1e-3) or torch.det(rotation) < 0:
            raise ValueError(f"{where} a `rotation` that is orthonormal and no reflection, got {rotation.tolist()}")
        return rotation_6d(rotation)
    if tuple(rotation.shape) != (6,):
        raise ValueError(f"{where} a (3, 3) or 6D `rotation`, got {describe(rotation)}")
    if torch.linalg.cross(rotation[:3], rotation[3:]).norm() < 1e-6:
        raise ValueError(f"{where} a `rotation` whose halves are not parallel, got {rotation.tolist()}")
    return rotation


def describe(value: object) -> str:
    """For error texts."""
    if isinstance(value, Tensor | np.ndarray):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return type(value).__name__
