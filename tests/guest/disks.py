#!/usr/bin/env python3
"""Snapshots with disks: a guest writes numbers to a file system and remembers them, and wherever it is taken back to, what is on the disk is what it remembers. `disks.py SCENARIO` is one test."""
import json
import os
import re
import select
import shutil
import subprocess
import tempfile
import time

import guest
from guest import BOOT_SECONDS, Guest, busybox_arguments, doppel, wait_for_shell

LOOP = ("mount -t ext4 /dev/vda /mnt && n=0 && echo 0 >/mnt/count && sync && while :; do echo 3 >/proc/sys/vm/drop_caches; test \"$(cat /mnt/count)\" = $n || echo 'DIS''AGREES' $n; "
        "n=$((n+1)); echo $n >/mnt/count; dd if=/dev/urandom of=/mnt/noise bs=16k count=$((n % 8 + 1)) conv=notrunc 2>/dev/null; sync; echo \"at-$n-\"; done\n")


def command(*arguments, status=0, seconds=120):
    done = subprocess.run([str(a) for a in arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == status, f"{' '.join(map(str, arguments))}: {done.returncode} {done.stdout}{done.stderr}"
    return done.stdout


def snapshot(*arguments, **more):
    return command(doppel, "snapshot", *arguments, **more)


class Folder:
    """A runtime directory, a directory of data and a disk; every machine is gone in the end."""

    def __enter__(self):
        self.path = tempfile.mkdtemp(prefix="doppel-disks-")
        os.environ["XDG_RUNTIME_DIR"] = self.path
        os.environ["XDG_DATA_HOME"] = f"{self.path}/data"
        self.disk = f"{self.path}/disk.img"
        command("truncate", "-s", "64M", self.disk)
        command("/sbin/mke2fs", "-q", "-F", "-t", "ext4", self.disk)
        return self

    def __exit__(self, kind, *_):
        for vm in ("vm", "twin", "moved") if kind else ():
            subprocess.run(["tail", "-v", f"{self.path}/doppel/{vm}/messages.log"], timeout=60)
        for vm in "vm", "twin", "far", "moved":
            subprocess.run([doppel, "rm", "-f", vm], capture_output=True, timeout=60)
        shutil.rmtree(self.path)

    def store(self, vm="vm"):
        return f"{self.path}/data/doppel/snapshots/{vm}"

    def top(self, vm="vm"):
        return json.load(open(f"{self.store(vm)}/.disks/map.json"))[self.disk]

    def overlays(self):
        return [f"{self.store()}/.disks/{name}" for name in os.listdir(f"{self.store()}/.disks") if name.endswith(".qcow2")]

    def content(self, image, format):
        """The count on an image as it is, after the journal was replayed; the file system is sound."""
        copy = f"{self.path}/copy.img"
        command("qemu-img", "convert", "-U", "-f", format, "-O", "raw", image, copy)
        subprocess.run(["/sbin/e2fsck", "-fy", "-E", "journal_only", copy], capture_output=True, timeout=60)
        command("/sbin/e2fsck", "-fn", copy)
        return int(command("/sbin/debugfs", "-R", "cat /count", copy))


def numbers(vm):
    log = command(doppel, "logs", vm)
    assert "DISAGREES" not in log, log[-2000:]
    assert not re.search("EXT4-fs error|I/O error|JBD2: .*error", log), log[-3000:]
    return [int(n) for n in re.findall(r"at-(\d+)-", log)]


def goes_on(vm, count):
    """So many more rounds."""
    before = len(numbers(vm))
    deadline = time.monotonic() + 60
    while len(now := numbers(vm)) < before + count:
        assert time.monotonic() < deadline, f"the guest writes no more: {now[-3:]}"
        time.sleep(0.05)
    return now


def begin(folder):
    command(doppel, "run", "-d", "--name", "vm", *busybox_arguments("--memory", "96M", "--net", "none", "--disk", folder.disk), seconds=BOOT_SECONDS)
    with Guest(["--recent", "vm"], "attached", command="console") as terminal:
        wait_for_shell(terminal)
        terminal.type(LOOP)
        terminal.expect("at-5-", 60)
        terminal.type("\x1d")
        terminal.finish(0)


def killed():
    """The machine, or who asks for the snapshot, is killed at some moment of it: the map names what the guest wrote last, images have leaks at worst, what was kept before is whole."""
    with Folder() as folder:
        begin(folder)
        snapshot("create", "vm", "one")
        for moment in 0.03, 0.1, 0.2, 0.4:
            goes_on("vm", 2)
            asking = subprocess.Popen([doppel, "snapshot", "create", "vm", "never"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(moment)
            asking.kill()
            asking.wait()
            goes_on("vm", 1)
            asking = subprocess.Popen([doppel, "snapshot", "create", "vm", "never"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(moment)
            victim = json.loads(command(doppel, "ps", "--json"))[0]["pid"]
            gone = os.pidfd_open(victim)
            os.kill(victim, 9)
            assert select.select([gone], [], [], 60)[0], "it was killed and is still there"
            os.close(gone)
            asking.wait(60)
            last = numbers("vm")[-1]
            assert last <= folder.content(folder.top(), "qcow2") <= last + 1
            assert subprocess.run(["qemu-img", "check", "-q", folder.top()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode in (0, 3)
            subprocess.run([doppel, "snapshot", "delete", "vm", "never"], capture_output=True, timeout=60)  # it may have been through
            snapshot("restore", "vm", "one")
        goes_on("vm", 2)
        snapshot("create", "vm", "two")
        assert len(folder.overlays()) <= 3, "overlays of snapshots that never were are still there"


def snapshots():
    with Folder() as folder:
        begin(folder)
        at = {}
        for name, options in (("one", []), ("two", ["--incremental"]), ("three", ["--incremental", "--compress", "zstd"])):
            least = goes_on("vm", 3)[-1]
            snapshot("create", "vm", name, *options)
            meta = json.loads(snapshot("show", "vm", name))
            assert meta["disks"] == "kept" and meta["disk_files"][0]["origin"] == folder.disk
            at[name] = (range(least, numbers("vm")[-1] + 2), meta["disk_files"][0]["file"], meta["disk_files"][0]["format"])
            print(f"{name}: the guest stood still for {meta['pause_ns'] / 1e6:.1f} ms")
            goes_on("vm", 2)
        assert at["one"][1:] == (folder.disk, "raw") and at["two"][2] == "qcow2"
        before = open(folder.disk, "rb").read()
        for name in "two", "one", "three":
            snapshot("restore", "vm", name)
            went_on = goes_on("vm", 4)
            assert went_on[0] in at[name][0], f"{name} went on at {went_on[0]}, not in {at[name][0]}"
            count = folder.content(at[name][1], at[name][2])
            assert went_on[0] - 1 <= count <= went_on[0] + 1, f"{count} is on the disk of {name}, {went_on[0]} came next in memory"
        snapshot("restore", "vm", "one", "--as", "twin")
        goes_on("twin", 3)
        goes_on("vm", 3)
        assert re.search(r"disks: +0 of 1024 clusters", snapshot("diff", "vm", "two", "two"))
        assert 0 < int(re.search(r"disks: +(\d+) of 1024 clusters", snapshot("diff", "vm", "one", "two"))[1]) < 300
        # In a bundle "three" has its disk, all of it, and the memory of "one" and "two".
        command(doppel, "export", "vm/three", f"{folder.path}/bundle", "--compress", "zstd=1")
        command(doppel, "import", f"{folder.path}/bundle", "moved", "--directory", f"{folder.path}/moved")
        snapshot("restore", "moved", "three")
        went_on = goes_on("moved", 3)
        assert went_on[0] in at["three"][0], f"in the bundle three went on at {went_on[0]}, not in {at['three'][0]}"
        assert went_on[0] - 1 <= folder.content(f"{folder.path}/moved/disk0", "raw") <= went_on[0] + 1
        command(doppel, "kill", "moved")
        # Nobody needs "two" but what lies on it: its disk becomes a part of that. The machine's own file, which is being written, stays as it is.
        files = len(folder.overlays())
        snapshot("delete", "vm", "two")
        left = folder.overlays()
        assert len(left) < files and at["two"][1] not in left, (files, left)
        snapshot("restore", "vm", "three")
        went_on = goes_on("vm", 3)
        assert at["three"][0].start <= went_on[0] < at["three"][0].stop
        assert open(folder.disk, "rb").read() == before, "a frozen disk was written to"
        snapshot("delete", "vm", "one")
        goes_on("twin", 2)
        # In one file, with disks that need no others; elsewhere it goes on from the same moment.
        snapshot("export", "vm", "three", f"{folder.path}/three.tar")
        snapshot("import", f"{folder.path}/three.tar", "far")
        snapshot("restore", "far", "three")
        went_on = goes_on("far", 3)
        assert at["three"][0].start <= went_on[0] < at["three"][0].stop
        image = json.loads(snapshot("show", "far", "three"))["disk_files"][0]["file"]
        assert image.startswith(folder.store("far")) and "backing" not in json.loads(command(doppel, "disk", "info", "--json", image))[0]
        command(doppel, "kill", "vm", "twin", "far")
        for vm in "vm", "twin":
            last = numbers(vm)[-1]
            assert last <= folder.content(folder.top(vm), "qcow2") <= last + 1
            assert subprocess.run(["qemu-img", "check", "-q", folder.top(vm)]).returncode in (0, 3)


guest.main({"snapshot-disks": snapshots, "snapshot-disks-killed": killed})
