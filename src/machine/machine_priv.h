/* The machine, inside: shared by machine.c (assembly), vcpu_thread.c (running), still.c (standing still), machine_report.c (dump and counters). */
#ifndef DOPPEL_MACHINE_MACHINE_PRIV_H
#define DOPPEL_MACHINE_MACHINE_PRIV_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#include "arch/cpuid.h"
#include "block/block.h"
#include "chipset/boot.h"
#include "chipset/bus.h"
#include "chipset/chipset.h"
#include "chipset/debugcon.h"
#include "chipset/hpet.h"
#include "chipset/i8042.h"
#include "chipset/ioapic.h"
#include "chipset/lapic.h"
#include "chipset/pci.h"
#include "chipset/pci_hotplug.h"
#include "chipset/pic.h"
#include "chipset/pit.h"
#include "chipset/pm.h"
#include "chipset/pvpanic.h"
#include "chipset/rtc.h"
#include "chipset/uart.h"
#include "chipset/vmgenid.h"
#include "device/device.h"
#include "device/virtio_mmio.h"
#include "engine/engine.h"
#include "machine/console.h"
#include "machine/machine.h"
#include "machine/pvclock.h"
#include "memory/memory.h"
#include "net/net.h"
#include "sandbox/sandbox.h"
#include "util/loop.h"
#include "util/patience.h"

/* What a vCPU's thread is asked to do; bits in vcpu_thread.requests. */
#define REQUEST_STOP 1u
#define REQUEST_PARK 2u
#define REQUEST_INIT 4u
#define REQUEST_STARTUP 8u
#define REQUEST_HOLD_UP 16u

struct vcpu_thread {
    struct machine *machine;
    unsigned index;
    struct vcpu *vcpu;
    pthread_t thread;
    bool started;
    _Atomic uint32_t requests;
    _Atomic uint8_t startup_vector;
    pthread_mutex_t lock; /* `wake` waits with it */
    pthread_cond_t wake;
    atomic_bool woken; /* set with the lock held, cleared by the thread */
    struct patience patience;
    struct pvclock pvclock;
    uint64_t exits[4]; /* by enum engine_exit */
};

/* A part with guest-visible state: what reset, saving and destruction walk over, in order of creation. */
struct machine_part {
    const char *name;
    void *object;
    void (*reset)(void *object);
    int (*state)(void *object, struct state_io *io);
    bool (*quiesce)(void *object);
    void (*destroy)(void *object);
    unsigned rank; /* those of a higher one come behind; 0 but for what comes and goes */
};

/* A device of the table in device/devices.def. */
struct machine_device {
    const struct device_class *class;
    struct device *device;
    const char *kind, *id; /* for counters: "block", "rootfs"; id NULL: none */
};

struct machine_disk {
    struct block *block;
    struct machine_device *device;
};

/* PCI slots. Others take what is free, from the top. */
enum { SLOT_RNG = 1, SLOT_CONSOLE = 2, SLOT_NET = 3, SLOT_DISK = SLOT_NET + CONFIG_NETS_MAX, SLOT_VSOCK = SLOT_DISK + CONFIG_DISKS_MAX };
_Static_assert(SLOT_VSOCK < PCI_SLOTS, "one PCI slot a device");

struct machine_message {
    uint64_t address;
    uint32_t data;
};

#define MACHINE_DEVICES_MAX (CONFIG_DISKS_MAX + CONFIG_NETS_MAX + CONFIG_SHARES_MAX + CONFIG_PMEMS_MAX + 5)
#define MACHINE_PARTS_MAX (MACHINE_DEVICES_MAX + 16)

struct machine {
    const struct machine_config *config; /* own_config */
    struct machine_config own_config;    /* changed with the device lock, on the loop's thread but for limits */
    pthread_mutex_t device_lock;
    struct loop *loop;
    pthread_t loop_thread;
    bool loop_started;

