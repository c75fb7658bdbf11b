"""How well a VPOGPipeline finds the objects of a BOP dataset, beside what simpler answers would give.

Everything is a function of the seed: which objects, how their masks are jittered, what RANSAC draws.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from backlot.cameras import rotation_z, warp
from backlot.samples import SampleKey
from data_prep.bop.dataset import PoseDataset
from data_prep.bop.format import BopDataset, Frame
from data_prep.bop.index import PoseSource
from data_prep.bop.item_settings import DetectionSettings
from data_prep.bop.models import Models, require_templates
from data_prep.bop.results import PoseEstimate
from evaluation.vpog.detections import Detection, Target, choose_targets, detect_truly, detected_mask, find_targets
from evaluation.vpog.errors import Errors, compare, pose_figures, values_of
from evaluation.vpog.matching import PatchCounts, count_patches
from evaluation.vpog.metrics import view_error
from evaluation.vpog.settings import Answering
from objectives.pose_labels import build_labels
from objectives.pose_settings import LabelConfig
from pipelines.vpog.pipeline import PoseEstimate as Hypothesis
from pipelines.vpog.pipeline import VPOGPipeline
from pipelines.vpog.query import box_of
from pipelines.vpog.solve import place_template
from pipelines.vpog.templates import TemplateSet

TURNS = (-135, -90, -45, 0, 45, 90, 135, 180)
PATCH_BATCH = 8


@dataclass(frozen=True)
class Protocol:
    """What is asked and how; the same for all answers that are compared.

    Args:
        templates: folder of template sets.
        targets: what is to be found; none where the poses are not public.
        jitter: how far the true masks are from what the network sees.
    """

    dataset: BopDataset
    models: Models
    templates: Path
    detections: Sequence[Detection]
    targets: Sequence[Target] = ()
    answering: Answering = field(default_factory=Answering)
    jitter: DetectionSettings = field(default_factory=DetectionSettings)
    seed: int = 0

    def __post_init__(self):
        if not self.detections:
            raise ValueError("`detections` must not be empty")
        for object_id in sorted({each.object_id for each in self.detections}):
            self.models[object_id]  # names one that there is not
        require_templates(self.templates, {each.object_id for each in self.detections}, self.models)

    @functools.cached_property
    def frames(self) -> dict[tuple[int, int], Frame]:
        """By scene and picture."""
        return {(frame.scene_id, frame.im_id): frame for frame in self.dataset.frames()}

    def template_sets(self, detections: Sequence[Detection]) -> Iterator[tuple[TemplateSet, list[int]]]:
        """The templates of each object, one object after the other, with the numbers of its detections."""
        order = sorted(range(len(detections)), key=lambda number: detections[number].object_id)
        for object_id, numbers in itertools.groupby(order, key=lambda number: detections[number].object_id):
            yield TemplateSet.load(self.templates / f"{object_id:06d}.safetensors"), list(numbers)


@dataclass(frozen=True)
class View:
    """What the pipeline is given: `rgb` (H, W, 3) uint8, K (3, 3), a `mask` (H, W) bool, or None and a `box` (4,)."""

    rgb: np.ndarray
    K: np.ndarray
    mask: np.ndarray | None
    box: np.ndarray


@dataclass(frozen=True)
class Answer:
    """What the pipeline said of a detection.

    Args:
        hypotheses: the best first.
        direction: (3,) from which the template that looks most like the query sees the object.
        seconds: it took, detection not counted.
        turn_deg: by which the picture was turned; the hypotheses are turned back.
    """

    detection: Detection
    hypotheses: Sequence[Hypothesis]
    direction: np.ndarray
    seconds: float
    turn_deg: float = 0.0


def open_split(folder: str | Path, templates: str | Path, count: int, seed: int = 0) -> Protocol:
    """What is asked of a network while it trains: one pose of at most `count` objects, evenly chosen from a split.

    Args:
        folder: of the split's scenes, `<dataset>/<split>`.
        seed: of the jitter of masks, and of RANSAC.

    Raises:
        ValueError: one line: poses are not known, or models or templates are missing.
    """
    dataset = BopDataset(Path(folder).parent, Path(folder).name)
    targets = choose_targets(find_targets(dataset), count)
    answering = Answering(num_hypotheses=1)
    return Protocol(dataset, dataset.models(), Path(templates), detect_truly(targets), targets, answering, seed=seed)


# --- asking ---------------------------------------------------------------------------------------------------------


def open_view(protocol: Protocol, detection: Detection, turn_deg: float = 0.0) -> View:
    """The picture of a detection; ValueError, one line, if it cannot be read."""
    frame = protocol.frames[detection.scene_id, detection.im_id]
    rgb = protocol.dataset.rgb(detection.scene_id, detection.im_id)
    mask = detected_mask(detection, protocol.dataset, protocol.jitter, protocol.seed)
    view = View(rgb, frame.K, mask, detection.box)
    return turn_view(view, turn_deg) if turn_deg else view


def turn_view(view: View, turn_deg: float) -> View:
    """The view of a camera that was turned about its axis, on a canvas that holds all of it.

    The affine is K' R_z K^-1, exact whatever the focal lengths; poses become R_z pose.

    Raises:
        ValueError: there is no mask; a box cannot be turned.
    """
    if view.mask is None:
        raise ValueError("only objects with masks can be turned")
    height, width = view.mask.shape
    K = torch.from_numpy(view.K).double()
    affine = K @ rotation_z(torch.tensor(np.radians(turn_deg), dtype=torch.float64)) @ K.inverse()
    corners = torch.tensor([[0.0, 0, 1], [width - 1, 0, 1], [0, height - 1, 1], [width - 1, height - 1, 1]]).double()
    places = (corners @ affine.T)[:, :2]
    shift = torch.eye(3, dtype=torch.float64)
    shift[:2, 2] = -places.amin(0).floor()
    size = int((places.amax(0) - places.amin(0)).max().ceil()) + 2
    M = (shift @ affine)[None]
    rgb = torch.from_numpy(view.rgb.copy()).permute(2, 0, 1)[None].float()
    turned = warp(rgb, M, size)[0].round().clamp(0, 255).byte().permute(1, 2, 0)
    mask = warp(torch.from_numpy(view.mask.copy())[None, None].float(), M, size, "nearest")[0, 0] > 0.5
    return View(turned.numpy(), (shift @ K).numpy(), mask.numpy(), view.box)


def ask(
    pipeline: VPOGPipeline,
    protocol: Protocol,
    detection: Detection,
    templates: TemplateSet,
    answering: Answering,
    turn_deg: float = 0.0,
) -> Answer:
    """The pipeline's answer to one detection."""
    view = open_view(protocol, detection, turn_deg)
    keys = (protocol.seed, detection.scene_id, detection.im_id, detection.object_id, *detection.box.astype(int) + 2**20)
    state = int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> 1)
    start = time.perf_counter()
    output = pipeline(
        view.rgb,
        view.K,
        templates,
        box=view.box if view.mask is None else None,
        mask=view.mask,
        num_hypotheses=answering.num_hypotheses,
        num_templates=answering.num_templates,
        group_size=answering.group_size,
        second_pass=answering.second_pass,
        in_plane=answering.in_plane,
        num_rotations=answering.num_rotations,
        flow=answering.flow,
        solver=answering.solver,
        generator=torch.Generator().manual_seed(state),
    )
    seconds = time.perf_counter() - start
    best = directions_of(templates)[int(output.template_scores.argmax())]
    return Answer(detection, output.estimates, best, seconds, turn_deg)


