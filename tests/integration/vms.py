#!/usr/bin/env python3
"""Many virtual machines from the command line and over their sockets: `vms.py DOPPEL SCENARIO` is one test. Each has a runtime directory of its own."""
import contextlib
import http.client
import json
import os
import pathlib
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import time
import xml.etree.ElementTree

import small_guests

doppel = os.path.abspath(sys.argv[1])  # some run it from elsewhere
LIMIT = 60  # seconds for anything on a busy host
DESCRIPTION = pathlib.Path(__file__).parents[2] / "docs/openapi-doppel-v1.json"


def run(*arguments, status=0, **more):
    """A command that is to end with this status; its output."""
    done = subprocess.run([doppel, *map(str, arguments)], **({} if "input" in more else {"stdin": subprocess.DEVNULL}), capture_output=True, text=True, timeout=LIMIT, **more)
    assert done.returncode == status, f"{arguments}: status {done.returncode}, not {status}: {done.stdout}{done.stderr}"
    run.errors = done.stderr
    return done.stdout


def wait_for(what, condition):
    deadline = time.monotonic() + LIMIT
    while not (result := condition()):
        assert time.monotonic() < deadline, f"no {what} within {LIMIT} s"
        time.sleep(0.02)
    return result


def vms():
    return {vm["name"]: vm for vm in json.loads(run("ps", "--all", "--json"))}


def state(name):
    return vms().get(name, {}).get("state")


@contextlib.contextmanager
def runtime():
    """A directory of virtual machines, which are killed in the end."""
    folder = tempfile.mkdtemp(prefix="doppel-vms-")
    os.environ["XDG_RUNTIME_DIR"] = folder
    os.environ["XDG_DATA_HOME"] = f"{folder}/data"
    os.chdir(folder)
    try:
        yield folder
    finally:
        left = subprocess.run([doppel, "ps", "-q"], capture_output=True, text=True).stdout.split()
        if left:
            subprocess.run([doppel, "rm", "--force", *left], capture_output=True, timeout=LIMIT)
        os.chdir("/")
        shutil.rmtree(folder)


def kernel(code, name="kernel"):
    return small_guests.write(os.path.join(os.environ["XDG_RUNTIME_DIR"], name), code)


def start(code, *options, name=None, file="kernel", sandbox=None, **more):
    """In the background; its name."""
    named = ["--name", name] if name else []
    return run("run", "-d", *named, "--kernel", kernel(code, file), "--memory", "4M", "--net", "none", "--engine", "interp",
               *(["--sandbox", sandbox] if sandbox else []), *options, **more).strip()


class Connection(http.client.HTTPConnection):
    def __init__(self, name):
        super().__init__("localhost", timeout=LIMIT)
        self.path = f"{os.environ['XDG_RUNTIME_DIR']}/doppel/{name}/api.sock"

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self.path)  # waits for its place; afterwards there are limits
        self.sock.settimeout(LIMIT)


def ask(name, method, path, body=None):
    """(status, content type, text)"""
    connection = Connection(name)
    connection.request(method, path, body)
    answer = connection.getresponse()
    result = answer.status, answer.getheader("Content-Type"), answer.read().decode()
    connection.close()
    return result


# ---- a guest that remembers ----

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
    return True


def snapshots(name):
    return {s["name"]: s for s in json.loads(run("snapshot", "list", name, "--json"))}


# ---- scenarios ----

def names():
    """Names: given, made up, taken, shortened, wrong."""
    with runtime():
        made_up = start(small_guests.HALT)
        assert re.fullmatch("[a-z]{6}", made_up)
        assert start(small_guests.HALT, name="web-1") == "web-1"
        start(small_guests.HALT, name="web-2")
        start(small_guests.HALT, name="web-1", status=2)
        assert "web-1" in run.errors
        for bad in ("", "-x", "a/b", "..", "x" * 60):
            start(small_guests.HALT, f"--name={bad}", status=2)
        assert set(vms()) == {made_up, "web-1", "web-2"}
        assert set(run("ps", "-q").split()) == set(vms())
        run("pause", "web", status=1)
        assert "beginning of 2 names" in run.errors
        run("pause", "nobody", status=1)
        assert run("pause", made_up[:6], "web-2").split() == [made_up, "web-2"]
        assert state("web-2") == "paused" and state("web-1") == "running"
        run("resume", "web-2", "nobody", "web-1", status=1)  # one does not exist, one is not paused: the other goes on
        assert state("web-2") == "running"
        assert json.loads(start(small_guests.HALT, "--json", name="j"))["name"] == "j"
        run("ps", "extra", status=2)
        run("stop", status=2)
        run("stop", "--timeout", "x", "j", status=2)
        run("logs", "--lines", status=2)
        run("rm", "--colour", "j", status=2)
        run("run", "--restart", "always", status=2)
        run("run", "-d", "--restart", "sometimes", "--kernel", "x", status=2)


