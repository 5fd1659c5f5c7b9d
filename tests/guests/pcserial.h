/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * For real-mode firmware of a pc whose pci-serial is at 05.0: the device's ports, and the set-up of its BAR and of its
 * interrupt, IRQ 10.
 */
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

.macro set_up_serial
	config_write 0x0860, 0x09050b0a		/* PIRQ A to D: IRQ 10, 11, 5, 9 */
	movb	$0x0e, %al			/* ELCR: IRQ 9 to 11 are levels */
	movw	$0x4d1, %dx
	outb	%al, %dx
	config_write 0x2810, (PORT | 1)
	config_write 0x2804, 0x0001
.endm
