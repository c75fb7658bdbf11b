"""One thread, CPU, and a fresh Accelerate state for every test."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
# Modules that tests share (runs.py) are found by tests and by the processes they start; ours come before the folders
# of tests that are named like them.
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import runs
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as AttentionBackends
from flow_samples import Flows

torch.set_num_threads(1)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.fixture(autouse=True)
def _own_process_state(request, monkeypatch):
    """Accelerate and the choice of attention keep their state in classes, and a run takes the signals: undo all."""
    if "gpu" not in request.keywords:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    handlers = [signal.getsignal(number) for number in SIGNALS]
    attention = AttentionBackends._active_backend
    runs.reset_accelerate()
    yield
    runs.reset_accelerate()
    AttentionBackends.set_active_backend(attention)
    for number, handler in zip(SIGNALS, handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """Six updates of the real command with checkpoints at 2, 4 and 6. Copy it before you change it."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    runs.reset_accelerate()
    runs.train(run_dir, max_train_steps=6, checkpointing_steps=2, checkpoints_total_limit=None, logging_steps=2)
    return run_dir


@pytest.fixture
def flows():
    return Flows()
