"""The index and the source that reads by it: which samples there are, what is stored, and what is refused."""

import json
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from drawn_scenes import write_dataset
from PIL import Image

from data_prep.bop.format import BadSampleError, BopDataset
from data_prep.bop.index import INDEX_NAME, PoseSource, build_index, map_index
from data_prep.bop.shards import write_shards


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("index") / "data"
    drawn = write_dataset(root)
    write_shards(BopDataset(root, "train"), root / "train_web", images_per_shard=2)
    build_index(root / "train_web")
    PoseSource(root / "train")
    return root, drawn


@pytest.fixture
def root(original, tmp_path):
    return shutil.copytree(original[0], tmp_path / "data")


@pytest.mark.parametrize("split", ["train", "train_web"])
def test_samples_are_the_objects_that_are_seen(original, split):
    root, drawn = original
    source = PoseSource(root / split)
    frames = [(scene, frame) for scene, frames in enumerate(drawn) for frame in frames]
    expected = [
        (scene, frame.im_id, gt, each.obj_id)
        for scene, frame in frames
        for gt, each in enumerate(frame.objects)
        if each.mask_visib.sum() > 0.1 * each.mask.sum()
    ]
    rows = [source.row(index) for index in range(len(source))]
    assert [(row.scene_id, row.im_id, row.gt, row.object_id) for row in rows] == expected
    assert source.object_ids.tolist() == [each[3] for each in expected]
    assert source.objects == [1, 2]
    assert sum(source.shard_sizes) == len(source)
    assert len(PoseSource(root / split, min_visib=0.99)) < len(source) < sum(len(frame.objects) for _, frame in frames)
    pictures = {(scene, frame.im_id): frame for scene, frame in frames}
    for index, row in enumerate(rows):
        sample = source.read(index)
        true = pictures[row.scene_id, row.im_id]
        each = true.objects[row.gt]
        assert np.array_equal(sample.mask, each.mask_visib)
        assert np.abs(sample.camera_from_object - each.camera_from_object).max() < 1e-12
        assert np.abs(sample.depth - true.depth).max() < 1e-4
        assert tuple(sample.bbox_visib) == row.bbox_visib
        assert sample.key == f"{row.scene_id:06d}_{row.im_id:06d}_{row.gt:06d}"
        assert abs(sample.diameter - 0.1) < 1e-9


@pytest.mark.parametrize("split", ["train", "train_web"])
def test_repeated_access_is_identical_whatever_a_reader_does(original, split):
    source = PoseSource(original[0] / split)
    names = ("rgb", "depth", "mask", "K", "camera_from_object", "bbox_visib")
    before = [{name: getattr(source.read(index), name).copy() for name in names} for index in range(len(source))]
    for index in range(len(source)):
        sample = source.read(index)
        for name in names:
            getattr(sample, name)[...] = 0
    for index in reversed(range(len(source))):
        again = source.read(index)
        for name in names:
            assert np.array_equal(getattr(again, name), before[index][name]), name
    first, second = (source.read(index) for index in (0, 1))
    assert first.object_id == second.object_id == 1  # of one model, in one picture
    assert not (first.mask & second.mask).any()


def test_parts_come_one_after_the_other(original):
    source = PoseSource(original[0] / "train_web")
    scenes = [(source.row(i).scene_id, source.row(i).im_id) for i in range(len(source))]
    starts = np.cumsum([0, *source.shard_sizes])
    parts = [set(scenes[start:end]) for start, end in pairwise(starts)]
    assert [len(part) for part in parts] == [2, 2, 2]
    assert not set.intersection(*parts)


def test_rows_beyond_the_end_are_refused(original):
    source = PoseSource(original[0] / "train")
    for index in (-1, len(source)):
        with pytest.raises(IndexError, match=f"row {index} of"):
            source.read(index)


def read_in_worker(source, index):
    return source.read(index).depth


def test_a_source_travels_to_other_processes_as_a_few_words(original):
    source = PoseSource(original[0] / "train_web", min_visib=0.3, skip_shards=(1,))
    data = pickle.dumps(source)
    assert len(data) < 500
    assert pickle.loads(data).fingerprint == source.fingerprint
    with ProcessPoolExecutor(1) as pool:
        assert np.array_equal(pool.submit(read_in_worker, source, 2).result(), source.read(2).depth)


# --- the stored index -----------------------------------------------------------------------------------------------


def test_shards_without_an_index_name_the_command(root):
    (root / "train_web" / INDEX_NAME).unlink()
    with pytest.raises(ValueError, match=rf"has no index: python -m data_prep.bop index {root / 'train_web'}"):
        PoseSource(root / "train_web")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_cut_index_is_no_index(root, keep):
    for split in ("train", "train_web"):
        path = root / split / INDEX_NAME
        path.write_bytes(path.read_bytes()[:keep])
        assert map_index(root / split) is None
    assert len(PoseSource(root / "train")) > 0
    assert map_index(root / "train") is not None
    with pytest.raises(ValueError, match="has no index"):
        PoseSource(root / "train_web")


