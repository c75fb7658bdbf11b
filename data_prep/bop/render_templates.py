"""Meshes -> templates: a file per object, `<templates>/<object id>.safetensors`, and `templates.json` with how they
were made. The format of a file is described in `pipelines/vpog/templates.py`.

A folder of models is that of a BOP data set (`obj_000001.ply`, in millimetres, `models_info.json`) or any folder of
meshes, in metres, whose ids are the numbers of their sorted paths. A run that was interrupted goes on with the same
call: what is there and was made of the same mesh is left as it is; what was made of something else is refused.
"""

from __future__ import annotations

import json
import multiprocessing
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import safetensors
import trimesh
from tqdm import tqdm

from backlot.files import file_sha256, json_sha256, lock, read_json, write_json
from backlot.mesh_views import Backend
from backlot.views import SUBDIVISIONS
from pipelines.vpog.templates import FORMAT_VERSION, render_template_set, template_path

TEMPLATES_NAME, MODELS_INFO_NAME, LOCK_NAME = "templates.json", "models_info.json", ".lock"
SUFFIXES = (".ply", ".obj", ".glb", ".stl", ".off")
MILLIMETRE = 1e-3
BOP_MODEL = re.compile(r"obj_(\d{6})\.ply")
PICTURE_OF = {
    ".ply": re.compile(rb"^comment TextureFile (.+?)\s*$", re.MULTILINE),
    ".obj": re.compile(rb"^mtllib (.+?)\s*$", re.MULTILINE),
    ".mtl": re.compile(rb"^\s*map_Kd (?:.* )?(\S+)\s*$", re.MULTILINE),
}
PLY_HEADER = 65_536  # bytes in which its comments are


@dataclass(frozen=True)
class Model:
    """A mesh file of one object; `unit` in metres, `diameter` in metres if it is known."""

    object_id: int
    path: Path
    unit: float
    diameter: float | None = None


@dataclass(frozen=True)
class Recipe:
    """What templates depend on besides the mesh: views, pixels of a side, field of view, rays along a pixel's side."""

    views: int = 162
    size: int = 224
    fov_degrees: float = 40.0
    supersample: int = 2

    def check(self) -> None:
        if self.views not in SUBDIVISIONS:
            raise ValueError(f"--views must be one of {', '.join(map(str, SUBDIVISIONS))}, got {self.views}")
        if self.size < 8:
            raise ValueError(f"--size must be at least 8, got {self.size}")


@dataclass
class Report:
    """Ids of the objects that were rendered, and of those whose templates were there and valid."""

    rendered: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)


def render_all(
    models_dir: Path,
    out: Path,
    views: int = 162,
    size: int = 224,
    num_workers: int = 0,
    *,
    unit: float | None = None,
    fov_degrees: float = 40.0,
    supersample: int = 2,
    backend: Backend = "auto",
    overwrite: bool = False,
) -> Report:
    """Render every model of a folder.

    Args:
        models_dir: of a BOP data set, or any folder of meshes.
        num_workers: processes besides this one; 0 = this one renders.
        unit: metres of the meshes' unit; 0.001 in a BOP folder, 1 in any other by default.
        overwrite: replace what was made of other meshes or settings.

    Raises:
        FileNotFoundError: there is no mesh, or one that `models_info.json` lists is missing.
        ValueError: `out` holds templates made of something else, or a mesh cannot be used; the message names it.
        backlot.files.LockedError: another process renders into `out`.
    """
    models_dir, out = Path(models_dir), Path(out)
    recipe = Recipe(views, size, fov_degrees, supersample)
    recipe.check()
    models = find_models(models_dir, unit)
    out.mkdir(parents=True, exist_ok=True)
    report = Report()
    with closing(lock(out / LOCK_NAME)):
        check_recipe(out, models_dir, recipe, overwrite)
        work = []
        for model in models:
            digest = model_hash(model)
            (report.kept if is_kept(out, model, digest, overwrite) else work).append((model, digest))
        report.kept = [model.object_id for model, _ in report.kept]
        tasks = [(model, digest, recipe, backend, template_path(out, model.object_id)) for model, digest in work]
        for object_id in tqdm(run_tasks(tasks, num_workers), total=len(tasks), desc="templates", disable=None):
            report.rendered.append(object_id)
    return report


