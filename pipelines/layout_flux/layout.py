"""What a layout says, and what of it stays the same over all steps of the sampler: boxes, tokens, who covers what."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch import Tensor

DEPTH_LABELS = ("foreground", "midground", "background")
FOREGROUND_ALPHA = 0.5  # from here on an instance counts as foreground: a red box in the overlays
MAX_GROUPS = 3


@dataclass
class Layout:
    """The instances of B pictures, padded to N each.

    Args:
        boxes: (B, N, 4) corners x1, y1, x2, y2 in 0 ... 1, on the host: lengths of token lists follow from them.
            Padding has no area.
        text_embeds: (B, N, P) pooled CLIP embeddings of "category, caption".
        clip_embeds, dino_embeds: (B, N, E), (B, N, F) embeddings of the instance's reference picture.
        has_text, has_clip, has_dino: (B, N) whether there is one; else a learned vector stands for it.
        valid: (B, N) whether the instance takes part.
        depth_labels: (B, N) index into DEPTH_LABELS.
        phrase_spans: (B, N, 2) T5 tokens of the instance's phrase in the prompt, half open; equal ends: unknown.
        alpha: (B, N) foreground strength, where it is given instead of predicted; None: predicted.
        alpha_learns: (B,) whether what a picture's alpha does may teach it; None: everywhere.
    """

    boxes: np.ndarray
    text_embeds: Tensor
    clip_embeds: Tensor
    dino_embeds: Tensor
    has_text: Tensor
    has_clip: Tensor
    has_dino: Tensor
    valid: Tensor
    depth_labels: Tensor
    phrase_spans: Tensor
    alpha: Tensor | None = None
    alpha_learns: Tensor | None = None

    @classmethod
    def from_batch(cls, batch: dict) -> Layout:
        """Of a batch of data_prep.layouts.LayoutDataset."""
        names = ("text_embeds", "clip_embeds", "dino_embeds", "valid", "depth_labels", "phrase_spans")
        present = batch["has_reference"]
        return cls(
            boxes=batch["boxes"].values,
            has_text=batch["valid"],
            has_clip=present,
            has_dino=present,
            **{name: batch[name] for name in names},
        )

    def _map(self, of_tensor, of_boxes) -> Layout:
        changed = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "boxes"}
        changed = {name: None if tensor is None else of_tensor(tensor) for name, tensor in changed.items()}
        return replace(self, boxes=of_boxes(self.boxes), **changed)

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Layout:
        """The same elsewhere; `dtype` is that of the embeddings. The boxes stay on the host."""
        return self._map(lambda x: x.to(device, dtype if x.is_floating_point() else None), lambda boxes: boxes)

    def repeat(self, count: int) -> Layout:
        """Each picture's instances `count` times in a row: (B, ...) -> (count * B, ...)."""
        return self._map(lambda x: x.repeat_interleave(count, dim=0), lambda boxes: boxes.repeat(count, axis=0))


