# SPDX-License-Identifier: GPL-2.0-or-later
"""The functions of a VM as a table, one line each, of what remoted and proxyd say about it; and what is amiss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["find_amiss", "render"]

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


_Views = dict[str, Mapping[str, Any]]
"""what each daemon says of one function"""


def find_amiss(answers: Mapping[str, Any], errors: Mapping[str, str]) -> list[str]:
    """What is amiss, or about to be, one line each; none when all is well.

    ``answers`` are the replies to Status() of "remoted" and "proxyd"; a daemon that gave none has one line in
    ``errors``.
    """
    proxyd = answers.get("proxyd", {})
    amiss = list(errors.values())
    for daemon, answer in answers.items():
        amiss.extend(f"{daemon}: {text}" for text in answer["amiss"])
    if proxyd.get("reason"):
        amiss.append(f"proxyd: {proxyd['reason']}")
    for name, views in _join(answers):
        addresses = _addresses(views, proxyd)
        if len(addresses) > 1:
            at_remoted, at_proxyd = addresses
            where = f"at {at_remoted} in remoted, at {at_proxyd} in proxyd"
            amiss.append(f"{name}: {where}: give both the same addr=")
        notes = _notes(views.get("remoted"), views.get("proxyd"), errors)
        amiss.extend(f"{addresses[0]} {name}: {note}" for note in notes)
        amiss.extend(f"{addresses[0]} {name}: {text}" for view in views.values() for text in view["amiss"])
    return amiss


def render(vm: str, answers: Mapping[str, Any], errors: Mapping[str, str], amiss: Sequence[str]) -> str:
    """The text, with its last line feed; arguments and ``amiss`` as those and the result of find_amiss().

    Columns of a daemon that gave no answer are ``?``, those of a function that a daemon doesn't have are ``-``.
    """
    rows: list[tuple[str, ...]] = [_HEADINGS]
    for name, views in _join(answers):
        rows.append(
            (
                "/".join(_addresses(views, answers.get("proxyd", {}))),
                name,
                *_remoted_cells(views.get("remoted"), "remoted" in errors),
                *_proxyd_cells(views.get("proxyd"), "proxyd" in errors),
            )
        )
    table = _align(rows) if len(rows) > 1 else ["no functions"]
    lines = [f"VM {vm}", *_daemon_lines(answers, errors), "", *table]
    notes = amiss[len(errors) :]
    if notes:
        lines += ["", *notes]
    return "".join(f"{line}\n" for line in lines)


def _join(answers: Mapping[str, Any]) -> list[tuple[str, _Views]]:
    """Each function's id and views, by address."""
    functions: dict[str, _Views] = {}
    for daemon, answer in answers.items():
        for function in answer["functions"]:
            functions.setdefault(function["id"], {})[daemon] = function
    return sorted(functions.items(), key=lambda item: (next(iter(item[1].values()))["addr"], item[0]))


def _addresses(views: _Views, proxyd: Mapping[str, Any]) -> list[str]:
    """The address that both daemons have, or remoted's and proxyd's."""
    if "remoted" in views and proxyd.get("kind", "").startswith("pid:"):
        return [views["remoted"]["addr"]]  # the VM has no function at the other
    return list(dict.fromkeys(view["addr"] for view in views.values()))


def _daemon_lines(answers: Mapping[str, Any], errors: Mapping[str, str]) -> Iterator[str]:
    for daemon in ("remoted", "proxyd"):
        if daemon in errors:
            yield f"  NO ANSWER: {errors[daemon]}"
        else:
            answer = answers[daemon]
            line = f"  {daemon} runs as pid {answer['pid']}"
            if "kind" in answer:
                line += f", VM {answer['kind']}"
                line += ", not attached" if answer.get("reason") else f", irqchip {answer['irqchip']}"
            if answer.get("attached"):
                line += f", attached to {answer['attached']}"
            yield line


def _remoted_cells(function: Mapping[str, Any] | None, silent: bool) -> tuple[str, ...]:
    if function is None:
        return (_UNKNOWN if silent else _NONE,) * _REMOTED_COLUMNS
    line = "high" if function["asserted"] else "masked" if function["level"] else "low"
    counters = (function[name] for name in ("raised", "resamples", "reasserts", "rejected", "refused"))
    client = function["link"]
    if client == "connected":
        client = _process(function.get("client_name"), function["client_pid"])
        if function.get("client_gone"):
            client = f"pid {function['client_pid']} (gone, its link lives on)"
    irqfd = "set" if function["has_irqfd"] else "none"
    return (function["model"], line, *map(str, counters), irqfd, client)


def _proxyd_cells(function: Mapping[str, Any] | None, silent: bool) -> tuple[str, ...]:
    if function is None:
        return (_UNKNOWN if silent else _NONE,) * _PROXYD_COLUMNS
    gsi = function.get("gsi")
    link = "down"
    if function["connected"]:
        link = _process(function.get("remote_name"), function["remote_pid"])
    pin = _PINS[function.get("pin") or 0]
    route = _NONE if gsi is None else str(gsi)
    return (pin, route, link, str(function["reconnects"]))


def _process(name: str | None, pid: int) -> str:
    return f"{name}[{pid}]" if name else f"pid {pid}"


def _notes(
    remote: Mapping[str, Any] | None, proxy: Mapping[str, Any] | None, errors: Mapping[str, str]
) -> Iterator[str]:
    if remote is None:
        if "remoted" not in errors:
            yield "remoted has no such function"
    elif remote["link"] == "closed":
        yield "the connection that it inherited has ended"
    elif proxy is None or proxy["connected"]:  # else proxyd says why
        has_interrupt = proxy is None or proxy.get("pin") != 0
        if remote["link"] == "waiting":
            yield "no client is connected to its socket"
        elif not remote["has_irqfd"] and has_interrupt:
            yield "the client has sent no irqfd: interrupts don't arrive"
    if proxy is None:
        if "proxyd" not in errors:
            yield "proxyd has no such function"
    elif not proxy["connected"]:
        yield proxy.get("reason") or "proxyd is not connected to its socket"
    elif proxy.get("pin") and proxy.get("gsi") is None:
        yield "the guest has its pin routed nowhere: interrupts don't arrive"


def _align(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.rjust(width) if heading in _RIGHT_ALIGNED else cell.ljust(width)
            for heading, cell, width in zip(_HEADINGS, row, widths, strict=True)
        )
        yield "  ".join(cells).rstrip()
