# SPDX-License-Identifier: GPL-2.0-or-later
"""The message catalog: it explains each kind of event that the daemons log, and nothing else."""

from __future__ import annotations

import ast
import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from common.messages import Event
from tests.support.checkout import ROOT

CATALOG = ROOT / "systemd/iohub.catalog"
FIELDS = {"IOHUB_VM", "IOHUB_DEVICE", "SYSLOG_IDENTIFIER", "_SYSTEMD_UNIT"}
"""what an entry may refer to; those with a device are checked below"""
DEVICELESS = ("common/control.py", "common/listen.py", "common/journal.py", "proxyd/vm/qmp/plugger.py")
"""where events without a device are logged, among others"""


@functools.cache
def entries() -> dict[str, tuple[dict[str, str], list[str]]]:
    """By ID: the headers, and the paragraphs."""
    found: dict[str, tuple[dict[str, str], list[str]]] = {}
    text = re.sub(r"^#.*\n", "", CATALOG.read_text(), flags=re.MULTILINE)
    for block in re.split(r"^-- ", text, flags=re.MULTILINE)[1:]:
        head, _, body = block.partition("\n\n")
        identifier, *headers = head.splitlines()
        assert identifier not in found
        fields = dict(line.split(": ", 1) for line in headers)
        assert len(fields) == len(headers)
        found[identifier] = fields, [part for part in body.strip().split("\n\n") if part]
    return found


@functools.cache
def used_events() -> set[tuple[str, str]]:
    """Where in the daemons events are named: the event and the file."""
    found = set()
    for package in ("common", "proxyd", "remoted"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "Event":
                    found.add((node.attr, str(path.relative_to(ROOT))))
    return found


def test_each_event_has_an_entry_and_each_entry_an_event() -> None:
    assert set(entries()) == set(Event)


def test_each_event_is_logged_somewhere() -> None:
    assert {name for name, _ in used_events()} == set(Event.__members__)


def test_each_warning_and_error_tells_of_an_event() -> None:
    """Of a device's own log, which is its author's, and of the helpers that take the event, nothing is asked."""
    without = []
    for package in ("common", "proxyd", "remoted"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                    continue
                if node.func.attr not in ("warning", "error", "exception", "critical"):
                    continue
                receiver = ast.unparse(node.func.value)
                if "log" in receiver.lower() and "event" not in {keyword.arg for keyword in node.keywords}:
                    without.append(f"{path.relative_to(ROOT)}:{node.lineno}: {receiver}.{node.func.attr}()")
    assert without == []


def test_an_id_is_one_that_sd_id128_takes() -> None:
    """sd-id128(3): 32 hexadecimal digits; not two members with the same."""
    assert all(re.fullmatch("[0-9a-f]{32}", event) for event in Event)
    assert len(Event.__members__) == len(set(Event))


@pytest.mark.parametrize("event", Event, ids=lambda event: event.name)
def test_an_entry_is_whole(event: Event) -> None:
    headers, paragraphs = entries()[event]
    assert list(headers) == ["Subject", "Defined-By", "Documentation"]
    assert headers["Defined-By"] == "iohub"
    assert re.fullmatch(
        r"man:iohub(ctl\(1\)|-proxyd\(8\)|-remoted\(8\)|\.toml\(5\))", headers["Documentation"]
    )
    assert len(paragraphs) == 3, "what has happened, what it means for the guest, what to do"
    assert all(paragraph.endswith((".", ").", ".`")) for paragraph in paragraphs)
    text = " ".join([headers["Subject"], *paragraphs])
    assert set(re.findall(r"@([A-Z_]+)@", text)) <= FIELDS


@pytest.mark.parametrize("event", Event, ids=lambda event: event.name)
def test_an_entry_has_only_fields_that_its_lines_have(event: Event) -> None:
    """journalctl prints the name of a field that is missing."""
    headers, paragraphs = entries()[event]
    places = {path for name, path in used_events() if name == event.name}
    if places.intersection(DEVICELESS) and event != Event.NOT_EJECTED:  # which a function logs
        assert "@IOHUB_DEVICE@" not in " ".join([headers["Subject"], *paragraphs])


def test_journalctl_takes_it_without_a_word(tmp_path: Path) -> None:
    if shutil.which("journalctl") is None:
        pytest.skip("no journalctl")
    folder = tmp_path / "usr/lib/systemd/catalog"
    folder.mkdir(parents=True)
    shutil.copy(CATALOG, folder)
    (tmp_path / "var/lib/systemd/catalog").mkdir(parents=True)
    done = subprocess.run(
        ["journalctl", f"--root={tmp_path}", "--update-catalog"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "var/lib/systemd/catalog/database").stat().st_size > len(CATALOG.read_text()) / 2
