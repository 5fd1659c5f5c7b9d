/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Firmware for a pc whose pci-serial is at 05.0: programs its BAR and its interrupt, and then raises, lowers
 * and acknowledges without end.  Real mode, no data, no stack.  64 KiB for -bios; runs wherever it lies.
 */
	.code16
	.globl _start

#include "pcserial.h"

_start:
	cli
	set_up_serial
1:	movw	$IER, %dx
	movb	$0x02, %al			/* THRE: the line rises */
	outb	%al, %dx
	movw	$IIR, %dx
	inb	%dx, %al			/* and falls */
	movw	$IER, %dx
	xorb	%al, %al
	outb	%al, %dx
	movb	$0x62, %al			/* specific EOI of IRQ 10, which KVM reports to the device */
	outb	%al, $0xa0
	jmp	1b

	.org	0xfff0			/* where a CPU begins */
	ljmp	$0xf000, $0
	.org	0x10000
