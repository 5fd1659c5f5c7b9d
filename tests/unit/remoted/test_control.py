# SPDX-License-Identifier: GPL-2.0-or-later
"""org.iohub.Remoted: what it tells is what clients and lines did."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from common.config import DeviceConfig, VmConfig
from common.control import call
from common.ctl.answers import ask
from common.errors import PeerGone, UsageError
from common.mpqemu import ERROR, SYSMEM, Command
from common.pci import PCI_COMMAND, parse_devfn
from common.remoted_interface import NoSuchDevice, NotDrivable
from common.remoted_interface import Remoted as Interface
from common.trust import Trust
from remoted.control import RemotedService
from remoted.devices.irq_line import IrqLine
from remoted.main import Remoted
from remoted.server import DeviceServer
from remoted.watchdog import Watchdog
from tests.support.fds import await_fds, count_fds
from tests.support.loops import running
from tests.support.remotebench import MEM_BASE, LineDevice, RemoteBench
from tests.support.varlinkreply import status_of
from tests.support.wait import wait_until

DEVICES = {"line0": ("irq-line", "05.0", IrqLine), "dev0": ("line-device", "06.1", LineDevice)}


def config_of(name: str, model: str, addr: str, fd: int | None = None) -> DeviceConfig:
    return DeviceConfig(name, model, parse_devfn(addr), None, fd, None, {})


class Bench(RemoteBench):
    """The devices, and the interface as the control socket has it."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        devices: list[tuple[DeviceConfig, DeviceServer]] = []
        for name, (model, addr, cls) in DEVICES.items():
            self.add(cls, name, parse_devfn(addr))
            devices.append((config_of(name, model, addr), self.servers[name]))
        self.interface = RemotedService("vm1", devices, self.loop.polling)

    def reply(self) -> dict[str, Any]:
        """Status as it goes over the socket."""
        return status_of(self.interface)

    def status(self, name: str = "dev0") -> dict[str, Any]:
        """What Status says about a device."""
        (found,) = [function for function in self.reply()["functions"] if function["id"] == name]
        return dict(found)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


def test_an_unused_function(bench: Bench) -> None:
    assert bench.status("dev0") == {
        "id": "dev0",
        "addr": "06.1",
        "model": "line-device",
        "level": False,
        "asserted": False,
        "raised": 0,
        "resamples": 0,
        "reasserts": 0,
        "rejected": 0,
        "refused": 0,
        "accesses": 0,
        "quiet_seconds": 0,
        "errors": 0,
        "has_irqfd": False,
        "transport": "mpqemu",
        "interrupts": None,
        "vectors": 0,
        "messages": 0,
        "link": "waiting",
        "client_pid": None,
        "client_name": None,
        "client_gone": None,
        "amiss": [],
        "counters": {},
    }


def test_the_client_is_told_by_pid_and_name_while_it_is_connected(bench: Bench) -> None:
    with bench.connect("dev0"):
        status = bench.status("dev0")
        assert status["link"] == "connected"
        assert status["client_pid"] == os.getpid()
        assert status["client_name"] == Path("/proc/self/comm").read_text().rstrip("\n")
        assert bench.status("line0")["link"] == "waiting"
        assert status["client_gone"] is False
    bench.settle()
    assert bench.status("dev0")["link"] == "waiting"
    assert bench.status("dev0")["client_pid"] is None


def test_the_cost_of_polling_is_told(bench: Bench) -> None:
    assert bench.reply()["polling"] == {"window_us": 0, "found": 0, "missed": 0, "spent_ms": 0}
    polling = bench.loop.polling
    polling.window, polling.found, polling.missed, polling.seconds = 40e-6, 3, 2, 0.0126
    assert bench.reply()["polling"] == {"window_us": 40, "found": 3, "missed": 2, "spent_ms": 13}


