#!/usr/bin/env python3
"""Direct execution on hosts that lack something of what it needs, or where others meddle with its process: user code is translated then, the user is told once, and the guest is right; or lost, with a message.

usage: direct_hosts.py DOPPEL PROGRAM   (PROGRAM: the conformance program `scattered`)
"""
import ctypes
import errno
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time

SKIPPED = 77
LOST, USAGE = 1, 2  # exit statuses
SOMEBODY = 61234  # who has no other processes
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
ALLOW, ERRNO, TRAP, KILL = 0x7fff0000, 0x50000, 0x30000, 0x80000000  # SECCOMP_RET_*
SYSCALLS = {"mmap": 9, "munmap": 11, "vfork": 58, "kill": 62, "ptrace": 101, "setsid": 112, "pipe2": 293, "prctl": 157, "prlimit64": 302, "seccomp": 317, "execveat": 322, "close_range": 436,
            "sched_setaffinity": 203}
SETREGS, SETREGSET, GETSIGINFO, POKEUSER, CONT, SINGLESTEP, SYSEMU, TRACEME = 13, 0x4205, 0x4202, 6, 7, 9, 31, 0  # PTRACE_*
SHORT = "pieces=200 rounds=1"
LONG = "pieces=2000 rounds=100000"  # in and out of ring 3
ENDLESS = "pieces=2000 rounds=1 repeats=100000000"  # ring 3

# What the host's filter does to a system call, or one with this first argument; and what the message says then. None: direct execution can do without.
DENIED = (
    ("ptrace", None, ERRNO | errno.EPERM, "PTRACE_TRACEME"), ("ptrace", None, ERRNO | errno.ENOSYS, "PTRACE_TRACEME"), ("ptrace", None, KILL, "PTRACE_TRACEME"),
    ("ptrace", SETREGS, ERRNO | errno.EIO, "munmap"), ("ptrace", SETREGSET, ERRNO | errno.EIO, "PTRACE_SETREGSET"), ("ptrace", GETSIGINFO, ERRNO | errno.EPERM, "filter"),
    ("ptrace", POKEUSER, ERRNO | errno.EIO, "breakpoints"), ("ptrace", CONT, ERRNO | errno.EPERM, "PTRACE_CONT"), ("ptrace", SINGLESTEP, ERRNO | errno.EPERM, "munmap"),
    ("ptrace", SYSEMU, ERRNO | errno.EIO, "PTRACE_SYSEMU"), ("execveat", None, ERRNO | errno.ENOSYS, "execveat"), ("execveat", None, KILL, "execveat"),
    ("seccomp", None, ERRNO | errno.EPERM, "seccomp"), ("seccomp", None, ERRNO, "filter"), ("seccomp", None, TRAP, "seccomp"), ("seccomp", None, KILL, "seccomp"),
    ("close_range", None, ERRNO | errno.EPERM, "close_range"), ("prctl", 26, TRAP, "PR_SET_TSC"), ("prlimit64", None, ERRNO | errno.EPERM, "limits"),
    ("vfork", None, ERRNO | errno.EAGAIN, "process"), ("pipe2", None, ERRNO | errno.EPERM, "signal"), ("kill", None, ERRNO | errno.EPERM, None), ("sched_setaffinity", None, ERRNO | errno.EPERM, None),
)
ABOUT_LISTING = "^doppel: (warning: |this virtual machine (is not listed|cannot be reached) by )"  # what others see of the machine, which runs all the same
failures = []


def deny(call, argument, action):
    """Installs the filter in this process, for all that it starts."""
    def insn(code, yes, no, k):
        return struct.pack("<HBBI", code, yes, no, k)
    allow, test = insn(6, 0, 0, ALLOW), insn(0x15, 0, 1, SYSCALLS[call]) if argument is None else insn(0x15, 0, 3, SYSCALLS[call])
    first = b"" if argument is None else insn(0x20, 0, 0, 16) + insn(0x15, 0, 1, argument)
    code = insn(0x20, 0, 0, 0) + test + first + insn(6, 0, 0, action) + allow
    array = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(code) // 8, ctypes.addressof(array)))
    libc = ctypes.CDLL(None)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0):
        os._exit(SKIPPED)


