"""What `accelerate launch` asked for: obeyed, or refused by name. Nothing runs in another mode in silence."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import DistributedDataParallelKwargs, parse_flag_from_env

from backlot.command_line import EXIT_INPUT, leave
from trainers.common.config import RunConfig, TrainingConfig
from trainers.common.optimization import check_optimizer
from trainers.common.precision import DTYPES, Precision
from trainers.common.processes import Processes
from trainers.common.run_dir import RunFolder
from trainers.common.sharding import Sharding
from trainers.common.signals import StopSignal
from trainers.common.tracking import check_trackers
from trainers.common.zero import Zero, read_zero

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Launch:
    """What a run needs of its launch: the folder it owns, precision, sharding, and how its processes talk."""

    folder: RunFolder
    processes: Processes
    stop: StopSignal
    precision: Precision
    sharding: Sharding | None
    zero: Zero | None


def create_accelerator(config: RunConfig) -> Accelerator:
    """The accelerator of the launch configuration, with a `launch` for `TrainingRun`.

    Everything a key or the launch file needs is checked here, before anything is loaded or written.
    """
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    training = config.training
    try:
        request = read_request(os.environ, training)
        check_trackers(training.report_to)
    except ValueError as error:
        raise leave(EXIT_INPUT, f"refused: {error}") from error
    RunFolder.check(config)
    accelerator = start(request, training)
    try:
        check_optimizer(training, accelerator.device)  # now: a GPU of its own is chosen
    except ValueError as error:
        raise leave(EXIT_INPUT, f"refused: {error}") from error
    processes = Processes(accelerator)
    # So early that a signal during start-up is answered at the first update.
    stop = StopSignal(processes)
    folder = RunFolder(config, processes)
    precision = Precision(request.mixed_precision, accelerator.device)
    accelerator.launch = Launch(folder, processes, stop, precision, request.sharding, request.zero)
    return accelerator


@dataclass(frozen=True)
class Request:
    """The environment that `accelerate launch` makes of its configuration, read once."""

    num_processes: int
    mixed_precision: str
    sharding: Sharding | None
    zero: Zero | None = None


def read_request(environment: Mapping[str, str], training: TrainingConfig) -> Request:
    """What the launcher asks for in its environment variables.

    Raises:
        ValueError: something that is not supported, or that a key of the run says otherwise; the text names it.
    """

    def asked(name: str) -> str:
        value = environment.get(name, "").strip()
        return "" if value.lower() in ("", "no", "none", "false", "0") else value

    for name, (what, instead) in REFUSED.items():
        if asked(name):
            raise ValueError(f"the launch configuration asks for {what} ({name}={environment[name]}): {instead}")
    steps = asked("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    if steps not in ("", "1", str(training.gradient_accumulation_steps)):
        raise ValueError(
            f"the launch configuration sets gradient_accumulation_steps {steps}, the run "
            f"{training.gradient_accumulation_steps}: leave it out of the launch configuration"
        )
    launched = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched not in DTYPES:
        raise ValueError(f"mixed precision {launched} is not supported: use one of {', '.join(DTYPES)}")
    precision = training.mixed_precision or launched
    processes = int(environment.get("WORLD_SIZE", 1))
    expected = training.expected_processes or processes
    if processes != expected:
        raise ValueError(f"training.expected_processes is {expected}, the launch configuration starts {processes}")
    sharding = read_sharding(environment) if asked("ACCELERATE_USE_FSDP") else None
    zero = read_zero(environment, training, precision) if asked("ACCELERATE_USE_DEEPSPEED") else None
    for name, cut in {"FSDP": sharding, "DeepSpeed": zero}.items():
        if cut is not None and processes < 2:
            raise ValueError(
                f"{name} needs at least two processes: choose a launch configuration of one process without it"
            )
    return Request(processes, precision, sharding, zero)


REFUSED = {
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "use DDP or FSDP2"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("a parallelism_config", "use DDP or FSDP2"),
    "ACCELERATE_DYNAMO_BACKEND": ("torch.compile (dynamo_backend)", "set training.torch_compile instead"),
    "ACCELERATE_DOWNCAST_BF16": ("downcast_bf16", "it is for TPUs"),
    "ACCELERATE_USE_TPU": ("a TPU", "use GPUs or CPUs"),
}
BOTH = ("true", "false")
# None: any value, it changes nothing here. Shares are saved as they lie, and every process reads its own.
FSDP_KEYS: dict[str, tuple[str, ...] | None] = {
    "version": ("2",),
    "reshard_after_forward": BOTH,
    "offload_params": ("false",),
    "auto_wrap_policy": ("transformer_based_wrap",),
    "transformer_cls_to_wrap": None,
    "sharding_strategy": ("full_shard", "1"),
    "activation_checkpointing": ("false",),
    "activation_checkpointing_offload": ("false",),
    "state_dict_type": None,
    "sync_module_states": None,
    "cpu_ram_efficient_loading": None,
    "use_orig_params": None,
    "forward_prefetch": ("false",),
    "backward_prefetch": None,
    "min_num_params": None,
}
INSTEAD = {
    "offload_params": "it has not been run on a GPU; take more GPUs, gradient checkpointing or 8-bit Adam",
    "version": "set fsdp_version: 2",
    "activation_checkpointing": "set training.gradient_checkpointing instead",
}


def read_sharding(environment: Mapping[str, str]) -> Sharding:
    """The FSDP section of a launch configuration.

    Raises:
        ValueError: version 1, or a key that is not obeyed.
    """
    given = {name.lower(): value for name, value in environment.items() if name.startswith("FSDP_")}
    keys = {"fsdp_version": "1"} | given
    for name, value in sorted(keys.items()):
        short = name.removeprefix("fsdp_")
        if short not in FSDP_KEYS:
            raise ValueError(f"{name} is not supported: leave it out of the launch configuration")
        allowed = FSDP_KEYS[short]
        if allowed is not None and value.lower() not in allowed:
            instead = INSTEAD.get(short, f"only {' or '.join(allowed)} is supported")
            raise ValueError(f"the launch configuration asks for {name} {value}: {instead}")
    blocks = tuple(name.strip() for name in keys.get("fsdp_transformer_cls_to_wrap", "").split(",") if name.strip())
    return Sharding(blocks, keys.get("fsdp_reshard_after_forward", "").lower() != "false")


def start(request: Request, training: TrainingConfig) -> Accelerator:
    """Accelerate itself: devices, processes and DDP. Precision and sharding are ours (trainers/common), so that CPU and
    GPU take the same path."""
    # Several processes on a machine without GPUs: Accelerate would run as many strangers to one another.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or (
        request.num_processes > 1 and not torch.accelerator.is_available()
    )
    # It would wrap networks itself on a GPU, and train DDP in silence on a CPU.
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        os.environ.pop(name, None)
    accelerator = Accelerator(
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        mixed_precision="no",
        cpu=on_cpu,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    if accelerator.num_processes != request.num_processes:
        raise leave(
            EXIT_INPUT,
            f"refused: {request.num_processes} processes were asked for, Accelerate runs {accelerator.num_processes}",
        )
    if accelerator.distributed_type not in SUPPORTED:
        raise leave(
            EXIT_INPUT, f"refused: {accelerator.distributed_type} is not supported: use one process, DDP, FSDP2 or ZeRO"
        )
    return accelerator
