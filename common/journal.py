# SPDX-License-Identifier: GPL-2.0-or-later
"""Logging: structured records to the journal if stderr goes there, plain lines on stderr otherwise.

A record is one line, whatever a peer put into it; a traceback adds lines of its own. No record waits for its
reader: journald gets them through a non-blocking socket, as sd_journal_send(3) waits for a journald that has
stalled, and stderr through a thread (stdio.py). A lost line costs less than an interrupt that waits for one.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping

from common.errors import ModelError, exit_status
from common.lostlines import LOST, LostLines
from common.messages import Event
from common.output import complain
from common.pci import format_devfn
from common.peer import parse_pid
from common.stdio import detach_stdio

__all__ = [
    "JournalHandler",
    "RateLimited",
    "StderrFormatter",
    "device_log",
    "iso_time",
    "printable",
    "report_failure",
    "setup",
]

Log = logging.Logger | logging.LoggerAdapter[logging.Logger]

JOURNAL_SOCKET = "/run/systemd/journal/socket"

_MAX_LINE = 1024
_MAX_TRACEBACK = 40
"""characters of a line, lines of a traceback: so that a record fits into one datagram"""
_RETRY_SECONDS = 0.5
"""how often journald is tried again after it has not taken a line"""
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
"""levels of syslog(3), by the least severe record that gets them"""


def printable(text: str) -> str:
    r"""The text on one line: line breaks, control characters and direction marks are escaped, as ``\n``."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def device_log(program: str, device: str, devfn: int) -> logging.LoggerAdapter[logging.Logger]:
    """The logger of one device of the program: its lines begin with the device's id, and have its address."""
    return logging.LoggerAdapter(logging.getLogger(program), {"device": device, "devfn": devfn})


def setup(program: str, vm: str, *, verbose: bool = False, journal_socket: str = JOURNAL_SOCKET) -> None:
    """Sends what the process logs to its stderr, or to the journal when that is where stderr goes.

    ``vm`` is the VM's name, or empty. The program's own loggers log from INFO on, or from DEBUG on if it is
    ``verbose``, libraries from WARNING on. From here on neither stdout nor stderr blocks (see detach_stdio()).
    """
    stderr = StderrFormatter(program, vm)
    detach_stdio(stderr.describe_loss, LOST.add)
    handler: logging.Handler
    if stderr_is_journal(os.environ):
        handler = JournalHandler(program, vm, journal_socket, LOST)
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(stderr)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger(program).setLevel(logging.DEBUG if verbose else logging.INFO)


def report_failure(program: str, error: Exception) -> int:
    """Tells on one line why the process ends: on stderr, or in the journal if that is where stderr goes.

    Returns the exit status.
    """
    status = exit_status(error)
    if not stderr_is_journal(os.environ):
        complain(program, error)
        return status
    if not logging.getLogger().handlers:
        setup(program, "")
    text = getattr(error, "strerror", None) or str(error)
    event = Event.MODEL_NOT_LOADED if isinstance(error, ModelError) else Event.START_FAILED
    RateLimited(logging.getLogger(program)).error("%s", text, event=event)
    return status


def stderr_is_journal(environ: Mapping[str, str]) -> bool:
    """Whether fd 2 is the stream that ``$JOURNAL_STREAM`` tells of (systemd.exec(5))."""
    try:
        stderr = os.fstat(2)
    except OSError:
        return False
    return environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}"


class StderrFormatter(logging.Formatter):
    """``2026-01-31T12:00:00.123+00:00 iohub-remoted[vm1] edu0: warning: text``; INFO is not shown as a level."""

    def __init__(self, program: str, vm: str) -> None:
        super().__init__()
        self._head = f"{program}[{vm}]" if vm else program

    def format(self, record: logging.LogRecord) -> str:
        context = _context(record)
        head = f"{iso_time(record.created)} {self._head}"
        head += f" {context}" if context else ": "
        if record.levelno != logging.INFO:
            head += f"{record.levelname.lower()}: "
        return "\n".join(head + line for line in _lines(record))

    def describe_loss(self, lines: int) -> str:
        """The line that stands where so many could not be written."""
        now = iso_time(time.time())
        return f"{now} {self._head}: warning: lines lost here, as they could not be written: {lines}\n"


