"""Errors of poses against figures worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.vpog.metrics import (
    PROJECTION_RECALLS,
    SURFACE_RECALLS,
    add,
    add_s,
    area_under_curve,
    auroc,
    distances_from_depth,
    match,
    mspd,
    mssd,
    pose_error,
    relative_width,
    rotation_angle,
    view_error,
    vsd,
)

K = np.array([[100.0, 0, 0], [0, 100, 0], [0, 0, 1]])
ALONE = np.eye(4)[None]
CORNERS = np.array([[10.0, 0, 0], [-10, 0, 0], [0, 30, 0], [0, -30, 0]])


def turned(degrees: float, translation=(0, 0, 0)) -> np.ndarray:
    """About the camera's z axis, then moved (mm)."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    pose = np.eye(4)
    pose[:2, :2], pose[:3, 3] = [[c, -s], [s, c]], translation
    return pose


FAR = turned(0, (0, 0, 1000))
HALF_TURN = np.stack([np.eye(4), turned(180)])


def test_thresholds_are_those_of_bop():
    assert pytest.approx([0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5]) == SURFACE_RECALLS
    assert pytest.approx([5, 10, 15, 20, 25, 30, 35, 40, 45, 50]) == PROJECTION_RECALLS
    assert relative_width(1280) == 2


def test_mssd_is_the_farthest_vertex():
    assert mssd(FAR, FAR, CORNERS, ALONE) == 0
    assert mssd(turned(0, (3, 4, 1000)), FAR, CORNERS, ALONE) == pytest.approx(5)
    # a half turn moves a vertex at radius 30 by 60
    assert mssd(turned(180, (0, 0, 1000)), FAR, CORNERS, ALONE) == pytest.approx(60)
    assert mssd(turned(180, (0, 0, 1000)), FAR, CORNERS, HALF_TURN) == pytest.approx(0, abs=1e-9)
    # and a turn by 60 degrees moves it by 30
    assert mssd(turned(60, (0, 0, 1000)), FAR, CORNERS, HALF_TURN) == pytest.approx(30)


def test_a_symmetry_is_of_the_object_not_of_the_camera():
    truth = turned(30, (50, 0, 1000))
    assert mssd(truth @ turned(180), truth, CORNERS, HALF_TURN) == pytest.approx(0, abs=1e-9)
    assert mssd(turned(180) @ truth, truth, CORNERS, HALF_TURN) > 50


def test_mspd_is_in_pixels():
    # 10 mm aside at 1 m with f = 100: one pixel
    assert mspd(turned(0, (10, 0, 1000)), FAR, CORNERS, ALONE, K) == pytest.approx(1)
    # twice as far: (0, 30) is seen at 1.5 instead of 3
    assert mspd(turned(0, (0, 0, 2000)), FAR, CORNERS, ALONE, K) == pytest.approx(1.5)
    assert mspd(turned(180, (0, 0, 1000)), FAR, CORNERS, ALONE, K) == pytest.approx(6)
    assert mspd(turned(180, (0, 0, 1000)), FAR, CORNERS, HALF_TURN, K) == pytest.approx(0, abs=1e-9)


def test_mspd_behind_the_camera_is_infinite():
    assert mspd(turned(0, (0, 0, -1000)), FAR, CORNERS, ALONE, K) == np.inf


def test_distances_are_along_the_ray():
    # the pixel one focal length aside is seen under 45 degrees
    distances = distances_from_depth(np.full((1, 101), 10.0), K)
    assert distances[0, 0] == pytest.approx(10)
    assert distances[0, 100] == pytest.approx(10 * np.sqrt(2))


def depths(*values: float) -> np.ndarray:
    return np.array([values], float)


LONG = np.diag([1e9, 1e9, 1.0])  # rays are parallel: distances are depths


def test_vsd_counts_pixels_of_the_union():
    tolerances = np.array([5.0, 20.0])
    true = depths(1000, 1000, 1000, 0, 0)
    same = vsd(true, true, true, LONG, tolerances)
    assert same == pytest.approx([0, 0])
    # one pixel aside: of four in the union, two are in both
    aside = depths(0, 1000, 1000, 1000, 0)
    assert vsd(aside, true, depths(1000, 1000, 1000, 2000, 0), LONG, tolerances) == pytest.approx([0.5, 0.5])
    # 10 mm behind: beyond the first tolerance, within the second
    behind = depths(1010, 1010, 1010, 0, 0)
    assert vsd(behind, true, true, LONG, tolerances) == pytest.approx([1, 0])


