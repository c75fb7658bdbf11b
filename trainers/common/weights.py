"""Weights handed over between runs: from an exported model or pipeline, a run or a checkpoint into a network."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME as ENCODER_INDEX_NAME
from transformers.utils import SAFE_WEIGHTS_NAME as ENCODER_WEIGHTS_NAME

from backlot.files import read_json
from trainers.common import checkpoints
from trainers.common.state import Part

FILES = (SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME, ENCODER_INDEX_NAME, ENCODER_WEIGHTS_NAME)
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SHOWN = 3
logger = logging.getLogger(__name__)


def load_weights(
    module: nn.Module,
    path: str | Path,
    *,
    part: str = "model",
    weights: Literal["ema", "model"] = "ema",
    strict: bool = True,
    prefixes: Sequence[str] | None = None,
    may_lack: Sequence[str] = (),
) -> list[str]:
    """Give `module` the weights stored in `path`, in its own dtype and on its own device; all that fit, or none.

    Args:
        module: the bare network, before it is prepared or sharded.
        path: a run (its newest intact checkpoint, or what it exported), a checkpoint, the folder of a model or of a
            pipeline, or one safetensors file.
        part: of a pipeline, the network's name (`transformer`, `unet`, `vae`); `model` where it has only one. A
            checkpoint has only the network that was trained.
        weights: of a checkpoint, the average or the live weights; a run that kept no average has only live ones.
        strict: the names and shapes of both sides must agree; otherwise what does not is left as it is.
        prefixes: only tensors whose names begin with one of them count, on both sides.
        may_lack: parts of names: parameters that `path` may lack even if `strict`, and which stay as they are.

    Returns:
        The names of either side that were not loaded, sorted.

    Raises:
        ValueError: there are no such weights, they are pickled or damaged, or (`strict`) they do not fit.
    """
    tensors = _select(_read(Path(path), part, weights), prefixes)
    state = module.state_dict()
    # of tensors that share their memory, a file has one
    slots = {name: (tensor.data_ptr() or name, tensor.shape) for name, tensor in state.items()}
    given = {slots[name] for name in tensors if name in state}
    missing = [name for name in _select(state, prefixes) if slots[name] not in given]
    unexpected = [name for name in tensors if name not in state]
    misshapen = [name for name in tensors if name in state and tensors[name].shape != state[name].shape]
    if strict:
        lacking = [name for name in missing if not any(each in name for each in may_lack)]
        shapes = [f"{name} {tuple(tensors[name].shape)} instead of {tuple(state[name].shape)}" for name in misshapen]
        found = (("missing", lacking), ("unexpected", unexpected), ("of another shape", shapes))
        problems = [f"{what}: {_shorten(names)}" for what, names in found if names]
        if problems:
            raise ValueError(f"{path} does not fit: {'; '.join(problems)}")
    left = sorted({*missing, *unexpected, *misshapen})
    if not tensors.keys() - left:
        raise ValueError(f"{path} holds no weights of this network")
    with torch.no_grad():
        for name in tensors.keys() - left:
            state[name].copy_(tensors[name])
    return left


def read_checkpoint(checkpoint: Path, weights: str) -> dict[str, Tensor]:
    """The tensors of `ema` or `model` in a checkpoint that is intact."""
    problems = checkpoints.verify(checkpoint)
    if problems:
        raise ValueError(f"{checkpoint} is damaged: {'; '.join(problems)}")
    if weights == "ema" and not list(checkpoint.glob("ema*.safetensors")):
        logger.info("%s holds no moving average: its live weights are taken", checkpoint)
        weights = "model"
    with Part(checkpoint, weights) as stored:
        return {name: stored.read(name) for name in stored.names()}


def _read(path: Path, part: str, weights: str) -> dict[str, Tensor]:
    """The tensors that a path stands for."""
    if path.is_file():
        return _read_file(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder")
    if (path / checkpoints.MANIFEST).is_file():
        return read_checkpoint(path, weights)
    if checkpoints.list_checkpoints(path):
        newest = checkpoints.find_latest(path)
        if newest is not None:
            logger.info("weights of %s", newest)
            return read_checkpoint(newest, weights)
        logger.warning("%s has no intact checkpoint; trying what it exported", path)
    return _read_folder(_find_network(path, part))


def _find_network(folder: Path, part: str) -> Path:
    """The folder of one network of a pipeline; a folder that is none is a network itself."""
    if (folder / part).is_dir():
        return folder / part
    index = folder / "model_index.json"
    if not index.is_file():
        return folder
    try:
        components = sorted(read_json(index).keys())
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{index} is damaged") from error
    networks = [name for name in components if any((folder / name / file).is_file() for file in FILES)]
    if part == "model" and len(networks) == 1:
        return folder / networks[0]
    raise ValueError(f"{folder} holds no {part}, but {', '.join(networks) or 'no weights'}")


def _read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model that was saved in one safetensors file or several."""
    name = next((name for name in FILES if (folder / name).is_file()), None)
    if name is None:
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
        if pickled:
            _refuse_pickle(folder / pickled[0])
        raise ValueError(f"{folder} holds no weights (none of {', '.join(FILES)})")
    if not name.endswith(".json"):
        return _read_file(folder / name)
    try:
        parts = sorted(set(read_json(folder / name)["weight_map"].values()))
        outside = [part for part in parts if Path(part).name != part]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / name} is damaged") from error
    if outside:
        raise ValueError(f"{folder / name} names a file outside its folder: {outside[0]}")
    return {key: tensor for part in parts for key, tensor in _read_file(folder / part).items()}


def _read_file(file: Path) -> dict[str, Tensor]:
    if file.suffix in PICKLED:
        _refuse_pickle(file)
    try:
        return load_file(file)
    except FileNotFoundError:
        raise ValueError(f"{file} is missing") from None
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _refuse_pickle(file: Path) -> None:
    raise ValueError(f"{file} is a pickle, which could run anything and is never loaded: save it as safetensors")


def _select(tensors: dict[str, Tensor], prefixes: Sequence[str] | None) -> dict[str, Tensor]:
    if prefixes is None:
        return tensors
    return {name: tensor for name, tensor in tensors.items() if name.startswith(tuple(prefixes))}


def _shorten(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
