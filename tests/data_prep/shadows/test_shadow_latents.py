"""Shadow latents: what is read is what the VAE encodes, also of mirrored pictures; stale caches are refused."""

from __future__ import annotations

import json
import pickle
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from shadow_samples import make_samples, save_folder, write_folder, write_tar
from torch.utils.data import DataLoader, Dataset

from backlot.codecs import PixelCodec
from backlot.files import file_sha256
from backlot.latent_cache import read_manifest, vae_fingerprint
from backlot.samples import SampleKey
from data_prep.images.encode import encode_dataset
from data_prep.images.latents import LatentDataset
from data_prep.shadows.commands import encode as main
from data_prep.shadows.dataset import ShadowDataset
from data_prep.shadows.encode import encode_shadows, latents_folder, open_latents
from data_prep.shadows.latents import ShadowLatents

SIZE, COUNT, SHARD = 32, 12, 5
SCALING_FACTOR, SHIFT_FACTOR = 0.5, 0.25


def save_vae(folder, seed: int = 0, **changes) -> str:
    torch.manual_seed(seed)
    config = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "sample_size": SIZE,
        "latent_channels": 2,
        "scaling_factor": SCALING_FACTOR,
        "shift_factor": SHIFT_FACTOR,
    }
    AutoencoderKL(**{**config, **changes}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def vae(vae_folder):
    return AutoencoderKL.from_pretrained(vae_folder).eval()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Read-only."""
    return write_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def dataset(pictures):
    return ShadowDataset(pictures, split="all")


@pytest.fixture(scope="module")
def finished(vae_folder, dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents") / "all"
    encode(vae_folder, dataset, folder)
    return folder


@pytest.fixture
def cache(finished, tmp_path):
    """A copy of a finished cache that a test may damage."""
    return shutil.copytree(finished, tmp_path / "all")


def encode(vae_folder, dataset, folder, **changes):
    options = {"batch_size": 3, "shard_size": SHARD, "dtype": "float32", "device": "cpu", **changes}
    return encode_shadows(vae_folder, dataset, folder, **options)


def snapshot(folder) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in folder.iterdir()}


class Dying(Dataset):
    """A data set whose row `dies_at` ends like a Ctrl-C, or that counts the rows that were read."""

    def __init__(self, dataset: ShadowDataset, dies_at: int | None = None) -> None:
        self.dataset, self.dies_at, self.rows = dataset, dies_at, []
        self.item_fingerprint, self.split = dataset.item_fingerprint, dataset.split

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        if row == self.dies_at:
            raise KeyboardInterrupt
        self.rows.append(row)
        return self.dataset[row]


@torch.no_grad()
def directly(vae, item: dict[str, torch.Tensor], mirrored: bool = False) -> dict[str, torch.Tensor]:
    """The latents of an item by the VAE itself."""
    pictures = {"object_latents": item["object_image"], "shadow_latents": item["shadow_map"].repeat(3, 1, 1) * 2 - 1}
    mask = item["mask"]
    if mirrored:
        pictures, mask = {name: picture.flip(-1) for name, picture in pictures.items()}, mask.flip(-1)
    latents = {name: vae.encode(picture[None]).latent_dist.mean[0] for name, picture in pictures.items()}
    scaled = {name: (values - SHIFT_FACTOR) * SCALING_FACTOR for name, values in latents.items()}
    return {**scaled, "mask_latents": F.avg_pool2d(mask, 2)}


def are_close(left: dict, right: dict) -> bool:
    return all(torch.allclose(left[name], right[name], atol=1e-5) for name in right)


# --- contents -------------------------------------------------------------------------------------------------------


def test_items_are_what_the_vae_encodes(vae, dataset, finished):
    latents = ShadowLatents(finished, dataset=dataset)
    assert len(latents) == COUNT
    assert latents.manifest.latent_shape == [2, 16, 16]
    for row in range(COUNT):
        item, pictures = latents[row], dataset[row]
        assert {value.dtype for value in item.values()} == {torch.float32}
        assert item["object_latents"].shape == item["shadow_latents"].shape == (2, 16, 16)
        assert item["mask_latents"].shape == (1, 16, 16)
        assert are_close(item, directly(vae, pictures))
        assert [item[name] for name in ("theta", "phi", "size")] == [
            pictures[name] for name in ("theta", "phi", "size")
        ]
    assert set(item) == {"object_latents", "shadow_latents", "mask_latents", "theta", "phi", "size"}
    soft = latents[0]["mask_latents"]
    assert ((soft > 0) & (soft < 1)).any()
    with pytest.raises(IndexError):
        latents[COUNT]


def test_mirrored_items_are_the_encoded_mirror_pictures(vae, dataset, finished):
    latents = ShadowLatents(finished, dataset=dataset, horizontal_flip=True, pixels=True)
    mirroring = ShadowDataset(dataset.path, split="all", horizontal_flip=True)
    kinds = []
    for row in range(COUNT):
        plain, mirrored = (directly(vae, dataset[row], flip) for flip in (False, True))
        # Else mirroring the latents would have done.
        assert not torch.allclose(plain["object_latents"].flip(-1), mirrored["object_latents"], atol=1e-2)
        assert not torch.allclose(plain["shadow_latents"].flip(-1), mirrored["shadow_latents"], atol=1e-2)
        for epoch in range(4):
            key = SampleKey(row, epoch, 7)
            item, pictures = latents[key], mirroring[key]
            kinds.append(not torch.equal(pictures["mask"], dataset[row]["mask"]))
            assert are_close(item, mirrored if kinds[-1] else plain)
            # The same items are mirrored as where pictures are read, and their light with them.
            for name in ("theta", "phi", "size", "shadow_map"):
                assert torch.equal(item[name], pictures[name])
        assert are_close(latents[row], plain)  # a plain int has no randomness
    assert 12 < sum(kinds) < 36


def test_pixels_are_those_of_the_dataset(dataset, finished):
    latents = ShadowLatents(finished, dataset=dataset, pixels=True)
    assert all(torch.equal(latents[row]["shadow_map"], dataset[row]["shadow_map"]) for row in range(COUNT))
    with pytest.raises(ValueError, match="`pixels` are read from the shadow maps: give their `dataset`"):
        ShadowLatents(finished, pixels=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types(vae_folder, dataset, finished, tmp_path, dtype):
    encode(vae_folder, dataset, tmp_path, dtype=dtype)
    stored = load_file(tmp_path / "shard-00000.safetensors")
    assert {name: str(tensor.dtype)[6:] for name, tensor in stored.items()} == {
        **dict.fromkeys(("object", "object_flipped", "shadow", "shadow_flipped", "mask"), dtype),
        **dict.fromkeys(("theta", "phi", "size"), "float32"),
        "indices": "int64",
    }
    half, full = (ShadowLatents(folder)[3] for folder in (tmp_path, finished))
    assert not torch.equal(half["shadow_latents"], full["shadow_latents"])
    for name, value in full.items():
        torch.testing.assert_close(half[name], value, rtol=0.02, atol=0.02)
    assert torch.equal(half["mask_latents"], full["mask_latents"])


def test_nothing_is_mirrored_while_encoding(vae_folder, finished, pictures, tmp_path):
    mirroring = ShadowDataset(pictures, split="all", horizontal_flip=True)
    encode(vae_folder, mirroring, tmp_path)
    assert snapshot(tmp_path) == snapshot(finished)


def test_an_object_under_several_lights_is_encoded_once(vae_folder, dataset, monkeypatch, tmp_path):
    sizes = []
    plain = AutoencoderKL.encode
    monkeypatch.setattr(AutoencoderKL, "encode", lambda self, x: sizes.append(len(x)) or plain(self, x))
    encode(vae_folder, dataset, tmp_path, batch_size=6, shard_size=6)
    # The first gives the shape of the latents; then objects and shadows of each batch, both ways round.
    assert sizes == [1, 3, 3, 6, 6, 3, 3, 6, 6]


def test_workers_and_copies_read_what_one_process_reads(dataset, finished):
    latents = ShadowLatents(finished, dataset=dataset, horizontal_flip=True, pixels=True)
    keys = [SampleKey(row, epoch, 0) for epoch in range(2) for row in range(COUNT)]
    alone = [latents[key] for key in keys]  # and now its files are open
    loaded = list(DataLoader(latents, batch_size=None, sampler=keys, num_workers=2))
    copied = pickle.loads(pickle.dumps(latents))
    for item, other, third in zip(alone, loaded, [copied[key] for key in keys], strict=True):
        assert all(torch.equal(item[name], other[name]) and torch.equal(item[name], third[name]) for name in item)


def test_the_codec_takes_the_place_of_a_vae(dataset, tmp_path):
    PixelCodec(block_size=2, scaling_factor=2.0).save_pretrained(tmp_path / "codec")
    encode(tmp_path / "codec", dataset, tmp_path / "latents")
    item = ShadowLatents(tmp_path / "latents", dataset=dataset)[4]
    torch.testing.assert_close(item["object_latents"], F.pixel_unshuffle(dataset[4]["object_image"], 2) * 2)


# --- the command and the trainer's call -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_open_latents_encodes_what_is_missing(vae_folder, vae, tmp_path, kind):
    path = write_folder(tmp_path / "data") if kind == "folder" else write_tar(tmp_path / "data.tar")
    dataset = ShadowDataset(path, split="all", horizontal_flip=True)
    latents = open_latents(dataset, vae_folder, device="cpu", dtype="float32", pixels=True)
    short = vae_fingerprint(vae_folder)[:8]
    place = tmp_path / ("data/latents" if kind == "folder" else "data-latents") / f"all-32-{short}"
    assert latents.folder == latents_folder(dataset, vae_fingerprint(vae_folder)) == place
    assert (latents.horizontal_flip, latents.pixels) == (True, True)
    assert are_close(latents[3], directly(vae, dataset[3]))
    before = {file.name: file.stat().st_mtime_ns for file in place.iterdir()}
    # The data set is still itself with its latents beside the pictures.
    again = open_latents(ShadowDataset(path, split="all"), vae_folder, device="cpu", dtype="float32")
    assert not again.horizontal_flip
    assert {file.name: file.stat().st_mtime_ns for file in place.iterdir()} == before


def test_a_complete_cache_is_opened_without_reading_pictures(vae_folder, dataset, cache):
    counting = Dying(dataset)
    encode(vae_folder, counting, cache)
    assert counting.rows == [0]  # its size
    encode(vae_folder, counting, cache, verify=True)
    assert counting.rows == [0, 0, *range(COUNT)]


def test_the_command(vae_folder, pictures, tmp_path, capsys):
    options = ["--vae", vae_folder, "--path", str(pictures), "--split", "all", "--device", "cpu"]
    main([*options, "--image_size", "16", "--output_dir", str(tmp_path / "a"), "--batch_size", "5"])
    assert capsys.readouterr().out == f"12 samples in 1 shards: {tmp_path / 'a'}\n"
    assert ShadowLatents(tmp_path / "a", dataset=ShadowDataset(pictures, split="all", image_size=16))[0][
        "object_latents"
    ].shape == (2, 8, 8)
    for arguments, message in (
        (
            [*options, "--output_dir", str(tmp_path / "a")],
            r".* holds latents of another --image_size \(16 there, 32 now\).*",
        ),
        (
            [*options, "--image_size", "15", "--output_dir", str(tmp_path / "b")],
            "the VAE wants square images with a side divisible by 2, got 15x15.*",
        ),
        ([*options, "--split", "validation"], "`split` 'validation' of .* is empty.*"),
        (["--vae", str(tmp_path), *options[2:]], ".* is not the folder of a VAE: it has no config.json.*"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert re.fullmatch(f"error: {message}\n", capsys.readouterr().err)


# --- interruption and repair ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dies_at", [2, 5, 11])
def test_an_interrupted_run_goes_on_to_the_same_files(vae_folder, dataset, finished, tmp_path, dies_at):
    folder = tmp_path / "latents"
    with pytest.raises(KeyboardInterrupt):
        encode(vae_folder, Dying(dataset, dies_at), folder)
    written = dies_at // SHARD * SHARD
    if written:
        with pytest.raises(
            ValueError, match=rf"incomplete, {written} of 12 samples: run data_prep.shadows encode again"
        ):
            ShadowLatents(folder)
    (folder / "shard-00001.safetensors.tmp").write_bytes(b"half a shard")
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert len(times) == dies_at // SHARD
    encode(vae_folder, dataset, folder)
    assert snapshot(folder) == snapshot(finished)
    assert all((folder / name).stat().st_mtime_ns == time for name, time in times.items())


def test_missing_and_damaged_shards_are_repaired(vae_folder, dataset, finished, cache):
    shard = cache / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is missing: run data_prep.shadows encode again"):
        ShadowLatents(cache)
    encode(vae_folder, dataset, cache)
    assert snapshot(cache) == snapshot(finished)
    shard.write_bytes(whole[:-8])
    encode(vae_folder, dataset, cache)
    assert snapshot(cache) == snapshot(finished)
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    shard.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is damaged.*run data_prep.shadows encode again"):
        ShadowLatents(cache).verify()
    encode(vae_folder, dataset, cache, verify=True)
    assert snapshot(cache) == snapshot(finished)


# --- stale caches ---------------------------------------------------------------------------------------------------


def test_another_vae_is_refused(vae_folder, dataset, cache, tmp_path):
    for name, changes in {"weights": {"seed": 1}, "scale": {"scaling_factor": 0.13}}.items():
        other = save_vae(tmp_path / name, **changes)
        with pytest.raises(ValueError, match="holds latents of another VAE"):
            encode(other, dataset, cache)
        with pytest.raises(ValueError, match="were made by another VAE"):
            ShadowLatents(cache, vae_fingerprint=vae_fingerprint(other))
    assert len(ShadowLatents(cache, vae_fingerprint=vae_fingerprint(vae_folder))) == COUNT


def changed_data(samples: dict, what: str) -> dict:
    stem = sorted(samples)[7]
    sample = dict(samples[stem])
    if what == "light":
        sample["metadata"] = {**sample["metadata"], "theta": 1.0}
    elif what == "picture":
        sample["image"] = sample["image"][::-1]
    changed = {**samples, stem: sample}
    if what == "name":
        changed["z"] = changed.pop(stem)
    return changed


@pytest.mark.parametrize("what", ["light", "picture", "name", "fill", "image_size"])
def test_other_data_are_refused(vae_folder, finished, cache, tmp_path, what):
    folder = save_folder(tmp_path / "data", changed_data(make_samples(), what))
    options = {"fill": {"fill": 0.4}, "image_size": {"image_size": 16}}.get(what, {})
    dataset = ShadowDataset(folder, split="all", **options)
    with pytest.raises(
        ValueError, match=r"holds the latents of other data than .* holds now, or of another `image_size`"
    ):
        ShadowLatents(cache, dataset=dataset)
    with pytest.raises(ValueError, match=r"holds latents of (other data|another --image_size) .*, or --overwrite"):
        encode(vae_folder, dataset, cache)
    assert snapshot(cache) == snapshot(finished)
    encode(vae_folder, dataset, cache, overwrite=True)
    ShadowLatents(cache, dataset=dataset).verify()


def test_one_changed_pixel_is_noticed_by_verify(vae_folder, pictures, cache, tmp_path):
    """Files of the same size: only reading them tells."""
    samples = make_samples()
    shadow = samples["005_1"]["shadow"] = samples["005_1"]["shadow"].copy()
    shadow[3, 3] = 0.25
    folder = save_folder(tmp_path / "data", samples)
    changed = ShadowDataset(folder, split="all")
    changed.fingerprint = ShadowDataset(pictures, split="all").fingerprint
    with pytest.raises(ValueError, match=r"other images \(the content of shard-00002.safetensors has changed\)"):
        encode(vae_folder, changed, cache, verify=True)


def test_other_splits_and_other_kinds_of_latents_are_refused(vae_folder, dataset, cache, tmp_path):
    with pytest.raises(ValueError, match="holds the latents of split 'all', not of 'train'"):
        ShadowLatents(cache, split="train")
    with pytest.raises(ValueError, match="holds latents of another kind, without class_labels, mean"):
        LatentDataset(cache)

    class Classes(Dataset):
        num_classes = 2

        def __len__(self):
            return 2

        def __getitem__(self, row):
            return {"pixel_values": dataset[row]["object_image"], "class_labels": torch.tensor(row)}

    encode_dataset(vae_folder, Classes(), tmp_path / "classes", dataset_name="pictures")
    with pytest.raises(ValueError, match="holds latents of another kind, without mask, object, object_flipped, phi"):
        ShadowLatents(tmp_path / "classes")


def test_the_manifest_names_its_source(finished, vae_folder, dataset):
    manifest = read_manifest(finished)
    assert (manifest.dataset_name, manifest.split, manifest.image_size) == ("shadows", "all", SIZE)
    assert (manifest.vae_fingerprint, manifest.dataset_fingerprint) == (
        vae_fingerprint(vae_folder),
        dataset.item_fingerprint,
    )
    assert json.loads((finished / "manifest.json").read_text())["flip"] is True
