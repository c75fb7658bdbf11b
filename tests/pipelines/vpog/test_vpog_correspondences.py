"""Correspondences: the right way round, exact patch centres, what is kept."""

from __future__ import annotations

import pytest
import torch
from vpog_pose_samples import CAMERA, HALF, PATCH, SIZE, cuboid_depth, make_scene

from backlot.cameras import project, rotation_angle, transform
from pipelines.vpog.correspondences import (
    covered_patches,
    gather_correspondences,
    object_points,
    patch_centers,
    to_patches,
)
from pipelines.vpog.solve import solve_pose


def gather(scene, **changed):
    names = ("logits", "buddies", "flow", "scale")
    values = {name: getattr(scene, name) for name in names} | {"depth": scene.template_depth, "points": scene.points}
    return gather_correspondences(**values | {"object_patches": scene.object_patches} | changed)


def test_patch_centres_are_where_pixel_centres_are_integers():
    centers = patch_centers(32, 48, 16)
    assert centers[0].tolist() == [7.5, 7.5]
    assert centers[1].tolist() == [23.5, 7.5]
    assert centers[3].tolist() == [7.5, 23.5]


def test_patches_are_row_major_and_hold_their_pixels():
    pixels = torch.arange(6 * 4).reshape(1, 6, 4)
    patches = to_patches(pixels, 2)
    assert patches.shape == (1, 6, 2, 2)
    assert torch.equal(patches[0, 3], pixels[0, 2:4, 2:4])


def test_points_behind_pixels_lie_on_the_cuboid_and_project_back():
    scene = make_scene()
    points = scene.points[0][scene.template_depth[0] > 0]
    assert ((points.abs() / HALF).amax(dim=1) - 1).abs().max() < 1e-9
    grid = (scene.template_depth[0] > 0).nonzero().flip(1).double()
    assert (project(CAMERA, transform(scene.template_poses[0], points)) - grid).abs().max() < 1e-9


def test_each_point_is_seen_at_its_place_under_the_true_pose():
    scene = make_scene()
    found = gather(scene)
    assert len(found) > 300
    seen = project(CAMERA, transform(scene.query_pose, found.points))
    assert (seen - found.places).abs().max() < 1e-9
    assert set(found.templates.tolist()) == {0, 1}


def backwards(scene):
    """The fault: the query's pixel stands still and the template's moves."""
    template, patch = ((scene.buddies < 64) & scene.object_patches).nonzero(as_tuple=True)
    buddy = scene.buddies[template, patch]
    v, u = torch.meshgrid(torch.arange(PATCH), torch.arange(PATCH), indexing="ij")
    offset = torch.stack([u, v], dim=-1).double() - (PATCH - 1) / 2
    centers = patch_centers(SIZE, SIZE, PATCH)
    places = centers[patch][:, None, None] + offset
    moved = centers[buddy][:, None, None] + PATCH * scene.flow[template, patch]
    column, row = (moved[..., axis].round().long().clamp(0, SIZE - 1) for axis in (0, 1))
    at = template[:, None, None].expand(row.shape), row, column
    has_surface = scene.template_depth[at] > 0
    return scene.points[at][has_surface], places[has_surface]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_perfect_labels_give_the_pose_back_and_the_wrong_direction_does_not(seed):
    scene = make_scene(seed)
    found = gather(scene)
    right = solve_pose(found, CAMERA, scene.template_poses[0], threshold=2.5)
    error = rotation_angle(right.camera_from_object[:3, :3], scene.query_pose[:3, :3]).rad2deg()
    assert error < 0.01
    assert right.inliers.all()
    assert (right.camera_from_object[:3, 3] - scene.query_pose[:3, 3]).norm() < 1e-5

    points, places = backwards(scene)
    wrong = type(found)(points, places, torch.ones(len(points)), torch.zeros(len(points)), torch.zeros(len(points)))
    wrong = solve_pose(wrong, CAMERA, scene.template_poses[0], threshold=2.5)
    assert wrong is None or rotation_angle(wrong.camera_from_object[:3, :3], scene.query_pose[:3, :3]).rad2deg() > 3


