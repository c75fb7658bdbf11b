"""Scenes on disk: objects with their poses, the picture that shows them, and what is known of both.

    <root>/<split>/<scene_id>/      split: train, val and, if there is one, test
        shapes.safetensors          occupancy (N, R^3 / 8) uint8, and the poses: what shapes are encoded from
        latents.safetensors         shape (N, tokens, channels) and the poses: what is trained on
        conditionals.safetensors    optional: image, pointmap, masks, cond_tokens
        metadata.json
    <root>/<split>/scenes.txt       optional: one scene_id a line; without it all folders, sorted
    <root>/stats.json               statistics of the train split, a `PoseCodec`

N objects, one row each. The last three may be `.pt` instead of `.safetensors` (torch.load, weights_only). Poses, of
any float type: `translation` (N, 1, 3), `scale` (N, 1, 3) log side lengths, `6drotation_normalized` (N, 1, 6) the first
two columns of R, not standardised, and `translation_scale` (N, 1, 1), optional: p_scene = R (exp(scale) p_object) +
translation. A packed occupancy is `numpy.packbits` of a boolean grid (R, R, R), axes x, y, z, R of the metadata.

`shape` lies as `shape_layout` of the metadata says: tokens_channels (N, T, C) or channels_tokens (N, C, T). It is never
guessed from the sizes; only a grid (N, C, R, R, R) speaks for itself.

Conditionals: `image` (3, S, S) uint8, or floats in [-1, 1]; `pointmap` (3, S, S) floats, scene coordinates, NaN where
there is nothing; `masks` (N, S, S) uint8 or bool, not 0 = object; `cond_tokens` (L, C) shared, or (N, L, C), floats.

metadata.json: `num_objects`, and if known `scene_id`, `object_ids`, `families` (a name per object), `frame` (floor or
camera), `scene_shift` (3 numbers), `scene_scale`, `camera` (`intrinsics` 3 x 3 in units of the picture's side,
`scene_from_camera` 4 x 4, OpenCV axes, `image_size`), `isotropic_scale`, `resolution` R, `codec` (the VAE).

`python -m data_prep.scenes verify ROOT` names every scene that is not like this.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, ValidationInfo, field_validator
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from backlot.files import write_file
from backlot.metadata import Metadata, describe_errors
from backlot.modalities import OPTIONAL_POSES, POSES, WIDTHS

SPLITS = ("train", "val", "test")
KINDS = ("shapes", "latents", "conditionals")
FORMATS = ("safetensors", "pt")
LAYOUTS = ("tokens_channels", "channels_tokens")
FRAMES = ("floor", "camera")
METADATA_NAME = "metadata.json"
SCENES_NAME = "scenes.txt"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CONDITION_RULES = {
    "image": ("[3, S, S]", (torch.uint8, *FLOATS)),
    "pointmap": ("[3, S, S]", FLOATS),
    "masks": ("[N, S, S]", (torch.uint8, torch.bool)),
    "cond_tokens": ("[L, C] or [N, L, C]", FLOATS),
}
CONDITIONS = tuple(CONDITION_RULES)
# What torch.load raises for damaged files, found by damaging some.
DAMAGED = (
    *(AssertionError, AttributeError, EOFError, LookupError, OverflowError, RuntimeError, TypeError, ValueError),
    torch.serialization.pickle.UnpicklingError,
)


@dataclass(frozen=True)
class Scene:
    """What lies in a scene's folder; latents are float32 with tokens before channels, all else is as stored."""

    tensors: dict[str, Tensor]
    conditionals: dict[str, Tensor]
    metadata: dict


# --- writing --------------------------------------------------------------------------------------------------------


