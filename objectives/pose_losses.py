"""Losses on the classes and the flow of pose training, as sums with their counts, and what is measured beside them.

A batch's mean of every term is sum / count; with sums and counts added over processes and micro-batches first it is the
exact mean over all of them. All in float32, whatever the network computes in. Without valid entries a term is a zero
that still hangs on the network's output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from objectives.pose_labels import PoseLabels
from objectives.pose_settings import PoseLossConfig


class PoseOutput(Protocol):
    """What the network says; N patches of ps x ps pixels, flow in patches."""

    logits: Tensor
    """(B, S, N, N + 1) over a template's patches and 'unseen'."""
    flow: Tensor
    """(B, S, N, ps, ps, 2) of the paired template patch's pixels."""
    scale: Tensor | None
    """(B, S, N, ps, ps) Laplace b."""
    center_flow: Tensor | None
    """(B, S, N, 2)"""


class PoseLoss(NamedTuple):
    """Pairs of sum and count by name, each (2,)."""

    terms: dict[str, Tensor]
    """With gradient: what is trained on, unweighted."""
    metrics: dict[str, Tensor]
    """Without gradient."""


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """(2,): the sum of values where the mask is true, and their number."""
    mask = mask.to(values.dtype)
    return torch.stack([(values * mask).sum(), mask.sum()])


def classification_loss(logits: Tensor, patch_cls: Tensor, config: PoseLossConfig) -> Tensor:
    """(2,): sum of w(label) CE(softmax(logits), label) over labels that are not -1, and their number.

    w is `weight_unseen` for 'unseen', else 1; the count knows no weights.

    Args:
        logits: (B, S, N, N + 1). patch_cls: (B, S, N) long.
    """
    unseen = logits.shape[-1] - 1
    labels = patch_cls.flatten()
    losses = F.cross_entropy(
        logits.flatten(0, -2), labels, ignore_index=-1, reduction="none", label_smoothing=config.label_smoothing
    )
    losses = losses * torch.where(labels == unseen, config.weight_unseen, 1.0)
    return masked_sum(losses, labels >= 0)


def huber_loss(error: Tensor, delta: float) -> Tensor:
    """e^2 / (2 delta) up to |e| = delta, then |e| - delta / 2: continuous, of slope 1 outside."""
    size = error.abs()
    return torch.where(size <= delta, error.square() / (2 * delta), size - delta / 2)


def flow_loss(flow: Tensor, scale: Tensor | None, labels: PoseLabels, config: PoseLossConfig) -> Tensor:
    """(2,): sum over supervised pixels and their number, e = f - f*.

    laplace: |e|_1 / b + 2 log b with |e| of an axis at most `max_error` and b at least `min_scale`; l1: |e|_1;
    huber: of both axes, added.

    Args:
        flow: (B, S, N, ps, ps, 2). scale: (B, S, N, ps, ps), only read by laplace.
    """
    error = flow - labels.dense_flow
    if config.dense_kind == "laplace":
        b = scale.clamp(min=config.min_scale)
        losses = error.abs().clamp(max=config.max_error).sum(-1) / b + 2 * b.log()
    elif config.dense_kind == "l1":
        losses = error.abs().sum(-1)
    else:
        losses = huber_loss(error, config.huber_delta).sum(-1)
    return masked_sum(losses, labels.dense_supervised)


def invisible_loss(scale: Tensor, labels: PoseLabels, config: PoseLossConfig) -> Tensor:
    """(2,): sum of `invis_factor` / b over pixels on the template's object that the query does not show; their number.

    What cannot be matched shall not be trusted.
    """
    hidden = labels.dense_surface & ~labels.dense_visibility
    return masked_sum(config.invis_factor / scale.clamp(min=config.min_scale), hidden)


