# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's TOML file, as text by key: common.config says what it looks like, and what the texts mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from common.errors import UsageError
from common.journal import printable
from common.options import BOOLEAN_KEYS, INTEGER_KEYS, STRING_KEYS, Keys, Value, check_id, check_text, is_key

__all__ = ["TOP_KEYS", "ConfigFile", "read_file"]

_MAX_FILE = 1 << 20
TOP_KEYS = frozenset(("name", "runtime-dir", "vm", "allow-users", "poll-max-us", "device"))
_TOP_INTEGERS = frozenset(("poll-max-us",))


class ConfigFile(NamedTuple):
    """What a file says."""

    top: Keys
    """its strings and integers outside of tables"""
    allow_users: list[Value]
    devices: dict[str, Keys]
    """each device's keys, by its id"""


def read_file(name: str) -> ConfigFile:
    """Reads a file, and checks its keys and their types. Raises UsageError."""
    import tomllib  # takes longer than a start without a file needs for everything before it

    where = printable(name)
    try:
        with open(name, "rb") as file:
            data = file.read(_MAX_FILE + 1)
    except (OSError, ValueError) as error:
        raise UsageError(f"--config {where}: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > _MAX_FILE:
        raise UsageError(f"--config {where}: larger than {_MAX_FILE} bytes")
    try:
        tables = tomllib.loads(data.decode())
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{where}: not UTF-8: byte {data[error.start]:#04x} in line {line}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not valid TOML: {error}") from error
    for key in tables:
        if key not in TOP_KEYS:
            raise UsageError(f"{where}: unknown key {key!r}: the file has {', '.join(sorted(TOP_KEYS))}")
    entries = tables.pop("device", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UsageError(f"{where}: device: must be [[device]] tables")
    users = tables.pop("allow-users", [])
    if not isinstance(users, list):
        raise UsageError(f"{where}: allow-users: must be a list of strings")
    allow_users = [Value(_text(user, "allow-users", where, str), f"{where}: allow-users") for user in users]
    top = {
        key: Value(_text(value, key, where, int if key in _TOP_INTEGERS else str), f"{where}: {key}")
        for key, value in tables.items()
    }
    devices: dict[str, Keys] = {}
    for number, entry in enumerate(entries, 1):
        keys = _table_keys(entry, f"{where}: device {entry.get('id', number)!r}")
        if keys["id"].text in devices:
            raise UsageError(f"{keys['id'].where}: the id is given twice")
        devices[keys["id"].text] = keys
    return ConfigFile(top, allow_users, devices)


def _table_keys(entry: Mapping[str, object], where: str) -> Keys:
    """The keys of one [[device]] table, checked for their types."""
    keys: Keys = {}
    for key, value in entry.items():
        if not is_key(key):
            raise UsageError(f"{where}: unknown key {key!r}")
        if key in INTEGER_KEYS:
            text = _text(value, key, where, int)
        elif key in STRING_KEYS:
            text = _text(value, key, where, str)
        elif key in BOOLEAN_KEYS:
            text = _text(value, key, where, bool)
        else:
            text = _text(value, key, where, str, int, bool)
        keys[key] = Value(text, where)
    check_id(keys, where)
    return keys


def _text(value: object, key: str, where: str, *types: type) -> str:
    if type(value) not in types:
        names = {str: "a string", int: "an integer", bool: "a boolean"}
        raise UsageError(f"{where}: {key}: must be {' or '.join(names[each] for each in types)}")
    if isinstance(value, bool):
        return "on" if value else "off"
    return check_text(str(value), f"{where}: {key}")
