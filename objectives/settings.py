"""What can be set about the training objectives: sections, with presets. Light to import: no torch here."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, TypeAdapter, model_validator

from backlot.config import Section
from backlot.modalities import MODALITIES

Objective = Literal[
    "shortcut", "flow_matching", "progressive", "consistency", "consistency_distillation", "live_reflow"
]

# A preset fills these keys; keys given beside it win. `mixture` is the set of class defaults below.
PRESETS = {
    "mixture": {},
    "official": {
        "bootstrap_fraction": 0.125,
        "dyadic_fraction": 1.0,
        "flow_times": "lattice",
        "smallest_step": "lattice",
        "path_eps": 1e-5,
    },
    "continuous": {
        "dyadic_fraction": 0.0,
        "continuous_sampler": "triangle",
        "smallest_step": "none",
        "teacher": "online",
        "target_clip": None,
        "dropout_on_bootstrap": True,
        "loss_reduction": "split",
    },
}


class ObjectiveConfig(Section):
    """Which loss, and how its batch is drawn. M stands for `denoise_timesteps`, L for log2 M."""

    name: Objective = "shortcut"
    """The loss: `shortcut`, or one of the baselines it is compared with."""
    preset: Literal["mixture", "official", "continuous"] = "mixture"
    """`mixture`: ours; `official`: the paper's code; `continuous`: any step size, as in later re-implementations.
    `official` also deals rows left over between the levels to the one-step level, and gives flow rows the bootstrap's
    samples again; otherwise levels take them in turn, and flow rows have samples of their own."""
    denoise_timesteps: int = Field(128, ge=2, le=65536)
    """M, a power of two: steps of 1/M and below count as infinitesimal, those above are bootstrapped."""
    bootstrap_fraction: float = Field(0.25, gt=0, lt=1)
    """Share of a micro-batch's rows that learn self-consistency; the others learn the flow."""
    dyadic_fraction: float = Field(0.5, ge=0, le=1)
    """Share of the bootstrap rows on the dyadic lattice (d = 2^-k, t a multiple of d); the others are continuous."""
    bootstrap_dt_bias: bool = False
    """Spend half of the dyadic rows on the two largest steps."""
    continuous_sampler: Literal["log_uniform", "triangle"] = "log_uniform"
    """Continuous rows: log d uniform in [1/M, 1], then t uniform in [0, 1-d]; or t uniform, then d in [1/M, 1-t]."""
    flow_times: Literal["uniform", "lattice"] = "uniform"
    """Times of the flow rows: uniform in [0, 1), or multiples of 1/M."""
    pure_noise_prob: float = Field(0.0, ge=0, le=1)
    """Share of the flow rows at exactly t = 0, where a single step starts."""
    smallest_step: Literal["zero", "lattice", "none"] = "zero"
    """How the flow rows and steps of at most 1/M name their step size: d = 0, or d = 1/M; `none`: flow rows d = 0,
    while a small step keeps its own size (nothing then ties it to the flow)."""
    teacher: Literal["ema", "online"] = "ema"
    """Whose half steps are the bootstrap's target."""
    target_clip: float | None = Field(4.0, gt=0)
    """Bound on the intermediate point and on the bootstrap target; null for none."""
    condition_dropout_prob: float = Field(0.1, ge=0, le=1)
    """Chance that a flow row loses its condition, so that guidance works; 1 trains an unconditional model."""
    dropout_on_bootstrap: bool = False
    """Drop conditions on bootstrap rows as well."""
    bootstrap_guidance_scale: float | None = Field(None, ge=1)
    """Guidance baked into the smallest bootstrapped step, whence it spreads to all larger ones; null for none."""
    loss_reduction: Literal["merged", "split"] = "merged"
    """One mean over all rows, or the mean of the flow rows plus the mean of the bootstrap rows."""
    loss_weighting: Literal["none", "sigma_squared"] = "none"
    """`sigma_squared` weighs rows by (1 - t)^2, which turns the velocity's error into that of the clean sample."""
    path_eps: float = Field(0.0, ge=0, lt=0.1)
    """Noise left at t = 1."""
    distillation_guidance_scale: float = Field(1.0, ge=0)
    """Guidance on the teacher of `progressive` (first phase) and `live_reflow`."""
    teacher_model: str | None = None
    """Folder of the trained flow model that `consistency_distillation` and `progressive` start from."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: object) -> object:
        preset = values.get("preset") if isinstance(values, dict) else None
        return {**PRESETS[preset], **values} if isinstance(preset, str) and preset in PRESETS else values

    @model_validator(mode="after")
    def _check(self) -> ObjectiveConfig:
        if self.denoise_timesteps & (self.denoise_timesteps - 1):
            raise ValueError(f"`denoise_timesteps` must be a power of two, not {self.denoise_timesteps}")
        if self.name in ("consistency_distillation", "progressive") and self.teacher_model is None:
            raise ValueError(f"`teacher_model` must name the flow model that {self.name} distils")
        return self

    @property
    def follows_paper_code(self) -> bool:
        """Whether rows are dealt out as in the paper's code."""
        return self.preset == "official"

    @property
    def levels(self) -> int:
        """L = log2 M, the number of bootstrapped step sizes 1, 1/2, ..., 2/M."""
        return self.denoise_timesteps.bit_length() - 1

    @property
    def flow_step_size(self) -> float:
        """The step size that stands for "infinitesimal"."""
        return 1 / self.denoise_timesteps if self.smallest_step == "lattice" else 0.0


