"""Pictures to look at while an adapter trains: what the data show, what their layouts give, whose box is where."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from backlot.pictures import image_grid
from pipelines.layout_flux.encoders import unscale_latents
from pipelines.layout_flux.layout import Layout
from pipelines.layout_flux.overlay import draw_boxes
from pipelines.layout_flux.pipeline import FluxLayoutPipeline, FluxLayoutPipelineOutput


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
        pairs.append([draw_boxes(picture, boxes, alpha) for picture in pair])
        pictures[f"inference/comparison_sample_{number}"] = image_grid([pairs[-1]])
        if alpha:
            alphas[f"inference/alpha_sample_{number}"] = torch.tensor(alpha)
    for name, row in zip(("ground_truth", "predicted"), zip(*pairs, strict=True), strict=True):
        pictures[f"inference/{name}"] = image_grid([list(row)])
    return pictures, alphas
