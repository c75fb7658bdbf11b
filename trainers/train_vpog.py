"""Train VPOG: which patches of rendered templates a picture shows, and where, so that a pose can be solved for.

    accelerate launch -q --config_file accelerate_configs/a100x8_ddp.yaml trainers/train_vpog.py \\
        --config configs/vpog/croco_large.yaml --data.train_dataset_id 2
    ... --resume_from_checkpoint latest        continue where it stopped
    ... --epropnp.enabled true                 also learn from the pose itself (EPro-PnP, arXiv 2203.13254)

The data are what `python -m data_prep.bop index` and `render_templates` make ready; labels are built on the training
device (objectives/pose_labels.py), the losses are in objectives/pose_losses.py and epropnp.py.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import lazy_loader
from pydantic import Field, model_validator

import objectives
from backlot.command_line import input_errors
from backlot.config import Section
from data_prep import bop
from data_prep.bop.item_settings import ColourSettings, DetectionSettings, SelectionSettings
from evaluation import vpog as evaluation
from objectives.pose_settings import EProPnPConfig, LabelConfig, PoseLossConfig
from pipelines import vpog
from trainers import common
from trainers.common.config import RunConfig
from trainers.common.startup import load_config

torch = lazy_loader.load("torch")  # like the packages above: a wrong configuration is answered before it loads


class ModelConfig(Section):
    preset: Literal["tiny", "small", "base", "large"] = "base"
    """Sizes (pipelines.vpog.PRESETS)."""
    encoder: str | None = None
    """Weights the encoder starts from, and its sizes: a CroCo v2 checkpoint of yours, or a folder or hub name of DINOv2
    or DINOv3; null: random weights of the preset's sizes."""
    image_size: int | None = Field(None, gt=0)
    """Side of the crops in pixels, that of the templates; null: the preset's."""
    num_pairs: int | None = Field(None, gt=0)
    """Pairs of attention within images and between them; null: the preset's."""
    view_encoding: Literal["s2_smooth", "s2_face", "so3", "none"] = "s2_smooth"
    """How attention knows from where a template looks."""
    window_size: int | None = Field(None, gt=0)
    """Attend between images in windows of so many patches; null: everywhere."""
    separate_streams: bool = False
    """Weights of their own for query and templates."""


class SourceConfig(Section):
    path: str
    """Split of BOP scenes, or folder of tar shards, that `python -m data_prep.bop index` has read."""
    templates: str
    """What `python -m data_prep.bop render_templates` has made of its models."""
    weight: float = Field(1.0, gt=0)
    """Share among the sources, in any unit."""
    skip_shards: list[int] = []
    """Numbers of shards that are damaged."""


class DataConfig(SourceConfig):
    second: SourceConfig | None = None
    """Another source to train on beside `path`; the guide's are GSO and ShapeNet."""
    train_dataset_id: int = Field(0, ge=0, le=2)
    """0: the first source alone (GSO), 1: the second (ShapeNet), 2: both by their weights."""
    validation: SourceConfig | None = None
    """Split of BOP scenes on which poses are measured; null: no validation."""
    selection: SelectionSettings = SelectionSettings()
    mask_query: Literal["none", "gt", "jitter"] = "jitter"
    """What blackens the query's background: nothing, the true mask, or one as a detector would give it."""
    augment: bool = True
    """Other colours for the query, and boxes as a detector would give them."""
    colours: ColourSettings = ColourSettings()
    detection: DetectionSettings = DetectionSettings()
    in_plane_augmentation_deg: float = Field(0.0, ge=0, le=180)
    """Turn the query in its picture by up to this angle."""
    min_visib: float = Field(0.1, ge=0, lt=1)
    """Objects of which less can be seen are left out."""
    shards_in_window: int = Field(16, gt=0)
    """Files among which samples are shuffled."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Samples that cannot be read are listed in the run's quarantine.jsonl; more of them end the run."""


