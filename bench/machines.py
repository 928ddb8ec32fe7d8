"""The three places where a workload runs: the host itself, Doppel, QEMU. All speak the agent's protocol (guest/agent.c); a machine that has nothing to do sleeps."""
import os
import pathlib
import re
import select
import shutil
import subprocess
import tempfile
import time

DONE = re.compile(rb"@done (\d+) (\d+) (\d+) (\d+) ([0-9a-f]{16}) ?([^\r\n]*)\r?\n")
APPEND = "console=ttyS0 quiet"
MEMORY = "512"
GUEST_MEMORY = "memfd:doppel-ram"   # the mapping's name in Doppel
TICKS = os.sysconf("SC_CLK_TCK")


class Failed(Exception):
    """A machine died, hung or answered nonsense."""


class Machine:
    """A process that answers on its standard output."""

    def __init__(self, name, command, **options):
        self.name, self.command = name, [str(word) for word in command]
        self.log = tempfile.TemporaryFile()
        self.seen = b""
        self.began = time.monotonic()
        self.idle_cpu_s = self.idle_s = 0.0
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, bufsize=0, **options)
        self.rest()

    def rest(self):
        """From here to the next wake() the machine should use no processor."""
        self.resting = time.monotonic(), self.cpu_s()

    def wake(self):
        since, cpu = self.resting
        self.idle_s += time.monotonic() - since
        self.idle_cpu_s += self.cpu_s() - cpu

    def cpu_s(self):
        try:
            with open(f"/proc/{self.process.pid}/stat") as stat:
                fields = stat.read().rsplit(")", 1)[1].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / TICKS

    def memory_mib(self):
        """Memory in use by the file it maps or "anonymous"; memory mapped several times counts once (Pss)."""
        kinds, name = {}, ""
        try:
            with open(f"/proc/{self.process.pid}/smaps") as maps:
                for line in maps:
                    words = line.split(None, 5)
                    if "-" in words[0]:
                        name = words[5].split("/")[-1].replace("(deleted)", "").strip() if len(words) > 5 else "anonymous"
                    elif words[0] == "Pss:":
                        kinds[name] = kinds.get(name, 0) + int(words[1]) / 1024
        except OSError:
            pass
        return kinds

    def errors(self):
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def wait_for(self, pattern, limit_s):
        """The match; what came up to it is forgotten."""
        until = time.monotonic() + limit_s
        while not (match := re.search(pattern, self.seen)):
            left = until - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                raise Failed(f"{self.name}: no answer in {limit_s:g} s; last: {self.seen[-200:].decode(errors='replace')!r}")
            data = os.read(self.process.stdout.fileno(), 65536)
            if not data:
                raise Failed(f"{self.name} ended early; last: {(self.seen[-300:].decode(errors='replace') + self.errors()[-700:])!r}")
            self.seen += data
        self.seen = self.seen[match.end():]
        return match

    def send(self, text):
        try:
            self.process.stdin.write(text.encode())
        except OSError as trouble:
            raise Failed(f"{self.name}: {trouble}; {self.errors()[-700:]!r}") from trouble

    def run(self, words, copies=1, limit_s=120):
        """One sample. `wall_ns` is the host's opinion of `total_ns`, with the console in it."""
        self.wake()
        began = time.monotonic_ns()
        self.send("run\t%d\t%s\n" % (copies, "\t".join(words)))
        match = self.wait_for(DONE, limit_s)
        wall = time.monotonic_ns() - began
        self.rest()
        sample = {"ns": int(match[1]), "total_ns": int(match[2]), "wall_ns": wall, "status": int(match[3]), "bytes": int(match[4]),
                  "hash": match[5].decode()}
        if sample["status"]:
            sample["text"] = match[6].decode(errors="replace")
        return sample

    def stop(self):
        """Powers off, by force after a while."""
        try:
            self.process.stdin.write(b"off\n")
            self.process.stdin.close()
        except OSError:
            pass
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self):
        self.process.kill()
        self.process.wait()


class Native(Machine):
    """The agent on the host, in a directory in memory; on one processor unless two are wanted."""

    def __init__(self, root, processors):
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.directory = tempfile.mkdtemp(prefix="doppel-bench-", dir=memory)
        shutil.copytree(pathlib.Path(root) / "bench", self.directory, dirs_exist_ok=True)
        allowed = sorted(os.sched_getaffinity(0))
        cpus = allowed[-1:] if processors == 1 else allowed

        def pin():
            os.sched_setaffinity(0, cpus)

        super().__init__("native", [pathlib.Path(root) / "init", root], cwd=self.directory, preexec_fn=pin)

    def stop(self):
        super().stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def kill(self):
        super().kill()
        shutil.rmtree(self.directory, ignore_errors=True)


def doppel_command(program, kernel, initrd, processors, engine, extra):
    return [program, "run", "--kernel", kernel, "--initrd", initrd, "--append", APPEND, "--memory", MEMORY + "M", "--cpus", processors, "--net", "none",
            "--engine", engine, "--stats", *extra]


def qemu_command(kernel, initrd, processors, extra):
    return ["qemu-system-x86_64", "-accel", "tcg", "-kernel", kernel, "-initrd", initrd, "-append", APPEND, "-m", MEMORY, "-smp", processors,
            "-display", "none", "-serial", "stdio", "-monitor", "none", "-no-reboot", "-nic", "none", *extra]


def parse_stats(text):
    """Counters of doppel's --stats by name: lines that begin with a word and a whole number."""
    return {match[1]: int(match[2]) for match in re.finditer(r"^([A-Za-z_][\w.+-]*)[:=]?\s+(\d+)\b", text, re.M)}
