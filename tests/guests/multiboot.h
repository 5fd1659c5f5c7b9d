/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The beginning of a flat binary that QEMU's -kernel loads: its multiboot header, and the entry into protected mode
 * with a stack, which goes on with the includer's first instruction.  The header says where the binary is to be loaded:
 * any -Ttext will do.
 */
#define LOAD            0x100000
#define AT(symbol)      ((symbol) - start + LOAD)
#define STACK           0x80000         /* grows down from here; the IDT begins here */
#define IDT             STACK

#define MULTIBOOT_MAGIC 0x1badb002
#define MULTIBOOT_FLAGS 0x00010000      /* the address fields are valid */

#include "protected.h"

        .code32
        .globl  _start
_start:
start:
        .long   MULTIBOOT_MAGIC
        .long   MULTIBOOT_FLAGS
        .long   -(MULTIBOOT_MAGIC + MULTIBOOT_FLAGS)
        .long   LOAD                    /* the header's own address, and where loading begins */
        .long   LOAD
        .long   0                       /* to the end of the file */
        .long   0                       /* no bss */
        .long   AT(entry)

entry:  lgdt    AT(gdt_pointer)
        ljmp    $CODE, $AT(1f)
1:      load_data_segments
        movl    $STACK, %esp
