"""The demo's report: one file, no network, every picture decodes; and the layout of metrics.json."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess

import pytest
import torch
from PIL import Image

from demos import report, shortcut
from evaluation.shortcut.measure import DigitsReference

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PICTURE = re.compile(r'<img src="data:image/png;base64,([^"]+)"')


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report over random samples, written by the demo's own functions."""
    folder = tmp_path_factory.mktemp("demo")
    generator = torch.Generator().manual_seed(0)
    samples = {
        arm: {name: torch.rand(120, 1, 8, 8, generator=generator) * 2 - 1 for name in shortcut.settings_of(arm)}
        for arm in shortcut.ARMS
    }
    for arm in shortcut.ARMS:
        (folder / arm).mkdir()
        rows = [{"step": 20 * i, "loss": 1 / i, "loss_flow": 1 / i} for i in range(1, 9)]
        (folder / arm / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = shortcut.measure(samples, DigitsReference()) | {"updates": 160, "seconds": {}}
    shortcut.write_report(folder, samples, metrics)
    return folder / "report.html", metrics


def test_metrics_have_the_promised_keys(written):
    _, metrics = written
    for distance in ("energy_distance", "frechet"):
        for arm in ("flow_matching", "shortcut"):
            assert list(metrics[distance][arm]) == ["1", "2", "4", "8", "128"]
        assert metrics[distance]["shortcut_irregular"]["steps"] == [0.5, 0.3, 0.15, 0.05]
        assert metrics[distance]["shortcut_irregular"]["value"] > metrics["floor"][distance]


def test_the_report_needs_no_network_and_its_pictures_decode(written):
    text = written[0].read_text()
    assert "http:" not in text
    assert "https:" not in text
    assert 'name="viewport"' in text
    pictures = PICTURE.findall(text)
    assert len(pictures) == text.count("<img") == 6
    for data in pictures:
        assert min(Image.open(io.BytesIO(base64.b64decode(data))).size) > 100


def test_text_is_escaped():
    assert "&lt;script&gt;" in report.page("<script>", "", [])
    assert "&lt;b&gt;" in report.table(["<b>"], [["1"]])


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_every_picture_decodes_in_a_browser_and_the_page_fits_a_phone(written, tmp_path):
    probe = (
        "<script>addEventListener('load', () => { document.title = JSON.stringify({"
        "pictures: [...document.images].map(x => x.complete && x.naturalWidth > 0),"
        "overflow: document.documentElement.scrollWidth - innerWidth}) })</script></body>"
    )
    page = tmp_path / "probe.html"
    page.write_text(written[0].read_text().replace("</body>", probe))
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=390,844", "--dump-dom"]
    dumped = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout
    found = json.loads(re.search("<title>(.*?)</title>", dumped)[1].replace("&quot;", '"'))
    assert found["pictures"] == [True] * 6
    assert found["overflow"] <= 0
