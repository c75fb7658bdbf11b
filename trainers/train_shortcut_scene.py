"""Train a network that generates whole 3D scenes, all objects at once, in any number of steps (shortcut flow).

    accelerate launch -q --config_file accelerate_configs/cpu.yaml trainers/train_shortcut_scene.py \\
        --config configs/shortcut_scene/small.yaml --data.data_root DIR
    ... --resume_from_checkpoint latest        continue where it stopped
    ... --self_consistency_prob 0              plain flow matching, the baseline

DIR is what data_prep.scenes writes. The objective (arXiv 2511.16624, 2410.12557) is in objectives/scene.py.
"""

from __future__ import annotations

import logging
from typing import Annotated, ClassVar, Literal

import lazy_loader
from pydantic import Field, model_validator

import backlot
import objectives
from backlot.command_line import input_errors
from backlot.config import Section
from data_prep import scenes
from evaluation import shortcut_scene as evaluation
from objectives.settings import SceneObjectiveConfig
from pipelines import shortcut_scene
from trainers import common
from trainers.common.config import RunConfig
from trainers.common.startup import load_config

torch = lazy_loader.load("torch")  # like the packages above: a wrong configuration is answered before it loads
logger = logging.getLogger(__name__)


class ModelConfig(Section):
    preset: Literal["tiny", "small", "base", "sam3d"] = "small"
    """Shape of the transformer (pipelines.shortcut_scene.PRESETS)."""
    hidden_size: int | None = Field(None, gt=0)
    """Another width than the preset's."""
    num_layers: int | None = Field(None, gt=0)
    num_attention_heads: int | None = Field(None, gt=0)
    attention_scope: list[Literal["object", "scene"]] = Field(["object", "scene"], min_length=1)
    """Of each block, repeated: `object` blocks are blind to other objects, and a network of them alone always is."""
    scene_attention: Literal["pose", "full"] | None = None
    """Tokens that take part between objects: poses and registers, or all. null: the preset's."""
    num_registers: int = Field(4, ge=0)
    """Tokens per object that tell the others of its shape (scene_attention pose)."""
    condition: Literal["none", "image", "tokens"] = "image"
    """`image`: a small embedding of the picture; `tokens`: cond_tokens of the data (an encoder's, or descriptors)."""
    use_pointmap: bool = True
    """With `image`: the scene coordinates of its pixels as well."""
    patch_size: int = Field(4, gt=0)
    """Of the picture."""
    shape_patch_size: int = Field(1, gt=0)
    """Side of the cube of shape latents that one token stands for; 2 makes eight of them one token."""
    num_condition_layers: int = Field(0, ge=0)
    """Transformer layers over its patches."""
    object_condition: Literal["shared", "mask", "slot"] = "shared"
    """What tells objects apart: nothing, their masks in the picture, or their place in the list."""
    protect_shape: bool = False
    """Shape tokens ignore poses, as in SAM 3D Objects; for fine-tuning a trained shape model."""
    use_shortcut: bool = True
    """Tell the network its step size; false for a plain flow."""
    init_from: str | None = None
    """Folder of a trained model to start from; layers between objects that it lacks begin without effect."""
    vae: str | None = None
    """Occupancy VAE whose latents the data are; exported with the pipeline. Without it objects are shown as boxes."""
    image_encoder: str | None = None
    """Vision model (folder or hub name, e.g. facebook/dinov2-large) of the cond_tokens; exported with the pipeline."""


class DataConfig(Section):
    data_root: str
    """Folder with the splits train and val."""
    max_objects_per_scene: int = Field(32, gt=0)
    on_too_many: Literal["subset", "filter"] = "subset"
    """Larger scenes: take a random part on each access, or leave them out."""
    pose_codec: Literal["zscore", "sam3d", "identity"] = "zscore"
    """Standardise by <data_root>/stats.json (data_prep.scenes stats), SAM 3D's constants, or not at all."""