def directions_of(templates: TemplateSet) -> np.ndarray:
    """(T, 3) from which templates see the object, unit length, in its frame."""
    poses = np.asarray(templates.camera_from_object, float)
    directions = -np.einsum("tji,tj->ti", poses[:, :3, :3], poses[:, :3, 3])
    return directions / np.linalg.norm(directions, axis=1, keepdims=True)


def ask_all(
    pipeline: VPOGPipeline,
    protocol: Protocol,
    answering: Answering,
    *,
    detections: Sequence[Detection] | None = None,
    turns: Sequence[float] = (0.0,),
    show_progress: bool = False,
) -> list[Answer]:
    """The answers to all detections, in their order, each in all turns."""
    detections = protocol.detections if detections is None else detections
    answers: dict[tuple[int, float], Answer] = {}
    with tqdm(total=len(detections) * len(turns), unit="object", disable=not show_progress) as progress:
        for templates, numbers in protocol.template_sets(detections):
            for number, turn_deg in itertools.product(numbers, turns):
                answers[number, turn_deg] = ask(pipeline, protocol, detections[number], templates, answering, turn_deg)
                progress.update()
    return [answers[key] for key in sorted(answers)]


def to_results(answers: Sequence[Answer], rank: int = 0) -> list[PoseEstimate]:
    """Rows of a BOP file: of each answer the `rank`-th hypothesis, or its last; times are those of whole pictures."""
    seconds, detecting = Counter(), {}
    for answer in answers:
        picture = answer.detection.scene_id, answer.detection.im_id
        seconds[picture] += answer.seconds
        detecting[picture] = max(detecting.get(picture, 0.0), answer.detection.seconds)
    rows = []
    for answer in answers:
        found, detection = answer.hypotheses[min(rank, len(answer.hypotheses) - 1)], answer.detection
        back = np.eye(4)
        back[:3, :3] = rotation_z(torch.tensor(-np.radians(answer.turn_deg), dtype=torch.float64)).numpy()
        picture = detection.scene_id, detection.im_id
        pose, spent = back @ found.camera_from_object, seconds[picture] + detecting[picture]
        rows.append(PoseEstimate(*picture, detection.object_id, found.score, pose, spent))
    return rows


