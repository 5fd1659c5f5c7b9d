# SPDX-License-Identifier: GPL-2.0-or-later
"""A serial port of a Linux guest, and what its line's other end does with it."""

from __future__ import annotations

import hashlib
import random
import socket
import threading

from tests.support.linuxguest import LinuxGuest
from tests.support.qemu import PATIENCE

__all__ = ["exchange"]


def exchange(guest: LinuxGuest, port: str, line: socket.socket, inward: int, outward: int) -> None:
    """Sends ``inward`` random bytes into the guest's port and ``outward`` out of it, at the same time.

    ``line`` is the other end. AssertionError if a byte is lost, changed or added on the way.
    """
    guest.run(f"stty -F {port} raw -echo 115200")
    sent_in = random.Random(inward).randbytes(inward)
    # The guest has no bytes of its own that the host knows.
    guest.run(f"head -c {outward} /bin/busybox > /tmp/out; : > /tmp/in")
    assert guest.run("stat -c %s /tmp/out") == str(outward)
    expected = guest.run("sha256sum < /tmp/out").split()[0]
    received = bytearray()
    guest.run(f"head -c {inward} {port} > /tmp/in & reader=$!; cat /tmp/out > {port} & writer=$!")
    line.settimeout(PATIENCE)
    sender = threading.Thread(target=line.sendall, args=(sent_in,))
    sender.start()
    while len(received) < outward:
        data = line.recv(65536)
        assert data, f"the line has ended after {len(received)} bytes"
        received += data
    guest.run("wait $reader $writer", timeout=5 * PATIENCE)
    sender.join()
    assert hashlib.sha256(received).hexdigest() == expected
    assert guest.run("sha256sum < /tmp/in").split()[0] == hashlib.sha256(sent_in).hexdigest()
