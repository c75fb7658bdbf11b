"""The renderer against a planar projection, its symmetries, the made objects, and the folders and shards it writes."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shadow_oracle as oracle
import trimesh
from PIL import Image
from runs import ROOT

pytest.importorskip("mitsuba")

from data_prep.shadows import families as shadow_families
from data_prep.shadows import looks as shadow_looks
from data_prep.shadows import meshes as shadow_meshes
from data_prep.shadows import path_tracing as shadow_scene
from data_prep.shadows import render as render_shadows
from data_prep.shadows.commands import render as main
from data_prep.shadows.families import FAMILIES
from data_prep.shadows.looks import random_look
from data_prep.shadows.meshes import at_rest, load_mesh, procedural_object, resting_rotation
from data_prep.shadows.path_tracing import LIFT, Camera, Light, choose_variant, render_view, shadow_maps
from data_prep.shadows.render import plan_tracks, render_dataset

CAMERA = Camera(7.5)
SIZE = 64


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    shadow_scene.mitsuba("scalar_rgb")
    shadow_scene.set_threads(1)


@pytest.fixture(scope="module")
def chair():
    """Not symmetric in any way."""
    mesh = FAMILIES["chair"](np.random.default_rng(3))
    return at_rest(mesh, np.random.default_rng(1), upright=True)


@pytest.fixture(scope="module")
def vase():
    """Symmetric about z."""
    profile = [0, 0.6, 0.3, 0.7, 0], [0, 0, 0.9, 1.8, 1.8]
    return shadow_families.turned(*map(np.array, profile))


def shadow(mesh: trimesh.Trimesh, theta: float, phi: float, size: float, seed: int = 1, **settings) -> np.ndarray:
    return shadow_maps(mesh, CAMERA, [Light(theta, phi, size)], **{"image_size": SIZE, "seeds": [seed], **settings})[0]


def projected(mesh: trimesh.Trimesh, theta: float, phi: float, size: float, **settings) -> np.ndarray:
    settings = {"image_size": SIZE, "distance": CAMERA.distance, "supersample": 4, **settings}
    lights = {"theta": theta, "phi": phi, "size": size}
    return oracle.shadow_map(mesh.vertices + np.array([0, 0, LIFT]), mesh.faces, **lights, **settings)


def centroid(values: np.ndarray) -> np.ndarray:
    """(x, y) in pixels."""
    rows, columns = np.mgrid[0 : values.shape[0], 0 : values.shape[1]]
    return np.array([(values * columns).sum(), (values * rows).sum()]) / values.sum()


# --- the map --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["box", "chair", "lathe", "mug", "star", "glyph", "lamp"])
@pytest.mark.parametrize("light", [(35, 45, 2), (20, 250, 0.2)], ids=["hard", "harder"])
def test_map_agrees_with_the_projection(family, light):
    """Two programs that share no geometry. The rest is the dilation of edges by Pillow, see the next test."""
    mesh = at_rest(FAMILIES[family](np.random.default_rng(5)), np.random.default_rng(5), upright=True)
    ours, theirs = shadow(mesh, *light, spp=144), projected(mesh, *light, light_samples=8 if light[2] == 2 else 2)
    assert ours.max() > 0.95
    assert oracle.rmse(ours, theirs) <= 0.03
    assert oracle.zncc(ours, theirs) >= 0.985


@pytest.mark.parametrize("family", ["ring", "bar", "ladder"])
def test_thin_shadows_agree_the_better_the_finer_the_projection(family):
    mesh = at_rest(FAMILIES[family](np.random.default_rng(2)), np.random.default_rng(2), upright=True)
    ours = shadow(mesh, 30, 300, 2, spp=400)
    errors = [oracle.rmse(ours, projected(mesh, 30, 300, 2, supersample=fine)) for fine in (2, 4, 8)]
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]
    assert errors[2] < 0.012


def test_soft_shadows_agree_with_the_projection(chair):
    ours, theirs = shadow(chair, 12, 200, 6, spp=400), projected(chair, 12, 200, 6, supersample=8)
    assert oracle.rmse(ours, theirs) <= 0.01
    assert oracle.zncc(ours, theirs) >= 0.995


def test_power_and_albedo_change_nothing(chair):
    reference = shadow(chair, 35, 45, 4, spp=16)
    assert 0.9 < reference.max() <= 1
    assert reference.min() == 0
    np.testing.assert_allclose(shadow(chair, 35, 45, 4, spp=16, power=10.0), reference, atol=2e-6)
    for albedo in (0.2, 0.8):
        np.testing.assert_allclose(shadow(chair, 35, 45, 4, spp=16, albedo=albedo), reference, atol=2e-6)


def test_nothing_casts_no_shadow():
    empty = shadow(trimesh.Trimesh(), 30, 45, 4, spp=4, whole_frame=True)
    assert empty.shape == (SIZE, SIZE)
    assert (empty == 0).all()


@pytest.mark.parametrize("light", [(45, 90, 8), (45, 200, 8), (0, 0, 2), (40, 300, 3)])
def test_the_window_holds_all_of_the_shadow(chair, light):
    """Rendered in whole, the map is zero outside the window, also where the shadow reaches behind the camera."""
    whole, part = shadow(chair, *light, whole_frame=True), shadow(chair, *light)
    hull = shadow_scene.hull_points(chair.vertices)
    left, top, width, height = shadow_scene.shadow_window(hull, CAMERA, Light(*light), SIZE)
    inside = np.zeros((SIZE, SIZE), bool)
    inside[top : top + height, left : left + width] = True
    assert whole[~inside].sum() == 0
    assert part[~inside].sum() == 0
    assert oracle.rmse(whole, part) < 0.02
    if light[0] < 45:
        assert inside.mean() < 0.5


def test_a_shadow_out_of_the_picture_is_no_shadow(chair):
    far = chair.copy().apply_translation([40, 0, 0])
    view = render_view(far, CAMERA, [Light(10, 0, 2)], image_size=16, spp=4)
    assert view.shadows.max() == 0
    assert not view.mask.any()
    assert (view.picture == 0.5).all()


# --- symmetries -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("phi", "direction"), [(0, (-1, 0)), (90, (0, 1)), (180, (1, 0)), (270, (0, -1))])
def test_phi_turns_the_shadow(vase, phi, direction):
    shift = centroid(shadow(vase, 35, phi, 2, spp=16)) - centroid(shadow(vase, 0, phi, 2, spp=16))
    assert shift @ direction > 3
    across = abs(shift @ direction[::-1])
    assert across < 0.35  # pixels


def test_overhead_light_has_no_direction(vase, chair):
    maps = [shadow(vase, 0, phi, 4, spp=400) for phi in (0, 90, 180, 270)]
    for other in maps[1:]:
        assert oracle.rmse(maps[0], other) < 0.01
    assert oracle.rmse(maps[0], maps[0][:, ::-1]) < 0.01
    # A square light has corners, so other angles differ a little; they leave the shadow where it is.
    turned = [shadow(chair, 0, phi, 4, spp=100) for phi in (0, 30, 200)]
    for other in turned[1:]:
        assert np.linalg.norm(centroid(turned[0]) - centroid(other)) < 0.2


def test_a_little_light_angle_is_a_little_change(chair):
    """The square does not jump as the light leaves the zenith."""
    assert oracle.rmse(shadow(chair, 0, 77, 6, spp=256), shadow(chair, 0.01, 77, 6, spp=256)) < 0.004


def test_a_mirrored_object_under_a_mirrored_light_is_the_mirrored_map(chair):
    mirrored = chair.copy()
    mirrored.vertices[:, 0] *= -1
    mirrored.faces = mirrored.faces[:, ::-1]
    for phi in (30, 250):
        ours, theirs = shadow(chair, 35, phi, 3, spp=400), shadow(mirrored, 35, 180 - phi, 3, spp=400)
        assert oracle.rmse(ours, theirs) > 0.05
        assert oracle.rmse(ours, theirs[:, ::-1]) < 0.008
    pictures = [render_view(m, CAMERA, [], image_size=SIZE, spp=256) for m in (chair, mirrored)]
    assert oracle.rmse(pictures[0].alpha, pictures[1].alpha[:, ::-1]) < 0.01


def test_a_larger_light_gives_a_wider_penumbra():
    """The far edge of a wall's shadow: pixels between 10 and 90 %."""
    wall = trimesh.creation.box(extents=(0.2, 2.0, 1.2)).apply_translation([0, 0, 0.6])
    widths = []
    for size in (2, 3, 4, 6, 8):
        values = shadow(wall, 30, 0, size, spp=256, image_size=96)
        row = values[round(centroid(values)[1])]
        widths.append(((row > 0.1) & (row < 0.9)).sum())
    assert widths == sorted(widths)
    assert len(set(widths)) == 5
    assert widths[-1] > 2.5 * widths[0]


