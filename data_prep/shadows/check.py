"""Name every bad sample of shadow data, one line each; tell what the good ones are like, and draw some of them.

The formats are described in `data_prep/shadows/dataset.py`; a sample is bad if `ShadowDataset` would not take it.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from backlot.pictures import image_grid
from data_prep.shadows.dataset import SIZE_RANGE, THETA_RANGE, Labels, Sample, fit_sample, load_sample, open_source

# A pixel above the first belongs to the shadow; a shadow above the second at the border is cut off by it.
SHADOW_LEVEL, BORDER_LEVEL = 0.02, 0.1
HISTOGRAMS = {"theta": (THETA_RANGE, 9), "phi": ((0, 360), 12), "size": (SIZE_RANGE, 6)}
BAR_WIDTH = 40
GROUND = 0.85


@dataclass(frozen=True)
class Finding:
    """What was found about one sample: its `problem` (one line), or else its labels and measures of its pictures."""

    row: int
    problem: str | None = None
    labels: Labels | None = None
    object_id: str = ""
    picture_size: tuple[int, int] = (0, 0)
    mask_coverage: float = 0.0
    shadow_coverage: float = 0.0
    shadow_rms: float = 0.0
    touches_border: bool = False


class Findings(Dataset):
    """A `Finding` for each sample of a folder, tar or folder of tars.

    `broken` has a line for each tar that cannot be read to its end.

    Raises:
        ValueError: `path` holds no shadow data, or its metadata.json is missing or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.source = open_source(path)
        stems = set(self.source.stems)
        problems = self.source.problems.items()
        self.broken = [f"{self.source.path}: {name}: {reason}" for name, reason in problems if name not in stems]

    def __len__(self) -> int:
        return len(self.source.stems)

    def __getitem__(self, row: int) -> Finding:
        try:
            sample = load_sample(self.source, row)
        except ValueError as error:
            return Finding(row, str(error))
        labels, shadow = self.source.labels[row], sample.shadow
        border = max(shadow[[0, -1]].max(), shadow[:, [0, -1]].max())
        return Finding(
            row,
            labels=labels,
            object_id=labels.object_id or hashlib.sha256(self.source.read(row, "object")).hexdigest(),
            picture_size=shadow.shape,
            mask_coverage=float(sample.mask.mean()),
            shadow_coverage=float((shadow > SHADOW_LEVEL).mean()),
            shadow_rms=float(np.sqrt(np.square(shadow, dtype=np.float64).mean())),
            touches_border=bool(border > BORDER_LEVEL),
        )


def examine(findings: Findings, num_workers: int = 0) -> list[Finding]:
    """The findings of the good samples; the problems of the others are printed, one line each."""
    good = []
    loader = DataLoader(findings, batch_size=None, num_workers=num_workers)
    for finding in tqdm(loader, desc="check", unit="sample", disable=not sys.stderr.isatty()):
        if finding.problem is None:
            good.append(finding)
        else:
            tqdm.write(finding.problem, file=sys.stdout)
    return good


def describe(good: list[Finding]) -> Iterator[str]:
    """Lines about the good samples: counts, ranges, histograms of the lights, and what the pictures hold."""
    objects = len({finding.object_id for finding in good})
    yield f"objects: {objects} ({len(good) / objects:.1f} samples each)"
    for name in ("family", "track"):
        counts = Counter(getattr(finding.labels, name) for finding in good)
        if set(counts) != {None}:
            yield f"{name}: " + ", ".join(f"{value or 'none'} {count}" for value, count in counts.most_common())
    sizes = Counter(finding.picture_size for finding in good)
    yield "pixels: " + ", ".join(f"{width}x{height} {count}" for (height, width), count in sizes.most_common())
    for name, (limits, bins) in HISTOGRAMS.items():
        values = np.array([getattr(finding.labels, name) for finding in good])
        yield f"{name}: {values.min():g} to {values.max():g}, mean {values.mean():.4g}"
        counts, edges = np.histogram(values, bins, limits)
        for count, low, high in zip(counts, edges, edges[1:], strict=False):
            yield f"  {low:5g} - {high:<5g} {count:7} {'#' * round(BAR_WIDTH * count / counts.max())}"
    for name in ("mask_coverage", "shadow_coverage"):
        shares = np.array([getattr(finding, name) for finding in good])
        yield f"{name}: {shares.mean():.2%} of the picture ({shares.min():.2%} to {shares.max():.2%})"
    rms = np.array([finding.shadow_rms for finding in good])
    yield f"shadow_rms: {rms.mean():.4f} ({rms.min():.4f} to {rms.max():.4f})"
    flags = [finding.labels.clipped for finding in good if finding.labels.clipped is not None]
    if flags:
        yield f"clipped: {np.mean(flags):.2%} by the metadata"
    yield f"touches_border: {np.mean([finding.touches_border for finding in good]):.2%}"


def contact_sheet(findings: Findings, good: list[Finding], num_samples: int, image_size: int) -> Image.Image:
    """Object, mask, shadow and composite of samples from all over the data, a row each with the light beside it."""
    chosen = [good[i * len(good) // num_samples] for i in range(num_samples)] if len(good) > num_samples else good
    rows, labels = [], []
    for finding in chosen:
        sample = fit_sample(load_sample(findings.source, finding.row), image_size)
        pictures = [sample.object_image, sample.mask, sample.shadow, composite(sample)]
        rows.append([Image.fromarray(np.rint(picture * 255).astype(np.uint8)) for picture in pictures])
        light = finding.labels
        name = findings.source.stems[finding.row]
        labels.append(f"{name}  theta {light.theta:.0f}  phi {light.phi:.0f}  size {light.size:.1f}")
    return image_grid(rows, labels)


def composite(sample: Sample) -> np.ndarray:
    """The object on a light ground with its shadow, (H, W, 3) in [0, 1]."""
    mask = sample.mask[..., None]
    return mask * sample.object_image + (1 - mask) * GROUND * (1 - sample.shadow[..., None])
