/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The functions that no driver knows: they get addresses and an IRQ, and their interrupts are counted. */
#ifndef GUEST_GENERIC_H
#define GUEST_GENERIC_H

#include "pci.h"
#include "types.h"

struct generic {
	struct generic *next;	/* on the same PIRQ */
	u32 bars[PCI_BAR_COUNT];
	u8 devfn;
	u8 irq;			/* 0 without an interrupt pin */
	u32 interrupts;
};

extern struct generic generics[PCI_DEVFN_COUNT];
extern u32 generic_count;
extern struct generic *pirq_generics[PIRQ_COUNT];

void generics_clear(void);
void generic_add(u8 devfn, u8 pin, const u8 pirq_irqs[PIRQ_COUNT]);
bool generic_claim(struct generic *first);

#endif
