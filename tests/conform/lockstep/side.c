/*
 * One side of the lockstep: a machine whose events are said to the parent.
 *
 * The machine is made as for any guest, but its threads are never started: this file runs the vCPU and the loop, in one thread. Calls of the engine to the machine come here first
 * (struct vcpu_host_ops). Everything between event_begin and event_end happens at one moment of the guest's time.
 * An interrupt that the local APIC has after an event is offered to the engine at once; with IF clear the engine has to take it when IF is set, and the parent sees whether both do so at the
 * same instruction.
 */
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "arch/paging.h"
#include "lockstep.h"
#include "util/log.h"

#define COM1_DATA 0x3f8u
#define COM1_LINE_CONTROL 0x3fbu
#define LINE_CONTROL_DLAB 0x80u
#define EVENT_NS_LEAST 200u
#define EVENT_NS_SPREAD 4096u

/* ---- what the parent is told ---- */

static struct icpu *icpu_of(const struct side *s)
{
    return (struct icpu *)s->vcpu;
}

static const uint8_t *page_at(struct side *s, gpa_t gpa)
{
    return physmap_get(s->machine->memory, gpa & ~PAGE_MASK_BITS, PAGE_SIZE_BYTES, PHYSMAP_READ);
}

static uint64_t memory_hash(struct side *s, uint64_t *pages)
{
    struct physmap *memory = s->machine->memory;
    uint64_t h = 0;
    for (uint64_t offset = 0; offset < physmap_ram_bytes(memory); offset += PAGE_SIZE_BYTES) {
        uint64_t page = hash_bytes(page_at(s, physmap_gpa(memory, offset)), PAGE_SIZE_BYTES, offset);
        if (pages)
            pages[offset / PAGE_SIZE_BYTES] = page;
        h = hash_bytes(&page, sizeof page, h);
    }
    return h;
}

static uint64_t ram_hash(struct side *s)
{
    const struct plan *plan = &s->plan;
    uint64_t h = 0;
    if (!plan->watched_count)
        return plan->ram_interval && s->number % plan->ram_interval == 0 ? memory_hash(s, NULL) : 0;
    for (unsigned n = 0; n < plan->watched_count && s->number >= plan->watch_from; n++)
        h = hash_bytes(page_at(s, plan->watched[n]), PAGE_SIZE_BYTES, h);
    return h;
}

static void detail(struct side *s, const struct cpu_state *state)
{
    const struct plan *plan = &s->plan;
    struct channel *channel = s->channel;
    channel->state[s->number == plan->detail] = *state;
    if (s->number != plan->detail)
        return;
    memory_hash(s, channel->page);
    for (unsigned n = 0; n < plan->watched_count; n++)
        memcpy(channel->watched[n], page_at(s, plan->watched[n]), PAGE_SIZE_BYTES);
}

static void produce(struct side *s, const struct record *record)
{
    struct channel *channel = s->channel;
    uint64_t at = atomic_load(&channel->produced);
    while (at - atomic_load(&channel->consumed) >= RING)
        usleep(200);
    channel->ring[at % RING] = *record;
    atomic_store(&channel->produced, at + 1);
}

static void end_now(struct side *s, uint64_t why)
{
    bool memory = s->machine && s->plan.ram_interval && !s->plan.watched_count;
    if (!s->ended)
        produce(s, &(struct record){.kind = EVENT_END, .where = why, .time_ns = virtual_now(), .ram = memory ? memory_hash(s, NULL) : 0});
    s->ended = s->leave = true;
}

/* ---- time between events ---- */

static uint64_t stack_hash(struct side *s, const struct cpu_state *state)
{
    const struct icpu *c = icpu_of(s);
    struct paging_result page;
    uint32_t error;
    unsigned access = PAGING_READ | PAGING_AC | PAGING_NO_UPDATE | (c->cpl == 3 ? PAGING_USER : 0);
    if (paging_walk(c->v.memory, state, c->max_phys_bits, state->gpr[GPR_RSP], access, &page, &error))
        return 0;
    const void *at = physmap_get(c->v.memory, page.gpa & ~PAGE_MASK_BITS, PAGE_SIZE_BYTES, PHYSMAP_READ);
    return at ? hash_bytes(at, PAGE_SIZE_BYTES, 0) : 0;
}