    struct physmap *memory;
    struct cpuid_table *cpuid;
    struct bus *bus;
    struct pci_host *pci; /* NULL: virtio devices are memory-mapped, see mmio */
    struct virtio_mmio_host mmio;
    struct lapic_set *lapics;
    struct ioapic *ioapic;
    struct pic *pic;
    struct pit *pit;
    struct rtc *rtc;
    struct hpet *hpet;
    struct pm *pm;
    struct i8042 *i8042;
    struct uart *com1;
    struct pvpanic *pvpanic;
    struct vmgenid *vmgenid;
    struct debugcon *debugcon;
    struct msi_target msi;
    uint64_t started_us, started_cpu_us; /* boot_timer.c */
    uint64_t serial_written, serial_read, serial_dropped; /* bytes; device lock */
    struct console *serial_console, *virtio_console_backend, *debug_console;
    struct token_bucket serial_bucket;
    struct device *virtio_console, *balloon, *pluggable; /* NULL: none */
    struct block *pmem[CONFIG_PMEMS_MAX];
    struct machine_disk disk[CONFIG_DISKS_MAX];   /* as own_config.disk */
    struct metadata *metadata;         /* NULL: none. Its own unless config->metadata.service is it */
    struct net_server metadata_server; /* in front of network cards */
    struct net_server_counters metadata_counters;
    struct machine_device *net[CONFIG_NETS_MAX];  /* as own_config.net; NULL: none */
    struct pci_hotplug *hotplug;                  /* NULL: no PCI */
    uint32_t ejecting;                            /* slots that the guest has let go */
    struct loop_timer *eject_timer;

    struct device_host device_host;
    struct machine_device *device[MACHINE_DEVICES_MAX];
    unsigned device_count;
    struct machine_part part[MACHINE_PARTS_MAX];
    unsigned part_count;

    const struct engine_ops *engine_ops;
    char engine_reason[ENGINE_REASON_MAX]; /* why it was chosen */
    struct engine *engine;
    const struct engine_irqchip_ops *irqchip; /* NULL: the local APICs are ours (lapics) */
    atomic_bool extint;                       /* the 8259 pair's output, for that engine */
    bool holds_messages;                      /* while a state is loaded */
    struct machine_message held[MACHINE_PARTS_MAX];
    unsigned held_count;
    struct vcpu_thread *vcpu;
    unsigned cpu_count;
    struct boot_entry boot;
    int kernel_fd, initrd_fd; /* kept for resets */
    FILE *trace;                      /* --trace; NULL: not there */
    char *trace_buffer;               /* its bytes to be written: made here, because the C library would look at the file first, which vCPU threads may not */
    struct machine_trace *live_trace; /* machine_trace.c; NULL: nobody has asked yet */
    uint64_t tsc_khz;
    bool catch_up; /* snapshot_files' */
    struct sandbox *sandbox; /* NULL: off */
    struct sandbox *sandbox_begun; /* until it is made */
    bool user_network;       /* the loop's thread may do it */

    /* Running: guarded by run_lock, signalled through run_changed. */
    pthread_mutex_t run_lock;
    pthread_cond_t run_changed;
    enum machine_end end;
    bool started, paused, reset_wanted, unplug_wanted;
    bool given_away; /* nobody knows whether the guest runs elsewhere (migrate_out.c): paused, without its disks */
    struct machine_call *call; /* to be made while everything stands still */
    bool still_due;            /* still_timer was armed for a reset or a call */
    struct loop_timer *still_timer;
    struct loop_timer *throttle_timer;
    atomic_uint throttle; /* per cent */
    unsigned parked_count;
    pthread_mutex_t watch_lock; /* innermost; guards `observer` */
    struct machine_observer observer;
    pthread_mutex_t snapshot_lock; /* outermost; held by who takes marks of written pages, from the first to the last */
    bool has_base;        /* run_lock */
    struct chunk_id base; /* the snapshot that the marks are counted from */
    struct read_ahead *read_ahead; /* NULL: nothing is */
    struct post_copy_source *post_copy_source; /* post_copy.h; NULL: all of its memory is here, or there */
    struct post_copy_target *post_copy_target;
    _Atomic unsigned frames_waiting; /* for the loop (migrate_frames.c) */
    bool disks_leaving; /* device lock. They are being copied to another host: none comes, goes or changes its file */
    bool gone; /* run_lock. The guest runs elsewhere, for certain, and never here again */
    pthread_mutex_t join_lock; /* outermost; guards vcpu_thread.started from start to end */
};

