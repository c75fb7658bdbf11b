"""How alike what was drawn and its reference are to DINO and CLIP."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from evaluation.layout_flux.examples import Example
from evaluation.layout_flux.metrics import cosine_similarity, leakage
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
