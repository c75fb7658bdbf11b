"""What the stages of training are made from: the base, an adapter with the parts of a stage, a batch's conditions."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers import FluxTransformer2DModel as Transformer
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle
from torch import Tensor, nn

from backlot.codecs import latent_channels
from backlot.config import Settings, checked
from pipelines.layout_flux.adapter import SOURCES, FluxLayoutAdapter
from pipelines.layout_flux.encoders import LayoutEncoders
from pipelines.layout_flux.layout import Layout
from pipelines.layout_flux.pipeline import TEXT_COMPONENTS, FluxLayoutPipeline
from pipelines.layout_flux.settings import PARTS, TransformerConfig, adapter_settings

logger = logging.getLogger(__name__)

ADAPTIVE_NORMS = (AdaLayerNormZero, AdaLayerNormZeroSingle, AdaLayerNormContinuous)
PATCH = 2
"""Latent cells along the side of one of FLUX's tokens."""


# ---- the base ----


def load_base(name: str, vae: str | None, dtype: torch.dtype) -> FluxLayoutPipeline:
    """A base in FLUX.1-dev's format without its text encoders: what they say of a picture is in the prepared data.

    Args:
        name: folder or hub name. vae: see `LayoutEncoders`; None: the base's own.
        dtype: of the transformer; the VAE stays in float32.
    """
    others = dict.fromkeys(TEXT_COMPONENTS)
    if vae is not None:
        others["vae"] = LayoutEncoders({"flux": name}, vae).vae
    dtypes = {"transformer": dtype, "default": torch.float32}
    pipeline = FluxLayoutPipeline.from_pretrained(name, dtype=dtypes, **others)
    pipeline.vae.requires_grad_(False)
    pipeline.transformer.requires_grad_(False)
    return pipeline


def create_base(name: str, vae: str | None, shape: TransformerConfig) -> FluxLayoutPipeline:
    """An untrained base around a folder of models: its widths are those of the folder's text encoders and VAE."""
    encoders = LayoutEncoders.load(name, vae=vae)
    parts = {part: getattr(encoders, part) for part in (*TEXT_COMPONENTS, "vae")}
    transformer = Transformer(
        in_channels=PATCH**2 * latent_channels(encoders.vae),
        joint_attention_dim=encoders.text_encoder_2.config.d_model,
        pooled_projection_dim=encoders.text_encoder.config.hidden_size,
        **shape.model_dump(),
    )
    close_gates(transformer)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(name, subfolder="scheduler")
    return FluxLayoutPipeline(transformer=transformer, scheduler=scheduler, **parts)


