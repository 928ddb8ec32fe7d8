#!/usr/bin/env python3
"""doppel migrate and doppel receive: a guest that keeps what is typed moves between processes, and stays where it was when something fails. `migrate.py DOPPEL SCENARIO` is one test."""
import contextlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys

from vms import LIMIT, ask, doppel, run, runtime, start, state, vms, wait_for

# Each byte from the serial port goes to a page of its own, from 0x200000 on; "?" says them all.
KEEPS = bytes.fromhex("be00002000 bafd030000 eca8017504f390ebf7 baf8030000ec 3c3f740a 8806 81c600100000 ebde bf00002000 39f773d5 8a07ee 81c700100000 ebf1")


def type_in(name, text):
    assert ask(name, "POST", "/doppel/v1/console", text.encode())[0] == 200


def knows(name, text):
    """Whether the guest has kept just that, and runs."""
    before = len(run("logs", name))
    type_in(name, "?")
    wait_for(text, lambda: len(run("logs", name)) >= before + len(text))
    said = run("logs", name)[before:]
    assert said == text, f"{said!r}, not {text!r}"


@contextlib.contextmanager
def receiver(*options):
    """doppel receive, ready to be connected to; ended, if it has not by itself."""
    process = subprocess.Popen([doppel, "receive", "--listen", "unix:there", *options], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stderr.readline()
        assert line == "doppel: waiting for a virtual machine at unix:there\n", line
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=LIMIT)


def finish(process, status=0):
    out, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == status, (process.returncode, out, errors)
    return out.strip() if status == 0 else errors


def migrate(source, target, *options):
    with receiver("--name", target, *options) as there:
        said = run("migrate", source, "unix:there")
        assert finish(there) == target
    assert re.match(rf"{source} runs at unix:there: [0-9.]+ s, \d+ MiB in \d+ rounds, still for [0-9.]+ ms$", said), said
    wait_for("end of the source", lambda: state(source) == "ended")
    assert vms()[source]["reason"] == "migrated", vms()[source]


def move():
    """There and back, with other engines, twice in a chain; a paused one stays paused."""
    with runtime():
        start(KEEPS, name="vm")
        type_in("vm", "ab")
        knows("vm", "ab")
        migrate("vm", "second", "--engine", "bt")
        knows("second", "ab")
        type_in("second", "c")
        migrate("second", "third", "--engine", "interp")
        knows("third", "abc")
        run("pause", "third")
        migrate("third", "fourth")
        assert state("fourth") == "paused"
        type_in("fourth", "d")
        run("resume", "fourth")
        knows("fourth", "abcd")
        events = [json.loads(line)["event"] for line in run("events", "--json", "third").splitlines()]
        assert events[-2:] == ["migrating", "ended"], events
        run("kill", "fourth")
        run("rm", "fourth", "third", "second", "vm")


if __name__ == "__main__":
    {"move": move}[sys.argv[2]]()
