/* SPDX-License-Identifier: GPL-2.0-or-later */
/* User code that makes no system call. */
#include "target.h"

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/rseq.h>
#include <unistd.h>

/*
 * User code without a system call: all registers, the red zone, what is below it, the flags and the vector registers,
 * looked at a few hundred microseconds after they were set. A tracer that was killed leaves its traces below the red
 * zone, where no program may keep anything: a signal handler's frame goes there.
 */
void check_registers(void)
{
        static const uint64_t vector[4] __attribute__((aligned(32))) = {
                0x0123456789abcdef, 0xfedcba9876543210, 0x5555aaaa5555aaaa, 0xdeadbeefcafef00d,
        };
        static uint64_t after[4] __attribute__((aligned(32)));
        uint32_t mxcsr = 0x1f80 | 0x6000, mxcsr_after = 0, normal = 0x1f80;
        long wrong;

        __asm__ volatile("ldmxcsr %0" : : "m"(mxcsr));
        __asm__ volatile(
                "movups %[vector], %%xmm0\n\t"
                "movups 16+%[vector], %%xmm15\n\t"
                "movq %%rbp, %%xmm7\n\t"
                "leaq -16512(%%rsp), %%rdi\n\t"
                "movq $2048, %%rcx\n\t"
                "movq $0x5aa5, %%rax\n\t"
                "rep stosq\n\t"
                "movq $0x1111, %%rax\n\t"
                "movq $0x2222, %%rbx\n\t"
                "movq $0x3333, %%rdx\n\t"
                "movq $0x4444, %%rsi\n\t"
                "movq $0x5555, %%rdi\n\t"
                "movq $0x6666, %%r8\n\t"
                "movq $0x7777, %%r9\n\t"
                "movq $0x8888, %%r10\n\t"
                "movq $0x9999, %%r11\n\t"
                "movq $0xaaaa, %%r12\n\t"
                "movq $0xbbbb, %%r13\n\t"
                "movq $0xcccc, %%r14\n\t"
                "movq $0xdddd, %%rbp\n\t"
                "movq $0xeeee, -8(%%rsp)\n\t"
                "movq $0xffff, -128(%%rsp)\n\t"
                "movq $200000, %%rcx\n\t"
                "stc\n\t"
                "1: leaq -1(%%rcx), %%rcx\n\t"
                "jrcxz 2f\n\t"
                "jc 1b\n\t"
                "2: movq $1, %%r15\n\t"
                "jnc 3f\n\t"
                "incq %%r15\n\t"
                "testq %%rcx, %%rcx\n\t jnz 3f\n\t incq %%r15\n\t"
                "cmpq $0x1111, %%rax\n\t jne 3f\n\t incq %%r15\n\t"
                "cmpq $0x2222, %%rbx\n\t jne 3f\n\t incq %%r15\n\t"
                "cmpq $0x3333, %%rdx\n\t jne 3f\n\t incq %%r15\n\t"
                "cmpq $0x4444, %%rsi\n\t jne 3f\n\t incq %%r15\n\t"
                "cmpq $0x5555, %%rdi\n\t jne 3f\n\t incq %%r15\n\t"
                "cmpq $0x6666, %%r8\n\t jne 3f\n\t incq %%r15\n\t"
                "cmpq $0x7777, %%r9\n\t jne 3f\n\t incq %%r15\n\t"
                "cmpq $0x8888, %%r10\n\t jne 3f\n\t incq %%r15\n\t"
                "cmpq $0x9999, %%r11\n\t jne 3f\n\t incq %%r15\n\t"
                "cmpq $0xaaaa, %%r12\n\t jne 3f\n\t incq %%r15\n\t"
                "cmpq $0xbbbb, %%r13\n\t jne 3f\n\t incq %%r15\n\t"
                "cmpq $0xcccc, %%r14\n\t jne 3f\n\t incq %%r15\n\t"
                "cmpq $0xdddd, %%rbp\n\t jne 3f\n\t incq %%r15\n\t"
                "cmpq $0xeeee, -8(%%rsp)\n\t jne 3f\n\t incq %%r15\n\t"
                "cmpq $0xffff, -128(%%rsp)\n\t jne 3f\n\t"
                "incq %%r15\n\t"
                "testl $1, %[careless]\n\t"
                "jnz 4f\n\t"
                "leaq -16512(%%rsp), %%rdi\n\t"
                "movq $2048, %%rcx\n\t"
                "movq $0x5aa5, %%rax\n\t"
                "repe scasq\n\t jne 3f\n\t"
                "4: xorq %%r15, %%r15\n\t"
                "3: movq %%xmm7, %%rbp\n\t"
                "movq %%r15, %%rax"
                : "=a"(wrong)
                : [vector] "m"(vector), [careless] "m"(eintr_allowed)
                : "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "xmm0",
                  "xmm7", "xmm15", "cc", "memory");
        __asm__ volatile("movups %%xmm0, %0\n\tmovups %%xmm15, %1\n\tstmxcsr %2"
                         : "=m"(after[0]), "=m"(after[2]), "=m"(mxcsr_after));
        __asm__ volatile("ldmxcsr %0" : : "m"(normal));
        expect("registers", wrong, 0);
        expect("mxcsr", mxcsr_after, mxcsr);
        expect("xmm", memcmp(vector, after, 8) || memcmp(vector + 2, after + 2, 8), 0);
}

