"""FluxLayoutAdapter: its parts, what each of its inputs does, what it refuses, what it saves."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxTransformer2DModel
from layout_samples import APART, NOT_A_BOX, OVERLAPPING, WIDTHS, see, tiny_adapter, tiny_flux, tiny_layout
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.layout_flux import FluxLayoutAdapter
from pipelines.layout_flux.adapter import AlphaPredictor

MILLION = 1_000_000


@pytest.fixture(scope="module")
def transformer():
    return tiny_flux()


class NoWaiting(TorchDispatchMode):
    """Refuses whatever would make the host wait for the device."""

    REFUSED = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "_unique", "masked_select")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.name().split("::")[1].split(".")[0] not in self.REFUSED, f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


# --- size and parts ---------------------------------------------------------------------------------


def test_the_adapter_of_the_full_network_has_the_parameters_of_the_papers():
    with torch.device("meta"):
        flux = FluxTransformer2DModel(guidance_embeds=True)
        adapter = FluxLayoutAdapter.for_transformer(flux)
    parameters = dict(adapter.named_parameters())
    sizes = {part: sum(parameters[name].numel() for name in names) for part, names in adapter.parts().items()}
    assert sizes["instance_encoder"] / MILLION == pytest.approx(28.5, abs=0.05)
    assert sizes["alpha_predictor"] / MILLION == pytest.approx(0.2, abs=0.01)
    assert sizes["layout_head"] / MILLION == pytest.approx(66.1, abs=0.05)
    unread = 2 * 2 * 3072 * 128  # two pairs of the last branch, whose tokens nobody reads
    assert (sizes["assemble_attn_lora"] + unread) / MILLION == pytest.approx(44.0, abs=0.05)
    assert sizes["modulation_head"] / MILLION == pytest.approx(69.3, abs=0.05)
    assert sizes["feedback_bridge"] / MILLION == pytest.approx(18 * 1.576, abs=0.05)
    assert list(adapter.layout_heads) == ["0", "3", "6", "9", "12", "15", "18"]
    assert list(adapter.bridges) == [str(block) for block in range(18)]


@pytest.mark.parametrize("stage", ["layout", "modulation", "bridge"])
def test_each_parameter_is_of_one_part_and_parts_that_do_not_exist_are_empty(transformer, stage):
    adapter = tiny_adapter(transformer, stage)
    named = [name for names in adapter.parts().values() for name in names]
    assert sorted(named) == sorted(name for name, _ in adapter.named_parameters())
    assert bool(adapter.parts()["modulation_head"]) == (stage != "layout")
    assert bool(adapter.parts()["feedback_bridge"]) == (stage == "bridge")


def test_only_the_parts_asked_for_train():
    adapter = tiny_adapter(tiny_flux())
    adapter.set_trainable(part for part in ("layout_head", "feedback_bridge"))
    trainable = {name for name, parameter in adapter.named_parameters() if parameter.requires_grad}
    parts = adapter.parts()
    assert trainable == {*parts["layout_head"], *parts["feedback_bridge"]}
    assert "layout_heads.0.zero_out.weight" in trainable
    assert "bridges.1.gate.strength" in trainable
    with pytest.raises(ValueError, match="this adapter has no modulation_head"):
        tiny_adapter(tiny_flux(), "layout").set_trainable(["layout_head", "modulation_head"])


def test_without_lora_there_is_none():
    adapter = tiny_adapter(tiny_flux(), lora_rank=None)
    assert not adapter.parts()["assemble_attn_lora"]


def test_lora_pairs_are_on_the_eight_projections_that_somebody_reads():
    adapter = tiny_adapter(tiny_flux())
    everything = {"to_q", "to_k", "to_v", "to_out_0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    assert set(adapter.layout_heads["0"].lora) == everything
    assert set(adapter.layout_heads["2"].lora) == everything - {"add_q_proj", "to_add_out"}
    some = tiny_adapter(tiny_flux(), lora_targets=["to_q", "to_add_out"])
    assert [list(head.lora) for head in some.layout_heads.values()] == [["to_q", "to_add_out"], ["to_q"]]
    for layer in adapter.layout_heads["0"].lora.values():
        assert isinstance(layer.down, nn.Linear)
        assert isinstance(layer.up, nn.Linear)
        assert layer.down.weight.abs().max() > 0
        assert not layer.up.weight.any()


# --- alpha ------------------------------------------------------------------------------------------


def test_alpha_is_a_half_before_training(transformer):
    alpha = see(tiny_adapter(transformer), transformer, tiny_layout(batch=2)).alpha
    assert (alpha - 0.5).abs().max() <= 1e-6


@pytest.mark.parametrize("sign", [-1, 1])
def test_alpha_stays_in_its_bounds_and_keeps_a_gradient_near_them(sign):
    predictor = AlphaPredictor(4)
    nn.init.constant_(predictor.linear_2.bias, sign * 8.0)
    alpha = predictor(torch.randn(1, 5, 4), torch.rand(1, 5), torch.zeros(1, 5, dtype=torch.long))
    assert ((alpha > 0.05) & (alpha < 0.95)).all()
    alpha.sum().backward()
    assert predictor.linear_2.bias.grad.abs() > 1e-4  # a clamp has none
    nn.init.constant_(predictor.linear_2.bias, sign * 1e4)
    alpha = predictor(torch.randn(1, 5, 4), torch.rand(1, 5), torch.zeros(1, 5, dtype=torch.long))
    assert ((alpha >= 0.05) & (alpha <= 0.95)).all()


def test_alpha_listens_to_reference_area_and_depth_and_can_be_given(transformer):
    adapter = tiny_adapter(transformer, awake=0.3)
    plain = see(adapter, transformer, tiny_layout()).alpha
    changes = {
        "clip_embeds": torch.zeros(1, 4, 10),
        "has_clip": torch.tensor([[True, False, True, True]]),
        "depth_labels": torch.full((1, 4), 2),
    }
    for name, value in changes.items():
        assert not torch.equal(see(adapter, transformer, tiny_layout(**{name: value})).alpha, plain), name
    smaller = [[x1, y1, x1 + 0.05, y1 + 0.05] for x1, y1, _, _ in OVERLAPPING]
    assert (see(adapter, transformer, tiny_layout(smaller)).alpha != plain)[0, :3].all()
    state = see(adapter, transformer, tiny_layout(alpha=torch.tensor([[0.0, 1.0, 0.25, 0.5]])))
    assert state.layout_gate.tolist() == [[2.0, 0.0, 1.5, 1.0]]
    assert state.identity_gate.tolist() == [[0.0, 2.0, 0.5, 1.0]]


def test_an_absent_clip_embedding_is_zeros_to_alpha(transformer):
    adapter, absent = tiny_adapter(transformer, awake=0.3), torch.zeros(1, 4, dtype=torch.bool)
    zeros = see(adapter, transformer, tiny_layout(clip_embeds=torch.zeros(1, 4, 10))).alpha
    assert torch.equal(see(adapter, transformer, tiny_layout(has_clip=absent)).alpha, zeros)


# --- tokens -----------------------------------------------------------------------------------------


def test_each_token_hears_its_source_its_box_and_alpha_softly(transformer):
    adapter = tiny_adapter(transformer, awake=0.3)

    def tokens(alpha, **changed):
        given = torch.full((1, 4), alpha)
        return see(adapter, transformer, tiny_layout(alpha=given, **changed)).tokens

    for k, (name, width) in enumerate({"text": 12, "clip": 10, "dino": 14}.items()):
        changed = (tokens(0.4, **{f"{name}_embeds": torch.ones(1, 4, width)}) != tokens(0.4)).flatten(0, 1)
        assert changed.any(dim=-1).any(dim=0).tolist() == [k == other for other in range(3)], name
    assert torch.equal(tokens(1.0, clip_embeds=torch.ones(1, 4, 10)), tokens(1.0))
    assert torch.equal(tokens(0.0, dino_embeds=torch.ones(1, 4, 14)), tokens(0.0))
    both = (tokens(0.5) - tokens(0.501)).flatten(0, 1).norm(dim=(0, 2))
    assert both[0] == 0
    assert (both[1:] > 0).all()
    moved = see(adapter, transformer, tiny_layout([[0.2, 0.1, 0.7, 0.7], *OVERLAPPING[1:]])).tokens
    assert (moved != see(adapter, transformer, tiny_layout()).tokens)[0, 0].any(dim=-1).all()


def test_an_absent_source_is_its_learned_vector_whatever_lies_in_its_place(transformer):
    adapter, absent = tiny_adapter(transformer, awake=0.3), torch.zeros(1, 4, dtype=torch.bool)
    for k, (name, width) in enumerate({"text": 12, "clip": 10, "dino": 14}.items()):
        rows = {f"has_{name}": absent}
        if name != "clip":  # alpha is given a CLIP embedding as well
            rows["alpha"] = torch.full((1, 4), 0.5)
        one = see(adapter, transformer, tiny_layout(**rows)).tokens
        other = see(adapter, transformer, tiny_layout(**rows, **{f"{name}_embeds": torch.ones(1, 4, width)})).tokens
        assert torch.equal(one, other), name
        present = see(adapter, transformer, tiny_layout(alpha=torch.full((1, 4), 0.5))).tokens
        assert (one != present)[:, :, k].any(), name


def test_centres_lie_between_the_tokens_in_full_precision(transformer):
    layout = tiny_layout([[0.0, 0.0, 1.0, 1.0], [0.25, 0.5, 0.5, 1.0], [0.3, 0.2, 0.35, 0.3]])
    cos, sin = see(tiny_adapter(transformer), transformer, layout).rotary
    ids = torch.tensor([[0, 3.0, 4.0], [0, 4.5, 3.0], [0, 1.5, 2.6]])  # 6 rows, 8 columns
    expected_cos, expected_sin = transformer.pos_embed(ids)
    torch.testing.assert_close(cos[0], expected_cos, atol=1e-6, rtol=0)
    torch.testing.assert_close(sin[0], expected_sin, atol=1e-6, rtol=0)
    half = see(tiny_adapter(transformer).to(torch.bfloat16), transformer, layout.to(dtype=torch.bfloat16))
    assert torch.equal(half.rotary[0], cos)
    assert half.rotary[0].dtype == torch.float32


# --- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["text", "clip", "dino"])
def test_embeddings_of_another_width_are_refused(transformer, name):
    layout = tiny_layout(**{f"{name}_embeds": torch.zeros(1, 4, 512)})
    with pytest.raises(ValueError, match=f"`{name}_embeds` must be {WIDTHS[f'{name}_embed_dim']} wide, not 512"):
        see(tiny_adapter(transformer), transformer, layout)


def test_too_many_boxes_are_refused(transformer):
    with pytest.raises(ValueError, match="`boxes` must be at most 3 in a picture, not 4"):
        see(tiny_adapter(transformer, max_refs=3), transformer, tiny_layout())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layout_double_blocks": [0, 3]}, "must ascend within 0 ... 2"),
        ({"layout_double_blocks": [2, 0]}, "must ascend"),
        ({"layout_double_blocks": "each"}, "`layout_double_blocks` must be numbers or `every <n>`"),
        ({"layout_double_blocks": "every 0"}, "`layout_double_blocks` must be numbers or `every <n>`"),
        ({"lora_targets": ["to_q", "to_z"]}, "`lora_targets` must be among .* not to_z"),
        ({"modulation_hidden": None}, "`bridge_rank` without `modulation_hidden`"),
        ({"modulation_streams": ["image", "words"]}, "`modulation_streams` must be among image, text, not words"),
    ],
)
def test_settings_that_make_no_adapter_are_refused(transformer, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_adapter(transformer, **settings)


def test_an_adapter_of_another_transformer_is_refused(transformer):
    with pytest.raises(ValueError, match="a transformer with `num_layers` 3, not 2"):
        tiny_adapter(transformer).check(tiny_flux(num_layers=2))
    with pytest.raises(ValueError, match="`num_attention_heads` 2, not 4"):
        tiny_adapter(transformer).check(tiny_flux(num_attention_heads=4))


# --- layouts without anything, files, the hot path ---------------------------------------------------


def test_padding_and_no_instances_give_finite_tokens(transformer):
    adapter = tiny_adapter(transformer, awake=0.3)
    padded = see(adapter, transformer, tiny_layout([APART[0], NOT_A_BOX, NOT_A_BOX]))
    assert padded.tokens.isfinite().all()
    assert padded.valid.tolist() == [[1, 0, 0]]
    assert not padded.covered[:, 1:].any()
    assert padded.layout_gate[0, 1:].tolist() == padded.identity_gate[0, 1:].tolist() == [0, 0]
    assert see(adapter, transformer, tiny_layout([])).tokens.shape == (1, 0, 3, 32)


@pytest.mark.parametrize("stage", ["layout", "modulation", "bridge"])
def test_saved_and_loaded_it_is_the_same(transformer, tmp_path, stage):
    adapter = tiny_adapter(transformer, stage, awake=0.2, base_model="tiny", encoders={"clip": "a", "dino": "b"})
    adapter.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (True, False):
        loaded = FluxLayoutAdapter.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
            k: v for k, v in adapter.config.items() if k[0] != "_"
        }
        assert loaded.state_dict().keys() == adapter.state_dict().keys()
        assert all(torch.equal(loaded.state_dict()[name], value) for name, value in adapter.state_dict().items())
        loaded.check(transformer)


def test_seeing_a_layout_makes_no_modules_and_never_waits_for_the_device(transformer, monkeypatch):
    adapter, layout = tiny_adapter(transformer, awake=0.2), tiny_layout([*OVERLAPPING, NOT_A_BOX], batch=2)

    def refuse(self, *args, **kwargs):
        raise AssertionError(f"a {type(self).__name__} was made")

    monkeypatch.setattr(nn.Module, "__init__", refuse)
    with NoWaiting():
        see(adapter, transformer, layout)
