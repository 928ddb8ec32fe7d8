#!/usr/bin/env python3
"""A guest that looks after its memory, clocks, timers, a TCP stream and files (steady.c) moves from process to process while it works, under another engine each time. `moving.py CONTROL STEADY SCENARIO`
is one test (memory.py takes the two programs). In the environment: STEPS and SEED."""
import os
import random
import socket
import subprocess
import tempfile

import guest
import memory
from guest import Guest, doppel
from hosts import two_hosts
from survive import TICK, counts, image

STEPS = int(os.environ.get("STEPS", "3"))
SEED = int(os.environ.get("SEED", "1"))
WAITING = 600  # more than fit in the guest's queue
NO_PORTS = "awk '/^Udp: [0-9]/ {print $3}' /proc/net/snmp"  # how many datagrams came that nobody wanted
WAYS = [], ["--compress", "zstd"], ["--downtime", "200ms"], ["--bandwidth", "400M"]


def command(*arguments, seconds=120, here=()):
    done = subprocess.run([*here, doppel, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, f"doppel {' '.join(arguments)}: {done.returncode} {done.stdout}{done.stderr}"
    return done.stdout


def move(source, target, engine, way, wrapper=(), listen="unix:there", both=(), here=(), there=()):
    """What doppel migrate says of it. `wrapper` and `here` are commands that run the target and doppel migrate, `both` what the two are told, `there` what the target is."""
    there = subprocess.Popen([*wrapper, doppel, "receive", *both, *there, "--listen", listen, "--name", target, "--engine", engine], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        waiting = there.stderr.readline()
        assert "waiting" in waiting, waiting
        said = command("migrate", *both, *way, source, waiting.split()[-1], here=here)
        out, errors = there.communicate(timeout=60)
        assert there.returncode == 0 and out == f"{target}\n", errors
        return said.strip()
    finally:
        if there.poll() is None:
            there.kill()
            there.communicate()


def moving():
    rng = random.Random(SEED)
    guest.need(doppel, guest.kernel, guest.cache)
    with tempfile.TemporaryDirectory(prefix="doppel-moving-", dir="/dev/shm") as folder:
        os.environ["XDG_RUNTIME_DIR"] = os.environ["XDG_DATA_HOME"] = folder
        steady = os.path.abspath(memory.churn_program)
        os.chdir(folder)
        image("disk", "48M")
        modules = memory.modules("ext4")
        entries = [("steady", open(steady, "rb").read()), *((os.path.basename(file), open(file, "rb").read()) for file in modules)]
        memory.archive("initrd", entries)
        name = "vm0"
        try:
            command("run", "-d", "--name", name, "--engine", "bt", "--kernel", guest.kernel, "--initrd", "initrd", "--append", "console=ttyS0 quiet", "--memory", "256M", "--cpus", "2",
                    "--disk", "disk", "--net", "user")
            with Guest(["--recent", name], name, command="console") as vm:
                guest.wait_for_shell(vm)
                for file in modules:
                    vm.attempt(f"insmod /extra/{os.path.basename(file)}")
                vm.run("mkdir -p /disk && mount /dev/vda /disk && (cd /; exec /extra/steady 40 /disk) & true")
                before = counts(vm.expect(TICK, 60))
            for step in range(STEPS):
                after = f"vm{step + 1}"
                print(move(name, after, "bt" if step % 2 else "interp", rng.choice(WAYS)), flush=True)
                name = after
                with Guest([name], name, command="console") as vm:
                    now = counts(vm.expect(TICK, 60))
                    vm.expect(TICK, 60)
                    assert "WRONG" not in guest.plain(vm.transcript)
            print(move(name, "last", "bt", []), flush=True)
            with Guest(["last"], "last", command="console") as vm:
                now = counts(vm.expect(TICK, 60))
                assert all(now[part] > before[part] for part in before), f"no progress: {before}, {now}"
                vm.run("! dmesg | grep -E 'BUG:|Oops|Call Trace|WARNING|I/O error|EXT4-fs error|stall|blocked for'")
                vm.run("ping -c 1 10.0.2.2 && wget -q -O - http://10.0.2.2:1/ 2>&1 | grep -q refused")
                vm.run("killall -TERM steady; wait; umount /disk", 60)
                assert "steady: ok" in guest.plain(vm.transcript)
                command("stop", "-t", "60", "last")
        finally:
            for left in [*(f"vm{n}" for n in range(STEPS + 1)), "last"]:
                subprocess.run([doppel, "rm", "-f", left], capture_output=True, timeout=60)
            os.chdir("/")
        subprocess.run(["/sbin/e2fsck", "-fn", f"{folder}/disk"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def disks():
    """Its disk comes with it, while it writes there: from a qcow2 image into a raw one, and on."""
    guest.need(doppel, guest.kernel, guest.cache)
    with tempfile.TemporaryDirectory(prefix="doppel-moving-", dir="/dev/shm") as folder:
        os.environ["XDG_RUNTIME_DIR"] = os.environ["XDG_DATA_HOME"] = folder
        steady = os.path.abspath(memory.churn_program)
        os.chdir(folder)
        image("plain", "192M")
        command("disk", "convert", "plain", "disk.qcow2")
        modules = memory.modules("ext4")
        memory.archive("initrd", [("steady", open(steady, "rb").read()), *((os.path.basename(file), open(file, "rb").read()) for file in modules)])
        names, name = ["vm0"], "vm0"
        try:
            command("run", "-d", "--name", name, "--engine", "bt", "--kernel", guest.kernel, "--initrd", "initrd", "--append", "console=ttyS0 quiet", "--memory", "192M", "--cpus", "2", "--net", "user",
                    "--disk", "disk.qcow2,serial=moves")
            with Guest(["--recent", name], name, command="console") as vm:
                guest.wait_for_shell(vm)
                for file in modules:
                    vm.attempt(f"insmod /extra/{os.path.basename(file)}")
                vm.run("mkdir -p /disk && mount /dev/vda /disk && dd if=/dev/urandom of=/disk/kept bs=1M count=40 && md5sum /disk/kept >/disk/sum", 60)
                vm.run("(cd /; exec /extra/steady 40 /disk) & true")
                vm.expect(TICK, 60)
            for step, way in enumerate(([], ["--compress", "zstd", "--bandwidth", "60M"], ["--post-copy"])):
                os.mkdir(f"host{step}")
                names.append(f"vm{step + 1}")
                print(move(name, names[-1], "bt", [*way, "--disks"], there=["--disk-dir", f"host{step}"]), flush=True)
                name = names[-1]
                with Guest([name], name, command="console") as vm:
                    vm.expect(TICK, 60)
                    vm.expect(TICK, 60)
            assert os.listdir("host2") == ["disk.raw"]
            with Guest([name], name, command="console") as vm:
                vm.run("echo 3 >/proc/sys/vm/drop_caches; md5sum -c /disk/sum", 60)
                vm.run("! dmesg | grep -E 'BUG:|Oops|Call Trace|WARNING|I/O error|EXT4-fs error|stall|blocked for'")
                vm.run("killall -TERM steady; while pidof steady; do usleep 10000; done; umount /disk", 60)
                assert "WRONG" not in guest.plain(vm.transcript) and "steady: ok" in guest.plain(vm.transcript)
            command("stop", "-t", "60", name)
            command("start", name)  # with the image that it has here
            assert "host2/disk.raw,format=raw,serial=moves" in command("inspect", name)
        finally:
            for left in names:
                subprocess.run([doppel, "rm", "-f", left], capture_output=True, timeout=60)
            os.chdir("/")
        subprocess.run(["/sbin/e2fsck", "-fn", f"{folder}/host2/disk.raw"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def writer():
    """One that writes faster than can be sent goes before its memory has, by TLS, and finds all of it."""
    guest.need(doppel, guest.kernel, guest.cache)
    with tempfile.TemporaryDirectory(prefix="doppel-moving-", dir="/dev/shm") as folder:
        os.environ["XDG_RUNTIME_DIR"] = os.environ["XDG_DATA_HOME"] = folder
        steady = os.path.abspath(memory.churn_program)
        os.chdir(folder)
        memory.archive("initrd", [("steady", open(steady, "rb").read())])
        with open("key", "w") as key:
            key.write("a secret of the two of them")
        try:
            command("run", "-d", "--name", "vm0", "--engine", "bt", "--kernel", guest.kernel, "--initrd", "initrd", "--append", "console=ttyS0 quiet", "--memory", "512M", "--cpus", "2", "--net", "user")
            with Guest(["--recent", "vm0"], "vm0", command="console") as vm:
                guest.wait_for_shell(vm)
                vm.run("mkdir -p /fill && mount -t tmpfs -o size=300m none /fill && dd if=/dev/urandom of=/fill/kept bs=1M count=60 && md5sum /fill/kept >/fill/sum", 60)
                vm.run("(cd /; exec /extra/steady 40 /fill) & true")
                vm.run("while :; do dd if=/dev/zero of=/fill/written bs=1M count=60 conv=notrunc; done >/dev/null 2>&1 & true")
                vm.expect(TICK, 60)
            said = move("vm0", "vm1", "bt", ["--post-copy", "--bandwidth", "40M"], listen="127.0.0.1:0", both=["--key-file", "key"])
            print(said, flush=True)
            with Guest(["vm1"], "vm1", command="console") as vm:
                vm.expect(TICK, 60)
                vm.run("md5sum -c /fill/sum", 60)
                vm.run("! dmesg | grep -E 'BUG:|Oops|Call Trace|WARNING|stall|blocked for'")
                vm.run("killall -TERM steady; while pidof steady; do usleep 10000; done", 60)
                assert "steady: ok" in guest.plain(vm.transcript) and "WRONG" not in guest.plain(vm.transcript)
        finally:
            for left in "vm0", "vm1":
                subprocess.run([doppel, "rm", "-f", left], capture_output=True, timeout=60)
            os.chdir("/")


def tap():
    """To another host on the same network, and back: a connection goes on, and bridges learn where the guest is before it says anything; what waits for it comes along."""
    guest.need(doppel, guest.kernel, guest.cache)
    with two_hosts() as names, tempfile.TemporaryDirectory(prefix="doppel-moving-") as folder, socket.socket() as listener:
        os.environ["XDG_RUNTIME_DIR"] = os.environ["XDG_DATA_HOME"] = folder
        os.chdir(folder)
        listener.bind(("172.16.0.1", 0))
        listener.listen()
        listener.settimeout(60)
        names_of_vms = ["vm", "there", "back", "last"]
        try:
            command("run", "-d", "--name", "vm", *guest.busybox_arguments("--net", "tap:tap0", "--memory", "128M", "--cpus", "2"))
            with Guest(["--recent", "vm"], "vm", command="console") as vm:
                guest.wait_for_shell(vm)
                vm.run("ip link set eth0 up; ip addr add 172.16.0.2/24 dev eth0")
                vm.run(f"(n=0; while :; do n=$((n+1)); echo $n; usleep 10000; done | nc 172.16.0.1 {listener.getsockname()[1]}) & true")
            connection = listener.accept()[0]
            connection.settimeout(60)
            lines = connection.makefile("r")
            numbers = lambda count: [int(lines.readline()) for _ in range(count)]
            said = numbers(50)
            for source, target, where in (("vm", "there", names[1]), ("there", "back", names[0])):
                print(move(source, target, "bt", [], wrapper=["ip", "netns", "exec", where]), flush=True)
                last = said[-1]
                said = numbers(100)
                assert said == list(range(last + 1, last + 101)), "something was lost"
            with Guest(["back"], "back", command="console") as vm:
                vm.run("ping -c 1 172.16.0.1")
                vm.run("killall nc")
                before = int(vm.run(NO_PORTS))
            command("pause", "back")
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                for _ in range(WAITING):
                    sender.sendto(b"for whom stands still", ("172.16.0.2", 9))
                print(move("back", "last", "bt", [], wrapper=["ip", "netns", "exec", names[1]]), flush=True)
            command("resume", "last")
            with Guest(["last"], "last", command="console") as vm:
                now = int(vm.run(NO_PORTS))
            assert now == before + WAITING, f"of {WAITING} frames that waited for the guest, {now - before} came"
        finally:
            for left in names_of_vms:
                subprocess.run([doppel, "rm", "-f", left], capture_output=True, timeout=60)
            os.chdir("/")


if __name__ == "__main__":
    guest.main({"moving": moving, "moving-writer": writer, "moving-disks": disks, "moving-tap": tap})
