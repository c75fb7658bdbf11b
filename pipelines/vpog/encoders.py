"""Image encoders: a vision transformer of our own, which takes CroCo v2's weights, and the DINO family's.

Images in [0, 1] (B, 3, H, W) go in, one token per patch (B, N, C) comes out, row by row.
"""

from __future__ import annotations

import functools
import logging
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    BaseImageProcessor,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from backlot.crops import standardise
from pipelines.vpog.attention import LAYER_NORM_EPS, EncoderBlock
from pipelines.vpog.view_encoding import frame_rotary

logger = logging.getLogger(__name__)

# configuration, network, name of its blocks
DINO = {
    "dinov2": (Dinov2Config, Dinov2Model, "Dinov2Layer"),
    "dinov2_with_registers": (Dinov2WithRegistersConfig, Dinov2WithRegistersModel, "Dinov2WithRegistersLayer"),
    "dinov3_vit": (DINOv3ViTConfig, DINOv3ViTModel, "DINOv3ViTLayer"),
}
ENCODERS = ("vit", *DINO)
CROCO_LICENCE = (
    "the CroCo v2 weights in %s are licensed CC BY-NC-SA 4.0 (attribution, no commercial use, share alike); so is what "
    "is trained from them"
)
CROCO_PARTS = {
    r"patch_embed\.proj\.": "patch_embed.",
    r"enc_norm\.": "norm.",
    r"enc_blocks\.(\d+)\.norm([12])\.": r"blocks.\1.norm_\2.",
    r"enc_blocks\.(\d+)\.attn\.(qkv|proj)\.": r"blocks.\1.attention.\2.",
    r"enc_blocks\.(\d+)\.mlp\.fc1\.": r"blocks.\1.mlp.0.",
    r"enc_blocks\.(\d+)\.mlp\.fc2\.": r"blocks.\1.mlp.2.",
}
CROCO_DECODER = ("decoder_embed.", "dec_blocks.", "dec_blocks2.", "dec_norm.", "prediction_head.", "mask_token")
CROCO_SIZES = {
    "patch_size": ("patch_size", 16),
    "hidden_size": ("enc_embed_dim", 768),
    "num_layers": ("enc_depth", 12),
    "num_attention_heads": ("enc_num_heads", 12),
    "mlp_ratio": ("mlp_ratio", 4),
}
NOT_SIZES = {
    *("transformers_version", "architectures", "dtype", "_name_or_path", "model_type"),
    *("stage_names", "out_features", "out_indices"),
}


class VisionTransformer(nn.Module):
    """CroCo v2's encoder: patches, blocks with 2D rotary positions, a norm; no class token.

    Args:
        rope_base: of the rotary positions' frequencies.
        image_mean, image_std: of the three channels in [0, 1].
    """

    block_name = "EncoderBlock"

    def __init__(
        self,
        patch_size: int = 16,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        mlp_ratio: float = 4.0,
        rope_base: float = 100.0,
        image_mean: tuple[float, float, float] = tuple(IMAGENET_DEFAULT_MEAN),
        image_std: tuple[float, float, float] = tuple(IMAGENET_DEFAULT_STD),
    ):
        super().__init__()
        if hidden_size % (4 * num_attention_heads):
            raise ValueError(
                f"`hidden_size` ({hidden_size}) must be a multiple of 4 x `num_attention_heads` ({num_attention_heads})"
            )
        self.patch_size, self.hidden_size, self.heads = patch_size, hidden_size, num_attention_heads
        self.rope_base, self.image_mean, self.image_std = rope_base, image_mean, image_std
        self.patch_embed = nn.Conv2d(3, hidden_size, patch_size, stride=patch_size)
        self.blocks = nn.ModuleList(
            EncoderBlock(hidden_size, num_attention_heads, mlp_ratio) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPS)
        self.gradient_checkpointing = False

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(standardise(2 * images - 1, self.image_mean, self.image_std))
        rotary = frame_rotary(patches.shape[-1], self.hidden_size // self.heads, self.rope_base, images.device)
        rotary = rotary._replace(cos=rotary.cos[:, :-1], sin=rotary.sin[:, :-1])
        tokens = patches.flatten(2).mT
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, rotary)
            else:
                tokens = block(tokens, rotary)
        return self.norm(tokens)


