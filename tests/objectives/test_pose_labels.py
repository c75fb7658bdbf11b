"""Labels of pose training, on pictures cast by arithmetic."""

import pytest
import torch
from pose_scenes import box_depth, hide, points_of, pose_batch, sphere_depth

from backlot.cameras import project, rotation_angle, transform
from backlot.pose_solver import refine_pose
from objectives.pose_labels import PoseLabels, build_labels, patch_centers, to_patches
from objectives.pose_settings import LabelConfig

SIZE, PATCH = 112, 8
GRID = SIZE // PATCH
COUNT = GRID**2


def labels_of(batch: dict, **settings) -> PoseLabels:
    return build_labels(batch, PATCH, LabelConfig(**settings))


def pairs_of(batch: dict, labels: PoseLabels, backwards: bool = False) -> tuple[torch.Tensor, ...]:
    """Points, places and weights (B, P, .) of every fifth pixel of all pairs; or with the flow's ends exchanged."""
    centers = patch_centers(SIZE, SIZE, PATCH, labels.dense_flow)
    buddies = labels.patch_cls.clamp(0, COUNT - 1)
    points = torch.stack([to_patches(plane, PATCH) for plane in labels.object_points.unbind(-1)], dim=-1)
    points = points.gather(2, buddies[..., None, None, None].expand_as(points))
    places = centers[:, None, None] + PATCH * labels.dense_flow
    visible = labels.dense_visibility
    if backwards:  # the query pixel stays, the template's is moved
        v, u = torch.meshgrid(torch.arange(float(PATCH)), torch.arange(float(PATCH)), indexing="ij")
        corners = centers - (PATCH - 1) / 2
        places = (corners[:, None, None] + torch.stack([u, v], -1)).expand_as(places)
        template_corners = corners[buddies][..., None, None, :]
        moved = (template_corners + (PATCH - 1) / 2 + PATCH * labels.dense_flow).round().long()
        inside = ((moved >= 0) & (moved < SIZE)).all(-1)
        number = (moved[..., 1] * SIZE + moved[..., 0]).clamp(0, SIZE**2 - 1).flatten(2)
        flat = labels.object_points.flatten(2, 3).gather(2, number[..., None].expand(*number.shape, 3))
        points = flat.view(*moved.shape[:-1], 3)
        visible = visible & inside & (points.abs().sum(-1) > 0)
    weights = visible[..., None].float().expand(*visible.shape, 2)
    return tuple(x.flatten(1, 4)[:, ::5] for x in (points, places, weights))


