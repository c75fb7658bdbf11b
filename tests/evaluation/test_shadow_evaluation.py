"""Metrics of shadow maps in closed form, the maps of a data set, the report of an oracle, and the program."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from shadow_samples import make_samples, save_folder, save_tar, write_folder
from torch import Tensor

from backlot.codecs import PixelCodec
from data_prep.shadows.dataset import ShadowDataset
from evaluation.shadow_sdxl import cast
from evaluation.shadow_sdxl.__main__ import main
from evaluation.shadow_sdxl.measure import (
    compute_mean_map,
    evaluate,
    measure,
    resize,
    seam_error,
    sweep_sizes,
)
from evaluation.shadow_sdxl.metrics import (
    HAZE,
    MAP_METRICS,
    centroid,
    centroid_error,
    contact_point,
    direction_error,
    edge_width,
    measure_maps,
    product_iou,
    psnr,
    rmse,
    scale_invariant_rmse,
    soft_iou,
    softness_error,
    ssim,
    zncc,
)
from evaluation.shadow_sdxl.report import format_report
from pipelines.shadow_sdxl import ShadowSDXLPipeline, ShadowUNet, create_scheduler

CONFIG = {
    "sample_size": 8,
    "latent_channels": 12,
    "block_out_channels": (16, 16, 16),
    "layers_per_block": 1,
    "transformer_layers_per_block": 1,
    "attention_head_dim": (1, 1, 1),
    "norm_num_groups": 8,
}
SIDE = 32  # of the maps of the oracle


def build(**overrides) -> ShadowSDXLPipeline:
    """A small pipeline for 16 pixels with every layer awake, so that it listens to the light."""
    torch.manual_seed(0)
    unet = ShadowUNet(**{**CONFIG, **overrides}).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return ShadowSDXLPipeline(unet, PixelCodec(block_size=2), create_scheduler("flow"))


def true_shadow(light: Tensor) -> Tensor:
    """(3,) theta, phi, size -> (1, SIDE, SIDE): a round soft shadow, 9 pixels from the middle, softer with size."""
    phi = torch.deg2rad(light[1])
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    middle = (SIDE - 1) / 2
    square = (x - middle + 9 * phi.cos()).square() + (y - middle - 9 * phi.sin()).square()
    return torch.exp(-square / (2 * (1 + light[2] / 4).square()))[None]


def build_oracle(shadow=true_shadow, fog: float = 0.0) -> ShadowSDXLPipeline:
    """A pipeline whose network knows the shadow of `true_shadow` data; `fog` of its noise remains in the map."""
    pipeline = build(sample_size=SIDE // 2)

    def forward(sample, timestep, object_latents, mask, light, step_size=None):
        pixels = torch.stack([shadow(each) for each in light]).expand(-1, 3, -1, -1) * 2 - 1
        clean = F.pixel_unshuffle(pixels, 2) + fog * sample * (timestep == 1000).reshape(-1, 1, 1, 1)
        return type("Output", (), {"sample": (sample - clean) / (timestep / 1000).reshape(-1, 1, 1, 1)})

    pipeline.unet.forward = forward
    return pipeline


def oracle_samples(lights: list[tuple[float, float, float]], tracks: list[str] | None = None) -> dict[str, dict]:
    """Samples for `shadow_samples.save_folder`: one object, a post in the middle, under these lights."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[11:17, 15:17] = 255
    image = np.full((SIDE, SIDE, 3), 128, np.uint8)
    image[mask > 0] = (200, 40, 10)
    samples = {}
    for number, light in enumerate(lights):
        metadata = {**dict(zip(("theta", "phi", "size"), light, strict=True)), "object_id": "post"}
        shadow = true_shadow(torch.tensor(light, dtype=torch.float32))[0].double().numpy()
        if tracks:
            metadata["track"] = tracks[number]
        samples[f"{number:03d}"] = {"image": image, "mask": mask, "shadow": shadow, "metadata": metadata}
    return samples


LIGHTS = [(5.0, 40.0, 2.0), (20.0, 0.0, 2.0), (30.0, 100.0, 4.0), (40.0, 200.0, 6.0), (45.0, 310.0, 8.0)]


@pytest.fixture(scope="module")
def oracle_data(tmp_path_factory) -> ShadowDataset:
    return ShadowDataset(save_folder(tmp_path_factory.mktemp("oracle"), oracle_samples(LIGHTS)), split="all")


@pytest.fixture(scope="module")
def discs(tmp_path_factory) -> Path:
    """A folder of 6 objects under 2 lights each, 16 pixels."""
    return write_folder(tmp_path_factory.mktemp("discs"), image_size=16)


