"""What `python -m data_prep.layouts prepare` is told. Loads without torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from backlot.command_line import DtypeName
from backlot.program_settings import DeviceSettings

RESOLUTIONS = {"full": 512, "demo": 32}
SEQUENCE_LENGTHS = {"full": 512, "demo": 24}


class PrepareSettings(DeviceSettings):
    output_dir: Path = Path("output_data")
    """folder of the prepared layouts; if it holds a part, that is completed"""
    source: Literal["procedural", "coco", "layoutsam", "denselayout", "folder"] = "procedural"
    """drawn scenes, or what --path holds; denselayout is for evaluation only"""
    path: Path | None = None
    """COCO's instances JSON; rows of LayoutSAM or DenseLayout (.jsonl, .json, .parquet or a folder of them); a folder
    with captions"""
    images: Path | None = None
    """folder of the pictures, where the rows do not hold them"""
    num_samples: int | None = Field(None, ge=1)
    """scenes to draw [1000], or samples to take [all]"""
    profile: Literal["full", "demo"] = "full"
    """of drawn scenes; demo: 32 pixels, a short prompt"""
    held_out: bool = False
    """draw scenes of identities that training scenes never show, for evaluation only"""
    evaluation_only: bool = False
    """never to be trained on, as a benchmark"""
    resolution: int | None = Field(None, ge=16)
    """side of the pictures in pixels [512, demo 32]"""
    models: str = "real"
    """real, tiny (random ones, written to OUTPUT_DIR/models), or a folder of models"""
    model_root: Path | None = None
    """folder that holds the real models under their hub ids"""
    vae: str | None = None
    """in place of FLUX's: a folder, a hub id, or pixels:N for N x N pixels as channels"""
    max_sequence_length: int | None = Field(None, ge=2, le=512)
    """T5 tokens of a prompt [512, demo 24]"""
    dtype: DtypeName | None = None
    """that the models compute in, and in which prompts are stored; by default bfloat16 on an accelerator"""
    batch_size: int = Field(32, ge=1)
    """samples, with all their objects, per call of a model"""
    num_workers: int = Field(min(os.cpu_count() or 1, 4), ge=0)
    """processes that draw scenes and read pictures"""
    train_split: float = Field(0.9, gt=0, le=1)
    """share of the samples to train on; the others are for validation"""
    seed: int = Field(0, ge=0)
    """of drawn scenes"""
    adopt_embeddings: bool = False
    """take CLIP and DINOv2 embeddings of crops from PATH/embedding, files <id>_obj<k>.npy or .pt"""
    overwrite: bool = False
    """make everything anew, also what was made otherwise"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.source == "procedural") != (self.path is None):
            verb = "is drawn, and takes no" if self.source == "procedural" else "needs a"
            raise ValueError(f"--source {self.source} {verb} --path")
        if self.held_out and self.source != "procedural":
            raise ValueError("--held_out is of --source procedural")
        if self.adopt_embeddings and self.source != "folder":
            raise ValueError("--adopt_embeddings is of --source folder")
        return self

    @property
    def side(self) -> int:
        """Of the pictures in pixels."""
        return self.resolution or RESOLUTIONS[self.profile]

    @property
    def sequence_length(self) -> int:
        return self.max_sequence_length or SEQUENCE_LENGTHS[self.profile]

    @property
    def is_for_evaluation(self) -> bool:
        return self.evaluation_only or self.held_out or self.source == "denselayout"
