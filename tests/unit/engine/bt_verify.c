/* See bt_verify.h. Nothing here is taken from the translator's sources but the layout of the context and the stubs' places. Threading: one thread, e->lock not needed while no vCPU runs. */
#include "bt_verify.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TERMS_MAX 6
#define SYMBOLS_MAX 6000
#define FIELDS_MAX 64
#define FACTS_MAX 200
#define ZEROS_MAX 8
#define CHECKED_MAX 512 /* bytes that one check covers, at most */
#define POLL_BYTES 4u

/* ---- sums ---- */

struct sum { /* no padding: compared as bytes */
    uint64_t constant;
    uint64_t count;
    struct {
        uint64_t symbol, factor;
    } term[TERMS_MAX];
};

enum kind {
    PLAIN,
    /* The guest must not see these. */
    HOST, V, ENTRY, SLOT, POLL, HOST_RSP, TABLE,
    /* Of a sum: RORX 12, and PEXT with constants of the context. */
    ROR12, LOW12, BIT12, BEYOND, BIG, INDEX,
    SPLIT,          /* zero when `extra` bytes at the sum are in one page */
    SIGNED16, SIGNED32, SHIFTED, /* sign-extended; shifted right by `extra` */
};

struct symbol {
    enum kind kind;
    int64_t extra;
    struct sum of;
};

/* `bytes` bytes at the sum are in one page. */
struct fact {
    struct sum of;
    int64_t bytes;
};

struct state {
    struct sum reg[16];
    struct {
        int32_t field;
        struct sum value;
    } field[FIELDS_MAX];
    unsigned fields, facts, zeros;
    struct fact fact[FACTS_MAX];
    uint64_t zero[ZEROS_MAX]; /* symbols that are 0 */
    int view;                 /* counts changes of GS */
    bool entered;             /* page_va was set */
};

static struct {
    struct bt_engine *e;
    const struct bt_block *block;
    struct symbol symbol[SYMBOLS_MAX];
    unsigned symbols;
    struct state now;
    bool live;
    struct state *waiting[2 * BT_BLOCK_TC_MAX]; /* by byte of the code: a branch leads there in that state */
    bool join[2 * BT_BLOCK_TC_MAX]; /* several ways lead there, or one back: like a chain entry */
    bool seen[2 * BT_BLOCK_TC_MAX]; /* those that were come by */
    bool again;                     /* a join was found: everything once more, knowing it */
    uint32_t at;
    ZydisDecodedInstruction zi;
    ZydisDecodedOperand op[ZYDIS_MAX_OPERAND_COUNT];
    char why[400];
} m;

static bool fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
static bool fail(const char *format, ...)
{
    char text[300];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof(text), format, list);
    va_end(list);
    if (!m.why[0])
        snprintf(m.why, sizeof(m.why), "TC offset %#x, %s: %s", m.at, ZydisMnemonicGetString(m.zi.mnemonic), text);
    return false;
}

static uint64_t symbol_make(enum kind kind, int64_t extra, const struct sum *of)
{
    static const struct sum nothing;
    if (of)
        for (unsigned n = 0; n < m.symbols; n++)
            if (m.symbol[n].kind == kind && m.symbol[n].extra == extra && !memcmp(&m.symbol[n].of, of, sizeof(*of)))
                return n;
    if (m.symbols == SYMBOLS_MAX) {
        fail("too many symbols");
        return 0;
    }
    m.symbol[m.symbols] = (struct symbol){kind, extra, of ? *of : nothing};
    return m.symbols++;
}

static struct sum constant(uint64_t value)
{
    struct sum s;
    memset(&s, 0, sizeof(s));
    s.constant = value;
    return s;
}

static struct sum symbol_sum(uint64_t symbol)
{
    struct sum s = constant(0);
    s.count = 1;
    s.term[0].symbol = symbol;
    s.term[0].factor = 1;
    return s;
}

static struct sum unknown(enum kind kind)
{
    return symbol_sum(symbol_make(kind, 0, NULL));
}

static struct sum made(enum kind kind, int64_t extra, struct sum of)
{
    return symbol_sum(symbol_make(kind, extra, &of));
}

/* x + factor * y; terms ordered by symbol. */
static struct sum added(struct sum x, struct sum y, uint64_t factor)
{
    struct sum s = constant(x.constant + factor * y.constant);
    unsigned i = 0, j = 0;
    while (i < x.count || j < y.count) {
        bool left = i < x.count && (j == y.count || x.term[i].symbol <= y.term[j].symbol);
        uint64_t symbol = left ? x.term[i].symbol : y.term[j].symbol;
        uint64_t value = 0;
        if (left)
            value = x.term[i++].factor;
        if (j < y.count && y.term[j].symbol == symbol)
            value += factor * y.term[j++].factor;
        if (!value)
            continue;
        if (s.count == TERMS_MAX)
            return unknown(HOST);
        s.term[s.count].symbol = symbol;
        s.term[s.count++].factor = value;
    }
    return s;
}

static bool difference(struct sum x, struct sum y, int64_t *value)
{
    struct sum s = added(x, y, ~0ull);
    *value = (int64_t)s.constant;
    return !s.count;
}

static const struct symbol *only(const struct sum *s, enum kind kind)
{
    if (s->count != 1 || s->constant || s->term[0].factor != 1 || m.symbol[s->term[0].symbol].kind != kind)
        return NULL;
    return &m.symbol[s->term[0].symbol];
}

/* Of 32-bit code: RAX to RDI have no upper halves. */
static bool legacy(void)
{
    return m.block->page->mode.code_bits == 32;
}

/* What a register of that holds, or 32 bits of a result: no sum. */
static bool is_narrow(const struct sum *s)
{
    return s->count ? s->count == 1 && !s->constant && s->term[0].factor == 1 : !(s->constant >> 32);
}

static bool is_free(unsigned reg)
{
    return legacy() ? reg >= GPR_R8 : reg == GPR_R10 || reg == GPR_R11;
}

