"""How well a picture shows the layout it was asked for: measures on drawn scenes that need no detector.

Every pixel is read as the nearest of the body colours, the mark colours and the background's greys. The bodies of a
scene differ in colour, so a colour names an object; pixels of a mark belong to the body nearest to them. Pictures are
(H, W, 3) uint8 of the scene's size, rows are per object and carry what they can be grouped by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image
from scipy import ndimage

from data_prep.layouts.procedural import (
    BACKGROUND_TONE,
    BODY_COLOURS,
    MARK_COLOURS,
    TEXTURE_SHADE,
    Identity,
    ProceduralSettings,
    Scene,
    draw_distractors,
    inside,
    local_points,
    mask_box,
    render_amodal_masks,
    render_masks,
    render_reference,
)

BACKGROUND, STRAY = -1, -2  # owners that are no body colour
MARK_REACH = 0.15  # of the picture's side: marks farther from every body belong to none
MIXED = 20  # of 255: colours farther from all that are known are taken for mixtures
MIN_PIXELS = 4  # of an object, to have a box
PERCENTILES = (2, 98)
MIN_SHAPE_IOU, MAX_TEMPLATE = 0.5, 48  # pixels a side in which shapes are compared, or so
GRID = 6
HISTOGRAM_WEIGHT = 0.25
Box = Sequence[float]
Row = dict[str, float]


# --- which object a pixel belongs to --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """Owner of each pixel (H, W): the number of a body colour in `settings.colours`, BACKGROUND or STRAY.

    `marks` (H, W) numbers the mark colours, -1 where a pixel is none.
    """

    owners: np.ndarray
    marks: np.ndarray


def read_colours(picture: np.ndarray, settings: ProceduralSettings) -> Reading:
    """Read a picture (H, W, 3) uint8.

    Where edges are smooth (`settings.supersample` above 1), a mixed colour is read as the nearest pixel that is not.
    """
    bodies = [np.array(BODY_COLOURS[name], np.float32) for name in settings.colours]
    shades = [TEXTURE_SHADE * body for body in bodies] if set(settings.textures) != {"flat"} else []
    palette = np.stack([*bodies, *shades, *(np.array(c, np.float32) for c in MARK_COLOURS.values())])
    pixels = picture.reshape(-1, 3).astype(np.float32)
    distances = (pixels**2).sum(1)[:, None] - 2 * pixels @ palette.T + (palette**2).sum(1)
    spread = settings.background_contrast + 4
    grey = pixels.mean(1, keepdims=True).clip(BACKGROUND_TONE - spread, BACKGROUND_TONE + spread)
    to_grey = ((pixels - grey) ** 2).sum(1)
    nearest, is_grey = distances.argmin(1), to_grey < distances.min(1)
    clear = np.minimum(to_grey, distances.min(1)) <= MIXED**2
    if settings.supersample > 1 and clear.any():
        rows, columns = ndimage.distance_transform_edt(
            ~clear.reshape(picture.shape[:2]), return_distances=False, return_indices=True
        )
        source = (rows * picture.shape[1] + columns).ravel()
        nearest, is_grey = nearest[source], is_grey[source]
    first_mark = len(bodies) + len(shades)
    is_mark = (nearest >= first_mark) & ~is_grey
    owners = np.where(is_grey, BACKGROUND, np.where(is_mark, STRAY, nearest % len(bodies)))
    owners, marks = (x.reshape(picture.shape[:2]) for x in (owners, np.where(is_mark, nearest - first_mark, -1)))
    return Reading(give_marks_away(owners, marks), marks)


def give_marks_away(owners: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """Owners (H, W) with each patch of one mark's colour given to the body that most of its pixels are nearest to."""
    bodies = owners >= 0
    if not bodies.any():
        return owners
    distances, (rows, columns) = ndimage.distance_transform_edt(~bodies, return_indices=True)
    nearest, owners = owners[rows, columns], owners.copy()
    for colour in np.unique(marks[marks >= 0]):
        patches, count = ndimage.label(marks == colour)
        votes = np.zeros((count + 1, nearest.max() + 1))
        np.add.at(votes, (patches, nearest), 1)
        given = (patches > 0) & (distances <= MARK_REACH * len(owners))
        owners[given] = votes.argmax(1)[patches[given]]
    return owners


