/*
 * Where two sides part: runs both again, with a closer look at the place each time.
 *
 * 1. Memory differed at a comparison of all of it: which pages, then the first event after which one of them does.
 * 2. The states at that event and the one before, and the bytes that differ.
 * 3. Between the two events: the interpreter's state after each instruction, the translator's on each way into translated code, in blocks of one instruction. The
 *    translator's states have to be among the interpreter's; the last one that is tells which instructions were executed wrongly. When the
 *    difference does not come back in small blocks, the same with large ones.
 * Everything follows from the seed, so a run that is repeated comes to the same place; if not, that is said.
 */
#include <stdlib.h>
#include <string.h>

#include "lockstep.h"

#define EVENTS_SHOWN 8u
#define STEPS_BEFORE 12
#define STEPS_AFTER 6
#define SEARCH_AHEAD 20000 /* steps of the interpreter in which a state of the translator is looked for */

/* ---- events ---- */

static void print_tail(const struct lockstep *l)
{
    uint64_t last = l->tail_number, first = last >= EVENTS_SHOWN ? last - EVENTS_SHOWN : 0;
    for (uint64_t n = first; n <= last; n++) {
        const struct record *r = l->tail[n % 16];
        bool same = r[0].state == r[1].state && r[0].rip == r[1].rip && r[0].where == r[1].where && r[0].value == r[1].value && r[0].ram == r[1].ram && r[0].kind == r[1].kind;
        printf("  %llu %-7s", (unsigned long long)n, same ? "both" : l->engine[0]);
        lockstep_print_record(&r[0]);
        if (!same) {
            printf("  %llu %-7s", (unsigned long long)n, l->engine[1]);
            lockstep_print_record(&r[1]);
        }
    }
}

/* ---- memory ---- */

static gpa_t gpa_of(const struct lockstep *l, uint64_t page)
{
    uint64_t offset = page * PAGE_SIZE_BYTES, low = l->plan.config->memory_bytes < PHYSMAP_LOW_LIMIT ? l->plan.config->memory_bytes : PHYSMAP_LOW_LIMIT;
    return offset < low ? offset : PHYSMAP_HIGH_BASE + offset - low;
}

/* Pages that differ at plan.detail become the watched ones. Returns how many there are. */
static uint64_t pages_find(struct lockstep *l)
{
    uint64_t count = 0;
    l->plan.watched_count = 0;
    for (uint64_t n = 0; n < l->plan.config->memory_bytes / PAGE_SIZE_BYTES; n++) {
        if (l->channel[0]->page[n] == l->channel[1]->page[n])
            continue;
        if (l->plan.watched_count < WATCHED_MAX)
            l->plan.watched[l->plan.watched_count++] = gpa_of(l, n);
        count++;
    }
    return count;
}

/* Prints the words that differ in the watched pages; the first one becomes part of a trace's states. */
static void words_print(struct lockstep *l)
{
    unsigned shown = 0;
    l->plan.trace_word = ~0ull;
    for (unsigned p = 0; p < l->plan.watched_count; p++) {
        for (unsigned n = 0; n < PAGE_SIZE_BYTES; n += 8) {
            uint64_t a, b;
            memcpy(&a, &l->channel[0]->watched[p][n], 8);
            memcpy(&b, &l->channel[1]->watched[p][n], 8);
            if (a == b)
                continue;
            gpa_t gpa = l->plan.watched[p] + n;
            if (l->plan.trace_word == ~0ull)
                l->plan.trace_word = gpa;
            if (shown++ < 16)
                printf("    memory at gpa %#llx  %s %016llx  %s %016llx\n", (unsigned long long)gpa, l->engine[0], (unsigned long long)a, l->engine[1], (unsigned long long)b);
        }
    }
}

static bool stop_at(struct lockstep *l, uint64_t number, struct run_result *result)
{
    l->plan.detail = number;
    l->plan.events = number + 1;
    *result = lockstep_run(l);
    return result->end != RUN_SAME;
}

