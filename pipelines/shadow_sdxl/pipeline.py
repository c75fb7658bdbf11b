"""ShadowSDXLPipeline: an object's picture and a light -> its soft shadow on the ground, in one step or several."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageColor
from torch import Tensor

from backlot.codecs import PixelCodec, vae_scale_factor
from backlot.loading import ExportedPipeline
from backlot.pictures import fit_object, object_pixels, place_in_square
from pipelines.shadow_sdxl.light import check_light
from pipelines.shadow_sdxl.unet import NUM_TIMESTEPS, ShadowUNet

logger = logging.getLogger(__name__)


@dataclass
class ShadowSDXLPipelineOutput(BaseOutput):
    """`images`: shadow maps, 1 = full shadow: PIL "L", an array (B, H, W) or a tensor (B, 1, H, W); or latents."""

    images: list[Image.Image] | np.ndarray | Tensor


class ShadowSDXLPipeline(ExportedPipeline):
    """Casts the shadow of an object for any light (arXiv 2412.11972).

    Args:
        unet: the network.
        vae: encodes the object and decodes the shadow.
        scheduler: `FlowMatchEulerDiscreteScheduler` for a network that predicts the flow, else `DDIMScheduler`.
    """

    model_cpu_offload_seq = "unet->vae"
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        unet: ShadowUNet,
        vae: AutoencoderKL | PixelCodec,
        scheduler: FlowMatchEulerDiscreteScheduler | DDIMScheduler,
    ):
        super().__init__()
        self.register_modules(unet=unet, vae=vae, scheduler=scheduler)

    @property
    def resolution(self) -> int:
        """Side of the pictures the network was made for, in pixels."""
        return self.unet.config.sample_size * vae_scale_factor(self.vae)

    def check_inputs(
        self,
        images: list,
        masks: list,
        lights: list[tuple[float, float, float]],
        intensity: float,
        num_inference_steps: int,
        sigmas: list[float] | None,
        resolution: int,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        """Raise ValueError with the argument, what is allowed and what was given."""
        for light in lights:
            check_light(*light)
        for image, mask in zip(images, masks, strict=True):
            if isinstance(image, Tensor):
                if tuple(image.shape) != (3, resolution, resolution):
                    raise ValueError(
                        f"`image` must be (3, {resolution}, {resolution}) as a tensor, got {tuple(image.shape)}"
                    )
                if not isinstance(mask, Tensor) or mask.shape != (1, *image.shape[1:]):
                    raise ValueError(f"`mask` must be a tensor (1, {resolution}, {resolution}) like its image")
            elif not isinstance(image, Image.Image):
                raise ValueError(f"`image` must be PIL images or tensors, got {type(image).__name__}")
            elif mask is not None and not isinstance(mask, Image.Image):
                raise ValueError(f"`mask` must be PIL images like `image`, got {type(mask).__name__}")
            elif mask is not None and mask.size != image.size:
                raise ValueError(f"`mask` must have the size of its image, {image.size}, got {mask.size}")
        if not 0 <= intensity <= 10:
            raise ValueError(f"`intensity` must be in [0, 10], got {intensity}")
        if num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be at least 1, got {num_inference_steps}")
        schedule = self.scheduler.config.num_train_timesteps
        if self.unet.config.prediction_type != "flow" and schedule % num_inference_steps:
            # DDIM would neither step by what it says nor end at clean data
            raise ValueError(f"`num_inference_steps` must divide {schedule} in a diffusion, got {num_inference_steps}")
        if sigmas is not None:
            if self.unet.config.prediction_type != "flow":
                raise ValueError(f"`sigmas` are for flow models, this one predicts {self.unet.config.prediction_type}")
            falling = all(a > b for a, b in zip(sigmas, [*sigmas, 0.0][1:], strict=True))
            if not sigmas or sigmas[0] != 1 or not falling:
                raise ValueError(f"`sigmas` must fall from 1 and stay above 0 (0 is added), got {sigmas}")
        multiple = vae_scale_factor(self.vae) * 2 ** (len(self.unet.config.block_out_channels) - 1)
        if resolution < 1 or resolution % multiple:
            raise ValueError(f"`resolution` must be a multiple of {multiple}, got {resolution}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}")
        sizes = {image.size if isinstance(image, Image.Image) else tuple(image.shape) for image in images}
        if output_type in ("np", "pt") and len(sizes) > 1:
            raise ValueError(f"`output_type` {output_type!r} needs images of one size, got several")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {list(self._callback_tensor_inputs)}, "
                f"got {sorted(unknown)}"
            )

    @torch.no_grad()
    def __call__(
        self,
        image: Image.Image | Tensor | list[Image.Image | Tensor],
        mask: Image.Image | Tensor | list[Image.Image | Tensor | None] | None = None,
        theta: float | list[float] = 30.0,
        phi: float | list[float] = 45.0,
        size: float | list[float] = 4.0,
        intensity: float = 1.0,
        num_inference_steps: int = 1,
        sigmas: list[float] | None = None,
        resolution: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[ShadowSDXLPipeline, int, float, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ("latents",),
    ) -> ShadowSDXLPipelineOutput | tuple:
        """Cast shadows.

        Lists are paired; what is single serves all of them: one image with four values of phi gives four maps, and the
        image is encoded once.

        Args:
            image: object pictures of any shape. Those with an alpha channel bring their mask. Or tensors (3, R, R) in
                [-1, 1], the object on the network's own `fill`, R = `resolution`.
            mask: white (1 in a tensor) where the object is. Without one and without alpha it is guessed, with a
                warning.
            theta: light's angle from the zenith, 0 to 45 degrees.
            phi: its direction on the ground in degrees; 0: light from the right, shadow to the left; 90: light from
                behind, shadow towards the viewer.
            size: side of the square light, 2 (hard) to 8 (soft).
            intensity: multiplies the map.
            num_inference_steps: equal steps.
            sigmas: noise levels at which the steps start, from 1 downwards, instead.
            resolution: side of the square the network sees; the one it was trained with.
            generator: one, or one per map.
            latents: (B, C, h, w) standard normal noise to start from.
            output_type: `pil`, `np`, `pt` or `latent` (before the VAE). Maps have their image's size.
            callback_on_step_end: called as (pipeline, index, timestep, tensors) after each step; may return changed
                tensors.

        Returns:
            `ShadowSDXLPipelineOutput`, or a tuple of its field.
        """
        images, masks, lights, picture_of = pair(image, mask, theta, phi, size)
        resolution = self.resolution if resolution is None else resolution
        settings = (intensity, num_inference_steps, sigmas, resolution, output_type)
        self.check_inputs(images, masks, lights, *settings, callback_on_step_end_tensor_inputs)
        pictures = [prepare(*both, resolution, self.unet.config.fill) for both in zip(images, masks, strict=True)]
        object_latents, mask_latents = self._encode_objects(pictures, picture_of)
        # within the range of training; 360 stays, that its difference to 0 can be measured
        lights = [(theta, phi if 0 <= phi <= 360 else phi % 360, size) for theta, phi, size in lights]
        light = torch.tensor(lights, dtype=torch.float32, device=self._execution_device)
        latents = self._start(latents, (len(lights), *object_latents.shape[1:]), generator)
        step_sizes = self._set_steps(num_inference_steps, sigmas)
        told = self.unet.config.knows_step_size
        with self.progress_bar(total=len(step_sizes)) as progress_bar:
            for index, (timestep, step_size) in enumerate(zip(self.scheduler.timesteps, step_sizes, strict=True)):
                output = self.unet(
                    latents,
                    timestep.expand(len(latents)),
                    object_latents,
                    mask_latents,
                    light,
                    step_size.expand(len(latents)) if told else None,
                ).sample
                latents = self.scheduler.step(output, timestep, latents).prev_sample.to(latents.dtype)
                if callback_on_step_end is not None:
                    tensors = {name: {"latents": latents}[name] for name in callback_on_step_end_tensor_inputs}
                    latents = callback_on_step_end(self, index, timestep, tensors).pop("latents", latents)
                progress_bar.update()

        maps = latents
        if output_type != "latent":
            maps = (self.decode(latents).float().clamp(0, 1) * intensity).clamp(max=1)
            maps = restore_maps(maps, [pictures[i] for i in picture_of], output_type)
        self.maybe_free_model_hooks()
        return ShadowSDXLPipelineOutput(images=maps) if return_dict else (maps,)

    def _encode_objects(self, pictures: list[Picture], picture_of: list[int]) -> tuple[Tensor, Tensor]:
        """The latents of objects and of masks, a row for each map; a picture is encoded once."""
        device, dtype = self._execution_device, self.unet.dtype
        mask_pixels = torch.stack([picture.mask for picture in pictures]).to(device)
        object_latents = self.encode(torch.stack([picture.pixel_values for picture in pictures]).to(device))
        mask_latents = torch.nn.functional.adaptive_avg_pool2d(mask_pixels, object_latents.shape[-2:])
        rows = torch.tensor(picture_of, device=device)
        return object_latents.to(dtype)[rows], mask_latents.to(dtype)[rows]

    def _start(
        self, latents: Tensor | None, shape: tuple[int, ...], generator: torch.Generator | list[torch.Generator] | None
    ) -> Tensor:
        """The noise that is given, checked, or else drawn."""
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must have shape {shape}, got {tuple(latents.shape)}")
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"`generator` must be one, or one per map: {shape[0]}, got {len(generator)}")
        device, dtype = self._execution_device, self.unet.dtype
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return latents.to(device=device, dtype=dtype)

    def _set_steps(self, num_inference_steps: int, sigmas: list[float] | None) -> Tensor:
        """Set the scheduler's steps, and give the length of each in sigma, 0 in a diffusion."""
        device = self._execution_device
        if self.unet.config.prediction_type != "flow":
            self.scheduler.set_timesteps(num_inference_steps, device=device)
            return torch.zeros(num_inference_steps, device=device)
        sigmas = sigmas or [1 - i / num_inference_steps for i in range(num_inference_steps)]
        self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        return (self.scheduler.sigmas[:-1] - self.scheduler.sigmas[1:]).to(device)

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> scaled latents, the posterior's mode. In the VAE's own precision."""
        self._upcast_vae()
        with torch.autocast(pixel_values.device.type, enabled=False):
            latents = self.vae.encode(pixel_values.to(self.vae.dtype)).latent_dist.mode()
        return (latents - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> shadow maps (B, 1, H, W), about [0, 1] and not clamped. In the VAE's own precision."""
        self._upcast_vae()
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        with torch.autocast(latents.device.type, enabled=False):
            return (self.vae.decode(latents).sample.mean(1, keepdim=True) + 1) / 2

    def _upcast_vae(self) -> None:
        if self.vae.dtype == torch.float16 and self.vae.config.get("force_upcast"):
            self.vae.to(dtype=torch.float32)  # SDXL's VAE overflows in float16


