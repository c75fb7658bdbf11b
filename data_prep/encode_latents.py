"""Encode a picture dataset once with a VAE, so that training reads latents instead of pictures.

    python -m data_prep.encode_latents --vae stabilityai/sd-vae-ft-mse --dataset_name imagefolder --path photos \\
        --image_size 256 --output_dir latents/train

The format is described in `data_prep/latents.py`, which reads it. Killed at any moment, the same command goes on after
the last complete shard. It reads all pictures again to be sure that they are still the same, which costs no VAE time.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data_prep.images import DATASET_NAMES, open_images
from data_prep.latents import (
    MANIFEST_NAME,
    Manifest,
    Shard,
    check_shard,
    local_vae_folder,
    read_manifest,
    shard_name,
    tensor_bytes,
    vae_fingerprint,
)
from pipelines.codecs import PixelCodec, load_vae, vae_scale_factor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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
        dtype: stored type, a key of `DTYPES`.
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
    for path in [*folder.glob("shard-*.safetensors.tmp"), *folder.glob(f"{MANIFEST_NAME}.tmp")]:
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
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(data)
    publish(temporary, path)
    return Shard(path.name, len(data), hashlib.sha256(data).hexdigest(), len(tensors["indices"]), content_sha256)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    temporary = folder / f"{MANIFEST_NAME}.tmp"
    temporary.write_text(manifest.to_json())
    publish(temporary, folder / MANIFEST_NAME)


def publish(temporary: Path, target: Path) -> None:
    """Give a finished file its name, durably: after a power cut the name stands for all of it or for what it was."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def default_device() -> torch.device:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_prep.encode_latents", description=__doc__.split("\n")[0])
    names = [name for name in DATASET_NAMES if name != "latents"]
    parser.add_argument("--vae", required=True, help="folder of an AutoencoderKL, or its hub id")
    parser.add_argument("--dataset_name", required=True, choices=names)
    parser.add_argument("--path", help="folder of the images, or hub id of the dataset")
    parser.add_argument("--split", default="train")
    parser.add_argument("--image_column", default="image", help="of a hub dataset")
    parser.add_argument("--label_column", default="label", help="of a hub dataset")
    parser.add_argument("--image_size", type=int, help="side of the pictures in pixels")
    parser.add_argument("--output_dir", required=True, help="one folder per split, e.g. latents/train")
    parser.add_argument("--mean_only", action="store_true", help="half the size; reading then gives the posterior mean")
    parser.add_argument(
        "--flip", action=argparse.BooleanOptionalAction, default=True, help="also encode mirrored pictures"
    )
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--shard_size", type=int, default=4096, help="samples per file")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="stored type; the VAE runs in float32")
    parser.add_argument("--device", help="where the VAE runs; the accelerator if there is one")
    parser.add_argument("--dataloader_num_workers", type=int, default=0, help="processes that read pictures")
    parser.add_argument(
        "--max_bad_fraction", type=float, default=0.01, help="share of unreadable pictures that stops it"
    )
    parser.add_argument("--overwrite", action="store_true", help="throw away what the output folder holds")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = create_parser()
    args = parser.parse_args(argv)
    if args.dataset_name in ("imagefolder", "hub") and args.image_size is None:
        parser.error(f"pictures of {args.dataset_name} have many sizes: set --image_size")
    try:
        dataset = open_images(
            args.dataset_name,
            path=args.path,
            split=args.split,
            image_size=args.image_size,
            image_column=args.image_column,
            label_column=args.label_column,
            max_bad_fraction=args.max_bad_fraction,
            quarantine_path=Path(args.output_dir) / "quarantine.jsonl",
        )
        manifest = encode_dataset(
            local_vae_folder(args.vae),
            dataset,
            args.output_dir,
            dataset_name=args.dataset_name,
            split=args.split,
            mean_only=args.mean_only,
            flip=args.flip,
            batch_size=args.batch_size,
            shard_size=args.shard_size,
            dtype=args.dtype,
            device=args.device or default_device(),
            dataloader_num_workers=args.dataloader_num_workers,
            overwrite=args.overwrite,
        )
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{manifest.num_samples} samples in {len(manifest.shards)} shards: {args.output_dir}")


if __name__ == "__main__":
    main()
