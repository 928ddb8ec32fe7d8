/*
 * A virtual machine's configuration: parsed and checked option texts. Strings are owned. No threading: built before the machine exists.
 */
#ifndef DOPPEL_MACHINE_CONFIG_H
#define DOPPEL_MACHINE_CONFIG_H

#include <stdbool.h>
#include <stdint.h>

#include "arch/cpuid.h"
#include "block/block.h"
#include "chipset/vmgenid.h"
#include "engine/engine.h"
#include "fs/fs.h"
#include "state/state.h"
#include "util/error.h"
#include "util/token_bucket.h"

struct metadata;

#define CONFIG_DISKS_MAX 16
#define CONFIG_NETS_MAX 8
#define CONFIG_PMEMS_MAX 8
#define CONFIG_SHARES_MAX 8
#define CONFIG_CPUS_MAX 64
#define CONFIG_DUMPS_MAX 16
#define CONFIG_MEMORY_MIN_BYTES (1ull << 20)
#define CONFIG_MEMORY_MAX_BYTES (240ull << 30) /* the 64-bit PCI window starts at 256 GiB */

struct disk_config {
    char *path, *format, *serial;
    bool readonly;
    char *id;       /* the API's drive_id; NULL: none */
    bool root;      /* the kernel's root: its command line says so */
    char *partuuid; /* the root partition, with `root` */
    unsigned slot;  /* its PCI slot; 0: the machine chooses */
    bool writeback; /* offers the guest flushes; off: they cost nothing and keep nothing ("Unsafe") */
    struct rate_limit_config limit;
    enum block_backing backing; /* which backing files its image may name */
    bool report_full; /* the guest sees an error when the host has no room; otherwise the machine is paused */
    bool fresh;   /* a new image, filled while the machine comes from another host. Not saved */
    char *origin; /* of which snapshots made `path` the overlay: the file that the user named; NULL: `path` is that */
};

/* What the API adds to a network card; `spec` (machine_config.net) says the rest. */
struct net_card_config {
    char *id; /* the API's iface_id; NULL: none */
    struct rate_limit_config receive, transmit;
    unsigned mtu; /* told to the guest; 0: not */
    unsigned slot; /* its PCI slot; 0: the machine chooses */
    bool metadata; /* requests to the metadata address are answered here */
};

struct vsock_config {
    bool present;
    uint32_t cid; /* 3 or more */
    char *path;   /* the Unix socket; guest's connections to port P go to PATH_P */
};

struct balloon_config {
    bool present;
    uint32_t amount_mib;
    bool deflate_on_oom, hinting, reporting;
    uint32_t statistics_interval_s; /* 0: none */
};

struct pmem_config {
    char *id, *path;
    bool root, readonly;
    struct rate_limit_config limit;
};

struct share_config {
    char *path, *tag;
    bool readonly;
    enum fs_cache cache;
    bool writeback, xattr;
    int64_t uid, gid; /* see fs_config */
};

struct memory_hotplug_config {
    bool present;
    uint64_t total_mib, slot_mib, block_mib;
};

/* What guests ask for metadata at an address 169.254.x.x. */
struct metadata_config {
    bool present, version_2, imds_compatible;
    bool everywhere; /* by all network cards; otherwise by those that say so */
    char *address;   /* NULL: 169.254.169.254 */
    char *path;      /* a JSON file with the data; NULL: none at first */
    struct metadata *service; /* borrowed: who has the data. NULL: the machine makes one */
};

#define CONFIG_CPUID_MASKS_MAX 128

/* How the guest's processor differs from what this host and the engine could show it. */
struct processor_config {
    struct cpuid_mask cpuid[CONFIG_CPUID_MASKS_MAX];
    unsigned cpuid_count;
    bool cpuid_optional; /* leaves that are not there are passed over */
    struct msr_mask msr[CPUID_MSR_MASKS_MAX];
    unsigned msr_count;
};

enum virtio_transport { TRANSPORT_PCI, TRANSPORT_MMIO };

