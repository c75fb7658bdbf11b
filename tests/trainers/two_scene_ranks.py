"""The program of test_train_shortcut_scene.py: the real command, which also writes down what each rank saw."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import torch

from objectives import scene
from trainers import train_shortcut_scene


def digest(tensors) -> str:
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()


def main(folder: Path, arguments: list[str]) -> None:
    draw, compute_loss, runs_seen = scene.draw, train_shortcut_scene.compute_loss, []
    seen = {"noise": [], "coins": [], "objects": []}

    def record(data, object_mask, *others):
        draws = draw(data, object_mask, *others)
        seen["noise"].append(digest([draws.noise["shape"], draws.t]))
        seen["coins"].append([draws.num_bootstrap, draws.guidable, draws.step_size.tolist()])
        seen["objects"].append(object_mask.sum(1).tolist())
        return draws

    def remember(run, *others):
        runs_seen[:] = [run]
        return compute_loss(run, *others)

    scene.draw, train_shortcut_scene.compute_loss = record, remember
    train_shortcut_scene.main(arguments)
    result = seen | {"weights": digest(runs_seen[0].network.state_dict().values())}
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