def random_maps(count: int = 4, side: int = 24, seed: int = 0) -> Tensor:
    """Smooth blots (count, 1, side, side) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 6, 6, generator=generator) * 2 - 0.8
    return F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)


def disc(x: float, y: float, radius: float, side: int = 64, edge: float = 1.0) -> Tensor:
    """(1, side, side), falling from 1 to 0 within `edge` pixels around the radius."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    distance = ((columns - x).square() + (rows - y).square()).sqrt()
    return ((radius - distance) / edge + 0.5).clamp(0, 1)[None]


def post(side: int = 64) -> Tensor:
    """(1, 1, side, side) mask of a post 2 pixels wide with its foot at rows 32: contact point (31.5, 31.8)."""
    mask = torch.zeros(1, 1, side, side)
    mask[..., 20:33, 31:33] = 1
    return mask


# --- metrics of pixels ------------------------------------------------------------------------------------------------


def test_a_perfect_prediction_is_perfect():
    maps, mask = random_maps(), torch.zeros(4, 1, 24, 24)
    mask[..., 8:14, 8:14] = 1
    measured = measure(maps, maps, mask, torch.full((4,), 30.0), haze=0.0)
    best = {"iou": 1, "iou_with_haze": 1, "zncc": 1, "ssim": 1, "psnr": 100, "iou_outside": 1, "zncc_outside": 1}
    worst = ["rmse", "s_rmse", "rmse_outside", "s_rmse_outside", "direction_error_deg", "centroid_error_px"]
    for name, value in {**best, **dict.fromkeys([*worst, "softness_error", "empty"], 0)}.items():
        assert torch.allclose(measured[name], torch.full((4,), float(value)), atol=1e-4), name
    for name, values in measured.items():
        assert values.shape == (4,), name


def test_half_a_shadow_has_the_right_shape():
    true = random_maps()
    assert torch.allclose(scale_invariant_rmse(true / 2, true), torch.zeros(4), atol=1e-6)
    assert torch.allclose(rmse(true / 2, true), true.square().mean((1, 2, 3)).sqrt() / 2)
    assert torch.allclose(zncc(true / 2, true), torch.ones(4), atol=1e-5)
    assert torch.allclose(soft_iou(true / 2, true), torch.full((4,), 0.5))


def test_scaling_never_makes_it_worse_and_an_empty_map_cannot_be_scaled():
    predicted, true = random_maps(seed=1), random_maps()
    assert (scale_invariant_rmse(predicted, true) < rmse(predicted, true)).all()
    factors = torch.linspace(0, 2, 401)[:, None, None, None]
    best = torch.stack(
        [rmse(factors * p, t.expand(401, -1, -1, -1)).min() for p, t in zip(predicted, true, strict=True)]
    )
    assert torch.allclose(scale_invariant_rmse(predicted, true), best, atol=1e-4)
    empty = torch.zeros_like(true)
    assert torch.equal(scale_invariant_rmse(empty, true), rmse(empty, true))


@pytest.mark.parametrize("predicted", [0.0, 0.5, 1.0, None])
@pytest.mark.parametrize("true", [0.0, 0.5, 1.0, None])
@pytest.mark.parametrize("covered", [0.0, 1.0])
def test_constant_maps_give_numbers(predicted, true, covered):
    maps = [random_maps() if x is None else torch.full((4, 1, 24, 24), x) for x in (predicted, true)]
    weights = torch.full((4, 1, 24, 24), 1 - covered)
    values = {**measure_maps(*maps), **{f"{n} outside": v for n, v in measure_maps(*maps, HAZE, weights).items()}}
    values |= {"ssim": ssim(*maps), "psnr": psnr(*maps), "product": product_iou(*maps)}
    for name, value in values.items():
        assert value.isfinite().all(), name
    if None not in (predicted, true):
        assert torch.equal(values["zncc"], torch.zeros(4))
        assert torch.allclose(values["rmse"], torch.full((4,), abs(predicted - true)))
        assert torch.equal(values["iou"], torch.full((4,), 1.0 if predicted == true else min(predicted, true)).float())


def test_iou_is_not_thresholded():
    ramp = torch.linspace(0, 1, 64).expand(1, 1, 64, 64)
    assert soft_iou(0.4 * ramp, ramp).item() == pytest.approx(0.4)
    assert soft_iou(ramp, 0.4 * ramp).item() == pytest.approx(0.4)
    assert soft_iou(ramp.flip(-1), ramp).item() == pytest.approx(1 / 3, abs=0.01)
    assert product_iou(ramp, ramp).item() == pytest.approx(0.5, abs=0.01)  # 1/3 over 1 - 1/3
    hard = (ramp > 0.5).float()
    assert product_iou(hard, hard).item() == 1


