# SPDX-License-Identifier: GPL-2.0-or-later
"""iohub as a wheel in a virtual environment, beside a package with devices, and whatever PYTHONPATH leads to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.checkout import ROOT

PROGRAMS = ("iohub-remoted", "iohub-proxyd", "iohubctl")
PACKAGES = ("common", "proxyd", "remoted")

CARD = """\
from remoted.device import Bar, BarKind, Option, PciFunction


class RingCard(PciFunction):
    '''Rings.'''

    VENDOR_ID, DEVICE_ID = 0x1234, 0x5678
    BARS = {0: Bar(BarKind.IO, 16)}
    OPTIONS = (Option("tone", int, 440, "in Hz"),)
"""
LAYOUTS: dict[str, dict[str, str]] = {
    "packages": {f"{name}/__init__.py": "raise SystemExit('stranger')" for name in PACKAGES},
    "packages with our modules' names": {
        "common/__init__.py": "",
        "common/errors.py": "raise SystemExit('stranger')",
        "remoted/__init__.py": "",
        "remoted/main.py": "raise SystemExit('stranger')",
        "proxyd/__init__.py": "",
        "proxyd/main.py": "raise SystemExit('stranger')",
    },
    "files": {f"{name}.py": "raise SystemExit('stranger')" for name in PACKAGES},
    "folders without __init__": {f"{name}/main.py": "raise SystemExit('stranger')" for name in PACKAGES},
}


class Environment:
    """A virtual environment with the wheel of this checkout, and an empty working directory."""

    def __init__(self, directory: Path) -> None:
        self._work = directory / "work"
        self._work.mkdir()
        source = directory / "source"
        for name in PACKAGES:
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("LICENSE", "README.md", "pyproject.toml", "qemu_iohub.py"):
            shutil.copy(ROOT / name, source)
        pip = [sys.executable, "-m", "pip", "--quiet", "--no-input", "--disable-pip-version-check"]
        building = ["wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={directory}", str(source)]
        self._check([*pip, *building])
        (wheel,) = directory.glob("*.whl")
        venv.create(directory / "venv", symlinks=True)
        self.bin = directory / "venv" / "bin"
        self._check([*pip, f"--python={self.bin}/python", "install", "--no-deps", "--no-index", str(wheel)])
        (self.packages,) = (directory / "venv" / "lib").glob("python*/site-packages")
        # What iohub depends on; the .pth file of the editable iohub there is not read this way.
        (installed,) = (path for path in sys.path if (Path(path) / "qemu/qmp").exists())
        (self.packages / "dependencies.pth").write_text(installed)

    def _check(self, command: list[str]) -> None:
        result = subprocess.run(
            command, cwd=self._work, capture_output=True, text=True, check=False, env=clean_environment()
        )
        assert result.returncode == 0, result.stdout + result.stderr

    def run(
        self,
        program: str,
        *arguments: str,
        cwd: Path | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program of the environment."""
        return subprocess.run(
            [self.bin / program, *arguments],
            cwd=cwd or self._work,
            env={**clean_environment(), **(variables or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def refusal(self, *arguments: str, cwd: Path | None = None, path: str = "") -> str:
        """The one line of a remoted that can't start."""
        options = ("--name=vm", f"--runtime-dir={self._work}/run", *arguments)
        result = self.run(
            "iohub-remoted", *options, cwd=cwd, variables={"PYTHONPATH": path} if path else None
        )
        assert result.returncode == 2, result.stderr
        (line,) = result.stderr.splitlines()
        return line


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def lay_out(directory: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("installed"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_our_packages_win(environment: Environment, tmp_path: Path, layout: str) -> None:
    lay_out(tmp_path, LAYOUTS[layout])
    for program in PROGRAMS:
        for cwd, variables in ((None, {"PYTHONPATH": str(tmp_path)}), (tmp_path, {"PYTHONPATH": ""})):
            result = environment.run(program, "--version", cwd=cwd, variables=variables)
            assert (result.returncode, result.stderr) == (0, "")
            assert result.stdout.startswith(program)
    if layout == "packages":
        variables = {"PYTHONPATH": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}
        demo = environment.run("iohubctl", "demo", "--vm=soft", "--rounds=3", variables=variables)
        assert " raised, " in demo.stdout, demo.stderr


@pytest.mark.parametrize("name", ["remoted", "proxyd"])
def test_a_module_beside_which_python_is_started_is_not_taken_for_ours(
    environment: Environment, tmp_path: Path, name: str
) -> None:
    others = [other for other in PACKAGES if other != name]
    lay_out(tmp_path, {f"{other}.py": "raise SystemExit('stranger')" for other in others})
    result = environment.run("python", "-m", name, "--version", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"iohub-{name} ")


def test_a_package_that_ours_hides_is_named(environment: Environment, tmp_path: Path) -> None:
    lay_out(tmp_path, {"common/__init__.py": "", "common/card.py": CARD})
    lay_out(
        tmp_path, {"card.py": "from common.card import RingCard\n", "old.py": "from common import tools\n"}
    )
    hint = f"'common' is a package of iohub, which hides {tmp_path}/common/__init__.py: rename that one"
    for model in ("common.card:RingCard", "card:RingCard", f"{tmp_path}/card.py:RingCard"):
        line = environment.refusal(f"--device={model},id=ring", path=str(tmp_path))
        assert line.endswith(f"can't be loaded: No module named 'common.card': {hint}")
    line = environment.refusal("--device=old:RingCard,id=ring", path=str(tmp_path))
    assert "can't be loaded: ImportError: cannot import name 'tools' from 'common'" in line
    assert line.endswith(hint)


def test_installed_devices(environment: Environment) -> None:
    """Of two distributions; what both offer and what comes with iohub can't be had by name."""
    points = "[iohub.devices]\nring = acme.card:RingCard\nedu = acme.card:RingCard\nlost = acme.card:Lost\n"
    lay_out(
        environment.packages,
        {
            "acme/card.py": CARD,
            "acme_cards-2.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: acme-cards\nVersion: 2.1\n",
            "acme_cards-2.1.dist-info/entry_points.txt": f"{points}bell = acme.card:RingCard\n",
            "bells-0.9.dist-info/METADATA": "Metadata-Version: 2.1\nName: bells\nVersion: 0.9\n",
            "bells-0.9.dist-info/entry_points.txt": "[iohub.devices]\nbell = bells:Bell\n",
            "broken-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: broken\nVersion: 1\n",
            "broken-1.dist-info/entry_points.txt": "[iohub.devices]\nbroken\n",
        },
    )
    line = environment.refusal("--device=bell,id=bell")
    assert line == (
        "iohub-remoted: device bell: model 'bell' is offered by acme-cards 2.1 (acme.card:RingCard) and "
        "bells 0.9 (bells:Bell): give the class instead of the name"
    )
    assert environment.refusal("--device=rnig,id=ring").endswith("model 'rnig' is unknown: is ring meant?")
    line = environment.refusal("--device=ring,id=ring,tune=1")
    assert line == "iohub-remoted: device ring: no option 'tune': is tone meant?"
    line = environment.refusal("--device=ring,id=ring,adr=05.0")
    assert line == "iohub-remoted: device ring: no option 'adr': is addr meant?"
    warning, error = environment.run(
        "iohub-remoted", "--name=vm", "--runtime-dir=run", "--device=edu,id=edu,dma_mask=none"
    ).stderr.splitlines()
    assert warning.endswith("edu is the built-in model, not that of acme-cards 2.1: acme.card:RingCard")
    assert "dma_mask=none" in error

    listed = environment.run("iohub-remoted", "--models").stdout
    assert "ring  (acme-cards 2.1)\n  Rings.\n  tone=N             in Hz (default: 440)\n" in listed
    assert "edu  (built-in)\n" in listed
    assert "edu of acme-cards 2.1 is hidden by the built-in model: give it as acme.card:RingCard" in listed
    assert "  addr=SLOT.FN  " in listed
    answer = json.loads(environment.run("iohub-remoted", "--models", "--json").stdout)
    models = {(model["name"], model["origin"]): model for model in answer["models"]}
    assert models["ring", "acme-cards 2.1"]["options"] == [
        {"name": "tone", "type": "int", "default": 440, "help": "in Hz"}
    ]
    assert "has no attribute 'Lost'" in models["lost", "acme-cards 2.1"]["error"]
    assert {("bell", "acme-cards 2.1"), ("bell", "bells 0.9"), ("pci-serial", "built-in")} <= models.keys()
    assert [(model["name"], model["origin"]) for model in answer["hidden"]] == [("edu", "acme-cards 2.1")]


def test_installed_devices_in_an_archive(environment: Environment, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "cards.zip", "w") as archive:
        archive.writestr("zipped_card.py", CARD)
        metadata = "Metadata-Version: 2.1\nName: zipped\nVersion: 3\n"
        archive.writestr("zipped-3.dist-info/METADATA", metadata)
        points = "[iohub.devices]\nzipped-ring = zipped_card:RingCard\n"
        archive.writestr("zipped-3.dist-info/entry_points.txt", points)
    variables = {"PYTHONPATH": str(tmp_path / "cards.zip")}
    listed = environment.run("iohub-remoted", "--models", variables=variables).stdout
    assert "zipped-ring  (zipped 3)\n  Rings.\n" in listed


def test_type_information_is_installed(environment: Environment) -> None:
    for name in PACKAGES:
        assert (environment.packages / name / "py.typed").exists()


def test_a_class_in_a_file(environment: Environment, tmp_path: Path) -> None:
    """It may import what is beside it. Two files of one name are two modules, whatever else has that name."""
    lay_out(
        tmp_path, {"a/json.py": f"import tones\n{CARD}    CLASS_CODE = tones.A\n", "a/tones.py": "A = -1\n"}
    )
    lay_out(tmp_path, {"b/json.py": f"{CARD}    REVISION = 256\n", "b/no.txt": "", "b/fails.py": "1 / 0"})
    lay_out(tmp_path, {"b/opens.py": "open('tones.txt')\n"})
    line = environment.refusal("--device=./json.py:RingCard,id=a", cwd=tmp_path / "a")
    assert line == "iohub-remoted: device a: CLASS_CODE -1 is not a number of 24 bits"
    line = environment.refusal(f"--device={tmp_path}/b/json.py:RingCard,id=b")
    assert line == "iohub-remoted: device b: REVISION 256 is not a number of 8 bits"
    for name, reason in {
        "b/none.py": "there is no file ",
        "b": "there is no file ",
        "b/opens.py": "FileNotFoundError: [Errno 2] No such file or directory: 'tones.txt'",
        "b/no.txt": "is not a Python file",
        "b/json.py:Lost": "has no attribute 'Lost'",
        "b/fails.py": "ZeroDivisionError: division by zero",
    }.items():
        target = name if ":" in name else f"{name}:RingCard"
        assert reason in environment.refusal(f"--device={tmp_path}/{target},id=c")
