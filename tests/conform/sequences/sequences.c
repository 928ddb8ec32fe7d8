/*
 * The translator against the interpreter on random sequences: sequences --count N --seed S [--first CASE] [--minimise] [--list] [--low] [--findings N] [--jobs N].
 * Every fourth world is one below 4 GiB, where 32-bit code runs; with --low all are.
 *
 * A difference prints the case and how to repeat it, and exit status is 1. The case's number and the seed repeat it, provided that the whole world was not needed: `--first` at a
 * multiple of CASES_PER_WORLD repeats even what depends on the cases before. With --jobs several processes share the work, PIECE cases at a time.
 */
#include "sequence.h"

#include "../instructions/jobs.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "arch/host.h"
#include "arch/paging.h"
#include "util/log.h"

#define PIECE (64 * CASES_PER_WORLD)

enum tally { COMPARED, NATIVELY, GIVEN_UP, FAULTS }; /* FAULTS and up: by vector */

struct comparison {
    struct generator generator;
    struct tiny_vm vm[2]; /* the interpreter's, the translator's */
    struct world world;
    struct sequence sequence;
    struct outcome right, wrong;
    uint64_t seed;
    bool list, minimise, low;
    unsigned findings_max;
};

static struct comparison run;

struct difference {
    enum run_kind kind;
    char text[120];
};

/* ---- comparing ---- */

#define DIFFER(d, ...) (snprintf((d)->text, sizeof(d)->text, __VA_ARGS__), true)

static bool registers_differ(const struct outcome *a, const struct outcome *b, struct difference *d)
{
    const struct state *x = &a->state, *y = &b->state;
    for (unsigned n = 0; n < 16; n++)
        if (n != GPR_RSP && x->gpr[n] != y->gpr[n])
            return DIFFER(d, "register %u: %#llx, %#llx", n, (unsigned long long)x->gpr[n], (unsigned long long)y->gpr[n]);
    if (a->rsp != b->rsp || x->gpr[GPR_RSP] != y->gpr[GPR_RSP])
        return DIFFER(d, "RSP: %#llx, %#llx", (unsigned long long)a->rsp, (unsigned long long)b->rsp);
    if (a->rflags != b->rflags || x->rflags != y->rflags)
        return DIFFER(d, "RFLAGS: %#llx, %#llx", (unsigned long long)a->rflags, (unsigned long long)b->rflags);
    for (unsigned n = 0; n < sizeof x->xsave; n++)
        if (x->xsave[n] != y->xsave[n] && (n < 512 || n >= 576))
            return DIFFER(d, "XSAVE image at %u: %02x, %02x", n, x->xsave[n], y->xsave[n]);
    return false;
}

static bool outcomes_differ(const struct outcome *a, const struct outcome *b, struct difference *d)
{
    if (a->vector != b->vector)
        return DIFFER(d, "vector: %d, %d at %#llx, %#llx", a->vector, b->vector, (unsigned long long)a->rip, (unsigned long long)b->rip);
    if (a->rip != b->rip)
        return DIFFER(d, "RIP: %#llx, %#llx", (unsigned long long)a->rip, (unsigned long long)b->rip);
    if (a->error != b->error || a->cr2 != b->cr2)
        return DIFFER(d, "error code %#llx, %#llx, CR2 %#llx, %#llx", (unsigned long long)a->error, (unsigned long long)b->error,
                      (unsigned long long)a->cr2, (unsigned long long)b->cr2);
    if (registers_differ(a, b, d))
        return true;
    if (a->interrupt != b->interrupt)
        return DIFFER(d, "interrupt: %d, %d waits", a->interrupt, b->interrupt);
    if (a->mmio_reads != b->mmio_reads || a->mmio_writes != b->mmio_writes || a->mmio_size != b->mmio_size || a->mmio_gpa != b->mmio_gpa ||
        a->mmio_value != b->mmio_value)
        return DIFFER(d, "MMIO: %u reads, %u writes; %u, %u", a->mmio_reads, a->mmio_writes, b->mmio_reads, b->mmio_writes);
    if (memcmp(&a->cs, &b->cs, sizeof a->cs) || memcmp(&a->ss, &b->ss, sizeof a->ss) || memcmp(a->data, b->data, sizeof a->data) || a->fs_base != b->fs_base || a->gs_base != b->gs_base)
        return DIFFER(d, "segments");
    return false;
}