def write_scene(
    folder: str | Path,
    *,
    tensors: Mapping[str, Tensor | np.ndarray],
    conditionals: Mapping[str, Tensor | np.ndarray] | None = None,
    metadata: Mapping | None = None,
    kind: str = "latents",
    format: str = "safetensors",
) -> None:
    """Write a scene's files, each whole or not at all, metadata.json last.

    New shapes make everything else in the folder stale: it is removed.

    Args:
        tensors: the contents of the file `kind`, `shapes` or `latents`.
        conditionals, metadata: what is None stays as it is.
        format: `safetensors` or `pt`, of latents and conditionals; shapes are always safetensors.

    Raises:
        ValueError: it would not be read again; names scene and field.
    """
    folder = Path(folder)
    if kind not in ("shapes", "latents"):
        raise ValueError(f"`kind` must be shapes or latents, got {kind!r}")
    if format not in FORMATS:
        raise ValueError(f"`format` must be one of {', '.join(FORMATS)}, got {format!r}")
    metadata = dict(metadata) if metadata is not None else read_metadata(folder)
    tensors = _tensors(tensors)
    contents = {kind: tensors} | ({} if conditionals is None else {"conditionals": _tensors(conditionals)})
    _, problems = _examine(contents, metadata, kind)
    if problems:
        raise bad_scene(folder, problems[0])
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "shapes":
        (folder / METADATA_NAME).unlink(missing_ok=True)
        for name in KINDS:
            _remove(folder, name, FORMATS)
    for name, values in contents.items():
        own = "safetensors" if name == "shapes" else format
        write_file(folder / f"{name}.{own}", _to_bytes(values, own), durable=False)
        _remove(folder, name, [other for other in FORMATS if other != own])
    write_metadata(folder, metadata)


def write_metadata(folder: Path, metadata: Mapping) -> None:
    write_file(folder / METADATA_NAME, (json.dumps(metadata, indent=2, allow_nan=False) + "\n").encode(), durable=False)


def _tensors(values: Mapping[str, Tensor | np.ndarray]) -> dict[str, Tensor]:
    return {
        name: torch.as_tensor(value).detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in values.items()
    }


def _to_bytes(values: dict[str, Tensor], format: str) -> bytes:
    if format == "safetensors":
        return save(values)
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return buffer.getvalue()


def _remove(folder: Path, kind: str, formats: Iterable[str]) -> None:
    for format in formats:
        (folder / f"{kind}.{format}").unlink(missing_ok=True)


# --- reading --------------------------------------------------------------------------------------------------------


def bad_scene(folder: str | Path, reason: str) -> ValueError:
    folder = Path(folder)
    return ValueError(f"scene {folder.name!r} of {folder.parent}: {reason}")


def read_scene(folder: str | Path, kind: str = "latents", conditionals: bool = True) -> Scene:
    """Read and check the `shapes` or `latents` of a scene, and its conditionals if there are any and they are wanted.

    Raises:
        ValueError: something is wrong with it; names scene and field of the first problem.
    """
    scene, problems = examine_scene(folder, kind, conditionals)
    if problems:
        raise bad_scene(folder, problems[0])
    return scene


def check_scene(folder: str | Path, kind: str = "latents") -> list[str]:
    """All that keeps `read_scene` from reading a scene, one line each; empty for a good one."""
    return [str(bad_scene(folder, reason)) for reason in examine_scene(folder, kind)[1]]


def find_file(folder: str | Path, kind: str) -> Path | None:
    """The file of a kind; safetensors where both formats are there, None where none is."""
    paths = [Path(folder) / f"{kind}.{format}" for format in FORMATS]
    return next((path for path in paths if path.is_file()), None)


def read_tensors(folder: str | Path, kind: str) -> dict[str, Tensor]:
    """The tensors of a file as they are stored; ValueError, one line, if it is missing or cannot be read."""
    try:
        return _read_tensors(Path(folder), kind)
    except ValueError as error:
        raise bad_scene(folder, str(error)) from None


def read_metadata(folder: str | Path) -> dict:
    """metadata.json; ValueError, one line, if it is missing or no JSON object."""
    try:
        return _read_metadata(Path(folder))
    except ValueError as error:
        raise bad_scene(folder, str(error)) from None


def _read_tensors(folder: Path, kind: str) -> dict[str, Tensor]:
    path = find_file(folder, kind)
    if path is None:
        raise ValueError(f"{kind}.safetensors{'' if kind == 'shapes' else f' (or {kind}.pt)'} is missing")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read ({error.strerror or error})") from None
    try:
        if path.suffix == ".safetensors":
            return dict(sorted(load(data).items()))  # else in another order each time
        buffer = io.BytesIO(data)
        values = torch.load(buffer, map_location="cpu", weights_only=True)
    except (SafetensorError, *DAMAGED) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path.name} is damaged or holds more than tensors ({reason[:120]})") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{path.name} holds a {type(values).__name__}, not a dict of tensors")
    return values


