/*
 * String instructions: MOVS STOS LODS SCAS CMPS INS OUTS, with and without repeat prefixes.
 *
 * A repeated instruction works in chunks that stay within one page of each operand, on host addresses; whatever has none (MMIO, ROM, page crossings,
 * armed breakpoints) goes one element at a time. After each chunk RCX, RSI and RDI are as if that many iterations had been done, so a fault
 * in the next leaves a restartable state, and an interrupt that waits is let in with rip back at the instruction. In slow mode (single stepping) each
 * element is a chunk and an instruction boundary.
 * Threading: the vCPU's thread.
 */
#include "engine/interp/op_priv.h"

/* ---- operands ---- */

static inline int64_t stride(const struct icpu *c, unsigned size)
{
    return c->v.cpu.rflags & RFLAGS_DF ? -(int64_t)size : (int64_t)size;
}

static inline uint64_t string_offset(const struct icpu *c, const struct insn *i, unsigned gpr)
{
    return c->v.cpu.gpr[gpr] & i->address_mask;
}

static inline gva_t source_linear(struct icpu *c, const struct insn *i, unsigned size)
{
    return linear_address(c, i->flags & INSN_LEGACY, i->segment, string_offset(c, i, GPR_RSI), size, false);
}

static inline gva_t destination_linear(struct icpu *c, const struct insn *i, unsigned size, bool write)
{
    return linear_address(c, i->flags & INSN_LEGACY, SEG_ES, string_offset(c, i, GPR_RDI), size, write);
}

static inline void string_advance(struct icpu *c, const struct insn *i, unsigned gpr, int64_t bytes)
{
    reg_write_masked(c, gpr, i->address_mask, c->v.cpu.gpr[gpr] + (uint64_t)bytes);
}

/* ---- one element ---- */

