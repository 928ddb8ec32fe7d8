#!/usr/bin/env python3
"""Every device of the HTTP API at once under Debian's kernel, changed by each of its calls while the guest uses it, before a snapshot and after it was loaded by another process. The guest is commanded
through its vsock, its console is a file. `api_devices.py CHURN SCENARIO` is one test."""
import hashlib
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time

import guest
from api import Page, serve
from guest import archive, modules, need
from metadata import ADDRESS
from vsock import Vsock, receive

MIB = 1 << 20
churn_program = sys.argv.pop(1)
NO_LIMIT = {"size": 0, "refill_time": 0}
DATA = {"latest": {"meta-data": {"instance-id": "i-0123"}}}


def seconds_of(what):
    began = time.monotonic()
    what()
    return time.monotonic() - began


def until(what, true, seconds=60):
    """Waits until it is so; there is nothing to wait for but to look again."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.05)


class Machine:
    """A `doppel serve` with its API, and shell commands for its guest."""

    def __init__(self, work, name, *options):
        self.work, self.name = work, name
        self.process, self.api = serve(f"{work}/{name}.socket", *options, name=name)
        self.vsock = Vsock(f"{work}/vsock")
        self.port = 5000

    def __enter__(self):
        self.process.__enter__()
        return self

    def __exit__(self, kind, value, trace):
        self.process.__exit__(kind, value, trace)
        if kind:
            print(open(f"{self.work}/console", errors="replace").read()[-4000:])

    def get(self, target):
        return self.api.call("GET", target)

    def put(self, target, body=None, status=None):
        self.api.call("PUT", target, body, status)

    def patch(self, target, body=None, status=None):
        self.api.call("PATCH", target, body, status)

    def attempt(self, command, seconds=60, options=()):
        return self.vsock.exec("sh", "-c", command, seconds=seconds, options=options)

    def run(self, command, seconds=60, options=()):
        done = self.attempt(command, seconds, options)
        assert done.returncode == 0, f"in the guest, status {done.returncode}: {command}\n{done.stdout.decode()}{done.stderr.decode()}"
        return done.stdout.decode().strip()

    def timed(self, command):
        """Seconds of the guest's clock that a command takes."""
        began, ended = self.run(f"cut -d' ' -f1 /proc/uptime; {command} >/dev/null 2>&1; cut -d' ' -f1 /proc/uptime").split()
        return float(ended) - float(began)

    def resident(self):
        """What the process has of memory, in MiB."""
        text = open(f"/proc/{self.process.process.pid}/status").read()
        return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024

    def memory(self, field="MemTotal"):
        return int(re.search(field + r": +(\d+)", self.run("cat /proc/meminfo"))[1]) / 1024


def told(value):
    """A configuration without what is not given; the engine of I/O is accepted and no part of a snapshot."""
    if isinstance(value, dict):
        return {name: told(each) for name, each in value.items() if each is not None and name != "io_engine" and (name, each) != ("one_time_burst", 0)}
    return [told(each) for each in value] if isinstance(value, list) else value


def configure(vm, pci, files):
    vm.put("/machine-config", {"vcpu_count": 2, "mem_size_mib": 320})
    vm.put("/boot-source", {"kernel_image_path": guest.kernel, "initrd_path": files["initrd"], "boot_args": "console=ttyS0 reboot=k panic=1 memhp_default_state=online_movable"})
    vm.put("/balloon", {"amount_mib": 8, "deflate_on_oom": True, "stats_polling_interval_s": 1, "free_page_hinting": True, "free_page_reporting": pci})
    vm.put("/drives/scratch", {"drive_id": "scratch", "path_on_host": files["disk"], "is_root_device": False, "is_read_only": False, "io_engine": "Async"})
    vm.put("/drives/fixed", {"drive_id": "fixed", "path_on_host": files["other"], "is_root_device": False, "is_read_only": True})
    vm.put("/pmem/data", {"id": "data", "path_on_host": files["pmem"]})
    vm.put("/pmem/fixed", {"id": "fixed", "path_on_host": files["fixed"], "read_only": True})
    vm.put("/hotplug/memory", {"total_size_mib": 512, "block_size_mib": 4})
    vm.put("/network-interfaces/eth0", {"iface_id": "eth0", "host_dev_name": "user", "guest_mac": "06:00:ac:10:00:02", "mtu": 1400})
    vm.put("/mmds/config", {"version": "V2" if pci else "V1", "network_interfaces": ["eth0"]})
    vm.put("/mmds", DATA)
    vm.put("/vsock", {"guest_cid": 77, "uds_path": f"{vm.work}/vsock"})
    vm.put("/entropy", {"rate_limiter": {"bandwidth": {"size": 16384, "refill_time": 400}}})
    vm.put("/serial", {"serial_out_path": f"{vm.work}/console", "rate_limiter": {"size": 1 << 20, "refill_time": 1000}})
    vm.put("/actions", {"action_type": "InstanceStart"})
    vm.run("for module in $(cat /extra/order); do insmod /extra/$module || true; done 2>/dev/null; mount -t ext4 /dev/pmem0 /mnt; mkdir -p /d", options=["--wait", "60"])
    names = vm.run("cat /sys/bus/virtio/devices/*/modalias; readlink -f /sys/block/vda")
    assert ("LNRO0005" in names) == (not pci), names


