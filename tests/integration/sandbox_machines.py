#!/usr/bin/env python3
"""Machines whose threads make the system calls that sandbox_rules.txt names them for. `sandbox_machines.py DOPPEL SCENARIO`; what the machines said comes last."""
import contextlib
import ctypes
import functools
import glob
import json
import os
import pathlib
import pty
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import traceback

import migrate
import sandbox_hosts
import small_guests
import snapshots
import vms
from vms import run, start, state, wait_for


TGKILL = 234
PIDFD_GETFD = 438
PTRACE_GETREGS, PTRACE_SETREGS, PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT = 12, 13, 17, 0x4206, 0x4207
ORIG_RAX, RIP, RSP = 15, 16, 19  # in struct user_regs_struct
WALL = 0x40000000
FUSE_INIT, FUSE_SYNCFS = 26, 50


@contextlib.contextmanager
def telling(runtime):
    """A runtime directory whose machines' messages are said before it goes."""
    with runtime() as folder:
        try:
            yield folder
        finally:
            for path in glob.glob(f"{folder}/doppel/*/messages.log") + glob.glob(f"{folder}/*.said"):
                with open(path, errors="replace") as file:
                    print(file.read())


libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


class Absent(Exception):
    """What the host does not have."""


vms.LIMIT = 10
runtime = vms.runtime
vms.runtime = snapshots.runtime = migrate.runtime = lambda: telling(runtime)



def foreground(code, *options, **more):
    """A machine in the foreground, as a process."""
    return subprocess.Popen([vms.doppel, "run", "--kernel", vms.kernel(code), "--memory", "4M", "--net", "none", "--engine", "interp", *options], **{"stdin": subprocess.DEVNULL, **more})


def plain():
    """Starts, speaks, powers off."""
    with vms.runtime():
        assert foreground(small_guests.say("x") + small_guests.POWER_OFF, "--cpus", "2").wait(vms.LIMIT) == 0


def migrated():
    """Goes to another process with its disk."""
    with vms.runtime():
        with open("disk", "wb") as disk:
            disk.truncate(1 << 20)
        start(vms.KEEPS, "--disk", "disk", name="vm")
        migrate.migrate("vm", "there")


def waiting():
    """A guest that says PAUSE for long."""
    with vms.runtime():
        machine = foreground(b"\xb9\x00\x10\x00\x00\xf3\x90\xe2\xfc" + small_guests.POWER_OFF)  # mov ecx, 4096; pause; loop
        assert machine.wait(vms.LIMIT) == 0


def translated():
    with vms.runtime():
        assert foreground(small_guests.say("x") + small_guests.POWER_OFF, "--engine", "bt").wait(vms.LIMIT) == 0


def signals():
    """SIGTERM is the power button, a second one the plug; with a file that says which process it is."""
    with vms.runtime() as folder:
        machine = foreground(small_guests.HALT, "--pid-file", "pid")
        wait_for("start", lambda: os.path.exists("pid") and state_of_first() == "running")
        machine.terminate()
        wait_for("button", lambda: "power-button" in run("events"))
        machine.terminate()
        assert machine.wait(vms.LIMIT) == 5 and not os.path.exists(f"{folder}/pid")


def state_of_first():
    return next((vm["state"] for vm in vms.vms().values()), None)


def stopped():
    """By SIGSTOP, and continued."""
    with vms.runtime():
        machine = foreground(small_guests.UNTIL_BUTTON)
        wait_for("start", lambda: state_of_first() == "running")
        machine.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, machine.pid, os.WSTOPPED)
        machine.send_signal(signal.SIGCONT)
        machine.terminate()
        assert machine.wait(vms.LIMIT) == 0


def sockets():
    """Consoles on Unix sockets: served, and removed at the end."""
    with vms.runtime():
        machine = foreground(small_guests.ECHO, "--console", "unix:serial")
        wait_for("socket", lambda: os.path.exists("serial") and state_of_first() == "running")
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(vms.LIMIT)
            client.connect("serial")
            client.sendall(b"a")
            assert client.recv(1) == b"a"
        run("kill", next(iter(vms.vms())))
        assert machine.wait(vms.LIMIT) == 5 and not os.path.exists("serial")


