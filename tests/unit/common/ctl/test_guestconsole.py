# SPDX-License-Identifier: GPL-2.0-or-later
"""The console client against a socket that the test answers on, sane and not."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest

from common.ctl.guestconsole import READY, GuestConsole, Record
from common.errors import PeerGone, ProtocolError

# Long enough for a machine under load, where an answer is there already; short where silence is the test.
ANSWERED = 10.0
SILENT = 0.05


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    guest, theirs = socket.socketpair()
    with guest, theirs:
        yield guest, theirs


@pytest.fixture
def guest(ends: tuple[socket.socket, socket.socket]) -> socket.socket:
    return ends[0]


@pytest.fixture
def console(ends: tuple[socket.socket, socket.socket]) -> GuestConsole:
    return GuestConsole(ends[1])


def test_an_answer_with_records(guest: socket.socket, console: GuestConsole) -> None:
    guest.sendall(b"* function addr=05.0 id=1234:11e8 gsi=10\n* back addr=05.0 after_ticks=0x1f\n")
    guest.sendall(b"* raise_to_handler tsc=1f,a\nok value=0xff ticks=12\n")
    seen: list[Record] = []
    reply = console.command("setup", seen.append, ANSWERED)
    assert guest.recv(100) == b"setup\n"
    assert reply.ok
    assert list(reply.records) == seen
    (function,) = reply.of_kind("function")
    assert (function.text("addr"), function.text("id"), function.number("gsi")) == ("05.0", "1234:11e8", 10)
    assert reply.of_kind("back")[0].number("after_ticks") == 31
    assert reply.of_kind("raise_to_handler")[0].cycles() == [31, 10]
    assert (reply.result.number("value"), reply.result.number("ticks")) == (255, 12)


def test_lines_for_people_are_skipped(guest: socket.socket, console: GuestConsole) -> None:
    guest.sendall(b"# help: this list\n# lspci: the functions on the bus\n* a b=1\nok\n")
    reply = console.command("help", timeout=ANSWERED)
    assert reply.ok
    assert [record.kind for record in reply.records] == ["a"]


def test_lines_for_people_have_an_end(guest: socket.socket, console: GuestConsole) -> None:
    guest.sendall(b"# on and on\n" * 4097)
    with pytest.raises(ProtocolError, match="not an answer to 'help'"):
        console.command("help", timeout=ANSWERED)


def test_answers_that_arrive_together_are_told_apart(guest: socket.socket, console: GuestConsole) -> None:
    guest.sendall(READY.encode() + b"\nok n=1\nerr no such th")
    console.wait_ready(ANSWERED)
    assert console.command("a", timeout=ANSWERED).result.number("n") == 1
    guest.sendall(b"ing\n")
    reply = console.command("b", timeout=ANSWERED)
    assert (reply.ok, reply.reason) == (False, "no such thing")


@pytest.mark.parametrize(
    "answer",
    [
        b"\n",
        b"okay\n",
        b"ok \n",
        b"ok value\n",
        b"ok value=\n",
        b"ok a=1 a=2\n",
        b"ok a=1  b=2\n",
        b"err\n",
        b"err \n",
        b"*\n",
        b"* Kind a=1\n",
        b"* kind a=1=2\n",
        b"*kind\n",
        b"* kind a=\xff\n",
        b"* kind a=\x00\r\n\n",
        b"panic vector=6 stack=0x0\n",
        READY.encode() + b"\n",
        b"* kind a=" + b"x" * 600 + b"\nok\n",
        b"x" * 600,
    ],
)
def test_nonsense_is_a_protocol_error(guest: socket.socket, console: GuestConsole, answer: bytes) -> None:
    guest.sendall(answer)
    with pytest.raises(ProtocolError):
        console.command("x", timeout=ANSWERED)


def test_endless_records_are_cut_off(guest: socket.socket, console: GuestConsole) -> None:
    seen: list[Record] = []

    def more(record: Record) -> None:
        seen.append(record)
        guest.sendall(b"* more\n")

    guest.sendall(b"* more\n")
    with pytest.raises(ProtocolError, match="more than 4096 records"):
        console.command("x", more, ANSWERED)
    assert len(seen) == 4096


@pytest.mark.parametrize("word", ["", "ten", "0x", "1.5"])
def test_what_is_no_number_is_a_protocol_error(word: str) -> None:
    record = Record("kind", {"n": word, "tsc": f"1f,{word}"})
    with pytest.raises(ProtocolError, match="n="):
        record.number("n")
    with pytest.raises(ProtocolError, match="tsc="):
        record.cycles()
    with pytest.raises(ProtocolError, match="absent="):
        record.text("absent")


def test_another_line_than_ready(guest: socket.socket, console: GuestConsole) -> None:
    guest.sendall(b"iohub-guest 2 ready\n")
    with pytest.raises(ProtocolError, match="iohub-guest 2"):
        console.wait_ready(ANSWERED)


@pytest.mark.parametrize("partial", [b"", b"* progress done=1 total=2\n", b"ok valu"])
def test_silence_is_a_peer_that_is_gone(guest: socket.socket, console: GuestConsole, partial: bytes) -> None:
    guest.sendall(partial)
    with pytest.raises(PeerGone, match="silent"):
        console.command("x", timeout=SILENT)


def test_silence_at_boot_is_a_peer_that_is_gone(console: GuestConsole) -> None:
    with pytest.raises(PeerGone, match="silent"):
        console.wait_ready(SILENT)


@pytest.mark.parametrize("partial", [b"", b"ok valu"])
def test_end_of_file_is_a_peer_that_is_gone(
    guest: socket.socket, console: GuestConsole, partial: bytes
) -> None:
    guest.sendall(partial)
    guest.shutdown(socket.SHUT_WR)
    with pytest.raises(PeerGone, match="closed"):
        console.command("x", timeout=ANSWERED)


def test_a_closed_console_is_a_peer_that_is_gone(guest: socket.socket, console: GuestConsole) -> None:
    guest.close()
    with pytest.raises(PeerGone, match="closed"):
        console.command("x", timeout=ANSWERED)


def test_a_console_that_takes_nothing_is_a_peer_that_is_gone(
    ends: tuple[socket.socket, socket.socket], console: GuestConsole
) -> None:
    theirs = ends[1]
    theirs.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            theirs.send(bytes(4096))
    with pytest.raises(PeerGone, match="took no command"):
        console.command("x", timeout=SILENT)


@pytest.mark.parametrize("line", ["a\nb", "a\r", "\0", "é", "x" * 128])
def test_what_is_no_command_line_is_not_sent(guest: socket.socket, console: GuestConsole, line: str) -> None:
    with pytest.raises(ValueError, match="not a command line"):
        console.command(line)
    guest.setblocking(False)
    with pytest.raises(BlockingIOError):
        guest.recv(1)
