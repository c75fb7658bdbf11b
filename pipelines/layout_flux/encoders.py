"""What a layout is encoded with: FLUX's own texts and latents, CLIP and DINOv2 crops; real, tiny, or of a folder.

A folder of models has FLUX's sub-folders `tokenizer`, `text_encoder` (CLIP), `tokenizer_2`, `text_encoder_2` (T5),
`vae` and `scheduler`, and beside them `clip_vision`, `dino` and, for the identity loss, `taesd`: the decoder of latents
that gradients go through. `pipelines/layout_flux/tiny.py` writes one with small random models.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    BaseImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    Dinov2Model,
    PreTrainedTokenizerBase,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.utils.hub import cached_file, extract_commit_hash

from backlot.codecs import PixelCodec, load_vae
from backlot.crops import crop, standardise
from backlot.fingerprint import fingerprint_files
from pipelines.layout_flux.tiny import save_tiny_models

REAL = {
    "flux": "black-forest-labs/FLUX.1-dev",
    "clip_vision": "openai/clip-vit-large-patch14",
    "dino": "facebook/dinov2-large",
    "taesd": "madebyollin/taef1",
}
FLUX_PARTS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "vae")
IMAGE_PARTS = ("clip_vision", "dino")
PIXELS = "pixels:"
"""`pixels:2` in place of a VAE: a `PixelCodec` of that block size."""


def object_text(category: str, caption: str) -> str:
    """What CLIP reads of an object."""
    return f"{category}, {caption}"


def encode_clip_text(text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Pooled embeddings of texts as FLUX makes them, (B, P)."""
    length = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
    tokens = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return text_encoder(tokens.input_ids.to(text_encoder.device)).pooler_output


def encode_t5(
    text_encoder_2: T5EncoderModel, tokenizer_2: T5Tokenizer, prompts: Sequence[str], max_sequence_length: int
) -> Tensor:
    """T5 embeddings of prompts as FLUX makes them, (B, max_sequence_length, width); it attends to the padding too."""
    options = {"padding": "max_length", "max_length": max_sequence_length, "truncation": True}
    tokens = tokenizer_2(list(prompts), return_tensors="pt", **options)
    return text_encoder_2(tokens.input_ids.to(text_encoder_2.device))[0]


def phrase_tokens(
    tokenizer_2: PreTrainedTokenizerBase,
    prompt: str,
    spans: Sequence[tuple[int, int] | None],
    max_sequence_length: int,
) -> list[tuple[int, int]]:
    """The T5 positions of phrases of a prompt, half open.

    Args:
        spans: characters c0 ... c1 - 1 of each phrase; None where it is not known.

    Returns:
        (0, 0) where it is not known, or is cut off.
    """
    encoded = tokenizer_2(prompt, max_length=max_sequence_length, truncation=True, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]

    def find(span: tuple[int, int] | None) -> tuple[int, int]:
        if span is None:
            return 0, 0
        inside = [place for place, (c0, c1) in enumerate(offsets) if c0 < span[1] and c1 > span[0]]
        return (inside[0], inside[-1] + 1) if inside and offsets[inside[-1]][1] >= span[1] else (0, 0)

    return [find(span) for span in spans]


def crop_side(processor: BaseImageProcessor) -> int:
    """Side of the crops that an image encoder takes, in pixels."""
    return int(processor.crop_size["height"])


def crop_for(processor: BaseImageProcessor, picture: Tensor, box: Sequence[float]) -> Tensor:
    """An object as an image encoder takes it, in [-1, 1], not yet standardised: (3, side, side).

    Args:
        picture: (3, H, W) in [-1, 1].
        box: x1 y1 x2 y2 in [0, 1], on the host.
    """
    return crop(picture, box, crop_side(processor))


def encode_clip_crops(
    clip_vision: CLIPVisionModelWithProjection, processor: BaseImageProcessor, crops: Tensor
) -> Tensor:
    """CLIP's projected embeddings of crops (B, 3, side, side) in [-1, 1]: (B, E). Differentiable."""
    pixels = standardise(crops, processor.image_mean, processor.image_std).to(clip_vision.dtype)
    return clip_vision(pixel_values=pixels).image_embeds


