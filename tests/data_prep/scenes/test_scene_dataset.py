"""Reading scenes: padding, shuffling, limits, hooks; the same key always gives the same item."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import pytest
import torch
from scene_samples import COND_CHANNELS, change_metadata, change_tensors, make_scene, write_scenes
from torch.utils.data import DataLoader, default_collate

import data_prep.scenes.dataset
from backlot.modalities import POSES
from backlot.samples import SampleKey
from data_prep.scenes.dataset import SceneDataset
from data_prep.scenes.format import CONDITIONS, read_tensors, write_scene
from pipelines.shortcut_scene import PoseCodec

# Scene i has 2 + i % 3 objects: 2, 3, 4, 2, 3, 4.
COUNTS = [2, 3, 4, 2, 3, 4]
ALL = tuple(CONDITIONS)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Read only."""
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture
def own(tmp_path) -> Path:
    """A copy to damage."""
    return write_scenes(tmp_path)


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name]), name


def objects(item: dict[str, torch.Tensor]) -> list[int]:
    """Which object of its scene each row is, by what `make_scene` writes into its translation."""
    return [round(float(x) % 1 * 100) for x in item["translation"][item["object_mask"], 0, 0]]


# --- items ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [True, False])
def test_items_are_what_was_written(root, cache):
    dataset = SceneDataset(root, conditions=ALL, cache=cache)
    assert len(dataset) == 6
    assert dataset.scene_ids == [f"{i:04d}" for i in range(6)]
    assert dataset.num_objects == COUNTS
    assert (dataset.shape_tokens, dataset.shape_channels, dataset.image_size) == (4, 3, 16)
    for row, count in enumerate(COUNTS):
        scene, item = make_scene(row, count=count), dataset[row]
        for name in ("shape", *POSES):
            assert torch.equal(item[name], scene["tensors"][name])
        assert torch.equal(item["object_mask"], torch.ones(count, dtype=torch.bool))
        written = scene["conditionals"]
        assert torch.allclose(item["image"], written["image"] / 255 * 2 - 1, atol=1e-6)
        assert item["image"].dtype == torch.float32
        assert -1 <= item["image"].min() < -0.9 < 0.9 < item["image"].max() <= 1
        assert torch.equal(item["pointmap"], written["pointmap"].nan_to_num(0))
        assert item["masks"].dtype == torch.bool
        assert torch.equal(item["masks"], written["masks"] == 1)
        assert torch.equal(item["cond_tokens"], written["cond_tokens"])
        assert item["cond_mask"].all()
        assert item["cond_mask"].shape == (5,)
    with pytest.raises(IndexError, match="row 6 of 6"):
        dataset[6]


def test_only_the_requested_conditions_are_there(root):
    names = {"shape", *POSES, "object_mask"}
    assert SceneDataset(root)[0].keys() == names | {"image", "pointmap"}
    bare = SceneDataset(root, conditions=())
    assert bare[0].keys() == names
    assert bare.image_size is None


def test_a_point_that_is_partly_unknown_is_background(own):
    pointmap = torch.ones(3, 16, 16)
    pointmap[1, 5, 6] = torch.nan
    change_tensors(own / "train" / "0000", "conditionals", pointmap=pointmap)
    item = SceneDataset(own)[0]
    assert torch.equal(item["pointmap"][:, 5, 6], torch.zeros(3))
    assert item["pointmap"].sum() == 3 * 255


def test_the_codec_standardises(root):
    raw = SceneDataset(root)
    codec = PoseCodec.fit([make_scene(row, count=count)["tensors"] for row, count in enumerate(COUNTS)])
    dataset = SceneDataset(root, codec=codec)
    rows = {name: torch.cat([dataset[row][name] for row in range(6)]) for name in ("shape", *POSES)}
    for values in rows.values():
        flat = values.flatten(0, -2)
        assert flat.mean(0).abs().max() < 1e-5
    assert_same(dataset[2], {**raw[2], **codec.encode({name: raw[2][name] for name in rows})})


