# SPDX-License-Identifier: GPL-2.0-or-later
"""SIGHUP to remoted: devices come and go, and those that stay notice nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common import mpqemu
from common.control import call
from common.ctl.children import Child
from common.link import Client
from common.mpqemu import Command
from tests.support.asleep import settled_log
from tests.support.fds import settled_fds
from tests.support.wait import wait_until

DEVICE = """
[[device]]
model = "{model}"
id = "{id}"
addr = "{addr}"
"""


class Reloaded:
    """remoted, and the file that it has its devices from: model and addr by id."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = directory / "vm.toml"
        self.write(a=("edu", "05.0"), b=("edu", "06.0"))
        self.daemon = Child("remoted", [f"--config={self.file}", f"--runtime-dir={directory}"], directory)

    def write(self, **devices: tuple[str, str]) -> None:
        blocks = [DEVICE.format(id=name, model=model, addr=addr) for name, (model, addr) in devices.items()]
        self.file.write_text("\n".join(['name = "vm1"', *blocks]))

    def reload(self, **devices: tuple[str, str]) -> None:
        self.write(**devices)
        self.hang_up()

    def hang_up(self) -> None:
        """SIGHUP; returns when it has been dealt with."""
        count = self.log().count("reloaded:")
        self.daemon.process.send_signal(signal.SIGHUP)
        wait_until(lambda: self.log().count("reloaded:") > count, "the daemon has reloaded, or said why not")

    def log(self) -> str:
        return settled_log(self.daemon)

    def models(self) -> dict[str, str]:
        functions = call(self.directory / "remoted.varlink", "org.iohub.Remoted.Status")["functions"]
        return {function["id"]: f"{function['model']} at {function['addr']}" for function in functions}

    def connect(self, name: str) -> Client:
        return Client.connect(str(self.directory / f"{name}.sock"), 5.0)

    def sockets(self) -> set[str]:
        return {path.stem for path in self.directory.glob("*.sock")}


@pytest.fixture
def reloaded(tmp_path: Path) -> Iterator[Reloaded]:
    reloaded = Reloaded(tmp_path)
    yield reloaded
    reloaded.daemon.kill()


def vendor(client: Client) -> int:
    return client.request(Command.PCI_CFGREAD, mpqemu.CONFIG.pack(0, 0, 2))


def test_one_is_added_one_removed_and_one_goes_on(reloaded: Reloaded) -> None:
    client = reloaded.connect("a")
    assert client.request(Command.PCI_CFGWRITE, mpqemu.CONFIG.pack(0x3C, 0x5A, 1)) == 0
    fds = settled_fds(reloaded.daemon.process.pid)
    reloaded.reload(a=("edu", "05.0"), c=("irq-line", "07.0"))
    assert reloaded.models() == {"a": "edu at 05.0", "c": "irq-line at 07.0"}
    assert reloaded.sockets() == {"a", "c"}
    assert client.request(Command.PCI_CFGREAD, mpqemu.CONFIG.pack(0x3C, 0, 1)) == 0x5A
    other = reloaded.connect("c")
    assert vendor(other) == 0x1234
    other.close()
    assert settled_fds(reloaded.daemon.process.pid) == fds
    client.close()


def test_one_that_is_in_use_goes_when_its_client_does(reloaded: Reloaded) -> None:
    client = reloaded.connect("b")
    assert vendor(client) == 0x1234
    reloaded.reload(a=("edu", "05.0"))
    assert reloaded.sockets() == {"a"}
    assert vendor(client) == 0x1234
    assert set(reloaded.models()) == {"a", "b"}
    client.close()
    wait_until(lambda: set(reloaded.models()) == {"a"}, "it is removed")


def test_one_that_differs_is_made_anew_when_its_client_has_gone(reloaded: Reloaded) -> None:
    """Another model at the same address, and another id; both wait for the same client."""
    client = reloaded.connect("b")
    assert vendor(client) == 0x1234
    reloaded.reload(a=("edu", "05.0"), b=("pci-serial", "06.0"))
    assert reloaded.models()["b"] == "edu at 06.0"
    reloaded.reload(a=("edu", "05.0"), d=("pci-serial", "06.0"))
    assert set(reloaded.models()) == {"a", "b"}
    client.close()
    wait_until(lambda: set(reloaded.models()) == {"a", "d"}, "its successor is there")
    successor = reloaded.connect("d")
    assert vendor(successor) == 0x1B36
    successor.close()


def test_the_only_one_may_be_replaced(reloaded: Reloaded) -> None:
    """A daemon without listeners and clients would end; this one has a device to create."""
    reloaded.reload(a=("edu", "05.0"))
    client = reloaded.connect("a")
    assert vendor(client) == 0x1234
    reloaded.reload(a=("irq-line", "05.0"))
    client.close()
    wait_until(lambda: reloaded.models() == {"a": "irq-line at 05.0"}, "it is replaced")


def test_a_second_function_in_a_slot_makes_the_first_anew(reloaded: Reloaded) -> None:
    """Its header type has to tell guests of it."""
    reloaded.reload(a=("edu", "05.0"), b=("edu", "06.0"), c=("edu", "05.1"))
    client = reloaded.connect("a")
    assert client.request(Command.PCI_CFGREAD, mpqemu.CONFIG.pack(0x0E, 0, 1)) == 0x80
    client.close()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda text: text + "colour =", "vm.toml"),
        (lambda text: text.replace('addr = "06.0"', 'addr = "05.0"'), "05.0"),
        (lambda text: text.replace("vm1", "vm2"), "name can't change while the daemon runs: restart it"),
        (lambda text: text.partition("[[")[0], "no devices: stop the daemon instead"),
    ],
    ids=["bad syntax", "one address twice", "another VM", "no devices"],
)
def test_a_configuration_that_is_unfit_changes_nothing(
    reloaded: Reloaded, change: Callable[[str], str], line: str
) -> None:
    client = reloaded.connect("a")
    reloaded.file.write_text(change(reloaded.file.read_text()))
    reloaded.hang_up()
    (logged,) = [each for each in reloaded.log().splitlines() if "not reloaded:" in each]
    assert line in logged
    assert reloaded.models() == {"a": "edu at 05.0", "b": "edu at 06.0"}
    assert vendor(client) == 0x1234
    client.close()


def test_a_model_that_fails_is_left_out(reloaded: Reloaded) -> None:
    reloaded.reload(a=("edu", "05.0"), b=("edu", "06.0"), c=("no.such:Model", "07.0"))
    assert set(reloaded.models()) == {"a", "b"}
    assert "c: error: not added:" in reloaded.log()
    reloaded.reload(a=("edu", "05.0"), b=("edu", "06.0"), c=("irq-line", "07.0"))
    assert set(reloaded.models()) == {"a", "b", "c"}


def test_without_a_file_the_signal_ends_it(tmp_path: Path) -> None:
    daemon = Child("remoted", ["--name=vm1", f"--runtime-dir={tmp_path}", "--device=edu,id=a"], tmp_path)
    os.kill(daemon.process.pid, signal.SIGHUP)
    assert daemon.process.wait(20.0) == -signal.SIGHUP