def terminal():
    """A console on a terminal, which is as it was afterwards."""
    with vms.runtime():
        master, slave = pty.openpty()
        machine = foreground(small_guests.ECHO, "--console", "stdio", stdin=slave, stdout=slave)
        os.write(master, b"typed")
        seen = b""
        while b"typed" not in seen:
            assert select.select([master], [], [], vms.LIMIT)[0]
            seen += os.read(master, 4096)
        os.write(master, b"\x01x")
        assert machine.wait(vms.LIMIT) == 5


def dying(name):
    """A signal that kills, in a thread of this name: the terminal is as it was."""
    with vms.runtime():
        master, slave = pty.openpty()
        before = termios.tcgetattr(slave)
        machine = foreground(small_guests.HALT, "--console", "stdio", stdin=slave, stdout=slave)
        wait_for("start", lambda: state_of_first() == "running" and termios.tcgetattr(slave) != before)
        threads = {pathlib.Path(path).read_text().strip(): int(path.split("/")[-2]) for path in glob.glob(f"/proc/{machine.pid}/task/*/comm")}
        thread = machine.pid if name == "main" else threads[name]
        wait_for("filter", lambda: "Seccomp:\t2" in pathlib.Path(f"/proc/{machine.pid}/task/{thread}/status").read_text())  # main's is the last
        assert libc.syscall(TGKILL, machine.pid, thread, signal.SIGABRT) == 0, threads
        assert machine.wait(vms.LIMIT) == -signal.SIGABRT and termios.tcgetattr(slave) == before


def stop_thread(thread):
    """Stops one thread of a process; what lets it go on."""
    for request in PTRACE_SEIZE, PTRACE_INTERRUPT:
        assert libc.ptrace(request, thread, None, None) == 0, os.strerror(ctypes.get_errno())
    os.waitpid(thread, WALL)
    return lambda: libc.ptrace(PTRACE_DETACH, thread, None, None)


def call_abort(pid, thread):
    """Has a thread that waits call abort()."""
    def libc_at(pid):
        return next(int(line.split("-")[0], 16) for line in pathlib.Path(f"/proc/{pid}/maps").read_text().splitlines() if "/libc.so.6" in line)
    ours, theirs = libc_at("self"), libc_at(pid)
    registers = (ctypes.c_uint64 * 27)()
    go_on = stop_thread(thread)
    assert libc.ptrace(PTRACE_GETREGS, thread, None, ctypes.addressof(registers)) == 0
    registers[ORIG_RAX], registers[RIP], registers[RSP] = 2**64 - 1, ctypes.cast(libc.abort, ctypes.c_void_p).value - ours + theirs, (registers[RSP] - 256) // 16 * 16 - 8
    assert libc.ptrace(PTRACE_SETREGS, thread, None, ctypes.addressof(registers)) == 0
    go_on()


def dying_once_at_work(*options, code, prepare=lambda: None):
    """The same by abort(), as when the C library finds its memory damaged, in a thread without a name, that enters its filter when it has something to do: when the guest gets its first byte."""
    with vms.runtime():
        for name in "first", "second":
            image(name)
        os.mkdir("shared")
        master, slave = pty.openpty()
        before = termios.tcgetattr(slave)
        machine = foreground(small_guests.TYPED + code, "--name", "vm", "--transport", "mmio", "--console", "stdio", *options, stdin=slave, stdout=slave)
        wait_for("start", lambda: state("vm") == "running" and vms.ask("vm", "GET", "/doppel/v1/vm")[0] == 200)
        prepare()
        threads = wait_for("filters", lambda: len(found := shut_in(machine.pid)) > 4 and found)  # main, the signals', API's, loop's and vCPU's
        os.write(master, b"x")
        (thread, _), = wait_for("thread", lambda: shut_in(machine.pid) - threads)
        call_abort(machine.pid, thread)
        assert machine.wait(vms.LIMIT) == -signal.SIGABRT and termios.tcgetattr(slave) == before