/* Tells the observer. Any thread, any lock. */
void machine_tell(struct machine *machine, enum machine_event event, const char *detail);

/* Parts register themselves in order of creation. */
void machine_add_part(struct machine *machine, const struct machine_part *part);
void machine_remove_part(struct machine *machine, const void *object);

/* machine_devices.c: disks, network cards, consoles, random device. */
int machine_create_devices(struct machine *machine, struct error *err);
int machine_add_device(struct machine *machine, const char *class_name, const void *config, struct device **out, struct error *err);
void machine_name_device(struct machine *machine, const char *kind, const char *id); /* the one made last, for counters */
/* A PCI slot for what is not plugged: from the top, so that what is plugged and unplugged does not change it. */
int machine_spare_slot(const struct machine *machine);

/* machine_memory.c: RAM and files of persistent memory, and the devices about memory. */
int machine_create_memory(struct machine *machine, struct error *err);
int machine_check_memory(const struct machine *machine, struct error *err); /* with the processors known */
int machine_create_memory_devices(struct machine *machine, struct error *err);
void machine_close_pmems(struct machine *machine);
void machine_unplug(struct machine *machine); /* what the driver of pluggable memory waits for. Everything stands still, device lock held */

/* *out stays until machine_drop_device. `rank`: see machine_part. */
int machine_make_device(struct machine *machine, const char *class_name, unsigned rank, const void *config, struct machine_device **out, struct error *err);
void machine_drop_device(struct machine *machine, struct machine_device *device);
/*
 * machine_plug.c. Disks and persistent memory of a machine that migrates: the target takes them over once the source has given them away (and in `incoming` lets them wait until then); the source
 * takes them back (`away` false) when the guest stays. Nothing is in flight.
 */
int machine_take_over_disks(struct machine *machine, struct error *err);
int machine_give_disks(struct machine *machine, bool away, struct error *err);
/* The network learns where the guest's cards are now. Loop's thread; `machine` is one. */
void machine_announce_nets(void *machine);
struct block_config machine_pmem_file(const struct machine *machine, unsigned index); /* machine_memory.c */
/* machine_plug.c */
int machine_create_hotplug(struct machine *machine);
/* machine_metadata.c */
int machine_create_metadata(struct machine *machine, struct error *err);
void machine_destroy_metadata(struct machine *machine);
/* What the card's back end gets in front of it; NULL: nothing. Notes in the card's configuration that it was so. */
const struct net_server *machine_metadata_server(struct machine *machine, struct net_card_config *card);
/* With the device lock held. */
void machine_count_metadata(struct machine *machine, machine_counter_fn *emit, void *ctx);

int machine_create_nets(struct machine *machine, struct error *err);
int machine_create_disks(struct machine *machine, struct error *err);
uint32_t machine_hotplug_slots(void);
int machine_open_virtio_console(struct machine *machine, struct error *err);

/* command_line.c: the kernel's, to be freed; NULL: no memory. */
char *machine_command_line(const struct machine *machine);

/* Puts every part in its state after power-on and loads the kernel again. No vCPU runs, nothing is in flight; device lock held or no thread started. */
int machine_power_on(struct machine *machine, void *unused, struct error *err);
/* machine_create with another beginning than power-on: `begin` brings memory and all parts into their first state. */
int machine_create_with(struct machine **machine, const struct machine_config *config, int (*begin)(struct machine *machine, void *ctx, struct error *err),
                        void *ctx, struct error *err) __attribute__((warn_unused_result));

