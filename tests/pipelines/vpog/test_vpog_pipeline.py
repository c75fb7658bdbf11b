"""VPOGPipeline: what it takes and refuses, that its answers are the network's, and that nothing arbitrary matters."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from vpog_pose_samples import CAMERA, HALF, PATCH, SIZE, look, make_scene, rotation, turn

from backlot.cameras import rotation_angle
from backlot.mesh_views import render_views
from pipelines.vpog import TemplateSet, VPOGModel, VPOGPipeline, render_template_set
from pipelines.vpog.generate import main
from pipelines.vpog.model import VPOGOutput
from pipelines.vpog.pipeline import Settings, projected_box
from pipelines.vpog.query import crop_query, read_picture
from pipelines.vpog.retrieval import Views, class_scores

K = np.array([[260.0, 0, 79.5], [0, 262.0, 59.5], [0, 0, 1]])


def build(seed: int = 0, **changed) -> VPOGModel:
    """A small network whose answers differ from place to place."""
    torch.manual_seed(seed)
    model = VPOGModel.from_preset("tiny", **changed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def coloured_cuboid() -> trimesh.Trimesh:
    mesh = trimesh.creation.box(2 * HALF.numpy()).subdivide().subdivide()
    colours = np.random.default_rng(0).integers(20, 255, (len(mesh.vertices), 4), dtype=np.uint8)
    colours[:, 3] = 255
    return trimesh.Trimesh(mesh.vertices, mesh.faces, vertex_colors=colours, process=False)


@pytest.fixture(scope="module")
def templates():
    return render_template_set(coloured_cuboid(), 7, views=42, size=SIZE)


@pytest.fixture(scope="module")
def scene():
    """A picture (120, 160), the object's mask, its pose and its box."""
    pose = look(rotation(torch.Generator().manual_seed(3)), 0.02, -0.01, 0.5)
    views = render_views([coloured_cuboid()], pose[None, None].numpy(), K, (120, 160))
    noise = np.random.default_rng(1).integers(0, 255, (120, 160, 3), dtype=np.uint8)
    mask = views.instances[0] == 0
    picture = np.where(mask[..., None], views.rgb[0], noise)
    rows, columns = np.nonzero(mask)
    box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    return SimpleNamespace(picture=picture, mask=mask, pose=pose, box=[int(x) for x in box])


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture
def pipeline(model):
    return VPOGPipeline(model)


def same(first, second) -> bool:
    return all(
        np.array_equal(a.camera_from_object, b.camera_from_object) and a.score == b.score
        for a, b in zip(first.estimates, second.estimates, strict=True)
    )


def degrees(first, second) -> float:
    first, second = (torch.as_tensor(each)[:3, :3].double() for each in (first, second))
    return float(rotation_angle(first, second).rad2deg())


# --- the whole ------------------------------------------------------------------------------------------------------


def test_an_export_gives_the_same_poses(pipeline, templates, scene, tmp_path):
    pipeline = VPOGPipeline(pipeline.model, crop_padding=1.3, remove_background=False)
    pipeline.save_pretrained(tmp_path)
    again = VPOGPipeline.from_pretrained(tmp_path)
    assert (again.config.crop_padding, again.config.remove_background) == (1.3, False)
    arguments = {"mask": scene.mask, "num_hypotheses": 3}
    assert same(pipeline(scene.picture, K, templates, **arguments), again(scene.picture, K, templates, **arguments))


def test_answers_are_the_networks_and_the_same_each_time(pipeline, templates, scene):
    answers = [each(scene.picture, K, templates, mask=scene.mask) for each in (pipeline, pipeline)]
    assert same(*answers)
    other = VPOGPipeline(build(1))(scene.picture, K, templates, mask=scene.mask)
    assert not np.allclose(other.template_scores, answers[0].template_scores)
    mine, theirs = (each.estimates[0].correspondences.places for each in (answers[0], other))
    assert mine.shape != theirs.shape or not torch.allclose(mine, theirs)


