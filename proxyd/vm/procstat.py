# SPDX-License-Identifier: GPL-2.0-or-later
"""What /proc/PID/stat tells of another process (proc_pid_stat(5))."""

from __future__ import annotations

__all__ = ["is_stopped", "process_start"]

_STARTTIME = 19  # fields after the name


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal ; False where that can't be seen."""
    return _stat(pid)[:1] == [b"T"]


def process_start(pid: int) -> tuple[int, int] | None:
    """What tells a process from a later one with its number: that, and when it was started.

    None for a process that is gone or can't be seen.
    """
    fields = _stat(pid)
    return (pid, int(fields[_STARTTIME])) if len(fields) > _STARTTIME else None


def _stat(pid: int) -> list[bytes]:
    """The fields of /proc/PID/stat after the name, none if it can't be read."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name, in parentheses, may contain anything.
            return file.read().rpartition(b")")[2].split()
    except OSError:
        return []