class ValidationConfig(Section):
    validation_steps: int | None = Field(1000, gt=0)
    """Loss on a fixed grid of times and step sizes, and sampled scenes, every so many updates; null for never."""
    num_samples: int = Field(64, gt=0)
    """Held-out scenes, always the same, with the same noise."""
    num_inference_steps: list[Annotated[int, Field(gt=0)]] = Field([1, 4, 32], min_length=1)
    """Rows of sampled scenes."""


class Config(RunConfig):
    may_change: ClassVar[frozenset[str]] = frozenset({"validation", "data.data_root"})
    aliases: ClassVar[dict[str, str]] = {  # the guide's names
        "num_workers": "training.dataloader_num_workers",
        "weight_decay": "training.adam_weight_decay",
        "grad_clip": "training.max_grad_norm",
        "log_interval": "training.logging_steps",
        "save_interval": "training.checkpointing_epochs",
    }
    model: ModelConfig = ModelConfig()
    data: DataConfig
    shortcut: SceneObjectiveConfig = SceneObjectiveConfig()
    validation: ValidationConfig = ValidationConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        model, shortcut = self.model, self.shortcut
        if shortcut.self_consistency_prob and not model.use_shortcut:
            raise ValueError("`model.use_shortcut` is false: set shortcut.self_consistency_prob to 0")
        if shortcut.self_consistency_prob and shortcut.teacher == "ema" and not self.training.use_ema:
            raise ValueError("`training.use_ema` is false, but shortcut.teacher is ema")
        if model.object_condition == "mask" and model.condition != "image":
            raise ValueError("`model.object_condition` mask needs model.condition image")
        if shortcut.pairing == "hungarian" and model.object_condition != "shared":
            raise ValueError("`shortcut.pairing` hungarian would tie the noise to conditions of single objects")
        if model.image_encoder and model.condition != "tokens":
            raise ValueError("`model.image_encoder` makes tokens: set model.condition to tokens")
        return self


def compute_loss(run: common.TrainingRun, batch: dict, config: Config, model=None, draws=None):
    """The loss of one micro-batch of data_prep.SceneDataset -> (loss, metrics, weight).

    `model` takes the network's place and `draws` that of new ones (validation: EMA, fixed grid).
    """
    scene, shortcut = objectives.scene, config.shortcut
    (data, conditions), object_mask = split_batch(batch), batch["object_mask"]
    if draws is None:
        generator = run.shared_generator() if shortcut.sync_draws else None
        draws = scene.draw(data, object_mask, shortcut, run.step, generator)
    if shortcut.pairing == "hungarian":
        data = scene.pair_objects(data, draws.noise, object_mask)
    network = as_network(run.model if model is None else model)
    teacher = as_network(run.ema if shortcut.teacher == "ema" and run.ema is not None else run.network)
    null = scene.without_condition(conditions)
    return scene.scene_loss(network, teacher, data, object_mask, conditions, null, draws, shortcut)


def split_batch(batch: dict) -> tuple[dict, dict]:
    """A batch -> its modalities, and the rest by the names of SceneShortcutTransformer.forward."""
    data = {name: values for name, values in batch.items() if name in shortcut_scene.MODALITIES}
    conditions = {name: values for name, values in batch.items() if name not in data}
    return data, conditions | {"unconditional": torch.zeros_like(batch["object_mask"][:, 0])}


def as_network(model):
    """The objectives' calling convention around a SceneShortcutTransformer (or its EMA)."""
    return lambda sample, t, step_size, conditions: model(sample, t, step_size, **conditions).sample


def validate(model, run: common.TrainingRun, config: Config, pipeline, held_out):
    """Loss at fixed times and step sizes, and scenes of several step counts: the same noise every time."""
    rows = range(min(config.validation.num_samples, len(held_out)))
    batch = torch.utils.data.default_collate(held_out.__getitems__(rows))
    batch = common.to_device(batch, run.accelerator.device)
    data, _ = split_batch(batch)
    scalars = {}
    for t, step_size in objectives.scene.validation_grid(config.shortcut):
        torch.manual_seed(config.training.seed)
        draws = objectives.scene.grid_draws(data, config.shortcut, t, step_size)
        loss, _, weight = compute_loss(run, batch, config, model, draws)
        scalars[f"loss/t={t:g},D={step_size:g}"] = float(loss) / float(weight or 1)
    scalars["loss"] = sum(scalars.values()) / len(scalars)

    steps = config.validation.num_inference_steps
    shown = evaluation.show(pipeline, held_out, rows[:6], steps)
    pictures = [[backlot.rendering.render_scene(scene, size=128) for scene in row] for row in shown]
    names = ["true", *common.step_names(steps)]
    return scalars, {"scenes": backlot.image_grid(pictures, names, cell=128)}


