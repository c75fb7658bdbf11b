"""What the pose demo is measured against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

CLEARLY = 0.8
"""Of the error of a simpler answer, at most."""


class Goal(NamedTuple):
    """A figure that is asked for; `value` None: not measured."""

    what: str
    asked: str
    value: float | None
    reached: bool

    @property
    def told(self) -> str:
        return "not measured" if self.value is None else f"{self.value:.3g}"


def goal(what: str, sign: str, bound: float, value: float | None) -> Goal:
    """Whether a figure is at least or at most a bound."""
    reached = value is not None and (value >= bound if sign == "≥" else value <= bound)
    return Goal(what, f"{sign} {bound:.3g}", value, reached)


def find_goals(metrics: Mapping[str, Any]) -> list[Goal]:
    """What is asked for of the demo. `metrics`: of metrics.json."""
    rotation = metrics["median_rotation_deg"]
    goals = [
        goal("patches within one of the right one", "≥", 0.75, metrics["within_one_patch"]),
        goal("patches exactly right", "≥", 0.35, metrics["exact"]),
        goal("recall of patches that a template sees", "≥", 0.8, metrics["seen_recall"]),
        goal("F1 of patches that it does not see", "≥", 0.7, metrics["unseen_f1"]),
        goal("median rotation error, degrees", "≤", 10.0, rotation),
    ]
    for name, what in (("nearest_template", "the nearest template's"), ("class_only", "that of classes without flow")):
        bound = CLEARLY * metrics[name]["median_rotation_deg"]
        goals.append(goal(f"median rotation error, a fifth below {what}", "≤", bound, rotation))
    return [
        *goals,
        goal("median translation error, diameters", "≤", 0.1, metrics["median_translation"]),
        goal("MSPD recall at 8 of 64 pixels", "≥", 0.65, metrics["mspd_recall"]["8/64"]),
        goal("view error of retrieval, degrees", "≤", 20.0, metrics["view_error_deg"]),
        goal("median rotation error, turned in the picture", "≤", 15.0, metrics["in_plane"].get("median_rotation_deg")),
        goal("AUROC of the score", "≥", 0.7, metrics["score_auroc"]),
    ]
