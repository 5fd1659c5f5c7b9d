/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A guest for a pc machine that counts the interrupts which come as messages (MSI, MSI-X), by vector.
 *
 * It takes commands at the serial port (isa-serial), three 32-bit words each, and answers each with one:
 *     0  READ      address             what is at the physical address
 *     1  WRITE     address, value      0
 *     2  GET       address, -          what is in config space at a CONFIG_ADDRESS (PCI 3.0, 3.2.2.3.2)
 *     3  SET       address, value      0; writes 32 bits of config space
 *     4  SET16     address, value      0; writes 16 bits of it
 *     5  COUNT     vector, -           how often the vector has come
 *     6  RUN       address, value      0; writes the numbers of messages to a register, in turn, and waits after
 *                                      each until the vector FIRST + number has come. Bits 0 to 7 of the value are
 *                                      how many numbers there are, the others how many writes
 * It writes 'R' to port 0xe9 (isa-debugcon) when it is ready. Messages are to go to the local APIC at 0xfee00000.
 */
#include "multiboot.h"

#define COUNTS          0x81000
#define FIRST           0x40
#define EXCEPTIONS      0x20

#define DEBUG_PORT      0xe9
#define SERIAL          0x3f8
#define SERIAL_LSR      0x3fd
#define LSR_DATA_READY  0x01
#define LSR_THRE        0x20
#define CONFIG_ADDRESS  0xcf8
#define CONFIG_DATA     0xcfc
#define APIC_EOI        0xfee000b0
#define EFLAGS_IF       0x200

        /* 256 interrupt gates to 16-byte stubs, and a count for each. */
        movl    $IDT, %edi
        movl    $AT(stubs), %esi
        xorl    %ecx, %ecx
1:      write_gate
        movl    $0, COUNTS(, %ecx, 4)
        addl    $8, %edi
        addl    $16, %esi
        incl    %ecx
        cmpl    $256, %ecx
        jne     1b
        lidt    AT(idt_pointer)

        movb    $0xff, %al              /* nothing from the PICs */
        outb    %al, $0x21
        outb    %al, $0xa1
        movb    $'R', %al
        outb    %al, $DEBUG_PORT
        sti

next:   call    receive
        movl    %eax, %ebx
        call    receive
        movl    %eax, %esi
        call    receive
        cmpl    $(table_end - table) / 4, %ebx
        jae     halt
        jmp     *AT(table)(, %ebx, 4)

        .balign 4
table:
        .long   AT(read), AT(write), AT(get), AT(set), AT(set16), AT(count), AT(run)
table_end:

read:   movl    (%esi), %eax
        jmp     answer

write:  movl    %eax, (%esi)
        jmp     done

get:    movl    %esi, %eax
        movw    $CONFIG_ADDRESS, %dx
        outl    %eax, %dx
        movw    $CONFIG_DATA, %dx
        inl     %dx, %eax
        jmp     answer

set:    xchgl   %eax, %esi
        movw    $CONFIG_ADDRESS, %dx
        outl    %eax, %dx
        movl    %esi, %eax
        movw    $CONFIG_DATA, %dx
        outl    %eax, %dx
        jmp     done

set16:  movl    %eax, %ecx
        movl    %esi, %eax
        andl    $~3, %eax
        movw    $CONFIG_ADDRESS, %dx
        outl    %eax, %dx
        movl    %esi, %edx
        andl    $2, %edx
        addl    $CONFIG_DATA, %edx
        movl    %ecx, %eax
        outw    %ax, %dx
        jmp     done

count:  movl    COUNTS(, %esi, 4), %eax
        jmp     answer

run:    movzbl  %al, %edi
        shrl    $8, %eax
        movl    %eax, %ecx
        xorl    %ebx, %ebx
1:      jecxz   done
        cli
        movl    COUNTS + 4 * FIRST(, %ebx, 4), %edx
        movl    %ebx, (%esi)
2:      sti
        hlt
        cli
        cmpl    COUNTS + 4 * FIRST(, %ebx, 4), %edx
        je      2b
        sti
        decl    %ecx
        incl    %ebx
        cmpl    %edi, %ebx
        jne     1b
        xorl    %ebx, %ebx
        jmp     1b

done:   xorl    %eax, %eax
answer: movl    $4, %ecx
        movl    %eax, %ebx
1:      movw    $SERIAL_LSR, %dx
        inb     %dx, %al
        testb   $LSR_THRE, %al
        jz      1b
        movw    $SERIAL, %dx
        movb    %bl, %al
        outb    %al, %dx
        shrl    $8, %ebx
        loop    1b
        jmp     next

        /* A word in %eax, low byte first. */
receive:
        movl    $4, %ecx
        xorl    %edi, %edi
1:      movw    $SERIAL_LSR, %dx
        inb     %dx, %al
        testb   $LSR_DATA_READY, %al
        jz      1b
        movw    $SERIAL, %dx
        inb     %dx, %al
        movzbl  %al, %eax
        orl     %eax, %edi
        rorl    $8, %edi
        loop    1b
        movl    %edi, %eax
        ret

halt:   cli
        hlt
        jmp     halt

        /* There is no IRET in an instruction-emulating KVM: the flags come back by POPF, but for IF, which STI sets. */
taken:  pushl   %eax
        movl    4(%esp), %eax
        cmpl    $EXCEPTIONS, %eax
        jb      halt
        incl    COUNTS(, %eax, 4)
        movl    $0, APIC_EOI
        popl    %eax
        addl    $4, %esp
        pushl   8(%esp)
        andl    $~EFLAGS_IF, (%esp)
        popfl
        sti
        lret    $4

        stubs_to taken, 256
        global_descriptors
        interrupt_descriptors IDT, 256
