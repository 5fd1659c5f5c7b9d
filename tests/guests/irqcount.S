/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A guest for any QEMU `pc` machine (-kernel) that serves level-triggered interrupts of the PICs and reports each.
 *
 * To port 0xe9 (isa-debugcon) it writes 'R' when it is ready, then one letter for every interrupt that it takes, before
 * its EOI: 'a' + n for IRQ n. Level-triggered and unmasked are 5, 10 and 11. 'h' and 'p', IRQ 7 and 15, are the PICs'
 * spurious vectors. Nothing makes the interrupt go away but whoever caused it: KVM at the EOI, if it was an irqfd.
 */
#include "multiboot.h"

#define FIRST_VECTOR    0x20
#define DEBUG_PORT      0xe9
#define LEVEL           ((1 << 5) | (1 << 10) | (1 << 11))
#define UNMASKED        (LEVEL | 1 << 2)        /* 2 is the slave's */

        /* 16 interrupt gates to 16-byte stubs. */
        movl    $(IDT + 8 * FIRST_VECTOR), %edi
        movl    $AT(stubs), %esi
        movl    $16, %ecx
1:      write_gate
        addl    $8, %edi
        addl    $16, %esi
        decl    %ecx
        jnz     1b
        lidt    AT(idt_pointer)

        /* Both PICs: ICW1 with ICW4, vectors, cascade on IRQ 2, 8086 mode; then the masks. */
        movb    $0x11, %al
        outb    %al, $0x20
        outb    %al, $0xa0
        movb    $FIRST_VECTOR, %al
        outb    %al, $0x21
        movb    $(FIRST_VECTOR + 8), %al
        outb    %al, $0xa1
        movb    $4, %al
        outb    %al, $0x21
        movb    $2, %al
        outb    %al, $0xa1
        movb    $1, %al
        outb    %al, $0x21
        outb    %al, $0xa1
        movb    $(~UNMASKED & 0xff), %al
        outb    %al, $0x21
        movb    $(~UNMASKED >> 8 & 0xff), %al
        outb    %al, $0xa1

        movw    $0x4d0, %dx             /* ELCR */
        movb    $(LEVEL & 0xff), %al
        outb    %al, %dx
        incw    %dx
        movb    $(LEVEL >> 8), %al
        outb    %al, %dx

        movb    $'R', %al
        outb    %al, $DEBUG_PORT
idle:   sti
        hlt
        jmp     idle

        /*
         * There is nothing to return to but the idle loop, so the stack is dropped instead. IRQ 7 and 15 can only be
         * spurious, without an in-service bit of their own; the slave's leaves the master's bit 2.
         */
served: popl    %ebx
        leal    'a'(%ebx), %eax
        outb    %al, $DEBUG_PORT
        movb    $0x20, %al
        cmpl    $7, %ebx
        je      2f
        jb      1f
        cmpl    $15, %ebx
        je      1f
        outb    %al, $0xa0
1:      outb    %al, $0x20
2:      movl    $STACK, %esp
        jmp     idle

        stubs_to served, 16
        global_descriptors
        interrupt_descriptors IDT, FIRST_VECTOR + 16
