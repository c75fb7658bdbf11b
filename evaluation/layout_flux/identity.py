"""Whether what was drawn is what its reference shows: retrieval by a descriptor, and similarity by encoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from data_prep.layouts.procedural import Identity, ProceduralSettings, draw_distractors, render_reference
from evaluation.layout_flux.examples import Example
from evaluation.layout_flux.metrics import Description, cosine_similarity, describe, description_distance, leakage
from pipelines.layout_flux.encoders import LayoutEncoders, crop_for


class Gallery:
    """`metrics.identity_retrieval` of many pictures: what references look like is found out once.

    Args:
        examples: by number, what pictures are asked for.
        seed: of the other identities and their references.
    """

    def __init__(self, examples: Sequence[Example], scenes: ProceduralSettings, seed: int = 0, num_others: int = 15):
        self.examples, self.scenes, self.seed, self.num_others = examples, scenes, seed, num_others
        self._own: dict[tuple[int, int], Description] = {}
        self._others: dict[tuple[Identity, int], Description] = {}

    def retrieve(self, picture: np.ndarray, number: int) -> list[float]:
        """Of each object of a picture (H, W, 3) of this example, 1 if its own reference is the nearest, else 0."""
        found = []
        for place, each in enumerate(self.examples[number].scene.objects):
            own = self._own_view(number, place)
            if own is None:
                found.append(float("nan"))
                continue
            ours = describe(picture, each.box, each.colour, self.scenes)
            others = draw_distractors(each.identity, self.seed, self.num_others)
            distances = (description_distance(ours, self._view(other, k)) for k, other in enumerate(others))
            nearest = description_distance(ours, own)
            found.append(float(all(nearest < distance for distance in distances)))
        return found

    def _own_view(self, number: int, place: int) -> Description | None:
        example = self.examples[number]
        if example.references[place] is None:
            return None
        if (number, place) not in self._own:
            colour = example.scene.objects[place].colour
            self._own[number, place] = describe(*example.references[place], colour, self.scenes)
        return self._own[number, place]

    def _view(self, identity: Identity, k: int) -> Description:
        if (identity, k) not in self._others:
            view = render_reference(identity, self.seed + 1 + k, self.scenes)
            self._others[identity, k] = describe(*view, identity.colour, self.scenes)
        return self._others[identity, k]


class Similarity:
    """DINO-I and CLIP-I: cosines of what is in a box with its reference, by the encoders of the data.

    Args:
        encoders: those that the references were encoded with; others give numbers that mean nothing.
    """

    def __init__(self, encoders: LayoutEncoders, batch_size: int = 256):
        self.encoders, self.batch_size = encoders, batch_size

    def measure(self, pictures: np.ndarray, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """`dino_similarity`, `clip_similarity` and `leakage` of every object in turn, NaN without a reference.

        Args:
            pictures: (B, H, W, 3) uint8.
        """
        values = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        encoders = self.encoders
        embeds = {
            "dino": self._embed(values, examples, encoders.dino_processor, encoders.dino_crops),
            "clip": self._embed(values, examples, encoders.clip_processor, encoders.clip_crops),
        }
        rows, start = {"dino_similarity": [], "clip_similarity": [], "leakage": []}, 0
        for example in examples:
            count = len(example.scene.objects)
            drawn = {name: each[start : start + count] for name, each in embeds.items()}
            own = {name: example.item[f"{name}_embeds"][:count].float().numpy() for name in embeds}
            missing = ~example.item["has_reference"][:count].numpy()
            for name in embeds:
                rows[f"{name}_similarity"].append(np.where(missing, np.nan, cosine_similarity(drawn[name], own[name])))
            rows["leakage"].append(np.where(missing.any(), np.nan, leakage(drawn["dino"], own["dino"])))
            start += count
        return {name: np.concatenate(each) for name, each in rows.items()}

    def _embed(
        self, values: Tensor, examples: Sequence[Example], processor, encode: Callable[[Tensor], Tensor]
    ) -> np.ndarray:
        """Of the crop of every object in turn, (R, E)."""
        crops = [
            crop_for(processor, picture, each.box)
            for picture, example in zip(values, examples, strict=True)
            for each in example.scene.objects
        ]
        batches = (torch.stack(crops[i : i + self.batch_size]) for i in range(0, len(crops), self.batch_size))
        return torch.cat([encode(batch).float().cpu() for batch in batches]).numpy()
