"""Unseen layouts of drawn scenes as they are asked for: as they are, with other references, with two exchanged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backlot.files import json_sha256
from data_prep.layouts.dataset import LayoutDataset
from data_prep.layouts.format import read_meta
from data_prep.layouts.procedural import PRESETS, ProceduralSettings, Scene
from evaluation.layout_flux.metrics import swap_pairs

Item = Mapping[str, Any]
"""As of `data_prep.layouts.LayoutDataset`."""
Reference = tuple[np.ndarray, Sequence[float]]
"""A picture (H, W, 3) uint8 and the box of the object in it."""
APPEARANCE = ("clip_embeds", "dino_embeds")
DESCRIPTION = ("text_embeds", *APPEARANCE, "has_reference", "phrase_spans")


@dataclass(frozen=True)
class Example:
    """A layout to be drawn, and what the picture is to show.

    Args:
        item: what the model is told.
        scene: what it stands for; objects in the order of the item's.
        references: of each object, None where it has none.
    """

    item: Item
    scene: Scene
    references: tuple[Reference | None, ...]

    @property
    def name(self) -> str:
        return self.item["sample_id"]


def read_profile(folder: Path) -> ProceduralSettings:
    """What the scenes of prepared layouts were drawn by; ValueError if they are no drawn scenes."""
    recipe = read_meta(folder).recipes["source"]
    for name in PRESETS:
        with suppress(ValueError):  # some are not for pictures so small
            scenes = ProceduralSettings.preset(name, image_size=recipe["resolution"])
            if json_sha256(scenes.model_dump(mode="json")) == recipe.get("drawn"):
                return scenes
    raise ValueError(f"{folder} holds no scenes of `prepare --source procedural`, or those of another version")


def read_examples(dataset: LayoutDataset, count: int | None = None) -> list[Example]:
    """The first layouts of drawn scenes.

    Args:
        dataset: whose `max_objects` no scene exceeds.
        count: so many; all of them by default.

    Raises:
        ValueError: a sample is damaged, or is no drawn scene.
    """
    rows = range(len(dataset) if count is None else min(count, len(dataset)))
    scenes = (Scene.from_caption(dataset.caption_values(row)) for row in rows)
    return [
        Example(dataset[row], scene, tuple(dataset.references(row))) for row, scene in zip(rows, scenes, strict=True)
    ]


def other_references(examples: Sequence[Example], seed: int = 0) -> list[tuple[Item, np.ndarray]]:
    """The items with the references of other identities that only these tell apart, and which objects have one (N,).

    An object's place is taken by one of another layout with the same shape, colour and texture and another mark; where
    there is none, it keeps its own.
    """
    alike = defaultdict(list)
    for number, example in enumerate(examples):
        for place, each in enumerate(example.scene.objects):
            if example.item["has_reference"][place]:
                alike[each.identity.with_mark(0)].append((number, place, each.identity.mark))
    rng = np.random.default_rng(seed)
    items = []
    for example in examples:
        changed = {name: example.item[name].clone() for name in APPEARANCE}
        is_other = np.zeros(len(example.scene.objects), bool)
        for place, each in enumerate(example.scene.objects):
            others = [entry for entry in alike[each.identity.with_mark(0)] if entry[2] != each.identity.mark]
            if not others or not example.item["has_reference"][place]:
                continue
            number, donor, _ = others[rng.integers(len(others))]
            for name in APPEARANCE:
                changed[name][place] = examples[number].item[name][donor]
            is_other[place] = True
        items.append(({**example.item, **changed}, is_other))
    return items


def exchange(item: Item, first: int, second: int) -> Item:
    """The item with the descriptions of two objects, texts and references, in each other's box."""
    order = list(range(len(item["valid"])))
    order[first], order[second] = second, first
    return {**item, **{name: item[name][order] for name in DESCRIPTION}}


def pairs_to_swap(examples: Sequence[Example], seed: int = 0) -> list[tuple[int, int, int]]:
    """One pair of objects of each layout that has one whose boxes are apart: layout, first and second object."""
    rng = np.random.default_rng(seed)
    found = []
    for number, example in enumerate(examples):
        if pairs := swap_pairs(example.scene):
            found.append((number, *pairs[rng.integers(len(pairs))]))
    return found
