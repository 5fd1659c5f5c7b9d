# SPDX-License-Identifier: GPL-2.0-or-later
"""Which class a device model is, and which models there are.

A model is one that comes with iohub, an entry point of the group ``iohub.devices``, ``package.module:Class``, or
``./file.py:Class``. A name that comes with iohub can't be taken by an installed package.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import operator
import os
import sys
import traceback
from importlib.machinery import PathFinder
from types import ModuleType
from typing import NamedTuple

from common.errors import UsageError
from common.journal import printable
from common.options import nearest
from remoted.function import PciFunction
from remoted.guard import DEVICE_ERRORS, describe_error

__all__ = [
    "BUILT_IN",
    "ENTRY_POINT_GROUP",
    "Model",
    "find_model",
    "hidden_models",
    "known_models",
    "load_class",
]

ENTRY_POINT_GROUP = "iohub.devices"
BUILT_IN = {
    "edu": "remoted.devices.edu:Edu",
    "irq-line": "remoted.devices.irq_line:IrqLine",
    "nvme": "remoted.devices.nvme.controller:Nvme",
    "pci-serial": "remoted.devices.pci_serial:PciSerial",
}
_OUR_PACKAGES = ("common", "proxyd", "remoted")


class Model(NamedTuple):
    """A model that has a name."""

    name: str
    target: str
    """``package.module:Class``"""
    origin: str
    """``built-in``, or the distribution and its version"""


def known_models() -> list[Model]:
    """The models that have a name, by name and origin. Two distributions may offer one name: both are listed."""
    built_in = [Model(name, target, "built-in") for name, target in BUILT_IN.items()]
    return sorted([*built_in, *(model for model in _installed() if model.name not in BUILT_IN)])


def hidden_models() -> list[Model]:
    """The models of installed distributions that have the name of a built-in one, which it finds."""
    return [each for each in _installed() if each.name in BUILT_IN and each.target != BUILT_IN[each.name]]


def find_model(name: str, device: str) -> type[PciFunction]:
    """The class of a model, for the device of that id. Raises UsageError."""
    where = f"device {device}: model {name!r}"
    return load_class(name if ":" in name else _target(name, where), where)


def load_class(target: str, where: str) -> type[PciFunction]:
    """The class at ``package.module:Class`` or ``./file.py:Class``. UsageErrors begin with ``where``."""
    module, _, attribute = target.rpartition(":")
    is_file = "/" in module or module.endswith(".py")
    if is_file and not os.path.isfile(module):
        raise UsageError(f"{where} can't be loaded: there is no file {printable(module)}")
    loaded: ModuleType | None = None
    try:
        loaded = _load_file(os.path.abspath(module)) if is_file else importlib.import_module(module)
        found = operator.attrgetter(attribute)(loaded)
    except ImportError as error:
        hint = _hidden(error.name) or _place(error)
        if not hint and error.name == module.partition(".")[0]:
            hint = ": is its directory in PYTHONPATH?"
        raise UsageError(f"{where} can't be loaded: {_reason(error)}{hint}") from error
    except DEVICE_ERRORS as error:
        hint = _hidden(module) or _place(error) or _similar(loaded, attribute)
        raise UsageError(f"{where} can't be loaded: {_reason(error)}{hint}") from error
    if not (isinstance(found, type) and issubclass(found, PciFunction)):
        raise UsageError(f"{where} is not a subclass of remoted.device.PciFunction")
    return found


def _target(name: str, where: str) -> str:
    """Where the class of a model with a name is. Raises UsageError."""
    if name.endswith(".py"):
        raise UsageError(f"{where} names a file without its class: {name}:CLASS is needed")
    if name in BUILT_IN:
        return BUILT_IN[name]
    models = known_models()
    targets = [model for model in models if model.name == name]
    if not targets:
        meant = nearest(name, [model.name for model in models])
        names = ", ".join(sorted({model.name for model in models}))
        others = f"; there are {names}, package.module:Class and ./file.py:Class"
        hint = f": is {meant} meant?" if meant else others
        raise UsageError(f"{where} is unknown{hint}")
    if len(targets) > 1:
        offers = " and ".join(f"{model.origin} ({model.target})" for model in targets)
        raise UsageError(f"{where} is offered by {printable(offers)}: give the class instead of the name")
    return targets[0].target


@functools.cache
def _installed() -> tuple[Model, ...]:
    """What distributions offer. One whose metadata can't be read offers nothing."""
    if not _is_any_offered():
        return ()
    from importlib.metadata import distributions  # takes longer than all of remoted's own modules

    found: set[Model] = set()
    seen: set[str] = set()
    for distribution in distributions():
        try:
            name, version = str(distribution.metadata["Name"]), distribution.version
            key = name.lower().replace("_", "-")
            if key not in seen:
                # A second one of this name is later in sys.path, and its modules can't be imported.
                seen.add(key)
                for point in distribution.entry_points.select(group=ENTRY_POINT_GROUP):
                    # "module:Class [extra]"; extras are of no use here
                    found.add(Model(point.name, point.value.partition("[")[0].strip(), f"{name} {version}"))
        except DEVICE_ERRORS:
            continue
    return tuple(sorted(found))


