# SPDX-License-Identifier: GPL-2.0-or-later
"""What a device's class may not declare: each is one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from common.errors import UsageError
from common.loop import Loop
from remoted.declaration import check_attributes
from remoted.device import (
    Bar,
    BarKind,
    DeviceSerialNumber,
    ExtendedVendorSpecific,
    Host,
    Msi,
    Msix,
    Option,
    PciExpress,
    PciFunction,
    PowerManagement,
    VendorSpecific,
)
from remoted.memory import GuestMemory
from tests.support.remotebench import Recorder

MEM = Bar(BarKind.MEM32, 4096)
KIND: Any = "mem32"
SIZE: Any = "4096"
YES: Any = "yes"
TYPE: Any = list
NAME: Any = 5


def shared(areas: Any) -> Bar:
    return Bar(BarKind.MEM32, 0x4000, shared=areas)


def create(options: dict[str, str], log: Recorder | None = None, **attributes: Any) -> PciFunction:
    model = type("Thing", (PciFunction,), {"VENDOR_ID": 1, "DEVICE_ID": 2, **attributes})
    loop = Loop()
    loop.close()
    log = log or Recorder()
    function = model(Host("thing", loop, log.logger, GuestMemory(), lambda _: None), options)
    assert isinstance(function, PciFunction)
    return function


async def coroutine(*_: object) -> int:
    return 0


def bar_write(self: object, bar: int, offset: int, size: int, value: int) -> None:
    """Of another number of arguments than bar_read()."""


def restored(self: object) -> None:
    """As a device's."""


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"VENDOR_ID": True}, "VENDOR_ID True is not a number of 16 bits"),
    ({"VENDOR_ID": 1.0}, "VENDOR_ID 1.0 is not a number of 16 bits"),
    ({"VENDOR_ID": -1}, "VENDOR_ID -1 is not a number of 16 bits"),
    ({"CLASS_CODE": 1 << 24}, "CLASS_CODE 16777216 is not a number of 24 bits"),
    ({"SUBSYSTEM_ID": b"1"}, "SUBSYSTEM_ID b'1' is not a number of 16 bits"),
    ({"REVISION": None}, "its class has no REVISION"),
    ({"INTERRUPT_PIN": True}, "INTERRUPT_PIN True is not 0 to 4"),
    ({"INTERRUPT_PIN": "A"}, "INTERRUPT_PIN 'A' is not 0 to 4"),
    ({"INTERRUPT_PIN": 1.0}, "INTERRUPT_PIN 1.0 is not 0 to 4"),
    ({"IS_DRIVABLE": 1}, "IS_DRIVABLE 1 is neither True nor False"),
    ({"BARS": [MEM]}, "BARS [Bar("),
    ({"BARS": 4096}, "BARS 4096 is not a dict of BAR number to Bar"),
    ({"BARS": {0: 4096}}, "BAR 0: 4096 is not a Bar(KIND, SIZE)"),
    ({"BARS": {0: (BarKind.IO, 16)}}, "BAR 0: (<BarKind.IO: 'io'>, 16) is not a Bar(KIND, SIZE)"),
    ({"BARS": {"0": MEM}}, "BARS: '0' is not a BAR number"),
    ({"BARS": {True: MEM}}, "BARS: True is not a BAR number"),
    ({"BARS": {-1: MEM}}, "BAR -1 has no room among the 6 BARs"),
    ({"BARS": {0: Bar(KIND, 4096)}}, "BAR 0: the kind 'mem32' is not a BarKind"),
    ({"BARS": {0: Bar(BarKind.IO, SIZE)}}, "BAR 0: a size of '4096' is not a power of two from 4 to 0x10000"),
    ({"BARS": {0: Bar(BarKind.IO, 0)}}, "BAR 0: a size of 0 is not a power of two"),
    ({"BARS": {0: Bar(BarKind.MEM32, -4096)}}, "BAR 0: a size of -4096 is not a power of two"),
    ({"BARS": {0: Bar(BarKind.MEM32, 4096, YES)}}, "BAR 0: prefetchable 'yes' is neither True nor False"),
    ({"BARS": {0: Bar(BarKind.IO, 4096, shared=True)}}, "BAR 0: an I/O BAR can't be shared memory"),
    ({"BARS": {0: shared(1)}}, "BAR 0: shared 1 is neither a bool nor a tuple of (OFFSET, SIZE)"),
    ({"BARS": {0: shared([(0, 4096)])}}, "BAR 0: shared [(0, 4096)] is neither a bool nor"),
    ({"BARS": {0: shared((0, 4096))}}, "BAR 0: shared (0, 4096) is neither a bool nor"),
    ({"BARS": {0: shared(((0, True),))}}, "BAR 0: shared ((0, True),) is neither a bool nor"),
    ({"BARS": {0: shared(((0, 0),))}}, "BAR 0: the shared area (0x0, 0x0) is not whole pages of 4096 bytes"),
    (
        {"BARS": {0: shared(((2048, 4096),))}},
        "BAR 0: the shared area (0x800, 0x1000) is not whole pages of 4096",
    ),
    ({"BARS": {0: shared(((-4096, 4096),))}}, "BAR 0: the shared area (-0x1000, 0x1000) is not whole pages"),
    (
        {"BARS": {0: shared(((0x2000, 0x2000), (0x1000, 0x2000)))}},
        "BAR 0: the shared area (0x2000, 0x2000) overlaps another one",
    ),
    (
        {"BARS": {0: shared(((0x3000, 0x2000),))}},
        "BAR 0: the shared area (0x3000, 0x2000) ends behind the BAR",
    ),
    (
        {"BARS": {0: Bar(BarKind.MEM64, 1 << 62, shared=True)}},
        "BAR 0: no shared memory of 0x4000000000000000 bytes: ",
    ),
    ({"MSI": 1}, "MSI 1 is not Msi(...) or None"),
    ({"MSIX": Msi()}, "MSIX Msi(maskable=True, vectors=1) is not Msix(...) or None"),
    ({"MSI": Msi(3)}, "MSI: 3 vectors are not 1, 2, 4, 8, 16 or 32"),
    ({"MSI": Msi(64)}, "MSI: 64 vectors are not 1, 2, 4, 8, 16 or 32"),
    ({"MSI": Msi(SIZE)}, "MSI: '4096' vectors are not 1, 2, 4, 8, 16 or 32"),
    ({"MSI": Msi(1, YES)}, "MSI: maskable 'yes' is neither True nor False"),
    ({"MSIX": Msix(0)}, "MSIX: 0 vectors are not 1 to 2048"),
    ({"MSIX": Msix(2049)}, "MSIX: 2049 vectors are not 1 to 2048"),
    ({"MSIX": Msix(True)}, "MSIX: True vectors are not 1 to 2048"),
    ({"MSIX": Msix(4, pba=0x800)}, "MSIX: table and pba are offsets in a BAR of the class, which bar= names"),
    ({"MSIX": Msix(4, bar=1)}, "MSIX: bar 1 is not a memory BAR of the class"),
    ({"MSIX": Msix(4, bar=True), "BARS": {1: MEM}}, "MSIX: bar True is not a memory BAR of the class"),
    ({"MSIX": Msix(4, bar=0), "BARS": {0: Bar(BarKind.IO, 4096)}}, "MSIX: bar 0 is not a memory BAR"),
    ({"MSIX": Msix(4, bar=0, table=4), "BARS": {0: MEM}}, "MSIX: table 4 is not an offset that 8 divides"),
    ({"MSIX": Msix(4, bar=0, pba=-8), "BARS": {0: MEM}}, "MSIX: pba -8 is not an offset that 8 divides"),
    (
        {"MSIX": Msix(4, bar=0, table=16, pba=72), "BARS": {0: MEM}},
        "MSIX: table and pba overlap at 0x48 of BAR 0",
    ),
    (
        {"MSIX": Msix(4, bar=0, table=4040), "BARS": {0: MEM}},
        "MSIX: table and pba end at 0x1010, behind the end of",
    ),
    (
        {"MSIX": Msix(4, bar=0, pba=0x1000), "BARS": {0: shared(((0x1000, 0x1000),))}},
        "MSIX: table or pba overlap the shared memory at 0x1000 of BAR 0",
    ),
    ({"CAPABILITIES": PciExpress()}, "CAPABILITIES PciExpress() is not a tuple of capabilities"),
    ({"CAPABILITIES": b"123"}, "CAPABILITIES b'123' is not a tuple of capabilities"),
    ({"CAPABILITIES": (b"123",)}, "CAPABILITIES: b'123' is not a capability such as PciExpress()"),
    ({"CAPABILITIES": (PciExpress,)}, "CAPABILITIES: <class 'remoted.capabilities.PciExpress'> is not a"),
    ({"CAPABILITIES": (Msix(4),)}, "CAPABILITIES: Msix is declared as MSIX = ..."),
    (
        {"CAPABILITIES": (PowerManagement(), PowerManagement(True))},
        "CAPABILITIES: PowerManagement is declared",
    ),
    (
        {"CAPABILITIES": (PowerManagement(YES),)},
        "CAPABILITIES: no_soft_reset 'yes' is neither True nor False",
    ),
    ({"CAPABILITIES": (DeviceSerialNumber(1),)}, "CAPABILITIES: DeviceSerialNumber needs PciExpress()"),
    (
        {"CAPABILITIES": (PciExpress(), DeviceSerialNumber(1 << 64))},
        "CAPABILITIES: the serial number 184467440",
    ),
    (
        {"CAPABILITIES": (VendorSpecific(KIND),)},
        "CAPABILITIES: content 'mem32' of VendorSpecific is not bytes",
    ),
    ({"CAPABILITIES": (VendorSpecific(bytes(253)),)}, "CAPABILITIES: VendorSpecific holds at most 252 bytes"),
    (
        {"CAPABILITIES": (VendorSpecific(b"", b"1"),)},
        "CAPABILITIES: writable of VendorSpecific is longer than",
    ),
    (
        {"CAPABILITIES": (ExtendedVendorSpecific(1 << 16, b""),)},
        "CAPABILITIES: vsec_id 65536 is not a number",
    ),
    (
        {"CAPABILITIES": (ExtendedVendorSpecific(1, b"", 16),)},
        "CAPABILITIES: revision 16 is not a number",
    ),
    ({"NEEDS_MESSAGES": 1, "MSI": Msi()}, "NEEDS_MESSAGES 1 is neither True nor False"),
    ({"NEEDS_MESSAGES": True}, "NEEDS_MESSAGES is True, but the class declares neither MSI nor MSIX"),
    ({"raise_irq": None}, "Thing defines raise_irq, which a device must not redefine"),
    ({"REGISTERS": {0x8: "STATUS"}}, "REGISTERS: there is no BAR 8"),
    ({"REGISTERS": ["STATUS"]}, "REGISTERS ['STATUS'] is not a dict of BAR number to names"),
    ({"BARS": {0: MEM}, "REGISTERS": {0: "STATUS"}}, "REGISTERS of BAR 0: 'STATUS' is not a dict of"),
    ({"BARS": {0: MEM}, "REGISTERS": {0: {"8": "A"}}}, "REGISTERS: '8' is not an offset in BAR 0"),
    ({"BARS": {0: MEM}, "REGISTERS": {0: {4096: "A"}}}, "REGISTERS: 4096 is not an offset in BAR 0"),
    ({"BARS": {0: MEM}, "REGISTERS": {0: {8: 9}}}, "REGISTERS of BAR 0 at 0x8: 9 is not a str"),
    ({"PROPERTIES": "key"}, "PROPERTIES: options are declared as OPTIONS = (Option(NAME, ...), ...)"),
    ({"OPTIONS": "key"}, "OPTIONS 'key' is not a tuple of Options"),
    ({"OPTIONS": {"key"}}, "OPTIONS {'key'} is not a tuple of Options"),
    ({"OPTIONS": ("key",)}, "OPTIONS: 'key' is not an Option(NAME, ...)"),
    ({"OPTIONS": (Option(NAME),)}, "OPTIONS: 5 is not a name"),
    ({"OPTIONS": (Option("a b"),)}, "OPTIONS: 'a b' is not a name"),
    ({"OPTIONS": (Option("addr"),)}, "option addr: every device has one of this name"),
    ({"OPTIONS": (Option("a"), Option("a"))}, "option a is declared twice"),
    ({"OPTIONS": (Option("a", TYPE),)}, "option a: the type <class 'list'> is not str, int, float or bool"),
    ({"OPTIONS": (Option("a", int, "5"),)}, "option a: the default '5' is not of type int"),
    ({"OPTIONS": (Option("a", int, True),)}, "option a: the default True is not of type int"),
    ({"OPTIONS": (Option("a", help=NAME),)}, "option a: the help 5 is not a str"),
    ({"OPTIONS": (Option("a", choices="xy"),)}, "option a: choices 'xy' is not a tuple"),
    ({"OPTIONS": (Option("a", int, choices=("1",)),)}, "option a: the choice '1' is not of type int"),
    ({"OPTIONS": (Option("a", str, minimum=1),)}, "option a: the bound 1 does not fit the type str"),
    ({"OPTIONS": (Option("a", int, maximum=KIND),)}, "option a: the bound 'mem32' does not fit the type int"),
    ({"PARTS": "_uart"}, "PARTS '_uart' is not a tuple of attribute names"),
    ({"PARTS": (5,)}, "PARTS (5,) is not a tuple of attribute names"),
    ({"reset": 5}, "reset is 5, not a method"),
    ({"bar_read": None}, "bar_read is None, not a method"),
    ({"bar_write": coroutine}, "bar_write() is a coroutine or generator"),
    ({"bus_read": coroutine}, "Thing defines bus_read, which a device must not redefine"),
    ({"host": None}, "Thing defines host, which a device must not redefine"),
]