class JournalHandler(logging.Handler):
    """Sends records to journald in its native protocol (https://systemd.io/JOURNAL_NATIVE_PROTOCOL/).

    Fields: MESSAGE, PRIORITY, SYSLOG_IDENTIFIER, CODE_FILE, CODE_LINE, CODE_FUNC and, where they apply, MESSAGE_ID
    (an Event), IOHUB_VM, IOHUB_DEVICE, IOHUB_ADDR (as 05.0), IOHUB_PIRQ (a decimal number), IOHUB_PEER (as
    qemu[12]) and IOHUB_PEER_PID.
    What journald does not take at once is dropped; a line with the number follows as soon as it takes lines again.
    """

    def __init__(
        self, program: str, vm: str, path: str = JOURNAL_SOCKET, lost: LostLines | None = None
    ) -> None:
        """``lost`` counts what journald did not take."""
        super().__init__()
        self._lost = lost or LostLines()
        self._program = program
        self._vm = vm
        self._path = path
        self._dropped = 0
        self._has_thread = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            datagram = self._datagram(record)
        except Exception:  # noqa: BLE001  logging's rule: a record that can't be formatted does not end its sender
            self.handleError(record)
            return
        if not self._tell_loss() or not self._send(datagram):
            self._dropped += 1
            self._lost.add(1)
            self._tell_later()

    def _tell_loss(self) -> bool:
        """Whether all lines so far have been taken, or their loss has been told now."""
        if self._dropped and self._send(self._loss()):
            self._dropped = 0
        return not self._dropped

    def _tell_later(self) -> None:
        """No line may follow for long: a thread tells of the loss as soon as journald takes it."""
        if not self._has_thread:
            self._has_thread = True
            try:
                threading.Thread(target=self._retry, name="journal", daemon=True).start()
            except RuntimeError:  # no thread can be started now; the next loss tries again
                self._has_thread = False

    def _retry(self) -> None:
        while self._has_thread:
            threading.Event().wait(_RETRY_SECONDS)
            self.acquire()
            try:
                self._has_thread = not self._tell_loss()
            finally:
                self.release()

    def close(self) -> None:
        self._dropped = 0
        self._socket.close()
        super().close()

    def _send(self, datagram: bytes) -> bool:
        try:
            # By path each time: a restarted journald has a new socket there.
            self._socket.sendto(datagram, self._path)
        except OSError:
            return False
        return True

    def _datagram(self, record: logging.LogRecord) -> bytes:
        context = f"{self._vm} {_context(record)}" if self._vm else _context(record)
        devfn: int | None = getattr(record, "devfn", None)
        peer = _extra(record, "peer")
        pid = parse_pid(peer)
        fields = {
            "MESSAGE": context + "\n".join(_lines(record)),
            "MESSAGE_ID": _extra(record, "event"),
            "PRIORITY": str(_priority(record.levelno)),
            "SYSLOG_IDENTIFIER": self._program,
            "CODE_FILE": record.pathname,
            "CODE_LINE": str(record.lineno),
            "CODE_FUNC": record.funcName,
            "IOHUB_VM": self._vm,
            "IOHUB_DEVICE": _extra(record, "device"),
            "IOHUB_ADDR": "" if devfn is None else format_devfn(devfn),
            "IOHUB_PIRQ": "" if devfn is None else str(devfn),
            "IOHUB_PEER": peer,
            "IOHUB_PEER_PID": str(pid) if pid else "",
        }
        return b"".join(_field(name, value) for name, value in fields.items() if value)

    def _loss(self) -> bytes:
        text = f"lines lost here, as journald did not take them: {self._dropped}"
        record = logging.LogRecord(self._program, logging.WARNING, __file__, 0, text, (), None)
        record.event = Event.JOURNAL_LOST
        return self._datagram(record)


