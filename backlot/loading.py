"""Exported pipelines: what their index may name, and how programs load them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import DiffusionPipeline

from backlot.codecs import DTYPES
from backlot.command_line import fail

P = TypeVar("P", bound=DiffusionPipeline)


LIBRARIES = ("diffusers", "transformers")
OURS = ("backlot", "pipelines")


class ExportedPipeline(DiffusionPipeline):
    """The base of our pipelines: an export that names modules which no longer exist is refused in one line."""

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path) -> dict:
        """The index of an export, as diffusers is about to read it."""
        index = super()._dict_from_json_file(json_file)
        check_index(index, Path(json_file).parent)
        return index


def check_index(index: dict, folder: Path) -> None:
    """ValueError if model_index.json names a module that is neither one of ours nor of diffusers or transformers."""
    for part, value in index.items():
        if part.startswith("_") or not isinstance(value, list):
            continue
        module = value[0] if value else None
        if module is not None and not (isinstance(module, str) and is_known(module)):
            raise ValueError(
                f"{folder} is an export of an older layout: its {part} names the module {module!r}, which does not"
                " exist; export it again: its training command with --resume_from_checkpoint latest does so when it"
                " finishes"
            )


def is_known(module: str) -> bool:
    """Whether a module is of `LIBRARIES`, or one of ours that exists."""
    root = module.split(".")[0]
    if root not in OURS:
        return root in LIBRARIES
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # a package above it is missing
        return False


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
        values = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        fail(f"{index} is damaged")
    if values.get("_class_name") != kind.__name__:
        fail(f"{folder} holds a {values.get('_class_name')}, not a {kind.__name__}")
    try:
        check_index(values, folder)
    except ValueError as error:
        fail(str(error))
    if device is None:
        device = default_device()
    try:
        return kind.from_pretrained(folder, dtype=DTYPES[dtype]).to(device)
    except (OSError, ValueError, RuntimeError) as error:
        fail(f"{folder} cannot be loaded on {device}: {str(error).splitlines()[0]}")


def default_device() -> torch.device:
    """The accelerator if there is one."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
