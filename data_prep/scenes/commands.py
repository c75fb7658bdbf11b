"""The commands of `python -m data_prep.scenes`. A command's libraries are loaded once its arguments are understood."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from backlot.command_line import EXIT_INPUT, Positional, input_errors, parse
from backlot.config import Section
from backlot.program_settings import DeviceSettings

if TYPE_CHECKING:
    import torch

PROGRAM = "python -m data_prep.scenes"
DEFAULT_ROOT = Path("data/scenes")

Split = Literal["train", "val", "test"]


class Synth(Section):
    out: Path = DEFAULT_ROOT
    """folder of the scenes"""
    num_train: int = Field(4000, ge=1)
    """scenes to train on"""
    num_val: int = Field(200, ge=1)
    """scenes to validate"""
    num_test: int = Field(0, ge=0)
    """scenes for neither"""
    seed: int = Field(0, ge=0)
    """of everything that is drawn"""
    image_size: int = Field(32, ge=8)
    """side of the pictures in pixels"""
    resolution: int = Field(16, ge=4)
    """side of the occupancy grids"""
    num_objects: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (2, 5)
    """least and greatest of a scene"""
    stack_prob: float = Field(0.25, ge=0, le=1)
    """share of scenes with a stack"""
    families: tuple[str, ...] | None = None
    """kinds of objects; all if left out"""
    isotropic_scale: bool = False
    """shapes keep their aspect, one size per object"""
    num_workers: int = Field(0, ge=0)
    """processes beside this one"""


class Build(Section):
    glb: Path
    """a GLB file, or a folder of them"""
    out: Path = DEFAULT_ROOT
    """folder of the scenes"""
    split: Split | None = None
    """of all scenes; drawn if left out"""
    val_fraction: float = Field(0.1, ge=0, le=1)
    """share of val where drawn"""
    resolution: int = Field(16, ge=4)
    """side of the occupancy grids"""
    image_size: int = Field(32, ge=8)
    """side of the pictures in pixels"""
    isotropic_scale: bool = True
    """shapes keep their aspect"""
    bake_shear: bool = False
    """put a node's shear into its mesh, not refuse it"""


class EncodeOptions(DeviceSettings):
    split: Split | None = None
    """of the scenes; all of them if left out"""
    batch_size: int = Field(64, ge=1)
    """objects per call"""
    format: Literal["safetensors", "pt"] = "safetensors"
    """of the files"""
    image_encoder: Path | None = None
    """folder of a vision model, whose tokens of the picture to add"""
    overwrite: bool = False
    """encode again what another model has encoded"""


class Encode(EncodeOptions):
    root: Annotated[Path, Positional] = DEFAULT_ROOT
    """scenes with shapes"""
    vae: Path
    """folder of the occupancy VAE"""
    out: Path | None = None
    """where to; beside the shapes if left out"""


class Prepare(EncodeOptions):
    """`Encode` in the names of the guide."""

    input_scenes: Path
    """scenes with shapes"""
    vae_checkpoint: Path
    """folder of the occupancy VAE"""
    output_root: Path | None = None
    """where to; beside the shapes if left out"""


class Verify(DeviceSettings):
    root: Annotated[Path, Positional] = DEFAULT_ROOT
    """all scenes, or the folder of one"""
    scene_dir: Path | None = None
    """the same as ROOT"""
    vae: Path | None = None
    """also decode shapes with this VAE, and compare with the occupancy"""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if {"root", "scene_dir"} <= self.model_fields_set:
            raise ValueError("ROOT and --scene_dir are the same: give either")
        return self


class Stats(Section):
    root: Annotated[Path, Positional] = DEFAULT_ROOT
    """the scenes"""
    mode: Literal["zscore", "sam3d", "identity"] = "zscore"
    """kind of codec"""


class Example(Section):
    out: Path
    """folder of the scenes"""
    num_objects: int = Field(5, ge=1)
    """of each scene"""
    seed: int = Field(0, ge=0)
    """of everything that is drawn"""


def synth(argv: list[str] | None = None) -> None:
    """Make scenes of many kinds of objects on a floor, with pictures of them."""
    settings = parse(Synth, argv, f"{PROGRAM} synth", synth.__doc__)

    from data_prep.scenes.synth import build_synth

    with input_errors():
        build_synth(**settings.model_dump(exclude_none=True))
    print(f"{settings.num_train} scenes to train on, {settings.num_val} to validate: {settings.out}")


