"""The program of test_sharding.py: many runs in one launch of two processes, sharded or not.

accelerate launch --config_file <FSDP2> two_shards.py FOLDER   data are in FOLDER/data; what each rank found goes to
                                                               FOLDER/rank-<rank>.json
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import runs
import torch
import torch.distributed as dist
from accelerate.state import PartialState
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from flow_samples import Flows
from layout_data import locations
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor

from trainers import train_layout_flux
from trainers.common import TrainingRun, create_accelerator
from trainers.common.config import RunConfig

SYSTEMS = ("shortcut", "shortcut_scene", "shadow_sdxl", "shape_vae", "layout_flux")
CONFIGS = {"layout_flux": "tiny_stage2"}
IN_LESS = {"shortcut_scene": "bf16", "shadow_sdxl": "fp16", "layout_flux": "bf16"}
VALIDATED = {"shortcut": 3, "layout_flux": 6}
OVERFLOWS = 5
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")


# ---- one process group, many runs ----


def open_as(kind: str, run_dir: Path, dataset=None, network: Callable = lambda: (None, None), **training):
    """A resumed TrainingRun: `sharded`, whole (`ddp`), or of this process `alone`. `network()` -> (model, trained)."""
    runs.reset_accelerate()
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    if kind == "sharded":
        os.environ["ACCELERATE_USE_FSDP"] = "true"
    model, trained = network()
    defaults = {"train_batch_size": 4, "logging_steps": 1, "checkpoints_total_limit": None}
    if trained is None:
        return runs.open_run(run_dir, dataset or Flows(), model, **defaults | training)
    values = {"output_dir": run_dir, "max_train_steps": 4, "report_to": []} | defaults | training
    config = RunConfig(training=values)
    run = TrainingRun(create_accelerator(config), config, model=model, dataset=dataset or Flows(), trained=trained)
    run.resume()
    return run


def command(kind: str, system: str, run_dir: Path, *others: str, **training) -> None:
    """The script itself."""
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    if kind == "sharded":
        os.environ["ACCELERATE_USE_FSDP"] = "true"
    runs.train(run_dir, *others, system=system, **{"name": CONFIGS.get(system, "tiny")} | training)


def on_first(function: Callable, *arguments) -> None:
    """Called by rank 0, while the other waits."""
    if dist.get_rank() == 0:
        function(*arguments)
    dist.barrier()


def branch_off(straight: Path, broken: Path, step: int) -> None:
    """A copy of a run as it was when it had been stopped after `step`."""
    shutil.copytree(straight, broken)
    for checkpoint in broken.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)


def code_of(function: Callable[[], None]) -> int:
    try:
        function()
    except SystemExit as end:
        return end.code
    return 0


# ---- what is in files and in memory ----


def stored(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Whole tensors of a checkpoint, put together from the files of all processes."""
    pieces: dict[str, list] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            where = json.loads(file.metadata()["rows"])
            for name in file.keys():  # noqa: SIM118 (not a dict)
                part = path.stem.split("-")[0]
                pieces.setdefault(f"{part}/{name}", []).append((where[name], file.get_tensor(name)))
    whole = {}
    for name, shares in pieces.items():
        shares.sort(key=lambda share: share[0][0])
        whole[name] = torch.cat([tensor for _, tensor in shares]) if shares[0][1].ndim else shares[0][1]
        assert len(shares) == 1 or len(whole[name]) == shares[0][0][1], name
    return whole


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def live(run: TrainingRun) -> dict[str, torch.Tensor]:
    """Weights, averages and moments of what trains, whole; called by all processes."""
    names = {id(parameter): name for name, parameter in run.trained.named_parameters()}
    found = {f"model/{name}": value for name, value in run.trained.named_parameters()}
    found |= {f"ema/{name}": value for name, value in run.ema.tensors().items()}
    for parameter, state in run.optimizer.state.items():
        found |= {f"optimizer/{names[id(parameter)]}/{key}": value for key, value in state.items()}
    return {name: gathered(value) for name, value in found.items()}


