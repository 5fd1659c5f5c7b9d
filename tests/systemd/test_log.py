# SPDX-License-Identifier: GPL-2.0-or-later
"""``iohubctl log`` and the message catalog, on the real journal of a host whose remoted was killed."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from common.messages import Event
from tests.support.bootedsystem import BootedSystem
from tests.support.checkout import ROOT
from tests.support.hostbench import PROXYD, QEMU_UNIT, REMOTED, HostBench
from tests.support.wait import wait_until

CTL = [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); "]
CTL[-1] += "from common.ctl.main import main; sys.exit(main())"
LINE = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d (?P<who>[^ ]+?)(\[\d+\])?: (?P<text>.*)"
)


@pytest.fixture(scope="module")
def bench(
    installed: Path, requires_systemd: None, requires_kvm: None, requires_qemu: None
) -> Iterator[HostBench]:
    """A host whose remoted was killed once while the guest ran, and has gone on."""
    pytest.importorskip("systemd.journal", reason="iohubctl log needs systemd-python")
    with closing(HostBench(installed)) as host:
        host.require(sys.executable)
        host.system.run("journalctl", "--update-catalog")
        host.start()
        first = host.kill(REMOTED)
        wait_until(
            lambda: host.linked() == {"edu0", "com1"} and host.system.main_pid(REMOTED) not in (0, first),
            "the next remoted has gone on",
        )
        yield host


@pytest.fixture(scope="module")
def system(bench: HostBench) -> BootedSystem:
    return bench.system


def log(system: BootedSystem, *arguments: str) -> list[str]:
    """The lines that it prints, quietly."""
    done = system.run(*CTL, "log", *arguments)
    assert done.stderr == ""
    return done.stdout.splitlines()


def entries(system: BootedSystem, *arguments: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log(system, "vm1", "--json", *arguments)]


def test_one_stream_has_all_that_concerns_the_vm(system: BootedSystem) -> None:
    lines = [match for line in log(system, "vm1") if (match := LINE.fullmatch(line)) is not None]
    texts = {(match["who"], match["text"]) for match in lines}
    assert ("iohub-proxyd", "edu0: plugged at 05.0: 1234:11e8") in texts
    assert ("systemd", f"Started {QEMU_UNIT} - QEMU VM vm1.") in texts
    assert any(who.startswith("qemu-system") for who, _ in texts)
    everything = entries(system)
    times = [int(entry["__REALTIME_TIMESTAMP"]) for entry in everything]
    assert times == sorted(times)
    messages = [entry["MESSAGE"] for entry in everything]
    killed = messages.index(f"{REMOTED}: Main process exited, code=killed, status=9/KILL")
    events = [entry.get("MESSAGE_ID") for entry in everything]
    assert events.count(Event.TAKEN_UP) == 2
    assert killed < events.index(Event.TAKEN_UP)


def test_an_ordinary_run_has_no_warning(system: BootedSystem) -> None:
    daemons = [entry for entry in entries(system) if entry.get("_SYSTEMD_UNIT") in (REMOTED, PROXYD)]
    assert [entry["MESSAGE"] for entry in daemons if int(entry["PRIORITY"]) <= 4] == []


@pytest.mark.parametrize(
    ("vm", "line", "event", "text"),
    [
        ("vm3", 'model = "nosuch"', Event.MODEL_NOT_LOADED, "nosuch"),
        ("vm4", 'model = "/no.py:Class"', Event.MODEL_NOT_LOADED, "/no.py"),
        ("vm5", 'model = "edu"\naddr = "99.0"', Event.START_FAILED, "99.0"),
    ],
)
def test_why_a_daemon_does_not_start_is_explained(
    system: BootedSystem, vm: str, line: str, event: Event, text: str
) -> None:
    """Also if it has read no file yet, and knows no VM: systemd knows the unit."""
    (system.root / f"etc/iohub/{vm}.toml").write_text(f'[[device]]\nid = "x"\n{line}\n')
    failed = system.run("systemctl", "start", f"iohub-remoted@{vm}", check=False)
    assert failed.returncode == 1
    system.run("journalctl", "--sync")
    told = [json.loads(line) for line in log(system, vm, "--json", "--explain")]
    (error,) = (each for each in told if each["SYSLOG_IDENTIFIER"] == "iohub-remoted")
    assert (error["MESSAGE_ID"], error["PRIORITY"]) == (event, "3")
    assert text in error["MESSAGE"]
    assert error["EXPLANATION"].startswith("Subject: ")


def test_a_stalled_journald_holds_up_nobody_and_the_loss_is_told(system: BootedSystem) -> None:
    """Its socket's queue has room for some hundred lines; who logs to it by libsystemd would wait for ever."""
    journald = system.main_pid("systemd-journald.service")
    program = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from common.journal import device_log, setup; "
        "setup('iohub-test', 'vm8'); log = device_log('iohub-test', 'edu0', 0); "
        "[log.warning('line %d', number) for number in range(5000)]; open('/run/logged', 'w').close(); "
        "time.sleep(100)"
    )
    os.kill(journald, signal.SIGSTOP)
    try:
        system.run(
            "systemd-run", "--no-block", "--unit=logger", sys.executable, "-P", "-c", program, timeout=20
        )
        wait_until((system.root / "run/logged").exists, "all is logged")
    finally:
        os.kill(journald, signal.SIGCONT)

    def told() -> list[str]:
        return [line for line in log(system, "vm8") if "lines lost here" in line]

    wait_until(told, "the loss is told")
    taken = [line for line in log(system, "vm8") if ": edu0: line " in line]
    assert len(taken) + sum(int(line.rpartition(" ")[2]) for line in told()) == 5000
    system.systemctl("stop", "logger")