def find_models(models_dir: Path, unit: float | None = None) -> list[Model]:
    """The models of a folder, by id."""
    if not models_dir.is_dir():
        raise FileNotFoundError(f"there is no folder of models {models_dir}")
    if unit is not None and not 0 < unit < np.inf:
        raise ValueError(f"--unit must be positive, got {unit:g}")
    info_path = models_dir / MODELS_INFO_NAME
    plain = {int(match[1]): path for path in models_dir.glob("obj_*.ply") if (match := BOP_MODEL.fullmatch(path.name))}
    if info_path.is_file() or plain:
        info = {int(key): value for key, value in read_json(info_path).items()} if info_path.is_file() else {}
        missing = sorted(info.keys() - plain.keys())
        if missing:
            others = f", nor are those of {len(missing) - 1} other objects" if len(missing) > 1 else ""
            raise FileNotFoundError(
                f"the mesh {models_dir / f'obj_{missing[0]:06d}.ply'} that {MODELS_INFO_NAME} lists is not there{others}"
            )
        scale = MILLIMETRE if unit is None else unit
        diameters = {key: value["diameter"] * scale for key, value in info.items() if "diameter" in value}
        return [Model(number, plain[number], scale, diameters.get(number)) for number in sorted(plain)]
    paths = sorted(path for path in models_dir.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise FileNotFoundError(f"{models_dir} holds no meshes ({', '.join(SUFFIXES)})")
    return [Model(number, path, 1.0 if unit is None else unit) for number, path in enumerate(paths)]


def model_files(path: Path) -> Iterator[Path]:
    """A mesh's file and those that it takes its colours from."""
    yield path
    pattern = PICTURE_OF.get(path.suffix.lower())
    if pattern is None:
        return
    with path.open("rb") as file:
        text = file.read(PLY_HEADER) if path.suffix.lower() == ".ply" else file.read()
    for name in sorted(set(pattern.findall(text))):
        other = path.parent / name.decode("utf-8", "replace")
        if other.is_file():
            yield from model_files(other)


def model_hash(model: Model) -> str:
    """Of everything that a model's pictures depend on."""
    files = [file_sha256(path) for path in model_files(model.path)]
    return json_sha256({"files": files, "unit": model.unit, "diameter": model.diameter})


def check_recipe(out: Path, models_dir: Path, recipe: Recipe, overwrite: bool) -> None:
    """Write down how the templates of a folder are made; refuse to mix."""
    path = out / TEMPLATES_NAME
    if path.is_file() and not overwrite:
        try:
            before = read_json(path)
        except ValueError as error:
            raise ValueError(f"{path} is damaged: delete it, or give --overwrite") from error
        for name, value in asdict(recipe).items():
            if before.get(name) != value:
                raise ValueError(
                    f"{out} holds templates with {name} {before.get(name)}, not {value}:"
                    " choose another folder, or give --overwrite"
                )
    write_json(path, {"format_version": FORMAT_VERSION, **asdict(recipe), "models": str(models_dir)})


def is_kept(out: Path, model: Model, digest: str, overwrite: bool) -> bool:
    """Whether an object's templates are there and whole; those of another mesh are refused or made again."""
    path = template_path(out, model.object_id)
    if not path.is_file() or overwrite:
        return False
    try:
        with safetensors.safe_open(path, "numpy") as file:
            before = (file.metadata() or {}).get("mesh_hash")
    except safetensors.SafetensorError:
        return False  # damaged: it is made again
    if before != digest:
        raise ValueError(
            f"{path} was made of another mesh than {model.path} is now: choose another folder, or give --overwrite"
        )
    return True


def run_tasks(tasks: list[tuple], num_workers: int) -> Iterator[int]:
    """Render here, or in processes that share nothing with this one: OpenGL does not survive a fork."""
    if num_workers <= 0 or len(tasks) < 2:
        yield from map(render_model, tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_workers, len(tasks)), context) as pool:
        yield from pool.map(render_model, tasks)


def render_model(task: tuple[Model, str, Recipe, Backend, Path]) -> int:
    """Render one object and write its file; its id."""
    model, digest, recipe, backend, path = task
    templates = render_template_set(
        load_mesh(model),
        model.object_id,
        recipe.views,
        recipe.size,
        fov_degrees=recipe.fov_degrees,
        supersample=recipe.supersample,
        backend=backend,
        diameter=model.diameter,
        mesh_hash=digest,
    )
    templates.save(path)
    return model.object_id


def load_mesh(model: Model) -> trimesh.Trimesh:
    """The mesh of a model, in metres, its colours and textures with it.

    Raises:
        ValueError: the file cannot be read as a mesh with triangles.
    """
    try:
        mesh = trimesh.load(model.path, force="mesh", process=False)
    except (ValueError, KeyError, IndexError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{model.path} cannot be read as a mesh: {' '.join(str(error).split())}") from error
    if not isinstance(mesh, trimesh.Trimesh) or not len(mesh.faces):
        raise ValueError(f"{model.path} has no triangles")
    if not np.isfinite(mesh.vertices).all():
        raise ValueError(f"{model.path} has vertices that are not finite")
    mesh.apply_scale(model.unit)
    return mesh
