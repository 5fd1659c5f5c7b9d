# SPDX-License-Identifier: GPL-2.0-or-later
"""How long a QEMU stands still when an irqfd is attached to it or detached by ``--vm pid:PID``."""

from __future__ import annotations

import logging

from proxyd.vm.inject import Target
from tests.support.countguest import CountGuest

__all__ = ["stops"]

_GSI = 10


class _Microseconds(logging.Handler):
    """Collects what Target reports."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.args, tuple):
            *_, value = record.args
            self.values.append(float(str(value)))


def stops(count: int) -> dict[str, list[float]]:
    """Microseconds, so many of each kind, of a QEMU whose guest sleeps."""
    log = logging.getLogger("bench")
    log.setLevel(logging.INFO)
    reported = _Microseconds()
    log.addHandler(reported)
    with CountGuest() as guest:
        target = Target.open(guest.pid, log)
        for _ in range(count):
            target.detach(target.attach(_GSI))
        target.close()
    return {"attach": reported.values[::2], "detach": reported.values[1::2]}