def test_another_vm_has_none_of_it(system: BootedSystem) -> None:
    assert log(system, "vm2") == []


def test_a_line_has_the_fields_that_apply(system: BootedSystem) -> None:
    remoted = system.show(REMOTED, "MainPID")
    line = next(
        entry
        for entry in entries(system, "com1")
        if entry.get("MESSAGE_ID") == Event.TAKEN_UP and entry["_PID"] == remoted
    )
    expected = {
        "IOHUB_VM": "vm1",
        "IOHUB_DEVICE": "com1",
        "IOHUB_ADDR": "06.0",
        "IOHUB_PIRQ": str(6 << 3),
        "IOHUB_PEER_PID": system.show(PROXYD, "MainPID"),
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "iohub-remoted",
        "CODE_FUNC": "keep",
        "_SYSTEMD_UNIT": REMOTED,
    }
    assert {name: line[name] for name in expected} == expected
    assert line["IOHUB_PEER_PID"] in line["IOHUB_PEER"]
    assert line["CODE_FILE"].endswith("remoted/server.py")


def test_lines_that_have_no_device_or_no_peer_have_no_such_field(system: BootedSystem) -> None:
    attached = next(each for each in entries(system) if each.get("MESSAGE_ID") == Event.QEMU_ATTACHED)
    assert attached["IOHUB_PEER_PID"] == system.show(QEMU_UNIT, "MainPID")
    assert not {"IOHUB_DEVICE", "IOHUB_ADDR", "IOHUB_PIRQ"} & attached.keys()
    plugged = next(each for each in entries(system) if each.get("MESSAGE_ID") == Event.PLUGGED)
    assert not {"IOHUB_PEER", "IOHUB_PEER_PID"} & plugged.keys()


def test_a_device_is_selected_by_id_or_by_address(system: BootedSystem) -> None:
    of_id, of_address = entries(system, "edu0"), entries(system, "05.0")
    assert of_id == of_address
    assert {entry["IOHUB_DEVICE"] for entry in of_id} == {"edu0"}
    assert {entry["_SYSTEMD_UNIT"] for entry in of_id} == {REMOTED, PROXYD}
    assert log(system, "vm1", "nodevice") == []


def test_each_line_is_followed_by_what_the_catalog_says(system: BootedSystem) -> None:
    lines = log(system, "vm1", "com1", "--explain")
    at = next(index for index, line in enumerate(lines) if line.endswith("com1: plugged at 06.0: 1b36:0002"))
    assert lines[at + 1] == "    | Subject: Device com1 of VM vm1 was plugged in"
    assert "    | Nothing needs to be done." in lines[at : at + 10]
    explained = entries(system, "com1", "--explain")
    assert {bool(entry.get("EXPLANATION")) for entry in explained if "MESSAGE_ID" in entry} == {True}
    assert not any("EXPLANATION" in entry for entry in explained if "MESSAGE_ID" not in entry)
    assert not any("EXPLANATION" in entry for entry in entries(system, "com1"))