/* Memory differs at `number` and did not at `equal`: the first event at which it does. False: the runs are not repeatable. */
static bool memory_narrow(struct lockstep *l, uint64_t equal, uint64_t *number)
{
    struct run_result result;
    stop_at(l, *number, &result);
    uint64_t pages = pages_find(l);
    if (result.number != *number || !pages)
        return false;
    printf("%llu pages of memory differ at event %llu, first at gpa %#llx; they were equal at event %llu\n", (unsigned long long)pages, (unsigned long long)*number,
           (unsigned long long)l->plan.watched[0], (unsigned long long)equal);
    l->plan.watch_from = equal;
    stop_at(l, *number, &result);
    if (result.end != RUN_MEMORY_DIFFERS)
        return false;
    *number = result.number;
    return true;
}

/* ---- steps ---- */

static void step_print(const struct step *step, const char *mark)
{
    ZydisDisassembledInstruction text;
    ZydisMachineMode mode = step->code_bits == 64 ? ZYDIS_MACHINE_MODE_LONG_64 : step->code_bits == 32 ? ZYDIS_MACHINE_MODE_LEGACY_32 : ZYDIS_MACHINE_MODE_LEGACY_16;
    bool good = ZYAN_SUCCESS(ZydisDisassembleIntel(mode, step->gpr[GPR_RIP], step->code, 15, &text));
    printf("    %s %016llx  %s\n", mark, (unsigned long long)step->gpr[GPR_RIP], good ? text.text : "?");
}

static void registers_print(const struct step *a, const struct step *b, const char *const names[2])
{
    static const char *const name[] = {"RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8", "R9", "R10", "R11", "R12", "R13", "R14", "R15", "RIP"};
    for (unsigned n = 0; n <= GPR_RIP; n++)
        if (a->gpr[n] != b->gpr[n])
            printf("    %-7s %s %016llx  %s %016llx\n", name[n], names[0], (unsigned long long)a->gpr[n], names[1], (unsigned long long)b->gpr[n]);
    if (a->rflags != b->rflags)
        printf("    RFLAGS  %s %08llx  %s %08llx\n", names[0], (unsigned long long)a->rflags, names[1], (unsigned long long)b->rflags);
    if (a->word != b->word)
        printf("    memory  %s %016llx  %s %016llx\n", names[0], (unsigned long long)a->word, names[1], (unsigned long long)b->word);
}

static bool steps_equal(const struct step *a, const struct step *b)
{
    return a->state == b->state && a->word == b->word;
}

/*
 * Matches the second side's steps with the first's. *mine and *theirs: the last ones that agree. True: after them comes a step that does not. The interpreter repeats a string
 * instruction as one step, the translator may be seen in the middle.
 */
static bool steps_match(const struct lockstep *l, uint64_t *mine, uint64_t *theirs)
{
    const struct step *a = l->channel[0]->trace, *b = l->channel[1]->trace;
    uint64_t a_count = atomic_load(&l->channel[0]->steps), b_count = atomic_load(&l->channel[1]->steps), at = 0;
    for (uint64_t n = 0; n < b_count; n++) {
        uint64_t k = at, limit = at + SEARCH_AHEAD < a_count ? at + SEARCH_AHEAD : a_count;
        while (k < limit && !steps_equal(&a[k], &b[n]))
            k++;
        if (k < limit) {
            at = *mine = k;
            *theirs = n;
        } else if (n == 0 || b[n].gpr[GPR_RIP] != b[*theirs].gpr[GPR_RIP]) {
            return true;
        }
    }
    return false;
}

/* The interpreter's step that has the other's rip, the last common one or soon after it; NULL: none. */
static const struct step *counterpart(const struct lockstep *l, uint64_t mine, const struct step *theirs)
{
    const struct channel *channel = l->channel[0];
    for (uint64_t n = mine; n < atomic_load(&channel->steps) && n < mine + 2 * BT_BLOCK_INSNS_MAX; n++)
        if (channel->trace[n].gpr[GPR_RIP] == theirs->gpr[GPR_RIP])
            return &channel->trace[n];
    return NULL;
}

