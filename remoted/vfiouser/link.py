# SPDX-License-Identifier: GPL-2.0-or-later
"""One vfio-user socket, the answering end: requests and their fds in, replies with an fd at most out."""

from __future__ import annotations

import array
import errno
import socket
from collections.abc import Mapping, Sequence
from struct import Struct
from typing import ClassVar

from common import vfiouser
from common.disposal import Disposal
from common.errors import PeerGone, ShortageError
from common.framelink import FrameLink
from common.vfiouser import Command

__all__ = ["VfioUserLink"]


class VfioUserLink(FrameLink):
    """Receives requests; ``frame`` is a view of the whole request, as ``payload`` is of its payload."""

    HEADER_SIZE = vfiouser.HEADER.size
    READ_AHEAD = vfiouser.HEADER.size + vfiouser.IRQ_SET.size
    """the shortest request that may carry fds; a write of 4 bytes is as long"""
    CAPACITY = vfiouser.MAX_SIZE
    MAX_FDS = vfiouser.MAX_FDS
    COMMAND_AND_SIZE = Struct("<2xHI")
    SIZES: ClassVar[Mapping[int, int]] = {
        Command.REGION_READ: vfiouser.HEADER.size + vfiouser.REGION_ACCESS.size,
        Command.REGION_WRITE: vfiouser.HEADER.size + vfiouser.REGION_ACCESS.size + 4,
    }
    EXTRA = 0
    has_unsent = False
    """a reply is sent as a whole, or not at all"""

    def __init__(self, sock: socket.socket, disposal: Disposal) -> None:
        """Takes ownership of a connected UNIX stream socket; ``disposal`` closes it, and fds that came over it."""
        super().__init__(sock, disposal)
        self.frame = self._view
        self.is_negotiated = False
        """whether the client's VERSION was accepted"""

    def send(self, message: bytes, fds: Sequence[int] = ()) -> bool:
        """Sends a whole reply, and copies of fds with it.

        False when the peer has left so many replies unread that there is no room. Raises PeerGone, and
        ShortageError when too many fds are under way already.
        """
        try:
            if fds:
                rights = array.array("i", fds)
                self._sock.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            else:
                # Some kilobytes are sent as a whole, or not at all (unix_stream_sendmsg()).
                self._send(message)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS:
                raise ShortageError(f"a reply's fd can't be sent: {error.strerror}") from error
            raise PeerGone(f"writing the link: {error.strerror}") from error
        return True

    def _check_header(self) -> tuple[int, int, bool]:
        _, command, size, flags, _ = vfiouser.HEADER.unpack_from(self._buffer)
        vfiouser.check_header(command, size, flags)
        rule = vfiouser.RULES.get(command)
        return command, size, rule is not None and rule.max_fds > 0
