# SPDX-License-Identifier: GPL-2.0-or-later
"""``iohubctl status``, ``raise`` and ``lower``: what both daemons of a VM report; lines driven by hand."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import NamedTuple

from common.ctl.answers import DAEMONS, Answer, ask
from common.ctl.statustable import find_amiss, render
from common.errors import IohubError, PeerGone, UsageError
from common.output import emit
from common.pci import format_devfn, parse_devfn
from common.trust import Trust

__all__ = ["Report", "ask_daemons", "drive", "show_status"]


class Report(NamedTuple):
    """What the daemons of one VM answered."""

    answers: dict[str, Answer]
    """by daemon"""
    errors: dict[str, str]
    """one line for each daemon that gave no answer"""


def ask_daemons(vm: str, directory: Path, trust: Trust) -> Report:
    """Asks both daemons for their status. Raises UsageError when they are another VM's."""
    report = Report({}, {})
    for daemon in DAEMONS:
        try:
            report.answers[daemon] = ask(directory, daemon, trust, "Status")
        except IohubError as error:
            report.errors[daemon] = str(error)
    for answer in report.answers.values():
        _check_vm(answer, vm, directory)
    if "remoted" in report.errors and "proxyd" in report.answers:
        linked = [each for each in report.answers["proxyd"]["functions"] if each["connected"]]
        if linked:
            _contradict(report.errors, "remoted", linked[0]["remote_name"], linked[0]["remote_pid"])
    return report


def _contradict(errors: dict[str, str], daemon: str, name: str | None, pid: int | None) -> None:
    """Corrects an error that says a daemon does not run, although the other daemon has a link to it."""
    absent = f"{daemon} is not running: "
    if errors[daemon].startswith(absent):
        reason = errors[daemon].removeprefix(absent)
        errors[daemon] = f"{daemon} runs as {name or 'a process'}[{pid}], but does not answer: {reason}"


def show_status(vm: str, directory: Path, trust: Trust, addr: str | None, *, json: bool) -> int:
    """Prints the table, or one JSON object, of all functions or the one at ``addr``. Returns the exit status.

    Raises IohubError when there is nothing to show.
    """
    answers, errors = report = ask_daemons(vm, directory, trust)
    if addr is not None and answers:
        _select(report, addr, vm)
    amiss = find_amiss(answers, errors)
    if json:
        views = {**dict.fromkeys(DAEMONS), **answers}
        emit(json_format.dumps({"vm": vm, **views, "errors": errors, "amiss": amiss}) + "\n")
    elif not answers:
        raise PeerGone(f"VM {vm}: {'; '.join(errors.values())}")
    else:
        emit(render(vm, answers, errors, amiss))
    return 1 if amiss else 0


def drive(vm: str, directory: Path, trust: Trust, method: str, addr: str) -> None:
    """Calls remoted's method Raise or Lower for the function at ``addr``. Raises IohubError."""
    try:
        answer = ask(directory, "remoted", trust, "Status")
        _check_vm(answer, vm, directory)
        _select(Report({"remoted": answer}, {}), addr, vm)
        ask(directory, "remoted", trust, method, device=addr)
    except PeerGone as error:
        raise PeerGone(f"VM {vm}: {error}") from error


def _check_vm(answer: Answer, vm: str, directory: Path) -> None:
    """Raises UsageError when it is another VM's daemon that has answered."""
    if answer["vm"] != vm:
        raise UsageError(f"{directory} belongs to VM {answer['vm']}")


def _select(report: Report, addr: str, vm: str) -> None:
    """Leaves only the function of that address or id, which either daemon may know it by.

    Raises IohubError when neither daemon has it.
    """
    try:
        wanted = format_devfn(parse_devfn(addr))
    except UsageError:
        wanted = addr
    answers = report.answers.values()
    known = {(each["addr"], each["id"]) for answer in answers for each in answer["functions"]}
    found = {name for address, name in known if wanted == address or addr == name}
    for answer in answers:
        answer["functions"] = [each for each in answer["functions"] if each["id"] in found]
    if not found:
        have = ", ".join(f"{address} ({name})" for address, name in sorted(known)) or "none"
        raise IohubError(
            "; ".join((f"VM {vm}: no function {addr}, there is {have}", *report.errors.values()))
        )
