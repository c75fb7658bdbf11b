"""What a script may hand over: weighted rows, an order of the data, rows to log, validation functions."""

from __future__ import annotations

import json

import pytest
import runs
import torch
from flow_samples import Flows
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import ConcatDataset, Dataset

from backlot.samples import BlockShuffle, SampleKey, WeightedMixture
from objectives.rectified_flow import interpolate, squared_error, velocity_target
from trainers.common.validation import batches_of, held_out_items, mean_of, spread, step_names

# ---- weighted rows ----

WEIGHTS = torch.tensor([3.0, 0.0, 0.5, 0.0, 1.0, 0.0, 7.0, 2.5])
SETTINGS = {"max_train_steps": 3, "learning_rate": 1e-2, "adam_epsilon": 1e-3, "max_grad_norm": 0}


class InOrder:
    """Eight samples as they lie, so that those without weight can be alone in a micro-batch."""

    num_samples, seed = 8, 0

    def keys(self, start: int, count: int) -> list[SampleKey]:
        return [SampleKey(position % 8, position // 8) for position in range(start, start + count)]


def row_errors(run, batch: dict) -> torch.Tensor:
    """(B,) errors of a flow whose noise and time belong to the sample."""
    noise, data, t = batch["noise"], batch["pixel_values"], batch["t"]
    output = run.model(interpolate(noise, data, t), t, torch.zeros_like(t), class_labels=batch["class_labels"]).sample
    return squared_error(output, velocity_target(noise, data))


def train_weighted(folder, batch_size: int, weights: torch.Tensor, scale: float = 1.0):
    """Three updates of eight rows of given weights; the run, closed, and its rows."""
    accumulation = {"train_batch_size": batch_size, "gradient_accumulation_steps": 8 // batch_size}
    run = runs.open_run(folder, Flows(8), order=InOrder(), **accumulation, **SETTINGS, logging_steps=1)
    for batch in run.batches():
        with run.accumulate():
            weight = scale * weights[batch["index"]]
            errors = row_errors(run, batch)
            metrics = {"error": torch.stack([errors.detach().sum(), torch.tensor(float(len(errors)))])}
            run.update((weight * errors).sum(), metrics, weight=weight.sum())
    runs.save_and_close(run)
    return run, runs.rows_of(folder)


@pytest.fixture(scope="module")
def weights_of_the_whole(tmp_path_factory):
    """The same updates by hand: the mean over all eight rows, as one loss."""
    run = runs.open_run(
        tmp_path_factory.mktemp("whole") / "run", Flows(8), order=InOrder(), **SETTINGS | {"train_batch_size": 8}
    )
    for batch in run.batches():
        with run.accumulate():
            run.update((WEIGHTS * row_errors(run, batch)).sum() / WEIGHTS.sum())
    runs.save_and_close(run)
    return torch.cat([parameter.detach().flatten() for parameter in run.network.parameters()])


@pytest.mark.parametrize("batch_size", [8, 4, 2, 1])
def test_an_update_is_the_mean_over_all_rows_however_they_are_spread(tmp_path, batch_size, weights_of_the_whole):
    """Unequal weights; with a row at a time, three of eight micro-batches weigh nothing."""
    run, rows = train_weighted(tmp_path / "run", batch_size, WEIGHTS)
    mine = torch.cat([parameter.detach().flatten() for parameter in run.network.parameters()])
    assert (mine - weights_of_the_whole).norm() <= 1e-6 * weights_of_the_whole.norm()
    one = train_weighted(tmp_path / "one", 8, WEIGHTS)[1]
    for row, expected in zip(rows, one, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


def test_the_unit_of_weights_does_not_matter(tmp_path, weights_of_the_whole):
    run, _ = train_weighted(tmp_path / "run", 2, WEIGHTS, scale=100.0)
    mine = torch.cat([parameter.detach().flatten() for parameter in run.network.parameters()])
    assert (mine - weights_of_the_whole).norm() <= 1e-6 * weights_of_the_whole.norm()


def test_an_update_without_any_weight_moves_nothing(tmp_path, flows):
    settings = SETTINGS | {"adam_weight_decay": 0.0}
    run = runs.open_run(tmp_path / "run", flows, **settings)
    before = [parameter.detach().clone() for parameter in run.network.parameters()]
    for batch in run.batches():
        with run.accumulate():
            run.update(0 * row_errors(run, batch).sum(), weight=0.0)
    assert run.step == 3
    assert all(torch.equal(a, b) for a, b in zip(before, run.network.parameters(), strict=True))
    runs.save_and_close(run)


# ---- orders ----


def create_order(name: str):
    if name == "mixture":
        return WeightedMixture([10, 14], [3, 1], seed=0, block=8)
    return BlockShuffle([5, 7, 5, 7], seed=0, shards_in_window=2)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["mixture", "shards"])
def test_an_order_is_followed_and_resumed_exactly(tmp_path, flows, name, workers):
    """Six updates, and three and three: the samples are those of the order, the weights equal bit for bit."""
    dataset = ConcatDataset([Flows(10), Flows(14)]) if name == "mixture" else flows
    settings = {"gradient_accumulation_steps": 2, "dataloader_num_workers": workers, "logging_steps": 2}
    seen: dict[str, list[int]] = {"straight": [], "broken": []}
    for folder, plan in (("straight", [6]), ("broken", [3, 6])):
        for number, last in enumerate(plan):
            resume = "latest" if number else None
            run = runs.open_run(
                tmp_path / folder,
                dataset,
                order=create_order(name),
                **settings,
                max_train_steps=last,
                resume_from_checkpoint=resume,
            )
            for batch in run.batches():
                seen[folder] += batch["index"].tolist()
                with run.accumulate():
                    run.update(*runs.flow_loss(run, batch))
            runs.save_and_close(run)
    expected = [int(key) for key in create_order(name).keys(0, 48)]
    expected = [index - 10 * (index >= 10) for index in expected] if name == "mixture" else expected
    assert seen["straight"] == seen["broken"] == expected
    straight, broken = (tmp_path / folder / "checkpoint-6" for folder in ("straight", "broken"))
    assert runs.differing(runs.tensors_of(straight), runs.tensors_of(broken)) == []
    assert runs.rows_of(straight.parent) == runs.rows_of(broken.parent)


def test_another_order_cannot_continue_a_run(tmp_path, flows, capsys):
    run = runs.open_run(tmp_path / "run", flows, order=create_order("shards"), max_train_steps=1)
    runs.train_on(run)
    runs.save_and_close(run)
    other = WeightedMixture([10, 15], [1, 1], seed=0, block=8)
    with pytest.raises(SystemExit) as exit_:
        runs.open_run(tmp_path / "run", flows, order=other, resume_from_checkpoint="latest")
    assert exit_.value.code == 2
    assert "num_samples (their number): 24 then, 25 now" in capsys.readouterr().err


# ---- rows, pictures and histograms at any time ----


def test_a_script_may_log_at_any_time(tmp_path, flows):
    run = runs.open_run(tmp_path / "run", flows, report_to=["tensorboard"], max_train_steps=2, logging_steps=2)
    for batch in run.batches():
        with run.accumulate():
            run.update(*runs.flow_loss(run, batch))
        if run.step == 1:
            values = torch.tensor([0.0, 1.0, 1.0, torch.nan])
            run.log({"levels/share": 0.25}, {"levels": Image.new("RGB", (4, 4))}, {"levels/rows": values})
    runs.save_and_close(run)
    rows = runs.rows_of(tmp_path / "run")
    assert rows[0] == {"step": 1, "levels/share": 0.25}
    assert [row["step"] for row in rows] == [1, 2]
    assert (tmp_path / "run/samples/levels-000001.png").exists()
    events = EventAccumulator(str(tmp_path / "run/tensorboard"), {"histograms": 0, "images": 0, "scalars": 0})
    events.Reload()
    [histogram] = events.Histograms("levels/rows")
    assert (histogram.step, histogram.histogram_value.num, histogram.histogram_value.sum) == (1, 3, 2.0)
    assert [event.step for event in events.Images("levels")] == [1]
    assert [event.value for event in events.Scalars("levels/share")] == [0.25]


# ---- validation ----


def scores(folder, flows, measured: list[float], **settings):
    """A run of six updates that is validated at every second one, with these outcomes."""
    outcomes = iter(measured)

    def measure(model):
        value = next(outcomes)
        return {"error": torch.tensor(value)}, {"square": Image.new("L", (4, 4))}

    run = runs.open_run(folder, flows, max_train_steps=6, checkpoints_total_limit=1, **settings)
    check = run.validation(2, measure, score=lambda scalars: -scalars["error"], name="held_out")
    for batch in run.batches():
        with run.accumulate():
            run.update(*runs.flow_loss(run, batch))
        check()
    runs.save_and_close(run)
    return runs.rows_of(folder)


def test_the_best_checkpoint_is_kept_and_named(tmp_path, flows):
    rows = scores(tmp_path / "run", flows, [2.0, 1.0, 3.0])
    assert [row for row in rows if "held_out/error" in row] == [
        {"step": step, "held_out/error": error, "held_out/score": -error}
        for step, error in ((2, 2.0), (4, 1.0), (6, 3.0))
    ]
    assert json.loads((tmp_path / "run/best.json").read_text()) == {"step": 4, "score": -1.0}
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert (tmp_path / "run/samples/square-000006.png").exists()


def test_a_validation_that_a_kill_prevented_is_made_up(tmp_path, flows):
    """The checkpoint of update 6 is there, the row of its validation is not: the resumed run writes it."""
    scores(tmp_path / "run", flows, [2.0, 1.0, 0.5])
    straight = runs.rows_of(tmp_path / "run")
    path = tmp_path / "run/metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert "held_out" in lines[-1]
    path.write_text("".join(lines[:-1]))
    (tmp_path / "run/best.json").unlink()
    assert scores(tmp_path / "run", flows, [0.5], resume_from_checkpoint="latest") == straight
    assert json.loads((tmp_path / "run/best.json").read_text()) == {"step": 6, "score": -0.5}


def test_not_a_number_is_never_the_best(tmp_path, flows):
    scores(tmp_path / "run", flows, [float("nan"), 1.0, float("nan")])
    assert json.loads((tmp_path / "run/best.json").read_text())["step"] == 4


# ---- what validation functions are made of ----


@pytest.mark.parametrize(
    ("total", "count", "rows"),
    [(10, 3, [0, 3, 6]), (3, 8, [0, 1, 2]), (5, 5, [0, 1, 2, 3, 4]), (0, 4, []), (9, 1, [0])],
)
def test_rows_are_spread_out(total, count, rows):
    assert spread(total, count) == rows


def test_held_out_items_are_never_augmented():
    class Augmented(Dataset):
        def __len__(self) -> int:
            return 10

        def __getitem__(self, key: SampleKey) -> dict[str, torch.Tensor]:
            return {"row": torch.tensor(int(key)), "noise": torch.randn((), generator=key.generator())}

    items, again = held_out_items(Augmented(), 4), held_out_items(Augmented(), 4)
    assert [int(item["row"]) for item in items] == [0, 2, 5, 7]
    assert all(torch.equal(a["noise"], b["noise"]) for a, b in zip(items, again, strict=True))


def test_means_over_batches_are_means_over_rows():
    items = [{"value": torch.tensor(float(row))} for row in range(7)]
    batches = list(batches_of(items, 3, torch.device("cpu")))
    assert sorted(len(batch["value"]) for batch in batches) == [2, 2, 3]
    assert sorted(torch.cat([batch["value"] for batch in batches]).tolist()) == list(range(7))
    measured = (({"mean": batch["value"].mean(), "one": 1.0}, len(batch["value"])) for batch in batches)
    assert mean_of(measured) == pytest.approx({"mean": 3.0, "one": 1.0}, rel=1e-6)
    assert mean_of([]) == {}


def test_names_of_step_counts():
    assert step_names([1, 4]) == ["1 step", "4 steps"]
