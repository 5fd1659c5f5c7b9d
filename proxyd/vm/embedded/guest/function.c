/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The table of functions that have a driver, and what the commands do with one. */
#include "function.h"
#include "io.h"

struct function functions[FUNCTION_MAX];
u32 function_count;
struct function *pirq_functions[PIRQ_COUNT];

static bool sampling;

/* Megabytes that need not be zeroed: guest.ld keeps this section out of .bss. */
#define NOINIT	__attribute__((section(".bss.noinit")))
static u32 sample_memory[FUNCTION_MAX][2][SAMPLE_MAX] NOINIT;

void functions_clear(void)
{
	u32 i;

	function_count = 0;
	for (i = 0; i < PIRQ_COUNT; i++)
		pirq_functions[i] = NULL;
}

/* False when the table is full. */
bool function_add(u8 devfn, const struct driver *driver, u8 pirq, u8 irq)
{
	static const struct function blank;
	struct function *fn = &functions[function_count];

	if (function_count == FUNCTION_MAX)
		return false;
	*fn = blank;
	fn->driver = driver;
	fn->devfn = devfn;
	fn->pirq = pirq;
	fn->irq = irq;
	fn->next = pirq_functions[pirq];
	pirq_functions[pirq] = fn;
	fn->raise_to_handler.tsc = sample_memory[function_count][0];
	fn->eoi_to_reassert.tsc = sample_memory[function_count][1];
	function_count++;
	return true;
}

struct function *function_find(u8 devfn)
{
	u32 i;

	for (i = 0; i < function_count; i++) {
		if (functions[i].devfn == devfn)
			return &functions[i];
	}
	return NULL;
}

void sampling_start(void)
{
	u32 i;

	for (i = 0; i < function_count; i++) {
		functions[i].raise_to_handler.count = 0;
		functions[i].eoi_to_reassert.count = 0;
	}
	sampling = true;
}

void sampling_stop(void)
{
	sampling = false;
}

static void sample(struct samples *samples, u64 tsc)
{
	if (sampling)
		samples->tsc[samples->count++ % SAMPLE_MAX] = tsc >> 32 ? 0xffffffff : tsc;
}

void function_raise(struct function *fn)
{
	fn->raised++;
	fn->awaiting_entry = true;
	fn->awaiting_reassert = false;
	fn->raise_tsc = rdtsc();
	fn->driver->raise(fn->base);
}

/* The handler found the function asserted; tsc is from its first instructions. */
void function_entered(struct function *fn, u64 tsc)
{
	if (fn->awaiting_entry) {
		fn->awaiting_entry = false;
		sample(&fn->raise_to_handler, tsc - fn->raise_tsc);
	} else if (fn->awaiting_reassert) {
		fn->awaiting_reassert = false;
		fn->reasserts++;
		sample(&fn->eoi_to_reassert, tsc - fn->eoi_tsc);
	}
}

/* Makes device and handler ready for a new round, also after one that was lost. */
void function_quiesce(struct function *fn)
{
	fn->hold = false;
	fn->move_to = 0;
	fn->awaiting_entry = false;
	fn->awaiting_reassert = false;
	fn->driver->init(fn->base);
}

bool function_alive(const struct function *fn)
{
	return fn->driver->alive(fn->base);
}

/* Rewrites BARs and command where they differ from what setup wrote; true if any did. */
bool function_restore_config(const struct function *fn)
{
	bool differed = false;
	u32 i;

	for (i = 0; i < PCI_BAR_COUNT; i++) {
		u8 offset = PCI_BASE_ADDRESS_0 + 4 * i;

		if (config_read(fn->devfn, offset, 4) == fn->bars[i])
			continue;
		config_write(fn->devfn, offset, 4, fn->bars[i]);
		differed = true;
	}
	if (config_read(fn->devfn, PCI_COMMAND, 2) != COMMAND_RUNNING) {
		config_write(fn->devfn, PCI_COMMAND, 2, COMMAND_RUNNING);
		differed = true;
	}
	return differed;
}

void function_set_intx_disable(struct function *fn, bool disable)
{
	fn->intx_disabled = disable;
	config_write(fn->devfn, PCI_COMMAND, 2,
		     COMMAND_RUNNING | (disable ? PCI_COMMAND_INTX_DISABLE : 0));
}
