"""A NaN or infinite loss or gradient never reaches the weights."""

from __future__ import annotations

import json
import math
import random

import pytest
import runs
import torch

from trainers.common import checkpoints

BAD = 2  # the update (counted from 0) that goes wrong


def poison(run, kind: str, micro_step: int = 0):
    """flow_loss that goes wrong in one micro-batch of update `BAD`."""
    calls = []

    def loss(run_, batch):
        value, metrics = runs.flow_loss(run_, batch)
        calls.append(1)
        if run.step == BAD and run._micro_step == micro_step:
            if kind == "loss alone":
                return value + math.inf, metrics  # its gradient is that of a good loss
            if kind == "gradient":
                # the loss is finite; one parameter's gradient is not: d/dx sqrt(x) at 0
                bias = run.network.proj_out.bias
                return value + torch.sqrt((bias - bias.detach()).square().sum()), metrics
            value = value * {"nan": math.nan, "inf": math.inf}[kind]
        return value, metrics

    loss.calls = calls
    return loss


def state(run) -> dict[str, torch.Tensor]:
    tensors = {name: value.clone() for name, value in run.network.state_dict().items()}
    for index, values in enumerate(run.optimizer.state.values()):
        tensors |= {f"optimizer/{index}/{key}": value.clone() for key, value in values.items()}
    return tensors


def train_until_it_stops(run, loss) -> tuple[dict, int | None]:
    """The state before update `BAD`, and the exit code (None if the run went to its end)."""
    before = {}
    try:
        for batch in run.batches():
            if run.step == BAD and not before:
                before = state(run)
            with run.accumulate():
                run.update(*loss(run, batch))
    except SystemExit as stop:
        return before, stop.code
    return before, None


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient", "loss alone"])
@pytest.mark.parametrize(("accumulation", "micro_step"), [(1, 0), (2, 0), (2, 1)])
def test_stop_names_step_and_samples_and_leaves_the_state_alone(
    tmp_path, flows, capsys, kind, accumulation, micro_step
):
    run = runs.open_run(tmp_path, flows, gradient_accumulation_steps=accumulation, max_train_steps=6)
    before, code = train_until_it_stops(run, poison(run, kind, micro_step))
    assert code == 3
    assert runs.differing(before, state(run)) == []
    per_update = 4 * accumulation
    samples = [int(key) for key in run.order.keys(BAD * per_update, per_update)]
    message = capsys.readouterr().err
    assert f"non-finite loss or gradient in update {BAD + 1}; its samples: {samples}" in message
    assert "last checkpoint: none" in message


def test_stop_is_exit_code_3_of_the_command_and_resuming_tries_again(tmp_path, monkeypatch, capsys):
    from trainers import train_shortcut

    compute_loss, samples = train_shortcut.compute_loss, []

    def poisoned(run, batch, config, teacher=None):
        loss, metrics = compute_loss(run, batch, config, teacher)
        if run.step == 3:
            samples.append(batch["class_labels"])
            loss = loss * math.nan
        return loss, metrics

    with monkeypatch.context() as patched:
        patched.setattr(train_shortcut, "compute_loss", poisoned)
        with pytest.raises(SystemExit) as exit_:
            runs.train(tmp_path, max_train_steps=5, checkpointing_steps=2)
    assert exit_.value.code == 3
    assert f"last checkpoint: {tmp_path / 'checkpoint-2'}" in capsys.readouterr().err
    runs.train(tmp_path, max_train_steps=5, resume_from_checkpoint="latest")
    assert checkpoints.find_latest(tmp_path).name == "checkpoint-5"


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["nan", "gradient"])
def test_skip_leaves_the_update_out_and_goes_on(tmp_path, flows, caplog, kind, accumulation):
    run = runs.open_run(
        tmp_path, flows, gradient_accumulation_steps=accumulation, max_train_steps=5, on_nonfinite="skip"
    )
    loss, before = poison(run, kind), None
    for batch in run.batches():
        if run.step == BAD and before is None:
            before = state(run)
        if run.step == BAD + 1 and run._micro_step == 0:
            assert runs.differing(before, state(run)) == []
        with run.accumulate():
            run.update(*loss(run, batch))
    assert run.step == 5
    assert f"in update {BAD + 1}" in caplog.text
    assert "skipped (1 so far)" in caplog.text
    assert len(runs.differing(before, state(run))) > 10  # it did go on
    assert all(torch.isfinite(value).all() for value in state(run).values())
    assert all(torch.isfinite(value).all() for value in run.ema.model.state_dict().values())
    runs.save_and_close(run)


