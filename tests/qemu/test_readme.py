# SPDX-License-Identifier: GPL-2.0-or-later
"""What the README shows is run as it stands there: its device, its commands, its configuration."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.config import parse_proxyd, parse_remoted
from common.ctl.guestconsole import GuestConsole, Record
from remoted.models import find_model
from remoted.options import parse_options
from tests.support.checkout import ROOT
from tests.support.monitorclient import MonitorClient
from tests.support.qemu import PATIENCE, QEMU, Qemu, boot, guest_image
from tests.support.wait import wait_until

README = (ROOT / "README.md").read_text()

ADDR = "05.0"
BAR = 0xE0000000
"""where the guest puts it: between the RAM and what firmware uses"""
RING, ACKNOWLEDGE = BAR, BAR + 4
MASTER, SLAVE, ELCR = 0x20, 0xA0, 0x4D0
READ_IRR, SPECIFIC_EOI = 0x0A, 0x60


def found(pattern: str) -> str:
    """The one place of the README that a pattern with one group describes."""
    (text,) = re.findall(pattern, README, re.DOTALL | re.MULTILINE)
    return str(text)


def doorbell() -> str:
    return found(r"^`doorbell\.py`:\n\n```python\n(.*?)^```$")


def commands() -> str:
    return found(r"^```sh\n(.*?)^```$")


def qemu_options() -> list[str]:
    return shlex.split(found(r"^The device goes into any QEMU.*?\n\n((?:    -.*?\n)+)\n"))


class Shell:
    """Runs commands with `sh` in a directory, with the programs of this virtualenv on the path."""

    def __init__(self, directory: Path) -> None:
        self.log = directory / "log"
        self.log.touch()
        self._directory = directory
        self._environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def run(self, command: str) -> str:
        """The output of one that ends, and must succeed."""
        with self.log.open("ab") as log:
            return subprocess.run(
                ["sh", "-c", command],
                cwd=self._directory,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                timeout=PATIENCE,
                check=True,
            ).stdout

    @contextlib.contextmanager
    def daemons(self, script: str, count: int) -> Iterator[None]:
        """Background jobs that say READY=1 (sd_notify(3)), all of them; ended by SIGTERM, which must suffice."""
        address = self._directory / "notify"
        ends, held = os.pipe()
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify,
            os.fdopen(ends, "rb") as all_ended,
            self.log.open("ab") as log,
        ):
            notify.bind(str(address))
            notify.settimeout(PATIENCE)
            notify.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            try:
                shell = subprocess.Popen(
                    ["sh", "-c", script],
                    cwd=self._directory,
                    env={**self._environment, "NOTIFY_SOCKET": str(address)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[held],
                    start_new_session=True,
                )
            finally:
                os.close(held)
            try:
                ready: set[bytes] = set()
                while len(ready) < count:
                    state, ancillary, _, _ = notify.recvmsg(4096, socket.CMSG_SPACE(12))
                    if b"READY=1" in state.split(b"\n"):
                        ready.add(ancillary[0][2])
                yield
                os.killpg(shell.pid, signal.SIGTERM)
                os.set_blocking(ends, False)
                wait_until(lambda: all_ended.read() == b"", "the daemons end")
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(shell.pid, signal.SIGKILL)
                shell.wait()


class Guest(Qemu):
    """The test guest in a QEMU that has the README's options and what every VM needs."""

    def __init__(self, directory: Path, program: str) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            super().__init__(
                [
                    *("-nodefaults", "-display", "none", *qemu_options()),
                    *boot(guest_image(), seabios=True),
                    *("-chardev", f"socket,id=console,fd={theirs.fileno()}", "-serial", "chardev:console"),
                    *("-qmp", "unix:test,server=on,wait=off"),
                ],
                [theirs.fileno()],
                cwd=directory,
                program=program,
            )
        with self._starting() as owned:
            self._console = owned.enter_context(GuestConsole(ours))

    def wait_ready(self) -> None:
        self._console.wait_ready(PATIENCE)

    def do(self, line: str) -> Record:
        reply = self._console.command(line, timeout=PATIENCE)
        assert reply.ok, f"{line}: {reply.reason}"
        return reply.result

    def get(self, line: str) -> int:
        return self.do(line).number("value")

    def sees(self, identity: str) -> bool:
        """Whether a function of this vendor and device is at the address."""
        functions = self._console.command("lspci", timeout=PATIENCE).of_kind("pci")
        return (ADDR, identity) in [(each.text("addr"), each.text("id")) for each in functions]

    def place_bar(self) -> None:
        self.do(f"config write 32 {ADDR} 0x10 {BAR:#x}")
        self.do(f"config write 16 {ADDR} 0x04 0x0002")

    def irq(self) -> int:
        """Where firmware has routed INTA of slot 5, PIRQ A, to; the guest makes that IRQ level-triggered."""
        irq = self.get("config read 8 01.0 0x60")
        assert irq in range(3, 16), "the PIIX3's route of PIRQ A"
        port = ELCR + irq // 8
        self.do(f"out 8 {port:#x} {self.get(f'in 8 {port:#x}') | 1 << irq % 8:#x}")
        return irq

    def status(self) -> bool:
        """Interrupt status, bit 3 of the status register."""
        return bool(self.get(f"config read 16 {ADDR} 0x06") & 0x8)

    def requested(self, irq: int) -> bool:
        """Whether the PIC has the line high: the request register's bit."""
        port = MASTER if irq < 8 else SLAVE
        self.do(f"out 8 {port:#x} {READ_IRR:#x}")
        return bool(self.get(f"in 8 {port:#x}") >> irq % 8 & 1)

    def end_of_interrupt(self, irq: int) -> None:
        port = MASTER if irq < 8 else SLAVE
        self.do(f"out 8 {port:#x} {SPECIFIC_EOI | irq % 8:#x}")


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    (tmp_path / "doorbell.py").write_text(doorbell())
    shell = Shell(tmp_path)
    yield shell
    print(shell.log.read_text())