/* boot_timer.c: -ENOMEM. */
int machine_add_boot_timer(struct machine *machine);

/* processor.c: what CPUID and MSRs show. NULL with a message. */
struct cpuid_table *processor_table(struct cpuid_config *cpuid, const struct processor_config *config, struct error *err);

#define MACHINE_DEVICE_NAME_BYTES 72
/* machine_report.c: its id, or kind and number as in "net0". Device lock. */
void machine_device_name(const struct machine *machine, unsigned index, char name[MACHINE_DEVICE_NAME_BYTES]);
/* machine_dump with the device lock already held. */
void machine_dump_locked(struct machine *machine, FILE *out);

/* Ctrl-A commands of a terminal; ctx is the machine. Device lock held. */
void machine_console_command(void *ctx, int character);

/* True when no device has requests in flight; starts finishing them otherwise. Device lock held, or nothing running. */
bool machine_quiesce(struct machine *machine);
/* still.c: machine_pause without waiting for the processors; from the loop. False: it was paused already. `why` is the event's detail. */
bool machine_pause_now(struct machine *machine, const char *why);
/* disk_full.c */
void machine_watch_disk(struct machine *machine, const struct disk_config *disk, struct block *block);
const char *machine_full_disk(const struct machine *machine); /* the path of one whose requests wait; NULL: none */
void machine_retry_disks(struct machine *machine, bool for_good);

/* shut_in.c: the sandbox is made when all files are open and before the first thread is, and entered by each thread first. True: go on. */
void machine_begin_sandbox(struct machine *machine); /* once the engine is known: some of it is made aside meanwhile */
int machine_make_sandbox(struct machine *machine, struct error *err);
bool machine_enter_sandbox(struct machine *machine, unsigned kind);

/* machine_trace.c: where a vCPU's trace goes now, NULL nowhere */
FILE *machine_vcpu_trace(const struct machine *machine, unsigned index);
void machine_trace_destroy(struct machine *machine);

/* still.c */
void machine_still(void *machine); /* still_timer's */
void machine_want_unplug(void *machine); /* machine_unplug, soon. Any thread, also with the device lock */
void machine_park(struct vcpu_thread *cpu); /* on the vCPU's thread, after REQUEST_PARK */
/*
 * Runs `run` on the loop's thread, with the device lock, every vCPU parked and nothing in flight; the machine goes on afterwards as it was, running or paused.
 * Returns its result; -ESRCH when the machine has ended, -EINVAL when it was not started. Not on the loop's or a vCPU's thread.
 */
int machine_call_still(struct machine *machine, int (*run)(struct machine *machine, void *ctx, struct error *err), void *ctx, struct error *err)
    __attribute__((warn_unused_result));

/* machine_disks.c */
/* What the guest has written so far goes to the host's disks while it runs, so that little is left for the moment when it does not. */
void machine_disks_write_back(struct machine *machine);
void machine_overlays_close(struct machine_overlay *overlays, unsigned count); /* those that were not taken over */
/* All or none. Everything stands still. */
int machine_overlay_still(struct machine *machine, struct machine_overlay *overlays, unsigned count, struct error *err);

/* identity.c: after everything was loaded, and before anything runs. */
int machine_become_another(struct machine *machine, struct error *err);

/* read_ahead.c: what is brought into memory unasked after loading. Opened before vCPUs run and the sandbox is made; stopped when nothing else runs. */
int read_ahead_open(struct machine *machine, const struct snapshot_files *files, const struct chunk_id *id, struct error *err);
void read_ahead_start(struct machine *machine);
void read_ahead_close(struct machine *machine);

