# SPDX-License-Identifier: GPL-2.0-or-later
"""What a process has open."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager


def count_fds(pid: int | None = None) -> int:
    """How many fds this or another process has open (the listing's own included, each time alike)."""
    return len(os.listdir(f"/proc/{'self' if pid is None else pid}/fd"))


def identity(fd: int) -> str:
    """What an fd refers to, the same for each of its duplicates: inode, or the number of an eventfd."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("eventfd-id:"):
                return line.strip()
    status = os.fstat(fd)
    return f"{status.st_dev}:{status.st_ino}"


@contextmanager
def no_more_fds() -> Iterator[None]:
    """Lets every attempt to open one more fd fail with EMFILE, by the process's limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
