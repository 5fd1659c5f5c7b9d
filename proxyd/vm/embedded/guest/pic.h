/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The 8259 pair, its edge/level registers, and the PIT's safety tick. */
#ifndef GUEST_PIC_H
#define GUEST_PIC_H

#include "types.h"

#define IRQ_COUNT	16
#define IRQ_TICK	0
#define IRQ_CASCADE	2
#define IRQ_COM1	4
#define IRQ_SPURIOUS	7	/* of either chip: 7 and 15 */

#define PIC_VECTOR	0x20	/* of IRQ 0; IRQ 8 is at 0x28 */

#define TICKS_PER_SECOND	100

void pic_init(void);
void pic_mask(u8 irq);
void pic_unmask(u8 irq);
void pic_set_level(u8 irq, bool level);
bool pic_in_service(u8 irq);
void pic_eoi(u8 irq);
void pic_eoi_cascade(void);

void tick_start(void);
void tick_stop(void);

#endif
