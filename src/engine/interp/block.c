/*
 * The block cache: decoded basic blocks, found by the host address of their first byte.
 *
 * A block is used only while memory still holds the bytes it was decoded from; they are compared at every entry, so nothing else has to notice writes
 * to code, whoever makes them. Blocks are allocated one after another from an arena that is emptied as a whole when full, together with the native
 * stubs that they point to; pointers to blocks are thus valid until the next look-up. A block lies in one page, except the one-instruction
 * block of an instruction that crosses into the next page, whose second part is translated and compared every time.
 * Instructions in MMIO, and those that reach over the CS limit, are decoded into a single scratch block each time.
 * Threading: the vCPU's own thread.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "engine/interp/interp_core.h"

#define BUCKET_SHARE 512u /* bytes of the arena for each bucket, at least */
#define BLOCK_ALIGN 16u
#define BLOCK_SIZE_MAX (sizeof(struct block) + BLOCK_INSNS_MAX * sizeof(struct insn) + BLOCK_BYTES_MAX + BLOCK_ALIGN)
#define INSN_BYTES_MAX 15u
#define CS_LIMIT_NONE 0xffffffffu /* a segment of 4 GiB: execution goes on at 0 */

struct block_cache {
    uint8_t *arena;
    size_t used, arena_bytes;
    struct block *scratch; /* one instruction, never looked up */
    uintptr_t bucket_mask;
    struct block *bucket[];
};

