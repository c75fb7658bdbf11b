"""Raw material -> documented on-disk formats, and their readers. Names load on first use."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "images": ["DataQualityError", "open_images"],
        "latents": ["LatentDataset", "vae_fingerprint"],
        "encode_shadows": ["latents_folder", "open_latents"],
        "occupancy": ["OccupancyDataset"],
        "scene_dataset": ["SceneDataset"],
        "shadow_latents": ["ShadowLatents"],
        "shadows": ["ShadowDataset"],
    },
)