def create_scheduler(prediction_type: str) -> FlowMatchEulerDiscreteScheduler | DDIMScheduler:
    """What steps a network of this `prediction_type`: equal steps of sigma, or DDIM on SDXL's diffusion schedule."""
    if prediction_type == "flow":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TIMESTEPS)
    return DDIMScheduler(
        num_train_timesteps=NUM_TIMESTEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        timestep_spacing="trailing",  # a single step has to start from noise alone
        set_alpha_to_one=True,
        clip_sample=False,
    )


# --- pictures ---------------------------------------------------------------------------------------


def pair(image, mask, theta, phi, size) -> tuple[list, list, list[tuple[float, float, float]], list[int]]:
    """Images, their masks, a light for every map, and the image that each map belongs to."""
    images = list(image) if isinstance(image, (list, tuple)) else [image]
    masks = list(mask) if isinstance(mask, (list, tuple)) else [mask] * (len(images) if mask is None else 1)
    if len(masks) != len(images):
        raise ValueError(f"`mask` must be one per image, got {len(masks)} for {len(images)}")
    values = {"theta": theta, "phi": phi, "size": size}
    values = {name: list(v) if isinstance(v, (list, tuple)) else [v] for name, v in values.items()}
    if not images or not all(values.values()):
        raise ValueError("`image`, `theta`, `phi` and `size` must not be empty lists")
    count = max(len(images), *map(len, values.values()))
    for name, given in {"image": images, **values}.items():
        if len(given) not in (1, count):
            raise ValueError(f"`{name}` must be single or a list of {count}, the longest one given, got {len(given)}")
    lights = [tuple(float(v[i % len(v)]) for v in values.values()) for i in range(count)]
    return images, masks, lights, [i % len(images) for i in range(count)]


