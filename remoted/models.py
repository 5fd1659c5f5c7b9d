# SPDX-License-Identifier: GPL-2.0-or-later
"""Which class a device model is: an entry point of the group ``iohub.devices``, or ``package.module:Class``."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points

from common.errors import UsageError
from remoted.function import PciFunction

__all__ = ["find_model"]

ENTRY_POINT_GROUP = "iohub.devices"


def find_model(name: str, device: str) -> type[PciFunction]:
    """The class of a model, for the device of that id. Raises UsageError, naming the models there are."""
    where = f"device {device}: model {name!r}"
    try:
        if ":" in name:
            module, _, attribute = name.partition(":")
            found = getattr(importlib.import_module(module), attribute)
        else:
            known = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
            if name not in known:
                raise UsageError(
                    f"{where} is unknown; there are {', '.join(sorted(known))}, and package.module:Class"
                )
            found = known[name].load()
    except UsageError:
        raise
    except Exception as error:  # a stranger's module may raise anything
        raise UsageError(f"{where} can't be loaded: {type(error).__name__}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, PciFunction)):
        raise UsageError(f"{where} is no subclass of remoted.function.PciFunction")
    return found