def balloon(vm, pci):
    """Grows, shrinks, and is asked about its guest; what is free in the guest becomes the host's."""
    def sizes():
        answer = vm.get("/balloon/statistics")
        return answer["target_mib"], answer["actual_mib"]

    vm.patch("/hotplug/memory", {"requested_size_mib": 0})  # Linux does not hint pages of what can be unplugged
    until("nothing is plugged", lambda: vm.get("/hotplug/memory")["plugged_size_mib"] == 0)
    until("the balloon's first size", lambda: sizes() == (8, 8))
    with vm.vsock.start("/extra/churn 0 150 1") as program:
        peak = 0
        while program.poll() is None:
            peak = max(peak, vm.resident())
    if pci:
        until("free pages are reported", lambda: vm.resident() < peak - 90)
    vm.patch("/balloon", {"amount_mib": 321}, 400)
    high, free = vm.resident(), vm.memory("MemFree")
    vm.patch("/balloon", {"amount_mib": 200})
    assert vm.get("/balloon")["amount_mib"] == 200
    until("it grows", lambda: sizes() == (200, 200))
    low, left = vm.resident(), vm.memory("MemFree")
    print(f"balloon of 200 MiB: {high:.0f} -> {low:.0f} MiB resident, {free:.0f} -> {left:.0f} free in the guest", flush=True)
    assert free - left > 150 and (pci or high - low > 80)
    vm.patch("/balloon/statistics", {"stats_polling_interval_s": 0}, 400)
    vm.patch("/balloon/statistics", {"stats_polling_interval_s": 2})
    assert vm.get("/balloon")["stats_polling_interval_s"] == 2
    until("statistics of now", lambda: abs(vm.get("/balloon/statistics")["free_memory"] / MIB - left) < 20)
    missing = {"swap_in", "swap_out", "major_faults", "minor_faults", "free_memory", "total_memory", "available_memory", "disk_caches", "hugetlb_allocations",
               "hugetlb_failures"} - set(vm.get("/balloon/statistics"))
    assert not missing, missing
    vm.patch("/balloon", {"amount_mib": 8})
    until("it shrinks", lambda: sizes() == (8, 8))
    vm.run("/extra/churn 0 150 1")
    assert vm.get("/balloon/hinting/status")["guest_cmd"] in (0, None)
    high = vm.resident()
    vm.patch("/balloon/hinting/start", {"acknowledge_on_stop": False})
    status = vm.get("/balloon/hinting/status")
    until("all is hinted", lambda: vm.get("/balloon/hinting/status")["guest_cmd"] == 0)
    assert vm.get("/balloon/hinting/status")["host_cmd"] == status["host_cmd"] > 1, status
    vm.patch("/balloon/hinting/stop")
    assert vm.get("/balloon/hinting/status")["host_cmd"] == 1
    vm.patch("/balloon/hinting/start")
    until("all is hinted and acknowledged", lambda: vm.get("/balloon/hinting/status") == {"host_cmd": 1, "guest_cmd": 0})
    if not pci:
        print(f"hinting: {high:.0f} -> {vm.resident():.0f} MiB resident", flush=True)
        assert vm.resident() < high - 80
    vm.run("/extra/churn 0 150 2")


