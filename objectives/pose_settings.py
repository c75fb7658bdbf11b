"""What can be set about labels and losses of pose training: sections. Light to import: no torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from backlot.config import Section


class LabelConfig(Section):
    """What counts as seen, and which places flow is taught at."""

    class_rule: Literal["vote", "center"] = "vote"
    """Which template patch a query patch belongs to: the one most of its pixels see, or the one its centre sees."""
    patch_center: Literal["exact", "floor"] = "exact"
    """Where flow starts: (ps - 1) / 2 in the patch, or the pixel ps // 2."""
    occlusion: Literal["two_sided", "one_sided"] = "two_sided"
    """A point is seen if its depth is the picture's, or if it is not behind it (holes count as seen then)."""
    compute_visibility: bool = True
    """Ask depth and mask whether a point is seen; without, all that lies inside the picture is."""
    compute_patch_visibility: bool = True
    """Ask `visibility_threshold` and `max_flow` of a patch; without, all seen pairs count."""
    visibility_threshold: float = Field(0.1, ge=0, le=1)
    """Share of a template patch's pixels that must be seen for the pair to count as visible."""
    max_flow: float = Field(1.0, gt=0)
    """Patches: pixels that move further along an axis are not taught."""
    tolerance: float = Field(0.002, gt=0)
    """Metres of depth within which two points are one (two-sided) ..."""
    relative_tolerance: float = Field(0.02, ge=0)
    """... or this share of the object's diameter, whichever is more."""
    one_sided_tolerance: float = Field(0.005, gt=0)
    """Metres that a point may lie behind the picture's depth (one-sided)."""
    min_object_share: float = Field(0.15, gt=0, le=1)
    """Share of a query patch that the object must cover for the patch to have a label (by votes)."""
    min_visible_share: float = Field(0.25, gt=0, le=1)
    """Share of these pixels that the template must see; with fewer the patch is unseen (by votes)."""


class PoseLossConfig(Section):
    """Weights and kinds of the losses on classes and flow; a weight of 0 leaves a term out."""

    cls: float = Field(1.0, ge=0)
    """Weight of the cross-entropy over a template's patches and 'unseen'."""
    dense: float = Field(1.0, ge=0)
    """Weight of the flow of single pixels."""
    invis_reg: float = Field(1.0, ge=0)
    """Weight of `invis_factor` times the confidence of pixels that are not seen (laplace only)."""
    center: float = Field(1.0, ge=0)
    """Weight of the flow of patch centres."""
    weight_unseen: float = Field(1.0, ge=0)
    """Factor on patches whose label is 'unseen', in the cross-entropy."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    dense_kind: Literal["laplace", "l1", "huber"] = "laplace"
    center_kind: Literal["huber", "l1"] = "huber"
    huber_delta: float = Field(1.0, gt=0)
    """Patches, of both flows."""
    min_scale: float = Field(0.01, gt=0)
    """Patches: smallest Laplace scale b."""
    max_error: float = Field(4.0, gt=0)
    """Patches: errors along an axis count as no more (laplace)."""
    invis_factor: float = Field(0.1, ge=0)


class EProPnPConfig(Section):
    """The Monte Carlo pose loss (EPro-PnP, arXiv 2203.13254)."""

    enabled: bool = False
    weight: float = Field(0.1, ge=0)
    """Of the negative log-likelihood of the true pose."""
    derivative_weight: float = Field(0.1, ge=0)
    """Of the pose that one Gauss-Newton step from the optimum gives: translation and rotation."""
    start_fraction: float = Field(0.1, ge=0, le=1)
    """Share of the training that passes before it is switched on."""
    num_points: int = Field(256, ge=4)
    """Pairs drawn of each query over its positive templates."""
    min_points: int = Field(12, ge=4)
    """A query with fewer has no pose loss."""
    samples: int = Field(128, ge=1)
    """Poses drawn in each round of adaptive importance sampling."""
    rounds: int = Field(4, ge=1)
    lm_iterations: int = Field(8, ge=1)
    """Levenberg-Marquardt steps to the optimum that sampling starts from."""
    weight_scale: float = Field(64.0, gt=0)
    """Sum of the residuals' weights of a query, in 1 / pixels; where the network learns it, what it starts from."""
    z_min: float = Field(0.1, gt=0)
    """Diameters: least depth of a point."""
