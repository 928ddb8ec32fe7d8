"""Drives a guest from the outside: starts `doppel run` on a pseudo-terminal, waits for text, types, and never leaves a process behind.

Everything has a time limit. What goes wrong is an AssertionError; the caller's `with` block then prints the end of what the guest said.
"""
import fcntl
import glob
import gzip
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
import traceback

SKIP = 77
doppel = os.environ.get("DOPPEL")
cache = os.environ.get("DOPPEL_CACHE")
kernel = os.environ.get("DOPPEL_KERNEL")
# Limits are for a slow engine on a busy host; a faster machine only waits when something is wrong.
BOOT_SECONDS = 90


def need(*paths):
    """Ends the program with meson's "skipped" when something is not there."""
    for path in paths:
        if not path or not os.path.exists(path):
            print(f"skipped: {path or 'DOPPEL, DOPPEL_CACHE or DOPPEL_KERNEL'} is missing; run ./check guest")
            sys.exit(SKIP)


def cached(name):
    path = os.path.join(cache or "", name)
    need(cache, path)
    return path


def modules(*names):
    """Files of the kernel's modules, dependencies first."""
    release = os.path.basename(glob.glob(cached("kernel") + "/lib/modules/*")[0])
    files = []
    for name in names:
        out = subprocess.run(["/sbin/modprobe", "-d", cached("kernel"), "-S", release, "--show-depends", name], capture_output=True, text=True, check=True)
        for line in out.stdout.splitlines():
            if line.startswith("insmod") and line.split()[1] not in files:
                files.append(line.split()[1])
    return files


def archive(path, entries):
    """A cpio archive ("newc") of (name, contents) behind the busybox initial RAM disk: the kernel unpacks both."""
    def entry(inode, name, mode, data):
        fields = [inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0]
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        return head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4)

    parts = [entry(1, "extra", 0o40755, b"")]
    parts += [entry(n + 2, "extra/" + name, 0o100755, data) for n, (name, data) in enumerate(entries)]
    parts.append(entry(0, "TRAILER!!!", 0, b""))
    with open(cached("demo-initrd.gz"), "rb") as first, open(path, "wb") as out:
        data = first.read()
        out.write(data + b"\0" * (-len(data) % 4) + gzip.compress(b"".join(parts), 1))


def plain(data):
    """Text without what shells send to terminals: questions for the cursor's place, bracketed paste."""
    return re.sub(r"\r|\x1b\[(6n|\?2004[hl])", "", bytes(data).decode(errors="replace"))


