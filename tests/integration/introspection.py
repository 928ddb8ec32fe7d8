#!/usr/bin/env python3
"""What the translator tells about itself: --stats and SIGUSR1 while the guest runs, --perf-map, --dump-code; from the command line and from a file. And --trace into a file.

usage: introspection.py DOPPEL
"""
import contextlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time

import small_guests

SKIPPED = 77
STOPPED, USAGE = 5, 2  # exit statuses of doppel
ENTRY = 0x1000000
CALLED = ENTRY + 0xf
CODE = (b"\xbc\x00\x00\x00\x02"  # mov esp, 0x2000000
        b"\x0f\x31"              # loop: rdtsc
        b"\x0f\xa2"              # cpuid: surely interpreted
        b"\xe8\x01\x00\x00\x00"  # call CALLED
        b"\x90"
        b"\x83\xc1\x05"          # CALLED: add ecx, 5
        b"\x48\x83\xc4\x08"      # add rsp, 8
        b"\xeb\xed")             # jmp loop


def kernel():
    """An ELF file without a PVH note: started like Linux, in 64-bit mode."""
    start = 64 + 56
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, ENTRY, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return header + struct.pack("<IIQQQQQQ", 1, 5, start, ENTRY, ENTRY, len(CODE), len(CODE), 1) + CODE


def wait_for(process, what, condition):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if condition():
            return
        if process.poll() is not None:
            raise AssertionError(f"ended with {process.returncode} before {what}")
        time.sleep(0.05)
    raise AssertionError(f"no {what}")


def read(path):
    try:
        with open(path) as file:
            return file.read()
    except FileNotFoundError:
        return ""


def check_report(text, moment):
    """The cache's sizes, what was interpreted, and the code of the called function, each once."""
    for pattern in (r"^cache: \d+ \+ \d+ KiB of \d+ KiB code, [1-9]\d* blocks", r"^translated: [1-9]\d* blocks, [1-9]\d* instructions, \d+ ns each",
                    r"^tables: cpu 0 [1-9]\d* KiB$", r"^interpreted \(interp\) \d+:.* cpuid \d+",
                    rf"^code at {CALLED:016x} \(phys:{CALLED:x}\), kernel, 64-bit, valid: 9 bytes, 3 instructions -> \d+ bytes",
                    rf"^  {CALLED:016x}  add ecx, 0x05$", rf"^    site \d+: {CALLED + 7:x} jmp .*; in memory r10 r11",
                    r"^    chain entry:$", r"^      [0-9a-f]{8}  add ecx, 0x05$", r"  ; page_va$"):
        found = len(re.findall(pattern, text, re.MULTILINE))
        assert found == 1 or (found and ("site" in pattern or "page_va" in pattern)), f"{moment}: {found} lines are {pattern}:\n{text}"


def ask(process, errors):
    """The report that SIGUSR1 prints, when nothing more comes."""
    before = text = read(errors)
    process.send_signal(signal.SIGUSR1)
    wait_for(process, "answer to SIGUSR1", lambda: read(errors) != before)
    while text != read(errors):
        text = read(errors)
        time.sleep(0.2)
    return text[len(before):]


def run(doppel, options, perf_map):
    """Runs the guest with options, asks it once while it runs, and ends it."""
    with tempfile.TemporaryDirectory() as work, tempfile.NamedTemporaryFile() as errors:
        running = os.path.join(work, "pid")
        process = subprocess.Popen([doppel, "run", "--engine", "bt", "--pid-file", running, *options], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors)
        names = f"/tmp/perf-{process.pid}.map"
        try:
            wait_for(process, "start", lambda: read(running) == f"{process.pid}\n")
            if perf_map:
                wait_for(process, "name of the called function", lambda: f" guest_k:{CALLED:x}\n" in read(names))
                assert os.stat(names).st_mode & 0o777 == 0o600
                lines = read(names).splitlines()
                assert all(re.fullmatch(r"[0-9a-f]+ [0-9a-f]+ (guest_k:[0-9a-f]+|bt_[a-z_]+)", line) for line in lines), lines
                assert any(line.endswith(" bt_enter") for line in lines), lines
            wait_for(process, "interpreted instruction", lambda: " cpuid " in ask(process, errors.name))
            first = ask(process, errors.name)
            process.send_signal(signal.SIGHUP)
            assert process.wait(30) == STOPPED, process.returncode
        finally:
            process.kill()
            process.wait()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(names)
        return first, read(errors.name)


def check_trace(doppel, work):
    """In the sandbox, where vCPU threads write and look at nothing."""
    path = os.path.join(work, "trace")
    subprocess.run([doppel, "run", "--kernel", small_guests.write(os.path.join(work, "off"), small_guests.say("x" * 2000) + small_guests.POWER_OFF), "--memory", "8M", "--net", "none",
                    "--console", "none", "--trace", path], stdin=subprocess.DEVNULL, timeout=60, check=True)
    lines = read(path).splitlines()
    assert sum(line.startswith("out 0x3f8 ") for line in lines) == 2000 and lines[-1].startswith("out 0x604 "), lines[-3:]


def main():
    doppel = sys.argv[1]
    with tempfile.TemporaryDirectory() as work:
        path = os.path.join(work, "kernel")
        with open(path, "wb") as file:
            file.write(kernel())
        options = ["--kernel", path, "--memory", "64M", "--net", "none", "--console", "none"]
        tried = subprocess.run([doppel, "run", "--engine", "bt", "--kernel", path, "--disk", "/nonexistent/disk"], stderr=subprocess.PIPE, text=True)
        if 'engine "bt"' in tried.stderr or "translator" in tried.stderr:
            print("skipped:", tried.stderr)
            sys.exit(SKIPPED)
        first, text = run(doppel, [*options, "--perf-map", "--dump-code", f"{CALLED + 1:x}"], True)
        check_report(first, "SIGUSR1")
        check_report(text[text.rindex("bus_unclaimed"):], "at the end")
        configuration = os.path.join(work, "guest.json")
        with open(configuration, "w") as file:
            json.dump({"kernel": path, "memory": "64M", "net": "none", "console": "none", "perf-map": True, "dump-code": [f"phys:{CALLED:x}", "0"]}, file)
        first, text = run(doppel, ["--config", configuration], True)
        check_report(first, "SIGUSR1, from a file")
        first, text = run(doppel, options, False)
        assert "code dumps" not in first and "code dumps" not in text
        check_trace(doppel, work)


main()
