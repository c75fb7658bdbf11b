"""Evaluation of scenes: an oracle, a shifted one and a blind one measured on scenes on disk; noise, report, program."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from diffusers import FlowMapEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn

from backlot.rendering import mesh_colors, object_color
from data_prep.scenes.dataset import SceneDataset
from data_prep.scenes.format import pack_occupancy, write_scene
from evaluation.shortcut_scene.__main__ import main
from evaluation.shortcut_scene.measure import (
    LAYOUT_METRICS,
    SHAPE_METRICS,
    Objects,
    evaluate,
    generate,
    measure_layout,
    measure_shapes,
    measure_vae,
    needed_conditions,
    noise_generator,
    over_scenes,
    show,
    unpad,
)
from evaluation.shortcut_scene.metrics import Boxes
from evaluation.shortcut_scene.report import format_report, has_floor
from pipelines.shortcut_scene import (
    OccupancyVAE,
    PoseCodec,
    SceneShortcutTransformer,
    ShortcutScenePipeline,
    rotation_6d,
)

SIDE = 8  # pixels, and voxels
COUNTS = [2, 3, 4]
CEILING = np.mean([1 - (1 - 1 / n) ** n for n in COUNTS])
TOKENS = {"shape": (8, 4), "6drotation_normalized": (1, 6), "scale": (1, 3), "translation": (1, 3)}


def make_latents(count: int, seed: int) -> dict[str, Tensor]:
    """Boxes in a row on the floor, turned by some yaw, 1 m apart; shapes are noise."""
    generator = torch.Generator().manual_seed(seed)
    size = 0.2 + 0.3 * torch.rand(count, 3, generator=generator)
    angle = torch.rand(count, generator=generator)
    rotation = torch.eye(3).repeat(count, 1, 1)
    rotation[:, 0, 0] = rotation[:, 1, 1] = angle.cos()
    rotation[:, 1, 0], rotation[:, 0, 1] = angle.sin(), -angle.sin()
    place = torch.rand(count, 3, generator=generator) * 0.1
    place[:, 0] += torch.arange(count)
    place[:, 2] = size[:, 2] / 2
    return {
        "shape": torch.randn(count, *TOKENS["shape"], generator=generator),
        "6drotation_normalized": rotation_6d(rotation)[:, None],
        "scale": size.log()[:, None],
        "translation": place[:, None],
    }


def write(folder, latents: dict[str, Tensor], mark: int = 0, **metadata) -> None:
    """A scene whose picture is of one brightness, by which an oracle knows it."""
    image = torch.full((3, SIDE, SIDE), mark, dtype=torch.uint8)
    masks = torch.ones(len(latents["shape"]), SIDE, SIDE, dtype=torch.uint8)
    known = {"num_objects": len(latents["shape"]), "frame": "floor", "shape_layout": "tokens_channels"}
    write_scene(folder, tensors=latents, conditionals={"image": image, "masks": masks}, metadata=known | metadata)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three scenes of two, three and four objects; in the last two objects stand in one another."""
    root = tmp_path_factory.mktemp("scenes")
    for mark, count in enumerate(COUNTS):
        latents = make_latents(count, mark)
        if mark == 2:
            latents["translation"][1, 0, :2] = latents["translation"][0, 0, :2] + 0.05
        write(root / "val" / f"scene_{mark}", latents, mark)
    return root


@pytest.fixture(scope="module")
def dataset(root):
    return SceneDataset(root, "val", conditions=("image",), shuffle_objects=False)


class Oracle(ModelMixin, ConfigMixin):
    """Knows the data by their picture and goes there straight, then past it by `offset`."""

    @register_to_config
    def __init__(
        self,
        shape_tokens: int = 8,
        shape_channels: int = 4,
        condition: str = "image",
        condition_channels: int = 3,
        image_size: int = SIDE,
        object_condition: str = "shared",
        independent_t: bool = False,
        translation_scale: bool = False,
        use_shortcut: bool = True,
    ):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.scenes: list[dict[str, Tensor]] = []
        self.step_sizes: list[float] = []

    def forward(self, sample, timestep, step_size, object_mask, image, unconditional=None, masks=None):
        self.step_sizes.append(float(step_size[0]))
        marks = ((image[:, 0, 0, 0] + 1) * 127.5).round().long().tolist()
        velocity = {name: torch.zeros_like(x) for name, x in sample.items()}
        for row, mark in enumerate(marks):
            count = int(object_mask[row].sum())
            for name, x in sample.items():
                data = self.scenes[mark][name][:count]
                velocity[name][row, :count] = (data - x[row, :count]) / (1 - timestep[row])
        return type("Output", (), {"sample": velocity})