@pytest.mark.parametrize(("counters", "told"), [({"pages": 3}, {"pages": 3}), ({"pages": None}, {})])
def test_what_a_model_counts_is_told(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, counters: object, told: object
) -> None:
    """A model whose counters are none costs the status of no other device."""
    monkeypatch.setattr(LineDevice, "counters", counters)
    assert bench.status("dev0")["counters"] == told
    assert bench.status("line0")["counters"] == {}


def test_what_modules_say_is_amiss_is_told_while_it_is_true(bench: Bench) -> None:
    said = ["the register SPEED hangs"]
    bench.servers["dev0"].function.amiss.add(lambda: said)
    assert bench.status("dev0")["amiss"] == said
    assert bench.status("line0")["amiss"] == []
    bench.interface.amiss.add(lambda: ["no memory"])
    assert bench.reply()["amiss"] == ["no memory"]
    said.clear()
    assert bench.status("dev0")["amiss"] == []


CONNECT = """
import os, socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect(sys.argv[1])
ours = socket.socket(fileno=0)
socket.send_fds(ours, [b"x"], [link.fileno()])
sys.stdin.read()
"""


def test_a_client_that_has_gone_is_told_while_its_link_lives_on(bench: Bench) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        client = subprocess.Popen([sys.executable, "-c", CONNECT, bench.path("dev0")], stdin=theirs.fileno())
        with client:
            _, fds, _, _ = socket.recv_fds(ours, 1, 1)
            bench.settle()
            status = bench.status("dev0")
            assert (status["client_pid"], status["client_gone"]) == (client.pid, False)
            client.kill()
        bench.settle()
        status = bench.status("dev0")
        assert (status["link"], status["client_pid"]) == ("connected", client.pid)
        assert status["client_gone"] is True
        for fd in fds:
            os.close(fd)
    bench.settle()
    assert bench.status("dev0")["link"] == "waiting"


def test_counters_are_what_happened_on_the_eventfds(bench: Bench) -> None:
    with bench.connect("dev0") as client:
        client.enable()
        client.drive(True)
        pair = client.set_irqfd()
        assert bench.status()["has_irqfd"] is True
        assert bench.status()["reasserts"] == 1  # the level was high when the irqfd came
        for _ in range(3):
            pair.resamplefd.set()
            bench.settle()
        client.drive(False)
        for _ in range(2):
            pair.resamplefd.set()
            bench.settle()
        client.drive(True)
        status = bench.status()
        assert (status["raised"], status["resamples"], status["reasserts"]) == (2, 5, 4)
        assert int.from_bytes(os.read(pair.irqfd.fd, 8), "little") == 1 + 3 + 1
    bench.settle()
    status = bench.status()
    assert status["has_irqfd"] is False
    assert (status["raised"], status["level"]) == (2, True)


def test_a_line_behind_intx_disable_is_high_but_not_asserted(bench: Bench) -> None:
    with bench.connect("dev0") as client:
        client.enable()
        client.drive(True)
        assert (bench.status()["level"], bench.status()["asserted"]) == (True, True)
        client.disable_intx(True)
        assert (bench.status()["level"], bench.status()["asserted"]) == (True, False)


def test_rejected_messages_are_counted_over_all_sessions(bench: Bench) -> None:
    with bench.connect("dev0") as client:
        client.send(Command.SET_IRQFD)  # dropped, the session goes on
        bench.settle()
        assert bench.status()["rejected"] == 1
        client.send_bytes(b"\xff" * 40)
        assert client.has_ended
    assert bench.status()["rejected"] == 2
    with bench.connect("dev0") as client:
        assert bench.status()["rejected"] == 2
        client.send_bytes(b"\xff" * 40)
        assert client.has_ended
    assert bench.status()["rejected"] == 3
    assert bench.status("line0")["rejected"] == 0


def test_accesses_are_counted_over_all_sessions_and_how_long_ago_they_stopped(bench: Bench) -> None:
    for session in (1, 2):
        with bench.connect("dev0") as client:
            client.enable()
            counted = bench.status()["accesses"]
            assert counted >= session
            client.call(Command.DEVICE_RESET)
            assert (bench.status()["accesses"], bench.status()["quiet_seconds"]) == (counted + 1, 0)
            bench.clock.now += 7
            assert bench.status()["quiet_seconds"] == 7
        bench.settle()
    assert (bench.status()["accesses"], bench.status()["quiet_seconds"]) == (counted + 1, 7)
    assert bench.status("line0")["accesses"] == 0


