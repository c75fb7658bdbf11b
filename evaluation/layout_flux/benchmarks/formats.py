"""The annotation files of public layout benchmarks, read into one form: boxes are fractions, x1 y1 x2 y2."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from data_prep.layouts.importers import as_list, flatten, read_rows, scaled
from evaluation.layout_flux.settings import BenchmarkName

Box = tuple[float, float, float, float]
LAYOUTSAM_SIDE, MIG_SIDE = 1024, 512
"""Sides of the pictures that LayoutSAM-Eval, whatever its photographs' sizes, and COCO-MIG are drawn in."""


@dataclass(frozen=True)
class Instance:
    """One object that a benchmark asks for.

    Args:
        label: what a detector is asked for.
        caption: the whole description; the label again where there is none.
        box: as annotated, cut to [0, 1]; may be empty.
    """

    label: str
    caption: str
    box: Box

    @property
    def is_drawable(self) -> bool:
        x1, y1, x2, y2 = self.box
        return x2 > x1 and y2 > y1


@dataclass(frozen=True)
class Request:
    """One picture that a benchmark asks for; it is to be saved as `<id>.jpg`."""

    id: str
    prompt: str
    width: int
    height: int
    instances: tuple[Instance, ...]

    def to_json(self) -> dict:
        return asdict(self)


def read_benchmark(name: BenchmarkName, path: Path) -> list[Request]:
    """Every request of a benchmark, in its order.

    Args:
        path: layoutsam, denselayout: JSON, JSON lines or parquet, or a folder of these; cocomig: mig_bench.json or
            mig_bench_anno.yaml.

    Raises:
        ValueError, OSError: something is not as the format says; the message names the row.
    """
    if name == "cocomig":
        requests = list(_coco_mig(_read_mapping(path)))
    else:
        parse = {"layoutsam": _layoutsam, "denselayout": _denselayout}[name]
        requests = [_named(path, number, parse, row) for number, row in enumerate(read_rows(path))]
    if not requests:
        raise ValueError(f"{path} holds no request of {name}")
    ids = [request.id for request in requests]
    if repeated := sorted({each for each in ids if ids.count(each) > 1} if len(set(ids)) < len(ids) else ()):
        raise ValueError(f"{path}: the id {repeated[0]!r} occurs more than once")
    return requests


def write_requests(requests: Sequence[Request], path: Path) -> None:
    """One request per line, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(request.to_json()) + "\n" for request in requests), encoding="utf-8")


def read_requests(path: Path) -> list[Request]:
    """What `write_requests` wrote; ValueError if it is something else."""
    requests = []
    for number, row in enumerate(read_rows(path)):
        try:
            instances = tuple(Instance(**{**each, "box": tuple(each["box"])}) for each in row["instances"])
            requests.append(Request(**{**row, "instances": instances}))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}, row {number}: not a request of `... benchmarks requests` ({error})") from None
    return requests


# --- rows -----------------------------------------------------------------------------------------------------------


def _named(path: Path, number: int, parse: Callable[[Mapping, int], Request], row: Mapping) -> Request:
    """A parsed row; what is wrong with it is said with its number."""
    try:
        return parse(row, number)
    except KeyError as error:
        raise ValueError(f"{path}, row {number}: {error.args[0]} is missing") from None
    except (ValueError, TypeError, SyntaxError) as error:
        raise ValueError(f"{path}, row {number}: {error}") from None


def _cut(box: Sequence[float]) -> Box:
    """To the picture."""
    return tuple(min(max(float(value), 0.0), 1.0) for value in box)


def _instance(label: str, caption: str, box: Sequence[float], width: int, height: int) -> Instance:
    """An instance whose box is in pixels."""
    return Instance(str(label), str(caption), _cut(scaled(box, width, height)))


def _layoutsam(row: Mapping, number: int) -> Request:
    """LayoutSAM-Eval: three columns hold lists as text, boxes are pixels x1 y1 x2 y2; the id is the row's number."""
    size = int(row["width"]), int(row["height"])
    labels, captions, boxes = (
        as_list(row[name]) for name in ("region_captions", "detail_region_captions", "bbox_list")
    )
    if not len(boxes) == len(labels) == len(captions):
        raise ValueError(f"{len(boxes)} boxes, {len(labels)} captions and {len(captions)} detailed captions")
    instances = tuple(_instance(*each, *size) for each in zip(labels, captions, boxes, strict=True))
    return Request(f"{number:04d}", row["global_caption"], LAYOUTSAM_SIDE, LAYOUTSAM_SIDE, instances)


def _denselayout(row: Mapping, number: int) -> Request:
    """DenseLayout: boxes are pixels x1 y1 x2 y2; `annos` may be a list of lists."""
    size = int(row["width"]), int(row["height"])
    instances = tuple(
        _instance(each["category_name"], each["caption"], each["bbox"], *size)
        for each in flatten(as_list(row["annos"]))
    )
    return Request(str(row["id"]), row["prompt"], *size, instances)


# --- COCO-MIG -------------------------------------------------------------------------------------------------------


def _read_mapping(path: Path) -> Mapping:
    text = path.read_text(encoding="utf-8")
    content = yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no requests by id or by prompt")
    return content


def _coco_mig(content: Mapping) -> Iterator[Request]:
    """Requests by id, with `caption` and `segment`; or boxes by prompt and phrase, with `coco_id`."""
    for key, entry in content.items():
        try:
            if "segment" in entry:
                name, prompt = str(key), entry["caption"]
                pairs = [(each["label"], each["bbox"]) for each in entry["segment"]]
            else:
                name, prompt = str(entry["coco_id"]), str(key)
                pairs = [(phrase, box) for phrase, boxes in entry.items() if phrase != "coco_id" for box in boxes]
            instances = tuple(Instance(_without_article(text), text, _cut(box)) for text, box in pairs)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"COCO-MIG, entry {key!r}: {type(error).__name__} {error}") from None
        yield Request(name, prompt.strip(), MIG_SIDE, MIG_SIDE, instances)


def _without_article(phrase: str) -> str:
    """`a black teddy bear` -> `black teddy bear`: a colour, then what a detector is asked for."""
    return phrase.strip().removeprefix("a ").removeprefix("an ")
