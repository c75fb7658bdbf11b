"""Fingerprints: other data of equal length have another one, a moved folder and other settings the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scene_samples import write_scenes
from shadow_samples import write_folder, write_tar

from backlot.codecs import PixelCodec
from data_prep.images.dataset import MnistDataset, open_images
from data_prep.images.encode import encode_dataset
from data_prep.images.latents import LatentDataset
from data_prep.scenes.dataset import SceneDataset
from data_prep.scenes.occupancy import OccupancyDataset
from data_prep.shadows.dataset import ShadowDataset
from data_prep.shadows.encode import encode_shadows
from data_prep.shadows.latents import ShadowLatents


def write_images(folder: Path, seed: int) -> None:
    """Twelve bitmaps, all of one size in bytes."""
    random = np.random.default_rng(seed)
    for number in range(12):
        path = folder / f"class_{number % 2}" / f"{number:02d}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)


def write_parquet(folder: Path, seed: int) -> None:
    datasets = pytest.importorskip("datasets")
    write_images(folder / "files", seed)
    files = sorted((folder / "files").rglob("*.bmp"))
    rows = {
        "image": [{"bytes": file.read_bytes(), "path": None} for file in files],
        "label": [index % 2 for index in range(12)],
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder / "set")


def save_codec(folder: Path) -> Path:
    PixelCodec(block_size=2).save_pretrained(folder / "vae")
    return folder / "vae"


def write_latents(folder: Path, seed: int) -> None:
    write_images(folder / "files", seed)
    dataset = open_images("imagefolder", path=folder / "files", split="all")
    encode_dataset(save_codec(folder), dataset, folder / "cache", dataset_name="pictures", device="cpu")


def write_shadow_latents(folder: Path, seed: int) -> None:
    dataset = ShadowDataset(write_folder(folder / "files", seed=seed), split="all")
    encode_shadows(save_codec(folder), dataset, folder / "cache", device="cpu")


def write_latent_scenes(folder: Path, seed: int, **settings) -> None:
    """Four scenes of two objects, with the same names and file sizes whatever the seed."""
    write_scenes(folder, {"train": 4}, seed=seed, num_objects=(2, 2), **settings)
    for number, scene in enumerate(sorted((folder / "train").iterdir())):
        scene.rename(folder / "train" / f"scene_{number}")


def write_shape_scenes(folder: Path, seed: int) -> None:
    write_latent_scenes(folder, seed, resolution=4)


def open_shadows(folder: Path, **settings) -> ShadowDataset:
    return ShadowDataset(folder, split="all", **settings)


# What writes a folder from a seed, what opens it, and settings that are no part of the data.
CASES: dict[str, tuple[Callable, Callable, dict]] = {
    "images": (
        write_images,
        lambda folder, **settings: open_images("imagefolder", path=folder, split="all", **settings),
        {"image_size": 8, "horizontal_flip": True},
    ),
    "hub": (
        write_parquet,
        lambda folder, **settings: open_images("hub", path=folder / "set", **settings),
        {"image_size": 8},
    ),
    "latents": (
        write_latents,
        lambda folder, **settings: LatentDataset(folder / "cache", **settings),
        {"horizontal_flip": True},
    ),
    "shadows": (lambda folder, seed: write_folder(folder, seed=seed), open_shadows, {"image_size": 16, "fill": 0.2}),
    "shadow tars": (
        lambda folder, seed: write_tar(folder / "a.tar", seed=seed),
        open_shadows,
        {"horizontal_flip": True},
    ),
    "shadow latents": (
        write_shadow_latents,
        lambda folder, **settings: ShadowLatents(folder / "cache", **settings),
        {"horizontal_flip": True},
    ),
    "scenes": (write_latent_scenes, SceneDataset, {"conditions": (), "shuffle_objects": False}),
    "shapes": (write_shape_scenes, OccupancyDataset, {"flip": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_other_data_have_another_fingerprint_and_a_moved_folder_the_same(tmp_path, name):
    write, open_dataset, settings = CASES[name]
    write(tmp_path / "one", 0)
    write(tmp_path / "two", 100)
    one, two = open_dataset(tmp_path / "one"), open_dataset(tmp_path / "two")
    own = one.fingerprint
    assert len(one) == len(two)
    assert len(own) == 64
    assert int(own, 16) >= 0
    assert two.fingerprint != own
    assert open_dataset(tmp_path / "one", **settings).fingerprint == own
    shutil.copytree(tmp_path / "one", tmp_path / "elsewhere" / "moved")
    assert open_dataset(tmp_path / "elsewhere" / "moved").fingerprint == own


def test_splits_of_the_digits_differ():
    prints = [open_images("digits", split=split).fingerprint for split in ("train", "validation", "all", "train")]
    assert len(set(prints)) == 3
    assert prints[0] == prints[3]


def test_mnist_is_known_by_its_digits_and_labels():
    images = torch.randint(0, 256, (5, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(5, dtype=torch.uint8)
    own = MnistDataset(images, labels).fingerprint
    assert MnistDataset(images, labels, image_size=32).fingerprint == own
    assert MnistDataset(images, labels.flip(0)).fingerprint != own
    assert MnistDataset(images.flip(0), labels).fingerprint != own


def test_one_more_file_and_one_longer_file_are_other_data(tmp_path):
    def fingerprint() -> str:
        return open_images("imagefolder", path=tmp_path, split="all").fingerprint

    write_images(tmp_path, 0)
    own = fingerprint()
    file = tmp_path / "class_1" / "11.bmp"
    data = file.read_bytes()
    file.write_bytes(data + b"0")
    longer = fingerprint()
    file.write_bytes(data)
    assert fingerprint() == own
    file.rename(tmp_path / "class_0" / "11.bmp")
    assert len({own, longer, fingerprint()}) == 3