def _read_metadata(folder: Path) -> dict:
    def refuse(constant: str) -> None:
        raise ValueError(f"it holds {constant}")

    try:
        metadata = json.loads((folder / METADATA_NAME).read_bytes(), parse_constant=refuse)
    except FileNotFoundError:
        raise ValueError(f"{METADATA_NAME} is missing") from None
    except OSError as error:
        raise ValueError(f"{METADATA_NAME} cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{METADATA_NAME} is damaged: not JSON ({error})") from None
    if not isinstance(metadata, dict):
        raise ValueError(f"{METADATA_NAME} is damaged: not a JSON object")
    return metadata


def examine_scene(folder: str | Path, kind: str, conditionals: bool = True) -> tuple[Scene | None, list[str]]:
    """A scene, None where its tensors cannot be read at all, and what is wrong with it, which does not name it."""
    folder = Path(folder)
    if not folder.is_dir():
        return None, ["its folder is missing"]
    problems, contents, metadata = [], {}, None
    try:
        metadata = _read_metadata(folder)
    except ValueError as error:
        problems.append(str(error))
    wanted = [kind, "conditionals"] if conditionals and find_file(folder, "conditionals") else [kind]
    for name in wanted:
        try:
            contents[name] = _read_tensors(folder, name)
        except ValueError as error:
            problems.append(str(error))
    if kind not in contents:
        return None, problems
    scene, more = _examine(contents, metadata, kind)
    return scene, problems + more


# --- what a good scene is -------------------------------------------------------------------------------------------


def _examine(contents: dict[str, dict], metadata: dict | None, kind: str) -> tuple[Scene | None, list[str]]:
    known, problems, tensors = metadata or {}, [], contents[kind]
    if kind == "shapes":
        problems += check_shapes(tensors, known.get("resolution"))
    else:
        try:
            tensors = tokens_first(tensors, known.get("shape_layout"))
        except ValueError as error:
            problems.append(str(error))
        problems += check_latents(tensors)
    count = count_objects(tensors)
    conditionals = contents.get("conditionals", {})
    problems += check_conditionals(conditionals, count)
    if metadata is None:  # which has been said; not also what is missing from it
        problems = [problem for problem in problems if METADATA_NAME not in problem]
    else:
        problems += check_metadata(metadata, count)
    return Scene(tensors, conditionals, known), problems


def count_objects(tensors: Mapping[str, object]) -> int | None:
    """The number of objects that all modalities agree on; None if they do not."""
    counts = {len(value) for value in tensors.values() if isinstance(value, Tensor) and value.ndim}
    return counts.pop() if len(counts) == 1 else None


def tokens_first(tensors: dict[str, Tensor], layout: str | None) -> dict[str, Tensor]:
    """Latents as stored -> float32 with `shape` (N, tokens, channels); ValueError if its layout is not declared.

    Tensors that `check_latents` will refuse are left as they are.
    """
    tensors = {
        name: value.float() if isinstance(value, Tensor) and value.dtype in FLOATS else value
        for name, value in tensors.items()
    }
    shape = tensors.get("shape")
    if not isinstance(shape, Tensor):
        return tensors
    if shape.ndim == 5 and shape.shape[2] == shape.shape[3] == shape.shape[4]:
        return tensors | {"shape": to_tokens(shape)}
    if shape.ndim == 3 and layout not in LAYOUTS:
        raise ValueError(
            f"latents: shape is {list(shape.shape)}, which axis holds the tokens is not declared:"
            f" `shape_layout` of {METADATA_NAME} must be one of {', '.join(LAYOUTS)}, got {layout!r}"
        )
    if shape.ndim == 3 and layout == "channels_tokens":
        return tensors | {"shape": shape.transpose(1, 2).contiguous()}
    return tensors


def check_latents(latents: Mapping[str, object]) -> list[str]:
    """The problems of latents with tokens before channels, one line each, which name the modality."""
    problems = _check_names("latents", latents, ("shape", *POSES), OPTIONAL_POSES)
    shape = latents.get("shape")
    if isinstance(shape, Tensor) and shape.dtype in FLOATS and (shape.ndim != 3 or 0 in shape.shape[1:]):
        problems.append(f"latents: shape is {list(shape.shape)}, it must be [N, tokens, channels]")
    return problems + _check_objects("latents", latents, ("shape", *WIDTHS))


