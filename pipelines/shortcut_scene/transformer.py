"""SceneShortcutTransformer: generates all objects of a scene together, and knows the time and the length of its step.

Two streams of tokens per object, its shape latents and its pose (rotation, scale, translation), as in the sparse
structure generator of SAM 3D Objects (arXiv 2511.16624), whose parameter counts the preset `sam3d` reproduces. What
that network lacks is attention between objects: blocks of scope `scene` have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from backlot.layers import ScalarEmbedder
from backlot.modalities import OPTIONAL_POSES, POSES
from pipelines.shortcut_scene.picture_embedder import POINT_CHANNELS, PictureEmbedder, embed_points

OBJECT_THEN_SCENE = ["object", "scene"]
NO_MEAN, NO_STD = [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
# Parameters with alternating scopes: 0.8 M, 22 M, 172 M, 1011 M; without attention between objects the last has 960 M.
PRESETS = {
    "tiny": {"hidden_size": 64, "num_layers": 4, "num_attention_heads": 4, "scene_attention": "full"},
    "small": {"hidden_size": 256, "num_layers": 8, "num_attention_heads": 4},
    "base": {"hidden_size": 1024, "num_layers": 4, "num_attention_heads": 16},
    "sam3d": {"hidden_size": 1024, "num_layers": 24, "num_attention_heads": 16, "translation_scale": True},
}


@dataclass
class SceneShortcutTransformerOutput(BaseOutput):
    """`sample`: the mean velocity of each modality, of its shape (B, N, tokens, channels)."""

    sample: dict[str, Tensor]


class SceneShortcutTransformer(ModelMixin, ConfigMixin):
    """A two-stream transformer over the objects of a scene, modulated by time and step size.

    Args:
        shape_tokens, shape_channels: the shape latents of one object; a cube of tokens gets 3D positions.
        shape_patch_size: side of the cube of shape latents that one token of the transformer stands for.
        hidden_size, num_layers, num_attention_heads, mlp_ratio: the transformer's shape.
        attention_scope: `object` (blind to the others) or `scene` for each block; a shorter list is repeated.
        scene_attention: what takes part between objects: `pose` and register tokens, or all tokens (`full`).
        translation_mean, translation_std: what translations were standardised by: where they lie among the points of a
            pointmap.
        num_registers: tokens per object that carry what others should know of its shape (`pose`).
        translation_scale: a fourth pose token of one number, as in SAM 3D Objects.
        condition: `none`; `image`, a small patch embedding of picture and pointmap; `tokens` of an encoder.
        condition_channels: channels of these tokens, or 3 (picture) or 6 (picture and pointmap) for `image`.
        image_size, patch_size, num_condition_layers: of the embedding of `image`.
        object_condition: `shared`; `mask`, each object sees its own mask (`image` only); `slot`, a learnt embedding
            of the place in the list, which the order of objects then matters to.
        max_slots: number of these embeddings.
        protect_shape: shape tokens do not see pose tokens and get no gradient from them, as in SAM 3D Objects.
        independent_t: objects of a scene may have times of their own (completion of scenes).
        use_shortcut: without it the network ignores the step size.
        time_scale: factor on t and d before the sinusoids.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("SceneBlock",)
    begins_without_effect = ("scene_attention", "registers", "step_embedder")
    """Parts of names: layers that the weights of an object-level model or a plain flow may lack."""
    _repeated_blocks = ("SceneBlock",)

    @register_to_config
    def __init__(
        self,
        shape_tokens: int = 4096,
        shape_channels: int = 8,
        shape_patch_size: int = 1,
        hidden_size: int = 1024,
        num_layers: int = 24,
        num_attention_heads: int = 16,
        mlp_ratio: float = 4.0,
        attention_scope: list[str] = OBJECT_THEN_SCENE,
        scene_attention: str = "pose",
        num_registers: int = 4,
        translation_scale: bool = False,
        translation_mean: list[float] = NO_MEAN,
        translation_std: list[float] = NO_STD,
        condition: str = "tokens",
        condition_channels: int = 1024,
        image_size: int = 32,
        patch_size: int = 4,
        num_condition_layers: int = 0,
        object_condition: str = "shared",
        max_slots: int = 32,
        protect_shape: bool = False,
        independent_t: bool = False,
        use_shortcut: bool = True,
        time_scale: float = 1000.0,
    ):
        super().__init__()
        _check_settings(scene_attention, condition, object_condition, attention_scope, hidden_size, num_attention_heads)
        scopes = [attention_scope[i % len(attention_scope)] for i in range(num_layers)]
        _check_patches(shape_tokens, shape_patch_size)

        width, joined = hidden_size, shape_patch_size**3
        self.widths = dict(sorted(POSES.items())) | (OPTIONAL_POSES if translation_scale else {})
        self.shape_in = nn.Linear(joined * shape_channels, width)
        self.shape_out = nn.Linear(width, joined * shape_channels)
        self.pose_in = nn.ModuleDict({name: nn.Linear(channels, width) for name, channels in self.widths.items()})
        self.pose_out = nn.ModuleDict({name: nn.Linear(width, channels) for name, channels in self.widths.items()})
        self.register_buffer("shape_positions", token_positions(shape_tokens // joined, width), persistent=False)
        self.pose_positions = nn.Parameter(torch.randn(len(self.widths), width) * 0.02)
        self.slots = nn.Embedding(max_slots, width) if object_condition == "slot" else None
        uses_registers = "scene" in scopes and scene_attention == "pose" and num_registers > 0
        self.registers = nn.Parameter(torch.randn(num_registers, width) * 0.02) if uses_registers else None
        self.time_embedder = ScalarEmbedder(width)
        self.step_embedder = ScalarEmbedder(width) if use_shortcut else None
        self.condition_embedder = None
        if condition == "image":
            self.condition_embedder = PictureEmbedder(
                condition_channels,
                image_size,
                patch_size,
                width,
                num_attention_heads,
                num_condition_layers,
                object_condition == "mask",
            )
        elif condition == "tokens":
            self.condition_embedder = nn.Sequential(nn.Linear(condition_channels, width), nn.LayerNorm(width))
        # a place is embedded like the patches that see it, which makes them easy to find
        self.translation_waves = None
        if condition == "image" and condition_channels == 6:
            self.translation_waves = nn.Linear(POINT_CHANNELS, width, bias=False)
        self.register_buffer("origin", torch.tensor(translation_mean), persistent=False)
        self.register_buffer("metres", torch.tensor(translation_std), persistent=False)
        self.null_token = nn.Parameter(torch.zeros(width)) if condition != "none" else None
        self.blocks = nn.ModuleList(
            SceneBlock(
                width,
                num_attention_heads,
                mlp_ratio,
                scene_attention if scope == "scene" else None,
                condition != "none",
                protect_shape,
            )
            for scope in scopes
        )
        self.norm_out = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.gradient_checkpointing = False
        self._initialize()

    @classmethod
    def from_preset(cls, preset: str, **config) -> SceneShortcutTransformer:
        """Build one of `PRESETS`; keyword arguments are those of the constructor and win over the preset's."""
        _one_of("preset", preset, *PRESETS)
        return cls(**PRESETS[preset] | config)

    @property
    def is_scene_level(self) -> bool:
        """Whether objects see one another at all."""
        return any(block.scene_attention is not None for block in self.blocks)

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for linear in (self.time_embedder.linear_1, self.time_embedder.linear_2):
            nn.init.normal_(linear.weight, std=0.02)
        if self.step_embedder is not None:  # at the start the step size has no say
            nn.init.zeros_(self.step_embedder.linear_2.weight)
        for block in self.blocks:
            nn.init.zeros_(block.modulation.weight)
            if block.scene_attention is not None:  # an object-level model goes on unchanged
                for projection in block.scene_attention.projections:
                    nn.init.zeros_(projection.to_out.weight)

    def forward(
        self,
        sample: dict[str, Tensor],
        timestep: Tensor,
        step_size: Tensor,
        object_mask: Tensor | None = None,
        image: Tensor | None = None,
        pointmap: Tensor | None = None,
        masks: Tensor | None = None,
        cond_tokens: Tensor | None = None,
        cond_mask: Tensor | None = None,
        unconditional: Tensor | None = None,
        return_dict: bool = True,
    ) -> SceneShortcutTransformerOutput | tuple[dict[str, Tensor]]:
        """Predict the mean velocity from `timestep` to `timestep + step_size`.

        Args:
            sample: the modalities, each (B, N, tokens, channels): `shape`, `6drotation_normalized`, `scale`,
                `translation` (and `translation_scale`), standardised.
            timestep: (B,) or (B, N), t in [0, 1], 0 is noise and 1 is data.
            step_size: (B,) or (B, N), d in [0, 1 - t]; 0 asks for the instantaneous velocity.
            object_mask: (B, N) bool, false where a scene has no more objects.
            image, pointmap: (B, 3, S, S) picture in [-1, 1], scene coordinates of its pixels (`condition` image).
            masks: (B, N, S, S), each object's part of the picture (`object_condition` mask).
            cond_tokens: (B, L, C), or (B, N, L, C) where each object has its own (`condition` tokens).
            cond_mask: (B, L) bool, false where these are padding.
            unconditional: (B,) bool, true: as if the condition were unknown.

        Returns:
            `sample`, velocities of the same shapes, 0 for objects that are padding.
        """
        patches = join_tokens(sample["shape"], self.config.shape_patch_size)
        shape = self.shape_in(patches) + self.shape_positions.to(sample["shape"].dtype)
        pose = {name: self.pose_in[name](sample[name]) for name in self.widths}
        if self.translation_waves is not None:
            points = sample["translation"].float() * self.metres + self.origin
            pose["translation"] = pose["translation"] + self.translation_waves(embed_points(points).to(shape.dtype))
        pose = torch.cat(list(pose.values()), dim=2) + self.pose_positions
        batch, num_objects = shape.shape[:2]
        if self.slots is not None:
            if num_objects > self.config.max_slots:
                raise ValueError(f"{num_objects} objects, but the network has {self.config.max_slots} slots")
            pose = pose + self.slots.weight[:num_objects, None]
        if self.registers is not None:
            pose = torch.cat([pose, self.registers.expand(batch, num_objects, -1, -1).to(pose.dtype)], dim=2)
        embedded = self._embed_scalar(self.time_embedder, timestep)
        if self.step_embedder is not None:
            embedded = embedded + self._embed_scalar(self.step_embedder, step_size)
        modulation = F.silu(embedded)
        condition, cond_mask = self._embed_condition(image, pointmap, masks, cond_tokens, cond_mask, unconditional)
        if object_mask is None:
            object_mask = torch.ones(batch, num_objects, dtype=torch.bool, device=shape.device)

        for block in self.blocks:
            inputs = shape, pose, modulation, condition, cond_mask, object_mask, len(self.widths)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                shape, pose = self._gradient_checkpointing_func(block, *inputs)
            else:
                shape, pose = block(*inputs)
        shape, pose = self.norm_out(shape), self.norm_out(pose)
        velocity = {"shape": split_tokens(self.shape_out(shape), self.config.shape_patch_size)}
        velocity |= {name: self.pose_out[name](pose[:, :, i : i + 1]) for i, name in enumerate(self.widths)}
        velocity = {name: velocity[name] * object_mask[..., None, None] for name in sample}
        return SceneShortcutTransformerOutput(sample=velocity) if return_dict else (velocity,)

    def _embed_scalar(self, embedder: ScalarEmbedder, value: Tensor) -> Tensor:
        """(B,) or (B, N) -> (B, 1 or N, 1, C), to be added to tokens of every object."""
        embedded = embedder(value.flatten() * self.config.time_scale)
        return embedded.reshape(len(value), -1, 1, embedded.shape[-1])

    def _embed_condition(
        self,
        image: Tensor | None,
        pointmap: Tensor | None,
        masks: Tensor | None,
        cond_tokens: Tensor | None,
        cond_mask: Tensor | None,
        unconditional: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Tokens (B, L, C) for all objects of a scene, or (B, N, L, C) for each; (B, L) false where there is none."""
        config = self.config
        if config.condition == "none":
            return None, None
        if config.condition == "tokens":
            _given(cond_tokens=cond_tokens)
            condition = self.condition_embedder(cond_tokens)
        else:
            wanted = {"image": image} | ({"pointmap": pointmap} if config.condition_channels == 6 else {})
            wanted |= {"masks": masks} if config.object_condition == "mask" else {}
            _given(**wanted)
            picture = torch.cat([image, pointmap], dim=1) if config.condition_channels == 6 else image
            own = masks if config.object_condition == "mask" else None
            condition, cond_mask = self.condition_embedder(picture, own)
        if unconditional is not None:
            rows = unconditional.reshape(-1, *(1,) * (condition.ndim - 1))
            condition = torch.where(rows, self.null_token.to(condition.dtype), condition)
        return condition, cond_mask


class SceneBlock(nn.Module):
    """Attention inside each object, between objects, to the condition, and an MLP; one set of weights per stream."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        scene_attention: str | None,
        has_condition: bool,
        protect_shape: bool,
    ):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, 6 * width)
        self.object_attention = ObjectAttention(width, heads, protect_shape)
        self.scene_attention = SceneAttention(width, heads, scene_attention) if scene_attention else None
        self.cross_attention = CrossAttention(width, heads) if has_condition else None
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, int(width * mlp_ratio)),
                nn.GELU(approximate="tanh"),
                nn.Linear(int(width * mlp_ratio), width),
            )
            for _ in range(2)
        )

    def forward(
        self,
        shape: Tensor,
        pose: Tensor,
        modulation: Tensor,
        condition: Tensor | None,
        cond_mask: Tensor | None,
        object_mask: Tensor,
        num_pose: int,
    ) -> tuple[Tensor, Tensor]:
        """(B, N, tokens, D) of both streams; of the pose stream the first `num_pose` tokens are no registers."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(modulation).chunk(6, dim=-1)
        streams = shape, pose
        attended = self.object_attention(*(self.norm(x) * (1 + scale_1) + shift_1 for x in streams), num_pose)
        streams = [x + gate_1 * y for x, y in zip(streams, attended, strict=True)]
        if self.scene_attention is not None:
            streams = self.scene_attention(*streams, object_mask)
        if self.cross_attention is not None:
            streams = self.cross_attention(*streams, condition, cond_mask)
        return tuple(
            x + gate_2 * mlp(self.norm(x) * (1 + scale_2) + shift_2) for x, mlp in zip(streams, self.mlps, strict=True)
        )


class AttentionProcessor:
    """Calls the attention kernel that `set_attention_backend` chose."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Queries (B, L, heads, D), keys and values (B, M, heads, D), mask of keys (B, M) -> (B, L, heads * D)."""
        mask = None if mask is None else mask[:, None, None]
        return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=self._attention_backend).flatten(2)


