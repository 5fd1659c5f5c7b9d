/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Firmware for a pc whose pci-serial is at 05.0: counts the cycles of port reads and of interrupts, without end.
 * To port 0xe9 (isa-debugcon) it writes, for each 256 of them, 'P' or 'I' and their cycles together as 4 bytes, the
 * lowest first.  A port read is one of SCR.  An interrupt is the write to IER that raises it, the handler with an
 * access to IIR and one to IER, the EOI, and the return.  Real mode.  64 KiB for -bios.
 */
	.code16
	.globl _start

#include "pcserial.h"

#define SCR	(PORT + 7)
#define DEBUG	0xe9
#define BATCH	256
#define IA32_APIC_BASE	0x1b
#define APIC_ENABLE	0x800
#define VECTOR	(0x2a * 4)		/* of IRQ 10 */
#define SPURIOUS7	(0x27 * 4)
#define SPURIOUS15	(0x2f * 4)

.macro output port, value
	movb	$\value, %al
	outb	%al, $\port
.endm

_start:
	cli
	xorw	%ax, %ax
	movw	%ax, %ds
	movw	%ax, %ss
	movw	$0x7c00, %sp
	movw	$(handler - _start), VECTOR
	movw	$0xf000, VECTOR + 2
	movw	$(spurious7 - _start), SPURIOUS7
	movw	$0xf000, SPURIOUS7 + 2
	movw	$(spurious15 - _start), SPURIOUS15
	movw	$0xf000, SPURIOUS15 + 2
	movl	$IA32_APIC_BASE, %ecx		/* without a local APIC the PICs reach the CPU */
	rdmsr
	andl	$~APIC_ENABLE, %eax
	wrmsr
	output	0x20, 0x11			/* PICs: vectors from 0x20 and 0x28, all masked but IRQ 10 */
	output	0xa0, 0x11
	output	0x21, 0x20
	output	0xa1, 0x28
	output	0x21, 0x04
	output	0xa1, 0x02
	output	0x21, 0x01
	output	0xa1, 0x01
	output	0x21, 0xfb
	output	0xa1, 0xfb
	set_up_serial

ports:	movl	$BATCH, %ecx
	rdtsc
	movl	%eax, %esi
1:	movw	$SCR, %dx
	inb	%dx, %al
	decl	%ecx
	jnz	1b
	rdtsc
	subl	%esi, %eax
	movb	$'P', %bl
	call	report

	movl	$BATCH, %ecx
	xorl	%edi, %edi
1:	xorb	%bl, %bl
	rdtsc
	movl	%eax, %esi
	movw	$IER, %dx
	movb	$0x02, %al			/* THRE: the line rises */
	outb	%al, %dx
2:	sti
	hlt
	cli
	testb	%bl, %bl
	jz	2b
	rdtsc
	subl	%esi, %eax
	addl	%eax, %edi
	decl	%ecx
	jnz	1b
	movl	%edi, %eax
	movb	$'I', %bl
	call	report
	jmp	ports

handler:
	pushw	%ax
	pushw	%dx
	movw	$IIR, %dx
	inb	%dx, %al			/* the line falls */
	movw	$IER, %dx
	xorb	%al, %al
	outb	%al, %dx
	output	0xa0, 0x62			/* specific EOIs of IRQ 10, which KVM reports to the device, and of IRQ 2 */
	output	0x20, 0x62
	movb	$1, %bl
	popw	%dx
	popw	%ax
	iret

/* A PIC that has lost the request while the CPU took it; the slave's is in service at the master. */
spurious15:
	pushw	%ax
	output	0x20, 0x62
	popw	%ax
spurious7:
	iret

/* %bl and %eax */
report:	xchgb	%al, %bl
	outb	%al, $DEBUG
	movb	%bl, %al
	movw	$4, %cx
1:	outb	%al, $DEBUG
	shrl	$8, %eax
	loop	1b
	ret

	.org	0xfff0			/* where a CPU begins */
	ljmp	$0xf000, $0
	.org	0x10000
