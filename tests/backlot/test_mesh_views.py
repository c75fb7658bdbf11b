"""Pictures from given poses: against closed forms, ray casting, OpenGL and themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image
from trimesh.visual import TextureVisuals
from trimesh.visual.material import MultiMaterial, PBRMaterial, SimpleMaterial

from backlot import gl_views
from backlot.bodies import Light, is_solid
from backlot.mesh_views import instance_masks, render_views
from backlot.rendering import render_scene, to_bytes, to_linear, to_srgb
from backlot.views import look_at_poses, template_camera, view_directions

ROOT = Path(__file__).parents[2]
EVEN = Light(ambient=1.0)
"""Surfaces have their own colours under it."""


def pose(depth: float = 0.0) -> np.ndarray:
    result = np.eye(4)
    result[2, 3] = depth
    return result


def camera(focal: float, size: tuple[int, int]) -> np.ndarray:
    return np.array([[focal, 0, (size[1] - 1) / 2], [0, focal, (size[0] - 1) / 2], [0, 0, 1]])


def quad(width: float, height: float) -> trimesh.Trimesh:
    """Across the line of sight; the first corner is the picture's upper left one."""
    corners = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]]) * (width / 2, height / 2, 0)
    return trimesh.Trimesh(corners, [[0, 1, 2], [0, 2, 3]], process=False)


UV = np.array([[0.0, 1], [1, 1], [1, 0], [0, 0]])  # of `quad`: the picture upright


def dented(seed: int = 0, radius: float = 0.1, subdivisions: int = 3) -> trimesh.Trimesh:
    """A solid with hollows, in colours."""
    rng = np.random.default_rng(seed)
    mesh = trimesh.creation.icosphere(subdivisions, radius)
    unit = mesh.vertices / radius
    mesh.vertices *= 1 - 0.35 * np.sin(unit @ rng.normal(size=(3, 1)) * 4 + rng.uniform(0, 6)) ** 2
    mesh.visual.vertex_colors = np.rint((unit / 2 + 0.5) * 255).astype(np.uint8)
    return mesh