class ValidationConfig(Section):
    validation_steps: int | None = Field(10_000, gt=0)
    """Losses and poses every so many updates; null for never."""
    num_samples: int = Field(64, gt=0)
    """Objects in pictures, always the same, with the same masks."""


class VisualizationConfig(Section):
    enabled: bool = True
    """Contact sheets of batches: query, templates, labels, and the network's flow beside the true one."""
    save_frequency: int = Field(100, gt=0)
    """Updates from one to the next."""
    max_samples_per_batch: int = Field(4, gt=0)


class Config(RunConfig):
    may_change: ClassVar[frozenset[str]] = frozenset(
        {"validation", "visualization", "data.path", "data.templates", "data.validation"}
    )
    aliases: ClassVar[dict[str, str]] = {  # the guide's names
        "max_epochs": "training.num_epochs",
        "batch_size": "training.train_batch_size",
        "val_check_interval": "validation.validation_steps",
    }
    model: ModelConfig = ModelConfig()
    data: DataConfig
    labels: LabelConfig = LabelConfig()
    losses: PoseLossConfig = PoseLossConfig()
    epropnp: EProPnPConfig = EProPnPConfig()
    validation: ValidationConfig = ValidationConfig()
    visualization: VisualizationConfig = VisualizationConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        data, losses = self.data, self.losses
        if data.train_dataset_id and data.second is None:
            raise ValueError(f"`data.train_dataset_id` is {data.train_dataset_id}, but there is no `data.second`")
        if not any((losses.cls, losses.dense, losses.center)):
            raise ValueError("`losses.cls`, `losses.dense` and `losses.center` are all 0: nothing would be learned")
        if self.epropnp.enabled and not losses.dense:
            raise ValueError("`epropnp.enabled` needs `losses.dense`: it is the flow that makes a pose")
        return self

    @property
    def validation_steps(self) -> int | None:
        """Null, too, where there is nothing to measure on."""
        return None if self.data.validation is None else self.validation.validation_steps

    @property
    def sources(self) -> list[SourceConfig]:
        """Those that are trained on."""
        data = self.data
        return [[data], [data.second], [data, data.second]][data.train_dataset_id]


class Seen(NamedTuple):
    """What a contact sheet is drawn from."""

    batch: dict
    labels: tuple
    output: vpog.VPOGOutput


def compute_loss(run: common.TrainingRun, batch: dict, config: Config, model=None):
    """The losses of one micro-batch of data_prep.bop.PoseDataset -> (sum over samples, metrics, their number), Seen.

    `model` takes the network's place (validation measures the EMA).
    """
    losses, epropnp = objectives.pose_losses, config.epropnp
    labels = objectives.pose_labels.build_labels(batch, run.network.patch_size, config.labels)
    views = batch["poses"][:, 1:, :3, :3], batch["d_ref"], batch["reference_rotation"]
    output = (run.model if model is None else model)(batch["images"], *views, buddies=labels.patch_cls)
    terms, metrics = losses.pose_loss(output, labels, config.losses)
    weights = config.losses.weights
    if epropnp.enabled and run.step >= epropnp.start_fraction * config.training.max_train_steps:
        pose_terms, pose_metrics = objectives.epropnp.epropnp_term(output, labels, batch, epropnp)
        terms, metrics, weights = terms | pose_terms, metrics | pose_metrics, weights | epropnp.weights
    sums = {name: losses.sum_of_means(term) for name, term in terms.items()}
    metrics |= {f"loss/{name}": pair.detach() for name, pair in sums.items()}
    loss = sum(weights[name] * pair[0] for name, pair in sums.items())
    return (loss, metrics, len(batch["images"])), Seen(batch, labels, output)


