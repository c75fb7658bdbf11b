"""How a layout acts in the blocks of FLUX: their forwards are replaced while an adapter is attached.

The blocks run through their own `__call__`, so hooks (sharding, offloading, compilation, checkpointing) stay in force.
What changes from block to block, the instance tokens and the bridge's offset, travels behind the text tokens; what
does not is a `LayoutState`, given as `joint_attention_kwargs={"layout": state}`. Without it all is as before.
"""

from __future__ import annotations

from types import MethodType

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from pipelines.layout_flux.adapter import SOURCES, FluxLayoutAdapter, LayoutHead
from pipelines.layout_flux.layout import LayoutState, TokenGroup


def attach(transformer: FluxTransformer2DModel, adapter: FluxLayoutAdapter) -> None:
    """Bind the layout-aware forwards to a transformer and its blocks.

    Raises:
        ValueError: the adapter does not fit, another one is attached, or hooks are in the way.
    """
    adapter.check(transformer)
    if not all(has_own_forward(module) for module in bound_modules(transformer)):
        raise ValueError("`transformer` has a forward that is not its own: an adapter, or the hooks of an offload")
    forwards = [LayoutBlockForward(block, adapter, n) for n, block in enumerate(transformer.transformer_blocks)]
    transformer.forward = LayoutForward(transformer, forwards)
    for block, forward in zip(transformer.transformer_blocks, forwards, strict=True):
        block.forward = forward
    for block in transformer.single_transformer_blocks:
        block.forward = PlainBlockForward(block)


def detach(transformer: FluxTransformer2DModel) -> None:
    """Give a transformer its own forwards back.

    Raises:
        ValueError: hooks that came after the adapter would be lost.
    """
    modules = bound_modules(transformer)
    if not all(has_own_forward(module) or isinstance(module.forward, BoundForward) for module in modules):
        raise ValueError("`transformer` has hooks on top of the adapter: take those of the offload off first")
    for module in modules:
        vars(module).pop("forward", None)


def bound_modules(transformer: FluxTransformer2DModel) -> tuple[nn.Module, ...]:
    return transformer, *transformer.transformer_blocks, *transformer.single_transformer_blocks


def has_own_forward(module: nn.Module) -> bool:
    """Whether it is the one of its class, be it as an attribute, which hooks that were taken off leave behind."""
    return module.forward == MethodType(type(module).forward, module)


def split_layout(kwargs: dict | None) -> tuple[dict, LayoutState | None]:
    """Joint attention arguments without the layout, and the layout."""
    kwargs = kwargs or {}
    return {name: value for name, value in kwargs.items() if name != "layout"}, kwargs.get("layout")


class BoundForward:
    """A forward that takes the place of a module's own."""

    def __init__(self, module: nn.Module):
        self.module = module

    def stock(self, *args, **kwargs):
        return type(self.module).forward(self.module, *args, **kwargs)


class LayoutForward(BoundForward):
    """Of the transformer: with layout guidance it runs twice, and goes from the one without the layout further."""

    def __init__(self, module: nn.Module, blocks: list[LayoutBlockForward]):
        super().__init__(module)
        self.blocks = blocks

    def __call__(self, *args, joint_attention_kwargs: dict | None = None, return_dict: bool = True, **kwargs):
        others, layout = split_layout(joint_attention_kwargs)
        if layout is None or not layout.tokens.shape[1] or not (layout.use_layout or layout.use_modulation):
            joint_attention_kwargs = joint_attention_kwargs and others
            return self.stock(*args, joint_attention_kwargs=joint_attention_kwargs, return_dict=return_dict, **kwargs)
        layout.needs_gradient = torch.is_grad_enabled()
        if layout.guidance_scale == 1 or not layout.use_layout:
            given = joint_attention_kwargs
            output = self.stock(*args, joint_attention_kwargs=given, return_dict=return_dict, **kwargs)
            layout.feedback = self._take_feedback()
            return output
        without = self.stock(*args, joint_attention_kwargs=dict(others), return_dict=True, **kwargs)
        output = self.stock(*args, joint_attention_kwargs=joint_attention_kwargs, return_dict=True, **kwargs)
        layout.feedback = self._take_feedback()
        output.sample = without.sample + layout.guidance_scale * (output.sample - without.sample)
        return output if return_dict else (output.sample,)

    def _take_feedback(self) -> list[Tensor]:
        taken = [block.feedback for block in self.blocks if block.feedback is not None]
        for block in self.blocks:
            block.feedback = None
        return taken