def test_hypotheses_come_best_first_from_different_views(pipeline, templates, scene):
    output = pipeline(scene.picture, K, templates, box=scene.box, num_hypotheses=4)
    scores = [estimate.score for estimate in output.estimates]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 1 for score in scores)
    firsts = [int(estimate.template_indices[0]) for estimate in output.estimates]
    assert len(set(firsts)) == 4
    assert firsts.count(int(output.template_scores.argmax())) == 1
    for estimate in output.estimates:
        R = estimate.camera_from_object[:3, :3]
        assert np.linalg.norm(R @ R.T - np.eye(3)) < 1e-9
        assert len(estimate.inliers) == len(estimate.correspondences) <= 1500
    assert (
        pipeline(scene.picture, K, templates, box=scene.box, num_hypotheses=4, return_dict=False)[0][0].score
        == scores[0]
    )


@pytest.mark.parametrize("encoding", ["s2_smooth", "so3"])
def test_another_cad_frame_changes_no_pose(templates, scene, encoding):
    pipeline = VPOGPipeline(build(view_encoding=encoding))
    gauge = look(rotation(torch.Generator().manual_seed(9)), 0, 0, 0).numpy()
    turned = replace(templates, camera_from_object=templates.camera_from_object @ gauge)
    arguments = {"mask": scene.mask, "num_hypotheses": 2, "second_pass": True}
    first = pipeline(scene.picture, K, templates, **arguments)
    second = pipeline(scene.picture, K, turned, **arguments)
    assert np.allclose(first.template_scores, second.template_scores, atol=1e-4)
    for a, b in zip(first.estimates, second.estimates, strict=True):
        assert degrees(a.camera_from_object @ gauge, b.camera_from_object) < 0.1


def test_true_labels_give_the_pose_and_a_score_that_garbage_does_not_reach(model):
    pipeline = VPOGPipeline(model)
    for seed in (0, 1):
        scene = make_scene(seed)
        depth = scene.template_depth.float().numpy()
        rgba = np.where(depth[..., None] > 0, 255, 0).astype(np.uint8).repeat(4, axis=-1)
        known = TemplateSet(rgba, depth, scene.template_poses.numpy(), CAMERA.numpy(), 0.15, 1)
        prepared = pipeline.prepare_templates(known)
        query = crop_query(
            *(torch.zeros(3, SIZE, SIZE), CAMERA, torch.tensor([0.0, 0, SIZE, SIZE]).double()),
            *(None,),
            size=SIZE,
            patch_size=PATCH,
            padding=1.0,
            remove_background=True,
        )
        query = replace(query, patches=scene.object_patches)
        assert torch.allclose(query.K, CAMERA)
        group = torch.arange(len(scene.buddies))
        answers = [
            VPOGOutput(scene.logits[None], scene.buddies[None], flow[None], scene.scale[None], None)
            for flow in (scene.flow, 2 * torch.randn(scene.flow.shape))
        ]
        right, wrong = (pipeline.solve(query, each, prepared, group, Settings()) for each in answers)
        assert degrees(right.camera_from_object, scene.query_pose) < 0.05
        assert np.linalg.norm(right.camera_from_object[:3, 3] - scene.query_pose[:3, 3].numpy()) < 1e-3 * 0.23
        assert right.score > 0.7 > 0.4 > wrong.score
        each = pipeline.solve(query, answers[0], prepared, group, Settings(combine="each"))
        assert degrees(each.camera_from_object, scene.query_pose) < 0.05
        assert len(set(each.correspondences.templates[torch.from_numpy(each.inliers)].tolist())) == 1


# --- the network's calls --------------------------------------------------------------------------------------------


def calls_of(pipeline) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """From now on: shapes of the template tokens of each call, and of the images that were encoded."""
    groups, images = [], []

    def note(module, args, kwargs):
        if kwargs.get("encode_only"):
            images.append(tuple(args[0].shape))
        else:
            groups.append(tuple(kwargs["template_tokens"].shape))

    pipeline.model.register_forward_pre_hook(note, with_kwargs=True)
    return groups, images


