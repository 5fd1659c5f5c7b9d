# SPDX-License-Identifier: GPL-2.0-or-later
"""Checks what a device's class declares: one sentence for what is wrong, before the device is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from common import pci
from common.errors import UsageError
from common.options import COMMON_KEYS, is_key
from common.pci import Bar, BarKind
from remoted.capabilities import Capability, PciExpress
from remoted.msi import Msi, Msix
from remoted.options import Option

__all__ = ["check_attributes", "check_declaration", "check_options", "misspelt_attributes"]

_BAR_SIZES = {BarKind.IO: (4, 1 << 16), BarKind.MEM32: (16, 1 << 31), BarKind.MEM64: (16, 1 << 63)}
"""the smallest and the largest; a PC has 16 bits of I/O addresses"""
_PAGE = 4096
"""what a client can map: the page of x86-64"""
_MAX_AREAS = 32
_RESEMBLES = 0.8
"""from this ratio of difflib on, two names resemble one another"""
_NUMBERS = (
    ("VENDOR_ID", 16),
    ("DEVICE_ID", 16),
    ("REVISION", 8),
    ("CLASS_CODE", 24),
    ("SUBSYSTEM_VENDOR_ID", 16),
    ("SUBSYSTEM_ID", 16),
)
"""class attributes that config space shows, and their bits"""
_NOT_CALLED = 0x20 | 0x80 | 0x200
"""flags of generators, coroutines and asynchronous generators (CO_GENERATOR etc. in Python's Include/code.h)"""
_METHODS = ("reset", "bar_read", "bar_write", "config_read", "config_write", "set_intx", "restored", "close")
"""what a class may override"""
_RESERVED = (
    "host",
    "amiss",
    "errors",
    "last_error",
    "last_place",
    "stall",
    "intx_level",
    "is_decoded",
    "is_bus_master",
    "is_initialised",
    "keeps_registers",
    "state",
    "resume",
    "go_on",
    "call_every",
    "drive_intx",
    "full_reset",
    "shut_down",
    "is_multifunction",
    "set_multifunction",
    "raise_irq",
    "lower_irq",
    "vectors",
    "shared_memory",
    "capability_offset",
    "bar_memory",
    "release_pending",
    "bars",
    "config_size",
    "config_written",
    "decode_bars",
    "region_read",
    "region_write",
    "bus_config_read",
    "bus_config_write",
    "bus_read",
    "bus_write",
    "__getattribute__",
    "__setattr__",
)
"""what the daemon relies on, and no class may override"""


def check_declaration(function: object, base: type) -> None:
    """Raises UsageError unless the attributes describe a possible function.

    ``base`` is the class that all devices are derived from.
    """
    model = type(function)
    for each in model.__mro__[: model.__mro__.index(base)]:
        for name in _RESERVED:
            if name in vars(each):
                raise UsageError(f"{each.__name__} defines {name}, which a device must not redefine")
    if hasattr(function, "PROPERTIES"):
        raise UsageError("PROPERTIES: options are declared as OPTIONS = (Option(NAME, ...), ...)")
    for name in _METHODS:
        method = getattr(function, name)
        if not callable(method):
            raise UsageError(f"{name} is {_shown(method)}, not a method")
        if getattr(getattr(method, "__code__", None), "co_flags", 0) & _NOT_CALLED:
            raise UsageError(f"{name}() is a coroutine or generator, which the daemon would not run")
    for name, bits in _NUMBERS:
        value = getattr(function, name, None)
        if value is None:
            raise UsageError(f"its class has no {name}")
        if not _is_int(value) or value >> bits:
            raise UsageError(f"{name} {_shown(value)} is not a number of {bits} bits")
    pin = getattr(function, "INTERRUPT_PIN", None)
    if not _is_int(pin) or pin not in range(5):
        raise UsageError(f"INTERRUPT_PIN {_shown(pin)} is not 0 to 4")
    if type(is_drivable := getattr(function, "IS_DRIVABLE", None)) is not bool:
        raise UsageError(f"IS_DRIVABLE {_shown(is_drivable)} is neither True nor False")
    parts: Any = getattr(function, "PARTS", None)
    if not isinstance(parts, tuple) or not all(isinstance(part, str) for part in parts):
        raise UsageError(f"PARTS {_shown(parts)} is not a tuple of attribute names")
    bars: Any = getattr(function, "BARS", None)
    _check_bars(bars)
    _check_messages(function)
    _check_capabilities(getattr(function, "CAPABILITIES", None))
    _check_registers(getattr(function, "REGISTERS", None), bars)
    check_options(getattr(function, "OPTIONS", None))


def misspelt_attributes(model: type, base: type) -> list[str]:
    """A sentence for each attribute whose name resembles one that the daemon reads and the class doesn't set.

    It is no error: it may be of the device's own. Names that begin with an underscore always are, and methods that
    take another number of arguments.
    """
    own: dict[str, object] = {}
    for each in model.__mro__[: model.__mro__.index(base)]:
        own |= vars(each)
    known = {name: None for name in (*vars(base), *base.__annotations__) if name.isupper() and name[0] != "_"}
    pairs = {name: known.keys() - own.keys() for name in own if name.isupper() and name not in known}
    for name, value in own.items():
        if name not in _METHODS and (count := _argument_count(value)):
            pairs[name] = {
                each for each in _METHODS if each not in own and _argument_count(getattr(base, each)) == count
            }
    pairs = {name: others for name, others in pairs.items() if others and name[0] != "_"}
    if not pairs:
        return []
    from difflib import get_close_matches

    return [
        f"its class sets {name}, which iohub does not know: {other} may be meant"
        for name, others in sorted(pairs.items())
        for other in get_close_matches(name, others, n=1, cutoff=_RESEMBLES)
    ]


def _argument_count(value: object) -> int:
    """Of a method; 0 for anything else."""
    return getattr(getattr(value, "__code__", None), "co_argcount", 0)


def check_attributes(function: object) -> None:
    """Raises UsageError if an object's own attributes hide methods that the daemon calls."""
    for name in _RESERVED:
        if name in vars(function):
            raise UsageError(f"its __init__() sets {name}, which a device must not redefine")


def _check_bars(bars: Any) -> None:
    if not isinstance(bars, Mapping):
        raise UsageError(f"BARS {_shown(bars)} is not a dict of BAR number to Bar")
    taken: set[int] = set()
    for number, bar in bars.items():
        if not _is_int(number):
            raise UsageError(f"BARS: {_shown(number)} is not a BAR number")
        if not isinstance(bar, Bar):
            raise UsageError(f"BAR {number}: {_shown(bar)} is not a Bar(KIND, SIZE)")
        if not isinstance(bar.kind, BarKind):
            raise UsageError(f"BAR {number}: the kind {_shown(bar.kind)} is not a BarKind")
        smallest, largest = _BAR_SIZES[bar.kind]
        if not _is_int(bar.size) or not smallest <= bar.size <= largest or bar.size & bar.size - 1:
            raise UsageError(
                f"BAR {number}: a size of {_shown(bar.size)} is not a power of two from {smallest} to {largest:#x}"
            )
        if type(bar.prefetchable) is not bool:
            raise UsageError(
                f"BAR {number}: prefetchable {_shown(bar.prefetchable)} is neither True nor False"
            )
        _check_shared(number, bar)
        occupied = {number, number + 1} if bar.kind is BarKind.MEM64 else {number}
        if occupied & taken or not occupied <= set(range(pci.PCI_NUM_BARS)):
            raise UsageError(f"BAR {number} has no room among the {pci.PCI_NUM_BARS} BARs")
        taken |= occupied


def _check_shared(number: int, bar: Bar) -> None:
    shared: Any = bar.shared
    if type(shared) is bool:
        shared = ((0, bar.size),) if shared else ()
    if not isinstance(shared, tuple) or not all(
        isinstance(area, tuple) and len(area) == 2 and all(map(_is_int, area)) for area in shared
    ):
        raise UsageError(
            f"BAR {number}: shared {_shown(shared)} is neither a bool nor a tuple of (OFFSET, SIZE)"
        )
    if shared and bar.kind is BarKind.IO:
        raise UsageError(f"BAR {number}: an I/O BAR can't be shared memory")
    if len(shared) > _MAX_AREAS:
        raise UsageError(f"BAR {number}: {len(shared)} areas of shared memory are more than {_MAX_AREAS}")
    end = 0
    for offset, size in sorted(shared):
        where = f"BAR {number}: the shared area ({offset:#x}, {size:#x})"
        if offset < 0 or size <= 0 or offset % _PAGE or size % _PAGE:
            raise UsageError(f"{where} is not whole pages of {_PAGE} bytes")
        if offset < end:
            raise UsageError(f"{where} overlaps another one")
        end = offset + size
        if end > bar.size:
            raise UsageError(f"{where} ends behind the BAR")


def _check_messages(function: object) -> None:
    declared = 0
    for name, kind in (("MSI", Msi), ("MSIX", Msix)):
        value = getattr(function, name, None)
        if isinstance(value, kind):
            value.check()
            declared += 1
        elif value is not None:
            raise UsageError(f"{name} {_shown(value)} is not {kind.__name__}(...) or None")
    if type(needs := getattr(function, "NEEDS_MESSAGES", None)) is not bool:
        raise UsageError(f"NEEDS_MESSAGES {_shown(needs)} is neither True nor False")
    if needs and not declared:
        raise UsageError("NEEDS_MESSAGES is True, but the class declares neither MSI nor MSIX")


def _check_capabilities(capabilities: Any) -> None:
    if not isinstance(capabilities, Sequence) or isinstance(capabilities, str | bytes):
        raise UsageError(f"CAPABILITIES {_shown(capabilities)} is not a tuple of capabilities")
    kinds: list[type] = []
    for each in capabilities:
        kind = type(each)
        if isinstance(each, Msi | Msix):
            raise UsageError(f"CAPABILITIES: {kind.__name__} is declared as {kind.__name__.upper()} = ...")
        if not isinstance(each, Capability):
            raise UsageError(f"CAPABILITIES: {_shown(each)} is not a capability such as PciExpress()")
        if each.IS_UNIQUE and kind in kinds:
            raise UsageError(f"CAPABILITIES: {kind.__name__} is declared twice")
        each.check()
        kinds.append(kind)
    for each in capabilities:
        if each.IS_EXTENDED and PciExpress not in kinds:
            raise UsageError(f"CAPABILITIES: {type(each).__name__} needs PciExpress()")


def _check_registers(registers: Any, bars: Mapping[int, Bar]) -> None:
    if not isinstance(registers, Mapping):
        raise UsageError(f"REGISTERS {_shown(registers)} is not a dict of BAR number to names")
    for number, names in registers.items():
        if not _is_int(number) or number not in bars:
            raise UsageError(f"REGISTERS: there is no BAR {_shown(number)}")
        if not isinstance(names, Mapping):
            raise UsageError(f"REGISTERS of BAR {number}: {_shown(names)} is not a dict of offset to name")
        for offset, name in names.items():
            if not _is_int(offset) or not 0 <= offset < bars[number].size:
                raise UsageError(f"REGISTERS: {_shown(offset)} is not an offset in BAR {number}")
            if not isinstance(name, str):
                raise UsageError(f"REGISTERS of BAR {number} at {offset:#x}: {_shown(name)} is not a str")


def check_options(options: Any) -> None:
    """Raises UsageError unless it is a sequence of Options that can be given."""
    if not isinstance(options, Sequence) or isinstance(options, str | bytes):
        raise UsageError(
            f"OPTIONS {_shown(options)} is not a tuple of Options: OPTIONS = (Option(NAME, ...),)"
        )
    names: set[str] = set()
    for option in options:
        if not isinstance(option, Option):
            raise UsageError(f"OPTIONS: {_shown(option)} is not an Option(NAME, ...)")
        if not isinstance(option.name, str) or not is_key(option.name):
            raise UsageError(f"OPTIONS: {_shown(option.name)} is not a name: letters, digits, '-' and '_'")
        where = f"option {option.name}"
        if option.name in COMMON_KEYS:
            raise UsageError(f"{where}: every device has one of this name")
        if option.name in names:
            raise UsageError(f"{where} is declared twice")
        names.add(option.name)
        if option.type not in (str, int, float, bool):
            raise UsageError(f"{where}: the type {_shown(option.type)} is not str, int, float or bool")
        if not isinstance(option.help, str):
            raise UsageError(f"{where}: the help {_shown(option.help)} is not a str")
        _check_values(option, where)


def _check_values(option: Option, where: str) -> None:
    wanted = option.type.__name__
    if option.default is not None and type(option.default) is not option.type:
        raise UsageError(f"{where}: the default {_shown(option.default)} is not of type {wanted}")
    if not isinstance(option.choices, Sequence) or isinstance(option.choices, str | bytes):
        raise UsageError(f"{where}: choices {_shown(option.choices)} is not a tuple")
    for choice in option.choices:
        if type(choice) is not option.type:
            raise UsageError(f"{where}: the choice {_shown(choice)} is not of type {wanted}")
    for bound in (option.minimum, option.maximum):
        if bound is None:
            continue
        if option.type not in (int, float) or type(bound) not in (int, float):
            raise UsageError(f"{where}: the bound {_shown(bound)} does not fit the type {wanted}")


def _is_int(value: object) -> bool:
    """A bool is not taken for a number."""
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: object) -> str:
    """A value, cut to what fits into a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
