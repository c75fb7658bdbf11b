"""The writer of latent caches (backlot/latent_cache.py): resumed shard by shard, refused where something changed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from backlot.codecs import DTYPES, PixelCodec, load_vae, vae_scale_factor
from backlot.files import write_file
from backlot.latent_cache import (
    MANIFEST_NAME,
    Manifest,
    Shard,
    check_shard,
    local_vae_folder,
    read_manifest,
    shard_name,
    tensor_bytes,
)

# In the order in which a difference is reported.
SETTINGS = {
    "vae_fingerprint": "another VAE",
    "split": "another --split",
    "image_size": "another --image_size",
    "dtype": "another --dtype",
    "mean_only": "another choice of --mean_only",
    "flip": "another choice of --flip",
    "shard_size": "another --shard_size",
    "num_samples": "another number of images",
    "num_classes": "another number of classes",
    "dataset_fingerprint": "other data",
}


class Recipe(NamedTuple):
    """How a batch of samples becomes tensors of a shard: those of `encode`, and `kept` of the batch as they are.

    `content` names the tensors of the batch that decide the result; a shard's hash of them shows whether they changed.
    """

    encode: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
    content: tuple[str, ...]
    kept: tuple[str, ...]


def open_vae(vae_folder: str | Path, device: str | torch.device) -> AutoencoderKL | PixelCodec:
    """The frozen VAE (or the codec that stands in for one), in float32."""
    return load_vae(str(local_vae_folder(vae_folder))).to(device, torch.float32).requires_grad_(False)


def write_cache(
    folder: Path,
    wanted: Manifest,
    dataset: Dataset,
    recipe: Recipe,
    batch_size: int,
    num_workers: int,
    *,
    overwrite: bool,
    verify: bool = False,
) -> Manifest:
    """Write the cache that `wanted` describes, or complete what an earlier call began in `folder`.

    A complete cache of a data set with the same `dataset_fingerprint` is left as it is, unless `verify` asks for all
    samples to be read and all shards to be hashed.

    Raises:
        ValueError: `folder` holds latents of something else, or a result is not finite in the stored type.
    """
    for name, value in {"batch_size": batch_size, "shard_size": wanted.shard_size}.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")
    shards = prepare_folder(folder, wanted, overwrite)
    written = sum(shard.count for shard in shards.values() if is_intact(folder, shard, content=False))
    if wanted.dataset_fingerprint is not None and written == len(dataset) and not verify:
        return read_manifest(folder)
    shard_size = wanted.shard_size
    starts = range(0, len(dataset), shard_size)
    batches = [
        range(row, min(row + batch_size, start + shard_size, len(dataset)))
        for start in starts
        for row in range(start, min(start + shard_size, len(dataset)), batch_size)
    ]
    loader = iter(DataLoader(dataset, batch_sampler=batches, num_workers=num_workers))
    with tqdm(total=len(dataset), desc="encode", unit="image") as progress:
        for number, start in enumerate(starts):
            rows = range(start, min(start + shard_size, len(dataset)))
            shard_batches = take(loader, rows, progress)
            known = shards.get(number)
            if known is not None and is_intact(folder, known):
                content = hashlib.sha256()
                for batch in shard_batches:
                    update_content(content, batch, recipe.content)
                check_content(folder, known, content.hexdigest())
                continue
            tensors, content_sha256 = encode_shard(recipe, shard_batches, rows, DTYPES[wanted.dtype])
            if known is not None:
                check_content(folder, known, content_sha256)
            shards[number] = write_shard(folder / shard_name(number), tensors, content_sha256)
            write_manifest(folder, replace(wanted, shards=[shards[key] for key in sorted(shards)]))
    return read_manifest(folder)


def check_fit(vae: AutoencoderKL | PixelCodec, pixel_values: torch.Tensor) -> None:
    """ValueError if the VAE cannot encode such a picture (C, H, W), or scales its latents in an unknown way."""
    channels, height, width = pixel_values.shape
    factor = vae_scale_factor(vae)
    if channels != vae.config.in_channels:
        raise ValueError(f"the VAE takes {vae.config.in_channels} channels, the images have {channels}")
    if height != width or height % factor:
        raise ValueError(
            f"the VAE wants square images with a side divisible by {factor}, got {height}x{width}: set --image_size"
        )
    if any(vae.config.get(name) is not None for name in ("latents_mean", "latents_std")):
        raise ValueError(
            "the VAE normalises each latent channel (`latents_mean`, `latents_std`); only one factor is supported"
        )


def prepare_folder(folder: Path, wanted: Manifest, overwrite: bool) -> dict[int, Shard]:
    """Clean up after a killed run and return the listed shards by number; ValueError if they are of something else."""
    folder.mkdir(parents=True, exist_ok=True)
    if overwrite:  # the manifest first: shards without one are never taken for anything
        for path in [folder / MANIFEST_NAME, *folder.glob("shard-*.safetensors")]:
            path.unlink(missing_ok=True)
    for path in [*folder.glob("shard-*.safetensors*.tmp"), *folder.glob(f"{MANIFEST_NAME}*.tmp")]:
        path.unlink()
    if not (folder / MANIFEST_NAME).is_file():
        return {}
    try:
        found = read_manifest(folder)
    except ValueError as error:
        raise ValueError(f"{error}; --overwrite starts again") from None
    for name, reason in SETTINGS.items():
        there, here = getattr(found, name), getattr(wanted, name)
        if there != here:
            raise stale(folder, f"{reason} ({there} there, {here} now)")
    return dict(enumerate(found.shards))


def stale(folder: Path, reason: str) -> ValueError:
    return ValueError(
        f"{folder} holds latents of {reason}: choose another --output_dir, or --overwrite to encode again"
    )


def is_intact(folder: Path, shard: Shard, *, content: bool = True) -> bool:
    try:
        check_shard(folder, shard, content=content)
    except ValueError:
        return False
    return True


def check_content(folder: Path, shard: Shard, content_sha256: str) -> None:
    if content_sha256 != shard.content_sha256:
        raise stale(folder, f"other images (the content of {shard.name} has changed)")


def take(loader: Iterator[dict[str, torch.Tensor]], rows: range, progress: tqdm) -> Iterator[dict[str, torch.Tensor]]:
    """The next batches of the loader until they cover `rows`."""
    remaining = len(rows)
    while remaining:
        batch = next(loader)
        count = len(next(iter(batch.values())))
        remaining -= count
        yield batch
        progress.update(count)


def update_content(content: hashlib._Hash, batch: dict[str, torch.Tensor], names: tuple[str, ...]) -> None:
    """Add a batch to the hash of a shard's content, sample by sample, so that the batch size does not matter."""
    for tensors in zip(*(batch[name] for name in names), strict=True):
        for tensor in tensors:
            content.update(tensor_bytes(tensor))


