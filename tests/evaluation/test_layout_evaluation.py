"""Variants of layouts, statistics, the figures of true pictures, and a tiny FLUX measured with them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from flux_checkpoint import SIDE, create_adapter, write_flux
from PIL import Image
from torch.utils.data import default_collate

from backlot.crops import HostBoxes
from backlot.pictures import to_pixel_values
from data_prep.layouts.commands import prepare
from data_prep.layouts.dataset import LayoutDataset
from data_prep.layouts.procedural import ProceduralSettings, draw_scene, render, render_reference
from evaluation.layout_flux.__main__ import main
from evaluation.layout_flux.benchmarks import Instance, Request
from evaluation.layout_flux.benchmarks.__main__ import main as run_benchmarks
from evaluation.layout_flux.benchmarks.formats import write_requests
from evaluation.layout_flux.drawing import (
    FLOW_SIGMAS,
    Drawing,
    draw,
    draw_request,
    flow_losses,
    load_model,
    noise_generator,
)
from evaluation.layout_flux.examples import (
    DESCRIPTION,
    Example,
    exchange,
    other_references,
    pairs_to_swap,
    read_examples,
    read_profile,
)
from evaluation.layout_flux.identity import Similarity
from evaluation.layout_flux.measure import (
    KEYS,
    Measured,
    Protocol,
    compare,
    estimates,
    measure,
    measure_every_object,
    score_shuffled,
    score_swapped,
    summarise,
)
from evaluation.layout_flux.metrics import swap_objects
from evaluation.layout_flux.settings import Sampling, Settings, Variants
from evaluation.layout_flux.statistics import NOTHING, Table, difference, estimate
from pipelines.layout_flux import Layout, LayoutFlux
from pipelines.layout_flux.encoders import LayoutEncoders, crop_for, object_text, phrase_tokens, scale_latents
from pipelines.layout_flux.files import save_adapter
from pipelines.layout_flux.layout import DEPTH_LABELS

DEMO = ProceduralSettings.preset("demo")
SAMPLING = Sampling(num_inference_steps=2)
NUM_TOKENS = 24
MAX_OBJECTS = 4


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return write_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def adapter_folder(flux, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    transformer = FluxTransformer2DModel.from_pretrained(flux, subfolder="transformer")
    save_adapter(create_adapter(transformer, base_model=str(flux)), folder)
    return folder


@pytest.fixture(scope="module")
def encoders(flux):
    return LayoutEncoders.load(flux)


@pytest.fixture(scope="module")
def pipeline(adapter_folder):
    return load_model(str(adapter_folder), None, "cpu")


@pytest.fixture(scope="module")
def examples(encoders):
    return [make_example(seed, encoders) for seed in range(6)]


def make_example(seed: int, encoders: LayoutEncoders) -> Example:
    """A scene as `data_prep.layouts.LayoutDataset` gives it, encoded here."""
    scene = draw_scene(seed, DEMO, held_out=True)
    references = tuple(render_reference(each.identity, seed, DEMO) for each in scene.objects)
    count = len(scene.objects)

    def padded(rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows, torch.zeros(MAX_OBJECTS - count, *rows.shape[1:], dtype=rows.dtype)])

    crops = {
        name: torch.stack([crop_for(processor, picture(image), box) for image, box in references])
        for name, processor in (("clip", encoders.clip_processor), ("dino", encoders.dino_processor))
    }
    boxes = np.zeros((MAX_OBJECTS, 4), np.float32)
    boxes[:count] = [each.box for each in scene.objects]
    spans = phrase_tokens(
        encoders.tokenizer_2, scene.global_caption, [each.phrase_span for each in scene.objects], NUM_TOKENS
    )
    item = {
        "latents": scale_latents(encoders.vae, encoders.latents(picture(render(scene))[None]))[0],
        "prompt_embeds": encoders.t5([scene.global_caption], NUM_TOKENS)[0],
        "pooled_prompt_embeds": encoders.clip_text([scene.global_caption])[0],
        "boxes": HostBoxes(boxes),
        "valid": torch.arange(MAX_OBJECTS) < count,
        "text_embeds": padded(encoders.clip_text([object_text(each.shape, each.caption) for each in scene.objects])),
        "clip_embeds": padded(encoders.clip_crops(crops["clip"])),
        "dino_embeds": padded(encoders.dino_crops(crops["dino"])),
        "has_reference": torch.arange(MAX_OBJECTS) < count,
        "depth_labels": padded(torch.tensor([DEPTH_LABELS.index(each.depth_label) for each in scene.objects])),
        "is_foreground": padded(torch.tensor([each.is_foreground for each in scene.objects])),
        "phrase_spans": padded(torch.tensor(spans)),
        "sample_id": f"scene-{seed}",
    }
    return Example(
        {name: value.clone() if torch.is_tensor(value) else value for name, value in item.items()}, scene, references
    )


def picture(image: np.ndarray) -> torch.Tensor:
    return to_pixel_values(Image.fromarray(image))


def make_protocol(examples, **others) -> Protocol:
    values = {"variants": Variants(), "sampling": SAMPLING, "batch_size": 4}
    return Protocol(examples, DEMO, **{**values, **others})


# --- statistics -----------------------------------------------------------------------------------------------------


def test_intervals_resample_layouts_not_objects():
    rng = np.random.default_rng(0)
    of_layouts = rng.normal(size=400)
    alone = estimate(of_layouts, np.arange(400))
    copied = estimate(np.repeat(of_layouts, 9), np.repeat(np.arange(400), 9))
    assert alone.mean == pytest.approx(copied.mean)
    width = alone.high - alone.low
    assert width == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert copied.high - copied.low == pytest.approx(width, rel=0.1)  # nothing is learnt from copies
    assert copied.count == 3600
    assert alone.low < alone.mean < alone.high


def test_ratios_and_missing_values():
    values, layouts = np.array([1.0, np.nan, 3.0]), np.array([0, 0, 7])
    assert estimate(values, layouts).mean == 2
    assert estimate(values, layouts).count == 2
    assert estimate(values, layouts, np.array([1.0, 1.0, 3.0])).mean == 1
    assert estimate(np.array([np.nan]), np.array([0])) == NOTHING
    assert Table(np.arange(2)).estimate("unknown") == NOTHING


def test_differences_are_paired():
    before, after = Table(np.arange(50)), Table(np.arange(50))
    values = np.random.default_rng(0).normal(size=50)
    before.add("iou", values)
    after.add("iou", values + 0.1)
    found = difference(after, before, "iou")
    assert (found.mean, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert difference(after, before, "other") == NOTHING
    with pytest.raises(ValueError, match="only tables of the same layouts"):
        difference(after, before.where(before.layouts < 3), "iou")
    with pytest.raises(ValueError, match="`short` must have 50 values"):
        after.add("short", [1.0])


# --- variants -------------------------------------------------------------------------------------------------------


def test_other_references_are_of_the_same_shape_and_colour(encoders):
    examples = [make_example(seed, encoders) for seed in range(9)]
    owners = {
        tuple(example.item["dino_embeds"][place].tolist()): each.identity
        for example in examples
        for place, each in enumerate(example.scene.objects)
    }
    changed = 0
    for example, (item, is_other) in zip(examples, other_references(examples), strict=True):
        for place, each in enumerate(example.scene.objects):
            now = owners[tuple(item["dino_embeds"][place].tolist())]
            assert now.with_mark(0) == each.identity.with_mark(0)
            assert (now.mark != each.identity.mark) == is_other[place]
            changed += is_other[place]
        assert item["text_embeds"] is example.item["text_embeds"]
        lacking = [place for place in range(MAX_OBJECTS) if not example.item["valid"][place]]
        assert torch.equal(item["dino_embeds"][lacking], example.item["dino_embeds"][lacking])
    assert changed > 5
    once, again = (other_references(examples)[0][0]["dino_embeds"] for _ in range(2))
    assert torch.equal(once, again)


def test_exchanged_descriptions_leave_boxes_and_depth(examples):
    item = examples[0].item
    swapped = exchange(item, 0, 1)
    for name in DESCRIPTION:
        assert torch.equal(swapped[name][0], item[name][1])
        assert torch.equal(swapped[name][1], item[name][0])
        assert torch.equal(swapped[name][2:], item[name][2:])
    for name in ("boxes", "depth_labels", "is_foreground", "valid", "prompt_embeds"):
        assert swapped[name] is item[name]
    for number, first, second in pairs_to_swap(examples):
        assert first != second < len(examples[number].scene.objects)


# --- figures of pictures that are known -------------------------------------------------------------------------------


def draw_truth(examples) -> np.ndarray:
    return np.stack([render(example.scene) for example in examples])


def measure_truth(protocol: Protocol, examples) -> Measured:
    """What a perfect model would get."""
    truth = draw_truth(examples)
    foreground = [[0.9 if each.is_foreground else 0.1 for each in example.scene.objects] for example in examples]
    measured = Measured(
        objects=measure_every_object(protocol, examples, Drawing(truth, foreground)),
        layouts=Table(np.arange(len(examples))),
        shuffled=Table(np.zeros(0, int)),
        swapped=Table(np.zeros(0, int)),
        drift=Table(np.zeros(0, int)),
    )
    pairs = pairs_to_swap(examples)
    swapped = [render(swap_objects(examples[number].scene, first, second)) for number, first, second in pairs]
    measured.swapped = score_swapped(protocol, truth, np.array(swapped), pairs)
    is_other = [np.ones(len(example.scene.objects), bool) for example in examples]
    measured.shuffled, measured.drift = score_shuffled(protocol, truth, truth, is_other)
    return measured


def test_true_pictures_reach_the_top(examples, encoders):
    measured = measure_truth(make_protocol(examples, similarity=Similarity(encoders)), examples)
    result = summarise(measured)
    for key in ("colour_accuracy", "shape_accuracy", "mask_iou", "swap", "alpha_agreement"):
        assert result[key] > 0.95, key
    assert result["box_iou"] > 0.85  # the outermost pixels do not count
    assert result["identity_retrieval"] > 0.6
    assert result["identity_shuffled"] == result["identity_retrieval"]  # the pictures are the same
    assert result["outside_drift"] is None  # and nothing changed inside
    assert result["dino_similarity"] > result["leakage"]
    assert set(KEYS) <= result.keys()
    count = sum(len(example.scene.objects) for example in examples)
    assert result["counts"]["box_iou"] == count
    low, high = result["intervals"]["box_iou"]
    assert low <= result["box_iou"] <= high
    groups = result["groups"]
    assert sum(groups[name]["box_iou"]["count"] for name in groups if name.startswith("objects_")) == count
    assert groups["overlapped"]["box_iou"]["count"] + groups["not_overlapped"]["box_iou"]["count"] == count
    assert result["further"]["alpha_agreement_foreground"]["mean"] == 1
    json.dumps(result, allow_nan=False)


def test_drift_is_the_change_outside_over_that_inside(examples):
    protocol = make_protocol(examples)
    truth = draw_truth(examples)
    other = truth.copy()
    for shown, example in zip(other, examples, strict=True):
        inside = np.zeros(shown.shape[:2], bool)
        for each in example.scene.objects:
            x1, y1, x2, y2 = (round(value * SIDE) for value in each.box)
            inside[y1:y2, x1:x2] = True
        shown[inside] ^= 1
    is_other = [np.ones(len(example.scene.objects), bool) for example in examples]
    figures = score_shuffled(protocol, truth, other, is_other)[1]
    assert estimate(figures.columns["outside"], figures.layouts, figures.columns["inside"]).mean == 0
    nobody = [np.zeros(len(example.scene.objects), bool) for example in examples]
    shuffled, drift = score_shuffled(protocol, truth, other, nobody)
    assert (len(shuffled), len(drift)) == (0, 0)


def test_similarity_is_one_for_the_reference_itself(encoders):
    example = make_example(0, encoders)
    place = 0
    image, box = example.references[place]
    crop = crop_for(encoders.dino_processor, picture(image), box)
    embeds = encoders.dino_crops(crop[None])[0]
    cosine = torch.cosine_similarity(embeds, example.item["dino_embeds"][place], dim=0)
    assert float(cosine) == pytest.approx(1, abs=1e-5)
    found = Similarity(encoders).measure(draw_truth([example]), [example])
    assert found["dino_similarity"].shape == (len(example.scene.objects),)
    assert (found["dino_similarity"] < 1).all()
    bare = {**example.item, "has_reference": torch.zeros_like(example.item["has_reference"])}
    found = Similarity(encoders).measure(draw_truth([example]), [Example(bare, example.scene, example.references)])
    assert all(np.isnan(values).all() for values in found.values())


# --- a model --------------------------------------------------------------------------------------------------------


def test_pictures_do_not_depend_on_their_batch(pipeline, examples):
    items = [example.item for example in examples[:3]]
    together = draw(pipeline, items, SAMPLING)
    apart = draw(pipeline, items, SAMPLING, batch_size=1)
    assert together.pictures.shape == (3, SIDE, SIDE, 3)
    assert np.abs(together.pictures.astype(int) - apart.pictures).max() <= 1  # rounding
    assert [len(row) for row in together.alphas] == [len(example.scene.objects) for example in examples[:3]]
    other = draw(pipeline, items, SAMPLING, seed=1).pictures
    assert np.abs(together.pictures.astype(int) - other).mean() > 1


def test_switches_do_what_they_say(pipeline, examples, flux):
    items = [example.item for example in examples[:2]]
    on, off = (draw(pipeline, items, SAMPLING, feedback=feedback).pictures for feedback in (True, False))
    assert (on != off).any()
    bare = draw(pipeline, items, SAMPLING, with_layout=False)
    assert bare.alphas is None
    plain = FluxPipeline.from_pretrained(flux)
    plain.set_progress_bar_config(disable=True)
    batch = default_collate(items)
    expected = plain(
        prompt_embeds=batch["prompt_embeds"],
        pooled_prompt_embeds=batch["pooled_prompt_embeds"],
        height=SIDE,
        width=SIDE,
        num_inference_steps=2,
        generator=[noise_generator(0, name) for name in batch["sample_id"]],
        output_type="np",
    ).images
    assert np.array_equal(bare.pictures, (255 * expected).round().astype(np.uint8))


def test_the_flow_loss_is_that_of_training(pipeline, examples):
    items = [example.item for example in examples[:2]]
    losses, magnitude = flow_losses(pipeline, items)
    assert losses.shape == (2,)
    assert magnitude > 0
    assert flow_losses(pipeline, items, batch_size=1)[0] == pytest.approx(losses, rel=1e-4)
    without, silent = flow_losses(pipeline, items, feedback=False)
    assert silent is None
    assert not np.array_equal(without, losses)

    network = LayoutFlux(pipeline.transformer)
    network.adapter = pipeline.layout_adapter
    batch = default_collate(items)
    expected = 0
    for level in range(FLOW_SIGMAS):
        sigma = (level + 0.5) / FLOW_SIGMAS
        clean = batch["latents"]
        noise = torch.stack(
            [torch.randn(clean.shape[1:], generator=noise_generator(0, name, level)) for name in batch["sample_id"]]
        )
        with torch.no_grad():
            output = network(
                (1 - sigma) * clean + sigma * noise,
                torch.full((2,), sigma),
                batch["prompt_embeds"],
                batch["pooled_prompt_embeds"],
                Layout.from_batch(batch),
            )
        expected += (output.velocity - (noise - clean)).square().flatten(1).mean(1) / FLOW_SIGMAS
    assert losses == pytest.approx(expected.numpy(), rel=1e-5)


def test_every_variant_is_measured(pipeline, examples, encoders):
    variants = Variants(num_layouts=5, num_shuffled=4, num_swapped=3, num_without_feedback=2)
    protocol = make_protocol(examples, variants=variants, similarity=Similarity(encoders))
    measured = measure(pipeline, protocol)
    shapes = {name: len(pictures) for name, pictures in measured.pictures.items()}
    assert shapes.pop("swapped") <= 3
    assert shapes == {"plain": 5, "shuffled": 4, "without_feedback": 2}
    result = summarise(measured)
    assert result["num_layouts"] == 5
    assert result["feedback"]["magnitude"] > 0
    assert result["feedback"]["picture_change"] > 0
    gain = result["feedback"]["on_minus_off"]
    count = sum(len(example.scene.objects) for example in examples[:2])
    assert (gain["box_iou"]["count"], gain["flow_loss"]["count"]) == (count, 2)
    assert None not in (result["dino_similarity"], result["further"]["flow_loss"]["mean"], result["leakage"])

    bare = measure(pipeline, protocol, with_layout=False)
    assert (bare.alphas, bare.without_feedback) == (None, None)
    base = summarise(bare)
    assert {key for key in KEYS if base[key] is None} >= {"alpha_agreement"}
    assert {*KEYS, "intervals", "counts", "groups", "further", "num_layouts"} == base.keys()
    assert (bare.pictures["shuffled"] == bare.pictures["plain"][:4]).all()
    found = compare(measured, bare)
    assert found["box_iou"].mean == pytest.approx(result["box_iou"] - base["box_iou"])
    assert estimates(bare)["swap"].mean == 0
    json.dumps([base, result], allow_nan=False)


def test_a_benchmark_s_picture_takes_its_boxes(pipeline):
    box = (0.0, 0.0, 0.5, 1.0)
    request = Request(
        "1", "a red cup", SIDE + 1, SIDE, (Instance("cup", "a red cup", box), Instance("x", "x", (0, 0, 0, 0)))
    )
    shown = draw_request(pipeline, request, SAMPLING, 0)
    assert shown.size == (SIDE, SIDE)
    empty = Request("1", "a red cup", SIDE, SIDE, ())
    assert draw_request(pipeline, empty, SAMPLING, 0) != shown


def test_pictures_of_a_benchmark_are_named_by_their_ids_and_made_once(adapter_folder, tmp_path, capsys):
    box = (0.0, 0.0, 0.5, 1.0)
    requests = [
        Request(name, "a red cup", SIDE, SIDE, (Instance("cup", "a red cup", box),)) for name in ("0007", "x-1")
    ]
    write_requests(requests, tmp_path / "requests.jsonl")
    output = tmp_path / "pictures"
    arguments = [str(adapter_folder), "--requests", str(tmp_path / "requests.jsonl"), "--output", str(output)]
    arguments = ["generate", *arguments, "--num_inference_steps", "1", "--device", "cpu"]
    run_benchmarks(arguments)
    assert sorted(file.name for file in output.iterdir()) == ["0007.jpg", "x-1.jpg"]
    assert Image.open(output / "0007.jpg").size == (SIDE, SIDE)
    before = (output / "0007.jpg").stat().st_mtime_ns
    (output / "x-1.jpg").unlink()
    run_benchmarks(arguments)
    assert (output / "0007.jpg").stat().st_mtime_ns == before
    assert (output / "x-1.jpg").exists()
    assert f"{output}: 2 pictures" in capsys.readouterr().out


def test_models_are_named_by_their_folders():
    settings = Settings(models=("runs/stage1", "two=runs/x/checkpoint-10"), data="d")
    assert settings.named_models() == {"stage1": "runs/stage1", "two": "runs/x/checkpoint-10"}
    for models, message in ((("a/x", "b/x"), "two have one name"), (("no_layout",), "the name of the base")):
        with pytest.raises(ValueError, match=message):
            Settings(models=models, data="d")


# --- the program ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(flux, tmp_path_factory):
    """Layouts of identities that no training scene shows, encoded by the base's own models."""
    folder = tmp_path_factory.mktemp("prepared")
    arguments = ["--output_dir", str(folder), "--models", str(flux), "--device", "cpu", "--num_samples", "5"]
    prepare([*arguments, "--profile", "demo", "--held_out", "--max_sequence_length", str(NUM_TOKENS)])
    return folder


