#!/usr/bin/env python3
"""doppel exec, cp and guest against doppel-agent without a guest: this program plays the vsock device's Unix socket and hands each connection to an agent.

    agent.py DOPPEL DOPPEL-AGENT
"""
import hashlib
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import fcntl
import termios

doppel, agent = sys.argv[1:3]
folder = tempfile.TemporaryDirectory(prefix="doppel-agent-")
path = folder.name + "/v.sock"
PORT = 6789


class Device(threading.Thread):
    """Accepts, answers CONNECT, starts an agent for each connection. `behave`, when set, is called with the connection instead."""

    def __init__(self):
        super().__init__(daemon=True)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(64)
        self.behave = None
        self.agents = []

    def run(self):
        while True:
            connection = self.listener.accept()[0]
            line = b""
            while not line.endswith(b"\n"):
                line += connection.recv(1)
            if line != b"CONNECT %d\n" % PORT:
                connection.close()
                continue
            connection.sendall(b"OK 1073741824\n")
            if self.behave:
                threading.Thread(target=self.behave, args=(connection,), daemon=True).start()
                continue
            self.agents.append(subprocess.Popen([agent, "--stdio"], stdin=connection, stdout=subprocess.DEVNULL))
            connection.close()


device = Device()
device.start()


def command(*arguments, input=None, options=(), seconds=60):
    return subprocess.run([doppel, "exec", "--vsock", path, *options, "--", *arguments], input=input, capture_output=True, timeout=seconds)


def check(done, status, out=b"", err=b""):
    assert (done.returncode, done.stdout, done.stderr) == (status, out, err), f"{done.args}: {done}"


def simple():
    check(command("sh", "-c", "echo out; echo err >&2; exit 7"), 7, b"out\n", b"err\n")
    check(command("sh", "-c", "kill -9 $$"), 137)
    check(command("cat", input=b"not sent"), 0)  # without -i there is no input
    check(command("cat", input=b"sent", options=["-i"]), 0, b"sent")
    check(command("true", input=bytes(10 << 20), options=["-i"]), 0)  # nobody reads it
    check(command("pwd", options=["-w", "/usr"]), 0, b"/usr\n")
    check(command("sh", "-c", "echo $A-$B", options=["-e", "A=1 2", "-eB=x"]), 0, b"1 2-x\n")
    done = command("no-such-program")
    assert done.returncode == 127 and b"no-such-program" in done.stderr, done
    done = command("/etc/passwd")
    assert done.returncode == 126, done
    done = command("true", options=["-u", "nobody-of-that-name"])
    assert done.returncode == 125 and b"nobody-of-that-name" in done.stderr, done
    done = command("true", options=["-w", "/no/such"])
    assert done.returncode == 125 and b"/no/such" in done.stderr, done
    if os.geteuid() == 0:
        check(command("sh", "-c", "id -un; id -gn; echo $HOME", options=["-u", "daemon"]), 0, b"daemon\ndaemon\n/usr/sbin\n")
        check(command("sh", "-c", "id -u; id -g", options=["-u", "4321:17"]), 0, b"4321\n17\n")
    # A process left behind does not keep the end from being seen.
    began = time.monotonic()
    check(command("sh", "-c", "sleep 30 & echo done"), 0, b"done\n")
    assert time.monotonic() - began < 20
    done = subprocess.run([doppel, "exec", "--vsock", folder.name + "/nothing", "true"], capture_output=True, timeout=30)
    assert done.returncode == 125 and b"nothing" in done.stderr, done


def transfers():
    data = os.urandom(8 << 20)
    digest = hashlib.sha256(data).hexdigest().encode()
    check(command("sha256sum", input=data, options=["-i"]), 0, digest + b"  -\n")
    done = command("cat", input=data, options=["-i"])
    assert done.returncode == 0 and done.stdout == data
    done = command("sh", "-c", "head -c 3000000 /dev/zero; head -c 2000000 /dev/zero >&2")
    assert (done.returncode, len(done.stdout), len(done.stderr)) == (0, 3000000, 2000000), done.returncode