def test_a_missing_catalog_is_one_line(system: BootedSystem) -> None:
    hide = "mount -t tmpfs none /var/lib/systemd/catalog"
    command = f"{hide}; exec {shlex.join(CTL)} log vm1 --explain"
    done = system.run("unshare", "-m", "sh", "-c", command)
    assert re.fullmatch("iohubctl: iohub's message catalog is not installed, .*\n", done.stderr)
    assert done.stdout.splitlines() == log(system, "vm1")


def test_journalctl_explains_as_well(system: BootedSystem) -> None:
    text = system.run(
        "journalctl", "--no-pager", "-x", "IOHUB_DEVICE=com1", f"MESSAGE_ID={Event.TAKEN_UP}"
    ).stdout
    assert "Subject: Device com1 of VM vm1 goes on after a restart" in text
    assert "The guest notices a pause, and at most one spurious interrupt." in text
    assert "Documentation: man:iohub-remoted(8)" in text


def test_no_event_of_a_run_leaves_a_field_unreplaced(system: BootedSystem) -> None:
    for entry in entries(system, "--explain"):
        explanation = entry.get("EXPLANATION", "")
        if entry.get("MESSAGE_ID") in set(Event):
            assert not re.search("@|IOHUB_VM|IOHUB_DEVICE|SYSLOG_IDENTIFIER|_SYSTEMD_UNIT", explanation)


def test_a_line_that_an_untrusted_user_sends_is_not_shown(system: BootedSystem) -> None:
    send = "printf 'MESSAGE=vm1 forged\\nIOHUB_VM=vm1\\nIOHUB_DEVICE=edu0\\n' | logger --journald"
    system.run("setpriv", "--reuid=65534", "--clear-groups", "sh", "-c", send)
    system.run("sh", "-c", send.replace("forged", "of root"))
    system.run("journalctl", "--sync")
    messages = [entry["MESSAGE"] for entry in entries(system, "edu0")]
    assert "vm1 of root" in messages
    assert "vm1 forged" not in messages
    assert "vm1 forged" in [entry["MESSAGE"] for entry in entries(system, "edu0", "--allow-user", "65534")]


def test_what_a_line_contains_cannot_reach_the_terminal(system: BootedSystem) -> None:
    send = r"printf 'MESSAGE=vm1 \033[31mred\nIOHUB_VM=vm1\nSYSLOG_IDENTIFIER=a\033b\n' | logger --journald"
    system.run("sh", "-c", send)
    system.run("journalctl", "--sync")
    (line,) = [line for line in log(system, "vm1") if "red" in line]
    assert r": \x1b[31mred" in line
    assert r" a\x1bb[" in line


