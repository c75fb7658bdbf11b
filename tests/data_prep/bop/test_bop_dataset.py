"""Items of the pose dataset: crops, cameras, templates and masks that agree, whatever reads them and in which order."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation
from torch.utils.data import DataLoader, default_collate

from backlot.cameras import backproject, inverse_pose, project, transform, viewing_direction
from backlot.mesh_views import instance_masks, render_views
from backlot.quarantine import DataQualityError
from backlot.samples import SampleKey
from data_prep.bop.dataset import PoseDataset, cut_out
from data_prep.bop.format import RenderedFrame, RenderedObject, Row, Sample, write_scene
from data_prep.bop.index import PoseSource
from data_prep.bop.item_settings import DetectionSettings
from data_prep.bop.mixture import ShardMixture, dataset_weights
from data_prep.bop.models import write_models
from pipelines.vpog.templates import TemplateSet, render_template_set, template_path

SIZE = 64
WIDTH, HEIGHT = 160, 120
K = np.array([[180.0, 0, 79.5], [0, 176.0, 59.5], [0, 0, 1]])
ASYMMETRIC, BRICK = 3, 5
BRICK_SYMMETRY = np.diag([-1.0, -1, 1, 1])
NUM_PICTURES = 5
PLAIN = {"image_size": SIZE, "mask_query": "gt", "augment": False}


def asymmetric() -> trimesh.Trimesh:
    """A dented ball in many colours, 0.1 m."""
    mesh = trimesh.creation.icosphere(3, radius=0.05)
    x, y, z = mesh.vertices.T / 0.05
    mesh.vertices *= (1 + 0.25 * np.sin(2 * x + y) * np.cos(3 * z))[:, None]
    return painted(mesh, np.stack([120 + 90 * x, 120 + 90 * y, 120 + 90 * z], 1))


def brick() -> trimesh.Trimesh:
    """Looks the same after half a turn about z."""
    mesh = trimesh.creation.box((0.09, 0.05, 0.03)).subdivide().subdivide()
    return painted(mesh, np.repeat(128 + 4000 * mesh.vertices[:, 2:], 3, 1))


def painted(mesh: trimesh.Trimesh, colours: np.ndarray) -> trimesh.Trimesh:
    """With colours (V, 3) of its vertices, 0 to 255."""
    mesh.visual.vertex_colors = np.concatenate([colours.clip(0, 255), np.full((len(colours), 1), 255)], 1).astype("u1")
    return mesh


MESHES = {ASYMMETRIC: asymmetric(), BRICK: brick()}


def draw_frame(number: int) -> RenderedFrame:
    """Two dented balls and a brick side by side on a noisy background, the first one cut by the picture's edge."""
    random = np.random.default_rng(number)
    ids = [ASYMMETRIC, BRICK, ASYMMETRIC]
    poses = np.tile(np.eye(4), (3, 1, 1))
    poses[:, :3, :3] = Rotation.random(3, random_state=number).as_matrix()
    poses[:, :3, 3] = [(-0.21, 0.0, 0.5), (-0.02, 0.05, 0.5), (0.08, -0.03, 0.48)]
    meshes = [MESHES[each] for each in ids]
    seen = render_views(meshes, poses[None], K, (HEIGHT, WIDTH), supersample=1, backend="zbuffer")
    whole = instance_masks(meshes, poses[None], K, (HEIGHT, WIDTH))[0]
    background = random.integers(60, 255, (HEIGHT, WIDTH, 3), np.uint8)
    rgb = np.where(seen.instances[0][..., None] < 0, background, seen.rgb[0])
    depth = np.where(seen.depth[0] > 0, seen.depth[0], 2)
    visible = seen.masks(3)[0]
    objects = [
        RenderedObject(each, pose, mask, mask_visib)
        for each, pose, mask, mask_visib in zip(ids, poses, whole, visible, strict=True)
    ]
    return RenderedFrame(number, rgb, depth, K, objects)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A BOP dataset with one scene, and its templates in `templates`."""
    root = tmp_path_factory.mktemp("bop")
    symmetries = {BRICK: {"symmetries_discrete": [BRICK_SYMMETRY.reshape(-1).tolist()]}}
    write_models(root, MESHES, symmetries)
    write_scene(root, "train", 1, map(draw_frame, range(NUM_PICTURES)))
    for object_id, mesh in MESHES.items():
        templates = render_template_set(mesh, object_id, 42, SIZE, backend="zbuffer")
        templates.save(template_path(root / "templates", object_id))
    return root


@pytest.fixture
def source(data) -> PoseSource:
    return PoseSource(data / "train")


class Altered:
    """A source whose samples are changed after reading."""

    def __init__(self, source: PoseSource, change: Callable[[Sample], Sample]):
        self.source, self.change = source, change
        self.objects, self.object_ids, self.models = source.objects, source.object_ids, source.models
        self.shard_sizes, self.fingerprint = source.shard_sizes, source.fingerprint

    def __len__(self) -> int:
        return len(self.source)

    def row(self, index: int) -> Row:
        return self.source.row(index)

    def read(self, index: int) -> Sample:
        return self.change(self.source.read(index))


def is_equal(first: dict, second: dict) -> bool:
    return all(
        torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
        for name, value in first.items()
    )


# --- the contract ---------------------------------------------------------------------------------------------------


def test_forms(data, source):
    dataset = PoseDataset([source], data / "templates", image_size=SIZE)
    assert len(dataset) == 3 * NUM_PICTURES
    item = dataset[0]
    forms = {name: (tuple(v.shape), v.dtype) for name, v in item.items() if isinstance(v, torch.Tensor)}
    real, whole = torch.float32, torch.int64
    assert forms == {
        "images": ((7, 3, SIZE, SIZE), real),
        "masks": ((7, SIZE, SIZE), torch.bool),
        "K": ((7, 3, 3), real),
        "poses": ((7, 4, 4), real),
        "d_ref": ((3,), real),
        "reference_rotation": ((3, 3), real),
        "template_indices": ((6,), whole),
        "template_types": ((6,), whole),
        "query_depth": ((SIZE, SIZE), real),
        "template_depth": ((6, SIZE, SIZE), real),
        "M_query": ((3, 3), real),
        "K_original_query": ((3, 3), real),
        "bboxes": ((4,), real),
        "diameter": ((), real),
        "object_id": ((), whole),
    }
    assert item["sample_id"] == "000001_000000_000000"
    assert 0 <= item["images"].min() < item["images"].max() <= 1
    batch = default_collate([dataset[row] for row in range(3)])
    assert batch["images"].shape == (3, 7, 3, SIZE, SIZE)
    assert batch["object_id"].tolist() == [ASYMMETRIC, BRICK, ASYMMETRIC]


def test_templates_are_those_of_the_object(data, source):
    """Pictures, masks (alpha, not ones), depths, cameras; whether sets are kept in memory or read view by view."""
    kept, read = (PoseDataset([source], data / "templates", **PLAIN, template_cache_bytes=size) for size in (2**30, 0))
    for row in range(3):
        item = kept[row]
        templates = TemplateSet.load(template_path(data / "templates", int(item["object_id"])))
        rows = item["template_indices"].numpy()
        pictures = (item["images"][1:] * 255).round().byte().permute(0, 2, 3, 1).numpy()
        assert np.array_equal(pictures, templates.rgba[rows][..., :3])
        assert np.array_equal(item["masks"][1:].numpy(), templates.rgba[rows][..., 3] == 255)
        assert 0.05 < item["masks"][1:].float().mean() < 0.8
        assert np.array_equal(item["template_depth"].numpy(), templates.depth[rows])
        np.testing.assert_allclose(item["poses"][1:].numpy(), templates.camera_from_object[rows], rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(item["K"][1:].numpy(), np.tile(templates.K, (6, 1, 1)), rtol=1e-6)
        assert is_equal(item, read[row])


def test_reference_direction(data, source):
    """By the position of the camera, not by a column of the rotation."""
    dataset = PoseDataset([source], data / "templates", **PLAIN)
    item = dataset[0]
    nearest = item["poses"][1].double()
    assert item["template_types"].tolist() == [0, 0, 0, 0, 1, 1]
    position = inverse_pose(nearest)[:3, 3]
    assert torch.linalg.vecdot(item["d_ref"].double(), position / position.norm()) > 1 - 1e-6
    assert torch.equal(item["reference_rotation"], item["poses"][1, :3, :3])


# --- crops and cameras ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode", [PLAIN, {"image_size": SIZE}, {"image_size": SIZE, "in_plane_augmentation_deg": 180.0}]
)
def test_one_affine_says_where_everything_is(data, source, mode):
    """Points through the picture's camera and M are points through the crop's camera; the picture may be turned."""
    dataset = PoseDataset([source], data / "templates", **mode)
    for row in range(len(dataset)):
        item, sample = dataset[row], source.read(row)
        points = torch.from_numpy(np.random.default_rng(row).uniform(-0.05, 0.05, (50, 3)))
        truth = torch.from_numpy(sample.camera_from_object)
        symmetries = torch.from_numpy(source.models[sample.object_id].symmetries)
        moved = [transform(truth @ symmetry, points) for symmetry in symmetries]
        through_picture = [project(torch.from_numpy(sample.K), each) for each in moved]
        M = item["M_query"].double()
        expected = torch.stack([each @ M[:2, :2].mT + M[:2, 2] for each in through_picture])
        found = project(item["K"][0].double(), transform(item["poses"][0].double(), points))
        assert (found - expected).norm(dim=-1).amax(-1).min() < 1e-3
        assert torch.equal(item["K_original_query"], torch.from_numpy(sample.K).float())
        if "in_plane_augmentation_deg" not in mode:
            torch.testing.assert_close(item["K"][0], item["M_query"] @ item["K_original_query"], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("degrees", [0.0, 180.0])
def test_pictures_lie_where_the_cameras_say(data, source, degrees):
    """The object's surface as the crop has it is the mesh's, with the colour that the mesh has there."""
    dataset = PoseDataset([source], data / "templates", **PLAIN, in_plane_augmentation_deg=degrees)
    for row in (0, 2, 5):  # one of them cut by the picture's edge
        item = dataset[row]
        mask = item["masks"][0]
        points = transform(inverse_pose(item["poses"][0]), backproject(item["K"][0], item["query_depth"])[mask])
        mesh = MESHES[int(item["object_id"])]
        surface, faces = trimesh.sample.sample_surface(mesh, 20_000, seed=0)
        _, nearest = cKDTree(surface).query(points.numpy())
        distances = ((points.numpy() - surface[nearest]) * mesh.face_normals[faces[nearest]]).sum(1)
        assert np.median(np.abs(distances)) < 0.004 * 0.1
        if row == 2:
            _, vertices = mesh.kdtree.query(points.numpy())
            colours = torch.from_numpy(np.asarray(mesh.visual.vertex_colors)[vertices, :3]).double()
            shown = item["images"][0][:, mask].T.double()
            shares = [colours / colours.sum(1, keepdim=True), shown / shown.sum(1, keepdim=True)]
            assert (shares[0] - shares[1]).abs().median() < 0.03


def test_a_spot_is_found_where_the_affine_says():
    """Enlarged, shrunk, turned, and partly outside: the centre of a blurred spot."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    centre = np.array([101.3, 47.8])
    spot = 250 * np.exp(-((columns - centre[0]) ** 2 + (rows - centre[1]) ** 2) / (2 * 4.0**2))
    sample = Sample(
        rgb=np.repeat(spot.round().astype(np.uint8)[..., None], 3, 2),
        depth=spot.astype(np.float32),
        mask=spot > 125,
        K=K,
        camera_from_object=np.eye(4),
        bbox_visib=np.array([90, 40, 110, 60], np.float32),
        object_id=ASYMMETRIC,
        diameter=0.1,
        key="spot",
    )
    for scale, angle in ((1.7, 0.0), (0.6, 0.4), (1.0, -2.0), (2.0, 1.0)):
        turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        affine = np.eye(3)
        affine[:2, :2], affine[:2, 2] = turn, np.array([36.4, 26.9]) - turn @ centre
        picture, depth, mask = cut_out(sample, torch.from_numpy(affine), SIZE)
        for values, error in ((picture[..., 0].double(), 0.05), (depth.double(), 0.2), (mask.double(), 0.5)):
            v, u = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
            found = [float((values * each).sum() / values.sum()) for each in (u, v)]
            assert np.abs(np.array(found) - (36.4, 26.9)).max() < error * max(1, scale)


