"""`make demo-vpog`: find the poses of objects that were never seen in training, by templates of their meshes.

Makes objects and BOP scenes of them, renders templates, trains a small network by the ordinary script on two processes,
estimates poses in pictures of other objects, and writes report.html, results.csv and metrics.json.

    python -m demos.vpog [--output_dir outputs/demo-vpog] [--num_images N] [--max_train_steps N]
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from pydantic import Field

from backlot.command_line import parse
from backlot.loading import load_pipeline
from data_prep.bop.format import BopDataset
from data_prep.bop.models import read_models
from data_prep.bop.query_scenes import SceneSettings, make_dataset
from data_prep.bop.render_templates import render_all
from data_prep.bop.results import write_results
from demos import common
from demos.vpog_figures import find_goals
from demos.vpog_page import write_page
from evaluation.vpog.detections import choose_targets, detect_truly, find_targets
from evaluation.vpog.measure import Measured, Protocol, measure, summarise, to_results
from evaluation.vpog.score import write_note
from evaluation.vpog.settings import Answering
from pipelines.vpog import VPOGPipeline

CONFIG = Path("configs/vpog/demo.yaml")
PICTURES = SceneSettings(image_size=(160, 120), focal=(1.0, 1.8), in_plane_degrees=30)
NUM_OBJECTS, NUM_IMAGES, NUM_UNSEEN, NUM_TEST_IMAGES, TEST_SEED = 40, 1500, 8, 60, 1
VIEWS, SIZE = 42, 64
ANSWERING = Answering(group_size=3, num_hypotheses=3)
NUM_TARGETS, NUM_TURNED, NUM_TURNED_TEMPLATES = 150, 16, 64


class Settings(common.DemoSettings):
    output_dir: Path = Path("outputs/demo-vpog")
    """emptied first, if it is that of an earlier demo"""
    num_images: int = Field(NUM_IMAGES, ge=8)
    """pictures to train on"""


def make_data(output_dir: Path, num_images: int) -> None:
    """Scenes of objects to train on and of others to test on, and the templates of both."""
    train, test = output_dir / "train", output_dir / "test"
    make_dataset(train, 0, NUM_OBJECTS, num_images, settings=PICTURES, num_workers=2)
    make_dataset(test, TEST_SEED, NUM_UNSEEN, NUM_TEST_IMAGES, split="test", settings=PICTURES, num_workers=2)
    for folder in (train, test):
        render_all(read_models(folder / "models"), folder / "templates", views=VIEWS, size=SIZE, num_workers=2)


def train(output_dir: Path, max_train_steps: int | None) -> None:
    """The run, by its configuration."""
    arguments = ["--training.output_dir", str(output_dir / "run")]
    arguments += ["--data.path", str(output_dir / "train" / "train")]
    arguments += ["--data.templates", str(output_dir / "train" / "templates")]
    if max_train_steps is not None:
        arguments += ["--training.max_train_steps", str(max_train_steps), "--training.lr_warmup_steps", "0"]
        arguments += ["--training.lr_decay_steps", str(max_train_steps // 2)]
    common.train_on_two("train_vpog", CONFIG, *arguments)


def open_protocol(output_dir: Path) -> Protocol:
    """What is asked: objects of the test scenes with known poses, whose masks are jittered as a detector's are."""
    dataset = BopDataset(output_dir / "test", "test")
    targets = choose_targets(find_targets(dataset), NUM_TARGETS)
    templates = output_dir / "test" / "templates"
    return Protocol(dataset, dataset.models(), templates, detect_truly(targets), targets, ANSWERING)


def main(argv: list[str] | None = None) -> None:
    settings = parse(Settings, argv, "python -m demos.vpog", __doc__)
    output_dir, seconds, began = settings.output_dir, {}, time.perf_counter()
    common.empty_folder(output_dir, "train/models")
    torch.set_num_threads(2)
    diffusers_logging.disable_progress_bar()

    def lap(name: str) -> None:
        seconds[name] = time.perf_counter() - began - sum(seconds.values())

    make_data(output_dir, settings.num_images)
    lap("data")
    train(output_dir, settings.max_train_steps)
    lap("train")
    pipeline = load_pipeline(VPOGPipeline, output_dir / "run", "cpu", "float32")
    protocol = open_protocol(output_dir)
    turns = {"num_turned": NUM_TURNED, "num_turned_templates": NUM_TURNED_TEMPLATES}
    measured: Measured = measure(pipeline, protocol, **turns, show_progress=True)
    write_results(output_dir / "results.csv", to_results(measured.answers))
    write_note(output_dir / "results.csv", protocol.dataset, protocol.targets)
    metrics = summarise(measured)
    metrics["goals"] = [goal._asdict() for goal in find_goals(metrics)]
    lap("measure")
    write_page(output_dir, protocol, measured, metrics)
    lap("report")
    updates = settings.max_train_steps or common.planned_updates(CONFIG)
    metrics |= {"updates": updates, "num_objects": len(protocol.targets), "num_unseen": NUM_UNSEEN}
    metrics |= {"seconds": seconds | {"total": time.perf_counter() - began}}
    common.write_metrics(output_dir, metrics)
    for goal in find_goals(metrics):
        print(f"{'reached' if goal.reached else 'MISSED':>8}  {goal.what}: {goal.told} ({goal.asked})")
    print(f"{metrics['seconds']['total']:.0f} s. Open {output_dir / 'report.html'}")


if __name__ == "__main__":
    main()