class DinoEncoder(nn.Module):
    """DINOv2, DINOv2 with registers or DINOv3, without their class and register tokens.

    Args:
        kind: one of `DINO`.
        image_mean, image_std: of the three channels in [0, 1].
        config: of the kind's transformers configuration; what is left out has its default.
    """

    def __init__(
        self,
        kind: str,
        config: dict,
        image_mean: tuple[float, float, float] = tuple(IMAGENET_DEFAULT_MEAN),
        image_std: tuple[float, float, float] = tuple(IMAGENET_DEFAULT_STD),
    ):
        super().__init__()
        make_config, make_model, self.block_name = DINO[kind]
        config = make_config(**config)
        if kind == "dinov3_vit":
            # Drawn once per call in training: query and cached templates would lie on different grids.
            config.pos_embed_shift = config.pos_embed_jitter = config.pos_embed_rescale = None
        self.patch_size, self.hidden_size = config.patch_size, config.hidden_size
        self.heads, self.rope_base = config.num_attention_heads, 100.0
        self.image_mean, self.image_std = image_mean, image_std
        self.leading = 1 + (0 if kind == "dinov2" else config.num_register_tokens)
        self.model = make_model(config)
        self.model.embeddings.mask_token = None  # of their pretraining: nothing here would use it

    def forward(self, images: Tensor) -> Tensor:
        pixel_values = standardise(2 * images - 1, self.image_mean, self.image_std)
        return self.model(pixel_values=pixel_values).last_hidden_state[:, self.leading :]


def create_encoder(kind: str, config: dict) -> VisionTransformer | DinoEncoder:
    """An encoder with random weights.

    Args:
        kind: one of `ENCODERS`.
        config: of `VisionTransformer`; of a DINO encoder, its transformers configuration, `image_mean`, `image_std`.

    Raises:
        ValueError: there is no such kind.
    """
    if kind == "vit":
        return VisionTransformer(**config)
    if kind not in DINO:
        raise ValueError(f"`encoder_type` must be one of {', '.join(ENCODERS)}, got {kind!r}")
    own = {key: value for key, value in config.items() if key in ("image_mean", "image_std")}
    return DinoEncoder(kind, {key: value for key, value in config.items() if key not in own}, **own)


@dataclass(frozen=True)
class PretrainedEncoder:
    """A published encoder: what `create_encoder` takes, and the weights for what it gives."""

    kind: str
    config: dict
    weights: dict[str, Tensor]


def read_encoder(source: str | Path) -> PretrainedEncoder:
    """Read the weights of a published encoder; float32, on the host.

    Args:
        source: a CroCo v2 checkpoint (a file `*.pth`), or folder or hub name of a DINO model.

    Raises:
        ValueError: `source` is nothing of this. CroCo is never downloaded.
    """
    path = Path(source)
    return read_croco(path) if path.suffix == ".pth" or path.is_file() else read_dino(str(source))


def read_croco(path: Path) -> PretrainedEncoder:
    """The encoder of a CroCo v2 checkpoint, as its authors publish it. What only its decoder needs is left out.

    Raises:
        ValueError: it is missing, no CroCo checkpoint, or of the first version, whose positions are other ones.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; CroCo v2's weights are at github.com/naver/croco")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is no file of weights alone: {str(error).splitlines()[0]}") from error
    if not isinstance(checkpoint, dict) or "model" not in checkpoint:
        raise ValueError(f"{path} is no CroCo checkpoint: it has no `model`")
    settings = checkpoint.get("croco_kwargs", {})
    positions = settings.get("pos_embed", "cosine")
    if not positions.startswith("RoPE"):
        raise ValueError(f"{path} is no CroCo v2 checkpoint: its `pos_embed` is {positions}, not RoPE")
    weights = {}
    for key, value in checkpoint["model"].items():
        if key.startswith(CROCO_DECODER):
            continue
        names = [re.sub(f"^{old}", new, key) for old, new in CROCO_PARTS.items() if re.match(old, key)]
        if len(names) != 1:
            raise ValueError(f"{path} is no CroCo checkpoint: it has an unknown weight {key}")
        weights[names[0]] = value.float()
    print_croco_licence(path)
    config = {name: settings.get(theirs, default) for name, (theirs, default) in CROCO_SIZES.items()}
    return PretrainedEncoder("vit", config | {"rope_base": float(positions.removeprefix("RoPE"))}, weights)


@functools.cache
def print_croco_licence(path: Path) -> None:
    """Say once under what licence these weights are."""
    logger.warning(CROCO_LICENCE, path)


def read_dino(source: str) -> PretrainedEncoder:
    """A DINO encoder of a folder or of the hub, with its own normalisation of images.

    Raises:
        ValueError: it is another kind of model.
    """
    config = AutoConfig.from_pretrained(source)
    if config.model_type not in DINO:
        raise ValueError(f"{source} is a {config.model_type}, none of {', '.join(DINO)}")
    processor, _ = BaseImageProcessor.get_image_processor_dict(source)
    sizes = {key: value for key, value in config.to_diff_dict().items() if key not in NOT_SIZES}
    sizes |= {key: tuple(processor[key]) for key in ("image_mean", "image_std")}
    model = DINO[config.model_type][1].from_pretrained(source, dtype=torch.float32)
    model.embeddings.mask_token = None
    return PretrainedEncoder(
        config.model_type, sizes, {f"model.{name}": value for name, value in model.state_dict().items()}
    )
