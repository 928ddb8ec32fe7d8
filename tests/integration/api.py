#!/usr/bin/env python3
"""api.py DOPPEL: the HTTP API of doppel serve, without a guest: every endpoint with right and wrong bodies before the start, one after it, clients that misbehave, and the
program's options. A refused call must have changed nothing, which GET /vm/config shows."""
import concurrent.futures, http.client, json, os, socket, struct, subprocess, sys, tempfile, time

import api_fields, small_guests

doppel = sys.argv[1]
work = tempfile.TemporaryDirectory(prefix="doppel-api-")
failures = 0


def path(name):
    return os.path.join(work.name, name)


def check(condition, what):
    global failures
    if not condition:
        failures += 1
        print("FAILED:", what)


class Connection(http.client.HTTPConnection):
    def __init__(self, socket_path):
        super().__init__("localhost", timeout=30)
        self.socket_path = socket_path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(self.socket_path)

    def call(self, method, target, body=None):
        """Status and the body as JSON, or as text."""
        text = body if body is None or isinstance(body, (str, bytes)) else json.dumps(body)
        self.request(method, target, text, {"Content-Type": "application/json"} if text is not None else {})
        answer = self.getresponse()
        data = answer.read()
        try:
            return answer.status, json.loads(data) if data else None
        except ValueError:
            return answer.status, data.decode(errors="replace")