static void steps_print(const struct lockstep *l, uint64_t mine, uint64_t theirs)
{
    const struct channel *a = l->channel[0], *b = l->channel[1];
    uint64_t count = atomic_load(&a->steps), first = mine > STEPS_BEFORE ? mine - STEPS_BEFORE : 0;
    const struct step *wrong = &b->trace[theirs + 1], *right = counterpart(l, mine, wrong);
    printf("the last state that both have is step %llu of %llu after event %llu; executed there (>: from here on differently):\n", (unsigned long long)mine,
           (unsigned long long)count, (unsigned long long)l->plan.trace_from);
    for (uint64_t n = first; n < count && n < mine + STEPS_AFTER; n++)
        step_print(&a->trace[n], n == mine ? ">" : " ");
    if (!right)
        printf("%s has no state at %#llx soon after that; %s has\n", l->engine[0], (unsigned long long)wrong->gpr[GPR_RIP], l->engine[1]);
    else
        printf("registers at %#llx, where %s is seen next (nothing listed: vector or system state):\n", (unsigned long long)wrong->gpr[GPR_RIP], l->engine[1]);
    if (right)
        registers_print(right, wrong, l->engine);
}

/* True: found. The difference shows at `number`. */
static bool trace(struct lockstep *l, uint64_t number, uint16_t block_insns)
{
    uint64_t mine = 0, theirs = 0;
    l->plan.trace_from = number - 1;
    l->plan.trace_block_insns = block_insns;
    struct run_result result;
    bool differs = stop_at(l, number, &result);
    uint64_t steps[2] = {atomic_load(&l->channel[0]->steps), atomic_load(&l->channel[1]->steps)};
    printf("steps between events %llu and %llu, blocks of %u: %s %llu, %s %llu\n", (unsigned long long)number - 1, (unsigned long long)number, block_insns, l->engine[0],
           (unsigned long long)steps[0], l->engine[1], (unsigned long long)steps[1]);
    if (!differs || result.number < number) {
        printf("the difference %s\n", differs ? "comes earlier now" : "does not come back this way");
        return false;
    }
    if (!steps_match(l, &mine, &theirs)) {
        printf("no step differs\n");
        return false;
    }
    steps_print(l, mine, theirs);
    return true;
}

/* ---- */

void investigate(struct lockstep *l, const struct run_result *first)
{
    struct run_result result = *first;
    uint64_t number = first->number;
    l->plan.verbose = false;
    if (first->end == RUN_SILENT) {
        printf("event %llu comes from %s only:\n", (unsigned long long)number, l->engine[first->last[1].size]);
        l->silence_seconds = 10;
    }
    print_tail(l);
    fflush(stdout);
    if (first->end == RUN_MEMORY_DIFFERS && !memory_narrow(l, first->ram_equal, &number)) {
        printf("this does not repeat: the guest's run does not follow from its events alone\n");
        return;
    }
    bool repeats = stop_at(l, number, &result) && result.number == number;
    if (!repeats) {
        printf("this does not repeat: now %s at event %llu\n", result.end == RUN_SAME ? "all is equal" : "the difference is", (unsigned long long)result.number);
        return;
    }
    if (first->end == RUN_MEMORY_DIFFERS)
        print_tail(l);
    if (result.end != RUN_SILENT) {
        printf("state at event %llu:\n", (unsigned long long)number);
        state_differences(&l->channel[0]->state[1], &l->channel[1]->state[1], l->engine);
        words_print(l);
        if (number && state_differences(&l->channel[0]->state[0], &l->channel[1]->state[0], l->engine))
            printf("    (the last of these already at the event before)\n");
    }
    fflush(stdout);
    if (number && !trace(l, number, 1))
        trace(l, number, BT_BLOCK_INSNS_MAX);
}
