# SPDX-License-Identifier: GPL-2.0-or-later
"""Errors by cause: the user, the peer or its absence, a shortage. Anything else is a bug and ends the process."""

from __future__ import annotations

import errno

__all__ = [
    "SHORTAGES",
    "IohubError",
    "ModelError",
    "PeerGone",
    "PeerTooSlow",
    "ProtocolError",
    "ShortageError",
    "UntrustedError",
    "UsageError",
    "exit_status",
]

SHORTAGES = frozenset(
    (errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC, errno.EDQUOT)
)
"""the errors of system calls that have nothing to do with what was asked for, and pass"""


class IohubError(Exception):
    """Base of every expected failure; ``str()`` is one clear line."""


class UsageError(IohubError):
    """An option, a file, a field or the environment is wrong: main() prints the line and exits with 2."""


class ProtocolError(IohubError):
    """A peer broke the protocol: it loses its session, and no other peer is affected."""


class PeerGone(IohubError):
    """The peer closed the link, or reset it."""


class PeerTooSlow(PeerGone):
    """The peer missed a deadline."""


class ModelError(UsageError):
    """A device's model can't be found, imported or created."""


class UntrustedError(UsageError):
    """A file or a process belongs to a user that isn't trusted (common.trust)."""


class ShortageError(IohubError):
    """This process or the system has run out of something: one session ends, and can come again."""


def exit_status(error: BaseException) -> int:
    """What main() returns for an error: 2 if it stays until somebody changes something, 1 if it may pass.

    The service manager starts a daemon again after 1 only. A shortage counts as such although somebody has made a
    UsageError of it, to say for what something was missing.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ShortageError) or (isinstance(cause, OSError) and cause.errno in SHORTAGES):
            return 1
        cause = cause.__cause__
    return 2 if isinstance(error, UsageError) else 1
