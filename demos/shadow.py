"""`make demo-shadow`: render objects with path-traced soft shadows, train a small network on them, try it on new ones.

Renders, trains by the ordinary script on two processes, measures one and four steps on objects that were never seen,
and writes report.html and metrics.json.

    python -m demos.shadow [--output_dir outputs/demo-shadow] [--num_train N] [--max_train_steps N]
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from backlot.command_line import parse
from backlot.pictures import image_grid, to_images
from data_prep.shadows.dataset import ShadowDataset
from data_prep.shadows.render import render_dataset
from demos import common, report
from evaluation.shadow_sdxl import cast
from evaluation.shadow_sdxl.measure import compute_mean_map, evaluate
from pipelines.shadow_sdxl import ShadowSDXLPipeline, composite

CONFIG = Path("configs/shadow_sdxl/small48.yaml")
VIEW = {"image_size": 48, "camera": (6.0, 7.5), "lights_per_view": 4, "num_workers": 2}
NUM_TRAIN, NUM_TEST, NUM_SHOWN, LIGHTS = 2400, 128, 8, VIEW["lights_per_view"]
TEST_SEED = 2  # of other objects than those trained on
FINE = 256  # pixels of the pictures that are shown
STEPS = (1, 4)
NUM_DRAWS = 3
MAP_ROWS = {"zero": "all zeros", "mean_map": "mean map", "1": "1 step", "4": "4 steps", "phi_shuffled": "phi + 120"}


class Settings(common.DemoSettings):
    output_dir: Path = Path("outputs/demo-shadow")
    """emptied first, if it is that of an earlier demo"""
    num_train: int = Field(NUM_TRAIN, ge=1)
    """maps to train on, four of each object"""


def render(folder: Path, num_train: int) -> None:
    """The training set, a test set of other objects, and some of these once more in large pictures."""
    render_dataset(folder / "train", num_samples=num_train, seed=1, spp=64, **VIEW)
    # a light overhead has no direction that could be right or wrong: tested are lights that throw a shadow aside
    aside = VIEW | {"seed": TEST_SEED, "theta": (12.0, 45.0)}
    render_dataset(folder / "test", num_samples=NUM_TEST, spp=256, **aside)
    render_dataset(folder / "shown", num_samples=NUM_SHOWN * LIGHTS, spp=64, **(aside | {"image_size": FINE}))


def train(data: Path, run_dir: Path, max_train_steps: int) -> None:
    """The decay and the warm-up keep their shares of a run of any length."""
    arguments = ["--data.path", str(data), "--output_dir", str(run_dir), "--max_train_steps", str(max_train_steps)]
    arguments += ["--lr_decay_steps", str(max_train_steps * 3 // 5)]
    arguments += ["--lr_warmup_steps", str(min(50, max_train_steps // 5))]
    common.train_on_two("train_shadow_sdxl", CONFIG, *arguments)


def measure(pipeline: ShadowSDXLPipeline, data: Path) -> dict:
    """The layout of metrics.json: mean over samples and noises of each metric."""
    dataset = ShadowDataset(data / "test", split="all")
    mean_map = compute_mean_map(ShadowDataset(data / "train", split="all"))
    result = evaluate(pipeline, dataset, steps=STEPS, num_draws=NUM_DRAWS, mean_map=mean_map, batch_size=32)
    rows = {
        name: {metric: value["mean"] for metric, value in row.items()} for name, row in result["reports"]["all"].items()
    }
    return {
        "one_step": rows["1"],
        "four_steps": rows["4"],
        "phi_shuffled": rows["phi_shuffled"],
        "baselines": {"zero": rows["zero"], "mean_map": rows["mean_map"]},
        "direction_error_deg": rows["1"]["direction_error_median_deg"],
        "seam": result["seam"],
        "size_sweep": result["size_sweep"],
        "num_samples": len(dataset),
        "num_objects": len(set(dataset.object_ids)),
        "num_draws": NUM_DRAWS,
    }


def backgrounds(side: int) -> list[Image.Image]:
    """Paper, boards and terrazzo."""
    rng = np.random.default_rng(0)

    def smooth(scale: int, stretch: int = 1) -> np.ndarray:
        coarse = rng.normal(size=(max(2, side // scale), max(2, side // (scale * stretch))))
        picture = Image.fromarray(coarse.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
        return np.asarray(picture)[..., None]

    paper = np.array([226, 222, 212]) + 2 * smooth(2) + 3 * smooth(40)
    boards = np.array([190, 148, 104]) + 9 * smooth(2, 30) + 7 * smooth(6, 40)
    boards[:: side // 5] *= 0.72
    chips = np.abs(smooth(5)) > 1.4
    terrazzo = np.where(chips, np.array([150, 120, 108]) + 40 * smooth(5), np.array([206, 208, 206]) + 2 * smooth(3))
    return [Image.fromarray(x.clip(0, 255).astype(np.uint8)) for x in (paper, boards, terrazzo)]


def read(folder: Path, stem: str) -> tuple[Image.Image, Image.Image, Image.Image]:
    """Object, mask and true shadow (8 bits) of a sample."""
    shadow = np.asarray(Image.open(folder / "shadows" / f"{stem}.png")) / 65535
    pictures = [Image.open(folder / kind / f"{stem}.png") for kind in ("objects", "masks")]
    return *pictures, Image.fromarray((shadow * 255).round().astype(np.uint8))


def sweep(pipeline: ShadowSDXLPipeline, image: Image.Image, lights: list[dict], background: Image.Image) -> list:
    """One object under several lights, the object encoded once."""
    lists = {name: [light[name] for light in lights] for name in ("theta", "phi", "size")}
    generator = [torch.Generator().manual_seed(0) for _ in lights]
    maps = pipeline(image, **lists, generator=generator).images
    return [composite(image, shadow, background) for shadow in maps]


def draw_objects(data: Path, pipeline: ShadowSDXLPipeline) -> dict[str, Image.Image]:
    """Objects never seen: beside the true shadow, under lights that turn, sink and grow, and on other grounds."""
    grounds = backgrounds(FINE)
    metadata = json.loads((data / "shown" / "metadata.json").read_text())
    stems = sorted(metadata)
    shown = [stem for i, stem in enumerate(stems) if i % LIGHTS == i // LIGHTS % LIGHTS]  # one light of each object
    columns = []
    for stem in shown:
        image, mask, true = read(data / "shown", stem)
        light = {name: metadata[stem][name] for name in ("theta", "phi", "size")}
        predicted = pipeline(image, **light, generator=torch.Generator().manual_seed(0)).images[0]
        on_grey = composite(image, Image.new("L", image.size), "#808080")
        columns.append([on_grey, mask, true, predicted, composite(image, true), composite(image, predicted)])
    names = ["object", "mask", "true", "1 step", "composite, true", "composite, 1 step"]
    unseen = image_grid([list(row) for row in zip(*columns, strict=True)], names, 96)

    objects = [read(data / "shown", stem)[0] for stem in shown]
    turns = [{"theta": 35, "phi": phi, "size": 3} for phi in range(0, 360, 45)]
    heights = [{"theta": theta, "phi": 20, "size": 2} for theta in (0, 9, 18, 27, 36, 45)]
    sizes = [{"theta": 35, "phi": 200, "size": size} for size in (2, 3, 4, 5, 6, 7, 8)]
    placed = [
        [sweep(pipeline, x, [{"theta": 38, "phi": phi, "size": 3}], ground)[0] for x in objects]
        for ground, phi in zip(grounds, (30, 150, 320), strict=True)
    ]
    return {
        "unseen": unseen,
        "phi": image_grid([sweep(pipeline, x, turns, grounds[0]) for x in objects[:4]], None, 96),
        "theta": image_grid([sweep(pipeline, x, heights, grounds[1]) for x in objects[2:5]], None, 96),
        "size": image_grid([sweep(pipeline, x, sizes, grounds[2]) for x in objects[4:7]], None, 96),
        "placed": image_grid(placed, None, 96),
    }


def draw_test(data: Path, pipeline: ShadowSDXLPipeline) -> Image.Image:
    """All test shadows, pairs of rows: true above, one step below."""
    dataset = ShadowDataset(data / "test", split="all")
    one = cast(pipeline, dataset, batch_size=32)
    true = torch.stack([dataset[i]["shadow_map"] for i in range(len(dataset))])
    rows = [to_images(maps[i : i + 16]) for i in range(0, len(dataset), 16) for maps in (true, one)]
    return image_grid(rows, ["true", "1 step"] * (len(rows) // 2), 48)


def write_report(output_dir: Path, pipeline: ShadowSDXLPipeline, metrics: dict) -> None:
    pictures = draw_objects(output_dir / "data", pipeline)
    every = draw_test(output_dir / "data", pipeline)
    baselines = {"zero": metrics["baselines"]["zero"], "mean_map": metrics["baselines"]["mean_map"]}
    rows = baselines | {"1": metrics["one_step"], "4": metrics["four_steps"], "phi_shuffled": metrics["phi_shuffled"]}
    keys = ["zncc", "iou", "rmse", "s_rmse", "ssim"]
    table = [[MAP_ROWS[name], *(f"{row[key]:.3f}" for key in keys)] for name, row in rows.items()]
    widths = ", ".join("none" if width is None else f"{width:.1f}" for width in metrics["size_sweep"]["edge_width_px"])
    lead = (
        f"{metrics['num_objects']} objects the network never saw, each under {LIGHTS} lights, one step: correlation "
        f"with the path-traced shadow {metrics['one_step']['zncc']:.3f}, soft IoU {metrics['one_step']['iou']:.3f}, "
        f"direction wrong by {metrics['direction_error_deg']:.1f} degrees (median)."
    )
    note = (
        f"<p>Mean over {metrics['num_samples']} maps (theta 12 to 45) and {NUM_DRAWS} noises; ZNCC, IoU, SSIM: "
        "higher is better. The "
        "last row tells the network the wrong direction. All zeros: what a black picture scores; mean map: the mean of "
        f"the training shadows. Largest difference between phi = 0 and 360: {metrics['seam']:.1e}. Width of the "
        f"penumbra for sizes {', '.join(map(str, metrics['size_sweep']['sizes']))}: {widths} pixels.</p>"
    )
    commands = (
        "<pre>python -m data_prep.shadows render --out DIR --num_samples 1500 --image_size 512\n"
        "accelerate launch -q --config_file accelerate_configs/a100_40gb.yaml trainers/train_shadow_sdxl.py \\\n"
        "    --config configs/shadow_sdxl/litmus512.yaml --data.path DIR\n"
        f"python -m evaluation.shadow_sdxl {output_dir}/run --data {output_dir}/data/test\n"
        f"python -m pipelines.shadow_sdxl.generate {output_dir}/run --image cut_out.png --phi 0 90 180 270 "
        "--output sweep.png</pre>"
        "<pre>from pipelines.shadow_sdxl import ShadowSDXLPipeline\n"
        f'pipeline = ShadowSDXLPipeline.from_pretrained("{output_dir}/run")\n'
        "pipeline(image, theta=30, phi=45, size=4).images[0]</pre>"
    )
    sections = [
        (
            "Never seen",
            report.picture(pictures["unseen"], "The network works on 48 pixels; these pictures have 256"),
        ),
        ("The light turns: phi 0 to 315", report.picture(pictures["phi"], "phi 0: light on the right; 90: behind")),
        ("The light sinks: theta 0 to 45", report.picture(pictures["theta"], "theta 0: overhead")),
        ("The light grows: size 2 to 8", report.picture(pictures["size"], "The larger the light, the softer the edge")),
        ("On other ground", report.picture(pictures["placed"], "Multiplied into the background")),
        ("Figures", report.table(["", *(key.replace("_", "-").upper() for key in keys)], table) + note),
        (
            "All test shadows",
            report.picture(every, "Pairs of rows: true above, one step below"),
        ),
        ("Training", report.line_chart({"loss": common.read_curve(output_dir / "run")}, "Training loss over updates")),
        ("How to go on", commands),
    ]
    (output_dir / "report.html").write_text(report.page("Shadows in one step", lead, sections), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    settings = parse(Settings, argv, "python -m demos.shadow", __doc__)
    output_dir, began = settings.output_dir, time.perf_counter()
    max_train_steps = settings.max_train_steps or common.planned_updates(CONFIG)
    common.empty_folder(output_dir, "data/train/dataset.json")
    torch.set_num_threads(2)

    seconds = {}
    render(output_dir / "data", settings.num_train)
    seconds["render"] = time.perf_counter() - began
    train(output_dir / "data" / "train", output_dir / "run", max_train_steps)
    seconds["train"] = time.perf_counter() - began - seconds["render"]
    pipeline = ShadowSDXLPipeline.from_pretrained(output_dir / "run")
    pipeline.set_progress_bar_config(disable=True)
    metrics = measure(pipeline, output_dir / "data") | {"updates": max_train_steps, "seconds": seconds}
    write_report(output_dir, pipeline, metrics)
    seconds["total"] = time.perf_counter() - began
    common.write_metrics(output_dir, metrics)
    for name in ("one_step", "four_steps", "phi_shuffled"):
        row = metrics[name]
        print(f"{name:>12}: ZNCC {row['zncc']:.3f}, IoU {row['iou']:.3f}, RMSE {row['rmse']:.4f}")
    print(f"direction error {metrics['direction_error_deg']:.1f} degrees, seam {metrics['seam']:.1e}")
    print(f"{seconds['total']:.0f} s. Open {output_dir / 'report.html'}")


if __name__ == "__main__":
    main()