def test_groups_are_small_and_every_picture_is_encoded_once(templates, scene):
    pipeline = VPOGPipeline(build())
    groups, images = calls_of(pipeline)
    pipeline(scene.picture, K, templates, box=scene.box, group_size=3)
    assert groups
    assert {shape[1] for shape in groups} == {3}
    assert sum(shape[0] for shape in images) == 1 + len(templates)
    images.clear()
    pipeline(scene.picture, K, templates, box=scene.box, num_templates=9, preselection="patches")
    assert sum(shape[0] for shape in images) == 1


def test_the_encoder_leaves_as_many_templates_as_asked(pipeline, templates, scene):
    for preselection in ("mean", "patches"):
        output = pipeline(scene.picture, K, templates, mask=scene.mask, num_templates=9, preselection=preselection)
        assert np.isfinite(output.template_scores).sum() == 9


def test_tokens_on_disk_are_used_but_never_after_the_weights_changed(templates, scene, tmp_path):
    pipeline = VPOGPipeline(build())
    pipeline.enable_token_cache(tmp_path)
    first = pipeline(scene.picture, K, templates, mask=scene.mask)
    again = VPOGPipeline(build())
    again.enable_token_cache(tmp_path)
    _, images = calls_of(again)
    assert same(first, again(scene.picture, K, templates, mask=scene.mask))
    assert sum(shape[0] for shape in images) == 1
    with torch.no_grad():
        again.model.encoder.patch_embed.weight.mul_(1.5)
    changed = again(scene.picture, K, templates, mask=scene.mask)
    again.token_cache = type(again.token_cache)()
    assert same(changed, again(scene.picture, K, templates, mask=scene.mask))
    assert not np.allclose(changed.template_scores, first.template_scores)


def test_turned_templates_are_looked_at_in_every_turn(pipeline, templates, scene):
    groups, _ = calls_of(pipeline)
    few = templates.subset(range(0, 42, 3))
    output = pipeline(scene.picture, K, few, mask=scene.mask, in_plane="rotate_templates", num_rotations=4)
    assert output.template_scores.shape == (14,)
    assert sum(shape[0] * shape[1] for shape in groups) >= 4 * 14
    estimate = output.estimates[0]
    assert estimate.template_indices.max() < 14
    assert len(set(estimate.template_indices.tolist())) == len(estimate.template_indices) == 4
    assert set(estimate.in_plane_copies.tolist()) <= {0, 1, 2, 3}


def test_a_turned_template_is_that_of_the_rotated_set(pipeline, templates):
    few = templates.subset(range(5))
    prepared, turned = pipeline.prepare_templates(few, 3), few.rotate_in_plane(3)
    assert np.allclose(prepared.views.camera_from_object, turned.camera_from_object, atol=1e-12)
    rows = torch.tensor([2, 8, 14])
    assert np.array_equal(prepared.surface(rows)[0], turned.depth[rows])
    alone = pipeline.prepare_templates(turned)
    assert torch.equal(prepared.patches, alone.patches)
    assert torch.allclose(prepared.tokens, alone.tokens, atol=1e-5)


def test_a_second_pass_is_never_less_sure(pipeline, templates, scene):
    for where in ({"box": scene.box}, {"mask": scene.mask}):
        once = pipeline(scene.picture, K, templates, **where).estimates[0]
        twice = pipeline(scene.picture, K, templates, second_pass=True, **where).estimates[0]
        assert twice.score >= once.score


def test_without_enough_points_the_best_template_is_placed_in_the_box(pipeline, templates, scene):
    output = pipeline(scene.picture, K, templates, mask=scene.mask, max_points=1)
    estimate = output.estimates[0]
    assert estimate.score == 0
    assert not estimate.inliers.any()
    assert 0.5 < estimate.camera_from_object[2, 3] / scene.pose[2, 3] < 2
    surface = pipeline.prepare_templates(templates)
    best = estimate.template_indices[:1]
    depth, points = surface.surface(torch.from_numpy(best))
    drawn = projected_box(points[depth > 0], torch.from_numpy(estimate.camera_from_object), torch.from_numpy(K))
    assert (drawn - torch.tensor(scene.box)).reshape(2, 2).mean(dim=0).abs().max() < 0.08 * 70  # of the longer side
    assert (drawn - torch.tensor(scene.box)).abs().max() < 25


