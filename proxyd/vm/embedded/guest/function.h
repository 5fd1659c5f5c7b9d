/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The functions that have a driver: their places, counters and samples. */
#ifndef GUEST_FUNCTION_H
#define GUEST_FUNCTION_H

#include "drivers.h"
#include "pci.h"
#include "types.h"

#define COMMAND_RUNNING	(PCI_COMMAND_IO | PCI_COMMAND_MEMORY)

#define FUNCTION_MAX	32
#define SAMPLE_MAX	16384	/* of each kind for each function; the last ones stay */

struct samples {
	u32 count;	/* taken since the run began; may be above SAMPLE_MAX */
	u32 *tsc;
};

struct function {
	const struct driver *driver;
	struct function *next;	/* on the same PIRQ */
	u32 base;		/* address of BAR 0 */
	u32 bars[PCI_BAR_COUNT];
	u8 devfn, pirq;
	u8 irq;			/* where its PIRQ goes but for the steps of "reroute" */

	/* What the handler is told. */
	bool hold;		/* do not acknowledge at the next entry */
	u8 move_to;		/* with hold: route the PIRQ to this IRQ before the EOI */
	bool intx_disabled;
	bool recovering;
	bool parked;		/* raised by "hold", its IRQ masked */

	/* raised = served + lost, once a command is over. */
	u32 raised, served, lost;
	u32 redone;		/* rounds begun again because the device had been reset */
	u32 eois;		/* of its IRQ, whoever had asserted */
	u32 held, reasserts;	/* EOIs while asserted, and entries that these brought */

	bool awaiting_entry, awaiting_reassert;
	u64 raise_tsc, eoi_tsc;
	struct samples raise_to_handler, eoi_to_reassert;
};

extern struct function functions[FUNCTION_MAX];
extern u32 function_count;
extern struct function *pirq_functions[PIRQ_COUNT];

void functions_clear(void);
bool function_add(u8 devfn, const struct driver *driver, u8 pirq, u8 irq);
struct function *function_find(u8 devfn);

void function_raise(struct function *fn);
void function_entered(struct function *fn, u64 tsc);
void function_quiesce(struct function *fn);
bool function_alive(const struct function *fn);
bool function_restore_config(const struct function *fn);
void function_set_intx_disable(struct function *fn, bool disable);

void sampling_start(void);
void sampling_stop(void);

#endif
