"""The Monte Carlo pose loss."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pose_scenes import look_from, pose_batch
from scipy import stats
from scipy.spatial.transform import Rotation

from backlot.cameras import project, rotation_angle, transform
from backlot.pose_solver import find_pose, pose_cost, pose_problem, to_rows
from objectives import epropnp
from objectives.epropnp import (
    Points,
    Proposal,
    draw,
    draw_points,
    find_optimum,
    fit_proposal,
    log_acg,
    log_student_t,
    negative_log_likelihood,
    sample_poses,
)
from objectives.pose_labels import build_labels
from objectives.pose_settings import EProPnPConfig, LabelConfig

CONFIG = EProPnPConfig(enabled=True)
SIZE = 112


def summed(found):
    """Terms of all queries together: pairs of sum and number."""
    terms, metrics = found
    return {name: sums.sum(0) for name, sums in terms.items()}, metrics


def epropnp_loss(*given, **named):
    return summed(epropnp.epropnp_loss(*given, **named))


def epropnp_term(*given, **named):
    return summed(epropnp.epropnp_term(*given, **named))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spd(size: int, seed: int) -> torch.Tensor:
    root = torch.randn(size, size, generator=seeded(seed))
    return root @ root.T + 0.3 * torch.eye(size)


def noisy_points(batch: int = 4, count: int = 96, outliers: int = 0, noise: float = 0.5) -> tuple[Points, dict]:
    generator = seeded(3)
    x3d = 0.04 * torch.randn(batch, count, 3, generator=generator)
    directions = np.random.default_rng(0).normal(size=(batch, 3))
    pose = torch.stack([look_from(direction, 0.5) for direction in directions]).float()
    K = torch.tensor([[500.0, 0, 55.5], [0, 500, 55.5], [0, 0, 1]]).expand(batch, 3, 3)
    x2d = project(K, transform(pose, x3d)) + noise * torch.randn(batch, count, 2, generator=generator)
    x2d[:, :outliers] += 40 * torch.randn(batch, outliers, 2, generator=generator)
    w2d = torch.full_like(x2d, CONFIG.weight_scale / count)
    return Points(x3d, x2d, w2d), {"K": K, "pose_gt": pose, "diameter": torch.full((batch,), 0.12)}


def network_output(labels, scale: float = 0.1) -> SimpleNamespace:
    """The labels' own flow, as leaves that gradients reach."""
    return SimpleNamespace(
        flow=labels.dense_flow.clone().requires_grad_(),
        scale=torch.full(labels.dense_flow.shape[:-1], scale, requires_grad=True),
    )


# ---- laws ----


def test_students_t_is_scipys():
    spread, mean = spd(3, 0), torch.tensor([0.1, -0.2, 0.7])
    x = torch.randn(7, 1, 3, generator=seeded())
    ours = log_student_t(x, mean[None], torch.linalg.cholesky(spread)[None])[:, 0]
    theirs = stats.multivariate_t(mean.numpy(), spread.numpy(), df=3).logpdf(x[:, 0].numpy())
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_the_angular_gaussian_is_a_density_on_the_whole_sphere():
    factor = torch.linalg.cholesky(spd(4, 1))[None]
    quat = torch.nn.functional.normalize(torch.randn(200_000, 1, 4, generator=seeded()), dim=-1)
    area = 2 * np.pi**2
    assert abs(log_acg(quat, factor).exp().mean().item() * area - 1) < 0.02
    torch.testing.assert_close(log_acg(quat[:5], factor), log_acg(-quat[:5], factor))


def test_draws_follow_their_law_and_the_fit_finds_it():
    matrix = spd(4, 2)
    proposal = Proposal(torch.tensor([[0.1, 0.2, 3.0]]), 0.1 * torch.eye(3)[None], torch.linalg.cholesky(matrix)[None])
    rows = draw(proposal, 20_000, seeded())
    fitted = fit_proposal(rows, torch.zeros(rows.shape[:2]))
    assert (fitted.mean - proposal.mean).abs().max() < 0.01
    found = fitted.acg_factor[0] @ fitted.acg_factor[0].T
    assert (matrix / matrix.trace() - found / found.trace()).abs().max() < 0.03
    median = ((rows[:, 0, 0] - 0.1) / 0.1).abs().median().item()
    assert abs(median - stats.t(df=3).ppf(0.75)) < 0.03
    theirs = np.cov(rows[:, 0, :3].numpy().T, ddof=0)
    np.testing.assert_allclose(fitted.factor[0] @ fitted.factor[0].T, theirs, rtol=1e-2, atol=1e-3)


