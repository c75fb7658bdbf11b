"""What an item of the pose dataset is made of: which templates, which detector, which colours. Loads without torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from backlot.config import Section

Probability = Field(0.3, ge=0, le=1)


class SelectionSettings(Section):
    num_positive_templates: int = Field(4, ge=1)
    """templates that look at the object from the query's side"""
    num_negative_templates: int = Field(2, ge=0)
    """templates that look from elsewhere, whose patches are mostly unseen in the query"""
    min_negative_angle_deg: float = Field(90.0, gt=0, le=180)
    """of a negative, to every pose that symmetry makes equal to the query's"""
    d_ref_random_ratio: float = Field(0.0, ge=0, le=1)
    """how often the reference direction is that of a random positive, not of the nearest template"""
    positive_sampling_mode: Literal["nearest", "random_within_range"] = "nearest"
    """the nearest ones, or any within positive_sampling_deg_range"""
    positive_sampling_deg_range: float = Field(30.0, gt=0, le=180)
    """for random_within_range; where too few templates are in it, the nearest beyond it follow"""
    selection_metric: Literal["view", "so3"] = "view"
    """angle between viewing directions, or of the whole rotation with the templates' arbitrary turns"""

    @property
    def num_templates(self) -> int:
        """Of an item."""
        return self.num_positive_templates + self.num_negative_templates


class DetectionSettings(Section):
    """How far boxes and masks are from the truth, as those of a detector are."""

    box_jitter: float = Field(0.05, ge=0, lt=0.5)
    """each edge of a box moves by up to this share of the box's side"""
    mask_growth: float = Field(0.03, ge=0, lt=0.5)
    """a mask grows or shrinks by up to this share of the crop's side, and its outline wavers by up to half of that"""
    max_holes: int = Field(2, ge=0, le=16)
    """in a mask; fewer are as likely"""
    hole_size: float = Field(0.06, ge=0, lt=0.5)
    """largest radius of a hole, as a share of the crop's side"""


class ColourSettings(Section):
    """Ranges are those of CosyPose (arXiv 2008.08465); factors are Pillow's, 1 changes nothing."""

    augmentation_probability: float = Field(0.8, ge=0, le=1)
    """of a query to be changed at all; each of the changes then comes or not by itself"""
    blur_probability: float = Field(0.4, ge=0, le=1)
    blur_radius: tuple[int, int] = (1, 3)
    """in pixels of the picture before it is cropped, both ends included"""
    sharpness_probability: float = Probability
    sharpness_factor: tuple[float, float] = (0.0, 50.0)
    contrast_probability: float = Probability
    contrast_factor: tuple[float, float] = (0.2, 50.0)
    brightness_probability: float = Field(0.5, ge=0, le=1)
    brightness_factor: tuple[float, float] = (0.1, 6.0)
    colour_probability: float = Probability
    colour_factor: tuple[float, float] = (0.0, 20.0)

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        for name in ("blur_radius", "sharpness_factor", "contrast_factor", "brightness_factor", "colour_factor"):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                raise ValueError(
                    f"`{name}` must be two numbers of at least 0, the smaller one first, got {low}, {high}"
                )
        return self
