"""What `python -m evaluation.vpog` can be asked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from backlot.command_line import DtypeName, Positional
from backlot.config import Section
from backlot.program_settings import DeviceSettings

MODEL = Path("outputs/vpog")


class Answering(Section):
    """How the pipeline is asked for poses."""

    num_templates: int | None = Field(None, ge=1)
    """how many the encoder leaves for the network; all if left out"""
    group_size: int = Field(4, ge=1)
    """templates that the network sees together"""
    num_hypotheses: int = Field(5, ge=1)
    """poses that are made of each object; the best one is the answer"""
    second_pass: bool = False
    """look again round the first estimate"""
    in_plane: Literal["network", "rotate_templates"] = "network"
    """whether turns in the picture are left to the network, or templates are turned"""
    num_rotations: int = Field(12, ge=1)
    """in so many steps"""
    flow: Literal["dense", "center", "none"] | None = None
    """what places points beside the patches' classes; the finest that the network has if left out"""
    solver: Literal["auto", "poselib", "opencv"] = "auto"
    """RANSAC's"""


class DatasetSettings(DeviceSettings, Answering):
    """A program that estimates poses of a BOP dataset."""

    model: Path = MODEL
    """folder of an exported pipeline, or of a finished run"""
    dtype: DtypeName = "float32"
    """that the model computes in"""
    dataset: Path
    """a BOP dataset: models/ and scenes"""
    split: str = "test"
    """folder of the scenes"""
    templates: Path | None = None
    """folder of the templates; `templates` in the dataset if left out"""
    token_cache: Path | None = None
    """folder in which tokens of templates are kept"""
    detections: Path | None = None
    """a detector's JSON file; the true masks, jittered, if left out"""
    seed: int = Field(0, ge=0)
    """of jitter and RANSAC"""
    num_objects: int | None = Field(None, ge=1)
    """at most so many objects in pictures, evenly chosen; without --detections"""

    def answering(self) -> Answering:
        return Answering(**{name: getattr(self, name) for name in Answering.model_fields})

    @property
    def template_folder(self) -> Path:
        return self.templates or self.dataset / "templates"


class PredictSettings(DatasetSettings):
    out: Path = Path("results.csv")
    """the poses, as the BOP challenge takes them: METHOD_DATASET-SPLIT.csv"""


class MeasureSettings(DatasetSettings):
    num_turned: int = Field(64, ge=0)
    """objects in pictures that are also turned in eight steps; 0 leaves it out"""
    num_patch_samples: int = Field(256, ge=1)
    """objects in pictures whose patches are compared with their labels"""
    out: Path = Path("outputs/vpog/evaluation")
    """folder for metrics.json and results.csv"""


class ScoreSettings(Section):
    results: Annotated[Path, Positional]
    """poses as csv"""
    dataset: Path | None = None
    """the BOP dataset; that which `predict` noted beside the csv if left out"""
    split: str | None = None
    """folder of the scenes; as noted, or else test"""
    no_vsd: bool = False
    """leave out VSD, which renders every pose, and with it AR"""
    output: Path | None = None
    """JSON with the figures"""
