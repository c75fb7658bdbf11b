"""Checkpoints that are complete or absent.

A checkpoint is written to `checkpoint-<step>.tmp`, gets a manifest with the size and SHA-256 of every file, is
flushed to disk, and only then renamed. What carries the final name was whole once; whether it still is, `verify`
says.

    python -m trainers.common.checkpoints verify outputs/run/checkpoint-500
    python -m trainers.common.checkpoints list outputs/run
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from backlot.files import file_sha256, fsync

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")
logger = logging.getLogger(__name__)


def begin(run_dir: Path, step: int) -> Path:
    """An empty temporary folder beside the checkpoint's final place (same file system, so that a rename suffices)."""
    temporary = run_dir / f"checkpoint-{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    return temporary


def commit(temporary: Path) -> Path:
    """Make the filled temporary folder a checkpoint: manifest, fsync, rename. Returns its final path."""
    final = temporary.with_suffix("")
    names = _files(temporary)
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(lambda name: file_sha256(temporary / name), names))
    files = {
        name: {"bytes": (temporary / name).stat().st_size, "sha256": digest}
        for name, digest in zip(names, digests, strict=True)
    }
    (temporary / MANIFEST).write_bytes(_seal({"format": 1, "step": step_of(final), "files": files}))
    for name in [*names, MANIFEST]:
        fsync(temporary / name)
    for folder in {(temporary / name).parent for name in [*names, MANIFEST]}:
        fsync(folder)
    if final.exists():  # a damaged one that the run fell back from
        _remove(final)
    temporary.rename(final)
    fsync(final.parent)
    return final


def verify(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint, one line per file; empty if it is complete and undamaged."""
    try:
        sealed = (checkpoint / MANIFEST).read_bytes()
        manifest = json.loads(sealed)
        manifest.pop("sha256")
        # Byte for byte, so that not one bit of the manifest can change unnoticed.
        if _seal(manifest) != sealed or manifest["step"] != step_of(checkpoint):
            return [f"{MANIFEST}: damaged"]
        files = manifest["files"]
    except FileNotFoundError:
        return [f"{MANIFEST}: missing"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [f"{MANIFEST}: damaged"]
    # Compared with what lies in the folder: a manifest cannot point outside it.
    present = _files(checkpoint)
    problems = [f"{name}: missing" for name in sorted(files.keys() - set(present))]
    problems += [f"{name}: not in the manifest" for name in present if name not in files]

    def check(name: str) -> str | None:
        size = (checkpoint / name).stat().st_size
        if size != files[name]["bytes"]:
            return f"{name}: {size} bytes instead of {files[name]['bytes']}"
        return None if file_sha256(checkpoint / name) == files[name]["sha256"] else f"{name}: content changed"

    with ThreadPoolExecutor() as pool:
        found = pool.map(check, [name for name in present if name in files])
        return problems + [problem for problem in found if problem]


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Folders named checkpoint-<step>, newest (highest step) first; any other name is ignored."""
    if not run_dir.is_dir():
        return []
    found = [path for path in run_dir.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def find_latest(run_dir: Path) -> Path | None:
    """The newest checkpoint that verifies; damaged ones on the way are named in a warning."""
    for checkpoint in list_checkpoints(run_dir):
        problems = verify(checkpoint)
        if not problems:
            return checkpoint
        logger.warning("%s is damaged (%s); trying the one before it", checkpoint, "; ".join(problems))
    return None


def rotate(run_dir: Path, limit: int | None, keep_every: int | None, trusted: set[Path], kept: Container[Path]) -> None:
    """Delete what is older than the `limit` newest valid checkpoints.

    Only valid ones count, so a damaged folder never pushes out a good one; `trusted` paths (this process wrote or
    verified them) are not read again. Milestones (multiples of `keep_every`) and those `kept` stay.
    """
    valid = 0
    for checkpoint in list_checkpoints(run_dir) if limit else []:
        if valid < limit:
            valid += checkpoint in trusted or not verify(checkpoint)
        elif checkpoint not in kept and not (keep_every and step_of(checkpoint) % keep_every == 0):
            _remove(checkpoint)


def clean_up(run_dir: Path) -> None:
    """Remove what a killed process left behind half-written or half-deleted."""
    for pattern in ("checkpoint-*.tmp", "checkpoint-*.deleted"):
        for leftover in run_dir.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def step_of(checkpoint: Path) -> int:
    """The number of updates in a checkpoint's name."""
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint} is not named checkpoint-<step>")
    return int(match[1])


def _seal(manifest: dict) -> bytes:
    """The manifest as bytes, with a digest of itself."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**manifest, "sha256": digest}, indent=1, sort_keys=True) + "\n").encode()


def _files(folder: Path) -> list[str]:
    """Files below a folder except its manifest, as relative names; links are not followed."""
    names = []
    for parent, _, files in os.walk(folder):
        names += [str((Path(parent) / name).relative_to(folder)) for name in files]
    return sorted(name for name in names if name != MANIFEST)


def _remove(checkpoint: Path) -> None:
    """Rename first, so that a half-deleted folder never looks like a checkpoint."""
    doomed = checkpoint.with_name(checkpoint.name + ".deleted")
    try:
        shutil.rmtree(doomed, ignore_errors=True)
        checkpoint.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        logger.warning("could not delete %s: %s", checkpoint, error)


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 2 or arguments[0] not in ("verify", "list"):
        print(__doc__)
        return 2
    command, folder = arguments[0], Path(arguments[1])
    if not folder.is_dir():
        print(f"{folder}: no such folder")
        return 2
    checkpoints = [folder] if command == "verify" else list_checkpoints(folder)
    if not checkpoints:
        print(f"{folder} holds no checkpoint")
    damaged = 0
    for checkpoint in checkpoints:
        problems = verify(checkpoint)
        damaged += bool(problems)
        size = sum((checkpoint / name).stat().st_size for name in _files(checkpoint)) / 2**20
        print(f"{checkpoint}: {'damaged' if problems else 'complete'}, {size:.1f} MiB")
        for problem in problems:
            print(f"  {problem}")
    return 1 if damaged else 0


if __name__ == "__main__":
    raise SystemExit(main())
