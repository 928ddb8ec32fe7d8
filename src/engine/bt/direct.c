/*
 * Direct execution: user code of processes that compute runs untranslated, in a process of the host's that the guest's address space is mirrored into (direct_space.h).
 *
 * Leaving costs some microseconds, so it is for processes that the timer keeps finding in user mode, and it is given up where they leave user mode too often. Only guests whose user
 * segments are what Linux gives its processes run so. What user code can observe is either the same as the guest's processor's, or faults, or is looked for in its code
 * (direct_code.h). Whatever stops the process is a precise instruction boundary; what is more than a missing mapping is the interpreter's. Registers that a process of the host's
 * cannot be given (selectors, bases in the upper half) are the interpreter's and the translator's, too.
 * Between direct_run's calls all guest state is where the interpreter has it.
 * Threading: the vCPU's thread. direct_kick: any. Shadows are changed with e->lock held (direct_space.h).
 */
#include "engine/bt/direct.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "arch/host.h"
#include "arch/paging.h"
#include "engine/bt/direct_space.h"
#include "engine/interp/system_priv.h"
#include "state/inputs.h"
#include "util/log.h"
#include "util/sandbox_rules.h"

SANDBOX_ALLOW_WITH(SANDBOX_DIRECT, IN_VCPU, sched_setaffinity);

#define SPACES 6u
#define PROCESSES 64u
#define DR6_BS (1ull << 14)
#define USEFUL_TIMES 3u      /* of the cheapest stop there was; the usual one costs twice that */
#define RESET_TIMES 8u
#define HOLD_US_MIN 32u       /* in translated code after a stop that came too soon; doubled as long as they do */
#define HOLD_US_MAX 16384u
#define HOLD_US_FAILED 2000000u /* doubled each time: making a shadow for nothing can take a second */
#define FAILURES_COUNTED 6u
#define BALANCE_US_MAX 1024
#define TRANSLATION_NS_MAX 50000u
#define PIN_CHECK_US 65536u
#define PIN_PAUSE_US 8192u
#define USER_CS 0x33
#define USER_SS 0x2b
#define FLAGS_FREE (RFLAGS_OSZAPC | RFLAGS_DF | RFLAGS_NT) /* moved in both directions */
#define FLAGS_FIXED RFLAGS_ID /* the process has it as its code made it; nobody can set it from outside */
#define FLAGS_REPORTED (FLAGS_FREE | FLAGS_FIXED | RFLAGS_AC | RFLAGS_TF)
#define FLAGS_UNWANTED (RFLAGS_TF | RFLAGS_AC | RFLAGS_VM | RFLAGS_RF | RFLAGS_VIF | RFLAGS_VIP | RFLAGS_IOPL)
#define INSN_BYTES_MAX 15u

/* What is known of one guest process, by the root of its page tables. */
struct process {
    gpa_t root;
    uint64_t used;
    uint64_t hold_tsc;     /* for so long it was held last time */
    uint64_t held_until;   /* by the TSC: translated code until then */
    int64_t balance;       /* TSC ticks: spent on translating its code, less those spent on stops that came too soon; at most BALANCE_US_MAX off zero */
    struct direct_space *space; /* NULL: none now */
    unsigned asid;         /* under which the space was used last */
    unsigned failures;     /* of its spaces, for want of something on the host; up to FAILURES_COUNTED */
};

struct direct {
    bool always; /* for tests: every process, at once */
    bool impossible;
    uint64_t host_xcr0; /* asking costs a VM exit */
    uint64_t tsc_us;
    uint64_t overhead_tsc; /* of one run that does nothing */
    uint64_t clock;
    struct process process[PROCESSES];
    struct process *current; /* CR3's, while it runs so; NULL: it does not */
    gva_t fault_address;     /* of the guest's page fault delivered last, ~0: none */
    bool held;               /* until user mode is entered again: the code at hand cannot run here */
    pid_t tracer; /* thread that the processes have as such: the one that runs the vCPU */
    unsigned spaces;
    int pinned; /* processor; -1: none */
    bool shared_pin;
    cpu_set_t affinity; /* before */
    uint64_t pin_checked, pin_cpu_ns;
    pthread_mutex_t kick_lock; /* a process is not reaped while it is being kicked */
    _Atomic int running; /* its kicker; -1: none runs */
    uint64_t runs[DIRECT_COUNTERS];
};

/* ---- on and off ---- */

