#!/usr/bin/env python3
"""Debian's vsock driver and the agent: connections from both sides, many at once, large ones, half-closed and aborted ones, and over a reset."""
import hashlib
import os
import socket
import subprocess
import tempfile
import threading
import time

import guest
from guest import busybox

MEGABYTES = 12


class Vsock:
    def __init__(self, path):
        self.path = path

    def exec(self, *command, input=None, options=(), seconds=60):
        return subprocess.run([guest.doppel, "exec", "--vsock", self.path, *options, *(["-i"] if input is not None else []), "--", *command], input=input,
                              capture_output=True, timeout=seconds)

    def start(self, command):
        return subprocess.Popen([guest.doppel, "exec", "--vsock", self.path, "--", "sh", "-c", command], stdout=subprocess.PIPE)

    def connect(self, port, seconds=30):
        """To a port of the guest; waits until somebody listens there."""
        end = time.monotonic() + seconds
        while True:
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(60)
            connection.connect(self.path)
            connection.sendall(b"CONNECT %d\n" % port)
            answer = connection.recv(64)
            if answer.startswith(b"OK "):
                return connection
            connection.close()
            assert answer == b"" and time.monotonic() < end, f"port {port}: {answer}"

    def listen(self, port):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{self.path}_{port}")
        listener.listen(64)
        listener.settimeout(60)
        return listener


def receive(connection):
    data = bytearray()
    while part := connection.recv(1 << 18):
        data += part
    return bytes(data)


def commands(vsock):
    done = vsock.exec("sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n"), done
    data = os.urandom(MEGABYTES << 20)
    digest = hashlib.sha256(data).hexdigest().encode()
    began = time.monotonic()
    done = vsock.exec("sha256sum", input=data)
    assert done.stdout.split()[0] == digest, done
    print(f"{MEGABYTES / (time.monotonic() - began):.0f} MiB/s into sha256sum")
    running = [vsock.start(f"echo {n}; exit {n}") for n in range(16)]
    for n, one in enumerate(running):
        assert one.communicate(timeout=60)[0] == b"%d\n" % n and one.returncode == n


def from_the_guest(vsock):
    """Connections to listeners of the host; half of each is closed while the other half goes on."""
    listener = vsock.listen(7000)
    running = [vsock.start(f"(dd if=/dev/urandom bs=64k count=24 2>/dev/null | tee /tmp/sent{n}) | doppel-agent connect 7000 | cat; sha256sum </tmp/sent{n}")
               for n in range(4)]
    connections = [listener.accept()[0] for _ in running]
    digests = []

    def serve(connection):
        data = receive(connection)  # until the guest's half is closed
        digests.append(hashlib.sha256(data).hexdigest())
        connection.sendall(b"got %d\n" % len(data))
        connection.close()

    threads = [threading.Thread(target=serve, args=(one,)) for one in connections]
    for one in threads:
        one.start()
    said = [one.communicate(timeout=60)[0].decode().split() for one in running]
    for one in threads:
        one.join(60)
    assert all(words[:2] == ["got", str(24 * 65536)] for words in said), said
    assert sorted(words[2] for words in said) == sorted(digests)
    done = vsock.exec("doppel-agent", "connect", "7001")
    assert done.returncode == 1 and b"connect" in done.stderr, done  # nobody listens there
    # The host's program goes away with bytes unread; the guest's writer is not left hanging.
    one = vsock.start("yes | doppel-agent connect 7000; echo over")
    connection = listener.accept()[0]
    connection.recv(10)
    connection.close()
    assert one.communicate(timeout=60)[0].endswith(b"over\n")
    listener.close()


def from_the_host(vsock):
    """Into a program of the guest, which reads slowly, and an echo."""
    data = os.urandom(MEGABYTES << 20)
    one = vsock.start("doppel-agent listen 7100 </dev/null | (sleep 1; sha256sum)")
    connection = vsock.connect(7100)
    began = time.monotonic()
    connection.sendall(data)
    connection.shutdown(socket.SHUT_WR)
    assert one.communicate(timeout=60)[0].split()[0] == hashlib.sha256(data).hexdigest().encode()
    print(f"{MEGABYTES / (time.monotonic() - began - 1):.0f} MiB/s from the host")
    connection.close()
    one = vsock.start("mkfifo /tmp/back; doppel-agent listen 7101 </tmp/back | cat >/tmp/back")
    connection = vsock.connect(7101)
    times = []
    for n in range(200):
        began = time.monotonic()
        connection.sendall(b"%d" % n)
        assert connection.recv(100) == b"%d" % n
        times.append(time.monotonic() - began)
    print(f"echo: {sorted(times)[100] * 1e6:.0f} us")
    connection.close()
    one.communicate(timeout=60)


def over_a_reset(vsock, vm):
    one = vsock.start("echo ready; exec sleep 600")
    assert one.stdout.readline() == b"ready\n"
    vm.type("reboot -f\n")
    assert one.wait(60) == 125  # the connection ends with the machine
    done = vsock.exec("uptime", options=["--wait", "90"], seconds=100)
    assert done.returncode == 0, done


def vsock():
    with tempfile.TemporaryDirectory(prefix="doppel-vsock-") as folder:
        path = f"{folder}/v.sock"
        with busybox("--vsock", f"path={path},cid=77", name="vsock") as vm:
            host = Vsock(path)
            done = host.exec("true", options=["--wait", "30"])
            assert done.returncode == 0, done
            # The kernel complains about nothing.
            for part in (commands, from_the_guest, from_the_host):
                began = time.monotonic()
                part(host)
                print(f"{part.__name__}: {time.monotonic() - began:.1f} s", flush=True)
            complaints = vm.run("dmesg | grep -E 'BUG:|Oops|Call Trace|vsock|stall' | grep -v NET: || true")
            assert not complaints, complaints
            over_a_reset(host, vm)
            done = subprocess.run([guest.doppel, "guest", "--vsock", path, "poweroff"], timeout=30)
            assert done.returncode == 0
            vm.finish(0)
        assert not os.path.exists(path)


if __name__ == "__main__":
    guest.main({"vsock": vsock})
