"""The whole demo: what the README promises of it."""

from __future__ import annotations

import json

import pytest

from demos import shortcut


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_step_of_the_shortcut_model_beats_one_step_of_flow_matching(tmp_path):
    shortcut.main(["--output_dir", str(tmp_path / "demo")])
    metrics = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    energy, frechet = metrics["energy_distance"], metrics["frechet"]
    assert energy["shortcut"]["1"] <= 0.15 * energy["flow_matching"]["1"]
    assert frechet["shortcut"]["1"] <= 0.30 * frechet["flow_matching"]["1"]
    assert energy["flow_matching"]["128"] < 0.01
    for fewer, more in (("1", "2"), ("2", "4"), ("4", "8")):
        assert energy["shortcut"][more] <= 1.1 * energy["shortcut"][fewer]
