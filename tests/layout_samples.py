"""A FLUX of three double and two single blocks, adapters for it with every layer awake, and layouts of a few boxes."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import FluxTransformer2DModel

from pipelines.layout_flux import FluxLayoutAdapter, Layout, LayoutState

GRID = (6, 8)
TEXT_LENGTH = 7
WIDTHS = {"text_embed_dim": 12, "clip_embed_dim": 10, "dino_embed_dim": 14}
STAGES = {
    "layout": {"modulation_hidden": None, "bridge_rank": None},
    "modulation": {"modulation_hidden": 16, "bridge_rank": None},
    "bridge": {"modulation_hidden": 16, "bridge_rank": 8},
}
APART = [[0.0, 0.0, 0.4, 0.5], [0.5, 0.5, 1.0, 1.0]]
OVERLAPPING = [[0.1, 0.1, 0.7, 0.7], [0.4, 0.3, 0.9, 1.0], [0.0, 0.0, 1.0, 1.0], [0.3, 0.4, 0.35, 0.45]]
NOT_A_BOX = [0.0, 0.0, 0.0, 0.0]


def tiny_flux(seed: int = 0, **changed) -> FluxTransformer2DModel:
    torch.manual_seed(seed)
    settings = {
        "in_channels": 16,
        "num_layers": 3,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 20,
        "pooled_projection_dim": 12,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    }
    return FluxTransformer2DModel(**{**settings, **changed}).eval().requires_grad_(False)


def tiny_adapter(transformer: FluxTransformer2DModel, stage: str = "bridge", awake: float = 0.0, **changed):
    """Untrained, or with noise of spread `awake` on all that it holds: layers that start at 0 hide faults."""
    torch.manual_seed(1)
    settings = {
        "layout_double_blocks": "every 2",
        "lora_rank": 4,
        "lora_alpha": 8,
        "place_freqs": 2,
        **WIDTHS,
        **STAGES[stage],
        **changed,
    }
    adapter = FluxLayoutAdapter.for_transformer(transformer, **settings).eval()
    if awake:
        wake(adapter, awake)
    return adapter


@torch.no_grad()
def wake(module: torch.nn.Module, spread: float = 0.2) -> None:
    for parameter in module.parameters():
        parameter.add_(spread * torch.randn_like(parameter))


def tiny_layout(boxes: list = OVERLAPPING, batch: int = 1, seed: int = 2, **changed) -> Layout:
    """Each picture with the same boxes and instances of its own; boxes without an area are padding."""
    generator = torch.Generator().manual_seed(seed)
    values = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    values = values[None].repeat(batch, axis=0) if np.ndim(boxes) < 3 else np.array(boxes, dtype=np.float32)
    shape = values.shape[:2]
    valid = torch.from_numpy((values[..., 2] > values[..., 0]) & (values[..., 3] > values[..., 1]))
    numbers = torch.arange(shape[1]).expand(shape)
    phrases = torch.stack([numbers % TEXT_LENGTH, (numbers + 2).clamp(max=TEXT_LENGTH)], dim=-1)
    embeds = {f"{name}s": torch.randn(*shape, width, generator=generator) for name, width in EMBEDS.items()}
    return Layout(
        **{
            "boxes": values,
            "has_text": valid,
            "has_clip": valid,
            "has_dino": valid,
            "valid": valid,
            "depth_labels": numbers % 3,
            "phrase_spans": torch.where(valid[..., None], phrases, 0),
            **embeds,
            **changed,
        }
    )


EMBEDS = {name.removesuffix("_dim"): width for name, width in WIDTHS.items()}


def flux_inputs(batch: int = 1, seed: int = 3, dtype: torch.dtype = torch.float32, guidance: bool = True) -> dict:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = GRID
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
    inputs = {
        "hidden_states": torch.randn(batch, rows * columns, 16, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch, TEXT_LENGTH, 20, generator=generator).to(dtype),
        "pooled_projections": torch.randn(batch, 12, generator=generator).to(dtype),
        "timestep": torch.linspace(0.9, 0.2, batch).to(dtype),
        "img_ids": ids.flatten(0, 1),
        "txt_ids": torch.zeros(TEXT_LENGTH, 3),
    }
    return inputs | {"guidance": torch.full((batch,), 3.5)} if guidance else inputs


def see(adapter: FluxLayoutAdapter, transformer: FluxTransformer2DModel, layout: Layout, **settings) -> LayoutState:
    return adapter(layout, GRID, transformer.pos_embed, **settings)


def predict(transformer: FluxTransformer2DModel, inputs: dict, state: LayoutState | None = None, **others):
    kwargs = others | ({} if state is None else {"layout": state})
    return transformer(**inputs, joint_attention_kwargs=kwargs or None).sample


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b|."""
    return ((a - b).norm() / b.norm()).item()
