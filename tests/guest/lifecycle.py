#!/usr/bin/env python3
"""How a machine ends, what keys and signals do, where its console goes. `lifecycle.py SCENARIO` is one test."""
import os
import re
import select
import signal
import socket
import tempfile
import time

import guest
from guest import BOOT_SECONDS, Guest, busybox, busybox_arguments, wait_for_shell


def reset():
    with busybox() as vm:
        vm.type("reboot\n")
        vm.expect("resetting|Restarting|reboot: ", 30)
        wait_for_shell(vm)  # the same machine once more
        assert vm.run("cut -d. -f1 /proc/uptime").isdigit()
        vm.type("\1r")  # and by key
        vm.expect(r"poweroff +\(or Ctrl-A x", BOOT_SECONDS)
        vm.type("\1x")
        vm.finish(5, 5)


def reset_exit():
    with busybox("--on-reset", "exit") as vm:
        vm.type("reboot\n")
        vm.finish(3)


def panic():
    with busybox() as vm:
        vm.run("grep -q pvpanic /proc/modules")
        vm.type("echo c >/proc/sysrq-trigger\n")
        vm.finish(4)
        assert "panic" in vm.stderr()


def triple_fault():
    """The kernel's last resort to reboot: an interrupt without a descriptor table."""
    arguments = busybox_arguments()
    arguments[arguments.index("console=ttyS0 quiet")] += " reboot=triple"
    with Guest(arguments) as vm:
        wait_for_shell(vm)
        vm.type("reboot -f\n")
        vm.finish(4)
        assert "triple fault" in vm.stderr()


def power_button():
    with busybox() as vm:
        vm.signal(signal.SIGTERM)
        vm.finish(0)
    with busybox(name="key") as vm:
        vm.type("\1p")
        vm.finish(0)


def second_signal():
    """Nobody listens to the power button yet; a second signal is final."""
    for first, second in ((signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM), (signal.SIGHUP, None)):
        with Guest(busybox_arguments()) as vm:
            time.sleep(2)
            vm.signal(first)
            time.sleep(0.5)
            if second:
                assert vm.process.poll() is None, "ended at the first signal"
                vm.signal(second)
            vm.finish(5, 5)


def keys():
    with busybox() as vm:
        vm.type("\1h")
        time.sleep(1)
        for key in "xprnsh":
            assert f"Ctrl-A {key}" in vm.stderr(), f"the help has no key {key}"
        vm.type("\1s")
        time.sleep(1)
        assert re.search("rip [0-9a-f]{16}", vm.stderr())
        # Everything typed reaches the guest in order, however fast.
        text = "".join(f"{n:04}" for n in range(400))
        assert vm.run(f"echo {text}") == text
        # Ctrl-A itself, and an interrupt from the keyboard.
        vm.type("od -c | head -n 1\n\1\1\n\4")
        vm.expect("001", 20)
        vm.run("true")
        vm.type("sleep 1000\n")
        time.sleep(1)
        vm.type("\3")
        vm.run("true", 10)
        vm.signal(signal.SIGUSR1)
        time.sleep(1)
        assert len(re.findall("rip [0-9a-f]{16}", vm.stderr())) == 2, "SIGUSR1 printed no state"
        vm.type("\1n")
        time.sleep(1)
        assert int(vm.run("dmesg | grep -ci 'nmi received for unknown reason'")) == 1, "the guest saw no NMI"
        vm.type("\1x")
        vm.finish(5, 5)


def hung():
    """A guest that takes no input can be left by key."""
    arguments = busybox_arguments()
    arguments[arguments.index("console=ttyS0 quiet")] += " rdinit=/bin/true panic=0"
    with Guest([*arguments, "--on-panic", "ignore"]) as vm:
        vm.expect("Kernel panic", BOOT_SECONDS)
        time.sleep(1)
        for _ in range(20):
            vm.type("is anybody there?\r")
        time.sleep(1)
        vm.type("\1x")
        vm.finish(5, 5)


def listen(fd, pattern, seconds):
    """Collects what comes until the pattern shows up."""
    end = time.monotonic() + seconds
    text = b""
    while not re.search(pattern, text):
        ready = select.select([fd], [], [], max(end - time.monotonic(), 0))[0]
        assert ready, f"no {pattern!r} within {seconds} s in {text[-500:]!r}"
        data = os.read(fd if isinstance(fd, int) else fd.fileno(), 4096)
        assert data, f"end of data while waiting for {pattern!r} after {text[-500:]!r}"
        text += data


def console_pty():
    with Guest(busybox_arguments("--console", "pty")) as vm:
        end = time.monotonic() + 10
        while not (found := re.search(r"--console is (/dev/\S+)", vm.stderr())):
            assert time.monotonic() < end, "no name of a pseudo-terminal"
            time.sleep(0.1)
        fd = os.open(found.group(1), os.O_RDWR | os.O_NOCTTY)
        listen(fd, rb"Ctrl-A x[\s\S]*# ", BOOT_SECONDS)
        os.write(fd, b"echo 'by'' pty'\n")
        listen(fd, b"by pty", 30)
        os.write(fd, b"poweroff\n")
        vm.finish(0)
        os.close(fd)


def console_unix():
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/console"
        with Guest(busybox_arguments("--console", f"unix:{path}")) as vm:
            def connect():
                end = time.monotonic() + 10
                while True:
                    try:
                        connection = socket.socket(socket.AF_UNIX)
                        connection.settimeout(BOOT_SECONDS)
                        connection.connect(path)
                        return connection
                    except OSError:
                        connection.close()
                        assert time.monotonic() < end, "nobody listens on the socket"
                        time.sleep(0.1)
            connection = connect()
            listen(connection, rb"Ctrl-A x[\s\S]*# ", BOOT_SECONDS)
            connection.close()
            time.sleep(1)
            with connect() as connection:  # clients come and go
                connection.sendall(b"echo 'by'' socket'\n")
                listen(connection, b"by socket", 30)
                connection.sendall(b"poweroff\n")
                vm.finish(0)
        assert not os.path.exists(path), "the socket is left behind"


def console_file():
    """And none: a guest without any console still hears the power button."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/console"
        pid_file = f"{folder}/pid"
        with Guest(busybox_arguments("--console", f"file:{path}", "--pid-file", pid_file)) as vm:
            end = time.monotonic() + BOOT_SECONDS
            while not os.path.exists(path) or b"Ctrl-A x" not in open(path, "rb").read():
                assert vm.process.poll() is None and time.monotonic() < end, "the shell's greeting is not in the file"
                time.sleep(0.2)
            assert int(open(pid_file).read()) == vm.process.pid
            boot_seconds = vm.seconds()
            time.sleep(1)
            vm.signal(signal.SIGTERM)
            vm.finish(0)
        with Guest(busybox_arguments("--console", "none"), "none") as vm:
            time.sleep(2 * boot_seconds + 5)
            vm.signal(signal.SIGTERM)
            vm.finish(0)
            assert not vm.transcript, "output in spite of --console none"


guest.main({
    "reset": reset,
    "reset-exit": reset_exit,
    "panic": panic,
    "triple-fault": triple_fault,
    "power-button": power_button,
    "second-signal": second_signal,
    "keys": keys,
    "hung": hung,
    "console-pty": console_pty,
    "console-unix": console_unix,
    "console-file": console_file,
})
