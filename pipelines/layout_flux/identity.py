"""Crops of latents as DINOv2 sees them, with a gradient back to the latents: what the identity loss compares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoImageProcessor, BaseImageProcessor, Dinov2Model

from backlot.codecs import PixelCodec, vae_scale_factor
from backlot.crops import HostBoxes, crop_window, cut, latent_window
from backlot.samples import SampleKey
from pipelines.layout_flux.encoders import crop_side, encode_dino_crops, unscale_latents


class IdentityTargets(Dataset):
    """Items of a LayoutDataset, and in each `identity_boxes`: the boxes of objects whose identity is to be kept.

    These are foreground objects with a reference; zeros elsewhere. On the host, where crops are chosen.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self.fingerprint, self.empty_prompt = dataset.fingerprint, dataset.empty_prompt

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> dict:
        item = {name: value for name, value in self.dataset[key].items() if name != "sample_id"}  # no text on a device
        wanted = item["valid"] & item["is_foreground"] & item["has_reference"]
        return {**item, "identity_boxes": HostBoxes(item["boxes"].values * wanted.numpy()[:, None])}


class IdentityEncoder:
    """Decodes the surroundings of a box alone, cuts the object out as its reference was cut out, and embeds it.

    Args:
        decoder: of latents; `AutoencoderTiny` costs a fraction of FLUX's own. Frozen, but gradients pass.
        dino, processor: that made the references' embeddings.
        side: of the crops in pixels; the processor's by default.
        margin: latent cells decoded around a crop.
    """

    def __init__(
        self,
        decoder: AutoencoderTiny | AutoencoderKL | PixelCodec,
        dino: Dinov2Model,
        processor: BaseImageProcessor,
        side: int | None = None,
        margin: int = 4,
    ):
        self.decoder, self.dino, self.processor = decoder.requires_grad_(False).eval(), dino, processor
        self.side, self.margin = side or crop_side(processor), margin
        if isinstance(decoder, AutoencoderTiny):  # its own spatial_scale_factor is a power of its number of colours
            self.factor = 2 ** (len(decoder.config.decoder_block_out_channels) - 1)
        else:
            self.factor = vae_scale_factor(decoder)
        patch = dino.config.patch_size
        if self.side % patch:
            raise ValueError(f"`crop_size` must be a multiple of DINOv2's patches of {patch} pixels, not {self.side}")

    @classmethod
    def load(
        cls,
        encoder: str,
        decoder: str | None,
        vae: AutoencoderKL | PixelCodec,
        device: torch.device,
        side: int | None = None,
        margin: int = 4,
    ) -> IdentityEncoder:
        """From folders or hub names; the base's own `vae` decodes where there is no `decoder`."""
        dino = Dinov2Model.from_pretrained(encoder).requires_grad_(False).eval()
        small = vae if decoder is None else AutoencoderTiny.from_pretrained(decoder)
        processor = AutoImageProcessor.from_pretrained(encoder)
        return cls(small.to(device), dino.to(device), processor, side, margin)

    def crop(self, latents: Tensor, box: Sequence[float]) -> Tensor:
        """The object in a box of one picture's scaled latents (C, h, w) -> (3, side, side), about [-1, 1].

        Args:
            box: x1 y1 x2 y2 in [0, 1], on the host.
        """
        height, width = latents.shape[-2:]
        window = crop_window(box, height * self.factor, width * self.factor)
        cells = latent_window(window, self.factor, self.margin, height, width)
        decoded = self.decoder.decode(unscale_latents(self.decoder, cells.of(latents)[None])).sample[0]
        return cut(decoded, window.within(cells, self.factor), self.side)

    def __call__(self, latents: Tensor, boxes: Sequence[tuple[int, Sequence[float]]]) -> Tensor:
        """Embeddings (K, F) of K objects, at least one, each a picture of the batch (B, C, h, w) and a box in it."""
        crops = torch.stack([self.crop(latents[picture], box) for picture, box in boxes])
        return encode_dino_crops(self.dino, self.processor, crops)
