"""Latent caches: what they are made of, and the reader of those that `data_prep.images encode` writes.

A cache is a folder. That of a picture data set (others hold other tensors, see `data_prep/shadows/latents.py`):

    manifest.json               what the latents are of, and size, count and hashes of every shard
    shard-00000.safetensors     mean (N, C, h, w), std (the same), mean_flipped and std_flipped for the mirrored
    pictures,
                                class_labels (N,), indices (N,): rows of the data set that was encoded

Means and standard deviations are the VAE's own; `scaling_factor` and `shift_factor` of the manifest are applied on
reading: `latents = (x - shift_factor) * scaling_factor`.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset

from backlot.files import file_sha256, json_sha256
from backlot.fingerprint import fingerprint

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 64 * 2**20
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Shard:
    """One file of a cache: `size` in bytes, `count` samples, and the sha256 of the encoded pixels and labels."""

    name: str
    size: int
    sha256: str
    count: int
    content_sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a cache holds. Shards are in order and hold `shard_size` samples each, the last one the rest.

    `dataset_fingerprint` is for data sets that can tell cheaply whether they have changed.
    """

    vae_fingerprint: str
    scaling_factor: float
    shift_factor: float | None
    dataset_name: str
    split: str
    image_size: int
    num_samples: int
    num_classes: int | None
    latent_shape: list[int]
    dtype: str
    mean_only: bool
    flip: bool
    shard_size: int
    shards: list[Shard] = field(default_factory=list)
    dataset_fingerprint: str | None = None
    format_version: int = FORMAT_VERSION

    @property
    def complete(self) -> bool:
        return sum(shard.count for shard in self.shards) == self.num_samples

    def to_json(self) -> str:
        """JSON with a sha256 over itself, by which `read_manifest` sees damage."""
        values = asdict(self)
        return json.dumps({**values, "manifest_sha256": json_sha256(values)}, indent=2) + "\n"


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check `folder/manifest.json`; ValueError, one line, if it is missing, damaged or of another version."""
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        raise ValueError(f"{folder} is not a latent cache: it has no {MANIFEST_NAME}")
    damaged = f"{path} is damaged"
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise ValueError(f"{damaged}: it is larger than {MAX_MANIFEST_BYTES} bytes")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise ValueError(f"{damaged}: it is not JSON") from None
    if not isinstance(values, dict) or values.pop("manifest_sha256", None) != json_sha256(values):
        raise ValueError(f"{damaged}: its own checksum does not fit it")
    if values.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {values.get('format_version')}, this code reads {FORMAT_VERSION}")
    try:
        manifest = Manifest(**{**values, "shards": [Shard(**shard) for shard in values["shards"]]})
        remaining = manifest.num_samples
        for number, shard in enumerate(manifest.shards):
            # The name is computed and not trusted: a manifest must not be able to point out of its folder.
            if (
                shard.name != shard_name(number)
                or shard.count != min(manifest.shard_size, remaining)
                or shard.count < 1
            ):
                raise ValueError(f"{damaged}: shard {number} is out of order")
            remaining -= shard.count
    except (TypeError, KeyError) as error:
        raise ValueError(f"{damaged}: {error}") from None
    return manifest


def check_shard(folder: str | Path, shard: Shard, *, content: bool, writer: str = "data_prep.images encode") -> None:
    """ValueError, one line, if a shard is missing or has another size or, with `content`, another sha256."""
    path = Path(folder) / shard.name
    repair = f"run {writer} again to repair it"
    if not path.is_file():
        raise ValueError(f"{path} is missing: {repair}")
    if path.stat().st_size != shard.size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, the manifest says {shard.size}: {repair}")
    if content and file_sha256(path) != shard.sha256:
        raise ValueError(f"{path} is damaged, its sha256 is not the manifest's: {repair}")


def local_vae_folder(name_or_path: str | Path) -> Path:
    """The folder of a VAE; a hub id (owner/name) is downloaded, config and safetensors weights only."""
    if Path(name_or_path).exists() or str(name_or_path).count("/") != 1 or str(name_or_path).startswith("/"):
        return Path(name_or_path)
    from huggingface_hub import snapshot_download

    stem = WEIGHTS_NAME.removesuffix(".safetensors")
    patterns = ["config.json", WEIGHTS_NAME, f"{WEIGHTS_NAME}.index.json", f"{stem}-*-of-*.safetensors"]
    return Path(snapshot_download(str(name_or_path), allow_patterns=patterns))


def vae_fingerprint(name_or_path: str | Path) -> str:
    """sha256 over the weights and the config of a VAE that `save_pretrained` wrote.

    It covers names, types, shapes and values of the tensors and the config without its `_` entries (version, path), so
    saving the same VAE again, or in more shards, keeps it.

    Raises:
        ValueError: the folder holds no `config.json` or no safetensors weights.
    """
    folder = local_vae_folder(name_or_path)
    config_path, index_path = folder / "config.json", folder / f"{WEIGHTS_NAME}.index.json"
    if not config_path.is_file():
        raise ValueError(
            f"{folder} is not the folder of a VAE: it has no config.json (give the `vae` folder of a pipeline)"
        )
    if index_path.is_file():
        tensor_files = json.loads(index_path.read_bytes())["weight_map"]
    elif (folder / WEIGHTS_NAME).is_file():
        with safe_open(folder / WEIGHTS_NAME, framework="pt") as weights:
            tensor_files = dict.fromkeys(weights.keys(), WEIGHTS_NAME)
    else:
        raise ValueError(f"{folder} has no safetensors weights ({WEIGHTS_NAME})")

    config = {key: value for key, value in json.loads(config_path.read_bytes()).items() if not key.startswith("_")}
    digest = hashlib.sha256(json_sha256(config).encode())
    handles = {name: safe_open(folder / name, framework="pt") for name in set(tensor_files.values())}
    for name in sorted(tensor_files):
        tensor = handles[tensor_files[name]].get_tensor(name)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The raw bytes of a CPU tensor of any type."""
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())


