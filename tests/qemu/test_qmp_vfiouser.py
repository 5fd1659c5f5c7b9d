# SPDX-License-Identifier: GPL-2.0-or-later
"""proxyd beside a QEMU with vfio-user-pci: what it plugs, adopts, watches, replaces and unplugs."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from common.control import call
from common.ctl.children import Child
from tests.support.monitorclient import MonitorClient
from tests.support.qemu import Qemu
from tests.support.qmpbench import RAM, QmpBench
from tests.support.wait import wait_until

EDU = ("edu", "id=edu0", "addr=05.0", "transport=vfio-user")
SERIAL = ("pci-serial", "id=com1", "addr=06.0", "transport=vfio-user")
PLUGGED = {"edu0": "child<vfio-user-pci>", "com1": "child<vfio-user-pci>"}

Start = Callable[..., tuple[QmpBench, MonitorClient]]


@pytest.fixture
def start(tmp_path: Path, vfio_user_qemu: str, requires_kvm: None) -> Iterator[Start]:
    """Starts remoted and QEMU; proxyd doesn't run, yet."""
    with ExitStack() as opened:

        def start(*devices: tuple[str, ...], accelerator: str = "kvm") -> tuple[QmpBench, MonitorClient]:
            bench = QmpBench(tmp_path, *devices, program=vfio_user_qemu, accelerator=accelerator)
            opened.callback(bench.close)
            bench.start_remoted()
            return bench, bench.start_guest()

        yield start


@pytest.fixture
def pair(start: Start) -> tuple[QmpBench, MonitorClient]:
    return start(EDU, SERIAL)


@pytest.fixture
def bench(pair: tuple[QmpBench, MonitorClient]) -> QmpBench:
    return pair[0]


@pytest.fixture
def monitor(pair: tuple[QmpBench, MonitorClient]) -> MonitorClient:
    return pair[1]


def linked_to(bench: QmpBench) -> set[int]:
    """The processes that proxyd shows at the functions' links."""
    return {function["remote_pid"] for function in bench.status("proxyd").values() if function["connected"]}


def test_plugs_devices_whose_interrupts_arrive(bench: QmpBench, monitor: MonitorClient) -> None:
    bench.start_proxyd()
    assert monitor.plugged() == PLUGGED
    bench.run_guest(rounds=100)
    assert linked_to(bench) == {bench.remoted.process.pid}


def test_leaves_them_plugged_at_its_end_and_adopts_them_at_its_start(
    bench: QmpBench, monitor: MonitorClient
) -> None:
    bench.start_proxyd()
    bench.run_guest()
    fds = bench.settled_fds()
    assert bench.end_proxyd() == 0
    bench.check_interrupts()
    for _ in range(2):
        bench.start_proxyd()
        bench.wait_linked(0)
        bench.check_interrupts()
        bench.proxyd.kill()
    assert monitor.plugged() == PLUGGED
    assert linked_after_a_start(bench) == {bench.remoted.process.pid}
    assert bench.settled_fds() == fds


def linked_after_a_start(bench: QmpBench) -> set[int]:
    bench.start_proxyd()
    return linked_to(bench)


def test_rounds_of_plugging_and_unplugging_leave_no_fd_behind(
    bench: QmpBench, monitor: MonitorClient
) -> None:
    bench.plug_and_unplug(monitor, 5)


def test_replaces_what_has_lost_its_remoted(bench: QmpBench) -> None:
    """Until the guest has ejected it, log and status say that QEMU is at risk."""
    bench.start_proxyd(module="tests.support.hastyproxyd")
    bench.run_guest(rounds=4)
    for number in range(1, 4):
        bench.remoted.kill()
        bench.wait_log(
            "tests.support.hastyproxyd", "has ended: the guest reads all ones, and QEMU aborts", number
        )
        reasons = [function["reason"] for function in bench.status("proxyd").values()]
        assert all("QEMU aborts if the guest is reset" in reason for reason in reasons)
        bench.eject(5, 6)
        bench.start_remoted()
        bench.wait_linked(number)
        bench.run_guest(rounds=4)


def test_notices_that_a_link_has_ended_although_remoted_goes_on(bench: QmpBench, tmp_path: Path) -> None:
    """It is started anew where the first one was, which has been stopped: proxyd looks at remoted's state."""
    bench.start_proxyd(module="tests.support.hastyproxyd")
    first = bench.remoted
    first.process.send_signal(signal.SIGSTOP)
    for name in ("remoted.varlink", "edu0.sock", "com1.sock"):
        (tmp_path / name).unlink()
    bench.start_remoted()
    bench.wait_log("tests.support.hastyproxyd", "has ended: the guest reads all ones, and QEMU aborts if", 2)
    first.kill()


def test_both_transports_in_one_vm(start: Start) -> None:
    bench, monitor = start(EDU[:3], SERIAL)
    bench.start_proxyd()
    assert monitor.plugged() == PLUGGED | {"edu0": "child<x-pci-proxy-dev>"}
    bench.run_guest(rounds=20)


def test_works_without_kvm(start: Start) -> None:
    bench, monitor = start(EDU, accelerator="tcg")
    bench.start_proxyd()
    assert monitor.plugged() == {"edu0": PLUGGED["edu0"]}
    status = call(bench.directory / "proxyd.varlink", "org.iohub.Proxyd.Status")
    assert status["irqchip"] == "qemu"
    assert bench.command("setup").result.number("functions") == 1
    wait_until(lambda: bench.status("remoted")["edu0"]["accesses"] > 0, "the guest reaches it")


