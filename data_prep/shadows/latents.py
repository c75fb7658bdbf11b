"""Reader of the latents of shadow data that `data_prep.shadows encode` writes.

A cache is a folder with the manifest and the shards of `data_prep/images/latents.py`. Its tensors:

    object, object_flipped      (N, c, h, w)  posterior means of the object pictures and of the mirrored ones
    shadow, shadow_flipped      (N, c, h, w)  the same of the shadow maps, as grey pictures in [-1, 1]
    mask                        (N, 1, h, w)  mean of the mask over the pixels of each latent, in [0, 1]
    theta, phi, size            (N,)          float32, of the picture that is not mirrored
    indices                     (N,)          rows of the data set that was encoded

The pictures are mirrored before they are encoded: the VAE's answer to a mirrored picture is not its mirrored answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import SupportsInt

import torch

from backlot.latent_cache import LatentCache
from backlot.samples import SampleKey
from data_prep.shadows.dataset import ShadowDataset, is_mirrored, light_tensors, mirror_degrees

LIGHT_NAMES = ("theta", "phi", "size")


class ShadowLatents(LatentCache):
    """Latents of objects and their shadows, memory-mapped.

    Items: `object_latents` and `shadow_latents` (c, h, w) float32, scaled as networks take them; `mask_latents`
    (1, h, w) float32 in [0, 1]; `theta`, `phi`, `size` float32 scalars; with `pixels` also `shadow_map` (1, H, W)
    float32 in [0, 1]. A mirrored item has the latents of the mirrored pictures, and `phi` -> 180 - `phi`.

    Args:
        folder: the cache.
        dataset: what was encoded; a cache of anything else is refused.
        split: the split that must have been encoded; that of `dataset` if there is one.
        horizontal_flip: mirror half of the items, those that `ShadowDataset` would mirror; keys without a generator
            are never mirrored.
        pixels: add the shadow map, read from `dataset`.
        vae_fingerprint: what `vae_fingerprint(vae_folder)` says of the VAE in use; another one's latents are refused.

    Raises:
        ValueError: the cache is damaged, incomplete, or of another VAE, split or data set.
    """

    writer = "data_prep.shadows encode"

    def __init__(
        self,
        folder: str | Path,
        *,
        dataset: ShadowDataset | None = None,
        split: str | None = None,
        horizontal_flip: bool = False,
        pixels: bool = False,
        vae_fingerprint: str | None = None,
    ) -> None:
        if pixels and dataset is None:
            raise ValueError("`pixels` are read from the shadow maps: give their `dataset`")
        split = dataset.split if dataset is not None and split is None else split
        tensors = ("object", "object_flipped", "shadow", "shadow_flipped", "mask", *LIGHT_NAMES)
        super().__init__(Path(folder), tensors, split=split, vae_fingerprint=vae_fingerprint)
        if dataset is not None and dataset.item_fingerprint != self.manifest.dataset_fingerprint:
            raise ValueError(
                f"{folder} holds the latents of other data than {dataset.path} holds now, or of another `image_size` or"
                f" `fill`: run {self.writer} with another --output_dir, or with --overwrite"
            )
        self.dataset = dataset
        self.horizontal_flip = horizontal_flip
        self.pixels = pixels

    def __getitem__(self, key: SampleKey | SupportsInt) -> dict[str, torch.Tensor]:
        """Read one sample by its row."""
        row = int(key)
        handle, offset = self.locate(row)
        mirrored = self.horizontal_flip and is_mirrored(key)
        suffix = "_flipped" if mirrored else ""
        mask = handle.get_slice("mask")[offset].float()
        theta, phi, size = (float(handle.get_slice(name)[offset]) for name in LIGHT_NAMES)
        item = {
            "object_latents": self.scale(handle.get_slice(f"object{suffix}")[offset].float()),
            "shadow_latents": self.scale(handle.get_slice(f"shadow{suffix}")[offset].float()),
            "mask_latents": mask.flip(-1) if mirrored else mask,
            **light_tensors(theta, mirror_degrees(phi) if mirrored else phi, size),
        }
        if self.pixels:
            shadow_map = self.dataset.shadow_map(row)
            item["shadow_map"] = shadow_map.flip(-1) if mirrored else shadow_map
        return item
