"""The attention kernel a run asked for, tried out before it is needed."""

from __future__ import annotations

import torch
from diffusers import ModelMixin

from backlot.command_line import EXIT_INPUT, leave
from trainers.common.config import TrainingConfig


def configure_network(
    model: ModelMixin, config: TrainingConfig, dtype: torch.dtype, device: torch.device
) -> ModelMixin:
    """Attention backend (tried out in `dtype`) and gradient checkpointing."""
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if config.attention_backend != "native":
        try:
            model.set_attention_backend(config.attention_backend)
            processors = (getattr(module, "processor", None) for module in model.modules())
            if not any(getattr(processor, "_attention_backend", None) for processor in processors):
                raise ValueError("no attention of this network can be switched")
            try_attention(config.attention_backend, device, dtype)
        except (ValueError, RuntimeError, ImportError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise leave(EXIT_INPUT, f"attention_backend {config.attention_backend} does not work: {reason}") from error
    return model


def try_attention(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """One small forward and backward: several backends can be chosen where they cannot run."""
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    query = torch.randn(1, 64, 2, 64, device=device, dtype=dtype, requires_grad=True)
    dispatch_attention_fn(query, query, query, backend=AttentionBackendName(backend)).sum().backward()
