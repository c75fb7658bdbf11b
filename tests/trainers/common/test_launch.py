"""What `accelerate launch` makes of its files, and what a run makes of that: obeyed, or refused by name."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import runs
import torch
import yaml
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)

from trainers.common.config import TrainingConfig
from trainers.common.launch import Request, read_request
from trainers.common.sharding import Sharding

PLAIN = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "num_processes": 2, "use_cpu": False}
DDP = PLAIN | {"distributed_type": "MULTI_GPU", "gpu_ids": "all"}
ONE = PLAIN | {"distributed_type": "NO", "num_processes": 1, "use_cpu": True}
FSDP = PLAIN | {"distributed_type": "FSDP", "mixed_precision": "bf16"}
DEEPSPEED = PLAIN | {"distributed_type": "DEEPSPEED"}
WRAP = {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}


def environment_of(folder, file: dict, *arguments: str) -> dict[str, str]:
    """The environment of a process that `accelerate launch` starts, made by Accelerate itself."""
    path = folder / "launch.yaml"
    path.write_text(yaml.safe_dump(file))
    parser = launch_command_parser()
    given = ["--main_process_port", "0", "--config_file", str(path), *arguments, "train.py"]
    args, _, _ = _validate_launch_command(parser.parse_args(given))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""
        _, made = prepare_deepspeed_cmd_env(args)
    elif args.use_fsdp or args.use_megatron_lm or args.multi_gpu:
        made = prepare_multi_gpu_env(args)
    else:
        _, made = prepare_simple_launcher_cmd_env(args)
    return made | ({"WORLD_SIZE": str(args.num_processes)} if args.num_processes > 1 else {})


def training(**values) -> TrainingConfig:
    return TrainingConfig(**{"output_dir": "run", "max_train_steps": 1, "train_batch_size": 1} | values)


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (ONE, Request(1, "no", None)),
        (DDP | {"mixed_precision": "fp16"}, Request(2, "fp16", None)),
        (FSDP | {"fsdp_config": WRAP}, Request(2, "bf16", Sharding((), True))),
        (
            FSDP | {"fsdp_config": WRAP | {"fsdp_reshard_after_forward": False}},
            Request(2, "bf16", Sharding((), False)),
        ),
        (
            FSDP | {"fsdp_config": WRAP | {"fsdp_transformer_layer_cls_to_wrap": "DiTBlock, SceneBlock"}},
            Request(2, "bf16", Sharding(("DiTBlock", "SceneBlock"), True)),
        ),
        (
            FSDP | {"fsdp_config": WRAP | {"fsdp_state_dict_type": "FULL_STATE_DICT", "fsdp_use_orig_params": False}},
            Request(2, "bf16", Sharding((), True)),
        ),
    ],
)
def test_what_a_launch_file_asks_for_is_read(tmp_path, file, expected):
    assert read_request(environment_of(tmp_path, file), training()) == expected


REFUSED = [
    (FSDP | {"fsdp_config": {"fsdp_version": 1}}, "set fsdp_version: 2"),
    (FSDP | {"fsdp_config": {"fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}, "set fsdp_version: 2"),
    (FSDP | {"fsdp_config": WRAP, "num_processes": 1}, "FSDP needs at least two processes"),
    (FSDP | {"fsdp_config": WRAP | {"fsdp_auto_wrap_policy": "SIZE_BASED_WRAP"}}, "only transformer_based_wrap"),
    (FSDP | {"fsdp_config": WRAP | {"fsdp_ignored_modules": "norm"}}, "fsdp_ignored_modules is not supported"),
    (FSDP | {"fsdp_config": WRAP | {"fsdp_offload_params": True}}, "fsdp_offload_params true: it has not been run"),
    (FSDP | {"fsdp_config": WRAP | {"fsdp_forward_prefetch": True}}, "fsdp_forward_prefetch true"),
    (
        FSDP | {"fsdp_config": WRAP | {"fsdp_activation_checkpointing": True}},
        "fsdp_activation_checkpointing true: set training.gradient_checkpointing instead",
    ),
    (
        FSDP | {"fsdp_config": WRAP | {"fsdp_sharding_strategy": "SHARD_GRAD_OP"}},
        "fsdp_sharding_strategy SHARD_GRAD_OP: only full_shard",
    ),
    (
        FSDP | {"fsdp_config": WRAP, "parallelism_config": {"parallelism_config_tp_size": 2}} | {"num_processes": 2},
        "a parallelism_config",
    ),
    (DDP | {"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, "set training.torch_compile instead"),
    (ONE | {"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, "set training.torch_compile instead"),
    (PLAIN | {"distributed_type": "MEGATRON_LM", "megatron_lm_config": {}}, "Megatron-LM"),
    (
        DEEPSPEED | {"deepspeed_config": {"zero_stage": 3, "gradient_accumulation_steps": 4}},
        "accumulation_steps 4, the",
    ),
]


@pytest.mark.parametrize(("file", "problem"), REFUSED)
def test_what_cannot_run_as_asked_is_refused_by_name(tmp_path, file, problem):
    with pytest.raises(ValueError, match=problem.replace("(", r"\(")):
        read_request(environment_of(tmp_path, file), training())


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="DeepSpeed is installed: see test_zero.py")
def test_deepspeed_that_is_not_installed_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"asks for DeepSpeed: pip install 'backlot\[deepspeed\]'"):
        read_request(environment_of(tmp_path, DEEPSPEED | {"deepspeed_config": {"zero_stage": 2}}), training())


@pytest.mark.parametrize(
    ("environment", "values", "problem"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, {}, "mixed precision fp8 is not supported"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, {"mixed_precision": "bf16"}, "mixed precision fp8 is not supported"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {}, "sets gradient_accumulation_steps 4, the run 1"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"}, {}, "sets gradient_accumulation_steps auto"),
        ({"WORLD_SIZE": "2"}, {"expected_processes": 8}, "expected_processes is 8, the launch configuration starts 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_NEW_KEY": "1"}, {}, "fsdp_new_key is not supp"),
        ({"ACCELERATE_USE_TPU": "true"}, {}, "a TPU"),
        ({"ACCELERATE_DOWNCAST_BF16": "true"}, {}, "downcast_bf16"),
    ],
)
def test_variables_that_contradict_the_run_are_refused(environment, values, problem):
    with pytest.raises(ValueError, match=problem):
        read_request(environment, training(**values))


def test_variables_that_say_the_same_as_the_run_are_fine():
    environment = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "WORLD_SIZE": "2", "ACCELERATE_DYNAMO_BACKEND": "NO"}
    assert read_request(environment, training(gradient_accumulation_steps=4)) == Request(2, "no", None)
    environment["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = "1"
    assert read_request(environment, training(gradient_accumulation_steps=4)) == Request(2, "no", None)


@pytest.mark.parametrize("launched", ["no", "bf16"])
def test_the_key_of_the_run_decides_the_precision(launched):
    environment = {"ACCELERATE_MIXED_PRECISION": launched}
    assert read_request(environment, training(mixed_precision="fp16")).mixed_precision == "fp16"
    assert read_request(environment, training()).mixed_precision == launched


def test_a_refusal_comes_before_any_folder(tmp_path, flows, monkeypatch, capsys):
    for name, value in environment_of(tmp_path, REFUSED[-1][0]).items():
        if name.startswith("ACCELERATE_"):
            monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as exit_:
        runs.open_run(tmp_path / "run", flows)
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith("refused: the launch configuration sets gradient_acc")
    assert not (tmp_path / "run").exists()


def test_a_launch_on_the_cpu_stays_there_where_there_is_an_accelerator(tmp_path, flows, monkeypatch):
    """accelerate_configs/cpu.yaml says so by a variable alone."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(PartialState, "default_device", property(lambda _: torch.device("meta")))
    run = runs.open_run(tmp_path / "run", flows, max_train_steps=1)
    assert run.accelerator.device == torch.device("cpu")
    runs.save_and_close(run)
