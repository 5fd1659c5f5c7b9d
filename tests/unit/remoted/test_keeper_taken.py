# SPDX-License-Identifier: GPL-2.0-or-later
"""A process is killed while it handles a request: the next one does it again before what came after it."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from common.mpqemu import BAR, CONFIG, ERROR, Command
from remoted.keptlink import KeptLink
from remoted.state import FunctionState
from tests.support.remotebench import IO_BASE, Peer
from tests.unit.remoted.test_keeper import FETCH, LINE, PAGE, VALUE, KeptBench, bench, peer, ram, sync, write

__all__ = ["bench", "peer", "ram"]

Kill = Callable[[Peer, Command, bytes], None]


@pytest.fixture
def kill(bench: KeptBench, monkeypatch: pytest.MonkeyPatch) -> Kill:
    """Sends a request, and kills the process right before what it has done of it becomes valid."""

    def send_and_kill(peer: Peer, command: Command, payload: bytes) -> None:
        peer.send(command, payload)
        with monkeypatch.context() as patch:
            patch.setattr(FunctionState, "commit_reply", killed)
            with pytest.raises(KeyboardInterrupt):
                bench.settle()
        for server in bench.servers.values():
            server.function.host.guard.on_done = None  # nothing becomes valid any more
        bench.restart()

    return send_and_kill


def killed(*_: object) -> None:
    raise KeyboardInterrupt


def writing(register: int, value: int) -> tuple[Command, bytes]:
    return Command.BAR_WRITE, BAR.pack(IO_BASE + register, value, 4, False)


def redo(bench: KeptBench) -> None:
    bench.loop.step()
    bench.settle()


@pytest.mark.parametrize("restarts", range(3))
def test_it_is_done_once(bench: KeptBench, peer: Peer, kill: Kill, restarts: int) -> None:
    """By the first process that has time for it, in its loop: a device that hangs in it is noticed there only."""
    write(peer, VALUE, 5)
    kill(peer, *writing(VALUE, 6))
    for _ in range(restarts):
        bench.restart()
    assert bench.function("dev0").value == 5
    assert peer.receive() is None
    redo(bench)
    assert bench.function("dev0").value == 6
    assert peer.receive() == 0
    assert bench.servers["dev0"].accesses == 1
    write(peer, VALUE, 7)
    bench.restart()
    redo(bench)
    assert peer.receive() is None
    assert peer.bar_read(False, IO_BASE, 4) == 7


def test_no_eoi_is_judged_before_it(bench: KeptBench, peer: Peer, kill: Kill) -> None:
    """It lowers the line, which the EOI would assert once more."""
    pair = peer.set_irqfd()
    write(peer, LINE, 1)
    assert pair.written() == 1
    pair.resamplefd.set()
    kill(peer, *writing(LINE, 0))
    redo(bench)
    assert peer.receive() == 0
    assert pair.written() == 0
    write(peer, LINE, 1)
    assert pair.written() == 1
    bench.resample(pair)
    assert pair.written() == 1, "EOIs are served again"


def test_nothing_that_was_sent_later_is_done_before_it(bench: KeptBench, peer: Peer, kill: Kill) -> None:
    kill(peer, *writing(VALUE, 6))
    peer.send(*writing(VALUE, 8))
    bench.settle()
    assert bench.function("dev0").value == 7
    bench.loop.step()
    assert bench.function("dev0").value == 6
    bench.settle()
    assert bench.function("dev0").value == 8
    assert (peer.receive(), peer.receive(), peer.receive()) == (0, 0, None)


def test_it_finds_the_ram_of_the_process_before(bench: KeptBench, peer: Peer, kill: Kill, ram: int) -> None:
    assert os.pread(ram, 2, PAGE) == b"\x01\xab"
    sync(peer, bench, ram, 1)
    kill(peer, *writing(FETCH, 1 << 20))
    redo(bench)
    assert peer.receive() == 0
    assert bench.function("dev0").value == 0xAB01


@pytest.mark.parametrize(
    ("command", "payload", "reply"),
    [
        (Command.PCI_CFGREAD, CONFIG.pack(0, 0, 2), 0x1234),
        (Command.PCI_CFGREAD, CONFIG.pack(0, 0, -1), ERROR),
        (Command.PCI_CFGWRITE, CONFIG.pack(0x3C, 11, 1), 0),
        (Command.BAR_READ, BAR.pack(IO_BASE, 0, 4, False), 7),
        (Command.DEVICE_RESET, b"", 0),
    ],
)
def test_each_request_that_has_a_reply(
    bench: KeptBench, peer: Peer, kill: Kill, command: Command, payload: bytes, reply: int
) -> None:
    kill(peer, command, payload)
    redo(bench)
    assert (peer.receive(), peer.receive()) == (reply, None)


def test_its_client_has_gone(bench: KeptBench, peer: Peer, kill: Kill) -> None:
    """It is done all the same, as one that lies in a socket whose client has gone. The next client is served."""
    with bench.connect("dev1") as other:
        kill(other, Command.DEVICE_RESET, b"")
        other.close()
        redo(bench)
        assert bench.servers["dev1"].session is None
        with bench.connect("dev1") as again:
            again.send(Command.PCI_CFGREAD, CONFIG.pack(0, 0, 2))
            bench.settle()
            assert (again.receive(), again.receive()) == (0x1234, None)


def test_its_session_ends_before_it(bench: KeptBench, peer: Peer, kill: Kill) -> None:
    kill(peer, *writing(VALUE, 6))
    session = bench.servers["dev0"].session
    assert session is not None
    session.close()
    redo(bench)
    assert bench.function("dev0").value == 7
    bench.restart()
    with bench.connect("dev0") as again:
        redo(bench)
        assert again.receive() is None
        assert bench.function("dev0").value == 7


@pytest.mark.parametrize(
    ("owner", "place"), [(FunctionState, "commit_reply"), (KeptLink, "_fill_pipe")], ids=["before", "after"]
)
def test_the_next_client_gets_nothing_of_it(
    bench: KeptBench, peer: Peer, monkeypatch: pytest.MonkeyPatch, owner: type, place: str
) -> None:
    """Process and client were killed before or after it had become valid, so the manager has dropped the link."""
    with monkeypatch.context() as patch:
        patch.setattr(owner, place, killed)
        with pytest.raises(KeyboardInterrupt):
            peer.config_read(0, 4)
    peer.close()
    for name in ("28.link", "28.reply-read", "28.reply-write"):
        for fd in bench.manager.files.pop(name):
            os.close(fd)
    bench.restart()
    for _ in range(2):
        with bench.connect("dev0") as again:
            redo(bench)
            assert again.receive() is None
            bench.restart()
            redo(bench)
            assert again.receive() is None
            again.send(Command.PCI_CFGREAD, CONFIG.pack(0, 0, 2))
            bench.settle()
            assert (again.receive(), again.receive()) == (0x1234, None)
        bench.settle()
