"""What the documentation promises by name is what the code has."""

from __future__ import annotations

import re

import runs

from trainers.common.config import MAY_CHANGE


def test_the_list_of_what_may_change_on_resume_is_the_code_s():
    section = (
        (runs.ROOT / "docs/runs.md").read_text().partition("### What may change on resume")[2].partition("\n## ")[0]
    )
    named = {
        f"training.{name}"
        for row in section.splitlines()
        if row.startswith("| ")
        for name in re.findall(r"`(\w+)`", row)
    }
    assert named == MAY_CHANGE
