# SPDX-License-Identifier: GPL-2.0-or-later
"""The demo, as a user starts it; and that it notices what it is there to notice."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.control import call
from common.ctl.demo import _Demo
from common.errors import ProtocolError
from tests.support.fds import await_fds, count_fds
from tests.support.process import is_running
from tests.support.wait import wait_until

IOHUBCTL = str(Path(sys.executable).with_name("iohubctl"))
ROUNDS = 60


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [IOHUBCTL, "demo", f"--rounds={ROUNDS}", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


@pytest.fixture(params=["embedded", "soft"])
def vm(request: pytest.FixtureRequest) -> str:
    if request.param == "embedded":
        request.getfixturevalue("requires_kvm")
    return str(request.param)


def test_the_demo_loses_nothing(vm: str) -> None:
    result = demo("--json", f"--vm={vm}")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["irqchip"] == {"embedded": "kvm", "soft": "soft"}[vm]
    assert [function["addr"] for function in report["functions"]] == ["05.0", "06.0", "07.0", "09.0"]
    gsis = [function["gsi"] for function in report["functions"]]
    assert gsis[0] == gsis[3]
    assert len(set(gsis)) == 3
    for function in report["functions"]:
        assert function["raised"] == function["served"] >= ROUNDS
        assert function["lost"] == 0
        assert function["resamples"] >= ROUNDS
        assert function["reasserts"] >= ROUNDS // 4, "held rounds are asserted again after the EOI"
        for latency in ("raise_to_handler_us", "eoi_to_reassert_us"):
            assert 0 < function[latency]["p50"] <= function[latency]["p99"]
    assert report["lost"] == report["stuck"] == report["failed"] == report["spurious"] == 0
    assert len(report["steps"]) == 4


def test_the_table_shows_the_same(vm: str) -> None:
    result = demo(f"--vm={vm}")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split()[:6] == ["ADDR", "DEVICE", "GSI", "RAISED", "SERVED", "RESAMPLES"]
    assert [line.split()[1] for line in lines[1:5]] == ["edu0", "serial0", "edu1", "serial1"]
    assert " 0 lost, 0 stuck" in lines[-1]
    assert "SIGKILL" in result.stderr, "progress goes to stderr"


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose path leaves room for the demo's own in the 107 bytes of a socket's."""
    with tempfile.TemporaryDirectory(prefix="iohub-test-") as directory:
        yield Path(directory)


class RunningDemo:
    """A demo in the middle of its interrupts, which would take minutes; what pytest ignores, it does not."""

    def __init__(self, directory: Path, *environment: str) -> None:
        """``environment`` is options for env(1), which sets what the demo inherits."""
        self.directory = directory
        self.process = subprocess.Popen(
            ["env", "--default-signal", *environment, IOHUBCTL, "demo", "--rounds=100000", "--vm=soft"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": str(directory)},
        )
        self.pids: list[int] = []
        try:
            wait_until(self.resamples, "interrupts are served")
        except BaseException:
            self.close()
            raise

    def resamples(self) -> int:
        """How many acknowledgements remoted has counted; 0 before all runs."""
        if not list(self.directory.glob("*/proxyd.varlink")):
            return 0
        (directory,) = self.directory.iterdir()
        remoted = call(directory / "remoted.varlink", "org.iohub.Remoted.Status")
        self.pids = [remoted["pid"], call(directory / "proxyd.varlink", "org.iohub.Proxyd.Status")["pid"]]
        return sum(function["resamples"] for function in remoted["functions"])

    def check_end(self, signum: int) -> None:
        """The signal ends it, and nothing is left behind."""
        self.process.send_signal(signum)
        assert self.process.wait(60) == 130
        assert not list(self.directory.iterdir())
        for pid in self.pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_demo_that_is_ended_leaves_nothing_behind(short_path: Path, signum: int) -> None:
    with contextlib.closing(RunningDemo(short_path)) as demo:
        demo.check_end(signum)


def test_a_demo_that_is_killed_takes_its_daemons_along(short_path: Path) -> None:
    with contextlib.closing(RunningDemo(short_path)) as demo:
        demo.process.kill()
        demo.process.wait()
        wait_until(lambda: not any(map(is_running, demo.pids)), "the daemons end")


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_was_ignored_when_the_demo_began_is_ignored(
    short_path: Path, signum: signal.Signals
) -> None:
    """As nohup(1), and a shell without job control in the background, leave them."""
    with contextlib.closing(RunningDemo(short_path, f"--ignore-signal={signum.name}")) as demo:
        demo.process.send_signal(signum)
        before = demo.resamples()
        wait_until(lambda: demo.resamples() > before, "interrupts are served")
        demo.check_end(signal.SIGTERM)


def test_a_remote_that_loses_interrupts_makes_the_demo_fail(tmp_path: Path) -> None:
    """With a hub that forgets one rise, once, by a sitecustomize that only the daemons see."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'remoted' in sys.orig_argv:\n"
        "    from remoted.iohub import Pirq\n"
        f"    MARK = {str(tmp_path / 'forgotten')!r}\n"
        "    real = Pirq.set_irq\n"
        "    def forgetful(self, asserted):\n"
        "        irqfd = self._irqfd\n"
        "        if asserted and self.raised == 9 and not os.path.exists(MARK):\n"
        "            open(MARK, 'w').close()\n"
        "            self._irqfd = None\n"
        "        real(self, asserted)\n"
        "        self._irqfd = irqfd\n"
        "    Pirq.set_irq = forgetful\n"
    )
    result = subprocess.run(
        [IOHUBCTL, "demo", "--rounds=20", "--vm=soft", "--json"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{tmp_path}:{Path.cwd()}"},
        check=False,
    )
    assert result.returncode == 1, result.stderr
    report = json.loads(result.stdout)
    assert report["lost"] == 1
    assert report["raised"] == report["served"] + report["lost"]


def test_a_demo_that_can_not_begin_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a guest that says something else than that it is ready."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'proxyd' in sys.orig_argv:\n"
        "    from proxyd.vm.soft.machine import SoftMachine\n"
        "    real = SoftMachine.write_line\n"
        "    SoftMachine.write_line = lambda self, text: real(self, 'panic')\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path.cwd()}")
    before = count_fds()
    with pytest.raises(ProtocolError, match="'panic' instead of"):
        _Demo(tmp_path, "soft")
    await_fds(before)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.parametrize("rounds", ["0", "-1", "many"])
def test_a_bad_number_of_rounds_is_one_line_and_status_2(rounds: str) -> None:
    result = demo(f"--rounds={rounds}")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("iohubctl: ")
    assert "--rounds" in line
