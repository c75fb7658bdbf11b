"""PixelCodec: a VAE's place taken by a lossless rearrangement, so that small runs show true pictures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, cat, full_like, nn, zeros

from backlot.command_line import DTYPE_NAMES

DTYPES = {name: getattr(torch, name) for name in DTYPE_NAMES}


class PixelCodec(ModelMixin, ConfigMixin):
    """Space-to-depth and back with the interface of `AutoencoderKL`; nothing is learnt and nothing lost.

    Args:
        in_channels: channels of the image.
        block_size: side of the block of pixels that becomes channels; 1 leaves the image as it is.
        scaling_factor, shift_factor: as in `AutoencoderKL`: latents are (z - shift) * scale.
    """

    @register_to_config
    def __init__(
        self, in_channels: int = 3, block_size: int = 1, scaling_factor: float = 1.0, shift_factor: float | None = None
    ):
        super().__init__()
        # diffusers asks a model's parameters for its device and dtype; this one has nothing else to show.
        self.anchor = nn.Parameter(zeros(()), requires_grad=False)

    @property
    def latent_channels(self) -> int:
        return self.config.in_channels * self.config.block_size**2

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Images (B, C, H, W) -> a distribution without spread over (B, C b^2, H/b, W/b)."""
        mean = F.pixel_unshuffle(x, self.config.block_size)
        posterior = DiagonalGaussianDistribution(cat([mean, full_like(mean, -30.0)], dim=1), deterministic=True)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True, generator=None) -> DecoderOutput | tuple[Tensor]:
        """(B, C b^2, H/b, W/b) -> images (B, C, H, W)."""
        sample = F.pixel_shuffle(z, self.config.block_size)
        return DecoderOutput(sample=sample) if return_dict else (sample,)


def load_vae(folder: str | None, block_size: int = 1) -> AutoencoderKL | PixelCodec:
    """A frozen VAE (or the codec that stands in for one) saved by `save_pretrained`, or from the hub.

    None gives a `PixelCodec` of RGB with the given `block_size`.
    """
    if folder is None:
        return PixelCodec(block_size=block_size).requires_grad_(False)
    kind = PixelCodec if PixelCodec.load_config(folder)["_class_name"] == "PixelCodec" else AutoencoderKL
    return kind.from_pretrained(folder).requires_grad_(False)


def vae_scale_factor(vae: AutoencoderKL | PixelCodec) -> int:
    """Pixels along the side of one latent."""
    if isinstance(vae, PixelCodec):
        return vae.config.block_size
    return 2 ** (len(vae.config.block_out_channels) - 1)


def latent_channels(vae: AutoencoderKL | PixelCodec) -> int:
    """Channels of its latents."""
    return vae.latent_channels if isinstance(vae, PixelCodec) else vae.config.latent_channels
