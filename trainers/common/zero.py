"""DeepSpeed's ZeRO-2 and ZeRO-3 (arXiv 1910.02054): moments, gradients and (3) weights cut over the processes.

Its engine reduces, clips and steps; precision, schedule, data, checkpoints and averages stay ours. Whatever is cut is
gathered for a checkpoint, which is the ordinary one: any number of processes continues it, also with DDP or FSDP2.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from trainers.common.config import TrainingConfig
from trainers.common.ema import EMA, SwappedEMA
from trainers.common.sharding import state_tensors
from trainers.common.state import Part

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 50_000_000
"""Elements that are reduced or gathered at once: 200 MB, of which DeepSpeed holds one or two."""
OFF = ("", "none", "no", "false", "0")
# Of the section `zero_optimization`; they change speed and memory, not results.
TUNING = frozenset(
    [
        "contiguous_gradients",
        "reduce_scatter",
        "reduce_bucket_size",
        "allgather_partitions",
        "allgather_bucket_size",
        "overlap_comm",
        "sub_group_size",
        "stage3_prefetch_bucket_size",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
    ]
)
# Only about what DeepSpeed itself would print or write, which it never does here.
WITHOUT_MEANING = frozenset(["steps_per_print", "stage3_gather_16bit_weights_on_model_save"])
INSTEAD = {
    "bf16": "set mixed_precision",
    "fp16": "set mixed_precision: bf16",
    "torch_autocast": "set mixed_precision",
    "optimizer": "the training section sets the optimiser",
    "scheduler": "set training.lr_scheduler",
    "offload_optimizer": "use FSDP2 with fsdp_offload_params",
    "offload_param": "use FSDP2 with fsdp_offload_params",
    "activation_checkpointing": "set training.gradient_checkpointing",
}


# ---- what the launch configuration asks for ----


@dataclass(frozen=True)
class Zero:
    """What the launch configuration asks for."""

    stage: int
    """2: moments and gradients are cut; 3: weights too."""
    tuning: dict[str, object] = field(default_factory=dict)
    """Bucket sizes and the like (`TUNING`)."""

    def start(self, network: nn.Module, trained: nn.Module, optimizer: Optimizer, training: TrainingConfig) -> Engine:
        """Cut `network` and its optimiser in place. Arguments as `Engine`."""
        return Engine(self, network, trained, optimizer, training)


def read_zero(environment: Mapping[str, str], training: TrainingConfig, precision: str) -> Zero:
    """The DeepSpeed section of a launch configuration, or the JSON file it names.

    Raises:
        ValueError: something in it, or in the run's configuration, does not go with ZeRO; the text names it.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError("the launch configuration asks for DeepSpeed: pip install 'backlot[deepspeed]'")
    if precision == "fp16":
        raise ValueError("ZeRO does not go with mixed precision fp16: use bf16")
    for key in ("use_8bit_adam", "torch_compile"):
        if getattr(training, key):
            raise ValueError(f"training.{key} does not go with ZeRO: leave it out, or use DDP or FSDP2")

    def asked(name: str) -> str:
        value = environment.get(f"ACCELERATE_{name}", "").strip()
        return "" if value.lower() in OFF else value

    for name in ("OFFLOAD_OPTIMIZER_DEVICE", "OFFLOAD_PARAM_DEVICE", "ZERO3_INIT", "MOE_LAYER_CLS_NAMES"):
        if asked(f"DEEPSPEED_{name}"):
            value = asked(f"DEEPSPEED_{name}")
            instead = INSTEAD["offload_param"] if name.startswith("OFFLOAD") else "leave it out"
            raise ValueError(f"the launch configuration asks for {name.lower()} {value}: {instead}")
    file = asked("DEEPSPEED_CONFIG_FILE")
    given = _read_file(Path(file)) if file else {"zero_optimization": {"stage": asked("DEEPSPEED_ZERO_STAGE") or "2"}}
    if asked("GRADIENT_CLIPPING"):
        given["gradient_clipping"] = float(asked("GRADIENT_CLIPPING"))
    return _check(given, training, int(environment.get("WORLD_SIZE", 1)))


