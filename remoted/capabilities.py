# SPDX-License-Identifier: GPL-2.0-or-later
"""Capabilities in config space: what a class declares, and where in the list it comes (PCI 3.0, 6.7)."""

from __future__ import annotations

from collections.abc import Iterable

from common import pci
from common.errors import UsageError

__all__ = ["Capability", "add_capabilities"]


class Capability:
    """A structure in config space that a class declares. Its subclasses are what a device author uses."""

    __slots__: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """As in the class's source, with all values: errors show it, and kept state is told apart by it."""
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.__slots__)
        return f"{type(self).__name__}({values})"

    @property
    def cap_id(self) -> int:
        """The number that tells guests what it is."""
        raise NotImplementedError

    def body(self) -> bytes:
        """What follows id and next pointer, after a reset."""
        raise NotImplementedError

    def write_mask(self) -> bytes:
        """The bits of the body that the guest can write."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises UsageError for a value that is not possible."""


def add_capabilities(capabilities: Iterable[Capability], config: bytearray, wmask: bytearray) -> list[int]:
    """Puts the list into config space, in this order, from 0x40 on; returns the offset of each.

    Raises UsageError when there is no room.
    """
    offsets = []
    link, start = pci.PCI_CAPABILITY_LIST, pci.PCI_STD_HEADER_SIZE
    for capability in capabilities:
        body = capability.body()
        end = start + 2 + len(body)
        if end > pci.PCI_CONFIG_SIZE:
            raise UsageError(
                f"CAPABILITIES: {capability} does not fit into config space behind the others, at {start:#x}"
            )
        config[link] = start
        config[start:end] = bytes((capability.cap_id, 0)) + body
        wmask[start:end] = bytes(2) + capability.write_mask()
        config[pci.PCI_STATUS] |= pci.PCI_STATUS_CAP_LIST
        offsets.append(start)
        link, start = start + 1, end + -end % 4
    return offsets