class StreamProjections(nn.Module):
    """Queries, keys, values and output of one stream; queries and keys are RMS-normalised per head."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Linear(width, width)
        self.norm_q = nn.Parameter(torch.ones(heads, width // heads))
        self.norm_k = nn.Parameter(torch.ones(heads, width // heads))
        self.heads = heads

    def query(self, x: Tensor) -> Tensor:
        return self._normalise(self.to_q(x), self.norm_q)

    def key(self, x: Tensor) -> Tensor:
        return self._normalise(self.to_k(x), self.norm_k)

    def value(self, x: Tensor) -> Tensor:
        return self.to_v(x).unflatten(-1, (self.heads, -1))

    def _normalise(self, x: Tensor, gain: Tensor) -> Tensor:
        x = x.unflatten(-1, (self.heads, -1))
        return F.rms_norm(x, x.shape[-1:], eps=1e-6) * gain.to(x.dtype)


class SceneAttentionModule(nn.Module, AttentionModuleMixin):
    """What the attentions below have in common: a kernel that can be chosen."""

    _default_processor_cls = AttentionProcessor
    _available_processors = (AttentionProcessor,)

    def __init__(self, heads: int):
        super().__init__()
        self.heads = heads
        self.set_processor(AttentionProcessor())


class ObjectAttention(SceneAttentionModule):
    """Each object by itself. Registers read, but are not read: they act on others through the scene attention alone."""

    def __init__(self, width: int, heads: int, protect_shape: bool):
        super().__init__(heads)
        self.protect_shape = protect_shape
        self.shape, self.pose = StreamProjections(width, heads), StreamProjections(width, heads)

    def forward(self, shape: Tensor, pose: Tensor, num_pose: int) -> tuple[Tensor, Tensor]:
        size, num_shape = shape.shape[:2], shape.shape[2]
        shape, pose = shape.flatten(0, 1), pose.flatten(0, 1)
        queries = self.shape.query(shape), self.pose.query(pose)
        shape_key, shape_value = self.shape.key(shape), self.shape.value(shape)
        pose_key, pose_value = self.pose.key(pose[:, :num_pose]), self.pose.value(pose[:, :num_pose])
        if self.protect_shape:
            seen_by_shape = self.processor(queries[0], shape_key, shape_value)
            shape_key, shape_value = shape_key.detach(), shape_value.detach()
        key, value = torch.cat([shape_key, pose_key], dim=1), torch.cat([shape_value, pose_value], dim=1)
        if self.protect_shape:
            seen_by_pose = self.processor(queries[1], key, value)
        else:
            seen = self.processor(torch.cat(queries, dim=1), key, value)
            seen_by_shape, seen_by_pose = seen[:, :num_shape], seen[:, num_shape:]
        return (
            self.shape.to_out(seen_by_shape).unflatten(0, size),
            self.pose.to_out(seen_by_pose).unflatten(0, size),
        )


class SceneAttention(SceneAttentionModule):
    """All objects of a scene together: their pose and register tokens, or (`full`) all tokens."""

    def __init__(self, width: int, heads: int, participants: str):
        super().__init__(heads)
        count = 2 if participants == "full" else 1
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(count))
        self.projections = nn.ModuleList(StreamProjections(width, heads) for _ in range(count))

    def forward(self, shape: Tensor, pose: Tensor, object_mask: Tensor) -> list[Tensor]:
        streams = [shape, pose][-len(self.projections) :]  # the pose stream is the last
        parts = list(zip(self.projections, [norm(x) for norm, x in zip(self.norms, streams, strict=True)], strict=True))
        query, key, value = (
            torch.cat([projected(x) for projected, x in rows], dim=2).flatten(1, 2)
            for rows in (
                [(p.query, x) for p, x in parts],
                [(p.key, x) for p, x in parts],
                [(p.value, x) for p, x in parts],
            )
        )
        lengths = [x.shape[2] for x in streams]
        seen = self.processor(query, key, value, object_mask.repeat_interleave(sum(lengths), dim=1))
        seen = seen.unflatten(1, (object_mask.shape[1], -1)).split(lengths, dim=2)
        streams = [x + p.to_out(y) for x, p, y in zip(streams, self.projections, seen, strict=True)]
        return streams if len(streams) == 2 else [shape, *streams]


class CrossAttention(SceneAttentionModule):
    """Every token of every object to the condition's tokens, which all objects share or each has for itself."""

    def __init__(self, width: int, heads: int):
        super().__init__(heads)
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.to_q, self.to_k, self.to_v, self.to_out = (
            nn.ModuleList(nn.Linear(width, width) for _ in range(2)) for _ in range(4)
        )

    def forward(self, shape: Tensor, pose: Tensor, condition: Tensor, cond_mask: Tensor | None) -> list[Tensor]:
        own = condition.ndim == 4  # (B, N, L, D): objects become the batch
        if own and cond_mask is not None:
            cond_mask = cond_mask.repeat_interleave(shape.shape[1], dim=0)
        condition = condition.flatten(0, 1) if own else condition
        results = []
        for i, x in enumerate((shape, pose)):
            query = self.to_q[i](self.norms[i](x))
            query = query.flatten(0, 1) if own else query.flatten(1, 2)
            query, key, value = (
                y.unflatten(-1, (self.heads, -1)) for y in (query, self.to_k[i](condition), self.to_v[i](condition))
            )
            seen = self.processor(query, key, value, cond_mask)
            results.append(x + self.to_out[i](seen.reshape(x.shape)))
        return results


