# SPDX-License-Identifier: GPL-2.0-or-later
"""Logging: what reaches journald and stderr, and that neither a peer nor a stalled journald gets at the daemon."""

from __future__ import annotations

import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from common.journal import JournalHandler, RateLimited, StderrFormatter, device_log, printable
from common.messages import Event
from tests.support.wait import wait_until

PROGRAM = "iohub-test"
HOSTILE = "a\nb\r\x1b[31m\0\x85\u2028\u202e\udcff"
ESCAPED = r"a\nb\r\x1b[31m\x00\x85\u2028\u202e\udcff"


class Journald:
    """The receiving end of the native protocol, decoded as its specification says."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(str(path))

    def receive(self) -> dict[str, str]:
        """The next record. Raises BlockingIOError when there is none."""
        data = self._socket.recv(1 << 20)
        fields: dict[str, str] = {}
        while data:
            line, _, data = data.partition(b"\n")
            name, equals, value = line.partition(b"=")
            if not equals:
                size = int.from_bytes(data[:8], "little")
                value, data = data[8 : 8 + size], data[8 + size :]
                assert data[:1] == b"\n"
                data = data[1:]
            assert name.decode() not in fields
            fields[name.decode()] = value.decode()
        return fields

    def receive_all(self) -> list[dict[str, str]]:
        records = []
        try:
            while True:
                records.append(self.receive())
        except BlockingIOError:
            return records

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "socket"


@pytest.fixture
def journald(path: Path) -> Iterator[Journald]:
    journald = Journald(path)
    yield journald
    journald.close()


@pytest.fixture
def log(path: Path) -> Iterator[logging.Logger]:
    """A program's logger that speaks to the journal."""
    logger = logging.getLogger(PROGRAM)
    handler = JournalHandler(PROGRAM, "vm1", str(path))
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield logger
    logger.removeHandler(handler)
    handler.close()


def stderr_text(level: int, message: str, device: str = "", peer: str = "", vm: str = "vm1") -> str:
    record = logging.LogRecord(PROGRAM, level, __file__, 1, message, (), None)
    if device:
        record.device = device
    if peer:
        record.peer = peer
    when, text = StderrFormatter(PROGRAM, vm).format(record).split(" ", 1)
    assert datetime.fromisoformat(when).timestamp() == pytest.approx(record.created, abs=0.001)
    return text


def test_a_record_has_its_fields(journald: Journald, log: logging.Logger) -> None:
    limited = RateLimited(device_log(PROGRAM, "edu0", 0x29))
    limited.warning("half a %s", "message", event=Event.CLIENT_BROKE_PROTOCOL, peer="qemu[12]")
    line = sys._getframe().f_lineno - 1
    assert journald.receive() == {
        "MESSAGE": "vm1 edu0: qemu[12]: half a message",
        "MESSAGE_ID": "b902f2dc1e144f659fbceeb10b9e57a7",
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": PROGRAM,
        "CODE_FILE": __file__,
        "CODE_LINE": str(line),
        "CODE_FUNC": "test_a_record_has_its_fields",
        "IOHUB_VM": "vm1",
        "IOHUB_DEVICE": "edu0",
        "IOHUB_ADDR": "05.1",
        "IOHUB_PIRQ": "41",
        "IOHUB_PEER": "qemu[12]",
        "IOHUB_PEER_PID": "12",
    }


def test_every_way_to_log_tells_where_that_is(journald: Journald, log: logging.Logger) -> None:
    limited = RateLimited(log)
    adapter = device_log(PROGRAM, "edu0", 0x28)
    for call in (limited.info, limited.warning, limited.error, limited.exception, log.info, adapter.info):
        call("text")
        place = journald.receive()
        assert (place["CODE_FILE"], place["CODE_FUNC"]) == (__file__, sys._getframe().f_code.co_name)
        assert place["CODE_LINE"] == str(sys._getframe().f_lineno - 3)


def test_a_device_without_a_peer_still_has_its_fields(journald: Journald, log: logging.Logger) -> None:
    """Before Python 3.13 an adapter dropped what the call added, or the call what the adapter had."""
    limited = RateLimited(device_log(PROGRAM, "edu0", 0))
    limited.info("text", event=Event.DEVICE_RESET)
    record = journald.receive()
    assert (record["IOHUB_DEVICE"], record["IOHUB_ADDR"], record["IOHUB_PIRQ"]) == ("edu0", "00.0", "0")
    assert record["MESSAGE_ID"] == Event.DEVICE_RESET
    limited.info("text", peer="pid 7")
    record = journald.receive()
    assert (record["IOHUB_DEVICE"], record["IOHUB_PEER"], record["IOHUB_PEER_PID"]) == ("edu0", "pid 7", "7")
    assert "MESSAGE_ID" not in record


def test_what_is_unknown_has_no_field(journald: Journald, log: logging.Logger) -> None:
    log.info("started")
    record = journald.receive()
    assert {name: value for name, value in record.items() if not name.startswith("CODE_")} == {
        "MESSAGE": "vm1 started",
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": PROGRAM,
        "IOHUB_VM": "vm1",
    }


