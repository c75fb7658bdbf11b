"""PointFlowPipeline: points of the plane from noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from backlot.loading import ExportedPipeline
from pipelines.point_flow.network import PointFlowNetwork


@dataclass
class PointFlowPipelineOutput(BaseOutput):
    """`points`: a tensor (B, 2) float32, or an array."""

    points: Tensor | np.ndarray


def create_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of the path that the network learns: straight, sigma = timestep / 1000."""
    return FlowMatchEulerDiscreteScheduler()


class PointFlowPipeline(ExportedPipeline):
    """Samples a trained `PointFlowNetwork`.

    Args:
        network: predicts the velocity.
        scheduler: makes the steps.
    """

    model_cpu_offload_seq = "network"
    _callback_tensor_inputs = ("latents",)

    def __init__(self, network: PointFlowNetwork, scheduler: FlowMatchEulerDiscreteScheduler):
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler)

    def check_inputs(
        self,
        num_points: int,
        num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        """Raise ValueError with the argument, what is allowed and what was given."""
        if num_points < 1:
            raise ValueError(f"`num_points` must be at least 1, got {num_points}")
        most = self.scheduler.config.num_train_timesteps
        if not 1 <= num_inference_steps <= most:
            raise ValueError(f"`num_inference_steps` must be in [1, {most}], got {num_inference_steps}")
        if isinstance(generator, list) and len(generator) != num_points:
            raise ValueError(f"`generator` must be one or {num_points}, got {len(generator)}")
        if latents is not None and tuple(latents.shape) != (num_points, 2):
            raise ValueError(f"`latents` must have shape {(num_points, 2)}, got {tuple(latents.shape)}")
        if output_type not in ("pt", "np"):
            raise ValueError(f"`output_type` must be 'pt' or 'np', got {output_type!r}")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {list(self._callback_tensor_inputs)}, "
                f"got {sorted(unknown)}"
            )

    @torch.no_grad()
    def __call__(
        self,
        num_points: int = 1,
        num_inference_steps: int = 16,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
        callback_on_step_end: Callable[[PointFlowPipeline, int, Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ("latents",),
    ) -> PointFlowPipelineOutput | tuple:
        """Generate points.

        Args:
            num_points: B.
            num_inference_steps: equal Euler steps from noise to data.
            generator: one, or one per point.
            latents: (B, 2) standard normal noise to start from.
            output_type: `pt` or `np`.
            callback_on_step_end: called as (pipeline, index, timestep, tensors) after each step; may return changed
                tensors.

        Returns:
            `PointFlowPipelineOutput`, or a tuple of its field.
        """
        self.check_inputs(
            num_points, num_inference_steps, generator, latents, output_type, callback_on_step_end_tensor_inputs
        )
        device, dtype = self._execution_device, self.network.dtype
        # equal steps that end at data: the scheduler's own lists make the last one shorter than the others
        sigmas = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
        self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        if latents is None:
            latents = randn_tensor((num_points, 2), generator=generator, device=device, dtype=torch.float32)
        latents = latents.to(device=device, dtype=torch.float32)
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for index, timestep in enumerate(self.scheduler.timesteps):
                velocity = self.network(latents.to(dtype), timestep.expand(num_points), return_dict=False)[0]
                latents = self.scheduler.step(velocity.float(), timestep, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                    latents = callback_on_step_end(self, index, timestep, tensors).pop("latents", latents)
                progress_bar.update()
        self.maybe_free_model_hooks()
        points = latents if output_type == "pt" else latents.cpu().numpy()
        return PointFlowPipelineOutput(points=points) if return_dict else (points,)
