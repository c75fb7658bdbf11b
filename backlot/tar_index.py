"""Members of tar files, found once: an index beside each tar says where they lie, and they are read there.

    index = TarIndex.open("data/shards", keep=(".json",))
    for name, row in zip(index.names, range(len(index))):
        data = index.read(row)

Nothing is unpacked. The index of `a.tar` is `.a.tar.index` in its folder: names, places, and the contents of small
members that are wanted at every start. It belongs to a tar of one name, size and time of change, and is made again when
that or its own checksum does not fit; where it cannot be written, every start reads the tars' headers.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from safetensors.numpy import load, save

from backlot.files import write_file

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MAX_KEPT_BYTES = 65536
"""Of a member whose content the index keeps; larger ones are read from the tar."""
DIGEST_BYTES = 32
HOSTILE = re.compile(r"^/|(^|/)\.\.(/|$)|[\x00-\x1f]|^$")
"""Names that lead out of the tar, and those with control characters."""


@dataclass(frozen=True)
class Members:
    """What is known of the members of one tar, or of several: row by row, in the order in which they lie.

    Arrays and not lists: forked workers would copy a list's memory page by page, only by counting references.

    Args:
        names: uint8, UTF-8, a newline between two.
        offsets, sizes: (N,) int64, bytes from the start of the tar.
        ends: (N,) int64, where the kept content of each ends in `kept`; empty where nothing is kept.
        kept: uint8.
    """

    names: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    ends: np.ndarray
    kept: np.ndarray

    @classmethod
    def join(cls, parts: Sequence[Members]) -> Members:
        """The members of several tars as those of one."""
        newline = np.frombuffer(b"\n", np.uint8)
        names = [piece for part in parts if len(part.sizes) for piece in (newline, part.names)][1:]
        before = np.cumsum([0, *(len(part.kept) for part in parts[:-1])])
        return cls(
            names=np.concatenate([np.empty(0, np.uint8), *names]),
            offsets=np.concatenate([part.offsets for part in parts]),
            sizes=np.concatenate([part.sizes for part in parts]),
            ends=np.concatenate([part.ends + start for part, start in zip(parts, before, strict=True)]),
            kept=np.concatenate([part.kept for part in parts]),
        )


class TarIndex:
    """The regular members of a tar file or of all tars below a folder, in the order of the tars' names.

    Attributes:
        path: what was opened.
        tars: the files.
        tar_numbers: (N,) int32, the tar of each member.
        sizes: (N,) int64 bytes of each member.
        problems: by the name of a tar, why it cannot be read to its end, or is not read at all.
    """

    def __init__(
        self, path: Path, tars: Sequence[Path], members: Sequence[Members], problems: dict[str, str] | None = None
    ) -> None:
        self.path, self.tars, self.problems = path, list(tars), problems or {}
        self.tar_numbers = np.repeat(np.arange(len(tars), dtype=np.int32), [len(part.sizes) for part in members])
        self._members = Members.join(members)
        self.sizes = self._members.sizes
        self._files: dict[int, BinaryIO] = {}
        self._pid = os.getpid()

    @classmethod
    def open(cls, path: str | Path, keep: tuple[str, ...] = ()) -> TarIndex:
        """Find the members, by the stored indices where these fit.

        Args:
            path: a tar, or a folder with tars at any depth; hidden ones are passed over.
            keep: endings of the names of small members whose contents go into the index.

        Raises:
            ValueError: `path` is no file, and no folder with tars.
        """
        path = Path(path)
        tars = [path] if path.is_file() else sorted(p for p in path.rglob("*.tar") if not p.name.startswith("."))
        if not tars:
            raise ValueError(f"{path} is neither a tar file nor a folder with .tar files")
        found, problems = [], {}
        for tar in tars:
            members, problem = open_members(tar, keep)
            found.append(members)
            if problem is not None:
                problems[tar.name] = problem
        return cls(path, tars, found, problems)

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def names(self) -> list[str]:
        """Of all members; made anew each time, since it takes most of the memory."""
        return self._members.names.tobytes().decode().split("\n") if len(self) else []

    def read(self, row: int) -> bytes:
        """The content of a member; ValueError if its tar ends in it."""
        end = int(self._members.ends[row])
        start = int(self._members.ends[row - 1]) if row else 0
        if end > start:
            return self._members.kept[start:end].tobytes()
        number, size = int(self.tar_numbers[row]), int(self.sizes[row])
        data = os.pread(self._file(number).fileno(), size, int(self._members.offsets[row]))
        if len(data) < size:
            raise ValueError(f"{self.tars[number].name} ends in the middle of it")
        return data

    def _file(self, number: int) -> BinaryIO:
        if self._pid != os.getpid():  # a forked worker
            self._files, self._pid = {}, os.getpid()
        if number not in self._files:
            self._files[number] = self.tars[number].open("rb")
        return self._files[number]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": {}}  # open files do not travel to a spawned worker


def open_members(tar: Path, keep: tuple[str, ...]) -> tuple[Members, str | None]:
    """The members of one tar, from its index or else found and stored; and why it cannot be read to its end."""
    if not tar.is_file():
        return collect([]), "it is not a regular file"
    key = describe(tar, keep)
    members = load_members(tar, key)
    if members is not None:
        return members, None
    problem, found = None, []
    with tar.open("rb") as file:
        try:
            for name, offset, size in find_members(file):
                is_kept = name.endswith(keep) and size <= MAX_KEPT_BYTES
                content = os.pread(file.fileno(), size, offset) if is_kept else b""
                found.append((name, offset, size, content))
        except tarfile.TarError as error:
            problem = f"it is not a complete, uncompressed tar file ({error})"
        except ValueError as error:
            problem = str(error)
    members = collect(found)
    if problem is None:
        store_members(tar, key, members)
    return members, problem


def find_members(file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of the regular files in a tar.

    Raises:
        tarfile.TarError: it is damaged, cut off or compressed.
        ValueError: a name leads out of it.
    """
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # a million of them would fill a gigabyte
            if not member.isreg() or member.issparse():
                continue
            name = member.name.removeprefix("./")
            if HOSTILE.search(name):
                raise ValueError(f"its member {member.name!r} has a name that leads out of it, or no name")
            yield name, member.offset_data, member.size
        # tarfile takes a damaged header, and a file that was cut between members, for the end.
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"damaged or cut off at byte {archive.offset}")


