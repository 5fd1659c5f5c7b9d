# SPDX-License-Identifier: GPL-2.0-or-later
"""stdout and stderr of a daemon: nobody who holds them up holds up the daemon, and what is lost is told."""

from __future__ import annotations

import fcntl
import os
import re
import select
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from common.stdio import BackgroundWriter
from tests.support.checkout import ROOT

PIPE_SIZE = 4096
LINE = b"x" * 99 + b"\n"
DEADLINE = 20.0


class Pipe:
    """A pipe of 4 KiB, with what has been read from it so far."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()
        fcntl.fcntl(self.write_end, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        self.text = b""

    def read_until(self, enough: bytes) -> None:
        """Reads until the text ends with that."""
        while not self.text.endswith(enough):
            self.read_more()

    def read_more(self) -> None:
        ready, _, _ = select.select([self.read_end], [], [], DEADLINE)
        assert ready, f"nothing after {self.text!r}"
        self.text += os.read(self.read_end, 1 << 16)

    def is_quiet(self) -> bool:
        return not select.select([self.read_end], [], [], 0)[0]

    def close(self) -> None:
        """Lets the writer's thread come out of its write."""
        os.close(self.read_end)
        os.close(self.write_end)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


def lost(lines: int) -> str:
    return f"lost {lines}\n"


def numbered(first: int, end: int) -> list[bytes]:
    return [b"%099d\n" % number for number in range(first, end)]


def test_a_reader_that_has_stopped_costs_lines_and_each_is_counted_where_it_is_missing(pipe: Pipe) -> None:
    writer = BackgroundWriter(pipe.write_end, lost, capacity=2 * PIPE_SIZE)
    for line in numbered(0, 1000):
        writer.put(line)
    loss = re.compile(rb"lost (\d+)\n\Z")
    while not (told := loss.search(pipe.text)):
        pipe.read_more()
    taken = pipe.text[: told.start()].splitlines(keepends=True)
    assert taken == numbered(0, len(taken))
    assert len(taken) + int(told[1]) == 1000
    pipe.text = b""
    writer.put(b"again\n")
    pipe.read_until(b"again\n")
    assert pipe.text == b"again\n"


def test_a_loss_is_told_before_the_line_that_follows_it(pipe: Pipe) -> None:
    writer = BackgroundWriter(pipe.write_end, lost, capacity=PIPE_SIZE)
    os.write(pipe.write_end, b"x" * (PIPE_SIZE - 1) + b"\n")
    writer.put(LINE * 30)
    writer.put(b"a\nb\n" * 1000)
    writer.put(b"fits\n")
    writer.put(b"as well\n")
    pipe.read_until(b"as well\n")
    assert pipe.text.endswith(b"\n" + LINE * 30 + b"lost 2000\nfits\nas well\n")


def test_what_a_full_disk_did_not_take_is_told_once_there_is_room(pipe: Pipe) -> None:
    copy = os.dup(pipe.write_end)
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        os.dup2(full, copy)
        writer = BackgroundWriter(copy, lost)
        for line in (b"one\n", b"two\nthree\n"):
            writer.put(line)
        writer.flush(DEADLINE)
        os.dup2(pipe.write_end, copy)
        writer.put(b"four\n")
        pipe.read_until(b"four\n")
        assert pipe.text == b"lost 3\nfour\n"
    finally:
        os.close(full)
        os.close(copy)


def test_a_description_that_others_have_made_non_blocking_loses_nothing(pipe: Pipe) -> None:
    os.set_blocking(pipe.write_end, False)
    writer = BackgroundWriter(pipe.write_end, lost)
    lines = numbered(0, 200)
    for line in lines:
        writer.put(line)
    pipe.read_until(lines[-1])
    assert pipe.text == b"".join(lines)


def test_flush_waits_for_what_is_read_and_not_for_what_is_not(pipe: Pipe) -> None:
    writer = BackgroundWriter(pipe.write_end, lost)
    writer.flush(DEADLINE)  # nothing was put: nothing to wait for
    writer.put(LINE)
    writer.flush(DEADLINE)
    assert os.read(pipe.read_end, 1000) == LINE
    writer.put(LINE * 100)
    writer.flush(0.01)
    pipe.read_until(LINE)


def test_without_a_thread_to_be_had_the_lines_wait_for_the_next(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    writer = BackgroundWriter(pipe.write_end, lost)
    with monkeypatch.context() as context:
        context.setattr(threading.Thread, "start", no_thread)
        writer.put(b"one\n")
        writer.flush(DEADLINE)
    assert pipe.is_quiet()
    writer.put(b"two\n")
    pipe.read_until(b"two\n")
    assert pipe.text == b"one\ntwo\n"


def start(code: str, stdout: int | None = None, stderr: int | None = None) -> subprocess.Popen[bytes]:
    """A Python process that has detached its stdout and stderr."""
    head = "import sys; from common.stdio import detach_stdio; detach_stdio('lost {}\\n'.format)"
    command = [sys.executable, "-c", f"{head}\n{code}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=stdout, stderr=stderr)


def test_a_traceback_comes_out_whole_once_its_reader_reads(pipe: Pipe) -> None:
    """The function names make it longer than the pipe."""
    names = [f"f{number}_{'x' * 60}" for number in range(80)]
    code = "def g(): raise ValueError('the end')\n"
    for called, name in zip(["g", *names], names, strict=False):
        code += f"def {name}(): {called}()\n"
    process = start(f"{code}{names[-1]}()", stderr=pipe.write_end)
    pipe.read_until(b"ValueError: the end\n")
    assert process.wait(DEADLINE) == 1
    assert pipe.text.startswith(b"Traceback (most recent call last):\n")
    for name in names:
        assert name.encode() in pipe.text


def test_a_process_ends_although_nobody_reads_what_it_says(pipe: Pipe) -> None:
    code = "for stream in (sys.stdout, sys.stderr): stream.write('x' * 999 * 999)"
    process = start(code, stdout=pipe.write_end, stderr=pipe.write_end)
    assert process.wait(DEADLINE) == 0


def test_a_partial_line_comes_out_at_the_end(pipe: Pipe) -> None:
    process = start("print('half', end='')", stdout=pipe.write_end)
    assert process.wait(DEADLINE) == 0
    pipe.read_until(b"half")


@pytest.mark.parametrize(("fd", "stream"), [(1, "stdout"), (2, "stderr")])
def test_a_stream_that_was_closed_is_not_confused_with_what_has_its_number_now(
    pipe: Pipe, fd: int, stream: str
) -> None:
    code = (
        f"import os, sys; os.dup2({pipe.write_end}, {fd})\n"
        "from common.stdio import detach_stdio; detach_stdio(str)\n"
        f"print('stray', file=sys.{stream}, flush=True)"
    )
    command = ["sh", "-c", f'exec "$@" {fd}>&-', "sh", sys.executable, "-c", code]
    subprocess.run(command, cwd=ROOT, pass_fds=[pipe.write_end], check=True, timeout=DEADLINE)
    assert pipe.is_quiet()
