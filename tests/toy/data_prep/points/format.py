"""The format of points, its writer and its reader.

    <folder>/train.safetensors      tensor `points` (N, 2), float32, finite, in any unit
    <folder>/val.safetensors        the same, never trained on

Data should have a standard deviation of about 1 in each direction, as the noise that flows start from.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from backlot.files import write_file

SPLITS = ("train", "val")


def write_points(folder: Path, split: str, points: Tensor) -> Path:
    """Write one split, whole or not at all; its file.

    Args:
        points: (N, 2), finite; stored in float32.

    Raises:
        ValueError: no such split, or no such points.
    """
    path = folder / f"{_known(split)}.safetensors"
    stored = check_points(points.to(torch.float32).contiguous(), str(path))
    folder.mkdir(parents=True, exist_ok=True)
    write_file(path, save({"points": stored}))
    return path


def read_points(folder: Path, split: str) -> Tensor:
    """The points (N, 2) of one split, float32.

    Raises:
        ValueError: the split is missing or damaged; the text names the file.
    """
    path = Path(folder) / f"{_known(split)}.safetensors"
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    if "points" not in tensors:
        raise ValueError(f"{path} has no tensor `points`")
    return check_points(tensors["points"], str(path))


def check_points(points: Tensor, name: str) -> Tensor:
    """The points themselves; ValueError says what of `name` is not as the format has it."""
    if points.ndim != 2 or points.shape[1] != 2 or len(points) == 0 or points.dtype != torch.float32:
        raise ValueError(f"{name}: `points` must be (N, 2) float32, got {tuple(points.shape)} {points.dtype}")
    if not points.isfinite().all():
        raise ValueError(f"{name}: `points` must be finite, row {int((~points.isfinite()).any(1).nonzero()[0])} is not")
    return points


def _known(split: str) -> str:
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, got {split!r}")
    return split
