"""ShortcutDiT: a class-conditional diffusion transformer that knows both the time and the length of its step.

The network of "One Step Diffusion via Shortcut Models" (Frans et al., arXiv 2410.12557), itself a DiT (Peebles and Xie,
arXiv 2212.09748). The defaults differ from the authors' code where a later habit is better; `OFFICIAL` restores theirs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from backlot.layers import ScalarEmbedder, sincos_positions

# hidden_size, num_layers, num_attention_heads, patch_size
SIZES = {
    "tiny": {"hidden_size": 96, "num_layers": 4, "num_attention_heads": 4, "patch_size": 2},
    "S": {"hidden_size": 384, "num_layers": 12, "num_attention_heads": 6, "patch_size": 2},
    "B": {"hidden_size": 768, "num_layers": 12, "num_attention_heads": 12, "patch_size": 2},
    "L": {"hidden_size": 1024, "num_layers": 24, "num_attention_heads": 16, "patch_size": 2},
    "XL": {"hidden_size": 1152, "num_layers": 28, "num_attention_heads": 16, "patch_size": 2},
}

# The switches that turn the defaults into the network of the paper's code.
OFFICIAL = {"step_embedding": "log2", "time_scale": 1.0, "attention_scale": "head_dim", "zero_init_modulation": False}


class ShortcutDiT(ModelMixin, ConfigMixin):
    """A transformer over image patches, modulated by time, step size and class.

    Args:
        sample_size: height and width of the (square) sample, in pixels or latent cells.
        in_channels: channels of the sample.
        patch_size: side of the square patch that becomes one token.
        hidden_size, num_layers, num_attention_heads, mlp_ratio: the transformer's shape.
        num_classes: number of classes; the embedding table has one row more, the null class (index `num_classes`).
        step_embedding: `continuous` feeds the step size d in [0, 1]; `log2` feeds the level -log2(d), 0 for one step.
        use_shortcut: without it the network ignores the step size (a plain flow-matching DiT).
        time_scale: factor on t and on a continuous d before the sinusoids.
        attention_scale: `sqrt_head_dim` divides the logits by sqrt(head_dim), `head_dim` by head_dim.
        zero_init_modulation: adaLN-Zero; without it the modulation starts as the authors' does.
        dropout: dropout inside the MLP.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("DiTBlock",)
    _repeated_blocks = ("DiTBlock",)

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 4,
        patch_size: int = 2,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        step_embedding: str = "continuous",
        use_shortcut: bool = True,
        time_scale: float = 1000.0,
        attention_scale: str = "sqrt_head_dim",
        zero_init_modulation: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        if sample_size % patch_size:
            raise ValueError(f"`sample_size` ({sample_size}) must be a multiple of `patch_size` ({patch_size})")
        if hidden_size % (2 * num_attention_heads) or hidden_size % 4:
            raise ValueError(
                f"`hidden_size` ({hidden_size}) must be a multiple of 4 and of 2 x `num_attention_heads` "
                f"({num_attention_heads})"
            )
        if step_embedding not in ("continuous", "log2"):
            raise ValueError(f"`step_embedding` must be 'continuous' or 'log2', not {step_embedding!r}")
        if attention_scale not in ("sqrt_head_dim", "head_dim"):
            raise ValueError(f"`attention_scale` must be 'sqrt_head_dim' or 'head_dim', not {attention_scale!r}")

        self.patch_embed = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        positions = sincos_positions(hidden_size, sample_size // patch_size)
        self.register_buffer("position_embedding", positions, persistent=False)
        self.time_embedder = ScalarEmbedder(hidden_size)
        self.step_embedder = ScalarEmbedder(hidden_size) if use_shortcut else None
        self.class_embedder = nn.Embedding(num_classes + 1, hidden_size)
        head_dim = hidden_size // num_attention_heads
        scale = 1 / head_dim if attention_scale == "head_dim" else head_dim**-0.5
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_attention_heads, mlp_ratio, scale, dropout) for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.modulation_out = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj_out = nn.Linear(hidden_size, patch_size**2 * in_channels)
        self.gradient_checkpointing = False
        self._initialize(zero_init_modulation)

    @classmethod
    def from_size(cls, size: str, **config) -> ShortcutDiT:
        """Build one of the sizes of `SIZES`; keyword arguments are those of the constructor and win over the size's."""
        if size not in SIZES:
            raise ValueError(f"`size` must be one of {', '.join(SIZES)}, not {size!r}")
        return cls(**{**SIZES[size], **config})

    def _initialize(self, zero_init_modulation: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.flatten(1))
        nn.init.zeros_(self.patch_embed.bias)
        nn.init.normal_(self.class_embedder.weight, std=0.02)
        for embedder in filter(None, (self.time_embedder, self.step_embedder)):
            nn.init.normal_(embedder.linear_1.weight, std=0.02)
            nn.init.normal_(embedder.linear_2.weight, std=0.02)
        # Zero output at the start: the first prediction is 0 whatever the input.
        for linear in (self.modulation_out, self.proj_out):
            nn.init.zeros_(linear.weight)
        if zero_init_modulation:
            for block in self.blocks:
                nn.init.zeros_(block.modulation.weight)

    def forward(
        self, sample: Tensor, timestep: Tensor, step_size: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the mean velocity from `timestep` to `timestep + step_size`.

        Args:
            sample: (B, in_channels, sample_size, sample_size), the point x_t.
            timestep: (B,), t in [0, 1], 0 is noise and 1 is data.
            step_size: (B,), d in [0, 1 - t]; 0 asks for the instantaneous velocity.
            class_labels: (B,) integers in [0, num_classes]; `num_classes` is the null class.

        Returns:
            `sample` of the same shape: s with x_{t+d} = x_t + d s.
        """
        config = self.config
        conditioning = self.time_embedder(timestep * config.time_scale) + self.class_embedder(class_labels)
        if self.step_embedder is not None:
            log2 = config.step_embedding == "log2"
            conditioning = conditioning + self.step_embedder(
                -torch.log2(step_size) if log2 else step_size * config.time_scale
            )
        conditioning = F.silu(conditioning)

        hidden_states = self.patch_embed(sample).flatten(2).transpose(1, 2) + self.position_embedding.to(sample.dtype)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, conditioning)
            else:
                hidden_states = block(hidden_states, conditioning)
        shift, scale = self.modulation_out(conditioning).chunk(2, dim=-1)
        patches = self.proj_out(modulate(self.norm_out(hidden_states), shift, scale))

        rows, patch = config.sample_size // config.patch_size, config.patch_size
        patches = patches.unflatten(1, (rows, rows)).unflatten(3, (patch, patch, config.in_channels))
        velocity = patches.permute(0, 5, 1, 3, 2, 4).reshape(sample.shape)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)


class AttentionProcessor:
    """Calls the attention kernel that `set_attention_backend` chose."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attention: Attention, hidden_states: Tensor) -> Tensor:
        query, key, value = (
            layer(hidden_states).unflatten(-1, (attention.heads, -1))
            for layer in (attention.to_q, attention.to_k, attention.to_v)
        )
        hidden_states = dispatch_attention_fn(query, key, value, scale=attention.scale, backend=self._attention_backend)
        return attention.to_out(hidden_states.flatten(2))


class Attention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention, (B, tokens, hidden_size) -> the same."""

    _default_processor_cls = AttentionProcessor
    _available_processors = (AttentionProcessor,)

    def __init__(self, hidden_size: int, heads: int, scale: float):
        super().__init__()
        self.heads, self.scale = heads, scale
        self.to_q = nn.Linear(hidden_size, hidden_size)
        self.to_k = nn.Linear(hidden_size, hidden_size)
        self.to_v = nn.Linear(hidden_size, hidden_size)
        self.to_out = nn.Linear(hidden_size, hidden_size)
        self.set_processor(AttentionProcessor())

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.processor(self, hidden_states)


class DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the conditioning (adaLN)."""

    def __init__(self, hidden_size: int, heads: int, mlp_ratio: float, attention_scale: float, dropout: float):
        super().__init__()
        self.norm_1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(hidden_size, heads, attention_scale)
        self.norm_2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, int(hidden_size * mlp_ratio)),
            nn.GELU(approximate="tanh"),
            nn.Dropout(dropout),
            nn.Linear(int(hidden_size * mlp_ratio), hidden_size),
            nn.Dropout(dropout),
        )
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)

    def forward(self, hidden_states: Tensor, conditioning: Tensor) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(conditioning).chunk(6, dim=-1)
        attended = self.attention(modulate(self.norm_1(hidden_states), shift_1, scale_1))
        hidden_states = hidden_states + gate_1[:, None] * attended
        expanded = self.mlp(modulate(self.norm_2(hidden_states), shift_2, scale_2))
        return hidden_states + gate_2[:, None] * expanded


def modulate(hidden_states: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(B, tokens, D) scaled by 1 + scale and shifted, both (B, D)."""
    return hidden_states * (1 + scale[:, None]) + shift[:, None]
