/*
 * A virtual machine: the chipset, devices, processors and engine of one configuration, put together and run.
 *
 * Threads: one loop thread (devices' back ends, timers), one thread per vCPU, and callers of this interface. The device lock
 * guards the bus and everything on it; it is the loop's guard. Lock order: device lock, run lock, a vCPU thread's, a local APIC's, the loop's own.
 *
 * Stopping the world: every vCPU is asked to park; with the last one in, what was asked (a reset, a snapshot) is done on the loop's thread.
 */
#ifndef DOPPEL_MACHINE_MACHINE_H
#define DOPPEL_MACHINE_MACHINE_H

#include <stdbool.h>
#include <stdio.h>

#include "machine/config.h"
#include "machine/console.h"
#include "state/chunk_file.h"
#include "state/page_sum.h"
#include "state/state.h"
#include "util/counter.h"
#include "util/error.h"
#include "util/sandbox_rules.h"

struct machine;

enum machine_end {
    MACHINE_RUNNING, /* has not ended */
    MACHINE_SHUTDOWN,
    MACHINE_RESET,
    MACHINE_CRASH,
    MACHINE_STOPPED,
    MACHINE_ERROR,
    MACHINE_MIGRATED, /* runs elsewhere */
};

/* `config` is copied; what is changed while the machine runs is in its own copy, and in snapshots. Loads the kernel; nothing runs yet. */
int machine_create(struct machine **machine, const struct machine_config *config, struct error *err) __attribute__((warn_unused_result));
int machine_start(struct machine *machine, struct error *err) __attribute__((warn_unused_result));
enum machine_end machine_wait(struct machine *machine);
void machine_destroy(struct machine *machine);

/*
 * The calling thread gives up all but what a thread of this kind needs (IN_MAIN: it waits for the machine and cleans up after it; IN_API; sandbox/sandbox.h); nothing without a sandbox.
 * Threads that it makes later inherit that, so machine_start comes first where it is the same thread's.
 */
int machine_shut_in(struct machine *machine, unsigned kind, struct error *err) __attribute__((warn_unused_result));
/* The same; when it cannot, the machine ends. */
void machine_shut_in_or_stop(struct machine *machine, unsigned kind);
/*
 * With a sandbox, a process that opens files for IN_API threads: those that clients of control sockets name (sandbox/broker.h). First thing, with one thread. A descriptor, which is in the
 * configuration then; -1: none. machine_broker_socket: for each socket that listens, before the machine is created.
 */
int machine_start_broker(struct machine_config *config);
/* Begins to load, in threads of their own, libraries that this machine will need. After machine_start_broker, which is single-threaded. */
void machine_load_ahead(const struct machine_config *config);
void machine_broker_socket(int broker, int listener);
/* For tests: all rules of the sandbox to standard output (sandbox_rule_name), one a line and kind of thread; as often as they are said. */
void machine_print_sandbox_rules(void);

/* From any thread. Paused before its start, a machine starts paused. -ECANCELED: another thread resumed it before it had stopped. */
void machine_power_button(struct machine *machine);
void machine_reset(struct machine *machine);
void machine_stop(struct machine *machine, enum machine_end end);
int machine_pause(struct machine *machine, struct error *err) __attribute__((warn_unused_result));
int machine_resume(struct machine *machine, struct error *err) __attribute__((warn_unused_result));
bool machine_is_paused(struct machine *machine);
void machine_dump(struct machine *machine, FILE *out);
void machine_stats(struct machine *machine, FILE *out);
/* Everything that is counted, one after the other, of one moment only as far as each for itself. `counter` must not call the machine. */
void machine_count(struct machine *machine, counter_fn *counter, void *ctx);
/* What its guest can ask for metadata/metadata.h; NULL: nothing. Stays as long as the machine. */
struct metadata *machine_metadata(struct machine *machine);
/* Which engine it is, and why. */
const char *machine_engine(const struct machine *machine, const char **reason);
/* Its devices; `each` must not call the machine. Names are unique: the id, or as "net0". */
void machine_devices(struct machine *machine, void (*each)(void *ctx, const char *name, const char *class, const char *help), void *ctx);
/* "shutdown" ...; NULL for one that runs. */
const char *machine_end_name(enum machine_end end);

/* ---- watching (machine_watch.c) ---- */

