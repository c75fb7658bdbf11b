"""OccupancyVAE: an object's occupancy grid as a few latent tokens, and back.

The network is TRELLIS's sparse-structure VAE (Xiang et al., arXiv 2412.01506): residual blocks of 3D convolutions with
LayerNorm over channels, strided convolutions on the way down, pixel-shuffle on the way up, no attention.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

PRESETS = {
    "demo": {"sample_size": 16, "latent_channels": 4, "block_out_channels": (24, 48), "patch_size": 4}
    | {"layers_per_block": 1, "mid_layers": 1},
    "toy": {"sample_size": 16, "latent_channels": 8, "block_out_channels": (16, 32, 64)},
    "mid": {"sample_size": 32, "latent_channels": 8, "block_out_channels": (24, 48, 96)},
    "trellis": {"sample_size": 64, "latent_channels": 8, "block_out_channels": (32, 128, 512)},
}
TRELLIS_FILES = {"encoder": "ss_enc_conv3d_16l8_fp16", "decoder": "ss_dec_conv3d_16l8_fp16"}


class GridGaussian:
    """Independent normal distributions of every number of a latent grid (B, C, r, r, r).

    diffusers' `DiagonalGaussianDistribution` is made for pictures: its `kl` leaves a fifth dimension out of the sum.
    """

    def __init__(self, mean: Tensor, logvar: Tensor):
        self.mean, self.logvar = mean, logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        return (0.5 * self.logvar).exp()

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)

    def kl(self) -> Tensor:
        """(B,) divergence from N(0, 1) in float32: the mean over the grid, not the sum, as in TRELLIS."""
        mean, logvar = self.mean.float(), self.logvar.float()
        return 0.5 * (mean.square() + logvar.exp() - logvar - 1).flatten(1).mean(1)


@dataclass
class OccupancyVAEOutput(BaseOutput):
    """`sample` (B, 1, R, R, R) logits; `latent_dist` the posterior that they were decoded from."""

    sample: Tensor
    latent_dist: GridGaussian | None = None  # never None: a default lets Accelerate rebuild the output in float32


class OccupancyVAE(ModelMixin, ConfigMixin):
    """A variational autoencoder of occupancy grids (B, 1, R, R, R), with the interface of `AutoencoderKL`.

    Args:
        sample_size: R, cells along the side of the grid.
        latent_channels: C of the latents (B, C, r, r, r).
        block_out_channels: width of each level of the encoder; the decoder's are the same in reverse. Between two
            levels the side is halved.
        layers_per_block: residual blocks of each level.
        mid_layers: residual blocks beside the latents.
        patch_size: side of the block of cells that becomes channels before the first convolution; 1 is TRELLIS's,
            larger ones cost less.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("ResidualBlock",)

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        latent_channels: int = 8,
        block_out_channels: tuple[int, ...] = (32, 128, 512),
        layers_per_block: int = 2,
        mid_layers: int = 2,
        patch_size: int = 1,
    ):
        super().__init__()
        cell = patch_size * 2 ** (len(block_out_channels) - 1)
        if sample_size % cell:
            raise ValueError(f"`sample_size` {sample_size} must be a multiple of {cell}, the side that a token covers")
        shape = block_out_channels, layers_per_block, mid_layers
        self.encoder = Encoder(patch_size**3, 2 * latent_channels, *shape)
        self.decoder = Decoder(latent_channels, patch_size**3, *shape)

    @classmethod
    def from_preset(cls, preset: str, **config) -> OccupancyVAE:
        """Build one of `PRESETS`; keyword arguments are those of the constructor and win over the preset's."""
        if preset not in PRESETS:
            raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}, not {preset!r}")
        return cls(**{**PRESETS[preset], **config})

    @classmethod
    def from_trellis(cls, folder: str | Path) -> OccupancyVAE:
        """Build TRELLIS's VAE from its own files, the folder `ckpts` of `microsoft/TRELLIS-image-large`.

        It needs `ss_enc_conv3d_16l8_fp16` and `ss_dec_conv3d_16l8_fp16`, the .json and .safetensors of each. Layout of
        the keys and parameter counts (59,298,192 and 73,671,201) are those of TRELLIS's classes; it has been run on
        files of that layout with random weights, never on the published ones. Weights become float32.

        Raises:
            ValueError: a file is missing, is of another kind of network, or has other keys or shapes.
        """
        halves, shapes = {}, {}
        for part, name in TRELLIS_FILES.items():
            description, weights = (Path(folder) / f"{name}{suffix}" for suffix in (".json", ".safetensors"))
            for path in (description, weights):
                if not path.is_file():
                    raise ValueError(f"{path} is missing")
            shapes[part] = read_trellis_shape(description, part)
            try:
                halves |= {f"{part}.{key}": value.float() for key, value in load_file(weights).items()}
            except SafetensorError as error:
                raise ValueError(f"{weights} is damaged: {error}") from None
        if shapes["encoder"] != shapes["decoder"]:
            raise ValueError(f"the encoder and the decoder in {folder} have different shapes: {shapes}")
        with torch.device("meta"):  # no time is spent on random weights that are replaced
            model = cls(**shapes["encoder"])
        wanted = {name: value.shape for name, value in model.state_dict().items()}
        given = {name: value.shape for name, value in halves.items()}
        wrong = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
        if wrong:
            raise ValueError(
                f"{folder} does not hold TRELLIS's VAE: {wrong[0]} has shape {given.get(wrong[0])}, not "
                f"{wanted.get(wrong[0])} ({len(wrong)} such tensors)"
            )
        model.load_state_dict(halves, assign=True)
        return model.eval()

    @property
    def latent_channels(self) -> int:
        """Channels of a token."""
        return self.config.latent_channels

    @property
    def latent_size(self) -> int:
        """r, the side of the latent grid."""
        config = self.config
        return config.sample_size // (config.patch_size * 2 ** (len(config.block_out_channels) - 1))

    @property
    def num_tokens(self) -> int:
        """Tokens per object, r^3."""
        return self.latent_size**3

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[GridGaussian]:
        """Occupancy (B, 1, R, R, R) in {0, 1} -> the posterior over latents (B, C, r, r, r)."""
        expected = (1, *[self.config.sample_size] * 3)
        if x.shape[1:] != expected:
            raise ValueError(f"`x` must have shape (B, {', '.join(map(str, expected))}), not {tuple(x.shape)}")
        mean, logvar = self.encoder(space_to_depth(x, self.config.patch_size)).chunk(2, dim=1)
        posterior = GridGaussian(mean, logvar)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Latents (B, C, r, r, r) -> logits (B, 1, R, R, R), positive where occupied."""
        logits = depth_to_space(self.decoder(z), self.config.patch_size)
        return DecoderOutput(sample=logits) if return_dict else (logits,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = True,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> OccupancyVAEOutput | tuple[Tensor, GridGaussian]:
        """Reconstruct occupancy (B, 1, R, R, R) through a draw from the posterior, or through its mean."""
        posterior = self.encode(sample).latent_dist
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        logits = self.decode(z).sample
        return OccupancyVAEOutput(logits, posterior) if return_dict else (logits, posterior)

    def to_tokens(self, z: Tensor) -> Tensor:
        """Latents (B, C, r, r, r) -> tokens (B, r^3, C), the last axis of the grid fastest."""
        return z.flatten(2).transpose(1, 2)

    def to_latents(self, tokens: Tensor) -> Tensor:
        """The inverse of `to_tokens`."""
        if tokens.shape[1:] != (self.num_tokens, self.latent_channels):
            raise ValueError(
                f"`tokens` must have shape (B, {self.num_tokens}, {self.latent_channels}), not {tuple(tokens.shape)}"
            )
        return tokens.transpose(1, 2).unflatten(2, [self.latent_size] * 3)


# Names of modules, order of residual blocks and initialisation are TRELLIS's: `from_trellis` relies on them.


class Encoder(nn.Module):
    """(B, in_channels, s, s, s) -> (B, out_channels, s / 2^(levels - 1), ...)."""

    def __init__(
        self, in_channels: int, out_channels: int, widths: tuple[int, ...], layers_per_block: int, mid_layers: int
    ):
        super().__init__()
        self.input_layer = nn.Conv3d(in_channels, widths[0], 3, padding=1)
        blocks = []
        for level, width in enumerate(widths):
            blocks += [ResidualBlock(width) for _ in range(layers_per_block)]
            if level < len(widths) - 1:
                blocks.append(Downsample(width, widths[level + 1]))
        self.blocks = nn.ModuleList(blocks)
        self.middle_block = nn.ModuleList(ResidualBlock(widths[-1]) for _ in range(mid_layers))
        self.out_layer = output_layer(widths[-1], out_channels)
        self.gradient_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.input_layer(x)
        for block in (*self.blocks, *self.middle_block):
            h = self._gradient_checkpointing_func(block, h) if checkpoints(self) else block(h)
        return self.out_layer(h)


class Decoder(nn.Module):
    """(B, in_channels, r, r, r) -> (B, out_channels, r 2^(levels - 1), ...); `widths` in the encoder's order."""

    def __init__(
        self, in_channels: int, out_channels: int, widths: tuple[int, ...], layers_per_block: int, mid_layers: int
    ):
        super().__init__()
        widths = widths[::-1]
        self.input_layer = nn.Conv3d(in_channels, widths[0], 3, padding=1)
        self.middle_block = nn.ModuleList(ResidualBlock(widths[0]) for _ in range(mid_layers))
        blocks = []
        for level, width in enumerate(widths):
            blocks += [ResidualBlock(width) for _ in range(layers_per_block)]
            if level < len(widths) - 1:
                blocks.append(Upsample(width, widths[level + 1]))
        self.blocks = nn.ModuleList(blocks)
        self.out_layer = output_layer(widths[-1], out_channels)
        self.gradient_checkpointing = False

    def forward(self, z: Tensor) -> Tensor:
        h = self.input_layer(z)
        for block in (*self.middle_block, *self.blocks):
            h = self._gradient_checkpointing_func(block, h) if checkpoints(self) else block(h)
        return self.out_layer(h)


class ResidualBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), the identity at the start."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(channels), ChannelNorm(channels)
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, x, y, z), cell by cell, in float32."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.movedim(1, -1).float()
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(rows, self.normalized_shape, weight, bias, self.eps).movedim(-1, 1).to(x.dtype)


class Downsample(nn.Module):
    """Halve the side by a convolution of stride 2."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Double the side by a convolution and a pixel-shuffle."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, 8 * out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return depth_to_space(self.conv(x), 2)


def output_layer(channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(ChannelNorm(channels), nn.SiLU(), nn.Conv3d(channels, out_channels, 3, padding=1))


def checkpoints(module: nn.Module) -> bool:
    return torch.is_grad_enabled() and module.gradient_checkpointing


def space_to_depth(x: Tensor, block: int) -> Tensor:
    """(B, C, n b, n b, n b) -> (B, C b^3, n, n, n); the offset within a block is the fastest part of the channel."""
    x = x.unflatten(4, (-1, block)).unflatten(3, (-1, block)).unflatten(2, (-1, block))
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def depth_to_space(x: Tensor, block: int) -> Tensor:
    """The inverse of `space_to_depth`: pixel-shuffle in three dimensions."""
    x = x.unflatten(1, (-1, block, block, block)).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def read_trellis_shape(path: Path, part: str) -> dict[str, object]:
    """The arguments of `OccupancyVAE` in TRELLIS's description of an encoder or a decoder."""
    try:
        description = json.loads(path.read_text())
        name, given = description["name"], description["args"]
        widths = tuple(given["channels"])
        shape = {"latent_channels": given["latent_channels"], "layers_per_block": given["num_res_blocks"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not TRELLIS's description of a network: {error!r}") from None
    if name != f"SparseStructure{part.capitalize()}" or given.get("norm_type", "layer") != "layer":
        raise ValueError(f"{path} describes a {name} with {given.get('norm_type', 'layer')} norm, not our {part}")
    shape |= {"mid_layers": given.get("num_res_blocks_middle", 2), "sample_size": 64}
    return shape | {"block_out_channels": widths if part == "encoder" else widths[::-1]}
