/*
 * The interpreter against the processor on random instructions: compare --count N --seed S [--first CASE] [--findings N] [--jobs N].
 *
 * A difference prints the case and how to repeat it; exit status 1. With --jobs several processes share the work, PIECE cases at a time.
 * Registers, flags (undefined ones are the host's on both sides), vector and x87 state, memory and the fault's vector are compared.
 * Instructions that Zydis does not know are not executed.
 */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../unit/engine/tiny_vm.h"
#include "arch/host.h"
#include "cases.h"
#include "jobs.h"
#include "util/log.h"

#define AREA_GPA 0x100000ull
#define PIECE 100000u

enum tally { COMPARED, FAULTED };

struct comparison {
    struct generator generator;
    struct tiny_vm vm;
    uint8_t *guest_area, *guest_code;
    struct cpu_state start;
    struct state from, processor, interp;
    uint64_t seed;
    unsigned findings_max;
};

static struct comparison run;

/* ---- the guest ---- */

static int guest_init(struct comparison *r)
{
    static const uint8_t nothing = 0xf4;
    int rc = tiny_vm_create(&r->vm);
    if (rc)
        return rc;
    struct cpu_state *cpu = &r->vm.vcpu->cpu;
    tiny_vm_load(&r->vm, TINY_LONG, &nothing, 1);
    for (unsigned n = 0; n <= AREA_BYTES / 4096; n++)
        tiny_vm_map(&r->vm, n, (AREA_GPA + n * 4096) | 7);
    uint64_t *directory = tiny_vm_at(&r->vm, TINY_PD); /* below is the supervisor's */
    for (unsigned n = 0; n < 512; n++)
        directory[n] &= ~4ull;
    uint16_t no_io_map = 0xffff;
    memcpy((uint8_t *)tiny_vm_at(&r->vm, TINY_TSS) + 0x66, &no_io_map, 2);
    tiny_vm_enter_user(&r->vm, true);
    cpu->cr0 |= CR0_MP | CR0_AM;
    cpu->cr4 |= CR4_OSXMMEXCPT;
    r->start = *cpu;
    r->guest_area = physmap_get(r->vm.memory, AREA_GPA, AREA_BYTES + 4096, PHYSMAP_WRITE);
    r->guest_code = r->guest_area + AREA_BYTES;
    return r->guest_area ? 0 : -1;
}

static void guest_run(struct comparison *r, const struct test_case *test)
{
    struct cpu_state *cpu = &r->vm.vcpu->cpu;
    struct state *to = &r->interp;
    memset(r->guest_code, 0xc3, 4096);
    memcpy(r->guest_code + (CODE - CODE_PAGE), test->code, 15);
    *cpu = r->start;
    memcpy(cpu->gpr, r->from.gpr, sizeof r->from.gpr);
    cpu->gpr[GPR_RIP] = r->from.rip;
    cpu->rflags = r->from.rflags;
    memcpy(cpu->xsave, r->from.xsave, sizeof cpu->xsave);
    interp_engine.state_changed(r->vm.vcpu);
    for (unsigned n = 0; n < 64 && cpu->gpr[GPR_RIP] == CODE; n++)
        interp_engine.step(r->vm.vcpu);
    memcpy(to->gpr, cpu->gpr, sizeof to->gpr);
    to->rip = cpu->gpr[GPR_RIP];
    to->rflags = cpu->rflags;
    to->vector = -1;
    memcpy(to->xsave, cpu->xsave, sizeof to->xsave);
    if (cpu_cpl(cpu) == 0) { /* in a handler: RIP, RFLAGS and RSP are in its frame */
        uint64_t frame[5];
        to->vector = (int)((to->rip - TINY_HANDLER) / 16);
        bool error = to->vector == VECTOR_DF || (to->vector >= VECTOR_TS && to->vector <= VECTOR_PF) || to->vector == VECTOR_AC;
        memcpy(frame, tiny_vm_at(&r->vm, cpu->gpr[GPR_RSP] + 8 * error), sizeof frame);
        to->rip = frame[0];
        to->rflags = frame[2];
        to->gpr[GPR_RSP] = frame[3];
    }
    to->rflags &= ~(RFLAGS_TF | RFLAGS_RF);
}

/* ---- comparison ---- */

/* Repeated string instructions with 32-bit addresses: processors differ in when they clear the registers' upper halves (count zero, fault in the first round). */
static bool is_short_string(const struct test_case *test)
{
    return test->zi.attributes & (ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPE | ZYDIS_ATTRIB_HAS_REPNE) && test->zi.address_width == 32;
}

/* MMX instructions that fault have set x87's TOP and tags already, on some processors: the image's stack turns with TOP. */
static void forget_x87(const struct test_case *test, struct state *state)
{
    for (unsigned n = 0; n < test->zi.operand_count; n++)
        if (test->op[n].type == ZYDIS_OPERAND_TYPE_REGISTER && ZydisRegisterGetClass(test->op[n].reg.value) == ZYDIS_REGCLASS_MMX) {
            memset(state->xsave, 0, 24);
            memset(state->xsave + 32, 0, 128);
            return;
        }
}

