"""`make demo-layout`: put objects into boxes and keep their identity, by a small FLUX and an adapter in three stages.

Draws scenes, trains the base and then stages 1, 2 and 3 on it by the ordinary script on two processes, measures all of
them on layouts of identities that were never seen, and writes report.html and metrics.json.

    python -m demos.layout [--output_dir outputs/demo-layout] [--num_train N] [--max_train_steps N]
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from diffusers.utils import logging as diffusers_logging
from pydantic import Field
from transformers.utils import logging as transformers_logging

from backlot.command_line import parse
from data_prep.layouts.dataset import LayoutDataset
from data_prep.layouts.prepare import MODELS, prepare
from data_prep.layouts.settings import PrepareSettings
from demos import common
from demos.layout_figures import STAGES, find_goals, read_tags
from demos.layout_page import tell_goal, without_references, write_page
from evaluation.layout_flux import Protocol, Sampling, Similarity, Variants, load_model, measure, summarise
from evaluation.layout_flux.drawing import Drawing
from evaluation.layout_flux.examples import other_references, read_examples, read_profile
from evaluation.layout_flux.measure import Measured, measure_every_object, score_shuffled
from evaluation.layout_flux.report import compare_all
from evaluation.layout_flux.statistics import as_json
from pipelines.layout_flux.encoders import LayoutEncoders
from pipelines.layout_flux.pipeline import FluxLayoutPipeline

CONFIGS = {name: Path(f"configs/layout_flux/demo_{name}.yaml") for name in ("base", *STAGES)}
VAE = "pixels:2"
NUM_TRAIN, TRAIN_SPLIT, TEST_SEED = 4400, 0.97, 1
VARIANTS = Variants(num_layouts=256, num_shuffled=128, num_swapped=128, num_without_feedback=256)
SAMPLING, BATCH_SIZE = Sampling(num_inference_steps=16), 64
COUNTS = {  # of updates: shorter runs keep their shares
    "training": ("lr_warmup_steps", "lr_decay_steps", "checkpointing_steps", "logging_steps"),
    "validation": ("validation_steps",),
    "dino": ("ramp_steps",),
}
AT_LEAST = {"lr_warmup_steps": 0, "lr_decay_steps": 0, "ramp_steps": 0}


class Settings(common.DemoSettings):
    output_dir: Path = Path("outputs/demo-layout")
    """emptied first, if it is that of an earlier demo"""
    num_train: int = Field(NUM_TRAIN, ge=128)
    """scenes to train on, a few of which are kept for validation"""


def prepare_scenes(output_dir: Path, num_train: int) -> None:
    """Scenes to train on, and scenes of other identities to test on, encoded by the same small random models."""
    shared = {"profile": "demo", "vae": VAE, "device": "cpu", "num_workers": 2, "batch_size": 128}
    data, test = output_dir / "data", output_dir / "test"
    prepare(PrepareSettings(**shared, output_dir=data, models="tiny", num_samples=num_train, train_split=TRAIN_SPLIT))
    held_out = {"held_out": True, "seed": TEST_SEED, "num_samples": VARIANTS.num_layouts}
    prepare(PrepareSettings(**shared, **held_out, output_dir=test, models=str(data / MODELS)))


def train(name: str, output_dir: Path, max_train_steps: int | None) -> None:
    """One of the four runs, by its configuration; each stage finds the one before it beside its own folder."""
    models = output_dir / "data" / MODELS
    given = {
        "training.output_dir": output_dir / name,
        "data.output_dir": output_dir / "data",
        "model.pretrained_model_name_or_path": models if name == "base" else output_dir / "base",
    }
    if name != "base":
        given["logging_dir"] = output_dir / "logs"
    if name in ("stage2", "stage3"):
        given["dino.encoder"] = models / "dino"
    if max_train_steps is not None:
        given |= shortened(CONFIGS[name], max_train_steps)
    arguments = [part for key, value in given.items() for part in (f"--{key}", str(value))]
    common.train_on_two("train_layout_flux", CONFIGS[name], *arguments)


def shortened(config: Path, max_train_steps: int) -> dict[str, int]:
    """Another number of updates, and of whatever is counted in updates the same share of them."""
    values = yaml.safe_load(config.read_text(encoding="utf-8"))
    share = max_train_steps / common.planned_updates(config)
    counts = {
        f"{section}.{key}": max(AT_LEAST.get(key, 1), int(share * values[section][key]))
        for section, keys in COUNTS.items()
        for key in keys
        if values.get(section, {}).get(key)
    }
    return counts | {"training.max_train_steps": max_train_steps}


@dataclass(frozen=True)
class Models:
    """What was trained: pipelines by name, and what measures all of them."""

    pipelines: Mapping[str, FluxLayoutPipeline]
    protocol: Protocol


def load(output_dir: Path) -> Models:
    """The pipelines of all stages, and the unseen layouts."""
    base, test = str(output_dir / "base"), output_dir / "test"
    pipelines = {name: load_model(str(output_dir / name), base, "cpu") for name in ("base", *STAGES)}
    scenes = read_profile(test)
    dataset = LayoutDataset(test, split="all", max_objects=scenes.max_objects)
    encoders = LayoutEncoders.load(output_dir / "data" / MODELS, "cpu", vae=VAE)
    examples = read_examples(dataset, VARIANTS.num_layouts)
    return Models(
        pipelines,
        Protocol(examples, scenes, VARIANTS, SAMPLING, Similarity(encoders), batch_size=BATCH_SIZE),
    )


def measure_all(models: Models) -> dict[str, Measured]:
    """The base without layouts, and every stage with them; the first is told boxes and texts alone."""
    found = {"no_layout": measure(models.pipelines["base"], models.protocol, with_layout=False, show_progress=True)}
    for name in STAGES:
        run = measure_blind if name == "stage1" else measure
        found[name] = run(models.pipelines[name], models.protocol, show_progress=True)
    return found


def measure_blind(pipeline: FluxLayoutPipeline, protocol: Protocol, *, show_progress: bool = False) -> Measured:
    """Figures of a model that is shown no references, as in its training; its pictures are compared with them."""
    examples = [
        replace(each, item=without_references(each.item), references=(None,) * len(each.references))
        for each in protocol.examples
    ]
    variants = protocol.variants.model_copy(update={"num_shuffled": 0})
    blind = replace(protocol, examples=examples, variants=variants, similarity=None)
    measured = measure(pipeline, blind, show_progress=show_progress)
    plain = measured.pictures["plain"]
    measured.objects = measure_every_object(protocol, protocol.examples[: len(plain)], Drawing(plain, measured.alphas))
    count = min(len(plain), protocol.variants.num_shuffled)
    is_other = [changed for _, changed in other_references(protocol.examples, protocol.seed)[:count]]
    measured.shuffled, measured.drift = score_shuffled(protocol, plain[:count], plain[:count], is_other)
    return measured


def summarise_all(measured: Mapping[str, Measured], output_dir: Path) -> dict:
    """The layout of metrics.json, but for times."""
    metrics = {name: summarise(each) for name, each in measured.items()}
    metrics["comparisons"] = {name: as_json(each) for name, each in compare_all(measured).items()}
    metrics["num_layouts"] = len(measured["no_layout"].layouts)
    metrics["num_inference_steps"] = SAMPLING.num_inference_steps
    metrics["goals"] = [goal._asdict() for goal in find_goals(metrics)]
    metrics["tensorboard"] = {name: read_tags(output_dir / name) for name in STAGES}
    return metrics


def main(argv: list[str] | None = None) -> None:
    settings = parse(Settings, argv, "python -m demos.layout", __doc__)
    output_dir, seconds, began = settings.output_dir, {}, time.perf_counter()
    common.empty_folder(output_dir, "data/prepare_meta.json")
    torch.set_num_threads(2)
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()

    def lap(name: str) -> None:
        seconds[name] = time.perf_counter() - began - sum(seconds.values())

    prepare_scenes(output_dir, settings.num_train)
    lap("prepare")
    for name in CONFIGS:
        train(name, output_dir, settings.max_train_steps)
        lap(f"train {name}")
    models = load(output_dir)
    measured = measure_all(models)
    metrics = summarise_all(measured, output_dir)
    lap("measure")
    write_page(output_dir, models.protocol, models.pipelines["stage3"], measured, metrics)
    lap("report")
    updates = {name: settings.max_train_steps or common.planned_updates(config) for name, config in CONFIGS.items()}
    metrics |= {"updates": updates, "seconds": seconds | {"total": time.perf_counter() - began}}
    common.write_metrics(output_dir, metrics)
    for goal in find_goals(metrics):
        what, asked, value, _ = tell_goal(goal)
        print(f"{'reached' if goal.reached else 'MISSED':>8}  {what}: {value} ({asked})")
    print(f"{metrics['seconds']['total']:.0f} s. Open {output_dir / 'report.html'}")


if __name__ == "__main__":
    main()
