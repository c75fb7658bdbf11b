"""Cameras about an object."""

from __future__ import annotations

import numpy as np
import pytest

from backlot.views import look_at_poses, template_camera, view_directions


@pytest.mark.parametrize(("count", "nearest", "farthest"), [(42, 31.7, 36.0), (162, 15.8, 18.7), (642, 7.8, 9.4)])
def test_directions_are_spread_evenly(count, nearest, farthest):
    directions = view_directions(count)
    assert directions.shape == (count, 3)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1, rtol=1e-12)
    cosines = directions @ directions.T - 2 * np.eye(count)
    spacing = np.degrees(np.arccos(cosines.max(axis=1)))
    assert nearest < spacing.min() <= spacing.max() < farthest
    assert cosines.min(axis=1).max() < -1 + 1e-9  # each has one opposite to it


def test_other_numbers_of_views_are_refused():
    with pytest.raises(ValueError, match="`views` must be one of 42, 162, 642, got 100"):
        view_directions(100)


def test_cameras_stand_in_their_direction_and_look_at_the_centre():
    directions, centre = view_directions(162), np.array([0.1, -0.2, 0.3])
    poses = look_at_poses(directions, 0.7, centre)
    rotation, shift = poses[:, :3, :3], poses[:, :3, 3]
    np.testing.assert_allclose(rotation @ rotation.transpose(0, 2, 1), np.tile(np.eye(3), (162, 1, 1)), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(rotation), 1)
    np.testing.assert_allclose(rotation @ centre + shift, np.tile([0, 0, 0.7], (162, 1)), atol=1e-12)
    eyes = -np.einsum("tji,tj->ti", rotation, shift)
    np.testing.assert_allclose(eyes, centre + 0.7 * directions, atol=1e-12)
    flat = np.hypot(directions[:, 0], directions[:, 1]) > 1e-3
    assert (rotation[flat, 1, 2] < 0).all()  # what points up in the object points up in the picture
    np.testing.assert_allclose(rotation[flat, 0, 2], 0, atol=1e-12)


def test_a_camera_above_the_pole_has_y_up():
    poses = look_at_poses(np.array([[0.0, 0, 1], [0, 0, -1]]), 1.0)
    np.testing.assert_allclose(poses[:, 1, 1], -1)


def test_the_template_camera_holds_the_sphere_with_a_margin():
    K, distance = template_camera(0.2, 224, 40.0)
    edge = (K[0, 2] + 0.5) / K[0, 0]
    assert np.degrees(np.arctan(edge)) == pytest.approx(20)
    assert K[0, 2] == K[1, 2] == 111.5
    seen = np.tan(np.arcsin(0.2 / distance))
    assert 0.9 < seen / edge < 0.97
    for radius, fov, text in ((0.0, 40, "radius"), (np.nan, 40, "radius"), (0.1, 180, "fov_degrees")):
        with pytest.raises(ValueError, match=text):
            template_camera(radius, 64, fov)
