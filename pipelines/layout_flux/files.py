"""A layout adapter in a folder: `layout_adapter.safetensors` and `config.json`, and where it may be looked for."""

from __future__ import annotations

import json
import logging
import os
import re
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from backlot.files import file_sha256, read_json, write_json
from pipelines.layout_flux.adapter import FluxLayoutAdapter

WEIGHTS_NAME = "layout_adapter.safetensors"
CONFIG_NAME = "config.json"
EXPORTED_NAME = "diffusion_pytorch_model.safetensors"
"""As a component of an exported pipeline is called."""
MANIFEST_NAME = "manifest.json"
_CHECKPOINT = re.compile(r"checkpoint[-_](\d+)")
logger = logging.getLogger(__name__)


def save_adapter(
    adapter: FluxLayoutAdapter,
    folder: str | Path,
    weight_name: str = WEIGHTS_NAME,
    tensors: dict[str, Tensor] | None = None,
) -> None:
    """Write the whole adapter, frozen parts too, in float32.

    Args:
        folder: made if it is not there.
        tensors: its weights by name, where they are not those that the adapter holds (a gathered shard, an average).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = adapter.state_dict() if tensors is None else tensors
    tensors = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    temporary = folder / f"{weight_name}.{os.getpid()}.tmp"
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.replace(folder / weight_name)
    finally:
        temporary.unlink(missing_ok=True)
    write_json(folder / CONFIG_NAME, json.loads(adapter.to_json_string()))


def load_adapter(
    folder_or_repo: str | Path,
    subfolder: str | None = None,
    weight_name: str = WEIGHTS_NAME,
    low_cpu_mem_usage: bool = True,
) -> FluxLayoutAdapter:
    """The adapter of a folder, a checkpoint, a run, an exported pipeline, or a repository of the hub.

    Args:
        folder_or_repo: what holds it. Of a run or a stage the newest checkpoint that is whole is taken;
            `checkpoint_500` and `checkpoint-500/model.pt` name `checkpoint-500`.
        subfolder: of it.
        low_cpu_mem_usage: make no weights that are replaced at once.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or not one of ours.
    """
    weights, config_file = find_adapter(folder_or_repo, subfolder, weight_name)
    try:
        config = read_json(config_file)
        tensors = load_file(weights)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{weights.parent} holds no readable layout adapter: {error}") from error
    if not isinstance(config, dict) or config.get("_class_name") != FluxLayoutAdapter.__name__:
        kind = config.get("_class_name") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{config_file} describes a {kind}, not a {FluxLayoutAdapter.__name__}")
    with init_empty_weights(include_buffers=False) if low_cpu_mem_usage else nullcontext():
        adapter = FluxLayoutAdapter.from_config(config)
    check_tensors(adapter, tensors, weights)
    adapter.load_state_dict(tensors, assign=low_cpu_mem_usage)
    return adapter.eval()


def check_tensors(adapter: FluxLayoutAdapter, tensors: dict[str, Tensor], source: str | Path) -> None:
    """Raise ValueError unless these are the adapter's tensors: all of them, no others, of the same shapes."""
    own = adapter.state_dict()
    problems = [f"{name} is missing" for name in own.keys() - tensors.keys()]
    problems += [f"{name} is not one of its tensors" for name in tensors.keys() - own.keys()]
    problems += [
        f"{name} has the shape {tuple(tensors[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own.keys() & tensors.keys()
        if own[name].shape != tensors[name].shape
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{source} does not fit its configuration: {'; '.join(sorted(problems)[:3])}{more}")


def find_adapter(
    folder_or_repo: str | Path, subfolder: str | None = None, weight_name: str = WEIGHTS_NAME
) -> tuple[Path, Path]:
    """The files of weights and configuration of an adapter; arguments and errors as of `load_adapter`."""
    folder = find_folder(Path(folder_or_repo, subfolder or ""), weight_name)
    if folder is not None:
        name = weight_name if (folder / weight_name).is_file() else EXPORTED_NAME
        return folder / name, folder / CONFIG_NAME
    repo = str(folder_or_repo)
    if Path(repo).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise FileNotFoundError(f"{Path(repo, subfolder or '')} holds no layout adapter ({weight_name}, {CONFIG_NAME})")
    weights, config = (hf_hub_download(repo, name, subfolder=subfolder) for name in (weight_name, CONFIG_NAME))
    return Path(weights), Path(config)


def find_folder(path: Path, weight_name: str = WEIGHTS_NAME) -> Path | None:
    """The folder of an adapter that a path names, in one of the ways of `load_adapter`; None if it names none.

    Raises:
        ValueError: a checkpoint is named that is damaged.
    """
    if path.suffix in (".pt", ".safetensors") and not path.is_dir():
        path = path.parent
    if not path.is_dir() and (match := _CHECKPOINT.fullmatch(path.name)):
        path = path.with_name(f"checkpoint-{match[1]}")
    for folder in (path, path / "layout_adapter"):
        if is_adapter(folder, weight_name):
            if problem := damage(folder, weight_name):
                raise ValueError(f"{folder} is damaged: {problem}")
            return folder
    return newest_checkpoint(path, weight_name)


def newest_checkpoint(run: Path, weight_name: str = WEIGHTS_NAME) -> Path | None:
    """The newest whole checkpoint of a run or a stage; damaged ones on the way are named in a warning."""
    steps = {}
    for folder in run.iterdir() if run.is_dir() else ():
        if (match := _CHECKPOINT.fullmatch(folder.name)) and folder.is_dir():
            steps[folder] = int(match[1])
    for folder in sorted(steps, key=steps.get, reverse=True):
        if not (folder / MANIFEST_NAME).is_file():
            problem = f"{MANIFEST_NAME}: missing"
        elif not is_adapter(folder, weight_name):
            problem = f"{weight_name} or {CONFIG_NAME}: missing"
        else:
            problem = damage(folder, weight_name)
        if problem is None:
            return folder
        logger.warning("%s is damaged (%s); trying the one before it", folder, problem)
    return None


def is_adapter(folder: Path, weight_name: str = WEIGHTS_NAME) -> bool:
    """Whether the files are there; that an exported component is an adapter, too, its configuration says."""
    if not (folder / CONFIG_NAME).is_file():
        return False
    return (folder / weight_name).is_file() or (folder / EXPORTED_NAME).is_file()


def damage(folder: Path, weight_name: str = WEIGHTS_NAME) -> str | None:
    """What the manifest of a checkpoint says against its adapter; None if nothing, or without a manifest."""
    manifest = folder / MANIFEST_NAME
    if not manifest.is_file():
        return None
    try:
        files = read_json(manifest)["files"]
        for name in (weight_name, CONFIG_NAME):
            if (folder / name).stat().st_size != files[name]["bytes"]:
                return f"{name}: not of the size it had"
            if file_sha256(folder / name) != files[name]["sha256"]:
                return f"{name}: content changed"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST_NAME}: {type(error).__name__} {error}"
    return None
