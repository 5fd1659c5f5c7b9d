# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of ``iohubctl status``, read back."""

from __future__ import annotations

__all__ = ["rows_of"]


def rows_of(table: str) -> list[dict[str, str]]:
    """The table's lines by heading."""
    lines = table.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("ADDR"))
    headings = lines[start].split()
    rows = []
    for line in lines[start + 1 :]:
        if not line:
            break
        cells = line.split()
        rows.append(dict(zip(headings, cells, strict=True)))
    return rows
