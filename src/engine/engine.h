/*
 * The engine contract: a way of running virtual processors.
 *
 * A machine makes one engine and one vCPU of it per virtual processor. Each vCPU's run function is called on that vCPU's own thread and
 * returns when something outside the engine must act (an exit). Port and memory-mapped I/O, MSRs of the local APIC and interrupt
 * acknowledgement are calls from inside run to `struct vcpu_host_ops`, on the vCPU's thread; they may not call
 * back into the engine except vcpu_kick and vcpu_raise_attention.
 * State is portable between engines: whenever run has returned, vcpu->cpu is complete and may be saved, or changed and run on.
 */
#ifndef DOPPEL_ENGINE_ENGINE_H
#define DOPPEL_ENGINE_ENGINE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "arch/apic.h"
#include "arch/cpu.h"
#include "arch/cpuid.h"
#include "memory/memory.h"
#include "util/counter.h"
#include "util/error.h"

enum engine_exit {
    ENGINE_EXIT_ATTENTION, /* the host asked for the vCPU (vcpu_kick) */
    ENGINE_EXIT_HALT,      /* HLT executed with nothing deliverable pending; cpu.activity is CPU_HALTED */
    ENGINE_EXIT_SHUTDOWN,  /* triple fault; cpu.activity is CPU_SHUTDOWN */
    ENGINE_EXIT_ERROR,     /* the engine cannot go on (host trouble); details were logged */
};

struct vcpu_host_ops {
    /* size_bytes 1, 2 or 4. */
    uint32_t (*port_read)(void *host, uint16_t port, unsigned size_bytes);
    void (*port_write)(void *host, uint16_t port, unsigned size_bytes, uint32_t value);
    /* size_bytes 1, 2, 4 or 8, within one page, not RAM. Larger or crossing accesses are split by the engine. */
    uint64_t (*mmio_read)(void *host, gpa_t gpa, unsigned size_bytes);
    void (*mmio_write)(void *host, gpa_t gpa, unsigned size_bytes, uint64_t value);
    /* MSRs that the core does not own: IA32_APIC_BASE, IA32_TSC_DEADLINE, x2APIC 0x800..0x8FF, KVM's paravirtual ones.
     * -ENOENT or -EINVAL: the instruction raises #GP(0). */
    int (*msr_read)(void *host, uint32_t index, uint64_t *value);
    int (*msr_write)(void *host, uint32_t index, uint64_t value);
    /* Highest-priority interrupt deliverable now (above the task priority), as vector; -1: none. No side effects. */
    int (*interrupt_peek)(void *host);
    /* Acknowledges it: moves it to in-service and returns its vector, or -1 if it has gone. */
    int (*interrupt_ack)(void *host);
    /* True once for each NMI that is to be delivered now. */
    bool (*nmi_take)(void *host);
    /* One that nmi_take gave and that could not be delivered yet. */
    void (*nmi_return)(void *host);
    /* CR8: task priority bits 7:4 of the local APIC. */
    uint8_t (*cr8_read)(void *host);
    void (*cr8_write)(void *host, uint8_t value);
    /* Engines with the local APICs in their keeping: a level-triggered vector ended. */
    void (*eoi)(void *host, uint8_t vector);
    /* True when run must return ENGINE_EXIT_ATTENTION: pause, stop, INIT, SIPI and other requests. Called when attention was raised. */
    bool (*must_exit)(void *host);
};

/* Counters, each with a name and help: counters.def. Written by the vCPU's thread, read by anybody. */
enum engine_counter {
#define COUNTER(name, help) COUNTER_##name,
#include "engine/counters.def"
#undef COUNTER
    COUNTER_COUNT
};

extern const char *const engine_counter_names[COUNTER_COUNT];
extern const char *const engine_counter_help[COUNTER_COUNT];

struct engine_ops;

/* What a guest asked for and did not get, by name: instructions the engine lacks, MSRs that are not there. */
#define VCPU_MISSING_MAX 24
struct vcpu_missing {
    char name[28];
    uint64_t count;
};

/* Engines embed this at the start of their own vCPU structure. */
struct vcpu {
    struct cpu_state cpu; /* first: decoded operands are offsets from here */

