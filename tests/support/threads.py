# SPDX-License-Identifier: GPL-2.0-or-later
"""What another thread is doing."""

from __future__ import annotations

import threading
from pathlib import Path

from tests.support.wait import wait_until

_WRITE = "1"
"""the system call's number on x86-64"""


def wait_until_blocked_in_write(thread: threading.Thread) -> None:
    """Returns when the thread sleeps in write(2) (proc_pid_syscall(5))."""
    call = Path(f"/proc/self/task/{thread.native_id}/syscall")
    wait_until(lambda: call.read_text().split()[0] == _WRITE, "the thread is blocked in a write")