/* A processor may set accessed bits for what it did not do after all; never forget one. */
static bool table_entries_agree(const uint8_t *a, const uint8_t *b)
{
    for (unsigned n = 0; n < PAGE_SIZE_BYTES; n += 8) {
        uint64_t x, y;
        memcpy(&x, a + n, 8);
        memcpy(&y, b + n, 8);
        if ((x | 0x20) != (y | 0x20) || (x & ~y & 0x20))
            return false;
    }
    return true;
}

static bool memories_differ(struct comparison *r, bool tables, struct difference *d)
{
    const struct world *w = &r->world;
    for (unsigned n = 0; n < (tables ? w->tracked_count : w->tracked_tables); n++) {
        const uint8_t *a = physmap_get(r->vm[0].memory, w->tracked[n], PAGE_SIZE_BYTES, PHYSMAP_READ);
        const uint8_t *b = physmap_get(r->vm[1].memory, w->tracked[n], PAGE_SIZE_BYTES, PHYSMAP_READ);
        if (!memcmp(a, b, PAGE_SIZE_BYTES) || (n >= w->tracked_tables && table_entries_agree(a, b)))
            continue;
        unsigned k = 0;
        while (a[k] == b[k])
            k++;
        return DIFFER(d, "memory at %#llx%s: %02x, %02x", (unsigned long long)w->tracked[n] + k, n >= w->tracked_tables ? " (page tables)" : "", a[k], b[k]);
    }
    return false;
}

/* ---- known differences (../README.md) ---- */

/* The instruction that the exception came from. */
static bool culprit_decode(struct comparison *r, struct encoded *e)
{
    for (unsigned n = 0; n < 15; n++) {
        gpa_t gpa;
        const uint8_t *byte = world_walk(&r->vm[0], r->right.rip + n, PAGING_READ | PAGING_AC, &gpa) ? physmap_get(r->vm[0].memory, gpa, 1, PHYSMAP_READ) : NULL;
        e->bytes[n] = byte ? *byte : 0xcc;
    }
    encode_width(&r->generator, r->right.narrow);
    return encode_decode(&r->generator, e);
}

static void stack_forget(struct comparison *r, struct tiny_vm *vm)
{
    for (unsigned n = 1; n <= 8; n++) {
        gpa_t gpa;
        uint8_t *byte = world_walk(vm, r->right.rsp - n, PAGING_READ | PAGING_AC, &gpa) ? physmap_get(vm->memory, gpa, 1, PHYSMAP_READ) : NULL;
        if (byte)
            *byte = 0;
    }
}

static bool names_mmx(const struct encoded *e)
{
    for (unsigned n = 0; n < e->zi.operand_count; n++)
        if (e->op[n].type == ZYDIS_OPERAND_TYPE_REGISTER && ZydisRegisterGetClass(e->op[n].reg.value) == ZYDIS_REGCLASS_MMX)
            return true;
    return false;
}

/* RF in a double fault's frame: the state that one saves is undefined (SDM vol. 3, 6.15), and the translator drops RF before the instruction that it is for. */
static void resume_flag_forget(struct outcome *o, struct tiny_vm *vm)
{
    gpa_t gpa;
    gva_t at = vm->vcpu->cpu.gpr[GPR_RSP] + 24 + 2; /* error code, RIP, CS, RFLAGS */
    uint8_t *byte = world_walk(vm, at, PAGING_READ | PAGING_AC, &gpa) ? physmap_get(vm->memory, gpa, 1, PHYSMAP_READ) : NULL;
    o->rflags &= ~RFLAGS_RF;
    if (byte)
        *byte &= ~1;
}

