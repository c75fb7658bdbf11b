"""How long labels of pose training take, all at once and in a plain loop over (query, template, patch).

The loop is the same rule, one patch at a time: its pixels' points go to the template and vote, the pixels of the patch
that wins come back. It leaves patches off the object at once, and does without centre flow and object points. Pictures
of a ball stand for renderings. Seconds are the processor's, so that a busy machine changes neither side; one thread.

    python -m benchmarks.vpog_labels [--queries 8] [--templates 6] [--size 224] [--output FILE]
"""
# ruff: noqa: N803 - K is what everybody calls it

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from backlot.cameras import (
    backproject,
    inverse_pose,
    make_pose,
    matrix_from_quat_wxyz,
    project,
    transform,
)
from backlot.command_line import parse
from backlot.config import Section
from objectives.pose_labels import PoseLabels, build_labels, depth_tolerance, patch_centers
from objectives.pose_settings import LabelConfig

DIAMETER, DISTANCE = 0.12, 0.35  # metres


class Settings(Section):
    queries: int = Field(8, ge=1)
    templates: int = Field(6, ge=1)
    """of each query"""
    size: int = Field(224, ge=8)
    """side of the pictures in pixels"""
    patch_size: int = Field(16, ge=1)
    """divides the side"""
    rounds: int = Field(5, ge=1)
    """turns of the labels made at once; the loop has one"""
    seed: int = Field(0, ge=0)
    """of the poses"""
    output: Path | None = None
    """also write the figures here, as JSON"""


def draw_batch(settings: Settings) -> dict[str, Tensor]:
    """Views of a ball whose frame is turned by up to some 30 degrees between query and template, as a batch."""
    torch.manual_seed(settings.seed)
    pictures, size = settings.templates + 1, settings.size
    K = torch.tensor([[2.2 * size, 0, (size - 1) / 2], [0, 2.2 * size, (size - 1) / 2], [0, 0, 1]])
    base = torch.randn(settings.queries, 1, 4)
    quat = base + 0.15 * base.norm(dim=-1, keepdim=True) * torch.randn(settings.queries, pictures, 4)
    shift = torch.tensor([0, 0, DISTANCE]) + 0.01 * torch.randn(settings.queries, pictures, 3)
    rays = backproject(K, torch.ones(size, size))
    along = torch.einsum("hwc,bsc->bshw", rays, shift)
    inside = along.square() - rays.square().sum(-1) * (shift.square().sum(-1) - DIAMETER**2 / 4)[..., None, None]
    depth = torch.where(inside > 0, (along - inside.clamp(min=0).sqrt()) / rays.square().sum(-1), 0.0)
    return {
        "K": K.expand(settings.queries, pictures, 3, 3),
        "poses": make_pose(matrix_from_quat_wxyz(quat), shift),
        "query_depth": depth[:, 0],
        "template_depth": depth[:, 1:],
        "masks": depth > 0,
        "diameter": torch.full((settings.queries,), DIAMETER),
    }


