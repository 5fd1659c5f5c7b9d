# SPDX-License-Identifier: GPL-2.0-or-later
"""Compiles and runs target/, a process that notices when somebody meddles with its main thread."""

from __future__ import annotations

import functools
import select
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

SOURCES = Path(__file__).parent
PATIENCE = 20.0

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")


@functools.cache
def build(source: str, *options: str) -> Path:
    """The program compiled from a file beside this one, or from all files of a folder, made once a session."""
    path = SOURCES / source
    files = sorted(path.glob("*.c")) if path.is_dir() else [path]
    directory = tempfile.TemporaryDirectory(prefix="iohub-test-")
    _directories.append(directory)
    program = Path(directory.name) / Path(source).stem
    subprocess.run(
        ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", *options, *map(str, files), "-o", str(program)],
        check=True,
    )
    return program


_directories: list[tempfile.TemporaryDirectory[str]] = []  # removed with the interpreter


class TargetProcess:
    """A target with one of its checks, past its start."""

    def __init__(self, *args: str) -> None:
        self._process = subprocess.Popen(
            [str(build("target", "-pthread")), *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self.pid = self._process.pid
        assert self._stdout.readline() == "ready\n"

    def pause(self, seconds: float) -> None:
        """Lets the target run for a while, or until it complains."""
        select.select([self._stdout], [], [], seconds)

    def ask(self) -> int:
        """The number that the "rseq" check prints on demand."""
        self._stdin.write(".")
        self._stdin.flush()
        return int(self._stdout.readline())

    def end_input(self) -> None:
        """Lets the check come to its end."""
        self._stdin.close()
        self._process.stdin = None  # else communicate() flushes it

    def finish(self) -> str:
        """Ends the check and returns what it had to say: "N rounds", or what went wrong."""
        return self._process.communicate(timeout=PATIENCE)[0].strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
