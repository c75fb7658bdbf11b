"""Latents of pictures with class labels: the reader of what `data_prep.images encode` writes.

A cache is a folder with the manifest and the shards of `backlot/latent_cache.py`. Its tensors:

    mean, std                   (N, C, h, w)  the VAE's posterior; no std in a cache of means
    mean_flipped, std_flipped   (N, C, h, w)  the same of the mirrored pictures
    class_labels                (N,)
    indices                     (N,)          rows of the data set that was encoded
"""

from __future__ import annotations

from pathlib import Path
from typing import SupportsInt

import torch

from backlot.latent_cache import MANIFEST_NAME, LatentCache
from backlot.samples import SampleKey


class LatentDataset(LatentCache):
    """Latents with class labels. Items: `latents` (C, h, w) float32, scaled; `class_labels` int64 scalar.

    Latents are drawn anew from the VAE's posterior (mean + std * noise) in every epoch, and so is the mirroring, both
    from `key.generator()`; a mean-only cache without flip takes plain ints.

    Args:
        path: the cache, or a folder with one cache per split (`path/<split>`).
        split: the split that must have been encoded; None takes any.
        horizontal_flip: take half of the items from the encoded mirror pictures.
        vae_fingerprint: what `vae_fingerprint(folder)` says of the VAE that will decode; another one's latents are
            refused.

    Raises:
        ValueError: the cache is damaged, incomplete, of another split or VAE, or without the mirrored pictures.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        split: str | None = None,
        horizontal_flip: bool = False,
        vae_fingerprint: str | None = None,
    ) -> None:
        folder = Path(path)
        if split is not None and (folder / split / MANIFEST_NAME).is_file():
            folder = folder / split
        super().__init__(folder, ("mean", "class_labels"), split=split, vae_fingerprint=vae_fingerprint)
        if horizontal_flip and not self.manifest.flip:
            raise ValueError(f"`horizontal_flip` needs mirrored latents, {folder} was encoded with --no-flip")
        self.num_classes = self.manifest.num_classes
        self.horizontal_flip = horizontal_flip

    def __getitem__(self, key: SampleKey | SupportsInt) -> dict[str, torch.Tensor]:
        handle, offset = self.locate(int(key))
        randomness = key.generator() if self.horizontal_flip or not self.manifest.mean_only else None
        suffix = "_flipped" if self.horizontal_flip and torch.rand((), generator=randomness) < 0.5 else ""
        latents = handle.get_slice(f"mean{suffix}")[offset].float()
        if not self.manifest.mean_only:
            std = handle.get_slice(f"std{suffix}")[offset].float()
            latents = latents + std * torch.randn(latents.shape, generator=randomness)
        return {"latents": self.scale(latents), "class_labels": handle.get_slice("class_labels")[offset]}
