"""ShortcutPipeline: class-conditional images in one step or many, from the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from backlot.codecs import PixelCodec
from backlot.loading import ExportedPipeline
from pipelines.shortcut.scheduler import ShortcutScheduler
from pipelines.shortcut.transformer import ShortcutDiT


@dataclass
class ShortcutPipelineOutput(BaseOutput):
    """`images`: PIL images, an array (B, H, W, C) in [0, 1], or a tensor (B, C, H, W) in [0, 1]; or latents."""

    images: list[Image.Image] | np.ndarray | Tensor


class ShortcutPipeline(ExportedPipeline):
    """Samples a trained `ShortcutDiT`.

    Args:
        transformer: the network.
        scheduler: holds what step sizes the network knows.
        vae: decodes latents to images; without one the network's samples are the images.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ("latents", "class_labels")

    def __init__(
        self,
        transformer: ShortcutDiT,
        scheduler: ShortcutScheduler,
        vae: AutoencoderKL | PixelCodec | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1, do_resize=False)

    def check_inputs(
        self,
        class_labels: list[int | None],
        num_images_per_label: int,
        guidance_scale: float,
        latents: Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        """Raise ValueError with the argument, what is allowed and what was given."""
        classes = self.transformer.config.num_classes
        wrong = [y for y in class_labels if y is not None and not (isinstance(y, int) and 0 <= y < classes)]
        if wrong:
            raise ValueError(f"`class_labels` must be in [0, {classes - 1}] (or None, no class), got {wrong[0]!r}")
        if num_images_per_label < 1:
            raise ValueError(f"`num_images_per_label` must be at least 1, got {num_images_per_label}")
        if guidance_scale < 0:
            raise ValueError(f"`guidance_scale` must be at least 0, got {guidance_scale}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}")
        shape = self._latents_shape(len(class_labels) * num_images_per_label)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must have shape {shape}, got {tuple(latents.shape)}")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {list(self._callback_tensor_inputs)}, "
                f"got {sorted(unknown)}"
            )

    def _latents_shape(self, batch: int) -> tuple[int, ...]:
        config = self.transformer.config
        return batch, config.in_channels, config.sample_size, config.sample_size

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | list[int | None] | None = None,
        num_inference_steps: int | None = None,
        step_sizes: list[float] | None = None,
        guidance_scale: float = 1.0,
        mode: str = "shortcut",
        num_images_per_label: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[ShortcutPipeline, int, float, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ("latents",),
    ) -> ShortcutPipelineOutput | tuple:
        """Generate images.

        Args:
            class_labels: one class per image, None for no class (the way to sample an unconditional model).
            num_inference_steps: equal steps; 1 where neither this nor `step_sizes` is given.
            step_sizes: lengths of irregular steps, of sum 1, instead.
            guidance_scale: 1 uses the class as it is; w > 1 strengthens it, v_null + w (v - v_null), at twice the
                cost; 0
                ignores it. On large steps guidance compounds with what the bootstrap was trained with.
            mode: `shortcut`, or `flow` for plain Euler with the same weights.
            num_images_per_label: images of each label, next to one another.
            generator: one, or one per image.
            latents: (B, C, H, W) standard normal noise to start from.
            output_type: `pil`, `np`, `pt` or `latent` (before the VAE).
            callback_on_step_end: called as (pipeline, index, t, tensors) after each step; may return changed tensors.

        Returns:
            `ShortcutPipelineOutput`, or a tuple of its field.
        """
        labels = list(class_labels) if isinstance(class_labels, (list, tuple)) else [class_labels]
        self.check_inputs(
            labels, num_images_per_label, guidance_scale, latents, output_type, callback_on_step_end_tensor_inputs
        )
        if num_inference_steps is None and step_sizes is None:
            num_inference_steps = 1
        self.scheduler.set_timesteps(num_inference_steps, step_sizes, mode)

        device, dtype = self._execution_device, self.transformer.dtype
        null = self.transformer.config.num_classes
        labels = [null if label is None else label for label in labels for _ in range(num_images_per_label)]
        labels = torch.tensor(labels, device=device)
        if latents is None:
            latents = randn_tensor(self._latents_shape(len(labels)), generator=generator, device=device, dtype=dtype)
        latents = latents.to(device=device, dtype=dtype)

        times = zip(self.scheduler.timesteps, self.scheduler.queried_step_sizes, strict=True)
        with self.progress_bar(total=len(self.scheduler.timesteps)) as progress_bar:
            for index, (t, step_size) in enumerate(times):
                velocity = self._predict(latents, t, step_size, labels, guidance_scale)
                latents = self.scheduler.step(velocity, index, latents, generator).prev_sample
                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "class_labels": labels}
                    tensors = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, index, t, tensors)
                    latents, labels = changed.pop("latents", latents), changed.pop("class_labels", labels)
                progress_bar.update()

        images = latents
        if output_type != "latent":
            images = self.image_processor.postprocess(self._decode(latents), output_type=output_type)
        self.maybe_free_model_hooks()
        return ShortcutPipelineOutput(images=images) if return_dict else (images,)

    def _predict(self, latents: Tensor, t: float, step_size: float, labels: Tensor, guidance_scale: float) -> Tensor:
        """The velocity at (t, step_size), guided: one forward pass in every case."""
        null = torch.full_like(labels, self.transformer.config.num_classes)
        both = guidance_scale not in (0.0, 1.0)
        if both:
            latents, labels = torch.cat([latents, latents]), torch.cat([labels, null])
        elif guidance_scale == 0.0:
            labels = null
        # Times in float32 whatever the network's precision: bf16 merges neighbouring ones.
        times = torch.full((len(labels),), t, device=latents.device)
        velocity = self.transformer(latents, times, torch.full_like(times, step_size), labels, return_dict=False)[0]
        if both:
            conditional, unconditional = velocity.chunk(2)
            velocity = unconditional + guidance_scale * (conditional - unconditional)
        return velocity

    def _decode(self, latents: Tensor) -> Tensor:
        if self.vae is None:
            return latents
        config = self.vae.config
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
        return self.vae.decode(latents.to(self.vae.dtype)).sample
