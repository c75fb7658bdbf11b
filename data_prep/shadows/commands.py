"""The commands of `python -m data_prep.shadows`. A command's libraries are loaded once its arguments are understood."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from backlot.command_line import EXIT_CRASH, EXIT_INPUT, Positional, input_errors, leave, parse
from backlot.config import Section
from backlot.program_settings import EncodingSettings
from data_prep.shadows.render import Settings as RenderDefaults

DEFAULTS = RenderDefaults()


class Render(Section):
    out: Path
    """folder of the data set; if it holds a part, that is completed"""
    num_samples: int = Field(1500, ge=1)
    """of random lights; the tracks have numbers of their own"""
    image_size: int = Field(DEFAULTS.image_size, ge=8)
    """side of the pictures in pixels"""
    meshes: str | None = None
    """folder with glb, gltf, obj, ply and stl below it, instead of made objects"""
    theta: tuple[float, float] = DEFAULTS.theta
    """least and greatest angle of the light from overhead, degrees"""
    phi: tuple[float, float] = DEFAULTS.phi
    """least and greatest: 0 = light on the right, 90 = behind the object, degrees"""
    size: tuple[float, float] = DEFAULTS.size
    """least and greatest side of the square light, 8 units away; objects measure about 2"""
    camera: tuple[float, float] = DEFAULTS.camera
    """least and greatest distance of the camera"""
    grid: Literal["continuous", "integer"] = DEFAULTS.grid
    """of the lights"""
    spp: int = Field(DEFAULTS.spp, ge=1)
    """samples per pixel; 256 for clean wide penumbrae"""
    lights_per_view: int = Field(DEFAULTS.lights_per_view, ge=1)
    """shadows of each object before its camera"""
    shadow_bits: Literal[8, 16] = DEFAULTS.shadow_bits
    """of a pixel of the shadow maps"""
    tracks: bool = False
    """render the three benchmark tracks on objects of their own"""
    num_models: int = Field(50, ge=1)
    """of the first track; 0.3 times as many of the others"""
    format: Literal["folder", "webdataset"] = DEFAULTS.format
    """loose files, or tars"""
    shard_size: int = Field(DEFAULTS.shard_size, ge=1)
    """samples per tar, at most"""
    num_workers: int = Field(os.cpu_count() or 1, ge=1)
    """processes"""
    seed: int = Field(DEFAULTS.seed, ge=0)
    """of objects, cameras, lights and noise"""
    variant: Literal["auto", "cuda_ad_rgb", "llvm_ad_rgb", "scalar_rgb"] = "auto"
    """of Mitsuba"""


class Check(Section):
    path: Annotated[Path, Positional]
    """a folder, a tar or a folder of tars"""
    statistics: bool = False
    """describe the good samples"""
    contact_sheet: Path | None = None
    """a PNG file to be drawn, with some of the good samples"""
    num_samples: int = Field(12, ge=1)
    """rows of the contact sheet"""
    image_size: int = Field(128, ge=8)
    """side of the contact sheet's pictures in pixels"""
    num_workers: int = Field(0, ge=0)
    """processes that read pictures"""


class Encode(EncodingSettings):
    path: Path
    """shadow data: a folder, a tar or a folder of tars"""
    split: Literal["train", "validation", "all"] = "train"
    """of the data"""
    fill: float = Field(0.5, ge=0, le=1)
    """grey behind objects with alpha"""
    output_dir: Path | None = None
    """PATH/latents/SPLIT-SIZE-VAE, where the trainer looks for it, if left out"""
    verify: bool = False
    """check a complete cache against all pictures"""


def render(argv: list[str] | None = None) -> None:
    """Render objects, their masks and their soft shadows with Mitsuba 3, to train and to measure shadow generation.

        python -m data_prep.shadows render --out data/shadows --num_samples 1500 --image_size 512
        python -m data_prep.shadows render --out data/mine --meshes my_meshes --num_samples 20000 --format webdataset
        python -m data_prep.shadows render --out data/tracks --tracks      # the three grids of the public benchmark

    A run that was killed goes on with the same command. More --num_samples extend a folder.
    """
    settings = parse(Render, argv, "python -m data_prep.shadows render", render.__doc__)

    from concurrent.futures.process import BrokenProcessPool

    from data_prep.shadows.render import render_dataset

    try:
        with input_errors():
            count = render_dataset(**settings.model_dump())
    except BrokenProcessPool:
        raise leave(EXIT_CRASH, "a worker died, perhaps for want of memory: fewer --num_workers") from None
    print(f"{settings.out}: {count} samples")


def check(argv: list[str] | None = None) -> None:
    """Name every bad sample of shadow data, one line each; tell what the good ones are like, and draw some of them.

        python -m data_prep.shadows check data/shadows --statistics --contact_sheet sheet.png --num_workers 4

    The exit code is 2 if there is a bad sample, or no good one.
    """
    settings = parse(Check, argv, "python -m data_prep.shadows check", check.__doc__)

    from data_prep.shadows.check import Findings, contact_sheet, describe, examine

    with input_errors():
        findings = Findings(settings.path)
    for line in findings.broken:
        print(line)
    good = examine(findings, settings.num_workers)
    if settings.statistics and good:
        print("\n".join(describe(good)))
    if settings.contact_sheet and good:
        with input_errors():
            sheet = contact_sheet(findings, good, settings.num_samples, settings.image_size)
            sheet.save(settings.contact_sheet)
    bad = len(findings) - len(good)
    broken = f", unreadable tars: {len(findings.broken)}" if findings.broken else ""
    print(f"samples: {len(findings)}, bad: {bad}{broken}")
    if bad or broken or not good:
        raise SystemExit(EXIT_INPUT)


def encode(argv: list[str] | None = None) -> None:
    """Encode shadow data once with a VAE, so that training reads latents of objects and shadows instead of pictures.

        python -m data_prep.shadows encode --vae sdxl/vae --path shadows --image_size 1024

    The format is described in `data_prep/shadows/latents.py`, which reads it. Killed at any moment, the same command
    goes on after the last complete shard; a complete cache is left as it is while stems, lights and sizes of the files
    are the same, and checked picture by picture with --verify.
    """
    settings = parse(Encode, argv, "python -m data_prep.shadows encode", encode.__doc__)

    from backlot.latent_cache import local_vae_folder, vae_fingerprint
    from data_prep.shadows.dataset import ShadowDataset
    from data_prep.shadows.encode import encode_shadows, latents_folder

    with input_errors():
        vae_folder = local_vae_folder(settings.vae)
        dataset = ShadowDataset(settings.path, split=settings.split, image_size=settings.image_size, fill=settings.fill)
        output_dir = settings.output_dir or latents_folder(dataset, vae_fingerprint(vae_folder))
        manifest = encode_shadows(
            vae_folder,
            dataset,
            output_dir,
            batch_size=settings.batch_size,
            shard_size=settings.shard_size,
            dtype=settings.dtype,
            device=settings.device,
            dataloader_num_workers=settings.dataloader_num_workers,
            overwrite=settings.overwrite,
            verify=settings.verify,
        )
    print(f"{manifest.num_samples} samples in {len(manifest.shards)} shards: {output_dir}")
