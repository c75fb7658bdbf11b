"""Networks and diffusion pipelines, one folder per system."""
