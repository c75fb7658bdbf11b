"""`python -m evaluation.vpog score`: what a csv file of poses is worth."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import TypeAdapter

from backlot.command_line import fail, input_errors
from backlot.files import write_file
from backlot.metadata import Metadata
from data_prep.bop.format import BopDataset, read_json
from data_prep.bop.results import read_results
from evaluation.table import format_table, write_json
from evaluation.vpog.detections import Target, find_targets
from evaluation.vpog.errors import Errors, add_figures, compare, pose_figures
from evaluation.vpog.settings import ScoreSettings

COLUMNS = ("rotation, deg", "translation, d", "< 5 deg", "< 10 deg", "< 20 deg", "MSSD .1 d", "MSSD .2 d", "8/64 px")


# --- what a csv is of ----------------------------------------------------------------------------------------------


class NoteJson(Metadata):
    """What `predict` notes beside a csv: `targets` are [scene, picture, instance]."""

    dataset: str
    split: str
    targets: list[tuple[int, int, int]]


NOTE = TypeAdapter(NoteJson)


def note_file(results: Path) -> Path:
    """The JSON file beside a csv that says what it is of."""
    return results.with_suffix(".json")


def write_note(results: Path, dataset: BopDataset, targets: Sequence[Target]) -> None:
    """Note the dataset, by its place relative to the csv, and the instances that were asked for."""
    place = os.path.relpath(dataset.root.absolute(), results.absolute().parent)
    asked = [(each.frame.scene_id, each.frame.im_id, each.gt) for each in targets]
    write_file(note_file(results), json.dumps({"dataset": place, "split": dataset.split, "targets": asked}))


def open_targets(settings: ScoreSettings) -> tuple[BopDataset, list[Target]]:
    """The dataset, and what is to be found in it; ValueError if neither the settings nor a note name one."""
    note = note_file(settings.results)
    if settings.dataset is not None:
        dataset = BopDataset(settings.dataset, settings.split or "test")
        return dataset, find_targets(dataset)
    if not note.is_file():
        raise ValueError(f"there is no {note}, which `predict` writes: name the dataset with --dataset")
    noted = read_json(note, NOTE)
    dataset = BopDataset(settings.results.parent / Path(noted.dataset), settings.split or noted.split)
    asked = set(noted.targets)
    targets = [each for each in find_targets(dataset) if (each.frame.scene_id, each.frame.im_id, each.gt) in asked]
    if not targets:
        raise ValueError(f"{note} names instances that {dataset.folder} does not have")
    return dataset, targets


def score(settings: ScoreSettings) -> list[Errors]:
    """The errors of a csv file's poses; ValueError or OSError, one line, if it or the dataset cannot be used."""
    rows = read_results(settings.results)
    dataset, targets = open_targets(settings)
    return compare(dataset, dataset.models(), targets, rows, with_vsd=not settings.no_vsd)


# --- tables ---------------------------------------------------------------------------------------------------------


def cell(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def pose_cells(figures: Mapping) -> list[str]:
    """A row under `COLUMNS`: medians first, shares after them."""
    return [
        cell(figures["median_rotation_deg"], 1),
        cell(figures["median_translation"]),
        *map(cell, figures["acc_5_10_20"]),
        cell(figures["mssd_recall"]["0.10"]),
        cell(figures["mssd_recall"]["0.20"]),
        cell(figures["mspd_recall"]["8/64"]),
    ]


def occlusion_table(figures: Mapping) -> str:
    """By the share of an instance that is seen."""
    rows = {
        f"{name} seen": [str(each["count"]), cell(each["median_rotation_deg"], 1), cell(each["acc_10"])]
        for name, each in figures["by_occlusion"].items()
    }
    return format_table(("instances", "rotation, deg", "< 10 deg"), rows)


def show_poses(errors: Sequence[Errors]) -> None:
    """Print what a file of results says."""
    figures, more = pose_figures(errors), add_figures(errors)
    print(format_table(COLUMNS, {"poses": pose_cells(figures)}))
    averages = {"MSSD": figures["mssd_recall"], "VSD": figures["vsd_recall"]}
    averages["MSPD"] = {name: value for name, value in figures["mspd_recall"].items() if "/" not in name}
    cells = [cell(sum(each.values()) / len(each) if each else None) for each in averages.values()]
    print("\n" + format_table(("AR", *averages), {"average recalls": [cell(figures["ar"]), *cells]}))
    cells = [cell(more[name]) for name in ("add", "add_s", "add_auc", "add_s_auc")]
    print("\n" + format_table(("ADD .1 d", "ADD-S .1 d", "ADD AUC", "ADD-S AUC"), {"surface distances": cells}))
    print("\n" + occlusion_table(figures))
    print(
        f"\nAUROC of the score {cell(figures['score_auroc'])}, {cell(figures['seconds_per_object'])} s per object,"
        f" {sum(len(each.targets) for each in errors)} instances"
    )


def run(settings: ScoreSettings) -> None:
    """The command."""
    if settings.output is not None and settings.output.is_dir():
        fail(f"--output: {settings.output} is a folder")
    with input_errors():
        errors = score(settings)
        show_poses(errors)
        if settings.output is not None:
            write_json(settings.output, pose_figures(errors))