# --- the picture ----------------------------------------------------------------------------------------------------


def test_the_picture_knows_nothing_of_the_shadows_light(chair):
    look = random_look(np.random.default_rng(4))
    lights = [Light(10, 20, 2), Light(40, 200, 8)]
    views = [render_view(chair, CAMERA, [light], look=look, image_size=48, spp=16) for light in lights]
    assert np.array_equal(views[0].picture, views[1].picture)
    assert np.array_equal(views[0].mask, views[1].mask)
    assert not np.array_equal(views[0].shadows, views[1].shadows)


def test_picture_and_mask_fit_the_object(chair):
    """The mask is the drawn silhouette; the picture is mid-grey outside it and something else inside."""
    view = render_view(chair, CAMERA, [], image_size=SIZE, spp=64)
    eye, right, up, forward = oracle.camera_frame(CAMERA.distance)
    local = chair.vertices - eye
    focal = SIZE / 2 / np.tan(np.radians(24.5))
    x, y = (SIZE / 2 + sign * focal * (local @ axis) / (local @ forward) for sign, axis in ((1, right), (-1, up)))
    rows, columns = np.flatnonzero(view.mask.any(axis=1)), np.flatnonzero(view.mask.any(axis=0))
    np.testing.assert_allclose([columns[0], columns[-1] + 1, rows[0], rows[-1] + 1], [*ends(x), *ends(y)], atol=1)
    assert (view.picture[view.alpha == 0] == 0.5).all()
    assert np.abs(view.picture[view.mask] - 0.5).mean() > 0.02
    assert view.picture.min() >= 0
    assert view.picture.max() <= 1


