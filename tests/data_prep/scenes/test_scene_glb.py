"""GLB files to scenes: places of nodes, what is refused, and voxels against closed forms."""

from __future__ import annotations

import base64
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image
from trimesh.transformations import rotation_matrix as turn
from trimesh.transformations import translation_matrix as move

from backlot.rendering import mesh_colors
from data_prep.scenes.format import check_scene, read_scene, unpack_occupancy
from data_prep.scenes.glb import (
    Z_UP,
    build_glb,
    choose_splits,
    enclosed,
    find_scenes,
    load_objects,
    split_matrix,
    surface_voxels,
    voxelise,
)
from data_prep.scenes.shapes import FAMILIES, occupancy, random_shape
from pipelines.shortcut_scene import rotation_matrix

UP, SIDE = (0, 1, 0), (1, 0, 0)


def box(*extents: float) -> trimesh.Trimesh:
    return trimesh.creation.box(extents or (1, 1, 1))


def step() -> trimesh.Trimesh:
    """A body that no mirror and no turn maps onto itself."""
    parts = [box(1, 0.3, 0.6), box(0.3, 0.5, 0.2)]
    parts[1].apply_translation((0.35, 0.4, 0.2))
    return trimesh.util.concatenate(parts)


def stretch(*factors: float) -> np.ndarray:
    return np.diag([*factors, 1.0])