class PlainBlockForward(BoundForward):
    """Of a single block: it knows nothing of layouts."""

    def __call__(
        self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None
    ) -> tuple[Tensor, Tensor]:
        others, _ = split_layout(joint_attention_kwargs)
        return self.stock(hidden_states, encoder_hidden_states, temb, image_rotary_emb, others)


class LayoutBlockForward(BoundForward):
    """Of a double block: FLUX's block with modulation, then the layout branch, then the bridge.

    It keeps no number of its own and writes into nothing shared, so that blocks alike are compiled once.
    """

    def __init__(self, module: nn.Module, adapter: FluxLayoutAdapter, number: int):
        super().__init__(module)
        self.is_first, self.is_last = number == 0, number == adapter.config.num_blocks - 1
        self.head = dict(adapter.layout_heads.items()).get(str(number))
        self.bridge = dict(adapter.bridges.items()).get(str(number))
        self.modulation, self.streams = adapter.modulation_head, adapter.config.modulation_streams
        self.own_modulation = None if self.modulation is None else self.modulation.blocks[number]
        self.has_offset = len(adapter.bridges) > 0
        self.feedback: Tensor | None = None  # until the transformer takes it

    def __call__(
        self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None
    ) -> tuple[Tensor, Tensor]:
        others, layout = split_layout(joint_attention_kwargs)
        if layout is None:
            return self.stock(hidden_states, encoder_hidden_states, temb, image_rotary_emb, others)
        if layout.needs_gradient and not torch.is_grad_enabled():
            raise RuntimeError("reentrant checkpointing gives the adapter no gradient: use `use_reentrant=False`")
        self.feedback = None  # of a block that was run again, too
        text, tokens, offset = self._unpack(encoder_hidden_states, layout)
        if layout.use_modulation and self.modulation is not None:
            change = self.modulation(layout.tokens, self.own_modulation, offset) * layout.identity_gate[..., None]
            text, hidden_states = modulated_block(
                self.module, hidden_states, text, temb, image_rotary_emb, others, layout, change, self.streams
            )
        else:
            text, hidden_states = self.stock(hidden_states, text, temb, image_rotary_emb, others)
        if layout.use_layout and self.head is not None:
            rotary = tuple(part[text.shape[1] :] for part in image_rotary_emb)
            hidden_states, tokens = assemble(self.module, self.head, hidden_states, tokens, temb, rotary, layout)
        if layout.use_modulation and layout.use_feedback and self.bridge is not None:
            tokens, offset = self._feed_back(hidden_states, tokens, offset, layout)
        if self.is_last:
            return text, hidden_states
        parts = [text, tokens.flatten(1, 2).to(text.dtype)] + ([offset.to(text.dtype)] if self.has_offset else [])
        return torch.cat(parts, dim=1), hidden_states

    def _unpack(self, states: Tensor, layout: LayoutState) -> tuple[Tensor, Tensor, Tensor | None]:
        """Text tokens, instance tokens (B, N, 3, D) and the bridge's offset (B, N, D), if there is a bridge."""
        if self.is_first:
            offset = torch.zeros_like(layout.tokens[:, :, 0]) if self.has_offset else None
            return states, layout.tokens, offset
        number = layout.tokens.shape[1]
        carried = number * (len(SOURCES) + self.has_offset)
        text, tokens, offset = states.split(
            [states.shape[1] - carried, number * len(SOURCES), number * self.has_offset], dim=1
        )
        return text, tokens.unflatten(1, (number, len(SOURCES))), offset if self.has_offset else None

    def _feed_back(self, hidden_states: Tensor, tokens: Tensor, offset: Tensor, layout: LayoutState):
        share = layout.covered / layout.covered.sum(dim=-1, keepdim=True).clamp(min=1)
        seen = share.to(hidden_states.dtype) @ hidden_states  # shares first: a sum may leave the range of float16
        added = self.bridge(seen) * (layout.alpha.detach() * layout.valid)[..., None].to(seen.dtype)
        with torch.no_grad():
            ratio = added.float().norm(dim=-1) / tokens.float().norm(dim=-1).mean(dim=-1).clamp(min=1e-6)
            self.feedback = (ratio * layout.valid).sum() / layout.valid.sum().clamp(min=1)
        return tokens + added[:, :, None], offset + added


# ---- modulation ----


