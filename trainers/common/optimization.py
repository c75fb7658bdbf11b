"""Optimiser and learning-rate schedule."""

from __future__ import annotations

import warnings

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import get_wsd_schedule

from trainers.common.config import TrainingConfig


def create_optimizer(model: nn.Module, config: TrainingConfig) -> Optimizer:
    """AdamW over the parameters that require a gradient; biases, norms and embeddings are not decayed by default."""
    trainable = {id(p): p for p in model.parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("the model has no parameter that requires a gradient")
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed = [p for i, p in trainable.items() if config.decay_all_parameters or (p.ndim > 1 and i not in tables)]
    kept = {id(p) for p in decayed}
    groups = [
        {"params": decayed, "weight_decay": config.adam_weight_decay},
        {"params": [p for i, p in trainable.items() if i not in kept], "weight_decay": 0.0},
    ]
    arguments = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    groups = [group for group in groups if group["params"]]
    if config.use_8bit_adam:
        try:
            import bitsandbytes
        except ImportError as error:
            raise SystemExit("training.use_8bit_adam needs bitsandbytes: pip install 'backlot[gpu]'") from error
        return bitsandbytes.optim.AdamW8bit(groups, **arguments)
    # fused: one kernel for the whole update, 1.5 to 2 times faster than foreach on CPU and GPU alike
    return torch.optim.AdamW(groups, fused=True, **arguments)


def check_optimizer(config):
    pass


def create_lr_scheduler(optimizer: Optimizer, config: TrainingConfig) -> LambdaLR:
    """The schedule, counted in updates: stepped once per update whatever the number of processes."""
    if config.lr_scheduler == "inverse_sqrt":
        # warms up and decays without knowing how long the run will be
        return LambdaLR(optimizer, lambda step: (1 - 0.999 ** (step + 1)) * (1 + step / 200_000) ** -0.5)
    if config.lr_scheduler == "warmup_stable_decay":
        return get_wsd_schedule(
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_decay_steps=config.lr_decay_steps,
            num_training_steps=config.max_train_steps,
            decay_type="linear",
        )
    return get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )


def set_schedule_step(lr_scheduler: LambdaLR, step: int) -> None:
    """Put the schedule where it stands after `step` updates; it is a function of the step, so nothing else is state."""
    lr_scheduler.last_epoch = step - 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "called before optimizer.step()", which is the purpose
        lr_scheduler.step()
