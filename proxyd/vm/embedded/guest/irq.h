/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Interrupt dispatch: which functions share an IRQ, and what was counted. */
#ifndef GUEST_IRQ_H
#define GUEST_IRQ_H

#include "function.h"
#include "generic.h"
#include "pic.h"
#include "types.h"

struct irq_line {
	struct function *first;	/* the functions of the PIRQ that is routed here */
	struct generic *generic;	/* and those without a driver */
	u32 entries;		/* handler invocations */
	u32 eois;
	u32 spurious;		/* entries that no function had asserted */
	u32 orphaned;		/* the same, while a function was gone or just reset */
	u32 unclaimed;		/* of these, how many in a row */
	bool stuck;		/* masked: too many in a row */
};

extern struct irq_line irq_lines[IRQ_COUNT];
extern u32 spurious_master, spurious_slave;	/* vectors 7 and 15 without a request */
extern volatile u32 ticks;

void idt_init(void);
void irq_counters_reset(void);
void pirq_route(u8 pirq, u8 irq);

void wait_tick(void);
void settle(u32 duration);

#endif