def shut_in(pid):
    """Threads and how many filters each has."""
    return {(thread, line) for thread in threads_of(pid) for line in pathlib.Path(f"/proc/{pid}/task/{thread}/status").read_text().splitlines() if line.startswith("Seccomp_filters:\t") and line[-1] != "0"}


def dying_worker():
    """Of a disk."""
    disk = small_guests.Disk(1, 0x200000)

    def replace():
        assert vms.ask("vm", "PATCH", "/doppel/v1/devices/d", json.dumps({"path": os.path.abspath("second")}))[0] == 204
    dying_once_at_work("--disk", "first,id=d", code=disk.begin + disk.flush() + disk.wait() + small_guests.HALT, prepare=replace)


def initialized(share):
    """The first message to a server of files."""
    return share.begin + message(share, FUSE_INIT, struct.pack("<IIII", 7, 31, 1 << 20, 0), 16 + 64)


def message(share, operation, body, room):
    return share.request(struct.pack("<IIQQIIII", 40 + len(body), operation, 1, 1, 0, 0, 0, 0) + body, room) + share.wait()


def dying_share():
    """Of a share."""
    dying_once_at_work("--share", "shared:tag", code=initialized(small_guests.Virtio(2, 0x200000, queue=1)) + small_guests.HALT)


def plugged():
    """Disks that come, change and go."""
    with vms.runtime():
        for name in "first", "second":
            with open(name, "wb") as disk:
                disk.truncate(1 << 20)
        machine = foreground(small_guests.HALT)
        name = wait_for("start", lambda: next((name for name, vm in vms.vms().items() if vm["state"] == "running"), None))
        run("plug", "--disk", "first,id=one", name)
        assert vms.ask(name, "PATCH", "/doppel/v1/devices/one", json.dumps({"path": os.path.abspath("second")}))[0] == 204
        run("unplug", name, "one")
        run("pause", name)
        run("resume", name)
        run("reset", name)
        wait_for("reset", lambda: machine.poll() is not None or '"reset"' in run("events", "--json", name))
        run("kill", name)
        assert machine.wait(vms.LIMIT) == 5


def plugged_card():
    """Of user networking, beside one that was there from the start."""
    with vms.runtime():
        machine = foreground(small_guests.HALT, "--name", "vm", "--net", "user")
        wait_for("start", lambda: state("vm") == "running")
        run("plug", "--net", "user,id=more", "vm")
        run("kill", "vm")
        assert machine.wait(vms.LIMIT) == 5


def measured():
    """What the machine uses, and what its guest does."""
    with vms.runtime():
        start(small_guests.HALT, name="vm")
        assert "process_threads" in vms.ask("vm", "GET", "/doppel/v1/metrics")[2]


def unread():
    """The guest says more than the reader of its console has taken when it ends."""
    said = 70000
    with vms.runtime():
        machine = foreground(small_guests.COM1 + b"\xb9" + struct.pack("<I", said) + b"\xee\xe2\xfd" + small_guests.POWER_OFF, stdout=subprocess.PIPE)  # mov ecx; out; loop
        assert machine.wait(vms.LIMIT) == 0 and 0 < len(machine.stdout.read()) < said


def late():
    """Clients that come when the program ends already, and waits for the last answer that another one was promised: they are told."""
    with vms.runtime() as folder:
        machine = foreground(small_guests.HALT, "--name", "vm")
        wait_for("start", lambda: state("vm") == "running")
        there, promised, new = (vms.Connection("vm") for _ in range(3))
        there.request("GET", "/doppel/v1/vm")
        assert there.getresponse().read()
        before = threads_of(machine.pid)
        promised.request("POST", "/doppel/v1/migration", "{}")  # waits for a connection to the other side
        mover, = wait_for("thread of the migration", lambda: threads_of(machine.pid) - before)
        named = {thread for thread in before if pathlib.Path(f"/proc/{machine.pid}/task/{thread}/comm").read_text().strip() in ("loop", "control")}
        for _ in range(2):
            machine.terminate()
            wait_for("button", lambda: "power-button" in run("events"))
        wait_for("end of the server", lambda: threads_of(machine.pid) == named | {machine.pid, mover})
        there.request("GET", "/doppel/v1/vm")
        new.request("GET", "/doppel/v1/vm")
        with socket.socket(socket.AF_UNIX) as handed, socket.socket(socket.AF_UNIX) as nobody:
            handed.connect(f"{folder}/doppel/vm/migrate.sock")
            socket.send_fds(handed, [b"x"], [nobody.fileno()])
            assert promised.getresponse().status == 400 and there.getresponse().status == 503
        assert machine.wait(vms.LIMIT) == 5


