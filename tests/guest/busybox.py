#!/usr/bin/env python3
"""Debian's kernel with busybox: devices, network, disks, processors, memory sizes. `busybox.py SCENARIO` is one test."""
import hashlib
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
from guest import Guest, busybox, busybox_arguments, doppel, wait_for_shell

MKE2FS = ["/sbin/mke2fs", "-q", "-F", "-t", "ext4"]


def host(*command):
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert done.returncode == 0, f"{' '.join(command)}: status {done.returncode}\n{(done.stdout + done.stderr).decode(errors='replace')}"
    return done.stdout


def make_disk(path, size="64M"):
    host("truncate", "-s", size, path)
    host(*MKE2FS, path)


def check_disk(path, name, digest):
    """The file system is clean and holds that file."""
    host("/sbin/e2fsck", "-fn", path)
    content = host("/sbin/debugfs", "-R", f"cat /{name}", path)
    assert hashlib.sha256(content).hexdigest() == digest, f"{name} on {path} differs from what the guest wrote"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class WebServer:
    """Serves one body to everybody on the host's loopback."""

    def __init__(self, body):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()


def ask(port, request, seconds=30):
    """Sends to a forwarded port until the guest's server answers."""
    end = time.monotonic() + seconds
    answer = b""
    while time.monotonic() < end:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall(request)
                answer = b""
                while data := connection.recv(65536):
                    answer += data
                if answer:
                    return answer
        except OSError:
            pass
        time.sleep(0.3)
    return answer


def network(vm, port):
    assert "10.0.2.15/24" in vm.run("ip addr show dev eth0")
    vm.run("ping -c 2 -W 5 10.0.2.2")
    body = os.urandom(1 << 20)
    with WebServer(body) as server:
        digest = vm.run(f"wget -q -O - http://10.0.2.2:{server.port}/ | sha256sum", 60).split()[0]
    assert digest == hashlib.sha256(body).hexdigest(), "the file fetched differs"
    vm.run("mkdir -p /www && echo from the guest >/www/index.html && httpd -p 80 -h /www")
    answer = ask(port, b"GET / HTTP/1.0\r\n\r\n")
    assert b"from the guest" in answer, f"through the forward came {answer!r}"


def disk(vm):
    """Leaves a file "data" behind; returns its digest."""
    vm.run("mount -t ext4 /dev/vda /mnt")
    digest = vm.run("dd if=/dev/urandom of=/mnt/data bs=64k count=64 2>/dev/null && sha256sum </mnt/data", 60).split()[0]
    vm.run("sync && umount /mnt && mount -t ext4 /dev/vda /mnt", 60)
    vm.run("echo 3 >/proc/sys/vm/drop_caches")
    again = vm.run("sha256sum </mnt/data", 60).split()[0]
    assert again == digest, "the file read back differs"
    vm.run("umount /mnt", 60)
    assert vm.run("cat /sys/block/vda/serial") == "testdisk"
    return digest


def shell_of(cpus):
    with tempfile.TemporaryDirectory() as folder:
        image = f"{folder}/disk.img"
        make_disk(image)
        port = free_port()
        with busybox("--disk", f"{image},serial=testdisk", "--net", f"user,forward=tcp:{port}:80", "--cpus", cpus) as vm:
            print(f"shell after {vm.shell_seconds:.1f} s")
            assert vm.run("nproc") == str(cpus)
            network(vm, port)
            digest = disk(vm)
            vm.run("test $(dd if=/dev/hwrng bs=512 count=2 2>/dev/null | sort -u | wc -c) -gt 512")
            assert "virtio" in vm.run("cat /sys/class/misc/hw_random/rng_current")
            if cpus > 1:
                parallel(vm, cpus)
            # Time passes as it does outside.
            before = time.monotonic()
            vm.run("sleep 3")
            assert 2.9 < time.monotonic() - before < 8, f"sleep 3 took {time.monotonic() - before:.1f} s"
            complaints = vm.run("dmesg | grep -E 'BUG:|Oops|Call Trace|detected stall|soft lockup|unstable|ACPI Error|ACPI BIOS Error|trap ' || true")
            assert not complaints, f"the kernel complains:\n{complaints}"
            vm.type("poweroff\n")
            vm.finish(0)
        check_disk(image, "data", digest)


