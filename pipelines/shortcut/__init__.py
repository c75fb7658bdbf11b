"""Images in one step or many: network, scheduler and pipeline. Names load on first use."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "pipeline": ["ShortcutPipeline", "ShortcutPipelineOutput"],
        "scheduler": ["ShortcutScheduler"],
        "transformer": ["OFFICIAL", "SIZES", "ShortcutDiT"],
    },
)
