"""What can be set about the base, the adapter and the stages: sections. Light to import: no torch here."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, TypeVar, get_args

from pydantic import BeforeValidator, Field

from backlot.config import Section, Settings, checked
from backlot.files import read_json

S = TypeVar("S", bound=Settings)
logger = logging.getLogger(__name__)
VALIDATED = ("loss/flow_matching", "loss/alpha_prior")
"""Of the loss, what a validation tells."""
Stage = Annotated[Literal["base", "1", "2", "3"], BeforeValidator(str)]
Part = Literal[
    "alpha_predictor", "instance_encoder", "layout_head", "assemble_attn_lora", "modulation_head", "feedback_bridge"
]
PARTS: tuple[str, ...] = get_args(Part)
Projection = Literal["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]

# Further spellings of keys, from the guide, which has sections of its own for checkpoints, logs and pictures.
ALIASES = {
    "seed": "training.seed",
    "training.num_iterations": "training.max_train_steps",
    "training.batch_size": "training.train_batch_size",
    "training.weight_decay": "training.adam_weight_decay",
    "scheduler.num_warmup_steps": "training.lr_warmup_steps",
    "checkpointing.output_dir": "training.output_dir",
    "checkpointing.save_every_n_steps": "training.checkpointing_steps",
    "checkpointing.keep_last_n_checkpoints": "training.checkpoints_total_limit",
    "checkpointing.keep_every_n_steps": "training.keep_every_n_steps",
    "logging.log_dir": "logging_dir",
    "logging.log_every_n_steps": "training.logging_steps",
    "inference.enabled": "validation.enabled",
    "inference.every_n_steps": "validation.validation_steps",
    "inference.num_samples": "validation.num_validation_images",
    "inference.num_inference_steps": "validation.num_inference_steps",
    "model.flux_model_name": "model.pretrained_model_name_or_path",
    "pretrained_model_name_or_path": "model.pretrained_model_name_or_path",
    "trainable.instance_fusion_mlp": "trainable.instance_encoder",
    "taesd": "dino.decoder",
    "data.dataloader_num_workers": "training.dataloader_num_workers",
}

# What a resumed run may change: where things lie. That the base is the same its checksum says.
MAY_CHANGE = frozenset(
    {
        "init_from",
        "logging_dir",
        "data.output_dir",
        "data.keep_in_memory",
        "model.pretrained_model_name_or_path",
        "adapter.base_model",
        "training.lr_groups",
    }
)
# Counts of micro-batches, with `iteration_unit: micro`.
COUNTS = {
    "training": (
        "max_train_steps",
        "lr_warmup_steps",
        "lr_decay_steps",
        "checkpointing_steps",
        "keep_every_n_steps",
        "logging_steps",
    ),
    "validation": ("validation_steps",),
    "dino": ("ramp_steps",),
}


class TransformerConfig(Section):
    """The shape of a base that is trained here; widths of texts and latents are those of its encoders."""

    num_layers: int = Field(2, gt=0)
    """Double blocks."""
    num_single_layers: int = Field(2, ge=0)
    num_attention_heads: int = Field(3, gt=0)
    attention_head_dim: int = Field(32, gt=0)
    axes_dims_rope: tuple[int, int, int] = (8, 12, 12)
    """Of each head, dimensions that turn with picture, row and column; their sum is attention_head_dim."""
    guidance_embeds: bool = False


class ModelConfig(Section):
    """The frozen base, and the shape of the adapter: depth and width are the base's."""

    pretrained_model_name_or_path: str = "black-forest-labs/FLUX.1-dev"
    """A pipeline in FLUX.1-dev's folder format (folder or hub name). Stage `base`: a folder of models without the
    transformer, which is trained."""
    vae: str | None = None
    """Another VAE than the base's (folder or hub name), or `pixels:2`: blocks of 2 x 2 pixels are the latents."""
    transformer: TransformerConfig = TransformerConfig()
    max_refs: int = Field(50, gt=0)
    """Most objects in one picture."""
    layout_double_blocks: str | list[Annotated[int, Field(ge=0)]] = "every 3"
    """Double blocks that have a layout branch: `every <n>` from the first on, or their numbers."""
    layout_single_blocks: list[int] = Field([], max_length=0)
    """Always empty: single blocks have none."""
    box_grid: int = Field(6, ge=2)
    """Points along each side of a box that its position is told by."""
    fourier_freqs: int = Field(8, gt=0)
    """Frequencies of each of their coordinates."""
    place_freqs: int = Field(0, ge=0)
    """Frequencies of an image token's place in the box; 0, as published: the layout branch is not told of it."""
    tokens_per_instance: Literal[3] = 3
    """Of an object: its text, its CLIP and its DINOv2 embedding."""


class DataConfig(Section):
    output_dir: Path = Path("output_data")
    """What data_prep.layouts prepare has written."""
    keep_in_memory: bool = False
    """Read each sample once and keep it, in every loading process: for sets of a few thousand small pictures."""