def _is_any_offered() -> bool:
    """Whether the group is in an entry_points.txt of sys.path, or may be in an archive.

    It takes a tenth of the time that reading the metadata of all distributions takes, which delays each start.
    """
    for entry in sys.path:
        if os.path.isfile(entry):
            return True
        try:
            names = os.listdir(entry or ".")
        except OSError:
            continue
        for name in names:
            if name.lower().endswith((".dist-info", "egg-info")):
                try:
                    with open(os.path.join(entry, name, "entry_points.txt"), "rb") as file:
                        if ENTRY_POINT_GROUP.encode() in file.read():
                            return True
                except OSError:
                    continue
    return False


@functools.cache
def _load_file(path: str) -> ModuleType:
    """The module in a file. What it imports is looked for in its folder as well, after all other places."""
    folder, name = os.path.split(path)
    name = name.removesuffix(".py").replace(".", "_")
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        name = f"{name} in {folder}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{printable(path)} is not a Python file")
    if folder not in sys.path:
        sys.path.append(folder)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except DEVICE_ERRORS:
        del sys.modules[name]
        raise
    return module


def _hidden(module: str | None) -> str:
    """If the module is in one of our packages: where somebody else's package of that name is."""
    name = (module or "").partition(".")[0]
    if name not in _OUR_PACKAGES:
        return ""
    ours = os.path.realpath(os.path.dirname(__file__) + "/..")
    for entry in sys.path:
        spec = PathFinder.find_spec(name, [entry or os.getcwd()])
        is_iohub = os.path.exists(os.path.join(entry, "qemu_iohub.py"))  # another installation, or a checkout
        if spec is not None and not is_iohub:
            for place in [spec.origin] if spec.origin else spec.submodule_search_locations or ():
                if not os.path.realpath(place).startswith(f"{ours}/"):
                    return (
                        f": {name!r} is a package of iohub, which hides {printable(place)}: rename that one"
                    )
    return ""


def _similar(module: ModuleType | None, name: str) -> str:
    """``: is Doorbell meant?`` if a loaded module has a device's class of a similar name."""
    members = vars(module).items() if module else ()
    classes = [each for each, value in members if isinstance(value, type) and issubclass(value, PciFunction)]
    meant = nearest(name, classes)
    return f": is {meant} meant?" if meant else ""


def _reason(error: BaseException) -> str:
    """An import error's text says all; others need their type."""
    kind, text, _ = describe_error(error)
    return text if isinstance(error, ModuleNotFoundError) else f"{kind}: {text}"


def _place(error: BaseException) -> str:
    """Where in the device's module it happened; nothing if no module's code ran."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    ran = frame.filename != __file__ and not frame.filename.startswith("<frozen ")
    return f" ({printable(frame.filename)}, line {frame.lineno})" if ran else ""