def join_tokens(x: Tensor, patch_size: int) -> Tensor:
    """(B, N, s^3, C) -> (B, N, (s / p)^3, p^3 C): cubes of p^3 tokens become one."""
    if patch_size == 1:
        return x
    side, p = round(x.shape[2] ** (1 / 3)) // patch_size, patch_size
    x = x.unflatten(2, (side, p, side, p, side, p)).permute(0, 1, 2, 4, 6, 3, 5, 7, 8)
    return x.flatten(5).flatten(2, 4)


def split_tokens(x: Tensor, patch_size: int) -> Tensor:
    """The inverse of `join_tokens`."""
    if patch_size == 1:
        return x
    side, p = round(x.shape[2] ** (1 / 3)), patch_size
    x = x.unflatten(2, (side, side, side)).unflatten(5, (p, p, p, -1)).permute(0, 1, 2, 5, 3, 6, 4, 7, 8)
    return x.flatten(2, 7)


def token_positions(num_tokens: int, width: int) -> Tensor:
    """Fixed sine-cosine positions (num_tokens, width) of shape tokens: of a cube x, y, z, else of a list."""
    side = round(num_tokens ** (1 / 3))
    if side**3 == num_tokens and side > 1:
        axes = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float64) for _ in range(3)))
    else:
        axes = torch.arange(num_tokens, dtype=torch.float64)[:, None]
    count = width // (2 * axes.shape[1])
    frequencies = 10_000.0 ** -(torch.arange(count, dtype=torch.float64) / count)
    angles = (axes[..., None] * frequencies).flatten(1)
    positions = torch.cat([angles.sin(), angles.cos()], dim=1)
    return F.pad(positions, (0, width - positions.shape[1])).float()


