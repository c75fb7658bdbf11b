"""What public layout benchmarks measure, from boxes that a detector found and answers that a language model gave.

Detections: {request id: [per instance {"boxes": [[x1, y1, x2, y2], ...] fractions, "scores": [...],
"colour_share": share of the object's pixels that have the colour asked for, or None; COCO-MIG only}]}.
Answers: {request id: [per instance {question: the answer's text}]}, questions as `questions` asks them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from evaluation.layout_flux.benchmarks.formats import Box, Request

MIN_IOU = 0.5
"""Below it an object is not where it was asked for (DenseLayout, COCO-MIG)."""
MIN_COLOUR_SHARE = 0.2
"""COCO-MIG: of an object's pixels."""
ATTRIBUTES = ("color", "texture", "shape")
HSV_RANGES = {
    "red": (((0, 43, 35), (6, 255, 255)), ((156, 43, 35), (180, 255, 255))),
    "blue": (((78, 43, 35), (124, 255, 255)),),
    "green": (((35, 43, 35), (77, 255, 255)),),
    "yellow": (((20, 43, 35), (34, 255, 255)),),
    "black": (((0, 0, 0), (180, 255, 35)),),
    "white": (((0, 0, 221), (180, 43, 255)),),
    "brown": (((6, 43, 35), (25, 255, 255)),),
}
"""COCO-MIG's colours: hue in half degrees, saturation and value up to 255."""

Detections = Mapping[str, Sequence[Mapping]]
Answers = Mapping[str, Sequence[Mapping[str, str]]]


def box_ious(box: Box, others: Sequence[Sequence[float]]) -> np.ndarray:
    """Intersection over union of a box with each of others, (N,); 0 for boxes without area."""
    others = np.asarray(others, float).reshape(-1, 4)
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    shared = (high - low).clip(min=0).prod(1)
    areas = (others[:, 2:] - others[:, :2]).clip(min=0).prod(1)
    union = areas + max(box[2] - box[0], 0) * max(box[3] - box[1], 0) - shared
    return shared / np.where(union > 0, union, 1)


def best_match(box: Box, found: Mapping) -> tuple[float, Box | None]:
    """The best IoU with what was found, and that box; 0 and None without any. Objects may share a detection."""
    ious = box_ious(box, found["boxes"])
    if not len(ious) or ious.max() == 0:
        return 0.0, None
    return float(ious.max()), tuple(found["boxes"][int(ious.argmax())])


def colour_mask(pixels: np.ndarray, colour: str) -> np.ndarray:
    """Which pixels COCO-MIG takes to have a colour.

    Args:
        pixels: (..., 3) uint8 RGB.

    Returns:
        (...) bool.
    """
    rgb = pixels.astype(np.float64)
    value, least = rgb.max(-1), rgb.min(-1)
    chroma = value - least
    red, green, blue = np.moveaxis(rgb, -1, 0)
    over = np.where(chroma > 0, chroma, 1)
    hue = np.select(
        [chroma == 0, value == red, value == green],
        [0.0, 60 * (green - blue) / over, 120 + 60 * (blue - red) / over],
        240 + 60 * (red - green) / over,
    )
    saturation = 255 * chroma / np.where(value > 0, value, 1)
    hsv = np.rint(np.stack([hue % 360 / 2, saturation, value], -1))
    return np.any([((hsv >= low) & (hsv <= high)).all(-1) for low, high in HSV_RANGES[colour]], axis=0)


# --- scores ---------------------------------------------------------------------------------------------------------


def score_lgs(requests: Sequence[Request], detections: Detections, answers: Answers | None = None) -> dict:
    """DenseLayout's layout grounding score (arXiv 2509.16691): means over all boxes.

    A box scores the best IoU of what was found for its label, 0 below `MIN_IOU`; an attribute scores that IoU where the
    answer about the detected crop is yes. As in the benchmark's own program, an object whose caption is its label
    scores 0 for attributes, and two objects may share a detection.
    """
    asked = [request for request in requests if request.id in detections]
    totals, count = dict.fromkeys(("iou", *ATTRIBUTES), 0.0), 0
    for request in asked:
        for place, (instance, found) in enumerate(_pairs(request, detections)):
            count += 1
            iou = best_match(instance.box, found)[0]
            if iou < MIN_IOU:
                continue
            totals["iou"] += iou
            if answers is not None and instance.label != instance.caption:
                given = _answers_of(answers, request, place)
                for name in ATTRIBUTES:
                    totals[name] += iou * is_yes(given.get(name))
    names = totals if answers is not None else ("iou",)
    return _counts(requests, asked, count) | {name: totals[name] / count if count else None for name in names}


def score_layoutsam(requests: Sequence[Request], answers: Answers) -> dict:
    """LayoutSAM-Eval (arXiv 2412.03859): shares of all boxes for which the answers are yes.

    `spatial`: the object is in the crop of its box; an attribute counts only where it is.
    """
    asked = [request for request in requests if request.id in answers]
    totals, count = dict.fromkeys(("spatial", *ATTRIBUTES), 0), 0
    for request in asked:
        for place in range(len(request.instances)):
            count += 1
            given = _answers_of(answers, request, place)
            if is_yes(given.get("spatial")):
                for name in totals:
                    totals[name] += is_yes(given.get(name))
    return _counts(requests, asked, count) | {name: n / count if count else None for name, n in totals.items()}