def tapped():
    """Interfaces of the host's that are plugged, in a network of this test's own; the broker attaches what exists and was named."""
    new_net, new_user = 0x40000000, 0x10000000
    if libc.unshare(new_net) and libc.unshare(new_net | new_user) or not os.path.exists("/dev/net/tun"):
        raise Absent("no network namespace, or no /dev/net/tun")
    for command in "ip tuntap add tap0 mode tap", "ip tuntap add tap1 mode tap", "ip link set tap0 up", "ip link add other type veth peer name end":
        if subprocess.run(command.split()).returncode:
            raise Absent(command)

    def flags(interface):
        done = subprocess.run(["ip", "-json", "link", "show", interface], capture_output=True, text=True)
        return json.loads(done.stdout)[0]["flags"] if done.returncode == 0 else None

    with vms.runtime(), open("vm.said", "w") as said:
        machine = foreground(small_guests.HALT, "--name", "vm", stderr=said)
        wait_for("start", lambda: state("vm") == "running")
        for card, why in ("tap:missing", "no such interface"), ("tap:other", "not a single-queue tap"), ("tap:tap%d", "not an interface's name"), ("user", "user networking can only be plugged where"):
            run("plug", "--net", card, "vm", status=1)
            assert why in run.errors, run.errors
        assert flags("missing") is None and "LOWER_UP" not in flags("tap0")
        run("plug", "--net", "tap:tap0,id=card", "vm")
        assert "LOWER_UP" in flags("tap0")
        for card, why in ("tap:tap0", "another program has the interface"), ("tap:tap1,id=card", "have the id"):
            run("plug", "--net", card, "vm", status=1)
            assert why in run.errors, run.errors
        run("plug", "--net", "tap:tap1,id=down", "vm")
        assert "'tap:tap1': the interface is down" in pathlib.Path("vm.said").read_text()
        run("kill", "vm")
        assert machine.wait(vms.LIMIT) == 5


class Serve:
    """Behind the API of other tools."""
    def __init__(self, folder, identity, engine="interp"):
        self.identity = identity
        self.server = subprocess.Popen([vms.doppel, "serve", "--api-sock", f"{identity}.sock", "--id", identity, "--engine", engine], stdin=subprocess.DEVNULL, stderr=open(f"{identity}.said", "w"))
        wait_for("start", lambda: state(identity) == "starting" and os.path.exists(f"{identity}.sock"))
        self.connection = vms.Connection(identity)
        self.connection.path = f"{folder}/{identity}.sock"

    def request(self, method, path, body=None, status=None):
        self.connection.request(method, path, json.dumps(body) if body else None)
        answer = self.connection.getresponse()
        text = answer.read().decode()
        assert answer.status == status or not status and answer.status in (200, 204), f"{method} {path}: {answer.status} {text}"

    def snapshot(self, state_file, memory, kind="Full", status=None):
        self.request("PATCH", "/vm", {"state": "Paused"})
        self.request("PUT", "/snapshot/create", {"snapshot_path": state_file, "mem_file_path": memory, "snapshot_type": kind}, status)

    def load(self, state_file, memory):
        self.request("PUT", "/snapshot/load", {"snapshot_path": state_file, "mem_backend": {"backend_type": "File", "backend_path": memory}, "resume_vm": True})

    def end(self, broker=True):
        run("kill", self.identity)
        status = self.server.wait(vms.LIMIT)
        with open(f"{self.identity}.said") as said:
            text = said.read()
        assert status == 0 and (not broker or "a broker for files" not in text), text


