# SPDX-License-Identifier: GPL-2.0-or-later
"""The functions of a VM as a table: one line each, of what remoted and proxyd say about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["render"]

_HEADINGS = (
    "ADDR",
    "ID",
    "MODEL",
    "LINE",
    "RAISED",
    "RESAMPLES",
    "RE-ASSERTS",
    "REJECTED",
    "REFUSED",
    "IRQFD",
    "CLIENT",
    "PIN",
    "GSI",
    "LINK",
    "RECONNECTS",
)
_RIGHT_ALIGNED = frozenset(("RAISED", "RESAMPLES", "RE-ASSERTS", "REJECTED", "REFUSED", "GSI", "RECONNECTS"))
_REMOTED_COLUMNS = 9  # from MODEL to CLIENT
_PROXYD_COLUMNS = 4
_UNKNOWN = "?"
_NONE = "-"
_PINS = (_NONE, "INTA", "INTB", "INTC", "INTD")


def render(vm: str, answers: Mapping[str, Any], errors: Mapping[str, str]) -> str:
    """The text, with its last line feed.

    ``answers`` are the replies to Status() of "remoted" and "proxyd"; a daemon that gave none has one line in
    ``errors``, and its columns are ``?``. Columns of a function that a daemon doesn't have are ``-``.
    """
    functions: dict[tuple[str, str], dict[str, Any]] = {}
    for daemon, answer in answers.items():
        for function in answer["functions"]:
            functions.setdefault((function["addr"], function["id"]), {})[daemon] = function
    rows: list[tuple[str, ...]] = [_HEADINGS]
    notes: list[str] = []
    for (addr, name), views in sorted(functions.items()):
        remote, proxy = views.get("remoted"), views.get("proxyd")
        rows.append(
            (
                addr,
                name,
                *_remoted_cells(remote, "remoted" in errors),
                *_proxyd_cells(proxy, "proxyd" in errors),
            )
        )
        notes.extend(f"{addr} {name}: {note}" for note in _notes(remote, proxy, errors))
    lines = [f"VM {vm}", *_daemon_lines(answers, errors), "", *_align(rows)]
    if not functions:
        lines[-1:] = ["no functions"]
    if notes:
        lines += ["", *notes]
    return "".join(f"{line}\n" for line in lines)


def _daemon_lines(answers: Mapping[str, Any], errors: Mapping[str, str]) -> Iterator[str]:
    for daemon in ("remoted", "proxyd"):
        if daemon in errors:
            yield f"  NO ANSWER: {errors[daemon]}"
        else:
            answer = answers[daemon]
            kind = f", VM {answer['kind']}, irqchip {answer['irqchip']}" if "kind" in answer else ""
            yield f"  {daemon} runs as pid {answer['pid']}{kind}"


def _remoted_cells(function: Mapping[str, Any] | None, silent: bool) -> tuple[str, ...]:
    if function is None:
        return (_UNKNOWN if silent else _NONE,) * _REMOTED_COLUMNS
    line = "high" if function["asserted"] else "masked" if function["level"] else "low"
    counters = (function[name] for name in ("raised", "resamples", "reasserts", "rejected", "refused"))
    client = function["link"]
    if client == "connected":
        client = _process(function.get("client_name"), function["client_pid"])
    irqfd = "set" if function["has_irqfd"] else "none"
    return (function["model"], line, *map(str, counters), irqfd, client)


def _proxyd_cells(function: Mapping[str, Any] | None, silent: bool) -> tuple[str, ...]:
    if function is None:
        return (_UNKNOWN if silent else _NONE,) * _PROXYD_COLUMNS
    gsi = function.get("gsi")
    link = "down"
    if function["connected"]:
        link = _process(function.get("remote_name"), function["remote_pid"])
    route = _NONE if gsi is None else str(gsi)
    return (_PINS[function["pin"]], route, link, str(function["reconnects"]))


def _process(name: str | None, pid: int) -> str:
    return f"{name}[{pid}]" if name else f"pid {pid}"


def _notes(
    remote: Mapping[str, Any] | None, proxy: Mapping[str, Any] | None, errors: Mapping[str, str]
) -> Iterator[str]:
    """What is amiss with one function, or about to be."""
    if remote is None:
        if "remoted" not in errors:
            yield "remoted has no such function"
    else:
        if remote["link"] == "waiting":
            yield "no client is connected to its socket"
        elif remote["link"] == "closed":
            yield "the connection that it inherited has ended"
        elif not remote["has_irqfd"]:
            yield "the client has sent no irqfd: interrupts don't arrive"
    if proxy is None:
        if "proxyd" not in errors:
            yield "proxyd has no such function"
    elif not proxy["connected"]:
        yield "proxyd is not connected to its socket"
    elif proxy["pin"] and proxy.get("gsi") is None:
        yield "the guest has its pin routed nowhere: interrupts don't arrive"


def _align(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.rjust(width) if heading in _RIGHT_ALIGNED else cell.ljust(width)
            for heading, cell, width in zip(_HEADINGS, row, widths, strict=True)
        )
        yield "  ".join(cells).rstrip()