def ends(values: np.ndarray) -> tuple[float, float]:
    return values.min(), values.max()


@pytest.mark.parametrize("pattern", ["solid", "parts", "gradient", "checker", "stripes", "noise"])
def test_patterns_show_their_colours(pattern):
    mesh = FAMILIES["table"](np.random.default_rng(0))
    mesh = at_rest(mesh, np.random.default_rng(0), upright=True)
    colours = np.array([[0.8, 0.1, 0.1], *3 * [[0.1, 0.1, 0.8]]])
    look = replace(random_look(np.random.default_rng(1)), pattern=pattern, colours=colours, metallic=0.0)
    view = render_view(mesh, CAMERA, [], look=look, image_size=SIZE, spp=16)
    red, _, blue = view.picture[view.mask].T
    assert (red > blue).any()
    assert (blue > red).any() == (pattern != "solid")


def test_smooth_normals_keep_creases():
    box, ball = trimesh.creation.box(), trimesh.creation.icosphere(3)
    np.testing.assert_allclose(shadow_looks.smooth_normals(box), np.repeat(box.face_normals[:, None], 3, axis=1))
    np.testing.assert_allclose(shadow_looks.smooth_normals(ball), ball.triangles, atol=0.02)


# --- objects --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_makes_meshes_that_rest_on_the_floor(family):
    heights = set()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        mesh = at_rest(FAMILIES[family](rng), rng, upright=seed % 2 == 0)
        assert np.isfinite(mesh.vertices).all()
        assert 8 <= len(mesh.faces) < 20_000
        low, high = mesh.bounds
        assert shadow_meshes.SIZE_RANGE[0] <= (high - low).max() <= shadow_meshes.SIZE_RANGE[1]
        np.testing.assert_allclose([*(low + high)[:2], low[2]], 0, atol=1e-9)
        assert mesh.area_faces.sum() > 0.1
        assert (high - low).min() > 0.02
        heights.add(round(high[2], 3))
    assert len(heights) > 6


def test_objects_are_functions_of_seed_and_number():
    objects = [procedural_object(7, number) for number in range(len(FAMILIES))]
    assert {thing.family for thing in objects} == set(FAMILIES)
    assert objects[5].object_id == f"{objects[5].family}-S7-000005"
    again = procedural_object(7, 5)
    assert np.array_equal(again.mesh.vertices, objects[5].mesh.vertices)
    assert procedural_object(8, 5).object_id != again.object_id
    assert procedural_object(7, 5, stream="T").object_id != again.object_id


