# SPDX-License-Identifier: GPL-2.0-or-later
"""Stand-ins for the two daemons that hold a line of a running QEMU, as programs that a test can kill.

    python -m tests.support.lineholder proxyd FD PID GSI    attaches, sends the pair over the socket FD
    python -m tests.support.lineholder remoted FD           receives it, asserts the line, holds it

Each prints a line when it has done so, and another when it has let go because the other end of the socket is gone.
"""

from __future__ import annotations

import socket
import sys

from common.notifier import EventNotifier
from proxyd.vm.pid.inject import Target


def proxyd(link: socket.socket, pid: int, gsi: int) -> None:
    target = Target.open(pid)
    line = target.attach(gsi)
    socket.send_fds(link, [b"\0"], [line.irqfd.fd, line.resamplefd.fd])
    print("attached", flush=True)
    link.recv(1)
    target.detach(line)
    print("detached", flush=True)


def remoted(link: socket.socket) -> None:
    _, fds, _, _ = socket.recv_fds(link, 1, 2)
    irqfd, resamplefd = (EventNotifier(fd) for fd in fds)
    irqfd.set()
    print("asserted", flush=True)
    link.recv(1)
    irqfd.close()
    resamplefd.close()
    print("closed", flush=True)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[2])) as link:
        if sys.argv[1] == "proxyd":
            proxyd(link, int(sys.argv[3]), int(sys.argv[4]))
        else:
            remoted(link)
    sys.stdin.read()
