/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Finds the functions that have a driver, gives them addresses and interrupts,
 * and does the steps that the commands are made of.
 */
#include "function.h"
#include "io.h"
#include "irq.h"

#define COMMAND_RUNNING	(PCI_COMMAND_IO | PCI_COMMAND_MEMORY)

static const u8 pirq_irqs[PIRQ_COUNT] = { 10, 11, 5, 9 };

struct function functions[FUNCTION_MAX];
u32 function_count;
struct function *pirq_functions[PIRQ_COUNT];

static bool sampling;

/* Megabytes that need no zeroing: guest.ld keeps this section out of .bss. */
#define NOINIT	__attribute__((section(".bss.noinit")))
static u32 sample_memory[FUNCTION_MAX][2][SAMPLE_MAX] NOINIT;

static void function_add(u8 devfn, const struct driver *driver, u8 pin)
{
	static const struct function blank;
	struct function *fn = &functions[function_count];

	*fn = blank;
	fn->driver = driver;
	fn->devfn = devfn;
	fn->pirq = pirq_of(devfn, pin);
	fn->irq = pirq_irqs[fn->pirq];
	fn->next = pirq_functions[fn->pirq];
	pirq_functions[fn->pirq] = fn;
	fn->raise_to_handler.tsc = sample_memory[function_count][0];
	fn->eoi_to_reassert.tsc = sample_memory[function_count][1];
	function_count++;
}

static const char *functions_find(void)
{
	int devfn;
	u32 i;

	function_count = 0;
	for (i = 0; i < PIRQ_COUNT; i++)
		pirq_functions[i] = NULL;
	for (devfn = pci_next(-1); devfn >= 0; devfn = pci_next(devfn)) {
		const struct driver *driver = driver_find(config_read(devfn, PCI_VENDOR_ID, 2),
							  config_read(devfn, PCI_DEVICE_ID, 2));
		u8 pin = config_read(devfn, PCI_INTERRUPT_PIN, 1);

		if (!driver || pin < 1 || pin > PIRQ_COUNT)
			continue;
		if (function_count == FUNCTION_MAX)
			return "more functions than the table holds";
		function_add(devfn, driver, pin);
	}
	return NULL;
}

/* Routes each PIRQ to its IRQ, level-triggered and unmasked if a function uses it. */
static void pirqs_setup(void)
{
	u8 pirq;

	for (pirq = 0; pirq < PIRQ_COUNT; pirq++) {
		u8 irq = pirq_irqs[pirq];

		pic_set_level(irq, true);
		pirq_route(pirq, irq);
		if (pirq_functions[pirq])
			pic_unmask(irq);
	}
}

/*
 * Addresses are given out anew each time: firmware may have done it before, or
 * there may be none.  Returns what is wrong, or NULL.
 */
const char *functions_setup(void)
{
	const char *error;
	struct function *fn;
	u32 i;

	for (i = 0; i < PIRQ_COUNT; i++)
		pic_mask(pirq_irqs[i]);
	irq_counters_reset();
	pci_windows_reset();

	error = functions_find();
	if (error)
		return error;
	for (i = 0; i < function_count; i++)
		config_write(functions[i].devfn, PCI_COMMAND, 2, 0);
	for (i = 0; i < function_count; i++) {
		fn = &functions[i];
		if (!pci_assign_bars(fn->devfn, fn->bars))
			return "a BAR fits no window";
		fn->base = bar_address(fn->bars[0]);
		config_write(fn->devfn, PCI_INTERRUPT_LINE, 1, fn->irq);
		config_write(fn->devfn, PCI_COMMAND, 2, COMMAND_RUNNING);
		fn->driver->init(fn->base);
		if (!function_alive(fn))
			return "a function's registers do not answer";
	}
	pirqs_setup();
	return NULL;
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

/* Back to where a round begins, whatever became of the last one. */
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

/* Puts right what differs in BARs and command; true if anything did. */
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

void wait_tick(void)
{
	u32 before = ticks;

	while (ticks == before)
		cpu_idle();
}

/* Opens interrupts for a number of whole ticks, for whatever still comes. */
void settle(u32 duration)
{
	u32 i;

	for (i = 0; i <= duration; i++)
		wait_tick();
}
