# SPDX-License-Identifier: GPL-2.0-or-later
"""Errors by cause: the user, the peer or its absence, a shortage. Anything else is a bug and ends the process."""

__all__ = [
    "IohubError",
    "ModelError",
    "PeerGone",
    "PeerTooSlow",
    "ProtocolError",
    "ShortageError",
    "UntrustedError",
    "UsageError",
]


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
