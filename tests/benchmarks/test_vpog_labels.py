"""The benchmark of pose labels, on few small pictures: the plain loop finds the same."""

from __future__ import annotations

import json

from benchmarks.vpog_labels import main


def test_at_once_and_one_by_one_are_equal(tmp_path, capsys):
    output = tmp_path / "new" / "figures.json"
    small = ["--queries", "2", "--templates", "2", "--size", "64", "--patch_size", "8", "--rounds", "2"]
    main([*small, "--output", str(output)])
    figures = json.loads(output.read_text())
    assert figures["patches"]["paired"] > 50
    assert len(figures["seconds"]["at_once"]) == 2
    assert figures["difference"]["classes_differ"] < 0.01
    assert figures["difference"]["visible_pixels_differ"] < 0.01
    assert figures["difference"]["largest_flow_difference"] < 1e-3
    out = capsys.readouterr().out
    assert "2 queries x 2 templates, 64 pixels: 256 patches" in out
    assert "loop / at once: " in out
