/*
 * A vCPU under KVM: the run loop and its exits.
 *
 * Between runs v.cpu is the state; inside it is KVM's, but for what kvm_state.c leaves in v.cpu. On the way out everything begun is ended first: the access whose result KVM still
 * waits for (KVM_RUN with immediate_exit), then an interrupt or exception that is under way to the guest, for which the guest runs a moment longer (`settle`); no
 * engine-neutral state holds half an event.
 * A kick: attention is raised, then immediate_exit set, then the thread signalled; the loop clears immediate_exit, then looks at attention. So either the loop sees the
 * attention or KVM_RUN sees immediate_exit or the signal.
 * Threading: run on the vCPU's thread; kick from any.
 */
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "engine/kvm/kvm_priv.h"
#include "util/log.h"
#include "util/sandbox_rules.h"

SANDBOX_ALLOW_WITH_IF(SANDBOX_KVM, IN_PROGRAM & ~IN_WORKER, ioctl, 1, 0xff00, KVMIO << 8); /* on the descriptors of /dev/kvm that are open; workers raise no interrupts */
SANDBOX_ALLOW_WITH(SANDBOX_KVM, IN_VCPU, timer_create);
SANDBOX_ALLOW_WITH(SANDBOX_KVM, IN_VCPU, timer_settime);
SANDBOX_ALLOW_WITH(SANDBOX_KVM, IN_MAIN, timer_delete);

#define KICK_SIGNAL SIGURG /* ignored unless handled, so one that comes late harms nobody */
#define SETTLE_NS 50000
#define SETTLE_TRIES 10000u
#define RUN_ON (-1)

/* ---- kicks ---- */

static void kick_received(int number)
{
}

int kvm_kick_handler_install(void)
{
    /* KVM_RUN ends with EINTR all the same. */
    struct sigaction action = {.sa_handler = kick_received, .sa_flags = SA_RESTART};
    return sigaction(KICK_SIGNAL, &action, NULL) ? -errno : 0;
}

void kvm_vcpu_kick(struct vcpu *v)
{
    struct kvm_cpu *c = (struct kvm_cpu *)v;
    __atomic_store_n(&c->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
    pid_t thread = atomic_load(&c->thread);
    if (thread && thread != gettid())
        syscall(SYS_tgkill, getpid(), thread, KICK_SIGNAL);
}

/* Signals reach this thread; the alarm that ends short runs is its own. */
static void thread_prepare(struct kvm_cpu *c)
{
    pid_t self = gettid();
    sigset_t set;
    if (c->prepared == self)
        return;
    sigemptyset(&set);
    sigaddset(&set, KICK_SIGNAL);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
    if (c->has_alarm)
        timer_delete(c->alarm);
    struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = KICK_SIGNAL};
    event._sigev_un._tid = self;
    c->has_alarm = timer_create(CLOCK_MONOTONIC, &event, &c->alarm) == 0;
    c->prepared = self;
}

/* ---- exits ---- */

static void port_exit(struct kvm_cpu *c)
{
    const struct vcpu_host_ops *ops = c->v.host_ops;
    uint8_t *data = (uint8_t *)c->run + c->run->io.data_offset;
    unsigned size = c->run->io.size, count = c->run->io.count;
    uint16_t port = c->run->io.port;
    bool out = c->run->io.direction == KVM_EXIT_IO_OUT;
    for (; count; count--, data += size) {
        uint32_t value = 0;
        vcpu_count(&c->v, out ? COUNTER_port_writes : COUNTER_port_reads);
        if (out) {
            memcpy(&value, data, size);
            ops->port_write(c->v.host, port, size, value);
        } else {
            value = ops->port_read(c->v.host, port, size);
            memcpy(data, &value, size);
        }
    }
}