/* The symbol of that kind among the terms, once. */
static const struct symbol *one_of(const struct sum *s, enum kind kind, unsigned *where)
{
    for (*where = 0; *where < s->count; ++*where)
        if (m.symbol[s->term[*where].symbol].kind == kind && s->term[*where].factor == 1)
            return &m.symbol[s->term[*where].symbol];
    return NULL;
}

static bool secret(const struct sum *s)
{
    for (unsigned n = 0; n < s->count; n++)
        if (m.symbol[s->term[n].symbol].kind >= HOST && m.symbol[s->term[n].symbol].kind <= TABLE)
            return true;
    return false;
}

/* ---- registers and context ---- */

static int gpr(ZydisRegister reg)
{
    ZydisRegister large = ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, reg);
    return large >= ZYDIS_REGISTER_RAX && large <= ZYDIS_REGISTER_R15 ? (int)(large - ZYDIS_REGISTER_RAX) : -1;
}

static bool is64(ZydisRegister reg)
{
    return ZydisRegisterGetClass(reg) == ZYDIS_REGCLASS_GPR64;
}

static struct sum reg_sum(ZydisRegister reg)
{
    int n = gpr(reg);
    return n < 0 ? constant(0) : m.now.reg[n];
}

static bool is_guest_field(int32_t field)
{
    return field == BT_CTX(page_va) || field == BT_CTX(x87_page) || field == BT_CTX(c.segment_base[SEG_FS]) || field == BT_CTX(c.segment_base[SEG_GS]) ||
           field == BT_CTX(c.v.cpu.seg[SEG_FS].base) || field == BT_CTX(c.v.cpu.seg[SEG_GS].base) || field == BT_CTX(c.v.cpu.msr_kernel_gs_base) ||
           (field >= BT_CTX_GPR(0) && field <= BT_CTX_GPR(15) && (field - BT_CTX_GPR(0)) % 8 == 0);
}

static bool is_scratch(int32_t field)
{
    return field >= BT_CTX(scratch) && field < BT_CTX(scratch) + 64 && (field - BT_CTX(scratch)) % 8 == 0;
}

static bool is_read_only(int32_t field)
{
    static const int32_t fields[] = {
        BT_CTX(c.v.cpu.rflags), BT_CTX(ac), BT_CTX(c.v.cpu.cr0), BT_CTX(c.v.cpu.cr2), BT_CTX(c.v.cpu.cr3), BT_CTX(c.v.cpu.cr4), BT_CTX(c.v.cpu.tsc_offset),
        BT_CTX(c.v.cpu.msr_tsc_aux), BT_CTX(c.v.cpu.seg[SEG_ES].selector), BT_CTX(c.v.cpu.seg[SEG_DS].selector), BT_CTX(c.v.cpu.seg[SEG_FS].selector),
        BT_CTX(c.v.cpu.seg[SEG_GS].selector), BT_CTX(c.v.cpu.seg[SEG_CS].selector), BT_CTX(c.v.cpu.seg[SEG_SS].selector),
    };
    for (unsigned n = 0; n < sizeof(fields) / sizeof(fields[0]); n++)
        if (fields[n] == field)
            return true;
    return false;
}

static enum kind field_kind(int32_t field)
{
    if (field == BT_CTX(poll) || field == BT_CTX(poll_sti) || field == BT_CTX(segment_guard[0]) || field == BT_CTX(segment_guard[1]))
        return POLL;
    if (field == BT_CTX(host_rsp))
        return HOST_RSP;
    if (field >= BT_CTX(table_of) && field < BT_CTX(table_of) + 8 * (int32_t)VIEW_COUNT && (field - BT_CTX(table_of)) % 8 == 0)
        return TABLE;
    return is_guest_field(field) || is_read_only(field) ? PLAIN : HOST;
}

static bool field_load(int32_t field, struct sum *value)
{
    for (unsigned n = 0; n < m.now.fields; n++)
        if (m.now.field[n].field == field) {
            *value = m.now.field[n].value;
            return true;
        }
    enum kind kind = field_kind(field);
    if (kind == HOST)
        return fail("reads field %d of the context, which nothing was stored to", (int)(field + (int32_t)BT_CTX_BYTES));
    *value = unknown(kind);
    if (m.now.fields < FIELDS_MAX) {
        m.now.field[m.now.fields].field = field;
        m.now.field[m.now.fields++].value = *value;
    }
    return true;
}

static bool field_store(int32_t field, struct sum value)
{
    if (!is_guest_field(field) && !is_scratch(field))
        return fail("writes field %d of the context", (int)(field + (int32_t)BT_CTX_BYTES));
    if (is_guest_field(field) && secret(&value))
        return fail("stores a host value where the guest's are");
    unsigned n = 0;
    while (n < m.now.fields && m.now.field[n].field != field)
        n++;
    if (n == FIELDS_MAX)
        return fail("too many fields");
    m.now.field[n].field = field;
    m.now.field[n].value = value;
    if (n == m.now.fields)
        m.now.fields++;
    return true;
}

static bool fact_add(struct sum of, int64_t bytes)
{
    if (bytes < 1 || bytes > CHECKED_MAX)
        return fail("checks %lld bytes", (long long)bytes);
    if (m.now.facts == FACTS_MAX)
        return fail("too many checks");
    m.now.fact[m.now.facts++] = (struct fact){of, bytes};
    return true;
}

/* ---- memory ---- */

static const ZydisDecodedOperand *memory_operand(unsigned *count)
{
    const ZydisDecodedOperand *found = NULL;
    *count = 0;
    for (unsigned n = 0; n < m.zi.operand_count; n++)
        if (m.op[n].type == ZYDIS_OPERAND_TYPE_MEMORY && m.op[n].mem.type != ZYDIS_MEMOP_TYPE_AGEN) {
            found = &m.op[n];
            ++*count;
        }
    return found;
}