def served(broker=True):
    """Log, metrics, a snapshot into files that the client names, a disk that is replaced, and a machine from the snapshot."""
    with vms.runtime() as folder:
        for name in "disk", "other":
            image(name)
        tool = Serve(folder, "tool")
        tool.request("PUT", "/logger", {"log_path": f"{folder}/log", "level": "Debug", "show_level": True, "show_log_origin": True})
        tool.request("PUT", "/metrics", {"metrics_path": f"{folder}/metrics"})
        tool.request("PUT", "/boot-source", {"kernel_image_path": vms.kernel(small_guests.say("tool") + small_guests.HALT)})
        tool.request("PUT", "/drives/d", {"drive_id": "d", "is_root_device": False, "is_read_only": False, "path_on_host": f"{folder}/disk"})
        tool.request("PUT", "/actions", {"action_type": "InstanceStart"})
        tool.request("PATCH", "/drives/d", {"drive_id": "d", "path_on_host": f"{folder}/other"})
        tool.request("PUT", "/actions", {"action_type": "FlushMetrics"})
        tool.snapshot(f"{folder}/state", f"{folder}/memory")
        tool.request("PATCH", "/vm", {"state": "Resumed"})
        resource.prlimit(tool.server.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        tool.snapshot(f"{folder}/no-state", f"{folder}/no-memory", status=400)
        assert not [name for name in os.listdir() if name.startswith("no-")]
        tool.end(broker)
        second = Serve(folder, "second")
        second.load(f"{folder}/state", f"{folder}/memory")
        second.request("GET", "/vm/config")
        second.end(broker)


def updated():
    """A snapshot brings the files of the one before up to date, which another machine runs from meanwhile."""
    with vms.runtime() as folder:
        tool, second = Serve(folder, "tool"), Serve(folder, "second")
        tool.request("PUT", "/boot-source", {"kernel_image_path": vms.kernel(small_guests.say("tool") + small_guests.HALT)})
        tool.request("PUT", "/actions", {"action_type": "InstanceStart"})
        tool.snapshot("state", "memory")
        second.load("state", "memory")
        before = os.stat("memory").st_ino
        tool.snapshot("state", "memory", "Diff")
        assert os.stat("memory").st_ino != before
        second.end()
        tool.snapshot("state", "memory", "Diff")
        tool.end()


def served_without_broker():
    """The same where no process can take another's descriptors: the threads open files themselves, before they name nothing new."""
    sandbox_hosts.refuse(1, PIDFD_GETFD)
    served(False)


def direct(program="scattered", append="pieces=200 rounds=1"):
    """User code on the processor itself, in processes of their own."""
    program = os.path.join(os.path.dirname(os.environ["REAL_DOPPEL"]), "tests/conform", program)
    with vms.runtime():
        done = subprocess.run([vms.doppel, "run", "--kernel", program, "--memory", "128M", "--engine", "bt", "--direct", "always", "--net", "none", "--console", "file:out",
                               "--on-reset", "exit", "--cpus", "2", "--append", f"direct {append}"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=vms.LIMIT)
        print(done.stderr)
        with open("out", errors="replace") as out:
            assert "DONE 0 failures" in out.read() and "is translated" not in done.stderr and done.returncode == 0


@contextlib.contextmanager
def endless():
    """A machine whose user code runs for long on the processor itself; and its process that does, in one of these states."""
    program = os.path.join(os.path.dirname(os.environ["REAL_DOPPEL"]), "tests/conform/scattered")

    def child(states):
        for task in glob.glob(f"/proc/{machine.pid}/task/*/children"):
            for found in pathlib.Path(task).read_text().split():
                fields = pathlib.Path(f"/proc/{found}/stat").read_text().rpartition(")")[2].split()
                if fields[0] in states and fields[3] == found:  # has a session of its own
                    return int(found)
        return None
    with vms.runtime():
        machine = subprocess.Popen([vms.doppel, "run", "--name", "vm", "--kernel", program, "--memory", "128M", "--engine", "bt", "--direct", "always", "--net", "none", "--console", "none",
                                    "--append", "direct pieces=2000 rounds=1 repeats=100000000"], stdin=subprocess.DEVNULL)
        wait_for("user code", lambda: machine.poll() is not None or child("R"))
        yield machine, child


def direct_paused():
    """Its process is killed while it stands still, and given up."""
    with endless() as (machine, child):
        run("pause", "vm")
        os.kill(killed := child("tT"), signal.SIGKILL)
        run("resume", "vm")
        wait_for("its end", lambda: machine.poll() is not None or not os.path.exists(f"/proc/{killed}"))
        run("kill", "vm")
        assert machine.wait(vms.LIMIT) == 5


def direct_ended():
    """By a signal."""
    with endless() as (machine, child):
        machine.terminate()
        wait_for("button", lambda: "power-button" in run("events"))
        machine.terminate()
        assert machine.wait(vms.LIMIT) == 5


def threads_of(pid):
    return {int(thread) for thread in os.listdir(f"/proc/{pid}/task")}


def image(name):
    with open(name, "wb") as disk:
        disk.truncate(1 << 20)


def replaced():
    """A disk is replaced, and the guest reads, writes, flushes and discards in the new one: by threads that a thread of the API has made."""
    disk = small_guests.Disk(1, 0x200000)
    requests = (lambda: disk.write(8, b"written")), (lambda: disk.read(8)), disk.flush, lambda: disk.discard(64, 64)
    with vms.runtime():
        image("first")
        image("second")
        start(small_guests.TYPED + disk.begin + b"".join(request() + disk.wait() for request in requests) + small_guests.say("through") + small_guests.HALT, "--transport", "mmio",
              "--disk", "first,id=d", name="vm")
        assert vms.ask("vm", "PATCH", "/doppel/v1/devices/d", json.dumps({"path": os.path.abspath("second")}))[0] == 204
        vms.type_in("vm", "x")
        wait_for("requests", lambda: state("vm") != "running" or run("logs", "vm") == "through")
        with open("second", "rb") as second:
            assert second.read()[8 * 512:][:7] == b"written"
        run("kill", "vm")


def busy():
    """The machine ends while a disk's request is under way, for as long as its threads stand still; requests of another, which were kept back by a limit, begin then. A third has what is not written yet."""
    held, limited, image_disk = (small_guests.Disk(n + 1, 0x200000 + 0x20000 * n) for n in range(3))
    code = b"".join(disk.begin for disk in (held, limited, image_disk)) + small_guests.TYPED + image_disk.write(0, b"kept") + image_disk.wait()
    code += b"".join(limited.write(8 * n, b"%u" % n) for n in range(4)) + held.write(0, b"held") + small_guests.POWER_OFF
    with vms.runtime(), open("vm.said", "w") as said:
        for name in "first", "second", "limited":
            image(name)
        run("disk", "create", "kept.qcow2", "1M")
        machine = foreground(code, "--name", "vm", "--transport", "mmio", "--disk", "first,id=d", "--disk", "limited,iops=2", "--disk", "kept.qcow2", "--console", "none", stderr=said)
        wait_for("start", lambda: state("vm") == "running")
        assert vms.ask("vm", "GET", "/doppel/v1/vm")[0] == 200
        before = threads_of(machine.pid)
        assert vms.ask("vm", "PATCH", "/doppel/v1/devices/d", json.dumps({"path": os.path.abspath("second")}))[0] == 204
        go_on = [stop_thread(thread) for thread in threads_of(machine.pid) - before]
        assert go_on
        vms.type_in("vm", "x")

        def is_written():
            with open("limited", "rb") as file:
                return machine.poll() is not None or file.read()[24 * 512:][:1] == b"3"
        wait_for("what was kept back", is_written)
        for resume in go_on:
            resume()
        assert machine.wait(vms.LIMIT) == 0


def kvm():
    """By the host's kernel: paused, stopped, and one that waits for an interrupt of the PIT, by the IOAPIC, at its local APIC (IRR)."""
    store = lambda address, value: b"\xc7\x05" + struct.pack("<II", address, value)
    out = lambda port, value: b"\xb0" + bytes((value,)) + b"\xe6" + bytes((port,))
    interrupted = store(0xfee000f0, 0x1ff) + store(0xfec00000, 0x14) + store(0xfec00010, 0x40) + out(0x43, 0x34) + out(0x40, 0) + out(0x40, 1) + b"\xf6\x05\x20\x02\xe0\xfe\x01\x74\xf7"
    with vms.runtime():
        machine = foreground(interrupted + small_guests.ECHO, "--engine", "kvm", "--console", "unix:serial")
        wait_for("socket", lambda: os.path.exists("serial") and state_of_first() == "running")
        name = next(iter(vms.vms()))
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(vms.LIMIT)
            client.connect("serial")
            client.sendall(b"a")
            assert client.recv(1) == b"a"
        run("pause", name)
        run("resume", name)
        run("kill", name)
        assert machine.wait(vms.LIMIT) == 5


ALL_PINS = small_guests.store(0xfee000f0, 0x1ff) + b"".join(small_guests.store(0xfec00000, 0x10 + 2 * pin) + small_guests.store(0xfec00010, 0x40) for pin in range(24))


def kvm_asked():
    """A client presses the power button and types: both interrupt the guest."""
    button = b"\x66\xba\x02\x06\x66\xb8\x00\x01\x66\xef"  # PWRBTN_EN to port 0x602
    byte = b"\x66\xba\xf9\x03\xb0\x01\xee"  # to the serial port's IER
    with vms.runtime():
        machine = foreground(ALL_PINS + button + byte + small_guests.say("x") + small_guests.HALT, "--name", "vm", "--engine", "kvm", "--console", "none")
        wait_for("start", lambda: state("vm") == "running" and run("logs", "vm") == "x")
        assert vms.ask("vm", "POST", "/doppel/v1/power-button")[0] == 204
        vms.type_in("vm", "x")
        run("kill", "vm")
        assert machine.wait(vms.LIMIT) == 5


def kvm_settled():
    """Paused a hundred times while the guest does little but take interrupts of the PIC: sometimes one has been offered and not been taken."""
    out = lambda port, value: b"\xba" + struct.pack("<I", port) + b"\xb0" + bytes((value,)) + b"\xee"
    gdt, idt = (0, 0, 0xffff, 0xcf9a00, 0xffff, 0xcf9200), 0x2000
    handler = b"\xba\xfa\x03\x00\x00\xec\xb0\x20\xe6\x20\xbc\x00\x90\x00\x00\xe9"  # reads IIR, EOI; forgets where it was, and begins again
    begin = b"".join(small_guests.store(0x1900 + 4 * n, word) for n, word in enumerate(gdt)) + small_guests.store(0x1800, 23 | 0x1900 << 16) + small_guests.store(0x1804, 0)
    begin += b"\x0f\x01\x15" + struct.pack("<I", 0x1800)  # lgdt
    at = small_guests.ENTRY + 2 + len(handler) + 4 + len(begin) + 7
    begin += b"\xea" + struct.pack("<IH", at, 8) + b"\xb8\x10\x00\x00\x00\x8e\xd0\x8e\xd8\xbc\x00\x90\x00\x00"  # CS, SS, DS, ESP
    vector = idt + 8 * 0x24
    begin += small_guests.store(vector, 8 << 16 | small_guests.ENTRY + 2 & 0xffff) + small_guests.store(vector + 4, small_guests.ENTRY & 0xffff0000 | 0x8e00)
    begin += small_guests.store(0x1800, 0x7ff | idt << 16) + b"\x0f\x01\x1d" + struct.pack("<I", 0x1800)  # lidt
    begin += b"".join(out(*pair) for pair in ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xef), (0xa1, 0xff), (0x3fc, 8)))
    begin += small_guests.store(0xfee000f0, 0x1ff) + small_guests.store(0xfee00350, 0x700) + small_guests.say("x")
    flood = b"\xfb" + out(0x3f9, 0) + out(0x3f9, 2)  # the transmitter is empty, again
    code = b"\xeb" + bytes((len(handler) + 4,)) + handler + struct.pack("<I", len(begin)) + begin + flood + b"\xeb" + bytes((256 - len(flood) - 2,))
    with vms.runtime():
        machine = foreground(code, "--name", "vm", "--engine", "kvm", "--console", "none")
        wait_for("start", lambda: state("vm") == "running" and run("logs", "vm") == "x")
        for _ in range(100):
            for call in "pause", "resume":
                assert vms.ask("vm", "POST", f"/doppel/v1/{call}")[0] == 204
        run("kill", "vm")
        assert machine.wait(vms.LIMIT) == 5