class LatentCache(Dataset):
    """A complete cache, memory-mapped. Sub-classes say which tensors they read, and make items of them.

    Args:
        folder: where the manifest is.
        tensors: names that every shard must hold.
        split: the split that must have been encoded; None takes any.
        vae_fingerprint: what `vae_fingerprint(folder)` says of the VAE that will decode; another one's latents are
            refused.

    Raises:
        ValueError: the cache is damaged, incomplete, of another split or VAE, or without the tensors.
    """

    writer = "data_prep.images encode"

    def __init__(
        self, folder: Path, tensors: tuple[str, ...], *, split: str | None = None, vae_fingerprint: str | None = None
    ) -> None:
        manifest = read_manifest(folder)
        if split not in (None, manifest.split):
            raise ValueError(f"{folder} holds the latents of split {manifest.split!r}, not of {split!r}")
        if vae_fingerprint not in (None, manifest.vae_fingerprint):
            raise ValueError(
                f"the latents in {folder} were made by another VAE (fingerprint {manifest.vae_fingerprint[:12]}, wanted"
                f" {vae_fingerprint[:12]}): encode the images again with this one"
            )
        if not manifest.complete:
            done = sum(shard.count for shard in manifest.shards)
            raise ValueError(
                f"{folder} is incomplete, {done} of {manifest.num_samples} samples: run {self.writer} again to finish"
            )
        for shard in manifest.shards:
            check_shard(folder, shard, content=False, writer=self.writer)
        self.folder = folder
        self.manifest = manifest
        self._handles: dict[int, safe_open] = {}
        self._pid = os.getpid()
        missing = sorted(set(tensors).difference(self._shard(0).keys()))
        if missing:
            raise ValueError(f"{folder} holds latents of another kind, without {', '.join(missing)}")

    def __len__(self) -> int:
        return self.manifest.num_samples

    @property
    def fingerprint(self) -> str:
        """Of what was encoded, by which VAE and how; another order or size of shards is other data."""
        made = self.manifest
        settings = (made.split, made.vae_fingerprint, made.dtype, made.mean_only, made.num_samples)
        return fingerprint([settings, *(shard.content_sha256 for shard in made.shards)])

    def locate(self, row: int) -> tuple[safe_open, int]:
        """The shard that holds a row, and the row's place in it."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        number, offset = divmod(row, self.manifest.shard_size)
        return self._shard(number), offset

    def scale(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the VAE gives them -> as networks take them."""
        return (latents - (self.manifest.shift_factor or 0.0)) * self.manifest.scaling_factor

    def verify(self) -> None:
        """Hash every shard; ValueError names the first one that is not what was written."""
        for shard in self.manifest.shards:
            check_shard(self.folder, shard, content=True, writer=self.writer)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_handles": {}}  # open files do not travel to a spawned worker

    def _shard(self, number: int) -> safe_open:
        """The memory map of a shard, opened at first use in each process."""
        if self._pid != os.getpid():  # a forked worker
            self._handles, self._pid = {}, os.getpid()
        if number not in self._handles:
            path = self.folder / self.manifest.shards[number].name
            try:
                self._handles[number] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged: {error}") from None
        return self._handles[number]
