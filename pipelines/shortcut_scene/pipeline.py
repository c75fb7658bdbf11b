"""ShortcutScenePipeline: a picture -> all objects of its scene, shapes and poses together, in one step or several."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import trimesh
from diffusers import FlowMapEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedModel

from backlot.loading import ExportedPipeline
from backlot.modalities import OPTIONAL_POSES, POSES
from backlot.pictures import image_grid
from backlot.rendering import object_color, render_scene
from pipelines.shortcut_scene.codec import PoseCodec, rotation_matrix
from pipelines.shortcut_scene.inputs import (
    Sample,
    describe,
    expand,
    gather_tokens,
    object_rows,
    pad,
    read_rotation,
    split,
    to_masks,
    to_picture,
    to_pil,
    to_pointmap,
)
from pipelines.shortcut_scene.meshes import assemble, export, mesh_from_logits, place
from pipelines.shortcut_scene.transformer import SceneShortcutTransformer
from pipelines.shortcut_scene.vae import OccupancyVAE

logger = logging.getLogger(__name__)

DECODE_CHUNK = 16  # objects whose shapes are decoded together
GIVEN = ("translation", "rotation", "size", "shape")

Given = dict[int, dict[str, object]]


@dataclass
class ShortcutScenePipelineOutput(BaseOutput):
    """What the pipeline makes, an entry per scene.

    Args:
        scenes: `trimesh.Scene`s with a node per object, or for `np` dicts of arrays `translation` (N, 3), `rotation`
            (N, 3, 3), `size` (N, 3) and, where there is a VAE, `logits` (N, R, R, R); None for `latent`.
        latents: the modalities (B, N, tokens, channels), float32, not standardised, as in a latents file; 0 where a
            scene has no more objects.
        poses: for every object {`translation` (3,), `rotation` (3, 3), `size` (3,)}, p_scene = R (size p) + t.
    """

    scenes: list[trimesh.Scene] | list[dict[str, np.ndarray]] | None
    latents: Sample
    poses: list[list[dict[str, np.ndarray]]]


class ShortcutScenePipeline(ExportedPipeline):
    """Samples a trained `SceneShortcutTransformer`.

    Args:
        transformer: the network.
        scheduler: steps from noise (t = 0, its sigma = 1) to data.
        codec: turns what the network sees into shape latents and poses.
        vae: decodes shapes; without one objects are boxes.
        image_encoder, image_processor: make tokens of pictures, e.g. DINOv2, for a network with `condition` tokens.
    """

    model_cpu_offload_seq = "image_encoder->transformer->vae"
    _optional_components = ["vae", "image_encoder", "image_processor"]
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        transformer: SceneShortcutTransformer,
        scheduler: FlowMapEulerDiscreteScheduler,
        codec: PoseCodec,
        vae: OccupancyVAE | None = None,
        image_encoder: PreTrainedModel | None = None,
        image_processor: BaseImageProcessor | None = None,
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            codec=codec,
            vae=vae,
            image_encoder=image_encoder,
            image_processor=image_processor,
        )
        self._warned: set[str] = set()

    @property
    def modalities(self) -> dict[str, tuple[int, int]]:
        """Tokens and channels of each modality, in the order in which their noise is drawn."""
        config = self.transformer.config
        sizes = {"shape": (config.shape_tokens, config.shape_channels)}
        widths = POSES | (OPTIONAL_POSES if config.translation_scale else {})
        sizes |= {name: (1, channels) for name, channels in widths.items()}
        return dict(sorted(sizes.items()))

    # --- inputs -----------------------------------------------------------------------------------------------------

    def check_inputs(
        self,
        num_inference_steps: int,
        use_shortcut: bool,
        guidance_scale: float,
        guidance_interval: tuple[float, float],
        guidance_rescale: float,
        shift: float,
        scenes_per_image: int,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> None:
        """Raise ValueError with the argument, what is allowed and what was given."""
        if num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be at least 1, got {num_inference_steps}")
        if use_shortcut and not self.transformer.config.use_shortcut:
            raise ValueError("`use_shortcut` must be False: this network was trained without step sizes, got True")
        if not 0 <= guidance_scale < math.inf:
            raise ValueError(f"`guidance_scale` must be at least 0, got {guidance_scale}")
        if guidance_scale != 1 and self.transformer.config.condition == "none":
            raise ValueError(f"`guidance_scale` must be 1: this network has no condition, got {guidance_scale}")
        if len(guidance_interval) != 2 or not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1000:
            raise ValueError(f"`guidance_interval` must be two rising numbers in [0, 1000], got {guidance_interval}")
        if not 0 <= guidance_rescale <= 1:
            raise ValueError(f"`guidance_rescale` must be in [0, 1], got {guidance_rescale}")
        if not 0 < shift < math.inf:
            raise ValueError(f"`shift` must be above 0, got {shift}")
        if scenes_per_image < 1:
            raise ValueError(f"`scenes_per_image` must be at least 1, got {scenes_per_image}")
        if output_type not in ("trimesh", "latent", "np"):
            raise ValueError(f"`output_type` must be 'trimesh', 'latent' or 'np', got {output_type!r}")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {list(self._callback_tensor_inputs)}, "
                f"got {sorted(unknown)}"
            )

    def check_conditions(self, image: object, masks: object, pointmap: object, cond_tokens: object) -> None:
        """Raise ValueError for a condition that the network needs and did not get, or got and cannot use."""
        config = self.transformer.config
        if config.condition != "tokens" and cond_tokens is not None:
            raise ValueError(f"`cond_tokens` must be None: the condition of this network is {config.condition!r}")
        if config.condition == "none" and image is not None:
            raise ValueError("`image` must be None: this network is unconditional")
        if config.condition != "image" and pointmap is not None:
            raise ValueError(f"`pointmap` must be None: the condition of this network is {config.condition!r}")
        if config.condition == "image":
            if config.condition_channels == 3 and pointmap is not None:
                raise ValueError("`pointmap` must be None: this network was trained on pictures alone")
            wanted = {"image": image} | ({"pointmap": pointmap} if config.condition_channels == 6 else {})
            wanted |= {"masks": masks} if config.object_condition == "mask" else {}
            for name, value in wanted.items():
                if value is None:
                    raise ValueError(f"`{name}` must be given: this network was trained with it, got None")
        if config.condition == "tokens":
            if (image is None) == (cond_tokens is None):
                got = "neither" if image is None else "both"
                raise ValueError(f"exactly one of `image` and `cond_tokens` must be given, got {got}")
            if image is not None and (self.image_encoder is None or self.image_processor is None):
                raise ValueError("`image` must be None: this pipeline has no `image_encoder`, give `cond_tokens`")

    def _count_objects(self, num_objects: list | None, masks: list | None, batch: int) -> list[int]:
        """Objects of each scene; ValueError if that is not known, or not what masks say."""
        for mask in masks or []:
            if not isinstance(mask, Tensor | np.ndarray) or mask.ndim != 3 or not len(mask):
                raise ValueError(f"`masks` must be (N, H, W), got {describe(mask)}")
        if num_objects is None and masks is None:
            raise ValueError("`num_objects` must be given where there are no `masks`, got None")
        counts = expand("num_objects", num_objects or [len(mask) for mask in masks], batch)
        for count, mask in zip(counts, expand("masks", masks, batch) or [None] * batch, strict=True):
            most = self.transformer.config.max_slots if self.transformer.config.object_condition == "slot" else math.inf
            if isinstance(count, bool) or not isinstance(count, int | np.integer) or not 1 <= count <= most:
                raise ValueError(f"`num_objects` must be integers in [1, {most}], got {count!r}")
            if mask is not None and len(mask) != count:
                raise ValueError(f"`num_objects` must agree with `masks`, got {count} and {len(mask)}")
        return [int(count) for count in counts]

    def _encode_conditions(
        self, image: list | None, masks: list | None, pointmap: list | None, cond_tokens: list | None, num_slots: int
    ) -> Sample:
        """What the network is told, for each scene: keyword arguments of its `forward`."""
        config, device, dtype = self.transformer.config, self._execution_device, self.transformer.dtype
        told: Sample = {}
        if config.condition == "image":
            side = config.image_size
            told["image"] = torch.stack([to_picture(x, side) for x in image])
            if config.condition_channels == 6:
                told["pointmap"] = torch.stack([to_pointmap(x, side) for x in pointmap])
            if config.object_condition == "mask":
                told["masks"] = torch.stack([pad(to_masks(x, side), num_slots) for x in masks])
        elif config.condition == "tokens" and cond_tokens is None:
            pictures = self.image_processor([to_pil(x) for x in image], return_tensors="pt")["pixel_values"]
            pictures = pictures.to(device, self.image_encoder.dtype)
            told["cond_tokens"] = self.image_encoder(pictures).last_hidden_state
        elif config.condition == "tokens":
            told |= gather_tokens(cond_tokens, config.condition_channels, num_slots)
        exact = ("pointmap", "masks", "cond_mask")  # points in float32, and what is no number
        return {name: x.to(device) if name in exact else x.to(device, dtype) for name, x in told.items()}

    def _draw_noise(self, counts: list[int], generator: torch.Generator | list[torch.Generator] | None) -> Sample:
        """Standard normal noise, scene after scene: neither a scene's neighbours nor padding matter to it."""
        generators = generator if isinstance(generator, list) else [generator] * len(counts)
        sizes, device, dtype = self.modalities, self._execution_device, self._state_dtype
        rows: dict[str, list[Tensor]] = {name: [] for name in sizes}
        for count, source in zip(counts, generators, strict=True):
            for name, size in sizes.items():
                noise = randn_tensor((count, *size), source, device, dtype)
                rows[name].append(pad(noise, max(counts)))
        return {name: torch.stack(values) for name, values in rows.items()}

    @property
    def _state_dtype(self) -> torch.dtype:
        """At least float32: in half precision a pose would be off by millimetres after a few steps."""
        return torch.promote_types(torch.float32, self.transformer.dtype)

    def _check_latents(self, latents: Sample, counts: list[int]) -> Sample:
        batch, num_slots = len(counts), max(counts)
        if not isinstance(latents, dict) or latents.keys() != self.modalities.keys():
            got = sorted(latents) if isinstance(latents, dict) else type(latents).__name__
            raise ValueError(f"`latents` must be a dict of {list(self.modalities)}, got {got}")
        for name, size in self.modalities.items():
            if tuple(latents[name].shape) != (batch, num_slots, *size):
                expected = (batch, num_slots, *size)
                raise ValueError(f"`latents` must have {name} of shape {expected}, got {tuple(latents[name].shape)}")
        return {name: latents[name].to(self._execution_device, self._state_dtype) for name in self.modalities}

    def _gather_given(
        self, given: list[Given | None] | tuple[Sample, Tensor], counts: list[int]
    ) -> tuple[Sample, Sample]:
        """Values of what is given (B, N, tokens, channels), not standardised, and where they are, (B, N) bool."""
        size = len(counts), max(counts)
        values = {name: torch.zeros(*size, *shape) for name, shape in self.modalities.items()}
        known = {name: torch.zeros(size, dtype=torch.bool) for name in self.modalities}
        if isinstance(given, tuple):
            self._check_known(*given, size)
            rows = given[1].cpu() & object_rows(counts)
            for name, value in given[0].items():
                values[name][rows], known[name][rows] = value.cpu().float()[rows], True
        else:
            for scene, (objects, count) in enumerate(zip(given, counts, strict=True)):
                if objects is not None and not isinstance(objects, dict):
                    raise ValueError(f"`given` must be a dict of objects for each scene, got {describe(objects)}")
                for index, fields in (objects or {}).items():
                    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
                        raise ValueError(f"`given` must name objects in [0, {count - 1}], got {index!r}")
                    for name, value in self._read_given(index, fields).items():
                        values[name][scene, index], known[name][scene, index] = value, True
        device = self._execution_device
        values = {name: value.to(device, self._state_dtype) for name, value in values.items()}
        return values, {name: rows.to(device) for name, rows in known.items()}

    def _check_known(self, sample: Sample, known: Tensor, size: tuple[int, int]) -> None:
        if not isinstance(known, Tensor) or known.dtype != torch.bool or tuple(known.shape) != size:
            raise ValueError(f"`given` must tell which objects are known, bool {size}, got {describe(known)}")
        for name, value in sample.items():
            expected = (*size, *self.modalities.get(name, ()))
            if name not in self.modalities or tuple(value.shape) != expected:
                raise ValueError(f"`given` must have modalities of {self.modalities}, got {name} {tuple(value.shape)}")
            if not value[known.to(value.device)].isfinite().all():
                raise ValueError(f"`given` must be finite, got NaN or infinite values in {name}")

    def _read_given(self, index: int, fields: dict[str, object]) -> Sample:
        """The modalities (tokens, channels) of one given object."""
        where = f"`given` must have for object {index}"
        if not isinstance(fields, dict) or not fields or not fields.keys() <= set(GIVEN):
            got = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
            raise ValueError(f"{where} some of {', '.join(GIVEN)}, got {got}")
        try:
            arrays = {name: torch.as_tensor(value) for name, value in fields.items()}
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{where} arrays of numbers, got {fields}") from error
        for name, array in arrays.items():
            if not array.isfinite().all():
                raise ValueError(f"{where} finite numbers as `{name}`, got {array.flatten().tolist()[:9]}")
        result: Sample = {}
        for name in ("translation", "size"):
            if name in arrays and tuple(arrays[name].shape) != (3,):
                raise ValueError(f"{where} 3 numbers as `{name}`, got {describe(arrays[name])}")
        if "translation" in arrays:
            result["translation"] = arrays["translation"].float()[None]
        if "size" in arrays:
            if not (arrays["size"] > 0).all():
                raise ValueError(f"{where} a `size` above 0, got {arrays['size'].tolist()}")
            result["scale"] = arrays["size"].float().log()[None]
        if "rotation" in arrays:
            result["6drotation_normalized"] = read_rotation(arrays["rotation"].float(), where)[None]
        if "shape" in arrays:
            result["shape"] = self._read_shape(arrays["shape"], where)
        return result

    def _read_shape(self, shape: Tensor, where: str) -> Tensor:
        tokens = self.modalities["shape"]
        if shape.ndim == 3 and self.vae is not None and tuple(shape.shape) == (self.vae.config.sample_size,) * 3:
            occupancy = shape.to(self._execution_device, self.vae.dtype)[None, None]
            return self.vae.to_tokens(self.vae.encode(occupancy).latent_dist.mode())[0].float().cpu()
        if tuple(shape.shape) != tokens:
            grid = "" if self.vae is None else f" or an occupancy grid of side {self.vae.config.sample_size}"
            raise ValueError(f"{where} as `shape` latents {tokens}{grid}, got {describe(shape)}")
        return shape.float()

    # --- sampling ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        image: Image.Image | np.ndarray | Tensor | list | None = None,
        masks: np.ndarray | Tensor | list | None = None,
        pointmap: np.ndarray | Tensor | list | None = None,
        cond_tokens: Tensor | list[Tensor] | None = None,
        num_objects: int | list[int] | None = None,
        num_inference_steps: int = 8,
        use_shortcut: bool = True,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0, 500),
        guidance_rescale: float = 0.0,
        shift: float = 1.0,
        scenes_per_image: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Sample | None = None,
        given: Given | list[Given | None] | tuple[Sample, Tensor] | None = None,
        output_type: str = "trimesh",
        return_dict: bool = True,
        callback_on_step_end: Callable[[ShortcutScenePipeline, int, float, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ShortcutScenePipelineOutput | tuple:
        """Generate scenes.

        Lists have an entry per scene and are paired; what is single serves all scenes. A batch gives what its scenes
        give one by one.

        Args:
            image: square picture, of any size: PIL, uint8 array (H, W, 3), or (3, H, W) in [-1, 1].
            masks: (N, H, W), not 0 where the object is. Their number is the number of objects.
            pointmap: (3, H, W) scene coordinates of the pixels, NaN where there is nothing.
            cond_tokens: (L, C) of an encoder, or (N, L, C) where every object has its own, instead of `image`.
            num_objects: of each scene, where there are no masks.
            num_inference_steps: equal steps, before the shift.
            use_shortcut: tell the network the length of its steps; without, it is a plain flow.
            guidance_scale: 1 uses the condition as it is; w > 1 strengthens it, v_null + w (v - v_null), at twice the
                cost. SAM 3D's strength s is w = 1 + s.
            guidance_interval: guide only steps whose 1000 t lies in it; 0 is noise, 1000 is data.
            guidance_rescale: share in [0, 1] by which the guided velocity gets the deviation of the unguided one
                (arXiv 2305.08891).
            shift: sigma becomes shift sigma / (1 + (shift - 1) sigma), on top of the scheduler's own shift: above 1
                steps are shorter near the noise. SAM 3D's `rescale_t`.
            scenes_per_image: scenes of each entry, next to one another.
            generator: one, or one per scene.
            latents: standard normal noise to start from, the modalities (B, N, tokens, channels).
            given: objects to keep, by index, {0: {"translation": (3,), "rotation": (3, 3) or 6D, "size": (3,),
                "shape": latents (tokens, channels) or bool (R, R, R)}, ...}, of each what is known; or `latents` of an
                output with bool (B, N), true for what is kept.
            output_type: `trimesh`, `np` (poses and logits as arrays) or `latent` (no shapes are decoded).
            callback_on_step_end: called as (pipeline, index, timestep, tensors) after each step; may return changed
                `latents`, a dict of what the network sees.

        Returns:
            `ShortcutScenePipelineOutput`, or a tuple of its fields.
        """
        self.check_inputs(
            num_inference_steps,
            use_shortcut,
            guidance_scale,
            guidance_interval,
            guidance_rescale,
            shift,
            scenes_per_image,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        self.check_conditions(image, masks, pointmap, cond_tokens)
        inputs = {"image": image, "masks": masks, "pointmap": pointmap, "cond_tokens": cond_tokens}
        inputs = {name: split(name, value, 4) for name, value in inputs.items()}
        num_objects = split("num_objects", num_objects, 1)
        objects = split("given", given, 0) if not isinstance(given, tuple) else None
        batch = max(len(x) for x in (*inputs.values(), num_objects, objects, [None]) if x is not None)
        counts = self._count_objects(num_objects, inputs["masks"], batch)
        inputs = {name: expand(name, x, batch) for name, x in inputs.items()}
        conditions = self._encode_conditions(**inputs, num_slots=max(counts))

        counts = [count for count in counts for _ in range(scenes_per_image)]
        conditions = {name: x.repeat_interleave(scenes_per_image, dim=0) for name, x in conditions.items()}
        batch, device = len(counts), self._execution_device
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"`generator` must be one, or one per scene: {batch}, got {len(generator)}")
        object_mask = object_rows(counts).to(device)
        noise = self._draw_noise(counts, generator) if latents is None else self._check_latents(latents, counts)
        noise = {name: x * object_mask[..., None, None] for name, x in noise.items()}
        kept = None
        if given is not None:
            if objects is not None:
                given = [
                    x for x in expand("given", objects, batch // scenes_per_image) for _ in range(scenes_per_image)
                ]
            kept = Kept(*self._gather_given(given, counts), noise, self.codec)
        times = self._set_steps(num_inference_steps, shift)
        step_sizes = [after - before for before, after in itertools.pairwise(times)]
        self._warn(use_shortcut, step_sizes, guidance_scale)
        state = noise
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for index, timestep in enumerate(self.scheduler.timesteps):
                t, d = times[index], step_sizes[index] if use_shortcut else 0.0
                first, last = guidance_interval
                scale = guidance_scale if first - 1e-6 <= 1000 * t <= last + 1e-6 else 1.0
                velocity = self._predict(state, t, d, object_mask, conditions, kept, scale, guidance_rescale)
                state = self._step(velocity, index, state)
                if kept is not None:
                    state = kept.put_back(state, times[index + 1])
                if callback_on_step_end is not None:
                    tensors = {name: {"latents": state}[name] for name in callback_on_step_end_tensor_inputs}
                    state = callback_on_step_end(self, index, timestep, tensors).pop("latents", state)
                progress_bar.update()

        raw = {name: x * object_mask[..., None, None] for name, x in self.codec.decode(state).items()}
        raw = raw if kept is None else kept.final(raw)
        output = self._collect(raw, object_mask, counts, output_type)
        self.maybe_free_model_hooks()
        return output if return_dict else (output.scenes, output.latents, output.poses)

    def _set_steps(self, num_inference_steps: int, shift: float) -> list[float]:
        """Set the scheduler's steps; their times t, from 0 to 1, of which there is one more."""
        sigmas = [1 - i / num_inference_steps for i in range(num_inference_steps)]
        sigmas = [shift * sigma / (1 + (shift - 1) * sigma) for sigma in sigmas]
        self.scheduler.set_timesteps(sigmas=sigmas, device=self._execution_device)
        return [1 - sigma for sigma in self.scheduler.sigmas.tolist()]

    def _collect(
        self, raw: Sample, object_mask: Tensor, counts: list[int], output_type: str
    ) -> ShortcutScenePipelineOutput:
        """What came out, modalities (B, N, tokens, channels) that are not standardised, as scenes."""
        poses, scenes = read_poses(raw), None
        if output_type != "latent":
            scenes = [{name: x[i, :count] for name, x in poses.items()} for i, count in enumerate(counts)]
            if self.vae is not None:
                logits = self.decode_shapes(raw["shape"][object_mask])
                for scene, own in zip(scenes, np.split(logits, np.cumsum(counts)[:-1]), strict=True):
                    scene["logits"] = own
            if output_type == "trimesh":
                scenes = [build_scene(**arrays) for arrays in scenes]
        rows = [[{name: x[i, j] for name, x in poses.items()} for j in range(n)] for i, n in enumerate(counts)]
        return ShortcutScenePipelineOutput(scenes=scenes, latents=raw, poses=rows)

    def _warn(self, use_shortcut: bool, step_sizes: list[float], guidance_scale: float) -> None:
        if not use_shortcut:
            return
        wrong = [d for d in step_sizes if abs(math.log2(d) - round(math.log2(d))) > 1e-6]
        if wrong:
            self._warn_once(
                f"the network was trained on steps of 1, 1/2, 1/4 ...; {wrong[0]:.4g} is none of them: take 1, 2, 4 "
                "... steps without shift, or use_shortcut=False"
            )
        if guidance_scale > 1:
            self._warn_once(
                f"guidance_scale {guidance_scale:g} with use_shortcut: large steps may have learnt guidance already, "
                "which is then applied twice"
            )

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)

    def _predict(
        self,
        state: Sample,
        t: float,
        d: float,
        object_mask: Tensor,
        conditions: Sample,
        kept: Kept | None,
        guidance_scale: float,
        guidance_rescale: float,
    ) -> Sample:
        """The velocity, noise to data, at t for a step of length d, in the state's precision; guided in one pass."""
        told = conditions | {"object_mask": object_mask}
        size, dtype = object_mask.shape, self._state_dtype
        times = torch.full(size[:1], t, device=object_mask.device, dtype=dtype)
        steps = torch.full_like(times, d)
        if kept is not None and self.transformer.config.independent_t:
            # what is known is data already
            times, steps = (x[:, None].expand(size) for x in (times, steps))
            times, steps = times.where(~kept.wholly, 1.0), steps.where(~kept.wholly, 0.0)
            state = kept.put_back(state, 1.0, kept.wholly)
        state = {name: x.to(self.transformer.dtype) for name, x in state.items()}
        if guidance_scale == 1:
            velocity = self.transformer(state, times, steps, **told).sample
            return {name: x.to(dtype) for name, x in velocity.items()}
        state, told = ({name: torch.cat([x, x]) for name, x in rows.items()} for rows in (state, told))
        unconditional = torch.arange(2 * len(times), device=times.device) >= len(times)
        both = self.transformer(
            state, torch.cat([times, times]), torch.cat([steps, steps]), **told, unconditional=unconditional
        ).sample
        return {
            name: guide(*x.to(dtype).chunk(2), object_mask, guidance_scale, guidance_rescale)
            for name, x in both.items()
        }

    def _step(self, velocity: Sample, index: int, state: Sample) -> Sample:
        """One step of the scheduler, whose velocity points from data to noise, for all modalities at once."""
        names = list(self.modalities)
        packed, sample = (torch.cat([x[name].flatten(2) for name in names], dim=2) for x in (velocity, state))
        times = [*self.scheduler.timesteps, torch.zeros_like(self.scheduler.timesteps[0])]
        after = self.scheduler.step(-packed, times[index], sample, times[index + 1]).prev_sample
        parts = after.split([math.prod(self.modalities[name]) for name in names], dim=2)
        return {name: x.unflatten(2, self.modalities[name]) for name, x in zip(names, parts, strict=True)}

    @torch.no_grad()
    def decode_shapes(self, tokens: Tensor) -> np.ndarray:
        """Shape latents (N, tokens, channels), not standardised, -> logits (N, R, R, R), float32."""
        latents = self.vae.to_latents(tokens.to(self._execution_device, self.vae.dtype)).split(DECODE_CHUNK)
        return torch.cat([self.vae.decode(chunk).sample[:, 0].float() for chunk in latents]).cpu().numpy()

    # --- scenes -----------------------------------------------------------------------------------------------------

    def export(self, scene: trimesh.Scene, path: str | Path, per_object_obj: bool = False) -> None:
        """Write a scene as one GLB with a node per object, and on request an OBJ of each object beside it."""
        export(scene, path, per_object_obj=per_object_obj)

    def preview(
        self, scene: trimesh.Scene, image: Image.Image | np.ndarray | Tensor | None = None, size: int = 256
    ) -> Image.Image:
        """The picture it was made from, if given, beside the scene from the front and from above."""
        views = [render_scene(scene, size, view).convert("RGB") for view in ("front", "top")]
        pictures = [] if image is None else [to_pil(image).resize((size, size), Image.Resampling.BICUBIC)]
        return image_grid([[*pictures, *views]])


class Kept:
    """Objects that are given: on the path from their noise to their data at any time, and at its end their values.

    Args:
        raw: modalities (B, N, tokens, channels), not standardised.
        known: where they are given, (B, N) of each modality.
        noise: of the whole scene.
        codec: standardises them.
    """

    def __init__(self, raw: Sample, known: Sample, noise: Sample, codec: PoseCodec):
        self.raw, self.known, self.noise = raw, known, noise
        self.data = codec.encode(raw)
        self.wholly = torch.stack([rows for name, rows in known.items() if name != "translation_scale"]).all(0)

    def put_back(self, state: Sample, t: float, where: Tensor | None = None) -> Sample:
        """The state with what is known at x_t = (1 - t) noise + t data, only in the rows (B, N) of `where` if given."""
        result = {}
        for name, x in state.items():
            rows = self.known[name] if where is None else self.known[name] & where
            result[name] = torch.where(rows[..., None, None], (1 - t) * self.noise[name] + t * self.data[name], x)
        return result

    def final(self, raw: Sample) -> Sample:
        """What came out, with the given values as they were given."""
        return {name: torch.where(self.known[name][..., None, None], self.raw[name], x) for name, x in raw.items()}


def guide(conditional: Tensor, unconditional: Tensor, object_mask: Tensor, scale: float, rescale: float) -> Tensor:
    """u + scale (c - u) of velocities (B, N, tokens, channels), its deviation over a scene's objects moved by `rescale`
    towards that of c.
    """
    guided = unconditional + scale * (conditional - unconditional)
    if rescale == 0:
        return guided
    weight = object_mask[..., None, None].to(guided)
    count = (weight.sum((1, 2, 3), keepdim=True) * guided[0, 0].numel()).clamp(min=1)

    def deviation(x: Tensor) -> Tensor:
        mean = (weight * x).sum((1, 2, 3), keepdim=True) / count
        return (weight * (x - mean).square()).sum((1, 2, 3), keepdim=True).div(count).sqrt()

    factor = deviation(conditional) / deviation(guided).clamp(min=1e-8)
    return guided * (rescale * factor + 1 - rescale)


def read_poses(raw: Sample) -> dict[str, np.ndarray]:
    """Modalities (B, N, 1, channels) -> translation (B, N, 3), rotation (B, N, 3, 3) and size (B, N, 3), float32."""
    raw = {name: raw[name][:, :, 0].float() for name in POSES}
    poses = {
        "translation": raw["translation"],
        "rotation": rotation_matrix(raw["6drotation_normalized"]),
        "size": raw["scale"].exp(),
    }
    return {name: x.cpu().numpy() for name, x in poses.items()}


def build_scene(
    translation: np.ndarray,
    rotation: np.ndarray,
    size: np.ndarray,
    logits: np.ndarray | None = None,
    colors: Sequence[Sequence[float]] | None = None,
) -> trimesh.Scene:
    """Objects (N, ...) as named and coloured nodes of one scene; boxes where there are no logits."""
    meshes = []
    for i in range(len(translation)):
        mesh = trimesh.creation.box() if logits is None else mesh_from_logits(logits[i])
        meshes.append(place(mesh, rotation[i], np.log(size[i]), translation[i]))
    names = [f"object_{i}" for i in range(len(meshes))]
    return assemble(meshes, names, [object_color(i) for i in range(len(meshes))] if colors is None else colors)
