"""The program of test_distributed.py: the real command, which also writes down what each rank saw.

accelerate launch ... two_ranks.py FOLDER STEP ARGUMENTS   the last rank asks itself to stop in update STEP
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch

from trainers import train_shortcut


class WithIndex(torch.utils.data.Dataset):
    """Samples that know their index."""

    def __init__(self, dataset):
        self.dataset, self.num_classes = dataset, dataset.num_classes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key) -> dict:
        return {**self.dataset[key], "index": torch.tensor(int(key))}


def digest(tensors) -> str:
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()


def main(folder: Path, stop_in: int, arguments: list[str]) -> None:
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    open_split, compute_loss = train_shortcut.open_split, train_shortcut.compute_loss
    seen, runs_seen = [], []

    def record(run, batch, config, teacher=None):
        runs_seen[:] = [run]
        noise = digest([torch.get_rng_state()])
        seen.append({"step": run.step, "samples": batch["index"].tolist(), "noise": noise})
        if run.step == stop_in and rank == ranks - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute_loss(run, batch, config, teacher)

    train_shortcut.open_split = lambda config, split: WithIndex(open_split(config, split))
    train_shortcut.compute_loss = record
    code = 0
    try:
        train_shortcut.main(arguments)
    except SystemExit as end:
        code = end.code
    run = runs_seen[0]
    result = {
        "seen": seen,
        "code": code,
        "steps": run.step,
        "weights": digest(run.network.state_dict().values()),
        "ema": digest(run.ema.model.state_dict().values()),
        "optimizer": digest(v for state in run.optimizer.state.values() for v in state.values()),
    }
    (folder / f"{ranks}-ranks-{rank}.json").write_text(json.dumps(result))
    raise SystemExit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
