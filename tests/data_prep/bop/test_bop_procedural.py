"""Drawn models: closed, in bounds, as symmetric as they say, and otherwise told apart by their colours."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial import cKDTree
from scipy.spatial.distance import pdist
from scipy.spatial.transform import Rotation

from data_prep.bop.procedural import FAMILIES, MAX_VERTICES, SEGMENTS, SYMMETRIC_FAMILIES, make_object, make_objects

ASYMMETRIC = [make_object(5, number) for number in range(len(FAMILIES))]
SYMMETRIC = [make_object(5, number, symmetric=True) for number in range(len(SYMMETRIC_FAMILIES))]
AXIS_STEP = Rotation.from_euler("z", 360 / SEGMENTS, degrees=True).as_matrix()


def colors_of(mesh) -> np.ndarray:
    return np.asarray(mesh.visual.vertex_colors)[:, :3].astype(np.int64)


def discrete(info: dict) -> list[np.ndarray]:
    return [np.reshape(each, (4, 4)) for each in info.get("symmetries_discrete", [])]


def assert_maps_onto_itself(mesh, rotation: np.ndarray) -> None:
    """Each vertex onto one of the same colour, each face onto a face with the same side out."""
    distance, image = cKDTree(mesh.vertices).query(mesh.vertices @ rotation.T)
    assert distance.max() < 1e-9
    assert len(set(image)) == len(mesh.vertices)
    assert (colors_of(mesh)[image] == colors_of(mesh)).all()

    assert (ordered(image[mesh.faces]) == ordered(np.asarray(mesh.faces))).all()


def ordered(faces: np.ndarray) -> np.ndarray:
    """Faces (F, 3) by their numbers, each from its smallest vertex on."""
    faces = np.take_along_axis(faces, (faces.argmin(1)[:, None] + np.arange(3)) % 3, axis=1)
    return faces[np.lexsort(faces.T)]


def difference(mesh, rotation: np.ndarray) -> float:
    """Mean difference of colours, of 255, between an object and a turned one, by nearest directions."""
    directions = mesh.vertices / np.linalg.norm(mesh.vertices, axis=1, keepdims=True)
    _, image = cKDTree(directions).query(directions @ rotation.T)
    return float(np.abs(colors_of(mesh)[image] - colors_of(mesh)).mean())


@pytest.mark.parametrize(("mesh", "info"), ASYMMETRIC + SYMMETRIC)
def test_a_model_is_closed_centred_and_measured(mesh, info):
    assert mesh.is_watertight
    assert mesh.volume > 0  # normals outwards
    assert len(mesh.vertices) <= MAX_VERTICES
    assert info["diameter"] == pytest.approx(1000 * pdist(mesh.vertices).max(), rel=1e-12)
    assert 80 <= info["diameter"] <= 130
    low = [info[f"min_{axis}"] for axis in "xyz"]
    size = [info[f"size_{axis}"] for axis in "xyz"]
    np.testing.assert_allclose(low, 1000 * mesh.vertices.min(0), rtol=1e-12)
    np.testing.assert_allclose(size, 1000 * np.ptp(mesh.vertices, axis=0), rtol=1e-12)
    off_centre = np.abs(np.array(low) + np.array(size) / 2)
    assert off_centre[2] < 1e-9
    assert off_centre.max() < (1e-9 if not discrete(info) else 0.1 * info["diameter"])


@pytest.mark.parametrize(("mesh", "info"), SYMMETRIC)
def test_symmetries_leave_surface_and_colours_as_they_are(mesh, info):
    assert discrete(info) or info["symmetries_continuous"]
    for pose in discrete(info):
        assert np.linalg.det(pose[:3, :3]) == pytest.approx(1)
        assert not np.allclose(pose, np.eye(4))
        assert (pose[:3, 3] == 0).all()
        assert_maps_onto_itself(mesh, pose[:3, :3])
    if "symmetries_continuous" in info:
        assert info["symmetries_continuous"] == [{"axis": [0, 0, 1], "offset": [0, 0, 0]}]
        assert_maps_onto_itself(mesh, AXIS_STEP)


def test_every_kind_of_symmetry_is_drawn():
    orders = {len(discrete(info)) + 1 for _, info in SYMMETRIC if "symmetries_continuous" not in info}
    assert orders == {2, 3, 4, 6, 8}
    turned = [len(discrete(info)) for _, info in SYMMETRIC if "symmetries_continuous" in info]
    assert set(turned) == {0, 1}


@pytest.mark.parametrize(("mesh", "info"), ASYMMETRIC)
def test_colours_tell_a_turned_object(mesh, info):
    assert not info.keys() & {"symmetries_discrete", "symmetries_continuous"}
    turns = [*Rotation.random(4, random_state=0).as_matrix(), np.diag([-1.0, -1.0, 1.0]), np.diag([1.0, -1.0, -1.0])]
    assert min(difference(mesh, turn) for turn in turns) > 25


@pytest.mark.parametrize(("mesh", "info"), SYMMETRIC)
def test_what_is_not_a_symmetry_shows(mesh, info):
    assert difference(mesh, Rotation.from_euler("x", 60, degrees=True).as_matrix()) > 20
    if "symmetries_continuous" not in info:
        assert difference(mesh, Rotation.from_euler("z", 24, degrees=True).as_matrix()) > 5


def test_seed_and_number_decide_everything():
    again, info = make_object(5, 1)
    mesh, expected = ASYMMETRIC[1]
    assert (again.vertices == mesh.vertices).all()
    assert (colors_of(again) == colors_of(mesh)).all()
    assert info == expected
    for other, _ in (make_object(6, 1), make_object(5, 1 + len(FAMILIES))):
        assert np.abs(other.vertices - mesh.vertices).max() > 0.001


def test_a_set_has_its_symmetric_objects_last():
    meshes, infos = make_objects(5, 4, num_symmetric=2, first_id=10)
    assert list(meshes) == list(infos) == [10, 11, 12, 13]
    assert [len(info.keys() & {"symmetries_discrete", "symmetries_continuous"}) for info in infos.values()] == [
        0,
        0,
        1,
        1,
    ]
    assert (meshes[11].vertices == ASYMMETRIC[1][0].vertices).all()
    with pytest.raises(ValueError, match="`num_symmetric` must lie between 0 and `count`, 1, got 2"):
        make_objects(5, 1, num_symmetric=2)