def see(
    points: Tensor, depth: Tensor, K: Tensor, pose: Tensor, target: Tensor, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Places (P, 2), pixels (P, 2) long, and which are seen, of an object's points with depth (P,) in a picture."""
    moved = transform(pose, points)
    places = project(K, moved)
    pixels = (places + 0.5).floor()
    inside = ((pixels >= 0) & (pixels < len(target))).all(-1) & (moved[:, 2] > 0)
    pixels = pixels.clamp(0, len(target) - 1).long()
    at = target[pixels[:, 1], pixels[:, 0]]
    return places, pixels, (depth > 0) & inside & (at > 0) & ((moved[:, 2] - at).abs() < tolerance)


def label_one_by_one(batch: dict[str, Tensor], patch_size: int, config: LabelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """`patch_cls`, `dense_flow` and `dense_visibility` by voting, patch by patch."""
    queries, size = batch["query_depth"].shape[:2]
    templates, grid = batch["template_depth"].shape[1], size // patch_size
    count = grid**2
    centers = patch_centers(size, size, patch_size, batch["query_depth"])
    patch_cls = torch.full((queries, templates, count), -1)
    flow = torch.zeros(queries, templates, count, patch_size, patch_size, 2)
    visibility = torch.zeros(queries, templates, count, patch_size, patch_size, dtype=torch.bool)

    def window(patch: int) -> tuple[slice, slice]:
        top, left = patch // grid * patch_size, patch % grid * patch_size
        return slice(top, top + patch_size), slice(left, left + patch_size)

    def lift(depth: Tensor, K: Tensor, pose: Tensor, patch: int) -> tuple[Tensor, Tensor]:
        rows, columns = window(patch)
        camera = K.clone()
        camera[:2, 2] -= torch.tensor([float(columns.start), float(rows.start)])
        points = backproject(camera, depth[rows, columns]).flatten(0, 1)
        return transform(inverse_pose(pose), points), depth[rows, columns].flatten()

    for q in range(queries):
        query_depth = batch["query_depth"][q] * batch["masks"][q, 0]
        query = batch["K"][q, 0], batch["poses"][q, 0]
        tolerance = depth_tolerance(batch["diameter"], config)[q].item()
        for t in range(templates):
            depth = batch["template_depth"][q, t]
            template = batch["K"][q, t + 1], batch["poses"][q, t + 1]
            for p in range(count):
                num_object = (query_depth[window(p)] > 0).sum()
                if num_object < config.min_object_share * patch_size**2:
                    continue
                _, pixels, seen = see(*lift(query_depth, *query, p), *template, depth, tolerance)
                if seen.sum() < config.min_visible_share * num_object:
                    patch_cls[q, t, p] = count
                    continue
                pixels = pixels[seen] // patch_size
                buddy = torch.bincount(pixels[:, 1] * grid + pixels[:, 0], minlength=count).argmax().item()
                patch_cls[q, t, p] = buddy
                places, _, seen = see(*lift(depth, *template, buddy), *query, query_depth, tolerance)
                offsets = torch.where(seen[:, None], (places - centers[p]) / patch_size, 0.0)
                flow[q, t, p] = offsets.view(patch_size, patch_size, 2)
                visibility[q, t, p] = seen.view(patch_size, patch_size)
    return patch_cls, flow, visibility


def compare(labels: PoseLabels, one_by_one: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
    """Shares of classes and of visible pixels that differ, and the largest difference of flow in patches."""
    patch_cls, flow, visibility = one_by_one
    both = labels.dense_visibility & visibility & (labels.patch_cls == patch_cls)[..., None, None]
    return {
        "classes_differ": (labels.patch_cls != patch_cls).float().mean().item(),
        "visible_pixels_differ": (labels.dense_visibility != visibility).float().mean().item(),
        "largest_flow_difference": ((labels.dense_flow - flow).abs().amax(-1) * both).max().item(),
    }


def measure(settings: Settings) -> dict:
    """Processor seconds of both, their ratio, and how far they differ."""
    batch, config = draw_batch(settings), LabelConfig()
    labels = build_labels(batch, settings.patch_size, config)
    times = []
    for _ in range(settings.rounds):
        began = time.process_time()
        build_labels(batch, settings.patch_size, config)
        times.append(time.process_time() - began)
    began = time.process_time()
    one_by_one = label_one_by_one(batch, settings.patch_size, config)
    loop = time.process_time() - began
    seen = (labels.patch_cls >= 0) & (labels.patch_cls < labels.patch_cls.shape[-1])
    return {
        "versions": {"torch": torch.__version__},
        "load_average": os.getloadavg(),
        "settings": settings.model_dump(mode="json", exclude={"output"}),
        "seconds": {"at_once": times, "loop": loop},
        "loop_over_at_once": loop / statistics.median(times),
        "patches": {"all": seen.numel(), "paired": int(seen.sum())},
        "difference": compare(labels, one_by_one),
    }


def main(argv: list[str] | None = None) -> None:
    settings = parse(Settings, argv, "python -m benchmarks.vpog_labels", __doc__)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    figures = measure(settings)
    times, patches = figures["seconds"], figures["patches"]
    print(
        f"{settings.queries} queries x {settings.templates} templates, {settings.size} pixels: "
        f"{patches['all']} patches, {patches['paired']} paired"
    )
    print(
        f"loop / at once: {figures['loop_over_at_once']:.1f}  ({times['loop']:.2f} s, at once "
        f"{1e3 * statistics.median(times['at_once']):.0f} ms)"
    )
    for name, value in figures["difference"].items():
        print(f"{name.replace('_', ' ')}: {value:.2g}")
    if settings.output:
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        settings.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