int direct_create(struct bt_vcpu *b, enum engine_direct use)
{
    b->direct = NULL;
    if (use == DIRECT_OFF)
        return 0;
    struct direct *d = calloc(1, sizeof(*d));
    if (!d)
        return -ENOMEM;
    d->always = use == DIRECT_ALWAYS;
    d->host_xcr0 = host_xcr0();
    d->tsc_us = inputs_tsc_khz_roughly() / 1000 + 1;
    d->fault_address = ~0ull;
    d->pinned = -1;
    atomic_init(&d->running, -1);
    pthread_mutex_init(&d->kick_lock, NULL);
    b->direct = d;
    return 0;
}

/* Stops of the processes are waited for; nobody wants a SIGCHLD for each. */
static void child_stops_silence(void)
{
    struct sigaction action;
    if (sigaction(SIGCHLD, NULL, &action) || (action.sa_flags & SA_NOCLDSTOP))
        return;
    action.sa_flags |= SA_NOCLDSTOP;
    sigaction(SIGCHLD, &action, NULL);
}

/* From now on it is nobody's. */
static struct direct_space *space_detach(struct bt_vcpu *b, struct process *p)
{
    struct direct *d = b->direct;
    struct direct_space *space = p->space;
    pthread_mutex_lock(&b->engine->lock);
    p->space = NULL;
    d->spaces--;
    pthread_mutex_unlock(&b->engine->lock);
    if (d->current == p)
        d->current = NULL;
    return space;
}

static void space_drop(struct bt_vcpu *b, struct process *p)
{
    struct direct *d = b->direct;
    if (!p->space)
        return;
    struct direct_space *space = space_detach(b, p);
    pthread_mutex_lock(&d->kick_lock); /* a kick under way ends first */
    pthread_mutex_unlock(&d->kick_lock);
    direct_space_destroy(space);
}

/* Emptied, for another process. NULL: it was of no use any more. */
static struct direct_space *space_take(struct bt_vcpu *b, struct process *p)
{
    if (direct_space_reset(p->space)) {
        space_drop(b, p);
        return NULL;
    }
    return space_detach(b, p);
}

static void unpin(struct bt_vcpu *b)
{
    struct direct *d = b->direct;
    if (d->pinned < 0)
        return;
    sched_setaffinity(0, sizeof(d->affinity), &d->affinity);
    pthread_mutex_lock(&b->engine->lock);
    if (!d->shared_pin)
        CPU_CLR((unsigned)d->pinned, &b->engine->pinned);
    pthread_mutex_unlock(&b->engine->lock);
    d->pinned = -1;
}

static uint64_t cpu_time_ns(const struct direct_child *child)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec + direct_child_cpu_ns(child);
}

void direct_thread_enter(struct bt_vcpu *b)
{
    struct direct *d = b->direct;
    if (!d || d->tracer == gettid())
        return;
    for (unsigned n = 0; n < PROCESSES; n++)
        space_drop(b, &d->process[n]);
    child_stops_silence();
    d->tracer = gettid();
}

void direct_forget(struct bt_vcpu *b)
{
    if (b->direct)
        b->direct->tracer = 0; /* nobody's: the next to enter makes all anew */
}

void direct_thread_leave(struct bt_vcpu *b)
{
    if (b->direct)
        unpin(b);
}

void direct_destroy(struct bt_vcpu *b)
{
    struct direct *d = b->direct;
    if (!d)
        return;
    for (unsigned n = 0; n < PROCESSES; n++)
        space_drop(b, &d->process[n]);
    pthread_mutex_destroy(&d->kick_lock);
    free(d);
    b->direct = NULL;
}

static uint64_t tsc(void)
{
    return __builtin_ia32_rdtsc();
}

static void hold(const struct direct *d, struct process *p, uint64_t us)
{
    p->held_until = tsc() + us * d->tsc_us;
}

/* The user is told once, whatever there is of it. `what`: a sentence without its end. */
static void tell(struct bt_engine *e, const char *what, const char *why)
{
    pthread_mutex_lock(&e->lock);
    bool first = !e->direct_told;
    e->direct_told = true;
    pthread_mutex_unlock(&e->lock);
    if (first)
        log_info("%s: %s", what, why);
}

/* The first time: not on this host, and no processor tries again. Later: not now, for want of something that may come back. */
static void start_failed(struct bt_vcpu *b, struct process *p, const struct error *err)
{
    struct direct *d = b->direct;
    hold(d, p, HOLD_US_FAILED);
    d->impossible = !d->runs[DIRECT_STARTED];
    tell(b->engine, d->impossible ? "user code is translated, not executed directly" : "some user code is translated for a while, not executed directly", err->text);
}

