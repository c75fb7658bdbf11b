"""What only a GPU can show (make test-gpu): no host synchronisation between log points, non-finite updates gated on the
device, bf16, sampling in half precision."""

from __future__ import annotations

import pytest
import runs
import torch

from pipelines.shortcut import ShortcutPipeline

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_updates_between_log_points_do_not_wait_for_the_device(tmp_path, flows):
    run = runs.open_run(tmp_path / "run", flows, max_train_steps=8, logging_steps=100, checkpointing_steps=100)
    torch.cuda.set_sync_debug_mode("error")
    try:
        runs.train_on(run)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.step == 8
    runs.save_and_close(run)


def test_a_non_finite_update_found_at_the_log_point_left_the_weights_alone(tmp_path, flows, capsys):
    run = runs.open_run(tmp_path / "run", flows, max_train_steps=8, logging_steps=4, max_grad_norm=None)
    before = {}

    def loss(run, batch):
        if run.step == 2:
            before.update({name: value.clone() for name, value in run.network.state_dict().items()})
        value, metrics = runs.flow_loss(run, batch)
        return value * (torch.nan if run.step == 2 else 1), metrics

    with pytest.raises(SystemExit) as exit_:
        runs.train_on(run, loss)
    assert exit_.value.code == 3
    assert "in update 3; its samples" in capsys.readouterr().err
    after = run.network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_bf16_resumes_where_it_stopped_and_samples_in_half_precision(tmp_path):
    settings = {"mixed_precision": "bf16", "checkpointing_steps": 3, "checkpoints_total_limit": None}
    runs.train(tmp_path / "straight", max_train_steps=6, **settings)
    runs.train(tmp_path / "resumed", max_train_steps=3, **settings)
    runs.train(tmp_path / "resumed", max_train_steps=6, resume_from_checkpoint="latest", **settings)
    weights = [runs.tensors_of(tmp_path / name / "checkpoint-6") for name in ("straight", "resumed")]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-4, msg=name)
    pipeline = ShortcutPipeline.from_pretrained(tmp_path / "resumed", torch_dtype=torch.float16)
    pipeline.enable_model_cpu_offload()
    assert len(pipeline([3, 7], num_inference_steps=2, guidance_scale=2.0).images) == 2