def owned_masks(reading: Reading, scene: Scene, settings: ProceduralSettings) -> np.ndarray:
    """The pixels that belong to each object's colour, (N, H, W) bool."""
    return np.stack([reading.owners == settings.colours.index(each.colour) for each in scene.objects])


# --- each object in its box -----------------------------------------------------------------------------------------


def measure_objects(picture: np.ndarray, scene: Scene, settings: ProceduralSettings) -> list[Row]:
    """One row for each object of a scene.

    `colour_accuracy` is the share of its visible pixels that belong to its colour; `mask_iou` that of all pixels of
    its colour with its visible mask; `box_iou` that of their box with the box of its visible mask; `lgs50` the same
    with 0 below a half; `shape_accuracy` whether its own shape fits best; `overlap_accuracy` the share of the pixels
    where it hides others that belong to its colour (NaN where it hides none). `num_objects`, `visible`, `overlapped`
    (it touches another), `nearer` (it hides another and nothing hides it) and `is_foreground` are the scene's.

    Raises:
        ValueError: the picture is not of the scene's size.
    """
    check_size(picture, scene)
    owned = owned_masks(read_colours(picture, settings), scene, settings)
    visible, amodal = render_masks(scene), render_amodal_masks(scene)
    rows = []
    for i, each in enumerate(scene.objects):
        others = np.delete(np.arange(len(amodal)), i)
        farther = [j for j in others if scene.objects[j].z_order < each.z_order]
        hidden = visible[i] & amodal[farther].any(0)
        touches = bool((amodal[i] & amodal[others].any(0)).any())
        found = percentile_box(owned[i])
        iou = box_iou(found, mask_box(visible[i])) if found else 0.0
        rows.append(
            {
                "colour_accuracy": share(owned[i], visible[i]),
                "mask_iou": mask_iou(owned[i], visible[i]),
                "box_iou": iou,
                "lgs50": iou if iou >= 0.5 else 0.0,
                "shape_accuracy": float(best_shape(owned, i, found, scene, settings) == each.shape),
                "overlap_accuracy": share(owned[i], hidden) if hidden.any() else float("nan"),
                "num_objects": len(scene.objects),
                "visible": each.visible,
                "overlapped": float(touches),
                "nearer": float(bool(hidden.any()) and bool((visible[i] == amodal[i]).all())),
                "is_foreground": float(each.is_foreground),
            }
        )
    return rows


def check_size(picture: np.ndarray, scene: Scene) -> None:
    """ValueError for a picture that is not one of the scene."""
    if picture.shape != (scene.image_size, scene.image_size, 3) or picture.dtype != np.uint8:
        raise ValueError(
            f"`picture` must be uint8 of ({scene.image_size}, {scene.image_size}, 3), "
            f"got {picture.dtype} of {picture.shape}"
        )


def share(part: np.ndarray, whole: np.ndarray) -> float:
    """The fraction of the mask `whole` that lies in `part`."""
    return float((part & whole).sum() / max(1, whole.sum()))


def mask_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Of two masks; 0 where both are empty."""
    return float((a & b).sum() / max(1, (a | b).sum()))


def percentile_box(mask: np.ndarray) -> tuple[float, float, float, float] | None:
    """The box between the 2nd and 98th percentiles of a mask's pixels, so that strays do not count; None if too few."""
    rows, columns = np.nonzero(mask)
    if len(rows) < MIN_PIXELS:
        return None
    (y1, y2), (x1, x2) = (np.percentile(i, PERCENTILES, method="nearest") for i in (rows, columns))
    height, width = mask.shape
    return float(x1 / width), float(y1 / height), float((x2 + 1) / width), float((y2 + 1) / height)


def box_iou(a: Box, b: Box) -> float:
    """Of two boxes (x1, y1, x2, y2)."""
    overlap = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return overlap / (sum(areas) - overlap)


