"""Poses held against a BOP dataset on disk: perfect ones are perfect, and each way of being wrong costs its due."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from vpog_scenes import BOX, HALF_TURN, OBJECT, make_dataset

from backlot.command_line import EXIT_INPUT
from data_prep.bop.format import BopDataset
from data_prep.bop.results import PoseEstimate, write_results
from evaluation.vpog.__main__ import main
from evaluation.vpog.detections import choose_targets, find_targets
from evaluation.vpog.errors import add_figures, compare, mean_of, pose_figures
from evaluation.vpog.score import write_note

SHARES = ("mssd_recall", "mspd_recall", "vsd_recall")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> BopDataset:
    return BopDataset(make_dataset(tmp_path_factory.mktemp("bop")), "test")


def true_rows(dataset: BopDataset) -> list[PoseEstimate]:
    """Perfect answers; every picture took three seconds."""
    return [
        PoseEstimate(t.frame.scene_id, t.frame.im_id, t.instance.obj_id, 0.5, t.instance.camera_from_object, 3.0)
        for t in find_targets(dataset)
    ]


def moved(row: PoseEstimate, motion: np.ndarray, **changes) -> PoseEstimate:
    return replace(row, camera_from_object=row.camera_from_object @ motion, **changes)


def judge(dataset: BopDataset, rows, with_vsd: bool = False) -> dict:
    return pose_figures(compare(dataset, dataset.models(), find_targets(dataset), rows, with_vsd))


def test_true_poses_have_an_ar_of_one(dataset):
    figures = judge(dataset, true_rows(dataset), with_vsd=True)
    assert figures["ar"] == 1
    assert {value for name in SHARES for value in figures[name].values()} == {1.0}
    assert figures["acc_5_10_20"] == [1, 1, 1]
    assert figures["add_s"] == 1
    assert figures["median_rotation_deg"] == pytest.approx(0, abs=1e-5)
    assert figures["median_translation"] == pytest.approx(0, abs=1e-9)
    assert figures["seconds_per_object"] == pytest.approx(1)
    assert sum(each["count"] for each in figures["by_occlusion"].values()) == 6


def test_a_symmetric_pose_is_as_true(dataset):
    rows = [moved(row, HALF_TURN) if row.obj_id == BOX else row for row in true_rows(dataset)]
    figures = judge(dataset, rows, with_vsd=True)
    assert figures["ar"] == 1
    assert figures["acc_5_10_20"] == [1, 1, 1]
    errors = compare(dataset, dataset.models(), find_targets(dataset), rows, with_vsd=False)
    assert add_figures(errors)["add"] == pytest.approx(4 / 6)  # ADD knows no symmetry
    assert add_figures(errors)["add_s"] == 1


def test_half_a_turn_of_what_is_not_symmetric_is_wrong(dataset):
    rows = [moved(row, HALF_TURN) if row.obj_id == OBJECT else row for row in true_rows(dataset)]
    figures = judge(dataset, rows, with_vsd=True)
    assert figures["acc_5_10_20"] == pytest.approx([2 / 6] * 3)
    assert figures["mssd_recall"]["0.50"] == pytest.approx(2 / 6)
    assert figures["ar"] < 0.6


def test_units_are_millimetres_pixels_and_diameters(dataset):
    """A shift by a fifth of the diameter, along the picture."""
    models = dataset.models()
    rows = []
    for row in true_rows(dataset):
        pose = row.camera_from_object.copy()
        pose[0, 3] += 0.2 * models[row.obj_id].diameter
        rows.append(replace(row, camera_from_object=pose))
    errors = compare(dataset, models, find_targets(dataset), rows, with_vsd=False)
    figures = pose_figures(errors)
    assert figures["median_translation"] == pytest.approx(0.2)
    assert figures["mssd_recall"]["0.15"] == 0
    assert figures["mssd_recall"]["0.25"] == 1
    box = next(each for each in errors if each.targets[0].instance.obj_id == BOX)
    diameter = models[BOX].diameter
    assert box.add[0, 0] == pytest.approx(200 * diameter)
    # f = 150 pixels in a picture 128 wide, 640 / 128 = 5; the nearest vertex moves most
    points = np.asarray(models[BOX].load_mesh().vertices)
    pose = box.targets[0].instance.camera_from_object
    nearest = (points @ pose[:3, :3].T + pose[:3, 3])[:, 2].min()
    assert box.mspd[0, 0] == pytest.approx(5 * 150 * 0.2 * diameter / nearest)
    side = 1.2 * span(box).max()
    assert box.mspd_crop[0, 0] == pytest.approx(150 * 0.2 * diameter / nearest * 64 / side)


def span(errors) -> np.ndarray:
    """Width and height of what is seen of an instance."""
    box = errors.targets[0].instance.bbox_visib
    return box[2:] - box[:2]


def test_what_is_not_found_is_wrong(dataset):
    rows = [row for row in true_rows(dataset) if row.obj_id == BOX]
    figures = judge(dataset, rows, with_vsd=True)
    assert figures["ar"] == pytest.approx(2 / 6)
    assert figures["median_rotation_deg"] == 180
    assert figures["median_translation"] is None
    assert judge(dataset, [])["acc_5_10_20"] == [0, 0, 0]


def test_instances_of_one_object_are_told_apart(dataset):
    """In whatever order they come, and if one of them is found twice, the other one is not found."""
    rows = true_rows(dataset)
    assert judge(dataset, rows[::-1])["acc_5_10_20"] == [1, 1, 1]
    twice = [
        replace(row, camera_from_object=rows[0].camera_from_object) if n == 1 else row for n, row in enumerate(rows)
    ]
    assert rows[0].obj_id == rows[1].obj_id == OBJECT
    assert judge(dataset, twice)["mssd_recall"]["0.50"] == pytest.approx(5 / 6)


def test_only_the_surest_of_an_object_count(dataset):
    rows = true_rows(dataset)
    surer = [moved(row, np.diag([1.0, -1, -1, 1]), score=0.9) for row in rows if row.obj_id == OBJECT]
    assert judge(dataset, rows + surer)["mssd_recall"]["0.50"] == pytest.approx(2 / 6)
    assert judge(dataset, rows + [replace(row, score=0.1) for row in surer])["mssd_recall"]["0.50"] == 1


def test_auroc_tells_whether_scores_mean_anything(dataset):
    rows = true_rows(dataset)
    mixed = [moved(row, np.diag([1.0, -1, -1, 1]), score=0.1) if n % 3 == 0 else row for n, row in enumerate(rows)]
    assert judge(dataset, mixed)["score_auroc"] == 1
    assert judge(dataset, [replace(row, score=1 - row.score) for row in mixed])["score_auroc"] == 0
    assert judge(dataset, rows)["score_auroc"] is None


def test_without_vsd_there_is_no_ar(dataset):
    figures = judge(dataset, true_rows(dataset))
    assert figures["ar"] is None
    assert figures["vsd_recall"] == {}


def test_vsd_sees_a_pose_that_is_too_far(dataset):
    """Shifted away from the camera by 0.3 diameters: tolerances from 0.35 on forgive it."""
    models = dataset.models()
    rows = []
    for row in true_rows(dataset):
        pose = row.camera_from_object.copy()
        pose[:3, 3] *= 1 + 0.3 * models[row.obj_id].diameter / np.linalg.norm(pose[:3, 3])
        rows.append(replace(row, camera_from_object=pose))
    figures = judge(dataset, rows, with_vsd=True)
    assert 0.2 < mean_of(figures["vsd_recall"]) < 0.5
    assert (figures["mssd_recall"]["0.25"], figures["mssd_recall"]["0.35"]) == (0, 1)


def test_the_command_gives_the_figures_of_the_poses(dataset, tmp_path, capsys):
    rows = [moved(row, HALF_TURN) if row.obj_id == OBJECT else row for row in true_rows(dataset)]
    results = tmp_path / "answers_made-test.csv"
    write_results(results, rows)
    write_note(results, dataset, find_targets(dataset))
    main(["score", str(results), "--output", str(tmp_path / "figures.json")])
    assert json.loads((tmp_path / "figures.json").read_text()) == judge(dataset, rows, with_vsd=True)
    assert "AR" in capsys.readouterr().out
    main(["score", str(results), "--dataset", str(dataset.root), "--no_vsd"])


def test_only_what_was_asked_for_is_scored(dataset, tmp_path):
    targets = choose_targets(find_targets(dataset), 3)
    asked = {(t.frame.im_id, t.instance.obj_id) for t in targets}
    results = tmp_path / "some.csv"
    write_results(results, [row for row in true_rows(dataset) if (row.im_id, row.obj_id) in asked])
    write_note(results, dataset, targets)
    main(["score", str(results), "--no_vsd", "--output", str(tmp_path / "figures.json")])
    assert json.loads((tmp_path / "figures.json").read_text())["acc_5_10_20"] == [1, 1, 1]


@pytest.mark.parametrize(
    ("text", "note", "says"),
    [
        (None, None, "missing"),
        ("scene_id,im_id\n", None, "must begin with"),
        ("", '{"dataset": "nowhere", "split": "test", "targets": [[0, 0, 0]]}', "nowhere"),
        ("", None, "--dataset"),
    ],
)
def test_wrong_input_has_one_line(tmp_path, capsys, text, note, says):
    results = tmp_path / "results.csv"
    if text is not None:
        results.write_text(text or "scene_id,im_id,obj_id,score,R,t,time\n")
    if note is not None:
        results.with_suffix(".json").write_text(note)
    with pytest.raises(SystemExit) as error:
        main(["score", str(results)])
    assert error.value.code == EXIT_INPUT
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert says in lines[0]
