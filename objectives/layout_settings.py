"""What can be set about the losses of layout training: sections. Light to import: no torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from backlot.config import Section


class LossWeights(Section):
    """Of each term of the loss; 0 leaves a term out, and what only it needs is not computed."""

    flow_matching: float = Field(1.0, ge=0)
    dino_identity: float = Field(0.0, ge=0)
    """Distance of a generated crop to its reference, as DINOv2 sees them."""
    alpha_prior: float = Field(0.0, ge=0)
    """Binary cross-entropy of alpha: without it everything becomes background."""
    region_preservation: float = Field(0.0, ge=0)
    """Change that identity makes outside all boxes; needs a second forward pass where it is drawn."""


class TimestepConfig(Section):
    """At which noise levels the network is trained; sigma = 1 is noise alone."""

    weighting_scheme: Literal["logit_normal", "uniform"] = "logit_normal"
    """Law of the level before the shift."""
    logit_mean: float = 0.0
    """Mean of the normal variable whose sigmoid `logit_normal` takes."""
    logit_std: float = Field(1.0, gt=0)
    dynamic_shift: bool = True
    """Shift levels towards noise as the base's scheduler does for the picture's size when it generates."""
    guidance_scale: float = Field(1.0, ge=0)
    """What a guidance-distilled base is told while it trains."""


class DropoutConfig(Section):
    """Chances that a condition is left out; all draws are independent."""

    layout: float = Field(0.1, ge=0, le=1)
    """All objects of a picture."""
    instance: float = Field(0.1, ge=0, le=1)
    """One object."""
    instance_text: float = Field(0.1, ge=0, le=1)
    """An object's text."""
    clip: float = Field(0.3, ge=0, le=1)
    """An object's CLIP embedding."""
    dino: float = Field(0.3, ge=0, le=1)
    """An object's DINOv2 embedding."""
    prompt: float = Field(0.1, ge=0, le=1)
    """A picture's prompt, which the empty one replaces."""


class IdentityConfig(Section):
    """The DINO identity loss: what looks at which crops, and at which noise levels."""

    encoder: str = "facebook/dinov2-large"
    """DINOv2 (folder or hub name): the one that the references were embedded with."""
    decoder: str | None = "madebyollin/taef1"
    """`AutoencoderTiny` that latents are decoded by (folder or hub name); null: the base's own VAE."""

    sigma_max: float = Field(0.5, gt=0, le=1)
    """Crops of pictures with more noise than this are not worth a look."""
    p_low: float = Field(0.4, ge=0, le=1)
    """Share of the pictures whose level is drawn from [0.02, sigma_max] instead (only where the loss has a weight)."""
    ramp_steps: int = Field(2000, ge=0)
    """Updates over which the loss grows to its weight."""
    crop_size: int | None = Field(None, gt=0)
    """Side of the crops that DINOv2 sees, a multiple of its patches; null: that of the references (112: cheaper)."""
    min_box_px: int = Field(64, gt=0)
    """Shorter side of the smallest box that is looked at."""
    max_per_image: int = Field(2, gt=0)
    max_per_step: int = Field(4, gt=0)
    """Crops of a micro-batch."""
    margin: int = Field(4, ge=0)
    """Latent cells decoded around a crop, so that its rim has its surroundings."""


class RegionConfig(Section):
    """Region preservation."""

    probability: float = Field(0.15, gt=0, le=1)
    """Share of the micro-batches that have the second pass; the same ones on all processes."""
