"""LayoutFlux as a trainer sees it: packing, which parts learn when, checkpointing, independent copies."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.utils.checkpoint
from diffusers import FluxPipeline
from layout_samples import (
    GRID,
    OVERLAPPING,
    TEXT_LENGTH,
    difference,
    tiny_adapter,
    tiny_flux,
    tiny_layout,
    wake,
)

from pipelines.layout_flux import LayoutFlux

BASIC = ["alpha_predictor", "instance_encoder", "layout_head", "assemble_attn_lora"]
TRAINED = {"layout": BASIC, "modulation": [*BASIC, "modulation_head"], "bridge": ["feedback_bridge"]}


def build(stage: str, guidance_embeds: bool = True, **changed) -> LayoutFlux:
    """With the weights that the stage before it leaves behind: what trains here for the first time is untrained."""
    transformer = tiny_flux(guidance_embeds=guidance_embeds)
    adapter = tiny_adapter(transformer, stage, **changed)
    fresh = {"layout": BASIC, "modulation": ["modulation_head"], "bridge": ["feedback_bridge"]}[stage]
    untrained = {name: value.clone() for name, value in adapter.state_dict().items()}
    wake(adapter, 0.1)
    names = [name for part in fresh for name in adapter.parts()[part]]
    adapter.load_state_dict({name: untrained[name] for name in names}, strict=False)
    adapter.set_trainable(TRAINED[stage])
    return LayoutFlux(transformer, adapter)


def inputs(batch: int = 2, seed: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = GRID
    return {
        "noisy_latents": torch.randn(batch, 4, 2 * rows, 2 * columns, generator=generator),
        "sigmas": torch.linspace(0.9, 0.2, batch),
        "prompt_embeds": torch.randn(batch, TEXT_LENGTH, 20, generator=generator),
        "pooled_prompt_embeds": torch.randn(batch, 12, generator=generator),
    }


def some_references(batch: int = 2):
    """A layout in which each source is absent here and there, so that the vectors in their places learn too."""
    layout = tiny_layout([*OVERLAPPING, [0.6, 0.0, 1.0, 0.4]], batch)
    layout.has_text, layout.has_clip, layout.has_dino = (layout.valid.clone() for _ in range(3))
    for k, present in enumerate((layout.has_text, layout.has_clip, layout.has_dino)):
        present[:, k] = False
    return layout


def loss_of(model: LayoutFlux, layout=None, seed: int = 4) -> torch.Tensor:
    velocity = model(**inputs(seed=seed), layout=some_references() if layout is None else layout).velocity
    target = torch.randn(velocity.shape, generator=torch.Generator().manual_seed(seed + 1))
    return (velocity - target).square().mean()


def gradients(model: LayoutFlux) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.adapter.named_parameters() if p.grad is not None}


# --- the network ------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_embeds", [True, False])
@torch.no_grad()
def test_it_packs_times_and_places_as_fluxs_pipeline_does(guidance_embeds):
    model, given = build("layout", guidance_embeds), inputs()
    rows, columns = GRID
    ids = FluxPipeline._prepare_latent_image_ids(2, rows, columns, "cpu", torch.float32)
    assert ids.shape == (48, 3)
    assert ids[-1].tolist() == [0, rows - 1, columns - 1]
    expected = model.transformer(
        hidden_states=FluxPipeline._pack_latents(given["noisy_latents"], 2, 4, 2 * rows, 2 * columns),
        timestep=given["sigmas"],
        guidance=torch.tensor([3.5, 3.5]) if guidance_embeds else None,
        pooled_projections=given["pooled_prompt_embeds"],
        encoder_hidden_states=given["prompt_embeds"],
        txt_ids=torch.zeros(TEXT_LENGTH, 3),
        img_ids=ids,
    ).sample
    expected = FluxPipeline._unpack_latents(expected, 16 * rows, 16 * columns, 8)
    output = model(**given, guidance_scale=3.5)
    assert torch.equal(output.velocity, expected)
    assert output.alpha is None
    assert output.feedback_magnitude is None
    assert torch.equal(LayoutFlux(tiny_flux(guidance_embeds=guidance_embeds))(**given, guidance_scale=3.5)[0], expected)
    other = model(**given, guidance_scale=1.0).velocity
    assert torch.equal(other, expected) != guidance_embeds


def test_positions_are_whole_numbers_in_float32_also_in_bfloat16():
    model, seen = build("layout").to(torch.bfloat16), []
    model.transformer.pos_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    given = {name: value.to(torch.bfloat16) for name, value in inputs().items()}
    model(**given, layout=some_references().to(dtype=torch.bfloat16))
    centres, ids = seen
    assert centres.dtype == ids.dtype == torch.float32
    assert not ids[:TEXT_LENGTH].any()


@torch.no_grad()
def test_without_modulation_the_boxes_are_left():
    model = build("bridge")
    wake(model.adapter, 0.3)
    full = model(**inputs(), layout=some_references())
    boxes_only = model(**inputs(), layout=some_references(), use_modulation=False)
    assert full.alpha.shape == (2, 5)
    assert full.feedback_magnitude > 0
    assert boxes_only.feedback_magnitude is None
    assert difference(full.velocity, boxes_only.velocity) > 1e-3
    for part in model.adapter.parts()["modulation_head"] + model.adapter.parts()["feedback_bridge"]:
        model.adapter.get_parameter(part).fill_(torch.nan)  # not evaluated
    assert torch.equal(model(**inputs(), layout=some_references(), use_modulation=False).velocity, boxes_only.velocity)


# --- learning ---------------------------------------------------------------------------------------

# What of a stage has a gradient at the first backward, and what only at the second and the third.
FIRST = {
    "layout": ["zero_out."],
    "modulation": [
        "zero_out.",
        ".place.",
        "modulation_head.shared.",
        "modulation_head.blocks.",
        ".up.",
        ".down.",
        "encoder.",
        "alpha",
    ],
    "bridge": [".gate."],
}
SECOND = {
    "layout": ["instance_encoder.", ".place.", ".up.", "alpha_predictor.linear_2."],
    "modulation": ["modulation_head.trunk."],
    "bridge": [".down.", ".up."],
}


@pytest.mark.parametrize("stage", TRAINED)
def test_every_part_of_a_stage_learns_in_its_order_and_nothing_else_moves(stage):
    model = build(stage)
    named = dict(model.named_parameters())
    trainable = {f"adapter.{name}" for part in TRAINED[stage] for name in model.adapter.parts()[part]}
    assert {name for name, parameter in named.items() if parameter.requires_grad} == trainable
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    optimizer = torch.optim.Adam([named[name] for name in sorted(trainable)], lr=1e-2, eps=1e-20)
    reached = {}
    for number in range(1, 4):
        optimizer.zero_grad()
        loss_of(model, seed=number).backward()
        for name in sorted(trainable):
            assert named[name].grad is not None, f"{name} is not used"
            if named[name].grad.any():
                reached.setdefault(name, number)
        assert not [name for name in named if name not in trainable and named[name].grad is not None]
        optimizer.step()
    assert reached.keys() == trainable
    for name, number in reached.items():
        expected = 1 if any(part in name for part in FIRST[stage]) else 2
        expected = expected if expected == 1 or any(part in name for part in SECOND[stage]) else 3
        assert number == expected, name
    for name in named:
        assert torch.equal(named[name], before[name]) != (name in trainable), name


def test_queries_keys_and_values_of_the_branch_all_have_a_gradient():
    model = build("layout")
    wake(model.adapter, 0.1)
    loss_of(model).backward()
    for number, head in model.adapter.layout_heads.items():
        for name, pair in head.lora.items():
            assert pair.up.weight.grad.norm() > 0, (number, name)


def test_alpha_keeps_a_finite_gradient_from_both_branches():
    model = build("modulation")
    wake(model.adapter, 0.1)
    for use_modulation in (True, False):
        model.zero_grad()
        model(**inputs(), layout=some_references(), use_modulation=use_modulation).velocity.square().mean().backward()
        gradient = model.adapter.alpha_predictor.linear_1.weight.grad
        assert gradient.isfinite().all()
        assert gradient.norm() > 0


def test_a_layout_without_boxes_still_reaches_every_parameter_so_that_no_process_waits():
    model = build("modulation")
    loss_of(model, tiny_layout([[0.0, 0.0, 0.0, 0.0]] * 3, batch=2)).backward()
    assert not [name for name, p in model.adapter.named_parameters() if p.requires_grad and p.grad is None]


# --- gradient checkpointing -------------------------------------------------------------------------


@pytest.mark.parametrize("stage", TRAINED)
def test_checkpointing_changes_no_gradient(stage):
    model = build(stage)
    wake(model.adapter, 0.1)
    loss_of(model).backward()
    expected = gradients(model)
    model.zero_grad()
    model.enable_gradient_checkpointing()
    assert model.transformer.gradient_checkpointing
    calls = count_calls(model.transformer.transformer_blocks[1])
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):  # run again to the end
        loss_of(model).backward()
    assert len(calls) == 2  # one forward, one again
    assert gradients(model).keys() == expected.keys()
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(model).items())
    output = model(**inputs(), layout=some_references(), use_modulation=False)
    assert output.feedback_magnitude is None  # nothing is left over from what was run again


def count_calls(module) -> list:
    calls = []
    module.register_forward_pre_hook(lambda module, args: calls.append(1))
    return calls


@pytest.mark.parametrize("stage", TRAINED)
def test_checkpointing_with_two_forwards_before_one_backward(stage):
    """As with an unmodulated pass beside the ordinary one."""

    def backward(model):
        model.zero_grad()
        with torch.no_grad():
            still = model(**inputs(), layout=some_references(), use_modulation=False).velocity
        one = model(**inputs(), layout=some_references()).velocity
        other = model(**inputs(seed=8), layout=tiny_layout(batch=2)).velocity
        ((one - still).square().mean() + other.square().mean()).backward()
        return gradients(model)

    model = build(stage)
    wake(model.adapter, 0.1)
    expected = backward(model)
    model.enable_gradient_checkpointing()
    again = backward(model)
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], gradient) for name, gradient in expected.items())


def test_reentrant_checkpointing_is_refused():
    """It would give an adapter on a frozen network no gradient, and say nothing."""
    model = build("layout")
    reentrant = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=True)
    model.transformer.enable_gradient_checkpointing(reentrant)
    with pytest.raises(RuntimeError, match="reentrant checkpointing gives the adapter no gradient"):
        loss_of(model)


def test_a_dropout_of_lora_is_the_same_when_it_is_run_again():
    model = build("layout", lora_dropout=0.5)
    wake(model.adapter, 0.1)
    model.train()
    torch.manual_seed(0)
    loss_of(model).backward()
    expected = gradients(model)
    model.zero_grad()
    model.enable_gradient_checkpointing()
    torch.manual_seed(0)
    loss_of(model).backward()
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(model).items())


# --- copies -----------------------------------------------------------------------------------------


def test_an_averaged_copy_learns_and_answers_on_its_own():
    model = build("bridge")
    wake(model.adapter, 0.1)
    memo = {id(parameter): parameter for parameter in model.transformer.parameters()}
    copied, part = copy.deepcopy((model, model.adapter), memo)
    assert copied.adapter is part
    assert not {id(p) for p in part.parameters()} & {id(p) for p in model.adapter.parameters()}
    with torch.no_grad():
        before = model(**inputs(), layout=some_references()).velocity
        assert torch.equal(copied(**inputs(), layout=some_references()).velocity, before)
        wake(part, 0.2)
        assert difference(copied(**inputs(), layout=some_references()).velocity, before) > 1e-3
        assert torch.equal(model(**inputs(), layout=some_references()).velocity, before)
    loss_of(copied).backward()
    assert not gradients(model)
    assert gradients(copied)
