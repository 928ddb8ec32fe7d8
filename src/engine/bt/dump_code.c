/*
 * --dump-code: the guest's and the host's code of chosen blocks, side by side by site.
 *
 * What is translated while it contains one of the addresses is recorded: bytes and sites as published, since guest pages change and flushes take the rest. The host code of a block that
 * is still in the cache is shown as it is now, with its jumps linked. The newest RECORDS_MAX records are kept.
 * Threading: e->lock held.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "arch/host.h"
#include "engine/bt/bt_priv.h"

#define RECORDS_MAX 64u
#define TEXT_BYTES 128u

struct record {
    gva_t gva;
    gpa_t gpa;
    uint64_t epoch;
    struct bt_mode mode;
    struct bt_block block; /* its pointers are not for use */
    struct bt_site *sites; /* these three lie behind this structure */
    uint8_t *guest, *host;
};

struct dump_code {
    struct code_address *address;
    unsigned address_count;
    uint64_t recorded; /* the newest is record[(recorded - 1) % RECORDS_MAX] */
    struct record *record[RECORDS_MAX];
};

int dump_code_create(struct bt_engine *e, const struct code_address *address, unsigned count, struct error *err)
{
    struct dump_code *dump = calloc(1, sizeof(*dump));
    if (dump)
        dump->address = calloc(count, sizeof(*address));
    if (!dump || !dump->address) {
        free(dump);
        return error_set(err, -ENOMEM, "no memory for --dump-code");
    }
    memcpy(dump->address, address, count * sizeof(*address));
    dump->address_count = count;
    e->dump_code = dump;
    return 0;
}

void dump_code_destroy(struct bt_engine *e)
{
    if (!e->dump_code)
        return;
    for (unsigned n = 0; n < RECORDS_MAX; n++)
        free(e->dump_code->record[n]);
    free(e->dump_code->address);
    free(e->dump_code);
    e->dump_code = NULL;
}

/* ---- recording ---- */

static bool wanted(const struct dump_code *dump, const struct bt_block *block)
{
    const struct bt_page *page = block->page;
    for (unsigned n = 0; n < dump->address_count; n++) {
        const struct code_address *address = &dump->address[n];
        if (address->address - ((address->physical ? page->gpa : page->gva) + block->start) < block->length)
            return true;
    }
    return false;
}

void dump_code_add(struct bt_engine *e, const struct bt_block *block)
{
    struct dump_code *dump = e->dump_code;
    const struct bt_page *page = block->page;
    if (!wanted(dump, block))
        return;
    size_t sites_bytes = block->site_count * sizeof(struct bt_site), host_bytes = block->tc_end - block->tc_start;
    struct record *record = malloc(sizeof(*record) + sites_bytes + block->length + host_bytes);
    if (!record)
        return;
    *record = (struct record){page->gva + block->start, page->gpa + block->start, e->epoch, page->mode, *block, .sites = (struct bt_site *)(record + 1)};
    record->guest = (uint8_t *)record->sites + sites_bytes;
    record->host = record->guest + block->length;
    memcpy(record->sites, &e->sites[block->site_first], sites_bytes);
    memcpy(record->guest, e->layout.window_r + page->offset + block->start, block->length);
    memcpy(record->host, e->layout.tc_write + block->tc_start, host_bytes);
    struct record **place = &dump->record[dump->recorded++ % RECORDS_MAX];
    free(*place);
    *place = record;
}

/* ---- names of what host code refers to ---- */

static const char *const register_names[16] = {"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
                                               "r8",  "r9",  "r10", "r11", "r12", "r13", "r14", "r15"};

static const struct {
    const char *name;
    int32_t at; /* from GS base */
    unsigned bytes;
} fields[] = {
#define FIELD(field) {#field, BT_CTX(field), sizeof(((struct bt_vcpu *)0)->field)}
    FIELD(page_va), FIELD(exec_mask), FIELD(poll), FIELD(poll_sti), FIELD(host_rsp), FIELD(host_flags), FIELD(enter_target), FIELD(link_site),
    FIELD(segment_guard), FIELD(scratch), FIELD(mask_low12), FIELD(mask_bit12), FIELD(mask_arith), FIELD(c.v.cpu.rflags), FIELD(c.v.cpu),
#undef FIELD
};

static const char *context_name(int64_t at)
{
    for (unsigned n = 0; n < 16; n++)
        if (at == BT_CTX_GPR(n))
            return register_names[n];
    for (size_t n = 0; n < sizeof(fields) / sizeof(*fields); n++)
        if (at >= fields[n].at && at < fields[n].at + (int64_t)fields[n].bytes)
            return fields[n].name;
    return NULL;
}

static const char *stub_name(const struct bt_engine *e, uint64_t address)
{
    uint64_t offset = address - (uintptr_t)e->layout.tc_exec;
    return offset == e->stubs.leave ? "leave" : offset == e->stubs.lookup ? "lookup" : NULL;
}

/* Of the context's fields and the stubs; NULL for anything else. */
static const char *operand_name(const struct bt_engine *e, const ZydisDecodedInstruction *zi, const ZydisDecodedOperand *op, uint64_t address)
{
    ZyanU64 target;
    for (unsigned n = 0; n < zi->operand_count_visible; n++) {
        if (op[n].type == ZYDIS_OPERAND_TYPE_MEMORY && op[n].mem.segment == ZYDIS_REGISTER_GS && op[n].mem.base == ZYDIS_REGISTER_NONE &&
            op[n].mem.index == ZYDIS_REGISTER_NONE)
            return context_name(op[n].mem.disp.value);
        if (op[n].type == ZYDIS_OPERAND_TYPE_IMMEDIATE && op[n].imm.is_relative && ZYAN_SUCCESS(ZydisCalcAbsoluteAddress(zi, &op[n], address, &target)))
            return stub_name(e, target);
    }
    return NULL;
}

