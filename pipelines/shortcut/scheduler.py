"""ShortcutScheduler: regular and irregular step lists from noise (t = 0) to data (t = 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


@dataclass
class ShortcutSchedulerOutput(BaseOutput):
    """`prev_sample`: the sample after the step."""

    prev_sample: Tensor


class ShortcutScheduler(SchedulerMixin, ConfigMixin):
    """Holds the steps of one sampling run as pairs (t, d) and makes them.

    Args:
        denoise_timesteps: M of the training, a power of two; a step of at most 1/M is infinitesimal to the network.
        smallest_step: what the network is told on such a step: `zero` (d = 0), `lattice` (d = 1/M) or `none` (d
            itself). larger_steps: what it is told on a larger one: `own` (d itself), `smallest` (it is a plain flow
            model), or
            `one_step` (d = 1 whatever the step: live reflow).
        dyadic_only: the network knows only d = 2^-k at multiples of d (trained with a log2 step embedding).
        method: `euler`, or `consistency` (predict the data, then add fresh noise) for the consistency baselines.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        denoise_timesteps: int = 128,
        smallest_step: str = "zero",
        larger_steps: str = "own",
        dyadic_only: bool = False,
        method: str = "euler",
    ):
        if smallest_step not in ("zero", "lattice", "none"):
            raise ValueError(f"`smallest_step` must be 'zero', 'lattice' or 'none', not {smallest_step!r}")
        if larger_steps not in ("own", "smallest", "one_step"):
            raise ValueError(f"`larger_steps` must be 'own', 'smallest' or 'one_step', not {larger_steps!r}")
        if method not in ("euler", "consistency"):
            raise ValueError(f"`method` must be 'euler' or 'consistency', not {method!r}")
        self.timesteps: list[float] = []  # t of each step
        self.step_sizes: list[float] = []  # d of each step
        self.queried_step_sizes: list[float] = []  # what the network is told

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        step_sizes: list[float] | None = None,
        mode: str = "shortcut",
        allow_partial: bool = False,
    ) -> None:
        """Lay out the steps; everything is checked on the host, in float64.

        Args:
            num_inference_steps: this many equal steps.
            step_sizes: or these lengths, positive, of sum 1 (to 1e-6).
            mode: `shortcut` tells the network each step's length; `flow` tells it d -> 0 and moves by the same steps
                (plain Euler on the learnt flow).
            allow_partial: let the sum be below 1 (stop early).

        Raises:
            ValueError: for a list that is no schedule, or one that the network was not trained for.
        """
        if (num_inference_steps is None) == (step_sizes is None):
            raise ValueError("pass exactly one of `num_inference_steps` and `step_sizes`")
        if mode not in ("shortcut", "flow"):
            raise ValueError(f"`mode` must be 'shortcut' or 'flow', not {mode!r}")
        if step_sizes is None:
            if num_inference_steps < 1:
                raise ValueError(f"`num_inference_steps` must be at least 1, got {num_inference_steps}")
            steps = [1 / num_inference_steps] * num_inference_steps
            times = [i / num_inference_steps for i in range(num_inference_steps)]
        else:
            steps = [float(d) for d in step_sizes]
            total = math.fsum(steps)
            if not steps or not all(d > 0 for d in steps):
                raise ValueError(f"`step_sizes` must be positive, got {step_sizes}")
            if total > 1 + 1e-6 or (total < 1 - 1e-6 and not allow_partial):
                raise ValueError(f"`step_sizes` must add up to 1, got {total:.6g}")
            times = [math.fsum(steps[:i]) for i in range(len(steps))]
        if self.config.dyadic_only and mode == "shortcut" and self.config.larger_steps == "own":
            self._check_dyadic(times, steps)
        self.timesteps, self.step_sizes = times, steps
        larger = "smallest" if mode == "flow" else self.config.larger_steps
        self.queried_step_sizes = [self._query(d, larger) for d in steps]

    def _query(self, d: float, larger: str) -> float:
        """What the network is told about a step of length d."""
        smallest = 1 / self.config.denoise_timesteps
        if d <= smallest * (1 + 1e-6) or larger == "smallest":
            if larger == "smallest" or self.config.smallest_step != "none":
                return smallest if self.config.smallest_step == "lattice" else 0.0
            return d
        return 1.0 if larger == "one_step" else d

    def _check_dyadic(self, times: list[float], steps: list[float]) -> None:
        for t, d in zip(times, steps, strict=True):
            level = -math.log2(d)
            in_range = 1 / self.config.denoise_timesteps <= d * (1 + 1e-6)
            if abs(level - round(level)) > 1e-6 or abs(t / d - round(t / d)) > 1e-6 or not in_range:
                raise ValueError(
                    f"this network was trained on steps of 2^-k (at most {self.config.denoise_timesteps}), each "
                    f"starting at a multiple of its length; {d:.6g} at t = {t:.6g} is none. Try 1, 2, 4 ... steps or "
                    "`step_sizes`=[0.5, 0.25, 0.25]"
                )

    def step(
        self,
        model_output: Tensor,
        index: int,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> ShortcutSchedulerOutput | tuple[Tensor]:
        """Make step `index`: x_{t+d} = x_t + d s.

        Args:
            model_output: (B, ...), the network's s(x_t, t, d).
            index: which step of the list.
            sample: (B, ...), x_t.
            generator: for the fresh noise of `consistency`.
        """
        t, d = self.timesteps[index], self.step_sizes[index]
        if self.config.method == "euler":
            moved = sample + d * model_output
        else:
            data = sample + (1 - t) * model_output
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            moved = (t + d) * data + (1 - t - d) * noise
        return ShortcutSchedulerOutput(prev_sample=moved) if return_dict else (moved,)

    def __len__(self) -> int:
        return self.config.denoise_timesteps