def test_haze_counts_only_when_asked():
    true = disc(32, 32, 6)[None]
    veiled = torch.maximum(true, torch.tensor(0.01))
    assert soft_iou(veiled, true, haze=0.01).item() == pytest.approx(1, abs=1e-3)
    assert soft_iou(veiled, true).item() < 0.8
    assert measure_maps(veiled, true)["iou"].item() == soft_iou(veiled, true, HAZE).item()  # 0.01 is more than HAZE
    assert measure_maps(veiled, true, haze=0.02)["iou"].item() > 0.99
    assert product_iou(veiled, true, 0.02).item() > product_iou(veiled, true).item() + 0.1


def test_weights_leave_out_what_the_object_hides():
    true, mask = random_maps(), torch.zeros(4, 1, 24, 24)
    mask[..., :12, :] = 1
    wrong = torch.where(mask > 0, 1 - true, true)
    for name, perfect in {"iou": 1, "rmse": 0, "s_rmse": 0, "zncc": 1}.items():
        metric = MAP_METRICS[name]
        kwargs = {"weights": 1 - mask}
        assert torch.allclose(metric(wrong, true, **kwargs), torch.full((4,), float(perfect)), atol=1e-5), name
        other = random_maps(seed=1)
        below = metric(other[..., 12:, :], true[..., 12:, :])  # the lower half, cut out
        assert torch.allclose(metric(other, true, **kwargs), below, atol=1e-5), name
    half = torch.tensor([[1.0, 0.0], [0.0, 0.0]])[None, None]
    soft = torch.tensor([[0.25, 1.0], [1.0, 1.0]])[None, None]
    assert rmse(half, torch.zeros_like(half), soft).item() == pytest.approx(math.sqrt(0.25 / 3.25))


def test_ssim_and_psnr_have_their_known_values():
    a, b = torch.full((1, 1, 16, 16), 0.2), torch.full((1, 1, 16, 16), 0.6)
    assert ssim(a, b).item() == pytest.approx((2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4), rel=1e-5)
    assert psnr(a, a + 0.1).item() == pytest.approx(20, abs=1e-4)
    assert psnr(a, a + 0.01).item() == pytest.approx(40, abs=1e-3)
    assert psnr(a, a).item() == 100
    maps = random_maps(side=33)
    inverted = ssim(1 - maps, maps)
    assert (inverted < 0.3).all()
    noisy = [ssim((maps + s * torch.randn(maps.shape)).clamp(0, 1), maps).mean() for s in (0.01, 0.05, 0.2)]
    assert 1 > noisy[0] > noisy[1] > noisy[2] > 0
    with pytest.raises(ValueError, match=r"ssim needs maps of at least 11 pixels a side, got \(10, 16\)"):
        ssim(a[..., :10, :], b[..., :10, :])


def test_ssim_is_that_of_scikit_image():
    """Whose filter is scipy's, and which leaves out the 5 pixels along the border."""

    def blur(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, 1.5, truncate=3.5)

    a, b = random_maps(1, 33), random_maps(1, 33, seed=1)
    p, g = a[0, 0].double().numpy(), b[0, 0].double().numpy()
    variances = blur(p * p) - blur(p) ** 2 + blur(g * g) - blur(g) ** 2
    similar = (2 * blur(p) * blur(g) + 1e-4) * (2 * (blur(p * g) - blur(p) * blur(g)) + 9e-4)
    expected = similar / ((blur(p) ** 2 + blur(g) ** 2 + 1e-4) * (variances + 9e-4))
    assert ssim(a, b).item() == pytest.approx(expected[5:-5, 5:-5].mean(), abs=1e-6)


# --- place and softness -----------------------------------------------------------------------------------------------


def test_the_contact_point_is_the_foot():
    assert torch.allclose(contact_point(post()), torch.tensor([[31.5, 31.8]]))
    chair = torch.zeros(1, 40, 40)  # four legs of which one reaches lower, as seen from above
    chair[:, 10:20, 10:31] = 1
    for column, bottom in ((10, 28), (30, 28), (14, 31), (26, 30)):
        chair[:, 20:bottom, column : column + 1] = 1
    x, y = contact_point(chair)[0]
    assert x.item() == pytest.approx(20, abs=0.5)  # in the middle, not below the lowest leg
    assert y.item() == pytest.approx(30 - 2.1)
    soft = F.avg_pool2d(post(), 3, 1, 1)  # anti-aliased
    assert torch.allclose(contact_point(soft), contact_point(post()), atol=1.1)
    plate = torch.zeros(1, 1, 32, 32)
    plate[..., 15:17, :] = 1  # a lift by a tenth of 32 would leave the object
    assert contact_point(plate)[0, 1].item() == 15.5
    assert torch.equal(contact_point(torch.cat([post(), post().roll(3, -1)]))[:, 0], torch.tensor([31.5, 34.5]))


