# SPDX-License-Identifier: GPL-2.0-or-later
"""Entries of the journal as lines for people, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from common.journal import iso_time, printable

__all__ = ["Entry", "as_json", "as_text"]

Entry = Mapping[str, Any]
"""an entry's fields: strings, bytes if they are not UTF-8, lists of these if a field occurs several times"""

_LEVELS = ("emergency", "alert", "critical", "error", "warning")
"""of syslog(3), from 0; lines of less severity show none"""
_INDENT = "    "
_BAR = f"{_INDENT}| "
"""before the lines of an explanation"""


def as_text(entry: Entry, vm: str, explanation: str | None) -> str:
    """``2026-01-31T12:00:00.123+00:00 iohub-remoted[12]: warning: edu0: qemu[34]: text``, and the explanation.

    The VM's name at the beginning of a daemon's line is left out; further lines are indented. Control characters
    are escaped.
    """
    seconds = int(_first(entry, "__REALTIME_TIMESTAMP", "0")) / 1e6
    name = _first(entry, "SYSLOG_IDENTIFIER") or _first(entry, "_COMM", "unknown")
    pid = _first(entry, "_PID") or _first(entry, "SYSLOG_PID")
    message = _first(entry, "MESSAGE")
    if _first(entry, "IOHUB_VM") == vm:
        message = message.removeprefix(f"{vm} ")
    first, *rest = message.splitlines() or [""]
    head = f"{iso_time(seconds)} {printable(name)}{f'[{pid}]' if pid else ''}: {_level(entry)}"
    lines = [head + printable(first), *(_INDENT + printable(line) for line in rest)]
    if explanation is not None:
        lines += [f"{_BAR}{printable(line)}".rstrip() for line in explanation.strip().splitlines()]
    return "".join(f"{line}\n" for line in lines)


def as_json(entry: Entry, explanation: str | None) -> str:
    """One line: an object with all fields as strings, as those of ``journalctl -o json``, and EXPLANATION."""
    fields = {name: _json_value(value) for name, value in entry.items() if name != "__MONOTONIC_TIMESTAMP"}
    if explanation is not None:
        fields["EXPLANATION"] = explanation
    return json.dumps(fields) + "\n"


def _first(entry: Entry, name: str, default: str = "") -> str:
    value = entry.get(name, default)
    if isinstance(value, list):
        value = value[0]
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def _level(entry: Entry) -> str:
    priority = _first(entry, "PRIORITY")
    return f"{_LEVELS[int(priority)]}: " if priority in ("0", "1", "2", "3", "4") else ""


def _json_value(value: object) -> object:
    if isinstance(value, list):
        return [_json_value(each) for each in value]
    return list(value) if isinstance(value, bytes) else str(value)
