"""Encode the shapes of scenes with an occupancy VAE, their pictures if wanted with a vision model, and fit the codec.

The format is described in `data_prep/scenes/format.py`. A scene's metadata say which VAE its latents are of.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from backlot.files import file_sha256
from backlot.latent_cache import vae_fingerprint
from backlot.loading import default_device
from backlot.modalities import MODALITIES
from backlot.pictures import to_images
from data_prep.scenes.dataset import as_floats
from data_prep.scenes.format import (
    METADATA_NAME,
    SCENES_NAME,
    SPLITS,
    Scene,
    bad_scene,
    find_file,
    read_metadata,
    read_scene,
    scene_ids,
    unpack_occupancy,
    write_metadata,
    write_scene,
)
from pipelines.shortcut_scene import OccupancyVAE, PoseCodec
from pipelines.shortcut_scene.vae import PRESETS

MODELS = {"sha256": "VAE", "image_encoder": "vision model"}


def encode_scenes(
    root: str | Path,
    vae: str | Path,
    out: str | Path | None = None,
    split: str | Sequence[str] | None = None,
    device: str | torch.device | None = None,
    batch_size: int = 64,
    format: str = "safetensors",
    image_encoder: str | Path | None = None,
    overwrite: bool = False,
) -> int:
    """Write the latents of all scenes that have none yet, and the statistics of the train split if it is among them.

    Args:
        root: scenes with shapes.
        vae: folder of an `OccupancyVAE`. It runs in float32; its posterior's mean is stored.
        out: where to; None: beside the shapes. Elsewhere everything else of the scenes is copied there.
        split: one or some of the splits; None: all that are there.
        device: None for the accelerator if there is one.
        batch_size: objects, and pictures, per call.
        format: `safetensors` or `pt`.
        image_encoder: folder of a vision model with its image processor, e.g. DINOv2: its last hidden states of the
            picture become `cond_tokens`.
        overwrite: encode again what other models have encoded.

    Returns:
        The number of scenes that were encoded.

    Raises:
        ValueError: a scene is bad, or was encoded by another model and `overwrite` is false; a folder holds no model,
            or one for grids of another size.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}")
    root, out = Path(root), Path(root if out is None else out)
    device = default_device() if device is None else device
    splits = find_splits(root) if split is None else [split] if isinstance(split, str) else list(split)
    scenes = [Path(name) / scene_id for name in splits for scene_id in scene_ids(root, name)]
    network = open_vae(vae, device)
    made_by = {"preset": find_preset(network), "sha256": vae_fingerprint(vae)}
    encode_pictures = None
    if image_encoder is not None:
        encode_pictures, made_by["image_encoder"] = open_image_encoder(image_encoder, device)
    waiting = [scene for scene in scenes if is_waiting(root / scene, out / scene, made_by, overwrite)]
    if out.resolve() != root.resolve():
        copy_lists(root, out, splits)
    with tqdm(total=len(waiting), desc="encode", unit="scene", disable=None) as progress:
        for group in groups((open_shapes(root / scene, network) for scene in waiting), batch_size):
            shapes = encode_shapes(network, [scene for _, scene in group], batch_size)
            pictures = [None] * len(group)
            if encode_pictures is not None:
                pictures = encode_pictures([find_picture(folder, scene) for folder, scene in group], batch_size)
            for (folder, scene), shape, tokens in zip(group, shapes, pictures, strict=True):
                write_latents(folder, out / folder.relative_to(root), scene, shape, tokens, made_by, format)
            progress.update(len(group))
    if "train" in splits:
        compute_stats(out)
    return len(waiting)


def find_splits(root: str | Path) -> list[str]:
    """The splits that are there; ValueError if there is none."""
    found = [split for split in SPLITS if (Path(root) / split).is_dir()]
    if not found:
        raise ValueError(f"{root} holds no scenes: there is no folder {', '.join(SPLITS[:-1])} or {SPLITS[-1]} in it")
    return found


# --- what encodes ---------------------------------------------------------------------------------------------------


