"""Pictures of objects by OpenGL without a display (EGL); everything is loaded when it is first asked for."""

from __future__ import annotations

import functools
import os


@functools.cache
def problem() -> str | None:
    """Why there is no OpenGL here, in one line; None if there is."""
    return "not built"


class GLDrawer:
    pass
