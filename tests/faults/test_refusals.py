"""What a run will not do: overwrite what is not its own, or continue another experiment. And how programs end."""

from __future__ import annotations

import atexit
import hashlib
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import runs
import torch
from flow_samples import Flows

from backlot.config import load_config
from trainers import train_shortcut
from trainers.common import checkpoints


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, with a digest; folders and links as such."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = (
            "link"
            if path.is_symlink()
            else "folder"
            if path.is_dir()
            else hashlib.sha256(path.read_bytes()).hexdigest()
        )
        found[str(path.relative_to(folder))] = kind
    return found


def exit_of(run_dir: Path, *others: str, **training) -> int | str | None:
    """The exit code of the command, in this process."""
    with pytest.raises(SystemExit) as exit_:
        runs.train(run_dir, *others, **{"max_train_steps": 2} | training)
    return exit_.value.code


# ---- folders ----


def weights(folder: Path) -> None:
    (folder / "unet").mkdir()
    (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"somebody's work")


def pipeline(folder: Path) -> None:
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')


def configuration(folder: Path) -> None:
    (folder / "config.yaml").write_text("somebody: else\n")


def pretrained(folder: Path) -> None:
    for part in (weights, pipeline):
        part(folder)
    (folder / "vae").mkdir()
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text("{}")


def hidden(folder: Path) -> None:
    (folder / ".git").mkdir()


def dangling(folder: Path) -> None:
    (folder / "transformer").symlink_to("/nonexistent")


FOREIGN = [weights, pipeline, configuration, pretrained, hidden, dangling]


@pytest.mark.parametrize("resume", [None, "auto"])
@pytest.mark.parametrize("put", FOREIGN, ids=lambda put: put.__name__)
def test_a_folder_with_somebody_elses_work_is_refused_untouched(tmp_path, capsys, put, resume):
    put(tmp_path)
    before = contents(tmp_path)
    assert exit_of(tmp_path, resume_from_checkpoint=resume) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert str(tmp_path) in message
    assert "choose an empty or new --output_dir" in message
    assert contents(tmp_path) == before


def test_a_finished_run_without_its_checkpoints_is_not_trained_over(tmp_path, finished_run, capsys):
    """Its pipeline is all that is left of it."""
    run_dir = shutil.copytree(finished_run, tmp_path / "run")
    for checkpoint in checkpoints.list_checkpoints(run_dir):
        shutil.rmtree(checkpoint)
    before = contents(run_dir)
    assert exit_of(run_dir) == 2
    assert "which a run would overwrite" in capsys.readouterr().err
    assert contents(run_dir) == before


@pytest.mark.parametrize("kind", ["file", "link to nothing", "below a file", "not to be written"])
def test_what_cannot_be_a_folder_is_refused_in_a_line(tmp_path, capsys, kind):
    place = tmp_path / "run"
    if kind == "link to nothing":
        place.symlink_to(tmp_path / "nowhere" / "at all")
    elif kind == "not to be written":
        place = Path("/proc/self/run")
    else:
        place.write_text("a file")
    assert exit_of(place / "below" if kind == "below a file" else place) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "update" not in line]
    assert len(lines) == 1, lines
    assert kind != "file" or place.read_text() == "a file"


