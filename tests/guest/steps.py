#!/usr/bin/env python3
"""A guest that looks after its memory, disk, clocks, timers and processes (steady.c) and sends a stream of numbers to a peer goes through steps that are chosen at random: snapshots of all kinds, back to the
moment and back to an earlier one, clones, migrations by all ways, with its memory or its disk following, to and from other engines, snapshots that are merged, pauses. `steps.py CONTROL STEADY steps` is the
test; in the environment STEPS and SEED. A failure names both; the same seed makes the same choices. A stream must not break, but where the guest goes back to an earlier moment: its peer does not, and it
connects anew. The clock at the guest's wall goes on with the host's as long as it does not go back; that of its chipset always does."""
import os
import random
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time

import guest
import memory
from guest import Guest, doppel
from hosts import two_hosts
from moving import WAYS, command, move
from survive import TICK, image

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from certificates import signed

STEPS = int(os.environ.get("STEPS", "4"))
SEED = int(os.environ.get("SEED", "1"))
KEPT_MAX = 4
KEY = ["--key-file", "key"]
ENGINES = "bt", "bt", "interp"
LATE_S = 3  # between asking the guest for its time and hearing it, on a busy host
BAD = "BUG:|Oops|Call Trace|WARNING|I/O error|EXT4-fs error|stall|blocked for"


class Peer(threading.Thread):
    """Reads 1, 2, 3 ... from each connection."""

    def __init__(self, listener):
        super().__init__(daemon=True)
        self.listener, self.connections, self.count, self.wrong, self.now = listener, 0, 0, None, None
        self.changed = threading.Condition()
        self.start()

    def run(self):
        while True:
            connection = self.listener.accept()[0]
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # whoever comes back to it is told at once
            with self.changed:
                self.connections += 1
                self.now, self.count = connection, 0
            with connection, connection.makefile("r") as lines:
                try:
                    for line in lines:
                        with self.changed:
                            if not line.endswith("\n"):
                                break
                            self.count += 1
                            if line != f"{self.count}\n":
                                self.wrong = f"{line.strip()} instead of {self.count}"
                            self.changed.notify()
                except OSError:
                    pass

    def more(self, connections):
        """Numbers still come, by just that many connections up to now."""
        with self.changed:
            arrived = lambda count: self.changed.wait_for(lambda: self.wrong or (self.connections >= connections and self.count > count), 60)
            assert arrived(0) and arrived(self.count + 5), f"the stream has stopped at {self.count}, connection {self.connections}"
            assert not self.wrong and self.connections == connections, f"the stream: {self.wrong}, {self.connections} connections instead of {connections}"

    def drop(self):
        with self.changed:
            self.now.shutdown(socket.SHUT_RDWR)


class Walk:
    """The machine is `vm` in the network namespace `where`. `kept` are snapshots (machine's name, name, options of their key); an incremental one can be made after `base`."""

    def __init__(self, spaces, peer):
        self.rng, self.spaces, self.peer = random.Random(SEED), spaces, peer
        self.vm, self.where, self.kept, self.base, self.number, self.connections, self.doing, self.behind = "one", 0, [], None, 0, 1, "boot", None

    def inside(self, where):
        return ["ip", "netns", "exec", self.spaces[where]]

    def doppel(self, *arguments):
        return command(*arguments, here=self.inside(self.where))

    def create(self):
        options = self.rng.choice(([], ["--compress", "zstd"]))
        encrypted = self.rng.random() < 0.3
        if self.base and self.rng.random() < 0.7:
            options, encrypted = [*options, "--incremental"], encrypted or bool(self.base[2])
        self.number += 1
        made = (self.vm, f"s{self.number}", KEY if encrypted else [])
        self.doppel("snapshot", "create", self.vm, made[1], *options, *(["--encrypt", *KEY] if encrypted else []))
        self.kept.append(made)
        self.base = made
        return " ".join(options + (["encrypted"] if encrypted else []))

    def restore(self, kept):
        if kept[0] != self.vm:
            self.doppel("rm", "-f", self.vm)
        engine = self.rng.choice(ENGINES)
        self.doppel("snapshot", "restore", *kept[:2], *kept[2], "--engine", engine, "--load", self.rng.choice(("lazy", "fill", "whole")))
        self.vm, self.base, self.behind = kept[0], kept, None
        if self.state() == "paused":
            self.doppel("resume", self.vm)

    def state(self):
        line = [line for line in self.doppel("ps").splitlines() if line.split()[0] == self.vm]
        return "paused" if line and "paused" in line[0] else "running"

    def again(self):
        """With nothing in between, the peer notices nothing."""
        self.doppel("pause", self.vm)
        said = self.create()
        self.restore(self.base)
        return said

    def back(self):
        if not self.kept:
            return self.create()
        kept = self.rng.choice(self.kept)
        self.doppel("pause", self.vm)
        self.peer.drop()
        self.connections += 1
        self.restore(kept)
        return f"to {kept[1]} of {kept[0]}"

    def delete(self):
        """Of its own: merging what came from a machine of another name makes new files of those that this one has below its disk, and a migration's target then does not find the same."""
        own = [kept for kept in self.kept if kept[0] == self.vm]
        if not own:
            return self.create()
        kept = self.rng.choice(own)
        self.kept.remove(kept)
        self.doppel("snapshot", "delete", *kept[:2], *KEY)
        self.base = None if kept == self.base else self.base
        return f"{kept[1]} of {kept[0]}"

    def clone(self):
        """A clone is off the network: it has the address of the other."""
        other = self.spaces[1 - self.where]
        subprocess.run(["ip", "-n", other, "link", "set", "tap0", "nomaster"], check=True)
        command("clone", self.vm, "--name", "twin", here=self.inside(1 - self.where))
        self.steady("twin")
        command("rm", "-f", "twin")
        subprocess.run(["ip", "-n", other, "link", "set", "tap0", "master", "bridge"], check=True)
        self.base = None
        return ""

    def migrate(self):
        address = f"172.16.0.{1 if self.where else 3}:0"
        listen, here, there = self.rng.choice((("unix:there", [], []), (address, KEY, KEY), (address, ["--insecure"], ["--insecure"]), (address, signed("one"), signed("other"))))
        target, engine, way = "two" if self.vm == "one" else "one", self.rng.choice(ENGINES), [*self.rng.choice(WAYS), *self.rng.choice(([], [], ["--post-copy"]))]
        subprocess.run([doppel, "rm", "-f", target], capture_output=True, timeout=60)
        if self.rng.random() < 0.2:
            self.number += 1
            os.mkdir(f"disks{self.number}")
            way, there = [*way, "--disks"], [*there, "--disk-dir", f"disks{self.number}"]
        move(self.vm, target, engine, [*here, *way], self.inside(1 - self.where), listen, here=self.inside(self.where), there=there)
        self.vm, self.where, self.base = target, 1 - self.where, None
        return " ".join([engine, listen, *here, *way])

    def pause(self):
        self.doppel("pause", self.vm)
        self.doppel("resume", self.vm)
        return ""

    def steady(self, name):
        with Guest([name], name, command="console") as vm:
            for _ in range(2):
                vm.expect(TICK, 60)
            assert "WRONG" not in guest.plain(vm.transcript)

    def clocks(self):
        with Guest([self.vm], self.vm, command="console") as vm:
            wall, chip = map(float, re.search(r"clocks (\d+) (\d+)", vm.run("echo clocks $(date +%s) $(cat /sys/class/rtc/rtc0/since_epoch)")).groups())
        behind = time.time() - wall
        assert abs(time.time() - chip) < LATE_S, f"the clock of the chipset is {time.time() - chip:.1f} s behind"
        assert self.behind is None or abs(behind - self.behind) < LATE_S, f"the clock at the wall was {self.behind:.1f} s behind and is {behind:.1f} s"
        self.behind = behind

    def step(self):
        act = self.rng.choice([self.create, self.create, self.again, self.back, self.delete, self.clone, self.migrate, self.migrate, self.migrate, self.pause])
        self.doing, began = act.__name__, time.monotonic()
        said = act()
        while sum(kept[0] == self.vm for kept in self.kept) > KEPT_MAX:
            said += ", deleted " + self.delete()
        self.steady(self.vm)
        self.peer.more(self.connections)
        self.clocks()
        return f"{act.__name__} {said}: {time.monotonic() - began:.1f} s"


