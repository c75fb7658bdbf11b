"""The real command for the shape VAE: exact resume, accumulation, the losses, the best checkpoint, refusals."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from scene_samples import make_scene, write_scenes

from backlot.config import load_config
from data_prep.scenes.format import pack_occupancy, write_scene
from pipelines.shortcut_scene import OccupancyVAE
from pipelines.shortcut_scene.vae import GridGaussian
from trainers import train_shape_vae

train = partial(runs.train, system="shape_vae")
LOSSES = [1.549087, 1.371514, 1.369356, 1.421295]
VALIDATED = "--validation.validation_steps=2"


def write_shapes(folder: Path, scenes: int, seed: int) -> None:
    """Scenes of two shapes each, 8^3 cells: octahedra, ellipsoids and rounded boxes, (|x| / side)^power <= 1."""
    rng = np.random.default_rng(seed)
    centres = np.stack(np.meshgrid(*[(np.arange(8) + 0.5) / 8 - 0.5] * 3, indexing="ij"), axis=-1)
    for number in range(scenes):
        scene = make_scene(number, count=2, resolution=8)
        shapes = [(rng.uniform(0.25, 0.5, 3), rng.choice([1, 2, 8])) for _ in range(2)]
        grids = [(np.abs(centres / side) ** power).sum(-1) <= 1 for side, power in shapes]
        scene["tensors"]["occupancy"] = torch.from_numpy(pack_occupancy(np.stack(grids)))
        write_scene(folder / f"{number:04d}", **scene)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Ten objects to train on, six updates of four pass ends of epochs, varied at random; and eight others."""
    root = tmp_path_factory.mktemp("shapes")
    write_shapes(root / "train", 5, seed=0)
    write_shapes(root / "val", 4, seed=1)
    return [f"--data.path={root}", "--data.flip=true", "--data.rotate=true"]


@pytest.mark.parametrize(("workers", "accumulation"), [(0, 1), (2, 2)])
def test_three_updates_and_three_after_a_resume_are_six(tmp_path, data, workers, accumulation):
    """Bit for bit, in the middle of an epoch and of a log interval, with draws from the posterior."""
    settings = {"gradient_accumulation_steps": accumulation, "dataloader_num_workers": workers}
    runs.resume_in_the_middle(tmp_path, *data, system="shape_vae", **settings)


def test_two_updates_then_four_and_the_vae_is_the_ema(tmp_path, data):
    settings = {"logging_steps": 1, "checkpoints_total_limit": None}
    train(tmp_path / "run", *data, **settings, max_train_steps=2)
    two = OccupancyVAE.from_pretrained(tmp_path / "run").state_dict()
    train(tmp_path / "run", *data, **settings, max_train_steps=4, resume_from_checkpoint="latest")
    ema = runs.tensors_of(tmp_path / "run/checkpoint-4")
    four = OccupancyVAE.from_pretrained(tmp_path / "run").state_dict()
    for name, value in four.items():
        assert torch.equal(value, ema[f"ema/{name}"]), name
    assert not torch.equal(two["encoder.input_layer.weight"], four["encoder.input_layer.weight"])