class NoiseLevelConfig(Section):
    """At which noise levels a denoiser is trained; sigma = 1 is noise alone."""

    timestep_sampling: Literal["uniform", "logit_normal", "discrete"] = "uniform"
    """Law of sigma in (0, 1]."""
    logit_mean: float = 0.0
    """Mean of the normal variable whose sigmoid `logit_normal` takes."""
    logit_std: float = Field(1.0, gt=0)
    discrete_sigmas: list[float] = Field([0.25, 0.5, 0.75, 1.0], min_length=1)
    """`discrete` takes each of these equally often."""
    pure_noise_prob: float = Field(0.0, ge=0, le=1)
    """Share of the rows at exactly sigma = 1, the only one where a single step starts."""

    loss_weighting: Literal["none", "sigma_squared"] = "none"
    """`sigma_squared` turns the error of a flow's velocity into that of the clean sample."""

    @model_validator(mode="after")
    def _check(self) -> NoiseLevelConfig:
        if not all(0 < sigma <= 1 for sigma in self.discrete_sigmas):
            raise ValueError(f"`discrete_sigmas` must lie in (0, 1], got {self.discrete_sigmas}")
        return self


# The paper's; translation_scale has none in the released configuration.
LOSS_WEIGHTS = {"shape": 1.0, "translation": 1.0, "6drotation_normalized": 0.1, "scale": 0.1, "translation_scale": 0.0}
# What a preset of rules fills in; keys given beside it win. `corrected` is the set of class defaults below.
SCENE_RULES = {"corrected": {}, "reference": {"teacher": "live", "time_law": "logit_normal"}}


