"""The commands of `python -m data_prep.layouts`. A command's libraries are loaded once its arguments are understood."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from backlot.command_line import EXIT_INPUT, Positional, fail, input_errors, parse
from backlot.config import Section
from data_prep.layouts.settings import PrepareSettings

NUM_SHOWN = 10
"""Dropped samples that are named; report.json has all."""


class Check(Section):
    folder: Annotated[Path, Positional]
    """of prepared layouts"""


def prepare(argv: list[str] | None = None, program: str = "python -m data_prep.layouts prepare") -> None:
    """Draw scenes, or take somebody's layouts, and encode what training reads.

        python -m data_prep.layouts prepare --num_samples 20000                     # drawn scenes, FLUX.1-dev's models
        python -m data_prep.layouts prepare --profile demo --models tiny --vae pixels:2 --output_dir data/layouts
        python -m data_prep.layouts prepare --source coco --path instances_train2017.json --images train2017
        python -m data_prep.layouts prepare --source layoutsam --path rows.parquet --output_dir data/layoutsam

    The format is described in data_prep/layouts/format.py. A run that was interrupted goes on with the same command;
    what is there and valid is left as it is, and what was made of something else is refused without --overwrite.
    Samples that cannot be used are listed in report.json and dropped.
    """
    settings = parse(PrepareSettings, argv, program, prepare.__doc__)

    from transformers.utils import logging

    from backlot.files import LockedError
    from data_prep.layouts.prepare import prepare as prepare_layouts

    logging.disable_progress_bar()
    try:
        with input_errors():
            report = prepare_layouts(settings)
    except LockedError as error:
        fail(f"{settings.output_dir} is being prepared by another process ({error})")
    for name, reason in list(report.dropped.items())[:NUM_SHOWN]:
        print(f"dropped {name}: {reason}")
    if len(report.dropped) > NUM_SHOWN:
        print(f"... and {len(report.dropped) - NUM_SHOWN} more, see {settings.output_dir / 'report.json'}")
    print(f"{settings.output_dir}: {report.num_samples} samples, {len(report.dropped)} dropped")


def check(argv: list[str] | None = None) -> None:
    """Read every sample of prepared layouts, and name each bad one.

        python -m data_prep.layouts check output_data

    The exit code is 2 if there is a bad sample.
    """
    settings = parse(Check, argv, "python -m data_prep.layouts check", check.__doc__)

    from data_prep.layouts.dataset import LayoutDataset

    with input_errors():
        dataset = LayoutDataset(settings.folder, split="all")
    bad = objects = 0
    for row in range(len(dataset)):
        try:
            objects += int(dataset[row]["valid"].sum())
            dataset.picture(row)
        except ValueError as error:
            bad += 1
            print(error)
    print(f"samples: {len(dataset)}, objects: {objects}, bad: {bad}")
    if bad:
        raise SystemExit(EXIT_INPUT)
