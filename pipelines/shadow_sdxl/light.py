"""How the light is told to the network: theta and phi in degrees, side of the square light in world units.

theta is the angle from the zenith, phi turns around it: at phi 0 the light is on the right and the shadow falls to the
left, at phi 90 the light is behind the object. The light's centre lies at distance `RADIUS` from the object
(arXiv 2412.11972, sections 3.1 and 3.2.3).
"""

from __future__ import annotations

import math

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

LIGHT_RANGES = {"theta": (0.0, 45.0), "phi": (0.0, 360.0), "size": (2.0, 8.0)}
RADIUS = 8.0
EMBEDDING_DIM = 256  # of each of the three scalars


def check_light(theta: float, phi: float, size: float) -> None:
    """ValueError naming the value outside its range; phi may be any finite angle, it is wrapped."""
    for name, value in {"theta": theta, "size": size}.items():
        low, high = LIGHT_RANGES[name]
        if not low <= value <= high:
            raise ValueError(f"`{name}` must be in [{low:g}, {high:g}], got {value!r}")
    if not math.isfinite(phi):
        raise ValueError(f"`phi` must be a finite angle in degrees, got {phi!r}")


def embed_light(light: Tensor, kind: str, harmonics: int = 3) -> Tensor:
    """The light as features (B, 768) in float32.

    Args:
        light: (B, 3) theta, phi (degrees) and size.
        kind: `periodic`: harmonics of each, those of phi with period 360 exactly, and the ground direction of the
            light; `sdxl`: SDXL's sinusoidal embedding of the bare numbers, as in the paper, with a seam at phi = 0.
        harmonics: multiples of each angle in `periodic`, 1 to 63.
    """
    light = light.float()
    if kind == "sdxl":
        embed = [get_timestep_embedding(x, EMBEDDING_DIM, True, 0) for x in light.unbind(1)]
        return torch.cat(embed, dim=1)
    theta, phi = torch.deg2rad(light[:, 0]), torch.deg2rad(light[:, 1] % 360)
    quarter = math.pi / 2
    size_low, size_high = LIGHT_RANGES["size"]
    scaled_theta = light[:, 0] / LIGHT_RANGES["theta"][1] * quarter
    scaled_size = (light[:, 2] - size_low) / (size_high - size_low) * quarter
    multiples = torch.arange(1, harmonics + 1, device=light.device)

    def waves(angle: Tensor, *more: Tensor) -> Tensor:
        angles = angle[:, None] * multiples
        features = torch.cat([angles.cos(), angles.sin(), *(x[:, None] for x in more)], dim=1)
        return torch.nn.functional.pad(features, (0, EMBEDDING_DIM - features.shape[1]))

    direction = theta.sin() * phi.cos(), theta.sin() * phi.sin()
    return torch.cat([waves(scaled_theta), waves(phi, *direction), waves(scaled_size)], dim=1)


def blob_map(light: Tensor, height: int, width: int) -> Tensor:
    """The light as a picture (B, 1, height, width): a Gaussian where it hangs above the ground (section 4.2.2).

    The map spans +-`RADIUS` world units, image right = +x and up = +y (away from the viewer); the Gaussian's deviation
    is that of a uniform square of the light's side.
    """
    light = light.float()
    theta, phi = torch.deg2rad(light[:, 0]), torch.deg2rad(light[:, 1])
    x, y = RADIUS * theta.sin() * phi.cos(), RADIUS * theta.sin() * phi.sin()
    columns = (torch.arange(width, device=light.device) + 0.5) / width * 2 * RADIUS - RADIUS
    rows = RADIUS - (torch.arange(height, device=light.device) + 0.5) / height * 2 * RADIUS
    sigma = light[:, 2, None] / math.sqrt(12)
    across = torch.exp(-0.5 * ((columns - x[:, None]) / sigma).square())
    along = torch.exp(-0.5 * ((rows - y[:, None]) / sigma).square())
    return (along[:, :, None] * across[:, None, :])[:, None]