@pytest.mark.parametrize(
    ("predicted", "true", "error"),
    [(0, 0, 0), (30, 0, 30), (0, 30, 30), (170, -170, 20), (90, -60, 150), (0, 180, 180)],
)
def test_direction_error_of_blobs_at_known_angles(predicted, true, error):
    def blob(angle: float, distance: float) -> Tensor:
        x, y = 31.5 + distance * math.cos(math.radians(angle)), 31.8 + distance * math.sin(math.radians(angle))
        return disc(x, y, 3)[None]

    measured = direction_error(blob(predicted, 18), blob(true, 14), post())
    assert measured.item() == pytest.approx(error, abs=0.5)


def test_direction_looks_beside_the_object_and_not_at_haze():
    true, elsewhere = disc(50, 32, 4)[None], disc(31.5, 50, 4)[None]
    under = torch.maximum(true, post())
    assert direction_error(under, true, post()).item() == pytest.approx(0, abs=1e-3)
    veiled = torch.maximum(true, torch.full_like(true, 0.05)) + 0.05 * disc(10, 10, 8)
    assert direction_error(veiled, true, post()).item() == pytest.approx(0, abs=1e-3)
    assert centroid_error(veiled, true, post()).item() == pytest.approx(0, abs=1e-3)
    assert direction_error(torch.zeros_like(true), true, post()).item() == 90
    assert direction_error(post(), true, post()).item() == 90
    assert direction_error(true, post(), post()).isnan().item()
    assert direction_error(true, torch.zeros_like(true), post()).isnan().item()
    both = direction_error(torch.cat([true, elsewhere]), torch.cat([true, true]), post().expand(2, -1, -1, -1))
    assert both[0].item() == pytest.approx(0, abs=1e-3)
    assert both[1].item() == pytest.approx(90, abs=3)


def test_only_a_slanting_light_has_a_direction():
    maps = torch.cat([disc(50, 32, 4)[None]] * 2)
    errors = measure(maps, maps, post().expand(2, -1, -1, -1), torch.tensor([12.0, 12.1]))["direction_error_deg"]
    assert errors[0].isnan()
    assert errors[1] == 0


def test_centroids():
    assert torch.allclose(centroid(disc(20.5, 40, 5)), torch.tensor([[20.5, 40.0]]), atol=1e-3)
    assert centroid(torch.zeros(1, 8, 8)).isnan().all()
    assert centroid_error(disc(23, 44, 5)[None], disc(20, 40, 5)[None], post()).item() == pytest.approx(5, abs=1e-3)
    true = disc(31.5, 51.8, 5)[None]
    assert centroid_error(torch.zeros_like(true), true, post()).item() == pytest.approx(20, abs=0.05)
    assert centroid_error(true, torch.zeros_like(true), post()).isnan().item()


@pytest.mark.parametrize("width", [3, 6, 12, 20])
def test_the_edge_width_of_a_linear_penumbra_is_eight_tenths_of_it(width):
    ramp = ((torch.arange(96.0) - 48) / width + 0.5).clamp(0, 1)
    straight, tilted = ramp.expand(1, 96, 96), disc(48, 48, 30, 96, width)
    rows, columns = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="ij")
    diagonal = (((rows + columns - 95) / math.sqrt(2)) / width + 0.5).clamp(0, 1)[None]
    for shadow in (straight, tilted, diagonal):
        assert edge_width(shadow).item() == pytest.approx(0.8 * width, rel=0.12, abs=0.9)
        assert edge_width(0.4 * shadow).item() == pytest.approx(edge_width(shadow).item(), rel=0.02, abs=0.5)


def test_edges_grow_with_blur_and_empty_maps_have_none():
    hard = disc(48, 48, 20, 96, 0.01)[None]
    assert edge_width(hard).item() < 1.1
    widths = []
    for sigma in (0.5, 1, 2, 4, 8, 12):
        taps = torch.exp(-0.5 * (torch.arange(-40.0, 41) / sigma).square())
        taps = (taps / taps.sum()).reshape(1, 1, 1, -1)
        blurred = F.conv2d(F.conv2d(hard, taps, padding=(0, 40)), taps.mT, padding=(40, 0))
        widths.append(edge_width(blurred).item())
    assert widths == sorted(widths)
    assert widths[2] == pytest.approx(2.56 * 2, rel=0.1)  # 10 to 90 % of a Gaussian edge
    assert widths[-1] > 4 * widths[1]
    nothing = torch.stack([torch.zeros(8, 8), torch.full((8, 8), 0.5), torch.full((8, 8), HAZE / 2)])
    assert edge_width(nothing).isnan().all()