class Guest:
    """One run of Doppel. `arguments` follow `doppel run` (or another `command`), `wrapper` is a command that runs it. Standard input and output are a terminal, standard
    error is a file, `self.stderr()`."""

    def __init__(self, arguments, name="guest", wrapper=(), command="run", program=None):
        self.name = name
        self.transcript = bytearray()
        self.unread = bytearray()
        self.errors = tempfile.TemporaryFile()
        self.started = time.monotonic()
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 200, 0, 0))
        self.terminal_before = termios.tcgetattr(slave)
        self.slave = slave
        self.process = subprocess.Popen(
            [*wrapper, program or doppel, command, *(str(a) for a in arguments)],
            stdin=slave, stdout=slave, stderr=self.errors, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        if self.errors.closed:
            return
        running = self.process.poll() is None
        if running:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.read_rest()
        if kind and kind is not SystemExit:
            end = plain(self.transcript[-6000:])
            print(f"---- {self.name}: {' '.join(self.process.args)}")
            print(f"---- after {self.seconds():.1f} s, {'killed' if running else f'status {self.process.returncode}'}; the last of its screen:")
            print(end)
            print("---- standard error:")
            print(self.stderr()[-6000:])
            print("----", flush=True)
        os.close(self.master)
        os.close(self.slave)
        self.errors.close()

    def seconds(self):
        return time.monotonic() - self.started

    def stderr(self):
        self.errors.flush()
        return os.pread(self.errors.fileno(), 1 << 22, 0).decode(errors="replace")

    def read_some(self, seconds):
        """Takes what the terminal has, waiting at most that long for the first byte; false when there was nothing."""
        if not select.select([self.master], [], [], max(seconds, 0))[0]:
            return False
        data = os.read(self.master, 65536)
        self.transcript += data
        self.unread += data
        return True

    def read_rest(self):
        """What a process that has ended left behind."""
        while self.read_some(0):
            pass

    def expect(self, pattern, seconds, raw=False):
        """Waits for a regular expression in what was not read yet; takes everything up to its end, `self.before` is what was before it (`raw`: as bytes, as it came)."""
        end = time.monotonic() + seconds
        compiled = re.compile(pattern.encode())
        while True:
            found = compiled.search(bytes(self.unread))
            if found:
                self.before = bytes(self.unread[:found.start()]) if raw else plain(self.unread[:found.start()])
                del self.unread[:found.end()]
                return found
            ended = self.process.poll() is not None
            more = self.read_some(0 if ended else min(end - time.monotonic(), 0.2))
            assert more or not ended, f"ended with status {self.process.returncode} while waiting for {pattern!r}"
            assert time.monotonic() < end, f"no {pattern!r} within {seconds} s"

    def type(self, text):
        data = text.encode() if isinstance(text, str) else text
        while data:
            written = os.write(self.master, data[:512])
            data = data[written:]

    def attempt(self, command, seconds=30):
        """Runs a shell command in the guest; returns (status, output)."""
        # The marks are written so that the echo of the typed line does not look like them; on one line, as the command may read what is typed.
        self.type(f"echo '<''begin>'; {command}; echo '<''end:'$?'>'\n")
        self.expect(r"<begin>\r*\n", seconds)
        found = self.expect(r"<end:(\d+)>\r*\n", seconds)
        return int(found.group(1)), self.before.strip("\n")

    def run(self, command, seconds=30):
        status, output = self.attempt(command, seconds)
        assert status == 0, f"in the guest, status {status}: {command}\n{output}"
        return output

    def signal(self, number):
        self.process.send_signal(number)

    def finish(self, status, seconds=30):
        """Waits for the end and its status."""
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            self.read_some(0.1)
            assert time.monotonic() < end, f"still running after {seconds} s"
        self.read_rest()
        assert self.process.returncode == status, f"ended with status {self.process.returncode}, not {status}"
        assert termios.tcgetattr(self.slave) == self.terminal_before, "the terminal's settings were not put back"


def busybox_arguments(*more):
    need(doppel, kernel, cache)
    return ["--kernel", kernel, "--initrd", cached("demo-initrd.gz"), "--append", "console=ttyS0 quiet", *more]


def wait_for_shell(guest, seconds=BOOT_SECONDS):
    guest.expect(r"poweroff +\(or Ctrl-A x", seconds)
    guest.expect(r"# ", seconds)
    guest.run("stty -echo; PS1=")
    guest.shell_seconds = guest.seconds()


def busybox(*more, name="guest", seconds=BOOT_SECONDS):
    """A busybox guest at its shell."""
    guest = Guest(busybox_arguments(*more), name)
    try:
        wait_for_shell(guest, seconds)
    except BaseException:
        guest.__exit__(*sys.exc_info())
        raise
    return guest


def main(scenarios):
    """Runs the scenario named on the command line: a test for meson."""
    def too_late(number, frame):
        raise AssertionError("took too long" if number == signal.SIGALRM else "stopped from outside")

    # Whatever happens: no test outlives its time, and none leaves its guest behind.
    signal.signal(signal.SIGALRM, too_late)
    signal.signal(signal.SIGTERM, too_late)
    signal.alarm(int(os.environ.get("TEST_SECONDS", "900")))
    if len(sys.argv) != 2 or sys.argv[1] not in scenarios:
        print("scenarios:", " ".join(scenarios))
        sys.exit(2)
    began = time.monotonic()
    try:
        scenarios[sys.argv[1]]()
    except (AssertionError, OSError) as error:
        print(f"FAILED: {error}")
        traceback.print_exc()
        sys.exit(1)
    print(f"{sys.argv[1]}: passed in {time.monotonic() - began:.1f} s")