def open_vae(folder: str | Path, device: str | torch.device) -> OccupancyVAE:
    """A frozen `OccupancyVAE` in float32; ValueError, one line, if the folder holds none."""
    vae_fingerprint(folder)  # for its messages
    try:
        vae = OccupancyVAE.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ValueError(f"{folder} holds no occupancy VAE: {str(error).splitlines()[0]}") from None
    return vae.to(device).eval().requires_grad_(False)


def find_preset(vae: OccupancyVAE) -> str | None:
    """The preset that a VAE has the shape of; None if it is of another shape."""

    def shape(network: OccupancyVAE) -> str:
        return json.dumps({name: value for name, value in network.config.items() if not name.startswith("_")})

    with torch.device("meta"):
        return next((name for name in PRESETS if shape(OccupancyVAE.from_preset(name)) == shape(vae)), None)


def open_image_encoder(
    folder: str | Path, device: str | torch.device
) -> tuple[Callable[[Sequence[Tensor], int], list[Tensor]], str]:
    """A function from pictures (3, S, S) and a batch size to tokens (L, C), and the sha256 of the model's weights."""
    from transformers import AutoImageProcessor, AutoModel

    weights = sorted(Path(folder).glob("*.safetensors"))
    if not weights:
        raise ValueError(f"{folder} holds no vision model: there are no safetensors weights")
    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder} holds no vision model: {str(error).splitlines()[0]}") from None
    model = model.to(device).eval().requires_grad_(False)

    def encode(pictures: Sequence[Tensor], batch_size: int) -> list[Tensor]:
        tokens = []
        for start in range(0, len(pictures), batch_size):
            images = [to_images((as_floats(image)[None] + 1) / 2)[0] for image in pictures[start : start + batch_size]]
            inputs = processor(images=images, return_tensors="pt").to(device)
            with torch.inference_mode():
                tokens += model(**inputs).last_hidden_state.float().cpu()
        return tokens

    return encode, hashlib.sha256("".join(map(file_sha256, weights)).encode()).hexdigest()


@torch.inference_mode()
def encode_shapes(vae: OccupancyVAE, scenes: Sequence[Scene], batch_size: int) -> list[Tensor]:
    """The tokens (N, T, C) of the objects of each scene, float32 on the CPU."""
    grids = torch.cat([occupancy(scene) for scene in scenes])
    parts = grids.split(batch_size)
    tokens = torch.cat([vae.to_tokens(vae.encode(x.float().to(vae.device)).latent_dist.mode()).cpu() for x in parts])
    return list(tokens.split([scene.metadata["num_objects"] for scene in scenes]))


def occupancy(scene: Scene) -> Tensor:
    """The occupancy of the objects of a scene, (N, 1, R, R, R) bool."""
    grids = unpack_occupancy(scene.tensors["occupancy"].numpy(), scene.metadata["resolution"])
    return torch.from_numpy(grids)[:, None]


# --- what is encoded ------------------------------------------------------------------------------------------------


def open_shapes(folder: Path, vae: OccupancyVAE) -> tuple[Path, Scene]:
    scene = read_scene(folder, "shapes")
    resolution, wanted = scene.metadata["resolution"], vae.config.sample_size
    if resolution != wanted:
        raise bad_scene(folder, f"shapes: occupancy has resolution {resolution}, the VAE takes {wanted}")
    return folder, scene


def find_picture(folder: Path, scene: Scene) -> Tensor:
    if "image" not in scene.conditionals:
        raise bad_scene(folder, "conditionals: image missing, the vision model has nothing to encode")
    return scene.conditionals["image"]


