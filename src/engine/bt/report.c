/*
 * What the translator tells about itself: what the interpreter had to do for it, and where its memory and time went.
 *
 * Threading: counts are written by vCPU threads and read as they fly by; sizes are read with e->lock held.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "engine/bt/direct.h"

#define SHOWN 20u

static const char *const tally_names[BT_TALLY_COUNT] = {
#define EXIT(name, help) [BT_EXIT_##name] = #name,
#include "engine/bt/exits.def"
#undef EXIT
    [BT_TALLY_SLOW] = "debugging or an interrupt shadow",
    [BT_TALLY_THRASH] = "blocks, code that keeps changing",
    [BT_TALLY_MODE] = "blocks, mode that is not translated",
    [BT_TALLY_COLD] = "blocks, code that has not run often",
};

int report_vcpu_create(struct bt_vcpu *b)
{
    b->interpreted = calloc(BT_TALLY_COUNT, sizeof(*b->interpreted));
    return b->interpreted ? 0 : -ENOMEM;
}

void report_vcpu_destroy(struct bt_vcpu *b)
{
    free(b->interpreted);
}

/* ---- what was asked for ---- */

int report_options_set(struct engine *engine, const struct engine_options *options, struct error *err)
{
    struct bt_engine *e = (struct bt_engine *)engine;
    e->direct = options->direct;
    e->patient = options->patient;
    int rc = options->perf_map ? perf_map_create(e, err) : 0;
    if (!rc && options->dump_code_count)
        rc = dump_code_create(e, options->dump_code, options->dump_code_count, err);
    return rc;
}

void report_options_clear(struct bt_engine *e)
{
    perf_map_destroy(e);
    dump_code_destroy(e);
}

void report_published(struct bt_engine *e, uint32_t first)
{
    for (uint32_t n = first; n < e->block_count; n++) {
        if (e->perf_map)
            perf_map_add(e, &e->blocks[n]);
        if (e->dump_code)
            dump_code_add(e, &e->blocks[n]);
    }
}

/* ---- what was interpreted ---- */

struct tally {
    unsigned mnemonic;
    uint64_t count;
};

/* Keeps the SHOWN largest, largest first; returns their new number. */
static unsigned tally_insert(struct tally *top, unsigned count, struct tally new)
{
    if (count == SHOWN && top[count - 1].count >= new.count)
        return count;
    unsigned n = count < SHOWN ? count : SHOWN - 1;
    for (; n && top[n - 1].count < new.count; n--)
        top[n] = top[n - 1];
    top[n] = new;
    return count < SHOWN ? count + 1 : SHOWN;
}

static void print_tally(const struct engine *e, enum bt_tally why, FILE *out)
{
    struct tally top[SHOWN];
    unsigned count = 0;
    uint64_t total = 0;
    for (unsigned mnemonic = 0; mnemonic < BT_MNEMONICS; mnemonic++) {
        struct tally sum = {mnemonic, 0};
        for (unsigned n = 0; n < INTERP_VCPUS_MAX; n++)
            if (e->vcpus[n])
                sum.count += ((const struct bt_vcpu *)e->vcpus[n])->interpreted[why][mnemonic];
        total += sum.count;
        if (sum.count)
            count = tally_insert(top, count, sum);
    }
    if (!total)
        return;
    fprintf(out, "interpreted (%s) %" PRIu64 ":", tally_names[why], total);
    for (unsigned n = 0; n < count; n++)
        fprintf(out, " %s %" PRIu64, ZydisMnemonicGetString((ZydisMnemonic)top[n].mnemonic), top[n].count);
    fputc('\n', out);
}

/* ---- memory and time ---- */

static void print_cache(struct bt_engine *e, FILE *out)
{
    uint64_t insns = e->translated_insns, ns = insns ? e->translate_ns / insns : 0;
    fprintf(out, "cache: %u + %u KiB of %" PRIu64 " KiB code, %u blocks, %u sites, %u code pages (DT %u KiB), %u write-protected\n", e->tc_used >> 10, (e->cold_used - cache_cold_base(e)) >> 10,
            e->layout.tc_bytes >> 10, e->block_count, e->site_count, e->page_count, (unsigned)(e->dt_pieces * PAGE_SIZE_BYTES >> 10), e->protected_pages);
    fprintf(out, "translated: %" PRIu64 " blocks, %" PRIu64 " instructions, %" PRIu64 " ns each; %" PRIu64 " flushes, %" PRIu64 " pages dropped\n",
            e->translated_blocks, insns, ns, e->flushes, e->invalidations);
}

static void print_tables(const struct engine *e, FILE *out)
{
    fprintf(out, "tables:");
    for (unsigned n = 0; n < INTERP_VCPUS_MAX; n++)
        if (e->vcpus[n])
            fprintf(out, " cpu %u %" PRIu64 " KiB", e->vcpus[n]->v.index, tables_bytes((const struct bt_vcpu *)e->vcpus[n]) >> 10);
    fputc('\n', out);
    for (unsigned n = 0; n < INTERP_VCPUS_MAX; n++)
        if (e->vcpus[n])
            direct_report((const struct bt_vcpu *)e->vcpus[n], out);
}

void report_print(struct engine *engine, FILE *out)
{
    struct bt_engine *e = (struct bt_engine *)engine;
    pthread_mutex_lock(&e->lock);
    print_cache(e, out);
    pthread_mutex_lock(&engine->lock);
    print_tables(engine, out);
    for (unsigned why = 0; why < BT_TALLY_COUNT; why++)
        print_tally(engine, (enum bt_tally)why, out);
    pthread_mutex_unlock(&engine->lock);
    if (e->dump_code)
        dump_code_print(e, out);
    pthread_mutex_unlock(&e->lock);
}

void report_counters(struct engine *engine, counter_fn *counter, void *ctx)
{
    struct bt_engine *e = (struct bt_engine *)engine;
    uint64_t tables = 0, direct[3] = {0};
    pthread_mutex_lock(&e->lock);
    pthread_mutex_lock(&engine->lock);
    for (unsigned n = 0; n < INTERP_VCPUS_MAX; n++) {
        if (!engine->vcpus[n])
            continue;
        tables += tables_bytes((const struct bt_vcpu *)engine->vcpus[n]);
        direct_count((const struct bt_vcpu *)engine->vcpus[n], direct);
    }
    pthread_mutex_unlock(&engine->lock);
    const struct counter list[] = {
        {.name = "cache_bytes", .help = "host code in the translation cache", .value = e->tc_used + e->cold_used - cache_cold_base(e), .gauge = true},
        {.name = "cache_blocks", .help = "blocks in the translation cache", .value = e->block_count, .gauge = true},
        {.name = "cache_code_pages", .help = "pages of guest code with translations", .value = e->page_count, .gauge = true},
        {.name = "cache_protected_pages", .help = "pages of those that the guest cannot write to without a signal", .value = e->protected_pages, .gauge = true},
        {.name = "cache_pages_dropped", .help = "pages whose translations were dropped", .value = e->invalidations},
        {.name = "tables_bytes", .help = "tables of guest pages for translated code", .value = tables, .gauge = true},
        {.name = "direct_shadows", .help = "address spaces made for direct execution", .value = direct[0]},
        {.name = "direct_stops", .help = "stops of direct execution", .value = direct[1]},
        {.name = "direct_fills", .help = "stops of those to map pages", .value = direct[2]},
    };
    pthread_mutex_unlock(&e->lock);
    for (size_t i = 0; i < sizeof list / sizeof *list; i++)
        counter(ctx, &list[i]);
}
