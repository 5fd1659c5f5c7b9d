# SPDX-License-Identifier: GPL-2.0-or-later
"""org.iohub.Proxyd: what it tells is what the guest programmed and the links did."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from common.amiss import Amiss
from common.config import DeviceConfig, VmConfig
from common.control import call
from common.ctl.children import Child
from common.loop import Loop
from common.pci import parse_devfn
from common.peer import PeerCredentials
from proxyd.control import ProxydService
from proxyd.machine.board import Board
from proxyd.vm.soft.softirqchip import SoftIrqchip
from proxyd.vmstate import VmState
from remoted.devices.irq_line import IrqLine
from tests.support.fds import no_fd_is_left
from tests.support.remote import RemoteThread
from tests.support.steploop import run_until
from tests.support.varlinkreply import status_of

ADDRESSES = {"line0": "05.0", "line1": "06.0"}
PIIX3 = 0x80000800
PIRQ_ROUTES = 0x60
CONFIG_ADDRESS, CONFIG_DATA = 0xCF8, 0xCFC


class IrqLineOnPinC(IrqLine):
    INTERRUPT_PIN = 3


class Bench:
    """proxyd's board with the userspace irqchip, and a remote in a thread that comes and goes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.loop = Loop()
        self._remote: RemoteThread | None = None
        self._irqchip = SoftIrqchip(self.loop)
        devices = tuple(
            DeviceConfig(name, None, parse_devfn(addr), None, None, None, {})
            for name, addr in ADDRESSES.items()
        )
        config = VmConfig("vm1", str(directory), "soft", devices)
        self.board = Board("iohub-proxyd", config, self.loop, self._irqchip)

    def status(self) -> dict[str, Any]:
        """Status, called from outside."""
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(call, self.directory / "proxyd.varlink", "org.iohub.Proxyd.Status")
            run_until(self.loop, answer.done)
            return answer.result()

    def functions(self) -> dict[str, dict[str, Any]]:
        return {function["id"]: function for function in self.status()["functions"]}

    def route(self, pirq: int, gsi: int) -> None:
        """The guest's write to one of the PIIX3's PIRQ route registers."""
        self.board.host.pio_write(CONFIG_ADDRESS, 4, PIIX3 + PIRQ_ROUTES)
        self.board.host.pio_write(CONFIG_DATA + pirq, 1, gsi)

    def start_remote(self) -> None:
        self._remote = RemoteThread(self.directory)
        self._remote.add(IrqLine, "line0", parse_devfn("05.0"))
        self._remote.add(IrqLineOnPinC, "line1", parse_devfn("06.0"))
        self._remote.start()

    def stop_remote(self) -> None:
        remote, self._remote = self._remote, None
        if remote is not None:
            remote.close()

    def close(self) -> None:
        self.stop_remote()
        self.board.abort()
        self.board.close()
        self._irqchip.close()
        self.loop.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with no_fd_is_left(), closing(Bench(tmp_path)) as bench:
        yield bench


def test_the_vm_is_described(bench: Bench) -> None:
    bench.board.start("soft", None)
    status = bench.status()
    status.pop("functions")
    assert status == {
        "vm": "vm1",
        "pid": os.getpid(),
        "kind": "soft",
        "irqchip": "soft",
        "tsc_khz": None,
        "attached": None,
        "reason": None,
        "amiss": [],
    }


def test_the_irqchip_of_a_vm_without_kvm_is_named_as_the_way_to_it(tmp_path: Path) -> None:
    options = ["--name=vm1", f"--runtime-dir={tmp_path}", "--vm=soft", "--device=id=line0"]
    child = Child("proxyd", options, tmp_path)
    try:
        assert call(tmp_path / "proxyd.varlink", "org.iohub.Proxyd.Status")["irqchip"] == "soft"
    finally:
        child.kill()


def test_the_guests_tsc_frequency_is_told_where_it_is_known(bench: Bench) -> None:
    bench.board.start("kvm", 2_600_000)
    assert bench.status()["tsc_khz"] == 2_600_000


def test_functions_without_a_remote(bench: Bench) -> None:
    bench.board.start("soft", None)
    assert bench.status()["functions"] == [
        {
            "id": name,
            "addr": addr,
            "connected": False,
            "decoded": None,
            "reconnects": 0,
            "amiss": [],
            "pin": None,
            "gsi": None,
            "remote_pid": None,
            "remote_name": None,
            "answer_mean_us": None,
            "answer_max_us": None,
            "polled_ms": 0,
            "reason": f"no link: {bench.directory}/{name}.sock: No such file or directory",
        }
        for name, addr in ADDRESSES.items()
    ]


