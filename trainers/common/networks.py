"""The networks of a run: put on the device whole or sharded, averaged, saved, loaded and exported."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from trainers.common.attention import configure_network
from trainers.common.config import TrainingConfig
from trainers.common.ema import EMA, SwappedEMA
from trainers.common.launch import Launch
from trainers.common.optimization import create_optimizer
from trainers.common.sharding import fill_skeleton, skeleton, state_tensors, whole
from trainers.common.state import checksum, frozen_tensors, load_optimizer, load_tensors, optimizer_state
from trainers.common.zero import Engine


class Networks:
    """Args:
        accelerator: from `create_accelerator`.
        training: what every run shares.
        model, trained, modules: as `TrainingRun` takes them.

    Attributes:
        model: prepared, to compute losses with. network: the same, bare. trained: the part of it that learns.
        ema: the average (None without `use_ema`). modules: further networks.
        optimizer: over what trains. zero: DeepSpeed's engine, where it runs.
        frozen: checksum of what does not train (None where all does).

    Raises:
        ValueError: a setting that does not go with the mode of the launch, or with this network.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        training: TrainingConfig,
        model: ModelMixin,
        trained: nn.Module | None,
        modules: dict[str, nn.Module],
    ):
        launch: Launch = accelerator.launch
        self.processes, self.precision = launch.processes, launch.precision
        self.is_sharded = launch.sharding is not None or launch.zero is not None
        self.is_cut_by_zero = launch.zero is not None and launch.zero.stage == 3
        if self.is_cut_by_zero and modules:
            raise ValueError(f"{', '.join(modules)}: further networks do not go with ZeRO-3; use ZeRO-2, DDP or FSDP2")
        device = accelerator.device
        if not launch.sharding:  # a sharded one goes there block by block
            model, modules = model.to(device), {name: module.to(device) for name, module in modules.items()}
        self.network = configure_network(model, training, self.precision.dtype, device)
        self.trained, self.modules = self.network if trained is None else trained, modules
        for _, tensor in frozen_tensors(self.network, self.trained):
            tensor.requires_grad_(False)  # else each would get a gradient that nobody uses
        self.frozen = None if trained is None else checksum(frozen_tensors(self.network, self.trained))
        self._skeleton = skeleton(self.trained) if self.is_sharded else None
        self.zero: Engine | None = None
        self.ema = self._average(training, launch, is_part=trained is not None)
        for network in (self.network, *([self.ema.model] if self.ema else []), *modules.values()):
            self.precision.prepare(network)
        if launch.sharding:
            self._shard(training, launch, is_part=trained is not None)
        elif not launch.zero:
            self.model = accelerator.prepare_model(self.network)
        if training.torch_compile:
            for network in (self.network, *([self.ema.model] if self.ema else []), *modules.values()):
                network.compile()
        self.optimizer = create_optimizer(self.trained, training)
        if launch.zero:
            self._start_zero(training, launch)
        self.model.train()

    def _average(self, training: TrainingConfig, launch: Launch, is_part: bool) -> EMA | None:
        """A copy that follows; none where the average has to take the place of the live weights instead."""
        # the average of a part shares the rest with the live network, and two sharded networks cannot share
        swapped = (launch.sharding is not None and is_part) or self.is_cut_by_zero
        return EMA(self.network, *self._averaging(training), self.trained) if training.use_ema and not swapped else None

    def _averaging(self, training: TrainingConfig) -> tuple:
        return training.ema_decay, training.ema_ramp, self.precision.autocast

    def _shard(self, training: TrainingConfig, launch: Launch, is_part: bool) -> None:
        copies = [] if self.ema is None else [self.ema.model]
        for network in (self.network, *copies, *self.modules.values()):
            launch.sharding.apply(network, self.precision, trains=network is self.network)
        if training.use_ema and is_part:
            self.ema = SwappedEMA(self.network, *self._averaging(training), self.trained)
        self.model = self.network

    def _start_zero(self, training: TrainingConfig, launch: Launch) -> None:
        self.zero = launch.zero.start(self.network, self.trained, self.optimizer, training)
        self.model = self.zero.model
        if training.use_ema and self.is_cut_by_zero:
            self.ema = self.zero.average(*self._averaging(training), self.network)

    @property
    def for_inference(self) -> ModelMixin:
        """The average, or the live weights without one."""
        return self.network if self.ema is None else self.ema.model

    def _names(self) -> dict[int, str]:
        return {id(parameter): name for name, parameter in self.trained.named_parameters()}

    def tensors(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict]]:
        """The state by part, and what of the optimiser's is not a tensor; called by all processes."""
        tensors = {name: dict(state_tensors(module)) for name, module in self.modules.items()}
        if self.zero is not None:
            averages = {} if self.ema is None else {"ema": self.zero.weights(self.ema)}
            return tensors | {"model": self.zero.weights()} | averages | {"optimizer": self.zero.moments()}, {}
        tensors["model"] = dict(state_tensors(self.trained))
        if self.ema is not None:
            tensors["ema"] = self.ema.tensors()
        tensors["optimizer"], values = optimizer_state(self.optimizer, self._names())
        return tensors, values

    def load(self, checkpoint: Path, optimizer_values: dict[str, dict]) -> None:
        """The reverse of `tensors`, from a verified checkpoint. Hyper-parameters stay the configuration's.

        Raises:
            ValueError: it is the state of other networks.
        """
        for name, module in self.modules.items():
            load_tensors(checkpoint, name, dict(state_tensors(module)))
        if self.zero is not None:
            self.zero.load(checkpoint, self.ema)
            return
        load_tensors(checkpoint, "model", dict(state_tensors(self.trained)))
        if self.ema is not None:
            load_tensors(checkpoint, "ema", self.ema.tensors())
        load_optimizer(checkpoint, self.optimizer, self._names(), optimizer_values)

    def with_whole_weights(self, pipeline: DiffusionPipeline | ModelMixin) -> DiffusionPipeline | ModelMixin:
        """The same with gathered weights in place of this process's shares; called by all processes.

        Raises:
            TypeError: the pipeline holds a sharded base, which cannot be saved.
        """
        if self.zero is None:
            tensors = dict(state_tensors(self.trained)) if self.ema is None else self.ema.tensors()
        else:
            tensors = self.zero.weights(self.ema)  # gathered already, where they are not nothing
        for name, tensor in tensors.items():
            full = whole(tensor)  # all processes take part, one tensor at a time
            if self.processes.is_main:
                fill_skeleton(self._skeleton, name, full.detach().cpu())
        if not isinstance(pipeline, DiffusionPipeline):
            return self._skeleton
        own = self.trained if self.ema is None else self.ema.part
        for name, part in pipeline.components.items():
            if part is own:
                pipeline.register_modules(**{name: self._skeleton})
            elif isinstance(part, FSDPModule) or (self.is_cut_by_zero and part is self.network):
                raise TypeError(f"the pipeline's {name} is a sharded base: finish with the part that trains")
        return pipeline

    def parameters(self) -> list[nn.Parameter]:
        """What the optimiser changes."""
        return [parameter for parameter in self.trained.parameters() if parameter.requires_grad]

    @property
    def is_gated(self) -> bool:
        """Whether the optimiser leaves an update out by itself where it is told to (fused AdamW)."""
        return isinstance(self.optimizer, torch.optim.AdamW)
