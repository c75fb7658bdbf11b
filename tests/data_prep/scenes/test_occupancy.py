"""The shapes of scenes, one item per object: order, packing, variation, and what is wrong with a folder."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from scene_samples import change_metadata, change_tensors, make_scene, write_scenes

from backlot.samples import SampleKey
from data_prep.scenes.format import unpack_occupancy, write_scene
from data_prep.scenes.occupancy import OccupancyDataset


@pytest.fixture
def root(tmp_path):
    """Scenes of 2, 3, 4 and 2 objects in train, 3 and 4 in val."""
    return write_scenes(tmp_path / "scenes", {"train": 4, "val": 2}, resolution=8)


def grids_of(root, split: str) -> np.ndarray:
    tensors = [make_scene(number, count=2 + number % 3, resolution=8)["tensors"] for number in range(6)]
    packed = [t["occupancy"].numpy() for t in (tensors[:4] if split == "train" else tensors[4:])]
    return unpack_occupancy(np.concatenate(packed), 8)


@pytest.mark.parametrize(("split", "count"), [("train", 11), ("val", 7)])
def test_items_are_the_objects_of_all_scenes_in_order(root, split, count):
    dataset = OccupancyDataset(root, split)
    assert len(dataset) == count
    assert dataset.resolution == 8
    items = torch.stack([dataset[row]["occupancy"] for row in range(count)])
    assert items.shape == (count, 1, 8, 8, 8)
    assert items.dtype == torch.float32
    assert np.array_equal(items[:, 0].numpy(), grids_of(root, split))


def test_scenes_can_be_listed(root):
    (root / "train" / "scenes.txt").write_text("0002\n0000\n")
    dataset = OccupancyDataset(root)
    grids = grids_of(root, "train")
    assert np.array_equal([dataset[row]["occupancy"][0] for row in range(6)], [*grids[5:9], *grids[:2]])


def test_grids_stay_packed_and_travel_to_workers(root):
    dataset = OccupancyDataset(root)
    data = pickle.dumps(dataset)
    assert len(data) < 11 * 64 + 600
    assert torch.equal(pickle.loads(data)[3]["occupancy"], dataset[3]["occupancy"])


@pytest.mark.parametrize(
    ("settings", "kinds"), [({"flip": True}, 4), ({"rotate": True}, 4), ({"flip": True, "rotate": True}, 8), ({}, 1)]
)
def test_variations_are_those_of_the_square_and_belong_to_the_key(root, settings, kinds):
    dataset = OccupancyDataset(root, **settings)
    grid = dataset[5]["occupancy"][0].numpy()  # a plain index
    turned = [np.rot90(each, quarters, (0, 1)) for each in (grid, grid[::-1]) for quarters in range(4)]
    seen = set()
    for epoch in range(100):
        varied = dataset[SampleKey(5, epoch, 0)]["occupancy"][0].numpy()
        seen.add(next(i for i, each in enumerate(turned) if np.array_equal(each, varied)))
        assert np.array_equal(varied, dataset[SampleKey(5, epoch, 0)]["occupancy"][0])
    wanted = {"flip": {0, 2, 4, 6}, "rotate": {0, 1, 2, 3}}
    assert seen == (wanted[next(iter(settings))] if len(settings) == 1 else set(range(kinds)))


def test_rows_that_are_not_there(root):
    dataset = OccupancyDataset(root)
    for row in (-1, 11):
        with pytest.raises(IndexError, match=f"object {row} of 11"):
            dataset[row]


def test_what_is_wrong_with_a_folder_is_one_line(root):
    with pytest.raises(ValueError, match=r"^split 'test' of .* is missing: there is no folder"):
        OccupancyDataset(root, "test")
    change_tensors(root / "val" / "0005", "shapes", occupancy=None)
    with pytest.raises(ValueError, match=r"^scene '0005' of .*val: shapes: occupancy missing"):
        OccupancyDataset(root, "val")
    change_metadata(root / "train" / "0001", resolution=None)
    with pytest.raises(ValueError, match=r"^scene '0001' of .*train: `resolution` of metadata.json must be"):
        OccupancyDataset(root)
    (root / "train" / "0000" / "shapes.safetensors").unlink()
    with pytest.raises(ValueError, match=r"^scene '0000' of .*train: shapes.safetensors is missing"):
        OccupancyDataset(root)


def test_all_scenes_have_one_resolution(root):
    write_scene(root / "train" / "0009", **make_scene(9, resolution=4))
    with pytest.raises(
        ValueError, match=r"^scene '0009' of .*: shapes: occupancy has resolution 4, the first scene's 8"
    ):
        OccupancyDataset(root)