/* What processors themselves do not agree in is made equal. False: the page tables are not to be compared. */
static bool known_forget(struct comparison *r)
{
    struct encoded e;
    if (r->right.vector == VECTOR_DF && r->wrong.vector == VECTOR_DF) {
        resume_flag_forget(&r->right, &r->vm[0]);
        resume_flag_forget(&r->wrong, &r->vm[1]);
    }
    if (r->right.vector < 0 || r->right.vector == VECTOR_BP || !culprit_decode(r, &e))
        return true;
    bool half_called = r->right.vector == VECTOR_GP && e.zi.meta.category == ZYDIS_CATEGORY_CALL;
    for (unsigned n = 0; half_called && n < 2; n++)
        stack_forget(r, &r->vm[n]);
    for (unsigned n = 0; n < 2; n++) {
        uint8_t *image = n ? r->wrong.state.xsave : r->right.state.xsave;
        if (names_mmx(&e)) {
            memset(image, 0, 24);
            memset(image + 32, 0, 128);
        }
        if (e.zi.mnemonic == ZYDIS_MNEMONIC_VCVTPS2PH)
            memset(image + 24, 0, 4);
    }
    return !half_called;
}

/* ---- a case ---- */

/* Which fault comes first is not the same everywhere: see ../README.md. */
static bool faults_are_disputed(struct comparison *r)
{
    struct encoded e;
    if (r->right.vector == r->wrong.vector || !culprit_decode(r, &e))
        return false;
    if (e.zi.meta.category == ZYDIS_CATEGORY_STRINGOP)
        return e.zi.opcode == 0xa6 || e.zi.opcode == 0xa7;
    return e.zi.meta.category == ZYDIS_CATEGORY_CALL || e.zi.mnemonic == ZYDIS_MNEMONIC_VCVTPS2PH || names_mmx(&e);
}

static bool is_repeated_comparison(const struct encoded *e)
{
    return e->zi.meta.category == ZYDIS_CATEGORY_STRINGOP && e->zi.attributes & (ZYDIS_ATTRIB_HAS_REPE | ZYDIS_ATTRIB_HAS_REPNE);
}

/*
 * A CALL to an address that is not canonical finds that out before its push or after: then another fault may come first, and a handler see it. A repeated comparison that faults puts
 * flags back to what they were when it was begun, or gone on with, and the reference goes on with it at each step.
 */
static bool is_disputed(struct comparison *r)
{
    struct encoded e;
    if (r->right.vector < 0 || r->right.vector == VECTOR_BP || !culprit_decode(r, &e))
        return false;
    return is_repeated_comparison(&e) || (r->right.vector == VECTOR_GP && e.zi.meta.category == ZYDIS_CATEGORY_CALL);
}

/* Processors store the 80 bits of x87 in two pieces, and the second may fault. */
static bool is_half_stored(struct comparison *r)
{
    struct encoded e;
    if (r->right.vector != VECTOR_PF || !culprit_decode(r, &e) || e.zi.meta.category != ZYDIS_CATEGORY_X87_ALU)
        return false;
    const ZydisDecodedOperand *op = encode_memory(&e);
    return op && op->size == 80;
}

static bool native_differs(struct comparison *r, struct difference *d)
{
    static const uint64_t flags = ~(RFLAGS_IF | RFLAGS_RF | RFLAGS_TF);
    struct outcome *a = &r->right, *b = &r->wrong, kept = r->right;
    d->kind = RUN_NATIVE;
    native_case_run(&r->world, &r->sequence, b);
    state_normalize(&r->generator, &b->state);
    memset(a->state.xsave + 6, 0, 18); /* the processor's are those of its copy of the code */
    memset(b->state.xsave + 6, 0, 18);
    bool tables = known_forget(r), differs = false;
    if (a->vector != VECTOR_PF)
        a->cr2 = b->cr2 = a->error = b->error = 0;
    a->cr2 &= ~PAGE_MASK_BITS, b->cr2 &= ~PAGE_MASK_BITS; /* of operands that reach into a page some tell the first byte there that they would have used */
    a->rflags &= flags, b->rflags &= flags;
    struct encoded e;
    if (host_is_amd() && a->vector >= 0 && culprit_decode(r, &e) && is_repeated_comparison(&e)) /* its flags are then those of some element */
        a->rflags &= ~RFLAGS_OSZAPC, b->rflags &= ~RFLAGS_OSZAPC;
    a->state.rflags = b->state.rflags = 0;
    a->state.gpr[GPR_RSP] = b->state.gpr[GPR_RSP] = 0;
    memcpy(b->data, a->data, sizeof b->data);
    b->cs = a->cs, b->ss = a->ss, b->fs_base = a->fs_base, b->gs_base = a->gs_base;
    b->mmio_value = a->mmio_value, b->interrupt = a->interrupt;
    if (!faults_are_disputed(r)) {
        differs = outcomes_differ(a, b, d);
        gva_t where = differs || !tables || is_half_stored(r) ? 0 : native_memory_differs(&r->world, &r->vm[0]);
        if (where)
            differs = DIFFER(d, "memory at %#llx", (unsigned long long)where);
    }
    r->right = kept;
    atomic_fetch_add(&jobs_shared->tally[NATIVELY], 1);
    return differs;
}

