/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A guest that raises and serves level-triggered PCI interrupts, driven by a
 * line protocol on COM1.  It needs a PC's 8259 pair, 8254, COM1 on IRQ 4, PCI
 * configuration mechanism 1 and a PIIX3 at 00:01.0; no firmware and no paging.
 *
 * The protocol
 *
 * At each start the guest prints "iohub-guest 1 ready".  Then it takes one
 * command a line (at most 127 printable characters, words divided by blanks)
 * and answers it before it looks at the next:
 *
 *	# TEXT			any number of lines for people, "help" only
 *	* KIND KEY=VALUE ...	any number of records
 *	ok [KEY=VALUE ...]	or
 *	err REASON		exactly one of these, last
 *
 * Numbers are decimal or 0x hexadecimal, both ways.  WIDTH is 8, 16 or 32, in
 * bits; ADDR is a function on bus 0, as in 05.0.  An exception prints
 * "panic vector= ...", which may be in the middle of a line; the guest has
 * stopped then.
 *
 *	help
 *	version				ok guest= version=
 *	in WIDTH PORT			ok value=
 *	out WIDTH PORT VALUE
 *	read WIDTH ADDRESS		ok value=	(memory-mapped I/O)
 *	write WIDTH ADDRESS VALUE
 *	config read WIDTH ADDR OFFSET	ok value=
 *	config write WIDTH ADDR OFFSET VALUE
 *	lspci				* pci addr= id= class= revision= pin= line=
 *					ok count=
 *	setup				* function addr= id= model= gsi= [memoryN=] [ioN=]
 *					* device addr= id= [gsi=] [memoryN=] [ioN=]
 *					ok functions= devices=
 *		Gives BARs and IRQs to all functions but the chipset's, and zeroes all
 *		counters.  Those with a driver (edu, pci-serial) are functions, the
 *		others are devices.  memoryN and ioN are the addresses of BAR N; a
 *		device's BAR without one fits no window.  PIRQ A to D go to IRQ 10, 11,
 *		5, 9.
 *	irq ADDR [enable]		ok [gsi=] interrupts= asserted= disabled=
 *		Of a device: how often its line has interrupted since setup, whether it
 *		is asserted, and INTX_DISABLE, which the handler sets and "enable"
 *		clears.
 *	run ROUNDS [held EVERY]		* progress done= total=
 *					* back addr= after_ticks= config=kept|rewritten
 *					* gone addr=
 *					ok ticks=
 *		In each round, each function raises its line and waits up to 3 seconds
 *		for the handler.  In every EVERYth round the handler does not
 *		acknowledge at the device the first time: the line is still high at the
 *		EOI and must interrupt once more, and then the handler does.  A function
 *		that vanishes or loses its registers is waited for (20 seconds),
 *		initialised and reported by "back", and its round is done again; it is
 *		not lost.  One that does not return is reported by "gone", and the run
 *		ends with err, as it does after 10 lost rounds in a row.  Ticks are
 *		hundredths of a second.
 *	samples ADDR			* raise_to_handler tsc=HEX,HEX,...
 *					* eoi_to_reassert tsc=HEX,HEX,...
 *		Of the last run, in cycles of the TSC, hexadecimal without 0x; the last
 *		16384 of each, in no order.  From just before the access that raises to
 *		the handler's entry, and in held rounds from just before the EOI to the
 *		next entry.
 *	stats				* function addr= id= model= gsi= raised= served= lost=
 *						redone= eois= held= reasserts=
 *					* irq irq= entries= eois= spurious= orphaned= stuck=
 *					* vectors spurious7= spurious15=
 *		Since setup.  raised = served + lost.  eois are those of the function's
 *		IRQ.  spurious: entries while no function asserted; orphaned: the same
 *		while one was gone or had just been reset.  An IRQ that is spurious 200
 *		times in a row is masked, and stuck until setup.
 *	reroute ADDR			* step name= addr= irq= entries= elsewhere= served=
 *						vector7= vector15= result=good|bad
 *		Moves the function's PIRQ while the line is high: before INTA to IRQ 12
 *		(before_inta), between INTA and EOI back again (before_eoi), off and on
 *		(disabled, enabled).  Each must bring exactly one interrupt where it is
 *		routed; on both IRQs all functions of the PIRQ must work (on_new_irq,
 *		restored).
 *	intx ADDR			* step ... (disabled, enabled)
 *		Sets INTX_DISABLE while the line is high: no interrupt, status bit 3
 *		stays; clears it: one.
 *	hold ADDR			ok status=
 *		Raises the line with its IRQ masked, and leaves it so.
 *	release ADDR			* step ... (released)
 *	reboot
 *		Answers, then resets the machine by port 0xcf9.
 */
#include "commands.h"
#include "console.h"
#include "irq.h"

void __attribute__((noreturn)) guest_main(void);

void guest_main(void)
{
	char line[CONSOLE_LINE_MAX];

	pic_init();
	idt_init();
	console_init();
	pic_unmask(IRQ_COM1);
	put_string("iohub-guest 1 ready\n");
	for (;;) {
		switch (console_read_line(line)) {
		case CONSOLE_LINE:
			execute(line);
			break;
		case CONSOLE_TOO_LONG:
			put_string("err line too long\n");
			break;
		case CONSOLE_NOT_TEXT:
			put_string("err not printable ASCII\n");
			break;
		}
	}
}
