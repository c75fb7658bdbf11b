"""What `python -m evaluation.shortcut_scene` can be asked."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from evaluation.settings import ReportSettings, StepCounts


class Settings(ReportSettings):
    data: Path
    """scenes, encoded"""
    split: Literal["train", "val", "test"] = "val"
    """of --data"""
    steps: StepCounts = (1, 2, 4, 8, 32)
    """step counts"""
    flow: bool = False
    """also plain Euler, without telling the step size"""
    meshes: bool = False
    """also measure shapes (slow)"""
    num_scenes: int | None = Field(None, ge=1)
    """only the first ones; all if left out"""
    num_draws: int = Field(1, ge=1)
    """noises per scene"""
    guidance_scale: float = Field(1.0, ge=0)
    """of the sampling"""
    quarter_turns: bool = False
    """boxes turned by 90 degrees with their sides exchanged are equal"""
