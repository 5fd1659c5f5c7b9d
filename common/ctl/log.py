# SPDX-License-Identifier: GPL-2.0-or-later
"""``iohubctl log``: what the journal has about one VM, in one stream.

The stream has the lines of both daemons, of QEMU's unit, of systemd about these units, and of the kernel's KVM
about the VM's process. Any process can send lines with IOHUB_VM: a line counts as the daemons' if its process runs
in their units, or if its user is trusted (_SYSTEMD_UNIT and _UID, systemd.journal-fields(7)).
"""

from __future__ import annotations

import errno
import os
import re
import select
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, NamedTuple

from common.ctl.journalentry import Entry, as_json, as_text
from common.errors import IohubError, UsageError
from common.messages import Event
from common.output import OutputError, complain, emit
from common.pci import format_devfn, parse_devfn
from common.trust import Trust

__all__ = ["Query", "parse_since", "show_log"]

_JOURNALS = ("/var/log/journal", "/run/log/journal")
"""where systemd-journald has its files, in a folder for each machine ID"""
_AGO = re.compile(r"([0-9]{1,9})(s|m|h|d)", re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_KVM_LINE = re.compile(r"kvm \[([0-9]+)\]: ", re.ASCII)
"""kvm_pr_unimpl() in include/linux/kvm_host.h: the pid of the process whose vCPU it is about"""
_ATTACHED_PID = re.compile(r"\bof pid:([0-9]+)\b", re.ASCII)
_EVENTS = frozenset(map(str, Event))
_NO_CATALOG = "iohub's message catalog is not installed, or of another version: journalctl --update-catalog"
_PROCESS_EVENTS = (Event.QEMU_ATTACHED, Event.VM_ATTACHED, Event.LINK_UP)
"""lines of proxyd that tell which process the VM is; with LINK_UP it is proxyd"""


class Query(NamedTuple):
    """Which lines, and how."""

    vm: str
    device: str | None
    """a device's id or address, or None for all lines"""
    since: float | None
    """seconds since the epoch, or None for all lines; for those to come if it follows"""
    follow: bool
    explain: bool
    json: bool


def parse_since(text: str, now: float) -> float:
    """Seconds since the epoch of ``2026-01-31 12:00`` (local time unless it says otherwise), or of ``10m`` ago.

    ``now`` is in the same unit. Raises UsageError.
    """
    if (ago := _AGO.fullmatch(text)) is not None:
        return max(0.0, now - int(ago[1]) * _SECONDS[ago[2]])
    try:
        return max(0.0, datetime.fromisoformat(text).timestamp())
    except (ValueError, OverflowError, OSError) as error:
        raise UsageError(
            f"--since {text!r} is neither a time, such as '2026-01-31 12:00', "
            "nor how long ago, such as 90s, 10m, 2h or 1d"
        ) from error


def show_log(query: Query, trust: Trust) -> None:
    """Prints the lines, oldest first; with ``follow`` it goes on until it is interrupted.

    If the catalog is missing, one line on stderr tells. Raises IohubError when systemd-python is missing or the
    journal can't be read, and OutputError.
    """
    _check_readable()
    uids = sorted({0, os.geteuid(), *trust.others})
    processes = _Processes(query.vm)
    if query.device is None:
        earlier = _open()
        _match_daemons(earlier, query.vm, uids, [f"MESSAGE_ID={event}" for event in _PROCESS_EVENTS])
        for entry in _entries(earlier):
            processes.note(entry)
        earlier.close()
    reader = _open()
    _match(reader, query, uids)
    if query.since is not None:
        reader.seek_realtime(query.since)
    elif query.follow:
        reader.seek_tail()
        reader.get_previous()
    is_unexplained = False
    while True:
        for entry in _entries(reader):
            processes.note(entry)
            if processes.includes(entry):
                explanation = _explanation(reader) if query.explain else None
                if query.explain and explanation is None and entry.get("MESSAGE_ID") in _EVENTS:
                    if not is_unexplained:
                        complain("iohubctl", IohubError(_NO_CATALOG))
                    is_unexplained = True
                emit(as_json(entry, explanation) if query.json else as_text(entry, query.vm, explanation))
        if not query.follow:
            return
        _wait(reader)


class _Processes:
    """The processes that the VM has been, in each boot: the kernel tells of a VM by its process's pid."""

    def __init__(self, vm: str) -> None:
        self._qemu = f"qemu@{vm}.service"
        self._known: set[tuple[str, str]] = set()

    def note(self, entry: Entry) -> None:
        """Looks whether a line tells of such a process."""
        boot, event = entry.get("_BOOT_ID", ""), entry.get("MESSAGE_ID")
        pid: object = None
        if event == Event.QEMU_ATTACHED:
            pid = entry.get("IOHUB_PEER_PID")
        elif event == Event.VM_ATTACHED:
            found = _ATTACHED_PID.search(str(entry.get("MESSAGE", "")))
            pid = found[1] if found else None
        elif event == Event.LINK_UP or entry.get("_SYSTEMD_UNIT") == self._qemu:
            pid = entry.get("_PID")
        if pid is not None:
            self._known.add((str(boot), str(pid)))

    def includes(self, entry: Entry) -> bool:
        """Whether a line is about the VM: all are, but for those of the kernel about other processes."""
        if entry.get("_TRANSPORT") != "kernel":
            return True
        found = _KVM_LINE.match(str(entry.get("MESSAGE", "")))
        return found is not None and (str(entry.get("_BOOT_ID", "")), found[1]) in self._known


def _match(reader: Any, query: Query, uids: list[int]) -> None:
    """Selects the lines of the query, and all of the kernel, which _Processes selects from."""
    if query.device is not None:
        places = [f"IOHUB_DEVICE={query.device}"]
        _match_daemons(reader, query.vm, uids, places)
        try:
            place = f"IOHUB_ADDR={format_devfn(parse_devfn(query.device))}"
        except UsageError:
            return
        reader.add_disjunction()
        _match_daemons(reader, query.vm, uids, [place])
        return
    _match_daemons(reader, query.vm, uids, [])
    units = [*_daemon_units(query.vm), f"qemu@{query.vm}.service"]
    # As journalctl --unit: of the unit, of systemd about it, of other daemons of root about it.
    for fields in (
        [f"_SYSTEMD_UNIT={unit}" for unit in units],
        ["_PID=1", *(f"UNIT={unit}" for unit in units)],
        ["_UID=0", *(f"OBJECT_SYSTEMD_UNIT={unit}" for unit in units)],
        ["_UID=0", *(f"COREDUMP_UNIT={unit}" for unit in units)],
        # Warnings and worse, as those of kvm_pr_unimpl() are: each line of the kernel has to be looked at.
        ["_TRANSPORT=kernel", *(f"PRIORITY={priority}" for priority in range(5))],
    ):
        reader.add_disjunction()
        reader.add_match(*fields)


def _match_daemons(reader: Any, vm: str, uids: list[int], fields: list[str]) -> None:
    """Selects what the daemons of the VM have logged; with ``fields`` only lines that have one of them."""
    reader.add_match(*(f"_SYSTEMD_UNIT={unit}" for unit in _daemon_units(vm)), *fields)
    reader.add_disjunction()
    reader.add_match(f"IOHUB_VM={vm}", *(f"_UID={uid}" for uid in uids), *fields)


def _daemon_units(vm: str) -> tuple[str, str]:
    return f"iohub-remoted@{vm}.service", f"iohub-proxyd@{vm}.service"


def _open() -> Any:
    """A systemd.journal.Reader whose values are strings, or bytes if they are not UTF-8."""
    try:
        from systemd.journal import Reader
    except ImportError as error:
        raise IohubError(
            "the journal can't be read without systemd-python: apt-get install python3-systemd, "
            "or pip install systemd-python"
        ) from error
    try:
        reader = Reader()
    except OSError as error:
        raise IohubError(f"the journal can't be opened: {error.strerror}") from error
    reader.converters = dict.fromkeys(
        ("__REALTIME_TIMESTAMP", "__MONOTONIC_TIMESTAMP", "__CURSOR"), lambda value: value
    )
    return reader


def _entries(reader: Any) -> Iterator[Entry]:
    """Those from here to the present end."""
    while True:
        try:
            entry: Mapping[str, Any] = reader.get_next()
        except OSError as error:
            raise IohubError(f"the journal can't be read: {error.strerror or error}") from error
        if not entry:
            return
        yield entry


def _explanation(reader: Any) -> str | None:
    """What the catalog says about the present entry, with its fields filled in."""
    try:
        text: str = reader.get_catalog()
    except (OSError, LookupError):  # no catalog, or no entry in it (KeyError); no MESSAGE_ID (IndexError)
        return None
    return text


def _wait(reader: Any) -> None:
    """Until the journal has changed. Raises OutputError when the reader of stdout has gone."""
    poll = select.poll()
    poll.register(reader.fileno(), reader.get_events())
    poll.register(1, 0)
    if any(fd == 1 for fd, _events in poll.poll(reader.get_timeout_ms())):
        gone = BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        raise OutputError(gone) from gone
    reader.process()


def _check_readable() -> None:
    """Raises IohubError unless the files of the system's journal can be read: libsystemd would skip them."""
    denied = None
    for folder in _JOURNALS:
        try:
            machines = [entry.path for entry in os.scandir(folder) if entry.is_dir()]
            names = [os.path.join(machine, name) for machine in machines for name in os.listdir(machine)]
        except PermissionError as error:
            denied = error.filename
            continue
        except OSError:
            continue
        for name in names:
            if os.path.basename(name) == "system.journal":
                if os.access(name, os.R_OK):
                    return
                denied = name
    if denied is None:
        raise IohubError(
            f"this host has no journal in {' or '.join(_JOURNALS)}: is systemd-journald running?"
        )
    raise IohubError(f"{denied}: permission denied: be root, or in the group systemd-journal")
