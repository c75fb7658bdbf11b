"""A configuration is typed, complete and answered in one line per mistake, before anything heavy is loaded."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from pydantic import Field
from runs import ROOT, TINY

from backlot.config import Section, _keys, dump_config, load_config
from trainers.common.config import RunConfig, TrainingConfig
from trainers.train_shortcut import Config

CONFIGS = sorted((ROOT / "configs").glob("*/*.yaml"))


class Optics(Section):
    seed: int = 1
    focus: float = Field(2.0, gt=0)
    weights: dict[str, float] = {}


class TwoSections(RunConfig):
    optics: Optics = Optics()


class WithAliases(TwoSections):
    aliases: ClassVar[dict[str, str]] = {
        "num_workers": "training.dataloader_num_workers",
        "trainer.output_dir": "training.output_dir",
        "trainer.steps": "training.max_train_steps",
        "batch": "training.train_batch_size",
        "weights": "optics.weights",
    }


def refusal(capsys, *argv: str, config_class=Config) -> str:
    with pytest.raises(SystemExit) as exit_:
        load_config(config_class, list(argv))
    assert exit_.value.code == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text


def yaml_file(tmp_path: Path, text: str, name: str = "config.yaml") -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_yaml_reads_1e_4_as_text_and_typing_heals_it(tmp_path):
    text = "training: {output_dir: o, max_train_steps: 1, train_batch_size: 2, learning_rate: 1e-4}"
    assert yaml.safe_load(text)["training"]["learning_rate"] == "1e-4"
    assert load_config(Config, ["--config", yaml_file(tmp_path, text)]).training.learning_rate == 1e-4


@pytest.mark.parametrize(
    "override",
    [["--training.learning_rate", "3e-4"], ["--training.learning_rate=3e-4"], ["--learning_rate", "3e-4"]],
    ids=["dotted", "equals", "leaf"],
)
def test_three_spellings_of_an_override(override):
    assert load_config(Config, ["--config", str(TINY), *override]).training.learning_rate == 3e-4


def test_the_command_line_wins_over_later_files_over_earlier_files(tmp_path):
    second = yaml_file(tmp_path, "training: {seed: 7, train_batch_size: 2}")
    config = load_config(Config, ["--config", str(TINY), "--config", second, "--train_batch_size", "4"])
    assert (config.training.seed, config.training.train_batch_size) == (7, 4)
    assert config.training.learning_rate == 1e-3  # of the first file: sections merge


ALIASED = {
    "top": "num_workers: 4\ntrainer.output_dir: o\ntrainer.steps: 3\nbatch: 2\n",
    "nested": "trainer: {output_dir: o, steps: 3}\ntraining: {dataloader_num_workers: 4, train_batch_size: 2}\n",
    "mixed": "trainer: {output_dir: o}\ntrainer.steps: 3\ntraining: {train_batch_size: 2}\nnum_workers: 4\n",
    "dotted keys of ours": "trainer: {output_dir: o, steps: 3}\ntraining.dataloader_num_workers: 4\nbatch: 2\n",
    "twice, equal": "trainer: {output_dir: o, steps: 3}\ntraining: {max_train_steps: 3}\nbatch: 2\nnum_workers: 4\n",
}


@pytest.mark.parametrize("text", ALIASED.values(), ids=ALIASED)
def test_a_file_may_use_further_names_in_every_spelling(tmp_path, text):
    training = load_config(WithAliases, ["--config", yaml_file(tmp_path, text)]).training
    assert (training.dataloader_num_workers, str(training.output_dir)) == (4, "o")
    assert (training.max_train_steps, training.train_batch_size) == (3, 2)


def test_a_further_name_may_stand_for_a_mapping_whose_keys_have_dots(tmp_path):
    text = ALIASED["top"] + "weights: {blocks.0: 0.5, blocks.1: 2}\n"
    config = load_config(WithAliases, ["--config", yaml_file(tmp_path, text)])
    assert config.optics.weights == {"blocks.0": 0.5, "blocks.1": 2.0}


@pytest.mark.parametrize(
    ("in_file", "override"),
    [
        ("num_workers: 4", "--training.dataloader_num_workers=7"),
        ("training: {dataloader_num_workers: 4}", "--num_workers=7"),
    ],
    ids=["alias in the file", "alias on the command line"],
)
def test_the_command_line_wins_whichever_name_each_uses(tmp_path, in_file, override):
    required = ["--trainer.output_dir=o", "--trainer.steps", "3", "--batch=2"]
    config = load_config(WithAliases, ["--config", yaml_file(tmp_path, in_file), *required, override])
    assert config.training.dataloader_num_workers == 7


def test_the_last_of_two_equal_or_shorter_names_on_the_command_line_wins():
    argv = ["--config", str(TINY), "--seed=1", "--training.seed=2", "--seed", "3"]
    assert load_config(Config, argv).training.seed == 3


def test_empty_sections_that_a_yaml_alias_shares_are_filled_apart(tmp_path):
    text = "training: &e {}\noptics: *e\n" + ALIASED["top"]
    config = load_config(WithAliases, ["--config", yaml_file(tmp_path, text)])
    assert config.training.dataloader_num_workers == 4
    assert config.optics == Optics()


def test_a_later_file_wins_whichever_name_each_uses(tmp_path):
    first = yaml_file(tmp_path, ALIASED["top"])
    second = yaml_file(tmp_path, "training: {dataloader_num_workers: 5}", "second.yaml")
    third = yaml_file(tmp_path, "num_workers: 6", "third.yaml")
    argv = ["--config", first, "--config", second]
    assert load_config(WithAliases, argv).training.dataloader_num_workers == 5
    assert load_config(WithAliases, [*argv, "--config", third]).training.dataloader_num_workers == 6


@pytest.mark.parametrize(
    ("in_file", "overrides", "message"),
    [
        ("num_workers: 4\ntraining: {dataloader_num_workers: 5}", [],
         "num_workers = 4 and training.dataloader_num_workers = 5 are the same key"),
        ("trainer: {steps: 4}\ntrainer.steps: 5", [], "trainer.steps = 4 and trainer.steps = 5 are the same key"),
        ("training: {seed: 4}\ntraining.seed: 5", [], "training.seed = 4 and training.seed = 5 are the same key"),
        ("batch: 1", ["--num_workers=4", "--dataloader_num_workers", "5"],
         "--num_workers = '4' and --dataloader_num_workers = '5' are the same key"),
        ("batch: 1", ["--training.dataloader_num_workers=4", "--num_workers=5"],
         "--training.dataloader_num_workers = '4' and --num_workers = '5' are the same key"),
        ("training: 5\nnum_workers: 1", [], "num_workers = 1 stands in a section that is 5"),
        ("num_workers: -1", [], "num_workers (training.dataloader_num_workers) = -1: input should be greater"),
        ("num_worker: 1", [], "unknown key num_worker; did you mean num_workers?"),
        ("trainer: {output_di: 1}", [], "unknown key trainer.output_di; did you mean trainer.output_dir?"),
        ("batch: 1", ["--trainer.output_di=1"], "unknown key --trainer.output_di; did you mean trainer.output_dir?"),
        ("batch: 1", ["--num_worker=1"], "unknown key --num_worker; did you mean num_workers?"),
    ],
)  # fmt: skip
def test_further_names_are_answered_for(capsys, tmp_path, in_file, overrides, message):
    argv = ["--config", yaml_file(tmp_path, in_file), "--trainer.output_dir=o", "--trainer.steps=3", *overrides]
    text = refusal(capsys, *argv, config_class=WithAliases)
    assert message in text


def test_the_help_names_them(capsys):
    with pytest.raises(SystemExit) as exit_:
        load_config(WithAliases, ["--help"])
    assert exit_.value.code == 0
    assert "--trainer.steps is --training.max_train_steps" in capsys.readouterr().out


@pytest.mark.parametrize("script", sorted(path.stem for path in (ROOT / "trainers").glob("train_*.py")))
def test_further_names_stand_for_keys_and_hide_none(script):
    config_class = importlib.import_module(f"trainers.{script}").Config
    keys = _keys(config_class)
    for alias, key in config_class.aliases.items():
        assert key in keys, alias
        assert alias not in keys


def test_null_lists_and_booleans_on_the_command_line():
    argv = ["--config", str(TINY), "--max_grad_norm", "null", "--use_ema=false", "--report_to", "[tensorboard]"]
    training = load_config(Config, [*argv, "--objective.teacher=online"]).training
    assert training.max_grad_norm is None
    assert training.use_ema is False
    assert training.report_to == ["tensorboard"]


def test_all_problems_are_listed_at_once(capsys, tmp_path):
    file = yaml_file(
        tmp_path,
        "training: {output_dir: o, max_train_steps: -3, train_batch_size: many, lerning_rate: 1, max_grad_norm: .inf}\n"
        "modle: {size: tiny}\ndata: {image_size: 8}\n",
    )
    text = refusal(capsys, "--config", file, "--validation.num_sample", "3", "stray")
    for expected in (
        "training.max_train_steps = -3: input should be greater than 0",
        "training.train_batch_size = 'many'",
        "unknown key training.lerning_rate; did you mean training.learning_rate?",
        "training.max_grad_norm = inf: input should be a finite number",
        "unknown key modle",
        "unknown key --validation.num_sample; did you mean validation.num_samples?",
        "unexpected argument 'stray'",
    ):
        assert expected in text, expected
    assert len(text.splitlines()) == 8  # the heading and one line each


def test_a_missing_key_is_named(capsys):
    assert "training is required" in refusal(capsys)
    assert "training: `max_train_steps` or `num_epochs` is required" in refusal(
        capsys, "--output_dir", "o", "--train_batch_size", "1"
    )


def test_cross_field_checks_name_both_values(capsys):
    text = refusal(capsys, "--config", str(TINY), "--lr_warmup_steps", "21", "--lr_scheduler", "linear")
    assert "`lr_warmup_steps` (21) and `lr_decay_steps` (0) exceed `max_train_steps` (20)" in text


def test_an_ambiguous_short_key_names_the_candidates(capsys):
    text = refusal(capsys, "--seed", "1", config_class=TwoSections)
    assert "--training.seed" in text
    assert "--optics.seed" in text


def test_an_override_without_value_is_refused(capsys):
    assert "--seed lacks a value" in refusal(capsys, "--config", str(TINY), "--seed")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("training: [", "is not YAML"),
        ("- 1\n- 2\n", "must hold sections"),
        ("", "must hold sections"),
        ("!!python/object/apply:os.system [true]", "is not YAML"),
        ("x: '" + "a" * 1_000_001 + "'", "larger than"),
        ("x: " + "[" * 10_000, "is not YAML"),
    ],
    ids=["torn", "list", "empty", "python", "huge", "deep"],
)
def test_a_file_that_is_no_configuration_is_refused(capsys, tmp_path, content, message):
    assert message in refusal(capsys, "--config", yaml_file(tmp_path, content))


def test_bytes_that_are_no_text_are_refused(capsys, tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00x")
    assert "is not YAML" in refusal(capsys, "--config", str(tmp_path / "x.yaml"))


def test_a_missing_file_is_named(capsys, tmp_path):
    assert "none.yaml: No such file" in refusal(capsys, "--config", str(tmp_path / "none.yaml"))


@pytest.mark.parametrize("place", ["seed", "report_to", "output_dir"])
def test_an_alias_bomb_is_refused_quickly(capsys, tmp_path, place):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    lines += [f"training: {{{place}: *a8}}"]
    began = time.monotonic()
    refusal(capsys, "--config", yaml_file(tmp_path, "\n".join(lines)))
    assert time.monotonic() - began < 5


# name -> (content of a file, what the refusal says)
BOMBS = {
    "merge keys": (
        "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 25)),
        "more than 5000 values",
    ),
    "aliases": (
        "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)),
        "more than 5000 values",
    ),
    "an alias in itself": ("a: &a [*a]", r"*a stands inside &a"),
    "a chain of aliases": (
        "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 2000)),
        "more than 5000 values",
    ),
    "nested lists": ("x: " + "[" * 50_000, "nested deeper than 20 levels"),
    "nested sections": ("{a: " * 24_000, "nested deeper than 20 levels"),
    "many values": ("x: [" + "1," * 45_000 + "]", "more than 5000 values"),
    "many unknown keys": ("\n".join(f"key{i}: 1" for i in range(2400)), "and 2350 more"),
    "long text": ("x: " + "a" * 200_000, "larger than 100000 bytes"),
    "an integer of 5,000 digits": ("training: {seed: " + "9" * 5000 + "}", "exceeded maximum size"),
    "a key twice": ("training: {seed: 1}\ntraining: {seed: 2}\n", "line 2: key 'training' is given twice"),
    "a list as key": ("[1]: 2", "a key is text"),
    "a tag": ("x: !!int abc", "tags (!...) are not understood"),
    "a python tag": ("x: !!python/object/apply:os.system [true]", "tags (!...) are not understood"),
    "a setting of the reader": ("_env_file: x", "unknown key _env_file"),
    "an argument of the reader": ("_cli_parse_args: x", "unknown key _cli_parse_args"),
    "an empty key": ("'': 1", "unknown key"),
    "a number as key": ("1: x", "unknown key 1"),
    "two documents": ("a: 1\n---\nb: 2\n", "another document"),
    "hours": ("training: {seed: 1:30}", "training.seed = '1:30': input should be a valid integer"),
    "a date": ("training: {seed: 2001-02-03}", "training.seed = '2001-02-03': input should be a valid integer"),
    "yes": ("training: {seed: yes}", "training.seed = 'yes': input should be a valid integer"),
}
LOOKS_LIKE_MORE = ["no", "1e3", "1:30", "010", "08", "0x1f", "0b1", "2001-02-03", "~", "=", "<<", ".5", "1_0", "*a"]
DEVICES = {"/dev/zero": "not a file", "/dev/tty": "not a file", "/": "not a file", "FIFO": "not a file"}
MEASURE = """
import json, os, signal, sys, tempfile
from backlot.config import load_config
from trainers.common.config import RunConfig
for file in sys.argv[1:]:
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # what waits for ever does not end with code 2
            os.dup2(said.fileno(), 2)
            required = ["--output_dir=o", "--max_train_steps=1", "--train_batch_size=1"]
            load_config(RunConfig, ["--config", file, *required])
            os._exit(0)
        _, status, usage = os.wait4(child, 0)
        said.seek(0)
        seconds = usage.ru_utime + usage.ru_stime
        print(json.dumps([said.read(), os.waitstatus_to_exitcode(status), seconds, usage.ru_maxrss]))
