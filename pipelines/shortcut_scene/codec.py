"""What a scene looks like to the network: shape latents and poses, standardised.

A sample is a dict of arrays [..., tokens, channels], one entry per modality. An object's point p lies in the scene at
R (s p) + t: `scale` is log s, `translation` is t, `6drotation_normalized` the first two columns of R.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor

from backlot.modalities import MODALITIES as MODALITIES

MIN_STD = 1e-3  # a constant channel, e.g. the height of a yaw's axis, would otherwise turn rounding into signal
# SAM 3D Objects standardises 6D rotations by these and nothing else.
SAM3D_MEAN = (-0.06366085, 0.00843822, 0.00017085, 0.00071266, -0.00309167, 0.51660938)
SAM3D_STD = (0.66569720, 0.67870123, 0.30345011, 0.43945044, 0.39817974, 0.61762869)


def rotation_6d(matrix: Tensor) -> Tensor:
    """The first two columns of rotations (..., 3, 3), one after the other: (..., 6). Zhou et al., arXiv 1812.07035.

    PyTorch3D's function of that name takes rows: its result is this one's of the transposed matrix.
    """
    return matrix[..., :2].transpose(-1, -2).reshape(*matrix.shape[:-2], 6)


def rotation_matrix(six: Tensor) -> Tensor:
    """Rotations (..., 3, 3) of 6D representations (..., 6) by Gram-Schmidt; parallel halves give no rotation."""
    first = torch.nn.functional.normalize(six[..., :3], dim=-1)
    second = six[..., 3:] - (first * six[..., 3:]).sum(-1, keepdim=True) * first
    second = torch.nn.functional.normalize(second, dim=-1)
    return torch.stack([first, second, torch.linalg.cross(first, second)], dim=-1)


def opencv_from_pytorch3d(rotation: Tensor, translation: Tensor) -> tuple[Tensor, Tensor]:
    """Poses (..., 3, 3), (..., 3) from PyTorch3D's camera (x left, y up) to OpenCV's (x right, y down), and back."""
    flip = torch.tensor([-1.0, -1.0, 1.0], dtype=rotation.dtype, device=rotation.device)
    return flip[:, None] * rotation, flip * translation


# SchedulerMixin: the one kind of pipeline component that is its configuration alone.
class PoseCodec(SchedulerMixin, ConfigMixin):
    """Standardises each channel of a scene's modalities, (x - mean) / std; kept as stats.json beside the model.

    Args:
        mode: `zscore` by the given statistics; `sam3d` only the rotation, by the published constants; `identity`.
        mean, std: for each modality one number per channel (`zscore`).
        isotropic_scale: objects have one size; the three of a prediction are averaged.
    """

    config_name = "stats.json"

    @register_to_config
    def __init__(
        self,
        mode: str = "identity",
        mean: dict[str, list[float]] | None = None,
        std: dict[str, list[float]] | None = None,
        isotropic_scale: bool = False,
    ):
        if mode not in ("zscore", "sam3d", "identity"):
            raise ValueError(f"`mode` must be zscore, sam3d or identity, not {mode}")
        if (mode == "zscore") != bool(mean and std):
            raise ValueError("`mean` and `std` are what the zscore codec consists of, and only that")
        if mode == "sam3d":
            mean, std = {"6drotation_normalized": SAM3D_MEAN}, {"6drotation_normalized": SAM3D_STD}
        self.mean = {name: torch.tensor(values) for name, values in (mean or {}).items()}
        self.std = {name: torch.tensor(values) for name, values in (std or {}).items()}

    @classmethod
    def fit(cls, samples: Iterable[dict[str, Tensor]], isotropic_scale: bool = False) -> PoseCodec:
        """A `zscore` codec of raw samples [objects, tokens, channels], in one pass; std is at least 1e-3."""
        count: dict[str, int] = {}
        total: dict[str, Tensor] = {}
        squares: dict[str, Tensor] = {}
        for sample in samples:
            for name, values in sample.items():
                rows = values.reshape(-1, values.shape[-1]).double()
                count[name] = count.get(name, 0) + len(rows)
                total[name] = total.get(name, 0) + rows.sum(0)
                squares[name] = squares.get(name, 0) + rows.square().sum(0)
        if not count:
            raise ValueError("no samples to fit the codec to")
        mean = {name: total[name] / count[name] for name in sorted(count)}
        std = {name: (squares[name] / count[name] - mean[name].square()).clamp(min=0).sqrt() for name in mean}
        return cls(
            "zscore",
            {name: values.tolist() for name, values in mean.items()},
            {name: values.clamp(min=MIN_STD).tolist() for name, values in std.items()},
            isotropic_scale,
        )

    def encode(self, sample: dict[str, Tensor]) -> dict[str, Tensor]:
        """Raw modalities (..., tokens, channels) -> what the network sees."""
        return {name: self._standardise(name, values) for name, values in sample.items()}

    def decode(self, sample: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `encode`, and one size per object where `isotropic_scale` says so."""
        raw = {
            name: values * self.std[name].to(values) + self.mean[name].to(values) if name in self.mean else values
            for name, values in sample.items()
        }
        if self.config.isotropic_scale and "scale" in raw:
            # of the sizes, not of their logarithms: SAM 3D Objects averages after exp
            raw["scale"] = raw["scale"].exp().mean(-1, keepdim=True).log().expand_as(raw["scale"])
        return raw

    def translation_statistics(self) -> dict[str, list[float]]:
        """What translations are standardised by, as settings of SceneShortcutTransformer."""
        given = ("translation_mean", self.mean, 0.0), ("translation_std", self.std, 1.0)
        return {
            key: values["translation"].tolist() if "translation" in values else [neutral] * 3
            for key, values, neutral in given
        }

    def _standardise(self, name: str, values: Tensor) -> Tensor:
        if name not in self.mean:
            if self.config.mode == "zscore":
                raise ValueError(f"the codec has no statistics of {name}; it knows {sorted(self.mean)}")
            return values
        mean, std = self.mean[name].to(values), self.std[name].to(values)
        if values.shape[-1] != len(mean):
            raise ValueError(f"{name} has {values.shape[-1]} channels, the codec's statistics {len(mean)}")
        return (values - mean) / std
