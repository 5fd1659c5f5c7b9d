# SPDX-License-Identifier: GPL-2.0-or-later
"""What a device's author gets wrong: it costs the request, is logged once, and disturbs no other device.

The devices are in a package that PYTHONPATH leads to.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from textwrap import dedent, indent
from typing import Self

import pytest

from common import mpqemu, pci
from common.ctl.children import Child
from common.link import Client
from common.mpqemu import ERROR, Command
from tests.support.asleep import settled_log

DEADLINE = 20.0
BASE = 0xFEB00000
TIMES = 20

HEAD = """\
from remoted.device import Bar, BarKind, PciFunction


"""
PARTS = '''\
import os
import sys
from remoted.device import Bar, BarKind, PciFunction


class Scratch(PciFunction):
    """Four bytes at 0 to write and read. It does nothing wrong."""

    VENDOR_ID, DEVICE_ID = 0xACE0, 0x0001
    BARS = {0: Bar(BarKind.MEM32, 4096)}

    def reset(self):
        self.value = 0

    def bar_read(self, bar, offset, size):
        return self.value

    def bar_write(self, bar, offset, size, value):
        self.value = value


class Faulty(Scratch):
    """Fails at nearly every register, and in each handler."""

    DEVICE_ID = 0x0002
    REGISTERS = {0: {0x8: "STATUS", 0xC: "CONTROL"}}

    def __init__(self, host, options):
        super().__init__(host, options)
        self.events = 0
        self.eventfd = os.eventfd(0)
        host.loop.add(self.eventfd, self.on_event)

    def bar_read(self, bar, offset, size):
        if offset == 0x24:
            return self.events
        if offset == 0x14:
            sys.exit("unwell")
        if offset:
            return self.registers[offset]
        return super().bar_read(bar, offset, size)

    def bar_write(self, bar, offset, size, value):
        if offset == 0x20:
            self.host.loop.call_later(0, self.on_time)
        elif offset == 0x14:
            sys.exit("unwell")
        elif offset == 0x24:
            os.eventfd_write(self.eventfd, 1)
        elif offset:
            raise KeyError(offset)
        else:
            super().bar_write(bar, offset, size, value)

    def on_time(self):
        raise ZeroDivisionError

    def on_event(self, _events):
        self.events += 1
        raise ZeroDivisionError

    def close(self):
        sys.exit("unwell")


class FaultyReset(Scratch):
    """Never gets as far as to have a value."""

    DEVICE_ID = 0x0003

    def reset(self):
        sys.exit("out of order")
'''


class Function:
    """One device as its client sees it, with its BAR placed. Context manager: closes the link."""

    def __init__(self, directory: Path, device: str) -> None:
        self.client = Client.connect(str(directory / f"{device}.sock"), DEADLINE)
        self.place()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def place(self) -> None:
        for addr, value in ((pci.PCI_BASE_ADDRESS_0, BASE), (pci.PCI_COMMAND, pci.PCI_COMMAND_MEMORY)):
            self.client.request(Command.PCI_CFGWRITE, mpqemu.CONFIG.pack(addr, value, 4))

    def identity(self) -> int:
        return self.client.request(Command.PCI_CFGREAD, mpqemu.CONFIG.pack(0, 0, 4))

    def read(self, offset: int) -> int:
        return self.client.request(Command.BAR_READ, mpqemu.BAR.pack(BASE + offset, 0, 4, True))

    def write(self, offset: int, value: int = 0) -> int:
        return self.client.request(Command.BAR_WRITE, mpqemu.BAR.pack(BASE + offset, value, 4, True))

    def reset(self) -> int:
        return self.client.request(Command.DEVICE_RESET)

    def check_works(self, value: int) -> None:
        """Writes a register and reads it back."""
        assert self.write(0, value) == 0
        assert self.read(0) == value


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Lays out the module acme.parts with this text, where the daemon looks for modules; the run directory."""

    def lay_out(text: str) -> Path:
        package = tmp_path / "lib" / "acme"
        package.mkdir(parents=True)
        (package / "parts.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(package.parent))
        run = tmp_path / "run"
        run.mkdir()
        return run

    return lay_out


def arguments(directory: Path, *devices: str) -> list[str]:
    return ["--name=vm", f"--runtime-dir={directory}", *(f"--device={device}" for device in devices)]


def refused(directory: Path, *devices: str, options: Sequence[str] = ()) -> list[str]:
    """The lines of a daemon that must not start; there is nothing left of it."""
    result = subprocess.run(
        [sys.executable, "-m", "remoted", *options, *arguments(directory, *devices)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert not list(directory.iterdir())
    return result.stderr.splitlines()


@pytest.fixture
def daemon(parts: Callable[[str], Path]) -> Iterator[Child]:
    """Serves faulty, reset and scratch; ends as it should after all that the test did to it."""
    directory = parts(PARTS)
    devices = (
        "acme.parts:Faulty,id=faulty,addr=05.0",
        "acme.parts:FaultyReset,id=reset,addr=06.0",
        "acme.parts:Scratch,id=scratch,addr=07.0",
    )
    child = Child("remoted", arguments(directory, *devices), directory)
    try:
        yield child
        assert child.end() == 0
    finally:
        child.kill()


@pytest.fixture
def faulty(daemon: Child) -> Iterator[Function]:
    with Function(daemon.log.parent, "faulty") as function:
        yield function


@pytest.fixture
def scratch(daemon: Child) -> Iterator[Function]:
    with Function(daemon.log.parent, "scratch") as function:
        yield function


def failures(daemon: Child, device: str) -> list[str]:
    """What the device's code failed at; each was logged with a traceback into the device's file."""
    head = f" iohub-remoted[vm] {device}: error: "
    parts = [line.partition(head) for line in settled_log(daemon).splitlines()]
    lines = [text for _time, found, text in parts if found]
    nothing, *records = "\n".join(lines).split("the device's code failed: ")
    assert not nothing
    for record in records:
        assert record.count("Traceback (most recent call last):") == 1
        assert "/acme/parts.py" in record
    return [record.partition("\n")[0] for record in records]


FAULTS: dict[str, tuple[Callable[[Function], int], int, str]] = {
    "a read": (lambda function: function.read(0x8), ERROR, "reading 4 bytes at BAR 0 + 0x8 (STATUS)"),
    "a write": (lambda function: function.write(0xC), ERROR, "writing 4 bytes at BAR 0 + 0xc (CONTROL)"),
    "a nameless register": (lambda function: function.read(0x10), ERROR, "reading 4 bytes at BAR 0 + 0x10"),
    "a read that exits": (lambda function: function.read(0x14), ERROR, "reading 4 bytes at BAR 0 + 0x14"),
    "a write that exits": (lambda function: function.write(0x14), ERROR, "writing 4 bytes at BAR 0 + 0x14"),
    "a timer": (lambda function: function.write(0x20), 0, "running the timer's Faulty.on_time()"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_failing_code_costs_its_request_and_is_logged_once(
    daemon: Child, faulty: Function, scratch: Function, fault: str
) -> None:
    provoke, answer, place = FAULTS[fault]
    for number in range(1, TIMES + 1):
        assert provoke(faulty) == answer
        faulty.check_works(number)
        scratch.check_works(~number & 0xFFFFFFFF)
    assert failures(daemon, "faulty") == [place]


def test_failing_fd_handler_is_logged_once_and_called_no_more(
    daemon: Child, faulty: Function, scratch: Function
) -> None:
    for number in range(1, TIMES + 1):
        assert faulty.write(0x24) == 0
        faulty.check_works(number)
        scratch.check_works(~number & 0xFFFFFFFF)
    assert faulty.read(0x24) == 1
    (failure,) = failures(daemon, "faulty")
    assert failure.startswith("handling fd ")
    assert failure.endswith(" in Faulty.on_event()")


def test_failing_reset_costs_its_request_and_is_logged_once(daemon: Child, scratch: Function) -> None:
    assert failures(daemon, "reset") == ["reset"], "at power-on"
    with Function(daemon.log.parent, "reset") as function:
        for number in range(1, TIMES + 1):
            assert function.reset() == ERROR
            function.place()
            function.check_works(number)
            scratch.check_works(~number & 0xFFFFFFFF)
    assert failures(daemon, "reset") == ["reset"]
    assert failures(daemon, "scratch") == []
    assert scratch.reset() == 0


NONSENSE = {
    "a part that isn't made": (
        "VENDOR_ID = DEVICE_ID = 1; PARTS = ('_uart.modem',)",
        "PARTS: its __init__() sets no attribute _uart.modem",
    ),
    "no vendor": ("DEVICE_ID = 1", "its class has no VENDOR_ID"),
    "no device": ("VENDOR_ID = 1", "its class has no DEVICE_ID"),
    "a vendor of 20 bits": (
        "VENDOR_ID, DEVICE_ID = 0x12345, 1",
        "VENDOR_ID 74565 is not a number of 16 bits",
    ),
    "a negative revision": (
        "VENDOR_ID = DEVICE_ID = 1; REVISION = -1",
        "REVISION -1 is not a number of 8 bits",
    ),
    "an id as text": ("VENDOR_ID, DEVICE_ID = 1, '1234'", "DEVICE_ID '1234' is not a number of 16 bits"),
    "a fifth pin": ("VENDOR_ID = DEVICE_ID = 1; INTERRUPT_PIN = 5", "INTERRUPT_PIN 5 is not 0 to 4"),
    "a BAR of 100 bytes": (
        "VENDOR_ID = DEVICE_ID = 1; BARS = {0: Bar(BarKind.MEM32, 100)}",
        "BAR 0: a size of 100 is not a power of two from 16 to 0x80000000",
    ),
    "a BAR of 8 bytes of memory": (
        "VENDOR_ID = DEVICE_ID = 1; BARS = {0: Bar(BarKind.MEM32, 8)}",
        "BAR 0: a size of 8 is not a power of two from 16 to 0x80000000",
    ),
    "a 32-bit BAR of 4 GiB": (
        "VENDOR_ID = DEVICE_ID = 1; BARS = {0: Bar(BarKind.MEM32, 1 << 32)}",
        "BAR 0: a size of 4294967296 is not a power of two from 16 to 0x80000000",
    ),
    "more I/O than there is": (
        "VENDOR_ID = DEVICE_ID = 1; BARS = {1: Bar(BarKind.IO, 1 << 17)}",
        "BAR 1: a size of 131072 is not a power of two from 4 to 0x10000",
    ),
    "a 64-bit BAR 5": (
        "VENDOR_ID = DEVICE_ID = 1; BARS = {5: Bar(BarKind.MEM64, 4096)}",
        "BAR 5 has no room among the 6 BARs",
    ),
    "a BAR in another's upper half": (
        "VENDOR_ID = DEVICE_ID = 1; BARS = {0: Bar(BarKind.MEM64, 4096), 1: Bar(BarKind.IO, 4)}",
        "BAR 1 has no room among the 6 BARs",
    ),
    "a BAR 6": (
        "VENDOR_ID = DEVICE_ID = 1; BARS = {6: Bar(BarKind.IO, 4)}",
        "BAR 6 has no room among the 6 BARs",
    ),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_impossible_declaration_is_one_line_and_status_2(parts: Callable[[str], Path], case: str) -> None:
    declaration, complaint = NONSENSE[case]
    directory = parts(f"{HEAD}class Thing(PciFunction):\n    {declaration}\n")
    lines = refused(directory, "edu,id=edu0", "acme.parts:Thing,id=thing")
    assert lines[-1] == f"iohub-remoted: device thing: {complaint}"
    assert not [line for line in lines if "Traceback" in line]


CONSTRUCTORS = {
    "fails": ("self.x = 1 / 0", "ZeroDivisionError: division by zero"),
    "exits": ("raise SystemExit('no licence')", "SystemExit: no licence"),
    "is cancelled": ("import asyncio; raise asyncio.CancelledError('late')", "CancelledError: late"),
    "fails in two lines": (r"raise ValueError('one\ntwo')", r"ValueError: one\ntwo"),
    "has no text": ("class E(Exception):\n        def __str__(self): 1/0\n    raise E", "E: no text"),
}


@pytest.mark.parametrize("case", CONSTRUCTORS)
def test_failing_constructor_is_a_traceback_a_line_and_status_2(
    parts: Callable[[str], Path], case: str
) -> None:
    body, complaint = CONSTRUCTORS[case]
    methods = f"def __init__(self, host, options):\n    {body}\n"
    directory = parts(f"{HEAD}class Thing(PciFunction):\n{indent(methods, '    ')}")
    lines = refused(directory, "acme.parts:Thing,id=thing")
    model = "model acme.parts:Thing"
    start = f"iohub-remoted: device thing: {model} can't be created: {complaint} ("
    assert lines[-1].startswith(start)
    assert re.fullmatch(r"\S+/acme/parts\.py:\d+\)", lines[-1].removeprefix(start))
    assert len([line for line in lines if line.endswith("Traceback (most recent call last):")]) == 1
    assert lines[0].endswith("thing: error: the device's code failed: __init__")


@pytest.mark.parametrize(
    "method",
    [
        "def __init__(self, host, options):\n    self.x = 1\n",
        "def __new__(cls, host, options):\n    return 5\n",
    ],
)
def test_constructor_that_leaves_out_the_base_classs_is_one_line_and_status_2(
    parts: Callable[[str], Path], method: str
) -> None:
    directory = parts(f"{HEAD}class Thing(PciFunction):\n{indent(method, '    ')}")
    (line,) = refused(directory, "acme.parts:Thing,id=thing")
    assert line == "iohub-remoted: device thing: its __init__() does not call that of PciFunction"


def test_constructor_that_hides_a_method_of_the_daemon_is_one_line_and_status_2(
    parts: Callable[[str], Path],
) -> None:
    method = "def __init__(self, host, options):\n    super().__init__(host, options)\n    self.vectors = 5\n"
    directory = parts(
        f"{HEAD}class Thing(PciFunction):\n    VENDOR_ID = DEVICE_ID = 1\n{indent(method, '    ')}"
    )
    (line,) = refused(directory, "acme.parts:Thing,id=thing")
    assert line == (
        "iohub-remoted: device thing: its __init__() sets vectors, which a device must not redefine"
    )


def test_a_device_that_needs_messages_over_mpqemu_is_one_line_and_status_2(
    parts: Callable[[str], Path],
) -> None:
    text = f"{HEAD.replace('PciFunction', 'Msi, PciFunction', 1)}class Thing(PciFunction):\n"
    directory = parts(f"{text}    VENDOR_ID = DEVICE_ID = 1\n    MSI = Msi()\n    NEEDS_MESSAGES = True\n")
    (line,) = refused(directory, "acme.parts:Thing,id=thing")
    assert line == (
        "iohub-remoted: device thing: it needs MSI or MSI-X, which mpqemu does not carry: use transport=vfio-user"
    )


MODULES = {
    "raises": ("\nprice = 1 / 0\n", "ZeroDivisionError: division by zero", 2),
    "exits": ("\nraise SystemExit(3)\n", "SystemExit: 3", 2),
    "has no syntax": ("\n\nclass Thing(:\n", "SyntaxError: invalid syntax", 3),
    "imports what isn't there": (
        "from remoted.device import Baz\n",
        "ImportError: cannot import name 'Baz'",
        1,
    ),
}


def test_missing_module_is_one_line_and_status_2(parts: Callable[[str], Path]) -> None:
    directory = parts("import acme.tools\n")
    where = "iohub-remoted: device thing: model '{}' can't be loaded: No module named "
    (line,) = refused(directory, "acma.parts:Thing,id=thing")
    assert line == f"{where.format('acma.parts:Thing')}'acma': is its directory in PYTHONPATH?"
    (line,) = refused(directory, "acme.part:Thing,id=thing")
    assert line == f"{where.format('acme.part:Thing')}'acme.part'"
    (line,) = refused(directory, "acme.parts:Thing,id=thing")
    assert line.startswith(f"{where.format('acme.parts:Thing')}'acme.tools' (")
    assert line.endswith("/acme/parts.py, line 1)")


@pytest.mark.parametrize("case", MODULES)
def test_failing_module_is_one_line_with_its_place_and_status_2(
    parts: Callable[[str], Path], case: str
) -> None:
    text, complaint, number = MODULES[case]
    (line,) = refused(parts(text), "acme.parts:Thing,id=thing")
    where = "iohub-remoted: device thing: model 'acme.parts:Thing' can't be loaded: "
    assert line.startswith(where + complaint)
    assert line.endswith(f"parts.py, line {number})")


def test_debug_lines_of_a_device_are_shown_with_verbose(parts: Callable[[str], Path]) -> None:
    method = (
        "def __init__(self, host, options):\n    super().__init__(host, options)\n    host.log.debug('ready')"
    )
    identity = "    VENDOR_ID = DEVICE_ID = 1\n"
    directory = parts(f"{HEAD}class Thing(PciFunction):\n{identity}{indent(method, '    ')}")
    devices = ("acme.parts:Thing,id=thing", "acme.parts:Lost,id=lost")
    assert not [line for line in refused(directory, *devices) if "ready" in line]
    lines = refused(directory, *devices, options=["--verbose"])
    assert len([line for line in lines if line.endswith("thing: debug: ready")]) == 1, lines


def test_no_device_at_all_is_one_line_and_status_2(parts: Callable[[str], Path]) -> None:
    (line,) = refused(parts(""))
    assert line == "iohub-remoted: no devices: --device gives one, or --config a file with some"


def test_a_model_is_found_by_its_entry_point(parts: Callable[[str], Path]) -> None:
    directory = parts(PARTS)
    distribution = directory.parent / "lib" / "acme_parts-1.0.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-parts\nVersion: 1.0\n")
    (distribution / "entry_points.txt").write_text(
        dedent(
            """\
            [iohub.devices]
            acme-scratch = acme.parts:Scratch
            acme-missing = acme.parts:Missing
            """
        )
    )
    (line,) = refused(directory, "acme-jukebox,id=bell")
    assert line == (
        "iohub-remoted: device bell: model 'acme-jukebox' is unknown; "
        "there are acme-missing, acme-scratch, edu, irq-line, nvme, pci-serial, package.module:Class and "
        "./file.py:Class"
    )
    (line,) = refused(directory, "./bell.py,id=bell")
    complaint = "model './bell.py' names a file without its class: ./bell.py:CLASS is needed"
    assert line == f"iohub-remoted: device bell: {complaint}"
    (line,) = refused(directory, "acme.parts:scrach,id=bell")
    assert line.endswith("AttributeError: module 'acme.parts' has no attribute 'scrach': is Scratch meant?")
    (line,) = refused(directory, "acme-missing,id=bell")
    complaint = "AttributeError: module 'acme.parts' has no attribute 'Missing'"
    assert line == f"iohub-remoted: device bell: model 'acme-missing' can't be loaded: {complaint}"
    daemon = Child("remoted", arguments(directory, "acme-scratch,id=scratch"), directory)
    try:
        with Function(directory, "scratch") as function:
            assert function.identity() == 0x0001ACE0
            function.check_works(0x12345678)
    finally:
        assert daemon.end() == 0