def test_classes_alone_or_centres_give_poses_too(templates, scene, pipeline):
    for flow in ("center", "none"):
        found = pipeline(scene.picture, K, templates, mask=scene.mask, flow=flow).estimates[0].correspondences
        assert found.weights.max() <= 1
    plain = VPOGPipeline(build(dense_flow=False, center_flow=False))
    assert plain.flows == ["none"]
    assert plain(scene.picture, K, templates, mask=scene.mask).estimates
    with pytest.raises(ValueError, match=r"`flow` must be one of none with this network, got 'dense'"):
        plain(scene.picture, K, templates, mask=scene.mask, flow="dense")


def test_half_precision_works(templates, scene):
    pipeline = VPOGPipeline(build()).to(torch.bfloat16)
    output = pipeline(scene.picture, K, templates, mask=scene.mask)
    assert np.isfinite(output.template_scores).all()
    assert np.isfinite(output.estimates[0].camera_from_object).all()


def test_a_mesh_is_rendered(pipeline, scene, templates, monkeypatch):
    monkeypatch.setattr("pipelines.vpog.pipeline.DEFAULT_VIEWS", 42)
    fresh = pipeline(scene.picture, K, coloured_cuboid(), mask=scene.mask)
    assert same(fresh, pipeline(scene.picture, K, templates, mask=scene.mask))


# --- pictures, boxes and masks --------------------------------------------------------------------------------------


def test_every_kind_of_picture_is_read_alike(scene):
    picture = scene.picture
    expected = torch.from_numpy(picture).permute(2, 0, 1) / 255
    opaque = np.concatenate([picture, np.full_like(picture[..., :1], 255)], axis=-1)
    for image in (Image.fromarray(picture), picture, opaque, Image.fromarray(opaque), expected, picture / 255.0):
        assert torch.allclose(read_picture(image), expected, atol=1e-6)
    grey = picture[..., 0]
    for image in (grey, Image.fromarray(grey), grey[..., None], torch.from_numpy(grey.copy())[None]):
        assert torch.equal(read_picture(image), (torch.from_numpy(grey.copy()) / 255).expand(3, -1, -1))


def test_the_background_is_black_only_where_training_had_it_so(scene):
    picture, mask = read_picture(scene.picture), torch.from_numpy(scene.mask)
    arguments = {"size": SIZE, "patch_size": PATCH, "padding": 1.2}
    black, seen = (
        crop_query(picture, torch.eye(3), None, mask, remove_background=each, **arguments) for each in (True, False)
    )
    beside = (black.image == 0).all(dim=0)
    assert 0.2 < beside.double().mean() < 0.8
    assert seen.image[:, beside].mean() > 0.3
    assert torch.equal(black.image[:, ~beside], seen.image[:, ~beside])
    assert torch.equal(black.patches, seen.patches)
    assert 0.1 < black.patches.double().mean() < 0.9


def test_the_crop_is_one_exact_affine(scene):
    query = crop_query(
        *(read_picture(scene.picture), torch.from_numpy(K), torch.tensor(scene.box).double(), None),
        size=SIZE,
        patch_size=PATCH,
        padding=1.2,
        remove_background=True,
    )
    assert torch.allclose(query.K, query.crop_from_picture @ torch.from_numpy(K), atol=1e-12)
    x1, y1, x2, y2 = query.box_in_crop.tolist()
    assert max(x2 - x1, y2 - y1) == pytest.approx(SIZE / 1.2)
    assert (x1 + x2) / 2 == pytest.approx(SIZE / 2)
    assert (y1 + y2) / 2 == pytest.approx(SIZE / 2)


