"""What `python -m evaluation.layout_flux` can be asked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from backlot.command_line import DtypeName, Positional
from backlot.config import Section
from backlot.program_settings import DeviceSettings

BenchmarkName = Literal["layoutsam", "denselayout", "cocomig"]


class Sampling(Section):
    """How pictures are drawn."""

    num_inference_steps: int = Field(16, ge=1)
    """equal steps"""
    grounding_ratio: float = Field(1.0, gt=0, le=1)
    """share of the steps that are told the layout"""
    guidance_scale: float = Field(3.5, ge=0)
    """what a guidance-distilled base is told"""
    layout_guidance_scale: float = Field(1.0, ge=0)
    """above 1, away from what the base draws without the layout; twice the work"""


class GenerationSettings(DeviceSettings, Sampling):
    """A program that draws pictures with layout adapters."""

    base_model: str | None = None
    """folder or hub id of the FLUX pipeline that adapters are loaded into; exported pipelines bring theirs"""
    dtype: DtypeName = "float32"
    """that the base computes in"""

    def sampling(self) -> Sampling:
        return Sampling(**{name: getattr(self, name) for name in Sampling.model_fields})


class Variants(Section):
    """How many layouts each variant is drawn for; 0 leaves it out."""

    num_layouts: int = Field(256, ge=1)
    """as they are"""
    num_shuffled: int = Field(128, ge=0)
    """with the references of other objects of the same shape and colour"""
    num_swapped: int = Field(128, ge=0)
    """with the descriptions of two boxes exchanged"""
    num_without_feedback: int = Field(256, ge=0)
    """with the feedback bridge off, where there is one"""


class Settings(GenerationSettings, Variants):
    models: Annotated[tuple[str, ...], Positional]
    """FOLDER or NAME=FOLDER of exported pipelines, runs or adapters; each is compared with the one before it"""
    data: Path
    """layouts, prepared from procedural scenes, that no model has seen"""
    split: Literal["train", "validation", "test", "all"] = "all"
    """of --data"""
    encoders: str | None = None
    """folder with its CLIP and DINOv2, or `real`; by default DATA/models if it is there, or else the real ones"""
    no_layout: bool = True
    """also measure the first model's base without any layout"""
    seed: int = Field(0, ge=0)
    """of the noise"""
    batch_size: int = Field(32, ge=1)
    """pictures that go through the network together"""
    output: Path = Path("outputs/layout_flux/evaluation.json")
    """JSON with all figures"""

    @model_validator(mode="after")
    def _named(self) -> Self:
        names = list(self.named_models())
        if len(names) < len(self.models):
            raise ValueError(f"MODELS {' '.join(self.models)}: two have one name; give them as NAME=FOLDER")
        if "no_layout" in names:
            raise ValueError("no_layout is the name of the base without any layout")
        return self

    def variants(self) -> Variants:
        return Variants(**{name: getattr(self, name) for name in Variants.model_fields})

    def named_models(self) -> dict[str, str]:
        """Name -> folder; the folder's own name where none is given."""
        pairs = (model.partition("=") for model in self.models)
        return {(name if folder else Path(name).name): (folder or name) for name, _, folder in pairs}
