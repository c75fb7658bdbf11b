"""Small random encoders in the format of the published ones: tests and demos load them by the same code."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import BitImageProcessorPil
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from pipelines.vpog.encoders import DINO

DINO_SIZES = {
    "dinov2": {"mlp_ratio": 2, "image_size": 56, "patch_size": 14},
    "dinov2_with_registers": {"mlp_ratio": 2, "image_size": 56, "patch_size": 14, "num_register_tokens": 4},
    "dinov3_vit": {"intermediate_size": 128, "image_size": 64, "patch_size": 16, "num_register_tokens": 4},
}


def save_tiny_dino(
    folder: str | Path,
    kind: str = "dinov2",
    *,
    image_mean: tuple[float, float, float] = tuple(IMAGENET_DEFAULT_MEAN),
    image_std: tuple[float, float, float] = tuple(IMAGENET_DEFAULT_STD),
    seed: int = 0,
) -> Path:
    """Write a DINO model as transformers does: configuration, weights, image processor. 64 wide, 2 layers, 4 heads.

    Args:
        kind: `dinov2`, `dinov2_with_registers` or `dinov3_vit`.

    Returns:
        The folder.
    """
    make_config, make_model, _ = DINO[kind]
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4} | DINO_SIZES[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make_model(make_config(**sizes)).save_pretrained(folder)
    BitImageProcessorPil(image_mean=list(image_mean), image_std=list(image_std)).save_pretrained(folder)
    return Path(folder)


def save_tiny_croco(
    path: str | Path,
    *,
    patch_size: int = 8,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_attention_heads: int = 4,
    seed: int = 0,
) -> Path:
    """Write a CroCo v2 checkpoint as its authors do: settings and weights of encoder and (one layer of) decoder.

    Returns:
        The file.
    """
    settings = {
        "patch_size": patch_size,
        "enc_embed_dim": hidden_size,
        "enc_depth": num_layers,
        "enc_num_heads": num_attention_heads,
        "dec_embed_dim": 32,
        "dec_depth": 1,
        "dec_num_heads": 2,
        "pos_embed": "RoPE100",
    }
    shapes = {"patch_embed.proj": (hidden_size, 3, patch_size, patch_size)}
    for layer in range(num_layers):
        shapes |= {f"enc_blocks.{layer}.{name}": shape for name, shape in _block(hidden_size).items()}
    shapes |= {"enc_norm": (hidden_size,), "decoder_embed": (32, hidden_size), "dec_norm": (32,)}
    shapes |= {f"dec_blocks.0.{name}": shape for name, shape in _block(32).items()}
    shapes |= {f"dec_blocks.0.cross_attn.{name}": (32, 32) for name in ("projq", "projk", "projv", "proj")}
    shapes |= {"dec_blocks.0.norm3": (32,), "dec_blocks.0.norm_y": (32,)}
    shapes |= {"prediction_head": (3 * patch_size**2, 32)}
    generator = torch.Generator().manual_seed(seed)
    weights = {"mask_token": torch.zeros(1, 1, 32)}
    for name, shape in shapes.items():
        weights |= {f"{name}.{part}": value for part, value in _layer(shape, generator).items()}
    torch.save({"croco_kwargs": settings, "model": weights}, path)
    return Path(path)


def _block(width: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a block's weights."""
    return {
        "norm1": (width,),
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "norm2": (width,),
        "mlp.fc1": (4 * width, width),
        "mlp.fc2": (width, 4 * width),
    }


def _layer(shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
    """Random weight and bias; those of a norm lie about 1 and 0."""
    bias = 0.1 * torch.randn(shape[0], generator=generator)
    if len(shape) == 1:
        return {"weight": 1 + 0.1 * torch.randn(shape, generator=generator), "bias": bias}
    fan_in = torch.Size(shape[1:]).numel()
    return {"weight": torch.randn(shape, generator=generator) * fan_in**-0.5, "bias": bias}