def test_a_codec_of_other_data_is_refused(root):
    codec = PoseCodec("zscore", {"shape": [0.0]}, {"shape": [1.0]})
    with pytest.raises(ValueError, match=r"scene '0000' of .*: .*codec"):
        SceneDataset(root, codec=codec)


def test_both_formats_read_alike(root, tmp_path):
    write_scenes(tmp_path, format="pt", layout="channels_tokens")
    left, right = SceneDataset(root, conditions=ALL), SceneDataset(tmp_path, conditions=ALL)
    for row in range(6):
        assert_same(left[row], right[row])


def test_float_pictures_and_bytes_fit_one_batch(own):
    image = torch.rand(3, 16, 16) * 2 - 1
    change_tensors(own / "train" / "0001", "conditionals", image=image)
    dataset = SceneDataset(own)
    items = dataset.__getitems__([0, 1])
    assert torch.equal(items[1]["image"], image)
    assert torch.equal(items[0]["image"], dataset[0]["image"])


# --- batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [True, False])
def test_batches_are_padded_singles(root, cache):
    dataset = SceneDataset(root, conditions=ALL, cache=cache)
    keys = [SampleKey(row, 3, 7) for row in (3, 2, 4)]
    batch = default_collate(dataset.__getitems__(keys))
    assert batch["shape"].shape == (3, 4, 4, 3)
    assert batch["masks"].shape == (3, 4, 16, 16)
    assert batch["object_mask"].sum(1).tolist() == [2, 4, 3]
    for number, key in enumerate(keys):
        single, count = dataset[key], COUNTS[key]
        assert single["shape"].shape[0] == count
        for name in ("shape", *POSES, "masks", "object_mask"):
            assert torch.equal(batch[name][number, :count], single[name])
            assert not batch[name][number, count:].any()
        for name in ("image", "pointmap", "cond_tokens"):
            assert torch.equal(batch[name][number], single[name])


@pytest.mark.parametrize("per_object", [False, True])
def test_condition_tokens_are_padded(tmp_path, per_object):
    for row, (count, length) in enumerate([(2, 5), (3, 9), (2, 1)]):
        scene = make_scene(row, count=count, cond_tokens=length)
        if per_object:
            own = torch.arange(1.0, count + 1)[:, None, None]
            scene["conditionals"]["cond_tokens"] = own * torch.ones(count, length, COND_CHANNELS)
        write_scene(tmp_path / "train" / f"{row:04d}", **scene)
    dataset = SceneDataset(tmp_path, conditions=["cond_tokens"])
    keys = [SampleKey(row, 1, 0) for row in range(3)]
    batch = default_collate(dataset.__getitems__(keys))
    assert batch["cond_mask"].sum(1).tolist() == [5, 9, 1]
    assert batch["cond_mask"][2].tolist() == [True] + [False] * 8
    assert batch["cond_tokens"].shape == ((3, 3, 9, COND_CHANNELS) if per_object else (3, 9, COND_CHANNELS))
    for number, key in enumerate(keys):
        length, single = int(batch["cond_mask"][number].sum()), dataset[key]
        tokens = batch["cond_tokens"][number]
        assert torch.equal(
            tokens[: len(single["shape"]), :length] if per_object else tokens[:length], single["cond_tokens"]
        )
        assert not tokens[..., length:, :].any()
        if per_object:  # they moved with their objects
            assert single["cond_tokens"][:, 0, 0].tolist() == [place + 1 for place in objects(single)]


@pytest.mark.parametrize("cache", [True, False])
def test_workers_change_nothing(root, cache):
    dataset = SceneDataset(root, conditions=ALL, cache=cache)
    batches = [[SampleKey(row, epoch, 5) for row in (epoch, 3, 5)] for epoch in range(3)]
    here = list(DataLoader(dataset, batch_sampler=batches))
    there = list(DataLoader(dataset, batch_sampler=batches, num_workers=2))
    assert len(here) == len(there) == 3
    for left, right in zip(here, there, strict=True):
        assert_same(left, right)


