# SPDX-License-Identifier: GPL-2.0-or-later
"""Which class a device model is: an entry point of the group ``iohub.devices``, or ``package.module:Class``."""

from __future__ import annotations

import importlib
import operator
import traceback
from importlib.metadata import entry_points

from common.errors import UsageError
from common.journal import printable
from remoted.function import PciFunction
from remoted.host import DEVICE_ERRORS

__all__ = ["find_model"]

ENTRY_POINT_GROUP = "iohub.devices"


def find_model(name: str, device: str) -> type[PciFunction]:
    """The class of a model, for the device of that id. Raises UsageError, naming the models there are."""
    where = f"device {device}: model {name!r}"
    try:
        if ":" in name:
            module, _, attribute = name.partition(":")
        else:
            known = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
            if name not in known:
                raise UsageError(
                    f"{where} is unknown; there are {', '.join(sorted(known))}, and package.module:Class"
                )
            module, attribute = known[name].module, known[name].attr
        found = operator.attrgetter(attribute)(importlib.import_module(module))
    except UsageError:
        raise
    except ModuleNotFoundError as error:
        is_its_own = error.name == module.partition(".")[0]
        hint = ": is its directory in PYTHONPATH?" if is_its_own else _place(error)
        raise UsageError(f"{where} can't be loaded: {printable(str(error))}{hint}") from error
    except DEVICE_ERRORS as error:
        reason = printable(f"{type(error).__name__}: {error}")
        raise UsageError(f"{where} can't be loaded: {reason}{_place(error)}") from error
    if not (isinstance(found, type) and issubclass(found, PciFunction)):
        raise UsageError(f"{where} is no subclass of remoted.device.PciFunction")
    return found


def _place(error: BaseException) -> str:
    """Where in a stranger's module it happened; nothing if no module's code ran."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    ran = frame.name != find_model.__name__ and not frame.filename.startswith("<frozen ")
    return f" ({printable(frame.filename)}, line {frame.lineno})" if ran else ""
