# SPDX-License-Identifier: GPL-2.0-or-later
"""Where iohub's programs start: ``python -m qemu_iohub remoted ...``, and the console scripts.

Python looks for modules in the directories of PYTHONPATH, and with -m in the present one, before it looks where
iohub is installed. A folder of a device's author that is named common, proxyd or remoted would be taken for the
package of iohub that has this name. This module, whose name is unlikely to be used elsewhere, loads the three
packages from its own folder before anything imports them. sys.path stays as it is.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import sys
from importlib.machinery import PathFinder

__all__ = ["iohub_proxyd", "iohub_remoted", "iohubctl", "load_packages"]

_PACKAGES = ("common", "proxyd", "remoted")
_PROGRAMS = {
    "remoted": "remoted.main",
    "proxyd": "proxyd.main",
    "iohubctl": "common.ctl.main",
}


def load_packages() -> None:
    """Loads the three packages from beside this module, whatever else sys.path leads to."""
    here = os.path.dirname(os.path.abspath(__file__))
    for name in _PACKAGES:
        spec = PathFinder.find_spec(name, [here])
        if spec is None or spec.loader is None:
            raise ImportError(f"{here} has no {name}")
        loaded = sys.modules.get(name)
        if loaded is None or getattr(loaded, "__file__", None) != spec.origin:
            for module in [each for each in sys.modules if each.partition(".")[0] == name]:
                del sys.modules[module]
            module_object = importlib.util.module_from_spec(spec)
            sys.modules[name] = module_object
            spec.loader.exec_module(module_object)


def iohub_remoted() -> int:
    """The console script."""
    return _run("remoted")


def iohub_proxyd() -> int:
    """The console script."""
    return _run("proxyd")


def iohubctl() -> int:
    """The console script."""
    return _run("iohubctl")


def _run(program: str) -> int:
    if program != "iohubctl":
        gc.disable()  # it would run dozens of times while modules are loaded; freeze_heap() enables it
    load_packages()
    return int(importlib.import_module(_PROGRAMS[program]).main())


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in _PROGRAMS:
        sys.exit(f"usage: python -m qemu_iohub {{{','.join(_PROGRAMS)}}} ...")
    sys.exit(_run(sys.argv.pop(1)))