def test_a_spawned_worker_reads_files(root):
    dataset = SceneDataset(root, conditions=ALL, cache=True)
    data = pickle.dumps(dataset)
    assert len(data) < 5000
    assert_same(pickle.loads(data)[3], dataset[3])


# --- order of objects -----------------------------------------------------------------------------------------------


def test_objects_are_shuffled_with_what_is_theirs(root):
    dataset = SceneDataset(root, conditions=ALL)
    orders = set()
    for epoch in range(20):
        item = dataset[SampleKey(2, epoch, 0)]
        order = objects(item)
        orders.add(tuple(order))
        scene = make_scene(2, count=4)
        for name in ("shape", *POSES):
            assert torch.equal(item[name], scene["tensors"][name][order])
        assert item["masks"].sum((1, 2)).tolist() == [place + 1 for place in order]
        assert torch.equal(item["cond_tokens"], scene["conditionals"]["cond_tokens"])
    assert len(orders) > 8
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)


def test_the_key_decides_the_order(root):
    dataset = SceneDataset(root)
    for row in range(6):
        assert_same(dataset[SampleKey(row, 4, 2)], SceneDataset(root, cache=False)[SampleKey(row, 4, 2)])
    assert any(objects(dataset[SampleKey(2, epoch, 2)]) != [0, 1, 2, 3] for epoch in range(3))
    assert objects(dataset[2]) == [0, 1, 2, 3]
    fixed = SceneDataset(root, shuffle_objects=False)
    assert all(objects(fixed[SampleKey(2, epoch, 0)]) == [0, 1, 2, 3] for epoch in range(5))


# --- too many objects -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [True, False])
def test_a_subset_of_large_scenes(root, cache, caplog):
    caplog.set_level(logging.WARNING)
    dataset = SceneDataset(root, conditions=["masks"], max_objects_per_scene=3, cache=cache)
    assert dataset.num_objects == [2, 3, 3, 2, 3, 3]
    seen = set()
    for epoch in range(20):
        item = dataset[SampleKey(2, epoch, 0)]
        order = objects(item)
        assert item["masks"].sum((1, 2)).tolist() == [place + 1 for place in order]
        assert len(set(order)) == len(order) == 3
        assert_same(item, dataset[SampleKey(2, epoch, 0)])
        seen.add(frozenset(order))
    assert len(seen) == 4
    assert objects(dataset[2]) == objects(dataset[2]) == sorted(objects(dataset[2]))
    assert [record.message for record in caplog.records] == [
        f"2 of 6 scenes of {root / 'train'} have more than 3 objects: a random subset is taken from them"
    ]


@pytest.mark.parametrize("cache", [True, False])
def test_large_scenes_are_left_out(root, cache, caplog):
    dataset = SceneDataset(root, max_objects_per_scene=2, on_too_many="filter", cache=cache)
    assert dataset.scene_ids == ["0000", "0003"]
    assert dataset.num_objects == [2, 2]
    assert len(dataset) == 2
    assert dataset[1]["translation"][0, 0, 0] == 3
    assert "4 of 6 scenes" in caplog.text
    with pytest.raises(ValueError, match=r"6 of 6 scenes of .* have more than 1 objects, none is left"):
        SceneDataset(root, max_objects_per_scene=1, on_too_many="filter", cache=cache)


def test_nothing_is_said_of_scenes_that_fit(root, caplog):
    SceneDataset(root, max_objects_per_scene=4)
    assert caplog.records == []