class RateLimited:
    """Limits what a peer can make one place log: ``burst`` lines in each ``interval`` seconds.

    The next line that passes says how many were suppressed. ``event`` is the kind of event, which the message
    catalog explains; ``peer`` names whom a line is about, as ``str()`` of PeerCredentials does. What a peer can
    cause to be made again, such as a session, must not own one, or the limit would start again: its device does.
    """

    def __init__(
        self,
        log: Log,
        burst: int = 10,
        interval: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # Before Python 3.13 an adapter replaces what a call gives as ``extra``.
        self._log = log if isinstance(log, logging.Logger) else log.logger
        self._extra = {} if isinstance(log, logging.Logger) else log.extra or {}
        self._burst = burst
        self._interval = interval
        self._clock = clock
        self._start = -interval
        self._passed = 0
        self._suppressed = 0

    def info(self, message: str, *args: object, event: Event | None = None, peer: str = "") -> None:
        self._limited(logging.INFO, message, args, event, peer)

    def warning(self, message: str, *args: object, event: Event | None = None, peer: str = "") -> None:
        self._limited(logging.WARNING, message, args, event, peer)

    def error(self, message: str, *args: object, event: Event | None = None) -> None:
        self._limited(logging.ERROR, message, args, event, "")

    def exception(self, message: str, *args: object, event: Event | None = None) -> bool:
        """An error with the traceback of the exception that is being handled; False if it was suppressed."""
        return self._limited(logging.ERROR, message, args, event, "", exc_info=True)

    def _limited(
        self,
        level: int,
        message: str,
        args: tuple[object, ...],
        event: Event | None,
        peer: str,
        *,
        exc_info: bool = False,
    ) -> bool:
        now = self._clock()
        if now - self._start >= self._interval:
            self._start = now
            self._passed = 0
        if self._passed >= self._burst:
            self._suppressed += 1
            return False
        self._passed += 1
        if self._suppressed:
            text = message % args if args else message
            message, args = "%s (%d more suppressed before)", (text, self._suppressed)
            self._suppressed = 0
        extra = dict(self._extra)
        if event is not None:
            extra["event"] = event
        if peer:
            extra["peer"] = peer
        # The caller of this method's caller is who logs.
        self._log.log(level, message, *args, exc_info=exc_info, extra=extra, stacklevel=3)
        return True


def _context(record: logging.LogRecord) -> str:
    """``edu0: qemu[12]: ``, as far as it is known."""
    return "".join(f"{name}: " for name in (_extra(record, "device"), _extra(record, "peer")) if name)


def _extra(record: logging.LogRecord, name: str) -> str:
    return printable(str(getattr(record, name, "")))


def _lines(record: logging.LogRecord) -> list[str]:
    """The message as one line, and the lines of the traceback if there is one."""
    lines = [record.getMessage()]
    if record.exc_info:
        lines += logging.Formatter().formatException(record.exc_info).splitlines()[-_MAX_TRACEBACK:]
    return [printable(line[:_MAX_LINE])[:_MAX_LINE] for line in lines]


def iso_time(seconds: float) -> str:
    """``2026-01-31T12:00:00.123+00:00``, in local time; ``seconds`` since the epoch."""
    whole, milliseconds = divmod(int(seconds * 1000), 1000)
    zone = time.strftime("%z", time.localtime(whole))  # +0000
    now = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(whole))
    return f"{now}.{milliseconds:03}{zone[:3]}:{zone[3:]}"  # datetime is a tenth of a start's imports


def _priority(level: int) -> int:
    return next((priority for least, priority in _PRIORITIES if level >= least), 7)


def _field(name: str, value: str) -> bytes:
    data = value.encode("utf-8", "backslashreplace")
    if b"\n" not in data:
        return b"%s=%s\n" % (name.encode(), data)
    return b"%s\n%s%s\n" % (name.encode(), len(data).to_bytes(8, "little"), data)
