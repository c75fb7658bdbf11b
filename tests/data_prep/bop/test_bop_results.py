"""csv files of results: there and back, and everything that is wrong with one is said."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from data_prep.bop.format import Target
from data_prep.bop.results import PoseEstimate, check_results, read_results, write_results

NAME = "vpog_made-test.csv"
GOOD = "1,2,3,0.5,1 0 0 0 1 0 0 0 1,10 20 500,0.25"


def estimates(count: int = 5) -> list[PoseEstimate]:
    rng = np.random.default_rng(0)
    poses = np.tile(np.eye(4), (count, 1, 1))
    poses[:, :3, :3] = Rotation.random(count, random_state=1).as_matrix()
    poses[:, :3, 3] = rng.normal(size=(count, 3))
    return [PoseEstimate(n // 4, n // 2, n, rng.random(), pose, n // 2 + 0.5) for n, pose in enumerate(poses)]


def write(path, *lines: str, header: str = "scene_id,im_id,obj_id,score,R,t,time"):
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def test_results_are_read_as_they_were_written(tmp_path):
    true = estimates()
    write_results(tmp_path / NAME, true)
    found = read_results(tmp_path / NAME)
    for first, second in zip(found, true, strict=True):
        assert np.abs(first.camera_from_object - second.camera_from_object).max() < 1e-12
        for name in ("scene_id", "im_id", "obj_id", "score", "time"):
            assert getattr(first, name) == getattr(second, name)
    assert check_results(tmp_path / NAME) == []


def test_the_file_is_bop_s(tmp_path):
    pose = np.array([[0, -1, 0, 0.1], [1, 0, 0, -0.2], [0, 0, 1, 0.75], [0, 0, 0, 1]])
    write_results(tmp_path / NAME, [PoseEstimate(1, 2, 3, 0.5, pose)])
    assert (tmp_path / NAME).read_text() == (
        "scene_id,im_id,obj_id,score,R,t,time\n1,2,3,0.5,0.0 -1.0 0.0 1.0 0.0 0.0 0.0 0.0 1.0,100.0 -200.0 750.0,-1.0\n"
    )
    [found] = read_results(write(tmp_path / NAME, GOOD))
    assert np.array_equal(found.camera_from_object[:3, 3], [0.01, 0.02, 0.5])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1,2,3,0.5,1 0 0 0 1 0 0 0 1,10 20 500", "must have 7 fields, got 6"),
        ("1,2,x,0.5,1 0 0 0 1 0 0 0 1,10 20 500,1", "`obj_id` must be a number, got 'x'"),
        ("1,2,-3,0.5,1 0 0 0 1 0 0 0 1,10 20 500,1", "ids must be at least 0"),
        ("1,2,3,nan,1 0 0 0 1 0 0 0 1,10 20 500,1", "`score` must be finite"),
        ("1,2,3,0.5,1 0 0 0 1 0 0 0,10 20 500,1", "`R` must have 9 numbers, got 8"),
        ("1,2,3,0.5,1 0 0 0 1 0 0 0 1,10 20,1", "`t` must have 3 numbers, got 2"),
        ("1,2,3,0.5,1 0 0 0 1 0 0 0 -1,10 20 500,1", "`R` is no rotation"),
        ("1,2,3,0.5,2 0 0 0 2 0 0 0 2,10 20 500,1", "`R` is no rotation"),
        ("1,2,3,0.5,1 0 0 0 1 0 0 0 1,10 inf 500,1", "not finite"),
        ("1,2,3,0.5,1 0 0 0 1 0 0 0 1,10 20 500,-2", "`time` must be at least 0, or -1"),
    ],
)
def test_a_bad_row_is_named(tmp_path, line, message):
    path = write(tmp_path / NAME, GOOD, line)
    with pytest.raises(ValueError, match="line 3: ") as error:
        read_results(path)
    assert message in str(error.value)
    [problem] = check_results(path)
    assert problem == str(error.value)


def test_the_checker_says_everything(tmp_path):
    lines = [GOOD, GOOD.replace("0.25", "0.5"), GOOD.replace("1,2,3", "1,3,4"), "1,2,3"]
    path = write(tmp_path / "my_results.csv", *lines)
    found = check_results(path, [Target(scene_id=1, im_id=2, obj_id=3, inst_count=1)])
    assert [problem.partition(".csv")[2] for problem in found] == [
        " is not METHOD_DATASET-SPLIT[-SPLITTYPE].csv",
        ", line 5: must have 7 fields, got 3",
        ": the times of picture 2 in scene 1 differ: 0.25 and 0.5",
        ": object 4 in picture 3 of scene 1 is no target",
    ]


@pytest.mark.parametrize(
    ("name", "is_good"),
    [
        ("vpog_ycbv-test.csv", True),
        ("vpog-large_tless-test-primesense.csv", True),
        ("vpog_ycbv.csv", False),
        ("v_pog_ycbv-test.csv", False),
        ("ycbv-test.csv", False),
    ],
)
def test_names_of_files(tmp_path, name, is_good):
    assert (check_results(write(tmp_path / name, GOOD)) == []) == is_good


def test_what_is_no_results_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is missing"):
        check_results(tmp_path / NAME)
    with pytest.raises(ValueError, match="must begin with the line scene_id"):
        read_results(write(tmp_path / NAME, header="scene,im"))
    (tmp_path / NAME).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not a csv file"):
        read_results(tmp_path / NAME)


def test_only_poses_are_written(tmp_path):
    first, second, *_ = estimates()
    with pytest.raises(ValueError, match="estimate 1: `R` is no rotation"):
        write_results(tmp_path / NAME, [first, PoseEstimate(0, 0, 1, 1.0, np.diag([1.0, 1, -1, 1]), 0.5)])
    with pytest.raises(ValueError, match="the times of picture 0 in scene 0 differ"):
        write_results(tmp_path / NAME, [first, PoseEstimate(0, 0, 1, 1.0, second.camera_from_object, 0.75)])
    assert not (tmp_path / NAME).exists()
