/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The functions without a driver, served as by Linux's uio_pci_generic.  The
 * handler finds by the status register which one asserts, counts, and sets
 * INTX_DISABLE, since it does not know how to acknowledge at the device.  The
 * client of the console acknowledges by "write" or "out", and then enables the
 * interrupt by "irq ADDR enable".
 */
#include "commands.h"
#include "console.h"
#include "function.h"
#include "generic.h"

struct generic generics[PCI_DEVFN_COUNT];
u32 generic_count;
struct generic *pirq_generics[PIRQ_COUNT];

void generics_clear(void)
{
	u32 i;

	generic_count = 0;
	for (i = 0; i < PIRQ_COUNT; i++)
		pirq_generics[i] = NULL;
}

void generic_add(u8 devfn, u8 pin, const u8 pirq_irqs[PIRQ_COUNT])
{
	static const struct generic blank;
	struct generic *fn = &generics[generic_count++];
	u8 pirq;

	*fn = blank;
	fn->devfn = devfn;
	if (pin < 1 || pin > PIRQ_COUNT)
		return;
	pirq = pirq_of(devfn, pin);
	fn->irq = pirq_irqs[pirq];
	fn->next = pirq_generics[pirq];
	pirq_generics[pirq] = fn;
}

static bool is_disabled(const struct generic *fn)
{
	return config_read(fn->devfn, PCI_COMMAND, 2) & PCI_COMMAND_INTX_DISABLE;
}

/* Whether any of them asserts the line; those that do are counted, and disabled. */
bool generic_claim(struct generic *first)
{
	struct generic *fn;
	bool claimed = false;

	for (fn = first; fn; fn = fn->next) {
		if (!pci_intx_status(fn->devfn) || is_disabled(fn))
			continue;
		config_write(fn->devfn, PCI_COMMAND, 2, COMMAND_RUNNING | PCI_COMMAND_INTX_DISABLE);
		fn->interrupts++;
		claimed = true;
	}
	return claimed;
}

/* irq ADDR [enable] */
const char *command_irq(u32 argc, char **argv)
{
	struct generic *fn;
	u8 devfn;

	if (!parse_devfn(argv[1], &devfn))
		return "bad address, SLOT.FN is meant";
	if (argc == 3 && !same(argv[2], "enable"))
		return "irq ADDR [enable] is meant";
	for (fn = generics; fn < generics + generic_count; fn++) {
		if (fn->devfn == devfn)
			break;
	}
	if (fn == generics + generic_count)
		return "no function without a driver at this address";
	if (argc == 3)
		config_write(devfn, PCI_COMMAND, 2, COMMAND_RUNNING);
	put_string("ok");
	if (fn->irq)
		field_decimal("gsi", fn->irq);
	field_decimal("interrupts", fn->interrupts);
	field_decimal("asserted", pci_intx_status(devfn));
	field_decimal("disabled", is_disabled(fn));
	return NULL;
}
