"""A layout adapter in a folder: `layout_adapter.safetensors` and `config.json`, and where it may be looked for.

A checkpoint of training holds the weights alone; their configuration is the section `adapter` of its run's config.yaml.
"""

from __future__ import annotations

import json
import logging
import os
import re
from contextlib import nullcontext
from pathlib import Path

import torch
import yaml
from accelerate import init_empty_weights
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from backlot.files import file_sha256, read_json, write_file, write_json
from pipelines.layout_flux.adapter import FluxLayoutAdapter

WEIGHTS_NAME = "layout_adapter.safetensors"
CONFIG_NAME = "config.json"
RUN_CONFIG_NAME = "config.yaml"
EXPORTED_NAME = "diffusion_pytorch_model.safetensors"
"""As a component of an exported pipeline is called."""
MANIFEST_NAME = "manifest.json"
CARD_NAME = "README.md"
CARD = """---
base_model: {base}
library_name: diffusers
tags: [layout, flux]
---

A layout adapter for {base}: it puts objects into boxes and keeps their identity. It loads by
`FluxLayoutPipeline.load_layout_adapter`.

FLUX.1-dev and what derives from it are under the FLUX.1 [dev] non-commercial licence, adapters trained on it included.
"""
_CHECKPOINT = re.compile(r"checkpoint[-_](\d+)")
logger = logging.getLogger(__name__)


def save_adapter(
    adapter: FluxLayoutAdapter,
    folder: str | Path,
    weight_name: str = WEIGHTS_NAME,
    tensors: dict[str, Tensor] | None = None,
) -> None:
    """Write the whole adapter, frozen parts too, in float32, with a card that says what licence it is under.

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
    if not (folder / CARD_NAME).exists():
        write_file(folder / CARD_NAME, CARD.format(base=adapter.config.base_model or "black-forest-labs/FLUX.1-dev"))


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
    config = read_config(config_file)
    try:
        # copied: as they lie in the file their addresses are odd, and kernels would round otherwise than before saving
        tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    except SafetensorError as error:
        raise ValueError(f"{weights} is damaged: {error}") from error
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


def read_config(path: Path) -> dict:
    """The arguments of an adapter, from a config.json or a run's config.yaml; ValueError if it has none."""
    try:
        values = read_json(path) if path.name == CONFIG_NAME else yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    values = values if isinstance(values, dict) else {}
    if path.name == CONFIG_NAME and values.get("_class_name") != FluxLayoutAdapter.__name__:
        raise ValueError(f"{path} describes {values.get('_class_name')}, not a {FluxLayoutAdapter.__name__}")
    config = values if path.name == CONFIG_NAME else values.get("adapter")
    if not isinstance(config, dict):
        raise ValueError(f"{path} has no section `adapter`: this run trained none")
    return config


def find_adapter(
    folder_or_repo: str | Path, subfolder: str | None = None, weight_name: str = WEIGHTS_NAME
) -> tuple[Path, Path]:
    """The files of weights and configuration of an adapter; arguments and errors as of `load_adapter`."""
    folder = find_folder(Path(folder_or_repo, subfolder or ""), weight_name)
    if folder is not None:
        return files_of(folder, weight_name)
    repo = str(folder_or_repo)
    if Path(repo).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise FileNotFoundError(f"{Path(repo, subfolder or '')} holds no layout adapter ({weight_name}, {CONFIG_NAME})")
    weights, config = (hf_hub_download(repo, name, subfolder=subfolder) for name in (weight_name, CONFIG_NAME))
    return Path(weights), Path(config)


def files_of(folder: Path, weight_name: str = WEIGHTS_NAME) -> tuple[Path, Path] | None:
    """Weights and configuration in a folder; None if it has not both."""
    configs = (folder / CONFIG_NAME, folder / RUN_CONFIG_NAME, folder.parent / RUN_CONFIG_NAME)
    for weights, known in ((folder / weight_name, configs), (folder / EXPORTED_NAME, configs[:1])):
        config = next((path for path in known if path.is_file()), None)
        if weights.is_file() and config is not None:
            return weights, config
    return None


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
        if files_of(folder, weight_name):
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
        problem = damage(folder, weight_name) if (folder / MANIFEST_NAME).is_file() else f"{MANIFEST_NAME}: missing"
        if problem is None and files_of(folder, weight_name):
            return folder
        logger.warning("%s holds no whole adapter (%s); trying the one before it", folder, problem or "no weights")
    return None


def damage(folder: Path, weight_name: str = WEIGHTS_NAME) -> str | None:
    """What the manifest of a checkpoint says against its adapter; None if nothing, or without a manifest."""
    manifest = folder / MANIFEST_NAME
    if not manifest.is_file():
        return None
    try:
        about = read_json(manifest)["files"][weight_name]
        if (folder / weight_name).stat().st_size != about["bytes"]:
            return f"{weight_name}: not of the size it had"
        return None if file_sha256(folder / weight_name) == about["sha256"] else f"{weight_name}: content changed"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST_NAME}: {type(error).__name__} {error}"
