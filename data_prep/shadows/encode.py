"""Encode shadow data once with a VAE, so that training reads latents of objects and shadows instead of pictures.

The format is described in `data_prep/shadows/latents.py`, which reads it, and the command in
`data_prep/shadows/commands.py`. Killed at any moment, the same call goes on after the last complete shard; a complete
cache is left as it is while stems, lights and sizes of the files are the same, and checked picture by picture with
`verify`. The trainer calls `open_latents`, which does the same.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F

from backlot.latent_cache import Manifest, tensor_bytes, vae_fingerprint
from backlot.latent_writer import Recipe, check_fit, open_vae, posterior, write_cache
from backlot.loading import default_device
from data_prep.shadows.dataset import ShadowDataset
from data_prep.shadows.latents import LIGHT_NAMES, ShadowLatents


def open_latents(
    dataset: ShadowDataset,
    vae_folder: str | Path,
    folder: str | Path | None = None,
    device: str | torch.device | None = None,
    *,
    pixels: bool = False,
    batch_size: int = 8,
    dtype: str = "float16",
    dataloader_num_workers: int = 0,
) -> ShadowLatents:
    """Encode what is missing in `folder` (by default `latents_folder`) and open it; it mirrors as `dataset` does.

    With several processes the main one calls this first; the others call it after it, and find nothing left to do.

    Args:
        pixels: add the shadow maps to the items.
        dataset, vae_folder, device, batch_size, dtype, dataloader_num_workers: as for `encode_shadows`.

    Raises:
        ValueError: as `encode_shadows`.
    """
    fingerprint = vae_fingerprint(vae_folder)
    folder = latents_folder(dataset, fingerprint) if folder is None else Path(folder)
    encode_shadows(
        vae_folder,
        dataset,
        folder,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        dataloader_num_workers=dataloader_num_workers,
    )
    return ShadowLatents(
        folder, dataset=dataset, horizontal_flip=dataset.horizontal_flip, pixels=pixels, vae_fingerprint=fingerprint
    )


def latents_folder(dataset: ShadowDataset, fingerprint: str) -> Path:
    """Where the latents of a data set lie: `latents/<split>-<image size>-<fingerprint>` in it, or beside its tar."""
    path = dataset.path
    folder = path / "latents" if path.is_dir() else path.with_name(f"{path.stem}-latents")
    return folder / f"{dataset.split}-{dataset.picture_size[0]}-{fingerprint[:8]}"


def encode_shadows(
    vae_folder: str | Path,
    dataset: ShadowDataset,
    output_dir: str | Path,
    *,
    batch_size: int = 8,
    shard_size: int = 1024,
    dtype: str = "float16",
    device: str | torch.device | None = None,
    dataloader_num_workers: int = 0,
    overwrite: bool = False,
    verify: bool = False,
) -> Manifest:
    """Write the latents of all samples of `dataset` to `output_dir`, or complete what an earlier call began there.

    Args:
        vae_folder: folder of an `AutoencoderKL` (or `PixelCodec`) as `save_pretrained` writes it. It runs in float32.
        dataset: square pictures whose side the VAE can divide. Nothing is mirrored by its `horizontal_flip`: both
            versions are stored.
        batch_size: samples per VAE call; an object that a batch shows under several lights is encoded once.
        shard_size: samples per file.
        dtype: stored type of the latents, a key of `backlot.codecs.DTYPES`.
        device: where the VAE runs; None for the accelerator if there is one.
        dataloader_num_workers: processes that read pictures.
        overwrite: throw away what `output_dir` holds.
        verify: also where the cache is complete, read all pictures and hash all shards, and repair damaged ones.

    Raises:
        ValueError: `output_dir` holds latents of something else, a sample is bad, or the VAE cannot encode it.
    """
    fingerprint, vae = vae_fingerprint(vae_folder), open_vae(vae_folder, default_device() if device is None else device)
    first = dataset[0]["object_image"]
    check_fit(vae, first)
    latent_shape = list(posterior(vae, first[None], mean_only=True)["mean"].shape[1:])
    wanted = Manifest(
        vae_fingerprint=fingerprint,
        scaling_factor=vae.config.scaling_factor,
        shift_factor=vae.config.shift_factor,
        dataset_name="shadows",
        split=dataset.split,
        image_size=first.shape[-1],
        num_samples=len(dataset),
        num_classes=None,
        latent_shape=latent_shape,
        dtype=dtype,
        mean_only=True,
        flip=True,
        shard_size=shard_size,
        dataset_fingerprint=dataset.item_fingerprint,
    )

    def encode(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        rows, inverse = unique_rows(batch["object_image"])
        objects = batch["object_image"][rows]
        shadows = batch["shadow_map"].expand(-1, len(first), -1, -1) * 2 - 1
        return {
            "object": posterior(vae, objects, mean_only=True)["mean"][inverse],
            "object_flipped": posterior(vae, objects.flip(-1), mean_only=True)["mean"][inverse],
            "shadow": posterior(vae, shadows, mean_only=True)["mean"],
            "shadow_flipped": posterior(vae, shadows.flip(-1), mean_only=True)["mean"],
            "mask": F.interpolate(batch["mask"], size=latent_shape[1:], mode="area"),
        }

    recipe = Recipe(encode, content=("object_image", "mask", "shadow_map", *LIGHT_NAMES), kept=LIGHT_NAMES)
    folder = Path(output_dir)
    return write_cache(
        folder, wanted, dataset, recipe, batch_size, dataloader_num_workers, overwrite=overwrite, verify=verify
    )


def unique_rows(tensor: torch.Tensor) -> tuple[list[int], list[int]]:
    """The first row of each kind, and for every row the place of its kind in that list."""
    digests = [hashlib.sha256(tensor_bytes(row)).digest() for row in tensor]
    kinds = list(dict.fromkeys(digests))
    return [digests.index(kind) for kind in kinds], [kinds.index(digest) for digest in digests]
