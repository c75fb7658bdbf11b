"""The programs of test_zero.py: the shortcut command with NaN in it, and an adapter on a frozen bfloat16 base.

accelerate launch ... two_zero_ranks.py nan|adapter ARGUMENTS
"""

from __future__ import annotations

import sys

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from backlot.config import load_config
from trainers import train_shortcut
from trainers.common import TrainingRun, create_accelerator
from trainers.common.config import RunConfig


def spoil(arguments: list[str]) -> None:
    """The loss of the second process is not a number in the updates 2 and 4."""
    compute_loss = train_shortcut.compute_loss

    def compute(run, *rest):
        loss, metrics = compute_loss(run, *rest)
        spoilt = run.processes.rank == 1 and run.step in (1, 3)
        return loss * float("nan") if spoilt else loss, metrics

    train_shortcut.compute_loss = compute
    train_shortcut.main(arguments)


class Adapter(ModelMixin, ConfigMixin):
    """A bottleneck; two processes cannot share its weights equally."""

    config_name = "config.json"

    @register_to_config
    def __init__(self, width: int = 3):
        super().__init__()
        self.down, self.up = nn.Linear(5, width, bias=False), nn.Linear(width, 3)
        self.register_buffer("offset", torch.ones(3))

    def forward(self, rows):
        return self.up(self.down(rows)) + self.offset


class Adapted(ModelMixin, ConfigMixin):
    """A frozen base and an adapter beside it."""

    config_name = "config.json"

    def __init__(self):
        super().__init__()
        self.base = nn.Sequential(nn.Linear(5, 9), nn.SiLU(), nn.Linear(9, 3)).to(torch.bfloat16).requires_grad_(False)
        self.adapter = Adapter()

    def forward(self, rows):
        return self.base(rows) + self.adapter(rows)


class Rows(torch.utils.data.Dataset):
    """Ten rows, the first of which count for nothing."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, key) -> dict:
        values = torch.randn(5, generator=torch.Generator().manual_seed(int(key)))
        return {"rows": values, "weight": torch.tensor(float(int(key) % 4))}


def adapt(arguments: list[str]) -> None:
    """Updates that are means over weighted rows, unequally spread over processes and micro-batches."""
    config = load_config(RunConfig, arguments)
    accelerator = create_accelerator(config)
    torch.manual_seed(0)
    network = Adapted()
    run = TrainingRun(accelerator, config, model=network, dataset=Rows(), trained=network.adapter)
    run.resume()
    for batch in run.batches():
        with run.accumulate():
            error = (run.model(batch["rows"]) - batch["rows"][:, :3]).square().mean(1)
            run.update((error * batch["weight"]).sum(), weight=batch["weight"].sum())
    run.finish(network.adapter)


if __name__ == "__main__":
    {"nan": spoil, "adapter": adapt}[sys.argv[1]](sys.argv[2:])
