# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM's announcements of VMs made and gone, from the kernel's uevent multicast (NETLINK_KOBJECT_UEVENT).

KVM sends a "change" event of its misc device for each (kvm_uevent_notify_change() of virt/kvm/kvm_main.c). The
message is what lib/kobject_uevent.c builds: "ACTION@DEVPATH", then KEY=VALUE strings, each ended by a zero byte.

pyroute2 takes it apart. Its socket isn't used: get() blocks until there is a message, and doesn't tell who sent
it, while any process with CAP_NET_ADMIN may send to the group. It is loaded with the first of KVM's messages: that
takes as long as the rest of a start, and 11 MiB.
"""

from __future__ import annotations

import errno
import logging
import socket
from dataclasses import dataclass
from typing import Literal, Self

from common.text import DIGITS, consists_of

__all__ = ["KvmEvent", "KvmEvents", "parse"]

_NETLINK_KOBJECT_UEVENT = 15  # linux/netlink.h
_GROUP_KERNEL = 1  # the other one is udev's
_UEVENT_MAX = 8192  # the kernel's own limit is 2 KiB of variables (UEVENT_BUFFER_SIZE) and a path
_MESSAGES_AT_ONCE = 64
_MAX_PID_DIGITS = 9
_KERNEL = 0  # as a netlink address


@dataclass(frozen=True, slots=True)
class KvmEvent:
    """One VM made or gone. ``pid`` is the process that made it, as the initial pid namespace counts.

    "lost" means that there were more events than the socket could hold, or that they can't be taken apart, with
    pid 0: look for yourself.
    """

    kind: Literal["create", "destroy", "lost"]
    pid: int


def parse(message: bytes) -> KvmEvent | None:
    """The event in one uevent message, None if it has nothing to do with KVM or isn't understood."""
    if message.startswith(b"libudev\0") or b"/kvm\0" not in message:
        return None
    # Its part for traffic control, which nobody uses, warns where /proc/net is hidden.
    logging.getLogger("pyroute2.netlink.rtnl.tcmsg").setLevel(logging.ERROR)
    try:
        from pyroute2.netlink.uevent import MarshalUevent
    except (ImportError, OSError):  # it is being replaced, or no fd is left
        return KvmEvent("lost", 0)
    try:
        fields = next(iter(MarshalUevent().parse(message)))
    except (ValueError, KeyError, TypeError):  # a field named as one of its own
        return None
    kind, pid = fields.get("EVENT"), fields.get("PID", "")
    if fields.get("SUBSYSTEM") != "misc" or not fields.get("DEVPATH", "").endswith("/kvm"):
        return None
    if kind not in ("create", "destroy") or not consists_of(pid, DIGITS, _MAX_PID_DIGITS):
        return None
    return KvmEvent(kind, int(pid))


class KvmEvents:
    """A subscription; ``fileno()`` is readable when there is something for read()."""

    def __init__(self) -> None:
        """Raises OSError."""
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self._socket = socket.socket(socket.AF_NETLINK, kind, _NETLINK_KOBJECT_UEVENT)
        try:
            self._socket.bind((0, _GROUP_KERNEL))
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """The fd for the event loop."""
        return self._socket.fileno()

    def read(self) -> list[KvmEvent]:
        """KVM's events among the messages at hand, maybe none. Never blocks, takes a bounded number at once."""
        events: list[KvmEvent] = []
        for _ in range(_MESSAGES_AT_ONCE):
            try:
                message, (sender, _groups) = self._socket.recvfrom(_UEVENT_MAX)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                events.append(KvmEvent("lost", 0))
                continue
            event = parse(message) if sender == _KERNEL else None
            if event is not None:
                events.append(event)
        return events

    def close(self) -> None:
        """Ends the subscription."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()
