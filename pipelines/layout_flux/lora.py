"""The branch's low-rank changes of FLUX's projections, to and from a file in PEFT's format.

In an adapter they act within the layout branch alone; a LoRA loaded by diffusers acts on all tokens.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from pipelines.layout_flux.adapter import PROJECTIONS, FluxLayoutAdapter

PREFIXES = ("base_model.model.", "transformer.")


def lora_parameters(adapter: FluxLayoutAdapter) -> dict[str, tuple[nn.Parameter, float]]:
    """Each matrix by its name in a file, and what it is multiplied by there: the scale goes into the second."""
    found = {}
    for block, head in adapter.layout_heads.items():
        for name in PROJECTIONS:
            if (key := name.replace(".", "_")) in head.lora:
                pair, place = head.lora[key], f"transformer_blocks.{block}.attn.{name}"
                found[f"{place}.lora_A.weight"] = pair.down.weight, 1.0
                found[f"{place}.lora_B.weight"] = pair.up.weight, pair.scale
    return found


def export_lora(adapter: FluxLayoutAdapter, folder: str | Path) -> Path:
    """Write them as diffusers reads a LoRA of FLUX, with alpha equal to the rank.

    Raises:
        ValueError: the adapter has none.
    """
    parameters = lora_parameters(adapter)
    if not parameters:
        raise ValueError("this adapter has no LoRA")
    tensors = {
        f"transformer.{name}": (weight.detach().float().cpu() * scale).contiguous()
        for name, (weight, scale) in parameters.items()
    }
    path = Path(folder, LORA_WEIGHT_NAME_SAFE)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"format": "pt"})
    return path


def import_lora(adapter: FluxLayoutAdapter, path: str | Path) -> None:
    """Take over those of a file: its names must be the adapter's, all of them and no others.

    Args:
        path: the file, or its folder; names may begin with `transformer.` or `base_model.model.`.

    Raises:
        ValueError: it holds others, or none.
    """
    path = Path(path)
    path = path / LORA_WEIGHT_NAME_SAFE if path.is_dir() else path
    try:
        tensors = {strip(name): tensor for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    parameters = lora_parameters(adapter)
    missing, unknown = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    shapes = [name for name in parameters.keys() & tensors.keys() if parameters[name][0].shape != tensors[name].shape]
    for what, names in (("lacks", missing), ("holds besides", unknown), ("has of another shape", sorted(shapes))):
        if names:
            raise ValueError(f"{path} does not fit the adapter: it {what} {', '.join(names[:3])} ({len(names)} in all)")
    if not parameters:
        raise ValueError("this adapter has no LoRA")
    with torch.no_grad():
        for name, (weight, scale) in parameters.items():
            weight.copy_(tensors[name].float() / scale)


def strip(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name
