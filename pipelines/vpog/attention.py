"""Transformer blocks: over one image's tokens, and in turns over each image's and over all images' of a group."""

from __future__ import annotations

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from pipelines.vpog.view_encoding import Rotary, rotate

LAYER_NORM_EPS = 1e-6


class AttentionProcessor:
    """Calls the attention kernel that `set_attention_backend` chose."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attention: Attention, hidden_states: Tensor, rotary: Rotary) -> Tensor:
        query, key, value = attention.qkv(hidden_states).unflatten(-1, (3, attention.heads, -1)).unbind(-3)
        query, key = rotate(query, rotary), rotate(key, rotary)
        hidden_states = dispatch_attention_fn(query, key, value, backend=self._attention_backend)
        return attention.proj(hidden_states.flatten(2))


class Attention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention with turned queries and keys, (B, tokens, hidden_size) -> the same."""

    _default_processor_cls = AttentionProcessor
    _available_processors = (AttentionProcessor,)

    def __init__(self, hidden_size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.set_processor(AttentionProcessor())

    def forward(self, hidden_states: Tensor, rotary: Rotary) -> Tensor:
        return self.processor(self, hidden_states, rotary)


class LayerScale(nn.Module):
    """A gain per channel (Touvron et al., arXiv 2103.17239)."""

    def __init__(self, hidden_size: int, initial: float):
        super().__init__()
        self.gain = nn.Parameter(torch.full((hidden_size,), initial))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * self.gain


def mlp(hidden_size: int, ratio: float) -> nn.Sequential:
    """Two linear layers with a GELU between them."""
    inner = int(hidden_size * ratio)
    return nn.Sequential(nn.Linear(hidden_size, inner), nn.GELU(), nn.Linear(inner, hidden_size))


class EncoderBlock(nn.Module):
    """Attention and MLP over one image's tokens, each after a norm: CroCo v2's block."""

    def __init__(self, hidden_size: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.norm_1 = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPS)
        self.attention = Attention(hidden_size, heads)
        self.norm_2 = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPS)
        self.mlp = mlp(hidden_size, mlp_ratio)

    def forward(self, hidden_states: Tensor, rotary: Rotary) -> Tensor:
        hidden_states = hidden_states + self.attention(self.norm_1(hidden_states), rotary)
        return hidden_states + self.mlp(self.norm_2(hidden_states))


class Stream(nn.Module):
    """What a block does to each token by itself."""

    def __init__(self, hidden_size: int, mlp_ratio: float, layer_scale: float):
        super().__init__()
        self.norm_1 = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPS)
        self.scale_1 = LayerScale(hidden_size, layer_scale)
        self.norm_2 = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPS)
        self.mlp = mlp(hidden_size, mlp_ratio)
        self.scale_2 = LayerScale(hidden_size, layer_scale)