def encode_dino_crops(dino: Dinov2Model, processor: BaseImageProcessor, crops: Tensor) -> Tensor:
    """DINOv2's class tokens of crops (B, 3, side, side) in [-1, 1]: (B, F). Differentiable."""
    pixels = standardise(crops, processor.image_mean, processor.image_std).to(dino.dtype)
    return dino(pixel_values=pixels).pooler_output


def encode_latents(vae: AutoencoderKL | PixelCodec, pixel_values: Tensor) -> Tensor:
    """The VAE's modes of pictures (B, 3, H, W) in [-1, 1], as it gives them: not scaled."""
    return vae.encode(pixel_values.to(vae.device, vae.dtype)).latent_dist.mode()


def scale_latents(vae: AutoencoderKL | PixelCodec, latents: Tensor) -> Tensor:
    """Latents as the VAE gives them -> as FLUX takes them."""
    return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def unscale_latents(vae: AutoencoderKL | PixelCodec, latents: Tensor) -> Tensor:
    """Latents as FLUX makes them -> as the VAE takes them."""
    return latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)


class LayoutEncoders:
    """The models, each loaded when it is first used, frozen and in eval mode.

    Args:
        sources: hub id or folder of `flux`, `clip_vision`, `dino`; from `LayoutEncoders.load`.
        vae: a folder or hub id in place of FLUX's VAE, or `pixels:2`.
        device, dtype: of all of them.
    """

    def __init__(
        self,
        sources: dict[str, str],
        vae: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.sources, self.vae_source, self.device, self.dtype = sources, vae, torch.device(device), dtype

    @classmethod
    def load(
        cls,
        models: str | Path = "real",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        vae: str | None = None,
        model_root: str | Path | None = None,
    ) -> LayoutEncoders:
        """The encoders of FLUX.1-dev, small random ones, or those of a folder.

        Args:
            models: `real`, `tiny` (saved nowhere), or a folder of models.
            model_root: folder that holds real models under their hub ids, or the last parts of these; what is not
                there comes from the hub.

        Raises:
            ValueError: the folder is none of models.
        """
        if str(models) == "tiny":
            folder = tempfile.TemporaryDirectory()
            save_tiny_models(folder.name)
            encoders = cls(folder_sources(Path(folder.name)), vae, device, dtype)
            encoders._folder = folder  # goes when they go
            return encoders
        if str(models) != "real":
            return cls(folder_sources(Path(models)), vae, device, dtype)
        return cls({part: find_real(name, model_root) for part, name in REAL.items()}, vae, device, dtype)

    @functools.cached_property
    def tokenizer(self) -> CLIPTokenizer:
        return CLIPTokenizer.from_pretrained(self.sources["flux"], subfolder="tokenizer")

    @functools.cached_property
    def tokenizer_2(self) -> T5Tokenizer:
        return T5Tokenizer.from_pretrained(self.sources["flux"], subfolder="tokenizer_2")

    @functools.cached_property
    def text_encoder(self) -> CLIPTextModel:
        return self._frozen(
            CLIPTextModel.from_pretrained(self.sources["flux"], subfolder="text_encoder", dtype=self.dtype)
        )

    @functools.cached_property
    def text_encoder_2(self) -> T5EncoderModel:
        return self._frozen(
            T5EncoderModel.from_pretrained(self.sources["flux"], subfolder="text_encoder_2", dtype=self.dtype)
        )

    @functools.cached_property
    def clip_vision(self) -> CLIPVisionModelWithProjection:
        return self._frozen(
            CLIPVisionModelWithProjection.from_pretrained(self.sources["clip_vision"], dtype=self.dtype)
        )

    @functools.cached_property
    def clip_processor(self) -> BaseImageProcessor:
        return AutoImageProcessor.from_pretrained(self.sources["clip_vision"])

    @functools.cached_property
    def dino(self) -> Dinov2Model:
        return self._frozen(Dinov2Model.from_pretrained(self.sources["dino"], dtype=self.dtype))

    @functools.cached_property
    def dino_processor(self) -> BaseImageProcessor:
        return AutoImageProcessor.from_pretrained(self.sources["dino"])

    @functools.cached_property
    def vae(self) -> AutoencoderKL | PixelCodec:
        if self.vae_source is None:
            source = self.sources["flux"]
            local = Path(source, "vae")
            vae = load_vae(str(local)) if local.is_dir() else AutoencoderKL.from_pretrained(source, subfolder="vae")
        elif self.vae_source.startswith(PIXELS):
            vae = load_vae(None, block_size=block_size(self.vae_source))
        else:
            vae = load_vae(self.vae_source)
        return self._frozen(vae if vae.dtype == self.dtype else vae.to(self.dtype))

    def _frozen(self, model: torch.nn.Module) -> torch.nn.Module:
        return model.to(self.device).requires_grad_(False).eval()

    def forget(self, *names: str) -> None:
        """Let go of models: the next step's may need their room."""
        for name in names:
            self.__dict__.pop(name, None)

    def identity(self, part: str) -> str:
        """Which model a part is, without loading it: hub id and commit, or a hash of the folder's files."""
        if part == "vae" and self.vae_source is not None:
            if self.vae_source.startswith(PIXELS):
                return self.vae_source
            return identify(self.vae_source, "")
        if part in FLUX_PARTS:
            return identify(self.sources["flux"], part)
        return identify(self.sources[part], "")

    @torch.inference_mode()
    def clip_text(self, texts: Sequence[str]) -> Tensor:
        """Pooled CLIP embeddings, (B, P)."""
        return encode_clip_text(self.text_encoder, self.tokenizer, texts)

    @torch.inference_mode()
    def t5(self, prompts: Sequence[str], max_sequence_length: int) -> Tensor:
        """T5 embeddings, (B, max_sequence_length, width)."""
        return encode_t5(self.text_encoder_2, self.tokenizer_2, prompts, max_sequence_length)

    @torch.inference_mode()
    def clip_crops(self, crops: Tensor) -> Tensor:
        """CLIP embeddings of crops (B, 3, side, side) in [-1, 1]: (B, E)."""
        return encode_clip_crops(self.clip_vision, self.clip_processor, crops.to(self.device))

    @torch.inference_mode()
    def dino_crops(self, crops: Tensor) -> Tensor:
        """DINOv2 embeddings of crops (B, 3, side, side) in [-1, 1]: (B, F)."""
        return encode_dino_crops(self.dino, self.dino_processor, crops.to(self.device))

    @torch.inference_mode()
    def latents(self, pixel_values: Tensor) -> Tensor:
        """Modes of pictures (B, 3, H, W) in [-1, 1], not scaled."""
        return encode_latents(self.vae, pixel_values)


def block_size(vae: str) -> int:
    """2 of `pixels:2`; ValueError if it is no positive number."""
    number = vae.removeprefix(PIXELS)
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"the VAE must be a folder, a hub id or {PIXELS}N with N at least 1, got {vae!r}")
    return int(number)


