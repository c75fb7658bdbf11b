"""How long a checkpoint keeps training from going on: written in its way, and written beside it.

Two runs of one network in one process take turns, an update and a save each, so that a busy machine or disk slows both
alike. The stall is what `save_checkpoint` takes until it returns; durable is the time until the checkpoint is flushed
and has its name. A plain copy of the state in memory is timed beside them: no save that lets training go on is shorter.

    python -m benchmarks.checkpoint_stall [--megabytes 300] [--rounds 7] [--output FILE]
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset

from backlot.command_line import parse
from backlot.config import Section, load_config
from trainers import common
from trainers.common.config import RunConfig

WIDTH = 1024
STATES = 4  # tensors of a parameter's size in a checkpoint: weights, average and two moments


class Settings(Section):
    megabytes: int = Field(300, ge=20)
    """of state in a checkpoint"""
    rounds: int = Field(7, ge=1)
    """saves of each kind"""
    folder: Path | None = None
    """on the disk to measure; where temporary files go if left out"""
    output: Path | None = None
    """also write all figures to this JSON file"""


class Layers(ModelMixin, ConfigMixin):
    """Linear layers, one after another."""

    @register_to_config
    def __init__(self, count: int = 1):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(count)])

    def forward(self, hidden_states: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_states = hidden_states + layer(hidden_states)
        return hidden_states


class Noise(Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, key: int) -> dict[str, Tensor]:
        return {"values": torch.randn(WIDTH, generator=torch.Generator().manual_seed(int(key)))}


def saves(folder: Path, beside: bool, layers: int) -> Iterator[tuple[float, float]]:
    """One update, one save; yields its stall and the time until it is durable, in seconds."""
    settings = {"output_dir": folder, "max_train_steps": 10**9, "train_batch_size": 1, "checkpointing_steps": 10**9}
    settings |= {"checkpoints_total_limit": 1, "async_checkpoints": beside, "report_to": "[]"}
    config = load_config(RunConfig, [f"--{key}={value}" for key, value in settings.items()])
    network = Layers(layers)
    run = common.TrainingRun(common.create_accelerator(config), config, model=network, dataset=Noise())
    run.resume()
    for batch in run.batches():
        with run.accumulate():
            run.update(run.model(batch["values"]).square().mean())
        began = time.perf_counter()
        run.save_checkpoint()
        stall = time.perf_counter() - began
        run._saver.wait()
        yield stall, time.perf_counter() - began


def copy_seconds(nbytes: int) -> float:
    """A copy of the state from memory to memory that is there already."""
    source, target = torch.zeros(nbytes // 4), torch.zeros(nbytes // 4)
    began = time.perf_counter()
    target.copy_(source)
    return time.perf_counter() - began


def measure(settings: Settings, folder: Path) -> dict:
    """Seconds of each save, and medians."""
    parameters = WIDTH * (WIDTH + 1)
    layers = max(1, round(settings.megabytes * 1e6 / (4 * STATES * parameters)))
    nbytes = 4 * STATES * parameters * layers
    kinds = {"synchronous": False, "asynchronous": True}
    loops = {kind: saves(folder / kind, beside, layers) for kind, beside in kinds.items()}
    seconds = {kind: {"stall": [], "durable": []} for kind in kinds} | {"copy": []}
    first = {kind: next(loop)[0] for kind, loop in loops.items()}  # pages are made, not only filled
    for _ in range(settings.rounds):
        for kind, loop in loops.items():
            stall, durable = next(loop)
            seconds[kind]["stall"].append(stall)
            seconds[kind]["durable"].append(durable)
        seconds["copy"].append(copy_seconds(nbytes))
    for loop in loops.values():
        loop.close()
    stalls = {kind: statistics.median(seconds[kind]["stall"]) for kind in kinds}
    return {
        "bytes": nbytes,
        "rounds": settings.rounds,
        "stall_over_synchronous": stalls["asynchronous"] / stalls["synchronous"],
        "median_seconds": {
            "synchronous_stall": stalls["synchronous"],
            "asynchronous_stall": stalls["asynchronous"],
            "asynchronous_durable": statistics.median(seconds["asynchronous"]["durable"]),
            "copy_in_memory": statistics.median(seconds["copy"]),
        },
        "first_stall_seconds": first,
        "seconds": seconds,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "cpu_count": os.cpu_count(),
        "load_average": os.getloadavg(),
    }


def main(argv: list[str] | None = None) -> None:
    settings = parse(Settings, argv, "python -m benchmarks.checkpoint_stall", __doc__)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        figures = measure(settings, Path(folder))
    medians = figures["median_seconds"]
    print(f"{figures['bytes'] / 1e6:.0f} MB of state, medians of {settings.rounds} saves of each kind")
    for name, value in medians.items():
        print(f"{name.replace('_', ' '):>22}  {value:.3f} s")
    print(f"stall beside training / in its way: {figures['stall_over_synchronous']:.3f}")
    if settings.output:
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        settings.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