def score_coco_mig(requests: Sequence[Request], detections: Detections) -> dict:
    """COCO-MIG (arXiv 2402.05408): of all pictures, and of those with 2, 3, ... objects.

    An instance succeeds if something of its class is found with an IoU of at least `MIN_IOU` and its colour covers at
    least `MIN_COLOUR_SHARE` of it. `success_rate`: pictures in which all succeed; `instance_success_rate`; `miou`: the
    mean IoU, 0 where the colour is wrong (an IoU below `MIN_IOU` counts as it is, as in the benchmark's own program).
    """
    asked = [request for request in requests if request.id in detections]
    rows: dict[int, list[list[tuple[float, bool]]]] = {}
    for request in asked:
        row = [_mig_instance(instance.box, found) for instance, found in _pairs(request, detections)]
        rows.setdefault(len(row), []).append(row)
    levels = {str(level): _mig_means(rows[level]) for level in sorted(rows)}
    every = [row for level in rows.values() for row in level]
    return _counts(requests, asked, sum(map(len, every))) | _mig_means(every) | {"levels": levels}


def _mig_instance(box: Box, found: Mapping) -> tuple[float, bool]:
    """IoU that counts, and success."""
    iou = best_match(box, found)[0]
    if iou < MIN_IOU:
        return iou, False
    share = found.get("colour_share")
    if share is None:
        raise ValueError("a detection of COCO-MIG has no colour_share: they are made with --segmenter")
    return (iou, True) if share >= MIN_COLOUR_SHARE else (0.0, False)


def _mig_means(rows: Sequence[Sequence[tuple[float, bool]]]) -> dict:
    instances = [instance for row in rows for instance in row]
    if not instances:
        return dict.fromkeys(("success_rate", "instance_success_rate", "miou"))
    return {
        "success_rate": float(np.mean([all(success for _, success in row) for row in rows])),
        "instance_success_rate": float(np.mean([success for _, success in instances])),
        "miou": float(np.mean([iou for iou, _ in instances])),
    }


def _counts(requests: Sequence[Request], asked: Sequence[Request], count: int) -> dict:
    """What a reader must know of any of these scores."""
    return {"num_pictures": len(asked), "num_missing": len(requests) - len(asked), "num_instances": count}


def _pairs(request: Request, detections: Detections):
    found = detections[request.id]
    if len(found) != len(request.instances):
        raise ValueError(f"picture {request.id}: {len(request.instances)} objects, detections of {len(found)}")
    return zip(request.instances, found, strict=True)


def _answers_of(answers: Answers, request: Request, place: int) -> Mapping[str, str]:
    given = answers.get(request.id, ())
    return given[place] if place < len(given) else {}


def is_yes(answer: str | None) -> bool:
    return answer is not None and "yes" in answer.lower()


# --- what a language model is asked ---------------------------------------------------------------------------------


def questions(requests: Sequence[Request], detections: Detections | None = None) -> list[dict]:
    """Every question, with the part of the picture that it is about, for a vision-language model of your choice.

    LayoutSAM-Eval asks about the boxes as annotated; DenseLayout about the box that was found, where it counts. The
    papers ask MiniCPM-V-2.6, each question in a conversation of its own.

    Args:
        detections: of DenseLayout; none for LayoutSAM-Eval.
    """
    asked = []
    for request in requests:
        if detections is not None and request.id not in detections:
            continue
        for place, instance in enumerate(request.instances):
            box, names = instance.box, ("spatial", *ATTRIBUTES)
            if detections is not None:
                iou, box = best_match(instance.box, detections[request.id][place])
                names = ATTRIBUTES
                if iou < MIN_IOU or instance.label == instance.caption:
                    continue
            texts = {name: _question(name, instance.label, instance.caption) for name in names}
            asked += [
                {"id": request.id, "instance": place, "name": name, "box": list(box), "question": text}
                for name, text in texts.items()
            ]
    return asked


def _question(name: str, label: str, caption: str) -> str:
    strictly = 'Strictly answer with "Yes" or "No", without any irrelevant words.'
    if name == "spatial":
        return f'Is the subject "{label}" present in the image? {strictly}'
    return (
        f'Is the subject in "{label}" in the image consistent with the {name} described in the detailed description: '
        f'"{caption}"? {strictly} If the {name} is not mentioned in the detailed description, the answer is "Yes".'
    )


def gather_answers(requests: Sequence[Request], rows: Sequence[Mapping]) -> dict[str, list[dict[str, str]]]:
    """Answered questions -> answers; ValueError for one about an object that nobody asked for."""
    sizes = {request.id: len(request.instances) for request in requests}
    answers: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        missing = {"id", "instance", "name", "answer"} - row.keys()
        if missing:
            raise ValueError(f"an answered question lacks {', '.join(sorted(missing))}: {dict(row)}")
        if not 0 <= row["instance"] < sizes.get(row["id"], 0):
            raise ValueError(f"an answer is about object {row['instance']} of {row['id']}, which nobody asked for")
        per_instance = answers.setdefault(row["id"], [{} for _ in range(sizes[row["id"]])])
        per_instance[row["instance"]][row["name"]] = str(row["answer"])
    return answers