def open_data(config: Config):
    """Codec, training scenes and held-out ones; what is wrong with them is said in one line."""
    data, model = config.data, config.model
    picture = ["image", *["pointmap"] * model.use_pointmap, *["masks"] * (model.object_condition == "mask")]
    conditions = {"none": [], "tokens": ["cond_tokens"], "image": picture}[model.condition]
    settings = data.model_dump(exclude={"data_root", "pose_codec"}) | {"conditions": conditions}
    with input_errors("data"):
        if data.pose_codec == "zscore":
            codec = shortcut_scene.PoseCodec.from_pretrained(data.data_root)
        else:
            codec = shortcut_scene.PoseCodec(data.pose_codec)
        train = scenes.SceneDataset(data.data_root, "train", codec, batch_mode=config.shortcut.mode, **settings)
        held_out = scenes.SceneDataset(data.data_root, "val", codec, **settings)
    return codec, train, held_out


def create_transformer(config: Config, sample: dict, codec):
    """A network for the data's shapes, started from another one if `init_from` names it."""
    model = config.model
    no_shape = {"preset", "use_pointmap", "init_from", "vae", "image_encoder"}
    settings = model.model_dump(exclude=no_shape, exclude_none=True)
    settings |= {"shape_tokens": sample["shape"].shape[-2], "shape_channels": sample["shape"].shape[-1]}
    settings |= {"translation_scale": "translation_scale" in sample, "independent_t": config.shortcut.independent_t}
    if model.condition == "image":
        settings |= {"image_size": sample["image"].shape[-1], "condition_channels": 6 if model.use_pointmap else 3}
        settings |= codec.translation_statistics()
    elif model.condition == "tokens":
        settings |= {"condition_channels": sample["cond_tokens"].shape[-1]}
    transformer = shortcut_scene.SceneShortcutTransformer.from_preset(model.preset, **settings)
    if model.init_from:
        lacking = transformer.begins_without_effect
        common.load_weights(transformer, model.init_from, part="transformer", may_lack=lacking)
    return transformer


def main(argv: list[str] | None = None) -> None:
    config = load_config(Config, argv)
    accelerator = common.create_accelerator(config)
    codec, dataset, held_out = open_data(config)
    config = config.in_updates(len(dataset), accelerator.num_processes)
    torch.manual_seed(config.training.seed)
    with input_errors("model"):
        transformer = create_transformer(config, held_out[0], codec)
        components = shortcut_scene.load_components(config.model.vae, config.model.image_encoder, accelerator.device)
    if config.shortcut.self_consistency_prob and config.shortcut.fm_warmup_steps >= config.training.max_train_steps:
        logger.warning("the run ends before shortcut.fm_warmup_steps: it trains a plain flow and no shortcut")
    if config.shortcut.mode == "scene" and not transformer.is_scene_level:
        logger.warning("mode is scene, but no block has attention_scope scene: objects stay independent")
    run = common.TrainingRun(accelerator, config, model=transformer, dataset=dataset)
    run.resume()
    pipeline = shortcut_scene.create_pipeline(run.inference_model, codec, components)
    check = run.validation(
        config.validation.validation_steps,
        lambda model: validate(model, run, config, pipeline, held_out),
        score=lambda scalars: -scalars["loss"],
    )
    for batch in run.batches():
        with run.accumulate():
            run.update(*compute_loss(run, batch, config))
        check()
    run.finish(pipeline)


if __name__ == "__main__":
    main()
