/*
 * Whole guests under two engines in lockstep: what the program's files share.
 *
 * Each side is a process of its own with the same machine, one processor, and one of the engines. Everything that a guest sees of the outside is a function of its *events*: accesses to
 * ports, memory-mapped registers and the local APIC's MSRs, readings of the TSC, HLT, and interrupts. Time (virtual.c) stands still between events; timers, devices and typed text are looked at in
 * events, and interrupts are offered right after an event's instruction only. So both sides have the same events, in the same states; the parent compares them (lockstep.c)
 * and looks for the reason when they differ (investigate.c).
 */
#ifndef DOPPEL_CONFORM_LOCKSTEP_H
#define DOPPEL_CONFORM_LOCKSTEP_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "engine/bt/bt_priv.h"
#include "machine/machine_priv.h"

/* ---- events ---- */

enum event_kind {
    EVENT_PORT_READ,
    EVENT_PORT_WRITE,
    EVENT_MMIO_READ,
    EVENT_MMIO_WRITE,
    EVENT_MSR_READ,
    EVENT_MSR_WRITE,
    EVENT_CR8_READ,
    EVENT_CR8_WRITE,
    EVENT_TSC,
    EVENT_HALT,
    EVENT_INTERRUPT, /* where: vector; delivered next */
    EVENT_ASYNC,     /* the second side, the translator, has let time go on here; the first side follows when its state is the same. where: hash of the page that RSP points to */
    EVENT_END,       /* where: enum machine_end, or one of END_* */
    EVENT_KINDS
};

#define END_HALTED 100u /* nothing will ever wake it */
#define END_FAILED 101u
#define END_LIMIT 102u /* as many events as were asked for */

struct record {
    uint8_t kind, size;
    uint64_t where, value; /* address or number, and what was read or written */
    uint64_t rip;          /* while an instruction executes, of the next one */
    uint64_t state;        /* hash of the processor's state */
    uint64_t ram;          /* hash of memory; 0: not looked at */
    uint64_t time_ns;
};

/* ---- what a side is to do ---- */

#define WATCHED_MAX 16

struct plan {
    const char *engine;
    struct machine_config *config;
    uint64_t events; /* ends after so many */
    uint64_t seed;   /* of time, and of what happens to the translator when `disturb` */
    bool disturb;
    bool anywhere;   /* time goes on, and interrupts come, also between other events */
    uint64_t ram_interval; /* events between two hashes of all memory; 0: never */
    const char *type;      /* typed line by line, whenever the guest's last output is a prompt */
    const char *prompt;    /* how a line begins that asks for the next; NULL: a shell's */
    bool verbose;          /* the guest's output goes to stdout */

    /* A deliberate error: when the translator is entered for the first time after this event, a bit of register `error_register` changes (GPR_RIP: of memory, at error_gpa). */
    bool error;
    uint64_t error_event;
    unsigned error_register;
    gpa_t error_gpa;

    /* For whoever looks into a difference. */
    uint64_t detail; /* states at this event and the one before go to findings, and pages' hashes; 0: no */
    gpa_t watched[WATCHED_MAX]; /* pages that are hashed at each event from watch_from on, instead of all memory; copies of them at `detail` go to findings */
    unsigned watched_count;
    uint64_t watch_from;
    uint64_t trace_from; /* what runs after this event is noted step by step; 0: no */
    uint16_t trace_block_insns; /* by the translator in blocks of at most so many instructions */
    gpa_t trace_word;    /* eight bytes of memory that belong to a step's state; ~0: none */
    uint64_t trace_value; /* tracing ends when they become this */
};

/* ---- what a side says: shared memory ---- */

#define RING 8192u
#define TRACE_MAX (1u << 19)

struct step {
    uint64_t state; /* hash of all of it */
    uint64_t gpr[GPR_RIP + 1], rflags, word;
    uint8_t code[16]; /* at rip; zeros where there is none */
    uint8_t code_bits;
};

struct channel {
    _Alignas(64) _Atomic uint64_t produced;
    _Alignas(64) _Atomic uint64_t consumed;
    struct record ring[RING];
    struct cpu_state state[2]; /* canonical, at plan.detail - 1 and plan.detail */
    uint8_t watched[WATCHED_MAX][PAGE_SIZE_BYTES];
    _Atomic uint64_t steps;        /* so many were noted; the last TRACE_MAX are there */
    struct step trace[TRACE_MAX];  /* step n at n % TRACE_MAX */
    uint64_t page[]; /* hashes at plan.detail, by offset in RAM */
};