def solve(batch: dict, labels: PoseLabels, backwards: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Degrees and metres off, of poses found from the labels; from the first template's pose."""
    truth = batch["poses"][:, 0]
    start = batch["poses"][:, 1].clone()
    fit = refine_pose(*pairs_of(batch, labels, backwards), batch["K"][:, 0], start, iterations=15)
    degrees = torch.rad2deg(rotation_angle(fit.pose[:, :3, :3], truth[:, :3, :3]))
    return degrees, (fit.pose - truth)[:, :3, 3].norm(dim=1)


def seen_of(labels: PoseLabels) -> torch.Tensor:
    return (labels.patch_cls >= 0) & (labels.patch_cls < COUNT)


def one_label(batch: dict, query: int, template: int, patch: int, config: LabelConfig) -> int:
    """The vote of one patch, pixel by pixel."""
    K, pose = batch["K"], batch["poses"]
    depth, other = batch["query_depth"][query], batch["template_depth"][query, template]
    tolerance = max(config.tolerance, config.relative_tolerance * batch["diameter"][query].item())
    points, votes, num_object = points_of(batch, 0)[query], [0] * COUNT, 0
    for v in range(patch // GRID * PATCH, (patch // GRID + 1) * PATCH):
        for u in range(patch % GRID * PATCH, (patch % GRID + 1) * PATCH):
            if depth[v, u] <= 0 or not batch["masks"][query, 0, v, u]:
                continue
            num_object += 1
            there = transform(pose[query, template + 1], points[v, u][None])
            column, row = (project(K[query, template + 1], there)[0] + 0.5).floor().long().tolist()
            if not (0 <= column < SIZE and 0 <= row < SIZE):
                continue
            if other[row, column] > 0 and abs(there[0, 2] - other[row, column]) < tolerance:
                votes[row // PATCH * GRID + column // PATCH] += 1
    if num_object < config.min_object_share * PATCH**2:
        return -1
    return votes.index(max(votes)) if sum(votes) >= config.min_visible_share * num_object else COUNT


# ---- pitfalls 1 and 4: direction and centres ----


@pytest.mark.parametrize("cast", [box_depth, sphere_depth])
def test_perfect_labels_give_the_pose_back(cast):
    batch = pose_batch(3, 3, SIZE, cast=cast)
    degrees, metres = solve(batch, labels_of(batch))
    assert degrees.max() < 0.1
    assert metres.max() < 2e-4


def test_flow_used_backwards_does_not():
    batch = pose_batch(3, 3, SIZE)
    labels = labels_of(batch)
    assert solve(batch, labels, backwards=True)[0].min() > 2


def test_perfect_labels_survive_poselib():
    poselib = pytest.importorskip("poselib")
    batch = pose_batch(2, 2, SIZE)
    points, places, weights = pairs_of(batch, labels_of(batch))
    for row in range(2):
        used = weights[row, :, 0] > 0
        K = batch["K"][row, 0].double()
        camera = {
            "model": "PINHOLE",
            "width": SIZE,
            "height": SIZE,
            "params": [K[0, 0].item(), K[1, 1].item(), K[0, 2].item() + 0.5, K[1, 2].item() + 0.5],
        }
        pairs = (places[row, used] + 0.5).double().numpy(), points[row, used].double().numpy()
        found, info = poselib.estimate_absolute_pose(*pairs, camera, {"max_reproj_error": 2.0}, {})
        angle = rotation_angle(torch.from_numpy(found.R), batch["poses"][row, 0, :3, :3].double())
        assert torch.rad2deg(angle) < 0.1
        assert info["inlier_ratio"] > 0.99


def test_exact_centres_leave_no_mean_residual_and_floored_ones_are_half_a_pixel_off():
    batch = pose_batch(2, 2, SIZE)
    for rule, bias in (("exact", 0.0), ("floor", -0.5)):
        labels = labels_of(batch, patch_center=rule)
        points, places, weights = pairs_of(batch, labels)
        pixels = project(batch["K"][:, 0], transform(batch["poses"][:, 0], points))
        residual = (places - pixels)[weights[..., 0] > 0]
        assert (residual - bias).abs().max() < 2e-3
    centers = patch_centers(32, 32, 16, torch.zeros(()))
    assert centers[0].tolist() == [7.5, 7.5]
    assert centers[1].tolist() == [23.5, 7.5]
    assert patch_centers(32, 32, 16, torch.zeros(()), "floor")[2].tolist() == [8, 24]


# ---- pitfalls 2, 5, 24 ----


def test_labels_do_not_depend_on_the_unit():
    """Pitfall 5: depth, poses, diameter and tolerances in millimetres give what metres give."""
    batch = hide(pose_batch(2, 2, SIZE), slice(0, 45))
    scaled = batch | {key: 1000 * batch[key] for key in ("query_depth", "template_depth", "diameter")}
    scaled["poses"] = batch["poses"].clone()
    scaled["poses"][..., :3, 3] *= 1000
    ours, theirs = labels_of(batch), labels_of(scaled, tolerance=2.0)
    assert (ours.patch_cls != theirs.patch_cls).float().mean() < 1e-3
    assert (ours.dense_visibility != theirs.dense_visibility).float().mean() < 1e-4
    both = ours.dense_visibility & theirs.dense_visibility
    assert (ours.dense_flow - theirs.dense_flow)[both].abs().max() < 1e-3
    torch.testing.assert_close(1000 * ours.object_points, theirs.object_points, rtol=1e-4, atol=1e-3)


def test_the_tolerance_is_two_millimetres_or_a_share_of_the_diameter():
    batch = pose_batch(1, 1, SIZE, degrees=3)
    offset = {0.0019: 0.05, 0.0023: 0.05, 0.0023001: 0.12, 0.0026: 0.12}
    share = []
    for shift, diameter in offset.items():
        moved = batch | {"query_depth": batch["query_depth"] + shift * (batch["query_depth"] > 0)}
        moved["diameter"] = torch.tensor([diameter])
        share.append(labels_of(moved, class_rule="center").dense_visibility.float().mean().item())
    assert share[0] > 4 * share[1]
    assert share[2] > 4 * share[3]


def test_a_shift_of_the_pose_moves_the_centres_flow_by_as_much():
    """Pitfall 24: a part of a patch, which a difference of classes would not show."""
    batch = pose_batch(1, 2, SIZE, degrees=10)
    moved = {key: value.clone() for key, value in batch.items()}
    moved["K"][:, 0, 0, 2] += 1.0  # the camera of the query alone, by one pixel
    moved["query_depth"] = batch["query_depth"].roll(1, dims=-1)
    moved["masks"][:, 0] = batch["masks"][:, 0].roll(1, dims=-1)
    first, second = labels_of(batch), labels_of(moved)
    same = (first.patch_cls == second.patch_cls).view_as(first.patch_visibility)
    same &= first.flow_visibility & second.flow_visibility
    assert same.float().mean() > 0.1
    change = (second.flows - first.flows)[same]
    assert (change - torch.tensor([1 / PATCH, 0])).abs().max() < 1e-3
    assert (first.flows[first.flow_visibility] * PATCH % 1).std() > 0.1


def test_centre_flow_is_the_place_of_the_paired_patchs_centre():
    batch = pose_batch(1, 2, SIZE)
    labels = labels_of(batch)
    centers = patch_centers(SIZE, SIZE, PATCH, labels.flows)
    points = points_of(batch, 1)[0]
    for patch in seen_of(labels)[0, 0].nonzero()[:, 0].tolist():
        if not labels.flow_visibility[0, 0].flatten()[patch]:
            continue
        buddy = labels.patch_cls[0, 0, patch].item()
        top, left = buddy // GRID * PATCH + 3, buddy % GRID * PATCH + 3
        around = points[top : top + 2, left : left + 2].flatten(0, 1)
        place = project(batch["K"][0, 0], transform(batch["poses"][0, 0], around)).mean(0)
        expected = (place - centers[patch]) / PATCH
        assert (labels.flows[0, 0].flatten(0, 1)[patch] - expected).abs().max() < 1e-3


# ---- classes ----


def test_votes_are_those_of_a_loop_over_pixels():
    batch = hide(pose_batch(1, 2, SIZE), slice(0, 50))
    labels = labels_of(batch)
    patches = list(range(0, COUNT, 3))
    expected = torch.tensor([[one_label(batch, 0, s, p, LabelConfig()) for p in patches] for s in range(2)])
    assert (
        labels.patch_cls[0][:, patches] == expected
    ).float().mean() > 0.98  # a pixel on a border may fall either way
    assert {-1, COUNT} < set(expected.flatten().tolist()) | {COUNT}
    assert seen_of(labels).sum() > 20


def test_the_same_view_pairs_every_patch_with_itself():
    batch = pose_batch(1, 1, SIZE)
    for key in ("K", "poses", "masks"):
        batch[key][:, 1] = batch[key][:, 0]
    batch["template_depth"] = batch["query_depth"][:, None]
    for rule in ("vote", "center"):
        labels = labels_of(batch, class_rule=rule)
        seen = seen_of(labels)
        assert seen.sum() > 20
        assert (labels.patch_cls == COUNT).sum() == 0
        assert torch.equal(labels.patch_cls[seen], torch.arange(COUNT).expand(1, 1, -1)[seen])
        assert labels.flows[labels.flow_visibility].abs().max() < 1e-3
        v = (torch.arange(PATCH) - (PATCH - 1) / 2) / PATCH
        own = torch.stack(torch.meshgrid(v, v, indexing="xy"), -1).expand_as(labels.dense_flow)
        assert (labels.dense_flow - own)[labels.dense_visibility].abs().max() < 1e-3
        assert labels.patch_visibility.flatten(2)[seen].float().mean() > 0.7


def test_the_centre_rule_asks_one_pixel():
    batch = hide(pose_batch(2, 2, SIZE), slice(0, 50))
    labels = labels_of(batch, class_rule="center")
    on_object = ((batch["query_depth"] > 0) & batch["masks"][:, 0])[:, 4::8, 4::8].flatten(1)
    assert torch.equal(labels.patch_cls >= 0, on_object[:, None].expand(-1, 2, -1))
    votes = labels_of(batch)
    both = seen_of(labels) & seen_of(votes)
    grid = [(x // GRID, x % GRID) for x in (labels.patch_cls[both], votes.patch_cls[both])]
    apart = torch.maximum(*((a - b).abs() for a, b in zip(*grid, strict=True)))
    assert apart.float().mean() < 0.4
    assert apart.max() <= 2


def test_templates_of_the_other_side_see_nothing():
    batch = pose_batch(1, 1, SIZE, cast=sphere_depth)
    turn = torch.diag(torch.tensor([-1.0, 1, -1, 1]))
    batch["poses"][:, 1] = batch["poses"][:, 0] @ turn  # a sphere looks the same from everywhere
    batch["K"][:, 1] = batch["K"][:, 0]
    batch["template_depth"] = batch["query_depth"][:, None].clone()
    labels = labels_of(batch)
    labelled = labels.patch_cls[labels.patch_cls >= 0]
    assert (labelled == COUNT).float().mean() > 0.9
    assert labels.patch_visibility.float().mean() < 0.05


# ---- occlusion and limits ----


def test_what_is_hidden_in_the_query_is_not_seen():
    batch = pose_batch(2, 2, SIZE)
    hidden = hide(batch, slice(0, 60))
    plain, covered = labels_of(batch), labels_of(hidden)
    centers = patch_centers(SIZE, SIZE, PATCH, plain.flows)
    left = (centers[:, 0] < 56).expand(2, 2, -1)
    assert (covered.patch_cls[left] == -1).all()
    assert torch.equal(covered.patch_cls[~left & (centers[:, 0] > 64)], plain.patch_cls[~left & (centers[:, 0] > 64)])
    places = centers[:, None, None] + PATCH * covered.dense_flow
    assert places[covered.dense_visibility][:, 0].min() > 59
    without = labels_of(hidden, compute_visibility=False)
    assert without.dense_visibility.sum() > covered.dense_visibility.sum()
    shown = labels_of(hidden | {"masks": batch["masks"]})  # something near, but the mask does not say so
    assert (centers[:, None, None] + PATCH * shown.dense_flow)[shown.dense_visibility][:, 0].min() > 59


def test_one_sided_occlusion_sees_through_holes_of_the_depth():
    batch = pose_batch(1, 1, SIZE)
    deeper = batch | {"query_depth": batch["query_depth"].clone()}
    deeper["query_depth"][..., ::2] += 0.05 * (batch["query_depth"][..., ::2] > 0)
    two_sided, one_sided = labels_of(deeper), labels_of(deeper, occlusion="one_sided")
    assert one_sided.dense_visibility.sum() > 1.8 * two_sided.dense_visibility.sum() > 1000
    nearer = batch | {"query_depth": batch["query_depth"] - 0.02 * (batch["query_depth"] > 0)}
    assert labels_of(nearer, occlusion="one_sided").dense_visibility.sum() == 0


def test_max_flow_and_the_share_of_seen_pixels_decide_which_patches_are_taught():
    batch = pose_batch(2, 3, SIZE, degrees=40)
    wide, narrow = labels_of(batch, max_flow=10.0), labels_of(batch, max_flow=0.5)
    assert torch.equal(wide.dense_visibility, narrow.dense_visibility)
    assert torch.equal(wide.dense_supervised, wide.dense_visibility)
    largest = narrow.dense_flow.abs().amax(-1)
    assert torch.equal(narrow.dense_supervised, narrow.dense_visibility & (largest <= 0.5))
    seen_pixels = narrow.dense_visibility.sum((-2, -1))
    expected = (seen_pixels >= 0.1 * PATCH**2) & (largest.amax((-2, -1)) <= 0.5)
    assert torch.equal(narrow.patch_visibility.flatten(2), expected)
    picky = labels_of(batch, max_flow=10.0, visibility_threshold=0.9)
    assert picky.patch_visibility.sum() < wide.patch_visibility.sum()
    everyone = labels_of(batch, max_flow=0.5, compute_patch_visibility=False)
    assert torch.equal(everyone.patch_visibility.flatten(2), seen_of(everyone))


def test_nothing_but_pairs_has_flow():
    labels = labels_of(hide(pose_batch(2, 2, SIZE), slice(0, 50)))
    single = ~seen_of(labels)
    for mask in (labels.dense_visibility, labels.dense_supervised, labels.dense_surface):
        assert not mask[single].any()
    assert labels.dense_flow[~labels.dense_visibility].abs().max() == 0
    assert labels.flows.flatten(2, 3)[single].abs().max() == 0
    assert not (labels.dense_visibility & ~labels.dense_surface).any()
    assert not (labels.flow_visibility & ~labels.patch_visibility).any()


# ---- how they are made ----


def test_shapes_points_and_a_query_as_if_alone():
    batch = pose_batch(3, 2, SIZE)
    labels = labels_of(batch)
    assert labels.patch_cls.shape == (3, 2, COUNT)
    assert labels.patch_cls.dtype == torch.long
    assert labels.flows.shape == (3, 2, GRID, GRID, 2)
    assert labels.dense_flow.shape == (3, 2, COUNT, PATCH, PATCH, 2)
    for template in range(2):
        torch.testing.assert_close(
            labels.object_points[:, template], points_of(batch, template + 1), atol=1e-6, rtol=1e-5
        )
    alone = labels_of({key: value[1:2] for key, value in batch.items()})
    assert all(torch.equal(a[0], b[1]) for a, b in zip(alone, labels, strict=True))


def test_autocast_and_half_precision_depth_change_nothing_of_note():
    batch = pose_batch(1, 2, SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        cast = labels_of(batch)
    assert all(torch.equal(a, b) for a, b in zip(cast, labels_of(batch), strict=True))
    half = batch | {key: batch[key].half() for key in ("query_depth", "template_depth")}
    assert (labels_of(half).patch_cls == cast.patch_cls).float().mean() > 0.99


def test_an_empty_query_has_no_labels():
    batch = pose_batch(1, 2, SIZE)
    labels = labels_of(batch | {"query_depth": torch.zeros_like(batch["query_depth"])})
    assert (labels.patch_cls == -1).all()
    assert not labels.patch_visibility.any()
    assert all(torch.isfinite(x).all() for x in labels)


def test_a_patch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"`patch_size` must divide .* 112 x 112 .* 15"):
        build_labels(pose_batch(1, 1, SIZE), 15, LabelConfig())
