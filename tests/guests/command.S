/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A guest that does what the test tells it, one command at a time, with interrupts off in between.
 *
 * 32-bit flat protected mode, entered at the first byte; flat binary linked at 0x1000. The mailbox is an array of
 * 32-bit words at 0x500:
 *     0  command      the test's
 *     1  address      port or physical address
 *     2  value        to write, and the result of a read
 *     3  vector       of the interrupt that the last TAKE took, -1 if none
 * The guest reads a byte from DOORBELL (any reply does) whenever it is done with a command; the test answers when
 * the next one is in the mailbox. TAKE opens a window for one interrupt: it reads WINDOW with interrupts on, then
 * counts mailbox word 2 down to 0, and turns interrupts off again. The exit for WINDOW is a place where KVM looks for
 * interrupts; so is every instruction of the loop on real hardware, and every 1024th under an instruction emulator.
 * A taken interrupt isn't acknowledged and isn't returned from: the handler drops the stack and rings the doorbell.
 */
#define DOORBELL        0x5e0
#define WINDOW          0x5e1
#define MAILBOX         0x500
#define STACK           0xff00
#define IDT             0xf000
#define AT(symbol)      (symbol)

#include "protected.h"

        .code32
        .globl  _start
_start:
        lgdt    gdt_pointer
        ljmp    $CODE, $1f
1:      load_data_segments

        /* 256 interrupt gates to 16-byte stubs; everything is below 64 KiB. */
        movl    $IDT, %edi
        movl    $stubs, %esi
        movl    $256, %ecx
1:      movw    %si, 0(%edi)
        movw    $CODE, 2(%edi)
        movw    $0x8e00, 4(%edi)
        movw    $0, 6(%edi)
        addl    $8, %edi
        addl    $16, %esi
        decl    %ecx
        jnz     1b
        lidt    idt_pointer

next:
        movl    $STACK, %esp
        movw    $DOORBELL, %dx
        inb     %dx, %al
        movl    MAILBOX, %ebx
        movl    MAILBOX + 4, %edx
        movl    MAILBOX + 8, %eax
        cmpl    $(table_end - table) / 4, %ebx
        jae     next
        jmp     *table(, %ebx, 4)

        .balign 4
table:
        .long   in8, in16, in32, out8, out16, out32
        .long   read8, read16, read32, write8, write16, write32
        .long   take
table_end:

in8:    xorl    %eax, %eax
        inb     %dx, %al
        jmp     result
in16:   xorl    %eax, %eax
        inw     %dx, %ax
        jmp     result
in32:   inl     %dx, %eax
        jmp     result
out8:   outb    %al, %dx
        jmp     next
out16:  outw    %ax, %dx
        jmp     next
out32:  outl    %eax, %dx
        jmp     next
read8:  xorl    %eax, %eax
        movb    (%edx), %al
        jmp     result
read16: xorl    %eax, %eax
        movw    (%edx), %ax
        jmp     result
read32: movl    (%edx), %eax
        jmp     result
write8: movb    %al, (%edx)
        jmp     next
write16:
        movw    %ax, (%edx)
        jmp     next
write32:
        movl    %eax, (%edx)
        jmp     next

result: movl    %eax, MAILBOX + 8
        jmp     next

take:   movl    %eax, %ecx
        movl    $-1, MAILBOX + 12
        movw    $WINDOW, %dx
        sti
        nop                             /* the instruction after sti still runs with interrupts held off */
        inb     %dx, %al
        jmp     2f
1:      decl    %ecx
2:      testl   %ecx, %ecx
        jnz     1b
        cli
        jmp     next

taken:  popl    %eax
        movl    %eax, MAILBOX + 12
        jmp     next

        stubs_to taken, 256
        global_descriptors
        interrupt_descriptors IDT, 256
