"""Small random models in the folder format of the real ones: tests and demos load them by the same code.

The classes are the real ones: FLUX's CLIP and T5 text encoders with tokenizers that know whole words, its VAE, its
scheduler, `AutoencoderTiny`, a CLIP vision tower and DINOv2. Nothing is trained, but the weights are scaled so that
random features still tell coloured shapes, and marks on them, apart.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

WORDS = tuple(
    word
    for line in (
        "a an and the of with on in at to is are it its by from for one two three four five six seven eight several",
        "scene picture photo image background gradient noise plain weak ground pattern texture colour color colored",
        "coloured object objects shape shapes thing mark letter digit number composite part parts",
        "left right top bottom centre center middle above below behind front under over near far beside between next",
        "small large big tiny huge light dark bright pale soft",
        "red green blue yellow orange purple violet magenta pink cyan teal brown black white grey gray navy lime olive",
        "maroon arrow",
        "square disc disk circle triangle star ring cross rectangle bar box dot dots diamond heart half frame stripe",
        "stripes flat striped stripy dotted checker checkered chequered checked solid horizontal vertical diagonal",
        "person dog cat car bird horse tree house bottle chair table cup book ball",
    )
    for word in line.split()
)
CHARACTERS = string.ascii_letters + string.digits + string.punctuation
BYPASS_RATIO = 4.0
NUM_CALIBRATION = 256


def save_tiny_models(
    folder: str | Path,
    *,
    words: Sequence[str] = (),
    text_width: int = 64,
    clip_width: int = 64,
    dino_width: int = 128,
    crop_side: int = 56,
    latent_channels: int = 4,
    seed: int = 0,
) -> Path:
    """Write a folder of models as FLUX.1-dev has them, without its transformer, and the image encoders beside them.

    The same arguments give the same weights.

    Args:
        words: further words that are one token each.
        text_width: of T5.
        clip_width: of both CLIP towers, of their embeddings, and of the pooled text.
        dino_width: of DINOv2; a multiple of 4.
        crop_side: of both image encoders' input, pixels; a multiple of 8, the side of their patches.
        latent_channels: of the VAE, whose cells measure 2 pixels.

    Returns:
        The folder.
    """
    folder = Path(folder)
    words = list(dict.fromkeys((*WORDS, *(word.lower() for word in words))))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = _texts(words, text_width, clip_width) | _vaes(latent_channels)
        parts |= _image_encoders(clip_width, dino_width, crop_side)
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    for name, mean, std, kind in (
        ("clip_vision", OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, CLIPImageProcessorPil),
        ("dino", IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, BitImageProcessorPil),
    ):
        size = {"height": crop_side, "width": crop_side}
        processor = kind(size={"shortest_edge": crop_side}, crop_size=size, image_mean=mean, image_std=std)
        processor.save_pretrained(folder / name)
    return folder


def clip_tokenizer(words: Sequence[str]) -> CLIPTokenizer:
    """FLUX's first tokenizer, knowing some words and every character."""
    characters = sorted(set(CHARACTERS.lower()))
    merges = _learn_merges(words)
    names = ["<|startoftext|>", "<|endoftext|>", *characters, *(f"{character}</w>" for character in characters)]
    names += [first + second for first, second in merges]
    vocabulary = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def _learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges after which each of the words is one token; the `tokenizers` library orders ties at random."""
    pieces = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges = []
    while counts := Counter(pair for word in pieces for pair in pairwise(word)):
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        for word in pieces:
            for place in range(len(word) - 1, 0, -1):
                if tuple(word[place - 1 : place + 1]) == best:
                    word[place - 1 : place + 1] = ["".join(best)]
    return merges


def t5_tokenizer(words: Sequence[str]) -> T5Tokenizer:
    """FLUX's second tokenizer, knowing some words and every character."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    whole = [(f"▁{word}", -1.0) for word in dict.fromkeys((*words, *string.ascii_letters, *string.digits))]
    return T5Tokenizer(
        vocab=[*special, *whole, *((character, -10.0) for character in CHARACTERS)], extra_ids=0, model_max_length=512
    )


