/* Two processes of the guest in tests/witness.py: each checks, round by round, that it finds again what it left.

       witness memory MIB CHANGED_MIB PERIOD_MS    in memory of its own
       witness disk DEVICE                         on a whole disk, past the page cache

   A round checks and rewrites the next blocks in turn. Each 8 bytes of a block tell where they are and how often the
   block was written, so that a block of another moment differs. The process prints "memory N" or "disk N" for each
   round, and "bad ..." when something differs, which ends it. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { MIB = 1 << 20, BLOCK = 64 << 10, WORDS = BLOCK / 8 };

/* One write for each line, because several processes share the console. */
static void say(const char *format, ...) {
    char line[256];
    va_list values;
    va_start(values, format);
    int length = vsnprintf(line, sizeof line, format, values);
    va_end(values);
    if (write(1, line, (size_t)length) != length) exit(1);
}

static void must(int succeeded, const char *step) {
    if (succeeded) return;
    say("bad %s: %s\n", step, strerror(errno));
    exit(1);
}

/* Words in groups of four, so that they compress a little. */
static uint64_t word(size_t block, size_t index, uint32_t generation) {
    return (block * WORDS + index / 4 + 1) * 0x9e3779b97f4a7c15u + generation;
}

static void fill(uint64_t *at, size_t block, uint32_t generation) {
    for (size_t index = 0; index < WORDS; index++) at[index] = word(block, index, generation);
}

static void check(const uint64_t *at, const char *what, size_t block, uint32_t generation) {
    for (size_t index = 0; index < WORDS; index++)
        if (at[index] != word(block, index, generation)) {
            say("bad %s: word %zu of block %zu, generation %u: %llx\n", what, index, block, generation,
                (unsigned long long)at[index]);
            exit(1);
        }
}

static uint64_t *reserve(size_t size) {
    uint64_t *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(memory != MAP_FAILED, "mmap");
    return memory;
}

static void memory(size_t blocks, size_t changed, long period_ms) {
    uint64_t *held = reserve(blocks * BLOCK);
    uint32_t *generations = calloc(blocks, sizeof *generations);
    for (size_t block = 0; block < blocks; block++) fill(held + block * WORDS, block, 0);
    struct timespec next;
    clock_gettime(CLOCK_MONOTONIC, &next);
    size_t block = 0;
    for (unsigned long round = 0;; round++) {
        for (size_t n = 0; n < changed; n++, block = (block + 1) % blocks) {
            uint64_t *at = held + block * WORDS;
            check(at, "memory", block, generations[block]);
            fill(at, block, ++generations[block]);
        }
        say("memory %lu\n", round);
        struct timespec now;
        next.tv_nsec += period_ms * 1000000;
        next.tv_sec += next.tv_nsec / 1000000000;
        next.tv_nsec %= 1000000000;
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (next.tv_sec < now.tv_sec) next = now;
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &next, NULL);
    }
}

static void disk(const char *device) {
    int file = open(device, O_RDWR | O_DIRECT);
    must(file >= 0, device);
    off_t size = lseek(file, 0, SEEK_END);
    must(size >= BLOCK, "size of the disk");
    size_t blocks = (size_t)size / BLOCK;
    uint32_t *generations = calloc(blocks, sizeof *generations);
    uint64_t *buffer = reserve(BLOCK);
    for (unsigned long round = 0;; round++) {
        size_t block = round % blocks;
        off_t at = (off_t)block * BLOCK;
        if (generations[block]) {
            must(pread(file, buffer, BLOCK, at) == BLOCK, "read");
            check(buffer, "disk", block, generations[block]);
        }
        fill(buffer, block, ++generations[block]);
        must(pwrite(file, buffer, BLOCK, at) == BLOCK, "write");
        if (round % 8 == 0) must(fsync(file) == 0, "fsync");
        say("disk %lu\n", round);
        usleep(10000);
    }
}

int main(int count, char **arguments) {
    if (count == 5 && !strcmp(arguments[1], "memory"))
        memory((size_t)atoi(arguments[2]) * MIB / BLOCK, (size_t)atoi(arguments[3]) * MIB / BLOCK, atol(arguments[4]));
    if (count == 3 && !strcmp(arguments[1], "disk")) disk(arguments[2]);
    say("bad arguments\n");
    return 2;
}