def test_a_box_may_reach_out_of_the_picture(pipeline, templates, scene):
    for box in ([-30, -20, 50, 40], [100, 70, 400, 300], [-500, -500, 900, 900]):
        assert np.isfinite(pipeline(scene.picture, K, templates, box=box).estimates[0].camera_from_object).all()


WRONG = [
    ({"box": None}, r"`box` or `mask` must be given, got neither"),
    ({"box": [200, 10, 220, 30]}, r"`box` must overlap the picture of 160 x 120 pixels, got \[200.0"),
    ({"box": [30, 10, 20, 30]}, r"`box` must be x1 y1 x2 y2 with x1 < x2"),
    ({"box": [1, 2, 3]}, r"`box` must be four numbers"),
    ({"box": [1, 2, 3, float("nan")]}, r"`box` must be four numbers"),
    ({"mask": np.zeros((120, 160), bool)}, r"`mask` must show the object, got one without any pixel"),
    ({"mask": np.ones((160, 120), bool)}, r"`mask` must be of the picture's size \(120, 160\), got \(160, 120\)"),
    ({"mask": np.eye(160)[:120] > 0, "box": [100, 0, 104, 4]}, r"`mask` must show the object within `box`"),
    ({"K": np.eye(2)}, r"`K` must be 3 x 3 finite numbers"),
    ({"K": np.diag([-1.0, 1, 1])}, r"`K` must have focal lengths above 0"),
    ({"image": np.zeros((2, 120, 160, 3), np.uint8)}, r"`image` must be one picture of 1, 3 or 4 channels"),
    ({"image": np.full((120, 160, 3), 7.0)}, r"`image` must be in \[0, 1\], got values from 7 to 7"),
    ({"image": "photo.png"}, r"`image` must be a Pillow image, an array or a tensor, got str"),
    ({"templates": None}, r"`templates` must be a TemplateSet or a trimesh.Trimesh, got NoneType"),
    ({"num_hypotheses": 0}, r"`num_hypotheses` must be an integer of at least 1, got 0"),
    ({"group_size": 1.5}, r"`group_size` must be an integer of at least 1, got 1.5"),
    ({"in_plane": "spin"}, r"`in_plane` must be one of network, rotate_templates, got 'spin'"),
    ({"combine": "mix"}, r"`combine` must be one of pool, each, got 'mix'"),
    ({"solver": "magic"}, r"`solver` must be one of auto, poselib, opencv, got 'magic'"),
    ({"preselection": "best"}, r"`preselection` must be one of mean, patches, got 'best'"),
    ({"ransac_threshold": 0.0}, r"`ransac_threshold` must be in \(0, 1\), got 0.0"),
]


@pytest.mark.parametrize(("changed", "message"), WRONG, ids=[f"{next(iter(c))}-{n}" for n, (c, _) in enumerate(WRONG)])
def test_what_is_wrong_is_said_in_one_line(pipeline, templates, scene, changed, message):
    arguments = {"image": scene.picture, "K": K, "templates": templates, "box": scene.box} | changed
    with pytest.raises(ValueError, match=message) as error:
        pipeline(**arguments)
    assert "\n" not in str(error.value)


def test_templates_of_another_size_name_the_command_that_renders_them(pipeline, scene):
    small = render_template_set(coloured_cuboid(), 7, views=42, size=32)
    with pytest.raises(ValueError, match=r"`templates` must be 64 x 64 pixels, got 32 x 32; .* --size 64"):
        pipeline(scene.picture, K, small, box=scene.box)


# --- views ----------------------------------------------------------------------------------------------------------


def test_groups_are_neighbours_round_the_first_and_hold_every_template(templates):
    views = Views(torch.from_numpy(templates.camera_from_object))
    groups = list(views.groups(4))
    assert set(torch.cat(groups).tolist()) == set(range(42))
    assert len(groups) < 25
    for group in groups:
        assert len(set(group.tolist())) == 4
        angles = (views.directions[group] @ views.directions[group[0]]).clamp(-1, 1).acos().rad2deg()
        assert angles[0] < 1e-3
        assert angles.max() < 40
    among = torch.arange(42) < 5
    assert set(torch.cat(list(views.groups(4, among))).tolist()) == set(range(5))


