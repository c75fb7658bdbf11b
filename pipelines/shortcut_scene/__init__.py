"""Whole 3D scenes from noise, objects aware of one another: networks, codec, pipeline. Names load on first use."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "codec": ["MODALITIES", "PoseCodec", "opencv_from_pytorch3d", "rotation_6d", "rotation_matrix"],
        "components": ["create_pipeline", "load_components"],
        "meshes": ["assemble", "export", "load_scene", "mesh_from_logits", "mesh_from_occupancy", "place"],
        "pipeline": ["ShortcutScenePipeline", "ShortcutScenePipelineOutput"],
        "transformer": ["PRESETS", "SceneShortcutTransformer"],
        "vae": ["OccupancyVAE"],
    },
)
