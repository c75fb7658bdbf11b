"""A report in one HTML file: pictures embedded, no network, readable on a phone."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

from PIL import Image

STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #5b6875; --line: #d9dfe5; --page: #fff; --accent: #0b6bcb; --other: #c2571a }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6ebf0; --soft: #9aa7b4; --line: #36414c; --page: #14191f; --accent: #62b0ff; --other: #ffa066 }
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
svg { width: 100%; height: auto } svg text { fill: var(--soft); font-size: 12px } .a { stroke: var(--accent) } .b { stroke: var(--other) }
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
    """Up to two curves {name: [(x, y), ...]} as an inline SVG with axes from zero."""
    width, height, left, bottom = 640, 260, 46, 30
    x_max = max(x for curve in curves.values() for x, _ in curve)
    y_max = max(y for curve in curves.values() for _, y in curve) * 1.05

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (width - left - 10) * x / x_max, 10 + (height - bottom - 10) * (1 - y / y_max)

    parts = []
    for i in range(5):
        (_, y), value = place(0, y_max * i / 4), y_max * i / 4
        parts.append(f'<line x1="{left}" x2="{width - 10}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.2f}</text>')
        (x, _), value = place(x_max * i / 4, 0), x_max * i / 4
        parts.append(f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle">{value:.0f}</text>')
    for (name, curve), kind, line in zip(curves.items(), ("a", "b"), (0, 1), strict=False):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in curve))
        parts.append(f'<polyline class="{kind}" points="{points}" fill="none" stroke-width="1.8"/>')
        top = 22 + 18 * line
        parts.append(
            f'<line class="{kind}" x1="{width - 190}" x2="{width - 165}" y1="{top}" y2="{top}" stroke-width="3"/>'
        )
        parts.append(f'<text x="{width - 158}" y="{top + 4}">{html.escape(name)}</text>')
    text = html.escape(caption)
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" role="img" aria-label="{text}">{"".join(parts)}</svg>'
        f"<figcaption>{text}</figcaption></figure>"
    )
