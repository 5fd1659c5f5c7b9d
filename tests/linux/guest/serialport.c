// SPDX-License-Identifier: GPL-2.0-or-later
/* What busybox can't do with a serial port, in the Linux guest: ioctl_tty(2), and setserial's TIOCSSERIAL.
 *
 * serialport DEVICE irq N: the driver uses this IRQ; with 0 it polls.
 * serialport DEVICE modem [+LINE|-LINE]...: changes modem outputs, then prints the lines that are on, one a line. (The
 * driver sets DTR and RTS each time the port is opened.)
 * serialport DEVICE break: sends a break of a quarter of a second.
 */
#include <err.h>
#include <fcntl.h>
#include <linux/serial.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <termios.h>

#ifndef TIOCM_LOOP
#define TIOCM_LOOP 0x8000 // asm/termios.h, which can't be included beside termios.h
#endif

static const struct {
	const char *name;
	int bit;
} lines[] = {
	{"dtr", TIOCM_DTR}, {"rts", TIOCM_RTS}, {"loop", TIOCM_LOOP}, {"cts", TIOCM_CTS},
	{"dsr", TIOCM_DSR}, {"dcd", TIOCM_CD},  {"ri", TIOCM_RI},
};

static int line_bit(const char *name)
{
	for (unsigned i = 0; i < sizeof lines / sizeof *lines; i++)
		if (!strcmp(lines[i].name, name))
			return lines[i].bit;
	errx(2, "no modem line: %s", name);
}

static void change_line(int port, const char *change)
{
	int bit = line_bit(change + 1);

	if (ioctl(port, *change == '+' ? TIOCMBIS : TIOCMBIC, &bit))
		err(1, "%s", change);
}

static void use_irq(int port, int irq)
{
	struct serial_struct settings;

	if (ioctl(port, TIOCGSERIAL, &settings))
		err(1, "TIOCGSERIAL");
	settings.irq = irq;
	if (ioctl(port, TIOCSSERIAL, &settings))
		err(1, "TIOCSSERIAL");
}

static void print_modem(int port)
{
	int bits;

	if (ioctl(port, TIOCMGET, &bits))
		err(1, "TIOCMGET");
	for (unsigned i = 0; i < sizeof lines / sizeof *lines; i++)
		if (bits & lines[i].bit)
			puts(lines[i].name);
}

int main(int argc, char **argv)
{
	if (argc < 3)
		errx(2, "which port, and what to do?");
	int port = open(argv[1], O_RDWR | O_NOCTTY | O_NONBLOCK);
	if (port < 0)
		err(1, "%s", argv[1]);
	const char *what = argv[2];
	if (!strcmp(what, "irq") && argc == 4)
		use_irq(port, atoi(argv[3]));
	else if (!strcmp(what, "modem")) {
		for (int i = 3; i < argc; i++)
			change_line(port, argv[i]);
		print_modem(port);
	} else if (!strcmp(what, "break")) {
		if (tcsendbreak(port, 0))
			err(1, "break");
	} else
		errx(2, "unknown: %s", what);
	return 0;
}
