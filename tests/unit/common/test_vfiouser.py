# SPDX-License-Identifier: GPL-2.0-or-later
"""The wire format of vfio-user beside the kernel's header, as far as the protocol takes it from VFIO."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from common import vfiouser
from common.errors import ProtocolError

CONSTANTS = {
    "VFIO_DEVICE_FLAGS_RESET": vfiouser.DeviceFlag.RESET,
    "VFIO_DEVICE_FLAGS_PCI": vfiouser.DeviceFlag.PCI,
    "VFIO_REGION_INFO_FLAG_READ": vfiouser.RegionFlag.READ,
    "VFIO_REGION_INFO_FLAG_WRITE": vfiouser.RegionFlag.WRITE,
    "VFIO_REGION_INFO_FLAG_MMAP": vfiouser.RegionFlag.MMAP,
    "VFIO_REGION_INFO_FLAG_CAPS": vfiouser.RegionFlag.CAPS,
    "VFIO_PCI_ROM_REGION_INDEX": vfiouser.RegionIndex.ROM,
    "VFIO_PCI_CONFIG_REGION_INDEX": vfiouser.RegionIndex.CONFIG,
    "VFIO_PCI_VGA_REGION_INDEX": vfiouser.RegionIndex.VGA,
    "VFIO_PCI_NUM_REGIONS": vfiouser.NUM_REGIONS,
    "VFIO_PCI_INTX_IRQ_INDEX": vfiouser.IrqIndex.INTX,
    "VFIO_PCI_MSI_IRQ_INDEX": vfiouser.IrqIndex.MSI,
    "VFIO_PCI_MSIX_IRQ_INDEX": vfiouser.IrqIndex.MSIX,
    "VFIO_PCI_ERR_IRQ_INDEX": vfiouser.IrqIndex.ERR,
    "VFIO_PCI_REQ_IRQ_INDEX": vfiouser.IrqIndex.REQ,
    "VFIO_PCI_NUM_IRQS": vfiouser.NUM_IRQS,
    "VFIO_IRQ_INFO_EVENTFD": vfiouser.IrqFlag.EVENTFD,
    "VFIO_IRQ_INFO_MASKABLE": vfiouser.IrqFlag.MASKABLE,
    "VFIO_IRQ_INFO_AUTOMASKED": vfiouser.IrqFlag.AUTOMASKED,
    "VFIO_IRQ_INFO_NORESIZE": vfiouser.IrqFlag.NORESIZE,
    "VFIO_IRQ_SET_DATA_NONE": vfiouser.IrqSetFlag.DATA_NONE,
    "VFIO_IRQ_SET_DATA_BOOL": vfiouser.IrqSetFlag.DATA_BOOL,
    "VFIO_IRQ_SET_DATA_EVENTFD": vfiouser.IrqSetFlag.DATA_EVENTFD,
    "VFIO_IRQ_SET_ACTION_MASK": vfiouser.IrqSetFlag.MASK,
    "VFIO_IRQ_SET_ACTION_UNMASK": vfiouser.IrqSetFlag.UNMASK,
    "VFIO_IRQ_SET_ACTION_TRIGGER": vfiouser.IrqSetFlag.TRIGGER,
    "VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP": vfiouser.UnmapFlag.GET_DIRTY_PAGES,
    "VFIO_DMA_UNMAP_FLAG_ALL": vfiouser.UnmapFlag.ALL,
    "VFIO_DMA_MAP_FLAG_READ": vfiouser.DmaFlag.READ,
    "VFIO_DMA_MAP_FLAG_WRITE": vfiouser.DmaFlag.WRITE,
    "sizeof(struct vfio_region_info)": vfiouser.REGION_INFO.size,
    "sizeof(struct vfio_irq_info)": vfiouser.IRQ_INFO.size,
    "sizeof(struct vfio_irq_set)": vfiouser.IRQ_SET.size,
    "offsetof(struct vfio_region_info, size)": 16,
    "sizeof(struct vfio_region_info_cap_sparse_mmap)": len(vfiouser.sparse_areas(())),
    "sizeof(struct vfio_region_sparse_mmap_area)": len(vfiouser.sparse_areas(((0, 0),))) - 16,
}


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_numbers_are_those_of_linux(tmp_path: Path) -> None:
    names = list(CONSTANTS)
    values = ", ".join(f"(unsigned long)({name})" for name in names)
    source = f"""
        #include <stddef.h>
        #include <stdio.h>
        #include <linux/vfio.h>
        int main(void)
        {{
            unsigned long values[] = {{ {values} }};
            for (unsigned i = 0; i < sizeof(values) / sizeof(values[0]); i++)
                printf("%lu\\n", values[i]);
            return 0;
        }}
        """
    program = tmp_path / "constants"
    subprocess.run(["gcc", "-x", "c", "-o", program, "-"], input=source, text=True, check=True)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    assert dict(zip(names, map(int, printed.split()), strict=True)) == CONSTANTS


@pytest.mark.parametrize("size", [0, 15, vfiouser.MAX_SIZE + 1, 0xFFFFFFFF])
def test_an_impossible_size(size: int) -> None:
    with pytest.raises(ProtocolError, match=f"RESET of {size} bytes"):
        vfiouser.check_header(vfiouser.Command.DEVICE_RESET, size, 0)


@pytest.mark.parametrize("size", [16, vfiouser.MAX_SIZE])
def test_a_possible_size_of_an_unknown_command(size: int) -> None:
    vfiouser.check_header(99, size, vfiouser.Flag.NO_REPLY)


@pytest.mark.parametrize("kind", [1, 2, 15])
def test_an_answer_is_no_request(kind: int) -> None:
    with pytest.raises(ProtocolError, match=f"command 99 of type {kind}"):
        vfiouser.check_header(99, 16, kind)
