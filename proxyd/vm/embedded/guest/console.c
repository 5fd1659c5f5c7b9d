/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * COM1, a 16550: input by IRQ 4 into a ring, output by polling; and the
 * format of the answers.
 */
#include "console.h"
#include "io.h"

#define COM1		0x3f8
#define UART_DATA	(COM1 + 0)
#define UART_DLL	(COM1 + 0)
#define UART_IER	(COM1 + 1)
#define UART_DLM	(COM1 + 1)
#define UART_IIR	(COM1 + 2)
#define UART_FCR	(COM1 + 2)
#define UART_LCR	(COM1 + 3)
#define UART_MCR	(COM1 + 4)
#define UART_LSR	(COM1 + 5)

#define IER_RX		0x01
#define IIR_FIFOS	0xc0
#define FCR_ENABLE	0x01
#define FCR_CLEAR	0x06
#define LCR_8N1		0x03
#define LCR_DLAB	0x80
#define MCR_DTR_RTS	0x03
#define MCR_OUT2	0x08	/* gates the interrupt line on a PC */
#define LSR_DATA_READY	0x01
#define LSR_THR_EMPTY	0x20
#define LSR_TX_IDLE	0x40

#define TX_FIFO_DEPTH	16
#define RING_SIZE	256	/* a power of two, above CONSOLE_LINE_MAX */

static char ring[RING_SIZE];
static u32 ring_head, ring_tail;
static u32 tx_depth, tx_room;

void console_init(void)
{
	outb(UART_IER, 0);
	outb(UART_LCR, LCR_DLAB | LCR_8N1);
	outb(UART_DLL, 1);	/* 115200 baud */
	outb(UART_DLM, 0);
	outb(UART_LCR, LCR_8N1);
	outb(UART_FCR, FCR_ENABLE | FCR_CLEAR);
	outb(UART_MCR, MCR_DTR_RTS | MCR_OUT2);
	tx_depth = (inb(UART_IIR) & IIR_FIFOS) == IIR_FIFOS ? TX_FIFO_DEPTH : 1;
	outb(UART_IER, IER_RX);
}

/*
 * IRQ 4 is edge-triggered, so the receiver must be emptied to get the next
 * edge.  A full ring drops characters but keeps line ends.  That happens to a
 * line that is too long anyway, and to one that did not wait for the answer.
 */
void console_interrupt(void)
{
	while (inb(UART_LSR) & LSR_DATA_READY) {
		char c = inb(UART_DATA);

		if (ring_head - ring_tail < RING_SIZE)
			ring[ring_head++ % RING_SIZE] = c;
		else if (c == '\n')
			ring[(ring_head - 1) % RING_SIZE] = c;
	}
}

/* Sleeps until there is a whole line, and returns it without its end. */
enum console_input console_read_line(char line[CONSOLE_LINE_MAX])
{
	enum console_input result = CONSOLE_LINE;
	u32 length = 0;
	char c;

	for (;;) {
		while (ring_head == ring_tail)
			cpu_idle();
		c = ring[ring_tail++ % RING_SIZE];
		if (c == '\n')
			break;
		if (c == '\r')
			continue;
		if (c < ' ' || c > '~')
			result = CONSOLE_NOT_TEXT;
		else if (length < CONSOLE_LINE_MAX - 1)
			line[length++] = c;
		else
			result = CONSOLE_TOO_LONG;
	}
	line[length] = '\0';
	return result;
}

/* Waits until the last character has left the transmitter. */
void console_drain(void)
{
	while (!(inb(UART_LSR) & LSR_TX_IDLE))
		;
}

void put_char(char c)
{
	if (!tx_room) {
		while (!(inb(UART_LSR) & LSR_THR_EMPTY))
			;
		tx_room = tx_depth;
	}
	outb(UART_DATA, c);
	tx_room--;
}

void put_string(const char *s)
{
	while (*s)
		put_char(*s++);
}

void put_decimal(u32 value)
{
	char digits[10];
	u32 n = 0;

	do {
		digits[n++] = '0' + value % 10;
		value /= 10;
	} while (value);
	while (n)
		put_char(digits[--n]);
}

void put_hex(u32 value, unsigned int min_digits)
{
	unsigned int digits = 8;

	while (digits > min_digits && !(value >> (4 * digits - 4)))
		digits--;
	while (digits--)
		put_char("0123456789abcdef"[value >> (4 * digits) & 15]);
}

/* Starts a line "* KIND"; fields follow, end_line() ends it. */
void record(const char *kind)
{
	put_string("* ");
	put_string(kind);
}

static void field_key(const char *key)
{
	put_char(' ');
	put_string(key);
	put_char('=');
}

void field_string(const char *key, const char *value)
{
	field_key(key);
	put_string(value);
}

void field_decimal(const char *key, u32 value)
{
	field_key(key);
	put_decimal(value);
}

void field_hex(const char *key, u32 value)
{
	field_key(key);
	put_string("0x");
	put_hex(value, 1);
}

void field_devfn(const char *key, u8 devfn)
{
	field_key(key);
	put_hex(devfn >> 3, 2);
	put_char('.');
	put_hex(devfn & 7, 1);
}

void field_id(const char *key, u16 vendor, u16 device)
{
	field_key(key);
	put_hex(vendor, 4);
	put_char(':');
	put_hex(device, 4);
}

void end_line(void)
{
	put_char('\n');
}