def test_micro_batches_of_any_size_give_the_same_gradient(tmp_path, data, monkeypatch):
    """8x1 = 4x2 = 2x4 without noise: Dice is taken of each shape, not of the micro-batch."""

    def loss(run, batch, config):
        output = run.model(batch["occupancy"], sample_posterior=False)
        return train_shape_vae.vae_loss(output.sample, batch["occupancy"], output.latent_dist, config.objective)

    monkeypatch.setattr(train_shape_vae, "compute_loss", loss)
    rows = []
    for size in (8, 4, 2):
        settings = {"train_batch_size": size, "gradient_accumulation_steps": 8 // size, "logging_steps": 1}
        train(tmp_path / str(size), *data, **settings, max_train_steps=2)
        rows.append(runs.rows_of(tmp_path / str(size)))
    for other in rows[1:]:
        for a, b in zip(rows[0], other, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)


def test_the_loss_is_its_equation():
    """Against sums written out: per shape, then the mean; and a perfect answer costs nothing but KL."""
    torch.manual_seed(0)
    occupancy = (torch.rand(3, 1, 4, 4, 4) < torch.tensor([0.1, 0.5, 0.9]).view(3, 1, 1, 1, 1)).float()
    logits, posterior = torch.randn(3, 1, 4, 4, 4), GridGaussian(*torch.randn(2, 3, 2, 2, 2, 2))
    settings = train_shape_vae.LossConfig(reconstruction="bce_dice", kl_weight=0.25)
    loss, metrics = train_shape_vae.vae_loss(logits, occupancy, posterior, settings)
    dice, entropy = [], []
    for x, o in zip(logits.double(), occupancy.double(), strict=True):
        p = 1 / (1 + (-x).exp())
        dice.append(1 - (2 * (p * o).sum() + 1) / (p.sum() + o.sum() + 1))
        entropy.append(-(o * p.log() + (1 - o) * (1 - p).log()).mean())
    wanted = {"loss_dice": sum(dice) / 3, "loss_bce": sum(entropy) / 3, "kl": posterior.kl().mean().double()}
    for name, value in wanted.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-5), name
    assert float(loss) == pytest.approx(float(wanted["loss_dice"] + wanted["loss_bce"] + wanted["kl"] / 4), rel=1e-5)
    perfect = train_shape_vae.vae_loss(200 * occupancy - 100, occupancy, posterior, settings)[0]
    assert float(perfect) == pytest.approx(float(wanted["kl"] / 4), abs=1e-6)
    alone = train_shape_vae.vae_loss(logits, occupancy, posterior, train_shape_vae.LossConfig(kl_weight=0))
    assert float(alone[0]) == pytest.approx(float(wanted["loss_dice"]), rel=1e-5)
    assert "loss_bce" not in alone[1]


def test_overlap_precision_and_recall():
    true = torch.tensor([[1, 1, 1, 0, 0, 0], [0] * 6, [1] * 6]).bool()
    decoded = torch.tensor([[1, 1, 0, 1, 1, 0], [0] * 6, [1] * 6]).bool()
    measured = train_shape_vae.compare(decoded.view(3, 1, 1, 2, 3), true.view(3, 1, 1, 2, 3))
    wanted = {"iou": [2 / 5, 0, 1], "precision": [2 / 4, 0, 1], "recall": [2 / 3, 0, 1]}
    assert {name: values.tolist() for name, values in measured.items()} == {
        name: pytest.approx(values) for name, values in wanted.items()
    }


def test_gradients_reach_every_parameter(tmp_path, data):
    """The residual blocks end in zeros: after the first update their inner layers take part as well."""
    train(tmp_path / "run", *data, max_train_steps=3, ema_decay=0)
    torch.manual_seed(0)
    start = train_shape_vae.create_vae(
        load_config(train_shape_vae.Config, runs.command_line(tmp_path, system="shape_vae"))
    )
    end = OccupancyVAE.from_pretrained(tmp_path / "run").state_dict()
    assert [name for name, value in start.state_dict().items() if torch.equal(value, end[name])] == []


def test_shapes_never_seen_are_reconstructed(tmp_path):
    """Validation measures the EMA, on the mean of the posterior, and comes to the same whenever it is repeated."""
    root = tmp_path / "shapes"
    write_shapes(root / "train", 50, seed=2)
    write_shapes(root / "val", 4, seed=3)
    data = [f"--data.path={root}", "--data.flip=true", "--data.rotate=true"]
    settings = {"max_train_steps": 100, "learning_rate": 1e-2, "train_batch_size": 8, "checkpointing_steps": 100}
    train(tmp_path / "run", *data, "--validation.validation_steps=50", **settings)
    rows = [row for row in runs.rows_of(tmp_path / "run") if "validation/iou" in row]
    assert {"validation/precision", "validation/recall", "validation/kl", "validation/loss_dice"} < rows[-1].keys()
    assert rows[-1]["validation/iou"] > 0.8
    assert (tmp_path / "run/samples/shapes-000100.png").exists()
    dataset = train_shape_vae.scenes.OccupancyDataset(root, "val")
    true = torch.stack([dataset[i]["occupancy"] for i in (0, 2, 4, 6)])  # four of eight, spread out
    with torch.no_grad():
        vae = OccupancyVAE.from_pretrained(tmp_path / "run")
        decoded = vae.decode(vae.encode(true).latent_dist.mode()).sample > 0
    assert float(train_shape_vae.compare(decoded, true > 0)["iou"].mean()) == pytest.approx(rows[-1]["validation/iou"])
    assert json.loads((tmp_path / "run/best.json").read_text())["score"] == max(r["validation/iou"] for r in rows)


