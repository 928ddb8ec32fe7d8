#!/usr/bin/env python3
"""Debian's kernel booted through the HTTP API: disk, network and console on memory-mapped virtio, a processor template, pause, changes while it runs, metrics, a
snapshot taken and loaded by another process, Ctrl-Alt-Del. `api.py SCENARIO` is one test."""
import http.client
import http.server
import json
import os
import re
import socket
import subprocess
import tempfile
import threading
import time

import guest
from guest import BOOT_SECONDS, Guest, cached, need, wait_for_shell


class Client(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("localhost", timeout=60)
        self.path = path

    def connect(self):
        end = time.monotonic() + 30
        while True:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(60)
            try:
                self.sock.connect(self.path)
                return
            except OSError:  # not there yet
                assert time.monotonic() < end, "the API's socket does not answer"
                self.sock.close()
                time.sleep(0.01)

    def call(self, method, target, body=None, status=None):
        self.request(method, target, None if body is None else json.dumps(body))
        answer = self.getresponse()
        text = answer.read().decode()
        wanted = status or (200 if method == "GET" else 204)
        assert answer.status == wanted, f"{method} {target} {body}: {answer.status} {text}"
        return json.loads(text) if text else None


class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"from the host")

    def log_message(self, *arguments):
        pass


CLOCK_SOURCE = "cat /sys/devices/system/clocksource/clocksource0/current_clocksource"
AWAY_SECONDS = 5  # between a snapshot and its loading

# No ADX; and none of ERMS and FSRM, which go together (docs/api.md).
TEMPLATE = {"cpuid_modifiers": [{"leaf": "0x7", "subleaf": "0x0", "flags": 1, "modifiers": [{"register": "ebx", "bitmap": "0b" + "x" * 12 + "0" + "x" * 9 + "0" + "x" * 9},
                                                                                        {"register": "edx", "bitmap": "0b" + "x" * 27 + "0" + "x" * 4}]}]}


def serve(socket_path, *options, name):
    running = Guest(["--api-sock", socket_path, *options], name, command="serve")
    return running, Client(socket_path)


def configure(api, work, disk):
    api.call("PUT", "/logger", {"log_path": f"{work}/log", "level": "Debug"})
    api.call("PUT", "/metrics", {"metrics_path": f"{work}/metrics"})
    api.call("PUT", "/machine-config", {"vcpu_count": 2, "mem_size_mib": 256})
    api.call("PUT", "/boot-source", {"kernel_image_path": guest.kernel, "initrd_path": cached("demo-initrd.gz"),
                                     "boot_args": "console=ttyS0 quiet reboot=k panic=1"})
    api.call("PUT", "/drives/scratch", {"drive_id": "scratch", "path_on_host": disk, "is_root_device": False, "is_read_only": False,
                                        "cache_type": "Writeback", "io_engine": "Async"})
    api.call("PUT", "/network-interfaces/eth0", {"iface_id": "eth0", "host_dev_name": "user", "guest_mac": "06:00:ac:10:00:02"})
    api.call("PUT", "/cpu-config", TEMPLATE)
    api.call("PUT", "/actions", {"action_type": "InstanceStart"})


def use_devices(machine, port):
    """A disk and a network that work."""
    machine.run("mkdir -p /d && mount -t ext4 /dev/vda /d && cp /bin/busybox /d/copy && sync && cmp /bin/busybox /d/copy")
    assert "06:00:ac:10:00:02" in machine.run("ip link show eth0")
    assert "from the host" in machine.run(f"wget -q -O - http://10.0.2.2:{port}/")
    flags = machine.run("grep -m 1 flags /proc/cpuinfo").split()
    assert not {"adx", "erms", "fsrm"} & set(flags) and "smep" in flags, flags
    assert "LNRO0005" in machine.run("readlink -f /sys/block/vda")  # the ACPI name of memory-mapped virtio


