"""Pose from weighted 2D-3D pairs: robust Levenberg-Marquardt over batches, with a random start. Pure torch.

A pose inside is a row of seven: translation and unit quaternion (w, x, y, z), camera from object. Residuals are
r_i = w_i (pi(R X_i + t) - x_i), the cost is sum_i huber(|r_i|), and a step d changes t by d_t and q by M(q) d_q, so
that R X moves by 2 d_q x R X (EPro-PnP, arXiv 2203.13254). Fixed iterations, no waiting for a device; lengths in any
one unit, best of the object's order of size, for the damping constants are absolute.
"""
# ruff: noqa: N803 - K is what everybody calls it

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from backlot.cameras import inverse_affine, make_pose, matrix_from_quat_wxyz, quat_wxyz_from_matrix

RELATIVE_DELTA = 0.1
"""Where the Huber cost turns linear, of mean weight times the spread of the 2D points."""
DAMPING = 1e-5
SMALLEST_CURVATURE, LARGEST_CURVATURE = 1e-6, 1e32
FIRST_RADIUS = 30.0
LEAST_GAIN = 1e-3
TINY = 1e-30


class PoseProblem(NamedTuple):
    """Pairs of points of B objects; leading dimensions may be any that broadcast."""

    x3d: Tensor
    """(B, N, 3) in the object's frame."""
    x2d: Tensor
    """(B, N, 2) pixels."""
    w2d: Tensor
    """(B, N, 2) weights of the residuals, not negative; 0 leaves a pair out."""
    K: Tensor
    """(B, 3, 3)"""
    delta: Tensor
    """(B,) where the Huber cost turns linear."""
    z_min: float
    """Depths below it count as it, and give no derivative."""

    def repeat(self, count: int) -> PoseProblem:
        """Each row `count` times in a row: (B count, ...)."""
        repeated = (x.repeat_interleave(count, dim=0, output_size=count * len(x)) for x in self[:5])
        return PoseProblem(*repeated, self.z_min)


class PoseFit(NamedTuple):
    """What a solver found."""

    pose: Tensor
    """(B, 4, 4) camera from object."""
    cost: Tensor
    """(B,)"""
    jtj: Tensor
    """(B, 6, 6) J^T J of the robust residuals there; the first three rows are the translation's."""


def pose_problem(x3d: Tensor, x2d: Tensor, w2d: Tensor, K: Tensor, z_min: float = 0.01) -> PoseProblem:
    """Pairs with their Huber threshold: 0.1 mean(w) sqrt(var x + var y), over the pairs that have a weight.

    Args:
        x3d: (B, N, 3). x2d, w2d: (B, N, 2). K: (B, 3, 3). All of one dtype, float32 or finer.
    """
    used = (w2d.sum(-1, keepdim=True) > 0).to(x2d.dtype)
    count = used.sum(-2).clamp(min=1)
    places = x2d.detach()
    centre = ((places * used).sum(-2) / count)[:, None]
    spread = (((places - centre).square() * used).sum((-2, -1)) / count[:, 0]).clamp(min=TINY).sqrt()
    mean_weight = w2d.sum((-2, -1)) / (2 * count[:, 0])
    return PoseProblem(x3d, x2d, w2d, K, (RELATIVE_DELTA * mean_weight * spread).clamp(min=TINY), z_min)


# ---- poses as rows of seven ----


def to_rows(pose: Tensor) -> Tensor:
    """(..., 7) of matrices (..., 4, 4)."""
    return torch.cat([pose[..., :3, 3], quat_wxyz_from_matrix(pose[..., :3, :3])], dim=-1)


def to_matrices(rows: Tensor) -> Tensor:
    """(..., 4, 4) of (..., 7)."""
    return make_pose(matrix_from_quat_wxyz(rows[..., 3:]), rows[..., :3])


def tangent_map(quat_wxyz: Tensor) -> Tensor:
    """M (..., 4, 3), orthonormal columns: q + M d is (1, d) q, a turn by 2 d to first order."""
    w, x, y, z = quat_wxyz.unbind(-1)
    return torch.stack([-x, -y, -z, w, z, -y, -z, w, x, y, -x, w], dim=-1).unflatten(-1, (4, 3))


def move(rows: Tensor, step: Tensor) -> Tensor:
    """Poses (..., 7) after steps (..., 6)."""
    turned = rows[..., 3:] + (tangent_map(rows[..., 3:]) @ step[..., 3:, None]).squeeze(-1)
    return torch.cat([rows[..., :3] + step[..., :3], F.normalize(turned, dim=-1)], dim=-1)


# ---- cost and its derivatives ----


def huber(squared: Tensor, delta: Tensor) -> Tensor:
    """s^2 / 2 up to s = delta, then delta s - delta^2 / 2, of squares s^2; differentiable at 0 too."""
    s = squared.clamp(min=TINY).sqrt()
    return torch.where(s <= delta, squared / 2, delta * s - delta.square() / 2)