    /* Nonzero: leave translated or cached code at the next instruction boundary that the engine checks (blocks' ends at the latest), look for interrupts and ask must_exit. */
    _Atomic uint32_t attention;

    unsigned index; /* also the APIC id */
    const struct engine_ops *ops;
    const struct vcpu_host_ops *host_ops;
    void *host;
    struct physmap *memory;
    const struct cpuid_table *cpuid;
    uint64_t counters[COUNTER_COUNT];
    struct vcpu_missing missing[VCPU_MISSING_MAX]; /* filled from the front; what comes after the last goes uncounted */

    FILE *trace;         /* NULL: off. Exceptions, interrupts, mode changes, I/O and MSR accesses, one line each */
    bool trace_blocks;   /* also the start address of every block */
};

/* What an engine needs to make a vCPU. */
struct vcpu_config {
    unsigned index;
    const struct vcpu_host_ops *host_ops;
    void *host;
    struct physmap *memory;
    const struct cpuid_table *cpuid;
};

struct engine;

/* An address in guest code, linear or physical. */
struct code_address {
    uint64_t address;
    bool physical;
};

/* User code on the processor itself, in a process of its own, by an engine that otherwise translates: of programs that compute; none; all that fit. */
enum engine_direct { DIRECT_AUTO, DIRECT_OFF, DIRECT_ALWAYS };

/* Who has the local APICs: the host's kernel where it can; the machine; the host's kernel or nobody. */
enum engine_irqchip { IRQCHIP_AUTO, IRQCHIP_USER, IRQCHIP_SPLIT };

/* A write by the guest outside memory that becomes a count on an eventfd. */
struct engine_doorbell {
    gpa_t gpa;
    unsigned size_bytes; /* 0: any */
    bool match;          /* this value only */
    uint64_t value;
    int fd;
};

/* How an engine works, and aids for whoever works on it. All zero: the usual. */
struct engine_options {
    enum engine_direct direct;
    bool perf_map;                        /* tell Linux perf the names of translated code */
    const struct code_address *dump_code; /* report shows the blocks that contain these */
    unsigned dump_code_count;
    enum engine_irqchip irqchip;
    bool patient; /* in its first moments a guest's code is translated only when it has run often enough for that to pay */
};

/*
 * An engine that has the local APICs in its keeping (in the host's kernel, say). It then deals with all between processors (interrupts, INIT, startup) and waits in run while
 * a processor is halted or waits for its startup message; of struct vcpu_host_ops, interrupt_peek and interrupt_ack stand for the 8259 pair alone, and nmi_take for NMIs that are nobody's message.
 */
struct engine_irqchip_ops {
    /* A message (MSI). Any thread, while vCPUs run. */
    void (*message)(struct engine *engine, uint64_t address, uint32_t data);
    /* What input `pin` of the I/O APIC sends while it is level-triggered and not masked, so that the end of its interrupts is told; data 0: nothing. As `message`. */
    void (*level_pin)(struct engine *engine, unsigned pin, uint64_t address, uint32_t data);
    /* One local APIC, while vCPUs stand still and no message is under way. 0 or -errno. */
    int (*get)(struct vcpu *vcpu, struct apic_state *state);
    int (*set)(struct vcpu *vcpu, const struct apic_state *state);
    /* Before a state is saved: what others sent to a vCPU that stood still already, and starts it (INIT, startup), becomes its state. 0 or -errno. */
    int (*arrive)(struct vcpu *vcpu);
};