/* User code with something in every byte of the vector registers, as wide as the CPU has them. */
static const char pattern[64] = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-_";

static __attribute__((target("avx512f"))) void keep_zmm(char *after)
{
        __asm__ volatile(
                "vmovdqu64 (%1), %%zmm3\n\t"
                "vmovdqu64 (%1), %%zmm20\n\t"
                "movq $300000, %%rcx\n\t"
                "1: decq %%rcx\n\t"
                "jnz 1b\n\t"
                "vpandq %%zmm3, %%zmm20, %%zmm20\n\t"
                "vmovdqu64 %%zmm20, (%0)"
                :
                : "r"(after), "r"(pattern)
                : "rcx", "xmm3", "xmm20", "cc", "memory");
}

static __attribute__((target("avx"))) void keep_ymm(char *after)
{
        __asm__ volatile(
                "vmovdqu (%1), %%ymm3\n\t"
                "vmovdqu 32(%1), %%ymm12\n\t"
                "movq $300000, %%rcx\n\t"
                "1: decq %%rcx\n\t"
                "jnz 1b\n\t"
                "vmovdqu %%ymm3, (%0)\n\t"
                "vmovdqu %%ymm12, 32(%0)"
                :
                : "r"(after), "r"(pattern)
                : "rcx", "xmm3", "xmm12", "cc", "memory");
}

void check_vectors(void)
{
        char after[sizeof(pattern)];

        if (__builtin_cpu_supports("avx512f")) {
                keep_zmm(after);
                expect("zmm", memcmp(after, pattern, sizeof(pattern)), 0);
        }
        if (__builtin_cpu_supports("avx")) {
                keep_ymm(after);
                expect("ymm", memcmp(after, pattern, sizeof(pattern)), 0);
        }
}

/*
 * A restartable sequence that never commits: it spins until the kernel, or whoever took its place, sends it to the
 * abort handler, which counts and starts it anew. If a sequence is forgotten, the counter stops for good.
 */
static _Atomic long aborts;

static void *report_aborts(void *unused)
{
        char byte;

        /* One line for every byte on standard input. */
        while (read(0, &byte, 1) == 1) {
                printf("%ld\n", aborts);
                fflush(stdout);
        }
        printf("%ld\n", aborts);
        fflush(stdout);
        _exit(0);
        return unused;
}

void check_rseq(void)
{
        struct rseq *area = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
        pthread_t thread;

        if (__rseq_size == 0)
                fail("no rseq", 0);
        if (pthread_create(&thread, NULL, report_aborts, NULL))
                fail("pthread_create", -1);
        __asm__ volatile(
                ".pushsection __rseq_cs, \"aw\"\n\t"
                ".balign 32\n\t"
                "1: .long 0, 0\n\t"
                ".quad 2f, 3f - 2f, 4f\n\t"
                ".popsection\n\t"
                "5: leaq 1b(%%rip), %%rax\n\t"
                "movq %%rax, %[rseq_cs]\n\t"
                "2: pause\n\t"
                "jmp 2b\n\t"
                "3: ud2\n\t"
                ".long 0x53053053\n\t"           /* RSEQ_SIG, as glibc registers it */
                "4: lock incq %[aborts]\n\t"
                "jmp 5b"
                : [rseq_cs] "+m"(area->rseq_cs), [aborts] "+m"(aborts)
                :
                : "rax", "cc", "memory");
}
