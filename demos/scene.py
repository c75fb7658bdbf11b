"""`make demo-scene`: scenes of procedural objects, generated from one small picture, with and without a view of others.

Makes scenes, trains the occupancy VAE and three scene models by the ordinary scripts (objects blind to one another,
objects aware of one another, and the latter as a plain flow), measures all on scenes that were never seen, and writes
report.html, metrics.json and a GLB of every scene shown.

    python -m demos.scene [--output_dir outputs/demo-scene] [--max_train_steps N]
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image

from backlot.command_line import parse
from backlot.pictures import image_grid
from backlot.rendering import render_scene
from data_prep.scenes.dataset import SceneDataset
from data_prep.scenes.encode import encode_scenes
from data_prep.scenes.synth import build_synth
from demos import common, report
from evaluation.shortcut_scene import show
from evaluation.shortcut_scene.measure import evaluate, measure_vae
from pipelines.shortcut_scene import ShortcutScenePipeline

CONFIG, VAE_CONFIG = Path("configs/shortcut_scene/demo.yaml"), Path("configs/shape_vae/demo.yaml")
NUM_TRAIN, NUM_TEST, NUM_SHOWN = 3000, 160, 6
IMAGE_SIZE, RESOLUTION, FINE = 48, 16, 160
SCENES = {"image_size": IMAGE_SIZE, "resolution": RESOLUTION, "stack_prob": 0.1, "num_workers": 2}
STEPS, FLOW_STEPS = (1, 4), (32,)  # few by shortcuts, many as a plain flow
VAE_STEPS = None  # as its configuration says
RUNS = {  # the same data, updates and batch; what differs
    "object": ["--model.attention_scope", "[object]"],
    "scene": [],
    "flow_matching": ["--self_consistency_prob", "0", "--model.use_shortcut", "false"],
}
NAMES = {
    "object": "objects alone",
    "scene": "whole scenes",
    "flow_matching": "whole scenes, plain flow",
}


class Settings(common.DemoSettings):
    output_dir: Path = Path("outputs/demo-scene")
    """emptied first, if it is that of an earlier demo"""


def train_vae(data: Path, output_dir: Path) -> None:
    """The occupancy VAE, on the shapes of all training scenes."""
    arguments = ["--data.path", str(data), "--output_dir", str(output_dir)]
    if VAE_STEPS:
        arguments += ["--max_train_steps", str(VAE_STEPS), "--lr_warmup_steps", "0", "--lr_decay_steps", "0"]
    common.train_on_two("train_shape_vae", VAE_CONFIG, *arguments)


def train(data: Path, vae: Path, output_dir: Path, max_train_steps: int) -> None:
    """Three scene models on the same latents and budget, side by side: on two cores sooner than one after another."""
    running = {}
    for name, others in RUNS.items():
        command = [sys.executable, "trainers/train_shortcut_scene.py", "--config", str(CONFIG)]
        command += ["--data_root", str(data), "--model.vae", str(vae), "--output_dir", str(output_dir / name)]
        command += ["--max_train_steps", str(max_train_steps), "--lr_decay_steps", str(max_train_steps // 3)]
        command += ["--lr_warmup_steps", str(min(100, max_train_steps // 5))]
        command += ["--logging_steps", str(max(1, max_train_steps // 40)), *others]
        log = None if name == "scene" else (output_dir / f"{name}.log").open("w")  # one progress bar is enough
        running[name] = subprocess.Popen(command, env=common.ONE_CORE, stdout=log, stderr=log)
    failed = {name: process.returncode for name, process in running.items() if process.wait()}
    if failed:
        message = f"training of {', '.join(failed)} failed, see above or {output_dir}/NAME.log"
        raise common.child_failed(next(iter(failed.values())), message)


def load(output_dir: Path) -> dict[str, ShortcutScenePipeline]:
    return {name: ShortcutScenePipeline.from_pretrained(output_dir / name) for name in RUNS}


def open_test(data: Path, pipeline: ShortcutScenePipeline) -> SceneDataset:
    return SceneDataset(data, "val", pipeline.codec, conditions=("image", "pointmap"), shuffle_objects=False)


def measure(pipelines: dict[str, ShortcutScenePipeline], data: Path) -> dict:
    """The layout of metrics.json: means over unseen scenes."""
    dataset = open_test(data, pipelines["scene"])
    results = {
        name: evaluate(pipeline, dataset, steps=STEPS, flow_steps=FLOW_STEPS) for name, pipeline in pipelines.items()
    }
    tables = {name: result["shortcut"] | result["flow"] for name, result in results.items()}

    def column(metric: str) -> dict:
        return {
            name: {steps: row[metric]["mean"] for steps, row in tables[name].items()} for name in ("object", "scene")
        }

    return {
        "coverage": column("coverage"),
        "collision": column("collision"),
        "floor_gap": column("floor_gap"),
        "flow_matching": {steps: row["coverage"]["mean"] for steps, row in tables["flow_matching"].items()},
        "vae_iou": measure_vae(pipelines["scene"].vae, dataset),
        "tables": {
            name: {steps: {metric: value["mean"] for metric, value in row.items()} for steps, row in table.items()}
            for name, table in tables.items()
        },
        "true": {metric: value["mean"] for metric, value in results["scene"]["true"].items() if value},
        "independent_draws": results["scene"]["independent_draws"]["coverage"]["mean"],
        "num_scenes": len(dataset),
    }


def write_report(output_dir: Path, pipelines: dict[str, ShortcutScenePipeline], metrics: dict) -> None:
    """The page, and a GLB of every scene it shows."""
    dataset = open_test(output_dir / "data", pipelines["scene"])
    rows = [len(dataset) * i // NUM_SHOWN for i in range(NUM_SHOWN)]
    folder = output_dir / "scenes"
    folder.mkdir(exist_ok=True)
    shown = {"true": show(pipelines["scene"], dataset, rows, [])[0]}
    for name, steps in (("object", 32), ("scene", 1), ("scene", 4), ("scene", 32), ("flow_matching", 1)):
        label = f"{NAMES[name]}, {steps} step" + "s" * (steps > 1)
        shown[label] = show(pipelines[name], dataset, rows, [steps], use_shortcut=steps in STEPS)[1]
    for label, scenes in shown.items():
        stem = label.replace(",", "").replace(" ", "_")
        for row, scene in zip(rows, scenes, strict=True):
            pipelines["scene"].export(scene, folder / f"{dataset.scene_ids[row]}_{stem}.glb")
    given = [
        Image.fromarray(((item["image"].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())
        for item in map(dataset.__getitem__, rows)
    ]
    given = [picture.resize((FINE, FINE), Image.Resampling.NEAREST) for picture in given]
    front = [[render_scene(scene, FINE) for scene in scenes] for scenes in shown.values()]
    front = image_grid([given, *front], ["given", *shown], FINE)
    compared = ["true", f"{NAMES['object']}, 32 steps", f"{NAMES['scene']}, 32 steps"]
    top = [[render_scene(scene, FINE, "top") for scene in shown[label]] for label in compared]
    top = image_grid(top, compared, FINE)

    keys = ["coverage", "collision", "floor_gap", "distance"]
    table = []
    for name, rows_of in metrics["tables"].items():
        for steps, row in rows_of.items():
            table.append([f"{NAMES[name]}, {steps}", *(f"{row[key]:.3f}" for key in keys)])
    true = metrics["true"]
    table.append(["the true scenes", "1", f"{true['collision']:.3f}", f"{true['floor_gap']:.3f}", "0"])
    found, collide = (
        {scope: 100 * metrics[key][scope]["32"] for scope in ("object", "scene")} for key in ("coverage", "collision")
    )
    lead = (
        f"{metrics['num_scenes']} scenes the network never saw, from one picture of {IMAGE_SIZE} pixels. With a view "
        f"of one another objects stand where they should in {found['scene']:.0f} % of all cases, alone in "
        f"{found['object']:.0f} %; {collide['scene']:.1f} % of all pairs collide, alone {collide['object']:.1f} %."
    )
    note = (
        "<p>Coverage: share of true objects with a generated one within 0.15 m, matched one to one; objects drawn "
        f"independently reach {metrics['independent_draws']:.3f} at best. Collision: share of pairs of objects whose "
        "boxes overlap by more than a tenth. Floor gap and distance in metres. "
        f"The shape VAE's IoU on unseen shapes: {metrics['vae_iou']:.3f}.</p>"
    )
    curves = {name: common.read_curve(output_dir / name) for name in ("object", "scene")}
    commands = (
        "<pre>python -m data_prep.scenes build --glb DIR_OF_GLB --out DIR\n"
        "python -m data_prep.scenes encode DIR --vae VAE\n"
        "accelerate launch -q --config_file accelerate_configs/cpu_2proc.yaml trainers/train_shortcut_scene.py \\\n"
        "    --config configs/shortcut_scene/small.yaml --data.data_root DIR --model.vae VAE\n"
        f"python -m evaluation.shortcut_scene {output_dir}/scene --data {output_dir}/data</pre>"
        "<pre>from pipelines.shortcut_scene import ShortcutScenePipeline\n"
        f'pipeline = ShortcutScenePipeline.from_pretrained("{output_dir}/scene")\n'
        "pipeline(image=image, pointmap=pointmap, num_objects=5, num_inference_steps=4).scenes[0]</pre>"
    )
    sections = [
        ("Never seen", report.picture(front, "One column is one scene; each is a GLB in the folder scenes")),
        ("The same from above", report.picture(top, "Where objects stand in one another")),
        ("Figures", report.table(["scope, steps", "coverage", "collision", "floor gap", "distance"], table) + note),
        ("Training", report.line_chart(curves, "Loss over updates: objects alone, and whole scenes")),
        ("How to go on", commands),
    ]
    (output_dir / "report.html").write_text(
        report.page("Whole scenes in a few steps", lead, sections), encoding="utf-8"
    )


def main(argv: list[str] | None = None) -> None:
    settings = parse(Settings, argv, "python -m demos.scene", __doc__)
    output_dir, seconds, began = settings.output_dir, {}, time.perf_counter()
    max_train_steps = settings.max_train_steps or common.planned_updates(CONFIG)
    common.empty_folder(output_dir, "data/train")
    torch.set_num_threads(2)

    def lap(name: str) -> None:
        seconds[name] = time.perf_counter() - began - sum(seconds.values())

    data, vae = output_dir / "data", output_dir / "vae"
    build_synth(data, NUM_TRAIN, NUM_TEST, **SCENES)
    lap("make scenes")
    train_vae(data, vae)
    lap("train the VAE")
    encode_scenes(data, vae)
    lap("encode")
    train(data, vae, output_dir, max_train_steps)
    lap("train the scene models")
    pipelines = load(output_dir)
    metrics = measure(pipelines, data)
    lap("measure")
    write_report(output_dir, pipelines, metrics)
    lap("report")
    metrics |= {"updates": max_train_steps, "seconds": seconds | {"total": time.perf_counter() - began}}
    common.write_metrics(output_dir, metrics)
    for name, table in metrics["tables"].items():
        for steps, row in table.items():
            scores = f"coverage {row['coverage']:.3f}, collisions {row['collision']:.3f}"
            print(f"{NAMES[name]:>24}, {steps:>2} steps: {scores}")
    print(f"shape VAE IoU {metrics['vae_iou']:.3f}")
    print(f"{metrics['seconds']['total']:.0f} s. Open {output_dir / 'report.html'}")


if __name__ == "__main__":
    main()
