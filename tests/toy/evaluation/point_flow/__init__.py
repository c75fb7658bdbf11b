"""Measures of flows on points. Names load on first use."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "measure": ["draw_points", "evaluate"],
        "metrics": ["wasserstein"],
    },
)