class Server:
    def __init__(self, *options, name="api.sock", program=doppel):
        self.socket = path(name)
        self.process = subprocess.Popen([program, *(["serve"] if program == doppel else []), "--api-sock", self.socket, *options], stdin=subprocess.DEVNULL,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.connection = Connection(self.socket)
        for _ in range(3000):
            try:
                self.connection.connect()
                return
            except OSError:
                if self.process.poll() is not None:
                    raise SystemExit("doppel serve ended: " + self.process.stderr.read())
                time.sleep(0.01)
        raise SystemExit("doppel serve does not answer")

    def call(self, *arguments):
        return self.connection.call(*arguments)

    def stop(self):
        self.process.terminate()
        output = self.process.communicate(timeout=30)
        return self.process.returncode, *output


def file(name, size=0, text=None):
    with open(path(name), "wb") as out:
        out.write(text.encode() if text else b"\0" * size)
    return path(name)


kernel, disk = file("kernel", text="not a kernel"), file("disk", 4096)
bucket, many = {"size": 1, "refill_time": 1}, "x" * 3000
limiter = {"bandwidth": {"size": 1000, "one_time_burst": 5, "refill_time": 100}, "ops": bucket}
drive = {"drive_id": "d", "is_root_device": False, "is_read_only": True, "path_on_host": disk}
card = {"iface_id": "n", "host_dev_name": "user", "guest_mac": "06:00:ac:10:00:02"}
balloon = {"amount_mib": 10, "deflate_on_oom": True}
boot = {"kernel_image_path": kernel}
machine = {"vcpu_count": 2, "mem_size_mib": 256}
vsock = {"guest_cid": 3, "uds_path": path("vsock")}
pmem = {"id": "p", "path_on_host": disk}
mmds = {"network_interfaces": ["n"]}
before = "before starting the microVM"
serde = "deserializing the json body"

# Before the start: (method, path, body, status, what the answer contains). Bodies are objects or the text itself.
CASES = [
    ("GET", "/", None, 200, '"state": "Not started"'),
    ("GET", "/", {}, 400, "cannot have a body"),
    ("GET", "/version", None, 200, "firecracker_version"),
    ("GET", "/nothing", None, 404, "Invalid request method and/or path: GET /nothing."),
    ("DELETE", "/", None, 405, "Invalid request method"),
    ("PUT", "/", {}, 405, "Invalid request method"),
    ("PUT", "/vm", {"state": "Paused"}, 405, ""),
    ("PUT", "/actions", None, 400, "Empty PUT request."),
    ("PUT", "/actions", {}, 400, "missing field `action_type`"),
    ("PUT", "/actions", {"action_type": "Fly"}, 400, "unknown variant `Fly`, expected one of `FlushMetrics`, `InstanceStart`, `SendCtrlAltDel`"),
    ("PUT", "/actions", {"action_type": "FlushMetrics"}, 400, before),
    ("PUT", "/actions", {"action_type": "SendCtrlAltDel"}, 400, before),
    ("PUT", "/actions", {"action_type": "InstanceStart"}, 400, "without kernel configuration"),
    ("PATCH", "/vm", {"state": "Paused"}, 400, before),
    ("PATCH", "/vm", {"state": "Flying"}, 400, "unknown variant"),
    # JSON as such
    ("PUT", "/machine-config", "{", 400, serde),
    ("PUT", "/machine-config", "null", 400, serde),
    ("PUT", "/machine-config", "[]", 400, serde),
    ("PUT", "/machine-config", '"x"', 400, serde),
    ("PUT", "/machine-config", '{"vcpu_count": 1, "vcpu_count": 2, "mem_size_mib": 256}', 400, "duplicate"),
    ("PUT", "/machine-config", '{"vcpu_count": 1, "mem_size_mib": 99999999999999999999999}', 400, serde),
    ("PUT", "/machine-config", '{"vcpu_count": 1, "mem_size_mib": 1e3}', 400, "invalid type: floating point"),
    ("PUT", "/machine-config", "[" * 5000, 400, serde),
    ("PUT", "/machine-config", '{"vcpu_count":' + '{"a":' * 3000 + "1" + "}" * 3001, 400, serde),
    ("PUT", "/machine-config", b'{"vcpu_count": "\xff\xfe"}', 400, serde),
    ("PUT", "/machine-config", b'{"vcpu_count\x00": 1}', 400, serde),
    ("PUT", "/machine-config", '{"vcpu_count": 1, "mem_size_mib": 128} x', 400, serde),
    ("PUT", "/mmds", '{"a": "' + "x" * 60000 + '"}', 413, "limit of 51200 bytes"),
    # machine
    ("GET", "/machine-config", None, 200, '"vcpu_count": 1, "mem_size_mib": 128'),
    ("PUT", "/machine-config", {**machine, "vcpu_count": 0}, 400, "from 1 to 32"),
    ("PUT", "/machine-config", {**machine, "vcpu_count": 33}, 400, "from 1 to 32"),
    ("PUT", "/machine-config", {**machine, "vcpu_count": -1}, 400, "integer `-1`"),
    ("PUT", "/machine-config", {**machine, "vcpu_count": "2"}, 400, "invalid type: string"),
    ("PUT", "/machine-config", {**machine, "vcpu_count": True}, 400, "invalid type: boolean `true`"),
    ("PUT", "/machine-config", {**machine, "vcpu_count": None}, 400, "invalid type: null"),
    ("PUT", "/machine-config", {**machine, "mem_size_mib": 0}, 400, "mem_size_mib"),
    ("PUT", "/machine-config", {**machine, "mem_size_mib": 4294967295}, 400, "memory size (MiB) is invalid"),
    ("PUT", "/machine-config", {**machine, "colour": 1}, 400, "unknown field `colour`"),
    ("PUT", "/machine-config", {"vcpu_count": 2}, 400, "missing field `mem_size_mib`"),
    ("PUT", "/machine-config", {**machine, "vcpu_count": 3, "smt": True}, 400, "even number"),
    ("PUT", "/machine-config", {**machine, "huge_pages": "2M"}, 400, "huge_pages"),
    ("PUT", "/machine-config", {**machine, "huge_pages": "1G"}, 400, "unknown variant"),
    ("PUT", "/machine-config", {**machine, "cpu_template": "V1N1"}, 400, "V1N1"),
    ("PUT", "/machine-config", {**machine, "cpu_template": "T9"}, 400, "unknown variant"),
    ("PUT", "/machine-config", {**machine, "smt": True, "track_dirty_pages": True, "huge_pages": "Transparent", "cpu_template": None}, 204, ""),
    ("GET", "/machine-config", None, 200, '"smt": true, "track_dirty_pages": true, "cpu_template": "None", "huge_pages": "Transparent"'),
    ("PATCH", "/machine-config", {}, 400, "Empty PATCH request."),
    ("PATCH", "/machine-config", {"vcpu_count": None, "smt": None}, 400, "Empty PATCH request."),
    ("PATCH", "/machine-config", {"vcpu_count": 3}, 400, "even number"),
    ("PATCH", "/machine-config", {"mem_size_mib": 512}, 204, ""),
    ("GET", "/machine-config", None, 200, '"vcpu_count": 2, "mem_size_mib": 512, "smt": true'),
    ("PUT", "/machine-config", machine, 204, ""),
    ("GET", "/machine-config", None, 200, '"smt": false'),
    ("PUT", "/cpu-config", {"cpuid_modifiers": 1}, 400, "cpuid_modifiers"),
    ("PUT", "/cpu-config", {"kvm_capabilities": [1]}, 400, "kvm_capabilities"),
    ("PUT", "/cpu-config", {}, 204, ""),
    # boot source
    ("PUT", "/boot-source", {"kernel_image_path": path("none")}, 400, "kernel file cannot be opened"),
    ("PUT", "/boot-source", {"kernel_image_path": work.name}, 400, "not a regular file"),
    ("PUT", "/boot-source", {**boot, "initrd_path": path("none")}, 400, "initrd file cannot be opened"),
    ("PUT", "/boot-source", {**boot, "boot_args": many}, 400, "command line"),
    ("PUT", "/boot-source", {**boot, "boot_args": "a\nb"}, 400, "command line"),
    ("PUT", "/boot-source", {"boot_args": "a"}, 400, "missing field `kernel_image_path`"),
    ("PUT", "/boot-source", {**boot, "boot_args": 1}, 400, "invalid type: integer"),
    ("PUT", "/boot-source", {**boot, "boot_args": "console=ttyS0", "initrd_path": None}, 204, ""),
    # drives
    ("PUT", "/drives/d", {**drive, "drive_id": "e"}, 400, "[d] does not match the id from the body [e]"),
    ("PUT", "/drives/a-b", {**drive, "drive_id": "a-b"}, 400, "alphanumeric characters and underscores"),
    ("PUT", "/drives/" + "x" * 65, {**drive, "drive_id": "x" * 65}, 400, "64 characters"),
    ("PUT", "/drives/", drive, 404, ""),
    ("PUT", "/drives/d", {**drive, "path_on_host": path("none")}, 400, "backing file"),
    ("PUT", "/drives/d", {**drive, "path_on_host": work.name}, 400, "backing file"),
    ("PUT", "/drives/d", {**drive, "socket": "/x"}, 400, "vhost-user-block"),
    ("PUT", "/drives/d", {"drive_id": "d", "is_root_device": False, "path_on_host": disk}, 400, "missing field `is_read_only`"),
    ("PUT", "/drives/d", {"drive_id": "d", "is_root_device": False, "is_read_only": True}, 400, "missing field `path_on_host`"),
    ("PUT", "/drives/d", {"drive_id": "d", "path_on_host": disk, "is_read_only": True}, 400, "missing field `is_root_device`"),
    ("PUT", "/drives/d", {**drive, "cache_type": "Maybe"}, 400, "unknown variant `Maybe`, expected one of `Unsafe`, `Writeback`"),
    ("PUT", "/drives/d", {**drive, "io_engine": "Fast"}, 400, "unknown variant"),
    ("PUT", "/drives/d", {**drive, "rate_limiter": {"bandwidth": {"size": 1}}}, 400, "missing field `refill_time`"),
    ("PUT", "/drives/d", {**drive, "rate_limiter": {"bandwidth": {"size": -1, "refill_time": 1}}}, 400, "integer `-1`"),
    ("PUT", "/drives/d", {**drive, "rate_limiter": {"bits": {}}}, 400, "unknown field `bits`, expected one of `bandwidth`, `ops`"),
    ("PUT", "/drives/d", {**drive, "partuuid": "x y"}, 400, "partuuid"),
    ("PUT", "/drives/d", {**drive, "rate_limiter": limiter, "cache_type": "Writeback", "io_engine": "Async"}, 204, ""),
    ("PUT", "/drives/root", {**drive, "drive_id": "root", "is_root_device": True, "partuuid": "0eaa91a0-01"}, 204, ""),
    ("PUT", "/drives/other", {**drive, "drive_id": "other", "is_root_device": True}, 400, "root block device already exists"),
    ("PUT", "/drives/root", {**drive, "drive_id": "root", "is_root_device": True}, 204, ""),
    ("PATCH", "/drives/d", {"drive_id": "d", "path_on_host": disk}, 400, before),
    # network
    ("PUT", "/network-interfaces/n", {**card, "guest_mac": "06:00:ac:10:00"}, 400, "MAC"),
    ("PUT", "/network-interfaces/n", {**card, "host_dev_name": "averyverylongtapname"}, 400, "network device"),
    ("PUT", "/network-interfaces/n", {**card, "host_dev_name": "tap0,mtu=3"}, 400, "network device"),
    ("PUT", "/network-interfaces/n", {**card, "host_dev_name": ""}, 400, "network device"),
    ("PUT", "/network-interfaces/n", {**card, "mtu": 67}, 400, "from 68 to 65535"),
    ("PUT", "/network-interfaces/n", {"iface_id": "n"}, 400, "missing field `host_dev_name`"),
    ("PUT", "/network-interfaces/n", {**card, "rx_rate_limiter": limiter, "tx_rate_limiter": limiter, "mtu": 1400}, 204, ""),
    ("PUT", "/network-interfaces/m", {**card, "iface_id": "m"}, 400, "already in use"),
    ("PUT", "/network-interfaces/m", {"iface_id": "m", "host_dev_name": "none"}, 204, ""),
    ("PATCH", "/network-interfaces/n", {"iface_id": "n"}, 400, before),
    # balloon, vsock, entropy, serial, pmem, memory
    ("GET", "/balloon", None, 400, "No such device"),
    ("PATCH", "/balloon", {"amount_mib": 1}, 400, "No such device"),
    ("PUT", "/balloon", {**balloon, "amount_mib": -1}, 400, "amount_mib"),
    ("PUT", "/balloon", {**balloon, "amount_mib": 4294967296}, 400, "amount_mib"),
    ("PUT", "/balloon", {**balloon, "amount_mib": 257}, 400, "larger than the memory"),
    ("PUT", "/balloon", {"amount_mib": 1}, 400, "missing field `deflate_on_oom`"),
    ("PUT", "/balloon", {**balloon, "stats_polling_interval_s": 65536}, 400, "stats_polling_interval_s"),
    ("PUT", "/balloon", {**balloon, "stats_polling_interval_s": 1, "free_page_hinting": True, "free_page_reporting": True}, 204, ""),
    ("GET", "/balloon", None, 200, '"amount_mib": 10, "deflate_on_oom": true, "stats_polling_interval_s": 1, "free_page_hinting": true'),
    ("PATCH", "/balloon", {"amount_mib": 257}, 400, "larger than the memory"),
    ("PATCH", "/balloon", {"amount_mib": 11}, 204, ""),
    ("PATCH", "/machine-config", {"mem_size_mib": 10}, 400, "smaller than the previously set balloon"),
    ("PUT", "/machine-config", {**machine, "mem_size_mib": 10}, 400, "smaller than the previously set balloon"),
    ("PATCH", "/balloon/statistics", {"stats_polling_interval_s": 2}, 204, ""),
    ("GET", "/balloon", None, 200, '"amount_mib": 11, "deflate_on_oom": true, "stats_polling_interval_s": 2'),
    ("GET", "/balloon/hinting/status", None, 400, before),
    ("PATCH", "/balloon/hinting/start", None, 400, before),
    ("PATCH", "/balloon/hinting/start", {"acknowledge_on_stop": 1}, 400, "invalid type"),
    ("PATCH", "/balloon/hinting/stop", None, 400, before),
    ("PUT", "/vsock", {**vsock, "guest_cid": 2}, 400, "from 3"),
    ("PUT", "/vsock", {**vsock, "uds_path": ""}, 400, "uds_path"),
    ("PUT", "/vsock", {**vsock, "vsock_id": "v"}, 204, ""),
    ("PUT", "/entropy", {"rate_limiter": {"ops": 1}}, 400, "invalid type"),
    ("PUT", "/entropy", {"rate_limiter": limiter}, 204, ""),
    ("PUT", "/serial", {"serial_out_path": "/nowhere/x"}, 400, "serial output"),
    ("PUT", "/serial", {"rate_limiter": {"size": 1}}, 400, "missing field `refill_time`"),
    ("PUT", "/serial", {"serial_out_path": path("serial"), "rate_limiter": bucket}, 204, ""),
    ("PUT", "/pmem/p", {**pmem, "path_on_host": path("none")}, 400, "backing file"),
    ("PUT", "/pmem/p", {**pmem, "root_device": True}, 400, "root device already exists"),
    ("PUT", "/pmem/p", {**pmem, "read_only": True, "rate_limiter": limiter}, 204, ""),
    ("PATCH", "/pmem/p", {"id": "p"}, 400, before),
    ("GET", "/hotplug/memory", None, 400, "No such device"),
    ("PUT", "/hotplug/memory", {}, 400, "missing field `total_size_mib`"),
    ("PUT", "/hotplug/memory", {"total_size_mib": 100}, 400, "multiple of slot size"),
    ("PUT", "/hotplug/memory", {"total_size_mib": 1024, "block_size_mib": 3}, 400, "power of 2"),
    ("PUT", "/hotplug/memory", {"total_size_mib": 4294967168}, 400, "the most is 245760"),
    ("PUT", "/hotplug/memory", {"total_size_mib": 1024, "slot_size_mib": 64}, 400, "slot_size_mib"),
    ("PUT", "/hotplug/memory", {"total_size_mib": 1024}, 204, ""),
    ("GET", "/hotplug/memory", None, 200, '"total_size_mib": 1024, "slot_size_mib": 128, "block_size_mib": 2, "plugged_size_mib": 0'),
    ("PATCH", "/hotplug/memory", {"requested_size_mib": 128}, 400, before),
    # metadata
    ("GET", "/mmds", None, 200, "{}"),
    ("PATCH", "/mmds", {"a": 1}, 400, "not initialized"),
    ("PUT", "/mmds", "[1]", 400, "JSON object"),
    ("PUT", "/mmds", {"a": {"b": 1, "c": 2}}, 204, ""),
    ("PATCH", "/mmds", {"a": {"b": None, "d": [3]}}, 204, ""),
    ("GET", "/mmds", None, 200, '{"a": {"c": 2, "d": [3]}}'),
    ("PATCH", "/mmds", {"x": "x" * 51180}, 400, "limited to 51200 bytes"),
    ("GET", "/mmds", None, 200, '{"a": {"c": 2, "d": [3]}}'),
    ("PUT", "/mmds/config", {"network_interfaces": []}, 400, "is empty"),
    ("PUT", "/mmds/config", {"network_interfaces": ["q"]}, 400, "does not correspond to any existing network interface"),
    ("PUT", "/mmds/config", {"network_interfaces": [1]}, 400, "invalid type"),
    ("PUT", "/mmds/config", {**mmds, "version": "V3"}, 400, "unknown variant"),
    ("PUT", "/mmds/config", {**mmds, "ipv4_address": "169.254.0.1"}, 400, "not link local"),
    ("PUT", "/mmds/config", {**mmds, "ipv4_address": "10.0.0.1"}, 400, "not link local"),
    ("PUT", "/mmds/config", {**mmds, "version": "V2", "ipv4_address": "169.254.170.2", "imds_compat": True}, 204, ""),
    # logger, metrics
    ("PUT", "/logger", {"log_path": "/nowhere/x"}, 400, "log file"),
    ("PUT", "/logger", {"level": "Loud"}, 400, "unknown variant"),
    ("PUT", "/logger", {"log_path": path("log"), "level": "wArNing", "show_level": True, "show_log_origin": True}, 204, ""),
    ("PUT", "/metrics", {}, 400, "missing field `metrics_path`"),
    ("PUT", "/metrics", {"metrics_path": path("none") + "/x"}, 400, "metrics file"),
    ("PUT", "/metrics", {"metrics_path": path("metrics"), "properties": {"a": 1}}, 400, "invalid type"),
    ("PUT", "/metrics", {"metrics_path": path("metrics"), "emit_id": True, "properties": {"zone": "a"}}, 204, ""),
    ("PUT", "/metrics", {"metrics_path": path("metrics")}, 400, "already initialized"),
    # snapshots
    ("PUT", "/snapshot/create", {"snapshot_path": "a", "mem_file_path": "b"}, 400, before),
    ("PUT", "/snapshot/load", {"snapshot_path": "a", "mem_file_path": "b"}, 400, "not allowed after configuring"),
    # a kernel that is none: nothing has started
    ("PUT", "/actions", {"action_type": "InstanceStart"}, 400, kernel),
    ("GET", "/", None, 200, "Not started"),
]


def table():
    server = Server()
    configuration = server.call("GET", "/vm/config")
    for method, target, body, status, contains in CASES:
        what = f"{method} {target} {str(body)[:100]}"
        got, answer = server.call(method, target, body)
        text = json.dumps(answer) if not isinstance(answer, str) else answer
        message = answer.get("fault_message", "") if isinstance(answer, dict) else ""
        check(got == status and contains in (message or text), f"{what}: {got} {text[:300]}, wanted {status} with {contains!r}")
        check(got < 400 or (message and "\n" not in message), f"{what}: no one-line fault_message in {text[:200]}")
        now = server.call("GET", "/vm/config")
        check(got < 400 or now == configuration, f"{what}: a refused call has changed the configuration")
        configuration = now
    check([d["drive_id"] for d in configuration[1]["drives"]] == ["root", "d"], "the root drive is not first")
    with open(path("config.json"), "w") as out:
        json.dump(configuration[1], out)
    status, _, errors = server.stop()
    check(status == 0, f"exit status {status}")
    check(not errors.strip() or "API" in errors, f"stderr: {errors[-300:]}")
    line = json.loads(open(path("metrics")).read().splitlines()[-1])
    check(line["id"] == "anonymous-instance" and line["properties"] == {"zone": "a"}, "metrics: id and properties")
    check(line["put_api_requests"]["drive_count"] > line["put_api_requests"]["drive_fails"] > 10, "metrics: drives")
    log = open(path("log")).read()
    check("WARN:src/control/api.c:" in log and "[anonymous-instance:" in log, f"log: {log[:200]}")


def fields():
    """Whatever is wrong with a field is refused for that, before the start and after it, and changes nothing."""
    server = Server("--log-path", file("fields.log"))
    check(server.call("PUT", "/boot-source", {"kernel_image_path": small_guests.write(path("halt"), small_guests.HALT)})[0] == 204, "a guest that halts")
    check(server.call("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 32})[0] == 204, "its memory")
    for started in False, True:
        if started:
            check(server.call("PUT", "/actions", {"action_type": "InstanceStart"})[0] == 204, "its start")
        before = [server.call("GET", target) for target in ("/", "/vm/config", "/mmds")]
        tried = 0
        for method, target, body in api_fields.all_wrong():
            status, answer = server.call(method, target, body)
            message = answer.get("fault_message", "") if isinstance(answer, dict) else ""
            what = f"{method} {target} {body[:200]}"
            check(status == 400 and serde in message and "\n" not in message and list(answer) == ["fault_message"], f"{what}: {status} {answer}")
            tried += 1
            if tried % 50 == 0 or status != 400:
                check([server.call("GET", target) for target in ("/", "/vm/config", "/mmds")] == before, f"{what} or one of 50 before it has changed something")
        check(tried > 2000, f"only {tried} were tried")
        check([server.call("GET", target) for target in ("/", "/vm/config", "/mmds")] == before, "something has changed")
    server.stop()


def snapshots_refused():
    server = Server("--id", "vm-1")
    check(server.call("GET", "/")[1]["id"] == "vm-1", "the id")
    for body, contains in [({"snapshot_path": "a"}, "either"), ({"snapshot_path": "a", "mem_file_path": "b", "mem_backend": {"backend_type": "File", "backend_path": "c"}}, "either"),
                           ({"snapshot_path": "a", "mem_backend": {"backend_type": "Uffd", "backend_path": "c"}}, "Uffd"),
                           ({"snapshot_path": path("none"), "mem_file_path": path("none")}, path("none")),
                           ({"snapshot_path": disk, "mem_file_path": disk}, disk)]:
        status, answer = server.call("PUT", "/snapshot/load", body)
        check(status == 400 and contains in answer["fault_message"], f"snapshot/load {body}: {answer}")
    check(server.call("GET", "/")[1]["state"] == "Not started", "a snapshot that cannot be loaded has started something")
    server.stop()


def starts_refused():
    """Persistent memory that the host has no room for takes none of it; names are of their kind of device."""
    server, huge = Server(), path("huge")
    room = os.statvfs(path(""))
    with open(huge, "wb") as out:
        out.truncate((room.f_blocks * room.f_frsize >> 21) + 1 << 21)
    server.call("PUT", "/boot-source", {"kernel_image_path": small_guests.write(path("halt"), small_guests.HALT)})
    check(server.call("PUT", "/pmem/same", {"id": "same", "path_on_host": huge})[0] == 204, "huge persistent memory")
    status, answer = server.call("PUT", "/actions", {"action_type": "InstanceStart"})
    check(status == 400 and "has no room" in answer["fault_message"], f"InstanceStart: {answer}")
    check(os.stat(huge).st_blocks == 0, "a file of persistent memory took room of a start that was refused")
    os.unlink(huge)
    server.call("PUT", "/pmem/same", {"id": "same", "path_on_host": file("small", 1 << 21)})
    server.call("PUT", "/drives/same", {**drive, "drive_id": "same"})
    server.call("PUT", "/network-interfaces/same", {"iface_id": "same", "host_dev_name": "user"})
    check(server.call("PUT", "/actions", {"action_type": "InstanceStart"})[0] == 204, "its start")
    for section, id_field, field in ("pmem", "id", "rate_limiter"), ("drives", "drive_id", "rate_limiter"), ("network-interfaces", "iface_id", "rx_rate_limiter"):
        for size in 5, 0:
            status, answer = server.call("PATCH", f"/{section}/same", {id_field: "same", field: {"ops": {"size": size, "refill_time": 1}}})
            shown = server.call("GET", "/vm/config")[1][section][0][field]
            check(status == 204 and (shown["ops"]["size"] == size if size else shown is None), f"{section}/same: {answer}, then {shown}")
    server.stop()


def ends():
    """The last line of metrics is written however soon the end comes."""
    for number in range(20):
        server, target = Server(), path(f"metrics-{number}")
        check(server.call("PUT", "/metrics", {"metrics_path": target})[0] == 204, "metrics")
        server.stop()
        check(len(open(target).read().splitlines()) == 1, "no line of metrics at the end")


def processors():
    """Of a template and a custom processor the later one counts, however it comes."""
    server = Server()
    for name in ("T2", "T2A"):  # one of them is for this host
        for method in ("PUT", "PATCH"):
            check(server.call("PUT", "/cpu-config", {"kvm_capabilities": ["!56"]})[0] == 204, "a custom processor")
            status, _ = server.call(method, "/machine-config", {**machine, "cpu_template": name})
            shown = server.call("GET", "/vm/config")[1]
            check((shown["cpu-config"] is None) == (status == 204), f"{method} with {name}: {status}, but {shown['cpu-config']}")
    check(server.call("PUT", "/cpu-config", {})[0] == 204 and server.call("GET", "/machine-config")[1]["cpu_template"] == "None", "a template after a custom processor")
    server.stop()


def clients():
    """Many at once, some that vanish in the middle of a request."""
    server = Server()

    def one(number):
        connection = Connection(server.socket)
        for i in range(50):
            status, _ = connection.call("PUT", "/machine-config", {"vcpu_count": 1 + number % 8, "mem_size_mib": 128 + i})
            check(status == 204, "a PUT beside others")
            got = connection.call("GET", "/machine-config")[1]
            check(got["mem_size_mib"] in range(128, 178) and got["smt"] is False, f"a mixture: {got}")

    def rude(number):
        for i in range(20):
            gone = socket.socket(socket.AF_UNIX)
            gone.connect(server.socket)
            gone.send(b"PUT /machine-config HTTP/1.1\r\nContent-Length: 100\r\n\r\n{\"vcpu_count\": 5,"[: 20 + 5 * i])
            gone.close()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(one if n % 4 else rude, n) for n in range(8)]:
            future.result()
    check(server.call("GET", "/")[0] == 200, "the server after all that")

    def dial():
        """Waits for room, which Python's own timeouts do not."""
        client = socket.socket(socket.AF_UNIX)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 30, 0))
        client.connect(server.socket)
        return client

    def half_a_request():
        slow = dial()
        try:
            slow.send(b"PUT /machine-config HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
        except (BrokenPipeError, ConnectionResetError):
            pass  # had to go already
        return slow

    try:  # more at once than there are places for
        kept = [half_a_request() for _ in range(300)]
        last = Connection(server.socket)
        last.sock = dial()
        check(last.call("GET", "/")[0] == 200, "a client after 300 that never finish")
        del kept
    except OSError as error:
        check(False, f"clients that never finish keep others out: {error}")
    check(server.stop()[0] == 0, "exit status")
    check(not os.path.exists(server.socket), "the socket is left behind")


def options():
    def run(*arguments, program=doppel):
        result = subprocess.run([program, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
        return result.returncode, result.stdout, result.stderr

    link = path("firecracker")
    os.symlink(os.path.abspath(doppel), link)
    check(run("--version", program=link)[1].startswith("Firecracker v1."), "--version under the compatible name")
    check("--api-sock" in run("--help", program=link)[1], "--help under the compatible name")
    for arguments, status, contains in [
            ([], 153, "--api-sock"), (["--no-api"], 153, "--config-file"), (["--api-sock"], 153, "needs a value"), (["--colour"], 153, "--colour"),
            (["--no-api=1"], 153, "no value"), (["--api-sock", path("s"), "--id", "a b"], 153, "--id"), (["--api-sock", path("s"), "--level", "Loud"], 153, "variant"),
            (["--api-sock", path("s"), "--http-api-max-payload-size", "x"], 153, "number"), (["--api-sock", "/nowhere/s"], 1, "/nowhere/s"),
            (["--api-sock", disk], 1, "used already"), (["--no-api", "--config-file", path("none")], 152, "none"),
            (["--no-api", "--config-file", file("bad.json", text='{"drives": [{"drive_id": "x"}]}')], 152, "missing field"),
            (["--no-api", "--config-file", file("key.json", text='{"colour": 1}')], 152, "unknown field `colour`"),
            (["--no-api", "--config-file", file("empty.json", text="{}")], 152, "kernel"),
            (["--no-api", "--config-file", path("config.json")], 152, kernel)]:  # what GET /vm/config gave, so all but the kernel is right
        got, _, errors = run("serve", *arguments)
        check(got == status and contains in errors, f"serve {arguments}: {got} {errors!r}")
    server = Server("--http-api-max-payload-size", "100", "--metadata", file("data.json", text='{"a": 1}'), program=link)
    check(server.call("GET", "/mmds") == (200, {"a": 1}), "--metadata")
    check(server.call("PUT", "/mmds", {"a": "x" * 100})[0] == 413, "--http-api-max-payload-size")
    server.stop()


for scenario in (table, fields, snapshots_refused, starts_refused, ends, processors, clients, options):
    scenario()
print("failures:", failures)
sys.exit(1 if failures else 0)
