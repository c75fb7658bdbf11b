"""FluxLayoutPipeline: a prompt, boxes, what stands in each of them and how it looks -> a picture, by FLUX."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    BaseImageProcessor,
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    Dinov2Model,
    T5EncoderModel,
    T5TokenizerFast,
)

from backlot.codecs import PixelCodec, vae_scale_factor
from backlot.loading import ExportedPipeline
from backlot.pictures import to_pixel_values, to_rgb
from pipelines.layout_flux import offload
from pipelines.layout_flux.adapter import SOURCES, FluxLayoutAdapter
from pipelines.layout_flux.attachment import LayoutForward, attach, detach
from pipelines.layout_flux.encoders import crop_for, encode_clip_crops, encode_dino_crops, phrase_tokens
from pipelines.layout_flux.files import WEIGHTS_NAME, load_adapter, save_adapter
from pipelines.layout_flux.inputs import Instance, collect_instances, find_phrases, to_layout
from pipelines.layout_flux.layout import Layout, LayoutState

LAYOUT_COMPONENTS = ("layout_adapter", "clip_vision", "clip_processor", "dino", "dino_processor")
TEXT_COMPONENTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
REFERENCE_ENCODERS = {"clip": "openai/clip-vit-large-patch14", "dino": "facebook/dinov2-large"}


@dataclass
class FluxLayoutPipelineOutput(BaseOutput):
    """`images` as of `FluxPipeline`; `alpha`: per picture how much each of its objects is foreground, in [0, 1]."""

    images: list[Image.Image] | np.ndarray | Tensor
    alpha: list[list[float]] | None = None


class FluxLayoutPipeline(ExportedPipeline, FluxPipeline):
    """FLUX that puts objects into boxes and keeps their identity; without boxes it is `FluxPipeline`.

    Args:
        scheduler, vae, transformer, text_encoder, tokenizer, text_encoder_2, tokenizer_2, image_encoder,
            feature_extractor: as of `FluxPipeline`. Without text encoders it runs from embeddings.
        layout_adapter: what is trained; see `load_layout_adapter`.
        clip_vision, clip_processor, dino, dino_processor: encode reference pictures; see `load_reference_encoders`.
    """

    # what is called first stands first: each sends the one before it away
    model_cpu_offload_seq = f"clip_vision->dino->{FluxPipeline.model_cpu_offload_seq}"
    _optional_components = [*FluxPipeline._optional_components, *TEXT_COMPONENTS, *LAYOUT_COMPONENTS]
    _exclude_from_cpu_offload = ["layout_adapter"]  # it works within the transformer's forward, not in one of its own

    def __init__(
        self,
        *,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL | PixelCodec,
        transformer: FluxTransformer2DModel,
        text_encoder: CLIPTextModel | None = None,
        tokenizer: CLIPTokenizer | None = None,
        text_encoder_2: T5EncoderModel | None = None,
        tokenizer_2: T5TokenizerFast | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        layout_adapter: FluxLayoutAdapter | None = None,
        clip_vision: CLIPVisionModelWithProjection | None = None,
        clip_processor: BaseImageProcessor | None = None,
        dino: Dinov2Model | None = None,
        dino_processor: BaseImageProcessor | None = None,
    ):
        super().__init__(
            scheduler=scheduler,
            vae=None,  # it would ask for an AutoencoderKL's channels
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            transformer=transformer,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        self.register_modules(
            vae=vae,
            layout_adapter=layout_adapter,
            clip_vision=clip_vision,
            clip_processor=clip_processor,
            dino=dino,
            dino_processor=dino_processor,
        )
        if vae.config.shift_factor is None:  # FLUX adds it whatever it is
            vae.register_to_config(shift_factor=0.0)
        self.vae_scale_factor = vae_scale_factor(vae)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor * 2)
        self.set_layout_scale()
        if layout_adapter is not None:
            if isinstance(vars(transformer).get("forward"), LayoutForward):  # of another pipeline, or of training
                detach(transformer)
            attach(transformer, layout_adapter)

    # --- the adapter ---

    def load_layout_adapter(
        self,
        pretrained_model_name_or_path: str | Path,
        subfolder: str | None = None,
        weight_name: str = WEIGHTS_NAME,
        low_cpu_mem_usage: bool = True,
    ) -> None:
        """Load an adapter and attach it to the transformer, in the place of one that is there.

        It takes the transformer's precision, and its place under offloading.

        Args:
            pretrained_model_name_or_path: folder, checkpoint, run or repository; see `files.load_adapter`.
            subfolder, weight_name: where in it the weights lie.
            low_cpu_mem_usage: make no weights that are replaced at once.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or made for another transformer.
        """
        adapter = load_adapter(pretrained_model_name_or_path, subfolder, weight_name, low_cpu_mem_usage)
        adapter.check(self.transformer)
        if adapter.dtype != self.transformer.dtype:
            adapter.to(dtype=self.transformer.dtype)
        adapter.to(self._execution_device)
        with offload.suspended(self):
            detach(self.transformer)
            attach(self.transformer, adapter)
            self.register_modules(layout_adapter=adapter)

    def unload_layout_adapter(self) -> None:
        """Give the transformer its own forwards back and let go of the adapter."""
        if self.layout_adapter is None:
            return
        with offload.suspended(self):
            detach(self.transformer)
            self.register_modules(layout_adapter=None)

    def save_layout_adapter(self, save_directory: str | Path, weight_name: str = WEIGHTS_NAME) -> None:
        """Write the adapter alone, in float32.

        Raises:
            ValueError: there is none.
        """
        save_adapter(self._need_adapter(), save_directory, weight_name)

    def _need_adapter(self) -> FluxLayoutAdapter:
        if self.layout_adapter is None:
            raise ValueError("there is no layout adapter: call `load_layout_adapter` first")
        return self.layout_adapter

    def set_layout_scale(self, layout_scale: float = 1.0, identity_scale: float = 1.0) -> None:
        """Strengths that stay; those of a call multiply them, as a LoRA's scale does what `set_adapters` says."""
        self._layout_scale, self._identity_scale = layout_scale, identity_scale

    def load_reference_encoders(self, clip: str | None = None, dino: str | None = None) -> None:
        """Load what encodes reference pictures, in the pipeline's precision.

        Args:
            clip, dino: folder or repository; those that the adapter was trained with by default.
        """
        known = REFERENCE_ENCODERS | (self._need_adapter().config.encoders or {})
        clip, dino = clip or known["clip"], dino or known["dino"]
        place = {"device": self._execution_device, "dtype": self.transformer.dtype}
        models = {
            "clip_vision": CLIPVisionModelWithProjection.from_pretrained(clip).to(**place),
            "clip_processor": AutoImageProcessor.from_pretrained(clip),
            "dino": Dinov2Model.from_pretrained(dino).to(**place),
            "dino_processor": AutoImageProcessor.from_pretrained(dino),
        }
        with offload.suspended(self):
            self.register_modules(**models)

    # --- saving and offloading: as of diffusers, with what the adapter asks for ---

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Write the whole pipeline, the adapter as one of its components.

        Raises:
            ValueError: a LoRA is loaded: the weights below it would be saved under names that load as random numbers.
        """
        for name in self._lora_loadable_modules:
            module = self.components[name]
            if module is not None and any(".base_layer." in key for key, _ in module.named_parameters()):
                raise ValueError(
                    f"`{name}` carries a LoRA, which would not be found again: `unload_lora_weights` first"
                )
        super().save_pretrained(
            save_directory, safe_serialization=safe_serialization, variant=variant, max_shard_size=max_shard_size
        )

    def enable_group_offload(
        self,
        onload_device: torch.device,
        offload_device: torch.device = torch.device("cpu"),  # noqa: B008 (as of diffusers)
        offload_type: str = "block_level",
        num_blocks_per_group: int | None = None,
        non_blocking: bool = False,
        use_stream: bool = False,
        record_stream: bool = False,
        low_cpu_mem_usage: bool = False,
        offload_to_disk_path: str | None = None,
        exclude_modules: str | list[str] | None = None,
    ) -> None:
        """As of `DiffusionPipeline`; the adapter stays on `onload_device`."""
        excluded = [exclude_modules] if isinstance(exclude_modules, str) else list(exclude_modules or ())
        super().enable_group_offload(
            onload_device,
            offload_device,
            offload_type,
            num_blocks_per_group,
            non_blocking,
            use_stream,
            record_stream,
            low_cpu_mem_usage,
            offload_to_disk_path,
            exclude_modules=[*excluded, *self._exclude_from_cpu_offload],
        )

    # --- what a call says of its objects ---

    def check_layout_inputs(
        self,
        height: int,
        width: int,
        given: dict[str, Any],
        layout: Layout | None,
        ratios: dict[str, float],
        guidance_scale: float,
    ) -> None:
        """Raise ValueError with the argument, what is allowed and what was given."""
        named = [name for name, value in given.items() if value is not None]
        if layout is not None and named:
            raise ValueError(f"`layout` says it all: leave out {', '.join(f'`{name}`' for name in named)}")
        if layout is None and given["boxes"] is None:
            if named:
                raise ValueError(f"`{named[0]}` without `boxes`")
            return
        self._need_adapter()
        side = self.vae_scale_factor * 2
        if height % side or width % side:
            raise ValueError(f"`height` and `width` must be multiples of {side}, got {height} and {width}")
        for name, ratio in ratios.items():
            if not 0 <= ratio <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], got {ratio}")
        if not 0 <= guidance_scale < math.inf:
            raise ValueError(f"`layout_guidance_scale` must be at least 0, got {guidance_scale}")

    def encode_layout(
        self, instances: list[list[Instance]], prompts: list[str] | None = None, max_sequence_length: int = 512
    ) -> Layout:
        """Encode what instances are described by.

        Args:
            instances: of each picture, from `collect_instances`.
            prompts: what T5 reads, by picture; None: spans are T5 tokens.
            max_sequence_length: T5 tokens that are kept.

        Raises:
            ValueError: an encoder is missing.
        """
        every = [instance for row in instances for instance in row]
        self._encode_references([instance for instance in every if instance.reference is not None])
        self._encode_texts([instance for instance in every if instance.prompt is not None])
        if prompts is None:
            spans = [[instance.span or (0, 0) for instance in row] for row in instances]
        else:
            prompts = [self.maybe_convert_prompt(prompt, self.tokenizer_2) for prompt in prompts]
            spans = [
                phrase_tokens(self.tokenizer_2, prompt, find_phrases(prompt, row), max_sequence_length)
                for prompt, row in zip(prompts, instances, strict=True)
            ]
        config = self._need_adapter().config
        return to_layout(instances, spans, {name: config[f"{name}_embed_dim"] for name in SOURCES})

    def _encode_texts(self, instances: list[Instance]) -> None:
        """Pooled CLIP embeddings of the prompts of boxes, by FLUX's own text encoder."""
        instances = [instance for instance in instances if "text" not in instance.embeds]
        if not instances:
            return
        if self.text_encoder is None:
            raise ValueError("`box_prompts` need the `text_encoder`; or give their embeddings as `instance_embeds`")
        texts = list(dict.fromkeys(instance.prompt for instance in instances))
        embeds = dict(zip(texts, self._get_clip_prompt_embeds(texts), strict=True))
        for instance in instances:
            instance.embeds["text"] = embeds[instance.prompt]

    def _encode_references(self, instances: list[Instance]) -> None:
        """CLIP's and DINO's embeddings of reference pictures, by those of the two that are there."""
        encoders = {
            "clip": (encode_clip_crops, self.clip_vision, self.clip_processor),
            "dino": (encode_dino_crops, self.dino, self.dino_processor),
        }
        if instances and self.clip_vision is None and self.dino is None:
            raise ValueError(
                "`reference_images` need `clip_vision` and `dino`: call `load_reference_encoders`, or give their"
                " embeddings as `instance_embeds`"
            )
        for name, (encode, model, processor) in encoders.items():
            lacking = [instance for instance in instances if name not in instance.embeds]
            if model is None or not lacking:
                continue
            pictures = [(to_pixel_values(to_rgb(image)), box) for image, box in (i.reference for i in lacking)]
            crops = torch.stack([crop_for(processor, *picture) for picture in pictures])
            embeds = encode(model, processor, crops.to(self._execution_device))
            for instance, row in zip(lacking, embeds, strict=True):
                instance.embeds[name] = row

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        true_cfg_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        sigmas: list[float] | None = None,
        guidance_scale: float = 3.5,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        negative_ip_adapter_image: PipelineImageInput | None = None,
        negative_ip_adapter_image_embeds: list[Tensor] | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[[FluxLayoutPipeline, int, Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
        boxes: Sequence | None = None,
        box_prompts: Sequence | None = None,
        reference_images: Sequence | None = None,
        foreground: Sequence | None = None,
        phrase_spans: Sequence | None = None,
        instance_embeds: dict[str, Sequence] | None = None,
        layout: Layout | None = None,
        layout_scale: float = 1.0,
        identity_scale: float = 1.0,
        grounding_ratio: float = 0.3,
        modulation_ratio: float = 1.0,
        feedback: bool = True,
        layout_guidance_scale: float = 1.0,
    ) -> FluxLayoutPipelineOutput | tuple:
        """Draw pictures.

        All up to `max_sequence_length` are the arguments of `FluxPipeline`. What follows describes the objects: one
        list per prompt, with an entry for each box; of a single prompt the outer list may be left out.

        Args:
            boxes: x1 y1 x2 y2 in [0, 1] of the picture; they may overlap. None: FLUX alone.
            box_prompts: what is in each: "a striped red disc" or, as in training, "disc, a striped red disc"; None:
                unsaid.
            reference_images: how it looks: a picture, (picture, box in it), or None.
            foreground: True, False or a strength in [0, 1] instead of the predicted one; for all boxes or none.
            phrase_spans: where the prompt speaks of it, (start, end) of characters or None; of T5 tokens where
                `prompt_embeds` are given. By default the box's prompt is looked for in the prompt.
            instance_embeds: by `text`, `clip`, `dino`: embeddings in place of prompts and references; None: has none.
            layout: all of these, ready; its rows are the prompts'.
            layout_scale, identity_scale: strength of the two effects; both 0: FLUX alone.
            grounding_ratio: share of the steps, the first ones and at least one, in which boxes act; to be tuned per
                adapter. modulation_ratio: the same of identities; 0: not at all.
            feedback: whether the bridge acts.
            layout_guidance_scale: above 1 goes beyond the boxes' effect while they act, for one more forward a step.

        Returns:
            `FluxLayoutPipelineOutput`, or a tuple of its images.
        """
        flux = {
            "prompt": prompt,
            "prompt_2": prompt_2,
            "negative_prompt": negative_prompt,
            "negative_prompt_2": negative_prompt_2,
            "true_cfg_scale": true_cfg_scale,
            "height": height or self.default_sample_size * self.vae_scale_factor,
            "width": width or self.default_sample_size * self.vae_scale_factor,
            "num_inference_steps": num_inference_steps,
            "sigmas": sigmas,
            "guidance_scale": guidance_scale,
            "num_images_per_prompt": num_images_per_prompt,
            "generator": generator,
            "latents": latents,
            "prompt_embeds": prompt_embeds,
            "pooled_prompt_embeds": pooled_prompt_embeds,
            "ip_adapter_image": ip_adapter_image,
            "ip_adapter_image_embeds": ip_adapter_image_embeds,
            "negative_ip_adapter_image": negative_ip_adapter_image,
            "negative_ip_adapter_image_embeds": negative_ip_adapter_image_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "negative_pooled_prompt_embeds": negative_pooled_prompt_embeds,
            "output_type": output_type,
            "joint_attention_kwargs": joint_attention_kwargs,
            "callback_on_step_end": callback_on_step_end,
            "callback_on_step_end_tensor_inputs": list(callback_on_step_end_tensor_inputs),
            "max_sequence_length": max_sequence_length,
        }
        described = {
            "boxes": boxes,
            "box_prompts": box_prompts,
            "reference_images": reference_images,
            "foreground": foreground,
            "phrase_spans": phrase_spans,
            "instance_embeds": instance_embeds,
        }
        ratios = {"grounding_ratio": grounding_ratio, "modulation_ratio": modulation_ratio}
        self.check_layout_inputs(flux["height"], flux["width"], described, layout, ratios, layout_guidance_scale)
        self._check_flux_inputs(flux)
        if layout is None and boxes is not None:
            layout = self._describe(flux, described)
        if layout is None or not layout.valid.any():
            images = super().__call__(**flux, return_dict=False)[0]
            return FluxLayoutPipelineOutput(images) if return_dict else (images,)
        state = self._prepare_state(
            layout, flux, self._layout_scale * layout_scale, self._identity_scale * identity_scale, feedback
        )
        state.guidance_scale = layout_guidance_scale
        flux["joint_attention_kwargs"] = {**(joint_attention_kwargs or {}), "layout": state}
        flux["callback_on_step_end"] = switching(state, grounding_ratio, modulation_ratio, callback_on_step_end)
        with self._true_cfg(flux, state):
            images = super().__call__(**flux, return_dict=False)[0]
        self._joint_attention_kwargs = joint_attention_kwargs  # the state is not kept in memory
        if not return_dict:
            return (images,)
        alpha = [row[valid > 0].tolist() for row, valid in zip(state.alpha.float(), state.valid, strict=True)]
        return FluxLayoutPipelineOutput(images, alpha)

    def _check_flux_inputs(self, flux: dict[str, Any]) -> None:
        """What `FluxPipeline` would say, before anything is encoded."""
        names = ("prompt", "prompt_2", "height", "width", "negative_prompt", "negative_prompt_2", "prompt_embeds")
        names += ("negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        names += ("callback_on_step_end_tensor_inputs", "max_sequence_length")
        self.check_inputs(**{name: flux[name] for name in names})

    def _describe(self, flux: dict[str, Any], described: dict[str, Any]) -> Layout:
        """The layout that the arguments of a call describe."""
        texts = flux["prompt"] if flux["prompt_2"] is None else flux["prompt_2"]
        texts = [texts] if isinstance(texts, str) else texts
        batch_size = len(texts) if texts is not None else len(flux["prompt_embeds"])
        instances = collect_instances(batch_size, self.layout_adapter.config.max_refs, **described)
        return self.encode_layout(instances, texts, flux["max_sequence_length"])

    def _prepare_state(
        self, layout: Layout, flux: dict[str, Any], layout_scale: float, identity_scale: float, feedback: bool
    ) -> LayoutState:
        """What the blocks see of a layout, for every picture that is drawn."""
        device, adapter = self._execution_device, self.layout_adapter
        adapter.to(device)  # where only the transformer was moved, or is offloaded
        side = self.vae_scale_factor * 2
        grid = flux["height"] // side, flux["width"] // side
        layout = layout.to(device, adapter.dtype).repeat(flux["num_images_per_prompt"])
        pos_embed = self.transformer.pos_embed
        return adapter(layout, grid, pos_embed, layout_scale, identity_scale, feedback)

    @contextmanager
    def _true_cfg(self, flux: dict[str, Any], state: LayoutState) -> Iterator[None]:
        """Within, the pass of the negative prompt sees the layout without phrases: they lie in the other prompt.

        The negative prompt is encoded here, so that its pass can be told by its embeddings.
        """
        encoded = flux["negative_prompt_embeds"] is not None and flux["negative_pooled_prompt_embeds"] is not None
        if flux["true_cfg_scale"] <= 1 or not (encoded or flux["negative_prompt"] is not None):
            yield
            return
        if not encoded:
            embeds, pooled, _ = self.encode_prompt(
                flux.pop("negative_prompt"),
                flux.pop("negative_prompt_2"),
                num_images_per_prompt=flux["num_images_per_prompt"],
                max_sequence_length=flux["max_sequence_length"],
                lora_scale=(flux["joint_attention_kwargs"] or {}).get("scale"),
            )
            flux |= {"negative_prompt_embeds": embeds, "negative_pooled_prompt_embeds": pooled}
        negative, wordless = flux["negative_prompt_embeds"], torch.zeros_like(state.phrase_spans)

        def choose(module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if kwargs["encoder_hidden_states"] is negative:
                own = {**kwargs["joint_attention_kwargs"], "layout": replace(state, phrase_spans=wordless)}
                kwargs = {**kwargs, "joint_attention_kwargs": own}
            return args, kwargs

        handle = self.transformer.register_forward_pre_hook(choose, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def switching(
    state: LayoutState, grounding_ratio: float, modulation_ratio: float, callback: Callable | None
) -> Callable[[FluxLayoutPipeline, int, Tensor, dict], dict]:
    """A callback that turns the two effects off when their share of the steps is over, and then calls the user's."""
    has_layout, has_modulation = state.use_layout, state.use_modulation and modulation_ratio > 0
    state.use_modulation = has_modulation

    def on_step_end(pipeline: FluxLayoutPipeline, index: int, timestep: Tensor, tensors: dict) -> dict:
        steps = pipeline.num_timesteps
        state.use_layout = has_layout and index + 1 < window(grounding_ratio, steps)
        state.use_modulation = has_modulation and index + 1 < window(modulation_ratio, steps)
        return {} if callback is None else callback(pipeline, index, timestep, tensors)

    return on_step_end


def window(ratio: float, steps: int) -> int:
    """So many of the first steps are this share, at least one."""
    return max(1, math.ceil(ratio * steps - 1e-9))  # 0.1 of 30 is 3