/* Something happened to its shadow. -EADDRINUSE is the guest's doing: it has mapped something where the process has its own pages. */
static void run_failed(struct bt_vcpu *b, struct process *p, int rc)
{
    space_drop(b, p);
    hold(b->direct, p, HOLD_US_FAILED << p->failures);
    if (rc == -EADDRINUSE)
        return;
    p->failures += p->failures < FAILURES_COUNTED;
    tell(b->engine, "some user code is translated for a while, not executed directly",
         rc == -ENOMEM ? "no more mappings (vm.max_map_count)" : rc == -ESRCH ? "its process was killed" : strerror(-rc));
}

/* ---- which process ---- */

static gpa_t root_of(const struct cpu_state *cpu)
{
    return cpu->cr3 & 0x000ffffffffff000ull;
}

static unsigned asid_of(const struct cpu_state *cpu)
{
    return cpu->cr4 & CR4_PCIDE ? cpu->cr3 & 0xfff : 0;
}

static struct process *process_find(struct direct *d, gpa_t root)
{
    for (unsigned n = 0; n < PROCESSES; n++)
        if (d->process[n].used && d->process[n].root == root)
            return &d->process[n];
    return NULL;
}

static struct process *process_get(struct bt_vcpu *b, gpa_t root)
{
    struct direct *d = b->direct;
    struct process *p = process_find(d, root);
    if (!p) {
        p = &d->process[0];
        for (unsigned n = 1; n < PROCESSES; n++)
            if (d->process[n].used < p->used)
                p = &d->process[n];
        simd_save(&b->c);
        space_drop(b, p);
        *p = (struct process){.root = root};
    }
    p->used = ++d->clock;
    return p;
}

/* Could this guest's user code tell? */
static bool guest_fits(const struct bt_vcpu *b)
{
    static const uint64_t wanted = CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_OSXSAVE | CR4_FSGSBASE;
    const struct cpu_state *cpu = &b->c.v.cpu;
    return (cpu->efer & EFER_LMA) && (cpu->efer & EFER_SCE) && (cpu->cr4 & (wanted | CR4_PKE | CR4_TSD)) == wanted && !(cpu->cr0 & (CR0_TS | CR0_EM)) &&
           cpu->xcr0 == b->direct->host_xcr0 && inputs_tsc_is_host() && inputs_random_is_host();
}

static struct process *oldest_with_space(struct direct *d)
{
    struct process *oldest = NULL;
    for (unsigned n = 0; n < PROCESSES; n++)
        if (d->process[n].space && (!oldest || d->process[n].used < oldest->used))
            oldest = &d->process[n];
    return oldest;
}

/* Makes a shadow for CR3's process. */
static void process_start(struct bt_vcpu *b, struct process *p)
{
    struct direct *d = b->direct;
    struct direct_space *space;
    struct error err;
    if (d->impossible)
        return;
    simd_save(&b->c);
    space = d->spaces == SPACES ? space_take(b, oldest_with_space(d)) : NULL;
    if (!space && direct_space_create(&space, b->engine, &err)) {
        start_failed(b, p, &err);
        return;
    }
    p->asid = asid_of(&b->c.v.cpu);
    p->hold_tsc = p->held_until = 0;
    p->balance = 0;
    pthread_mutex_lock(&b->engine->lock);
    p->space = space;
    d->spaces++;
    pthread_mutex_unlock(&b->engine->lock);
    d->current = p;
    d->runs[DIRECT_STARTED]++;
}

/* An interrupt has come while user code ran. */
void direct_tick(struct bt_vcpu *b)
{
    struct direct *d = b->direct;
    if (!d || d->current || !guest_fits(b))
        return;
    struct process *p = process_get(b, root_of(&b->c.v.cpu));
    if (!p->space && tsc() >= p->held_until)
        process_start(b, p);
}

void direct_switch(struct bt_vcpu *b, bool keep)
{
    struct direct *d = b->direct;
    if (!d)
        return;
    unsigned asid = asid_of(&b->c.v.cpu);
    struct process *p = d->spaces ? process_find(d, root_of(&b->c.v.cpu)) : NULL;
    if (!keep)
        direct_flush(b, asid);
    d->held = false;
    d->fault_address = ~0ull;
    d->current = p && p->space ? p : NULL;
    if (d->current) {
        p->used = ++d->clock;
        if (p->asid != asid)
            direct_space_stale(p->space);
        p->asid = asid;
    }
}

/* ---- what the guest invalidates ---- */

