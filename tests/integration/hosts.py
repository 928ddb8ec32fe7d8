#!/usr/bin/env python3
"""Hosts that lack something: processors without what the translator needs, limits of memory and of address space. Engine bt says so in one line, and auto goes on to an engine that works.

usage: hosts.py DOPPEL PROGRAM HIDE-CPU-LIBRARY   (PROGRAM: a conformance program)
"""
import os
import resource
import subprocess
import sys
import tempfile

SKIPPED, USAGE = 77, 2
MIB, GIB = 1 << 20, 1 << 30
NO_MEMORY = "Cannot allocate memory", "Resource temporarily unavailable", "too little memory", "no memory", "out of memory"
failures = []


def run(doppel, program, engine, memory="128M", limit=None, environment=None):
    """Exit status, lines on stderr, and whether the guest got to the end of its program."""
    def limit_set():
        if limit:
            resource.setrlimit(limit[0], (limit[1], limit[1]))
    with tempfile.TemporaryDirectory() as folder:
        console = os.path.join(folder, "console")
        line = [doppel, "run", "--kernel", program, "--memory", memory, "--engine", engine, "--console", "file:" + console, "--on-reset", "exit"]
        done = subprocess.run(line, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=120, preexec_fn=limit_set, env=dict(os.environ, **(environment or {})),
                              check=False)
        try:
            with open(console, encoding="utf-8") as file:
                finished = "DONE 0 failures" in file.read()
        except FileNotFoundError:
            finished = False
        return done.returncode, done.stderr.splitlines(), finished


def check(condition, what, result):
    if not condition:
        failures.append(what)
        print(f"not ok {what}: status {result[0]}, {'finished' if result[2] else 'not finished'}")
        print("".join("    " + line + "\n" for line in result[1]), end="")


def hidden_features(doppel, program, library):
    """What bt's one line mentions, by what is hidden; None: bt works all the same."""
    for hidden, mention in (("bmi2", "BMI2"), ("fsgsbase", "FSGSBASE"), ("bmi2 fsgsbase", "BMI2"), ("invariant-tsc", None), ("xsave", None)):
        environment = {"LD_PRELOAD": library, "HIDE_CPU": hidden}
        result = run(doppel, program, "bt", environment=environment)
        if result[0] == SKIPPED:
            print("hidden features: CPUID does not trap on this host")
            return
        if mention:
            check(result[0] == USAGE and len(result[1]) == 1 and mention in result[1][0], f"bt without {hidden}", result)
        else:
            check(result[0] == 0 and result[2], f"bt without {hidden}", result)
        result = run(doppel, program, "auto", environment=environment)
        engine = "interp" if mention else "bt"
        check(result[0] == 0 and result[2] and len(result[1]) == 1 and f"engine {engine} (auto)" in result[1][0] and (mention or "") in result[1][0],
              f"auto without {hidden}", result)


def address_space(doppel, program):
    """Too little for the guest; for the translator; for its tables; enough."""
    seen = set()
    for gibibytes in (1, 100, 330, 360, 400, 440, 480, 520, 560):
        limit = (resource.RLIMIT_AS, gibibytes * GIB)
        result = run(doppel, program, "bt", limit=limit)
        check((result[0] == 0 and result[2]) or (result[0] == USAGE and len(result[1]) == 1 and "ulimit -v" in result[1][0] and "engine interp" in result[1][0]),
              f"bt in {gibibytes} GiB of address space", result)
        seen.add("bt works" if result[0] == 0 else result[1][0].split()[1])
        result = run(doppel, program, "auto", limit=limit)
        check(result[0] == 0 and result[2] and len(result[1]) == 1, f"auto in {gibibytes} GiB of address space", result)
    check(len(seen) == 3, f"limits between what is too little, too little for tables, and enough ({seen})", (0, [], True))
    result = run(doppel, program, "auto", limit=(resource.RLIMIT_AS, 100 * MIB))
    check(result[0] == USAGE and len(result[1]) == 1, "auto in 100 MiB of address space", result)


def private_memory(doppel, program):
    """Writable private memory, which RLIMIT_DATA counts like strict overcommit does: reserving it may fail at once, or any time later. Whatever cannot be had then (a thread, a
    stack, the file of its state) says so in a line, and that it is memory; that they end at the same moment is up to the threads."""
    for mebibytes in (20, 100, 200, 250, 300, 315, 330, 345, 360, 400, 500):
        limit = (resource.RLIMIT_DATA, mebibytes * MIB)
        for engine in "bt", "auto":
            result = run(doppel, program, engine, limit=limit)
            refused = result[0] in (1, USAGE) and 1 <= len(result[1]) <= 3 and not (engine == "auto" and mebibytes >= 100)
            refused = refused and all(any(reason in line for reason in NO_MEMORY) for line in result[1])
            check((result[0] == 0 and result[2]) or refused, f"{engine} with {mebibytes} MiB of private memory", result)
    result = run(doppel, program, "auto", limit=(resource.RLIMIT_DATA, 200 * MIB))
    check(result[0] == 0 and result[2], "auto where the translator's memory is not granted", result)


def large_guests(doppel, program):
    """More memory than bt's windows can show."""
    result = run(doppel, program, "bt", memory="150G")
    if "than this host has" in "".join(result[1]):
        print("large guests: not on this host")
        return
    check(result[0] == USAGE and len(result[1]) == 1 and "128 GiB" in result[1][0], "bt with 150 GiB", result)
    result = run(doppel, program, "auto", memory="150G")
    check(result[0] == 0 and result[2] and "engine interp (auto)" in result[1][0], "auto with 150 GiB", result)


def main():
    doppel, program, library = (os.path.abspath(path) for path in sys.argv[1:])
    if run(doppel, program, "bt")[0]:
        return SKIPPED
    hidden_features(doppel, program, library)
    address_space(doppel, program)
    private_memory(doppel, program)
    large_guests(doppel, program)
    print("all said clearly" if not failures else f"{len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
