/*
 * A virtual machine's configuration: parsed and checked option texts. Strings are owned. No threading: built before the machine exists.
 */
#ifndef DOPPEL_MACHINE_CONFIG_H
#define DOPPEL_MACHINE_CONFIG_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/engine.h"
#include "util/error.h"

#define CONFIG_DISKS_MAX 16
#define CONFIG_NETS_MAX 8
#define CONFIG_CPUS_MAX 64
#define CONFIG_DUMPS_MAX 16
#define CONFIG_MEMORY_MIN_BYTES (1ull << 20)
#define CONFIG_MEMORY_MAX_BYTES (240ull << 30) /* the 64-bit PCI window starts at 256 GiB */

struct disk_config {
    char *path, *format, *serial;
    bool readonly;
};

enum on_reset { ON_RESET_RESTART, ON_RESET_EXIT };
enum on_panic { ON_PANIC_EXIT, ON_PANIC_RESTART, ON_PANIC_IGNORE };

struct machine_config {
    char *kernel, *initrd, *append;
    uint64_t memory_bytes;
    unsigned cpus;
    struct disk_config disk[CONFIG_DISKS_MAX];
    unsigned disk_count;
    char *net[CONFIG_NETS_MAX]; /* back end specifications; none given: one "user" */
    unsigned net_count;
    char *engine, *console, *virtio_console, *debug_console;
    bool boot_in_guest;
    enum on_reset on_reset;
    enum on_panic on_panic;
    char *trace, *pid_file;
    bool stats, perf_map;
    enum engine_direct direct;
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

/* Sets one option from its text; value may be NULL for flags ("true" and "false" also count). */
int machine_config_set(struct machine_config *config, const char *key, const char *value, struct error *err) __attribute__((warn_unused_result));
/* Reads a JSON object; see options.def for keys. */
int machine_config_load(struct machine_config *config, const char *path, struct error *err) __attribute__((warn_unused_result));
/* The text of a flag ("true", "false") or of an option kept as text (kernel, initrd, append, trace, pid-file); NULL when not set. */
const char *machine_config_text(const struct machine_config *config, const char *key);
/* What can only be seen with everything set: a kernel is there, memory fits the host. */
int machine_config_check(const struct machine_config *config, struct error *err) __attribute__((warn_unused_result));

/* "512M" -> bytes. Units K M G T, also KiB, kB ... all powers of 1024; none: MiB. */
int parse_size(const char *text, uint64_t *bytes);

#endif