static struct sum address_of(const ZydisDecodedOperand *op)
{
    struct sum s = constant((uint64_t)op->mem.disp.value);
    if (op->mem.base != ZYDIS_REGISTER_NONE)
        s = added(s, reg_sum(op->mem.base), 1);
    if (op->mem.index != ZYDIS_REGISTER_NONE)
        s = added(s, reg_sum(op->mem.index), op->mem.scale);
    return s;
}

/* Raises #GP itself unless naturally aligned (SDM vol. 1, 10.4.1.1 and 14.9; vol. 2, CMPXCHG16B). */
static bool aligned_by_itself(unsigned bytes)
{
    switch (m.zi.mnemonic) {
    case ZYDIS_MNEMONIC_CMPXCHG16B: case ZYDIS_MNEMONIC_VMOVAPS: case ZYDIS_MNEMONIC_VMOVAPD: case ZYDIS_MNEMONIC_VMOVDQA:
    case ZYDIS_MNEMONIC_VMOVDQA32: case ZYDIS_MNEMONIC_VMOVDQA64: case ZYDIS_MNEMONIC_VMOVNTPS: case ZYDIS_MNEMONIC_VMOVNTPD:
    case ZYDIS_MNEMONIC_VMOVNTDQ: case ZYDIS_MNEMONIC_VMOVNTDQA:
        return true;
    case ZYDIS_MNEMONIC_MOVUPS: case ZYDIS_MNEMONIC_MOVUPD: case ZYDIS_MNEMONIC_MOVDQU: case ZYDIS_MNEMONIC_LDDQU: case ZYDIS_MNEMONIC_PCMPESTRI:
    case ZYDIS_MNEMONIC_PCMPESTRM: case ZYDIS_MNEMONIC_PCMPISTRI: case ZYDIS_MNEMONIC_PCMPISTRM:
        return false;
    default:
        return bytes == 16 && m.zi.encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY;
    }
}

static bool checked(struct sum x, struct sum y, int64_t bytes)
{
    for (unsigned n = 0; n < m.now.facts; n++) {
        int64_t from_x, from_y;
        if (difference(x, m.now.fact[n].of, &from_x) && difference(y, m.now.fact[n].of, &from_y) && from_x >= 0 && from_x + bytes <= m.now.fact[n].bytes &&
            from_y >= 0 && from_y < m.now.fact[n].bytes)
            return true;
    }
    return false;
}

/* Guest memory at address - V. */
static bool guest_access(struct sum address, unsigned bytes)
{
    unsigned where;
    const struct symbol *v = one_of(&address, V, &where);
    int64_t distance;
    if (!v)
        return fail("an address without V");
    if (v->extra != m.now.view)
        return fail("V of another view");
    struct sum x = added(address, symbol_sum(address.term[where].symbol), ~0ull), y = v->of;
    if (secret(&x))
        return fail("host values in an address besides V");
    if (m.zi.mnemonic == ZYDIS_MNEMONIC_BT || m.zi.mnemonic == ZYDIS_MNEMONIC_BTS || m.zi.mnemonic == ZYDIS_MNEMONIC_BTR || m.zi.mnemonic == ZYDIS_MNEMONIC_BTC)
        if (m.op[1].type == ZYDIS_OPERAND_TYPE_REGISTER) {
            struct sum offset = reg_sum(m.op[1].reg.value);
            if (bytes < 8)
                offset = made(bytes == 4 ? SIGNED32 : SIGNED16, 0, offset);
            x = added(x, made(SHIFTED, __builtin_ctz(bytes) + 3, offset), bytes);
        }
    bool same = difference(x, y, &distance) && !distance;
    if (same && (bytes == 1 || aligned_by_itself(bytes)))
        return true;
    return checked(x, y, bytes) || fail("%u bytes that no check has found in the page of V", bytes);
}

/* Reads of dispatch slots: `displacement` is 0 or leads to the witness. */
static bool slot_access(struct sum address, const struct symbol *entry, unsigned where, struct sum *value)
{
    struct sum rest = added(added(address, symbol_sum(address.term[where].symbol), ~0ull), entry->of, ~0ull * 4);
    const struct bt_layout *l = &m.e->layout;
    int64_t from_pool = l->witness - l->dt_pool;
    int64_t displacement = (int64_t)rest.constant;
    if (rest.count)
        return fail("a dispatch slot of another address than its entry");
    if (displacement && (displacement > from_pool || displacement <= from_pool - (int64_t)BT_DT_POOL_BYTES))
        return fail("a dispatch slot with displacement %lld", (long long)displacement);
    *value = displacement ? unknown(HOST) : made(SLOT, 0, entry->of);
    return true;
}

/* ---- instructions of the translator's own ---- */

static void set(ZydisRegister reg, struct sum value)
{
    m.now.reg[gpr(reg)] = value;
}

static bool is_gs(const ZydisDecodedOperand *op)
{
    return op->mem.segment == ZYDIS_REGISTER_GS;
}

static bool is_field(const ZydisDecodedOperand *op)
{
    return is_gs(op) && op->mem.base == ZYDIS_REGISTER_NONE && op->mem.index == ZYDIS_REGISTER_NONE && m.zi.address_width == 64;
}

static bool pext(const ZydisDecodedOperand *memory)
{
    static const struct {
        int32_t field;
        enum kind kind;
    } masks[] = {{BT_CTX(mask_low12), LOW12}, {BT_CTX(mask_bit12), BIT12}, {BT_CTX(exec_mask), INDEX}, {BT_CTX(mask_page), BEYOND}, {BT_CTX(mask_count), BIG}};
    struct sum from = reg_sum(m.op[1].reg.value);
    for (unsigned n = 0; n < sizeof(masks) / sizeof(masks[0]); n++)
        if (masks[n].field == memory->mem.disp.value) {
            set(m.op[0].reg.value, made(masks[n].kind, 0, from));
            return true;
        }
    if (memory->mem.disp.value != BT_CTX(mask_arith))
        return fail("reads another field of the context than a mask");
    set(m.op[0].reg.value, unknown(PLAIN));
    return true;
}

