"""The program of test_train_vpog.py: the real command, which also writes down what each rank saw.

With NO_PAIRS=1 rank 1 has no labelled patch at all in the first two updates.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import torch

from objectives import pose_labels
from trainers import train_vpog


def main(folder: Path, arguments: list[str]) -> None:
    compute_loss, build_labels, seen, runs_seen = train_vpog.compute_loss, pose_labels.build_labels, [], []
    rank, without_pairs = os.environ["RANK"], os.environ.get("NO_PAIRS")

    def record(run, batch, config, model=None):
        if model is None:
            runs_seen[:] = [run]
            seen.extend(batch["sample_id"])
        return compute_loss(run, batch, config, model)

    def nothing(*given):
        labels = build_labels(*given)
        if not (without_pairs and rank == "1" and runs_seen[0].step < 2):
            return labels
        empty = {name: torch.zeros_like(value) for name, value in labels._asdict().items() if value.dtype == torch.bool}
        return labels._replace(**empty, patch_cls=torch.full_like(labels.patch_cls, -1))

    train_vpog.compute_loss, pose_labels.build_labels = record, nothing
    train_vpog.main(arguments)
    weights = b"".join(tensor.numpy().tobytes() for tensor in runs_seen[0].network.state_dict().values())
    result = {"samples": seen, "weights": hashlib.sha256(weights).hexdigest()}
    (folder / f"rank-{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
