"""Objects in their boxes, with their identity, on an untouched FLUX. Names load on first use."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "adapter": ["FluxLayoutAdapter"],
        "attachment": ["attach", "detach"],
        "files": ["find_adapter", "load_adapter", "save_adapter"],
        "identity": ["IdentityEncoder", "IdentityTargets"],
        "layout": ["DEPTH_LABELS", "FOREGROUND_ALPHA", "Layout", "LayoutState"],
        "lora": ["export_lora", "import_lora"],
        "log_folders": ["link_logs"],
        "model": ["LayoutFlux", "LayoutFluxOutput"],
        "pictures": ["compare"],
        "stages": [
            "check_size",
            "complete",
            "conditions",
            "count_tokens",
            "create_adapter",
            "create_base",
            "exported",
            "load_base",
            "with_network",
        ],
        "pipeline": ["FluxLayoutPipeline", "FluxLayoutPipelineOutput"],
    },
)
