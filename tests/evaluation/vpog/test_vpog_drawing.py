"""Where lines, axes and colours come to lie."""

from __future__ import annotations

import numpy as np
import pytest
import trimesh

from evaluation.vpog.drawing import (
    AXIS_COLOURS,
    BAR,
    draw_axes,
    draw_correspondences,
    draw_histogram,
    draw_model,
    draw_outline,
    flow_to_rgb,
    join_patches,
)

BLACK = np.zeros((60, 80, 3), np.uint8)


def test_an_outline_surrounds_its_mask():
    mask = np.zeros((60, 80), bool)
    mask[20:30, 40:50] = True
    drawn = draw_outline(BLACK, mask, (255, 0, 0)).any(-1)
    assert not (drawn & mask).any()
    assert drawn.sum() == 12 * 12 - 10 * 10
    assert not BLACK.any()


def test_axes_start_at_the_projected_origin():
    intrinsics = np.array([[50.0, 0, 30], [0, 50, 20], [0, 0, 1]])
    pose = np.eye(4)
    pose[2, 3] = 1.0
    drawn = draw_axes(BLACK, pose, intrinsics, 0.4)  # x to the right by 20 pixels, y downwards, z towards the origin
    red, green = ((drawn == colour).all(-1) for colour in AXIS_COLOURS[:2])
    assert red[20, 31:51].all()
    assert not red[20, 52:].any()
    assert green[21:41, 30].all()
    pose[2, 3] = -1.0
    assert not draw_axes(BLACK, pose, intrinsics, 0.4).any()


def test_a_model_is_drawn_where_its_pose_puts_it():
    intrinsics = np.array([[100.0, 0, 40], [0, 100, 30], [0, 0, 1]])
    pose = np.eye(4)
    pose[:3, 3] = 0.0, 0.0, 1.0
    drawn = draw_model(BLACK, trimesh.creation.box((0.2, 0.1, 0.001)), pose, intrinsics, (255, 0, 0))
    outline = (drawn == (255, 0, 0)).all(-1)
    rows, columns = np.nonzero(outline)
    assert (columns.min(), columns.max()) == pytest.approx((29, 51), abs=1)
    assert (rows.min(), rows.max()) == pytest.approx((24, 36), abs=1)
    assert (drawn[30, 41:49] == AXIS_COLOURS[0]).all()


def test_correspondences_join_the_two_pictures():
    template = np.full((60, 60, 3), 50, np.uint8)
    drawn = draw_correspondences(BLACK, template, np.array([[10.0, 30]]), np.array([[20.0, 30]]), scale=2)
    assert drawn.shape == (120, 280, 3)
    row = drawn[61]
    assert (row[22:198].max(-1) == 255).all()
    assert (row[:18] == 0).all()
    assert (row[204:] == 50).all()
    with pytest.raises(ValueError, match="one height"):
        draw_correspondences(BLACK, template[:10], np.zeros((1, 2)), np.zeros((1, 2)))


def test_no_correspondences_give_the_pictures_alone():
    drawn = draw_correspondences(BLACK, BLACK, np.zeros((0, 2)), np.zeros((0, 2)))
    assert not drawn.any()


def test_flow_is_hue_by_direction_and_saturation_by_length():
    flow = np.array([[1.0, 0], [-1, 0], [0, 0], [0.5, 0], [9, 0]])
    red, cyan, white, pink, more = flow_to_rgb(flow).astype(int)
    assert red.tolist() == [255, 0, 0] == more.tolist()
    assert np.abs(cyan - [0, 255, 255]).max() <= 6  # Pillow's hue has 8 bits
    assert white.tolist() == [255, 255, 255]
    assert pink.tolist() == pytest.approx([255, 127, 127], abs=1)
    assert flow_to_rgb(flow, valid=np.arange(5) > 0)[0].tolist() == [0, 0, 0]


def test_patches_are_joined_row_by_row():
    picture = np.arange(4 * 6).reshape(4, 6)
    patches = np.stack([picture[i : i + 2, j : j + 2] for i in (0, 2) for j in (0, 2, 4)])
    assert (join_patches(patches, columns=3) == picture).all()


def test_bars_of_a_histogram_are_as_high_as_their_counts():
    drawn = draw_histogram({"error": [1, 1, 1, 1, 12, np.inf]}, [0, 5, 10, 15], " deg", size=(320, 160))
    assert drawn.shape == (160, 320, 3)
    bars = (drawn == BAR).all(-1).sum(0)
    assert bars[60] == pytest.approx(2 * bars[260], abs=2)
    assert bars[60] > 100
    assert bars[160] == 0