def modulated_block(
    block: nn.Module,
    hidden_states: Tensor,
    text: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor],
    kwargs: dict,
    layout: LayoutState,
    change: Tensor,
    streams: list[str],
) -> tuple[Tensor, Tensor]:
    """FLUX's double block with its six modulations moved token by token, by what covers the token.

    Args:
        change: (B, N, D) of the time embedding, per instance.
        streams: which of `image` and `text` feel it.
    """
    image_change = text_change = None
    if "image" in streams:
        image_change = _changes(block.norm1, temb, change, layout.covered.transpose(1, 2) / layout.coverage)
    if "text" in streams:
        text_change = _changes(block.norm1_context, temb, change, phrase_weights(layout, text.shape[1]))
    image = _Stream(block.norm1, block.norm2, block.ff, hidden_states, temb, image_change)
    words = _Stream(block.norm1_context, block.norm2_context, block.ff_context, text, temb, text_change)
    attended, words_attended, *from_pictures = block.attn(
        hidden_states=image.normed, encoder_hidden_states=words.normed, image_rotary_emb=image_rotary_emb, **kwargs
    )
    hidden_states = image.finish(attended)
    if from_pictures:  # an IP-Adapter's
        hidden_states = hidden_states + from_pictures[0]
    text = words.finish(words_attended)
    return within_range(text), hidden_states


def within_range(states: Tensor) -> Tensor:
    """What FLUX does to its text tokens after a block."""
    return states.clip(-65504, 65504) if states.dtype == torch.float16 else states


class _Stream:
    """One of a double block's two streams: FLUX's own arithmetic, in its order, with changes that may be 0."""

    def __init__(self, norm1, norm2, ff, states: Tensor, temb: Tensor, changes: tuple[Tensor, ...] | None):
        self.norm2, self.ff, self.states, self.changes = norm2, ff, states, changes
        self.normed, *modulation = norm1(states, emb=temb)
        self.gate_msa, self.shift_mlp, self.scale_mlp, self.gate_mlp = (part[:, None] for part in modulation)
        if changes is not None:
            shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = changes
            self.normed = self.normed + norm1.norm(states) * scale_msa + shift_msa
            self.gate_msa, self.shift_mlp = self.gate_msa + gate_msa, self.shift_mlp + shift_mlp
            self.scale_mlp, self.gate_mlp = self.scale_mlp + scale_mlp, self.gate_mlp + gate_mlp

    def finish(self, attended: Tensor) -> Tensor:
        states = self.states + self.gate_msa * attended
        normed = self.norm2(states) * (1 + self.scale_mlp) + self.shift_mlp
        return states + self.gate_mlp * self.ff(normed)