static bool gs_table(const ZydisDecodedOperand *memory)
{
    struct sum index = reg_sum(memory->mem.index != ZYDIS_REGISTER_NONE ? memory->mem.index : memory->mem.base);
    const struct symbol *s;
    int64_t disp = memory->mem.disp.value;
    bool scaled = memory->mem.base == ZYDIS_REGISTER_NONE && memory->mem.scale == 8;
    if (m.zi.mnemonic == ZYDIS_MNEMONIC_MOV && is64(m.op[0].reg.value) && scaled && m.zi.address_width == 32 && !disp && (s = only(&index, ROR12))) {
        if (legacy() && !is_narrow(&s->of))
            return fail("an address of 32-bit code with more than 32 bits");
        set(m.op[0].reg.value, made(V, m.now.view, s->of));
        return true;
    }
    if (m.zi.mnemonic == ZYDIS_MNEMONIC_MOV && is64(m.op[0].reg.value) && scaled && m.zi.address_width == 64 && disp == BT_EXEC_TABLE_OFFSET &&
        (s = only(&index, INDEX))) {
        set(m.op[0].reg.value, made(ENTRY, 0, s->of));
        return true;
    }
    bool byte = m.zi.mnemonic == ZYDIS_MNEMONIC_MOVZX && memory->size == 8 && memory->mem.index == ZYDIS_REGISTER_NONE && m.zi.address_width == 64;
    if (byte && (s = only(&index, LOW12)) && disp >= BT_CHECK && disp < BT_CHECK + CHECKED_MAX) {
        set(m.op[0].reg.value, unknown(PLAIN));
        return fact_add(s->of, disp - BT_CHECK + 1);
    }
    if (byte && (s = only(&index, LOW12)) && disp >= BT_SPLIT && disp < BT_SPLIT + CHECKED_MAX) {
        set(m.op[0].reg.value, made(SPLIT, disp - BT_SPLIT + 1, s->of));
        return true;
    }
    if (byte && disp == BT_CHECK) { /* of WRFSBASE: faults unless the register is 0; nobody uses the byte */
        set(m.op[0].reg.value, unknown(HOST));
        return true;
    }
    return fail("a table that is none");
}

static bool gs_store(const ZydisDecodedOperand *memory)
{
    int32_t field = (int32_t)memory->mem.disp.value;
    if (m.op[1].type == ZYDIS_OPERAND_TYPE_REGISTER && is64(m.op[1].reg.value))
        return field_store(field, reg_sum(m.op[1].reg.value));
    if (m.op[1].type != ZYDIS_OPERAND_TYPE_IMMEDIATE)
        return fail("a store to the context of another size");
    uint64_t value = m.op[1].imm.value.u;
    if (field == BT_CTX(ac) && memory->size == 64 && !(value & ~RFLAGS_AC))
        return true;
    if (field == BT_CTX(x87_last) && memory->size == 64 && value & BT_X87_RAN && value < 2 * BT_X87_RAN)
        return true;
    if (field == BT_CTX(c.v.cpu.rflags) + 1 && memory->size == 8 && !(value & ~(RFLAGS_IF >> 8)))
        return true;
    return fail("an immediate stored to the context");
}

/* False: not one of these, or wrong. *done: it was one. */
static bool own_gs(const ZydisDecodedOperand *memory, bool *done)
{
    *done = true;
    struct sum value;
    if (m.zi.mnemonic == ZYDIS_MNEMONIC_PEXT || m.zi.mnemonic == ZYDIS_MNEMONIC_PDEP)
        return is_field(memory) ? pext(memory) : fail("PEXT with a mask from a table");
    if (!is_field(memory))
        return gs_table(memory);
    if (m.zi.mnemonic == ZYDIS_MNEMONIC_MOV && memory == &m.op[0])
        return gs_store(memory);
    if (m.zi.mnemonic == ZYDIS_MNEMONIC_MOV && is64(m.op[0].reg.value)) {
        if (!field_load((int32_t)memory->mem.disp.value, &value))
            return false;
        set(m.op[0].reg.value, value);
        return true;
    }
    if ((m.zi.mnemonic == ZYDIS_MNEMONIC_MOV && memory->size < 64) || (m.zi.mnemonic == ZYDIS_MNEMONIC_MOVZX && memory->size == 16)) {
        if (!is_read_only((int32_t)memory->mem.disp.value) && !is_guest_field((int32_t)memory->mem.disp.value))
            return fail("reads part of a field of the context");
        set(m.op[0].reg.value, unknown(PLAIN));
        return true;
    }
    return fail("an access to the context that the translator does not make");
}

static bool own_flags(bool *done)
{
    *done = m.zi.mnemonic == ZYDIS_MNEMONIC_PUSHFQ || m.zi.mnemonic == ZYDIS_MNEMONIC_POP;
    if (!*done)
        return true;
    struct sum rsp = m.now.reg[GPR_RSP];
    unsigned where;
    if (!one_of(&rsp, HOST_RSP, &where) || rsp.count != 1 || rsp.constant != (m.zi.mnemonic == ZYDIS_MNEMONIC_POP ? -8ull : 0))
        return fail("the stack pointer is not the host's");
    if (m.zi.mnemonic == ZYDIS_MNEMONIC_POP && (m.op[0].type != ZYDIS_OPERAND_TYPE_REGISTER || gpr(m.op[0].reg.value) == GPR_RSP))
        return fail("pops to a wrong place");
    m.now.reg[GPR_RSP] = added(rsp, constant(m.zi.mnemonic == ZYDIS_MNEMONIC_POP ? 8 : -8ull), 1);
    if (m.zi.mnemonic == ZYDIS_MNEMONIC_POP)
        set(m.op[0].reg.value, unknown(HOST));
    return true;
}

static bool is_zero(struct sum s)
{
    for (unsigned k = 0; k < s.count; k++) {
        bool found = false;
        for (unsigned n = 0; n < m.now.zeros; n++)
            found |= m.now.zero[n] == s.term[k].symbol;
        if (!found)
            return false;
    }
    return !s.constant && s.count;
}