def check_shapes(shapes: Mapping[str, object], resolution: object) -> list[str]:
    """The problems of packed occupancies with their poses, one line each, which name the field."""
    problems = _check_names("shapes", shapes, ("occupancy", *POSES), OPTIONAL_POSES)
    occupancy = shapes.get("occupancy")
    if not _is_count(resolution) or resolution % 2:
        problems.append(f"`resolution` of {METADATA_NAME} must be an even number, got {resolution!r}")
    elif isinstance(occupancy, Tensor):
        if occupancy.dtype != torch.uint8 or occupancy.ndim != 2 or occupancy.shape[1] != resolution**3 // 8:
            wanted = f"[N, {resolution**3 // 8}] of type uint8"
            problems.append(f"shapes: occupancy is {_describe(occupancy)}, it must be {wanted}")
        elif len(empty := (occupancy == 0).all(1).nonzero().flatten().tolist()):
            problems.append(f"shapes: occupancy of object {_join(empty)} is empty")
    return problems + _check_objects("shapes", shapes, ("occupancy", *WIDTHS))


def check_conditionals(values: Mapping[str, object], num_objects: int | None) -> list[str]:
    """The problems of conditionals, one line each, which name the field; `num_objects` None compares no counts."""
    problems = _check_names("conditionals", values, (), CONDITIONS)
    sides = {}
    for name, value in values.items():
        if name not in CONDITIONS or not isinstance(value, Tensor):
            continue
        wanted, types = CONDITION_RULES[name]
        if value.dtype not in types:
            problems.append(f"conditionals: {name} has the unknown type {_dtype(value)}")
        elif not _has_form(name, value):
            problems.append(f"conditionals: {name} is {list(value.shape)}, it must be {wanted}")
        else:
            if name != "cond_tokens":
                sides[name] = value.shape[-1]
            if is_per_object(name, value) and num_objects not in (None, len(value)):
                problems.append(f"conditionals: {name} has {len(value)} objects, the scene {num_objects}")
            problems += _check_values(name, value)
    if len(set(sides.values())) > 1:
        described = ", ".join(f"{name} {side}" for name, side in sides.items())
        problems.append(f"conditionals: pictures differ in side: {described}")
    return problems


def is_per_object(name: str, value: Tensor) -> bool:
    """Whether a condition has a row per object."""
    return name == "masks" or (name == "cond_tokens" and value.ndim == 3)


def _has_form(name: str, value: Tensor) -> bool:
    if name == "cond_tokens":
        return value.ndim in (2, 3) and value.numel() > 0
    is_square = value.ndim == 3 and value.numel() > 0 and value.shape[1] == value.shape[2]
    return is_square and (name == "masks" or len(value) == 3)


def _check_values(name: str, value: Tensor) -> list[str]:
    if name == "pointmap" and value.isinf().any():
        return ["conditionals: pointmap has infinite values (NaN means that there is nothing)"]
    if name in ("image", "cond_tokens") and not value.float().isfinite().all():
        return [f"conditionals: {name} has NaN or infinite values"]
    if name == "image" and value.is_floating_point() and value.abs().max() > 1.001:
        low, high = value.min(), value.max()
        return [f"conditionals: image of floats must lie in [-1, 1], it has values from {low:g} to {high:g}"]
    return []


Numbers3 = Annotated[list[float], Field(min_length=3, max_length=3)]
Numbers4 = Annotated[list[float], Field(min_length=4, max_length=4)]


class CameraMetadata(Metadata):
    """The camera of a scene's picture, as far as it is known."""

    intrinsics: Annotated[list[Numbers3], Field(min_length=3, max_length=3)] = None
    scene_from_camera: Annotated[list[Numbers4], Field(min_length=4, max_length=4)] = None


class SceneMetadata(Metadata):
    """What is read of metadata.json; what is null is not known."""

    num_objects: PositiveInt
    scene_id: str | None = None
    object_ids: list | None = None
    families: list | None = None
    frame: Literal[FRAMES] | None = None
    isotropic_scale: bool | None = None
    scene_shift: Numbers3 | None = None
    scene_scale: PositiveFloat | None = None
    camera: CameraMetadata | None = None
    codec: dict | None = None

    @field_validator("num_objects", "object_ids", "families")
    @classmethod
    def _fits_tensors(cls, value: int | list | None, info: ValidationInfo) -> int | list | None:
        count = len(value) if isinstance(value, list) else value
        if None not in (count, info.context) and count != info.context:
            raise ValueError(f"must fit the {info.context} objects of the tensors")
        return value


def check_metadata(metadata: Mapping, num_objects: int | None) -> list[str]:
    """The problems of metadata, one line each, which name the field; `num_objects` None compares no counts."""
    try:
        SceneMetadata.model_validate(metadata, context=num_objects)
    except ValidationError as error:
        return describe_errors(error, METADATA_NAME)
    return []


