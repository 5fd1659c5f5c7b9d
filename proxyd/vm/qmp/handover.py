# SPDX-License-Identifier: GPL-2.0-or-later
"""A link as it is handed to QEMU's x-pci-proxy-dev, which trusts what is at the other end.

So what is there is looked at before: QEMU's main loop waits without a deadline for each answer while it
creates the proxy, and aborts on base address registers that it didn't expect (probe_pci_info() in QEMU's
hw/remote/proxy.c).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from common import mpqemu, pci
from common.errors import PeerGone, ProtocolError
from common.link import Client
from common.mpqemu import Command
from common.pci import PCI_NUM_BARS
from common.peer import PeerCredentials

__all__ = ["Handover", "connect", "examine", "find_server"]

_ROUND_TRIP_SECONDS = 2.0
_PROBED_REGISTERS = PCI_NUM_BARS + 1
"""QEMU probes as many as there are regions, and so takes 0x28, the CardBus CIS pointer, for the last"""
_MIN_BAR = 16
_MAX_BAR = 1 << 30


class Handover(NamedTuple):
    """A connected link, and the function behind it, freshly reset."""

    client: Client
    vendor: int
    device: int
    remarks: tuple[str, ...]
    """what is different behind QEMU's proxy, and rarely matters"""
    defects: tuple[str, ...]
    """what doesn't work there"""


def connect(path: str) -> Client:
    """A link to a device's socket. Never blocks: with a deadline, connect(2) fails where the queue is full.

    Raises PeerGone when that is so, or nobody listens there.
    """
    return Client.connect(path, _ROUND_TRIP_SECONDS)


def examine(client: Client) -> Handover:
    """Resets the function at the other end and looks at it.

    Blocks for some 30 round trips, each with its own deadline; the client's shutdown() ends that at once.
    QEMU makes the socket that it gets a blocking one, and so this one: of the client only fileno(), peer,
    and what ends or closes it are of use then. Raises PeerGone when nobody answers, and ProtocolError for a
    function that QEMU's proxy can't stand for.
    """
    ids = _config_read(client, pci.PCI_VENDOR_ID, 4)
    if ids & 0xFFFF in (0, 0xFFFF):
        raise ProtocolError(f"no PCI function: vendor and device id {ids:#x}")
    pin = _config_read(client, pci.PCI_INTERRUPT_PIN, 1)
    if pin > 1:
        raise ProtocolError(f"interrupt pin {pin}: QEMU's x-pci-proxy-dev routes every function's as INTA")
    client.request(Command.DEVICE_RESET)
    masks = [_probe(client, number) for number in range(_PROBED_REGISTERS)]
    masks = masks[:PCI_NUM_BARS]
    return Handover(client, ids & 0xFFFF, ids >> 16, tuple(_remarks(masks)), tuple(_defects(masks)))


def find_server(path: str) -> PeerCredentials | None:
    """The process that serves a device's socket, if it is serving a client.

    None if it would take one, or nobody listens. Blocks for one round trip at most.
    """
    try:
        client = connect(path)
    except PeerGone:
        return None
    try:
        _config_read(client, pci.PCI_VENDOR_ID, 4)
    except (PeerGone, ProtocolError):
        return client.peer
    finally:
        client.close()
    return None


def _probe(client: Client, number: int) -> int:
    """The mask of one register, sized as QEMU does. Raises ProtocolError where that would abort it."""
    offset = pci.PCI_BASE_ADDRESS_0 + 4 * number
    before = _config_read(client, offset, 4)
    _config_write(client, offset, 0xFFFFFFFF)
    mask = _config_read(client, offset, 4)
    _config_write(client, offset, before)
    size = _size(mask & pci.PCI_BASE_ADDRESS_MEM_MASK)
    if size & (size - 1) or size > _MAX_BAR:
        raise ProtocolError(f"BAR {number} has the mask {mask:#x}: QEMU's x-pci-proxy-dev would abort")
    return mask


def _remarks(masks: Iterable[int]) -> Iterator[str]:
    """Of BARs that QEMU's proxy makes larger, or maps in part only."""
    for number, mask in _bars(masks):
        size = _size(mask & pci.PCI_BASE_ADDRESS_IO_MASK)
        if mask & pci.PCI_BASE_ADDRESS_SPACE_IO and size < _MIN_BAR:
            yield f"BAR {number} takes {_MIN_BAR} I/O ports instead of {size}"
        elif _is_64_bit(mask) and mask & pci.PCI_BASE_ADDRESS_MEM_MASK:
            yield f"BAR {number} works below 4 GiB only"


def _defects(masks: Iterable[int]) -> Iterator[str]:
    """Of 64-bit BARs whose lower half has no bit to be written: QEMU's proxy sees no BAR there."""
    for number, mask in _bars(masks):
        if _is_64_bit(mask) and not mask & pci.PCI_BASE_ADDRESS_MEM_MASK:
            yield f"BAR {number} works nowhere behind QEMU's proxy: it has 4 GiB or more"


def _bars(masks: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Numbers and masks of the BARs that a guest sees; QEMU takes the upper half of one for one more."""
    numbered = enumerate(masks)
    for number, mask in numbered:
        yield number, mask
        if _is_64_bit(mask):
            next(numbered, None)


def _is_64_bit(mask: int) -> bool:
    return (
        not mask & pci.PCI_BASE_ADDRESS_SPACE_IO
        and mask & pci.PCI_BASE_ADDRESS_MEM_TYPE_MASK == pci.PCI_BASE_ADDRESS_MEM_TYPE_64
    )


def _size(mask: int) -> int:
    return -mask & 0xFFFFFFFF


def _config_read(client: Client, offset: int, size: int) -> int:
    value = client.request(Command.PCI_CFGREAD, mpqemu.CONFIG.pack(offset, 0, size))
    return value & ((1 << 8 * size) - 1)


def _config_write(client: Client, offset: int, value: int) -> None:
    client.request(Command.PCI_CFGWRITE, mpqemu.CONFIG.pack(offset, value, 4))