def validate(model, run: common.TrainingRun, config: Config, pipeline, held_out: list[dict], protocol):
    """Losses and poses of unseen objects: the same samples, masks and draws every time."""
    torch.manual_seed(config.training.seed)
    pairs, seen = {}, None
    for batch in common.batches_of(held_out, config.training.train_batch_size, run.accelerator.device):
        (loss, metrics, count), seen = compute_loss(run, batch, config, model)
        for name, pair in (metrics | {"loss": torch.stack([loss, loss.new_tensor(count)])}).items():
            pairs[name] = pairs.get(name, 0) + pair
    scalars = {name: float(total / count.clamp(min=1)) for name, (total, count) in pairs.items()}
    rows = evaluation.to_results(evaluation.ask_all(pipeline, protocol, protocol.answering))
    errors = evaluation.compare(protocol.dataset, protocol.models, protocol.targets, rows, with_vsd=False)
    return scalars | evaluation.pose_scalars(errors), {"matches": evaluation.draw_batch(*seen, max_samples=8)}


def open_data(config: Config, image_size: int, quarantine):
    """Training samples and their order; held-out ones, and what poses are asked for in validation."""
    data, held_out, protocol = config.data, [], None
    settings = data.selection.model_dump() | {"image_size": image_size, "mask_query": data.mask_query}
    settings |= {"colours": data.colours, "detection": data.detection, "seed": config.training.seed}

    def open_source(source: SourceConfig):
        return bop.PoseSource(source.path, min_visib=data.min_visib, skip_shards=source.skip_shards)

    with input_errors("data"):
        train = bop.PoseDataset(
            [open_source(source) for source in config.sources],
            [source.templates for source in config.sources],
            augment=data.augment,
            in_plane_augmentation_deg=data.in_plane_augmentation_deg,
            max_bad_fraction=data.max_bad_fraction,
            quarantine_path=quarantine,
            **settings,
        )
        weights = [source.weight for source in config.sources]
        order = bop.ShardMixture(train.shard_sizes, weights, config.training.seed, data.shards_in_window)
        if config.validation_steps is not None:
            unseen, count = data.validation, config.validation.num_samples
            protocol = evaluation.open_split(unseen.path, unseen.templates, count, config.training.seed)
            unseen = bop.PoseDataset([open_source(unseen)], unseen.templates, augment=False, **settings)
            items = common.held_out_items(unseen, count)
            held_out = [{name: value for name, value in item.items() if name != "sample_id"} for item in items]
    return train, order, held_out, protocol


def create_model(config: Config):
    """The network of the configured sizes, its encoder with the weights that it starts from."""
    changes = config.model.model_dump(exclude={"preset", "encoder"}, exclude_none=True)
    flows = {"dense_flow": config.losses.dense > 0, "center_flow": config.losses.center > 0}
    torch.manual_seed(config.training.seed)
    with input_errors("model"):
        return vpog.VPOGModel.from_preset(config.model.preset, config.model.encoder, **changes, **flows)


def main(argv: list[str] | None = None) -> None:
    config = load_config(Config, argv)
    accelerator = common.create_accelerator(config)
    model = create_model(config)
    quarantine = config.training.output_dir / "quarantine.jsonl"
    dataset, order, held_out, protocol = open_data(config, model.config.image_size, quarantine)
    config = config.in_updates(order.num_samples, accelerator.num_processes)
    run = common.TrainingRun(accelerator, config, model=model, dataset=dataset, order=order)
    run.resume()
    pipeline = vpog.VPOGPipeline(run.inference_model, remove_background=config.data.mask_query != "none")
    check = run.validation(
        config.validation_steps,
        lambda model: validate(model, run, config, pipeline, held_out, protocol),
        score=lambda scalars: scalars["mssd_recall"],
    )
    sheets = config.visualization
    for batch in run.batches():
        with run.accumulate():
            update, seen = compute_loss(run, batch, config)
            run.update(*update)
        if sheets.enabled and run.is_due(sheets.save_frequency):
            run.log({}, {"batch": evaluation.draw_batch(*seen, max_samples=sheets.max_samples_per_batch)})
        check()
    run.finish(pipeline)


if __name__ == "__main__":
    main()
