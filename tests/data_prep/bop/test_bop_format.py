"""BOP folders and models: what is written is read again, in BOP's own terms, and what is wrong is named in one line."""

import json
import shutil

import numpy as np
import pytest
import trimesh
from drawn_scenes import HEIGHT, RADIUS, WIDTH, K, ball, draw_frame, write_dataset
from PIL import Image

from data_prep.bop.format import (
    BadSampleError,
    BopDataset,
    RenderedFrame,
    RenderedObject,
    mask_box,
    to_edges,
    to_file_box,
    write_scene,
    write_targets,
)
from data_prep.bop.models import find_diameter, read_models, require_templates, write_models


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("bop") / "data"
    return root, write_dataset(root)


@pytest.fixture
def root(original, tmp_path):
    return shutil.copytree(original[0], tmp_path / "data")


def edit(path, change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


# --- scenes ---------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_again(original):
    root, drawn = original
    dataset = BopDataset(root, "train")
    frames = dataset.frames()
    assert [(frame.scene_id, frame.im_id) for frame in frames] == [(0, 0), (0, 1), (0, 2), (1, 100), (1, 101), (1, 102)]
    for frame, true in zip(frames, [each for scene in drawn for each in scene], strict=True):
        assert np.array_equal(frame.K, K)
        assert np.array_equal(dataset.rgb(frame.scene_id, frame.im_id), true.rgb)
        depth = dataset.depth(frame)
        assert depth.dtype == np.float32
        assert np.abs(depth - true.depth).max() < 0.51 * frame.depth_scale / 1000
        for gt, (found, each) in enumerate(zip(frame.instances, true.objects, strict=True)):
            assert found.obj_id == each.obj_id
            assert np.abs(found.camera_from_object - each.camera_from_object).max() < 1e-12
            assert np.array_equal(dataset.mask(frame.scene_id, frame.im_id, gt), each.mask)
            assert np.array_equal(dataset.mask_visib(frame.scene_id, frame.im_id, gt), each.mask_visib)
            assert np.array_equal(found.bbox_visib, mask_box(each.mask_visib))
            assert found.visib_fract == each.mask_visib.sum() / each.mask.sum()
            assert found.px_count_visib == each.mask_visib.sum()


def test_two_of_one_model_have_two_masks(original):
    dataset = BopDataset(original[0], "train")
    first, second = (dataset.mask_visib(0, 0, gt) for gt in (0, 1))
    assert [each.obj_id for each in dataset.frames()[0].instances[:2]] == [1, 1]
    assert first.any()
    assert second.any()
    assert not (first & second).any()


def test_files_are_in_bop_s_own_terms(tmp_path):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[10:20, 5:9] = True
    pose = np.eye(4)
    pose[:3, 3] = 0.1, 0.2, 0.5
    depth = np.full((HEIGHT, WIDTH), 0.5, np.float32)
    hidden = RenderedObject(4, pose, mask, mask & False)
    beyond = RenderedObject(5, pose, mask, mask, bbox_obj=(-10, 10, 9, 20), px_count_all=190)
    rgb = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    write_scene(tmp_path, "test", 7, [RenderedFrame(3, rgb, depth, K, [hidden, beyond])], depth_scale=0.5)
    folder = tmp_path / "test" / "000007"
    [pose_of_hidden, _] = json.loads((folder / "scene_gt.json").read_text())["3"]
    assert pose_of_hidden == {"cam_R_m2c": [1, 0, 0, 0, 1, 0, 0, 0, 1], "cam_t_m2c": [100, 200, 500], "obj_id": 4}
    first, second = json.loads((folder / "scene_gt_info.json").read_text())["3"]
    assert first["bbox_obj"] == [5, 10, 3, 9]  # last column - first column, as the toolkit has it
    assert first["bbox_visib"] == [-1, -1, -1, -1]
    assert (first["px_count_all"], first["px_count_valid"], first["px_count_visib"]) == (40, 40, 0)
    assert second["bbox_obj"] == [-10, 10, 18, 9]
    assert second["visib_fract"] == 40 / 190
    camera = json.loads((folder / "scene_camera.json").read_text())["3"]
    assert camera == {"cam_K": K.ravel().tolist(), "depth_scale": 0.5}
    numbers = np.asarray(Image.open(folder / "depth" / "000003.png"))
    assert numbers.dtype == np.uint16
    assert (numbers == 1000).all()  # 500 mm in halves of one
    assert (folder / "mask_visib" / "000003_000001.png").is_file()


def test_boxes_there_and_back():
    for box in ([0, 0, 1, 1], [-4, 2, 7, 9], [0, 0, 0, 0]):
        assert to_edges(to_file_box(box)).tolist() == box


def test_scenes_without_poses_are_read(root):
    for scene in ("000000", "000001"):
        for name in ("scene_gt.json", "scene_gt_info.json"):
            (root / "train" / scene / name).unlink()
    assert [frame.instances for frame in BopDataset(root, "train").frames()] == [()] * 6


def test_grey_pictures_and_jpegs_are_read(root):
    folder = root / "train" / "000000"
    (folder / "gray").mkdir()
    rgb = Image.open(folder / "rgb" / "000000.png")
    rgb.convert("L").save(folder / "gray" / "000000.tif")
    rgb.save(folder / "rgb" / "000001.jpg")
    for name in ("000000.png", "000001.png"):
        (folder / "rgb" / name).unlink()
    dataset = BopDataset(root, "train")
    grey = dataset.rgb(0, 0)
    assert np.array_equal(grey, np.repeat(np.asarray(rgb.convert("L"))[..., None], 3, -1))
    assert dataset.rgb(0, 1).shape == (HEIGHT, WIDTH, 3)


def test_targets_count_what_is_seen(root):
    write_targets(root, "train")
    dataset = BopDataset(root, "train")
    targets = dataset.targets()
    for frame in dataset.frames():
        seen = [each.obj_id for each in frame.instances if each.visib_fract > 0.1]
        assert len(seen) < len(frame.instances)
        found = {t.obj_id: t.inst_count for t in targets if (t.scene_id, t.im_id) == (frame.scene_id, frame.im_id)}
        assert found == {object_id: seen.count(object_id) for object_id in set(seen)}
    (root / "test_targets_bop19.json").unlink()
    with pytest.raises(ValueError, match=r"test_targets_bop19\.json is missing"):
        dataset.targets()


def set_field(name, value):
    def change(values):
        values["1"][2][name] = value

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("scene_camera.json", lambda values: values["1"].pop("cam_K"), "`1.cam_K` is missing"),
        ("scene_camera.json", lambda values: values["1"].update(depth_scale=0), "depth_scale"),
        ("scene_gt.json", lambda values: values.pop("1"), "picture 1 .* is missing from scene_gt.json"),
        ("scene_gt.json", lambda values: values["1"].pop(), "3 poses, but 4 entries"),
        ("scene_gt.json", set_field("obj_id", "2"), "obj_id"),
        ("scene_gt.json", set_field("cam_R_m2c", [1.0] * 9), "object 2 is no rotation"),
        ("scene_gt.json", set_field("cam_t_m2c", [1.0, float("nan"), 0.0]), "cam_t_m2c"),
        ("scene_gt_info.json", set_field("bbox_visib", [1.0]), "bbox_visib"),
    ],
)
def test_what_is_wrong_in_a_json_file_is_named(root, name, change, message):
    edit(root / "train" / "000000" / name, change)
    with pytest.raises(ValueError, match=message) as error:
        BopDataset(root, "train").frames()
    assert "000000" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_damaged_pictures_are_named(root):
    dataset = BopDataset(root, "train")
    folder = root / "train" / "000000"
    (folder / "rgb" / "000000.png").unlink()
    with pytest.raises(BadSampleError, match=r"rgb/000000\.png is missing"):
        dataset.rgb(0, 0)
    path = folder / "depth" / "000000.png"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BadSampleError, match=r"depth/000000\.png is damaged"):
        dataset.depth(dataset.frames()[0])
    with pytest.raises(BadSampleError, match=r"mask_visib/000000_000009\.png is missing"):
        dataset.mask_visib(0, 0, 9)
    shutil.copy(folder / "rgb" / "000001.png", folder / "mask" / "000001_000000.png")
    with pytest.raises(BadSampleError, match="one channel"):
        dataset.mask(0, 1, 0)