@pytest.mark.parametrize("box", [(-90, -60, 60, 90), (100, 60, 300, 400), (10, -300, 70, 110)])
def test_boxes_outside_the_picture(data, source, box):
    """What is outside of the picture is black, without depth, and off the object."""
    altered = Altered(source, lambda sample: replace(sample, bbox_visib=np.array(box, np.float32)))
    dataset = PoseDataset([altered], data / "templates", image_size=SIZE, mask_query="none", augment=False)
    row = next(row for row in range(3) if seen_in(source.read(row), box))
    item = dataset[row]
    inverse = item["M_query"].double().inverse()
    v, u = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    places = torch.stack([u, v, torch.ones_like(u)], -1).double() @ inverse.mT
    reach = 1 + float(inverse[0, 0])  # of a crop's pixel, in the picture's
    outside = ((places[..., :2] < -reach) | (places[..., :2] > torch.tensor([WIDTH, HEIGHT]) + reach)).any(-1)
    assert 0.1 < outside.float().mean() < 0.95
    assert not item["images"][0][:, outside].any()
    assert not item["query_depth"][outside].any()
    assert not item["masks"][0][outside].any()
    inside = ((places[..., :2] > 1) & (places[..., :2] < torch.tensor([WIDTH - 2, HEIGHT - 2]))).all(-1)
    assert (item["query_depth"][inside] > 0).all()
    assert item["masks"][0].any()
    torch.testing.assert_close(item["bboxes"], torch.tensor(box).float())