@pytest.mark.usefixtures("requires_kvm", "requires_qemu")
def test_device_works_in_a_running_vm(tmp_path: Path, shell: Shell) -> None:
    check_device(tmp_path, shell, QEMU, commands())


@pytest.mark.usefixtures("requires_kvm")
def test_device_works_over_vfio_user_as_well(tmp_path: Path, shell: Shell, vfio_user_qemu: str) -> None:
    addition = found(r"takes it over vfio-user as well, with `(.*?)` added to both `--device` options")
    check_device(tmp_path, shell, vfio_user_qemu, commands().replace(" &", f",{addition} &"))


def check_device(directory: Path, shell: Shell, qemu: str, script: str) -> None:
    with Guest(directory, qemu) as guest, MonitorClient(directory / "test") as monitor:
        guest.wait_ready()
        assert not guest.sees("1234:d00b")
        with shell.daemons(script, 2):
            wait_until(lambda: guest.sees("1234:d00b"), "the guest sees the device")
            assert guest.get(f"config read 32 {ADDR} 0x00") == 0xD00B1234
            check_rings(guest)
            status = shell.run(found(r"^The guest finds 1234:d00b at 05\.0, and\s`(.*?)`"))
            assert re.search(r"^05\.0 +low .*\n +bell: \./doorbell\.py:Doorbell,", status, re.MULTILINE), (
                status
            )

            guest.do(f"write 32 {RING:#x} 1")
            assert guest.status()
            monitor.execute("system_reset")
            guest.wait_ready()
            assert not guest.status()
            check_rings(guest)
    logged = shell.log.read_text()
    assert "Traceback" not in logged
    assert " error: " not in logged


def check_rings(guest: Guest) -> None:
    """Starts from a count of 0: what the device does for a driver, and that its interrupt gets through."""
    guest.place_bar()
    irq = guest.irq()
    assert guest.get(f"read 32 {RING:#x}") == 0
    for count in (1, 2):
        assert not guest.status()
        assert not guest.requested(irq)
        guest.do(f"write 32 {RING:#x} 1")
        assert guest.status()
        wait_until(lambda: guest.requested(irq), f"the interrupt on IRQ {irq}")
        guest.end_of_interrupt(irq)
        wait_until(
            lambda: guest.requested(irq), "it comes again, as nobody has acknowledged it at the device"
        )
        assert guest.get(f"read 32 {RING:#x}") == count
        guest.do(f"write 32 {ACKNOWLEDGE:#x} 0")
        assert not guest.status()
        guest.end_of_interrupt(irq)
        wait_until(lambda: not guest.requested(irq), "the line goes low")
    assert guest.get(f"read 32 {RING:#x}") == 2


