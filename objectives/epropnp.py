"""The Monte Carlo pose loss: how likely the true pose is among all poses that weighted 2D-3D pairs allow.

EPro-PnP (Chen et al., arXiv 2203.13254), six degrees of freedom. With the cost E of `backlot.pose_solver` the pairs
mean the density p(y) = exp(-E(y)) / int exp(-E), and the loss is its negative logarithm at the truth,

    L = E(y_gt) + log( 1/K sum_j exp(-E(y_j)) / q(y_j) ),

the integral by adaptive multiple importance sampling (AMIS): translations from Student's t, quaternions from an angular
central Gaussian (ACG) on the 3-sphere. Lengths are divided by the object's diameter; all in float32.
"""
# ruff: noqa: N803 - K is what everybody calls it

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from backlot.pose_solver import (
    DAMPING,
    PoseProblem,
    levenberg_marquardt,
    linearise,
    move,
    pose_cost,
    pose_problem,
    random_start,
    solve_step,
    tangent_map,
    to_rows,
)
from objectives.pose_labels import PoseLabels, patch_centers, to_patches
from objectives.pose_losses import PoseOutput, masked_sum
from objectives.pose_settings import EProPnPConfig

DEGREES_OF_FREEDOM = 3
"""Of Student's t."""
DISPERSION = 1e-3
"""Of the first angular Gaussian, times the fourth root of its determinant: keeps it from collapsing."""
ACG_RIDGE, T_RIDGE = 1e-5, 1e-8
ACG_STEPS = 3
TRANSLATION_BETA = 0.05
"""Diameters: where the smooth L1 of the derivative term turns linear."""
TINY = 1e-30


class Points(NamedTuple):
    """Weighted pairs of B queries."""

    x3d: Tensor
    """(B, N, 3) metres, object's frame."""
    x2d: Tensor
    """(B, N, 2) pixels."""
    w2d: Tensor
    """(B, N, 2) in 1 / pixels; 0 pads."""


class Proposal(NamedTuple):
    """A law of poses for each of B problems."""

    mean: Tensor
    """(B, 3) of the translation."""
    factor: Tensor
    """(B, 3, 3) Cholesky factor of its spread."""
    acg_factor: Tensor
    """(B, 4, 4) Cholesky factor of the angular Gaussian's matrix."""


# ---- laws ----


def whiten(factor: Tensor, x: Tensor) -> Tensor:
    """L^-1 x of x (J, B, D), with factors (B, D, D)."""
    eye = torch.eye(factor.shape[-1], device=factor.device, dtype=factor.dtype).expand_as(factor)
    return torch.einsum("bij,kbj->kbi", torch.linalg.solve_triangular(factor, eye, upper=False), x)