/* The leader is always one event ahead; when its next one is in the middle of nothing, this side looks out for the place. */
static void follow(struct side *s)
{
    struct channel *leader = s->leader;
    if (!leader || s->ended)
        return;
    while (atomic_load(&leader->produced) <= s->number)
        usleep(50);
    s->target = leader->ring[s->number % RING];
    s->following = s->target.kind == EVENT_ASYNC;
    if (s->following)
        vcpu_raise_attention(s->vcpu);
}

/* One more event. The state is that of before. */
static void tell(struct side *s, struct record record, const struct cpu_state *state)
{
    const struct plan *plan = &s->plan;
    if (s->ended)
        return;
    record.rip = state->gpr[GPR_RIP];
    record.state = state_hash(state);
    record.time_ns = virtual_now();
    record.ram = ram_hash(s);
    if (plan->detail && (s->number == plan->detail || s->number == plan->detail - 1))
        detail(s, state);
    produce(s, &record);
    if (plan->trace_from && s->number == plan->trace_from)
        s->leave = true;
    if (++s->number >= plan->events)
        end_now(s, END_LIMIT);
    follow(s);
}

/* ---- steps ---- */

/* The byte at rip + n, without touching accessed bits. */
static bool code_byte(const struct side *s, const struct cpu_state *state, unsigned n, uint8_t *byte)
{
    const struct icpu *c = icpu_of(s);
    gva_t gva = state->gpr[GPR_RIP] + n + (c->code_bits == 64 ? 0 : state->seg[SEG_CS].base);
    struct paging_result page;
    uint32_t error;
    if (paging_walk(c->v.memory, state, c->max_phys_bits, gva, PAGING_FETCH | PAGING_NO_UPDATE | (c->cpl == 3 ? PAGING_USER : 0), &page, &error))
        return false;
    const uint8_t *at = physmap_get(c->v.memory, page.gpa, 1, PHYSMAP_READ);
    *byte = at ? *at : 0;
    return true;
}

void side_trace(struct side *s, bool running)
{
    struct channel *channel = s->channel;
    struct cpu_state state;
    struct icpu *c = icpu_of(s);
    uint64_t n = atomic_load(&channel->steps);
    if (s->traced)
        return;
    struct step *step = &channel->trace[n % TRACE_MAX];
    state_capture(&state, s->vcpu, running);
    memset(step, 0, sizeof *step);
    state.interrupt_shadow = false; /* of STI: the translator keeps it by where it looks for interrupts */
    step->state = state_hash(&state);
    memcpy(step->gpr, state.gpr, sizeof step->gpr);
    step->rflags = state.rflags;
    step->code_bits = (uint8_t)c->code_bits;
    if (s->plan.trace_word != ~0ull)
        memcpy(&step->word, physmap_get(c->v.memory, s->plan.trace_word, 8, PHYSMAP_READ), 8);
    s->traced = s->plan.trace_word != ~0ull && n && step->word == s->plan.trace_value && channel->trace[(n - 1) % TRACE_MAX].word != step->word;
    for (unsigned k = 0; k < 15 && code_byte(s, &state, k, &step->code[k]); k++)
        ;
    atomic_store(&channel->steps, n + 1);
}

/* ---- events ---- */

static uint64_t event_ns(struct side *s)
{
    uint64_t noise = s->number * 0x9e3779b97f4a7c15ull ^ s->plan.seed * 0xbf58476d1ce4e5b9ull;
    noise ^= noise >> 31;
    return EVENT_NS_LEAST + (noise * 0x94d049bb133111ebull >> 40) % EVENT_NS_SPREAD;
}

static void event_begin(struct side *s, struct cpu_state *state)
{
    s->depth++;
    state_capture(state, s->vcpu, true);
    virtual_set(virtual_now() + event_ns(s));
    virtual_run(s->machine->loop);
}

