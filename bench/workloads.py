"""The lists: what runs, and which number it should reach. A workload is a command line of the agent (guest/agent.c): a program of the guest's root or
"./x" of its /bench. In it a whole number is a count, which --quick divides by 10; (WORD, n) is the word n times, again fewer in quick runs; "%x" is the file x, or
small.x in quick runs.

Each should run 0.1 to 0.4 s natively, with at most 100 MiB in use.
"""

QUICK = 10

# name: command line
PROGRAMS = {
    "gzip": ["usr/bin/gzip", "-6", "-c", "%data"],
    "bzip2": ["usr/bin/bzip2", "-c", "%data"],
    "md5sum": ["usr/bin/md5sum", ("data", 30)],
    "sha256sum": ["usr/bin/sha256sum", ("data", 12)],
    "awk": ["usr/bin/mawk", "-f", "work.awk", "%text"],
    "sort": ["usr/bin/sort", "--parallel=1", "-S", "64M", "-k2n", "-k1", ("%text", 3)],
    "grep": ["usr/bin/grep", "-E", "-c", "(qu[a-z]*k|cl.ck).*[0-9]5 .*(y|q[^ ]*) ", ("%text", 20)],
    "shell": ["usr/bin/dash", "work.sh", 50000],
    "python3": ["usr/bin/python3.11", "-S", "-s", "work.py", 200000],
    "perl": ["usr/bin/perl", "work.pl", 300000],
    "lua": ["usr/bin/lua5.4", "work.lua", 1500000],
    "luajit": ["usr/bin/luajit", "work.lua", 8000000],
    "sqlite-memory": ["usr/bin/sqlite3", "-batch", ":memory:", ".read %work.sql"],
    "sqlite-file": ["usr/bin/sqlite3", "-batch", "scratch.db", ".read %work.sql"],
    "gcc-O2": ["usr/lib/gcc/x86_64-linux-gnu/12/cc1", "-quiet", "-fpreprocessed", "-O2", "%compile_me.i", "-o", "-"],
}

KERNELS = {name: ["./kernels", name, count] for name, count in {
    "list": 3000, "matrix": 4000, "state": 20000, "crc": 10000, "matmul": 40, "hash": 6000000, "chase": 4000000, "qsort": 20, "sum": 3000}.items()}

MICRO = {name: ["./micro", service, count] for name, service, count in (
    ("fork+exec+exit", "forkexec", 300), ("fork+exit", "fork", 1500), ("pipe-ping-pong", "pipe", 8000), ("context-switch", "switch", 8000),
    ("1-byte-io", "io", 100000), ("page-fault", "fault", 60000), ("mmap+munmap", "mmap", 10000), ("getppid", "getppid", 500000),
    ("signal", "signal", 100000))}

# On two processors: one copy, then two at once; each long enough that starting is little of it, as the host's processors come and go by the tenth of a second.
TWO = {
    "2x-state": ["./kernels", "state", 100000],
    "2x-gzip": ["usr/bin/gzip", "-6", "-c", ("%data", 5)],
    "2x-python3": ["usr/bin/python3.11", "-S", "-s", "work.py", 1000000],
    "2x-fork+exec": MICRO["fork+exec+exit"],
}

GROUPS = {"programs": PROGRAMS, "kernels": KERNELS, "micro": MICRO}

# Goals. "native" and "qemu" bound the time over that machine's from above, "speedup" the throughput of two copies over one from below,
# "value" a counter from above. A name's goal goes before its group's.
GOALS = {
    "programs": ("native", 4.0),
    "kernels": ("native", 4.0),
    "micro": ("qemu", 1.0),
    "boot": ("qemu", 1.0),
    "two": ("speedup", 1.9),
    "2x-fork+exec": ("speedup", 1.2),
    "geometric mean, programs and kernels": ("native", 2.0),
    "the same, over QEMU": ("qemu", 0.167),
    "the slowest of them, over QEMU": ("qemu", 1.0),
    "geometric mean, micro": ("native", 6.0),
    "translation, ns per instruction": ("value", 1000),
    "memory beside the guest's own, MiB": ("value", 128),
}


def goal_of(name, group):
    return GOALS.get(name) or GOALS.get(group)


def operations(command, quick):
    """How many times a micro workload does its thing."""
    return max(1, command[2] // (QUICK if quick else 1))


def command_line(command, quick):
    words = []
    for item in command:
        word, times = item if isinstance(item, tuple) else (item, 1)
        if isinstance(word, int):
            word = str(max(1, word // (QUICK if quick else 1)))
        words += [word.replace("%", "small." if quick else "")] * (max(1, times // QUICK) if quick else times)
    return words
