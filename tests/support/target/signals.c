/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Signals that another thread sends. */
#include "target.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

/* Queued signals arrive all of them, in order, each with its value, and interrupt what they interrupt. */
static _Atomic int received;

static void on_queued(int number, siginfo_t *info, void *context)
{
        (void)number;
        (void)context;
        if (info->si_code != SI_QUEUE || info->si_value.sival_int != received + 1)
                fail("queued signal", info->si_value.sival_int);
        received++;
}

static void *queue_signals(void *unused)
{
        union sigval value = { .sival_int = 0 };

        while (!done) {
                value.sival_int++;
                while (sigqueue(getpid(), SIGRTMIN, value))
                        ;
                while (received != value.sival_int && !done)
                        usleep(50);
        }
        return unused;
}

void check_signals(void)
{
        static pthread_t thread;
        static sigset_t inside;
        sigset_t now;
        int before, result;

        if (!thread) {
                struct sigaction action = { .sa_sigaction = on_queued, .sa_flags = SA_SIGINFO };

                sigaction(SIGRTMIN, &action, NULL);
                sigemptyset(&inside);
                if (pthread_create(&thread, NULL, queue_signals, NULL))
                        fail("pthread_create", -1);
        }
        before = received;
        result = ppoll(NULL, 0, &ms, &inside);
        if (result == 0 && received != before && !eintr_allowed)
                fail("ppoll missed a signal", received);
        if (result == -1 && (errno != EINTR || received == before))
                fail("ppoll", result);
        pthread_sigmask(SIG_SETMASK, NULL, &now);
        expect("SIGRTMIN blocked", sigismember(&now, SIGRTMIN), 1);
        expect("SIGUSR1 blocked", sigismember(&now, SIGUSR1), 0);
}
