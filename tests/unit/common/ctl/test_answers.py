# SPDX-License-Identifier: GPL-2.0-or-later
"""iohubctl and a daemon that is not to be believed."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from common.ctl import main as ctl
from common.loop import Loop
from tests.support.loops import running

ESCAPES = "\x1b]0;root\x07\x1b[2J\x9b31m"
FORGED = "\n05.0  low   INTA   10\u202e\u2028\rVM vm1"

HOSTILE = {"escapes": ESCAPES, "lines": FORGED, "surrogate": "\ud800", "long": "x" * 100_000}

POLLING = {"window_us": 0, "found": 0, "missed": 0, "spent_ms": 0}
FUNCTION: dict[str, Any] = {
    "id": "line0",
    "addr": "05.0",
    "model": "irq-line",
    "level": False,
    "asserted": False,
    "raised": 0,
    "resamples": 0,
    "reasserts": 0,
    "rejected": 0,
    "refused": 0,
    "accesses": 0,
    "quiet_seconds": 0,
    "errors": 0,
    "has_irqfd": True,
    "transport": "mpqemu",
    "interrupts": "INTx",
    "vectors": 1,
    "messages": 0,
    "link": "connected",
    "client_pid": 1,
    "client_name": "qemu",
    "client_gone": False,
    "amiss": [],
    "counters": {},
}


def status(**function: Any) -> dict[str, Any]:
    return {"vm": "vm1", "pid": 1, "polling": POLLING, "amiss": [], "functions": [FUNCTION | function]}


def reply(parameters: Any, **others: Any) -> bytes:
    return json.dumps({"parameters": parameters, **others}).encode() + b"\0"


class FakeRemoted:
    """What listens at remoted's control socket, and answers every call with the same bytes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.answer = b""
        self._stack = ExitStack()
        self._listener = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        self._listener.bind(str(directory / "remoted.varlink"))
        self._listener.listen()
        loop = self._stack.enter_context(closing(Loop()))
        loop.add(self._listener.fileno(), self._on_client)
        self._stack.enter_context(running(loop))

    def close(self) -> None:
        self._stack.close()

    def ctl(self, *arguments: str) -> int:
        command, *rest = arguments
        return ctl.main([command, "--runtime-dir", str(self.directory), "vm1", *rest])

    def _on_client(self, _events: int) -> None:
        sock, _ = self._listener.accept()
        with sock:
            sock.recv(4096)
            with contextlib.suppress(OSError):  # it has heard enough
                sock.sendall(self.answer)


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeRemoted]:
    with closing(FakeRemoted(tmp_path)) as fake:
        yield fake


def counters(text: str) -> dict[str, Any]:
    return status(counters={text: 1})


TEXTS: dict[str, Callable[[str], Any]] = {
    "id": lambda text: status(id=text),
    "address": lambda text: status(addr=text),
    "model": lambda text: status(model=text),
    "client": lambda text: status(client_name=text),
    "amiss": lambda text: status(amiss=[text]),
    "amiss of the daemon": lambda text: {**status(), "amiss": [text]},
    "counter": counters,
    "vm": lambda text: {**status(), "vm": text},
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("where", TEXTS)
@pytest.mark.parametrize("options", [["status"], ["status", "--json"], ["status", "07.0"], ["raise", "07.0"]])
def test_nothing_that_a_daemon_says_reaches_the_terminal_as_it_is(
    fake: FakeRemoted, capsys: pytest.CaptureFixture[str], options: list[str], where: str, text: str
) -> None:
    fake.answer = reply(TEXTS[where](text))
    assert fake.ctl(*options) in (1, 2)
    printed = "".join(capsys.readouterr())
    assert printed
    assert all(line.isprintable() for line in printed.split("\n"))
    assert not any(line.startswith(("05.0  low   INTA   10", "VM vm1\\")) for line in printed.split("\n"))
    assert printed.count("\nVM vm1") == 0
    assert len(printed) < 4000


def test_an_error_of_the_daemon_is_one_printable_line(
    fake: FakeRemoted, capsys: pytest.CaptureFixture[str]
) -> None:
    for error in ("org.iohub.Remoted.NotDrivable", "org.iohub.Remoted.Evil"):
        fake.answer = reply({"device": ESCAPES, "model": FORGED, "more": [[FORGED]]}, error=error)
        assert fake.ctl("raise", "line0") == 1
        _, err = capsys.readouterr()
        assert err.count("\n") == 1
        assert err.rstrip("\n").isprintable()


WRONG: dict[str, bytes] = {
    "functions are no list": reply({**status(), "functions": {}}),
    "a function is a number": reply({**status(), "functions": [5]}),
    "a text is a number": reply(status(model=5)),
    "a text is a list": reply(status(id=["x"])),
    "a count is a text": reply(status(raised="4")),
    "a count is an object": reply(status(raised={})),
    "a count has many digits": reply(status(raised=10**4000)),
    "a count is infinite": reply(status(raised=float("inf"))),
    "a count has too many digits for Python": reply(status()).replace(
        b'"raised": 0', b'"raised": ' + b"9" * 5000
    ),
    "amiss is a text": reply(status(amiss="much")),
    "counters are a list": reply(status(counters=[])),
    "an unknown link": reply(status(link="broken")),
    "a field is missing": reply({**status(), "functions": [{"id": "x"}]}),
    "a field is unknown": reply(status(extra=1)),
    "no parameters": b"{}\0",
    "parameters are a list": reply([]),
    "an error that is not a name": reply({}, error=[]),
    "an error with an escape for a name": reply({}, error="a.b\x1b[2J.C"),
    "no object": b"[]\0",
    "deep": b'{"parameters": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\0",
    "deep in the functions": reply(status()).replace(b'"line0"', b'{"a":' * 20_000 + b"1" + b"}" * 20_000),
    "no end": b"x" * (5 << 20),
    "no UTF-8": reply(status()).replace(b"line0", b"\xff\xfe"),
}


@pytest.mark.parametrize("answer", WRONG.values(), ids=WRONG)
def test_an_improper_answer_is_one_line(
    fake: FakeRemoted, capsys: pytest.CaptureFixture[str], answer: bytes
) -> None:
    fake.answer = answer
    assert fake.ctl("status") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("iohubctl: VM vm1: remoted gives an invalid answer: "), err
    assert err.count("\n") == 1
    assert err.rstrip("\n").isprintable()
    assert len(err) < 2000


def test_only_trusted_users_daemons_are_asked(fake: FakeRemoted, capsys: pytest.CaptureFixture[str]) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to give the socket to another user")
    os.chown(fake.directory / "remoted.varlink", 4242, -1)
    fake.answer = reply(status())
    assert fake.ctl("status") == 1
    assert "remoted is not asked: " in capsys.readouterr().err
    assert fake.ctl("status", "--allow-user", "4242") == 1
    assert "VM vm1\n" in capsys.readouterr().out
    assert fake.ctl("status", "--allow-user", "no such user") == 2
