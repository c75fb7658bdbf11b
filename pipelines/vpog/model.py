"""VPOG: which patch of each rendered template a patch of a picture shows, and where exactly the template's pixels lie.

An encoder turns the query crop and its templates into patches; alternating attention lets them look at each other;
heads read classes (a template's patches, or "unseen") and flow. A pose follows from the templates' known 3D points.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from pipelines.vpog.attention import AlternatingAttention
from pipelines.vpog.encoders import VisionTransformer, create_encoder, read_encoder
from pipelines.vpog.heads import OUTPUT_STD, ClassificationHead, FlowHead
from pipelines.vpog.view_encoding import check_head_dim, frame_rotary, group_rotary

PRESETS = {
    "tiny": {
        "encoder_config": {"patch_size": 8, "hidden_size": 64, "num_layers": 2, "num_attention_heads": 4},
        "image_size": 64,
        "num_pairs": 2,
        "layer_scale": 1.0,
        "class_inner_size": 128,
        "class_size": 64,
        "flow_inner_size": 128,
    },
    "small": {"encoder_config": {"hidden_size": 384, "num_layers": 12, "num_attention_heads": 6}},
    "base": {"encoder_config": {"hidden_size": 768, "num_layers": 12, "num_attention_heads": 12}},
    "large": {"encoder_config": {"hidden_size": 1024, "num_layers": 24, "num_attention_heads": 16}, "num_pairs": 12},
}


@dataclass
class VPOGOutput(BaseOutput):
    """What the network says of B queries and S templates each, N patches of ps x ps pixels per image.

    Args:
        logits: (B, S, N, N + 1) float32: over one template's patches and, last, "unseen".
        buddies: (B, S, N) integers: as given, or the largest logit's; N is unseen.
        flow: (B, S, N, ps, ps, 2) float32: of each pixel of the buddy, its place in the query minus the centre of the
            query patch, in patches, x before y; None if the network has no dense flow.
        scale: (B, S, N, ps, ps) float32: scale of the flow's Laplace distribution, in patches.
        center_flow: (B, S, N, 2) float32: the same as `flow` for the buddy's centre; None if the network has none.
    """

    logits: Tensor
    buddies: Tensor
    flow: Tensor | None
    scale: Tensor | None
    center_flow: Tensor | None


class TokenRoles(nn.Module):
    """Adds to each template its unseen token, and to each token whose it is."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.unseen = nn.Parameter(torch.empty(1, 1, 1, hidden_size))
        self.query = nn.Parameter(torch.empty(hidden_size))
        self.template = nn.Parameter(torch.empty(hidden_size))
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, query: Tensor, templates: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, C) and (B, S, N, C) -> (B, N, C) and (B, S, N + 1, C), in the dtype of the tokens."""
        unseen = self.unseen.to(templates.dtype).expand(*templates.shape[:2], 1, -1)
        templates = torch.cat([templates, unseen], dim=2) + self.template.to(templates.dtype)
        return query + self.query.to(query.dtype), templates


class VPOGModel(ModelMixin, ConfigMixin):
    """Args:
    encoder_type: `vit` (CroCo v2's), `dinov2`, `dinov2_with_registers` or `dinov3_vit`.
    encoder_config: of the encoder (`create_encoder`), whose patch size, width and heads are used throughout; None: its
        defaults.
    image_size: side of the square images, in pixels; a multiple of the patch size.
    num_pairs: of a frame and a group block.
    view_encoding: how the group blocks know a template's view: `s2_smooth`, `s2_face`, `so3` or `none`.
    window_size: side, in patches, of the windows of the frame blocks; None: the whole image.
    separate_streams: query and templates have norms and MLPs of their own.
    layer_scale: first value of the gains on what alternating attention adds.
    class_inner_size, class_size: of the classification's MLPs.
    flow_inner_size: of the flow's MLP.
    dense_flow, center_flow: whether there are these outputs.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        encoder_type: str = "vit",
        encoder_config: dict | None = None,
        image_size: int = 224,
        num_pairs: int = 6,
        mlp_ratio: float = 4.0,
        view_encoding: str = "s2_smooth",
        window_size: int | None = None,
        separate_streams: bool = False,
        layer_scale: float = 0.01,
        class_inner_size: int = 512,
        class_size: int = 256,
        flow_inner_size: int = 256,
        dense_flow: bool = True,
        center_flow: bool = True,
    ):
        super().__init__()
        self.encoder = create_encoder(encoder_type, dict(encoder_config or {}))
        hidden_size, heads = self.encoder.hidden_size, self.encoder.heads
        if num_pairs < 1:
            raise ValueError(f"`num_pairs` must be at least 1, got {num_pairs}")
        if image_size % self.patch_size:
            raise ValueError(f"`image_size` ({image_size}) must be a multiple of the patch size ({self.patch_size})")
        if window_size is not None and (window_size < 1 or self.grid_size % window_size):
            raise ValueError(
                f"`window_size` ({window_size}) must divide the {self.grid_size} x {self.grid_size} patches of an image"
            )
        check_head_dim(view_encoding, hidden_size // heads)
        self.roles = TokenRoles(hidden_size)
        self.alternating = AlternatingAttention(
            hidden_size, heads, num_pairs, mlp_ratio, window_size, separate_streams, layer_scale
        )
        self.classification = ClassificationHead(hidden_size, class_inner_size, class_size)
        self.flow = None
        if dense_flow or center_flow:
            self.flow = FlowHead(hidden_size, flow_inner_size, self.patch_size, dense_flow, center_flow)
        self._no_split_modules = self._repeated_blocks = (self.encoder.block_name, "FrameBlock", "GroupBlock")
        self._initialize()

    def _initialize(self) -> None:
        own = [self.alternating, self.classification, *([] if self.flow is None else [self.flow])]
        if isinstance(self.encoder, VisionTransformer):
            nn.init.xavier_uniform_(self.encoder.patch_embed.weight.flatten(1))
            nn.init.zeros_(self.encoder.patch_embed.bias)
            own.append(self.encoder)
        for module in (module for part in own for module in part.modules()):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # The first flow is 0 and the first scale the same for every pixel, but for what breaks the symmetry.
        for output in () if self.flow is None else filter(None, (self.flow.dense, self.flow.center)):
            nn.init.normal_(output.weight, std=OUTPUT_STD)

    @classmethod
    def from_preset(cls, preset: str, source: str | Path | None = None, **config) -> VPOGModel:
        """Build one of the sizes of `PRESETS`.

        Args:
            source: None: random weights. Else the encoder, with its sizes and weights, is the one published there: a
                CroCo v2 checkpoint, or folder or hub name of a DINO model.
            config: of the constructor; wins over the preset's.
        """
        if preset not in PRESETS:
            raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}, got {preset!r}")
        config = PRESETS[preset] | config
        if source is None:
            return cls(**config)
        pretrained = read_encoder(source)
        model = cls(**config | {"encoder_type": pretrained.kind, "encoder_config": pretrained.config})
        model.encoder.load_state_dict(pretrained.weights)
        return model

    @property
    def patch_size(self) -> int:
        """Side of a patch, in pixels."""
        return self.encoder.patch_size

    @property
    def grid_size(self) -> int:
        """Patches per side of an image."""
        return self.config.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """N, patches of an image."""
        return self.grid_size**2

    def forward(
        self,
        images: Tensor | None = None,
        rotations: Tensor | None = None,
        d_ref: Tensor | None = None,
        reference_rotation: Tensor | None = None,
        *,
        buddies: Tensor | None = None,
        query_tokens: Tensor | None = None,
        template_tokens: Tensor | None = None,
        encode_only: bool = False,
    ) -> VPOGOutput | Tensor:
        """Match queries with templates. Nothing here waits for the device.

        Args:
            images: (B, S + 1, 3, image_size, image_size) in [0, 1], in the dtype to compute in: query, then templates.
                With `encode_only` any leading axes.
            rotations: (B, S, 3, 3), camera_from_object of the templates.
            d_ref: (B, 3), direction in the object's frame from which the query is thought to be seen.
            reference_rotation: (B, 3, 3), of the template that gave `d_ref`.
            buddies: (B, S, N) integers, the pairs whose flow is wanted, for training; None: the network's own.
            query_tokens, template_tokens: (B, N, C) and (B, S, N, C), what `encode_only` gave, in place of `images`.
            encode_only: return the encoder's tokens, (..., N, C).
        """
        if encode_only:
            return self._encode(images)
        query, templates = self._tokens(images, query_tokens, template_tokens)
        self._check_views(templates, rotations, d_ref, reference_rotation)
        size, head_dim, base = self.grid_size, self.encoder.hidden_size // self.encoder.heads, self.encoder.rope_base
        frame = frame_rotary(self.config.window_size or size, head_dim, base, query.device)
        group = group_rotary(self.config.view_encoding, rotations, d_ref, reference_rotation, size, head_dim, base)
        query, templates = self.alternating(*self.roles(query, templates), frame, group)
        logits = self.classification(query, templates)
        buddies = logits.argmax(dim=-1) if buddies is None else buddies
        found = (None, None, None) if self.flow is None else self.flow(query, templates[:, :, :-1], buddies)
        return VPOGOutput(logits, buddies, *found)

    def _encode(self, images: Tensor) -> Tensor:
        size = self.config.image_size
        if images.shape[-3:] != (3, size, size):
            raise ValueError(f"`images` must be (..., 3, {size}, {size}), got {tuple(images.shape)}")
        return self.encoder(images.flatten(0, -4)).unflatten(0, images.shape[:-3])

    def _tokens(
        self, images: Tensor | None, query_tokens: Tensor | None, template_tokens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if (images is None) != (query_tokens is not None and template_tokens is not None):
            raise ValueError("give `images`, or both `query_tokens` and `template_tokens`, and not all three")
        if images is None:
            return query_tokens, template_tokens
        if images.ndim != 5 or images.shape[1] < 2:
            raise ValueError(f"`images` must be (B, S + 1, 3, H, W) with S at least 1, got {tuple(images.shape)}")
        tokens = self._encode(images)
        return tokens[:, 0], tokens[:, 1:]

    def _check_views(self, templates: Tensor, *views: Tensor | None) -> None:
        batch, count = templates.shape[:2]
        expected = {"rotations": (batch, count, 3, 3), "d_ref": (batch, 3), "reference_rotation": (batch, 3, 3)}
        for (name, shape), view in zip(expected.items(), views, strict=True):
            if view is None or view.shape != shape:
                raise ValueError(f"`{name}` must be {shape}, got {None if view is None else tuple(view.shape)}")
