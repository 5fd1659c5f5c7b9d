# SPDX-License-Identifier: GPL-2.0-or-later
"""The interfaces' descriptions, which clients can ask for."""

from __future__ import annotations

import dataclasses
import re

import pytest
from asyncvarlink import VarlinkInterface

from common import proxyd_interface, remoted_interface
from common.proxyd_interface import Proxyd
from common.remoted_interface import Remoted


@pytest.mark.parametrize(
    ("interface", "types"),
    [
        (Remoted, (remoted_interface.Function, remoted_interface.Polling, remoted_interface.StatusReply)),
        (Proxyd, (proxyd_interface.Function, proxyd_interface.StatusReply)),
    ],
)
def test_every_field_is_explained(interface: type[VarlinkInterface], types: tuple[type, ...]) -> None:
    *records, reply = types
    fields = {field.name for record in records for field in dataclasses.fields(record)}
    fields |= set(reply.__annotations__)
    comments = [
        line for line in interface.render_interface_description().splitlines() if line.startswith("#")
    ]
    explained = set(re.findall(r"(\w+)[:,] ", " ".join(comments)))
    assert fields - {"functions"} <= explained


@pytest.mark.parametrize("interface", [Remoted, Proxyd])
def test_errors_and_types_are_named(interface: type[VarlinkInterface]) -> None:
    description = interface.render_interface_description()
    assert f"\ninterface {interface.name}\n" in description
    assert "\ntype Function (" in description
    for error in interface.errors:
        assert f"\nerror {error.__name__} (" in description