def life():
    """Start, stop, start again, restart, kill, remove; what is refused when."""
    with runtime() as folder:
        start(small_guests.say("hello\n") + small_guests.UNTIL_BUTTON, name="vm", sandbox="off")  # where devices can be plugged
        wait_for("console", lambda: run("logs", "vm") == "hello\n")
        information = json.loads(run("inspect", "vm"))[0]
        assert information["engine"]["name"] == "interp" and information["vm"]["config"]["memory_bytes"] == 4 << 20
        run("rm", "vm", status=1)
        run("start", "vm", status=1)
        assert run("stop", "vm") == "vm\n"
        ended = vms()["vm"]
        assert (ended["state"], ended["reason"], ended["exit_status"]) == ("ended", "shutdown", 0), ended
        assert run("ps", "-q") == ""
        for command in ("stop", "kill", "pause", "resume", "reset", "console"):
            run(command, "vm", status=1)
        assert run("start", "vm", cwd="/") == "vm\n"
        before = vms()["vm"]["pid"]
        assert run("restart", "-t", "30", "vm") == "vm\n"
        assert vms()["vm"]["pid"] != before and state("vm") == "running"
        with open("extra", "wb") as disk:
            disk.truncate(1 << 20)
        run("plug", "--disk", "extra,id=more", "vm")  # relative to here, and not to where it was started
        assert "more" in {device["name"] for device in json.loads(run("inspect", "vm"))[0]["devices"]}
        run("plug", "--disk", "nothing", "vm", status=1)
        run("plug", "vm", status=2)
        run("unplug", "vm", "more")
        run("unplug", "vm", "less", status=1)
        run("unplug", "vm", status=2)
        run("metadata", "vm", status=1)
        assert "without --metadata" in run.errors
        run("reset", "vm")
        wait_for("second hello", lambda: run("logs", "vm") == "hello\n" * 2)
        run("kill", "vm")
        assert vms()["vm"]["exit_status"] == 5
        events = [json.loads(line)["event"] for line in run("events", "--json").splitlines()]
        assert events == ["started", "device-added", "reset", "ended"], events
        run("rm", "vm")
        assert not vms() and os.listdir(f"{folder}/doppel") == [".lock"]

        start(small_guests.HALT, name="deaf")  # nobody listens to the button: the plug is pulled, also of one that stands still
        run("pause", "deaf")
        run("stop", "-t", "0", "deaf")
        assert vms()["deaf"]["reason"] == "stopped"
        start(small_guests.HALT, "--rm", name="gone")
        run("kill", "gone")
        assert "gone" not in vms()

        start(small_guests.HALT, "--disk", "/nowhere", name="broken", status=2)
        assert "/nowhere" in run.errors and state("broken") == "ended"
        start(small_guests.HALT, "--disk", "/nowhere", status=2)
        assert set(vms()) == {"deaf", "broken"}
        run("start", "broken", status=1)
        assert "/nowhere" in run.errors