def kvm_share():
    """A worker of a share interrupts the guest: what may take longer is not for companions."""
    share = small_guests.Virtio(1, 0x200000, queue=1)
    code = ALL_PINS + initialized(share) + small_guests.store(share.registers + 0x64, 1) + message(share, FUSE_SYNCFS, bytes(8), 16) + small_guests.POWER_OFF
    with vms.runtime():
        os.mkdir("shared")
        assert foreground(code, "--engine", "kvm", "--transport", "mmio", "--share", "shared:tag").wait(vms.LIMIT) == 0


def kept():
    """Snapshots with disks, named relatively."""
    with vms.runtime():
        with open("raw", "wb") as disk:
            disk.truncate(1 << 20)
        run("disk", "create", "new.qcow2", "1M")
        start(vms.KEEPS, "--disk", "raw", "--disk", "new.qcow2", name="vm")
        run("snapshot", "create", "vm", "first")
        run("snapshot", "create", "vm", "second", "--incremental", "--compress", "zstd")
        run("snapshot", "delete", "vm", "first")
        with open("key", "w") as key:
            key.write("0123456789abcdef" * 4)
        for options in [], ["--no-disks"]:
            run("snapshot", "create", "vm", "--encrypt", "--key-file", "key", *options)
            assert ("images of its disks are not" in run.errors) == (not options), run.errors
        run("kill", "vm")
        run("snapshot", "restore", "vm", "second", "--as", "back")
        resource.prlimit(vms.vms()["back"]["pid"], resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        run("snapshot", "create", "back", "third", status=1)  # and its images are removed
        run("kill", "back")


def filled():
    """The thread that reads a compressed snapshot's memory in the background gets the last page of it, and closes the file."""
    with vms.runtime() as folder:
        start(vms.KEEPS, name="vm")
        run("snapshot", "create", "vm", "one", "--compress", "zstd")
        run("kill", "vm")
        run("snapshot", "restore", "vm", "one", "--load", "fill")
        pid = vms.vms()["vm"]["pid"]

        def closed():
            files = [os.readlink(entry) for entry in glob.glob(f"/proc/{pid}/fd/*")]
            return not any(file.endswith("/one/memory") for file in files)
        wait_for("the whole memory", closed)
        assert state("vm") == "running"


def streams():
    """Clients that listen when the machine ends get what is left."""
    with vms.runtime():
        machine = foreground(small_guests.ECHO)
        name = wait_for("start", lambda: next((name for name, vm in vms.vms().items() if vm["state"] == "running"), None))
        listeners = []
        for path in "events?since=0", "console":
            listener = vms.Connection(name)
            listener.request("GET", f"/doppel/v1/{path}")
            listeners.append(listener.getresponse())
        vms.ask(name, "POST", "/doppel/v1/console", b"typed")
        run("kill", name)
        assert machine.wait(vms.LIMIT) == 5
        said = [listener.read() for listener in listeners]
        assert b"ended" in said[0] and said[1] == b"typed"


scenarios = {scenario.__name__: scenario for scenario in (plain, migrated, waiting, translated, signals, stopped, sockets, terminal, plugged, plugged_card, measured, unread, late, dying_worker, dying_share, tapped, replaced, busy, served, served_without_broker, updated, direct, direct_paused, direct_ended, kvm, kvm_asked, kvm_settled, kvm_share, kept, filled, streams, vms.names, vms.life, vms.crash, vms.console)}
scenarios |= {"tree": snapshots.tree, "direct_boundary": functools.partial(direct, "boundary", "")} | {f"dying_{name}": functools.partial(dying, name) for name in ("main", "loop", "vcpu0", "control")}

if __name__ == "__main__":
    try:
        scenarios[sys.argv[2]]()
    except Absent as what:
        print(f"skipped: {what}")
        sys.exit(77)
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
