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
def tcp_receiver(*options):
    """doppel receive at a free port, and its address."""
    with receiver(*options, listen="127.0.0.1:0", shown=r"127\.0\.0\.1:\d+") as process:
        yield process, process.address


@contextlib.contextmanager
def receiver(*options, listen="unix:there", shown="unix:there"):
    """doppel receive, ready to be connected to; ended, if it has not by itself."""
    process = subprocess.Popen([doppel, "receive", "--listen", listen, *options], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stderr.readline()
        found = re.fullmatch(rf"doppel: waiting for a virtual machine at ({shown})\n", line)
        assert found, line
        process.address = found[1]
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


def certificates():
    """An authority and two who are signed by it, and one that is signed by itself: files NAME.pem and NAME.key."""
    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], check=True, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    for name in "authority", "stranger":
        openssl("req", "-x509", *key, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}", "-days", "2")
    for name in "one", "other":
        openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "authority.pem", "-CAkey", "authority.key", "-CAcreateserial", "-out", f"{name}.pem", "-days", "2")


def signed(name):
    return ["--cert", f"{name}.pem", "--cert-key", f"{name}.key", "--ca", "authority.pem"]


def tcp():
    """Over TCP: with a secret, with certificates, as it is. Whoever has others is a stranger, and the receiver goes on waiting for the right one."""
    with runtime():
        certificates()
        for name in "key", "other-key":
            with open(name, "wb") as file:
                file.write(os.urandom(32))
        with open("short", "wb") as file:
            file.write(b"0123456789")
        run("receive", "--listen", "127.0.0.1:0", status=2)
        run("receive", "--listen", "127.0.0.1:0", "--key-file", "short", status=2)
        start(KEEPS, name="vm0")
        run("migrate", "vm0", "127.0.0.1:1", status=2)
        type_in("vm0", "ab")
        ways = (["--key-file", "key"], ["--key-file", "key"], ["--key-file", "other-key"]), (signed("one"), signed("other"), signed("stranger")), (["--insecure"], ["--insecure"], None)
        for n, (here, there, wrong) in enumerate(ways):
            with tcp_receiver("--name", f"vm{n + 1}", *there) as (process, address):
                if wrong:
                    run("migrate", f"vm{n}", address, *wrong, status=1)
                    knows(f"vm{n}", "ab")
                run("migrate", f"vm{n}", address, *here)
                assert finish(process) == f"vm{n + 1}"
            knows(f"vm{n + 1}", "ab")
        run("kill", "vm3")
        run("rm", "vm3", "vm2", "vm1", "vm0")


if __name__ == "__main__":
    {"move": move, "tcp": tcp}[sys.argv[2]]()
