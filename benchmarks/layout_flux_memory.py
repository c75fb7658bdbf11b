"""Memory and FLOPs of an update of each stage of layout training on the real FLUX.1-dev, on a machine that has neither.

The real networks (transformer of 11.9 B parameters, adapter, tiny decoder, DINOv2-L) run through a forward pass, a
backward pass and AdamW with tensors that have a shape and no storage (FakeTensorMode): in the steady state, that is
with gradients of an earlier micro-batch and the optimiser's moments there. What is counted is what tensors hold, by
part, when they hold most; an allocator's fragments, CUDA's own memory and NCCL's buffers come on top, 2 to 4 GB.

    python -m benchmarks.layout_flux_memory [--stages 1 2 3] [--resolution 512 1024] [--batch_size 1 2 4]
        [--gradient_checkpointing true false] [--output FILE]
"""

from __future__ import annotations

import contextlib
import itertools
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, FluxTransformer2DModel
from pydantic import Field
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import Dinov2Config, Dinov2Model
from transformers.initialization import no_init_weights

from backlot.command_line import parse
from backlot.config import Section
from backlot.crops import crop_window, cut, latent_window, standardise
from pipelines.layout_flux import FluxLayoutAdapter, Layout, LayoutFlux

GIB = 2**30
STAGE_PARTS = {
    1: ("alpha_predictor", "instance_encoder", "layout_head", "assemble_attn_lora"),
    2: ("alpha_predictor", "instance_encoder", "layout_head", "assemble_attn_lora", "modulation_head"),
    3: ("feedback_bridge",),
}
ABSENT = {1: {"modulation_hidden": None, "bridge_rank": None}, 2: {"bridge_rank": None}, 3: {}}
"""Parts that no stage up to this one has: arguments of the adapter."""
CROPS_PER_IMAGE, CROPS, MARGIN = 2, 4, 4
"""Of the identity loss: crops of a picture, of a micro-batch; latent cells decoded around one."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALLEST_SIDE, LARGEST_SIDE = 0.2, 0.5
"""Of boxes: an eighth of the picture on average."""


class Networks(NamedTuple):
    """Arguments of the four networks, and what is not in them."""

    transformer: dict
    adapter: dict
    decoder: dict
    dino: dict
    text_tokens: int = 512
    crop_side: int = 224


FLUX_DEV = Networks(
    transformer={"guidance_embeds": True},
    adapter={"text_embed_dim": 768, "clip_embed_dim": 768, "dino_embed_dim": 1024},
    decoder={"latent_channels": 16},
    dino={"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 518, "patch_size": 14},
)


class Case(NamedTuple):
    """One micro-batch of one stage; `objects` of `max_refs` places in a picture are taken."""

    stage: int
    resolution: int
    batch_size: int
    gradient_checkpointing: bool = True
    objects: int = 8
    max_refs: int = 50


class Settings(Section):
    resolution: tuple[Annotated[int, Field(gt=0, multiple_of=16)], ...] = (1024,)
    """sides of the pictures in pixels"""
    batch_size: tuple[Annotated[int, Field(gt=0)], ...] = (2,)
    """pictures in a micro-batch"""
    stages: tuple[Annotated[int, Field(ge=1, le=3)], ...] = (1, 2, 3)
    gradient_checkpointing: tuple[bool, ...] = (True,)
    """`true false` for with and without"""
    gradient_accumulation_steps: int = Field(4, ge=1)
    """micro-batches in an update"""
    objects: int = Field(8, ge=1)
    """in a picture"""
    max_refs: int = Field(50, ge=1)
    """places for them, those left empty included"""
    tflops: float = Field(400.0, gt=0)
    """what a card reaches, in 1e12 floating-point operations per second, for the times"""
    output: Path | None = None
    """also write all figures to this JSON file"""


class Flops(TorchDispatchMode):
    """Floating-point operations of matrix products, convolutions and attention.

    By torch's formulas; torch's own counter keeps activations alive by its hooks, and knows CUDA's attention alone.
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output, kwargs, operation = func(*args, **(kwargs or {})), kwargs or {}, func._overloadpacket
        if operation is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.total += sdpa_flop_count(*(x.shape for x in args[:3]))
        elif operation is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.total += sdpa_backward_flop_count(*(x.shape for x in args[:4]))
        elif operation in flop_registry:
            self.total += flop_registry[operation](*args, **kwargs, out_val=output)
        return output


