# SPDX-License-Identifier: GPL-2.0-or-later
"""What a daemon gives up at its start, whoever starts it."""

from __future__ import annotations

import ctypes
import os

__all__ = ["renounce"]

# <linux/prctl.h>
_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38

_libc = ctypes.CDLL(None, use_errno=True)
_prctl = _libc.prctl
_prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)


def renounce() -> None:
    """Gains no privileges by exec(), and shows nobody its memory, which may be the guest's. Raises OSError.

    Without PR_SET_DUMPABLE there is no core dump, and other processes of the same user, such as a QEMU that has
    been taken over, can neither trace this one nor copy its fds (prctl(2), ptrace(2)).
    """
    for option, value in ((_PR_SET_NO_NEW_PRIVS, 1), (_PR_SET_DUMPABLE, 0)):
        if _prctl(option, value, 0, 0, 0):
            raise OSError(ctypes.get_errno(), f"prctl({option}): {os.strerror(ctypes.get_errno())}")