def test_a_dropped_body_comes_to_rest_on_a_stable_face():
    """A brick on any of its sides, on the wide ones more often; a cone never on its tip; nothing where it tips over."""
    down = []
    for seed in range(40):
        brick = trimesh.creation.box(extents=(1, 2, 3)).apply_transform(
            trimesh.transformations.random_rotation_matrix()
        )
        brick.apply_transform(resting_rotation(brick, np.random.default_rng(seed)))
        down.append(round(np.ptp(brick.vertices[:, 2])))
        floor = brick.vertices[:, 2] < brick.vertices[:, 2].min() + 1e-6
        assert floor.sum() == 4
    assert set(down) == {1, 2, 3}
    assert down.count(1) > down.count(3)
    for seed in range(20):
        cone = trimesh.creation.cone(radius=1, height=1)
        cone.apply_transform(resting_rotation(cone, np.random.default_rng(seed)))
        assert (cone.vertices[:, 2] < cone.vertices[:, 2].min() + 1e-6).sum() >= 3
        tall = trimesh.creation.box(extents=(1, 2, 1))
        tall.vertices[tall.vertices[:, 2] > 0, 0] += 1.4  # leans so far that it would fall over
        tall.apply_transform(resting_rotation(tall, np.random.default_rng(seed)))
        assert abs(np.ptp(tall.vertices[:, 2]) - 1) > 0.1


@pytest.mark.parametrize("extents", [(2, 1, 0), (2, 0, 0)])
def test_flat_meshes_stay_as_they_are(extents):
    x, y, _ = extents
    flat = trimesh.Trimesh([[0, 0, 0], [x, 0, 0], [x, y, 0], [0, y, 0]], [[0, 1, 2], [0, 2, 3]], process=False)
    assert np.array_equal(resting_rotation(flat, np.random.default_rng(0)), np.eye(4))
    placed = at_rest(flat, np.random.default_rng(0))
    assert np.isfinite(render_view(placed, CAMERA, [Light(20, 0, 2)], image_size=16, spp=4).shadows).all()


# --- data sets ------------------------------------------------------------------------------------------------------

SMALL = {"image_size": 24, "spp": 4, "seed": 3, "variant": "scalar_rgb", "progress": False}
COUNT = 10


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def command(out: Path, *flags: object) -> list[str]:
    options = ["--image_size", 24, "--spp", 4, "--seed", 3, "--variant", "scalar_rgb", "--num_samples", COUNT]
    return ["--out", str(out), *map(str, [*options, *flags])]


