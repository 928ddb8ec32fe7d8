/*
 * Finding instructions that must not run natively in user mode, although they do not fault there.
 *
 * Their bytes occur inside other instructions, too: about one page in two hundred of programs has them so. Decoding from some way before, from several starting points, finds the
 * instructions' real boundaries, as x86 code falls into step after a few instructions; only bytes at such a boundary count. Code made to be read in two ways can hide from this: it then
 * learns what the host's processor is, and nothing else.
 * LSL matters because Linux keeps the processor's number in a segment limit, where a vDSO without RDPID reads it.
 * Threading: pure functions.
 */
#include "engine/bt/direct_code.h"

#include <stdbool.h>
#include <string.h>

#include <Zydis/Zydis.h>

#include "arch/cpu.h"
#include "arch/host.h"

#define PAGE 4096u
#define LEAD_MAX 128u  /* bytes before the suspect where decoding begins */
#define STARTS 8u
#define PREFIXES_MAX 2u
#define HITS_NEEDED 6u /* of STARTS */

#define REG(n) (1u << (n))
#define REG_ANY 0xffu

/* 0F opcode, by the reg field of its ModRM byte. The descriptor tables, and what Linux puts into a UMIP host's place of an answer, are the host's. */
static const struct suspect {
    uint8_t opcode, regs;
    bool memory_only; /* with a register it is another instruction */
    bool repeat;      /* needs prefix F3 */
    bool extended;    /* only on hosts whose XCR0 has more than a guest's: XGETBV says so, XSAVE writes more than the guest has room for */
} suspects[] = {
    {0x00, REG(0) | REG(1) | REG(4) | REG(5), false, false}, /* SLDT STR VERR VERW */
    {0x01, REG(0) | REG(1), true, false},                    /* SGDT SIDT */
    {0x01, REG(4), false, false},                            /* SMSW */
    {0x01, REG(2), false, false, true},                      /* XGETBV */
    {0x02, REG_ANY, false, false},                           /* LAR */
    {0x03, REG_ANY, false, false},                           /* LSL */
    {0x34, REG_ANY, false, false},                           /* SYSENTER: a system call, of which the kernel forgets the address */
    {0xa2, REG_ANY, false, false},                           /* CPUID */
    {0xae, REG(4) | REG(6), true, false, true},              /* XSAVE XSAVEOPT */
    {0xc7, REG(7), false, true},                             /* RDPID */
};

static bool host_has_more_state(void)
{
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return ((uint64_t)high << 32 | low) & ~(uint64_t)XCR0_SUPPORTED;
}

/* The bytes 0F xx of one of them at p, with at least one byte after these; *start is where its prefixes begin. */
static bool is_suspect(const uint8_t *page, const uint8_t *p, bool extended, const uint8_t **start)
{
    bool rex = p > page && (p[-1] & 0xf0) == 0x40, is_register = p[2] >= 0xc0;
    *start = rex ? p - 1 : p;
    bool repeat = *start > page && (*start)[-1] == 0xf3;
    for (unsigned n = 0; n < sizeof(suspects) / sizeof(suspects[0]); n++) {
        const struct suspect *s = &suspects[n];
        if (p[1] != s->opcode || !(s->regs >> (p[2] >> 3 & 7) & 1) || (s->memory_only && is_register) || (s->repeat && !(repeat && is_register)) || s->extended > extended)
            continue;
        *start -= s->repeat;
        return true;
    }
    return false;
}

/* Decoding the bytes from `first` to `start`: ways that meet go on together, and are gone once. */
struct ways {
    unsigned first, start;
    uint16_t end[LEAD_MAX]; /* the first boundary at `start` or behind it, for one at first + n; 0: not known */
};

static unsigned way_end(struct ways *ways, const ZydisDecoder *decoder, const uint8_t *page, unsigned from)
{
    ZydisDecodedInstruction zi;
    uint8_t path[LEAD_MAX];
    unsigned at = from, length = 0;
    while (at < ways->start && !ways->end[at - ways->first]) {
        path[length++] = (uint8_t)(at - ways->first);
        at += ZYAN_SUCCESS(ZydisDecoderDecodeInstruction(decoder, NULL, page + at, PAGE - at, &zi)) ? zi.length : 1u;
    }
    unsigned end = at < ways->start ? ways->end[at - ways->first] : at;
    while (length)
        ways->end[path[--length]] = (uint16_t)end;
    return end;
}

/* Where ways of reading the bytes before come to an instruction that begins between `start` and `opcode`: bit n, at start + n. */
static unsigned beginnings(const ZydisDecoder *decoder, const uint8_t *page, unsigned start, unsigned opcode)
{
    unsigned hits[PREFIXES_MAX + 1] = {0}, mask = 0;
    struct ways ways = {.first = start < LEAD_MAX ? 0 : start - LEAD_MAX, .start = start};
    for (unsigned n = 0; n < STARTS; n++) {
        unsigned at = way_end(&ways, decoder, page, ways.first + n);
        if (at <= opcode && ++hits[at - start] >= HITS_NEEDED)
            mask |= 1u << (at - start);
    }
    return mask;
}

/* Too close to the page's beginning to tell, what programs do use is taken for what it seems; the others' bytes are mostly parts of displacements. */
static bool is_usual(const uint8_t *p)
{
    return p[1] == 0xa2 || p[1] == 0xc7 || p[1] == 0x03;
}

unsigned direct_code_tells(const uint8_t page[4096], uint16_t *offset, unsigned max)
{
    ZydisDecoder decoder;
    unsigned count = 0;
    bool extended = host_has_more_state();
    const uint8_t *end = page + PAGE - 2, *start;
    ZydisDecoderInit(&decoder, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
    ZydisDecoderEnableMode(&decoder, ZYDIS_DECODER_MODE_MINIMAL, ZYAN_TRUE); /* lengths are enough */
    ZydisDecoderEnableMode(&decoder, ZYDIS_DECODER_MODE_AMD_BRANCHES, host_is_amd());
    for (const uint8_t *p = memchr(page, 0x0f, PAGE - 2); p && count <= max; p = p + 1 < end ? memchr(p + 1, 0x0f, (size_t)(end - (p + 1))) : NULL) {
        if (!is_suspect(page, p, extended, &start))
            continue;
        unsigned at = (unsigned)(start - page);
        unsigned mask = at >= STARTS ? beginnings(&decoder, page, at, (unsigned)(p - page)) : is_usual(p) ? (2u << (p - start)) - 1 : 0;
        for (; mask; mask &= mask - 1, count++)
            if (count < max)
                offset[count] = (uint16_t)(at + (unsigned)__builtin_ctz(mask));
    }
    return count;
}
