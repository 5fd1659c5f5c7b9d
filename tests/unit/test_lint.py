# SPDX-License-Identifier: GPL-2.0-or-later
"""ruff and mypy find nothing, and imports run one way: proxyd -> common <- remoted."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.checkout import ROOT


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
    sources = list((ROOT / package).rglob("*.py"))
    assert sources
    for source in sources:
        for name in imports(source):
            assert name.partition(".")[0] not in forbidden, f"{source.relative_to(ROOT)} imports {name}"


def imports(source: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(source.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("suffix", [".py", ".c", ".h", ".S", ".ld"])
def test_sources_name_their_licence(suffix: str) -> None:
    folders = ("common", "proxyd", "remoted", "tests")
    sources = [source for folder in folders for source in (ROOT / folder).rglob(f"*{suffix}")]
    assert sources
    for source in sources:
        first = source.read_text().partition("\n")[0]
        assert "SPDX-License-Identifier: GPL-2.0-or-later" in first, source.relative_to(ROOT)
