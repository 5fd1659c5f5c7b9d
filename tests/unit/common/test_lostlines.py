# SPDX-License-Identifier: GPL-2.0-or-later
"""Lines of the log that nobody has taken are amiss for a while."""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.control import call
from common.journal import JournalHandler
from common.lostlines import LostLines
from common.stdio import BackgroundWriter
from tests.support.wait import wait_until


def test_a_loss_is_amiss_for_an_hour() -> None:
    now = [100.0]
    lost = LostLines(lambda: now[0])
    assert list(lost.amiss()) == []
    lost.add(1)
    now[0] += 5
    assert list(lost.amiss()) == ["a line of the log could not be written since the start, the last 5 s ago"]
    lost.add(2)
    assert list(lost.amiss()) == ["3 lines of the log could not be written since the start, the last 0 s ago"]
    now[0] += 3599
    assert list(lost.amiss())
    now[0] += 1
    assert list(lost.amiss()) == []


def test_what_journald_does_not_take_is_counted(tmp_path: Path) -> None:
    lost = LostLines()
    handler = JournalHandler("program", "vm1", str(tmp_path / "nobody"), lost)
    for _ in range(3):
        handler.handle(logging.LogRecord("program", logging.INFO, __file__, 1, "text", (), None))
    handler.close()
    assert next(lost.amiss()).startswith("3 lines")


@pytest.mark.parametrize("is_full", [True, False], ids=["too much", "gone"])
def test_what_the_reader_of_stderr_does_not_take_is_counted(is_full: bool) -> None:
    """Also while it is still the thread's to write, or never will be."""
    lost: list[int] = []
    read_end, write_end = os.pipe()
    if is_full:
        os.write(write_end, bytes(fcntl.fcntl(write_end, fcntl.F_GETPIPE_SZ)))
    else:
        os.close(read_end)
    writer = BackgroundWriter(write_end, lambda lines: f"{lines}\n", capacity=8, on_loss=lost.append)
    writer.put(b"1\n2\n")
    if is_full:
        writer.put(b"345\n6\n")
        assert lost == [2]
        os.close(read_end)
    wait_until(lambda: sum(lost) == (4 if is_full else 2), "all is lost")


@pytest.mark.parametrize("module", ["remoted", "proxyd"])
def test_status_tells_of_lost_lines(module: str, tmp_path: Path) -> None:
    """The daemon's stderr is full."""
    device, vm = {"remoted": ("edu,id=a", []), "proxyd": ("id=a", ["--vm=soft"])}[module]
    command = [
        sys.executable,
        "-m",
        module,
        "--name=vm",
        f"--runtime-dir={tmp_path}",
        *vm,
        f"--device={device}",
    ]
    control = tmp_path / f"{module}.varlink"
    with open("/dev/full", "w") as full:
        daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=full)
    try:
        wait_until(control.exists, "it listens")
        wait_until(
            lambda: bool(call(control, f"org.iohub.{module.capitalize()}.Status")["amiss"]), "it is told"
        )
        (text,) = call(control, f"org.iohub.{module.capitalize()}.Status")["amiss"]
        assert "of the log could not be written since the start" in text
    finally:
        daemon.kill()
        daemon.wait()