def stat_of(pid):
    """The fields behind the name: the state, the parent, ...; empty when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []


def is_alive(pid):
    return stat_of(pid)[:1] not in ([], ["Z"], ["X"])


class Guest:
    """One run. said: the messages; stops: of direct execution; done: the guest got to the end and was right."""

    def __init__(self, append, before=None, wrapper=(), options=()):
        self.folder = tempfile.TemporaryDirectory()
        os.chmod(self.folder.name, 0o777)
        self.console = os.path.join(self.folder.name, "console")
        line = [*wrapper, DOPPEL, "run", "--kernel", PROGRAM, "--memory", "128M", "--engine", "bt", "--direct", "always", "--console", "file:" + self.console, "--on-reset", "exit", "--stats", *options,
                "--append", "direct " + append]
        self.process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=before)

    def child(self, state="RSDtT"):
        """Its process of direct execution, when it is in one of these states; waits for it. None: the guest has ended."""
        deadline = time.monotonic() + 20
        while self.process.poll() is None and time.monotonic() < deadline:
            for entry in filter(str.isdigit, os.listdir("/proc")):
                stat = stat_of(entry)
                if stat and int(stat[1]) == self.process.pid and stat[3] == entry and stat[0] in state:  # has a session of its own: it is traced, not just forked
                    return int(entry)
        return None

    def kill_child(self, number, state="RSDtT"):
        """False: the guest has ended."""
        pid = self.child(state)
        try:
            if pid:
                os.kill(pid, number)
        except ProcessLookupError:
            pass
        return bool(pid)

    def end(self, seconds=60):
        try:
            text = self.process.communicate(timeout=seconds)[1]
            self.status = self.process.returncode
        except subprocess.TimeoutExpired:
            self.process.kill()
            text = self.process.communicate()[1]
            self.status = "stands still"
        self.said = [line for line in text.splitlines() if line.startswith("doppel: ") and not re.search(ABOUT_LISTING, line)]
        self.stops = sum(int(stops) for stops in re.findall(r"^direct: cpu .* (\d+) stops,", text, re.MULTILINE))
        try:
            with open(self.console, encoding="utf-8", errors="replace") as file:
                self.done = "DONE 0 failures" in file.read()
        except FileNotFoundError:
            self.done = False
        self.folder.cleanup()
        return self


def check(condition, what, guest):
    if not condition:
        failures.append(what)
        print(f"not ok {what}: status {guest.status}, {'' if guest.done else 'not '}finished, {guest.stops} stops")
        print("".join("    " + line + "\n" for line in guest.said), end="")


def translated(guest, what, mention):
    """Right, not executed directly, and one message that mentions this."""
    good = guest.status == 0 and guest.done and guest.stops == 0 and len(guest.said) == 1 and "translated, not executed directly" in guest.said[0] and mention in guest.said[0]
    check(good, what, guest)


def direct(guest, what):
    check(guest.status == 0 and guest.done and guest.stops and not guest.said, what, guest)


def denied():
    for call, argument, action, mention in DENIED:
        guest = Guest(SHORT, lambda: deny(call, argument, action), options=["--sandbox", "off"]).end()  # which has more to say about such hosts
        what = f"{call}{'' if argument is None else f'({argument:#x})'} that ends with {action:#x}"
        if mention:
            translated(guest, what, mention)
        else:
            direct(guest, what)


def limits():
    for files in range(6, 24, 2):
        guest = Guest(SHORT, lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))).end()
        if guest.status == 0 and guest.stops == 0:
            translated(guest, f"{files} open files", "translated")
        else:
            check((guest.status == USAGE and len(guest.said) == 1) or (guest.status == 0 and guest.done and not guest.said), f"{files} open files", guest)
    guest = Guest("rounds=1").end()
    with open("/proc/sys/vm/max_map_count", encoding="ascii") as file:
        scarce = int(file.read()) < 70000
    check(guest.status == 0 and guest.done and guest.stops and len(guest.said) == scarce and all("vm.max_map_count" in line for line in guest.said), "too many mappings", guest)


def ordinary_user():
    """The limit of processes does not bind root."""
    def become(processes=None):
        if processes:
            resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))
        os.setgroups([])
        os.setgid(SOMEBODY)
        os.setuid(SOMEBODY)
    try:
        first = Guest(SHORT, become).end()
        if first.status == USAGE:
            raise PermissionError
    except (PermissionError, subprocess.SubprocessError):
        print("limit of processes: nobody cannot run this here")
        return
    direct(first, "an ordinary user")
    seen = set()
    for processes in range(1, 9):
        guest = Guest(SHORT, lambda: become(processes), options=("--sandbox", "off")).end()
        if guest.status == 0 and guest.stops == 0:
            translated(guest, f"{processes} processes", "no process")
        else:
            check((guest.status == LOST and any("thread" in line for line in guest.said)) or (guest.status == 0 and guest.done and not guest.said), f"{processes} processes", guest)
        seen.add((guest.status, guest.stops > 0))
    check(len(seen) == 3, f"limits between too few threads, no process, and enough ({seen})", guest)


def inherited():
    direct(Guest(SHORT, lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN)).end(), "SIGCHLD ignored")
    if shutil.which("strace"):
        translated(Guest(SHORT, wrapper=("strace", "-f", "-qq", "-o", "/dev/null")).end(), "under strace -f", "PTRACE_TRACEME")
        direct(Guest(SHORT, wrapper=("strace", "-qq", "-o", "/dev/null")).end(), "under strace")
    no_exec = ("unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", 'echo 1 >/proc/sys/vm/memfd_noexec || exit 77; exec "$@"', "sh")
    if os.geteuid() == 0 and shutil.which("unshare") and subprocess.run([*no_exec, "true"], stderr=subprocess.DEVNULL, check=False).returncode == 0:
        direct(Guest(SHORT, wrapper=no_exec).end(), "vm.memfd_noexec")


def signals_from_outside():
    """Sent to the process, and to doppel itself: nothing is lost."""
    for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGTRAP, signal.SIGSEGV, signal.SIGSYS):
        guest = Guest("pieces=2000 rounds=20 repeats=20")
        while guest.kill_child(number):
            pass
        direct(guest.end(), f"{number.name} to the process")
    guest = Guest("pieces=2000 rounds=20 repeats=20")
    while guest.child():
        guest.process.send_signal(signal.SIGSTOP)
        time.sleep(0.02)
        guest.process.send_signal(signal.SIGCONT)
        time.sleep(0.02)
    direct(guest.end(), "doppel stopped and continued")


def killed():
    """While it stands still: the registers are doppel's, and the guest goes on. While it runs: they are lost, and that is said."""
    guest = Guest(ENDLESS)
    guest.child()
    time.sleep(0.5)  # while it is made, nothing is lost
    guest.kill_child(signal.SIGKILL, "R")
    guest.end(10)
    check(guest.status == LOST and len(guest.said) == 1 and "was killed, and the guest's registers with it" in guest.said[0], "the process killed while it runs", guest)
    survived = False
    for attempt in range(12):
        guest = Guest("pieces=2000 rounds=200")
        guest.child()
        time.sleep(0.1 + attempt * 0.01)
        guest.kill_child(signal.SIGKILL)
        guest.end()
        check(len(guest.said) == 1 and (guest.status == LOST or (guest.status == 0 and guest.done)), "the process killed at any time", guest)
        survived = guest.status == 0 and "for a while" in guest.said[0] and "was killed" in guest.said[0]
        if survived:
            break
    check(survived, "the process killed while it stands still", guest)
    guest = Guest(LONG)
    pid = guest.child()
    guest.process.kill()
    guest.end(10)
    time.sleep(0.2)
    check(guest.status == -signal.SIGKILL and pid and not is_alive(pid), "doppel killed: the process goes with it", guest)


def main():
    global DOPPEL, PROGRAM
    DOPPEL, PROGRAM = (os.path.abspath(path) for path in sys.argv[1:])
    plain = Guest(SHORT).end()
    if plain.status or not plain.stops:
        print("no direct execution on this host")
        return SKIPPED
    for part in denied, limits, ordinary_user, inherited, signals_from_outside, killed:
        start = time.monotonic()
        part()
        print(f"{part.__name__}: {time.monotonic() - start:.1f} s")
    print("all said clearly" if not failures else f"{len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
