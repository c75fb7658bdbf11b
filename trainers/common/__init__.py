"""The mechanics every run shares. Names load on first use: a script checks its configuration before torch."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "launch": ["create_accelerator"],
        "run": ["TrainingRun"],
        "validation": ["batches_of", "held_out_items", "mean_of", "spread", "step_names", "to_device"],
        "weights": ["load_weights"],
    },
)
