"""Meshes -> templates: a file per object, `<templates>/<object id>.safetensors`, and `templates.json` with how they
were made. The format of a file is described in `pipelines/vpog/templates.py`.

Folders of models are those of `data_prep/bop/models.py`, or any folder of meshes. A run that was interrupted goes on
with the same call: what is there and was made of the same mesh is left as it is; what was made of something else is
refused.
"""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from backlot.files import LockedError, file_sha256, json_sha256, lock, read_json, write_json
from backlot.mesh_views import Backend
from backlot.views import SUBDIVISIONS
from data_prep.bop.models import (
    ID_MAPS,
    MODELS_INFO_NAME,
    ModelInfo,
    Models,
    find_diameter,
    read_mesh,
    read_models,
)
from pipelines.vpog.templates import FORMAT_VERSION, render_template_set, stored_hash, template_path

TEMPLATES_NAME, LOCK_NAME = "templates.json", ".lock"
LISTS = (MODELS_INFO_NAME, *ID_MAPS)
SUFFIXES = (".ply", ".obj", ".glb", ".stl", ".off")
PICTURE_OF = {
    ".ply": re.compile(rb"^comment TextureFile (.+?)\s*$", re.MULTILINE),
    ".obj": re.compile(rb"^mtllib (.+?)\s*$", re.MULTILINE),
    ".mtl": re.compile(rb"^\s*map_Kd (?:.* )?(\S+)\s*$", re.MULTILINE),
}
PLY_HEADER = 65_536  # bytes in which its comments are


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


def render_all(
    models: Models | Path,
    out: Path,
    views: int = 162,
    size: int = 224,
    num_workers: int = 0,
    *,
    fov_degrees: float = 40.0,
    supersample: int = 2,
    backend: Backend = "auto",
    overwrite: bool = False,
) -> int:
    """Render every model; the number of those that were not there already.

    Args:
        models: or a folder of them, as `open_models` takes it.
        num_workers: processes; with less than two this one renders.
        overwrite: replace what was made of other meshes or settings.

    Raises:
        ValueError: one line: a mesh is missing or cannot be used, `out` holds templates made of something else, or
            another process renders into it.
    """
    models = models if isinstance(models, Models) else open_models(models)
    out = Path(out)
    recipe = Recipe(views, size, fov_degrees, supersample)
    recipe.check()
    missing = [model for model in models.values() if not model.path.is_file()]
    if missing:
        others = f", and those of {len(missing) - 1} others" if len(missing) > 1 else ""
        raise ValueError(f"the mesh of object {missing[0].object_id} is missing: {missing[0].path}{others}")
    try:
        claim = lock(out / LOCK_NAME)
    except LockedError as error:
        raise ValueError(f"another process ({error}) renders templates into {out}") from None
    with closing(claim):
        check_recipe(out, models.folder, recipe, overwrite)
        digests = {key: model_hash(model, recipe) for key, model in sorted(models.items())}
        work = [key for key, digest in digests.items() if not is_kept(out, models[key], digest, overwrite)]
        tasks = [(models[key], digests[key], recipe, backend, template_path(out, key)) for key in work]
        for _ in tqdm(run_tasks(tasks, num_workers), total=len(tasks), desc="templates", disable=None):
            pass
    return len(work)


def open_models(folder: Path, unit: float | None = None, object_ids: Collection[int] | None = None) -> Models:
    """The models of a folder that lists them, or else all meshes below it, numbered in the order of their paths.

    Args:
        unit: metres per unit of the meshes; of meshes without a list it is a metre by default.
        object_ids: only these.
    """
    folder = Path(folder)
    listed = any((place / name).is_file() for place in (folder, *folder.absolute().parents[:2]) for name in LISTS)
    paths = [] if listed else sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        return read_models(folder, unit, object_ids)
    unit = 1.0 if unit is None else unit
    found = Models(folder, {})
    for number, path in enumerate(paths):
        if object_ids is None or number in object_ids:
            extent = find_diameter(read_mesh(path, f"the mesh of object {number}").vertices) * unit
            found[number] = ModelInfo(number, path, extent, unit)
    return found if object_ids is None else Models(folder, {key: found[key] for key in object_ids})


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


def model_hash(model: ModelInfo, recipe: Recipe) -> str:
    """Of everything that a model's templates depend on, but for the backend."""
    files = [file_sha256(path) for path in model_files(model.path)]
    values = {"files": files, "unit": model.unit, "diameter": model.diameter}
    return json_sha256({**values, **asdict(recipe), "format_version": FORMAT_VERSION})


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


def is_kept(out: Path, model: ModelInfo, digest: str, overwrite: bool) -> bool:
    """Whether an object's templates are there and whole; those of another mesh are refused or made again."""
    path = template_path(out, model.object_id)
    if not path.is_file() or overwrite:
        return False
    before = stored_hash(path)
    if before is None:
        return False  # damaged: it is made again
    if before != digest:
        raise ValueError(
            f"{path} was made of something else than {model.path} is now: choose another folder, or give --overwrite"
        )
    return True


def run_tasks(tasks: list[tuple], num_workers: int) -> Iterator[int]:
    """Render here, or in processes that share nothing with this one: OpenGL does not survive a fork."""
    if num_workers < 2 or len(tasks) < 2:
        yield from map(render_model, tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_workers, len(tasks)), context) as pool:
        yield from pool.map(render_model, tasks)


def render_model(task: tuple[ModelInfo, str, Recipe, Backend, Path]) -> int:
    """Render one object and write its file; its id."""
    model, digest, recipe, backend, path = task
    templates = render_template_set(
        model.load_mesh(),
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