class Memory(MemTracker):
    """Of networks with frozen parameters, whose gradients nobody can hook; those that train have theirs before.

    Peaks of single modules, for which each operation would look at each of a thousand modules, are left out.
    """

    def _update_peak_stats(self, peak_state: object) -> None:
        for device, held in self._curr_mem_snap.items():
            if held["Total"] > self._peak_mem.get(device, 0):
                self._peak_mem[device], self._peak_mem_snap[device] = held["Total"], dict(held)

    def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = True) -> tuple[int, int]:
        return super()._track_module_params_and_buffers(module, install_grad_hooks=False)


@contextlib.contextmanager
def created_in(dtype: torch.dtype) -> Iterator[None]:
    """Networks made inside have weights of this type: tensors without storage cannot be converted in place."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class StageLoss(nn.Module):
    """The loss of a stage as one module: flow matching, alpha's prior and, from stage 2 on, DINO identity of crops."""

    def __init__(self, networks: Networks, case: Case):
        super().__init__()
        with created_in(torch.bfloat16):
            transformer = FluxTransformer2DModel(**networks.transformer).requires_grad_(False)
        adapter = FluxLayoutAdapter.for_transformer(
            transformer, max_refs=case.max_refs, **(networks.adapter | ABSENT[case.stage])
        )
        adapter.set_trainable(STAGE_PARTS[case.stage])
        self.model = LayoutFlux(transformer, adapter)
        if case.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        for part in self.model.modules():
            if isinstance(part, nn.LayerNorm):  # CUDA's autocast computes them in float32, the CPU's does not
                part.register_forward_pre_hook(lambda part, given: (given[0].float(),))
        self.decoder, self.dino, self.crop_side = None, None, networks.crop_side
        if case.stage > 1:
            self.decoder = AutoencoderTiny(**networks.decoder).decoder.requires_grad_(False)
            with no_init_weights():  # drawing them looks at values
                self.dino = Dinov2Model(Dinov2Config(**networks.dino)).requires_grad_(False)
        self.factor = 2 ** (len(AutoencoderTiny(**networks.decoder).config.decoder_block_out_channels) - 1)

    def forward(self, batch: dict, layout: Layout) -> Tensor:
        latents, noise = torch.zeros_like(batch["noisy_latents"]), batch["noisy_latents"]
        with torch.autocast("cpu", torch.bfloat16):
            output = self.model(**batch, layout=layout)
        velocity, alpha = output.velocity.float(), output.alpha.float()
        loss = (velocity - (noise - latents)).square().mean()
        loss = loss - (layout.valid * (0.75 * alpha.log() + 0.25 * (1 - alpha).log())).mean()
        if self.dino is None:
            return loss
        clean = noise - batch["sigmas"][:, None, None, None] * velocity
        return loss + 10 * (1 - F.cosine_similarity(*self._compare(clean, layout))).mean()

    def _compare(self, clean: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Embeddings of generated crops and of their references, (K, F) each; in float32, as the trainer does."""
        pairs = itertools.product(range(len(clean)), range(min(CROPS_PER_IMAGE, layout.boxes.shape[1])))
        chosen = list(pairs)[:CROPS]
        crops = torch.stack([self._crop(clean[picture], layout.boxes[picture, number]) for picture, number in chosen])
        seen = self.dino(pixel_values=standardise(crops, IMAGENET_MEAN, IMAGENET_STD)).pooler_output
        return seen, torch.stack([layout.dino_embeds[place] for place in chosen])

    def _crop(self, latents: Tensor, box: np.ndarray) -> Tensor:
        height, width = latents.shape[-2:]
        window = crop_window(box, height * self.factor, width * self.factor)
        cells = latent_window(window, self.factor, MARGIN, height, width)
        decoded = self.decoder(cells.of(latents)[None])[0]
        return cut(decoded, window.within(cells, self.factor), self.crop_side)


def create_batch(module: StageLoss, networks: Networks, case: Case) -> tuple[dict, Layout]:
    """A micro-batch as the data set and the trainer make it: boxes on the host, the rest wherever tensors are."""
    base, adapter = module.model.transformer.config, module.model.adapter.config
    number, places, side = case.batch_size, case.max_refs, case.resolution // module.factor
    rng = np.random.default_rng(0)
    sides = rng.uniform(SMALLEST_SIDE, LARGEST_SIDE, (number, case.objects, 2))
    corners = rng.uniform(0, 1 - sides)
    boxes = np.zeros((number, places, 4), np.float32)
    boxes[:, : case.objects] = np.concatenate([corners, corners + sides], axis=-1)
    valid = torch.arange(places).expand(number, places) < case.objects
    embeds = {
        f"{name}_embeds": torch.randn(number, places, adapter[f"{name}_embed_dim"]) for name in ("text", "clip", "dino")
    }
    spans = torch.arange(places)[None, :, None].expand(number, places, 2) + torch.tensor([0, 1])
    layout = Layout(
        boxes=boxes,
        **embeds,
        **dict.fromkeys(("has_text", "has_clip", "has_dino", "valid"), valid),
        depth_labels=torch.zeros(number, places, dtype=torch.int64),
        phrase_spans=spans,
    )
    batch = {
        "noisy_latents": torch.randn(number, base.in_channels // 4, side, side),
        "sigmas": torch.full((number,), 0.4),
        "prompt_embeds": torch.randn(number, networks.text_tokens, base.joint_attention_dim, dtype=torch.bfloat16),
        "pooled_prompt_embeds": torch.randn(number, base.pooled_projection_dim, dtype=torch.bfloat16),
    }
    return batch, layout


def numbers_of(module: StageLoss) -> dict:
    """Parameters of the base, of the adapter by part, of what trains, and of what the identity loss looks with."""
    adapter = module.model.adapter
    sizes = {name: parameter.numel() for name, parameter in adapter.named_parameters()}
    lookers = [part for part in (module.decoder, module.dino) if part is not None]
    return {
        "base": sum(parameter.numel() for parameter in module.model.transformer.parameters()),
        "adapter": {part: sum(sizes[name] for name in names) for part, names in adapter.parts().items()},
        "trained": sum(parameter.numel() for parameter in adapter.parameters() if parameter.requires_grad),
        "identity": sum(parameter.numel() for looker in lookers for parameter in looker.parameters()),
    }


def measure(networks: Networks, case: Case, fake: bool = True) -> dict:
    """One update: parameters, bytes by part at the peak, and FLOPs of forward, recomputation and backward.

    Args:
        fake: False computes it for real, which only small networks are for.
    """
    began = time.perf_counter()
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext():
        torch.manual_seed(0)
        module = StageLoss(networks, case)
        batch, layout = create_batch(module, networks, case)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, 1e-4, fused=True)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        tracker = Memory()
        tracker.track_external(module, optimizer, *batch.values())
        counter = Flops()
        with tracker, counter:
            loss = module(batch, layout)
            forward_flops = counter.total
            loss.backward()
            flops = counter.total
            nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
            optimizer.step()
        (held,) = tracker.get_tracker_snapshot("peak").values()
        parts = {getattr(part, "value", part): size for part, size in held.items()}
        return {
            **case._asdict(),
            "parameters": numbers_of(module),
            "peak_bytes": {
                "total": parts["Total"],
                "parameters": parts["Parameter"] + parts["Buffer"],
                "gradients": parts["Gradient"],
                "optimizer": parts["Optstate"],
                "activations": parts["Activation"] + parts["Temp"],
                "batch": parts["Other"],
            },
            "flops": {"total": flops, "forward": forward_flops},
            "seconds_to_measure": time.perf_counter() - began,
        }


def row(result: dict, settings: Settings) -> str:
    """One line of the table."""
    peak, flops = (result[name] for name in ("peak_bytes", "flops"))
    update = flops["total"] * settings.gradient_accumulation_steps
    memory = [f"{peak[part] / GIB:.1f}" for part in ("parameters", "gradients", "optimizer", "activations", "total")]
    work = [f"{flops['total'] / 1e12:.0f}", f"{update / 1e12:.0f}", f"{update / 1e12 / settings.tflops:.2f}"]
    case = [result["stage"], result["resolution"], result["batch_size"]]
    cells = [*case, "yes" if result["gradient_checkpointing"] else "no", *memory, *work]
    return "| " + " | ".join(map(str, cells)) + " |"


def main(argv: list[str] | None = None) -> None:
    settings = parse(Settings, argv, "python -m benchmarks.layout_flux_memory", __doc__)
    torch.set_num_threads(1)
    columns = ["stage", "px", "batch", "checkpointing", "parameters", "gradients", "AdamW", "activations", "peak GiB"]
    columns += ["TFLOP", "TFLOP per update", "s per update"]
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    results = []
    choices = settings.gradient_checkpointing, settings.resolution, settings.stages, settings.batch_size
    for checkpointing, resolution, stage, batch_size in itertools.product(*choices):
        case = Case(stage, resolution, batch_size, checkpointing, settings.objects, settings.max_refs)
        results.append(measure(FLUX_DEV, case))
        print(row(results[-1], settings), flush=True)
    if settings.output:
        versions = {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__}
        figures = {
            "settings": settings.model_dump(mode="json", exclude={"output"}),
            "versions": versions,
            "results": results,
        }
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        settings.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