def test_softness_error_is_a_number_of_doublings():
    narrow, wide = disc(48, 48, 24, 96, 5)[None], disc(48, 48, 24, 96, 10)[None]
    assert softness_error(wide, narrow).item() == pytest.approx(1, abs=0.1)
    assert softness_error(narrow, wide).item() == softness_error(wide, narrow).item()
    hard = disc(48, 48, 24, 96, 0.01)[None]
    assert softness_error(hard, hard).item() == 0
    assert softness_error(hard, narrow).isfinite().item()
    assert softness_error(torch.zeros_like(hard), narrow).isnan().item()


# --- predictions ------------------------------------------------------------------------------------------------------


def test_a_batch_size_never_changes_a_map(discs):
    pipeline, dataset = build(), ShadowDataset(discs, split="all")
    maps = cast(pipeline, dataset, num_inference_steps=2)
    assert maps.shape == (12, 1, 16, 16)
    assert maps.dtype == torch.float32
    assert len(maps.flatten(1).unique(dim=0)) == 12
    for batch_size in (1, 5, 12):
        assert torch.allclose(cast(pipeline, dataset, num_inference_steps=2, batch_size=batch_size), maps, atol=1e-5)
    part = cast(pipeline, [dataset[i] for i in (7, 8, 9)], num_inference_steps=2, first=7)
    assert torch.allclose(part, maps[7:10], atol=1e-5)
    assert not torch.allclose(cast(pipeline, dataset, num_inference_steps=2, seed=1), maps, atol=1e-2)
    assert not torch.allclose(cast(pipeline, dataset), maps, atol=1e-3)


def test_the_pipeline_is_told_everything(discs):
    pipeline, item = build(), ShadowDataset(discs, split="all")[3]
    calls = []
    pipeline.unet.register_forward_pre_hook(lambda _, args: calls.append(args))
    shadow = cast(pipeline, [item], phi_offset=120.0)
    noise, timestep, object_latents, mask, light, _ = calls[0]
    expected = [item["theta"], (item["phi"] + 120) % 360, item["size"]]
    assert torch.allclose(light % torch.tensor([90, 360, 90]), torch.stack(expected)[None])
    assert torch.equal(object_latents, F.pixel_unshuffle(item["object_image"][None], 2))
    assert torch.equal(mask, F.avg_pool2d(item["mask"][None], 2))
    assert timestep.tolist() == [1000]
    images = pipeline(
        item["object_image"],
        item["mask"],
        float(item["theta"]),
        float(item["phi"]) + 120,
        float(item["size"]),
        latents=noise,
        output_type="pt",
    ).images
    assert torch.equal(shadow, images)
    soft = {**item, "mask": item["mask"] / 2}
    assert not torch.equal(cast(pipeline, [soft], phi_offset=120.0), shadow)


def test_cast_refuses_nothing_and_batches_of_nothing():
    for samples, batch_size in (([], 8), ([{}], 0)):
        with pytest.raises(ValueError, match="`samples` must not be empty and `batch_size` at least 1, got"):
            cast(build(), samples, batch_size=batch_size)


def test_the_mean_map(discs):
    dataset = ShadowDataset(discs, split="all")
    every = torch.stack([dataset[row]["shadow_map"] for row in range(len(dataset))])
    assert torch.allclose(compute_mean_map(dataset), every.mean(0), atol=1e-6)


def test_the_seam_is_seen(discs):
    dataset = ShadowDataset(discs, split="all")
    items = [dataset[0], dataset[5]]
    assert seam_error(build(), items) < 1e-5
    assert seam_error(build(light_conditioning="sdxl"), items) > 1e-3
    assert items[0]["phi"] == dataset[0]["phi"]  # not changed


