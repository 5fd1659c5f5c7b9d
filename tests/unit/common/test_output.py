# SPDX-License-Identifier: GPL-2.0-or-later
"""What programs print, to readers that have gone, disks that are full, and terminals of few characters."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = [
    ["iohubctl", "--help"],
    ["iohubctl", "status", "--help"],
    ["iohubctl", "--version"],
    ["iohubctl", "list"],
    ["iohubctl", "list", "--json"],
    ["remoted", "--help"],
    ["remoted", "--models"],
    ["remoted", "--models", "--json"],
    ["proxyd", "--version"],
]


def run(command: list[str], stdout: int, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qemu_iohub", *command],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, **environment},
        timeout=60,
    )


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_reader_that_has_gone_ends_it_without_a_word(command: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ended = run(command, writer)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_full_disk_is_one_line(command: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        ended = run(command, full.fileno())
    assert ended.returncode == 1
    program = command[0] if command[0] == "iohubctl" else f"iohub-{command[0]}"
    assert ended.stderr == f"{program}: standard output: No space left on device\n"


def test_an_error_that_cannot_be_printed_still_is_one() -> None:
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "qemu_iohub", "iohubctl", "status", "--runtime-dir=/nonexistent", "vm1"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=full,
            check=False,
            timeout=60,
        )
    assert (ended.returncode, ended.stdout) == (1, b"")


def test_characters_that_the_encoding_lacks_are_escaped(tmp_path: Path) -> None:
    program = "from common.output import emit; emit('caf\\xe9 \\u2713\\n')"
    ended = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONPATH": os.getcwd()},
    )
    assert ended.stdout == b"caf\xe9 \\u2713\n"
