"""`open_images`: ranges, splits, odd picture files, the quarantine, and flips that depend on the key alone."""

from __future__ import annotations

import gzip
import io
import json
import re
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from backlot.pictures import decode_image
from data_prep.images.dataset import DataQualityError, Quarantine, open_images
from data_prep.images.digits import load_digits


class Key(int):
    epoch = 0

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * self.epoch + int(self))


def key(row: int, epoch: int) -> Key:
    made = Key(row)
    made.epoch = epoch
    return made


def gradient(width: int, height: int) -> Image.Image:
    """An RGB picture whose red grows to the right and whose green grows downwards."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green, np.full_like(red, 64)], -1).astype(np.uint8))


def saved(tmp_path, image: Image.Image, name: str, **options) -> bytes:
    image.save(tmp_path / name, **options)
    return (tmp_path / name).read_bytes()


@pytest.fixture
def folder(tmp_path):
    """Three classes of ten pictures; the red channel of each picture is its number."""
    root = tmp_path / "photos"
    for label, name in enumerate(["cat", "dog", "eel"]):
        (root / name / "deep").mkdir(parents=True)
        for i in range(10):
            place = root / name / "deep" if i % 2 else root / name
            Image.new("RGB", (24, 20), (10 * label + i, 0, 255)).save(place / f"{i}.png")
    (root / "cat" / "notes.txt").write_text("no picture")
    (root / "cat" / "._0.png").write_bytes(b"hidden")
    return root


def reds(dataset, keys) -> list[int]:
    return [round((dataset[k]["pixel_values"][0, 0, 0].item() + 1) * 127.5) for k in keys]


# --- digits and MNIST -----------------------------------------------------------------------------------------------


def test_digits_have_fixed_splits_and_range():
    dataset = open_images("digits")
    item = dataset[3]
    assert (len(dataset), dataset.num_classes) == (1437, 10)
    assert item["pixel_values"].shape == (1, 8, 8)
    assert item["pixel_values"].dtype == torch.float32
    assert (item["class_labels"].shape, item["class_labels"].dtype) == ((), torch.int64)
    train, validation, everything = (load_digits(split) for split in ("train", "validation", "all"))
    assert len(validation[0]) == 360
    assert torch.equal(torch.cat([train[0], validation[0]]), everything[0])
    assert torch.equal(torch.cat([train[1], validation[1]]), everything[1])
    assert (everything[0].min(), everything[0].max()) == (-1, 1)
    # Pinned: another numpy or scikit-learn must not move digits from one split to the other.
    assert train[1][:10].tolist() == [6, 6, 6, 2, 5, 6, 6, 2, 2, 1]
    assert validation[1][:10].tolist() == [0, 8, 8, 9, 8, 3, 7, 5, 0, 6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset_name": "cifar"}, "`dataset_name` must be one of digits, mnist"),
        ({"dataset_name": "digits", "split": "test"}, "`split` of the digits"),
        ({"dataset_name": "digits", "image_size": 16}, "8x8"),
        ({"dataset_name": "mnist", "horizontal_flip": True}, "mirrored digit"),
        ({"dataset_name": "mnist", "split": "all"}, "`split` of MNIST"),
        ({"dataset_name": "imagefolder"}, "`path` must be given"),
        ({"dataset_name": "imagefolder", "path": "/nowhere/at/all"}, "not a folder"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        open_images(**arguments)


def write_idx(path, array: np.ndarray) -> None:
    data = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def mnist(tmp_path):
    images = np.arange(5 * 28 * 28).reshape(5, 28, 28).astype(np.uint8)
    write_idx(tmp_path / "train-images-idx3-ubyte", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.arange(5, dtype=np.uint8))
    write_idx(tmp_path / "t10k-images.idx3-ubyte.gz", images[:2])
    write_idx(tmp_path / "t10k-labels.idx1-ubyte", np.array([7, 8], np.uint8))
    return tmp_path


def test_mnist_from_idx_files(mnist):
    train, validation = (open_images("mnist", path=mnist, split=split) for split in ("train", "validation"))
    assert (len(train), len(validation), train.num_classes) == (5, 2, 10)
    pixels = (np.arange(28 * 28) + 784).reshape(1, 28, 28) % 256 / 127.5 - 1
    np.testing.assert_allclose(train[1]["pixel_values"].numpy(), pixels, atol=1e-6)
    assert [validation[i]["class_labels"].item() for i in range(2)] == [7, 8]
    padded = open_images("mnist", path=mnist, image_size=32)[1]["pixel_values"]
    assert padded.shape == (1, 32, 32)
    assert torch.equal(padded[:, 2:-2, 2:-2], train[1]["pixel_values"])
    assert (padded[:, :2] == -1).all()
    with pytest.raises(ValueError, match="28 or 32, got 64"):
        open_images("mnist", path=mnist, image_size=64)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not an IDX file"),
        (b"\0\0\x0d\3" + bytes(12), "is not an IDX file"),
        (b"\0\0\x08\3" + bytes(7), "ends in the header"),
        (struct.pack(">BBBB3I", 0, 0, 8, 3, 5, 28, 28) + bytes(100), "needs 3920 bytes, it has 100"),
        (struct.pack(">BBBB3I", 0, 0, 8, 3, *[2**32 - 1] * 3) + bytes(100), "is damaged"),
        (struct.pack(">BBBB3I", 0, 0, 8, 3, 5, 2, 2) + bytes(20), "does not hold MNIST"),
    ],
)
def test_damaged_idx_file_is_named(mnist, data, message):
    (mnist / "train-images-idx3-ubyte").write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        open_images("mnist", path=mnist)
    assert "\n" not in str(caught.value)


def test_damaged_and_missing_idx_gz(mnist):
    file = mnist / "train-labels-idx1-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-6])
    with pytest.raises(ValueError, match=r"labels-idx1-ubyte.gz is damaged"):
        open_images("mnist", path=mnist)
    file.unlink()
    with pytest.raises(ValueError, match=r"no train-labels-idx1-ubyte \(or .gz\)"):
        open_images("mnist", path=mnist)


# --- image folders --------------------------------------------------------------------------------------------------


def test_folder_classes_sizes_and_range(folder):
    dataset = open_images("imagefolder", path=folder, split="all", image_size=16)
    assert (len(dataset), dataset.num_classes) == (30, 3)
    item = dataset[0]
    assert (item["pixel_values"].shape, item["pixel_values"].dtype) == ((3, 16, 16), torch.float32)
    assert (item["pixel_values"][1] == -1).all()
    assert (item["pixel_values"][2] == 1).all()
    assert sorted(reds(dataset, range(30))) == list(range(30))
    names = [dataset.source.name(row) for row in range(30)]
    assert names == sorted(names)  # and not as the disk happens to list them
    for k, red in enumerate(reds(dataset, range(30))):
        assert dataset[k]["class_labels"].item() == red // 10
    assert open_images("imagefolder", path=folder, split="all")[0]["pixel_values"].shape == (3, 20, 24)
    with pytest.raises(IndexError):
        dataset[30]


def test_hash_split_is_disjoint_stable_and_about_five_percent(folder):
    for i in range(300):
        Image.new("RGB", (4, 4)).save(folder / "eel" / f"more{i}.png")
    names = {}
    for split in ("train", "validation", "all"):
        dataset = open_images("imagefolder", path=folder, split=split)
        assert dataset.num_classes == 3
        names[split] = {dataset.source.name(row) for row in range(len(dataset))}
    assert not names["train"] & names["validation"]
    assert names["train"] | names["validation"] == names["all"]
    assert 5 <= len(names["validation"]) <= 30
    for i in range(0, 300, 2):
        (folder / "eel" / f"more{i}.png").unlink()
    fewer = open_images("imagefolder", path=folder, split="validation")
    assert {fewer.source.name(row) for row in range(len(fewer))} <= names["validation"]


def test_split_folders(tmp_path):
    for split, name in [("train", "a"), ("train", "b"), ("validation", "b")]:
        (tmp_path / split / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / split / name / "x.png")
    train, validation = (open_images("imagefolder", path=tmp_path, split=split) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (2, 1)
    assert (validation.num_classes, validation[0]["class_labels"].item()) == (2, 1)
    with pytest.raises(ValueError, match="`split` must be one of"):
        open_images("imagefolder", path=tmp_path, split="test")
    # A class may be called "train" too.
    (tmp_path / "bus").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "bus" / "x.png")
    assert open_images("imagefolder", path=tmp_path, split="all").num_classes == 3


def test_folder_without_classes_and_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="no images for split 'train'"):
        open_images("imagefolder", path=tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    dataset = open_images("imagefolder", path=tmp_path, split="all")
    assert (dataset.num_classes, dataset[0]["class_labels"].item()) == (None, 0)


# --- one picture ----------------------------------------------------------------------------------------------------


def test_exif_orientation_is_applied(tmp_path):
    upright = gradient(40, 24)
    exif = Image.Exif()
    exif[274] = 6  # "turn by 90 degrees clockwise to show"
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    for name, options in {"a.jpg": {"quality": 95}, "a.png": {}, "a.webp": {"lossless": True}, "a.tif": {}}.items():
        decoded = decode_image(saved(tmp_path, turned, name, exif=exif, **options))
        assert decoded.size == (40, 24), name
        assert np.abs(np.asarray(decoded).astype(int) - np.asarray(upright)).max() < 12, name


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    levels = np.linspace(0, 65535, 64).astype(np.uint16)
    ramp = np.tile(levels, (32, 1))
    for name in ("ramp.png", "ramp.tif", "ramp.pgm"):
        decoded = np.asarray(decode_image(saved(tmp_path, Image.fromarray(ramp), name)))
        assert decoded.shape == (32, 64, 3)
        assert np.abs(decoded[0, :, 0] - levels / 257).max() <= 0.51, name


def test_alpha_is_laid_over_white(tmp_path):
    rgba = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    rgba.putpixel((0, 0), (200, 0, 0, 255))
    rgba.putpixel((1, 0), (200, 0, 0, 128))
    decoded = decode_image(saved(tmp_path, rgba, "a.png"))
    assert decoded.getpixel((5, 5)) == (255, 255, 255)
    assert decoded.getpixel((0, 0)) == (200, 0, 0)
    assert abs(decoded.getpixel((1, 0))[1] - 127) <= 1
    grey = Image.new("LA", (8, 8), (10, 0))
    assert decode_image(saved(tmp_path, grey, "la.png")).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 9, 99, 199])
    assert decode_image(saved(tmp_path, palette, "p.png")).getpixel((0, 0)) == (9, 99, 199)
    assert decode_image(saved(tmp_path, palette, "pt.png", transparency=1)).getpixel((0, 0)) == (255, 255, 255)


def test_cmyk_grey_bilevel_and_animation(tmp_path):
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    decoded = decode_image(saved(tmp_path, red.convert("CMYK"), "cmyk.jpg", quality=95))
    assert decoded.mode == "RGB"
    assert np.abs(np.array(decoded.getpixel((8, 8))) - [255, 0, 0]).max() < 8
    assert decode_image(saved(tmp_path, Image.new("L", (8, 8), 77), "l.png")).getpixel((0, 0)) == (77, 77, 77)
    assert decode_image(saved(tmp_path, Image.new("1", (8, 8), 1), "1.png")).getpixel((0, 0)) == (255, 255, 255)
    blue = Image.new("RGB", (16, 16), (0, 0, 255))
    for name in ("a.gif", "a.webp", "a.png"):
        data = saved(tmp_path, red, name, save_all=True, append_images=[blue])
        assert np.abs(np.array(decode_image(data).getpixel((8, 8))) - [255, 0, 0]).max() < 8, name


def test_resize_keeps_the_shorter_side_and_cuts_the_centre(tmp_path):
    data = saved(tmp_path, gradient(300, 100), "wide.png")
    square = np.asarray(decode_image(data, 50)).astype(int)
    assert square.shape == (50, 50, 3)
    assert 83 <= square[25, 0, 0] <= 90  # a third of the way
    assert 165 <= square[25, -1, 0] <= 172  # two thirds
    assert square[0, 25, 1] < 5
    assert square[-1, 25, 1] > 250
    # Antialiased: a fine checkerboard becomes grey instead of a random pick of its fields.
    board = Image.fromarray((np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8))
    small = np.asarray(decode_image(saved(tmp_path, board, "board.png"), 16))
    assert np.abs(small[2:-2, 2:-2].astype(int) - 127).max() < 8
    assert decode_image(data, 200).size == (200, 200)


def test_large_jpeg_decodes_to_what_the_full_decode_gives(tmp_path):
    stripes = np.arange(640) // 8 % 2 * 128 + 64  # 8 pixels wide: two in the result
    picture = Image.fromarray(np.broadcast_to(stripes[None, :, None], (640, 640, 3)).astype(np.uint8))
    full = np.asarray(picture.resize((160, 160), Image.Resampling.LANCZOS)).astype(int)
    decoded = np.asarray(decode_image(saved(tmp_path, picture, "large.jpg", quality=95), 160))
    assert np.abs(decoded - full).mean() <= 4
    assert np.ptp(decoded) > 120


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_samples_without_a_range_are_refused(tmp_path, dtype):
    with pytest.raises(ValueError, match="no defined range"):
        decode_image(saved(tmp_path, Image.fromarray(np.full((8, 8), 70000, dtype)), "x.tif"))


# --- flips ----------------------------------------------------------------------------------------------------------


def test_flips_depend_on_the_key_alone(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(4):
        gradient(16, 16).save(tmp_path / "a" / f"{i}.png")
    plain = open_images("imagefolder", path=tmp_path, split="all", image_size=16)
    flipping = open_images("imagefolder", path=tmp_path, split="all", image_size=16, horizontal_flip=True)
    again = open_images("imagefolder", path=tmp_path, split="all", image_size=16, horizontal_flip=True)
    original = plain[0]["pixel_values"]
    mirrored = []
    for epoch in range(30):
        torch.manual_seed(epoch)  # must not matter
        item = flipping[key(0, epoch)]["pixel_values"]
        torch.rand(3)
        assert torch.equal(item, again[key(0, epoch)]["pixel_values"])
        mirrored.append(torch.equal(item, original.flip(-1)))
        assert mirrored[-1] or torch.equal(item, original)
    assert 5 < sum(mirrored) < 25


# --- quarantine -----------------------------------------------------------------------------------------------------


def bomb() -> bytes:
    """A PNG of 18 kB that unpacks to 12,000 x 12,000 pixels: Pillow itself only warns."""
    data = io.BytesIO()
    Image.new("1", (12000, 12000)).save(data, "PNG")
    return data.getvalue()


def spoil(folder) -> dict[str, str]:
    """Damage some pictures in six ways; returns the reason expected for each."""
    whole = (folder / "cat" / "0.png").read_bytes()
    files = {
        "cat/2.png": (b"", "empty"),
        "cat/4.png": (whole[: len(whole) // 2], "truncated|broken PNG|Truncated"),
        "dog/0.png": (b"<html>404 not found</html>", "not an image of a known format"),
        "dog/deep/1.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known format"),
        "eel/8.png": (bomb(), "DecompressionBombError: 12000x12000 pixels"),
        "eel/deep/9.png": (whole[:40] + b"\xff" * 9 + whole[49:], "broken PNG|cannot|not an image"),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    return {str(folder / name): reason for name, (_, reason) in files.items()}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_pictures_are_listed_and_replaced(folder, tmp_path, workers):
    expected = spoil(folder)
    listed = tmp_path / "run" / "quarantine.jsonl"
    dataset = open_images(
        "imagefolder", path=folder, split="all", image_size=8, max_bad_fraction=0.2, quarantine_path=listed
    )
    good = [row for row in range(30) if dataset.source.name(row) not in expected]
    colours = dict(zip(good, reds(dataset, good), strict=True))
    answers = [next(r % 30 for r in range(row, row + 30) if r % 30 in good) for row in range(30)]
    for _ in range(2):
        batches = list(DataLoader(dataset, batch_size=4, num_workers=workers))
        pixels = torch.cat([batch["pixel_values"] for batch in batches])
        labels = torch.cat([batch["class_labels"] for batch in batches])
        assert [round((red.item() + 1) * 127.5) for red in pixels[:, 0, 0, 0]] == [colours[row] for row in answers]
        assert labels.tolist() == [colours[row] // 10 for row in answers]
    entries = [json.loads(line) for line in listed.read_text().splitlines()]
    assert {entry["path"] for entry in entries} == set(expected)
    if not workers:
        assert len(entries) == len(expected)
    for entry in entries:
        assert re.search(expected[entry["path"]], entry["reason"]), entry


def test_rows_are_counted_while_other_workers_set_them():
    """The rows are in shared memory: what another worker sets between two looks must not trouble a count."""

    class Rows(list):
        name = "row {}".format

    quarantine = Quarantine(Rows(range(2_000_000)), max_bad_fraction=1.0, path=None)
    shared, finished = quarantine._bad.numpy(), threading.Event()

    def set_and_clear() -> None:
        while not finished.is_set():
            shared[::97] ^= True

    other = threading.Thread(target=set_and_clear)
    other.start()
    try:
        for row in range(20):
            quarantine.add(row, "unreadable")
    finally:
        finished.set()
        other.join()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("with_file", [True, False])
def test_too_many_bad_pictures_stop_the_run(folder, tmp_path, workers, with_file):
    spoil(folder)
    listed = tmp_path / "quarantine.jsonl" if with_file else None
    dataset = open_images(
        "imagefolder", path=folder, split="all", image_size=8, max_bad_fraction=0.19, quarantine_path=listed
    )
    message = r"6 of 30 images are unreadable, `max_bad_fraction` 0.19 allows 5"
    with pytest.raises(DataQualityError, match=message + (".*quarantine.jsonl" if with_file else "")):
        list(DataLoader(dataset, batch_size=4, num_workers=workers))


def test_the_list_of_an_earlier_session_counts_once(folder, tmp_path):
    listed = tmp_path / "quarantine.jsonl"
    options = {"path": folder, "split": "all", "image_size": 8, "quarantine_path": listed}
    (folder / "cat" / "2.png").write_bytes(b"")
    (folder / "eel" / "2.png").write_bytes(b"")
    for _ in range(3):  # the same two files again
        dataset = open_images("imagefolder", max_bad_fraction=2 / 30, **options)
        reds(dataset, range(30))
    assert len(listed.read_text().splitlines()) == 2
    with listed.open("a") as file:  # a line about some other dataset, a torn one, nonsense
        file.write('{"path": "elsewhere.png", "row": 3, "reason": "?"}\n{"path": "\n[1]\n')
    (folder / "cat" / "4.png").write_bytes(b"")
    dataset = open_images("imagefolder", max_bad_fraction=2 / 30, **options)
    with pytest.raises(DataQualityError, match="3 of 30"):
        dataset[next(row for row in range(30) if dataset.source.name(row).endswith("cat/4.png"))]


def test_a_line_that_another_process_is_writing_is_read_when_it_is_whole(folder, tmp_path):
    listed = tmp_path / "quarantine.jsonl"
    dataset = open_images("imagefolder", path=folder, split="all", max_bad_fraction=1 / 30, quarantine_path=listed)
    line = json.dumps({"path": dataset.source.name(3), "row": 3, "reason": "?"}) + "\n"
    listed.write_text(line[:20])
    dataset.quarantine._read_list()
    listed.write_text(line)
    with pytest.raises(DataQualityError, match="2 of 30"):
        dataset.quarantine.add(7, "?")


def test_nothing_readable_ends(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(3):
        (tmp_path / "a" / f"{i}.png").write_bytes(b"")
    with pytest.raises(DataQualityError, match="none of the 3 images"):
        open_images("imagefolder", path=tmp_path, split="all", max_bad_fraction=1.0)[0]
    with pytest.raises(ValueError, match="`max_bad_fraction` must be in"):
        open_images("imagefolder", path=tmp_path, split="all", max_bad_fraction=1.5)


def test_a_lack_of_file_handles_is_not_the_pictures_fault(folder):
    resource = pytest.importorskip("resource")
    dataset = open_images("imagefolder", path=folder, split="all", image_size=8)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            dataset[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert 0 not in dataset.quarantine


# --- the datasets library -------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The `datasets` library without a network and with its cache in the test's folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets


@pytest.fixture
def rows(hub, folder):
    label = hub.ClassLabel(names=["cat", "dog", "eel"])
    features = hub.Features(
        {"image": hub.Image(), "label": label, "n": hub.Value("int32"), "text": hub.Value("string")}
    )
    files = [str(folder / name / f"{i}.png") for name in ("cat", "dog", "eel") for i in (0, 2, 4)]
    images = [{"bytes": Path(file).read_bytes(), "path": None} for file in files]
    columns = {"image": images, "label": [0, 0, 0, 1, 1, 1, 2, 2, 2], "n": list(range(9)), "text": ["x"] * 9}
    return hub.Dataset.from_dict(columns, features=features)


def test_parquet_folder(rows, tmp_path):
    (tmp_path / "parquet").mkdir()
    rows.to_parquet(tmp_path / "parquet" / "train-00000.parquet")
    dataset = open_images("hub", path=tmp_path / "parquet", image_size=8, horizontal_flip=True)
    assert (len(dataset), dataset.num_classes) == (9, 3)
    assert dataset[key(4, 0)]["pixel_values"].shape == (3, 8, 8)
    assert reds(dataset, [key(i, 0) for i in range(9)]) == [0, 2, 4, 10, 12, 14, 20, 22, 24]
    assert [dataset[key(i, 0)]["class_labels"].item() for i in range(9)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for column, classes in {"n": 9, None: None}.items():
        assert open_images("hub", path=tmp_path / "parquet", label_column=column).num_classes == classes
    with pytest.raises(ValueError, match=r"`label_column` 'class' is not in .*: its columns are image, label, n, text"):
        open_images("hub", path=tmp_path / "parquet", label_column="class")
    with pytest.raises(ValueError, match=r"`image_column` 'text' of .* not images"):
        open_images("hub", path=tmp_path / "parquet", image_column="text")
    with pytest.raises(ValueError, match=r"`label_column` 'text' of .* not integers"):
        open_images("hub", path=tmp_path / "parquet", label_column="text")
    with pytest.raises(ValueError, match="validation"):
        open_images("hub", path=tmp_path / "parquet", split="validation")


def test_saved_to_disk(rows, hub, tmp_path):
    rows.save_to_disk(tmp_path / "one")
    assert len(open_images("hub", path=tmp_path / "one")) == 9
    with pytest.raises(ValueError, match="its splits are train"):
        open_images("hub", path=tmp_path / "one", split="validation")
    hub.DatasetDict(rows.train_test_split(test_size=3)).save_to_disk(tmp_path / "two")
    assert len(open_images("hub", path=tmp_path / "two", split="test")) == 3
    with pytest.raises(ValueError, match="its splits are train, test"):
        open_images("hub", path=tmp_path / "two", split="validation")


def test_hub_imagefolder_quarantines_by_row(hub, folder, tmp_path):
    for file in folder.glob("*/deep/*.png"):  # `datasets` finds classes at one depth only
        file.rename(file.parent.parent / file.name)
    (folder / "cat" / "4.png").write_bytes(b"not a picture")
    listed = tmp_path / "quarantine.jsonl"
    dataset = open_images("hub", path=folder, image_size=8, max_bad_fraction=0.1, quarantine_path=listed)
    assert (len(dataset), dataset.num_classes) == (30, 3)
    batches = list(DataLoader(dataset, batch_size=10, num_workers=2))
    assert sum(len(batch["class_labels"]) for batch in batches) == 30
    (entry,) = map(json.loads, listed.read_text().splitlines())
    assert entry["path"] == f"{folder}/train[{entry['row']}]"


def test_missing_labels_are_refused(hub, rows, tmp_path):
    columns = rows.cast_column("image", hub.Image(decode=False))[:]
    bad = hub.Dataset.from_dict({**columns, "label": [-1] * 9}, features=rows.features)
    bad.save_to_disk(tmp_path / "bad")
    with pytest.raises(ValueError, match="rows without a label"):
        open_images("hub", path=tmp_path / "bad")


def test_mnist_from_the_hub(hub, monkeypatch, tmp_path):
    """ylecun/mnist has grey PNGs in `image`, classes in `label`, splits train and test; here a folder has its name."""
    features = hub.Features({"image": hub.Image(), "label": hub.ClassLabel(num_classes=10)})
    images = [Image.fromarray(np.full((28, 28), 20 * i, np.uint8)) for i in range(4)]
    rows = hub.Dataset.from_dict({"image": images, "label": [3, 1, 4, 1]}, features=features)
    hub.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "ylecun" / "mnist")
    monkeypatch.chdir(tmp_path)
    dataset = open_images("mnist", image_size=32)
    assert dataset[1]["pixel_values"].shape == (1, 32, 32)
    assert dataset[1]["pixel_values"][0, 16, 16].item() == pytest.approx(20 / 127.5 - 1)
    assert [dataset[i]["class_labels"].item() for i in range(4)] == [3, 1, 4, 1]
    assert len(open_images("mnist", split="validation")) == 1
