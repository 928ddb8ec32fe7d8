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
            if (l->plan.trace_word == ~0ull) {
                l->plan.trace_word = gpa;
                l->plan.trace_value = b;
            }
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
    if (!pages)
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

static const struct step *step_at(const struct lockstep *l, unsigned side, uint64_t n)
{
    return &l->channel[side]->trace[n % TRACE_MAX];
}

struct steps {
    uint64_t first[2], end[2]; /* what is there of each side's */
    uint64_t mine, theirs;     /* the last ones that agree */
};

static struct steps steps_there(const struct lockstep *l)
{
    struct steps s = {0};
    for (unsigned k = 0; k < 2; k++) {
        s.end[k] = atomic_load(&l->channel[k]->steps);
        s.first[k] = s.end[k] > TRACE_MAX ? s.end[k] - TRACE_MAX : 0;
    }
    return s;
}

/*
 * Matches the second side's steps with the first's. True: after those that agree comes a step that does not. The interpreter repeats a string instruction as one
 * step, the translator may be seen in the middle.
 */
static bool steps_match(const struct lockstep *l, struct steps *s)
{
    uint64_t at = s->first[0];
    bool any = false;
    for (uint64_t n = s->first[1]; n < s->end[1]; n++) {
        uint64_t k = at;
        while (k < s->end[0] && !steps_equal(step_at(l, 0, k), step_at(l, 1, n)))
            k++;
        if (k < s->end[0]) {
            any = true;
            at = s->mine = k;
            s->theirs = n;
        } else if (any && step_at(l, 1, n)->gpr[GPR_RIP] != step_at(l, 1, s->theirs)->gpr[GPR_RIP]) {
            return true;
        } else if (n == 0) {
            return true;
        }
    }
    return false;
}

/* The interpreter's step that has the other's rip, the last common one or soon after it; NULL: none. */
static const struct step *counterpart(const struct lockstep *l, const struct steps *s, const struct step *theirs)
{
    for (uint64_t n = s->mine; n < s->end[0] && n < s->mine + 2 * BT_BLOCK_INSNS_MAX; n++)
        if (step_at(l, 0, n)->gpr[GPR_RIP] == theirs->gpr[GPR_RIP])
            return step_at(l, 0, n);
    return NULL;
}

static void steps_print(const struct lockstep *l, const struct steps *s)
{
    uint64_t first = s->mine > s->first[0] + STEPS_BEFORE ? s->mine - STEPS_BEFORE : s->first[0];
    const struct step *wrong = step_at(l, 1, s->theirs + 1), *right = counterpart(l, s, wrong);
    printf("the last state that both have is step %llu of %llu after event %llu; executed there (>: from here on differently):\n", (unsigned long long)s->mine,
           (unsigned long long)s->end[0], (unsigned long long)l->plan.trace_from);
    for (uint64_t n = first; n < s->end[0] && n < s->mine + STEPS_AFTER; n++)
        step_print(step_at(l, 0, n), n == s->mine ? ">" : " ");
    if (!right)
        printf("%s has no state at %#llx soon after that; %s has\n", l->engine[0], (unsigned long long)wrong->gpr[GPR_RIP], l->engine[1]);
    else
        printf("registers at %#llx, where %s is seen next (nothing listed: vector or system state):\n", (unsigned long long)wrong->gpr[GPR_RIP], l->engine[1]);
    if (right)
        registers_print(right, wrong, l->engine);
}

/* Between the second side's last two steps, memory became what it should not. */
static bool change_print(const struct lockstep *l, const struct steps *s)
{
    uint64_t n = s->end[1];
    if (l->plan.trace_word == ~0ull || n < s->first[1] + 2 || step_at(l, 1, n - 1)->word != l->plan.trace_value || step_at(l, 1, n - 2)->word == l->plan.trace_value)
        return false;
    printf("%s changes the word at gpa %#llx from %016llx to %016llx at step %llu after event %llu, between the last two of:\n", l->engine[1], (unsigned long long)l->plan.trace_word,
           (unsigned long long)step_at(l, 1, n - 2)->word, (unsigned long long)l->plan.trace_value, (unsigned long long)n - 2, (unsigned long long)l->plan.trace_from);
    for (uint64_t k = n > s->first[1] + STEPS_BEFORE ? n - STEPS_BEFORE : s->first[1]; k < n; k++)
        step_print(step_at(l, 1, k), k == n - 2 ? ">" : " ");
    return true;
}

/* True: found. The difference shows at `number`. */
static bool trace(struct lockstep *l, uint64_t number, uint16_t block_insns)
{
    l->plan.trace_from = number - 1;
    l->plan.trace_block_insns = block_insns;
    struct run_result result;
    bool differs = stop_at(l, number, &result);
    struct steps steps = steps_there(l);
    static const char *const ends[] = {"all is equal", "state differs", "memory differs", "one side is silent", "both sides are silent"};
    printf("steps between events %llu and %llu, blocks of %u: %s %llu, %s %llu; then %s\n", (unsigned long long)number - 1, (unsigned long long)number, block_insns, l->engine[0],
           (unsigned long long)steps.end[0], l->engine[1], (unsigned long long)steps.end[1], ends[result.end]);
    if (!differs || result.number < number) {
        printf("the difference %s\n", differs ? "comes earlier now" : "does not come back this way");
        return false;
    }
    if (change_print(l, &steps))
        return true;
    if (!steps_match(l, &steps)) {
        printf("no step differs\n");
        return false;
    }
    steps_print(l, &steps);
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
    if (first->end == RUN_MEMORY_DIFFERS && first->last[0].kind == EVENT_END)
        number--; /* nothing but the comparison happens at the end */
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
