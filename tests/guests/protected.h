/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * 32-bit flat protected mode: its two segments, and interrupt gates with a stub for each vector.
 *
 * The includer defines AT(symbol), the address at which the symbol is when the guest runs.
 */
#define CODE            0x08
#define DATA            0x10

.macro load_data_segments
        movw    $DATA, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
.endm

/* Writes an interrupt gate at %edi, whose handler is at %esi. */
.macro write_gate
        movl    %esi, %eax
        movw    %ax, 0(%edi)
        movw    $CODE, 2(%edi)
        movw    $0x8e00, 4(%edi)
        shrl    $16, %eax
        movw    %ax, 6(%edi)
.endm

/* Stubs of 16 bytes, each of which pushes its number, from 0 to count - 1, and jumps to the handler. */
.macro stubs_to handler, count
        .balign 16
stubs:
        .set    number, 0
        .rept   \count
        pushl   $number
        jmp     \handler
        .balign 16
        .set    number, number + 1
        .endr
.endm

/* What LGDT reads. The accessed bits are set: a table in ROM could not take the CPU's write. */
.macro global_descriptors
        .balign 8
gdt:    .quad   0
        .quad   0x00cf9b000000ffff
        .quad   0x00cf93000000ffff
gdt_pointer:
        .word   3 * 8 - 1
        .long   AT(gdt)
.endm

/* What LIDT reads, for a table of this many gates. */
.macro interrupt_descriptors address, count
idt_pointer:
        .word   8 * (\count) - 1
        .long   \address
.endm