"""


def test_every_bomb_is_refused_within_a_second_and_200_mb(tmp_path):
    files = [yaml_file(tmp_path, content, f"{n}.yaml") for n, (content, _) in enumerate(BOMBS.values())]
    os.mkfifo(tmp_path / "FIFO")
    expected = [message for _, message in BOMBS.values()] + list(DEVICES.values())
    names = [*BOMBS, *DEVICES]
    files += [str(tmp_path / name) if name == "FIFO" else name for name in DEVICES]
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, *files], cwd=ROOT, capture_output=True, text=True, check=True
    )
    measured = [json.loads(line) for line in result.stdout.splitlines()]
    for name, message, (text, code, seconds, kilobytes) in zip(names, expected, measured, strict=True):
        assert message in text, name
        assert "Traceback" not in text, name
        assert len(text.splitlines()) <= (52 if "unknown" in name else 2), name  # the heading and the refusal
        assert max(map(len, text.splitlines())) < 300, name
        assert code == 2, name
        assert seconds < 1, name  # of the processor: others may be busy on it
        assert kilobytes < 200_000, name


def test_plain_words_of_yaml_are_text_or_what_they_look_like(tmp_path):
    text = "{output_dir: 010, max_train_steps: 1_000, train_batch_size: 010, use_ema: no, mixed_precision: no}"
    training = load_config(RunConfig, ["--config", yaml_file(tmp_path, f"training: {text}")]).training
    assert str(training.output_dir) == "010"
    assert (training.max_train_steps, training.train_batch_size) == (1000, 10)
    assert training.use_ema is False
    assert training.mixed_precision == "no"  # YAML 1.1 has False here


@pytest.mark.parametrize(
    "name",
    ["no", "1e3", "1:30", "010", "08", "0x1f", "0b1", "2001-02-03", "~", "=", "<<", ".5", "1_0", "9" * 50, "*a", "!x"],
)
def test_text_that_looks_like_something_else_comes_back_as_text(tmp_path, name):
    config = load_config(Config, ["--config", str(TINY), f"--attention_backend={name}"])
    assert config.training.attention_backend == name
    assert load_config(Config, ["--config", yaml_file(tmp_path, dump_config(config))]) == config


def test_yaml_aliases_and_merge_keys_of_a_reasonable_size_are_read(tmp_path):
    text = "training: &t {output_dir: o, max_train_steps: 1, train_batch_size: &n 2, seed: *n}\noptics: {focus: *n}\n"
    config = load_config(TwoSections, ["--config", yaml_file(tmp_path, text)])
    assert (config.training.seed, config.optics.focus) == (2, 2.0)
    text = "training: {<<: {output_dir: o, seed: 1}, max_train_steps: 1, train_batch_size: 2, seed: 7}"
    assert load_config(TwoSections, ["--config", yaml_file(tmp_path, text)]).training.seed == 7


def test_nothing_comes_from_the_environment(monkeypatch):
    for name in ("SEED", "TRAINING", "TRAINING__SEED", "training__seed"):
        monkeypatch.setenv(name, '{"seed": 9}' if name == "TRAINING" else "9")
    assert load_config(Config, ["--config", str(TINY)]).training.seed == 0


def test_values_never_change():
    config = load_config(Config, ["--config", str(TINY)])
    with pytest.raises(ValueError, match="frozen"):
        config.training.seed = 1


@pytest.mark.parametrize("key", sorted(TrainingConfig.model_fields))
def test_every_key_one_letter_off_is_refused_with_the_right_suggestion(capsys, key):
    middle = len(key) // 2
    for typo in (key[:middle] + key[middle + 1 :], key[:middle] + key[middle] + key[middle:]):
        text = refusal(capsys, "--config", str(TINY), f"--training.{typo}", "1")
        assert f"did you mean training.{key}?" in text, typo


def test_every_key_has_a_help_text():
    for name, field in TrainingConfig.model_fields.items():
        assert field.description or name.startswith("adam_"), name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_configuration_loads_with_its_script(path):
    script = importlib.import_module(f"trainers.train_{path.parent.name}")
    config = load_config(script.Config, ["--config", str(path)])
    assert (config.training.max_train_steps or config.training.num_epochs) > 0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_resolved_configuration_loads_again_to_the_same_values(path, tmp_path):
    script = importlib.import_module(f"trainers.train_{path.parent.name}")
    config = load_config(script.Config, ["--config", str(path), "--learning_rate", "1.5e-7"])
    again = load_config(script.Config, ["--config", yaml_file(tmp_path, dump_config(config))])
    assert again == config


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_launch_configuration_loads(path):
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(path))
    assert loaded.num_processes >= 1
    # ours is the one place for accumulation: the launcher's would win in silence
    assert "gradient_accumulation_steps" not in path.read_text()


def test_a_typo_is_answered_before_anything_heavy(tmp_path):
    code = (
        "import runpy, sys\n"
        "try:\n    runpy.run_path('trainers/train_shortcut.py', run_name='__main__')\n"
        "finally:\n    print(sorted({'torch._C', 'accelerate', 'diffusers', 'numpy', 'PIL'} & sys.modules.keys()))\n"
    )
    argv = ["--config", "configs/shortcut/tiny.yaml", "--output_dir", str(tmp_path / "run")]
    began = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", code, *argv, "--training.lerning_rate", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert time.monotonic() - began < 6
    assert result.returncode == 2
    assert "--training.lerning_rate; did you mean training.learning_rate?" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout.strip() == "[]"
    assert list(tmp_path.iterdir()) == []


def test_help_lists_every_key_and_loads_nothing_heavy():
    code = (
        "import runpy, sys\n"
        "sys.argv[1:] = ['--help']\n"
        "try:\n    runpy.run_path('trainers/train_shortcut.py', run_name='__main__')\n"
        "finally:\n    print('torch._C' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("False\n")
    for name in TrainingConfig.model_fields:
        assert f"--training.{name}" in result.stdout
