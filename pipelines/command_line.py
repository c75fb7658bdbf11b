"""What programs of several systems share: errors of one line, numbers in a range, and a model's folder."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
from diffusers import DiffusionPipeline

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
P = TypeVar("P", bound=DiffusionPipeline)


def fail(message: str) -> NoReturn:
    """One line and exit code 2: an argument is wrong."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    """Answers a wrong argument with one line; no abbreviations."""

    def __init__(self, **settings):
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        fail(message)


def number(kind: type, lowest: float, highest: float = math.inf):
    """An argparse type: a finite number in [lowest, highest]."""
    allowed = f"at least {lowest:g}" if highest == math.inf else f"in [{lowest:g}, {highest:g}]"

    def parse(text: str) -> int | float:
        value = kind(text)
        if not lowest <= value <= highest or abs(value) == math.inf:
            raise argparse.ArgumentTypeError(f"must be {allowed}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number
    return parse


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
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        return kind.from_pretrained(folder, torch_dtype=DTYPES[dtype]).to(device)
    except (OSError, ValueError, RuntimeError) as error:
        fail(f"{folder} cannot be loaded on {device}: {str(error).splitlines()[0]}")
