# SPDX-License-Identifier: GPL-2.0-or-later
"""The process at the other end of a UNIX socket."""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

from common.text import is_number

__all__ = ["PeerCredentials", "is_dying", "parse_pid", "peer_credentials"]

_PF_EXITING = 0x4  # include/linux/sched.h
_SIGKILL_BIT = 1 << 8
"""of a signal mask in /proc/PID/status"""


class PeerCredentials(NamedTuple):
    """Who connected, or who listens (SO_PEERCRED, unix(7)), as of the moment of connect() or listen()."""

    pid: int
    """0 for a process in another PID namespace"""
    uid: int
    """the overflow uid, 65534, for a user whom this user namespace doesn't map"""
    gid: int

    @property
    def name(self) -> str | None:
        """What the process calls itself at present, printable; None once it has gone."""
        try:
            with open(f"/proc/{self.pid}/comm", encoding="utf-8", errors="replace") as comm:
                name = comm.read().rstrip("\n")
        except OSError:
            return None
        # The peer chooses the name (PR_SET_NAME): a line feed in it would forge a log line.
        return "".join(c if c.isprintable() else "?" for c in name)

    def __str__(self) -> str:
        name = self.name
        return f"pid {self.pid}" if name is None else f"{name}[{self.pid}]"


def peer_credentials(sock: socket.socket) -> PeerCredentials:
    """The credentials of a connected UNIX socket's other end. Raises OSError."""
    return PeerCredentials(*struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)))


def parse_pid(peer: str) -> int | None:
    """The pid in what ``str()`` makes of PeerCredentials; None if there is none.

    The process chooses its name, but the pid comes after it.
    """
    start = 0
    if peer.endswith("]"):
        start = peer.rfind("[") + 1
    elif peer.startswith("pid "):
        start = len("pid ")
    number = peer[start:].removesuffix("]")
    return int(number) if start and is_number(number) else None


def is_dying(pid: int) -> bool:
    """Whether a process has been killed or is exiting, although it may not be gone for a long time.

    A thread that closes a file whose owner doesn't answer can't be killed, and keeps all of the process's sockets
    open. The process is then a zombie (its main thread has ended), or its main thread is exiting, or has SIGKILL
    pending (proc_pid_stat(5), proc_pid_status(5)). False for a process that is gone or can't be seen.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            # The name, in parentheses, may contain anything.
            fields = stat.read().rpartition(b")")[2].split()
        with open(f"/proc/{pid}/status", "rb") as status:
            pending = [line.split()[1] for line in status if line.startswith((b"SigPnd:", b"ShdPnd:"))]
    except OSError:
        return False
    return (
        fields[0] in (b"Z", b"X")
        or bool(int(fields[6]) & _PF_EXITING)
        or any(int(mask, 16) & _SIGKILL_BIT for mask in pending)
    )
