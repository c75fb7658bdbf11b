"""The commands of `python -m evaluation.layout_flux.benchmarks`.

Libraries are loaded once a command's arguments are understood.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, model_validator

from backlot.command_line import Positional, input_errors, parse
from backlot.config import Section
from backlot.files import read_json, write_file
from backlot.program_settings import DeviceSettings
from evaluation.layout_flux.settings import BenchmarkName, GenerationSettings
from evaluation.table import format_table, write_json

if TYPE_CHECKING:
    from evaluation.layout_flux.benchmarks.formats import Request

PROGRAM = "python -m evaluation.layout_flux.benchmarks"


class Requests(Section):
    benchmark: BenchmarkName
    """layoutsam, denselayout or cocomig"""
    path: Path
    """its annotations: JSON, JSON lines, parquet, or a folder of these; mig_bench.json or mig_bench_anno.yaml"""
    output: Path
    """JSON lines to be written"""
    num_requests: int | None = Field(None, ge=1)
    """only the first ones; all if left out"""


class Generate(GenerationSettings):
    model: Annotated[str, Positional]
    """folder of an exported pipeline, a run or an adapter"""
    requests: Path
    """what the command `requests` wrote"""
    output: Path
    """folder of the pictures; those that are there are not made again"""
    seed: int = Field(42, ge=0)
    """of the noise"""
    num_inference_steps: int = Field(28, ge=1)
    """equal steps"""
    grounding_ratio: float = Field(0.3, gt=0, le=1)
    """share of the steps that are told the layout"""


class Detect(DeviceSettings):
    benchmark: BenchmarkName
    """denselayout or cocomig"""
    requests: Path
    """what the command `requests` wrote"""
    pictures: Path
    """folder with <id>.jpg"""
    output: Path
    """folder of the detections; those that are there are not made again"""
    detector: str = "IDEA-Research/grounding-dino-tiny"
    """GroundingDINO: a folder or a hub id"""
    segmenter: str = "facebook/sam-vit-huge"
    """SAM: a folder or a hub id; cocomig only"""

    @model_validator(mode="after")
    def _detectable(self) -> Self:
        if self.benchmark == "layoutsam":
            raise ValueError("layoutsam needs no detector: its questions are about the boxes themselves")
        return self


class Questions(Section):
    benchmark: BenchmarkName
    """layoutsam or denselayout"""
    requests: Path
    """what the command `requests` wrote"""
    pictures: Path
    """folder with <id>.jpg"""
    detections: Path | None = None
    """what the command `detect` wrote; denselayout only"""
    output: Path
    """JSON lines: id, instance, name, box (fractions) and question; add `answer` to each"""

    @model_validator(mode="after")
    def _askable(self) -> Self:
        if self.benchmark == "cocomig":
            raise ValueError("cocomig asks nothing")
        if (self.benchmark == "denselayout") != (self.detections is not None):
            raise ValueError("--detections belong to denselayout, which needs them, and to it alone")
        return self


class Score(Section):
    benchmark: BenchmarkName
    """layoutsam, denselayout or cocomig"""
    requests: Path
    """what the command `requests` wrote"""
    detections: Path | None = None
    """what the command `detect` wrote"""
    answers: Path | None = None
    """the questions with their answers"""
    output: Path | None = None
    """also write the scores to this JSON file"""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.benchmark == "layoutsam" and self.answers is None:
            raise ValueError("layoutsam needs --answers: its scores are those of a vision-language model")
        if self.benchmark != "layoutsam" and self.detections is None:
            raise ValueError(f"{self.benchmark} needs --detections: its scores are those of a detector")
        return self


def requests(argv: list[str] | None = None) -> None:
    """Read a benchmark's annotations and write one request per line: id, prompt, size, and objects with their boxes.

    python -m evaluation.layout_flux.benchmarks requests --benchmark denselayout --path rows --output dense.jsonl
    python -m evaluation.layout_flux.benchmarks requests --benchmark cocomig --path mig_bench.json --output mig.jsonl
    """
    settings = parse(Requests, argv, f"{PROGRAM} requests", requests.__doc__)

    from evaluation.layout_flux.benchmarks.formats import read_benchmark, write_requests

    with input_errors():
        read = read_benchmark(settings.benchmark, settings.path)[: settings.num_requests]
        write_requests(read, settings.output)
    objects = sum(len(request.instances) for request in read)
    print(f"{settings.output}: {len(read)} requests, {objects} objects")


def generate(argv: list[str] | None = None) -> None:
    """Draw what a benchmark asks for, <id>.jpg, with a layout adapter. Killed, the same command goes on.

    python -m evaluation.layout_flux.benchmarks generate runs/stage3 --base_model FLUX.1-dev --requests dense.jsonl \\
        --output pictures/dense --dtype bfloat16
    """
    settings = parse(Generate, argv, f"{PROGRAM} generate", generate.__doc__)

    from tqdm import tqdm

    from evaluation.layout_flux.benchmarks.formats import read_requests
    from evaluation.layout_flux.drawing import draw_request, load_model

    with input_errors():
        read = read_requests(settings.requests)
        pipeline = load_model(settings.model, settings.base_model, settings.device, settings.dtype)
        settings.output.mkdir(parents=True, exist_ok=True)
        for request in tqdm([each for each in read if not _picture(settings.output, each.id).exists()], unit="picture"):
            picture = draw_request(pipeline, request, settings.sampling(), settings.seed)
            temporary = settings.output / f".{request.id}.tmp"
            picture.save(temporary, format="JPEG", quality=95)
            temporary.replace(_picture(settings.output, request.id))
    print(f"{settings.output}: {len(read)} pictures")


def detect(argv: list[str] | None = None) -> None:
    """Find the objects in pictures, by the models and thresholds of a benchmark. Killed, the same command goes on.

        python -m evaluation.layout_flux.benchmarks detect --benchmark denselayout --requests dense.jsonl \\
            --pictures pictures/dense --output detections/dense
    """
    settings = parse(Detect, argv, f"{PROGRAM} detect", detect.__doc__)

    from tqdm import tqdm

    from backlot.loading import default_device
    from evaluation.layout_flux.benchmarks import detection
    from evaluation.layout_flux.benchmarks.formats import read_requests

    with input_errors():
        read = _with_picture(read_requests(settings.requests), settings.pictures)
        settings.output.mkdir(parents=True, exist_ok=True)
        left = [request for request in read if not (settings.output / f"{request.id}.json").exists()]
        device = settings.device or default_device()
        with input_errors("the detector is not available"):
            detector = detection.Detector(settings.detector, device)
            if settings.benchmark == "cocomig":
                segmenter = detection.Segmenter(settings.segmenter, device)
        for request in tqdm(left, unit="picture"):
            picture = _open_picture(settings.pictures, request)
            if settings.benchmark == "cocomig":
                found = detection.find_coloured(picture, request, detector, segmenter)
            else:
                found = detection.find_instances(picture, request, detector)
            write_file(settings.output / f"{request.id}.json", json.dumps({"instances": found}), durable=False)
    print(f"{settings.output}: detections of {len(read)} pictures")


def questions(argv: list[str] | None = None) -> None:
    """Write every question that a benchmark asks about its pictures, for a vision-language model of your choice.

        python -m evaluation.layout_flux.benchmarks questions --benchmark layoutsam --requests sam.jsonl \\
            --pictures pictures/sam --output questions.jsonl
    """
    settings = parse(Questions, argv, f"{PROGRAM} questions", questions.__doc__)

    from evaluation.layout_flux.benchmarks import scores
    from evaluation.layout_flux.benchmarks.formats import read_requests

    with input_errors():
        read = _with_picture(read_requests(settings.requests), settings.pictures)
        detections = None if settings.detections is None else _read_detections(read, settings.detections)
        asked = scores.questions(read, detections)
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        write_file(settings.output, "".join(json.dumps(row) + "\n" for row in asked))
    print(f"{settings.output}: {len(asked)} questions about {len(read)} pictures")


def score(argv: list[str] | None = None) -> None:
    """Score detections and answers by the definitions of a benchmark (evaluation/layout_flux/benchmarks/scores.py).

        python -m evaluation.layout_flux.benchmarks score --benchmark denselayout --requests dense.jsonl \\
            --detections detections/dense --answers answers.jsonl --output dense-scores.json
    """
    settings = parse(Score, argv, f"{PROGRAM} score", score.__doc__)

    from evaluation.layout_flux.benchmarks import scores
    from evaluation.layout_flux.benchmarks.formats import read_requests

    with input_errors():
        read = read_requests(settings.requests)
        detections = None if settings.detections is None else _read_detections(read, settings.detections)
        answers = None if settings.answers is None else scores.gather_answers(read, list(_lines(settings.answers)))
        if settings.benchmark == "layoutsam":
            result = scores.score_layoutsam(read, answers)
        elif settings.benchmark == "denselayout":
            result = scores.score_lgs(read, detections, answers)
        else:
            result = scores.score_coco_mig(read, detections)
        if settings.output is not None:
            write_json(settings.output, {"benchmark": settings.benchmark, **result})
    _show(settings.benchmark, result)


def _show(benchmark: str, result: dict) -> None:
    """Print scores: one column for all, and one for each number of objects."""
    counts = {name: result[name] for name in ("num_pictures", "num_missing", "num_instances")}
    levels = result.get("levels", {})
    names = [name for name in result if name not in counts and name != "levels"]
    columns = {"all": result, **{f"{level} objects": values for level, values in levels.items()}}
    rows = {
        name: ["-" if values[name] is None else f"{values[name]:.4f}" for values in columns.values()] for name in names
    }
    left_out = f"; {counts['num_missing']} pictures are missing and left out" if counts["num_missing"] else ""
    print(f"{benchmark}: {counts['num_pictures']} pictures, {counts['num_instances']} objects{left_out}")
    print(format_table(list(columns), rows))


def _picture(folder: Path, name: str) -> Path:
    return folder / f"{name}.jpg"


def _with_picture(read: list[Request], folder: Path) -> list[Request]:
    """The requests of which there is a picture; ValueError if there is none at all."""
    there = [request for request in read if _picture(folder, request.id).is_file()]
    if not there:
        raise ValueError(f"{folder} holds no picture of these requests; {read[0].id}.jpg would be the first")
    return there


def _open_picture(folder: Path, request: Request):
    from PIL import Image

    with Image.open(_picture(folder, request.id)) as picture:
        return picture.convert("RGB")


def _read_detections(read: list[Request], folder: Path) -> dict[str, list[dict]]:
    """By id, as far as they are there; ValueError if there is none at all."""
    files = {request.id: folder / f"{request.id}.json" for request in read}
    found = {name: read_json(file)["instances"] for name, file in files.items() if file.is_file()}
    if not found:
        raise ValueError(f"{folder} holds no detections of these requests; {read[0].id}.json would be the first")
    return found


def _lines(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines if line.strip())