def best_shape(
    owned: np.ndarray, index: int, found: Box | None, scene: Scene, settings: ProceduralSettings
) -> str | None:
    """The shape that fits an object's pixels best; None if none does or two do equally well.

    Shapes are laid into the box asked for and, where that overlaps it by half, into the box found. Pixels of the
    scene's other objects say nothing: they may hide it.
    """
    each = scene.objects[index]
    places = [(each.centre, each.side)]
    if found and box_iou(found, each.box) >= 0.5:
        side = max(found[2] - found[0], found[3] - found[1])
        places.append((((found[0] + found[2]) / 2, (found[1] + found[3]) / 2), side))
    looked_at = ~np.delete(owned, index, 0).any(0)
    scores = dict.fromkeys(settings.shapes, 0.0)
    for centre, side in places:
        rows, columns = (
            i[:: max(1, round(side * len(looked_at) / MAX_TEMPLATE))] for i in around(centre, side, looked_at)
        )
        part = np.ix_(rows, columns)
        u, v = local_points(columns + 0.5, rows + 0.5, centre, side, 0.0, len(looked_at))
        for shape in scores:
            iou = mask_iou(owned[index][part] & looked_at[part], inside(shape, u, v) & looked_at[part])
            scores[shape] = max(scores[shape], iou)
    first, second = sorted(scores, key=scores.__getitem__, reverse=True)[:2]
    return first if scores[first] >= MIN_SHAPE_IOU and scores[first] > scores[second] else None


