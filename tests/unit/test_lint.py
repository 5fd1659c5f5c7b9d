# SPDX-License-Identifier: GPL-2.0-or-later
"""ruff and mypy find nothing; imports run one way, between folders and between the halves; files stay short."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.checkout import ROOT

PACKAGES = ("common", "proxyd", "remoted")
SUFFIXES = (".py", ".c", ".h", ".S", ".ld")


@pytest.mark.parametrize("tool", [["ruff", "check", "--quiet"], ["mypy"]], ids=lambda tool: tool[0])
def test_lint(tool: list[str]) -> None:
    if importlib.util.find_spec(tool[0]) is None:
        if "CI" in os.environ:
            pytest.fail(f"{tool[0]} is not installed")
        pytest.skip(f"needs {tool[0]}")
    run = subprocess.run([sys.executable, "-m", *tool], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("common", {"proxyd", "remoted", "tests"}),
        ("proxyd", {"remoted", "tests"}),
        ("remoted", {"proxyd", "tests"}),
    ],
)
def test_imports_run_one_way(package: str, forbidden: set[str]) -> None:
    for source in (ROOT / package).rglob("*.py"):
        for name in imports(source):
            assert name.partition(".")[0] not in forbidden, f"{source.relative_to(ROOT)} imports {name}"


def sources(suffix: str) -> list[Path]:
    """All that is not a test."""
    return [source for package in PACKAGES for source in (ROOT / package).rglob(f"*{suffix}")]


def imports(source: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(source.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if is_source(inner) else node.module or ""


def is_source(module: str) -> bool:
    path = ROOT / Path(*module.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


LAYERS: tuple[set[str], ...] = (
    {"common"},
    {"common.chardev", "common.ctl", "proxyd.kvm", "remoted"},
    {"proxyd.pci", "remoted.devices", "remoted.vfiouser"},
    {"proxyd", "remoted.devices.nvme", "remoted.server"},
    {"remoted.control", "remoted.roster"},
    {"proxyd.machine", "proxyd.vm"},
    {"proxyd.vm.embedded", "proxyd.vm.pid", "proxyd.vm.qmp", "proxyd.vm.soft"},
    {"common.ctl.main", "proxyd.main", "remoted.main"},
    {"proxyd.__main__", "remoted.__main__"},
)
"""folders, and the modules that put them together: each imports from those above it in this list only"""


def test_folders_import_in_one_direction() -> None:
    level = {place: number for number, layer in enumerate(LAYERS) for place in layer}
    for source in sources(".py"):
        place = place_of(source)
        assert place in level, f"{place} is in none of the layers"
        for name in imports(source):
            if name.partition(".")[0] not in PACKAGES:
                continue
            target = place_of(ROOT / Path(*name.split(".")).with_suffix(".py"))
            shown = f"{source.relative_to(ROOT)} imports {name}"
            assert target == place or level[target] < level[place], shown


def place_of(source: Path) -> str:
    """The layer's name for a module: itself if the list has it, else its folder. Of a folder, the folder."""
    module = ".".join(source.relative_to(ROOT).with_suffix("").parts)
    if any(module in layer for layer in LAYERS) or source.with_suffix("").is_dir():
        return module
    return module.rpartition(".")[0]


def test_modules_import_in_no_circle() -> None:
    graph = {
        ".".join(source.relative_to(ROOT).with_suffix("").parts): set(imports(source))
        for source in sources(".py")
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_source_outside_the_tests_is_long(suffix: str) -> None:
    for source in sources(suffix):
        lines = len(source.read_text().splitlines())
        assert lines <= 400, f"{source.relative_to(ROOT)} has {lines} lines: divide it by concern"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_sources_name_their_licence(suffix: str) -> None:
    found = [*sources(suffix), *(ROOT / "tests").rglob(f"*{suffix}")]
    assert found
    for source in found:
        first = source.read_text().partition("\n")[0]
        assert "SPDX-License-Identifier: GPL-2.0-or-later" in first, source.relative_to(ROOT)
