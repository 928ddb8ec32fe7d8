#!/usr/bin/env python3
"""Each rule of the sandbox is needed: without it a test fails that passes with it, and the program says which call it lacks. `sandbox_rules.py DOPPEL FILTERED-DIRECTORY`.

sandbox_rules.txt names for each rule (`doppel run --sandbox omit=list`) the test that needs it: `libc SCENARIO`, `libc_files SCENARIO` or `pages touched` (tests/unit/filtered/libc.c and pages.c), `unit NAME` (a unit test under filters,
tests/unit/filtered) or `machine NAME` (sandbox_machines.py), all of them also ` on HOST` (HOSTS below); or `none` and why no test shows that it is needed. A rule without a line fails, and a line without a rule. Then a few rules are tried, others each day (--seed N; --seconds N), or
--all of them; --rule NAME tries one. --learn looks for tests of rules that have none, and says them."""
import argparse
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

import sandbox_hosts

here = pathlib.Path(__file__).parent
options = argparse.ArgumentParser(description=__doc__)
options.add_argument("doppel")
options.add_argument("filtered")
for flag in "all", "learn":
    options.add_argument(f"--{flag}", action="store_true")
options.add_argument("--rule", action="append")
options.add_argument("--test", action="append")
options.add_argument("--seed", type=int, default=int(os.environ.get("SEED", time.time() // 86400)))
options.add_argument("--seconds", type=float, default=12)
options = options.parse_args()
doppel = os.path.abspath(options.doppel)
options.filtered = os.path.abspath(options.filtered)
NEEDS = {"user": 1, "vsock": 2, "direct": 4, "kvm": 8}
STOPPED = "tried system call"
# What the program cannot do to say so; or does while a thread is made, with all signals blocked, or a process, which stops then.
SILENT = {"write", "exit_group", "exit", "clone", "rseq", "set_robust_list", "execveat"}
ABSENT = "not on this host"
UNTESTED = "none "  # and why
FACCESSAT2 = 439
# Hosts that are played: system calls that they do not have yet, or what is in the environment.
HOSTS = {"an older kernel": lambda environment: [FACCESSAT2],
         "another C library": lambda environment: environment.update(FILTER_PRELOAD=f"{options.filtered}/other_host.so"),
         "network storage": lambda environment: environment.update(FILTER_PRELOAD=f"{options.filtered}/other_host.so", FILTER_REMOTE="1")}
LIMIT = 60
# `doppel` with a rule left out in each machine that it starts.
WRAPPER = """#!/bin/sh
case $1 in run|serve) LD_PRELOAD=$FILTER_PRELOAD exec "$REAL_DOPPEL" "$@" --sandbox "omit=$FILTER_OMIT";; esac
exec "$REAL_DOPPEL" "$@"
"""


def table():
    entries = {}
    for line in (here / "sandbox_rules.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            rule, test = line.split(maxsplit=1)
            assert rule not in entries, f"{rule} has two lines"
            entries[rule] = test
    return entries


def all_rules():
    said = subprocess.run([doppel, "run", "--kernel", "/", "--sandbox", "omit=list"], capture_output=True, text=True, check=True).stdout.split()
    return sorted(set(said))


def parts(rule):
    """Kind of thread, call, condition, what the configuration must have."""
    kind, call, condition, needs = re.fullmatch(r"(\w+):(\w+)(\([^)]*\))?((?:\[\w+\])*)", rule).groups()
    return kind, call, condition or "", frozenset(re.findall(r"\w+", needs))


def superfluous(rules):
    """Rules that allow nothing which another does not."""
    for rule in rules:
        kind, call, condition, needs = parts(rule)
        for other in rules:
            other_kind, other_call, other_condition, other_needs = parts(other)
            if other != rule and (kind, call) == (other_kind, other_call) and other_condition in ("", condition) and other_needs <= needs:
                yield f"{rule}: {other} allows it"


def run_test(test, rule, omit):
    """Whether it passed (or ABSENT), and what it said."""
    test, _, host = test.partition(" on ")
    family, name = test.split(maxsplit=1)
    kind, _, _, needs = parts(rule)
    needs |= {name} if test in ("unit user", "unit vsock") else set()
    environment = {**os.environ, "FILTER_OMIT": rule if omit else "none", "FILTER_NEEDS": str(sum(NEEDS[need] for need in needs)), "REAL_DOPPEL": doppel}
    missing = HOSTS[host](environment) if host else None
    alone = [f"{options.filtered}/filtered_{family}", kind, name]
    command = {"libc": alone, "libc_files": alone, "pages": alone, "unit": [f"{options.filtered}/filtered_{name}"],
               "machine": [sys.executable, str(here / "sandbox_machines.py"), wrapper, name]}[family]
    if family != "machine" and "FILTER_PRELOAD" in environment:
        environment["LD_PRELOAD"] = environment["FILTER_PRELOAD"]
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(command, env=environment, preexec_fn=missing and (lambda: sandbox_hosts.refuse(sandbox_hosts.ENOSYS, *missing)), stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
        try:
            status = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = "too late"
        output.seek(0)
        return ABSENT if status == 77 else status == 0, output.read()


def evidence(rule, said):
    kind, call, _, needs = parts(rule)
    if "direct" in needs and "user code is translated" in said:
        return True  # the process of user code failed, and not the program
    if kind == "api":
        kind = "(?:api|worker)"  # one that such a thread has made is under both filters
    return call in SILENT or re.search(rf"a thread \({kind}\) {STOPPED} \d+ \({call}\)", said) is not None


passed_with = {}


def check(rule, test):
    """None, what is wrong, or ABSENT."""
    kind, _, _, needs = parts(rule)
    key = (test, kind if test.startswith(("libc", "pages")) else "", needs)
    if key not in passed_with:
        passed, said = run_test(test, rule, False)
        passed_with[key] = passed if passed == ABSENT else passed and (STOPPED not in said or test == "libc does what is forbidden")
        if not passed_with[key]:
            return f"{rule}: {test} fails with all rules:\n{said[-3000:]}"
    elif not passed_with[key]:
        return f"{rule}: {test} fails with all rules"
    if passed_with[key] == ABSENT:
        return ABSENT
    passed, said = run_test(test, rule, True)
    if passed:
        return f"{rule}: {test} passes without it"
    return None if evidence(rule, said) else f"{rule}: {test} fails without it, but nothing says why:\n{said[-3000:]}"


def candidates(rule):
    kind = parts(rule)[0]
    libc = ["waits", "allocates", "allocates from one arena", "allocates first", "logs", "fails", "does what is forbidden", "asks for the time", "is stopped in poll", "ends"]
    units = {"share": ["share"], "loop": ["user", "vsock", "block", "balloon", "mem"], "worker": ["block"]}
    return [f"libc {name}" for name in libc] + [f"unit {name}" for name in units.get(kind, [])]


def learn(rules, entries):
    for rule in rules:
        for test in options.test or candidates(rule):
            if entries.get(rule, UNTESTED).startswith(UNTESTED) and check(rule, test) is None:
                entries[rule] = test
                print(f"{rule} {test}", flush=True)


def main():
    entries, rules = table(), all_rules()
    wrong = [f"{rule}: no test is named (sandbox_rules.txt)" for rule in rules if rule not in entries and not options.learn]
    wrong += [f"{rule}: there is no such rule" for rule in entries if rule not in rules] + list(superfluous(rules))
    if options.learn:
        learn(rules, entries)
    untested = sum(test.startswith(UNTESTED) for test in entries.values())
    skipped = {rule for rule in rules if "kvm" in parts(rule)[3] and not os.access("/dev/kvm", os.R_OK | os.W_OK)}
    order = [rule for rule in entries if rule in rules and rule not in skipped and not entries[rule].startswith(UNTESTED) and (not options.rule or rule in options.rule) and (not options.test or entries[rule] in options.test)]
    if not (options.all or options.rule or options.test or options.learn):
        print(f"seed {options.seed}")
        random.Random(options.seed).shuffle(order)
    began, tried = time.monotonic(), 0
    for rule in order if not options.learn else []:
        if not (options.all or options.rule or options.test) and time.monotonic() - began > options.seconds:
            break
        found = check(rule, entries[rule])
        tried += 1
        if found and found != ABSENT:
            wrong.append(found)
        print(f"{rule}: {entries[rule]}: {ABSENT if found == ABSENT else 'WRONG' if found else 'needs it'}", flush=True)
    print(*wrong, sep="\n")
    print(f"{len(rules)} rules, {untested} of them without a test, {tried} tried, {len(wrong)} wrong")
    return 1 if wrong else 0


with tempfile.TemporaryDirectory() as folder:
    wrapper = f"{folder}/doppel"
    pathlib.Path(wrapper).write_text(WRAPPER)
    os.chmod(wrapper, 0o755)
    sys.exit(main())
