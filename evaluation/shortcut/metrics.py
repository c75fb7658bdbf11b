"""How far two sets of pictures are apart: energy distance, Frechet distance, FID and KID, and features to compare."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 2048  # rows of a distance matrix held at once


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| with Euclidean norms, 0 where the distributions agree.

    The within-set means leave out the diagonal, so the estimate is unbiased and may fall below 0 (Szekely and Rizzo,
    "Energy statistics", 2013).

    Args:
        a, b: (N, ...) and (M, ...) with equal trailing shapes; computed flattened, in float64.

    Raises:
        ValueError: fewer than two samples in a set, or other shapes.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"`a` and `b` must hold at least 2 samples each, got {len(a)} and {len(b)}")
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(
            f"`a` and `b` must hold samples of one shape, got {tuple(a.shape[1:])} and {tuple(b.shape[1:])}"
        )
    a, b = a.flatten(1), b.flatten(1)
    between = distance_sum(a, b) / (len(a) * len(b))
    within = sum(distance_sum(x, x) / (len(x) * (len(x) - 1)) for x in (a, b))
    return 2 * between - within


def distance_sum(a: Tensor, b: Tensor) -> float:
    """Sum of the Euclidean distances of all pairs of (N, D) and (M, D), float64."""
    # Both in chunks: in float64 even the copy of a large set would be felt.
    parts = [
        torch.cdist(rows.double(), columns.double()).sum() for rows in a.split(CHUNK) for columns in b.split(CHUNK)
    ]
    return torch.stack(parts).sum().item()


def frechet_distance(features_a: Tensor, features_b: Tensor, eps: float = 0.0) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2), the distance of two Gaussians (Heusel et al., 1706.08500).

    tr (S_a S_b)^1/2 is taken from the symmetric S_a^1/2 S_b S_a^1/2, which has the same eigenvalues: real, and sound
    where a covariance is singular (fewer samples than features).

    Args:
        features_a, features_b: (N, D) and (M, D); computed in float64.
        eps: added to the diagonal of both covariances; FID implementations take 1e-6.

    Raises:
        ValueError: fewer than two samples in a set, or other shapes.
    """
    if min(len(features_a), len(features_b)) < 2:
        raise ValueError(f"both feature sets must hold at least 2 rows, got {len(features_a)} and {len(features_b)}")
    if features_a.ndim != 2 or features_a.shape[1:] != features_b.shape[1:]:
        shapes = f"{tuple(features_a.shape)} and {tuple(features_b.shape)}"
        raise ValueError(f"features must be (N, D) and (M, D), got {shapes}")
    a, b = features_a.double(), features_b.double()
    ridge = eps * torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
    covariance_a, covariance_b = (
        torch.cov(a.T).reshape(ridge.shape) + ridge,
        torch.cov(b.T).reshape(ridge.shape) + ridge,
    )
    values, vectors = torch.linalg.eigh(covariance_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ covariance_b @ root_a).clamp(min=0).sqrt().sum()
    shift = (a.mean(0) - b.mean(0)).square().sum()
    return (shift + covariance_a.trace() + covariance_b.trace() - 2 * cross).item()


