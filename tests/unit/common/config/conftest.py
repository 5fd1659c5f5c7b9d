# SPDX-License-Identifier: GPL-2.0-or-later
"""The surroundings of a configuration, and a file with one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.vmconfigs import FILE


@pytest.fixture(scope="module", autouse=True)
def home() -> Iterator[None]:
    """So that users other than root have a default runtime directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
        yield


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "vm1.toml"
    path.write_text(FILE)
    return str(path)