enum machine_event {
#define EVENT(id, name, help) MACHINE_EVENT_##id,
#include "machine/events.def"
#undef EVENT
    MACHINE_EVENT_COUNT
};

struct machine_event_info {
    const char *name, *help;
};
extern const struct machine_event_info machine_event_table[MACHINE_EVENT_COUNT];

struct machine_observer {
    /* From any thread, with any of the machine's locks held: takes note and returns. `detail` (may be NULL) is valid during the call. */
    void (*event)(void *ctx, enum machine_event event, const char *detail);
    void *ctx;
};

/* Both are copied, before the start; NULL ends it at any time: none is under way any more when this returns, nor comes later. */
void machine_observe(struct machine *machine, const struct machine_observer *observer);
/* The console that is stdio; if none is, the serial port's. The tap is called with the device lock held. */
void machine_console_tap(struct machine *machine, const struct console_tap *tap);
/* Types on that console; from any thread without the device lock. How many bytes were taken. */
size_t machine_console_type(struct machine *machine, const uint8_t *data, size_t size_bytes);

struct machine_trace_sink {
    /* A line with its end. On vCPUs' threads, several at once: takes note and returns. */
    void (*line)(void *ctx, const char *line, size_t size_bytes);
    void *ctx;
};
/*
 * Exceptions, interrupts, port, memory-mapped and MSR accesses as they happen, from now on; NULL ends it, and nothing comes any more when that returns. What translated code
 * and hardware virtualization do without leaving guest code is not seen. From any thread but the loop's and vCPUs'. -EBUSY: the machine is traced to a file (--trace);
 * -ESRCH: it has ended.
 */
int machine_trace(struct machine *machine, const struct machine_trace_sink *sink, struct error *err) __attribute__((warn_unused_result));

/* Whether a processor can be made so here. */
int machine_check_processor(const struct processor_config *config, struct error *err) __attribute__((warn_unused_result));
/* The vendor and all features that guests can have on this host, as masks that want just them. */
int machine_host_features(struct processor_config *features, struct error *err) __attribute__((warn_unused_result));

/* Every counter: `group` is "vcpu", "uart" or a device's kind with its id behind, such as "block_rootfs". With the device lock held. */
typedef void machine_counter_fn(void *ctx, const char *group, const char *name, uint64_t value);
void machine_counters(struct machine *machine, machine_counter_fn *emit, void *ctx);

/* Presses and releases Ctrl, Alt and Delete. -EBUSY: the keys before have not been read yet. */
int machine_ctrl_alt_del(struct machine *machine, struct error *err) __attribute__((warn_unused_result));

/*
 * Disks and network cards of a running machine (machine_plug.c). From any thread but the loop's and vCPUs'. `id` is the one that the option gave, or else the
 * name that machine_devices tells ("block0", "net1"). -ENODEV: there is none.
 */
/* Another limit, from now on, full; NULL leaves one as it is. */
int machine_disk_limit(struct machine *machine, const char *id, const struct bucket_config *bandwidth, const struct bucket_config *ops, struct error *err)
    __attribute__((warn_unused_result));
int machine_net_limit(struct machine *machine, const char *id, bool receive, const struct bucket_config *bandwidth, const struct bucket_config *ops,
                      struct error *err) __attribute__((warn_unused_result));
int machine_pmem_limit(struct machine *machine, const char *id, const struct bucket_config *bandwidth, const struct bucket_config *ops, struct error *err)
    __attribute__((warn_unused_result));
/* Another file, or the same one with another size. What was in flight is finished in the old one; the guest is told of the new size. */
int machine_disk_replace(struct machine *machine, const char *id, const char *path, struct error *err) __attribute__((warn_unused_result));
/*
 * Overlays on disks (machine_disks.c): at one moment, with nothing in flight, the file of each becomes the backing file of a new image, and is not written any more. What the guest
 * writes from then on goes there. On failure all disks are as before. The snapshot lock is held meanwhile: -EBUSY.
 */
