"""Validation cannot change a run or end it, and its pictures can be compared across steps."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import runs
import torch

from backlot.config import load_config
from pipelines.shortcut import ShortcutDiT
from trainers import train_shortcut

VALIDATION = ["--validation.validation_steps=1", "--validation.num_samples=8", "--model.dropout=0.2"]


def test_weights_are_the_same_with_and_without_validation(tmp_path):
    never = ["--validation.validation_steps=null", "--model.dropout=0.2"]
    settings = {"max_train_steps": 3, "logging_steps": 1}
    runs.train(tmp_path / "with", *VALIDATION, **settings)
    runs.train(tmp_path / "without", *never, **settings)
    results = [runs.tensors_of(tmp_path / name / "checkpoint-3") for name in ("with", "without")]
    assert runs.differing(*results) == []
    rows = runs.rows_of(tmp_path / "with")
    assert [row for row in rows if "loss" in row] == runs.rows_of(tmp_path / "without")
    assert [row["step"] for row in rows if "validation/loss_flow" in row] == [1, 2, 3]
    assert len(list((tmp_path / "with/samples").glob("*.png"))) == 3


@pytest.mark.parametrize("use_ema", [True, False])
@pytest.mark.parametrize("ends", ["well", "out of memory", "error"])
def test_modes_weights_and_random_state_are_as_before(tmp_path, flows, use_ema, ends, caplog):
    caplog.set_level(logging.WARNING)
    run = runs.open_run(tmp_path, flows, use_ema=use_ema, max_train_steps=1)
    runs.train_on(run)
    modes = [(module, module.training) for module in run.network.modules()]
    weights = {name: value.clone() for name, value in run.network.state_dict().items()}
    torch.manual_seed(5)
    before = torch.get_rng_state()

    def draw(model):
        assert not model.training
        assert not torch.is_grad_enabled()
        torch.rand(7)
        torch.manual_seed(99)
        if ends == "out of memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")
        if ends == "error":
            raise ZeroDivisionError
        return {"score": 1.0}, {}

    validation = run.validation(1, draw)
    if ends == "error":
        with pytest.raises(ZeroDivisionError):
            validation()
    else:
        validation()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()
    assert all(module.training == mode for module, mode in modes)
    assert run.network.training
    assert runs.differing(weights, run.network.state_dict()) == []
    scores = [row for row in runs.rows_of(tmp_path) if "validation/score" in row] if ends == "well" else []
    assert len(scores) == (ends == "well")
    assert ("ran out of memory and is skipped: CUDA out of memory" in caplog.text) == (ends == "out of memory")
    runs.save_and_close(run)


def test_running_out_of_memory_does_not_end_the_command(tmp_path, monkeypatch, caplog):
    def exhausted(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    settings = {"max_train_steps": 3}
    runs.train(tmp_path / "without", "--model.dropout=0.2", **settings)
    monkeypatch.setattr(train_shortcut, "validate", exhausted)
    runs.train(tmp_path / "with", *VALIDATION, **settings)
    assert caplog.text.count("validation ran out of memory and is skipped") == 3
    results = [runs.tensors_of(tmp_path / name / "checkpoint-3") for name in ("with", "without")]
    assert runs.differing(*results) == []


class Frozen:
    """The parts of a run that `validate` reads."""

    step, micro_batch = 0, (0, 1)

    class accelerator:  # noqa: N801
        device = torch.device("cpu")

    def __init__(self, network):
        self.network = self.model = self.ema = network


def test_pictures_and_loss_come_from_the_same_noise_every_time(tmp_path):
    config = load_config(train_shortcut.Config, runs.command_line(tmp_path))
    torch.manual_seed(0)
    network = ShortcutDiT.from_size("tiny", sample_size=8, in_channels=1, num_classes=10, hidden_size=32).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)  # away from its zero output
    held_out = {"pixel_values": torch.randn(8, 1, 8, 8), "class_labels": torch.arange(8)}
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)  # whatever training did in between
        pipeline = train_shortcut.create_pipeline(network, config)
        with torch.no_grad():
            results.append(train_shortcut.validate(network, Frozen(network), config, pipeline, held_out))
    (scalars, pictures), (scalars_again, pictures_again) = results
    assert scalars == scalars_again
    assert np.array_equal(pictures["samples"], pictures_again["samples"])
    assert np.asarray(pictures["samples"]).std() > 1
