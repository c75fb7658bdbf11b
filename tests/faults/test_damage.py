"""Damage to any file of a real checkpoint is found, and the run falls back to the one before; so is a full disk."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import resource
import shutil
from pathlib import Path

import pytest
import runs

from trainers.common import checkpoints

FILES = [
    "ema.safetensors",
    "manifest.json",
    "model.safetensors",
    "optimizer.safetensors",
    "run_state.json",
]
FLIPS = 40


@pytest.fixture
def run_dir(tmp_path, finished_run):
    return shutil.copytree(finished_run, tmp_path / "run")


def falls_back(run_dir: Path, caplog, name: str) -> bool:
    """Whether the damage is found, named, and the checkpoint before is chosen."""
    caplog.clear()
    found = checkpoints.find_latest(run_dir)
    return (
        found == run_dir / "checkpoint-4"
        and f"{run_dir / 'checkpoint-6'} is damaged" in caplog.text
        and name in caplog.text
    )


def test_every_file_is_tried(finished_run):
    assert sorted(path.name for path in (finished_run / "checkpoint-6").iterdir()) == FILES


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_found(run_dir, caplog, name):
    rng = random.Random(name)
    file = run_dir / "checkpoint-6" / name
    content = file.read_bytes()
    for _ in range(FLIPS):
        bit = rng.randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        assert falls_back(run_dir, caplog, name), bit
    file.write_bytes(content)
    assert checkpoints.find_latest(run_dir) == run_dir / "checkpoint-6"


@pytest.mark.slow
def test_every_single_bit_of_the_manifest_counts(run_dir):
    file = run_dir / "checkpoint-6/manifest.json"
    content = file.read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        assert checkpoints.verify(run_dir / "checkpoint-6"), bit


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def zeros(file: Path) -> None:
    """The right size, but the content never reached the disk."""
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [truncate, empty, lengthen, zeros, Path.unlink], ids=lambda f: f.__name__)
def test_other_damage_is_found(run_dir, caplog, name, damage):
    damage(run_dir / "checkpoint-6" / name)
    assert falls_back(run_dir, caplog, name)


@pytest.mark.parametrize("name", ["extra.bin", "folder/extra.bin", "custom_checkpoint_0.pkl"])
def test_a_file_too_many_is_found(run_dir, caplog, name):
    (run_dir / "checkpoint-6" / name).parent.mkdir(exist_ok=True)
    (run_dir / "checkpoint-6" / name).touch()
    assert falls_back(run_dir, caplog, name)


def test_the_run_goes_on_from_the_one_before_and_replaces_the_damaged_one(run_dir, caplog):
    caplog.set_level(logging.INFO)
    undamaged = runs.tensors_of(run_dir / "checkpoint-6")
    rows = runs.rows_of(run_dir)
    file = run_dir / "checkpoint-6/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    runs.train(run_dir, max_train_steps=6, logging_steps=2, resume_from_checkpoint="latest")
    assert "checkpoint-6 is damaged (model.safetensors: content changed); trying the one before it" in caplog.text
    assert f"resumed from {run_dir / 'checkpoint-4'}" in caplog.text
    assert checkpoints.verify(run_dir / "checkpoint-6") == []
    assert runs.differing(undamaged, runs.tensors_of(run_dir / "checkpoint-6")) == []
    assert runs.rows_of(run_dir) == rows


# ---- what cannot even be read ----


def dangling_link(checkpoint: Path, monkeypatch) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors").symlink_to("/nonexistent/model.safetensors")


def folder_instead(checkpoint: Path, monkeypatch) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors").mkdir()


def pipe_instead(checkpoint: Path, monkeypatch) -> None:
    (checkpoint / "model.safetensors").unlink()
    os.mkfifo(checkpoint / "model.safetensors")


def failing_medium(checkpoint: Path, monkeypatch) -> None:
    open_ = Path.open

    def fail(path, *arguments, **settings):
        if path == checkpoint / "model.safetensors":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return open_(path, *arguments, **settings)

    monkeypatch.setattr(Path, "open", fail)


def manifest_folder(checkpoint: Path, monkeypatch) -> None:
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "manifest.json").mkdir()


def manifest_pipe(checkpoint: Path, monkeypatch) -> None:
    (checkpoint / "manifest.json").unlink()
    os.mkfifo(checkpoint / "manifest.json")


def manifest_endless(checkpoint: Path, monkeypatch) -> None:
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "manifest.json").symlink_to("/dev/zero")


def manifest_huge(checkpoint: Path, monkeypatch) -> None:
    os.truncate(checkpoint / "manifest.json", 2**40)  # sparse


def sealed(**changes):
    """A manifest that is sealed and says what none of ours would."""

    def damage(checkpoint: Path, monkeypatch) -> None:
        manifest = json.loads((checkpoint / "manifest.json").read_text()) | changes
        del manifest["sha256"]
        (checkpoint / "manifest.json").write_bytes(checkpoints._seal(manifest))

    return damage


UNREADABLE = {
    "dangling link": dangling_link,
    "folder in place of a file": folder_instead,
    "pipe in place of a file": pipe_instead,
    "failing medium": failing_medium,
    "manifest is a folder": manifest_folder,
    "manifest is a pipe": manifest_pipe,
    "manifest without end": manifest_endless,
    "manifest of a terabyte": manifest_huge,
    "files are a list": sealed(files=["model.safetensors"]),
    "files are nothing": sealed(files=None),
    "a file is a number": sealed(files={"model.safetensors": 7}),
    "sizes are lists": sealed(files={"model.safetensors": {"bytes": [1], "sha256": "0"}}),
    "sizes are infinite": sealed(files={"model.safetensors": {"bytes": float("inf"), "sha256": "0"}}),
    "the step is a text": sealed(step="6"),
    "the format is another": sealed(format=1),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_fallen_back_from_and_listed(run_dir, caplog, capsys, monkeypatch, name):
    """`verify` and `list` answer with a line; so does the run, and goes on from the checkpoint before."""
    UNREADABLE[name](run_dir / "checkpoint-6", monkeypatch)
    assert falls_back(run_dir, caplog, "checkpoint-6")
    assert checkpoints.main(["verify", str(run_dir / "checkpoint-6")]) == 2
    verified = capsys.readouterr().out.splitlines()
    assert verified[0].startswith(f"{run_dir / 'checkpoint-6'}: damaged")
    assert len(verified) > 1
    assert checkpoints.main(["list", str(run_dir)]) == 2
    listed = capsys.readouterr().out
    assert all(line in listed for line in verified)
    assert f"{run_dir / 'checkpoint-4'}: complete" in listed
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    runs.train(run_dir, max_train_steps=6, logging_steps=2, resume_from_checkpoint="latest")
    assert checkpoints.verify(run_dir / "checkpoint-6") == []


def test_an_old_checkpoint_that_cannot_be_read_ends_no_healthy_run(run_dir, caplog):
    """Rotation looks at it, counts it as damaged, and goes on."""
    shutil.rmtree(run_dir / "checkpoint-6")
    dangling_link(run_dir / "checkpoint-2", None)
    manifest_folder(shutil.copytree(run_dir / "checkpoint-4", run_dir / "checkpoint-3"), None)
    runs.train(run_dir, max_train_steps=6, checkpointing_steps=1, resume_from_checkpoint="latest")
    assert checkpoints.verify(run_dir / "checkpoint-6") == []
    intact = [path for path in checkpoints.list_checkpoints(run_dir) if not checkpoints.verify(path)]
    assert [checkpoints.step_of(path) for path in intact] == [6, 5, 4]  # the limit is 2; it resumed from 4


@pytest.mark.parametrize("where", ["checkpoint-7", "checkpoint-7.tmp"])
@pytest.mark.parametrize("what", ["file", "dangling link", "link to a folder", "folder"])
def test_something_in_the_place_of_a_checkpoint_does_not_end_its_save(run_dir, tmp_path, where, what):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("stays")
    place = run_dir / where
    match what:
        case "file":
            place.write_text("a file")
        case "dangling link":
            place.symlink_to("/nonexistent")
        case "link to a folder":
            place.symlink_to(elsewhere)
        case "folder":
            shutil.copytree(elsewhere, place)
    runs.train(run_dir, max_train_steps=7, resume_from_checkpoint=str(run_dir / "checkpoint-6"))
    assert checkpoints.verify(run_dir / "checkpoint-7") == []
    assert not (run_dir / "checkpoint-7").is_symlink()
    assert (elsewhere / "mine").read_text() == "stays"


# ---- a disk that does not take the checkpoint ----


def run_into_a_full_disk(arguments: list[str], file_bytes: int) -> None:
    """From the second save on, no file can grow beyond a size."""
    from trainers import train_shortcut

    begin, calls = checkpoints.begin, []

    def begin_and_fill(run_dir, step):
        calls.append(step)
        if len(calls) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
        return begin(run_dir, step)

    checkpoints.begin = begin_and_fill
    train_shortcut.main(arguments)


@pytest.mark.parametrize("file_bytes", [200, 5_000, 100_000, 300_000])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, file_bytes):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    settings = {"max_train_steps": 3, "checkpointing_steps": 1, "checkpoints_total_limit": 1}
    arguments = runs.command_line(run_dir, **settings)
    process = runs.start(log, run_into_a_full_disk, arguments, file_bytes)
    assert runs.end(process) == 1, log.read_text()
    assert [path.name for path in checkpoints.list_checkpoints(run_dir)] == ["checkpoint-1"]
    assert checkpoints.verify(run_dir / "checkpoint-1") == []
    runs.train(run_dir, **settings, resume_from_checkpoint="latest")  # there is room again
    assert checkpoints.verify(run_dir / "checkpoint-3") == []
    assert not list(run_dir.glob("*.tmp"))


@pytest.mark.parametrize("calls", [1, 4, 7, 8])
def test_a_flush_that_fails_leaves_the_previous_checkpoint(tmp_path, monkeypatch, calls):
    run_dir, fsync, seen = tmp_path / "run", os.fsync, []
    settings = {"checkpoints_total_limit": 1}
    runs.train(run_dir, max_train_steps=1, **settings)

    def fail_once(descriptor):
        seen.append(descriptor)
        if len(seen) == calls:
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_once)
    with pytest.raises(OSError, match="Input/output error"):
        runs.train(run_dir, max_train_steps=2, resume_from_checkpoint="latest", **settings)
    assert checkpoints.verify(run_dir / "checkpoint-1") == []