def _check_settings(
    scene_attention: str,
    condition: str,
    object_condition: str,
    attention_scope: Sequence[str],
    hidden_size: int,
    num_attention_heads: int,
) -> None:
    """ValueError for settings of SceneShortcutTransformer that are unknown or do not fit together."""
    _one_of("scene_attention", scene_attention, "pose", "full")
    _one_of("condition", condition, "none", "image", "tokens")
    _one_of("object_condition", object_condition, "shared", "mask", "slot")
    for scope in attention_scope:
        _one_of("attention_scope", scope, "object", "scene")
    if not attention_scope:
        raise ValueError("`attention_scope` is empty: name the scope of at least the first block")
    if hidden_size % (2 * num_attention_heads) or hidden_size % 4:
        raise ValueError(
            f"`hidden_size` ({hidden_size}) must be a multiple of 4 and of 2 x `num_attention_heads` "
            f"({num_attention_heads})"
        )
    if object_condition == "mask" and condition != "image":
        raise ValueError(f"`object_condition` mask needs `condition` image, not {condition}")


def _check_patches(shape_tokens: int, shape_patch_size: int) -> None:
    """ValueError unless patches divide the shape's tokens as a cube."""
    side = round(shape_tokens ** (1 / 3))
    if shape_patch_size < 1 or (shape_patch_size > 1 and (side**3 != shape_tokens or side % shape_patch_size)):
        raise ValueError(f"`shape_patch_size` {shape_patch_size} does not divide {shape_tokens} tokens as a cube")


def _one_of(name: str, value: str, *allowed: str) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, not {value!r}")


def _given(**inputs: Tensor | None) -> None:
    for name, value in inputs.items():
        if value is None:
            raise ValueError(f"`{name}` is missing: the network was made for this condition")
