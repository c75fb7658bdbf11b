"""Metrics of scenes in closed form: overlapping boxes, stacks, permuted objects, turned boxes, known solids."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from evaluation.shortcut_scene.metrics import (
    UNIT_POINTS,
    Boxes,
    chamfer,
    collision_rate,
    collisions,
    coverage,
    coverage_ceiling,
    f_score,
    fitted,
    floor_gaps,
    iou_b,
    match,
    matched_distances,
    occupancy_iou,
    pose_errors,
    voxelise,
)


def yaw(degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def tilt(degrees: float) -> np.ndarray:
    return yaw(degrees)[[1, 2, 0]][:, [1, 2, 0]]  # the same about y


def boxes(*rows) -> Boxes:
    """From (centre, size) or (centre, size, rotation)."""
    centre, size, rotation = zip(*((*row, np.eye(3))[:3] for row in rows), strict=True)
    return Boxes(np.array(rotation, float), np.array(size, float), np.array(centre, float))


def random_boxes(count: int, seed: int = 0) -> Boxes:
    """Turned about all axes, some of them into one another."""
    draw = np.random.default_rng(seed)
    rotation = np.linalg.qr(draw.normal(size=(count, 3, 3)))[0]
    rotation *= np.linalg.det(rotation)[:, None, None]
    return Boxes(rotation, draw.uniform(0.3, 1.5, (count, 3)), draw.uniform(-1, 1, (count, 3)))


# --- matching ---------------------------------------------------------------------------------------


def test_the_match_undoes_a_permutation():
    true = np.random.default_rng(0).normal(size=(7, 3))
    order = np.random.default_rng(1).permutation(7)
    rows, columns = match(true[order], true)
    assert columns.tolist() == list(range(7))
    assert (order[rows] == columns).all()
    assert matched_distances(true[order], true).max() == 0
    assert coverage(true[order], true) == 1


def test_the_match_has_the_least_sum_of_distances():
    predicted, true = np.random.default_rng(2).normal(size=(2, 5, 3))
    best = min(
        sum(np.linalg.norm(predicted[i] - true[j]) for i, j in zip(order, range(5), strict=True))
        for order in itertools.permutations(range(5))
    )
    assert matched_distances(predicted, true).sum() == pytest.approx(best)


def test_coverage_counts_true_objects_inside_the_radius():
    true = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]])
    moved = true + np.array([[0.1, 0, 0], [0, 0.149, 0], [0, 0, 0.151], [0, 0.4, 0]])
    assert coverage(moved, true) == 0.5
    assert coverage(moved, true, radius=0.2) == 0.75
    assert coverage(true[:3], true) == 0.75  # what is missing is not found
    assert coverage(np.concatenate([true, true + 9]), true) == 1
    assert coverage(true[[0, 0, 1, 1]], true) == 0.5  # one prediction finds one object
    assert np.isnan(coverage(true, true[:0]))


def test_the_ceiling_of_independent_draws():
    draw = np.random.default_rng(0)
    for count in (1, 2, 5):
        hit = np.mean([len(set(draw.integers(0, count, count))) / count for _ in range(5_000)])
        assert coverage_ceiling(count) == pytest.approx(hit, abs=0.015)
    assert np.mean([coverage_ceiling(n) for n in (2, 3, 4, 5)]) == pytest.approx(0.702, abs=5e-4)


# --- collisions -------------------------------------------------------------------------------------


def test_the_points_of_a_box_are_evenly_spread():
    assert UNIT_POINTS.shape == (200, 3)
    assert np.abs(UNIT_POINTS).max() < 0.5
    assert np.abs(UNIT_POINTS.mean(0)).max() < 0.01
    for axis, cut in itertools.product(range(3), (-0.4, -0.2, 0, 0.2, 0.4)):
        assert (UNIT_POINTS[:, axis] < cut).mean() == pytest.approx(cut + 0.5, abs=0.015)


@pytest.mark.parametrize(("offset", "collide"), [(0.5, True), (0.85, True), (0.95, False), (1.0, False), (1.5, False)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_boxes_collide_from_a_tenth_of_their_volume(offset, collide, axis):
    moved = np.eye(3)[axis] * offset
    both = boxes(((0, 0, 0), (1, 1, 1)), (moved, (1, 1, 1)))
    assert collisions(both).tolist() == [collide]
    turned = yaw(33) @ tilt(20)
    assert collisions(boxes(((0, 0, 0), (1, 1, 1), turned), (turned @ moved, (1, 1, 1), turned))).tolist() == [collide]
    assert collisions(both, overlap=0.4).tolist() == [offset == 0.5]  # half of it is shared there


def test_a_small_box_inside_a_large_one_collides_whichever_comes_first():
    large, small = ((0, 0, 0), (2, 2, 2)), ((0.3, 0.3, 0.3), (0.2, 0.2, 0.2))
    assert collision_rate(boxes(large, small)) == collision_rate(boxes(small, large)) == 1


def test_the_turn_of_a_box_matters():
    corner = ((0.55, 0.55, 0), (0.4, 0.4, 1))
    assert collision_rate(boxes(((0, 0, 0), (1, 1, 1)), corner)) == 1
    assert collision_rate(boxes(((0, 0, 0), (1, 1, 1), yaw(45)), corner)) == 0


def test_a_stack_is_no_collision_but_the_same_footprint_inside_it_is():
    table, on_it = ((0, 0, 0.5), (1, 1, 1)), ((0.2, 0.1, 1.2), (0.4, 0.4, 0.4))
    assert collision_rate(boxes(table, on_it)) == 0
    assert collision_rate(boxes(table, ((0.2, 0.1, 0.9), (0.4, 0.4, 0.4)))) == 1


def test_the_rate_is_a_share_of_pairs():
    row = boxes(*(((x, 0, 0), (1, 1, 1)) for x in (0, 0.5, 5, 10)))
    assert collisions(row).tolist() == [True, False, False, False, False, False]
    assert collision_rate(row) == pytest.approx(1 / 6)
    assert np.isnan(collision_rate(row[:1]))
    assert collisions(random_boxes(6))[[0, -1]].shape == (2,)


def test_collisions_agree_with_points_drawn_at_random():
    many = random_boxes(12)
    draw = np.random.default_rng(1).uniform(-0.5, 0.5, (20_000, 3))
    shares = []
    for i, j in zip(*np.triu_indices(len(many), 1), strict=True):
        there_and_back = []
        for a, b in ((i, j), (j, i)):
            points = draw * many.size[a] @ many.rotation[a].T + many.centre[a]
            local = (points - many.centre[b]) @ many.rotation[b]
            there_and_back.append((np.abs(local) < many.size[b] / 2).all(1).mean())
        shares.append(max(there_and_back))
    clear = np.abs(np.array(shares) - 0.1) > 0.02
    assert clear.sum() > 50
    assert (collisions(many)[clear] == (np.array(shares) > 0.1)[clear]).all()
    assert 0 < collision_rate(many) < 1


# --- support ----------------------------------------------------------------------------------------


def test_an_object_rests_on_the_floor_floats_or_sinks():
    three = boxes(((0, 0, 0.5), (1, 1, 1)), ((3, 0, 0.7), (1, 1, 1)), ((6, 0, 0.4), (1, 1, 1)))
    np.testing.assert_allclose(floor_gaps(three), [0, 0.2, 0.1], atol=1e-12)


def test_a_stacked_object_rests_on_the_one_below():
    table = ((0, 0, 0.5), (2, 1, 1), yaw(30))
    edge = yaw(30) @ (0.95, 0, 0)
    for at, gap in ((edge, 0.05), (edge * 1.2, 1.05)):  # beyond the edge there is only the floor
        scene = boxes(table, ((at[0], at[1], 1.25), (0.4, 0.4, 0.4)))
        np.testing.assert_allclose(floor_gaps(scene), [0, gap], atol=1e-12)
        np.testing.assert_allclose(floor_gaps(scene[[1, 0]]), [gap, 0], atol=1e-12)


def test_the_nearest_support_counts():
    tower = boxes(((0, 0, 0.5), (1, 1, 1)), ((0, 0, 1.5), (0.8, 0.8, 1)), ((0, 0, 2.3), (0.5, 0.5, 0.5)))
    np.testing.assert_allclose(floor_gaps(tower), [0, 0, 0.05], atol=1e-12)


def test_a_tilted_object_touches_with_its_lowest_corner_and_carries_where_it_is():
    half_diagonal = np.sqrt(2) / 2
    scene = boxes(((0, 0, half_diagonal), (1, 1, 1), tilt(45)), ((0.3, 0, 1.25), (0.1, 0.1, 0.1)))
    # over x = 0.3 the roof has fallen by 0.3 from its ridge at twice the half diagonal
    np.testing.assert_allclose(floor_gaps(scene), [0, abs(1.2 - (2 * half_diagonal - 0.3))], atol=1e-12)


def test_floor_gaps_of_one_object_and_of_none():
    assert floor_gaps(boxes(((0, 0, 1), (1, 1, 1)))).tolist() == [0.5]
    assert floor_gaps(random_boxes(3)[:0]).shape == (0,)


# --- poses ------------------------------------------------------------------------------------------


def test_pose_errors_are_the_angle_and_the_log_ratio():
    true = boxes(((0, 0, 0), (1, 2, 4), yaw(10)), ((0, 0, 0), (1, 1, 1), tilt(50)))
    predicted = boxes(((5, 0, 0), (2, 2, 2), yaw(40)), ((0, 0, 0), (1, 1, np.e), tilt(50)))
    angle, ratio = pose_errors(predicted, true)
    np.testing.assert_allclose(angle, [30, 0], atol=1e-6)
    np.testing.assert_allclose(ratio, [2 * np.log(2) / 3, 1 / 3])
    assert pose_errors(true, true)[0].max() < 1e-6
    upside_down = boxes(((0, 0, 0), (1, 2, 4), yaw(10) @ tilt(180)), ((0, 0, 0), (1, 1, 1), tilt(-130)))
    np.testing.assert_allclose(pose_errors(upside_down, true)[0], [180, 180])


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_a_box_turned_by_a_quarter_is_the_same_box(turn):
    true = boxes(((0, 0, 0), (1, 2, 3), tilt(20) @ yaw(10)))
    size = (2, 1, 3) if turn % 180 else (1, 2, 3)
    predicted = boxes(((0, 0, 0), size, tilt(20) @ yaw(15 + turn)))
    angle, ratio = pose_errors(predicted, true, quarter_turns=True)
    np.testing.assert_allclose([angle[0], ratio[0]], [5, 0], atol=1e-6)
    if turn:
        assert pose_errors(predicted, true)[0][0] > 80
        points = UNIT_POINTS * predicted.size[0] @ predicted.rotation[0].T  # it is, but for 5 degrees
        assert (np.abs(points @ true.rotation[0]) < true.size[0] * 0.6).all()


def test_iou_of_axis_aligned_boxes():
    one = boxes(((0, 0, 0), (1, 1, 1)))
    for centre, size, expected in (
        ((0, 0, 0), (1, 1, 1), 1),
        ((0.5, 0, 0), (1, 1, 1), 1 / 3),
        ((0, 0, 0), (2, 1, 1), 1 / 2),
        ((2, 0, 0), (1, 1, 1), 0),
    ):
        np.testing.assert_allclose(iou_b(boxes((centre, size)), one), [expected])
    np.testing.assert_allclose(iou_b(boxes(((0, 0, 0), (1, 1, 1), yaw(45))), one), [0.5])
    assert iou_b(random_boxes(5), random_boxes(5)) == pytest.approx(np.ones(5))


# --- surfaces and volumes ---------------------------------------------------------------------------


def test_chamfer_and_f_score_of_shifted_points():
    points = np.stack(np.meshgrid(*[np.arange(4.0)] * 3), -1).reshape(-1, 3)

    def shifted(by: float) -> np.ndarray:
        return points + np.array([by, 0, 0])

    assert chamfer(points, points) == 0
    assert f_score(points, points) == 1
    assert chamfer(shifted(0.2), points) == pytest.approx(0.4)  # the sum of both ways
    assert f_score(shifted(0.2), points) == 0
    assert f_score(shifted(0.05), points) == 1
    half = points[points[:, 0] < 2]  # all of it right, half of the truth missing: distances 1 and 2
    assert chamfer(half, points) == pytest.approx((1 + 2) / 4)
    assert f_score(half, points) == pytest.approx(2 / 3)
    assert chamfer(half, points) == chamfer(points, half)


def test_occupancy_iou():
    a, b = np.zeros((2, 4, 4, 4), bool)
    assert occupancy_iou(a, b) == 1
    a[:2], b[1:3] = True, True
    assert occupancy_iou(a, b) == pytest.approx(1 / 3)
    assert occupancy_iou(a, a) == 1
    assert occupancy_iou(a, np.zeros_like(a)) == 0


def test_a_voxelised_scene_has_the_volume_and_place_of_its_objects():
    low, high = np.array([-2.0, -2, 0]), np.array([2.0, 2, 4])
    solid = np.ones((2, 8, 8, 8), bool)
    solid[1, :, :, 4:] = False  # the upper half is empty
    scene = boxes(((0.5, 0.5, 0.5), (1, 1, 1)), ((-1, -1, 1), (1, 0.5, 2)))
    grid = voxelise(scene, solid, low, high, 32)
    assert grid.sum() == 8**3 * (1 + 0.5)
    expected = np.zeros_like(grid)
    expected[16:24, 16:24, :8] = True
    expected[4:12, 6:10, :8] = True
    assert (grid == expected).all()
    turned = voxelise(boxes(((0, 0, 2), (2, 1, 1), yaw(90))), solid[:1], low, high, 32)
    assert np.array_equal(np.argwhere(turned).min(0), [12, 8, 12])
    assert np.array_equal(np.argwhere(turned).max(0), [19, 23, 19])
    # grid and box agree about the axes of a shape that is not symmetric
    lump = np.zeros((1, 8, 8, 8), bool)
    lump[0, 0, 1, 2] = True
    where = np.argwhere(voxelise(boxes(((0, 0, 2), (4, 4, 4))), lump, low, high, 8))
    assert where.tolist() == [[0, 1, 2]]


def test_a_fitted_box_holds_what_is_occupied():
    lump = np.zeros((2, 8, 8, 8), bool)
    lump[0, 2:4, :, 4:] = True  # x in [-.25, 0], all of y, z in [0, .5]
    cubes = boxes(((1, 1, 1), (2, 2, 2), yaw(90)), ((0, 0, 0), (1, 1, 1)))
    tight = fitted(cubes, lump)
    np.testing.assert_allclose(tight.size, [[0.5, 2, 1], [1, 1, 1]])
    np.testing.assert_allclose(tight.centre, [[1, 0.75, 1.5], [0, 0, 0]], atol=1e-12)
