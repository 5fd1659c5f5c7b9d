/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Entry, GDT, and the interrupt stubs.
 *
 * The multiboot header carries load addresses (flag bit 16, Multiboot 0.6.96
 * section 3.1.3), so that a loader needs nothing but these eight words: copy
 * the file to load_addr, jump to entry in flat 32-bit mode with interrupts
 * off.  Nothing of the multiboot information is used, and every mutable
 * byte is set here, so that the same entry serves a cold start and a reboot
 * that left memory as it was.
 */

#define MULTIBOOT_MAGIC		0x1badb002
#define MULTIBOOT_ADDRESSES	0x00010000

#define KERNEL_CS		0x08
#define KERNEL_DS		0x10
#define EFLAGS_IF		0x200

	.section .multiboot, "a"
	.balign 4
header:
	.long	MULTIBOOT_MAGIC
	.long	MULTIBOOT_ADDRESSES
	.long	-(MULTIBOOT_MAGIC + MULTIBOOT_ADDRESSES)
	.long	header
	.long	image_start		/* load_addr */
	.long	image_end		/* load_end_addr */
	.long	memory_end		/* bss_end_addr */
	.long	entry			/* entry_addr */

	.text
	.globl	entry
entry:
	cli
	cld
	lgdt	gdt_register
	ljmp	$KERNEL_CS, $1f
1:	movl	$KERNEL_DS, %eax
	movl	%eax, %ds
	movl	%eax, %es
	movl	%eax, %fs
	movl	%eax, %gs
	movl	%eax, %ss
	movl	$stack_top, %esp

	movl	$bss_start, %edi
	movl	$bss_dwords, %ecx
	xorl	%eax, %eax
	rep stosl

	call	guest_main
2:	cli
	hlt
	jmp	2b

/*
 * One stub for each vector, 16 bytes apart: 0x00-0x1f exceptions,
 * 0x20-0x2f the two 8259s.
 */
	.balign	16
	.globl	vector_stubs
vector_stubs:
	.set	vector, 0
	.rept	48
	.balign	16
	pushl	$vector
	.if	vector < 32
	jmp	exception_entry
	.else
	jmp	interrupt_entry
	.endif
	.set	vector, vector + 1
	.endr

exception_entry:
	movl	%esp, %eax
	call	panic

/*
 * interrupt(tsc in %edx:%eax, vector in %ecx).  The time stamp is taken as
 * early as registers can be saved.
 *
 * The way out does not use IRET, which an instruction-emulating KVM lacks in
 * protected mode.  At one privilege level a far return does the same, once
 * the flags are back.  IF stays clear until STI, whose shadow covers the
 * LRET: a storm of interrupts cannot pile up frames on the stack.
 */
interrupt_entry:
	pushal
	rdtsc
	movl	32(%esp), %ecx
	call	interrupt
	popal
	addl	$4, %esp
	pushl	8(%esp)
	andl	$~EFLAGS_IF, (%esp)
	popfl
	sti
	lret	$4

/* Accessed bits are set: the CPU never has to write to the table. */
	.section .rodata
	.balign	8
gdt:
	.quad	0
	.quad	0x00cf9b000000ffff	/* KERNEL_CS: flat, 32 bit, execute and read */
	.quad	0x00cf93000000ffff	/* KERNEL_DS: flat, read and write */
gdt_register:
	.word	. - gdt - 1
	.long	gdt

	.section .bss.noinit, "aw", @nobits
	.balign	16
	.skip	16384
stack_top:

	.section .note.GNU-stack, "", @progbits
