"""Objects in pictures with their 6D poses: BOP scenes, tar shards. Names load on first use."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "dataset": ["PoseDataset"],
        "format": ["BadSampleError", "BopDataset", "Row", "Sample", "Source", "write_scene", "write_targets"],
        "index": ["PoseSource"],
        "mixture": ["ShardMixture"],
        "models": ["Models", "read_models", "write_models"],
        "results": ["PoseEstimate", "read_results", "write_results"],
    },
)
