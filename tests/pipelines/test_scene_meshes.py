"""Surfaces of occupancy, their place in a scene, and scenes as GLB files."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import trimesh
from scipy.spatial.transform import Rotation

from pipelines.shortcut_scene import assemble, export, load_scene, mesh_from_logits, mesh_from_occupancy, place
from pipelines.shortcut_scene.meshes import pose_matrix

COLORS = [(0.3, 0.5, 0.8), (0.9, 0.5, 0.2), (0.1, 0.6, 0.4)]


def centres(resolution: int) -> np.ndarray:
    axis = (np.arange(resolution) + 0.5) / resolution - 0.5
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)


def ball(resolution: int = 16, radius: float = 0.4) -> np.ndarray:
    return np.linalg.norm(centres(resolution), axis=-1) < radius


def random_pose(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return Rotation.random(random_state=seed).as_matrix(), rng.normal(0, 0.5, 3), rng.normal(0, 1, 3)


def random_scene(count: int = 3) -> tuple[trimesh.Scene, list[tuple], list[trimesh.Trimesh]]:
    """A scene of distinct objects, their poses and their meshes in their own frames."""
    rng = np.random.default_rng(0)
    meshes = [mesh_from_occupancy(rng.random((5, 5, 5)) < 0.4) for _ in range(count)]
    poses = [random_pose(seed) for seed in range(count)]
    placed = [place(mesh, *pose) for mesh, pose in zip(meshes, poses, strict=True)]
    return assemble(placed, [f"object_{i}" for i in range(count)], COLORS[:count]), poses, meshes


# --- surfaces -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [1, 4, 16])
@pytest.mark.parametrize("logit", [0.5, 1e3])
def test_a_full_grid_ends_at_the_border_of_the_cube(resolution, logit):
    mesh = mesh_from_logits(np.full((resolution,) * 3, logit))
    np.testing.assert_allclose(mesh.bounds, [[-0.5] * 3, [0.5] * 3], atol=1e-6)
    assert mesh.is_watertight
    assert 1 - 3 / resolution < mesh.volume <= 1  # but for its edges, which are bevelled


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("side", [0, -1])
def test_what_touches_the_border_is_closed_there(axis, side):
    grid = np.zeros((8, 8, 8), bool)
    place_ = [slice(2, 5)] * 3
    place_[axis] = slice(0, 3) if side == 0 else slice(5, 8)
    grid[tuple(place_)] = True
    mesh = mesh_from_occupancy(grid)
    low = np.full(3, -0.25)
    low[axis] = -0.5 if side == 0 else 0.125
    np.testing.assert_allclose(mesh.bounds, [low, low + 0.375], atol=2e-3)
    assert mesh.is_watertight


def test_a_cell_lies_where_its_centre_is():
    """Axes x, y, z in this order, centre (i + .5) / R - .5."""
    for cell in ((0, 3, 5), (7, 0, 2), (4, 4, 4)):
        grid = np.zeros((8, 8, 8), bool)
        grid[cell] = True
        mesh = mesh_from_occupancy(grid)
        np.testing.assert_allclose(mesh.bounds.mean(0), centres(8)[cell], atol=1e-3)
        np.testing.assert_allclose(mesh.extents, 1 / 8, atol=2e-3)


def test_normals_point_outwards():
    mesh = mesh_from_occupancy(ball())
    assert mesh.volume == pytest.approx(4 / 3 * np.pi * 0.4**3, rel=0.03)
    outwards = (mesh.face_normals * mesh.triangles_center).sum(1)
    assert outwards.min() > 0


@pytest.mark.parametrize("kind", ["logits", "saturated", "occupancy", "at the threshold"])
def test_any_grid_gives_a_closed_surface_within_the_cube(kind):
    """Also where cells touch at an edge or a corner only, and where all values are equal in size."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        logits = rng.normal(0, 3, (6, 6, 6)).astype(np.float32)
        logits = {
            "logits": logits,
            "saturated": np.where(logits > 0, 60.0, -60.0),
            "occupancy": logits > 0,
            "at the threshold": logits.round(),
        }[kind]
        mesh = mesh_from_occupancy(logits) if kind == "occupancy" else mesh_from_logits(logits)
        assert mesh.is_watertight
        assert mesh.is_winding_consistent
        assert mesh.volume > 0
        assert np.abs(mesh.vertices).max() <= 0.5 + 1e-6