def _project(problem: PoseProblem, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """R X (..., N, 3), what is added to it by t with depth at least z_min (..., N, 3), and its pixels (..., N, 2)."""
    turned = problem.x3d @ matrix_from_quat_wxyz(rows[..., 3:]).mT
    moved = turned + rows[..., None, :3]
    moved = torch.cat([moved[..., :2], moved[..., 2:].clamp(min=problem.z_min)], dim=-1)
    pixels = (moved[..., :2] / moved[..., 2:]) @ problem.K[..., :2, :2].mT + problem.K[..., None, :2, 2]
    return turned, moved, pixels


def pose_cost(problem: PoseProblem, rows: Tensor) -> Tensor:
    """E(y) = sum_i huber(|w_i (pi(R X_i + t) - x_i)|), differentiable.

    Args:
        rows: (..., B, 7).

    Returns:
        (..., B)
    """
    pixels = _project(problem, rows)[2]
    squared = (problem.w2d * (pixels - problem.x2d)).square().sum(-1)
    return huber(squared, problem.delta[..., None]).sum(-1)


def linearise(problem: PoseProblem, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cost (B,), J^T J (B, 6, 6) and gradient J^T r (B, 6) at poses (B, 7), differentiable in the problem.

    J = d pi [I, -2 [R X]_x]; residuals beyond the Huber threshold and their rows are scaled by sqrt(delta / |r|).
    """
    turned, moved, pixels = _project(problem, rows)
    x, y, z = moved.unbind(-1)
    zero = torch.zeros_like(z)
    in_front = (z > problem.z_min).to(z.dtype)[..., None, None]
    of_rays = torch.stack([1 / z, zero, -x / z.square(), zero, 1 / z, -y / z.square()], dim=-1).unflatten(-1, (2, 3))
    of_pixels = problem.K[..., None, :2, :2] @ of_rays * in_front
    a, b, c = turned.unbind(-1)
    of_turns = 2 * torch.stack([zero, c, -b, -c, zero, a, b, -a, zero], dim=-1).unflatten(-1, (3, 3))
    jacobian = torch.cat([of_pixels, of_pixels @ of_turns], dim=-1) * problem.w2d[..., None]
    residuals = problem.w2d * (pixels - problem.x2d)
    squared = residuals.square().sum(-1)
    delta = problem.delta[..., None]
    scale = torch.where(squared <= delta.square(), 1.0, delta / squared.clamp(min=TINY).sqrt()).sqrt()
    jacobian, residuals = (
        (jacobian * scale[..., None, None]).flatten(-3, -2),
        (residuals * scale[..., None]).flatten(-2),
    )
    gradient = (jacobian.mT @ residuals[..., None]).squeeze(-1)
    return huber(squared, delta).sum(-1), jacobian.mT @ jacobian, gradient


def solve_step(curvature: Tensor, gradient: Tensor) -> Tensor:
    """-A^-1 g by Cholesky, NaN where A (..., 6, 6) is not positive: never waits for the device to say so."""
    factor, info = torch.linalg.cholesky_ex(curvature)
    step = -torch.cholesky_solve(gradient[..., None], factor).squeeze(-1)
    return torch.where((info == 0)[..., None], step, torch.nan)


# ---- solvers ----


def levenberg_marquardt(problem: PoseProblem, rows: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Poses (B, 7), their cost (B,) and J^T J (B, 6, 6) after a fixed number of trust-region steps.

    A step solves (J^T J + diag(J^T J) / radius + 1e-5 I) d = -J^T r and is taken if the cost falls by at least a
    thousandth g of what the linear model says. Then radius /= max(1/3, 1 - (2 g - 1)^3); else radius /= 2, 4, 8, ...
    """
    cost, jtj, gradient = linearise(problem, rows)
    radius, shrink = torch.full_like(cost, FIRST_RADIUS), torch.full_like(cost, 2.0)
    eye = torch.eye(6, device=rows.device, dtype=rows.dtype)
    for _ in range(iterations):
        diagonal = jtj.diagonal(dim1=-2, dim2=-1).clamp(SMALLEST_CURVATURE, LARGEST_CURVATURE)
        step = solve_step(jtj + torch.diag_embed(diagonal / radius[:, None]) + DAMPING * eye, gradient)
        predicted = -(step * (gradient + (jtj @ step[..., None]).squeeze(-1) / 2)).sum(-1)
        candidate = move(rows, step)
        new_cost, new_jtj, new_gradient = linearise(problem, candidate)
        gain = (cost - new_cost) / predicted
        good = (gain >= LEAST_GAIN) & (predicted > 0)
        radius = torch.where(good, radius / (1 - (2 * gain - 1) ** 3).clamp(min=1 / 3), radius / shrink)
        shrink = torch.where(good, 2.0, shrink * 2)
        rows, gradient = (torch.where(good[:, None], *pair) for pair in ((candidate, rows), (new_gradient, gradient)))
        cost, jtj = torch.where(good, new_cost, cost), torch.where(good[:, None, None], new_jtj, jtj)
    return rows, cost, jtj


def place_by_spread(problem: PoseProblem, quat_wxyz: Tensor) -> Tensor:
    """Poses (B, 7) with given rotations: as far away as the points' spread says, their centres on one ray."""
    weight = problem.w2d.sum(-1, keepdim=True)
    weight = weight / weight.sum(-2, keepdim=True).clamp(min=TINY)
    inverse = inverse_affine(problem.K)
    rays = problem.x2d @ inverse[..., :2, :2].mT + inverse[..., None, :2, 2]
    centre_2d, centre_3d = ((weight * x).sum(-2) for x in (rays, problem.x3d))
    spreads = [
        (weight * (x - centre[..., None, :]).square()).sum((-2, -1)).clamp(min=TINY).sqrt()
        for x, centre in ((rays, centre_2d), (problem.x3d, centre_3d))
    ]
    # two of three axes are seen on the average
    depth = (math.sqrt(2 / 3) * spreads[1] / spreads[0]).clamp(min=problem.z_min)
    turned = (matrix_from_quat_wxyz(quat_wxyz) @ centre_3d[..., None]).squeeze(-1)
    at = torch.cat([centre_2d, torch.ones_like(centre_2d[..., :1])], dim=-1) * depth[..., None]
    return torch.cat([at - turned, quat_wxyz], dim=-1)


def random_start(
    problem: PoseProblem,
    proposals: int = 64,
    points: int = 16,
    iterations: int = 3,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Start of a search without a first guess: the best of random rotations, each refined on a few points (RSLM).

    Args:
        points: of each proposal, drawn by weight without putting back; all if there are no more.

    Returns:
        Poses (B, 7) and their cost (B,) over all points.
    """
    rows, count = problem.x3d.shape[:2]
    like = {"device": problem.x3d.device, "dtype": problem.x3d.dtype, "generator": generator}
    quat = F.normalize(torch.randn(rows, proposals, 4, **like), dim=-1)
    uniform = torch.rand(rows, proposals, count, **like).clamp(min=TINY)
    keys = problem.w2d.sum(-1).clamp(min=TINY).log()[:, None] - (-uniform.log()).log()  # Gumbel: a draw by weight
    chosen = keys.topk(min(points, count), dim=-1).indices
    picked = [
        x[:, None].expand(-1, proposals, -1, -1).gather(2, chosen[..., None].expand(*chosen.shape, x.shape[-1]))
        for x in problem[:3]
    ]
    others = (x[:, None].expand(-1, proposals, *x.shape[1:]).flatten(0, 1) for x in problem[3:5])
    few = PoseProblem(*(x.flatten(0, 1) for x in picked), *others, problem.z_min)
    found, _, _ = levenberg_marquardt(few, place_by_spread(few, quat.flatten(0, 1)), iterations)
    found = found.unflatten(0, (rows, proposals)).transpose(0, 1)
    cost = pose_cost(problem, found).nan_to_num(nan=torch.inf)
    best = cost.argmin(0)
    numbers = torch.arange(rows, device=best.device)
    return found[best, numbers], cost[best, numbers]


@torch.no_grad()
def refine_pose(
    x3d: Tensor, x2d: Tensor, w2d: Tensor, K: Tensor, pose: Tensor, iterations: int = 10, z_min: float = 0.01
) -> PoseFit:
    """Robust least squares from a first guess; a pose is left as it is where no step lowers the cost.

    Args:
        x3d: (B, N, 3) metres, object's frame. x2d, w2d: (B, N, 2) pixels and weights in 1 / pixels; weight 0 pads.
        K: (B, 3, 3). pose: (B, 4, 4) camera from object.
        z_min: metres.
    """
    with torch.autocast(x3d.device.type, enabled=False):
        problem = pose_problem(*(x if x.dtype == torch.float64 else x.float() for x in (x3d, x2d, w2d, K)), z_min)
        rows, cost, jtj = levenberg_marquardt(problem, to_rows(pose.to(problem.x3d.dtype)), iterations)
    return PoseFit(to_matrices(rows), cost, jtj)


@torch.no_grad()
def find_pose(
    x3d: Tensor,
    x2d: Tensor,
    w2d: Tensor,
    K: Tensor,
    iterations: int = 10,
    z_min: float = 0.01,
    generator: torch.Generator | None = None,
) -> PoseFit:
    """`refine_pose` without a first guess: from `random_start`."""
    with torch.autocast(x3d.device.type, enabled=False):
        problem = pose_problem(*(x if x.dtype == torch.float64 else x.float() for x in (x3d, x2d, w2d, K)), z_min)
        start, _ = random_start(problem, generator=generator)
        rows, cost, jtj = levenberg_marquardt(problem, start, iterations)
    return PoseFit(to_matrices(rows), cost, jtj)
