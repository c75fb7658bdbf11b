"""Small synthetic shadow data: discs that cast a displaced, blurred disc. Written as a folder or as tars."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

FOLDERS = {"image": "objects", "mask": "masks", "shadow": "shadows"}


def make_samples(
    num_objects: int = 6, lights: int = 2, image_size: int = 32, seed: int = 0, object_ids: bool = True
) -> dict[str, dict]:
    """{stem: {"image" (H, W, 3) uint8, "mask" (H, W) uint8, "shadow" (H, W) in [0, 1], "metadata"}}."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:image_size, :image_size] / image_size
    samples = {}
    for number in range(num_objects):
        radius, colour = random.uniform(0.1, 0.2), random.uniform(0, 255, 3)
        inside = (x - 0.5) ** 2 + (y - 0.5) ** 2 < radius**2
        texture = colour * random.uniform(0.7, 1, (image_size, image_size, 1))  # no two sides alike
        image = np.where(inside[..., None], texture, 127.5).round().astype(np.uint8)
        for light in range(lights):
            theta, phi, size = random.uniform(0, 45), random.uniform(0, 360), random.uniform(2, 8)
            length, angle = 0.4 * np.sin(np.radians(theta)), np.radians(phi)
            distance = np.hypot(x - 0.5 + length * np.cos(angle), y - 0.5 - length * np.sin(angle))
            samples[f"{number:03d}_{light}"] = {
                "image": image,
                "mask": np.where(inside, 255, 0).astype(np.uint8),
                "shadow": np.clip((radius - distance) * 40 / size + 0.5, 0, 1),
                "metadata": {
                    "theta": theta,
                    "phi": phi,
                    "size": size,
                    **({"object_id": f"disc-{seed}-{number}"} if object_ids else {}),
                },
            }
    return samples


def encode_png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) or (H, W) uint8; (H, W) uint16 or floats in [0, 1] become 16-bit grey."""
    if pixels.dtype.kind == "f":
        pixels = (pixels * 65535).round().astype(np.uint16)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def encode_npy(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def encode_sample(sample: dict) -> dict[str, bytes]:
    """Members of a tar by suffix."""
    pictures = {f"{kind}.png": encode_png(sample[kind]) for kind in FOLDERS}
    return {**pictures, "metadata.json": json.dumps(sample["metadata"]).encode()}


def save_folder(path: str | Path, samples: dict[str, dict]) -> Path:
    path = Path(path)
    for kind, folder in FOLDERS.items():
        (path / folder).mkdir(parents=True, exist_ok=True)
        for stem, sample in samples.items():
            (path / folder / f"{stem}.png").write_bytes(encode_png(sample[kind]))
    (path / "metadata.json").write_text(json.dumps({stem: sample["metadata"] for stem, sample in samples.items()}))
    return path


def save_members(path: str | Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar with these members in this order."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return Path(path)


def save_tar(path: str | Path, samples: dict[str, dict]) -> Path:
    files = {stem: encode_sample(sample) for stem, sample in samples.items()}
    return save_members(path, [(f"{s}.{suffix}", data) for s, kinds in files.items() for suffix, data in kinds.items()])


def write_folder(path: str | Path, **options) -> Path:
    """Write `make_samples(**options)` in the folder format."""
    return save_folder(path, make_samples(**options))


def write_tar(path: str | Path, prefix: str = "", **options) -> Path:
    """Write `make_samples(**options)` as one tar; `prefix` goes before every stem."""
    return save_tar(path, {prefix + stem: sample for stem, sample in make_samples(**options).items()})


# --- ways to be bad: (what to do to a sample's files in a folder, what is said about it) ---


def _edit_metadata(**changes) -> Callable[[Path, str], None]:
    """Change entries of a stem's metadata; None takes one away."""

    def edit(folder: Path, stem: str) -> None:
        path = folder / "metadata.json"
        metadata = json.loads(path.read_text())
        metadata[stem] = {key: value for key, value in {**metadata[stem], **changes}.items() if value is not None}
        path.write_text(json.dumps(metadata))

    return edit


def _replace_metadata(value: object) -> Callable[[Path, str], None]:
    def edit(folder: Path, stem: str) -> None:
        metadata = json.loads((folder / "metadata.json").read_text())
        metadata = {key: entry for key, entry in {**metadata, stem: value}.items() if entry is not None}
        (folder / "metadata.json").write_text(json.dumps(metadata))

    return edit


def _remove(kind: str) -> Callable[[Path, str], None]:
    return lambda folder, stem: (folder / kind / f"{stem}.png").unlink()


def _write(kind: str, data: bytes, suffix: str = ".png") -> Callable[[Path, str], None]:
    def edit(folder: Path, stem: str) -> None:
        (folder / kind / f"{stem}.png").unlink()
        (folder / kind / f"{stem}{suffix}").write_bytes(data)

    return edit


def _truncate(kind: str) -> Callable[[Path, str], None]:
    def edit(folder: Path, stem: str) -> None:
        path = folder / kind / f"{stem}.png"
        path.write_bytes(path.read_bytes()[:-60])

    return edit


def _grey(values: np.ndarray) -> bytes:
    return encode_png(np.asarray(values, np.uint8))


