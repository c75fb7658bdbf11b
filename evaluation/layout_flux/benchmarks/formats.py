"""The annotation files of public layout benchmarks, read into one form: boxes are fractions, x1 y1 x2 y2."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import yaml

BenchmarkName = Literal["layoutsam", "denselayout", "cocomig"]
Box = tuple[float, float, float, float]
COLUMNS = {
    "layoutsam": ("global_caption", "bbox_list", "region_captions", "detail_region_captions", "width", "height"),
    "denselayout": ("id", "prompt", "width", "height", "annos"),
}
"""What is read of a row: pictures, which can be large, are not."""
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
        requests = [_named(path, number, parse, row) for number, row in enumerate(_rows(path, COLUMNS[name]))]
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
    for number, row in enumerate(_rows(path, ())):
        try:
            instances = tuple(Instance(**{**each, "box": tuple(each["box"])}) for each in row["instances"])
            requests.append(Request(**{**row, "instances": instances}))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}, row {number}: not a request of `... benchmarks requests` ({error})") from None
    return requests


# --- rows -----------------------------------------------------------------------------------------------------------


def _rows(path: Path, columns: Sequence[str]) -> Iterator[Mapping]:
    """The rows of a file, or of all files of a folder by name."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (".json", ".jsonl", ".parquet"))
        if not files:
            raise ValueError(f"{path} holds no JSON, JSON lines or parquet file")
        for file in files:
            yield from _rows(file, columns)
    elif path.suffix == ".parquet":
        yield from _parquet_rows(path, columns)
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.strip())
    else:
        rows = json.loads(path.read_text(encoding="utf-8"))
        yield from rows if isinstance(rows, list) else [rows]


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[Mapping]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=256, columns=list(columns)):
            yield from batch.to_pylist()


def _named(path: Path, number: int, parse, row: Mapping) -> Request:
    """A parsed row; what is wrong with it is said with its number."""
    try:
        return parse(row, number)
    except KeyError as error:
        raise ValueError(f"{path}, row {number}: {error.args[0]} is missing") from None
    except (ValueError, TypeError, SyntaxError) as error:
        raise ValueError(f"{path}, row {number}: {error}") from None


def _list(value: str | list) -> list:
    """A list, or the text of one as Python writes it."""
    value = ast.literal_eval(value) if isinstance(value, str) else value
    if not isinstance(value, list):
        raise ValueError(f"a list was expected, got {type(value).__name__}")
    return value


def _box(values: Iterable[float], width: float, height: float) -> Box:
    """Pixels -> fractions, cut to the picture."""
    x1, y1, x2, y2 = (float(value) for value in values)
    scaled = (x1 / width, y1 / height, x2 / width, y2 / height)
    return tuple(min(max(value, 0.0), 1.0) for value in scaled)


def _layoutsam(row: Mapping, number: int) -> Request:
    """LayoutSAM-Eval: three columns hold lists as text, boxes are pixels x1 y1 x2 y2; the id is the row's number."""
    width, height = int(row["width"]), int(row["height"])
    boxes, labels, captions = (_list(row[name]) for name in ("bbox_list", "region_captions", "detail_region_captions"))
    if not len(boxes) == len(labels) == len(captions):
        raise ValueError(f"{len(boxes)} boxes, {len(labels)} captions and {len(captions)} detailed captions")
    instances = zip(labels, captions, boxes, strict=True)
    return Request(
        f"{number:04d}",
        row["global_caption"],
        LAYOUTSAM_SIDE,
        LAYOUTSAM_SIDE,
        tuple(Instance(str(label), str(caption), _box(box, width, height)) for label, caption, box in instances),
    )


def _denselayout(row: Mapping, number: int) -> Request:
    """DenseLayout: boxes are pixels x1 y1 x2 y2; `annos` may be a list of lists."""
    width, height = int(row["width"]), int(row["height"])
    annotations = [each for entry in _list(row["annos"]) for each in (entry if isinstance(entry, list) else [entry])]
    return Request(
        str(row["id"]),
        row["prompt"],
        width,
        height,
        tuple(
            Instance(each["category_name"], each["caption"], _box(each["bbox"], width, height)) for each in annotations
        ),
    )


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
            instances = tuple(Instance(_without_article(text), text, _box(box, 1, 1)) for text, box in pairs)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"COCO-MIG, entry {key!r}: {type(error).__name__} {error}") from None
        yield Request(name, prompt.strip(), MIG_SIDE, MIG_SIDE, instances)


def _without_article(phrase: str) -> str:
    """`a black teddy bear` -> `black teddy bear`: a colour, then what a detector is asked for."""
    return phrase.strip().removeprefix("a ").removeprefix("an ")
