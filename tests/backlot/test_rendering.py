"""The rasteriser against closed forms and against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import trimesh

from backlot.rendering import (
    PALETTE,
    SEEN_HEIGHT,
    SEEN_REACH,
    Camera,
    mesh_colors,
    object_color,
    render,
    render_scene,
    view_scale,
)

GREY = (0.5, 0.5, 0.5)
WIDE = 90.0  # degrees: half a picture's side is as wide as it is far away


def square(depth: float, half: float = 0.5, centre: tuple[float, float] = (0.0, 0.0)) -> trimesh.Trimesh:
    """Across the line of sight of `forward()`."""
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half + centre
    vertices = np.column_stack([corners[:, 0], np.full(4, depth), corners[:, 1]])
    return trimesh.Trimesh(vertices, [[0, 1, 2], [0, 2, 3]], process=False)


def forward(fov: float = WIDE) -> Camera:
    """At the origin, looks along +y; x is right, z up."""
    return Camera.look_at((0, 0, 0), (0, 1, 0), fov)


def box(extents: tuple[float, ...], centre: tuple[float, ...]) -> trimesh.Trimesh:
    mesh = trimesh.creation.box(extents)
    mesh.apply_translation(centre)
    return mesh


def brute_force(camera: Camera, corners: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Depth and number of the nearest of all triangles on each ray (Moeller and Trumbore)."""
    eye, rays = camera.scene_from_camera[:3, 3], camera.rays(size).reshape(-1, 1, 3)
    one, other = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    p = np.cross(rays, other)
    scale = (one * p).sum(-1)
    s = eye - corners[:, 0]
    u = (s * p).sum(-1) / scale
    q = np.cross(s, one)
    v = (rays * q).sum(-1) / scale
    depth = (other * q).sum(-1) / scale
    depth = np.where((u >= 0) & (v >= 0) & (u + v <= 1) & (depth > 1e-3), depth, np.inf)
    nearest = depth.argmin(1)
    depth = depth.min(1)
    return depth.reshape(size, size), np.where(np.isfinite(depth), nearest, -1).reshape(size, size)


def test_a_square_covers_the_pixels_it_should():
    picture = render([square(2.0)], [GREY], forward(), 32, floor=False)
    expected = np.full((32, 32), -1)
    expected[12:20, 12:20] = 0  # a quarter of the picture's side, which is 4 m at this depth
    np.testing.assert_array_equal(picture.ids, expected)
    np.testing.assert_allclose(picture.depth[12:20, 12:20], 2.0)
    assert np.isinf(picture.depth[expected < 0]).all()
    assert np.isnan(picture.pointmap[expected < 0]).all()
    assert picture.masks(2).sum(axis=(1, 2)).tolist() == [64, 0]


def test_right_is_right_and_up_is_up():
    picture = render([square(2.0, 0.2, (0.6, 1.0))], [GREY], forward(), 64, floor=False)
    row, column = np.argwhere(picture.ids == 0).mean(axis=0)
    assert (column, row) == pytest.approx((32 + 64 * 0.6 / 4 - 0.5, 32 - 64 * 1.0 / 4 - 0.5), abs=0.5)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_nearer_hides_the_farther(order):
    meshes = [square(2.0, 0.5), square(3.0, 1.5)]
    picture = render([meshes[i] for i in order], [GREY, GREY], forward(), 32, floor=False)
    near, far = order.index(0), order.index(1)
    assert picture.ids[16, 16] == near
    assert picture.ids[16, 10] == far
    assert (picture.ids == near).sum() == 64
    assert (picture.ids == far).sum() == 16 * 16 - 64


def test_against_brute_force_also_behind_the_camera():
    rng = np.random.default_rng(0)
    camera = Camera.look_at((0.3, -1.0, 0.4), (0, 0.5, 0), 70)
    seen = []
    for _ in range(12):
        corners = rng.uniform(-1, 1, (12, 1, 3)) * 2 + 1.5 * rng.normal(size=(12, 3, 3))
        meshes = [trimesh.Trimesh(triangle, [[0, 1, 2]], process=False) for triangle in corners]
        picture = render(meshes, [GREY] * 12, camera, 32, floor=False)
        depth, ids = brute_force(camera, corners, 32)
        np.testing.assert_array_equal(picture.ids, ids)
        np.testing.assert_allclose(picture.depth, depth, rtol=1e-9)
        behind = ((corners - camera.scene_from_camera[:3, 3]) @ camera.scene_from_camera[:3, 2] < 0).sum(axis=1)
        seen += behind[np.unique(ids[ids >= 0])].tolist()
    assert min(seen.count(corners_behind) for corners_behind in range(3)) > 5


def test_what_lies_behind_the_camera_is_not_seen():
    assert (render([square(-2.0)], [GREY], forward(), 16, floor=False).ids == -1).all()


