"""JSON files of BOP datasets, checked as they are read."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from backlot.metadata import describe_errors

T = TypeVar("T")


def parse_json(data: bytes, form: TypeAdapter[T], source: str) -> T:
    """Check a JSON file; ValueError, one line, names the first of what is wrong."""
    try:
        return form.validate_json(data)
    except ValidationError as error:
        raise ValueError(describe_errors(error, source)[0]) from None


def read_json(path: Path, form: TypeAdapter[T]) -> T:
    """Read and check a JSON file; ValueError, one line, if it is missing or wrong."""
    try:
        return parse_json(path.read_bytes(), form, str(path))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