def around(centre: tuple[float, float], side: float, picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows and columns of a picture within a square, and a quarter of its side around it."""
    size = len(picture)
    bounds = [((c - 0.75 * side) * size, (c + 0.75 * side) * size) for c in reversed(centre)]
    return tuple(np.arange(max(0, int(low)), min(size, int(np.ceil(high)))) for low, high in bounds)


# --- the rest of the picture ----------------------------------------------------------------------------------------


def inside_boxes(scene: Scene) -> np.ndarray:
    """The pixels that any box touches, (H, W) bool."""
    masks = [box_mask(each.box, scene.image_size) for each in scene.objects]
    return np.any(masks, axis=0) if masks else np.zeros((scene.image_size, scene.image_size), bool)


def box_mask(box: Box, size: int) -> np.ndarray:
    """The pixels that a box touches, (size, size) bool."""
    mask = np.zeros((size, size), bool)
    x1, y1 = (int(np.floor(x * size + 1e-4)) for x in box[:2])
    x2, y2 = (int(np.ceil(x * size - 1e-4)) for x in box[2:])
    mask[y1:y2, x1:x2] = True
    return mask


def background_accuracy(picture: np.ndarray, scene: Scene, settings: ProceduralSettings) -> float:
    """The share of the pixels outside all boxes that are background; NaN where the boxes fill the picture."""
    check_size(picture, scene)
    outside = ~inside_boxes(scene)
    if not outside.any():
        return float("nan")
    return share(read_colours(picture, settings).owners == BACKGROUND, outside)


def outside_drift(first: np.ndarray, second: np.ndarray, scene: Scene) -> tuple[float, float]:
    """Mean absolute change (of 255) outside all boxes and inside them, between two pictures of one layout and noise.

    `drift_ratio` sums them up over many scenes. NaN for a part of no pixels.
    """
    check_size(first, scene)
    check_size(second, scene)
    change = np.abs(first.astype(np.float64) - second).mean(2)
    inside = inside_boxes(scene)
    return tuple(float(change[part].mean()) if part.any() else float("nan") for part in (~inside, inside))


def drift_ratio(drifts: Iterable[tuple[float, float]]) -> float:
    """The change outside as a part of that inside, over all scenes; NaN where nothing changed inside."""
    outside, inside = np.nanmean(np.array(list(drifts)), axis=0)
    return float(outside / inside) if inside > 0 else float("nan")


# --- swapped prompts ------------------------------------------------------------------------------------------------


def swap_pairs(scene: Scene) -> list[tuple[int, int]]:
    """The pairs of objects whose boxes overlap by less than a quarter of the smaller one."""
    pairs = []
    for i in range(len(scene.objects)):
        for j in range(i):
            a, b = (box_mask(scene.objects[k].box, scene.image_size) for k in (j, i))
            if (a & b).sum() < 0.25 * min(a.sum(), b.sum()):
                pairs.append((j, i))
    return pairs


def swap_objects(scene: Scene, first: int, second: int) -> Scene:
    """The scene with two objects in each other's place: what each box asks for is exchanged, the caption stays."""
    objects = list(scene.objects)
    for here, there in ((first, second), (second, first)):
        given = scene.objects[there]
        objects[here] = replace(scene.objects[here], identity=given.identity, phrase_span=given.phrase_span)
    swapped = replace(scene, objects=tuple(objects))
    masks, visible = render_amodal_masks(swapped), render_masks(swapped)
    boxes = [replace(each, box=mask_box(mask)) for each, mask in zip(objects, masks, strict=True)]
    objects = [
        replace(each, visible=round(share(seen, mask), 4))
        for each, mask, seen in zip(boxes, masks, visible, strict=True)
    ]
    return replace(swapped, objects=tuple(objects))


def colours_swapped(
    picture: np.ndarray, swapped: np.ndarray, scene: Scene, first: int, second: int, settings: ProceduralSettings
) -> bool:
    """Whether each of two boxes shows its own colour in one picture and the other's in the one with swapped prompts.

    Of the two colours, the one with more pixels in the part of a box that is not the other's counts; at least
    `MIN_PIXELS`.
    """
    boxes = [box_mask(scene.objects[i].box, scene.image_size) for i in (first, second)]
    parts = [boxes[0] & ~boxes[1], boxes[1] & ~boxes[0]]
    for shown, wanted in ((picture, (first, second)), (swapped, (second, first))):
        check_size(shown, scene)
        owned = owned_masks(read_colours(shown, settings), scene, settings)
        for part, here, there in zip(parts, wanted, reversed(wanted), strict=True):
            count = (owned[here] & part).sum()
            if count < MIN_PIXELS or count <= (owned[there] & part).sum():
                return False
    return True


# --- identities -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Description:
    """What an object of a known colour looks like, without a network.

    Attributes:
        colours: mean colour of the object's pixels in each cell of a grid over its box, (GRID, GRID, 3) in 0..1.
        weights: the share of each cell that belongs to the object, (GRID, GRID).
        histogram: the share of each mark colour among the object's pixels, (8,).
    """

    colours: np.ndarray
    weights: np.ndarray
    histogram: np.ndarray


def describe(picture: np.ndarray, box: Box, colour: str, settings: ProceduralSettings) -> Description:
    """The description of the object of a colour in a box; of marks, all that are near its body count as its own."""
    reading = read_colours(picture, settings)
    body = (reading.owners == settings.colours.index(colour)) & (reading.marks < 0)
    near = ndimage.distance_transform_edt(~body) <= MARK_REACH * len(picture) if body.any() else body
    owned = (body | (near & (reading.marks >= 0))) & box_mask(box, len(picture))
    counts = np.bincount(reading.marks[owned & (reading.marks >= 0)], minlength=len(MARK_COLOURS))
    layers = np.concatenate([owned[..., None], owned[..., None] * (picture / np.float32(255))], axis=2)
    place = [x * len(picture) for x in box]
    cells = [
        np.asarray(Image.fromarray(x.astype(np.float32)).resize((GRID, GRID), Image.Resampling.BOX, box=place))
        for x in np.moveaxis(layers, 2, 0)
    ]
    weights = cells[0]
    colours = np.stack(cells[1:], axis=2) / np.maximum(weights, 1e-6)[..., None]
    return Description(colours, weights, counts / max(1, owned.sum()))


def description_distance(a: Description, b: Description) -> float:
    """Mean difference of the cells that both objects show, plus that of the histograms; infinite without such cells."""
    weights = np.minimum(a.weights, b.weights)
    if weights.sum() < 1:
        return float("inf")
    cells = np.abs(a.colours - b.colours).mean(2)
    return float((weights * cells).sum() / weights.sum() + HISTOGRAM_WEIGHT * np.abs(a.histogram - b.histogram).sum())


def identity_retrieval(
    picture: np.ndarray,
    scene: Scene,
    references: Sequence[tuple[np.ndarray, Box] | None],
    settings: ProceduralSettings,
    seed: int = 0,
    num_others: int = 15,
) -> list[float]:
    """Of each object, 1.0 if it is nearer to its own reference than to those of others, else 0.0; NaN without one.

    The others have the same caption, shape and colour and differ in their marks alone, so chance is 1 in 16.

    Args:
        references: picture and box of each object's own reference.
        seed: of the others' references.
    """
    check_size(picture, scene)
    found = []
    for each, reference in zip(scene.objects, references, strict=True):
        if reference is None:
            found.append(float("nan"))
            continue
        ours = describe(picture, each.box, each.colour, settings)
        own = description_distance(ours, describe(*reference, each.colour, settings))
        others = (describe_view(other, seed, settings) for other in draw_distractors(each.identity, seed, num_others))
        found.append(float(all(own < description_distance(ours, other) for other in others)))
    return found


@cache
def describe_view(identity: Identity, seed: int, settings: ProceduralSettings) -> Description:
    """The description of a reference drawn for an identity."""
    return describe(*render_reference(identity, seed, settings), identity.colour, settings)


def cosine_similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each row of a with that of b, (N, F) each -> (N,): DINO-I and CLIP-I of crops and their references."""
    a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True).clip(1e-12) for x in (a, b))
    return (a * b).sum(-1)


def leakage(crops: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Mean cosine of each crop with the references of the *other* objects of its scene, (N, F) each -> (N,).

    NaN for the only object of a scene.
    """
    count = len(crops)
    if count < 2:
        return np.full(count, np.nan)
    cosines = np.stack([cosine_similarity(crops, np.roll(references, -k, axis=0)) for k in range(1, count)])
    return cosines.mean(0)


# --- alpha, and figures of many rows --------------------------------------------------------------------------------


def alpha_agreement(alpha: np.ndarray, is_foreground: np.ndarray) -> dict[str, float]:
    """How often alpha >= 0.5 says what the data says: of all objects, of the foreground, and of the background.

    Args:
        alpha: (N,) in [0, 1]. is_foreground: (N,) bool.

    Returns:
        `alpha_agreement`, `alpha_agreement_foreground`, `alpha_agreement_background`; NaN for a class of no objects.
    """
    is_foreground = np.asarray(is_foreground, bool)
    right = (np.asarray(alpha) >= 0.5) == is_foreground
    parts = {"": np.ones_like(right), "_foreground": is_foreground, "_background": ~is_foreground}
    means = {name: float(right[part].mean()) if part.any() else float("nan") for name, part in parts.items()}
    return {f"alpha_agreement{name}": value for name, value in means.items()}


def mean_of(rows: Sequence[Row], key: str, where: Callable[[Row], bool] = lambda row: True) -> float:
    """The mean of a key over the rows that `where` chooses, without NaNs; NaN where none is left."""
    values = np.array([row[key] for row in rows if where(row)], np.float64)
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")


def paired_gain(after: Sequence[float], before: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean of the differences of pairs and its 95 % interval, by 2,000 bootstrap samples; NaNs are left out.

    Raises:
        ValueError: the two differ in length, or no pair is left.
    """
    if len(after) != len(before):
        raise ValueError(f"`after` and `before` must be pairs, got {len(after)} and {len(before)} numbers")
    differences = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    differences = differences[~np.isnan(differences)]
    if not len(differences):
        raise ValueError("`after` and `before` have no pair of numbers without a NaN")
    draws = np.random.default_rng(seed).integers(len(differences), size=(2000, len(differences)))
    low, high = np.percentile(differences[draws].mean(1), (2.5, 97.5))
    return float(differences.mean()), float(low), float(high)