enum on_reset { ON_RESET_RESTART, ON_RESET_EXIT };
enum on_panic { ON_PANIC_EXIT, ON_PANIC_RESTART, ON_PANIC_IGNORE };

struct machine_config {
    char *kernel, *initrd, *append;
    uint64_t memory_bytes;
    unsigned cpus;
    struct disk_config disk[CONFIG_DISKS_MAX];
    unsigned disk_count;
    char *net[CONFIG_NETS_MAX]; /* back end specifications; none given: one "user" */
    struct net_card_config net_card[CONFIG_NETS_MAX];
    unsigned net_count;
    struct pmem_config pmem[CONFIG_PMEMS_MAX];
    unsigned pmem_count;
    struct share_config share[CONFIG_SHARES_MAX];
    unsigned share_count;
    struct vsock_config vsock;
    struct balloon_config balloon;
    struct memory_hotplug_config memory_hotplug;
    struct metadata_config metadata;
    struct rate_limit_config entropy_limit;
    struct bucket_config serial_limit;
    enum virtio_transport transport;
    bool has_generation_id; /* else one is drawn when the machine is made, or goes on from a snapshot */
    bool is_clone; /* of a snapshot: its network cards get addresses of their own, see machine_clone_mac */
    struct vmgenid_guid generation_id;
    bool boot_timer; /* log when a guest's init says that it is there (boot_timer.c) */
    struct processor_config processor; /* a snapshot has the table made of it instead */
    char *engine, *console, *virtio_console, *debug_console;
    bool boot_in_guest;
    enum on_reset on_reset;
    enum on_panic on_panic;
    char *trace, *pid_file;
    bool stats, perf_map;
    bool sandbox;
    const char *snapshots_directory; /* borrowed: where snapshots of it are made, which control threads may do in the sandbox, too; NULL: nowhere */
    bool incoming; /* another machine, which migrates, has its disks yet */
    const char *own_directory; /* borrowed: where the program keeps what it tells of the machine; NULL: nowhere */
    int broker;       /* that opens files once the sandbox has closed (machine_start_broker); -1: none */
    const char *api_socket; /* borrowed: removed at the end, as the directory is; NULL: none */
    char *sandbox_omit; /* for tests: a rule to leave out, see sandbox_config.omit */
    enum engine_direct direct;
    enum engine_irqchip irqchip;
    struct code_address dump_code[CONFIG_DUMPS_MAX];
    unsigned dump_code_count;
    int input_fd, output_fd; /* for "stdio" */
};

#define OPT_MANY 1u
#define OPT_FLAG 2u

struct option_info {
    const char *key, *argument, *help;
    unsigned flags;
};

/* The list of options.def, ended by a NULL key. */
extern const struct option_info option_table[];
const struct option_info *option_find(const char *key);

void machine_config_init(struct machine_config *config);
void machine_config_clear(struct machine_config *config);
/* `to` is not initialised before. -ENOMEM: it is empty then. */
int machine_config_copy(struct machine_config *to, const struct machine_config *from) __attribute__((warn_unused_result));

/* Sets one option from its text; value may be NULL for flags ("true" and "false" also count). */
int machine_config_set(struct machine_config *config, const char *key, const char *value, struct error *err) __attribute__((warn_unused_result));
/* Reads a JSON object; see options.def for keys. */
int machine_config_load(struct machine_config *config, const char *path, struct error *err) __attribute__((warn_unused_result));
/* The text of a flag ("true", "false") or of an option kept as text (kernel, initrd, append, trace, pid-file); NULL when not set. */
const char *machine_config_text(const struct machine_config *config, const char *key);
/* What can only be seen with everything set: a kernel is there, memory fits the host. */
int machine_config_check(const struct machine_config *config, struct error *err) __attribute__((warn_unused_result));

/* Section "config": what it takes to make the same machine again. Loads into an initialised, empty configuration. */
int machine_config_state(struct machine_config *config, struct state_io *io) __attribute__((warn_unused_result));

/* "512M" -> bytes. Units K M G T, also KiB, kB ... all powers of 1024; none: MiB. */
int parse_size(const char *text, uint64_t *bytes);

#endif
