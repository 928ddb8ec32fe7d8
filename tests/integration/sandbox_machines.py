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
        assert ctypes.CDLL(None, use_errno=True).syscall(TGKILL, machine.pid, thread, signal.SIGABRT) == 0, threads
        assert machine.wait(vms.LIMIT) == -signal.SIGABRT and termios.tcgetattr(slave) == before


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


def tapped():
    """Interfaces of the host's that are plugged, in a network of this test's own; the broker attaches what exists and was named."""
    new_net, new_user = 0x40000000, 0x10000000
    libc = ctypes.CDLL(None, use_errno=True)
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


def served(broker=True):
    """Behind the API of other tools: log, metrics, a snapshot into files that the client names, a disk that is replaced, and a machine from the snapshot."""
    with vms.runtime() as folder:
        for name in "disk", "other":
            with open(name, "wb") as disk:
                disk.truncate(1 << 20)

        def serve(identity):
            server = subprocess.Popen([vms.doppel, "serve", "--api-sock", f"{identity}.sock", "--id", identity, "--engine", "interp"], stdin=subprocess.DEVNULL,
                                      stderr=open(f"{identity}.said", "w"))
            wait_for("start", lambda: state(identity) == "starting" and os.path.exists(f"{identity}.sock"))
            connection = vms.Connection(identity)
            connection.path = f"{folder}/{identity}.sock"

            def request(method, path, body=None, status=None):
                connection.request(method, path, json.dumps(body) if body else None)
                answer = connection.getresponse()
                text = answer.read().decode()
                assert answer.status == status or not status and answer.status in (200, 204), f"{method} {path}: {answer.status} {text}"
            return server, request

        def end(identity, server):
            run("kill", identity)
            status = server.wait(vms.LIMIT)
            with open(f"{identity}.said") as said:
                text = said.read()
            assert status == 0 and (not broker or "a broker for files" not in text), text
        server, request = serve("tool")
        request("PUT", "/logger", {"log_path": f"{folder}/log", "level": "Debug", "show_level": True, "show_log_origin": True})
        request("PUT", "/metrics", {"metrics_path": f"{folder}/metrics"})
        request("PUT", "/boot-source", {"kernel_image_path": vms.kernel(small_guests.say("tool") + small_guests.HALT)})
        request("PUT", "/drives/d", {"drive_id": "d", "is_root_device": False, "is_read_only": False, "path_on_host": f"{folder}/disk"})
        request("PUT", "/actions", {"action_type": "InstanceStart"})
        request("PATCH", "/drives/d", {"drive_id": "d", "path_on_host": f"{folder}/other"})
        request("PUT", "/actions", {"action_type": "FlushMetrics"})
        request("PATCH", "/vm", {"state": "Paused"})
        request("PUT", "/snapshot/create", {"snapshot_path": f"{folder}/state", "mem_file_path": f"{folder}/memory", "snapshot_type": "Full"})
        request("PATCH", "/vm", {"state": "Resumed"})
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        request("PATCH", "/vm", {"state": "Paused"})
        request("PUT", "/snapshot/create", {"snapshot_path": f"{folder}/no-state", "mem_file_path": f"{folder}/no-memory", "snapshot_type": "Full"}, 400)
        assert not [name for name in os.listdir() if name.startswith("no-")]
        end("tool", server)
        server, request = serve("second")
        request("PUT", "/snapshot/load", {"snapshot_path": f"{folder}/state", "mem_backend": {"backend_type": "File", "backend_path": f"{folder}/memory"}, "resume_vm": True})
        request("GET", "/vm/config")
        end("second", server)


def served_without_broker():
    """The same where no process can take another's descriptors: the threads open files themselves, before they name nothing new."""
    sandbox_hosts.refuse(1, PIDFD_GETFD)
    served(False)


def direct():
    """User code on the processor itself, in processes of their own."""
    program = os.path.join(os.path.dirname(os.environ["REAL_DOPPEL"]), "tests/conform/scattered")
    with vms.runtime():
        done = subprocess.run([vms.doppel, "run", "--kernel", program, "--memory", "128M", "--engine", "bt", "--direct", "always", "--net", "none", "--console", "file:out",
                               "--on-reset", "exit", "--cpus", "2", "--append", "direct pieces=200 rounds=1"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=vms.LIMIT)
        print(done.stderr)
        with open("out", errors="replace") as out:
            assert "DONE 0 failures" in out.read() and "is translated" not in done.stderr


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


scenarios = {scenario.__name__: scenario for scenario in (plain, migrated, waiting, translated, signals, stopped, sockets, terminal, plugged, tapped, served, served_without_broker, direct, kvm, kept, filled, streams, vms.names, vms.life, vms.crash, vms.console)}
scenarios |= {"tree": snapshots.tree} | {f"dying_{name}": functools.partial(dying, name) for name in ("main", "loop", "vcpu0", "control")}

if __name__ == "__main__":
    try:
        scenarios[sys.argv[2]]()
    except Absent as what:
        print(f"skipped: {what}")
        sys.exit(77)
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