def refuse(capsys: pytest.CaptureFixture, message: str, out: Path, *flags: object) -> None:
    """The command ends with exit code 2 and one line on stderr, after what a bar may have left there."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(command(out, *flags))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line or "Traceback" in line]
    assert re.search(f"^error: .*{message}", line), line


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "data"
    assert render_dataset(folder, num_samples=COUNT, **SMALL) == COUNT
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_a_folder_holds_what_the_guide_says(finished):
    metadata = json.loads((finished / "metadata.json").read_text())
    assert list(metadata) == [f"{view:06d}_{light}" for view in range(3) for light in range(4)][:COUNT]
    assert {path.name for path in finished.iterdir()} == {
        "objects",
        "masks",
        "shadows",
        "metadata.json",
        "dataset.json",
    }
    for stem, entry in metadata.items():
        assert list(entry) == ["theta", "phi", "size", "object_id", "clipped", "family"]
        assert 0 <= entry["theta"] <= 45
        assert 0 <= entry["phi"] <= 360
        assert 2 <= entry["size"] <= 8
        assert entry["theta"] == round(entry["theta"], 4)
        picture, mask, shadow = (
            Image.open(finished / name / f"{stem}.png") for name in ("objects", "masks", "shadows")
        )
        assert (picture.mode, mask.mode, shadow.mode) == ("RGBA", "L", "I;16")
        assert picture.size == mask.size == shadow.size == (24, 24)
        assert np.asarray(mask).max() == 255
        assert np.array_equal(np.asarray(picture)[..., 3], np.asarray(mask))
        assert np.asarray(picture)[0, 0].tolist() == [128, 128, 128, 0]
        assert np.asarray(shadow).max() > 255
    assert len({entry["object_id"] for entry in metadata.values()}) == 3
    assert metadata["000001_0"]["object_id"] == metadata["000001_3"]["object_id"]
    assert len({(entry["theta"], entry["phi"], entry["size"]) for entry in metadata.values()}) == COUNT


def test_a_stored_map_is_the_map_of_the_stored_light(tmp_path):
    render_dataset(tmp_path, num_samples=3, **{**SMALL, "image_size": 32, "spp": 64, "lights_per_view": 2})
    for stem, entry in json.loads((tmp_path / "metadata.json").read_text()).items():
        view = int(stem[:6])
        thing = procedural_object(3, view)
        assert thing.object_id == entry["object_id"]
        stored = np.asarray(Image.open(tmp_path / "shadows" / f"{stem}.png")) / 65535
        rng = np.random.default_rng(np.random.SeedSequence([3, ord("S"), view, render_shadows.VIEW]))
        camera, light = Camera(rng.uniform(6.3, 8.3)), Light(entry["theta"], entry["phi"], entry["size"])
        again = shadow_maps(thing.mesh, camera, [light], image_size=32, spp=64, seeds=[99])[0]
        assert oracle.rmse(stored, again) < 0.02
        assert oracle.zncc(stored, again) > 0.97


def test_workers_and_threads_change_no_byte(finished, tmp_path):
    render_dataset(tmp_path / "two", num_samples=COUNT, num_workers=2, **SMALL)
    assert snapshot(tmp_path / "two") == snapshot(finished)
    shadow_scene.set_threads(3)
    render_dataset(tmp_path / "threads", num_samples=COUNT, **SMALL)
    shadow_scene.set_threads(1)
    assert snapshot(tmp_path / "threads") == snapshot(finished)


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path):
    """SIGKILL of the main process with two at work, in the middle of it."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    main(command(whole, "--num_samples", 32))
    arguments = command(killed, "--num_samples", 32, "--num_workers", 2)
    process = subprocess.Popen(
        [sys.executable, "-m", "data_prep.shadows", "render", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while len(list(killed.glob("shadows/*.png"))) < 8 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 8 <= len(list(killed.glob("shadows/*.png"))) < 32
    assert not survivors(children)
    main(command(killed, "--num_samples", 32))
    assert snapshot(killed) == snapshot(whole)


@pytest.mark.parametrize(
    ("kind", "dies_at"), [*(("folder", n) for n in (1, 2, 3, 9, 14, 15, 27)), *(("webdataset", n) for n in (1, 2, 4))]
)
def test_a_run_that_dies_while_it_writes_goes_on_to_the_same_bytes(finished, tmp_path, monkeypatch, dies_at, kind):
    settings = {**SMALL, "num_samples": COUNT, "format": kind, "shard_size": 4}
    whole = finished
    if kind == "webdataset":
        whole = tmp_path / "whole"
        render_dataset(whole, **settings)
    write_file, calls = render_shadows.write_file, []

    def dies(path: Path, data: bytes, **keywords) -> None:
        calls.append(path)
        if len(calls) == dies_at:
            path.with_name(f"{path.name}.tmp").write_bytes(data[: len(data) // 2])
            raise KeyboardInterrupt
        write_file(path, data, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(render_shadows, "FLUSH_SECONDS", 0.0)
        patch.setattr(render_shadows, "write_file", dies)
        with pytest.raises(KeyboardInterrupt):
            render_dataset(tmp_path / "data", **settings)
        calls[:] = [None] * 100
        kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("data/*.tar")}
        render_dataset(tmp_path / "data", **settings)
    assert snapshot(tmp_path / "data") == snapshot(whole)
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())


def survivors(pids: list[str]) -> list[str]:
    """Those of the processes that still run after some seconds in which they may notice that their parent is gone."""
    for _ in range(50):
        states = [Path(f"/proc/{pid}/stat") for pid in pids]
        running = [path for path in states if path.exists() and ") Z " not in path.read_text()]
        if not running:
            return []
        time.sleep(0.1)
    return [path.parent.name for path in running]


def test_files_are_replaced_and_never_written_in_place(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    (tmp_path / "link").hardlink_to(path)
    render_shadows.write_file(path, b"new")
    assert (path.read_bytes(), (tmp_path / "link").read_bytes()) == (b"new", b"old")


@pytest.mark.parametrize(
    "lost", ["objects/000001_2.png", "masks/000000_0.png", "shadows/000002_1.png", "metadata.json"]
)
def test_what_is_lost_is_rendered_again_and_nothing_else(finished, copy, lost):
    (copy / lost).unlink()
    (copy / "masks" / "000007_0.png.tmp").write_bytes(b"half")
    others = {path: path.stat().st_mtime_ns for path in copy.glob("*/*.png") if path.stem[:6] not in lost}
    render_dataset(copy, num_samples=COUNT, **SMALL)
    assert snapshot(copy) == snapshot(finished)
    if lost != "metadata.json":
        assert all(path.stat().st_mtime_ns == then for path, then in others.items())


def test_more_samples_extend_a_folder(finished, copy, tmp_path):
    render_dataset(copy, num_samples=14, **SMALL)
    render_dataset(tmp_path / "at once", num_samples=14, **SMALL)
    assert snapshot(copy) == snapshot(tmp_path / "at once")
    assert snapshot(copy).items() > {k: v for k, v in snapshot(finished).items() if k.endswith(".png")}.items()
    with pytest.raises(ValueError, match="was made for 14 samples, not 10: choose another --out"):
        render_dataset(copy, num_samples=COUNT, **SMALL)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--seed", 4), r"was made with --seed 3, not 4: choose another --out"),
        (("--image_size", 32), r"was made with --image_size 24, not 32"),
        (("--theta", 0, 30), r"was made with --theta \[0.0, 45.0\], not \[0.0, 30.0\]"),
        (("--spp", 9), r"was made with --spp 4, not 9"),
        (("--grid", "integer"), r"was made with --grid continuous, not integer"),
        (("--lights_per_view", 2), r"was made with --lights_per_view 4, not 2"),
        (("--tracks",), r"was made with --tracks False, not True"),
        (("--format", "webdataset"), r"was made with --format folder, not webdataset"),
    ],
)
def test_a_folder_of_other_settings_is_refused(finished, capsys, flags, message):
    before = snapshot(finished)
    refuse(capsys, message, finished, *flags)
    assert snapshot(finished) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--theta", 0, 46), r"--theta takes LO <= HI within \[0, 45\], got 0 46"),
        (("--theta", -1, 40), r"--theta takes LO <= HI within \[0, 45\], got -1 40"),
        (("--size", 1, 8), r"--size takes LO <= HI within \[2, 8\], got 1 8"),
        (("--size", 5, 4), r"--size takes LO <= HI within \[2, 8\], got 5 4"),
        (("--phi", 0, 361), r"--phi takes LO <= HI within \[0, 360\], got 0 361"),
        (("--theta", 1, "nan"), r"--theta nan: input should be a finite number"),
        (("--camera", 1, 8), r"--camera takes LO <= HI within \[5, 20\]"),
        (("--num_samples", 0), r"--num_samples 0: input should be greater than or equal to 1"),
        (("--num_workers", 0), r"--num_workers 0: input should be greater than or equal to 1"),
        (("--lights_per_view", 0), r"--lights_per_view 0: input should be greater than or equal to 1"),
        (("--seed", -1), r"--seed -1: input should be greater than or equal to 0"),
        (("--grid", "integer", "--theta", 0.2, 0.8), r"no whole number within --theta 0.2 0.8"),
        (("--meshes", "/no/such/folder"), r"/no/such/folder holds no mesh \(.glb, .gltf, .obj, .ply, .stl\)"),
    ],
)
def test_bad_flags_get_one_line(tmp_path, capsys, flags, message):
    refuse(capsys, message, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_folders_of_others_and_damaged_records_are_refused(copy, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"")
    refuse(capsys, "photos holds files but no dataset.json: choose another --out", tmp_path / "photos")
    (copy / "metadata.json").write_text("{")
    refuse(capsys, "metadata.json is damaged: remove it to render again", copy)
    (copy / "dataset.json").write_text('{"format_version": 2, "settings": {}}')
    refuse(capsys, "dataset.json is not of format version 1", copy)


def test_a_whole_number_grid_has_whole_numbers(tmp_path):
    ranges = {"theta": (10.0, 12.5), "phi": (0.0, 3.0), "size": (2.0, 4.0), "grid": "integer"}
    shots = render_shadows.plan_samples(render_shadows.Settings(**ranges), 400)
    angles = np.array([angles for shot in shots for angles in shot.lights])
    assert [sorted(set(column)) for column in angles.T] == [[10, 11, 12], [0, 1, 2, 3], [2, 3, 4]]


def test_eight_bits_when_asked_for(tmp_path):
    render_dataset(tmp_path, num_samples=1, shadow_bits=8, **SMALL)
    assert Image.open(tmp_path / "shadows" / "000000_0.png").mode == "L"


# --- shards and tracks ----------------------------------------------------------------------------------------------


def test_shards_hold_the_samples_of_the_folder(finished, tmp_path):
    settings = {**SMALL, "format": "webdataset", "shard_size": 4}
    render_dataset(tmp_path / "a", num_samples=COUNT, **settings)
    assert sorted(snapshot(tmp_path / "a")) == ["dataset.json", *(f"shard-0000{k}.tar" for k in range(3))]
    metadata = json.loads((finished / "metadata.json").read_text())
    seen = {}
    for path in sorted((tmp_path / "a").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid) == (0, 0, 0)
                seen[member.name] = tar.extractfile(member).read()
    suffixes = ("image.png", "mask.png", "shadow.png", "metadata.json")
    assert list(seen) == [f"{stem}.{suffix}" for stem in metadata for suffix in suffixes]
    for stem, entry in metadata.items():
        assert json.loads(seen[f"{stem}.metadata.json"]) == entry
        for name, folder in render_shadows.FOLDERS.items():
            assert seen[f"{stem}.{name}.png"] == (finished / folder / f"{stem}.png").read_bytes()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").glob("*.tar")}
    lost = tmp_path / "a" / "shard-00001.tar"
    whole = lost.read_bytes()
    lost.unlink()
    render_dataset(tmp_path / "a", num_samples=COUNT, **settings)
    assert lost.read_bytes() == whole
    assert all(path == lost or path.stat().st_mtime_ns == then for path, then in times.items())
    with pytest.raises(ValueError, match="was made for 10 samples, not 11"):
        render_dataset(tmp_path / "a", num_samples=11, **settings)


def test_the_tracks_are_the_grids_of_the_benchmark():
    shots = plan_tracks(50)
    lights = {
        stem: (shot.track, *angles) for shot in shots for stem, angles in zip(shot.stems, shot.lights, strict=True)
    }
    assert len(lights) == 555
    counts = {track: sum(light[0] == track for light in lights.values()) for track in {shot.track for shot in shots}}
    assert counts == {"softness_control": 150, "direction_control_horz": 270, "direction_control_vert": 135}
    assert lights["softness_control_149"][1:] == (30, 0, 8)
    assert lights["direction_control_horz_019"][1:] == (35, 20, 2)
    assert lights["direction_control_vert_008"][1:] == (45, 0, 2)
    assert len({shot.number for shot in shots}) == 80


def test_tracks_are_rendered_on_objects_of_their_own(finished, tmp_path):
    main(command(tmp_path, "--tracks", "--num_models", 1))
    metadata = json.loads((tmp_path / "metadata.json").read_text())
    assert len(metadata) == 3 + 18 + 9
    assert next(iter(metadata)) == "direction_control_horz_000"
    assert metadata["softness_control_002"]["track"] == "softness_control"
    trained_on = {entry["object_id"] for entry in json.loads((finished / "metadata.json").read_text()).values()}
    objects = {entry["object_id"] for entry in metadata.values()}
    assert len(objects) == 3
    assert not objects & trained_on


# --- meshes of the user ---------------------------------------------------------------------------------------------


@pytest.fixture
def meshes(tmp_path):
    """A scene of two parts (glb), a chair (obj), a coloured ball (ply) in a subfolder, and a copy of the chair."""
    folder = tmp_path / "meshes"
    (folder / "balls").mkdir(parents=True)
    scene = trimesh.Scene([trimesh.creation.box(), trimesh.creation.box().apply_translation([0, 3, 0])])
    scene.export(folder / "two.glb")
    FAMILIES["chair"](np.random.default_rng(0)).export(folder / "chair.obj")
    shutil.copy(folder / "chair.obj", folder / "same chair.obj")
    ball = trimesh.creation.icosphere(3)
    ball.visual.vertex_colors = np.tile([255, 0, 0, 255], (len(ball.vertices), 1))
    ball.export(folder / "balls" / "red.ply")
    (folder / "notes.txt").write_text("no mesh")
    return folder


def test_a_folder_of_meshes_is_rendered(meshes, tmp_path, capsys):
    main(command(tmp_path / "out", "--meshes", meshes, "--num_samples", 6, "--lights_per_view", 1))
    metadata = json.loads((tmp_path / "out" / "metadata.json").read_text())
    names = [entry["object_id"].rpartition("-")[0] for entry in metadata.values()]
    assert sorted(names[:3]) == sorted(names[3:]) == ["balls_red", "chair", "two"]
    for stem in metadata:
        assert np.asarray(Image.open(tmp_path / "out" / "masks" / f"{stem}.png")).any()
        assert np.asarray(Image.open(tmp_path / "out" / "shadows" / f"{stem}.png")).max() > 20_000

    moved = tmp_path / "moved"
    meshes.rename(moved)
    before = snapshot(tmp_path / "out")
    main(command(tmp_path / "out", "--meshes", moved, "--num_samples", 6, "--lights_per_view", 1))
    assert snapshot(tmp_path / "out") == before
    trimesh.creation.box().export(moved / "new.stl")
    flags = ("--meshes", moved, "--num_samples", 6, "--lights_per_view", 1)
    refuse(capsys, "was made with --meshes .*, not .*: choose another --out", tmp_path / "out", *flags)


def test_meshes_keep_their_colours_and_gltf_stands_up(meshes):
    ball = at_rest(load_mesh(meshes / "balls" / "red.ply"), np.random.default_rng(0))
    look = replace(random_look(np.random.default_rng(0), own_colours=True), pattern="own", metallic=0.0)
    view = render_view(ball, CAMERA, [], look=look, image_size=32, spp=16)
    red, green, _ = view.picture[view.mask].mean(axis=0)
    assert red > 0.3
    assert green < 0.5 * red
    scene = load_mesh(meshes / "two.glb")
    np.testing.assert_allclose(scene.extents, [1, 1, 4])


BROKEN = {
    "text.obj": b"nothing of the kind",
    "empty.ply": b"",
    "noise.glb": bytes(range(256)),
    "noise.stl": b"solid nonsense",
    "noise.ply": b"ply\nformat ascii 1.0\nelement vertex nine\nend_header\n",
    "words.gltf": b"{",
    "list.gltf": b"[]",
    "nan.obj": b"v nan 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n",
    "point.obj": b"v 1 1 1\nv 1 1 1\nv 1 1 1\nf 1 2 3\n",
    "cloud.ply": b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\nproperty float z\n"
    b"end_header\n0 0 0\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_meshes_are_named_before_anything_is_rendered(meshes, tmp_path, capsys, name):
    (meshes / name).write_bytes(BROKEN[name])
    refuse(capsys, name.replace(".", r"\."), tmp_path / "out", "--meshes", meshes)
    assert not (tmp_path / "out").exists()


# --- Mitsuba --------------------------------------------------------------------------------------------------------


def test_auto_takes_the_first_variant_that_survives_its_probe(monkeypatch):
    monkeypatch.setattr(shadow_scene, "PROBE", "import os, sys\nsys.argv[1].startswith('cuda') and os.abort()\n")
    assert choose_variant() == "llvm_ad_rgb"
    monkeypatch.setattr(shadow_scene, "PROBE", "import os, sys\nsys.argv[1] != 'scalar_rgb' and os.abort()\n")
    assert choose_variant() == "scalar_rgb"
    with pytest.raises(ValueError, match="does not render with variant llvm_ad_rgb here"):
        choose_variant("llvm_ad_rgb")
    monkeypatch.setattr(shadow_scene, "PROBE", "raise SystemExit(3)")
    with pytest.raises(ValueError, match="does not render with variant auto here"):
        choose_variant()


def test_the_probe_renders():
    assert shadow_scene.variant_works("scalar_rgb")
    assert not shadow_scene.variant_works("no_such_variant")


@pytest.mark.parametrize("name", ["mitsuba", "trimesh", "mapbox_earcut"])
def test_a_missing_library_gets_one_line(tmp_path, monkeypatch, capsys, name):
    find_spec = render_shadows.importlib.util.find_spec
    monkeypatch.setattr(
        render_shadows.importlib.util, "find_spec", lambda wanted: None if wanted == name else find_spec(wanted)
    )
    refuse(capsys, rf"{name} is missing: pip install 'backlot\[render\]'", tmp_path / "out")
