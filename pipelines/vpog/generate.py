"""Find an object's pose in a picture.

    python -m pipelines.vpog.generate MODEL --image photo.png --K 615.1 614.9 319.5 239.5 \\
        --templates templates/000005.safetensors --box 210 118 340 252 --output out/pose.json

MODEL is the folder of an exported pipeline, or of a finished run. `--K` is fx fy cx cy, or the nine numbers of the
matrix row by row, in pixels whose centres lie at integers. `--box` is x1 y1 x2 y2 in pixels from the picture's corner;
`--mask` is a picture that is black where the object is not. Templates are rendered by
`python -m data_prep.bop render_templates`.

Written are pose.json, the poses (metres, OpenCV axes), the best first, and pose.png, the best drawn over the picture.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, field_validator, model_validator

from backlot.command_line import fail, input_errors, parse
from backlot.files import write_json
from backlot.program_settings import TypedModelSettings

if TYPE_CHECKING:
    from PIL import Image

    from pipelines.vpog.pipeline import PoseEstimate, VPOGPipelineOutput
    from pipelines.vpog.templates import TemplateSet

MAX_DOTS = 2000


class Settings(TypedModelSettings):
    image: Path
    """the picture"""
    K: tuple[float, ...]
    """its camera: fx fy cx cy, or nine numbers"""
    templates: Path
    """a file of templates"""
    box: tuple[float, float, float, float] | None = None
    """where the object is: x1 y1 x2 y2"""
    mask: Path | None = None
    """which pixels are the object"""
    output: Path = Path("pose.json")
    """a .json file; the picture is named after it"""
    num_hypotheses: int = Field(1, ge=1)
    """poses"""
    num_templates: int | None = Field(None, ge=1)
    """how many the encoder leaves for the network; all if left out"""
    group_size: int = Field(4, ge=1)
    """templates that the network sees together"""
    second_pass: bool = False
    """look again round the first estimate"""
    in_plane: Literal["network", "rotate_templates"] = "network"
    """whether turns in the picture are left to the network, or templates are turned"""
    num_rotations: int = Field(12, ge=1)
    """in so many steps"""
    solver: Literal["auto", "poselib", "opencv"] = "auto"
    """RANSAC's"""
    token_cache: Path | None = None
    """folder in which tokens of templates are kept"""
    seed: int = Field(0, ge=0)
    """RANSAC's"""

    @field_validator("K")
    @classmethod
    def _is_camera(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(value) not in (4, 9):
            raise ValueError(f"must be 4 or 9 numbers, got {len(value)}")
        return value

    @field_validator("output")
    @classmethod
    def _is_json(cls, value: Path) -> Path:
        if value.suffix.lower() != ".json":
            raise ValueError("must end in .json")
        return value

    @model_validator(mode="after")
    def _is_somewhere(self) -> Self:
        if self.box is None and self.mask is None:
            raise ValueError("--box or --mask must be given")
        return self

    @property
    def matrix(self) -> list[list[float]]:
        """K, 3 x 3."""
        if len(self.K) == 9:
            return [list(self.K[row : row + 3]) for row in (0, 3, 6)]
        fx, fy, cx, cy = self.K
        return [[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]]


def open_picture(path: Path, what: str) -> Image.Image:
    """A picture, upright, as RGB; `fail` says what is wrong with it."""
    from backlot.pictures import BAD_IMAGE_ERRORS, decode_image

    try:
        return decode_image(path.read_bytes())
    except FileNotFoundError:
        fail(f"--{what} {path}: there is no such file")
    except BAD_IMAGE_ERRORS as error:
        fail(f"--{what} {path}: {error}")


def describe(estimate: PoseEstimate) -> dict:
    """A pose as it is written."""
    return {
        "camera_from_object": estimate.camera_from_object.tolist(),
        "score": estimate.score,
        "inliers": int(estimate.inliers.sum()),
        "correspondences": len(estimate.inliers),
        "template_indices": estimate.template_indices.tolist(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(Settings, argv, "python -m pipelines.vpog.generate", __doc__)
    with input_errors(f"error: --output {settings.output}"):
        settings.output.parent.mkdir(parents=True, exist_ok=True)

    import torch

    from backlot.loading import load_pipeline
    from pipelines.vpog.pipeline import VPOGPipeline
    from pipelines.vpog.templates import TemplateSet

    image = open_picture(settings.image, "image")
    mask = None if settings.mask is None else open_picture(settings.mask, "mask")
    with input_errors(f"error: --templates {settings.templates}"):
        templates = TemplateSet.load(settings.templates)
    pipeline = load_pipeline(VPOGPipeline, settings.model_dir, settings.device, settings.dtype)
    if settings.token_cache is not None:
        pipeline.enable_token_cache(settings.token_cache)
    names = ("box", "num_hypotheses", "num_templates", "group_size", "second_pass", "in_plane", "num_rotations")
    began = time.perf_counter()
    with input_errors():
        output = pipeline(
            image,
            settings.matrix,
            templates,
            mask=mask,
            solver=settings.solver,
            generator=torch.Generator().manual_seed(settings.seed),
            **{name: getattr(settings, name) for name in names},
        )
    seconds = time.perf_counter() - began
    save(settings, image, templates, output)
    best = output.estimates[0]
    print(f"score {best.score:.3f}, {best.inliers.sum()} of {len(best.inliers)} points agree, {seconds:.2f} s")


def save(settings: Settings, image: Image.Image, templates: TemplateSet, output: VPOGPipelineOutput) -> None:
    """The poses, and the best of them over the picture; their names are printed."""
    import torch

    from pipelines.vpog.correspondences import object_points
    from pipelines.vpog.overlay import draw_pose

    write_json(settings.output, {"poses": [describe(estimate) for estimate in output.estimates]})
    best = output.estimates[0]
    near = templates.subset(best.template_indices)
    depth, poses, K = (torch.as_tensor(each) for each in (near.depth, near.camera_from_object, near.K))
    points = object_points(depth, K, poses)[depth > 0]
    points = points[:: max(1, len(points) // MAX_DOTS)]
    picture = settings.output.with_suffix(".png")
    drawn = draw_pose(
        image, settings.matrix, best.camera_from_object, points, templates.diameter, f"score {best.score:.2f}"
    )
    drawn.save(picture)
    print(f"{settings.output}, {picture}")


if __name__ == "__main__":
    main()
