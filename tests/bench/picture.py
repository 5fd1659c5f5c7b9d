# SPDX-License-Identifier: GPL-2.0-or-later
"""The distributions of latencies as one SVG: a panel for each exchange, a curve for each candidate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["Panels", "draw"]

Points = Sequence[tuple[float, float]]
"""microseconds, and the fraction of the exchanges that took no longer"""

Panels = Mapping[str, Mapping[str, Points]]
"""curves by candidate by the panel's name"""

_COLOURS = ("#888888", "#bbbbbb", "#dda000", "#c9b88a", "#996633", "#3366cc", "#cc2222", "#22883c", "#7733aa")
_WIDTH, _HEIGHT = 360, 220
_LEFT, _TOP, _GAP = 46, 60, 54
_LEAST, _MOST = 2.0, 1000.0
"""microseconds at the ends of the logarithmic axis"""
_TAIL = 4
"""the vertical axis ends at 1 - 10 ** -4: equal steps are one more nine each"""


def draw(title: str, panels: Panels) -> str:
    """The text of the file."""
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    colours = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(names)}
    columns = 2
    rows = math.ceil(len(panels) / columns)
    width = columns * (_WIDTH + _GAP) + _LEFT
    height = rows * (_HEIGHT + _GAP) + _TOP + 20
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{_LEFT}" y="18" font-size="14">{escape(title)}</text>',
        *_legend(colours),
    ]
    for number, (name, curves) in enumerate(panels.items()):
        left = _LEFT + number % columns * (_WIDTH + _GAP)
        top = _TOP + number // columns * (_HEIGHT + _GAP)
        parts += [f'<g transform="translate({left},{top})">', *_axes(name)]
        parts += [_curve(points, colours[candidate]) for candidate, points in curves.items()]
        parts.append("</g>")
    parts.append("</svg>\n")
    return "\n".join(parts)


def _x(microseconds: float) -> float:
    clamped = min(max(microseconds, _LEAST), _MOST)
    return _WIDTH * math.log(clamped / _LEAST) / math.log(_MOST / _LEAST)


def _y(fraction: float) -> float:
    nines = -math.log10(max(1 - fraction, 10**-_TAIL))
    return _HEIGHT * (1 - nines / _TAIL)


def _legend(colours: Mapping[str, str]) -> list[str]:
    parts = []
    left = float(_LEFT)
    for name, colour in colours.items():
        parts.append(f'<rect x="{left:.0f}" y="28" width="14" height="4" fill="{colour}"/>')
        parts.append(f'<text x="{left + 18:.0f}" y="34">{escape(name)}</text>')
        left += 34 + 6.2 * len(name)
    return parts


def _axes(name: str) -> list[str]:
    parts = [
        f'<text x="0" y="-6" font-weight="bold">{escape(name)}</text>',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="none" stroke="#999"/>',
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT + 30}" text-anchor="middle">microseconds</text>',
    ]
    for microseconds in (2, 5, 10, 20, 50, 100, 200, 500, 1000):
        x = _x(microseconds)
        parts.append(f'<path d="M{x:.1f} 0V{_HEIGHT}" stroke="#eee"/>')
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT + 14}" text-anchor="middle">{microseconds}</text>')
    for fraction, label in ((0.5, "p50"), (0.9, "p90"), (0.99, "p99"), (0.999, "p99.9")):
        y = _y(fraction)
        parts.append(f'<path d="M0 {y:.1f}H{_WIDTH}" stroke="#eee"/>')
        parts.append(f'<text x="-4" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    return parts


def _curve(points: Points, colour: str) -> str:
    steps = " ".join(f"{_x(time):.1f},{_y(fraction):.1f}" for time, fraction in points)
    return f'<polyline points="{steps}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