def test_guest_ram_that_was_refused_is_amiss_until_it_is_accepted(bench: Bench, tmp_path: Path) -> None:
    def sync(fd: int) -> None:
        client.send(Command.SYNC_SYSMEM, sysmem, fds=(fd,))
        bench.settle()

    sysmem = SYSMEM.pack(*[0] * 8, 4096, *[0] * 7, *[0] * 8)
    with bench.connect("dev0") as client, open(os.devnull, "rb") as wrong:
        memfd = os.memfd_create("ram")
        os.ftruncate(memfd, 4096)
        sync(wrong.fileno())
        (line,) = bench.status()["amiss"]
        assert line.startswith("DMA is impossible, the guest's RAM was refused: ")
        sync(memfd)
        assert bench.status()["amiss"] == []
        sync(wrong.fileno())
        os.close(memfd)
    bench.settle()
    assert bench.status()["amiss"] == []


def test_a_line_that_is_high_while_no_bar_is_decoded_is_amiss(bench: Bench) -> None:
    with bench.connect("dev0") as client:
        client.enable()
        client.drive(True)
        assert bench.status()["amiss"] == []
        client.config_write(PCI_COMMAND, 2, 0)
        (line,) = bench.status()["amiss"]
        assert line.startswith("its line is high, but the guest has its BARs disabled")
        client.enable()
        client.drive(False)
        client.config_write(PCI_COMMAND, 2, 0)
        assert bench.status()["amiss"] == []
    bench.interface.Raise(device="line0")
    assert bench.status("line0")["amiss"] == [], "a function without BARs needs no decoding"