@pytest.mark.usefixtures("requires_kvm")
def test_device_can_be_tried_without_a_qemu(tmp_path: Path, shell: Shell) -> None:
    (tmp_path / "doorbell.py").write_text(doorbell())
    script = found(r"^It can be tried without a QEMU first:\n\n(.*?)\n\n")
    session = found(r"^    \$ socat - UNIX:try/proxyd\.console\n(.*?)\n\n")
    said = [line.removeprefix("    ") for line in session.splitlines()]
    with shell.daemons(script, 2), socket.socket(socket.AF_UNIX) as console:
        console.settimeout(PATIENCE)
        console.connect(str(tmp_path / "try" / "proxyd.console"))
        with console.makefile("r") as lines:

            def answer(command: str) -> list[str]:
                console.sendall(f"{command}\n".encode())
                got = [lines.readline().rstrip("\n")]
                while got[-1] and not got[-1].startswith(("ok", "err")):
                    got.append(lines.readline().rstrip("\n"))
                return got

            assert lines.readline() == f"{said.pop(0)}\n"
            while said:
                command = said.pop(0)
                expected: list[str] = []
                while not expected or not expected[-1].startswith("ok"):
                    expected.append(said.pop(0))
                # An interrupt takes its time, an access that rings doesn't wait for it.
                wait_until(lambda: answer(command) == expected, f"{command}: {expected}")  # noqa: B023
        command = found(r"^    \$ (iohubctl status [^\n]* vm0)$")
        shown = found(r"^    \$ iohubctl status [^\n]* vm0\n(.*?)\n\n(?! )")
        assert without_numbers(shell.run(command)) == without_numbers(shown)


def without_numbers(text: str) -> str:
    """What is the same in each run: numbers, units of time, line breaks, and whether remoted polled, are not."""
    text = re.sub(r", has polled for [0-9]+ ms", "", text)
    return " ".join(re.sub(r"[0-9.]+( us| ms|s\b)?", "N", text).split())


def test_device_has_twenty_lines_at_most() -> None:
    assert len([line for line in doorbell().splitlines() if line.strip()]) <= 20


def test_both_daemons_read_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "vm1.toml"
    file.write_text(found(r"^```toml\n(.*?)^```$"))
    for parse in (parse_remoted, parse_proxyd):
        config = parse(["--config", str(file)])
        assert (config.name, config.vm) == ("vm1", "qmp:/run/vm1/qmp.sock")
        (device,) = config.devices
        assert (device.id, device.devfn) == ("com1", 5 << 3)
        parse_options(find_model(device.model or "", device.id).OPTIONS, device.properties)


def shown_commands() -> list[str]:
    """Every command line in a block of the README that begins with one of the programs."""
    lines = re.findall(
        r"^(?:    )?(?:\w+=\S+ )*(iohub(?:ctl|-remoted|-proxyd) .*?)(?: &)?$", README, re.MULTILINE
    )
    return sorted(set(lines))


def mentioned_commands() -> list[str]:
    """Every program in the README's text that is named with a subcommand or options."""
    spans = re.findall(r"(?<!`)`(iohub[a-z-]+ [^`]+)`", README)
    return sorted({" ".join(span.split()) for span in spans})


@pytest.mark.parametrize("command", [*shown_commands(), *mentioned_commands()])
def test_commands_have_options_that_exist(command: str) -> None:
    program, *words = shlex.split(command)
    subcommands = words[:1] if program == "iohubctl" else []
    help_text = subprocess.run(
        [Path(sys.executable).parent / program, *subcommands, "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for option in words:
        if option.startswith("--"):
            assert re.search(rf"^  (?:-\w, )?{option}\b", help_text, re.MULTILINE), option


PARSERS: dict[str, Callable[[list[str]], object]] = {
    "iohub-remoted": parse_remoted,
    "iohub-proxyd": parse_proxyd,
}


@pytest.mark.parametrize("command", [line for line in shown_commands() if line.split()[0] in PARSERS])
def test_daemons_take_their_commands(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vm1.toml").write_text(found(r"^```toml\n(.*?)^```$"))
    monkeypatch.chdir(tmp_path)
    program, *words = shlex.split(command)
    PARSERS[program](words)


def test_make_has_the_targets() -> None:
    listing = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    named = set(re.findall(r"(?:^    |^    \$ |`)make ([a-z-]+)\b", README, re.MULTILINE))
    assert "demo" in named
    for target in named:
        assert re.search(rf"^  make {target} +\S", listing, re.MULTILINE), target