# ---- the integral ----


@pytest.mark.parametrize(("count", "sharpness"), [(24, 0.2), (96, 1.0)])
def test_the_integral_is_laplaces_where_the_density_is_narrow(count, sharpness):
    """int exp(-E) = 2 (2 pi)^3 |J^T J|^(-1/2) exp(-E*): twice, for q and -q are one pose."""
    points, others = noisy_points(1, count)
    problem = pose_problem(points.x3d / 0.12, points.x2d, sharpness * points.w2d, others["K"], 0.1)
    truth = to_rows(others["pose_gt"])
    truth = torch.cat([truth[:, :3] / 0.12, truth[:, 3:]], dim=-1)
    optimum, jtj = find_optimum(problem, truth, 10, seeded())
    integral = np.log(2) + 3 * np.log(2 * np.pi) - torch.logdet(jtj) / 2 - pose_cost(problem, optimum)
    expected = (pose_cost(problem, truth) + integral).item()
    samples = [sample_poses(problem, optimum, jtj, CONFIG, seeded(seed)) for seed in range(6)]
    values = torch.cat([negative_log_likelihood(problem, truth, *sample) for sample in samples])
    assert abs(values.mean().item() - expected) < 0.15
    assert values.std() < 0.3


def test_the_loss_is_least_at_the_truth():
    points, others = noisy_points()
    right = epropnp_loss(points, **others, config=CONFIG, generator=seeded())[0]["pose"]
    wrong = others["pose_gt"].clone()
    wrong[:, :3, :3] = (
        wrong[:, :3, :3] @ torch.from_numpy(Rotation.from_euler("x", 10, degrees=True).as_matrix()).float()
    )
    far = epropnp_loss(points, others["K"], wrong, others["diameter"], CONFIG, seeded())[0]["pose"]
    assert right[1] == far[1] == 4
    assert far[0] / 4 > right[0] / 4 + 10
    sharper = points._replace(x2d=noisy_points(noise=0.0)[0].x2d)
    assert epropnp_loss(sharper, **others, config=CONFIG, generator=seeded())[0]["pose"][0] < right[0]


def test_units_do_not_matter():
    points, others = noisy_points()
    loss = epropnp_loss(points, **others, config=CONFIG, generator=seeded())[0]
    pose = others["pose_gt"].clone()
    pose[:, :3, 3] *= 1000
    scaled = points._replace(x3d=1000 * points.x3d)
    other = epropnp_loss(scaled, others["K"], pose, 1000 * others["diameter"], CONFIG, seeded())[0]
    for name in loss:
        torch.testing.assert_close(other[name], loss[name], rtol=2e-2, atol=2e-2)


# ---- pitfall 7 ----


def test_the_loss_is_not_zero_and_reaches_flow_and_confidence():
    batch = pose_batch(2, 3, SIZE) | {"template_types": torch.tensor([[0, 0, 1]] * 2)}
    labels = build_labels(batch, 8, LabelConfig())
    output = network_output(labels)
    with torch.no_grad():
        output.flow.add_(0.1 * torch.randn(output.flow.shape, generator=seeded()))
    log_scale = torch.tensor(3.0, requires_grad=True)
    terms, metrics = epropnp_term(output, labels, batch, CONFIG, log_scale, seeded())
    assert {name: pair[1].item() for name, pair in terms.items()} == {
        "pose": 2,
        "pose_translation": 2,
        "pose_rotation": 2,
    }
    for name, pair in terms.items():
        assert pair[0].abs() > 1e-7, name
        gradients = torch.autograd.grad(pair[0], [output.flow, output.scale, log_scale], retain_graph=True)
        for gradient in gradients:
            assert torch.isfinite(gradient).all()
            assert gradient.abs().max() > 0
        assert gradients[0][:, 2].abs().max() == 0  # the negative template takes no part
    assert [pair[0].item() for pair in metrics.values()] == [0, 0]


