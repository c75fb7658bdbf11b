"""Points of the plane. Names load on first use."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "dataset": ["PointDataset"],
        "format": ["SPLITS", "read_points", "write_points"],
        "synth": ["make_ring"],
    },
)