/* REP MOVS and REP STOS: host addresses in RDI and RSI, all in one page each, as sums that are 0 have told. */
static bool own_string(bool *done)
{
    bool moves = m.zi.opcode == 0xa4 || m.zi.opcode == 0xa5, stores = m.zi.opcode == 0xaa || m.zi.opcode == 0xab;
    *done = m.zi.meta.category == ZYDIS_CATEGORY_STRINGOP && (moves || stores) && m.zi.encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY;
    if (!*done)
        return true;
    if (!(m.zi.attributes & ZYDIS_ATTRIB_HAS_REP) || m.zi.address_width != 64 || m.zi.attributes & ZYDIS_ATTRIB_HAS_SEGMENT)
        return fail("prefixes of a string instruction");
    uint64_t size = m.zi.opcode & 1 ? m.zi.operand_width / 8 : 1;
    struct sum count = m.now.reg[GPR_RCX];
    if (!is_zero(made(BIG, 0, count)))
        return fail("a string of any length");
    for (unsigned n = 0; n < (moves ? 2u : 1u); n++) {
        unsigned reg = n ? GPR_RSI : GPR_RDI, where;
        const struct symbol *v = one_of(&m.now.reg[reg], V, &where);
        if (!v || v->extra != m.now.view)
            return fail("a string that is not guest memory");
        struct sum x = added(m.now.reg[reg], symbol_sum(m.now.reg[reg].term[where].symbol), ~0ull), last;
        int64_t distance;
        if (!difference(x, v->of, &distance) || distance)
            return fail("V of another address than the string's");
        last = added(added(made(LOW12, 0, x), count, size), constant(1), ~0ull);
        if (!is_zero(made(BEYOND, 0, last)))
            return fail("a string that may go on in the next page");
    }
    m.now.reg[GPR_RDI] = unknown(HOST);
    if (moves)
        m.now.reg[GPR_RSI] = unknown(HOST);
    m.now.reg[GPR_RCX] = unknown(PLAIN);
    return true;
}

static bool own(bool *done)
{
    *done = true;
    bool wide = m.op[0].type == ZYDIS_OPERAND_TYPE_REGISTER && is64(m.op[0].reg.value);
    switch (m.zi.mnemonic) {
    case ZYDIS_MNEMONIC_LEA:
        set(m.op[0].reg.value, wide && m.zi.address_width == 64 && m.op[1].mem.base != ZYDIS_REGISTER_RIP ? address_of(&m.op[1]) : unknown(PLAIN));
        for (unsigned n = 0; n < 2; n++) {
            struct sum part = reg_sum(n ? m.op[1].mem.index : m.op[1].mem.base);
            if (!wide && secret(&part))
                return fail("part of a host value");
        }
        return true;
    case ZYDIS_MNEMONIC_RORX:
        if (m.op[1].type != ZYDIS_OPERAND_TYPE_REGISTER)
            break;
        if (wide && m.op[2].imm.value.u == 12) {
            set(m.op[0].reg.value, made(ROR12, 0, reg_sum(m.op[1].reg.value)));
            return true;
        }
        break;
    case ZYDIS_MNEMONIC_MOV:
        if (wide && m.op[1].type == ZYDIS_OPERAND_TYPE_REGISTER && is64(m.op[1].reg.value)) {
            set(m.op[0].reg.value, reg_sum(m.op[1].reg.value));
            return true;
        }
        if (m.op[0].type == ZYDIS_OPERAND_TYPE_REGISTER && m.op[0].size >= 32 && m.op[1].type == ZYDIS_OPERAND_TYPE_IMMEDIATE) {
            set(m.op[0].reg.value, constant(m.op[0].size == 32 ? (uint32_t)m.op[1].imm.value.u : m.op[1].imm.value.u));
            return true;
        }
        break;
    case ZYDIS_MNEMONIC_ADD:
    case ZYDIS_MNEMONIC_SUB:
    case ZYDIS_MNEMONIC_INC:
    case ZYDIS_MNEMONIC_DEC: {
        bool counts = m.zi.mnemonic == ZYDIS_MNEMONIC_INC || m.zi.mnemonic == ZYDIS_MNEMONIC_DEC;
        bool less = m.zi.mnemonic == ZYDIS_MNEMONIC_SUB || m.zi.mnemonic == ZYDIS_MNEMONIC_DEC;
        struct sum from = reg_sum(m.op[0].reg.value);
        if (!wide || secret(&from) || (!counts && m.op[1].type != ZYDIS_OPERAND_TYPE_IMMEDIATE))
            break;
        set(m.op[0].reg.value, added(from, constant(counts ? 1 : m.op[1].imm.value.u), less ? ~0ull : 1));
        return true;
    }
    case ZYDIS_MNEMONIC_NOT: {
        struct sum from = reg_sum(m.op[0].reg.value);
        if (!wide || secret(&from))
            break;
        set(m.op[0].reg.value, added(constant(~0ull), from, ~0ull));
        return true;
    }
    case ZYDIS_MNEMONIC_MOVSXD:
    case ZYDIS_MNEMONIC_MOVSX:
        if (wide && m.op[1].type == ZYDIS_OPERAND_TYPE_REGISTER && m.op[1].size >= 16) {
            set(m.op[0].reg.value, made(m.op[1].size == 32 ? SIGNED32 : SIGNED16, 0, reg_sum(m.op[1].reg.value)));
            return true;
        }
        break;
    case ZYDIS_MNEMONIC_SARX:
        if (wide && m.op[1].type == ZYDIS_OPERAND_TYPE_REGISTER) {
            struct sum by = reg_sum(m.op[2].reg.value), from = reg_sum(m.op[1].reg.value);
            if (by.count || secret(&from))
                break;
            set(m.op[0].reg.value, made(SHIFTED, (int64_t)by.constant, from));
            return true;
        }
        break;
    case ZYDIS_MNEMONIC_WRGSBASE: {
        unsigned where;
        struct sum to = reg_sum(m.op[0].reg.value);
        if (!wide || !one_of(&to, TABLE, &where) || to.count != 1 || to.constant)
            return fail("GS gets another base than a view's");
        m.now.view++;
        return true;
    }
    default:
        break;
    }
    *done = false;
    return true;
}

