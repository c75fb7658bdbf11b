"""The pipeline of the flow on points: round trip, determinism, batches, step callbacks, refusals."""

from __future__ import annotations

import pytest
import torch

from pipelines.point_flow import PointFlowNetwork, PointFlowPipeline, create_scheduler


@pytest.fixture
def pipeline():
    torch.manual_seed(0)
    pipeline = PointFlowPipeline(PointFlowNetwork(hidden_size=16, num_layers=2).eval(), create_scheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_saved_pipeline_gives_the_same_points(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    again = PointFlowPipeline.from_pretrained(tmp_path)
    latents = torch.randn(5, 2)
    assert torch.equal(again(5, 3, latents=latents).points, pipeline(5, 3, latents=latents).points)


def test_a_batch_is_its_points_one_by_one(pipeline):
    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(4)]

    together = pipeline(4, 3, generator=generators()).points
    alone = torch.cat([pipeline(1, 3, generator=generator).points for generator in generators()])
    assert (together - alone).norm() <= 1e-6 * alone.norm()
    assert torch.equal(pipeline(4, 3, generator=generators()).points, together)


def test_one_step_is_noise_minus_the_velocity(pipeline):
    latents = torch.randn(3, 2)
    velocity = pipeline.network(latents, torch.full((3,), 1000.0)).sample
    torch.testing.assert_close(pipeline(3, 1, latents=latents).points, latents - velocity)


def test_steps_are_equal_and_a_callback_can_change_them(pipeline):
    times = []

    def restart(pipeline, index, timestep, tensors):
        times.append(float(timestep))
        return {"latents": torch.zeros_like(tensors["latents"])}

    points = pipeline(2, 4, callback_on_step_end=restart, output_type="np", return_dict=False)[0]
    assert times == [1000.0, 750.0, 500.0, 250.0]
    assert (points == 0).all()


def test_gradient_checkpointing_changes_nothing(pipeline):
    gradients = []
    for checkpointing in (False, True):
        network = PointFlowNetwork.from_config(pipeline.network.config).train()
        network.load_state_dict(pipeline.network.state_dict())
        if checkpointing:
            network.enable_gradient_checkpointing()
        network(torch.ones(3, 2), torch.tensor([0.0, 500.0, 1000.0])).sample.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_points": 0}, "`num_points` must be at least 1, got 0"),
        ({"num_inference_steps": 1001}, r"`num_inference_steps` must be in \[1, 1000\], got 1001"),
        ({"latents": torch.ones(2, 2)}, r"`latents` must have shape \(1, 2\), got \(2, 2\)"),
        ({"generator": [torch.Generator()] * 2}, "`generator` must be one or 1, got 2"),
        ({"output_type": "pil"}, "`output_type` must be 'pt' or 'np', got 'pil'"),
        ({"callback_on_step_end_tensor_inputs": ["points"]}, r"among \['latents'\], got \['points'\]"),
    ],
)
def test_wrong_arguments(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)