/* snapshot.c, snapshot_live.c, snapshot_load.c */
/* The state file's content; *io is the caller's, also after a failure. Everything stands still. */
int snapshot_encode(struct machine *machine, const struct chunk_id *id, struct state_io **io, struct error *err);
void snapshot_set_base(struct machine *machine, const struct chunk_id *id);
/* Marks in PhysMap all that the guest wrote; what it writes from now on is noted anew. Everything stands still. */
int snapshot_collect(struct machine *machine, uint64_t *pages, struct error *err);
/* Memory, or where its pages are to come from. */
int snapshot_read_memory(struct machine *machine, const struct snapshot_files *files, struct error *err);
/* Whether these are files of such memory, without reading it. */
int snapshot_check_layers(uint64_t ram_bytes, const struct snapshot_files *files, struct error *err);
/* Reads what snapshot_encode made into a machine whose memory is there already. `name` is for messages. */
int snapshot_decode(struct machine *machine, const void *data, size_t size, const char *name, struct error *err);
/*
 * The rounds of machine_snapshot_live with another end. put, on the caller's thread and in the last round on the loop's: pages of one chunk (state/chunk_file.h), from `data`, where the chunk is in
 * RAM; the guest may be writing to them. what_now: whether what the guest wrote lately, `count` pages, goes now that
 * everything stands still, since still_since_ns, or is left to finish; `must`: there are no more rounds. finish, on the loop's thread: all is sent but the state and the pages of `left` (NULL: none);
 * what it returns is the result, and the guest goes on afterwards unless it has seen to something else.
 */
enum snapshot_step { SNAPSHOT_ANOTHER_ROUND, SNAPSHOT_LAST_ROUND, SNAPSHOT_LEAVE_REST };
struct snapshot_sink {
    int (*put)(void *ctx, uint64_t chunk, uint64_t pages, const uint8_t *data, struct error *err);
    enum snapshot_step (*what_now)(void *ctx, uint64_t count, uint64_t still_since_ns, bool must);
    int (*finish)(void *ctx, struct state_io *state, const uint64_t *left, struct error *err);
    int (*between)(void *ctx, struct error *err); /* on the caller's thread, before all but the first look. NULL: nothing */
    void *ctx;
    unsigned rounds_max;
};
int snapshot_to_sink(struct machine *machine, struct machine_snapshot *snapshot, const struct snapshot_sink *sink, struct error *err);
/* A state file's bytes, whatever they are wrapped in; the caller frees. */
int snapshot_read_state(const struct snapshot_files *files, char **data, size_t *size, struct error *err);

/* vcpu_thread.c */
int vcpu_threads_create(struct machine *machine, struct error *err);
int vcpu_threads_start(struct machine *machine, struct error *err);
void vcpu_threads_join(struct machine *machine);
void vcpu_threads_destroy(struct machine *machine);
void vcpu_threads_request(struct machine *machine, uint32_t request); /* of all */
void vcpu_thread_request(struct vcpu_thread *cpu, uint32_t request);
void vcpu_thread_wake(struct vcpu_thread *cpu);
/* vCPUs are held up for so many per cent of their time, at most THROTTLE_MAX; 0: no more. */
#define THROTTLE_MAX 99u
void machine_throttle(struct machine *machine, unsigned percent);
void machine_throttle_tick(void *machine); /* throttle_timer's */

extern const struct lapic_ops machine_lapic_ops;

/* irqchip.c: interrupts' way to the local APICs, wherever these are. */
struct msi_target machine_msi_target(struct machine *machine);
void machine_level_pin(void *machine, unsigned pin, uint64_t address, uint32_t data);
void machine_extint(void *machine, unsigned pin, bool level);
/* Between the two, messages to the local APICs wait: before these are loaded they would be lost. Only while no thread runs. */
void machine_hold_messages(struct machine *machine);
void machine_release_messages(struct machine *machine);
/* Writes to virtio's notification registers become counts on descriptors, where the engine can; called when there is one, and without when it goes. */
void machine_connect_doorbells(struct machine *machine);
/* Local APICs' states to the engine, if it has them, and back for as long as they are saved. vCPUs stand still. 0 or -errno. */
int machine_apics_give(struct machine *machine);
int machine_apics_arrive(struct machine *machine); /* first of all, when saving */
int machine_apics_take(struct machine *machine);
void machine_apics_rest(struct machine *machine);

#endif
