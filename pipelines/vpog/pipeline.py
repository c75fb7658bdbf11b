"""VPOGPipeline: a picture of an object and pictures of its CAD model -> its 6D pose."""
# ruff: noqa: N803 - K is what everybody calls it

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args
from weakref import WeakKeyDictionary

import numpy as np
import torch
import trimesh
from diffusers.utils import BaseOutput
from torch import Tensor

from backlot.cameras import make_pose, project, rotation_z, transform
from backlot.loading import ExportedPipeline
from pipelines.vpog.correspondences import (
    Correspondences,
    Flow,
    covered_patches,
    gather_correspondences,
    object_points,
)
from pipelines.vpog.model import VPOGModel, VPOGOutput
from pipelines.vpog.query import Picture, Query, box_of, crop_query, read_box, read_mask, read_picture
from pipelines.vpog.retrieval import Preselection, Views, choose_hypotheses, class_scores, preselect
from pipelines.vpog.solve import PoseSolution, Solver, choose_solver, place_template, reprojection_errors, solve_pose
from pipelines.vpog.templates import TemplateSet, render_template_set, turn
from pipelines.vpog.token_cache import TokenCache, model_sha256, pictures_sha256

DEFAULT_VIEWS = 162  # of a mesh
OPAQUE = 127  # alpha above it is the object
InPlane = Literal["network", "rotate_templates"]
Combine = Literal["pool", "each"]


@dataclass(frozen=True)
class PoseEstimate:
    """One answer.

    Args:
        camera_from_object: (4, 4) float64, metres, OpenCV axes.
        score: in [0, 1]; the larger, the surer.
        inliers: (M,) bool, which correspondences agree with the pose; none where it is a template's, placed by the
            box, because no pose was found.
        template_indices: (S,) the templates it was made from, of the set that was given.
        in_plane_copies: (S,) by how many of `num_rotations` turns each was rotated.
        correspondences: what the network said, in pixels of the crop.
        crop_from_picture: (3, 3) affine from pixels of the picture to those of the crop.
    """

    camera_from_object: np.ndarray
    score: float
    inliers: np.ndarray
    template_indices: np.ndarray
    in_plane_copies: np.ndarray
    correspondences: Correspondences
    crop_from_picture: np.ndarray


@dataclass
class VPOGPipelineOutput(BaseOutput):
    """What the pipeline finds.

    Args:
        estimates: the best first.
        template_scores: (T,) float32, how much each template looks like the query, the best of its turns; -inf for
            those that the encoder's tokens ruled out.
        query: (3, S, S) float32 in [0, 1], the crop that the network saw first.
    """

    estimates: list[PoseEstimate]
    template_scores: np.ndarray
    query: Tensor


