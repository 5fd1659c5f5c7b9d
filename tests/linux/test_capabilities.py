# SPDX-License-Identifier: GPL-2.0-or-later
"""Linux's PCI core on capabilities, resets and shared memory of a device over vfio-user."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.vfiouserguest import PORT, VfioUserGuest, serving

DEVICE = """\
from remoted.device import (
    Bar, BarKind, DeviceSerialNumber, ExtendedVendorSpecific, Msi, Msix, PciExpress, PciFunction, PowerManagement,
    VendorSpecific, register,
)

VENDOR = VendorSpecific(b"abc", writable=b"\\xff")

class Card(PciFunction):
    VENDOR_ID, DEVICE_ID = 0x1234, 0x0001
    BARS = {
        0: Bar(BarKind.MEM32, 0x8000, shared=((0x1000, 0x2000), (0x5000, 0x1000))),
        2: Bar(BarKind.MEM64, 0x100000, prefetchable=True, shared=True),
    }
    CAPABILITIES = (
        PowerManagement(), PciExpress(), VENDOR, DeviceSerialNumber(0x0123456789ABCDEF),
        ExtendedVendorSpecific(0xBEEF, b"xyz", revision=3),
    )
    MSI = Msi(4)
    MSIX = Msix(5)

    scratch: int = register(32)
    resets = 0

    def reset(self):
        self.resets += 1

    def bar_read(self, bar, offset, size):
        if offset == 0:
            return self.resets
        if offset == 8:
            return int.from_bytes(self.bar_memory(2)[0x10:0x14], "little")
        return self.scratch

    def bar_write(self, bar, offset, size, value):
        self.scratch = value
        self.bar_memory(0)[0x5000:0x5004] = value.to_bytes(4, "little")
"""
FUNCTION = "/sys/bus/pci/devices/0000:01:00.0"


@pytest.fixture(scope="module")
def guest(vfio_user_qemu: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VfioUserGuest]:
    directory = tmp_path_factory.mktemp("card")
    (directory / "card.py").write_text(DEVICE)
    with (
        serving(directory, f"{directory}/card.py:Card,id=card,addr=05.0"),
        VfioUserGuest(vfio_user_qemu, directory, {"card": PORT}) as guest,
    ):
        guest.run(f"cd {FUNCTION} && echo 1 > enable")
        yield guest


def config(guest: VfioUserGuest, start: int, count: int) -> bytes:
    return bytes.fromhex(
        guest.run(f"dd if=config bs=1 skip={start} count={count} 2>/dev/null | xxd -p -c 256")
    )


def peek(guest: VfioUserGuest, bar: int, offset: int) -> int:
    """32 bits of a BAR."""
    return int(guest.run(f"devmem {base(guest, bar) + offset:#x} 32"), 16)


def poke(guest: VfioUserGuest, bar: int, offset: int, value: int) -> None:
    guest.run(f"devmem {base(guest, bar) + offset:#x} 32 {value:#x}")


def base(guest: VfioUserGuest, bar: int) -> int:
    return int(guest.run("cat resource").splitlines()[bar].split()[0], 16)


def test_linux_finds_an_express_endpoint_without_a_complaint(guest: VfioUserGuest) -> None:
    assert guest.run("dmesg | grep -c '0000:01:00.0.*PCIe Endpoint'") == "1"
    assert guest.run("cat current_link_speed current_link_width").split() == ["2.5", "GT/s", "PCIe", "1"]
    assert guest.run("cat config | wc -c") == "4096"
    assert config(guest, 0x100, 12).hex() == "0300c110" + "efcdab8967452301"
    assert config(guest, 0x10C, 11).hex() == "0b000100" + "efbeb300" + b"xyz".hex()
    assert not guest.complaints("01:00.0", "pcieport")


def test_what_the_guest_writes_to_a_vendor_s_capability(guest: VfioUserGuest) -> None:
    at = 0x84
    assert config(guest, at, 6)[0] == 0x09
    guest.run(f"printf '\\xaa\\xbb' | dd of=config bs=1 seek={at + 3} 2>/dev/null")
    assert config(guest, at + 3, 3) == b"\xaabc"


@pytest.mark.parametrize("method", ["flr", "pm"])
def test_resets(guest: VfioUserGuest, method: str) -> None:
    """Linux saves and restores what a reset clears; it doesn't take a method that the function lacks."""
    poke(guest, 0, 4, 0x5A5A)
    poke(guest, 2, 0x20, 0xCAFE)
    resets = peek(guest, 0, 0)
    guest.run(f"echo {method} > reset_method && echo 1 > reset")
    assert peek(guest, 0, 0) == resets + 1
    assert peek(guest, 0, 4) == 0
    assert peek(guest, 2, 0x20) == 0xCAFE
    assert not guest.complaints("01:00.0")


def test_shared_memory_is_the_device_s(guest: VfioUserGuest) -> None:
    poke(guest, 2, 0x10, 0x12345678)
    assert peek(guest, 0, 8) == 0x12345678
    poke(guest, 0, 4, 0x4711)
    assert peek(guest, 0, 0x5000) == 0x4711
    for offset in (0x1000, 0x2FFC):
        poke(guest, 0, offset, offset)
        assert peek(guest, 0, offset) == offset
    assert peek(guest, 0, 0x3000) == peek(guest, 0, 0x6000) == 0x4711, "registers are between the areas"


def test_the_pending_bits_are_in_a_bar_of_their_own(guest: VfioUserGuest) -> None:
    assert peek(guest, 5, 5 * 16) == 0
