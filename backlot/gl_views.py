"""Pictures of objects by OpenGL without a display (EGL); the library is loaded when it is first asked for.

It draws what the z-buffer of `backlot.mesh_views` draws, except for shadows; a process that was forked from one which
drew with it cannot use it, the driver's threads are not there any more.
"""

# ruff: noqa: N803 - K is what everybody calls it
from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from backlot.bodies import Body, Light, finer
from backlot.rendering import NEAR, linear_bytes

if TYPE_CHECKING:
    import moderngl


NEAR_SHARE, FAR_SHARE = 0.9, 1.1  # of the nearest and the farthest depth there is
ATTRIBUTES = ("position", "normal", "curved", "color", "uv")

VERTEX = """
#version 330
uniform mat4 camera_from_object;
uniform mat4 clip_from_camera;
uniform vec3 towards;
in vec3 position, normal, curved, color;
in vec2 uv;
out vec3 tint;
out vec2 place;
out float depth, lambert;
void main() {
    vec4 seen = camera_from_object * vec4(position, 1);
    mat3 rotation = mat3(camera_from_object);
    float side = dot(rotation * normal, seen.xyz) > 0 ? -1 : 1;
    lambert = max(side * dot(rotation * curved, towards), 0);
    tint = color;
    place = uv;
    depth = seen.z;
    gl_Position = clip_from_camera * seen;
}
"""
FRAGMENT = """
#version 330
uniform sampler2D picture;
uniform bool textured;
uniform float number, ambient;
uniform vec3 colour;
in vec3 tint;
in vec2 place;
in float depth, lambert;
layout(location = 0) out vec4 light;
layout(location = 1) out vec2 found;
void main() {
    vec3 albedo = tint;
    if (textured) albedo *= texture(picture, vec2(place.x, 1 - place.y)).rgb;
    light = vec4(albedo * colour * (ambient + (1 - ambient) * lambert), 1);
    found = vec2(depth, number);
}
"""


@functools.cache
def create_context() -> tuple[moderngl.Context | None, str, int]:
    """An OpenGL context without a window, or why there is none; and the process it belongs to."""
    if importlib.util.find_spec("moderngl") is None:
        return None, "moderngl is not installed (pip install moderngl)", os.getpid()
    # What fails is told by bare exceptions, which only a thread's result holds apart from those of our own code.
    with ThreadPoolExecutor(1) as thread:
        error = thread.submit(try_context).exception()
    if error is not None:
        return None, f"no OpenGL context without a display: {' '.join(str(error).split())}", os.getpid()
    return new_context(), "", os.getpid()


def new_context() -> moderngl.Context:
    import moderngl

    return moderngl.create_context(standalone=True, backend="egl", require=330)


def try_context() -> None:
    new_context().release()


def problem() -> str:
    """Why there is no OpenGL here, in one line; empty if there is."""
    _, reason, owner = create_context()
    return reason if owner == os.getpid() else "this process was forked from one that had looked for OpenGL"


