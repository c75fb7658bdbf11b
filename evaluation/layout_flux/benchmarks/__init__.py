"""Public layout benchmarks: their files, and what is measured by their definitions. Names load on first use."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "formats": ["Instance", "Request", "read_benchmark"],
        "scores": ["score_coco_mig", "score_lgs", "score_layoutsam"],
    },
)
