"""The scene of the shadow renders in Mitsuba 3: a floor, one square light, a camera, and an object at rest on z = 0.

The shadow map is S = 1 - E_obj / E_empty, the share of the floor's direct irradiance that the object takes away. Both
irradiances are estimated with the same random numbers, so S is exactly 0 where nothing is in the way, lies in [0, 1],
and knows neither the power of the light nor the colour of the floor. The camera of the shadow passes is mirrored at the
floor and sees it from below, through a thin sheet that transmits all light diffusely: so the object casts but never
hides the floor, and the map is also defined underneath it. Only the window that the shadow can reach is rendered.

The picture of the object is lit by a light of its own, see `data_prep/shadows/looks.py`.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import shapely
import trimesh

from data_prep.shadows.looks import Look, box_coordinates, corner_colours, random_look, smooth_normals, texture_picture

LIGHT_DISTANCE = 8.0
FIELD_OF_VIEW = 49.0  # degrees, across the width
FILL = 0.5  # sRGB value where there is no object
LIFT = 1e-3  # a flat base must not coincide with the floor
FLOOR_REACH = 60.0
CORNERS = ((-1, -1), (1, -1), (1, 1), (-1, 1))
BLOCK_SIZE = 32  # left to itself it follows the number of threads, and with it the random numbers
VARIANTS = ("cuda_ad_rgb", "llvm_ad_rgb", "scalar_rgb")
PROBE = """
import sys
import mitsuba as mi
mi.set_variant(sys.argv[1])
film = {"type": "hdrfilm", "width": 4, "height": 4}
sensor = {"type": "perspective", "film": film, "sampler": {"type": "multijitter", "sample_count": 4}}
scene = {"type": "scene", "integrator": {"type": "path"}, "sensor": sensor, "shape": {"type": "sphere"}}
print(mi.render(mi.load_dict({**scene, "light": {"type": "constant"}})).shape)
"""


# --- variants -------------------------------------------------------------------------------------------------------


def variant_works(variant: str) -> bool:
    """Whether Mitsuba renders a few pixels with this variant, tried in a process of its own: a bad LLVM aborts it."""
    command = [sys.executable, "-c", PROBE, variant]
    try:
        return subprocess.run(command, capture_output=True, timeout=120).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def choose_variant(name: str = "auto") -> str:
    """The variant to render with: the named one, or with "auto" the first of `VARIANTS` that works.

    Raises:
        ValueError: it does not work here.
    """
    for variant in VARIANTS if name == "auto" else (name,):
        if variant_works(variant):
            return variant
    raise ValueError(f"Mitsuba does not render with variant {name} here; --variant auto takes one that works")


@functools.cache
def mitsuba(variant: str) -> ModuleType:
    """Mitsuba, imported on first use and set to `variant`."""
    try:
        import mitsuba as mi
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error.name} is missing: pip install 'backlot[render]'", name=error.name) from None
    mi.set_variant(variant)
    mi.set_log_level(mi.LogLevel.Error)
    return mi


def set_threads(count: int) -> None:
    """How many threads this process renders with. The pictures do not depend on it."""
    import drjit

    drjit.set_thread_count(count)


# --- geometry -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Light:
    """A square area light that looks at the origin from distance 8.

    `theta` in [0, 45] degrees from overhead; `phi` in degrees: 0 puts the light to the right (shadow to the left),
    90 behind the object (shadow toward the viewer); `size` is the side of the square in world units.
    """

    theta: float
    phi: float
    size: float

    @property
    def position(self) -> np.ndarray:
        theta, phi = np.radians([self.theta, self.phi])
        return LIGHT_DISTANCE * np.array([np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta)])

    @property
    def up(self) -> np.ndarray:
        """The direction of one side of the square; it stays smooth at theta = 0."""
        theta, phi = np.radians([self.theta, self.phi])
        return np.array([-np.cos(theta) * np.cos(phi), -np.cos(theta) * np.sin(phi), np.sin(theta)])

    @property
    def corners(self) -> np.ndarray:
        """(4, 3), in order around the square."""
        side = np.cross(self.up, -self.position / LIGHT_DISTANCE)
        return self.position + self.size / 2 * np.array([a * side + b * self.up for a, b in CORNERS])


@dataclass(frozen=True)
class Camera:
    """A pinhole camera in the plane x = 0 at (0, -distance, distance / 2) that looks at (0, 0, 0.5)."""

    distance: float = 7.5
    fov: float = FIELD_OF_VIEW

    @property
    def origin(self) -> np.ndarray:
        return np.array([0, -self.distance, self.distance / 2])

    @property
    def target(self) -> np.ndarray:
        return np.array([0, 0, 0.5])

    def axes(self) -> np.ndarray:
        """Right, down and forward as rows (3, 3)."""
        forward = (self.target - self.origin) / np.linalg.norm(self.target - self.origin)
        right = np.array([1.0, 0, 0])
        return np.stack([right, np.cross(forward, right), forward])

    def project(self, points: np.ndarray, image_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Pixel coordinates (N, 2), x right and y down with (0, 0) at the corner of the picture, and depths (N,)."""
        local = (points - self.origin) @ self.axes().T
        scale = image_size / 2 / np.tan(np.radians(self.fov) / 2)
        return image_size / 2 + scale * local[:, :2] / local[:, 2:], local[:, 2]

    def visible_floor(self) -> shapely.Polygon:
        """The part of the floor z = 0 that the picture shows, out to `FLOOR_REACH`."""
        half = np.tan(np.radians(self.fov) / 2)
        right, down, forward = self.axes()
        floor = shapely.box(-FLOOR_REACH, -FLOOR_REACH, FLOOR_REACH, FLOOR_REACH)
        # Each side of the frame is a plane through the camera; a point is inside where normal . (point - origin) >= 0.
        for inward in (right, -right, down, -down):
            normal = inward + half * forward
            a, b, c = normal[0], normal[1], -normal @ self.origin
            floor = floor.intersection(half_plane(a, b, c))
        return floor