def hotplug(vm, pci):
    """Memory grows and shrinks while programs use it."""
    def plugged():
        return vm.get("/hotplug/memory")["plugged_size_mib"]

    status = vm.get("/hotplug/memory")
    assert status == {"total_size_mib": 512, "slot_size_mib": 128, "block_size_mib": 4, "plugged_size_mib": status["requested_size_mib"],
                      "requested_size_mib": status["requested_size_mib"]}, status
    small = vm.memory() - status["plugged_size_mib"]
    for wrong in (513, 516, 2):
        vm.patch("/hotplug/memory", {"requested_size_mib": wrong}, 400)
    vm.patch("/hotplug/memory", {"requested_size_mib": 384})
    assert vm.get("/hotplug/memory")["requested_size_mib"] == 384
    until("it is plugged", lambda: plugged() == 384)
    until("it is the guest's", lambda: abs(vm.memory() - small - 384) < 30)
    vm.run("/extra/churn 0 400 2")
    with vm.vsock.start("/extra/churn 2 60 2") as program:
        for size in (128, 256, 132):
            vm.patch("/hotplug/memory", {"requested_size_mib": size})
            until("it follows", lambda: plugged() == size)
        assert b"churn: ok" in program.communicate(timeout=60)[0] and program.returncode == 0
    until("it is no more the guest's", lambda: abs(vm.memory() - small - 132) < 30)


def pmem(vm, pci):
    """A file that is memory: what is in it, limits, and one that is only read."""
    vm.run("cp /extra/churn /mnt/program; /mnt/program 0 4 1; dd if=/dev/urandom of=/mnt/random bs=64k count=40 2>/dev/null; sync")
    digest = vm.run("sha256sum </mnt/random")
    vm.run("echo 3 >/proc/sys/vm/drop_caches")
    assert vm.run("sha256sum </mnt/random") == digest
    assert vm.run("dd if=/dev/pmem1 bs=16 count=1 2>/dev/null") == "0123456789abcdef"
    vm.attempt("dd if=/dev/zero of=/dev/pmem1 bs=4096 count=1 conv=fsync")
    vm.patch("/pmem/fixed", {"id": "data"}, 400)
    vm.patch("/pmem/nothing", {"id": "nothing"}, 400)
    flushes = "for i in 1 2 3 4; do dd if=/dev/zero of=/mnt/zero bs=512 count=1 conv=fsync; done"
    fast = vm.timed(flushes)
    vm.patch("/pmem/data", {"id": "data", "rate_limiter": {"ops": {"size": 1, "refill_time": 300}}})
    slow = vm.timed(flushes)
    vm.patch("/pmem/data", {"id": "data", "rate_limiter": {"ops": NO_LIMIT}})
    assert slow > fast + 0.8, f"4 flushes: {fast} s, one each 0.3 s: {slow} s"
    return digest


def drives(vm, files):
    """Another file, the same one grown, limits that come and go."""
    vm.run("mount -t ext4 /dev/vda /d; cp /bin/busybox /d/copy; umount /d")
    os.truncate(files["spare"], 24 * MIB)
    vm.patch("/drives/scratch", {"drive_id": "scratch", "path_on_host": files["spare"]})
    until("the new size", lambda: vm.run("cat /sys/block/vda/size") == str(24 << 11))
    vm.run("dd if=/dev/urandom of=/tmp/some bs=64k count=8 2>/dev/null; dd if=/tmp/some of=/dev/vda conv=fsync 2>/dev/null")
    assert open(files["spare"], "rb").read(512 << 10) == vm.attempt("cat /tmp/some").stdout
    os.truncate(files["spare"], 40 * MIB)
    vm.patch("/drives/scratch", {"drive_id": "scratch", "path_on_host": files["spare"]})
    until("the grown size", lambda: vm.run("cat /sys/block/vda/size") == str(40 << 11))
    for wrong in (files["missing"], vm.work, files["other"] + "/x", files["pmem"]):
        vm.patch("/drives/scratch", {"drive_id": "scratch", "path_on_host": wrong}, 400)
    vm.patch("/drives/fixed", {"drive_id": "scratch", "path_on_host": files["spare"]}, 400)
    assert vm.attempt("dd if=/dev/zero of=/dev/vdb bs=512 count=1 conv=fsync").returncode != 0
    assert vm.run("dd if=/dev/vdb bs=16 count=1 2>/dev/null") == "0123456789abcdef"
    vm.patch("/drives/scratch", {"drive_id": "scratch", "path_on_host": files["disk"], "rate_limiter": {"ops": {"size": 2, "refill_time": 400}}})
    assert vm.timed("dd if=/dev/vda of=/dev/null bs=4096 count=8 iflag=direct") > 0.9
    vm.patch("/drives/scratch", {"drive_id": "scratch", "rate_limiter": {"ops": NO_LIMIT, "bandwidth": {"size": 8 * MIB, "one_time_burst": MIB, "refill_time": 100}}})
    vm.run("mount -t ext4 /dev/vda /d; cmp /bin/busybox /d/copy; umount /d")


