"""Objects in their boxes, with their identity, on an untouched FLUX. Names load on first use."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "adapter": ["FluxLayoutAdapter"],
        "attachment": ["attach", "detach"],
        "layout": ["DEPTH_LABELS", "FOREGROUND_ALPHA", "Layout", "LayoutState"],
        "model": ["LayoutFlux", "LayoutFluxOutput"],
    },
)