struct machine_disk_info {
    char *path, *format, *origin; /* path and origin (the file that the user named) are absolute */
    char *id; /* as machine_devices tells it */
    uint64_t size_bytes;
};
/* All that the guest can write. Freed by machine_disks_free. */
int machine_disks(struct machine *machine, struct machine_disk_info **disks, unsigned *count, struct error *err) __attribute__((warn_unused_result));
void machine_disks_free(struct machine_disk_info *disks, unsigned count);
struct machine_overlay {
    const char *below; /* the disk's present file, as machine_disks told it */
    const char *path;  /* absolute */
    int fd;            /* made by block_image_format, of the disk's size, with `below` as backing file; taken over also on failure */
};
int machine_disks_overlay(struct machine *machine, struct machine_overlay *overlays, unsigned count, struct error *err) __attribute__((warn_unused_result));
/* The same for one disk, and a file that is made here: it must not exist. Gone again on failure. */
int machine_disk_snapshot(struct machine *machine, const char *id, const char *path, struct error *err) __attribute__((warn_unused_result));
/* Plugs a device in; `text` is as for --disk or --net. -ENOTSUP: the machine has no PCI. */
int machine_disk_add(struct machine *machine, const char *text, struct error *err) __attribute__((warn_unused_result));
int machine_net_add(struct machine *machine, const char *text, struct error *err) __attribute__((warn_unused_result));
/* Asks the guest to let a device go. It is there until the guest has done that, which can take a while or for ever. */
int machine_device_remove(struct machine *machine, const char *id, struct error *err) __attribute__((warn_unused_result));
bool machine_has_device(struct machine *machine, const char *id);

/* Every part's section, in a fixed order, without RAM. With the device lock and everything standing still (machine_call_still), or before the start. */
int machine_state(struct machine *machine, struct state_io *io) __attribute__((warn_unused_result));

/*
 * The balloon (machine_balloon.c). From any thread. -ENODEV: the machine has none, or it was made without what is asked for; -EINVAL: more than the guest's memory.
 */
#define MACHINE_BALLOON_STATISTICS 16u
extern const char *const machine_balloon_statistic_names[MACHINE_BALLOON_STATISTICS]; /* "swap_in" ... */

struct machine_balloon {
    uint64_t target_pages, actual_pages; /* of 4 KiB: wanted, and held as the guest says */
    uint64_t discarded_bytes;            /* given back to the host so far by inflation, hinting and reporting */
    uint32_t statistics_interval_s;      /* 0: the guest is not asked */
    bool deflate_on_oom, hinting, reporting, statistics;
    bool known[MACHINE_BALLOON_STATISTICS]; /* the guest has told this one */
    uint64_t statistic[MACHINE_BALLOON_STATISTICS]; /* memory in bytes, events counted */
    uint32_t host_command, guest_command; /* of hinting: 0 stop, 1 done, else the number of a round */
};
int machine_balloon_get(struct machine *machine, struct machine_balloon *balloon, struct error *err) __attribute__((warn_unused_result));
int machine_balloon_resize(struct machine *machine, uint64_t mebibytes, struct error *err) __attribute__((warn_unused_result));
/* Seconds between statistics, the first come at once. -EINVAL for a change between none and some: that is decided when the machine is made. */
int machine_balloon_set_interval(struct machine *machine, uint32_t seconds, struct error *err) __attribute__((warn_unused_result));
/* A round of free page hinting; `acknowledge`: the guest gets its pages back as soon as it has told all, otherwise by machine_balloon_hint_stop. */
int machine_balloon_hint_start(struct machine *machine, bool acknowledge, struct error *err) __attribute__((warn_unused_result));
int machine_balloon_hint_stop(struct machine *machine, struct error *err) __attribute__((warn_unused_result));

/* Memory that is plugged while the machine runs (machine_memory.c). From any thread. -ENODEV: there is none; -EINVAL: too much, or no whole blocks. */
struct machine_memory {
    uint64_t plugged_mib, requested_mib;
};
int machine_memory_get(struct machine *machine, struct machine_memory *memory, struct error *err) __attribute__((warn_unused_result));
int machine_memory_request(struct machine *machine, uint64_t mebibytes, struct error *err) __attribute__((warn_unused_result));

/*
 * Snapshots: a state file (configuration, every part, processors) and a memory file (RAM as it is, sparse: pages of zeroes are holes).
 * Both replace what was there at once, when they are complete. A running guest stands still while they are written, a paused one stays paused.
 * A differential one has those pages only that were written since the last snapshot of either kind; onto an existing memory file of the guest's
 * size they are written in place, which makes it the new whole.
 */
