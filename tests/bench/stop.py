# SPDX-License-Identifier: GPL-2.0-or-later
"""How long a QEMU stands still when an irqfd is attached to it or detached by ``--vm pid:PID``."""

from __future__ import annotations

from proxyd.vm.pid.inject import Target
from tests.support.countguest import CountGuest

__all__ = ["stops"]

_GSI = 10


def stops(count: int) -> dict[str, list[float]]:
    """Microseconds, so many of each kind, of a QEMU whose guest sleeps."""
    attach = []
    detach = []
    with CountGuest() as guest:
        target = Target.open(guest.pid)
        for _ in range(count):
            line = target.attach(_GSI)
            attach.append(line.seconds * 1e6)
            detach.append(target.detach(line) * 1e6)
        target.close()
    return {"attach": attach, "detach": detach}
