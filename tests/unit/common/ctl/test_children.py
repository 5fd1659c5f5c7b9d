# SPDX-License-Identifier: GPL-2.0-or-later
"""Daemons as children: they end with who has started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.ctl.children import _LAUNCHER, Child, ChildFailed
from tests.support.process import is_running
from tests.support.wait import wait_until

PARENT = """
import sys
from pathlib import Path
from common.ctl.children import Child
options = ["--name=vm1", f"--runtime-dir={sys.argv[1]}", "--device=irq-line,id=line0"]
print(Child("remoted", options, Path(sys.argv[1])).process.pid, flush=True)
sys.stdin.read()
"""


def test_a_child_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.kill()
    wait_until(lambda: not is_running(pid), "the daemon has ended")


def test_a_child_whose_parent_ended_before_it_could_tell_does_nothing(tmp_path: Path) -> None:
    """As if the parent had ended between fork() and prctl(): the child's parent is another process then."""
    (tmp_path / "module.py").write_text("print('runs')")
    for parent, output in ((os.getpid(), b"runs\n"), (1, b"")):
        ended = subprocess.run(
            [sys.executable, "-c", _LAUNCHER, str(parent), "module"],
            cwd=tmp_path,
            capture_output=True,
            check=False,
        )
        assert (ended.stdout, ended.returncode) == (output, 0 if output else 1)
        assert ended.stderr == b""


def test_ctrl_c_does_not_reach_a_child(tmp_path: Path) -> None:
    child = Child("remoted", ["--name=vm1", f"--runtime-dir={tmp_path}", "--device=irq-line,id=a"], tmp_path)
    try:
        assert os.getpgid(child.process.pid) == child.process.pid
    finally:
        assert child.end() == 0


def test_a_child_that_cannot_start_is_told_with_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(ChildFailed, match=r"^remoted ended with status 2: .*no devices"):
        Child("remoted", ["--name=vm1", f"--runtime-dir={tmp_path}"], tmp_path)


def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.ctl.children._END_SECONDS", 0.1)
    child = Child("remoted", ["--name=vm1", f"--runtime-dir={tmp_path}", "--device=irq-line,id=a"], tmp_path)
    child.process.send_signal(signal.SIGSTOP)
    assert child.end() == -signal.SIGKILL