def digest(tensors: dict[str, torch.Tensor], *parts: str) -> str:
    kept = sorted(name for name in tensors if name.split("/")[0] in parts or not parts)
    return hashlib.sha256(b"".join(tensors[name].float().numpy().tobytes() for name in kept)).hexdigest()


# ---- 1: the scripts ----


def data_of(folder: Path) -> dict[str, list[str]]:
    return {
        "shortcut": [],
        "shortcut_scene": [f"--data.data_root={folder / 'data/scenes'}"],
        "shadow_sdxl": [f"--data.path={folder / 'data/shadows'}", f"--data.validation_path={folder / 'data/others'}"],
        "shape_vae": [f"--data.path={folder / 'data/shapes'}"],
        "layout_flux": [
            *locations(folder / "data/layouts", folder / "layout_flux/base"),
            f"--init_from={folder / 'layout_flux/stage1'}",
            "--logging_dir=null",
        ],
    }


def layouts(folder: Path, found: dict) -> None:
    """What stage 2 stands on, a base and stage 1, sharded; and from here on its runs leave word of themselves."""
    home, data = folder / "layout_flux", folder / "data/layouts"
    settings = {"max_train_steps": 2, "checkpointing_steps": 2, "learning_rate": 1e-2}
    command("sharded", "layout_flux", home / "base", *locations(data, None), name="tiny_base", **settings)
    given = [*locations(data, home / "base"), "--logging_dir=null"]
    command("sharded", "layout_flux", home / "stage1", *given, name="tiny_stage1", **settings)
    compute_loss = train_layout_flux.compute_loss

    def record(run, batch, config, task, model=None):
        if model is None:
            weights = {name: gathered(value) for name, value in run.trained.named_parameters()}
            old = {name: value for name, value in weights.items() if not name.startswith("modulation_head.")}
            noted = found.setdefault(str(run.run_dir.relative_to(folder)), {"noise": [], "begun": digest(old)})
            noted["noise"].append(hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest())
            noted["weights"] = digest(weights)
            if run.step % 2 == dist.get_rank():  # nobody to recognise for one of them
                batch["identity_boxes"].values = np.zeros_like(batch["identity_boxes"].values)
        return compute_loss(run, batch, config, task, model)

    train_layout_flux.compute_loss = record


def scripts(folder: Path, found: dict) -> None:
    """Six updates whole, six sharded, and three and three sharded, of every script."""
    # a large epsilon: Adam otherwise turns the rounding of gradients that are zero into steps of full size
    settings = runs.EXACT | {"adam_epsilon": 1e-1, "max_train_steps": 6, "logging_steps": 1, "checkpointing_steps": 3}
    for system in SYSTEMS:
        validated = [f"--validation.validation_steps={VALIDATED[system]}"] if system in VALIDATED else []
        home, others = folder / system, [*data_of(folder)[system], *validated]
        command("ddp", system, home / "whole", *others, **settings)
        command("sharded", system, home / "straight", *others, **settings)
        on_first(branch_off, home / "straight", home / "broken", 3)
        command("sharded", system, home / "broken", *others, **settings, resume_from_checkpoint="latest")
    found["scripts"] = list(SYSTEMS)


# ---- 2: another number of processes ----


def processes(folder: Path, found: dict) -> None:
    """Two updates on two processes, two on one, two on two: samples seen, and state before and after each change."""
    seen, changes = [], []

    def loss(run, batch):
        seen.append([run.step, batch["index"].tolist()])
        return runs.flow_loss(run, batch)

    def stretch(kind: str, until: int) -> None:
        resumes = {"resume_from_checkpoint": "latest"} if until > 2 else {}
        run = open_as(kind, folder / "processes", max_train_steps=until, **resumes)
        if until > 2:
            files, loaded = stored(folder / f"processes/checkpoint-{until - 2}"), live(run)
            changes.append([kind, len(files), runs.differing(files, loaded)])
        runs.train_on(run, loss)
        now = live(run)
        runs.save_and_close(run)
        changes.append([kind, len(now), runs.differing(now, stored(folder / f"processes/checkpoint-{until}"))])

    stretch("sharded", 2)
    if dist.get_rank() == 0:
        kept = {name: os.environ.pop(name) for name in LAUNCHER if name in os.environ}
        stretch("alone", 4)
        os.environ.update(kept)
    dist.barrier()
    stretch("sharded", 6)
    found["seen"], found["changes"] = seen, changes


