"""What TrainingRun promises about an update: accumulation, counting, host synchronisations, the finished run."""

from __future__ import annotations

import pytest
import runs
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.shortcut import ShortcutDiT

HOST_SYNCS = {"_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select", "unique2"}


class CountHostSyncs(TorchDispatchMode):
    """Counts operators for which a GPU would have to wait."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in HOST_SYNCS:
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 2), (2, 4), (1, 8)])
def test_accumulation_gives_the_weights_of_the_large_batch(tmp_path, flows, batch_size, accumulation):
    # A large epsilon: Adam otherwise turns rounding of tiny gradients into steps of full size.
    settings = {"max_train_steps": 5, "learning_rate": 1e-2, "adam_epsilon": 1e-3, "max_grad_norm": 0.5}
    results = []
    for name, size, steps in (("large", 8, 1), ("small", batch_size, accumulation)):
        run = runs.open_run(
            tmp_path / name, flows, train_batch_size=size, gradient_accumulation_steps=steps, **settings
        )
        runs.train_on(run)
        assert (run.step, run.consumed_samples) == (5, 40)
        results.append((run.network.state_dict(), run.ema.model.state_dict()))
        runs.save_and_close(run)
    for large, small in zip(*results, strict=True):
        for name, value in large.items():
            torch.testing.assert_close(small[name], value, rtol=0, atol=1e-6, msg=name)


def test_rows_are_means_over_the_micro_batches(tmp_path, flows):
    for name, size, steps in (("large", 8, 1), ("small", 2, 4)):
        run = runs.open_run(
            tmp_path / name, flows, train_batch_size=size, gradient_accumulation_steps=steps, logging_steps=2
        )
        runs.train_on(run)
        runs.save_and_close(run)
    large, small = (runs.rows_of(tmp_path / name) for name in ("large", "small"))
    assert [row["step"] for row in large] == [2, 4]
    for a, b in zip(large, small, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_steps_are_updates_and_due_only_after_one(tmp_path, flows):
    run = runs.open_run(tmp_path / "run", flows, gradient_accumulation_steps=3, max_train_steps=4)
    due = []
    for micro_step, batch in enumerate(run.batches()):
        with run.accumulate():
            run.update(*runs.flow_loss(run, batch))
        due.append(run.is_due(2))
        assert run.step == (micro_step + 1) // 3
        assert not run.is_due(None)
    assert due == [False] * 5 + [True] + [False] * 5 + [True]
    runs.save_and_close(run)


def test_the_gradient_is_clipped_and_its_norm_before_that_is_logged(tmp_path, flows):
    run = runs.open_run(tmp_path / "run", flows, max_grad_norm=1e-4, logging_steps=1, max_train_steps=1)
    for batch in run.batches():
        with run.accumulate():
            loss, metrics = runs.flow_loss(run, batch)
            expected = torch.autograd.grad(loss, list(run.network.parameters()), retain_graph=True, allow_unused=True)
            run.update(loss, metrics)
    norm = torch.cat([g.flatten() for g in expected if g is not None]).norm().item()
    assert runs.rows_of(tmp_path / "run")[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    moments = [state["exp_avg"] for state in run.optimizer.state.values()]
    # after one update the first moment is 0.1 of the clipped gradient
    assert torch.cat([m.flatten() for m in moments]).norm().item() == pytest.approx(1e-5, rel=1e-3)
    runs.save_and_close(run)


def test_no_host_synchronisation_between_log_points(tmp_path, flows):
    """On a CPU the run reads its non-finite flag after each update, where that is free; on a GPU at log points only.

    The one `int(...)` of that report is taken away between log points, as on a GPU; nothing else may synchronise.
    """
    run = runs.open_run(tmp_path / "run", flows, gradient_accumulation_steps=2, max_train_steps=9, logging_steps=5)
    report, counted = run._report_nonfinite, {}
    run._report_nonfinite = lambda: report() if run.is_due(run.training.logging_steps) else None
    for batch in run.batches():
        loss_of = runs.flow_loss(run, batch)
        with CountHostSyncs() as counter, run.accumulate():
            run.update(*loss_of)
        counted.setdefault(run.step, []).extend(counter.seen)
    runs.save_and_close(run)
    at_log_points = counted.pop(5)
    assert "_local_scalar_dense" in at_log_points  # the counter works
    assert counted == {0: [], 1: [], 2: [], 3: [], 4: [], 6: [], 7: [], 8: [], 9: []}


def test_the_counter_sees_what_it_should():
    with CountHostSyncs() as counter:
        x = torch.ones(3)
        float(x.sum())
        x.sum().item()
        bool(x.any())
        x.nonzero()
        int(x.sum())
    assert len(counter.seen) == 5


def test_without_ema_the_live_weights_serve(tmp_path, flows):
    run = runs.open_run(tmp_path / "run", flows, use_ema=False, max_train_steps=2)
    runs.train_on(run)
    assert run.ema is None
    assert run.inference_model is run.network
    runs.save_and_close(run)
    assert not (tmp_path / "run/checkpoint-2/ema.safetensors").exists()
    again = runs.open_run(tmp_path / "run", flows, use_ema=False, max_train_steps=4, resume_from_checkpoint="latest")
    assert again.step == 2
    runs.save_and_close(again)


def test_ema_is_restored_with_its_values(tmp_path, flows):
    run = runs.open_run(tmp_path / "run", flows, ema_decay=0.5, max_train_steps=3)
    runs.train_on(run)
    expected = {name: value.clone() for name, value in run.ema.model.state_dict().items()}
    assert not torch.equal(expected["proj_out.weight"], run.network.state_dict()["proj_out.weight"])
    runs.save_and_close(run)
    again = runs.open_run(tmp_path / "run", flows, ema_decay=0.5, max_train_steps=6, resume_from_checkpoint="latest")
    for name, value in again.ema.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    runs.save_and_close(again)


def test_the_ramp_of_the_ema_counts_updates_also_after_a_resume(tmp_path, flows):
    expected, settings = None, {"ema_decay": 0.3, "ema_ramp": True, "max_train_steps": 3}
    for extra in ({}, {"max_train_steps": 6, "resume_from_checkpoint": "latest"}):
        run = runs.open_run(tmp_path / "run", flows, **settings | extra)
        if expected is None:
            expected = run.network.proj_out.weight.detach().clone()
        for batch in run.batches():
            n = run.step
            with run.accumulate():
                run.update(*runs.flow_loss(run, batch))
            decay = min(0.3, (1 + n) / (10 + n))
            expected = decay * expected + (1 - decay) * run.network.proj_out.weight.detach()
        torch.testing.assert_close(run.ema.model.proj_out.weight, expected)
        runs.save_and_close(run)


def test_the_optimiser_settings_are_those_of_the_configuration_after_a_resume(tmp_path, flows):
    run = runs.open_run(tmp_path / "run", flows, max_train_steps=2, lr_scheduler="cosine")
    runs.train_on(run)
    runs.save_and_close(run)
    changed = {"adam_weight_decay": 0.5, "adam_beta2": 0.5, "learning_rate": 7e-4, "lr_scheduler": "constant"}
    again = runs.open_run(tmp_path / "run", flows, resume_from_checkpoint="latest", **changed)
    group = again.optimizer.param_groups[0]
    assert (group["weight_decay"], group["betas"][1], group["lr"]) == (0.5, 0.5, 7e-4)
    runs.save_and_close(again)


def test_noise_is_a_function_of_the_position_and_of_nothing_that_happened(tmp_path, flows):
    noises = []
    for name, disturbed in (("calm", False), ("disturbed", True)):
        run = runs.open_run(tmp_path / name, flows, gradient_accumulation_steps=2, max_train_steps=3)
        noises.append([])
        for batch in run.batches():
            noises[-1].append(torch.rand(1).item())
            with run.accumulate():
                run.update(*runs.flow_loss(run, batch))
            if disturbed:
                torch.rand(len(noises[-1]))
        runs.save_and_close(run)
    assert noises[0] == noises[1]
    assert len(set(noises[0])) == 6


def test_further_modules_are_part_of_the_state(tmp_path, flows):
    from trainers.common import TrainingRun, create_accelerator
    from trainers.common.config import RunConfig

    def open_with_teacher(value: float, **training) -> tuple[TrainingRun, torch.nn.Module]:
        runs.reset_accelerate()
        values = {"output_dir": tmp_path / "run", "max_train_steps": 2, "train_batch_size": 2, "report_to": []}
        config = RunConfig(training={**values, **training})
        teacher = torch.nn.Linear(2, 2).requires_grad_(False)
        torch.nn.init.constant_(teacher.weight, value)
        network = ShortcutDiT(8, 1, 2, hidden_size=16, num_layers=1, num_attention_heads=2, num_classes=10)
        accelerator = create_accelerator(config)
        return TrainingRun(accelerator, config, model=network, dataset=flows, modules={"teacher": teacher}), teacher

    run, _ = open_with_teacher(3.0)
    run.resume()
    runs.train_on(run)
    runs.save_and_close(run)
    again, teacher = open_with_teacher(0.0, resume_from_checkpoint="latest")
    again.resume()
    assert (teacher.weight == 3.0).all()
    runs.save_and_close(again)


def test_gradient_checkpointing_changes_nothing(tmp_path, flows):
    for name, value in (("off", False), ("on", True)):
        run = runs.open_run(tmp_path / name, flows, gradient_checkpointing=value, max_train_steps=2)
        runs.train_on(run)
        runs.save_and_close(run)
    results = [runs.tensors_of(tmp_path / name / "checkpoint-2") for name in ("off", "on")]
    assert runs.differing(*results) == []


def test_an_attention_backend_that_cannot_run_is_refused_at_the_start(tmp_path, flows, capsys):
    with pytest.raises(SystemExit) as exit_:
        runs.open_run(tmp_path / "run", flows, attention_backend="flash")
    assert exit_.value.code == 2
    assert "attention_backend flash does not work" in capsys.readouterr().err


def test_another_process_count_than_expected_is_refused(tmp_path, flows, capsys):
    with pytest.raises(SystemExit) as exit_:
        runs.open_run(tmp_path / "run", flows, expected_processes=2)
    assert exit_.value.code == 2
    assert "training.expected_processes is 2, the launch configuration starts 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_accumulation_in_the_launch_configuration_is_refused(tmp_path, flows, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    with pytest.raises(SystemExit) as exit_:
        runs.open_run(tmp_path / "run", flows)
    assert exit_.value.code == 2
    assert "leave it out of the launch configuration" in capsys.readouterr().err


def test_bf16_trains_and_keeps_float32_weights(tmp_path, flows):
    run = runs.open_run(tmp_path / "run", flows, mixed_precision="bf16", max_train_steps=2)
    runs.train_on(run)
    assert {p.dtype for p in run.network.parameters()} == {torch.float32}
    runs.save_and_close(run)
