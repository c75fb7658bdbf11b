"""The mathematics of the losses: pure functions of given noise, times and networks. Names load on first use."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submodules=["denoising", "distillation", "rectified_flow", "reflow", "scene", "settings", "shortcut"]
)