def seen_in(sample: Sample, box: tuple[int, ...]) -> bool:
    x1, y1, x2, y2 = (max(0, edge) for edge in box)
    return bool(sample.mask[y1:y2, x1:x2].sum() > 20)


# --- masks ----------------------------------------------------------------------------------------------------------


def test_mask_modes(data, source):
    """`none` keeps the background, `gt` removes exactly it, `jitter` about it; the mask is what is seen and shown."""
    plain, exact, rough = (
        PoseDataset([source], data / "templates", image_size=SIZE, mask_query=mode, augment=False)
        for mode in ("none", "gt", "jitter")
    )
    differ = []
    for row in range(len(source)):
        background, cut, frayed = plain[row], exact[row], rough[row]
        assert torch.equal(background["masks"][0], cut["masks"][0])
        assert (background["images"][0][:, ~cut["masks"][0]] > 0).float().mean() > 0.5
        assert torch.equal(cut["images"][0], background["images"][0] * cut["masks"][0])
        assert not torch.equal(frayed["bboxes"], cut["bboxes"])
        shown = frayed["images"][0].any(0)
        differ.append(float((shown & ~frayed["masks"][0]).float().mean()))
    assert 0 < np.mean(differ) < 0.15


def test_a_frayed_mask_is_never_more_than_what_is_seen(data, source):
    still = DetectionSettings(box_jitter=0)
    rough = PoseDataset([source], data / "templates", image_size=SIZE, augment=False, detection=still)
    exact = PoseDataset([source], data / "templates", **PLAIN)
    shares = []
    for row in range(len(source)):
        frayed, truth = rough[row]["masks"][0], exact[row]["masks"][0]
        assert not (frayed & ~truth).any()
        shares.append(float(frayed.sum() / truth.sum()))
    assert 0.7 < np.mean(shares) < 1
    assert min(shares) < 0.97


