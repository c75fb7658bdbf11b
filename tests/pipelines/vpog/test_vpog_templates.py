"""Sets of templates: what is rendered, stored, read and turned."""

from __future__ import annotations

import numpy as np
import pytest
import trimesh

from backlot.mesh_views import render_views
from pipelines.vpog.templates import TemplateSet, object_diameter, render_template_set, template_path


def brick() -> trimesh.Trimesh:
    """Long, away from the origin, in colours."""
    mesh = trimesh.creation.box((0.12, 0.05, 0.03)).subdivide().subdivide()
    mesh.visual.vertex_colors = np.rint((mesh.vertices / 0.12 + 0.5) * 255).astype(np.uint8)
    return mesh.apply_translation((0.03, -0.02, 0.01))


@pytest.fixture(scope="module")
def templates() -> TemplateSet:
    return render_template_set(brick(), 7, views=42, size=64, backend="zbuffer", mesh_hash="abc")


def assert_same(one: TemplateSet, other: TemplateSet, depth: float) -> None:
    np.testing.assert_array_equal(one.rgba, other.rgba)
    np.testing.assert_array_equal(one.masks, other.depth > 0)
    np.testing.assert_allclose(one.depth, other.depth, atol=depth)
    np.testing.assert_allclose(one.camera_from_object, other.camera_from_object, atol=1e-12)
    np.testing.assert_array_equal(one.K, other.K)
    assert (one.object_id, one.diameter, one.mesh_hash) == (other.object_id, other.diameter, other.mesh_hash)


def test_the_whole_object_is_seen_from_all_sides(templates):
    assert templates.rgba.shape == (42, 64, 64, 4)
    assert len(templates) == 42
    alpha = templates.rgba[..., 3]
    for edge in (alpha[:, 0], alpha[:, -1], alpha[:, :, 0], alpha[:, :, -1]):
        assert not edge.any()
    assert set(np.unique(alpha)) == {0, 255}
    np.testing.assert_array_equal(templates.masks, templates.depth > 0)
    assert (templates.rgba[~templates.masks] == 0).all()
    assert templates.masks.sum(axis=(1, 2)).min() > 100
    assert templates.diameter == pytest.approx(np.linalg.norm((0.12, 0.05, 0.03)))
    # points of the depth picture lie on the brick
    rows, columns = np.nonzero(templates.masks[5])
    pixels = np.stack([columns, rows, np.ones(len(rows))], axis=1) @ np.linalg.inv(templates.K).T
    points = pixels * templates.depth[5, rows, columns, None]
    pose = templates.camera_from_object[5]
    local = (points - pose[:3, 3]) @ pose[:3, :3] - (0.03, -0.02, 0.01)
    np.testing.assert_allclose((np.abs(local) / (0.06, 0.025, 0.015)).max(axis=1), 1, atol=1e-4)


def test_a_file_gives_back_what_was_stored(templates, tmp_path):
    path = template_path(tmp_path / "some", 7)
    assert path.name == "000007.safetensors"
    templates.save(path)
    step = templates.depth.max() / 65_535
    assert_same(TemplateSet.load(path), templates, 0.51 * step)
    some = TemplateSet.load(path, [30, 2])
    assert_same(some, templates.subset([30, 2]), 0.51 * step)
    assert len(TemplateSet.load(path, [])) == 0
    with pytest.raises(ValueError, match="there are 42 templates"):
        TemplateSet.load(path, [42])
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_missing_and_damaged_files_are_named(templates, tmp_path):
    path = tmp_path / "000007.safetensors"
    with pytest.raises(FileNotFoundError, match=r"python -m data_prep.bop render_templates --models MODELS --out "):
        TemplateSet.load(path)
    templates.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"000007.safetensors is damaged"):
        TemplateSet.load(path)


def test_the_folder_of_pictures(templates, tmp_path):
    few = templates.subset(range(3))
    few.save_png_folder(tmp_path)
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    pictures = [f"000007/{view:06d}{kind}.png" for view in range(3) for kind in ("", "_depth")]
    assert names == sorted([*pictures, "000007/camera.json", "object_poses/000007.npy"])
    poses = np.load(tmp_path / "object_poses" / "000007.npy")
    np.testing.assert_allclose(poses[:, :3, 3], few.camera_from_object[:, :3, 3] * 1000)
    assert_same(TemplateSet.load_png_folder(tmp_path, 7), few, 0.51e-4)
    (tmp_path / "000007" / "camera.json").unlink()
    with pytest.raises(FileNotFoundError, match="give `K` and `diameter`"):
        TemplateSet.load_png_folder(tmp_path, 7)
    given = TemplateSet.load_png_folder(tmp_path, 7, few.K, 0.5)
    assert (given.diameter, given.mesh_hash) == (0.5, "")


def test_turned_copies_are_what_turned_cameras_see(templates):
    few = templates.subset([0, 9, 20])
    turned = few.rotate_in_plane(8)
    assert len(turned) == 24
    np.testing.assert_array_equal(turned.rgba[:3], few.rgba)
    seen = render_views([brick()], turned.camera_from_object[:, None], turned.K, (64, 64), backend="zbuffer")
    truth = seen.instances >= 0
    np.testing.assert_array_equal(turned.masks, turned.depth > 0)
    assert (turned.masks != truth).sum() < 0.02 * truth.sum()
    both = turned.masks & truth
    apart = np.abs(turned.depth - seen.depth)[both]
    assert np.quantile(apart, 0.9) < 2e-4
    colors = np.abs(turned.rgba[..., :3].astype(int) - seen.rgb)[both]
    assert np.median(colors) <= 2
    assert (turned.rgba[~turned.masks] == 0).all()


def test_a_quarter_turn_moves_pixels_and_no_more(templates):
    turned = templates.subset([4]).rotate_in_plane(4)
    for k in range(4):
        np.testing.assert_array_equal(turned.rgba[k], np.rot90(turned.rgba[0], -k))
        np.testing.assert_allclose(turned.depth[k], np.rot90(turned.depth[0], -k), rtol=1e-6)


def test_only_square_pixels_can_be_turned(templates):
    wide = TemplateSet(
        templates.rgba, templates.depth, templates.camera_from_object, templates.K * [[1.5], [1], [1]], 0.1, 1
    )
    with pytest.raises(ValueError, match="pixels are square"):
        wide.rotate_in_plane(4)
    with pytest.raises(ValueError, match="`copies` must be at least 1"):
        templates.rotate_in_plane(0)


def test_diameters():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(500, 3))
    apart = np.linalg.norm(points[:, None] - points, axis=2).max()
    assert object_diameter(points) == pytest.approx(apart)
    flat = points * (1, 1, 0)
    assert object_diameter(flat) == pytest.approx(np.linalg.norm(flat[:, None] - flat, axis=2).max())


def test_parts_that_do_not_fit_are_refused(templates):
    with pytest.raises(ValueError, match="do not fit"):
        TemplateSet(templates.rgba[:3], templates.depth, templates.camera_from_object, templates.K, 0.1, 1)
    with pytest.raises(ValueError, match="object 3 has no triangles"):
        render_template_set(trimesh.Trimesh(), 3, 42, 32)
