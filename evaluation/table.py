"""What the evaluation programs print and write: tables of metrics, means with their spread, and JSON. Without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from backlot.command_line import fail

GAP = 2  # characters between columns


def format_table(columns: Sequence[str], rows: Mapping[str, Sequence[str]], width: int = 0) -> str:
    """Rows of cells under their columns, set to the right; names of rows to the left.

    Args:
        rows: name -> a cell per column.
        width: of a column at least, in characters.
    """
    width = max(width, GAP + max(len(cell) for cells in (columns, *rows.values()) for cell in cells))
    names = max(len(name) for name in rows)
    return "\n".join(
        f"{name:<{names}}" + "".join(f"{cell:>{width}}" for cell in cells)
        for name, cells in (("", columns), *rows.items())
    )


def format_mean(mean: float | None, spread: float | None, digits: int) -> str:
    """A mean and its spread; a dash without a number.

    Args:
        spread: a deviation or a standard error; None if there is none.
        digits: after the point, two fewer from 10 on.
    """
    if mean is None:
        return "-"
    digits -= 2 * (abs(mean) >= 10)
    return f"{mean:.{digits}f}" + ("" if spread is None else f" ±{spread:.{digits}f}")


def output_file(output: Path | None, model_dir: Path) -> Path:
    """Where the figures go; `fail` if that is a folder."""
    output = output or model_dir / "evaluation.json"
    if output.is_dir():
        fail(f"--output: {output} is a folder")
    return output


def write_json(path: Path, content: dict) -> None:
    """Strict JSON: a figure that is not finite is a ValueError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
