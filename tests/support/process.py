# SPDX-License-Identifier: GPL-2.0-or-later
"""Processes that a test didn't start itself."""

from __future__ import annotations

from pathlib import Path

__all__ = ["is_running"]


def is_running(pid: int) -> bool:
    """Whether there is such a process and it is no zombie: whoever is to reap it may be slow."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