@pytest.mark.parametrize(
    ("level", "priority"),
    [
        (logging.CRITICAL, "2"),
        (logging.ERROR, "3"),
        (logging.WARNING, "4"),
        (logging.INFO, "6"),
        (logging.DEBUG, "7"),
    ],
)
def test_levels_are_syslogs(journald: Journald, log: logging.Logger, level: int, priority: str) -> None:
    log.log(level, "text")
    assert journald.receive()["PRIORITY"] == priority


def test_a_peers_text_stays_in_its_line_and_field(journald: Journald, log: logging.Logger) -> None:
    RateLimited(device_log(PROGRAM, "edu0", 0x28)).warning("got %s", HOSTILE, peer="p\nPRIORITY=0")
    record = journald.receive()
    assert record["MESSAGE"] == rf"vm1 edu0: p\nPRIORITY=0: got {ESCAPED}"
    assert record["IOHUB_PEER"] == r"p\nPRIORITY=0"
    assert record["PRIORITY"] == "4"


def test_a_traceback_follows_its_line(journald: Journald, log: logging.Logger) -> None:
    try:
        raise ValueError(f"odd\n{HOSTILE}")
    except ValueError:
        device_log(PROGRAM, "edu0", 0x28).exception("failed")
    first, *rest = journald.receive()["MESSAGE"].split("\n")
    assert first == "vm1 edu0: failed"
    assert rest[0] == "Traceback (most recent call last):"
    assert "ValueError: odd" in rest
    assert all(printable(line) == line for line in rest)


@pytest.mark.parametrize("character", ["\U0001f600", "\U000e0001"], ids=["printable", "escaped"])
def test_any_record_fits_into_a_datagram(journald: Journald, log: logging.Logger, character: str) -> None:
    """Four bytes each, or ten once it is escaped."""
    wide = character * 5000
    try:
        raise ValueError("\n".join([wide] * 100))
    except ValueError:
        log.exception(wide)
    message = journald.receive()["MESSAGE"]
    assert message.startswith(f"vm1 {printable(character)}")
    log.info("next")
    assert journald.receive()["MESSAGE"] == "vm1 next"


def test_of_a_long_traceback_the_end_is_kept(journald: Journald, log: logging.Logger) -> None:
    """It names the error; the beginning is the daemon's own loop."""
    try:
        raise ValueError("\n".join(f"line {number}" for number in range(100)))
    except ValueError:
        log.exception("failed")
    first, *rest = journald.receive()["MESSAGE"].split("\n")
    assert first == "vm1 failed"
    assert rest == [f"line {number}" for number in range(100 - len(rest), 100)]
    assert 20 <= len(rest) < 100


def test_a_stalled_journald_costs_lines_but_no_time(journald: Journald, log: logging.Logger) -> None:
    sent = 2000  # far more than net.unix.max_dgram_qlen
    for number in range(sent):
        log.info("line %d", number)
    taken = journald.receive_all()
    assert 0 < len(taken) < sent
    assert [record["MESSAGE"] for record in taken] == [f"vm1 line {number}" for number in range(len(taken))]
    log.info("again")
    loss = journald.receive()
    assert loss["MESSAGE"] == f"vm1 lines lost here, as journald did not take them: {sent - len(taken)}"
    assert (loss["MESSAGE_ID"], loss["PRIORITY"]) == (Event.JOURNAL_LOST, "4")
    log.info("and again")
    assert [record["MESSAGE"] for record in journald.receive_all()] == ["vm1 again", "vm1 and again"]


def test_each_lost_line_is_counted_once(journald: Journald, log: logging.Logger) -> None:
    """Where journald has room for the line that tells of the loss and for no more, too."""
    sent = 2000
    for _ in range(sent):
        log.info("text")
    taken = 0
    for _ in range(2):
        journald.receive()
        taken += 1
        log.info("there is no room for this one")
        sent += 1
    records = journald.receive_all()
    log.info("text")
    sent += 1
    records += journald.receive_all()
    losses = [record["MESSAGE"] for record in records if record.get("MESSAGE_ID") == Event.JOURNAL_LOST]
    assert len(losses) >= 2
    taken += len(records) - len(losses)
    assert sum(int(loss.rpartition(" ")[2]) for loss in losses) == sent - taken


def test_a_loss_is_told_although_no_line_follows(path: Path, log: logging.Logger) -> None:
    for _ in range(3):
        log.info("nobody listens")
    journald = Journald(path)
    records: list[dict[str, str]] = []

    def has_come() -> bool:
        records.extend(journald.receive_all())
        return bool(records)

    wait_until(has_come, "the loss is told")
    assert [record["MESSAGE"] for record in records] == [
        "vm1 lines lost here, as journald did not take them: 3"
    ]
    log.info("text")
    assert journald.receive()["MESSAGE"] == "vm1 text"
    journald.close()


