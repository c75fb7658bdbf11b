"""Symmetry sets: what the annotation means, by the toolkit's convention."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from data_prep.bop.symmetries import symmetry_set

FLIP = [1, 0, 0, 2, 0, -1, 0, 4, 0, 0, -1, 6, 0, 0, 0, 1]
AXIS = {"axis": [0, 0, 2], "offset": [10, -20, 30]}


def test_an_object_without_symmetries_looks_like_itself():
    assert np.array_equal(symmetry_set({"diameter": 1.0}), np.eye(4)[None])


def test_discrete_symmetries_follow_the_identity_in_metres():
    found = symmetry_set({"symmetries_discrete": [FLIP]})
    assert np.array_equal(found[0], np.eye(4))
    assert np.array_equal(found[1, :3, :3], np.diag([1, -1, -1]))
    assert np.allclose(found[1, :3, 3], [0.002, 0.004, 0.006], rtol=1e-15)


def test_a_continuous_symmetry_is_cut_into_the_toolkit_s_steps():
    found = symmetry_set({"symmetries_continuous": [AXIS]})
    assert len(found) == 315  # ceil(pi / 0.01), 314 of the toolkit and the identity
    assert np.array_equal(found[0], np.eye(4))
    angles = Rotation.from_matrix(found[:, :3, :3]).as_rotvec()[:, 2] % (2 * np.pi)
    assert np.allclose(angles, np.arange(315) * 2 * np.pi / 315, atol=1e-9)
    on_axis = np.array([0.010, -0.020, 0.5, 1])
    assert np.abs(found @ on_axis - on_axis).max() < 1e-15


def test_a_turn_follows_the_discrete_symmetry():
    found = symmetry_set({"symmetries_discrete": [FLIP], "symmetries_continuous": [AXIS]}, max_step=np.pi / 4)
    assert found.shape == (8, 4, 4)
    flip = symmetry_set({"symmetries_discrete": [FLIP]})[1]
    turns = symmetry_set({"symmetries_continuous": [AXIS]}, max_step=np.pi / 4)
    expected = [*turns, *(turn @ flip for turn in turns)]
    assert np.allclose(found, expected, atol=1e-15)
    assert not np.allclose(turns[1] @ flip, flip @ turns[1], atol=1e-3)  # so the order is seen


def test_two_axes_are_two_sets_of_turns():
    axes = [{"axis": axis, "offset": [0, 0, 0]} for axis in ([0, 0, 1], [1, 0, 0])]
    found = symmetry_set({"symmetries_continuous": axes}, max_step=np.pi / 4)
    assert len(found) == 1 + 3 + 3


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"symmetries_discrete": [[1, 0, 0]]}, "16 numbers"),
        ({"symmetries_discrete": [np.diag([1, 1, -1, 1]).ravel().tolist()]}, "rotation"),
        ({"symmetries_discrete": [np.diag([2, 2, 2, 1]).ravel().tolist()]}, "rotation"),
        ({"symmetries_continuous": [{"axis": [0, 0, 0], "offset": [0, 0, 0]}]}, "axis"),
        ({"symmetries_continuous": [{"axis": [0, 0, 1], "offset": [0, 0]}]}, "offset"),
    ],
)
def test_what_is_no_symmetry_is_refused(info, message):
    with pytest.raises(ValueError, match=message):
        symmetry_set(info)


def test_the_step_has_a_range():
    with pytest.raises(ValueError, match="max_step"):
        symmetry_set({}, max_step=0)