def half_plane(a: float, b: float, c: float) -> shapely.Polygon:
    """A square large against the floor, filling the side of the line a x + b y + c = 0 where that is positive."""
    length = np.hypot(a, b)
    inward = np.array([a, b]) / length
    along = np.array([-inward[1], inward[0]])
    foot = -c / length * inward
    reach = 10 * FLOOR_REACH + abs(c) / length
    return shapely.Polygon(
        [foot - reach * along, foot + reach * along, foot + reach * (along + inward), foot + reach * (inward - along)]
    )


Window = tuple[int, int, int, int]  # left, top, width, height in pixels


def window_of(pixels: np.ndarray, image_size: int) -> Window | None:
    """The smallest window of the picture that holds pixel coordinates (N, 2), one pixel wider; None if outside."""
    low = np.clip(np.floor(pixels.min(axis=0)) - 1, 0, image_size).astype(int)
    high = np.clip(np.ceil(pixels.max(axis=0)) + 1, 0, image_size).astype(int)
    if (high <= low).any():
        return None
    return int(low[0]), int(low[1]), int(high[0] - low[0]), int(high[1] - low[1])


def shadow_window(hull: np.ndarray, camera: Camera, light: Light, image_size: int) -> Window | None:
    """Window that a shadow on the floor cannot leave; None if it is out of the picture.

    A ray from the light through the object meets the floor within the convex hull of the points where rays from the
    light's corners through vertices of the object's convex hull (N, 3) do, as all of the light is higher.
    """
    corners = light.corners[:, None]
    if corners[..., 2].min() <= hull[:, 2].max():
        return 0, 0, image_size, image_size
    shadow = corners + (hull - corners) * (corners[..., 2:] / (corners[..., 2:] - hull[:, 2:]))
    region = shapely.MultiPoint(shadow[..., :2].reshape(-1, 2)).convex_hull.intersection(camera.visible_floor())
    points = shapely.get_coordinates(region)
    if len(points) == 0:
        return None
    pixels, _ = camera.project(np.pad(points, ((0, 0), (0, 1))), image_size)
    return window_of(pixels, image_size)


