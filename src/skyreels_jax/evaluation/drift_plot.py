"""Draws what a drift meter has seen, as an SVG file that needs no library.

The colours are those of Okabe and Ito (2008), which people with any common colour blindness can
tell apart.
"""

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Final

from skyreels_jax.evaluation.drift import DISTANCES, Drift
from skyreels_jax.files import write_text

_COLOURS: Final = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
_WIDTH, _HEIGHT = 900, 170
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 150, 26, 24
# The least range of an axis: what lies within it is no drift, and looks like none.
_PANELS: Final = (
    ("similarity", tuple(f"similarity_{d}" for d in DISTANCES), 0.2),
    ("brightness", ("brightness",), 0.1),
    ("colour", ("cb", "cr", "saturation"), 0.05),
    ("sharpness", ("sharpness",), 0.1),
)


def drift_svg(drift: Drift, title: str) -> str:
    """The text of an SVG file: four panels over seconds, one below the other."""
    height = _HEIGHT * len(_PANELS) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{_LEFT}" y="18" font-size="14">{escape(title)}</text>',
    ]
    for number, (name, series, least) in enumerate(_PANELS):
        parts += _panel(drift, name, series, least, 20 + number * _HEIGHT)
    return "\n".join([*parts, "</svg>", ""])


def write_drift_plot(path: Path, drift: Drift, title: str) -> None:
    """Write :func:`drift_svg` to a file."""
    write_text(path, drift_svg(drift, title))


def _panel(drift: Drift, name: str, series: Sequence[str], least: float, top: int) -> Iterator[str]:
    values = {one: drift.series[one] for one in series}
    known = [value for one in values.values() for value in one if value is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    middle, half = (low + high) / 2, max(high - low, least) / 2 * 1.08
    low, high = middle - half, middle + half
    length = max(1, len(next(iter(values.values()))))
    inner = (_WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM)

    def x(index: int) -> float:
        return _LEFT + (index + 0.5) / length * inner[0]

    def y(value: float) -> float:
        return top + _TOP + (high - value) / (high - low) * inner[1]

    yield (
        f'<rect x="{_LEFT}" y="{top + _TOP}" width="{inner[0]}" height="{inner[1]}" '
        'fill="none" stroke="#767676"/>'
    )
    yield f'<text x="{_LEFT}" y="{top + _TOP - 6}">{name}</text>'
    for share in (0.1, 0.5, 0.9):
        value = low + share * (high - low)
        at = y(value)
        yield f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{value:.2f}</text>'
        yield (
            f'<line x1="{_LEFT}" x2="{_LEFT + inner[0]}" y1="{at:.1f}" y2="{at:.1f}" '
            'stroke="#dddddd"/>'
        )
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        yield (
            f'<text x="{_LEFT + share * inner[0]:.1f}" y="{top + _HEIGHT - 8}" '
            f'text-anchor="middle">{share * drift.frames / drift.fps:.4g} s</text>'
        )
    for number, (one, shown) in enumerate(values.items()):
        colour, legend = _COLOURS[number], top + _TOP + 14 + 18 * number
        points = [f"{x(k):.1f},{y(v):.1f}" for k, v in enumerate(shown) if v is not None]
        if len(points) == 1:
            cx, cy = points[0].split(",")
            yield f'<circle cx="{cx}" cy="{cy}" r="3" fill="{colour}"/>'
        elif points:
            line = " ".join(points)
            yield f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>'
        label = one.replace("similarity_", "frames apart: ")
        yield (
            f'<text x="{_LEFT + inner[0] + 10}" y="{legend}" fill="{colour}">{escape(label)}</text>'
        )