/* The interpreter by blocks, compared with the translator's last run, which was right. */
static bool interp_differs(struct comparison *r, struct difference *d)
{
    d->kind = RUN_INTERP;
    engines_run(&r->vm[0], &r->world, &r->sequence, RUN_INTERP, r->seed);
    engines_outcome(&r->vm[0], &r->generator, &r->wrong);
    bool tables = known_forget(r);
    return outcomes_differ(&r->right, &r->wrong, d) || memories_differ(r, tables, d);
}

static bool run_differs(struct comparison *r, enum run_kind kind, struct difference *d)
{
    d->kind = kind;
    engines_run(&r->vm[1], &r->world, &r->sequence, kind, r->seed);
    engines_outcome(&r->vm[1], &r->generator, &r->wrong);
    bool tables = known_forget(r) && kind != RUN_FILLED;
    return outcomes_differ(&r->right, &r->wrong, d) || memories_differ(r, tables, d);
}

/* A fault puts flags back to what they were when a repeated comparison was begun, or gone on with after an interruption: kicks are such, and nobody can tell when they come. */
static bool compares_repeatedly(struct comparison *r)
{
    for (unsigned n = 0; n < r->sequence.lines; n++) {
        struct encoded e;
        memcpy(e.bytes, r->sequence.line[n].bytes, sizeof r->sequence.line[n].bytes);
        if (encode_decode(&r->generator, &e) && is_repeated_comparison(&e))
            return true;
    }
    return false;
}

/* True: the case's outcomes differ, as *d says. */
static bool case_differs(struct comparison *r, struct difference *d)
{
    const struct sequence *s = &r->sequence;
    bool safe = r->world.native;
    world_restore(&r->world, &r->vm[0], true);
    sequence_place(s, &r->world, &r->vm[0]);
    r->right.vector = -2;
    if (s->cut || s->copies_aliased || !engines_step(&r->vm[0], s, &r->generator, &safe))
        return false;
    engines_outcome(&r->vm[0], &r->generator, &r->right);
    if (safe && native_may_end(&r->right) && native_differs(r, d))
        return true;
    for (unsigned kind = RUN_COLD; kind < RUN_KINDS; kind++) {
        if (kind == RUN_FILLED && s->tables_change)
            continue; /* the guest sees the accessed bits */
        if ((kind == RUN_KICKED && (s->number % 32 || compares_repeatedly(r))) || (kind == RUN_OFTEN && s->number % 8))
            continue;
        if (run_differs(r, (enum run_kind)kind, d))
            return !is_disputed(r);
    }
    return interp_differs(r, d);
}

/* ---- reporting ---- */

static void sequence_print(struct comparison *r)
{
    const struct sequence *s = &r->sequence;
    ZydisFormatter formatter;
    ZydisFormatterInit(&formatter, ZYDIS_FORMATTER_STYLE_INTEL);
    for (unsigned n = 0; n < s->lines; n++) {
        const struct line *line = &s->line[n];
        ZydisDecodedInstruction zi;
        ZydisDecodedOperand op[ZYDIS_MAX_OPERAND_COUNT];
        char text[128] = "?";
        uint8_t bytes[16];
        memset(bytes, 0x90, sizeof bytes);
        memcpy(bytes, line->bytes, line->length);
        encode_width(&r->generator, line->narrow);
        if (ZYAN_SUCCESS(ZydisDecoderDecodeFull(&r->generator.decoder, bytes, 15, &zi, op)))
            ZydisFormatterFormatInstruction(&formatter, &zi, op, zi.operand_count_visible, text, sizeof text, line->gva, NULL);
        printf("  %16llx ", (unsigned long long)line->gva);
        for (unsigned k = 0; k < 15; k++)
            printf(k < line->length ? "%02x" : "  ", line->bytes[k]);
        printf(" %s\n", text);
    }
}