/* ---- printing ---- */

struct listing {
    const struct bt_engine *e;
    FILE *out;
    const struct record *record;
    const uint8_t *host;
    ZydisDecoder guest_decoder, host_decoder;
    ZydisFormatter formatter;
};

/* Length of the instruction; what is none is one byte. Host code gets names. */
static unsigned format(const struct listing *l, const ZydisDecoder *decoder, const uint8_t *bytes, size_t available, uint64_t address, char text[TEXT_BYTES])
{
    ZydisDecodedInstruction zi;
    ZydisDecodedOperand op[ZYDIS_MAX_OPERAND_COUNT];
    if (ZYAN_SUCCESS(ZydisDecoderDecodeFull(decoder, bytes, available, &zi, op)) &&
        ZYAN_SUCCESS(ZydisFormatterFormatInstruction(&l->formatter, &zi, op, zi.operand_count_visible, text, TEXT_BYTES, address, NULL))) {
        const char *name = decoder == &l->host_decoder ? operand_name(l->e, &zi, op, address) : NULL;
        size_t length = strlen(text);
        if (name)
            snprintf(text + length, TEXT_BYTES - length, "  ; %s", name);
        return zi.length;
    }
    snprintf(text, TEXT_BYTES, "(byte %02x)", *bytes);
    return 1;
}

static void print_guest(const struct listing *l)
{
    const struct record *r = l->record;
    char text[TEXT_BYTES];
    for (unsigned at = 0, length; at < r->block.length; at += length) {
        length = format(l, &l->guest_decoder, r->guest + at, r->block.length - at, r->gva + at, text);
        fprintf(l->out, "  %016" PRIx64 "  %s\n", r->gva + at, text);
    }
}

static void print_site(const struct listing *l, unsigned index)
{
    const struct record *r = l->record;
    const struct bt_site *site = &r->sites[index];
    int at = site->page_offset - r->block.start;
    uint64_t address = r->gva + (uint64_t)at;
    char text[TEXT_BYTES] = "(outside the block)";
    if (at >= 0 && at < r->block.length)
        format(l, &l->guest_decoder, r->guest + at, (size_t)(r->block.length - at), address, text);
    fprintf(l->out, "    site %u%s: %" PRIx64 " %s; in memory", index, site->kind == SITE_JUMP ? " (jump)" : "", address, text);
    for (unsigned n = 0; n < 16; n++)
        if (site->spilled >> n & 1)
            fprintf(l->out, " %s", register_names[n]);
    if (!site->spilled)
        fputs(" nothing", l->out);
    if (site->v_memory < 16)
        fprintf(l->out, ", V in %s", register_names[site->v_memory]);
    if (site->v_stack < 16)
        fprintf(l->out, ", stack's V in %s", register_names[site->v_stack]);
    if (site->rsp_adjust)
        fprintf(l->out, ", rsp adjusted by %d", site->rsp_adjust);
    fputc('\n', l->out);
}

/* Host code up to the first site belongs to the way in; the rest to the site before it. */
static void print_host(const struct listing *l)
{
    const struct bt_block *block = &l->record->block;
    unsigned site = 0;
    char text[TEXT_BYTES];
    for (uint32_t at = 0, size = block->tc_end - block->tc_start, length; at < size; at += length) {
        uint64_t address = (uintptr_t)l->e->layout.tc_exec + block->tc_start + at;
        if (at == block->tc_chain - block->tc_start)
            fputs("    chain entry:\n", l->out);
        for (; site < block->site_count && l->record->sites[site].tc_offset <= at; site++)
            print_site(l, site);
        length = format(l, &l->host_decoder, l->host + at, size - at, address, text);
        fprintf(l->out, "      %08" PRIx64 "  %s\n", address, text);
    }
}

static void print_record(struct bt_engine *e, struct listing *l)
{
    const struct record *r = l->record;
    const struct bt_block *b = &r->block;
    const char *fate = "flushed";
    if (r->epoch == e->epoch) {
        uintptr_t start = (uintptr_t)e->layout.tc_exec + b->tc_start;
        const struct bt_block *now = cache_find(e, start);
        fate = now && now->tc_start == b->tc_start && now->valid ? "valid" : "dropped";
        l->host = e->layout.tc_write + b->tc_start;
    } else {
        l->host = r->host;
    }
    fprintf(l->out, "code at %016" PRIx64 " (phys:%" PRIx64 "), %s, %u-bit, %s: %u bytes, %u instructions -> %u bytes, %u sites\n", r->gva, r->gpa,
            r->mode.user ? "user" : "kernel", r->mode.code_bits, fate, b->length, b->insns, b->tc_end - b->tc_start, b->site_count);
    print_guest(l);
    print_host(l);
}

void dump_code_print(struct bt_engine *e, FILE *out)
{
    const struct dump_code *dump = e->dump_code;
    struct listing l = {.e = e, .out = out};
    decoder_init(&l.host_decoder, 64, host_is_amd());
    ZydisFormatterInit(&l.formatter, ZYDIS_FORMATTER_STYLE_INTEL);
    uint64_t first = dump->recorded > RECORDS_MAX ? dump->recorded - RECORDS_MAX : 0;
    fprintf(out, "code dumps: %" PRIu64 ", the first %" PRIu64 " of them left out\n", dump->recorded, first);
    for (uint64_t n = first; n < dump->recorded; n++) {
        l.record = dump->record[n % RECORDS_MAX];
        decoder_init(&l.guest_decoder, l.record->mode.code_bits, host_is_amd());
        print_record(e, &l);
    }
}
