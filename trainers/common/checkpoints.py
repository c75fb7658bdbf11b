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
import stat
import sys
from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from backlot.command_line import EXIT_DONE, EXIT_INPUT
from backlot.files import file_sha256, fsync

MANIFEST = "manifest.json"
FORMAT = 2
MAX_MANIFEST_BYTES = 64 * 2**20
_NAME = re.compile(r"checkpoint-(\d+)")
logger = logging.getLogger(__name__)


def begin(run_dir: Path, step: int) -> Path:
    """An empty temporary folder beside the checkpoint's final place (same file system, so that a rename suffices)."""
    temporary = run_dir / f"checkpoint-{step}.tmp"
    discard(temporary)
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
    (temporary / MANIFEST).write_bytes(_seal({"format": FORMAT, "step": step_of(final), "files": files}))
    for name in [*names, MANIFEST]:
        fsync(temporary / name)
    for folder in {(temporary / name).parent for name in [*names, MANIFEST]}:
        fsync(folder)
    if os.path.lexists(final):  # a damaged one that the run fell back from, or something else of that name
        _remove(final)
    temporary.rename(final)
    fsync(final.parent)
    return final


def verify(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint, one line per file; empty if it is complete and undamaged. Never raises."""
    try:
        about = (checkpoint / MANIFEST).lstat()  # a pipe or a device would never end
        if not stat.S_ISREG(about.st_mode) or about.st_size > MAX_MANIFEST_BYTES:
            return [f"{MANIFEST}: damaged"]
        sealed = (checkpoint / MANIFEST).read_bytes()
        manifest = json.loads(sealed)
        manifest.pop("sha256")
        # Byte for byte, so that not one bit of the manifest can change unnoticed.
        if _seal(manifest) != sealed or manifest["step"] != step_of(checkpoint):
            return [f"{MANIFEST}: damaged"]
        if manifest["format"] != FORMAT:
            return [f"{MANIFEST}: format {manifest['format']}, this code reads {FORMAT}"]
        files = {name: (int(about["bytes"]), str(about["sha256"])) for name, about in manifest["files"].items()}
        present = _files(checkpoint)
    except FileNotFoundError:
        return [f"{MANIFEST}: missing"]
    except OSError as error:
        return [f"{MANIFEST}: unreadable ({error.strerror or error})"]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return [f"{MANIFEST}: damaged"]
    # Compared with what lies in the folder: a manifest cannot point outside it.
    problems = [f"{name}: missing" for name in sorted(files.keys() - set(present))]
    problems += [f"{name}: not in the manifest" for name in present if name not in files]

    def check(name: str) -> str | None:
        (wanted, digest), path = files[name], checkpoint / name
        try:
            if path.is_symlink() or not path.is_file():
                return f"{name}: not a regular file"
            size = path.stat().st_size
            if size != wanted:
                return f"{name}: {size} bytes instead of {wanted}"
            return None if file_sha256(path) == digest else f"{name}: content changed"
        except OSError as error:
            return f"{name}: unreadable ({error.strerror or error})"

    with ThreadPoolExecutor() as pool:
        found = pool.map(check, [name for name in present if name in files])
        return problems + [problem for problem in found if problem]


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Folders named checkpoint-<step>, newest (highest step) first; any other name is ignored."""
    if not run_dir.is_dir():
        return []
    # os.path.isdir says no, where Path.is_dir would raise, of what cannot be read
    found = [path for path in run_dir.iterdir() if _NAME.fullmatch(path.name) and os.path.isdir(path)]
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
            discard(leftover)


def discard(path: Path) -> None:
    """Remove a folder, a file or a link, whatever stands there; nothing is fine, too."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def step_of(checkpoint: Path) -> int:
    """The number of updates in a checkpoint's name."""
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint} is not named checkpoint-<step>")
    return int(match[1])


def size_of(checkpoint: Path) -> int:
    """Bytes of its files; those that cannot be read count nothing."""
    total = 0
    for name in _files(checkpoint):
        with suppress(OSError):
            total += (checkpoint / name).lstat().st_size
    return total


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
        discard(doomed)
        checkpoint.rename(doomed)
        if doomed.is_symlink() or doomed.is_file():
            doomed.unlink()
        else:
            shutil.rmtree(doomed)
    except OSError as error:
        logger.warning("could not delete %s: %s", checkpoint, error)


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 2 or arguments[0] not in ("verify", "list"):
        print(__doc__)
        return EXIT_DONE if arguments in (["-h"], ["--help"]) else EXIT_INPUT
    command, folder = arguments[0], Path(arguments[1])
    if not folder.is_dir():
        print(f"{folder}: no such folder")
        return EXIT_INPUT
    checkpoints = [folder] if command == "verify" else list_checkpoints(folder)
    if not checkpoints:
        print(f"{folder} holds no checkpoint")
    damaged = 0
    for checkpoint in checkpoints:
        problems = verify(checkpoint)
        damaged += bool(problems)
        print(f"{checkpoint}: {'damaged' if problems else 'complete'}, {size_of(checkpoint) / 2**20:.1f} MiB")
        for problem in problems:
            print(f"  {problem}")
    return EXIT_INPUT if damaged else EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(main())
