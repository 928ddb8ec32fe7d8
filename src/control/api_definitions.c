/* The definitions of the API's description as tables: every body's fields, types, ranges and defaults. Data only. */
#include "control/api_schema.h"

#define END {0}
#define U32_MAX 4294967295ll
#define WORDS(...) ((const char *const[]){__VA_ARGS__, NULL})
#define TEXT(field) {.name = field, .type = FIELD_STRING}
#define TEXT_REQUIRED(field) {.name = field, .type = FIELD_STRING, .required = true}
#define FLAG(field) {.name = field, .type = FIELD_BOOLEAN, .initial = "false"}
#define FLAG_REQUIRED(field) {.name = field, .type = FIELD_BOOLEAN, .required = true}
#define COUNT(field, from, to, value) {.name = field, .type = FIELD_INTEGER, .min = from, .max = to, .initial = value}
#define COUNT_REQUIRED(field, from, to) {.name = field, .type = FIELD_INTEGER, .min = from, .max = to, .required = true}
#define WORD(field, value, ...) {.name = field, .type = FIELD_WORD, .words = WORDS(__VA_ARGS__), .initial = value}
#define WORD_REQUIRED(field, ...) {.name = field, .type = FIELD_WORD, .words = WORDS(__VA_ARGS__), .required = true}
#define LIMITER(field) {.name = field, .type = FIELD_OBJECT, .fields = rate_limiter}
#define OBJECT(field, table) {.name = field, .type = FIELD_OBJECT, .fields = table}
#define OBJECTS(field, table) {.name = field, .type = FIELD_OBJECTS, .fields = table, .initial = "[]"}

static const struct field token_bucket[] = {
    COUNT_REQUIRED("size", 0, INT64_MAX),
    {.name = "one_time_burst", .type = FIELD_INTEGER},
    COUNT_REQUIRED("refill_time", 0, INT64_MAX),
    END,
};

static const struct field rate_limiter[] = {OBJECT("bandwidth", token_bucket), OBJECT("ops", token_bucket), END};

const struct field schema_action[] = {WORD_REQUIRED("action_type", "FlushMetrics", "InstanceStart", "SendCtrlAltDel"), END};

const struct field schema_balloon[] = {
    COUNT_REQUIRED("amount_mib", 0, U32_MAX),
    FLAG_REQUIRED("deflate_on_oom"),
    COUNT("stats_polling_interval_s", 0, 65535, "0"),
    FLAG("free_page_hinting"),
    FLAG("free_page_reporting"),
    END,
};
const struct field schema_balloon_update[] = {COUNT_REQUIRED("amount_mib", 0, U32_MAX), END};
const struct field schema_balloon_statistics[] = {COUNT_REQUIRED("stats_polling_interval_s", 0, 65535), END};
const struct field schema_hinting_start[] = {{.name = "acknowledge_on_stop", .type = FIELD_BOOLEAN, .initial = "true"}, END};

const struct field schema_boot_source[] = {TEXT_REQUIRED("kernel_image_path"), TEXT("initrd_path"), TEXT("boot_args"), END};

static const struct field cpuid_register[] = {WORD_REQUIRED("register", "eax", "ebx", "ecx", "edx"), TEXT_REQUIRED("bitmap"), END};
static const struct field cpuid_modifier[] = {
    TEXT_REQUIRED("leaf"),
    TEXT_REQUIRED("subleaf"),
    COUNT_REQUIRED("flags", 0, U32_MAX),
    {.name = "modifiers", .type = FIELD_OBJECTS, .fields = cpuid_register, .required = true},
    END,
};
static const struct field register_modifier[] = {TEXT_REQUIRED("addr"), TEXT_REQUIRED("bitmap"), END};
static const struct field vcpu_feature[] = {COUNT_REQUIRED("index", 0, U32_MAX), TEXT_REQUIRED("bitmap"), END};
const struct field schema_cpu_config[] = {
    {.name = "kvm_capabilities", .type = FIELD_STRINGS, .initial = "[]"},
    OBJECTS("cpuid_modifiers", cpuid_modifier),
    OBJECTS("msr_modifiers", register_modifier),
    OBJECTS("reg_modifiers", register_modifier),
    OBJECTS("vcpu_features", vcpu_feature),
    END,
};

const struct field schema_drive[] = {
    TEXT_REQUIRED("drive_id"),
    TEXT("partuuid"),
    FLAG_REQUIRED("is_root_device"),
    WORD("cache_type", "\"Unsafe\"", "Unsafe", "Writeback"),
    {.name = "is_read_only", .type = FIELD_BOOLEAN},
    TEXT("path_on_host"),
    LIMITER("rate_limiter"),
    WORD("io_engine", "\"Sync\"", "Sync", "Async"),
    TEXT("socket"),
    END,
};
const struct field schema_drive_patch[] = {TEXT_REQUIRED("drive_id"), TEXT("path_on_host"), LIMITER("rate_limiter"), END};