@dataclass(frozen=True)
class PreparedTemplates:
    """A template set and what the network needs of it, T = copies x V templates.

    Args:
        templates: the V templates as they were given.
        views: of the T templates.
        tokens: (T, N, C).
        patches: (T, N) bool, which show the object.
    """

    templates: TemplateSet
    views: Views
    tokens: Tensor
    patches: Tensor

    def surface(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Depth (S, H, W) of some templates in metres, 0 = no surface, and the object's points (S, H, W, 3)."""
        number = len(self.templates)
        turned = [
            turned_copy(self.templates.subset([row % number]), row // number, self.views.copies).depth
            for row in rows.tolist()
        ]
        depth = torch.from_numpy(np.concatenate(turned))
        K = torch.from_numpy(self.templates.K)
        return depth, object_points(depth, K, self.views.camera_from_object[rows])


@dataclass(frozen=True)
class Settings:
    """How a pose is made from correspondences."""

    group_size: int = 4
    flow: Flow = "dense"
    combine: Combine = "pool"
    solver: Solver = "auto"
    threshold: float = 0.04
    max_points: int = 1500
    seed: int = 0


class VPOGPipeline(ExportedPipeline):
    """Poses by a trained `VPOGModel`.

    Args:
        model: the network.
        crop_padding: side of the query's crop over the longer side of its box, as in training.
        remove_background: whether a mask blackens what is not the object, as in training.
    """

    model_cpu_offload_seq = "model"

    def __init__(self, model: VPOGModel, crop_padding: float = 1.2, remove_background: bool = True):
        super().__init__()
        self.register_modules(model=model)
        self.register_to_config(crop_padding=crop_padding, remove_background=remove_background)
        self.token_cache = TokenCache()
        self._hashed: tuple[object, str] | None = None
        self._pictures: WeakKeyDictionary[TemplateSet, str] = WeakKeyDictionary()

    def enable_token_cache(self, folder: str | Path) -> None:
        """Keep tokens of templates in a folder, for this process and later ones."""
        self.token_cache = TokenCache(folder)

    @property
    def flows(self) -> list[Flow]:
        """What the network can give, the finest first."""
        return [flow for flow in ("dense", "center") if self.model.config[f"{flow}_flow"]] + ["none"]

    # --- inputs -----------------------------------------------------------------------------------------------------

    def check_inputs(
        self,
        K: object,
        templates: object,
        box: object,
        mask: object,
        num_hypotheses: int,
        num_candidates: int,
        num_templates: int | None,
        group_size: int,
        preselection: str,
        in_plane: str,
        num_rotations: int,
        flow: str,
        combine: str,
        solver: str,
        ransac_threshold: float,
        max_points: int,
    ) -> None:
        """Raise ValueError with the argument, what is allowed and what was given."""
        camera = np.asarray(K, dtype=np.float64)
        if camera.shape != (3, 3) or not np.isfinite(camera).all():
            raise ValueError(f"`K` must be 3 x 3 finite numbers, got {camera.tolist()}")
        if not (camera[[0, 1], [0, 1]] > 0).all() or camera[2].tolist() != [0, 0, 1]:
            raise ValueError(f"`K` must have focal lengths above 0 and the last row 0 0 1, got {camera.tolist()}")
        if box is None and mask is None:
            raise ValueError("`box` or `mask` must be given, got neither")
        if not isinstance(templates, TemplateSet | trimesh.Trimesh):
            raise ValueError(f"`templates` must be a TemplateSet or a trimesh.Trimesh, got {type(templates).__name__}")
        side = self.model.config.image_size
        if isinstance(templates, TemplateSet) and tuple(templates.rgba.shape[1:3]) != (side, side):
            raise ValueError(
                f"`templates` must be {side} x {side} pixels, got {' x '.join(map(str, templates.rgba.shape[1:3]))};"
                f" python -m data_prep.bop render_templates --size {side} renders them"
            )
        counts = {"num_hypotheses": num_hypotheses, "num_candidates": num_candidates, "group_size": group_size}
        counts |= {"num_rotations": num_rotations, "max_points": max_points}
        counts |= {} if num_templates is None else {"num_templates": num_templates}
        for name, count in counts.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {count!r}")
        choices = {"preselection": (preselection, Preselection), "in_plane": (in_plane, InPlane)}
        for name, (value, allowed) in (choices | {"combine": (combine, Combine), "solver": (solver, Solver)}).items():
            if value not in get_args(allowed):
                raise ValueError(f"`{name}` must be one of {', '.join(get_args(allowed))}, got {value!r}")
        if flow not in self.flows:
            raise ValueError(f"`flow` must be one of {', '.join(self.flows)} with this network, got {flow!r}")
        if not 0 < ransac_threshold < 1:
            raise ValueError(f"`ransac_threshold` must be in (0, 1), got {ransac_threshold}")

    def crop(self, picture: Tensor, K: Tensor, box: Tensor | None, mask: Tensor | None) -> Query:
        """The query as the network sees it; see `query.crop_query`."""
        return crop_query(
            picture,
            K,
            box,
            mask,
            size=self.model.config.image_size,
            patch_size=self.model.patch_size,
            padding=self.config.crop_padding,
            remove_background=self.config.remove_background,
        )

    # --- tokens -----------------------------------------------------------------------------------------------------

    def _encode(self, images: Tensor) -> Tensor:
        """Tokens (B, N, C) of pictures (B, 3, H, W) in [0, 1]."""
        return self.model(images.to(self._execution_device, self.model.dtype), encode_only=True)

    def _model_hash(self) -> str:
        """Of the network as it is now; weights are read again only when one of them was written or moved."""
        weights = self.model.state_dict(keep_vars=True).values()
        state = tuple((value.data_ptr(), value._version, value.dtype) for value in weights)
        if self._hashed is None or self._hashed[0] != state:
            settings = {key: value for key, value in self.model.config.items() if not key.startswith("_")}
            self._hashed = state, model_sha256(self.model, settings)
        return self._hashed[1]

    @torch.no_grad()
    def prepare_templates(
        self, templates: TemplateSet, num_rotations: int = 1, batch_size: int = 32
    ) -> PreparedTemplates:
        """Encode an object's templates, or take their tokens from the cache.

        Args:
            num_rotations: turns about the camera's axis in which each template is looked at.
            batch_size: pictures that are encoded together.
        """
        if templates not in self._pictures:
            self._pictures[templates] = pictures_sha256(templates.rgba, templates.K.tolist())

        def encode() -> dict[str, Tensor]:
            tokens, patches = [], []
            for copy in range(num_rotations):
                rgba = torch.from_numpy(turned_copy(templates, copy, num_rotations).rgba)
                tokens += [self._encode(to_network(part)) for part in rgba.split(batch_size)]
                patches.append(covered_patches(rgba[..., 3] > OPAQUE, self.model.patch_size))
            return {"tokens": torch.cat(tokens), "patches": torch.cat(patches)}

        key = f"{self._pictures[templates]}-{num_rotations}"
        found = self.token_cache.get(self._model_hash(), key, encode, self._execution_device)
        poses = torch.from_numpy(templates.camera_from_object)
        angles = 2 * math.pi * torch.arange(num_rotations, dtype=torch.float64) / num_rotations
        turned = make_pose(rotation_z(angles), torch.zeros(num_rotations, 3, dtype=torch.float64))[:, None] @ poses
        return PreparedTemplates(templates, Views(turned.flatten(0, 1), num_rotations), **found)

    # --- the network on groups of templates -------------------------------------------------------------------------

    def _match(self, query_tokens: Tensor, prepared: PreparedTemplates, groups: Tensor) -> VPOGOutput:
        """The network on one query (N, C) and groups (B, S) of templates; the first of each is the reference."""
        views, device = prepared.views, self._execution_device
        return self.model(
            rotations=views.rotations[groups].to(device, torch.float32),
            d_ref=views.directions[groups[:, 0]].to(device, torch.float32),
            reference_rotation=views.rotations[groups[:, 0]].to(device, torch.float32),
            query_tokens=query_tokens.expand(len(groups), -1, -1),
            template_tokens=prepared.tokens[groups.to(prepared.tokens.device)],
        )

    def _retrieve(
        self,
        query: Query,
        tokens: Tensor,
        prepared: PreparedTemplates,
        num_templates: int | None,
        group_size: int,
        preselection: Preselection,
        groups_per_batch: int = 8,
    ) -> Tensor:
        """How much each template looks like the query, (T,); -inf for those that were ruled out."""
        among, device = None, tokens.device
        patches = query.patches.to(device)
        if num_templates is not None and num_templates < len(prepared.views):
            alike = preselect(tokens, prepared.tokens, patches, prepared.patches, preselection)
            among = torch.zeros(len(alike), dtype=torch.bool)
            among[alike.topk(num_templates).indices.cpu()] = True
        groups = sorted(prepared.views.groups(group_size, among), key=len)
        total, count = torch.zeros(len(prepared.views)), torch.zeros(len(prepared.views))
        while groups:
            batch = [group for group in groups[:groups_per_batch] if len(group) == len(groups[0])]
            groups, batch = groups[len(batch) :], torch.stack(batch)
            scores = class_scores(self._match(tokens, prepared, batch).logits, patches).cpu()
            total.index_add_(0, batch.flatten(), scores.flatten())
            count.index_add_(0, batch.flatten(), torch.ones(batch.numel()))
        return torch.where(count > 0, total / count, -torch.inf)

    # --- poses ------------------------------------------------------------------------------------------------------

    def _estimate(
        self, query: Query, tokens: Tensor, prepared: PreparedTemplates, group: Tensor, settings: Settings
    ) -> PoseEstimate:
        """The pose by one group of templates (S,), the first of them the reference."""
        return self.solve(query, self._match(tokens, prepared, group[None]), prepared, group, settings)

    def solve(
        self, query: Query, output: VPOGOutput, prepared: PreparedTemplates, group: Tensor, settings: Settings
    ) -> PoseEstimate:
        """The pose that follows from what the network, or a label, says of a query and a group of templates (S,)."""
        depth, points = prepared.surface(group)
        poses = prepared.views.camera_from_object[group]
        logits = output.logits[0].float().cpu()
        flow, scale = read_flow(output, settings.flow)
        found = gather_correspondences(
            logits,
            output.buddies[0].cpu(),
            flow,
            scale,
            depth,
            points,
            query.patches,
        )
        best: tuple[float, Tensor, Tensor, Correspondences] | None = None
        for source in range(len(group)) if settings.combine == "each" else [None]:
            mine = found if source is None else found.select(found.templates == source)
            kept = mine.heaviest(settings.max_points)
            solution = self._ransac(kept, query, poses[source or 0], settings)
            if solution is None:
                continue
            errors = reprojection_errors(solution.camera_from_object, mine.points, mine.places, query.K)
            score = score_pose(logits, mine, errors <= self._pixels(settings), query.patches)
            if best is None or score > best[0]:
                best = score, solution.camera_from_object, solution.inliers, kept
        if best is None:
            extent = box_of(depth[0] > 0)
            K = torch.from_numpy(prepared.templates.K)
            pose = place_template(poses[0], K, extent, query.K, query.box_in_crop)
            kept = found.heaviest(settings.max_points)
            best = 0.0, pose, torch.zeros(len(kept), dtype=torch.bool), kept
        turns = len(prepared.views) // prepared.views.copies
        return PoseEstimate(
            camera_from_object=best[1].numpy(),
            score=best[0],
            inliers=best[2].numpy(),
            template_indices=(group % turns).numpy(),
            in_plane_copies=(group // turns).numpy(),
            correspondences=best[3],
            crop_from_picture=query.crop_from_picture.numpy(),
        )

    def _ransac(self, found: Correspondences, query: Query, frame: Tensor, settings: Settings) -> PoseSolution | None:
        return solve_pose(
            found,
            query.K,
            frame,
            threshold=self._pixels(settings),
            solver=settings.solver,
            seed=settings.seed,
        )

    def _pixels(self, settings: Settings) -> float:
        """The largest reprojection error of an inlier in pixels of the crop."""
        return settings.threshold * self.model.config.image_size

    def _look_again(
        self,
        first: PoseEstimate,
        query: Query,
        tokens: Tensor,
        prepared: PreparedTemplates,
        recrop: tuple[Tensor, Tensor] | None,
        settings: Settings,
    ) -> PoseEstimate:
        """The pose by the templates nearest to an estimate, where that is surer.

        Args:
            recrop: picture and K, to crop it round the estimate; None where a mask says what to crop.
        """
        pose = torch.from_numpy(first.camera_from_object)
        group = prepared.views.nearest(pose, settings.group_size)
        if recrop is not None:
            picture, K = recrop
            depth, points = prepared.surface(group)
            box = projected_box(points[depth > 0], pose, K)
            height, width = picture.shape[1:]
            if box is not None and box[2] > 0 and box[3] > 0 and box[0] < width and box[1] < height:
                query = self.crop(picture, K, box, None)
                tokens = self._encode(query.image[None])[0]
        second = self._estimate(query, tokens, prepared, group, settings)
        return second if second.score > first.score else first

    @torch.no_grad()
    def __call__(
        self,
        image: Picture,
        K: np.ndarray | Tensor | list,
        templates: TemplateSet | trimesh.Trimesh,
        *,
        box: np.ndarray | Tensor | list | None = None,
        mask: Picture | None = None,
        num_hypotheses: int = 1,
        num_candidates: int = 3,
        num_templates: int | None = None,
        group_size: int = 4,
        preselection: Preselection = "mean",
        second_pass: bool = False,
        in_plane: InPlane = "network",
        num_rotations: int = 12,
        flow: Flow | None = None,
        combine: Combine = "pool",
        solver: Solver = "auto",
        ransac_threshold: float = 0.04,
        max_points: int = 1500,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> VPOGPipelineOutput | tuple[list[PoseEstimate]]:
        """Find the pose of one object.

        Args:
            image: any picture, see `query.read_picture`.
            K: (3, 3) its camera, in pixels whose centres lie at integers.
            templates: pictures of the object, or its mesh in metres, of which they are rendered.
            box: x1 y1 x2 y2, edges of pixels, x2 and y2 exclusive; may reach out of the picture.
            mask: (H, W), its visible pixels; the box is the mask's if left out.
            num_hypotheses: answers, the best first.
            num_candidates: groups of views that are turned into poses, of which the best are the answers; at least as
                many as these.
            num_templates: how many the encoder's tokens leave for the network; all if None.
            group_size: templates that the network sees together.
            preselection: how these tokens are compared, by their "mean" or by "patches".
            second_pass: crop again round the estimate, and look at the templates nearest to it.
            in_plane: whether turns in the picture are left to the network or each template is turned, too.
            num_rotations: in so many steps.
            flow: "dense" of all pixels, "center" of the buddies' centres alone, or "none": the classes alone; the first
                that the network has if left out.
            combine: RANSAC over the points of a group's templates together ("pool") or of each.
            solver: of RANSAC: poselib, opencv, or the first of them that is installed.
            ransac_threshold: largest reprojection error of an inlier over the crop's side, in (0, 1).
            max_points: correspondences that are kept, the heaviest.
            generator: gives RANSAC's seed; the same one each time without it.
        """
        flow = self.flows[0] if flow is None else flow
        self.check_inputs(
            *(K, templates, box, mask, num_hypotheses, num_candidates, num_templates, group_size, preselection),
            *(in_plane, num_rotations, flow, combine, solver, ransac_threshold, max_points),
        )
        choose_solver(solver)  # before any work
        picture, K = read_picture(image), torch.as_tensor(np.asarray(K), dtype=torch.float64)
        height, width = picture.shape[1:]
        mask = None if mask is None else read_mask(mask, height, width)
        box = None if box is None else read_box(box, height, width)
        if isinstance(templates, trimesh.Trimesh):
            templates = render_template_set(templates, 0, DEFAULT_VIEWS, self.model.config.image_size)
        query = self.crop(picture, K, box, mask)
        seed = 0 if generator is None else int(torch.randint(2**31, (), generator=generator, device=generator.device))
        settings = Settings(group_size, flow, combine, solver, ransac_threshold, max_points, seed)

        prepared = self.prepare_templates(templates, num_rotations if in_plane == "rotate_templates" else 1)
        tokens = self._encode(query.image[None])[0]
        scores = self._retrieve(query, tokens, prepared, num_templates, group_size, preselection)
        groups = choose_hypotheses(scores, prepared.views, max(num_hypotheses, num_candidates), group_size)
        estimates = [self._estimate(query, tokens, prepared, group, settings) for group in groups]
        estimates = sorted(estimates, key=lambda estimate: -estimate.score)[:num_hypotheses]
        if second_pass:
            recrop = None if mask is not None else (picture, K)
            estimates = [self._look_again(each, query, tokens, prepared, recrop, settings) for each in estimates]
            estimates.sort(key=lambda estimate: -estimate.score)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (estimates,)
        by_view = scores.reshape(prepared.views.copies, -1).amax(dim=0)
        return VPOGPipelineOutput(estimates, by_view.numpy(), query.image)


def read_flow(output: VPOGOutput, flow: Flow) -> tuple[Tensor, Tensor | None]:
    """Flow and its scale for the one query of an output, as `gather_correspondences` takes them."""
    if flow == "dense":
        return output.flow[0].float().cpu(), output.scale[0].float().cpu()
    if flow == "center":
        return output.center_flow[0, :, :, None, None].float().cpu(), None
    return torch.zeros(*output.buddies.shape[1:], 1, 1, 2), None


def score_pose(logits: Tensor, found: Correspondences, agrees: Tensor, object_patches: Tensor) -> float:
    """How sure a pose is, in [0, 1]: mean over the object's patches of class probability x share that agrees.

    Args:
        logits: (S, N, N + 1).
        found: all correspondences that the pose could be made from, before the heaviest were chosen.
        agrees: (M,) bool, which of them agree with it.
        object_patches: (N,) bool; one without correspondences counts 0.
    """
    templates, number = logits.shape[:2]
    key = found.templates * number + found.patches
    count, agreeing = (torch.bincount(key[rows], minlength=templates * number) for rows in (slice(None), agrees))
    share = (agreeing / count.clamp(min=1)).reshape(templates, number)
    per_patch = (logits.softmax(dim=-1)[..., :-1].amax(dim=-1) * share).amax(dim=0)
    return float(per_patch[object_patches].mean())


def projected_box(points: Tensor, camera_from_object: Tensor, K: Tensor) -> Tensor | None:
    """Edges (4,) of where a pose shows points (P, 3) of the surface; None if they are not all before the camera."""
    seen = transform(camera_from_object, points)
    if len(seen) == 0 or not (seen[:, 2] > 0).all():
        return None
    places = project(K, seen) + 0.5
    return torch.cat([places.amin(dim=0), places.amax(dim=0)])


def to_network(rgba: Tensor) -> Tensor:
    """Templates (T, H, W, 4) uint8 as the network sees them: (T, 3, H, W) in [0, 1], black beside the object."""
    pixels = rgba.permute(0, 3, 1, 2).float()
    return pixels[:, :3] * (pixels[:, 3:] / 255**2)


def turned_copy(templates: TemplateSet, copy: int, copies: int) -> TemplateSet:
    """One of the turned copies of `TemplateSet.rotate_in_plane`; the first is the set itself."""
    return turn(templates, 2 * math.pi * copy / copies) if copy else templates
