"""The page of the layout demo: what was asked for, what was drawn, and the figures."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from backlot.crops import crop_window
from backlot.pictures import to_pixel_values
from data_prep.layouts.procedural import (
    BODY_COLOURS,
    MAX_MARK_SHARE,
    NUM_MARKS,
    Identity,
    SceneObject,
    is_held_out,
    mark_share,
    render,
    render_reference,
)
from demos import common, report
from demos.layout_figures import CHANCE, NAMES, STAGES, Goal, find_goals
from evaluation.layout_flux import KEYS, Example, Measured, Protocol, draw
from evaluation.layout_flux.examples import Item, Reference, pairs_to_swap
from evaluation.layout_flux.report import TITLES
from pipelines.layout_flux.encoders import crop_for
from pipelines.layout_flux.overlay import box_colour
from pipelines.layout_flux.pipeline import FluxLayoutPipeline

ZOOM = 6  # screen pixels for one of a picture's
GAP, INK, GREY, PAPER = 12, (40, 44, 52), (120, 120, 120), (247, 247, 247)
NUM_SHOWN, NUM_ASIDE, NUM_CROPS = 8, 6, 12
NUM_REFERENCES, NUM_REFERRED = 4, 4
LAST = "stage3"
GROUP_KEYS = ("colour_accuracy", "shape_accuracy", "mask_iou", "box_iou", "identity_retrieval", "overlap_accuracy")
GROUPS = {
    "objects_2": "2 in a picture",
    "objects_3": "3",
    "objects_4": "4",
    "not_overlapped": "alone in their place",
    "overlapped": "overlapping others",
    "nearer": "the nearer of them",
}
Picture = Image.Image


@dataclass(frozen=True)
class Drawn:
    """What is shown: the layouts, and the pictures of every model, in the order of the layouts."""

    protocol: Protocol
    measured: Mapping[str, Measured]

    @property
    def examples(self) -> Sequence[Example]:
        return self.protocol.examples

    def picture(self, model: str, number: int) -> np.ndarray:
        return self.measured[model].pictures["plain"][number]

    def framed(self, model: str, number: int) -> Picture:
        """With its boxes: red where the model takes the object for foreground, blue below, grey without a layout."""
        alphas = self.measured[model].alphas
        objects = self.examples[number].scene.objects
        colours = [GREY] * len(objects) if alphas is None else [box_colour(alpha) for alpha in alphas[number]]
        return frame(self.picture(model, number), objects, colours[: len(objects)])


def without_references(item: Item) -> Item:
    """The item of a layout whose objects are described by boxes and texts alone."""
    return {**item, "has_reference": torch.zeros_like(item["has_reference"])}


# --- cells and sheets -----------------------------------------------------------------------------------------------


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


def enlarge(pixels: np.ndarray, side: int | None = None) -> Picture:
    """Every pixel a square; `side`: of the result, by default `ZOOM` times as large."""
    size = (side, side) if side else (pixels.shape[1] * ZOOM, pixels.shape[0] * ZOOM)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def corners(box: Sequence[float], side: int, margin: int = 0) -> tuple[float, float, float, float]:
    """A box in pixels of an enlarged picture, a little larger, so that its line does not cover what is in it."""
    x1, y1, x2, y2 = (x * side for x in box)
    return max(0, x1 - margin), max(0, y1 - margin), min(side - 1, x2 + margin - 1), min(side - 1, y2 + margin - 1)


def frame(pixels: np.ndarray, objects: Sequence[SceneObject], colours: Sequence[tuple[int, int, int]]) -> Picture:
    """An enlarged picture with boxes around objects."""
    canvas = enlarge(pixels)
    pen = ImageDraw.Draw(canvas)
    for each, colour in zip(objects, colours, strict=True):
        pen.rectangle(corners(each.box, canvas.width, 2), outline=colour, width=2)
    return canvas


def ask(example: Example, exchanged: tuple[int, int] | None = None) -> Picture:
    """The layout: boxes with their captions, nearer ones on top; of two, the captions are exchanged."""
    side = example.scene.image_size * ZOOM
    objects = example.scene.objects
    told = list(range(len(objects)))
    if exchanged is not None:
        first, second = exchanged
        told[first], told[second] = second, first
    canvas = Image.new("RGB", (side, side), PAPER)
    pen = ImageDraw.Draw(canvas)
    for place in sorted(range(len(objects)), key=lambda place: objects[place].z_order):
        colour = BODY_COLOURS[objects[told[place]].colour]
        pale = tuple(round(255 - 0.25 * (255 - x)) for x in colour)
        pen.rectangle(corners(objects[place].box, side), fill=pale, outline=colour, width=4)
    for each, identity in sorted(
        ((each, objects[other].identity) for each, other in zip(objects, told, strict=True)),
        key=lambda pair: pair[0].z_order,
    ):
        x, y, *_ = corners(each.box, side)
        text = f"{identity.colour}\n{identity.shape}"
        pen.multiline_text(
            (x + 8, y + 6), text, fill=INK, font=font(16), spacing=1, stroke_width=2, stroke_fill="white"
        )
    return canvas


def sheet(rows: Sequence[Sequence[Picture]], columns: Sequence[str] = (), labels: Sequence[str] = ()) -> Picture:
    """Cells of one size on white, texts above columns and beside rows."""
    width, height = rows[0][0].size
    letters = font(18)
    top = 30 if columns else GAP // 2
    left = max((int(letters.getlength(line)) for label in labels for line in label.split("\n")), default=0)
    left = left + GAP if labels else GAP // 2
    count = max(len(row) for row in rows)
    canvas = Image.new("RGB", (left + count * (width + GAP), top + len(rows) * (height + GAP)), "white")
    pen = ImageDraw.Draw(canvas)
    for j, text in enumerate(columns):
        pen.text((left + j * (width + GAP) + width / 2, top / 2), text, fill=INK, font=letters, anchor="mm")
    for i, row in enumerate(rows):
        y = top + i * (height + GAP)
        if labels:
            pen.multiline_text((4, y + height / 2), labels[i], fill=INK, font=letters, anchor="lm")
        for j, cell in enumerate(row):
            canvas.paste(cell, (left + j * (width + GAP), y))
    return canvas


def beside(*cells: Picture) -> Picture:
    """Pictures of one height in one."""
    canvas = Image.new("RGB", (sum(cell.width for cell in cells) + 4 * (len(cells) - 1), cells[0].height), "white")
    left = 0
    for cell in cells:
        canvas.paste(cell, (left, 0))
        left += cell.width + 4
    return canvas


def cut_out(pixels: np.ndarray, box: Sequence[float], side: int = 96) -> Picture:
    """An object as the encoders see it, enlarged."""
    window = crop_window(box, *pixels.shape[:2])
    crop = pixels[window.top : window.bottom, window.left : window.right]
    missing = [max(crop.shape[:2]) - length for length in crop.shape[:2]]
    padding = [(lack // 2, lack - lack // 2) for lack in missing]
    return enlarge(np.pad(crop, [*padding, (0, 0)], mode="edge"), side)


# --- what is shown --------------------------------------------------------------------------------------------------


def show_layouts(drawn: Drawn) -> Picture:
    """The first layouts, none left out: asked for, true, and by every model."""
    rows = []
    for number, example in enumerate(drawn.examples[:NUM_SHOWN]):
        true = [box_colour(float(each.is_foreground)) for each in example.scene.objects]
        true = frame(render(example.scene), example.scene.objects, true)
        rows.append([ask(example), true, *(drawn.framed(name, number) for name in NAMES)])
    return sheet(rows, ["asked for", "true picture", *NAMES.values()])


def show_crops(drawn: Drawn) -> Picture:
    """The first objects that nothing hides, and beside each reference what every stage made of it."""
    found = [
        (number, place)
        for number, example in enumerate(drawn.examples)
        for place, each in enumerate(example.scene.objects)
        if each.visible == 1 and example.references[place] is not None
    ][:NUM_CROPS]
    boxes = [drawn.examples[number].scene.objects[place].box for number, place in found]
    rows = [[cut_out(*drawn.examples[number].references[place]) for number, place in found]]
    for name in STAGES:
        rows.append([cut_out(drawn.picture(name, n), box) for (n, _), box in zip(found, boxes, strict=True)])
    return sheet(rows, labels=["reference", *(NAMES[name] for name in STAGES)])


def other_marks(identity: Identity) -> list[Identity]:
    """Unseen identities of the same caption, shape and colour, spread over all marks."""
    others = (identity.with_mark(mark) for mark in range(NUM_MARKS))
    unseen = [each for each in others if is_held_out(each)]
    usable = [each for each in unseen if mark_share(each.shape, each.mark_pattern) <= MAX_MARK_SHARE]
    return [usable[len(usable) * i // NUM_REFERENCES] for i in range(min(NUM_REFERENCES, len(usable)))]


def encode(protocol: Protocol, reference: Reference) -> dict[str, torch.Tensor]:
    """What an item says of a reference."""
    encoders, (picture, box) = protocol.similarity.encoders, reference
    values = to_pixel_values(Image.fromarray(picture))
    return {
        "clip_embeds": encoders.clip_crops(crop_for(encoders.clip_processor, values, box)[None])[0].float().clone(),
        "dino_embeds": encoders.dino_crops(crop_for(encoders.dino_processor, values, box)[None])[0].float().clone(),
    }


def with_reference(item: Item, place: int, embeds: Mapping[str, torch.Tensor] | None) -> Item:
    """The item with another reference for one object; None: with none."""
    changed = {name: item[name].clone() for name in ("clip_embeds", "dino_embeds", "has_reference")}
    changed["has_reference"][place] = embeds is not None
    for name, values in (embeds or {}).items():
        changed[name][place] = values
    return {**item, **changed}


def show_references(drawn: Drawn, pipeline: FluxLayoutPipeline) -> Picture:
    """Layouts across, references of one object down; layout, prompt and noise stay the same."""
    protocol, columns = drawn.protocol, []
    for example in protocol.examples:
        objects = example.scene.objects
        place = max((i for i in range(len(objects))), key=lambda i: (objects[i].visible, objects[i].side))
        identities = other_marks(objects[place].identity)
        if len(identities) == NUM_REFERENCES:
            columns.append((example, place, [render_reference(each, 0, protocol.scenes) for each in identities]))
        if len(columns) == NUM_REFERRED:
            break
    items = [
        with_reference(example.item, place, reference and encode(protocol, reference))
        for example, place, references in columns
        for reference in (None, *references)
    ]
    pictures = draw(pipeline, items, protocol.sampling, **protocol.noise).pictures
    side = protocol.scenes.image_size * ZOOM * 2 // 3
    empty, cells = Image.new("RGB", (side, side), PAPER), []
    for column, (example, place, references) in enumerate(columns):
        for row, reference in enumerate((None, *references)):
            made = pictures[column * (NUM_REFERENCES + 1) + row]
            framed = frame(made, [example.scene.objects[place]], [INK]).resize((side, side), Image.Resampling.LANCZOS)
            cells.append(beside(empty if reference is None else enlarge(reference[0], side), framed))
    rows = [cells[row :: NUM_REFERENCES + 1] for row in range(NUM_REFERENCES + 1)]
    labels = ["no\nreference", *(f"reference\n{chr(ord('A') + i)}" for i in range(NUM_REFERENCES))]
    return sheet(rows, [example.scene.objects[place].caption for example, place, _ in columns], labels)


def show_swaps(drawn: Drawn) -> Picture:
    """The first pairs of boxes whose descriptions are exchanged."""
    measured, count = drawn.measured[LAST], drawn.protocol.variants.num_swapped
    count = min(count, len(measured.pictures["plain"]))
    pairs = pairs_to_swap(drawn.examples[:count], drawn.protocol.seed)[:NUM_ASIDE]
    rows = [[], [], [], []]
    for (number, first, second), swapped in zip(pairs, measured.pictures["swapped"], strict=False):
        example = drawn.examples[number]
        two = [example.scene.objects[i] for i in (first, second)]
        cells = [
            ask(example),
            frame(drawn.picture(LAST, number), two, [INK] * 2),
            ask(example, (first, second)),
            frame(swapped, two, [INK] * 2),
        ]
        for row, cell in zip(rows, cells, strict=True):
            row.append(cell)
    return sheet(rows, labels=["asked for", "drawn", "two texts\nexchanged", "drawn"])


def show_chosen(drawn: Drawn, numbers: Sequence[int], texts: Sequence[str] = ()) -> Picture:
    """Some layouts across: asked for, true and drawn by the last stage."""
    examples = [drawn.examples[number] for number in numbers]
    rows = [
        [ask(example) for example in examples],
        [enlarge(render(example.scene)) for example in examples],
        [drawn.framed(LAST, number) for number in numbers],
    ]
    return sheet(rows, texts, ["asked for", "true", NAMES[LAST]])


def most_hidden(drawn: Drawn) -> list[int]:
    """The layouts whose objects hide most of one another."""

    def visible(number: int) -> float:
        return min(each.visible for each in drawn.examples[number].scene.objects)

    return sorted(range(len(drawn.examples)), key=visible)[:NUM_ASIDE]


def by_mask_iou(drawn: Drawn) -> list[tuple[float, int]]:
    """Mean mask IoU of the objects of each layout, and its number; the worst first."""
    objects = drawn.measured[LAST].objects
    sums = np.bincount(objects.layouts, objects.columns["mask_iou"])
    return sorted(zip((sums / np.bincount(objects.layouts)).tolist(), range(len(sums)), strict=True))


def show_extremes(drawn: Drawn) -> tuple[Picture, Picture]:
    """The worst and the best layouts."""
    ranked = by_mask_iou(drawn)
    return tuple(
        show_chosen(drawn, [number for _, number in chosen], [f"{value:.2f}" for value, _ in chosen])
        for chosen in (ranked[:NUM_ASIDE], ranked[::-1][:NUM_ASIDE])
    )


# --- figures --------------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def signed(estimate: Mapping[str, float | None]) -> str:
    """A difference and its 95 % interval."""
    if estimate["mean"] is None:
        return "–"
    return f"{estimate['mean']:+.3f} [{estimate['low']:+.3f}, {estimate['high']:+.3f}]"


def tell_goal(goal: Goal) -> list[str]:
    interval = "" if goal.interval is None else f" [{goal.interval[0]:.3f}, {goal.interval[1]:.3f}]"
    value = "–" if goal.value is None else f"{goal.value:.3g}" if abs(goal.value) < 0.01 else f"{goal.value:.3f}"
    return [goal.what, goal.asked, value + interval, "reached" if goal.reached else "missed"]


def tell_goals(goals: Sequence[Goal]) -> str:
    rows = [tell_goal(goal) for goal in goals]
    reached = {(i, 3) for i, goal in enumerate(goals) if goal.reached}
    return report.table(["", "asked for", "measured [95 % interval]", ""], rows, reached)


def tell_figures(metrics: Mapping) -> str:
    """All keys: base against each stage."""
    rows = [[TITLES[key], *(number(metrics[name][key]) for name in NAMES)] for key in KEYS]
    return report.table(["", *NAMES.values()], rows)


def tell_groups(metrics: Mapping) -> str:
    """Of the last stage, by what objects are and how they stand."""
    groups = metrics[LAST]["groups"]
    rows = [
        [f"{text} ({found['mask_iou']['count']})", *(number(found[key]["mean"]) for key in GROUP_KEYS)]
        for text, found in ((text, groups[name]) for name, text in GROUPS.items() if name in groups)
    ]
    return report.table(["", "colour", "shape", "mask IoU", "box IoU", "identity", "on top of others"], rows)


def tell_differences(metrics: Mapping) -> str:
    """Each model against the one before it, and the bridge on against off."""
    comparisons = {
        "stage 2 − stage 1": metrics["comparisons"]["stage2 - stage1"],
        "stage 3 − stage 2": metrics["comparisons"]["stage3 - stage2"],
        "bridge on − off": metrics["comparisons"]["stage3, bridge on - off"],
    }
    titles = TITLES | {"flow_loss": "flow loss"}
    keys = ("dino_similarity", "identity_retrieval", "colour_accuracy", "mask_iou", "box_iou", "flow_loss")
    rows = [[titles[key], *(signed(each[key]) for each in comparisons.values())] for key in keys]
    return report.table(["", *comparisons], rows)


def show_curves(output_dir: Path) -> str:
    """Losses, and what else the stages are watched by."""

    def curves(key: str, names: Sequence[str]) -> dict:
        found = {name: common.read_curve(output_dir / name, key) for name in names}
        return {NAMES.get(name, name): curve for name, curve in found.items() if curve}

    alphas = {
        f"{text}, {name}": curve
        for text, key in (("mean", "metrics/alpha_mean"), ("share ≥ 0.5", "metrics/alpha_fg_ratio"))
        for name, curve in curves(key, STAGES[:2]).items()
    }
    charts = {
        "Flow matching loss over updates": curves("loss/flow_matching", ("base", *STAGES)),
        "DINO cosine of crops to their references": curves("metrics/dino_similarity_mean", STAGES[1:]),
        "Alpha": alphas,
        "Magnitude of the feedback, a share of the tokens'": curves("metrics/feedback_magnitude", STAGES[2:]),
    }
    return report.side_by_side(*(report.line_chart(each, text) for text, each in charts.items() if each))


# --- the page -------------------------------------------------------------------------------------------------------


def lead_of(metrics: Mapping) -> str:
    """The main figures in one sentence."""

    def percent(model: str, key: str) -> str:
        value = metrics[model][key]
        return "–" if value is None else f"{100 * value:.0f} %"

    return (
        f"{metrics['num_layouts']} layouts of objects that were never seen: {percent(LAST, 'colour_accuracy')} of what "
        f"should show an object has its colour (without the layout {percent('no_layout', 'colour_accuracy')}), "
        f"{percent(LAST, 'shape_accuracy')} have their shape, boxes meet with an IoU "
        f"of {number(metrics[LAST]['box_iou'], 2)} (without {number(metrics['no_layout']['box_iou'], 2)}), "
        f"{percent(LAST, 'background_accuracy')} of what lies outside all boxes is background, and "
        f"{percent(LAST, 'identity_retrieval')} are recognised as their own reference among 16 that no caption tells "
        f"apart (stage 1 {percent('stage1', 'identity_retrieval')}, chance {100 * CHANCE:.0f} %)."
    )


def commands_of(output_dir: Path) -> str:
    """How to go on from here."""
    folder = html.escape(str(output_dir))
    return (
        "<pre># the same on FLUX.1-dev: one H100 or more\n"
        "python -m data_prep.layouts prepare --num_samples 20000 --output_dir output_data\n"
        "accelerate launch -q --config_file accelerate_configs/h100x8_ddp.yaml \\\n"
        "    trainers/train_layout_flux.py --config configs/layout_flux/stage1.yaml\n"
        "    # then stage2.yaml and stage3.yaml: each finds the stage before it\n"
        "\n# more updates for any stage of this demo\n"
        "accelerate launch -q --config_file accelerate_configs/cpu_2proc.yaml \\\n"
        "    trainers/train_layout_flux.py --config configs/layout_flux/demo_stage2.yaml \\\n"
        "    --max_train_steps 6000 --resume_from_checkpoint latest\n"
        "\n# all figures of this page, and more\n"
        "python -m evaluation.layout_flux \\\n"
        f"    stage2={folder}/stage2 stage3={folder}/stage3 \\\n"
        f"    --data {folder}/test --encoders {folder}/data/models --base_model {folder}/base\n"
        "\n# a picture from a file that a person can write; boxes drawn by hand on a page\n"
        "python -m pipelines.layout_flux.generate LAYOUT.json --adapter runs/checkpoints/stage3\n"
        "python -m pipelines.layout_flux.demo --adapter runs/checkpoints/stage3</pre>"
        "<pre>from pipelines.layout_flux import FluxLayoutPipeline\n"
        f'pipeline = FluxLayoutPipeline.from_pretrained("black-forest-labs/FLUX.1-dev")\n'
        'pipeline.load_layout_adapter("runs/checkpoints/stage3")\n'
        "pipeline.load_reference_encoders()\n"
        'pipeline("a red disc and a blue cross", boxes=[[0.1, 0.1, 0.5, 0.5], [0.4, 0.4, 0.9, 0.9]],\n'
        '         box_prompts=["disc, a red disc", "cross, a blue cross"],\n'
        "         reference_images=[disc, None]).images[0]</pre>"
    )


def write_page(
    output_dir: Path,
    protocol: Protocol,
    pipeline: FluxLayoutPipeline,
    measured: Mapping[str, Measured],
    metrics: Mapping,
) -> None:
    """Write report.html.

    Args:
        pipeline: of the last stage. metrics: of metrics.json.
    """
    drawn = Drawn(protocol, measured)
    worst, best = show_extremes(drawn)
    steps = protocol.sampling.num_inference_steps
    sections = [
        (
            "Asked for, and drawn",
            report.picture(
                show_layouts(drawn),
                f"The first {min(NUM_SHOWN, len(drawn.examples))} unseen layouts, none left out; {steps} steps from the"
                " same noise. Boxes are red where alpha is at least 0.5 (in the true picture: foreground) and blue"
                " below; grey: the base was told the prompt alone. Stage 1 is shown no references.",
            ),
        ),
        (
            "References, and what was drawn from them",
            report.picture(
                show_crops(drawn),
                "Objects that nothing hides, cut out. A reference is another view of the same object. The marks on"
                " objects are their identity: no caption names them.",
            ),
        ),
        (
            "Other references, same layout and noise",
            report.picture(
                show_references(drawn, pipeline),
                "Pairs of reference and drawn picture (stage 3): the framed object's reference changes, nothing else.",
            ),
        ),
        ("Texts of two boxes exchanged", report.picture(show_swaps(drawn), "Stage 3; the two boxes are framed.")),
        (
            "Objects before others",
            report.picture(show_chosen(drawn, most_hidden(drawn)), "The layouts whose objects hide most."),
        ),
        ("Successes", report.picture(best, "The best layouts of stage 3, by mean mask IoU of their objects.")),
        ("Failures", report.picture(worst, "The worst layouts of stage 3, by the same measure.")),
        ("What was asked for", tell_goals(find_goals(metrics))),
        (
            "Figures",
            tell_figures(metrics)
            + f"<p>Means over the objects of {metrics['num_layouts']} layouts of 2 to 4. Identity: nearer to its own"
            " reference than to 15 others of the same caption, shape and colour, by a descriptor that no loss has seen"
            f" (chance {CHANCE:.2f}). Change outside / inside: what other references change. –: not measurable.</p>",
        ),
        ("Stage 3 by groups of objects", tell_groups(metrics)),
        ("What each stage adds", tell_differences(metrics) + "<p>Paired differences with 95 % intervals.</p>"),
        ("Training", show_curves(output_dir)),
        ("How to go on", commands_of(output_dir)),
    ]
    page = report.page("Objects where they are asked for, and as they are shown", lead_of(metrics), sections)
    (output_dir / "report.html").write_text(page, encoding="utf-8")