# ---- 3: not finite on one rank ----


def nonfinite(folder: Path, found: dict) -> None:
    """The loss of rank 1 alone is NaN in the second update."""
    for policy in ("stop", "skip"):
        states, opened = [], []

        def loss(run, batch, states=states):
            states.append(live(run))
            value, metrics = runs.flow_loss(run, batch)
            return value * (torch.nan if run.step == 1 and dist.get_rank() == 1 else 1), metrics

        def whole_run(policy=policy, loss=loss, opened=opened):
            opened.append(open_as("sharded", folder / f"nan-{policy}", on_nonfinite=policy, ema_decay=0.5))
            runs.train_on(opened[0], loss)
            runs.save_and_close(opened[0])

        code = code_of(whole_run)
        states.append(live(opened[0]))
        parts = ("model", "optimizer")
        found[policy] = {
            "code": code,
            "weights": [digest({n: v for n, v in s.items() if not n.endswith("/step")}, *parts) for s in states],
            "checkpoints": sorted(path.name for path in (folder / f"nan-{policy}").glob("checkpoint-*")),
        }


# ---- 4: an adapter in a frozen base ----


class Low(nn.Module):
    """An adapter layer of rows that two processes cannot share evenly: 3 and 1."""

    def __init__(self, width: int):
        super().__init__()
        self.down, self.up = nn.Linear(width, 3), nn.Linear(3, width, bias=False)
        self.gain = nn.Parameter(torch.ones(1, width))

    def forward(self, hidden_states):
        return self.gain * self.up(self.down(hidden_states).tanh())


class AdaptedBlock(nn.Module):
    """A frozen bf16 layer with a trained float32 one beside it; notes how many blocks are whole when it is used."""

    def __init__(self, width: int, notes: dict[str, list[int]], blocks: list):
        super().__init__()
        self.frozen = nn.Linear(width, width, dtype=torch.bfloat16)
        self.low: nn.Module | None = None
        self._note = lambda when: notes[when].append(
            sum(not isinstance(block.frozen.weight, DTensor) for block in blocks)
        )

    def forward(self, hidden_states):
        self._note("forward")
        if hidden_states.requires_grad:
            hidden_states.register_hook(lambda gradient: self._note("backward"))
        own = self.frozen(hidden_states.to(self.frozen.weight.dtype)).float()
        return hidden_states + own.tanh() + self.low(hidden_states)


class Adapted(ModelMixin, ConfigMixin):
    _no_split_modules = ("AdaptedBlock",)

    @register_to_config
    def __init__(self, width: int = 64, num_layers: int = 4):
        super().__init__()
        self.notes = {"forward": [], "backward": []}
        members: list[nn.Module] = []
        self.blocks = nn.ModuleList(AdaptedBlock(width, self.notes, members) for _ in range(num_layers))
        members.extend(self.blocks)

    def forward(self, hidden_states):
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


class Adapter(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, width: int = 64, num_layers: int = 4):
        super().__init__()
        self.layers = nn.ModuleList(Low(width) for _ in range(num_layers))


def adapted() -> tuple[Adapted, Adapter]:
    torch.manual_seed(0)
    base, adapter = Adapted().requires_grad_(False), Adapter()
    for block, layer in zip(base.blocks, adapter.layers, strict=True):
        block.low = layer
    return base, adapter


def adapter_loss(run, batch, shards: list):
    """To be like the data, and like the average: asked between the forward and the backward pass."""
    flat = batch["pixel_values"].flatten(1)
    output = run.model(batch["noise"].flatten(1))
    shards.append(all(isinstance(p, DTensor) for p in run.network.parameters()))
    with torch.no_grad():
        target = run.ema(batch["noise"].flatten(1))
    return (output - flat).square().mean() + (output - target).square().mean(), {"teacher": target.square().mean()}