def pause(machine, api):
    """While it is paused, what is typed waits."""
    api.call("PATCH", "/vm", {"state": "Paused"})
    assert api.call("GET", "/")["state"] == "Paused"
    machine.type("echo still-$((40+2))-here\n")
    assert not machine.read_some(0.3), "a paused guest said something"
    api.call("PATCH", "/vm", {"state": "Resumed"})
    machine.expect("still-42-here", 30)


def change_devices(machine, api, work, disk):
    """Another medium and back, limits, and refusals that change nothing."""
    machine.run("umount /d")
    other = f"{work}/other"
    subprocess.run(["truncate", "-s", "48M", other], check=True)
    api.call("PATCH", "/drives/scratch", {"drive_id": "scratch", "path_on_host": other})
    assert machine.run("cat /sys/block/vda/size") == str(48 << 11)
    machine.run("test $(dd if=/dev/vda bs=1M 2>/dev/null | tr -d '\\0' | wc -c) = 0")
    subprocess.run(["truncate", "-s", "64M", other], check=True)
    api.call("PATCH", "/drives/scratch", {"drive_id": "scratch", "path_on_host": other})  # the same one, grown
    assert machine.run("cat /sys/block/vda/size") == str(64 << 11)
    api.call("PATCH", "/drives/scratch", {"drive_id": "scratch", "path_on_host": f"{work}/missing"}, 400)
    api.call("PATCH", "/drives/nothing", {"drive_id": "nothing", "path_on_host": other}, 400)
    assert api.call("GET", "/vm/config")["drives"][0]["path_on_host"] == other
    api.call("PATCH", "/drives/scratch", {"drive_id": "scratch", "path_on_host": disk})
    machine.run("mount -t ext4 /dev/vda /d && cmp /bin/busybox /d/copy")

    api.call("PATCH", "/drives/scratch", {"drive_id": "scratch", "rate_limiter": {"bandwidth": {"size": 1 << 20, "refill_time": 500}}})
    before = time.monotonic()
    machine.run("dd if=/dev/vda of=/dev/null bs=256k count=16 iflag=direct 2>/dev/null", 60)
    seconds = time.monotonic() - before
    assert 1.4 < seconds < 3, f"4 MiB at 2 MiB/s, the first one at once, took {seconds:.2f} s"
    api.call("PATCH", "/drives/scratch", {"drive_id": "scratch", "rate_limiter": {"bandwidth": {"size": 0, "refill_time": 0}}})
    api.call("PATCH", "/network-interfaces/eth0", {"iface_id": "eth0", "tx_rate_limiter": {"ops": {"size": 1, "refill_time": 400}}})
    _, answers = machine.attempt("ping -c 3 -i 0.01 -W 5 10.0.2.2")
    assert float(answers.split("/")[-1].split()[0]) > 300, f"frames, one each 0.4 s, were faster: {answers}"
    api.call("PATCH", "/network-interfaces/eth0", {"iface_id": "eth0", "tx_rate_limiter": {"ops": {"size": 0, "refill_time": 0}}})
    api.call("PATCH", "/network-interfaces/nothing", {"iface_id": "nothing"}, 400)


def metrics(api, work):
    api.call("PUT", "/actions", {"action_type": "FlushMetrics"})
    line = json.loads(open(f"{work}/metrics").read().splitlines()[-1])
    assert line["vcpu"]["exit_mmio_write"] > 100 and line["uart"]["write_count"] > 100 and line["i8042"]["read_count"] > 0, line
    assert line["block_scratch"]["write_bytes"] > 1 << 20 and line["block_scratch"]["read_count"] > 0, line
    assert line["net_eth0"]["tx_packets_count"] > 0 and line["net_eth0"]["rx_bytes_count"] > 0, line
    assert line["latencies_us"]["pause_vm"] > 0 and line["put_api_requests"]["drive_count"] == 1, line


