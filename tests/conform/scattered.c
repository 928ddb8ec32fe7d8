/*
 * Ring 3 with tens of thousands of pages, none of which continues its neighbour: more pieces than a host's process may have mappings. What it reads is always what the page tables say, also
 * after every seventh of them has changed, with INVLPG or all at once.
 *
 * "pieces=N", "rounds=N" and "repeats=N" (in ring 3) on the command line: for hosts of all kinds (tests/integration/direct_hosts.py), which want something that lasts.
 */
#include "runtime/probe.h"

#define AREA 0x200000000000ull
#define PIECES 70000u
#define ROUNDS 3u
#define FRAMES 64u
#define EXTRA 40u /* INVLPGs that are more than a monitor may want to remember */

static uint32_t *frames;
static unsigned pieces, repeats;
static volatile uint64_t user_sum;
static uint8_t frame_of[PIECES]; /* what the tables say */

static unsigned number(const char *word, unsigned otherwise)
{
    const char *p = command_line(word);
    unsigned value = 0;
    for (; p && *p >= '0' && *p <= '9'; p++)
        value = value * 10 + (unsigned)(*p - '0');
    return value ? value : otherwise;
}

static uint64_t piece_va(unsigned n)
{
    return AREA + (uint64_t)n * 2 * PAGE;
}

static uint32_t *frame(unsigned k)
{
    return frames + k * (PAGE / 4);
}

static uint64_t mix(uint64_t sum, uint32_t word)
{
    return sum * 0x100000001b3ull ^ word;
}

/* Reads the first word of every piece, and counts in the second of every 16th. */
static void walk(reg_t count)
{
    uint64_t sum = 0;
    for (unsigned r = 0; r < repeats; r++) {
        sum = 0;
        for (unsigned n = 0; n < count; n++) {
            volatile uint32_t *at = (volatile uint32_t *)piece_va(n);
            sum = mix(sum, at[0]);
            if (n % 16 == 0)
                at[1]++;
        }
    }
    user_sum = sum;
}

static void piece_map(unsigned n, unsigned k)
{
    frame_of[n] = (uint8_t)k;
    *page_entry(boot_pml4, piece_va(n)) = (uintptr_t)frame(k) | PG_P | PG_W | PG_U | PG_A | PG_D;
}

static void check_walk(const char *when, unsigned round)
{
    uint32_t counts[FRAMES];
    uint64_t sum = 0;
    bool counted = true;
    for (unsigned k = 0; k < FRAMES; k++)
        counts[k] = frame(k)[1];
    int vector = TRY(user_call(walk, pieces));
    for (unsigned n = 0; n < pieces; n++) {
        sum = mix(sum, frame(frame_of[n])[0]);
        counts[frame_of[n]] += n % 16 == 0 ? repeats : 0;
    }
    for (unsigned k = 0; k < FRAMES; k++)
        counted &= frame(k)[1] == counts[k];
    if (round < ROUNDS || vector != USER_DONE || user_sum != sum || !counted)
        check(vector == USER_DONE && user_sum == sum && counted, "%u pieces in round %u, %s (vector %d, sum %lx, wanted %lx)", pieces, round, when, vector, (reg_t)user_sum, sum);
}

void test_main(void)
{
    pieces = number("pieces=", PIECES);
    repeats = number("repeats=", 1);
    unsigned rounds = number("rounds=", ROUNDS);
    if (pieces > PIECES)
        pieces = PIECES;
    frames = pages_allocate(FRAMES);
    for (unsigned k = 0; k < FRAMES; k++)
        frame(k)[0] = k * 2654435761u + 1;
    for (unsigned n = 0; n < pieces; n++)
        piece_map(n, (n * 37 + n / FRAMES) % FRAMES);
    write_cr3(read_cr3());
    for (unsigned round = 0; round < rounds; round++) {
        check_walk("as they were", round);
        for (unsigned n = round % 7; n < pieces; n += 7)
            piece_map(n, (frame_of[n] + 11) % FRAMES);
        write_cr3(read_cr3());
        check_walk("some others", round);
        for (unsigned n = 0; n < EXTRA && n * 100 < pieces; n++) {
            piece_map(n * 100, (frame_of[n * 100] + 5) % FRAMES);
            invlpg((void *)piece_va(n * 100));
        }
        check_walk("a few others", round);
    }
}