/* ---- a side (side.c) ---- */

struct stop {
    struct insn *insn;
    insn_fn *fn;
};

struct side {
    struct plan plan;
    struct channel *channel;
    struct machine *machine;
    struct vcpu *vcpu;
    const struct vcpu_host_ops *ops; /* the machine's own, and what they take */
    void *host;
    uint64_t number;   /* of the next event */
    unsigned depth;    /* of events being dealt with */
    bool offered;      /* an interrupt may be taken as soon as IF allows */
    bool leave;        /* run is to return */
    bool ended, tracing, traced;
    struct channel *leader;   /* plan.anywhere, on the first side: the other's channel */
    struct record target;     /* the leader's next event, when it is EVENT_ASYNC */
    bool following, stepping; /* to target; one instruction at a time */
    bool async_due;           /* on the leader */
    unsigned kicks;           /* turns that will be kicked */
    struct stop stop;
    const char *typed; /* what is still to be typed */
    bool line_control_dlab, line_begun;
    bool prompted;
    char last[6];      /* characters of output */
    char line[32];     /* the current one's beginning */
    size_t line_length;
    uint64_t turns, random;
    gva_t last_turn;
    bool error_made;
};

/* Runs the guest; never returns. */
_Noreturn void side_main(const struct plan *plan, struct channel *channel, struct channel *leader);
/* Notes the processor's state as a step. running: inside run. */
void side_trace(struct side *s, bool running);

/* ---- the interpreter stops after an instruction (stop.c) ---- */

/* An event's instruction is being executed: what follows in its block does not run before attention was looked at. */
void stop_after_current(struct icpu *c, struct stop *stop);
void stop_undo(struct stop *stop);

/* ---- what happens to the translator (disturb.c) ---- */

void disturb_prepare(struct side *s);     /* once the machine exists */
void disturb_trace_begin(struct side *s); /* from now on in small blocks, none of them linked */

/* ---- state (state.c) ---- */

/* All of the processor's state in one form. running: inside run, when flags are where the interpreter has them; vector state is saved. */
void state_capture(struct cpu_state *to, const struct vcpu *vcpu, bool running);
uint64_t state_hash(const struct cpu_state *canonical);
uint64_t hash_bytes(const void *data, uint64_t length_bytes, uint64_t seed); /* a multiple of 8 */
/* Prints the fields that differ; returns how many. */
unsigned state_differences(const struct cpu_state *a, const struct cpu_state *b, const char *const names[2]);

/* ---- time and the loop (virtual.c) ---- */

uint64_t virtual_now(void);
void virtual_set(uint64_t now_ns);
/* Called by inputs_tsc before it reads. */
void virtual_watch_tsc(void (*read)(void *ctx), void *ctx);
/* Runs what was posted and what is due. */
void virtual_run(struct loop *loop);
bool virtual_deadline(struct loop *loop, uint64_t *ns); /* of the first timer */

/* ---- the parent (lockstep.c, investigate.c) ---- */

struct lockstep {
    struct plan plan;             /* of both but for the engine */
    const char *engine[2];
    struct channel *channel[2];
    uint64_t channel_bytes;
    double silence_seconds;       /* both sides owe an event in that time */
    uint64_t tail_number;
    struct record tail[16][2];    /* the last ones that were compared, by number */
};

enum run_end { RUN_SAME, RUN_DIFFERS, RUN_MEMORY_DIFFERS, RUN_SILENT, RUN_FAILED };

struct run_result {
    enum run_end end;
    uint64_t number;    /* of the event that differs; of the first that did not come; how many there were */
    uint64_t ram_equal; /* number of the last event when memory was equal */
    struct record last[2];
};

/* Runs both sides with l->plan. */
struct run_result lockstep_run(struct lockstep *l);
void lockstep_print_record(const struct record *r);
/* After a run that did not end the same way: says where and why as exactly as it can. */
void investigate(struct lockstep *l, const struct run_result *first);

#endif