def center_loss(center_flow: Tensor, labels: PoseLabels, config: PoseLossConfig) -> Tensor:
    """(2,): sum over visible pairs of the error of the patch centre's flow (L1 or Huber of both axes), their number.

    Args:
        center_flow: (B, S, N, 2).
    """
    error = center_flow - labels.flows.flatten(2, 3)
    losses = error.abs() if config.center_kind == "l1" else huber_loss(error, config.huber_delta)
    return masked_sum(losses.sum(-1), labels.flow_visibility.flatten(2))


@torch.no_grad()
def class_metrics(logits: Tensor, patch_cls: Tensor, grid_width: int) -> dict[str, Tensor]:
    """Pairs of sum and count about the best of all N + 1 classes; `unseen_f1` is 2 TP over 2 TP + FP + FN.

    exact, within_one (at most one patch off along both axes), seen_recall: over patches that the template sees.
    unseen_recall, unseen_precision, unseen_f1: of 'unseen', over all labelled patches.

    Args:
        logits: (B, S, N, N + 1). patch_cls: (B, S, N). grid_width: patches in a row.
    """
    unseen = logits.shape[-1] - 1
    found = logits.argmax(-1)
    seen, missing = (patch_cls >= 0) & (patch_cls < unseen), patch_cls == unseen
    says_unseen = (found == unseen) & (seen | missing)
    rows = found.div(grid_width, rounding_mode="floor") - patch_cls.div(grid_width, rounding_mode="floor")
    columns = found % grid_width - patch_cls % grid_width
    is_near = (found < unseen) & (rows.abs() <= 1) & (columns.abs() <= 1)
    right = masked_sum((found == unseen).float(), missing)
    claimed, existing = says_unseen.sum(), right[1]
    return {
        "exact": masked_sum((found == patch_cls).float(), seen),
        "within_one": masked_sum(is_near.float(), seen),
        "seen_recall": masked_sum((found < unseen).float(), seen),
        "unseen_recall": right,
        "unseen_precision": torch.stack([right[0], claimed.float()]),
        "unseen_f1": torch.stack([2 * right[0], claimed + existing]),
    }


def pose_loss(output: PoseOutput, labels: PoseLabels, config: PoseLossConfig) -> PoseLoss:
    """All terms of nonzero weight: `cls`, `dense`, `invis_reg` (laplace only), `center`; and the metrics.

    Args:
        output: of the network told the labels' pairs.
    """
    with torch.autocast(output.logits.device.type, enabled=False):
        logits, flow = output.logits.float(), output.flow.float()
        scale = None if output.scale is None else output.scale.float()
        terms = {}
        if config.cls:
            terms["cls"] = classification_loss(logits, labels.patch_cls, config)
        if config.dense:
            terms["dense"] = flow_loss(flow, scale, labels, config)
        if config.invis_reg and config.dense_kind == "laplace":
            terms["invis_reg"] = invisible_loss(scale, labels, config)
        if config.center:
            terms["center"] = center_loss(output.center_flow.float(), labels, config)
        metrics = class_metrics(logits.detach(), labels.patch_cls, labels.flows.shape[3])
        error = (flow.detach() - labels.dense_flow).norm(dim=-1) * flow.shape[-2]
        metrics["flow_error_px"] = masked_sum(error, labels.dense_supervised)
    return PoseLoss(terms, metrics)


def weighted_total(
    terms: Mapping[str, Tensor], config: PoseLossConfig, counts: Mapping[str, Tensor] | None = None
) -> Tensor:
    """sum_k weight_k sum_k / max(count_k, 1), a scalar.

    Args:
        terms: of `pose_loss`.
        counts: of each term, in place of this batch's own: all processes' and micro-batches', for an exact mean.
    """
    weights = {"cls": config.cls, "dense": config.dense, "invis_reg": config.invis_reg, "center": config.center}
    counts = {name: pair[1] for name, pair in terms.items()} if counts is None else counts
    return sum(weights[name] * pair[0] / counts[name].detach().clamp(min=1) for name, pair in terms.items())
