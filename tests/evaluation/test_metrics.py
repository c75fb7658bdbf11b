"""Distances between sets of pictures: closed forms, and FID through a TorchScript file."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import Tensor, nn

from data_prep.images.digits import load_digits
from evaluation.shortcut import metrics
from evaluation.shortcut.metrics import (
    DigitsClassifier,
    InceptionDistances,
    InceptionFeatures,
    energy_distance,
    frechet_distance,
    train_digits_classifier,
)


class StandIn(nn.Module):
    """Called like the Inception-v3 file; the features of an 8-bit picture are known: its first 4 pixels, summed."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        return images.to(torch.float32).sum(1).flatten(1)[:, :4] if return_features else images.to(torch.float32)


class Logits(nn.Module):
    """A network without `return_features`."""

    def forward(self, images: Tensor) -> Tensor:
        return images.to(torch.float32).flatten(1)


def save_script(module: nn.Module, path):
    torch.jit.script(module).save(str(path))
    return path


@pytest.fixture
def weights(tmp_path):
    return save_script(StandIn(), tmp_path / "stand-in.pt")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_energy_distance_of_point_masses_is_twice_their_distance():
    a, b = torch.zeros(5, 1, 2, 2), torch.full((7, 1, 2, 2), 3.0)
    assert energy_distance(a, b) == pytest.approx(2 * 6.0, abs=1e-6)
    assert energy_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_energy_distance_leaves_out_the_diagonal():
    # between: (0 + 2 + 1 + 1) / 4 = 1; within a: 1; within b: 2 with the one pair there is, 1 with the diagonal
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]])
    assert energy_distance(a, b) == pytest.approx(2 * 1.0 - 1.0 - 2.0, abs=1e-6)


def test_energy_distance_of_two_draws_of_one_distribution_is_unbiased():
    values = [energy_distance(normal(20, 3, seed=2 * i), normal(30, 3, seed=2 * i + 1)) for i in range(200)]
    mean, error = sum(values) / 200, torch.tensor(values).std().item() / math.sqrt(200)
    assert abs(mean) < 4 * error  # with the diagonal it would be 0.2
    assert error < 0.02


def test_energy_distance_does_not_depend_on_chunks(monkeypatch):
    a, b = normal(23, 5), 1 + normal(11, 5, seed=1)
    whole = energy_distance(a, b)
    monkeypatch.setattr(metrics, "CHUNK", 4)
    assert energy_distance(a, b) == pytest.approx(whole, rel=1e-12)