def _check_names(kind: str, values: Mapping, required: Iterable[str], optional: Iterable[str]) -> list[str]:
    problems = []
    missing = [name for name in required if name not in values]
    unknown = [name for name in values if name not in (*required, *optional)]
    if missing:
        problems.append(
            f"{kind}: {', '.join(missing)} missing" + (f" (there is {', '.join(values)})" if values else "")
        )
    if unknown:
        problems.append(f"{kind}: unknown key {', '.join(unknown)}; known are {', '.join((*required, *optional))}")
    no_tensors = [name for name, value in values.items() if not isinstance(value, Tensor)]
    if no_tensors:
        problems.append(f"{kind}: {', '.join(no_tensors)} is no tensor")
    return problems


def _check_objects(kind: str, values: Mapping[str, object], names: Iterable[str]) -> list[str]:
    """Types, widths, values and the number of objects of what has a row per object."""
    problems, counts = [], {}
    for name in names:
        value = values.get(name)
        if not isinstance(value, Tensor):
            continue
        if value.ndim:
            counts[name] = len(value)
        if name == "occupancy":
            continue
        if value.dtype not in FLOATS:
            problems.append(f"{kind}: {name} has the unknown type {_dtype(value)}, it must be a float")
            continue
        if name in WIDTHS and (value.ndim != 3 or value.shape[1:] != (1, WIDTHS[name])):
            problems.append(f"{kind}: {name} is {list(value.shape)}, it must be [N, 1, {WIDTHS[name]}]")
        if value.ndim and not (finite := value.float().isfinite()).all():
            bad = (~finite).flatten(1).any(1) if value.ndim > 1 else ~finite
            problems.append(f"{kind}: {name} of object {_join(bad.nonzero().flatten().tolist())} is NaN or infinite")
    if len(set(counts.values())) > 1:
        described = ", ".join(f"{name} {count}" for name, count in counts.items())
        problems.append(f"{kind}: modalities differ in the number of objects: {described}")
    elif 0 in counts.values():
        problems.append(f"{kind}: the scene is empty, it has no objects")
    return problems


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _describe(value: Tensor) -> str:
    return f"{list(value.shape)} of type {_dtype(value)}"


def _join(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    return shown if len(numbers) <= 5 else f"{shown} and {len(numbers) - 5} more"


# --- splits, grids --------------------------------------------------------------------------------------------------


def scene_ids(root: str | Path, split: str) -> list[str]:
    """The scenes of a split, by scenes.txt or else the sorted folders; ValueError if the split is missing or empty."""
    folder = Path(root) / split
    if not folder.is_dir():
        raise ValueError(f"split {split!r} of {root} is missing: there is no folder {folder}")
    listed = folder / SCENES_NAME
    if listed.is_file():
        lines = (line.strip() for line in listed.read_text(encoding="utf-8").splitlines())
        found = [line for line in lines if line]
    else:
        found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        raise ValueError(f"split {split!r} of {root} is empty: {listed if listed.is_file() else folder} names no scene")
    return found


def to_tokens(grid: Tensor) -> Tensor:
    """Latents (N, C, R, R, R) -> tokens (N, R^3, C), the last axis of the grid running fastest."""
    return grid.flatten(2).transpose(1, 2).contiguous()


def to_grid(tokens: Tensor) -> Tensor:
    """The inverse of `to_tokens`; ValueError if the number of tokens is no cube."""
    side = round(tokens.shape[1] ** (1 / 3))
    if side**3 != tokens.shape[1]:
        raise ValueError(f"{tokens.shape[1]} tokens are no cube")
    return tokens.transpose(1, 2).unflatten(2, (side, side, side)).contiguous()


def pack_occupancy(grids: np.ndarray | Tensor) -> np.ndarray:
    """Boolean grids (N, R, R, R), R even, -> (N, R^3 / 8) uint8."""
    grids = np.asarray(grids)
    return np.packbits(grids.reshape(len(grids), -1).astype(bool), axis=1)


def unpack_occupancy(packed: np.ndarray | Tensor, resolution: int) -> np.ndarray:
    """The inverse of `pack_occupancy`: boolean (N, R, R, R)."""
    packed = np.asarray(packed)
    return np.unpackbits(packed, axis=1).view(bool).reshape(len(packed), *[resolution] * 3)
