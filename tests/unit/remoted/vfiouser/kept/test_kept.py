# SPDX-License-Identifier: GPL-2.0-or-later
"""A device on vfio-user below a service manager with an fd store: one process after another serves a client."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from common.vfiouser import HEADER, REGION_ACCESS, REGION_INFO, Command
from tests.support.fds import no_fd_is_left
from tests.support.keptvfiouser import (
    CONFIG,
    COUNT,
    INTX,
    LAST,
    LINE,
    MSIX,
    PAGE,
    RAISE,
    Lives,
    check_interrupts_and_ram,
    requests_with_fds,
)
from tests.support.vfiouserbench import MASK, TRIGGER, UNMASK, VfioUserPeer, signals


def test_an_idle_client_goes_on(lives: Lives) -> None:
    lives.peer.write(0, COUNT, b"abcd")
    for _ in range(3):
        process = lives.restart()
        assert process.dropped == []
        assert lives.peer.read(0, LAST, 4).payload == b"abcd"
    assert lives.peer.read(0, COUNT, 4).payload == bytes((1, 0, 0, 0))


def test_interrupts_and_ram_go_on(lives: Lives, ram: int, eventfds: list[int]) -> None:
    requests_with_fds(lives, ram, eventfds)
    lives.process.settle()
    assert [answer[2] for answer in lives.answers()] == [0] * 5
    for _ in range(3):
        lives.restart()
        assert lives.process.dropped == []
        check_interrupts_and_ram(lives, ram, eventfds)
    assert lives.process.log.messages == ["continues the link of the previous process"]


def test_a_vector_that_is_attached_is_signalled_by_a_later_process(lives: Lives, eventfds: list[int]) -> None:
    """And one that the client has masked stays so."""
    peer = lives.peer
    peer.set_command(0x0006)
    position = next(
        offset for offset in range(0x40, 0x100, 4) if peer.read(CONFIG, offset, 1).payload == b"\x11"
    )
    assert peer.set_irqs(TRIGGER, MSIX, 0, 4, fds=eventfds[:4]) == 0
    assert peer.set_irqs(MASK, MSIX, 3) == 0
    assert peer.write(CONFIG, position + 2, (0x8000).to_bytes(2, "little")).error == 0
    lives.restart()
    for vector in range(4):
        peer.write(0, RAISE, vector.to_bytes(4, "little"))
    assert [signals(fd) for fd in eventfds[:4]] == [1, 1, 1, 0]
    lives.restart()
    assert peer.set_irqs(UNMASK, MSIX, 3) == 0
    assert [signals(fd) for fd in eventfds[:4]] == [0, 0, 0, 1]


def test_a_line_that_the_client_has_masked_stays_so(lives: Lives, eventfds: list[int]) -> None:
    peer = lives.peer
    assert peer.set_irqs(TRIGGER, INTX, fds=eventfds[:1]) == 0
    assert peer.set_irqs(MASK, INTX) == 0
    lives.restart()
    peer.write(0, LINE, (1).to_bytes(4, "little"))
    assert signals(eventfds[0]) == 0
    lives.restart()
    assert signals(eventfds[0]) == 0
    assert peer.set_irqs(UNMASK, INTX) == 0
    assert signals(eventfds[0]) == 1
    lives.restart()
    assert signals(eventfds[0]) == 0, "asserted already"


def test_a_region_costs_the_same_however_many_there_are(lives: Lives, ram: int) -> None:
    """And after a restart all of them are there, but for the one that was unmapped."""

    def map_and_unmap() -> None:
        assert lives.peer.map(1 << 40, PAGE, ram) == 0
        assert lives.peer.unmap(1 << 40, PAGE).error == 0

    lives.peer.map(0, PAGE, ram)
    few = calls_of(map_and_unmap)
    for page in range(1, 600):
        assert lives.peer.map(page << 20, PAGE, ram, page % 16 * PAGE) == 0
    assert calls_of(map_and_unmap) < 1.2 * few
    assert lives.peer.unmap(300 << 20, PAGE).error == 0
    memory = lives.restart().function.host.memory
    assert memory.regions == [(page << 20, PAGE) for page in range(600) if page != 300]
    assert memory.mapping(599 << 20) == (PAGE, 599 % 16 * PAGE, memory.fds[0], True, True)
    assert lives.peer.unmap(0, 0, 2).error == 0
    assert lives.peer.read(0, 0, 4).error == 0
    assert stored(lives) == (0, 0)
    assert lives.restart().function.host.memory.is_empty


def calls_of(action: Callable[[], object]) -> int:
    """How many functions it calls, Python's and C's."""
    count = 0

    def note(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


def test_what_is_unmapped_or_detached_leaves_the_store(lives: Lives, ram: int, eventfds: list[int]) -> None:
    requests_with_fds(lives, ram, eventfds)
    lives.process.settle()
    lives.answers()
    assert stored(lives) == (3, 1)
    assert lives.peer.unmap(0x10000, PAGE).error == 0
    assert lives.peer.unmap(0x20000, PAGE).error == 0
    assert lives.peer.set_irqs(TRIGGER, MSIX, 1, 2) == 0
    lives.peer.read(0, 0, 4)
    assert stored(lives) == (2, 0)
    lives.restart()
    assert lives.process.dropped == []
    assert lives.process.function.host.memory.regions == []


def stored(lives: Lives) -> tuple[int, int]:
    """How many eventfds and RAM files the store has."""
    names = list(lives.manager.files)
    return sum("event-" in name for name in names), sum(name.startswith("ram-") for name in names)


def test_the_end_of_a_client_empties_the_store(lives: Lives, ram: int, eventfds: list[int]) -> None:
    requests_with_fds(lives, ram, eventfds)
    lives.process.settle()
    lives.peer.sock.close()
    lives.process.settle()
    assert sorted(lives.manager.files) == ["28.bar2", "28.client", "28.state"]
    lives.peer = VfioUserPeer(lives.process, "dev")
    lives.restart()
    assert lives.peer.read(0, COUNT, 4).error == 0


def test_a_client_that_reads_no_answers_gets_them_all_from_the_next_process(lives: Lives) -> None:
    expected: list[tuple[int, int]] = []
    for _ in range(3):
        with contextlib.suppress(BlockingIOError):
            while True:
                expected.append(lives.read(LAST, 2048))
                lives.process.settle()
        lives.restart()
    assert len(expected) > 100
    got: list[tuple[int, int]] = []

    def is_complete() -> bool:
        lives.process.settle()
        got.extend(answer[:2] for answer in whole_answers(lives))
        return len(got) == len(expected)

    for _ in range(1000):
        if is_complete():
            break
    assert got == expected


def test_a_request_in_two_parts_whose_answer_has_no_room(lives: Lives) -> None:
    """It is sent once there is room, although the client sends nothing more."""
    payload = REGION_ACCESS.pack(LAST, 0, 2048)
    request = HEADER.pack(7, Command.REGION_READ, HEADER.size + len(payload), 0, 0) + payload
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while lives.process.servers["dev"].accesses > sent - 2:
            for part in (request[:20], request[20:]):
                lives.peer.sock.send(part)
                lives.process.settle()
            sent += 1
            assert sent < 1000
    assert lives.process.servers["dev"].accesses < sent
    handled = lives.process.servers["dev"].accesses
    got = sum(1 for _ in range(3) for _ in whole_answers(lives))
    assert got == sent > handled > 10


def whole_answers(lives: Lives) -> Iterator[tuple[int, int]]:
    """Reads as long as there are answers, each as a whole."""
    sock = lives.peer.sock
    while True:
        try:
            header = sock.recv(HEADER.size)
        except BlockingIOError:
            return
        message, command, size, _, _ = HEADER.unpack(header)
        rest = size - HEADER.size
        while rest:
            lives.process.settle()
            rest -= len(sock.recv(rest))
        yield message, command


def test_before_version_nothing_is_served_by_a_later_process(tmp_path: Path) -> None:
    with no_fd_is_left(), closing(Lives(tmp_path)) as lives:
        lives.peer.sock.close()
        lives.process.settle()
        lives.peer = VfioUserPeer(lives.process, "dev", version=False)
        lives.process.settle()
        lives.restart()
        assert lives.peer.read(0, COUNT, 4).error != 0
        assert lives.peer.call(Command.VERSION, bytes(4) + b"{}\0").error == 0
        lives.restart()
        assert lives.peer.read(0, COUNT, 4).error == 0


def test_an_answer_with_a_file_is_sent(lives: Lives) -> None:
    """Of the BAR that the client may map."""
    message = lives.peer.send(Command.DEVICE_GET_REGION_INFO, REGION_INFO.pack(32, 0, 2, 0, 0, 0))
    lives.process.settle()
    data, fds, _, _ = socket.recv_fds(lives.peer.sock, 4096, 4)
    assert HEADER.unpack_from(data)[:2] == (message, Command.DEVICE_GET_REGION_INFO)
    assert len(fds) == 1
    os.close(fds[0])
    lives.restart()
    assert lives.peer.read(0, COUNT, 4).error == 0
