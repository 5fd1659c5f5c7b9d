# SPDX-License-Identifier: GPL-2.0-or-later
"""Our structures and request numbers against those of the C compiler."""

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from proxyd.kvm import kvm_h

STRUCTURES = {
    name: value
    for name, value in vars(kvm_h).items()
    if name.startswith("kvm_")
    and isinstance(value, type)
    # Not structures of the header: the first is a bare __u64 there, of the other we have the beginning only.
    and value not in (kvm_h.kvm_identity_map_addr, kvm_h.kvm_run)
}


def field_offsets(name: str, structure: type[ctypes.Structure]) -> dict[str, int]:
    """C expressions for all fields of a structure, with the offsets that ctypes gave them."""
    return {
        f"offsetof(struct {name}, {field[0]})": getattr(structure, field[0]).offset
        for field in structure._fields_
        if not field[0].startswith("pad")
    }


def run_offsets() -> dict[str, int]:
    """The same for the parts of struct kvm_run that a VMM looks at."""
    head = {
        f"offsetof(struct kvm_run, {field})": getattr(kvm_h.kvm_run, field).offset
        for field in ("request_interrupt_window", "immediate_exit", "exit_reason", "if_flag", "flags", "cr8")
    }
    for member in ("io", "mmio", "internal"):
        outer = getattr(kvm_h.kvm_run, member)
        inner = dict(kvm_h.kvm_run().u._fields_)[member]
        for name, *_ in inner._fields_:
            head[f"offsetof(struct kvm_run, {member}.{name})"] = outer.offset + getattr(inner, name).offset
    return head


def test_layouts_and_numbers_are_those_of_the_kernels_header(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None or platform.machine() != "x86_64" or not Path("/usr/include/linux/kvm.h").exists():
        pytest.skip("needs a C compiler and <linux/kvm.h> for x86-64")
    expected = {request.name: int(request) for request in kvm_h.Request}
    expected |= {f"KVM_CAP_{capability.name}": int(capability) for capability in kvm_h.Capability}
    expected |= {f"KVM_EXIT_{reason.name}": int(reason) for reason in kvm_h.ExitReason}
    expected |= {f"KVM_IRQFD_FLAG_{flag.name}": int(flag) for flag in kvm_h.IrqfdFlag}
    expected |= {name: value for name, value in vars(kvm_h).items() if name.startswith("KVM_")}
    expected |= run_offsets()
    for name, structure in STRUCTURES.items():
        expected[f"sizeof(struct {name})"] = ctypes.sizeof(structure)
        expected |= field_offsets(name, structure)
    prints = "".join(f'printf("%llu\\n", (unsigned long long)({expression}));\n' for expression in expected)
    source = tmp_path / "layout.c"
    source.write_text(
        "#include <linux/kvm.h>\n#include <stddef.h>\n#include <stdio.h>\n"
        f"int main(void) {{\n{prints}return 0;\n}}\n"
    )
    subprocess.run([compiler, "-o", tmp_path / "layout", source], check=True)
    printed = subprocess.run([tmp_path / "layout"], check=True, capture_output=True, text=True).stdout
    assert dict(zip(expected, map(int, printed.split()), strict=True)) == expected
