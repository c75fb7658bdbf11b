"""Shadow data: folder and tar read alike, nothing bad is read in silence, no object is in two splits."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from shadow_samples import (
    FAULTS,
    encode_npy,
    encode_png,
    encode_sample,
    make_samples,
    save_folder,
    save_members,
    save_tar,
    write_folder,
    write_tar,
)
from torch.utils.data import DataLoader

from backlot.samples import SampleKey
from data_prep.shadows.dataset import ShadowDataset

KINDS = ("object_image", "mask", "shadow_map")
LIGHT = {"theta": 30, "phi": 40, "size": 4}


def items(dataset, keys=None) -> list[dict[str, torch.Tensor]]:
    return [dataset[key] for key in (range(len(dataset)) if keys is None else keys)]


def assert_equal(left: list[dict], right: list[dict]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def one_sample(**metadata) -> dict:
    sample = make_samples(1, 1)["000_0"]
    return {**sample, "metadata": {**LIGHT, **metadata}}


def rewrite(samples: dict, index: int = 0, **changes) -> dict:
    """The samples with other pictures or metadata for one of them."""
    stem = sorted(samples)[index]
    return {**samples, stem: {**samples[stem], **changes}}


# --- what is read ---------------------------------------------------------------------------------------------------


def test_items_are_what_was_written(tmp_path):
    samples = make_samples()
    dataset = ShadowDataset(save_folder(tmp_path, samples), split="all")
    assert (len(dataset), dataset.picture_size) == (12, (32, 32))
    assert dataset.stems == sorted(samples)
    assert dataset.object_ids == [samples[stem]["metadata"]["object_id"] for stem in dataset.stems]
    for row, stem in enumerate(dataset.stems):
        item, sample = dataset[row], samples[stem]
        assert [item[name].shape for name in KINDS] == [(3, 32, 32), (1, 32, 32), (1, 32, 32)]
        assert {value.dtype for value in item.values()} == {torch.float32}
        pixels = torch.from_numpy(sample["image"]).permute(2, 0, 1)
        torch.testing.assert_close(item["object_image"], pixels / 127.5 - 1)
        assert torch.equal(item["mask"][0], torch.from_numpy(sample["mask"]) / 255)
        shadow = torch.from_numpy(sample["shadow"]).float()
        torch.testing.assert_close(item["shadow_map"][0], shadow, atol=0.51 / 65535, rtol=0)
        light = [item[name].item() for name in LIGHT]
        assert light == pytest.approx([sample["metadata"][name] for name in LIGHT], rel=1e-6)
        assert dataset.lights[row] == pytest.approx(light)
        assert torch.equal(dataset.shadow_map(row), item["shadow_map"])
    with pytest.raises(IndexError):
        dataset[12]
    with pytest.raises(IndexError):
        dataset[-1]


def test_folder_tar_and_folder_of_tars_read_alike(tmp_path):
    samples = make_samples()
    sources = [save_folder(tmp_path / "folder", samples), save_tar(tmp_path / "one.tar", samples)]
    for number in range(3):
        part = {stem: sample for stem, sample in samples.items() if int(stem[:3]) % 3 == number}
        sources.append(save_tar(tmp_path / "many" / f"shard-{number}.tar", part).parent)
    datasets = [ShadowDataset(source, split="all") for source in (*sources[:2], sources[-1])]
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for dataset in datasets[1:]:
        assert_equal(items(dataset), items(datasets[0]))
        for name in ("stems", "lights", "object_ids", "tracks"):
            assert getattr(dataset, name) == getattr(datasets[0], name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before  # nothing was unpacked


def test_precision_of_shadow_maps(tmp_path):
    """16 bits and npy keep what 8 bits lose."""
    sample = one_sample()
    ramp = np.linspace(0, 1, 32 * 32).reshape(32, 32).astype(np.float32)
    data = {"a": encode_png((ramp * 255).round().astype(np.uint8)), "b": encode_png(ramp), "c": encode_npy(ramp)}
    data["d"] = encode_npy(np.asfortranarray(ramp.astype(">f8")))
    folder = save_folder(tmp_path, {stem: {**sample, "shadow": ramp} for stem in data})
    for stem in data:
        (folder / "shadows" / f"{stem}.png").unlink()
        suffix = ".npy" if stem in "cd" else ".png"
        (folder / "shadows" / f"{stem}{suffix}").write_bytes(data[stem])
    eight, sixteen, *exact = (item["shadow_map"][0].numpy() for item in items(ShadowDataset(folder, split="all")))
    assert all(np.array_equal(values, ramp) for values in exact)
    assert 0 < np.abs(sixteen - ramp).max() < 0.51 / 65535
    assert 0.4 / 255 < np.abs(eight - ramp).max() < 0.51 / 255


def test_grey_pictures_may_be_stored_as_rgb(tmp_path):
    samples = make_samples(1, 2)
    first, second = (samples[stem] for stem in sorted(samples))
    for kind in ("mask", "shadow"):
        eight = (second[kind] * 255).round().astype(np.uint8) if kind == "shadow" else second[kind]
        first[kind], second[kind] = np.stack([eight] * 3, axis=-1), eight
    first, second = items(ShadowDataset(save_folder(tmp_path, samples), split="all"))
    assert torch.equal(first["mask"], second["mask"])
    assert torch.equal(first["shadow_map"], second["shadow_map"])


@pytest.mark.parametrize("fill", [0.5, 0.25])
def test_transparent_objects_lie_on_the_fill(tmp_path, fill):
    sample = one_sample()
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[:16, :, 3], rgba[16:24, :, 3] = 255, 102
    folder = save_folder(tmp_path, {"a": {**sample, "image": rgba}})
    picture = ShadowDataset(folder, split="all", fill=fill)[0]["object_image"]
    expected = [[200 / 255, 0.4 * 200 / 255 + 0.6 * fill, fill], [0, 0.6 * fill, fill]]
    for channel, values in zip((0, 2), expected, strict=True):
        torch.testing.assert_close(picture[channel, [0, 20, 31], 5], torch.tensor(values) * 2 - 1)


def test_other_formats_of_object_pictures(tmp_path):
    sample = one_sample()
    sample["image"] = np.full((32, 32, 3), (200, 100, 50), np.uint8)
    folder = save_folder(tmp_path, {"a": sample, "b": sample, "c": sample})
    for stem, suffix in {"b": "jpg", "c": "webp"}.items():
        (folder / "objects" / f"{stem}.png").unlink()
        Image.fromarray(sample["image"]).save(folder / "objects" / f"{stem}.{suffix}")
    (folder / "objects" / ".DS_Store.png").write_bytes(b"")
    (folder / "objects" / "notes.txt").write_text("not a picture")
    png, jpg, webp = (item["object_image"] for item in items(ShadowDataset(folder, split="all")))
    torch.testing.assert_close(jpg, png, atol=0.03, rtol=0)
    torch.testing.assert_close(webp, png, atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("given", "expected"), [(0, 0), (360, 0), (400, 40), (-90, 270), (-1e-20, 0), (359.9999999, 0), (7200.5, 0.5)]
)
def test_phi_is_wrapped(tmp_path, given, expected):
    dataset = ShadowDataset(save_folder(tmp_path, {"a": one_sample(phi=given)}), split="all")
    assert dataset.lights[0][1] == dataset[0]["phi"].item() == expected


@pytest.mark.parametrize("name", ["size", "light_size", "s"])
def test_names_of_the_size_and_the_radius_which_is_none(tmp_path, name):
    metadata = {"theta": 45, "phi": 0, name: 3, "r": 8}
    dataset = ShadowDataset(save_folder(tmp_path, {"a": {**one_sample(), "metadata": metadata}}), split="all")
    assert dataset.lights == [(45, 0, 3)]
    assert dataset[0]["size"].item() == 3


def test_optional_metadata(tmp_path):
    labels = {"object_id": 7, "clipped": True, "family": "torus"}
    dataset = ShadowDataset(save_folder(tmp_path, {"a": one_sample(**labels), "b": one_sample()}), split="all")
    first, second = dataset.labels
    assert (first.object_id, first.clipped, first.family, first.track) == ("7", True, "torus", None)
    assert (second.object_id, second.clipped, second.family, second.track) == (None, None, None, None)


def test_objects_in_both_data_sets_are_found(tmp_path):
    here, there = write_folder(tmp_path / "a", seed=0), write_folder(tmp_path / "b", seed=1)
    ShadowDataset(here, split="all").check_disjoint(ShadowDataset(there, split="all"))
    with pytest.raises(ValueError, match="share 6 objects"):
        ShadowDataset(here, split="all").check_disjoint(ShadowDataset(here, split="all"))


# --- sizes ----------------------------------------------------------------------------------------------------------


def test_resizing_averages_the_maps(tmp_path):
    dataset = ShadowDataset(write_folder(tmp_path, image_size=64), split="all", image_size=16)
    whole = ShadowDataset(tmp_path, split="all")
    assert dataset.picture_size == (16, 16)
    for row in range(len(dataset)):
        item, large = dataset[row], whole[row]
        assert {value.shape[-2:] for name, value in item.items() if name in KINDS} == {(16, 16)}
        shadow, mask = (torch.nn.functional.avg_pool2d(large[name], 4) for name in ("shadow_map", "mask"))
        torch.testing.assert_close(item["shadow_map"], shadow)
        torch.testing.assert_close(item["mask"], mask)
        assert item["object_image"].abs().max() <= 1
        average = torch.nn.functional.avg_pool2d(large["object_image"], 4)
        assert (item["object_image"] - average).abs().mean() < 0.05


@pytest.mark.parametrize(("height", "width"), [(32, 64), (64, 32), (33, 20)])
def test_pictures_that_are_not_square_are_centred(tmp_path, height, width):
    sample = one_sample()
    sample["image"] = np.full((height, width, 3), 255, np.uint8)
    sample["mask"], sample["shadow"] = np.full((height, width), 255, np.uint8), np.ones((height, width))
    item = ShadowDataset(save_folder(tmp_path, {"a": sample}), split="all", image_size=32, fill=0.5)[0]
    short = round(32 * min(height, width) / max(height, width))
    inside = torch.zeros(32, 32)
    start = (32 - short) // 2
    (inside if height < width else inside.T)[start : start + short] = 1
    assert torch.equal(item["mask"][0], inside)
    assert torch.equal(item["shadow_map"][0], inside)
    assert torch.equal(item["object_image"], inside.expand(3, 32, 32))  # white is 1, the fill is 0


def test_without_image_size_all_pictures_have_one_size(tmp_path):
    samples = {**make_samples(1, 1, 32), **{f"z_{k}": s for k, s in make_samples(1, 1, 48).items()}}
    dataset = ShadowDataset(save_folder(tmp_path, samples), split="all")
    dataset[0]
    with pytest.raises(ValueError, match=r"sample 'z_000_0' of .*: 48x48 pixels, '000_0' has 32x32: set `image_size`"):
        dataset[1]
    assert [item["mask"].shape[-1] for item in items(ShadowDataset(tmp_path, split="all", image_size=24))] == [24, 24]


# --- splits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("object_ids", [True, False])
def test_splits_share_no_object(tmp_path, object_ids):
    path = write_folder(tmp_path / "data", num_objects=100, lights=2, image_size=8, object_ids=object_ids)
    train, validation, everything = (ShadowDataset(path, split=split) for split in ("train", "validation", "all"))
    assert sorted(train.stems + validation.stems) == everything.stems
    assert not set(train.object_ids) & set(validation.object_ids)
    assert len(set(everything.object_ids)) == 100
    assert 1 <= len(set(validation.object_ids)) <= 12
    assert len(validation) == 2 * len(set(validation.object_ids))  # both lights of an object
    # More objects do not move the others.
    more = write_folder(tmp_path / "more", num_objects=120, lights=2, image_size=8, object_ids=object_ids)
    assert set(validation.stems) <= set(ShadowDataset(more, split="validation").stems)


def test_an_empty_split_is_an_error(tmp_path):
    write_folder(tmp_path, num_objects=3)
    with pytest.raises(ValueError, match=r"`split` 'validation' of .* is empty: none of its 3 objects"):
        ShadowDataset(tmp_path, split="validation")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, r"`split` must be one of train, validation, all, got 'test'"),
        ({"image_size": 0}, r"`image_size` must be at least 1, got 0"),
        ({"fill": 128}, r"`fill` must be in \[0, 1\], got 128"),
    ],
)
def test_arguments_out_of_range(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ShadowDataset(write_folder(tmp_path), **options)


# --- mirroring, workers ---------------------------------------------------------------------------------------------


def test_mirrored_items(tmp_path):
    path = write_folder(tmp_path)
    plain, dataset = ShadowDataset(path, split="all"), ShadowDataset(path, split="all", horizontal_flip=True)
    assert_equal(items(dataset), items(plain))  # a plain int has no randomness
    assert_equal(items(plain, [SampleKey(row, 0, 1) for row in range(12)]), items(plain))
    mirrored = 0
    for epoch in range(8):
        for row in range(len(plain)):
            item, original = dataset[SampleKey(row, epoch, 3)], plain[row]
            if torch.equal(item["object_image"], original["object_image"]):
                assert_equal([item], [original])
                continue
            mirrored += 1
            assert all(torch.equal(item[name], original[name].flip(-1)) for name in KINDS)
            assert (item["theta"], item["size"]) == (original["theta"], original["size"])
            assert item["phi"].item() == pytest.approx((180 - original["phi"].item()) % 360, abs=1e-4)
    assert 30 < mirrored < 66
    assert_equal(items(dataset, [SampleKey(5, 2, 3)] * 2)[:1], items(dataset, [SampleKey(5, 2, 3)]))


def test_a_mirrored_shadow_lies_where_its_light_says(tmp_path):
    """The centre of each shadow is on the other side of the object from the light, mirrored or not."""
    dataset = ShadowDataset(write_folder(tmp_path, num_objects=10, image_size=64), split="all", horizontal_flip=True)
    offsets = (torch.arange(64) + 0.5) / 64 - 0.5
    for row, light in enumerate(dataset.lights):
        for item in (dataset[SampleKey(row, epoch, 0)] for epoch in range(4)):
            shadow = item["shadow_map"][0] / item["shadow_map"].sum()
            x, y = (shadow.sum(0) * offsets).sum(), (shadow.sum(1) * offsets).sum()
            phi, length = item["phi"].deg2rad(), 0.4 * np.sin(np.radians(light[0]))
            # y points down in the picture: light from behind the object (90) throws the shadow down
            torch.testing.assert_close(
                torch.stack([x, y]), length * torch.stack([-phi.cos(), phi.sin()]), atol=0.03, rtol=0
            )


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_workers_and_copies_read_what_one_process_reads(tmp_path, kind):
    path = write_folder(tmp_path / "folder") if kind == "folder" else write_tar(tmp_path / "data.tar")
    dataset = ShadowDataset(path, split="all", horizontal_flip=True)
    keys = [SampleKey(row, epoch, 0) for epoch in range(2) for row in range(len(dataset))]
    alone = items(dataset, keys)  # and now its files are open
    for num_workers in (0, 2):
        loader = DataLoader(dataset, batch_size=None, sampler=keys, num_workers=num_workers)
        assert_equal(list(loader), alone)
    assert_equal(items(pickle.loads(pickle.dumps(dataset)), keys), alone)
    assert pickle.loads(pickle.dumps(dataset)).fingerprint == dataset.fingerprint


# --- evaluation data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "track"),
    [
        ("softness_control_", "softness_control"),
        ("direction_control_horz_", "direction_control_horz"),
        ("direction_control_vert_", "direction_control_vert"),
        ("softness_control/", "softness_control"),
        ("./direction_control_horz/", "direction_control_horz"),
        ("benchmark/direction_control_vert_", "direction_control_vert"),
    ],
)
def test_the_benchmark_is_refused_for_training(tmp_path, prefix, track):
    path = write_tar(tmp_path / "test.tar", prefix, num_objects=2, object_ids=False)
    for split in ("train", "validation", "all"):
        with pytest.raises(
            ValueError, match=rf"test.tar holds evaluation data \({track}\).*`evaluation=True`"
        ) as caught:
            ShadowDataset(path, split=split)
        assert "\n" not in str(caught.value)
    dataset = ShadowDataset(path, split="all", evaluation=True)
    assert dataset.tracks == [track] * 4
    assert_equal(items(dataset), items(ShadowDataset(write_folder(tmp_path / "f", num_objects=2), split="all")))


def test_one_sample_of_a_track_is_enough(tmp_path):
    samples = make_samples()
    named = rewrite(samples, 3, metadata={**LIGHT, "object_id": "superquadric-3", "track": "horizontal"})
    with pytest.raises(ValueError, match=r"holds evaluation data \(horizontal\)"):
        ShadowDataset(save_folder(tmp_path / "named", named))
    folder = save_folder(tmp_path / "stem", {**samples, "softness_control_001": one_sample()})
    with pytest.raises(ValueError, match=r"holds evaluation data \(softness_control\)"):
        ShadowDataset(folder)
    dataset = ShadowDataset(folder, split="all", evaluation=True)
    assert dataset.tracks == [None] * 12 + ["softness_control"]
    # The name of the tar or its folder tells it as well.
    for name in ("softness_control.tar", "direction_control_horz/000.tar"):
        save_tar(tmp_path / name[:4] / name, samples)
        for path in (tmp_path / name[:4], (tmp_path / name[:4] / name).parent, tmp_path / name[:4] / name):
            if path.name != "000.tar":
                with pytest.raises(ValueError, match="holds evaluation data"):
                    ShadowDataset(path)
    other = save_folder(tmp_path / "other", {"no_softness_control": one_sample()})
    assert ShadowDataset(other, split="all").tracks == [None]


# --- bad data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_samples_are_named_in_one_line(tmp_path, fault):
    stem, (damage, message) = "001_1", FAULTS[fault]
    damage(write_folder(tmp_path), stem)
    pattern = rf"^sample '{stem}' of {re.escape(str(tmp_path))}: .*{message.replace('STEM', stem)}"
    with pytest.raises(ValueError, match=pattern) as caught:
        items(ShadowDataset(tmp_path, split="all"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fault", ["theta 46", "size 1", "no phi", "phi nan", "empty mask", "cut object", "npy nan"])
def test_bad_samples_in_a_tar(tmp_path, fault):
    """The same pictures and metadata are as bad there."""
    stem, (damage, message) = "001_1", FAULTS[fault]
    folder = write_folder(tmp_path / "folder")
    damage(folder, stem)
    metadata = json.loads((folder / "metadata.json").read_text())
    members = [(f"{name}.metadata.json", json.dumps(entry).encode()) for name, entry in metadata.items()]
    for kind, suffix in {"objects": "image", "masks": "mask", "shadows": "shadow"}.items():
        for path in (folder / kind).iterdir():
            members.append((f"{path.stem}.{suffix}{path.suffix}", path.read_bytes()))
    save_members(tmp_path / "data.tar", members)
    with pytest.raises(ValueError, match=rf"sample '{stem}' of .*data.tar: .*{message}"):
        items(ShadowDataset(tmp_path / "data.tar", split="all"))


def test_several_bad_samples_point_to_the_check(tmp_path):
    write_folder(tmp_path)
    for stem, fault in {"000_0": "theta 46", "002_1": "no mask"}.items():
        FAULTS[fault][0](tmp_path, stem)
    with pytest.raises(
        ValueError, match=r"'000_0'.*\(bad samples in all: 2\); python -m data_prep.shadows check .* lists"
    ):
        ShadowDataset(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"metadata.json is damaged: not JSON"),
        ("[" * 100_000, r"metadata.json is damaged: not JSON"),
        ("\xff", r"metadata.json is damaged: not JSON"),
        ("[]", r"metadata.json is damaged: not a JSON object of stems"),
        ('{"a": {}, "a": {}}', r"metadata.json is damaged: the key 'a' is there twice"),
        (None, r"metadata.json is missing"),
        ("{}", r"sample '000_0' of .*: it is not in metadata.json \(bad samples in all: 12\)"),
    ],
)
def test_damaged_metadata_files(tmp_path, text, message):
    path = write_folder(tmp_path) / "metadata.json"
    path.unlink()
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        ShadowDataset(tmp_path)


def test_places_without_shadow_data(tmp_path):
    with pytest.raises(
        ValueError, match=r"`path` must be a folder or a tar file of shadow data, .*nowhere does not exist"
    ):
        ShadowDataset(tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"holds no shadow data: neither metadata.json beside objects/, masks/, shadows/"
    ):
        ShadowDataset(tmp_path)
    with pytest.raises(ValueError, match=r"empty.tar holds no samples"):
        ShadowDataset(save_members(tmp_path / "empty.tar", []))
    (tmp_path / "text.tar").write_text("no tar at all")
    with pytest.raises(ValueError, match=r"'text.tar' of .*: it is not a complete, uncompressed tar file"):
        ShadowDataset(tmp_path / "text.tar")
    with tarfile.open(tmp_path / "packed.tar", "w:gz"):
        pass
    with pytest.raises(ValueError, match=r"'packed.tar' of .*: it is not a complete, uncompressed tar file"):
        ShadowDataset(tmp_path / "packed.tar")


def members_of(samples: dict) -> list[tuple[str, bytes]]:
    return [(f"{stem}.{name}", data) for stem, s in samples.items() for name, data in encode_sample(s).items()]


def test_tars_with_missing_and_repeated_members(tmp_path):
    members = members_of(make_samples(2, 1))
    with pytest.raises(ValueError, match=r"sample '001_0' of .*: 001_0.metadata missing"):
        ShadowDataset(save_members(tmp_path / "short.tar", members[:-1]))
    with pytest.raises(ValueError, match=r"sample '000_0' of .*: its image is there twice \(twice.tar\)"):
        ShadowDataset(save_members(tmp_path / "twice.tar", [*members, members[0]]))
    for name in ("a", "b"):
        save_members(tmp_path / "two" / f"{name}.tar", members)
    with pytest.raises(ValueError, match=r"sample '000_0' of .*: its image is there twice \(a.tar, b.tar\).*in all: 2"):
        ShadowDataset(tmp_path / "two")
    bad = [(name, b"{" if name == "000_0.metadata.json" else data) for name, data in members]
    with pytest.raises(ValueError, match=r"sample '000_0' of .*: its metadata is damaged: not JSON"):
        ShadowDataset(save_members(tmp_path / "json.tar", bad))


def test_a_link_in_a_tar_is_not_followed(tmp_path):
    members = members_of(make_samples(1, 1))
    secret = tmp_path / "secret.png"
    secret.write_bytes(members[0][1])
    with tarfile.open(tmp_path / "link.tar", "w:") as tar:
        link = tarfile.TarInfo(members[0][0])
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        tar.addfile(link)
        for name, data in members[1:]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with pytest.raises(ValueError, match=r"000_0.image missing"):
        ShadowDataset(tmp_path / "link.tar")


def test_a_tar_that_was_cut_short(tmp_path):
    """Wherever it ends, between members as well, and also where a header in its middle is damaged."""
    path = write_tar(tmp_path / "data.tar", num_objects=2, lights=1)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512
        header = tar.getmembers()[5].offset
    message = r"sample 'data.tar' of .*: it is not a complete, uncompressed tar file"
    for length in [*range(512, end + 1, 512), *range(300, end, 997)]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=message):
            ShadowDataset(path)
    path.write_bytes(whole[:header] + b"x" * 512 + whole[header + 512 :])
    with pytest.raises(ValueError, match=message):
        ShadowDataset(path)


def test_a_tar_that_is_cut_while_it_is_read(tmp_path):
    path = write_tar(tmp_path / "data.tar")
    dataset = ShadowDataset(path, split="all")
    os.truncate(path, path.stat().st_size // 2)
    dataset[0]
    with pytest.raises(ValueError, match=r"sample '005_1' of .*: data.tar ends in the middle of it"):
        dataset[11]


def test_a_file_that_went_away(tmp_path):
    dataset = ShadowDataset(write_folder(tmp_path), split="all")
    (tmp_path / "shadows" / "000_1.png").unlink()
    with pytest.raises(ValueError, match=r"sample '000_1' of .*: a file cannot be read \(No such file or directory\)"):
        dataset[1]


def test_the_fingerprint_follows_the_data(tmp_path):
    samples = make_samples()
    changed = {
        "same": samples,
        "light": rewrite(samples, metadata={**samples["000_0"]["metadata"], "phi": 1.0}),
        "picture": rewrite(samples, image=np.zeros((32, 32, 3), np.uint8)),
        "fewer": {stem: sample for stem, sample in samples.items() if stem != "000_0"},
    }
    folders = {name: save_folder(tmp_path / name, data) for name, data in changed.items()}
    own = ShadowDataset(folders["same"], split="all").fingerprint
    assert ShadowDataset(save_tar(tmp_path / "t.tar", samples), split="all").fingerprint == own
    others = [ShadowDataset(folders[name], split="all").fingerprint for name in ("light", "picture", "fewer")]
    assert len({own, *others}) == 4
    settings = ({}, {"image_size": 16}, {"fill": 0.4}, {"horizontal_flip": True})
    datasets = [ShadowDataset(folders["same"], split="all", **changes) for changes in settings]
    assert {dataset.fingerprint for dataset in datasets} == {own}
    assert len({dataset.item_fingerprint for dataset in datasets}) == 3  # mirroring changes no file of a cache
