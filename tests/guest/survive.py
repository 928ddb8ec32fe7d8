#!/usr/bin/env python3
"""A guest that uses everything is saved, killed, and gone on with by a new process under another engine, again and again. What it looks after itself (steady.c) is as it was; what cannot
survive, connections to the host, it is told of. `survive.py CONTROL STEADY SCENARIO` is one test (control.c). In the environment: STEPS, SEED, and ENGINES that take turns."""
import http.server
import os
import random
import re
import subprocess
import tempfile
import threading
import time

import guest
import memory  # takes the two programs
from api import Page
from memory import ControlledGuest, MemoryGuest
from vsock import Vsock

STEPS = int(os.environ.get("STEPS", "6"))
SEED = int(os.environ.get("SEED", "1"))
ENGINES = os.environ.get("ENGINES", "bt,interp").split(",")
TICK = r"steady: tick \d+ ([^.\n]*)\."
BALLOON_MIB, PLUGGED_MIB = 24, 128


def image(path, size):
    subprocess.run(["truncate", "-s", size, path], check=True)
    subprocess.run(["/sbin/mke2fs", "-q", "-F", "-b", "4096", "-t", "ext4", path], check=True)


def prepare(vm, folder, port):
    """Everything is in use, most of it by `steady`."""
    vm.boot()
    vm.run("mkdir -p /disk /share /pmem && mount /dev/vda /disk && mount -t virtiofs work /share")
    vm.until("persistent memory", lambda: vm.attempt("test -b /dev/pmem0")[0] == 0)
    vm.run("mount -o dax /dev/pmem0 /pmem")
    vm.command(f"request {PLUGGED_MIB}")
    vm.until("memory is plugged", lambda: vm.command("memory")["plugged"] == PLUGGED_MIB)
    vm.command(f"inflate {BALLOON_MIB}")
    vm.until("the balloon is inflated", lambda: vm.command("balloon")["actual"] == BALLOON_MIB * 256)
    # More than there is without the plugged memory.
    vm.run("mkdir -p /plugged && mount -t tmpfs -o size=160m none /plugged && for n in $(seq 60); do (echo $n; cat /bin/busybox) >/plugged/$n; done && md5sum /plugged/* >/tmp/sum", 60)
    os.mkdir(f"{folder}/work/deep")
    with open(f"{folder}/work/deep/er", "w") as file:
        file.write("first\n")
    with open(f"{folder}/work/gone", "w") as file:
        file.write("soon\n")
    vm.run("exec 5</share/deep/er 6>>/share/appended 7</share/gone; cd /share/deep; echo before >&6")
    vm.run(f"mkfifo /tmp/line; exec 8<>/tmp/line; (cd /; exec nc 10.0.2.2 {port} <&8 >/dev/null 2>&1) & true")
    vm.until("a connection to the host", lambda: vm.attempt("netstat -nt | grep 10.0.2.2 | grep -q ESTABLISHED")[0] == 0)
    vm.run("(cd /; exec /extra/steady 40 /disk /share /pmem) & true")
    vm.expect(TICK, 30)


def counts(found):
    return {name: int(value) for name, value in (word.split("=") for word in found[1].decode().split())}


def connections(vm, host):
    """The host's end of a vsock connection goes with the process; the guest's is told, and new ones can be made."""
    vm.until("the command of the lost connection ends", lambda: vm.attempt("pidof sleep")[0] != 0, 30)
    vm.run("echo more >&8")
    vm.until("TCP's connection to the host is reset", lambda: vm.attempt("echo more >&8; pidof nc")[0] != 0, 30)
    done = host.exec("echo", "again", options=["--wait", "30"])
    assert done.stdout == b"again\n", done