def test_a_split_without_scenes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no BOP scenes"):
        BopDataset(tmp_path, "train")


@pytest.mark.parametrize("far", [7.0, np.nan, -0.1])
def test_a_depth_that_16_bits_do_not_hold_is_refused(tmp_path, far):
    frame = draw_frame(0)
    frame.depth[0, 0] = far
    with pytest.raises(ValueError, match="depth must lie in"):
        write_scene(tmp_path, "train", 0, [frame])
    assert not (tmp_path / "train" / "000000" / "scene_camera.json").exists()


# --- models ---------------------------------------------------------------------------------------------------------


def test_models_are_read_in_metres(original):
    models = read_models(original[0] / "models")
    assert sorted(models) == [1, 2]
    assert abs(models[1].diameter - 2 * RADIUS) < 1e-9
    assert len(models[1].symmetries) == 1
    assert len(models[2].symmetries) == 315
    mesh, true = models[1].load_mesh(), ball()
    assert np.abs(mesh.vertices - true.vertices).max() < 1e-7
    assert np.array_equal(mesh.visual.vertex_colors, true.visual.vertex_colors)
    info = json.loads((original[0] / "models" / "models_info.json").read_text())["1"]
    assert abs(info["diameter"] - 100) < 1e-6
    assert abs(info["min_x"] + 50) < 1e-6
    assert abs(info["size_z"] - 100) < 1e-6


