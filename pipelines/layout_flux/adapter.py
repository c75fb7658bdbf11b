"""All that trains on a frozen FLUX: who is where, who is foreground, how boxes and identities act on its blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn

from pipelines.layout_flux.layout import (
    DEPTH_LABELS,
    Layout,
    LayoutState,
    box_features,
    covered_tokens,
    group_tokens,
)

SOURCES = ("text", "clip", "dino")  # one token per instance each
IMAGE_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
TOKEN_PROJECTIONS = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
PROJECTIONS = IMAGE_PROJECTIONS + TOKEN_PROJECTIONS
STREAMS = ("image", "text")
SMALL = 0.02  # spread of learned vectors that stand for a source
PLACE = 0.05  # and of what is made of a token's place in its box
ALPHA_RANGE = (0.05, 0.95)


class AlphaPredictor(nn.Module):
    """How much an instance is foreground: 0.5 before training, never at the ends, where a branch would die.

    Args:
        clip_embed_dim: width of the CLIP embedding of its reference.
    """

    def __init__(self, clip_embed_dim: int, hidden: int = 256):
        super().__init__()
        self.linear_1 = nn.Linear(clip_embed_dim + 1 + len(DEPTH_LABELS), hidden)
        self.linear_2 = nn.Linear(hidden, 1)
        nn.init.zeros_(self.linear_2.weight)
        nn.init.zeros_(self.linear_2.bias)

    def forward(self, clip_embeds: Tensor, area: Tensor, depth_labels: Tensor) -> Tensor:
        """CLIP embeddings (B, N, E), 0 where there is none; areas of the boxes and depth labels (B, N) -> (B, N)."""
        labels = torch.arange(len(DEPTH_LABELS), device=depth_labels.device)  # one_hot reads values on the host
        depth = (depth_labels[..., None] == labels).to(clip_embeds.dtype)
        features = torch.cat([clip_embeds, area[..., None].to(clip_embeds.dtype), depth], dim=-1)
        low, high = ALPHA_RANGE
        return low + (high - low) * self.linear_2(F.silu(self.linear_1(features))).squeeze(-1).float().sigmoid()


class InstanceEncoder(nn.Module):
    """An instance's text, CLIP and DINO embeddings, each with its box -> three tokens."""

    def __init__(self, width: int, embed_dims: dict[str, int], box_dim: int):
        super().__init__()
        self.text = nn.Sequential(nn.Linear(embed_dims["text"], width), nn.SiLU(), nn.Linear(width, width))
        self.clip = nn.Linear(embed_dims["clip"], width)
        self.dino = nn.Linear(embed_dims["dino"], width)
        self.missing = nn.Embedding(len(SOURCES), width)
        self.kind = nn.Embedding(len(SOURCES), width)
        # all sources speak alike loudly, and as loudly as the many features of the box
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.fuse = nn.Sequential(nn.Linear(width + box_dim, width // 2), nn.SiLU(), nn.Linear(width // 2, width))
        for embedding in (self.missing, self.kind):
            nn.init.normal_(embedding.weight, std=SMALL)

    def forward(self, layout: Layout, boxes: Tensor, alpha: Tensor) -> Tensor:
        """Features of the boxes (B, N, b) and alpha (B, N) -> tokens (B, N, 3, D).

        CLIP speaks for the background and DINO for the foreground; soft, so that alpha has a gradient.
        """
        numbers = torch.arange(len(SOURCES), device=boxes.device)
        missing, kinds = self.missing(numbers), self.kind(numbers)
        routes = (torch.ones_like(alpha), 2 * (1 - alpha), 2 * alpha)
        tokens = []
        for k, name in enumerate(SOURCES):
            embeds, present = getattr(layout, f"{name}_embeds"), getattr(layout, f"has_{name}")
            encoded = getattr(self, name)(embeds)
            encoded = self.norm(torch.where(present[..., None], encoded, missing[k].to(encoded.dtype)))
            tokens.append(torch.cat([routes[k][..., None].to(encoded.dtype) * encoded + kinds[k], boxes], dim=-1))
        return self.fuse(torch.stack(tokens, dim=2))


class LowRank(nn.Module):
    """The change of a linear layer's output, of rank r, nothing before training (LoRA, arXiv 2106.09685)."""

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.scale, self.dropout = alpha / rank, nn.Dropout(dropout)
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.up(self.down(self.dropout(x)))


class LayoutHead(nn.Module):
    """What the layout branch of one block adds to the block's own projections.

    Args:
        place_freqs: of the features that tell an image token where in the box it lies; 0: it is not told.
    """

    def __init__(
        self, width: int, projections: Iterable[str], rank: int, alpha: float, dropout: float, place_freqs: int = 0
    ):
        super().__init__()
        self.zero_out = nn.Linear(width, width)
        nn.init.zeros_(self.zero_out.weight)
        nn.init.zeros_(self.zero_out.bias)
        self.lora = nn.ModuleDict(
            {name.replace(".", "_"): LowRank(width, width, rank, alpha, dropout) for name in projections}
        )
        self.place = None
        if place_freqs:  # without effect as long as `zero_out` is 0
            self.place = nn.Linear(4 * place_freqs, 3 * width, bias=False)
            nn.init.normal_(self.place.weight, std=PLACE)

    def project(self, name: str, layer: nn.Module, x: Tensor) -> Tensor:
        """The block's own projection with its change, if it has one here."""
        return self.change(name, layer(x), x)

    def change(self, name: str, projected: Tensor, x: Tensor) -> Tensor:
        key = name.replace(".", "_")
        return projected + self.lora[key](x) if key in self.lora else projected


class ModulationHead(nn.Module):
    """An instance's identity -> an offset of the time embedding for each block (XVerse, arXiv 2506.21416)."""

    def __init__(self, width: int, num_blocks: int, hidden: int):
        super().__init__()
        self.trunk = nn.Linear(2 * width, hidden)
        self.shared = nn.Linear(hidden, width)
        self.blocks = nn.ModuleList(nn.Linear(hidden, width) for _ in range(num_blocks))
        for layer in (self.shared, *self.blocks):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor, own: nn.Module, offset: Tensor | None) -> Tensor:
        """Encoded tokens (B, N, 3, D), a block's layer of `blocks`, and the bridge's offset (B, N, D) -> (B, N, D)."""
        identity, text = tokens[:, :, SOURCES.index("dino")], tokens[:, :, SOURCES.index("text")]
        if offset is not None:
            identity, text = identity + offset, text + offset
        hidden = F.silu(self.trunk(torch.cat([identity, text], dim=-1)))
        return self.shared(hidden) + own(hidden)


class Gate(nn.Module):
    """tanh of a number that is 0 before training."""

    def __init__(self):
        super().__init__()
        self.strength = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.strength.tanh().to(x.dtype) * x


class Bridge(nn.Module):
    """What a block has made of an instance, passed on to its tokens and to the modulation of the next block."""

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, width)
        self.gate = Gate()

    def forward(self, seen: Tensor) -> Tensor:
        """Means of the image tokens of each box, (B, N, D) -> the same shape."""
        return self.gate(self.up(F.silu(self.down(self.norm(seen)))))


