# SPDX-License-Identifier: GPL-2.0-or-later
"""The options of a device model: declared by its class, given as text, checked, and handed to the device."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from common.errors import UsageError
from common.options import REMOTED, nearest

__all__ = ["Option", "OptionType", "parse_options", "show"]

OptionType = type[str] | type[int] | type[float] | type[bool]

_INTEGER = r"-?(?:0x[0-9a-fA-F]{1,32}|0|[1-9][0-9]{0,40})"
_FLOAT = r"-?[0-9]{1,20}(?:\.[0-9]{1,20})?(?:[eE][+-]?[0-9]{1,2})?"


class Option(NamedTuple):
    """One option: ``Option("baud", int, default=9600, minimum=50, help="bits per second")``."""

    name: str
    """as it is given: ``--device MODEL,id=ID,NAME=VALUE``, or a key of the device in the TOML file"""
    type: OptionType = str
    """str, int (decimal, or hexadecimal as 0x...), float, or bool (on or off)"""
    default: Any = None
    """the value if it isn't given"""
    help: str = ""
    """for `iohub-remoted --models`"""
    minimum: float | None = None
    """the least value of an int or float"""
    maximum: float | None = None
    """the greatest value of an int or float"""
    choices: Sequence[Any] = ()
    """the values that are taken; empty for all"""

    def parse(self, text: str) -> Any:
        """The value that a text stands for. Raises UsageError."""
        value: Any = text
        if self.type is bool:
            if text not in ("on", "off"):
                raise UsageError(f"{self.name}={text}: must be on or off")
            value = text == "on"
        elif self.type is int:
            if not re.fullmatch(_INTEGER, text):
                raise UsageError(f"{self.name}={text}: must be a whole number, decimal or 0x hexadecimal")
            value = int(text, 16 if "x" in text else 10)
        elif self.type is float:
            if not re.fullmatch(_FLOAT, text):
                raise UsageError(f"{self.name}={text}: must be a number")
            value = float(text)
        if self.choices and value not in self.choices:
            raise UsageError(f"{self.name}={text}: must be {' or '.join(map(str, self.choices))}")
        for bound, word in ((self.minimum, "least"), (self.maximum, "most")):
            if bound is not None and (value < bound if word == "least" else value > bound):
                raise UsageError(f"{self.name}={text}: must be at {word} {show(bound)}")
        return value


def parse_options(options: Sequence[Option], given: Mapping[str, str]) -> dict[str, Any]:
    """The value of each option by name. Raises UsageError for a text that doesn't fit, and unknown names."""
    names = [option.name for option in options]
    for key in given:
        if key not in names:
            meant = nearest(key, [*names, *sorted(REMOTED.keys)])
            hint = f"is {meant} meant?" if meant else f"the model has {', '.join(sorted(names)) or 'none'}"
            raise UsageError(f"no option {key!r}: {hint}")
    return {
        option.name: option.parse(given[option.name]) if option.name in given else option.default
        for option in options
    }


def show(value: Any) -> str:
    """A value as it would be given: ``on``, ``0xfffffff``; large integers are hexadecimal."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int) and value > 0xFFFF:
        return f"{value:#x}"
    return str(value)