def oracle(dataset: SceneDataset, change=None, vae: OccupancyVAE | None = None, **config) -> ShortcutScenePipeline:
    """A pipeline that makes the scenes of a data set, changed by a function of the latents."""
    codec = PoseCodec.fit([{name: dataset[i][name] for name in TOKENS} for i in range(len(dataset))])
    network = Oracle(**config)
    for i in range(len(dataset)):
        latents = {name: dataset[i][name].clone() for name in TOKENS}
        network.scenes.append(codec.encode(latents if change is None else change(latents)))
    return ShortcutScenePipeline(network, FlowMapEulerDiscreteScheduler(), codec, vae)


def shifted(by: float):
    return lambda latents: latents | {"translation": latents["translation"] + torch.tensor([0, by, 0])}


def reversed_objects(latents: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.flip(0) for name, x in latents.items()}


def small_vae() -> OccupancyVAE:
    torch.manual_seed(0)
    vae = OccupancyVAE(
        sample_size=SIDE, latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, mid_layers=1, patch_size=2
    )
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vae.eval()


def real(vae: OccupancyVAE | None = None, **overrides) -> ShortcutScenePipeline:
    torch.manual_seed(0)
    config = {"shape_tokens": 8, "shape_channels": 4, "hidden_size": 32, "num_layers": 1, "num_attention_heads": 2}
    config |= {"condition": "image", "condition_channels": 3, "image_size": SIDE} | overrides
    network = SceneShortcutTransformer(**config).eval()
    return ShortcutScenePipeline(network, FlowMapEulerDiscreteScheduler(), PoseCodec(), vae)


def means(report: dict) -> dict[str, float | None]:
    return {name: value["mean"] for name, value in report.items()}


# --- predictions ------------------------------------------------------------------------------------


def test_a_scenes_noise_is_its_own(dataset):
    pipeline = real()
    one, two, three = (
        generate(pipeline, dataset, 2, batch_size=size, seed=seed)[0] for size, seed in ((1, 0), (3, 0), (3, 1))
    )
    assert [len(scene.cubes) for scene in two] == COUNTS
    for a, b, c in zip(one, two, three, strict=True):
        np.testing.assert_allclose(a.cubes.centre, b.cubes.centre, atol=1e-5)
        assert np.abs(a.cubes.centre - c.cubes.centre).min() > 1e-6
    draws = generate(pipeline, dataset, 2, num_draws=2, num_scenes=2)
    assert [len(scenes) for scenes in draws] == [2, 2]
    np.testing.assert_allclose(draws[1][1].cubes.centre, three[1].cubes.centre, atol=1e-5)  # draw 1 is seed 1
    numbers = [torch.randn(1, generator=noise_generator(*key)).item() for key in ((0, "a"), (0, "b"), (1, "a"))]
    assert len(set(numbers)) == 3


def test_shapes_are_decoded_on_request(dataset):
    vae = small_vae()
    scenes = generate(oracle(dataset, vae=vae), dataset, 1, with_shapes=True)[0]
    assert generate(oracle(dataset), dataset, 1)[0][0].shapes is None
    with torch.no_grad():
        expected = vae.decode(vae.to_latents(dataset[2]["shape"])).sample[:, 0].numpy()
    np.testing.assert_allclose(scenes[2].shapes, expected, atol=1e-4)


def test_what_a_model_must_be_told():
    assert needed_conditions(real()) == ("image",)
    assert needed_conditions(real(condition_channels=6, object_condition="mask")) == ("image", "pointmap", "masks")
    assert needed_conditions(real(condition="none")) == ()
    assert needed_conditions(real(condition="tokens")) == ("cond_tokens",)


def test_true_and_generated_scenes_can_be_looked_at(dataset):
    vae = small_vae()
    true, one, four = show(oracle(dataset, shifted(0.5), vae), dataset, [2, 0], [1, 4])
    assert [len(scene.geometry) for scene in true] == [4, 2]
    for a, b, c in zip(true, one, four, strict=True):
        np.testing.assert_allclose(b.bounds - a.bounds, [[0, 0.5, 0]] * 2, atol=0.05)
        np.testing.assert_allclose(c.bounds, b.bounds, atol=1e-3)
    boxes = show(oracle(dataset, use_shortcut=False), dataset, [1], [2])[1][0]
    expected = dataset[1]["scale"].exp().prod(-1).sum()
    assert boxes.to_mesh().volume == pytest.approx(float(expected), rel=1e-3)