# --- single objects -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [True, False])
def test_items_of_single_objects(root, cache):
    scenes = SceneDataset(root, conditions=ALL, cache=cache)
    dataset = SceneDataset(root, conditions=ALL, batch_mode="object", cache=cache)
    assert len(dataset) == sum(COUNTS)
    places = [(row, place) for row, count in enumerate(COUNTS) for place in range(count)]
    for index, (row, place) in enumerate(places):
        item, scene = dataset[SampleKey(index, 2, 0)], scenes[row]
        for name in ("shape", *POSES, "masks", "object_mask"):
            assert torch.equal(item[name], scene[name][place : place + 1])
        for name in ("image", "pointmap", "cond_tokens", "cond_mask"):
            assert torch.equal(item[name], scene[name])
    batch = default_collate(dataset.__getitems__([0, 5, 17]))
    assert batch["shape"].shape == (3, 1, 4, 3)
    assert batch["object_mask"].all()
    with pytest.raises(IndexError, match="row 18 of 18"):
        dataset[18]


def test_single_objects_of_large_scenes(root, caplog):
    assert len(SceneDataset(root, batch_mode="object", max_objects_per_scene=2)) == 18
    assert caplog.records == []
    assert len(SceneDataset(root, batch_mode="object", max_objects_per_scene=2, on_too_many="filter")) == 4


# --- hooks ----------------------------------------------------------------------------------------------------------


class OwnList(SceneDataset):
    def _load_scene_list(self) -> list[str]:
        return ["0004", "0001"]


class OwnLatents(SceneDataset):
    """Other files, without metadata, of which the last object is left out."""

    def _load_scene_latents(self, scene_dir: Path) -> dict[str, torch.Tensor]:
        return {name: value[:-1] for name, value in torch.load(scene_dir / "own.pt", weights_only=True).items()}


class OwnConditionals(SceneDataset):
    def _load_scene_conditionals(self, scene_dir: Path) -> dict[str, torch.Tensor] | None:
        return {"image": torch.full((3, 8, 8), int(scene_dir.name) / 10)}


@pytest.mark.parametrize("cache", [True, False, None])
@pytest.mark.parametrize("mode", ["scene", "object"])
def test_hooks_can_be_overridden(root, tmp_path, cache, mode):
    settings = {"batch_mode": mode, "cache": cache, "conditions": ()}
    dataset = OwnList(root, **settings)
    assert dataset.scene_ids == ["0004", "0001"]
    assert dataset[0]["translation"][0, 0, 0] == 4

    for row, count in enumerate([3, 2]):
        (tmp_path / "train" / str(row)).mkdir(parents=True)
        torch.save(make_scene(row, count=count)["tensors"], tmp_path / "train" / str(row) / "own.pt")
    dataset = OwnLatents(tmp_path, **settings)
    assert dataset.num_objects == [2, 1]
    assert len(dataset) == (2 if mode == "scene" else 3)
    assert dataset[len(dataset) - 1]["translation"][0, 0, 0] == 1
    assert len(default_collate(dataset.__getitems__(range(len(dataset))))["shape"]) == len(dataset)

    dataset = OwnConditionals(root, **{**settings, "conditions": ["image"]})
    assert dataset.image_size == 8
    assert torch.equal(dataset[len(dataset) - 1]["image"], torch.full((3, 8, 8), 0.5))


def test_what_a_hook_gives_is_checked(root):
    class Wrong(SceneDataset):
        def _load_scene_latents(self, scene_dir: Path) -> dict[str, torch.Tensor]:
            return super()._load_scene_latents(scene_dir) | {"translation": torch.zeros(2, 1, 4)}

    with pytest.raises(ValueError, match=r"scene '0000' of .*: latents: translation is \[2, 1, 4\]"):
        Wrong(root)

    class Nothing(SceneDataset):
        def _load_scene_list(self) -> list[str]:
            return []

    with pytest.raises(ValueError, match=r"split 'train' of .* is empty"):
        Nothing(root)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_splits_that_are_not_there(root, tmp_path):
    with pytest.raises(ValueError, match=r"split 'test' of .* is missing"):
        SceneDataset(root, "test")
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match=r"split 'val' of .* is empty: .* names no scene"):
        SceneDataset(tmp_path, "val")
    assert len(SceneDataset(root, "val")) == 3


