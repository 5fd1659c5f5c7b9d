# SPDX-License-Identifier: GPL-2.0-or-later
"""A vfio-user link whose process is killed at any line: requests are done and answered once."""

from __future__ import annotations

import gc
import os
import random
import socket

import pytest

from common.vfiouser import HEADER, IRQ_SET, REGION_ACCESS, Command
from remoted import clientsession, keeper, keptframelink, state
from remoted.vfiouser import clientstate, ramtable, session
from remoted.vfiouser import keeper as vfiouser_keeper
from remoted.vfiouser import keptlink as vfiouser_keptlink
from remoted.vfiouser import line as vfiouser_line
from tests.support.keptvfiouser import (
    COUNT,
    INTX,
    LAST,
    LINE,
    MSIX,
    PAGE,
    Lives,
    Process,
    check_interrupts_and_ram,
    requests_with_fds,
)
from tests.support.killing import killed_at
from tests.support.vfiouserbench import DISABLE, TRIGGER, UNMASK_BY, signals

MODULES = (
    *(clientsession, keeper, keptframelink, state),
    *(clientstate, ramtable, session, vfiouser_keeper, vfiouser_keptlink),
)
SOURCES = tuple(str(module.__file__) for module in MODULES)
"""what must stand a kill at any line"""


def test_requests_are_done_and_answered_once_wherever_the_process_is_killed(mortal: Lives) -> None:
    """Several at once, the first of them posted, with a long answer among them."""
    lives, count, line, was_killed = mortal, 0, 1, True
    while was_killed:
        lives.write(COUNT, count + 1, is_posted=True)
        expected = [lives.write(COUNT, count + 2), lives.read(COUNT), lives.read(LAST, 2048)]
        lives.write(COUNT, count + 3, is_posted=True)
        count += 3
        was_killed = killed_at(line, lives.process.settle, SOURCES)
        lives.restart()
        answers = lives.answers()
        assert [answer[:2] for answer in answers] == expected, f"killed at line {line}"
        assert [answer[2] for answer in answers] == [0, 0, 0]
        assert answers[1][3][REGION_ACCESS.size :] == (count - 1).to_bytes(4, "little"), line
        function = lives.process.function
        assert function.count == count, f"killed at line {line}"
        assert function.last[-12:] == b"".join((count + i).to_bytes(4, "little") for i in (-2, -1, 0))
        line += 11
    assert line > 100


@pytest.mark.filterwarnings("ignore")  # who is killed while it starts leaves open files to the collector
def test_kill_of_the_successor_too(mortal: Lives) -> None:
    lives, count, line, was_killed = mortal, 0, 1, True
    pick = random.Random(1)
    while was_killed:
        lives.write(COUNT, count + 1, is_posted=True)
        expected = [lives.write(COUNT, count + 2), lives.read(COUNT)]
        count += 2
        was_killed = killed_at(line, lives.process.settle, SOURCES)
        for _ in range(2):
            lives.process.function.host.guard.on_done = None
            before = open_fds()
            killed_at(pick.randint(1, 500), lambda: Process(lives.directory, lives.manager).settle(), SOURCES)
            kept = {fd for fds in lives.manager.files.values() for fd in fds}
            for fd in open_fds() - before - kept:
                os.close(fd)
        lives.restart()
        assert [answer[:2] for answer in lives.answers()] == expected, f"killed at line {line}"
        assert lives.process.function.count == count, f"killed at line {line}"
        line += 13


def open_fds() -> set[int]:
    gc.collect()
    names = os.listdir("/proc/self/fd")
    return {int(name) for name in names if os.path.lexists(f"/proc/self/fd/{name}")}


def test_requests_with_fds_are_done_once_wherever_the_process_is_killed(
    mortal: Lives, ram: int, eventfds: list[int]
) -> None:
    lives, line, was_killed = mortal, 1, True
    while was_killed:
        expected = requests_with_fds(lives, ram, eventfds)
        was_killed = killed_at(line, lives.process.settle, SOURCES)
        lives.restart()
        answers = lives.answers()
        assert [answer[:2] for answer in answers] == expected, f"killed at line {line}"
        assert [answer[2] for answer in answers] == [0] * 5, f"killed at line {line}"
        assert "again" not in " ".join(lives.process.log.messages), f"killed at line {line}"
        check_interrupts_and_ram(lives, ram, eventfds)
        for address in (0x10000, 0x20000):
            assert lives.peer.unmap(address, PAGE).error == 0
        for index in (INTX, MSIX):
            assert lives.peer.set_irqs(DISABLE, index, 0, 0) == 0
        line += 6
    assert line > 500


def test_an_eoi_counts_wherever_the_process_is_killed_while_its_eventfd_is_replaced(
    mortal: Lives, eventfds: list[int]
) -> None:
    lives, number, was_killed = mortal, 1, True
    trigger, first, second, *_ = eventfds
    while was_killed:
        assert lives.peer.set_irqs(TRIGGER, INTX, fds=[trigger]) == 0
        assert lives.peer.set_irqs(UNMASK_BY, INTX, fds=[first]) == 0
        lives.peer.write(0, LINE, (1).to_bytes(4, "little"))
        assert signals(trigger) == 1
        lives.queue(Command.DEVICE_SET_IRQS, IRQ_SET.pack(IRQ_SET.size, UNMASK_BY, INTX, 0, 1), [second])
        os.eventfd_write(first, 1)
        was_killed = killed_at(number, lives.process.settle, [str(vfiouser_line.__file__)])
        lives.restart()
        assert signals(trigger), f"killed at line {number}"
        assert len(lives.answers()) == 1
        lives.peer.write(0, LINE, bytes(4))
        assert lives.peer.set_irqs(DISABLE, INTX, count=0) == 0
        number += 1
    assert number > 15


def test_the_next_client_goes_on_whatever_the_one_before_has_left(
    lives: Lives, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process and client were killed with a request in the socket that had been done, so the link was dropped."""
    lives.write(COUNT, 1)
    with monkeypatch.context() as patch:
        patch.setattr(vfiouser_keptlink.KeptVfioUserLink, "_consume", killed)
        with pytest.raises(KeyboardInterrupt):
            lives.process.settle()
    lives.peer.sock.close()
    for name in ("28.link", "28.reply-read", "28.reply-write"):
        for fd in lives.manager.files.pop(name):
            os.close(fd)
    process = lives.restart()
    process.listen()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(process.path("dev"))
        client.setblocking(False)
        payload = bytes(4) + b"{}\0"
        client.send(HEADER.pack(1, Command.VERSION, HEADER.size + len(payload), 0, 0) + payload)
        process.settle()
        assert HEADER.unpack_from(client.recv(1024))[:2] == (1, Command.VERSION)
        process.settle()


def killed(_link: object) -> None:
    raise KeyboardInterrupt