def test_objects_have_the_colour_of_the_true_one_they_are_nearest_to(tmp_path):
    colors = [[0.9, 0.1, 0.2], [0.2, 0.8, 0.3], [0.1, 0.3, 0.7]]
    for mark, given in enumerate([colors, None]):
        write(tmp_path / "val" / f"scene_{mark}", make_latents(3, mark), mark, **({"colors": given} if given else {}))
    dataset = SceneDataset(tmp_path, "val", conditions=("image",), shuffle_objects=False)
    true, turned = show(oracle(dataset, reversed_objects), dataset, [0, 1], [1])
    palette = [object_color(number) for number in range(3)]
    for scene, order, expected in ((true[0], 1, colors), (turned[0], -1, colors), (turned[1], -1, palette)):
        shown = [mesh_colors(scene.geometry[f"object_{number}"])[0] for number in range(3)]
        np.testing.assert_allclose(shown[::order], expected, atol=0.005)


def test_padding_of_a_batch_does_not_reach_the_model(dataset):
    items = dataset.__getitems__([0, 2])
    assert items[0]["object_mask"].tolist() == [True, True, False, False]
    tokens = torch.arange(24.0).view(4, 3, 2)
    item = items[0] | {"cond_tokens": tokens, "cond_mask": torch.tensor([True, True, False]), "masks": tokens}
    assert torch.equal(unpad("masks", item), tokens[:2])
    assert torch.equal(unpad("cond_tokens", item), tokens[:2, :2])
    assert torch.equal(unpad("cond_tokens", item | {"cond_tokens": tokens[0]}), tokens[0, :2])
    assert unpad("image", item) is item["image"]


# --- reports ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [None, reversed_objects])
def test_an_oracle_has_the_figures_of_the_truth(dataset, change):
    result = evaluate(oracle(dataset, change), dataset, (1, 4), batch_size=2)
    assert list(result["shortcut"]) == ["1", "4"]
    assert result["flow"] == {}
    assert means(result["true"]) == pytest.approx({"collision": 1 / 18, "floor_gap": 0}, abs=1e-6)
    for report in result["shortcut"].values():
        assert tuple(report) == LAYOUT_METRICS
        perfect = {"coverage": 1, "distance": 0, "log_scale_error": 0, "rotation_error_deg": 0}
        assert means(report) == pytest.approx(perfect | means(result["true"]), abs=1e-3)
    assert means(result["independent_draws"]) == pytest.approx({"coverage": CEILING})
    assert result["matching"] == "position"
    assert (result["num_scenes"], result["num_draws"], result["alignment"]) == (3, 1, "none")
    json.dumps(result, allow_nan=False)


def test_what_is_shifted_is_not_found(dataset):
    for by, found in ((0.1, 1), (0.2, 0)):
        report = means(evaluate(oracle(dataset, shifted(by)), dataset, [2])["shortcut"]["2"])
        assert report["coverage"] == found
        assert report["distance"] == pytest.approx(by, abs=1e-5)
        assert report["floor_gap"] == pytest.approx(0, abs=1e-5)


def test_a_lift_is_a_floor_gap_and_a_stretch_a_log_scale_error(dataset):
    def change(latents):
        lifted = latents["translation"] + torch.tensor([0, 0, 0.3])
        return latents | {"translation": lifted, "scale": latents["scale"] + torch.tensor([0.3, 0, 0])}

    report = means(evaluate(oracle(dataset, change), dataset, [1])["shortcut"]["1"])
    assert report["floor_gap"] == pytest.approx(0.3, abs=1e-5)
    assert report["log_scale_error"] == pytest.approx(0.1, abs=1e-5)
    camera = means(evaluate(oracle(dataset, change), dataset, [1], has_floor=False)["shortcut"]["1"])
    assert camera["floor_gap"] is None


def test_the_order_of_objects_counts_where_the_condition_tells_it(root):
    dataset = SceneDataset(root, "val", conditions=("image", "masks"), shuffle_objects=False)
    for change, found in ((None, 1.0), (reversed_objects, 1 / 9)):  # of three objects the middle one keeps its place
        result = evaluate(oracle(dataset, change, object_condition="mask"), dataset, [1])
        assert result["matching"] == "order"
        assert means(result["shortcut"]["1"])["coverage"] == pytest.approx(found)


