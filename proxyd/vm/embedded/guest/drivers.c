/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * edu (QEMU docs/specs/edu.rst) and pci-serial (docs/specs/pci-serial.rst: a
 * 16550A behind one I/O BAR).  base is the address of BAR 0.
 */
#include "drivers.h"
#include "io.h"

#define EDU_LIVENESS		0x04	/* reads as the complement of what was written */
#define EDU_STATUS		0x20
#define EDU_INTERRUPT_STATUS	0x24
#define EDU_INTERRUPT_RAISE	0x60
#define EDU_INTERRUPT_ACK	0x64

#define EDU_COOKIE		0x1a6e57d3u
#define EDU_SOURCE		0x00000001

static bool edu_claim(u32 base)
{
	u32 status = readl(base + EDU_INTERRUPT_STATUS);

	if (!status || status == 0xffffffff)
		return false;
	writel(base + EDU_INTERRUPT_ACK, status);
	return true;
}

static void edu_init(u32 base)
{
	writel(base + EDU_STATUS, 0);
	edu_claim(base);
	writel(base + EDU_LIVENESS, EDU_COOKIE);
}

static bool edu_alive(u32 base)
{
	return readl(base + EDU_LIVENESS) == ~EDU_COOKIE;
}

static void edu_raise(u32 base)
{
	writel(base + EDU_INTERRUPT_RAISE, EDU_SOURCE);
}

#define SERIAL_IER	1
#define SERIAL_IIR	2
#define SERIAL_LCR	3
#define SERIAL_MCR	4
#define SERIAL_SCR	7

#define SERIAL_IER_THRE		0x02
#define SERIAL_IIR_NONE		0x01
#define SERIAL_LCR_8N1		0x03

#define SERIAL_COOKIE		0x5a

static void serial_init(u32 base)
{
	outb(base + SERIAL_LCR, SERIAL_LCR_8N1);	/* first: with DLAB, IER is not there */
	outb(base + SERIAL_IER, 0);
	outb(base + SERIAL_MCR, 0);
	inb(base + SERIAL_IIR);
	outb(base + SERIAL_SCR, SERIAL_COOKIE);
}

static bool serial_alive(u32 base)
{
	return inb(base + SERIAL_SCR) == SERIAL_COOKIE;
}

/* The transmitter is empty, so that enabling its interrupt raises it. */
static void serial_raise(u32 base)
{
	outb(base + SERIAL_IER, SERIAL_IER_THRE);
}

/* Reading IIR clears the THRE interrupt. */
static bool serial_claim(u32 base)
{
	if (inb(base + SERIAL_IIR) & SERIAL_IIR_NONE)
		return false;
	outb(base + SERIAL_IER, 0);
	return true;
}

static const struct driver drivers[] = {
	{
		.model = "edu", .vendor = 0x1234, .device = 0x11e8,
		.init = edu_init, .alive = edu_alive, .raise = edu_raise, .claim = edu_claim,
	},
	{
		.model = "pci-serial", .vendor = 0x1b36, .device = 0x0002,
		.init = serial_init, .alive = serial_alive, .raise = serial_raise, .claim = serial_claim,
	},
};

const struct driver *driver_find(u16 vendor, u16 device)
{
	u32 i;

	for (i = 0; i < ARRAY_SIZE(drivers); i++) {
		if (drivers[i].vendor == vendor && drivers[i].device == device)
			return &drivers[i];
	}
	return NULL;
}