def test_journald_may_come_and_go(path: Path, log: logging.Logger) -> None:
    log.info("nobody listens")
    for dropped in (1, 0):
        journald = Journald(path)
        log.info("text")
        messages = [record["MESSAGE"] for record in journald.receive_all()]
        loss = f"vm1 lines lost here, as journald did not take them: {dropped}"
        assert messages == [*[loss][:dropped], "vm1 text"]
        journald.close()
        path.unlink()


def test_a_record_that_does_not_format_ends_nobody(
    journald: Journald,
    log: logging.Logger,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(log, "propagate", False)  # pytest's own handler raises
    log.info("%d", "text")
    assert "Logging error" in capsys.readouterr().err
    assert journald.receive_all() == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (stderr_text(logging.INFO, "text"), "iohub-test[vm1]: text"),
        (stderr_text(logging.INFO, "text", vm=""), "iohub-test: text"),
        (stderr_text(logging.INFO, "text", "edu0"), "iohub-test[vm1] edu0: text"),
        (stderr_text(logging.INFO, "text", "edu0", "qemu[12]"), "iohub-test[vm1] edu0: qemu[12]: text"),
        (stderr_text(logging.WARNING, "text", "edu0"), "iohub-test[vm1] edu0: warning: text"),
        (stderr_text(logging.ERROR, "text"), "iohub-test[vm1]: error: text"),
        (stderr_text(logging.DEBUG, "text"), "iohub-test[vm1]: debug: text"),
        (stderr_text(logging.INFO, HOSTILE, "edu0"), f"iohub-test[vm1] edu0: {ESCAPED}"),
        (stderr_text(logging.INFO, "text", peer="a\nb"), r"iohub-test[vm1] a\nb: text"),
    ],
)
def test_lines_on_stderr(text: str, expected: str) -> None:
    assert text == expected


def run_setup(stderr: int, environ: dict[str, str], journal: Path, *verbose: str) -> None:
    """A process of its own whose program and whose library log a line of each kind."""
    code = (
        "import logging, sys; from common.journal import device_log, setup\n"
        "setup('iohub-test', 'vm1', verbose=len(sys.argv) > 2, journal_socket=sys.argv[1])\n"
        "device_log('iohub-test', 'edu0', 0x28).info('ready')\n"
        "logging.getLogger('iohub-test').debug('detail')\n"
        "logging.getLogger('library').info('chatter')\n"
        "logging.getLogger('library').warning('odd')\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(journal), *verbose],
        stderr=stderr,
        env={**os.environ, **environ},
        check=True,
    )


def test_setup_on_a_plain_stderr(tmp_path: Path, path: Path, journald: Journald) -> None:
    with open(tmp_path / "stderr", "w+b") as stderr:
        run_setup(stderr.fileno(), {"JOURNAL_STREAM": "1:1"}, path)
        stderr.seek(0)
        lines = stderr.read().decode().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == [
        "iohub-test[vm1] edu0: ready",
        "iohub-test[vm1]: warning: odd",
    ]
    for line in lines:
        assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d ", line)
    assert journald.receive_all() == []


def test_setup_below_journald(tmp_path: Path, path: Path, journald: Journald) -> None:
    with open(tmp_path / "stderr", "w+b") as stderr:
        status = os.fstat(stderr.fileno())
        run_setup(stderr.fileno(), {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}, path)
        stderr.seek(0)
        assert stderr.read() == b""
    assert [record["MESSAGE"] for record in journald.receive_all()] == ["vm1 edu0: ready", "vm1 odd"]


def test_verbose_shows_what_is_for_debugging_of_the_program_only(
    tmp_path: Path, path: Path, journald: Journald
) -> None:
    with open(tmp_path / "stderr", "w+b") as stderr:
        status = os.fstat(stderr.fileno())
        environ = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        run_setup(stderr.fileno(), environ, path, "verbose")
    messages = [record["MESSAGE"] for record in journald.receive_all()]
    assert messages == ["vm1 edu0: ready", "vm1 detail", "vm1 odd"]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_rate_limit(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    limited = RateLimited(logging.getLogger(PROGRAM), burst=2, interval=5.0, clock=clock)
    caplog.set_level(logging.INFO)
    for number in range(5):
        limited.warning("line %d", number)
    clock.now = 4.9
    limited.info("suppressed")
    clock.now = 5.0
    limited.warning("100%")
    limited.info("100 %s", "%d")
    limited.info("suppressed")
    clock.now = 100.0
    limited.info("100%")
    limited.info("last")
    assert [record.getMessage() for record in caplog.records] == [
        "line 0",
        "line 1",
        "100% (4 more suppressed before)",
        "100 %d",
        "100% (1 more suppressed before)",
        "last",
    ]
    assert [record.levelno for record in caplog.records] == [30, 30, 30, 20, 20, 20]


def test_default_rate_limit(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    limited = RateLimited(logging.getLogger(PROGRAM), clock=clock)
    for _ in range(100):
        limited.warning("text")
    assert len(caplog.records) == 10
    clock.now = 5.0
    limited.warning("text")
    assert len(caplog.records) == 11
