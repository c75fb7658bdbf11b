"""A report in one HTML file: pictures embedded, no network, readable on a phone."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #5b6875; --line: #d9dfe5; --page: #fff; --accent: #0b6bcb }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6ebf0; --soft: #9aa7b4; --line: #36414c; --page: #14191f; --accent: #62b0ff }
}
body { margin: 0 auto; max-width: 62rem; padding: 1rem 1.2rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 1.2rem 0 .4rem } h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem }
p.lead { color: var(--soft); font-size: 1.08rem } figure { margin: 0 } figcaption { color: var(--soft); font-size: .9rem }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1.2rem }
img { width: 100%; height: auto; border: 1px solid var(--line); border-radius: 4px; background: #fff }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap }
th:first-child, td:first-child { text-align: left } td.best { color: var(--accent); font-weight: 600 }
pre { background: color-mix(in srgb, var(--line) 45%, transparent); padding: .8rem; overflow-x: auto; border-radius: 4px }
"""


def page(title: str, lead: str, sections: list[tuple[str, str]]) -> str:
    """The whole document. `lead` is plain text; sections are (heading, HTML)."""
    body = "".join(f"<h2>{html.escape(heading)}</h2>\n{content}\n" for heading, content in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        f'<h1>{html.escape(title)}</h1>\n<p class="lead">{html.escape(lead)}</p>\n{body}</body></html>\n'
    )


def picture(image: Image.Image | Path, caption: str) -> str:
    """An embedded PNG with its caption."""
    buffer = io.BytesIO()
    (Image.open(image) if isinstance(image, Path) else image).save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    text = html.escape(caption)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def side_by_side(*figures: str) -> str:
    return f'<div class="pair">{"".join(figures)}</div>'


def table(header: list[str], rows: list[list[str]], best: set[tuple[int, int]] = frozenset()) -> str:
    """Rows of text; `best` holds (row, column) of the cells to set off."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{' class=best' if (i, j) in best else ''}>{html.escape(cell)}</td>" for j, cell in enumerate(row)
        )
        + "</tr>"
        for i, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def line_chart(curves: dict[str, list[tuple[float, float]]], caption: str) -> str:
    """Curves {name: [(x, y), ...]} in one picture with axes from zero."""
    figure = Figure(figsize=(8, 3.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), label=name)
    axes.set(xlabel="updates", xlim=0, ylim=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer)
    return picture(Image.open(buffer), caption)
