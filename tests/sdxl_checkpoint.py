"""A tiny SDXL checkpoint in the official folder layout, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

PICTURE_SIZE = 16  # pixels: 8 latents of a VAE that halves once
# SDXL's own proportions, each number made small
SDXL = {
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 3),
    "attention_head_dim": (1, 2, 4),
    "norm_num_groups": 4,
    "use_linear_projection": True,
    "cross_attention_dim": 12,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 6,
    "projection_class_embeddings_input_dim": 10 + 6 * 6,
}


def write_sdxl(folder: Path, dtype: torch.dtype = torch.float32, **overrides) -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**{**SDXL, **overrides}).eval()
    with torch.no_grad():  # official weights have no layer of ones and zeros
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    unet = unet.to(dtype)
    unet.save_pretrained(folder / "unet")
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=PICTURE_SIZE,
        scaling_factor=0.13025,
    )
    vae.save_pretrained(folder / "vae")
    return unet.float()
