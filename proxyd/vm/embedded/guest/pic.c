/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The 8259 pair in its plain mode (fixed priorities, specific EOI), the edge/level
 * control registers of the PIIX, and channel 0 of the 8254.
 */
#include "io.h"
#include "pic.h"

#define MASTER_COMMAND	0x20
#define MASTER_DATA	0x21
#define SLAVE_COMMAND	0xa0
#define SLAVE_DATA	0xa1
#define ELCR		0x4d0	/* one bit for each IRQ, two ports */

#define ICW1_INIT_ICW4	0x11
#define ICW4_8086	0x01
#define OCW2_SPECIFIC	0x60
#define OCW3_READ_ISR	0x0b

#define PIT_CHANNEL0	0x40
#define PIT_MODE	0x43
#define PIT_RATE	0x34	/* channel 0, low then high byte, mode 2 */
#define PIT_ONE_SHOT	0x30	/* channel 0, low then high byte, mode 0 */
#define PIT_DIVISOR	(1193182 / TICKS_PER_SECOND)

static u16 masked;

static void write_masks(void)
{
	outb(MASTER_DATA, masked & 0xff);
	outb(SLAVE_DATA, masked >> 8);
}

void pic_init(void)
{
	outb(MASTER_COMMAND, ICW1_INIT_ICW4);
	outb(MASTER_DATA, PIC_VECTOR);
	outb(MASTER_DATA, 1 << IRQ_CASCADE);
	outb(MASTER_DATA, ICW4_8086);
	outb(SLAVE_COMMAND, ICW1_INIT_ICW4);
	outb(SLAVE_DATA, PIC_VECTOR + 8);
	outb(SLAVE_DATA, IRQ_CASCADE);
	outb(SLAVE_DATA, ICW4_8086);
	masked = (u16)~(1 << IRQ_CASCADE);
	write_masks();
	outb(ELCR, 0);
	outb(ELCR + 1, 0);
}

void pic_mask(u8 irq)
{
	masked |= 1 << irq;
	write_masks();
}

void pic_unmask(u8 irq)
{
	masked &= ~(1 << irq);
	write_masks();
}

void pic_set_level(u8 irq, bool level)
{
	u16 port = ELCR + irq / 8;
	u8 bit = 1 << irq % 8;

	outb(port, level ? inb(port) | bit : inb(port) & ~bit);
}

bool pic_in_service(u8 irq)
{
	u16 port = irq < 8 ? MASTER_COMMAND : SLAVE_COMMAND;

	outb(port, OCW3_READ_ISR);
	return inb(port) & 1 << irq % 8;
}

/* The chip that owns the pin comes first: its EOI is the one that KVM reports to the device. */
void pic_eoi(u8 irq)
{
	if (irq >= 8) {
		outb(SLAVE_COMMAND, OCW2_SPECIFIC | (irq - 8));
		pic_eoi_cascade();
	} else {
		outb(MASTER_COMMAND, OCW2_SPECIFIC | irq);
	}
}

/* After a spurious interrupt of the slave, only the cascade is in service. */
void pic_eoi_cascade(void)
{
	outb(MASTER_COMMAND, OCW2_SPECIFIC | IRQ_CASCADE);
}

void tick_start(void)
{
	outb(PIT_MODE, PIT_RATE);
	outb(PIT_CHANNEL0, PIT_DIVISOR & 0xff);
	outb(PIT_CHANNEL0, PIT_DIVISOR >> 8);
	pic_unmask(IRQ_TICK);
}

/* One-shot mode and masked, so that an idle guest costs its host no timer. */
void tick_stop(void)
{
	pic_mask(IRQ_TICK);
	outb(PIT_MODE, PIT_ONE_SHOT);
	outb(PIT_CHANNEL0, 0xff);
	outb(PIT_CHANNEL0, 0xff);
}