class AlternatingBlock(nn.Module):
    """Attention and MLP over a query (B, N, C) and its templates (B, S, N + 1, C).

    Args:
        separate_streams: query and templates have norms, MLPs and gains of their own.
        layer_scale: first value of the gains.
    """

    def __init__(self, hidden_size: int, heads: int, mlp_ratio: float, separate_streams: bool, layer_scale: float):
        super().__init__()
        self.attention = Attention(hidden_size, heads)
        self.streams = nn.ModuleList(
            Stream(hidden_size, mlp_ratio, layer_scale) for _ in range(2 if separate_streams else 1)
        )

    def forward(self, query: Tensor, templates: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        first, last = self.streams[0], self.streams[-1]
        query_change, template_change = self.attend(first.norm_1(query), last.norm_1(templates), rotary)
        query, templates = query + first.scale_1(query_change), templates + last.scale_1(template_change)
        query = query + first.scale_2(first.mlp(first.norm_2(query)))
        return query, templates + last.scale_2(last.mlp(last.norm_2(templates)))


class GroupBlock(AlternatingBlock):
    """Every token of a query and its templates attends to every other."""

    def attend(self, query: Tensor, templates: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        tokens = self.attention(torch.cat([query, templates.flatten(1, 2)], dim=1), rotary)
        query, flat = tokens.split([query.shape[1], tokens.shape[1] - query.shape[1]], dim=1)
        return query, flat.unflatten(1, templates.shape[1:3])


class FrameBlock(AlternatingBlock):
    """Every token attends to those of its own image, or of its window.

    Args:
        window_size: patches per side of a window; None: one window.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        mlp_ratio: float,
        separate_streams: bool,
        layer_scale: float,
        window_size: int | None,
    ):
        super().__init__(hidden_size, heads, mlp_ratio, separate_streams, layer_scale)
        self.window_size = window_size

    def attend(self, query: Tensor, templates: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        patches = query.shape[1]
        flat = self.attend_within(templates.flatten(0, 1), patches, rotary)
        return self.attend_within(query, patches, rotary), flat.unflatten(0, templates.shape[:2])

    def attend_within(self, tokens: Tensor, patches: int, rotary: Rotary) -> Tensor:
        """(B, patches or patches + 1, C) -> the same."""
        if self.window_size is None:
            return self.attention(tokens, first_tokens(rotary, tokens.shape[1]))
        windows = to_windows(tokens, patches, self.window_size)
        windows = self.attention(windows, first_tokens(rotary, windows.shape[1]))
        return from_windows(windows, patches, self.window_size)


def first_tokens(rotary: Rotary, count: int) -> Rotary:
    """The first `count` tokens' positions: those without the unseen token's, for a query."""
    return Rotary(rotary.cos[:, :count], rotary.sin[:, :count])


def to_windows(tokens: Tensor, patches: int, size: int) -> Tensor:
    """Cut images into windows, each with a copy of the tokens that are no patches.

    Args:
        tokens: (B, patches + extra, C), patches row by row of a square.

    Returns:
        (B * windows, size * size + extra, C).
    """
    across = round(patches**0.5) // size
    image, extra = tokens[:, :patches], tokens[:, patches:]
    image = image.unflatten(1, (across, size, across, size)).transpose(2, 3)
    image = image.reshape(-1, size * size, tokens.shape[-1])
    return torch.cat([image, extra.repeat_interleave(across**2, dim=0)], dim=1)


def from_windows(windows: Tensor, patches: int, size: int) -> Tensor:
    """Undo `to_windows`; the copies are averaged."""
    across = round(patches**0.5) // size
    windows = windows.unflatten(0, (-1, across**2))
    image, extra = windows[:, :, : size**2], windows[:, :, size**2 :].mean(dim=1)
    image = image.unflatten(2, (size, size)).unflatten(1, (across, across)).transpose(2, 3)
    return torch.cat([image.flatten(1, 4), extra], dim=1)


class AlternatingAttention(nn.Module):
    """Pairs of a frame block and a group block (Wang et al., arXiv 2503.11651), and a norm.

    Args:
        num_pairs: at least 1.
        window_size, separate_streams, layer_scale: of the blocks.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        num_pairs: int,
        mlp_ratio: float,
        window_size: int | None,
        separate_streams: bool,
        layer_scale: float,
    ):
        super().__init__()
        shape = (hidden_size, heads, mlp_ratio, separate_streams, layer_scale)
        self.blocks = nn.ModuleList()
        for _ in range(num_pairs):
            self.blocks.extend([FrameBlock(*shape, window_size), GroupBlock(*shape)])
        self.norm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPS)
        self.gradient_checkpointing = False

    def forward(self, query: Tensor, templates: Tensor, frame: Rotary, group: Rotary) -> tuple[Tensor, Tensor]:
        """Args:
        query: (B, N, C). templates: (B, S, N + 1, C).
        frame: of one image's, or one window's, tokens. group: of the query's tokens and then the templates'.
        """
        for block in self.blocks:
            rotary = frame if isinstance(block, FrameBlock) else group
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                query, templates = self._gradient_checkpointing_func(block, query, templates, rotary)
            else:
                query, templates = block(query, templates, rotary)
        return self.norm(query), self.norm(templates)