def test_two_of_one_model_have_masks_of_their_own(data, source):
    """Whatever was read before, and each time the same."""
    dataset = PoseDataset([source], data / "templates", image_size=SIZE)
    first, other, again = dataset[0], dataset[2], dataset[0]
    assert first["object_id"] == other["object_id"] == ASYMMETRIC
    assert is_equal(first, again)
    assert not torch.equal(first["masks"][0], other["masks"][0])
    for row, x in ((0, -0.21), (2, 0.08)):
        sample = source.read(row)
        assert abs(sample.camera_from_object[0, 3] - x) < 1e-6
        columns = np.flatnonzero(sample.mask.any(0))
        assert abs(columns.mean() - np.clip(79.5 + 180 * x / 0.5, 10, None)) < 15


# --- symmetry -------------------------------------------------------------------------------------------------------


def test_poses_of_symmetric_objects_are_those_nearest_to_their_templates(data, source):
    dataset = PoseDataset([source], data / "templates", **PLAIN)
    swapped = 0
    for row in range(1, len(source), 3):
        item, truth = dataset[row], torch.from_numpy(source.read(row).camera_from_object)
        assert item["object_id"] == BRICK
        both = torch.stack([truth, truth @ torch.from_numpy(BRICK_SYMMETRY)])
        errors = (both - item["poses"][0]).abs().amax((1, 2))
        assert errors.min() < 1e-6
        swapped += int(errors.argmin())
        angles = [torch.linalg.vecdot(viewing_direction(each).float(), item["d_ref"]).acos() for each in both]
        chosen = int(errors.argmin())
        assert angles[chosen] <= angles[1 - chosen] + np.radians(5)
        negatives = item["poses"][1:][item["template_types"] == 1].double()
        views = viewing_direction(negatives) @ viewing_direction(both).mT
        assert views.max() <= 1e-5
    assert swapped > 0