class TrainableConfig(Section):
    """Which parts of the adapter learn. One that does not and that no earlier stage has left is not there at all."""

    alpha_predictor: bool = True
    instance_encoder: bool = True
    layout_head: bool = True
    assemble_attn_lora: bool = True
    modulation_head: bool = False
    feedback_bridge: bool = False

    @property
    def names(self) -> set[str]:
        """Of the parts that learn."""
        return {part for part in PARTS if getattr(self, part)}


class LoraConfig(Section):
    """The layout branch's low-rank change of the base's attention projections."""

    rank: int = Field(128, gt=0)
    alpha: float = Field(128, gt=0)
    """The change is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: list[Projection] = Field(list(get_args(Projection)), min_length=1)


class ModulationConfig(Section):
    streams: list[Literal["image", "text"]] = Field(["image", "text"], min_length=1)
    """Which of a double block's streams an identity acts on; text only where the object's phrase is known."""
    single_blocks: Literal[False] = False
    """Always false: single blocks are not modulated."""
    hidden: int = Field(1024, gt=0)
    """Width of its trunk."""


class BridgeConfig(Section):
    rank: int = Field(256, gt=0)


def adapter_settings(
    model: ModelConfig, lora: LoraConfig, modulation: ModulationConfig, bridge: BridgeConfig, parts: set[str]
) -> dict:
    """Arguments of `FluxLayoutAdapter.for_transformer`; of the parts that may be missing, those in `parts` exist."""
    return {
        "layout_double_blocks": model.layout_double_blocks,
        "box_grid": model.box_grid,
        "fourier_freqs": model.fourier_freqs,
        "place_freqs": model.place_freqs,
        "max_refs": model.max_refs,
        "base_model": model.pretrained_model_name_or_path,
        "lora_rank": lora.rank if "assemble_attn_lora" in parts else None,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "lora_targets": list(lora.target_modules),
        "modulation_hidden": modulation.hidden if "modulation_head" in parts else None,
        "modulation_streams": list(modulation.streams),
        "bridge_rank": bridge.rank if "feedback_bridge" in parts else None,
    }


class ValidationConfig(Section):
    enabled: bool = True
    validation_steps: int | None = Field(500, gt=0)
    """Measure the loss on held-out pictures and draw some every so many updates; null for never."""
    num_samples: int = Field(64, gt=0)
    """Held-out pictures that the loss is measured on."""
    num_validation_images: int = Field(4, gt=0)
    """Drawn anew from their layouts."""
    num_inference_steps: int = Field(28, gt=0)
    guidance_scale: float = Field(3.5, ge=0)
    """What a guidance-distilled base is told when pictures are drawn."""
    batch_size: int = Field(4, gt=0)

    @property
    def every(self) -> int | None:
        """Updates from one to the next."""
        return self.validation_steps if self.enabled else None


def canonical_path(path: str) -> str:
    """The guide's `checkpoint_500` and `.../checkpoint_500/model.pt`, as `checkpoint-500`; other paths as they are."""
    path = re.sub(r"/model\.pt$", "", path.rstrip("/"))
    return re.sub(r"(^|/)checkpoint_(\d+)$", r"\1checkpoint-\2", path)


def stage_of(checkpoint: Path) -> str | None:
    """The stage whose run has written a checkpoint; None if it does not say."""
    try:
        return str(read_json(checkpoint / "run_state.json")["config"]["stage"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_start(config: S, find_latest: Callable[[Path], Path | None]) -> tuple[S, Path | None]:
    """Where the weights of a stage come from, if from anywhere; and its configuration, its resume spelt out.

    A checkpoint of another stage that is to be resumed is what this stage starts from.

    Args:
        config: of train_layout_flux.
        find_latest: the newest intact checkpoint in a folder.
    """
    training, start = config.training, config.init_from
    resumed = training.resume_from_checkpoint and canonical_path(training.resume_from_checkpoint)
    if resumed in ("latest", "auto"):
        found = find_latest(training.output_dir)
        if found is not None or resumed == "latest":
            return config, found
    elif resumed:
        stage = stage_of(Path(resumed))
        if stage in (None, config.stage):
            return checked(config, {"training": {"resume_from_checkpoint": resumed}}), Path(resumed)
        logger.warning("%s is of stage %s: stage %s starts from its weights", resumed, stage, config.stage)
        config, start = checked(config, {"training": {"resume_from_checkpoint": None}}), resumed
    if start is None and config.stage in ("2", "3"):
        start = str(training.output_dir.parent / f"stage{int(config.stage) - 1}")
    return config, None if start is None else Path(canonical_path(start))


def divided(config: Settings, number: int) -> dict[str, dict[str, int]]:
    """Counts of micro-batches as counts of updates, section by section: changes for `checked`."""
    values = config.model_dump()
    return {
        section: {key: -(-values[section][key] // number) for key in keys if values[section][key]}
        for section, keys in COUNTS.items()
    }
