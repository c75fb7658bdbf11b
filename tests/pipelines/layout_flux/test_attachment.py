"""The layout in the blocks of FLUX: nothing before training, then each term as its paper has it."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from layout_samples import (
    APART,
    GRID,
    NOT_A_BOX,
    OVERLAPPING,
    STAGES,
    TEXT_LENGTH,
    difference,
    flux_inputs,
    predict,
    see,
    tiny_adapter,
    tiny_flux,
    tiny_layout,
    wake,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.layout_flux import attach, detach
from pipelines.layout_flux.attachment import assemble, modulated_block, rotate
from pipelines.layout_flux.layout import covered_tokens

ZERO_OUTPUTS = ("zero_out.", "modulation_head.shared.", "modulation_head.blocks.", ".gate.")


def build(stage: str = "bridge", awake: float = 0.3, adapter_settings: dict | None = None, **flux_settings):
    transformer = tiny_flux(**flux_settings)
    adapter = tiny_adapter(transformer, stage, awake, **(adapter_settings or {}))
    attach(transformer, adapter)
    return transformer, adapter


def covered(boxes: list) -> torch.Tensor:
    """(S,) whether any box covers a token."""
    return covered_tokens(np.array([boxes], dtype=np.float32), GRID)[0].any(dim=0)


@pytest.fixture(autouse=True)
def _no_gradient():
    with torch.no_grad():
        yield


# --- before training --------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_embeds", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stage", STAGES)
def test_untrained_it_is_flux_bit_for_bit(stage, dtype, guidance_embeds):
    transformer = tiny_flux(guidance_embeds=guidance_embeds).to(dtype)
    inputs = flux_inputs(2, dtype=dtype, guidance=guidance_embeds)
    plain = predict(transformer, inputs)
    adapter = tiny_adapter(transformer, stage).to(dtype)
    attach(transformer, adapter)
    layout = tiny_layout([*OVERLAPPING, NOT_A_BOX], batch=2).to(dtype=dtype)
    assert torch.equal(predict(transformer, inputs, see(adapter, transformer, layout)), plain)
    # the same with all awake but what is 0 before training
    outputs = {name: p.clone() for name, p in adapter.named_parameters() if any(part in name for part in ZERO_OUTPUTS)}
    wake(adapter)
    adapter.load_state_dict(outputs, strict=False)
    assert torch.equal(predict(transformer, inputs, see(adapter, transformer, layout)), plain)
    assert torch.equal(predict(transformer, inputs), plain)
    wake(adapter)
    assert not torch.equal(predict(transformer, inputs, see(adapter, transformer, layout)), plain)


@pytest.mark.parametrize("stage", STAGES)
def test_untrained_in_float32_under_autocast_it_is_flux_in_bfloat16(stage):
    transformer, inputs = tiny_flux().to(torch.bfloat16), flux_inputs(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        plain = predict(transformer, inputs)
        adapter = tiny_adapter(transformer, stage)
        attach(transformer, adapter)
        assert torch.equal(predict(transformer, inputs, see(adapter, transformer, tiny_layout())), plain)
        wake(adapter)
        assert predict(transformer, inputs, see(adapter, transformer, tiny_layout())).isfinite().all()


def test_attached_and_awake_it_is_flux_without_a_layout_and_after_it_is_detached():
    transformer, inputs = tiny_flux(), flux_inputs(2)
    plain = predict(transformer, inputs)
    forwards = [type(module).forward for module in transformer.modules()]
    adapter = tiny_adapter(transformer, awake=0.3)
    attach(transformer, adapter)
    assert torch.equal(predict(transformer, inputs), plain)
    assert torch.equal(transformer(**inputs, return_dict=False)[0], plain)
    state = see(adapter, transformer, tiny_layout(batch=2))
    assert difference(predict(transformer, inputs, state), plain) > 0.01
    detach(transformer)
    assert torch.equal(predict(transformer, inputs), plain)
    assert [module.forward.__func__ for module in transformer.modules()] == forwards
    attach(transformer, adapter)


@pytest.mark.parametrize("boxes", [[], [NOT_A_BOX], [NOT_A_BOX] * 3], ids=["none", "one padded", "three padded"])
@pytest.mark.parametrize("stage", STAGES)
def test_without_a_box_it_is_flux(stage, boxes):
    transformer, adapter = build(stage)
    inputs = flux_inputs(2)
    state = see(adapter, transformer, tiny_layout(boxes, batch=2))
    assert torch.equal(predict(transformer, inputs, state), predict(transformer, inputs))


def test_both_scales_at_0_are_flux_and_each_branch_has_its_own():
    transformer, adapter = build("modulation")
    inputs, layout = flux_inputs(), tiny_layout()
    plain = predict(transformer, inputs)

    def scaled(layout_scale, identity_scale):
        state = see(adapter, transformer, layout, layout_scale=layout_scale, identity_scale=identity_scale)
        return predict(transformer, inputs, state)

    assert torch.equal(scaled(0, 0), plain)
    outputs = [scaled(1, 0), scaled(0, 1), scaled(1, 1), scaled(0.5, 1), scaled(1, 0.5), plain]
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert difference(one, other) > 1e-3
    state = see(adapter, transformer, layout)
    state.use_modulation = False
    assert torch.equal(predict(transformer, inputs, state), scaled(1, 0))
    state.use_modulation, state.use_layout = True, False
    assert torch.equal(predict(transformer, inputs, state), scaled(0, 1))
    state.use_modulation = False
    assert torch.equal(predict(transformer, inputs, state), plain)


# --- binding ----------------------------------------------------------------------------------------


def test_a_second_adapter_and_hooks_underneath_are_refused():
    transformer, adapter = build()
    with pytest.raises(ValueError, match="a forward that is not its own"):
        attach(transformer, adapter)
    detach(transformer)
    transformer.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    with pytest.raises(ValueError, match="the hooks of an offload"):
        attach(transformer, adapter)


def test_hooks_that_were_taken_off_are_not_in_the_way():
    transformer, inputs = tiny_flux(), flux_inputs()
    plain = predict(transformer, inputs)
    cpu_offload(transformer, torch.device("cpu"))
    remove_hook_from_module(transformer, recurse=True)
    transformer.forward = transformer.forward
    adapter = tiny_adapter(transformer)
    attach(transformer, adapter)
    assert torch.equal(predict(transformer, inputs, see(adapter, transformer, tiny_layout())), plain)
    detach(transformer)


def test_detaching_below_hooks_is_refused_and_changes_nothing():
    transformer, adapter = build()
    inputs, layout = flux_inputs(), tiny_layout()
    with_layout = predict(transformer, inputs, see(adapter, transformer, layout))
    transformer.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    with pytest.raises(ValueError, match="hooks on top of the adapter"):
        detach(transformer)
    assert torch.equal(predict(transformer, inputs, see(adapter, transformer, layout)), with_layout)


def test_a_copy_has_a_network_and_an_adapter_of_its_own():
    transformer, adapter = build()
    both = nn.ModuleDict({"transformer": transformer, "adapter": adapter})
    memo = {id(parameter): parameter for parameter in transformer.parameters()}  # as a trainer's average shares them
    copied, part = copy.deepcopy((both, adapter), memo)
    assert copied["adapter"] is part
    assert copied["transformer"].proj_out.weight is transformer.proj_out.weight
    mine = {id(parameter) for parameter in adapter.parameters()}
    assert not mine & {id(parameter) for parameter in part.parameters()}
    for number, block in enumerate(copied["transformer"].transformer_blocks):
        assert block.forward.module is block
        assert block.forward is copied["transformer"].forward.blocks[number]
        assert all(bound is module for bound, module in bound_parts(block.forward, part, number))
    inputs, layout = flux_inputs(), tiny_layout()
    before = predict(transformer, inputs, see(adapter, transformer, layout))
    assert torch.equal(predict(copied["transformer"], inputs, see(part, transformer, layout)), before)
    wake(part)
    state = see(adapter, transformer, layout)  # encoded alike: only what the blocks hold differs
    assert difference(predict(copied["transformer"], inputs, state), before) > 0.01
    assert torch.equal(predict(transformer, inputs, see(adapter, transformer, layout)), before)


def bound_parts(forward, adapter, number):
    """What a block's forward holds, beside what of the adapter it should be."""
    heads, bridges = dict(adapter.layout_heads.items()), dict(adapter.bridges.items())
    yield forward.head, heads.get(str(number))
    yield forward.bridge, bridges.get(str(number))
    yield forward.modulation, adapter.modulation_head
    yield forward.own_modulation, adapter.modulation_head.blocks[number]


