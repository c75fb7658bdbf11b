"""Measures of layouts and identities. Names load on first use."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "drawing": ["draw", "load_model"],
        "examples": ["Example", "read_examples", "read_profile"],
        "identity": ["Similarity"],
        "measure": ["KEYS", "Measured", "Protocol", "compare", "measure", "summarise"],
        "metrics": ["measure_objects"],
        "settings": ["Sampling", "Variants"],
    },
)
