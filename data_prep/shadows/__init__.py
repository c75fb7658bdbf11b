"""Objects, their masks and the shadows they cast. Names load on first use."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "dataset": ["ShadowDataset"],
        "encode": ["latents_folder", "open_latents"],
        "latents": ["ShadowLatents"],
    },
)
