"""Measures of 6D poses. Names load on first use."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "detections": ["Detection", "Target", "choose_targets", "detect_truly", "find_targets", "read_detections"],
        "errors": ["Errors", "add_figures", "compare", "pose_figures", "pose_scalars"],
        "matching": ["PatchCounts", "count_patches"],
        "measure": ["Measured", "Protocol", "ask_all", "measure", "open_split", "summarise", "to_results"],
        "settings": ["Answering"],
        "sheets": ["draw_batch"],
    },
)
