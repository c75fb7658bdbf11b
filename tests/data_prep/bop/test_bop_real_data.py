"""From a dataset on disk to a pose: what is read, rendered and labelled fits together: labels give the pose back.

Without `--real-data` the dataset is a small drawn one.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from backlot.cameras import rotation_angle
from backlot.mesh_views import render_views
from backlot.pose_solver import find_pose
from data_prep.bop import PoseDataset, PoseSource
from data_prep.bop.query_scenes import SceneSettings, make_dataset
from data_prep.bop.render_templates import render_all
from objectives.epropnp import draw_points
from objectives.pose_labels import build_labels
from objectives.pose_settings import EProPnPConfig, LabelConfig

COUNT, SIZE, PATCH = 8, 224, 16


class Chosen:
    """Some rows of a source."""

    def __init__(self, source: PoseSource, rows: list[int]):
        self.source, self.rows = source, rows
        self.folder, self.models, self.fingerprint = source.folder, source.models, source.fingerprint
        self.object_ids = np.array([source.row(row).object_id for row in rows])
        self.objects, self.shard_sizes = np.unique(self.object_ids).tolist(), [len(rows)]

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int):
        return self.source.row(self.rows[index])

    def read(self, index: int):
        return self.source.read(self.rows[index])


@pytest.fixture(scope="module")
def source(request, tmp_path_factory) -> PoseSource:
    given = request.config.getoption("--real-data", default=None)
    if given is not None:
        return PoseSource(Path(given))
    root = tmp_path_factory.mktemp("drawn")
    settings = SceneSettings(image_size=(320, 240), num_objects=(2, 2), images_per_scene=4, noise=0, blur=0)
    make_dataset(root, 0, 2, 4, num_symmetric=0, settings=settings, num_workers=1)
    return PoseSource(root / "train")


@pytest.fixture(scope="module")
def rows(source) -> list[int]:
    """Well visible samples of a few objects, spread over the dataset."""
    chosen, objects = [], set()
    for row in np.linspace(0, len(source) - 1, min(len(source), 500)).round().astype(int):
        record = source.row(int(row))
        if record.visib_fract > 0.8 and (record.object_id in objects or len(objects) < 2):
            objects.add(record.object_id)
            chosen.append(int(row))
    return chosen[:COUNT]


def test_models_at_their_poses_are_what_the_depth_shows(source, rows):
    assert rows
    for row in rows:
        sample = source.read(row)
        mesh = source.models[sample.object_id].load_mesh()
        pose = sample.camera_from_object[None, None]
        depth = render_views([mesh], pose, sample.K, sample.mask.shape, supersample=1).depth[0]
        both = sample.mask & (depth > 0) & (sample.depth > 0)
        assert both.sum() > 0.8 * (sample.mask & (sample.depth > 0)).sum()
        assert np.median(np.abs(depth - sample.depth)[both]) < 0.02 * sample.diameter


def test_perfect_labels_give_the_pose_back(source, rows, tmp_path):
    chosen = Chosen(source, rows)
    models = type(source.models)(source.models.folder, {key: source.models[key] for key in chosen.objects})
    render_all(models, tmp_path, views=42, size=SIZE, num_workers=1)
    dataset = PoseDataset([chosen], tmp_path, image_size=SIZE, num_negative_templates=0, mask_query="gt", augment=False)
    batch = default_collate([dataset[row] for row in range(len(dataset))])
    labels = build_labels(batch, PATCH, LabelConfig(max_flow=8.0))
    said = SimpleNamespace(flow=labels.dense_flow, scale=None)
    points = draw_points(said, labels, EProPnPConfig(num_points=512), batch["template_types"] == 0)
    found = find_pose(*points, batch["K"][:, 0], generator=torch.Generator().manual_seed(0))
    angle = torch.rad2deg(rotation_angle(found.pose[:, :3, :3], batch["poses"][:, 0, :3, :3]))
    assert angle.median() < 0.1
    assert angle.max() < 0.5
