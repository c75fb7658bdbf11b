"""Latent caches: what is read is what the VAE encodes; stale, damaged or unfinished caches are refused or repaired."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset

from backlot.files import file_sha256, json_sha256
from backlot.latent_cache import read_manifest, vae_fingerprint
from data_prep.images.commands import encode as main
from data_prep.images.dataset import open_images
from data_prep.images.encode import encode_dataset
from data_prep.images.latents import LatentDataset

SIZE, COUNT, SHARD = 16, 10, 4


class Key(int):
    epoch = 0

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * self.epoch + int(self))


def key(row: int, epoch: int) -> Key:
    made = Key(row)
    made.epoch = epoch
    return made


class Pictures(Dataset):
    """Random pictures, the same for the same seed; reading row `dies_at` ends like a Ctrl-C."""

    num_classes = 3

    def __init__(self, seed: int = 0, size: int = SIZE, count: int = COUNT, dies_at: int | None = None) -> None:
        self.class_labels = torch.arange(count) % 3
        self.pixel_values = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        self.dies_at = dies_at

    def __len__(self) -> int:
        return len(self.pixel_values)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        if row == self.dies_at:
            raise KeyboardInterrupt
        return {"pixel_values": self.pixel_values[row], "class_labels": self.class_labels[row]}


def save_vae(folder, seed: int = 0, **changes) -> str:
    torch.manual_seed(seed)
    config = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "sample_size": SIZE,
        "latent_channels": 2,
        "scaling_factor": 0.5,
        "shift_factor": 0.25,
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
def finished(vae_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents") / "train"
    encode(vae_folder, folder)
    return folder


@pytest.fixture
def cache(finished, tmp_path):
    """A copy of a finished cache that a test may damage."""
    return shutil.copytree(finished, tmp_path / "train")


def encode(vae_folder, folder, dataset=None, **changes):
    options = {"dataset_name": "pictures", "batch_size": 3, "shard_size": SHARD, **changes}
    return encode_dataset(vae_folder, dataset or Pictures(), folder, **options)


def snapshot(folder) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in folder.iterdir()}


# --- contents -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_cache_holds_what_the_vae_encodes(vae, finished):
    manifest = read_manifest(finished)
    assert [shard.count for shard in manifest.shards] == [4, 4, 2]
    assert (manifest.scaling_factor, manifest.shift_factor, manifest.image_size) == (0.5, 0.25, SIZE)
    assert (manifest.latent_shape, manifest.num_classes) == ([2, 8, 8], 3)
    pictures = Pictures().pixel_values
    shards = [load_file(finished / shard.name) for shard in manifest.shards]
    tensors = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
    for suffix, pixel_values in {"": pictures, "_flipped": pictures.flip(-1)}.items():
        expected = vae.encode(pixel_values).latent_dist
        torch.testing.assert_close(tensors[f"mean{suffix}"], expected.mean)
        torch.testing.assert_close(tensors[f"std{suffix}"], expected.std)
    assert tensors["indices"].tolist() == list(range(COUNT))
    assert tensors["class_labels"].tolist() == [row % 3 for row in range(COUNT)]


@torch.no_grad()
def test_items_are_scaled_samples_of_the_posterior(vae, finished):
    dataset = LatentDataset(finished, split="train")
    assert (len(dataset), dataset.num_classes) == (COUNT, 3)
    expected = vae.encode(Pictures().pixel_values[7:8]).latent_dist
    draws = torch.stack([dataset[key(7, epoch)]["latents"] for epoch in range(400)])
    unscaled = draws / 0.5 + 0.25
    assert (unscaled.mean(0) - expected.mean[0]).abs().max() < 0.3 * expected.std.max()
    torch.testing.assert_close(unscaled.std(0).mean(), expected.std.mean(), rtol=0.05, atol=0)
    item = dataset[key(7, 0)]
    assert (item["latents"].dtype, item["latents"].shape) == (torch.float32, (2, 8, 8))
    assert (item["class_labels"].item(), item["class_labels"].dtype) == (1, torch.int64)
    with pytest.raises(IndexError):
        dataset[key(COUNT, 0)]


def test_mean_only_decodes_to_the_vaes_own_round_trip(vae_folder, vae, tmp_path):
    encode(vae_folder, tmp_path / "means", mean_only=True, flip=False)
    assert set(load_file(tmp_path / "means" / "shard-00000.safetensors")) == {"mean", "class_labels", "indices"}
    dataset = LatentDataset(tmp_path / "means")
    for row in range(COUNT):
        picture = Pictures().pixel_values[row : row + 1]
        latents = dataset[row]["latents"][None]  # a plain int: nothing is random
        with torch.no_grad():
            ours = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
            theirs = vae.decode(vae.encode(picture).latent_dist.mode()).sample
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="needs mirrored latents"):
        LatentDataset(tmp_path / "means", horizontal_flip=True)


def test_flipped_items_are_the_encoded_mirror_pictures(vae_folder, vae, tmp_path):
    encode(vae_folder, tmp_path / "means", mean_only=True)
    dataset = LatentDataset(tmp_path / "means", horizontal_flip=True)
    picture = Pictures().pixel_values[2:3]
    with torch.no_grad():
        plain, mirrored = ((vae.encode(p).latent_dist.mean[0] - 0.25) * 0.5 for p in (picture, picture.flip(-1)))
    assert not torch.allclose(plain, mirrored, atol=1e-3)
    kinds = []
    for epoch in range(30):
        latents = dataset[key(2, epoch)]["latents"]
        kinds.append(torch.allclose(latents, mirrored, atol=1e-5))
        assert kinds[-1] or torch.allclose(latents, plain, atol=1e-5)
    assert 5 < sum(kinds) < 25


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_are_stored_as_such_and_read_as_float32(vae_folder, finished, tmp_path, dtype):
    encode(vae_folder, tmp_path / dtype, dtype=dtype)
    assert load_file(tmp_path / dtype / "shard-00000.safetensors")["mean"].dtype == getattr(torch, dtype)
    half, full = (LatentDataset(folder)[key(1, 0)]["latents"] for folder in (tmp_path / dtype, finished))
    assert half.dtype == torch.float32
    assert not torch.equal(half, full)
    torch.testing.assert_close(half, full, rtol=0.02, atol=0.02)


def test_workers_read_what_one_process_reads(finished):
    dataset = LatentDataset(finished, horizontal_flip=True)
    keys = [key(row, epoch) for epoch in range(2) for row in range(COUNT)]
    alone = torch.stack([dataset[k]["latents"] for k in keys])  # and now its files are open
    loader = DataLoader(dataset, batch_size=5, sampler=keys, num_workers=2)
    assert torch.equal(torch.cat([batch["latents"] for batch in loader]), alone)
    spawned = copy.deepcopy(dataset)  # goes through the same state as the way to a spawned worker
    assert torch.equal(torch.stack([spawned[k]["latents"] for k in keys]), alone)


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_and_open_images(vae_folder, tmp_path, capsys):
    """Digits have one channel: a grey VAE takes them."""
    grey = save_vae(tmp_path / "grey", in_channels=1, out_channels=1, shift_factor=None)
    out = tmp_path / "cache"
    options = ["--vae", grey, "--dataset_name", "digits", "--batch_size", "64", "--no_flip", "--device", "cpu"]
    main([*options, "--split", "validation", "--output_dir", str(out / "validation"), "--shard_size", "200"])
    assert "360 samples in 2 shards" in capsys.readouterr().out
    dataset = open_images("latents", path=out, split="validation", image_size=8)
    assert (len(dataset), dataset.num_classes, dataset.manifest.shift_factor) == (360, 10, None)
    assert dataset[key(250, 0)]["class_labels"] == open_images("digits", split="validation")[250]["class_labels"]
    with pytest.raises(ValueError, match=r"`image_size` is 16, the latents in .* are of 8"):
        open_images("latents", path=out, split="validation", image_size=16)
    with pytest.raises(ValueError, match="is not a latent cache"):
        open_images("latents", path=out, split="train")
    with pytest.raises(ValueError, match="holds the latents of split 'validation', not of 'train'"):
        open_images("latents", path=out / "validation", split="train")
    with pytest.raises(SystemExit, match="2"):
        main([*options[:3], "imagefolder", "--path", str(tmp_path), "--output_dir", str(tmp_path / "x")])
    assert "set --image_size" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["--vae", vae_folder, "--dataset_name", "digits", "--output_dir", str(tmp_path / "x"), "--device", "cpu"])
    assert "error: the VAE takes 3 channels, the images have 1" in capsys.readouterr().err


def test_pictures_that_do_not_fit_the_vae(vae_folder, tmp_path):
    with pytest.raises(ValueError, match="side divisible by 2, got 15x15"):
        encode(vae_folder, tmp_path / "x", Pictures(size=15))
    scaled = save_vae(tmp_path / "scaled", latents_mean=[0.0, 0.0], latents_std=[1.0, 1.0])
    with pytest.raises(ValueError, match="normalises each latent channel"):
        encode(scaled, tmp_path / "x")
    with pytest.raises(ValueError, match="`batch_size` must be at least 1"):
        encode(vae_folder, tmp_path / "x", batch_size=0)


# --- interruption and repair ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dies_at", [1, 3, 4, 6, 9])
def test_an_interrupted_run_goes_on_to_the_same_files(vae_folder, finished, tmp_path, dies_at):
    folder = tmp_path / "latents"
    with pytest.raises(KeyboardInterrupt):
        encode(vae_folder, folder, Pictures(dies_at=dies_at))
    if dies_at >= SHARD:
        with pytest.raises(ValueError, match=f"incomplete, {dies_at // SHARD * SHARD} of 10 samples"):
            LatentDataset(folder)
    # What a SIGKILL leaves in the middle of a write.
    (folder / "shard-00001.safetensors.tmp").write_bytes(b"half a shard")
    (folder / "manifest.json.tmp").write_bytes(b"{")
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    encode(vae_folder, folder)
    assert snapshot(folder) == snapshot(finished)
    assert all((folder / name).stat().st_mtime_ns == time for name, time in times.items())


def test_a_shard_without_its_manifest_entry_is_written_again(vae_folder, finished, cache):
    """SIGKILL between the rename of a shard and that of the manifest."""
    manifest = read_manifest(cache)
    (cache / "manifest.json").write_text(replace(manifest, shards=manifest.shards[:1]).to_json())
    (cache / "shard-00001.safetensors").write_bytes(b"of an older run")
    encode(vae_folder, cache)
    assert snapshot(cache) == snapshot(finished)


def test_missing_and_damaged_shards_are_refused_and_repaired(vae_folder, finished, cache):
    shard = cache / "shard-00001.safetensors"
    whole = shard.read_bytes()
    first_time = (cache / "shard-00000.safetensors").stat().st_mtime_ns

    shard.unlink()
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is missing: run data_prep.images encode again"):
        LatentDataset(cache)
    encode(vae_folder, cache)
    assert snapshot(cache) == snapshot(finished)

    shard.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=rf"has {len(whole) - 8} bytes, the manifest says {len(whole)}"):
        LatentDataset(cache)

    flipped = bytearray(whole)
    flipped[-5] ^= 1
    shard.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is damaged, its sha256"):
        LatentDataset(cache).verify()
    encode(vae_folder, cache)
    assert snapshot(cache) == snapshot(finished)
    LatentDataset(cache).verify()
    assert (cache / "shard-00000.safetensors").stat().st_mtime_ns == first_time

    shard.write_bytes(b"\xff" * len(whole))
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is damaged"):
        LatentDataset(cache)[key(5, 0)]


# --- stale caches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dataset": Pictures(size=32)}, r"another --image_size \(16 there, 32 now\)"),
        ({"dtype": "float16"}, r"another --dtype \(float32 there, float16 now\)"),
        ({"mean_only": True}, "another choice of --mean_only"),
        ({"flip": False}, "another choice of --flip"),
        ({"shard_size": 5}, "another --shard_size"),
        ({"split": "validation"}, "another --split"),
        ({"dataset": Pictures(count=11)}, r"another number of images \(10 there, 11 now\)"),
        ({"dataset": Pictures(seed=1)}, r"other images \(the content of shard-00000.safetensors has changed\)"),
    ],
)
def test_a_cache_of_something_else_is_refused(vae_folder, finished, cache, changes, reason):
    with pytest.raises(ValueError, match=rf"{reason}.*: choose another --output_dir, or --overwrite"):
        encode(vae_folder, cache, **changes)
    assert snapshot(cache) == snapshot(finished)
    encode(vae_folder, cache, overwrite=True, **changes)
    LatentDataset(cache).verify()
    assert snapshot(cache)["manifest.json"] != snapshot(finished)["manifest.json"]


@pytest.mark.parametrize("what", ["pixel", "label"])
def test_one_changed_pixel_or_label_is_noticed(vae_folder, cache, what):
    pictures = Pictures()
    if what == "pixel":
        pictures.pixel_values[9, 2, 15, 15] += 1e-6
    else:
        pictures.class_labels[9] = 2
    with pytest.raises(ValueError, match=r"the content of shard-00002.safetensors has changed"):
        encode(vae_folder, cache, pictures)
    (cache / "shard-00002.safetensors").unlink()  # also where the shard has to be encoded again
    with pytest.raises(ValueError, match=r"the content of shard-00002.safetensors has changed"):
        encode(vae_folder, cache, pictures)


def test_another_vae_is_refused_by_writer_and_reader(vae_folder, cache, tmp_path):
    other = save_vae(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="holds latents of another VAE"):
        encode(other, cache)
    with pytest.raises(ValueError, match="were made by another VAE"):
        LatentDataset(cache, vae_fingerprint=vae_fingerprint(other))
    assert len(LatentDataset(cache, vae_fingerprint=vae_fingerprint(vae_folder))) == COUNT


def test_the_fingerprint_is_of_weights_and_config(vae_folder, vae, tmp_path):
    own = vae_fingerprint(vae_folder)
    vae.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert vae_fingerprint(tmp_path / "sharded") == own
    folders = {"weights": {"seed": 1}, "config": {"scaling_factor": 0.6}}
    assert len({own, *(vae_fingerprint(save_vae(tmp_path / k, **v)) for k, v in folders.items())}) == 3
    with pytest.raises(ValueError, match=r"has no config.json"):
        vae_fingerprint(tmp_path)
    (tmp_path / "weights" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no safetensors weights"):
        vae_fingerprint(tmp_path / "weights")


# --- manifests ------------------------------------------------------------------------------------------------------


def signed(values: dict) -> str:
    return json.dumps({**values, "manifest_sha256": json_sha256(values)})


def damaged_manifests(values: dict) -> dict[str, tuple[str, str]]:
    shards = values["shards"]
    return {
        "empty": ("", "not JSON"),
        "binary": ("\x00\x01", "not JSON"),
        "deep": ("[" * 100_000, "not JSON"),
        "list": ("[]", "checksum"),
        "edited": (json.dumps({**values, "scaling_factor": 0.51, "manifest_sha256": json_sha256(values)}), "checksum"),
        "version": (signed({**values, "format_version": 2}), "has format version 2, this code reads 1"),
        "unknown key": (signed({**values, "extra": 1}), "is damaged"),
        "no shards": (signed({k: v for k, v in values.items() if k != "shards"}), "is damaged"),
        "shards a number": (signed({**values, "shards": 3}), "is damaged"),
        "count a word": (signed({**values, "num_samples": "ten"}), "is damaged"),
        "outside": (signed({**values, "shards": [{**shards[0], "name": "../../x"}, *shards[1:]]}), "out of order"),
        "order": (signed({**values, "shards": shards[::-1]}), "out of order"),
    }


@pytest.mark.parametrize("kind", list(damaged_manifests({"shards": [{}]})))
def test_damaged_manifests_are_refused_in_one_line(vae_folder, cache, kind):
    text, message = damaged_manifests(asdict(read_manifest(cache)))[kind]
    (cache / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        LatentDataset(cache)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="--overwrite starts again"):
        encode(vae_folder, cache)


def test_any_flipped_bit_in_a_manifest_is_noticed(cache):
    path = cache / "manifest.json"
    whole = path.read_bytes()
    intact = read_manifest(cache)
    for position in range(0, len(whole), 7):
        data = bytearray(whole)
        data[position] ^= 1 << position % 8
        path.write_bytes(data)
        try:
            found = read_manifest(cache)
        except ValueError:
            continue
        assert found == intact  # the bit was in white space
