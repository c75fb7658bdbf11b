"""Which templates look like the query: a cheap choice by the encoder's tokens, then the network on groups of views.

The network is told a reference direction, in training that of the template nearest to the query. All templates of a
group are neighbours here and the first is the reference, so that every group is asked alike: is this where you are?
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from backlot.cameras import viewing_direction

Preselection = Literal["mean", "patches"]
TIE = 1e-3
"""Cosine that all templates' numbers together are worth: equal neighbours of an icosphere are taken in their order."""


@dataclass(frozen=True)
class Views:
    """The views of T templates: V directions, each in `copies` turns about the camera's axis.

    Args:
        camera_from_object: (T, 4, 4); template c * V + v is turn c of direction v.
        copies: turns of each direction.
    """

    camera_from_object: Tensor
    copies: int = 1

    def __len__(self) -> int:
        return len(self.camera_from_object)

    @property
    def rotations(self) -> Tensor:
        """(T, 3, 3)"""
        return self.camera_from_object[:, :3, :3]

    @functools.cached_property
    def directions(self) -> Tensor:
        """(T, 3) unit vectors from the object to the cameras, in the object's frame."""
        return viewing_direction(self.camera_from_object.double())

    def nearest(self, camera_from_object: Tensor, count: int, among: Tensor | None = None) -> Tensor:
        """The templates (at most `count`,) of the nearest directions, each in the turn that is nearest.

        Args:
            camera_from_object: (4, 4).
            among: (T,) bool, the templates to choose from.
        """
        pose = camera_from_object.double().to(self.camera_from_object.device)
        cosines = self.directions @ viewing_direction(pose)
        cosines = cosines - TIE * torch.arange(len(self), device=cosines.device) / len(self)
        turns = (self.rotations.double() * pose[:3, :3]).sum(dim=(1, 2))
        if among is not None:
            turns = turns.masked_fill(~among, -torch.inf)
        chosen = turns.reshape(self.copies, -1).argmax(dim=0)
        chosen = chosen * (len(self) // self.copies) + torch.arange(len(chosen), device=chosen.device)
        if among is not None:
            chosen = chosen[among[chosen]]
        order = cosines[chosen].argsort(descending=True)
        return chosen[order[:count]]

    def groups(self, size: int, among: Tensor | None = None) -> Iterator[Tensor]:
        """Groups (at most `size`,) of neighbours, the one they surround first, until each template is in a group.

        Args:
            among: (T,) bool, the templates to group.
        """
        left = torch.ones(len(self), dtype=torch.bool) if among is None else among.clone().cpu()
        while left.any():
            first = int(left.nonzero()[0, 0])
            group = self.nearest(self.camera_from_object[first], size, among)
            # its own direction is the nearest, but two turns of one direction may be equally near
            group = torch.cat([group.new_tensor([first]), group[group != first]])[:size]
            left[group.cpu()] = False
            yield group


def class_scores(logits: Tensor, object_patches: Tensor) -> Tensor:
    """Mean over the object's patches of the largest probability among a template's patches: (B, S).

    Args:
        logits: (B, S, N, N + 1), the last is "unseen", which lowers the score by itself.
        object_patches: (N,) bool.
    """
    seen = logits.float().softmax(dim=-1)[..., :-1].amax(dim=-1)
    return (seen * object_patches).sum(dim=-1) / object_patches.sum()


def preselect(
    query: Tensor, templates: Tensor, query_patches: Tensor, template_patches: Tensor, how: Preselection
) -> Tensor:
    """How like the query templates are by the encoder's tokens alone, (T,) cosines.

    Args:
        query: (N, C) tokens. templates: (T, N, C) tokens.
        query_patches: (N,) bool, template_patches: (T, N) bool, where the object is.
        how: "mean" compares the means over the object, "patches" each patch of the query with the most alike.
    """
    query = query[query_patches].float()
    if how == "mean":
        weights = template_patches[..., None].float()
        means = (templates.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        return torch.cosine_similarity(means, query.mean(dim=0), dim=-1)
    query = torch.nn.functional.normalize(query, dim=-1)
    scores = []
    for tokens, is_object in zip(templates, template_patches, strict=True):  # T * N * N at once would be gigabytes
        alike = query @ torch.nn.functional.normalize(tokens.float(), dim=-1).T
        scores.append(alike.masked_fill(~is_object, -1.0).amax(dim=1).mean())
    return torch.stack(scores)


def choose_hypotheses(scores: Tensor, views: Views, count: int, group_size: int) -> list[Tensor]:
    """The templates of the best views: groups of neighbours round the best, then round the best outside of these.

    Args:
        scores: (T,), -inf where a template was not looked at.
    """
    left, groups = scores.clone(), []
    while len(groups) < count and left.max() > -torch.inf:
        best = int(left.argmax())
        group = views.nearest(views.camera_from_object[best], group_size)
        group = torch.cat([group.new_tensor([best]), group[group != best]])[:group_size]
        groups.append(group)
        left[group.to(left.device)] = -torch.inf
        left[best] = -torch.inf
    return groups
