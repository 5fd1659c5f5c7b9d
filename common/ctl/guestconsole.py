# SPDX-License-Identifier: GPL-2.0-or-later
"""The client of the guest's console: one command line out, records and one final line back.

The protocol is described at the top of proxyd/vm/embedded/guest/main.c.
"""

import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from common.errors import PeerGone, ProtocolError

__all__ = ["READY", "GuestConsole", "Record", "Reply"]

READY = "iohub-guest 1 ready"

COMMAND_MAX = 127  # characters, without the line's end
LINE_MAX = 512  # bytes; the guest's longest line is a row of 16 samples
RECORDS_MAX = 4096  # twice what the largest answer, "samples", has
RECEIVE_SIZE = 4096

_FIELD = r"[a-z][a-z0-9_]*=[^ =]+"
_RECORD = re.compile(rf"\* ([a-z][a-z0-9_]*)((?: {_FIELD})*)")
_OK = re.compile(rf"ok((?: {_FIELD})*)")
_ERR = re.compile(r"err (.+)")


@dataclass(frozen=True)
class Record:
    """One line ``* KIND KEY=VALUE ...``, or the fields of the final ``ok``."""

    kind: str
    fields: dict[str, str]

    def text(self, key: str) -> str:
        """The value of ``key``. Raises ProtocolError if the line had none."""
        try:
            return self.fields[key]
        except KeyError as error:
            raise ProtocolError(f"guest: no {key}= in a line {self.kind!r}") from error

    def number(self, key: str) -> int:
        """The value of ``key``, decimal or 0x hexadecimal. Raises ProtocolError if there is none."""
        return self._parse(key, self.text(key), 0)

    def cycles(self) -> list[int]:
        """The samples of one line, in cycles of the guest's TSC. Raises ProtocolError if there are none."""
        return [self._parse("tsc", word, 16) for word in self.text("tsc").split(",")]

    def _parse(self, key: str, word: str, base: int) -> int:
        try:
            return int(word, base)
        except ValueError as error:
            raise ProtocolError(f"guest: {key}={word[:40]} is not a number") from error


@dataclass(frozen=True)
class Reply:
    """The answer to one command: ``ok`` with its fields or ``err`` with a reason, and the records before."""

    ok: bool
    reason: str
    result: Record
    records: tuple[Record, ...]

    def of_kind(self, kind: str) -> list[Record]:
        """The records of one kind, in the order of their lines."""
        return [record for record in self.records if record.kind == kind]


class GuestConsole:
    """Speaks to a guest over a connected stream socket, one command at a time; owns the socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._received = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the socket; the guest does not notice."""
        self._socket.close()

    def wait_ready(self, timeout: float) -> None:
        """Waits for the line that the guest prints at each start, ``timeout`` seconds at most.

        Raises PeerGone when it does not come, ProtocolError when another line comes.
        """
        line = self._line(timeout)
        if line != READY:
            raise ProtocolError(f"guest: {line[:80]!r} instead of {READY!r}")

    def command(
        self, line: str, on_record: Callable[[Record], None] | None = None, timeout: float = 10.0
    ) -> Reply:
        """Sends one command and reads its whole answer.

        ``on_record`` sees each record as it arrives. ``timeout`` is the longest silence in seconds before a
        line of the answer is complete. Lines for people are skipped. Raises PeerGone on end of file and on
        silence, ProtocolError on a line that the protocol does not have (a guest that stopped or started anew is
        such a case), and ValueError for a command that is no single line of at most 127 printable ASCII
        characters.
        """
        if len(line) > COMMAND_MAX or not (line.isascii() and line.isprintable()):
            raise ValueError(f"not a command line: {line[:80]!r}")
        self._send(line, timeout)
        records: list[Record] = []
        notes = 0
        while True:
            answer = self._line(timeout)
            if match := _RECORD.fullmatch(answer):
                if len(records) == RECORDS_MAX:
                    raise ProtocolError(f"guest: more than {RECORDS_MAX} records for {line!r}")
                record = Record(match[1], _fields(match[2]))
                records.append(record)
                if on_record is not None:
                    on_record(record)
            elif answer.startswith("# ") and notes < RECORDS_MAX:
                notes += 1
            elif match := _OK.fullmatch(answer):
                return Reply(True, "", Record("ok", _fields(match[1])), tuple(records))
            elif match := _ERR.fullmatch(answer):
                return Reply(False, match[1], Record("err", {}), tuple(records))
            else:
                raise ProtocolError(f"guest: {answer[:80]!r} is not an answer to {line!r}")

    def _send(self, line: str, timeout: float) -> None:
        self._socket.settimeout(timeout)
        try:
            self._socket.sendall(line.encode("ascii") + b"\n")
        except TimeoutError as error:
            raise PeerGone(f"guest: took no command for {timeout:g} s") from error
        except OSError as error:
            raise PeerGone(f"guest: console is closed: {error.strerror}") from error

    def _line(self, timeout: float) -> str:
        deadline = time.monotonic() + timeout
        searched = 0
        while (end := self._received.find(b"\n", searched)) < 0:
            searched = len(self._received)
            if searched > LINE_MAX:
                break
            self._receive(deadline, timeout)
        if end < 0 or end > LINE_MAX:
            raise ProtocolError(f"guest: a line of more than {LINE_MAX} bytes")
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        try:
            return line.decode("ascii")
        except UnicodeDecodeError as error:
            raise ProtocolError(f"guest: a line with bytes that are not text: {line[:40]!r}") from error

    def _receive(self, deadline: float, timeout: float) -> None:
        left = deadline - time.monotonic()
        try:
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            data = self._socket.recv(RECEIVE_SIZE)
        except TimeoutError as error:
            raise PeerGone(f"guest: silent for {timeout:g} s") from error
        except OSError as error:
            raise PeerGone(f"guest: console is closed: {error.strerror}") from error
        if not data:
            raise PeerGone("guest: console is closed")
        self._received += data


def _fields(words: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    for word in words.split():
        key, _, value = word.partition("=")
        if key in fields:
            raise ProtocolError(f"guest: {key}= twice in one line")
        fields[key] = value
    return fields
