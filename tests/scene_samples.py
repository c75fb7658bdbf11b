"""Tiny scenes in the format of data_prep/scenes/format.py, for the tests of everything that reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from data_prep.scenes.format import read_metadata, read_tensors, write_metadata, write_scene

COND_TOKENS, COND_CHANNELS = 5, 7


def random_rotations(count: int, generator: torch.Generator) -> torch.Tensor:
    """Proper rotations (count, 3, 3)."""
    matrices = torch.linalg.qr(torch.randn(count, 3, 3, generator=generator))[0]
    return matrices * matrices.det()[:, None, None]  # -M turns a reflection into a rotation


def make_scene(
    seed: int = 0,
    *,
    count: int = 3,
    tokens: int = 4,
    channels: int = 3,
    image_size: int = 16,
    resolution: int | None = None,
    cond_tokens: int = COND_TOKENS,
    layout: str = "tokens_channels",
) -> dict:
    """The arguments of `write_scene` for a random scene of `count` objects above the floor.

    The seed and the number of the object can be read off everything that belongs to it: the first coordinate of the
    translation is seed + object / 100, so is the first number of its shape; its mask has object + 1 pixels, the first
    pixel of the picture is the seed. With a `resolution`, `tensors` are shapes instead of latents.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = seed + torch.arange(count) / 100
    translation = torch.randn(count, 1, 3, generator=generator)
    translation[:, 0, 0], translation[:, 0, 2] = rows, 3
    rotations = random_rotations(count, generator)
    poses = {
        "translation": translation,
        "scale": torch.empty(count, 1, 3).uniform_(0.2, 0.8, generator=generator).log(),
        "6drotation_normalized": rotations[:, :, :2].transpose(1, 2).reshape(count, 1, 6).contiguous(),
    }
    metadata = {
        "scene_id": f"{seed:04d}",
        "num_objects": count,
        "object_ids": [f"{seed:04d}_{number}" for number in range(count)],
        "frame": "floor",
        "scene_shift": [0.0, 0.0, 0.0],
        "scene_scale": 1.0,
        "isotropic_scale": False,
    }
    if resolution is None:
        shape = torch.randn(count, tokens, channels, generator=generator)
        shape[:, 0, 0] = rows
        if layout == "channels_tokens":
            shape = shape.transpose(1, 2)
        tensors, kind = {"shape": shape, **poses}, "latents"
        metadata["shape_layout"] = layout
    else:
        grids = torch.rand(count, resolution**3 // 8, generator=generator).mul(255).byte()
        tensors, kind = {"occupancy": grids | 1, **poses}, "shapes"
        metadata["resolution"] = resolution
    image = torch.randint(0, 256, (3, image_size, image_size), generator=generator, dtype=torch.uint8)
    image[:, 0, 0] = seed % 256
    pointmap = torch.randn(3, image_size, image_size, generator=generator)
    pointmap[:, : image_size // 2] = torch.nan
    masks = torch.zeros(count, image_size * image_size, dtype=torch.uint8)
    for number in range(count):
        masks[number, : number + 1] = 1
    conditionals = {
        "image": image,
        "pointmap": pointmap,
        "masks": masks.view(count, image_size, image_size),
        "cond_tokens": torch.randn(cond_tokens, COND_CHANNELS, generator=generator),
    }
    return {"tensors": tensors, "conditionals": conditionals, "metadata": metadata, "kind": kind}


def write_scenes(
    root: str | Path,
    splits: Mapping[str, int] | None = None,
    *,
    tokens: int = 4,
    channels: int = 3,
    num_objects: tuple[int, int] = (2, 4),
    image_size: int = 16,
    seed: int = 0,
    resolution: int | None = None,
    format: str = "safetensors",
    layout: str = "tokens_channels",
    stats: bool = False,
) -> Path:
    """Write scenes <root>/<split>/<0000...>, their numbers of objects cycling through the range; returns `root`.

    Args:
        splits: scenes per split, {"train": 6, "val": 3} by default.
        resolution: write shapes of this size instead of latents.
        stats: also stats.json of the train split.
    """
    low, high = num_objects
    number = seed
    for split, scenes in (splits or {"train": 6, "val": 3}).items():
        for _ in range(scenes):
            scene = make_scene(
                number,
                count=low + number % (high - low + 1),
                tokens=tokens,
                channels=channels,
                image_size=image_size,
                resolution=resolution,
                layout=layout,
            )
            write_scene(Path(root) / split / scene["metadata"]["scene_id"], **scene, format=format)
            number += 1
    if stats:
        from data_prep.scenes.encode import compute_stats

        compute_stats(root)
    return Path(root)


def change_tensors(folder: str | Path, kind: str = "latents", **changes: torch.Tensor | None) -> None:
    """Replace tensors of a scene's safetensors file, unchecked; None removes one."""
    tensors = {**read_tensors(folder, kind), **changes}
    kept = {name: value.contiguous() for name, value in tensors.items() if value is not None}
    save_file(kept, Path(folder) / f"{kind}.safetensors")


def change_metadata(folder: str | Path, **changes: object) -> None:
    """Replace entries of a scene's metadata, unchecked; None removes one."""
    metadata = {**read_metadata(folder), **changes}
    write_metadata(Path(folder), {name: value for name, value in metadata.items() if value is not None})
