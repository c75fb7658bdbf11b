"""Pictures to look at while an adapter trains: what the data show, what their layouts give, whose box is where."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from backlot.pictures import image_grid
from pipelines.layout_flux.encoders import unscale_latents
from pipelines.layout_flux.layout import FOREGROUND_ALPHA, Layout
from pipelines.layout_flux.pipeline import FluxLayoutPipeline, FluxLayoutPipelineOutput

FOREGROUND, BACKGROUND = (220, 30, 30), (30, 60, 220)
SMALLEST_SIDE = 256
"""Pixels: smaller pictures are enlarged, so that numbers on them can be read."""


@torch.no_grad()
def decode(pipeline: FluxLayoutPipeline, latents: Tensor) -> list[Image.Image]:
    """Scaled latents (B, C, h, w) as pictures."""
    latents = unscale_latents(pipeline.vae, latents).to(pipeline.vae.dtype)
    return pipeline.image_processor.postprocess(pipeline.vae.decode(latents).sample, output_type="pil")


def draw_batch(
    pipeline: FluxLayoutPipeline, batch: dict, seed: int, num_inference_steps: int, guidance_scale: float
) -> FluxLayoutPipelineOutput:
    """Pictures of a batch of data_prep.layouts, from the same noise every time; layouts act in every step.

    A pipeline without an adapter draws the prompts alone.
    """
    height, width = (side * pipeline.vae_scale_factor for side in batch["latents"].shape[-2:])
    return pipeline(
        prompt_embeds=batch["prompt_embeds"],
        pooled_prompt_embeds=batch["pooled_prompt_embeds"],
        layout=None if pipeline.layout_adapter is None else Layout.from_batch(batch),
        grounding_ratio=1.0,
        height=height,
        width=width,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(seed),
    )


def overlay(image: Image.Image, boxes: Sequence[Sequence[float]] | np.ndarray, alpha: Sequence[float]) -> Image.Image:
    """A picture with its boxes: red where alpha is at least 0.5, the foreground, blue below; alpha is written there.

    Args:
        boxes: x1 y1 x2 y2 in [0, 1], one for each alpha.
    """
    factor = max(1, round(SMALLEST_SIDE / min(image.size)))
    canvas = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=max(11, canvas.height // 24))
    for box, value in zip(boxes, alpha, strict=True):
        colour = FOREGROUND if value >= FOREGROUND_ALPHA else BACKGROUND
        corners = np.array(box, dtype=float).reshape(2, 2) * canvas.size
        left, top, right, bottom = corners.round().astype(int).flatten().tolist()
        draw.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), outline=colour, width=2)
        text = f"{value:.2f}"
        draw.rectangle(draw.textbbox((left + 3, top + 2), text, font=font), fill=colour)
        draw.text((left + 3, top + 2), text, fill="white", font=font)
    return canvas


def compare(
    pipeline: FluxLayoutPipeline, batch: dict, seed: int, num_inference_steps: int, guidance_scale: float
) -> tuple[dict[str, Image.Image], dict[str, Tensor]]:
    """What the data show and what their layouts give, with the boxes on both; arguments as of `draw_batch`.

    Returns:
        Pictures and histograms of alpha, by the names under which a run logs them.
    """
    truths = decode(pipeline, batch["latents"])
    drawn = draw_batch(pipeline, batch, seed, num_inference_steps, guidance_scale)
    pairs, pictures, alphas = [], {}, {}
    for number, pair in enumerate(zip(truths, drawn.images, strict=True)):
        alpha = [] if drawn.alpha is None else drawn.alpha[number]
        boxes = batch["boxes"].values[number][batch["valid"][number].cpu().numpy()] if alpha else []
        pairs.append([overlay(picture, boxes, alpha) for picture in pair])
        pictures[f"inference/comparison_sample_{number}"] = image_grid([pairs[-1]])
        if alpha:
            alphas[f"inference/alpha_sample_{number}"] = torch.tensor(alpha)
    for name, row in zip(("ground_truth", "predicted"), zip(*pairs, strict=True), strict=True):
        pictures[f"inference/{name}"] = image_grid([list(row)])
    return pictures, alphas
