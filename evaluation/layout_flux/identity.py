"""Whether what was drawn is what its reference shows: retrieval by a descriptor, and similarity by encoders."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from data_prep.layouts.procedural import ProceduralSettings, draw_distractors, render_reference
from evaluation.layout_flux.examples import Example
from evaluation.layout_flux.metrics import cosine_similarity, describe, descriptor_distance, leakage
from pipelines.layout_flux.encoders import LayoutEncoders, crop_for


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
        found = {}
        dino, clip = self.encoders.dino_processor, self.encoders.clip_processor
        for name, processor, encode in (("dino", dino, self.encoders.dino_crops), ("clip", clip, self.encoders.clip_crops)):
            crops = [
                crop_for(processor, picture, each.box)
                for picture, example in zip(values, examples, strict=True)
                for each in example.scene.objects
            ]
            found[name] = self._encode(crops, encode)
        rows = {"dino_similarity": [], "clip_similarity": [], "leakage": []}
        start = 0
        for example in examples:
            count = len(example.scene.objects)
            place = slice(start, start + count)
            start += count
            missing = ~example.item["has_reference"][:count].numpy()
            own = {name: example.item[f"{name}_embeds"][:count].float().numpy() for name in found}
            for name, embeds in found.items():
                rows[f"{name}_similarity"].append(np.where(missing, np.nan, cosine_similarity(embeds[place], own[name])))
            others = leakage(found["dino"][place], own["dino"])
            rows["leakage"].append(np.full(count, np.nan) if missing.any() else others)
        return {name: np.concatenate(values) for name, values in rows.items()}

    def _encode(self, crops: Sequence[Tensor], encode) -> np.ndarray:
        batches = [torch.stack(list(crops[i : i + self.batch_size])) for i in range(0, len(crops), self.batch_size)]
        return torch.cat([encode(batch).float().cpu() for batch in batches]).numpy()