def nearest_templates(protocol: Protocol) -> list[PoseEstimate]:
    """The best that retrieval alone could say: the template of the nearest view, put where the object's box is.

    Of poses that symmetry makes equal, the one nearest to a template counts.
    """
    detections = [
        Detection(each.frame.scene_id, each.frame.im_id, each.instance.obj_id, each.instance.bbox_visib)
        for each in protocol.targets
    ]
    rows: list[PoseEstimate] = []
    for templates, numbers in protocol.template_sets(detections):
        directions = directions_of(templates)
        symmetries = protocol.models[detections[numbers[0]].object_id].symmetries
        for target in (protocol.targets[number] for number in numbers):
            truth = target.instance.camera_from_object
            nearest = int(np.argmin([view_error(direction, truth, symmetries) for direction in directions]))
            pose = place_template(
                torch.as_tensor(templates.camera_from_object[nearest]),
                torch.as_tensor(templates.K),
                box_of(torch.as_tensor(templates.rgba[nearest])[..., 3] > 0),
                torch.from_numpy(target.frame.K),
                torch.from_numpy(target.instance.bbox_visib),
            ).numpy()
            frame = target.frame
            rows.append(PoseEstimate(frame.scene_id, frame.im_id, target.instance.obj_id, 0.0, pose))
    return rows