def test_energy_distance_error_texts():
    with pytest.raises(ValueError, match="at least 2 samples each, got 1 and 3"):
        energy_distance(torch.zeros(1, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"one shape, got \(2,\) and \(3,\)"):
        energy_distance(torch.zeros(4, 2), torch.zeros(4, 3))


def with_moments(mean: Tensor, covariance: Tensor, count: int = 500) -> Tensor:
    """Rows whose sample mean and covariance are exactly these."""
    rows = normal(count, len(mean))
    rows = rows - rows.mean(0)
    whitened = rows @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(rows.T))).T
    return whitened @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_known_gaussians():
    # diagonal: |mu|^2 + sum (sqrt(s_a) - sqrt(s_b))^2 = 9 + 16 + (1-2)^2 + (3-1)^2
    a = with_moments(torch.zeros(2, dtype=torch.float64), torch.diag(torch.tensor([1.0, 9.0], dtype=torch.float64)))
    b = with_moments(torch.tensor([3.0, 4.0]).double(), torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64)))
    assert frechet_distance(a, b) == pytest.approx(30, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_covariances_that_do_not_commute():
    covariance_a = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    covariance_b = torch.tensor([[5.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    # tr sqrt(M) of a 2x2 matrix is sqrt(tr M + 2 sqrt(det M))
    product = covariance_a @ covariance_b
    cross = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    zero = torch.zeros(2, dtype=torch.float64)
    found = frechet_distance(with_moments(zero, covariance_a), with_moments(zero, covariance_b))
    assert found == pytest.approx(4 + 6 - 2 * cross, rel=1e-9)


def test_frechet_distance_with_fewer_samples_than_features_and_eps():
    a, b = normal(5, 12), normal(6, 12, seed=1)
    assert math.isfinite(frechet_distance(a, b))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    # point masses: the covariances are eps on the diagonal of one and of the other, and cancel
    assert frechet_distance(torch.zeros(3, 4), torch.ones(3, 4), eps=0.5) == pytest.approx(4)
    assert frechet_distance(a, b, eps=1e-2) != frechet_distance(a, b)


def test_frechet_distance_error_texts():
    with pytest.raises(ValueError, match="at least 2 rows, got 1 and 3"):
        frechet_distance(torch.zeros(1, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"\(N, D\) and \(M, D\), got \(4, 2\) and \(4, 3\)"):
        frechet_distance(torch.zeros(4, 2), torch.zeros(4, 3))


def test_classifier_features_are_the_hidden_layer_before_its_activation():
    torch.manual_seed(0)
    classifier, images = DigitsClassifier(), torch.rand(3, 1, 8, 8)
    features = classifier.features(images)
    assert features.shape == (3, 64)
    assert (features < 0).any()
    assert torch.equal(classifier.head(features.relu()), classifier(images))


def test_training_the_classifier_is_deterministic_and_leaves_the_global_generator_alone():
    images, labels = load_digits("train")
    images, labels = images[:128], labels[:128]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = train_digits_classifier(images, labels)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = train_digits_classifier(images, labels), train_digits_classifier(images, labels, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.head.weight, other.head.weight)
    assert (first(images).argmax(1) == labels).float().mean() > 0.8


def test_inception_features_take_grey_and_colour(weights):
    features = InceptionFeatures(weights)
    grey = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    assert features.num_features == 4
    assert torch.equal(features(grey), 3 * grey.double().flatten(1)[:, :4])
    assert torch.equal(features(grey), features(grey.repeat(1, 3, 1, 1)))


def test_inception_error_texts(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        InceptionFeatures(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("no archive")
    with pytest.raises(ValueError, match="is not a TorchScript file"):
        InceptionFeatures(tmp_path / "text.pt")
    with pytest.raises(ValueError, match=r"does not take .* `return_features`"):
        InceptionFeatures(save_script(Logits(), tmp_path / "logits.pt"))


def test_fid_agrees_with_frechet_distance_and_generated_pictures_are_forgotten(weights):
    real, fake = (torch.rand(90, 1, 8, 8, generator=torch.Generator().manual_seed(s)) * 2 - 1 for s in (0, 1))
    distances = InceptionDistances(weights, kid_subset_size=40)
    for batch in real.split(40):
        distances.add(batch, real=True)

    def measure(samples: Tensor) -> dict[str, float]:
        for batch in samples.split(32):
            distances.add(batch, real=False)
        return distances.compute()

    first, bright = measure(fake), measure(fake * 0.5 + 0.5)
    features = [InceptionFeatures(weights)(metrics.to_uint8(x)) for x in (real, fake)]
    assert first["fid"] == pytest.approx(frechet_distance(*features), rel=1e-6)
    assert bright["fid"] > 5 * first["fid"]
    assert bright["kid"] > first["kid"]
    state = torch.get_rng_state()
    assert measure(fake) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_without_torchmetrics_the_message_says_what_to_install(weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ImportError, match=r"pip install 'backlot\[fid\]'"):
        InceptionDistances(weights)


def test_to_uint8_rounds_and_clamps():
    values = torch.tensor([-2.0, -1.0, 0.0, 127 / 127.5 - 1, 1.0, 3.0])
    assert metrics.to_uint8(values).tolist() == [0, 0, 128, 127, 255, 255]
