# SPDX-License-Identifier: GPL-2.0-or-later
"""The control sockets as varlinkctl(1) sees them, systemd's own implementation of Varlink."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.control import call
from common.ctl.answers import DAEMONS as INTERFACES
from common.ctl.children import Child
from common.version import package_version
from tests.support.wait import wait_until

pytestmark = pytest.mark.skipif(
    shutil.which("varlinkctl") is None, reason="needs varlinkctl, of systemd 255 or later"
)

DAEMONS = ("remoted", "proxyd")


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """The runtime directory of both daemons, linked."""
    common = ["--name=vm1", f"--runtime-dir={tmp_path}"]
    remoted = Child("remoted", [*common, "--device=irq-line,id=line0,addr=05.0"], tmp_path)
    try:
        proxyd = Child("proxyd", [*common, "--vm=soft", "--device=id=line0,addr=05.0"], tmp_path)
        try:
            yield tmp_path
        finally:
            proxyd.kill()
    finally:
        remoted.kill()


def interface(daemon: str) -> str:
    return f"org.iohub.{daemon.capitalize()}"


def varlinkctl(directory: Path, daemon: str, *words: str) -> subprocess.CompletedProcess[str]:
    """``words``: the command's options, the command, and what follows the address."""
    index = next(index for index, word in enumerate(words) if not word.startswith("-"))
    address = f"unix:{directory / daemon}.varlink"
    return subprocess.run(
        ["varlinkctl", "--no-pager", *words[: index + 1], address, *words[index + 1 :]],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def answer(directory: Path, daemon: str, *words: str) -> Any:
    """What it prints as JSON."""
    ended = varlinkctl(directory, daemon, "--json=short", *words)
    assert ended.returncode == 0, ended.stderr
    # --more writes a JSON text sequence (RFC 7464); of an empty reply nothing is written.
    return json.loads(ended.stdout.removeprefix("\x1e") or "{}")


def declarations(definition: str) -> list[str]:
    """Types, methods and errors, sorted, without comments and white space."""
    lines = (line for line in definition.splitlines() if not line.startswith("#"))
    return sorted(re.split("(?=type|method|error)", "".join("".join(line.split()) for line in lines)))


def is_high(directory: Path) -> bool:
    (function,) = call(directory / "remoted.varlink", "org.iohub.Remoted.Status")["functions"]
    return bool(function["level"])


@pytest.mark.parametrize("daemon", DAEMONS)
def test_info(directory: Path, daemon: str) -> None:
    info = answer(directory, daemon, "info")
    assert (info["vendor"], info["product"]) == ("iohub", f"iohub-{daemon}")
    assert info["version"] == package_version()
    assert sorted(info["interfaces"]) == [interface(daemon), "org.varlink.service"]


@pytest.mark.parametrize("daemon", DAEMONS)
def test_introspect(directory: Path, daemon: str) -> None:
    """It prints what it has parsed, in an order and a layout of its own, and may break comments anew."""
    ended = varlinkctl(directory, daemon, "introspect", interface(daemon))
    assert ended.returncode == 0, ended.stderr
    assert declarations(ended.stdout) == declarations(INTERFACES[daemon].render_interface_description())


@pytest.mark.parametrize("option", ["--more", "--json=short"])
@pytest.mark.parametrize("daemon", DAEMONS)
def test_status(directory: Path, daemon: str, option: str) -> None:
    method = f"{interface(daemon)}.Status"
    printed, expected = (
        answer(directory, daemon, option, "call", method, "{}"),
        call(directory / f"{daemon}.varlink", method),
    )
    for reply in (printed, expected):
        reply.pop("polling", None)  # each call counts there
    assert printed == expected


def test_a_line_is_driven(directory: Path) -> None:
    assert answer(directory, "remoted", "call", "org.iohub.Remoted.Raise", '{"device": "05.0"}') == {}
    assert is_high(directory)
    assert answer(directory, "remoted", "call", "org.iohub.Remoted.Lower", '{"device": "line0"}') == {}
    assert not is_high(directory)


def test_a_call_that_waits_for_no_reply(directory: Path) -> None:
    ended = varlinkctl(
        directory, "remoted", "--oneway", "call", "org.iohub.Remoted.Raise", '{"device": "line0"}'
    )
    assert ended.returncode == 0, ended.stderr
    wait_until(lambda: is_high(directory), "the line is high")


@pytest.mark.parametrize(
    ("method", "parameters", "error"),
    [
        ("org.iohub.Remoted.Raise", '{"device": "1f.0"}', "org.iohub.Remoted.NoSuchDevice"),
        ("org.iohub.Remoted.Raise", '{"line": "05.0"}', "org.varlink.service.InvalidParameter"),
        ("org.iohub.Remoted.Tip", "{}", "org.varlink.service.MethodNotFound"),
        ("org.iohub.Nobody.Status", "{}", "org.varlink.service.InterfaceNotFound"),
    ],
)
def test_errors_have_their_names(directory: Path, method: str, parameters: str, error: str) -> None:
    ended = varlinkctl(directory, "remoted", "call", method, parameters)
    assert ended.returncode != 0
    assert error in ended.stderr
