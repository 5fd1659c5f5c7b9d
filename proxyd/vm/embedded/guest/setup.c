/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The command "setup": gives addresses and interrupts to all functions but
 * the chipset's, and starts those that have a driver.
 */
#include "function.h"
#include "generic.h"
#include "irq.h"
#include "setup.h"

static const u8 pirq_irqs[PIRQ_COUNT] = { 10, 11, 5, 9 };

static const char *functions_find(void)
{
	int devfn;

	functions_clear();
	generics_clear();
	for (devfn = pci_next(-1); devfn >= 0; devfn = pci_next(devfn)) {
		const struct driver *driver = driver_find(config_read(devfn, PCI_VENDOR_ID, 2),
							  config_read(devfn, PCI_DEVICE_ID, 2));
		u8 pin = config_read(devfn, PCI_INTERRUPT_PIN, 1);
		u8 pirq;

		if (!pci_is_device(devfn))
			continue;
		if (!driver || pin < 1 || pin > PIRQ_COUNT) {
			generic_add(devfn, pin, pirq_irqs);
			continue;
		}
		pirq = pirq_of(devfn, pin);
		if (!function_add(devfn, driver, pirq, pirq_irqs[pirq]))
			return "more functions than the table holds";
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
		if (pirq_functions[pirq] || pirq_generics[pirq])
			pic_unmask(irq);
	}
}

/* Lets the functions without a driver decode, and interrupt. */
static void generics_start(void)
{
	struct generic *fn;

	for (fn = generics; fn < generics + generic_count; fn++) {
		pci_assign_bars(fn->devfn, fn->bars);
		config_write(fn->devfn, PCI_INTERRUPT_LINE, 1, fn->irq);
		config_write(fn->devfn, PCI_COMMAND, 2, COMMAND_RUNNING);
	}
}

/*
 * Assigns all addresses anew: firmware may have assigned them before, or there
 * may be no firmware.  Those with a driver come first, they can't do without.
 * Returns NULL, or the reason for a failure.
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
	for (i = 0; i < generic_count; i++)
		config_write(generics[i].devfn, PCI_COMMAND, 2, 0);
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
	generics_start();
	pirqs_setup();
	return NULL;
}
