/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A process that notices when somebody meddles with its main thread.
 *
 *      target CHECK [eintr|stay]
 *
 * runs one check over and over in the main thread until standard input ends, then prints the number of rounds and
 * exits with 0. A wrong result prints a line and exits with 1. With "eintr" it puts up with what a tracer does that is
 * killed in the midst of its work: a call that waits for a time may fail with EINTR, or be restarted after a handler.
 * With "stay" the check of a coroutine stays in it.
 */
#include "target.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *check;
int eintr_allowed, stays;
_Atomic int done;
const struct timespec ms = { 0, 1000000 };

_Noreturn void fail(const char *what, long got)
{
        printf("%s: %s: %ld, errno %d\n", check, what, got, errno);
        fflush(stdout);
        _exit(1);
}

void expect(const char *what, long got, long want)
{
        if (got != want)
                fail(what, got);
}

void expect_errno(const char *what, long got, int want)
{
        if (got == -1 && errno == EINTR && eintr_allowed)
                return;
        if (got != -1 || errno != want)
                fail(what, got);
}

void expect_or_eintr(const char *what, long got, long want)
{
        if (got == -1 && errno == EINTR && eintr_allowed)
                return;
        expect(what, got, want);
}

static const struct {
        const char *name;
        void (*round)(void);
} checks[] = {
        { "ppoll", check_ppoll },
        { "poll", check_poll },
        { "pselect", check_pselect },
        { "nanosleep", check_nanosleep },
        { "clock_nanosleep", check_clock_nanosleep },
        { "futex", check_futex },
        { "epoll_wait", check_epoll_wait },
        { "sigtimedwait", check_sigtimedwait },
        { "semtimedop", check_semtimedop },
        { "socket", check_socket },
        { "io_uring", check_io_uring },
        { "io_getevents", check_io_getevents },
        { "read", check_read },
        { "registers", check_registers },
        { "vectors", check_vectors },
        { "coroutine", check_coroutine },
        { "deep", check_deep },
        { "rseq", check_rseq },
        { "signals", check_signals },
        { "kvm_run", check_kvm_run },
        { "vfork", check_vfork },
};

static void *until_end_of_input(void *unused)
{
        char byte;

        while (read(0, &byte, 1) > 0)
                ;
        done = 1;
        return unused;
}

int main(int argc, char **argv)
{
        void (*round)(void) = NULL;
        long rounds = 0;
        pthread_t thread;
        sigset_t queued;

        check = argc > 1 ? argv[1] : "";
        eintr_allowed = argc > 2 && strcmp(argv[2], "eintr") == 0;
        stays = argc > 2 && strcmp(argv[2], "stay") == 0;
        for (size_t i = 0; i < sizeof(checks) / sizeof(checks[0]); i++)
                if (strcmp(checks[i].name, check) == 0)
                        round = checks[i].round;
        if (!round)
                fail("no such check", 0);
        /* Blocked in every thread, let in only where check_signals() waits. */
        sigemptyset(&queued);
        sigaddset(&queued, SIGRTMIN);
        pthread_sigmask(SIG_BLOCK, &queued, NULL);
        printf("ready\n");
        fflush(stdout);
        if (round != check_rseq && round != check_vfork && pthread_create(&thread, NULL, until_end_of_input, NULL))
                fail("pthread_create", -1);
        do {
                round();
                rounds++;
        } while (!done);
        printf("%ld rounds\n", rounds);
        return 0;
}