def test_the_sweep_of_sizes(oracle_data):
    items = [oracle_data[0], oracle_data[3]]
    widths = sweep_sizes(build_oracle(), items, sizes=[2, 4, 8])
    expected = [edge_width(true_shadow(torch.tensor([30.0, 0.0, size]))).item() for size in (2, 4, 8)]
    assert widths == pytest.approx(expected, rel=0.01)
    assert widths == sorted(widths)
    assert sweep_sizes(build_oracle(lambda light: torch.zeros(1, SIDE, SIDE)), items, sizes=[3]) == [None]


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_of_an_oracle(oracle_data):
    result = evaluate(build_oracle(), oracle_data, steps=[1, 4], num_draws=2, batch_size=2)
    report = result["reports"]["all"]
    assert list(report) == ["true", "zero", "mean_map", "1", "4", "phi_shuffled"]
    for steps in ("1", "4"):
        row = {name: value["mean"] for name, value in report[steps].items()}
        assert row["iou"] == pytest.approx(1, abs=0.01)  # values below HAZE are left out
        assert row["iou_with_haze"] == pytest.approx(1, abs=1e-3)
        assert row["rmse"] == pytest.approx(0, abs=1e-4)
        assert row["zncc"] == pytest.approx(1, abs=1e-4)
        assert row["direction_error_deg"] == pytest.approx(0, abs=0.1)
        assert row["softness_error"] == pytest.approx(0, abs=0.05)
        assert row["edge_width_px"] == pytest.approx(report["true"]["edge_width_px"]["mean"], rel=0.02)
        assert row["empty"] == 0
        assert max(value["std"] for name, value in report[steps].items() if name != "psnr") < 1e-5
    wrong = report["phi_shuffled"]
    assert wrong["direction_error_median_deg"]["mean"] == pytest.approx(120, abs=15)
    assert wrong["zncc"]["mean"] < 0.1
    assert wrong["softness_error"]["mean"] == pytest.approx(0, abs=0.15)

    true = torch.stack([oracle_data[row]["shadow_map"] for row in range(5)])
    zero, mean_map = report["zero"], report["mean_map"]
    assert zero["rmse"]["mean"] == zero["s_rmse"]["mean"] == pytest.approx(rmse(0 * true, true).mean().item(), rel=1e-5)
    assert (zero["iou"]["mean"], zero["zncc"]["mean"], zero["empty"]["mean"]) == (0, 0, 1)
    assert zero["direction_error_deg"]["mean"] == 90
    assert zero["softness_error"] == {"mean": None, "std": None}
    expected = zncc(true.mean(0, keepdim=True).expand_as(true), true).mean().item()
    assert mean_map["zncc"]["mean"] == pytest.approx(expected, rel=1e-4)

    assert result["seam"] < 1e-5
    assert result["size_sweep"]["monotone"] is True
    assert result["num_samples"] == {"all": 5}
    json.dumps(result, allow_nan=False)


def test_deviations_are_those_over_draws(oracle_data):
    pipeline = build_oracle(fog=0.1)
    result = evaluate(pipeline, oracle_data, steps=[1], num_draws=3, seed=4, batch_size=4)
    true = torch.stack([oracle_data[row]["shadow_map"] for row in range(5)])
    draws = [rmse(cast(pipeline, oracle_data, seed=4 + k), true).mean().item() for k in range(3)]
    assert len(set(draws)) == 3
    measured = result["reports"]["all"]["1"]["rmse"]
    assert measured["mean"] == pytest.approx(np.mean(draws), rel=1e-4)
    assert measured["std"] == pytest.approx(np.std(draws), rel=1e-2)
    assert result["reports"]["all"]["zero"]["rmse"]["std"] == 0
    again = evaluate(pipeline, oracle_data, steps=[1], num_draws=3, seed=4, batch_size=1)
    assert again["reports"]["all"]["1"]["rmse"]["mean"] == pytest.approx(measured["mean"], rel=1e-4)


def test_a_mean_map_from_elsewhere_and_a_blind_model(oracle_data):
    blind = build_oracle(lambda light: true_shadow(torch.tensor([30.0, 0.0, 4.0])))
    result = evaluate(blind, oracle_data, steps=[1], num_draws=1, mean_map=torch.ones(1, SIDE, SIDE))
    report = result["reports"]["all"]
    assert report["mean_map"]["zncc"]["mean"] == 0
    assert report["phi_shuffled"] == report["1"]  # who does not listen loses nothing
    assert result["size_sweep"]["monotone"] is False


def test_tracks_are_reported_one_by_one(tmp_path):
    tracks = ["direction_control_vert", *["direction_control_horz"] * 3, "softness_control"]
    folder = save_folder(tmp_path, oracle_samples(LIGHTS, tracks))
    dataset = ShadowDataset(folder, split="all", evaluation=True)
    result = evaluate(build_oracle(), dataset, steps=[1], num_draws=1)
    assert result["num_samples"] == {
        "all": 5,
        "direction_control_horz": 3,
        "direction_control_vert": 1,
        "softness_control": 1,
    }
    reports = result["reports"]
    assert list(reports) == list(result["num_samples"])
    assert reports["direction_control_vert"]["1"]["direction_error_deg"]["mean"] is None  # its theta is 5
    assert reports["direction_control_horz"]["1"]["direction_error_deg"]["mean"] < 0.1
    width = edge_width(true_shadow(torch.tensor(LIGHTS[4]))).item()
    assert reports["softness_control"]["true"]["edge_width_px"]["mean"] == pytest.approx(width, rel=0.01)
    parts = sum(n * reports[name]["zero"]["rmse"]["mean"] for name, n in result["num_samples"].items() if name != "all")
    assert reports["all"]["zero"]["rmse"]["mean"] == pytest.approx(parts / 5)