def test_flow_and_shortcut_are_told_apart(dataset):
    pipeline = oracle(dataset)
    result = evaluate(pipeline, dataset, [2], flow_steps=[2, 4])
    assert (list(result["shortcut"]), list(result["flow"])) == (["2"], ["2", "4"])
    assert pipeline.transformer.step_sizes == [0.5] * 2 + [0] * 6
    blind = oracle(dataset, use_shortcut=False)
    result = evaluate(blind, dataset, [2, 4], flow_steps=[4])
    assert (list(result["shortcut"]), list(result["flow"])) == ([], ["2", "4"])
    assert blind.transformer.step_sizes == [0] * 6


def test_draws_are_averaged_before_scenes(dataset):
    pipeline = real()
    both = evaluate(pipeline, dataset, [1], num_draws=2)["shortcut"]["1"]["distance"]
    each = [evaluate(pipeline, dataset, [1], seed=seed)["shortcut"]["1"]["distance"]["mean"] for seed in (0, 1)]
    assert each[0] != each[1]
    assert both["mean"] == pytest.approx(np.mean(each))


def test_mean_and_standard_error_over_scenes():
    nan = np.nan
    assert over_scenes(np.array([[1.0, 2, 3], [3, nan, 5]])) == {"mean": 8 / 3, "stderr": pytest.approx(2 / 3)}
    assert over_scenes(np.array([[1.0, nan]])) == {"mean": 1, "stderr": None}
    assert over_scenes(np.array([[nan, nan]])) == {"mean": None, "stderr": None}


def test_shapes_of_an_oracle(dataset):
    vae = small_vae()
    result = evaluate(oracle(dataset, vae=vae), dataset, [1], with_shapes=True)["shortcut"]["1"]
    assert tuple(result) == (*LAYOUT_METRICS, *SHAPE_METRICS)
    report = means(result)
    for name in ("occupancy_iou_scene", "occupancy_iou_object", "iou_b", "f_score_scene"):
        assert report[name] == pytest.approx(1, abs=1e-3), name
    assert report["chamfer_scene"] < 0.1
    other = means(evaluate(oracle(dataset, shifted(0.3), vae), dataset, [1], with_shapes=True)["shortcut"]["1"])
    assert other["occupancy_iou_object"] == pytest.approx(1, abs=1e-3)  # the shapes are right, not the places
    assert other["chamfer_object"] == pytest.approx(report["chamfer_object"], rel=0.1)
    assert other["occupancy_iou_scene"] < 0.7
    assert other["iou_b"] < 0.7
    assert other["chamfer_scene"] > report["chamfer_scene"] + 0.1


def test_the_stored_grids_are_the_true_shapes(root, tmp_path):
    latents = make_latents(2, 0)
    folder = tmp_path / "val" / "scene"
    grids = np.zeros((2, SIDE, SIDE, SIDE), bool)
    grids[:, :4] = True
    poses = {name: x for name, x in latents.items() if name != "shape"}
    write_scene(
        folder,
        kind="shapes",
        tensors={"occupancy": pack_occupancy(grids), **poses},
        metadata={"num_objects": 2, "resolution": SIDE},
    )
    write(folder, latents, resolution=SIDE)
    dataset = SceneDataset(tmp_path, "val", conditions=("image",), shuffle_objects=False)
    vae = small_vae()
    result = means(evaluate(oracle(dataset, vae=vae), dataset, [1], with_shapes=True)["shortcut"]["1"])
    with torch.no_grad():
        decoded = vae.decode(vae.to_latents(latents["shape"])).sample[:, 0].numpy() > 0
    ious = [(a & b).sum() / (a | b).sum() for a, b in zip(decoded, grids, strict=True)]
    assert result["occupancy_iou_object"] == pytest.approx(np.mean(ious), abs=1e-3)

    with torch.no_grad():
        encoded = vae.encode(torch.from_numpy(grids[:, None]).float()).latent_dist.mode()
        decoded = vae.decode(encoded).sample[:, 0].numpy() > 0
    ious = [(a & b).sum() / (a | b).sum() for a, b in zip(decoded, grids, strict=True)]
    assert 0 < measure_vae(vae, dataset) == pytest.approx(np.mean(ious), abs=1e-6)