void direct_flush(struct bt_vcpu *b, unsigned asid)
{
    struct direct *d = b->direct;
    for (unsigned n = 0; d && n < PROCESSES; n++)
        if (d->process[n].space && (asid == DIRECT_ALL_ASIDS || d->process[n].asid == asid))
            direct_space_stale(d->process[n].space);
}

void direct_flush_page(struct bt_vcpu *b, gva_t gva)
{
    struct direct *d = b->direct;
    for (unsigned n = 0; d && n < PROCESSES; n++)
        if (d->process[n].space)
            direct_space_stale_page(d->process[n].space, gva);
}

/* ---- translations ---- */

bool direct_release(struct bt_engine *e, uint64_t ram_offset)
{
    uint8_t *flags = &e->code_flags[ram_offset / PAGE_SIZE_BYTES];
    bool released = true;
    if (!(*flags & BT_CODE_DIRECT))
        return true;
    for (unsigned n = 0; n < INTERP_VCPUS_MAX; n++) {
        struct bt_vcpu *b = (struct bt_vcpu *)e->interp.vcpus[n];
        struct direct *d = b ? b->direct : NULL;
        for (unsigned k = 0; d && k < PROCESSES; k++)
            if (d->process[k].space && !direct_space_release(d->process[k].space, ram_offset)) {
                direct_kick(b);
                released = false;
            }
    }
    if (released)
        *flags &= (uint8_t)~BT_CODE_DIRECT;
    return released;
}

void direct_kick(struct bt_vcpu *b)
{
    struct direct *d = b->direct;
    if (!d || atomic_load(&d->running) < 0)
        return;
    pthread_mutex_lock(&d->kick_lock);
    int kicker = atomic_load(&d->running);
    if (kicker >= 0)
        direct_child_kick(kicker);
    pthread_mutex_unlock(&d->kick_lock);
}

/* ---- registers ---- */

#define GPR_MAP(X)                                                                                                       \
    X(GPR_RAX, rax) X(GPR_RCX, rcx) X(GPR_RDX, rdx) X(GPR_RBX, rbx) X(GPR_RSP, rsp) X(GPR_RBP, rbp) X(GPR_RSI, rsi)       \
    X(GPR_RDI, rdi) X(GPR_R8, r8) X(GPR_R9, r9) X(GPR_R10, r10) X(GPR_R11, r11) X(GPR_R12, r12) X(GPR_R13, r13)           \
    X(GPR_R14, r14) X(GPR_R15, r15) X(GPR_RIP, rip)

static void registers_put(const struct bt_vcpu *b, struct user_regs_struct *regs)
{
    const struct cpu_state *cpu = &b->c.v.cpu;
#define PUT(n, field) regs->field = cpu->gpr[n];
    GPR_MAP(PUT)
#undef PUT
    regs->eflags = flags_get(&b->c) & FLAGS_FREE;
    regs->cs = USER_CS;
    regs->ss = USER_SS;
    regs->ds = cpu->seg[SEG_DS].selector;
    regs->es = cpu->seg[SEG_ES].selector;
    regs->fs = cpu->seg[SEG_FS].selector;
    regs->gs = cpu->seg[SEG_GS].selector;
    regs->fs_base = cpu->seg[SEG_FS].base;
    regs->gs_base = cpu->seg[SEG_GS].base;
}

static void base_get(struct bt_vcpu *b, unsigned segment, uint64_t base)
{
    b->c.v.cpu.seg[segment].base = b->c.segment_base[segment] = base;
}

static void registers_get(struct bt_vcpu *b, const struct user_regs_struct *regs)
{
    struct cpu_state *cpu = &b->c.v.cpu;
#define GET(n, field) cpu->gpr[n] = regs->field;
    GPR_MAP(GET)
#undef GET
    base_get(b, SEG_FS, regs->fs_base);
    base_get(b, SEG_GS, regs->gs_base);
    flags_set(&b->c, (flags_get(&b->c) & ~FLAGS_REPORTED) | (regs->eflags & FLAGS_REPORTED));
}

/* User code may have loaded others: with the guest's descriptors, as it would have. May raise. */
static void selectors_get(struct bt_vcpu *b, const struct user_regs_struct *regs)
{
    const struct {
        unsigned segment;
        uint16_t selector;
    } data[] = {{SEG_DS, (uint16_t)regs->ds}, {SEG_ES, (uint16_t)regs->es}, {SEG_FS, (uint16_t)regs->fs}, {SEG_GS, (uint16_t)regs->gs}, {SEG_SS, (uint16_t)regs->ss}};
    struct icpu *c = &b->c;
    for (unsigned n = 0; n < sizeof(data) / sizeof(data[0]); n++) {
        uint64_t base = c->v.cpu.seg[data[n].segment].base;
        if (data[n].selector == c->v.cpu.seg[data[n].segment].selector)
            continue;
        segment_load(c, data[n].segment, data[n].selector);
        if (data[n].segment == SEG_FS || data[n].segment == SEG_GS)
            base_get(b, data[n].segment, base);
    }
    if (regs->cs != USER_CS)
        far_jump(c, (uint16_t)regs->cs, regs->rip, 8);
}

