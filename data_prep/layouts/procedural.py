"""Drawn scenes whose every pixel is known: flat shapes in boxes, captions, and other views of the same objects.

An identity is a shape, a colour, a texture and a mark. Captions name all but the mark, so only a reference can tell it.
A fifth of the identities, chosen by a hash, is held out: training scenes never show them, other scenes nothing else.
Lengths and places are fractions of the picture, boxes (x1, y1, x2, y2), x to the right and y downwards.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Self

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pydantic import Field, model_validator
from scipy import ndimage

from backlot.config import Section

CAPTION_VERSION = 1
# Corners and centres of faces of the RGB cube: no two of the first six, the marks' and the background's grey are nearer
# than 105 of 255, so that a picture's colours can be read with a nearest-colour rule.
BODY_COLOURS = {
    "red": (240, 0, 0),
    "green": (0, 190, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 240, 0),
    "magenta": (255, 0, 255),
    "cyan": (0, 255, 255),
    "orange": (255, 140, 0),
    "brown": (115, 55, 10),
    "navy": (0, 0, 110),
    "maroon": (120, 0, 40),
    "violet": (140, 40, 230),
    "lime": (170, 245, 20),
}
MARK_COLOURS = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "olive": (128, 128, 0),
    "purple": (128, 0, 128),
    "teal": (0, 128, 128),
    "salmon": (255, 128, 128),
    "mint": (128, 255, 128),
    "periwinkle": (128, 128, 255),
}
BACKGROUND_TONE = 188
MARK_PATTERNS = ("dot", "horizontal", "vertical", "base")
NUM_MARKS = len(MARK_COLOURS) * len(MARK_PATTERNS)
TEXTURES = ("flat", "striped", "dotted", "checkered")
BACKGROUNDS = ("gradient", "noise", "stripes")
PLAIN_SHAPES = ("square", "disc", "triangle", "cross", "star", "ring", "house", "arrow")
GLYPHS = tuple(f"letter {c}" for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ") + tuple(f"number {c}" for c in "0123456789")
SHAPES = PLAIN_SHAPES + GLYPHS
TEXTURE_SHADE = 0.65
HELD_OUT_SHARE = 5  # one in so many
FOREGROUND, BACKGROUND = 0.58, 0.42  # of the nearness
MIN_PART_VISIBLE = 0.5  # of an object's mark and of the rest of it, each
MAX_MARK_SHARE = 0.5  # of an object
PLAN_SIZE = 64  # pixels a side in which overlaps are judged, at most
REFERENCE_SIDE, REFERENCE_TURN = (0.5, 0.8), 8.0  # of the picture; degrees either way
TRIES = 40  # places for an object, before the scene is begun anew
FINE_GRID = (np.arange(101) - 50) / 50.5
SCENES, DISTRACTORS, REFERENCES = range(3)  # streams of random numbers of one seed


class ProceduralSettings(Section):
    """What drawn scenes look like; the defaults are those of the `full` preset."""

    image_size: int = Field(512, ge=16)
    """Side of the square picture in pixels."""
    supersample: int = Field(2, ge=1, le=8)
    """Points a side that a pixel is the mean of; 1 gives hard edges and no mixed colours."""
    min_objects: int = Field(1, ge=1, le=8)
    """Objects of a scene, at least."""
    max_objects: int = Field(8, ge=1, le=8)
    """Objects of a scene, at most."""
    shapes: tuple[str, ...] = SHAPES
    """Shapes to draw from; all letters and numbers together are as frequent as one other shape."""
    colours: tuple[str, ...] = tuple(BODY_COLOURS)
    """Body colours to draw from; those of a scene differ."""
    textures: tuple[str, ...] = TEXTURES
    """Textures to draw from."""
    backgrounds: tuple[str, ...] = BACKGROUNDS
    """Kinds of background to draw from."""
    background_contrast: float = Field(14, ge=0, le=16)
    """How far a background departs from its mean tone, of 255."""
    min_side: float = Field(0.06, gt=0, lt=1)
    """Shortest side of an object; sides are log-uniform."""
    max_side: float = Field(0.5, gt=0, lt=1)
    """Longest side of an object."""
    grid: int = Field(1, ge=1)
    """Pixels that corners and sides of objects are multiples of."""
    min_visible: float = Field(0.4, gt=0, le=1)
    """Least fraction of an object that nearer ones may leave visible."""
    short_captions: bool = False
    """Captions that list the objects and nothing else."""

    @model_validator(mode="after")
    def check(self) -> Self:
        """Known names, and ranges the right way round."""
        for name, known in {
            "shapes": SHAPES,
            "colours": tuple(BODY_COLOURS),
            "textures": TEXTURES,
            "backgrounds": BACKGROUNDS,
        }.items():
            values = getattr(self, name)
            if not values or not set(values) <= set(known) or len(set(values)) < len(values):
                raise ValueError(f"`{name}` must name one or more of {', '.join(known)}, each once, got {values}")
        for low, high in (("min_objects", "max_objects"), ("min_side", "max_side")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"`{low}` must be at most `{high}`, got {getattr(self, low)}, {getattr(self, high)}")
        if self.max_objects > len(self.colours):
            raise ValueError(f"`max_objects` must be at most the number of colours, {len(self.colours)}")
        if round(self.min_side * self.image_size) < 8:
            raise ValueError(f"`min_side` must be at least 8 pixels, that is {8 / self.image_size:g}")
        return self

    @classmethod
    def preset(cls, name: str, **overrides: object) -> ProceduralSettings:
        """`full`, for real models, or `demo`: two to four objects with hard edges in 32 pixels a side.

        Raises:
            ValueError: an unknown preset.
        """
        if name not in PRESETS:
            raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**(PRESETS[name] | overrides))


PRESETS: dict[str, dict] = {
    "full": {},
    "demo": {
        "image_size": 32,
        "supersample": 1,
        "min_objects": 2,
        "max_objects": 4,
        "shapes": ("square", "disc", "triangle", "cross"),
        "colours": ("red", "green", "blue", "yellow", "magenta", "cyan"),
        "textures": ("flat",),
        "backgrounds": ("gradient",),
        "background_contrast": 6,
        # corners on the grid of tokens (of 2 x 2 latents of 2 x 2 pixels): a small network learns edges in minutes
        "grid": 4,
        "min_side": 0.37,
        "max_side": 0.53,
        "min_visible": 0.5,
        "short_captions": True,
    },
}


# --- identities -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """What stays the same of an object from view to view; `mark` counts colours first, then patterns."""

    shape: str
    colour: str
    texture: str
    mark: int

    @property
    def mark_colour(self) -> str:
        return tuple(MARK_COLOURS)[self.mark % len(MARK_COLOURS)]

    @property
    def mark_pattern(self) -> str:
        return MARK_PATTERNS[self.mark // len(MARK_COLOURS)]

    @property
    def caption(self) -> str:
        """All but the mark: "a red disc", "a striped orange letter K"."""
        words = f"{'' if self.texture == 'flat' else self.texture + ' '}{self.colour} {self.shape}"
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"

    def with_mark(self, mark: int) -> Identity:
        """The identity that only its mark tells from this one."""
        return Identity(self.shape, self.colour, self.texture, mark)


@cache
def is_held_out(identity: Identity) -> bool:
    """Whether training scenes never show it."""
    name = f"{identity.shape}/{identity.colour}/{identity.texture}/{identity.mark}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % HELD_OUT_SHARE == 0


def all_identities(settings: ProceduralSettings, held_out: bool | None = None) -> list[Identity]:
    """Every identity that scenes can show: those held out, those not, or (None) both."""
    parts = itertools.product(settings.shapes, settings.colours, settings.textures, range(NUM_MARKS))
    identities = (Identity(*each) for each in parts)
    return [each for each in identities if held_out is None or is_held_out(each) == held_out]


def draw_distractors(identity: Identity, seed: int, count: int = 15) -> list[Identity]:
    """Identities of the same caption that differ from this one, and from one another, in their marks only."""
    others = [mark for mark in range(NUM_MARKS) if mark != identity.mark]
    marks = np.random.default_rng([seed, DISTRACTORS, identity.mark]).choice(others, count, replace=False)
    return [identity.with_mark(int(mark)) for mark in marks]


def draw_identity(rng: np.random.Generator, settings: ProceduralSettings, colour: str, held_out: bool) -> Identity:
    """One of this colour, held out or not, whose mark leaves most of the body to be seen."""
    plain = [shape for shape in settings.shapes if shape not in GLYPHS]
    glyphs = [shape for shape in settings.shapes if shape in GLYPHS]
    kinds = [*([shape] for shape in plain), *([glyphs] if glyphs else [])]
    while True:
        kind = kinds[rng.integers(len(kinds))]
        shape = kind[rng.integers(len(kind))]
        texture = settings.textures[rng.integers(len(settings.textures))]
        identity = Identity(shape, colour, texture, int(rng.integers(NUM_MARKS)))
        if is_held_out(identity) == held_out and mark_share(shape, identity.mark_pattern) <= MAX_MARK_SHARE:
            return identity


# --- shapes, textures and marks: functions of u (right) and v (down), the object's square is [-1, 1] x [-1, 1] -------


def in_star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Five points, one of them up."""
    corner, notch = 1.0, 0.45
    angle = np.mod(np.arctan2(u, -v), 2 * math.pi / 5)
    angle = np.minimum(angle, 2 * math.pi / 5 - angle)
    x, y = np.hypot(u, v) * np.cos(angle), np.hypot(u, v) * np.sin(angle)
    inner_x, inner_y = notch * math.cos(math.pi / 5), notch * math.sin(math.pi / 5)
    return (x - corner) * inner_y + y * (corner - inner_x) <= 0