def mmio():
    """Everything on memory-mapped registers, in a machine without PCI; also after a reset. The disk is an overlay."""
    with tempfile.TemporaryDirectory() as folder:
        images = [f"{folder}/disk{n}.img" for n in range(2)]
        for image in images:
            make_disk(image)
        before = open(images[1], "rb").read()
        overlay = f"{folder}/disk.qcow2"
        host("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "disk1.img", overlay)
        port = free_port()
        with busybox("--transport", "mmio", "--disk", f"{images[0]},serial=other", "--disk", f"{overlay},serial=testdisk,root",
                     "--net", f"user,forward=tcp:{port}:80") as vm:
            vm.run("test ! -d /proc/bus/pci/00 && grep -q root=/dev/vda /proc/cmdline")
            assert vm.run("ls -d /sys/devices/platform/LNRO0005:0?/virtio* | wc -l") == "4"
            vm.type("reboot\n")
            wait_for_shell(vm)
            network(vm, port)
            digest = disk(vm)
            assert vm.run("cat /sys/block/vdb/serial") == "other"
            vm.run("test $(dd if=/dev/hwrng bs=512 count=2 2>/dev/null | sort -u | wc -c) -gt 512")
            complaints = vm.run("dmesg | grep -E 'BUG:|Oops|Call Trace|nobody cared|ACPI Error|ACPI BIOS Error' || true")
            assert not complaints, f"the kernel complains:\n{complaints}"
            vm.type("poweroff\n")
            vm.finish(0)
        host("qemu-img", "check", "-q", overlay)
        host("qemu-img", "convert", "-f", "qcow2", "-O", "raw", overlay, f"{folder}/after.img")
        check_disk(f"{folder}/after.img", "data", digest)
        assert open(images[1], "rb").read() == before, "the backing file was written to"


def limits():
    """Disks are as fast as allowed, not faster, and hardly slower."""
    with tempfile.TemporaryDirectory() as folder:
        images = [f"{folder}/disk{n}.img" for n in range(2)]
        for image in images:
            host("truncate", "-s", "16M", image)
        with busybox("--disk", f"{images[0]},bps=4M", "--disk", f"{images[1]},iops=200", "--net", "none") as vm:
            for device, block, count, wanted in ("vda", 65536, 160, 2.5), ("vdb", 4096, 500, 2.5):
                # The first empties the bucket.
                vm.run(f"dd if=/dev/{device} of=/dev/null bs={block} count={count // 4} iflag=direct 2>/dev/null", 60)
                before = time.monotonic()
                vm.run(f"dd if=/dev/{device} of=/dev/null bs={block} count={count} iflag=direct 2>/dev/null", 60)
                seconds = time.monotonic() - before
                print(f"{device}: {seconds:.2f} s, {wanted} s wanted")
                assert 0.93 * wanted < seconds < 1.6 * wanted, f"{device} took {seconds:.2f} s, not {wanted} s"
            vm.type("poweroff\n")
            vm.finish(0)


def user_ticks(vm):
    return [int(line.split()[1]) for line in vm.run("grep -E '^cpu[0-9]' /proc/stat").split("\n")]


def parallel(vm, cpus):
    """As many busy programs as processors: each processor has to work, at the same time."""
    before = user_ticks(vm)
    work = "dd if=/dev/zero bs=1M count=3 2>/dev/null | sha256sum"
    jobs = "".join(f"({work} >/tmp/sum{n}) & " for n in range(cpus))
    vm.run(f"{jobs}wait", 120)
    sums = set(vm.run("cat /tmp/sum*").split("\n"))
    assert sums == {hashlib.sha256(bytes(3 << 20)).hexdigest() + "  -"}, f"sums: {sums}"
    used = [after - earlier for after, earlier in zip(user_ticks(vm), before)]
    print(f"user ticks on each processor: {used}")
    assert len(used) == cpus and min(used) * 4 > max(used), f"user ticks on each processor: {used}"


def network_inside():
    """network.sh runs in the guest and checks from there."""
    here = os.path.dirname(os.path.abspath(__file__))
    with tempfile.TemporaryDirectory() as folder, WebServer(body := os.urandom(3 << 20)) as server:
        initrd = f"{folder}/initrd.gz"
        host(f"{here}/../../tools/make-initramfs", initrd, f"{here}/network.sh")
        port = free_port()
        arguments = busybox_arguments("--net", f"user,forward=tcp:{port}:7777")
        arguments[arguments.index("--initrd") + 1] = initrd
        arguments[arguments.index("console=ttyS0 quiet")] += (
            f" doppel.url=http://10.0.2.2:{server.port}/file doppel.md5={hashlib.md5(body).hexdigest()} doppel.serve=7777")
        with Guest(arguments) as vm:
            vm.expect("ok fetch", 180)
            assert ask(port, b"", 60) == b"served\n", "nothing came through the forward"
            vm.expect("network: passed", 60)
            assert b"not ok" not in vm.transcript
            vm.finish(0)


def readonly():
    with tempfile.TemporaryDirectory() as folder:
        image = f"{folder}/disk.img"
        make_disk(image)
        before = hashlib.sha256(open(image, "rb").read()).digest()
        with busybox("--disk", f"{image},readonly") as vm:
            assert vm.run("cat /sys/block/vda/ro") == "1"
            vm.run("mount -t ext4 -o ro /dev/vda /mnt && ls /mnt/lost+found")
            status, _ = vm.attempt("umount /mnt; dd if=/dev/zero of=/dev/vda bs=4k count=1 conv=fsync")
            assert status != 0, "a write to a read-only disk succeeded"
            vm.type("poweroff\n")
            vm.finish(0)
        assert hashlib.sha256(open(image, "rb").read()).digest() == before, "the image changed"


def locked():
    """One disk serves one machine at a time; readers share."""
    with tempfile.TemporaryDirectory() as folder:
        image = f"{folder}/disk.img"
        make_disk(image, "16M")
        with Guest(busybox_arguments("--disk", image)) as first:
            first.expect("Linux version|ACPI|Debian|random", guest.BOOT_SECONDS)
            with Guest(busybox_arguments("--disk", image), "second") as second:
                second.finish(2)
                assert image in second.stderr(), "the refusal does not name the disk"
            first.type("\1x")
            first.finish(5)
        with Guest(busybox_arguments("--disk", image)) as third:
            third.type("\1x")
            third.finish(5)


def private_mounts():
    """How to start a program with mounts of its own, as far as this user may."""
    for prefix in (["unshare", "-m"], ["unshare", "-Urm"]):
        if subprocess.run([*prefix, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, timeout=20).returncode == 0:
            return prefix
    print("skipped: may not mount")
    raise SystemExit(guest.SKIP)


def full_host():
    """The file system under the image fills up: errors for the guest, nothing worse, and what was synced stays."""
    prefix = private_mounts()
    with tempfile.TemporaryDirectory() as folder:
        make_disk(f"{folder}/fresh.img")
        os.mkdir(f"{folder}/small")
        # The image lives in the mounts of this shell only, so the shell brings it out at the end.
        script = (f"mount -t tmpfs -o size=24m none {folder}/small && cp --sparse=always {folder}/fresh.img {folder}/small/disk.img && "
                  f"\"$@\"; status=$?; cp --sparse=always {folder}/small/disk.img {folder}/after.img; exit $status")
        wrapper = [*prefix, "sh", "-c", script, "sh"]
        with Guest(busybox_arguments("--disk", f"{folder}/small/disk.img,werror=report"), wrapper=wrapper) as vm:
            wait_for_shell(vm)
            vm.run("mount -t ext4 /dev/vda /mnt")
            digest = vm.run("dd if=/dev/urandom of=/mnt/data bs=64k count=32 2>/dev/null && sync && sha256sum </mnt/data", 60).split()[0]
            vm.attempt("dd if=/dev/urandom of=/mnt/more bs=64k count=640; sync", 120)
            assert re.search("I/O error|error -5|Buffer I/O", vm.run("dmesg")), "the guest saw no I/O error"
            vm.run("echo 3 >/proc/sys/vm/drop_caches")
            assert vm.run("sha256sum </mnt/data", 60).split()[0] == digest, "synced data changed"
            vm.run("ping -c 1 10.0.2.2")
            vm.type("\npoweroff\n")
            vm.finish(0, 90)
            assert re.search("[Nn]o space", vm.stderr()), "Doppel does not say why writing failed"
        # As after a crash: what was synced may still be in the journal.
        repaired = subprocess.run(["/sbin/e2fsck", "-fy", f"{folder}/after.img"], capture_output=True, timeout=60)
        assert repaired.returncode in (0, 1), repaired.stdout.decode(errors="replace")
        content = host("/sbin/debugfs", "-R", "cat /data", f"{folder}/after.img")
        assert hashlib.sha256(content).hexdigest() == digest, "synced data is not in the image"


def full_host_waits(format):
    """The file system under the image fills up: the machine is paused, nobody can take a snapshot of it, and with more room it goes on as if nothing had been."""
    prefix = private_mounts()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_RUNTIME_DIR"], os.environ["XDG_DATA_HOME"] = folder, f"{folder}/data"
        os.mkdir(f"{folder}/small")
        os.mkfifo(f"{folder}/grow")
        os.mkfifo(f"{folder}/grown")
        image = f"{folder}/small/disk.{format}"
        make = f"truncate -s 64M {image}" if format == "raw" else f"{doppel} disk create {image} 64M"
        script = (f"mount -t tmpfs -o size=8m none {folder}/small && {make} && "
                  f"{{ (read size <{folder}/grow; mount -o remount,size=$size {folder}/small; echo done >{folder}/grown) </dev/null >/dev/null 2>&1 & \"$@\"; }}")

        def ask(*arguments, status=0):
            done = subprocess.run([doppel, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
            assert done.returncode == status, f"{arguments}: {done.returncode} {done.stdout}{done.stderr}"
            return done.stdout + done.stderr

        def pauses(count):
            deadline = time.monotonic() + 60
            while ask("events", "vm").count("paused: disk full: disk.") < count:
                assert time.monotonic() < deadline, f"not paused {count} times"
                time.sleep(0.05)

        with Guest(busybox_arguments("--name", "vm", "--disk", image), wrapper=[*prefix, "sh", "-c", script, "sh"]) as vm:
            wait_for_shell(vm)
            wanted = vm.run("dd if=/dev/urandom of=/tmp/noise bs=64k count=320 2>/dev/null; sha256sum </tmp/noise", 60)
            vm.type("dd if=/tmp/noise of=/dev/vda bs=64k conv=fsync; echo written $?-\n")
            pauses(1)
            assert json.loads(ask("ps", "--json"))[0]["state"] == "paused"
            assert "wait for room" in ask("snapshot", "create", "vm", "never", status=1)
            ask("resume", "vm")
            pauses(2)
            with open(f"{folder}/grow", "w") as grow:
                grow.write("48m\n")
            with open(f"{folder}/grown") as grown:
                assert grown.read() == "done\n"
            ask("resume", "vm")
            vm.expect("written 0-", 60)
            vm.run("echo 3 >/proc/sys/vm/drop_caches")
            assert vm.run("dd if=/dev/vda bs=64k count=320 2>/dev/null | sha256sum", 60) == wanted, "what was written is not there"
            assert "I/O error" not in vm.run("dmesg | grep -v I/O.at")
            ask("snapshot", "create", "vm", "now")
            vm.type("\npoweroff\n")
            vm.finish(0, 90)


def memory_of(size, least_mib, most_mib):
    with busybox("--memory", size) as vm:
        mib = int(vm.run("grep MemTotal /proc/meminfo").split()[1]) // 1024
        print(f"{size}: {mib} MiB in the guest, shell after {vm.shell_seconds:.1f} s")
        assert least_mib <= mib <= most_mib, f"{size} gives {mib} MiB"
        # Pages come from the top of memory first: with 5G they are above the hole.
        megabytes = 8 if least_mib < 100 else 48
        vm.run(f"dd if=/dev/urandom of=/tmp/a bs=1M count={megabytes // 2} 2>/dev/null && cp /tmp/a /tmp/b && cmp /tmp/a /tmp/b", 120)
        vm.type("poweroff\n")
        vm.finish(0)


def unpacking():
    """The kernel unpacks itself in the guest."""
    with busybox("--boot", "kernel", seconds=2 * guest.BOOT_SECONDS) as vm:
        print(f"shell after {vm.shell_seconds:.1f} s")
        vm.type("poweroff\n")
        vm.finish(0)


guest.main({
    "shell": lambda: shell_of(1),
    "smp": lambda: shell_of(2),
    "mmio": mmio,
    "limits": limits,
    "network": network_inside,
    "readonly": readonly,
    "locked": locked,
    "full-host": full_host,
    "full-host-raw": lambda: full_host_waits("raw"),
    "full-host-qcow2": lambda: full_host_waits("qcow2"),
    "memory-96M": lambda: memory_of("96M", 40, 96),  # the kernel itself takes 45 MiB
    "memory-3G": lambda: memory_of("3G", 2800, 3072),
    "memory-5G": lambda: memory_of("5G", 4700, 5120),
    "unpacking": unpacking,
})
