"""Fingerprints of data sets: cheap hashes that tell other data apart, and stay the same when a folder is moved."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from backlot.files import file_sha256

NUM_READ = 64


def fingerprint(entries: Iterable[object]) -> str:
    """sha256, in hexadecimal, over texts, numbers, bytes and tuples of them, in their order."""
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(repr(entry).encode("utf-8", "surrogateescape"))
        digest.update(b"\0")
    return digest.hexdigest()


def spread(count: int, number: int = NUM_READ) -> list[int]:
    """Up to `number` rows of `count`, evenly spread, the first among them."""
    return [i * count // number for i in range(number)] if count > number else list(range(count))


def fingerprint_files(root: Path, names: Sequence[str]) -> str:
    """Of files below `root`: their names, their sizes, and what some of them hold (`NUM_READ`, evenly spread)."""
    sizes = ((name, (root / name).stat().st_size) for name in names)
    contents = (file_sha256(root / names[row]) for row in spread(len(names)))
    return fingerprint([*sizes, *contents])
