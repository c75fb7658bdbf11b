"""Networks and diffusion pipelines, one folder per system. Names load on first use."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["shadow_sdxl", "shortcut", "shortcut_scene"],
    submod_attrs={
        "codecs": ["PixelCodec", "latent_channels", "load_vae", "vae_scale_factor"],
        "pictures": ["image_grid", "to_images"],
    },
)
