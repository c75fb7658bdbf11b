"""What `accelerate launch` asked for: obeyed, or refused by name. Nothing runs in another mode in silence."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import DistributedDataParallelKwargs

from backlot.command_line import EXIT_INPUT, leave
from trainers.common.config import RunConfig, TrainingConfig
from trainers.common.optimization import check_optimizer
from trainers.common.precision import DTYPES, Precision
from trainers.common.processes import Processes
from trainers.common.run_dir import RunFolder
from trainers.common.sharding import Sharding
from trainers.common.signals import StopSignal, follow_launcher
from trainers.common.tracking import check_trackers

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


def create_accelerator(config: RunConfig) -> Accelerator:
    """The accelerator of the launch configuration, with a `launch` for `TrainingRun`.

    Everything a key or the launch file needs is checked here, before anything is loaded or written.
    """
    follow_launcher()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    training = config.training
    try:
        request = read_request(os.environ, training)
        check_trackers(training.report_to)
        check_optimizer(training)
    except ValueError as error:
        raise leave(EXIT_INPUT, f"refused: {error}") from error
    RunFolder.check(config)
    accelerator = start(request, training)
    processes = Processes(accelerator)
    # So early that a signal during start-up is answered at the first update.
    stop = StopSignal(processes)
    folder = RunFolder(config, processes)
    precision = Precision(request.mixed_precision, accelerator.device)
    accelerator.launch = Launch(folder, processes, stop, precision, request.sharding)
    return accelerator


@dataclass(frozen=True)
class Request:
    """The environment that `accelerate launch` makes of its configuration, read once."""

    num_processes: int
    mixed_precision: str
    sharding: Sharding | None


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
    if steps and int(steps) not in (1, training.gradient_accumulation_steps):
        raise ValueError(
            f"the launch configuration sets gradient_accumulation_steps {steps}, the run "
            f"{training.gradient_accumulation_steps}: leave it out of the launch configuration"
        )
    launched = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    precision = training.mixed_precision or launched
    if precision not in DTYPES:
        raise ValueError(f"mixed precision {precision} is not supported: use one of {', '.join(DTYPES)}")
    processes = int(environment.get("WORLD_SIZE", 1))
    expected = training.expected_processes or processes
    if processes != expected:
        raise ValueError(f"training.expected_processes is {expected}, the launch configuration starts {processes}")
    sharding = read_sharding(environment) if asked("ACCELERATE_USE_FSDP") else None
    if sharding is not None and processes < 2:
        raise ValueError("FSDP needs at least two processes: choose a launch configuration of one process without it")
    return Request(processes, precision, sharding)


REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", "use one of the fsdp2 presets"),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "use DDP or FSDP2"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("a parallelism_config", "use DDP or FSDP2"),
    "ACCELERATE_DYNAMO_BACKEND": ("torch.compile (dynamo_backend)", "set training.torch_compile instead"),
    "ACCELERATE_DOWNCAST_BF16": ("downcast_bf16", "it is for TPUs"),
    "ACCELERATE_USE_TPU": ("a TPU", "use GPUs or CPUs"),
}
FSDP_OBEYED = {"FSDP_VERSION", "FSDP_RESHARD_AFTER_FORWARD", "FSDP_OFFLOAD_PARAMS", "FSDP_TRANSFORMER_CLS_TO_WRAP"}
# whatever they say, it is what happens: shares are saved as they lie, and every rank loads by itself
FSDP_MEANINGLESS = {
    "FSDP_STATE_DICT_TYPE",
    "FSDP_SYNC_MODULE_STATES",
    "FSDP_CPU_RAM_EFFICIENT_LOADING",
    "FSDP_USE_ORIG_PARAMS",
    "FSDP_FORWARD_PREFETCH",
    "FSDP_BACKWARD_PREFETCH",
}


def read_sharding(environment: Mapping[str, str]) -> Sharding:
    """The FSDP section of a launch configuration.

    Raises:
        ValueError: version 1, or a key that is not obeyed.
    """
    keys = {name: value for name, value in environment.items() if name.startswith("FSDP_")}
    if keys.get("FSDP_VERSION", "1") != "2":
        raise ValueError("the launch configuration asks for FSDP 1: set fsdp_version: 2")
    if keys.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP") != "TRANSFORMER_BASED_WRAP":
        raise ValueError(
            f"fsdp_auto_wrap_policy {keys['FSDP_AUTO_WRAP_POLICY']}: only TRANSFORMER_BASED_WRAP is supported"
        )
    if keys.get("FSDP_ACTIVATION_CHECKPOINTING", "false").lower() == "true":
        raise ValueError("fsdp_activation_checkpointing: set training.gradient_checkpointing instead")
    unknown = sorted(
        keys.keys() - FSDP_OBEYED - FSDP_MEANINGLESS - {"FSDP_AUTO_WRAP_POLICY", "FSDP_ACTIVATION_CHECKPOINTING"}
    )
    if unknown:
        raise ValueError(f"{unknown[0].lower()} is not supported: leave it out of the launch configuration")
    reshard = keys.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()
    if reshard not in ("true", "false"):
        raise ValueError(f"fsdp_reshard_after_forward {reshard}: FSDP2 takes true or false")
    blocks = tuple(name.strip() for name in keys.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(",") if name.strip())
    return Sharding(blocks, reshard == "true", keys.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true")


def start(request: Request, training: TrainingConfig) -> Accelerator:
    """Accelerate itself: devices, processes and DDP. Precision and sharding are ours (trainers/common), so that CPU and
    GPU take the same path."""
    # It would wrap networks itself on a GPU, and train DDP in silence on a CPU.
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    # Several processes on a machine without GPUs: Accelerate would run as many strangers to one another.
    on_cpu = request.num_processes > 1 and not torch.accelerator.is_available()
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
            EXIT_INPUT, f"refused: {accelerator.distributed_type} is not supported: use one process, DDP or FSDP2"
        )
    return accelerator
