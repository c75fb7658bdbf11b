"""Denoising losses: laws of the noise level, closed forms, and agreement with rectified flow and diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from pydantic import ValidationError

from objectives.denoising import diffusion_loss, draw_sigmas, flow_loss
from objectives.rectified_flow import flow_matching_loss
from objectives.settings import NoiseLevelConfig

CPU = torch.device("cpu")
TYPES = ("epsilon", "v_prediction", "sample")


def draw(count: int = 20_000, seed: int = 0, **settings) -> torch.Tensor:
    torch.manual_seed(seed)
    return draw_sigmas(count, NoiseLevelConfig(**settings), CPU)


def batch(size: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    noise, data = torch.randn(2, size, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return noise, 0.3 * data - 1


class Network:
    """Answers as told and keeps what it was asked."""

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, noisy, timesteps, conditions):
        self.noisy, self.timesteps, self.conditions = noisy, timesteps, conditions
        return self.answer(noisy, timesteps)


# --- noise levels -----------------------------------------------------------------------------------


def test_uniform_levels_fill_the_unit_interval(monkeypatch):
    sigmas = draw()
    assert sigmas.shape == (20_000,)
    assert sigmas.min() > 0
    assert sigmas.max() <= 1
    share = torch.histc(sigmas, 10, 0, 1) / len(sigmas)
    torch.testing.assert_close(share, torch.full((10,), 0.1), atol=0.01, rtol=0)
    monkeypatch.setattr(torch, "rand", lambda *size, device: torch.zeros(*size))  # once in 2^24 draws
    assert draw(4).tolist() == [1.0] * 4


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.5, 0.5)])
def test_logit_normal_levels_have_the_moments_given(mean, std):
    sigmas = draw(timestep_sampling="logit_normal", logit_mean=mean, logit_std=std)
    assert sigmas.min() > 0
    assert sigmas.max() <= 1
    logits = torch.logit(sigmas)
    assert float(logits.mean()) == pytest.approx(mean, abs=0.03)
    assert float(logits.std()) == pytest.approx(std, abs=0.03)
    skew = ((logits - mean) / std).pow(3).mean()
    assert float(skew) == pytest.approx(0, abs=0.1)


def test_discrete_levels_come_equally_often():
    sigmas = draw(timestep_sampling="discrete")
    levels, counts = sigmas.unique(return_counts=True)
    assert levels.tolist() == [0.25, 0.5, 0.75, 1.0]
    torch.testing.assert_close(counts / len(sigmas), torch.full((4,), 0.25), atol=0.015, rtol=0)
    levels = draw(500, timestep_sampling="discrete", discrete_sigmas=[0.9, 0.1]).unique()
    torch.testing.assert_close(levels, torch.tensor([0.1, 0.9]))


@pytest.mark.parametrize("law", ["uniform", "logit_normal", "discrete"])
def test_a_share_is_pure_noise(law):
    settings = {"timestep_sampling": law, "discrete_sigmas": [0.25, 0.5]}
    sigmas = draw(**settings, pure_noise_prob=0.3)
    assert float((sigmas == 1).float().mean()) == pytest.approx(0.3, abs=0.015)
    assert (draw(**settings, pure_noise_prob=1.0) == 1).all()
    assert (draw(**settings) == 1).float().mean() < 1e-3
    # the others keep their law
    others = sigmas[sigmas < 1]
    assert float(others.mean()) == pytest.approx(float(draw(**settings, seed=1).mean()), abs=0.015)


@pytest.mark.parametrize("law", ["uniform", "logit_normal", "discrete"])
def test_levels_are_a_function_of_the_seed(law):
    settings = {"timestep_sampling": law, "pure_noise_prob": 0.2}
    assert torch.equal(draw(64, 3, **settings), draw(64, 3, **settings))
    assert not torch.equal(draw(64, 3, **settings), draw(64, 4, **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timestep_sampling": "cosine"}, "'uniform', 'logit_normal' or 'discrete'"),
        ({"logit_std": 0}, "greater than 0"),
        ({"pure_noise_prob": 1.1}, "less than or equal to 1"),
        ({"pure_noise_prob": -0.1}, "greater than or equal to 0"),
        ({"discrete_sigmas": []}, "at least 1 item"),
        ({"discrete_sigmas": [0.0, 1.0]}, r"`discrete_sigmas` must lie in \(0, 1\], got \[0.0, 1.0\]"),
        ({"discrete_sigmas": [0.5, 1.5]}, r"`discrete_sigmas` must lie in \(0, 1\], got \[0.5, 1.5\]"),
        ({"t1_prob": 0.5}, "Extra inputs are not permitted"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        NoiseLevelConfig(**settings)


# --- rectified flow ---------------------------------------------------------------------------------


def test_the_exact_flow_has_no_loss_and_finds_the_data():
    noise, data = batch()
    sigmas = torch.linspace(0.01, 1, 16)
    network = Network(lambda *_: noise - data)
    loss, clean = flow_loss(network, noise, data, sigmas, {}, 1000)
    assert loss == 0
    torch.testing.assert_close(clean, data, atol=1e-6, rtol=0)
    # ... and a wrong one has: off by 0.5 everywhere
    loss, clean = flow_loss(Network(lambda *_: noise - data + 0.5), noise, data, sigmas, {}, 1000)
    assert float(loss) == pytest.approx(0.25)
    torch.testing.assert_close(clean, data - 0.5 * sigmas.reshape(-1, 1, 1, 1))


def test_what_the_network_is_given():
    noise, data = batch(4)
    sigmas, conditions = torch.tensor([1.0, 0.75, 0.25, 1.0]), {"mask": torch.rand(4, 1, 4, 4)}
    network = Network(lambda noisy, _: noisy)
    flow_loss(network, noise, data, sigmas, conditions, 1000)
    assert network.timesteps.tolist() == [1000, 750, 250, 1000]
    assert network.conditions is conditions
    # at sigma = 1 there is noise alone, and nowhere is any noise added on top of the given
    assert torch.equal(network.noisy[0], noise[0])
    assert torch.equal(network.noisy[3], noise[3])
    torch.testing.assert_close(network.noisy[1], 0.75 * noise[1] + 0.25 * data[1])
    torch.testing.assert_close(network.noisy[2], 0.25 * noise[2] + 0.75 * data[2])
    flow_loss(network, noise, data, sigmas, conditions, 8)
    assert network.timesteps.tolist() == [8, 6, 2, 8]


def test_losses_take_no_random_numbers():
    noise, data = batch()
    sigmas, network = torch.rand(16) * 0.9 + 0.1, Network(lambda noisy, _: noisy)
    state = torch.random.get_rng_state()
    first = flow_loss(network, noise, data, sigmas, {}, 1000)[0]
    assert torch.equal(first, flow_loss(network, noise, data, sigmas, {}, 1000)[0])
    for kind in TYPES:
        diffusion_loss(network, noise, data, sigmas, {}, kind, schedule().alphas_cumprod)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_flow_is_rectified_flow_with_time_reversed():
    noise, data = batch()
    sigmas = torch.rand(16, generator=torch.Generator().manual_seed(1)) * 0.99 + 0.01
    weights = torch.randn(3, 3, generator=torch.Generator().manual_seed(2))

    def answer(x, timesteps):
        return torch.einsum("bchw,cd->bdhw", x, weights) * (1 + timesteps / 1000).reshape(-1, 1, 1, 1)

    def backward_in_time(x, t, step_size, conditions):
        return -answer(x, 1000 * (1 - t))

    loss, _ = flow_loss(Network(answer), noise, data, sigmas, {}, 1000)
    other, _ = flow_matching_loss(backward_in_time, noise, data, 1 - sigmas, {}, step_size=0.0, path_eps=0.0)
    torch.testing.assert_close(loss, other)
    assert loss > 0.1


def test_weighed_by_sigma_squared_it_is_the_error_of_the_clean_data():
    noise, data = batch()
    sigmas = torch.linspace(0.05, 1, 16)
    network = Network(lambda noisy, _: 0.3 * noisy)
    loss, clean = flow_loss(network, noise, data, sigmas, {}, 1000, loss_weighting="sigma_squared")
    torch.testing.assert_close(loss, (clean - data).square().mean())
    plain, same = flow_loss(network, noise, data, sigmas, {}, 1000)
    assert torch.equal(clean, same)
    assert float(plain) > 1.5 * float(loss)


def test_half_precision_outputs_are_compared_in_float32():
    noise, data = batch()
    exact = Network(lambda *_: (noise - data).bfloat16())
    loss, _ = flow_loss(exact, noise, data, torch.full((16,), 0.5), {}, 1000)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, ((noise - data).bfloat16().float() - (noise - data)).square().mean())


# --- diffusion --------------------------------------------------------------------------------------


def schedule() -> DDPMScheduler:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@pytest.mark.parametrize("kind", TYPES)
def test_diffusion_agrees_with_diffusers(kind):
    noise, data = batch()
    scheduler = schedule()
    timesteps = torch.tensor([0, 1, 2, 100, 250, 333, 499, 500, 501, 749, 750, 900, 997, 998, 999, 999])
    sigmas = (timesteps + 1) / 1000
    wrong = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    network = Network(lambda *_: wrong)
    loss, _ = diffusion_loss(network, noise, data, sigmas, {}, kind, scheduler.alphas_cumprod)
    assert torch.equal(network.timesteps, timesteps)
    torch.testing.assert_close(network.noisy, scheduler.add_noise(data, noise, timesteps))
    target = {"epsilon": noise, "v_prediction": scheduler.get_velocity(data, noise, timesteps), "sample": data}[kind]
    torch.testing.assert_close(loss, (wrong - target).square().mean())

    # the true answer has no loss and gives the data back
    loss, clean = diffusion_loss(Network(lambda *_: target), noise, data, sigmas, {}, kind, scheduler.alphas_cumprod)
    assert loss < 1e-10
    torch.testing.assert_close(clean, data, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", TYPES)
def test_the_clean_data_of_a_wrong_answer_are_diffusers_own(kind):
    noise, data = batch()
    scheduler = DDPMScheduler.from_config(schedule().config, prediction_type=kind, clip_sample=False)
    timesteps = torch.arange(16) * 60 + 50
    answer = 0.5 * batch(seed=3)[0]
    network = Network(lambda *_: answer)
    _, clean = diffusion_loss(network, noise, data, (timesteps + 1) / 1000, {}, kind, scheduler.alphas_cumprod)
    expected = [
        scheduler.step(answer[i], int(t), network.noisy[i]).pred_original_sample for i, t in enumerate(timesteps)
    ]
    torch.testing.assert_close(clean, torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_levels_point_to_steps_of_any_schedule():
    noise, data = batch(6)
    network = Network(lambda noisy, _: noisy)
    alphas_cumprod = torch.linspace(0.9, 0.1, 4)
    sigmas = torch.tensor([1e-9, 0.25, 0.2501, 0.5, 0.75001, 1.0])
    diffusion_loss(network, noise, data, sigmas, {}, "sample", alphas_cumprod)
    assert network.timesteps.tolist() == [0, 0, 1, 1, 3, 3]
    assert network.timesteps.dtype == torch.long
    # uniform levels use every step equally often
    sigmas = draw(40_000)
    noise = data = torch.zeros(40_000, 1)
    diffusion_loss(network, noise, data, sigmas, {}, "sample", alphas_cumprod)
    share = network.timesteps.bincount(minlength=4) / 40_000
    torch.testing.assert_close(share, torch.full((4,), 0.25), atol=0.01, rtol=0)


def test_an_unknown_prediction_type_is_refused():
    noise, data = batch(2)
    with pytest.raises(ValueError, match="`prediction_type` must be 'epsilon', 'v_prediction' or 'sample', got 'v'"):
        diffusion_loss(Network(lambda x, _: x), noise, data, torch.ones(2), {}, "v", schedule().alphas_cumprod)


@pytest.mark.parametrize("kind", ["flow", *TYPES])
def test_gradients_flow_through_loss_and_clean_data(kind):
    noise, data = batch()
    weight = torch.tensor(0.3, requires_grad=True)
    sigmas = torch.linspace(0.1, 1, 16)

    def losses():
        network = Network(lambda noisy, _: weight * noisy)
        if kind == "flow":
            return flow_loss(network, noise, data, sigmas, {}, 1000)
        return diffusion_loss(network, noise, data, sigmas, {}, kind, schedule().alphas_cumprod)

    (gradient,) = torch.autograd.grad(losses()[0], weight)
    with torch.no_grad():  # the loss is a parabola in the weight: central differences are exact
        weight += 0.1
        above = losses()[0]
        weight -= 0.2
        below = losses()[0]
        weight += 0.1
    torch.testing.assert_close(gradient, (above - below) / 0.2, atol=1e-4, rtol=1e-3)
    assert gradient.abs() > 1e-3
    (gradient,) = torch.autograd.grad((losses()[1] - data).square().mean(), weight)
    assert gradient.isfinite()
    assert gradient.abs() > 1e-4
