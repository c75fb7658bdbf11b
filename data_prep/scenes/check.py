"""Name every bad scene of a folder, and tell what the good ones are like.

The format is described in `data_prep/scenes/format.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from backlot.latent_cache import vae_fingerprint
from backlot.loading import default_device
from backlot.modalities import WIDTHS
from data_prep.scenes.encode import find_splits, occupancy, open_vae
from data_prep.scenes.format import (
    METADATA_NAME,
    SPLITS,
    Scene,
    bad_scene,
    count_objects,
    examine_scene,
    find_file,
    read_scene,
    scene_ids,
)
from pipelines.shortcut_scene import rotation_matrix

ORTHONORMAL_TOLERANCE = 1e-3
SIZE_RANGE = (1e-3, 1e2)
FLOOR_TOLERANCE = 0.01
MIN_IOU = 0.5
DECODE_CHUNK = 16
BAR_WIDTH = 40


# --- what is wrong --------------------------------------------------------------------------------------------------


def verify(
    root: str | Path,
    vae: str | Path | None = None,
    device: str | torch.device | None = None,
    report: Callable[[str], None] = print,
) -> list[str]:
    """All that is wrong with the scenes of all splits, one line each; empty if they can be trained on.

    `root` may also be the folder of a single scene.

    Args:
        vae: folder of the `OccupancyVAE` that encoded them: latents are decoded and compared with the occupancy.
        device: where it runs; None for the accelerator if there is one.
        report: is told the mean IoU of each split.

    Raises:
        ValueError: `vae` is no such folder.
    """
    root, problems = Path(root), []
    if not root.is_dir():
        return [f"{root} does not exist"]
    folders, decoder = {}, None if vae is None else Decoder(vae, device)
    if (root / METADATA_NAME).is_file() or find_file(root, "latents") or find_file(root, "shapes"):
        folders[root.name] = [root]
    else:
        for split in SPLITS:
            if split == "test" and not (root / split).is_dir():
                continue
            try:
                names = Counter(scene_ids(root, split))
            except ValueError as error:
                problems.append(str(error))
                continue
            folders[split] = [root / split / name for name in names]
            problems += [
                str(bad_scene(root / split / x, "scenes.txt names it twice")) for x, n in names.items() if n > 1
            ]
    is_encoded = any(find_file(folder, "latents") for group in folders.values() for folder in group)
    usual: dict[str, tuple[str, object]] = {}
    for split, group in folders.items():
        overlaps: list[float] = []
        for folder in tqdm(group, desc=f"verify {split}", unit="scene", leave=False, disable=None):
            found = check_folder(folder, is_encoded, usual, decoder, overlaps)
            problems += [str(bad_scene(folder, reason)) for reason in dict.fromkeys(found)]
        if decoder is not None:
            mean = f"mean IoU {np.mean(overlaps):.4f} of {len(overlaps)} objects" if overlaps else "nothing to decode"
            report(f"{split}: {mean}")
    return problems


def check_folder(
    folder: Path,
    is_encoded: bool,
    usual: dict[str, tuple[str, object]],
    decoder: Decoder | None = None,
    overlaps: list[float] | None = None,
) -> list[str]:
    """What is wrong with a scene, without its name.

    Args:
        is_encoded: it must have latents.
        usual: what all scenes have in common, and of which scene that is known; this one's is added.
        decoder: compares shapes that are good with the occupancy; the IoU of each object is added to `overlaps`.
    """
    if not folder.is_dir():
        return ["its folder is missing"]
    kinds = [kind for kind in ("shapes", "latents") if find_file(folder, kind)]
    found = [] if kinds else ["neither latents nor shapes are there"]
    if kinds and is_encoded and "latents" not in kinds:
        found.append("it has no latents, other scenes have")
    scenes, good = {}, {}
    for kind in kinds:
        scene, problems = examine_scene(folder, kind, conditionals=kind == kinds[-1])
        found += problems
        if scene is not None:
            scenes[kind] = scene
            if not problems:
                good[kind] = scene
    counts = {kind: count_objects(scene.tensors) for kind, scene in scenes.items()}
    if None not in counts.values() and len(set(counts.values())) > 1:
        found.append(f"latents have {counts['latents']} objects, shapes {counts['shapes']}")
    for kind, scene in good.items():
        found += check_poses(scene, good.get("shapes"))
        found += check_common(folder, describe(kind, scene), usual)
    if decoder is not None and len(good) == 2:
        found += decoder.check(good["shapes"], good["latents"], overlaps)
    return found


def check_poses(scene: Scene, shapes: Scene | None) -> list[str]:
    """Rotations that are none, sizes out of range, and objects that reach below the floor.

    `shapes` tell how far a rotated object really reaches down, where its box reaches below the floor.
    """
    problems = []
    six, size = scene.tensors["6drotation_normalized"][:, 0].double(), scene.tensors["scale"][:, 0].double().exp()
    first, second = six[:, :3], six[:, 3:]
    errors = torch.stack([first.norm(dim=1) - 1, second.norm(dim=1) - 1, (first * second).sum(1)]).abs().amax(0)
    for number, error in enumerate(errors.tolist()):
        if error > ORTHONORMAL_TOLERANCE:
            reason = f"off by {error:.3g}, {ORTHONORMAL_TOLERANCE:g} is allowed"
            problems.append(f"6drotation_normalized of object {number}: its columns are not orthonormal ({reason})")
    low, high = SIZE_RANGE
    for number, sides in enumerate(size.tolist()):
        if not low <= min(sides) <= max(sides) <= high:
            described = ", ".join(f"{side:.3g}" for side in sides)
            problems.append(f"scale of object {number}: its sides {described} must be in [{low:g}, {high:g}]")
    if problems or scene.metadata.get("frame") != "floor":
        return problems
    for number, bottom in enumerate(bottoms(scene, shapes)):
        if bottom < -FLOOR_TOLERANCE:
            problems.append(f"translation of object {number}: it reaches {-bottom:.3f} below the floor")
    return problems


def bottoms(scene: Scene, shapes: Scene | None) -> list[float]:
    """The height of the lowest point of each object; of its box where that is above the floor or nothing else is known.

    Boxes of objects of isotropic scale have no meaning: without `shapes` their centre stands for them.
    """
    tensors = scene.tensors
    down = (
        rotation_matrix(tensors["6drotation_normalized"][:, 0].double())[:, 2] * tensors["scale"][:, 0].double().exp()
    )
    reach = 0.5 * down.abs().sum(1)
    if scene.metadata.get("isotropic_scale") and shapes is None:
        reach = torch.zeros_like(reach)
    heights = tensors["translation"][:, 0, 2].double()
    lowest = heights - reach
    if shapes is not None and len(shapes.tensors["occupancy"]) == len(lowest):
        resolution = shapes.metadata["resolution"]
        for number in (lowest < -FLOOR_TOLERANCE).nonzero().flatten().tolist():
            cells = occupancy(shapes)[number, 0].nonzero().double()
            # of the centres of its cells; the surface is up to half a cell away, on either side
            centres = ((cells + 0.5) / resolution - 0.5) @ down[number]
            lowest[number] = heights[number] + centres.min() + reach[number] / resolution
    return lowest.tolist()


def describe(kind: str, scene: Scene) -> dict[str, object]:
    """What must be equal in all scenes."""
    metadata = scene.metadata
    common = {
        "frame": metadata.get("frame"),
        "isotropic_scale": bool(metadata.get("isotropic_scale")),
        "number of poses": len(scene.tensors) - 1,
    }
    if kind == "shapes":
        return common | {"resolution": metadata["resolution"]}
    shape = scene.tensors["shape"]
    common |= {"tokens x channels of shape": list(shape.shape[1:]), "VAE": (metadata.get("codec") or {}).get("sha256")}
    image = scene.conditionals.get("image")
    return common | ({} if image is None else {"side of image": image.shape[-1]})


def check_common(folder: Path, described: dict[str, object], usual: dict[str, tuple[str, object]]) -> list[str]:
    problems = []
    for name, value in described.items():
        scene, expected = usual.setdefault(name, (folder.name, value))
        if value != expected:
            problems.append(f"its {name} is {value}, in scene {scene!r} it is {expected}")
    return problems


class Decoder:
    """Compares what a VAE makes of latents with the occupancy that they are of."""

    def __init__(self, folder: str | Path, device: str | torch.device | None = None) -> None:
        self.vae = open_vae(folder, default_device() if device is None else device)
        self.sha256 = vae_fingerprint(folder)

    def check(self, shapes: Scene, latents: Scene, overlaps: list[float]) -> list[str]:
        shape, config = latents.tensors["shape"], self.vae.config
        own = (latents.metadata.get("codec") or {}).get("sha256")
        if own not in (None, self.sha256):
            return [f"its latents are of another VAE ({own[:12]}, not {self.sha256[:12]})"]
        wanted = [self.vae.num_tokens, self.vae.latent_channels]
        if list(shape.shape[1:]) != wanted or shapes.metadata["resolution"] != config.sample_size:
            found = f"{list(shape.shape[1:])} of resolution {shapes.metadata['resolution']}"
            return [f"latents: shape is {found}, the VAE has {wanted} of resolution {config.sample_size}"]
        values = self.overlap(shape, occupancy(shapes)).tolist()
        overlaps += values
        return [
            f"latents: shape of object {number} decodes to an IoU of {value:.3f}, {MIN_IOU:g} is wanted"
            for number, value in enumerate(values)
            if value < MIN_IOU
        ]

    @torch.inference_mode()
    def overlap(self, shape: Tensor, true: Tensor) -> Tensor:
        """Intersection over union (N,) of decoded tokens (N, T, C) with occupancy (N, 1, R, R, R)."""
        parts = [
            self.vae.decode(self.vae.to_latents(z.to(self.vae.device))).sample.cpu() for z in shape.split(DECODE_CHUNK)
        ]
        made = torch.cat(parts) > 0
        both, either = (made & true).flatten(1).sum(1), (made | true).flatten(1).sum(1)
        return both / either


# --- what they are like ---------------------------------------------------------------------------------------------


def print_stats(root: str | Path, report: Callable[[str], None] = print) -> None:
    """Tell how many scenes there are, how many objects they have, and the ranges of their modalities.

    Raises:
        ValueError: there are no scenes, or one is bad.
    """
    for split in find_splits(root):
        for line in describe_split(Path(root), split):
            report(line)


class Range:
    """Least, greatest, mean and standard deviation of the columns of the rows that it is given."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, 0.0, 0.0
        self.low, self.high = torch.tensor(torch.inf), torch.tensor(-torch.inf)

    def update(self, rows: Tensor) -> None:
        rows = rows.double()
        self.count += len(rows)
        self.total, self.squares = self.total + rows.sum(0), self.squares + rows.square().sum(0)
        self.low, self.high = torch.minimum(self.low, rows.amin(0)), torch.maximum(self.high, rows.amax(0))

    def lines(self, name: str) -> Iterator[str]:
        mean = self.total / self.count
        std = (self.squares / self.count - mean.square()).clamp(min=0).sqrt()
        for axis, numbers in enumerate(zip(self.low, self.high, mean, std, strict=True)):
            label = f"{name}[{axis}]" if len(mean) > 1 else name
            yield "  {:26} {:9.4g} to {:<9.4g} mean {:<9.4g} std {:.4g}".format(label, *map(float, numbers))


