"""Checkpoints are complete or absent: protocol, rotation, choice at resume, the command line, two processes."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import runs

from trainers.common import checkpoints


def make(run_dir: Path, step: int, damaged: bool = False) -> Path:
    run_dir.mkdir(exist_ok=True)
    temporary = checkpoints.begin(run_dir, step)
    (temporary / "weights").write_bytes(bytes(range(256)) * step)
    (temporary / "folder").mkdir()
    (temporary / "folder/more").write_text(f"step {step}")
    checkpoint = checkpoints.commit(temporary)
    if damaged:
        (checkpoint / "weights").write_bytes(b"torn")
    return checkpoint


def steps(run_dir: Path) -> list[int]:
    return [checkpoints.step_of(path) for path in checkpoints.list_checkpoints(run_dir)]


def rotate(run_dir: Path, limit: int | None, keep_every=None, trusted=(), kept=()) -> list[int]:
    checkpoints.rotate(run_dir, limit, keep_every, trusted=set(trusted), kept=kept)
    assert not list(run_dir.glob("*.deleted"))
    return steps(run_dir)


# ---- protocol ----


def test_the_temporary_folder_lies_beside_its_target(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/nonexistent")  # a rename from another file system would fail
    temporary = checkpoints.begin(tmp_path, 3)
    assert temporary == tmp_path / "checkpoint-3.tmp"
    assert checkpoints.commit(temporary) == tmp_path / "checkpoint-3"
    assert not temporary.exists()


def test_the_manifest_lists_every_file_with_size_and_digest(tmp_path):
    checkpoint = make(tmp_path, 2)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest["step"] == 2
    assert manifest["files"].keys() == {"weights", "folder/more"}
    assert manifest["files"]["weights"]["bytes"] == 512
    assert checkpoints.verify(checkpoint) == []


def test_everything_is_flushed_before_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, Path.rename

    def record_fsync(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def record_rename(self, target):
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    make(tmp_path, 1)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert set(before) == {"weights", "more", "manifest.json", "folder", "checkpoint-1.tmp"}
    assert after == [tmp_path.name]


def test_a_leftover_of_the_same_step_is_replaced(tmp_path):
    (tmp_path / "checkpoint-1.tmp").mkdir()
    (tmp_path / "checkpoint-1.tmp/old").write_text("of a killed process")
    assert checkpoints.verify(make(tmp_path, 1)) == []
    make(tmp_path, 2, damaged=True)
    assert checkpoints.verify(make(tmp_path, 2)) == []  # the run came to this step again
    assert steps(tmp_path) == [2, 1]


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    make(tmp_path, 1)
    for name in ("checkpoint-2.tmp", "checkpoint-0.deleted", "checkpoint-best", "other.tmp"):
        (tmp_path / name).mkdir()
    checkpoints.clean_up(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-best", "other.tmp"}


def test_a_manifest_cannot_point_outside_its_folder(tmp_path):
    (tmp_path / "secret").write_text("x")
    checkpoint = make(tmp_path, 1)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["sha256"]
    for name in ("../secret", str(tmp_path / "secret")):
        forged = {**manifest, "files": {**manifest["files"], name: {"bytes": 1, "sha256": "0"}}}
        (checkpoint / "manifest.json").write_bytes(checkpoints._seal(forged))
        assert checkpoints.verify(checkpoint) == [f"{name}: missing"]


def test_a_renamed_checkpoint_does_not_pass_for_another_step(tmp_path):
    make(tmp_path, 1).rename(tmp_path / "checkpoint-9")
    assert checkpoints.verify(tmp_path / "checkpoint-9") == ["manifest.json: damaged"]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"sha256": 1}', "7", '"x"', "[" * 100_000])
def test_a_strange_manifest_is_damaged(tmp_path, text):
    checkpoint = make(tmp_path, 1)
    (checkpoint / "manifest.json").write_text(text)
    assert checkpoints.verify(checkpoint) == ["manifest.json: damaged"]


# ---- order and rotation ----


def test_other_names_are_ignored_and_the_order_is_that_of_steps(tmp_path):
    for step in (9, 10, 100):
        make(tmp_path, step)
    for name in ("checkpoint-best", "checkpoint-", "checkpoint-7.tmp", "checkpoint-8-copy", "xcheckpoint-3"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-11").write_text("a file")
    os.utime(tmp_path / "checkpoint-9", (2e9, 2e9))  # copied later, or the clock was set back
    assert steps(tmp_path) == [100, 10, 9]
    assert checkpoints.find_latest(tmp_path).name == "checkpoint-100"
    assert rotate(tmp_path, 1) == [100]
    assert (tmp_path / "checkpoint-best").exists()


def test_only_valid_checkpoints_count(tmp_path):
    for step in (1, 2, 3):
        make(tmp_path, step)
    for step in (4, 5):
        make(tmp_path, step, damaged=True)
    assert rotate(tmp_path, 2) == [5, 4, 3, 2]
    assert rotate(tmp_path, 1) == [5, 4, 3]


def test_no_limit_keeps_all(tmp_path):
    for step in (1, 2, 3):
        make(tmp_path, step)
    assert rotate(tmp_path, None) == [3, 2, 1]


def test_milestones_and_those_kept_stay(tmp_path):
    for step in range(1, 9):
        make(tmp_path, step)
    assert rotate(tmp_path, 1, keep_every=4, kept=[tmp_path / "checkpoint-3"]) == [8, 4, 3]


def test_trusted_ones_are_not_read_again(tmp_path):
    make(tmp_path, 1)
    newest = make(tmp_path, 2, damaged=True)  # as good a proof as any that nobody looked
    assert rotate(tmp_path, 1, trusted=[newest]) == [2]


def test_a_deletion_that_fails_is_a_warning(tmp_path, monkeypatch, caplog):
    for step in (1, 2):
        make(tmp_path, step)

    def refuse(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.EBUSY, "busy")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    checkpoints.rotate(tmp_path, 1, None, trusted=set(), kept=())
    assert "could not delete" in caplog.text
    assert steps(tmp_path) == [2]


# ---- the command line ----


def test_verify_and_list_on_the_command_line(tmp_path, capsys):
    good, bad = make(tmp_path, 1), make(tmp_path, 2, damaged=True)
    assert checkpoints.main(["verify", str(good)]) == 0
    assert "checkpoint-1: complete, 0.0 MiB" in capsys.readouterr().out
    assert checkpoints.main(["verify", str(bad)]) == 2
    assert "  weights: 4 bytes instead of 512" in capsys.readouterr().out
    assert checkpoints.main(["list", str(tmp_path)]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert ["checkpoint-2: damaged" in lines[0], "checkpoint-1: complete" in lines[2]] == [True, True]
    assert checkpoints.main(["verify", str(tmp_path / "none")]) == 2
    assert checkpoints.main([]) == 2


def test_the_module_runs_as_a_program(tmp_path):
    make(tmp_path, 1)
    command = [sys.executable, "-m", "trainers.common.checkpoints", "list", str(tmp_path)]
    result = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "checkpoint-1: complete" in result.stdout


# ---- what a run does with them ----


def refusal(capsys, run_dir: Path, **training) -> str:
    before = sorted(run_dir.rglob("*")) if run_dir.exists() else []
    with pytest.raises(SystemExit) as exit_:
        runs.train(run_dir, max_train_steps=8, **training)
    assert exit_.value.code == 2
    after = sorted(run_dir.rglob("*")) if run_dir.exists() else []
    assert set(before) <= set(after)
    return capsys.readouterr().err


@pytest.fixture
def run_dir(tmp_path, finished_run):
    """A run of six updates with checkpoints 2, 4 and 6."""
    return shutil.copytree(finished_run, tmp_path / "run")


def test_a_folder_with_checkpoints_is_refused_without_resume(run_dir, capsys):
    assert "holds checkpoints: add --resume_from_checkpoint latest" in refusal(capsys, run_dir)


def test_a_missing_checkpoint_is_an_error(run_dir, capsys):
    text = refusal(capsys, run_dir, resume_from_checkpoint=str(run_dir / "checkpoint-5"))
    assert "cannot resume from" in text
    assert "no such folder" in text


def test_an_explicitly_named_damaged_checkpoint_is_an_error(run_dir, capsys):
    (run_dir / "checkpoint-6/ema.safetensors").unlink()
    text = refusal(capsys, run_dir, resume_from_checkpoint=str(run_dir / "checkpoint-6"))
    assert "cannot resume from" in text
    assert "ema.safetensors: missing" in text


def test_latest_without_any_is_an_error(tmp_path, capsys):
    assert "no intact checkpoint in" in refusal(capsys, tmp_path / "new", resume_from_checkpoint="latest")


def test_auto_starts_afresh_where_there_is_nothing(tmp_path):
    runs.train(tmp_path / "new", max_train_steps=1, resume_from_checkpoint="auto")
    assert steps(tmp_path / "new") == [1]


def test_auto_does_not_start_afresh_over_damaged_checkpoints(run_dir, capsys):
    for checkpoint in checkpoints.list_checkpoints(run_dir):
        (checkpoint / "manifest.json").unlink()
    assert "no intact checkpoint in" in refusal(capsys, run_dir, resume_from_checkpoint="auto")
    assert steps(run_dir) == [6, 4, 2]


def test_an_older_checkpoint_of_the_same_run_is_refused(run_dir, capsys):
    text = refusal(capsys, run_dir, resume_from_checkpoint=str(run_dir / "checkpoint-4"))
    assert "checkpoint-6 is newer than" in text
    assert "another --output_dir" in text


def test_a_checkpoint_of_another_folder_starts_a_new_run(run_dir, tmp_path):
    branch = tmp_path / "branch"
    runs.train(branch, max_train_steps=6, logging_steps=2, resume_from_checkpoint=str(run_dir / "checkpoint-4"))
    assert steps(branch) == [6]
    assert runs.differing(runs.tensors_of(branch / "checkpoint-6"), runs.tensors_of(run_dir / "checkpoint-6")) == []
    assert [row["step"] for row in runs.rows_of(branch)] == [6]
    assert steps(run_dir) == [6, 4, 2]


@pytest.mark.parametrize("spelling", ["latest", "path", "other spelling"])
def test_the_checkpoint_resumed_from_survives_rotation(run_dir, spelling):
    wanted = {
        "latest": "latest",
        "path": str(run_dir / "checkpoint-6"),
        "other spelling": os.path.relpath(run_dir / "checkpoint-6"),
    }[spelling]
    settings = {"checkpointing_steps": 1, "checkpoints_total_limit": 1}
    runs.train(run_dir, max_train_steps=9, resume_from_checkpoint=wanted, **settings)
    assert steps(run_dir) == [9, 6]


def test_milestones_survive_a_run(tmp_path):
    settings = {"checkpointing_steps": 1, "checkpoints_total_limit": 1, "keep_every_n_steps": 2}
    runs.train(tmp_path / "run", max_train_steps=5, **settings)
    assert steps(tmp_path / "run") == [5, 4, 2]


def test_checkpoints_hold_no_custom_pickles(finished_run):
    names = {path.name for path in (finished_run / "checkpoint-6").iterdir()}
    assert names == {
        "ema.safetensors", "manifest.json", "model.safetensors", "optimizer.safetensors", "run_state.json",
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_loading_a_checkpoint_executes_nothing(run_dir, tmp_path):
    """A hostile pickle with a valid manifest around it: loading refuses it, whichever file it hides in."""
    import pickle

    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    for name in ("optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "scheduler.bin"):
        hostile = shutil.copytree(run_dir / "checkpoint-6", tmp_path / name / "checkpoint-6.tmp")
        (hostile / "manifest.json").unlink()
        (hostile / name).write_bytes(pickle.dumps(Payload()))
        checkpoint = checkpoints.commit(hostile)
        # refused; a file that is not read at all is as good
        with contextlib.suppress(pickle.UnpicklingError, RuntimeError, ValueError):
            runs.train(tmp_path / "out" / name, max_train_steps=7, resume_from_checkpoint=str(checkpoint))
        assert not (tmp_path / "executed").exists(), name


def hold_the_folder(run_dir: Path, marker: Path) -> None:
    import time

    from trainers import train_shortcut

    def wait(*arguments):
        marker.touch()
        time.sleep(60)

    train_shortcut.compute_loss = wait
    train_shortcut.main(runs.command_line(run_dir, max_train_steps=2))


def test_a_second_process_is_refused_naming_the_first(tmp_path, capsys):
    run_dir, marker = tmp_path / "run", tmp_path / "marker"
    process = runs.start(tmp_path / "log", hold_the_folder, run_dir, marker)
    assert runs.wait_for(marker.exists, process), (tmp_path / "log").read_text()
    try:
        (run_dir / "checkpoint-1.tmp").mkdir()  # as if it were saving
        assert f"is in use by process {process.pid} on " in refusal(capsys, run_dir)
        assert (run_dir / "checkpoint-1.tmp").exists()
    finally:
        process.kill()
        process.join()
    runs.train(run_dir, max_train_steps=1)  # a killed process leaves no lock


def test_the_lock_is_free_after_a_run(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    runs.train(tmp_path / "run", max_train_steps=1)
    runs.train(tmp_path / "run", max_train_steps=2, resume_from_checkpoint="latest")
    assert steps(tmp_path / "run") == [2, 1]
