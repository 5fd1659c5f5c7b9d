/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Configuration mechanism 1 (PCI Local Bus 3.0, section 3.2.2.3.2), base
 * address assignment (section 6.2.5.1), and the PIRQ router of the PIIX3
 * (data sheet section 2.2.5; slots map to PIRQs as in QEMU's hw/i386/pc_piix.c,
 * pci_slot_get_pirq).
 */
#include "io.h"
#include "pci.h"

#define CONFIG_ADDRESS	0xcf8
#define CONFIG_DATA	0xcfc
#define CONFIG_ENABLE	0x80000000

#define BAR_IO		0x1
#define BAR_MEMORY_64	0x4
#define BAR_IO_FLAGS	0x3
#define BAR_MEMORY_FLAGS 0xf

/* Windows that neither firmware nor a PC's fixed devices use. */
#define IO_START	0xd000
#define IO_END		0xe000
#define MEMORY_START	0xe0000000
#define MEMORY_END	0xf0000000

/*
 * The least room for a BAR.  QEMU's PCI proxy decodes at least 16 bytes for
 * each (hw/remote/proxy.c, probe_pci_info), so that closer ones would overlap.
 */
#define IO_ROOM		0x20
#define MEMORY_ROOM	0x1000

#define ROUTER_DEVFN	PCI_DEVFN(1, 0)
#define ROUTER_PIRQA	0x60

static u32 io_next, memory_next;

u32 config_read(u8 devfn, u8 offset, u8 bytes)
{
	outl(CONFIG_ADDRESS, CONFIG_ENABLE | devfn << 8 | (offset & ~3));
	return in(CONFIG_DATA + (offset & 3), bytes);
}

void config_write(u8 devfn, u8 offset, u8 bytes, u32 value)
{
	outl(CONFIG_ADDRESS, CONFIG_ENABLE | devfn << 8 | (offset & ~3));
	out(CONFIG_DATA + (offset & 3), bytes, value);
}

bool pci_present(u8 devfn)
{
	return config_read(devfn, PCI_VENDOR_ID, 2) != PCI_NO_VENDOR;
}

static bool multifunction(u8 devfn)
{
	u8 type = config_read(devfn, PCI_HEADER_TYPE, 1);

	return type != 0xff && type & PCI_HEADER_MULTI;
}

/* The next function on the bus after devfn, or -1.  The first one is after -1. */
int pci_next(int devfn)
{
	while (++devfn < PCI_DEVFN_COUNT) {
		if (PCI_FN(devfn) == 1 && !multifunction(devfn - 1))
			devfn |= 7;
		else if (pci_present(devfn))
			return devfn;
	}
	return -1;
}

/* Whether setup is to program the function: not the chipset's, whose addresses are fixed. */
bool pci_is_device(u8 devfn)
{
	return PCI_SLOT(devfn) != PCI_SLOT(ROUTER_DEVFN) &&
	       (config_read(devfn, PCI_HEADER_TYPE, 1) & ~PCI_HEADER_MULTI) == PCI_HEADER_NORMAL &&
	       config_read(devfn, PCI_CLASS_BASE, 1) != PCI_BASE_CLASS_BRIDGE;
}

/* Whether the function asserts INTx; false for one that reads all ones. */
bool pci_intx_status(u8 devfn)
{
	u16 status = config_read(devfn, PCI_STATUS, 2);

	return status != 0xffff && status & PCI_STATUS_INTERRUPT;
}

void pci_windows_reset(void)
{
	io_next = IO_START;
	memory_next = MEMORY_START;
}

/* Takes size bytes, a power of two, aligned to themselves; 0 if they do not fit. */
static u32 window_take(u32 *next, u32 end, u32 size, u32 room)
{
	u32 start;

	if (size < room && size)
		size = room;
	start = (*next + size - 1) & ~(size - 1);
	if (start < *next || start >= end || size > end - start)
		return 0;
	*next = start + size;
	return start;
}

/*
 * Sizes every BAR with decoding off and gives each its place; bars[] keeps
 * what the registers then read.  One that fits no window stays at 0, where
 * nothing decodes it, and makes the result false.  Decoding stays off.
 */
bool pci_assign_bars(u8 devfn, u32 bars[PCI_BAR_COUNT])
{
	u16 command = config_read(devfn, PCI_COMMAND, 2);
	bool complete = true;
	u32 i;

	config_write(devfn, PCI_COMMAND, 2, command & ~(PCI_COMMAND_IO | PCI_COMMAND_MEMORY));
	for (i = 0; i < PCI_BAR_COUNT; i++) {
		u8 offset = PCI_BASE_ADDRESS_0 + 4 * i;
		u32 mask, size, start;

		bars[i] = 0;
		config_write(devfn, offset, 4, 0xffffffff);
		mask = config_read(devfn, offset, 4);
		if (!mask)
			continue;
		if (mask & BAR_IO) {
			size = -((mask | 0xffff0000) & ~BAR_IO_FLAGS);
			start = window_take(&io_next, IO_END, size, IO_ROOM);
		} else {
			size = -(mask & ~BAR_MEMORY_FLAGS);
			start = window_take(&memory_next, MEMORY_END, size, MEMORY_ROOM);
		}
		complete &= start != 0;
		config_write(devfn, offset, 4, start);
		bars[i] = start ? config_read(devfn, offset, 4) : 0;
		if (!(mask & BAR_IO) && mask & BAR_MEMORY_64 && i + 1 < PCI_BAR_COUNT) {
			bars[++i] = 0;
			config_write(devfn, offset + 4, 4, 0);
		}
	}
	return complete;
}

u32 bar_address(u32 bar)
{
	return bar & (bar & BAR_IO ? ~BAR_IO_FLAGS : ~BAR_MEMORY_FLAGS);
}

bool bar_is_io(u32 bar)
{
	return bar & BAR_IO;
}

u8 pirq_of(u8 devfn, u8 pin)
{
	return (PCI_SLOT(devfn) - 1 + pin - 1) & (PIRQ_COUNT - 1);
}

/* Routes PIRQ 0 (A) to 3 (D) to an IRQ, or nowhere with PIRQ_DISABLED. */
void pirq_write(u8 pirq, u8 irq)
{
	config_write(ROUTER_DEVFN, ROUTER_PIRQA + pirq, 1, irq);
}
