# SPDX-License-Identifier: GPL-2.0-or-later
"""The test's own monitor of a QEMU: blocking, and nothing of the code under test."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.fds import send_fds
from tests.support.qemu import PATIENCE
from tests.support.wait import wait_until


class CommandRefused(Exception):
    """QEMU answered with an error."""


class Monitor:
    """One QMP connection; ``events`` are those that came so far and nobody waited for."""

    def __init__(self, sock: socket.socket) -> None:
        """Takes ownership of a connected socket and waits for the greeting.

        Raises EOFError or ConnectionError when QEMU has ended instead.
        """
        self._socket = sock
        self._socket.settimeout(PATIENCE)
        self._lines = sock.makefile("r")
        self.events: list[dict[str, Any]] = []
        try:
            self._read()
            self.execute("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def execute(self, command: str, **arguments: object) -> Any:
        """The command's result. Raises CommandRefused."""
        return self._execute(command, arguments, [])

    def getfd(self, name: str, fd: int) -> None:
        """Leaves a duplicate of an fd in QEMU."""
        self._execute("getfd", {"fdname": name}, [fd])

    def _execute(self, command: str, arguments: dict[str, object], fds: list[int]) -> Any:
        request = json.dumps({"execute": command, "arguments": arguments}).encode()
        send_fds(self._socket, request, fds)
        while True:
            answer = self._read()
            if "error" in answer:
                raise CommandRefused(answer["error"]["desc"])
            if "return" in answer:
                return answer["return"]
            self.events.append(answer)

    def wait_event(self, name: str, **data: object) -> None:
        """Waits for an event with these data, and forgets it and those before it."""
        while True:
            while self.events:
                event = self.events.pop(0)
                if event["event"] == name and data.items() <= event.get("data", {}).items():
                    return
            self.events.append(self._read())

    def plugged(self) -> dict[str, str]:
        """The drivers of what has an id, by id."""
        entries = self.execute("qom-list", path="/machine/peripheral")
        return {entry["name"]: entry["type"] for entry in entries if entry["type"].startswith("child<")}

    def _read(self) -> Any:
        line = self._lines.readline()
        if not line:
            raise EOFError("the monitor was closed")
        return json.loads(line)


class MonitorClient(Monitor):
    """A connection to where QEMU listens."""

    def __init__(self, path: Path) -> None:
        """Connects as soon as somebody listens."""
        sock = socket.socket(socket.AF_UNIX)
        try:
            wait_until(lambda: sock.connect_ex(str(path)) == 0, f"a monitor at {path}")
        except BaseException:
            sock.close()
            raise
        super().__init__(sock)