def boot():
    need(guest.doppel, guest.kernel, guest.cache)
    with tempfile.TemporaryDirectory() as work, http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        disk = f"{work}/disk"
        subprocess.run(["truncate", "-s", "32M", disk], check=True)
        subprocess.run(["/sbin/mke2fs", "-q", "-F", "-t", "ext4", disk], check=True)
        files = {"snapshot_path": f"{work}/state", "mem_file_path": f"{work}/memory"}
        later = {"snapshot_path": f"{work}/state-later", "mem_file_path": f"{work}/memory-later"}
        machine, api = serve(f"{work}/socket", "--id", "first", "--boot-timer", name="first")
        with machine:
            configure(api, work, disk)
            wait_for_shell(machine, BOOT_SECONDS)
            clock = machine.run(CLOCK_SOURCE)
            machine.run("devmem 0xC0000000 8 123")  # as an init would that knows of the boot timer
            assert re.search(r"Guest-boot-time = +\d+ us", open(f"{work}/log").read())
            use_devices(machine, web.server_port)
            pause(machine, api)
            change_devices(machine, api, work, disk)
            metrics(api, work)
            machine.run("echo remembered >/tmp/before; umount /d")
            api.call("PATCH", "/vm", {"state": "Paused"})
            api.call("PUT", "/snapshot/create", files)
            saved = time.time()
            configuration = api.call("GET", "/vm/config")
            api.call("PATCH", "/vm", {"state": "Resumed"})
            subprocess.run(["cp", "--sparse=always", files["mem_file_path"], later["mem_file_path"]], check=True)
            machine.run("echo later >/tmp/before")
            api.call("PATCH", "/vm", {"state": "Paused"})
            api.call("PUT", "/snapshot/create", {**later, "snapshot_type": "Diff"})
            api.call("PATCH", "/vm", {"state": "Resumed"})
            devices = machine.run("cat /proc/bus/input/devices")
            assert "keyboard" in devices, f"the guest has not found its keyboard: {devices}"
            api.call("PUT", "/actions", {"action_type": "SendCtrlAltDel"})
            machine.finish(0, 60)
        assert not os.path.exists(f"{work}/socket")
        while time.time() < saved + AWAY_SECONDS:
            time.sleep(0.1)
        machine, api = serve(f"{work}/socket", "--id", "second", name="second")
        with machine:
            api.call("PUT", "/snapshot/load", {**later, "resume_vm": True, "clock_realtime": True})
            assert machine.run("cat /tmp/before") == "later"
            now = time.time()
            assert int(machine.run("date +%s")) >= int(now) - 1, "the guest's clock has not caught up"
            assert machine.run(CLOCK_SOURCE) == clock and "stall" not in machine.run("dmesg")
            machine.run("sleep 0.1")  # by the timers it has
            api.call("PUT", "/actions", {"action_type": "SendCtrlAltDel"})
            machine.finish(0, 60)
        machine, api = serve(f"{work}/socket", "--id", "third", name="third")
        with machine:
            api.call("PUT", "/snapshot/load", {"snapshot_path": files["snapshot_path"], "mem_backend": {"backend_type": "File", "backend_path": files["mem_file_path"]}})
            assert api.call("GET", "/")["state"] == "Paused"
            loaded = api.call("GET", "/vm/config")
            for section in ("network-interfaces", "machine-config"):
                assert loaded[section] == configuration[section], f"{section}: {loaded[section]} instead of {configuration[section]}"
            api.call("PATCH", "/vm", {"state": "Resumed"})
            now = time.time()
            assert int(machine.run("date +%s")) < now - AWAY_SECONDS + 1, "the guest's clock has caught up by itself"
            assert machine.run("cat /tmp/before") == "remembered"
            machine.run("mount -t ext4 /dev/vda /d && cmp /bin/busybox /d/copy && umount /d")
            api.call("PUT", "/actions", {"action_type": "SendCtrlAltDel"})
            machine.finish(0, 60)


