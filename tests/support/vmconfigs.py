# SPDX-License-Identifier: GPL-2.0-or-later
"""Configurations for tests: a file for both daemons, and what each of them makes of its options."""

from __future__ import annotations

from collections.abc import Callable

from common.config import VmConfig, parse_proxyd, parse_remoted

Parse = Callable[[list[str]], VmConfig]

FILE = """
name = "vm1"
runtime-dir = "/tmp/vm1"
vm = "pid:1"

[[device]]
id = "com1"
model = "pci-serial"
addr = "05.0"
chardev = "pty"
speed = 9600
loud = true
quiet = false

[[device]]
id = "edu0"
model = "edu"
socket = "/tmp/edu.sock"
gsi = 11
"""


def remoted(*devices: str) -> VmConfig:
    return parse_remoted(["--name", "vm1", *(word for text in devices for word in ("--device", text))])


def proxyd(*devices: str) -> VmConfig:
    return parse_proxyd(["--name", "vm1", *(word for text in devices for word in ("--device", text))])