def folder_sources(folder: Path) -> dict[str, str]:
    """The sources in a folder of models; ValueError names what is missing."""
    missing = [part for part in (*FLUX_PARTS, *IMAGE_PARTS) if not (folder / part).is_dir()]
    if missing:
        raise ValueError(f"{folder} is no folder of models: it has no {', '.join(missing)}")
    return {"flux": str(folder), **{part: str(folder / part) for part in (*IMAGE_PARTS, "taesd")}}


def find_real(name: str, model_root: str | Path | None) -> str:
    """A hub id, or its folder below `model_root`."""
    if model_root is None:
        return name
    places = (Path(model_root, name), Path(model_root, name.split("/")[-1]))
    return str(next((place for place in places if place.is_dir()), name))


def identify(source: str, subfolder: str) -> str:
    """Hub id, sub-folder and commit; of a local folder, a hash of its files, wherever it lies."""
    folder = Path(source, subfolder)
    if folder.is_dir():
        return fingerprint_files(folder, sorted(_weights_and_settings(folder)))
    name = "tokenizer_config.json" if subfolder.startswith("tokenizer") else "config.json"
    commit = extract_commit_hash(cached_file(source, name, subfolder=subfolder), None)
    return "/".join(filter(None, (source, subfolder))) + f"@{commit}"


def _weights_and_settings(folder: Path) -> Iterator[str]:
    for path in folder.iterdir():
        if path.is_file() and path.suffix in (".safetensors", ".json", ".model", ".txt"):
            yield path.name