struct snapshot_files {
    const char *state, *memory;
    bool differential;
    /* Loading only. Memory may be a layer (state/chunk_file.h) on `below`, the next one first, the last no layer. Each must be what the one above says that it lies upon. */
    const char *const *below;
    unsigned below_count;
    const struct chunk_secret *secret; /* for what is encrypted; NULL: nothing is */
    bool whole; /* read all memory before the guest runs; otherwise pages come when they are touched, and the files stay in use */
    bool catch_up; /* the guest's counters go on from where they would be had it run since, by the hosts' wall clocks */
    bool fill;  /* bring in the others in the background, so that chunk files are not needed for long */
    /* A file beside the snapshot with the pages that were touched first the last time, which are read ahead; made when there is none. NULL: neither. */
    const char *working_set;
};
int machine_snapshot_save(struct machine *machine, const struct snapshot_files *files, struct error *err) __attribute__((warn_unused_result));
/* Fills an initialised, empty configuration with the one a snapshot was made with. */
int machine_snapshot_config(const struct snapshot_files *files, struct machine_config *config, struct error *err) __attribute__((warn_unused_result));
/* Whether the state file is complete, each section as it was written, and this program reads all of them. */
struct snapshot_state {
    struct chunk_id id;
    uint64_t ram_bytes;
};
int machine_snapshot_check_state(const struct snapshot_files *files, struct snapshot_state *state, struct error *err) __attribute__((warn_unused_result));
/* The same, and whether all the files are there, complete and of one snapshot; the contents of memory are not looked at. */
int machine_snapshot_check(const struct snapshot_files *files, struct error *err) __attribute__((warn_unused_result));
/*
 * As machine_create, in the state of the snapshot. Memory is not read yet (but for `whole`, and under engines of the host): a raw memory file is mapped and shared with
 * all machines that were loaded from it; chunk files are read page by page. Nobody may write or truncate them while a machine uses them; replacing (rename) and removing them
 * is fine. `config` is the snapshot's; what the guest does not see (back ends, engine, consoles) may have been changed.
 */
int machine_snapshot_load(struct machine **machine, const struct machine_config *config, const struct snapshot_files *files, struct error *err)
    __attribute__((warn_unused_result));
/* The address that card number `index` of a clone with this generation ID has. */
void machine_clone_mac(const struct vmgenid_guid *generation, unsigned index, uint8_t mac[6]);

/*
 * A snapshot of a machine that goes on running meanwhile (snapshot_live.c): pages are written while the guest runs, those that it writes meanwhile again, round by round; it
 * stands still for the last few, which are only copied then, and for the state. What is written is not on the disk yet (fsync) when this returns.
 * After a failure pages count as written as before. -EBUSY: another one is being made.
 */
struct machine_snapshot {
    int state_fd, memory_fd;            /* empty files, borrowed */
    const char *state_name, *memory_name; /* for messages */
    bool layer;                         /* only what was written since the machine's base, which must be `parent`; -ESTALE: it is not */
    int zstd_level;                     /* 0: not compressed; then and without secret and layer, the memory file is raw */
    const struct chunk_secret *secret;  /* NULL: not encrypted */
    unsigned threads;
    bool sums;                          /* files without checksums of their own get one */
    bool without_disks;                 /* else persistent memory that the guest can write, and disks without an overlay here, are a reason to refuse: -ENOTSUP */
    struct machine_overlay *overlays;   /* put on the disks in the moment that the state is of; the state names the files below. Their descriptors are taken over */
    unsigned overlay_count;
    void (*progress)(void *ctx, uint64_t pages, uint64_t pages_expected); /* on the caller's thread. NULL: nobody asks */
    void *ctx;
    /* Results; `parent` is also what a layer lies upon. */
    struct chunk_id id, parent;
    bool has_parent;
    bool overlaid;                      /* the overlays are in use, also after a failure */
    unsigned rounds;
    uint64_t pause_ns, duration_ns;     /* the longest time that the guest stood still; all of it */
    uint64_t pages, memory_bytes, state_bytes; /* written, those of several rounds several times; in the files */
    char memory_sum[PAGE_SUM_TEXT_BYTES], state_sum[PAGE_SUM_TEXT_BYTES]; /* of a raw memory file, of a state file that is not wrapped; else "" */
};
int machine_snapshot_live(struct machine *machine, struct machine_snapshot *snapshot, struct error *err) __attribute__((warn_unused_result));
/*
 * Which parts of two snapshots' states differ: `each` gets the name of a section, and "" or how ("only in the first"). Secrets as for loading. Parts' own sections
 * are compared byte by byte.
 */