@pytest.mark.parametrize("cache", [True, False])
def test_missing_conditions_are_named(own, cache):
    change_tensors(own / "train" / "0000", "conditionals", pointmap=None)
    with pytest.raises(ValueError, match=r"scene '0000' of .*: conditionals: pointmap missing \(there is image\)"):
        SceneDataset(write_only_image(own), cache=cache)
    (own / "train" / "0000" / "conditionals.safetensors").unlink()
    with pytest.raises(ValueError, match=r"scene '0000' of .*: conditionals are missing, image, pointmap of them"):
        SceneDataset(own, cache=cache)
    assert len(SceneDataset(own, conditions=(), cache=cache)) == 6


def write_only_image(root: Path) -> Path:
    change_tensors(root / "train" / "0000", "conditionals", masks=None, cond_tokens=None)
    return root


BAD = {
    "shape of object 1 is NaN": lambda folder: change_tensors(folder, shape=nan_in(folder)),
    "scale missing": lambda folder: change_tensors(folder, scale=None),
    "latents.safetensors is damaged": lambda folder: (folder / "latents.safetensors").write_bytes(b"{}"),
    "conditionals.safetensors is damaged": lambda folder: (folder / "conditionals.safetensors").write_bytes(b"{}"),
    r"`num_objects` of .* must fit the 2 objects .*, got 9": lambda folder: change_metadata(folder, num_objects=9),
    r"shape has the form \(5, 3\), in scene '0000' it is \(4, 3\)": lambda folder: change_tensors(
        folder, shape=torch.zeros(2, 5, 3)
    ),
    r"image has the form \(3, 8, 8\), in scene '0000'": lambda folder: change_tensors(
        folder, "conditionals", image=torch.zeros(3, 8, 8), pointmap=torch.zeros(3, 8, 8)
    ),
    r"translation_scale has the form \(1, 1\), in scene '0000' it is None": lambda folder: change_tensors(
        folder, translation_scale=torch.zeros(2, 1, 1)
    ),
}


def nan_in(folder: Path) -> torch.Tensor:
    shape = read_tensors(folder, "latents")["shape"]
    shape[1, 2, 0] = torch.nan
    return shape


@pytest.mark.parametrize("message", BAD)
def test_bad_scenes_are_named_when_they_are_read(own, message):
    BAD[message](own / "train" / "0003")
    pattern = rf"scene '0003' of {own / 'train'}: .*{message}"
    with pytest.raises(ValueError, match=pattern):
        SceneDataset(own, cache=True)
    dataset = SceneDataset(own, cache=False)
    dataset[0]
    with pytest.raises(ValueError, match=pattern) as caught:
        dataset.__getitems__([0, 3])
    assert "\n" not in str(caught.value)


def test_bad_counts_are_found_at_once(own):
    change_metadata(own / "train" / "0005", num_objects=None)
    with pytest.raises(ValueError, match=r"scene '0005' of .*: `num_objects` is missing"):
        SceneDataset(own, cache=False)


@pytest.mark.parametrize(
    "argument",
    [{"max_objects_per_scene": 0}, {"on_too_many": "drop"}, {"batch_mode": "row"}, {"conditions": ["depth"]}],
)
def test_arguments_out_of_range(root, argument):
    name = next(iter(argument))
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        SceneDataset(root, **argument)


def test_small_splits_are_kept_in_memory(own, monkeypatch):
    dataset = SceneDataset(own)
    kept = dataset[1]
    for path in (own / "train" / "0001").iterdir():
        path.unlink()
    assert_same(dataset[1], kept)
    monkeypatch.setattr(data_prep.scenes.dataset, "CACHE_BYTES", 1000)
    with pytest.raises(ValueError, match="scene '0001'"):
        SceneDataset(own)[1]
