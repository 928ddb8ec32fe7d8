#!/usr/bin/env python3
"""doppel migrate and doppel receive: a guest that keeps what is typed moves between processes, and stays where it was when something fails. `migrate.py DOPPEL SCENARIO` is one test."""
import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading

import small_guests
from vms import KEEPS, LIMIT, doppel, kernel, knows, run, runtime, start, state, type_in, vms, wait_for

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from certificates import self_signed, signed


@contextlib.contextmanager
def tcp_receiver(*options):
    """doppel receive at a free port, and its address."""
    with receiver(*options, listen="127.0.0.1:0", shown=r"127\.0\.0\.1:\d+") as process:
        yield process, process.address


@contextlib.contextmanager
def receiver(*options, listen="unix:there", shown="unix:there", wrapper=()):
    """doppel receive, ready to be connected to; ended, if it has not by itself. `wrapper` is a command that runs it."""
    process = subprocess.Popen([*wrapper, doppel, "receive", "--listen", listen, *options], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
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


def migrate(source, target, *options, sending=()):
    with receiver("--name", target, *options) as there:
        run("receive", "--listen", "unix:there", status=1)
        assert "already in use" in run.errors, run.errors
        said = run("migrate", source, "unix:there", *sending)
        assert finish(there) == target
    if "--json" in sending:
        told = json.loads(said)
        assert told["name"] == source and told["to"] == "unix:there" and told["bytes"] > 0 and told["downtime_ns"] > 0, told
    else:
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
        migrate("second", "third", "--engine", "interp", sending=["--compress", "zstd=3", "--bandwidth", "50M"])
        knows("third", "abc")
        run("pause", "third")
        migrate("third", "fourth", sending=["--json"])
        assert state("fourth") == "paused"
        type_in("fourth", "d")
        run("resume", "fourth")
        knows("fourth", "abcd")
        events = [json.loads(line)["event"] for line in run("events", "--json", "third").splitlines()]
        assert events[-2:] == ["migrating", "ended"], events
        run("kill", "fourth")
        run("rm", "fourth", "third", "second", "vm")


def tcp():
    """Over TCP: with a secret, with certificates, as it is. Whoever has others is a stranger, and the receiver goes on waiting for the right one."""
    with runtime():
        self_signed("stranger")
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


HELLO, WELCOME, PAGES, STATE, READY, GO, STARTED, FAILED, POST_COPY, REMOTE, REQUEST, ARRIVED, COMPLETE, RECOVER, DISK, FRAME, ECHO = range(1, 18)
HEADER = struct.Struct("<4sHHIIQ")


def take(connection, size):
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            return None
        data += more
    return data


class Wire(threading.Thread):
    """What lies between the two: forwards messages, and does something instead when the first one of a type comes, or with each (None)."""

    def __init__(self, message, act):
        super().__init__()
        self.message, self.act, self.reached = message, act, threading.Event()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind("between")
        self.listener.listen()
        self.start()

    def run(self):
        self.source, _ = self.listener.accept()
        os.unlink("between")
        self.target = socket.socket(socket.AF_UNIX)
        self.target.connect("there")
        ways = [threading.Thread(target=self.forward, args=way) for way in ((self.source, self.target), (self.target, self.source))]
        for way in ways:
            way.start()
        for way in ways:
            way.join()

    def forward(self, one, other):
        with contextlib.suppress(OSError):
            while (header := take(one, HEADER.size)) is not None:
                _, kind, _, size, _, _ = HEADER.unpack(header)
                body = take(one, size) if size else b""
                if body is None:  # cut in the middle
                    break
                if self.message in (kind, None) and not self.reached.is_set():
                    header, body = self.act(self, header, body)
                    if kind == self.message:
                        self.reached.set()
                other.sendall(header + body)
        self.cut()

    def cut(self):
        for end in self.source, self.target:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def cut(wire, header, body):
    wire.cut()
    return header, body


def then(wire, message, header, body):
    """Cuts it when this message comes."""
    wire.message, wire.act = message, cut
    return header, body


class CutBehindMemory:
    """Of a guest that goes before its memory has: the last page reaches the target, and then nothing goes in any direction."""

    def __init__(self):
        self.missing, self.sent, self.arrived = {}, 0, threading.Semaphore(0)

    def __call__(self, wire, header, body):
        kind = HEADER.unpack(header)[1]
        if kind == REMOTE:
            first, *words = struct.unpack(f"<{len(body) // 8}Q", body)
            self.missing |= {first + n: word for n, word in enumerate(words) if word}
        elif kind == ARRIVED:
            self.arrived.release()
        elif kind == PAGES and self.missing:
            chunk, pages = struct.unpack_from("<QQ", body)
            self.missing[chunk] = self.missing.get(chunk, 0) & ~pages
            if not any(self.missing.values()):
                assert all(self.arrived.acquire(timeout=LIMIT) for _ in range(self.sent))
                wire.target.shutdown(socket.SHUT_RD)
                wire.target.sendall(header + body)
                wire.cut()
            self.sent += 1
        return header, body


class Order:
    """Of a guest that goes before its memory has: what came unasked in the order in which it did."""

    def __init__(self):
        self.missing, self.asked, self.came = {}, set(), []

    def __call__(self, wire, header, body):
        kind = HEADER.unpack(header)[1]
        if kind == REMOTE:
            first, *words = struct.unpack(f"<{len(body) // 8}Q", body)
            self.missing |= {first + n: word for n, word in enumerate(words) if word}
        elif kind == REQUEST:
            self.asked.add(struct.unpack("<Q", body[:8])[0])
        elif kind == PAGES and self.missing:
            self.came.append(struct.unpack_from("<Q", body)[0])
        return header, body


def damage(wire, header, body):
    return header, body[:-1] + bytes([body[-1] ^ 1]) if body else body


def attempt(message, act, during=None, wrapper=(), sending=(), receiving=()):
    """One migration on which something happens; the outputs of both sides, which both must have failed."""
    with receiver("--name", "there", *receiving, wrapper=wrapper) as there:
        def kill(wire, header, body):
            for pid in [*children(there.pid), there.pid]:  # once it has ended, nobody knows whose they are
                os.kill(pid, signal.SIGKILL)
            return header, body
        wire = Wire(message, kill if act == "kill" else act)
        source = subprocess.Popen([doppel, "migrate", *sending, "vm", "unix:between"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if during:
            assert wire.reached.wait(LIMIT)
            during()
        said = source.communicate(timeout=LIMIT)
        assert source.returncode == 1 and said[0] == "", said
        wire.join(LIMIT)
        if (message, act) == (HELLO, cut):
            there.send_signal(signal.SIGTERM)  # nothing was said, so it goes on waiting
        there.said = there.communicate(timeout=LIMIT)[1]
        return said[1], there


def as_it_is(wire, header, body):
    return header, body


def newer(wire, header, body):
    """HELLO as a version might send it that nobody knows yet."""
    at = body.index(b"migration") + len(b"migration")
    return with_checksum(header, body[:at] + struct.pack("<I", 99) + body[at + 4:])


def with_checksum(header, body):
    library = ctypes.CDLL("libxxhash.so.0")
    library.XXH3_64bits.restype = library.XXH3_64bits_withSeed.restype = ctypes.c_uint64
    head = header[:-8]
    seed = library.XXH3_64bits(head, ctypes.c_size_t(len(head)))
    return head + struct.pack("<Q", library.XXH3_64bits_withSeed(body, ctypes.c_size_t(len(body)), ctypes.c_uint64(seed))), body


def children(pid):
    return [int(child) for child in open(f"/proc/{pid}/task/{pid}/children").read().split()]


def stays(message, act, text="", during=None, wrapper=(), sending=(), receiving=(), sound=lambda: knows("vm", "ab")):
    """The guest goes on where it was, with its disk, and nowhere else; one line says why."""
    said, there = attempt(message, act, during, wrapper, sending, receiving)
    assert text in said and len(said.splitlines()) == 1, said
    assert there.returncode == -signal.SIGTERM if (message, act) == (HELLO, cut) else there.returncode > 0 or act == "kill", there.returncode
    wait_for("end of the target", lambda: state("there") in (None, "ended", "died"))
    assert state("vm") == "running"
    sound()
    return there.said


def faults():
    """Whatever happens before the guest is handed over, it goes on where it was. When nobody can know whether it was, it runs on one side at most, and does on one side in the end."""
    with runtime():
        with open("disk", "wb") as disk:
            disk.truncate(1 << 20)
        start(KEEPS, "--disk", "disk", name="vm")
        type_in("vm", "ab")
        knows("vm", "ab")
        for message in HELLO, WELCOME, PAGES, STATE, READY:
            stays(message, cut, "the connection was closed")
        for message in WELCOME, PAGES, STATE:
            stays(message, "kill")
        for message in HELLO, PAGES, STATE:
            assert "damaged on its way" in stays(message, damage)
        stays(WELCOME, damage, "damaged on its way")
        stalled = threading.Event()
        stays(PAGES, lambda wire, *frame: (wire.reached.set(), stalled.wait(LIMIT), frame)[-1], "cancelled",
              lambda: (run("migrate", "--cancel", "vm"), stalled.set()))
        run("migrate", "--cancel", "vm", status=1)
        held = threading.Event()  # what was sent is to be there before the guest stands still
        stays(ECHO, lambda wire, *frame: (wire.reached.set(), held.wait(LIMIT), frame)[-1], "cancelled",
              lambda: (type_in("vm", "c"), knows("vm", "abc"), run("migrate", "--cancel", "vm"), held.set()), sound=lambda: knows("vm", "abc"))

        said, there = attempt(GO, cut)  # never arrives
        assert "did not say that it runs" in said and there.returncode != 0, said
        assert state("vm") == "paused"
        wait_for("end of the target", lambda: state("there") in (None, "ended", "died"))
        run("resume", "vm")
        knows("vm", "abc")

        said, there = attempt(STARTED, cut)  # the source does not learn of it
        assert "did not say that it runs" in said and there.returncode == 0, (said, there.returncode)
        assert (state("vm"), state("there")) == ("paused", "running")
        knows("there", "abc")
        run("resume", "vm", status=1)  # the disk is there
        assert "may run where it has migrated to" in run.errors
        assert state("vm") == "paused"
        run("kill", "vm")


# Counts the passes, at 24 MiB, in which it writes to both ends of each page from 4 MiB to 20 MiB, where it must find what it wrote in the pass before; says "." now and then, and "W" when it does not.
WRITES = bytes.fromhex("31ed bf00004000 392f753a 39affc0f00007532 8d4501 8907 8987fc0f0000 81c700100000 81ff00004001 72db 45 892d00008001 f7c5ff000000 75c7 baf8030000 b02e ee ebbd"
                       "baf8030000 b057 ee faf4ebfd")
FASTER = "--post-copy", "--bandwidth", "40M"


def writes(name):
    """Whether the guest goes on writing, and finds all as it was."""
    before = len(run("logs", name))
    wait_for("passes", lambda: len(run("logs", name)) > before + 2)
    assert set(run("logs", name)) == {"."}, run("logs", name)


def writer(*options):
    start(WRITES, "--memory", "32M", "--engine", "bt", *options, name="vm")
    writes("vm")


def post_copy():
    """A guest that writes faster than can be sent goes before its memory has. Until it has gone, failures leave it where it is; afterwards it waits for its memory, which comes over another connection."""
    with runtime():
        with open("disk", "wb") as disk:
            disk.truncate(1 << 20)
        writer("--disk", "disk")
        migrate("vm", "there", "--engine", "interp", sending=FASTER)
        writes("there")
        migrate("there", "back", "--engine", "bt", sending=(*FASTER, "--compress", "zstd"))
        writes("back")
        run("kill", "back")
        run("rm", "vm", "there", "back")

        writer()
        order = Order()  # the page that lies alone before most of the others
        with receiver("--name", "there") as there:
            wire = Wire(None, order)
            run("migrate", *FASTER, "vm", "unix:between")
            finish(there)
            wire.join(LIMIT)
        alone = 24 << 20 >> 18
        assert order.missing[alone].bit_count() == 1 and len(order.came) > 60, (order.missing, order.came)
        assert alone in [chunk for chunk in order.came if chunk not in order.asked or chunk == alone][:4], order.came
        writes("there")
        run("kill", "there")
        run("rm", "vm", "there")

        writer("--disk", "disk")
        for message in POST_COPY, REMOTE, STATE, READY:
            stays(message, cut, "the connection was closed", sending=FASTER, sound=lambda: writes("vm"))
        for message in POST_COPY, REMOTE, STATE:
            stays(message, damage, sending=FASTER, sound=lambda: writes("vm"))
        stays(REMOTE, "kill", sending=FASTER, sound=lambda: writes("vm"))

        said, there = attempt(STARTED, lambda wire, *frame: then(wire, ARRIVED, *frame), sending=FASTER)
        assert "go on with doppel receive --recover" in said and there.returncode == 0, (said, there.said)
        assert (state("vm"), state("there")) == ("paused", "running")
        run("resume", "vm", status=1)
        assert "migrate --recover" in run.errors, run.errors
        start(KEEPS, name="other")
        for wrong in ("--recover", "other"), ("vm",), ("--post-copy", "other"):  # not one that goes on, and no target that begins
            with receiver("--recover", "there") as again:
                run("migrate", *wrong, "unix:there", status=1)
                finish(again, 1)
        with receiver("--recover", "other") as again:
            run("migrate", "--recover", "vm", "unix:there", status=1)
            finish(again, 1)
        with receiver("--recover", "there") as again:
            run("migrate", "--recover", "vm", "unix:there")
            assert finish(again) == "there"
        wait_for("end of the source", lambda: state("vm") == "ended")
        writes("there")
        with receiver("--recover", "there") as again:  # it has everything
            run("migrate", "--recover", "other", "unix:there", status=1)
            finish(again, 1)
        run("kill", "there", "other")
        run("rm", "vm", "there", "other")

        writer()
        said, there = attempt(None, CutBehindMemory(), sending=FASTER)
        assert "go on with doppel receive --recover" in said and there.returncode == 0, (said, there.said)
        assert (state("vm"), state("there")) == ("paused", "running")  # it has everything, unless it had just asked for it, and the source does not know
        with receiver("--recover", "there") as again:
            run("migrate", "--recover", "vm", "unix:there")
            assert finish(again) == "there"
        wait_for("end of the source", lambda: state("vm") == "ended")
        writes("there")
        run("kill", "there")
        run("rm", "vm", "there")

        writer()
        attempt(STARTED, lambda wire, *frame: then(wire, ARRIVED, *frame), sending=FASTER)
        run("kill", "vm")  # who needs its memory can still be ended
        run("stop", "-t", "1", "there")
        assert state("there") == "ended"


def disks():
    """Disks that come along have new images there, which go again when the migration fails; those here stay as they are."""
    with runtime():
        content = os.urandom(3 << 20) + bytes(2 << 20) + os.urandom(512)
        for name in "disk", "other", "same/disk":
            os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
            with open(name, "wb") as disk:
                disk.write(content)
        os.mkdir("host")
        start(KEEPS, "--disk", "disk", "--disk", "other,readonly", "--disk", "same/disk", name="vm")
        type_in("vm", "ab")
        moving = {"sending": ["--disks"], "receiving": ["--disk-dir", "host"]}
        for message, act in (DISK, cut), (DISK, damage), (DISK, "kill"), (STATE, cut), (READY, cut):
            stays(message, act, **moving)
            for name in os.listdir("host") if act == "kill" else ():
                os.unlink(f"host/{name}")
            assert os.listdir("host") == [], (message, act)
        assert "File too large" in stays(FAILED, as_it_is, "File too large", wrapper=["prlimit", "--fsize=4096"], **moving)
        assert "--disk-dir" in stays(FAILED, as_it_is, "--disk-dir", sending=["--disks"])
        stays(FAILED, as_it_is, "nowhere", sending=["--disks"], receiving=["--disk-dir", "nowhere"])
        stalled = threading.Event()
        stays(DISK, lambda wire, *frame: (wire.reached.set(), stalled.wait(LIMIT), frame)[-1], "cancelled", lambda: (run("migrate", "--cancel", "vm"), stalled.set()), **moving)
        with open("host/disk", "w") as mine:
            mine.write("mine")
        stays(FAILED, as_it_is, "is there already", **moving)
        assert os.listdir("host") == ["disk"] and open("host/disk").read() == "mine"
        os.unlink("host/disk")

        with receiver("--name", "there", "--disk-dir", "host") as there:
            run("migrate", "--disks", "vm", "unix:there")
            finish(there)
        knows("there", "ab")
        assert sorted(os.listdir("host")) == ["2-disk", "disk"]
        for name in "disk", "same/disk", "host/disk", "host/2-disk":
            assert open(name, "rb").read() == content, name
        arguments = vms_arguments("there")
        assert [text for text in arguments if "disk" in text and "--" not in text] == [f"{os.getcwd()}/host/disk,format=raw", f"{os.getcwd()}/host/2-disk,format=raw"], arguments
        run("kill", "there")


def merged():
    """Files below the disk that were replaced by what they have become, as snapshots went, are still those of the machine."""
    with runtime():
        with open("disk", "wb") as disk:
            disk.truncate(1 << 20)
        start(KEEPS, "--disk", "disk", name="vm")
        type_in("vm", "ab")
        for name in "one", "two", "three":
            run("snapshot", "create", "vm", name)
        run("snapshot", "delete", "vm", "two")
        run("snapshot", "delete", "vm", "one")
        migrate("vm", "there")
        knows("there", "ab")
        run("kill", "there")


def vms_arguments(name):
    return json.loads(run("inspect", name))[0]["vm"]["arguments"]


def strangers():
    """Who is no target, or cannot make such a machine, and who is no source."""
    with runtime():
        with open("disk", "wb") as disk:
            disk.truncate(1 << 20)
        start(KEEPS, "--disk", "disk", name="vm")
        type_in("vm", "ab")
        for answer in b"", b"HTTP/1.1 400 Bad Request\r\n\r\n" * 4, HEADER.pack(b"DPMF", READY, 0, 0, 0, 0), bytes(100):
            listener = socket.socket(socket.AF_UNIX)
            listener.bind("stranger")
            listener.listen()
            command = subprocess.Popen([doppel, "migrate", "vm", "unix:stranger"], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            connection, _ = listener.accept()
            connection.sendall(answer)
            connection.shutdown(socket.SHUT_WR)
            assert command.wait(LIMIT) == 1
            os.unlink("stranger")
            assert state("vm") == "running"
        run("migrate", "vm", "unix:nobody", status=1)
        run("migrate", "vm", "unix:" + "x" * 200, status=2)
        run("migrate", "vm", "unix:there", "--downtime", "0", status=2)
        for wrong in ("--compress", "lz4"), ("--compress", "zstd=20"), ("--bandwidth", "1x"), ("--bandwidth", "0"), ("--bandwidth", "9999999999G"):
            run("migrate", "vm", "unix:there", *wrong, status=2)
        run("migrate", "nobody", "unix:there", status=1)
        for said in b"GET / HTTP/1.0\r\n\r\n" * 3, HEADER.pack(b"DPMF", HELLO, 0, 1 << 31, 0, 0), HEADER.pack(b"DPMF", HELLO, 0, 0, 0, 0):
            with receiver() as there:
                connection = socket.socket(socket.AF_UNIX)
                connection.connect("there")
                connection.sendall(said)
                connection.shutdown(socket.SHUT_WR)
                assert len(finish(there, 1).splitlines()) == 1
        with receiver() as there:  # the name is taken: both are here
            run("migrate", "vm", "unix:there", status=1)
            finish(there, 2)
        os.rename("disk", "other")
        with open("disk", "wb") as disk:  # not the one that the guest has
            disk.truncate(1 << 20)
        with receiver("--name", "there") as there:
            run("migrate", "vm", "unix:there", status=1)
            assert "does not use this file" in run.errors, run.errors
            finish(there, 2)
        os.unlink("disk")
        with receiver("--name", "there") as there:
            run("migrate", "vm", "unix:there", status=1)
            assert "no such file" in run.errors, run.errors
            finish(there, 2)
        os.rename("other", "disk")
        knows("vm", "ab")
        migrate("vm", "there")
        knows("there", "ab")


def limits():
    """A target of another version, or without room; a migration that is cancelled at each moment before the guest stands still."""
    with runtime():
        with open("disk", "wb") as disk:
            disk.truncate(1 << 20)
        start(KEEPS, "--disk", "disk", name="vm")
        type_in("vm", "ab")
        stays(HELLO, newer, "section \"migration\"")
        rooms = ("--as=60000000", "Cannot allocate memory"), ("--nofile=12", "Too many open files"), ("--nofile=28", "Too many open files"), ("--fsize=4096", "File too large")
        for limit, text in rooms:
            assert text in stays(FAILED, as_it_is, text, wrapper=["prlimit", limit])
        for message in HELLO, WELCOME, PAGES:
            stalled = threading.Event()
            stays(message, lambda wire, *frame: (wire.reached.set(), stalled.wait(LIMIT), frame)[-1], "cancelled", lambda: (run("migrate", "--cancel", "vm"), stalled.set()))
        knows("vm", "ab")
        migrate("vm", "there")
        knows("there", "ab")


def baseline():
    """The features of a fleet: what all hosts have, what a guest with that sees, and hosts that lack some of it."""
    def register(description, leaf, name):
        return next(entry for modifier in description["cpuid_modifiers"] if (modifier["leaf"], modifier["subleaf"]) == (leaf, "0") for entry in modifier["modifiers"] if entry["register"] == name)

    def write(path, bitmap):
        entry["bitmap"] = "0b" + bitmap
        with open(path, "w") as file:
            json.dump(host, file)
    with runtime():
        host = json.loads(run("cpu-baseline"))
        entry = register(host, "0x7", "ebx")
        bits = entry["bitmap"][2:]
        feature, absent = bits.rindex("1"), bits.index("0")
        write("host", bits)
        write("less", bits[:feature] + "0" + bits[feature + 1:])
        write("more", bits[:absent] + "1" + bits[absent + 1:])
        write("short", bits[:feature] + "x" + bits[feature + 1:])
        vendor = register(host, "0", "ebx")
        vendor["bitmap"] = f"0b{int(vendor['bitmap'], 2) ^ 1:032b}"
        write("vendor", bits)
        assert json.loads(run("cpu-baseline", "host", "less", "more")) == json.load(open("less"))
        assert json.loads(run("cpu-baseline", "more")) == json.load(open("more"))  # of another host
        assert json.loads(run("cpu-baseline", "vendor")) == json.load(open("vendor"))
        for wrong, why in ("short", ""), ("kernel", ""), ("nothing", ""), ("vendor", "another vendor"):
            run("cpu-baseline", "host", wrong, status=1)
            assert wrong in run.errors and why in run.errors, run.errors
        # CPUID leaf 7: EBX's bit, said at the serial port
        code = b"\xb8\x07\0\0\0\x31\xc9\x0f\xa2\x89\xd8\xc1\xe8" + bytes((31 - feature,)) + b"\x24\x01\x04\x30" + small_guests.COM1 + b"\xee" + small_guests.POWER_OFF
        for engine in "interp", "bt":
            for options, seen in ([], "1"), (["--cpu-baseline", "host"], "1"), (["--cpu-baseline", "less"], "0"):
                run("run", "--kernel", kernel(code), "--memory", "4M", "--net", "none", "--engine", engine, "--console", "file:out", *options)
                assert open("out").read() == seen, (options, open("out").read())
        for wrong, why in ("more", "lacks"), ("kernel", ""), ("nothing", ""), ("vendor", "another vendor"):
            run("run", "--kernel", kernel(code), "--cpu-baseline", wrong, status=2)
            assert wrong in run.errors and why in run.errors and len(run.errors.splitlines()) == 1, run.errors
        start(KEEPS, "--cpu-baseline", "less", name="vm")
        type_in("vm", "ab")
        migrate("vm", "there")
        knows("there", "ab")


if __name__ == "__main__":
    {"baseline": baseline, "post_copy": post_copy, "disks": disks, "merged": merged, "limits": limits, "move": move, "tcp": tcp, "faults": faults, "strangers": strangers}[sys.argv[2]]()