class DigitsClassifier(nn.Module):
    """Tells 8x8 digits apart; `features` is the space in which sets of them are compared."""

    def __init__(self):
        super().__init__()
        self.conv_1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv_2 = nn.Conv2d(32, 32, 3, padding=1)
        self.hidden = nn.Linear(512, 64)
        self.head = nn.Linear(64, 10)

    def features(self, pixel_values: Tensor) -> Tensor:
        """(B, 1, 8, 8) in [-1, 1] -> (B, 64), the hidden layer before its activation."""
        hidden_states = F.relu(self.conv_2(F.relu(self.conv_1(pixel_values))))
        return self.hidden(F.max_pool2d(hidden_states, 2).flatten(1))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 1, 8, 8) -> logits (B, 10)."""
        return self.head(F.relu(self.features(pixel_values)))


def train_digits_classifier(pixel_values: Tensor, class_labels: Tensor, seed: int = 0) -> DigitsClassifier:
    """Train a `DigitsClassifier`: 30 epochs, batch 64, AdamW 1e-3, input noise 0.1; seconds on one thread.

    Args:
        pixel_values, class_labels: (N, 1, 8, 8) in [-1, 1] and (N,) in 0..9.
        seed: decides everything; torch's global generator is left as it was.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = DigitsClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-3)
    with torch.enable_grad():
        for _ in range(30):
            for rows in torch.randperm(len(class_labels), generator=generator).split(64):
                images = pixel_values[rows]
                noise = torch.randn(images.shape, generator=generator)
                loss = F.cross_entropy(classifier(images + 0.1 * noise), class_labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return classifier.eval().requires_grad_(False)


class InceptionFeatures(nn.Module):
    """The Inception-v3 of FID from a TorchScript file, called as network(images, return_features=True).

    The usual file is `inception-2015-12-05.pt` of StyleGAN, clean-fid and others: it takes 0..255 and resizes by
    itself (bilinear, without antialiasing, like the first FID code).

    Args:
        path: the file; it is never downloaded.
        device: where the network runs; features come back to the CPU, in float64.

    Raises:
        ValueError: the file is missing, no TorchScript, or a network of another kind.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cpu"):
        super().__init__()
        if not Path(path).is_file():
            raise ValueError(f"there is no file {path}")
        try:
            self.network = torch.jit.load(path, map_location=device).eval()
        except RuntimeError as error:
            raise ValueError(f"{path} is not a TorchScript file ({str(error).splitlines()[0]})") from error
        self.device = torch.device(device)
        with Path(path).open("rb") as file:
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        try:
            features = self(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
        except RuntimeError as error:  # TorchScript raises it for an unknown argument, too
            raise ValueError(f"{path} does not take (B, 3, H, W) images and `return_features`") from error
        if features.ndim != 2:
            raise ValueError(f"{path} answers with shape {tuple(features.shape)} where features (B, D) are due")
        self.num_features = features.shape[1]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(B, 1 or 3, H, W) uint8 -> (B, num_features) float64; grey is repeated."""
        images = images.to(self.device).expand(-1, 3, -1, -1)
        return self.network(images, return_features=True).cpu().double()


class InceptionDistances:
    """FID (arXiv 1706.08500) and KID (arXiv 1801.01401) of generated pictures against real ones, by torchmetrics.

    Args:
        path, device: see `InceptionFeatures`.
        kid_subset_size: pictures per KID estimate, at most as many as either set has; 100 random subsets are averaged.
        seed: of the subsets.

    Raises:
        ImportError: torchmetrics is not installed.
        ValueError: see `InceptionFeatures`.
    """

    def __init__(
        self, path: str | Path, device: str | torch.device = "cpu", kid_subset_size: int = 1000, seed: int = 0
    ):
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance
            from torchmetrics.image.kid import KernelInceptionDistance
            from torchmetrics.wrappers import FeatureShare
        except ImportError as error:
            raise ImportError("torchmetrics is not installed: pip install 'backlot[fid]'") from error
        features = InceptionFeatures(path, device)
        self.sha256, self.kid_subset_size, self.seed = features.sha256, kid_subset_size, seed
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save", UserWarning)
            kid = KernelInceptionDistance(features, subset_size=kid_subset_size, reset_real_features=False)
        fid = FrechetInceptionDistance(features, reset_real_features=False)
        self.metrics = FeatureShare({"fid": fid, "kid": kid})  # one pass of the network for both

    def add(self, pixel_values: Tensor, *, real: bool) -> None:
        """Take in pictures (B, 1 or 3, H, W) in [-1, 1]; they are rounded to 8 bits, as files are."""
        self.metrics.update(to_uint8(pixel_values), real=real)

    def compute(self) -> dict[str, float]:
        """`fid`, `kid` and `kid_std` (over subsets) of what was added; then forget the generated pictures."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            values = self.metrics.compute()
        self.metrics.reset()
        return {"fid": values["fid"].item(), "kid": values["kid"][0].item(), "kid_std": values["kid"][1].item()}


def to_uint8(pixel_values: Tensor) -> Tensor:
    """[-1, 1] -> 0..255."""
    return pixel_values.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