def _texts(words: Sequence[str], text_width: int, clip_width: int) -> dict[str, nn.Module | CLIPTokenizer]:
    tokenizer, tokenizer_2 = clip_tokenizer(words), t5_tokenizer(words)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=clip_width,
            intermediate_size=2 * clip_width,
            projection_dim=clip_width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    text_encoder_2 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer_2),
            d_model=text_width,
            d_kv=text_width // 4,
            d_ff=2 * text_width,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )
    _spread(text_encoder, biased=False)
    phrases = [" ".join(words[place] for place in torch.randint(len(words), (4,))) for _ in range(NUM_CALIBRATION)]
    tokens = tokenizer(phrases, padding="longest", return_tensors="pt")
    with torch.no_grad():
        _centre(text_encoder.final_layer_norm, text_encoder.eval()(tokens.input_ids).pooler_output)
    return {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "tokenizer_2": tokenizer_2,
        "text_encoder_2": text_encoder_2,
    }


def _vaes(latent_channels: int) -> dict[str, nn.Module]:
    """FLUX's VAE, and the tiny one that takes normalised latents; both of two levels."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=latent_channels,
        sample_size=32,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    taesd = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=latent_channels,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    return {"vae": vae, "taesd": taesd}


def _image_encoders(clip_width: int, dino_width: int, crop_side: int) -> dict[str, nn.Module]:
    clip_vision = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=clip_width,
            intermediate_size=4 * clip_width,
            projection_dim=clip_width,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=crop_side,
            patch_size=8,
        )
    )
    dino = Dinov2Model(
        Dinov2Config(
            hidden_size=dino_width,
            num_hidden_layers=2,
            num_attention_heads=4,
            mlp_ratio=4,
            image_size=crop_side,
            patch_size=8,
            layerscale_value=1.0,
        )
    )
    nn.init.normal_(clip_vision.vision_model.embeddings.position_embedding.weight, std=1.0)
    nn.init.normal_(dino.embeddings.position_embeddings, std=0.3)
    pictures = _blobs(NUM_CALIBRATION, crop_side)
    norms = {clip_vision.vision_model: clip_vision.vision_model.post_layernorm, dino: dino.layernorm}
    for model, norm in norms.items():
        _spread(model)
        with torch.no_grad():
            if model is dino:
                _even_out(dino, pictures)
            _centre(norm, model.eval()(pixel_values=pictures).pooler_output)
    _spread(clip_vision.visual_projection)
    return {"clip_vision": clip_vision, "dino": dino}


def _spread(model: nn.Module, biased: bool = True) -> None:
    """Random layers that keep the variance of what passes them: with the usual small ones all inputs look alike.

    Args:
        biased: with random biases: what is normalised, or bent, behind a layer would else not see how strong an input
            is.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if biased and module.bias is not None:
                nn.init.normal_(module.bias, std=1.0 if isinstance(module, nn.Conv2d) else 0.5)


def _even_out(dino: Dinov2Model, pictures: Tensor) -> None:
    """Let what differs little between pictures count for more: a mark on an object, beside the object's colour.

    Random features vary mostly with a picture's main colours. The last layer's principal components are divided by
    their standard deviations, and the layer is made strong beside what bypasses it.
    """
    outputs, last = [], dino.encoder.layer[-1].mlp
    hook = last.register_forward_hook(lambda module, given, output: outputs.append(output[:, 0]))
    dino.eval()(pixel_values=pictures)
    hook.remove()
    features = outputs[0] - outputs[0].mean(0)
    variances, components = torch.linalg.eigh(features.T @ features / len(features))
    variances = (variances / variances.max()).clamp(min=1e-4)
    factors = variances**-0.5
    factors *= BYPASS_RATIO * (variances.sum() / (variances * factors**2).sum()).sqrt()
    change = components @ torch.diag(factors) @ components.T
    last.fc2.bias.copy_(change @ (last.fc2.bias - outputs[0].mean(0)))
    last.fc2.weight.copy_(change @ last.fc2.weight)


def _centre(norm: nn.LayerNorm, features: Tensor) -> None:
    """Move the mean of a last norm's features to 0: a cosine then compares what differs between inputs."""
    norm.bias.data.sub_(features.mean(0))


def _blobs(count: int, side: int) -> Tensor:
    """Pictures of a rectangle with a smaller one on it, (count, 3, side, side), standardised as encoders take them."""
    pictures = torch.rand(count, 3, 1, 1).repeat(1, 1, side, side)
    for low, high in ((side // 2, side), (side // 6, side // 3)):
        for picture in pictures:
            height, width = torch.randint(low, high, (2,)).tolist()
            top, left = (int(torch.randint(0, side - extent + 1, ())) for extent in (height, width))
            picture[:, top : top + height, left : left + width] = torch.rand(3, 1, 1)
    return (pictures - 0.5) * 4
