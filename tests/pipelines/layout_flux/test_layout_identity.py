"""Crops of latents as DINOv2 sees them: the reference's own pixels, with a gradient; and whose are looked at."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoImageProcessor, Dinov2Model

from backlot.codecs import PixelCodec
from backlot.crops import HostBoxes, crop
from pipelines.layout_flux import IdentityEncoder, IdentityTargets
from pipelines.layout_flux.encoders import encode_dino_crops, scale_latents
from pipelines.layout_flux.tiny import save_tiny_models

BOXES = [(0.1, 0.2, 0.5, 0.9), (0.0, 0.0, 1.0, 1.0), (0.7, 0.0, 1.0, 0.3), (0.41, 0.52, 0.46, 0.55)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def encoder(models):
    vae = PixelCodec(block_size=2, scaling_factor=0.7, shift_factor=0.1)
    dino, processor = Dinov2Model.from_pretrained(models / "dino"), AutoImageProcessor.from_pretrained(models / "dino")
    return IdentityEncoder(vae, dino.requires_grad_(False).eval(), processor, margin=1)


@pytest.mark.parametrize("box", BOXES)
def test_a_crop_of_the_true_latents_is_that_of_the_picture(encoder, box):
    """The reference, the loss and the evaluation cut the same pixels."""
    picture = torch.rand(3, 32, 48) * 2 - 1
    latents = scale_latents(encoder.decoder, encoder.decoder.encode(picture[None]).latent_dist.mode())[0]
    torch.testing.assert_close(encoder.crop(latents, box), crop(picture, box, 56), rtol=0, atol=1e-5)


def test_each_object_has_the_embedding_of_its_own_crop(encoder):
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = scale_latents(encoder.decoder, encoder.decoder.encode(pictures).latent_dist.mode())
    found = encoder(latents, [(1, BOXES[0]), (0, BOXES[2])])
    crops = torch.stack([crop(pictures[1], BOXES[0], 56), crop(pictures[0], BOXES[2], 56)])
    torch.testing.assert_close(found, encode_dino_crops(encoder.dino, encoder.processor, crops), rtol=1e-4, atol=1e-4)


def test_the_gradient_reaches_the_cells_around_the_box_and_no_others(models):
    encoder = IdentityEncoder.load(
        str(models / "dino"), str(models / "taesd"), PixelCodec(), torch.device("cpu"), margin=2
    )
    latents = torch.randn(1, 4, 16, 16, requires_grad=True)
    encoder(latents, [(0, (0.5, 0.5, 0.75, 0.75))]).square().sum().backward()
    touched = latents.grad[0].abs().sum(0) > 0
    assert touched[8:12, 8:12].all()
    assert not touched[:5].any()
    assert not touched[:, 15:].any()
    assert [p for module in (encoder.decoder, encoder.dino) for p in module.parameters() if p.grad is not None] == []


class Items(Dataset):
    fingerprint, empty_prompt = "x", ()

    def __len__(self) -> int:
        return 1

    def __getitem__(self, key) -> dict:
        yes = torch.tensor([True, True, True, False])
        return {
            "boxes": HostBoxes(np.full((4, 4), 0.5)),
            "valid": yes,
            "is_foreground": torch.tensor([True, False, True, True]),
            "has_reference": torch.tensor([True, True, False, True]),
            "sample_id": "a",
        }


def test_only_foreground_objects_with_a_reference_have_an_identity_to_keep():
    item = IdentityTargets(Items())[0]
    assert item["identity_boxes"].values[:, 0].tolist() == [0.5, 0, 0, 0]
    assert "sample_id" not in item