/* What FXRSTOR64 loads into FIP and FDP is made canonical by some processors; VCVTPS2PH may set MXCSR's flags before its store faults. */
static void forget_odd_parts(const struct test_case *test, struct state *state)
{
    if (test->zi.mnemonic == ZYDIS_MNEMONIC_FXRSTOR64) {
        memset(state->xsave + 14, 0, 2);
        memset(state->xsave + 22, 0, 2);
    }
    if (test->zi.mnemonic == ZYDIS_MNEMONIC_VCVTPS2PH && state->vector >= 0)
        memset(state->xsave + 24, 0, 4);
}

/* Differences in which fault comes first. A CALL may write the return address before it looks at the target. CMPS reads its two operands in an order that no manual gives. */
static bool faults_may_differ(const struct comparison *r, const struct test_case *test)
{
    const struct state *a = &r->processor, *b = &r->interp;
    if (test->zi.meta.category == ZYDIS_CATEGORY_STRINGOP && a->vector >= 0 && b->vector >= 0)
        return test->zi.opcode == 0xa6 || test->zi.opcode == 0xa7;
    return test->zi.meta.category == ZYDIS_CATEGORY_CALL && a->vector == VECTOR_PF && b->vector == VECTOR_GP;
}

static const char *difference(struct comparison *r, const struct test_case *test)
{
    static char text[64];
    struct state *a = &r->processor, *b = &r->interp;
    if (a->vector != b->vector)
        return faults_may_differ(r, test) ? NULL : "fault";
    if (a->rip != b->rip) {
        snprintf(text, sizeof text, "RIP %#llx, %#llx", (unsigned long long)a->rip, (unsigned long long)b->rip);
        return text;
    }
    /* How much of a gather has been done, and what its mask is like then, AMD's manual leaves open. */
    if (host_is_amd() && a->vector >= 0 && test->zi.meta.isa_set == ZYDIS_ISA_SET_AVX2GATHER)
        return NULL;
    uint64_t significant = is_short_string(test) ? 0xffffffff : ~0ull;
    for (unsigned n = 0; n < 16; n++)
        if ((a->gpr[n] ^ b->gpr[n]) & significant) {
            snprintf(text, sizeof text, "register %u: %#llx, %#llx", n, (unsigned long long)a->gpr[n], (unsigned long long)b->gpr[n]);
            return text;
        }
    uint64_t flags = a->rflags ^ b->rflags;
    if (flags) {
        snprintf(text, sizeof text, "flags %#llx", (unsigned long long)flags);
        return text;
    }
    /* A CALL to an address that is not canonical writes the return address before it faults on some processors. */
    bool pushed = test->zi.meta.category == ZYDIS_CATEGORY_CALL && a->vector == VECTOR_GP;
    if (!pushed && memcmp((void *)AREA, r->guest_area, AREA_BYTES)) {
        unsigned n = 0;
        while (((uint8_t *)AREA)[n] == r->guest_area[n])
            n++;
        snprintf(text, sizeof text, "memory at %#llx: %02x, %02x", AREA + n, ((uint8_t *)AREA)[n], r->guest_area[n]);
        return text;
    }
    state_normalize(&r->generator, a);
    state_normalize(&r->generator, b);
    forget_odd_parts(test, a);
    forget_odd_parts(test, b);
    if (a->vector >= 0) {
        forget_x87(test, a);
        forget_x87(test, b);
    }
    for (unsigned n = 0; n < r->generator.image_bytes; n++)
        if (a->xsave[n] != b->xsave[n] && (n < 512 || n >= 576)) {
            snprintf(text, sizeof text, "XSAVE image at %u: %02x, %02x", n, a->xsave[n], b->xsave[n]);
            return text;
        }
    return NULL;
}

static void report(struct comparison *r, const struct test_case *test, uint64_t number, const char *what)
{
    ZydisFormatter formatter;
    char text[128] = "?";
    ZydisFormatterInit(&formatter, ZYDIS_FORMATTER_STYLE_INTEL);
    ZydisFormatterFormatInstruction(&formatter, &test->zi, test->op, test->zi.operand_count_visible, text, sizeof text, CODE, NULL);
    printf("case %llu:", (unsigned long long)number);
    for (unsigned n = 0; n < test->zi.length; n++)
        printf(" %02x", test->code[n]);
    printf(": %s: %s (processor %d, interpreter %d)\n", text, what, r->processor.vector, r->interp.vector);
}

