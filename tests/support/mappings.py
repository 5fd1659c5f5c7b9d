# SPDX-License-Identifier: GPL-2.0-or-later
"""What this process has mapped."""

from __future__ import annotations

from pathlib import Path

__all__ = ["dumped_mappings"]


def dumped_mappings(name: str) -> list[bool]:
    """For each mapping of the memfds of a name, whether a core dump would have its pages (proc(5), VmFlags)."""
    dumped = []
    is_of_name = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        word, *rest = line.split()
        if "-" in word and not word.endswith(":"):
            is_of_name = f"memfd:{name}" in line
        elif is_of_name and word == "VmFlags:":
            dumped.append("dd" not in rest)
    return dumped
