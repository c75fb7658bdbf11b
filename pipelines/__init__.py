"""Networks and diffusion pipelines, one folder per system. Names load on first use."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["shortcut"],
    submod_attrs={"codecs": ["PixelCodec", "load_vae"], "pictures": ["image_grid"]},
)
