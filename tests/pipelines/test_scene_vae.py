"""OccupancyVAE: its published shape, its interface, the divergence in five dimensions, TRELLIS's files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from pipelines.shortcut_scene import OccupancyVAE
from pipelines.shortcut_scene.vae import PRESETS, TRELLIS_FILES, GridGaussian, depth_to_space, space_to_depth

TINY = {"sample_size": 8, "latent_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1, "mid_layers": 1}


def create(**config) -> OccupancyVAE:
    """A tiny network whose every weight has been moved, so that nothing is 0 by initialisation."""
    torch.manual_seed(0)
    vae = OccupancyVAE(**TINY | config).eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return vae


def boxes(count: int = 3, side: int = 8) -> torch.Tensor:
    """Boxes with a random corner, (count, 1, side, side, side)."""
    generator = torch.Generator().manual_seed(0)
    grids = torch.zeros(count, 1, side, side, side)
    for grid in grids:
        x, y, z = torch.randint(side // 2, (3,), generator=generator).tolist()
        grid[0, x:, y : side - 1, : side - z] = 1
    return grids


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("preset", "encoder", "decoder", "tokens", "channels"),
    [
        ("demo", 341_888, 576_496, 8, 4),
        ("toy", 1_073_904, 1_592_785, 64, 8),
        ("mid", 2_393_440, 3_571_129, 512, 8),
        ("trellis", 59_298_192, 73_671_201, 4096, 8),
    ],
)
def test_presets_have_the_parameters_of_the_table(preset, encoder, decoder, tokens, channels):
    with torch.device("meta"):
        vae = OccupancyVAE.from_preset(preset)
    assert (count(vae.encoder), count(vae.decoder)) == (encoder, decoder)
    assert (vae.num_tokens, vae.latent_channels) == (tokens, channels)
    grid = torch.zeros(1, 1, *[vae.config.sample_size] * 3, device="meta")
    latents = vae.encode(grid).latent_dist.mode()
    assert vae.to_tokens(latents).shape == (1, tokens, channels)
    assert vae.decode(latents).sample.shape == grid.shape


def test_a_preset_can_be_changed_and_others_are_refused():
    assert OccupancyVAE.from_preset("demo", latent_channels=3).latent_channels == 3
    with pytest.raises(ValueError, match="`preset` must be one of demo, toy, mid, trellis, not 'huge'"):
        OccupancyVAE.from_preset("huge")
    with pytest.raises(ValueError, match="`sample_size` 12 must be a multiple of 8, the side that a token covers"):
        OccupancyVAE.from_preset("demo", sample_size=12)
    assert all(preset["sample_size"] in (16, 32, 64) for preset in PRESETS.values())


def test_the_divergence_in_five_dimensions_is_the_closed_form():
    """torch.distributions', a mean over the grid per sample; diffusers' sums three of the four axes."""
    torch.manual_seed(0)
    mean, logvar = torch.randn(3, 4, 2, 2, 2), torch.randn(3, 4, 2, 2, 2)
    posterior = GridGaussian(mean, logvar)
    normal = torch.distributions.Normal
    wanted = torch.distributions.kl_divergence(normal(mean, (0.5 * logvar).exp()), normal(0.0, 1.0))
    torch.testing.assert_close(posterior.kl(), wanted.flatten(1).mean(1))
    torch.testing.assert_close(GridGaussian(mean * 0, logvar * 0).kl(), torch.zeros(3))
    assert posterior.mode() is mean


def test_samples_of_the_posterior_have_its_mean_and_deviation():
    mean, logvar = torch.tensor([1.0, -2.0]), torch.tensor([0.0, -3.0])
    shape = (1, 2, 40, 40, 40)
    posterior = GridGaussian(*(x.view(1, 2, 1, 1, 1).expand(shape) for x in (mean, logvar)))
    draws = posterior.sample(torch.Generator().manual_seed(0)).flatten(2)[0]
    torch.testing.assert_close(draws.mean(1), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(draws.std(1), (0.5 * logvar).exp(), atol=0.01, rtol=0)
    again = posterior.sample(torch.Generator().manual_seed(0)).flatten(2)[0]
    assert torch.equal(draws, again)


def test_forward_is_encode_and_decode():
    vae, grids = create(), boxes()
    with torch.no_grad():
        posterior = vae.encode(grids).latent_dist
        torch.testing.assert_close(vae(grids, sample_posterior=False).sample, vae.decode(posterior.mode()).sample)
        z = posterior.sample(torch.Generator().manual_seed(1))
        output = vae(grids, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(output.sample, vae.decode(z).sample)
        torch.testing.assert_close(output.latent_dist.kl(), posterior.kl())
        assert not torch.allclose(output.sample, vae.decode(posterior.mode()).sample)
        assert torch.equal(vae.encode(grids, return_dict=False)[0].mean, posterior.mean)
        assert torch.equal(vae.decode(z, return_dict=False)[0], vae.decode(z).sample)


def test_tokens_are_the_cells_of_the_latent_grid():
    vae = create()
    z = torch.randn(2, 4, 4, 4, 4)
    tokens = vae.to_tokens(z)
    assert tokens.shape == (2, vae.num_tokens, vae.latent_channels) == (2, 64, 4)
    assert torch.equal(tokens[1, 1 * 16 + 2 * 4 + 3], z[1, :, 1, 2, 3])
    assert torch.equal(vae.to_latents(tokens), z)
    for wrong in (tokens.transpose(1, 2), tokens[:, :-1]):
        with pytest.raises(ValueError, match=r"`tokens` must have shape \(B, 64, 4\)"):
            vae.to_latents(wrong)


def test_a_grid_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"`x` must have shape \(B, 1, 8, 8, 8\), not \(3, 1, 16, 16, 16\)"):
        create().encode(boxes(side=16))


def test_batches_give_what_their_items_give():
    vae, grids = create(), boxes()
    with torch.no_grad():
        together = vae(grids, sample_posterior=False).sample
        for i in range(len(grids)):
            alone = vae(grids[i : i + 1], sample_posterior=False).sample
            torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-5)


def test_pixel_shuffle_in_three_dimensions():
    """Channel 8 c + 4 i + 2 j + k goes to offset (i, j, k) of channel c, as in TRELLIS."""
    x = torch.randn(2, 16, 3, 3, 3)
    shuffled = depth_to_space(x, 2)
    assert shuffled.shape == (2, 2, 6, 6, 6)
    for c, i, j, k in ((0, 0, 0, 1), (0, 1, 0, 0), (1, 0, 1, 0), (1, 1, 1, 1)):
        assert torch.equal(shuffled[:, c, i::2, j::2, k::2], x[:, 8 * c + 4 * i + 2 * j + k])
    assert torch.equal(space_to_depth(shuffled, 2), x)
    assert torch.equal(space_to_depth(x, 1), x)


def test_the_norm_is_over_channels_only():
    """Neither other cells nor other samples take part: a cell's norm does not see its neighbours."""
    norm = create().decoder.blocks[0].norm1
    x = torch.randn(2, 16, 4, 4, 4)
    changed = x.clone()
    changed[0, :, 0, 0, 0] += torch.randn(16)
    difference = (norm(changed) - norm(x)).abs().amax(1)
    assert difference[0, 0, 0, 0] > 0.1
    difference[0, 0, 0, 0] = 0
    assert not difference.any()


