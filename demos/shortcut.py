"""`make demo`: the same network, data, updates and seed, once as plain flow matching and once as a shortcut model.

Trains both by the ordinary script (two processes at once, one core each), samples them at several step counts, measures
how far the samples are from the real digits, and writes report.html and metrics.json.

    python -m demos.shortcut [--output_dir outputs/demo] [--max_train_steps N]
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from backlot.command_line import parse
from backlot.pictures import image_grid
from data_prep.images.digits import load_digits
from demos import common, report
from evaluation.shortcut.measure import DigitsReference, draw_samples
from pipelines.shortcut import ShortcutPipeline
from trainers import train_shortcut

CONFIG = Path("configs/shortcut/digits.yaml")
ARMS = {"flow_matching": "Flow matching", "shortcut": "Shortcut model"}
STEPS = (1, 2, 4, 8, 128)
IRREGULAR = [0.5, 0.3, 0.15, 0.05]
NUM_SAMPLES = 1797  # as many as there are real digits
BATCH = 64  # fits the cache of one core


class Settings(common.DemoSettings):
    output_dir: Path = Path("outputs/demo")
    """emptied first, if it is that of an earlier demo"""


def run_arm(arm: str, output_dir: Path, max_train_steps: int, sampled: Synchronized) -> None:
    """Train one arm as the command line would, then sample it; runs in a process, and on a core, of its own."""
    run_dir = output_dir / arm
    run_dir.mkdir(parents=True)
    log = os.open(run_dir / "train.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    arguments = ["--config", str(CONFIG), "--objective.name", arm, "--output_dir", str(run_dir)]
    train_shortcut.main([*arguments, "--max_train_steps", str(max_train_steps)])

    pipeline = ShortcutPipeline.from_pretrained(run_dir)
    pipeline.set_progress_bar_config(disable=True)

    def count(*_) -> None:
        sampled.value += 1

    pipeline.transformer.register_forward_hook(count)
    samples = {
        name: draw_samples(pipeline, NUM_SAMPLES, batch_size=BATCH, **setting)
        for name, setting in settings_of(arm).items()
    }
    save_file(samples, run_dir / "samples.tmp")
    (run_dir / "samples.tmp").rename(run_dir / "samples.safetensors")


def settings_of(arm: str) -> dict[str, dict]:
    """How an arm is sampled: name -> arguments of the pipeline."""
    regular = {str(steps): {"num_inference_steps": steps} for steps in STEPS}
    return regular | ({"irregular": {"step_sizes": IRREGULAR}} if arm == "shortcut" else {})


def run_both(output_dir: Path, max_train_steps: int) -> dict[str, float]:
    """Run the arms side by side, one progress bar at a time. Returns the seconds until each was trained and sampled."""
    context, began, seconds = multiprocessing.get_context("spawn"), time.perf_counter(), {}
    sampled = {arm: context.Value("q", 0) for arm in ARMS}
    processes = {
        arm: context.Process(target=run_arm, args=(arm, output_dir, max_train_steps, sampled[arm])) for arm in ARMS
    }
    forwards = (2 * sum(STEPS) + len(IRREGULAR)) * math.ceil(NUM_SAMPLES / BATCH)
    bars = [("training", "update", 2 * max_train_steps), ("sampling", "batch", forwards)]

    def is_over(phase: str, arm: str) -> bool:
        # a run exports its pipeline when it is trained, its process ends when it is sampled
        return (output_dir / arm / "model_index.json").exists() if phase == "training" else arm in seconds

    try:
        for process in processes.values():
            process.start()
        for phase, unit, total in bars:
            with tqdm(total=total, unit=unit, desc=phase, smoothing=0.1) as bar:
                while not all(is_over(phase, arm) for arm in ARMS):
                    time.sleep(0.5)
                    rows = {arm: common.read_rows(output_dir / arm)[-1:] for arm in ARMS}
                    trained = sum(row["step"] for last in rows.values() for row in last)
                    bar.update((trained if phase == "training" else sum(v.value for v in sampled.values())) - bar.n)
                    losses = {arm: f"{row['loss_flow']:.3f}" for arm, last in rows.items() for row in last}
                    bar.set_postfix(losses, refresh=False)
                    for arm, process in processes.items():
                        if process.exitcode:
                            log = (output_dir / arm / "train.log").read_text()[-3000:]
                            message = f"{arm} failed with exit code {process.exitcode}:\n{log}"
                            raise common.child_failed(process.exitcode, message)
                        if process.exitcode == 0:
                            seconds.setdefault(arm, time.perf_counter() - began)
                bar.update(total - bar.n)  # the last rows may lie between two log points
        for process in processes.values():
            process.join()
    finally:
        for process in processes.values():
            process.terminate()
    return {arm: seconds.get(arm, time.perf_counter() - began) for arm in ARMS}


def measure(samples: dict[str, dict[str, torch.Tensor]], reference: DigitsReference) -> dict:
    """Energy and Frechet distance to all real digits, in the layout of metrics.json."""
    measured = {arm: {name: reference.measure(x) for name, x in of_arm.items()} for arm, of_arm in samples.items()}
    irregular = measured["shortcut"].pop("irregular")
    return {
        distance: {
            **{arm: {steps: values[distance] for steps, values in measured[arm].items()} for arm in ARMS},
            "shortcut_irregular": {"steps": IRREGULAR, "value": irregular[distance]},
        }
        for distance in ("energy_distance", "frechet")
    } | {"floor": reference.floor()}


def pictures(samples: torch.Tensor, count: int) -> list[Image.Image]:
    """The first `count` samples as images."""
    return [Image.fromarray(((x[0] + 1) * 127.5).round().byte().numpy()) for x in samples[:count]]


def write_report(output_dir: Path, samples: dict, metrics: dict) -> None:
    def grid(arm: str) -> Image.Image:
        names = [str(n) for n in STEPS] + (["irregular"] if "irregular" in samples[arm] else [])
        return image_grid([pictures(samples[arm][name], 10) for name in names], [label(name) for name in names], 48)

    def wall(images: torch.Tensor) -> Image.Image:
        columns = pictures(images, 100)
        return image_grid([columns[i : i + 10] for i in range(0, 100, 10)], None, 40)

    def label(name: str) -> str:
        return name if name == "irregular" else f"{name} step" + "s" * (name != "1")

    real, classes = load_digits("all")
    real = torch.stack([real[classes == i % 10][i // 10] for i in range(100)])
    curves = {ARMS[arm]: common.read_curve(output_dir / arm, "loss_flow") for arm in ARMS}
    rows, best = [], set()
    for i, steps in enumerate(map(str, STEPS)):
        values = [metrics[d][arm][steps] for d in ("energy_distance", "frechet") for arm in ARMS]
        rows.append([label(steps), *(f"{v:.4f}" for v in values[:2]), *(f"{v:.1f}" for v in values[2:])])
        best |= {(i, 1 + 2 * k + int(values[2 * k + 1] < values[2 * k])) for k in range(2)}
    irregular = [metrics[d]["shortcut_irregular"]["value"] for d in ("energy_distance", "frechet")]
    rows.append([" + ".join(map(str, IRREGULAR)), "", f"{irregular[0]:.4f}", "", f"{irregular[1]:.1f}"])
    floor = metrics["floor"]
    rows.append(["real: train against test", f"{floor['energy_distance']:.4f}", "", f"{floor['frechet']:.1f}", ""])
    one = {arm: metrics["energy_distance"][arm]["1"] for arm in ARMS}
    lead = (
        f"Both models have the same network, data, seed and {metrics['updates']} updates. In one step the shortcut "
        f"model is {one['flow_matching'] / max(one['shortcut'], 1e-9):.0f} times closer to real handwriting: energy "
        f"distance {one['shortcut']:.3f} against {one['flow_matching']:.3f}."
    )
    commands = (
        "<pre>accelerate launch -q --config_file accelerate_configs/cpu.yaml trainers/train_shortcut.py \\\n"
        "    --config configs/shortcut/digits.yaml --learning_rate 5e-4        # your own run\n"
        "... --resume_from_checkpoint latest --max_train_steps 5000          # stop, continue, extend\n"
        f"python -m evaluation.shortcut {output_dir}/shortcut     # these figures, loss by level</pre>"
        "<pre>from pipelines.shortcut import ShortcutPipeline\n"
        f'pipeline = ShortcutPipeline.from_pretrained("{output_dir}/shortcut")\n'
        "pipeline(class_labels=[3, 7], num_inference_steps=1).images[0].resize((256, 256)).show()\n"
        "pipeline(class_labels=[3, 7], step_sizes=[0.5, 0.3, 0.2])</pre>"
    )
    note = (
        f"<p>{NUM_SAMPLES:,} samples of each setting against all 1,797 real images, of which 1,437 were trained on. "
        "Energy distance compares pixels, Frechet distance the features of a small classifier; lower is better. "
        "The last row is what real images score, those trained on against those held out.</p>"
    )
    sections = [
        (
            "One step",
            report.side_by_side(
                *(report.picture(wall(samples[a]["1"]), f"{ARMS[a]}, one step") for a in ARMS),
                report.picture(wall(real), "Real handwriting, 8x8 pixels (enlarged)"),
            ),
        ),
        (
            "The same noise, more steps",
            report.side_by_side(*(report.picture(grid(a), ARMS[a]) for a in ARMS))
            + f"<p>Irregular means steps of {', '.join(map(str, IRREGULAR))}: any list that adds up to 1 will do.</p>",
        ),
        (
            "Figures",
            report.table(
                ["steps", "energy: flow matching", "shortcut", "Frechet: flow matching", "shortcut"], rows, best
            )
            + note,
        ),
        ("Training", report.line_chart(curves, "Flow-matching loss of both models over updates (means of 20 updates)")),
        ("How to go on", commands),
    ]
    text = report.page("Digits in one step", lead, sections)
    (output_dir / "report.html").write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    settings = parse(Settings, argv, "python -m demos.shortcut", __doc__)
    output_dir, began = settings.output_dir, time.perf_counter()
    max_train_steps = settings.max_train_steps or common.planned_updates(CONFIG)
    common.empty_folder(output_dir, "flow_matching")

    seconds = run_both(output_dir, max_train_steps)
    samples = {arm: load_file(output_dir / arm / "samples.safetensors") for arm in ARMS}
    metrics = measure(samples, DigitsReference())
    metrics |= {"seconds": seconds, "updates": max_train_steps}
    write_report(output_dir, samples, metrics)
    seconds["total"] = time.perf_counter() - began
    common.write_metrics(output_dir, metrics)
    for steps in map(str, STEPS):
        values = [metrics["energy_distance"][arm][steps] for arm in ARMS]
        print(f"{steps:>4} steps: energy distance {values[0]:.4f} flow matching, {values[1]:.4f} shortcut")
    print(f"{seconds['total']:.0f} s. Open {output_dir / 'report.html'}")


if __name__ == "__main__":
    main()