def look(count: int, radius: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Poses (count, 1, 4, 4) and K."""
    K, distance = template_camera(radius, size)
    return look_at_poses(view_directions(42)[:count], distance)[:, None], K


def test_pixels_of_a_rectangular_picture_are_where_the_camera_says():
    size = (24, 40)
    K = np.array([[20.0, 0, 17], [0, 10, 9], [0, 0, 1]])
    views = render_views([quad(0.9, 1.8)], pose(2.0)[None, None], K, size, backend="zbuffer")
    # 20 * 0.45 / 2 = 4.5 pixels to either side of u = 17, and of v = 9
    expected = np.full(size, -1)
    expected[5:14, 13:22] = 0
    np.testing.assert_array_equal(views.instances[0], expected)
    np.testing.assert_array_equal(views.depth[0] > 0, expected == 0)
    np.testing.assert_allclose(views.depth[0][expected == 0], 2.0, rtol=1e-6)
    assert (views.rgb[0][expected < 0] == 0).all()
    assert views.depth.dtype == np.float32
    assert (views.rgb.dtype, views.instances.dtype) == (np.uint8, np.int16)


def test_every_pixel_agrees_with_ray_casting():
    pytest.importorskip("embreex")
    from trimesh.ray.ray_pyembree import RayMeshIntersector

    mesh, size = dented(subdivisions=4), 192
    poses, K = look(4, 0.1, size)
    views = render_views([mesh], poses, K, (size, size), supersample=1, backend="zbuffer")
    pixels = np.stack([*np.meshgrid(np.arange(size), np.arange(size)), np.ones((size, size))], axis=-1)
    rays = pixels.reshape(-1, 3) @ np.linalg.inv(K).T
    intersector = RayMeshIntersector(mesh)
    differing = seen = 0
    for each, depth in zip(poses[:, 0], views.depth, strict=True):
        rotation, shift = each[:3, :3], each[:3, 3]
        eye, directions = -rotation.T @ shift, rays @ rotation
        face = intersector.intersects_first(np.broadcast_to(eye, directions.shape), directions).reshape(size, size)
        differing += int(((face >= 0) != (depth > 0)).sum())
        both = (face >= 0) & (depth > 0)
        normal, corner = mesh.face_normals[face[both]], mesh.triangles[face[both], 0]
        cast = ((corner - eye) * normal).sum(1) / (directions[both.ravel()] * normal).sum(1)
        np.testing.assert_allclose(depth[both], cast, rtol=2e-6)
        seen += int(both.sum())
    assert seen > 40_000
    assert differing == 0


def test_faces_that_look_away_are_left_out_of_solids_without_a_change():
    mesh, size = dented(), 96
    assert is_solid(mesh)
    # a triangle behind the camera: not closed any more
    far = trimesh.Trimesh([[0, 0, 50.0], [1, 0, 50], [0, 1, 50]], [[0, 1, 2]], process=False)
    open_mesh = trimesh.util.concatenate([mesh, far])
    assert not is_solid(open_mesh)
    K, distance = template_camera(0.1, size)
    poses = look_at_poses(np.array([[0.0, 0.6, 0.8], [1, 0, 0]]), distance)[:, None]
    one, other = (render_views([each], poses, K, (size, size), backend="zbuffer") for each in (mesh, open_mesh))
    np.testing.assert_array_equal(one.depth, other.depth)
    np.testing.assert_array_equal(one.instances, other.instances)
    seen = one.instances >= 0
    assert np.abs(one.rgb[seen].astype(int) - other.rgb[seen]).max() <= 1


def test_which_meshes_are_solid():
    box = trimesh.creation.box((1, 1, 1))
    inverted = box.copy()
    inverted.invert()
    assert is_solid(box)
    assert is_solid(trimesh.util.concatenate([box, box.copy().apply_translation((3, 0, 0))]))
    assert not is_solid(inverted)
    assert not is_solid(trimesh.util.concatenate([box, inverted.copy().apply_translation((3, 0, 0))]))
    assert not is_solid(quad(1, 1))
    assert is_solid(trimesh.Trimesh(box.triangles.reshape(-1, 3), np.arange(36).reshape(12, 3), process=False))
    sides = render_views([inverted], pose(3.0)[None, None], camera(30, (32, 32)), (32, 32), backend="zbuffer")
    assert sides.depth[0, 16, 16] == pytest.approx(2.5)


def test_a_texture_is_seen_texel_by_texel_and_upright():
    picture = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    mesh = quad(8, 6)
    mesh.visual = TextureVisuals(UV, image=Image.fromarray(picture))
    views = render_views([mesh], pose(1.0)[None, None], camera(1, (6, 8)), (6, 8), light=EVEN, supersample=1)
    assert np.abs(views.rgb[0].astype(int) - picture).max() <= 1


def test_between_texels_light_is_mixed_and_pictures_repeat():
    picture = np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)
    mesh = quad(8, 4)
    mesh.visual = TextureVisuals(UV * (2, 1), image=Image.fromarray(picture))  # texels are two pixels wide
    options = {"light": EVEN, "supersample": 1, "backend": "zbuffer"}
    row = render_views([mesh], pose(1.0)[None, None], camera(1, (4, 8)), (4, 8), **options).rgb[0, 2, :, 0]
    expected = to_bytes(to_srgb(np.array([0.25, 0.25, 0.75, 0.75] * 2)))
    np.testing.assert_array_equal(row, expected)


def test_materials_of_one_mesh_and_their_factors():
    red, white = (Image.new("RGB", (2, 2), color) for color in ("red", "white"))
    factor = PBRMaterial(baseColorTexture=white, baseColorFactor=[0, 128, 255, 255])
    mesh = quad(8, 8)
    materials = MultiMaterial([SimpleMaterial(image=red, diffuse=[0, 0, 0, 255]), factor])
    mesh.visual = TextureVisuals(UV, material=materials, face_materials=[0, 1])
    views = render_views([mesh], pose(1.0)[None, None], camera(1, (8, 8)), (8, 8), light=EVEN, supersample=1)
    np.testing.assert_array_equal(views.rgb[0, 1, 6], [255, 0, 0])
    np.testing.assert_array_equal(views.rgb[0, 6, 1], [0, *to_bytes(to_srgb(np.array([128 / 255, 1])))])


def test_colours_of_vertices_and_grey_without_any():
    mesh = quad(8, 8)
    grey = render_views([mesh], pose(1.0)[None, None], camera(1, (8, 8)), (8, 8), light=EVEN).rgb
    assert (grey == 153).all()
    mesh.visual.vertex_colors = [[255, 0, 0]] * 4
    mesh.visual.vertex_colors[0] = [0, 0, 255, 255]
    rgb = render_views([mesh], pose(1.0)[None, None], camera(1, (8, 8)), (8, 8), light=EVEN, supersample=1).rgb[0]
    linear = to_linear(rgb / 255)
    row, column = np.triu_indices(8, 1)  # in the first triangle the weight of corner 0 falls with the column
    np.testing.assert_allclose(linear[row, column, 2], 1 - (column + 0.5) / 8, atol=0.01)
    row, column = np.tril_indices(8, -1)  # and in the other with the row
    np.testing.assert_allclose(linear[row, column, 2], 1 - (row + 0.5) / 8, atol=0.01)


def test_light_follows_the_cosine():
    tilted = trimesh.transformations.rotation_matrix(np.radians(60), (1, 0, 0)) @ np.eye(4)
    tilted[2, 3] = 5.0
    light = Light(direction=(0, 0, -1), ambient=0.2, colour=(1, 0.5, 0.25))
    rgb = render_views([quad(2, 2)], tilted[None, None], camera(40, (16, 16)), (16, 16), light=light).rgb[0, 8, 8]
    albedo = to_linear(np.array(153 / 255))
    expected = to_bytes(to_srgb(albedo * (0.2 + 0.8 * 0.5) * np.array([1, 0.5, 0.25])))
    assert np.abs(rgb.astype(int) - expected).max() <= 1
    behind = Light(direction=(0, 0, 1), ambient=0.2)
    rgb = render_views([quad(2, 2)], tilted[None, None], camera(40, (16, 16)), (16, 16), light=behind).rgb[0, 8, 8]
    assert np.abs(rgb.astype(int) - to_bytes(to_srgb(albedo * 0.2))).max() <= 1


def test_each_view_has_its_light():
    poses = np.stack([pose(2.0)[None]] * 2)
    lights = [Light(ambient=1.0), Light(ambient=1.0, colour=(0, 0, 0))]
    rgb = render_views([quad(9, 9)], poses, camera(4, (4, 4)), (4, 4), light=lights).rgb
    assert (rgb[0] > 0).all()
    assert (rgb[1] == 0).all()
    with pytest.raises(ValueError, match="`light` has 1 entries for 2 views"):
        render_views([quad(9, 9)], poses, camera(4, (4, 4)), (4, 4), light=lights[:1])


def test_a_shadow_falls_where_the_lamp_is_hidden():
    """A plate 1 m before a wall, the lamp at 45 degrees from the left: its shadow lies 1 m further to the right."""
    size = (48, 96)
    wall, plate = quad(9.6, 4.8), quad(0.8, 0.8)
    poses = np.stack([pose(11.0), pose(10.0)])
    poses[1, 0, 3] = -2.0
    light = Light(direction=(-1, 0, -1), ambient=0.25)
    K = camera(10 * 11, size)  # ten pixels are a metre on the wall
    options = {"light": light, "supersample": 1, "backend": "zbuffer"}
    plain = render_views([wall, plate], poses[None], K, size, **options)
    shadowed = render_views([wall, plate], poses[None], K, size, shadows=True, **options)
    np.testing.assert_array_equal(plain.depth, shadowed.depth)
    dark = (shadowed.rgb[0, :, :, 0] < 0.75 * plain.rgb[0, :, :, 0]) & (plain.instances[0] == 0)
    row, column = np.nonzero(dark)
    assert np.mean(column) == pytest.approx(47.5 - 10, abs=0.7)
    assert np.mean(row) == pytest.approx(23.5, abs=0.7)
    assert 40 < dark.sum() < 90
    middle = shadowed.rgb[0, 24, 38, 0]
    assert abs(int(middle) - int(to_bytes(to_srgb(to_linear(np.array(0.6)) * 0.25)))) <= 1
    lit = ~dark & (plain.instances[0] == 0)
    assert np.median(np.abs(shadowed.rgb[0][lit].astype(int) - plain.rgb[0][lit])) == 0


def test_the_nearer_object_hides_the_farther_and_masks_do_not_care():
    meshes = [quad(4, 4), quad(2, 2)]
    poses = np.stack([pose(2.0), pose(1.0)])[None]
    views = render_views(meshes, poses, camera(4, (16, 16)), (16, 16))
    whole = instance_masks(meshes, poses, camera(4, (16, 16)), (16, 16))
    assert whole.shape == (1, 2, 16, 16)
    assert whole[0].sum(axis=(1, 2)).tolist() == [64, 64]
    assert views.masks(2)[0].sum(axis=(1, 2)).tolist() == [0, 64]
    apart = render_views(meshes[:1], poses[:, :1], camera(4, (16, 16)), (16, 16))
    np.testing.assert_array_equal(apart.instances[0] == 0, whole[0, 0])


def test_turning_the_camera_turns_the_picture():
    mesh, size = dented(1), 64
    poses, K = look(2, 0.1, size)
    turn = np.eye(4)
    turn[:2, :2] = [[0, -1], [1, 0]]
    one, other = (render_views([mesh], each, K, (size, size), backend="zbuffer") for each in (poses, turn @ poses))
    np.testing.assert_array_equal(np.rot90(one.instances, -1, (1, 2)), other.instances)
    np.testing.assert_allclose(np.rot90(one.depth, -1, (1, 2)), other.depth, rtol=1e-6)
    assert np.abs(np.rot90(one.rgb, -1, (1, 2)).astype(int) - other.rgb).max() <= 1


def test_more_rays_smooth_colours_and_leave_the_rest():
    mesh, size = dented(2), 64
    poses, K = look(1, 0.1, size)
    views = {s: render_views([mesh], poses, K, (size, size), supersample=s, backend="zbuffer") for s in (1, 2, 3, 8)}
    for s in (2, 3):
        np.testing.assert_array_equal(views[s].instances, views[1].instances)
        np.testing.assert_array_equal(views[s].depth, views[1].depth)
    error = {s: np.abs(views[s].rgb.astype(float) - views[8].rgb).mean() for s in (1, 2, 3)}
    assert error[3] < error[2] < 0.6 * error[1]


def test_wrong_arguments_are_named():
    mesh, K = quad(1, 1), camera(4, (8, 8))
    with pytest.raises(ValueError, match=r"`camera_from_object` must be \(V, 1, 4, 4\)"):
        render_views([mesh], pose()[None], K, (8, 8))
    with pytest.raises(ValueError, match="`K` must be"):
        render_views([mesh], pose()[None, None], K[None].repeat(2, 0), (8, 8))
    with pytest.raises(ValueError, match="`backend` must be auto, zbuffer or gl, got 'cuda'"):
        render_views([mesh], pose()[None, None], K, (8, 8), backend="cuda")
    with pytest.raises(ValueError, match="`supersample` must be at least 1"):
        render_views([mesh], pose()[None, None], K, (8, 8), supersample=0)
    with pytest.raises(ValueError, match="`shadows` need the backend zbuffer"):
        render_views([mesh], pose()[None, None], K, (8, 8), shadows=True, backend="gl")
    with pytest.raises(ValueError, match="no triangles"):
        render_views([trimesh.Trimesh()], pose()[None, None], K, (8, 8))
    with pytest.raises(ValueError, match="`ambient` must lie between 0 and 1"):
        Light(ambient=1.5)


def test_opengl_sees_what_the_z_buffer_sees():
    if reason := gl_views.problem():
        pytest.skip(reason)
    textured, size = trimesh.creation.box((0.05, 0.2, 0.05)), (72, 96)
    picture = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    flat = trimesh.Trimesh(textured.triangles.reshape(-1, 3), np.arange(36).reshape(12, 3), process=False)
    flat.visual = TextureVisuals(np.random.default_rng(1).uniform(-1, 2, (36, 2)), image=Image.fromarray(picture))
    K, distance = template_camera(0.12, 96)
    poses = look_at_poses(view_directions(42)[:8], distance)[:, None].repeat(2, axis=1)
    light = Light((-1, -2, -3), 0.3, (1, 0.9, 0.8))
    one, other = (
        render_views([dented(), flat], poses, K, size, light=light, backend=each) for each in ("zbuffer", "gl")
    )
    seen = one.instances >= 0
    assert set(np.unique(one.instances)) == {-1, 0, 1}
    assert (one.instances != other.instances).mean() < 1e-4
    both = seen & (one.instances == other.instances)
    assert np.quantile(np.abs(one.depth[both] / other.depth[both] - 1), 0.999) < 1e-5
    apart = np.abs(one.rgb[both].astype(int) - other.rgb[both])
    assert np.quantile(apart, 0.99) <= 1
    assert apart.mean() < 0.1


def test_opengl_that_cannot_be_had_is_one_clear_line():
    code = (
        "import numpy as np, trimesh\n"
        "from backlot.mesh_views import render_views\n"
        "mesh, pose = trimesh.creation.box((1, 1, 1)), np.eye(4)\n"
        "pose[2, 3] = 3\n"
        "arguments = [mesh], pose[None, None], np.diag([9.0, 9, 1]), (8, 8)\n"
        "assert (render_views(*arguments, backend='auto').depth > 0).any()\n"
        "try:\n"
        "    render_views(*arguments, backend='gl')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    without = {**os.environ, "__EGL_VENDOR_LIBRARY_FILENAMES": "/nonexistent", "LIBGL_DRIVERS_PATH": "/nonexistent"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=without, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("`backend` gl cannot be used: ")
    assert result.stdout.count("\n") == 1


def test_pictures_of_scenes_show_textures():
    """Both halves of a triangle's texture are seen, where colours at its corners would be alike."""
    picture = np.zeros((8, 8, 3), np.uint8)
    picture[2:6, 2:6] = (255, 0, 0)
    mesh = trimesh.creation.box((1, 1, 1)).apply_translation((0, 0, 0.5))
    flat = trimesh.Trimesh(mesh.triangles.reshape(-1, 3), np.arange(36).reshape(12, 3), process=False)
    corner = np.round((flat.vertices - flat.bounds[0]) @ np.array([[1, 0], [1, 0], [0, 1]]))
    flat.visual = TextureVisuals(np.clip(corner, 0, 1), image=Image.fromarray(picture))
    scene = trimesh.Scene([flat])
    rgb = np.asarray(render_scene(scene, 48, supersample=1), int)
    red = (rgb[..., 0] > 120) & (rgb[..., 1] < 60)
    assert red.sum() > 40
