"""What a template costs: colours, depth and mask of one view of an object, by backend, on one core.

Views take turns over the backends, so that a busy machine slows all of them alike. Times are of the processor, of all
threads of this process; the median over the views is printed, the least is what an idle machine comes close to.

    python -m benchmarks.template_rendering [--faces 5120] [--size 224] [--views 42] [--output FILE]
"""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path

import numpy as np
import trimesh
from PIL import Image
from pydantic import Field

from backlot import gl_views
from backlot.bodies import Body, Light
from backlot.command_line import parse
from backlot.config import Section
from backlot.mesh_views import choose_backend, develop
from backlot.views import look_at_poses, template_camera, view_directions

RADIUS = 0.1


class Settings(Section):
    faces: int = Field(5120, ge=20)
    """at least; the next icosphere is taken"""
    size: int = Field(224, ge=8)
    """pixels of a side"""
    supersample: tuple[int, ...] = (1, 2)
    """rays along a pixel's side; each is timed"""
    views: int = Field(42, ge=1, le=162)
    """that are rendered"""
    textured: bool = False
    """with a picture in place of colours at vertices"""
    seed: int = Field(0, ge=0)
    """of the picture"""
    output: Path | None = None
    """also write the figures and every view's times here, as JSON"""


def create_mesh(settings: Settings) -> trimesh.Trimesh:
    """A dented ball."""
    subdivisions = int(np.ceil(np.log(settings.faces / 20) / np.log(4) - 1e-9))
    mesh = trimesh.creation.icosphere(subdivisions, RADIUS)
    unit = mesh.vertices / RADIUS
    mesh.vertices = mesh.vertices * (1 - 0.2 * np.sin(5 * unit[:, :1]) ** 2)
    if settings.textured:
        uv = np.column_stack([np.arctan2(unit[:, 1], unit[:, 0]) / (2 * np.pi) + 0.5, unit[:, 2] / 2 + 0.5])
        picture = np.random.default_rng(settings.seed).integers(0, 256, (256, 512, 3), np.uint8)
        mesh.visual = trimesh.visual.TextureVisuals(uv, image=Image.fromarray(picture))
    else:
        mesh.visual.vertex_colors = np.rint((unit / 2 + 0.5) * 255).astype(np.uint8)
    return mesh


def measure(settings: Settings) -> dict:
    """Milliseconds of each view, by backend and rays, and of getting the mesh ready, once for all its views."""
    mesh, size = create_mesh(settings), (settings.size, settings.size)
    K, distance = template_camera(RADIUS, settings.size)
    poses = look_at_poses(view_directions(162)[: settings.views], distance)[:, None]
    began = time.process_time()
    body = Body.of(mesh)
    preparation = time.process_time() - began
    backends = ["zbuffer"] if gl_views.problem() else ["zbuffer", "gl"]
    drawers = {
        f"{backend} supersample {s}": (choose_backend(backend, False)([body], size, s), s)
        for backend in backends
        for s in settings.supersample
    }
    times = {name: [] for name in drawers}
    for number, pose in enumerate((poses[0], *poses)):  # the first is to warm up
        for name, (draw, supersample) in drawers.items():
            began = time.process_time()
            colors, covered, _, instances = draw(pose, K, Light())
            develop(colors, covered, instances >= 0, supersample)
            if number:
                times[name].append((time.process_time() - began) * 1e3)
    return {
        "faces": len(mesh.faces),
        "median_ms_per_view": {name: statistics.median(values) for name, values in times.items()},
        "least_ms_per_view": {name: min(values) for name, values in times.items()},
        "preparation_ms": preparation * 1e3,
        "no_gl": gl_views.problem(),
        "ms": times,
        "settings": settings.model_dump(mode="json", exclude={"output"}),
        "versions": {"numpy": np.__version__},
        "load_average": os.getloadavg(),
    }


def main(argv: list[str] | None = None) -> None:
    settings = parse(Settings, argv, "python -m benchmarks.template_rendering", __doc__)
    figures = measure(settings)
    print(f"{figures['faces']} triangles, {settings.size} pixels; processor time, {settings.views} views")
    for name, median in figures["median_ms_per_view"].items():
        print(f"{name}: {median:.1f} ms per view, least {figures['least_ms_per_view'][name]:.1f}")
    print(f"the mesh is made ready once, in {figures['preparation_ms']:.0f} ms")
    if figures["no_gl"]:
        print(f"gl was not timed: {figures['no_gl']}")
    if settings.output:
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        settings.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