def test_no_pixel_falls_between_triangles():
    """Vertices at the centres of pixels: edges run exactly through many others."""
    size, side = 127, 14
    lattice = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), axis=-1).reshape(-1, 2)
    places = 10 * lattice - 2 + np.random.default_rng(0).integers(-2, 3, lattice.shape)
    x, z = ((places + 0.5) / size * 2 - 1).T
    quads = (side * lattice[:, 0] + lattice[:, 1])[(lattice < side - 1).all(axis=1), None] + [0, side, side + 1, 1]
    faces = np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])
    plane = trimesh.Trimesh(np.column_stack([x, np.ones_like(x), z]), faces, process=False)
    assert (render([plane], [GREY], forward(), size, floor=False).ids == 0).all()


def test_points_of_a_plane_and_of_a_sphere():
    camera = Camera.look_at((0.4, -3.0, 1.5), (0, 0, 0.3), 40)
    corners = np.array([[-1, 0, 0.2], [1, 0.3, 0.1], [0.8, 1, 0.9], [-1.2, 0.7, 1.0]])
    normal = np.cross(corners[1] - corners[0], corners[2] - corners[0])
    corners[3] -= normal * ((corners[3] - corners[0]) @ normal) / (normal @ normal)
    plane = trimesh.Trimesh(corners, [[0, 1, 2], [0, 2, 3]], process=False)
    sphere = trimesh.creation.icosphere(5, 0.3)
    picture = render([plane, sphere], [GREY, GREY], camera, 64)
    on_plane, on_sphere = (picture.pointmap[picture.ids == number] for number in (0, 1))
    assert min(len(on_plane), len(on_sphere)) > 100
    np.testing.assert_allclose((on_plane - corners[0]) @ normal, 0, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(on_sphere, axis=1), 0.3, atol=1e-3)  # the facets' sagitta


def test_points_project_back_to_their_pixels():
    pose = Camera.look_at((1.0, -2.0, 1.0), (0, 0, 0), 50).scene_from_camera
    camera = Camera(pose, np.array([[1.1, 0.05, 0.45], [0, 0.9, 0.6], [0, 0, 1]]))
    picture = render([trimesh.creation.icosphere(3, 0.5)], [GREY], camera, 40)
    row, column = np.nonzero(picture.ids == 0)
    points = picture.pointmap[row, column]
    in_camera = (points - pose[:3, 3]) @ pose[:3, :3]
    seen = in_camera @ camera.intrinsics.T
    np.testing.assert_allclose(seen[:, 0] / seen[:, 2], (column + 0.5) / 40)
    np.testing.assert_allclose(seen[:, 1] / seen[:, 2], (row + 0.5) / 40)
    np.testing.assert_allclose(in_camera[:, 2], picture.depth[row, column])


def test_the_floor_hides_what_is_below_it():
    camera = Camera.floor_view()
    sunken = box((0.5, 0.5, 0.5), (0, 0, 0))
    picture = render([sunken], [GREY], camera, 64)
    assert picture.pointmap[picture.ids == 0][:, 2].min() >= 0
    bare = render([sunken], [GREY], camera, 64, floor=False)
    assert bare.pointmap[bare.ids == 0][:, 2].min() < -0.1
    floor = picture.ids == -1
    eye = camera.scene_from_camera[:3, 3]
    points = eye + picture.depth[..., None] * camera.rays(64)
    np.testing.assert_allclose(points[floor][:, 2], 0, atol=1e-12)


def test_the_floor_view_aims_at_the_origin_and_sees_all_it_should():
    camera = Camera.floor_view()
    pose = camera.scene_from_camera
    np.testing.assert_allclose(pose[:3, :3].T @ pose[:3, :3], np.eye(3), atol=1e-12)
    assert np.linalg.det(pose[:3, :3]) == pytest.approx(1)
    assert pose[:3, 0] == pytest.approx([1, 0, 0])  # so +y is the viewing direction on the floor
    middle = camera.project(np.zeros(3), 100)
    assert middle[:2] / middle[2] == pytest.approx([49.5, 49.5])
    reach = (-SEEN_REACH, SEEN_REACH)
    corners = np.array([[x, y, z] for x in reach for y in reach for z in (0, SEEN_HEIGHT)])
    for view in (camera, Camera.top_view()):
        seen = view.project(corners, 100)
        assert (np.abs(seen[:, :2] / seen[:, 2:] - 49.5) <= 50).all()
    far = Camera.floor_view(3.0)
    np.testing.assert_allclose(far.project(3 * corners, 100), 3 * camera.project(corners, 100))


def test_supersampling_smooths_the_colours_and_nothing_else():
    meshes = [trimesh.creation.icosphere(3, 0.4)]
    rough, smooth = (render(meshes, [(0, 0, 0)], Camera.floor_view(), 32, s) for s in (1, 4))
    for name in ("depth", "ids", "pointmap"):
        np.testing.assert_array_equal(getattr(rough, name), getattr(smooth, name))
    between = [((picture.rgb > 0.1) & (picture.rgb < 0.85)).sum() for picture in (rough, smooth)]
    assert between[0] == 0  # black or floor
    assert between[1] > 30
    assert smooth.rgb.max() <= 1