# --- patches --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_patches(pipeline: VPOGPipeline, protocol: Protocol, count: int) -> PatchCounts:
    """Classes against labels, of queries with jittered masks and templates that are chosen as in training.

    Args:
        count: queries at most, evenly chosen.
    """
    model = pipeline.model
    dataset = PoseDataset(
        [PoseSource(protocol.dataset.folder)],
        protocol.templates,
        image_size=model.config.image_size,
        mask_query="jitter",
        augment=False,
        seed=protocol.seed,
        detection=protocol.jitter,
    )
    rows = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int))
    counts = PatchCounts()
    for start in range(0, len(rows), PATCH_BATCH):
        items = [dataset[SampleKey(int(row), 0, protocol.seed)] for row in rows[start : start + PATCH_BATCH]]
        batch = torch.utils.data.default_collate(items)
        batch = {name: value.to(model.device) if hasattr(value, "to") else value for name, value in batch.items()}
        rotations = batch["poses"][:, 1:, :3, :3]
        inputs = (batch["images"], rotations, batch["d_ref"], batch["reference_rotation"])
        output = model(*(each.to(model.dtype) for each in inputs))
        labels = build_labels(batch, model.patch_size, LabelConfig())
        counts = counts + count_patches(output.buddies, labels.patch_cls, model.config.image_size // model.patch_size)
    return counts


# --- figures --------------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """All that was measured of a pipeline.

    Args:
        answers: to every detection. errors: of these.
        nearest_template, class_only, second_pass: errors of the nearest template's pose, of classes without flow, and
            of the pipeline with a second pass.
        turned: errors by in-plane turn, in degrees, with templates turned in steps.
        hypotheses: of each rank, errors of that hypothesis.
        patches: classes against labels.
        view_errors: (R,) degrees between the retrieved template's view and the true one.
    """

    answers: list[Answer]
    errors: list[Errors]
    nearest_template: list[Errors]
    class_only: list[Errors]
    second_pass: list[Errors]
    turned: dict[float, list[Errors]] = field(default_factory=dict)
    hypotheses: list[list[Errors]] = field(default_factory=list)
    patches: PatchCounts = field(default_factory=PatchCounts)
    view_errors: np.ndarray = field(default_factory=lambda: np.zeros(0))


def measure(
    pipeline: VPOGPipeline,
    protocol: Protocol,
    *,
    num_turned: int = 64,
    num_turned_templates: int | None = None,
    num_patch_samples: int = 256,
    show_progress: bool = False,
) -> Measured:
    """Ask the pipeline in every way that is compared, and hold its answers against the truth.

    Args:
        num_turned: detections that are also turned in the picture; 0 leaves it out.
        num_turned_templates: how many of all turned templates the encoder leaves for the network then; None: all.
        num_patch_samples: queries whose patches are compared with labels.

    Raises:
        ValueError: one line: there is nothing to be found, or what the pipeline refuses.
    """
    if not protocol.targets:
        raise ValueError("`targets` must not be empty")

    def hold(rows: Sequence[PoseEstimate], with_vsd: bool = False) -> list[Errors]:
        return compare(protocol.dataset, protocol.models, protocol.targets, rows, with_vsd)

    def reply(**changes) -> list[Answer]:
        answering = protocol.answering.model_copy(update=changes)
        return ask_all(pipeline, protocol, answering, show_progress=show_progress)

    answers = reply()
    measured = Measured(
        answers,
        errors=hold(to_results(answers), with_vsd=True),
        nearest_template=hold(nearest_templates(protocol)),
        class_only=hold(to_results(reply(flow="none"))),
        second_pass=hold(to_results(reply(second_pass=True))),
        hypotheses=[hold(to_results(answers, rank)) for rank in range(protocol.answering.num_hypotheses)],
        patches=measure_patches(pipeline, protocol, num_patch_samples),
        view_errors=view_errors(protocol, answers),
    )
    if num_turned:
        measured.turned = measure_turned(pipeline, protocol, num_turned, num_turned_templates, show_progress)
    return measured


def view_errors(protocol: Protocol, answers: Sequence[Answer]) -> np.ndarray:
    """Degrees between retrieved and true views, of detections whose instance is known; else of the nearest one."""
    truths = {}
    for target in protocol.targets:
        key = target.frame.scene_id, target.frame.im_id, target.instance.obj_id
        truths.setdefault(key, {})[target.gt] = target.instance.camera_from_object
    errors = []
    for answer in answers:
        detection = answer.detection
        known = truths.get((detection.scene_id, detection.im_id, detection.object_id), {})
        poses = [known[detection.gt]] if detection.gt in known else list(known.values())
        symmetries = protocol.models[detection.object_id].symmetries
        if poses:
            errors.append(min(view_error(answer.direction, pose, symmetries) for pose in poses))
    return np.array(errors)


def measure_turned(
    pipeline: VPOGPipeline,
    protocol: Protocol,
    count: int,
    num_templates: int | None = None,
    show_progress: bool = False,
) -> dict[float, list[Errors]]:
    """Errors where pictures are turned by `TURNS` and so are the templates, of `count` detections with known masks."""
    known = {(each.frame.scene_id, each.frame.im_id, each.gt): each for each in protocol.targets}
    keys = [(each.scene_id, each.im_id, each.gt) for each in protocol.detections]
    numbers = [number for number, key in enumerate(keys) if key in known]
    if not numbers:
        return {}
    chosen = [numbers[row] for row in np.linspace(0, len(numbers) - 1, min(count, len(numbers))).round().astype(int)]
    detections, targets = [protocol.detections[n] for n in chosen], [known[keys[n]] for n in chosen]
    changes = {"in_plane": "rotate_templates", "num_templates": num_templates or protocol.answering.num_templates}
    answering = protocol.answering.model_copy(update=changes)
    answers = ask_all(pipeline, protocol, answering, detections=detections, turns=TURNS, show_progress=show_progress)
    return {
        turn_deg: compare(
            protocol.dataset,
            protocol.models,
            targets,
            to_results([each for each in answers if each.turn_deg == turn_deg]),
            with_vsd=False,
        )
        for turn_deg in TURNS
    }


def best_of(hypotheses: Sequence[Sequence[Errors]]) -> dict[str, float]:
    """Median rotation error of the best of the first 1, 2, ... hypotheses, which only the truth can tell."""
    rotations = np.minimum.accumulate([values_of(each, "rotation") for each in hypotheses], axis=0)
    return {str(number): float(np.median(row)) for number, row in enumerate(rotations, 1)}


def brief(errors: Sequence[Errors]) -> dict[str, float | None]:
    """The two figures that stand for a way of answering."""
    figures = pose_figures(errors)
    return {name: figures[name] for name in ("median_rotation_deg", "median_translation")}


def summarise(measured: Measured) -> dict:
    """metrics.json; what is in `pose_figures` is defined there."""
    rotations = {turn: values_of(errors, "rotation") for turn, errors in measured.turned.items()}
    in_plane = {}
    if rotations:
        in_plane = {"median_rotation_deg": float(np.median(np.concatenate(list(rotations.values()))))}
        in_plane["by_turn"] = {f"{turn:g}": float(np.median(values)) for turn, values in rotations.items()}
    rotation_of = {name: brief(getattr(measured, name)) for name in ("nearest_template", "class_only")}
    return {
        **pose_figures(measured.errors),
        **{name: {"median_rotation_deg": each["median_rotation_deg"]} for name, each in rotation_of.items()},
        **measured.patches.figures(),
        "view_error_deg": float(np.median(measured.view_errors)) if len(measured.view_errors) else None,
        "in_plane": in_plane,
        "second_pass": brief(measured.second_pass),
    }
