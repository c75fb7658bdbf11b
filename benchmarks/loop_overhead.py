"""What the training loop costs over a bare torch loop: same network, loss, data, optimiser; interleaved in one process.

Three loops take turns, a few updates at a time, so that a busy machine slows all of them alike:
  bare     torch only: DataLoader, AdamW (fused), gradient clipping, EMA by one foreach call
  ours     trainers.common.TrainingRun: the same, and logging, the non-finite guard, seeding, signals, data position
  recipe   the usual Accelerate example: prepared loader, default AdamW, diffusers' EMAModel, loss.item() for the log

    python -m benchmarks.loop_overhead [--rounds 30] [--updates 10] [--output FILE]
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from pydantic import Field
from torch.utils.data import DataLoader

import objectives
from backlot.command_line import parse
from backlot.config import Section, load_config
from data_prep import images
from objectives.settings import ObjectiveConfig
from pipelines.shortcut import ShortcutDiT
from trainers import common
from trainers.common.config import RunConfig

BATCH = 128


class Settings(Section):
    rounds: int = Field(30, ge=1)
    """turns of each loop"""
    updates: int = Field(10, ge=1)
    """of each loop per round"""
    output: Path | None = None
    """also write the figures and every round's times here, as JSON"""


class Config(RunConfig):
    objective: ObjectiveConfig = ObjectiveConfig()


def create_network() -> ShortcutDiT:
    torch.manual_seed(0)
    return ShortcutDiT.from_size("tiny", sample_size=8, in_channels=1, num_classes=10)


def loss_of(model, teacher, batch: dict, config: ObjectiveConfig):
    data, labels = batch["pixel_values"], batch["class_labels"]
    conditions = {"class_labels": labels}, {"class_labels": torch.full_like(labels, 10)}
    networks = (lambda x, t, d, c, network=network: network(x, t, d, **c).sample for network in (model, teacher))
    return objectives.shortcut.shortcut_loss(
        *networks, data, *conditions, objectives.shortcut.draw(data, config), config
    )


def bare_loop(config: Config) -> Iterator[None]:
    """Torch and nothing else; yields after each update."""
    model = create_network().train()
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    parameters, averages = list(model.parameters()), list(teacher.parameters())
    loader = DataLoader(images.open_images("digits"), BATCH, shuffle=True, drop_last=True)
    while True:
        for batch in loader:
            loss, _ = loss_of(model, teacher, batch, config.objective)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                torch._foreach_lerp_(averages, parameters, 0.001)
            yield


def our_loop(config: Config) -> Iterator[None]:
    """The loop of every training script."""
    dataset = images.open_images("digits")
    run = common.TrainingRun(common.create_accelerator(config), config, model=create_network(), dataset=dataset)
    run.resume()
    for batch in run.batches():
        with run.accumulate():
            run.update(*loss_of(run.model, run.ema, batch, config.objective))
        yield


def recipe_loop(config: Config) -> Iterator[None]:
    """The loop of the usual example script."""
    accelerator = Accelerator(cpu=True)
    model = create_network().train()
    ema = EMAModel(model.parameters(), decay=0.999, model_cls=ShortcutDiT, model_config=model.config)
    teacher = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    loader = DataLoader(images.open_images("digits"), BATCH, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    while True:
        for batch in loader:
            with accelerator.accumulate(model):
                with torch.no_grad():
                    ema.copy_to(teacher.parameters())  # the teacher has to be callable
                loss, _ = loss_of(model, teacher, batch, config.objective)
                accelerator.gather(loss.repeat(BATCH)).mean().item()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                ema.step(model.parameters())
                loss.detach().item()
            yield


def main(argv: list[str] | None = None) -> None:
    arguments = parse(Settings, argv, "python -m benchmarks.loop_overhead", __doc__)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))

    with tempfile.TemporaryDirectory() as folder:
        settings = {"output_dir": folder, "max_train_steps": 10**9, "train_batch_size": BATCH, "use_ema": True}
        settings |= {"checkpointing_steps": 10**9, "report_to": "tensorboard", "logging_steps": 50}
        config = load_config(Config, [f"--{key}={value}" for key, value in settings.items()])
        loops = {"ours": our_loop(config), "bare": bare_loop(config), "recipe": recipe_loop(config)}
        times = {name: [] for name in loops}
        for warm_up in (*[True] * 2, *[False] * arguments.rounds):
            for name, loop in loops.items():
                began = time.perf_counter()
                for _ in range(arguments.updates):
                    next(loop)
                if not warm_up:
                    times[name].append((time.perf_counter() - began) / arguments.updates)
        loops["ours"].close()

    figures = {"versions": {"torch": torch.__version__}, "load_average": os.getloadavg(), "seconds_per_update": times}
    for name in ("ours", "recipe"):
        ratios = [a / b for a, b in zip(times[name], times["bare"], strict=True)]
        figures[f"{name}_over_bare"] = statistics.median(ratios)
        print(
            f"{name:>7} / bare: median {statistics.median(ratios):.3f}, of minima "
            f"{min(times[name]) / min(times['bare']):.3f}  ({1e3 * min(times[name]):.2f} ms, bare "
            f"{1e3 * min(times['bare']):.2f} ms per update; {arguments.rounds} rounds of {arguments.updates})"
        )
    if arguments.output:
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