def close_gates(transformer: Transformer) -> None:
    """Every block begins as the identity and the output as 0 (adaLN-Zero, DiT, arXiv 2212.09748): it learns sooner."""
    modulations = [module.linear for module in transformer.modules() if isinstance(module, ADAPTIVE_NORMS)]
    for layer in (*modulations, transformer.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def check_size(pipeline: FluxLayoutPipeline, item: dict, resolution: int | None) -> None:
    """Raises:
    ValueError: the latents of the data are not those of the pipeline's VAE, or of another resolution.
    """
    channels, rows, columns = item["latents"].shape
    if channels != latent_channels(pipeline.vae):
        raise ValueError(f"the data hold latents of {channels} channels, the VAE makes {latent_channels(pipeline.vae)}")
    sides = tuple(side * pipeline.vae_scale_factor for side in (rows, columns))
    if resolution is not None and sides != (resolution, resolution):
        raise ValueError(f"`training.resolution` is {resolution}, the data were prepared at {sides[0]} x {sides[1]}")


def with_network(
    pipeline: FluxLayoutPipeline, transformer: Transformer, adapter: FluxLayoutAdapter | None
) -> FluxLayoutPipeline:
    """A pipeline of the same parts, around a network that trains or its average."""
    parts = pipeline.components | {"transformer": transformer, "layout_adapter": adapter}
    return FluxLayoutPipeline(**parts)


def exported(pipeline: FluxLayoutPipeline, transformer: Transformer) -> FluxPipeline:
    """What a base is exported as: FLUX's own pipeline, where its VAE is FLUX's own kind."""
    if not isinstance(pipeline.vae, AutoencoderKL):
        return with_network(pipeline, transformer, None)
    parts = {name: getattr(pipeline, name) for name in (*TEXT_COMPONENTS, "vae", "scheduler")}
    return FluxPipeline(transformer=transformer, **parts)


# ---- the adapter ----


def create_adapter(
    transformer: Transformer, config: Settings, item: dict, load: Callable[..., list[str]] | None
) -> FluxLayoutAdapter:
    """The adapter of a stage: parts that train, and require a gradient, and parts that an earlier stage has left.

    Args:
        config: of train_layout_flux.
        item: of data_prep.layouts.LayoutDataset: widths of embeddings are the data's.
        load: `load(module, strict=..., may_lack=...)` fills a module from where the stage starts and names what does
            not fit; None: it starts from nothing.

    Raises:
        ValueError: the weights are of another adapter, or lack something of a part that they have.
    """
    sections = config.model, config.lora, config.modulation, config.bridge
    widths = {f"{name}_embed_dim": item[f"{name}_embeds"].shape[-1] for name in SOURCES}

    def create(parts: set[str]) -> FluxLayoutAdapter:
        torch.manual_seed(config.training.seed)
        return FluxLayoutAdapter.for_transformer(transformer, **adapter_settings(*sections, parts), **widths)

    new, trains = set(PARTS), config.trainable.names
    if load is not None:
        whole = create(new)
        left = set(load(whole, strict=False))
        new = {part for part, names in whole.parts().items() if left.issuperset(names)}
    adapter = create(set(PARTS) - new | trains)
    names = adapter.parts()
    if load is not None:
        load(adapter, may_lack=[name for part in new for name in names[part]])
        logger.info("new in stage %s: %s", config.stage, ", ".join(sorted(new & trains)) or "nothing")
    adapter.set_trainable(trains)
    return adapter


def complete(config: Settings, adapter: FluxLayoutAdapter | None) -> Settings:
    """The configuration with what the adapter is made of, and learning rates of parts as factors by prefix."""
    if adapter is None:
        return config
    training = config.training
    changes = {
        "adapter": {name: value for name, value in adapter.config.items() if not name.startswith("_")},
        "training": {"learning_rate_factors": rate_factors(adapter, training.lr_groups, training.learning_rate)},
    }
    return checked(config, changes)


def rate_factors(adapter: FluxLayoutAdapter, rates: dict[str, float], learning_rate: float) -> dict[str, float]:
    """Factors on the learning rate by prefixes of names, from learning rates of parts."""
    names = adapter.parts()

    def prefix(name: str) -> str:
        depth = 3 if name.startswith("layout_heads.") else 1  # layout_heads.<block>.<zero_out or lora>
        return ".".join(name.split(".")[:depth]) + "."

    return {prefix(name): rate / learning_rate for part, rate in rates.items() for name in names[part]}


# ---- data ----


def count_tokens(item: dict) -> int:
    """Image tokens of a picture."""
    return item["latents"].shape[-2] * item["latents"].shape[-1] // PATCH**2


def conditions(batch: dict, kept, empty_prompt: tuple[Tensor, Tensor] | None) -> tuple[Layout, Tensor, Tensor]:
    """A batch's layout, prompt embeddings (B, L, T) and pooled ones (B, P), without what is left out.

    Args:
        batch: of data_prep.layouts.LayoutDataset.
        kept: masks `objects`, `text`, `clip`, `dino` (B, N) and `prompt` (B,), as objectives.layout draws them.
        empty_prompt: what takes the place of a prompt: (L, T) and (P,).
    """
    layout = Layout.from_batch(batch)
    has_prompt = kept.prompt[:, None]
    layout = replace(
        layout,
        valid=layout.valid & kept.objects,
        has_text=layout.has_text & kept.text,
        has_clip=layout.has_clip & kept.clip,
        has_dino=layout.has_dino & kept.dino,
        phrase_spans=layout.phrase_spans * has_prompt[..., None],  # no phrase in an empty prompt
    )
    embeds, pooled = batch["prompt_embeds"], batch["pooled_prompt_embeds"]
    empty, empty_pooled = (part.to(embeds) for part in empty_prompt)
    return layout, torch.where(has_prompt[..., None], embeds, empty), torch.where(has_prompt, pooled, empty_pooled)