static void repeat_print(uint64_t number)
{
    uint64_t first = number - number % CASES_PER_WORLD;
    printf("  repeat: --seed %llu --first %llu --count %llu --minimise%s (or from case %llu on)\n", (unsigned long long)run.seed, (unsigned long long)first,
           (unsigned long long)(number + 1 - first), run.low ? " --low" : "", (unsigned long long)(number - number % PIECE));
}

static void case_print(struct comparison *r, const struct difference *d)
{
    const struct world *w = &r->world;
    const struct cpu_state *cpu = &r->sequence.start;
    printf("case %llu, %s%s%s%s, %s: %s\n", (unsigned long long)r->sequence.number, w->user ? "user" : "supervisor", w->large ? ", large page" : "",
           w->low ? ", below 4 GiB" : w->smc ? ", writable code" : w->native ? ", native" : w->fixing ? ", fixing" : w->roots > 1 ? ", two address spaces" : "", r->sequence.interrupt >= 0 ? ", interrupt" : "",
           run_names[d->kind], d->text);
    for (unsigned n = 0; n < 16; n++)
        printf("%s%2u %016llx", n % 4 ? "  " : n ? "\n  " : "  ", n, (unsigned long long)cpu->gpr[n]);
    printf("\n  RFLAGS %llx FS %llx GS %llx CR0 %llx CR4 %llx\n", (unsigned long long)cpu->rflags, (unsigned long long)cpu->seg[SEG_FS].base,
           (unsigned long long)cpu->seg[SEG_GS].base, (unsigned long long)cpu->cr0, (unsigned long long)cpu->cr4);
    sequence_print(r);
    printf("  ends with vector %d at %llx, error %llx, CR2 %llx, RSP %llx\n", r->right.vector, (unsigned long long)r->right.rip, (unsigned long long)r->right.error,
           (unsigned long long)r->right.cr2, (unsigned long long)r->right.rsp);
}

/* ---- minimising ---- */

/* The same fault of ours, as far as one can tell. */
static bool same_difference(const struct difference *a, const struct difference *b)
{
    size_t length = strcspn(a->text, ":");
    return a->kind == b->kind && !strncmp(a->text, b->text, length < 6 ? length : 6);
}

static bool line_replace(struct comparison *r, unsigned n, uint8_t filler, struct difference *d)
{
    struct sequence *s = &r->sequence;
    struct line *line = &s->line[n], before = *line;
    struct difference now;
    if (line->bytes[0] == 0xcc || (line->bytes[0] == 0x90 && (line->length == 1 || line->bytes[1] == 0x90)))
        return false; /* replaced already */
    memset(line->bytes, filler, line->length);
    for (unsigned pass = 0; pass < 2; pass++) {
        for (unsigned k = 0; k < line->length; k++) {
            if (line->at[k] >= 0)
                s->code[line->at[k] / 4096][line->at[k] % 4096] = line->bytes[k];
        }
        if (pass || (case_differs(r, &now) && same_difference(d, &now)))
            break;
        *line = before;
    }
    if (memcmp(line->bytes, before.bytes, sizeof before.bytes) == 0)
        return false;
    *d = now;
    return true;
}

/* False: what is left of it makes no difference this time; something else than the seed decides. */
static bool minimise(struct comparison *r, struct difference *d)
{
    struct difference last = *d;
    for (bool again = true; again;) {
        again = false;
        for (unsigned n = r->sequence.lines; n-- > 0;)
            again |= line_replace(r, n, 0xcc, &last) || line_replace(r, n, 0x90, &last);
    }
    if (!case_differs(r, &last))
        return false;
    *d = last;
    return true;
}

/* ---- cases ---- */