def in_triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Its tip up."""
    return (np.abs(u) <= (v + 1) / 2) & (v <= 1)


def in_rectangle(u: np.ndarray, v: np.ndarray, x: float = 1, top: float = -1, bottom: float = 1) -> np.ndarray:
    """|u| up to x, v from top to bottom."""
    return (np.abs(u) <= x) & (v >= top) & (v <= bottom)


INSIDE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "square": in_rectangle,
    "disc": lambda u, v: u * u + v * v <= 1,
    "triangle": in_triangle,
    "cross": lambda u, v: in_rectangle(u, v, 0.39) | in_rectangle(v, u, 0.39),
    "star": in_star,
    "ring": lambda u, v: (u * u + v * v <= 1) & (u * u + v * v >= 0.2),
    "house": lambda u, v: in_rectangle(u, v, 0.75, 0.0) | in_triangle(u, 2 * v + 1),
    "arrow": lambda u, v: in_rectangle(u, v, 0.35, 0.0) | in_triangle(u, 2 * v + 1),
}


@cache
def glyph_bitmap(character: str) -> np.ndarray:
    """A character of Pillow's built-in font in a square just large enough, (S, S) bool."""
    font = ImageFont.load_default(size=160)
    picture = Image.new("L", (256, 256))
    ImageDraw.Draw(picture).text((128, 128), character, fill=255, font=font, anchor="mm", stroke_width=6)
    glyph = np.asarray(picture.crop(picture.getbbox())) > 127
    side = max(glyph.shape)
    top, left = (side - glyph.shape[0]) // 2, (side - glyph.shape[1]) // 2
    square = np.zeros((side, side), bool)
    square[top : top + glyph.shape[0], left : left + glyph.shape[1]] = glyph
    return square


def inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which points belong to a shape."""
    if shape in INSIDE:
        return INSIDE[shape](u, v)
    bitmap = glyph_bitmap(shape[-1])
    rows, columns = (np.floor((x + 1) / 2 * len(bitmap)).astype(int) for x in (v, u))
    within = (np.abs(u) < 1) & (np.abs(v) < 1)
    return within & bitmap[rows.clip(0, len(bitmap) - 1), columns.clip(0, len(bitmap) - 1)]


@cache
def mark_anchor(shape: str) -> tuple[float, float]:
    """Where a mark is centred: in the middle, or for a shape that is hollow or thin there, where it is thickest."""
    if shape == "triangle":
        return 0.0, 0.12  # where it is wide enough to tell a stripe from a dot, and the base is still apart
    body = np.pad(inside(shape, *np.meshgrid(FINE_GRID, FINE_GRID)), 1)
    depth = ndimage.distance_transform_edt(body)[1:-1, 1:-1] / 50.5
    if depth[50, 50] >= 0.3:
        return 0.0, 0.0
    row, column = np.unravel_index(depth.argmax(), depth.shape)
    return float(FINE_GRID[column]), float(FINE_GRID[row])


@cache
def mark_share(shape: str, pattern: str) -> float:
    """The fraction of a shape that a mark covers."""
    u, v = np.meshgrid(FINE_GRID, FINE_GRID)
    body = inside(shape, u, v)
    return float((body & in_mark(shape, pattern, u, v)).sum() / body.sum())


def in_mark(shape: str, pattern: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which points of an object its mark covers, if they are inside its shape."""
    x, y = mark_anchor(shape)
    match pattern:
        case "dot":
            return (u - x) ** 2 + (v - y) ** 2 <= 0.42**2
        case "horizontal":
            return np.abs(v - y) <= 0.21
        case "vertical":
            return np.abs(u - x) <= 0.21
    return v >= 0.55