def test_turned_pictures_have_turned_poses(data, source):
    """By as much as asked, about the camera's axis."""
    dataset = PoseDataset([source], data / "templates", **PLAIN, in_plane_augmentation_deg=40.0)
    angles = []
    for epoch in range(20):
        pose = dataset[SampleKey(0, epoch, 1)]["poses"][0].double()
        relative = pose[:3, :3] @ torch.from_numpy(source.read(0).camera_from_object)[:3, :3].mT
        assert abs(relative[2, 2] - 1) < 1e-5
        angles.append(float(torch.atan2(relative[1, 0], relative[0, 0]).rad2deg()))
    assert 25 < max(map(abs, angles)) <= 40
    assert min(angles) < 0 < max(angles)


# --- randomness -----------------------------------------------------------------------------------------------------


class Keys:
    """Batches of keys, as the sampler of a run gives them."""

    def __init__(self, keys: list[SampleKey]):
        self.keys = keys

    def __iter__(self):
        return iter([self.keys[:4], self.keys[4:]])


def test_workers_change_nothing(data, source):
    dataset = PoseDataset([source], data / "templates", image_size=SIZE)
    keys = [SampleKey(row, epoch, 7) for epoch in (0, 3) for row in (4, 0, 2, 7)]
    alone = [dataset[key] for key in reversed(keys)][::-1]
    for workers in (0, 2):
        batches = list(DataLoader(dataset, batch_sampler=Keys(keys), num_workers=workers))
        assert all(is_equal(batch, default_collate(alone[4 * i : 4 * i + 4])) for i, batch in enumerate(batches))


def test_epochs_and_seeds_differ(data, source):
    dataset = PoseDataset([source], data / "templates", image_size=SIZE, seed=9)
    item = dataset[SampleKey(5, 0, 9)]
    assert is_equal(item, dataset[5])
    others = [dataset[SampleKey(5, 1, 9)], dataset[SampleKey(5, 0, 10)]]
    assert not any(torch.equal(item["images"][0], other["images"][0]) for other in others)
    assert not any(torch.equal(item["bboxes"], other["bboxes"]) for other in others)


def test_augmentation_leaves_the_choice_of_templates(data, source):
    plain, bright = (
        PoseDataset([source], data / "templates", image_size=SIZE, mask_query="gt", augment=augment)
        for augment in (False, True)
    )
    pairs = [(plain[row], bright[row]) for row in range(len(source))]
    assert all(torch.equal(a["template_indices"], b["template_indices"]) for a, b in pairs)
    assert sum(not torch.equal(a["images"][0], b["images"][0]) for a, b in pairs) > 0.7 * len(source)
    assert all(torch.equal(a["images"][1:], b["images"][1:]) for a, b in pairs)


# --- several sources, bad samples, wrong arguments ------------------------------------------------------------------