def log_student_t(x: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    """log t_3(x; mu, L L^T) = lgamma(3) - lgamma(3/2) - 3/2 log(3 pi) - sum log L_ii - 3 log(1 + m / 3).

    Args:
        x: (J, B, 3). mean: (B, 3). factor: (B, 3, 3).
    """
    white = whiten(factor, x - mean)
    constant = math.lgamma(3) - math.lgamma(1.5) - 1.5 * math.log(DEGREES_OF_FREEDOM * math.pi)
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return constant - log_det - 3 * torch.log1p(white.square().sum(-1) / DEGREES_OF_FREEDOM)


def log_acg(quat_wxyz: Tensor, factor: Tensor) -> Tensor:
    """log ACG(q; Lambda) = -1/2 log |Lambda| - 2 log(q^T Lambda^-1 q) - log(2 pi^2), a density on the whole 3-sphere.

    Args:
        quat_wxyz: (J, B, 4) unit. factor: (B, 4, 4), Lambda = L L^T.
    """
    white = whiten(factor, quat_wxyz)
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -log_det - 2 * white.square().sum(-1).log() - math.log(2 * math.pi**2)


def log_density(rows: Tensor, proposal: Proposal) -> Tensor:
    """(J, B) of poses (J, B, 7)."""
    of_translation = log_student_t(rows[..., :3], proposal.mean, proposal.factor)
    return of_translation + log_acg(rows[..., 3:], proposal.acg_factor)


def draw(proposal: Proposal, count: int, generator: torch.Generator | None) -> Tensor:
    """(count, B, 7) poses."""
    like = {"device": proposal.mean.device, "dtype": proposal.mean.dtype, "generator": generator}
    rows = len(proposal.mean)
    normal = torch.randn(count, rows, 3 + 4 + DEGREES_OF_FREEDOM, **like)
    chi_square = normal[..., 7:].square().sum(-1, keepdim=True).clamp(min=TINY)
    offset = (proposal.factor @ normal[..., :3, None]).squeeze(-1) * (DEGREES_OF_FREEDOM / chi_square).sqrt()
    quat = F.normalize((proposal.acg_factor @ normal[..., 3:7, None]).squeeze(-1), dim=-1)
    return torch.cat([proposal.mean + offset, quat], dim=-1)


def cholesky(matrix: Tensor) -> Tensor:
    """Cholesky factor; NaN where there is none, so that the row is counted as not finite."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    return torch.where((info == 0)[..., None, None], factor, torch.nan)


def first_proposal(rows: Tensor, jtj: Tensor) -> Proposal:
    """Laplace's approximation at the optimum (B, 7): covariance S = (J^T J + 1e-5 I)^-1, its blocks S_tt and S_rr.

    Lambda = (M S_rr^-1 M^T + I)^-1 = M (S_rr^-1 + I)^-1 M^T + q q^T, for M's columns and q are orthonormal; over its
    trace, plus 0.001 det^(1/4) I.
    """
    eye = torch.eye(6, device=rows.device, dtype=rows.dtype)
    covariance, _ = torch.linalg.inv_ex(jtj + DAMPING * eye)
    turns = covariance[:, 3:, 3:]
    narrowed, _ = torch.linalg.inv_ex(torch.linalg.inv_ex(turns)[0] + eye[:3, :3])
    M, quat = tangent_map(rows[:, 3:]), rows[:, 3:, None]
    matrix = M @ narrowed @ M.mT + quat @ quat.mT
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    fourth_root = torch.linalg.det(narrowed).clamp(min=TINY) ** 0.25 / trace
    matrix = matrix / trace[:, None, None] + (DISPERSION * fourth_root)[:, None, None] * torch.eye(4).to(rows)
    return Proposal(rows[:, :3], cholesky(symmetric(covariance[:, :3, :3])), cholesky(symmetric(matrix)))


def symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def fit_proposal(rows: Tensor, log_weights: Tensor) -> Proposal:
    """Weighted mean and covariance of translations, and the ACG by three steps of its fixed point.

    Lambda <- sum_j w_j q_j q_j^T / (q_j^T Lambda^-1 q_j), over its trace, + 1e-5 I.

    Args:
        rows: (J, B, 7). log_weights: (J, B).
    """
    weights = log_weights.softmax(0)[..., None]
    mean = (weights * rows[..., :3]).sum(0)
    offset = rows[..., :3] - mean
    eye = torch.eye(4, device=rows.device, dtype=rows.dtype)
    spread = torch.einsum("jbx,jby->bxy", weights * offset, offset) + T_RIDGE * eye[:3, :3]
    quat = rows[..., 3:]
    factor = eye.expand(rows.shape[1], 4, 4)
    for _ in range(ACG_STEPS):
        white = whiten(factor, quat)
        scaled = weights / white.square().sum(-1, keepdim=True).clamp(min=TINY)
        matrix = torch.einsum("jbx,jby->bxy", scaled * quat, quat)
        matrix = matrix / matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
        factor = cholesky(matrix + ACG_RIDGE * eye)
    return Proposal(mean, cholesky(spread), factor)


@torch.no_grad()
def sample_poses(
    problem: PoseProblem, rows: Tensor, jtj: Tensor, config: EProPnPConfig, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Poses from a mixture that adapts to exp(-E), and its log-density at them (AMIS).

    After every round the weights of all poses so far are those of the deterministic mixture of all proposals so far,
    log w = -E - (logsumexp_i log q_i - log rounds), and the next proposal is fitted to them.

    Args:
        rows: (B, 7) the optimum. jtj: (B, 6, 6) there.

    Returns:
        (J, B, 7) poses and (J, B) log q, J = rounds x samples.
    """
    proposals = [first_proposal(rows, jtj)]
    poses = costs = None
    for number in range(config.rounds):
        drawn = draw(proposals[-1], config.samples, generator)
        cost = pose_cost(problem, drawn)
        poses = drawn if poses is None else torch.cat([poses, drawn])
        costs = cost if costs is None else torch.cat([costs, cost])
        densities = torch.stack([log_density(poses, each) for each in proposals])
        log_mixture = densities.logsumexp(0) - math.log(number + 1)
        if number + 1 < config.rounds:
            proposals.append(fit_proposal(poses, -costs - log_mixture))
    return poses, log_mixture


# ---- the loss ----


def find_optimum(
    problem: PoseProblem, truth: Tensor, iterations: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Pose (B, 7) of least cost and J^T J there, searched from the truth or a random start: whichever is better."""
    start, cost = random_start(problem, generator=generator)
    start = torch.where((pose_cost(problem, truth) <= cost)[:, None], truth, start)
    found, _, jtj = levenberg_marquardt(problem, start, iterations)
    return found, jtj


def negative_log_likelihood(problem: PoseProblem, truth: Tensor, poses: Tensor, log_q: Tensor) -> Tensor:
    """(B,) L = E(y_gt) + logsumexp_j(-E(y_j) - log q(y_j)) - log J, differentiable in the problem."""
    log_weights = -pose_cost(problem, poses) - log_q
    return pose_cost(problem, truth) + log_weights.logsumexp(0) - math.log(len(poses))


def derivative_losses(problem: PoseProblem, optimum: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) each: how far one differentiable Gauss-Newton step from the optimum is from the truth.

    smooth L1 of the translation's axes, added, and 2 (1 - (q . q_gt)^2): the derivative of the pose is taught, too.
    """
    _, jtj, gradient = linearise(problem, optimum)
    eye = torch.eye(6, device=jtj.device, dtype=jtj.dtype)
    rows = move(optimum, solve_step(jtj + DAMPING * eye, gradient))
    shift = F.smooth_l1_loss(rows[:, :3], truth[:, :3], reduction="none", beta=TRANSLATION_BETA).sum(-1)
    return shift, 2 * (1 - (rows[:, 3:] * truth[:, 3:]).sum(-1).square())


def in_front(rows: Tensor) -> Tensor:
    """The pose one unit before the camera, in the shape of poses (..., 7)."""
    place = torch.zeros_like(rows)
    place[..., 2:4] = 1
    return place


def epropnp_loss(
    points: Points,
    K: Tensor,
    pose_gt: Tensor,
    diameter: Tensor,
    config: EProPnPConfig,
    generator: torch.Generator | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The pose loss and its derivative terms of a batch, as pairs of sum and number of queries.

    A query counts if it has `min_points` pairs and everything about it is finite; others have no gradient at all and
    are counted in the metrics `pose_nonfinite` and `pose_too_few`. The likelihood is divided by the detached mean over
    queries of the sums of their weights (in units of `weight_scale`), so that a sharper density is no larger loss.

    Args:
        points: gradient flows to all of them.
        K: (B, 3, 3) of the query's crop. pose_gt: (B, 4, 4) camera from object, metres.
        diameter: (B,) metres.
        generator: of the device; torch's global one otherwise.

    Returns:
        Terms `pose`, `pose_translation`, `pose_rotation`, and metrics; all (2,).
    """
    with torch.autocast(K.device.type, enabled=False):
        lengths = diameter.float()[:, None]
        truth = to_rows(pose_gt.float())
        truth = torch.cat([truth[:, :3] / lengths, truth[:, 3:]], dim=-1)
        pairs = (points.x3d.float() / lengths[:, None], points.x2d.float(), points.w2d.float())
        with torch.no_grad():
            problem = pose_problem(*pairs, K.float(), config.z_min)
            optimum, jtj = find_optimum(problem, truth, config.lm_iterations, generator)
            poses, log_q = sample_poses(problem, optimum, jtj, config, generator)
            values = negative_log_likelihood(problem, truth, poses, log_q), *derivative_losses(problem, optimum, truth)
            finite = torch.stack(values).isfinite().all(0)
            enough = (problem.w2d.sum(-1) > 0).sum(-1) >= config.min_points
            keep = finite & enough
        # a row left out is made harmless before it is differentiated: 0 times NaN is NaN
        pairs = (torch.where(keep[:, None, None], x, 0.0) for x in pairs)
        problem = pose_problem(*pairs, K.float(), config.z_min)
        truth, optimum, poses = (torch.where(keep[:, None], x, in_front(x)) for x in (truth, optimum, poses))
        scale = masked_sum(problem.w2d.detach().sum((1, 2)) / 2, keep)
        scale = scale[0] / scale[1].clamp(min=1) / config.weight_scale
        likelihood = negative_log_likelihood(problem, truth, poses, torch.where(keep, log_q, 0.0))
        shift, turn = derivative_losses(problem, optimum, truth)
    terms = {
        "pose": masked_sum(likelihood / torch.where(scale > 0, scale, 1.0), keep),
        "pose_translation": masked_sum(shift, keep),
        "pose_rotation": masked_sum(turn, keep),
    }
    everyone = torch.ones_like(enough)
    metrics = {
        "pose_nonfinite": masked_sum((enough & ~finite).float(), everyone),
        "pose_too_few": masked_sum((~enough).float(), everyone),
    }
    return terms, metrics


def draw_points(
    output: PoseOutput,
    labels: PoseLabels,
    config: EProPnPConfig,
    templates: Tensor,
    log_scale: Tensor | float | None = None,
    generator: torch.Generator | None = None,
) -> Points:
    """Pairs drawn evenly over the pixels whose flow is taught, of each query's chosen templates.

    x3d is the template pixel's point, x2d = c_p + ps f, and w2d = e^s softmax_N(-log b): the sharper the flow, the
    heavier the pair. Where fewer pixels are taught than pairs are wanted, the others have weight 0.

    Args:
        templates: (B, S) bool, those that pairs are drawn from: the positive ones.
        log_scale: s, scalar, learned by the network or log `weight_scale`.
    """
    with torch.autocast(output.flow.device.type, enabled=False):
        supervised = labels.dense_supervised & templates[:, :, None, None, None]
        batch, count, patch_size = len(supervised), config.num_points, supervised.shape[-1]
        height, width = labels.object_points.shape[2:4]
        keys = torch.rand(supervised.shape, device=supervised.device, generator=generator)
        keys, chosen = torch.where(supervised, keys, -1.0).flatten(1).topk(count, dim=1)
        is_pair = keys >= 0

        def take(values: Tensor) -> Tensor:
            return values.flatten(1, 4).gather(1, chosen[..., None].expand(batch, count, values.shape[-1]))

        points = torch.stack([to_patches(plane, patch_size) for plane in labels.object_points.unbind(-1)], dim=-1)
        cell, pixel = chosen.div(patch_size**2, rounding_mode="floor"), chosen % patch_size**2
        paired = labels.patch_cls.flatten(1).gather(1, cell).clamp(0, labels.patch_cls.shape[-1] - 1)
        num_patches = labels.patch_cls.shape[-1]
        template = cell.div(num_patches, rounding_mode="floor")
        source = (template * num_patches + paired) * patch_size**2 + pixel
        x3d = points.flatten(1, 4).gather(1, source[..., None].expand(batch, count, 3))
        centers = patch_centers(height, width, patch_size, x3d)[cell % num_patches]
        x2d = centers + patch_size * take(output.flow.float())
        if output.scale is None:
            logits = torch.zeros_like(x2d[..., 0])
        else:
            logits = -take(output.scale.float()[..., None]).squeeze(-1).log()
        weights = logits.masked_fill(~is_pair, -torch.inf).softmax(1)
        weights = torch.where(is_pair.any(1, keepdim=True), weights, 0.0)
        scale = math.log(config.weight_scale) if log_scale is None else log_scale
        factor = scale.exp() if isinstance(scale, Tensor) else math.exp(scale)
    return Points(x3d, x2d, (factor * weights)[..., None].expand(-1, -1, 2))


def epropnp_term(
    output: PoseOutput,
    labels: PoseLabels,
    batch: Mapping[str, Tensor],
    config: EProPnPConfig,
    log_scale: Tensor | float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`epropnp_loss` of pairs drawn over a batch's positive templates.

    Args:
        batch: `K`, `poses`, `diameter`, and `template_types` (B, S), 0 for the positive ones.
    """
    points = draw_points(output, labels, config, batch["template_types"] == 0, log_scale, generator)
    return epropnp_loss(points, batch["K"][:, 0], batch["poses"][:, 0], batch["diameter"], config, generator)
