"""Encoders of layouts: what FLUX itself would make, and tiny ones in the folder format of the real."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor

from backlot.codecs import PixelCodec
from pipelines.layout_flux.encoders import (
    FLUX_PARTS,
    IMAGE_PARTS,
    LayoutEncoders,
    crop_for,
    crop_side,
    encode_clip_crops,
    encode_dino_crops,
    find_real,
    phrase_tokens,
    scale_latents,
    unscale_latents,
)
from pipelines.layout_flux.tiny import WORDS, clip_tokenizer, save_tiny_models, t5_tokenizer

PROMPTS = ["a red square, a blue disc", "", "a green cross on a grey gradient with an unheard-of thing: 12"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def encoders(models):
    return LayoutEncoders.load(models)


def noise(count: int, side: int) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_prompts_are_encoded_as_flux_does(encoders):
    """T5 attends to the padding, so all positions are kept."""
    parts = {name: getattr(encoders, name) for name in FLUX_PARTS}
    pipeline = FluxPipeline(FlowMatchEulerDiscreteScheduler(), transformer=None, **parts)
    t5, pooled, _ = pipeline.encode_prompt(PROMPTS, max_sequence_length=24)
    assert t5.shape == (3, 24, 64)
    assert encoders.t5(PROMPTS, 24).equal(t5)
    assert encoders.clip_text(PROMPTS).equal(pooled)


def test_a_folder_of_models_has_flux_s_format(models):
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(models, subfolder="scheduler")
    assert scheduler.config.use_dynamic_shifting
    assert {path.name for path in models.iterdir()} == {*FLUX_PARTS, *IMAGE_PARTS, "taesd", "scheduler"}


def test_the_same_arguments_give_the_same_models(models, tmp_path):
    torch.manual_seed(1)
    again = LayoutEncoders.load(save_tiny_models(tmp_path))
    state = torch.get_rng_state()
    parts = (*FLUX_PARTS, *IMAGE_PARTS)
    first = LayoutEncoders.load(models)
    assert [again.identity(part) for part in parts] == [first.identity(part) for part in parts]
    torch.manual_seed(1)
    assert state.equal(torch.get_rng_state())  # nothing was drawn from the global generator


def test_other_weights_are_another_model_wherever_they_lie(models, tmp_path):
    other = save_tiny_models(tmp_path)
    path = other / "dino" / "model.safetensors"
    weights = load_file(path)
    weights["layernorm.bias"][0] += 1e-3
    save_file(weights, path, {"format": "pt"})
    first, second = LayoutEncoders.load(models), LayoutEncoders.load(other)
    assert first.identity("dino") != second.identity("dino")
    assert first.identity("clip_vision") == second.identity("clip_vision")
    assert LayoutEncoders.load(models, vae="pixels:2").identity("vae") == "pixels:2"


@pytest.mark.parametrize("make", [clip_tokenizer, t5_tokenizer])
def test_tokenizers_know_whole_words_and_can_spell_others(make):
    tokenizer = make(WORDS)
    assert [word for word in WORDS if len(tokenizer.tokenize(word)) != 1] == []
    text = "zebra-striped, no. 12!"
    tokens = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in tokens[1:-1]
    assert tokenizer.decode(tokens, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")


def test_phrases_become_token_positions(encoders):
    tokenizer, prompt = encoders.tokenizer_2, "a red square, a zebra and a blue disc"
    spans = [(0, 12), (14, 21), None, (26, 37), (15, 16)]
    found = phrase_tokens(tokenizer, prompt, spans, 64)
    ids = tokenizer(prompt)["input_ids"]
    assert [tokenizer.decode(ids[start:stop]) for start, stop in (found[0], found[3])] == [
        "a red square",
        "a blue disc",
    ]
    assert tokenizer.decode(ids[slice(*found[1])]).replace(" ", "") == "azebra"
    assert found[2] == (0, 0)
    short = phrase_tokens(tokenizer, prompt, spans, 8)
    assert short[0] == found[0]
    assert short[1] == short[3] == (0, 0)  # cut off


def test_crops_are_embedded_as_by_transformers_own_processor(models, encoders):
    levels = np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8)
    picture = torch.from_numpy(levels).permute(2, 0, 1) / 127.5 - 1
    for part, embed in {"clip_vision": encoders.clip_crops, "dino": encoders.dino_crops}.items():
        processor = AutoImageProcessor.from_pretrained(models / part)
        pixels = processor(Image.fromarray(levels), return_tensors="pt").pixel_values
        with torch.no_grad():
            output = getattr(encoders, part)(pixel_values=pixels)
        expected = output.image_embeds if part == "clip_vision" else output.last_hidden_state[:, 0]
        assert torch.allclose(embed(picture[None]), expected, atol=1e-4)


def test_gradient_passes_frozen_image_encoders(encoders):
    for model, processor, encode in (
        (encoders.clip_vision, encoders.clip_processor, encode_clip_crops),
        (encoders.dino, encoders.dino_processor, encode_dino_crops),
    ):
        picture = noise(1, 40)[0].requires_grad_()
        crops = crop_for(processor, picture, (0.2, 0.2, 0.7, 0.8))[None]
        assert crops.shape[-1] == crop_side(processor) == 56
        encode(model, processor, crops).square().sum().backward()
        assert picture.grad.abs().sum() > 0
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


def marked(colour: tuple, mark: tuple, tone: float) -> torch.Tensor:
    """A square of a colour with a spot of another, on grey."""
    picture = torch.full((3, 56, 56), tone)
    picture[:, 8:48, 8:48] = torch.tensor(colour)[:, None, None]
    picture[:, 22:34, 22:34] = torch.tensor(mark)[:, None, None]
    return picture


def test_random_features_tell_colours_and_marks_apart(encoders):
    """Two pictures of one object, on other grounds, are more alike than objects of other colours, or other marks."""
    red, blue, white, black = (1.0, -1.0, -1.0), (-1.0, -1.0, 1.0), (1.0, 1.0, 1.0), (-1.0, -1.0, -1.0)
    pictures = [marked(red, white, 0.4), marked(red, white, 0.5), marked(red, black, 0.4), marked(blue, white, 0.4)]
    for embed in (encoders.clip_crops, encoders.dino_crops):
        features = torch.nn.functional.normalize(embed(torch.stack(pictures)), dim=-1)
        same, other_mark, other_colour = (features[0] @ features[1:].T).tolist()
        assert 1 - same < 0.5 * (1 - other_mark)
        assert 1 - same < 0.2 * (1 - other_colour)


def test_latents_are_scaled_both_ways(encoders):
    pixels = noise(2, 32)
    latents = encoders.latents(pixels)
    assert latents.shape == (2, 4, 16, 16)
    scaled = scale_latents(encoders.vae, latents)
    assert torch.allclose(scaled, (latents - 0.1159) * 0.3611)
    assert torch.allclose(unscale_latents(encoders.vae, scaled), latents, atol=1e-6)
    assert encoders.latents(pixels).equal(latents)  # the mode, not a draw


def test_pixels_may_take_the_vae_s_place(models):
    encoders = LayoutEncoders.load(models, vae="pixels:2")
    assert isinstance(encoders.vae, PixelCodec)
    pixels = noise(1, 8)
    assert encoders.vae.decode(encoders.latents(pixels)).sample.equal(pixels)


def test_sources_are_found_or_named_in_one_line(models, tmp_path):
    with pytest.raises(ValueError, match="has no tokenizer, text_encoder"):
        LayoutEncoders.load(tmp_path)
    for vae in ("pixels:0", "pixels:x"):
        with pytest.raises(ValueError, match="pixels:N with N at least 1"):
            LayoutEncoders.load(models, vae=vae).vae  # noqa: B018
    (tmp_path / "facebook" / "dinov2-large").mkdir(parents=True)
    (tmp_path / "FLUX.1-dev").mkdir()
    assert find_real("facebook/dinov2-large", tmp_path) == str(tmp_path / "facebook" / "dinov2-large")
    assert find_real("black-forest-labs/FLUX.1-dev", tmp_path) == str(tmp_path / "FLUX.1-dev")
    assert find_real("madebyollin/taef1", tmp_path) == "madebyollin/taef1"


def test_models_load_when_they_are_used_and_can_be_let_go():
    encoders = LayoutEncoders.load("tiny")
    assert "dino" not in vars(encoders)
    assert encoders.dino_crops(noise(2, 56)).shape == (2, 128)
    assert not encoders.dino.training
    encoders.forget("dino", "vae")
    assert "dino" not in vars(encoders)
