"""Templates of folders of models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from backlot.files import lock
from data_prep.bop.models import write_models
from data_prep.bop.render_templates import LOCK_NAME, open_models, render_all
from pipelines.vpog.templates import TemplateSet, template_path

SMALL = {"views": 42, "size": 32, "supersample": 1, "backend": "zbuffer"}


def box(*extents: float) -> trimesh.Trimesh:
    mesh = trimesh.creation.box(extents)
    mesh.visual.vertex_colors = np.tile([255, 0, 0, 255], (8, 1)).astype(np.uint8)
    return mesh


@pytest.fixture
def models(tmp_path) -> Path:
    return write_models(tmp_path, {1: box(0.1, 0.05, 0.04), 5: box(0.03, 0.2, 0.03)})


def times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}


def test_a_bop_folder_is_rendered_in_metres(models, tmp_path):
    out = tmp_path / "templates"
    assert render_all(models, out, **SMALL) == 2
    assert sorted(times(out)) == ["000001.safetensors", "000005.safetensors"]
    templates = TemplateSet.load(template_path(out, 5))
    assert templates.object_id == 5
    assert templates.diameter == pytest.approx(np.linalg.norm((0.03, 0.2, 0.03)))
    assert templates.depth.max() < 1
    red = templates.rgba[templates.masks]
    assert (red[:, 0] > 100).all()
    assert (red[:, 1:3] == 0).all()
    recipe = json.loads((out / "templates.json").read_text())
    assert (recipe["views"], recipe["size"], recipe["models"]) == (42, 32, str(models))


def test_what_is_there_is_kept_and_what_is_missing_or_damaged_is_made(models, tmp_path):
    out = tmp_path / "templates"
    render_all(models, out, **SMALL)
    first, bytes_before = times(out), template_path(out, 1).read_bytes()
    assert render_all(models, out, **SMALL) == 0
    assert times(out) == first
    template_path(out, 1).unlink()
    assert render_all(models, out, **SMALL) == 1
    assert times(out)["000005.safetensors"] == first["000005.safetensors"]
    assert template_path(out, 1).read_bytes() == bytes_before
    template_path(out, 5).write_bytes(template_path(out, 5).read_bytes()[:1000])
    assert render_all(models, out, **SMALL) == 1
    assert len(TemplateSet.load(template_path(out, 5))) == 42


def test_what_was_made_of_something_else_is_refused(models, tmp_path):
    out = tmp_path / "templates"
    render_all(models, out, **SMALL)
    with pytest.raises(ValueError, match=r"holds templates with size 32, not 48: .* --overwrite"):
        render_all(models, out, **{**SMALL, "size": 48})
    write_models(tmp_path, {1: box(0.1, 0.05, 0.06), 5: box(0.03, 0.2, 0.03)})
    with pytest.raises(ValueError, match=r"000001.safetensors was made of something else than .*obj_000001.ply"):
        render_all(models, out, **SMALL)
    assert render_all(models, out, **SMALL, overwrite=True) == 2
    assert render_all(models, out, **SMALL) == 0


def test_a_change_of_settings_that_was_killed_does_not_mix(models, tmp_path):
    out = tmp_path / "templates"
    render_all(models, out, **SMALL)
    (out / "templates.json").unlink()
    with pytest.raises(ValueError, match="was made of something else"):
        render_all(models, out, **{**SMALL, "fov_degrees": 50.0})


def test_a_missing_mesh_is_one_clear_line(models, tmp_path):
    (models / "obj_000005.ply").unlink()
    with pytest.raises(ValueError, match=r"the mesh of object 5 is missing: .*obj_000005.ply$"):
        render_all(models, tmp_path / "templates", **SMALL)
    assert not times(tmp_path / "templates")


def test_two_processes_do_not_render_into_one_folder(models, tmp_path):
    out = tmp_path / "templates"
    hold = (
        "import sys, pathlib; from backlot.files import lock; held = lock(pathlib.Path(sys.argv[1]));"
        "print(1, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(out / LOCK_NAME)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match=r"another process .* renders templates into"):
            render_all(models, out, **SMALL)
        other.communicate(b"\n")
    lock(out / LOCK_NAME).close()


def test_any_folder_of_meshes_with_textures(tmp_path):
    folder = tmp_path / "meshes"
    for number, name in enumerate(("b", "a")):
        mesh = trimesh.creation.box((0.1, 0.1, 0.1 + 0.1 * number))
        flat = trimesh.Trimesh(mesh.triangles.reshape(-1, 3), np.arange(36).reshape(12, 3), process=False)
        picture = Image.new("RGB", (4, 4), (0, 0, 255))
        flat.visual = trimesh.visual.TextureVisuals(np.full((36, 2), 0.5), image=picture)
        (folder / name).mkdir(parents=True)
        flat.export(folder / name / "model.obj")
    found = open_models(folder)
    assert [found[key].path.parent.name for key in sorted(found)] == ["a", "b"]
    out = tmp_path / "templates"
    assert render_all(found, out, **SMALL) == 2
    templates = TemplateSet.load(template_path(out, 0))
    assert templates.diameter == pytest.approx(np.linalg.norm((0.1, 0.1, 0.2)))
    blue = templates.rgba[templates.masks]
    assert (blue[:, 2] > 100).all()
    assert (blue[:, :2] == 0).all()
    texture = next((folder / "a").glob("*.png"))
    Image.new("RGB", (4, 4), (0, 255, 0)).save(texture)
    with pytest.raises(ValueError, match=r"000000.safetensors was made of something else"):
        render_all(found, out, **SMALL)
    assert sorted(open_models(folder, object_ids=[1])) == [1]


@pytest.mark.slow
def test_processes_write_the_same_files(models, tmp_path):
    render_all(models, tmp_path / "one", **SMALL)
    assert render_all(models, tmp_path / "two", **SMALL, num_workers=2) == 2
    for object_id in (1, 5):
        one, two = (template_path(tmp_path / name, object_id).read_bytes() for name in ("one", "two"))
        assert one == two


def test_wrong_settings_and_empty_folders_are_named(models, tmp_path):
    with pytest.raises(ValueError, match="--views must be one of 42, 162, 642, got 7"):
        render_all(models, tmp_path / "templates", views=7)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        render_all(tmp_path / "empty", tmp_path / "templates", **SMALL)
