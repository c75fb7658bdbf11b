"""Near and far templates by viewing direction, with symmetries, and what is random in them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import trimesh
from scipy.spatial.transform import Rotation

from backlot.cameras import make_pose, rotation_angle, rotation_z, viewing_direction
from data_prep.bop.item_settings import SelectionSettings
from data_prep.bop.selection import NEGATIVE, POSITIVE, PoseTable, select_templates
from data_prep.bop.symmetries import symmetry_set

IDENTITY = torch.eye(4, dtype=torch.float64)[None]
LATHE = torch.from_numpy(symmetry_set({"symmetries_continuous": [{"axis": [0, 0, 1], "offset": [0, 0, 0]}]}))
HALF_TURN = torch.from_numpy(symmetry_set({"symmetries_discrete": [np.diag([-1.0, -1, 1, 1]).reshape(-1).tolist()]}))


def random_poses(count: int, seed: int) -> torch.Tensor:
    """Any rotation, and places in all of a camera's view."""
    rotations = torch.from_numpy(Rotation.random(count, random_state=seed).as_matrix())
    places = torch.from_numpy(np.random.default_rng(seed).uniform([-0.3, -0.3, 0.5], [0.3, 0.3, 1.5], (count, 3)))
    return make_pose(rotations, places)


def looking_from(direction: torch.Tensor, roll: float = 0.0) -> torch.Tensor:
    """A pose (4, 4) whose camera is at a unit vector of the object's frame, half a metre away."""
    forward = -direction
    right = torch.linalg.cross(forward, torch.tensor([0.123, 0.456, 0.789], dtype=torch.float64))
    right = right / right.norm()
    rotation = torch.stack([right, torch.linalg.cross(forward, right), forward])
    rotation = rotation_z(torch.tensor(roll, dtype=torch.float64)) @ rotation
    return make_pose(rotation, torch.tensor([0, 0, 0.5], dtype=torch.float64))


def template_table(subdivisions: int = 2) -> PoseTable:
    """Cameras at the vertices of an icosphere, each with a turn of its own."""
    directions = torch.from_numpy(np.array(trimesh.creation.icosphere(subdivisions).vertices))
    poses = [looking_from(each / each.norm(), roll=2.4 * number) for number, each in enumerate(directions)]
    return PoseTable.of(torch.stack(poses))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def view_angles(poses: torch.Tensor, table: PoseTable, indices: torch.Tensor) -> torch.Tensor:
    """Degrees between the viewing directions of queries (B) and of their templates (B, S)."""
    cosines = (viewing_direction(poses)[:, None] * table.directions[indices]).sum(-1)
    return cosines.clamp(-1, 1).acos().rad2deg()


def test_positives_are_near_and_negatives_far():
    table, poses = template_table(), random_poses(500, 1)
    chosen = select_templates(poses, table, IDENTITY, SelectionSettings(), generator())
    angles = view_angles(poses, table, chosen.indices)
    assert torch.equal(chosen.types, torch.tensor([[POSITIVE] * 4 + [NEGATIVE] * 2]).expand(500, 6))
    assert angles[:, :4].mean() <= 13
    assert angles[:, :4].max() <= 22
    assert angles[:, 4:].min() >= 90 - 1e-3
    assert not (chosen.indices[:, 4:] == chosen.nearest[:, None]).any()
    assert torch.equal(chosen.indices[:, 0], chosen.nearest)
    assert torch.equal(chosen.poses, poses)
    assert all(len(set(row.tolist())) == 6 for row in chosen.indices)


def test_whole_rotations_call_near_views_far():
    """Why `so3` is no default: the templates' own turns decide what is near."""
    table, poses = template_table(), random_poses(200, 2)
    chosen = select_templates(poses, table, IDENTITY, SelectionSettings(selection_metric="so3"), generator())
    turns = rotation_angle(poses[:, None, :3, :3], table.rotations[chosen.indices]).rad2deg()
    assert turns[:, 4:].min() >= 90 - 1e-3
    everything = rotation_angle(poses[:, None, :3, :3], table.rotations[None]).rad2deg()
    torch.testing.assert_close(turns[:, :4], everything.sort(dim=1).values[:, :4])
    assert view_angles(poses, table, chosen.indices)[:, :4].mean() > 24  # twice what `view` gives


