#!/usr/bin/env python3
"""Memory that comes and goes under Debian's kernel: balloon, free page reporting and hinting. `memory.py CONTROL CHURN SCENARIO` is one test (control.c, churn.c)."""
import hashlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import time

import guest
from guest import archive, modules

MIB = 1 << 20
control_program, churn_program = sys.argv[1:3]
del sys.argv[1:3]


class ControlledGuest(guest.Guest):
    """A guest with a way to command its machine."""

    def __init__(self, *arguments, name="guest"):
        guest.need(control_program, guest.kernel, guest.cache)
        with tempfile.TemporaryDirectory(prefix="doppel-control-") as folder, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{folder}/control")
            listener.listen()
            listener.settimeout(30)
            os.environ["DOPPEL_CONTROL"] = f"{folder}/control"
            super().__init__([*os.environ.get("DOPPEL_ARGUMENTS", "").split(), *arguments], name, program=control_program)
            self.control = listener.accept()[0]
        self.control.settimeout(60)
        self.replies = self.control.makefile("r")

    def command(self, line):
        """Numbers by name of the machine's reply."""
        self.control.sendall(line.encode() + b"\n")
        reply = self.replies.readline().strip()
        assert reply.startswith("ok"), f"{line}: {reply or 'no reply'}"
        return {name: int(value) for name, value in (word.split("=") for word in reply.split()[1:])}

    def until(self, what, true, seconds=60):
        """Waits until it is so; there is nothing to wait for but to look again."""
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"not within {seconds} s: {what}"
            self.read_some(0.05)

    def power_off(self):
        self.type("poweroff\n")
        self.finish(0, 60)


class MemoryGuest(ControlledGuest):
    """A busybox guest with these modules, and a program in /extra."""

    def __init__(self, names, *arguments, append="", program=("churn", churn_program), net="none"):
        guest.need(program[1], guest.kernel, guest.cache)
        self.folder = tempfile.TemporaryDirectory(prefix="doppel-memory-")
        initrd = self.folder.name + "/initrd"
        files = modules(*names)
        entries = []
        for name, path in [*((os.path.basename(file), file) for file in files), program]:
            with open(path, "rb") as file:
                entries.append((name, file.read()))
        archive(initrd, entries)
        self.files = [os.path.basename(file) for file in files]
        super().__init__("--kernel", guest.kernel, "--initrd", initrd, "--append", "console=ttyS0 quiet " + append, "--net", net, *arguments)

    def boot(self):
        guest.wait_for_shell(self)
        for file in self.files:
            self.attempt(f"insmod /extra/{file}")  # some are in the initial RAM disk already

    def resident(self):
        return self.command("resident")["bytes"] / MIB


def balloon():
    with MemoryGuest(["virtio_balloon"], "--memory", "512M", "--balloon", "64,stats=1") as vm:
        vm.boot()
        vm.until("the balloon is inflated", lambda: vm.command("balloon")["actual"] == 64 * 256)
        vm.run("/extra/churn 0 200 1", 60)
        before = vm.resident()
        vm.command("inflate 300")
        vm.until("it grows", lambda: vm.command("balloon")["actual"] == 300 * 256)
        after = vm.resident()
        print(f"resident: {before:.0f} MiB, with 300 MiB in the balloon {after:.0f} MiB")
        assert before > 240 and after < 212, "inflation gave nothing back"
        vm.until("statistics", lambda: "available_memory" in vm.command("balloon"))
        free = int(re.search(r"MemTotal: +(\d+)", vm.run("cat /proc/meminfo")).group(1))
        vm.command("interval 1")
        vm.until("new statistics", lambda: abs(vm.command("balloon")["total_memory"] / 1024 - free) < 2048)
        print({name: value for name, value in vm.command("balloon").items() if "_" in name})
        # Memory goes and comes while programs use it.
        vm.type("/extra/churn 3 60 2; echo done''.\n")
        for size in [380, 100, 350, 10]:
            vm.command(f"inflate {size}")
            vm.until("it follows", lambda: abs(vm.command("balloon")["actual"] - size * 256) < 30 * 256, 20)
        vm.expect(r"churn: ok\r*\n", 60)
        vm.expect(r"done\.", 10)
        vm.command("inflate 0")
        vm.until("it is empty", lambda: vm.command("balloon")["actual"] == 0)
        vm.run("/extra/churn 0 400 2", 60)
        vm.power_off()


def reporting():
    with MemoryGuest(["virtio_balloon"], "--memory", "512M", "--balloon", "0,reporting") as vm:
        vm.boot()
        peak = [0]

        def ended():
            peak[0] = max(peak[0], vm.resident())
            return b"done." in vm.unread

        vm.type("/extra/churn 0 300 2; echo done''.\n")  # pages are reported as soon as it ends
        vm.until("the program's end", ended)
        assert peak[0] > 280
        vm.until("free pages are reported", lambda: vm.resident() < 150, 60)
        print(f"resident: {peak[0]:.0f} MiB in use, {vm.resident():.0f} MiB when reported")
        vm.run("/extra/churn 0 300 2", 60)
        assert vm.command("balloon")["actual"] == 0
        vm.power_off()


def hinting():
    with MemoryGuest(["virtio_balloon"], "--memory", "512M", "--balloon", "0,hinting") as vm:
        vm.boot()
        vm.run("/extra/churn 0 300 2", 60)
        for acknowledge in (1, 0):
            high = vm.resident()
            assert high > 280
            vm.command(f"hint {acknowledge}")
            done = 1 if acknowledge else vm.command("balloon")["host"]
            vm.until("the guest has told all", lambda: vm.command("balloon")["guest"] == 0 and vm.command("balloon")["host"] == done)
            vm.until("pages are back", lambda: vm.resident() < 150, 30)
            print(f"resident: {high:.0f} MiB before hinting, {vm.resident():.0f} MiB after")
            if not acknowledge:
                vm.command("hint-stop")
            vm.run("/extra/churn 0 300 2", 60)
        vm.power_off()