def write(path: Path, nodes: dict[str, tuple[trimesh.Trimesh, np.ndarray, str | None]]) -> Path:
    """Nodes by name: mesh, matrix and parent."""
    scene = trimesh.Scene()
    for name, (mesh, matrix, parent) in nodes.items():
        scene.add_geometry(mesh, node_name=name, geom_name=f"mesh of {name}", transform=matrix, parent_node_name=parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    scene.export(path)
    return path


def room(path: Path) -> Path:
    return write(
        path,
        {
            "chair": (step(), move((1, 0.5, -2)) @ turn(np.pi / 6, UP) @ stretch(2, 1, 0.5), None),
            "table": (box(2, 0.6, 1), move((-1, 0.3, 0)), None),
            "cup 1": (step(), move((0.2, 0.5, 0.1)) @ turn(1.0, (1, 2, 3)) @ stretch(0.2, 0.2, 0.2), "table"),
            "mirror": (step(), move((0, 1, 2)) @ turn(0.7, UP) @ stretch(1, -1.5, 1), None),
        },
    )


def in_order(points: np.ndarray) -> np.ndarray:
    """Points sorted, so that sets of them can be compared."""
    rounded = points.round(5)
    return points[np.lexsort(rounded.T)]


# --- places ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isotropic", [True, False])
def test_every_node_comes_back_with_its_name_and_where_it_was(tmp_path, isotropic):
    path = room(tmp_path / "room.glb")
    build_glb(path, tmp_path / "out", "train", isotropic_scale=isotropic, progress=False)
    folder = tmp_path / "out" / "train" / "room"
    assert check_scene(folder, "shapes") == []
    scene = read_scene(folder, "shapes")
    assert scene.metadata["num_objects"] == 4
    assert set(scene.metadata["object_ids"]) == {"chair", "table", "cup 1", "mirror"}
    assert scene.metadata["scene_scale"] == 1.0
    rotations = rotation_matrix(scene.tensors["6drotation_normalized"][:, 0].double()).numpy()
    sides = scene.tensors["scale"][:, 0].double().exp().numpy()
    assert (np.ptp(sides, axis=1) < 1e-6).all() == isotropic
    middles = scene.tensors["translation"][:, 0].double().numpy()
    file = trimesh.load_scene(path)
    for i, thing in enumerate(load_objects(path, isotropic)):
        assert thing.name == scene.metadata["object_ids"][i]
        assert np.linalg.det(rotations[i]) == pytest.approx(1)
        assert thing.mesh.is_volume
        np.testing.assert_allclose(thing.mesh.extents.max(), 1)
        ours = (thing.mesh.vertices * sides[i]) @ rotations[i].T + middles[i]
        matrix, name = file.graph.get(thing.name)
        theirs = trimesh.transform_points(file.geometry[name].vertices, matrix) @ Z_UP.T - scene.metadata["scene_shift"]
        np.testing.assert_allclose(in_order(ours), in_order(theirs), atol=1e-5)


def test_the_pose_of_a_turned_and_stretched_node(tmp_path):
    """A turn about the file's upright axis is a yaw, and sizes are those of the object's own axes."""
    path = write(
        tmp_path / "a.glb", {"it": (box(), move((1, 0.5, -2)) @ turn(np.pi / 6, UP) @ stretch(2, 1, 0.5), None)}
    )
    (thing,) = load_objects(path, isotropic_scale=False)
    cos, sin = np.cos(np.pi / 6), np.sin(np.pi / 6)
    np.testing.assert_allclose(thing.rotation, [[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], atol=1e-6)
    np.testing.assert_allclose(thing.sides, [2, 0.5, 1], atol=1e-6)
    np.testing.assert_allclose(thing.middle, [1, 2, 0.5], atol=1e-6)
    (thing,) = load_objects(path, isotropic_scale=True)
    np.testing.assert_allclose(thing.sides, [2, 2, 2], atol=1e-6)
    np.testing.assert_allclose(thing.mesh.extents, [1, 0.25, 0.5], atol=1e-6)


def test_scenes_stand_on_the_floor_about_the_origin(tmp_path):
    build_glb(room(tmp_path / "room.glb"), tmp_path, "val", progress=False)
    scene = read_scene(tmp_path / "val" / "room", "shapes")
    things = load_objects(tmp_path / "room.glb")
    points = np.concatenate([thing.placed().vertices for thing in things]) - scene.metadata["scene_shift"]
    assert points.min(axis=0)[2] == pytest.approx(0)
    assert (points.min(axis=0) + points.max(axis=0))[:2] == pytest.approx([0, 0], abs=1e-9)


def test_a_mirrored_node_is_a_mirrored_mesh():
    rotation, stretched = split_matrix(stretch(1, -1, 1) @ turn(0.3, UP))
    assert np.linalg.det(rotation) == pytest.approx(1)
    np.testing.assert_allclose(rotation @ stretched, (stretch(1, -1, 1) @ turn(0.3, UP))[:3, :3], atol=1e-12)
    np.testing.assert_allclose(stretched, np.diag([-1, 1, 1]), atol=1e-12)


def test_a_sheared_node_is_refused_by_name(tmp_path):
    lean = np.eye(4)
    lean[0, 1] = 0.3
    path = write(tmp_path / "bent.glb", {"good": (box(), np.eye(4), None), "lean on me": (box(), lean, None)})
    with pytest.raises(ValueError, match=r"bent.glb: node 'lean on me' is sheared: two of its axes meet at 73.3 degr"):
        build_glb(path, tmp_path / "out", progress=False)
    nested = {"wide": (box(), stretch(2, 1, 1), None), "turned": (box(), turn(0.5, UP), "wide")}
    with pytest.raises(ValueError, match=r"nested.glb: node 'turned' is sheared"):
        load_objects(write(tmp_path / "nested.glb", nested))
    thing = {o.name: o for o in load_objects(path, bake_shear=True)}["lean on me"]
    theirs = trimesh.transform_points(box().vertices, lean) @ Z_UP.T
    np.testing.assert_allclose(in_order(thing.placed().vertices), in_order(theirs), atol=1e-6)
    np.testing.assert_allclose(thing.rotation @ thing.rotation.T, np.eye(3), atol=1e-12)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (stretch(1, 0, 1), "is squashed flat: its matrix stretches by 1, 1, 0"),
        (stretch(1, np.nan, 1), "has a matrix that is no finite affine one"),
    ],
)
def test_matrices_that_are_no_place(matrix, message):
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match=message):
        split_matrix(matrix)


