"""Encoding, checking and describing scenes, and the command that does all of it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from scene_samples import change_metadata, change_tensors, make_scene, write_scenes

from backlot.latent_cache import vae_fingerprint
from backlot.modalities import POSES
from data_prep.scenes.__main__ import main
from data_prep.scenes.check import print_stats, verify
from data_prep.scenes.dataset import SceneDataset
from data_prep.scenes.encode import compute_stats, encode_scenes
from data_prep.scenes.format import (
    pack_occupancy,
    read_metadata,
    read_scene,
    read_tensors,
    unpack_occupancy,
    write_scene,
)
from pipelines.shortcut_scene import OccupancyVAE, PoseCodec

RESOLUTION = 4
NAN = float("nan")


def save_vae(folder: Path, seed: int = 0, **settings) -> Path:
    """A tiny VAE: 4^3 cells -> 2^3 tokens of 3 channels."""
    torch.manual_seed(seed)
    shape = {"sample_size": RESOLUTION, "latent_channels": 3, "block_out_channels": (4, 8)}
    OccupancyVAE(**{**shape, "layers_per_block": 1, "mid_layers": 1, **settings}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    return save_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def vision(tmp_path_factory) -> Path:
    """A tiny DINOv2 with its image processor: 14 px patches of 28 px pictures, 4 patches and a class token."""
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("vision")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    BitImageProcessorPil(**size).save_pretrained(folder)
    return folder


@pytest.fixture
def shapes(tmp_path) -> Path:
    return write_scenes(tmp_path / "shapes", {"train": 3, "val": 2}, resolution=RESOLUTION)


def run(*argv: object, code: int | None = None) -> None:
    """The command; it must end with the given exit code."""
    if code is None:
        main([str(value) for value in argv])
    else:
        with pytest.raises(SystemExit) as caught:
            main([str(value) for value in argv])
        assert caught.value.code == code


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


# --- encode ---------------------------------------------------------------------------------------------------------


def test_latents_are_the_posterior_means(shapes, vae):
    before = read_scene(shapes / "train" / "0001", "shapes")
    assert encode_scenes(shapes, vae, batch_size=4) == 5
    network = OccupancyVAE.from_pretrained(vae)
    for split, seeds in {"train": (0, 1, 2), "val": (3, 4)}.items():
        for seed in seeds:
            folder = shapes / split / f"{seed:04d}"
            scene = read_scene(folder)
            grids = unpack_occupancy(read_tensors(folder, "shapes")["occupancy"], RESOLUTION)
            with torch.no_grad():
                means = network.encode(torch.from_numpy(grids)[:, None].float()).latent_dist.mode()
            assert scene.tensors["shape"].shape == (2 + seed % 3, 8, 3)
            assert torch.allclose(scene.tensors["shape"], network.to_tokens(means), atol=1e-5)
            assert all(
                torch.equal(scene.tensors[name], make_scene(seed, count=2 + seed % 3, resolution=4)["tensors"][name])
                for name in POSES
            )
            assert scene.metadata["shape_layout"] == "tokens_channels"
            assert scene.metadata["codec"] == {"preset": None, "sha256": vae_fingerprint(vae)}
    after = read_scene(shapes / "train" / "0001", "shapes")
    assert after.metadata.items() >= before.metadata.items()
    assert torch.equal(after.tensors["occupancy"], before.tensors["occupancy"])
    assert after.conditionals.keys() == before.conditionals.keys()
    assert verify(shapes) == []
    codec = PoseCodec.from_pretrained(shapes)
    assert codec.mean["shape"].shape == (3,)
    dataset = SceneDataset(shapes, codec=codec)
    assert (dataset.shape_tokens, dataset.shape_channels) == (8, 3)


def test_the_preset_is_named(shapes, tmp_path):
    from data_prep.scenes.encode import find_preset

    with torch.device("meta"):
        assert find_preset(OccupancyVAE.from_preset("toy")) == "toy"
        assert find_preset(OccupancyVAE.from_preset("toy", latent_channels=4)) is None


def test_batches_do_not_matter_and_elsewhere_everything_is_copied(shapes, vae, tmp_path):
    (shapes / "train" / "scenes.txt").write_text("0002\n0000\n")
    before = contents(shapes)
    assert encode_scenes(shapes, vae, tmp_path / "one", batch_size=1) == 4
    assert contents(shapes) == before
    assert encode_scenes(shapes, vae, tmp_path / "many", batch_size=1000, format="pt") == 4
    assert (tmp_path / "many" / "train" / "scenes.txt").read_text() == "0002\n0000\n"
    assert sorted(path.name for path in (tmp_path / "many" / "train").iterdir()) == ["0000", "0002", "scenes.txt"]
    names = {path.name for path in (tmp_path / "many" / "train" / "0000").iterdir()}
    assert names == {"shapes.safetensors", "latents.pt", "conditionals.pt", "metadata.json"}
    left, right = SceneDataset(tmp_path / "one"), SceneDataset(tmp_path / "many")
    for row in range(2):
        for name, value in left[row].items():
            assert torch.allclose(value, right[row][name], atol=1e-5), name
    assert verify(tmp_path / "many", vae) != []  # an untrained VAE: only the IoU is found bad
    assert all("decodes to an IoU" in line for line in verify(tmp_path / "many", vae))


def test_encoding_goes_on_where_it_stopped(shapes, vae, monkeypatch):
    broken = shapes / "val" / "0004"
    kept = (broken / "shapes.safetensors").read_bytes()
    (broken / "shapes.safetensors").write_bytes(kept[:100])
    with pytest.raises(ValueError, match=r"scene '0004' of .*val: shapes.safetensors is damaged"):
        encode_scenes(shapes, vae, batch_size=2)
    (broken / "shapes.safetensors").write_bytes(kept)
    done = {name: data for name, data in contents(shapes).items() if "latents" in name}
    assert len(done) == 4
    assert encode_scenes(shapes, vae, batch_size=2) == 1
    assert contents(shapes).items() >= done.items()
    first = contents(shapes)
    assert encode_scenes(shapes, vae, batch_size=2) == 0
    assert contents(shapes) == first


def test_only_a_split(shapes, vae):
    assert encode_scenes(shapes, vae, split="val") == 2
    assert not (shapes / "stats.json").exists()
    assert not (shapes / "train" / "0000" / "latents.safetensors").exists()
    with pytest.raises(ValueError, match=r"split 'test' of .* is missing"):
        encode_scenes(shapes, vae, split="test")


def test_latents_of_another_vae_are_refused(shapes, vae, tmp_path):
    encode_scenes(shapes, vae)
    other = save_vae(tmp_path / "other", seed=1)
    before = contents(shapes)
    message = r"scene '0000' of .*train: it was encoded by another VAE \(\w{12} there, \w{12} now\): --overwrite"
    with pytest.raises(ValueError, match=message):
        encode_scenes(shapes, other)
    assert contents(shapes) == before
    assert encode_scenes(shapes, other, overwrite=True) == 5
    assert read_metadata(shapes / "val" / "0003")["codec"]["sha256"] == vae_fingerprint(other)
    shape = "train/0000/latents.safetensors"
    assert contents(shapes)[shape] != before[shape]
    change_metadata(shapes / "val" / "0003", codec={"sha256": vae_fingerprint(vae)})
    problems = verify(shapes)
    assert len(problems) == 1
    assert re.search(r"scene '0003' of .*val: its VAE is \w{64}, in scene '0000' it is \w{64}", problems[0])


def test_new_shapes_are_encoded_again(shapes, vae, tmp_path):
    """Also where the latents lie in another folder."""
    out = tmp_path / "out"
    assert encode_scenes(shapes, vae) == 5
    assert encode_scenes(shapes, vae, out) == 5
    write_scene(shapes / "train" / "0001", **make_scene(9, count=3, resolution=RESOLUTION))
    assert encode_scenes(shapes, vae, out) == 1
    assert encode_scenes(shapes, vae) == 1
    assert read_scene(out / "train" / "0001").tensors["translation"][0, 0, 0] == 9


def test_a_grid_of_another_size_is_refused(shapes, tmp_path):
    large = save_vae(tmp_path / "large", sample_size=8)
    with pytest.raises(ValueError, match=r"scene '0000' of .*: shapes: occupancy has resolution 4, the VAE takes 8"):
        encode_scenes(shapes, large)


def test_folders_without_a_model_are_refused(shapes, vae, tmp_path):
    with pytest.raises(ValueError, match=r"is not the folder of a VAE: it has no config.json"):
        encode_scenes(shapes, tmp_path)
    with pytest.raises(ValueError, match=r"holds no vision model: there are no safetensors weights"):
        encode_scenes(shapes, vae, image_encoder=tmp_path)
    other = tmp_path / "other"
    shutil.copytree(vae, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "latent_channels": 5}))
    with pytest.raises(ValueError, match="holds no occupancy VAE: "):
        encode_scenes(shapes, other)
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        encode_scenes(shapes, vae, batch_size=0)
    with pytest.raises(ValueError, match=r"holds no scenes: there is no folder train, val or test in it"):
        encode_scenes(vae, vae)


def test_pictures_become_tokens(shapes, vae, vision):
    from transformers import AutoImageProcessor, AutoModel

    encode_scenes(shapes, vae)
    assert encode_scenes(shapes, vae, image_encoder=vision, batch_size=2) == 5
    scene = read_scene(shapes / "train" / "0001")
    tokens = scene.conditionals["cond_tokens"]
    assert tokens.shape == (5, 8)
    processor, model = AutoImageProcessor.from_pretrained(vision), AutoModel.from_pretrained(vision)
    pixels = scene.conditionals["image"].permute(1, 2, 0).numpy()
    with torch.no_grad():
        expected = model(**processor(images=[pixels], return_tensors="pt")).last_hidden_state[0]
    assert torch.allclose(tokens, expected, atol=1e-5)
    assert SceneDataset(shapes, conditions=["cond_tokens"])[0]["cond_tokens"].shape == (5, 8)
    assert set(scene.metadata["codec"]) == {"preset", "sha256", "image_encoder"}
    assert encode_scenes(shapes, vae, image_encoder=vision) == 0
    assert encode_scenes(shapes, vae) == 0  # does not forget which model made the tokens
    assert encode_scenes(shapes, save_vae(shapes.parent / "other", seed=1), overwrite=True) == 5
    assert (
        read_metadata(shapes / "train" / "0001")["codec"]["image_encoder"] == scene.metadata["codec"]["image_encoder"]
    )
    change_tensors(shapes / "train" / "0000", "conditionals", image=None)
    with pytest.raises(ValueError, match=r"scene '0000' of .*: conditionals: image missing, the vision model"):
        encode_scenes(shapes, vae, image_encoder=vision, overwrite=True)


# --- statistics -----------------------------------------------------------------------------------------------------


def test_statistics_are_of_the_train_split_alone(tmp_path):
    root = write_scenes(tmp_path)
    codec = compute_stats(root)
    rows = torch.cat([read_scene(root / "train" / f"{i:04d}").tensors["translation"][:, 0] for i in range(6)])
    assert torch.allclose(codec.mean["translation"], rows.mean(0), atol=1e-6)
    assert torch.allclose(codec.std["translation"][:2], rows.std(0, correction=0)[:2], atol=1e-6)
    change_tensors(root / "val" / "0006", translation=torch.full((2, 1, 3), 99.0))
    assert compute_stats(root).config == codec.config
    stored = PoseCodec.from_pretrained(root)
    assert stored.config.mean == codec.config.mean
    assert stored.config.isotropic_scale is False
    assert [path.name for path in root.iterdir() if path.name.startswith(".")] == []


def test_other_codecs(tmp_path):
    root = write_scenes(tmp_path)
    for folder in (root / "train").iterdir():
        change_metadata(folder, isotropic_scale=True)
    for mode in ("sam3d", "identity"):
        compute_stats(root, mode)
        stored = PoseCodec.from_pretrained(root)
        assert (stored.config.mode, stored.config.isotropic_scale) == (mode, True)
    with pytest.raises(ValueError, match="`mode` must be zscore, sam3d or identity"):
        compute_stats(root, "minmax")


def test_statistics_need_equal_scenes_to_train_on(tmp_path):
    root = write_scenes(tmp_path)
    change_metadata(root / "train" / "0003", isotropic_scale=True)
    with pytest.raises(ValueError, match=r"scene '0003' of .*: isotropic_scale is True, in scene '0000' it is False"):
        compute_stats(root)
    change_tensors(root / "train" / "0002", shape=torch.zeros(4, 9, 3))
    with pytest.raises(ValueError, match=r"scene '0002' of .*: shape is \[9, 3\], in scene '0000' it is \[4, 3\]"):
        compute_stats(root)
    shutil.rmtree(root / "train")
    with pytest.raises(ValueError, match=r"split 'train' of .* is missing"):
        compute_stats(root)


def test_samples_with_statistics(tmp_path):
    root = write_scenes(tmp_path, stats=True)
    item = SceneDataset(root, codec=PoseCodec.from_pretrained(root))[0]
    assert item["shape"].isfinite().all()


# --- verify ---------------------------------------------------------------------------------------------------------


def tilted(degrees: float) -> torch.Tensor:
    """The 6D rotation about x."""
    angle = torch.tensor(np.radians(degrees), dtype=torch.float32)
    return torch.tensor([1.0, 0, 0, 0, angle.cos(), angle.sin()])


def lay(folder: Path, *, angle: float, size: tuple[float, ...], height: float, kind: str = "latents") -> None:
    """Give the first object of a scene another pose."""
    tensors = read_tensors(folder, kind)
    tensors["6drotation_normalized"][0, 0] = tilted(angle)
    tensors["scale"][0, 0] = torch.tensor(size).log()
    tensors["translation"][0, 0, 2] = height
    change_tensors(folder, kind, **tensors)


def test_all_bad_scenes_are_listed_at_once(tmp_path):
    root = write_scenes(tmp_path, {"train": 12, "val": 1}, num_objects=(3, 3))
    assert verify(root) == []
    train = root / "train"
    values = read_tensors(train / "0000", "latents")
    skewed = values["6drotation_normalized"].clone()
    skewed[2, 0, 3] += 0.01
    change_tensors(train / "0000", **{"6drotation_normalized": skewed})
    change_tensors(train / "0001", scale=torch.full((3, 1, 3), 7.0))
    lay(train / "0002", angle=0, size=(0.4, 0.4, 0.4), height=0.15)
    change_tensors(train / "0003", shape=None)
    change_tensors(train / "0004", shape=torch.full((3, 4, 3), NAN), translation=torch.zeros(3, 1, 4))
    (train / "0005" / "latents.safetensors").unlink()
    (train / "0006" / "metadata.json").write_text("{")
    change_metadata(train / "0007", num_objects=2)
    change_metadata(train / "0008", frame="camera")
    change_tensors(train / "0009", shape=torch.zeros(3, 5, 3))
    (train / "0010" / "conditionals.safetensors").write_bytes(b"")
    listed = [f"{number:04d}" for number in range(12)]
    (train / "scenes.txt").write_text("\n".join([*listed, "0011", "9999"]))
    shutil.rmtree(root / "val")
    (root / "test").mkdir()
    expected = [
        r"'0011' of .*train: scenes.txt names it twice",
        r"split 'val' of .* is missing: there is no folder",
        r"split 'test' of .* is empty",
        r"'0000' of .*: 6drotation_normalized of object 2: its columns are not orthonormal \(off by 0.0\d+, 0.001 is",
        *(rf"'0001' of .*: scale of object {k}: its sides 1.1e\+03, .* must be in \[0.001, 100\]" for k in range(3)),
        r"'0002' of .*: translation of object 0: it reaches 0.050 below the floor",
        r"'0003' of .*: latents: shape missing",
        r"'0004' of .*: latents: translation is \[3, 1, 4\], it must be \[N, 1, 3\]",
        r"'0004' of .*: latents: shape of object 0, 1, 2 is NaN or infinite",
        r"'0005' of .*: neither latents nor shapes are there",
        r"'0006' of .*: metadata.json is damaged: not JSON",
        r"'0007' of .*: `num_objects` of metadata.json must fit the 3 objects of the tensors, got 2",
        r"'0008' of .*: its frame is camera, in scene '0000' it is floor",
        r"'0009' of .*: its tokens x channels of shape is \[5, 3\], in scene '0000' it is \[4, 3\]",
        r"'0010' of .*: conditionals.safetensors is damaged",
        r"'9999' of .*: its folder is missing",
    ]
    problems = verify(root)
    for pattern in expected:
        assert sum(bool(re.search(pattern, line)) for line in problems) == 1, pattern
    # what hangs on the numbers of objects is said in more than one line
    extra = [line for line in problems if not any(re.search(pattern, line) for pattern in expected)]
    assert all("'0007'" in line and "`object_ids`" in line for line in extra)
    assert not any("\n" in line for line in problems)


def test_good_shapes_need_no_latents_but_all_or_none(shapes, vae):
    assert verify(shapes) == []
    encode_scenes(shapes, vae, split="val")
    problems = verify(shapes)
    assert len(problems) == 3
    assert all(line.endswith("it has no latents, other scenes have") for line in problems)


def test_latents_must_have_the_objects_of_the_shapes(shapes, vae):
    encode_scenes(shapes, vae)
    folder = shapes / "train" / "0001"
    latents = read_tensors(folder, "latents")
    change_tensors(folder, **{name: value[:2] for name, value in latents.items()})
    problems = verify(shapes)
    assert any(line.endswith("latents have 2 objects, shapes 3") for line in problems)
    assert all("'0001'" in line for line in problems)


def test_rotated_boxes_stand_on_the_floor(tmp_path):
    """A box of 0.2 x 0.6 x 0.2 tilted by 30 degrees about x reaches 0.3 sin 30 + 0.1 cos 30 = 0.2366 down."""
    root = write_scenes(tmp_path, {"train": 1, "val": 1})
    folder = root / "train" / "0000"
    for height, is_bad in {0.24: False, 0.2366 - 0.009: False, 0.2366 - 0.011: True, 0.11: True}.items():
        lay(folder, angle=30, size=(0.2, 0.6, 0.2), height=height)
        assert bool(verify(root)) == is_bad, height
    for kept in ("train/0000", "val/0001"):
        change_metadata(root / kept, frame="camera")
    assert verify(root) == []


def test_the_floor_is_that_of_the_scene(tmp_path):
    """Where the scene came from does not matter: z = 0 is its floor."""
    root = write_scenes(tmp_path, {"train": 1, "val": 1})
    folder = root / "train" / "0000"
    change_metadata(folder, scene_scale=2.0, scene_shift=[0, 0, 1.0])
    lay(folder, angle=0, size=(0.2, 0.2, 0.2), height=0.1)
    assert verify(root) == []
    lay(folder, angle=0, size=(0.2, 0.2, 0.2), height=0.08)
    assert len(verify(root)) == 1


def test_objects_that_do_not_fill_their_box_are_measured_by_their_cells(tmp_path):
    """A plate 0.8 wide in the middle of its cube: the cube reaches far below the floor, the plate does not."""
    root = write_scenes(tmp_path, {"train": 1, "val": 1}, resolution=8)
    grids = np.zeros((2, 8, 8, 8), bool)
    grids[:, :, :, 3:5] = True
    folder = root / "train" / "0000"
    for kept in (folder, root / "val" / "0001"):
        change_metadata(kept, isotropic_scale=True)
    # the centres of its lower cells are 0.05 below its middle, less half a cell, 0.05
    for height, angle, is_bad in [(0.05, 0, False), (-0.02, 0, True), (0.28, 90, True), (0.31, 90, False)]:
        change_tensors(folder, "shapes", occupancy=torch.from_numpy(pack_occupancy(grids)))
        lay(folder, angle=angle, size=(0.8, 0.8, 0.8), height=height, kind="shapes")
        assert bool(verify(root)) == is_bad, (height, angle)


def test_latents_are_decoded_and_compared(tmp_path, vae):
    root = write_scenes(tmp_path / "scenes", {"train": 2, "val": 1}, resolution=RESOLUTION)
    full = torch.full((2, RESOLUTION**3 // 8), 255, dtype=torch.uint8)
    change_tensors(root / "train" / "0000", "shapes", occupancy=full)
    change_tensors(root / "train" / "0001", "shapes", occupancy=torch.ones(3, 8, dtype=torch.uint8))
    network = OccupancyVAE.from_pretrained(vae)
    torch.nn.init.zeros_(network.decoder.out_layer[-1].weight)
    torch.nn.init.ones_(network.decoder.out_layer[-1].bias)  # everything is full
    network.save_pretrained(tmp_path / "vae")
    encode_scenes(root, tmp_path / "vae")
    told = []
    problems = verify(root, tmp_path / "vae", report=told.append)
    assert [line.split(": ", 1)[1] for line in problems if "'0001'" in line] == [
        f"latents: shape of object {number} decodes to an IoU of 0.125, 0.5 is wanted" for number in range(3)
    ]
    assert not any("'0000'" in line for line in problems)
    assert told[0] == f"train: mean IoU {(2 * 1 + 3 * 0.125) / 5:.4f} of 5 objects"
    assert told[1].startswith("val: mean IoU")
    assert verify(root) == []
    assert "its latents are of another VAE" in verify(root, vae, report=told.append)[0]
    with pytest.raises(ValueError, match="is not the folder of a VAE"):
        verify(root, tmp_path)


def test_a_single_scene_can_be_verified(tmp_path, capsys):
    root = write_scenes(tmp_path)
    folder = root / "train" / "0002"
    run("verify", "--scene_dir", folder)
    assert capsys.readouterr().out == "problems: 0\n"
    change_tensors(folder, scale=None)
    run("verify", "--scene_dir", folder, code=2)
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"scene '0002' of {root / 'train'}: latents: scale missing")
    assert out[1:] == ["problems: 1"]
    assert verify(tmp_path / "nowhere") == [f"{tmp_path / 'nowhere'} does not exist"]


def test_what_scenes_are_like(tmp_path):
    root = write_scenes(tmp_path, {"train": 7, "val": 1})
    change_metadata(root / "train" / "0000", families=["box", "cone"])
    lines = []
    print_stats(root, lines.append)
    assert lines[0] == "train: 7 scenes, 20 objects"
    assert lines[1:4] == [
        f"    2 objects       3 {'#' * 40}",
        f"    3 objects       2 {'#' * 27}",
        f"    4 objects       2 {'#' * 27}",
    ]
    assert "  families: box 1, cone 1" in lines
    assert "  frame: floor 7" in lines
    assert "  conditionals: cond_tokens 5x7 7, image 16x16 7, masks 16x16 7, pointmap 16x16 7" in lines
    rows = torch.cat([read_scene(root / "train" / f"{i:04d}").tensors["translation"][:, 0] for i in range(7)]).double()
    low, high, mean, std = rows[:, 0].min(), rows[:, 0].max(), rows[:, 0].mean(), rows[:, 0].std(correction=0)
    line = next(line for line in lines if line.startswith("  translation[0]")).split()
    assert [float(line[i]) for i in (1, 3, 5, 7)] == pytest.approx(
        [float(value) for value in (low, high, mean, std)], rel=1e-3
    )
    assert any(line.startswith("val: 1 scenes, ") for line in lines)
    (root / "val" / "0007" / "metadata.json").unlink()
    with pytest.raises(ValueError, match=r"scene '0007' of .*: metadata.json is missing"):
        print_stats(root, lines.append)
    with pytest.raises(ValueError, match="holds no scenes"):
        print_stats(root / "val", lines.append)


# --- the command ----------------------------------------------------------------------------------------------------


def test_from_made_scenes_to_the_reader(tmp_path, vae, capsys):
    root = tmp_path / "scenes"
    size = ["--num_train", 3, "--num_val", 2, "--image_size", 16, "--resolution", RESOLUTION, "--num_objects", 2, 3]
    run("synth", "--out", root, *size)
    run("verify", root)
    assert capsys.readouterr().out.splitlines()[-1] == "problems: 0"
    run("encode", root, "--vae", vae, "--device", "cpu")
    assert capsys.readouterr().out == f"5 scenes encoded: {root}\n"
    run("verify", root)
    run("stats", root)
    out = capsys.readouterr().out
    assert "train: 3 scenes" in out
    assert out.endswith(f"{root / 'stats.json'}: zscore codec of the train split\n")
    dataset = SceneDataset(root, codec=PoseCodec.from_pretrained(root), conditions=["image", "pointmap", "masks"])
    assert len(dataset) == 3
    assert set(dataset.num_objects) <= {2, 3}
    assert dataset.image_size == 16
    assert len(SceneDataset(root, "val")) == 2
    run("verify", root, "--vae", vae, code=2)
    assert re.search(r"^train: mean IoU 0\.\d+ of \d+ objects$", capsys.readouterr().out, re.MULTILINE)


def test_from_glb_files_to_the_reader(tmp_path, vae, capsys):
    folder = tmp_path / "models"
    folder.mkdir()
    for name, scale in {"one": 1.0, "two": 0.5}.items():
        scene = trimesh.Scene()
        for number, place in enumerate([-1.0, 1.0]):
            box = trimesh.creation.box((scale, 0.2, 0.4))  # y is up: flat boxes
            matrix = trimesh.transformations.translation_matrix([place, 0.1, 0])
            scene.add_geometry(box, node_name=f"box_{number}", transform=matrix)
        scene.export(folder / f"{name}.glb")
    root = tmp_path / "scenes"
    for split in ("train", "val"):
        run("build", "--glb", folder, "--out", root, "--split", split, "--resolution", RESOLUTION, "--image_size", 16)
    run("encode", root, "--vae", vae)
    capsys.readouterr()
    run("verify", root)
    assert capsys.readouterr().out == "problems: 0\n"
    dataset = SceneDataset(root, codec=PoseCodec.from_pretrained(root))
    assert dataset.num_objects == [2, 2]
    assert PoseCodec.from_pretrained(root).config.isotropic_scale is True
    assert set(read_metadata(root / "train" / dataset.scene_ids[0])["object_ids"]) == {"box_0", "box_1"}


def test_prepare_is_encode_by_its_old_names(shapes, vae, tmp_path, capsys):
    out = tmp_path / "out"
    run("prepare", "--input_scenes", shapes, "--output_root", out, "--split", "train", "--vae_checkpoint", vae)
    assert capsys.readouterr().out == f"3 scenes encoded: {out}\n"
    assert len(SceneDataset(out)) == 3
    assert not (out / "val").exists()
    assert (out / "stats.json").is_file()


def test_the_example_can_be_trained_on(tmp_path, capsys):
    run("example", "--out", tmp_path)
    names = {path.name for path in (tmp_path / "train" / "example").iterdir()}
    assert names == {"latents.pt", "conditionals.pt", "metadata.json"}
    run("verify", tmp_path)
    assert SceneDataset(tmp_path).num_objects == [5]
    first = contents(tmp_path)
    run("example", "--out", tmp_path)
    assert contents(tmp_path).keys() == first.keys()
    run("stats", tmp_path, "--mode", "identity")
    assert PoseCodec.from_pretrained(tmp_path).config.mode == "identity"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["encode"], "--vae is required"),
        (["encode", "nowhere", "--vae", "VAE"], "nowhere holds no scenes"),
        (["encode", "ROOT", "--vae", "nowhere"], "nowhere is not the folder of a VAE: it has no config.json"),
        (
            ["encode", "ROOT", "--vae", "VAE", "--batch_size", "0"],
            "--batch_size 0: input should be greater than",
        ),
        (["encode", "ROOT", "--vae", "VAE", "--batch", "2"], "unknown key --batch; did you mean --batch_size\\?"),
        (["stats", "ROOT"], "scene '0000' of .*train: latents.safetensors \\(or latents.pt\\) is missing"),
        (["synth", "--stack_prob", "2"], "--stack_prob 2: input should be less than or equal to 1"),
        (["verify", "ROOT", "--scene_dir", "ROOT"], "ROOT and --scene_dir are the same: give either"),
        (["synth", "--out", "nowhere", "--families", "sphinx"], ".*sphinx"),
        (["synth", "--out", "nowhere", "--num_objects", "4", "3"], ".*num_objects"),
        (["paint"], "unknown command 'paint'; the commands are synth, build, glb"),
        ([], "a command is missing; the commands are synth, build, glb"),
    ],
)
def test_errors_have_one_line(shapes, vae, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    names = {"ROOT": shapes, "VAE": vae}
    run(*(names.get(word, word) for word in argv), code=2)
    assert re.fullmatch(f"error: {message}.*\n", capsys.readouterr().err)


def test_verify_counts_what_it_prints(tmp_path, capsys):
    run("verify", tmp_path, code=2)
    out = capsys.readouterr().out.splitlines()
    assert [line.split(" of ")[0] for line in out] == ["split 'train'", "split 'val'", "problems: 2"]
