# SPDX-License-Identifier: GPL-2.0-or-later
"""What a remote may say that it is."""

from __future__ import annotations

import pytest

from common import pci
from common.errors import ProtocolError
from common.mpqemu import CONFIG, Command
from proxyd.pci.remoteconfig import identify


class Remote:
    """A function without BARs, whose config space keeps what it has."""

    def __init__(self, vendor: int, device: int, pin: int) -> None:
        self.config = bytearray(pci.PCI_CONFIG_SIZE)
        self.config[0:4] = (device << 16 | vendor).to_bytes(4, "little")
        self.config[pci.PCI_CLASS_PROG : pci.PCI_CLASS_PROG + 3] = b"\x02\x00\x07"
        self.config[pci.PCI_INTERRUPT_PIN] = pin

    def request(self, command: Command, payload: bytes) -> int:
        offset, _, size = CONFIG.unpack(payload)
        is_read = command == Command.PCI_CFGREAD
        return int.from_bytes(self.config[offset : offset + size], "little") if is_read else 0


@pytest.mark.parametrize("pin", range(5))
def test_a_function_is_what_its_config_space_says(pin: int) -> None:
    identity = identify(Remote(0x1234, 0x11E8, pin).request)
    assert identity == (0x1234, 0x11E8, 0x070002, pin, ())


@pytest.mark.parametrize("vendor", [0, 0xFFFF])
def test_what_has_no_vendor_is_no_function(vendor: int) -> None:
    with pytest.raises(ProtocolError, match="no PCI function: vendor and device id 0x11e8"):
        identify(Remote(vendor, 0x11E8, 1).request)


@pytest.mark.parametrize("pin", [5, 0xFF])
def test_an_impossible_interrupt_pin_is_refused(pin: int) -> None:
    with pytest.raises(ProtocolError, match=f"invalid interrupt pin {pin}"):
        identify(Remote(0x1234, 0x11E8, pin).request)