static void one_case(struct comparison *r, uint64_t number)
{
    struct difference d = {0};
    jobs_at(number);
    uint64_t world = number / CASES_PER_WORLD;
    if (r->world.number != world || !r->world.page_count)
        world_make(&r->world, &r->generator, r->seed, world, r->low || world % 4 == 3, (struct tiny_vm *const[]){&r->vm[0], &r->vm[1]});
    if (number % 2 == 0 || r->sequence.number != number - 1)
        sequence_make(&r->sequence, &r->generator, &r->world, r->seed, number & ~1ull, &r->vm[0]);
    r->sequence.number = number;
    if (number % 2) /* a little different from the case before, so that most of what is translated stays */
        sequence_mutate(&r->sequence, &r->generator, r->seed);
    bool differs = case_differs(r, &d);
    if (differs && r->world.large) { /* memory that is not watched may have become different: once more, with all of it put back each time */
        r->world.thorough = true;
        differs = case_differs(r, &d);
    }
    jobs_shared->tally[COMPARED]++;
    jobs_shared->tally[r->right.vector < 0 ? GIVEN_UP : FAULTS + (r->right.vector & 31)]++;
    if (r->list && !differs)
        case_print(r, &d);
    if (differs && jobs_finding() <= r->findings_max) {
        bool steady = !r->minimise || minimise(r, &d);
        case_print(r, &d);
        if (!steady)
            printf("  not every time, or not after what ran in between\n");
        repeat_print(number);
        fflush(stdout);
    }
    r->world.thorough = false;
}

static int set_up(struct comparison *r)
{
    struct cpuid_config config = {.cpu_count = 1, .tsc_khz = 1000000, .apic_bus_hz = 1000000000};
    struct cpuid_table *table = cpuid_table_build(&config);
    struct error err = {0};
    if (!table)
        return 2;
    uint64_t xcr0 = cpuid_xcr0_allowed(table);
    cpuid_table_destroy(table);
    if (!xcr0 || bt_engine_ops.probe(&err)) {
        printf("this host cannot run the translator: %s\n", xcr0 ? err.text : "no XSAVE");
        return 77;
    }
    generator_init(&r->generator, r->seed, xcr0);
    if (native_init(&r->generator) || engines_watch() || tiny_vm_create_with(&r->vm[0], &interp_engine) || tiny_vm_create_with(&r->vm[1], &bt_engine_ops)) {
        fprintf(stderr, "cannot set up\n");
        return 2;
    }
    return 0;
}

static int piece_run(uint64_t first, uint64_t count)
{
    int rc = set_up(&run);
    for (uint64_t n = first; !rc && n < first + count && atomic_load(&jobs_shared->findings) < run.findings_max; n++)
        one_case(&run, n);
    if (!rc) {
        tiny_vm_destroy(&run.vm[0]);
        tiny_vm_destroy(&run.vm[1]);
    }
    return rc;
}

static void summary_print(void)
{
    const _Atomic uint64_t *tally = jobs_shared->tally;
    printf("%llu compared, %llu also with the processor, %llu given up, %u differ; vectors:", (unsigned long long)tally[COMPARED], (unsigned long long)tally[NATIVELY],
           (unsigned long long)tally[GIVEN_UP], jobs_shared->findings);
    for (unsigned n = 0; n < 32; n++)
        if (tally[FAULTS + n])
            printf(" %u: %llu", n, (unsigned long long)tally[FAULTS + n]);
    printf("\n");
}

static int options_read(int argc, char **argv, struct jobs *jobs)
{
    static const struct option options[] = {JOBS_OPTIONS, {"seed", required_argument, NULL, 's'}, {"minimise", no_argument, NULL, 'm'}, {"list", no_argument, NULL, 'l'}, {"low", no_argument, NULL, 'b'}, {0}};
    for (int o; (o = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        uint64_t value = optarg ? strtoull(optarg, NULL, 0) : 0;
        switch (o) {
        case 's':
            run.seed = value;
            break;
        case 'm':
            run.minimise = true;
            break;
        case 'l':
            run.list = true;
            break;
        case 'b':
            run.low = true;
            break;
        default:
            if (jobs_option(jobs, o, value))
                break;
            fprintf(stderr, "usage: sequences [--seed S] [--minimise] [--list] [--low] " JOBS_USAGE "\n");
            return 2;
        }
    }
    return 0;
}

int main(int argc, char **argv)
{
    struct jobs jobs = {.count = 10000, .findings_max = 20, .piece = PIECE, .piece_run = piece_run, .repeat_print = repeat_print, .alone = true};
    run.seed = 1;
    if (options_read(argc, argv, &jobs) || jobs_init())
        return 2;
    run.findings_max = jobs.findings_max;
    log_set_level(LOG_ERROR); /* every instruction that is #UD would be told */
    int rc = jobs_run(&jobs);
    if (rc > 1)
        return rc;
    summary_print();
    return jobs_shared->findings != 0;
}
