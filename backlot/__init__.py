"""What every other folder may use, and that knows no system. Names and files load on first use."""

import pkgutil

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[module.name for module in pkgutil.iter_modules(__path__)],
    submod_attrs={
        "codecs": ["PixelCodec", "latent_channels", "load_vae", "vae_scale_factor"],
        "pictures": ["image_grid", "to_images"],
        "samples": ["SampleKey"],
    },
)
