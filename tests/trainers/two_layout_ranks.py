"""The program of test_train_layout_flux.py: the real command, which also writes down what each rank saw."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from trainers import train_layout_flux


def digest(tensors) -> str:
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()


def main(folder: Path, arguments: list[str]) -> None:
    compute_loss, noise, runs_seen = train_layout_flux.compute_loss, [], []

    def record(run, batch, config, task, model=None):
        runs_seen[:] = [run]
        noise.append(digest([torch.get_rng_state()]))
        if run.processes.rank == 0:  # nothing to look at on this rank
            batch["identity_boxes"].values = np.zeros_like(batch["identity_boxes"].values)
        return compute_loss(run, batch, config, task, model)

    train_layout_flux.compute_loss = record
    train_layout_flux.main(arguments)
    result = {"noise": noise, "weights": digest(runs_seen[0].network.adapter.state_dict().values())}
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