def network(vm, port):
    """Pages of the host through the card, limits in each direction, metadata."""
    address = "10.0.2.2"
    assert vm.run("cat /sys/class/net/eth0/mtu /sys/class/net/eth0/address").split() == ["1400", "06:00:ac:10:00:02"]
    fetch = f"wget -q -O - http://{address}:{port}/"
    assert "from the host" in vm.run(fetch)
    for field in ("rx_rate_limiter", "tx_rate_limiter"):
        vm.patch("/network-interfaces/eth0", {"iface_id": "eth0", field: {"ops": {"size": 1, "refill_time": 200}}})
        assert vm.timed(f"ping -c 4 -i 0.01 {address}") > 0.5, field
        vm.patch("/network-interfaces/eth0", {"iface_id": "eth0", field: {"ops": NO_LIMIT}})
    assert vm.timed(f"ping -c 4 -i 0.01 {address}") < 0.5
    assert "from the host" in vm.run(fetch)


def metadata(vm, pci, name):
    header = ""
    if pci:
        answer = vm.run(f"printf 'PUT /latest/api/token HTTP/1.0\\r\\nX-metadata-token-ttl-seconds: 60\\r\\n\\r\\n' | nc -w 20 {ADDRESS} 80")
        header = f"--header 'X-metadata-token: {answer.split()[-1]}'"
    vm.patch("/mmds", {"latest": {"meta-data": {"instance-id": name}}})
    assert vm.get("/mmds")["latest"]["meta-data"]["instance-id"] == name
    assert vm.run(f"wget -q -O - {header} http://{ADDRESS}/latest/meta-data/instance-id") == name


def entropy(vm):
    """16 KiB each 0.4 s."""
    assert vm.run("cat /sys/class/misc/hw_random/rng_current").startswith("virtio_rng")
    seconds = vm.timed("dd if=/dev/hwrng of=/tmp/entropy bs=1024 count=64")
    assert vm.run("wc -c </tmp/entropy") == "65536" and seconds > 1, f"64 KiB of entropy in {seconds} s"
    assert len(set(vm.attempt("cat /tmp/entropy").stdout)) == 256


def vsock(vm):
    """Both ways, large, one half closed before the other, and many at once."""
    data = os.urandom(4 * MIB)
    vm.port += 10
    program = vm.vsock.start(f"doppel-agent listen {vm.port} </dev/null | sha256sum")
    connection = vm.vsock.connect(vm.port)
    connection.sendall(data)
    connection.shutdown(socket.SHUT_WR)
    assert program.communicate(timeout=60)[0].split()[0].decode() == hashlib.sha256(data).hexdigest()
    connection.close()
    listener = vm.vsock.listen(vm.port + 1)
    programs = [vm.vsock.start(f"dd if=/extra/churn bs=64k 2>/dev/null | doppel-agent connect {vm.port + 1} | cat") for _ in range(12)]
    connections = [listener.accept()[0] for _ in programs]
    content = open(churn_program, "rb").read()
    for number, one in enumerate(connections):
        assert receive(one) == content  # to the end of the guest's half
        one.sendall(b"%d\n" % number)
        one.close()
    said = [one.communicate(timeout=60)[0] for one in programs]
    assert sorted(said, key=int) == [b"%d\n" % number for number in range(12)], said
    listener.close()
    assert vm.attempt(f"doppel-agent connect {vm.port + 1} </dev/null").returncode == 1


def serial(vm):
    vm.run("echo the-$((40+2))-line >/dev/ttyS0")
    until("the line is in the file", lambda: "the-42-line" in open(f"{vm.work}/console", errors="replace").read())


