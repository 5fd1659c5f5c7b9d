# SPDX-License-Identifier: GPL-2.0-or-later
"""A serial port of a Linux guest, and what its line's other end does with it."""

from __future__ import annotations

import hashlib
import random
import socket

from tests.support.linuxguest import LinuxGuest, busybox
from tests.support.qemu import PATIENCE

__all__ = ["exchange"]

_AHEAD = 4096
"""bytes. The line has no speed: as long as more comes, the driver stays in its interrupt handler, and nobody takes
from it what it has received."""


def exchange(guest: LinuxGuest, port: str, line: socket.socket, inward: int, outward: int) -> None:
    """Sends ``inward`` bytes into the guest's port and ``outward`` (up to 1 MiB) out of it, at the same time.

    ``line`` is the other end, whose bytes are never far ahead of the guest's. AssertionError if a byte is lost,
    changed or added on the way.
    """
    # Nobody may send before the port is open: opening it clears the FIFOs.
    guest.run(f"exec 8<>{port}; stty -F {port} raw -echo 115200")
    sent_in = random.Random(inward).randbytes(inward)
    sent_out = busybox()[:outward]
    guest.run(f"head -c {outward} /bin/busybox > /tmp/out")
    guest.run(f"head -c {inward} {port} > /tmp/in & reader=$!; cat /tmp/out > {port} & writer=$!")
    line.settimeout(PATIENCE)
    sent, received = 0, bytearray()
    while len(received) < outward:
        allowed = inward * len(received) // outward + _AHEAD
        line.sendall(sent_in[sent:allowed])
        sent = max(sent, min(allowed, inward))
        data = line.recv(_AHEAD)
        assert data, f"the line has ended after {len(received)} bytes"
        received += data
    line.sendall(sent_in[sent:])
    guest.run("wait $reader $writer; exec 8>&-", timeout=5 * PATIENCE)
    assert received == sent_out
    assert guest.run("sha256sum < /tmp/in").split()[0] == hashlib.sha256(sent_in).hexdigest()
