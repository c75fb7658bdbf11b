"""Reader of the shapes of scenes, one item per object: what the occupancy VAE learns from.

The format is described in `data_prep/scenes/format.py`; poses and pictures are not read.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import SupportsInt

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from backlot.fingerprint import fingerprint
from backlot.samples import SampleKey
from data_prep.scenes.format import bad_scene, read_scene, scene_ids, unpack_occupancy


class OccupancyDataset(Dataset):
    """The objects of all scenes of a split, in their order. Items: `occupancy` (1, R, R, R) float32, 0 or 1.

    The grids are kept in memory, a bit per cell.

    Args:
        root, split: scenes lie in <root>/<split>.
        flip: mirror half of the items in x and half of them in y.
        rotate: turn items about z by a random multiple of a right angle. Both are drawn from `key.generator()`; keys
            without one give the grids as they are.

    Attributes: `resolution` R.

    Raises:
        ValueError: the split is missing or empty, or a scene is bad or of another resolution than the first; names
            scene and field.
    """

    def __init__(self, root: str | Path, split: str = "train", *, flip: bool = False, rotate: bool = False) -> None:
        self.flip, self.rotate = flip, rotate
        self.resolution = 0
        packed = []
        for name in scene_ids(root, split):
            folder = Path(root) / split / name
            scene = read_scene(folder, "shapes", conditionals=False)
            resolution = scene.metadata["resolution"]
            self.resolution = self.resolution or resolution
            if resolution != self.resolution:
                raise bad_scene(
                    folder, f"shapes: occupancy has resolution {resolution}, the first scene's {self.resolution}"
                )
            packed.append(scene.tensors["occupancy"])
        self._packed = torch.cat(packed).numpy()

    @cached_property
    def fingerprint(self) -> str:
        """Of all grids."""
        return fingerprint([self.resolution, self._packed.tobytes()])

    def __len__(self) -> int:
        return len(self._packed)

    def __getitem__(self, key: SampleKey | SupportsInt) -> dict[str, Tensor]:
        row = int(key)
        if not 0 <= row < len(self):
            raise IndexError(f"object {row} of {len(self)}")
        grid = unpack_occupancy(self._packed[row : row + 1], self.resolution)
        if (self.flip or self.rotate) and isinstance(key, SampleKey):
            grid = self._vary(grid, key.generator())
        return {"occupancy": torch.from_numpy(np.ascontiguousarray(grid, np.float32))}

    def _vary(self, grid: np.ndarray, generator: torch.Generator) -> np.ndarray:
        """(1, R, R, R) mirrored and turned."""
        mirrored = torch.rand(2, generator=generator) < 0.5
        quarters = int(torch.randint(4, (), generator=generator))
        if self.flip:
            grid = np.flip(grid, tuple(axis for axis in (1, 2) if mirrored[axis - 1]))
        return np.rot90(grid, quarters, (1, 2)) if self.rotate else grid
