"""The real command for points: exact resume, gradients, what is learnt, refusals; and the command that measures it."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial

import pytest
import runs
import torch

from backlot.config import load_config
from data_prep.points.dataset import PointDataset
from data_prep.points.format import write_points
from data_prep.points.synth import make_ring
from evaluation.point_flow.__main__ import main as evaluate
from evaluation.point_flow.metrics import wasserstein
from pipelines.point_flow import PointFlowNetwork, PointFlowPipeline, create_scheduler
from trainers import train_point_flow

train = partial(runs.train, system="point_flow")
VALIDATED = "--validation.validation_steps=3"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Forty points to train on: six updates of sixteen pass ends of epochs."""
    root = tmp_path_factory.mktemp("points")
    write_points(root, "train", make_ring(40, seed=0))
    write_points(root, "val", make_ring(300, seed=1))
    return root


@pytest.fixture(scope="module")
def data(root):
    return f"--data.path={root}"


@pytest.mark.parametrize(("workers", "accumulation"), [(0, 1), (2, 2)])
def test_three_updates_and_three_after_a_resume_are_six(tmp_path, data, workers, accumulation):
    """Bit for bit, in the middle of an epoch and of a log interval, with turned points."""
    settings = {"gradient_accumulation_steps": accumulation, "dataloader_num_workers": workers}
    runs.resume_in_the_middle(tmp_path, data, VALIDATED, system="point_flow", **settings)


def test_two_updates_then_four_and_the_pipeline_is_the_ema(tmp_path, data):
    settings = {"logging_steps": 1, "checkpoints_total_limit": None}
    train(tmp_path / "run", data, **settings, max_train_steps=2)
    train(tmp_path / "run", data, **settings, max_train_steps=4, resume_from_checkpoint="latest")
    ema = runs.tensors_of(tmp_path / "run/checkpoint-4")
    for name, value in PointFlowPipeline.from_pretrained(tmp_path / "run").network.state_dict().items():
        assert torch.equal(value, ema[f"ema/{name}"]), name


def test_gradients_reach_every_parameter(tmp_path, data, root):
    config = load_config(train_point_flow.Config, runs.command_line(tmp_path / "run", data, system="point_flow"))
    dataset = PointDataset(root)
    network = PointFlowNetwork(**config.model.model_dump())
    run = runs.open_run(tmp_path / "run", dataset, network)
    pipeline = PointFlowPipeline(network, create_scheduler())
    batch = next(iter(run.batches()))
    train_point_flow.compute_loss(run, batch, config, pipeline)[0].backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []
    runs.save_and_close(run)


def test_it_learns_and_its_distance_is_measured(tmp_path, data, root):
    """Noise comes much nearer to the data within two seconds, and a picture shows it."""
    settings = {"max_train_steps": 200, "train_batch_size": 64, "learning_rate": 1e-2, "ema_decay": 0.95}
    train(tmp_path / "run", data, "--validation.validation_steps=200", **settings)
    assert (tmp_path / "run/samples/points-000200.png").exists()
    evaluate([str(tmp_path / "run"), "--data", str(root), "--steps", "1", "16"])
    distances = json.loads((tmp_path / "run/evaluation.json").read_text())["wasserstein"]
    assert list(distances) == ["noise", "1 step", "16 steps"]
    assert distances["16 steps"] < 0.7 * distances["noise"]


def test_the_distance_is_that_of_the_best_assignment():
    a = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    assert wasserstein(a, a.flip(0)) == 0
    assert wasserstein(a, a + torch.tensor([0.0, 2.0])) == pytest.approx(2)
    with pytest.raises(ValueError, match=r"`a` and `b` must both be \(N, D\)"):
        wasserstein(a, a[:1])


def test_the_script_is_started_by_its_path(tmp_path, data):
    """From a shell nothing is loaded beforehand: what the script names is found by itself."""
    arguments = runs.command_line(tmp_path / "run", data, "--max_train_steps=1", system="point_flow")
    command = [sys.executable, "trainers/train_point_flow.py", *arguments]
    result = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run/model_index.json").exists()


def test_missing_data_is_one_line_and_exit_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        train(tmp_path / "run", f"--data.path={tmp_path / 'nowhere'}")
    assert exit_.value.code == 2
    assert capsys.readouterr().err.strip() == f"data: there is no file {tmp_path / 'nowhere/train.safetensors'}"
