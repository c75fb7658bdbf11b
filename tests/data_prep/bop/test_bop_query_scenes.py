"""Query scenes: the same bytes always, masks and visibility that are right, occlusion and turns as asked for."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from backlot.mesh_views import render_views
from backlot.views import look_at_poses, view_directions
from data_prep.bop.format import BopDataset
from data_prep.bop.query_scenes import SceneSettings, choose_objects, draw_views, make_dataset, make_scenes, shortest

SEED, NUM_OBJECTS, NUM_IMAGES = 4, 5, 15
TINY = SceneSettings(image_size=(96, 72), images_per_scene=5, num_objects=(3, 4), in_plane_degrees=30)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> BopDataset:
    root = tmp_path_factory.mktemp("made")
    make_dataset(root, SEED, NUM_OBJECTS, NUM_IMAGES, settings=TINY, num_workers=2)
    return BopDataset(root, "train")


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_the_number_of_processes_changes_no_byte(made, tmp_path):
    make_dataset(tmp_path, SEED, NUM_OBJECTS, NUM_IMAGES, settings=TINY, num_workers=1)
    assert contents(tmp_path) == contents(made.root)


def test_a_scene_does_not_depend_on_how_many_there_are(made, tmp_path):
    shutil.copytree(made.root / "models", tmp_path / "models")
    make_scenes(tmp_path, SEED, 2, TINY, num_workers=1)
    for name in ("rgb/000001.png", "depth/000001.png", "mask_visib/000001_000000.png"):
        place = f"train/000000/{name}"
        assert (tmp_path / place).read_bytes() == (made.root / place).read_bytes()


def test_what_is_missing_is_made_again_and_nothing_else(made, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(made.root, root)
    before = contents(root)
    (root / "train/000001/scene_camera.json").unlink()
    kept = (root / "train/000000/rgb/000000.png").stat().st_mtime_ns
    make_dataset(root, SEED, NUM_OBJECTS, NUM_IMAGES, settings=TINY, num_workers=1)
    assert contents(root) == before
    assert (root / "train/000000/rgb/000000.png").stat().st_mtime_ns == kept


def test_other_values_are_refused(made, tmp_path):
    with pytest.raises(ValueError, match="models was made with other values of num_objects, num_symmetric"):
        make_dataset(made.root, SEED, NUM_OBJECTS - 2, NUM_IMAGES, settings=TINY)
    with pytest.raises(ValueError, match="train was made with other values of image_size"):
        make_dataset(made.root, SEED, NUM_OBJECTS, NUM_IMAGES, (48, 36), settings=TINY)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/obj_000001.ply").touch()
    with pytest.raises(ValueError, match="holds what was not made here"):
        make_dataset(tmp_path, SEED, 3, 2, settings=TINY)
    with pytest.raises(ValidationError, match="`num_objects` must be a least and a greatest number, got 4 3"):
        SceneSettings(num_objects=(4, 3))


def test_targets_and_splits(made, tmp_path):
    assert {target.obj_id for target in made.targets()} == set(range(1, NUM_OBJECTS + 1))
    shutil.copytree(made.root / "models", tmp_path / "models")
    make_scenes(tmp_path, SEED, 1, TINY, split="val", num_workers=1)
    first, other = made.frames()[0], BopDataset(tmp_path, "val").frames()[0]
    assert not np.allclose(first.K, other.K)


def test_masks_and_visibility_are_those_of_each_object_alone(made):
    height, width = TINY.image_size[::-1]
    meshes = {key: model.load_mesh() for key, model in made.models().items()}
    pad = np.array([[1, 0, width], [0, 1, height], [0, 0, 1]])
    partly = cut = 0
    for frame in made.frames()[::2]:
        silhouettes, depths = [], []
        for each in frame.instances:
            alone = render_views(
                [meshes[each.obj_id]],
                each.camera_from_object[None, None],
                pad @ frame.K,
                (3 * height, 3 * width),
                supersample=1,
                backend="zbuffer",
            )
            silhouettes.append(alone.instances[0] == 0)
            depths.append(np.where(silhouettes[-1], alone.depth[0], np.inf)[height : 2 * height, width : 2 * width])
        nearest = np.argmin(depths, axis=0)
        depth = made.depth(frame)
        for gt, each in enumerate(frame.instances):
            mask = made.mask(frame.scene_id, frame.im_id, gt)
            visible = made.mask_visib(frame.scene_id, frame.im_id, gt)
            assert (mask == np.isfinite(depths[gt])).mean() > 0.999
            assert (visible == (mask & (nearest == gt))).mean() > 0.999
            assert each.visib_fract == pytest.approx(visible.sum() / silhouettes[gt].sum(), abs=0.004)
            rows, columns = np.nonzero(silhouettes[gt])
            box = [columns.min() - width, rows.min() - height, columns.max() - width + 1, rows.max() - height + 1]
            assert np.abs(each.bbox_obj - box).max() <= 1
            assert np.abs(depth - depths[gt])[visible].max() < 0.0002  # tenths of a millimetre are written
            partly += 0.2 < each.visib_fract < 0.9
            cut += mask.sum() < 0.99 * silhouettes[gt].sum()  # by the edge of the picture
    assert min(partly, cut) > 0


def test_the_room_hides_nothing(made):
    for frame in made.frames():
        numbers = range(len(frame.instances))
        seen = np.any([made.mask_visib(frame.scene_id, frame.im_id, gt) for gt in numbers], axis=0)
        whole = np.any([made.mask(frame.scene_id, frame.im_id, gt) for gt in numbers], axis=0)
        assert (seen == whole).mean() > 0.999


def test_depth_and_pose_put_pixels_on_the_surface(made):
    meshes = {key: model.load_mesh() for key, model in made.models().items()}
    frame = made.frames()[3]
    depth = made.depth(frame)
    for gt, each in enumerate(frame.instances):
        rows, columns = np.nonzero(made.mask_visib(frame.scene_id, frame.im_id, gt))
        rays = np.stack([columns, rows, np.ones(len(rows))], axis=1) @ np.linalg.inv(frame.K).T
        points = rays * depth[rows, columns, None] - each.camera_from_object[:3, 3]
        distance, _ = cKDTree(meshes[each.obj_id].vertices).query(points @ each.camera_from_object[:3, :3])
        assert distance.max() < 0.08 * meshes[each.obj_id].extents.max()


def test_some_objects_are_partly_hidden_and_none_is_lost(made):
    shares = np.array([each.visib_fract for frame in made.frames() for each in frame.instances])
    assert shares.min() > 0.25
    assert 0.1 < ((shares > 0.35) & (shares < 0.85)).mean() < 0.6
    sides = [np.max(each.bbox_obj[2:] - each.bbox_obj[:2]) for frame in made.frames() for each in frame.instances]
    assert 0.3 < np.median(sides) / TINY.image_size[1] < 0.7


def test_objects_take_turns():
    ids = [3, 5, 8, 9, 12]
    drawn = [choose_objects(7, 4 * scene, 4, ids) for scene in range(50)]
    assert all(len(set(each)) == len(each) >= 2 for each in drawn)
    counts = np.unique(np.concatenate(drawn), return_counts=True)[1]
    assert len(counts) == len(ids)
    assert counts.max() / counts.min() < 1.2


@pytest.mark.parametrize("degrees", [0, 30])
def test_turns_in_the_picture_are_bounded(degrees):
    views = draw_views(np.random.default_rng(0), 500, np.radians(degrees))
    np.testing.assert_allclose(views @ views.transpose(0, 2, 1), np.tile(np.eye(3), (500, 1, 1)), atol=1e-12)
    towards = -views[:, 2]
    assert np.abs(towards.mean(0)).max() < 0.12
    directions = view_directions(42)
    anchors = look_at_poses(directions, 1.0)[:, :3, :3]
    nearest = (towards @ directions.T).argmax(1)
    apart = np.degrees(Rotation.from_matrix(views @ anchors[nearest].transpose(0, 2, 1)).magnitude())
    tilt = np.degrees(np.arccos((towards * directions[nearest]).sum(1).clip(-1, 1)))
    if degrees == 0:
        np.testing.assert_allclose(apart, tilt, atol=1e-5)
    else:
        assert apart.max() <= degrees + tilt.max()
        assert apart.max() > 20.9  # more than a tilt alone


def test_shortest_rotation_takes_one_direction_to_the_other():
    rng = np.random.default_rng(0)
    start, end = rng.normal(size=(2, 20, 3))
    start /= np.linalg.norm(start, axis=1, keepdims=True)
    rotation = shortest(start, end)
    unit = end / np.linalg.norm(end, axis=1, keepdims=True)
    np.testing.assert_allclose((rotation @ start[..., None])[..., 0], unit, atol=1e-12)
    np.testing.assert_allclose(Rotation.from_matrix(rotation).magnitude(), np.arccos((start * unit).sum(1)), atol=1e-9)


def test_turns_are_counted_from_the_ray_to_the_object(made):
    """Off the middle of the picture, an object must not look turned by the perspective."""
    directions = view_directions(42)
    anchors = look_at_poses(directions, 1.0)[:, :3, :3]
    for frame in made.frames():
        for each in frame.instances:
            rotation, place = each.camera_from_object[:3, :3], each.camera_from_object[:3, 3]
            upright = shortest(np.array([0.0, 0.0, 1.0]), place[None])[0].T @ rotation
            nearest = (directions @ -upright[2]).argmax()
            tilted = anchors[nearest] @ shortest(directions[nearest], -upright[2][None])[0].T
            assert np.degrees(Rotation.from_matrix(upright @ tilted.T).magnitude()) <= 30 + 1e-6
