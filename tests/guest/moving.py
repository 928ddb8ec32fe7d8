#!/usr/bin/env python3
"""A guest that looks after its memory, clocks, timers, a TCP stream and files (steady.c) moves from process to process while it works, under another engine each time. `moving.py CONTROL STEADY SCENARIO`
is one test (memory.py takes the two programs). In the environment: STEPS and SEED."""
import os
import random
import re
import subprocess
import tempfile

import guest
import memory
from guest import Guest, doppel
from survive import TICK, counts, image

STEPS = int(os.environ.get("STEPS", "3"))
SEED = int(os.environ.get("SEED", "1"))
WAYS = [], ["--compress", "zstd"], ["--downtime", "200ms"], ["--bandwidth", "400M"]


def command(*arguments, seconds=120):
    done = subprocess.run([doppel, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, f"doppel {' '.join(arguments)}: {done.returncode} {done.stdout}{done.stderr}"
    return done.stdout


def move(source, target, engine, way):
    """What doppel migrate says of it."""
    there = subprocess.Popen([doppel, "receive", "--listen", "unix:there", "--name", target, "--engine", engine], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert "waiting" in there.stderr.readline()
        said = command("migrate", *way, source, "unix:there")
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
        os.chdir(folder)
        image("disk", "48M")
        modules = memory.modules("ext4")
        entries = [("steady", open(memory.churn_program, "rb").read()), *((os.path.basename(file), open(file, "rb").read()) for file in modules)]
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


guest.main({"moving": moving})