@pytest.mark.parametrize(("attributes", "complaint"), REFUSED, ids=[each[1] for each in REFUSED])
def test_impossible_declaration(attributes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError) as refusal:
        create({}, **attributes)
    assert str(refusal.value).startswith(complaint)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_value_of_any_length_is_cut() -> None:
    with pytest.raises(UsageError) as refusal:
        create({}, BARS=list(range(10000)))
    assert len(str(refusal.value)) < 200


OPTIONS = (
    Option("text"),
    Option("number", int, 5, minimum=-2, maximum=0x20),
    Option("ratio", float, 0.5, minimum=0),
    Option("switch", bool, False),
    Option("mode", str, "a", choices=("a", "b")),
)


def test_defaults() -> None:
    values = create({}, OPTIONS=OPTIONS).options
    assert values == {"text": None, "number": 5, "ratio": 0.5, "switch": False, "mode": "a"}


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("text", "", ""),
        ("text", "a,b=c", "a,b=c"),
        ("number", "-2", -2),
        ("number", "0x1f", 31),
        ("number", "-0x1", -1),
        ("number", "0", 0),
        ("number", "32", 32),
        ("ratio", "2", 2.0),
        ("ratio", "2.5e-1", 0.25),
        ("switch", "on", True),
        ("switch", "off", False),
        ("mode", "b", "b"),
    ],
)
def test_value(key: str, text: str, value: object) -> None:
    found = create({key: text}, OPTIONS=OPTIONS).options[key]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("key", "text", "complaint"),
    [
        ("number", "-3", "number=-3: must be at least -2"),
        ("number", "33", "number=33: must be at most 32"),
        ("number", "1.5", "number=1.5: must be a whole number, decimal or 0x hexadecimal"),
        ("number", "010", "number=010: must be a whole number"),
        ("number", "\N{ARABIC-INDIC DIGIT ONE}", "number="),
        ("number", "9" * 5000, "number="),
        ("ratio", "nan", "ratio=nan: must be a number"),
        ("ratio", "inf", "ratio=inf: must be a number"),
        ("ratio", "-1", "ratio=-1: must be at least 0"),
        ("switch", "true", "switch=true: must be on or off"),
        ("switch", "ON", "switch=ON: must be on or off"),
        ("mode", "c", "mode=c: must be a or b"),
        ("Text", "x", "no option 'Text': is text meant?"),
        ("nmuber", "1", "no option 'nmuber': is number meant?"),
        ("address", "05.0", "no option 'address': is addr meant?"),
        ("sokcet", "x", "no option 'sokcet': is socket meant?"),
        ("colour", "red", "no option 'colour': the model has mode, number, ratio, switch, text"),
    ],
)
def test_bad_value(key: str, text: str, complaint: str) -> None:
    with pytest.raises(UsageError) as refusal:
        create({key: text}, OPTIONS=OPTIONS)
    assert str(refusal.value).startswith(complaint)