def test_what_modules_say_is_amiss_is_told_of_the_function_and_of_the_vm(bench: Bench) -> None:
    bench.board.start("soft", None)
    bench.board._state.amiss.add(lambda: ["the guest is paused"])
    bench.board._proxies[0].amiss.add(lambda: ["slow"])
    assert bench.status()["amiss"] == ["the guest is paused"]
    functions = bench.functions()
    assert (functions["line0"]["amiss"], functions["line1"]["amiss"]) == (["slow"], [])


def test_pins_routes_and_the_remote_are_told(bench: Bench) -> None:
    bench.start_remote()
    bench.board.start("soft", None)
    line0, line1 = bench.functions().values()
    assert (line0["pin"], line1["pin"]) == (1, 3)
    assert line0["gsi"] is None
    bench.route(0, 10)  # 05.0 INTA is on PIRQA
    assert bench.functions()["line0"]["gsi"] == 10
    bench.route(0, 11)
    line0, line1 = bench.functions().values()
    assert line0["gsi"] == 11
    assert line0["remote_pid"] == os.getpid()
    assert line0["remote_name"] == Path("/proc/self/comm").read_text().rstrip("\n")
    bench.route(0, 0x80)
    assert bench.functions()["line0"]["gsi"] is None


def test_a_lost_remote_is_told_and_its_return_counted(bench: Bench) -> None:
    bench.start_remote()
    bench.board.start("soft", None)
    bench.route(0, 10)
    for times in range(1, 3):
        bench.stop_remote()
        run_until(bench.loop, lambda: not any(f["connected"] for f in bench.functions().values()))
        line0 = bench.functions()["line0"]
        assert line0["gsi"] is None
        assert line0["remote_pid"] is None
        assert line0["pin"] == 1
        assert line0["reason"].startswith(("link lost: ", "no link: "))
        bench.start_remote()
        run_until(bench.loop, lambda: all(f["connected"] for f in bench.functions().values()))
        line0 = bench.functions()["line0"]
        assert (line0["reconnects"], line0["gsi"]) == (times, 10)
        assert line0["reason"] is None


class Unlinked:
    """A function without a link."""

    name = "line0"
    devfn = 0
    reconnects = 0
    pin = gsi = None
    remote: PeerCredentials | None = None

    def __init__(self, reason: str) -> None:
        self.reason = reason
        self.amiss = Amiss()
        self.answer_times = self.polled_seconds = None
        self.is_decoded = None


def test_a_reason_is_one_line_whatever_a_peer_has_said() -> None:
    state = VmState("vm1", "soft", "soft", None, [Unlinked(""), Unlinked("QEMU: no\n" + 4096 * "o")])
    interface = ProxydService(state)
    functions = status_of(interface)["functions"]
    silent, loud = (function["reason"] for function in functions)
    assert silent == "not connected yet"
    assert loud.startswith("QEMU: no\\noooo")
    assert len(loud) < 300


def test_a_link_that_outlives_its_remote_is_that_of_the_next_one(tmp_path: Path) -> None:
    """Which listens at the control socket; until it does, the one before is told."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    function = Unlinked("")
    function.remote = PeerCredentials(ended.pid, 0, 0)
    control = tmp_path / "remoted.varlink"
    interface = ProxydService(VmState("vm1", "soft", "soft", None, [function], str(control)))
    assert status_of(interface)["functions"][0]["remote_pid"] == ended.pid
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(control))
        listener.listen()
        assert status_of(interface)["functions"][0]["remote_pid"] == os.getpid()
        function.remote = PeerCredentials(1, 0, 0)
        assert status_of(interface)["functions"][0]["remote_pid"] == 1


def test_the_qemu_that_has_the_functions_is_told_or_why_there_is_none() -> None:
    state = VmState("vm1", "qmp:x", "kvm", None, [])
    interface = ProxydService(state)
    state.reason = "no QEMU:\nwaiting"
    status = status_of(interface)
    assert status["reason"] == "no QEMU:\\nwaiting"
    assert status["attached"] is None
    state.attached, state.reason = "qemu[42]", None
    status = status_of(interface)
    assert status["attached"] == "qemu[42]"
    assert status["reason"] is None


def test_close_removes_the_socket(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.board.start("soft", None)
    assert (tmp_path / "proxyd.varlink").exists()
    bench.close()
    assert not list(tmp_path.iterdir())
