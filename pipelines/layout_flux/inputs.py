"""What a user says of a picture's objects, checked and brought into the form of a `Layout`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines.layout_flux.adapter import SOURCES
from pipelines.layout_flux.layout import DEPTH_LABELS, Layout

GIVEN_ALPHA = {True: 0.75, False: 0.25}
"""What `foreground` means when it is said by yes or no: where training draws the two kinds to."""
Box = tuple[float, float, float, float]


@dataclass
class Instance:
    """One object asked for.

    Args:
        box: x1 y1 x2 y2 in [0, 1].
        prompt: what it is. reference: a picture of it, and where in it the object is.
        alpha: how much it is foreground, in [0, 1]; None: predicted.
        span: where the prompt speaks of it, half open: characters, or T5 tokens of a prompt given as embeddings.
        embeds: precomputed, by source.
    """

    box: Box
    prompt: str | None = None
    reference: tuple[Image.Image, Box] | None = None
    alpha: float | None = None
    span: tuple[int, int] | None = None
    embeds: dict[str, Tensor] = field(default_factory=dict)


def collect_instances(
    batch_size: int,
    max_refs: int,
    boxes: Sequence,
    box_prompts: Sequence | None = None,
    reference_images: Sequence | None = None,
    foreground: Sequence | None = None,
    phrase_spans: Sequence | None = None,
    instance_embeds: dict[str, Sequence] | None = None,
) -> list[list[Instance]]:
    """The instances of each picture; arguments as `FluxLayoutPipeline` takes them.

    Of a single picture they may be given without the outer list.

    Raises:
        ValueError: the argument, what is allowed and what was given.
    """
    boxes = boxes.tolist() if isinstance(boxes, np.ndarray | Tensor) else list(boxes)
    given = {
        "box_prompts": box_prompts,
        "reference_images": reference_images,
        "foreground": foreground,
        "phrase_spans": phrase_spans,
    }
    embeds = check_sources(instance_embeds or {})
    if batch_size == 1 and is_flat(boxes):
        boxes = [boxes]
        given = {name: None if value is None else [value] for name, value in given.items()}
        embeds = {name: [value] for name, value in embeds.items()}
    if len(boxes) != batch_size:
        raise ValueError(f"`boxes` must be a list for each of the {batch_size} prompts, got {len(boxes)}")
    counts = [len(own) for own in boxes]
    if max(counts) > max_refs:
        raise ValueError(f"`boxes` must be at most {max_refs} in a picture, got {max(counts)}")
    given = {name: check_counts(name, value, counts) for name, value in given.items()}
    embeds = {name: check_counts(f"instance_embeds[{name!r}]", value, counts) for name, value in embeds.items()}
    instances = []
    for i, own in enumerate(boxes):
        row = []
        for j, box in enumerate(own):
            rows = {name: value[i][j] for name, value in embeds.items()}
            instance = Instance(
                box=check_box(box),
                prompt=check_prompt(given["box_prompts"][i][j]),
                reference=check_reference(given["reference_images"][i][j]),
                alpha=check_foreground(given["foreground"][i][j]),
                span=check_span(given["phrase_spans"][i][j]),
                embeds={name: value for name, value in rows.items() if value is not None},
            )
            row.append(instance)
        instances.append(row)
    predicted = {instance.alpha is None for row in instances for instance in row}
    if len(predicted) > 1:
        raise ValueError("`foreground` must be given for every box, or for none")
    return instances


def is_flat(boxes: list) -> bool:
    """Whether these are boxes, not lists of boxes."""
    return not boxes or (len(boxes[0]) > 0 and np.ndim(boxes[0][0]) == 0)


def check_counts(name: str, value: Sequence | None, counts: list[int]) -> Sequence:
    """A list per picture with an entry per box; None becomes lists of None."""
    if value is None:
        return [[None] * count for count in counts]
    found = [len(own) for own in value]
    if found != counts:
        raise ValueError(f"`{name}` must have one entry per box, {counts} in the pictures, got {found}")
    return value


def check_sources(embeds: dict[str, Sequence]) -> dict[str, Sequence]:
    if unknown := embeds.keys() - set(SOURCES):
        raise ValueError(f"`instance_embeds` must be by {', '.join(SOURCES)}, got {', '.join(sorted(unknown))}")
    return embeds


def check_box(box: Sequence[float]) -> Box:
    box = tuple(float(value) for value in box)
    if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise ValueError(f"`boxes` must be x1 y1 x2 y2 with 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1, got {box}")
    return box


def check_prompt(prompt: str | None) -> str | None:
    if prompt is not None and (not isinstance(prompt, str) or not prompt.strip()):
        raise ValueError(f"`box_prompts` must be texts or None, got {prompt!r}")
    return prompt


def check_reference(reference) -> tuple[Image.Image, Box] | None:
    if reference is None:
        return None
    image, box = reference if isinstance(reference, tuple) else (reference, (0.0, 0.0, 1.0, 1.0))
    if not isinstance(image, Image.Image):
        raise ValueError(f"`reference_images` must be PIL images or None, got {type(image).__name__}")
    return image, check_box(box)


def check_foreground(value: bool | float | None) -> float | None:
    if value is None or isinstance(value, bool):
        return GIVEN_ALPHA.get(value)
    if not 0 <= value <= 1:
        raise ValueError(f"`foreground` must be True, False or a strength in [0, 1], got {value}")
    return float(value)


def check_span(span: Sequence[int] | None) -> tuple[int, int] | None:
    if span is None:
        return None
    start, end = (int(place) for place in span)
    if not 0 <= start <= end:
        raise ValueError(f"`phrase_spans` must be (start, end) with 0 <= start <= end, got {(start, end)}")
    return (start, end) if end > start else None


def find_phrases(prompt: str, instances: list[Instance]) -> list[tuple[int, int] | None]:
    """The characters of the prompt that speak of each instance: those given, else its own prompt, word for word.

    Of "disc, a red disc" also "a red disc" alone will do. Where several instances have the same prompt, each takes the
    next place; those left over share the last.
    """
    counts = Counter()
    spans = []
    for instance in instances:
        span = instance.span
        if span is None and instance.prompt is not None:
            places = occurrences(prompt, instance.prompt) or occurrences(prompt, instance.prompt.partition(", ")[2])
            span = places[min(counts[instance.prompt], len(places) - 1)] if places else None
            counts[instance.prompt] += 1
        spans.append(span)
    return spans


def occurrences(prompt: str, phrase: str) -> list[tuple[int, int]]:
    """Where a prompt holds these words, whatever their case."""
    phrase = phrase.strip()
    found = re.finditer(rf"(?<!\w){re.escape(phrase)}(?!\w)", prompt, re.IGNORECASE) if phrase else ()
    return [match.span() for match in found]


def depth_label(box: Box) -> str:
    """A guess at how near an object is, by its area and height in the picture: a prior for the predicted alpha."""
    area, centre = (box[2] - box[0]) * (box[3] - box[1]), (box[1] + box[3]) / 2
    if area > 0.1 or centre > 0.7:
        return "foreground"
    return "background" if area < 0.01 or centre < 0.3 else "midground"


def to_layout(instances: list[list[Instance]], spans: list[list[tuple[int, int]]], widths: dict[str, int]) -> Layout:
    """Instances, padded to the most that a picture has.

    Args:
        spans: T5 tokens of each instance's phrase, (0, 0) where it is not known.
        widths: of the embeddings, by source.

    Raises:
        ValueError: an embedding of another width.
    """
    batch, count = len(instances), max(1, *map(len, instances))
    boxes = np.zeros((batch, count, 4), np.float32)
    embeds = {name: torch.zeros(batch, count, width) for name, width in widths.items()}
    present = {name: torch.zeros(batch, count, dtype=torch.bool) for name in widths}
    valid = torch.zeros(batch, count, dtype=torch.bool)
    depth_labels = torch.zeros(batch, count, dtype=torch.long)
    phrase_spans = torch.zeros(batch, count, 2, dtype=torch.long)
    alpha = torch.full((batch, count), 0.5)
    for i, row in enumerate(instances):
        for j, instance in enumerate(row):
            boxes[i, j], valid[i, j] = instance.box, True
            depth_labels[i, j] = DEPTH_LABELS.index(depth_label(instance.box))
            phrase_spans[i, j] = torch.tensor(spans[i][j])
            alpha[i, j] = 0.5 if instance.alpha is None else instance.alpha
            for name, value in instance.embeds.items():
                if tuple(value.shape) != (widths[name],):
                    raise ValueError(
                        f"the {name} embedding of an instance must have the shape ({widths[name]},), got "
                        f"{tuple(value.shape)}: another encoder made it"
                    )
                embeds[name][i, j], present[name][i, j] = value.detach().float().cpu(), True
    is_given = any(instance.alpha is not None for row in instances for instance in row)
    return Layout(
        boxes=boxes,
        **{f"{name}_embeds": value for name, value in embeds.items()},
        **{f"has_{name}": value for name, value in present.items()},
        valid=valid,
        depth_labels=depth_labels,
        phrase_spans=phrase_spans,
        alpha=alpha if is_given else None,
    )
