"""Settings that several programs have in common. Loads without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from backlot.command_line import DtypeName, Positional
from backlot.config import Section


class DeviceSettings(Section):
    device: str | None = None
    """where models run; the accelerator if there is one"""


class ModelSettings(DeviceSettings):
    """A program that loads what a run exported."""

    model_dir: Annotated[Path, Positional]
    """folder of an exported pipeline, or of a finished run"""


class TypedModelSettings(ModelSettings):
    dtype: DtypeName = "float32"
    """that the model computes in"""


class EncodingSettings(DeviceSettings):
    """A program that encodes a data set once with a VAE into a latent cache."""

    vae: str
    """folder of an AutoencoderKL, or its hub id"""
    image_size: int | None = Field(None, ge=1)
    """side of the pictures in pixels; as they are if left out"""
    batch_size: int = Field(8, ge=1)
    """samples per call of the VAE"""
    shard_size: int = Field(1024, ge=1)
    """samples per file"""
    dtype: DtypeName = "float16"
    """stored type; the VAE runs in float32"""
    dataloader_num_workers: int = Field(0, ge=0)
    """processes that read pictures"""
    overwrite: bool = False
    """throw away what the output folder holds"""
