"""Losses on classes and flow."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from pose_scenes import pose_batch

from objectives.pose_labels import build_labels
from objectives.pose_losses import class_metrics, pose_loss, weighted_total
from objectives.pose_settings import LabelConfig, PoseLossConfig

GRID = 8
COUNT = GRID**2


@pytest.fixture(scope="module")
def labels():
    return build_labels(pose_batch(2, 3, 64), 8, LabelConfig())


def random_output(labels, seed: int = 0) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)
    shape = labels.patch_cls.shape
    return SimpleNamespace(
        logits=torch.randn(*shape, COUNT + 1, generator=generator).requires_grad_(),
        flow=torch.randn(labels.dense_flow.shape, generator=generator).requires_grad_(),
        scale=(torch.rand(labels.dense_flow.shape[:-1], generator=generator) + 0.05).requires_grad_(),
        center_flow=torch.randn(*shape, 2, generator=generator).requires_grad_(),
    )


def tensors(output) -> list[torch.Tensor]:
    return [output.logits, output.flow, output.scale, output.center_flow]


def test_each_term_is_its_formula(labels):
    output, config = random_output(labels), PoseLossConfig(weight_unseen=0.5, label_smoothing=0.1)
    terms = pose_loss(output, labels, config).terms
    valid = labels.patch_cls >= 0
    cross = F.cross_entropy(output.logits[valid], labels.patch_cls[valid], reduction="none", label_smoothing=0.1)
    factor = torch.where(labels.patch_cls[valid] == COUNT, 0.5, 1.0)
    torch.testing.assert_close(terms["cls"], torch.stack([(cross * factor).sum(), valid.sum().float()]))
    mask = labels.dense_supervised
    error, b = (output.flow - labels.dense_flow)[mask].abs(), output.scale[mask]
    assert (error > 4).any()
    laplace = error.clamp(max=4).sum(-1) / b + 2 * b.log()
    torch.testing.assert_close(terms["dense"], torch.stack([laplace.sum(), mask.sum().float()]))
    hidden = labels.dense_surface & ~labels.dense_visibility
    assert hidden.any()
    torch.testing.assert_close(
        terms["invis_reg"], torch.stack([(0.1 / output.scale[hidden]).sum(), hidden.sum().float()])
    )
    pairs = labels.flow_visibility.flatten(2)
    off = (output.center_flow - labels.flows.flatten(2, 3))[pairs]
    expected = F.huber_loss(off, torch.zeros_like(off), reduction="sum")
    torch.testing.assert_close(terms["center"], torch.stack([expected, pairs.sum().float()]))
    total = weighted_total(terms, config)
    torch.testing.assert_close(total, sum(pair[0] / pair[1] for pair in terms.values()))


@pytest.mark.parametrize("kind", ["l1", "huber"])
def test_other_kinds_of_error(labels, kind):
    output = random_output(labels)
    output.scale = None
    config = PoseLossConfig(dense_kind=kind, center_kind="l1", huber_delta=0.5)
    terms = pose_loss(output, labels, config).terms
    assert set(terms) == {"cls", "dense", "center"}
    error = (output.flow - labels.dense_flow)[labels.dense_supervised]
    zero = torch.zeros_like(error)
    expected = error.abs().sum() if kind == "l1" else F.huber_loss(error, zero, reduction="sum", delta=0.5) / 0.5
    torch.testing.assert_close(terms["dense"][0], expected)
    off = (output.center_flow - labels.flows.flatten(2, 3))[labels.flow_visibility.flatten(2)]
    torch.testing.assert_close(terms["center"][0], off.abs().sum())


def test_a_weight_of_zero_leaves_a_term_out(labels):
    output = random_output(labels)
    output.center_flow = None
    terms = pose_loss(output, labels, PoseLossConfig(center=0, invis_reg=0)).terms
    assert set(terms) == {"cls", "dense"}


def test_sums_over_parts_are_the_whole(labels):
    """What makes exact means over processes and micro-batches."""
    output, config = random_output(labels), PoseLossConfig()
    whole = pose_loss(output, labels, config)
    parts = []
    for row in range(2):
        part = SimpleNamespace(**{name: value[row : row + 1] for name, value in vars(output).items()})
        parts.append(pose_loss(part, type(labels)(*(x[row : row + 1] for x in labels)), config))
    for name, pair in whole.terms.items():
        torch.testing.assert_close(parts[0].terms[name] + parts[1].terms[name], pair)
    for name, pair in whole.metrics.items():
        torch.testing.assert_close(parts[0].metrics[name] + parts[1].metrics[name], pair)
    counts = {name: pair[1] for name, pair in whole.terms.items()}
    shared = sum(weighted_total(part.terms, config, counts) for part in parts)
    torch.testing.assert_close(shared, weighted_total(whole.terms, config))


def test_without_pairs_all_terms_are_zero_with_gradient(labels):
    nothing = labels._replace(
        patch_cls=torch.full_like(labels.patch_cls, -1),
        **{name: torch.zeros_like(getattr(labels, name)) for name in labels._fields if name != "patch_cls"},
    )
    output = random_output(labels)
    loss = pose_loss(output, nothing, PoseLossConfig())
    total = weighted_total(loss.terms, PoseLossConfig())
    assert total.item() == 0
    assert all(pair[1] == 0 for pair in loss.terms.values())
    assert all(gradient.abs().max() == 0 for gradient in torch.autograd.grad(total, tensors(output)))


def test_gradients_reach_pairs_and_nothing_else(labels):
    output = random_output(labels)
    total = weighted_total(pose_loss(output, labels, PoseLossConfig()).terms, PoseLossConfig())
    logits, flow, scale, center = torch.autograd.grad(total, tensors(output))
    assert (logits.abs().amax(-1) > 0)[labels.patch_cls >= 0].all()
    assert logits[labels.patch_cls < 0].abs().max() == 0
    assert flow[~labels.dense_supervised].abs().max() == 0
    clamped = (output.flow - labels.dense_flow).abs() >= 4
    assert (flow.abs() > 0)[labels.dense_supervised[..., None] & ~clamped].all()
    hidden = labels.dense_surface & ~labels.dense_visibility
    assert (scale[hidden] < 0).all()  # its b grows
    assert scale[~(hidden | labels.dense_supervised)].abs().max() == 0
    assert center[~labels.flow_visibility.flatten(2)].abs().max() == 0


def test_half_precision_overflows_nowhere(labels):
    output = random_output(labels)
    half = SimpleNamespace(**{name: value.detach().half() for name, value in vars(output).items()})
    half.scale = torch.zeros_like(half.scale)  # the smallest scale applies, once
    with torch.autocast("cpu", torch.bfloat16):
        terms = pose_loss(half, labels, PoseLossConfig()).terms
    assert all(pair.dtype == torch.float32 and torch.isfinite(pair).all() for pair in terms.values())
    assert terms["invis_reg"][0] / terms["invis_reg"][1] == pytest.approx(0.1 / 0.01)


def test_laplace_is_least_where_b_is_the_error(labels):
    output = random_output(labels)
    output.flow = labels.dense_flow + 0.2
    means = []
    for b in (0.1, 0.2, 0.4):
        output.scale = torch.full(labels.dense_flow.shape[:-1], b)
        pair = pose_loss(output, labels, PoseLossConfig()).terms["dense"]
        means.append((pair[0] / pair[1]).item())
    assert means[1] < min(means[0], means[2])  # |e|_1 / b + 2 log b with |e|_1 = 0.4


def test_metrics_by_hand():
    """Four rows of patches in a 4 x 4 grid: 16 is 'unseen'."""
    labels = torch.tensor([[[5, 5, 5, 5, 16, 16, 0, -1, 3, -1]]])
    found = torch.tensor([[[5, 10, 7, 16, 16, 5, 16, 16, 4, 2]]])
    metrics = class_metrics(F.one_hot(found, 17).float(), labels, grid_width=4)
    by_hand = {
        "exact": (1, 6),
        "within_one": (2, 6),  # 10 lies diagonally beside 5; 4 is the next number after 3 but a row further
        "seen_recall": (4, 6),
        "unseen_recall": (1, 2),
        "unseen_precision": (1, 3),
        "unseen_f1": (2, 5),
    }
    assert {name: tuple(pair.tolist()) for name, pair in metrics.items()} == by_hand


def test_a_network_that_always_says_unseen_earns_nothing():
    labels = torch.tensor([[[16] * 24 + [3]]])
    metrics = class_metrics(F.one_hot(torch.full_like(labels, 16), 17).float(), labels, grid_width=4)
    assert metrics["seen_recall"].tolist() == [0, 1]
    assert metrics["within_one"].tolist() == [0, 1]
