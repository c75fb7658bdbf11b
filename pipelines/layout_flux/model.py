"""FLUX with a layout adapter as one network, so that a trainer sees one call and one loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, ModelMixin
from diffusers.configuration_utils import ConfigMixin
from diffusers.utils import BaseOutput
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from pipelines.layout_flux.adapter import FluxLayoutAdapter
from pipelines.layout_flux.attachment import attach
from pipelines.layout_flux.layout import Layout


@dataclass
class LayoutFluxOutput(BaseOutput):
    """Args:
    velocity: (B, C, h, w) noise minus clean latents. alpha: (B, N) foreground strength, None without a layout.
    feedback_magnitude: of the bridge, None without one.
    """

    velocity: Tensor
    alpha: Tensor | None = None
    feedback_magnitude: Tensor | None = None


class LayoutFlux(ModelMixin, ConfigMixin):
    """Args:
    transformer: as loaded; the adapter is attached to it.
    adapter: None: FLUX alone.
    """

    config_name = "config.json"
    _supports_gradient_checkpointing = True
    _no_split_modules = ["FluxTransformerBlock", "FluxSingleTransformerBlock"]

    def __init__(self, transformer: FluxTransformer2DModel, adapter: FluxLayoutAdapter | None = None):
        super().__init__()
        self.transformer, self.adapter = transformer, adapter
        if adapter is not None:
            attach(transformer, adapter)

    def forward(
        self,
        noisy_latents: Tensor,
        sigmas: Tensor,
        prompt_embeds: Tensor,
        pooled_prompt_embeds: Tensor,
        layout: Layout | None = None,
        guidance_scale: float = 1.0,
        use_modulation: bool = True,
    ) -> LayoutFluxOutput:
        """Args:
        noisy_latents: (B, C, h, w), h and w even. sigmas: (B,) share of the noise.
        prompt_embeds: (B, L, T). pooled_prompt_embeds: (B, P).
        guidance_scale: given to a transformer with a guidance embedding; others have no use for it.
        use_modulation: False: boxes only.
        """
        batch, channels, rows, columns = noisy_latents.shape
        packed = FluxPipeline._pack_latents(noisy_latents, batch, channels, rows, columns)
        grid = (rows // 2, columns // 2)
        state = None
        if layout is not None:
            identity_scale = 1.0 if use_modulation else 0.0
            state = self.adapter(layout, grid, self.transformer.pos_embed, identity_scale=identity_scale)
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full((batch,), guidance_scale, device=packed.device)
        device = packed.device
        velocity = self.transformer(
            hidden_states=packed,
            timestep=sigmas,
            guidance=guidance,
            encoder_hidden_states=prompt_embeds,
            pooled_projections=pooled_prompt_embeds,
            img_ids=FluxPipeline._prepare_latent_image_ids(batch, *grid, device, torch.float32),
            txt_ids=torch.zeros(prompt_embeds.shape[1], 3, device=device),
            joint_attention_kwargs=None if state is None else {"layout": state},
        ).sample
        velocity = velocity.view(batch, *grid, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(noisy_latents.shape)
        if state is None:
            return LayoutFluxOutput(velocity)
        return LayoutFluxOutput(velocity, state.alpha, state.feedback_magnitude())

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, transformer and adapter can be called by themselves, also where this network is sharded.

        What lies in no block is gathered with this network's own call, which a pipeline does not make. All processes
        come here, after a first call of the network.
        """
        if not isinstance(self, FSDPModule):
            yield
            return
        self.unshard()
        try:
            yield
        finally:
            self.reshard()
