# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of ``iohubctl status``, read back."""

from __future__ import annotations

__all__ = ["details_of", "rows_of", "unwrapped"]

_DETAIL = " " * 6


def rows_of(table: str) -> list[dict[str, str]]:
    """The table's lines by heading; ``ID`` and ``DETAILS`` are what the lines below each say."""
    lines = table.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("ADDR"))
    headings = lines[start].split()
    rows: list[dict[str, str]] = []
    for line in lines[start + 1 :]:
        if not line:
            break
        if line.startswith(_DETAIL):
            row = rows[-1]
            if "ID" in row:
                row["DETAILS"] += f" {line.strip()}"
            else:
                row["ID"], _, row["DETAILS"] = line.strip().partition(": ")
        else:
            rows.append(dict(zip(headings, line.split(), strict=True)))
    return rows


def details_of(table: str) -> list[str]:
    """What the lines below the only function's say."""
    (row,) = rows_of(table)
    return row["DETAILS"].split(", ")


def unwrapped(text: str) -> str:
    """With each line that goes on in the next one in one."""
    lines: list[str] = []
    for line in text.splitlines():
        before = lines[-1] if lines else ""
        is_rest = len(line) - len(line.lstrip()) > len(before) - len(before.lstrip())
        if before and is_rest and not before.startswith(("VM ", "ADDR")):
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"