def collect(found: Sequence[tuple[str, int, int, bytes]]) -> Members:
    """Names, offsets, sizes and kept contents as arrays."""
    names, offsets, sizes, contents = zip(*found, strict=True) if found else ((), (), (), ())
    return Members(
        np.frombuffer("\n".join(names).encode("utf-8", "replace"), np.uint8),
        np.array(offsets, np.int64),
        np.array(sizes, np.int64),
        np.cumsum([len(content) for content in contents], dtype=np.int64),
        np.frombuffer(b"".join(contents), np.uint8),
    )


# --- the stored index -----------------------------------------------------------------------------------------------


def index_path(tar: Path) -> Path:
    return tar.with_name(f".{tar.name}.index")


def describe(tar: Path, keep: tuple[str, ...]) -> bytes:
    """What an index must have been made of."""
    status = tar.stat()
    described = [FORMAT_VERSION, tar.name, status.st_size, status.st_mtime_ns, list(keep)]
    return json.dumps(described).encode()


def store_members(tar: Path, key: bytes, members: Members) -> None:
    """Write the index beside the tar; where that is not possible say so, once for each folder, and go on."""
    data = save({"key": np.frombuffer(key, np.uint8), **vars(members)})
    try:
        write_file(index_path(tar), hashlib.sha256(data).digest() + data)
    except OSError as error:
        warn_once(tar.parent, error.strerror or str(error))


@functools.cache
def warn_once(folder: Path, reason: str) -> None:
    logger.warning("no index of the tars in %s can be stored (%s): every start reads all their headers", folder, reason)


def load_members(tar: Path, key: bytes) -> Members | None:
    """The members by the stored index; None if there is none, or it is damaged or of another tar."""
    try:
        data = index_path(tar).read_bytes()
    except OSError:
        return None
    if hashlib.sha256(data[DIGEST_BYTES:]).digest() != data[:DIGEST_BYTES]:
        return None
    arrays = load(data[DIGEST_BYTES:])
    return Members(**arrays) if arrays.pop("key").tobytes() == key else None