def test_of_shapes_that_do_not_fill_their_cubes_the_boxes_are_measured():
    """Two cubes of side 1 overlap by half; what is in them does not, and stands on the floor."""
    cubes = Boxes(np.eye(3)[None].repeat(2, 0), np.ones((2, 3)), np.array([[0.0, 0, 0], [0.5, 0, 0]]))
    grids = np.zeros((2, SIDE, SIDE, SIDE), bool)
    grids[:, :3, :, 4:] = True
    loose, tight = (Objects(cubes, grids, is_fitted) for is_fitted in (False, True))
    assert measure_layout(loose, loose)["collision"] == 1
    assert measure_layout(tight, tight)["collision"] == 0
    assert measure_layout(loose, loose)["floor_gap"] == 0.5
    assert measure_layout(tight, tight)["floor_gap"] == 0
    assert measure_shapes(tight, tight)["iou_b"] == pytest.approx(1)


def test_a_model_that_has_diverged_and_wrong_arguments(dataset):
    broken = oracle(dataset, lambda latents: latents | {"scale": latents["scale"] * torch.nan})
    with pytest.raises(ValueError, match="the scenes of 2 steps are not finite, this model has diverged"):
        evaluate(broken, dataset, [2])
    pipeline = oracle(dataset)
    for arguments, message in (
        ({"steps": []}, "`steps` and `flow_steps` must not both be empty"),
        ({"num_draws": 0}, "`num_draws` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` and `num_scenes` must be at least 1, got 0 and None"),
        ({"with_shapes": True}, "`with_shapes` must be False: this pipeline has no VAE"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(pipeline, dataset, **arguments)
    with pytest.raises(ValueError, match=r"scene 'scene_0' has no shapes.safetensors to compare with"):
        measure_vae(small_vae(), dataset)


# --- the program ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    real(small_vae()).save_pretrained(folder)
    return folder


def test_the_program_prints_and_writes_a_report(root, model_dir, tmp_path, capsys):
    output = tmp_path / "new" / "metrics.json"
    main([str(model_dir), "--data", str(root), "--steps", "2", "--flow", "--meshes", "--output", str(output)])
    printed = capsys.readouterr().out
    assert "split val: 3 scenes, 1 draws, seed 0" in printed
    assert "alignment: none; objects are matched by position" in printed
    assert "shortcut 2" in printed
    assert "flow 2" in printed
    assert f"{CEILING:.3f}" in printed
    result = json.loads(output.read_text())
    assert list(result["shortcut"]) == list(result["flow"]) == ["2"]
    assert tuple(result["flow"]["2"]) == (*LAYOUT_METRICS, *SHAPE_METRICS)
    dataset = SceneDataset(root, "val", conditions=("image",), shuffle_objects=False)
    again = evaluate(ShortcutScenePipeline.from_pretrained(model_dir), dataset, [2])
    assert result["shortcut"]["2"]["distance"]["mean"] == pytest.approx(again["shortcut"]["2"]["distance"]["mean"])
    lines = format_report(result).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 1 + len(LAYOUT_METRICS) + len(SHAPE_METRICS)


def test_scenes_in_the_cameras_frame_have_no_floor(tmp_path, root):
    write(tmp_path / "val" / "scene", make_latents(2, 0), frame="camera")
    assert not has_floor(SceneDataset(tmp_path, "val", conditions=()))
    assert has_floor(SceneDataset(root, "val", conditions=()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}", "--data", "{root}", "--split", "test"], "split 'test' of .* is missing"),
        (["{model}", "--data", "{root}/none"], "split 'val' of .*none is missing"),
        (["{root}", "--data", "{root}"], "holds no exported pipeline"),
        (["{model}"], "--data is required"),
        (["{model}", "--data", "{root}", "--steps", "0"], "--steps 0: input should be greater than or equal to 1"),
        (["{model}", "--data", "{root}", "--output", "{root}"], "--output: .* is a folder"),
        (["{bare}", "--data", "{root}", "--meshes"], "--meshes: the pipeline of .* has no VAE"),
        (["{bare}", "--data", "{root}"], "scene 'scene_0' of .*: conditionals: pointmap missing"),
    ],
)
def test_a_wrong_argument_is_one_line(root, model_dir, tmp_path, capsys, arguments, message):
    real(condition_channels=6).save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main([text.format(model=model_dir, root=root, bare=tmp_path) for text in arguments])
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0])
