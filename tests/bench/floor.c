// SPDX-License-Identifier: GPL-2.0-or-later
// The floor: the least that a remote process can do. It answers the messages of a pci-serial with bare system
// calls, checks nothing, and knows no register but IER and SCR, and of config space one I/O BAR and the pin: enough
// for QEMU to place it, and for a guest to count its interrupts.
//
//     floor LINK POLL_US
//
// LINK is an inherited socket. After each event it looks for the next one for POLL_US microseconds before it
// sleeps.
#include <err.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { SYNC_SYSMEM, RET, PCI_CFGWRITE, PCI_CFGREAD, BAR_WRITE, BAR_READ, SET_IRQFD, DEVICE_RESET };
enum { UART_IER = 1, UART_IER_THRI = 2 };
enum { COMMAND = 0x04, BAR_0 = 0x10, INTERRUPT_PIN = 0x3d, BAR_SIZE = 8 };

struct frame {
	int32_t command;
	uint32_t pad;
	uint64_t size;
	union {
		struct {
			uint32_t addr, value;
			int32_t length;
		} config;
		struct {
			uint64_t addr, value;
		} bar;
		char bytes[192];
	};
};

static int link_fd, epoll_fd, irqfd = -1, resamplefd = -1;
static uint8_t config[256 + 8] = { 0x36, 0x1b, 0x02, [BAR_0] = 1, [INTERRUPT_PIN] = 1 }, uart[8];
static bool is_high;

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000ull + time.tv_nsec;
}

static void watch(int fd)
{
	struct epoll_event event = { .events = EPOLLIN, .data.fd = fd };

	if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event))
		err(1, "epoll");
}

static void assert_line(void)
{
	uint64_t one = 1;

	if (irqfd >= 0 && write(irqfd, &one, sizeof(one)) != sizeof(one))
		err(1, "writing the irqfd");
}

static void reply(uint64_t value)
{
	struct {
		int32_t command;
		uint32_t pad;
		uint64_t size, value;
	} ret = { RET, 0, sizeof(value), value };

	if (send(link_fd, &ret, sizeof(ret), MSG_NOSIGNAL) != sizeof(ret))
		err(1, "sending a reply");
}

static void write_register(unsigned reg, uint8_t value)
{
	bool high;

	uart[reg] = value;
	high = uart[UART_IER] & UART_IER_THRI;
	if (high && !is_high)
		assert_line();
	is_high = high;
}

static void write_config(unsigned addr, uint32_t value)
{
	if (addr == BAR_0)
		value = (value & -BAR_SIZE) | 1;
	else if (addr != COMMAND)
		return;
	memcpy(&config[addr], &value, 4);
}

static uint64_t handle(struct frame *frame)
{
	uint64_t value = 0;

	switch (frame->command) {
	case PCI_CFGREAD:
		memcpy(&value, &config[frame->config.addr & 0xff], frame->config.length & 7);
		return value;
	case PCI_CFGWRITE:
		write_config(frame->config.addr, frame->config.value);
		return 0;
	case BAR_READ:
		return uart[frame->bar.addr & 7];
	case BAR_WRITE:
		write_register(frame->bar.addr & 7, frame->bar.value);
		return 0;
	default:
		return 0;
	}
}

static bool serve_link(int flags)
{
	struct frame frame;
	union {
		struct cmsghdr header;
		char room[CMSG_SPACE(8 * sizeof(int))];
	} control;
	struct iovec part = { &frame, sizeof(frame) };
	struct msghdr message = {
		.msg_iov = &part,
		.msg_iovlen = 1,
		.msg_control = &control,
		.msg_controllen = sizeof(control),
	};
	ssize_t count = recvmsg(link_fd, &message, flags);

	if (count < 0)
		return false;
	if (!count)
		exit(0);
	if (frame.command == SET_IRQFD && message.msg_controllen) {
		memcpy(&irqfd, CMSG_DATA(&control.header), sizeof(int));
		memcpy(&resamplefd, CMSG_DATA(&control.header) + sizeof(int), sizeof(int));
		watch(resamplefd);
	} else if (frame.command != SYNC_SYSMEM) {
		reply(handle(&frame));
	}
	return true;
}

static void serve_resample(void)
{
	uint64_t count;

	if (read(resamplefd, &count, sizeof(count)) == sizeof(count) && is_high)
		assert_line();
}

static bool serve(int timeout)
{
	struct epoll_event events[2];
	int count = epoll_wait(epoll_fd, events, 2, timeout);

	for (int i = 0; i < count; i++) {
		if (events[i].data.fd == link_fd)
			serve_link(0);
		else
			serve_resample();
	}
	return count > 0;
}

int main(int argc, char **argv)
{
	uint64_t window, end = 0;

	if (argc != 3)
		errx(2, "LINK POLL_US");
	link_fd = atoi(argv[1]);
	window = strtoull(argv[2], NULL, 0) * 1000;
	epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	watch(link_fd);
	for (;;) {
		if (window && now() < end) {
			if (!serve(0))
				continue;
		} else {
			serve(-1);
		}
		if (window)
			end = now() + window;
	}
}