static bool selector_is_plain(uint64_t selector)
{
    return !selector || selector == USER_SS;
}

/* The host's kernel takes no other bases, and of selectors not all others. */
static bool segments_are_plain(const struct user_regs_struct *regs)
{
    return regs->cs == USER_CS && regs->ss == USER_SS && selector_is_plain(regs->ds) && selector_is_plain(regs->es) && selector_is_plain(regs->fs) &&
           selector_is_plain(regs->gs) && regs->fs_base < DIRECT_ADDRESS_LIMIT && regs->gs_base < DIRECT_ADDRESS_LIMIT;
}

static bool guest_segments_are_plain(const struct cpu_state *cpu)
{
    const struct user_regs_struct regs = {.cs = cpu->seg[SEG_CS].selector, .ss = cpu->seg[SEG_SS].selector, .ds = cpu->seg[SEG_DS].selector, .es = cpu->seg[SEG_ES].selector,
        .fs = cpu->seg[SEG_FS].selector, .gs = cpu->seg[SEG_GS].selector, .fs_base = cpu->seg[SEG_FS].base, .gs_base = cpu->seg[SEG_GS].base};
    return segments_are_plain(&regs);
}

bool direct_wanted(const struct bt_vcpu *b)
{
    const struct direct *d = b->direct;
    const struct cpu_state *cpu = &b->c.v.cpu;
    return b->c.cpl == 3 && !d->held && b->c.code_bits == 64 && !b->c.slow && !b->c.careful && guest_segments_are_plain(cpu) && guest_fits(b) &&
           d->current->root == root_of(cpu) && cpu->gpr[GPR_RIP] < DIRECT_ADDRESS_LIMIT && !(cpu->rflags & FLAGS_UNWANTED) && (cpu->rflags & RFLAGS_IF) &&
           (cpu->rflags & FLAGS_FIXED) == direct_child_fixed_flags(direct_space_child(d->current->space));
}

/* The current address space runs so, if it is in user mode at all. */
bool direct_active(const struct bt_vcpu *b)
{
    const struct direct *d = b->direct;
    return d && d->current && (d->always || tsc() >= d->current->held_until);
}

static void balance_add(const struct direct *d, struct process *p, int64_t ticks)
{
    int64_t most = BALANCE_US_MAX * (int64_t)d->tsc_us;
    p->balance += ticks;
    if (p->balance > most)
        p->balance = most;
    else if (p->balance < -most)
        p->balance = -most;
}

/* Code that runs once is cheaper in the process, whatever its stops cost; a loop around a system call is translated once. Which it is, nobody knows: as much is spent on either. */
bool direct_preferred(struct bt_vcpu *b)
{
    const struct direct *d = b->direct;
    if (!d || !d->current || d->current->balance <= 0 || b->c.cpl != 3 || !direct_wanted(b))
        return false;
    d->current->held_until = 0;
    return true;
}

void direct_translated(struct bt_vcpu *b, uint64_t ns)
{
    const struct direct *d = b->direct;
    if (d && d->current && b->c.cpl == 3) /* a block takes no longer, unless others had the processor */
        balance_add(d, d->current, (int64_t)((ns < TRANSLATION_NS_MAX ? ns : TRANSLATION_NS_MAX) * d->tsc_us / 1000));
}

void direct_user_entered(struct bt_vcpu *b)
{
    struct direct *d = b->direct;
    if (!d)
        return;
    d->held = false;
    if (unlikely(d->always) && !d->current && b->c.cpl == 3 && guest_fits(b)) {
        struct process *p = process_get(b, root_of(&b->c.v.cpu));
        if (!p->space && tsc() >= p->held_until)
            process_start(b, p);
    }
}

/* ---- stops ---- */

