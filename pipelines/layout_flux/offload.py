"""Hooks of an offload are taken off while a transformer's forwards are exchanged, and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry
from diffusers.hooks import group_offloading as groups

GROUP_HOOKS = (groups._GROUP_OFFLOADING, groups._LAYER_EXECUTION_TRACKER, groups._LAZY_PREFETCH_GROUP_OFFLOADING)


@contextmanager
def suspended(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Within, no component is offloaded; afterwards it is as before, new components included.

    Model, sequential and group offload, in the way of diffusers' own loaders. Hooks that go leave a forward behind as
    an attribute of the module; `detach` clears it away.
    """
    in_group = groups._get_top_level_group_offload_hook(pipeline.transformer)
    by_model, by_layer, _ = pipeline._optionally_disable_offloading(pipeline)
    if in_group is not None:
        registry = HookRegistry.check_if_exists_or_initialize(pipeline.transformer)
        for name in GROUP_HOOKS:
            registry.remove_hook(name, recurse=True)
    try:
        yield
    finally:
        if by_model:
            pipeline.enable_model_cpu_offload(device=pipeline._offload_device)
        elif by_layer:
            pipeline.enable_sequential_cpu_offload(device=pipeline._offload_device)
        if in_group is not None:
            groups._apply_group_offloading(pipeline.transformer, in_group.config)
