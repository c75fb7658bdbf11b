"""Preparation from drawn scenes to items: what it writes, how it resumes, what it refuses and what it drops."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import backlot.crops
from backlot.crops import crop
from data_prep.layouts import encode
from data_prep.layouts.__main__ import main
from data_prep.layouts.dataset import LayoutDataset
from data_prep.layouts.format import CLIP, DINO, LATENTS, TEXTS
from data_prep.layouts.prepare_synthetic_dataset import main as prepare_synthetic
from data_prep.layouts.procedural import ProceduralSettings, Scene, draw_scene, render
from data_prep.layouts.settings import SEQUENCE_LENGTHS
from pipelines.layout_flux.encoders import LayoutEncoders
from pipelines.layout_flux.tiny import WORDS, clip_tokenizer, t5_tokenizer

COUNT = 10
DEMO = ["--profile", "demo", "--models", "tiny", "--vae", "pixels:2", "--device", "cpu", "--num_workers", "0"]


def run(folder, *more: str) -> None:
    main(["prepare", *DEMO, "--num_samples", str(COUNT), "--output_dir", str(folder), *more])


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts") / "data"
    run(folder)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "data")


def files(folder) -> dict:
    """Every file with its content and its time, but those of the end."""
    changing = {"prepare.lock", "manifest.jsonl", "prepare_meta.json", "report.json", "splits.json"}
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in changing]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def refused(folder, capsys, *more: str) -> str:
    """The one line of an exit with code 2."""
    with pytest.raises(SystemExit) as error:
        run(folder, *more)
    assert error.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_an_item_has_what_its_picture_and_caption_say(original):
    dataset = LayoutDataset(original, split="all", max_objects=6)
    assert len(dataset) == COUNT
    for row in range(COUNT):
        item, scene = dataset[row], Scene.from_caption(dataset.caption_values(row))
        count = len(scene.objects)
        assert item["valid"].tolist() == [True] * count + [False] * (6 - count)
        assert np.allclose(item["boxes"].values[:count], [each.box for each in scene.objects], atol=1e-6)
        for name in ("text_embeds", "clip_embeds", "dino_embeds", "depth_labels", "phrase_spans", "is_foreground"):
            assert not item[name][count:].any(), name
        assert item["has_reference"].equal(item["valid"])
        assert item["is_foreground"][:count].tolist() == [each.is_foreground for each in scene.objects]
        assert (item["depth_labels"][:count] == 0).equal(item["is_foreground"][:count])
        assert np.array_equal(dataset.picture(row), render(scene))
        assert item["prompt_embeds"].shape == (24, 64)
        assert item["latents"].shape == (12, 16, 16)


def test_embeddings_are_of_the_reference_by_the_one_crop(original):
    dataset, encoders = LayoutDataset(original, split="all"), LayoutEncoders.load(original / "models")
    for row in (0, 3):
        item = dataset[row]
        for place, (pixels, box) in enumerate(dataset.references(row)):
            picture = torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
            crops = crop(picture, box, 56)[None]
            for name, embed in {"clip_embeds": encoders.clip_crops, "dino_embeds": encoders.dino_crops}.items():
                assert torch.allclose(item[name][place], embed(crops)[0], atol=1e-5)
        caption = dataset.caption(row)
        texts = [f"{each.category_name}, {each.caption}" for each in caption.objects]
        assert torch.allclose(item["text_embeds"][: len(texts)], encoders.clip_text(texts), atol=1e-5)
        assert torch.allclose(item["prompt_embeds"], encoders.t5([caption.global_caption], 24)[0], atol=1e-5)


def test_phrase_spans_are_the_tokens_of_each_caption(original):
    dataset, tokenizer = LayoutDataset(original, split="all"), LayoutEncoders.load(original / "models").tokenizer_2
    for row in range(COUNT):
        caption, spans = dataset.caption(row), dataset[row]["phrase_spans"].tolist()
        ids = tokenizer(caption.global_caption)["input_ids"]
        phrases = [tokenizer.decode(ids[start:stop]) for start, stop in spans[: len(caption.objects)]]
        assert phrases == [each.caption for each in caption.objects]


def test_latents_are_shifted_and_scaled_both_ways(tmp_path):
    """FLUX's own kind of VAE: its mode of the picture in [-1, 1], stored as it is, scaled when read."""
    arguments = [argument for argument in DEMO if argument not in ("--vae", "pixels:2")]
    main(["prepare", *arguments, "--num_samples", "2", "--output_dir", str(tmp_path / "a")])
    dataset, vae = LayoutDataset(tmp_path / "a", split="all"), LayoutEncoders.load(tmp_path / "a" / "models").vae
    pixels = torch.from_numpy(dataset.picture(0)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        mode = vae.encode(pixels).latent_dist.mode()[0]
    assert torch.allclose(dataset[0]["latents"], (mode - 0.1159) * 0.3611, atol=1e-5)
    stored = load_file(tmp_path / "a" / LATENTS / "scene-000000.safetensors")["mean"]
    assert torch.allclose(stored, mode, atol=1e-5)


def test_splits_are_disjoint_and_an_id_never_changes_sides(original, folder):
    parts = [set(LayoutDataset(original, split=split).sample_ids) for split in ("train", "validation")]
    assert not parts[0] & parts[1]
    assert len(parts[0] | parts[1]) == COUNT
    main(["prepare", *DEMO, "--num_samples", str(COUNT + 4), "--output_dir", str(folder)])
    assert set(LayoutDataset(folder, split="train").sample_ids) >= parts[0]
    assert len(LayoutDataset(folder, split="all")) == COUNT + 4


def test_what_is_valid_is_left_alone(folder):
    before = files(folder)
    run(folder)
    assert files(folder) == before


def test_an_interrupted_preparation_goes_on_to_the_same_end(original, folder, monkeypatch):
    before = files(folder)
    for name in ("captions/scene-000002.json", f"{DINO}/scene-000003.safetensors", f"{TEXTS}/scene-000004.safetensors"):
        (folder / name).unlink()
    (folder / CLIP / "scene-000005.safetensors").write_bytes(b"half")
    (folder / "manifest.jsonl").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(encode, "encode_dino", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(folder)
    with pytest.raises(ValueError, match="is incomplete"):
        LayoutDataset(folder)
    run(folder)
    after = files(folder)
    assert after.keys() == before.keys()
    redone = {name for name in after if after[name] != before[name]}
    assert {name.rpartition("/")[2][:12] for name in redone} <= {f"scene-{n:06d}" for n in (2, 3, 4, 5)}
    first, second = (LayoutDataset(root, split="all") for root in (original, folder))
    assert first.sample_ids == second.sample_ids
    for row in range(COUNT):
        for name, value in first[row].items():
            if isinstance(value, torch.Tensor):
                assert torch.allclose(value, second[row][name], atol=1e-5), name


def interrupt(*_) -> None:
    raise KeyboardInterrupt


def test_what_was_made_of_something_else_is_refused(folder, capsys):
    assert "max_sequence_length (text: 24, now 16)" in refused(folder, capsys, "--max_sequence_length", "16")
    assert "seed (source: 0, now 1)" in refused(folder, capsys, "--seed", "1")
    assert "vae (vae: pixels:2, now pixels:4)" in refused(folder, capsys, "--vae", "pixels:4")
    assert "another held_out" in refused(folder, capsys, "--held_out")
    assert len(LayoutDataset(folder, split="all")) == COUNT  # a refusal changes nothing
    run(folder, "--max_sequence_length", "16", "--overwrite")
    assert LayoutDataset(folder)[0]["prompt_embeds"].shape == (16, 64)


def test_another_way_to_cut_crops_makes_embeddings_stale(folder, capsys, monkeypatch):
    recipe = {**backlot.crops.RECIPE, "context": 0.2}
    monkeypatch.setattr(encode, "RECIPE_SHA256", backlot.crops.json_sha256(recipe))
    assert "another crops (clip" in refused(folder, capsys)


def test_other_weights_of_a_model_make_what_they_made_stale(folder, capsys):
    path = folder / "models" / "dino" / "model.safetensors"
    weights = load_file(path)
    weights["layernorm.bias"] += 1
    save_file(weights, path, {"format": "pt"})
    assert "another dino" in refused(folder, capsys)


def test_a_caption_that_changed_is_refused(folder, capsys):
    path = folder / "captions" / "scene-000001.json"
    values = json.loads(path.read_text())
    values["objects"][0]["bbox"] = [0.0, 0.0, 0.5, 0.5]
    path.write_text(json.dumps(values))
    assert "scene-000001.safetensors was made of another caption" in refused(folder, capsys)


def test_bad_samples_are_listed_and_dropped_and_never_zeros(folder, capsys):
    values = json.loads((folder / "captions/scene-000001.json").read_text())
    values["objects"][0]["bbox"] = [0.5, 0.5, 0.2, 0.2]
    (folder / "captions/scene-000001.json").write_text(json.dumps(values))
    (folder / "references/scene-000002_0.png").write_bytes(b"no picture at all, but as many bytes as it takes")
    (folder / "images/scene-000003.png").unlink()
    for number in (2, 3):
        for kind in (CLIP, DINO, LATENTS):
            (folder / kind / f"scene-{number:06d}.safetensors").unlink()
    run(folder)
    assert "7 samples, 3 dropped" in capsys.readouterr().out
    report = json.loads((folder / "report.json").read_text())
    assert report["num_samples"] == 7
    assert "x1 < x2" in report["dropped"]["scene-000001"]
    assert "is no picture" in report["dropped"]["scene-000002"]
    assert "is missing" in report["dropped"]["scene-000003"]
    assert not {f"scene-{n:06d}" for n in (1, 2, 3)} & set(LayoutDataset(folder, split="all").sample_ids)


def test_a_damaged_sample_is_named_when_it_is_read(folder, capsys):
    (folder / CLIP / "scene-000000.safetensors").unlink()
    tensors = load_file(folder / DINO / "scene-000001.safetensors")
    save_file({"cls": tensors["cls"][:1], "valid": tensors["valid"]}, folder / DINO / "scene-000001.safetensors")
    path = folder / LATENTS / "scene-000002.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    dataset = LayoutDataset(folder, split="all")
    for row, message in enumerate(["is missing", "cls has 1 rows for", "is damaged"]):
        with pytest.raises(ValueError, match=message):
            dataset[row]
    assert dataset[3]["sample_id"] == "scene-000003"
    with pytest.raises(SystemExit) as error:
        main(["check", str(folder)])
    assert error.value.code == 2
    assert "bad: 3" in capsys.readouterr().out


def test_the_largest_objects_are_kept(original):
    few, many = (LayoutDataset(original, split="all", max_objects=n) for n in (1, 6))
    for row in range(COUNT):
        boxes = many[row]["boxes"].values
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        assert np.allclose(few[row]["boxes"].values[0], boxes[areas.argmax()])
        assert few[row]["dino_embeds"][0].equal(many[row]["dino_embeds"][int(areas.argmax())])


def test_held_out_identities_are_never_trained_on(tmp_path):
    main(["prepare", *DEMO, "--num_samples", "2", "--held_out", "--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match="for evaluation only"):
        LayoutDataset(tmp_path)
    assert len(LayoutDataset(tmp_path, split="test")) == 2


def test_a_benchmark_is_never_trained_on_and_a_folder_can_be_imported(original, tmp_path, capsys):
    annotations = [{"bbox": [0, 0, 16, 16], "category_name": "square"}]
    row = {"id": 1, "prompt": "a square", "width": 32, "height": 32, "annos": annotations}
    (tmp_path / "test.json").write_text(json.dumps([row, {**row, "id": 2}]))
    Image.fromarray(LayoutDataset(original).picture(0)).save(tmp_path / "1.jpg")
    source = ["--source", "denselayout", "--path", str(tmp_path / "test.json"), "--images", str(tmp_path)]
    main(["prepare", *DEMO, *source, "--output_dir", str(tmp_path / "dense")])
    assert "1 samples, 1 dropped" in capsys.readouterr().out
    with pytest.raises(ValueError, match="for evaluation only"):
        LayoutDataset(tmp_path / "dense")

    older = shutil.copytree(original, tmp_path / "older")
    first = LayoutDataset(original, split="all")
    for row in range(len(first)):
        item, image_id = first[row], first.sample_ids[row]
        for kind, name in ((CLIP, "clip_embeds"), (DINO, "dino_embeds")):
            for place in range(int(item["valid"].sum())):
                np.save(older / kind / f"{image_id}_obj{place}.npy", item[name][place].numpy() + 1)
    (older / DINO / "scene-000004_obj0.npy").unlink()
    source = ["--source", "folder", "--path", str(older), "--adopt_embeddings"]
    main(["prepare", *DEMO, *source, "--output_dir", str(tmp_path / "new")])
    assert f"{COUNT - 1} samples, 1 dropped" in capsys.readouterr().out
    again = LayoutDataset(tmp_path / "new", split="all")
    for row, image_id in enumerate(again.sample_ids):
        count = int(again[row]["valid"].sum())
        expected = first[first.sample_ids.index(image_id)]["dino_embeds"][:count] + 1
        assert torch.allclose(again[row]["dino_embeds"][:count], expected)


def test_the_guides_module_prepares_drawn_scenes_in_output_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prepare_synthetic([*DEMO, "--num_samples", "1"])
    names = ("images", "captions", CLIP, DINO, LATENTS, TEXTS)
    assert all((tmp_path / "output_data" / name).is_dir() for name in names)
    assert "output_data: 1 samples, 0 dropped" in capsys.readouterr().out


def test_wrong_arguments_are_one_line(capsys, tmp_path):
    assert "--source coco needs a --path" in refused(tmp_path / "x", capsys, "--source", "coco")
    assert "multiple of 4" in refused(tmp_path / "x", capsys, "--resolution", "34")
    assert "must be a folder, a hub id or pixels:N" in refused(tmp_path / "x", capsys, "--vae", "pixels:0")
    assert "no folder of models" in refused(tmp_path / "x", capsys, "--models", str(tmp_path))
    with pytest.raises(ValueError, match="holds no prepared layouts"):
        LayoutDataset(tmp_path)


def test_a_folder_that_another_process_prepares_is_refused(folder, capsys):
    code = "import sys; from pathlib import Path; from backlot.files import lock; file = lock(Path(sys.argv[1]));"
    code += "print('locked', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(folder / "prepare.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline().strip() == "locked"
        assert f"by another process ({other.pid} on" in refused(folder, capsys)
        other.communicate()


@pytest.mark.parametrize(("profile", "count"), [("demo", 100), ("full", 10)])
def test_tiny_tokenizers_know_the_words_of_drawn_scenes(profile, count):
    tokenizers = [make(WORDS) for make in (clip_tokenizer, t5_tokenizer)]
    for seed in range(count):
        caption = draw_scene(seed, ProceduralSettings.preset(profile)).global_caption
        words = caption.replace(",", " ,").split()
        for tokenizer in tokenizers:
            assert len(tokenizer(caption, add_special_tokens=False)["input_ids"]) == len(words), caption
        assert profile == "full" or len(tokenizers[1](caption)["input_ids"]) <= SEQUENCE_LENGTHS["demo"]