def is_waiting(folder: Path, target: Path, made_by: dict, overwrite: bool) -> bool:
    """Whether a scene is still to be encoded; ValueError if another model has encoded it already."""
    if not (target / METADATA_NAME).is_file() or find_file(target, "latents") is None:
        return True
    found = read_metadata(target).get("codec")
    if not isinstance(found, dict):
        return True
    for name, model in MODELS.items():
        if name in made_by and name in found and found[name] != made_by[name]:
            if overwrite:
                return True
            there, here = str(found[name])[:12], made_by[name][:12]
            reason = f"it was encoded by another {model} ({there} there, {here} now): --overwrite encodes it again"
            raise bad_scene(target, reason)
    if any(name not in found for name in made_by):
        return True
    copy, own = find_file(target, "shapes"), find_file(folder, "shapes")
    return own is not None and (copy is None or not filecmp.cmp(own, copy, shallow=False))


def write_latents(
    folder: Path, target: Path, scene: Scene, shape: Tensor, tokens: Tensor | None, made_by: dict, format: str
) -> None:
    """Write what was encoded of a scene; where `target` is another folder, all else of the scene as well."""
    conditionals = None
    if tokens is not None:
        conditionals = scene.conditionals | {"cond_tokens": tokens}
    elif target != folder:
        conditionals = scene.conditionals or None
    if target != folder:
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(find_file(folder, "shapes"), target / "shapes.safetensors")
    poses = {name: value for name, value in scene.tensors.items() if name in MODALITIES}
    metadata = {name: value for name, value in scene.metadata.items() if name != "codec"}
    metadata["shape_layout"] = "tokens_channels"
    write_metadata(target, metadata)  # while latents are replaced, nothing may say whose they are
    known = scene.metadata.get("codec") or {}
    codec = {name: value for name, value in known.items() if name == "image_encoder"} | made_by
    write_scene(
        target,
        tensors={"shape": shape, **poses},
        conditionals=conditionals,
        metadata={**metadata, "codec": codec},
        format=format,
    )


def copy_lists(root: Path, out: Path, splits: Iterable[str]) -> None:
    for split in splits:
        if (root / split / SCENES_NAME).is_file():
            (out / split).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / split / SCENES_NAME, out / split / SCENES_NAME)


def groups(scenes: Iterable[tuple[Path, Scene]], size: int) -> Iterator[list[tuple[Path, Scene]]]:
    """Whole scenes with about `size` objects together."""
    group, count = [], 0
    for folder, scene in scenes:
        group.append((folder, scene))
        count += scene.metadata["num_objects"]
        if count >= size:
            yield group
            group, count = [], 0
    if group:
        yield group


# --- statistics -----------------------------------------------------------------------------------------------------


def compute_stats(root: str | Path, mode: str = "zscore") -> PoseCodec:
    """Fit a codec to the latents of the train split, and save it as <root>/stats.json.

    Args:
        mode: `zscore`, or `sam3d` or `identity`, which need no statistics.

    Raises:
        ValueError: there is no train split, a scene is bad, or scenes differ in `isotropic_scale` or in what they hold.
    """
    root, first = Path(root), {}

    def samples() -> Iterator[dict[str, Tensor]]:
        for scene_id in scene_ids(root, "train"):
            folder = root / "train" / scene_id
            scene = read_scene(folder, conditionals=False)
            form = {name: list(value.shape[1:]) for name, value in scene.tensors.items()}
            form["isotropic_scale"] = bool(scene.metadata.get("isotropic_scale"))
            first.setdefault("id", scene_id)
            usual = first.setdefault("form", form)
            for field in sorted(form.keys() | usual):
                if form.get(field) != usual.get(field):
                    there = f"in scene {first['id']!r} it is {usual.get(field)}"
                    raise bad_scene(folder, f"{field} is {form.get(field)}, {there}")
            yield scene.tensors

    fitted = PoseCodec.fit(samples())
    statistics = {"mean": dict(fitted.config.mean), "std": dict(fitted.config.std)} if mode == "zscore" else {}
    codec = PoseCodec(mode, **statistics, isotropic_scale=first["form"]["isotropic_scale"])
    with tempfile.TemporaryDirectory(dir=root, prefix=".stats") as temporary:
        codec.save_pretrained(temporary)
        os.replace(Path(temporary) / PoseCodec.config_name, root / PoseCodec.config_name)
    return codec