def _read_file(path: Path) -> dict:
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"the DeepSpeed configuration {path} cannot be read: {error}") from error
    if not isinstance(given, dict) or not isinstance(given.get("zero_optimization"), dict):
        raise ValueError(f"the DeepSpeed configuration {path} has no section zero_optimization")
    return given


def _check(given: dict, training: TrainingConfig, processes: int) -> Zero:
    """Only what has an effect here, and contradicts nothing of ours."""
    section = given["zero_optimization"]
    ours = _numbers(training) | {
        "train_batch_size": training.train_batch_size * training.gradient_accumulation_steps * processes
    }
    for key, value in (given | section).items():
        enabled = value.get("enabled", value.get("device", True)) if isinstance(value, dict) else value
        if key in (*TUNING, *WITHOUT_MEANING, "zero_optimization", "stage") or enabled in (None, False, "none", "auto"):
            continue
        if key not in ours:
            raise ValueError(f"DeepSpeed's {key} is not supported: {INSTEAD.get(key, 'leave it out')}")
        if value != ours[key]:
            raise ValueError(f"DeepSpeed's {key} is {value}, the run's {ours[key]}: leave it out")
    if str(section.get("stage")) not in ("2", "3"):
        raise ValueError(f"ZeRO stage {section.get('stage')} is not supported: use 2 or 3, or DDP without DeepSpeed")
    return Zero(int(section["stage"]), {k: v for k, v in section.items() if k in TUNING and v != "auto"})


def _numbers(training: TrainingConfig) -> dict[str, float]:
    return {
        "train_micro_batch_size_per_gpu": training.train_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "gradient_clipping": training.max_grad_norm or 0.0,
    }


# ---- the engine ----


class Place(NamedTuple):
    """Where a tensor is: itself, or with a `shape` this process's share of it (flat, all shares of one length)."""

    tensor: Tensor
    shape: torch.Size | None = None

    def whole(self) -> Tensor:
        """The tensor, gathered where it is cut (then all processes have to call)."""
        if self.shape is None:
            return self.tensor.detach()
        count = torch.distributed.get_world_size()
        flat = torch.empty(count * self.tensor.numel(), dtype=self.tensor.dtype, device=self.tensor.device)
        torch.distributed.all_gather(list(flat.chunk(count)), self.tensor.detach().contiguous())
        return flat[: self.shape.numel()].view(self.shape)

    @torch.no_grad()
    def fill(self, values: Tensor) -> None:
        """Take this process's share of the whole tensor `values`.

        Raises:
            ValueError: it has another shape.
        """
        shape = self.tensor.shape if self.shape is None else self.shape
        if values.shape != shape:
            raise ValueError(f"the shape {tuple(values.shape)}, not {tuple(shape)}")
        self.tensor.copy_(values if self.shape is None else share_of(values, self.tensor.numel()))


def share_of(values: Tensor, length: int) -> Tensor:
    """This process's `length` elements of the flattened `values`, with zeros where they end earlier."""
    first = torch.distributed.get_rank() * length
    share = values.reshape(-1)[first : first + length]
    return nn.functional.pad(share, (0, length - len(share)))


