"""Members of tars: found once, read where they lie; an index that does not fit is made again."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from backlot.tar_index import MAX_KEPT_BYTES, TarIndex, index_path

FILES = {"b/one.json": b'{"a": 1}', "b/one.bin": bytes(range(256)) * 9, "empty.json": b"", "ü/two.bin": b"\n\0x"}


def write_tar(path: Path, files: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:", format=format) as tar:
        folder = tarfile.TarInfo("b")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("link.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return path


def contents(index: TarIndex) -> dict[str, bytes]:
    return {name: index.read(row) for row, name in enumerate(index.names)}


def blank(path: Path) -> None:
    """Overwrite a file with zeros, behind its index's back: size and time stay."""
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_of_a_folder_of_tars(tmp_path, format):
    long_name = "long/" * 40 + "name.json"
    write_tar(tmp_path / "b.tar", FILES, format)
    write_tar(tmp_path / "deep" / "a.tar", {f"./{long_name}": b"long"}, format)
    write_tar(tmp_path / "c.tar", {}, format)
    write_tar(tmp_path / ".hidden.tar", {"hidden": b""}, format)
    for _ in range(2):  # without and with stored indices
        index = TarIndex.open(tmp_path, keep=(".json",))
        assert index.problems == {}
        assert [tar.name for tar in index.tars] == ["b.tar", "c.tar", "a.tar"]
        assert contents(index) == {**FILES, long_name: b"long"}
        assert [index.tars[number].name for number in index.tar_numbers] == ["b.tar"] * 4 + ["a.tar"]
        assert index.sizes.tolist() == [8, 2304, 0, 3, 4]
    assert contents(TarIndex.open(tmp_path / "b.tar")) == FILES
    assert not list(tmp_path.glob("*.tmp"))


def test_the_index_is_what_the_second_start_reads(tmp_path):
    path = write_tar(tmp_path / "a.tar", {**FILES, "large.json": bytes(MAX_KEPT_BYTES + 1)})
    before = contents(TarIndex.open(path, keep=(".json",)))
    blank(path)
    index = TarIndex.open(path, keep=(".json",))
    assert index.names == list(before)
    for row, name in enumerate(index.names):
        kept = name.endswith(".json") and len(before[name]) <= MAX_KEPT_BYTES
        assert index.read(row) == (before[name] if kept else bytes(len(before[name])))
    assert index.problems == {}
    assert TarIndex.open(path).problems == {}  # kept contents are asked for otherwise: made anew, of an empty tar
    assert len(TarIndex.open(path)) == 0


def test_another_tar_of_the_name_is_noticed(tmp_path):
    path = write_tar(tmp_path / "a.tar", FILES)
    assert len(TarIndex.open(path)) == 4
    changed = {**FILES, "b/one.json": b'{"a": 2}'}
    time = path.stat().st_mtime_ns
    write_tar(path, changed)  # of the same size
    os.utime(path, ns=(time + 1, time + 1))
    assert contents(TarIndex.open(path, keep=(".json",))) == changed
    index_path(path).replace(tmp_path / ".b.tar.index")
    other = write_tar(tmp_path / "b.tar", {"x": b"y"})
    assert contents(TarIndex.open(other)) == {"x": b"y"}


def test_a_damaged_index_is_made_again(tmp_path):
    path = write_tar(tmp_path / "a.tar", FILES)
    TarIndex.open(path, keep=(".json",))
    stored = index_path(path)
    data, random = stored.read_bytes(), np.random.default_rng(0)
    damaged = [b"", data[:40], data[:-1], data + b"x", bytes(len(data))]
    for _ in range(50):
        flipped = bytearray(data)
        flipped[random.integers(len(data))] ^= 1 << int(random.integers(8))
        damaged.append(bytes(flipped))
    for content in damaged:
        stored.write_bytes(content)
        assert contents(TarIndex.open(path, keep=(".json",))) == FILES
        assert stored.read_bytes() == data


@pytest.mark.parametrize("name", ["../outside.png", "/etc/passwd", "a/../../b", "line\nbreak", ".."])
def test_hostile_names_are_refused(tmp_path, name):
    path = write_tar(tmp_path / "a.tar", {"good": b"1", name: b"2"})
    for _ in range(2):
        index = TarIndex.open(path)
        assert "leads out of it" in index.problems["a.tar"]
        assert index.names == ["good"]
    assert not index_path(path).exists()


def test_what_is_no_tar_is_a_problem_and_never_stored(tmp_path):
    write_tar(tmp_path / "good.tar", FILES)
    cut = write_tar(tmp_path / "cut.tar", FILES)
    cut.write_bytes(cut.read_bytes()[:2000])
    (tmp_path / "text.tar").write_text("no tar")
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "gone.tar").symlink_to(tmp_path / "nowhere")
    for _ in range(2):
        index = TarIndex.open(tmp_path)
        assert {name: reason[:17] for name, reason in index.problems.items()} == {
            "cut.tar": "it is not a compl",
            "text.tar": "it is not a compl",
            "pipe.tar": "it is not a regul",
            "gone.tar": "it is not a regul",
        }
        assert set(index.names) >= set(FILES)
    assert [file.name for file in tmp_path.glob(".*.index")] == [".good.tar.index"]
    with pytest.raises(ValueError, match=r"is neither a tar file nor a folder with \.tar files"):
        TarIndex.open(tmp_path / "nowhere")


def test_where_nothing_can_be_written_it_says_so_once(tmp_path, caplog):
    for name in ("a.tar", "b.tar"):
        path = write_tar(tmp_path / name, FILES)
        path.with_name(f".{name}.index").mkdir()  # stands where the index would
    for _ in range(2):
        assert len(TarIndex.open(tmp_path)) == 8
    assert len(caplog.records) == 1
    assert f"no index of the tars in {tmp_path} can be stored" in caplog.text
    assert not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*.tmp"))


def read_all(index: TarIndex, rows: list[int]) -> list[bytes]:
    return [index.read(row) for row in rows]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_what_one_process_reads(tmp_path, method):
    files = {f"{number}.bin": bytes([number]) * 5000 for number in range(40)}
    index = TarIndex.open(write_tar(tmp_path / "a.tar", files))
    index.read(0)  # a file is open before the workers are born
    rows = [list(range(start, 40, 2)) for start in range(2)]
    with multiprocessing.get_context(method).Pool(2) as pool:
        read = pool.starmap(read_all, [(index, each) for each in rows])
    assert read == [[bytes([row]) * 5000 for row in each] for each in rows]
    assert contents(pickle.loads(pickle.dumps(index))) == files


def test_a_tar_that_became_shorter_is_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", FILES)
    index = TarIndex.open(path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"a\.tar ends in the middle of it"):
        index.read(1)