def test_reference_direction_is_that_of_the_nearest_template():
    table, poses = template_table(), random_poses(300, 3)
    chosen = select_templates(poses, table, IDENTITY, SelectionSettings(), generator())
    truth = -(poses[:, :3, :3].mT @ poses[:, :3, 3:]).squeeze(-1)
    truth = truth / truth.norm(dim=-1, keepdim=True)
    angles = (truth * chosen.d_ref).sum(-1).clamp(-1, 1).acos().rad2deg()
    assert angles.max() <= 10.8  # the covering radius of 162 views
    assert torch.equal(chosen.d_ref, table.directions[chosen.nearest])
    assert torch.equal(chosen.reference_rotation, table.rotations[chosen.nearest])
    torch.testing.assert_close(
        viewing_direction(make_pose(chosen.reference_rotation, poses.new_tensor([[0, 0, 0.5]]).expand(300, 3))),
        chosen.d_ref,
    )


def test_a_turn_of_the_picture_changes_nothing():
    table, poses = template_table(), random_poses(100, 4)
    turned = poses.clone()
    turn = rotation_z(torch.linspace(-3, 3, 100, dtype=torch.float64))
    turned[:, :3] = turn @ poses[:, :3]
    first, second = (
        select_templates(each, table, IDENTITY, SelectionSettings(), generator()) for each in (poses, turned)
    )
    assert torch.equal(first.indices, second.indices)
    assert torch.equal(first.d_ref, second.d_ref)


def test_random_positives_stay_in_range_and_vary():
    settings = SelectionSettings(positive_sampling_mode="random_within_range", positive_sampling_deg_range=30)
    table = template_table()
    poses = random_poses(1, 5).expand(400, 4, 4)
    chosen = select_templates(poses, table, IDENTITY, settings, generator())
    assert view_angles(poses, table, chosen.indices)[:, :4].max() <= 30 + 1e-3
    everything = view_angles(poses[:1], table, torch.arange(162)[None])[0]
    counts = torch.bincount(chosen.indices[:, :4].flatten(), minlength=162)
    within = everything <= 30
    assert (counts[within] > 0).all()
    expected = 1600 / within.sum()
    assert (counts[within] - expected).abs().max() < 5 * math.sqrt(expected)


def test_where_the_range_is_empty_the_nearest_follow():
    settings = SelectionSettings(positive_sampling_mode="random_within_range", positive_sampling_deg_range=1)
    table, poses = template_table(), random_poses(50, 6)
    chosen = select_templates(poses, table, IDENTITY, settings, generator())
    nearest = select_templates(poses, table, IDENTITY, SelectionSettings(), generator())
    assert torch.equal(chosen.indices[:, :4], nearest.indices[:, :4])


def test_reference_direction_of_a_random_positive():
    table, poses = template_table(), random_poses(1, 7).expand(400, 4, 4)
    chosen = select_templates(poses, table, IDENTITY, SelectionSettings(d_ref_random_ratio=0.5), generator())
    places = (chosen.d_ref[:, None] == table.directions[chosen.indices[:, :4]]).all(-1)
    assert (places.sum(1) == 1).all()
    share = places.double().mean(0)
    torch.testing.assert_close(share, torch.tensor([0.625, 0.125, 0.125, 0.125]).double(), atol=0.08, rtol=0)
    torch.testing.assert_close(chosen.reference_rotation[:, 2], -chosen.d_ref)


@pytest.mark.parametrize("symmetries", [HALF_TURN, LATHE], ids=["half turn", "lathe"])
def test_symmetric_objects(symmetries):
    """Negatives are far from every equal pose, and the pose that is kept is nearest to its template."""
    table, poses = template_table(), random_poses(100, 8)
    chosen = select_templates(poses, table, symmetries, SelectionSettings(), generator())
    equal_poses = poses[:, None] @ symmetries
    matches = (equal_poses - chosen.poses[:, None]).abs().amax((2, 3)) < 1e-12
    assert matches.any(1).all()
    is_negative = chosen.types == NEGATIVE
    own = view_angles(chosen.poses, table, chosen.nearest[:, None])[:, 0]
    best = torch.stack([view_angles(each, table, torch.arange(162).expand(100, 162)) for each in equal_poses.unbind(1)])
    assert (own - best.amin((0, 2))).max() <= 5 + 1e-6
    far = best.amin(0) >= 90 - 1e-3
    assert far.gather(1, chosen.indices)[is_negative].all()
    assert torch.equal(is_negative.sum(1), far.sum(1).clamp(max=2))
    assert view_angles(chosen.poses, table, chosen.indices)[~is_negative].mean() < 14


