"""The pipeline on a BOP dataset: labels put through the solver are perfect, and all figures are there."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from vpog_scenes import BOX, HALF_TURN, OBJECT, SIZE, make_dataset, make_meshes

from backlot.command_line import EXIT_INPUT
from data_prep.bop.dataset import PoseDataset
from data_prep.bop.format import BopDataset
from data_prep.bop.index import PoseSource
from data_prep.bop.item_settings import DetectionSettings
from data_prep.bop.results import PoseEstimate, read_results
from data_prep.bop.shards import encode_rle
from evaluation.vpog.__main__ import main
from evaluation.vpog.detections import choose_targets, detect_truly, detected_mask, find_targets, read_detections
from evaluation.vpog.errors import compare, pose_figures
from evaluation.vpog.measure import (
    Protocol,
    ask_all,
    best_of,
    measure,
    measure_patches,
    nearest_templates,
    open_view,
    summarise,
    to_results,
)
from evaluation.vpog.metrics import pose_error, project, view_error
from evaluation.vpog.settings import Answering
from objectives.pose_labels import build_labels
from objectives.pose_settings import LabelConfig
from pipelines.vpog.correspondences import gather_correspondences
from pipelines.vpog.model import VPOGModel
from pipelines.vpog.pipeline import VPOGPipeline
from pipelines.vpog.solve import solve_pose
from pipelines.vpog.templates import render_template_set, template_path

SIDE, PATCH = 64, 8
KEYS = {
    *("median_rotation_deg", "median_translation", "acc_5_10_20", "mssd_recall", "mspd_recall", "vsd_recall", "add_s"),
    *("ar", "nearest_template", "class_only", "within_one_patch", "exact", "seen_recall", "unseen_f1"),
    *("view_error_deg", "in_plane", "by_occlusion", "second_pass", "score_auroc", "seconds_per_object"),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> BopDataset:
    root = make_dataset(tmp_path_factory.mktemp("bop"), count=1)
    (root / "templates").mkdir()
    for object_id, mesh in make_meshes().items():
        render_template_set(mesh, object_id, views=42, size=SIDE).save(template_path(root / "templates", object_id))
    return BopDataset(root, "test")


@pytest.fixture(scope="module")
def pipeline() -> VPOGPipeline:
    torch.manual_seed(0)
    model = VPOGModel.from_preset("tiny").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return VPOGPipeline(model)


@pytest.fixture(scope="module")
def protocol(dataset) -> Protocol:
    targets = find_targets(dataset)
    answering = Answering(num_templates=6, group_size=3, num_hypotheses=2, num_rotations=4)
    folder = dataset.root / "templates"
    return Protocol(dataset, dataset.models(), folder, detect_truly(targets), targets, answering)


def solve_labels(dataset: BopDataset, use_flow: bool) -> list[PoseEstimate]:
    """Poses from true classes, and true flow or none."""
    items = PoseDataset(
        [PoseSource(dataset.folder)],
        dataset.root / "templates",
        image_size=SIDE,
        num_positive_templates=4,
        num_negative_templates=0,
        mask_query="gt",
        augment=False,
    )
    rows = []
    for number in range(len(items)):
        batch = torch.utils.data.default_collate([items[number]])
        labels = build_labels(batch, PATCH, LabelConfig())
        classes = labels.patch_cls[0]
        buddies = torch.where(classes < 0, classes.shape[-1], classes)
        logits = 20.0 * torch.nn.functional.one_hot(buddies, classes.shape[-1] + 1)
        visible = labels.dense_visibility[0]
        flow = labels.dense_flow[0] * use_flow
        found = gather_correspondences(
            logits,
            buddies,
            flow,
            torch.where(visible, 0.01, 10.0),
            batch["template_depth"][0],
            labels.object_points[0].double(),
            (classes >= 0).any(0),
        )
        frame = batch["poses"][0, 1].double()
        solution = solve_pose(found, batch["K"][0, 0].double(), frame, threshold=0.04 * SIDE)
        row = items.sources[0].row(number)
        pose = solution.camera_from_object.numpy()
        rows.append(PoseEstimate(row.scene_id, row.im_id, row.object_id, 0.5, pose))
    return rows


def test_true_labels_have_an_ar_of_one(dataset):
    targets, models = find_targets(dataset), dataset.models()
    figures = pose_figures(compare(dataset, models, targets, solve_labels(dataset, use_flow=True)))
    assert figures["median_rotation_deg"] < 0.2
    assert figures["ar"] > 0.999
    coarse = pose_figures(compare(dataset, models, targets, solve_labels(dataset, use_flow=False), with_vsd=False))
    assert coarse["median_rotation_deg"] > 10 * figures["median_rotation_deg"]


def test_every_key_of_the_report_is_there_and_nothing_else(pipeline, protocol, tmp_path):
    measured = measure(pipeline, protocol, num_turned=1, num_patch_samples=2)
    figures = summarise(measured)
    assert figures.keys() == KEYS
    json.dumps(figures, allow_nan=False)
    assert figures["in_plane"]["by_turn"].keys() == {"-135", "-90", "-45", "0", "45", "90", "135", "180"}
    assert figures["nearest_template"].keys() == figures["class_only"].keys() == {"median_rotation_deg"}
    assert len(measured.answers) == len(measured.view_errors) == 3
    best = best_of(measured.hypotheses)
    assert best["1"] == figures["median_rotation_deg"] >= best["2"]
    # an untrained network is no better than chance, and the nearest template is
    assert figures["nearest_template"]["median_rotation_deg"] < figures["median_rotation_deg"]


def test_the_nearest_template_is_seen_from_about_the_same_side(dataset, protocol):
    """42 views are at most 20.8 degrees away; the box says where the object is."""
    models = dataset.models()
    truths = {}
    for target in protocol.targets:
        truths.setdefault((target.frame.im_id, target.instance.obj_id), []).append(target.instance.camera_from_object)
    for row in nearest_templates(protocol):
        model = models[row.obj_id]
        pose = row.camera_from_object
        direction = -pose[:3, :3].T @ pose[:3, 3] / np.linalg.norm(pose[:3, 3])
        known = truths[row.im_id, row.obj_id]
        truth = min(known, key=lambda truth: np.linalg.norm(truth[:3, 3] - pose[:3, 3]))
        assert view_error(direction, truth, model.symmetries) < 21
        rays = pose[:3, 3] / np.linalg.norm(pose[:3, 3]), truth[:3, 3] / np.linalg.norm(truth[:3, 3])
        assert np.degrees(np.arccos(np.dot(*rays))) < 2.5
        assert pose[2, 3] == pytest.approx(truth[2, 3], rel=0.3)  # turned in the picture, it has another box


def test_turned_pictures_show_the_turned_pose(dataset, protocol):
    detection = protocol.detections[0]
    straight = open_view(protocol, detection)
    pose = protocol.targets[0].instance.camera_from_object
    for turn_deg in (90.0, -135.0, 30.0):
        view = open_view(protocol, detection, turn_deg)
        c, s = np.cos(np.radians(turn_deg)), np.sin(np.radians(turn_deg))
        turned = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ pose
        points = np.asarray(dataset.models()[OBJECT].load_mesh().vertices)
        places, before = project(turned, points, view.K), project(pose, points, straight.K)
        rows, columns = np.nonzero(view.mask)
        # the mask moved with the points, and nothing of it was lost at the edges
        old_rows, old_columns = np.nonzero(straight.mask)
        shift = np.array([columns.mean(), rows.mean()]) - places.mean(0)
        c, s = np.cos(np.radians(turn_deg)), np.sin(np.radians(turn_deg))
        old = np.array([[c, -s], [s, c]]) @ (np.array([old_columns.mean(), old_rows.mean()]) - before.mean(0))
        assert np.abs(shift - old).max() < 0.5
        assert view.mask.sum() == pytest.approx(straight.mask.sum(), rel=0.05)


def test_answers_to_turned_pictures_are_turned_back(pipeline, protocol):
    """The same hypotheses, but for their in-plane turn."""
    detections = protocol.detections[:1]
    (answer,) = ask_all(pipeline, protocol, protocol.answering, detections=detections, turns=(90.0,))
    row = to_results([answer])[0]
    pose = answer.hypotheses[0].camera_from_object
    assert row.camera_from_object[:3, 3] == pytest.approx([pose[1, 3], -pose[0, 3], pose[2, 3]])


def test_times_are_those_of_pictures(pipeline, protocol):
    answers = ask_all(pipeline, protocol, protocol.answering)
    rows = to_results(answers)
    assert len({row.time for row in rows}) == 1
    assert rows[0].time == pytest.approx(sum(each.seconds for each in answers))


def test_answers_are_a_function_of_the_seed(pipeline, protocol):
    detections = protocol.detections[-1:]
    first, second = (
        to_results(ask_all(pipeline, protocol, protocol.answering, detections=detections)) for _ in range(2)
    )
    assert (first[0].camera_from_object == second[0].camera_from_object).all()
    assert first[0].score == second[0].score


def test_jitter_is_a_function_of_the_seed(dataset):
    detection = detect_truly(find_targets(dataset))[0]
    settings = DetectionSettings(mask_growth=0.1)
    masks = [detected_mask(detection, dataset, settings, seed) for seed in (0, 0, 1)]
    true = dataset.mask_visib(0, 0, 0)
    assert (masks[0] == masks[1]).all()
    assert (masks[0] != masks[2]).any()
    overlap = (masks[0] & true).sum() / (masks[0] | true).sum()
    assert 0.5 < overlap < 1


def test_targets_are_chosen_evenly(dataset):
    targets = find_targets(dataset)
    assert choose_targets(targets, None) == targets == choose_targets(targets, 99)
    assert choose_targets(targets, 2) == [targets[0], targets[-1]]


def entry(target, dataset, **changes) -> dict:
    """A detection as in CNOS' files."""
    frame, instance = target.frame, target.instance
    x1, y1, x2, y2 = (float(edge) for edge in instance.bbox_visib)
    ids = {"scene_id": frame.scene_id, "image_id": frame.im_id, "category_id": instance.obj_id}
    mask = encode_rle(dataset.mask_visib(frame.scene_id, frame.im_id, target.gt))
    return ids | {"bbox": [x1, y1, x2 - x1, y2 - y1], "score": 0.5, "time": 0.25, "segmentation": mask} | changes