#define STRING_ONE(bits, s, unused)                                                                \
    static void movs##bits(struct icpu *c, const struct insn *i)                                   \
    {                                                                                              \
        uint##bits##_t value = mem_read##bits(c, source_linear(c, i, bits / 8));                   \
        mem_write##bits(c, destination_linear(c, i, bits / 8, true), value);                       \
        string_advance(c, i, GPR_RSI, stride(c, bits / 8));                                        \
        string_advance(c, i, GPR_RDI, stride(c, bits / 8));                                        \
    }                                                                                              \
    static void stos##bits(struct icpu *c, const struct insn *i)                                   \
    {                                                                                              \
        mem_write##bits(c, destination_linear(c, i, bits / 8, true), (uint##bits##_t)c->v.cpu.gpr[GPR_RAX]); \
        string_advance(c, i, GPR_RDI, stride(c, bits / 8));                                        \
    }                                                                                              \
    static void lods##bits(struct icpu *c, const struct insn *i)                                   \
    {                                                                                              \
        reg_write(c, REG_OFFSET(GPR_RAX), bits / 8, mem_read##bits(c, source_linear(c, i, bits / 8))); \
        string_advance(c, i, GPR_RSI, stride(c, bits / 8));                                        \
    }                                                                                              \
    static inline void compare##bits(struct icpu *c, uint##bits##_t a, uint##bits##_t b)           \
    {                                                                                              \
        uint32_t f;                                                                                \
        __asm__ volatile("cmp" s " %2, %1" FLAGS_SAVE : "=a"(f) : "q"(a), "q"(b) : "cc");          \
        c->oszapc = f;                                                                             \
    }                                                                                              \
    static void scas##bits(struct icpu *c, const struct insn *i)                                   \
    {                                                                                              \
        uint##bits##_t value = mem_read##bits(c, destination_linear(c, i, bits / 8, false));       \
        compare##bits(c, (uint##bits##_t)c->v.cpu.gpr[GPR_RAX], value);                            \
        string_advance(c, i, GPR_RDI, stride(c, bits / 8));                                        \
    }                                                                                              \
    /* As processors do, rDI's operand is read first: when both fault, its address is the one in CR2. */ \
    static void cmps##bits(struct icpu *c, const struct insn *i)                                   \
    {                                                                                              \
        uint##bits##_t b = mem_read##bits(c, destination_linear(c, i, bits / 8, false));           \
        uint##bits##_t a = mem_read##bits(c, source_linear(c, i, bits / 8));                       \
        compare##bits(c, a, b);                                                                    \
        string_advance(c, i, GPR_RSI, stride(c, bits / 8));                                        \
        string_advance(c, i, GPR_RDI, stride(c, bits / 8));                                        \
    }
SIZES(STRING_ONE, )

static uint16_t io_port(const struct icpu *c)
{
    return (uint16_t)c->v.cpu.gpr[GPR_RDX];
}

static uint32_t io_read(struct icpu *c, uint16_t port, unsigned size)
{
    simd_save(c);
    vcpu_count(&c->v, COUNTER_port_reads);
    uint32_t value = c->v.host_ops->port_read(c->v.host, port, size);
    TRACE(c, "in %#x size %u = %#x\n", port, size, value);
    return value;
}

static void io_write(struct icpu *c, uint16_t port, unsigned size, uint32_t value)
{
    simd_save(c);
    vcpu_count(&c->v, COUNTER_port_writes);
    TRACE(c, "out %#x size %u = %#x\n", port, size, value);
    c->v.host_ops->port_write(c->v.host, port, size, value);
}

/* Reading a port has side effects: everything that can fault comes before. */
static void ins_one(struct icpu *c, const struct insn *i)
{
    unsigned size = i->op_size;
    io_check(c, io_port(c), size);
    gva_t linear = destination_linear(c, i, size, true);
    mem_probe_write(c, c->view, linear, size);
    mem_write(c, linear, size, io_read(c, io_port(c), size));
    string_advance(c, i, GPR_RDI, stride(c, size));
}

static void outs_one(struct icpu *c, const struct insn *i)
{
    unsigned size = i->op_size;
    io_check(c, io_port(c), size);
    uint32_t value = (uint32_t)mem_read(c, source_linear(c, i, size), size);
    io_write(c, io_port(c), size, value);
    string_advance(c, i, GPR_RSI, stride(c, size));
}

/* ---- chunks ---- */

/* How many elements from `offset` on, in the direction of DF, lie within the segment's limit and do not wrap round the address size; at least
 * 1, for which linear_address has spoken, and at most 2^64 - 1. */
static uint64_t elements_in_segment(const struct icpu *c, const struct insn *i, unsigned segment, uint64_t offset, unsigned size)
{
    uint64_t last = i->address_mask; /* offset of the last usable byte, upwards */
    if (c->v.cpu.rflags & RFLAGS_DF) {
        if ((i->flags & INSN_LEGACY) && (c->v.cpu.seg[segment].attributes & SEG_ATTR_DC))
            return 1;
        return offset / size + (offset / size != UINT64_MAX);
    }
    if (i->flags & INSN_LEGACY) {
        const struct segment *s = &c->v.cpu.seg[segment];
        if (s->attributes & SEG_ATTR_DC) /* expand down, or conforming code: rare */
            return 1;
        if (last > s->limit)
            last = s->limit;
    }
    if (last < offset || last - offset < size - 1)
        return 1;
    uint64_t after = (last - offset - (size - 1)) / size;
    return after + (after != UINT64_MAX);
}

/*
 * Host address of the element at segment:offset, and in *count the number of elements that may be accessed from there on in the direction of DF: lowered,
 * never raised. NULL: take one element the slow way. Raises the first element's fault.
 */
static void *string_span(struct icpu *c, const struct insn *i, unsigned segment, unsigned gpr, bool write, uint64_t *count)
{
    unsigned size = i->op_size;
    uint64_t offset = string_offset(c, i, gpr);
    gva_t linear = linear_address(c, i->flags & INSN_LEGACY, segment, offset, size, write);
    uint64_t in_page = linear & PAGE_MASK_BITS;
    if (in_page + size > PAGE_SIZE_BYTES)
        return NULL;
    uint64_t n = c->v.cpu.rflags & RFLAGS_DF ? in_page / size + 1 : (PAGE_SIZE_BYTES - in_page) / size;
    uint64_t limit = elements_in_segment(c, i, segment, offset, size);
    n = n < limit ? n : limit;
    if (n < *count)
        *count = n;
    return mem_host(c, c->view, linear, size, write);
}

/* `count` elements from `host` on in the direction of DF were stored: does it hit the running block? */
static void stored(struct icpu *c, const void *host, unsigned size, uint64_t count)
{
    uint64_t bytes = size * count;
    uintptr_t low = (uintptr_t)host;
    if (c->v.cpu.rflags & RFLAGS_DF)
        low -= bytes - size;
    if (unlikely(low < c->block_guard + c->block_guard_span && c->block_guard < low + bytes))
        interp_self_modified(c);
}

/* The host's own instruction has the guest's overlap semantics: one page's bytes lie in the same order on both sides. */
#define HOST_MOVS(s) __asm__ volatile("rep movs" s : "+S"(src), "+D"(dst), "+c"(count) : : "memory")
#define HOST_MOVS_DOWN(s) __asm__ volatile("std\n\trep movs" s "\n\tcld" : "+S"(src), "+D"(dst), "+c"(count) : : "memory", "cc")
#define HOST_STOS(s) __asm__ volatile("rep stos" s : "+D"(dst), "+c"(count) : "a"(value) : "memory")
#define HOST_STOS_DOWN(s) __asm__ volatile("std\n\trep stos" s "\n\tcld" : "+D"(dst), "+c"(count) : "a"(value) : "memory", "cc")
#define BY_SIZE(size, DO)                                                                          \
    switch (size) {                                                                                \
    case 1:                                                                                        \
        DO("b");                                                                                   \
        break;                                                                                     \
    case 2:                                                                                        \
        DO("w");                                                                                   \
        break;                                                                                     \
    case 4:                                                                                        \
        DO("l");                                                                                   \
        break;                                                                                     \
    default:                                                                                       \
        DO("q");                                                                                   \
    }

static void host_copy(void *dst, const void *src, unsigned size, uint64_t count, bool down)
{
    if (down)
        BY_SIZE(size, HOST_MOVS_DOWN)
    else
        BY_SIZE(size, HOST_MOVS)
}

static void host_fill(void *dst, uint64_t value, unsigned size, uint64_t count, bool down)
{
    if (down)
        BY_SIZE(size, HOST_STOS_DOWN)
    else
        BY_SIZE(size, HOST_STOS)
}

/* A chunk function does at least one and at most `count` elements (count > 0), advances RSI and RDI, and returns how many it did; with
 * *found set when a compare ended the repetition. */
typedef uint64_t chunk_fn(struct icpu *c, const struct insn *i, uint64_t count, bool *found);

static insn_fn *const movs_one[4] = ROW(movs), *const stos_one[4] = ROW(stos), *const lods_one[4] = ROW(lods),
                *const scas_one[4] = ROW(scas), *const cmps_one[4] = ROW(cmps);

static uint64_t movs_chunk(struct icpu *c, const struct insn *i, uint64_t count, bool *found)
{
    const void *src = string_span(c, i, i->segment, GPR_RSI, false, &count);
    void *dst = src ? string_span(c, i, SEG_ES, GPR_RDI, true, &count) : NULL;
    if (!dst) {
        movs_one[size_index(i->op_size)](c, i);
        return 1;
    }
    host_copy(dst, src, i->op_size, count, c->v.cpu.rflags & RFLAGS_DF);
    stored(c, dst, i->op_size, count);
    string_advance(c, i, GPR_RSI, stride(c, i->op_size) * (int64_t)count);
    string_advance(c, i, GPR_RDI, stride(c, i->op_size) * (int64_t)count);
    return count;
}

static uint64_t stos_chunk(struct icpu *c, const struct insn *i, uint64_t count, bool *found)
{
    void *dst = string_span(c, i, SEG_ES, GPR_RDI, true, &count);
    if (!dst) {
        stos_one[size_index(i->op_size)](c, i);
        return 1;
    }
    host_fill(dst, c->v.cpu.gpr[GPR_RAX], i->op_size, count, c->v.cpu.rflags & RFLAGS_DF);
    stored(c, dst, i->op_size, count);
    string_advance(c, i, GPR_RDI, stride(c, i->op_size) * (int64_t)count);
    return count;
}

/* Only the last element loaded is ever seen; the others are read for their faults, which they share with the first. */
static uint64_t lods_chunk(struct icpu *c, const struct insn *i, uint64_t count, bool *found)
{
    if (string_span(c, i, i->segment, GPR_RSI, false, &count) && count > 1)
        string_advance(c, i, GPR_RSI, stride(c, i->op_size) * (int64_t)(count - 1));
    else
        count = 1;
    lods_one[size_index(i->op_size)](c, i);
    return count;
}

/* Index of the first element that ends the repetition, or count. `a_step` is 0 for the accumulator. */
#define SEARCH(bits, s, unused)                                                                    \
    static uint64_t search##bits(const char *a, const char *b, int64_t a_step, int64_t b_step, uint64_t count, bool until_equal) \
    {                                                                                              \
        uint64_t n = 0;                                                                            \
        while (n < count && (*(const uint##bits##_t *)a == *(const uint##bits##_t *)b) != until_equal) { \
            a += a_step;                                                                           \
            b += b_step;                                                                           \
            n++;                                                                                   \
        }                                                                                          \
        return n;                                                                                  \
    }
SIZES(SEARCH, )

static uint64_t search(const void *a, const void *b, int64_t a_step, int64_t b_step, unsigned size, uint64_t count, bool until_equal)
{
    switch (size) {
    case 1:
        return search8(a, b, a_step, b_step, count, until_equal);
    case 2:
        return search16(a, b, a_step, b_step, count, until_equal);
    case 4:
        return search32(a, b, a_step, b_step, count, until_equal);
    default:
        return search64(a, b, a_step, b_step, count, until_equal);
    }
}

static bool repeats_until_equal(const struct insn *i)
{
    return i->flags & INSN_REPNE;
}

/* The last element of a chunk is compared again by the single instruction, for its flags. */
static bool ended(const struct icpu *c, const struct insn *i)
{
    return !!(c->oszapc & OSZAPC_ZF) == repeats_until_equal(i);
}

static uint64_t scas_chunk(struct icpu *c, const struct insn *i, uint64_t count, bool *found)
{
    uint64_t done = 0;
    const void *b = string_span(c, i, SEG_ES, GPR_RDI, false, &count);
    if (b) {
        done = search(&c->v.cpu.gpr[GPR_RAX], b, 0, stride(c, i->op_size), i->op_size, count - 1, repeats_until_equal(i));
        string_advance(c, i, GPR_RDI, stride(c, i->op_size) * (int64_t)done);
    }
    scas_one[size_index(i->op_size)](c, i);
    *found = ended(c, i);
    return done + 1;
}

static uint64_t cmps_chunk(struct icpu *c, const struct insn *i, uint64_t count, bool *found)
{
    uint64_t done = 0;
    int64_t step = stride(c, i->op_size);
    const void *b = string_span(c, i, SEG_ES, GPR_RDI, false, &count);
    const void *a = b ? string_span(c, i, i->segment, GPR_RSI, false, &count) : NULL;
    if (a) {
        done = search(a, b, step, step, i->op_size, count - 1, repeats_until_equal(i));
        string_advance(c, i, GPR_RSI, step * (int64_t)done);
        string_advance(c, i, GPR_RDI, step * (int64_t)done);
    }
    cmps_one[size_index(i->op_size)](c, i);
    *found = ended(c, i);
    return done + 1;
}

/* Between two port accesses other processors may change anything: fewer elements a chunk, so that interrupts are not kept waiting. */
#define IO_CHUNK 256u

static uint64_t ins_chunk(struct icpu *c, const struct insn *i, uint64_t count, bool *found)
{
    unsigned size = i->op_size;
    uint16_t port = io_port(c);
    io_check(c, port, size);
    count = count < IO_CHUNK ? count : IO_CHUNK;
    char *dst = string_span(c, i, SEG_ES, GPR_RDI, true, &count);
    if (!dst) {
        ins_one(c, i);
        return 1;
    }
    int64_t step = stride(c, size);
    for (uint64_t n = 0; n < count; n++) {
        uint32_t value = io_read(c, port, size);
        char *p = dst + step * (int64_t)n;
        if (size == 1)
            *(volatile uint8_t *)p = (uint8_t)value;
        else if (size == 2)
            *(volatile uint16_t *)p = (uint16_t)value;
        else
            *(volatile uint32_t *)p = value;
    }
    stored(c, dst, size, count);
    string_advance(c, i, GPR_RDI, step * (int64_t)count);
    return count;
}

static uint64_t outs_chunk(struct icpu *c, const struct insn *i, uint64_t count, bool *found)
{
    outs_one(c, i);
    return 1;
}

/* ---- repetition ---- */

/* Interrupts, single steps: goes on with this instruction later. */
static void string_restart(struct icpu *c, const struct insn *i)
{
    c->v.cpu.gpr[GPR_RIP] -= i->length;
}

/* One element at a time: a trap may follow each, or an interrupt. RF alone is no reason. */
static inline bool by_element(const struct icpu *c)
{
    return c->slow && (!(c->v.cpu.rflags & RFLAGS_RF) || (c->v.cpu.rflags & RFLAGS_TF) || c->careful);
}

/* A fault leaves the flags that were there before the instruction, not those of the last comparison (SDM vol. 2, REP). */
static inline void repeat(struct icpu *c, const struct insn *i, chunk_fn *chunk)
{
    bool found = false, single = unlikely(by_element(c));
    uint32_t flags = c->oszapc;
    for (;; c->oszapc = flags) {
        uint64_t left = string_offset(c, i, GPR_RCX);
        if (!left)
            return;
        uint64_t done = chunk(c, i, single ? 1 : left, &found);
        reg_write_masked(c, GPR_RCX, i->address_mask, left - done);
        if (found || left == done)
            return;
        if (unlikely(single || atomic_load_explicit(&c->v.attention, memory_order_relaxed))) {
            string_restart(c, i);
            return;
        }
    }
}

#define REPEAT(name)                                                                               \
    static void rep_##name(struct icpu *c, const struct insn *i)                                   \
    {                                                                                              \
        repeat(c, i, name##_chunk);                                                                \
    }
REPEAT(movs)
REPEAT(stos)
REPEAT(lods)
REPEAT(scas)
REPEAT(cmps)

/* The right to the port is checked even when the count is zero, as processors do. */
#define REPEAT_IO(name)                                                                            \
    static void rep_##name(struct icpu *c, const struct insn *i)                                   \
    {                                                                                              \
        io_check(c, io_port(c), i->op_size);                                                       \
        repeat(c, i, name##_chunk);                                                                \
    }
REPEAT_IO(ins)
REPEAT_IO(outs)

/* ---- selection ---- */

struct string_op {
    insn_fn *const *one; /* by size */
    insn_fn *repeated;
};

static insn_fn *const ins_table[4] = {ins_one, ins_one, ins_one, NULL};
static insn_fn *const outs_table[4] = {outs_one, outs_one, outs_one, NULL};

static bool string_op(const struct decode *d, struct string_op *op)
{
    /* MOVSD and CMPSD are SSE instructions too, in other opcode maps. */
    if (d->zi.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY || d->zi.opcode_map != ZYDIS_OPCODE_MAP_DEFAULT)
        return false;
    switch (d->zi.opcode) {
    case 0x6c:
    case 0x6d:
        *op = (struct string_op){ins_table, rep_ins};
        return true;
    case 0x6e:
    case 0x6f:
        *op = (struct string_op){outs_table, rep_outs};
        return true;
    case 0xa4:
    case 0xa5:
        *op = (struct string_op){movs_one, rep_movs};
        return true;
    case 0xa6:
    case 0xa7:
        *op = (struct string_op){cmps_one, rep_cmps};
        return true;
    case 0xaa:
    case 0xab:
        *op = (struct string_op){stos_one, rep_stos};
        return true;
    case 0xac:
    case 0xad:
        *op = (struct string_op){lods_one, rep_lods};
        return true;
    case 0xae:
    case 0xaf:
        *op = (struct string_op){scas_one, rep_scas};
        return true;
    default:
        return false;
    }
}

static unsigned element_bytes(const struct decode *d)
{
    bool io = d->zi.opcode < 0x70;
    if (!(d->zi.opcode & 1))
        return 1;
    return io && d->zi.operand_width == 64 ? 4 : d->zi.operand_width / 8;
}

bool op_string_select(struct icpu *c, const struct decode *d, struct insn *i)
{
    struct string_op op;
    if (!string_op(d, &op))
        return false;
    i->op_size = (uint8_t)element_bytes(d);
    if (i->flags & (INSN_REP | INSN_REPNE)) {
        i->fn = op.repeated;
        i->flags |= INSN_ENDS_BLOCK;
    } else {
        i->fn = op.one[size_index(i->op_size)];
    }
    return true;
}
