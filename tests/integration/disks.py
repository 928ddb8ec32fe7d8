#!/usr/bin/env python3
"""doppel disk: images made, told about, checked, committed and converted. `disks.py DOPPEL` is the test."""
import json
import os
import subprocess
import sys
import tempfile

doppel = os.path.abspath(sys.argv[1])


def run(*arguments, status=0):
    done = subprocess.run([doppel, "disk", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, f"{arguments}: status {done.returncode}, not {status}: {done.stdout}{done.stderr}"
    run.errors = done.stderr
    return done.stdout


def info(path):
    return json.loads(run("info", "--json", path))[0]


os.chdir(folder := tempfile.mkdtemp(prefix="doppel-disks-"))
os.mkdir("sub")
with open("base.img", "wb") as base:
    base.write(b"base" * 1024)
    base.truncate(10 << 20)
run("create", "new.qcow2", "1G")
assert info("new.qcow2")["size_bytes"] == 1 << 30 and "backing" not in info("new.qcow2")
run("create", "--backing", "../base.img", "sub/one.qcow2")
run("create", "--backing", "one.qcow2", "sub/two.qcow2", "20M")
two = info("sub/two.qcow2")
assert (two["size_bytes"], two["backing"], two["backing_format"]) == (20 << 20, "sub/one.qcow2", "qcow2"), two
assert info("sub/one.qcow2")["backing_format"] == "raw"
run("create", "--backing", "one.qcow2", "--backing-format", "qcow2", "sub/other-name")
assert "format=qcow2" in run.errors
run("check", "sub/two.qcow2")
run("convert", "sub/two.qcow2", "flat.img")
with open("flat.img", "rb") as flat:
    assert flat.read(4096) == b"base" * 1024 and os.stat("flat.img").st_size == 20 << 20
run("convert", "--to", "vmdk", "flat.img", "flat.vmdk")
run("convert", "--from", "vmdk", "flat.vmdk", "again.img")
assert open("again.img", "rb").read() == open("flat.img", "rb").read()
subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 64k", "sub/two.qcow2"], check=True, stdout=subprocess.DEVNULL)
run("commit", "sub/two.qcow2")
run("convert", "sub/one.qcow2", "one.img")
assert open("one.img", "rb").read()[1 << 20:(1 << 20) + 65536] == b"\7" * 65536
with open("raw.qcow2", "wb") as raw:  # a guest may write what it wants into a raw disk
    raw.write(b"QFI\xfb" + bytes(1020))
for wrong in (["create", "new.qcow2", "1G"], ["info", "missing"], ["info", "raw.qcow2"], ["check", "base.img"], ["convert", "base.img", "flat.img"]):
    run(*wrong, status=1)
for wrong in ([], ["make"], ["create"], ["create", "x"], ["create", "x", "0"], ["create", "x", "1000000000T"], ["create", "x", "lots"], ["create", "--backing", "missing", "x"],
              ["create", "--backing", "new.qcow2", "--backing-format", "raw", "x", "12x"], ["create", "--backing-format", "raw", "x", "1M"], ["info"], ["info", "--repair", "new.qcow2"]):
    run(*wrong, status=2)
    assert run.errors.count("\n") == 1, run.errors
assert not os.path.exists("x")
subprocess.run(["rm", "-rf", folder], check=True)
