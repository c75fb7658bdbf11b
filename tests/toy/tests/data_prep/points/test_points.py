"""Points on disk: what is written is read, what is damaged is refused, and turns are a function of the key."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from backlot.samples import SampleKey
from data_prep.points.__main__ import main
from data_prep.points.dataset import PointDataset
from data_prep.points.format import read_points, write_points


def test_what_is_written_is_read(tmp_path):
    points = torch.randn(5, 2)
    write_points(tmp_path / "data", "train", points)
    assert torch.equal(read_points(tmp_path / "data", "train"), points)
    with pytest.raises(ValueError, match=r"there is no file .*val\.safetensors"):
        read_points(tmp_path / "data", "val")
    with pytest.raises(ValueError, match="`split` must be one of train, val, got 'test'"):
        read_points(tmp_path / "data", "test")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"points": torch.ones(3, 3)}, r"must be \(N, 2\) float32, got \(3, 3\)"),
        ({"points": torch.ones(3, 2, dtype=torch.float64)}, r"must be \(N, 2\) float32, got \(3, 2\) torch.float64"),
        ({"points": torch.tensor([[0.0, 1.0], [torch.nan, 1.0]])}, "must be finite, row 1 is not"),
        ({"others": torch.ones(3, 2)}, "has no tensor `points`"),
    ],
    ids=["shape", "type", "nan", "name"],
)
def test_what_is_not_as_the_format_has_it_is_refused(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "train.safetensors")
    with pytest.raises(ValueError, match=message):
        read_points(tmp_path, "train")


def test_a_torn_file_is_refused(tmp_path):
    path = write_points(tmp_path, "train", torch.ones(3, 2))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"train\.safetensors is damaged"):
        read_points(tmp_path, "train")


def test_turns_are_a_function_of_the_key_and_keep_the_radius(tmp_path):
    write_points(tmp_path, "train", torch.randn(4, 2))
    plain, turned = PointDataset(tmp_path), PointDataset(tmp_path, turns=8)
    keys = [SampleKey(1, epoch, seed=0) for epoch in range(20)]
    items = [turned[key]["points"] for key in keys]
    assert all(torch.equal(turned[key]["points"], item) for key, item in zip(keys, items, strict=True))
    assert len({tuple(item.tolist()) for item in items}) > 3
    radii = torch.stack(items).norm(dim=1)
    torch.testing.assert_close(radii, plain[keys[0]]["points"].norm().expand(20))


def test_the_fingerprint_tells_other_points(tmp_path):
    for name, seed in (("one", "1"), ("again", "1"), ("other", "2")):
        main(["synth", "--out", str(tmp_path / name), "--num_train", "9", "--num_val", "3", "--seed", seed])
    one, again, other = (PointDataset(tmp_path / name).fingerprint for name in ("one", "again", "other"))
    assert one == again != other
