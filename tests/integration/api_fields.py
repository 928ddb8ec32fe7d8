"""Every field that the API's description has, by hand (docs/api.md says what each does), and what may be wrong with one: for api.py."""
import json

TEXT, FLAG, WORD, WORDS, TEXTS = "text", "flag", "word", "words", "texts"


class Count:
    def __init__(self, low=0, high=(1 << 63) - 1):
        self.low, self.high = low, high


class Many:
    """A list of objects."""

    def __init__(self, fields):
        self.fields = fields


U32 = (1 << 32) - 1
ANY, U16 = Count(), Count(0, 65535)
BUCKET = {"size!": ANY, "one_time_burst": ANY, "refill_time!": ANY}
LIMITER = {"bandwidth": BUCKET, "ops": BUCKET}
REGISTER = [{"addr!": TEXT, "bitmap!": TEXT}]
MACHINE = {"smt": FLAG, "track_dirty_pages": FLAG, "cpu_template": WORD, "huge_pages": WORD}

# What is required has "!" behind its name. An object is a dictionary, a list of objects one in a list.
BODIES = {
    ("PUT", "/actions"): {"action_type!": WORD},
    ("PUT", "/balloon"): {"amount_mib!": Count(0, U32), "deflate_on_oom!": FLAG, "stats_polling_interval_s": U16, "free_page_hinting": FLAG, "free_page_reporting": FLAG},
    ("PATCH", "/balloon"): {"amount_mib!": Count(0, U32)},
    ("PATCH", "/balloon/statistics"): {"stats_polling_interval_s!": U16},
    ("PATCH", "/balloon/hinting/start"): {"acknowledge_on_stop": FLAG},
    ("PUT", "/boot-source"): {"kernel_image_path!": TEXT, "initrd_path": TEXT, "boot_args": TEXT},
    ("PUT", "/cpu-config"): {"kvm_capabilities": WORDS, "msr_modifiers": REGISTER, "reg_modifiers": REGISTER, "vcpu_features": [{"index!": Count(0, U32), "bitmap!": TEXT}],
                             "cpuid_modifiers": [{"leaf!": TEXT, "subleaf!": TEXT, "flags!": Count(0, U32), "modifiers!": [{"register!": WORD, "bitmap!": TEXT}]}]},
    ("PUT", "/drives/x"): {"drive_id!": TEXT, "partuuid": TEXT, "is_root_device!": FLAG, "cache_type": WORD, "is_read_only": FLAG, "path_on_host": TEXT, "rate_limiter": LIMITER,
                           "io_engine": WORD, "socket": TEXT},
    ("PATCH", "/drives/x"): {"drive_id!": TEXT, "path_on_host": TEXT, "rate_limiter": LIMITER},
    ("PUT", "/pmem/x"): {"id!": TEXT, "path_on_host!": TEXT, "root_device": FLAG, "read_only": FLAG, "rate_limiter": LIMITER},
    ("PATCH", "/pmem/x"): {"id!": TEXT, "rate_limiter": LIMITER},
    ("PUT", "/logger"): {"level": WORD, "log_path": TEXT, "show_level": FLAG, "show_log_origin": FLAG, "module": TEXT},
    ("PUT", "/machine-config"): {"vcpu_count!": Count(1, 32), "mem_size_mib!": Count(1, U32), **MACHINE},
    ("PATCH", "/machine-config"): {"vcpu_count": Count(1, 32), "mem_size_mib": Count(1, U32), **MACHINE},
    ("PUT", "/metrics"): {"metrics_path!": TEXT, "emit_id": FLAG, "properties": TEXTS},
    ("PUT", "/mmds/config"): {"version": WORD, "network_interfaces!": WORDS, "ipv4_address": TEXT, "imds_compat": FLAG},
    ("PUT", "/entropy"): {"rate_limiter": LIMITER},
    ("PUT", "/serial"): {"serial_out_path": TEXT, "rate_limiter": BUCKET},
    ("PUT", "/hotplug/memory"): {"total_size_mib": Count(0, U32), "slot_size_mib": Count(128, U32), "block_size_mib": Count(2, U32)},
    ("PATCH", "/hotplug/memory"): {"requested_size_mib!": Count(0, U32)},
    ("PUT", "/network-interfaces/x"): {"iface_id!": TEXT, "host_dev_name!": TEXT, "guest_mac": TEXT, "mtu": Count(68, 65535), "rx_rate_limiter": LIMITER, "tx_rate_limiter": LIMITER},
    ("PATCH", "/network-interfaces/x"): {"iface_id!": TEXT, "rx_rate_limiter": LIMITER, "tx_rate_limiter": LIMITER},
    ("PUT", "/snapshot/create"): {"snapshot_type": WORD, "snapshot_path!": TEXT, "mem_file_path!": TEXT},
    ("PUT", "/snapshot/load"): {"snapshot_path!": TEXT, "mem_file_path": TEXT, "mem_backend": {"backend_type!": WORD, "backend_path!": TEXT}, "enable_diff_snapshots": FLAG,
                                "track_dirty_pages": FLAG, "resume_vm": FLAG, "network_overrides": [{"iface_id!": TEXT, "host_dev_name!": TEXT}], "clock_realtime": FLAG,
                                "vsock_override": {"uds_path!": TEXT}, "huge_pages": WORD},
    ("PATCH", "/vm"): {"state!": WORD},
    ("PUT", "/vsock"): {"guest_cid!": Count(3, U32), "uds_path!": TEXT, "vsock_id": TEXT},
}