def test_an_index_of_other_files_is_not_used(root):
    before = PoseSource(root / "train"), PoseSource(root / "train_web")
    (root / "train_web" / "shard-000002.tar").unlink()
    with pytest.raises(ValueError, match=r"has an index of other files: python -m data_prep\.bop index"):
        PoseSource(root / "train_web")
    shutil.rmtree(root / "train" / "000001")
    assert len(PoseSource(root / "train")) == before[0].shard_sizes[0]
    build_index(root / "train_web")
    assert len(PoseSource(root / "train_web")) == sum(before[1].shard_sizes[:2])


def test_everything_may_be_moved(root, tmp_path):
    before = [PoseSource(root / split) for split in ("train", "train_web")]
    stamp = (root / "train" / INDEX_NAME).stat().st_mtime_ns
    root.rename(tmp_path / "elsewhere")
    for source in before:
        moved = PoseSource(tmp_path / "elsewhere" / source.folder.name)
        assert moved.fingerprint == source.fingerprint
        assert moved.models.folder == tmp_path / "elsewhere" / "models"
        moved.models[1].load_mesh()
        moved.read(0)
    assert (tmp_path / "elsewhere" / "train" / INDEX_NAME).stat().st_mtime_ns == stamp


def test_fingerprints_tell_selections_apart(root):
    found = [
        PoseSource(root / "train"),
        PoseSource(root / "train_web"),
        PoseSource(root / "train", min_visib=0.5),
        PoseSource(root / "train_web", skip_shards=[0]),
    ]
    assert len({source.fingerprint for source in found}) == 4
    assert PoseSource(root / "train").fingerprint == found[0].fingerprint


def test_models_elsewhere_are_named_once(root, tmp_path):
    models = shutil.move(root / "models", tmp_path / "models")
    for split in ("train", "train_web"):
        with pytest.raises(ValueError, match="name the folder of the models with --models"):
            build_index(root / split)
        build_index(root / split, models)
        assert abs(PoseSource(root / split).read(0).diameter - 0.1) < 1e-9


# --- what is wrong --------------------------------------------------------------------------------------------------


def edit(path, change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_an_unknown_object_is_named(root):
    edit(root / "train" / "000001" / "scene_gt.json", lambda values: values["101"][0].update(obj_id=30))
    with pytest.raises(ValueError, match=r"no object 30 among the models in .*models"):
        PoseSource(root / "train")


def test_a_wrong_depth_scale_is_named(root):
    def to_metres(values):
        values["0"]["depth_scale"] = 10

    edit(root / "train" / "000000" / "scene_camera.json", to_metres)
    source = PoseSource(root / "train")
    with pytest.raises(BadSampleError, match=r"object 1 \(0\) in picture 000000_000000: wrong depth scale: .* 5.* m"):
        source.read(0)
    source.read(len(source) - 1)


def test_an_object_without_visible_pixels_is_named(root):
    path = root / "train" / "000000" / "mask_visib" / "000000_000000.png"
    Image.fromarray(np.zeros_like(np.asarray(Image.open(path)))).save(path)
    with pytest.raises(BadSampleError, match=r"object 1 \(0\) in picture 000000_000000: no pixel .* is seen"):
        PoseSource(root / "train").read(0)


def test_pictures_of_different_forms_are_named(root):
    path = root / "train" / "000000" / "rgb" / "000000.png"
    Image.open(path).resize((20, 10)).save(path)
    with pytest.raises(BadSampleError, match="differ in form"):
        PoseSource(root / "train").read(0)


def test_a_sensor_that_sees_nothing_of_the_object_is_no_fault(root):
    path = root / "train" / "000000" / "depth" / "000000.png"
    Image.fromarray(np.zeros_like(np.asarray(Image.open(path)))).save(path)
    assert not PoseSource(root / "train").read(0).depth.any()


def test_a_folder_without_visible_objects_is_refused(root, tmp_path):
    with pytest.raises(ValueError, match="of no object more than 1 of the silhouette is seen"):
        PoseSource(root / "train", min_visib=1)
    for scene in ("000000", "000001"):
        for name in ("scene_gt.json", "scene_gt_info.json"):
            edit(root / "train" / scene / name, lambda values: values.update({key: [] for key in values}))
    with pytest.raises(ValueError, match="shows no objects: no pose is known"):
        PoseSource(root / "train")
    with pytest.raises(ValueError, match=r"neither \.tar shards nor BOP scenes"):
        PoseSource(tmp_path)
    (root / "train" / "000000" / "scene_gt.json").unlink()
    with pytest.raises(ValueError, match="is missing"):
        PoseSource(root / "train")
