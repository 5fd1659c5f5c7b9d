# SPDX-License-Identifier: GPL-2.0-or-later
"""iohubctl against daemons that run, have died, hang, or answer nonsense."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import pytest

from common.config import DeviceConfig, VmConfig
from common.control import call
from common.ctl import main as ctl
from common.loop import Loop
from common.pci import parse_devfn
from proxyd.machine.board import Board
from proxyd.vm.soft.softirqchip import SoftIrqchip
from remoted.main import Remoted
from tests.support.loops import running
from tests.support.statusrows import rows_of, unwrapped

CTL = [sys.executable, "-c", "import sys; from common.ctl.main import main; sys.exit(main())"]


CONFIG_ADDRESS, CONFIG_DATA = 0xCF8, 0xCFC
PIRQ_ROUTES = 0x80000860
"""of the PIIX3 at 01.0"""
NOWHERE = 0x80
"""as a route"""


class Vm:
    """A VM's two daemons, each with its loop in a thread: an irq-line at 05.0 and an edu at 06.0."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stack = ExitStack()
        self._models = {"line0": "remoted.devices.irq_line:IrqLine", "edu0": "remoted.devices.edu:Edu"}
        devices = tuple(
            DeviceConfig(name, model, parse_devfn(addr), None, None, None, {})
            for (name, model), addr in zip(self._models.items(), ("05.0", "06.0"), strict=True)
        )
        self._config = VmConfig("vm1", str(directory), "soft", devices, poll_max_us=0)

    def __enter__(self) -> Self:
        remoted = Remoted(self._config)
        self._stack.callback(remoted.close)
        self._stack.enter_context(running(remoted._loop))
        return self

    def start_proxyd(self, route: int = 10) -> None:
        """Links it, and routes both functions to that GSI, as a guest does."""
        loop = Loop()
        self._stack.callback(loop.close)
        irqchip = SoftIrqchip(loop)
        self._stack.callback(irqchip.close)
        board = Board("iohub-proxyd", self._config, loop, irqchip)
        self._stack.callback(board.close)
        self._stack.callback(board.abort)
        board.start("soft", None)
        board.host.pio_write(CONFIG_ADDRESS, 4, PIRQ_ROUTES)
        for pirq in range(4):
            board.host.pio_write(CONFIG_DATA + pirq, 1, route)
        self._stack.enter_context(running(loop))

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()

    def ctl(self, command: str, *arguments: str) -> int:
        return ctl.main([command, "--runtime-dir", str(self.directory), "vm1", *arguments])


@pytest.fixture
def remoted(tmp_path: Path) -> Iterator[Vm]:
    with Vm(tmp_path) as vm:
        yield vm


@pytest.fixture
def vm(remoted: Vm) -> Vm:
    remoted.start_proxyd()
    return remoted


