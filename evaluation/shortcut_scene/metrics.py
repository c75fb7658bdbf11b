"""How good a scene is: are all objects there, do they stand where they should, apart from one another and supported.

Arrays are numpy, one scene at a time, in the scene's own frame (metres, z up, floor z = 0): nothing is aligned first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree
from scipy.stats import qmc

RADIUS = 0.15  # metres: an object counts as found up to this distance
OVERLAP = 0.1  # share of a box's points inside another from which the two collide
TAU = 0.1  # metres, of the F-score
BOX_POINTS = 200
# Halton's points but the first, which is a corner: evenly spread over the unit box, the same every time.
UNIT_POINTS = qmc.Halton(3, scramble=False).random(BOX_POINTS + 1)[1:] - 0.5


@dataclass(frozen=True)
class Boxes:
    """Oriented boxes, p_scene = rotation (size p) + centre for p in [-.5, .5]^3.

    Args:
        rotation, size, centre: (N, 3, 3), (N, 3) side lengths, (N, 3).
    """

    rotation: np.ndarray
    size: np.ndarray
    centre: np.ndarray

    def __len__(self) -> int:
        return len(self.centre)

    def __getitem__(self, rows) -> Boxes:
        return Boxes(self.rotation[rows], self.size[rows], self.centre[rows])

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest corners (N, 3) of the axis-aligned boxes around them."""
        reach = np.einsum("nij,nj->ni", np.abs(self.rotation), self.size) / 2
        return self.centre - reach, self.centre + reach


# --- which object is which ------------------------------------------------------------------------------------------


def match(predicted: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pair positions (N, 3) and (M, 3) so that the sum of distances is least: min(N, M) indices into each."""
    distance = np.linalg.norm(predicted[:, None] - true[None], axis=-1)
    rows, columns = linear_sum_assignment(distance)
    order = np.argsort(columns)
    return rows[order], columns[order]


def matched_distances(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Distances (min(N, M),) of the pairs of `match`."""
    rows, columns = match(predicted, true)
    return np.linalg.norm(predicted[rows] - true[columns], axis=-1)


def coverage(predicted: np.ndarray, true: np.ndarray, radius: float = RADIUS) -> float:
    """Share of the true objects whose match is nearer than `radius`; NaN if there is none."""
    return float((matched_distances(predicted, true) < radius).sum() / len(true)) if len(true) else np.nan


def coverage_ceiling(num_objects: int) -> float:
    """1 - (1 - 1/N)^N: the share of N objects that N independent draws hit, if each hits one of them at random."""
    return 1 - (1 - 1 / num_objects) ** num_objects


# --- coherence of a scene, which needs no truth ----------------------------------------------------------------------


def collisions(boxes: Boxes, overlap: float = OVERLAP) -> np.ndarray:
    """Which pairs collide, (N (N - 1) / 2,) bool, in the order of `numpy.triu_indices(N, 1)`.

    Two boxes do if more than `overlap` of the 200 points of one, whichever, lie inside the other. Boxes that only
    touch, as in a stack, have no point in common.
    """
    first, second = np.triu_indices(len(boxes), 1)
    result = np.zeros(len(first), bool)
    reach = np.linalg.norm(boxes.size, axis=1) / 2
    # most pairs are too far apart for a closer look
    near = np.linalg.norm(boxes.centre[first] - boxes.centre[second], axis=1) < reach[first] + reach[second]
    shares = [points_inside(boxes[a], boxes[b]) for a, b in ((first[near], second[near]), (second[near], first[near]))]
    result[near] = np.maximum(*shares) > overlap
    return result


def points_inside(a: Boxes, b: Boxes) -> np.ndarray:
    """Share of the 200 points of each box (N,) that lie inside the box of the same row of `b`."""
    points = np.einsum("nij,pj->npi", a.rotation * a.size[:, None], UNIT_POINTS) + (a.centre - b.centre)[:, None]
    return (np.abs(points @ b.rotation) < b.size[:, None] / 2).all(-1).mean(-1)


def collision_rate(boxes: Boxes, overlap: float = OVERLAP) -> float:
    """Share of the pairs of objects that collide, see `collisions`; NaN for less than two objects."""
    return float(collisions(boxes, overlap).mean()) if len(boxes) > 1 else np.nan


def floor_gaps(boxes: Boxes) -> np.ndarray:
    """How far each object's lowest point is from what could carry it, (N,) metres, floating or sunk.

    That is the floor, or the top of another object under or over its centre, whichever is nearest in height: the point
    where the vertical line through the centre leaves the other's box.
    """
    bottom = boxes.bounds()[0][:, 2]
    # the line in each other box's own axes: origin + height * direction
    direction = boxes.rotation[:, 2]
    flat = np.concatenate([boxes.centre[:, :2], np.zeros((len(boxes), 1))], axis=1)
    origin = np.einsum("nmi,mij->nmj", flat[:, None] - boxes.centre[None], boxes.rotation)
    parallel = np.abs(direction) < 1e-9
    safe = np.where(parallel, 1.0, direction)
    ends = np.stack([(sign * boxes.size / 2 - origin) / safe for sign in (-1, 1)])
    within = np.abs(origin) <= boxes.size / 2
    enter = np.where(parallel, np.where(within, -np.inf, np.inf), ends.min(0)).max(-1)
    leave = np.where(parallel, np.inf, ends.max(0)).min(-1)
    hit = (enter <= leave) & ~np.eye(len(boxes), dtype=bool)
    tops = np.where(hit, leave, 0.0)  # the floor where there is no other
    return np.minimum(np.abs(bottom[:, None] - tops).min(1, initial=np.inf), np.abs(bottom))


# --- poses of matched objects ---------------------------------------------------------------------------------------

# about z, applied to the object first
QUARTER_TURNS = np.array([[[c, -s, 0], [s, c, 0], [0, 0, 1]] for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))], float)


