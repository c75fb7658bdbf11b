"""Scenes on disk: what is written is read again, and whatever is wrong gets one line that names scene and field."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scene_samples import change_metadata, change_tensors, make_scene, write_scenes

from backlot.modalities import POSES
from data_prep.scenes.format import (
    CONDITIONS,
    check_scene,
    pack_occupancy,
    read_metadata,
    read_scene,
    read_tensors,
    scene_ids,
    to_grid,
    to_tokens,
    unpack_occupancy,
    write_scene,
)

NAN, INF = float("nan"), float("inf")


def write(folder: Path, seed: int = 0, **settings) -> Path:
    write_scene(folder, **make_scene(seed, **settings))
    return folder


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name].nan_to_num(7), right[name].nan_to_num(7))


# --- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["safetensors", "pt"])
def test_what_is_written_is_read(tmp_path, format):
    scene = make_scene(3, count=4)
    write_scene(tmp_path / "0003", **scene, format=format)
    names = {path.name for path in (tmp_path / "0003").iterdir()}
    assert names == {f"latents.{format}", f"conditionals.{format}", "metadata.json"}
    read = read_scene(tmp_path / "0003")
    assert_same(read.tensors, scene["tensors"])
    assert_same(read.conditionals, scene["conditionals"])
    assert read.metadata == scene["metadata"]
    assert check_scene(tmp_path / "0003") == []


def test_safetensors_win_and_the_other_format_is_removed(tmp_path):
    folder = write(tmp_path / "0000")
    torch.save({"shape": torch.zeros(1)}, folder / "latents.pt")
    assert read_tensors(folder, "latents")["shape"].shape == (3, 4, 3)
    write_scene(folder, **make_scene(1), format="pt")
    assert sorted(path.name for path in folder.iterdir()) == ["conditionals.pt", "latents.pt", "metadata.json"]


def test_latents_are_added_to_shapes_and_new_shapes_remove_them(tmp_path):
    folder = write(tmp_path / "0000", resolution=4)
    latents, shapes = make_scene(0), make_scene(0, resolution=4)
    write_scene(folder, tensors=latents["tensors"], metadata=latents["metadata"] | shapes["metadata"])
    assert {path.stem for path in folder.iterdir()} == {"shapes", "latents", "conditionals", "metadata"}
    assert read_scene(folder).conditionals.keys() == set(CONDITIONS)
    write_scene(folder, **{**shapes, "conditionals": None})
    assert {path.stem for path in folder.iterdir()} == {"shapes", "metadata"}


def test_channels_first_are_turned(tmp_path):
    scene = make_scene(0, tokens=5, channels=3)
    other = make_scene(0, tokens=5, channels=3, layout="channels_tokens")
    assert other["tensors"]["shape"].shape == (3, 3, 5)
    write_scene(tmp_path / "0000", **other)
    read = read_scene(tmp_path / "0000").tensors["shape"]
    assert torch.equal(read, scene["tensors"]["shape"])
    assert read.is_contiguous()


def test_a_square_shape_is_what_its_layout_says(tmp_path):
    scenes = [make_scene(0, tokens=4, channels=4, layout=layout) for layout in ("tokens_channels", "channels_tokens")]
    for number, scene in enumerate(scenes):
        write_scene(tmp_path / str(number), **scene)
    first, second = (read_scene(tmp_path / str(number)).tensors["shape"] for number in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, first.transpose(1, 2))


def test_a_grid_speaks_for_itself(tmp_path):
    scene = make_scene(0, tokens=8, channels=8)
    grid = torch.randn(3, 8, 2, 2, 2)
    write_scene(tmp_path / "0000", **{**scene, "tensors": scene["tensors"] | {"shape": grid}})
    change_metadata(tmp_path / "0000", shape_layout=None)
    assert torch.equal(read_scene(tmp_path / "0000").tensors["shape"], to_tokens(grid))


def test_halves_become_floats(tmp_path):
    scene = make_scene(0)
    half = {name: value.half() for name, value in scene["tensors"].items()}
    write_scene(tmp_path / "0000", **{**scene, "tensors": half})
    read = read_scene(tmp_path / "0000").tensors
    assert all(value.dtype == torch.float32 for value in read.values())
    assert torch.equal(read["shape"], half["shape"].float())


def test_tokens_are_those_of_the_reference():
    """SAM 3D Objects: reshape(N, 8, 4096), then the last two axes change places."""
    grid = torch.randn(2, 8, 16, 16, 16)
    tokens = to_tokens(grid)
    assert torch.equal(tokens, grid.reshape(2, 8, 4096).permute(0, 2, 1))
    assert tokens[1, 3 * 256 + 5 * 16 + 7, 2] == grid[1, 2, 3, 5, 7]
    assert torch.equal(to_grid(tokens), grid)
    assert torch.equal(to_grid(tokens), tokens.permute(0, 2, 1).contiguous().view(2, 8, 16, 16, 16))
    with pytest.raises(ValueError, match="10 tokens are no cube"):
        to_grid(torch.zeros(1, 10, 8))


def test_occupancy_round_trip():
    grids = np.random.default_rng(0).random((3, 6, 6, 6)) < 0.5
    packed = pack_occupancy(grids)
    assert packed.shape == (3, 27)
    assert packed.dtype == np.uint8
    assert np.array_equal(unpack_occupancy(packed, 6), grids)
    assert np.array_equal(np.unpackbits(packed[1])[1 * 36 + 2 * 6 + 3], grids[1, 1, 2, 3])
    assert np.array_equal(pack_occupancy(torch.from_numpy(grids)), packed)


def test_scenes_are_listed_or_sorted(tmp_path):
    write_scenes(tmp_path, {"train": 3})
    (tmp_path / "train" / ".hidden").mkdir()
    (tmp_path / "train" / "readme.md").touch()
    assert scene_ids(tmp_path, "train") == ["0000", "0001", "0002"]
    (tmp_path / "train" / "scenes.txt").write_text("0002\n\n 0000 \n")
    assert scene_ids(tmp_path, "train") == ["0002", "0000"]
    (tmp_path / "train" / "scenes.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"split 'train' of .* is empty: .*scenes.txt names no scene"):
        scene_ids(tmp_path, "train")
    with pytest.raises(ValueError, match=r"split 'val' of .* is missing: there is no folder .*val"):
        scene_ids(tmp_path, "val")


def test_writing_leaves_nothing_half_done(tmp_path, monkeypatch):
    folder = write(tmp_path / "0000")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        write_scene(folder, **make_scene(1))
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# --- what is refused ------------------------------------------------------------------------------------------------


def latents(**changes):
    return lambda folder: change_tensors(folder, **changes)


def conditionals(**changes):
    return lambda folder: change_tensors(folder, "conditionals", **changes)


def metadata(**changes):
    return lambda folder: change_metadata(folder, **changes)


def text(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str, share: float = 0.5):
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return damage


def with_value(name: str, value: float, row: int = 1):
    def damage(folder: Path) -> None:
        tensor = read_tensors(folder, "latents")[name]
        tensor[row, 0, -1] = value
        change_tensors(folder, **{name: tensor})

    return damage


def saved(values):
    def damage(folder: Path) -> None:
        (folder / "latents.safetensors").unlink()
        torch.save(values, folder / "latents.pt")

    return damage


# What is done to a scene of 3 objects with 4 tokens of 3 channels and pictures of side 16, and what is said of it.
FAULTS = {
    "no key": (latents(scale=None), r"latents: scale missing \(there is .*shape"),
    "wrong key": (latents(rotation=torch.zeros(3, 1, 6)), r"latents: unknown key rotation; known are shape, "),
    "all missing": (latents(**dict.fromkeys(["shape", *POSES])), r"latents: shape, translation, scale, 6drotation"),
    "fewer": (latents(scale=torch.zeros(2, 1, 3)), r"latents: modalities differ in .*objects: shape 3, .*scale 2"),
    "width": (latents(translation=torch.zeros(3, 1, 2)), r"latents: translation is \[3, 1, 2\], .* \[N, 1, 3\]"),
    "tokens of a pose": (latents(scale=torch.zeros(3, 3)), r"latents: scale is \[3, 3\], .* \[N, 1, 3\]"),
    "rotation": (latents(**{"6drotation_normalized": torch.zeros(3, 1, 9)}), r"6drotation_normalized is \[3, 1, 9\]"),
    "scale of translation": (latents(translation_scale=torch.zeros(3, 1, 3)), r"translation_scale is \[3, 1, 3\]"),
    "flat shape": (latents(shape=torch.zeros(3, 12)), r"latents: shape is \[3, 12\], it must be \[N, tokens, ch"),
    "no tokens": (latents(shape=torch.zeros(3, 0, 3)), r"latents: shape is \[3, 0, 3\]"),
    "no grid": (latents(shape=torch.zeros(3, 8, 2, 2, 3)), r"latents: shape is \[3, 8, 2, 2, 3\]"),
    "scalar": (latents(shape=torch.tensor(0.0)), r"latents: shape is \[\], it must be \[N, tokens, channels\]"),
    "nan": (with_value("shape", NAN), r"latents: shape of object 1 is NaN or infinite"),
    "infinite": (with_value("translation", INF, 2), r"latents: translation of object 2 is NaN or infinite"),
    "too large for float32": (
        latents(translation=torch.full((3, 1, 3), 1e300, dtype=torch.float64)),
        r"latents: translation of object 0, 1, 2 is NaN or infinite",
    ),
    "empty": (
        latents(shape=torch.zeros(0, 4, 3), **{name: torch.zeros(0, 1, width) for name, width in POSES.items()}),
        r"latents: the scene is empty, it has no objects",
    ),
    "integers": (latents(scale=torch.zeros(3, 1, 3, dtype=torch.int64)), r"scale has the unknown type int64"),
    "no layout": (metadata(shape_layout=None), r"shape is \[3, 4, 3\], which axis .* `shape_layout` .*got None"),
    "wrong layout": (metadata(shape_layout="ct"), r"must be one of tokens_channels, channels_tokens, got 'ct'"),
    "no metadata": (lambda folder: (folder / "metadata.json").unlink(), r"metadata.json is missing"),
    "metadata cut": (cut("metadata.json"), r"metadata.json is damaged: not JSON \("),
    "metadata nan": (text("metadata.json", b'{"num_objects": NaN}'), r"not JSON \(it holds NaN\)"),
    "metadata deep": (text("metadata.json", b"[" * 10**5), r"metadata.json is damaged: not JSON"),
    "metadata list": (text("metadata.json", b"[1]"), r"metadata.json is damaged: not a JSON object"),
    "no count": (metadata(num_objects=None), r"`num_objects` is missing from metadata.json"),
    "other count": (
        metadata(num_objects=4),
        r"`num_objects` of .* must fit the 3 objects of the tensors, got 4",
    ),
    "count of text": (metadata(num_objects="3"), r"`num_objects` of metadata.json must be a valid integer, got '3'"),
    "count of bool": (metadata(num_objects=True), r"`num_objects` of metadata.json must be a valid integer, got True"),
    "ids": (metadata(object_ids=["a"]), r"`object_ids` of metadata.json must fit the 3 objects of the tensors, got"),
    "frame": (metadata(frame="room"), r"`frame` of metadata.json must be 'floor' or 'camera', got 'room'"),
    "isotropic": (metadata(isotropic_scale=1), r"`isotropic_scale` of metadata.json must be a valid boolean, got 1"),
    "shift": (metadata(scene_shift=[0, 0]), r"`scene_shift` of metadata.json must have at least 3 items"),
    "scene scale": (metadata(scene_scale=0), r"`scene_scale` of metadata.json must be greater than 0, got 0"),
    "camera": (metadata(camera={"intrinsics": [[1]]}), r"`camera.intrinsics.0` of metadata.json must have at least 3"),
    "file missing": (
        lambda folder: (folder / "latents.safetensors").unlink(),
        r"latents.safetensors \(or latents.pt\) is missing",
    ),
    "file cut": (cut("latents.safetensors"), r"latents.safetensors is damaged or holds more.*\(SafetensorError"),
    "header cut": (cut("latents.safetensors", 0.01), r"latents.safetensors is damaged"),
    "nothing": (text("latents.safetensors", b""), r"latents.safetensors is damaged"),
    "conditionals cut": (cut("conditionals.safetensors", 0.9), r"conditionals.safetensors is damaged"),
    "pickled": (saved({"shape": json.JSONDecoder}), r"latents.pt is damaged or holds more than tensors"),
    "no dict": (saved([torch.zeros(3)]), r"latents.pt holds a list, not a dict of tensors"),
    "no tensor": (
        saved({**make_scene(0)["tensors"], "scale": [0.0]}),
        r"latents: scale is no tensor",
    ),
    "unknown condition": (conditionals(pointmaps=torch.zeros(3, 16, 16)), r"conditionals: unknown key pointmaps"),
    "grey": (conditionals(image=torch.zeros(1, 16, 16)), r"conditionals: image is \[1, 16, 16\], .* \[3, S, S\]"),
    "no square": (conditionals(image=torch.zeros(3, 16, 8)), r"conditionals: image is \[3, 16, 8\]"),
    "integer picture": (conditionals(image=torch.zeros(3, 16, 16).int()), r"image has the unknown type int32"),
    "bright": (conditionals(image=torch.full((3, 16, 16), 255.0)), r"image of floats .* from 255 to 255"),
    "dark hole": (conditionals(image=torch.full((3, 16, 16), NAN)), r"image has NaN or infinite values"),
    "other side": (conditionals(image=torch.zeros(3, 8, 8)), r"pictures differ in side: image 8, .*pointmap 16"),
    "far": (conditionals(pointmap=torch.full((3, 16, 16), INF)), r"pointmap has infinite values"),
    "masks": (conditionals(masks=torch.zeros(2, 16, 16).byte()), r"conditionals: masks has 2 objects, the scene 3"),
    "soft masks": (conditionals(masks=torch.zeros(3, 16, 16)), r"conditionals: masks has the unknown type float32"),
    "own tokens": (conditionals(cond_tokens=torch.zeros(2, 5, 7)), r"cond_tokens has 2 objects, the scene 3"),
    "flat tokens": (conditionals(cond_tokens=torch.zeros(7)), r"cond_tokens is \[7\], .* \[L, C\] or \[N, L, C\]"),
    "token": (conditionals(cond_tokens=torch.full((5, 7), NAN)), r"cond_tokens has NaN or infinite values"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_bad_scenes_get_one_line(tmp_path, name):
    damage, message = FAULTS[name]
    folder = write(tmp_path / "train" / "0007")
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        read_scene(folder)
    assert str(caught.value).startswith(f"scene '0007' of {tmp_path / 'train'}: ")
    assert "\n" not in str(caught.value)
    assert str(caught.value) in check_scene(folder)


def test_all_problems_are_listed(tmp_path):
    folder = write(tmp_path / "0000")
    for damage in ("nan", "wrong key", "frame", "grey", "other count"):
        FAULTS[damage][0](folder)
    problems = check_scene(folder)
    for damage in ("nan", "wrong key", "frame", "grey", "other count"):
        assert any(re.search(FAULTS[damage][1], line) for line in problems), damage
    (folder / "metadata.json").unlink()
    assert not any("layout" in line or "num_objects" in line for line in check_scene(folder))
    assert check_scene(tmp_path / "nowhere") == [f"scene 'nowhere' of {tmp_path}: its folder is missing"]


def test_square_shapes_without_a_layout_are_refused(tmp_path):
    """The guide's own example has 256 tokens of 256 channels."""
    scene = make_scene(0, tokens=256, channels=256)
    del scene["metadata"]["shape_layout"]
    with pytest.raises(ValueError, match=r"shape is \[3, 256, 256\], which axis holds the tokens is not declared"):
        write_scene(tmp_path / "0000", **scene)
    assert not (tmp_path / "0000").exists()


