"""Points of the plane in a few steps: network and pipeline. Names load on first use."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "network": ["PointFlowNetwork", "PointFlowNetworkOutput"],
        "pipeline": ["PointFlowPipeline", "PointFlowPipelineOutput", "create_scheduler"],
    },
)
