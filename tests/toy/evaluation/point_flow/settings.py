"""What `python -m evaluation.point_flow` can be asked."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from evaluation.settings import ReportSettings, StepCounts


class Settings(ReportSettings):
    data: Path
    """folder of points"""
    split: Literal["train", "val"] = "val"
    """of --data"""
    steps: StepCounts = (1, 2, 4, 16)
    """step counts"""
    batch_size: int = Field(1024, ge=1)
    """points that go through the network together"""
