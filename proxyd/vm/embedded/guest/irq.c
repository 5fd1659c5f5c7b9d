/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The IDT, the dispatch of the 8259s' vectors, and the handler that all
 * functions on an IRQ share.
 */
#include "console.h"
#include "io.h"
#include "irq.h"
#include "pci.h"

#define VECTOR_COUNT	48
#define STUB_SIZE	16
#define KERNEL_CS	0x08
#define GATE_INTERRUPT	0x8e00	/* present, ring 0, 32 bit, clears IF */

/* Unclaimed interrupts in a row after which an IRQ is masked. */
#define STORM_LIMIT	200

struct gate {
	u16 offset_low, selector, flags, offset_high;
};

struct table_register {
	u16 limit;
	u32 base;
} __attribute__((packed));

/* Called by start.S with arguments in registers. */
void __attribute__((regparm(3))) interrupt(u64 tsc, u32 vector);
void __attribute__((regparm(1), noreturn)) panic(const u32 *stack);

extern const char vector_stubs[];

static struct gate idt[VECTOR_COUNT];
static struct irq_line *pirq_lines[PIRQ_COUNT];

struct irq_line irq_lines[IRQ_COUNT];
u32 spurious_master, spurious_slave;
volatile u32 ticks;

void idt_init(void)
{
	struct table_register idtr = { sizeof(idt) - 1, (u32)idt };
	u32 i;

	for (i = 0; i < VECTOR_COUNT; i++) {
		u32 stub = (u32)vector_stubs + STUB_SIZE * i;

		idt[i].offset_low = stub;
		idt[i].selector = KERNEL_CS;
		idt[i].flags = GATE_INTERRUPT;
		idt[i].offset_high = stub >> 16;
	}
	asm volatile("lidt %0" : : "m"(idtr) : "memory");
}

void irq_counters_reset(void)
{
	u32 i;

	for (i = 0; i < IRQ_COUNT; i++) {
		irq_lines[i].entries = 0;
		irq_lines[i].eois = 0;
		irq_lines[i].spurious = 0;
		irq_lines[i].orphaned = 0;
		irq_lines[i].unclaimed = 0;
		irq_lines[i].stuck = false;
	}
	spurious_master = 0;
	spurious_slave = 0;
}

/* Writes the router's register and moves the PIRQ's functions to the IRQ's list. */
void pirq_route(u8 pirq, u8 irq)
{
	if (pirq_lines[pirq]) {
		pirq_lines[pirq]->first = NULL;
		pirq_lines[pirq]->generic = NULL;
	}
	pirq_write(pirq, irq);
	pirq_lines[pirq] = irq == PIRQ_DISABLED ? NULL : &irq_lines[irq];
	if (pirq_lines[pirq]) {
		pirq_lines[pirq]->first = pirq_functions[pirq];
		pirq_lines[pirq]->generic = pirq_generics[pirq];
	}
}

static void account_unclaimed(struct irq_line *line, u8 irq)
{
	const struct function *fn;
	bool orphaned = false;

	for (fn = line->first; fn; fn = fn->next) {
		if (fn->recovering || !function_alive(fn))
			orphaned = true;
	}
	if (orphaned)
		line->orphaned++;
	else
		line->spurious++;
	if (++line->unclaimed == STORM_LIMIT) {
		line->stuck = true;
		pic_mask(irq);
	}
}

/*
 * Asks every function on the line, as for any shared interrupt.  One that is
 * to be held is only asked for its INTx status bit, and stays asserted over
 * the EOI.
 */
static void device_interrupt(u64 tsc, u8 irq)
{
	struct irq_line *line = &irq_lines[irq];
	struct function *first = line->first;
	struct function *held = NULL;
	struct function *fn;
	bool claimed = false;

	line->entries++;
	for (fn = first; fn; fn = fn->next) {
		if (fn->intx_disabled)
			continue;
		if (fn->hold) {
			if (!pci_intx_status(fn->devfn))
				continue;
			function_entered(fn, tsc);
			fn->hold = false;
			fn->held++;
			held = fn;
		} else if (fn->driver->claim(fn->base)) {
			function_entered(fn, tsc);
			fn->served++;
		} else {
			continue;
		}
		claimed = true;
	}
	if (generic_claim(line->generic) || claimed)
		line->unclaimed = 0;
	else
		account_unclaimed(line, irq);

	if (held && held->move_to)
		pirq_route(held->pirq, held->move_to);

	for (fn = first; fn; fn = fn->next)
		fn->eois++;
	line->eois++;
	if (held) {
		held->awaiting_reassert = true;
		held->eoi_tsc = rdtsc();
	}
	pic_eoi(irq);
}

void __attribute__((regparm(3))) interrupt(u64 tsc, u32 vector)
{
	u8 irq = vector - PIC_VECTOR;

	if (irq == IRQ_TICK) {
		ticks++;
		pic_eoi(irq);
	} else if (irq == IRQ_COM1) {
		console_interrupt();
		pic_eoi(irq);
	} else if (irq == IRQ_SPURIOUS && !pic_in_service(irq)) {
		spurious_master++;
	} else if (irq == IRQ_SPURIOUS + 8 && !pic_in_service(irq)) {
		spurious_slave++;
		pic_eoi_cascade();
	} else {
		device_interrupt(tsc, irq);
	}
}

void wait_tick(void)
{
	u32 before = ticks;

	while (ticks == before)
		cpu_idle();
}

/* Takes interrupts for a number of whole ticks. */
void settle(u32 duration)
{
	u32 i;

	for (i = 0; i <= duration; i++)
		wait_tick();
}

/* An exception: prints its vector and the top of the stack, and stops. */
void __attribute__((regparm(1), noreturn)) panic(const u32 *stack)
{
	u32 i;

	put_string("panic");
	field_decimal("vector", stack[0]);
	for (i = 1; i < 5; i++)
		field_hex("stack", stack[i]);
	end_line();
	cpu_stop();
}