def pose_errors(predicted: Boxes, true: Boxes, quarter_turns: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Angle between rotations in degrees and mean |log size ratio| over the axes, (N,) each, of matched objects.

    Args:
        quarter_turns: a box turned by 90 degrees about its own z with its two horizontal sides exchanged is the same
            box: of the four descriptions of it the one that is nearest in angle counts.
    """
    turns = QUARTER_TURNS if quarter_turns else QUARTER_TURNS[:1]
    relative = np.einsum("nji,njk,tkl->tnil", true.rotation, predicted.rotation, turns)
    # Half the chord: acos of the trace would lose half the digits near 0.
    chord = np.linalg.norm(relative - np.eye(3), axis=(-2, -1)) / np.sqrt(8)
    angle = np.degrees(2 * np.arcsin(np.clip(chord, 0, 1)))
    best = angle.argmin(0)
    exchanged = np.abs(turns[best]) @ predicted.size[..., None]
    return angle.min(0), np.abs(np.log(exchanged[..., 0] / true.size)).mean(-1)


def iou_b(predicted: Boxes, true: Boxes) -> np.ndarray:
    """Intersection over union (N,) of the axis-aligned boxes of objects already matched."""
    (low_a, high_a), (low_b, high_b) = predicted.bounds(), true.bounds()
    shared = np.clip(np.minimum(high_a, high_b) - np.maximum(low_a, low_b), 0, None).prod(-1)
    union = (high_a - low_a).prod(-1) + (high_b - low_b).prod(-1) - shared
    return np.where(union > 0, shared / np.where(union > 0, union, 1), 0.0)


# --- surfaces and volumes -------------------------------------------------------------------------------------------


def nearest_distances(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of points (N, 3) to the nearest of (M, 3), and the other way round."""
    return cKDTree(b).query(a)[0], cKDTree(a).query(b)[0]


def chamfer(a: np.ndarray, b: np.ndarray) -> float:
    """Sum of the two mean distances of `nearest_distances`, not squared, in metres."""
    there, back = nearest_distances(a, b)
    return float(there.mean() + back.mean())


def f_score(predicted: np.ndarray, true: np.ndarray, tau: float = TAU) -> float:
    """Harmonic mean of the shares of predicted points near the truth and of true points near the prediction."""
    there, back = (float((distances < tau).mean()) for distances in nearest_distances(predicted, true))
    return 2 * there * back / (there + back) if there + back else 0.0


def occupancy_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two bool grids of one shape; 1 where both are empty."""
    union = np.logical_or(a, b).sum()
    return float(np.logical_and(a, b).sum() / union) if union else 1.0


def voxelise(
    boxes: Boxes, occupancy: np.ndarray, low: np.ndarray, high: np.ndarray, resolution: int = 64
) -> np.ndarray:
    """A scene's solid in a grid of its own frame.

    Args:
        boxes: where each object's canonical cube lies.
        occupancy: (N, R, R, R) bool, its contents.
        low, high: (3,) corners of the grid.
        resolution: voxels along each side.

    Returns:
        (resolution, resolution, resolution) bool, axes x, y, z; true where the voxel's centre is inside an object.
    """
    axes = [a + (np.arange(resolution) + 0.5) / resolution * (b - a) for a, b in zip(low, high, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    side = occupancy.shape[-1]
    filled = np.zeros(len(points), bool)
    for box, grid in zip((boxes[i] for i in range(len(boxes))), occupancy, strict=True):
        cells = np.floor(((points - box.centre) @ box.rotation / box.size + 0.5) * side)
        inside = ((cells >= 0) & (cells < side)).all(-1)
        filled[inside] |= grid[tuple(cells[inside].astype(int).T)]
    return filled.reshape(resolution, resolution, resolution)


def fitted(boxes: Boxes, occupancy: np.ndarray) -> Boxes:
    """The boxes of what is occupied, (N, R, R, R) bool, inside the canonical cubes; an empty cube stays as it is.

    For objects of one scale in all directions, whose shape does not fill its cube.
    """
    side = occupancy.shape[-1]
    low, high = np.full((len(boxes), 3), -0.5), np.full((len(boxes), 3), 0.5)
    for row, grid in enumerate(occupancy):
        if grid.any():
            cells = np.argwhere(grid)
            low[row], high[row] = cells.min(0) / side - 0.5, (cells.max(0) + 1) / side - 0.5
    middle = boxes.size * (low + high) / 2
    return Boxes(
        boxes.rotation, boxes.size * (high - low), boxes.centre + np.einsum("nij,nj->ni", boxes.rotation, middle)
    )
