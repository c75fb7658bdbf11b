"""The real command with one slow place, for tests that start it through a launcher.

accelerate launch ... slow_program.py FOLDER PLACE ARGUMENTS    each rank touches FOLDER/<PLACE>-<rank> when it is there
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from trainers import common, train_shortcut
from trainers.common import checkpoints, launch

RANK = int(os.environ.get("RANK", 0))
SECONDS = 6.0
"""How long the main process validates, or encodes, while the others wait; twice what a process group allows."""


def slow_updates(arrived) -> None:
    """Fifty milliseconds each."""
    compute_loss, calls = train_shortcut.compute_loss, []

    def slow(*arguments):
        calls.append(1)
        time.sleep(0.05)
        if len(calls) == 4:
            arrived()
        return compute_loss(*arguments)

    train_shortcut.compute_loss = slow


def slow_start(arrived) -> None:
    """Data that take two seconds to open."""
    open_split = train_shortcut.open_split

    def slow(config, split):
        if split == "train":
            arrived()
            time.sleep(2)
        return open_split(config, split)

    train_shortcut.open_split = slow


def slow_save(arrived) -> None:
    """A first save that waits for FOLDER/go-on; the updates are slow as well."""
    slow_updates(lambda: None)
    commit, calls = checkpoints.commit, []

    def slow(temporary):
        calls.append(1)
        if len(calls) == 1:
            arrived()
            while not (Path(sys.argv[1]) / "go-on").exists():
                time.sleep(0.02)
        return commit(temporary)

    checkpoints.commit = slow


class HangsAt(torch.utils.data.Dataset):
    """Data that hang for ten minutes at their n-th item."""

    def __init__(self, dataset, item: int, arrived):
        self.dataset, self.num_classes, self.item, self.arrived, self.read = (
            dataset,
            dataset.num_classes,
            item,
            arrived,
            0,
        )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key):
        self.read += 1
        if self.read == self.item:
            self.arrived()
            time.sleep(600)
        return self.dataset[key]


def hanging_loader(arrived) -> None:
    """The last rank waits for data for ever, the others for its gradients."""
    open_split = train_shortcut.open_split

    def slow(config, split):
        dataset = open_split(config, split)
        is_last = int(os.environ["WORLD_SIZE"]) - 1 == RANK
        return HangsAt(dataset, 30, arrived) if split == "train" and is_last else dataset

    train_shortcut.open_split = slow


def impatient_group(arrived) -> None:
    """A process group that waits for three seconds; reading the data and validation take twice as long."""
    group = InitProcessGroupKwargs(timeout=timedelta(seconds=SECONDS / 2))
    create_accelerator, open_split, validate = (
        common.create_accelerator,
        train_shortcut.open_split,
        train_shortcut.validate,
    )
    processes = []

    def impatient(*arguments, kwargs_handlers, **settings):
        return Accelerator(*arguments, kwargs_handlers=[*kwargs_handlers, group], **settings)

    def encode(config, split):
        with processes[0].main_first():
            if RANK == 0 and split == "train":
                time.sleep(SECONDS)
        return open_split(config, split)

    def slow(*arguments):
        time.sleep(SECONDS)
        return validate(*arguments)

    def create_and_keep(config):
        accelerator = create_accelerator(config)
        processes.append(accelerator.launch.processes)
        return accelerator

    launch.Accelerator = impatient
    common.create_accelerator = create_and_keep
    train_shortcut.open_split, train_shortcut.validate = encode, slow


PLACES = {
    "updates": slow_updates,
    "start-up": slow_start,
    "save": slow_save,
    "loader": hanging_loader,
    "validation": impatient_group,
}


def main(folder: Path, place: str, arguments: list[str]) -> None:
    PLACES[place](lambda: (folder / f"{place}-{RANK}").touch())
    train_shortcut.main(arguments)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