@dataclass
class Picture:
    """An object in the square the network sees: `pixel_values` (3, R, R) in [-1, 1], `mask` (1, R, R) in [0, 1]."""

    pixel_values: Tensor
    mask: Tensor
    size: tuple[int, int]  # of the original, width and height

    def restore(self, shadow: Tensor) -> Tensor:
        """A map (1, 1, R, R) of the square -> (1, 1, H, W) of the original picture."""
        left, top, width, height = place_in_square(*self.size, shadow.shape[-1])
        shadow = shadow[..., top : top + height, left : left + width]
        if (width, height) != self.size:
            reduces = max(width, height) > max(self.size)
            shadow = torch.nn.functional.interpolate(shadow, self.size[::-1], mode="bilinear", antialias=reduces)
        return shadow


def prepare(image: Image.Image | Tensor, mask: Image.Image | Tensor | None, resolution: int, fill: float) -> Picture:
    """Put the object on grey, in the middle of a square of `resolution` pixels; a tensor is that already."""
    if isinstance(image, Tensor):
        return Picture(image.float(), mask.float(), (resolution, resolution))
    mask = find_mask(image) if mask is None else mask.convert("L")
    pixels, alpha = object_pixels(image, mask, fill), np.asarray(mask, np.float32) / 255
    pixels, alpha = fit_object(pixels, alpha, resolution, fill)
    pixel_values = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    return Picture(pixel_values.mul_(2).sub_(1), torch.from_numpy(alpha)[None], image.size)


