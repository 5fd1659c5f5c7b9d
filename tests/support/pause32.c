/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A 32-bit program without a C library that waits for ever. */
void _start(void)
{
        for (;;)
                __asm__ volatile("int $0x80" : : "a"(29) : "memory"); /* pause */
}