/* ---- what else may be there: the guest's own instructions ---- */

static bool category_allowed(void)
{
    switch (m.zi.meta.category) {
    case ZYDIS_CATEGORY_ADOX_ADCX: case ZYDIS_CATEGORY_AES: case ZYDIS_CATEGORY_AVX: case ZYDIS_CATEGORY_AVX2: case ZYDIS_CATEGORY_AVX512:
    case ZYDIS_CATEGORY_AVX512_BITALG: case ZYDIS_CATEGORY_AVX512_VBMI: case ZYDIS_CATEGORY_AVX512_VP2INTERSECT: case ZYDIS_CATEGORY_BINARY:
    case ZYDIS_CATEGORY_BITBYTE: case ZYDIS_CATEGORY_BLEND: case ZYDIS_CATEGORY_BMI1: case ZYDIS_CATEGORY_BMI2: case ZYDIS_CATEGORY_BROADCAST:
    case ZYDIS_CATEGORY_CMOV: case ZYDIS_CATEGORY_COMPRESS: case ZYDIS_CATEGORY_CONFLICT: case ZYDIS_CATEGORY_CONVERT: case ZYDIS_CATEGORY_DATAXFER:
    case ZYDIS_CATEGORY_DECIMAL: case ZYDIS_CATEGORY_EXPAND: case ZYDIS_CATEGORY_FCMOV: case ZYDIS_CATEGORY_FLAGOP: case ZYDIS_CATEGORY_FMA4:
    case ZYDIS_CATEGORY_FP16: case ZYDIS_CATEGORY_GFNI: case ZYDIS_CATEGORY_IFMA: case ZYDIS_CATEGORY_KMASK: case ZYDIS_CATEGORY_LOGICAL:
    case ZYDIS_CATEGORY_LOGICAL_FP: case ZYDIS_CATEGORY_LZCNT: case ZYDIS_CATEGORY_MMX: case ZYDIS_CATEGORY_MOVDIR: case ZYDIS_CATEGORY_PCLMULQDQ:
    case ZYDIS_CATEGORY_RDRAND: case ZYDIS_CATEGORY_RDSEED: case ZYDIS_CATEGORY_ROTATE: case ZYDIS_CATEGORY_SEMAPHORE: case ZYDIS_CATEGORY_SERIALIZE:
    case ZYDIS_CATEGORY_SETCC: case ZYDIS_CATEGORY_SHA: case ZYDIS_CATEGORY_SHIFT: case ZYDIS_CATEGORY_SSE: case ZYDIS_CATEGORY_STTNI: case ZYDIS_CATEGORY_TBM: case ZYDIS_CATEGORY_VAES:
    case ZYDIS_CATEGORY_VBMI2: case ZYDIS_CATEGORY_VEX: case ZYDIS_CATEGORY_VFMA: case ZYDIS_CATEGORY_VPCLMULQDQ: case ZYDIS_CATEGORY_XOP: case ZYDIS_CATEGORY_NOP:
    case ZYDIS_CATEGORY_X87_ALU:
        return true;
    default:
        break;
    }
    switch (m.zi.mnemonic) {
    case ZYDIS_MNEMONIC_PAUSE: case ZYDIS_MNEMONIC_LFENCE: case ZYDIS_MNEMONIC_SFENCE: case ZYDIS_MNEMONIC_MFENCE: case ZYDIS_MNEMONIC_RDTSC:
        return true;
    default:
        return false;
    }
}

/* Instructions in those categories that reach further than registers and one operand. */
static bool mnemonic_refused(void)
{
    switch (m.zi.mnemonic) {
    case ZYDIS_MNEMONIC_CLI: case ZYDIS_MNEMONIC_STI: case ZYDIS_MNEMONIC_STD: case ZYDIS_MNEMONIC_CLD: case ZYDIS_MNEMONIC_RDPID: case ZYDIS_MNEMONIC_MOVDIR64B:
    case ZYDIS_MNEMONIC_STAC: case ZYDIS_MNEMONIC_CLAC: case ZYDIS_MNEMONIC_CLTS: case ZYDIS_MNEMONIC_XLAT:
    case ZYDIS_MNEMONIC_FNSTENV: case ZYDIS_MNEMONIC_FNSAVE: case ZYDIS_MNEMONIC_FLDENV: case ZYDIS_MNEMONIC_FRSTOR: /* store where the last instruction was */
        return true;
    default:
        return m.zi.attributes & (ZYDIS_ATTRIB_IS_PRIVILEGED | ZYDIS_ATTRIB_HAS_XACQUIRE | ZYDIS_ATTRIB_HAS_XRELEASE | ZYDIS_ATTRIB_HAS_REP |
                                  ZYDIS_ATTRIB_HAS_REPE | ZYDIS_ATTRIB_HAS_REPNE) ||
               m.zi.meta.branch_type != ZYDIS_BRANCH_TYPE_NONE || m.zi.encoding == ZYDIS_INSTRUCTION_ENCODING_3DNOW;
    }
}

static bool register_class_allowed(ZydisRegister reg)
{
    switch (ZydisRegisterGetClass(reg)) {
    case ZYDIS_REGCLASS_GPR8: case ZYDIS_REGCLASS_GPR16: case ZYDIS_REGCLASS_GPR32: case ZYDIS_REGCLASS_GPR64: case ZYDIS_REGCLASS_X87: case ZYDIS_REGCLASS_MMX: case ZYDIS_REGCLASS_XMM:
    case ZYDIS_REGCLASS_YMM: case ZYDIS_REGCLASS_ZMM: case ZYDIS_REGCLASS_MASK: case ZYDIS_REGCLASS_FLAGS:
        return true;
    default:
        return reg == ZYDIS_REGISTER_MXCSR || reg == ZYDIS_REGISTER_X87STATUS || reg == ZYDIS_REGISTER_X87TAG || reg == ZYDIS_REGISTER_X87CONTROL;
    }
}