def test_errors_of_the_devices_code_are_counted(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LineDevice, "bar_read", lambda *_: 1 // 0)
    with bench.connect("dev0") as client:
        client.enable()
        for _ in range(2):
            assert client.bar_read(True, MEM_BASE, 4) == ERROR
    status = bench.status()
    assert status["errors"] == 2
    assert "ZeroDivisionError" in status["amiss"][0]


def test_a_models_counters_are_bounded_and_printable(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    wild = {"a\nb": 1 << 200, **{f"c{number}": number for number in range(1000)}}
    monkeypatch.setattr(LineDevice, "counters", wild)
    counters = bench.status()["counters"]
    assert counters["a\\nb"] == (1 << 63) - 1
    assert len(counters) <= 100
    monkeypatch.setattr(LineDevice, "counters", property(lambda _self: {"a": 1 // 0}))
    assert bench.status()["counters"] == {}


def test_refused_clients_are_counted(bench: Bench) -> None:
    with bench.connect("dev0"), bench.connect("dev0") as second, bench.connect("dev0") as third:
        assert second.has_ended
        assert third.has_ended
        assert bench.status()["refused"] == 2
        assert bench.status()["link"] == "connected"


@pytest.mark.parametrize("name", ["line0", "05.0", "5"])
def test_raise_and_lower_drive_the_line_and_its_irqfd(bench: Bench, name: str) -> None:
    with bench.connect("line0") as client:
        pair = client.set_irqfd()
        bench.interface.Raise(device=name)
        assert pair.irqfd.test_and_clear()
        assert (bench.status("line0")["level"], bench.status("line0")["asserted"]) == (True, True)
        bench.interface.Raise(device=name)
        assert not pair.irqfd.test_and_clear()
        assert bench.status("line0")["raised"] == 1
        bench.interface.Lower(device=name)
        assert bench.status("line0")["level"] is False
        bench.interface.Raise(device=name)
        assert pair.irqfd.test_and_clear()
        client.call(Command.DEVICE_RESET)
        assert bench.status("line0")["level"] is False


def test_raise_and_lower_leave_other_models_alone(bench: Bench) -> None:
    for method in (bench.interface.Raise, bench.interface.Lower):
        with pytest.raises(NotDrivable) as error:
            method(device="06.1")
        assert error.value.parameters == {"device": "dev0", "model": "line-device"}
    assert bench.status("dev0")["raised"] == 0


@pytest.mark.parametrize("name", ["", "07.0", "06.0", "nope", "line0 ", "20.0", "\n", "05.0\0"])
def test_an_unknown_device_is_an_error_of_the_interface(bench: Bench, name: str) -> None:
    with pytest.raises(NoSuchDevice) as error:
        bench.interface.Raise(device=name)
    assert error.value.parameters == {"device": name}


def daemon_of(directory: Path, *devices: DeviceConfig) -> Remoted:
    return Remoted(VmConfig("vm1", str(directory), "embedded", devices))


def test_the_daemon_answers_in_its_runtime_directory_until_it_is_closed(tmp_path: Path) -> None:
    before = count_fds()
    daemon = daemon_of(tmp_path, config_of("line0", "remoted.devices.irq_line:IrqLine", "05.0"))
    path = tmp_path / "remoted.varlink"
    with running(daemon._loop):
        call(path, f"{Interface.name}.Raise", device="line0")
        (function,) = call(path, f"{Interface.name}.Status")["functions"]
    assert (function["addr"], function["asserted"]) == ("05.0", True)
    daemon.close()
    assert not list(tmp_path.iterdir())
    await_fds(before)


def test_an_inherited_connection_that_has_ended_is_closed(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    model = "remoted.devices.irq_line:IrqLine"
    daemon = daemon_of(
        tmp_path, config_of("line0", model, "05.0", theirs.detach()), config_of("line1", model, "06.0")
    )
    path = tmp_path / "remoted.varlink"
    with running(daemon._loop), ours:
        functions = call(path, f"{Interface.name}.Status")["functions"]
        assert [function["link"] for function in functions] == ["connected", "waiting"]
        ours.close()
        # The end arrives before a call that comes after it: links go first.
        functions = call(path, f"{Interface.name}.Status")["functions"]
        assert [function["link"] for function in functions] == ["closed", "waiting"]
    daemon.close()


def test_who_calls_while_a_devices_code_hangs_is_told_which_and_for_how_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, released: threading.Event
) -> None:
    monkeypatch.setattr("remoted.main.Watchdog", lambda: Watchdog(0.02, 0.1))
    monkeypatch.setattr(IrqLine, "set_intx", lambda _self, level: level and released.wait(20))
    daemon = daemon_of(tmp_path, config_of("line0", "remoted.devices.irq_line:IrqLine", "05.0"))
    with closing(daemon), running(daemon._loop):
        function = daemon._roster.servers[0].function

        def hang() -> None:
            function.drive_intx(True)

        daemon._loop.call_soon_threadsafe(hang)
        wait_until(lambda: function.stall != "", "the watchdog has noticed")
        with pytest.raises(PeerGone) as error:
            ask(tmp_path, "remoted", Trust(), "Status")
        place = r"the device's code has not returned for \d s: setting the INTx line"
        assert re.fullmatch(f"remoted does not answer: line0: {place}", str(error.value))
        released.set()
        wait_until(lambda: "took" in function.stall, "the watchdog has noticed its end")
        assert ask(tmp_path, "remoted", Trust(), "Status")["vm"] == "vm1"


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """What a device waits for that hangs."""
    event = threading.Event()
    yield event
    event.set()


def test_a_second_daemon_in_the_same_runtime_directory_is_refused(tmp_path: Path) -> None:
    first = daemon_of(tmp_path)
    before, files = count_fds(), sorted(os.listdir(tmp_path))
    with pytest.raises(UsageError, match=rf"\[{os.getpid()}\] runs in {tmp_path} already: stop it"):
        daemon_of(tmp_path, config_of("line1", "remoted.devices.irq_line:IrqLine", "05.0"))
    await_fds(before)
    assert sorted(os.listdir(tmp_path)) == files
    first.close()
