"""Samples that cannot be read: listed in a file, counted over all workers, and a run ends when they are too many."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch


class DataQualityError(ValueError):
    """More samples are bad than `max_bad_fraction` allows."""


class Quarantine:
    """The bad samples of one dataset: shared by DataLoader workers through memory, by ranks through one file.

    Args:
        size: of the dataset.
        name: what a sample is called in the list; the same in every session.
        max_bad_fraction: share of the samples that may be bad, in [0, 1].
        path: file that gets one line `{"path", "row", "reason"}` per bad sample; lines of earlier sessions count too.
            None keeps the list in memory.
    """

    def __init__(self, size: int, name: Callable[[int], str], max_bad_fraction: float, path: str | Path | None) -> None:
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"`max_bad_fraction` must be in [0, 1], got {max_bad_fraction}")
        self.path = None if path is None else Path(path)
        self.max_bad_fraction = max_bad_fraction
        self._name = name
        self._bad = torch.zeros(size, dtype=torch.bool).share_memory_()
        self._listed: set[int] = set()
        self._offset = 0

    def __contains__(self, row: int) -> bool:
        return bool(self._bad[row])

    def add(self, row: int, reason: str) -> None:
        """List a sample; DataQualityError when that makes too many."""
        self._bad[row] = True
        if self.path is not None:
            self._read_list()
            if row not in self._listed:
                self._append({"path": self._name(row), "row": row, "reason": reason})
                self._listed.add(row)
        # A copy: other workers may set rows meanwhile, and nonzero() fails if its two passes find different counts.
        count = len(self._listed.union(self._bad.clone().nonzero().flatten().tolist()))
        bound = self.max_bad_fraction * len(self._bad)
        if count > bound:
            where = "" if self.path is None else f"; they are listed in {self.path} (repair them, then delete the list)"
            raise DataQualityError(
                f"{count} of {len(self._bad)} samples are bad, `max_bad_fraction` {self.max_bad_fraction:g}"
                f" allows {int(bound)}; the last is {self._name(row)} ({reason}){where}"
            )

    def _append(self, entry: dict[str, str | int]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # One write to an O_APPEND file: lines of several processes follow each other and never mix.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, (json.dumps(entry) + "\n").encode())
        finally:
            os.close(descriptor)

    def _read_list(self) -> None:
        """Take in the lines that anyone has added since the last call; those about other datasets are passed over."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        complete = text[: text.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.splitlines():
            row = self._listed_row(line)
            if row is not None:
                self._listed.add(row)

    def _listed_row(self, line: bytes) -> int | None:
        try:
            entry = json.loads(line)
        except ValueError:
            return None
        row = entry.get("row") if isinstance(entry, dict) else None
        known = isinstance(row, int) and 0 <= row < len(self._bad) and self._name(row) == entry.get("path")
        return row if known else None