static bool registers_read_allowed(void)
{
    for (unsigned n = 0; n < m.zi.operand_count; n++) {
        if (m.op[n].type != ZYDIS_OPERAND_TYPE_REGISTER)
            continue;
        if (!register_class_allowed(m.op[n].reg.value))
            return fail("register %s", ZydisRegisterGetString(m.op[n].reg.value));
        struct sum value = reg_sum(m.op[n].reg.value);
        if (gpr(m.op[n].reg.value) >= 0 && secret(&value) && (m.op[n].actions & ZYDIS_OPERAND_ACTION_MASK_READ))
            return fail("computes with a host value");
    }
    return true;
}

static void registers_written(void)
{
    for (unsigned n = 0; n < m.zi.operand_count; n++)
        if (m.op[n].type == ZYDIS_OPERAND_TYPE_REGISTER && (m.op[n].actions & ZYDIS_OPERAND_ACTION_MASK_WRITE) && gpr(m.op[n].reg.value) >= 0)
            set(m.op[n].reg.value, unknown(PLAIN));
}

static bool guests(const ZydisDecodedOperand *memory)
{
    if (!category_allowed() || mnemonic_refused())
        return fail("category %s", ZydisCategoryGetString(m.zi.meta.category));
    if (!registers_read_allowed())
        return false;
    if (memory) {
        if (memory->encoding != ZYDIS_OPERAND_ENCODING_MODRM_RM || memory->mem.type != ZYDIS_MEMOP_TYPE_MEM || m.zi.address_width != 64 ||
            memory->mem.segment == ZYDIS_REGISTER_FS || memory->mem.base == ZYDIS_REGISTER_RIP || memory->size % 8 || !memory->size || memory->size > 512)
            return fail("a memory operand of another shape");
        struct sum address = address_of(memory);
        unsigned where;
        const struct symbol *entry = one_of(&address, ENTRY, &where);
        if (only(&address, POLL) && memory->size == 8 * POLL_BYTES && m.zi.mnemonic == ZYDIS_MNEMONIC_MOV && memory == &m.op[1]) {
            set(m.op[0].reg.value, unknown(PLAIN));
            return true;
        }
        if (entry) {
            struct sum value;
            if (m.zi.mnemonic != ZYDIS_MNEMONIC_MOV || memory != &m.op[1] || memory->size != 32 || !slot_access(address, entry, where, &value))
                return fail("what is done with a dispatch entry");
            set(m.op[0].reg.value, value);
            return true;
        }
        if (!guest_access(address, memory->size / 8))
            return false;
    }
    registers_written();
    return true;
}

/* ---- branches ---- */

static bool canonical(void)
{
    for (unsigned n = 0; n < 16; n++)
        if (!is_free(n) && secret(&m.now.reg[n]))
            return fail("leaves with a host value in register %u", n);
    for (unsigned n = 0; legacy() && n < GPR_R8; n++)
        if (!is_narrow(&m.now.reg[n]))
            return fail("leaves 32-bit code with more in register %u", n);
    if (!m.now.entered)
        return fail("leaves before page_va is set");
    for (unsigned n = 0; n < m.now.fields; n++)
        if (is_guest_field(m.now.field[n].field) && secret(&m.now.field[n].value))
            return fail("leaves with a host value in the context");
    return true;
}

/* Index of the block's code by byte, or -1. */
static int place(uint32_t tc)
{
    const struct bt_block *b = m.block;
    if (tc >= b->tc_start && tc < b->tc_end)
        return (int)(tc - b->tc_start);
    if (tc >= b->cold_start && tc < b->cold_end)
        return (int)(BT_BLOCK_TC_MAX + tc - b->cold_start);
    return -1;
}

static bool join_found(int at)
{
    m.join[at] = m.again = true;
    return fail("a join");
}

static bool branch_verify(uint32_t tc)
{
    int at = place(tc);
    const struct bt_stubs *stubs = &m.e->stubs;
    if (at >= 0 && !m.join[at] && tc != m.block->tc_chain && tc != m.block->tc_start) {
        if (m.waiting[at] || at <= place(m.at))
            return join_found(at);
        m.waiting[at] = malloc(sizeof(*m.waiting[at]));
        *m.waiting[at] = m.now;
        return true;
    }
    if (!canonical())
        return false;
    if (at >= 0 && m.join[at])
        return true;
    if (tc == stubs->leave_in_page || tc == stubs->link || tc == stubs->link_far)
        return m.now.reg[GPR_R10].count == 0 ? true : fail("leaves for no reason");
    const struct bt_block *target = cache_find(m.e, (uintptr_t)m.e->layout.tc_exec + tc);
    if (target && tc == target->tc_chain && target->page == m.block->page)
        return true;
    if (target && tc == target->tc_start)
        return true; /* behind the slot's read, whose displacement slot_access has seen */
    return fail("jumps to %#x", tc);
}

static bool jump(void)
{
    const ZydisDecodedOperand *op = &m.op[0];
    m.live = false;
    if (op->type == ZYDIS_OPERAND_TYPE_REGISTER) {
        struct sum to = reg_sum(op->reg.value);
        unsigned where;
        const struct symbol *slot = one_of(&to, SLOT, &where);
        int64_t distance;
        if (!slot || to.count != 1 || to.constant != (uintptr_t)m.e->layout.tc_exec || !difference(slot->of, m.now.reg[GPR_R11], &distance) || distance)
            return fail("jumps to what is no slot's block");
        return canonical();
    }
    if (op->type == ZYDIS_OPERAND_TYPE_MEMORY) {
        if (!is_field(op) || (op->mem.disp.value != BT_CTX(syscall_stub) && op->mem.disp.value != BT_CTX(sysret_stub)))
            return fail("jumps by way of memory");
        return canonical();
    }
    return branch_verify((uint32_t)(m.at + m.zi.length + m.op[0].imm.value.s));
}

