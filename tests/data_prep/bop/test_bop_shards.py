"""Tar shards: equal to the scenes they were made of, one read for a sample, and what is damaged is named."""

import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
from drawn_scenes import write_dataset

from data_prep.bop.format import BadSampleError, BopDataset
from data_prep.bop.index import PoseSource, build_index
from data_prep.bop.shards import decode_rle, encode_rle, scan_shard, shard_number, write_shards


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards") / "data"
    write_dataset(root)
    write_shards(BopDataset(root, "train"), root / "train_web", images_per_shard=2)
    return root


@pytest.fixture
def root(original, tmp_path):
    return shutil.copytree(original, tmp_path / "data")


def edit_tar(path, change) -> None:
    """Write a tar anew with other members, name -> content."""
    with tarfile.open(path) as archive:
        members = {member.name: archive.extractfile(member).read() for member in archive}
    change(members)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def edit_json(kind: str, change, keys=None):
    """A change of the JSON members of a kind."""

    def edit(members) -> None:
        for name in members:
            if name.endswith(f".{kind}.json") and (keys is None or name.startswith(keys)):
                values = json.loads(members[name])
                change(values)
                members[name] = json.dumps(values).encode()

    return edit


def compress(counts) -> str:
    """COCO's text of run lengths."""
    text = ""
    for place, count in enumerate(counts):
        value = count - counts[place - 2] if place > 2 else count
        while True:
            bits, value = value & 31, value >> 5
            more = value != -1 if bits & 16 else value != 0
            text += chr((bits | 32 * more) + 48)
            if not more:
                break
    return text


# --- run lengths ----------------------------------------------------------------------------------------------------


def test_run_lengths_go_by_columns_and_begin_with_zeros():
    mask = np.array([[1, 0, 0], [1, 1, 0]], bool)
    assert encode_rle(mask) == {"counts": [0, 2, 1, 1, 2], "size": [2, 3]}
    assert np.array_equal(decode_rle({"counts": [0, 2, 1, 1, 2], "size": [2, 3]}), mask)
    assert np.array_equal(decode_rle({"counts": compress([0, 2, 1, 1, 2]), "size": [2, 3]}), mask)


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 1])
def test_masks_survive_run_lengths(share):
    mask = np.random.default_rng(0).random((37, 53)) < share
    rle = encode_rle(mask)
    assert np.array_equal(decode_rle(rle), mask)
    assert np.array_equal(decode_rle({**rle, "counts": compress(rle["counts"])}), mask)


def test_run_lengths_must_fill_the_picture():
    with pytest.raises(ValueError, match="fill 5 pixels of 2 x 3"):
        decode_rle({"counts": [3, 2], "size": [2, 3]})


# --- reading --------------------------------------------------------------------------------------------------------


def test_both_formats_give_the_same_samples(original):
    scenes = PoseSource(original / "train")
    build_index(original / "train_web")
    shards = PoseSource(original / "train_web")
    assert len(scenes) == len(shards) > 12
    assert shards.shard_sizes != scenes.shard_sizes
    for index in range(len(scenes)):
        first, second = scenes.read(index), shards.read(index)
        assert scenes.row(index) == shards.row(index)
        for name in ("rgb", "depth", "mask", "K", "bbox_visib"):
            assert np.array_equal(getattr(first, name), getattr(second, name)), name
        assert np.abs(first.camera_from_object - second.camera_from_object).max() < 1e-12
        assert (first.key, first.object_id, first.diameter) == (second.key, second.object_id, second.diameter)


def test_depth_is_divided_by_its_scale(original):
    """The same scale of 10 read as BOP's would give a hundred times the depth."""
    [picture, *_], _, _ = scan_shard(original / "train_web" / "shard-000000.tar")
    assert picture.frame.depth_scale == 10
    report = build_index(original / "train_web")
    assert report.depth == "divide"
    assert 0.5 < np.median(PoseSource(original / "train_web").read(0).depth) < 1.6


def test_shards_in_the_toolkit_s_terms_are_recognised(original, root):
    for tar in sorted((root / "train_web").glob("*.tar")):
        edit_tar(tar, edit_json("camera", lambda values: values.update(depth_scale=0.1)))
    assert build_index(root / "train_web").depth == "multiply"
    assert np.array_equal(PoseSource(root / "train_web").read(3).depth, PoseSource(original / "train").read(3).depth)