# --- the layout branch ------------------------------------------------------------------------------


def branch(
    boxes: list = OVERLAPPING, batch: int = 1, awake: float = 0.3, lora: bool = True, place_freqs: int = 2, **changed
):
    """Arguments of `assemble`, block 0, and the adapter."""
    transformer = tiny_flux()
    adapter = tiny_adapter(transformer, "layout", awake, lora_rank=4 if lora else None, place_freqs=place_freqs)
    state = see(adapter, transformer, tiny_layout(boxes, batch, **changed))
    generator = torch.Generator().manual_seed(5)
    hidden_states = torch.randn(batch, 48, 32, generator=generator)
    temb = torch.randn(batch, 32, generator=generator)
    rotary = transformer.pos_embed(flux_inputs()["img_ids"])
    block = transformer.transformer_blocks[0]
    return block, adapter.layout_heads["0"], hidden_states, state.tokens, temb, rotary, state


def plain_loop(block, head, hidden_states, tokens, temb, pos_embed, boxes, valid, alpha):
    """Spec 3.4 instance by instance: gather, attend, weigh by g_L / c, project the sum once."""

    def project(name, layer, x):
        key = name.replace(".", "_")
        change = head.lora[key].scale * x @ head.lora[key].down.weight.T @ head.lora[key].up.weight.T
        return layer(x) + change

    def heads(x):
        return x.unflatten(-1, (2, 16))

    attn, (rows, columns) = block.attn, GRID
    out_states, out_tokens = hidden_states.clone(), tokens.clone()
    for b in range(len(hidden_states)):
        count = torch.zeros(rows * columns)
        inside = []
        for x1, y1, x2, y2 in boxes[b]:
            touched = [
                y * columns + x
                for y in range(rows)
                for x in range(columns)
                if x1 * columns < x + 1 and x2 * columns > x and y1 * rows < y + 1 and y2 * rows > y
            ]
            inside.append(torch.tensor(touched))
        for i, where in enumerate(inside):
            if valid[b, i]:
                count[where] += 1
        summed = torch.zeros(rows * columns, 32)
        for i, where in enumerate(inside):
            if not valid[b, i]:
                continue
            x, gate, *_ = block.norm1(hidden_states[b : b + 1], emb=temb[b : b + 1])
            y, c_gate, c_shift, c_scale, c_gate_mlp = block.norm1_context(tokens[b, i][None], emb=temb[b : b + 1])
            x1, y1, x2, y2 = boxes[b][i]
            image_ids = torch.stack([torch.zeros(len(where)), where // columns, where % columns], dim=-1)
            own_ids = torch.tensor([[0, rows * (y1 + y2) / 2, columns * (x1 + x2) / 2]]).expand(3, 3)
            rope = pos_embed(torch.cat([own_ids, image_ids]))
            x = x[:, where]
            query = attn.norm_added_q(heads(project("add_q_proj", attn.add_q_proj, y)))
            query = torch.cat([query, attn.norm_q(heads(project("to_q", attn.to_q, x)))], dim=1)
            key = attn.norm_added_k(heads(project("add_k_proj", attn.add_k_proj, y)))
            key = torch.cat([key, attn.norm_k(heads(project("to_k", attn.to_k, x)))], dim=1)
            value = heads(project("add_v_proj", attn.add_v_proj, y))
            value = torch.cat([value, heads(project("to_v", attn.to_v, x))], dim=1)
            query = apply_rotary_emb(query, rope, sequence_dim=1)
            key = apply_rotary_emb(key, rope, sequence_dim=1)
            if head.place is not None:
                told = head.place(plain_places(where, boxes[b][i], head.place.in_features // 4))
                for part, place in zip((query, key, value), told.split(32, dim=-1), strict=True):
                    part[:, 3:] += heads(place)
            scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / 16**0.5
            answer = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), value).flatten(2)[0]
            summed[where] += 2 * (1 - alpha[b, i]) * answer[3:] / count[where, None]
            t = tokens[b, i] + c_gate * project("to_add_out", attn.to_add_out, answer[:3])
            mlp = block.ff_context(block.norm2_context(t) * (1 + c_scale) + c_shift)
            out_tokens[b, i] = t + c_gate_mlp * mlp
        change = head.zero_out(project("to_out.0", attn.to_out[0], summed))
        out_states[b] += gate[0] * change * (count > 0)[:, None]
    return out_states, out_tokens


def plain_places(where, box, frequencies):
    """sin and cos of pi / 2, pi, 2 pi, ... times the place of each token's centre in its box."""
    (rows, columns), (x1, y1, x2, y2) = GRID, box
    features = []
    for token in where.tolist():
        x, y = (token % columns + 0.5) / columns, (token // columns + 0.5) / rows
        row = []
        for place in ((x - x1) / max(x2 - x1, 1 / max(GRID)), (y - y1) / max(y2 - y1, 1 / max(GRID))):
            angles = [place * math.pi * 2 ** (k - 1) for k in range(frequencies)]
            row += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        features.append(row)
    return torch.tensor(features)


@pytest.mark.parametrize("place_freqs", [0, 3])
@pytest.mark.parametrize("alpha", [None, [[0.1, 0.9, 0.3, 0.75, 0.5], [0.95, 0.05, 0.5, 0.6, 0.2]]])
def test_all_instances_at_once_are_a_plain_loop_over_them(alpha, place_freqs):
    boxes = [[*OVERLAPPING, [0.0, 0.9, 1.0, 1.0]], [[0.6, 0.0, 1.0, 0.3], *OVERLAPPING]]
    valid = torch.tensor([[True] * 5, [True, True, False, True, True]])
    given = {"valid": valid} | ({} if alpha is None else {"alpha": torch.tensor(alpha)})
    block, head, hidden_states, tokens, temb, rotary, state = branch(boxes, 2, place_freqs=place_freqs, **given)
    states, answers = assemble(block, head, hidden_states, tokens, temb, rotary, state)
    pos_embed = tiny_flux().pos_embed
    expected = plain_loop(block, head, hidden_states, tokens, temb, pos_embed, boxes, valid, state.alpha)
    assert len(state.groups) > 1
    assert (states - hidden_states).norm() > 0.1 * hidden_states.norm()
    torch.testing.assert_close(states, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(answers[valid], expected[1][valid], atol=1e-5, rtol=1e-5)


def test_tokens_outside_all_boxes_are_untouched_by_the_branch():
    block, head, hidden_states, tokens, temb, rotary, state = branch(APART)
    changed = assemble(block, head, hidden_states, tokens, temb, rotary, state)[0] != hidden_states
    assert torch.equal(changed.any(dim=-1)[0], covered(APART))


def test_inside_a_box_the_change_differs_from_token_to_token():
    """One vector per box would be a write, no attention (a single key); it also lowers the loss."""
    block, head, hidden_states, tokens, temb, rotary, state = branch([[0.1, 0.1, 0.9, 0.9]])
    head.zero_out.bias.zero_()
    change = (assemble(block, head, hidden_states, tokens, temb, rotary, state)[0] - hidden_states)[0]
    change = change[covered([[0.1, 0.1, 0.9, 0.9]])]
    assert (change - change.mean(dim=0)).norm() > 0.1 * change.norm()


def test_image_tokens_of_a_box_see_one_another_and_nobody_else():
    block, head, hidden_states, tokens, temb, rotary, state = branch(APART)
    before = assemble(block, head, hidden_states, tokens, temb, rotary, state)[0] - hidden_states
    nudged = hidden_states.clone()
    nudged[:, 0] += torch.randn(32)  # the first token, of the first box
    after = assemble(block, head, nudged, tokens, temb, rotary, state)[0] - nudged
    moved = (after - before)[0].norm(dim=-1) > 1e-5
    assert torch.equal(moved, covered(APART[:1]))


def test_overlaps_are_averaged_in_any_order():
    same = [[0.2, 0.2, 0.8, 0.8]]
    block, head, hidden_states, tokens, temb, rotary, one = branch(same, alpha=torch.tensor([[0.3]]))
    two = branch(same * 2, alpha=torch.tensor([[0.3, 0.3]]))[-1]
    single = assemble(block, head, hidden_states, tokens, temb, rotary, one)[0]
    doubled = assemble(block, head, hidden_states, tokens.repeat(1, 2, 1, 1), temb, rotary, two)[0]
    torch.testing.assert_close(doubled, single, atol=1e-5, rtol=1e-5)

    transformer, adapter = build()
    inputs, layout, order = flux_inputs(), tiny_layout(), [2, 0, 3, 1]
    shuffled = layout._map(lambda x: x[:, order], lambda boxes: boxes[:, order])
    straight = predict(transformer, inputs, see(adapter, transformer, layout))
    mixed = predict(transformer, inputs, see(adapter, transformer, shuffled))
    assert difference(mixed, straight) < 1e-5


def test_padding_changes_nothing_and_a_batch_is_its_pictures():
    transformer, adapter = build()
    inputs = flux_inputs(3)
    alone = predict(transformer, inputs, see(adapter, transformer, tiny_layout(batch=3)))
    padded = tiny_layout([*OVERLAPPING, NOT_A_BOX, NOT_A_BOX], batch=3, seed=9)
    small = tiny_layout(batch=3)
    for name in ("text_embeds", "clip_embeds", "dino_embeds", "depth_labels", "phrase_spans"):
        getattr(padded, name)[:, :4] = getattr(small, name)
    answer = predict(transformer, inputs, see(adapter, transformer, padded))
    assert answer.isfinite().all()
    assert difference(answer, alone) < 1e-5

    mixed = [OVERLAPPING, [APART[0], NOT_A_BOX, APART[1], NOT_A_BOX], [NOT_A_BOX] * 4]
    layout = tiny_layout(mixed)
    together = predict(transformer, inputs, see(adapter, transformer, layout))
    for k in range(3):
        picture = slice(k, k + 1)
        one = layout._map(lambda x: x[picture], lambda boxes: boxes[picture])  # noqa: B023
        row = {name: x[picture] if name not in ("img_ids", "txt_ids") else x for name, x in inputs.items()}
        assert difference(predict(transformer, row, see(adapter, transformer, one)), together[picture]) < 1e-5


def test_an_invalid_instance_with_a_box_takes_no_part():
    """Dropped in training: it must neither write nor take a share of an overlap."""
    transformer, adapter = build()
    inputs, layout = flux_inputs(), tiny_layout()
    layout.valid = torch.tensor([[True, False, True, False]])
    kept = tiny_layout()._map(lambda x: x[:, ::2], lambda boxes: boxes[:, ::2])
    expected = predict(transformer, inputs, see(adapter, transformer, kept))
    assert difference(predict(transformer, inputs, see(adapter, transformer, layout)), expected) < 1e-5


@pytest.mark.parametrize(
    "box", [[0, 0, 1, 1], [0.5, 0.5, 0.5001, 0.5001], [0.99, 0, 1, 1], [0, 0.99, 1, 1], [1 - 1e-6, 1 - 1e-6, 1, 1]]
)
def test_boxes_tiny_full_and_at_the_border(box):
    transformer, adapter = build()
    inputs = flux_inputs()
    answer = predict(transformer, inputs, see(adapter, transformer, tiny_layout([box])))
    assert answer.isfinite().all()
    assert difference(answer, predict(transformer, inputs)) > 1e-3


def test_lora_acts_in_the_branch_only():
    transformer, adapter = build("modulation")
    inputs, layout = flux_inputs(), tiny_layout()
    without = {scale: outputs_of(transformer, adapter, inputs, layout, scale) for scale in (0, 1)}
    for head in adapter.layout_heads.values():
        wake(head.lora)
    assert torch.equal(outputs_of(transformer, adapter, inputs, layout, 0), without[0])
    assert difference(outputs_of(transformer, adapter, inputs, layout, 1), without[1]) > 1e-3


def outputs_of(transformer, adapter, inputs, layout, layout_scale):
    return predict(transformer, inputs, see(adapter, transformer, layout, layout_scale=layout_scale))


def test_rotation_is_fluxs_own():
    x, ids = torch.randn(2, 48, 2, 16), flux_inputs()["img_ids"]
    cos, sin = tiny_flux().pos_embed(ids)
    assert torch.equal(rotate(x, cos[None], sin[None]), apply_rotary_emb(x, (cos, sin), sequence_dim=1))


# --- modulation -------------------------------------------------------------------------------------


def modulated(change: torch.Tensor, boxes: list, streams=("image", "text"), dtype=torch.float32, **changed):
    """Block 1 by `modulated_block` and what it was given: hidden states, text, temb, rotary."""
    transformer = tiny_flux().to(dtype)
    adapter = tiny_adapter(transformer, "modulation").to(dtype)
    layout = tiny_layout(boxes, phrase_spans=changed.pop("phrase_spans", torch.zeros(1, len(boxes), 2).long()))
    state = see(adapter, transformer, layout.to(dtype=dtype))
    generator = torch.Generator().manual_seed(6)
    image, text, temb = (torch.randn(1, *shape, generator=generator).to(dtype) for shape in ((48, 32), (7, 32), (32,)))
    ids = torch.cat([torch.zeros(TEXT_LENGTH, 3), flux_inputs()["img_ids"]])
    given = (image, text, temb, transformer.pos_embed(ids))
    block = transformer.transformer_blocks[1]
    return block, given, modulated_block(block, *given, {}, state, change.to(dtype), list(streams))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_change_of_0_is_fluxs_block_exactly(dtype):
    block, given, (text, image) = modulated(torch.zeros(1, 4, 32), OVERLAPPING, dtype=dtype)
    expected_text, expected_image = block(*given)
    assert torch.equal(text, expected_text)
    assert torch.equal(image, expected_image)


def test_the_same_change_everywhere_is_fluxs_block_at_another_time():
    """Pins the order of the six modulations, of attention and of feed-forward, in both streams."""
    change = torch.randn(1, 1, 32)
    spans = torch.tensor([[[0, TEXT_LENGTH]]])
    block, (image, text, temb, rotary), ours = modulated(change, [[0, 0, 1, 1]], phrase_spans=spans)
    expected = block(image, text, temb + change[:, 0], rotary)
    still = block(image, text, temb, rotary)
    for answer, target, before in zip(ours, expected, still, strict=True):
        assert difference(answer, target) < 1e-5
        assert difference(answer, before) > 0.01
    # two instances that ask for the same share the picture
    twice = modulated(change.expand(1, 2, 32), [[0, 0, 1, 1]] * 2, phrase_spans=spans.expand(1, 2, 2))[2]
    assert all(difference(answer, target) < 1e-5 for answer, target in zip(twice, expected, strict=True))


def test_a_change_reaches_the_tokens_of_its_box_and_phrase_and_no_others():
    """By the modulation of the feed-forward alone, which mixes no tokens."""
    change, spans = torch.randn(1, 2, 32), torch.tensor([[[1, 3], [0, 0]]])
    for streams in (("image",), ("text",), ("image", "text")):
        transformer = tiny_flux()
        block = transformer.transformer_blocks[1]
        for norm in (block.norm1, block.norm1_context):
            norm.linear.weight.view(6, 32, 32)[:3].zero_()  # attention is modulated by the bias alone
        state = see(tiny_adapter(transformer), transformer, tiny_layout(APART, phrase_spans=spans))
        image, text, temb = torch.randn(1, 48, 32), torch.randn(1, 7, 32), torch.randn(1, 32)
        rotary = transformer.pos_embed(torch.cat([torch.zeros(7, 3), flux_inputs()["img_ids"]]))
        words, picture = modulated_block(block, image, text, temb, rotary, {}, state, change, list(streams))
        still_words, still_picture = block(image, text, temb, rotary)
        moved = (picture != still_picture)[0].any(dim=-1)
        assert torch.equal(moved, covered(APART) & ("image" in streams))
        spoken = (words != still_words)[0].any(dim=-1).tolist()
        assert spoken == [("text" in streams) and 1 <= k < 3 for k in range(7)]


def test_identity_reaches_the_picture_through_the_modulation():
    transformer, adapter = build("modulation")
    inputs = flux_inputs()
    alpha = torch.full((1, 4), 0.5)
    one = predict(transformer, inputs, see(adapter, transformer, tiny_layout(alpha=alpha), layout_scale=0))
    other = tiny_layout(alpha=alpha, dino_embeds=torch.ones(1, 4, 14))
    assert difference(predict(transformer, inputs, see(adapter, transformer, other, layout_scale=0)), one) > 1e-3
    clip = tiny_layout(alpha=alpha, clip_embeds=torch.ones(1, 4, 10))
    assert torch.equal(predict(transformer, inputs, see(adapter, transformer, clip, layout_scale=0)), one)


def test_float16_text_stays_in_range():
    transformer, adapter = build("bridge", awake=0.1)
    transformer.to(torch.float16)
    adapter.to(torch.float16)
    for block in transformer.transformer_blocks:
        block.ff_context.net[2].bias.fill_(6e4)
        block.norm1_context.linear.bias.view(6, 32)[5].fill_(30)  # its gate
    inputs, layout = flux_inputs(dtype=torch.float16), tiny_layout().to(dtype=torch.float16)
    assert predict(transformer, inputs).isfinite().all()
    assert predict(transformer, inputs, see(adapter, transformer, layout)).isfinite().all()


def test_float16_means_of_large_tokens_stay_in_range():
    transformer, adapter = build("bridge", awake=0.1)
    block = transformer.transformer_blocks[0].to(torch.float16)
    state = see(adapter.to(torch.float16), transformer, tiny_layout([[0, 0, 1, 1]]).to(dtype=torch.float16))
    hidden_states = torch.full((1, 48, 32), 3e3, dtype=torch.float16) + torch.randn(32)
    tokens, offset = block.forward._feed_back(
        hidden_states.half(), state.tokens, torch.zeros_like(state.tokens[:, :, 0]), state
    )
    assert tokens.isfinite().all()
    assert offset.isfinite().all()


# --- the bridge -------------------------------------------------------------------------------------


def test_an_open_gate_changes_the_picture_and_has_a_magnitude():
    transformer, adapter = build()
    inputs, layout = flux_inputs(), tiny_layout()
    state = see(adapter, transformer, layout)
    assert state.feedback_magnitude() is None
    on = predict(transformer, inputs, state)
    magnitude = state.feedback_magnitude()
    assert len(state.feedback) == 2  # the last block has no bridge
    assert magnitude > 0
    off = predict(transformer, inputs, see(adapter, transformer, layout, feedback=False))
    assert difference(on, off) > 1e-3
    for bridge in adapter.bridges.values():
        bridge.gate.strength.zero_()
    closed = see(adapter, transformer, layout)
    assert torch.equal(predict(transformer, inputs, closed), off)
    assert closed.feedback_magnitude() == 0
    closed.use_modulation = False
    predict(transformer, inputs, closed)
    assert closed.feedback_magnitude() is None  # that of the last forward


@pytest.mark.parametrize("part", ["tokens", "offset"])
def test_the_bridge_acts_on_tokens_and_on_the_next_modulation(part):
    transformer, adapter = build(adapter_settings={"layout_double_blocks": [1]})
    inputs = flux_inputs()
    state = see(adapter, transformer, tiny_layout())
    state.use_layout = part == "tokens"  # with the branch off only the offset is left, and the other way round
    if part == "tokens":
        adapter.modulation_head.trunk.weight.zero_()
    on = predict(transformer, inputs, state)
    state.use_feedback = False
    assert difference(predict(transformer, inputs, state), on) > 1e-4


def test_the_bridges_terms():
    transformer, adapter = build("bridge")
    layout = tiny_layout([*APART, NOT_A_BOX], alpha=torch.tensor([[0.3, 0.8, 0.5]]))
    state = see(adapter, transformer, layout)
    forward = transformer.transformer_blocks[1].forward
    hidden_states, offset = torch.randn(1, 48, 32), torch.randn(1, 3, 32)
    tokens, moved = forward._feed_back(hidden_states, state.tokens, offset, state)
    bridge = adapter.bridges["1"]
    for k, alpha in enumerate((0.3, 0.8)):
        seen = hidden_states[0, covered([APART[k]])].mean(dim=0)
        hidden = F.silu(bridge.down(F.layer_norm(seen, (32,))))
        added = bridge.gate.strength.tanh() * bridge.up(hidden) * alpha
        torch.testing.assert_close(moved[0, k], offset[0, k] + added, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(tokens[0, k], state.tokens[0, k] + added, atol=1e-5, rtol=1e-5)
    assert torch.equal(moved[0, 2], offset[0, 2])
    ratios = (tokens - state.tokens)[0, :2, 0].norm(dim=-1) / state.tokens[0, :2].norm(dim=-1).mean(dim=-1)
    torch.testing.assert_close(forward.feedback, ratios.mean())


# --- layout guidance --------------------------------------------------------------------------------


def test_layout_guidance_goes_beyond_the_difference_that_the_layout_makes():
    transformer, adapter = build()
    inputs = flux_inputs()
    plain = predict(transformer, inputs)
    state = see(adapter, transformer, tiny_layout())
    with_layout = predict(transformer, inputs, state)
    state.guidance_scale = 2.5
    guided = predict(transformer, inputs, state)
    torch.testing.assert_close(guided, plain + 2.5 * (with_layout - plain))
    kwargs = {"layout": state}
    assert torch.equal(transformer(**inputs, joint_attention_kwargs=kwargs, return_dict=False)[0], guided)
    assert kwargs == {"layout": state}


# --- beside what else people attach -----------------------------------------------------------------


def with_ip_adapter(transformer):
    torch.manual_seed(7)
    for block in transformer.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(32, 10, num_tokens=(4,), scale=0.7))
    return {"ip_hidden_states": [torch.randn(1, 4, 10)]}


def test_an_ip_adapters_pictures_are_added_as_by_flux(caplog):
    transformer, inputs = tiny_flux(), flux_inputs()
    plain = predict(transformer, inputs)
    pictures = with_ip_adapter(transformer)
    expected = predict(transformer, inputs, **pictures)
    assert difference(expected, plain) > 1e-3
    adapter = tiny_adapter(transformer)
    attach(transformer, adapter)
    assert torch.equal(predict(transformer, inputs, **pictures), expected)
    assert torch.equal(predict(transformer, inputs, see(adapter, transformer, tiny_layout()), **pictures), expected)
    wake(adapter)
    state = see(adapter, transformer, tiny_layout())
    assert difference(predict(transformer, inputs, state, **pictures), expected) > 1e-3
    assert "not expected" not in caplog.text


@pytest.mark.parametrize("stage", STAGES)
def test_fused_projections_give_the_same(stage):
    transformer, adapter = build(stage)
    inputs, layout = flux_inputs(), tiny_layout()
    expected = predict(transformer, inputs, see(adapter, transformer, layout))
    transformer.fuse_qkv_projections()
    assert transformer.transformer_blocks[0].attn.fused_projections
    for block in transformer.transformer_blocks:  # proof that the fused ones are used
        block.attn.to_q.weight.zero_()
        block.attn.add_k_proj.weight.zero_()
    assert difference(predict(transformer, inputs, see(adapter, transformer, layout)), expected) < 1e-5


def test_a_users_lora_keeps_its_effect_and_works_beside_ours():
    peft = pytest.importorskip("peft")
    transformer, adapter = build("modulation", awake=0)
    inputs, layout = flux_inputs(), tiny_layout()
    plain = predict(transformer, inputs)
    names = ["attn.to_q", "attn.to_out.0", "attn.add_k_proj", "attn.to_add_out", "norm1.linear", "ff.net.2"]
    transformer.add_adapter(peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False), "style")
    styled = predict(transformer, inputs)
    assert difference(styled, plain) > 0.01
    assert torch.equal(predict(transformer, inputs, see(adapter, transformer, layout)), styled)
    wake(adapter, 0.3)
    both = predict(transformer, inputs, see(adapter, transformer, layout))
    assert difference(both, styled) > 0.01
    transformer.disable_adapters()
    ours = predict(transformer, inputs, see(adapter, transformer, layout))
    assert difference(both, ours) > 0.01
    transformer.enable_adapters()
    assert torch.equal(predict(transformer, inputs, see(adapter, transformer, layout)), both)
    detach(transformer)
    assert torch.equal(predict(transformer, inputs), styled)


def test_layerwise_casting_of_both():
    transformer, adapter = build()
    inputs, layout = flux_inputs(), tiny_layout()
    expected = predict(transformer, inputs, see(adapter, transformer, layout))
    for model in (transformer, adapter):
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert adapter.layout_heads["0"].zero_out.weight.dtype == torch.float8_e4m3fn
    assert transformer.transformer_blocks[0].attn.to_q.weight.dtype == torch.float8_e4m3fn
    plain = predict(transformer, inputs)
    answer = predict(transformer, inputs, see(adapter, transformer, layout))
    assert difference(answer, expected) < 0.2
    assert difference(answer, plain) > 0.01


@pytest.mark.parametrize("stage", STAGES)
def test_sequential_offload_gives_the_same(stage):
    transformer, adapter = build(stage)
    inputs, layout = flux_inputs(), tiny_layout()
    expected = predict(transformer, inputs, see(adapter, transformer, layout))
    for model in (transformer, adapter):
        cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    assert transformer.transformer_blocks[0].attn.to_q.weight.device.type == "meta"
    assert torch.equal(predict(transformer, inputs, see(adapter, transformer, layout)), expected)


@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
def test_group_offload_gives_the_same(level, tmp_path):
    """Weights lie on disk while they are not in use: those that nobody fetched would be blank."""
    transformer, adapter = build()
    inputs, layout = flux_inputs(), tiny_layout()
    expected = predict(transformer, inputs, see(adapter, transformer, layout))
    blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
    place = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
    transformer.enable_group_offload(
        **place, offload_type=level, offload_to_disk_path=str(tmp_path / "transformer"), **blocks
    )
    adapter.enable_group_offload(**place, offload_type="leaf_level", offload_to_disk_path=str(tmp_path / "adapter"))
    assert difference(predict(transformer, inputs, see(adapter, transformer, layout)), expected) < 1e-5


# --- the hot path -----------------------------------------------------------------------------------


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        assert name not in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "_unique", "masked_select")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("stage", STAGES)
def test_a_forward_makes_no_modules_and_never_waits_for_the_device(stage, monkeypatch):
    transformer, adapter = build(stage)
    state, inputs = see(adapter, transformer, tiny_layout([*OVERLAPPING, NOT_A_BOX], batch=2)), flux_inputs(2)
    modules = len([*transformer.modules(), *adapter.modules()])
    init = nn.Module.__init__

    def refuse(self, *args, **kwargs):
        raise AssertionError(f"a {type(self).__name__} was made")

    monkeypatch.setattr(nn.Module, "__init__", refuse)
    with NoWaiting():
        predict(transformer, inputs, state)
    monkeypatch.setattr(nn.Module, "__init__", init)
    assert len([*transformer.modules(), *adapter.modules()]) == modules


@pytest.mark.slow
def test_compiled_blocks_give_the_same_and_blocks_alike_are_compiled_once():
    transformer, adapter = build(num_layers=9, num_single_layers=1)  # layout in 0, 2, 4, 6, 8
    inputs, layout = flux_inputs(), tiny_layout()
    expected = predict(transformer, inputs, see(adapter, transformer, layout))
    torch._dynamo.reset()
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    transformer.compile_repeated_blocks(backend=count)
    for _ in range(2):
        state = see(adapter, transformer, layout)
        assert difference(predict(transformer, inputs, state), expected) < 1e-5
        assert len(state.feedback) == 8
    assert len(graphs) <= 5  # the first, with and without a branch, the last; the single block