def boot(walk, folder, port):
    os.chdir(folder)
    image("disk", "32M")
    with open("key", "w") as file:
        file.write("of no importance\n")
    modules = memory.modules("ext4")
    memory.archive("initrd", [("steady", open(memory.churn_program, "rb").read()), *((os.path.basename(file), open(file, "rb").read()) for file in modules)])
    walk.doppel("run", "-d", "--name", walk.vm, "--engine", "bt", "--kernel", guest.kernel, "--initrd", "initrd", "--append", "console=ttyS0 quiet", "--memory", "128M", "--cpus", "2",
                "--disk", "disk", "--net", "tap:tap0")
    with Guest(["--recent", walk.vm], walk.vm, command="console") as vm:
        guest.wait_for_shell(vm)
        for file in modules:
            vm.attempt(f"insmod /extra/{os.path.basename(file)}")
        vm.run("mkdir -p /disk && mount /dev/vda /disk; ip link set eth0 up; ip addr add 172.16.0.2/24 dev eth0")
        vm.run(f"(while :; do (n=0; while :; do n=$((n+1)); echo $n; usleep 20000; done) | nc 172.16.0.1 {port} >/dev/null 2>&1; done) & true")
        vm.run("(cd /; exec /extra/steady 16 /disk) & true")
        vm.expect(TICK, 60)


def steps():
    guest.need(doppel, guest.kernel, guest.cache)
    memory.churn_program = os.path.abspath(memory.churn_program)
    with two_hosts() as spaces, tempfile.TemporaryDirectory(prefix="doppel-steps-", dir="/dev/shm") as folder, socket.socket() as listener:
        os.environ["XDG_RUNTIME_DIR"] = os.environ["XDG_DATA_HOME"] = folder
        subprocess.run(["ip", "-n", spaces[1], "addr", "add", "172.16.0.3/24", "dev", "bridge"], check=True)
        listener.bind(("172.16.0.1", 0))
        listener.listen()
        walk = Walk(spaces, Peer(listener))
        number = "boot"
        try:
            boot(walk, folder, listener.getsockname()[1])
            for number in range(STEPS):
                print(f"step {number}: {walk.step()}", flush=True)
            with Guest([walk.vm], walk.vm, command="console") as vm:
                vm.expect(TICK, 60)
                vm.run(f"! dmesg | grep -E '{BAD}'")
                vm.run("killall -TERM steady; while pidof steady >/dev/null; do usleep 50000; done; umount /disk", 60)
                assert "steady: ok" in guest.plain(vm.transcript)
        except BaseException as error:
            for name in "one", "two":
                subprocess.run(["tail", "-v", f"{folder}/doppel/{name}/messages.log"], timeout=60)
            raise AssertionError(f"seed {SEED}, step {number} ({walk.doing}): {error}") from error
        finally:
            for name in "one", "two", "twin":
                subprocess.run([doppel, "rm", "-f", name], capture_output=True, timeout=60)
            os.chdir("/")


if __name__ == "__main__":
    guest.main({"steps": steps})