/* Up to eight bytes, any number and alignment: in pieces that the contract has. */
static void mmio_exit(struct kvm_cpu *c)
{
    const struct vcpu_host_ops *ops = c->v.host_ops;
    gpa_t gpa = c->run->mmio.phys_addr;
    unsigned length = c->run->mmio.len, done = 0;
    bool write = c->run->mmio.is_write;
    vcpu_count(&c->v, write ? COUNTER_mmio_writes : COUNTER_mmio_reads);
    if (write && physmap_is_rom(c->v.memory, gpa))
        return;
    while (done < length) {
        unsigned size = length - done >= 8 ? 8 : length - done >= 4 ? 4 : length - done >= 2 ? 2 : 1;
        uint64_t value = 0;
        if (write) {
            memcpy(&value, c->run->mmio.data + done, size);
            ops->mmio_write(c->v.host, gpa + done, size, value);
        } else {
            value = ops->mmio_read(c->v.host, gpa + done, size);
            memcpy(c->run->mmio.data + done, &value, size);
        }
        done += size;
    }
}

static const char *internal_error(const struct kvm_run *run)
{
    switch (run->internal.suberror) {
    case KVM_INTERNAL_ERROR_EMULATION:
        return "it cannot emulate an instruction";
    case KVM_INTERNAL_ERROR_SIMUL_EX:
        return "exceptions at the same time";
    case KVM_INTERNAL_ERROR_DELIVERY_EV:
        return "an access outside memory while an event was delivered";
    default:
        return "internal error";
    }
}

static int failed(struct kvm_cpu *c, const char *what, unsigned long long detail)
{
    struct kvm_regs regs = {0};
    kvm_call(c->fd, KVM_GET_REGS, &regs);
    log_error("kvm: processor %u cannot go on at rip 0x%llx: %s (%llu); the kernel's log may say more", c->v.index, (unsigned long long)regs.rip, what, detail);
    return ENGINE_EXIT_ERROR;
}

/* RUN_ON, or an enum engine_exit. */
static int handle_exit(struct kvm_cpu *c)
{
    struct kvm_run *run = c->run;
    switch (run->exit_reason) {
    case KVM_EXIT_IO:
        port_exit(c);
        return RUN_ON;
    case KVM_EXIT_MMIO:
        mmio_exit(c);
        return RUN_ON;
    case KVM_EXIT_X86_RDMSR:
    case KVM_EXIT_X86_WRMSR:
        kvm_msr_exit(c);
        return RUN_ON;
    case KVM_EXIT_HLT: /* with the local APIC in the machine only */
        vcpu_count(&c->v, COUNTER_halts);
        c->v.cpu.activity = CPU_HALTED;
        return RUN_ON;
    case KVM_EXIT_IOAPIC_EOI:
        c->v.host_ops->eoi(c->v.host, run->eoi.vector);
        return RUN_ON;
    case KVM_EXIT_IRQ_WINDOW_OPEN:
    case KVM_EXIT_SET_TPR:
    case KVM_EXIT_INTR:
        return RUN_ON;
    case KVM_EXIT_SHUTDOWN:
        c->v.cpu.activity = CPU_SHUTDOWN;
        return ENGINE_EXIT_SHUTDOWN;
    case KVM_EXIT_INTERNAL_ERROR:
        return failed(c, internal_error(run), run->internal.suberror);
    case KVM_EXIT_FAIL_ENTRY:
        return failed(c, "the processor refuses the guest's state", run->fail_entry.hardware_entry_failure_reason);
    default:
        return failed(c, "an exit that nobody asked for", run->exit_reason);
    }
}

/* Enters the guest. With immediate_exit set only what was begun is ended. */
static int enter_guest(struct kvm_cpu *c)
{
    int r = kvm_call(c->fd, KVM_RUN, NULL);
    if (!c->engine->split && (r == 0 || r == -EINTR)) {
        uint8_t cr8 = (uint8_t)c->run->cr8;
        if (cr8 != c->v.host_ops->cr8_read(c->v.host))
            c->v.host_ops->cr8_write(c->v.host, cr8);
    }
    if (r == -EINTR || r == -EAGAIN)
        return RUN_ON;
    if (r)
        return failed(c, strerror(-r), (unsigned)-r);
    c->extint_given = false;
    return handle_exit(c);
}

