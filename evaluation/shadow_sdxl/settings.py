"""What `python -m evaluation.shadow_sdxl` can be asked."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from evaluation.settings import ReportSettings, StepCounts


class Settings(ReportSettings):
    data: Path | None = None
    """shadow data: a folder, a tar or a folder of tars"""
    split: Literal["train", "validation", "all"] = "all"
    """of --data; validation: objects held out"""
    benchmark: Path | None = None
    """the three tracks, public or rendered; never split"""
    train_data: Path | None = None
    """gives the mean map; the data that are measured on do without it"""
    steps: StepCounts = (1, 4, 20)
    """step counts"""
    num_draws: int = Field(10, ge=1)
    """noises per map"""
    haze: float = Field(1 / 255, ge=0, le=1)
    """values up to this do not count in IoU"""
    resolution: int | None = Field(None, ge=1)
    """side of the maps; that of the model's training if left out"""
    metric_resolution: int | None = Field(None, ge=11)
    """also measure maps resized to this side"""
    batch_size: int = Field(8, ge=1)
    """samples that go through the network together"""

    @model_validator(mode="after")
    def _unseen_data(self) -> Self:
        if self.data is None and self.benchmark is None:
            raise ValueError("give --data or --benchmark, or both")
        trained_on = self.data and self.train_data and self.train_data.resolve() == self.data.resolve()
        if trained_on and self.split != "validation":
            raise ValueError(f"--data {self.data} is --train_data too: only its --split validation was not trained on")
        return self