def test_a_model_without_options_says_so() -> None:
    with pytest.raises(UsageError, match=r"^no option 'colour': the model has none$"):
        create({"colour": "red"})


@pytest.mark.parametrize(
    ("attributes", "warnings"),
    [
        ({"MSIX_": Msix(4)}, ["its class sets MSIX_, which iohub does not know: MSIX may be meant"]),
        ({"BAR": {0: MEM}}, ["its class sets BAR, which iohub does not know: BARS may be meant"]),
        ({"BAR": 0, "BARS": {0: MEM}}, []),
        (
            {"CAPABILITY": ()},
            ["its class sets CAPABILITY, which iohub does not know: CAPABILITIES may be meant"],
        ),
        (
            {"MSIS": 1, "INTERUPT_PIN": 1},
            [
                "its class sets INTERUPT_PIN, which iohub does not know: INTERRUPT_PIN may be meant",
                "its class sets MSIS, which iohub does not know: MSI may be meant",
            ],
        ),
        (
            {"bar_wirte": bar_write, "bar_raed": bar_write, "restore": restored, "BAR": 1, "BARS": {}},
            [
                "its class sets bar_wirte, which iohub does not know: bar_write may be meant",
                "its class sets restore, which iohub does not know: restored may be meant",
            ],
        ),
        ({"resets": 0, "closed": property(restored), "preset": bar_write, "_restore": restored}, []),
        ({"restore": restored, "restored": restored}, []),
        ({"_BAR": 1, "bars_": 1, "VERSION": 2, "STATUS": 0x20, "Bars": 1}, []),
    ],
)
def test_an_attribute_that_may_be_misspelt_is_told(attributes: dict[str, Any], warnings: list[str]) -> None:
    log = Recorder()
    create({}, log, **attributes)
    assert log.messages == warnings


def test_an_attribute_that_hides_a_method_of_the_daemon() -> None:
    class Hiding(PciFunction):
        VENDOR_ID, DEVICE_ID = 1, 2

        def __init__(self, host: Host, options: Mapping[str, str]) -> None:
            super().__init__(host, options)
            self.vectors: Any = 5

    loop = Loop()
    loop.close()
    function = Hiding(Host("thing", loop, Recorder().logger, GuestMemory(), lambda _: None), {})
    with pytest.raises(UsageError, match=r"its __init__\(\) sets vectors, which a device must not redefine"):
        check_attributes(function)