struct block_cache *block_cache_create(size_t arena_bytes)
{
    size_t buckets = 1;
    while (buckets * 2 <= arena_bytes / BUCKET_SHARE)
        buckets *= 2;
    struct block_cache *k = calloc(1, sizeof(*k) + buckets * sizeof(k->bucket[0]));
    if (!k)
        return NULL;
    k->arena_bytes = arena_bytes;
    k->bucket_mask = buckets - 1;
    k->scratch = calloc(1, sizeof(struct block) + sizeof(struct insn) + INSN_BYTES_MAX + 1);
    k->arena = mmap(NULL, arena_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (!k->scratch || k->arena == MAP_FAILED) {
        k->arena = k->arena == MAP_FAILED ? NULL : k->arena;
        block_cache_destroy(k);
        return NULL;
    }
    return k;
}

void block_cache_destroy(struct block_cache *k)
{
    if (!k)
        return;
    if (k->arena)
        munmap(k->arena, k->arena_bytes);
    free(k->scratch);
    free(k);
}

void block_cache_flush(struct icpu *c)
{
    struct block_cache *k = c->blocks;
    memset(k->bucket, 0, (k->bucket_mask + 1) * sizeof(k->bucket[0]));
    k->used = 0;
    c->block = NULL;
    native_flush(c);
    vcpu_count(&c->v, COUNTER_block_cache_flushes);
}

void block_cache_shrink(struct icpu *c, size_t arena_bytes)
{
    struct block_cache *k = c->blocks;
    block_cache_flush(c);
    if (arena_bytes < k->arena_bytes && munmap(k->arena + arena_bytes, k->arena_bytes - arena_bytes) == 0)
        k->arena_bytes = arena_bytes;
    madvise(k->arena, k->arena_bytes, MADV_DONTNEED);
}

static struct block **bucket_of(struct block_cache *k, uintptr_t host)
{
    return &k->bucket[(host ^ host >> 16) & k->bucket_mask];
}

/* ---- comparison ---- */

/*
 * Comparison goes in steps of eight bytes and ends with one that lies over the last eight. For shorter blocks that one starts at the block or, when this would leave the
 * page, ends with it; the mask takes out what is not the block's.
 */
static void block_tail_set(struct block *b, unsigned length)
{
    uint8_t value[8] = {0};
    if (length >= 8) {
        b->tail_offset = (int16_t)(length - 8);
        b->tail_mask = ~0ull;
        memcpy(value, b->bytes + length - 8, 8);
    } else if ((b->host & PAGE_MASK_BITS) + 8 <= PAGE_SIZE_BYTES) {
        b->tail_offset = 0;
        b->tail_mask = (1ull << 8 * length) - 1;
        memcpy(value, b->bytes, length);
    } else {
        b->tail_offset = (int16_t)((int)length - 8);
        b->tail_mask = ~0ull << 8 * (8 - length);
        memcpy(value + 8 - length, b->bytes, length);
    }
    memcpy(&b->tail_value, value, 8);
}

/* The crossing instruction's part in the next page. May raise that page's fault. */
static bool second_part_intact(struct icpu *c, const struct block *b, gva_t gva)
{
    unsigned first = (unsigned)(PAGE_SIZE_BYTES - (gva & PAGE_MASK_BITS));
    const uint8_t *p = mem_fetch_host(c, gva + first);
    if (!p)
        return false;
    for (unsigned n = first; n < b->length_bytes; n++)
        if (*(const volatile uint8_t *)(p + n - first) != b->bytes[n])
            return false;
    return true;
}

void block_note_store(struct icpu *c, uintptr_t host, unsigned length)
{
    if (unlikely(host - c->block_guard < c->block_guard_span) ||
        unlikely(c->block_guard_span && c->block_guard - host < length))
        interp_self_modified(c);
}

void block_drop(struct icpu *c, struct block *b)
{
    for (struct block **p = bucket_of(c->blocks, b->host); *p; p = &(*p)->chain) {
        if (*p == b) {
            *p = b->chain;
            break;
        }
    }
    b->host = 0;
    vcpu_count(&c->v, COUNTER_self_modified);
}

/* ---- building ---- */

/* Copies code bytes from gva on, at most `want`, up to the page's end; byte by byte where it is MMIO. */
static unsigned fetch_bytes(struct icpu *c, gva_t gva, uint8_t *to, unsigned want)
{
    unsigned left = (unsigned)(PAGE_SIZE_BYTES - (gva & PAGE_MASK_BITS));
    unsigned length = want < left ? want : left;
    const uint8_t *host = mem_fetch_host(c, gva);
    if (host)
        memcpy(to, host, length);
    else
        mem_fetch_mmio(c, gva, to, length);
    return length;
}

/*
 * Decodes the one instruction at rip with every check: CS limit, a second page, MMIO. The fault of the second page is raised only when the instruction
 * really needs it.
 */
static unsigned decode_one(struct icpu *c, gva_t gva, uint8_t bytes[static INSN_BYTES_MAX + 1], struct insn *insn)
{
    unsigned allowed = INSN_BYTES_MAX;
    if (c->code_bits != 64) {
        uint64_t rip = c->v.cpu.gpr[GPR_RIP], limit = c->v.cpu.seg[SEG_CS].limit;
        if (rip > limit)
            raise_gp0(c);
        if (limit - rip < allowed && limit != CS_LIMIT_NONE)
            allowed = (unsigned)(limit - rip) + 1;
    }
    unsigned have = fetch_bytes(c, gva, bytes, allowed);
    unsigned length = decode_insn(c, bytes, have, c->code_bits, insn);
    if (!length && have < allowed) {
        have += fetch_bytes(c, gva + have, bytes + have, allowed - have);
        length = decode_insn(c, bytes, have, c->code_bits, insn);
    }
    if (!length)
        raise_gp0(c);
    return length;
}

static struct block *block_scratch(struct icpu *c, gva_t gva)
{
    struct block *b = c->blocks->scratch;
    b->host = 0;
    b->code_bits = (uint8_t)c->code_bits;
    b->count = 1;
    b->bytes = (uint8_t *)&b->insn[1];
    b->length_bytes = (uint16_t)decode_one(c, gva, b->bytes, &b->insn[0]);
    return b;
}

static struct block *block_allocate(struct icpu *c)
{
    struct block_cache *k = c->blocks;
    if (k->used + BLOCK_SIZE_MAX > k->arena_bytes)
        block_cache_flush(c);
    struct block *b = (struct block *)(k->arena + k->used);
    memset(b, 0, sizeof(*b));
    return b;
}

/* Makes the block findable; `first` of its bytes lie in its own page. */
static void block_commit(struct icpu *c, struct block *b, const uint8_t *bytes, unsigned first)
{
    struct block_cache *k = c->blocks;
    struct block **bucket = bucket_of(k, b->host);
    b->bytes = (uint8_t *)&b->insn[b->count];
    memcpy(b->bytes, bytes, b->length_bytes);
    block_tail_set(b, first);
    b->chain = *bucket;
    *bucket = b;
    size_t size = sizeof(*b) + b->count * sizeof(struct insn) + b->length_bytes;
    k->used += (size + BLOCK_ALIGN - 1) & ~(size_t)(BLOCK_ALIGN - 1);
    vcpu_count(&c->v, COUNTER_blocks_decoded);
}

static struct block *block_build_crossing(struct icpu *c, gva_t gva, struct block *b, uint8_t bytes[static INSN_BYTES_MAX + 1])
{
    unsigned first = (unsigned)(PAGE_SIZE_BYTES - (gva & PAGE_MASK_BITS));
    const uint8_t *next = mem_fetch_host(c, gva + first);
    if (!next)
        return block_scratch(c, gva);
    memcpy(bytes + first, next, INSN_BYTES_MAX + 1 - first);
    unsigned length = decode_insn(c, bytes, INSN_BYTES_MAX, c->code_bits, &b->insn[0]);
    b->count = 1;
    b->crossing = length > first;
    b->length_bytes = (uint16_t)length;
    block_commit(c, b, bytes, length < first ? length : first);
    return b;
}

static struct block *block_build(struct icpu *c, uintptr_t host, gva_t gva)
{
    struct block *b = block_allocate(c);
    unsigned left = (unsigned)(PAGE_SIZE_BYTES - (gva & PAGE_MASK_BITS));
    unsigned available = left < BLOCK_BYTES_MAX ? left : BLOCK_BYTES_MAX;
    uint8_t bytes[BLOCK_BYTES_MAX];
    b->host = host;
    b->code_bits = (uint8_t)c->code_bits;
    memcpy(bytes, (const void *)host, available);
    while (b->count < BLOCK_INSNS_MAX) {
        struct insn *i = &b->insn[b->count];
        unsigned length = decode_insn(c, bytes + b->length_bytes, available - b->length_bytes, c->code_bits, i);
        if (!length)
            break;
        b->count++;
        b->length_bytes = (uint16_t)(b->length_bytes + length);
        if (i->flags & INSN_ENDS_BLOCK)
            break;
    }
    if (!b->count)
        return block_build_crossing(c, gva, b, bytes);
    block_commit(c, b, bytes, b->length_bytes);
    return b;
}

static struct block *block_find(struct icpu *c, uintptr_t host, gva_t gva)
{
    for (struct block *b = *bucket_of(c->blocks, host); b; b = b->chain) {
        if (b->host != host || b->code_bits != c->code_bits)
            continue;
        if (likely(block_is_intact(b)) && (likely(!b->crossing) || second_part_intact(c, b, gva)))
            return b;
        block_drop(c, b);
        break;
    }
    return block_build(c, host, gva);
}

struct block *block_lookup(struct icpu *c)
{
    uint64_t rip = c->v.cpu.gpr[GPR_RIP];
    gva_t gva = rip;
    if (unlikely(c->code_bits != 64)) {
        c->v.cpu.gpr[GPR_RIP] = rip = (uint32_t)rip;
        if (rip > c->v.cpu.seg[SEG_CS].limit)
            raise_gp0(c);
        gva = (rip + c->segment_base[SEG_CS]) & 0xffffffffu;
    }
    const struct tlb_entry *e = tlb_slot(c, gva);
    uintptr_t host = gva + e->addend;
    if (unlikely(e->execute != tlb_tag(c, gva, 1)))
        host = (uintptr_t)mem_fetch_host(c, gva);
    if (unlikely(!host))
        return block_scratch(c, gva);
    struct block *b = block_find(c, host, gva);
    uint32_t limit = c->v.cpu.seg[SEG_CS].limit;
    if (unlikely(c->code_bits != 64) && rip + b->length_bytes - 1 > limit && limit != CS_LIMIT_NONE)
        return block_scratch(c, gva);
    return b;
}
