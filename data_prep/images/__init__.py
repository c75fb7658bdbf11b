"""Pictures with class labels, and their latents. Names load on first use."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "dataset": ["DataQualityError", "open_images"],
        "digits": ["DigitsDataset", "load_digits"],
        "latents": ["LatentDataset"],
    },
)
