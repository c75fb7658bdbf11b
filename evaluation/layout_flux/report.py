"""What `python -m evaluation.layout_flux` does: open the data, measure every model, print tables, write JSON."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from backlot.command_line import input_errors
from backlot.loading import default_device
from data_prep.layouts.dataset import LayoutDataset
from data_prep.layouts.prepare import MODELS
from evaluation.layout_flux.drawing import load_model
from evaluation.layout_flux.examples import read_examples, read_profile
from evaluation.layout_flux.identity import Similarity
from evaluation.layout_flux.measure import KEYS, Measured, Protocol, compare, estimates, groups_of, measure, summarise
from evaluation.layout_flux.settings import Settings
from evaluation.layout_flux.statistics import Estimate, as_json
from evaluation.table import format_table, output_file, write_json
from pipelines.layout_flux.encoders import LayoutEncoders

TITLES = {
    "colour_accuracy": "colour in visible part",
    "shape_accuracy": "shape",
    "mask_iou": "mask IoU",
    "box_iou": "box IoU",
    "lgs50": "box IoU, 0 below 0.5",
    "background_accuracy": "background outside boxes",
    "swap": "colours follow swapped prompts",
    "alpha_agreement": "alpha tells foreground",
    "dino_similarity": "DINO cosine to reference",
    "identity_retrieval": "identity among 16",
    "identity_shuffled": "  with others' references",
    "leakage": "DINO cosine to other references",
    "outside_drift": "change outside / inside boxes",
}
GROUP_KEYS = ("colour_accuracy", "shape_accuracy", "mask_iou", "box_iou", "identity_retrieval")


def format_estimate(value: Estimate) -> str:
    """A mean and its interval; a dash without one."""
    return "-" if value.mean is None else f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"


def show(models: Mapping[str, Measured], comparisons: Mapping[str, Mapping[str, Estimate]]) -> None:
    """Print all that was measured: figures, figures by group, differences."""
    figures = {name: estimates(measured) for name, measured in models.items()}
    width = 24
    rows = {TITLES[key]: [format_estimate(each[key]) for each in figures.values()] for key in KEYS}
    print(format_table(list(models), rows, width))
    for name, measured in models.items():
        groups = {group: measured.objects.where(chosen) for group, chosen in groups_of(measured.objects).items()}
        rows = {
            f"{group}, {len(table)} objects": [format_estimate(table.estimate(key)) for key in GROUP_KEYS]
            for group, table in groups.items()
            if len(table)
        }
        print(f"\n{name}\n{format_table([TITLES[key] for key in GROUP_KEYS], rows, width)}")
    if comparisons:
        names = [name for name, each in next(iter(comparisons.values())).items() if each.count]
        rows = {name: [format_estimate(each[name]) for each in comparisons.values()] for name in names}
        print(f"\npaired differences\n{format_table(list(comparisons), rows, width)}")


def compare_all(models: Mapping[str, Measured]) -> dict[str, dict[str, Estimate]]:
    """Every model with the one before it; one with a bridge also with itself without."""
    names = list(models)
    found = {
        f"{after} - {before}": compare(models[after], models[before]) for before, after in itertools.pairwise(names)
    }
    for name, measured in models.items():
        if measured.without_feedback is not None:
            off = measured.without_feedback
            found[f"{name}, bridge on - off"] = compare(measured.first(len(off.layouts)), off)
    return found


def open_protocol(settings: Settings) -> tuple[LayoutDataset, Protocol]:
    """What is measured on, and how; ValueError or OSError if something of it is not what it should be."""
    scenes = read_profile(settings.data)
    dataset = LayoutDataset(settings.data, split=settings.split, max_objects=scenes.max_objects)
    protocol = Protocol(
        read_examples(dataset, settings.num_layouts),
        scenes,
        settings.variants(),
        settings.sampling(),
        Similarity(open_encoders(settings, dataset)),
        settings.seed,
        settings.batch_size,
    )
    return dataset, protocol


def open_encoders(settings: Settings, dataset: LayoutDataset) -> LayoutEncoders:
    """Those that the data were encoded with; ValueError if they are others."""
    own = settings.data / MODELS
    source = settings.encoders or (str(own) if own.is_dir() else "real")
    encoders = LayoutEncoders.load(source, settings.device or default_device())
    recipes = dataset.meta.recipes
    for part, known in (("clip_vision", recipes["clip"]), ("dino", recipes["dino"])):
        if encoders.identity(part) != known[part]:
            raise ValueError(f"{part} of {source} is not what {settings.data} was encoded with: --encoders names it")
    return encoders


def report(settings: Settings) -> None:
    """Measure every model on the layouts that are named."""
    output = output_file(settings.output, settings.output.parent)
    models: dict[str, Measured] = {}
    with input_errors():
        dataset, protocol = open_protocol(settings)
        for name, source in settings.named_models().items():
            pipeline = load_model(source, settings.base_model, settings.device, settings.dtype)
            if settings.no_layout and not models:
                models["no_layout"] = measure(pipeline, protocol, with_layout=False, show_progress=True)
            models[name] = measure(pipeline, protocol, show_progress=True)
        comparisons = compare_all(models)
        show(models, comparisons)
        content = {
            "data": describe(settings, dataset, protocol),
            "models": settings.named_models(),
            "sampling": protocol.sampling.model_dump(),
            "seed": settings.seed,
            "comparisons": {name: as_json(values) for name, values in comparisons.items()},
            **{name: summarise(measured) for name, measured in models.items()},
        }
        write_json(output, content)
    print(f"\nwritten to {output}")


def describe(settings: Settings, dataset: LayoutDataset, protocol: Protocol) -> dict:
    """What a reader must know of the data to compare figures."""
    return {
        "path": str(settings.data),
        "split": settings.split,
        "num_layouts": len(protocol.examples),
        "evaluation_only": dataset.meta.evaluation_only,
        "fingerprint": dataset.fingerprint,
    }
