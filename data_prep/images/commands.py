"""The commands of `python -m data_prep.images`. A command's libraries are loaded once its arguments are understood."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from backlot.command_line import DtypeName, input_errors, parse
from backlot.program_settings import EncodingSettings


class Encode(EncodingSettings):
    dataset_name: Literal["digits", "mnist", "imagefolder", "hub"]
    """the pictures"""
    path: str | None = None
    """folder of the images, or hub id of the dataset"""
    split: str = "train"
    """of the dataset"""
    image_column: str = "image"
    """of a hub dataset"""
    label_column: str = "label"
    """of a hub dataset"""
    output_dir: Path
    """one folder per split, e.g. latents/train"""
    mean_only: bool = False
    """half the size; reading then gives the posterior mean"""
    flip: bool = True
    """also encode mirrored pictures"""
    batch_size: int = Field(32, ge=1)
    """pictures per call of the VAE"""
    shard_size: int = Field(4096, ge=1)
    """samples per file"""
    dtype: DtypeName = "float32"
    """stored type; the VAE runs in float32"""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """share of unreadable pictures that stops it"""

    @model_validator(mode="after")
    def _pictures_have_one_size(self) -> Self:
        if self.dataset_name in ("imagefolder", "hub") and self.image_size is None:
            raise ValueError(f"pictures of {self.dataset_name} have many sizes: set --image_size")
        return self


def encode(argv: list[str] | None = None) -> None:
    """Encode a picture dataset once with a VAE, so that training reads latents instead of pictures.

        python -m data_prep.images encode --vae stabilityai/sd-vae-ft-mse --dataset_name imagefolder --path photos \\
            --image_size 256 --output_dir latents/train

    The format is described in `data_prep/images/latents.py`, which reads it. Killed at any moment, the same command
    goes on after the last complete shard. It reads all pictures again to be sure that they are still the same, which
    costs no VAE time.
    """
    settings = parse(Encode, argv, "python -m data_prep.images encode", encode.__doc__)

    from backlot.latent_cache import local_vae_folder
    from backlot.loading import default_device
    from data_prep.images.dataset import open_images
    from data_prep.images.encode import encode_dataset

    with input_errors():
        dataset = open_images(
            settings.dataset_name,
            path=settings.path,
            split=settings.split,
            image_size=settings.image_size,
            image_column=settings.image_column,
            label_column=settings.label_column,
            max_bad_fraction=settings.max_bad_fraction,
            quarantine_path=settings.output_dir / "quarantine.jsonl",
        )
        manifest = encode_dataset(
            local_vae_folder(settings.vae),
            dataset,
            settings.output_dir,
            dataset_name=settings.dataset_name,
            split=settings.split,
            mean_only=settings.mean_only,
            flip=settings.flip,
            batch_size=settings.batch_size,
            shard_size=settings.shard_size,
            dtype=settings.dtype,
            device=settings.device or default_device(),
            dataloader_num_workers=settings.dataloader_num_workers,
            overwrite=settings.overwrite,
        )
    print(f"{manifest.num_samples} samples in {len(manifest.shards)} shards: {settings.output_dir}")