def test_too_many_skips_end_the_run(tmp_path, flows, capsys):
    run = runs.open_run(tmp_path, flows, max_train_steps=9, on_nonfinite="skip", max_nonfinite_skips=3)
    done = []

    def always_nan(run, batch):
        loss, metrics = runs.flow_loss(run, batch)
        done.append(run.step)
        return loss * math.nan, metrics

    with pytest.raises(SystemExit) as exit_:
        runs.train_on(run, always_nan)
    assert exit_.value.code == 3
    assert len(done) == 4  # three are allowed
    assert "in update 4" in capsys.readouterr().err


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_flag_read_late_as_on_a_gpu_still_guards_the_weights(tmp_path, flows, capsys, caplog, policy):
    """On a GPU the flag is read at log points. Until then `stop` blocks every later update, `skip` only the bad one."""
    run = runs.open_run(tmp_path, flows, max_train_steps=8, logging_steps=6, on_nonfinite=policy)
    report = run._report_nonfinite
    run._report_nonfinite = lambda: report() if run.is_due(6) else None
    before, code = train_until_it_stops(run, poison(run, "nan"))
    samples = [int(key) for key in run.order.keys(BAD * 4, 4)]
    text = capsys.readouterr().err + caplog.text
    assert f"in update {BAD + 1}; its samples: {samples}" in text
    if policy == "stop":
        assert code == 3
        assert run.step == 6
        assert runs.differing(before, state(run)) == []
    else:
        assert code is None
        assert run.step == 8
        assert len(runs.differing(before, state(run))) > 10


def test_no_checkpoint_is_written_with_an_unread_flag(tmp_path, flows):
    """A save between the bad update and the log point reads the flag first."""
    run = runs.open_run(tmp_path, flows, max_train_steps=8, logging_steps=8, checkpointing_steps=4)
    report, save = run._report_nonfinite, run.save_checkpoint

    def save_and_report():
        run._report_nonfinite = report
        save()

    run._report_nonfinite, run.save_checkpoint = lambda: None, save_and_report
    _, code = train_until_it_stops(run, poison(run, "nan"))
    assert code == 3
    assert checkpoints.list_checkpoints(tmp_path) == []


@pytest.mark.parametrize("case", range(5))
def test_a_skipped_update_equals_one_that_was_never_made(tmp_path, flows, case):
    """Weights and moments after [good, bad, good] are those after [good, good] on the same gradients."""
    torch.manual_seed(case)
    gradients = [torch.randn(5, 3) for _ in range(3)]
    bad = gradients[1].clone()
    bad[random.Random(case).randrange(5), 0] = [math.nan, math.inf, -math.inf][case % 3]
    results = []
    for sequence in ([gradients[0], bad, gradients[2]], [gradients[0], gradients[2]]):
        parameter = torch.nn.Parameter(torch.ones(5, 3))
        optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
        for gradient in sequence:
            parameter.grad = gradient.clone()
            optimizer.found_inf = (~torch.isfinite(gradient).all()).float()
            optimizer.step()
        results.append({"parameter": parameter.detach(), **optimizer.state[parameter]})
    assert runs.differing(*results) == []


# ---- a state that is not finite, whatever the gradient is ----


def spoil(run, what: str) -> None:
    """One NaN in the state, as a fault of memory or of a kernel leaves it."""
    parameter = run.network.proj_out.weight
    target = {
        "moment": lambda: run.optimizer.state[parameter]["exp_avg"],
        "second moment": lambda: run.optimizer.state[parameter]["exp_avg_sq"],
        "weight": lambda: parameter,
        "average": lambda: run.ema.model.proj_out.weight,
    }[what]()
    with torch.no_grad():
        target.view(-1)[0] = math.nan


def train_and_spoil(run, what: str, at: int = 3) -> int | None:
    """The exit code; the state is spoilt after `at` updates."""
    check = run.validation(
        1, lambda model: ({"norm": float(model.proj_out.weight.norm())}, {}), lambda row: row["norm"]
    )
    try:
        for batch in run.batches():
            if run.step == at:
                spoil(run, what)
            with run.accumulate():
                run.update(*runs.flow_loss(run, batch))
            check()
        runs.save_and_close(run)
    except SystemExit as stop:
        return stop.code
    return None


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("what", ["moment", "second moment", "weight", "average"])
def test_no_checkpoint_with_a_nan_is_ever_written(tmp_path, flows, capsys, what, policy, every):
    """The run ends with exit code 3 and says what is spoilt; the last clean checkpoint is there to go on from."""
    settings = {"max_train_steps": 12, "checkpoints_total_limit": 1, "lr_scheduler": "cosine"}
    run = runs.open_run(tmp_path, flows, on_nonfinite=policy, checkpointing_steps=every, **settings)
    assert train_and_spoil(run, what) == 3
    message = capsys.readouterr().err
    assert json.loads((tmp_path / "exit.json").read_text()) == {"code": 3}
    found = checkpoints.list_checkpoints(tmp_path)
    assert f"last checkpoint: {found[0]}" in message
    assert checkpoints.step_of(found[0]) <= 3
    for path in found:
        assert checkpoints.verify(path) == []
        assert all(torch.isfinite(value).all() for value in runs.tensors_of(path).values())
    assert "the weights are those before it" not in message  # they are not
    spoilt = {"average": "ema", "weight": "model", "moment": "model", "second moment": "optimizer"}[what]
    assert spoilt in message.splitlines()[-1]

    again = runs.open_run(tmp_path, flows, resume_from_checkpoint="latest", **settings)
    runs.train_on(again)
    runs.save_and_close(again)
    assert checkpoints.verify(tmp_path / "checkpoint-12") == []