static void type_some(struct side *s)
{
    if (!s->typed || !*s->typed || (!s->line_begun && !s->prompted))
        return;
    const char *end = strchr(s->typed, '\n');
    size_t length = end ? (size_t)(end - s->typed) + 1 : strlen(s->typed);
    pthread_mutex_lock(&s->machine->device_lock);
    size_t taken = uart_receive(s->machine->com1, (const uint8_t *)s->typed, length);
    pthread_mutex_unlock(&s->machine->device_lock);
    s->line_begun = taken < length;
    s->typed += taken;
    s->prompted = false;
}

static void interrupts_offer(struct side *s)
{
    if (s->ops->interrupt_peek(s->host) >= 0)
        s->offered = true;
    if (!s->offered && !s->leave && !atomic_load(&s->vcpu->attention))
        return;
    vcpu_raise_attention(s->vcpu);
    stop_after_current(icpu_of(s), &s->stop);
}

static void event_end(struct side *s, struct record record, const struct cpu_state *state)
{
    virtual_run(s->machine->loop);
    type_some(s);
    tell(s, record, state);
    interrupts_offer(s);
    s->depth--;
}

static void tsc_read(void *ctx)
{
    struct side *s = ctx;
    struct cpu_state state;
    if (s->depth)
        return; /* by a device */
    event_begin(s, &state);
    event_end(s, (struct record){.kind = EVENT_TSC}, &state);
}

/* ---- what the engine asks ---- */

static uint32_t port_read(void *host, uint16_t port, unsigned size_bytes)
{
    struct side *s = host;
    struct cpu_state state;
    event_begin(s, &state);
    uint32_t value = s->ops->port_read(s->host, port, size_bytes);
    event_end(s, (struct record){EVENT_PORT_READ, (uint8_t)size_bytes, port, value}, &state);
    return value;
}

/* "# ", perhaps followed by a question for the cursor's place. */
static bool is_prompt(const char last[6])
{
    return !memcmp(last + 4, "# ", 2) || !memcmp(last, "# \033[6n", 6);
}

static void prompt_look(struct side *s, char c)
{
    memmove(s->last, s->last + 1, sizeof s->last - 1);
    s->last[sizeof s->last - 1] = c;
    if (s->line_length < sizeof s->line - 1)
        s->line[s->line_length++] = c;
    if (!s->plan.prompt)
        s->prompted = is_prompt(s->last);
    if (c != '\n')
        return;
    s->line[s->line_length] = 0;
    s->line_length = 0;
    if (s->plan.prompt && !strncmp(s->line, s->plan.prompt, strlen(s->plan.prompt)))
        s->prompted = true;
}

static void console_note(struct side *s, uint16_t port, uint8_t value)
{
    if (port == COM1_LINE_CONTROL)
        s->line_control_dlab = value & LINE_CONTROL_DLAB;
    if (port != COM1_DATA || s->line_control_dlab)
        return;
    prompt_look(s, (char)value);
    if (s->plan.verbose) {
        putchar(value);
        fflush(stdout);
    }
}

static void port_write(void *host, uint16_t port, unsigned size_bytes, uint32_t value)
{
    struct side *s = host;
    struct cpu_state state;
    event_begin(s, &state);
    s->ops->port_write(s->host, port, size_bytes, value);
    console_note(s, port, (uint8_t)value);
    event_end(s, (struct record){EVENT_PORT_WRITE, (uint8_t)size_bytes, port, value}, &state);
}

static uint64_t mmio_read_event(void *host, gpa_t gpa, unsigned size_bytes)
{
    struct side *s = host;
    struct cpu_state state;
    event_begin(s, &state);
    uint64_t value = s->ops->mmio_read(s->host, gpa, size_bytes);
    event_end(s, (struct record){EVENT_MMIO_READ, (uint8_t)size_bytes, gpa, value}, &state);
    return value;
}

static void mmio_write_event(void *host, gpa_t gpa, unsigned size_bytes, uint64_t value)
{
    struct side *s = host;
    struct cpu_state state;
    event_begin(s, &state);
    s->ops->mmio_write(s->host, gpa, size_bytes, value);
    event_end(s, (struct record){EVENT_MMIO_WRITE, (uint8_t)size_bytes, gpa, value}, &state);
}

