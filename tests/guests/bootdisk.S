/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The first sector of a disk that the firmware boots from: prints "B", reads the 64 sectors behind itself by INT 13h,
 * function 42h, and sends them to COM1; or sends "E" and the function's error code.
 */
#define PORT 0x3f8
#define BUFFER 0x8000
#define SECTORS 64

	.code16
	.globl _start
_start:
	xorw %ax, %ax
	movw %ax, %ds
	movw %ax, %ss
	movw $0x7000, %sp
	cld
	pushw %dx		/* DL: the drive, from the firmware */
	movb $'B', %al
	call send
	popw %dx
	movb $0x42, %ah
	movw $packet - _start + 0x7c00, %si
	int $0x13
	jc failed
	movw $BUFFER, %si
	movw $SECTORS * 512, %cx
next:
	lodsb
	call send
	loop next
	jmp halt
failed:
	movb $'E', %al
	call send
	movb %ah, %al
	call send
halt:
	hlt
	jmp halt

send:
	movb %al, %bl
	movw $PORT + 5, %dx
wait:
	inb %dx, %al
	testb $0x20, %al
	jz wait
	movw $PORT, %dx
	movb %bl, %al
	outb %al, %dx
	ret

	.balign 4
packet:
	.byte 16, 0
	.word SECTORS
	.word BUFFER, 0
	.quad 1

	.org 510
	.word 0xaa55
