# SPDX-License-Identifier: GPL-2.0-or-later
"""A session's requests and its end, over real sockets and eventfds."""

from __future__ import annotations

import itertools
import mmap
import os
import threading

import pytest

from common.mpqemu import BAR, CONFIG, SYSMEM, Command, request_frame
from remoted.iohub import Pirq
from tests.support.fds import await_fds, count_fds
from tests.support.remotebench import IO_BASE, MEM64_BASE, MEM_BASE, Pair, Peer, RemoteBench
from tests.support.wait import wait_until

ONES = 0xFFFFFFFFFFFFFFFF
FULL = (1 << 64) - 2


def test_config_space_byte_by_byte_to_its_last(peer: Peer) -> None:
    peer.config_write(0xFC, 4, 0xA4A3A2A1)
    assert [peer.config_read(addr, 1) for addr in range(256)][-4:] == [0xA1, 0xA2, 0xA3, 0xA4]
    assert [peer.config_read(addr, 2) for addr in (0xFE, 0x00)] == [0xA4A3, 0x1B36]


@pytest.mark.parametrize(
    ("addr", "size"),
    [
        (0xFD, 4),
        (0xFF, 2),
        (0x100, 1),
        (0xFFFFFFFF, 4),
        *((0, size) for size in (0, 3, 5, 64, 256, 200_000, -1, -0x80000000)),
    ],
)
def test_config_access_out_of_range_is_answered_with_all_ones(peer: Peer, addr: int, size: int) -> None:
    assert peer.config_read(addr, size) == ONES
    assert peer.config_write(addr, size, 0) == ONES
    assert peer.config_read(0, 2) == 0x1B36


@pytest.mark.parametrize(
    ("memory", "addr", "size"),
    [
        *itertools.product([False, True], [0, 0xC010, 0xFEB01000, MEM64_BASE - 1, ONES], [1, 8]),
        *itertools.product([True], [MEM_BASE, MEM64_BASE], [0, 3, 16, 0xFFFFFFFF]),
        (False, IO_BASE + 16, 2),
        (True, MEM_BASE + 4095, 8),
        (True, IO_BASE, 1),
        (False, MEM_BASE, 1),
    ],
)
def test_bar_access_out_of_range_is_answered_with_all_ones(
    peer: Peer, memory: bool, addr: int, size: int
) -> None:
    assert peer.bar_read(memory, addr, size) == ONES
    assert peer.bar_write(memory, addr, size, 1) == ONES
    assert peer.bar_read(True, MEM_BASE, 4) == 0


@pytest.mark.parametrize(
    ("memory", "base"), [(False, IO_BASE), (True, MEM_BASE), (True, MEM64_BASE)], ids=["io", "mem", "mem64"]
)
def test_bar_access(peer: Peer, memory: bool, base: int) -> None:
    assert peer.bar_write(memory, base + 8, 8, 0x8877665544332211) == 0
    assert [peer.bar_read(memory, base + 8, size) for size in (1, 2, 4, 8)] == [
        0x11,
        0x2211,
        0x44332211,
        0x8877665544332211,
    ]


def test_requests_sent_ahead_are_answered_in_order(bench: RemoteBench, peer: Peer) -> None:
    """No client should; one that does costs nobody anything, and none of its frames is lost."""
    for value in range(50):
        peer.send(Command.BAR_WRITE, BAR.pack(MEM_BASE + 8, value, 4, True))
        peer.send(Command.PCI_CFGREAD, CONFIG.pack(0, 0, 2))
        peer.send(Command.BAR_READ, BAR.pack(MEM_BASE + 8, 0, 4, True))
    bench.settle()
    assert [peer.receive() for _ in range(151)] == [
        *itertools.chain.from_iterable((0, 0x1B36, value) for value in range(50)),
        None,
    ]


# File descriptors


@pytest.mark.parametrize(
    "frame",
    [
        request_frame(Command.PCI_CFGREAD, CONFIG.pack(0, 0, 4)),
        request_frame(Command.PCI_CFGWRITE, CONFIG.pack(0x40, 0, 4)),
        request_frame(Command.BAR_READ, BAR.pack(MEM_BASE, 0, 4, True)),
        request_frame(Command.BAR_WRITE, BAR.pack(MEM_BASE + 8, 0, 4, True)),
        request_frame(Command.DEVICE_RESET),
    ],
    ids=["config read", "config write", "bar read", "bar write", "reset"],
)
def test_fds_of_a_message_that_must_not_carry_any_are_closed(
    bench: RemoteBench, peer: Peer, frame: bytes
) -> None:
    before = count_fds()
    with open(os.devnull, "rb") as null:
        for _ in range(20):
            peer.send_bytes(frame, [null.fileno()] * 7)
            bench.settle()
            assert peer.receive() is not None
    wait_until(lambda: count_fds() == before, "all fds are closed")
    assert not peer.has_ended


def test_end_of_the_link_closes_irqfd_and_resamplefd_at_once(bench: RemoteBench) -> None:
    """The VMM has closed its copies: these are the last, and KVM drops the irqfd with them."""
    before = count_fds()
    peer = bench.connect("dev0")
    peer.forget(peer.set_irqfd())
    await_fds(before + 4)
    peer.close()
    bench.settle()
    await_fds(before)
    assert bench.log.messages[-1] == "the peer closed the link"


def test_end_of_the_link_while_asserted_keeps_the_level_for_the_next_client(
    bench: RemoteBench, peer: Peer, pair: Pair
) -> None:
    peer.drive(True)
    peer.close()
    bench.settle()
    assert not bench.hub.pirqs[0x28].has_irqfd
    with bench.connect("dev0") as again:
        assert again.set_irqfd().written() == 1


def test_eventfds_that_the_peer_made_blocking_hold_nobody(bench: RemoteBench, peer: Peer, pair: Pair) -> None:
    for fd in pair.fds:
        os.set_blocking(fd, True)
    peer.drive(True)
    bench.resample(pair)
    pirq = bench.servers["dev0"].line
    assert isinstance(pirq, Pirq)
    pirq._on_resample(0)  # as after a resample that somebody else has read
    assert os.eventfd_read(pair.irqfd.fd) == 2
    os.eventfd_write(pair.irqfd.fd, FULL)
    bench.resample(pair)
    peer.drive(False)
    peer.drive(True)
    assert os.eventfd_read(pair.irqfd.fd) == FULL + 1


def test_ram_is_freed_by_a_thread_unless_it_stays_in_use(
    bench: RemoteBench, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also RAM that was refused; and a table that is sent again and again brings nothing to be freed."""
    unfit, ram = os.memfd_create("unfit"), os.memfd_create("ram")
    os.ftruncate(ram, 8 * mmap.PAGESIZE)
    starts = [number * mmap.PAGESIZE for number in range(8)]
    table = SYSMEM.pack(*starts, *([mmap.PAGESIZE] * 8), *starts)
    before = count_fds()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        for _ in range(100):
            peer.send(Command.SYNC_SYSMEM, table, [ram] * 8)
            bench.settle()
        assert len(bench.servers["dev0"].function.host.memory.regions) == 8
        in_use = count_fds()
        peer.send(Command.SYNC_SYSMEM, table, [unfit])
        bench.settle()
        await_fds(in_use + 1)
        peer.close()
        bench.settle()
        assert count_fds() > before
    wait_until(lambda: not bench.servers["dev0"]._disposal.is_full and count_fds() < before, "all is closed")
    os.close(unfit)
    os.close(ram)


def no_thread(_thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")