def test_maps_are_also_measured_at_another_resolution(oracle_data):
    result = evaluate(build_oracle(), oracle_data, steps=[1], num_draws=1, metric_resolution=64)
    assert (result["resolution"], result["metric_resolution"]) == (32, 64)
    native, resized = (result[name]["all"] for name in ("reports", "resized_reports"))
    assert resized["true"]["edge_width_px"]["mean"] == pytest.approx(
        2 * native["true"]["edge_width_px"]["mean"], rel=0.1
    )
    assert resized["1"]["zncc"]["mean"] == pytest.approx(1, abs=1e-4)
    assert resized["zero"]["rmse"]["mean"] == pytest.approx(native["zero"]["rmse"]["mean"], rel=0.05)
    maps = torch.rand(1, 1, 8, 8)
    assert torch.allclose(resize(maps, 4), F.avg_pool2d(maps, 2), atol=0.25)
    assert resize(maps, 8) is resize(maps, None) is maps


def test_what_evaluate_refuses(oracle_data):
    pipeline = build_oracle()
    with pytest.raises(ValueError, match=r"`steps` must not be empty and `num_draws` at least 1, got \[\] and 10"):
        evaluate(pipeline, oracle_data, steps=[])
    with pytest.raises(ValueError, match=r"`num_draws` at least 1, got \[1, 4, 20\] and 0"):
        evaluate(pipeline, oracle_data, num_draws=0)
    with pytest.raises(ValueError, match=r"`mean_map` must be \(1, 32, 32\) like the maps, got \(1, 8, 8\)"):
        evaluate(pipeline, oracle_data, mean_map=torch.zeros(1, 8, 8))
    broken = build_oracle(lambda light: torch.full((1, SIDE, SIDE), torch.nan))
    with pytest.raises(ValueError, match="the maps of 4 steps are not finite, this model has diverged"):
        evaluate(broken, oracle_data, steps=[4])


# --- the program ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory) -> Path:
    """The public benchmark's layout: one tar, stems that begin with the track."""
    samples = make_samples(num_objects=2, lights=3, image_size=16, object_ids=False)
    names = ["softness_control", "direction_control_horz", "direction_control_vert"]
    samples = {f"{names[i % 3]}_{i:03d}": sample for i, sample in enumerate(samples.values())}
    return save_tar(tmp_path_factory.mktemp("benchmark") / "test.tar", samples)


def test_the_program_prints_and_writes_everything(model, discs, benchmark, tmp_path, capsys):
    output = tmp_path / "new" / "scores.json"
    arguments = ["--data", str(discs), "--benchmark", str(benchmark), "--steps", "1", "2", "--num_draws", "2"]
    main([str(model), *arguments, "--output", str(output), "--seed", "3", "--haze", "0.02", "--device", "cpu"])
    content = json.loads(output.read_text())
    dataset = ShadowDataset(discs, split="all")
    expected = evaluate(build(), dataset, steps=[1, 2], num_draws=2, seed=3, haze=0.02)
    assert content["data"]["reports"]["all"]["1"]["rmse"] == pytest.approx(expected["reports"]["all"]["1"]["rmse"])
    assert content["data"]["haze"] == 0.02
    described = content["data"]["data"]
    assert (described["path"], described["split"], described["num_objects"]) == (str(discs), "all", 6)
    assert described["fingerprint"] == dataset.fingerprint
    assert content["benchmark"]["num_samples"]["softness_control"] == 2
    out = capsys.readouterr().out
    assert f"data: {discs}, split all, 12 samples of 6 objects, 2 draws; mean map: that of the measured data" in out
    assert f"benchmark: {benchmark}, split all, 6 samples of 2 objects" in out
    assert "direction_control_horz: 2 maps of 16x16" in out
    assert out.count("         empty map          mean map            1 step           2 steps         phi + 120") == 5
    assert "seam |S(phi=0) - S(phi=360)|: " in out
    assert f"written to {output}" in out