/* Bytes of code at gva as user code may fetch them; how many. */
static unsigned fetch(const struct bt_vcpu *b, gva_t gva, uint8_t *bytes, unsigned count)
{
    struct paging_result page;
    uint32_t error;
    unsigned done = 0;
    while (done < count) {
        unsigned left = (unsigned)(PAGE_SIZE_BYTES - ((gva + done) & PAGE_MASK_BITS)), n = count - done < left ? count - done : left;
        if (paging_walk(b->c.v.memory, &b->c.v.cpu, b->c.max_phys_bits, gva + done, PAGING_FETCH | PAGING_USER | PAGING_NO_UPDATE, &page, &error))
            break;
        const void *host = physmap_get(b->c.v.memory, page.gpa, n, PHYSMAP_READ);
        if (!host)
            break;
        memcpy(bytes + done, host, n);
        done += n;
    }
    return done;
}

/* Fills for each page of [gva, +size). */
static enum direct_fill fill_range(struct bt_vcpu *b, struct direct_space *space, gva_t gva, unsigned size, unsigned access)
{
    enum direct_fill first = direct_space_fill(space, b, gva, access);
    if (first > DIRECT_FILL_SAME || (gva & PAGE_MASK_BITS) + size <= PAGE_SIZE_BYTES)
        return first;
    enum direct_fill second = direct_space_fill(space, b, (gva | PAGE_MASK_BITS) + 1, access);
    return second > DIRECT_FILL_SAME ? second : first == DIRECT_FILL_CHANGED ? first : second;
}

/* Maps what the instruction needs. True: go on with it; false: the interpreter, or with d->held translated code, does it. e->lock held. */
static bool fault_fill(struct bt_vcpu *b, struct direct_space *space, gva_t address)
{
    struct direct *d = b->direct;
    gva_t rip = b->c.v.cpu.gpr[GPR_RIP];
    uint8_t bytes[INSN_BYTES_MAX];
    struct bt_access access[4];
    enum direct_fill filled = direct_space_fill(space, b, rip, PAGING_FETCH);
    bool changed = filled == DIRECT_FILL_CHANGED;
    if (address - rip < INSN_BYTES_MAX && (address ^ rip) & ~PAGE_MASK_BITS && filled <= DIRECT_FILL_SAME) {
        filled = direct_space_fill(space, b, address, PAGING_FETCH); /* its end, perhaps */
        changed |= filled == DIRECT_FILL_CHANGED;
        if (filled == DIRECT_FILL_NOT)
            return false;
        /* When both pages have more to be stopped before than there are breakpoints, one is executable at the cost of the other: then it would be their turn for ever. */
        if (filled == DIRECT_FILL_CHANGED && direct_space_fill(space, b, rip, PAGING_FETCH) == DIRECT_FILL_CHANGED)
            return false;
    }
    d->held = filled == DIRECT_FILL_FORBIDDEN;
    if (filled > DIRECT_FILL_SAME)
        return false;
    unsigned available = fetch(b, rip, bytes, sizeof(bytes));
    int count = available ? translate_accesses(b, bytes, available, access) : -1;
    if (count < 0 && address != ~0ull) {
        filled = direct_space_fill(space, b, address, PAGING_READ);
        return filled == DIRECT_FILL_CHANGED || (filled == DIRECT_FILL_SAME && changed);
    }
    for (int n = 0; n < count; n++) {
        filled = fill_range(b, space, access[n].gva, access[n].size ? access[n].size : 1, access[n].write ? PAGING_WRITE : PAGING_READ);
        d->held = filled == DIRECT_FILL_FORBIDDEN;
        if (filled > DIRECT_FILL_SAME)
            return false;
        changed |= filled == DIRECT_FILL_CHANGED;
    }
    return changed;
}

static void system_call(struct bt_vcpu *b, const struct user_regs_struct *regs)
{
    static const struct insn syscall_insn = {.fn = op_syscall, .length = 2, .mnemonic = ZYDIS_MNEMONIC_SYSCALL};
    struct cpu_state *cpu = &b->c.v.cpu;
    uint8_t bytes[2];
    cpu->gpr[GPR_RAX] = regs->orig_rax;
    cpu->gpr[GPR_RIP] -= 2;
    if (fetch(b, cpu->gpr[GPR_RIP], bytes, 2) == 2 && bytes[0] == 0xcd) /* INT 0x80 */
        interp_run_one(&b->c);
    else
        interp_run_insn(&b->c, &syscall_insn);
}

/* RIP is behind INT3 in one of its two forms, or INT1. */
static void trap(struct bt_vcpu *b)
{
    uint64_t *rip = &b->c.v.cpu.gpr[GPR_RIP];
    uint8_t bytes[2] = {0};
    unsigned got = fetch(b, *rip - 2, bytes, 2);
    *rip -= got == 2 && bytes[0] == 0xcd && bytes[1] == 3 ? 2 : 1;
    interp_run_one(&b->c);
}

