"""ShadowUNet: SDXL's UNet without text attention, fed with a noisy shadow, the object, its mask and the light."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from pipelines.shadow_sdxl.light import EMBEDDING_DIM, blob_map, embed_light

NUM_TIMESTEPS = 1000  # at which sigma = 1
# What a UNet's shape consists of: everything else of its configuration is SDXL's, or about text.
SHAPE = (
    "sample_size",
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "transformer_layers_per_block",
    "attention_head_dim",
    "norm_num_groups",
    "resnet_time_scale_shift",
)
TEXT = re.compile(r"\.(attn2|norm2)\.|^unet\.add_embedding\.")  # what of SDXL's UNet is about text, and picture size


@dataclass
class ShadowUNetOutput(BaseOutput):
    """`sample` (B, C, H, W): see `ShadowUNet.forward`."""

    sample: Tensor


class ShadowUNet(ModelMixin, ConfigMixin):
    """Predicts how a shadow's latents change from noise to shadow (arXiv 2412.11972, section 3.2). Defaults are SDXL's.

    Args:
        sample_size: side of the latents it was made for; others work.
        latent_channels: channels of the VAE.
        down_block_types ... resnet_time_scale_shift: as in `UNet2DConditionModel`.
        light_conditioning: `periodic` or `sdxl` (see `embed_light`), added to the timestep's embedding; or `blob`, a
            picture of the light concatenated to the input (`blob_map`).
        light_harmonics: of `periodic`.
        knows_step_size: whether it is told the length of its step (shortcut models).
        smallest_step: steps of at most this length are told as 0, the flow's own.
        raw_output: what the blocks compute: the `velocity`, or the clean `sample`, from which the velocity follows;
            they then get the noisy sample times 1 - sigma. A small network learns the second far sooner: it need not
            carry the noise through.
        prediction_type: what the output means: `flow` (noise - sample), or `epsilon`, `v_prediction` or `sample` of
            SDXL's diffusion schedule.
        fill: grey in [0, 1] behind the object in the pictures it was trained with.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["BasicTransformerBlock", "ResnetBlock2D"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 128,
        latent_channels: int = 4,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types: tuple[str, ...] = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels: tuple[int, ...] = (320, 640, 1280),
        layers_per_block: int = 2,
        transformer_layers_per_block: int | tuple[int, ...] = (1, 2, 10),
        attention_head_dim: int | tuple[int, ...] = (5, 10, 20),
        norm_num_groups: int = 32,
        resnet_time_scale_shift: str = "default",
        light_conditioning: str = "periodic",
        light_harmonics: int = 3,
        knows_step_size: bool = False,
        smallest_step: float = 0.0,
        raw_output: str = "velocity",
        prediction_type: str = "flow",
        fill: float = 0.5,
    ):
        super().__init__()
        if light_conditioning not in ("periodic", "sdxl", "blob"):
            raise ValueError(f"`light_conditioning` must be 'periodic', 'sdxl' or 'blob', got {light_conditioning!r}")
        if raw_output not in ("velocity", "sample"):
            raise ValueError(f"`raw_output` must be 'velocity' or 'sample', got {raw_output!r}")
        if prediction_type not in ("flow", "epsilon", "v_prediction", "sample"):
            raise ValueError(
                f"`prediction_type` must be 'flow', 'epsilon', 'v_prediction' or 'sample', got {prediction_type!r}"
            )
        if prediction_type != "flow" and (knows_step_size or raw_output != "velocity"):
            raise ValueError(f"`prediction_type` {prediction_type!r} has no step sizes and no `raw_output` of its own")
        if sample_size % 2 ** (len(block_out_channels) - 1):
            raise ValueError(f"`sample_size` {sample_size} cannot be halved {len(block_out_channels) - 1} times")
        blob = light_conditioning == "blob"
        self.unet = UNet2DConditionModel(
            sample_size=sample_size,
            in_channels=2 * latent_channels + 1 + blob,
            out_channels=latent_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            transformer_layers_per_block=transformer_layers_per_block,
            attention_head_dim=attention_head_dim,
            norm_num_groups=norm_num_groups,
            resnet_time_scale_shift=resnet_time_scale_shift,
            use_linear_projection=True,
            cross_attention_dim=8,  # of text attention that is removed in the next line
            class_embed_type="identity",  # the embeddings below are added to the timestep's
        )
        remove_text_attention(self.unet)
        width = block_out_channels[0]
        self.light_embedding = None if blob else TimestepEmbedding(3 * EMBEDDING_DIM, 4 * width)
        self.base_embedding = nn.Parameter(torch.zeros(4 * width)) if blob else None
        self.step_embedding = TimestepEmbedding(width, 4 * width) if knows_step_size else None
        self._start_from_nothing()

    def _start_from_nothing(self) -> None:
        """Light and step size have no effect until they are learnt: the last layer only, so that gradients flow."""
        for embedding in filter(None, (self.light_embedding, self.step_embedding)):
            embedding.linear_1.reset_parameters()
            nn.init.zeros_(embedding.linear_2.weight)
            nn.init.zeros_(embedding.linear_2.bias)

    @classmethod
    def from_sdxl(cls, folder: str | Path, **settings) -> ShadowUNet:
        """Build the network on the weights of an SDXL checkpoint.

        Text attention (`attn2`, `norm2`) is left out; input channels beyond the shadow's own start at zero. The bias of
        the light's embedding (for `blob`, the embedding in its place) starts as what SDXL's blocks are used to: its
        embedding of empty text and of the picture size.

        Args:
            folder: in the official layout, with `unet` and `vae` folders; or its hub name.
            settings: the arguments of `ShadowUNet` that are not the UNet's shape; and `sample_size`, the side of the
                latents it will be trained on, if that is not the checkpoint's.

        Raises:
            ValueError: the checkpoint is not SDXL's kind of UNet, or `settings` change its shape.
        """
        shaped = sorted(set(settings) & {*SHAPE, "latent_channels"} - {"sample_size"})
        if shaped:
            raise ValueError(f"`{shaped[0]}` is the checkpoint's: only new parts can be set")
        source = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", dtype=torch.float32)
        if source.config.addition_embed_type != "text_time":
            raise ValueError(f"{folder} is not an SDXL checkpoint: its UNet has no embedding of text and picture size")
        channels = source.config.in_channels, source.config.out_channels
        if channels[0] != channels[1]:  # an inpainting model
            raise ValueError(
                f"{folder} is not an SDXL base checkpoint: its UNet maps {channels[0]} channels to {channels[1]}"
            )
        shape = {name: source.config[name] for name in SHAPE}
        with torch.device("meta"):  # no time is spent on random weights that are replaced
            model = cls(latent_channels=channels[0], **{**shape, **settings})
        weights = {f"unet.{name}": tensor for name, tensor in source.state_dict().items()}
        wanted = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("unet.")}
        conv_in = torch.zeros(wanted["unet.conv_in.weight"].shape)
        conv_in[:, : channels[0]] = weights["unet.conv_in.weight"]
        weights["unet.conv_in.weight"] = conv_in
        missing = sorted(wanted.keys() - weights.keys())
        unknown = sorted(name for name in weights.keys() - wanted.keys() if not TEXT.search(name))
        if missing or unknown:
            fault = f"no {missing[0][5:]}" if missing else f"{unknown[0][5:]} too many"
            raise ValueError(f"{folder} is not an SDXL checkpoint: its UNet has {fault}")
        model.load_state_dict({name: weights[name] for name in wanted}, strict=False, assign=True)
        for embedding in filter(None, (model.light_embedding, model.step_embedding)):
            embedding.to_empty(device="cpu")
        model._start_from_nothing()
        scale = 2 ** (len(AutoencoderKL.load_config(folder, subfolder="vae")["block_out_channels"]) - 1)
        usual = embed_empty_text(source, scale * source.config.sample_size)
        if model.light_embedding is None:
            model.base_embedding = nn.Parameter(usual)
        else:
            model.light_embedding.linear_2.bias = nn.Parameter(usual)
        return model.requires_grad_(True)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        object_latents: Tensor,
        mask: Tensor,
        light: Tensor,
        step_size: Tensor | None = None,
        return_dict: bool = True,
    ) -> ShadowUNetOutput | tuple[Tensor]:
        """Predict noise - shadow, or what `prediction_type` says.

        Args:
            sample: (B, C, H, W) the noisy shadow's latents.
            timestep: (B,) sigma times `NUM_TIMESTEPS`, the scale of SDXL's embedding; not in [0, 1].
            object_latents: (B, C, H, W). mask: (B, 1, H, W) in [0, 1], 1 = object.
            light: (B, 3) theta, phi (degrees) and size.
            step_size: (B,) in [0, 1], for a network that knows step sizes.
        """
        if (step_size is None) == (self.step_embedding is not None):
            raise ValueError(f"`step_size` must {'be given' if step_size is None else 'be None'}: see knows_step_size")
        sigma = (timestep.float() / NUM_TIMESTEPS).reshape(-1, 1, 1, 1)
        clean = self.config.raw_output == "sample"
        # at sigma = 1 nothing of the shadow is in the sample: fed as it is, it would only be in the way
        inputs = [sample * (1 - sigma).to(sample.dtype) if clean else sample, mask, object_latents]
        if self.light_embedding is None:
            inputs.append(blob_map(light, *sample.shape[-2:]).to(sample.dtype))
            embedding = self.base_embedding.expand(len(sample), -1)
        else:
            features = embed_light(light, self.config.light_conditioning, self.config.light_harmonics)
            embedding = self.light_embedding(features.to(self.dtype))
        if self.step_embedding is not None:
            told = torch.where(step_size <= self.config.smallest_step * (1 + 1e-4), 0.0, step_size)
            waves = get_timestep_embedding(NUM_TIMESTEPS * told, self.config.block_out_channels[0], True, 0)
            embedding = embedding + self.step_embedding(waves.to(self.dtype))
        inputs = torch.cat(inputs, dim=1)
        output = self.unet(inputs, timestep, None, class_labels=embedding, return_dict=False)[0]
        if clean:
            # velocity = (noisy - clean) / sigma; the floor bounds its error where hardly any noise is left
            output = ((sample - output) / sigma.clamp(min=0.05)).to(output.dtype)
        return ShadowUNetOutput(sample=output) if return_dict else (output,)


def remove_text_attention(unet: UNet2DConditionModel) -> None:
    """Take cross-attention out of every transformer block, parameters and all.

    A processor that returns its input would not do: the block would still add norm2(x) to x.
    """
    for block in unet.modules():
        if isinstance(block, BasicTransformerBlock):
            block.attn2 = block.norm2 = None


@torch.no_grad()
def embed_empty_text(unet: UNet2DConditionModel, picture_size: int) -> Tensor:
    """(D,) what SDXL adds to its timestep embedding for no text and an uncropped square picture."""
    time_ids = torch.tensor([picture_size, picture_size, 0, 0, picture_size, picture_size])
    sizes = unet.add_time_proj(time_ids.float()).flatten()
    text = sizes.new_zeros(unet.add_embedding.linear_1.in_features - len(sizes))
    return unet.add_embedding(torch.cat([text, sizes])[None])[0]