_RAMP = np.linspace(0, 255, 32).repeat(32).reshape(32, 32)
_GREEN = np.stack([_RAMP, _RAMP.T, _RAMP], axis=-1).astype(np.uint8)
_BLUE = np.stack([_RAMP, _RAMP, _RAMP.T], axis=-1).astype(np.uint8)
_GLASS = np.stack([_RAMP] * 4, axis=-1).astype(np.uint8)
_NAN = np.where(np.eye(32), np.nan, 0.5).astype(np.float32)
_HALF = np.full((32, 32), 0.5, np.float32)

FAULTS: dict[str, tuple[Callable[[Path, str], None], str]] = {
    "no object": (_remove("objects"), r"objects/STEM.png missing"),
    "no mask": (_remove("masks"), r"masks/STEM.png missing"),
    "no shadow": (_remove("shadows"), r"shadows/STEM.png missing"),
    "no entry": (_replace_metadata(None), r"it is not in metadata.json"),
    "entry a list": (_replace_metadata([1, 2]), r"its metadata must be a JSON object"),
    "no theta": (_edit_metadata(theta=None), r"`theta` is missing from its metadata"),
    "no phi": (_edit_metadata(phi=None), r"`phi` is missing from its metadata"),
    "no size": (_edit_metadata(size=None), r"its metadata has no `size`"),
    "radius for size": (_edit_metadata(size=None, r=4), r"its metadata has no `size`"),
    "theta 46": (_edit_metadata(theta=46), r"`theta` of its metadata must be in \[0, 45\], got 46"),
    "theta -1": (_edit_metadata(theta=-1), r"`theta` of its metadata must be in \[0, 45\], got -1"),
    "size 1": (_edit_metadata(size=1), r"`size` of its metadata must be in \[2, 8\], got 1"),
    "s 9": (_edit_metadata(size=None, s=9), r"`s` of its metadata must be in \[2, 8\], got 9"),
    "two sizes": (_edit_metadata(size=3, light_size=4), r"its metadata gives several sizes: `size` 3, `light_size` 4"),
    "theta text": (_edit_metadata(theta="30"), r"`theta` of its metadata must be a valid number, got '30'"),
    "theta bool": (_edit_metadata(theta=True), r"`theta` of its metadata must be a valid number, got True"),
    "phi nan": (_edit_metadata(phi=float("nan")), r"`phi` of its metadata must be a finite number, got nan"),
    "phi infinite": (_edit_metadata(phi=float("inf")), r"`phi` of its metadata must be a finite number, got inf"),
    "phi huge": (_edit_metadata(phi=10**400), r"`phi` of its metadata must be a valid number, got 1000"),
    "object_id bool": (_edit_metadata(object_id=True), r"`object_id` of its metadata must be a valid string, got True"),
    "clipped text": (_edit_metadata(clipped="no"), r"`clipped` of its metadata must be a valid boolean, got 'no'"),
    "other size": (_write("shadows", _grey(np.zeros((16, 32)))), r"differ in size: object 32x32, .*shadow 32x16"),
    "empty mask": (_write("masks", _grey(0 * _RAMP)), r"its mask is empty"),
    "green shadow": (_write("shadows", encode_png(_GREEN)), r"its shadow has colours"),
    "blue shadow": (_write("shadows", encode_png(_BLUE)), r"its shadow has colours"),
    "shadow with alpha": (_write("shadows", encode_png(_GLASS)), r"its shadow is partly transparent"),
    "npy over 1": (_write("shadows", encode_npy(_HALF * 3), ".npy"), r"must lie in \[0, 1\], .*1.5 to 1.5"),
    "npy under 0": (_write("shadows", encode_npy(_HALF - 1), ".npy"), r"must lie in \[0, 1\], .*-0.5 to -0.5"),
    "npy nan": (_write("shadows", encode_npy(_NAN), ".npy"), r"must lie in \[0, 1\], .*nan to nan"),
    "npy bytes": (
        _write("shadows", encode_npy(np.eye(32, dtype=np.uint8)), ".npy"),
        r"must be an npy file of \(H, W\) floats, .*u1",
    ),
    "npy cut": (
        _write("shadows", encode_npy(_HALF)[:-4], ".npy"),
        r"its shadow is unreadable \(4092 bytes of values, 4096 wanted\)",
    ),
    "npy objects": (
        _write("shadows", encode_npy(np.array([[{}]])), ".npy"),
        r"must be an npy file of \(H, W\) floats, .*O",
    ),
    "cut object": (_truncate("objects"), r"its object is unreadable \("),
    "cut mask": (_truncate("masks"), r"its mask is unreadable \("),
    "cut shadow": (_truncate("shadows"), r"its shadow is unreadable \("),
    "no picture": (_write("objects", b"GIF89a"), r"its object is not a PNG or JPEG or WEBP picture"),
    "nothing": (_write("masks", b""), r"its mask is not a PNG picture"),
    "two shadows": (
        lambda folder, stem: (folder / "shadows" / f"{stem}.npy").write_bytes(encode_npy(_HALF)),
        r"it has several shadows: STEM.npy, STEM.png",
    ),
}