static int msr_read(void *host, uint32_t index, uint64_t *value)
{
    struct side *s = host;
    struct cpu_state state;
    event_begin(s, &state);
    int r = s->ops->msr_read(s->host, index, value);
    event_end(s, (struct record){EVENT_MSR_READ, r != 0, index, r ? 0 : *value}, &state);
    return r;
}

static int msr_write(void *host, uint32_t index, uint64_t value)
{
    struct side *s = host;
    struct cpu_state state;
    event_begin(s, &state);
    int r = s->ops->msr_write(s->host, index, value);
    event_end(s, (struct record){EVENT_MSR_WRITE, r != 0, index, value}, &state);
    return r;
}

static uint8_t cr8_read(void *host)
{
    struct side *s = host;
    struct cpu_state state;
    event_begin(s, &state);
    uint8_t value = s->ops->cr8_read(s->host);
    event_end(s, (struct record){EVENT_CR8_READ, 1, 0, value}, &state);
    return value;
}

static void cr8_write(void *host, uint8_t value)
{
    struct side *s = host;
    struct cpu_state state;
    event_begin(s, &state);
    s->ops->cr8_write(s->host, value);
    event_end(s, (struct record){EVENT_CR8_WRITE, 1, 0, value}, &state);
}

static int interrupt_peek(void *host)
{
    struct side *s = host;
    return s->offered ? s->ops->interrupt_peek(s->host) : -1;
}

static int interrupt_ack(void *host)
{
    struct side *s = host;
    struct cpu_state state;
    s->depth++;
    int vector = s->ops->interrupt_ack(s->host);
    s->offered = false;
    state_capture(&state, s->vcpu, true);
    tell(s, (struct record){.kind = EVENT_INTERRUPT, .where = (uint64_t)vector}, &state);
    s->depth--;
    return vector;
}

static bool nmi_take(void *host)
{
    struct side *s = host;
    return s->ops->nmi_take(s->host);
}

static void async_event(struct side *s, uint64_t stack)
{
    struct cpu_state state;
    event_begin(s, &state);
    s->following = false;
    tell(s, (struct record){.kind = EVENT_ASYNC, .where = stack}, &state);
    if (s->ops->interrupt_peek(s->host) >= 0)
        s->offered = true;
    s->depth--;
}

static bool is_target(const struct side *s, const struct cpu_state *state)
{
    return state->gpr[GPR_RIP] == s->target.rip && state_hash(state) == s->target.state;
}

static bool repeated_comparison_here(const struct side *s)
{
    bool repeated = false;
    uint8_t byte;
    for (unsigned n = 0; n < 5 && code_byte(s, &s->vcpu->cpu, n, &byte); n++) {
        if ((byte & 0xfe) == 0xa6 || (byte & 0xfe) == 0xae)
            return repeated;
        if (byte != 0x66 && byte != 0x67 && (byte & 0xfe) != 0xf2 && (byte & 0xf0) != 0x40)
            return false;
        repeated |= (byte & 0xfe) == 0xf2;
    }
    return false;
}

/*
 * Is the vCPU where the leader was? If not, soon? Attention, by which this side looks again after the next block, would end a repeated comparison after any element, and a fault at a
 * later one would leave other flags: those are done in one step.
 */
static bool async_here(struct side *s)
{
    struct cpu_state state;
    uint64_t ahead = s->target.rip - s->vcpu->cpu.gpr[GPR_RIP];
    s->stepping = ahead < BLOCK_BYTES_MAX || repeated_comparison_here(s);
    if (!s->stepping)
        vcpu_raise_attention(s->vcpu);
    if (ahead)
        return false;
    state_capture(&state, s->vcpu, true);
    return is_target(s, &state) && stack_hash(s, &state) == s->target.where;
}