def test_shadows_fall_away_from_the_lamp_and_leave_the_open_floor_alone():
    block = [box((0.4, 0.4, 0.8), (0, 0, 0.4))]
    camera = Camera.top_view()
    plain, shaded = (render(block, [GREY], camera, 96, shadows=s).rgb.mean(axis=2) for s in (False, True))
    lost = plain - shaded  # the lamp is at the left, on the viewer's side
    right, left = lost[44:52, 60:66].mean(), lost[44:52, 30:36].mean()
    assert right > 0.05
    assert right > 2 * left
    np.testing.assert_allclose(lost[:4], 0, atol=0.01)


def test_curved_surfaces_are_shaded_smoothly_and_edges_are_kept():
    ball, cube = trimesh.creation.icosphere(2, 0.5), box((0.8, 0.8, 0.8), (0, 0, 0.4))
    camera = Camera.floor_view()

    def steps(mesh: trimesh.Trimesh, shadows: bool) -> np.ndarray:
        picture = render([mesh], [GREY], camera, 200, floor=False, shadows=shadows)
        row, column = np.argwhere(picture.ids == 0).mean(axis=0).astype(int)
        return np.abs(np.diff(picture.rgb[row, column - 15 : column + 15, 0]))

    assert steps(ball, False).max() > 2.5 * steps(ball, True).max()
    top = render([cube], [GREY], camera, 200, floor=False, shadows=True)
    above, front = (top.rgb[np.isclose(top.pointmap[..., axis], at), 0] for axis, at in ((2, 0.8), (1, -0.4)))
    assert above.min() - front.max() > 0.05


def test_colours_of_vertices_are_interpolated():
    mesh = square(2.0, 2.0)
    colors = np.array([[0, 0, 0], [1, 1, 1], [1, 1, 1], [0, 0, 0]], float)
    ramp = render([mesh], [colors], forward(), 32, floor=False, shadows=True).rgb[16, :, 0]
    assert (np.diff(ramp) > 0).all()
    with pytest.raises(ValueError, match=r"color 0 has the shape \(2, 3\), it must be \(3,\) or \(4, 3\)"):
        render([mesh], [colors[:2]], forward(), 8)


@pytest.mark.parametrize("shadows", [False, True])
def test_an_empty_scene(shadows):
    picture = render([], [], Camera.floor_view(), 16, shadows=shadows)
    assert (picture.ids == -1).all()
    assert np.isfinite(picture.depth).all()
    assert np.isfinite(picture.rgb).all()
    assert np.isnan(picture.pointmap).all()


def test_pictures_of_scenes():
    scene = trimesh.Scene()
    red = box((0.4, 0.4, 0.4), (0.8, 0.8, 0.2))
    red.visual.face_colors = (255, 0, 0, 255)
    scene.add_geometry(red, node_name="red")
    scene.add_geometry(trimesh.creation.box((0.4, 0.4, 0.4)), node_name="own", transform=np.eye(4))
    assert mesh_colors(red)[0] == pytest.approx([1, 0, 0])
    assert mesh_colors(trimesh.creation.box()) is None
    pictures = {view: np.asarray(render_scene(scene, 96, view), float) for view in ("front", "top")}
    for view, pixels in pictures.items():
        assert pixels.shape == (96, 96, 3)
        row, column = np.argwhere(pixels[..., 0] - pixels[..., 1] > 100).mean(axis=0)
        assert column > 60, view  # +x is right, +y is up
        assert row < 40, view
    with pytest.raises(ValueError, match="`view` must be front or top, not side"):
        render_scene(scene, view="side")
    assert render_scene(trimesh.Scene(), 16).size == (16, 16)


def test_larger_scenes_are_seen_from_further_away():
    assert view_scale([box((1, 1, 1), (0, 0, 0.5))]) == 1
    assert view_scale([]) == 1
    assert view_scale([box((1, 1, 1), (4.7, 0, 0.5))]) == pytest.approx(5.2 / SEEN_REACH)
    assert view_scale([box((1, 1, 3.6), (0, 0, 1.8))]) == pytest.approx(3)


def test_ten_distinct_colours():
    colors = np.array([object_color(number) for number in range(10)])
    assert len(PALETTE) == 10
    distance = np.linalg.norm(colors[:, None] - colors, axis=-1) + 10 * np.eye(10)
    assert distance.min() > 0.15
    assert object_color(13) == object_color(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Camera.look_at((0, 0, 1), (0, 0, 1), 40), "`eye` and `target` must differ"),
        (lambda: Camera.look_at((0, 0, 1), (0, 0, 0), 180), "`fov_degrees` must lie between 0 and 180, got 180"),
        (lambda: render([], [], Camera.floor_view(), 0), "`size` and `supersample` must be at least 1, got 0 and 1"),
        (lambda: render([square(1)], [], Camera.floor_view(), 8), "shorter"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
