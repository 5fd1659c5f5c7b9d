/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Port and memory-mapped I/O, the time stamp counter, and idling. */
#ifndef GUEST_IO_H
#define GUEST_IO_H

#include "types.h"

static inline u8 inb(u16 port)
{
	u8 value;

	asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory");
	return value;
}

static inline u16 inw(u16 port)
{
	u16 value;

	asm volatile("inw %1, %0" : "=a"(value) : "Nd"(port) : "memory");
	return value;
}

static inline u32 inl(u16 port)
{
	u32 value;

	asm volatile("inl %1, %0" : "=a"(value) : "Nd"(port) : "memory");
	return value;
}

static inline void outb(u16 port, u8 value)
{
	asm volatile("outb %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline void outw(u16 port, u16 value)
{
	asm volatile("outw %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline void outl(u16 port, u32 value)
{
	asm volatile("outl %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

/* Ports of 1, 2 or 4 bytes. */
static inline u32 in(u16 port, u8 bytes)
{
	return bytes == 1 ? inb(port) : bytes == 2 ? inw(port) : inl(port);
}

static inline void out(u16 port, u8 bytes, u32 value)
{
	if (bytes == 1)
		outb(port, value);
	else if (bytes == 2)
		outw(port, value);
	else
		outl(port, value);
}

static inline u8 readb(u32 address)
{
	return *(volatile u8 *)address;
}

static inline u16 readw(u32 address)
{
	return *(volatile u16 *)address;
}

static inline u32 readl(u32 address)
{
	return *(volatile u32 *)address;
}

static inline void writeb(u32 address, u8 value)
{
	*(volatile u8 *)address = value;
}

static inline void writew(u32 address, u16 value)
{
	*(volatile u16 *)address = value;
}

static inline void writel(u32 address, u32 value)
{
	*(volatile u32 *)address = value;
}

static inline u64 rdtsc(void)
{
	u64 value;

	asm volatile("rdtsc" : "=A"(value) : : "memory");
	return value;
}

/*
 * Interrupts are enabled only here.  STI takes effect after the next
 * instruction, so that an interrupt that is pending already ends the HLT.
 */
static inline void cpu_idle(void)
{
	asm volatile("sti\n\thlt\n\tcli" : : : "memory");
}

static inline void __attribute__((noreturn)) cpu_stop(void)
{
	for (;;)
		asm volatile("cli\n\thlt");
}

#endif
