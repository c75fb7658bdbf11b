"""Settings that the evaluation programs have in common. Loads without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from backlot.program_settings import ModelSettings, TypedModelSettings

StepCounts = tuple[Annotated[int, Field(ge=1)], ...]


class SamplingSettings(ModelSettings):
    seed: int = Field(0, ge=0)
    """of the noise"""
    batch_size: int = Field(32, ge=1)
    """samples that go through the network together"""


class ReportSettings(SamplingSettings, TypedModelSettings):
    """A program that prints tables and writes all figures to one JSON file."""

    output: Path | None = None
    """JSON with everything; MODEL_DIR/evaluation.json if left out"""
