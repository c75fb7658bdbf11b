"""Shadows on demand: SDXL's UNet without its text, told where the light is. Names load on first use."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "light": ["LIGHT_RANGES", "blob_map", "embed_light"],
        "pipeline": ["ShadowSDXLPipeline", "ShadowSDXLPipelineOutput", "composite", "create_scheduler"],
        "unet": ["NUM_TIMESTEPS", "ShadowUNet"],
    },
)
