"""The commands of `python -m data_prep.points`. A command's libraries are loaded once its arguments are understood."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from backlot.command_line import input_errors, parse
from backlot.config import Section


class Synth(Section):
    out: Path
    """folder to write to"""
    num_train: int = Field(4000, ge=1)
    """points to train on"""
    num_val: int = Field(500, ge=1)
    """points to validate on"""
    seed: int = Field(0, ge=0)
    """decides all points"""


def synth(argv: list[str] | None = None) -> None:
    """Eight clouds of points on a circle.

        python -m data_prep.points synth --out data/points

    The format is described in `data_prep/points/format.py`.
    """
    settings = parse(Synth, argv, "python -m data_prep.points synth", synth.__doc__)

    from data_prep.points.format import write_points
    from data_prep.points.synth import make_ring

    points = make_ring(settings.num_train + settings.num_val, settings.seed)
    with input_errors():
        write_points(settings.out, "train", points[: settings.num_train])
        write_points(settings.out, "val", points[settings.num_train :])
    print(f"{settings.num_train} points to train on, {settings.num_val} to validate: {settings.out}")
