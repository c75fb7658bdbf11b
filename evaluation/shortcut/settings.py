"""What `python -m evaluation.shortcut` can be asked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from evaluation.settings import SamplingSettings, StepCounts


class Settings(SamplingSettings):
    dataset_name: Literal["digits", "mnist", "imagefolder", "hub", "latents"] = "digits"
    """the real pictures"""
    path: str | None = None
    """their folder or hub name"""
    split: str | None = None
    """what samples are compared with: all for digits, otherwise train, if left out"""
    num_samples: int = Field(1797, ge=2)
    """of each way of sampling"""
    steps: StepCounts = (1, 2, 4, 8, 128)
    """step counts"""
    step_sizes: tuple[float, ...] | None = None
    """one list of irregular steps more, of sum 1"""
    guidance_scale: tuple[Annotated[float, Field(ge=0)], ...] = (1.0,)
    """of the sampling"""
    mode: tuple[Literal["shortcut", "flow"], ...] = ("shortcut",)
    """told the step size, or as a plain flow"""
    unconditional: bool = False
    """sample without classes; assumed where the run's config.yaml says so"""
    batch_size: int = Field(600, ge=1)
    """samples that go through the network together"""
    inception_weights: Path | None = None
    """TorchScript Inception-v3 for FID and KID"""
    loss_samples: int = Field(256, ge=1)
    """held-out samples for the loss"""
    num_time_bins: int = Field(32, ge=1)
    """times for the loss"""
    dataloader_num_workers: int = Field(0, ge=0)
    """processes that read pictures"""
    output_dir: Path | None = None
    """MODEL_DIR/evaluation if left out"""
