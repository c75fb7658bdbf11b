"""What the commands of `python -m data_prep.bop` are told. Loads without torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from backlot.command_line import Positional
from backlot.config import Section

SCENES_SIZE = (640, 480)


class RenderTemplatesSettings(Section):
    models: Path
    """folder of meshes: with models_info.json, or below gso_models.json or shapenet_models.json"""
    out: Path
    """folder of the templates; if it holds a part, that is completed"""
    views: Literal[42, 162, 642] = 162
    """per object, spread evenly over the sphere"""
    size: int = Field(224, ge=8)
    """side of the pictures in pixels"""
    objects: tuple[int, ...] | None = None
    """ids of the objects; all if left out"""
    unit: float | None = Field(None, gt=0)
    """metres per unit of the meshes, if it is not the usual one of such a folder"""
    backend: Literal["auto", "zbuffer", "gl"] = "auto"
    """renderer; auto takes gl where there is a context for it"""
    supersample: int = Field(2, ge=1, le=8)
    """pixels that are rendered per side of a pixel"""
    num_workers: int = Field(min(os.cpu_count() or 1, 4), ge=1)
    """processes"""
    overwrite: bool = False
    """render anew what is there"""


class IndexSettings(Section):
    folder: Annotated[Path, Positional]
    """with tar shards or BOP scenes, or with folders of these"""
    models: Path | None = None
    """folder of the meshes; by default `models` beside the shards or scenes"""
    unit: float | None = Field(None, gt=0)
    """metres per unit of the meshes, if it is not the usual one of such a folder"""
    depth: Literal["measured", "divide", "multiply"] = "measured"
    """what depth_scale of shards does to the numbers; measured: what agrees with the poses"""


class CheckSettings(Section):
    path: Annotated[Path, Positional]
    """a folder with tar shards or BOP scenes, or a csv file of results"""
    num_samples: int | None = Field(None, ge=1)
    """that are read, evenly spread; all if left out"""
    min_visib: float = Field(0.1, ge=0, lt=1)
    """objects are left out of whose silhouette no more than this share is seen"""
    skip_shards: tuple[int, ...] = ()
    """numbers of shards that are left out"""
    dataset: Path | None = None
    """of results: a BOP dataset with test_targets_bop19.json"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dataset is not None and self.path.suffix != ".csv":
            raise ValueError("--dataset is for a csv file of results")
        return self


class MakeScenesSettings(Section):
    out: Path
    """folder of the BOP dataset; if it holds a part, that is completed"""
    split: str = Field("train", pattern=r"^[a-z][a-z0-9_]*$")
    """folder of the scenes"""
    num_objects: int = Field(20, ge=1)
    """that are made"""
    num_symmetric: int | None = Field(None, ge=0)
    """of them, with symmetries; a quarter if left out"""
    num_images: int = Field(1000, ge=1)
    """of the split"""
    image_size: tuple[int, int] = SCENES_SIZE
    """width and height of the pictures in pixels"""
    seed: int = Field(0, ge=0)
    """of objects and scenes; other objects are never seen in training"""
    num_workers: int = Field(min(os.cpu_count() or 1, 4), ge=1)
    """processes"""
    shards: bool = False
    """write tar shards, too, in OUT/SPLIT_web"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_symmetric is not None and self.num_symmetric > self.num_objects:
            raise ValueError(f"--num_symmetric must be at most --num_objects {self.num_objects}")
        if min(self.image_size) < 8:
            raise ValueError(f"--image_size must be at least 8 8, got {self.image_size[0]} {self.image_size[1]}")
        return self
