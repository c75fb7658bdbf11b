"""Autocast around a forward pass, and float16 with a scale of its own: overflows, failures, resume, no waiting."""

from __future__ import annotations

import json
import shutil

import pytest
import runs
import torch
from test_run import CountHostSyncs
from torch import nn

from trainers.common.precision import LossScale, Precision

CPU = torch.device("cpu")
FP16 = {"mixed_precision": "fp16", "max_train_steps": 8, "checkpoints_total_limit": None}


def test_full_precision_leaves_the_forward_pass_alone():
    network = nn.Linear(2, 2)
    Precision("no", CPU).prepare(network)
    assert "forward" not in vars(network)
    assert Precision("no", CPU).scale is None


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_network_computes_in_less_and_answers_in_float32(name, dtype):
    network, seen = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), []
    network[0].register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    precision = Precision(name, CPU)
    precision.prepare(network)
    assert network(torch.ones(1, 2)).dtype == torch.float32
    assert seen == [dtype]
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert (precision.scale is None) == (name == "bf16")


def test_the_scale_is_halved_by_an_overflow_and_doubled_after_many_updates_without():
    scale = LossScale(CPU, start=8.0)
    good, bad = torch.tensor(0.0), torch.tensor(1.0)
    for _ in range(LossScale.INTERVAL - 1):
        scale.update(good)
    assert scale.state() == {"value": 8.0, "tracker": LossScale.INTERVAL - 1}
    other = LossScale(CPU)
    other.load(scale.state())
    for each in (scale, other):
        each.update(good)
        assert each.state() == {"value": 16.0, "tracker": 0}
    scale.update(good)
    scale.update(bad)
    assert scale.state() == {"value": 8.0, "tracker": 0}


def overflow_until(run, step: int) -> None:
    """The gradient of one weight is infinite in the first updates, though the loss is finite."""
    run.network.proj_out.weight.register_hook(lambda g: g * torch.inf if run.step < step else g)


def test_overflows_halve_the_scale_and_leave_the_weights_alone(tmp_path, flows):
    run = runs.open_run(tmp_path / "run", flows, logging_steps=1, ema_decay=0.0, **FP16)
    overflow_until(run, 5)
    weights, scales = [], []
    for batch in run.batches():
        weights.append(torch.cat([p.detach().flatten() for p in run.network.parameters()]).clone())
        with run.accumulate():
            run.update(*runs.flow_loss(run, batch))
        scales.append(run.precision.scale.state()["value"])
    assert scales == [2.0 ** (16 - min(n, 5)) for n in range(1, 9)]
    assert all(torch.equal(weights[0], each) for each in weights[:6])
    assert not torch.equal(weights[6], weights[5])
    assert run._nonfinite == 0
    runs.save_and_close(run)
    assert [row["loss_scale"] for row in runs.rows_of(tmp_path / "run")] == scales
    assert all(state["exp_avg"].isfinite().all() for state in run.optimizer.state.values())


def test_a_scale_that_is_far_too_large_finds_its_way(tmp_path, flows):
    """True overflows, not made ones: the gradient is then that of float32, but for rounding."""
    norms = {}
    for precision, start in (("no", None), ("fp16", 2.0**40)):
        settings = FP16 | {"mixed_precision": precision, "max_train_steps": 40, "on_nonfinite": "stop"}
        run = runs.open_run(tmp_path / precision, flows, logging_steps=1, learning_rate=1e-8, **settings)
        if start:
            run.precision.scale.value.fill_(start)
        runs.train_on(run)
        runs.save_and_close(run)
        norms[precision] = [row["grad_norm"] for row in runs.rows_of(tmp_path / precision)]
        if start:
            assert 1 < float(run.precision.scale.value) < start / 2
    assert norms["fp16"][-8:] == pytest.approx(norms["no"][-8:], rel=2e-2)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_loss_that_is_not_finite_is_a_failure_whatever_the_scale(tmp_path, flows, policy, capsys):
    run = runs.open_run(tmp_path / "run", flows, on_nonfinite=policy, **FP16)
    overflow_until(run, 2)

    def loss(run, batch):
        value, metrics = runs.flow_loss(run, batch)
        return value * (torch.nan if run.step == 3 else 1), metrics

    if policy == "stop":
        with pytest.raises(SystemExit) as exit_:
            runs.train_on(run, loss)
        assert exit_.value.code == 3
        assert "in update 4; its samples" in capsys.readouterr().err
    else:
        runs.train_on(run, loss)
        assert run._nonfinite == 1
        runs.save_and_close(run)
    assert run.precision.scale.state()["value"] == 2.0**14  # the failure itself does not halve it


def test_overflows_without_end_are_a_failure(tmp_path, flows):
    """A scale below 1 says that float16 is not the fault."""
    run = runs.open_run(tmp_path / "run", flows, **FP16 | {"max_train_steps": 30})
    overflow_until(run, 30)
    with pytest.raises(SystemExit) as exit_:
        runs.train_on(run)
    assert exit_.value.code == 3
    assert run.step == 18


def test_it_resumes_where_it_stopped_scale_and_tracker_included(tmp_path, flows):
    def train(name: str, **training) -> None:
        run = runs.open_run(tmp_path / name, flows, **FP16 | training, checkpointing_steps=4)
        overflow_until(run, 2)
        runs.train_on(run)
        runs.save_and_close(run)

    train("straight")
    shutil.copytree(tmp_path / "straight", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken/checkpoint-8")
    train("broken", resume_from_checkpoint="latest")
    straight, broken = (tmp_path / name / "checkpoint-8" for name in ("straight", "broken"))
    assert runs.differing(runs.tensors_of(straight), runs.tensors_of(broken)) == []
    scales = [json.loads((c / "run_state.json").read_text())["loss_scale"] for c in (straight, broken)]
    assert scales == [{"value": 2.0**14, "tracker": 6}] * 2


def test_no_host_synchronisation_between_log_points(tmp_path, flows):
    settings = FP16 | {"max_train_steps": 4, "gradient_accumulation_steps": 2, "logging_steps": 100}
    run = runs.open_run(tmp_path / "run", flows, **settings)
    overflow_until(run, 2)
    run._report_nonfinite = lambda: None  # on a GPU at log points only
    seen = []
    for batch in run.batches():
        loss = runs.flow_loss(run, batch)
        with CountHostSyncs() as counter, run.accumulate():
            run.update(*loss)
        seen += counter.seen
    assert seen == []
    assert run.precision.scale.state()["value"] == 2.0**14
    runs.save_and_close(run)


def test_an_average_answers_in_the_type_in_which_the_network_does(tmp_path, flows):
    """A teacher's half steps are averaged, guided and subtracted: not in bf16."""
    run = runs.open_run(tmp_path / "run", flows, mixed_precision="bf16", max_train_steps=1)
    sample, t = torch.randn(2, 1, 8, 8), torch.rand(2)
    labels = torch.zeros(2, dtype=torch.long)
    answers = [network(sample, t, 0 * t, class_labels=labels).sample for network in (run.model, run.ema)]
    assert [answer.dtype for answer in answers] == [torch.float32, torch.float32]
    runs.save_and_close(run)
