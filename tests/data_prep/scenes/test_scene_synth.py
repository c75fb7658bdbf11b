"""Made scenes: shapes against their surfaces, where objects stand, and what is written of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import shapely
import torch

from backlot.rendering import Camera, render
from data_prep.scenes.format import check_scene, read_scene, unpack_occupancy
from data_prep.scenes.shapes import FAMILIES, FLAT_TOPS, occupancy, random_shape, voxel_centres
from data_prep.scenes.synth import (
    CARRIED_EXTENTS,
    CENTRES,
    HALF_EXTENTS,
    Settings,
    Thing,
    build_synth,
    plan_scene,
    read_settings,
    take_picture,
    true_scene,
)
from pipelines.shortcut_scene import rotation_matrix

COUNT = 12
VOXEL = 1 / 16


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "scenes"
    assert build_synth(folder, COUNT, 3, seed=5, stack_prob=0.5, progress=False) == COUNT + 3
    return folder


@pytest.fixture(scope="module")
def plans() -> list[list[Thing]]:
    settings = {
        "circles": Settings(seed=1, stack_prob=0.5),
        "boxes": Settings(seed=1, stack_prob=0.5, footprints="boxes"),
    }
    return [plan_scene(each, "train", number) for each in settings.values() for number in range(40)]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def outline(thing: Thing) -> shapely.Polygon:
    """Seen from above: the box of the object."""
    corners = [(x, y) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    return shapely.Polygon(
        [(thing.rotation @ np.r_[np.array(c) * thing.half[:2], 0] + thing.centre)[:2] for c in corners]
    )


# --- shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(4))
def test_a_shape_is_closed_fills_its_cube_and_is_what_it_says_to_be(family, seed):
    shape = random_shape(family, np.random.default_rng(seed))
    mesh = shape.mesh()
    assert mesh.is_watertight
    assert mesh.is_winding_consistent
    assert mesh.body_count == 1
    np.testing.assert_allclose(mesh.bounds, [[-0.5] * 3, [0.5] * 3], atol=1e-12)
    grid = occupancy(shape, 16)
    assert grid.shape == (16, 16, 16)
    for axes in ((1, 2), (0, 2), (0, 1)):
        assert grid.any(axis=axes)[[0, -1]].all()
    # The surface is where the inside ends; facets of curved ones lie up to .006 within.
    points, faces = mesh.sample(500, return_index=True, seed=seed)
    normals = mesh.face_normals[faces]
    assert shape.occupied(points - 0.01 * normals).mean() > 0.97  # all but sharp edges
    assert not shape.occupied(points + 0.02 * normals).any()
    assert mesh.volume == pytest.approx(occupancy(shape, 48).mean(), abs=0.02)
    assert not shape.occupied(np.array([[0, 0, 0.51], [0.51, 0, 0], [0, -0.51, 0]])).any()


def test_shapes_of_a_family_differ():
    rng = np.random.default_rng(0)
    for family in set(FAMILIES) - {"box", "cylinder"}:
        assert len({random_shape(family, rng).mesh().volume.round(6) for _ in range(6)}) > 2, family


def test_a_flat_top_is_flat_and_whole():
    for family in FLAT_TOPS:
        shape = random_shape(family, np.random.default_rng(1))
        x, y, _ = voxel_centres(32)[:, :, 0].reshape(-1, 3).T
        whole = np.hypot(x, y) < 0.5 if shape.top == "round" else np.ones_like(x, bool)
        np.testing.assert_array_equal(shape.occupied(np.column_stack([x, y, np.full_like(x, 0.499)])), whole)


def test_occupancy_of_a_longish_object_keeps_its_aspect():
    grid = occupancy(random_shape("box", np.random.default_rng(0)), 16, (1, 0.5, 0.25))
    assert grid.sum() == 16 * 8 * 4
    assert grid[:, 4:12, 6:10].all()


# --- where things stand ---------------------------------------------------------------------------------------------


def test_numbers_sizes_and_families(plans):
    assert {len(things) for things in plans} == {2, 3, 4, 5}
    for things in plans:
        assert len({thing.shape.family for thing in things}) == len(things)
        assert len({thing.color for thing in things}) == len(things)
        for thing in things:
            low, high = CARRIED_EXTENTS if thing.carrier is not None else HALF_EXTENTS
            assert ((low <= thing.half) & (thing.half <= high)).all()
            assert 0 <= thing.yaw <= np.pi / 2
            assert np.abs(thing.centre[:2]).max() <= (CENTRES if thing.carrier is None else 1.3)
    families = [thing.shape.family for things in plans for thing in things]
    assert set(families) == set(FAMILIES)


def test_objects_stand_on_the_floor_or_on_another_one(plans):
    carried = 0
    for things in plans:
        for thing in things:
            bottom = thing.centre[2] - thing.half[2]
            assert thing.mesh().vertices[:, 2].min() == pytest.approx(bottom)
            if thing.carrier is None:
                assert bottom == pytest.approx(0, abs=1e-12)
                continue
            carried += 1
            carrier = things[thing.carrier]
            assert carrier.carrier is None
            assert bottom == pytest.approx(carrier.centre[2] + carrier.half[2])
            assert (thing.half < carrier.half).sum() >= 2
            corners = np.array(outline(thing).exterior.coords)
            below = np.column_stack([corners, np.full(len(corners), bottom - 1e-3)])
            assert carrier.occupied(below).all()
    assert 20 < carried < 60  # of 80 scenes


def test_footprints_are_disjoint(plans):
    closest = []
    for things in plans:
        floor = [thing for thing in things if thing.carrier is None]
        closest += [outline(a).distance(outline(b)) for i, a in enumerate(floor) for b in floor[:i]]
        for thing in floor:
            assert shapely.box(-1.3, -1.3, 1.3, 1.3).contains(outline(thing))
    assert min(closest) >= 0.02


def test_circles_keep_more_distance_than_boxes(plans):
    def circles(things):
        floor = [thing for thing in things if thing.carrier is None]
        return [
            np.hypot(*(a.centre - b.centre)[:2]) - np.hypot(*a.half[:2]) - np.hypot(*b.half[:2])
            for i, a in enumerate(floor)
            for b in floor[:i]
        ]

    assert min(gap for things in plans[:40] for gap in circles(things)) >= 0.02
    assert min(gap for things in plans[40:] for gap in circles(things)) < -0.02


def test_no_object_is_in_another(plans):
    rng = np.random.default_rng(0)
    for things in plans:
        for i, one in enumerate(things):
            points = (rng.uniform(-1, 1, (400, 3)) * one.half) @ one.rotation.T + one.centre
            points = points[one.occupied(points)]
            assert len(points) > 40
            assert not any(other.occupied(points).any() for j, other in enumerate(things) if j != i)


def test_stacks_are_as_frequent_as_asked():
    for share in (0.0, 1.0):
        settings = Settings(seed=3, stack_prob=share, num_objects=(2, 3))
        stacked = [any(t.carrier is not None for t in plan_scene(settings, "train", n)) for n in range(10)]
        assert stacked == [bool(share)] * 10


def test_few_families_come_again():
    things = plan_scene(Settings(num_objects=(4, 4), families=("box", "cone"), stack_prob=0), "val", 0)
    assert sorted(thing.shape.family for thing in things) == ["box", "box", "cone", "cone"]


def test_seeds_and_splits_differ():
    def first(**settings):
        return plan_scene(Settings(**settings), "train", 0)[0].centre.tolist()

    assert first() == first()
    assert first() != first(seed=1)
    assert plan_scene(Settings(), "val", 0)[0].centre.tolist() != first()


# --- what is written ------------------------------------------------------------------------------------------------


def test_every_scene_is_readable(made):
    for split, count in {"train": COUNT, "val": 3}.items():
        folders = sorted((made / split).iterdir())
        assert [folder.name for folder in folders] == [f"{number:06d}" for number in range(count)]
        assert [problem for folder in folders for problem in check_scene(folder, "shapes")] == []
    assert not (made / "test").exists()


@pytest.mark.parametrize("isotropic", [False, True])
def test_poses_and_voxels_say_where_the_object_is(tmp_path, isotropic):
    build_synth(tmp_path, 3, 0, seed=2, isotropic_scale=isotropic, resolution=24, progress=False)
    settings = read_settings(tmp_path)
    for number in range(3):
        scene = read_scene(tmp_path / "train" / f"{number:06d}", "shapes")
        things = plan_scene(settings, "train", number)
        assert scene.metadata["families"] == [thing.shape.family for thing in things]
        assert scene.metadata["isotropic_scale"] is isotropic
        grids = unpack_occupancy(scene.tensors["occupancy"], 24)
        rotations = rotation_matrix(scene.tensors["6drotation_normalized"][:, 0].double()).numpy()
        sides = scene.tensors["scale"][:, 0].double().exp().numpy()
        assert (np.ptp(sides, axis=1) < 1e-6).all() == isotropic
        for i, thing in enumerate(things):
            centres = (voxel_centres(24) * sides[i]) @ rotations[i].T + scene.tensors["translation"][i, 0].numpy()
            assert (thing.occupied(centres) == grids[i]).mean() > 0.998  # but for rounding to float32
            assert grids[i].any(axis=(1, 2))[[0, -1]].all() or isotropic


def test_points_lie_on_the_object_that_the_mask_says(made):
    settings = read_settings(made)
    directions = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3), axis=-1).reshape(-1, 3)
    for number in range(COUNT):
        scene = read_scene(made / "train" / f"{number:06d}", "shapes")
        points = scene.conditionals["pointmap"].float().numpy().transpose(1, 2, 0)
        masks = scene.conditionals["masks"].numpy().astype(bool)
        assert (masks.sum(axis=0) <= 1).all()
        np.testing.assert_array_equal(np.isfinite(points).all(axis=-1), masks.any(axis=0))
        for thing, mask in zip(plan_scene(settings, "train", number), masks, strict=True):
            assert mask.sum() >= 3
            local = (points[mask] - thing.centre) @ thing.rotation / (2 * thing.half)
            around = thing.shape.occupied(local[:, None] + directions * VOXEL / 2)
            assert around.any(axis=1).all()
            assert not around.all(axis=1).any()


def test_pictures_show_the_objects_in_their_colours(made):
    scene = read_scene(made / "train" / "000000", "shapes")
    picture = scene.conditionals["image"]
    assert picture.dtype == torch.uint8
    things = plan_scene(read_settings(made), "train", 0)
    expected = take_picture(things, 32, 2).rgb
    np.testing.assert_allclose(picture.permute(1, 2, 0).numpy() / 255, expected, atol=0.5 / 255 + 1e-9)
    camera = Camera(*(np.array(scene.metadata["camera"][name]) for name in ("scene_from_camera", "intrinsics")))
    again = render([thing.mesh() for thing in things], [thing.color for thing in things], camera, 32)
    np.testing.assert_array_equal(again.masks(len(things)), scene.conditionals["masks"].numpy())


def test_descriptors_are_the_poses_in_another_order(made):
    moved = 0
    for number in range(COUNT):
        scene = read_scene(made / "train" / f"{number:06d}", "shapes")
        names = ("translation", "scale", "6drotation_normalized")
        rows = torch.cat([scene.tensors[name][:, 0] for name in names], dim=1)
        tokens = scene.conditionals["cond_tokens"]
        assert sorted(tokens.tolist()) == sorted(rows.tolist())
        moved += tokens.tolist() != rows.tolist()
    assert moved > COUNT / 3


def test_true_scenes(made):
    scene = true_scene(made, "val", "000001")
    metadata = json.loads((made / "val" / "000001" / "metadata.json").read_text())
    assert list(scene.graph.nodes_geometry) == metadata["object_ids"]
    masks = read_scene(made / "val" / "000001", "shapes").conditionals["masks"].numpy()
    meshes = [scene.geometry[name] for name in metadata["object_ids"]]
    picture = render(meshes, metadata["colors"], Camera.floor_view(), 32)
    np.testing.assert_array_equal(picture.masks(len(meshes)), masks)


def test_any_number_of_workers_writes_the_same_bytes(made, tmp_path):
    build_synth(tmp_path, COUNT, 3, seed=5, stack_prob=0.5, num_workers=2, progress=False)
    assert files(tmp_path) == files(made)


def test_a_stopped_run_goes_on_and_keeps_what_there_is(made, tmp_path):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "train" / "000003")
    (tmp_path / "train" / "000007" / "metadata.json").unlink()
    kept = tmp_path / "train" / "000004" / "shapes.safetensors"
    before = kept.stat().st_mtime_ns
    build_synth(tmp_path, COUNT + 1, 3, seed=5, stack_prob=0.5, progress=False)
    assert kept.stat().st_mtime_ns == before
    shutil.rmtree(tmp_path / "train" / f"{COUNT:06d}")
    assert files(tmp_path) == files(made)


def test_scenes_of_other_settings_are_refused(made, tmp_path):
    with pytest.raises(ValueError, match=r"holds scenes made with seed 5; choose these, or another folder"):
        build_synth(made, COUNT, 3, seed=6, stack_prob=0.5, progress=False)
    (tmp_path / "train" / "mine").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"holds scenes already, and no synth.json"):
        build_synth(tmp_path, 1, 1, progress=False)
    with pytest.raises(ValueError, match=r"has no synth.json: its scenes were not made by"):
        read_settings(tmp_path)
    (tmp_path / "synth.json").write_text("{}")
    with pytest.raises(ValueError, match=r"synth.json is damaged"):
        read_settings(tmp_path)


@pytest.mark.parametrize("chosen", [(), ("cond_tokens",), ("image", "masks")])
def test_only_the_chosen_conditionals_are_written(tmp_path, chosen):
    build_synth(tmp_path, 1, 0, conditionals=chosen, progress=False)
    assert set(read_scene(tmp_path / "train" / "000000", "shapes").conditionals) == set(chosen)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": -1}, "`seed` must be a whole number of at least 0, got -1"),
        ({"image_size": 4}, "`image_size` must be a whole number of at least 8, got 4"),
        ({"resolution": 15}, "`resolution` must be even, got 15"),
        ({"num_objects": (4, 2)}, r"`num_objects` must be two numbers, 1 <= LOW <= HIGH <= 8, got \(4, 2\)"),
        ({"num_objects": (2, 9)}, "`num_objects` must be two numbers"),
        ({"stack_prob": 1.5}, r"`stack_prob` must lie in \[0, 1\], got 1.5"),
        ({"families": ("box", "tree")}, "`families` has the unknown tree; known are box, cylinder"),
        ({"families": ()}, "`families` must name one or more, each once, got none"),
        ({"families": ("cone",)}, "`stack_prob` above 0 needs one of the families box, cylinder, table, arch"),
        ({"footprints": "discs"}, "`footprints` must be circles or boxes, got 'discs'"),
        ({"conditionals": ("depth",)}, "`conditionals` has the unknown depth; known are image, pointmap"),
        ({"num_val": -1}, "`num_val` must not be negative, got -1"),
        ({"num_workers": -1}, "`num_workers` must not be negative, got -1"),
    ],
)
def test_wrong_settings(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        build_synth(tmp_path / "out", progress=False, **settings)
    assert not (tmp_path / "out").exists()
