"""Estimated poses as the BOP challenge's csv files: written, read, and checked before they are handed in.

    scene_id,im_id,obj_id,score,R,t,time     METHOD_DATASET-SPLIT[-SPLITTYPE].csv

R has nine numbers, row by row, and t three, in millimetres, with spaces between them. `time` is in seconds for the
whole picture, the same in all its rows, or -1.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from backlot.files import write_file
from data_prep.bop.format import Target
from data_prep.bop.symmetries import METRES_PER_MM, is_rotation

HEADER = ["scene_id", "im_id", "obj_id", "score", "R", "t", "time"]
FILE_NAME = re.compile(r"[A-Za-z0-9.]+(?:-[A-Za-z0-9.]+)*_[A-Za-z0-9]+-[A-Za-z0-9]+(?:-[A-Za-z0-9]+)?\.csv")
UNKNOWN_TIME = -1.0


@dataclass(frozen=True)
class PoseEstimate:
    """A row: an object that was found in a picture.

    Args:
        score: larger is better.
        camera_from_object: (4, 4) float64, metres.
        time: seconds for the whole picture, -1 where it is not known.
    """

    scene_id: int
    im_id: int
    obj_id: int
    score: float
    camera_from_object: np.ndarray
    time: float = UNKNOWN_TIME


def write_results(path: str | Path, estimates: Iterable[PoseEstimate]) -> None:
    """Write a csv file; ValueError, one line, if an estimate is no pose or the times of a picture differ."""
    estimates = list(estimates)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    for number, each in enumerate(estimates):
        pose = np.asarray(each.camera_from_object, np.float64)
        if problem := _examine_pose(pose[:3, :3], pose[:3, 3]):
            raise ValueError(f"estimate {number}: {problem}")
        numbers = pose[:3, :3].ravel(), pose[:3, 3] / METRES_PER_MM
        rotation, translation = (" ".join(repr(value) for value in part.tolist()) for part in numbers)
        ids = each.scene_id, each.im_id, each.obj_id
        writer.writerow([*ids, repr(float(each.score)), rotation, translation, repr(float(each.time))])
    if problems := list(_examine_times(estimates)):
        raise ValueError(problems[0])
    write_file(Path(path), text.getvalue())


def read_results(path: str | Path) -> list[PoseEstimate]:
    """The rows of a csv file; ValueError, one line, names the first that is wrong."""
    estimates, problems = parse_results(path)
    if problems:
        raise ValueError(problems[0])
    return estimates


def parse_results(path: str | Path) -> tuple[list[PoseEstimate], list[str]]:
    """The good rows of a csv file, and a line for each bad one."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a csv file") from None
    if not lines or lines[0].split(",") != HEADER:
        raise ValueError(f"{path} must begin with the line {','.join(HEADER)}")
    estimates, problems = [], []
    for number, line in enumerate(lines[1:], 2):
        try:
            estimates.append(parse_row(line))
        except ValueError as error:
            problems.append(f"{path}, line {number}: {error}")
    return estimates, problems


def parse_row(line: str) -> PoseEstimate:
    """A row of the csv file; ValueError says what is wrong with it."""
    fields = line.split(",")
    if len(fields) != len(HEADER):
        raise ValueError(f"must have {len(HEADER)} fields, got {len(fields)}")
    values = dict(zip(HEADER, fields, strict=True))
    ids = [_parse(int, name, values[name]) for name in HEADER[:3]]
    if min(ids) < 0:
        raise ValueError(f"ids must be at least 0, got {ids}")
    score, time = (_parse(float, name, values[name]) for name in ("score", "time"))
    rotation, translation = (_parse_numbers(name, values[name], count) for name, count in (("R", 9), ("t", 3)))
    if not math.isfinite(score):
        raise ValueError(f"`score` must be finite, got {score}")
    if not (time == UNKNOWN_TIME or 0 <= time < math.inf):
        raise ValueError(f"`time` must be at least 0, or -1, got {time}")
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation.reshape(3, 3), translation * METRES_PER_MM
    if problem := _examine_pose(pose[:3, :3], pose[:3, 3]):
        raise ValueError(problem)
    return PoseEstimate(*ids, score, pose, time)


def _parse(kind: type[int] | type[float], name: str, text: str) -> int | float:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"`{name}` must be a number, got {text!r}") from None


def _parse_numbers(name: str, text: str, count: int) -> np.ndarray:
    parts = text.split()
    if len(parts) != count:
        raise ValueError(f"`{name}` must have {count} numbers, got {len(parts)}")
    return np.array([_parse(float, name, part) for part in parts])


def _examine_pose(rotation: np.ndarray, translation: np.ndarray) -> str | None:
    """What is wrong with a pose."""
    if not np.isfinite(rotation).all() or not np.isfinite(translation).all():
        return "the pose is not finite"
    if not is_rotation(rotation):
        return f"`R` is no rotation: {' '.join(f'{value:g}' for value in rotation.ravel())}"
    return None


def _examine_times(estimates: Sequence[PoseEstimate]) -> Iterator[str]:
    """A line for each picture whose rows have several times."""
    times: dict[tuple[int, int], float] = {}
    named = set()
    for each in estimates:
        picture = each.scene_id, each.im_id
        first = times.setdefault(picture, each.time)
        if each.time != first and picture not in named:
            named.add(picture)
            yield f"the times of picture {each.im_id} in scene {each.scene_id} differ: {first:g} and {each.time:g}"


def check_results(path: str | Path, targets: Collection[Target] | None = None) -> list[str]:
    """All that is wrong with a csv file, a line for each thing; nothing if it can be handed in.

    Args:
        targets: estimates of anything else are named.

    Raises:
        ValueError: one line: it is missing, or no such file at all.
    """
    path = Path(path)
    estimates, problems = parse_results(path)
    if FILE_NAME.fullmatch(path.name) is None:
        problems.insert(0, f"{path.name} is not METHOD_DATASET-SPLIT[-SPLITTYPE].csv")
    problems += [f"{path}: {problem}" for problem in _examine_times(estimates)]
    if targets is not None:
        wanted = {(each.scene_id, each.im_id, each.obj_id) for each in targets}
        strangers = sorted({(each.scene_id, each.im_id, each.obj_id) for each in estimates} - wanted)
        problems += [
            f"{path}: object {obj_id} in picture {im_id} of scene {scene_id} is no target"
            for scene_id, im_id, obj_id in strangers
        ]
    return problems