/* RCX is 0 where JRCXZ leads. */
static bool zeros_learn(void)
{
    struct sum s = m.now.reg[GPR_RCX];
    if (s.constant)
        return true;
    for (unsigned n = 0; n < s.count; n++)
        if (s.term[n].factor != 1 || (m.symbol[s.term[n].symbol].kind != BEYOND && m.symbol[s.term[n].symbol].kind != BIG)) {
            const struct symbol *one = only(&s, SPLIT);
            if (one)
                return fact_add(one->of, one->extra);
            if ((one = only(&s, BIT12)) && one->of.count == 1 && one->of.term[0].factor == 1 && m.symbol[one->of.term[0].symbol].kind == LOW12)
                return fact_add(m.symbol[one->of.term[0].symbol].of, (int64_t)one->of.constant + 1);
            return true;
        }
    for (unsigned n = 0; n < s.count && m.now.zeros < ZEROS_MAX; n++) /* sums of less than 2^53 each: none wraps around */
        m.now.zero[m.now.zeros++] = s.term[n].symbol;
    return true;
}

static bool conditional(void)
{
    uint32_t to = (uint32_t)(m.at + m.zi.length + m.op[0].imm.value.s);
    struct state fallthrough = m.now;
    bool zero = m.zi.mnemonic == ZYDIS_MNEMONIC_JRCXZ, loops = m.zi.opcode >= 0xe0 && m.zi.opcode <= 0xe2 && m.zi.opcode_map == ZYDIS_OPCODE_MAP_DEFAULT;
    if (loops)
        m.now.reg[GPR_RCX] = fallthrough.reg[GPR_RCX] = unknown(PLAIN);
    if (zero && !zeros_learn())
        return false;
    if (!branch_verify(to))
        return false;
    m.now = fallthrough;
    return true;
}

/* ---- a block ---- */

static bool step(void)
{
    unsigned count;
    const ZydisDecodedOperand *memory = memory_operand(&count);
    bool done;
    if (m.zi.mnemonic == ZYDIS_MNEMONIC_JMP)
        return jump();
    if (m.zi.meta.category == ZYDIS_CATEGORY_COND_BR)
        return conditional();
    if (!own_flags(&done) || done || !own_string(&done) || done)
        return !m.why[0];
    if (count > 1)
        return fail("several memory operands");
    if (memory && is_gs(memory))
        return own_gs(memory, &done) && !m.why[0];
    if (!memory && (!own(&done) || done))
        return !m.why[0];
    return guests(memory);
}

static void start(void)
{
    memset(&m.now, 0, sizeof(m.now));
    for (unsigned n = 0; n < 16; n++)
        m.now.reg[n] = unknown(is_free(n) ? HOST : PLAIN);
    m.now.entered = true;
}

static bool range(uint32_t from, uint32_t to)
{
    ZydisDecoder decoder;
    ZydisDecoderInit(&decoder, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
    for (m.at = from; m.at < to; m.at += m.zi.length) {
        struct state **waiting = &m.waiting[place(m.at)];
        if (m.join[place(m.at)]) {
            if (m.live && !canonical())
                return false;
            start();
            m.live = true;
            m.seen[place(m.at)] = true;
        }
        if (m.at == m.block->tc_chain) {
            struct sum page_va;
            if (!m.live || !field_load(BT_CTX(page_va), &page_va))
                return fail("the chain entry is not where the other one leads");
            start();
        }
        if (*waiting && m.live)
            return join_found(place(m.at));
        if (*waiting) {
            m.now = **waiting;
            free(*waiting);
            *waiting = NULL;
            m.live = true;
        }
        if (!m.live)
            return fail("nothing leads here");
        if (!ZYAN_SUCCESS(ZydisDecoderDecodeFull(&decoder, m.e->layout.tc_write + m.at, to - m.at, &m.zi, m.op)))
            return fail("no instruction");
        if (!step())
            return false;
    }
    return m.live ? fail("goes on beyond its end") : true;
}

static bool entry_begin(void)
{
    struct sum target = unknown(PLAIN), expected;
    start();
    m.now.reg[GPR_R11] = target;
    m.now.entered = false;
    m.live = true;
    ZydisDecoder decoder;
    ZydisDecoderInit(&decoder, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
    for (m.at = m.block->tc_start; m.at < m.block->tc_chain; m.at += m.zi.length)
        if (!ZYAN_SUCCESS(ZydisDecoderDecodeFull(&decoder, m.e->layout.tc_write + m.at, m.block->tc_chain - m.at, &m.zi, m.op)) || !step())
            return fail("the dynamic entry");
    int64_t distance;
    if (!field_load(BT_CTX(page_va), &expected) || !difference(target, expected, &distance) || distance != m.block->start)
        return fail("page_va is not the page of the target");
    return true;
}

static bool block_verify(void)
{
    m.symbols = 0;
    m.why[0] = 0;
    m.again = false;
    m.at = m.block->tc_start;
    memset(m.seen, 0, sizeof(m.seen));
    bool good = entry_begin() && range(m.block->tc_chain, m.block->tc_end) && range(m.block->cold_start, m.block->cold_end);
    for (unsigned n = 0; n < 2 * BT_BLOCK_TC_MAX; n++) {
        bool missed = m.waiting[n] || (m.join[n] && !m.seen[n]);
        free(m.waiting[n]);
        m.waiting[n] = NULL;
        if (good && missed)
            good = fail("a branch into the middle of an instruction");
    }
    return good;
}

const char *bt_verify(struct bt_engine *e, const struct bt_block *block)
{
    bool good;
    m.e = e;
    m.block = block;
    memset(m.join, 0, sizeof(m.join));
    do
        good = block_verify();
    while (!good && m.again);
    return good && !m.why[0] ? NULL : m.why;
}
