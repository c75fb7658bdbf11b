"""Pictures of meshes on a floor, without a graphics card: a z-buffer in numpy, and soft shadows to look at.

Scenes are z up, in metres, the floor is z = 0. Cameras are OpenCV's: x right, y down, z forward; `intrinsics` are in
units of the picture's side, so that one camera serves every size, and pixel (row, column) of a picture of side S looks
through ((column + .5) / S, (row + .5) / S).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import trimesh
from PIL import Image
from scipy.ndimage import gaussian_filter
from trimesh.visual.material import Material, MultiMaterial, PBRMaterial

NEAR = 1e-3  # metres; what is nearer to the camera is not seen
SLACK = 1e-7  # pixels by which triangles are too large: rounding would leave gaps where they meet
CHUNK = 16_384  # pixels of triangles looked at in one go: what the processor keeps close
PALETTE = ("#4C78C8", "#E4873B", "#5BA467", "#C9504E", "#8C6BB8", "#D9B13B", "#3FA7A8", "#D983AC", "#8A6A52", "#7C8896")
# The floor view sees the square [-1.3, 1.3]^2 of the floor, and what stands on it up to 1.2 m.
ELEVATION, DISTANCE, FIELD_OF_VIEW = 40.0, 7.0, 28.2
SEEN_REACH, SEEN_HEIGHT = 1.3, 1.2
TOP_DISTANCE = 9.0
# The studio, in linear light: a broad lamp from the left, a white sky, and what the floor throws back.
KEY_DIRECTION = np.array([-0.55, -0.42, 0.85]) / np.linalg.norm([-0.55, -0.42, 0.85])
KEY, SKY, BOUNCE = 0.75, 0.46, 0.2
FLOOR_ALBEDO, BACKGROUND = 0.78, (0.90, 0.915, 0.93)
KEY_SPREAD, KEY_SAMPLES, SKY_SAMPLES = 0.14, 10, 36
GOLDEN_ANGLE = np.pi * (3 - np.sqrt(5))
MAP_SIZE, FLOOR_MAP_SIZE = 192, 384
BLUR = (1.0, 4.0)  # pixels of the floor's map
SHADOW_REACH = 1.5  # heights of the highest object; what it takes from the floor further away is not to be seen
CREASE = np.cos(np.radians(40))  # faces that meet at less than this are shaded as one curved surface
MAX_FAN = 64


@dataclass(frozen=True, eq=False)
class Camera:
    """A pinhole camera: `scene_from_camera` (4, 4) rigid, OpenCV axes; `intrinsics` (3, 3) in picture sides."""

    scene_from_camera: np.ndarray
    intrinsics: np.ndarray

    @classmethod
    def look_at(cls, eye: Sequence[float], target: Sequence[float], fov_degrees: float) -> Camera:
        """Look from `eye` at `target` with z up in the picture, or y where that is along the line of sight."""
        if not 0 < fov_degrees < 180:
            raise ValueError(f"`fov_degrees` must lie between 0 and 180, got {fov_degrees:g}")
        eye, target = np.asarray(eye, np.float64), np.asarray(target, np.float64)
        length = np.linalg.norm(target - eye)
        if not length > 0:
            raise ValueError(f"`eye` and `target` must differ, both are {eye.tolist()}")
        forward = (target - eye) / length
        up = np.array([0.0, 1.0, 0.0]) if np.hypot(*forward[:2]) < 1e-6 else np.array([0.0, 0.0, 1.0])
        right = np.cross(forward, up)
        right /= np.linalg.norm(right)
        pose = np.eye(4)
        pose[:3] = np.stack([right, np.cross(forward, right), forward, eye], axis=1)
        focal = 0.5 / np.tan(np.radians(fov_degrees) / 2)
        return cls(pose, np.array([[focal, 0, 0.5], [0, focal, 0.5], [0, 0, 1]]))

    @classmethod
    def floor_view(cls, scale: float = 1.0) -> Camera:
        """From in front and above at the origin; sees [-1.3, 1.3]^2 of the floor and 1.2 m up, times `scale`."""
        angle = np.radians(ELEVATION)
        eye = scale * DISTANCE * np.array([0.0, -np.cos(angle), np.sin(angle)])
        return cls.look_at(eye, (0, 0, 0), FIELD_OF_VIEW)

    @classmethod
    def top_view(cls, scale: float = 1.0) -> Camera:
        """From far above, y up in the picture; sees [-1.3, 1.3]^2 at up to 1.2 m, times `scale`."""
        fov = 2 * np.degrees(np.arctan(SEEN_REACH / (TOP_DISTANCE - SEEN_HEIGHT)))
        return cls.look_at((0, 0, scale * TOP_DISTANCE), (0, 0, 0), fov)

    def rays(self, size: int) -> np.ndarray:
        """Directions (size, size, 3) in the scene, of depth 1: a point at depth z is eye + z * ray."""
        centres = (np.arange(size) + 0.5) / size
        pixels = np.stack([*np.meshgrid(centres, centres), np.ones((size, size))], axis=-1)
        return pixels @ (self.scene_from_camera[:3, :3] @ np.linalg.inv(self.intrinsics)).T

    def project(self, points: np.ndarray, size: int) -> np.ndarray:
        """Points (..., 3) of the scene as (column * w, row * w, w), w their depth: whole numbers at pixel centres."""
        rotation, eye = self.scene_from_camera[:3, :3], self.scene_from_camera[:3, 3]
        pixels = np.array([[size, 0, -0.5], [0, size, -0.5], [0, 0, 1]]) @ self.intrinsics
        return (points - eye) @ (pixels @ rotation.T).T


@dataclass(frozen=True, eq=False)
class Rendering:
    """What a camera sees: `rgb` (H, W, 3) in [0, 1]; `depth` (H, W) along the camera's z, the floor's too, inf where
    empty; `ids` (H, W) number of the mesh, -1 = floor or nothing; `pointmap` (H, W, 3) points of the meshes in the
    scene, NaN where there is none.
    """

    rgb: np.ndarray
    depth: np.ndarray
    ids: np.ndarray
    pointmap: np.ndarray

    def masks(self, num_objects: int) -> np.ndarray:
        """The visible part of each mesh: (num_objects, H, W) bool."""
        return self.ids == np.arange(num_objects)[:, None, None]

    def image(self) -> Image.Image:
        return Image.fromarray(to_bytes(self.rgb))


@dataclass(frozen=True, eq=False)
class Surface:
    """What colour a mesh has at each of its points: linear `colors` (3 corners, 3, F) of its triangles, times, where
    `texture` (F,) is not negative, that of `pictures[texture]` (H, W, 3) sRGB bytes at the places `uv` (3 corners, 2,
    F); v points up, and the pictures repeat.
    """

    colors: np.ndarray
    uv: np.ndarray
    texture: np.ndarray
    pictures: tuple[np.ndarray, ...] = ()

    @classmethod
    def of(cls, mesh: trimesh.Trimesh, color: Sequence[float]) -> Surface:
        """Of a mesh's own textures or colours, or `color`, sRGB in [0, 1], where it has none."""
        uv, visual, faces = texture_places(mesh), mesh.visual, np.asarray(mesh.faces)
        texture, pictures = np.full(len(faces), -1), []
        if uv is None:
            own = mesh_colors(mesh)
            tint = to_linear(np.asarray(color if own is None else own, np.float64))
            colors = by_corner(np.broadcast_to(tint, mesh.vertices.shape), faces)
            return cls(colors.astype(np.float32), np.zeros((3, 2, len(faces)), np.float32), texture)
        colors = np.empty((3, 3, len(faces)), np.float32)
        several = isinstance(visual.material, MultiMaterial)
        materials = visual.material.materials if several else [visual.material]
        number = np.asarray(visual.face_materials) if several else np.zeros(len(faces), int)
        for n, material in enumerate(materials):
            picture, tint = material_texture(material)
            colors[..., number == n] = tint[:, None]
            if picture is not None:
                texture[number == n] = len(pictures)
                pictures.append(picture)
        return cls(colors, by_corner(uv, faces).astype(np.float32), texture, tuple(pictures))

    def at(self, face: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Linear colours (3, N) of points of triangles (N,) that weigh their corners so: (3, N)."""
        colors = mix(weights, self.colors, face)
        if not self.pictures:
            return colors
        place, texture = mix(weights, self.uv, face), self.texture[face]
        for number, picture in enumerate(self.pictures):
            some = np.flatnonzero(texture == number)
            colors[:, some] *= bilinear(picture, place[:, some])
        return colors


def mix(weights: np.ndarray, corners: np.ndarray, face: np.ndarray) -> np.ndarray:
    """Values (C, N) at points of triangles (N,), from those at the corners (3, C, F) and their weights (3, N)."""
    return np.stack([sum(weights[k] * corners[k, c].take(face) for k in range(3)) for c in range(corners.shape[1])])


def bilinear(picture: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """Linear colours (3, N) of sRGB bytes (H, W, 3) at places (2, N); texel (row, column) is at its square's centre."""
    height, width = picture.shape[:2]
    place = uv * np.array([[width], [-height]], uv.dtype) - 0.5
    corner = np.floor(place)
    share = (place - corner).astype(np.float32)
    left, top = corner.astype(np.int64)
    columns, rows = (left % width, (left + 1) % width), (top % height, (top + 1) % height)
    flat, table = picture.reshape(-1, 3), linear_bytes()
    parts = []
    for row in rows:
        one, other = (table.take(flat.take(row * width + column, axis=0).T) for column in columns)
        parts.append(one + share[0] * (other - one))
    return parts[0] + share[1] * (parts[1] - parts[0])


@functools.cache
def linear_bytes() -> np.ndarray:
    """Linear light (256,) of sRGB bytes."""
    return to_linear(np.arange(256) / 255).astype(np.float32)


def texture_places(mesh: trimesh.Trimesh) -> np.ndarray | None:
    """Where in its pictures a mesh's vertices lie, (V, 2); None if it has no picture, or no places."""
    visual = mesh.visual
    if not visual.defined or visual.kind != "texture" or visual.uv is None or len(visual.uv) != len(mesh.vertices):
        return None
    several = isinstance(visual.material, MultiMaterial)
    materials = visual.material.materials if several else [visual.material]
    return np.asarray(visual.uv) if any(material_texture(each)[0] is not None for each in materials) else None


def material_texture(material: Material) -> tuple[np.ndarray | None, np.ndarray]:
    """The picture of a material, sRGB bytes (H, W, 3), if it has one, and the linear colour (3,) that it is times."""
    if isinstance(material, PBRMaterial):
        picture, factor = material.baseColorTexture, material.baseColorFactor
    else:
        picture, factor = material.image, None  # many files give a picture and, by mistake, a black colour
    if picture is None:
        return None, to_linear(material_colors(material, None))
    tint = np.ones(3) if factor is None else np.asarray(factor, np.float64)[:3] / 255
    return np.asarray(picture.convert("RGB")), tint


@dataclass(frozen=True, eq=False)
class Soup:
    """The triangles of all meshes: `vertices` (V, 3) and their linear `colors` (V, 3), `faces` (F, 3), unit `normals`
    (F, 3), and `owner` (F,) the number of the mesh; what has a texture has a surface, by its number, in `surfaces`.
    """

    vertices: np.ndarray
    colors: np.ndarray
    faces: np.ndarray
    normals: np.ndarray
    owner: np.ndarray
    surfaces: dict[int, Surface]

    @classmethod
    def of(cls, meshes: Sequence[trimesh.Trimesh], colors: Sequence) -> Soup:
        vertices, tints, faces = [np.zeros((0, 3))], [np.zeros((0, 3))], [np.zeros((0, 3), np.int64)]
        surfaces = {number: color for number, color in enumerate(colors) if isinstance(color, Surface)}
        start = 0
        for number, (mesh, color) in enumerate(zip(meshes, colors, strict=True)):
            points = np.asarray(mesh.vertices, np.float64)
            tint = np.zeros(3) if number in surfaces else np.asarray(color, np.float64)
            if tint.shape not in ((3,), points.shape):
                raise ValueError(f"color {number} has the shape {tint.shape}, it must be (3,) or {points.shape}")
            vertices.append(points)
            tints.append(np.broadcast_to(to_linear(tint), points.shape))
            faces.append(np.asarray(mesh.faces) + start)
            start += len(points)
        owner = np.repeat(np.arange(len(meshes)), [len(each) for each in faces[1:]])
        vertices, tints, faces = (np.concatenate(each) for each in (vertices, tints, faces))
        a, b, c = by_corner(vertices, faces)
        normals = cross(b - a, c - a)
        normals /= np.maximum(np.sqrt((normals * normals).sum(0)), 1e-300)
        return cls(vertices, tints, faces, normals.T, owner, surfaces)

    def textured(self, albedo: np.ndarray, face: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """`albedo` (N, 3) of points of triangles (N,) with weights (N, 3), where a mesh has a surface that of it."""
        for number, surface in self.surfaces.items():
            mine = np.flatnonzero(self.owner[face] == number)
            albedo[mine] = surface.at(face[mine] - np.searchsorted(self.owner, number), weights[mine].T).T
        return albedo


@dataclass(frozen=True, eq=False)
class Hits:
    """The nearest triangle of each pixel: `face` (H, W), -1 = none, and its `depth` (H, W), inf where none."""

    face: np.ndarray
    depth: np.ndarray


def render(
    meshes: Sequence[trimesh.Trimesh],
    colors: Sequence,
    camera: Camera,
    size: int,
    supersample: int = 1,
    floor: bool = True,
    shadows: bool = False,
) -> Rendering:
    """A square picture of meshes on a white floor, and where each of its pixels lies.

    Args:
        meshes: in scene coordinates; both sides of a triangle are seen.
        colors: of each mesh, sRGB in [0, 1]: (3,), or (V, 3) for its vertices; or its `Surface`, with its textures.
        size: pixels of a side.
        supersample: the colours are averages of this many squared rays; all else is of the pixel's centre.
        floor: whether there is one; it hides what is below it.
        shadows: soft shadows, and curved surfaces shaded smoothly; 1 s for a picture of 384 pixels.
    """
    if size < 1 or supersample < 1:
        raise ValueError(f"`size` and `supersample` must be at least 1, got {size} and {supersample}")
    soup = Soup.of(meshes, colors)
    hits = see(soup, camera, size)
    eye, rays = camera.scene_from_camera[:3, 3], camera.rays(size)
    ground = floor_depth(eye, rays) if floor else np.full((size, size), np.inf)
    hits.face[ground < hits.depth] = -1
    ids = np.where(hits.face >= 0, soup.owner[hits.face], -1) if len(soup.owner) else hits.face
    pointmap = np.where(ids[..., None] >= 0, eye + np.where(ids >= 0, hits.depth, 0)[..., None] * rays, np.nan)
    depth = np.minimum(hits.depth, ground)
    fine = size * supersample
    if supersample > 1:
        rays = camera.rays(fine)
        hits = see(soup, camera, fine)
        ground = floor_depth(eye, rays) if floor else np.full((fine, fine), np.inf)
        hits.face[ground < hits.depth] = -1
    light = shade(soup, camera, hits, ground, rays, shadows)
    light = light.reshape(size, supersample, size, supersample, 3).mean(axis=(1, 3))
    return Rendering(to_srgb(light), depth, ids, pointmap)


def render_scene(scene: trimesh.Scene, size: int = 384, view: str = "front", supersample: int = 2) -> Image.Image:
    """A picture of a z-up scene on its floor, in its own colours or, where a mesh has none, in those of the palette.

    Args:
        view: `front` is the fixed camera of `Camera.floor_view`, further away if the scene is larger; `top` looks down.
    """
    if view not in ("front", "top"):
        raise ValueError(f"`view` must be front or top, not {view}")
    meshes, colors = [], []
    for number, node in enumerate(scene.graph.nodes_geometry):
        scene_from_mesh, name = scene.graph.get(node)
        mesh = scene.geometry[name]
        if not isinstance(mesh, trimesh.Trimesh):
            continue
        vertices = mesh.vertices @ scene_from_mesh[:3, :3].T + scene_from_mesh[:3, 3]
        meshes.append(trimesh.Trimesh(vertices, mesh.faces, process=False))
        own = Surface.of(mesh, (0, 0, 0)) if texture_places(mesh) is not None else mesh_colors(mesh)
        colors.append(object_color(number) if own is None else own)
    scale = view_scale(meshes)
    camera = Camera.floor_view(scale) if view == "front" else Camera.top_view(scale)
    return render(meshes, colors, camera, size, supersample, shadows=True).image()


def view_scale(meshes: Sequence[trimesh.Trimesh]) -> float:
    """How much larger than the fixed camera's the view must be to hold the meshes; at least 1."""
    if not meshes:
        return 1.0
    points = np.concatenate([mesh.vertices for mesh in meshes])
    return max(1.0, float(np.abs(points[:, :2]).max() / SEEN_REACH), float(points[:, 2].max() / SEEN_HEIGHT))


def object_color(number: int) -> tuple[float, float, float]:
    """One of ten distinct colours, sRGB in [0, 1]; they come again in the same order."""
    text = PALETTE[number % len(PALETTE)]
    return tuple(int(text[place : place + 2], 16) / 255 for place in (1, 3, 5))


def mesh_colors(mesh: trimesh.Trimesh) -> np.ndarray | None:
    """The mesh's own colours, sRGB in [0, 1]: (3,) or (V, 3); None if it has none."""
    visual = mesh.visual
    if not visual.defined:
        return None
    if visual.kind != "texture":
        return np.asarray(visual.vertex_colors)[:, :3] / 255
    uv = visual.uv if visual.uv is not None and len(visual.uv) == len(mesh.vertices) else None
    if not isinstance(visual.material, MultiMaterial):
        return material_colors(visual.material, uv)
    result = np.zeros(mesh.vertices.shape)
    for number, material in enumerate(visual.material.materials):
        own = np.unique(mesh.faces[np.asarray(visual.face_materials) == number])
        result[own] = material_colors(material, None if uv is None else uv[own])
    return result


def material_colors(material: Material, uv: np.ndarray | None) -> np.ndarray:
    """sRGB in [0, 1] of a material, (3,), or of its texture at places (V, 2), (V, 3)."""
    found = material.to_color(uv) if uv is not None else None
    return np.asarray(material.main_color if found is None else found)[..., :3] / 255


# --- which triangle a pixel sees ------------------------------------------------------------------------------------


def by_corner(points: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """The corners of triangles as (3 corners, 3 coordinates, F), the order in which numpy is fast on many triangles."""
    return np.ascontiguousarray(points.T)[:, faces.T].swapaxes(0, 1)


def cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cross product along the first axis."""
    return np.stack([a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]])


def edge_functions(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lines (3, 3, F) opposite each corner, positive inside, and |determinant| (F,).

    With the corners (3, 3, F) as (x w, y w, w) and the pixel p = (column, row, 1), line * p / determinant are the
    weights with which the corners add up to p. There is no division by w, so that triangles which reach behind the
    camera need no clipping (Olano and Greer 1997).
    """
    a, b, c = corners
    lines = np.stack([cross(b, c), cross(c, a), cross(a, b)])
    determinant = (a * lines[0]).sum(0)
    return lines * np.sign(determinant), np.abs(determinant)


def sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width: the side of a square picture stands for both."""
    return (size, size) if isinstance(size, int) else size


def in_picture(corners: np.ndarray, size: int | tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Which triangles (3, 3, F) may cover pixels of a picture, a side or (height, width), and their bounds.

    Returns:
        Numbers (K,) of triangles; first column and row, last column and row (4, K) whole numbers.
    """
    depth = corners[:, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        flat = corners[:, :2] / depth[:, None]
    bounds = np.concatenate([np.ceil(least(flat) - SLACK), np.floor(SLACK - least(-flat))])
    bounds[:2, least(depth) < NEAR] = 0
    height, width = sides(size)
    last = np.array([[width - 1], [height - 1]])
    bounds[2:] = np.where(least(depth) < NEAR, last, bounds[2:])
    bounds[:2], bounds[2:] = np.maximum(bounds[:2], 0), np.minimum(bounds[2:], last)
    kept = np.flatnonzero((bounds[0] <= bounds[2]) & (bounds[1] <= bounds[3]) & (-least(-depth) >= NEAR))
    return kept, bounds[:, kept].astype(np.int64)


def least(corners: np.ndarray) -> np.ndarray:
    """The minimum over the first axis, of length 3."""
    return np.minimum(np.minimum(corners[0], corners[1]), corners[2])


def fragments(lines: np.ndarray, bounds: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(triangle, column, row) of all pixels whose centres lie in triangles, borders included.

    Args:
        lines, bounds: of `edge_functions` (3, 3, K) and of `in_picture` (4, K).
    """
    first_column, first_row, last_column, last_row = bounds
    face, row = runs(first_row, last_row - first_row + 1)
    # Along a row, each line leaves a half of the numbers.
    left, right = first_column[face].astype(np.float64), last_column[face].astype(np.float64)
    for line in lines:
        slope = line[0][face]
        start = line[1][face] * row + line[2][face]
        with np.errstate(divide="ignore", invalid="ignore"):
            bound = -start / slope
        left = np.where(slope > 0, np.maximum(left, bound), left)
        right = np.where(slope < 0, np.minimum(right, bound), right)
        right[(slope == 0) & (start < 0)] = -1
    flat = (lines == 0).all(axis=(0, 1))  # seen from its edge it covers nothing
    left, right = np.ceil(left - SLACK), np.floor(right + SLACK)
    kept = np.flatnonzero((left <= right) & ~flat[face])
    face, row, left = face[kept], row[kept], left[kept].astype(np.int64)
    width = right[kept].astype(np.int64) - left + 1
    parts = np.cumsum(width) // CHUNK
    for part in np.split(np.arange(len(face)), np.flatnonzero(np.diff(parts)) + 1):
        run, column = runs(left[part], width[part])
        yield face[part][run], column, row[part][run]


def runs(first: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counting up from each `first` for its `length`: which run an entry is of, and its number."""
    which = np.repeat(np.arange(len(first)), length)
    return which, np.arange(len(which)) - (np.cumsum(length) - length - first)[which]


def z_buffer(
    corners: np.ndarray, nearness: np.ndarray | None, size: int | tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The greatest nearness at each pixel, row by row, -inf where none, and the triangle it is of, -1 where none.

    Args:
        corners: (3, 3, F) as (x w, y w, w).
        nearness: (3, F) at the corners where all w are 1; without it 1 / w, in perspective 1 / depth.
        size: pixels of a side of a square picture, or (height, width).
    """
    height, width = sides(size)
    kept, bounds = in_picture(corners, size)
    lines, determinant = edge_functions(corners[..., kept])
    with np.errstate(divide="ignore", invalid="ignore"):
        plane = (lines if nearness is None else nearness[:, None, kept] * lines).sum(0) / determinant
    best, face = np.full(height * width, -np.inf), np.full(height * width, -1)
    for which, column, row in fragments(lines, bounds):
        near = plane[0][which] * column + plane[1][which] * row + plane[2][which]
        if nearness is None:
            near[near > 1 / NEAR] = -np.inf
        pixel = row * width + column
        np.maximum.at(best, pixel, near)
        winners = np.flatnonzero((near == best[pixel]) & (near > -np.inf))
        face[pixel[winners]] = kept[which[winners]]
    return best, face


def see(soup: Soup, camera: Camera, size: int) -> Hits:
    """The nearest triangle of each pixel of the camera."""
    nearness, face = z_buffer(by_corner(camera.project(soup.vertices, size), soup.faces), None, size)
    with np.errstate(divide="ignore"):
        depth = np.where(face >= 0, 1 / nearness, np.inf)
    return Hits(face.reshape(size, size), depth.reshape(size, size))


def floor_depth(eye: np.ndarray, rays: np.ndarray) -> np.ndarray:
    """Depth at which rays (..., 3) meet z = 0 before the camera, inf where they do not."""
    with np.errstate(divide="ignore", invalid="ignore"):
        depth = -eye[2] / rays[..., 2]
    return np.where(depth > NEAR, depth, np.inf)


# --- how bright it is there -----------------------------------------------------------------------------------------


def to_linear(color: np.ndarray) -> np.ndarray:
    return np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)


def to_srgb(light: np.ndarray) -> np.ndarray:
    light = np.clip(light, 0, 1)
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def to_bytes(rgb: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(rgb, 0, 1) * 255).astype(np.uint8)


def shade(soup: Soup, camera: Camera, hits: Hits, ground: np.ndarray, rays: np.ndarray, shadows: bool) -> np.ndarray:
    """Linear light (H, W, 3) that reaches the camera: Lambert under the lamp, the sky and the floor's reflection."""
    eye = camera.scene_from_camera[:3, 3]
    backdrop = to_linear(np.array(BACKGROUND))
    light = np.broadcast_to(backdrop, rays.shape).copy()
    bodies, floor = hits.face >= 0, (hits.face < 0) & np.isfinite(ground)
    face, towards = hits.face[bodies], rays[bodies]
    albedo, normals = soup.colors[soup.faces[face, 0]], soup.normals[face]
    weights = corner_weights(soup, camera, hits) if shadows or soup.surfaces else None
    away = ((normals * towards).sum(1) > 0)[:, None]
    normals = np.where(away, -normals, normals)
    floor_points = eye + ground[floor][:, None] * rays[floor]
    if shadows and len(face):
        albedo = soup.textured((weights[..., None] * soup.colors[soup.faces[face]]).sum(1), face, weights)
        curved = (weights[..., None] * corner_normals(soup)[face]).sum(1)
        curved /= np.maximum(np.sqrt((curved * curved).sum(1)), 1e-9)[:, None]
        studio = Studio(soup)
        points = eye + hits.depth[bodies][:, None] * towards
        light[bodies] = albedo * studio.on_surfaces(points, normals, np.where(away, -curved, curved))[:, None]
        lit = studio.on_floor(floor_points)
    else:
        light[bodies] = soup.textured(albedo, face, weights) * plain_light(normals)[:, None]
        lit = np.full(len(floor_points), OPEN)
    # The floor runs into the backdrop, there is no horizon.
    reach = np.hypot(floor_points[:, 0], floor_points[:, 1])[:, None] / np.sqrt((eye * eye).sum())
    fade = smooth_step((reach - 0.23) / 0.4)
    light[floor] = ((1 - fade) * FLOOR_ALBEDO * OPEN + fade * backdrop) * (lit / OPEN)[:, None]
    return light


def smooth_step(x: np.ndarray) -> np.ndarray:
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def plain_light(normals: np.ndarray) -> np.ndarray:
    """What falls on surfaces that nothing shades: (N, 3) -> (N,)."""
    up = normals[:, 2]
    return KEY * np.maximum(normals @ KEY_DIRECTION, 0) + SKY * (0.5 + 0.5 * up) + BOUNCE * (0.5 - 0.5 * up)


OPEN = float(plain_light(np.array([[0.0, 0.0, 1.0]]))[0])  # on the open floor


def corner_weights(soup: Soup, camera: Camera, hits: Hits) -> np.ndarray:
    """With which weights the corners of its triangle make up the point that a pixel sees: (pixels, 3)."""
    size = hits.face.shape[0]
    row, column = np.nonzero(hits.face >= 0)
    face = hits.face[row, column]
    lines, _ = edge_functions(by_corner(camera.project(soup.vertices, size), soup.faces))
    weights = np.maximum(lines[:, 0, face] * column + lines[:, 1, face] * row + lines[:, 2, face], 0)
    return (weights / np.maximum(weights.sum(0), 1e-300)).T


def corner_normals(soup: Soup) -> np.ndarray:
    """Unit normals (F, 3, 3) at the corners: means over the faces that meet there without a crease."""
    corners = soup.vertices[soup.faces]
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    points = corners.reshape(-1, 3)
    span = max(float(np.ptp(points, axis=0).max()), 1e-9)
    # by place: vertices of one place are several where their texture is cut
    keys = np.column_stack([np.rint(points / span * 1e6).astype(np.int64), np.repeat(soup.owner, 3)])
    order = np.lexsort(keys.T)
    begins = np.flatnonzero(np.r_[True, (np.diff(keys[order], axis=0) != 0).any(axis=1)])
    length = np.diff(np.r_[begins, len(order)])
    # Each corner with each corner at the same place; not in huge fans, where that would be quadratic.
    within = np.repeat(np.where(length <= MAX_FAN, length, 0), length)
    mine, theirs = runs(np.repeat(begins, length), within)
    mine, theirs = order[mine], order[theirs] // 3
    agree = (soup.normals[mine // 3] * soup.normals[theirs]).sum(1) > CREASE
    mine, theirs = mine[agree], theirs[agree]
    result = np.repeat(soup.normals * 1e-12, 3, axis=0)
    for axis in range(3):
        result[:, axis] += np.bincount(mine, soup.normals[theirs, axis] * area[theirs], minlength=len(result))
    return (result / np.maximum(np.linalg.norm(result, axis=1), 1e-300)[:, None]).reshape(-1, 3, 3)


@functools.cache
def lamps() -> tuple[tuple[np.ndarray, float], ...]:
    """Points of the broad lamp and of the sky: the direction towards each and its strength."""
    number = np.arange(KEY_SAMPLES) + 0.5
    radius, turn = KEY_SPREAD * np.sqrt(number / KEY_SAMPLES), number * GOLDEN_ANGLE
    aside = np.stack([np.cos(turn), np.sin(turn)], axis=1) @ np.stack(across(KEY_DIRECTION))
    key = KEY_DIRECTION + radius[:, None] * aside
    key /= np.linalg.norm(key, axis=1)[:, None]
    number = np.arange(SKY_SAMPLES) + 0.5
    up, turn = number / SKY_SAMPLES, number * GOLDEN_ANGLE  # equal steps of height are equal areas of the sphere
    radius = np.sqrt(1 - up**2)
    sky = np.stack([radius * np.cos(turn), radius * np.sin(turn), up], axis=1)
    return (*((d, KEY / KEY_SAMPLES) for d in key), *((d, 2 * SKY / SKY_SAMPLES) for d in sky))


class Studio:
    """The lamps, and what of their light reaches a place past the meshes."""

    def __init__(self, soup: Soup) -> None:
        self.corners = by_corner(soup.vertices, soup.faces)
        self.low, self.high = self.corners.min(axis=(0, 2)), self.corners.max(axis=(0, 2))

    def on_surfaces(self, points: np.ndarray, normals: np.ndarray, curved: np.ndarray) -> np.ndarray:
        """Light (N,) at points (N, 3) of the meshes; normals as their faces have them and as they are shaded."""
        centre = (self.low + self.high) / 2
        texel = 2.04 * float(np.linalg.norm(self.high - centre)) / MAP_SIZE + 1e-9
        points = points - centre + 1.5 * texel * normals  # out of the stairs that the surface has in the map
        result = BOUNCE * (0.5 - 0.5 * curved[:, 2])
        for direction, strength in lamps():
            lit = curved @ direction
            some = np.flatnonzero(lit > 0)
            seen = seen_from(direction, self.corners - centre[:, None], points[some], texel, MAP_SIZE)
            result[some] += strength * lit[some] * seen
        return result

    def on_floor(self, points: np.ndarray) -> np.ndarray:
        """Light (N,) at points (N, 3) of the floor, by throwing the meshes' shadows on a map of it."""
        centre = (self.low + self.high)[:2] / 2
        reach = float((self.high - self.low)[:2].max()) / 2 + SHADOW_REACH * max(float(self.high[2]), 0.0) + 1e-9
        texel = 2 * reach / FLOOR_MAP_SIZE
        dark = np.zeros((2, FLOOR_MAP_SIZE**2))  # of the lamp, of the sky
        height = self.corners[:, 2]
        for number, (direction, strength) in enumerate(lamps()):
            thrown = self.corners[:, :2] - height[:, None] * (direction[:2] / direction[2])[:, None]
            thrown = (thrown - centre[:, None]) / texel + (FLOOR_MAP_SIZE - 1) / 2
            place = np.concatenate([thrown, np.ones_like(thrown[:, :1])], axis=1)
            highest, _ = z_buffer(place, height, FLOOR_MAP_SIZE)
            dark[int(number >= KEY_SAMPLES)] += (strength * direction[2]) * (highest > 0)
        # the sky has no points: their edges are blurred away
        dark = sum(
            gaussian_filter(each.reshape(FLOOR_MAP_SIZE, -1), blur) for each, blur in zip(dark, BLUR, strict=True)
        )
        dark = dark.ravel()
        offset = (points[:, :2] - centre) / texel
        near = np.flatnonzero((np.abs(offset) < FLOOR_MAP_SIZE / 2 - 1).all(axis=1))
        column, row = (offset[near] + (FLOOR_MAP_SIZE - 1) / 2).T
        there = sum(weight * dark[pixel] for pixel, weight in neighbours(column, row, FLOOR_MAP_SIZE))
        edge = np.abs(offset[near]).max(axis=1) / (FLOOR_MAP_SIZE / 2)
        light = np.full(len(points), OPEN)
        light[near] -= there * smooth_step((1 - edge) * 4)
        return light


def seen_from(direction: np.ndarray, corners: np.ndarray, points: np.ndarray, texel: float, size: int) -> np.ndarray:
    """How much of the light of a far lamp reaches points (N, 3) past triangles (3, 3, F), in [0, 1], by a shadow map.

    Args:
        direction: towards the lamp, a unit vector.
        corners, points: about the middle of the map, which must hold them.
        texel, size: of the square map: the side of a pixel, and pixels of a side.
    """
    axes = np.stack([*across(direction), direction])
    axes[:2] /= texel
    place = axes @ corners
    height = place[:, 2].copy()
    place[:, :2] += (size - 1) / 2
    place[:, 2] = 1
    nearest, _ = z_buffer(place, height, size)
    column, row, height = axes @ points.T
    column += (size - 1) / 2
    row += (size - 1) / 2
    return sum(weight * (nearest[pixel] <= height) for pixel, weight in neighbours(column, row, size))


def across(direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two unit vectors that make a right angle with a unit vector and with each other."""
    first = np.cross(direction, np.eye(3)[np.argmin(np.abs(direction))])
    first /= np.linalg.norm(first)
    return first, np.cross(direction, first)


def neighbours(column: np.ndarray, row: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The four pixels of a flat square map about each place within it, and their bilinear weights."""
    left, top = column.astype(np.int64), row.astype(np.int64)
    right, below = column - left, row - top
    corner = top * size + left
    yield corner, (1 - right) * (1 - below)
    yield corner + 1, right * (1 - below)
    yield corner + size, (1 - right) * below
    yield corner + size + 1, right * below
