#!/usr/bin/env python3
"""A complete kernel in the background: its console from a terminal, pause, reset, and a shutdown that it makes itself. `background.py SCENARIO` is one test."""
import contextlib
import os
import shutil
import subprocess
import tempfile

import guest
from guest import BOOT_SECONDS, Guest, busybox_arguments, doppel, wait_for_shell


def command(*arguments, seconds=60):
    done = subprocess.run([doppel, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, f"doppel {' '.join(arguments)}: {done.returncode} {done.stdout}{done.stderr}"
    return done.stdout


@contextlib.contextmanager
def started(*options):
    folder = tempfile.mkdtemp(prefix="doppel-background-")
    os.environ["XDG_RUNTIME_DIR"] = folder
    try:
        command("run", "-d", "--name", "vm", *busybox_arguments(*options), seconds=BOOT_SECONDS)
        yield
    finally:
        subprocess.run([doppel, "rm", "-f", "vm"], capture_output=True, timeout=60)
        shutil.rmtree(folder)


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


guest.main({"background": background})