def token_rectangles(boxes: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Boxes (..., 4) in 0 ... 1 -> first and last-plus-one column and row (..., 4): x0, y0, x1, y1.

    Every token that the box touches, at least one, none outside the grid of (rows, columns).
    """
    rows, columns = grid
    size = np.array([columns, rows], dtype=np.float64)
    first = np.floor(boxes[..., :2] * size + 1e-4).clip(0, size - 1)  # 1e-4 of a token: rounding is no touch
    last = np.ceil(boxes[..., 2:] * size - 1e-4).clip(first + 1, size)
    return np.concatenate([first, last], axis=-1).astype(np.int64)


@dataclass
class TokenGroup:
    """Instances with boxes of like size, cut out together.

    Args:
        instances: (G,) indices into the B * N instances.
        tokens: (G, L) indices into the B * S image tokens; any where `inside` is false.
        inside: (G, L), or None where all of them are.
        places: (G, L, 4 f) features of where in its box a token lies; None where nobody asks for them.
    """

    instances: Tensor
    tokens: Tensor
    inside: Tensor | None
    places: Tensor | None = None


def group_tokens(
    boxes: np.ndarray, grid: tuple[int, int], device: torch.device, place_freqs: int = 0
) -> list[TokenGroup]:
    """The tokens of all boxes with an area, (B, N, 4), in at most three groups: longer boxes are not what small ones
    are padded to. Instances without boxes give one group of one token that no weight belongs to.

    Args:
        place_freqs: frequencies of `place_features`; 0: without them.
    """
    instances = boxes.shape[1]
    if not instances:
        return []
    rows, columns = grid
    flat = boxes.reshape(-1, 4)
    real = np.flatnonzero((flat[:, 2] > flat[:, 0]) & (flat[:, 3] > flat[:, 1]))
    lists = []
    for index, (x0, y0, x1, y1) in zip(real, token_rectangles(flat[real], grid), strict=True):
        inside = np.arange(y0, y1)[:, None] * columns + np.arange(x0, x1)
        lists.append(inside.reshape(-1) + index // instances * rows * columns)
    if not lists:
        real, lists = np.zeros(1, dtype=np.int64), [np.zeros(1, dtype=np.int64)]
    lengths = np.array([len(tokens) for tokens in lists])
    classes = np.minimum(np.log2(lengths.max() / lengths) // 2, MAX_GROUPS - 1)  # each at most four times longer
    groups = []
    for members in (np.flatnonzero(classes == c) for c in np.unique(classes)):
        longest = lengths[members].max()
        tokens, inside = np.zeros((len(members), longest), dtype=np.int64), np.zeros((len(members), longest), bool)
        for row, member in enumerate(members):
            tokens[row, : lengths[member]], inside[row, : lengths[member]] = lists[member], True
        mask = None if inside.all() else torch.from_numpy(inside).to(device)
        places = None
        if place_freqs:
            places = place_features(flat[real[members]], tokens % (rows * columns), grid, place_freqs).to(device)
        given = torch.from_numpy(real[members]).to(device), torch.from_numpy(tokens).to(device), mask, places
        groups.append(TokenGroup(*given))
    return groups


def place_features(boxes: np.ndarray, tokens: np.ndarray, grid: tuple[int, int], frequencies: int) -> Tensor:
    """Where in its box the centre of a token lies: boxes (G, 4), tokens (G, L) of one picture -> (G, L, 4 f).

    x and y run from 0 to 1 along the box; each gives the sines, then the cosines, of itself times pi 2^(k - 1).
    """
    rows, columns = grid
    centres = np.stack([(tokens % columns + 0.5) / columns, (tokens // columns + 0.5) / rows], axis=-1)
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 1 / max(grid))
    angles = ((centres - boxes[:, None, :2]) / sides[:, None])[..., None] * np.pi * 2.0 ** (np.arange(frequencies) - 1)
    features = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    return torch.from_numpy(features.reshape(*tokens.shape, 4 * frequencies).astype(np.float32))


def covered_tokens(boxes: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """(B, N, 4) -> (B, N, S): whether the box of an instance covers a token."""
    rows, columns = grid
    x0, y0, x1, y1 = (token_rectangles(boxes, grid)[..., i, None, None] for i in range(4))
    row, column = np.arange(rows)[:, None], np.arange(columns)
    covered = (row >= y0) & (row < y1) & (column >= x0) & (column < x1)
    covered &= ((boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1]))[..., None, None]
    return torch.from_numpy(covered.reshape(*boxes.shape[:2], rows * columns))


def box_features(boxes: np.ndarray, points: int, frequencies: int) -> Tensor:
    """Fourier features of a grid of points that spans each box, corners included. (..., 4) -> (..., 4 p^2 f).

    p^2 points have 2 p^2 coordinates; each gives the sines, then the cosines, of itself times 100^(k / f).
    InstanceAssemble (arXiv 2509.16691).
    """
    steps = np.linspace(0.0, 1.0, points)
    start, end = boxes[..., None, :2].astype(np.float64), boxes[..., None, 2:].astype(np.float64)
    along = start + (end - start) * steps[:, None]  # (..., p, 2)
    x = np.broadcast_to(along[..., None, :, 0], (*boxes.shape[:-1], points, points))
    y = np.broadcast_to(along[..., :, None, 1], (*boxes.shape[:-1], points, points))
    coordinates = np.stack([x, y], axis=-1).reshape(*boxes.shape[:-1], 2 * points**2, 1)
    angles = coordinates * 100.0 ** (np.arange(frequencies) / frequencies)
    features = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    features = features.reshape(*boxes.shape[:-1], 4 * points**2 * frequencies)
    return torch.from_numpy(features.astype(np.float32))


@dataclass
class LayoutState:
    """A layout as the blocks see it; made once by the adapter, the same for all steps of a sampler.

    Args:
        tokens: (B, N, 3, D) instance tokens as encoded: text, CLIP, DINO.
        alpha: (B, N) foreground strength in 0 ... 1.
        valid: (B, N) as numbers 0 and 1.
        groups: which image tokens are cut out with which instance.
        covered: (B, N, S) 1 where the box of a valid instance covers a token.
        coverage: (B, S, 1) number of valid boxes that cover it, at least 1.
        rotary: cosines and sines (B, N, d) at the centres of the boxes.
        layout_gate, identity_gate: (B, N) strength of the two branches, scales included.
        phrase_spans: (B, N, 2) see Layout.
        use_layout, use_modulation: switched by the sampler from step to step.
        use_feedback: whether the bridge passes on what it reads.
        needs_gradient: set by the transformer: whether its forward keeps one.
        guidance_scale: above 1, the transformer also runs without the layout and goes beyond the difference.
        feedback: of the last forward, for each bridge, |what it adds| / |tokens it adds to|.
    """

    tokens: Tensor
    alpha: Tensor
    valid: Tensor
    groups: list[TokenGroup]
    covered: Tensor
    coverage: Tensor
    rotary: tuple[Tensor, Tensor]
    layout_gate: Tensor
    identity_gate: Tensor
    phrase_spans: Tensor
    use_layout: bool = True
    use_modulation: bool = True
    use_feedback: bool = True
    needs_gradient: bool = False
    guidance_scale: float = 1.0
    feedback: list[Tensor] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return self.covered.shape[-1]

    def feedback_magnitude(self) -> Tensor | None:
        """Mean over blocks and valid instances of |what the bridge adds| / |tokens it adds to|, of the last forward.

        None where no bridge ran.
        """
        return torch.stack(self.feedback).mean() if self.feedback else None