def encode_shard(
    recipe: Recipe, batches: Iterator[dict[str, torch.Tensor]], rows: range, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], str]:
    """Encode the batches of one shard. Returns its tensors and the sha256 of its content."""
    content = hashlib.sha256()
    parts: dict[str, list[torch.Tensor]] = {}
    for batch in batches:
        update_content(content, batch, recipe.content)
        # Convolutions may answer in channels-last order, which safetensors does not store.
        tensors = {name: tensor.to(dtype).cpu().contiguous() for name, tensor in recipe.encode(batch).items()}
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise ValueError(
                    f"`{name}` of rows {rows.start}..{rows.stop - 1} is not finite as {dtype}: try --dtype float32"
                )
        for name, tensor in {**tensors, **{name: batch[name] for name in recipe.kept}}.items():
            parts.setdefault(name, []).append(tensor)
    shard = {name: torch.cat(tensors) for name, tensors in parts.items()}
    return {**shard, "indices": torch.tensor(rows)}, content.hexdigest()


@torch.inference_mode()
def posterior(vae: AutoencoderKL | PixelCodec, pixel_values: torch.Tensor, mean_only: bool) -> dict[str, torch.Tensor]:
    """`mean` and `std` (B, c, h, w) of the VAE's posterior, neither shifted nor scaled."""
    distribution = vae.encode(pixel_values.to(vae.device)).latent_dist
    return {"mean": distribution.mean} if mean_only else {"mean": distribution.mean, "std": distribution.std}


def write_shard(path: Path, tensors: dict[str, torch.Tensor], content_sha256: str) -> Shard:
    # Not save_file: it writes through a temporary file of its own, whose random name would stay behind after a kill.
    data = save(tensors)
    write_file(path, data)
    return Shard(path.name, len(data), hashlib.sha256(data).hexdigest(), len(tensors["indices"]), content_sha256)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_file(folder / MANIFEST_NAME, manifest.to_json())