const struct field schema_entropy[] = {LIMITER("rate_limiter"), END};

const struct field schema_logger[] = {
    {.name = "level", .type = FIELD_WORD, .words = WORDS("Error", "Warning", "Info", "Debug", "Trace", "Off", "Warn"), .any_case = true},
    TEXT("log_path"),
    {.name = "show_level", .type = FIELD_BOOLEAN},
    {.name = "show_log_origin", .type = FIELD_BOOLEAN},
    TEXT("module"),
    END,
};

#define MACHINE_FIELDS(vcpus, memory)                                                                                                      \
    vcpus, memory, FLAG("smt"), FLAG("track_dirty_pages"), WORD("cpu_template", "\"None\"", "C3", "T2", "T2S", "T2CL", "T2A", "V1N1", "None"), \
        WORD("huge_pages", "\"None\"", "None", "Transparent", "2M"), END
const struct field schema_machine[] = {MACHINE_FIELDS(COUNT_REQUIRED("vcpu_count", 1, 32), COUNT_REQUIRED("mem_size_mib", 1, U32_MAX))};
const struct field schema_machine_patch[] = {MACHINE_FIELDS(COUNT("vcpu_count", 1, 32, NULL), COUNT("mem_size_mib", 1, U32_MAX, NULL))};

const struct field schema_memory_hotplug[] = {
    COUNT("total_size_mib", 0, U32_MAX, NULL),
    COUNT("slot_size_mib", 128, U32_MAX, "128"),
    COUNT("block_size_mib", 2, U32_MAX, "2"),
    END,
};
const struct field schema_memory_hotplug_update[] = {COUNT_REQUIRED("requested_size_mib", 0, U32_MAX), END};

const struct field schema_metrics[] = {
    TEXT_REQUIRED("metrics_path"),
    FLAG("emit_id"),
    {.name = "properties", .type = FIELD_TEXTS, .initial = "{}"},
    END,
};

const struct field schema_mmds_config[] = {
    WORD("version", "\"V1\"", "V1", "V2"),
    {.name = "network_interfaces", .type = FIELD_STRINGS, .required = true},
    {.name = "ipv4_address", .type = FIELD_STRING, .initial = "\"169.254.169.254\""},
    FLAG("imds_compat"),
    END,
};

const struct field schema_network[] = {
    TEXT_REQUIRED("iface_id"),
    TEXT_REQUIRED("host_dev_name"),
    TEXT("guest_mac"),
    LIMITER("rx_rate_limiter"),
    LIMITER("tx_rate_limiter"),
    {.name = "mtu", .type = FIELD_INTEGER, .min = 68, .max = 65535, .absent = true},
    END,
};
const struct field schema_network_patch[] = {TEXT_REQUIRED("iface_id"), LIMITER("rx_rate_limiter"), LIMITER("tx_rate_limiter"), END};

const struct field schema_pmem[] = {
    TEXT_REQUIRED("id"),
    TEXT_REQUIRED("path_on_host"),
    FLAG("root_device"),
    FLAG("read_only"),
    LIMITER("rate_limiter"),
    END,
};
const struct field schema_pmem_patch[] = {TEXT_REQUIRED("id"), LIMITER("rate_limiter"), END};

const struct field schema_serial[] = {TEXT("serial_out_path"), OBJECT("rate_limiter", token_bucket), END};

const struct field schema_snapshot_create[] = {
    WORD("snapshot_type", "\"Full\"", "Full", "Diff"),
    TEXT_REQUIRED("snapshot_path"),
    TEXT_REQUIRED("mem_file_path"),
    END,
};

static const struct field memory_backend[] = {WORD_REQUIRED("backend_type", "File", "Uffd"), TEXT_REQUIRED("backend_path"), END};
static const struct field network_override[] = {TEXT_REQUIRED("iface_id"), TEXT_REQUIRED("host_dev_name"), END};
static const struct field vsock_override[] = {TEXT_REQUIRED("uds_path"), END};
const struct field schema_snapshot_load[] = {
    TEXT_REQUIRED("snapshot_path"),
    TEXT("mem_file_path"),
    OBJECT("mem_backend", memory_backend),
    FLAG("enable_diff_snapshots"),
    FLAG("track_dirty_pages"),
    FLAG("resume_vm"),
    OBJECTS("network_overrides", network_override),
    OBJECT("vsock_override", vsock_override),
    FLAG("clock_realtime"),
    WORD("huge_pages", "\"Snapshot\"", "Snapshot", "None", "Transparent", "2M"),
    END,
};

const struct field schema_vm[] = {WORD_REQUIRED("state", "Paused", "Resumed"), END};

const struct field schema_vsock[] = {
    COUNT_REQUIRED("guest_cid", 3, U32_MAX),
    TEXT_REQUIRED("uds_path"),
    {.name = "vsock_id", .type = FIELD_STRING, .absent = true},
    END,
};