def without_share(folder):
    """A directory that is not there is said, in one line; what is gone from one is the guest's to hear of."""
    os.rename(f"{folder}/work", f"{folder}/away")
    done = subprocess.run([memory.control_program, "run"], env={**os.environ, "DOPPEL_CONTROL": "/nowhere"}, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and re.fullmatch(r"control: .*/work.*\n", done.stderr), done
    os.rename(f"{folder}/away", f"{folder}/work")
    os.remove(f"{folder}/work/gone")


def look(vm, web, folder):
    """What `steady` does not look after."""
    vm.run("md5sum -c -s /tmp/sum", 60)
    assert vm.command("memory") == {"plugged": PLUGGED_MIB, "requested": PLUGGED_MIB}
    assert vm.command("balloon")["actual"] == BALLOON_MIB * 256
    vm.run('test "$(cat <&5) $(cat /share/deep/er) $(cat er) $(pwd)" = "first first first /share/deep"')
    vm.run("echo after >&6; ! cat <&7 2>/tmp/error && grep -q -i stale /tmp/error")
    with open(f"{folder}/work/appended") as file:
        assert file.read() == "before\nafter\n"
    vm.run(f'test "$(wget -q -O - http://10.0.2.2:{web.server_port}/)" = "from the host"', 60)
    vm.run('test "$(wget -q -O - http://169.254.169.254/name)" = "of this guest"', 60)
    vm.command(f"inflate {BALLOON_MIB // 2}")
    vm.until("the balloon follows", lambda: vm.command("balloon")["actual"] == BALLOON_MIB * 128)


def go_on(vm, number, folder, engine, between=lambda: None):
    """Saved, killed, loaded: what is on disks is of that moment, because the machine stays paused."""
    snapshot = f"{folder}/snapshot"
    vm.command(f"{'save' if number % 4 == 0 else 'save-changes'} {snapshot}")
    vm.process.kill()
    vm.process.wait()
    vm.__exit__(None, None, None)
    os.environ["DOPPEL_LOAD"] = snapshot
    between()
    return ControlledGuest("--engine", engine, name=f"step {number} ({engine})")


def step(vm, number, folder, rng, engine):
    """At some moment."""
    vm.read_some(rng.random() * 0.4)
    time.sleep(rng.random() * 0.05)
    began = time.monotonic()
    after = go_on(vm, number, folder, engine, (lambda: without_share(folder)) if number == 0 else lambda: None)
    try:
        after.counts = counts(after.expect(TICK, 60))
        assert "WRONG" not in guest.plain(after.transcript)
    except BaseException:
        after.__exit__(AssertionError, None, None)
        raise
    print(f"step {number}: {engine}, {time.monotonic() - began:.2f} s to the first tick", flush=True)
    return after


def survive():
    rng = random.Random(SEED)
    os.environ.pop("DOPPEL_LOAD", None)
    with tempfile.TemporaryDirectory(prefix="doppel-survive-", dir="/dev/shm") as folder, http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        image(f"{folder}/disk", "48M")
        image(f"{folder}/pmem", "32M")
        os.mkdir(f"{folder}/work")
        os.mkdir(f"{folder}/snapshot")
        with open(f"{folder}/data.json", "w") as file:
            file.write('{"name": "of this guest"}')
        vm = MemoryGuest(["virtio_balloon", "virtio_mem", "virtio_pmem", "nd_pmem", "virtiofs", "ext4"], "--engine", ENGINES[0], "--memory", "192M", "--cpus", 2, "--memory-hotplug", "total=256M",
                         "--balloon", "0,stats=1,reporting", "--disk", f"{folder}/disk", "--pmem", f"{folder}/pmem", "--share", f"{folder}/work:work", "--vsock", f"path={folder}/v.sock,cid=9", "--metadata", f"{folder}/data.json",
                         append="memhp_default_state=online_movable", program=("steady", memory.churn_program), net="user")
        host = Vsock(f"{folder}/v.sock")
        try:
            prepare(vm, folder, web.server_port)
            os.remove(f"{folder}/data.json")  # comes along
            before = counts(vm.expect(TICK, 60))
            print(f"in use after {vm.seconds():.1f} s", flush=True)
            lost = host.start("echo ready; exec sleep 6000")
            assert lost.stdout.readline() == b"ready\n"
            for number in range(STEPS):
                vm = step(vm, number, folder, rng, ENGINES[(number + 1) % len(ENGINES) if number + 1 < STEPS else 0])
                if number == 0:
                    assert lost.wait(60) == 125
                    connections(vm, host)
            look(vm, web, folder)
            print(f"looked at after {vm.seconds():.1f} s", flush=True)
            now = counts(vm.expect(TICK, 60))
            assert all(now[name] > before[name] for name in before), f"no progress: {before}, {now}"
            vm.run("! dmesg | grep -E 'BUG:|Oops|Call Trace|WARNING|I/O error|EXT4-fs error|stall|blocked for'")
            vm.run("killall -TERM steady; wait; cd /; exec 5<&- 6>&- 7<&- 8>&-; umount /disk /share /pmem", 60)
            assert "steady: ok" in guest.plain(vm.transcript)
            vm.power_off()
            print(f"off after {vm.seconds():.1f} s", flush=True)
        except BaseException as error:
            vm.__exit__(type(error), error, None)
            raise
        vm.__exit__(None, None, None)
        subprocess.run(["/sbin/e2fsck", "-fn", f"{folder}/disk"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def boot():
    """The same while the kernel boots: processors that start, clocks that are measured, devices that are found."""
    rng = random.Random(SEED)
    os.environ.pop("DOPPEL_LOAD", None)
    with tempfile.TemporaryDirectory(prefix="doppel-survive-", dir="/dev/shm") as folder:
        image(f"{folder}/disk", "16M")
        os.mkdir(f"{folder}/snapshot")
        vm = ControlledGuest(*guest.busybox_arguments("--engine", ENGINES[0], "--memory", "128M", "--cpus", 2, "--disk", f"{folder}/disk", "--virtio-console", "none"))
        said, number = "", 0
        try:
            while "(or Ctrl-A x" not in said and number < STEPS:
                # More of the time than of a booting guest is a process's start: moments are close at first.
                end = time.monotonic() + rng.random() * 0.05 * (number + 1)
                while time.monotonic() < end:
                    vm.read_some(end - time.monotonic())
                before = vm
                vm = go_on(vm, number, folder, ENGINES[(number + 1) % len(ENGINES) if number + 1 < STEPS else 0])
                said += guest.plain(before.transcript)
                number += 1
            if "(or Ctrl-A x" not in said:
                vm.expect(r"poweroff +\(or Ctrl-A x", guest.BOOT_SECONDS)
            vm.expect("# ", 60)
            print(f"{number} snapshots", flush=True)
            vm.run("test $(nproc) = 2 && mount /dev/vda /mnt && cp /bin/busybox /mnt && umount /mnt && mount /dev/vda /mnt && cmp /bin/busybox /mnt/busybox && umount /mnt", 60)
            vm.run("ip addr show eth0 | grep -q 10.0.2. && ping -c 1 10.0.2.2", 60)
            vm.run("! dmesg | grep -E 'BUG:|Oops|Call Trace|WARNING|I/O error|stall|blocked for|unstable'")
            vm.power_off()
        except BaseException as error:
            print(said[-3000:])
            vm.__exit__(type(error), error, None)
            raise
        vm.__exit__(None, None, None)


if __name__ == "__main__":
    guest.main({"survive": survive, "survive-boot": boot})