def many():
    running = [subprocess.Popen([doppel, "exec", "--vsock", path, "-i", "--", "sh", "-c", f"cat; exit {n}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
               for n in range(24)]
    for n, one in enumerate(running):
        out = one.communicate(b"%d" % n, timeout=60)[0]
        assert (one.returncode, out) == (n, b"%d" % n)


def signals():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        one = subprocess.Popen([doppel, "exec", "--vsock", path, "--", "sh", "-c", f"trap 'echo got; exit 9' {number.value}; echo ready; while :; do sleep 0.05; done"],
                               stdout=subprocess.PIPE)
        assert one.stdout.readline() == b"ready\n"
        one.send_signal(number)
        assert one.communicate(timeout=30)[0] == b"got\n" and one.returncode == 9
    # Also when the command does not read the input that was sent ahead.
    one = subprocess.Popen([doppel, "exec", "--vsock", path, "-i", "--", "sh", "-c", "echo ready; exec sleep 60"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert one.stdout.readline() == b"ready\n"
    os.set_blocking(one.stdin.fileno(), False)
    while select.select([], [one.stdin], [], 0.3)[1]:
        os.write(one.stdin.fileno(), bytes(65536))
    one.send_signal(signal.SIGTERM)
    assert one.wait(30) == 128 + signal.SIGTERM
    # The client vanishes: the command gets SIGHUP. (Its standard error has gone, too, where the shell would tell of its sleep's end.)
    marker = folder.name + "/hup"
    one = subprocess.Popen([doppel, "exec", "--vsock", path, "--", "sh", "-c", f"exec 2>/dev/null; trap 'echo hup >{marker}; exit' HUP; echo ready; while :; do sleep 0.05; done"],
                           stdout=subprocess.PIPE)
    assert one.stdout.readline() == b"ready\n"
    one.kill()
    one.wait()
    end = time.monotonic() + 30
    while not os.path.exists(marker):
        assert time.monotonic() < end, "no SIGHUP"
        time.sleep(0.02)


def read_until(master, pattern, seconds=30):
    data, end = b"", time.monotonic() + seconds
    while not re.search(pattern, data):
        assert time.monotonic() < end, f"no {pattern} in {data}"
        if select.select([master], [], [], 0.2)[0]:
            data += os.read(master, 65536)
    return data


def terminal():
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 77, 0, 0))
    before = termios.tcgetattr(slave)
    one = subprocess.Popen([doppel, "exec", "--vsock", path, "-it", "--", "sh", "-c", "stty size; trap 'stty size' WINCH; cat; echo end; read x; exit 3"],
                           stdin=slave, stdout=slave, stderr=slave, start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
                           env={**os.environ, "TERM": "vt100"})
    read_until(master, rb"33 77\r\n")
    os.write(master, b"hello\r")
    read_until(master, rb"hello\r\nhello\r\n")
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    os.write(master, b"\x04")
    assert b"40 100" in read_until(master, rb"end\r\n")
    os.write(master, b"\r")
    assert one.wait(30) == 3
    assert termios.tcgetattr(slave) == before
    one = subprocess.Popen([doppel, "exec", "--vsock", path, "-it", "--", "sh", "-c", "echo ready; exec sleep 60"], stdin=slave, stdout=slave, stderr=slave)
    read_until(master, rb"ready")
    os.write(master, b"\x03")
    assert one.wait(30) == 128 + signal.SIGINT
    done = command("true", options=["-t"])
    assert done.returncode == 2 and b"terminal" in done.stderr, done


def files():
    data = os.urandom(3 << 20)
    here, there = folder.name + "/here", folder.name + "/there"
    with open(here, "wb") as file:
        file.write(data)
    os.chmod(here, 0o751)

    def cp(*arguments, **options):
        return subprocess.run([doppel, "cp", "--vsock", path, *arguments], capture_output=True, timeout=60, **options)

    check(cp(here, ":" + there), 0)
    assert open(there, "rb").read() == data and os.stat(there).st_mode & 0o777 == 0o751
    done = cp(":" + there, "-")
    assert done.returncode == 0 and done.stdout == data
    check(cp("-", ":" + there, input=b"short"), 0)
    check(cp(":" + there, here), 0)
    assert open(here, "rb").read() == b"short"
    done = cp(":/no/such/file", here)
    assert done.returncode == 1 and b"/no/such/file" in done.stderr, done
    done = cp(here, ":/no/such/file")
    assert done.returncode == 1 and b"/no/such/file" in done.stderr, done
    done = cp(":/", here)
    assert done.returncode == 1 and b"directory" in done.stderr, done
    assert cp(here, there).returncode == 2


def questions():
    def guest(what):
        return subprocess.run([doppel, "guest", "--vsock", path, what], capture_output=True, timeout=60)

    done = guest("info")
    assert done.returncode == 0 and b"hostname=" + socket.gethostname().encode() in done.stdout and b"uptime=" in done.stdout, done
    done = guest("ping")
    assert done.returncode == 0 and re.fullmatch(rb"\d+ us\n", done.stdout), done
    assert guest("dance").returncode == 2


def frame(kind, body=b"", reserved=0):
    return struct.pack("<IBBH", len(body), kind, reserved, 0) + body


def hostile_guest():
    """Whatever a guest answers, the client ends with a line, and prints nothing that moves a terminal."""
    answers = [b"", b"\0" * 7, frame(200), frame(36, b"\x07"), frame(34, struct.pack("<I", 1 << 30)), struct.pack("<IBBH", 1 << 31, 32, 0, 0), frame(32, b"x", 1),
               frame(38, b"\x05\x1b[2Jboo"), frame(38), frame(35), os.urandom(100)]
    for answer in answers:
        def behave(connection):
            connection.sendall(answer)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass

        device.behave = behave
        done = command("true")
        assert done.returncode in (125, 5) and done.stderr.startswith(b"doppel: exec: ") and b"\x1b" not in done.stderr, (answer, done)
        for arguments in (["cp", "--vsock", path, ":/x", "/dev/null"], ["guest", "--vsock", path, "info"], ["guest", "--vsock", path, "ping"]):
            done = subprocess.run([doppel, *arguments], capture_output=True, timeout=30)
            assert done.returncode in (125, 5) and b"\x1b" not in done.stderr + done.stdout, (answer, done)
    device.behave = None


def hostile_host():
    """Whatever the agent is sent, it ends."""
    body = struct.pack("<BBHHHH", 1, 0, 0, 0, 1, 0) + b"\0\0sleep\0"
    requests = [frame(99), frame(1), frame(1, b"\2" + body[1:]), frame(1, body), frame(1, body[:-1]), frame(1, body + b"x"), frame(4, b"\0\0\0\0"), frame(5, b"/x"),
                frame(5), frame(6, b"123"), frame(7, b"\x09"), frame(16, b"input"), struct.pack("<IBBH", 65537, 1, 0, 0), b"GET / HTTP/1.0\r\n\r\n", frame(4, b"\0\0\0\0/tmp\0"),
                frame(1, struct.pack("<BBHHHH", 1, 0, 0, 0, 1, 0) + b"\0\0cat\0") + frame(17, b"\0"),
                frame(1, struct.pack("<BBHHHH", 1, 0, 0, 0, 1, 0) + b"\0\0sleep\x00") + frame(16, bytes(65536)) * 5]
    for request in requests:
        ours, theirs = socket.socketpair()
        one = subprocess.Popen([agent, "--stdio"], stdin=theirs)
        theirs.close()
        ours.settimeout(30)
        try:
            ours.sendall(request)
            ours.shutdown(socket.SHUT_WR)
            while ours.recv(65536):
                pass
        except (BrokenPipeError, ConnectionResetError):
            pass
        ours.close()
        assert one.wait(30) == 0, (request[:40], one.returncode)


for test in (simple, transfers, many, signals, terminal, files, questions, hostile_guest, hostile_host):
    began = time.monotonic()
    test()
    print(f"{test.__name__}: {time.monotonic() - began:.1f} s", flush=True)
for one in device.agents:
    one.wait(30)