def test_since_leaves_out_what_was_before(system: BootedSystem) -> None:
    everything = entries(system, "edu0")
    middle = int(everything[len(everything) // 2]["__REALTIME_TIMESTAMP"]) / 1e6
    since = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(middle)) + f"{middle % 1:.6f}"[1:] + "+00:00"
    later = entries(system, "edu0", "--since", since)
    assert later == everything[len(everything) // 2 :]
    assert entries(system, "edu0", "--since", "1h") == everything
    assert entries(system, "edu0", "--since", "2999-01-01") == []


@pytest.mark.parametrize("since", ["", "x", "10", "-1h", "1w", "2026-13-01", "99999999999999999999s", "1h\n"])
def test_a_bad_time_is_one_line(since: str) -> None:
    done = subprocess.run(
        [*CTL, "log", "vm1", f"--since={since}"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"iohubctl: --since '.*' is neither a time, such as .*\n", done.stderr)


class Follower:
    """``iohubctl log --follow`` in the booted system."""

    def __init__(self, system: BootedSystem, output: Path, *arguments: str) -> None:
        self._output = output
        with output.open("wb") as file:
            self._process = subprocess.Popen(
                [
                    "nsenter",
                    "-t",
                    str(system.pid),
                    "-m",
                    "-p",
                    "-u",
                    "-i",
                    "-C",
                    *CTL,
                    "log",
                    "vm1",
                    *arguments,
                ],
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def text(self) -> str:
        return self._output.read_text()

    def interrupt(self) -> int:
        """Ctrl+C; the exit status."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        os.kill(int(children.read_text().split()[0]), signal.SIGINT)
        return self._process.wait(20)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def test_follow_goes_on_until_ctrl_c(system: BootedSystem, tmp_path: Path) -> None:
    before = len(log(system, "vm1"))
    with closing(Follower(system, tmp_path / "out", "--follow")) as follower:

        def has_followed() -> bool:
            system.run("sh", "-c", "printf 'MESSAGE=vm1 tick\\nIOHUB_VM=vm1\\n' | logger --journald")
            return "tick" in follower.text()

        wait_until(has_followed, "a line is shown")
        assert follower.interrupt() == 130
        lines = follower.text().splitlines()
    assert all(line.endswith(": tick") for line in lines)
    assert before >= 20


def test_follow_since_begins_with_what_was(system: BootedSystem, tmp_path: Path) -> None:
    with closing(Follower(system, tmp_path / "out", "edu0", "--follow", "--since", "1h")) as follower:
        wait_until(lambda: "edu0: plugged at 05.0" in follower.text(), "what was is shown")
        assert follower.interrupt() == 130


@pytest.mark.parametrize(
    ("arguments", "reader", "status"),
    [
        ("", "head -n 1", "141|0"),  # it may have printed all before
        ("--follow --since 1h", "head -n 1", "141"),
        ("--follow", "true", "141"),  # without a line that it could fail to print
    ],
)
def test_a_reader_that_has_gone_is_no_error(
    system: BootedSystem, arguments: str, reader: str, status: str
) -> None:
    command = f"{shlex.join(CTL)} log vm1 {arguments}"
    done = system.run("bash", "-c", f"{{ {command}; echo $? >&2; }} | {reader} >/dev/null", check=False)
    assert re.fullmatch(status, done.stderr.strip())


_AS_NOBODY = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from common.ctl.main import main
main(["log", "vm2"])  # imports what that user can't read
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
sys.exit(main(["log", "vm1"]))
"""


def test_without_permission_it_is_one_line(system: BootedSystem) -> None:
    done = system.run(sys.executable, "-P", "-c", _AS_NOBODY, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        r"iohubctl: /\S+: permission denied: be root, or in the group systemd-journal\n", done.stderr
    )


def test_without_a_journal_it_is_one_line(system: BootedSystem) -> None:
    hide = "for d in /var /run; do mount -t tmpfs none $d/log; done"
    done = system.run("unshare", "-m", "sh", "-c", f"{hide}; exec {shlex.join(CTL)} log vm1", check=False)
    assert (done.returncode, done.stdout) == (1, "")
    where = "/var/log/journal or /run/log/journal"
    assert done.stderr == f"iohubctl: this host has no journal in {where}: is systemd-journald running?\n"


def test_the_kernels_lines_about_this_vm_are_shown(system: BootedSystem) -> None:
    """journald reads them from /dev/kmsg, which is a FIFO here: one record at a time, as from the kernel."""
    pid = system.show(QEMU_UNIT, "MainPID")
    about = f"kvm [{pid}]: vcpu0, guest rIP: 0x1 ignored rdmsr"

    def has_read(text: str) -> bool:
        return text in system.run("journalctl", "-k").stdout

    kmsg = system.root / "dev/kmsg"
    os.mkfifo(kmsg)
    system.systemctl("restart", "--no-block", "systemd-journald")  # it is ready with the first record
    fifo = os.open(kmsg, os.O_RDWR | os.O_NONBLOCK)
    try:
        for number, text in enumerate([about, "kvm [1]: of another VM", "usb: something else"], 100):
            os.write(fifo, f"4,{number},{number}000,-;{text}\n".encode())
            wait_until(partial(has_read, text), "journald has read it")
    finally:
        os.close(fifo)
        kmsg.unlink()
        system.systemctl("restart", "systemd-journald")
    lines = [line for line in log(system, "vm1") if " kernel: " in line]
    assert [LINE.fullmatch(line)["text"] for line in lines] == [  # type: ignore[index]
        f"warning: {about}"
    ]