def test_shapes_are_checked(tmp_path):
    folder = write(tmp_path / "0000", resolution=4)
    assert check_scene(folder, "shapes") == []
    packed = read_tensors(folder, "shapes")["occupancy"]
    packed[2] = 0
    change_tensors(folder, "shapes", occupancy=packed)
    with pytest.raises(ValueError, match=r"shapes: occupancy of object 2 is empty"):
        read_scene(folder, "shapes")
    change_tensors(folder, "shapes", occupancy=torch.ones(3, 9, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"occupancy is \[3, 9\] of type uint8, it must be \[N, 8\] of type uint8"):
        read_scene(folder, "shapes")
    change_tensors(folder, "shapes", occupancy=torch.ones(4, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"number of objects: occupancy 4, translation 3"):
        read_scene(folder, "shapes")
    for resolution in (None, 5, "4"):
        change_metadata(folder, resolution=resolution)
        with pytest.raises(
            ValueError, match=rf"`resolution` of metadata.json must be an even number, got {resolution!r}"
        ):
            read_scene(folder, "shapes")


def test_what_could_not_be_read_is_not_written(tmp_path):
    scene = make_scene(0)
    scene["tensors"]["scale"][1, 0, 0] = NAN
    with pytest.raises(ValueError, match=r"scene '0000' of .*: latents: scale of object 1 is NaN or infinite"):
        write_scene(tmp_path / "0000", **scene)
    for argument in ({"kind": "conditionals"}, {"format": "npz"}):
        name = next(iter(argument))
        with pytest.raises(ValueError, match=rf"`{name}` must be"):
            write_scene(tmp_path / "0000", **{**make_scene(0), **argument})


def test_damaged_files_of_torch_never_end_in_another_error(tmp_path):
    folder = tmp_path / "0000"
    write_scene(folder, **make_scene(0), format="pt")
    path = folder / "latents.pt"
    data, random = path.read_bytes(), np.random.default_rng(0)
    messages = []
    for trial in range(300):
        damaged = bytearray(data[: random.integers(len(data))] if trial % 3 == 0 else data)
        for place in random.integers(len(damaged) or 1, size=2):
            damaged[place : place + 1] = bytes([random.integers(256)])
        path.write_bytes(damaged)
        try:
            read_tensors(folder, "latents")
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 100
    assert all(message.startswith("scene '0000' of ") and "\n" not in message for message in messages)


def test_metadata_alone(tmp_path):
    folder = write(tmp_path / "0004", 4)
    assert read_metadata(folder)["object_ids"] == ["0004_0", "0004_1", "0004_2"]
    (folder / "metadata.json").unlink()
    with pytest.raises(ValueError, match=r"scene '0004' of .*: metadata.json is missing"):
        read_metadata(folder)


def test_numpy_and_views_can_be_written(tmp_path):
    scene = make_scene(0)
    scene["tensors"]["shape"] = torch.zeros(1, 4, 3).expand(3, 4, 3)
    scene["tensors"]["scale"] = scene["tensors"]["scale"].numpy()
    for format in ("safetensors", "pt"):
        write_scene(tmp_path / format, **scene, format=format)
        assert read_scene(tmp_path / format).tensors["shape"].shape == (3, 4, 3)