/* Locked accesses across cache lines are costly for the whole machine: left out. */
static bool is_split_lock(const struct comparison *r, const struct test_case *test)
{
    if (!(test->zi.attributes & ZYDIS_ATTRIB_HAS_LOCK) && test->zi.mnemonic != ZYDIS_MNEMONIC_XCHG)
        return false;
    ZydisRegisterContext context = {0};
    for (unsigned n = 0; n < 16; n++)
        context.values[ZYDIS_REGISTER_RAX + n] = r->from.gpr[n];
    for (unsigned n = 0; n < test->zi.operand_count_visible; n++) {
        ZyanU64 address;
        if (test->op[n].type == ZYDIS_OPERAND_TYPE_MEMORY &&
            (!ZYAN_SUCCESS(ZydisCalcAbsoluteAddressEx(&test->zi, &test->op[n], CODE, &context, &address)) || (address & 63) > 48 ||
             test->zi.mnemonic == ZYDIS_MNEMONIC_BTS || test->zi.mnemonic == ZYDIS_MNEMONIC_BTR || test->zi.mnemonic == ZYDIS_MNEMONIC_BTC))
            return true;
    }
    return false;
}

static void repeat_print(uint64_t number)
{
    printf("  repeat: --seed %llu --first %llu --count 1 (or from case %llu on)\n", (unsigned long long)run.seed, (unsigned long long)number,
           (unsigned long long)(number - number % PIECE));
}

static void one_case(struct comparison *r, uint64_t number)
{
    struct test_case test;
    jobs_at(number);
    r->generator.seed = (r->seed << 40 ^ number) * 0x9e3779b97f4a7c15ull | 1;
    for (unsigned n = 0; n < 4; n++)
        generator_random(&r->generator);
    while (!generator_case(&r->generator, &test))
        ;
    generator_state(&r->generator, &test, &r->from);
    ZydisDecoderDecodeFull(&r->generator.decoder, test.code, 15, &test.zi, test.op);
    if (is_split_lock(r, &test))
        return;
    processor_run(&test, &r->from, &r->processor);
    guest_run(r, &test);
    const char *what = difference(r, &test);
    jobs_shared->tally[COMPARED]++;
    jobs_shared->tally[FAULTED] += r->processor.vector >= 0;
    if (what && jobs_finding() <= r->findings_max) {
        report(r, &test, number, what);
        repeat_print(number);
        fflush(stdout);
    }
    if (what || r->processor.vector >= 0)
        memcpy(r->guest_area, (void *)AREA, AREA_BYTES);
}

static int set_up(struct comparison *r)
{
    struct cpuid_config config = {.cpu_count = 1, .tsc_khz = 1000000, .apic_bus_hz = 1000000000};
    struct cpuid_table *table = cpuid_table_build(&config);
    if (!table)
        return 2;
    uint64_t xcr0 = cpuid_xcr0_allowed(table);
    cpuid_table_destroy(table);
    generator_init(&r->generator, r->seed, xcr0);
    if (!xcr0) {
        printf("this processor has no XSAVE\n");
        return 77;
    }
    if (processor_init(xcr0, r->generator.image_bytes) || guest_init(r)) {
        fprintf(stderr, "cannot set up\n");
        return 2;
    }
    generator_bytes(&r->generator, (void *)AREA, AREA_BYTES);
    memcpy(r->guest_area, (void *)AREA, AREA_BYTES);
    return 0;
}

static int piece_run(uint64_t first, uint64_t count)
{
    int rc = set_up(&run);
    for (uint64_t n = first; !rc && n < first + count && atomic_load(&jobs_shared->findings) < run.findings_max; n++)
        one_case(&run, n);
    if (!rc)
        tiny_vm_destroy(&run.vm);
    return rc;
}

static int options_read(int argc, char **argv, struct jobs *jobs)
{
    static const struct option options[] = {JOBS_OPTIONS, {"seed", required_argument, NULL, 's'}, {0}};
    for (int o; (o = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        uint64_t value = optarg ? strtoull(optarg, NULL, 0) : 0;
        if (o == 's') {
            run.seed = value;
        } else if (!jobs_option(jobs, o, value)) {
            fprintf(stderr, "usage: compare [--seed S] " JOBS_USAGE "\n");
            return 2;
        }
    }
    return 0;
}

int main(int argc, char **argv)
{
    struct jobs jobs = {.count = 300000, .findings_max = 40, .piece = PIECE, .piece_run = piece_run, .repeat_print = repeat_print, .alone = true};
    run.seed = 1;
    if (options_read(argc, argv, &jobs) || jobs_init())
        return 2;
    run.findings_max = jobs.findings_max;
    log_set_level(LOG_ERROR); /* every instruction that is #UD would be told */
    int rc = jobs_run(&jobs);
    if (rc > 1)
        return rc;
    printf("%llu compared, %llu of them faults, %u differ\n", (unsigned long long)jobs_shared->tally[COMPARED], (unsigned long long)jobs_shared->tally[FAULTED],
           jobs_shared->findings);
    return jobs_shared->findings != 0;
}
