#!/usr/bin/env python3
"""The sandbox on hosts that offer less: what is missing is said in one line, and the machine runs, takes a disk and ends all the same. `sandbox_hosts.py DOPPEL`."""
import ctypes
import os
import shutil
import struct
import subprocess
import sys
import tempfile

import small_guests

ENOSYS, EPERM = 38, 1
LANDLOCK, NAMESPACES, FILTERS = (444, 445, 446), (272, 308), (317,)  # landlock_*; unshare, setns; seccomp
NOBODY = 65534
libc = ctypes.CDLL(None, use_errno=True)
doppel = os.path.abspath(sys.argv[1])


def refuse(code, *calls):
    """A filter under which these system calls fail, as on a kernel or in a container without them."""
    program = [struct.pack("HBBI", 0x20, 0, 0, 0)]  # the call's number
    for number in calls:
        program += [struct.pack("HBBI", 0x15, 0, 1, number), struct.pack("HBBI", 0x06, 0, 0, 0x00050000 | code)]
    code = ctypes.create_string_buffer(b"".join(program + [struct.pack("HBBI", 0x06, 0, 0, 0x7fff0000)]))
    program = struct.pack("HxxxxxxQ", len(program) + 1, ctypes.addressof(code))
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0, os.strerror(ctypes.get_errno())


def become_nobody():
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


# Name: what happens to the process before; what it then says is missing (None: that depends on this host).
hosts = {
    "as it is": (lambda: None, None),
    "no new privileges": (lambda: libc.prctl(38, 1, 0, 0, 0), None),
    "an old kernel": (lambda: refuse(ENOSYS, *LANDLOCK), "Landlock"),
    "a container": (lambda: refuse(EPERM, *NAMESPACES), None),
    "no filters": (lambda: refuse(EPERM, *FILTERS), "filters of system calls"),
}
if os.geteuid() == 0:
    hosts["an ordinary user"] = (become_nobody, None)
    hosts["an ordinary user, and an old kernel"] = (lambda: (become_nobody(), refuse(ENOSYS, *LANDLOCK)), "Landlock")


def try_host(name, before, missing):
    folder = tempfile.mkdtemp(dir="/tmp")
    os.chmod(folder, 0o777)
    if "user" in name:
        os.chown(folder, NOBODY, NOBODY)
    small_guests.write(f"{folder}/kernel", small_guests.say("here") + small_guests.HALT)
    with open(f"{folder}/image", "wb") as image:
        image.truncate(1 << 20)
    for file in "kernel", "image":
        os.chmod(f"{folder}/{file}", 0o666)

    def run(*arguments):
        done = subprocess.run([doppel, *arguments], cwd=folder, env={**os.environ, "XDG_RUNTIME_DIR": folder}, preexec_fn=before, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{name}: doppel {' '.join(arguments)}: {done.returncode} {done.stdout}{done.stderr}"
        return done.stderr
    try:
        said = run("run", "-d", "--name", "vm", "--kernel", "kernel", "--memory", "16M", "--net", "none", "--engine", "interp")
        lines = [line for line in said.splitlines() if "sandbox" in line]
        assert len(lines) <= 1 and (not missing or (lines and missing in lines[0])), f"{name}: {said}"
        run("plug", "--disk", "image,id=more", "vm")
        run("pause", "vm")
        run("kill", "vm")
        run("rm", "vm")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    for name, (before, missing) in hosts.items():
        try_host(name, before, missing)
        print(f"{name}: passed", flush=True)
