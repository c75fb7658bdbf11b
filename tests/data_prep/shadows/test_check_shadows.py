"""The check of shadow data names every bad sample in one line and tells what the good ones are like."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image
from shadow_samples import FAULTS, make_samples, save_folder, write_folder, write_tar

from data_prep.shadows.check import Findings, composite
from data_prep.shadows.commands import check as main
from data_prep.shadows.dataset import ShadowDataset, load_sample


def check(*argv, code: int, capsys) -> list[str]:
    """The lines the command prints."""
    if code:
        with pytest.raises(SystemExit) as caught:
            main([str(value) for value in argv])
        assert caught.value.code == code
    else:
        main([str(value) for value in argv])
    return capsys.readouterr().out.splitlines()


def test_good_data_have_one_line(tmp_path, capsys):
    write_folder(tmp_path / "folder")
    write_tar(tmp_path / "softness.tar", "softness_control_")  # evaluation data are checked like others
    for path in tmp_path.iterdir():
        assert check(path, code=0, capsys=capsys) == ["samples: 12, bad: 0"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_bad_sample_is_named(tmp_path, capsys, num_workers):
    folder = write_folder(tmp_path, num_objects=len(FAULTS) + 2, lights=1)
    stems = [f"{number:03d}_0" for number in range(len(FAULTS))]
    for stem, (damage, _) in zip(stems, FAULTS.values(), strict=True):
        damage(folder, stem)
    *lines, last = check(folder, "--num_workers", num_workers, code=2, capsys=capsys)
    assert last == f"samples: {len(FAULTS) + 2}, bad: {len(FAULTS)}"
    assert len(lines) == len(FAULTS)
    for line, stem, (_, message) in zip(lines, stems, FAULTS.values(), strict=True):
        pattern = rf"sample '{stem}' of {re.escape(str(folder))}: .*{message.replace('STEM', stem)}"
        assert re.match(pattern, line), line


def test_tars_are_checked_to_their_end(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", "a")
    data = write_tar(tmp_path / "b.tar", "b").read_bytes()
    (tmp_path / "b.tar").write_bytes(data[: len(data) // 2])
    lines = check(tmp_path, code=2, capsys=capsys)
    assert lines[0].startswith(f"{tmp_path}: b.tar: it is not a complete, uncompressed tar file (")
    assert re.match(r"sample 'b003_0' of .*missing", lines[1])
    assert lines[2:] == ["samples: 19, bad: 1, unreadable tars: 1"]


@pytest.mark.parametrize(
    ("text", "message"), [(None, "metadata.json is missing"), ("{,}", "metadata.json is damaged: not JSON")]
)
def test_without_readable_metadata(tmp_path, capsys, text, message):
    path = write_folder(tmp_path) / "metadata.json"
    path.unlink()
    if text:
        path.write_text(text)
    for path, reason in ((tmp_path, message), (tmp_path / "nowhere", "does not exist")):
        with pytest.raises(SystemExit, match="2"):
            main([str(path)])
        assert re.fullmatch(f"error: .*{reason}.*\n", capsys.readouterr().err)


def test_no_samples_are_not_good_samples(tmp_path, capsys):
    folder = save_folder(tmp_path, {})
    assert check(folder, "--statistics", code=2, capsys=capsys) == ["samples: 0, bad: 0"]


def test_statistics(tmp_path, capsys):
    samples = make_samples(6, 2)
    lights = [(0, 0, 2), (45, 359, 8), (20, 45, 4)] + [(22, 100, 4)] * 9
    for number, (sample, light) in enumerate(zip(samples.values(), lights, strict=True)):
        sample["metadata"] |= dict(zip(("theta", "phi", "size"), light, strict=True))
        sample["metadata"] |= {"family": "torus" if number < 3 else "box", "clipped": number == 0}
        sample["shadow"] = np.zeros((32, 32))
    samples["000_0"]["shadow"][:, 16:] = 0.5
    samples["003_1"]["shadow"] = np.zeros((32, 32, 3))  # no grey picture: not counted
    samples["003_1"]["shadow"][0, 0, 0] = 1
    samples["003_1"]["shadow"] = (samples["003_1"]["shadow"] * 255).astype(np.uint8)
    lines = check(save_folder(tmp_path, samples), "--statistics", code=2, capsys=capsys)
    assert re.match("sample '003_1' of .* its shadow has colours", lines[0])
    assert lines[1] == "objects: 6 (1.8 samples each)"
    assert lines[2:4] == ["family: box 8, torus 3", "pixels: 32x32 11"]
    assert "theta: 0 to 45, mean 21.91" in lines
    assert "phi: 0 to 359, mean 109.5" in lines
    assert "size: 2 to 8, mean 4.182" in lines
    histogram = [line.split() for line in lines if re.match(r"  +\d+ - \d+", line)]
    assert sum(int(row[3]) for row in histogram) == 3 * 11
    assert ["20", "-", "25", "9", "#" * 40] in histogram
    assert ["0", "-", "5", "1", "#" * 4] in histogram
    masks = [load_sample(Findings(tmp_path).source, row).mask.mean() for row in range(12) if row != 7]
    assert f"mask_coverage: {np.mean(masks):.2%} of the picture ({min(masks):.2%} to {max(masks):.2%})" in lines
    assert f"shadow_coverage: {0.5 / 11:.2%} of the picture (0.00% to 50.00%)" in lines
    assert f"shadow_rms: {0.5 * 0.5**0.5 / 11:.4f} (0.0000 to {0.5 * 0.5**0.5:.4f})" in lines
    assert f"clipped: {1 / 11:.2%} by the metadata" in lines
    assert f"touches_border: {1 / 11:.2%}" in lines
    assert lines[-1] == "samples: 12, bad: 1"


def test_objects_are_counted_without_ids(tmp_path, capsys):
    write_tar(tmp_path / "data.tar", num_objects=3, lights=4, object_ids=False)
    assert "objects: 3 (4.0 samples each)" in check(tmp_path / "data.tar", "--statistics", code=0, capsys=capsys)


def test_the_contact_sheet_shows_samples_from_all_over(tmp_path, capsys):
    folder = write_folder(tmp_path / "data", num_objects=10, image_size=48)
    sheet = tmp_path / "sheet.png"
    options = ["--contact_sheet", sheet, "--num_samples", 3, "--image_size", 32]
    check(folder, *options, code=0, capsys=capsys)
    pixels = np.asarray(Image.open(sheet).convert("RGB")).astype(int)
    dataset = ShadowDataset(folder, split="all", image_size=32)
    gap, margin = 4, pixels.shape[1] - (4 * 36 + 4)
    for line, row in enumerate((0, 6, 13)):
        item = dataset[row]
        cells = [
            pixels[gap + line * 36 :, margin + gap + column * 36 :][:32, :32].transpose(2, 0, 1) for column in range(4)
        ]
        expected = [(item["object_image"] + 1) / 2, item["mask"], item["shadow_map"]]
        for cell, picture in zip(cells, expected, strict=False):
            assert np.abs(cell - picture.numpy() * 255).max() <= 0.51
        background = item["mask"][0].numpy() == 0
        assert np.allclose(cells[3][:, background], 0.85 * (255 - cells[2][:, background]), atol=1)
        solid = item["mask"][0].numpy() == 1
        assert np.array_equal(cells[3][:, solid], cells[0][:, solid])
    assert len(pixels) == 3 * 36 + 4
    label = pixels[: gap + 36, :margin]
    assert label.min() < 120  # something is written there


def test_composite_keeps_the_object_and_the_lit_ground(tmp_path):
    sample = load_sample(Findings(write_folder(tmp_path)).source, 0)
    picture, inside = composite(sample), sample.mask == 1
    assert np.array_equal(picture[inside], sample.object_image[inside])
    assert np.allclose(picture[~inside & (sample.shadow == 0)], 0.85)
    assert np.allclose(picture[~inside & (sample.shadow == 1)], 0)


@pytest.mark.parametrize(("flag", "low"), [("--num_samples", 1), ("--image_size", 8), ("--num_workers", 0)])
def test_flags_out_of_range(tmp_path, capsys, flag, low):
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), flag, str(low - 1)])
    expected = f"error: {flag} {low - 1}: input should be greater than or equal to {low}\n"
    assert capsys.readouterr().err == expected