def everything(vm, pci, files, port):
    digest = None
    for step in (lambda: balloon(vm, pci), lambda: hotplug(vm, pci), lambda: drives(vm, files), lambda: network(vm, port), lambda: metadata(vm, pci, f"i-{vm.name}"),
                 lambda: entropy(vm), lambda: vsock(vm), lambda: serial(vm)):
        print(f"{vm.name} {step.__code__.co_names[0]}: {seconds_of(step):.1f} s", flush=True)
    digest = pmem(vm, pci)
    complaints = vm.run("dmesg | grep -E 'BUG:|Oops|Call Trace|WARNING|stall|I/O error' | grep -v 'dev vdb' || true")
    assert not complaints, complaints
    return digest


def make_files(work):
    files = {name: f"{work}/{name}" for name in ("disk", "other", "spare", "pmem", "fixed", "missing", "initrd")}
    for name, size in (("disk", 32), ("spare", 24), ("pmem", 32)):
        with open(files[name], "wb") as file:
            file.truncate(size * MIB)
    for name in ("disk", "pmem"):
        subprocess.run(["/sbin/mke2fs", "-q", "-F", "-b", "4096", "-t", "ext4", files[name]], check=True)
    for name in ("other", "fixed"):
        with open(files[name], "wb") as file:
            file.write(b"0123456789abcdef" * (2 * MIB // 16))
    kernel_modules = modules("virtio_balloon", "virtio_pmem", "nd_pmem", "virtio_mem", "ext4", "virtio_rng")
    entries = [(os.path.basename(path), open(path, "rb").read()) for path in [*kernel_modules, churn_program]]
    names = [name for name, _ in entries[:-1]]
    entries[-1] = ("churn", entries[-1][1])
    archive(files["initrd"], [*entries, ("order", "\n".join(names).encode())])
    return files


def devices(pci):
    need(guest.doppel, guest.kernel, guest.cache, churn_program)
    options = ["--enable-pci"] if pci else []
    with tempfile.TemporaryDirectory() as work, http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        files = make_files(work)
        saved = {"snapshot_path": f"{work}/state", "mem_file_path": f"{work}/memory"}
        with Machine(work, "first", *options) as vm:
            configure(vm, pci, files)
            digest = everything(vm, pci, files, web.server_port)
            vm.patch("/balloon", {"amount_mib": 40})
            until("the balloon", lambda: vm.get("/balloon/statistics")["actual_mib"] == 40)
            vm.run("echo remembered >/tmp/before")
            vm.patch("/vm", {"state": "Paused"})
            vm.put("/snapshot/create", saved)
            before = told(vm.get("/vm/config"))
            memory = vm.get("/hotplug/memory")
        with Machine(work, "second", *options) as vm:
            vm.put("/snapshot/load", {"snapshot_path": saved["snapshot_path"], "mem_backend": {"backend_type": "File", "backend_path": saved["mem_file_path"]},
                                      "vsock_override": {"uds_path": f"{work}/another"}})
            vm.vsock = Vsock(f"{work}/another")
            vm.put("/mmds", DATA)
            after = told(vm.get("/vm/config"))
            before["vsock"]["uds_path"] = f"{work}/another"
            for section in before.keys() | after.keys():
                if section != "boot-source":
                    assert before.get(section) == after.get(section), f"{section} after loading: {json.dumps(after.get(section))}, before: {json.dumps(before.get(section))}"
            assert vm.get("/balloon/statistics")["actual_mib"] == 40 and vm.get("/hotplug/memory") == memory
            vm.patch("/vm", {"state": "Resumed"})
            assert vm.run("cat /tmp/before", options=["--wait", "30"]) == "remembered"
            assert vm.run("sha256sum </mnt/random") == digest
            vm.patch("/balloon", {"amount_mib": 8})
            everything(vm, pci, files, web.server_port)
            vm.run("umount /mnt")
            vm.put("/actions", {"action_type": "SendCtrlAltDel"})
            vm.process.finish(0, 60)
        for name in ("disk", "pmem"):
            subprocess.run(["/sbin/e2fsck", "-fn", files[name]], check=True, capture_output=True)
        assert open(files["fixed"], "rb").read(16) == b"0123456789abcdef"


if __name__ == "__main__":
    guest.main({"api-devices": lambda: devices(False), "api-devices-pci": lambda: devices(True)})
