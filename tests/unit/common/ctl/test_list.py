# SPDX-License-Identifier: GPL-2.0-or-later
"""iohubctl list, and where iohubctl looks for a VM's runtime directory."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from common.config import DeviceConfig, VmConfig
from common.ctl import main as ctl
from common.ctl import vms
from common.ctl.list import show_list
from common.ctl.vms import find_runtime_dir, runtime_roots
from common.errors import IohubError, UsageError
from common.pci import parse_devfn
from common.trust import Trust
from remoted.main import Remoted
from tests.support.loops import running


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A root with a VM whose remoted runs, and one whose proxyd has died."""
    root = tmp_path / "iohub"
    for name in ("vm1", "vm2", "stopped", "no VM name"):
        (root / name).mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(root / "vm2" / "proxyd.varlink"))
    device = DeviceConfig(
        "line0", "remoted.devices.irq_line:IrqLine", parse_devfn("05.0"), None, None, None, {}
    )
    with ExitStack() as stack:
        remoted = Remoted(VmConfig("vm1", str(root / "vm1"), "soft", (device,)))
        stack.callback(remoted.close)
        stack.enter_context(running(remoted._loop))
        yield root


def test_each_vm_with_a_control_socket_has_a_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show_list([root], Trust(), json=False) == 1
    assert capsys.readouterr().out.splitlines() == [
        "REMOTED  PROXYD  FUNCTIONS  AMISS  VM",
        f"{os.getpid():>7}       -          1      2  vm1",
        "      -       -          0      2  vm2",
    ]


def test_json_tells_what_is_amiss(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show_list([root], Trust(), json=True) == 1
    vm1, vm2 = json.loads(capsys.readouterr().out)
    assert (vm1["vm"], vm1["directory"], vm1["functions"]) == ("vm1", str(root / "vm1"), 1)
    assert vm1["pids"] == {"remoted": os.getpid(), "proxyd": None}
    assert vm1["amiss"][1] == "05.0 line0: no client is connected to its socket"
    assert vm2["amiss"][1].startswith("proxyd is not running: ")


def test_another_vms_daemon_in_a_directory_is_amiss(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "vm1").rename(root / "vm3")
    assert show_list([root], Trust(), json=True) == 1
    _, vm3 = json.loads(capsys.readouterr().out)
    assert vm3["amiss"] == [f"{root}/vm3 belongs to VM vm1"]
    (root / "vm3").rename(root / "vm1")


def test_a_vm_elsewhere_than_in_the_first_root_is_told(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show_list([root.parent / "none", root], Trust(), json=False) == 1
    assert f"vm1  (in {root})\n" in capsys.readouterr().out


def test_a_host_without_vms_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show_list([tmp_path, tmp_path / "none"], Trust(), json=False) == 0
    assert capsys.readouterr().out == f"no VMs in {tmp_path} and {tmp_path}/none\n"


def test_a_root_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(IohubError, match="file: Not a directory"):
        show_list([tmp_path / "file"], Trust(), json=False)


def test_the_command_looks_at_all_roots(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vms, "_SYSTEM_ROOT", root.parent / "none")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(root.parent))
    assert ctl.main(["list", "--json"]) == 1
    assert [entry["vm"] for entry in json.loads(capsys.readouterr().out)] == ["vm1", "vm2"]
    assert ctl.main(["list", "vm1"]) == 2


def test_the_users_own_directory_comes_first_and_then_the_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system, own = tmp_path / "run", tmp_path / "user" / "iohub"
    monkeypatch.setattr(vms, "_SYSTEM_ROOT", system)
    environ = {"XDG_RUNTIME_DIR": str(tmp_path / "user")}
    assert runtime_roots(1000, environ) == [own, system]
    assert runtime_roots(0, environ) == [system, own]
    assert runtime_roots(1000, {}) == [system]
    (system / "vm1").mkdir(parents=True)
    assert find_runtime_dir("vm1", 1000, environ) == system / "vm1"
    assert find_runtime_dir("vm1", 1000, {}) == system / "vm1"
    (own / "vm1").mkdir(parents=True)
    assert find_runtime_dir("vm1", 1000, environ) == own / "vm1"
    assert find_runtime_dir("vm1", 0, environ) == system / "vm1"
    assert find_runtime_dir("vm2", 1000, environ) == own / "vm2"
    assert find_runtime_dir("vm2", 1000, {}) == system / "vm2"
    with pytest.raises(UsageError):
        find_runtime_dir("../vm1", 1000, environ)
