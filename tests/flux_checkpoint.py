"""A tiny FLUX in the official folder layout, with random weights, and an adapter for it whose every part is awake."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from pipelines.layout_flux import FluxLayoutAdapter
from pipelines.layout_flux.tiny import save_tiny_models

TEXT, CLIP, DINO = 32, 32, 32  # widths of T5, of both CLIP towers, of DINOv2
SIDE = 32  # pixels: 8 x 8 image tokens of a VAE that halves once
# FLUX.1-dev's own proportions, each number made small
FLUX = {
    "in_channels": 16,
    "num_layers": 3,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT,
    "pooled_projection_dim": CLIP,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}


def write_flux(folder: Path, **overrides) -> Path:
    """A FLUX checkpoint; beside it `clip_vision` and `dino`, which its model_index.json does not know."""
    save_tiny_models(folder, text_width=TEXT, clip_width=CLIP, dino_width=DINO, crop_side=16)
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(**{**FLUX, **overrides}).eval()
    with torch.no_grad():  # official weights have no layer of ones and zeros
        for parameter in transformer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    transformer.save_pretrained(folder / "transformer")
    parts = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    index = {"_class_name": FluxPipeline.__name__, "_diffusers_version": "0.30.0.dev0", **parts}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def create_adapter(transformer: FluxTransformer2DModel, awake: bool = True, **settings) -> FluxLayoutAdapter:
    """An adapter with small numbers; awake: no weight is 0, as after training."""
    torch.manual_seed(1)
    settings = {
        "layout_double_blocks": "every 2",
        "text_embed_dim": CLIP,
        "clip_embed_dim": CLIP,
        "dino_embed_dim": DINO,
        "box_grid": 2,
        "fourier_freqs": 2,
        "place_freqs": 2,
        "lora_rank": 4,
        "lora_alpha": 4,
        "modulation_hidden": 16,
        "bridge_rank": 4,
        "max_refs": 4,
        **settings,
    }
    adapter = FluxLayoutAdapter.for_transformer(transformer, **settings).eval()
    if awake:
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return adapter