def test_the_surface_lies_where_the_probability_is_one_half():
    """A plane between two layers of cells of logit a and b: where 2 p - 1 passes 0; and above the threshold given."""
    logits = np.full((4, 4, 4), -1.0)
    logits[:, :, :2] = 3.0
    for threshold in (0.0, 1.0):
        a, b = (np.tanh((x - threshold) / 2) for x in (3.0, -1.0))
        top = mesh_from_logits(logits, threshold).bounds[1, 2]
        assert top == pytest.approx((1.5 + a / (a - b)) / 4 - 0.5, abs=3e-3)
    assert mesh_from_logits(logits, -2.0).bounds[1, 2] == pytest.approx(0.5)


def test_smoothing_removes_steps_and_keeps_the_volume():
    rough, smooth = (mesh_from_occupancy(ball(), smooth=smooth) for smooth in (False, True))
    radii = [np.linalg.norm(mesh.vertices, axis=1) for mesh in (rough, smooth)]
    assert radii[1].std() < 0.5 * radii[0].std()
    assert smooth.volume == pytest.approx(rough.volume, rel=0.05)
    assert smooth.is_watertight


def test_an_empty_grid_becomes_a_box_and_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        mesh = mesh_from_logits(np.full((4, 4, 4), -5.0))
    assert "occupancy is empty" in caplog.text
    np.testing.assert_allclose(mesh.bounds, [[-0.5] * 3, [0.5] * 3])
    assert mesh.is_watertight


def test_grids_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"`logits` must have shape \(R, R, R\), not \(4, 4, 5\)"):
        mesh_from_logits(np.zeros((4, 4, 5)))
    with pytest.raises(ValueError, match="`logits` must be numbers, some are NaN"):
        mesh_from_logits(np.full((4, 4, 4), np.nan))


# --- scenes ---------------------------------------------------------------------------------------------------------


def test_a_mesh_is_placed_by_its_pose():
    mesh = mesh_from_occupancy(ball(8))
    before = mesh.vertices.copy()
    rotation, log_scale, translation = random_pose(0)
    placed = place(mesh, rotation, log_scale, translation)
    wanted = (np.exp(log_scale) * before) @ rotation.T + translation
    np.testing.assert_allclose(placed.vertices, wanted, atol=1e-12)
    assert np.array_equal(mesh.vertices, before)
    np.testing.assert_allclose(
        trimesh.transform_points(before, pose_matrix(rotation, log_scale, translation)), wanted, atol=1e-12
    )


def test_a_scene_has_a_named_node_with_pose_and_colour_for_each_object():
    scene, poses, meshes = random_scene()
    assert sorted(scene.graph.nodes_geometry) == ["object_0", "object_1", "object_2"]
    for i, (pose, mesh) in enumerate(zip(poses, meshes, strict=True)):
        transform, name = scene.graph[f"object_{i}"]
        np.testing.assert_allclose(transform, pose_matrix(*pose), atol=1e-12)
        np.testing.assert_allclose(scene.geometry[name].vertices, mesh.vertices, atol=1e-12)
        colors = scene.geometry[name].visual.vertex_colors
        assert (colors == [*np.round(np.multiply(COLORS[i], 255)), 255]).all()


def test_meshes_without_a_pose_stay_where_they_are():
    box = trimesh.creation.box().apply_translation([1, 2, 3])
    transform, name = assemble([box], ["box"]).graph["box"]
    np.testing.assert_array_equal(transform, np.eye(4))
    np.testing.assert_allclose(assemble([box], ["box"]).geometry[name].vertices, box.vertices)


def test_a_placed_mesh_that_is_moved_again_is_found_where_it_is():
    placed = place(trimesh.creation.box(), *random_pose(0)).apply_translation([0, 0, 5])
    scene = assemble([placed], ["box"])
    np.testing.assert_allclose(scene.to_geometry().bounds, placed.bounds)


