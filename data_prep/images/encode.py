"""Encode a picture dataset once with a VAE, so that training reads latents instead of pictures.

    python -m data_prep.images encode --vae stabilityai/sd-vae-ft-mse --dataset_name imagefolder --path photos \\
        --image_size 256 --output_dir latents/train

The format is described in `data_prep/images/latents.py`, which reads it. Killed at any moment, the same command goes on
after the last complete shard. It reads all pictures again to be sure that they are still the same, which costs no VAE
time.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset

from backlot.codecs import DTYPES
from backlot.latent_cache import (
    Manifest,
    local_vae_folder,
    vae_fingerprint,
)
from backlot.latent_writer import Recipe, check_fit, open_vae, posterior, write_cache
from backlot.loading import default_device
from data_prep.images.dataset import DATASET_NAMES, open_images


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


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_prep.images encode", description=__doc__.split("\n")[0])
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
