/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Firmware for a pc whose pci-serial is at 05.0: programs its BAR and its interrupt, and then raises, lowers
 * and acknowledges without end.  Real mode, no data, no stack.  64 KiB for -bios; runs wherever it lies.
 */
	.code16
	.globl _start

#define PORT	0xc000
#define IER	(PORT + 1)
#define IIR	(PORT + 2)

.macro config_write offset, value
	movl	$(0x80000000 | \offset), %eax
	movw	$0xcf8, %dx
	outl	%eax, %dx
	movl	$\value, %eax
	movw	$0xcfc, %dx
	outl	%eax, %dx
.endm

_start:
	cli
	config_write 0x0860, 0x09050b0a		/* PIRQ A to D: IRQ 10, 11, 5, 9 */
	movb	$0x0e, %al			/* ELCR: IRQ 9 to 11 are levels */
	movw	$0x4d1, %dx
	outb	%al, %dx
	config_write 0x2810, (PORT | 1)
	config_write 0x2804, 0x0001
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
