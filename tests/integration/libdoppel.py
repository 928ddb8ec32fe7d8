#!/usr/bin/env python3
"""libdoppel as another program meets it: installed into a scratch directory, found by pkg-config alone, linked shared and static; what it exports is what doppel.h declares
and explains. The example is built and boots a small guest.

    libdoppel.py BUILD-DIRECTORY SOURCE-DIRECTORY
"""
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import small_guests

build, source = (pathlib.Path(path).resolve() for path in sys.argv[1:3])
# A line of the guest's input ends it: the example's.
UNTIL_LINE = b"\xba\xfd\x03\x00\x00\xec\xa8\x01\x74\xfb\xba\xf8\x03\x00\x00\xec\xee\x3c\x0a\x75\xeb"


def run(*command, **more):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120, **more)
    assert done.returncode == 0, f"{' '.join(map(str, command))}: status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def exported(*command):
    return {line.split()[-1].split("@")[0] for line in run("nm", *command).splitlines() if line.strip() and not re.search(r" A DOPPEL_", line) and not line.endswith(":")}


def comments_and_names(header):
    """Each function that the header declares, and whether a comment stands with it: behind it, or above the block of declarations that it is in."""
    names, undocumented = set(), set()
    explained = False
    for line in header.splitlines():
        if not line.strip():
            explained = False
        found = re.search(r"\b(doppel_\w+)\(", re.sub(r"/\*.*?\*/", "", line)) if not line.startswith((" *", "/*")) else None
        if found:
            names.add(found[1])
            if not explained and "/*" not in line:
                undocumented.add(found[1])
        elif "*/" in line:
            explained = True
    return names, undocumented


with tempfile.TemporaryDirectory(prefix="doppel-lib-") as folder:
    root = pathlib.Path(folder)
    run("meson", "install", "-C", build, "--no-rebuild", "--destdir", root)
    pc = next(root.rglob("doppel.pc"))
    prefix = re.search(r"^prefix=(.*)$", pc.read_text(), re.M)[1]
    environment = {**os.environ, "PKG_CONFIG_PATH": str(pc.parent), "PKG_CONFIG_SYSROOT_DIR": str(root)}
    libraries = pc.parent.parent
    header = (root / prefix.lstrip("/") / "include/doppel/doppel.h").read_text()

    declared, undocumented = comments_and_names(header)
    assert len(declared) >= 20, declared
    assert not undocumented, f"doppel.h does not explain {undocumented}"
    assert exported("-D", "--defined-only", libraries / "libdoppel.so") == declared
    assert exported("-g", "--defined-only", libraries / "libdoppel.a") == declared
    assert "DOPPEL_0.1" in run("readelf", "--wide", "-V", libraries / "libdoppel.so")

    flags = run("pkg-config", "--cflags", "--libs", "doppel", env=environment).split()
    example = source / "examples/run_guest.c"
    assert len([line for line in example.read_text().split("int main")[1].splitlines() if line.strip()]) <= 30
    run("cc", "-Wall", "-Werror", example, *flags, "-o", root / "shared", env=environment)
    static = run("pkg-config", "--static", "--cflags", "--libs", "doppel", env=environment).split()
    run("cc", example, *(f"-l:libdoppel.a" if word == "-ldoppel" else word for word in static), "-o", root / "static", env=environment)
    for compiler in ("c++", "clang++"):
        if shutil.which(compiler):
            (root / "header.cc").write_text("#include <doppel/doppel.h>\nint main() { return doppel_version() ? 0 : 1; }\n")
            run(compiler, "-Wall", "-Wextra", "-pedantic", "-Werror", root / "header.cc", *flags, "-o", root / "cxx", env=environment)
            run(root / "cxx", env={**os.environ, "LD_LIBRARY_PATH": str(libraries)})
            break

    kernel = small_guests.write(root / "kernel", small_guests.say("booted\n~ # ") + UNTIL_LINE + small_guests.say("Power down\n") + small_guests.POWER_OFF)
    (root / "initrd").write_bytes(b"nothing")
    for program in ("shared", "static"):
        said = run(root / program, kernel, root / "initrd", env={**os.environ, "LD_LIBRARY_PATH": str(libraries)})
        assert said == "booted\n~ # echo 6 times 7 is $((6 * 7)); poweroff\nPower down", said
    assert "libdoppel.so.0" in run("ldd", root / "shared") and "libdoppel" not in run("ldd", root / "static")
    done = subprocess.run([root / "shared", root / "no-kernel", root / "initrd"], capture_output=True, text=True, env={**os.environ, "LD_LIBRARY_PATH": str(libraries)})
    assert done.returncode == 1 and "no-kernel" in done.stderr, done
print(f"{len(declared)} functions")
