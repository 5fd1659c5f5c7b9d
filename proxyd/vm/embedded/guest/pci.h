/* SPDX-License-Identifier: GPL-2.0-or-later */
/* PCI bus 0 by configuration mechanism 1, and the PIIX3's interrupt router. */
#ifndef GUEST_PCI_H
#define GUEST_PCI_H

#include "types.h"

#define PCI_DEVFN_COUNT		256
#define PCI_DEVFN(slot, fn)	((slot) << 3 | (fn))
#define PCI_SLOT(devfn)		((devfn) >> 3)
#define PCI_FN(devfn)		((devfn) & 7)

#define PCI_VENDOR_ID		0x00
#define PCI_DEVICE_ID		0x02
#define PCI_COMMAND		0x04
#define  PCI_COMMAND_IO			0x0001
#define  PCI_COMMAND_MEMORY		0x0002
#define  PCI_COMMAND_INTX_DISABLE	0x0400
#define PCI_STATUS		0x06
#define  PCI_STATUS_INTERRUPT		0x0008
#define PCI_CLASS_REVISION	0x08
#define PCI_CLASS_BASE		0x0b
#define  PCI_BASE_CLASS_BRIDGE		0x06
#define PCI_HEADER_TYPE		0x0e
#define  PCI_HEADER_NORMAL		0x00
#define  PCI_HEADER_MULTI		0x80
#define PCI_BASE_ADDRESS_0	0x10
#define PCI_INTERRUPT_LINE	0x3c
#define PCI_INTERRUPT_PIN	0x3d

#define PCI_BAR_COUNT		6

#define PCI_NO_VENDOR		0xffff

#define PIRQ_COUNT		4
#define PIRQ_DISABLED		0x80

u32 config_read(u8 devfn, u8 offset, u8 bytes);
void config_write(u8 devfn, u8 offset, u8 bytes, u32 value);
bool pci_present(u8 devfn);
int pci_next(int devfn);
bool pci_is_device(u8 devfn);
bool pci_intx_status(u8 devfn);

void pci_windows_reset(void);
bool pci_assign_bars(u8 devfn, u32 bars[PCI_BAR_COUNT]);
u32 bar_address(u32 bar);
bool bar_is_io(u32 bar);

u8 pirq_of(u8 devfn, u8 pin);
void pirq_write(u8 pirq, u8 irq);

#endif