def test_detections_of_a_file(dataset, tmp_path):
    targets = find_targets(dataset)
    path = tmp_path / "cnos.json"
    extra = [entry(targets[0], dataset, score=0.1), entry(targets[0], dataset, category_id=77)]
    path.write_text(json.dumps([entry(each, dataset) for each in targets] + extra))
    found = read_detections(path, dataset)
    assert len(found) == len(targets)  # the surest of each object, and no strangers
    first = next(each for each in found if each.im_id == 0 and each.object_id == BOX)
    truth = next(each for each in targets if each.frame.im_id == 0 and each.instance.obj_id == BOX)
    assert first.box == pytest.approx(truth.instance.bbox_visib)
    assert (detected_mask(first, dataset, DetectionSettings(), 0) == dataset.mask_visib(0, 0, truth.gt)).all()
    assert detected_mask(replace(first, rle=None), dataset, DetectionSettings(), 0) is None
    with pytest.raises(ValueError, match="run-length"):
        detected_mask(replace(first, rle={"size": SIZE}), dataset, DetectionSettings(), 0)


def flat(figures) -> list[float]:
    """All numbers, in order; NaN for what there is no figure of."""
    if isinstance(figures, dict | list):
        parts = figures.values() if isinstance(figures, dict) else figures
        return [number for part in parts for number in flat(part)]
    return [float("nan") if figures is None else figures]