def test_descent_on_the_loss_takes_weight_from_outliers():
    points, others = noisy_points(2, 48, outliers=6, noise=1.0)
    logits = torch.zeros(2, 48, requires_grad=True)
    config = CONFIG.model_copy(update={"samples": 64, "rounds": 3})
    losses = []
    for _ in range(12):
        weights = config.weight_scale * logits.softmax(1)[..., None].expand(-1, -1, 2)
        terms, _ = epropnp_loss(points._replace(w2d=weights), **others, config=config, generator=seeded())
        losses.append(terms["pose"][0].item() / 2)
        [gradient] = torch.autograd.grad(terms["pose"][0], logits)
        with torch.no_grad():
            logits -= 0.2 * gradient.sign()
    assert losses[-1] < losses[0] - 1
    share = logits.detach().softmax(1)
    assert share[:, :6].mean() < 0.7 * share[:, 6:].mean()


def test_labels_recover_the_pose_with_twelve_gross_outliers_of_96():
    batch = pose_batch(3, 4, SIZE)
    labels = build_labels(batch, 8, LabelConfig())
    config = CONFIG.model_copy(update={"num_points": 96})
    points = draw_points(network_output(labels), labels, config, torch.ones(3, 4, dtype=torch.bool), generator=seeded())
    x2d = points.x2d.detach().clone()
    x2d[:, :12] += 30 * torch.randn(3, 12, 2, generator=seeded())
    fit = find_pose(points.x3d, x2d, points.w2d.detach(), batch["K"][:, 0], iterations=15, generator=seeded())
    truth = batch["poses"][:, 0]
    assert torch.rad2deg(rotation_angle(fit.pose[:, :3, :3], truth[:, :3, :3])).max() < 2.5


def test_an_error_is_raised():
    points, others = noisy_points()
    with pytest.raises(RuntimeError):
        epropnp_loss(points._replace(x2d=points.x2d[:, :5]), **others, config=CONFIG)


# ---- what cannot be used ----


def test_no_pairs_is_a_zero_with_gradient():
    batch = pose_batch(2, 2, SIZE) | {"template_types": torch.zeros(2, 2)}
    batch["masks"] = torch.zeros_like(batch["masks"])
    labels = build_labels(batch, 8, LabelConfig())
    output = network_output(labels)
    terms, metrics = epropnp_term(output, labels, batch, CONFIG, generator=seeded())
    total = sum(pair[0] for pair in terms.values())
    assert total.item() == 0
    assert all(pair[1] == 0 for pair in terms.values())
    assert metrics["pose_too_few"].tolist() == [2, 2]
    for gradient in torch.autograd.grad(total, [output.flow, output.scale]):
        assert gradient.abs().max() == 0


def test_what_is_not_finite_is_left_out_and_counted():
    points, others = noisy_points()
    without = points.w2d.clone()
    without[1] = 0
    expected, counted = epropnp_loss(points._replace(w2d=without), **others, config=CONFIG, generator=seeded())
    assert counted["pose_too_few"].tolist() == [1, 4]
    x2d, w2d = points.x2d.clone(), points.w2d.clone()
    x2d[1, 5] = torch.nan
    x2d.requires_grad_(), w2d.requires_grad_()
    terms, metrics = epropnp_loss(Points(points.x3d, x2d, w2d), **others, config=CONFIG, generator=seeded())
    assert metrics["pose_nonfinite"].tolist() == [1, 4]
    for name in terms:
        assert terms[name][1] == 3
        torch.testing.assert_close(terms[name], expected[name])
    gradients = torch.autograd.grad(sum(pair[0] for pair in terms.values()), [x2d, w2d])
    for gradient in gradients:
        assert torch.isfinite(gradient).all()
        assert gradient[1].abs().max() == 0
        assert (gradient[[0, 2, 3]].abs().amax((1, 2)) > 0).all()


def test_the_result_under_autocast_is_the_same():
    points, others = noisy_points()
    plain = epropnp_loss(points, **others, config=CONFIG, generator=seeded())[0]["pose"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(epropnp_loss(points, **others, config=CONFIG, generator=seeded())[0]["pose"], plain)


def test_a_drawn_pair_is_a_point_of_the_paired_patch_and_its_place():
    batch = pose_batch(2, 3, SIZE)
    labels = build_labels(batch, 8, LabelConfig())
    points = draw_points(network_output(labels), labels, CONFIG, torch.ones(2, 3, dtype=torch.bool), generator=seeded())
    pixels = project(batch["K"][:, 0], transform(batch["poses"][:, 0], points.x3d))
    assert (pixels - points.x2d)[points.w2d > 0].abs().max() < 1e-2
    torch.testing.assert_close(points.w2d.sum((1, 2)), torch.full((2,), 2 * CONFIG.weight_scale))
