# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's console: the test is the guest at the ports and the clients at the socket."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from common.errors import UsageError
from common.serial_reg import (
    UART_FCR,
    UART_FCR_ENABLE_FIFO,
    UART_IER,
    UART_IER_RDI,
    UART_IIR,
    UART_IIR_FIFO_ENABLED,
    UART_IIR_RX_TIMEOUT,
    UART_LCR,
    UART_LCR_DLAB,
    UART_LSR,
    UART_LSR_DR,
    UART_MCR,
    UART_MCR_LOOP,
    UART_RX,
    UART_TX,
)
from common.uart import FIFO_SIZE
from proxyd.machine.console import COM1_PORTS, Console
from tests.support.fds import no_fd_is_left
from tests.support.remotebench import Clock
from tests.support.steploop import CountingLoop, run_ready

BACKLOG = 1 << 16
COM1 = COM1_PORTS.start


class Bench:
    """The console on a loop that the test steps, in the test's time."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "console")
        self.clock = Clock()
        self.loop = CountingLoop(self.clock)
        self.irqs: list[bool] = []
        self.console = Console(self.loop, self.path, self.irqs.append, logging.getLogger("test"))
        self._socks: list[socket.socket] = []

    def connect(self) -> socket.socket:
        """A client, that has been looked at."""
        sock = socket.socket(socket.AF_UNIX)
        self._socks.append(sock)
        sock.connect(self.path)
        sock.setblocking(False)
        run_ready(self.loop)
        return sock

    def say(self, text: bytes) -> None:
        """The guest prints."""
        for byte in text:
            self.console.write(COM1 + UART_TX, byte)
        run_ready(self.loop)

    def hear(self, limit: int = 1 << 20) -> bytes:
        """The guest reads until there is nothing, or so much."""
        heard = bytearray()
        while len(heard) < limit and self.console.read(COM1 + UART_LSR) & UART_LSR_DR:
            heard.append(self.console.read(COM1 + UART_RX))
            run_ready(self.loop)
        return bytes(heard)

    def enable_fifo(self) -> None:
        self.console.write(COM1 + UART_FCR, UART_FCR_ENABLE_FIFO | 0xC0)

    def close(self) -> None:
        self.console.close()
        self.loop.close()
        for sock in self._socks:
            sock.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with no_fd_is_left(), closing(Bench(tmp_path)) as bench:
        yield bench


def received(sock: socket.socket) -> bytes:
    """All that is there; b"" at the end of the stream, too."""
    data = bytearray()
    try:
        while chunk := sock.recv(1 << 16):
            data += chunk
    except BlockingIOError:
        pass
    return bytes(data)


def has_ended(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False


def test_both_ends_talk(bench: Bench) -> None:
    client = bench.connect()
    bench.say(b"login: ")
    assert received(client) == b"login: "
    client.sendall(b"root\n")
    run_ready(bench.loop)
    assert bench.hear() == b"root\n"


def test_what_was_said_before_anybody_listened(bench: Bench) -> None:
    bench.say(b"booting\n")
    client = bench.connect()
    assert received(client) == b"booting\n"
    bench.say(b"ready\n")
    assert received(client) == b"ready\n"


def test_what_nobody_hears_is_bounded(bench: Bench) -> None:
    bench.say(b"a" * BACKLOG + b"b" * BACKLOG)
    client = bench.connect()
    heard = bytearray()
    for _ in range(100):
        heard += received(client)
        run_ready(bench.loop)
    assert heard == b"a" * BACKLOG


def test_a_client_that_does_not_read_loses_what_comes_later(bench: Bench) -> None:
    client = bench.connect()
    said = b"0123456789abcdef" * (1 << 16)
    for start in range(0, len(said), 1 << 12):
        bench.say(said[start : start + (1 << 12)])
    heard = received(client)
    kernel = len(heard)
    for _ in range(100):
        run_ready(bench.loop)
        heard += received(client)
    assert BACKLOG <= len(heard) - kernel < 2 * BACKLOG
    assert said.startswith(heard)
    bench.say(b"and on")
    assert received(client) == b"and on"


def test_what_a_client_did_not_read_is_not_said_to_the_next(bench: Bench) -> None:
    client = bench.connect()
    for _ in range(256):
        bench.say(b"unheard" * (1 << 10))
    client.close()
    run_ready(bench.loop)
    bench.say(b"hello")
    assert received(bench.connect()) == b"hello"


@pytest.mark.parametrize("fifo", [False, True])
def test_input_waits_until_the_guest_has_room(bench: Bench, fifo: bool) -> None:
    if fifo:
        bench.enable_fifo()
    client = bench.connect()
    text = bytes(range(256)) * 16
    client.sendall(text)
    assert run_ready(bench.loop) <= FIFO_SIZE + 1, "a guest that doesn't read costs nothing"
    assert run_ready(bench.loop) == 0
    assert bench.hear() == text


def test_input_interrupts(bench: Bench) -> None:
    bench.console.write(COM1 + UART_IER, UART_IER_RDI)
    client = bench.connect()
    client.sendall(b"x")
    run_ready(bench.loop)
    assert bench.irqs == [True]
    assert bench.hear() == b"x"
    assert bench.irqs == [True, False]


def test_a_character_short_of_the_trigger_interrupts_after_a_while(bench: Bench) -> None:
    bench.enable_fifo()
    bench.console.write(COM1 + UART_IER, UART_IER_RDI)
    client = bench.connect()
    client.sendall(b"x")
    run_ready(bench.loop)
    assert bench.irqs == []
    due = bench.loop.until_next_timer()
    assert due is not None
    bench.clock.now += due
    bench.loop.step()
    assert bench.irqs == [True]
    assert bench.console.read(COM1 + UART_IIR) == UART_IIR_FIFO_ENABLED | UART_IIR_RX_TIMEOUT


def test_the_timeout_begins_anew_with_each_character(bench: Bench) -> None:
    bench.enable_fifo()
    bench.console.write(COM1 + UART_IER, UART_IER_RDI)
    client = bench.connect()
    client.sendall(b"x")
    run_ready(bench.loop)
    due = bench.loop.until_next_timer()
    assert due is not None
    bench.clock.now += 0.75 * due
    client.sendall(b"y")
    run_ready(bench.loop)
    bench.clock.now += 0.75 * due
    bench.loop.step()
    assert bench.irqs == []
    bench.clock.now += 0.5 * due
    bench.loop.step()
    assert bench.irqs == [True]


def test_a_second_client_waits_until_the_first_has_gone(bench: Bench) -> None:
    first = bench.connect()
    second = bench.connect()
    bench.say(b"to the first")
    assert received(first) == b"to the first"
    first.close()
    run_ready(bench.loop)
    bench.say(b"to the second")
    assert received(second) == b"to the second"


def test_after_a_hang_up_the_next_client_is_served(bench: Bench) -> None:
    first = bench.connect()
    first.close()
    run_ready(bench.loop)
    bench.say(b"anybody?")
    second = bench.connect()
    assert received(second) == b"anybody?"
    second.sendall(b"yes")
    run_ready(bench.loop)
    assert bench.hear() == b"yes"


def test_what_a_client_said_before_it_hung_up_is_heard(bench: Bench) -> None:
    client = bench.connect()
    client.sendall(b"run 10\n")
    client.close()
    assert run_ready(bench.loop) < 10, "the loop must not spin on a client that is gone"
    assert bench.hear() == b"run 10\n"
    assert not has_ended(bench.connect())


def test_a_client_that_is_gone_makes_room_though_the_guest_never_listens(bench: Bench) -> None:
    client = bench.connect()
    client.sendall(b"unheard")
    client.close()
    run_ready(bench.loop)
    second = bench.connect()
    bench.say(b"hello")
    assert received(second) == b"hello"


def test_a_client_that_sends_no_more_still_hears_the_answer(bench: Bench) -> None:
    client = bench.connect()
    client.sendall(b"lspci\n")
    client.shutdown(socket.SHUT_WR)
    second = bench.connect()
    second.sendall(b"setup\n")
    run_ready(bench.loop)
    assert bench.hear() == b"lspci\n", "nothing of the second one's"
    bench.say(b"ok count=2\n")
    assert received(client) == b"ok count=2\n"
    assert received(second) == b""
    client.close()
    run_ready(bench.loop)
    assert bench.hear() == b"setup\n"
    bench.say(b"ok\n")
    assert received(second) == b"ok\n"


def test_what_a_client_left_behind_is_heard_before_the_next_one(bench: Bench) -> None:
    """However many have come and gone since the guest has last listened, without a line lost or mixed."""
    for number in range(8):
        client = bench.connect()
        client.sendall(f"command {number}\n".encode() * 8)
        client.close()
    last = bench.connect()
    last.sendall(b"last\n")
    run_ready(bench.loop)
    said = bench.hear().splitlines()
    assert said == [b"command %d" % number for number in range(8) for _ in range(8)] + [b"last"]
    bench.say(b"ok\n")
    assert received(last) == b"ok\n"


@pytest.mark.parametrize("heard", ["before", "after"])
def test_the_answer_to_a_client_that_has_gone_is_not_said_to_the_next(bench: Bench, heard: str) -> None:
    client = bench.connect()
    client.sendall(b"lspci\n")
    run_ready(bench.loop)
    if heard == "before":
        assert bench.hear() == b"lspci\n"
    bench.say(b"* pci addr=00.0\n")
    client.close()
    run_ready(bench.loop)
    if heard == "after":
        assert bench.hear() == b"lspci\n"
    bench.say(b"ok count=1\n")
    second = bench.connect()
    assert received(second) == b""
    bench.say(b"and on")
    assert received(second) == b"and on"


def test_close_hangs_up_and_removes_the_socket(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    client = bench.connect()
    assert (tmp_path / "console").stat().st_mode & 0o777 == 0o600
    bench.close()
    assert not (tmp_path / "console").exists()
    assert client.fileno() == -1


def test_a_path_in_use_is_refused(bench: Bench) -> None:
    with pytest.raises(UsageError, match=rf"in use by \S+\[{os.getpid()}\]$"):
        Console(bench.loop, bench.path, bench.irqs.append, logging.getLogger("test"))


def test_a_guest_can_not_fill_the_loop(bench: Bench) -> None:
    """In loopback, each character sets the timer anew, for as long as the baud rate says; others ask for input."""
    bench.enable_fifo()
    bench.console.write(COM1 + UART_LCR, UART_LCR_DLAB)
    for port in (COM1, COM1 + 1):
        bench.console.write(port, 0xFF)
    bench.console.write(COM1 + UART_LCR, 0)
    bench.console.write(COM1 + UART_MCR, UART_MCR_LOOP)
    for round_number in range(20):
        for _ in range(100):
            bench.console.write(COM1 + UART_TX, round_number)
            bench.console.read(COM1 + UART_RX)
            bench.console.write(COM1 + UART_MCR, UART_MCR_LOOP)
        assert len(bench.loop._soon) <= 3
        run_ready(bench.loop)
    assert len([timer for timer in bench.loop._timers if timer.callback is not None]) <= 1
