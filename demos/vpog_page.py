"""The page of the pose demo: queries, templates, correspondences and poses, the best and the worst, and the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from backlot.cameras import warp
from backlot.mesh_views import render_views
from demos import common, report
from demos.vpog_figures import find_goals
from evaluation.vpog.drawing import (
    ESTIMATE_COLOUR,
    TRUE_COLOUR,
    draw_axes,
    draw_correspondences,
    draw_histogram,
    draw_outline,
)
from evaluation.vpog.errors import pose_figures, values_of
from evaluation.vpog.measure import Answer, Measured, Protocol
from pipelines.vpog.templates import TemplateSet, template_path

SIDE = 192
"""Pixels of a crop on the page."""
NUM_TEMPLATES, NUM_CASES = 3, 6
GAP, INK = 6, (40, 50, 60)
ANSWERS = {
    "errors": "pipeline",
    "second_pass": "with a second pass",
    "class_only": "classes without flow",
    "nearest_template": "nearest template",
}


def write_page(output_dir: Path, protocol: Protocol, measured: Measured, metrics: Mapping[str, Any]) -> None:
    """Write report.html."""
    rotation = rotation_errors(protocol, measured)
    order = np.argsort(rotation)
    spread = np.linspace(0, len(order) - 1, NUM_CASES).round().astype(int)
    typical = sorted(int(row) for row in order[spread])
    worst = [int(row) for row in order[::-1][:NUM_CASES]]
    caption = "From the left: the picture, the three templates that the pose was made from, correspondences that agree"
    caption += " with it, and the pose: green the true outline, orange the estimated one."
    sections = [
        ("What was asked, and what was reached", goal_table(metrics)),
        ("Poses", report.picture(show_cases(protocol, measured, typical, rotation), f"Best to worst. {caption}")),
        ("The worst", report.picture(show_cases(protocol, measured, worst, rotation), caption)),
        ("Whole pictures", report.picture(show_pictures(protocol, measured), "Estimated axes and outlines.")),
        ("Against simpler answers", answer_table(measured)),
        ("Errors", report.picture(show_errors(measured), "Rotation errors; the last bar holds all that is above.")),
        ("By what is hidden, and by turns in the picture", hidden_table(metrics) + turn_table(metrics)),
        ("Training", report.line_chart({"loss": common.read_curve(output_dir / "run")}, "Loss of the run.")),
    ]
    lead = "Poses of objects that the network has never seen, from templates rendered of their meshes."
    (output_dir / "report.html").write_text(report.page("VPOG: pose from templates", lead, sections), encoding="utf-8")


# --- pictures -------------------------------------------------------------------------------------------------------


def rotation_errors(protocol: Protocol, measured: Measured) -> np.ndarray:
    """(R,) degrees of the answers, each held against the instance that it was asked for."""
    from evaluation.vpog.metrics import pose_error

    errors = []
    for answer, target in zip(measured.answers, protocol.targets, strict=True):
        symmetries = protocol.models[answer.detection.object_id].symmetries
        found = answer.hypotheses[0].camera_from_object
        errors.append(pose_error(found, target.instance.camera_from_object, symmetries)[0])
    return np.array(errors)


def to_pixels(values: torch.Tensor) -> np.ndarray:
    """(3, H, W) in 0 ... 255 -> (H, W, 3) uint8."""
    return values.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def cut_out(protocol: Protocol, answer: Answer) -> tuple[np.ndarray, np.ndarray]:
    """The crop of an answer, enlarged to SIDE pixels, and its camera."""
    frame = protocol.frames[answer.detection.scene_id, answer.detection.im_id]
    rgb = torch.from_numpy(protocol.dataset.rgb(frame.scene_id, frame.im_id).copy()).permute(2, 0, 1)[None].float()
    size = crop_side(protocol, answer)
    factor = SIDE / size
    enlarged = np.array([[factor, 0, (factor - 1) / 2], [0, factor, (factor - 1) / 2], [0, 0, 1]])
    affine = enlarged @ answer.hypotheses[0].crop_from_picture
    return to_pixels(warp(rgb, torch.from_numpy(affine)[None], SIDE)[0]), affine @ frame.K


def crop_side(protocol: Protocol, answer: Answer) -> int:
    """Pixels of the crop that the network saw: those of the templates."""
    return templates_of(protocol, answer).rgba.shape[1]


def templates_of(protocol: Protocol, answer: Answer) -> TemplateSet:
    return TemplateSet.load(template_path(protocol.templates, answer.detection.object_id))


def outline(picture: np.ndarray, mesh, pose: np.ndarray, camera: np.ndarray, colour: tuple[int, int, int]):
    """A picture with the outline of a mesh at a pose."""
    seen = render_views([mesh], pose[None, None], camera, picture.shape[:2], supersample=1)
    return draw_outline(picture, seen.instances[0] >= 0, colour)


def show_case(protocol: Protocol, measured: Measured, row: int, error: float) -> Image.Image:
    """One answer in a row of cells."""
    answer, target = measured.answers[row], protocol.targets[row]
    found, templates = answer.hypotheses[0], templates_of(protocol, answer)
    mesh = protocol.models[answer.detection.object_id].load_mesh()
    picture, K = cut_out(protocol, answer)
    chosen = list(dict.fromkeys(int(number) for number in found.template_indices))[:NUM_TEMPLATES]
    cells = [picture] + [enlarge(templates.rgba[number][..., :3]) for number in chosen]
    cells += [np.full_like(picture, 255)] * (1 + NUM_TEMPLATES - len(cells))
    cells.append(lines_between(picture, templates, found))
    drawn = outline(picture, mesh, target.instance.camera_from_object, K, TRUE_COLOUR)
    drawn = outline(drawn, mesh, found.camera_from_object, K, ESTIMATE_COLOUR)
    cells.append(draw_axes(drawn, found.camera_from_object, K, 0.5 * templates.diameter))
    width = sum(cell.shape[1] for cell in cells) + GAP * (len(cells) - 1)
    canvas = Image.new("RGB", (width, SIDE + 20), "white")
    left = 0
    for cell in cells:
        canvas.paste(Image.fromarray(cell), (left, 20))
        left += cell.shape[1] + GAP
    seen = f"{target.instance.visib_fract:.0%} seen"
    text = f"object {answer.detection.object_id}, {seen}: {error:.1f}° off, score {found.score:.2f}"
    ImageDraw.Draw(canvas).text((2, 2), text, fill=INK, font=ImageFont.load_default(size=14))
    return canvas


def enlarge(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def lines_between(picture: np.ndarray, templates: TemplateSet, found) -> np.ndarray:
    """Correspondences with the first template that agree with the pose."""
    first = int(found.template_indices[0])
    template, factor = enlarge(templates.rgba[first][..., :3]), SIDE / templates.rgba.shape[1]
    pairs = found.correspondences.select(torch.from_numpy(found.inliers))
    pairs = pairs.select(pairs.templates == 0)
    pose = torch.from_numpy(np.asarray(templates.camera_from_object[first], float))
    seen = (pairs.points @ pose[:3, :3].T + pose[:3, 3]) @ torch.from_numpy(np.asarray(templates.K, float)).T
    places = (seen[:, :2] / seen[:, 2:]).numpy() if len(pairs) else np.zeros((0, 2))
    return draw_correspondences(picture, template, pairs.places.numpy() * factor, places * factor, max_lines=40)


def stack(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures below one another."""
    width = max(picture.width for picture in pictures)
    canvas = Image.new("RGB", (width, sum(picture.height + GAP for picture in pictures)), "white")
    top = 0
    for picture in pictures:
        canvas.paste(picture, (0, top))
        top += picture.height + GAP
    return canvas