# --- files ----------------------------------------------------------------------------------------------------------


def gltf_of_two_primitives(path: Path) -> Path:
    """A node whose mesh consists of two triangles, each with a material."""
    points = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [1, 0, 0], [0, 1, 0]], np.float32)
    views = [{"buffer": 0, "byteOffset": 36 * i, "byteLength": 36} for i in range(2)]
    accessors = [
        {"bufferView": i, "componentType": 5126, "count": 3, "type": "VEC3", "min": [0, 0, 0], "max": [1, 1, 0]}
        for i in range(2)
    ]
    materials = [{"pbrMetallicRoughness": {"baseColorFactor": color}} for color in ([1, 0, 0, 1], [0, 0, 1, 1])]
    data = base64.b64encode(points.tobytes()).decode()
    document = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, "name": "one"}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": i}, "material": i} for i in range(2)]}],
        "materials": materials,
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": 72, "uri": f"data:application/octet-stream;base64,{data}"}],
    }
    path.write_text(json.dumps(document))
    return path


def test_a_node_of_several_materials_is_one_object(tmp_path):
    things = load_objects(gltf_of_two_primitives(tmp_path / "two.gltf"))
    assert [thing.name for thing in things] == ["one"]
    assert len(things[0].mesh.faces) == 2
    colors = mesh_colors(things[0].mesh)
    corner = things[0].mesh.vertices @ [1, 0, 1]  # the first triangle's own is the lowest, the second's the highest
    assert colors[corner.argmin()] == pytest.approx([1, 0, 0])
    assert colors[corner.argmax()] == pytest.approx([0, 0, 1])


def test_materials_colour_the_picture(tmp_path):
    red = box()
    red.visual = trimesh.visual.TextureVisuals(
        material=trimesh.visual.material.PBRMaterial(baseColorFactor=(255, 0, 0, 255))
    )
    build_glb(write(tmp_path / "a.glb", {"red": (red, np.eye(4), None)}), tmp_path, "train", progress=False)
    scene = read_scene(tmp_path / "train" / "a", "shapes")
    inside = scene.conditionals["image"][:, scene.conditionals["masks"][0].bool()].float().mean(dim=1)
    assert inside[0] > 2 * inside[1:].max()


def test_textures_colour_the_vertices(tmp_path):
    mesh = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], [[0, 1, 2], [0, 2, 3]], process=False)
    picture = Image.new("RGB", (8, 8), (0, 0, 255))
    picture.paste((255, 0, 0), (0, 0, 4, 8))
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=picture)
    mesh.visual = trimesh.visual.TextureVisuals(uv=mesh.vertices[:, :2] * 0.9, material=material)
    (thing,) = load_objects(write(tmp_path / "a.glb", {"it": (mesh, np.eye(4), None)}))
    red = mesh_colors(thing.mesh)[:, 0]
    np.testing.assert_array_equal(red, thing.mesh.vertices[:, 0] < 0)


def test_large_scenes_are_seen_whole(tmp_path):
    nodes = {"a": (box(), move((-4, 0, 3)), None), "b": (box(), move((4, 0, -3)), None)}
    build_glb(write(tmp_path / "wide.glb", nodes), tmp_path, "train", progress=False)
    scene = read_scene(tmp_path / "train" / "wide", "shapes")
    masks = scene.conditionals["masks"].numpy()
    assert (masks.sum(axis=(1, 2)) > 3).all()
    border = np.ones((32, 32), bool)
    border[1:-1, 1:-1] = False
    assert not masks[:, border].any()
    assert np.linalg.norm(np.array(scene.metadata["camera"]["scene_from_camera"])[:3, 3]) > 20


