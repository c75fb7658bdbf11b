"""`python -m evaluation.vpog predict`: the poses of a BOP dataset's objects as a csv file."""

from __future__ import annotations

from backlot.command_line import fail, input_errors
from backlot.loading import load_pipeline
from data_prep.bop.format import BopDataset
from data_prep.bop.results import write_results
from evaluation.vpog.detections import choose_targets, detect_truly, find_targets, read_detections
from evaluation.vpog.measure import Protocol, ask_all, to_results
from evaluation.vpog.score import write_note
from evaluation.vpog.settings import DatasetSettings, PredictSettings
from pipelines.vpog.pipeline import VPOGPipeline


def open_protocol(settings: DatasetSettings) -> Protocol:
    """What is asked and how; ValueError or OSError, one line, if something of it is not what it should be."""
    dataset = BopDataset(settings.dataset, settings.split)
    is_known = any(frame.instances for frame in dataset.frames())
    if settings.detections is None:
        targets = choose_targets(find_targets(dataset), settings.num_objects)
        detections = detect_truly(targets)
    else:
        targets = find_targets(dataset) if is_known else []
        detections = read_detections(settings.detections, dataset)
    return Protocol(
        dataset,
        dataset.models(),
        settings.template_folder,
        detections,
        targets,
        settings.answering(),
        seed=settings.seed,
    )


def open_pipeline(settings: DatasetSettings) -> VPOGPipeline:
    """The pipeline that is asked, with the cache it was given."""
    pipeline = load_pipeline(VPOGPipeline, settings.model, settings.device, settings.dtype)
    if settings.token_cache is not None:
        pipeline.enable_token_cache(settings.token_cache)
    return pipeline


def run(settings: PredictSettings) -> None:
    """The command."""
    if settings.out.suffix != ".csv":
        fail(f"--out {settings.out}: must end in .csv")
    with input_errors():
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        protocol = open_protocol(settings)
        pipeline = open_pipeline(settings)
        answers = ask_all(pipeline, protocol, settings.answering(), show_progress=True)
        write_results(settings.out, to_results(answers))
        write_note(settings.out, protocol.dataset, protocol.targets)
    print(f"{len(answers)} poses in {settings.out}; python -m evaluation.vpog score {settings.out}")