@pytest.mark.parametrize("patch_size", [1, 2])
def test_gradients_reach_every_parameter_and_checkpointing_changes_none(patch_size):
    gradients = []
    for checkpointing in (False, True):
        vae = create(patch_size=patch_size)
        if checkpointing:
            vae.enable_gradient_checkpointing()
        output = vae(boxes(), generator=torch.Generator().manual_seed(0))
        (output.sample.square().mean() + output.latent_dist.kl().mean()).backward()
        gradients.append({name: parameter.grad for name, parameter in vae.named_parameters()})
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_gradient_checkpointing_recomputes_every_block(monkeypatch):
    calls = []
    vae = create()
    vae.enable_gradient_checkpointing()
    block = type(vae.encoder.blocks[0])
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda self, x: calls.append(self) or forward(self, x))
    vae(boxes()).sample.sum().backward()
    assert len(calls) == 2 * sum(isinstance(module, block) for module in vae.modules())


def test_saved_and_loaded_it_gives_the_same(tmp_path):
    vae, grids = create(patch_size=2), boxes()
    vae.save_pretrained(tmp_path)
    loaded = OccupancyVAE.from_pretrained(tmp_path)
    assert loaded.config.patch_size == 2
    with torch.no_grad():
        assert torch.equal(loaded(grids, sample_posterior=False).sample, vae(grids, sample_posterior=False).sample)