struct engine_ops {
    const char *name; /* "interp" */
    const char *help;
    /* 0 when this host can run it; otherwise -errno and the reason. */
    int (*probe)(struct error *err);
    bool tells; /* create finds out as much itself: engine_find leaves it to that */
    /* 0 when "auto" may choose it, too. NULL: whenever it can run. */
    int (*worthwhile)(struct error *err);
    int (*create)(struct engine **engine, struct physmap *memory, struct error *err);
    void (*destroy)(struct engine *engine); /* after its vCPUs */
    /* Once, before the first vCPU. *options may go afterwards. NULL: an engine without. */
    int (*set_options)(struct engine *engine, const struct engine_options *options, struct error *err);
    /* After set_options and before the first vCPU: takes features out of the guest's CPUID that the engine lacks. NULL: it lacks none. */
    int (*limit_cpuid)(struct engine *engine, struct cpuid_table *cpuid, struct error *err);
    /* NULL, or returning NULL: the machine has the local APICs. After set_options. */
    const struct engine_irqchip_ops *(*irqchip)(struct engine *engine);
    int (*vcpu_create)(struct engine *engine, const struct vcpu_config *config, struct vcpu **vcpu, struct error *err);
    void (*vcpu_destroy)(struct vcpu *vcpu);
    /* Runs until an exit. cpu.activity must be CPU_RUNNING or CPU_HALTED (then it wakes only if an interrupt is deliverable). */
    enum engine_exit (*run)(struct vcpu *vcpu);
    /* Executes exactly one instruction, or delivers one pending event. May be NULL. */
    enum engine_exit (*step)(struct vcpu *vcpu);
    /* From any thread, after attention was raised: make a run that is blocked or deep in native code notice. May be NULL. */
    void (*kick)(struct vcpu *vcpu);
    /* The vCPU's cpu state was changed, or pages' dirty marks taken, from outside while not running: drop everything derived from them (TLB, cached mode, leave to write). */
    void (*state_changed)(struct vcpu *vcpu);
    /* Bytes [gpa, +length) changed underneath: drop cached translations. From any thread with vCPUs paused. */
    void (*invalidate)(struct engine *engine, gpa_t gpa, uint64_t length_bytes);
    /*
     * Marks in PhysMap (physmap_mark_written) what the guest wrote since the last call, and goes on noting; the first call marks all. From any thread, with vCPUs standing still
     * or running: what they write meanwhile is told by this call or the next. `on` false: note no more. NULL: stores are marked as they happen. 0 or -errno.
     */
    int (*collect_dirty)(struct engine *engine, bool on);
    /* From now on, or no longer. From any thread, while vCPUs run. NULL: all writes come through mmio_write; so does each of one that was refused. 0 or -errno. */
    int (*doorbell)(struct engine *engine, const struct engine_doorbell *doorbell, bool on);
    /* For people, beyond the counters: a few lines on what it does with its memory and time. From any thread, while vCPUs run. May be NULL. */
    void (*report)(struct engine *engine, FILE *out);
    /* What it has beyond the vCPUs' counters. From any thread, while vCPUs run. May be NULL. */
    void (*counters)(struct engine *engine, counter_fn *counter, void *ctx);
};

/* All engines built in, best first, NULL-terminated. */
extern const struct engine_ops *const engine_table[];
enum { ENGINE_REASON_MAX = 512 };

/* By name; "auto" takes the first whose probe succeeds, or that needs none (engine_ops.tells). NULL with err set when unknown or unusable. `reason` (optional) gets why: what better ones lack. */
const struct engine_ops *engine_find(const char *name, char reason[ENGINE_REASON_MAX], struct error *err);
/* For "auto", when `failed` could not be created after all: the next best; adds `why`, and what those between lack, to `reason`. NULL: there is none. */
const struct engine_ops *engine_next(const struct engine_ops *failed, const struct error *why, char reason[ENGINE_REASON_MAX]);

extern const struct engine_ops interp_engine;
extern const struct engine_ops bt_engine_ops;
extern const struct engine_ops kvm_engine_ops;

static inline void vcpu_raise_attention(struct vcpu *vcpu)
{
    atomic_store_explicit(&vcpu->attention, 1, memory_order_release);
}

/* From any thread. Does not wake a thread that waits outside the engine in HLT: that is the machine's business. */
static inline void vcpu_kick(struct vcpu *vcpu)
{
    vcpu_raise_attention(vcpu);
    if (vcpu->ops->kick)
        vcpu->ops->kick(vcpu);
}

/* Counts one more of `name`. On the vCPU's thread. */
void vcpu_count_missing(struct vcpu *vcpu, const char *name);

static inline void vcpu_count(struct vcpu *vcpu, enum engine_counter counter)
{
    vcpu->counters[counter]++;
}

#endif