def test_status_shows_what_both_daemons_know(vm: Vm, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        assert vm.ctl("raise", "05.0") == 0
        assert vm.ctl("lower", "line0") == 0
    assert vm.ctl("raise", "line0") == 0
    assert vm.ctl("status") == 0
    out, err = capsys.readouterr()
    assert err == ""
    myself = f"{Path('/proc/self/comm').read_text().strip()}[{os.getpid()}]"
    line0, edu0 = rows_of(out)
    assert line0.pop("ACCESSES").isdecimal()
    assert line0.pop("QUIET") == "0s"
    assert line0 == {
        "ADDR": "05.0",
        "ID": "line0",
        "LINE": "high",
        "RAISED": "4",
        "RESAMPLES": "1",  # proxyd's, when the guest routed it
        "RE-ASSERTS": "0",
        "PIN": "INTA",
        "GSI": "10",
        "DETAILS": f"remoted.devices.irq_line:IrqLine, irqfd set, client {myself}, link {myself}",
    }
    assert (edu0["ADDR"], edu0["LINE"], edu0["RAISED"]) == ("06.0", "low", "0")
    assert f"remoted runs as pid {os.getpid()}" in out
    assert f"proxyd runs as pid {os.getpid()}, VM soft, irqchip soft" in out


def test_columns_are_aligned(vm: Vm, capsys: pytest.CaptureFixture[str]) -> None:
    vm.ctl("status")
    heading, *rows = [
        line for line in capsys.readouterr().out.splitlines() if re.match(r"ADDR|0[56]\.0  ", line)
    ]
    start = heading.index(" LINE ") + 1
    assert all(row[start - 1] == " " != row[start] for row in rows)
    for name in ("RAISED", "ACCESSES", "GSI"):
        end = heading.index(f" {name} ") + 1 + len(name)
        assert all(row[end - 1] != " " == row[end] for row in rows)


@pytest.mark.parametrize("name", ["edu0", "06.0", "6"])
def test_status_of_one_function(vm: Vm, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert vm.ctl("status", name) == 0
    (row,) = rows_of(capsys.readouterr().out)
    assert row["ID"] == "edu0"
    # Options may also stand between the positional arguments.
    assert vm.ctl("status", "--json", name) == 0
    answer = json.loads(capsys.readouterr().out)
    for daemon in ("remoted", "proxyd"):
        assert [function["id"] for function in answer[daemon]["functions"]] == ["edu0"]


def test_json_is_what_the_daemons_answered(vm: Vm, capsys: pytest.CaptureFixture[str]) -> None:
    assert vm.ctl("status", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "vm": "vm1",
        "remoted": call(vm.directory / "remoted.varlink", "org.iohub.Remoted.Status"),
        "proxyd": call(vm.directory / "proxyd.varlink", "org.iohub.Proxyd.Status"),
        "errors": {},
        "amiss": [],
    }


def test_what_is_amiss_is_a_failure(remoted: Vm, capsys: pytest.CaptureFixture[str]) -> None:
    remoted.start_proxyd(NOWHERE)
    line = "the guest has not routed its pin to an IRQ: interrupts don't arrive"
    assert remoted.ctl("status") == 1
    out, err = capsys.readouterr()
    assert out.endswith(f"\n\n05.0 line0: {line}\n06.0 edu0: {line}\n")
    assert err == ""
    assert remoted.ctl("status", "--json", "edu0") == 1
    assert json.loads(capsys.readouterr().out)["amiss"] == [f"06.0 edu0: {line}"]


def test_a_daemon_that_is_not_there_is_named(remoted: Vm, capsys: pytest.CaptureFixture[str]) -> None:
    assert remoted.ctl("status") == 1
    out, err = capsys.readouterr()
    assert err == ""
    path = remoted.directory / "proxyd.varlink"
    assert f"  NO ANSWER: proxyd is not running: {path}: No such file" in unwrapped(out)
    row = rows_of(out)[0]
    assert {row[name] for name in ("PIN", "GSI")} == {"?"}
    assert row["DETAILS"].endswith("irqfd none, client waiting")
    assert "05.0 line0: no client is connected to its socket" in out
    assert "no such function" not in out

    assert remoted.ctl("status", "--json") == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["proxyd"] is None
    assert answer["remoted"]["functions"]
    assert list(answer["errors"]) == ["proxyd"]
    assert answer["amiss"] == [
        answer["errors"]["proxyd"],
        "05.0 line0: no client is connected to its socket",
        "06.0 edu0: no client is connected to its socket",
    ]


def test_a_daemon_that_the_other_has_a_link_to_is_not_said_not_to_run(
    vm: Vm, capsys: pytest.CaptureFixture[str]
) -> None:
    (vm.directory / "remoted.varlink").rename(vm.directory / "moved")
    assert vm.ctl("status") == 1
    out = unwrapped(capsys.readouterr().out)
    assert "is not running" not in out
    assert f"[{os.getpid()}], but does not answer: {vm.directory}/remoted.varlink: No such file" in out
    (vm.directory / "moved").rename(vm.directory / "remoted.varlink")


def test_a_dead_daemons_socket_is_told_from_a_live_one(
    remoted: Vm, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(remoted.directory / "proxyd.varlink"))
    assert remoted.ctl("status") == 1
    assert "NO ANSWER: proxyd is not running: " in unwrapped(capsys.readouterr().out)


def test_a_daemon_that_hangs_does_not_answer(
    remoted: Vm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    remoted.ctl("status")  # the first call has remoted load what answers it
    monkeypatch.setattr("common.control._CALL_SECONDS", 0.5)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(remoted.directory / "proxyd.varlink"))
        sock.listen()
        assert remoted.ctl("status") == 1
    assert "NO ANSWER: proxyd does not answer: " in unwrapped(capsys.readouterr().out)


def test_without_any_daemon_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["status"], ["status", "--json"], ["raise", "05.0"]):
        status = ctl.main([command[0], "--runtime-dir", str(tmp_path), "vm1", *command[1:]])
        out, err = capsys.readouterr()
        assert status == 1
        assert (out + err).count("\n") == 1
        assert "remoted is not running" in out + err
        assert (
            ("vm1" in json.loads(out)["vm"]) if "--json" in command else err.startswith("iohubctl: VM vm1: ")
        )


REFUSED = {
    "raise of a model that drives its line itself": (
        ["raise", "edu0"],
        "function edu0 is of the model remoted.devices.edu:Edu, which drives its line itself: only irq-line ",
    ),
    "lower of it": (["lower", "06.0"], "drives its line itself"),
    "raise of nothing": (["raise", "07.0"], "no function 07.0, there is 05.0 (line0), 06.0 (edu0)"),
    "status of nothing": (["status", "07.0"], "no function 07.0, there is 05.0 (line0), 06.0 (edu0)"),
}


@pytest.mark.parametrize(("arguments", "line"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_is_one_line_and_status_1(
    vm: Vm, capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    assert vm.ctl(*arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("iohubctl: ")
    assert line in err
    assert err.count("\n") == 1


def test_a_function_may_be_unknown_only_because_a_daemon_is_silent(
    remoted: Vm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert remoted.ctl("status", "07.0") == 1
    err = capsys.readouterr().err
    assert "no function 07.0" in err
    assert "proxyd is not running" in err
    assert err.count("\n") == 1


USAGE = {
    "nothing": [],
    "unknown command": ["reboot", "vm1"],
    "no VM": ["status"],
    "no address": ["raise", "vm1"],
    "too much": ["status", "vm1", "05.0", "06.0"],
    "unknown option": ["status", "vm1", "--yaml"],
    "abbreviated option": ["status", "vm1", "--js"],
    "a path for a name": ["status", "../vm1"],
    "line feed": ["status", "vm1\nroot"],
}


@pytest.mark.parametrize("arguments", USAGE.values(), ids=USAGE)
def test_bad_usage_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert ctl.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("iohubctl: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", [["status"], ["status", "--json"], ["raise"], ["lower"]])
def test_the_name_must_be_that_of_the_directorys_vm(
    vm: Vm, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    assert ctl.main([*command, "--runtime-dir", str(vm.directory), "other", "line0"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"iohubctl: {vm.directory} belongs to VM vm1\n")
    (line0,) = [each for each in call_status(vm.directory) if each["id"] == "line0"]
    assert line0["raised"] == 0


def call_status(directory: Path) -> list[dict[str, Any]]:
    return list(call(directory / "remoted.varlink", "org.iohub.Remoted.Status")["functions"])


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("status", {}),
        ("status", {"vm": "vm1"}),
        ("status", {"vm": "vm1", "functions": [{}]}),
        ("status", {"vm": "vm1", "functions": [{"addr": "05.0", "id": "x"}]}),
        ("raise", {}),
        ("raise", {"vm": "vm1", "functions": [{}]}),
    ],
)
def test_a_daemon_of_another_version_is_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, answer: dict[str, Any]
) -> None:
    loop = Loop()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "remoted.varlink"))
        listener.listen()

        def on_connect(_events: int) -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(4096)
                sock.sendall(json.dumps({"parameters": answer}).encode() + b"\0")

        loop.add(listener.fileno(), on_connect)
        with running(loop):
            assert ctl.main([command, "--runtime-dir", str(tmp_path), "vm1", "x"]) == 1
    loop.close()
    err = capsys.readouterr().err
    assert "another version" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", [[], ["status"], ["list"], ["raise"], ["lower"], ["demo"]])
def test_help_has_examples_that_are_valid(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        ctl.main([*command, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    examples = re.findall(r"^  (iohubctl [^|&\n]*)", out, re.MULTILINE)
    assert examples or command == ["demo"]
    if command:
        statuses = out[out.index("exit status:") :]
        assert re.findall(r"^  (\d+)  ", statuses, re.MULTILINE) == ["0", "1", "2"]
    for example in examples:
        arguments = shlex.split(example)[1:]
        assert ctl._parse(arguments)


def test_each_way_of_driving_a_line_has_its_own_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command, level in (("raise", "high"), ("lower", "low")):
        with pytest.raises(SystemExit):
            ctl.main([command, "--help"])
        assert f"A line that is {level} already stays {level}." in capsys.readouterr().out


def test_the_demo_is_loaded_only_when_it_is_asked_for() -> None:
    program = (
        "import sys; from common.ctl.main import main; main(['status', '--runtime-dir', '/nonexistent', 'x']); "
        "print('common.ctl.demo' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


def test_an_interrupt_ends_it_without_a_traceback(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "remoted.varlink"))
        listener.listen()
        process = subprocess.Popen(
            [*CTL, "status", "--runtime-dir", str(tmp_path), "vm1"], stderr=subprocess.PIPE, text=True
        )
        with process, listener.accept()[0] as sock:
            assert sock.recv(4096)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate()
    assert process.returncode == 128 + signal.SIGINT
    assert err == ""