def host(*command):
    return subprocess.run(command, check=True, capture_output=True, timeout=60).stdout


def pmem():
    with tempfile.TemporaryDirectory(prefix="doppel-pmem-") as folder:
        disk, other = folder + "/disk", folder + "/other"
        host("truncate", "-s", "64M", disk)
        host("/sbin/mke2fs", "-q", "-F", "-b", "4096", "-t", "ext4", disk)
        with open(other, "wb") as file:
            file.write(b"0123456789abcdef" * (3 << 16) + b"end." * 128)
        with MemoryGuest(["virtio_pmem", "nd_pmem", "ext4"], "--memory", "256M", "--pmem", disk + ",id=first", "--pmem", other + ",readonly") as vm:
            vm.boot()
            vm.until("the devices", lambda: vm.attempt("test -b /dev/pmem0 -a -b /dev/pmem1")[0] == 0)
            assert vm.run("cat /sys/block/pmem0/size /sys/block/pmem1/size").split() == [str(64 * 2048), str(4 * 2048)]
            vm.run("mount -t ext4 -o dax /dev/pmem0 /mnt")
            vm.run("cp /extra/churn /mnt/churn; mkdir /mnt/d; seq 1 200000 | cat > /mnt/d/numbers; sync")
            # A program that runs from the file itself, and reads and writes through it.
            vm.run("/mnt/churn 1 40 2", 60)
            vm.run("for i in 1 2 3 4; do cp /mnt/churn /mnt/c$i; /mnt/c$i 0 4 1 || exit 1; rm /mnt/c$i; done", 60)
            sums = vm.run("md5sum /mnt/churn /mnt/d/numbers | cut -c1-32").split()
            # What is read-only stays as it is, whatever the guest does.
            vm.attempt("echo changed > /dev/pmem1; sync")
            vm.attempt("dd if=/dev/zero of=/dev/pmem1 bs=4096 count=4")
            assert "0123456789abcdef" in vm.run("dd if=/dev/pmem1 bs=16 count=1 2>/dev/null; echo")
            assert "end." in vm.run("dd if=/dev/pmem1 bs=1M skip=3 count=1 2>/dev/null | head -c 4; echo")
            assert int(vm.run("dd if=/dev/pmem1 bs=1024 skip=3073 2>/dev/null | tr -d '\\0' | wc -c")) == 0
            vm.run("umount /mnt; sync", 60)
            vm.power_off()
        host("/sbin/e2fsck", "-fn", disk)
        content = host("/sbin/debugfs", "-R", "cat /d/numbers", disk)
        assert content == b"".join(b"%d\n" % n for n in range(1, 200001)), "the file on the host differs"
        assert hashlib.md5(content).hexdigest() == sums[1]
        assert hashlib.md5(host("/sbin/debugfs", "-R", "cat /churn", disk)).hexdigest() == sums[0]
        with open(other, "rb") as file:
            assert file.read(16) == b"0123456789abcdef"


def total(vm):
    """The guest's memory in MiB."""
    return int(re.search(r"MemTotal: +(\d+)", vm.run("cat /proc/meminfo")).group(1)) / 1024


def hotplug():
    with MemoryGuest(["virtio_mem"], "--memory", "256M", "--cpus", "2", "--memory-hotplug", "total=1G", append="memhp_default_state=online_movable") as vm:
        vm.boot()
        before = total(vm)
        assert vm.command("memory") == {"plugged": 0, "requested": 0}
        vm.command("request 512")
        vm.until("it is plugged", lambda: vm.command("memory")["plugged"] == 512)
        vm.until("it is the guest's", lambda: abs(total(vm) - before - 512) < 40)
        vm.run("/extra/churn 0 440 2", 90)
        full = vm.resident()
        vm.command("request 128")
        vm.until("it is unplugged", lambda: vm.command("memory")["plugged"] == 128, 90)
        print(f"resident: {full:.0f} MiB with 512 MiB plugged, {vm.resident():.0f} MiB with 128 MiB")
        assert full > 380 and vm.resident() < full - 120, "memory did not come back"
        assert abs(total(vm) - before - 128) < 40
        # Memory is plugged and unplugged while programs use it and their code moves.
        vm.type("/extra/churn 4 150 3; echo done''.\n")
        for size in (600, 192, 400, 256):
            vm.command(f"request {size}")
            vm.until("it follows", lambda: abs(vm.command("memory")["plugged"] - size) <= 128, 60)
        vm.expect(r"churn: ok\r*\n", 90)
        vm.expect(r"done\.", 10)
        for command in ("request 1025", "request 1026", "request 3"):
            vm.control.sendall(command.encode() + b"\n")
            assert vm.replies.readline().startswith("error"), command
        vm.type("echo b > /proc/sysrq-trigger\n")  # after a reset nothing is plugged, whatever was asked for before stays asked for
        vm.expect(r"poweroff +\(or Ctrl-A x", guest.BOOT_SECONDS)
        assert vm.command("memory") == {"plugged": 0, "requested": 256}
        vm.expect(r"# ", 30)
        vm.power_off()


if __name__ == "__main__":
    guest.main({"balloon": balloon, "reporting": reporting, "hinting": hinting, "pmem": pmem, "hotplug": hotplug})