def test_an_unknown_object_and_a_missing_mesh_are_named(root):
    models = read_models(root / "models")
    with pytest.raises(ValueError, match=r"no object 9 among the models in .*models \(2 objects, ids 1 \.\.\. 2\)"):
        models[9]
    (root / "models" / "obj_000002.ply").unlink()
    with pytest.raises(ValueError, match=r"mesh of object 2 is missing: .*obj_000002\.ply"):
        models[2].load_mesh()
    (root / "models" / "obj_000001.ply").write_bytes(b"ply\nformat ascii 1.0\n")
    with pytest.raises(ValueError, match=r"mesh of object 1 is damaged|has no faces"):
        models[1].load_mesh()


def test_a_diameter_that_is_not_the_mesh_s_is_refused(root):
    edit(root / "models" / "models_info.json", lambda values: values["1"].update(diameter=10.0))
    with pytest.raises(ValueError, match=r"its diameter is 0\.01 m, that of .* is 0\.1 m"):
        read_models(root / "models")[1].load_mesh()
    with pytest.raises(ValueError, match="is 100 m"):
        read_models(root / "models", unit=1.0)[2].load_mesh()


@pytest.mark.parametrize("scale", [(1, 1, 1), (1, 2, 3), (1, 1, 0)])
def test_the_diameter_is_the_largest_distance(scale):
    points = np.random.default_rng(0).normal(size=(200, 3)) * scale
    brute = np.linalg.norm(points[:, None] - points[None], axis=-1).max()
    assert abs(find_diameter(points) / brute - 1) < 1e-9


