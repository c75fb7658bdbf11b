"""How well a layout adapter puts objects into their boxes and keeps their identity: its pictures of unseen scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from tqdm import tqdm

from data_prep.layouts.procedural import ProceduralSettings
from evaluation.layout_flux.drawing import Drawing, draw, flow_losses
from evaluation.layout_flux.examples import Example, exchange, other_references, pairs_to_swap
from evaluation.layout_flux.identity import Similarity
from evaluation.layout_flux.metrics import (
    background_accuracy,
    colours_swapped,
    identity_retrieval,
    measure_objects,
    outside_drift,
)
from evaluation.layout_flux.settings import Sampling, Variants
from evaluation.layout_flux.statistics import NOTHING, Estimate, Table, difference, estimate
from pipelines.layout_flux.layout import FOREGROUND_ALPHA
from pipelines.layout_flux.pipeline import FluxLayoutPipeline

KEYS = (
    *("colour_accuracy", "shape_accuracy", "mask_iou", "box_iou", "lgs50", "background_accuracy", "swap"),
    *("alpha_agreement", "dino_similarity", "identity_retrieval", "identity_shuffled", "leakage", "outside_drift"),
)
"""What every model is measured by; the same for all, None where it means nothing."""
OBJECT_KEYS = ("colour_accuracy", "shape_accuracy", "mask_iou", "box_iou", "lgs50", "alpha_agreement")
OBJECT_KEYS += ("dino_similarity", "clip_similarity", "identity_retrieval", "leakage", "overlap_accuracy")
LAYOUT_KEYS = ("background_accuracy", "flow_loss")


@dataclass(frozen=True)
class Protocol:
    """What pictures are drawn and how they are measured; the same for all models that are compared.

    Args:
        scenes: the settings that the scenes were drawn by.
        similarity: DINO's and CLIP's encoders; without them there is no similarity and no leakage.
    """

    examples: Sequence[Example]
    scenes: ProceduralSettings
    variants: Variants
    sampling: Sampling
    similarity: Similarity | None = None
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self):
        if not self.examples:
            raise ValueError("`examples` must not be empty")

    @property
    def noise(self) -> dict[str, int]:
        """What `draw` is told of noise and batches."""
        return {"seed": self.seed, "batch_size": self.batch_size}


@dataclass
class Measured:
    """All figures of one model; layouts are numbered as the protocol's examples.

    Args:
        objects, layouts: of the pictures of all layouts: a row per object, a row per layout.
        shuffled: `identity_shuffled` of objects that were given another's reference.
        swapped: `swap`, a row per pair of objects.
        drift: change `outside` and `inside` of boxes, a row per layout, when references are other ones.
        without_feedback: the same model with its bridge off, on as many layouts as it was asked for.
        feedback: of the bridge: `magnitude`, and how far it changes pictures, of 255: `picture_change`.
        pictures: by variant (layouts, H, W, 3) uint8.
        alphas: predicted, of the objects of each layout.
    """

    objects: Table
    layouts: Table
    shuffled: Table
    swapped: Table
    drift: Table
    without_feedback: Measured | None = None
    feedback: dict[str, float] = field(default_factory=dict)
    pictures: dict[str, np.ndarray] = field(default_factory=dict)
    alphas: list[list[float]] | None = None

    def first(self, count: int) -> Measured:
        """Figures of the first layouts alone; of what was drawn for all of them."""
        tables = {name: getattr(self, name) for name in ("objects", "layouts")}
        return replace(self, **{name: table.where(table.layouts < count) for name, table in tables.items()})


def measure(
    pipeline: FluxLayoutPipeline, protocol: Protocol, *, with_layout: bool = True, show_progress: bool = False
) -> Measured:
    """Draw every variant and measure it.

    Args:
        with_layout: False: the base alone, which draws one picture for all variants.

    Raises:
        ValueError: the pictures are not finite, or what the pipeline refuses.
    """
    examples, variants = protocol.examples, protocol.variants
    bridged = with_layout and len(pipeline.layout_adapter.bridges) > 0
    number = min(len(examples), variants.num_layouts)
    parts = {
        "plain": number,
        "shuffled": min(number, variants.num_shuffled),
        "swapped": min(number, variants.num_swapped),
        "without_feedback": min(number, variants.num_without_feedback) if bridged else 0,
    }
    with tqdm(total=sum(parts.values()), unit="layout", disable=not show_progress) as progress:
        measured = measure_plain(pipeline, protocol, examples[:number], with_layout)
        progress.update(number)
        if parts["shuffled"]:
            measure_shuffled(pipeline, protocol, parts["shuffled"], measured, with_layout)
            progress.update(parts["shuffled"])
        if parts["swapped"]:
            measure_swapped(pipeline, protocol, parts["swapped"], measured, with_layout)
            progress.update(parts["swapped"])
        if parts["without_feedback"]:
            measure_feedback(pipeline, protocol, examples[: parts["without_feedback"]], measured)
            progress.update(parts["without_feedback"])
    return measured


def measure_plain(
    pipeline: FluxLayoutPipeline,
    protocol: Protocol,
    examples: Sequence[Example],
    with_layout: bool = True,
    feedback: bool = True,
) -> Measured:
    """What is asked for, drawn and measured."""
    switches = {"with_layout": with_layout, "feedback": feedback}
    items = [example.item for example in examples]
    drawing = draw(pipeline, items, protocol.sampling, **protocol.noise, **switches)
    losses, magnitude = flow_losses(pipeline, items, **protocol.noise, **switches)
    layouts, empty = Table(np.arange(len(examples))), Table(np.zeros(0, int))
    pairs = list(zip(drawing.pictures, examples, strict=True))
    layouts.add("background_accuracy", [background_accuracy(p, e.scene, protocol.scenes) for p, e in pairs])
    layouts.add("flow_loss", losses)
    return Measured(
        objects=measure_every_object(protocol, examples, drawing),
        layouts=layouts,
        shuffled=empty,
        swapped=empty,
        drift=empty,
        feedback={} if magnitude is None else {"magnitude": magnitude},
        pictures={"plain": drawing.pictures},
        alphas=drawing.alphas,
    )


def measure_every_object(protocol: Protocol, examples: Sequence[Example], drawing: Drawing) -> Table:
    """A row per object: in its box, in its depth, and with its identity."""
    rows, layouts, identities = [], [], []
    for number, (picture, example) in enumerate(zip(drawing.pictures, examples, strict=True)):
        found = measure_objects(picture, example.scene, protocol.scenes)
        rows += found
        layouts += [number] * len(found)
        identities += identity_retrieval(picture, example.scene, example.references, protocol.scenes)
    table = Table(np.array(layouts))
    for name in rows[0]:
        table.add(name, [row[name] for row in rows])
    table.add("identity_retrieval", identities)
    if drawing.alphas is not None:
        alphas = np.concatenate([row[: len(e.scene.objects)] for row, e in zip(drawing.alphas, examples, strict=True)])
        table.add("alpha", alphas)
        table.add("alpha_agreement", (alphas >= FOREGROUND_ALPHA) == (table.columns["is_foreground"] > 0))
    if protocol.similarity is not None:
        for name, values in protocol.similarity.measure(drawing.pictures, examples).items():
            table.add(name, values)
    return table


def measure_shuffled(
    pipeline: FluxLayoutPipeline, protocol: Protocol, count: int, measured: Measured, with_layout: bool
) -> None:
    """With the references of other identities."""
    others = other_references(protocol.examples, protocol.seed)[:count]
    pictures = measured.pictures["plain"][:count]
    if with_layout:
        pictures = draw(pipeline, [item for item, _ in others], protocol.sampling, **protocol.noise).pictures
    is_other = [changed for _, changed in others]
    measured.pictures["shuffled"] = pictures
    measured.shuffled, measured.drift = score_shuffled(protocol, measured.pictures["plain"][:count], pictures, is_other)


def score_shuffled(
    protocol: Protocol, plain: np.ndarray, pictures: np.ndarray, is_other: Sequence[np.ndarray]
) -> tuple[Table, Table]:
    """Whether objects still look like their own references, and what changes beside them.

    Args:
        plain, pictures: of the first layouts, with their own references and with others, (B, H, W, 3) uint8.
        is_other: of each layout, which objects (N,) were given another reference.

    Returns:
        `identity_shuffled`, a row per object with another reference; change `outside` and `inside`, a row per layout.
    """
    numbers, found, drifts = [], [], []
    for number, changed in enumerate(is_other):
        example = protocol.examples[number]
        retrieved = identity_retrieval(pictures[number], example.scene, example.references, protocol.scenes)
        numbers += [number] * int(changed.sum())
        found += np.array(retrieved)[changed].tolist()
        if changed.any():
            drifts.append((number, *outside_drift(plain[number], pictures[number], example.scene)))
    shuffled = Table(np.array(numbers, int))
    shuffled.add("identity_shuffled", found)
    columns = np.array(drifts, float).reshape(-1, 3).T
    drift = Table(columns[0].astype(int))
    drift.add("outside", columns[1])
    drift.add("inside", columns[2])
    return shuffled, drift


def measure_swapped(
    pipeline: FluxLayoutPipeline, protocol: Protocol, count: int, measured: Measured, with_layout: bool
) -> None:
    """With the descriptions of two boxes exchanged."""
    pairs = pairs_to_swap(protocol.examples[:count], protocol.seed)
    if not pairs:
        return
    pictures = measured.pictures["plain"][[number for number, *_ in pairs]]
    if with_layout:
        items = [exchange(protocol.examples[number].item, first, second) for number, first, second in pairs]
        pictures = draw(pipeline, items, protocol.sampling, **protocol.noise).pictures
    measured.pictures["swapped"] = pictures
    measured.swapped = score_swapped(protocol, measured.pictures["plain"], pictures, pairs)


def score_swapped(
    protocol: Protocol, plain: np.ndarray, pictures: np.ndarray, pairs: Sequence[tuple[int, int, int]]
) -> Table:
    """Whether the colours of two boxes are exchanged with their descriptions: `swap`, a row per pair.

    Args:
        plain: pictures by number of the layout. pictures: one for each pair, both (B, H, W, 3) uint8.
    """
    table = Table(np.array([number for number, *_ in pairs], int))
    rows = [
        colours_swapped(plain[number], picture, protocol.examples[number].scene, first, second, protocol.scenes)
        for picture, (number, first, second) in zip(pictures, pairs, strict=True)
    ]
    table.add("swap", rows)
    return table


def measure_feedback(
    pipeline: FluxLayoutPipeline, protocol: Protocol, examples: Sequence[Example], measured: Measured
) -> None:
    """With the bridge off, from the same noise."""
    off = measure_plain(pipeline, protocol, examples, feedback=False)
    on = measured.pictures["plain"][: len(examples)].astype(float)
    measured.without_feedback = off
    measured.pictures["without_feedback"] = off.pictures["plain"]
    measured.feedback["picture_change"] = float(np.abs(on - off.pictures["plain"]).mean())


# --- figures --------------------------------------------------------------------------------------------------------


def estimates(measured: Measured) -> dict[str, Estimate]:
    """Every figure of a model, with its interval: `KEYS`, and what else was measured."""
    drift = measured.drift
    figures = {name: measured.objects.estimate(name) for name in OBJECT_KEYS}
    figures |= {name: measured.layouts.estimate(name) for name in LAYOUT_KEYS}
    figures["swap"] = measured.swapped.estimate("swap")
    figures["identity_shuffled"] = measured.shuffled.estimate("identity_shuffled")
    figures["outside_drift"] = (
        estimate(drift.columns["outside"], drift.layouts, drift.columns["inside"]) if len(drift) else NOTHING
    )
    right = measured.objects
    if "alpha_agreement" in right.columns:
        is_foreground = right.columns["is_foreground"] > 0
        figures["alpha_agreement_foreground"] = right.where(is_foreground).estimate("alpha_agreement")
        figures["alpha_agreement_background"] = right.where(~is_foreground).estimate("alpha_agreement")
    return figures


def groups_of(objects: Table) -> dict[str, np.ndarray]:
    """Which objects belong to each group, (R,) bool."""
    counts = objects.columns["num_objects"].astype(int)
    overlapped = objects.columns["overlapped"] > 0
    return {
        **{f"objects_{count}": counts == count for count in np.unique(counts)},
        "overlapped": overlapped,
        "not_overlapped": ~overlapped,
        "nearer": objects.columns["nearer"] > 0,
    }


def summarise(measured: Measured) -> dict:
    """The figures of a model for JSON: `KEYS` as plain numbers, intervals and counts beside them, and groups.

    `further` holds what else was measured, `feedback` what the bridge does, where there is one.
    """
    figures = estimates(measured)
    groups = {
        name: {key: measured.objects.where(chosen).estimate(key).to_json() for key in OBJECT_KEYS}
        for name, chosen in groups_of(measured.objects).items()
        if chosen.any()
    }
    result = {key: figures[key].mean for key in KEYS}
    result["intervals"] = {key: [figures[key].low, figures[key].high] for key in KEYS}
    result["counts"] = {key: figures[key].count for key in KEYS}
    result["further"] = {name: each.to_json() for name, each in figures.items() if name not in KEYS}
    result["groups"] = groups
    result["num_layouts"] = len(measured.layouts)
    if measured.without_feedback is not None:
        on = measured.first(len(measured.without_feedback.layouts))
        gain = {name: each.to_json() for name, each in compare(on, measured.without_feedback).items()}
        result["feedback"] = {**measured.feedback, "on_minus_off": gain}
    return result


def compare(after: Measured, before: Measured) -> dict[str, Estimate]:
    """Paired differences of two models, or of one with and without a part, on the same layouts and noise.

    Raises:
        ValueError: they were measured on other layouts.
    """
    differences = {name: difference(after.objects, before.objects, name) for name in OBJECT_KEYS}
    return differences | {name: difference(after.layouts, before.layouts, name) for name in LAYOUT_KEYS}
