// SPDX-License-Identifier: GPL-2.0-or-later
// The asking end of one mpqemu link, which costs every remote process the same: it asks, waits in a blocking
// system call as QEMU's vCPU thread does, and notes how long the answer took.
//
//     client EXCHANGE WARMUP COUNT CPU LINK IRQFD RESAMPLEFD IO_BASE
//
// writes COUNT nanoseconds to stdout, each a host-endian u32, after WARMUP exchanges that it doesn't note. CPU is
// where it runs, -1 for anywhere. The fds are inherited. A pci-serial is at IO_BASE.
#define _GNU_SOURCE
#include <err.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PCI_CFGREAD = 3, BAR_WRITE = 4, BAR_READ = 5 };
enum { UART_IER = 1, UART_IER_THRI = 2, UART_SCR = 7 };

struct header {
	int32_t command;
	uint32_t pad;
	uint64_t size;
};

struct config_request {
	struct header header;
	uint32_t addr, value;
	int32_t length;
} __attribute__((packed));

struct bar_request {
	struct header header;
	uint64_t addr, value;
	uint32_t size;
	uint8_t memory, pad[3];
} __attribute__((packed));

static int link_fd, irqfd, resamplefd;
static uint64_t io_base;

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000ull + time.tv_nsec;
}

static void ask(const void *request, size_t size)
{
	if (send(link_fd, request, size, MSG_NOSIGNAL) != (ssize_t)size)
		err(1, "sending a request");
}

static void await_reply(void)
{
	char reply[24];

	if (recv(link_fd, reply, sizeof(reply), MSG_WAITALL) != sizeof(reply))
		err(1, "receiving a reply");
}

static void await_irqfd(void)
{
	uint64_t count;

	if (read(irqfd, &count, sizeof(count)) != sizeof(count))
		err(1, "reading the irqfd");
}

static struct bar_request bar(int command, int reg, int value)
{
	return (struct bar_request){
		.header = { .command = command, .size = 24 },
		.addr = io_base + reg,
		.value = value,
		.size = 1,
	};
}

static uint64_t config_read(void)
{
	static const struct config_request request = {
		.header = { .command = PCI_CFGREAD, .size = 12 },
		.length = 4,
	};
	uint64_t begin = now();

	ask(&request, sizeof(request));
	await_reply();
	return now() - begin;
}

static uint64_t bar_access(int command)
{
	struct bar_request request = bar(command, UART_SCR, 0x5a);
	uint64_t begin = now();

	ask(&request, sizeof(request));
	await_reply();
	return now() - begin;
}

static uint64_t bar_read(void)
{
	return bar_access(BAR_READ);
}

static uint64_t bar_write(void)
{
	return bar_access(BAR_WRITE);
}

static uint64_t level(bool high)
{
	struct bar_request request = bar(BAR_WRITE, UART_IER, high ? UART_IER_THRI : 0);
	uint64_t begin = now(), time = 0;

	ask(&request, sizeof(request));
	if (high) {
		await_irqfd();
		time = now() - begin;
	}
	await_reply();
	return time;
}

static uint64_t raise_line(void)
{
	uint64_t time = level(true);

	level(false);
	return time;
}

static uint64_t resample_echo(void)
{
	uint64_t one = 1, begin = now();

	if (write(resamplefd, &one, sizeof(one)) != sizeof(one))
		err(1, "writing the resamplefd");
	await_irqfd();
	return now() - begin;
}

static const struct {
	const char *name;
	uint64_t (*run)(void);
} exchanges[] = {
	{ "config-read", config_read },
	{ "bar-read", bar_read },
	{ "bar-write", bar_write },
	{ "raise", raise_line },
	{ "resample-echo", resample_echo },
};

static void pin(int cpu)
{
	cpu_set_t set;

	if (cpu < 0)
		return;
	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		err(1, "CPU %d", cpu);
}

static void measure(uint64_t (*run)(void), long warmup, long count)
{
	uint32_t *times = malloc(count * sizeof(*times));
	const char *rest = (const char *)times;
	size_t left = count * sizeof(*times);

	if (!times)
		err(1, "%ld exchanges", count);
	for (long i = 0; i < warmup; i++)
		run();
	for (long i = 0; i < count; i++) {
		uint64_t time = run();

		times[i] = time < UINT32_MAX ? time : UINT32_MAX;
	}
	while (left) {
		ssize_t written = write(STDOUT_FILENO, rest, left);

		if (written < 0)
			err(1, "stdout");
		rest += written;
		left -= written;
	}
}

int main(int argc, char **argv)
{
	if (argc != 9)
		errx(2, "EXCHANGE WARMUP COUNT CPU LINK IRQFD RESAMPLEFD IO_BASE");
	pin(atoi(argv[4]));
	link_fd = atoi(argv[5]);
	irqfd = atoi(argv[6]);
	resamplefd = atoi(argv[7]);
	io_base = strtoull(argv[8], NULL, 0);
	for (size_t i = 0; i < sizeof(exchanges) / sizeof(*exchanges); i++) {
		if (strcmp(argv[1], exchanges[i].name))
			continue;
		if (exchanges[i].run == resample_echo)
			level(true);
		measure(exchanges[i].run, atol(argv[2]), atol(argv[3]));
		if (exchanges[i].run == resample_echo)
			level(false);
		return 0;
	}
	errx(2, "no exchange %s", argv[1]);
}
