# SPDX-License-Identifier: GPL-2.0-or-later
"""The configuration: what both daemons read from a file and from options."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common.config import Transport, VmConfig, default_runtime_dir, parse_proxyd, parse_remoted
from common.errors import UsageError
from common.pci import format_devfn
from tests.support.vmconfigs import FILE, Parse, proxyd, remoted


def addresses(config: VmConfig) -> dict[str, str]:
    return {device.id: format_devfn(device.devfn) for device in config.devices}


def test_remoted_takes_a_device_in_qemus_style() -> None:
    [device] = remoted("pci-serial,id=com1,addr=1f.7,chardev=file:/tmp/a,,b=c,socket=/tmp/com1").devices
    assert (device.id, device.model, device.devfn) == ("com1", "pci-serial", 255)
    assert device.properties == {"chardev": "file:/tmp/a,b=c"}
    assert (device.socket, device.fd, device.gsi) == ("/tmp/com1", None, None)


def test_a_triple_comma_is_a_comma_and_an_end() -> None:
    [device] = remoted("edu,id=a,name=x,,,other=y").devices
    assert device.properties == {"name": "x,", "other": "y"}


def test_remoted_takes_an_inherited_fd() -> None:
    assert remoted("edu,id=a,fd=0").devices[0].fd == 0


def test_proxyd_takes_a_device_without_a_model() -> None:
    argv = ["--name", "vm1", "--vm", "pid:1", "--device", "id=com1,addr=05.0,gsi=4095,socket=/tmp/com1"]
    [device] = parse_proxyd(argv).devices
    assert (device.model, device.devfn, device.gsi, device.socket) == (None, 40, 4095, "/tmp/com1")


def test_both_daemons_know_a_devices_transport(tmp_path: Path) -> None:
    path = tmp_path / "vm1.toml"
    path.write_text(
        'name = "vm1"\n[[device]]\nid = "a"\nmodel = "edu"\ntransport = "vfio-user"\n'
        '[[device]]\nid = "b"\nmodel = "edu"\n'
    )
    for parse in (parse_remoted, parse_proxyd):
        config = parse(["--config", str(path)])
        assert [device.transport for device in config.devices] == [Transport.VFIO_USER, Transport.MPQEMU]
    assert remoted("edu,id=a,transport=vfio-user").devices[0].transport is Transport.VFIO_USER
    assert proxyd("id=a,transport=mpqemu").devices[0].transport is Transport.MPQEMU


def test_a_devices_msix_can_be_off(tmp_path: Path) -> None:
    path = tmp_path / "vm1.toml"
    table = '[[device]]\nid = "{}"\nmodel = "edu"\ntransport = "vfio-user"\n'
    path.write_text(f'name = "vm1"\n{table.format("a")}msix = false\n{table.format("b")}')
    for parse in (parse_remoted, parse_proxyd):
        assert [device.msix for device in parse(["--config", str(path)]).devices] == [False, True]
    assert not remoted("edu,id=a,transport=vfio-user,msix=off").devices[0].msix
    assert remoted("edu,id=a,transport=vfio-user,msix=on").devices[0].msix


@pytest.mark.parametrize("given", ["0", "1000"])
def test_the_limit_of_polling_is_the_files_or_the_command_lines(tmp_path: Path, given: str) -> None:
    path = tmp_path / "vm1.toml"
    path.write_text(f'name = "vm1"\npoll-max-us = {given}\n')
    for parse in (parse_remoted, parse_proxyd):
        assert parse(["--config", str(path)]).poll_max_us == int(given)
        assert parse(["--config", str(path), "--poll-max-us", "70"]).poll_max_us == 70


@pytest.mark.parametrize("given", ["-1", "1001", "5us", "", "1e2"])
def test_bad_limit_of_polling(tmp_path: Path, given: str) -> None:
    with pytest.raises(UsageError, match=rf"^--poll-max-us: '{given}' is not an integer from 0 to 1000$"):
        parse_remoted(["--name", "vm1", f"--poll-max-us={given}"])
    path = tmp_path / "vm1.toml"
    path.write_text(f'name = "vm1"\npoll-max-us = "{given}"\n')
    with pytest.raises(UsageError, match=r"vm1.toml: poll-max-us: must be an integer$"):
        parse_remoted(["--config", str(path)])


@pytest.mark.parametrize("kind", ["embedded", "soft", "qmp:/run/a b.sock", "pid:1"])
def test_ways_to_the_vm(kind: str) -> None:
    assert parse_proxyd(["--name", "vm1", "--vm", kind]).vm == kind


def test_the_guest_of_ones_own_is_the_default() -> None:
    assert parse_proxyd(["--name", "vm1"]).vm == "embedded"


@pytest.mark.parametrize("parse", [parse_remoted, parse_proxyd])
def test_one_file_serves_both(parse: Parse, file: str) -> None:
    config = parse(["--config", file])
    assert (config.name, config.runtime_dir, config.vm) == ("vm1", "/tmp/vm1", "pid:1")
    com1, edu0 = config.devices
    assert com1.properties == {"chardev": "pty", "speed": "9600", "loud": "on", "quiet": "off"}
    assert (com1.model, com1.devfn) == ("pci-serial", 40)
    assert (edu0.socket, edu0.gsi) == ("/tmp/edu.sock", 11)
    assert [config.socket_path(device) for device in config.devices] == [
        "/tmp/vm1/com1.sock",
        "/tmp/edu.sock",
    ]


def test_proxyd_needs_no_model_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "vm.toml"
    path.write_text('name = "vm1"\n[[device]]\nid = "a"\n')
    assert parse_proxyd(["--config", str(path)]).devices[0].model is None
    with pytest.raises(UsageError, match=r"vm.toml: device 'a': the model is missing"):
        parse_remoted(["--config", str(path)])


def test_the_command_line_wins(file: str) -> None:
    config = parse_remoted(
        [
            "--config",
            file,
            "--name",
            "vm2",
            "--runtime-dir",
            "/tmp/vm2",
            "--device",
            "pci-serial,id=com2",
            "--device",
            "edu,id=com1,chardev=null,speed=1",
        ]
    )
    assert (config.name, config.runtime_dir) == ("vm2", "/tmp/vm2")
    assert [device.id for device in config.devices] == ["com1", "edu0", "com2"]
    com1 = config.devices[0]
    assert (com1.model, com1.devfn) == ("edu", 40), "the address is the file's, the model isn't"
    assert com1.properties == {"chardev": "null", "speed": "1", "loud": "on", "quiet": "off"}


def test_where_clients_come_from_is_one_choice(file: str) -> None:
    edu0 = parse_remoted(["--config", file, "--device", "id=edu0,fd=3"]).devices[1]
    assert (edu0.model, edu0.fd, edu0.socket) == ("edu", 3, None)
    Path(file).write_text(FILE.replace('socket = "/tmp/edu.sock"', "fd = 3"))
    edu0 = parse_remoted(["--config", file, "--device", "id=edu0,socket=/x"]).devices[1]
    assert (edu0.model, edu0.fd, edu0.socket) == ("edu", None, "/x")


def test_inherited_fds_are_none_of_proxyds_business(file: str) -> None:
    Path(file).write_text("""
        name = "vm1"
        device = [{id = "a", model = "edu", fd = 3}, {id = "b", model = "edu", fd = 3}]
    """)
    with pytest.raises(UsageError, match=r"vm1.toml: device 'b': fd 3 is taken by device 'a'"):
        parse_remoted(["--config", file])
    config = parse_proxyd(["--config", file, "--runtime-dir", "/tmp/vm1"])
    assert [config.socket_path(device) for device in config.devices] == ["/tmp/vm1/a.sock", "/tmp/vm1/b.sock"]


def test_the_vm_option_wins(file: str) -> None:
    assert parse_proxyd(["--config", file, "--vm", "pid:2"]).vm == "pid:2"


def test_free_slots_are_given_in_order() -> None:
    config = remoted("edu,id=a", "edu,id=b,addr=03.4", "edu,id=c", "edu,id=d,addr=02.0", "edu,id=e")
    assert addresses(config) == {"a": "04.0", "b": "03.4", "c": "05.0", "d": "02.0", "e": "06.0"}


def test_a_full_bus() -> None:
    devices = [f"edu,id=d{number}" for number in range(30)]
    assert addresses(remoted(*devices))["d29"] == "1f.0"
    with pytest.raises(UsageError, match="no slot is free"):
        remoted(*devices, "edu,id=d30")


def test_every_address_can_be_given() -> None:
    config = remoted(*(f"edu,id=d{devfn},addr={format_devfn(devfn)}" for devfn in range(256)))
    assert [device.devfn for device in config.devices] == list(range(256))


def test_default_runtime_dir() -> None:
    assert default_runtime_dir("vm1", 0, {"XDG_RUNTIME_DIR": "/run/user/0"}) == "/run/iohub/vm1"
    assert default_runtime_dir("vm1", 7, {"XDG_RUNTIME_DIR": "/run/user/7"}) == "/run/user/7/iohub/vm1"
    for environ in ({}, {"XDG_RUNTIME_DIR": ""}, {"XDG_RUNTIME_DIR": "run"}):
        with pytest.raises(UsageError, match="--runtime-dir"):
            default_runtime_dir("vm1", 7, environ)


def test_the_longest_socket_path() -> None:
    directory = "/tmp" + "/ä" * 29  # 91 bytes; the file adds 16, as remoted.varlink does
    argv = ["--name", "vm1", "--runtime-dir", directory, "--device"]
    config = parse_remoted([*argv, "edu,id=abcdefghij"])
    assert len(os.fsencode(config.socket_path(config.devices[0]))) == 107
    with pytest.raises(UsageError, match=r"108 bytes, .* at most 107"):
        parse_remoted([*argv, "edu,id=abcdefghijk"])
    assert parse_remoted([*argv, "edu,id=abcdefghijk,fd=3"]).devices[0].fd == 3, "no path is needed"
    with pytest.raises(UsageError, match=r"^--runtime-dir: \S+/remoted.varlink: 108 bytes, .* at most 107$"):
        parse_remoted(["--name", "vm1", "--runtime-dir", directory + "x", "--device", "edu,id=a"])
    socket = "x" * 108
    with pytest.raises(UsageError, match=rf"^--vm: {socket}: 108 bytes, .* at most 107$"):
        parse_proxyd(["--name", "vm1", "--runtime-dir", "/tmp", "--vm", f"qmp:{socket}"])
    parse_proxyd(["--name", "vm1", "--runtime-dir", "/tmp", "--vm", f"qmp:{socket[1:]}"])
