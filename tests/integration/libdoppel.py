#!/usr/bin/env python3
"""libdoppel as another program meets it: installed into a scratch directory, found by pkg-config alone, linked shared and static; what it exports is what doppel.h declares
and explains. The example is built and boots a small guest, or with "guest" Debian's kernel. What is installed beside it, the manual page and the completions, tells of all that the program
knows.

    libdoppel.py BUILD-DIRECTORY SOURCE-DIRECTORY [guest]
"""
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import small_guests

SKIPPED = 77
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


def check_header(root, flags, libraries):
    """By itself, in C and in C++, whatever else is included."""
    (root / "header.c").write_text("#include <doppel/doppel.h>\n")
    for standard in ("c11", "gnu17"):
        run("cc", f"-std={standard}", "-Wall", "-Wextra", "-pedantic", "-Werror", "-fsyntax-only", root / "header.c", *flags)
    (root / "header.cc").write_text("#include <doppel/doppel.h>\nint main() { return doppel_version() ? 0 : 1; }\n")
    for compiler in filter(shutil.which, ("c++", "clang++")):
        run(compiler, "-Wall", "-Wextra", "-pedantic", "-Werror", root / "header.cc", *flags, "-o", root / "cxx")
        run(root / "cxx", env={**os.environ, "LD_LIBRARY_PATH": str(libraries)})


def offered(script, *words):
    """What bash offers in place of the last of the words."""
    line = " ".join(f"'{word}'" for word in words)
    return set(run("bash", "-c", f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _doppel; printf '%s\\n' \"${{COMPREPLY[@]}}\"").split())


def check_texts(prefix):
    """The manual page and the completions that were installed are complete, and their readers find nothing wrong with them."""
    commands = json.loads(run(prefix / "bin/doppel", "help", "--json"))
    page, script = prefix / "share/man/man1/doppel.1", prefix / "share/bash-completion/completions/doppel.bash"
    done = subprocess.run(["man", "--warnings=w", "--encoding=ascii", "-l", page], env={**os.environ, "MANWIDTH": "1000", "LC_ALL": "C"}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    sections = re.split(r"^       doppel ([a-z-]+)", re.search(r"^COMMANDS\n(.*)^OPTIONS OF RUN\n", done.stdout, re.M | re.S)[1], flags=re.M)
    told = dict(zip(sections[1::2], sections[2::2]))
    assert set(told) == {command["name"] for command in commands} == offered(script, "doppel", ""), set(told)
    for command in commands:
        names = {"--" + option["name"] for option in command["options"]}
        said = run(prefix / "bin/doppel", command["name"], "--help")
        assert names | {"--help"} == set(re.findall(r"^ +(?:-., )?(--[a-z0-9-]+)(?: |$)", said, re.M)) | {"--help"}, (command["name"], said)
        where = done.stdout if command["name"] == "run" else told[command["name"]]
        assert names <= set(re.findall(r"--[a-z0-9-]+", where)), (command["name"], names - set(re.findall(r"--[a-z0-9-]+", where)))
        assert offered(script, "doppel", command["name"], "--") == names | {"--help"}, (command["name"], names)
    assert {"create", "import"} <= offered(script, "doppel", "snapshot", "") and "zsh" in offered(script, "doppel", "completion", "") and "stop" in offered(script, "doppel", "help", "s")
    assert offered(script, "doppel", "run", "--engine", "") == {"auto", "bt", "kvm", "interp"}
    for shell, path in (("zsh", "zsh/site-functions/_doppel"), ("fish", "fish/vendor_completions.d/doppel.fish")):
        text = (prefix / "share" / path).read_text()
        for command in commands:
            for option in command["options"]:
                assert re.search(rf"(--|-l ){option['name']}\b", text), (shell, command["name"], option["name"])
        if shutil.which(shell):
            run(shell, "-n", prefix / "share" / path)
    if shutil.which("fish"):
        got = run("fish", "--no-config", "-c", f"source {prefix}/share/fish/vendor_completions.d/doppel.fish; complete -C 'doppel stop --'")
        assert {line.split("\t")[0] for line in got.splitlines()} == {"--timeout", "--json"}, got


def check_guest(root, libraries):
    kernel, initrd = os.environ.get("DOPPEL_KERNEL"), os.path.join(os.environ.get("DOPPEL_CACHE", ""), "demo-initrd.gz")
    if not kernel or not os.path.exists(kernel) or not os.path.exists(initrd):
        print("skipped: DOPPEL_KERNEL or DOPPEL_CACHE is missing; run ./check guest")
        sys.exit(SKIPPED)
    for program in ("shared", "static"):
        said = run(root / program, kernel, initrd, env={**os.environ, "LD_LIBRARY_PATH": str(libraries)})
        assert "6 times 7 is 42" in said and said.endswith("Power down"), said[-1000:]


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
    for line in run("nm", "-D", "--defined-only", libraries / "libdoppel.so").splitlines():
        assert re.search(r"@@DOPPEL_0\.\d+$| A DOPPEL_0\.\d+$", line), f"a symbol without a version: {line}"

    flags = run("pkg-config", "--cflags", "--libs", "doppel", env=environment).split()
    example = source / "examples/run_guest.c"
    assert len([line for line in example.read_text().split("int main")[1].splitlines() if line.strip()]) <= 30
    run("cc", "-Wall", "-Werror", example, *flags, "-o", root / "shared", env=environment)
    static = run("pkg-config", "--static", "--cflags", "--libs", "doppel", env=environment).split()
    run("cc", example, *(f"-l:libdoppel.a" if word == "-ldoppel" else word for word in static), "-o", root / "static", env=environment)
    if "guest" in sys.argv:
        check_guest(root, libraries)
        sys.exit()
    check_header(root, flags, libraries)
    check_texts(root / prefix.lstrip("/"))

    kernel = small_guests.write(root / "kernel", small_guests.say("booted\n~ # ") + UNTIL_LINE + small_guests.say("Power down\n") + small_guests.POWER_OFF)
    (root / "initrd").write_bytes(b"nothing")
    for program in ("shared", "static"):
        said = run(root / program, kernel, root / "initrd", env={**os.environ, "LD_LIBRARY_PATH": str(libraries)})
        assert said == "booted\n~ # echo 6 times 7 is $((6 * 7)); poweroff\nPower down", said
    assert "libdoppel.so.0" in run("ldd", root / "shared") and "libdoppel" not in run("ldd", root / "static")
    done = subprocess.run([root / "shared", root / "no-kernel", root / "initrd"], capture_output=True, text=True, env={**os.environ, "LD_LIBRARY_PATH": str(libraries)})
    assert done.returncode == 1 and "no-kernel" in done.stderr, done
print(f"{len(declared)} functions")