def test_bodies_of_revolution_get_positives_where_little_is_far():
    """From the side every view is near, but for the one along the axis: a further positive takes the other place."""
    table = template_table()
    side = looking_from(torch.tensor([1.0, 0, 0.05], dtype=torch.float64) / math.hypot(1, 0.05))[None]
    chosen = select_templates(side, table, LATHE, SelectionSettings(), generator())
    assert chosen.types.tolist() == [[POSITIVE] * 4 + [NEGATIVE, POSITIVE]]
    assert table.directions[chosen.indices[0, 4], 2] < -0.999
    nearest = view_angles(chosen.poses, table, torch.arange(162)[None])[0].argsort()
    assert chosen.indices[chosen.types == POSITIVE].tolist() == nearest[:5].tolist()


def test_along_an_axis_of_symmetry_the_picture_is_not_turned():
    """All equal poses see the object from above: the one that is kept has its template's turn."""
    table = template_table()
    top = torch.tensor([0.02, 0.01, 1.0], dtype=torch.float64)
    for roll in (0.3, 1.7, -2.9):
        chosen = select_templates(
            looking_from(top / top.norm(), roll)[None], table, LATHE, SelectionSettings(), generator()
        )
        assert rotation_angle(chosen.poses[0, :3, :3], table.rotations[chosen.nearest[0]]).rad2deg() < 12


def test_a_batch_is_its_queries_one_by_one():
    """The draws apart: with nothing random in it, each row is what the query alone would get."""
    table, poses = template_table(), random_poses(20, 9)
    settings = SelectionSettings(num_negative_templates=0)
    together = select_templates(poses, table, HALF_TURN, settings, generator())
    for number, pose in enumerate(poses):
        alone = select_templates(pose[None], table, HALF_TURN, settings, generator())
        assert torch.equal(alone.indices[0], together.indices[number])
        assert torch.equal(alone.poses[0], together.poses[number])


def test_the_generator_decides():
    table, poses = template_table(), random_poses(20, 10)
    first, again, other = (
        select_templates(poses, table, IDENTITY, SelectionSettings(), generator(seed)).indices for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert torch.equal(first[:, :4], other[:, :4])
    assert not torch.equal(first[:, 4:], other[:, 4:])


def test_small_sets_have_no_template_twice():
    """Twelve views, of which as many are wanted: each comes once, and t* is no negative whatever the angle."""
    table, poses = template_table(0), random_poses(30, 11)
    settings = SelectionSettings(num_positive_templates=8, num_negative_templates=4, min_negative_angle_deg=1)
    chosen = select_templates(poses, table, IDENTITY, settings, generator())
    assert (chosen.indices.sort(1).values == torch.arange(12)).all()
    assert not ((chosen.indices == chosen.nearest[:, None]) & (chosen.types == NEGATIVE)).any()


def test_the_nearest_template_is_no_negative_even_where_it_is_no_positive():
    """Positives from anywhere, negatives from one degree on."""
    anywhere = {"positive_sampling_mode": "random_within_range", "positive_sampling_deg_range": 180.0}
    settings = SelectionSettings(**anywhere, num_negative_templates=6, min_negative_angle_deg=1)
    table, poses = template_table(0), random_poses(100, 12)
    chosen = select_templates(poses, table, IDENTITY, settings, generator())
    is_nearest = chosen.indices == chosen.nearest[:, None]
    assert not is_nearest.any(1).all()
    assert not (is_nearest & (chosen.types == NEGATIVE)).any()


def test_more_than_there_are():
    with pytest.raises(ValueError, match="13 templates are to be chosen of 12"):
        select_templates(
            random_poses(1, 0), template_table(0), IDENTITY, SelectionSettings(num_positive_templates=11), generator()
        )
