# SPDX-License-Identifier: GPL-2.0-or-later
"""Who serves a device, or waits for QEMU to connect, as remoted's control socket and the devices' own tell."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.config import DeviceConfig, Transport
from common.ctl.children import Child
from common.errors import PeerGone
from common.peer import PeerCredentials
from proxyd.vm.qmp.servers import find_servers, find_unlinked, find_waiting
from tests.support.wait import wait_until

STRANGER = 54321


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="module")
def remoted(directory: Path) -> Iterator[Child]:
    devices = [f"--device=edu,id={name},transport=vfio-user" for name in "ab"]
    devices.append("--device=edu,id=other")
    remoted = Child("remoted", ["--name=vm", f"--runtime-dir={directory}", *devices], directory)
    yield remoted
    remoted.kill()


@pytest.fixture
def control(directory: Path, remoted: Child) -> str:
    return str(directory / "remoted.varlink")


def waiting(control: str, name: str, path: Path, *, is_others: bool = False) -> PeerCredentials:
    return asyncio.run(find_waiting(control, name, str(path), is_others=is_others))


def test_a_device_waits_unless_it_has_a_client(control: str, directory: Path, remoted: Child) -> None:
    path = directory / "a.sock"
    assert waiting(control, "a", path).pid == remoted.process.pid
    assert asyncio.run(find_unlinked(control)) == {"a", "b", "other"}
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        wait_until(lambda: asyncio.run(find_unlinked(control)) == {"b", "other"}, "it is served")
        with pytest.raises(PeerGone, match=r"a\.sock: .*\[\d+\] serves another client there"):
            waiting(control, "a", path)
        devices = [DeviceConfig(name, None, 16, None, None, None, {}, Transport.VFIO_USER) for name in "ab"]
        servers = asyncio.run(find_servers(control, devices, lambda device: str(directory / device.id)))
        assert servers["b"] is None
        assert servers["a"] is not None
        assert servers["a"].pid == remoted.process.pid


def test_a_device_of_another_transport_is_not_shown_to_qemu(control: str, directory: Path) -> None:
    """QEMU would stand still for seconds at each attempt, and abort in the end."""
    with pytest.raises(
        PeerGone, match=r"other\.sock: .* has the device with transport=mpqemu: give both daemons"
    ):
        waiting(control, "other", directory / "other.sock")


def test_a_device_that_nobody_has_is_waited_for(control: str, directory: Path, tmp_path: Path) -> None:
    for where in (control, str(tmp_path / "absent")):
        with pytest.raises(PeerGone, match="no iohub-remoted answers that has the device"):
            waiting(where, "c", directory / "c.sock")
    assert asyncio.run(find_unlinked(str(tmp_path / "absent"))) == set()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make files of other users")
def test_another_programs_socket_must_be_there_and_a_trusted_users(tmp_path: Path) -> None:
    absent, path = str(tmp_path / "absent"), tmp_path / "other.sock"
    with pytest.raises(PeerGone, match=r"other\.sock: No such file or directory"):
        waiting(absent, "c", path, is_others=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        assert waiting(absent, "c", path, is_others=True).pid == 0
        os.chown(path, STRANGER, STRANGER)
        with pytest.raises(PeerGone, match="who is not trusted"):
            waiting(absent, "c", path, is_others=True)


def test_what_is_plugged_without_remoted_is_served_by_another_program_only(tmp_path: Path) -> None:
    """A server that a client is connected to can't be asked."""
    own = DeviceConfig("a", None, 16, None, None, None, {}, Transport.VFIO_USER)
    others = own._replace(id="b", socket="/x.sock")
    absent = str(tmp_path / "absent")
    servers = asyncio.run(find_servers(absent, [own, others], lambda device: str(tmp_path / device.id)))
    assert servers == {"b": PeerCredentials(0, 0, 0)}
