"""What the layout demo is measured against, and how the tags of its TensorBoard logs begin and end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tensorboard.backend.event_processing.event_accumulator import HISTOGRAMS, IMAGES, SCALARS, EventAccumulator

STAGES = ("stage1", "stage2", "stage3")
NAMES = {"no_layout": "base, no layout", "stage1": "stage 1", "stage2": "stage 2", "stage3": "stage 3"}
CHANCE = 1 / 16  # of an identity among 16


class Goal(NamedTuple):
    """A figure that is asked for; `value` None: not measured."""

    what: str
    asked: str
    value: float | None
    interval: list[float] | None
    reached: bool


def goal(what: str, sign: str, bound: float, value: float | None, interval: list[float | None] | None = None) -> Goal:
    """Whether a figure is at least, at most or above a bound."""
    reached = value is not None and {"≥": value >= bound, "≤": value <= bound, ">": value > bound}[sign]
    known = None if interval is None or None in interval else interval
    return Goal(what, f"{sign} {bound:g}", value, known, reached)


def find_goals(metrics: Mapping[str, Any]) -> list[Goal]:
    """What is asked for of the demo, in the order of its stages.

    Args:
        metrics: of metrics.json: `summarise` of every model, and `comparisons`.
    """
    return [*of_boxes(metrics), *of_identity(metrics), *of_feedback(metrics)]


def of_boxes(metrics: Mapping[str, Any]) -> list[Goal]:
    """Stage 1: objects in their boxes, in their depth, and nowhere else."""
    base, first = metrics["no_layout"], metrics["stage1"]

    def figure(model: str, key: str, what: str, sign: str, bound: float) -> Goal:
        values = metrics[model]
        return goal(f"{NAMES[model]}: {what}", sign, bound, values[key], values["intervals"][key])

    gain = (
        None
        if None in (first["shape_accuracy"], base["shape_accuracy"])
        else (first["shape_accuracy"] - base["shape_accuracy"])
    )
    classes = {
        name: first["further"].get(f"alpha_agreement_{name}", {}).get("mean") for name in ("foreground", "background")
    }
    return [
        figure("stage1", "colour_accuracy", "colour in boxes", "≥", 0.7),
        figure("no_layout", "colour_accuracy", "colour in boxes", "≤", 0.25),
        figure("stage1", "box_iou", "box IoU", "≥", 0.55),
        figure("stage1", "mask_iou", "mask IoU", "≥", 0.5),
        figure("no_layout", "mask_iou", "mask IoU", "≤", 0.2),
        goal("stage 1: shape, above the base's by", "≥", 0.2, gain),
        *(figure(name, "background_accuracy", "background outside boxes", "≥", 0.9) for name in STAGES),
        *(figure(name, "swap", "colours follow swapped prompts", "≥", 0.6) for name in STAGES),
        figure("stage1", "alpha_agreement", "alpha tells foreground", "≥", 0.8),
        *(goal(f"stage 1: alpha, {name} alone", "≥", 0.6, value) for name, value in classes.items()),
    ]


def of_identity(metrics: Mapping[str, Any]) -> list[Goal]:
    """Stage 2: identities that no caption names, from references of unseen ones."""
    first, second = metrics["stage1"], metrics["stage2"]
    change = metrics["comparisons"]["stage2 - stage1"]
    dino, boxes = change["dino_similarity"], change["box_iou"]
    return [
        Goal(
            "stage 2 − stage 1: DINO cosine to reference",
            "> 0, all the interval",
            *with_interval(dino),
            reached=dino["low"] is not None and dino["low"] > 0,
        ),
        goal("stage 2: identity among 16", "≥", 0.3, *figure_of(second, "identity_retrieval")),
        goal("stage 1: identity among 16", "≤", 0.15, *figure_of(first, "identity_retrieval")),
        goal("stage 2: identity, references shuffled", "≤", 0.15, *figure_of(second, "identity_shuffled")),
        goal("stage 2 − stage 1: box IoU", "≥", -0.03, *with_interval(boxes)),
        goal("stage 2: change outside / inside boxes", "≤", 0.1, *figure_of(second, "outside_drift")),
    ]


def of_feedback(metrics: Mapping[str, Any]) -> list[Goal]:
    """Stage 3: the bridge on against off, from the same weights and noise."""
    bridge = metrics["stage3"]["feedback"]
    gain = bridge["on_minus_off"]
    flow = gain["flow_loss"]
    return [
        goal("stage 3: magnitude of the feedback", ">", 0, bridge["magnitude"]),
        goal("bridge on − off: change of a picture, of 255", ">", 0, bridge["picture_change"]),
        goal("bridge on − off: identity among 16", "≥", -0.02, *with_interval(gain["identity_retrieval"])),
        goal("bridge on − off: box IoU", "≥", -0.02, *with_interval(gain["box_iou"])),
        Goal("bridge on − off: flow loss", "≤ 0, some of the interval", *with_interval(flow), reached=flow["low"] <= 0),
    ]


def figure_of(values: Mapping[str, Any], key: str) -> tuple[float | None, list[float | None]]:
    return values[key], values["intervals"][key]


def with_interval(estimate: Mapping[str, Any]) -> tuple[float | None, list[float | None]]:
    return estimate["mean"], [estimate["low"], estimate["high"]]


# --- TensorBoard ----------------------------------------------------------------------------------------------------


def read_tags(run_dir: Path) -> dict[str, dict]:
    """How every tag of a run's TensorBoard log begins and ends.

    Returns:
        By tag `kind`, `first_step` and `last_step`; `start` and `end`: values of scalars, means of histograms, and for
        pictures the files in the run's `samples`.
    """
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={SCALARS: 0, HISTOGRAMS: 0, IMAGES: 0})
    events.Reload()
    tags, found = events.Tags(), {}
    for tag in tags[SCALARS]:
        found[tag] = ends_of("scalar", events.Scalars(tag), lambda each: each.value)
    for tag in tags[HISTOGRAMS]:
        found[tag] = ends_of("histogram", events.Histograms(tag), mean_of_histogram)
    for tag in tags[IMAGES]:
        found[tag] = ends_of("picture", events.Images(tag), partial(picture_name, tag))
    return dict(sorted(found.items()))


def ends_of(kind: str, entries: Sequence[Any], value_of: Callable[[Any], Any]) -> dict:
    """The first and the last of a tag's entries."""
    first, last = entries[0], entries[-1]
    ends = {"start": value_of(first), "end": value_of(last)}
    return {"kind": kind, **ends, "first_step": first.step, "last_step": last.step}


def mean_of_histogram(entry: Any) -> float:
    return entry.histogram_value.sum / max(1, entry.histogram_value.num)


def picture_name(tag: str, entry: Any) -> str:
    return f"samples/{tag}-{entry.step:06d}.png"
