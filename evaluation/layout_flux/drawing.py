"""Pictures of layouts, and the flow loss on them, by the pipeline that users get."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from backlot.codecs import DTYPES
from backlot.loading import default_device, load_pipeline
from evaluation.layout_flux.benchmarks.formats import Request
from evaluation.layout_flux.examples import Item
from evaluation.layout_flux.settings import Sampling
from pipelines.layout_flux.encoders import object_text
from pipelines.layout_flux.files import load_adapter
from pipelines.layout_flux.layout import Layout, LayoutState
from pipelines.layout_flux.pipeline import FluxLayoutPipeline

FLOW_SIGMAS = 4
"""Noise levels at which the flow loss of a layout is measured: the middles of so many equal parts of [0, 1]."""


@dataclass(frozen=True)
class Drawing:
    """Pictures (B, H, W, 3) uint8, and alpha (N,) of the objects of each; None where there was no layout."""

    pictures: np.ndarray
    alphas: list[list[float]] | None


def load_model(source: str, base: str | None, device: str | None = None, dtype: str = "float32") -> FluxLayoutPipeline:
    """The pipeline of a model.

    Args:
        source: folder of an exported pipeline, or whatever an adapter can be loaded from.
        base: FLUX pipeline of an adapter: folder or hub id; the one that it was trained on by default.
        device: the accelerator if there is one, by default.

    Raises:
        OSError, ValueError: there is no model, or none that fits the base.
    """
    if Path(source, "model_index.json").is_file():
        return load_pipeline(FluxLayoutPipeline, Path(source), device, dtype)
    base = base or load_adapter(source).config.base_model
    if base is None:
        raise ValueError(f"{source} is an adapter that does not say which FLUX it belongs to: give --base_model")
    pipeline = FluxLayoutPipeline.from_pretrained(base, dtype=DTYPES[dtype])
    pipeline.to(default_device() if device is None else device)
    pipeline.load_layout_adapter(source)
    return pipeline


def noise_generator(seed: int, *names: str | int) -> torch.Generator:
    """The noise of one layout: a function of seed and names, on the CPU whatever the device."""
    digest = hashlib.sha256(" ".join(map(str, (seed, *names))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)


def draw(
    pipeline: FluxLayoutPipeline,
    items: Sequence[Item],
    sampling: Sampling,
    *,
    seed: int = 0,
    batch_size: int = 32,
    with_layout: bool = True,
    feedback: bool = True,
) -> Drawing:
    """A picture of each item; switches the pipeline's progress bar off.

    An item's noise is made from the seed and its name: neither batches nor variants of a layout matter to it.

    Raises:
        ValueError: the pictures are not finite, or what the pipeline refuses.
    """
    pipeline.set_progress_bar_config(disable=True)
    pictures, alphas = [], []
    for start in range(0, len(items), batch_size):
        batch = default_collate(list(items[start : start + batch_size]))
        rows, columns = batch["latents"].shape[-2:]
        output = pipeline(
            prompt_embeds=batch["prompt_embeds"].to(pipeline.device, pipeline.dtype),
            pooled_prompt_embeds=batch["pooled_prompt_embeds"].to(pipeline.device, pipeline.dtype),
            layout=Layout.from_batch(batch) if with_layout else None,
            height=rows * pipeline.vae_scale_factor,
            width=columns * pipeline.vae_scale_factor,
            generator=[noise_generator(seed, name) for name in batch["sample_id"]],
            feedback=feedback,
            output_type="np",
            **sampling.model_dump(),
        )
        if not np.isfinite(output.images).all():
            raise ValueError("the pictures are not finite, this model has diverged")
        pictures.append((255 * output.images).round().astype(np.uint8))
        alphas += output.alpha or []
    return Drawing(np.concatenate(pictures), alphas or None)


def draw_request(pipeline: FluxLayoutPipeline, request: Request, sampling: Sampling, seed: int) -> Image.Image:
    """The picture that a benchmark asks for: its boxes, as many as the adapter takes, in the order given."""
    instances = [each for each in request.instances if each.is_drawable][: pipeline.layout_adapter.config.max_refs]
    side = pipeline.vae_scale_factor * 2
    layout = {
        "boxes": [each.box for each in instances],
        "box_prompts": [object_text(each.label, each.caption) for each in instances],
    }
    return pipeline(
        prompt=request.prompt,
        height=max(1, round(request.height / side)) * side,
        width=max(1, round(request.width / side)) * side,
        generator=noise_generator(seed, request.id),
        **(layout if instances else {}),
        **sampling.model_dump(),
    ).images[0]


@torch.no_grad()
def flow_losses(
    pipeline: FluxLayoutPipeline,
    items: Sequence[Item],
    *,
    seed: int = 0,
    batch_size: int = 32,
    with_layout: bool = True,
    feedback: bool = True,
) -> tuple[np.ndarray, float | None]:
    """The flow matching loss of each item, (B,), a mean over noise levels, and the mean magnitude of the feedback.

    Noise and levels are the same whatever the switches.
    """
    losses, magnitudes = [], []
    device, dtype = pipeline.device, pipeline.transformer.dtype
    for start in range(0, len(items), batch_size):
        batch = default_collate(list(items[start : start + batch_size]))
        clean = batch["latents"]
        state = _state(pipeline, batch, feedback) if with_layout else None
        found = torch.zeros(len(clean))
        for level in range(FLOW_SIGMAS):
            sigma = (level + 0.5) / FLOW_SIGMAS
            generators = [noise_generator(seed, name, level) for name in batch["sample_id"]]
            noise = torch.stack([torch.randn(clean.shape[1:], generator=each) for each in generators])
            noisy = (1 - sigma) * clean + sigma * noise
            velocity = _velocity(pipeline, noisy.to(device, dtype), sigma, batch, state).float().cpu()
            found += (velocity - (noise - clean)).square().flatten(1).mean(1) / FLOW_SIGMAS
            magnitude = None if state is None else state.feedback_magnitude()
            magnitudes += [] if magnitude is None else [float(magnitude)]
        losses.append(found)
    return torch.cat(losses).numpy(), float(np.mean(magnitudes)) if magnitudes else None


def _state(pipeline: FluxLayoutPipeline, batch: Item, feedback: bool) -> LayoutState:
    adapter = pipeline.layout_adapter
    rows, columns = batch["latents"].shape[-2:]
    layout = Layout.from_batch(batch).to(pipeline.device, adapter.dtype)
    return adapter(layout, (rows // 2, columns // 2), pipeline.transformer.pos_embed, feedback=feedback)


def _velocity(
    pipeline: FluxLayoutPipeline, noisy: Tensor, sigma: float, batch: Item, state: LayoutState | None
) -> Tensor:
    """(B, C, h, w) noise minus clean latents."""
    number, channels, rows, columns = noisy.shape
    device, dtype, grid = noisy.device, noisy.dtype, (rows // 2, columns // 2)
    transformer = pipeline.transformer
    guidance = torch.ones(number, device=device) if transformer.config.guidance_embeds else None
    velocity = transformer(
        hidden_states=FluxPipeline._pack_latents(noisy, number, channels, rows, columns),
        timestep=torch.full((number,), sigma, device=device, dtype=dtype),
        guidance=guidance,
        encoder_hidden_states=batch["prompt_embeds"].to(device, dtype),
        pooled_projections=batch["pooled_prompt_embeds"].to(device, dtype),
        img_ids=FluxPipeline._prepare_latent_image_ids(number, *grid, device, torch.float32),
        txt_ids=torch.zeros(batch["prompt_embeds"].shape[1], 3, device=device),
        joint_attention_kwargs=None if state is None else {"layout": state},
    ).sample
    return velocity.view(number, *grid, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(noisy.shape)
