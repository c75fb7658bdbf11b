"""PoseCodec and the conventions of poses."""

from __future__ import annotations

import pytest
import torch
from scipy.spatial.transform import Rotation

from pipelines.shortcut_scene import PoseCodec, opencv_from_pytorch3d, rotation_6d, rotation_matrix
from pipelines.shortcut_scene.codec import MIN_STD, SAM3D_MEAN, SAM3D_STD

MATRICES = torch.from_numpy(Rotation.random(20, random_state=0).as_matrix())


def make(count: int = 50) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    sample = {"shape": 3 * torch.randn(count, 8, 5) - 1, "translation": torch.randn(count, 1, 3)}
    return sample | {"scale": torch.randn(count, 1, 3), "6drotation_normalized": torch.randn(count, 1, 6)}


def test_six_numbers_are_the_first_two_columns():
    six = rotation_6d(MATRICES)
    assert torch.equal(six[:, :3], MATRICES[:, :, 0])
    assert torch.equal(six[:, 3:], MATRICES[:, :, 1])
    torch.testing.assert_close(rotation_matrix(six), MATRICES)
    # on points, which tells a rotation from its transpose
    points = torch.randn(20, 7, 3, dtype=torch.float64)
    turned = Rotation.from_matrix(MATRICES[0].numpy()).apply(points[0].numpy())
    torch.testing.assert_close((rotation_matrix(six)[0] @ points[0].T).T, torch.from_numpy(turned))


def test_any_six_numbers_give_a_rotation():
    matrix = rotation_matrix(torch.randn(30, 6, dtype=torch.float64))
    torch.testing.assert_close(matrix.mT @ matrix, torch.eye(3, dtype=torch.float64).expand(30, 3, 3))
    torch.testing.assert_close(torch.linalg.det(matrix), torch.ones(30, dtype=torch.float64))


def test_pytorch3d_cameras_look_the_same_way():
    """x and y change sign, z stays; points in front stay in front, and twice is nothing."""
    translation = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).expand(20, 3)
    rotation, moved = opencv_from_pytorch3d(MATRICES, translation)
    point = torch.tensor([0.3, -0.2, 0.7], dtype=torch.float64)
    before, after = MATRICES @ point + translation, rotation @ point + moved
    torch.testing.assert_close(after, before * torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(opencv_from_pytorch3d(rotation, moved)[0], MATRICES)


def test_channels_are_standardised_and_restored():
    sample = make()
    codec = PoseCodec.fit([{k: v[:20] for k, v in sample.items()}, {k: v[20:] for k, v in sample.items()}])
    for name, encoded in codec.encode(sample).items():
        rows = encoded.flatten(0, 1)
        torch.testing.assert_close(rows.mean(0), torch.zeros(rows.shape[1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(rows.std(0, correction=0), torch.ones(rows.shape[1]), atol=1e-4, rtol=0)
        torch.testing.assert_close(codec.decode(codec.encode(sample))[name], sample[name])


def test_a_constant_channel_does_not_explode():
    sample = make()
    sample["6drotation_normalized"][..., 2] = 0.0
    codec = PoseCodec.fit([sample])
    assert codec.std["6drotation_normalized"][2] == pytest.approx(MIN_STD)
    assert codec.encode(sample)["6drotation_normalized"].isfinite().all()


def test_sam3d_standardises_rotations_alone():
    sample, codec = make(), PoseCodec("sam3d")
    encoded = codec.encode(sample)
    wanted = (sample["6drotation_normalized"] - torch.tensor(SAM3D_MEAN)) / torch.tensor(SAM3D_STD)
    torch.testing.assert_close(encoded["6drotation_normalized"], wanted)
    assert torch.equal(encoded["scale"], sample["scale"])
    assert all(torch.equal(v, sample[k]) for k, v in PoseCodec().encode(sample).items())


def test_one_size_per_object_is_the_mean_of_sizes():
    codec = PoseCodec(isotropic_scale=True)
    scale = torch.tensor([[[1.0, 2.0, 3.0]]]).log()
    torch.testing.assert_close(codec.decode({"scale": scale})["scale"].exp(), torch.full((1, 1, 3), 2.0))


def test_it_is_one_file(tmp_path):
    codec = PoseCodec.fit([make()], isotropic_scale=True)
    codec.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["stats.json"]
    loaded = PoseCodec.from_pretrained(tmp_path)
    assert loaded.config.isotropic_scale
    for name, value in codec.encode(make()).items():
        assert torch.equal(loaded.encode(make())[name], value)


def test_what_does_not_fit_is_named():
    codec = PoseCodec.fit([{"scale": torch.randn(4, 1, 3)}])
    with pytest.raises(ValueError, match="no statistics of translation; it knows"):
        codec.encode({"translation": torch.zeros(1, 1, 3)})
    with pytest.raises(ValueError, match="scale has 2 channels, the codec's statistics 3"):
        codec.encode({"scale": torch.zeros(1, 1, 2)})
    with pytest.raises(ValueError, match="`mode` must be zscore, sam3d or identity, not raw"):
        PoseCodec("raw")
    with pytest.raises(ValueError, match="`mean` and `std`"):
        PoseCodec("zscore")
    with pytest.raises(ValueError, match="no samples to fit"):
        PoseCodec.fit([])
