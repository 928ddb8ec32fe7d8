#!/usr/bin/env python3
"""A complete kernel in the background: its console from a terminal, pause, reset, and a shutdown that it makes itself. `background.py SCENARIO` is one test."""
import contextlib
import os
import shutil
import subprocess
import tempfile
import time

import guest
import metadata
from guest import BOOT_SECONDS, Guest, busybox_arguments, doppel, wait_for_shell


def command(*arguments, seconds=60):
    done = subprocess.run([doppel, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, f"doppel {' '.join(arguments)}: {done.returncode} {done.stdout}{done.stderr}"
    return done.stdout


@contextlib.contextmanager
def started(*options):
    arguments = busybox_arguments(*options)  # or skipped
    folder = tempfile.mkdtemp(prefix="doppel-background-")
    os.environ["XDG_RUNTIME_DIR"] = folder
    try:
        command("run", "-d", "--name", "vm", *arguments, seconds=BOOT_SECONDS)
        yield
    finally:
        subprocess.run([doppel, "rm", "-f", "vm"], capture_output=True, timeout=60)
        shutil.rmtree(folder)


def until(terminal, condition):
    """The guest waits for it."""
    terminal.run(f"n=0; until {condition}; do n=$((n+1)); test $n -lt 300 || break; usleep 100000; done; {condition}", 60)


def hotplug():
    """A disk and a network card come, are used, and go, all inside the sandbox: a broker opens what is plugged."""
    with started("--net", "user"), tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/image", "wb") as image:
            image.write(b"plugged" + bytes((8 << 20) - 7))
        with Guest(["--recent", "vm"], "attached", command="console") as terminal:
            wait_for_shell(terminal)
            for _ in range(2):
                command("plug", "--disk", f"{folder}/image,id=extra", "vm")
                command("plug", "--net", "user,id=card", "vm")
                until(terminal, "test -b /dev/vda -a -d /sys/class/net/eth1")
                assert terminal.run("head -c 7 /dev/vda") == "plugged"
                terminal.run("dd if=/dev/urandom of=/dev/vda bs=64k seek=1 count=64 conv=fsync 2>/dev/null && ip link set eth0 down && ip link set eth1 up && udhcpc -q -n -i eth1 && ping -c 1 10.0.2.2", 60)
                for name in "extra", "card":
                    command("unplug", "vm", name)
                until(terminal, "test ! -e /dev/vda -a ! -d /sys/class/net/eth1")
                until(terminal, "test ! -e /sys/bus/pci/devices/0000:00:0b.0 -a ! -e /sys/bus/pci/devices/0000:00:04.0")
            complaints = terminal.run("dmesg | grep -E 'BUG:|Oops|Call Trace|I/O error|ACPI Error|ACPI BIOS Error' || true")
            assert not complaints, f"the kernel complains:\n{complaints}"
            command("stop", "-t", "60", "vm", seconds=100)
            terminal.finish(0)
        assert any(open(f"{folder}/image", "rb").read()[65536:]), "nothing was written"
        assert command("events", "vm").count("device-removed") == 4


def hotplug_tap():
    """The same with an interface of the host's, in a network of this test's own."""
    metadata.Tap("tap0", "172.16.0.1/24")
    with started("--net", "none"):
        with Guest(["--recent", "vm"], "attached", command="console") as terminal:
            wait_for_shell(terminal)
            for turn in range(1, 3):
                command("plug", "--net", "tap:tap0,id=card", "vm")
                until(terminal, "test -d /sys/class/net/eth0")
                terminal.run("ip link set eth0 up && ip addr add 172.16.0.2/24 dev eth0 && ping -c 1 -w 20 172.16.0.1", 60)
                command("unplug", "vm", "card")
                deadline = time.monotonic() + 60
                while command("events", "vm").count("device-removed") < turn:
                    assert time.monotonic() < deadline, "the guest does not let the card go"
                    time.sleep(0.05)
            command("kill", "vm")
            terminal.finish(0)


def background():
    with started():
        with Guest(["--recent", "vm"], "attached", command="console") as terminal:
            wait_for_shell(terminal)
            assert terminal.run("echo there").endswith("there")
            terminal.type("\x1d")
            terminal.finish(0)
        command("pause", "vm")
        with Guest(["vm"], "attached again", command="console") as terminal:
            terminal.type("echo 'wo''ke'\n")
            command("resume", "vm")
            terminal.expect("woke", 30)
            command("reset", "vm")
            wait_for_shell(terminal)
            assert terminal.run("cut -d. -f1 /proc/uptime").isdigit()
            assert command("stop", "-t", "60", "vm", seconds=100) == "vm\n"
            terminal.finish(0)
        assert '"reason": "shutdown"' in command("ps", "-a", "--json")
        log = command("logs", "vm")
        assert log.count("or Ctrl-A x") == 2, log[-2000:]
        assert "Power down" in log
        command("rm", "vm")


guest.main({"background": background, "hotplug": hotplug, "hotplug-tap": hotplug_tap})
