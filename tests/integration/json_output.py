#!/usr/bin/env python3
"""--json of every command that the program knows: what is printed is JSON and has what a program needs, messages are JSON, and exit statuses are as without it. A command that is in neither
table here fails the test.

    json_output.py DOPPEL DOPPEL-AGENT
"""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import small_guests
from vms import KEEPS, LIMIT, doppel, run, runtime, start, state, type_in, wait_for

agent = os.path.abspath(sys.argv[2])

# What these print is no result: a console, a server's life, text for other programs.
NO_JSON = {"console", "serve", "completion", "manual"}
# Of these each line is a value.
LINES = {"logs", "events", "trace", "top"}


def parsed(command, text):
    return [json.loads(line) for line in text.splitlines()] if command in LINES else json.loads(text)


class Agent(threading.Thread):
    """The vsock socket of a machine whose guest has an agent."""

    def __init__(self, path):
        super().__init__(daemon=True)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(8)

    def run(self):
        while True:
            connection = self.listener.accept()[0]
            while connection.recv(1) != b"\n":
                pass
            connection.sendall(b"OK 1\n")
            subprocess.Popen([agent, "--stdio"], stdin=connection, stdout=subprocess.DEVNULL)
            connection.close()


def until(*arguments):
    """The first line of a command that goes on, which then ends."""
    process = subprocess.Popen([doppel, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    process.terminate()
    process.communicate(timeout=LIMIT)
    return line


def migration():
    there = subprocess.Popen([doppel, "receive", "--json", "--listen", "unix:there", "--name", "moved"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert json.loads(there.stderr.readline()) == {"message": "waiting for a virtual machine at unix:there"}
    result = json.loads(run("migrate", "--json", "vm", "unix:there"))
    assert result["name"] == "vm" and result["to"] == "unix:there" and result["downtime_ns"] > 0 and result["bytes"] > 0, result
    out, errors = there.communicate(timeout=LIMIT)
    assert there.returncode == 0, errors
    check_machine(json.loads(out), "moved", "running")


def check_machine(machine, name, state):
    assert (machine["name"], machine["state"]) == (name, state), machine
    assert machine["alive"] == (state in ("running", "paused")) and (state == "gone" or machine["cpus"] == 1 and machine["memory_bytes"] == 4 << 20), machine


def machines(*named):
    """An array of machines, each with its state."""
    def check(value):
        assert len(value) == len(named), value
        for machine, (name, state) in zip(value, named):
            check_machine(machine, name, state)
    return check


def one(name, state):
    return lambda value: check_machine(value, name, state)


def has(**members):
    def check(value):
        assert {key: value.get(key) for key in members} == members, value
    return check


def each(**members):
    def check(value):
        assert value
        for member in value:
            has(**members)(member)
    return check


def keys(*names):
    def check(value):
        for member in value if isinstance(value, list) else [value]:
            assert all(name in member for name in names), value
    return check


def finds_commands(value):
    assert {"run", "help"} <= {command["name"] for command in value} and all(command["help"] for command in value), value
    assert {"kernel", "json"} <= {option["name"] for command in value if command["name"] == "run" for option in command["options"]}


def machine_file(value):
    assert [sorted(made) for made in value] == [["config", "machine"]] and os.path.exists(value[0]["machine"]), value


def traced(line):
    assert line["what"] and line["cpu"] == 0 and line["seconds"] >= 0, line


SPEC = ["--kernel", "kernel", "--memory", "4M", "--net", "none", "--engine", "interp"]
# (command with its action, arguments, what has to be in the value), in an order in which all of it can be done.
CASES = [
    ("version", [], keys("program", "version")),
    ("help", [], finds_commands),
    ("help", ["stop"], each(name="stop")),
    ("cpu-baseline", [], keys("cpuid_modifiers")),
    ("disk create", ["image.qcow2", "1M"], has(file="image.qcow2", format="qcow2", size_bytes=1 << 20)),
    ("disk create", ["--backing", "image.qcow2", "upper.qcow2"], has(backing="image.qcow2")),
    ("disk info", ["image.qcow2", "upper.qcow2"], each(format="qcow2", size_bytes=1 << 20)),
    ("disk check", ["image.qcow2"], has(**{"check-errors": 0, "format": "qcow2"})),
    ("disk commit", ["upper.qcow2"], has(file="upper.qcow2")),
    ("disk convert", ["image.qcow2", "image.raw"], has(file="image.raw", format="raw", size_bytes=1 << 20)),
    ("run", ["-d", "--name", "vm", *SPEC], one("vm", "running")),
    ("run", ["-d", "--name", "other", "--metadata", "data.json", *SPEC[:4], "--net", "user", "--engine", "interp"], one("other", "running")),
    ("ps", [], machines(("other", "running"), ("vm", "running"))),
    ("inspect", ["vm"], each(name="vm", state="running")),
    ("pause", ["vm", "other"], machines(("vm", "paused"), ("other", "paused"))),
    ("resume", ["vm", "other"], machines(("vm", "running"), ("other", "running"))),
    ("reset", ["vm"], machines(("vm", "running"))),
    ("metadata", ["--set", "data.json", "other"], one("other", "running")),
    ("metadata", ["other"], has(a=[1])),
    ("plug", ["--disk", "image.raw", "vm"], has(name="vm", state="running", device="block0")),
    ("unplug", ["vm", "block0"], one("vm", "running")),
    ("stats", ["vm"], each(name="vm", state="running")),
    ("top", ["--count", "1", "vm"], lambda lines: each(name="vm")(lines[0])),
    ("events", ["vm"], each(vm="vm")),
    ("logs", ["vm"], each(line="typed")),
    ("screen", ["vm"], keys("rows", "columns", "cursor")),
    ("snapshot create", ["vm", "one"], has(vm="vm", name="one", kind="full")),
    ("snapshot list", ["vm"], each(vm="vm", name="one")),
    ("snapshot show", ["vm", "one"], has(vm="vm", name="one", kind="full")),
    ("snapshot check", ["vm"], each(vm="vm", result="sound", message="")),
    ("snapshot diff", ["vm", "one", "one"], has(pages_different=0, pages=1024, sections={})),
    ("snapshot export", ["vm", "one", "one.tar"], keys("vm", "name", "file", "bytes")),
    ("snapshot import", ["one.tar", "other"], each(vm="other", name="one", known=False)),
    ("snapshot delete", ["other", "one"], each(vm="other", name="one")),
    ("snapshot restore", ["vm", "one"], one("vm", "running")),
    ("clone", ["--count", "2", "vm/one"], lambda value: machines(("vm-clone-1", "running"), ("vm-clone-2", "running"))(sorted(value, key=lambda one: one["name"]))),
    ("clone", ["--name", "single", "vm"], machines(("single", "running"))),
    ("migrate", ["--status", "vm"], keys("under_way")),
    ("export", ["vm", "vm.bundle"], has(name="vm", snapshot=None, file="vm.bundle")),
    ("import", ["--directory", "unpacked", "vm.bundle"], machine_file),
    ("exec", ["--vsock", "agent.sock", "--", "sh", "-c", "echo out; printf '\\377' >&2"], has(exit_status=0, signal=None, stdout="out\n", stderr_base64="/w==", truncated=False)),
    ("cp", ["--vsock", "agent.sock", "data.json", ":" + "copied"], has(direction="in", file="data.json", bytes=10)),
    ("cp", ["--vsock", "agent.sock", ":/proc/self/cmdline", "out"], has(direction="out", guest_file="/proc/self/cmdline")),
    ("guest", ["--vsock", "agent.sock", "ping"], keys("round_trip_us")),
    ("guest", ["--vsock", "agent.sock", "info"], keys("kernel", "uptime", "addresses")),
    ("kill", ["vm-clone-1", "vm-clone-2", "single"], machines(("vm-clone-1", "ended"), ("vm-clone-2", "ended"), ("single", "ended"))),
    ("rm", ["vm-clone-1", "vm-clone-2", "single"], machines(("vm-clone-1", "gone"), ("vm-clone-2", "gone"), ("single", "gone"))),
    ("restart", ["--timeout", "0", "other"], machines(("other", "running"))),
    ("stop", ["--timeout", "0", "other"], machines(("other", "ended"))),
    ("start", ["other"], machines(("other", "running"))),
]
# Not by the table: they wait for one another, or go on. guest set-clock, poweroff and reboot would do it to this host.
BY_HAND = {"migrate", "receive", "trace"}

# What cannot be done: status and message are those without --json.
REFUSED = [
    (2, ["stop"]), (2, ["stop", "--nonsense", "x"]), (2, ["ps", "x"]), (2, ["run", "-d"]), (2, ["snapshot"]), (2, ["snapshot", "create"]), (2, ["disk"]), (2, ["top", "--delay", "x"]),
    (2, ["help", "nothing"]), (2, ["version", "x"]), (2, ["exec"]), (2, ["cp", "a", "b"]), (2, ["guest", "x"]), (2, ["import"]), (2, ["export"]), (2, ["receive", "--listen", "nowhere"]),
    (2, ["run", "-d", "--kernel", "no-such-kernel"]), (2, ["clone", "--count", "0", "x"]),
    *[(1, [*command, "nobody"]) for command in (["start"], ["stop"], ["restart"], ["kill"], ["pause"], ["resume"], ["reset"], ["rm"], ["inspect"], ["logs"], ["screen"], ["trace"], ["stats"],
                                               ["metadata"], ["clone"], ["plug", "--disk", "x"], ["migrate", "--status"], ["migrate", "--cancel"], ["snapshot", "create"])],
    (1, ["unplug", "nobody", "block0"]), (1, ["snapshot", "show", "nobody", "one"]), (1, ["snapshot", "restore", "nobody", "one"]), (1, ["snapshot", "delete", "nobody", "one"]),
    (1, ["snapshot", "diff", "nobody", "one", "two"]), (1, ["snapshot", "export", "nobody", "one", "file"]), (1, ["snapshot", "import", "nothing"]), (1, ["export", "nobody", "file"]),
    (1, ["import", "nothing"]), (1, ["disk", "info", "nothing"]), (1, ["disk", "check", "nothing"]), (1, ["cpu-baseline", "nothing"]), (1, ["start", "vm"]), (1, ["rm", "vm"]),
    (125, ["exec", "nobody", "true"]), (125, ["cp", "nobody:/x", "y"]), (125, ["guest", "nobody", "info"]), (127, ["exec", "--vsock", "agent.sock", "no-such-program"]),
    (1, ["migrate", "vm", "unix:nowhere"]), (2, ["run", "-d", "--name", "bad", "--kernel", "kernel", "--memory", "4M", "--disk", "nothing"]),
]


def with_json(arguments):
    """As the first option and as the last, which would be the command's in a guest."""
    yield [arguments[0], "--json", *arguments[1:]]
    if arguments[0] != "exec":
        yield [*arguments, "--json"]


def refused(status, arguments):
    plain = subprocess.run([doppel, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT)
    assert plain.returncode == status, (arguments, status, plain)
    lines = [re.sub("^doppel: ((warning|error): )?", "", line) for line in plain.stderr.splitlines()]
    for words in with_json(arguments):
        told = subprocess.run([doppel, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT)
        assert told.returncode == status, (words, plain, told)
        messages = [json.loads(line) for line in told.stderr.splitlines()]
        assert messages and [message["message"] for message in messages] == lines, (words, lines, messages)
        assert not told.stdout or parsed(words[0], told.stdout) == [], (words, told)


def known_to_program():
    """Commands, and where they have some their actions."""
    for command in json.loads(run("help", "--json")):
        if command["name"] in NO_JSON:
            continue
        assert "json" in {option["name"] for option in command["options"]}, f"doppel {command['name']} has no --json and is not in NO_JSON"
        actions = [part.split()[0] for part in command["arguments"].split(" | ")] if command["name"] in ("snapshot", "disk") else [""]
        yield from (f"{command['name']} {action}".strip() for action in actions)


def main():
    signal.signal(signal.SIGALRM, lambda *_: sys.exit("took too long"))
    signal.alarm(280)
    tried = {command for command, _, _ in CASES} | BY_HAND
    assert tried == set(known_to_program()), f"untried or unknown: {tried ^ set(known_to_program())}"
    with runtime() as folder:
        os.chdir(folder)
        small_guests.write("kernel", small_guests.say("typed\n") + KEEPS)
        open("data.json", "w").write('{"a": [1]}')
        Agent("agent.sock").start()
        for command, arguments, check in CASES:
            words = [*command.split(), "--json", *arguments]
            if command == "rm":
                wait_for("end", lambda: all(state(name) in ("ended", None) for name in arguments))
            value = parsed(command, run(*words))
            assert not any(json.loads(line)["message"] == "" for line in run.errors.splitlines()), run.errors
            try:
                check(value)
            except Exception as failure:
                raise AssertionError(f"doppel {' '.join(words)}: {json.dumps(value)[:2000]}") from failure
        traced(json.loads(until("trace", "--json", "vm")))
        assert run("exec", "--vsock", "agent.sock", "echo", "--json") == "--json\n"
        done = json.loads(run("exec", "--json", "--vsock", "agent.sock", "--", "sh", "-c", "kill -9 $$", status=137))
        assert (done["exit_status"], done["signal"]) == (137, 9), done
        done = json.loads(run("exec", "--json", "--vsock", "agent.sock", "--", "head", "-c", str(17 << 20), "/dev/zero"))
        assert len(done["stdout"]) == 16 << 20 and done["truncated"], len(done["stdout"])
        for status, arguments in REFUSED:
            refused(status, arguments)
        # What can be done is, and is told.
        machines(("vm", "paused"))(json.loads(run("pause", "--json", "nobody", "vm", "--", status=1)))
        run("resume", "vm")
        migration()
    print(f"{len(CASES)} results, {len(REFUSED)} refusals")


main()
