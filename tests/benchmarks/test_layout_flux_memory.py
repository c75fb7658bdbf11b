"""Memory and FLOPs without storage: the figures of a small network are those of the same network computed for real."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import layout_flux_memory as memory

TINY = memory.Networks(
    transformer={
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 1,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (8, 12, 12),
        "guidance_embeds": True,
    },
    adapter={
        "text_embed_dim": 16,
        "clip_embed_dim": 16,
        "dino_embed_dim": 32,
        "lora_rank": 4,
        "modulation_hidden": 16,
        "bridge_rank": 8,
    },
    decoder={
        "latent_channels": 4,
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
    },
    dino={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14},
    text_tokens=16,
    crop_side=56,
)
CASE = memory.Case(stage=2, resolution=32, batch_size=1, objects=2, max_refs=3)


@pytest.fixture(scope="module")
def result():
    return memory.measure(TINY, CASE)


def test_figures_are_those_of_a_real_update(result):
    real = memory.measure(TINY, CASE, fake=False)
    assert result["flops"] == real["flops"]
    assert result["peak_bytes"] == pytest.approx(real["peak_bytes"], rel=0.03)


def test_each_part_holds_what_its_parameters_say(result):
    held, numbers = result["peak_bytes"], result["parameters"]
    adapter = sum(numbers["adapter"].values())
    assert numbers["adapter"]["feedback_bridge"] == 0 < numbers["adapter"]["modulation_head"]
    assert numbers["trained"] == adapter
    assert held["parameters"] == pytest.approx(2 * numbers["base"] + 4 * (adapter + numbers["identity"]), rel=0.01)
    assert held["gradients"] == 4 * numbers["trained"]
    assert held["optimizer"] == pytest.approx(8 * numbers["trained"], rel=0.01)
    assert held["total"] == sum(size for part, size in held.items() if part != "total")


def test_checkpointing_trades_memory_for_a_second_forward_pass(result):
    without = memory.measure(TINY, CASE._replace(gradient_checkpointing=False), fake=False)
    assert result["peak_bytes"]["activations"] < 0.6 * without["peak_bytes"]["activations"]
    assert 1.2 < result["flops"]["total"] / without["flops"]["total"] < 1.6
    assert result["flops"]["forward"] == without["flops"]["forward"]


def test_flops_are_those_of_torch():
    layer, x = torch.nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8, requires_grad=True)
    linear = torch.nn.Linear(6, 5)
    with FlopCounterMode(display=False) as theirs, memory.Flops() as ours:
        linear(layer(x)).sum().backward()
    assert ours.total == theirs.get_total_flops() > 0
    query = torch.randn(1, 2, 7, 8, requires_grad=True)
    with memory.Flops() as ours:
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert ours.total == 2 * (2 * 2 * 7 * 7 * 8)


@pytest.mark.parametrize("stage", [1, 3])
def test_the_other_stages_run_with_the_parts_it_has(stage):
    result = memory.measure(TINY, CASE._replace(stage=stage), fake=False)
    adapter = result["parameters"]["adapter"]
    assert result["parameters"]["trained"] == sum(adapter[part] for part in memory.STAGE_PARTS[stage])