# --- rendering ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """What one camera sees of one object.

    `picture` (H, W, 3) float32 sRGB in [0, 1], the object's colour, `FILL` where there is none of it; `alpha` (H, W)
    float32, the share of each pixel that the object covers; `shadows` (lights, H, W) float32 in [0, 1], 1 = no direct
    light arrives.
    """

    picture: np.ndarray
    alpha: np.ndarray
    shadows: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """(H, W) bool: the object covers more than half of the pixel."""
        return self.alpha > 0.5


def render_view(
    mesh: trimesh.Trimesh,
    camera: Camera,
    lights: Sequence[Light],
    *,
    look: Look | None = None,
    image_size: int = 64,
    spp: int = 64,
    seeds: Sequence[int] | None = None,
    variant: str = "scalar_rgb",
) -> View:
    """Render the picture of an object once, and its shadow under each light.

    Args:
        mesh: at rest on z = 0.
        look: of the picture; a plain grey one by default.
        image_size: side of the square pictures in pixels.
        spp: samples per pixel, rounded up to a number the sampler can lay out.
        seeds: one per light and one more, for the picture, at the front; 0, 1, ... by default.
        variant: of Mitsuba.
    """
    seeds = range(len(lights) + 1) if seeds is None else seeds
    look = random_look(np.random.default_rng(0)) if look is None else look
    picture, alpha = object_picture(mesh, camera, look, image_size=image_size, spp=spp, seed=seeds[0], variant=variant)
    settings = {"image_size": image_size, "spp": spp, "variant": variant}
    shadows = shadow_maps(mesh, camera, lights, seeds=seeds[1:], **settings)
    return View(picture, alpha, shadows)


def shadow_maps(
    mesh: trimesh.Trimesh,
    camera: Camera,
    lights: Sequence[Light],
    *,
    image_size: int = 64,
    spp: int = 64,
    seeds: Sequence[int],
    variant: str = "scalar_rgb",
    power: float = 1.0,
    albedo: float = 0.8,
    whole_frame: bool = False,
) -> np.ndarray:
    """Shadow maps (lights, H, W) float32 in [0, 1] of an object at rest on z = 0; see the module's docstring.

    Args:
        mesh: may be empty: then the floor is.
        power: of the lights.
        albedo: of the floor, in (0, 1].
        whole_frame: render all of the frame instead of the window that the shadow can reach.
    """
    maps = np.zeros((len(lights), image_size, image_size), np.float32)
    mi = mitsuba(variant)
    caster = None
    hull = np.empty((0, 3))
    if len(mesh.faces):
        points = mesh.vertices + np.array([0, 0, LIFT])
        hull = hull_points(points)
        caster = mitsuba_mesh(mi, points, mesh.faces)
    for shadow, light, seed in zip(maps, lights, seeds, strict=True):
        window = (0, 0, image_size, image_size)
        if not whole_frame:
            window = shadow_window(hull, camera, light, image_size) if caster is not None else None
        if window is None:
            continue
        left, top, width, height = window
        # The mirrored camera sees right as left.
        film = film_of(image_size, (image_size - left - width, top, width, height))
        scene = shadow_scene(mi, camera, light, film, spp, power, albedo)
        empty = pixels_of(mi, scene, spp, seed)[..., :3].mean(axis=2)
        blocked = empty
        if caster is not None:
            blocked = pixels_of(mi, {**scene, "object": caster}, spp, seed)[..., :3].mean(axis=2)
        lit = empty > 1e-3 * empty.max()
        share = np.where(lit, 1 - blocked / np.where(lit, empty, 1), 0)
        shadow[top : top + height, left : left + width] = np.clip(share, 0, 1)[:, ::-1]
    return maps


def object_picture(
    mesh: trimesh.Trimesh, camera: Camera, look: Look, *, image_size: int, spp: int, seed: int, variant: str
) -> tuple[np.ndarray, np.ndarray]:
    """Colour (H, W, 3) float32 sRGB and alpha (H, W) float32 of the object, without floor or shadow."""
    mi = mitsuba(variant)
    points = mesh.vertices + np.array([0, 0, LIFT])
    picture = np.full((image_size, image_size, 3), FILL, np.float32)
    alpha = np.zeros((image_size, image_size), np.float32)
    pixels, _ = camera.project(hull_points(points), image_size)
    window = window_of(pixels, image_size)
    if window is None:
        return picture, alpha
    left, top, width, height = window
    scene = picture_scene(mi, mesh, camera, look, film_of(image_size, window), spp)
    rgba = pixels_of(mi, scene, spp, seed)
    inside = np.s_[top : top + height, left : left + width]
    cover = np.clip(rgba[..., 3], 0, 1)
    linear = rgba[..., :3] / np.maximum(cover, 1e-6)[..., None]
    alpha[inside] = cover
    picture[inside] = np.where(cover[..., None] > 0, linear_to_srgb(linear), FILL)
    return picture, alpha


def hull_points(points: np.ndarray) -> np.ndarray:
    """Corners of the convex hull, or of the bounding box where that is as good or a hull cannot be built."""
    low, high = points.min(axis=0), points.max(axis=0)
    if len(points) < 5 or (high - low).min() < 1e-6:
        return np.array([[x, y, z] for x in (low[0], high[0]) for y in (low[1], high[1]) for z in (low[2], high[2])])
    return trimesh.convex.convex_hull(points).vertices


def linear_to_srgb(linear: np.ndarray) -> np.ndarray:
    linear = np.clip(linear, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 0.0031308) ** (1 / 2.4) - 0.055)


def pixels_of(mi: ModuleType, scene: dict, spp: int, seed: int) -> np.ndarray:
    return np.array(mi.render(mi.load_dict(scene), spp=spp, seed=seed))


def film_of(image_size: int, window: Window) -> dict:
    left, top, width, height = window
    return {
        "type": "hdrfilm",
        **{"width": image_size, "height": image_size, "pixel_format": "rgba", "component_format": "float32"},
        **{"crop_offset_x": left, "crop_offset_y": top, "crop_width": width, "crop_height": height},
        "rfilter": {"type": "box"},
    }


def look_at(mi: ModuleType, origin: np.ndarray, target: np.ndarray, up: np.ndarray):
    return mi.ScalarTransform4f().look_at(origin=origin.tolist(), target=target.tolist(), up=up.tolist())


def square_light(mi: ModuleType, position: np.ndarray, up: np.ndarray, size: float, radiance: np.ndarray) -> dict:
    pose = look_at(mi, position, np.zeros(3), up) @ mi.ScalarTransform4f().scale(float(size) / 2)
    emitter = {"type": "area", "radiance": {"type": "rgb", "value": radiance.tolist()}}
    return {"type": "rectangle", "to_world": pose, "emitter": emitter}


def sensor_of(mi: ModuleType, camera: Camera, film: dict, spp: int, mirrored: bool) -> dict:
    flip = np.array([1, 1, -1 if mirrored else 1])
    return {
        "type": "perspective",
        "fov": camera.fov,
        "to_world": look_at(mi, camera.origin * flip, camera.target * flip, np.array([0.0, 0, 1]) * flip),
        "film": film,
        "sampler": {"type": "multijitter", "sample_count": spp},
    }


def shadow_scene(
    mi: ModuleType, camera: Camera, light: Light, film: dict, spp: int, power: float, albedo: float
) -> dict:
    sheet = {"type": "principledthin", "base_color": {"type": "rgb", "value": albedo}, "roughness": 1.0}
    radiance = np.full(3, power / light.size**2)
    return {
        "type": "scene",
        "integrator": {
            "type": "direct",
            **{"emitter_samples": 1, "bsdf_samples": 0, "hide_emitters": True, "block_size": BLOCK_SIZE},
        },
        "sensor": sensor_of(mi, camera, film, spp, mirrored=True),
        "floor": {
            "type": "rectangle",
            "to_world": mi.ScalarTransform4f().scale(FLOOR_REACH),
            "bsdf": {**sheet, "diff_trans": 2.0, "spec_trans": 0.0, "eta": 1.0001},
        },
        "light": square_light(mi, light.position, light.up, light.size, radiance),
    }


def picture_scene(mi: ModuleType, mesh: trimesh.Trimesh, camera: Camera, look: Look, film: dict, spp: int) -> dict:
    up = np.array([0.0, 0, 1]) if abs(look.key_position[2]) < 5.9 else np.array([0.0, 1, 0])
    radiance = look.key_power * (look.key_position @ look.key_position) / look.key_size**2 / np.pi
    return {
        "type": "scene",
        "integrator": {"type": "path", "max_depth": 3, "hide_emitters": True, "block_size": BLOCK_SIZE},
        "sensor": sensor_of(mi, camera, film, spp, mirrored=False),
        "environment": {"type": "constant", "radiance": {"type": "rgb", "value": look.environment.tolist()}},
        "key": square_light(mi, look.key_position, up, look.key_size, radiance),
        "object": painted_mesh(mi, mesh, look),
    }


def painted_mesh(mi: ModuleType, mesh: trimesh.Trimesh, look: Look):
    textured = look.pattern in ("checker", "stripes", "noise")
    if textured:
        bitmap = mi.Bitmap(texture_picture(look))
        colour = {"type": "bitmap", "bitmap": bitmap, "raw": True}
    else:
        colour = {"type": "mesh_attribute", "name": "vertex_color"}
    surface = {"base_color": colour, "roughness": look.roughness, "metallic": look.metallic}
    bsdf = mi.load_dict({"type": "twosided", "bsdf": {"type": "principled", **surface}})
    corners = (mesh.triangles + np.array([0, 0, LIFT])).reshape(-1, 3)
    return mitsuba_mesh(
        mi,
        corners,
        np.arange(len(corners)).reshape(-1, 3),
        bsdf=bsdf,
        normals=smooth_normals(mesh),
        texcoords=box_coordinates(mesh, look.frequency) if textured else None,
        colours=None if textured else corner_colours(mesh, look),
    )


def mitsuba_mesh(mi, points, faces, *, bsdf=None, normals=None, texcoords=None, colours=None):
    properties = mi.Properties()
    if bsdf is not None:
        properties["bsdf"] = bsdf
    mesh = mi.Mesh(
        "object",
        vertex_count=len(points),
        face_count=len(faces),
        has_vertex_normals=normals is not None,
        has_vertex_texcoords=texcoords is not None,
        props=properties,
    )
    if colours is not None:
        mesh.add_attribute("vertex_color", 3, np.asarray(colours, np.float32).ravel())
    parameters = mi.traverse(mesh)
    parameters["vertex_positions"] = np.asarray(points, np.float32).ravel()
    parameters["faces"] = np.asarray(faces, np.uint32).ravel()
    for name, values in {"vertex_normals": normals, "vertex_texcoords": texcoords}.items():
        if values is not None:
            parameters[name] = np.asarray(values, np.float32).ravel()
    parameters.update()
    return mesh