class GLDrawer:
    """Draws bodies as `backlot.mesh_views.ZBufferDrawer` does, with the same results."""

    def __init__(self, bodies: Sequence[Body], size: tuple[int, int], supersample: int) -> None:
        self.context, _, _ = create_context()
        self.bodies, self.size, self.supersample = bodies, size, supersample
        self.program = self.context.program(vertex_shader=VERTEX, fragment_shader=FRAGMENT)
        self.owned = [self.program]
        self.pieces = [piece for number, body in enumerate(bodies) for piece in self.upload(number, body)]
        self.targets = {s: self.target(s) for s in {1, supersample}}

    def upload(self, number: int, body: Body) -> list[tuple[int, moderngl.VertexArray, moderngl.Texture | None]]:
        """The triangles of a body, by texture: the body's number, what is drawn, and the texture."""
        surface, pieces = body.surface, []
        per_corner = {
            "position": body.vertices[body.faces],
            "normal": np.repeat(body.normals[:, None], 3, axis=1),
            "curved": body.curved,
            "color": surface.colors.transpose(2, 0, 1),
            "uv": surface.uv.transpose(2, 0, 1),
        }
        for texture in np.unique(surface.texture):
            mine = surface.texture == texture
            values = [per_corner[name][mine] for name in ATTRIBUTES]
            data = np.concatenate(values, axis=-1).astype(np.float32)
            buffer = self.context.buffer(data.tobytes())
            array = self.context.vertex_array(self.program, [(buffer, "3f 3f 3f 3f 2f", *ATTRIBUTES)])
            picture = None if texture < 0 else self.upload_picture(surface.pictures[texture])
            self.owned += [buffer, array] if picture is None else [buffer, array, picture]
            pieces.append((number, array, picture))
        return pieces

    def upload_picture(self, picture: np.ndarray) -> moderngl.Texture:
        """A texture that gives linear light of sRGB bytes (H, W, 3), mixed between texels as the z-buffer does."""
        height, width = picture.shape[:2]
        light = linear_bytes()[picture]
        texture = self.context.texture((width, height), 3, light.tobytes(), dtype="f4")
        texture.filter = (self.context.LINEAR, self.context.LINEAR)
        return texture

    def target(self, supersample: int) -> moderngl.Framebuffer:
        size = (self.size[1] * supersample, self.size[0] * supersample)
        light, found = self.context.texture(size, 4, dtype="f4"), self.context.texture(size, 2, dtype="f4")
        depth = self.context.depth_texture(size)
        self.owned += [light, found, depth]
        buffer = self.context.framebuffer([light, found], depth)
        self.owned.append(buffer)
        return buffer

    def __del__(self) -> None:
        for each in reversed(self.owned):
            each.release()

    def __call__(
        self, poses: np.ndarray, K: np.ndarray, light: Light
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """One view, as `backlot.mesh_views.ZBufferDrawer` gives it."""
        depths = [body.vertices @ pose[2, :3] + pose[2, 3] for body, pose in zip(self.bodies, poses, strict=True)]
        near = max(NEAR, NEAR_SHARE * min(each.min() for each in depths))
        far = max(FAR_SHARE * max(each.max() for each in depths), 2 * near)
        drawn = {}
        for s, target in self.targets.items():
            height, width = self.size[0] * s, self.size[1] * s
            self.draw(target, poses, clip_from_camera(finer(K, s), height, width, near, far), light)
            drawn[s] = target
        found = np.frombuffer(drawn[1].read(components=2, attachment=1, dtype="f4"), np.float32)
        found = found.reshape(*self.size, 2)
        fine_size = (self.size[0] * self.supersample, self.size[1] * self.supersample)
        colors = np.frombuffer(drawn[self.supersample].read(components=4, attachment=0, dtype="f4"), np.float32)
        colors = colors.reshape(*fine_size, 4)
        return colors[..., :3].transpose(2, 0, 1), colors[..., 3] > 0, found[..., 0], found[..., 1].astype(np.int16) - 1

    def draw(self, target: moderngl.Framebuffer, poses: np.ndarray, clip: np.ndarray, light: Light) -> None:
        """Fill a target with colours, and with depth and the body's number + 1."""
        program = self.program
        target.use()
        target.clear(0.0, 0.0, 0.0, 0.0, depth=1.0)
        self.context.enable_only(self.context.DEPTH_TEST)
        program["clip_from_camera"].write(clip.T.astype(np.float32).tobytes())
        program["towards"].value = tuple(light.towards())
        program["ambient"].value, program["colour"].value = light.ambient, tuple(light.colour)
        for number, array, picture in self.pieces:
            program["camera_from_object"].write(poses[number].T.astype(np.float32).tobytes())
            program["number"].value, program["textured"].value = number + 1, picture is not None
            if picture is not None:
                picture.use()
            array.render(self.context.TRIANGLES)


def clip_from_camera(K: np.ndarray, height: int, width: int, near: float, far: float) -> np.ndarray:
    """OpenGL's projection (4, 4) whose row 0 is the picture's first one: row v = 0 lies at the bottom for OpenGL."""
    scale = np.array([[2 / width, 0, 1 / width - 1], [0, 2 / height, 1 / height - 1]])
    result = np.zeros((4, 4))
    result[:2, :3] = scale @ np.vstack([K[:2], [0, 0, 1]])
    result[2] = [0, 0, (far + near) / (far - near), -2 * far * near / (far - near)]
    result[3, 2] = 1
    return result