def adapter(folder: Path, found: dict) -> None:
    """Whole, sharded, resumed, and with blocks that stay gathered between forward and backward pass."""
    steps = {"max_train_steps": 6, "checkpointing_steps": 3, "ema_decay": 0.5, "learning_rate": 1e-2}
    batch = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))

    def whole_run(kind: str, name: str, **training) -> None:
        run, shards = open_as(kind, folder / "adapter" / name, network=adapted, **steps | training), []
        before = {n: gathered(p) for n, p in run.network.named_parameters() if not p.requires_grad}
        check = run.validation(2, lambda model: ({"error": model(batch).square().mean()}, {}))
        for taken in run.batches():
            with run.accumulate():
                run.update(*adapter_loss(run, taken, shards))
            check()
        frozen = [n for n, value in before.items() if not torch.equal(gathered(run.network.get_parameter(n)), value)]
        found[f"adapter/{name}"] = {
            "shards": shards,
            "changed": frozen,
            "frozen": len(before),
            "notes": {when: max(counts) for when, counts in run.network.notes.items()},
        }
        run.finish(run.ema.part)

    whole_run("ddp", "whole")
    whole_run("sharded", "straight")
    on_first(branch_off, folder / "adapter/straight", folder / "adapter/broken", 3)
    whole_run("sharded", "broken", resume_from_checkpoint="latest")
    with runs.environment(FSDP_RESHARD_AFTER_FORWARD="false"):
        whole_run("sharded", "kept")
        run = open_as("sharded", folder / "no-average", use_ema=False, checkpointing_steps=2)
        labels = torch.zeros(4, dtype=torch.long)
        check = run.validation(
            2,
            lambda model: (
                {"x": model(batch.view(4, 1, 8, 8), batch[:, 0], batch[:, 0], class_labels=labels).sample.mean()},
                {},
            ),
            score=lambda s: 1,
        )
        for taken in run.batches():
            with run.accumulate():
                run.update(*runs.flow_loss(run, taken))
            check()
        runs.save_and_close(run)


# ---- 5: float16 ----


class Overflow(torch.autograd.Function):
    """The identity, with an infinite gradient."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf


def overflowing(run, batch, states: list | None = None, nan_at: int | None = None):
    """The first updates overflow on the last rank alone; at another its loss is NaN."""
    if states is not None:
        states.append([digest(live(run), "model"), run.precision.scale.state()])
    loss, metrics = runs.flow_loss(run, batch)
    is_last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
    if is_last and run.step < OVERFLOWS:
        loss = Overflow.apply(loss)
    return loss * (torch.nan if is_last and run.step == nan_at else 1), metrics


def float16(folder: Path, found: dict) -> None:
    """Five overflows, then sound updates; the same resumed in between; and a NaN."""
    settings = {"mixed_precision": "fp16", "max_train_steps": 8, "checkpointing_steps": 4, "max_nonfinite_skips": 1}
    states = []
    run = open_as("sharded", folder / "fp16/straight", **settings)
    runs.train_on(run, partial(overflowing, states=states))
    found["fp16"] = {"states": states, "failures": run._nonfinite}
    runs.save_and_close(run)
    on_first(branch_off, folder / "fp16/straight", folder / "fp16/broken", 4)
    run = open_as("sharded", folder / "fp16/broken", **settings, resume_from_checkpoint="latest")
    runs.train_on(run, overflowing)
    runs.save_and_close(run)

    def with_nan() -> None:
        run = open_as("sharded", folder / "fp16/nan", **settings)
        runs.train_on(run, partial(overflowing, nan_at=6))

    found["fp16"]["nan"] = code_of(with_nan)
    for system, precision in IN_LESS.items():
        settings = {"mixed_precision": precision, "max_train_steps": 2, "logging_steps": 1}
        for kind in ("ddp", "sharded"):
            command(kind, system, folder / precision / system / kind, *data_of(folder)[system], **settings)


STAGES = (layouts, scripts, processes, nonfinite, adapter, float16)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    # the end of a run closes the process group, and the next one needs it
    PartialState.destroy_process_group = lambda state, group=None: None
    found = {"launched": os.environ.get("ACCELERATE_USE_FSDP")}
    for stage in STAGES:
        stage(folder, found)
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