def test_leftovers_of_a_run_without_checkpoints_and_logs_are_no_obstacle(tmp_path, monkeypatch):
    """A run that crashed before its first checkpoint is started again; a launcher's logs may lie beside."""
    with monkeypatch.context() as patched:
        patched.setattr(train_shortcut, "compute_loss", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runs.train(tmp_path, max_train_steps=2)
    (tmp_path / "checkpoint-2.tmp").mkdir()
    (tmp_path / "slurm-17.out").write_text("a launcher's words")
    (tmp_path / "train.log").write_text("more of them")
    runs.train(tmp_path, max_train_steps=2)
    assert checkpoints.verify(tmp_path / "checkpoint-2") == []
    assert (tmp_path / "slurm-17.out").read_text() == "a launcher's words"


# ---- another experiment ----

EXPERIMENTS = {
    "objective": (["--objective.name=flow_matching"], "objective.name: 'shortcut' then, 'flow_matching' now"),
    "loss": (["--objective.condition_dropout_prob=0.3"], "objective.condition_dropout_prob"),
    "image size": (["--data.image_size=8"], "data.image_size: None then, 8 now"),
    "data": (["--data.label_column=null"], "data.label_column"),
    "width": (["--model.hidden_size=64"], "model.hidden_size: 32 then, 64 now"),
    "depth": (["--model.num_layers=3"], "model.num_layers: 2 then, 3 now"),
    "dropout": (["--model.dropout=0.1"], "model.dropout: 0.0 then, 0.1 now"),
    "seed": (["--training.seed=1"], "training.seed: 0 then, 1 now"),
    "average": (["--training.use_ema=false"], "training.use_ema"),
}


@pytest.fixture
def run_dir(tmp_path, finished_run):
    return shutil.copytree(finished_run, tmp_path / "run")


@pytest.mark.parametrize("change", EXPERIMENTS)
def test_another_experiment_is_refused_by_name(run_dir, capsys, change):
    arguments, named = EXPERIMENTS[change]
    if change == "average":
        arguments = [*arguments, "--objective.teacher=online"]
    before = contents(run_dir)
    assert exit_of(run_dir, *arguments, max_train_steps=8, resume_from_checkpoint="latest") == 2
    message = capsys.readouterr().err
    assert named in message
    assert "start a new run" in message
    assert "Traceback" not in message
    after = contents(run_dir)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed <= {"exit.json", "lock"}
    assert json.loads((run_dir / "exit.json").read_text()) == {"code": 2}


def test_every_key_that_is_not_named_as_harmless_makes_another_experiment():
    """Of all of the script's keys; a new one is strict until somebody says otherwise."""
    folder = ["--config", str(runs.TINY), "--data.dataset_name=imagefolder", "--data.path=photos"]
    values = load_config(train_shortcut.Config, folder).model_dump(mode="json")
    for change in ("--data.horizontal_flip=true", "--data.image_size=64", "--model.patch_size=1"):
        config = load_config(train_shortcut.Config, [*folder, change])
        (line,) = config.differences(values)
        assert line.startswith(change[2:].partition("=")[0] + ": ")
    harmless = load_config(
        train_shortcut.Config, [*folder, "--learning_rate=1e-5", "--data.path=moved", "--validation.num_samples=9"]
    )
    assert harmless.differences(values) == []


def test_what_makes_no_other_experiment_may_change(run_dir):
    runs.train(
        run_dir,
        "--validation.num_samples=16",
        max_train_steps=7,
        learning_rate=1e-4,
        lr_scheduler="cosine",
        train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        ema_decay=0.5,
        checkpointing_steps=3,
        logging_steps=1,
        resume_from_checkpoint="latest",
    )
    assert checkpoints.verify(run_dir / "checkpoint-7") == []
    assert "learning_rate: 0.0001" in (run_dir / "config.yaml").read_text()


@pytest.mark.parametrize("allowed", ["model.dropout", "model"])
def test_a_change_is_admitted_by_name(run_dir, allowed):
    others = ["--model.dropout=0.1", f"--training.resume_with_changes=[{allowed}]"]
    runs.train(run_dir, *others, max_train_steps=7, resume_from_checkpoint="latest")
    assert "dropout: 0.1" in (run_dir / "config.yaml").read_text()


def test_another_seed_is_admitted_by_its_key(run_dir):
    others = ["--training.seed=1", "--training.resume_with_changes=[training.seed]"]
    runs.train(run_dir, *others, max_train_steps=7, resume_from_checkpoint="latest")
    assert checkpoints.verify(run_dir / "checkpoint-7") == []


def test_admitting_one_change_admits_no_other(run_dir, capsys):
    others = ["--model.dropout=0.1", "--data.image_size=8", "--training.resume_with_changes=[model.dropout]"]
    assert exit_of(run_dir, *others, max_train_steps=8, resume_from_checkpoint="latest") == 2
    message = capsys.readouterr().err
    assert "data.image_size" in message
    assert "model.dropout: " not in message


def test_an_unknown_key_among_the_changes_is_an_error_naming_it(run_dir, capsys):
    before = contents(run_dir)
    others = ["--training.resume_with_changes=[model.dropuot]"]
    assert exit_of(run_dir, *others, max_train_steps=8, resume_from_checkpoint="latest") == 2
    message = capsys.readouterr().err
    assert "model.dropuot" in message
    assert "did you mean model.dropout?" in message
    assert contents(run_dir) == before


class Fingerprinted(Flows):
    """Data that know which they are."""

    def __init__(self, fingerprint: str | None, size: int = 24):
        super().__init__(size)
        self.fingerprint = fingerprint


def run_on(run_dir: Path, dataset, **training) -> None:
    run = runs.open_run(run_dir, dataset, **training)
    runs.train_on(run)
    runs.save_and_close(run)


@pytest.mark.parametrize(
    ("dataset", "named"),
    [
        (Fingerprinted("b"), "data (their fingerprint): 'a' then, 'b' now"),
        (Fingerprinted("a", size=23), "num_samples (their number): 24 then, 23 now"),
    ],
)
def test_other_data_are_refused(tmp_path, capsys, dataset, named):
    """Also where there are as many samples."""
    run_on(tmp_path, Fingerprinted("a"), max_train_steps=1)
    with pytest.raises(SystemExit) as exit_:
        run_on(tmp_path, dataset, resume_from_checkpoint="latest")
    assert exit_.value.code == 2
    assert named in capsys.readouterr().err
    key = named.split()[0]
    run_on(tmp_path, dataset, max_train_steps=2, resume_from_checkpoint="latest", resume_with_changes=[key])
    assert checkpoints.verify(tmp_path / "checkpoint-2") == []


def test_the_same_data_and_data_that_know_not_which_they_are_go_on(tmp_path):
    run_on(tmp_path, Fingerprinted("a"), max_train_steps=1)
    run_on(tmp_path, Fingerprinted("a"), max_train_steps=2, resume_from_checkpoint="latest")
    run_on(tmp_path, Fingerprinted(None), max_train_steps=3, resume_from_checkpoint="latest")
    assert checkpoints.verify(tmp_path / "checkpoint-3") == []


def test_weights_of_another_shape_are_refused_also_where_the_configuration_is_equal(tmp_path, flows, capsys):
    """A test's network is in no configuration; in a script it may depend on the data."""
    from pipelines.shortcut import ShortcutDiT

    run_on(tmp_path, flows, max_train_steps=1)
    wider = ShortcutDiT(8, 1, 2, hidden_size=32, num_layers=1, num_attention_heads=2, num_classes=10)
    with pytest.raises(SystemExit) as exit_:
        runs.open_run(tmp_path, flows, wider, resume_from_checkpoint="latest")
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert "cannot resume from" in message
    assert "rows, not 32" in message or "has the shape" in message


# ---- exit codes ----


def command(arguments: list[str], place: str) -> None:
    """The real command, with one thing wrong."""
    compute_loss = train_shortcut.compute_loss

    def wrong(run, *others):
        if run.step == 2 and place == "crash":
            raise ZeroDivisionError("a fault of ours")
        if run.step == 2 and place == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        if run.step == 2 and place == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        loss, metrics = compute_loss(run, *others)
        return loss * (math.nan if run.step == 2 and place == "non-finite" else 1), metrics

    train_shortcut.compute_loss = wrong
    torch.set_num_threads(1)
    try:
        train_shortcut.main(arguments)
    finally:
        atexit._run_exitfuncs()  # a process from a shell calls them; a child of multiprocessing does not


# what is wrong: further arguments, exit code, what exit.json says (None: it does not exist)
ENDS = {
    "nothing": ([], 0, 0),
    "crash": ([], 1, 1),
    "key": (["--training.learning_rat=1"], 2, None),
    "value": (["--learning_rate=-1"], 2, None),
    "folder in use by others": (["--output_dir=/proc/self"], 2, None),
    "data": (["--data.dataset_name=imagefolder", "--data.path=/nonexistent"], 2, 2),
    "model": (
        ["--objective.name=progressive", "--model.use_shortcut=false", "--objective.teacher_model=/nonexistent"],
        2,
        2,
    ),
    "checkpoint": (["--resume_from_checkpoint=latest"], 2, 2),
    "non-finite": ([], 3, 3),
    "stop": ([], 75, 75),
    "killed": ([], -signal.SIGKILL, None),
}


@pytest.mark.parametrize("place", ENDS)
def test_an_exit_code_has_one_meaning(tmp_path, place):
    others, code, written = ENDS[place]
    run_dir, log = tmp_path / "run", tmp_path / "log"
    run_dir.mkdir()
    (run_dir / "exit.json").write_text('{"code": 99}')  # of a run before
    arguments = runs.command_line(run_dir, *others, max_train_steps=4)
    process = runs.start(log, command, arguments, place)
    assert runs.end(process) == code, log.read_text()
    text = log.read_text()
    assert ("Traceback" in text) == (code == 1), text
    begun = place not in ("key", "value", "folder in use by others")
    if begun:
        exit_json = run_dir / "exit.json"
        assert (json.loads(exit_json.read_text())["code"] if exit_json.exists() else None) == written
    else:
        assert json.loads((run_dir / "exit.json").read_text()) == {"code": 99}
    if place in ("crash", "stop"):
        newest = checkpoints.list_checkpoints(run_dir)[0]
        assert checkpoints.verify(newest) == []