static void single_step(struct bt_vcpu *b)
{
    b->c.fault = (struct fault){.vector = VECTOR_DB, .dr6 = DR6_BS};
    exception_deliver(&b->c);
}

/* ---- running ---- */

/* The processor that this thread is on, unless another vCPU's is pinned there: then one that is free. */
static int processor_choose(struct bt_engine *e, const cpu_set_t *allowed)
{
    int here = sched_getcpu();
    if (here < 0 || here >= CPU_SETSIZE || !CPU_ISSET((unsigned)here, &e->pinned))
        return here < CPU_SETSIZE ? here : -1;
    for (int n = 0; n < CPU_SETSIZE; n++)
        if (CPU_ISSET((unsigned)n, allowed) && !CPU_ISSET((unsigned)n, &e->pinned))
            return n;
    return here;
}

/* The thread and the process take turns: on one processor that is several times faster than between two. */
static void pin(struct bt_vcpu *b, struct direct_child *child)
{
    struct direct *d = b->direct;
    struct bt_engine *e = b->engine;
    cpu_set_t one;
    if (d->pinned < 0) {
        if (sched_getaffinity(0, sizeof(d->affinity), &d->affinity))
            return;
        pthread_mutex_lock(&e->lock);
        int cpu = processor_choose(e, &d->affinity);
        if (cpu >= 0) {
            CPU_ZERO(&one);
            CPU_SET((unsigned)cpu, &one);
            if (!sched_setaffinity(0, sizeof(one), &one)) {
                d->shared_pin = CPU_ISSET((unsigned)cpu, &e->pinned);
                CPU_SET((unsigned)cpu, &e->pinned);
                d->pinned = cpu;
                d->pin_checked = tsc();
                d->pin_cpu_ns = cpu_time_ns(child);
            }
        }
        pthread_mutex_unlock(&e->lock);
    }
    if (d->pinned >= 0)
        direct_child_pin(child, d->pinned);
}

/* When others want the processor too, the scheduler gets a chance to move the thread. */
static void pin_check(struct bt_vcpu *b, struct process *p)
{
    struct direct *d = b->direct;
    uint64_t now = tsc(), wall_us = (now - d->pin_checked) / d->tsc_us;
    if (d->pinned < 0 || wall_us < PIN_CHECK_US)
        return;
    uint64_t cpu_ns = cpu_time_ns(direct_space_child(p->space)), used_us = (cpu_ns - d->pin_cpu_ns) / 1000;
    d->pin_checked = now;
    d->pin_cpu_ns = cpu_ns;
    if (used_us < wall_us / 4 * 3) { /* a negative difference, of another process than before, is large */
        unpin(b);
        hold(d, p, PIN_PAUSE_US);
    }
}

/* Stops that come too soon make translated code the better choice for a while. `took`: without the time that others had the processor. */
static void run_judge(const struct direct *d, struct process *p, uint64_t took)
{
    uint64_t useful = took > d->overhead_tsc ? took - d->overhead_tsc : 0, least = HOLD_US_MIN * d->tsc_us, most = HOLD_US_MAX * d->tsc_us;
    if (useful > RESET_TIMES * d->overhead_tsc)
        p->hold_tsc = 0;
    if (useful >= USEFUL_TIMES * d->overhead_tsc)
        return;
    balance_add(d, p, -2 * (int64_t)d->overhead_tsc);
    p->hold_tsc = p->hold_tsc ? 2 * p->hold_tsc : least;
    if (p->hold_tsc > most)
        p->hold_tsc = most;
    p->held_until = tsc() + p->hold_tsc;
}

static enum direct_stop run_once(struct bt_vcpu *b, struct direct_child *child, struct user_regs_struct *regs, uint64_t *took)
{
    struct direct *d = b->direct;
    enum direct_stop stop = DIRECT_KICKED;
    *took = ~0ull;
    atomic_store(&d->running, direct_child_kicker(child));
    if (!atomic_load(&b->c.v.attention)) {
        uint64_t before = tsc(), cpu_ns = direct_child_cpu_ns(child);
        stop = direct_child_run(child, regs);
        *took = tsc() - before;
        if (!d->overhead_tsc || *took < d->overhead_tsc)
            d->overhead_tsc = *took;
        uint64_t had = (direct_child_cpu_ns(child) - cpu_ns) * d->tsc_us / 1000 + d->overhead_tsc;
        *took = had < *took ? had : *took;
        d->runs[DIRECT_STOPS]++;
    }
    atomic_store(&d->running, -1);
    return stop;
}