def test_unseen_and_background_patches_and_empty_pixels_give_nothing():
    scene = make_scene()
    assert len(gather(scene, buddies=torch.full_like(scene.buddies, 64))) == 0
    assert len(gather(scene, object_patches=torch.zeros_like(scene.object_patches))) == 0
    assert len(gather(scene, depth=torch.zeros_like(scene.template_depth))) == 0
    one = torch.zeros_like(scene.object_patches)
    one[scene.buddies[0].ne(64).nonzero()[0, 0]] = True
    found = gather(scene, object_patches=one)
    assert 0 < len(found) <= 2 * PATCH**2
    assert set(found.patches.tolist()) == set(one.nonzero()[:, 0].tolist())


def test_the_heaviest_are_kept_in_their_own_order():
    scene = make_scene()
    scale = 0.05 + torch.rand(scene.scale.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    everything = gather(scene, scale=scale)
    some = everything.heaviest(100)
    assert everything.heaviest(len(everything)) is everything
    assert len(some) == 100
    order = [(everything.weights == weight).nonzero()[0, 0].item() for weight in some.weights]
    assert order == sorted(order)
    assert some.weights.tolist() != sorted(some.weights.tolist(), reverse=True)
    assert some.weights.min() >= everything.weights.sort(descending=True).values[100]


def test_weight_is_probability_over_scale():
    scene = make_scene()
    base = gather(scene)
    assert torch.allclose(base.weights, torch.tensor(1 / 0.05, dtype=torch.float64), rtol=1e-3)
    assert torch.allclose(gather(scene, scale=2 * scene.scale).weights, base.weights / 2)
    assert (gather(scene, logits=scene.logits / 4).weights < 0.5 * base.weights).all()


def test_classes_alone_place_the_buddys_centre_at_the_patchs():
    scene = make_scene()
    found = gather(scene, flow=torch.zeros(*scene.buddies.shape, 1, 1, 2), scale=None)
    assert (found.places == patch_centers(SIZE, SIZE, PATCH)[found.patches]).all()
    seen = project(CAMERA, transform(scene.query_pose, found.points))
    assert (seen - found.places).norm(dim=1).mean() < PATCH
    per_patch = scene.buddies.lt(64) & scene.object_patches
    assert 0.7 * per_patch.sum() < len(found) <= per_patch.sum()


def test_coverage_follows_the_labels_and_a_speck_is_its_best_patch():
    mask = torch.zeros(2, 16, 16, dtype=torch.bool)
    mask[0, :8, :2] = True  # a quarter of a patch
    mask[0, 8:, :1] = True  # an eighth
    mask[1, 3, 9] = True
    covered = covered_patches(mask, 8)
    assert covered.tolist() == [[True, False, False, False], [False, True, False, False]]
    assert not covered_patches(torch.zeros(1, 16, 16, dtype=torch.bool), 8).any()


def test_units_do_not_matter():
    scene = make_scene()
    poses = scene.template_poses.clone()
    poses[:, :3, 3] *= 1000
    points = object_points(1000 * scene.template_depth, CAMERA, poses)
    here = gather(scene, points=points, depth=1000 * scene.template_depth)
    solution = solve_pose(here, CAMERA, poses[0], threshold=2.5)
    expected = solve_pose(gather(scene), CAMERA, scene.template_poses[0], threshold=2.5).camera_from_object
    assert rotation_angle(solution.camera_from_object[:3, :3], expected[:3, :3]).rad2deg() < 1e-4
    assert torch.allclose(solution.camera_from_object[:3, 3], 1000 * expected[:3, 3], rtol=1e-6)
    assert (cuboid_depth(scene.query_pose, CAMERA) > 0).any()
