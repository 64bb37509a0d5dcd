"""Charts as inline SVG: intervals of differences, and curves. Colours are the page's own (`currentColor`, `--first`, `--second`)."""

from collections.abc import Mapping, Sequence
from html import escape

ROW, LABEL, PLOT, RIGHT = 22, 420, 240, 250
"""Pixels: height of a row, width of its label, of the plot and of what is written right of it."""


def intervals(rows: Sequence[tuple[str, float, float, float, str]]) -> str:
    """A row for each (label, low, middle, high, note), with a line at 0."""
    ends = [0.0, *(end for _, low, _, high, _ in rows for end in (low, high))]
    least, most = min(ends), max(ends)
    span = (most - least) or 1.0

    def x(value: float) -> float:
        return LABEL + 10 + (PLOT - 20) * (value - least) / span

    height = ROW * len(rows) + 10
    parts = [f'<line x1="{x(0):.1f}" x2="{x(0):.1f}" y1="0" y2="{height}" class="zero"/>']
    for number, (label, low, middle, high, note) in enumerate(rows):
        y = ROW * number + ROW / 2 + 5
        parts.append(f'<text x="{LABEL}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>')
        parts.append(f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y:.1f}" y2="{y:.1f}" class="first"/>')
        parts.append(f'<circle cx="{x(middle):.1f}" cy="{y:.1f}" r="4" class="dot"/>')
        parts.append(f'<text x="{LABEL + PLOT + 6}" y="{y + 4:.1f}">{middle:+.4f}, {escape(note)}</text>')
    return _svg(LABEL + PLOT + RIGHT, height, parts)


def curves(series: Mapping[str, Sequence[tuple[float, float]]], across: str) -> str:
    """One or two named series of points (x, y), y from the least to the largest that occurs; `across` names x."""
    points = [point for of in series.values() for point in of]
    (left, right), (least, most) = ((min(values), max(values)) for values in zip(*points, strict=True))
    width, height, edge = 420, 160, 60

    def place(point: tuple[float, float]) -> str:
        x = edge + (width - edge - 10) * (point[0] - left) / ((right - left) or 1.0)
        return f"{x:.1f},{height - 30 - (height - 50) * (point[1] - least) / ((most - least) or 1.0):.1f}"

    parts = []
    for number, (name, of) in enumerate(series.items()):
        kind = ("first", "second")[number]
        parts.append(f'<polyline points="{" ".join(map(place, of))}" class="{kind}"/>')
        parts.append(f'<text x="{edge + 150 * number}" y="12" class="{kind}-name">{escape(name)}</text>')
    parts += [f'<text x="{edge - 6}" y="{y}" text-anchor="end">{value:.4g}</text>' for y, value in ((24, most), (height - 28, least))]
    parts += [f'<text x="{x}" y="{height - 12}" text-anchor="middle">{value:g}</text>' for x, value in ((edge, left), (width - 16, right))]
    parts.append(f'<text x="{(width + edge) / 2}" y="{height - 2}" text-anchor="middle">{escape(across)}</text>')
    return _svg(width, height, parts)


def _svg(width: float, height: float, parts: list[str]) -> str:
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">{"".join(parts)}</svg>'
