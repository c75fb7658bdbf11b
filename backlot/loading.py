"""Exported pipelines, loaded for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import DiffusionPipeline

from backlot.codecs import DTYPES
from backlot.command_line import fail

P = TypeVar("P", bound=DiffusionPipeline)


def load_pipeline(kind: type[P], folder: Path, device: str | None = None, dtype: str = "float32") -> P:
    """Load an exported pipeline of the given kind; `fail` if there is none.

    Args:
        device: the accelerator if there is one, by default.
        dtype: one of `DTYPES`.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        fail(f"{folder} holds no exported pipeline (no model_index.json); a run exports one when it finishes")
    try:
        found = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError):
        fail(f"{index} is damaged")
    if found != kind.__name__:
        fail(f"{folder} holds a {found}, not a {kind.__name__}")
    if device is None:
        device = default_device()
    try:
        return kind.from_pretrained(folder, torch_dtype=DTYPES[dtype]).to(device)
    except (OSError, ValueError, RuntimeError) as error:
        fail(f"{folder} cannot be loaded on {device}: {str(error).splitlines()[0]}")


def default_device() -> torch.device:
    """The accelerator if there is one."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
