"""What a scene's objects consist of: the names of their modalities, and the widths of their poses. No torch here."""

POSES = {"translation": 3, "scale": 3, "6drotation_normalized": 6}
"""Channels of each pose, (N, 1, channels): metres; log side lengths; the first two columns of a rotation."""
OPTIONAL_POSES = {"translation_scale": 1}
WIDTHS = POSES | OPTIONAL_POSES
MODALITIES = ("shape", *WIDTHS)
"""In the order of a data set's items, in which training draws their noise; networks hold poses by the alphabet."""