def test_folders_and_splits(tmp_path):
    for name in ("a", "b", "deep/c", "deep/d"):
        write(tmp_path / "in" / f"{name}.glb", {"it": (box(), np.eye(4), None)})
    assert list(find_scenes(tmp_path / "in")) == ["a", "b", "deep_c", "deep_d"]
    assert build_glb(tmp_path / "in", tmp_path / "out", progress=False) == 4
    written = sorted(path.parent.name for path in (tmp_path / "out").glob("*/*"))
    assert written == ["train"] * 3 + ["val"]
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    build_glb(tmp_path / "in", tmp_path / "out", progress=False)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")} == before


def test_splits_depend_on_names_alone():
    names = [f"scene {i}" for i in range(400)]
    splits = choose_splits(names, 0.25)
    assert 70 < list(splits.values()).count("val") < 130
    fewer = choose_splits(names[::2], 0.25)
    assert sum(fewer[name] != splits[name] for name in fewer) <= 1
    assert set(choose_splits(names, 0).values()) == {"train"}
    assert sorted(choose_splits(["a", "b"], 0.01).values()) == ["train", "val"]
    assert choose_splits(["a"], 0.01) == {"a": "train"}


def test_what_is_no_scene(tmp_path):
    def refused(source, message, **arguments):
        with pytest.raises(ValueError, match=message):
            build_glb(source, tmp_path / "out", progress=False, **arguments)

    (tmp_path / "bad.glb").write_bytes(b"nothing of the kind")
    refused(tmp_path / "bad.glb", r"bad.glb: unreadable \(")
    whole = room(tmp_path / "cut.glb").read_bytes()
    (tmp_path / "cut.glb").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "cut.glb", r"cut.glb: unreadable \(")
    refused(tmp_path / "absent", "absent does not exist")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty holds no .glb or .gltf files")
    (tmp_path / "a.obj").write_text("")
    refused(tmp_path / "a.obj", "a.obj is not a .glb or .gltf file")
    for name in ("a b.glb", "a_b.glb"):
        write(tmp_path / "twice" / name, {"it": (box(), np.eye(4), None)})
    refused(tmp_path / "twice", "would both be scene 'a_b'; rename one")
    good = tmp_path / "twice" / "a_b.glb"
    refused(good, "`split` must be one of train, val, test, got 'all'", split="all")
    refused(good, r"`val_fraction` must lie in \[0, 1\), got 1", val_fraction=1.0)
    refused(good, "`resolution` must be an even number of at least 2, got 5", resolution=5)
    refused(good, "`image_size` must be at least 8, got 2", image_size=2)
    refused(good, "`conditionals` has the unknown depth", conditionals=("depth",))
    assert not (tmp_path / "out").exists()


def test_a_file_of_points_has_no_object(tmp_path):
    scene = trimesh.Scene()
    scene.add_geometry(trimesh.PointCloud(np.eye(3)), node_name="dots")
    scene.export(tmp_path / "dots.glb")
    with (
        pytest.warns(UserWarning, match="node 'dots' has no triangles"),
        pytest.raises(ValueError, match="no node has"),
    ):
        load_objects(tmp_path / "dots.glb")


