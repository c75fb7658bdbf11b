"""Hooks of an offload are taken off while a transformer's forwards are exchanged, and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

from diffusers import DiffusionPipeline, FluxTransformer2DModel
from diffusers.hooks import HookRegistry
from diffusers.hooks import group_offloading as groups
from torch import nn

GROUP_HOOKS = (groups._GROUP_OFFLOADING, groups._LAYER_EXECUTION_TRACKER, groups._LAZY_PREFETCH_GROUP_OFFLOADING)


@contextmanager
def suspended(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Within, no component is offloaded; afterwards it is as before, new components included.

    Model, sequential and group offload, in the way of diffusers' own loaders.
    """
    in_group = groups._get_top_level_group_offload_hook(pipeline.transformer)
    by_model, by_layer, _ = pipeline._optionally_disable_offloading(pipeline)
    if in_group is not None:
        registry = HookRegistry.check_if_exists_or_initialize(pipeline.transformer)
        for name in GROUP_HOOKS:
            registry.remove_hook(name, recurse=True)
    restore_own_forwards(pipeline.transformer)
    try:
        yield
    finally:
        if by_model:
            pipeline.enable_model_cpu_offload(device=pipeline._offload_device)
        elif by_layer:
            pipeline.enable_sequential_cpu_offload(device=pipeline._offload_device)
        if in_group is not None:
            groups._apply_group_offloading(pipeline.transformer, in_group.config)


def restore_own_forwards(transformer: FluxTransformer2DModel) -> None:
    """Hooks that go leave the class's forward behind as an attribute, as if the module had one of its own."""
    for module in (transformer, *transformer.transformer_blocks, *transformer.single_transformer_blocks):
        if is_own_forward(module):
            del module.forward


def is_own_forward(module: nn.Module) -> bool:
    return vars(module).get("forward") == MethodType(type(module).forward, module)
