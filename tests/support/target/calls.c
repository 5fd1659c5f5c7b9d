/* SPDX-License-Identifier: GPL-2.0-or-later */
/* System calls that wait: with a time limit, for another thread, or for a child. */
#include "target.h"

#include <errno.h>
#include <linux/aio_abi.h>
#include <linux/futex.h>
#include <linux/io_uring.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

void check_ppoll(void)
{
        expect("ppoll", ppoll(NULL, 0, &ms, NULL), 0);
}

void check_poll(void)
{
        expect_or_eintr("poll", poll(NULL, 0, 1), 0);
}

void check_pselect(void)
{
        sigset_t mask;

        sigemptyset(&mask);
        expect("pselect", pselect(0, NULL, NULL, NULL, &ms, &mask), 0);
}

void check_nanosleep(void)
{
        expect_or_eintr("nanosleep", nanosleep(&ms, NULL), 0);
}

void check_clock_nanosleep(void)
{
        struct timespec until;
        int error;

        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_nsec += 1000000;
        if (until.tv_nsec >= 1000000000) {
                until.tv_nsec -= 1000000000;
                until.tv_sec++;
        }
        error = clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
        if (!(error == EINTR && eintr_allowed))
                expect("clock_nanosleep", error, 0);
}

void check_futex(void)
{
        static uint32_t word;
        struct timespec until;

        expect_errno("FUTEX_WAIT", syscall(SYS_futex, &word, FUTEX_WAIT, 0, &ms, NULL, 0), ETIMEDOUT);
        clock_gettime(CLOCK_MONOTONIC, &until);
        expect_errno("FUTEX_WAIT_BITSET",
                     syscall(SYS_futex, &word, FUTEX_WAIT_BITSET, 0, &until, NULL, FUTEX_BITSET_MATCH_ANY),
                     ETIMEDOUT);
}

void check_epoll_wait(void)
{
        static int epfd = -1;
        struct epoll_event event;
        sigset_t mask;

        if (epfd == -1)
                epfd = epoll_create1(EPOLL_CLOEXEC);
        sigemptyset(&mask);
        expect_or_eintr("epoll_wait", syscall(SYS_epoll_wait, epfd, &event, 1, 1), 0);
        expect_or_eintr("epoll_pwait", epoll_pwait(epfd, &event, 1, 1, &mask), 0);
        expect_or_eintr("epoll_pwait2", syscall(SYS_epoll_pwait2, epfd, &event, 1, &ms, &mask, 8), 0);
}

void check_sigtimedwait(void)
{
        sigset_t set;

        sigemptyset(&set);
        sigaddset(&set, SIGUSR2);
        expect_errno("sigtimedwait", sigtimedwait(&set, NULL, &ms), EAGAIN);
}

void check_semtimedop(void)
{
        static int id = -1;
        struct sembuf down = { 0, -1, 0 };

        if (id == -1) {
                id = semget(IPC_PRIVATE, 1, 0600);
                if (id == -1)
                        fail("semget", id);
        }
        expect_errno("semtimedop", semtimedop(id, &down, 1, &ms), EAGAIN);
        if (done)
                semctl(id, 0, IPC_RMID);
}

void check_socket(void)
{
        static int pair[2] = { -1, -1 }, listener;
        static char much[1 << 20];
        struct timeval timeout = { 0, 1000 };
        struct sockaddr_un name = { .sun_family = AF_UNIX };
        char byte;
        struct iovec vector = { &byte, 1 };
        struct mmsghdr messages[1] = { { .msg_hdr = { .msg_iov = &vector, .msg_iovlen = 1 } } };
        struct msghdr message = { 0 };

        if (pair[0] == -1) {
                socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
                listener = socket(AF_UNIX, SOCK_STREAM, 0);
                expect("bind", bind(listener, (struct sockaddr *)&name, sizeof(sa_family_t)), 0);
                expect("listen", listen(listener, 1), 0);
                setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
                setsockopt(listener, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
                setsockopt(pair[0], SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
                while (send(pair[0], much, sizeof(much), MSG_DONTWAIT) > 0)
                        ;
                while (send(pair[0], much, 1, MSG_DONTWAIT) > 0)
                        ;
        }
        expect_errno("recv", recv(pair[0], &byte, 1, 0), EAGAIN);
        expect_errno("recvmsg", recvmsg(pair[0], &message, 0), EAGAIN);
        expect_errno("recvmmsg", recvmmsg(pair[0], messages, 1, 0, NULL), EAGAIN);
        expect_errno("read", read(pair[0], &byte, 1), EAGAIN);
        expect_errno("readv", readv(pair[0], &vector, 1), EAGAIN);
        expect_errno("send", send(pair[0], much, 1, 0), EAGAIN);
        expect_errno("sendmsg", sendmsg(pair[0], &messages[0].msg_hdr, 0), EAGAIN);
        expect_errno("sendmmsg", sendmmsg(pair[0], messages, 1, 0), EAGAIN);
        expect_errno("write", write(pair[0], much, 1), EAGAIN);
        expect_errno("writev", writev(pair[0], &vector, 1), EAGAIN);
        expect_errno("accept", syscall(SYS_accept, listener, NULL, NULL), EAGAIN);
        expect_errno("accept4", accept4(listener, NULL, NULL, 0), EAGAIN);
}

void check_io_uring(void)
{
        static int fd = -1;
        struct __kernel_timespec timeout = { 0, 1000000 };
        struct io_uring_getevents_arg argument = { .ts = (uintptr_t)&timeout };
        struct io_uring_params parameters = { 0 };

        if (fd == -1) {
                fd = syscall(SYS_io_uring_setup, 4, &parameters);
                if (fd < 0)
                        fail("io_uring_setup", fd);
        }
        expect_errno("io_uring_enter",
                     syscall(SYS_io_uring_enter, fd, 0, 1, IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG, &argument,
                             sizeof(argument)),
                     ETIME);
}

void check_io_getevents(void)
{
        static aio_context_t context;
        struct io_event event;

        if (!context)
                expect("io_setup", syscall(SYS_io_setup, 4, &context), 0);
        expect_or_eintr("io_getevents", syscall(SYS_io_getevents, context, 1L, 1L, &event, &ms), 0);
        expect_or_eintr("io_pgetevents", syscall(SYS_io_pgetevents, context, 1L, 1L, &event, &ms, NULL), 0);
}

/* A byte goes round between two threads: the reads block for an unknown time. */
static int there[2], back[2];

static void *echo(void *unused)
{
        char byte;

        while (read(there[0], &byte, 1) == 1) {
                usleep(300);
                if (write(back[1], &byte, 1) != 1)
                        break;
        }
        return unused;
}

void check_read(void)
{
        static unsigned char next;
        static pthread_t thread;
        unsigned char got;

        if (!thread) {
                if (pipe(there) || pipe(back) || pthread_create(&thread, NULL, echo, NULL))
                        fail("pipe", -1);
        }
        next++;
        expect("write", write(there[1], &next, 1), 1);
        expect("read", read(back[0], &got, 1), 1);
        expect("byte", got, next);
}

/*
 * The main thread is in uninterruptible sleep until its child, which shares its memory, ends: no signal and no tracer
 * can reach it. A child says so: a second one would mean that the call was made twice.
 */
void check_vfork(void)
{
        char byte;
        pid_t child = vfork();

        if (child == 0) {
                while (read(0, &byte, 1) > 0)
                        ;
                _exit(write(1, "child\n", 6) != 6);
        }
        done = 1;
}
