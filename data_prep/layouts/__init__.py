"""Pictures, boxes and references of objects. Names load on first use."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "dataset": ["LayoutDataset"],
        "procedural": ["ProceduralSettings", "Scene", "draw_scene", "render"],
    },
)
