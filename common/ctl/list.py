# SPDX-License-Identifier: GPL-2.0-or-later
"""``iohubctl list``: all VMs of the host, one line each."""

from __future__ import annotations

import json as json_format
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from common.ctl.answers import DAEMONS
from common.ctl.status import ask_daemons
from common.ctl.statustable import align, find_amiss
from common.ctl.vms import find_vms
from common.errors import IohubError
from common.output import emit
from common.trust import Trust

__all__ = ["show_list"]

_AT_A_TIME = 16
"""VMs asked: one whose daemons hang takes seconds"""
_HEADINGS = ("REMOTED", "PROXYD", "FUNCTIONS", "AMISS", "VM")


class _Entry(NamedTuple):
    """One VM."""

    vm: str
    directory: Path
    pids: Mapping[str, int | None]
    """by daemon; None for one that gave no answer"""
    functions: int
    amiss: Sequence[str]


def show_list(roots: Sequence[Path], trust: Trust, *, json: bool) -> int:
    """Prints the VMs that have runtime directories in ``roots``. Returns the exit status: 1 if anything is amiss.

    Raises IohubError when a root can't be read.
    """
    directories: list[Path] = []
    for root in roots:
        try:
            directories += find_vms(root)
        except OSError as error:
            raise IohubError(f"{root}: {error.strerror}") from error
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        entries = list(pool.map(partial(_ask, trust=trust), directories))
    if json:
        emit(json_format.dumps([_as_json(entry) for entry in entries]) + "\n")
    elif entries:
        rows = [_HEADINGS, *(_row(entry, roots[0]) for entry in entries)]
        emit("".join(f"{line}\n" for line in align(rows, frozenset(_HEADINGS[:-1]))))
    else:
        emit(f"no VMs in {' and '.join(map(str, roots))}\n")
    return 1 if any(entry.amiss for entry in entries) else 0


def _ask(directory: Path, trust: Trust) -> _Entry:
    vm = directory.name
    try:
        answers, errors = ask_daemons(vm, directory, trust)
    except IohubError as error:  # the daemons are another VM's
        return _Entry(vm, directory, dict.fromkeys(DAEMONS), 0, [str(error)])
    ids = {function["id"] for answer in answers.values() for function in answer["functions"]}
    pids = {daemon: answers[daemon]["pid"] if daemon in answers else None for daemon in DAEMONS}
    return _Entry(vm, directory, pids, len(ids), find_amiss(answers, errors))


def _row(entry: _Entry, usual: Path) -> tuple[str, str, str, str, str]:
    remoted, proxyd = (str(pid) if pid is not None else "-" for pid in entry.pids.values())
    where = "" if entry.directory.parent == usual else f"  (in {entry.directory.parent})"
    return remoted, proxyd, str(entry.functions), str(len(entry.amiss)), entry.vm + where


def _as_json(entry: _Entry) -> dict[str, object]:
    return {
        "vm": entry.vm,
        "directory": str(entry.directory),
        "pids": dict(entry.pids),
        "functions": entry.functions,
        "amiss": list(entry.amiss),
    }