def test_sources_have_templates_of_their_own(data, source, tmp_path):
    """Object ids of two sets are not the same objects: the second set's are rendered grey here."""
    for object_id, mesh in MESHES.items():
        grey = painted(mesh.copy(), np.full((len(mesh.vertices), 3), 200))
        render_template_set(grey, object_id, 42, SIZE, backend="zbuffer").save(template_path(tmp_path, object_id))
    dataset = PoseDataset([source, source], [data / "templates", tmp_path], **PLAIN)
    assert len(dataset) == 2 * len(source)
    first, second = dataset[0], dataset[len(source)]
    assert torch.equal(first["masks"][0], second["masks"][0])
    assert (first["images"][1:, 0] - first["images"][1:, 1]).abs().max() > 0.1
    assert (second["images"][1:, 0] - second["images"][1:, 1]).abs().max() < 0.01
    order = ShardMixture(dataset.shard_sizes, dataset_weights(1), seed=0, shards_in_window=1, block=10)
    assert {dataset.locate(key)[0] for key in order.keys(0, 30)} == {1}
    assert [dataset.locate(row) for row in (0, 14, 15, 29)] == [(0, 0), (0, 14), (1, 0), (1, 14)]


def test_bad_samples_are_named_and_replaced(data, source, tmp_path):
    listed = tmp_path / "run" / "quarantine.jsonl"

    def hide(sample: Sample) -> Sample:
        """Its box is where the object is not."""
        away = np.array([300, 300, 340, 340], np.float32)
        return replace(sample, bbox_visib=away) if sample.key.startswith("000001_000001") else sample

    dataset = PoseDataset(
        [Altered(source, hide)], data / "templates", **PLAIN, max_bad_fraction=0.2, quarantine_path=listed
    )
    assert dataset[3]["sample_id"] == "000001_000002_000000"
    assert [json.loads(line)["path"] for line in listed.read_text().splitlines()] == [
        f"source 0: 000001_000001_{gt:06d}" for gt in range(3)
    ]
    assert "no pixel of object 3 is seen in its box" in listed.read_text().splitlines()[0]
    assert dataset[4]["sample_id"] == dataset[3]["sample_id"] == "000001_000002_000000"
    strict = PoseDataset([Altered(source, hide)], data / "templates", **PLAIN, max_bad_fraction=0.1)
    with pytest.raises(DataQualityError, match=r"2 of 15 samples are bad, .* 0\.1 allows 1; the last is"):
        strict[3]


def test_damaged_files_are_bad_samples(data, source, tmp_path):
    picture = data / "train" / "000001" / "rgb" / "000004.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) // 2])
    try:
        dataset = PoseDataset([source], data / "templates", **PLAIN, max_bad_fraction=0.2)
        assert dataset[12]["sample_id"] == "000001_000000_000000"  # after the last comes the first
        assert {12, 13, 14} == {row for row in range(15) if row in dataset.quarantine}
    finally:
        picture.write_bytes(whole)


def test_missing_templates_name_their_command(data, source, tmp_path):
    with pytest.raises(
        ValueError, match=r"templates of 2 objects \(3, 5\) .* python -m data_prep.bop render_templates"
    ):
        PoseDataset([source], tmp_path, **PLAIN)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 32}, r"64x64 pixels, `image_size` is 32: .* --size 32"),
        ({"mask_query": "box"}, "`mask_query` must be one of none, gt, jitter, got 'box'"),
        ({"in_plane_augmentation_deg": 200.0}, r"`in_plane_augmentation_deg` must be in \[0, 180\], got 200"),
        ({"num_positive_templates": 0}, "num_positive_templates"),
        ({"max_bad_fraction": 2}, r"`max_bad_fraction` must be in \[0, 1\], got 2"),
        ({"templates_dir": ["a", "b"]}, "1 sources, but 2 folders in `templates_dir`"),
        ({"sources": []}, "the dataset is empty"),
        ({"num_positive_templates": 40, "num_negative_templates": 3}, "43 templates are to be chosen of 42"),
    ],
)
def test_wrong_arguments(data, source, arguments, message):
    given = {"sources": [source], "templates_dir": data / "templates", **PLAIN} | arguments
    with pytest.raises(ValueError, match=message):
        PoseDataset(**given)


def test_rows_outside(data, source):
    dataset = PoseDataset([source], data / "templates", **PLAIN)
    for row in (-1, 15):
        with pytest.raises(IndexError, match=f"row {row} of 15"):
            dataset[row]
