"""An object's 6D pose from rendered templates. Names load on first use."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "encoders": ["read_encoder"],
        "model": ["PRESETS", "VPOGModel", "VPOGOutput"],
        "pipeline": ["PoseEstimate", "VPOGPipeline", "VPOGPipelineOutput"],
        "templates": ["TemplateSet", "render_template_set", "template_path"],
        "tiny": ["save_tiny_croco", "save_tiny_dino"],
        "view_encoding": ["VIEW_ENCODINGS"],
    },
)
