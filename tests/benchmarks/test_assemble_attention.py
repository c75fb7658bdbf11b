"""The benchmark of the layout adapter, on a tiny network: its figures, and that the plain loop gives the same."""

from __future__ import annotations

import json

import torch

from benchmarks.assemble_attention import Settings, create_network, draw_layout, main, summarise

SMALL = ["--width", "128", "--grid", "8", "--blocks", "1", "--rounds", "2", "--instances", "2", "5", "--area", "0.1"]


def test_batched_and_one_by_one_are_equal(tmp_path, capsys):
    output = tmp_path / "new" / "figures.json"
    main([*SMALL, "--output", str(output)])
    figures = json.loads(output.read_text())
    assert figures["adapter_seconds"].keys() == {"2", "5"}
    assert max(figures["largest_relative_difference"].values()) < 1e-5
    assert len(figures["seconds"]["loop_5"]) == 2
    out = capsys.readouterr().out
    assert "64 image tokens, width 128, 1 blocks with a layout branch" in out
    assert "adapter time, 5 / 2 instances: " in out


def test_the_adapter_s_time_is_that_of_forwards_of_one_round():
    settings = Settings(instances=(1, 3))
    times = {"plain": [1.0, 5.0, 1.0], "forward_1": [2.0, 6.0, 2.0], "forward_3": [4.0, 8.0, 4.0]}
    times |= {f"{kind}_{n}": [float(n)] * 3 for kind in ("branch", "loop") for n in (1, 3)}
    figures = summarise(settings, times, {1: 0.0, 3: 0.0})
    assert figures["adapter_seconds"] == {"1": 1.0, "3": 3.0}
    assert (figures["many_over_few"], figures["branch_many_over_few"]) == (3.0, 3.0)


def test_no_part_of_the_adapter_does_nothing():
    settings = Settings(grid=8, width=128, blocks=2)
    _, adapter = create_network(settings)
    assert all(bool(parameter.any()) for parameter in adapter.parameters())
    layout = draw_layout(7, settings)
    sides = torch.from_numpy(layout.boxes[..., 2:] - layout.boxes[..., :2])
    assert torch.allclose(sides.prod(-1), torch.full((1, 7), settings.area), atol=1e-6)
    assert layout.boxes.min() >= 0
    assert layout.boxes.max() <= 1