class Engine:
    """DeepSpeed's engine around one network, and its state as whole tensors.

    Args:
        zero: what is asked for.
        network: computes the loss; it is on the device. trained: the part of it that learns.
        optimizer: AdamW over the trained part; DeepSpeed replaces its parameters by flat shares.
        training: the run's configuration.

    Attributes:
        model: the engine, to compute losses with.

    Raises:
        ValueError: weights that DeepSpeed cannot cut.
    """

    def __init__(
        self, zero: Zero, network: nn.Module, trained: nn.Module, optimizer: Optimizer, training: TrainingConfig
    ):
        _check_weights(network)
        self.stage, self.trained, self._optimizer = zero.stage, trained, optimizer
        device = next(network.parameters()).device
        self._api = deepspeed = load_deepspeed(device)
        buckets = {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
        # Parameters that stay whole between updates would not follow the averages when these take their place.
        section = buckets | zero.tuning | {"stage": zero.stage, "stage3_param_persistence_threshold": 0}
        config = _numbers(training) | {"zero_optimization": section}
        self.model, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=config)
        self._parameters = {name: p for name, p in trained.named_parameters() if p.requires_grad}
        self._create_moments()

    def _create_moments(self) -> None:
        """Moments of no update, as AdamW itself would make them at the first one, and known by parameter."""
        zero = self.model.optimizer
        for flat in zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups:
            state = {"step": torch.zeros((), dtype=torch.float32, device=flat.device)}
            self._optimizer.state[flat] = state | {key: torch.zeros_like(flat) for key in MOMENTS}
        if self.stage == 2:  # at the first update it would find those of the first group alone
            zero._lazy_init_hp_params_optimizer_state()

    def average(
        self, decay: float, ramp: bool, autocast: Callable[[], AbstractContextManager], network: nn.Module
    ) -> ZeroEMA:
        """The average of what trains, cut as the weights of stage 3 are. Arguments as `EMA`."""
        return ZeroEMA(self, network, decay, ramp, autocast)

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss, scale_wrt_gas=False)

    def step(self, divisor: Tensor | None = None) -> Tensor:
        """Divide gradients by `divisor` (1 by default), clip and step, unless the norm is not finite.

        Returns:
            The norm before clipping, over all processes; infinite where it is not finite. Synchronises.
        """
        scaler = self.model.optimizer
        if divisor is not None:
            scaler.override_loss_scale(float(divisor))
        self.model.step()
        if divisor is not None:
            scaler.override_loss_scale(1.0)
        return torch.as_tensor(self.model.get_global_grad_norm(), dtype=torch.float32, device=self.model.device)

    # ---- weights, averages and moments, whole ----

    def places(self) -> dict[str, Place]:
        """The weights and buffers of what trains."""
        return {name: self.place(tensor) for name, tensor in state_tensors(self.trained)}

    def place(self, tensor: Tensor) -> Place:
        if self.stage == 3 and isinstance(tensor, nn.Parameter):
            return Place(tensor.ds_tensor, tensor.ds_shape)
        return Place(tensor)

    def weights(self, ema: EMA | None = None) -> dict[str, Tensor]:
        """Weights, or averages, whole and in host memory of the main process; nothing on the others, but all call."""
        return _gathered((name, place.whole) for name, place in self._places_of(ema).items())

    def moments(self) -> dict[str, Tensor]:
        """AdamW's state by `<parameter>/<key>`, as `weights`."""
        read, step = self._api.utils.safe_get_full_optimizer_state, next(iter(self._optimizer.state.values()))["step"]
        state = {f"{name}/step": step.clone for name in self._parameters}
        for key in MOMENTS:
            state |= {f"{name}/{key}": _Call(read, p, key) for name, p in self._parameters.items()}
        return _gathered(state.items())

    def load(self, folder: Path, ema: EMA | None) -> None:
        """Weights, averages and moments from a checkpoint, whatever wrote it; called by all processes.

        Raises:
            ValueError: it is the state of other parameters.
        """
        self.release()
        _load(folder, "model", self.places())
        self.model.optimizer.refresh_fp32_params()
        if ema is not None:
            _load(folder, "ema", self._places_of(ema))
        with Part(folder, "optimizer") as part:
            if part.names():
                self._load_moments(part)

    def release(self) -> None:
        """Give back weights that stage 3 has gathered: their shares are about to change."""
        if self.stage == 3:
            self.model.optimizer.empty_partition_cache()

    def _places_of(self, ema: EMA | None) -> dict[str, Place]:
        if ema is None:
            return self.places()
        return {name: Place(tensor, self.places()[name].shape) for name, tensor in ema.tensors().items()}

    def _load_moments(self, part: Part) -> None:
        missing = {f"{name}/{key}" for name in self._parameters for key in ("step", *MOMENTS)} ^ part.names()
        if missing:
            raise ValueError(f"{part.folder} holds the optimiser's state of other parameters: {min(missing)}")
        steps = {float(part.read(f"{name}/step")) for name in self._parameters}
        if len(steps) > 1:
            raise ValueError(f"{part.folder} has parameters with different numbers of updates, which ZeRO cannot have")
        for state in self._optimizer.state.values():
            state["step"].fill_(*steps)
        for name, parameter in self._parameters.items():
            for key in MOMENTS:
                self._set_moment(parameter, key, part.read(f"{name}/{key}"))

    def _set_moment(self, parameter: nn.Parameter, key: str, values: Tensor) -> None:
        # stage 3's function for whole tensors fails where the processes' shares are not equal
        if self.stage == 3:
            share = share_of(values.to(self.model.device), parameter.ds_tensor.numel())
            self._api.utils.safe_set_local_optimizer_state(parameter, share, key)
        else:
            self._api.utils.safe_set_full_optimizer_state(parameter, values.to(self.model.device), key)


