/*
 * churn SECONDS MEBIBYTES PROCESSES: inside a guest. Each process takes and releases memory in pieces, checks that every page still holds what was written to it and that pages
 * that come are zero, and runs code that it has written into them. Ends with "churn: ok" and the number of checks, or says what was wrong.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096u
#define PIECE_PAGES 512u
#define PIECES_MAX 1024u

static uint64_t state;

static uint64_t pick(uint64_t limit)
{
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (state >> 33) % limit;
}

static void wrong(const char *what, unsigned piece, unsigned page)
{
    printf("churn: WRONG %s, piece %u page %u\n", what, piece, page);
    fflush(stdout);
    _exit(1);
}

/* Every fourth page is code that returns its number, the others are filled with it. */
static void fill(uint8_t *at, uint32_t number)
{
    if (number % 4 == 0) {
        const uint8_t code[] = {0xb8, number & 255, number >> 8 & 255, number >> 16 & 255, number >> 24, 0xc3};
        memcpy(at + number % 4000, code, sizeof code);
    } else {
        for (unsigned n = 0; n < PAGE / 8; n++)
            ((uint64_t *)at)[n] = number * 0x9e3779b97f4a7c15ull + n;
    }
}

static int holds(uint8_t *at, uint32_t number)
{
    if (number % 4 == 0) {
        uint32_t (*code)(void) = (uint32_t (*)(void))(void *)(at + number % 4000);
        return code() == number;
    }
    for (unsigned n = 0; n < PAGE / 8; n++)
        if (((uint64_t *)at)[n] != number * 0x9e3779b97f4a7c15ull + n)
            return 0;
    return 1;
}

static int is_zero(const uint8_t *at)
{
    return at[0] == 0 && memcmp(at, at + 1, PAGE - 1) == 0;
}

static void churn(unsigned seconds, unsigned pieces, unsigned process)
{
    static uint8_t *piece[PIECES_MAX];
    static uint32_t number[PIECES_MAX];
    time_t end = time(NULL) + seconds;
    uint64_t checks = 0;
    state = process + 1;
    for (uint32_t turn = 0, next = process << 24; turn < pieces || time(NULL) < end; turn++, next += PIECE_PAGES) {
        unsigned n = turn < pieces ? turn : (unsigned)pick(pieces); /* all of it once, whatever the time */
        if (piece[n]) {
            for (unsigned page = 0; page < PIECE_PAGES; page++, checks++)
                if (!holds(piece[n] + page * PAGE, number[n] + page))
                    wrong("contents", n, page);
            munmap(piece[n], PIECE_PAGES * PAGE);
            piece[n] = NULL;
            continue;
        }
        piece[n] = mmap(NULL, PIECE_PAGES * PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (piece[n] == MAP_FAILED)
            wrong("mmap", n, 0);
        number[n] = next;
        for (unsigned page = 0; page < PIECE_PAGES; page++, checks++) {
            if (!is_zero(piece[n] + page * PAGE))
                wrong("not zero", n, page);
            fill(piece[n] + page * PAGE, next + page);
        }
    }
    printf("churn: process %u: %llu pages\n", process, (unsigned long long)checks);
    fflush(stdout);
}

int main(int argc, char **argv)
{
    unsigned seconds = argc > 1 ? (unsigned)atoi(argv[1]) : 5, mebibytes = argc > 2 ? (unsigned)atoi(argv[2]) : 64;
    unsigned processes = argc > 3 ? (unsigned)atoi(argv[3]) : 1, pieces = mebibytes / 2 / processes;
    int status, failed = 0;
    pieces = pieces < 1 ? 1 : pieces > PIECES_MAX ? PIECES_MAX : pieces;
    for (unsigned n = 0; n < processes; n++) {
        if (fork() == 0) {
            churn(seconds, pieces, n);
            _exit(0);
        }
    }
    while (wait(&status) > 0)
        failed |= status;
    printf(failed ? "churn: FAILED\n" : "churn: ok\n");
    return failed != 0;
}