def test_half_precision_answers_in_its_own_type():
    vae = create().to(torch.bfloat16)
    with torch.no_grad():
        output = vae(boxes().bfloat16())
    assert output.sample.dtype == torch.bfloat16
    assert output.sample.isfinite().all()
    assert output.latent_dist.kl().dtype == torch.float32


# --- TRELLIS's own files --------------------------------------------------------------------------------------------


def write_trellis(folder, vae: OccupancyVAE, **changes) -> None:
    """The weights of a tiny network under the file names and keys of microsoft/TRELLIS-image-large."""
    widths = list(vae.config.block_out_channels)
    for part, stem in TRELLIS_FILES.items():
        network = getattr(vae, part)
        arguments = {
            "latent_channels": vae.config.latent_channels,
            "num_res_blocks": vae.config.layers_per_block,
            "num_res_blocks_middle": vae.config.mid_layers,
            "channels": widths if part == "encoder" else widths[::-1],
            "use_fp16": True,
        } | {"in_channels" if part == "encoder" else "out_channels": 1}
        name = {"encoder": "SparseStructureEncoder", "decoder": "SparseStructureDecoder"}[part]
        (folder / f"{stem}.json").write_text(json.dumps({"name": name, "args": arguments | changes}))
        save_file({k: v.half().contiguous() for k, v in network.state_dict().items()}, folder / f"{stem}.safetensors")


# Every key of a level, once, as TRELLIS writes it; the tests above pin what the layers compute.
TRELLIS_KEYS = {
    "encoder": (
        "input_layer.bias blocks.0.norm1.weight blocks.0.conv2.bias blocks.1.conv.weight blocks.2.norm2.bias "
        "middle_block.0.conv1.weight out_layer.0.bias out_layer.2.weight"
    ),
    "decoder": (
        "input_layer.weight middle_block.0.norm1.bias blocks.0.conv1.weight blocks.1.conv.bias blocks.2.conv2.weight "
        "out_layer.0.weight out_layer.2.bias"
    ),
}


def test_trellis_files_are_read(tmp_path):
    vae = create(sample_size=64)
    for part, keys in TRELLIS_KEYS.items():
        assert set(keys.split()) < getattr(vae, part).state_dict().keys()
    write_trellis(tmp_path, vae)
    loaded = OccupancyVAE.from_trellis(tmp_path)
    assert dict(loaded.config) == dict(vae.config)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, vae.state_dict()[name].half().float()), name
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_trellis_files_of_another_kind_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"ss_enc_conv3d_16l8_fp16.json is missing"):
        OccupancyVAE.from_trellis(tmp_path)
    vae = create(sample_size=64)
    write_trellis(tmp_path, vae, num_res_blocks=2)
    with pytest.raises(ValueError, match=r"does not hold TRELLIS's VAE: .*blocks.* has shape .* \(\d+ such tensors\)"):
        OccupancyVAE.from_trellis(tmp_path)
    write_trellis(tmp_path, vae, norm_type="group")
    with pytest.raises(ValueError, match=r"describes a SparseStructureEncoder with group norm, not our encoder"):
        OccupancyVAE.from_trellis(tmp_path)
    write_trellis(tmp_path, vae)
    weights = tmp_path / f"{TRELLIS_FILES['decoder']}.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"ss_dec_conv3d_16l8_fp16.safetensors is damaged"):
        OccupancyVAE.from_trellis(tmp_path)
    (tmp_path / f"{TRELLIS_FILES['encoder']}.json").write_text("[]")
    with pytest.raises(ValueError, match=r"is not TRELLIS's description of a network"):
        OccupancyVAE.from_trellis(tmp_path)


def test_offloading_is_told_of_encode_and_decode():
    """enable_model_cpu_offload moves a model by its hook, which only `forward` calls by itself."""
    calls = []

    class Hook:
        def pre_forward(self, module, *_):
            calls.append(module)

    vae = create()
    vae._hf_hook = Hook()
    with torch.no_grad():
        vae.decode(vae.encode(torch.zeros(1, 1, *(vae.config.sample_size,) * 3)).latent_dist.mode())
    assert calls == [vae, vae]
