# SPDX-License-Identifier: GPL-2.0-or-later
"""What a process has open, and how it gives that to another."""

from __future__ import annotations

import array
import gc
import os
import resource
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tests.support.wait import wait_until

_SETTLED = 5
"""so many counts in a row, over some 30 ms, must be the same"""


def count_fds(pid: int | None = None) -> int:
    """How many fds this or another process has open (the listing's own included, each time alike).

    What is in this one's garbage is closed first: else that might happen between two counts.
    """
    if pid is None:
        gc.collect()
    return len(os.listdir(f"/proc/{'self' if pid is None else pid}/fd"))


def await_fds(count: int) -> None:
    """Waits until so many fds are open: common.disposal's thread may still be at some."""
    wait_until(lambda: count_fds() == count, f"{count} fds are open")


def settled_fds(pid: int) -> int:
    """How many fds another process has open, once it has closed the connections of calls that are over."""
    counts: list[int] = []

    def is_settled() -> bool:
        counts.append(count_fds(pid))
        return len(set(counts[-_SETTLED:])) == 1 and len(counts) >= _SETTLED

    wait_until(is_settled, f"process {pid} opens and closes nothing")
    return counts[-1]


def identity(fd: int) -> str:
    """What an fd refers to, the same for each of its duplicates: inode, or the number of an eventfd."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("eventfd-id:"):
                return line.strip()
    status = os.fstat(fd)
    return f"{status.st_dev}:{status.st_ino}"


def send_fds(sock: socket.socket, data: bytes, fds: Sequence[int] = (), flags: int = 0) -> None:
    """Sends all of the data in one piece, with duplicates of the fds on its first byte."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    assert sock.sendmsg([data], rights, flags) == len(data)


@contextmanager
def no_fd_is_left() -> Iterator[None]:
    """What is opened within must be closed within, or soon."""
    before = count_fds()
    yield
    await_fds(before)


@contextmanager
def no_more_fds(spare: int = 0) -> Iterator[None]:
    """Lets every attempt to open more than ``spare`` fds fail with EMFILE, by the process's limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.dup(0) for _ in range(spare + 1)]
    for fd in free:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[-1], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