/* ---- events on their way in ---- */

/* One interrupt if KVM takes it now, else a request to be told when. An NMI waits in KVM. True: a halted processor wakes. */
static bool offer_events(struct kvm_cpu *c)
{
    const struct vcpu_host_ops *ops = c->v.host_ops;
    bool given = false;
    c->run->request_interrupt_window = 0;
    if (ops->nmi_take(c->v.host)) {
        kvm_call(c->fd, KVM_NMI, NULL);
        given = true;
    }
    if (ops->interrupt_peek(c->v.host) >= 0 && c->run->ready_for_interrupt_injection && !c->extint_given) {
        int vector = ops->interrupt_ack(c->v.host);
        struct kvm_interrupt interrupt = {.irq = (uint32_t)vector};
        if (vector >= 0 && kvm_call(c->fd, KVM_INTERRUPT, &interrupt) == 0) {
            vcpu_count(&c->v, COUNTER_interrupts);
            c->run->ready_for_interrupt_injection = 0; /* until KVM says so again */
            c->extint_given = c->engine->split;
            given = true;
        }
    }
    c->run->request_interrupt_window = ops->interrupt_peek(c->v.host) >= 0;
    if (!c->engine->split)
        c->run->cr8 = ops->cr8_read(c->v.host);
    return given;
}

/* ---- leaving ---- */

static bool under_way(const struct kvm_vcpu_events *events)
{
    return events->exception.injected || events->exception.pending || events->interrupt.injected || events->nmi.injected;
}

/* An NMI that KVM holds back until the one before has ended goes back to the machine. */
static void return_nmi(struct kvm_cpu *c, struct kvm_vcpu_events *events)
{
    events->nmi.pending = 0;
    events->flags = KVM_VCPUEVENT_VALID_NMI_PENDING | (events->flags & KVM_VCPUEVENT_VALID_SHADOW);
    if (kvm_call(c->fd, KVM_SET_VCPU_EVENTS, events) == 0)
        c->v.host_ops->nmi_return(c->v.host);
}

static void alarm_set(struct kvm_cpu *c)
{
    const struct itimerspec after = {.it_value.tv_nsec = SETTLE_NS};
    if (c->has_alarm)
        timer_settime(c->alarm, 0, &after, NULL);
}