/* Between two instructions. */
static void async_look(struct side *s)
{
    struct cpu_state state;
    if (s->async_due) {
        s->async_due = false;
        state_capture(&state, s->vcpu, true);
        async_event(s, stack_hash(s, &state));
    }
    while (s->following && async_here(s)) /* several times in the same state, when no interrupt came of the first */
        async_event(s, s->target.where);
    if (!s->following)
        s->stepping = false;
}

static bool must_exit(void *host)
{
    struct side *s = host;
    bool stepping = s->stepping;
    stop_undo(&s->stop);
    async_look(s);
    if (s->leader && s->offered)
        s->stepping = true; /* run would go on with a block of the handler before it looks again */
    if (s->stepping && !stepping)
        return true;
    return s->leave || s->ops->must_exit(s->host);
}

static const struct vcpu_host_ops side_ops = {
    .port_read = port_read,
    .port_write = port_write,
    .mmio_read = mmio_read_event,
    .mmio_write = mmio_write_event,
    .msr_read = msr_read,
    .msr_write = msr_write,
    .interrupt_peek = interrupt_peek,
    .interrupt_ack = interrupt_ack,
    .nmi_take = nmi_take,
    .cr8_read = cr8_read,
    .cr8_write = cr8_write,
    .must_exit = must_exit,
};

/* ---- running ---- */

/* Time goes on to the next thing that happens. */
static void halted(struct side *s)
{
    struct cpu_state state;
    uint64_t deadline;
    s->depth++;
    state_capture(&state, s->vcpu, false);
    tell(s, (struct record){.kind = EVENT_HALT}, &state);
    type_some(s);
    if (s->ops->interrupt_peek(s->host) < 0) {
        if (!virtual_deadline(s->machine->loop, &deadline))
            end_now(s, END_HALTED);
        else if (deadline > virtual_now())
            virtual_set(deadline);
        virtual_run(s->machine->loop);
    }
    s->offered = s->ops->interrupt_peek(s->host) >= 0;
    s->depth--;
}

static enum engine_exit run_some(struct side *s)
{
    bool interp = s->vcpu->ops == &interp_engine;
    if (s->leave && !s->ended) { /* at plan.trace_from */
        s->leave = false;
        s->tracing = true;
        side_trace(s, false);
        if (!interp)
            disturb_trace_begin(s);
    }
    if (!interp || (!s->tracing && !s->stepping))
        return s->vcpu->ops->run(s->vcpu);
    enum engine_exit why = s->vcpu->ops->step(s->vcpu);
    if (s->tracing)
        side_trace(s, false);
    return why;
}

static void run(struct side *s)
{
    while (!s->ended) {
        enum engine_exit why = run_some(s);
        if (s->machine->end != MACHINE_RUNNING)
            end_now(s, s->machine->end);
        else if (why == ENGINE_EXIT_HALT)
            halted(s);
        else if (why == ENGINE_EXIT_SHUTDOWN)
            end_now(s, MACHINE_CRASH);
        else if (why == ENGINE_EXIT_ERROR)
            end_now(s, END_FAILED);
    }
}

void side_main(const struct plan *plan, struct channel *channel, struct channel *leader)
{
    struct error err = {0};
    struct side side = {.plan = *plan, .channel = channel, .leader = leader, .typed = plan->type, .random = plan->seed * 2 + 1, .depth = 1};
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    plan->config->engine = (char *)plan->engine;
    virtual_watch_tsc(tsc_read, &side);
    if (machine_create(&side.machine, plan->config, &err)) {
        fprintf(stderr, "%s: %s\n", plan->engine, err.text);
        end_now(&side, END_FAILED);
        _exit(2);
    }
    struct vcpu_thread *thread = &side.machine->vcpu[0];
    side.vcpu = thread->vcpu;
    side.ops = side.vcpu->host_ops;
    side.host = side.vcpu->host;
    side.vcpu->host_ops = &side_ops;
    side.vcpu->host = &side;
    side.depth = 0;
    native_pointers_forget(icpu_of(&side)); /* the translator keeps FDP less often */
    if (side.vcpu->ops == &bt_engine_ops)
        disturb_prepare(&side);
    run(&side);
    _exit(0);
}