def crash():
    """A process that is killed: it shows, it harms no other, and what it left goes."""
    with runtime() as folder:
        start(small_guests.HALT, name="other")
        start(small_guests.say("last words") + small_guests.HALT, name="vm")
        wait_for("console", lambda: run("logs", "vm") == "last words")
        os.kill(vms()["vm"]["pid"], signal.SIGKILL)
        wait_for("death", lambda: state("vm") == "died")
        assert run("ps", "-q").split() == ["other"] and run("logs", "vm") == "last words"
        run("stats")
        run("stop", "vm", status=1)
        run("start", "vm")
        assert state("vm") == "running"
        os.kill(vms()["vm"]["pid"], signal.SIGKILL)
        wait_for("death", lambda: state("vm") == "died")
        start(small_guests.HALT, name="vm")  # replaces it
        os.kill(vms()["vm"]["pid"], signal.SIGKILL)
        wait_for("death", lambda: state("vm") == "died")
        run("rm", "vm")
        assert set(vms()) == {"other"}
        # A run in the foreground that wanted nothing kept.
        foreground = subprocess.Popen([doppel, "run", "--kernel", kernel(small_guests.HALT), "--memory", "4M", "--net", "none"], stdin=subprocess.DEVNULL)
        wait_for("foreground", lambda: len(run("ps", "-q").split()) == 2)
        foreground.kill()
        foreground.wait()
        wait_for("death", lambda: "died" in {vm["state"] for vm in vms().values()})
        start(small_guests.HALT, name="next")
        assert set(vms()) == {"other", "next"}
        # One that hangs is ended all the same.
        os.kill(vms()["next"]["pid"], signal.SIGSTOP)
        run("ps")
        run("kill", "next")
        # Nonsense in its directory harms nobody.
        for name in ("state.json", "vm.json"):
            with open(f"{folder}/doppel/other/{name}", "w") as file:
                file.write("{" * 1000)
        os.mkdir(f"{folder}/doppel/nonsense")
        run("ps", "-a")
        run("inspect", "other", "nonsense")
        run("rm", "nonsense")
        run("kill", "other")


def restart():
    """The supervisor: what is brought back, when not, and how it ends."""
    with runtime():
        start(small_guests.say("x") + small_guests.HALT, "--restart", "always", name="vm", sandbox="on")
        first = vms()["vm"]["pid"]
        wait_for("its word", lambda: run("logs", "vm") == "x")
        os.kill(first, signal.SIGKILL)
        wait_for("restart", lambda: vms()["vm"].get("restarts") == 1 and state("vm") == "running" and vms()["vm"]["pid"] != first)
        wait_for("both in the log", lambda: run("logs", "vm") == "xx")
        assert "started again" in run("logs", "-m", "vm")
        run("stop", "-t", "0", "vm")
        assert state("vm") == "ended"
        start(small_guests.say("y") + small_guests.POWER_OFF, "--restart", "always", name="again", sandbox="on")
        wait_for("three runs", lambda: run("logs", "again").startswith("yyy"))
        run("stop", "again")  # also while it waits to be started again
        assert state("again") == "ended"
        for code, count in ((small_guests.POWER_OFF, 0), (small_guests.TRIPLE_FAULT, 2), (small_guests.PANIC, 2)):
            name = f"failing{count}"
            start(small_guests.say("z") + code, "--restart", "on-failure:2", name=name)
            wait_for("end", lambda: state(name) == "ended")
            assert run("logs", name) == "z" * (count + 1)
            run("rm", name)
        start(small_guests.HALT, "--restart", "always", name="missing", status=2, file="k", *["--disk", "/nowhere"])
        start(small_guests.HALT, "--restart", "always", "--rm", name="killed")
        run("kill", "killed")
        assert "killed" not in vms()


TRACED = r"\d+\.\d{6} cpu0 in 0x3f[8d] size 1 = 0x[0-9a-f]+\n"  # the guest polls


def screen(terminal):
    """What a terminal shows of the console that this socket is; ends as it began."""
    assert run("screen", "vm").count("\n") == 24
    drawn = b"\x1b[2J\x1b[3;5H\x1b[31mred <&\x1b]0;title\x07\x1b[0m \xc3\xa9"
    terminal.sendall(drawn)
    seen = b""
    while drawn not in seen:
        seen += terminal.recv(4096)
    text = run("screen", "vm").splitlines()
    assert text[2] == "    red <& \u00e9", text
    shown = json.loads(run("screen", "--json", "vm"))
    assert (shown["rows"], shown["columns"], len(shown["lines"])) == (24, 80, 24)
    assert shown["cursor"] == {"row": 2, "column": 12, "visible": True}, shown["cursor"]
    picture = xml.etree.ElementTree.fromstring(run("screen", "--svg", "vm"))
    assert any(text.text.startswith("red <&") and text.get("fill") == "#e00000" for text in picture.iter("{http://www.w3.org/2000/svg}text"))
    run("screen", "--svg", "--json", "vm", status=2)