class SceneObjectiveConfig(Section):
    """The shortcut objective on scenes; a row is a scene (mode `scene`) or an object (mode `object`)."""

    rules: Literal["corrected", "reference"] = "corrected"
    """`reference` draws and weighs as SAM 3D Objects' public loss class, faults included, to compare with it: a step D
    starts at any time and may end beyond the data; D = 2 ... 1/64; the half step of 1/128 is asked for by its own size,
    which is never trained; guidance applies at every D, where it compounds, and to all modalities when only some rows
    are guided; one coin drops the condition of a whole batch, self-consistency rows included; their number is rounded
    down; flow rows are told twice the step size of fm_eps_max; the loss is the sum of a mean for each kind of rows;
    processes toss their own coins. It also fills `teacher: live` and `time_law: logit_normal`."""
    mode: Literal["scene", "object"] = "scene"
    """Rows that share a time, a step size and all coins: whole scenes, or single objects."""
    batch_mode: bool | None = None
    """The guide's name of mode: true for scene, false for object; wins over it."""
    independent_t: bool = False
    """Objects of a scene draw times of their own on flow rows (completion and editing)."""
    self_consistency_prob: float = Field(0.25, ge=0, le=1)
    """Share of rows that learn self-consistency; 0 trains plain flow matching."""
    shortcut_loss_weight: float = Field(1.0, ge=0)
    """Weight of the self-consistency loss."""
    guidance_scale: float = Field(4.0, ge=1)
    """Guidance of self-consistency targets; 1 for none."""
    cfg_strength: float | None = Field(None, ge=0)
    """The guide's name of guidance_scale - 1; wins over it."""
    ratio_cfg_samples: float = Field(0.5, ge=0, le=1)
    """Share of the rows that could be guided which are; a network learns the mean of both."""
    cfg_modalities: list[str] = ["shape"]
    """Modalities that guidance changes."""
    fm_in_shortcut_target_prob: float = Field(0.0, ge=0, le=1)
    """Chance that all half steps of a batch are asked for as infinitesimal."""
    fm_eps_max: float = Field(0.0, ge=0, lt=1)
    """Flow rows name a step size uniform in [0, fm_eps_max] instead of 0."""
    sigma_min: float = Field(0.0, ge=0, lt=0.1)
    """Noise left at t = 1."""
    time_law: Literal["uniform", "logit_normal"] = "uniform"
    """Of t on flow rows; on all rows with `rules: reference`, which has logit_normal."""
    logit_mean: float = 0.0
    """Of the normal variable whose sigmoid is t; the released SAM 3D configuration has -1."""
    logit_std: float = Field(1.0, gt=0)
    pure_noise_prob: float = Field(0.0, ge=0, le=1)
    """Share of the flow rows at exactly t = 0, where a single step starts."""
    fm_warmup_steps: int = Field(0, ge=0)
    """Updates of flow matching alone before self-consistency begins."""
    pairing: Literal["none", "hungarian"] = "none"
    """Assign each scene's objects to its noise so that translations travel least; straightens the flow."""
    loss_weights: dict[str, float] = LOSS_WEIGHTS
    """Of each modality; those not given keep their defaults."""
    reduction: Literal["scene", "object"] = "scene"
    """Whether scenes or objects weigh alike, over all processes and micro-batches of an update."""
    target_clip: float | None = Field(None, gt=0)
    """Bound on the intermediate point and on self-consistency targets; null for none."""
    condition_dropout_prob: float = Field(0.1, ge=0, le=1)
    """Chance that a row loses its condition, so that guidance works; 1 trains an unconditional model."""
    teacher: Literal["ema", "live"] = "ema"
    """Whose half steps are the target; `rules: reference` has live."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_rules(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        rules, strength, batch_mode = (values.get(key) for key in ("rules", "cfg_strength", "batch_mode"))
        if isinstance(rules, str) and rules in SCENE_RULES:
            values = {**SCENE_RULES[rules], **values}
        if isinstance(values.get("loss_weights"), dict):
            values = values | {"loss_weights": LOSS_WEIGHTS | values["loss_weights"]}
        if strength is not None:
            values = values | {"guidance_scale": 1 + TypeAdapter(float).validate_python(strength)}
        if batch_mode is not None:
            values = values | {"mode": "scene" if TypeAdapter(bool).validate_python(batch_mode) else "object"}
        return values

    @model_validator(mode="after")
    def _check(self) -> SceneObjectiveConfig:
        for key, names in (("loss_weights", self.loss_weights), ("cfg_modalities", self.cfg_modalities)):
            unknown = sorted(set(names) - set(MODALITIES))
            if unknown:
                raise ValueError(f"`{key}` names {', '.join(unknown)}; modalities are {', '.join(MODALITIES)}")
        if self.reduction == "object" and self.follows_reference:
            raise ValueError("`reduction` object is not among the rules of the reference, whose loss is of scenes")
        if self.independent_t and self.mode == "object":
            raise ValueError("`independent_t` is for mode scene: an object alone has a time of its own anyway")
        if self.pairing == "hungarian" and self.mode == "object":
            raise ValueError("`pairing` hungarian is for mode scene: an object alone has one slot")
        return self

    @property
    def follows_reference(self) -> bool:
        """Whether the draws and the loss are those of SAM 3D Objects' code."""
        return self.rules == "reference"

    @property
    def sync_draws(self) -> bool:
        """All processes draw the same coins and step sizes, so none waits for another; noise and t are their own."""
        return not self.follows_reference

    # ---- what objectives.shortcut calls these ----

    denoise_timesteps: ClassVar[int] = 128
    levels: ClassVar[int] = 7  # D = 1, 1/2, ..., 1/64

    @property
    def path_eps(self) -> float:
        return self.sigma_min

    @property
    def bootstrap_guidance_scale(self) -> float | None:
        return self.guidance_scale if self.guidance_scale > 1 else None