class Q35:
    """A machine whose root bus takes no devices while it runs; it has ``ports`` PCI Express ports."""

    def __init__(self, directory: Path, program: str, ports: int) -> None:
        self._monitor_path = directory / "qmp"
        self._ours = directory / "qmp.test"
        options = [word for n in range(ports) for word in ("-device", f"pcie-root-port,id=rp{n},chassis={n}")]
        for path in (self._monitor_path, self._ours):
            options += ["-qmp", f"unix:{path},server=on,wait=off"]
        self.qemu = Qemu(
            [*RAM, "-machine", "q35,accel=tcg,memory-backend=ram0", "-m", "64", "-display", "none", *options],
            program=program,
        )
        self.vm = f"--vm=qmp:{self._monitor_path}"

    def monitor(self) -> MonitorClient:
        """The test's own."""
        return MonitorClient(self._ours)


@pytest.fixture
def pair_of(
    tmp_path: Path, vfio_user_qemu: str
) -> Iterator[Callable[..., tuple[MonitorClient, Child, Child]]]:
    """A q35 with both daemons: its monitor, remoted and proxyd."""
    with ExitStack() as opened:

        def pair_of(ports: int, *devices: str) -> tuple[MonitorClient, Child, Child]:
            machine = Q35(tmp_path, vfio_user_qemu, ports)
            opened.callback(machine.qemu.close)
            monitor = opened.enter_context(machine.monitor())
            common = [
                "--name=test",
                f"--runtime-dir={tmp_path}",
                *(f"--device={device}" for device in devices),
            ]
            remoted = Child("remoted", common, tmp_path)
            opened.callback(remoted.kill)
            options = [option.replace("edu,", "") for option in common]
            proxyd = Child("proxyd", [*options, machine.vm], tmp_path, deadline=60.0)
            opened.callback(proxyd.kill)
            return monitor, remoted, proxyd

        yield pair_of


def bus_of(monitor: MonitorClient, name: str) -> tuple[str, int]:
    path = f"/machine/peripheral/{name}"
    bus = monitor.execute("qom-get", path=path, property="parent_bus")
    return bus.rpartition("/")[2], monitor.execute("qom-get", path=path, property="addr")


def test_each_slot_has_a_pci_express_port_of_its_own(
    pair_of: Callable[..., tuple[MonitorClient, Child, Child]],
) -> None:
    """Functions of one slot share it."""
    options = "edu,id={},addr={},transport=vfio-user"
    devices = [options.format(*each) for each in (("one", "05.0"), ("two", "05.1"), ("three", "06.0"))]
    monitor, _, proxyd = pair_of(2, *devices)
    places = {name: bus_of(monitor, name) for name in ("one", "two", "three")}
    assert places["one"] == (places["two"][0], 0)
    assert places["two"][1] == 1
    assert {places["one"], places["three"]} == {("rp0", 0), ("rp1", 0)}
    assert f"plugged at 00.0 of {places['one'][0]}, served by" in proxyd.log.read_text()


def test_without_a_free_port_it_says_which_option_makes_one(
    pair_of: Callable[..., tuple[MonitorClient, Child, Child]], tmp_path: Path
) -> None:
    options = "edu,id={},addr={},transport=vfio-user"
    monitor, _, _ = pair_of(1, *(options.format(*each) for each in (("one", "05.0"), ("two", "06.0"))))
    plugged = monitor.plugged()
    assert len(plugged.keys() & {"one", "two"}) == 1
    status = call(tmp_path / "proxyd.varlink", "org.iohub.Proxyd.Status")["functions"]
    (reason,) = [function["reason"] for function in status if not function["connected"]]
    assert reason.startswith(
        "QEMU refuses to plug it: no PCI Express port is free: start QEMU with -device pcie"
    )


def test_what_shows_msix_is_never_unplugged(start: Start) -> None:
    """QEMU 11.1 would abort at that."""
    bench, monitor = start(("nvme", "id=disk0", "addr=05.0", "transport=vfio-user", "drive=memory:1M"))
    bench.start_proxyd("--unplug-on-exit")
    assert bench.end_proxyd() == 0
    assert "disk0: warning: it stays plugged: QEMU would abort at the unplug of a device" in bench.log(
        "proxyd"
    )
    bench.start_proxyd()
    bench.remoted.kill()
    bench.wait_log("proxyd", "and at the unplug as well, since the device shows MSI-X: shut the guest down")
    assert not bench.asked_to_eject(5)
    assert monitor.plugged() == {"disk0": "child<vfio-user-pci>"}
    assert monitor.execute("query-status")["running"]


def test_a_reload_plugs_and_unplugs(bench: QmpBench, monitor: MonitorClient) -> None:
    file = bench.directory / "vm.toml"

    def write(*devices: tuple[str, ...]) -> None:
        tables = [
            "\n".join('{} = "{}"'.format(*each.split("=")) for each in device[1:]) for device in devices
        ]
        file.write_text("\n[[device]]\n".join([f'vm = "qmp:{bench.monitor_path}"', *tables]))

    write(EDU)
    bench.start_proxyd_from(file)
    assert monitor.plugged() == {"edu0": PLUGGED["edu0"]}
    write(SERIAL)
    bench.proxyd.process.send_signal(signal.SIGHUP)
    bench.wait_log("proxyd", "com1: plugged at 06.0")
    bench.eject(5)
    bench.wait_log("proxyd", "edu0: unplugged")
    assert monitor.plugged() == {"com1": PLUGGED["com1"]}
