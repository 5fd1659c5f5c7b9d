# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of a VM's functions in 80 columns, from what remoted and proxyd report; and what is amiss.

A function has a line with the state and counters of its interrupt, and below that one with its model and links.
Counters that usually are 0 are shown only if they are not.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["WIDTH", "align", "find_amiss", "render"]

WIDTH = 80
"""columns; only a word that is longer than this exceeds it"""

_HEADINGS = ("ADDR", "LINE", "PIN", "GSI", "RAISED", "RESAMPLES", "RE-ASSERTS", "ACCESSES", "QUIET")
_RIGHT_ALIGNED = frozenset(("GSI", "RAISED", "RESAMPLES", "RE-ASSERTS", "ACCESSES", "QUIET"))
_COUNTS = ("raised", "resamples", "reasserts", "accesses")
_MAX_DIGITS = 9
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
    functions = _join(answers)
    rows: list[tuple[str, ...]] = [_HEADINGS]
    for _, views in functions:
        address = "/".join(_addresses(views, answers.get("proxyd", {})))
        rows.append((address, *_cells(views, errors)))
    heading, *table = align(rows, _RIGHT_ALIGNED)
    lines = [f"VM {vm}"]
    for line in _daemon_lines(answers, errors):
        lines += _wrap(line, "  ")
    lines += ["", heading] if functions else ["", "no functions"]
    for row, (name, views) in zip(table, functions, strict=True):
        lines += [row, *_wrap(f"{name}: {', '.join(_details(views))}", "      ")]
    if amiss[len(errors) :]:
        lines.append("")
        for note in amiss[len(errors) :]:
            lines += _wrap(note)
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
            yield f"NO ANSWER: {errors[daemon]}"
        else:
            answer = answers[daemon]
            line = f"{daemon} runs as pid {answer['pid']}"
            if daemon == "remoted" and answer["polling"]["spent_ms"]:
                line += f", has polled for {answer['polling']['spent_ms']} ms"
            if daemon == "proxyd":
                line += f", VM {answer['kind']}"
                line += ", not attached" if answer["reason"] else f", irqchip {answer['irqchip']}"
                if answer["attached"]:
                    line += f", attached to {answer['attached']}"
            yield line


def _cells(views: _Views, errors: Mapping[str, str]) -> tuple[str, ...]:
    """Those of _HEADINGS after the address."""
    line, counts, quiet = _absent("remoted", errors), [_absent("remoted", errors)] * len(_COUNTS), ""
    pin = gsi = _absent("proxyd", errors)
    if remote := views.get("remoted"):
        line = "high" if remote["asserted"] else "masked" if remote["level"] else "low"
        counts = [_count(remote[name]) for name in _COUNTS]
        counts[0] = _count(remote["raised"] + remote["messages"])
        quiet = _duration(remote["quiet_seconds"])
    if proxy := views.get("proxyd"):
        number = proxy["pin"] or 0
        pin = _PINS[number] if number in range(len(_PINS)) else str(number)
        gsi = _NONE if proxy["gsi"] is None else str(proxy["gsi"])
    return (line, pin, gsi, *counts, quiet or counts[0])


def _absent(daemon: str, errors: Mapping[str, str]) -> str:
    return _UNKNOWN if daemon in errors else _NONE


def _details(views: _Views) -> Iterator[str]:
    """What the function is, who is linked to it, and counters that are not 0."""
    if remote := views.get("remoted"):
        yield remote["model"]
        yield _interrupts(remote)
        if remote["link"] != "connected":
            yield f"client {remote['link']}"
        elif remote["client_gone"]:
            yield f"client pid {remote['client_pid']} (has ended, its link is still open)"
        else:
            yield f"client {_process(remote['client_name'], remote['client_pid'])}"
    if proxy := views.get("proxyd"):
        up = proxy["connected"]
        yield f"link {_process(proxy['remote_name'], proxy['remote_pid'])}" if up else "link down"
        if proxy["decoded"] is False:
            yield "BARs not decoded"
        if proxy["answer_mean_us"] is not None:
            mean, most = (_microseconds(proxy[name]) for name in ("answer_mean_us", "answer_max_us"))
            yield f"answers in {mean} on average (max {most})"
        if proxy["reconnects"]:
            yield f"{proxy['reconnects']} reconnects"
    if remote := views.get("remoted"):
        for name in ("rejected", "refused", "errors"):
            if remote[name]:
                yield f"{remote[name]} {name}"
        for name, count in remote["counters"].items():
            if count:
                yield f"{count} {name}"


def _interrupts(remote: Mapping[str, Any]) -> str:
    """How interrupts reach the guest."""
    if remote["transport"] == "mpqemu":
        return f"irqfd {'set' if remote['has_irqfd'] else 'none'}"
    kind, vectors = remote["interrupts"], remote["vectors"]
    if kind in ("MSI", "MSI-X"):
        kind = f"{kind} with {vectors} vector{'s' if vectors != 1 else ''}"
    return f"{remote['transport']}, {kind or 'no eventfd'}"


def _count(number: int) -> str:
    """The number; rounded to three digits if it does not fit into a column."""
    return str(number) if len(str(number)) <= _MAX_DIGITS else f"{number:.3g}".replace("e+", "e")


def _duration(seconds: int) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{_count(seconds // length)}{unit}"
    return f"{seconds}s"


def _microseconds(number: int) -> str:
    return f"{number} us" if number < 1000 else f"{number / 1000:.3g} ms"


def _process(name: str | None, pid: int | None) -> str:
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
        elif remote["interrupts"] is None and has_interrupt:
            what = "irqfd" if remote["transport"] == "mpqemu" else "eventfd"
            yield f"the client has sent no {what}: interrupts don't arrive"
    if proxy is None:
        if "proxyd" not in errors:
            yield "proxyd has no such function"
    elif not proxy["connected"]:
        yield proxy.get("reason") or "proxyd is not connected to its socket"
    elif proxy.get("pin") and proxy.get("gsi") is None:
        yield "the guest has not routed its pin to an IRQ: interrupts don't arrive"


def align(rows: Sequence[Sequence[str]], right_aligned: frozenset[str]) -> Iterator[str]:
    """The lines of a table whose first row are the headings; ``right_aligned`` are those of columns of numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.rjust(width) if heading in right_aligned else cell.ljust(width)
            for heading, cell, width in zip(rows[0], row, widths, strict=True)
        )
        yield "  ".join(cells).rstrip()


def _wrap(line: str, indent: str = "") -> Iterable[str]:
    return textwrap.wrap(
        line,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=f"{indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