def build(argv: list[str] | None = None) -> None:
    """Make scenes of GLB files, an object per node."""
    settings = parse(Build, argv, f"{PROGRAM} build", build.__doc__)

    from data_prep.scenes.glb import build_glb

    with input_errors():
        count = build_glb(settings.glb, **settings.model_dump(exclude={"glb"}))
    print(f"{count} scenes: {settings.out}")


def encode(argv: list[str] | None = None) -> None:
    """Encode shapes with an occupancy VAE, and fit the statistics of the latents."""
    settings = parse(Encode, argv, f"{PROGRAM} encode", encode.__doc__)
    encode_into(settings.root, settings.vae, settings.out, settings)


def prepare(argv: list[str] | None = None) -> None:
    """The same as encode."""
    settings = parse(Prepare, argv, f"{PROGRAM} prepare", prepare.__doc__)
    encode_into(settings.input_scenes, settings.vae_checkpoint, settings.output_root, settings)


def encode_into(root: Path, vae: Path, out: Path | None, options: EncodeOptions) -> None:
    from data_prep.scenes.encode import encode_scenes

    with input_errors():
        count = encode_scenes(root, vae, out, **options.model_dump(include=set(EncodeOptions.model_fields)))
    print(f"{count} scenes encoded: {out or root}")


def verify(argv: list[str] | None = None) -> None:
    """Name every bad scene, one line each; the exit code is 2 if there is one."""
    settings = parse(Verify, argv, f"{PROGRAM} verify", verify.__doc__)

    from data_prep.scenes import check

    with input_errors():
        problems = check.verify(settings.scene_dir or settings.root, settings.vae, settings.device)
    for problem in problems:
        print(problem)
    print(f"problems: {len(problems)}")
    if problems:
        raise SystemExit(EXIT_INPUT)


def stats(argv: list[str] | None = None) -> None:
    """Describe scenes, and fit the codec to those to train on."""
    settings = parse(Stats, argv, f"{PROGRAM} stats", stats.__doc__)

    from data_prep.scenes.check import print_stats
    from data_prep.scenes.encode import compute_stats

    with input_errors():
        print_stats(settings.root)
        codec = compute_stats(settings.root, settings.mode)
    print(f"{settings.root / codec.config_name}: {settings.mode} codec of the train split")


def example(argv: list[str] | None = None) -> None:
    """Write a scene of random objects in a row on the floor for each split, to see the format."""
    settings = parse(Example, argv, f"{PROGRAM} example", example.__doc__)

    import torch

    from data_prep.scenes.format import write_scene

    generator = torch.Generator().manual_seed(settings.seed)
    for split in ("train", "val"):
        folder = settings.out / split / "example"
        with input_errors():
            write_scene(folder, **random_scene(settings.num_objects, generator), format="pt")
        print(folder)


def random_scene(count: int, generator: torch.Generator) -> dict[str, dict]:
    """Tensors, conditionals and metadata of a scene in the names of the guide."""
    import torch

    size = torch.empty(count, 3).uniform_(0.2, 0.5, generator=generator)
    angle = torch.rand(count, generator=generator) * 2 * math.pi
    first = torch.stack([angle.cos(), angle.sin(), torch.zeros(count)], dim=1)
    second = torch.stack([-angle.sin(), angle.cos(), torch.zeros(count)], dim=1)
    place = torch.stack([torch.arange(count) - (count - 1) / 2, torch.zeros(count), size[:, 2] / 2], dim=1)
    tensors = {
        "shape": torch.randn(count, 64, 8, generator=generator),
        "translation": place[:, None],
        "scale": size.log()[:, None],
        "6drotation_normalized": torch.cat([first, second], dim=1)[:, None],
    }
    conditionals = {
        "image": torch.rand(3, 32, 32, generator=generator) * 2 - 1,
        "pointmap": torch.randn(3, 32, 32, generator=generator),
    }
    metadata = {
        "scene_id": "example",
        "num_objects": count,
        "object_ids": [f"object_{i}" for i in range(count)],
        "frame": "floor",
        "shape_layout": "tokens_channels",
    }
    return {"tensors": tensors, "conditionals": conditionals, "metadata": metadata}