def _changes(norm: nn.Module, temb: Tensor, change: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """Changes of the six modulations at each token, (B, T, D) each: what instances ask for, by their weights (B, T, N).

    The difference of two calls of the same layer on the same shape: exactly 0 where nothing is asked for.
    """
    temb = temb[:, None].expand_as(change)
    asked = norm.linear(norm.silu(temb + change.to(temb.dtype))) - norm.linear(norm.silu(temb))
    return (weights.to(asked.dtype) @ asked).chunk(6, dim=-1)


def phrase_weights(layout: LayoutState, length: int) -> Tensor:
    """(B, T, N): the share that instances have in a token of the prompt, by their phrases."""
    position = torch.arange(length, device=layout.phrase_spans.device)[:, None]
    start, end = layout.phrase_spans[:, None, :, 0], layout.phrase_spans[:, None, :, 1]
    inside = ((position >= start) & (position < end)) * layout.valid[:, None]
    return inside / inside.sum(dim=-1, keepdim=True).clamp(min=1)


# ---- layout ----


def assemble(
    block: nn.Module,
    head: LayoutHead,
    hidden_states: Tensor,
    tokens: Tensor,
    temb: Tensor,
    rotary: tuple[Tensor, Tensor],
    layout: LayoutState,
) -> tuple[Tensor, Tensor]:
    """Each instance's tokens and the image tokens in its box attend to one another; the results are averaged.

    All instances at once: projections once per token, attention per group of like sizes, one projection back.
    Assemble-Attn, InstanceAssemble (arXiv 2509.16691); without its second feed-forward of the image tokens, which
    would change an untrained network.

    Args:
        hidden_states: image tokens (B, S, D). tokens: instance tokens (B, N, 3, D). temb: (B, D).
        rotary: of the image tokens, (S, d) each.
    """
    batch, number, kinds, width = tokens.shape
    attn, tokens = block.attn, tokens.to(hidden_states.dtype)
    normed, gate, *_ = block.norm1(hidden_states, emb=temb)
    normed_tokens, token_gate, shift_mlp, scale_mlp, gate_mlp = block.norm1_context(tokens.flatten(1, 2), emb=temb)
    image = _project(head, attn, normed, ("to_q", "to_k", "to_v"), (attn.norm_q, attn.norm_k))
    added = (attn.norm_added_q, attn.norm_added_k)
    instance = _project(head, attn, normed_tokens, ("add_q_proj", "add_k_proj", "add_v_proj"), added)
    image = [rotate(x, rotary[0][None], rotary[1][None]) for x in image[:2]] + image[2:]
    around = [part.repeat_interleave(kinds, dim=1) for part in layout.rotary]
    instance = [rotate(x, *around) for x in instance[:2]] + instance[2:]

    image = [x.flatten(0, 1) for x in image]  # (B S, heads, d)
    instance = [x.unflatten(1, (number, kinds)).flatten(0, 1) for x in instance]  # (B N, 3, heads, d)
    share = (layout.layout_gate[:, :, None] * layout.covered / layout.coverage.squeeze(-1)[:, None]).float()
    share = share.flatten(0, 1)  # (B N, S)
    assembled = torch.zeros(batch * layout.num_tokens, width, dtype=torch.float32, device=hidden_states.device)
    answers = torch.zeros(batch * number, kinds, width, dtype=hidden_states.dtype, device=hidden_states.device)
    for group in layout.groups:
        attended = _attend(group, image, instance, head.place)
        strength = share[group.instances[:, None], group.tokens % layout.num_tokens][..., None]
        if group.inside is not None:
            strength = strength * group.inside[..., None]
        weighted = strength * attended[:, kinds:].float()
        assembled = assembled.index_add(0, group.tokens.flatten(), weighted.flatten(0, 1))
        answers = answers.index_copy(0, group.instances, attended[:, :kinds].to(answers.dtype))

    assembled = assembled.view(batch, -1, width).to(hidden_states.dtype)
    covered = (layout.covered.amax(dim=1) > 0)[..., None].to(hidden_states.dtype)  # biases stay inside the boxes
    projected = head.zero_out(head.project("to_out.0", attn.to_out[0], assembled))
    hidden_states = hidden_states + gate[:, None] * projected * covered

    answers = head.project("to_add_out", attn.to_add_out, answers.view(batch, number * kinds, width))
    flat = tokens.flatten(1, 2) + token_gate[:, None] * answers
    normed_tokens = block.norm2_context(flat) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
    flat = flat + gate_mlp[:, None] * block.ff_context(normed_tokens)
    return hidden_states, within_range(flat).unflatten(1, (number, kinds))


def _project(head: LayoutHead, attn: nn.Module, x: Tensor, names: tuple[str, ...], norms) -> list[Tensor]:
    """Queries, keys and values (B, T, heads, d), queries and keys normalised."""
    if attn.fused_projections:
        fused = attn.to_qkv if names[0] == "to_q" else attn.to_added_qkv
        projected = [head.change(name, part, x) for name, part in zip(names, fused(x).chunk(3, dim=-1), strict=True)]
    else:
        projected = [head.project(name, getattr(attn, name), x) for name in names]
    query, key, value = (part.unflatten(-1, (-1, attn.head_dim)) for part in projected)
    return [norms[0](query), norms[1](key), value]


def _attend(group: TokenGroup, image: list[Tensor], instance: list[Tensor], place: nn.Module | None) -> Tensor:
    """Joint attention within each instance of a group -> (G, 3 + L, D), the instance's own tokens first."""
    inside = [part[group.tokens] for part in image]
    if place is not None:  # a token in two boxes has a place in each
        places = place(group.places.to(inside[0].dtype)).chunk(3, dim=-1)
        inside = [part + told.view_as(part).to(part.dtype) for part, told in zip(inside, places, strict=True)]
    query, key, value = (
        torch.cat([own[group.instances], cut], dim=1) for own, cut in zip(instance, inside, strict=True)
    )
    mask = None
    if group.inside is not None:
        mask = F.pad(group.inside, (instance[0].shape[1], 0), value=True)[:, None, None]
    value = value.to(query.dtype)
    return dispatch_attention_fn(query, key, value, attn_mask=mask, backend="native").flatten(2, 3)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, pairs interleaved: x (B, T, heads, d) by cos, sin (B or 1, T, d)."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return (x.float() * cos[:, :, None] + turned.float() * sin[:, :, None]).to(x.dtype)
