"""Encode a picture dataset once with a VAE, so that training reads latents instead of pictures.

The format is described in `data_prep/images/latents.py`, which reads it, and the command in
`data_prep/images/commands.py`. Killed at any moment, the same call goes on after the last complete shard.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.data import Dataset

from backlot.latent_cache import Manifest, vae_fingerprint
from backlot.latent_writer import Recipe, check_fit, open_vae, posterior, write_cache


def encode_dataset(
    vae_folder: str | Path,
    dataset: Dataset,
    output_dir: str | Path,
    *,
    dataset_name: str,
    split: str = "train",
    mean_only: bool = False,
    flip: bool = True,
    batch_size: int = 32,
    shard_size: int = 4096,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    dataloader_num_workers: int = 0,
    overwrite: bool = False,
) -> Manifest:
    """Write the latents of all samples of `dataset` to `output_dir`, or complete what an earlier call began there.

    Args:
        vae_folder: folder of an `AutoencoderKL` as `save_pretrained` writes it. It runs in float32.
        dataset: items with `pixel_values` (C, H, W) in [-1, 1], all of one size, and `class_labels`; without flips of
            its own.
        dataset_name, split: noted in the manifest.
        mean_only: leave out the standard deviations; reading then gives the means.
        flip: also encode the mirrored pictures.
        batch_size: pictures per VAE call.
        shard_size: samples per file.
        dtype: stored type, a key of `backlot.codecs.DTYPES`.
        device: where the VAE runs.
        dataloader_num_workers: processes that read pictures.
        overwrite: throw away what `output_dir` holds.

    Raises:
        ValueError: `output_dir` holds latents of something else, or the VAE cannot encode these pictures.
    """
    fingerprint, vae = vae_fingerprint(vae_folder), open_vae(vae_folder, device)
    first = dataset[0]["pixel_values"]
    check_fit(vae, first)
    wanted = Manifest(
        vae_fingerprint=fingerprint,
        scaling_factor=vae.config.scaling_factor,
        shift_factor=vae.config.shift_factor,
        dataset_name=dataset_name,
        split=split,
        image_size=first.shape[-1],
        num_samples=len(dataset),
        num_classes=dataset.num_classes,
        latent_shape=list(posterior(vae, first[None], mean_only=True)["mean"].shape[1:]),
        dtype=dtype,
        mean_only=mean_only,
        flip=flip,
        shard_size=shard_size,
    )

    def encode(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = posterior(vae, batch["pixel_values"], mean_only)
        if flip:
            mirrored = posterior(vae, batch["pixel_values"].flip(-1), mean_only)
            tensors |= {f"{name}_flipped": tensor for name, tensor in mirrored.items()}
        return tensors

    recipe = Recipe(encode, content=("pixel_values", "class_labels"), kept=("class_labels",))
    return write_cache(
        Path(output_dir), wanted, dataset, recipe, batch_size, dataloader_num_workers, overwrite=overwrite
    )