class _Call(NamedTuple):
    function: Callable[[nn.Parameter, str], Tensor]
    parameter: nn.Parameter
    key: str

    def __call__(self) -> Tensor:
        return self.function(self.parameter, self.key)


def _gathered(tensors: Iterator[tuple[str, Callable[[], Tensor]]]) -> dict[str, Tensor]:
    """One tensor at a time, by all processes; kept by the main one."""
    is_main, kept = torch.distributed.get_rank() == 0, {}
    for name, whole in tensors:
        tensor = whole()
        if is_main:
            kept[name] = tensor.detach().cpu()
    return kept


def _load(folder: Path, part: str, places: Mapping[str, Place]) -> None:
    with Part(folder, part) as stored:
        for name in sorted(places.keys() ^ stored.names()):
            raise ValueError(f"{part} of {folder} is of another network: {name}")
        for name, place in places.items():
            try:
                place.fill(stored.read(name))
            except ValueError as error:
                raise ValueError(f"{part} {name!r} has {error}") from error


def _check_weights(network: nn.Module) -> None:
    for name, parameter in network.named_parameters():
        if is_traceable_wrapper_subclass(parameter) or not parameter.is_floating_point() or parameter.itemsize == 1:
            raise ValueError(f"ZeRO does not go with quantised weights ({name}): use DDP")
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise ValueError(f"{name} trains in {parameter.dtype}: ZeRO trains float32 weights")


def load_deepspeed(device: torch.device):
    """The package, quiet, on the device that the run has."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # it still calls torch's collectives by their old names, and torch says so at every call
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Shared memory between processes on a CPU: it would be compiled here and now, and gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class ZeroEMA(SwappedEMA):
    """The average under stage 3: each process averages its share, and the averages take the place of the live weights
    while it is called.

    Args:
        engine: the network's. Others as `EMA`.
    """

    def __init__(
        self,
        engine: Engine,
        network: nn.Module,
        decay: float,
        ramp: bool,
        autocast: Callable[[], AbstractContextManager],
    ):
        super().__init__(network, decay, ramp, autocast, engine.trained)
        self._engine = engine
        self._averages = {name: place.tensor.detach().clone() for name, place in engine.places().items()}

    @torch.no_grad()
    def update(self, trained: nn.Module, step: int) -> None:
        """Follow the part that trains after update `step` (counted from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.ramp else self.decay
        torch._foreach_lerp_(self._weights(), self._shares(), 1 - decay)
        for mine, theirs in zip(self._buffers(), trained.buffers(), strict=True):
            mine.copy_(theirs)

    def _shares(self) -> list[Tensor]:
        return [parameter.ds_tensor for parameter in self.part.parameters()]

    def _swap(self) -> None:
        self._engine.release()
        for mine, theirs in zip(self._weights(), self._shares(), strict=True):
            kept = theirs.data.clone()
            theirs.data.copy_(mine)
            mine.copy_(kept)
