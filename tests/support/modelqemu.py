# SPDX-License-Identifier: GPL-2.0-or-later
"""A monitor with a memory: what is plugged, which fds and objects it has. It runs in the test's asyncio loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.pci import parse_devfn
from proxyd.vm.qmp.qemu import PROXY_DRIVER
from tests.support.monitorpeer import GREETING


class ModelQemu:
    """Serves one client at a time. Carries out what the slots need of a monitor."""

    def __init__(self) -> None:
        self.devfns: dict[str, int] = {}
        """of what is plugged, by id"""
        self.objects: dict[str, str] = {}
        self.fds: set[str] = set()
        self.commands: list[tuple[str, str]] = []
        """each command, and the id or fdname in it"""
        self.errors: dict[str, tuple[str, str]] = {}
        """classes and descriptions of the errors that commands get"""
        self.consents = True
        """whether the guest ejects at once what QEMU is told to unplug"""
        self.misplaces = False
        """whether devices go elsewhere than to the address that was asked for"""
        self.unanswered = ""
        """a command that gets no answer"""
        self.state = {"running": True, "status": "running"}
        """the result of query-status"""
        self.ejects_on = ""
        """the command on which the guest ejects everything, once"""
        self.clients = 0
        self._writer: asyncio.StreamWriter | None = None
        self._serving: set[asyncio.Task[None] | None] = set()
        self._server: asyncio.Server | None = None
        self._path = Path()

    async def start(self, path: Path) -> None:
        """Listens there."""
        self._path = path
        self._server = await asyncio.start_unix_server(self._serve, path)

    async def close(self) -> None:
        """Ends all connections, and listens no more."""
        if self._server is not None:
            self._server.close()
        if self._writer is not None:
            self._writer.close()
        await asyncio.gather(*filter(None, self._serving))
        self._path.unlink(missing_ok=True)  # from Python 3.13 on the server removes it

    def eject(self, *names: str) -> None:
        """The guest lets devices go."""
        for name in list(names):
            del self.devfns[name]
            self.send({"event": "DEVICE_DELETED", "data": {"device": name}, "timestamp": {}})

    def send(self, message: Mapping[str, object]) -> None:
        assert self._writer is not None
        self._writer.write(json.dumps(message).encode() + b"\r\n")

    def hang_up(self) -> None:
        """Ends the connection; QEMU runs on."""
        assert self._writer is not None
        self._writer.close()

    def count(self, command: str) -> int:
        """How often it was given."""
        return sum(name == command for name, _ in self.commands)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._serving.add(asyncio.current_task())
        self.clients += 1
        self.send(GREETING)
        while data := await reader.read(65536):
            message = json.loads(data)
            command, arguments = message["execute"], message.get("arguments", {})
            self.commands.append((command, str(arguments.get("fdname") or arguments.get("id") or "")))
            if command == self.unanswered:
                continue
            if command == self.ejects_on:
                self.ejects_on = ""
                self.eject(*self.devfns)
            tag = {"id": message["id"]} if "id" in message else {}
            if command in self.errors:
                kind, text = self.errors[command]
                self.send({"error": {"class": kind, "desc": text}, **tag})
            else:
                self.send({"return": self._execute(command, arguments), **tag})
                if command == "device_del" and self.consents:
                    self.eject(*(name for name in list(self.devfns) if self._goes(name, arguments["id"])))
        writer.close()
        self._serving.discard(asyncio.current_task())

    def _goes(self, name: str, asked: str) -> bool:
        """Whether the guest ejects one device with the other: they are in one slot."""
        return self.devfns[name] >> 3 == self.devfns.get(asked, -1) >> 3

    def _execute(self, command: str, arguments: Mapping[str, Any]) -> Any:
        if command == "getfd":
            self.fds.add(arguments["fdname"])
        elif command == "closefd":
            self.fds.discard(arguments["fdname"])
        elif command == "object-add":
            self.objects[arguments["id"]] = arguments["qom-type"]
        elif command == "object-del":
            del self.objects[arguments["id"]]
        elif command == "device_add":
            self.fds.remove(arguments["fd"])
            self.devfns[arguments["id"]] = parse_devfn(arguments["addr"]) + 8 * self.misplaces
        elif command == "qom-list":
            return self._list(arguments["path"])
        elif command == "query-pci":
            devices = [
                {"slot": devfn >> 3, "function": devfn & 7, "qdev_id": name, "class_info": {}}
                for name, devfn in self.devfns.items()
            ]
            return [{"bus": 0, "devices": devices}]
        elif command == "query-status":
            return self.state
        return _ANSWERS.get(command, {})

    def _list(self, path: str) -> list[dict[str, str]]:
        if path == "/objects":
            kinds = {"ram0": "memory-backend-memfd", **self.objects}
        elif path == "/machine/peripheral":
            kinds = dict.fromkeys(self.devfns, PROXY_DRIVER)
        else:
            kinds = {"ioapic": "kvm-ioapic"}
        return [{"name": name, "type": f"child<{kind}>"} for name, kind in kinds.items()]


_ANSWERS: Mapping[str, object] = {
    "query-kvm": {"enabled": True},
    "qom-get": "/machine/unattached/device[19]",
    "query-memdev": [{"id": "ram0", "share": True, "size": 64 << 20}],
}