def test_names_and_colours_must_fit():
    box = trimesh.creation.box()
    for names, colors, message in (
        (["a"], None, "2 `meshes` need as many names and colours, got 1 `names`$"),
        (["a", "b"], COLORS, "got 2 `names` and 3 `colors`"),
        (["a", "a"], None, "`names` must all be different and not empty, got 'a', 'a'"),
        (["a", ""], None, "`names` must all be different and not empty"),
    ):
        with pytest.raises(ValueError, match=message):
            assemble([box, box], names, colors)


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_glb_keeps_nodes_names_poses_shapes_and_colours(tmp_path):
    scene, poses, _ = random_scene()
    export(scene, tmp_path / "new" / "scene.glb")
    loaded = load_scene(tmp_path / "new" / "scene.glb")
    assert sorted(loaded.graph.nodes_geometry) == sorted(scene.graph.nodes_geometry)
    for i, pose in enumerate(poses):
        transform, geometry = loaded.graph[f"object_{i}"]
        np.testing.assert_allclose(transform, pose_matrix(*pose), atol=1e-12)
        mesh, true = loaded.geometry[geometry], scene.geometry[f"object_{i}"]
        np.testing.assert_allclose(mesh.vertices, true.vertices, atol=1e-6)
        assert np.array_equal(mesh.faces, true.faces)
        assert mesh.is_watertight
        colors = mesh.visual.vertex_colors.astype(int)
        assert np.abs(colors - true.visual.vertex_colors).max() <= 2  # 8 bits of the linear colour


def test_in_the_file_y_is_up_and_colours_are_linear_and_matt(tmp_path):
    """What any viewer sees: the scene's z is the file's y, its y goes into the picture."""
    box = place(trimesh.creation.box(), np.eye(3), np.log([0.2, 0.4, 0.6]), [1, 2, 3])
    export(assemble([box], ["box"], [(0.5, 0.25, 1.0)]), tmp_path / "scene.glb")
    seen = trimesh.load_scene(tmp_path / "scene.glb")
    np.testing.assert_allclose(seen.bounds.mean(0), [1, 3, -2], atol=1e-6)
    np.testing.assert_allclose(seen.extents, [0.2, 0.6, 0.4], atol=1e-6)
    data = (tmp_path / "scene.glb").read_bytes()
    material = json.loads(data[20 : 20 + int.from_bytes(data[12:16], "little")])["materials"][0]["pbrMetallicRoughness"]
    np.testing.assert_allclose(material["baseColorFactor"], [0.2140, 0.0508, 1, 1], atol=3e-3)
    assert material["metallicFactor"] == 0


def test_objects_are_written_one_by_one_where_they_stand(tmp_path):
    scene, poses, meshes = random_scene()
    export(scene, tmp_path / "scene.glb", per_object_obj=True)
    files = sorted(tmp_path.glob("*.obj"))
    assert [file.name for file in files] == [f"scene-{i}-object_{i}.obj" for i in range(3)]
    for file, pose, mesh in zip(files, poses, meshes, strict=True):
        np.testing.assert_allclose(trimesh.load_mesh(file).bounds, place(mesh, *pose).bounds, atol=1e-6)


def test_the_name_of_a_node_cannot_lead_out_of_the_folder(tmp_path):
    (tmp_path / "in").mkdir()
    export(assemble([trimesh.creation.box()], ["../x y"]), tmp_path / "in/a.glb", per_object_obj=True)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")} == {"in/a.glb", "in/a-0-.._x_y.obj"}
    assert load_scene(tmp_path / "in/a.glb").graph.nodes_geometry == ["../x y"]


def test_nested_nodes_of_other_files_are_flattened(tmp_path):
    nested = trimesh.Scene()
    outer, inner = pose_matrix(*random_pose(0)), pose_matrix(*random_pose(1))
    nested.graph.update(frame_to="group", frame_from="world", matrix=outer)
    nested.add_geometry(trimesh.creation.box(), node_name="box", parent_node_name="group", transform=inner)
    (tmp_path / "nested.glb").write_bytes(nested.export(file_type="glb"))
    scene = load_scene(tmp_path / "nested.glb")
    y_up = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    np.testing.assert_allclose(y_up @ scene.graph["box"][0], outer @ inner, atol=1e-6)


def test_files_that_are_no_scenes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`path` must end in .glb, got .*scene.obj"):
        export(trimesh.Scene([trimesh.creation.box()]), tmp_path / "scene.obj")
    for content in (b"no file of this kind", b""):
        (tmp_path / "bad.glb").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad.glb is no GLB file"):
            load_scene(tmp_path / "bad.glb")
    export(assemble([trimesh.creation.box()], ["box"]), tmp_path / "cut.glb")
    data = (tmp_path / "cut.glb").read_bytes()
    for length in (10, 100, len(data) - 40):
        (tmp_path / "cut.glb").write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cut.glb is no GLB file"):
            load_scene(tmp_path / "cut.glb")