def test_vsd_leaves_out_what_is_hidden():
    true = depths(1000, 1000, 1000, 1000)
    wrong = depths(1000, 1000, 1100, 1100)
    # an occluder at 500 hides the half that is wrong: neither pose is visible there
    assert vsd(wrong, true, depths(1000, 1000, 500, 500), LONG, np.array([50.0])) == pytest.approx([0])
    assert vsd(wrong, true, true, LONG, np.array([50.0])) == pytest.approx([0.5])
    # nothing measured counts as visible
    assert vsd(wrong, true, depths(1000, 1000, 0, 0), LONG, np.array([50.0])) == pytest.approx([0.5])


def test_vsd_of_an_estimate_behind_the_surface_counts_where_the_truth_is_visible():
    # farther than the surface by more than delta, yet inside the true silhouette: in both masks, at a distance
    assert vsd(depths(1030), depths(1000), depths(1000), LONG, np.array([20.0, 40.0])) == pytest.approx([1, 0])
    # outside of it, the surface in front hides it
    assert vsd(depths(0, 1030), depths(1000, 0), depths(1000, 1000), LONG, np.array([20.0])) == pytest.approx([1])


def test_vsd_of_what_cannot_be_seen_is_one():
    nothing = depths(0, 0)
    assert vsd(nothing, nothing, depths(1000, 1000), LONG, np.array([20.0])) == pytest.approx([1])


def test_add_is_a_mean_and_add_s_takes_the_nearest():
    assert add(turned(0, (3, 4, 1000)), FAR, CORNERS) == pytest.approx(5)
    # a half turn: two vertices move by 20, two by 60, and all come to lie on one another
    assert add(turned(180, (0, 0, 1000)), FAR, CORNERS) == pytest.approx(40)
    assert add_s(turned(180, (0, 0, 1000)), FAR, CORNERS) == pytest.approx(0, abs=1e-9)
    assert add_s(turned(0, (2, 0, 1000)), FAR, CORNERS) == pytest.approx(2)


def test_rotation_angles():
    assert rotation_angle(turned(10)[:3, :3], turned(55)[:3, :3]) == pytest.approx(45)
    assert rotation_angle(turned(0)[:3, :3], turned(180)[:3, :3]) == pytest.approx(180)
    assert rotation_angle(turned(0)[:3, :3], turned(1e-6)[:3, :3]) == pytest.approx(1e-6, rel=1e-3)


def test_pose_errors_take_the_nearest_of_equal_poses():
    estimate = turned(170, (0, 6, 1008))
    assert pose_error(estimate, FAR, ALONE) == pytest.approx((170, 10))
    assert pose_error(estimate, FAR, HALF_TURN) == pytest.approx((10, 10))
    # a symmetry about an axis beside the origin moves the origin
    offset = turned(180, (20, 0, 0))
    assert pose_error(FAR @ offset, FAR, np.stack([np.eye(4), offset])) == pytest.approx((0, 0), abs=1e-9)


def test_view_errors():
    # the camera at the object's -z looks along +z: the direction towards it is -z
    assert view_error(np.array([0, 0, -1.0]), FAR, ALONE) == pytest.approx(0)
    assert view_error(np.array([0, 1.0, 0]), FAR, ALONE) == pytest.approx(90)
    # in-plane turns and the distance change nothing
    assert view_error(np.array([0, 0, -1.0]), turned(77, (0, 0, 300)), ALONE) == pytest.approx(0, abs=1e-6)
    flipped = np.diag([1.0, -1, -1, 1])
    assert view_error(np.array([0, 0, 1.0]), FAR, np.stack([np.eye(4), flipped])) == pytest.approx(0)


def test_matching_is_greedy_by_score():
    errors = np.array([[2.0, 1.0], [3.0, 0.5]])  # the surest takes instance 1, though the other fits it better
    assert match(errors).tolist() == [1, 0]
    assert match(errors, threshold=2.5).tolist() == [-1, 0]
    assert match(errors, threshold=1.0).tolist() == [-1, 1]  # strictly below
    assert match(np.zeros((0, 2))).tolist() == [-1, -1]
    assert match(np.array([[np.inf]])).tolist() == [-1]


def test_area_under_the_recall():
    assert area_under_curve(np.array([0.0, 0.0])) == 1
    assert area_under_curve(np.array([25.0, 75.0])) == pytest.approx(0.5)
    assert area_under_curve(np.array([0.0, np.inf])) == pytest.approx(0.5)


def test_auroc():
    assert auroc(np.array([0.9, 0.8, 0.1]), np.array([True, True, False])) == 1
    # of the four pairs three are in order
    assert auroc(np.array([0.9, 0.3, 0.5, 0.1]), np.array([True, True, False, False])) == pytest.approx(0.75)
    assert auroc(np.array([0.9, 0.3]), np.array([True, True])) is None