class FluxLayoutAdapter(ModelMixin, ConfigMixin):
    """Args:
        num_blocks, num_heads, head_dim: double blocks of the transformer it belongs to, and their attention.
        layout_blocks: double blocks that have a layout branch, ascending.
        text_embed_dim, clip_embed_dim, dino_embed_dim: widths of the embeddings it is given.
        box_grid, fourier_freqs: points along a side of a box, frequencies of each of their coordinates.
        place_freqs: frequencies of an image token's place in the box, which the layout branch is told; 0: not told.
        lora_rank, lora_alpha, lora_dropout, lora_targets: of the branch's change of the block's projections; rank None:
            unchanged.
        modulation_hidden: width of the modulation's trunk; None: no modulation.
        modulation_streams: which streams are modulated: `image`, `text` (where the phrase is known) or both.
        bridge_rank: None: no feedback bridge. It needs a modulation.
        max_refs: most instances in one picture.
        base_model: name of the transformer it was trained on, for the record.
        encoders: names of the encoders of the references, by `clip` and `dino`, for the record.

    Source: layout InstanceAssemble (arXiv 2509.16691), modulation XVerse (arXiv 2506.21416).
    """

    _no_split_modules = ["LayoutHead"]

    @register_to_config
    def __init__(
        self,
        num_blocks: int,
        num_heads: int,
        head_dim: int,
        layout_blocks: list[int],
        text_embed_dim: int = 768,
        clip_embed_dim: int = 768,
        dino_embed_dim: int = 1024,
        box_grid: int = 6,
        fourier_freqs: int = 8,
        lora_rank: int | None = 128,
        lora_alpha: float = 128,
        lora_dropout: float = 0.0,
        lora_targets: list[str] = list(PROJECTIONS),  # noqa: B006 (diffusers keeps it in config.json)
        modulation_hidden: int | None = 1024,
        modulation_streams: list[str] = list(STREAMS),  # noqa: B006
        bridge_rank: int | None = 256,
        max_refs: int = 50,
        base_model: str | None = None,
        encoders: dict[str, str] | None = None,
        place_freqs: int = 0,
    ):
        super().__init__()
        if sorted(set(layout_blocks)) != list(layout_blocks) or not set(layout_blocks) <= set(range(num_blocks)):
            raise ValueError(f"`layout_blocks` must ascend within 0 ... {num_blocks - 1}, not {layout_blocks}")
        if unknown := set(lora_targets) - set(PROJECTIONS):
            raise ValueError(f"`lora_targets` must be among {', '.join(PROJECTIONS)}, not {', '.join(sorted(unknown))}")
        if unknown := set(modulation_streams) - set(STREAMS):
            raise ValueError(
                f"`modulation_streams` must be among {', '.join(STREAMS)}, not {', '.join(sorted(unknown))}"
            )
        if bridge_rank and not modulation_hidden:
            raise ValueError("`bridge_rank` without `modulation_hidden`: the bridge acts through the modulation")
        width = num_heads * head_dim
        embed_dims = {"text": text_embed_dim, "clip": clip_embed_dim, "dino": dino_embed_dim}
        self.alpha_predictor = AlphaPredictor(clip_embed_dim)
        self.instance_encoder = InstanceEncoder(width, embed_dims, 4 * box_grid**2 * fourier_freqs)
        self.layout_heads = nn.ModuleDict()
        for block in layout_blocks:
            # after the last branch nobody reads the tokens: what would only change them could never learn
            unread = {"add_q_proj", "to_add_out"} if block == layout_blocks[-1] else set()
            targets = [name for name in lora_targets if name not in unread] if lora_rank else []
            sizes = lora_rank or 1, lora_alpha, lora_dropout, place_freqs
            self.layout_heads[str(block)] = LayoutHead(width, targets, *sizes)
        self.modulation_head = ModulationHead(width, num_blocks, modulation_hidden) if modulation_hidden else None
        bridged = range(num_blocks - 1) if bridge_rank else ()  # after the last block nobody would listen
        self.bridges = nn.ModuleDict({str(block): Bridge(width, bridge_rank) for block in bridged})

    @classmethod
    def for_transformer(
        cls, transformer: FluxTransformer2DModel, *, layout_double_blocks: str | list[int] = "every 3", **settings
    ) -> FluxLayoutAdapter:
        """An untrained adapter that fits a transformer.

        Args:
            layout_double_blocks: their numbers, or `every <n>`: 0, n, 2 n, ...
            settings: arguments of the class.

        Raises:
            ValueError: what `layout_double_blocks` may be.
        """
        config = transformer.config
        if isinstance(layout_double_blocks, str):
            every = re.fullmatch(r"every ([1-9]\d*)", layout_double_blocks)
            if not every:
                raise ValueError(f"`layout_double_blocks` must be numbers or `every <n>`, not {layout_double_blocks!r}")
            layout_double_blocks = list(range(0, config.num_layers, int(every[1])))
        return cls(
            num_blocks=config.num_layers,
            num_heads=config.num_attention_heads,
            head_dim=config.attention_head_dim,
            layout_blocks=layout_double_blocks,
            **settings,
        )

    def check(self, transformer: FluxTransformer2DModel) -> None:
        """Raises:
        ValueError: it was made for a transformer of another shape.
        """
        wanted = {"num_blocks": "num_layers", "num_heads": "num_attention_heads", "head_dim": "attention_head_dim"}
        for name, theirs in wanted.items():
            if self.config[name] != transformer.config[theirs]:
                raise ValueError(
                    f"this adapter belongs to a transformer with `{theirs}` {self.config[name]}, "
                    f"not {transformer.config[theirs]}"
                )

    def parts(self) -> dict[str, list[str]]:
        """The names of its parameters by the part that a stage trains."""
        prefixes = {
            "alpha_predictor": r"alpha_predictor\.",
            "instance_encoder": r"instance_encoder\.",
            "layout_head": r"layout_heads\.\d+\.(zero_out|place)\.",
            "assemble_attn_lora": r"layout_heads\.\d+\.lora\.",
            "modulation_head": r"modulation_head\.",
            "feedback_bridge": r"bridges\.",
        }
        names = [name for name, _ in self.named_parameters()]
        return {part: [name for name in names if re.match(prefix, name)] for part, prefix in prefixes.items()}

    def set_trainable(self, parts: Iterable[str]) -> None:
        """Let these parts train and freeze the others.

        Raises:
            ValueError: a part that it does not have.
        """
        names, parts = self.parts(), list(parts)
        if missing := [part for part in parts if not names.get(part)]:
            raise ValueError(f"this adapter has no {', '.join(missing)}")
        trainable = {name for part in parts for name in names[part]}
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in trainable)

    def forward(
        self,
        layout: Layout,
        grid: tuple[int, int],
        pos_embed: nn.Module,
        layout_scale: float = 1.0,
        identity_scale: float = 1.0,
        feedback: bool = True,
    ) -> LayoutState:
        """What of a layout is the same for every step.

        Args:
            grid: rows and columns of image tokens.
            pos_embed: the transformer's.
            layout_scale, identity_scale: strength of the two branches; both 0 leave the transformer as it is.
            feedback: whether the bridge passes on what it reads.

        Raises:
            ValueError: too many instances, or embeddings of another width.
        """
        config, boxes = self.config, layout.boxes
        if boxes.shape[1] > config.max_refs:
            raise ValueError(f"`boxes` must be at most {config.max_refs} in a picture, not {boxes.shape[1]}")
        for name in SOURCES:
            width, wanted = getattr(layout, f"{name}_embeds").shape[-1], config[f"{name}_embed_dim"]
            if width != wanted:
                raise ValueError(f"`{name}_embeds` must be {wanted} wide, not {width}: another encoder made them")
        embeds = layout.text_embeds
        device, dtype = embeds.device, embeds.dtype
        sides = torch.from_numpy(boxes[..., 2:] - boxes[..., :2]).to(device)
        clip = layout.clip_embeds * layout.has_clip[..., None].to(layout.clip_embeds.dtype)
        alpha = self.alpha_predictor(clip, sides.prod(dim=-1), layout.depth_labels)
        if layout.alpha is not None:
            alpha = layout.alpha.to(alpha.dtype)
        acting = alpha
        if layout.alpha_learns is not None:
            acting = torch.where(layout.alpha_learns[:, None], alpha, alpha.detach())
        features = box_features(boxes, config.box_grid, config.fourier_freqs).to(device, dtype)
        valid = layout.valid.to(dtype)
        covered = covered_tokens(boxes, grid).to(device, dtype) * valid[..., None]
        return LayoutState(
            tokens=self.instance_encoder(layout, features, acting),
            alpha=alpha,
            valid=valid,
            groups=group_tokens(boxes, grid, device, config.place_freqs),
            covered=covered,
            coverage=covered.sum(dim=1)[..., None].clamp(min=1),
            rotary=centre_rotary(boxes, grid, pos_embed, device),
            layout_gate=layout_scale * 2 * (1 - acting) * valid,
            identity_gate=identity_scale * 2 * acting * valid,
            phrase_spans=layout.phrase_spans,
            use_layout=layout_scale != 0,
            use_modulation=identity_scale != 0,
            use_feedback=feedback,
        )


def centre_rotary(boxes, grid: tuple[int, int], pos_embed: nn.Module, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, N, d) of the rotary position of each box's centre, in image tokens."""
    rows, columns = grid
    centres = torch.from_numpy(boxes[..., :2] + boxes[..., 2:]).to(device) / 2
    ids = torch.stack([torch.zeros_like(centres[..., 0]), centres[..., 1] * rows, centres[..., 0] * columns], dim=-1)
    cos, sin = pos_embed(ids.flatten(0, 1))
    return cos.unflatten(0, boxes.shape[:2]), sin.unflatten(0, boxes.shape[:2])
