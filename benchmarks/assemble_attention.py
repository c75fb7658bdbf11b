"""What the layout adapter costs in one forward, with few and with many instances, and against a plain loop over them.

All instances of a picture go through one attention; projections are made once per token of the picture. The plain loop
is the same arithmetic, one instance after another: cut its tokens out, project, attend, add. Forwards take turns, so
that a busy machine slows all of them alike; the adapter's time is a forward with it minus the one without, next to it.

    python -m benchmarks.assemble_attention [--instances 4 32] [--rounds 15] [--output FILE]
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from pydantic import Field
from torch import Tensor, nn

from backlot.command_line import parse
from backlot.config import Section
from pipelines.layout_flux.adapter import IMAGE_PROJECTIONS, TOKEN_PROJECTIONS, FluxLayoutAdapter
from pipelines.layout_flux.attachment import assemble, attach, rotate
from pipelines.layout_flux.layout import Layout, LayoutState

HEAD_DIM = 128
TEXT_TOKENS = 64
EMBED_DIM = 64  # of prompts and references; these are made elsewhere


class Settings(Section):
    instances: tuple[int, ...] = (4, 32)
    """counts that are compared; each is timed"""
    area: float = Field(0.04, gt=0, le=1)
    """of the picture, of each instance's square box"""
    grid: int = Field(32, ge=2)
    """side of the picture in image tokens"""
    width: int = Field(512, ge=HEAD_DIM, multiple_of=HEAD_DIM)
    """of the network"""
    blocks: int = Field(2, ge=1)
    """double blocks, each with a layout branch"""
    lora_rank: int = Field(16, ge=1)
    """of the branch"""
    rounds: int = Field(15, ge=1)
    """turns of each forward"""
    seed: int = Field(0, ge=0)
    """of weights and boxes"""
    output: Path | None = None
    """also write the figures and every round's times here, as JSON"""


def create_network(settings: Settings) -> tuple[FluxTransformer2DModel, FluxLayoutAdapter]:
    """A small FLUX and a whole adapter of which no part does nothing."""
    torch.manual_seed(settings.seed)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=settings.blocks,
        num_single_layers=1,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=settings.width // HEAD_DIM,
        joint_attention_dim=EMBED_DIM,
        pooled_projection_dim=EMBED_DIM,
        axes_dims_rope=(16, 56, 56),
    )
    adapter = FluxLayoutAdapter.for_transformer(
        transformer,
        layout_double_blocks="every 1",
        text_embed_dim=EMBED_DIM,
        clip_embed_dim=EMBED_DIM,
        dino_embed_dim=EMBED_DIM,
        lora_rank=settings.lora_rank,
        modulation_hidden=128,
        bridge_rank=64,
    )
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return transformer.eval(), adapter.eval()


def draw_layout(count: int, settings: Settings) -> Layout:
    """One picture with so many square boxes anywhere in it."""
    generator = np.random.default_rng(settings.seed)
    side = settings.area**0.5
    corners = generator.uniform(0, 1 - side, (1, count, 2))
    embeds = [torch.randn(1, count, EMBED_DIM) for _ in range(3)]
    present = torch.ones(1, count, dtype=torch.bool)
    return Layout(
        boxes=np.concatenate([corners, corners + side], axis=-1).astype(np.float32),
        text_embeds=embeds[0],
        clip_embeds=embeds[1],
        dino_embeds=embeds[2],
        has_text=present,
        has_clip=present,
        has_dino=present,
        valid=present,
        depth_labels=torch.zeros(1, count, dtype=torch.int64),
        phrase_spans=torch.zeros(1, count, 2, dtype=torch.int64),
    )


