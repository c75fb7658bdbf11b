"""Encoders: CroCo v2's weights in our own transformer, and the DINO family through transformers."""

import logging

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPVisionConfig, Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from pipelines.vpog import VPOGModel, read_encoder, save_tiny_croco, save_tiny_dino
from pipelines.vpog.encoders import create_encoder

DINO = {"dinov2": Dinov2Model, "dinov2_with_registers": Dinov2WithRegistersModel, "dinov3_vit": DINOv3ViTModel}


def pictures(side: int, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def standardised(images: torch.Tensor, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD) -> torch.Tensor:
    return (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def load(source) -> torch.nn.Module:
    found = read_encoder(source)
    encoder = create_encoder(found.kind, found.config)
    encoder.load_state_dict(found.weights)
    return encoder.eval()


def reference_croco(weights: dict, images: torch.Tensor, heads: int, patch: int) -> torch.Tensor:
    """CroCo v2's encoder by its published names, with rotary positions as complex numbers."""

    def linear(values, name):
        return F.linear(values, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(values, name):
        return F.layer_norm(values, values.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    def turn(values):  # (B, heads, N, D): y, then x; in each, real parts and then imaginary ones
        side, quarter = round(values.shape[2] ** 0.5), values.shape[-1] // 4
        steps = torch.arange(side).float()[:, None] * 100.0 ** (-2 * torch.arange(quarter) / (2 * quarter))
        row, column = steps.repeat_interleave(side, 0), steps.repeat(side, 1)
        parts = []
        for half, angle in zip(values.chunk(2, dim=-1), (row, column), strict=True):
            number = torch.complex(*(part.contiguous() for part in half.chunk(2, dim=-1)))
            number = number * torch.polar(torch.ones_like(angle), angle)
            parts += [number.real, number.imag]
        return torch.cat(parts, dim=-1)

    x = F.conv2d(images, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2)
    layer = 0
    while f"enc_blocks.{layer}.norm1.weight" in weights:
        name = f"enc_blocks.{layer}"
        batch, tokens, width = x.shape
        qkv = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").view(batch, tokens, 3, heads, width // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = (turn(q) @ turn(k).mT * (width // heads) ** -0.5).softmax(-1)
        x = x + linear((attention @ v).transpose(1, 2).flatten(2), f"{name}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
        layer += 1
    return norm(x, "enc_norm")


def test_croco_weights_give_croco_s_tokens(tmp_path):
    path = save_tiny_croco(tmp_path / "croco.pth")
    images = pictures(32)
    expected = reference_croco(torch.load(path, weights_only=True)["model"], standardised(images), 4, 8)
    with torch.no_grad():
        found = load(path)(images)
    assert found.shape == (2, 16, 64)
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_croco_s_sizes_are_the_file_s_and_its_decoder_is_left_out(tmp_path):
    path = save_tiny_croco(tmp_path / "croco.pth", patch_size=16, hidden_size=32, num_layers=3, num_attention_heads=2)
    found = read_encoder(path)
    sizes = {"patch_size": 16, "hidden_size": 32, "num_layers": 3, "num_attention_heads": 2}
    assert {key: found.config[key] for key in sizes} == sizes
    assert found.config["rope_base"] == 100
    assert {name.split(".")[0] for name in found.weights} == {"patch_embed", "blocks", "norm"}
    model = VPOGModel.from_preset("tiny", path)
    assert (model.patch_size, model.grid_size) == (16, 4)
    assert model.encoder.state_dict()["blocks.2.mlp.0.weight"].equal(found.weights["blocks.2.mlp.0.weight"])


def test_the_licence_is_said_once(tmp_path, caplog):
    path = save_tiny_croco(tmp_path / "croco.pth")
    with caplog.at_level(logging.WARNING):
        read_encoder(path)
        read_encoder(path)
    assert [record.getMessage() for record in caplog.records if "CC BY-NC-SA 4.0" in record.getMessage()] == [
        f"the CroCo v2 weights in {path} are licensed CC BY-NC-SA 4.0 (attribution, no commercial use, share alike); "
        "so is what is trained from them"
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["croco_kwargs"].update(pos_embed="cosine"), "no CroCo v2 checkpoint: its `pos_embed` is cosine"),
        (lambda c: c.pop("croco_kwargs"), "no CroCo v2 checkpoint: its `pos_embed` is cosine"),
        (lambda c: c.pop("model"), "no CroCo checkpoint: it has no `model`"),
        (lambda c: c["model"].update(extra=torch.zeros(1)), "no CroCo checkpoint: it has an unknown weight extra"),
    ],
)
def test_other_checkpoints_are_refused(tmp_path, change, message):
    path = save_tiny_croco(tmp_path / "croco.pth")
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=message):
        read_encoder(path)


@pytest.mark.parametrize("content", [{"model": CLIPVisionConfig()}, None])
def test_only_weights_are_read(tmp_path, content):
    """Neither objects, whose reading runs code, nor a damaged file."""
    path = tmp_path / "croco.pth"
    torch.save(content, path)
    if content is None:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"croco\.pth is no file of weights alone: "):
        read_encoder(path)


def test_a_missing_checkpoint_is_not_looked_for_elsewhere(tmp_path):
    with pytest.raises(ValueError, match=r"croco\.pth does not exist; CroCo v2's weights are at"):
        read_encoder(tmp_path / "croco.pth")


@pytest.mark.parametrize("kind", DINO)
def test_dino_tokens_are_transformers_own_without_class_and_registers(tmp_path, kind):
    """With the normalisation of its own image processor; patch 14 gives 16 x 16 tokens at 224 pixels."""
    mean, std = (0.43, 0.411, 0.296), (0.213, 0.156, 0.143)
    folder = save_tiny_dino(tmp_path, kind, image_mean=mean, image_std=std)
    encoder, images = load(folder), pictures(224)
    side = 224 // encoder.patch_size
    assert side == (14 if kind == "dinov3_vit" else 16)
    with torch.no_grad():
        found = encoder(images)
        output = DINO[kind].from_pretrained(folder)(pixel_values=standardised(images, mean, std))
    expected = output.last_hidden_state[:, -(side**2) :]
    assert found.shape == (2, side**2, 64)
    assert (found - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("kind", DINO)
def test_dino_encodes_alike_in_training(tmp_path, kind):
    encoder, images = load(save_tiny_dino(tmp_path, kind)), pictures(112)
    with torch.no_grad():
        assert encoder(images).equal(encoder.train()(images))


@pytest.mark.parametrize("kind", DINO)
def test_no_dino_weight_is_without_use(tmp_path, kind):
    encoder = load(save_tiny_dino(tmp_path, kind)).train()
    encoder(pictures(112)).square().sum().backward()
    assert [name for name, value in encoder.named_parameters() if value.grad is None] == []


def test_a_model_of_another_kind_is_refused(tmp_path):
    CLIPVisionConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a clip_vision_model, none of dinov2, dinov2_with_registers, dinov3_vit"):
        read_encoder(tmp_path)
    with pytest.raises(ValueError, match=r"`encoder_type` must be one of vit, dinov2, .*, got 'clip'"):
        create_encoder("clip", {})
    with pytest.raises(ValueError, match=r"`hidden_size` \(60\) must be a multiple of 4 x `num_attention_heads` \(4\)"):
        create_encoder("vit", {"hidden_size": 60, "num_attention_heads": 4})


def test_the_same_seed_gives_the_same_tiny_models(tmp_path):
    first, again, other = (
        read_encoder(save_tiny_dino(tmp_path / str(number), seed=seed)) for number, seed in enumerate((0, 0, 1))
    )
    name = "model.encoder.layer.0.mlp.fc1.weight"
    assert first.weights[name].equal(again.weights[name])
    assert not first.weights[name].equal(other.weights[name])