def console():
    """The console from several terminals and pipes; the log while it grows."""
    with runtime():
        start(small_guests.ECHO, name="vm", sandbox="on")
        run("plug", "--net", "user", "vm", status=1)  # opens nothing more, and is none the worse for having been asked
        assert "sandbox" in run.errors and state("vm") == "running"
        follower = subprocess.Popen([doppel, "logs", "--follow", "vm"], stdout=subprocess.PIPE)
        piped = subprocess.Popen([doppel, "console", "vm"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        piped.stdin.write(b"from a pipe\n")
        piped.stdin.flush()
        for source in (piped, follower):
            assert source.stdout.readline() == b"from a pipe\n"
        master, slave = pty.openpty()
        before = termios.tcgetattr(slave)
        terminal = subprocess.Popen([doppel, "console", "--recent", "vm"], stdin=slave, stdout=slave, stderr=slave)
        seen = b""

        def read_until(text):
            nonlocal seen
            while text not in seen:
                assert select.select([master], [], [], LIMIT)[0], f"no {text} in {seen}"
                seen += os.read(master, 4096)
        read_until(b"from a pipe")
        read_until(b"Ctrl-] detaches")
        assert termios.tcgetattr(slave) != before
        os.write(master, b"typed \x01\x03\x1a")  # what would be signals or Doppel's keys is the guest's
        read_until(b"typed \x01\x03\x1a")
        os.write(master, b"\x1d")
        assert terminal.wait(LIMIT) == 0
        read_until(b"detached")
        assert termios.tcgetattr(slave) == before
        terminal = subprocess.Popen([doppel, "console", "vm"], stdin=slave, stdout=slave, stderr=slave)
        seen = b""
        read_until(b"Ctrl-]")
        terminal.terminate()
        assert terminal.wait(LIMIT) == 1 and termios.tcgetattr(slave) == before
        # A client that reads nothing while much is said.
        with socket.socket(socket.AF_UNIX) as lazy, socket.socket(socket.AF_UNIX) as busy:
            path = f"{os.environ['XDG_RUNTIME_DIR']}/doppel/vm/console.sock"
            lazy.connect(path)
            busy.connect(path)
            busy.settimeout(LIMIT)
            screen(busy)
            tracer = subprocess.Popen([doppel, "trace", "vm"], stdout=subprocess.PIPE, text=True)
            assert tracer.stdout.readline().startswith("# ")
            assert re.fullmatch(TRACED, tracer.stdout.readline())
            sent = b"".join(b"%07d\n" % n for n in range(5000))
            busy.sendall(sent)
            received = b""
            while len(received) < len(sent):
                received += busy.recv(65536)
            assert received == sent, "lost or out of order"
        assert run("logs", "vm").endswith(sent.decode())
        assert run("logs", "-n", "3", "vm").encode() == sent[-24:]
        assert run("logs", "-n", "0", "vm") == ""
        run("kill", "vm")
        assert piped.wait(LIMIT) == 0 and follower.wait(LIMIT) == 0
        assert follower.stdout.read().endswith(sent)
        tracer.communicate(timeout=LIMIT)
        assert tracer.returncode == 0
        run("console", "vm", status=1)


def check(schema, value, schemas, where):
    """The part of JSON Schema that the description uses."""
    while "$ref" in schema:
        schema = schemas[schema["$ref"].rsplit("/", 1)[1]]
    if "oneOf" in schema:
        errors = 0
        for choice in schema["oneOf"]:
            try:
                check(choice, value, schemas, where)
            except AssertionError:
                errors += 1
        assert errors == len(schema["oneOf"]) - 1, f"{where}: {value!r} fits {len(schema['oneOf']) - errors} choices"
        return
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    assert type(value) is kinds[schema["type"]], f"{where}: {value!r} is no {schema['type']}"
    assert "enum" not in schema or value in schema["enum"], f"{where}: {value!r}"
    assert schema.get("minimum", 0) <= value if type(value) is int else True, f"{where}: {value!r}"
    if type(value) is list:
        for element in value:
            check(schema["items"], element, schemas, where + "[]")
    if type(value) is dict:
        missing = set(schema.get("required", ())) - set(value)
        assert not missing, f"{where}: without {missing}"
        for key, member in value.items():
            inside = schema.get("properties", {}).get(key, schema.get("additionalProperties", {}))
            assert inside, f"{where}: {key} is not described"
            if inside is True:
                continue
            check(inside, member, schemas, f"{where}.{key}")


def api():
    """Every request of the description, answered as described; and those that are wrong."""
    description = json.loads(DESCRIPTION.read_text())
    schemas = description["components"]["schemas"]
    with runtime() as folder:
        with open("disk", "wb") as disk:
            disk.truncate(1 << 20)
        with open("data.json", "w") as data:
            json.dump({"a": {"b": 1}}, data)
        start(small_guests.ECHO, "--disk", "disk,readonly,serial=S", "--append", "x y", "--metadata", "data.json,version=2", name="vm", sandbox="off")
        asked = set()

        def request(method, path, status, body=None):
            plain = path.split("?")[0]
            plain = re.sub("(devices)/.+", r"\1/{name}", plain)
            asked.add((method.lower(), plain))
            got, kind, text = ask("vm", method, path, body)
            assert got == status, f"{method} {path} {body}: {got} {text}"
            described = description["paths"][plain][method.lower()]["responses"][str(status)].get("content", {})
            assert bool(text) == bool(described), f"{method} {path}: {text!r}"
            if described:
                assert kind in described, f"{method} {path}: {kind}, not {list(described)}"
                value = json.loads(text) if "json" in kind else text
                check(described[kind]["schema"], value, schemas, path)
                return value
        vm = request("GET", "/doppel/v1/vm", 200)
        assert vm["state"] == "running" and vm["config"]["disks"] == [{"readonly": True, "path": "disk", "format": "raw", "serial": "S"}], vm
        assert vm["config"]["metadata"] == {"version": 2, "imds": False, "address": "169.254.169.254"}, vm
        assert request("GET", "/doppel/v1/engine", 200)["name"] == "interp"
        assert {device["class"] for device in request("GET", "/doppel/v1/devices", 200)} >= {"virtio-rng", "virtio-blk"}
        statistics = request("GET", "/doppel/v1/statistics", 200)["counters"]
        assert statistics["memory_bytes"] == 4 << 20 and statistics["port_reads"] > 0 and "0" in statistics["vcpu_ns"]
        metrics = request("GET", "/doppel/v1/metrics", 200)
        names = re.findall(r"^# TYPE doppel_(\w+) (?:counter|gauge)$", metrics, re.M)
        assert len(names) == len(set(names)) and {name.removesuffix("_total") for name in names} == set(statistics)
        assert all(re.fullmatch(r'doppel_\w+\{vm="vm"(,\w+="[^"]*")?\} \d+', line) for line in metrics.splitlines() if line[0] != "#")
        assert "rip" in request("GET", "/doppel/v1/registers", 200)

        assert request("GET", "/doppel/v1/screen", 200)["lines"] == [""] * 24
        assert request("GET", "/doppel/v1/screen?format=text", 200) == "\n" * 24
        assert "<svg" in request("GET", "/doppel/v1/screen?format=svg", 200)
        request("GET", "/doppel/v1/screen?format=gif", 400)

        assert request("GET", "/doppel/v1/metadata", 200) == {"a": {"b": 1}}
        request("PATCH", "/doppel/v1/metadata", 204, b'{"a": {"b": null, "c": [2]}}')
        assert json.loads(run("metadata", "vm")) == {"a": {"c": [2]}}
        request("PUT", "/doppel/v1/metadata", 204, b'{"x": "y"}')
        for body in (b"", b"[]", b"{", b"5"):
            request("PUT", "/doppel/v1/metadata", 400, body)
        assert run("metadata", "--merge", "data.json", "vm") == "vm\n"
        assert json.loads(run("metadata", "vm")) == {"a": {"b": 1}, "x": "y"}
        assert run("metadata", "--set", "-", "vm", input='{"z": {}}') == "vm\n"
        assert request("GET", "/doppel/v1/metadata", 200) == {"z": {}}
        run("metadata", "--set", "disk", "vm", status=1)
        run("metadata", "--set", "data.json", "--merge", "data.json", "vm", status=2)

        events, terminal = Connection("vm"), Connection("vm")
        events.request("GET", "/doppel/v1/events?since=0")
        terminal.request("GET", "/doppel/v1/console")
        stream, output = events.getresponse(), terminal.getresponse()
        assert (stream.status, stream.getheader("Content-Type")) == (200, "text/event-stream")
        assert (output.status, output.getheader("Content-Type")) == (200, "application/octet-stream")

        def next_event():
            fields = dict(line.split(": ", 1) for line in iter(lambda: stream.readline().decode().rstrip("\n"), ""))
            event = json.loads(fields["data"])
            check(schemas["Event"], event, schemas, "event")
            assert event["event"] == fields["event"] and int(fields["id"]) > 0
            return event["event"]
        assert next_event() == "started"
        assert request("POST", "/doppel/v1/console", 200, b"echo")["taken_bytes"] == 4
        assert output.read(4) == b"echo"
        for _ in range(2):  # it ends with its listener, and begins again
            tracer = Connection("vm")
            tracer.request("GET", "/doppel/v1/trace")
            trace = tracer.getresponse()
            assert (trace.status, trace.getheader("Content-Type")) == (200, "text/plain")
            assert trace.readline().startswith(b"# ") and re.fullmatch(TRACED, trace.readline().decode())
            tracer.close()
        request("POST", "/doppel/v1/pause", 204)
        assert request("GET", "/doppel/v1/vm", 200)["state"] == "paused"
        request("POST", "/doppel/v1/pause", 204)  # stands still already
        request("POST", "/doppel/v1/resume", 204)
        request("POST", "/doppel/v1/resume", 400)
        request("POST", "/doppel/v1/reset", 204)
        request("POST", "/doppel/v1/power-button", 204)
        assert sorted(next_event() for _ in range(4)) == ["paused", "power-button", "reset", "resumed"]
        for name in ("second", "third"):
            with open(name, "wb") as disk:
                disk.truncate(2 << 20)
        request("POST", "/doppel/v1/devices", 204, b'{"disk": "second,id=two"}')
        assert next_event() == "device-added"
        assert "two" in {device["name"] for device in request("GET", "/doppel/v1/devices", 200)}
        request("PATCH", "/doppel/v1/devices/two", 204, b'{"path": "third"}')
        request("PATCH", "/doppel/v1/devices/two", 400, b'{"path": "missing"}')
        request("PATCH", "/doppel/v1/devices/nothing", 400, b'{"path": "disk"}')
        request("POST", "/doppel/v1/devices", 204, b'{"net": "user"}')
        assert next_event() == "device-added"
        request("DELETE", "/doppel/v1/devices/two", 204)  # this guest lets nothing go
        request("DELETE", "/doppel/v1/devices/rng0", 400)
        request("DELETE", "/doppel/v1/devices/%2e%2e%2fx", 400)
        for body in (b"", b"[]", b"{}", b'{"disk": 5}', b'{"disk": "missing"}', b'{"net": "pigeon"}', b'{"disk": "second", "net": "user"}', b'{"floppy": "x"}',
                     b'{"disk": "a\\u0000b"}'):
            request("POST", "/doppel/v1/devices", 400, body)
        assert request("GET", "/doppel/v1/snapshot", 200)["base_id"] == ""
        os.mkdir("data/doppel/snapshots/vm/.new-x")
        made = request("POST", "/doppel/v1/snapshot", 200, b'{"name": "x", "zstd_level": 1, "secret": "616263", "without_disks": true}')
        assert request("GET", "/doppel/v1/snapshot", 200) == {"base_id": made["id"], "under_way": False, "pages": made["pages"], "pages_expected": made["pages"]}
        assert sorted(os.listdir("data/doppel/snapshots/vm/.new-x")) == ["memory", "state"]
        for body in (b"", b"{}", b'{"name": "x"}', b'{"name": "missing"}', b'{"name": "../x"}', b'{"name": "y", "zstd_level": 20}', b'{"name": "y", "secret": "6"}',
                     b'{"name": "y", "since": "00"}', b'{"name": "y", "x": 1}'):
            request("POST", "/doppel/v1/snapshot", 400, body)
        os.mkdir("data/doppel/snapshots/vm/.new-y")
        body = json.dumps({"name": "y", "since": made["id"], "without_disks": True}).encode()
        assert request("POST", "/doppel/v1/clone", 200, body)["parent_id"] == made["id"]
        request("POST", "/doppel/v1/clone", 400, body)
        assert request("GET", "/doppel/v1/migration", 200) == {"under_way": False, "following": False, "throttle": 0, "pages": 0, "pages_left": 0, "disk_bytes_left": 0, "bytes": 0}
        request("DELETE", "/doppel/v1/migration", 400)
        for body in (b"", b"[]", b'{"downtime_ms": 0}', b'{"downtime_ms": "50"}', b'{"about": "x"}', b'{"x": 1}'):
            request("POST", "/doppel/v1/migration", 400, body)
        request("GET", "/doppel/v1/events?since=-1", 400)
        for body in (b"[]", b"5", b"{", b'{"timeout_s": "1"}', b'{"timeout_s": -1}', b'{"timeout_s": 1.5}', b'{"timeout_s": 1e30}', b'{"timeout_s": 1, "x": 1}',
                     b'{"timeout_s": 1, "timeout_s": 1}', b"[" * 40000):
            request("POST", "/doppel/v1/stop", 400, body)
        for method, path, status in (("GET", "/doppel/v1/nothing", 404), ("PUT", "/doppel/v1/vm", 405), ("GET", "/doppel/v1/pause", 405), ("GET", "/", 404)):
            got, _, text = ask("vm", method, path)
            assert got == status and "fault_message" in json.loads(text), (method, path, got)
        assert ask("vm", "POST", "/doppel/v1/console", b"x" * 100000)[0] == 413
        # Clients that come and go.
        for _ in range(80):
            gone = Connection("vm")
            gone.request("GET", "/doppel/v1/events")
            gone.sock.close()
        assert request("GET", "/doppel/v1/vm", 200)["state"] == "running"
        request("POST", "/doppel/v1/stop", 204, b'{"timeout_s": 600}')
        request("POST", "/doppel/v1/kill", 204)
        assert [next_event(), next_event()] == ["power-button", "ended"]
        assert stream.read() == b"" and output.read() == b""
        wait_for("end", lambda: state("vm") == "ended")
        streams = {("get", "/doppel/v1/events"), ("get", "/doppel/v1/console"), ("get", "/doppel/v1/trace")}
        described = {(method, path) for path, methods in description["paths"].items() for method in methods}
        assert asked | streams == described, asked ^ described
        with open(f"{folder}/doppel/vm/events.log") as log:
            for line in log:
                check(schemas["Event"], json.loads(line), schemas, "events.log")


def watching():
    """stats, top, events --follow, completion."""
    with runtime():
        follower = subprocess.Popen([doppel, "events", "--follow", "--json"], stdout=subprocess.PIPE, text=True)
        start(small_guests.SPIN, name="busy")
        start(small_guests.HALT, name="idle")
        seen = [json.loads(follower.stdout.readline()) for _ in range(2)]
        assert {(event["vm"], event["event"]) for event in seen} == {("busy", "started"), ("idle", "started")}
        statistics = {vm["name"]: vm for vm in json.loads(run("stats", "--json"))}
        assert set(statistics) == {"busy", "idle"} and statistics["busy"]["counters"]["process_threads"] > 3
        table = {line.split()[0]: float(line.split()[2]) for line in run("stats").splitlines()[1:]}
        assert table["busy"] > table["idle"], table
        looks = run("top", "--batch", "--count", "2", "--delay", "1").split("NAME")
        assert len(looks) == 3 and "busy" in looks[1] and "idle" in looks[2]
        run("top", status=2)
        master, slave = pty.openpty()
        top = subprocess.Popen([doppel, "top", "busy"], stdin=slave, stdout=slave, stderr=slave, env={**os.environ, "TERM": "xterm"})
        screen = b""
        while b"busy" not in screen:
            assert select.select([master], [], [], LIMIT)[0]
            screen += os.read(master, 65536)
        os.write(master, b"q")
        while top.poll() is None:
            if select.select([master], [], [], 0.1)[0]:
                os.read(master, 65536)
        assert top.returncode == 0
        script = run("completion", "bash") + f'\nPATH={os.path.dirname(doppel)}:$PATH; COMP_WORDS=(doppel stop b); COMP_CWORD=2; _doppel; echo "${{COMPREPLY[@]}}"'
        assert subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=LIMIT).stdout == "busy\n"
        run("kill", "busy", "idle")
        seen = [json.loads(follower.stdout.readline()) for _ in range(2)]
        assert {(event["vm"], event["event"], event["detail"]) for event in seen} == {("busy", "ended", "stopped"), ("idle", "ended", "stopped")}
        follower.kill()
        follower.wait()
        assert len(run("events").splitlines()) == 4 and len(run("events", "idle").splitlines()) == 2


def serve():
    """A machine behind the API of other tools is one of the directory's, before its start and after."""
    with runtime() as folder:
        server = subprocess.Popen([doppel, "serve", "--api-sock", "tool.sock", "--id", "tool", "--engine", "interp"], stdin=subprocess.DEVNULL,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        wait_for("start", lambda: state("tool") == "starting" and os.path.exists("tool.sock"))
        run("pause", "tool", status=1)
        assert "not been started" in run.errors
        connection = Connection("tool")
        connection.path = f"{folder}/tool.sock"

        def request(method, path, body=None):
            connection.request(method, path, json.dumps(body) if body else None)
            answer = connection.getresponse()
            text = answer.read().decode()
            assert answer.status in (200, 204), f"{method} {path}: {answer.status} {text}"
            return json.loads(text) if text else None
        request("PUT", "/boot-source", {"kernel_image_path": kernel(small_guests.say("tool") + small_guests.HALT)})
        request("PUT", "/actions", {"action_type": "InstanceStart"})
        wait_for("console", lambda: run("logs", "tool") == "tool")
        assert state("tool") == "running" and request("GET", "/doppel/v1/vm")["state"] == "running"
        run("pause", "tool")
        assert request("GET", "/")["state"] == "Paused" and state("tool") == "paused"
        run("restart", "tool", status=1)
        request("PATCH", "/vm", {"state": "Resumed"})
        wait_for("resume", lambda: state("tool") == "running")
        assert [json.loads(line)["event"] for line in run("events", "--json", "tool").splitlines()] == ["started", "paused", "resumed"]
        run("kill", "tool")
        assert server.wait(LIMIT) == 0 and not vms(), server.stderr.read()
        server.stderr.close()


def many():
    """Several started at once: each runs, each under its own name."""
    count = 12
    with runtime():
        path = kernel(small_guests.say("up\n") + small_guests.HALT)
        starts = [subprocess.Popen([doppel, "run", "-d", "--kernel", path, "--memory", "4M", "--net", "none"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                  for _ in range(count)]
        names = set()
        for process in starts:
            name, errors = process.communicate(timeout=2 * LIMIT)
            assert process.returncode == 0, errors
            names.add(name.strip())
        assert len(names) == count and {vm["state"] for vm in vms().values()} == {"running"}
        for name in names:
            wait_for(f"console of {name}", lambda: run("logs", name) == "up\n")
        run("kill", *names)
        run("rm", *names)
        assert not vms()
        racers = [subprocess.Popen([doppel, "run", "-d", "--name", "one", "--kernel", path, "--memory", "4M", "--net", "none"], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL) for _ in range(6)]
        assert sorted(racer.wait(2 * LIMIT) for racer in racers) == [0, 2, 2, 2, 2, 2]


scenarios = {scenario.__name__: scenario for scenario in (names, life, crash, restart, console, api, watching, serve, many)}


def main():
    signal.signal(signal.SIGALRM, lambda *_: sys.exit("took too long"))
    signal.alarm(280)
    scenarios[sys.argv[2]]()
    print(f"{sys.argv[2]}: passed")


if __name__ == "__main__":
    main()
