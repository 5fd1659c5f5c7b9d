# SPDX-License-Identifier: GPL-2.0-or-later
"""``make install`` into a directory, as a package is built, for tests of what is installed."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.support.checkout import ROOT

__all__ = [
    "SYSTEM_PYTHON",
    "install",
    "make",
    "make_deb",
    "make_once",
    "missing_for_deb",
    "missing_for_install",
]

SYSTEM_PYTHON = "/usr/bin/python3"


def missing_for_install() -> str | None:
    """Why ``make install`` can't be tried here; None if it can."""
    probe = "import sys; sys.exit(sys.version_info < (3, 11))"
    try:
        suitable = not subprocess.run([SYSTEM_PYTHON, "-c", probe], check=False).returncode
    except FileNotFoundError:
        suitable = False
    if not suitable:
        return f"installed programs run on {SYSTEM_PYTHON}, which is missing or older than Python 3.11"
    return None if shutil.which("make") else "needs make"


def missing_for_deb() -> str | None:
    """Why no Debian package can be built here; None if it can."""
    absent = [tool for tool in ("dpkg-buildpackage", "dpkg-checkbuilddeps") if shutil.which(tool) is None]
    if absent:
        return f"needs {', '.join(absent)}: apt-get install dpkg-dev"
    check = ["dpkg-checkbuilddeps", str(ROOT / "systemd/debian/control")]
    checked = subprocess.run(check, capture_output=True, text=True, check=False)
    return checked.stderr.strip() if checked.returncode else missing_for_install()


def make(target: str, *variables: str) -> str:
    """What ``make TARGET VARIABLE=...`` prints. Fails the test, with what make said, when it fails."""
    # Variables of a make that runs the tests are not for this one.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "--silent", "--no-print-directory", target, *variables],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def install(destination: Path, prefix: str = "/usr") -> Path:
    """Installs below a directory, which it returns."""
    make("install", f"DESTDIR={destination}", f"PREFIX={prefix}")
    return destination


def make_deb(directory: Path) -> Path:
    """Builds the Debian package below a directory; its path."""
    make("deb", f"BUILD={directory}")
    (package,) = (directory / "deb").glob("*.deb")
    return package


def make_once(shared: Path, name: str, build: Callable[[Path], object]) -> Path:
    """A directory ``name`` in ``shared`` that ``build`` has filled, once for all processes that ask for it."""
    made = shared / name
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            unfinished = shared / f"{name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            build(unfinished)
            unfinished.rename(made)
    return made