# A value of each type that every field of it takes; words differ.
RIGHT = {TEXT: "x", FLAG: False, WORDS: [], TEXTS: {}}
FIRST_WORDS = {"action_type": "FlushMetrics", "cache_type": "Unsafe", "io_engine": "Sync", "register": "eax", "level": "Info", "cpu_template": "None", "huge_pages": "None", "version": "V1",
               "snapshot_type": "Full", "backend_type": "File", "state": "Paused"}
# A JSON text of each kind, and which types it is right for.
KINDS = {"17": (Count,), "1.5": (), '"x"': (TEXT,), "true": (FLAG,), '["x"]': (WORDS,), "[1]": (), "[[]]": (), "{}": (dict, TEXTS), '{"x": 1}': (), "null": (), "": (), "1e999": (),
         "1" + "0" * 400: (), '{"a":' * 3000 + "1" + "}" * 3000: (), "[" * 3000 + "]" * 3000: (), '"\\ud800"': (), '"x\\u0000y"': (), "tru": ()}


def text(value):
    """Of what is already JSON (bytes) or not; with duplicate keys where a dictionary is a list of pairs."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, tuple):
        return "{" + ", ".join(f"{json.dumps(key)}: {text(inner)}" for key, inner in value) + "}"
    return "[" + text(value[0]) + "]" if isinstance(value, list) and value else json.dumps(value)


def plain(name):
    return name.rstrip("!")


def right(name, kind):
    if isinstance(kind, Count):
        return max(kind.low, 1)
    if isinstance(kind, dict):
        return body(kind)
    if isinstance(kind, list):
        return [body(kind[0])]
    return FIRST_WORDS[plain(name)] if kind == WORD else RIGHT[kind]


def body(fields):
    """An object with all its fields, as pairs."""
    return tuple((plain(name), right(name, kind)) for name, kind in fields.items())


def wrong_values(name, kind):
    for value, fits in KINDS.items():
        own = Count if isinstance(kind, Count) else dict if isinstance(kind, dict) else kind
        required_inside = isinstance(kind, dict) and any(inner.endswith("!") for inner in kind)
        if isinstance(own, list) or own not in fits or (own is dict and required_inside):
            if value != "null" or name.endswith("!"):
                yield value.encode()
    if isinstance(kind, Count):
        yield from (str(number).encode() for number in (kind.low - 1, kind.high + 1, 1 << 64, -(1 << 64)))
        yield b'"17"'
    if kind == WORD:
        yield b'""'
        yield json.dumps(FIRST_WORDS[plain(name)] + "s").encode()
    inner = kind[0] if isinstance(kind, list) else kind
    if isinstance(inner, dict):
        yield from ([wrong] if isinstance(kind, list) else wrong for wrong in wrong_bodies(inner))


def wrong_bodies(fields):
    """Each is wrong in one place only."""
    good = body(fields)
    yield good + (("colour", 1),)
    for number, (name, kind) in enumerate(fields.items()):
        pair = good[number]
        without = good[:number] + good[number + 1:]
        if name.endswith("!"):
            yield without
        yield good + (pair,)
        yield without + ((plain(name).upper(), pair[1]),)
        yield from (good[:number] + ((pair[0], value),) + good[number + 1:] for value in wrong_values(name, kind))


def all_wrong():
    """(method, path, JSON text) of each."""
    for (method, path), fields in BODIES.items():
        yield from ((method, path, text(wrong)) for wrong in wrong_bodies(fields))