def find_mask(image: Image.Image) -> Image.Image:
    """The alpha channel; without one, what differs from the colour along the border, with a warning."""
    if image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
        if alpha.getextrema()[0] < 255:
            return alpha
    logger.warning("the picture has neither mask nor alpha: taking all that differs from its border's colour as object")
    pixels = np.array(image.convert("RGB")).astype(np.int16)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    differs = np.abs(pixels - np.median(border, axis=0)).max(-1) > 25
    return Image.fromarray(differs.astype(np.uint8) * 255)


def restore_maps(maps: Tensor, pictures: list[Picture], output_type: str) -> list[Image.Image] | np.ndarray | Tensor:
    """Maps (B, 1, R, R) in [0, 1], each as large as its picture: `pil`, `np` (B, H, W) or `pt` (B, 1, H, W)."""
    restored = [picture.restore(shadow[None]) for picture, shadow in zip(pictures, maps, strict=True)]
    if output_type == "pil":
        return [to_image(shadow) for shadow in restored]
    return torch.cat(restored) if output_type == "pt" else torch.cat(restored)[:, 0].cpu().numpy()


def to_image(shadow: Tensor) -> Image.Image:
    """A map (1, 1, H, W) in [0, 1] -> 8-bit greyscale."""
    return Image.fromarray((shadow[0, 0] * 255).round().byte().cpu().numpy())


def composite(
    image: Image.Image,
    shadow: Image.Image,
    background: Image.Image | str = "#e8e4dc",
    mask: Image.Image | None = None,
    intensity: float = 1.0,
    tint: str | tuple[int, int, int] = "black",
) -> Image.Image:
    """The object and its shadow on a background: m obj + (1 - m) (bg (1 - I S) + tint I S).

    Args:
        image: the object. shadow: its map, of the same size.
        background: a picture of the same size, or a colour. It is unchanged where there is neither object nor shadow.
        mask: soft edges are respected; the image's alpha channel without one.
        intensity: I; I S is clipped to 1.
        tint: colour of full shadow.
    """
    if isinstance(background, str):
        background = Image.new("RGB", image.size, background)
    mask = find_mask(image) if mask is None else mask
    for name, other in {"shadow": shadow, "background": background, "mask": mask}.items():
        if other.size != image.size:
            raise ValueError(f"`{name}` must have the image's size {image.size}, got {other.size}")
    if intensity < 0:
        raise ValueError(f"`intensity` must be at least 0, got {intensity}")
    tint = ImageColor.getrgb(tint)[:3] if isinstance(tint, str) else tint
    dark = np.clip(np.array(shadow.convert("L"), np.float32)[..., None] / 255 * intensity, 0, 1)
    ground = np.array(background.convert("RGB"), np.float32) * (1 - dark) + np.array(tint, np.float32) * dark
    alpha = np.array(mask.convert("L"), np.float32)[..., None] / 255
    pixels = alpha * np.array(image.convert("RGB"), np.float32) + (1 - alpha) * ground
    return Image.fromarray(pixels.round().astype(np.uint8))