def test_going_on_from_a_trained_vae(tmp_path, data):
    train(tmp_path / "first", *data, max_train_steps=2)
    others = [*data, f"--model.init_from={tmp_path / 'first'}", "--model.preset=toy"]
    train(tmp_path / "second", *others, max_train_steps=1, ema_decay=0.999999)
    first, second = (OccupancyVAE.from_pretrained(tmp_path / name).state_dict() for name in ("first", "second"))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("setting", ["gradient_checkpointing=true", "mixed_precision=bf16"])
def test_memory_can_be_saved(tmp_path, data, setting):
    """Recomputed activations change nothing; bfloat16 little."""
    # Latents of side 4: at 2 the weight gradient of a bf16 Conv3d on CPUs with AVX-512 holds what the memory held.
    shape = [*data, "--model.patch_size=1"]
    train(tmp_path / "plain", *shape, max_train_steps=2, logging_steps=1)
    train(tmp_path / "saving", *shape, f"--training.{setting}", VALIDATED, max_train_steps=2, logging_steps=1)
    plain, saving = (runs.tensors_of(tmp_path / name / "checkpoint-2") for name in ("plain", "saving"))
    if "checkpointing" in setting:
        for name, value in plain.items():
            torch.testing.assert_close(saving[name], value, rtol=1e-4, atol=1e-6)
    for a, b in zip(*(runs.rows_of(tmp_path / name) for name in ("plain", "saving")), strict=False):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-2)


def test_the_loss_curve_is_the_one_we_know(tmp_path, data):
    """Pinned on CPU in float32; a change means that every run changes. Tolerance: other CPUs add in other orders."""
    train(tmp_path / "run", *data, max_train_steps=4, logging_steps=1)
    losses = [row["loss"] for row in runs.rows_of(tmp_path / "run")]
    assert losses == pytest.approx(LOSSES, rel=1e-3)


def test_two_ranks_draw_different_noise_and_hold_equal_weights(tmp_path, data):
    settings = {"expected_processes": 2, "max_train_steps": 4, "checkpointing_steps": 2}
    arguments = runs.command_line(tmp_path / "run", *data, VALIDATED, system="shape_vae", **settings)
    first, second = runs.launch_two(Path(__file__).parent / "two_shape_ranks.py", tmp_path, *arguments)
    assert first["weights"] == second["weights"]
    assert len(set(first["noise"] + second["noise"])) == 8
    assert json.loads((tmp_path / "run/best.json").read_text())["step"] in (2, 4)
    OccupancyVAE.from_pretrained(tmp_path / "run")


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["--model.preset=huge"], "model.preset = 'huge'"),
        (["--objective.kl_weight=-1"], "objective.kl_weight"),
        (["--objective.reconstruction=bce"], "objective.reconstruction"),
        (["--model.latent_channel=2"], "did you mean model.latent_channels"),
        (["--data.flips=true"], "did you mean data.flip"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, data, capsys, others, message):
    with pytest.raises(SystemExit) as exit_:
        train(tmp_path / "run", *data, *others)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_with_data_or_model_is_one_line(tmp_path, data):
    with runs.refused(r"^data: split 'train' of .*none is missing"):
        train(tmp_path / "run", f"--data.path={tmp_path / 'none'}")
    write_scenes(tmp_path / "large", {"train": 1, "val": 1}, resolution=16)
    with runs.refused(r"^data: the shapes in .*large have 16 cells a side, the model takes 8"):
        train(tmp_path / "run", f"--data.path={tmp_path / 'large'}")
    shutil.rmtree(tmp_path / "large/val")
    with runs.refused(r"^data: split 'val' of .*large is missing"):
        train(tmp_path / "run", f"--data.path={tmp_path / 'large'}", "--model.sample_size=16")
    with runs.refused(r"^model: `sample_size` 10 must be a multiple of 4"):
        train(tmp_path / "run", *data, "--model.sample_size=10")
    with runs.refused(r"^model: .*config.json"):
        train(tmp_path / "run", *data, f"--model.init_from={tmp_path}")


def test_the_defaults_are_trellis_s():
    arguments = ["--data.path=x", "--output_dir=x", "--max_train_steps=1", "--train_batch_size=4"]
    config = load_config(train_shape_vae.Config, arguments)
    training, objective = config.training, config.objective
    assert (training.learning_rate, training.adam_weight_decay, training.ema_decay) == (1e-4, 0, 0.9999)
    assert (objective.reconstruction, objective.kl_weight, config.model.preset) == ("dice", 1e-3, "trellis")