def assemble_one_by_one(
    block: nn.Module,
    head: nn.Module,
    hidden_states: Tensor,
    tokens: Tensor,
    temb: Tensor,
    rotary: tuple[Tensor, Tensor],
    layout: LayoutState,
) -> tuple[Tensor, Tensor]:
    """`pipelines.layout_flux.attachment.assemble` of one picture as a loop over its instances; same arguments."""
    attn = block.attn
    normed, gate, *_ = block.norm1(hidden_states, emb=temb)
    acc, changed = torch.zeros_like(hidden_states[0]), []
    for i in range(tokens.shape[1]):
        own, token_gate, shift_mlp, scale_mlp, gate_mlp = block.norm1_context(tokens[:, i], emb=temb)
        inside = layout.covered[0, i].nonzero().squeeze(1)
        patch = normed[:, inside]
        layers = [(name, getattr(attn, name)) for name in (*TOKEN_PROJECTIONS[:3], *IMAGE_PROJECTIONS[:3])]
        projected = [head.project(name, layer, own if k < 3 else patch) for k, (name, layer) in enumerate(layers)]
        projected = [x.unflatten(-1, (-1, attn.head_dim)) for x in projected]
        around = [part[:, i : i + 1] for part in layout.rotary]
        own_q, own_k = (
            rotate(attn.norm_added_q(projected[0]), *around),
            rotate(attn.norm_added_k(projected[1]), *around),
        )
        places = [part[None, inside] for part in rotary]
        query, key = rotate(attn.norm_q(projected[3]), *places), rotate(attn.norm_k(projected[4]), *places)
        pairs = ((own_q, query), (own_k, key), (projected[2], projected[5]))
        joint = [torch.cat(pair, dim=1).transpose(1, 2) for pair in pairs]
        answer = F.scaled_dot_product_attention(*joint).transpose(1, 2).flatten(2)
        share = layout.layout_gate[0, i] / layout.coverage[0, inside]
        kinds = tokens.shape[2]
        acc[inside] += share * answer[0, kinds:]
        flat = tokens[:, i] + token_gate[:, None] * head.project("to_add_out", attn.to_add_out, answer[:, :kinds])
        middle = block.norm2_context(flat) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
        changed.append(flat + gate_mlp[:, None] * block.ff_context(middle))
    covered = (layout.covered.amax(dim=1) > 0)[..., None].to(acc.dtype)
    projected = head.zero_out(head.project("to_out.0", attn.to_out[0], acc[None]))
    return hidden_states + gate[:, None] * projected * covered, torch.stack(changed, dim=1)


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@torch.inference_mode()
def measure(settings: Settings) -> dict:
    """Seconds of whole forwards and of one block's branch, by number of instances; and how far the loop is off."""
    transformer, adapter = create_network(settings)
    grid = (settings.grid, settings.grid)
    length = settings.grid**2
    places = torch.cartesian_prod(torch.zeros(1), *[torch.arange(float(settings.grid))] * 2)
    inputs = {
        "hidden_states": torch.randn(1, length, 16),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, EMBED_DIM),
        "pooled_projections": torch.randn(1, EMBED_DIM),
        "timestep": torch.tensor([0.5]),
        "img_ids": places,
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
    }
    states = {n: adapter(draw_layout(n, settings), grid, transformer.pos_embed) for n in settings.instances}
    attach(transformer, adapter)
    block, head = transformer.transformer_blocks[0], adapter.layout_heads["0"]
    common = torch.randn(1, length, settings.width), torch.randn(1, settings.width), transformer.pos_embed(places)
    calls = {"plain": lambda: transformer(**inputs)}
    differences = {}
    for n, state in states.items():
        arguments = (block, head, common[0], state.tokens, common[1], common[2], state)
        kwargs = {"joint_attention_kwargs": {"layout": state}}
        calls[f"forward_{n}"] = lambda kwargs=kwargs: transformer(**inputs, **kwargs)
        calls[f"branch_{n}"] = lambda arguments=arguments: assemble(*arguments)
        calls[f"loop_{n}"] = lambda arguments=arguments: assemble_one_by_one(*arguments)
        pairs = zip(assemble(*arguments), assemble_one_by_one(*arguments), strict=True)
        differences[n] = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    times = {name: [] for name in calls}
    for warm_up in (True, *[False] * settings.rounds):
        for name, call in calls.items():
            taken = seconds(call)
            if not warm_up:
                times[name].append(taken)
    return summarise(settings, times, differences)


def summarise(settings: Settings, times: dict[str, list[float]], differences: dict[int, float]) -> dict:
    """Medians; the adapter's time from forwards of the same round."""
    few, many = min(settings.instances), max(settings.instances)
    medians = {name: statistics.median(values) for name, values in times.items()}
    adapter = {
        n: statistics.median(a - b for a, b in zip(times[f"forward_{n}"], times["plain"], strict=True))
        for n in settings.instances
    }
    return {
        "adapter_seconds": {str(n): value for n, value in adapter.items()},
        "many_over_few": adapter[many] / adapter[few],
        "branch_many_over_few": medians[f"branch_{many}"] / medians[f"branch_{few}"],
        "loop_over_batched": {str(n): medians[f"loop_{n}"] / medians[f"branch_{n}"] for n in settings.instances},
        "largest_relative_difference": {str(n): value for n, value in differences.items()},
        "median_seconds": medians,
        "seconds": times,
        "settings": settings.model_dump(mode="json", exclude={"output"}),
        "versions": {"torch": torch.__version__},
        "load_average": os.getloadavg(),
    }


def main(argv: list[str] | None = None) -> None:
    settings = parse(Settings, argv, "python -m benchmarks.assemble_attention", __doc__)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    figures = measure(settings)
    medians = figures["median_seconds"]
    print(f"{settings.grid**2} image tokens, width {settings.width}, {settings.blocks} blocks with a layout branch")
    print(f"forward without a layout: {medians['plain']:.4f} s; medians of {settings.rounds} rounds")
    for n in settings.instances:
        print(
            f"{n:>4} instances: adapter {figures['adapter_seconds'][str(n)]:.4f} s; one branch "
            f"{medians[f'branch_{n}']:.4f} s, as a plain loop {medians[f'loop_{n}']:.4f} s "
            f"({figures['loop_over_batched'][str(n)]:.1f} times); largest relative difference "
            f"{figures['largest_relative_difference'][str(n)]:.1g}"
        )
    print(
        f"adapter time, {max(settings.instances)} / {min(settings.instances)} instances: {figures['many_over_few']:.2f}"
    )
    if settings.output:
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        settings.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