def test_predictions_are_scored_as_they_were_measured(pipeline, dataset, tmp_path, capsys):
    pipeline.save_pretrained(tmp_path / "model")
    path = tmp_path / "cnos.json"
    path.write_text(json.dumps([entry(each, dataset) for each in find_targets(dataset)]))
    common = ["--model", str(tmp_path / "model"), "--dataset", str(dataset.root), "--num_templates", "3"]
    common += ["--num_hypotheses", "1"]
    results = tmp_path / "vpog_made-test.csv"
    main(["predict", *common, "--detections", str(path), "--out", str(results)])
    assert len(read_results(results)) == 3
    main(["measure", *common, "--num_turned", "0", "--num_patch_samples", "2", "--out", str(tmp_path / "out")])
    main(["score", str(tmp_path / "out" / "results.csv"), "--output", str(tmp_path / "figures.json")])
    scored = json.loads((tmp_path / "figures.json").read_text())
    measured = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert measured.keys() == KEYS
    assert len(scored) == 11
    assert flat(scored) == pytest.approx(flat({name: measured[name] for name in scored}), nan_ok=True)
    assert "nearest template" in capsys.readouterr().out


def test_patches_are_counted_on_jittered_queries(pipeline, protocol):
    counts = measure_patches(pipeline, protocol, 3)
    assert counts.seen > 20
    assert counts.unseen > 20
    assert 0 <= counts.exact <= counts.within_one <= counts.recalled <= counts.seen


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["--templates", "nowhere"], "render_templates"),
        (["--split", "train"], "holds no BOP scenes"),
        (["--detections", "nowhere.json"], "missing"),
        (["--out", "results.txt"], "must end in .csv"),
        (["--model", "nowhere"], "no exported pipeline"),
    ],
)
def test_wrong_input_has_one_line(pipeline, dataset, tmp_path, capsys, changes, says):
    arguments = {"--dataset": str(dataset.root), "--out": str(tmp_path / "results.csv")}
    arguments |= dict(zip(changes[::2], changes[1::2], strict=True))
    if "--model" not in arguments:
        pipeline.save_pretrained(tmp_path / "model")
        arguments["--model"] = str(tmp_path / "model")
    with pytest.raises(SystemExit) as error:
        main(["predict", *(word for pair in arguments.items() for word in pair)])
    assert error.value.code == EXIT_INPUT
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert says in lines[0]


def test_symmetric_poses_are_the_nearest_template_of_one_another(dataset, protocol):
    """Half a turn of the box changes no answer of this baseline."""
    turned = [
        replace(
            t,
            frame=replace(
                t.frame,
                instances=tuple(
                    replace(each, camera_from_object=each.camera_from_object @ HALF_TURN)
                    if each.obj_id == BOX
                    else each
                    for each in t.frame.instances
                ),
            ),
        )
        for t in protocol.targets
    ]
    first, second = nearest_templates(protocol), nearest_templates(replace(protocol, targets=turned))
    symmetries = dataset.models()[BOX].symmetries
    for a, b in zip(first, second, strict=True):
        if a.obj_id == BOX:
            assert pose_error(a.camera_from_object, b.camera_from_object, symmetries)[0] < 1e-6
