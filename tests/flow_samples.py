"""Samples for tests of a run: small pictures with a noise and a time of their own."""

from __future__ import annotations

import torch


class Flows(torch.utils.data.Dataset):
    """Samples with a noise, a time and an index of their own."""

    def __init__(self, size: int = 24):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(int(key))
        return {
            "index": torch.tensor(int(key)),
            "class_labels": torch.tensor(int(key) % 10),
            "pixel_values": torch.randn(1, 8, 8, generator=generator),
            "noise": torch.randn(1, 8, 8, generator=generator),
            "t": torch.rand((), generator=generator),
        }
