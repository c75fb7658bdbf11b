"""Validations and the best checkpoint are those of an uninterrupted run, however a run was interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import runs
from flow_samples import Flows

from trainers.common import checkpoints

SCORES = {2: 0.2, 4: 0.9, 6: 0.3, 8: 0.1}
"""Of the updates; the best is neither the first nor the last."""
RISING = {2: 0.1, 4: 0.2, 6: 0.3, 8: 0.9}
SETTINGS = {"max_train_steps": 8, "logging_steps": 2, "checkpoints_total_limit": 1}


def train(run_dir: Path, scores: dict[int, float], interrupted: int | None = None, how: str = "", **training) -> None:
    """A run with scored validations; one of them is interrupted where it begins, or behind its decision."""
    run = runs.open_run(run_dir, Flows(), **SETTINGS | training)

    def function(model):
        if run.step == interrupted and how == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        if run.step == interrupted and how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return {"value": scores[run.step]}, {}

    log = run.log

    def log_or_die(scalars, *others):
        if "validation/score" in scalars and run.step == interrupted and how == "kill before the row":
            os.kill(os.getpid(), signal.SIGKILL)
        log(scalars, *others)

    run.log = log_or_die
    check = run.validation(2, function, score=lambda scalars: scalars["value"])
    for batch in run.batches():
        with run.accumulate():
            run.update(*runs.flow_loss(run, batch))
        check()
    runs.save_and_close(run)


def outcome(run_dir: Path) -> tuple:
    """What must be equal: rows, best.json, and the best and last checkpoint's tensors."""
    best = json.loads((run_dir / "best.json").read_text())
    steps = sorted(map(checkpoints.step_of, checkpoints.list_checkpoints(run_dir)))
    assert {best["step"], 8} <= set(steps)
    kept = [run_dir / f"checkpoint-{step}" for step in (best["step"], 8)]
    assert [checkpoints.verify(path) for path in kept] == [[], []]
    return runs.rows_of(run_dir), best, [runs.tensors_of(path) for path in kept]


def assert_same(a: tuple, b: tuple) -> None:
    assert a[0] == b[0]
    assert a[1] == b[1]
    assert [runs.differing(*pair) for pair in zip(a[2], b[2], strict=True)] == [[], []]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Outcomes of runs that nobody interrupted, and their folders, by the name of their scores."""
    results = {}
    for name, scores in (("best in the middle", SCORES), ("best at the end", RISING)):
        folder = tmp_path_factory.mktemp("straight")
        train(folder, scores)
        results[name] = outcome(folder), folder
    return results


HOW = ["stop", "kill", "kill before the row"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize(
    ("name", "interrupted"), [("best in the middle", 4), ("best in the middle", 8), ("best at the end", 8)]
)
def test_an_interrupted_validation_is_made_after_the_resume(tmp_path, straight, name, interrupted, how, every):
    """`every`: a checkpoint of the same update is there at a kill, or only an older one."""
    scores = {"best in the middle": SCORES, "best at the end": RISING}[name]
    run_dir, log = tmp_path / "run", tmp_path / "log"
    process = runs.start(log, interrupted_child, run_dir, scores, interrupted, how, every)
    assert runs.end(process) == (75 if how == "stop" else -signal.SIGKILL), log.read_text()
    made = [row["step"] for row in runs.rows_of(run_dir) if "validation/score" in row]
    assert made == list(range(2, interrupted, 2))
    train(run_dir, scores, checkpointing_steps=every, resume_from_checkpoint="auto")
    assert_same(outcome(run_dir), straight[name][0])


def interrupted_child(run_dir: Path, scores: dict[int, float], interrupted: int, how: str, every: int) -> None:
    train(run_dir, scores, interrupted, how, checkpointing_steps=every)


def test_a_validation_that_was_made_is_not_made_again(tmp_path, straight):
    run_dir = shutil.copytree(straight["best at the end"][1], tmp_path / "run")
    train(run_dir, {}, resume_from_checkpoint="latest")  # a score that is asked for would be a KeyError
    assert_same(outcome(run_dir), straight["best at the end"][0])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def another(path: Path) -> None:
    path.write_text('{"step": 6, "score": 99.0}')


def other_types(path: Path) -> None:
    path.write_text('["step", null]')


def folder(path: Path) -> None:
    path.unlink()
    (path / "inside").mkdir(parents=True)


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize("damage", [empty, torn, Path.unlink, another, other_types, folder, link])
def test_best_json_is_right_again_after_a_resume(tmp_path, straight, damage):
    """It says what metrics.jsonl says; damaged, it ends no run."""
    expected, source = straight["best in the middle"]
    run_dir = shutil.copytree(source, tmp_path / "run", symlinks=True)
    damage(run_dir / "best.json")
    train(run_dir, {}, resume_from_checkpoint="latest")
    assert_same(outcome(run_dir), expected)


def test_best_json_names_no_update_behind_the_one_that_the_run_fell_back_to(tmp_path):
    train(tmp_path, {2: 0.9}, max_train_steps=3, checkpointing_steps=1, checkpoints_total_limit=None)
    for step in (2, 3):
        (tmp_path / f"checkpoint-{step}/model.safetensors").write_bytes(b"")
    run = runs.open_run(tmp_path, Flows(), max_train_steps=3, resume_from_checkpoint="latest")
    assert run.step == 1
    assert not (tmp_path / "best.json").exists()
    runs.save_and_close(run)