def in_texture(texture: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which points of an object are darker."""
    match texture:
        case "striped":
            return np.floor((u + v) * 2.5) % 2 == 1
        case "dotted":
            return ((u * 2.5) % 1 - 0.5) ** 2 + ((v * 2.5) % 1 - 0.5) ** 2 < 0.08
        case "checkered":
            return (np.floor(u * 2.5) + np.floor(v * 2.5)) % 2 == 1
    return np.zeros(u.shape, bool)


# --- scenes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SceneObject:
    """An object of a scene.

    Attributes:
        centre, side: of its square, fractions of the picture.
        z_order: 0 is farthest; nearer objects hide farther ones.
        box: of all of it, hidden or not.
        phrase_span: characters [start, end) of its caption within the scene's.
        depth_label: foreground, midground or background.
        visible: the fraction of it that no nearer object hides.
    """

    identity: Identity
    centre: tuple[float, float]
    side: float
    z_order: int
    box: tuple[float, float, float, float]
    phrase_span: tuple[int, int]
    depth_label: str
    visible: float

    @property
    def shape(self) -> str:
        return self.identity.shape

    @property
    def colour(self) -> str:
        return self.identity.colour

    @property
    def caption(self) -> str:
        return self.identity.caption

    @property
    def is_foreground(self) -> bool:
        return self.depth_label == "foreground"


@dataclass(frozen=True)
class BackgroundLook:
    """A grey background: its mean tone and how far it departs from that (0..255), a direction and a seed."""

    kind: str
    tone: float
    amplitude: float
    angle: float
    seed: int


@dataclass(frozen=True)
class Scene:
    """Objects before a background, as `render` draws them."""

    image_size: int
    supersample: int
    background: BackgroundLook
    objects: tuple[SceneObject, ...]
    global_caption: str

    def to_caption(
        self, image_id: str, image_path: str, references: Sequence[tuple[str, Sequence[float]] | None] | None = None
    ) -> dict:
        """The caption file of the layout format, with the scene itself under `procedural`.

        Args:
            image_id, image_path: of the scene's picture.
            references: path and box (0..1) of each object's reference, None where it has none.
        """
        references = references or [None] * len(self.objects)
        objects = [
            {
                "object_id": number,
                "category_name": each.shape,
                "caption": each.caption,
                "bbox": list(each.box),
                "depth_label": each.depth_label,
                "is_foreground": each.is_foreground,
                "z_order": each.z_order,
                "phrase_span": list(each.phrase_span),
                "mask_path": None,
                "reference": reference and {"image_path": reference[0], "bbox": [float(x) for x in reference[1]]},
            }
            for number, (each, reference) in enumerate(zip(self.objects, references, strict=True))
        ]
        return {
            "version": CAPTION_VERSION,
            "image_id": image_id,
            "image_path": image_path,
            "width": self.image_size,
            "height": self.image_size,
            "global_caption": self.global_caption,
            "objects": objects,
            "procedural": asdict(self),
        }

    @classmethod
    def from_caption(cls, caption: dict) -> Scene:
        """The scene that a caption file was made of.

        Raises:
            ValueError: the caption is not of a drawn scene.
        """
        values = caption.get("procedural")
        if values is None:
            raise ValueError(f"{caption.get('image_id')!r} is not a drawn scene: its caption has no `procedural`")
        objects = tuple(
            SceneObject(
                **each
                | {"identity": Identity(**each["identity"])}
                | {name: tuple(each[name]) for name in ("centre", "box", "phrase_span")}
            )
            for each in values["objects"]
        )
        return cls(**values | {"background": BackgroundLook(**values["background"]), "objects": objects})


@dataclass(frozen=True)
class Placed:
    """An identity at a place, and the pixels (PLAN, PLAN) of it and of its mark."""

    identity: Identity
    centre: tuple[float, float]
    side: float
    nearness: float
    pixels: np.ndarray
    mark: np.ndarray


def draw_scene(seed: int, settings: ProceduralSettings, held_out: bool = False) -> Scene:
    """The scene of a seed, always the same one.

    Args:
        held_out: show held-out identities only, otherwise only the others.
    """
    rng = np.random.default_rng([seed, SCENES, 1 + int(held_out)])
    count = int(rng.integers(settings.min_objects, settings.max_objects + 1))
    colours = rng.permutation(settings.colours)[:count]
    identities = [draw_identity(rng, settings, str(colour), held_out) for colour in colours]
    look = draw_background(rng, settings)
    placed = place_objects(rng, settings, identities)
    caption, spans = write_caption(identities, look, settings)
    nearness = [each.nearness for each in placed]
    order = np.argsort(nearness, kind="stable")
    ranks, visible = np.argsort(order), visible_fractions(placed)
    objects = tuple(
        SceneObject(
            each.identity,
            each.centre,
            each.side,
            int(ranks[i]),
            tight_box(each.identity, each.centre, each.side, 0.0, settings),
            spans[i],
            depth_label(each.nearness),
            round(visible[i][0], 4),
        )
        for i, each in enumerate(placed)
    )
    return Scene(settings.image_size, settings.supersample, look, objects, caption)


def write_caption(
    identities: Sequence[Identity], look: BackgroundLook, settings: ProceduralSettings
) -> tuple[str, list[tuple[int, int]]]:
    """The scene's caption, and where in it each object's stands."""
    text, spans = "" if settings.short_captions else "a scene with ", []
    for i, identity in enumerate(identities):
        if i:
            text += " and " if i == len(identities) - 1 else ", "
        spans.append((len(text), len(text) + len(identity.caption)))
        text += identity.caption
    if not settings.short_captions:
        text += {"gradient": " on a grey gradient", "noise": " on grey noise", "stripes": " on grey stripes"}[look.kind]
    return text, spans


def draw_background(rng: np.random.Generator, settings: ProceduralSettings) -> BackgroundLook:
    """Of one of the kinds, in any direction."""
    kind = settings.backgrounds[rng.integers(len(settings.backgrounds))]
    angle, seed = float(rng.uniform(0, 2 * math.pi)), int(rng.integers(2**31))
    return BackgroundLook(kind, BACKGROUND_TONE + float(rng.uniform(-4, 4)), settings.background_contrast, angle, seed)


def place_objects(
    rng: np.random.Generator, settings: ProceduralSettings, identities: Sequence[Identity]
) -> list[Placed]:
    """A place for each, so that enough of all objects and of their marks can be seen; begun anew until it works."""
    placed: list[Placed] = []
    while len(placed) < len(identities):
        for _ in range(TRIES):
            more = [*placed, place_one(rng, settings, identities[len(placed)])]
            if all(a >= settings.min_visible and b >= MIN_PART_VISIBLE for a, b in visible_fractions(more)):
                placed = more
                break
        else:
            placed = []
    return placed


def place_one(rng: np.random.Generator, settings: ProceduralSettings, identity: Identity) -> Placed:
    """A place and a size on whole pixels, anywhere within the picture."""
    size, grid = settings.image_size, settings.grid
    low, high = math.log(settings.min_side), math.log(settings.max_side)
    log_side = rng.uniform(low, high)
    pixels = min(max(1, round(math.exp(log_side) * size / grid)), size // grid) * grid
    left, top = (int(x) * grid for x in rng.integers(0, (size - pixels) // grid + 1, 2))
    centre, side = ((left + pixels / 2) / size, (top + pixels / 2) / size), pixels / size
    relative = (log_side - low) / (high - low) if high > low else 0.5
    plan = min(size, PLAN_SIZE)
    u, v = local_points(np.arange(plan) + 0.5, np.arange(plan) + 0.5, centre, side, 0.0, plan)
    body = inside(identity.shape, u, v)
    mark = body & in_mark(identity.shape, identity.mark_pattern, u, v)
    return Placed(identity, centre, side, 0.5 * relative + 0.5 * (top + pixels) / size, body, mark)


def visible_fractions(placed: Sequence[Placed]) -> list[tuple[float, float]]:
    """Of each object, how much no nearer one hides: of all of it, and of its mark or the rest, whichever is less."""
    fractions: list[tuple[float, float]] = [(0.0, 0.0)] * len(placed)
    hidden = np.zeros_like(placed[0].pixels)
    for i in sorted(range(len(placed)), key=lambda i: -placed[i].nearness):
        pixels, mark = placed[i].pixels, placed[i].mark
        whole, *parts = (float((x & ~hidden).sum() / max(1, x.sum())) for x in (pixels, mark, pixels & ~mark))
        fractions[i] = whole, min(parts)
        hidden = hidden | pixels
    return fractions


def depth_label(nearness: float) -> str:
    """Larger and lower is nearer: of 0 (small, at the top) to 1 (large, at the bottom)."""
    return "foreground" if nearness >= FOREGROUND else "background" if nearness < BACKGROUND else "midground"


# --- pictures -------------------------------------------------------------------------------------------------------


def local_points(
    x: np.ndarray, y: np.ndarray, centre: tuple[float, float], side: float, angle: float, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """An object's u and v, each (H, W), at the pixel coordinates x (W,) and y (H,) of a picture of `size`."""
    du = (x[None] / size - centre[0]) / (side / 2)
    dv = (y[:, None] / size - centre[1]) / (side / 2)
    cos, sin = math.cos(angle), math.sin(angle)
    return cos * du + sin * dv, cos * dv - sin * du


def window(centre: tuple[float, float], side: float, angle: float, size: int) -> tuple[slice, slice]:
    """Rows and columns of a picture of `size` that hold an object's square."""
    reach = side / 2 * (abs(math.cos(angle)) + abs(math.sin(angle)))
    bounds = [(math.floor((c - reach) * size), math.ceil((c + reach) * size)) for c in reversed(centre)]
    return tuple(slice(max(0, low), min(size, high)) for low, high in bounds)


def object_points(
    centre: tuple[float, float], side: float, angle: float, size: int
) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
    """The window of an object and its u and v at the middles of the window's pixels."""
    rows, columns = window(centre, side, angle, size)
    x, y = np.arange(columns.start, columns.stop) + 0.5, np.arange(rows.start, rows.stop) + 0.5
    return (rows, columns), *local_points(x, y, centre, side, angle, size)


def paint(canvas: np.ndarray, identity: Identity, centre: tuple[float, float], side: float, angle: float = 0.0) -> None:
    """Lay an object over a canvas (H, W, 3) float32."""
    place, u, v = object_points(centre, side, angle, len(canvas))
    body = inside(identity.shape, u, v)
    colour = np.array(BODY_COLOURS[identity.colour], np.float32)
    pixels = np.where(in_texture(identity.texture, u, v)[..., None], TEXTURE_SHADE * colour, colour)
    pixels[in_mark(identity.shape, identity.mark_pattern, u, v)] = MARK_COLOURS[identity.mark_colour]
    canvas[place][body] = pixels[body]


def paint_background(look: BackgroundLook, size: int) -> np.ndarray:
    """(size, size, 3) float32 in 0..255."""
    steps = (np.arange(size) + 0.5) / size * 2 - 1
    along = math.cos(look.angle) * steps[None] + math.sin(look.angle) * steps[:, None]
    match look.kind:
        case "gradient":
            wave = along
        case "noise":
            coarse = np.random.default_rng(look.seed).uniform(-1, 1, (16, 16))
            wave = ndimage.zoom(coarse, size / 16, order=1, mode="nearest", grid_mode=True)
        case _:
            wave = np.sign(np.sin(along * 12))
    tones = (look.tone + look.amplitude * wave.clip(-1, 1)).astype(np.float32)
    return np.repeat(tones[..., None], 3, axis=2)


def shrink(values: np.ndarray, factor: int) -> np.ndarray:
    """Means over squares of `factor` values a side, (H f, W f, ...) -> (H, W, ...)."""
    if factor == 1:
        return values
    height, width = values.shape[0] // factor, values.shape[1] // factor
    return values.reshape(height, factor, width, factor, *values.shape[2:]).mean((1, 3))


def render(scene: Scene) -> np.ndarray:
    """The picture of a scene, (H, W, 3) uint8."""
    canvas = paint_background(scene.background, scene.image_size * scene.supersample)
    for each in sorted(scene.objects, key=lambda each: each.z_order):
        paint(canvas, each.identity, each.centre, each.side)
    return shrink(canvas, scene.supersample).round().clip(0, 255).astype(np.uint8)


def render_amodal_masks(scene: Scene) -> np.ndarray:
    """All of each object, hidden or not, (N, H, W) bool."""
    size = scene.image_size
    masks = np.zeros((len(scene.objects), size, size), bool)
    for mask, each in zip(masks, scene.objects, strict=True):
        mask[:] = object_mask(each.shape, each.centre, each.side, 0.0, size, scene.supersample)
    return masks


def render_masks(scene: Scene) -> np.ndarray:
    """What can be seen of each object, (N, H, W) bool."""
    masks = render_amodal_masks(scene)
    hidden = np.zeros(masks.shape[1:], bool)
    for i in sorted(range(len(masks)), key=lambda i: -scene.objects[i].z_order):
        masks[i], hidden = masks[i] & ~hidden, hidden | masks[i]
    return masks


def object_mask(
    shape: str, centre: tuple[float, float], side: float, angle: float, size: int, supersample: int
) -> np.ndarray:
    """The pixels that a shape covers at least half of, (size, size) bool."""
    covered = np.zeros((size * supersample,) * 2, np.float32)
    place, u, v = object_points(centre, side, angle, len(covered))
    covered[place] = inside(shape, u, v)
    return shrink(covered, supersample) >= 0.5


def tight_box(
    identity: Identity, centre: tuple[float, float], side: float, angle: float, settings: ProceduralSettings
) -> tuple[float, float, float, float]:
    """The box around all pixels of an object."""
    size = settings.image_size
    return mask_box(object_mask(identity.shape, centre, side, angle, size, settings.supersample))


def mask_box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """The box around a mask (H, W) that is not empty, in fractions of the picture."""
    (y1, y2), (x1, x2) = ((int(i[0]), int(i[-1]) + 1) for i in (np.flatnonzero(mask.any(axis)) for axis in (1, 0)))
    height, width = mask.shape
    return x1 / width, y1 / height, x2 / width, y2 / height


def render_reference(
    identity: Identity, seed: int, settings: ProceduralSettings
) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """Another view of an identity: alone, of another size, a little turned, before another background.

    Returns:
        The picture (H, W, 3) uint8 and the object's box.
    """
    rng = np.random.default_rng([seed, REFERENCES, identity.mark])
    look = draw_background(rng, settings)
    side, angle = rng.uniform(*REFERENCE_SIDE), math.radians(rng.uniform(-REFERENCE_TURN, REFERENCE_TURN))
    reach = side / 2 * (math.cos(angle) + abs(math.sin(angle)))
    centre = tuple(float(x) for x in rng.uniform(reach, 1 - reach, 2))
    canvas = paint_background(look, settings.image_size * settings.supersample)
    paint(canvas, identity, centre, side, angle)
    picture = shrink(canvas, settings.supersample).round().clip(0, 255).astype(np.uint8)
    return picture, tight_box(identity, centre, side, angle, settings)