def test_examples_are_what_was_prepared(prepared, encoders):
    scenes = read_profile(prepared)
    assert scenes == DEMO
    dataset = LayoutDataset(prepared, split="all", max_objects=scenes.max_objects)
    read = read_examples(dataset, 3)
    assert [example.name for example in read] == ["scene-000000", "scene-000001", "scene-000002"]
    for row, example in enumerate(read):
        assert np.array_equal(render(example.scene), dataset.picture(row))
        count = len(example.scene.objects)
        assert example.item["valid"].tolist() == [place < count for place in range(MAX_OBJECTS)]
        assert np.allclose(example.item["boxes"].values[:count], [each.box for each in example.scene.objects])
        image, box = example.references[0]
        crop = crop_for(encoders.dino_processor, picture(image), box)
        assert torch.allclose(encoders.dino_crops(crop[None])[0], example.item["dino_embeds"][0], atol=1e-4)


def test_the_program_prints_and_writes_everything(adapter_folder, flux, prepared, tmp_path, capsys):
    output = tmp_path / "new" / "metrics.json"
    few = ["--num_layouts", "4", "--num_shuffled", "3", "--num_swapped", "3", "--num_without_feedback", "2"]
    arguments = ["--data", str(prepared), "--encoders", str(flux), *few, "--num_inference_steps", "2"]
    main([f"one={adapter_folder}", f"two={adapter_folder}", *arguments, "--device", "cpu", "--output", str(output)])
    content = json.loads(output.read_text())
    assert [name for name in content if name in ("no_layout", "one", "two")] == ["no_layout", "one", "two"]
    assert set(KEYS) <= content["no_layout"].keys() & content["two"].keys()
    assert content["one"]["box_iou"] == content["two"]["box_iou"]
    names = ["one - no_layout", "two - one", "one, bridge on - off", "two, bridge on - off"]
    assert list(content["comparisons"]) == names
    zero = content["comparisons"]["two - one"]["box_iou"]
    assert (zero["mean"], zero["low"], zero["high"]) == (0, 0, 0)
    assert content["data"]["num_layouts"] == 4
    assert content["data"]["evaluation_only"] is True
    out = capsys.readouterr().out
    assert "colour in visible part" in out
    assert "paired differences" in out
    assert f"written to {output}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("ADAPTER --data nowhere", "nowhere"),
        ("nowhere --data DATA --encoders FLUX --num_layouts 1", "nowhere holds no layout adapter"),
        ("ADAPTER --data DATA --encoders FLUX --base_model nowhere --num_layouts 1", "nowhere"),
        ("ADAPTER --data DATA --encoders tiny", "clip_vision of tiny is not what DATA was encoded with"),
        ("ADAPTER --data DATA --num_layouts 0", "--num_layouts 0: input should be greater than or equal to 1"),
        ("a/x b/x --data DATA", "two have one name"),
        ("--data DATA", "MODELS is required"),
        ("ADAPTER --data DATA --output OUT", "OUT is a folder"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(
    arguments, message, adapter_folder, flux, prepared, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    places = {"ADAPTER": adapter_folder, "DATA": prepared, "FLUX": flux, "OUT": tmp_path}
    for name, path in places.items():
        arguments, message = arguments.replace(name, str(path)), message.replace(name, str(path))
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert message in lines[0]
