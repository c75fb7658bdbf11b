"""The Monte Carlo pose loss."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pose_scenes import look_from, pose_batch
from scipy import stats
from scipy.spatial.transform import Rotation

from backlot.cameras import make_pose, project, rotation_angle, transform
from backlot.pose_solver import find_pose, pose_problem, to_matrices, to_rows
from objectives.epropnp import (
    Points,
    Proposal,
    draw,
    draw_points,
    epropnp_loss,
    epropnp_term,
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
    proposal = Proposal(
        torch.tensor([[0.1, 0.2, 3.0]]), 0.1 * torch.eye(3)[None], torch.linalg.cholesky(spd(4, 2))[None]
    )
    rows = draw(proposal, 40_000, seeded())
    fitted = fit_proposal(rows, torch.zeros(rows.shape[:2]))
    assert (fitted.mean - proposal.mean).abs().max() < 0.01
    true, found = (law.acg_factor[0] @ law.acg_factor[0].T for law in (proposal, fitted))
    assert (true / true.trace() - found / found.trace()).abs().max() < 0.05
    # the covariance of Student's t with 3 degrees of freedom is 3 times its spread; heavy tails converge slowly
    assert 1.5 < (fitted.factor[0, 0, 0] ** 2 / 0.01) < 6


# ---- the integral ----


def test_the_integral_agrees_with_plain_importance_sampling():
    """A broad density of few pairs: log int exp(-E) against a million poses from one wide law."""
    points, others = noisy_points(1, 24)
    problem = pose_problem(points.x3d / 0.12, points.x2d, 0.2 * points.w2d, others["K"], 0.1)
    truth = to_rows(others["pose_gt"])
    truth = torch.cat([truth[:, :3] / 0.12, truth[:, 3:]], dim=-1)
    optimum, jtj = find_optimum(problem, truth, 10, seeded())
    means = []
    for seed in range(8):
        poses, log_q = sample_poses(problem, optimum, jtj, CONFIG, seeded(seed))
        means.append(negative_log_likelihood(problem, truth, poses, log_q))
    values = torch.cat(means)
    many = CONFIG.model_copy(update={"samples": 4000, "rounds": 3})
    poses, log_q = sample_poses(problem, optimum, jtj, many, seeded(100))
    reference = negative_log_likelihood(problem, truth, poses, log_q)
    wide, _ = first_and_wider(problem, optimum, jtj)
    broad = draw(wide, 60_000, seeded(7))
    from objectives.epropnp import log_density

    plain = negative_log_likelihood(problem, truth, broad, log_density(broad, wide))
    assert abs(values.mean() - reference.item()) < 0.3
    assert abs(plain.item() - reference.item()) < 0.3
    assert values.std() < 0.6


def first_and_wider(problem, optimum, jtj):
    from objectives.epropnp import first_proposal

    law = first_proposal(optimum, jtj)
    acg = law.acg_factor @ law.acg_factor.mT
    wider = torch.linalg.cholesky(acg + 3 * acg.diagonal(dim1=-2, dim2=-1).amin(-1)[:, None, None] * torch.eye(4))
    return Proposal(law.mean, 2 * law.factor, wider), law


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


def test_training_by_the_loss_alone_moves_points_and_weights_the_right_way():
    """Outliers lose weight, and the pose that the pairs give comes closer to the truth."""
    points, others = noisy_points(4, 64, outliers=8, noise=2.0)
    x2d, logits = points.x2d.clone().requires_grad_(), torch.zeros(4, 64, requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [x2d], "lr": 0.05}, {"params": [logits], "lr": 0.05}])

    def step(update: bool) -> float:
        weights = CONFIG.weight_scale * logits.softmax(1)[..., None].expand(-1, -1, 2)
        terms, _ = epropnp_loss(Points(points.x3d, x2d, weights), **others, config=CONFIG, generator=seeded())
        optimizer.zero_grad()
        (terms["pose"][0] / 4).backward()
        if update:
            optimizer.step()
        return terms["pose"][0].item() / 4

    first = step(update=True)
    for _ in range(25):
        step(update=True)
    assert step(update=False) < first - 1
    share = logits.detach().softmax(1)
    assert share[:, :8].mean() < 0.8 * share[:, 8:].mean()


def test_labels_recover_the_pose_with_twelve_gross_outliers_of_96():
    batch = pose_batch(3, 4, SIZE)
    labels = build_labels(batch, 8, LabelConfig())
    config = CONFIG.model_copy(update={"num_points": 96})
    points = draw_points(network_output(labels), labels, config, torch.ones(3, 4, dtype=torch.bool), generator=seeded())
    x2d = points.x2d.detach().clone()
    x2d[:, :12] += 30 * torch.randn(3, 12, 2, generator=seeded())
    fit = find_pose(points.x3d, x2d, points.w2d.detach(), batch["K"][:, 0], iterations=15, generator=seeded())
    truth = batch["poses"][:, 0]
    assert torch.rad2deg(rotation_angle(fit.pose[:, :3, :3], truth[:, :3, :3])).max() < 1


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
    alone, _ = epropnp_loss(points, **others, config=CONFIG, generator=seeded())
    x2d, w2d = points.x2d.clone(), points.w2d.clone()
    x2d[1, 5] = torch.nan
    x2d.requires_grad_(), w2d.requires_grad_()
    terms, metrics = epropnp_loss(Points(points.x3d, x2d, w2d), **others, config=CONFIG, generator=seeded())
    assert metrics["pose_nonfinite"].tolist() == [1, 4]
    assert terms["pose"][1] == 3
    assert torch.isfinite(terms["pose"][0])
    assert terms["pose"][0] < alone["pose"][0] * 2
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
    assert to_matrices(to_rows(batch["poses"][:, 0])).isfinite().all()
    assert make_pose(torch.eye(3), torch.zeros(3)).shape == (4, 4)