def test_of_the_turns_of_a_view_the_nearest_is_taken(templates):
    turned = templates.rotate_in_plane(6)
    views = Views(torch.from_numpy(turned.camera_from_object), copies=6)
    target = turn("z", 118.0) @ torch.from_numpy(templates.camera_from_object[20])
    found = views.nearest(target, 4)
    assert int(found[0]) == 2 * 42 + 20
    assert len(set((found % 42).tolist())) == 4
    angles = rotation_angle(views.rotations[found], target[:3, :3].expand(4, 3, 3)).rad2deg()
    assert angles.max() < 55


def test_class_scores_count_the_objects_patches_only():
    logits = torch.full((1, 2, 4, 5), -20.0)
    logits[0, 0, :, 1] = 20.0
    logits[0, 1, :, 4] = 20.0  # unseen
    logits[0, 1, 0, 4], logits[0, 1, 0, 2] = -20.0, 20.0
    patches = torch.tensor([True, True, False, False])
    assert class_scores(logits, patches)[0].tolist() == pytest.approx([1.0, 0.5], abs=1e-5)


def test_templates_are_whole(templates):
    alpha = templates.rgba[..., 3]
    assert not np.concatenate([alpha[:, 0], alpha[:, -1], alpha[:, :, 0], alpha[:, :, -1]]).any()
    assert (alpha > 0).any(axis=(1, 2)).all()


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, pipeline, templates, scene):
    pipeline.save_pretrained(tmp_path / "model")
    templates.save(tmp_path / "templates" / "000007.safetensors")
    Image.fromarray(scene.picture).save(tmp_path / "photo.png")
    Image.fromarray(scene.mask).save(tmp_path / "mask.png")
    camera = [str(x) for x in (K[0, 0], K[1, 1], K[0, 2], K[1, 2])]
    return [
        *(str(tmp_path / "model"), "--image", str(tmp_path / "photo.png"), "--K", *camera),
        *("--templates", str(tmp_path / "templates" / "000007.safetensors")),
        *("--output", str(tmp_path / "out" / "pose.json"), "--device", "cpu"),
    ]


def test_the_command_writes_poses_and_a_picture(files, tmp_path, pipeline, templates, scene, capsys):
    main([*files, "--mask", str(tmp_path / "mask.png"), "--num_hypotheses", "2"])
    written = json.loads((tmp_path / "out" / "pose.json").read_text())["poses"]
    saved = type(templates).load(tmp_path / "templates" / "000007.safetensors")
    seed = torch.Generator().manual_seed(0)
    expected = pipeline(scene.picture, K, saved, mask=scene.mask, num_hypotheses=2, generator=seed)
    for pose, estimate in zip(written, expected.estimates, strict=True):
        assert np.allclose(pose["camera_from_object"], estimate.camera_from_object, atol=1e-12)
        assert pose["score"] == estimate.score
    picture = Image.open(tmp_path / "out" / "pose.png")
    assert picture.size == (480, 360)
    plain = np.asarray(Image.fromarray(scene.picture).resize((480, 360), Image.Resampling.NEAREST), int)
    assert (np.abs(np.asarray(picture, int) - plain).max(axis=-1) > 30).mean() > 0.01
    assert "score" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--box or --mask must be given"),
        (["--box", "200", "10", "220", "30"], "`box` must overlap the picture"),
        (["--box", "1", "2", "30", "40", "--image", "none.png"], "there is no such file"),
        (["--box", "1", "2", "30", "40", "--templates", "none.safetensors"], "render_templates"),
        (["--box", "1", "2", "30", "40", "--K", "1", "2"], "must be 4 or 9 numbers"),
    ],
)
def test_the_command_names_what_is_wrong(files, capsys, more, message):
    with pytest.raises(SystemExit) as stop:
        main([*files, *more])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