def describe_split(root: Path, split: str) -> Iterator[str]:
    counts, families, frames, conditions = Counter(), Counter(), Counter(), Counter()
    ranges: dict[str, Range] = {}
    for name in scene_ids(root, split):
        folder = root / split / name
        scene = read_scene(folder, "latents" if find_file(folder, "latents") else "shapes")
        counts[scene.metadata["num_objects"]] += 1
        families.update(map(str, scene.metadata.get("families") or []))
        frames[str(scene.metadata.get("frame"))] += 1
        conditions.update(f"{key} {'x'.join(map(str, value.shape[-2:]))}" for key, value in scene.conditionals.items())
        for key, value in scene.tensors.items():
            if key == "occupancy":
                key, value = "filled share of the grid", occupancy(scene).flatten(1).double().mean(1)
            rows = value[:, 0] if key in WIDTHS else value.flatten()[:, None]
            ranges.setdefault(key, Range()).update(rows)
    total = sum(count * scenes for count, scenes in counts.items())
    yield f"{split}: {sum(counts.values())} scenes, {total} objects"
    for count in range(min(counts), max(counts) + 1):
        bar = "#" * round(BAR_WIDTH * counts[count] / max(counts.values()))
        yield f"  {count:3} objects {counts[count]:7} {bar}".rstrip()
    for name, counter in {"families": families, "frame": frames, "conditionals": conditions}.items():
        if counter:
            yield f"  {name}: " + ", ".join(f"{key} {count}" for key, count in sorted(counter.items()))
    for name in sorted(ranges):
        yield from ranges[name].lines(name)