/* Ends what was begun. RUN_ON, or what stopped the guest meanwhile. */
static int settle(struct kvm_cpu *c)
{
    struct kvm_vcpu_events events;
    int why = RUN_ON;
    for (unsigned n = 0; n < SETTLE_TRIES && why == RUN_ON; n++) {
        do {
            __atomic_store_n(&c->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
            c->run->exit_reason = KVM_EXIT_INTR;
            why = enter_guest(c);
        } while (why == RUN_ON && c->run->exit_reason != KVM_EXIT_INTR);
        if (why != RUN_ON || kvm_call(c->fd, KVM_GET_VCPU_EVENTS, &events))
            return why;
        if (!under_way(&events) && !c->extint_given) {
            if (events.nmi.pending)
                return_nmi(c, &events);
            return RUN_ON;
        }
        c->extint_given = false;
        c->run->request_interrupt_window = 0;
        __atomic_store_n(&c->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
        alarm_set(c);
        why = enter_guest(c);
    }
    if (why == RUN_ON)
        why = failed(c, "an event does not get through to the guest", SETTLE_TRIES);
    return why;
}

/* ---- the loop ---- */

static int begin(struct kvm_cpu *c)
{
    thread_prepare(c);
    if (!c->has_cpuid) {
        if (kvm_cpuid_push(c))
            return ENGINE_EXIT_ERROR;
        c->has_cpuid = true;
    }
    if (c->stale) {
        if (kvm_state_push(c))
            return ENGINE_EXIT_ERROR;
        c->stale = false;
        c->extint_given = false;
    }
    /* KVM says what can be injected when a run ends. */
    __atomic_store_n(&c->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
    if (!c->engine->split)
        c->run->cr8 = c->v.host_ops->cr8_read(c->v.host);
    return enter_guest(c);
}

static int loop(struct kvm_cpu *c)
{
    struct vcpu *v = &c->v;
    int why = RUN_ON;
    while (why == RUN_ON) {
        __atomic_store_n(&c->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
        if (atomic_exchange(&v->attention, 0)) {
            vcpu_count(v, COUNTER_attentions);
            if (v->host_ops->must_exit(v->host))
                return ENGINE_EXIT_ATTENTION;
        }
        if (v->cpu.activity == CPU_SHUTDOWN)
            return ENGINE_EXIT_SHUTDOWN;
        bool given = offer_events(c);
        if (!c->engine->split && v->cpu.activity == CPU_HALTED) {
            if (!given)
                return ENGINE_EXIT_HALT;
            v->cpu.activity = CPU_RUNNING;
        }
        why = enter_guest(c);
    }
    return why;
}

enum engine_exit kvm_vcpu_run(struct vcpu *v)
{
    struct kvm_cpu *c = (struct kvm_cpu *)v;
    bool halted = v->cpu.activity == CPU_HALTED && !c->engine->split;
    atomic_store(&c->thread, gettid());
    vcpu_raise_attention(v); /* whatever came in while outside */
    int why = begin(c);
    if (why == RUN_ON && halted)
        v->cpu.activity = CPU_HALTED;
    if (why == RUN_ON)
        why = loop(c);
    if (why == ENGINE_EXIT_ATTENTION || why == ENGINE_EXIT_HALT) {
        int ended = settle(c);
        why = ended == RUN_ON ? why : ended;
    }
    atomic_store(&c->thread, 0);
    if (why == ENGINE_EXIT_HALT && v->cpu.activity != CPU_HALTED)
        why = ENGINE_EXIT_ATTENTION;
    if (why != ENGINE_EXIT_ERROR && kvm_state_pull(c))
        why = ENGINE_EXIT_ERROR;
    return (enum engine_exit)why;
}

void kvm_vcpu_state_changed(struct vcpu *v)
{
    ((struct kvm_cpu *)v)->stale = true;
}

/* ---- life ---- */

void kvm_vcpu_destroy(struct vcpu *v)
{
    struct kvm_cpu *c = (struct kvm_cpu *)v;
    if (c->has_alarm)
        timer_delete(c->alarm);
    if (c->run)
        munmap(c->run, c->engine->run_bytes);
    if (c->fd >= 0)
        close(c->fd);
    free(c->xsave);
    free(c);
}

int kvm_vcpu_create(struct engine *e, const struct vcpu_config *config, struct vcpu **out, struct error *err)
{
    struct kvm_cpu *c = aligned_alloc(_Alignof(struct kvm_cpu), sizeof *c);
    if (!c)
        return error_set(err, -ENOMEM, "no memory for processor %u", config->index);
    memset(c, 0, sizeof *c);
    c->engine = e;
    c->stale = true;
    c->v.index = config->index;
    c->v.ops = &kvm_engine_ops;
    c->v.host_ops = config->host_ops;
    c->v.host = config->host;
    c->v.memory = config->memory;
    c->v.cpuid = config->cpuid;
    cpu_reset(&c->v.cpu, CPU_RESET_POWER_ON);
    c->xsave = calloc(1, e->xsave_bytes);
    c->fd = ioctl(e->vm, KVM_CREATE_VCPU, (unsigned long)config->index);
    int r = c->fd < 0 ? -errno : c->xsave ? 0 : -ENOMEM;
    if (r == 0) {
        void *run = mmap(NULL, e->run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, c->fd, 0);
        c->run = run == MAP_FAILED ? NULL : run;
        r = c->run ? 0 : -errno;
    }
    if (r) {
        kvm_vcpu_destroy(&c->v);
        return error_set(err, r, "/dev/kvm cannot make processor %u: %s", config->index, strerror(-r));
    }
    *out = &c->v;
    return 0;
}