def write_gso(root, name: str, size: float, suffix: str = ".obj"):
    """A folder of GSO models, two of them."""
    rows = [{"obj_id": number, "gso_id": f"toy_{number}"} for number in (0, 5)]
    root.mkdir(parents=True, exist_ok=True)
    (root / "gso_models.json").write_text(json.dumps(rows))
    for number in (0, 5):
        place = root / name / f"toy_{number}" / "meshes"
        place.mkdir(parents=True)
        trimesh.creation.box((size, size, size)).export(place / f"model{suffix}")
    return root / name


@pytest.mark.parametrize(
    ("name", "size", "suffix"), [("models_normalized", 1.0, ".obj"), ("models_bop-renderer_scale=0.1", 100.0, ".ply")]
)
def test_gso_models_have_the_unit_of_their_folder(tmp_path, name, size, suffix):
    folder = write_gso(tmp_path, name, size, suffix)
    models = read_models(folder)
    assert sorted(models) == [0, 5]
    for info in models.values():
        assert abs(info.diameter - 0.1 * 3**0.5) < 1e-6
        assert abs(find_diameter(info.load_mesh().vertices) - info.diameter) < 1e-6
    (folder / "toy_5" / "meshes" / f"model{suffix}").unlink()
    assert sorted(read_models(folder, object_ids=[0])) == [0]
    with pytest.raises(ValueError, match="mesh of object 5 is missing"):
        read_models(folder)
    with pytest.raises(ValueError, match="no object 7 in the map of ids"):
        read_models(folder, object_ids=[7])


def test_diameters_are_measured_once_and_when_a_mesh_changes(tmp_path):
    folder = write_gso(tmp_path, "models_normalized", 1.0)
    read_models(folder)
    edit(folder / ".diameters.json", lambda values: values["toy_0/meshes/model.obj"].__setitem__(2, 2.0))
    assert read_models(folder)[0].diameter == 0.2
    trimesh.creation.box((0.5, 0.5, 0.5)).export(folder / "toy_0" / "meshes" / "model.obj")
    assert abs(read_models(folder)[0].diameter - 0.05 * 3**0.5) < 1e-6


def test_a_wrong_unit_of_normalised_models_is_refused(tmp_path):
    folder = write_gso(tmp_path, "models_normalized", 100.0)
    with pytest.raises(ValueError, match="has another unit"):
        read_models(folder)
    assert abs(read_models(folder, unit=0.001)[0].diameter - 0.1 * 3**0.5) < 1e-6


def test_shapenet_models_are_found(tmp_path):
    rows = [{"obj_id": 3, "shapenet_synset_id": "02691156", "shapenet_source_id": "abc", "shapenet_name": "plane"}]
    (tmp_path / "shapenet_models.json").write_text(json.dumps(rows))
    place = tmp_path / "models_orig" / "02691156" / "abc" / "models"
    place.mkdir(parents=True)
    trimesh.creation.box((0.5, 0.5, 0.5)).export(place / "model_normalized.obj")
    assert abs(read_models(tmp_path / "models_orig")[3].diameter - 0.05 * 3**0.5) < 1e-6
    with pytest.raises(ValueError, match=r"has no models_info\.json"):
        read_models(place)


def test_missing_templates_name_the_command(root, tmp_path):
    models = read_models(root / "models")
    templates = tmp_path / "templates"
    templates.mkdir()
    (templates / "000001.safetensors").touch()
    require_templates(templates, [1], models)
    message = rf"templates of 1 objects \(2\) .*render_templates --models {root / 'models'} --out {templates}"
    with pytest.raises(ValueError, match=message):
        require_templates(templates, [1, 2], models)


def test_models_are_written_with_their_symmetries(tmp_path):
    half_turn = np.diag([1.0, -1, -1, 1]).ravel().tolist()
    write_models(tmp_path, {3: ball()}, {3: {"symmetries_discrete": [half_turn], "diameter": 1.0}})
    model = read_models(tmp_path / "models")[3]
    assert np.array_equal(model.symmetries[1], np.diag([1, -1, -1, 1]))
    assert abs(model.diameter - 2 * RADIUS) < 1e-9
