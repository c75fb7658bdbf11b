"""SIGKILL at any moment, above all inside a save: the run goes on from its newest complete checkpoint.

`campaign` is the whole experiment; a benchmark may call it with more trials.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import runs

from trainers.common import checkpoints

UPDATES = 14
# Wide enough that saving takes most of the time: 8 MB a checkpoint.
NETWORK = ["--model.hidden_size=128", "--model.num_layers=2"]
SETTINGS = {"max_train_steps": UPDATES, "checkpointing_steps": 1, "logging_steps": 1, "train_batch_size": 2}


def campaign(trials: int, seed: int, root: Path, beside: bool = False) -> dict:
    """Kill a training process `trials` times and let the next one go on; each finished run is compared.

    A run is killed, continued, killed again, ..., until it is at its end; then the next one starts, alternately with
    `checkpoints_total_limit` 1 and 2. Three kills in four are aimed into a save: the parent waits until the temporary
    folder of a chosen step is there, and a random moment longer.

    Args:
        beside: checkpoints are written beside the training, and every kill is aimed between snapshot and rename.

    Returns:
        trials, killed_inside_save (a half-written or half-deleted folder was left), resumed (the next process
        continued from the newest checkpoint that was complete at the kill), finished (runs that came to their end),
        bit_equal (of those, the ones with the weights, EMA and optimiser state of an uninterrupted run), damaged
        (folders under a final name that did not verify), steps_lost_max (updates done at the kill and not in a
        checkpoint).
    """
    rng = random.Random(seed)
    root.mkdir(parents=True, exist_ok=True)
    process = runs.start(root / "log", runs.train_in_child, runs.command_line(root / "straight", *NETWORK, **SETTINGS))
    assert runs.end(process) == 0, (root / "log").read_text()
    expected = runs.tensors_of(root / "straight" / f"checkpoint-{UPDATES}")
    counts = {"trials": 0, "killed_inside_save": 0, "resumed": 0, "finished": 0, "bit_equal": 0, "damaged": 0}
    counts["steps_lost_max"] = number = 0
    while counts["trials"] < trials or counts["finished"] < number:
        number += 1
        run_dir, log = root / f"run-{number}", root / f"run-{number}.log"
        arguments = runs.command_line(
            run_dir,
            *NETWORK,
            **SETTINGS,
            async_checkpoints=beside,
            checkpoints_total_limit=1 + number % 2,
            resume_from_checkpoint="auto",
        )
        newest = None
        while True:
            log.unlink(missing_ok=True)
            process = runs.start(log, runs.train_in_child, arguments)
            killed = counts["trials"] < trials and _kill(process, run_dir, rng, newest or 0, 1.0 if beside else 0.75)
            process.join()
            counts["resumed"] += newest is not None and _resumed_from(log) == newest
            if not killed:
                break
            assert process.exitcode == -signal.SIGKILL, log.read_text()
            found = checkpoints.list_checkpoints(run_dir)
            intact = [checkpoint for checkpoint in found if not checkpoints.verify(checkpoint)]
            newest = checkpoints.step_of(intact[0]) if intact else 0
            counts["trials"] += 1
            counts["killed_inside_save"] += bool(_leftovers(run_dir))
            counts["damaged"] += len(found) - len(intact)
            counts["steps_lost_max"] = max(counts["steps_lost_max"], _updates_done(run_dir) - newest)
        assert process.exitcode == 0, log.read_text()
        counts["finished"] += 1
        counts["bit_equal"] += not runs.differing(expected, runs.tensors_of(run_dir / f"checkpoint-{UPDATES}"))
        shutil.rmtree(run_dir)
    return counts


def _kill(process, run_dir: Path, rng: random.Random, newest: int, share: float) -> bool:
    """Kill at a seeded random moment, this share of them inside a save; false if the run was at its end before."""
    stale = _leftovers(run_dir)  # of the kill before; the process removes them before it resumes
    runs.wait_for(lambda: not any(path.exists() for path in stale), process)
    if rng.random() < share:
        step = newest + rng.randint(1, 4)
        temporary = run_dir / f"checkpoint-{step}.tmp"
        delay = rng.uniform(0, 0.03)
        runs.wait_for(temporary.exists, process, pause=0.0005)
    else:
        started = run_dir / "metrics.jsonl"
        before = started.stat().st_mtime_ns if started.exists() else 0
        delay = rng.uniform(0, 0.3)
        runs.wait_for(lambda: started.exists() and started.stat().st_mtime_ns > before, process)
    time.sleep(delay)
    if not process.is_alive():
        return False
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode == -signal.SIGKILL


def _leftovers(run_dir: Path) -> list[Path]:
    """Half-written and half-deleted checkpoints."""
    return [*run_dir.glob("checkpoint-*.tmp"), *run_dir.glob("checkpoint-*.deleted")]


def _resumed_from(log: Path) -> int:
    """The step a process says it resumed from; 0 for a fresh start."""
    found = re.findall(r"resumed from .*checkpoint-(\d+)", log.read_text())
    return int(found[0]) if found else 0


def _updates_done(run_dir: Path) -> int:
    """The last row of metrics.jsonl; it is written before the checkpoint of its update."""
    lines = (run_dir / "metrics.jsonl").read_text().split("\n") if (run_dir / "metrics.jsonl").exists() else []
    return max((json.loads(line)["step"] for line in lines[:-1]), default=0)


def check(counts: dict, trials: int, beside: bool = False) -> None:
    assert counts["trials"] == counts["resumed"] == trials
    assert counts["killed_inside_save"] >= trials / 2
    assert counts["damaged"] == 0
    assert counts["bit_equal"] == counts["finished"] > 0
    # beside the training, the next update may be done before the one that is being saved has its name
    assert counts["steps_lost_max"] <= SETTINGS["checkpointing_steps"] * (1 + beside)


def test_a_killed_run_goes_on_and_ends_with_the_same_weights(tmp_path):
    check(campaign(30, seed=0, root=tmp_path), trials=30)


def test_a_run_killed_while_it_saves_beside_the_training_goes_on(tmp_path):
    check(campaign(3, seed=2, root=tmp_path, beside=True), trials=3, beside=True)


@pytest.mark.slow
def test_thirty_kills_between_snapshot_and_rename(tmp_path):
    check(campaign(30, seed=3, root=tmp_path, beside=True), trials=30, beside=True)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_hundred_kills(tmp_path):
    check(campaign(200, seed=1, root=tmp_path), trials=200)