def show_cases(protocol: Protocol, measured: Measured, rows: Sequence[int], errors: np.ndarray) -> Image.Image:
    return stack([show_case(protocol, measured, row, float(errors[row])) for row in rows])


def show_pictures(protocol: Protocol, measured: Measured, count: int = 6, columns: int = 3) -> Image.Image:
    """Some whole pictures with everything that was found in them."""
    keys = list(dict.fromkeys((each.detection.scene_id, each.detection.im_id) for each in measured.answers))
    chosen = [keys[row] for row in np.linspace(0, len(keys) - 1, min(count, len(keys))).round().astype(int)]
    cells = []
    for key in chosen:
        frame, factor = protocol.frames[key], 2
        picture = Image.fromarray(protocol.dataset.rgb(frame.scene_id, frame.im_id))
        picture = np.asarray(
            picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)
        )
        K = np.array([[factor, 0, (factor - 1) / 2], [0, factor, (factor - 1) / 2], [0, 0, 1]]) @ frame.K
        for answer in measured.answers:
            if (answer.detection.scene_id, answer.detection.im_id) == key:
                model, pose = protocol.models[answer.detection.object_id], answer.hypotheses[0].camera_from_object
                picture = outline(picture, model.load_mesh(), pose, K, ESTIMATE_COLOUR)
                picture = draw_axes(picture, pose, K, 0.5 * model.diameter)
        cells.append(picture)
    height, width = cells[0].shape[:2]
    rows = -(-len(cells) // columns)
    canvas = Image.new("RGB", (columns * (width + GAP), rows * (height + GAP)), "white")
    for number, cell in enumerate(cells):
        canvas.paste(Image.fromarray(cell), (number % columns * (width + GAP), number // columns * (height + GAP)))
    return canvas


def show_errors(measured: Measured) -> Image.Image:
    """Histograms of rotation errors of all ways of answering."""
    values = {title: values_of(getattr(measured, name), "rotation") for name, title in ANSWERS.items()}
    return Image.fromarray(draw_histogram(values, np.arange(0, 65, 5), "°", (720, 160)))


# --- tables ---------------------------------------------------------------------------------------------------------


def goal_table(metrics: Mapping[str, Any]) -> str:
    rows = [[goal.what, goal.asked, goal.told, "yes" if goal.reached else "no"] for goal in find_goals(metrics)]
    return report.table(["", "asked", "reached", ""], rows)


def answer_table(measured: Measured) -> str:
    """Ways of answering beside one another."""
    rows = []
    for name, title in ANSWERS.items():
        figures = pose_figures(getattr(measured, name))
        shares = [*figures["acc_5_10_20"], figures["mssd_recall"]["0.20"], figures["mspd_recall"]["8/64"]]
        translation = figures["median_translation"]
        rows.append(
            [
                title,
                f"{figures['median_rotation_deg']:.1f}°",
                "–" if translation is None else f"{translation:.3f}",
                *(f"{share:.2f}" for share in shares),
            ]
        )
    header = ["", "rotation", "translation / d", "< 5°", "< 10°", "< 20°", "MSSD < .2 d", "MSPD < 8 px of 64"]
    return report.table(header, rows)


def hidden_table(metrics: Mapping[str, Any]) -> str:
    rows = [
        [f"{name} of it seen", str(each["count"]), f"{each['median_rotation_deg']:.1f}°", f"{each['acc_10']:.2f}"]
        for name, each in metrics["by_occlusion"].items()
    ]
    return report.table(["", "objects", "rotation", "< 10°"], rows)


def turn_table(metrics: Mapping[str, Any]) -> str:
    turns = metrics["in_plane"].get("by_turn", {})
    return report.table(
        ["turned by", *(f"{turn}°" for turn in turns)], [["rotation", *(f"{v:.1f}°" for v in turns.values())]]
    )
