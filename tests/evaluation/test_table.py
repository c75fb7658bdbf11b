"""Tables, means and JSON of the evaluation programs."""

from __future__ import annotations

import json

import pytest

from evaluation.table import format_mean, format_table, output_file, write_json


def test_columns_are_set_to_the_right_and_names_to_the_left():
    assert format_table(["a", "longer"], {"one": ["1", "2"], "three": ["-", "40"]}) == (
        "            a  longer\none         1       2\nthree       -      40"
    )
    lines = format_table(["a"], {"x": ["1"], "y": ["1.0000 ±0.0001"]}, width=18).splitlines()
    assert [len(line) for line in lines] == [19, 19, 19]


@pytest.mark.parametrize(
    ("mean", "spread", "digits", "text"),
    [
        (None, None, 3, "-"),
        (0.12345, None, 3, "0.123"),
        (0.12345, 0.0, 3, "0.123 ±0.000"),
        (-9.87654, 0.5, 4, "-9.8765 ±0.5000"),
        (10.0, 1.26, 3, "10.0 ±1.3"),
        (-123.456, 0.123, 4, "-123.46 ±0.12"),
    ],
)
def test_means_keep_their_significant_digits(mean, spread, digits, text):
    assert format_mean(mean, spread, digits) == text


def test_output(tmp_path, capsys):
    assert output_file(None, tmp_path) == tmp_path / "evaluation.json"
    assert output_file(tmp_path / "new/x.json", tmp_path) == tmp_path / "new/x.json"
    with pytest.raises(SystemExit, match="2"):
        output_file(tmp_path, tmp_path)
    assert capsys.readouterr().err == f"error: --output: {tmp_path} is a folder\n"
    write_json(tmp_path / "new/x.json", {"a": 1.5})
    assert json.loads((tmp_path / "new/x.json").read_text()) == {"a": 1.5}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "y.json", {"a": float("nan")})
    assert not (tmp_path / "y.json").exists()
