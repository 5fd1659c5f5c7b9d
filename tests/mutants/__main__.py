# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether the tests notice faults: python -m tests.mutants, or make mutants.

Each fault in the TOML files of this folder replaces one text of one module. It is put into a copy of the tree, and
the tests that could notice it run there until one fails. The list is written by hand: tools that make faults from
the syntax (mutmut, cosmic-ray) make thousands, most of them equal or trivial, and know neither which order of two
steps matters nor which tests are fast. A fault is found by its text, not by a line number, so that it survives
changes around it; one whose text is gone, or there twice, is stale and has to be written anew.

    ["remoted/iohub.py"]
    fast = [...]                # test files that run first, in this order
    slow = [...]                # those for what the fast ones did not notice
    faults = [
        ["text", "fault"],      # the text stands in the module exactly once, the fault instead
        ["text", "fault", "why it changes nothing that can be seen"],  # is not run
    ]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.support.checkout import ROOT

LISTS = Path(__file__).parent
REQUIRED = 0.95
"""the share of the faults that can be seen which must be noticed"""
HANG_SECONDS = 60
"""how long one test may take: a fault that makes it hang is noticed"""
RUN_SECONDS = 300.0
"""how long the tests of one fault may take, likewise"""


@dataclass(frozen=True)
class Tests:
    """The test files for one module."""

    fast: tuple[str, ...]
    slow: tuple[str, ...]


@dataclass(frozen=True)
class Fault:
    """One change of one module."""

    file: str
    text: str
    fault: str
    unseen: str = ""
    tests: Tests = Tests((), ())

    def __str__(self) -> str:
        return f"{self.file}: {_one_line(self.text)}  ->  {_one_line(self.fault) or '(nothing)'}"

    def apply(self, tree: Path) -> str:
        """Puts it into a copy of the tree. Returns the module's text without it."""
        path = tree / self.file
        original = path.read_text()
        path.write_text(original.replace(self.text, self.fault))
        return original

    def staleness(self) -> str:
        """Why it can't be applied, or nothing."""
        path = ROOT / self.file
        source = path.read_text() if path.exists() else ""
        count = source.count(self.text)
        if count != 1:
            return "the text is gone" if not count else f"the text stands there {count} times"
        try:
            compile(source.replace(self.text, self.fault), self.file, "exec")
        except SyntaxError as error:
            return f"it is no Python: {error}"
        return ""


def load() -> list[Fault]:
    """All faults, with the tests of each."""
    faults: list[Fault] = []
    for path in sorted(LISTS.glob("*.toml")):
        for module, table in tomllib.loads(path.read_text()).items():
            tests = Tests(tuple(table["fast"]), tuple(table["slow"]))
            for text, fault, *unseen in table["faults"]:
                faults.append(Fault(module, text, fault, "".join(unseen), tests))
    return faults


class Trees:
    """Copies of the checkout as it is now, one for each worker."""

    def __init__(self, directory: Path, count: int) -> None:
        names = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split("\0")
        self._free = []
        for number in range(count):
            tree = directory / f"tree{number}"
            for name in filter(None, names):
                if (ROOT / name).exists():
                    (tree / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(ROOT / name, tree / name)
            subprocess.run(["make", "--silent", "guest"], cwd=tree, check=True)
            self._free.append(tree)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._free)

    def take(self) -> Path:
        with self._lock:
            return self._free.pop()

    def give_back(self, tree: Path) -> None:
        with self._lock:
            self._free.append(tree)


def run_tests(tree: Path, files: Sequence[str]) -> str:
    """What failed first in the tests there, or nothing."""
    environ = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "-o",
        f"faulthandler_timeout={HANG_SECONDS}",
        "--tb=no",
        *files,
    ]
    with subprocess.Popen(
        command,
        cwd=tree,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=RUN_SECONDS)
        except subprocess.TimeoutExpired:
            return "the tests hang"
        finally:
            with contextlib.suppress(ProcessLookupError):  # nothing is left
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode == 0:
        return ""
    failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return _one_line(failed[0]) if failed else f"pytest ended with {process.returncode}"


def try_fault(trees: Trees, fault: Fault, tests: Tests) -> str:
    """What noticed it, or nothing."""
    tree = trees.take()
    original = fault.apply(tree)
    try:
        return run_tests(tree, tests.fast) or (run_tests(tree, tests.slow) if tests.slow else "")
    finally:
        (tree / fault.file).write_text(original)
        trees.give_back(tree)


def check_tests(trees: Trees, tests: Sequence[Tests]) -> str:
    """What fails without any fault, or nothing: then nothing could be said of a fault."""
    files = sorted({name for each in tests for name in (*each.fast, *each.slow)})
    workers = len(trees)

    def run(number: int) -> str:
        tree = trees.take()
        try:
            # What fails once may be due to a busy machine.
            return run_tests(tree, files[number::workers]) and run_tests(tree, files[number::workers])
        finally:
            trees.give_back(tree)

    with ThreadPoolExecutor(workers) as pool:
        return next(filter(None, pool.map(run, range(min(workers, len(files))))), "")


def main() -> int:
    """Returns the exit status: 1 if too many faults are not noticed, one is stale, or tests fail without any."""
    parser = argparse.ArgumentParser(
        prog="make mutants", description="Tells which faults the tests don't notice."
    )
    parser.add_argument("-k", metavar="TEXT", default="", help="only faults whose file or text contains this")
    parser.add_argument(
        "-j", metavar="N", type=int, default=2, help="how many at once (default: %(default)s)"
    )
    options = parser.parse_args()
    chosen = [fault for fault in load() if options.k in f"{fault.file} {fault.text} {fault.fault}"]
    stale = {fault: reason for fault in chosen if (reason := fault.staleness())}
    seen = [fault for fault in chosen if not fault.unseen and fault not in stale]
    print(f"{len(seen)} faults", flush=True)
    with tempfile.TemporaryDirectory(prefix="mutants-") as directory:
        trees = Trees(Path(directory), options.j)
        failing = check_tests(trees, list({fault.tests for fault in seen})) if seen else ""
        if failing:
            print(f"fails without any fault: {failing}")
            return 1
        missed = list(_run(trees, seen))
    for fault, reason in stale.items():
        print(f"stale, {reason}: {fault}")
    for fault in chosen:
        if fault.unseen:
            print(f"can't be seen, {fault.unseen}: {fault}")
    for fault in missed:
        print(f"NOT NOTICED: {fault}")
    print(f"{len(seen) - len(missed)} of {len(seen)} noticed, {len(stale)} stale")
    return 1 if stale or len(seen) - len(missed) < REQUIRED * len(seen) else 0


def _run(trees: Trees, faults: Sequence[Fault]) -> Iterator[Fault]:
    """Runs them all, with a line each, and gives those that were not noticed."""

    def run(fault: Fault) -> bool:
        started = time.monotonic()
        noticed = try_fault(trees, fault, fault.tests)
        seconds = time.monotonic() - started
        print(
            f"{'noticed' if noticed else 'MISSED '}  {seconds:5.1f} s  {fault}\n         {noticed}",
            flush=True,
        )
        return bool(noticed)

    with ThreadPoolExecutor(len(trees)) as pool:
        for fault, noticed in zip(faults, pool.map(run, faults), strict=True):
            if not noticed:
                yield fault


def _one_line(text: str) -> str:
    return " ".join(text.split())[:110]


if __name__ == "__main__":
    sys.exit(main())