# What instances of these types have not, and their family, model and stepping.
AVX512 = {"avx512f", "avx512dq", "avx512ifma", "avx512cd", "avx512bw", "avx512vl", "avx512vbmi", "avx512_vbmi2", "avx512_vnni", "avx512_bitalg", "avx512_vpopcntdq", "avx512_bf16", "avx512_fp16"}
T2_LACKS = AVX512 | {"adx", "rdseed", "clflushopt", "clwb", "sha_ni", "umip", "gfni", "vaes", "vpclmulqdq", "rdpid", "movdiri", "fsrm", "serialize", "avx_vnni", "3dnowprefetch", "pdpe1gb", "hle", "rtm",
                     "mpx", "pku", "monitor", "ss"}
C3_LACKS = T2_LACKS | {"fma", "movbe", "bmi1", "bmi2", "avx2", "invpcid", "invpcid_single", "abm"}
TEMPLATES = {"T2": (T2_LACKS, (6, 63, 2)), "C3": (C3_LACKS, (6, 62, 4))}  # T2S and T2CL take away what T2 does
T2_HAS = {"avx2", "fma", "bmi1", "bmi2", "movbe", "aes", "xsave", "sse4_2", "popcnt", "smep", "erms", "rdrand", "f16c", "invpcid"}


def cpuinfo(machine):
    fields = dict(re.findall(r"^([a-z ]+?)\s*: (.*)$", machine.run("cat /proc/cpuinfo"), re.MULTILINE))
    return set(fields["flags"].split()), tuple(int(fields[name]) for name in ("cpu family", "model", "stepping"))


def boot_as(work, name):
    """The processor's flags and signature as the guest's kernel shows them, after some work with what it took for its own routines."""
    machine, api = serve(f"{work}/{name}", name=name)
    with machine:
        api.call("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 192, "cpu_template": name})
        api.call("PUT", "/boot-source", {"kernel_image_path": guest.kernel, "initrd_path": cached("demo-initrd.gz"), "boot_args": "console=ttyS0 quiet reboot=k panic=1"})
        api.call("PUT", "/actions", {"action_type": "InstanceStart"})
        wait_for_shell(machine, BOOT_SECONDS)
        shown = cpuinfo(machine)
        machine.run("cd /tmp && cp /bin/busybox a && gzip -c a | gunzip | cmp - a && test \"$(sha256sum <a)\" = \"$(sha256sum </bin/busybox)\" && cd /")
        assert not machine.run("dmesg | grep -E 'BUG:|Oops|Call Trace|WARNING' || true")
        print(f"{name}: {machine.shell_seconds:.1f} s to the shell, {machine.seconds():.1f} s altogether", flush=True)
        return shown


def accepted(work, name, status):
    machine, api = serve(f"{work}/{name}", name=name)
    with machine:
        api.call("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 192, "cpu_template": name}, status)


def templates():
    need(guest.doppel, guest.kernel, guest.cache)
    with open("/proc/cpuinfo") as info:
        text = info.read()
    intel, host = "GenuineIntel" in text, set(re.search(r"^flags\s*: (.*)$", text, re.MULTILINE)[1].split())
    with tempfile.TemporaryDirectory() as work:
        accepted(work, "V1N1", 400)
        accepted(work, "T2A", 400 if intel else 204)
        for name in "T2S", "T2CL":
            accepted(work, name, 204 if intel else 400)
        for name, (lacks, signature) in TEMPLATES.items() if intel else [("T2A", (AVX512 | {"invpcid"}, None))]:
            flags, shown = boot_as(work, name)
            assert not flags & lacks, f"{name} shows {flags & lacks}"
            assert signature in (None, shown), f"{name} shows itself as {shown}"
            missing = (T2_HAS & host) - lacks - flags
            assert not missing, f"{name} lacks {missing} besides"


if __name__ == "__main__":
    guest.main({"api": boot, "templates": templates})