# --- voxels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [16, 32])
def test_volumes(resolution):
    grid, closed = voxelise(box(), resolution)
    assert closed
    assert grid.all()
    grid, closed = voxelise(box(0.5, 1, 0.25), resolution)
    assert grid.mean() == pytest.approx(0.125)
    assert grid[resolution // 4 : -resolution // 4, :, 3 * resolution // 8 : -3 * resolution // 8].all()
    grid, closed = voxelise(trimesh.creation.icosphere(4, 0.5), resolution)
    assert closed
    assert grid.mean() == pytest.approx(np.pi / 6, rel=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_voxels_of_a_surface_are_those_of_its_solid(family):
    shape = random_shape(family, np.random.default_rng(3))
    theirs, ours = voxelise(shape.mesh(), 16), occupancy(shape, 16)
    assert theirs[1]
    assert (theirs[0] & ours).sum() / (theirs[0] | ours).sum() > 0.97  # facets


def test_overlapping_parts_and_meshes_that_are_inside_out():
    parts = [box(0.6, 1, 1), box(0.6, 1, 1)]
    parts[0].apply_translation((-0.2, 0, 0))
    parts[1].apply_translation((0.2, 0, 0))
    assert voxelise(trimesh.util.concatenate(parts), 16)[0].all()
    inverted = trimesh.creation.icosphere(3, 0.5)
    grid = voxelise(inverted, 16)[0]
    inverted.invert()
    np.testing.assert_array_equal(voxelise(inverted, 16)[0], grid)
    mixed = inverted.copy()
    mixed.faces[::3] = mixed.faces[::3, ::-1]
    np.testing.assert_array_equal(voxelise(mixed, 16)[0], grid)


def test_repeated_vertices_do_not_open_a_mesh():
    mesh = trimesh.creation.icosphere(3, 0.5)
    loose = trimesh.Trimesh(mesh.triangles.reshape(-1, 3), np.arange(3 * len(mesh.faces)).reshape(-1, 3), process=False)
    assert not loose.is_watertight
    grid, closed = voxelise(loose, 16)
    assert closed
    np.testing.assert_array_equal(grid, voxelise(mesh, 16)[0])


def test_parts_thinner_than_a_voxel_are_kept():
    assert voxelise(box(1, 1, 0.01), 16)[0].any(axis=2).all()
    plate, leg = box(1, 1, 0.3), box(0.02, 0.02, 0.7)
    plate.apply_translation((0, 0, 0.35))
    leg.apply_translation((0.41, 0.41, -0.15))
    grid = voxelise(trimesh.util.concatenate([plate, leg]), 16)[0]
    assert grid[..., :11].sum(axis=(0, 1)).tolist() == [1] * 11  # down to the floor
    assert grid[14, 14].all()


def test_an_open_mesh_is_its_surface_and_what_it_encloses(tmp_path):
    shell = trimesh.creation.icosphere(4, 0.5)
    shell.update_faces(shell.triangles_center[:, 2] < 0.45)
    grid, closed = voxelise(shell, 16)
    assert not closed
    middle = grid[4:12, 4:12, 4:12]
    assert not middle.all()  # the part below the hole is not enclosed from above
    assert grid[2:14, 8, 8].any()
    surface = surface_voxels(shell.vertices, shell.faces, 16)
    assert (grid | surface == grid).all()
    assert not enclosed(np.zeros((4, 4, 4), bool)).any()
    path = write(tmp_path / "open.glb", {"lid off": (shell, np.eye(4), None)})
    with pytest.warns(UserWarning, match=r"open.glb: node 'lid off' is not closed"):
        build_glb(path, tmp_path, "train", progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_glb(room(tmp_path / "room.glb"), tmp_path, "train", progress=False)


def test_a_surface_leaves_no_hole():
    """No straight way along an axis leads from the outside to the middle of a sphere's voxels."""
    surface = surface_voxels(*(getattr(trimesh.creation.icosphere(4, 0.5), name) for name in ("vertices", "faces")), 24)
    assert not surface[12, 12, 12]
    filled = enclosed(surface)
    assert np.pi / 6 < filled.mean() < 1.25 * np.pi / 6  # voxels that the surface only touches are part of it
    for axis in range(3):
        inside = filled.any(axis=axis)
        assert (surface.any(axis=axis) == inside).all()


def test_stored_voxels_are_of_the_stored_object(tmp_path):
    build_glb(room(tmp_path / "room.glb"), tmp_path, "train", resolution=32, progress=False)
    scene = read_scene(tmp_path / "train" / "room", "shapes")
    grids = unpack_occupancy(scene.tensors["occupancy"], 32)
    for thing, grid in zip(load_objects(tmp_path / "room.glb"), grids, strict=True):
        np.testing.assert_array_equal(grid, voxelise(thing.mesh, 32)[0])
        assert grid.mean() == pytest.approx(thing.mesh.volume, abs=0.03)