def test_the_mean_map_comes_from_the_training_data(model, discs, tmp_path, capsys):
    train = write_folder(tmp_path / "train", num_objects=3, seed=9, image_size=16)
    arguments = ["--steps", "1", "--num_draws", "1", "--resolution", "16", "--metric_resolution", "32"]
    main([str(model), "--data", str(discs), "--train_data", str(train), *arguments])
    content = json.loads((model / "evaluation.json").read_text())
    (model / "evaluation.json").unlink()
    mean_map = compute_mean_map(ShadowDataset(train, split="all"))
    true = torch.stack([item["shadow_map"] for item in map(ShadowDataset(discs, split="all").__getitem__, range(12))])
    expected = zncc(mean_map.expand_as(true), true).mean().item()
    assert content["data"]["reports"]["all"]["mean_map"]["zncc"]["mean"] == pytest.approx(expected, rel=1e-4)
    out = capsys.readouterr().out
    assert f"mean map: that of {train}" in out
    assert "all: 12 maps of 32x32" in out


def test_held_out_objects_of_the_training_data(model, tmp_path, capsys):
    data = write_folder(tmp_path / "data", num_objects=60, lights=1, image_size=16)
    arguments = ["--data", str(data), "--train_data", str(data), "--steps", "1", "--num_draws", "1"]
    main([str(model), *arguments, "--split", "validation", "--output", str(tmp_path / "out.json")])
    count = len(ShadowDataset(data, split="validation"))
    assert 0 < count < 20
    assert f"split validation, {count} samples" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main([str(model), *arguments])
    assert "is --train_data too: only its --split validation was not trained on" in capsys.readouterr().err


def test_cells_without_a_number_are_dashes(oracle_data):
    report = evaluate(build_oracle(), oracle_data, steps=[1], num_draws=1)["reports"]["all"]
    (line,) = [line for line in format_report(report).splitlines() if line.startswith("softness error")]
    assert line.split()[-4] == "-"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "give --data or --benchmark, or both"),
        ("--data nowhere", "`path` must be a folder or a tar file of shadow data, nowhere does not exist"),
        ("--data DISCS --steps 0", "--steps 0: input should be greater than or equal to 1"),
        ("--data DISCS --num_draws 0", "--num_draws 0: input should be greater than or equal to 1"),
        ("--data DISCS --haze 2", "--haze 2: input should be less than or equal to 1"),
        ("--data DISCS --metric_resolution 8", "--metric_resolution 8: input should be greater than or equal to 11"),
        ("--data DISCS --split test", "--split test: input should be 'train', 'validation' or 'all'"),
        ("--data DISCS --resolution 18", "`resolution` must be a multiple of 8, got 18"),
        ("--data DISCS --device abacus", "cannot be loaded on abacus"),
        ("--data DISCS --dat x", "unknown key --dat; did you mean --data?"),
        ("--data DISCS --output OUT", "OUT is a folder"),
        ("--data DISCS --output DISCS/metadata.json/x.json --steps 1 --num_draws 1", "exists"),
        ("--data DISCS --train_data nowhere", "nowhere does not exist"),
        ("--benchmark DISCS", "belongs to no track: give it as --data"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(model, discs, tmp_path, arguments, message, capsys):
    places = {"DISCS": str(discs), "OUT": str(tmp_path)}
    for name, path in places.items():
        arguments, message = arguments.replace(name, path), message.replace(name, path)
    with pytest.raises(SystemExit) as stop:
        main([str(model), *arguments.split()])
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("error: ")
    assert message in line
    assert not (model / "evaluation.json").exists()


def test_folders_that_hold_no_such_pipeline(tmp_path, capsys):
    for content, message in {
        None: "holds no exported pipeline (no model_index.json)",
        '{"_class_name": "FluxPipeline"}': "holds a FluxPipeline, not a ShadowSDXLPipeline",
        "[1]": "model_index.json is damaged",
        "{": "model_index.json is damaged",
        '{"_class_name": "ShadowSDXLPipeline"}': "cannot be loaded on cpu",
    }.items():
        if content is not None:
            (tmp_path / "model_index.json").write_text(content)
        with pytest.raises(SystemExit, match="2"):
            main([str(tmp_path), "--data", "x", "--device", "cpu"])
        assert message in capsys.readouterr().err


def test_a_bad_picture_and_a_diverged_model_are_named(model, tmp_path, capsys):
    data = write_folder(tmp_path / "data", num_objects=2, lights=1, image_size=16)
    (data / "shadows" / "000_0.png").write_bytes(b"nothing")
    with pytest.raises(SystemExit, match="2"):
        main([str(model), "--data", str(data), "--steps", "1"])
    assert "error: sample '000_0' of" in capsys.readouterr().err
    data = write_folder(tmp_path / "good", num_objects=2, lights=1, image_size=16)
    pipeline = build()
    with torch.no_grad():
        pipeline.unet.unet.conv_out.bias.fill_(torch.nan)
    pipeline.save_pretrained(tmp_path / "broken")
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "broken"), "--data", str(data), "--steps", "1"])
    assert "the maps of 1 steps are not finite, this model has diverged" in capsys.readouterr().err