/* Brings the process up to date. -errno: it cannot be used any more. */
static int space_enter(struct bt_vcpu *b, struct direct_space *space)
{
    struct direct *d = b->direct;
    struct direct_child *child = direct_space_child(space);
    pthread_mutex_lock(&b->engine->lock);
    if (d->fault_address != ~0ull)
        direct_space_want(space, d->fault_address);
    d->fault_address = ~0ull;
    bool usable = direct_space_enter(space, b);
    pthread_mutex_unlock(&b->engine->lock);
    int rc = usable ? direct_space_flush(space) : -EADDRINUSE;
    return rc ? rc : direct_child_vectors_set(child, b->c.v.cpu.xsave, CPU_XSAVE_BYTES);
}

/* Stays in the process while all that is missing are mappings. -errno: it cannot be used any more. *ran: it has the guest's vector registers. */
static int space_run(struct bt_vcpu *b, struct process *p, struct user_regs_struct *regs, enum direct_stop *stop, bool *ran)
{
    struct direct_space *space = p->space;
    struct direct_child *child = direct_space_child(space);
    for (;;) {
        uint64_t took;
        *stop = run_once(b, child, regs, &took);
        if (*stop == DIRECT_GONE || *stop == DIRECT_REFUSED)
            return -EIO;
        *ran = true;
        registers_get(b, regs);
        if (*stop != DIRECT_FAULT) {
            if (*stop != DIRECT_KICKED)
                run_judge(b->direct, p, took);
            return 0;
        }
        pthread_mutex_lock(&b->engine->lock);
        bool more = fault_fill(b, space, direct_child_fault_address(child));
        pthread_mutex_unlock(&b->engine->lock);
        if (!more) {
            run_judge(b->direct, p, took);
            return 0;
        }
        b->direct->runs[DIRECT_FILLS]++;
        int rc = direct_space_flush(space);
        if (rc) {
            *stop = DIRECT_KICKED; /* before the instruction that faulted */
            return rc;
        }
        if (!segments_are_plain(regs))
            return 0;
    }
}

enum direct_result direct_run(struct bt_vcpu *b)
{
    struct direct *d = b->direct;
    struct process *p = d->current;
    struct direct_child *child = direct_space_child(p->space);
    struct user_regs_struct regs = {0};
    enum direct_stop stop = DIRECT_KICKED;
    simd_save(&b->c);
    b->mode = bt_mode_of(&b->c, true, 64);
    registers_put(b, &regs);
    pin(b, child);
    bool ran = false;
    int rc = space_enter(b, p->space);
    if (!rc) {
        rc = space_run(b, p, &regs, &stop, &ran);
        if (stop == DIRECT_GONE || (ran && direct_child_vectors_get(child, b->c.v.cpu.xsave, CPU_XSAVE_BYTES))) {
            log_error("processor %u: the process that ran its user code was killed, and the guest's registers with it", b->c.v.index);
            return DIRECT_LOST;
        }
    }
    if (stop == DIRECT_FAULT)
        d->fault_address = direct_child_fault_address(child);
    pthread_mutex_lock(&b->engine->lock);
    direct_space_left(p->space);
    pthread_mutex_unlock(&b->engine->lock);
    pin_check(b, p);
    if (rc)
        run_failed(b, p, rc);
    selectors_get(b, &regs);
    if (stop == DIRECT_SYSCALL)
        system_call(b, &regs);
    else if (stop == DIRECT_TRAP)
        trap(b);
    else if (stop == DIRECT_STEP)
        single_step(b);
    else if (stop == DIRECT_FAULT && !d->held)
        interp_run_one(&b->c);
    return DIRECT_DONE;
}

/* ---- for people ---- */

void direct_count(const struct bt_vcpu *b, uint64_t sums[3])
{
    const struct direct *d = b->direct;
    if (!d)
        return;
    sums[0] += d->runs[DIRECT_STARTED];
    sums[1] += d->runs[DIRECT_STOPS];
    sums[2] += d->runs[DIRECT_FILLS];
}

void direct_report(const struct bt_vcpu *b, FILE *out)
{
    const struct direct *d = b->direct;
    if (!d)
        return;
    fprintf(out, "direct: cpu %u %llu shadows made, %llu stops, of which %llu to map pages, %llu ns an empty one\n", b->c.v.index, (unsigned long long)d->runs[DIRECT_STARTED],
            (unsigned long long)d->runs[DIRECT_STOPS], (unsigned long long)d->runs[DIRECT_FILLS], (unsigned long long)(d->overhead_tsc * 1000 / d->tsc_us));
}
