#!/usr/bin/env python3
"""However doppel ends, by request or by a crash, the terminal is as before; a stray SIGUSR2 does not take the other signals away; and who does not read its messages does not stop it.

usage: signals.py DOPPEL
"""
import os
import pty
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time

STOPPED = 5  # exit status


def kernel():
    """An ELF file with the PVH note whose code spins."""
    code, entry, start = b"\xeb\xfe", 0x100000, 64 + 2 * 56
    note = struct.pack("<III4sQ", 4, 8, 18, b"Xen\0", entry)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, entry, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    notes = struct.pack("<IIQQQQQQ", 4, 4, start, 0, 0, len(note), len(note), 4)
    load = struct.pack("<IIQQQQQQ", 1, 5, start + len(note), entry, entry, len(code), len(code), 1)
    return header + load + notes + note + code


def ends_by(doppel, path, number, times, expected):
    keyboard, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    process = subprocess.Popen([doppel, "run", "--kernel", path, "--memory", "16M", "--net", "none"], stdin=terminal, stdout=terminal,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 30
    while termios.tcgetattr(terminal) == before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert termios.tcgetattr(terminal) != before, "the terminal never went raw"
    process.send_signal(signal.SIGUSR2)
    for _ in range(times):
        time.sleep(0.2)
        process.send_signal(number)
    try:
        status = process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert status == expected, f"{number.name}: ended with {status}, not {expected}"
    assert termios.tcgetattr(terminal) == before, f"{number.name}: the terminal stays raw"
    os.close(keyboard)
    os.close(terminal)


def unread(doppel, path):
    """Standard error is a pipe that is full and that nobody reads: the machine runs and ends all the same."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, b"." * 4096)
    except BlockingIOError:
        os.set_blocking(writer, True)
    process = subprocess.Popen([doppel, "run", "--kernel", path, "--memory", "16M", "--net", "none"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=writer)
    try:
        deadline = time.monotonic() + 30
        while not any(open(f"/proc/{process.pid}/task/{task}/comm").read() == "vcpu0\n" for task in os.listdir(f"/proc/{process.pid}/task")):
            assert time.monotonic() < deadline, "it waits for somebody to read its messages"
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == STOPPED
    finally:
        process.kill()
        process.wait()
        os.close(reader)
        os.close(writer)


def main():
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.NamedTemporaryFile() as file:
        file.write(kernel())
        file.flush()
        for number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGQUIT):
            ends_by(sys.argv[1], file.name, number, 1, -number)
        ends_by(sys.argv[1], file.name, signal.SIGHUP, 1, STOPPED)
        unread(sys.argv[1], file.name)
        ends_by(sys.argv[1], file.name, signal.SIGTERM, 2, STOPPED)


main()