def test_a_depth_scale_that_fits_no_pose_is_refused(root):
    tar = root / "train_web" / "shard-000000.tar"
    edit_tar(tar, edit_json("camera", lambda values: values.update(depth_scale=1000)))
    with pytest.raises(ValueError, match="wrong depth scale"):
        build_index(root / "train_web")
    build_index(root / "train_web", depth="divide")
    with pytest.raises(BadSampleError, match=r"wrong depth scale: its surface is measured at 0\.0"):
        PoseSource(root / "train_web").read(0)


def test_a_sample_is_one_read_of_one_tar(original, monkeypatch):
    build_index(original / "train_web")
    source = PoseSource(original / "train_web")
    reads = []
    read = os.pread

    def count(descriptor, size, offset):
        reads.append(size)
        return read(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", count)
    monkeypatch.setattr(tarfile, "open", None)
    for index in range(len(source)):
        source.read(index)
    assert len(reads) == len(source)


def test_members_may_come_in_any_order(original, root):
    def turn_round(members) -> None:
        turned = dict(reversed(members.items()))
        members.clear()
        members.update(turned)

    for tar in (root / "train_web").glob("*.tar"):
        edit_tar(tar, turn_round)
    build_index(root / "train_web")
    found, true = PoseSource(root / "train_web"), PoseSource(original / "train")
    by_key = {sample.key: sample for sample in map(true.read, range(len(true)))}
    for index in range(len(found)):
        sample = found.read(index)
        assert np.array_equal(sample.depth, by_key[sample.key].depth)
        assert np.array_equal(sample.mask, by_key[sample.key].mask)


# --- what is wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda members: members.pop("000000_000001.mask_visib.json"), "mask_visib.json missing"),
        (edit_json("gt", lambda values: values.pop(), "000000_000001"), "3 poses, but 4 entries"),
        (edit_json("camera", lambda values: values.pop("cam_K"), "000000_000001"), "`cam_K` is missing"),
        (lambda members: members.update({"000000_000001.gt.json": b"["}), "gt.json"),
        (lambda members: members.update({"cover.jpg": b""}), "its name is not <scene>_<view>"),
    ],
)
def test_a_bad_picture_is_named_and_the_others_are_kept(root, change, message):
    edit_tar(root / "train_web" / "shard-000000.tar", change)
    report = build_index(root / "train_web")
    [(name, reason)] = report.bad.items()
    assert name.startswith("shard-000000.tar, ")
    assert message in reason
    assert "\n" not in reason
    assert report.num_pictures == (6 if "cover" in name else 5)
    PoseSource(root / "train_web").read(0)


def test_a_damaged_shard_is_named_until_it_is_skipped(root):
    tar = root / "train_web" / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-20_000])
    report = build_index(root / "train_web")
    assert list(report.problems) == ["shard-000001.tar"]
    with pytest.raises(
        ValueError, match=r"shard-000001\.tar is damaged: .*; name its number in `skip_shards`"
    ) as error:
        PoseSource(root / "train_web")
    assert "\n" not in str(error.value)
    source = PoseSource(root / "train_web", skip_shards=[1, 701])
    assert source.shard_sizes[1] == 0
    assert min(source.shard_sizes[::2]) > 0


def test_damage_behind_the_index_is_a_bad_sample(root):
    build_index(root / "train_web")
    source = PoseSource(root / "train_web")
    [picture, *_], _, _ = scan_shard(root / "train_web" / "shard-000000.tar")
    with (root / "train_web" / "shard-000000.tar").open("r+b") as file:
        file.seek(picture.start + int(picture.places[1, 0]))
        file.write(bytes(100))
    with pytest.raises(BadSampleError, match=r"shard-000000\.tar, 000000_000000\.depth\.png is damaged"):
        source.read(0)
    os.truncate(root / "train_web" / "shard-000000.tar", picture.start + 10)
    with pytest.raises(BadSampleError, match="ends in the middle of a picture"):
        source.read(0)
    (root / "train_web" / "shard-000000.tar").unlink()
    with pytest.raises(BadSampleError, match="is missing"):
        source.read(0)


def test_a_mask_that_is_missing_is_a_bad_sample(root):
    edit = edit_json("mask_visib", lambda values: values.pop("1"), "000000_000000")
    edit_tar(root / "train_web" / "shard-000000.tar", edit)
    build_index(root / "train_web")
    source = PoseSource(root / "train_web")
    source.read(0)
    with pytest.raises(BadSampleError, match="has no good mask 1"):
        source.read(1)


def test_shards_have_numbers():
    assert shard_number("shard-000101.tar") == 101
    assert shard_number("all.tar") is None
