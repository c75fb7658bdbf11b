"""Files that are whole or absent: write beside the target, flush, rename; hashes; one process per folder."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
from pathlib import Path
from typing import IO


def write_file(path: Path, data: bytes | str, durable: bool = True) -> None:
    """Give `path` this content: after a kill it is all there, or what it was before.

    Args:
        durable: after a power cut, too; of many small files that can be made again it is not worth the waits.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        if durable:
            fsync(temporary)
        temporary.replace(path)
        if durable:
            fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(values: object) -> str:
    """Of the values, whatever the order of keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, content: dict) -> None:
    write_file(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


class LockedError(Exception):
    """Another process holds the lock; the message says which."""


def lock(path: Path) -> IO[str]:
    """Claim a lock file for this process; the claim ends with the process, however it ends. Keep the file open.

    Raises:
        LockedError: another process has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows either
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise LockedError(holder) from None
    file.truncate(0)
    file.write(f"{os.getpid()} on {platform.node()}\n")
    file.flush()
    return file
