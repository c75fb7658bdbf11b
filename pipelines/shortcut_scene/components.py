"""What a pipeline consists of besides its network, loaded or created for a training run."""

from __future__ import annotations

import torch
from diffusers import FlowMapEulerDiscreteScheduler
from transformers import AutoImageProcessor, AutoModel

from pipelines.shortcut_scene.codec import PoseCodec
from pipelines.shortcut_scene.pipeline import ShortcutScenePipeline
from pipelines.shortcut_scene.transformer import SceneShortcutTransformer
from pipelines.shortcut_scene.vae import OccupancyVAE


def load_components(vae: str | None, image_encoder: str | None, device: torch.device | str = "cpu") -> dict:
    """The frozen models named by folder or hub name, by their names in `ShortcutScenePipeline`.

    Raises:
        OSError, ValueError: a name leads nowhere.
    """
    components = {}
    if vae is not None:
        components["vae"] = OccupancyVAE.from_pretrained(vae).requires_grad_(False).eval().to(device)
    if image_encoder is not None:
        components["image_encoder"] = AutoModel.from_pretrained(image_encoder).requires_grad_(False).eval().to(device)
        components["image_processor"] = AutoImageProcessor.from_pretrained(image_encoder)
    return components


def create_pipeline(transformer: SceneShortcutTransformer, codec: PoseCodec, components: dict) -> ShortcutScenePipeline:
    """A pipeline around a network, with equal steps from noise to data."""
    return ShortcutScenePipeline(transformer, FlowMapEulerDiscreteScheduler(), codec, **components)