int machine_snapshot_compare(const struct snapshot_files *a, const struct snapshot_files *b, void (*each)(void *ctx, const char *name, const char *how), void *ctx,
                             struct error *err) __attribute__((warn_unused_result));
/* The snapshot that was last made of the machine, or that it was loaded from: what marks of written pages are counted from. False: there is none. */
bool machine_snapshot_base(struct machine *machine, struct chunk_id *id);

/*
 * Live migration (migrate_out.c, migrate_in.c; docs/migration.md). The guest runs until what is left goes in about half of downtime_ns; then it stands still, and goes on at the other end of the
 * stream. 0: it does, and this machine has ended (MACHINE_MIGRATED) without touching its files again. After a failure it runs here as before, but for `unknown`. On a thread of the caller's;
 * one migration or live snapshot at a time (-EBUSY).
 */
struct stream;
struct machine_migration {
    struct stream *stream;  /* machine_migration_open's */
    const char *about;      /* for who takes it there; may be NULL. At most STATE_STRING_BYTES_MAX */
    uint64_t downtime_ns;   /* wanted; afterwards: what it was */
    uint64_t bandwidth_bytes; /* a second, while the guest runs; 0: no limit */
    int zstd_level;         /* 0: memory is not compressed */
    bool post_copy;         /* a guest that writes faster than can be sent is not held up, but goes before its memory has */
    bool disks;             /* the disks that the guest can write are copied, and are the target's then */
    bool recover;           /* such a migration goes on, over another connection; at the source until all is there, at the target until memory comes again */
    _Atomic int phase;      /* 0 at first */
    _Atomic uint64_t pages_sent, pages_left, bytes_sent, disk_bytes_left; /* any thread may look */
    _Atomic unsigned throttle; /* per cent of its time that the guest is held up, because it writes faster than can be sent */
    uint64_t duration_ns;
    _Atomic bool following; /* by post-copy: the guest runs there, and memory follows */
    unsigned rounds;
    bool unknown; /* the other side was told to run the guest and did not answer: it is paused here, until somebody resumes or ends it */
};
/* Takes the descriptor of a connection over, also after a failure. -ENOMEM */
int machine_migration_open(struct machine_migration *migration, int fd) __attribute__((warn_unused_result));
void machine_migration_close(struct machine_migration *migration);
int machine_migrate(struct machine *machine, struct machine_migration *migration, struct error *err) __attribute__((warn_unused_result));
/* From any thread, between machine_migration_open and machine_migration_close. -EALREADY: the guest is handed over, or about to be. */
int machine_migration_cancel(struct machine_migration *migration) __attribute__((warn_unused_result));

/* The other end. Takes the descriptor of a connection over; fills an initialised, empty configuration with the one that the machine has there. It names files: opening them is the caller's decision. */
struct machine_incoming;
int machine_incoming_open(struct machine_incoming **incoming, int fd, struct machine_config *config, struct error *err) __attribute__((warn_unused_result));
const char *machine_incoming_about(const struct machine_incoming *incoming); /* foreign text */
void machine_incoming_refuse(struct machine_incoming *incoming, const char *reason); /* the other side is told, and goes on */
/* How many disks come with it. They need new images, which this makes, and puts into the configuration; -EEXIST. Before machine_receive; machine_incoming_close removes them unless they are kept. */
unsigned machine_incoming_disks(const struct machine_incoming *incoming);
int machine_incoming_make_disks(struct machine_incoming *incoming, const char *directory, struct machine_config *config, struct error *err) __attribute__((warn_unused_result));
void machine_incoming_keep_disks(struct machine_incoming *incoming);
void machine_incoming_close(struct machine_incoming *incoming); /* NULL: nothing */
/*
 * As machine_create, with the memory and state that come; takes as long as they do. Then machine_pause, machine_start, and machine_receive_go: the guest is taken over and runs (unless it was
 * paused). A failure of either is told to the other side, which goes on; the machine is to be destroyed then, as it has not run.
 */
int machine_receive(struct machine **machine, const struct machine_config *config, struct machine_incoming *incoming, struct error *err) __attribute__((warn_unused_result));
int machine_receive_go(struct machine *machine, struct machine_incoming *incoming, struct error *err) __attribute__((warn_unused_result));

#endif
