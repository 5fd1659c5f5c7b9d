/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Firmware for a pc whose loader has put a flat multiboot image at 1 MiB: enters it as -kernel would, without the
 * second that SeaBIOS takes where KVM emulates each instruction.  It sets up no more than an image can't do without:
 * the local APIC lets the PICs' interrupts through.  Addresses of devices and routes are left to the image.
 *
 * 64 KiB below 4 GiB and below 1 MiB, for -bios.  Runs wherever it lies, at any -Ttext.
 */
#define HERE		0xf0000		/* also F000:0 */
#define AT(symbol)	((symbol) - start + HERE)
#define ENTRY_ADDR	0x10001c	/* the header is the image's first bytes, its last word the entry */
#define APIC_SPIV	0xfee000f0
#define APIC_SPIV_ENABLED	0x1ff
#define APIC_LVT0	0xfee00350
#define APIC_MODE_EXTINT	0x700

#include "protected.h"

	.code16
	.globl _start
_start:
start:	cli
	lgdtl	%cs:(gdt_pointer - start)
	movl	%cr0, %eax
	orb	$1, %al
	movl	%eax, %cr0
	ljmpl	$CODE, $AT(1f)

	.code32
1:	load_data_segments
	movl	$APIC_SPIV_ENABLED, APIC_SPIV
	movl	$APIC_MODE_EXTINT, APIC_LVT0
	jmp	*ENTRY_ADDR

	global_descriptors

	.code16
	.org	0xfff0			/* where a CPU begins */
	ljmp	$(HERE >> 4), $0
	.org	0x10000
