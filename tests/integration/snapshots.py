#!/usr/bin/env python3
"""doppel snapshot: a guest that keeps what is typed, one page a byte, goes back and forth in a tree of snapshots. `snapshots.py DOPPEL SCENARIO` is one test."""
import json
import os
import pathlib
import random
import resource
import signal
import struct
import subprocess
import sys
import zlib

from vms import KEEPS, doppel, knows, run, runtime, snapshots, start, state, type_in, vms, wait_for


def tree():
    """A chain, a branch, and removals in the middle, each with every snapshot still whole."""
    with runtime() as folder:
        pathlib.Path("key").write_text("a phrase of some length\n")
        start(KEEPS, name="vm")
        type_in("vm", "ab")
        assert knows("vm", "ab")
        assert run("snapshot", "create", "vm", "one", "--description", "the first").strip() == "vm/one"
        type_in("vm", "c")
        assert knows("vm", "abc")
        assert run("snapshot", "create", "vm", "--incremental").strip() == "vm/s1"
        type_in("vm", "d")
        assert knows("vm", "abcd")
        run("snapshot", "create", "vm", "three", "--incremental", "--compress", "zstd=9")
        assert run("snapshot", "restore", "vm", "s1").strip() == "vm"
        assert knows("vm", "abc")
        type_in("vm", "x")
        assert knows("vm", "abcx")
        run("snapshot", "create", "vm", "branch", "--incremental", "--encrypt", "--key-command", "cat key", "--compress", "zstd")
        type_in("vm", "y")
        run("snapshot", "create", "vm", "never", "--incremental", status=1)  # what it would need is encrypted
        assert "encrypted" in run.errors
        run("snapshot", "create", "vm", "full", "--compress", "zstd")
        there = snapshots("vm")
        assert {name: s["kind"] for name, s in there.items()} == {"one": "full", "s1": "incremental", "three": "incremental", "branch": "incremental", "full": "full"}
        assert there["branch"]["parent_id"] == there["three"]["parent_id"] == there["s1"]["id"] and there["full"]["parent_id"] == there["branch"]["id"]
        lines = [line.split()[0] for line in run("snapshot", "list", "vm", "--tree").splitlines()[1:]]
        assert lines == ["vm/one", "vm/s1", "vm/three", "vm/branch", "vm/full"], lines
        assert "memory:    0 of 1024" in run("snapshot", "diff", "vm", "one", "one")
        assert "memory:    1 of 1024" in run("snapshot", "diff", "vm", "one", "s1")
        assert json.loads(run("snapshot", "show", "vm", "one"))["description"] == "the first"

        run("snapshot", "delete", "vm", "s1", status=1)  # branch, which needs it, cannot be read
        assert set(snapshots("vm")) == set(there)
        assert run("snapshot", "delete", "vm", "s1", "--key-file", "key").strip() == "vm/s1"
        run("snapshot", "delete", "vm", "one", "--key-file", "key")
        left = pathlib.Path(f"{folder}/data/doppel/snapshots/vm/three/memory")  # as if it had been killed just before its end
        left.write_text("x")
        now = snapshots("vm")
        assert {name: (s["kind"], s["encrypted"]) for name, s in now.items()} == {"three": ("full", False), "branch": ("full", True), "full": ("full", False)}
        run("snapshot", "create", "vm", "last")
        run("snapshot", "delete", "vm", "last")
        assert not left.exists()
        run("snapshot", "restore", "vm", "branch", status=1)
        assert "branch/state" in run.errors and state("vm") == "running"
        for name, text in (("three", "abcd"), ("branch", "abcx"), ("full", "abcxy")):
            run("snapshot", "restore", "vm", name, "--key-file", "key")
            assert knows("vm", text)
        start(KEEPS, name="passing")
        assert os.path.isdir(f"{folder}/data/doppel/snapshots/passing")
        run("kill", "vm", "passing")
        run("snapshot", "list")
        assert not os.path.exists(f"{folder}/data/doppel/snapshots/passing")
        run("snapshot", "restore", "vm", "three", "--load", "slowly", status=2)
        run("snapshot", "restore", "vm", "branch", "--as", "other", "--load", "whole", "--key-file", "key")
        assert knows("other", "abcx")
        run("snapshot", "restore", "vm", "three", "--as", "other")
        assert knows("other", "abcd") and state("vm") == "ended"
        for wrong in (["create", "vm"], ["create", "other", "a/b"], ["create", "other", ".x"], ["restore", "other", "three"], ["delete", "vm", "nothing"], ["show", "vm", "x"],
                      ["create", "other", "--incremental"]):
            run("snapshot", *wrong, status=1)
        for wrong in ([], ["fold"], ["create"], ["list", "--full"], ["create", "other", "--encrypt"], ["create", "other", "--compress", "lz4"], ["restore", "vm"],
                      ["create", "other", "--incremental", "--full"], ["create", "other", "--key-file", "missing", "--encrypt"]):
            run("snapshot", *wrong, status=2)
        run("snapshot", "create", "other", "leaf", "--incremental", status=1)  # its base is another machine's
        run("snapshot", "create", "other", "root")
        type_in("other", "z")
        run("snapshot", "create", "other", "leaf", "--incremental")
        run("snapshot", "export", "other", "leaf", "leaf.tar")
        assert os.stat("leaf.tar").st_size < 1 << 20  # holes are none of it
        assert run("snapshot", "import", "leaf.tar") == "other/root (there already)\nother/leaf (there already)\n"
        assert run("snapshot", "import", "leaf.tar", "moved") == "moved/root\nmoved/leaf\n"
        run("snapshot", "restore", "moved", "leaf")
        assert knows("moved", "abcdz")
        good = pathlib.Path("leaf.tar").read_bytes()
        for bad in (b"", good[:3000], good[:len(good) // 2], good.replace(b"root/state", b"../x/state"), good.replace(b"leaf/state", b"leaf/other"), b"x" * 10000):
            pathlib.Path("bad.tar").write_bytes(bad)
            run("snapshot", "import", "bad.tar", "worse", status=1)
            assert "bad.tar" in run.errors and set(snapshots("worse")) <= {"root"}, run.errors
            subprocess.run([doppel, "snapshot", "delete", "worse", "root"], capture_output=True)
        with open("disk", "wb") as disk:
            disk.truncate(1 << 20)
        start(KEEPS, "--disk", "disk", name="disky")
        run("snapshot", "create", "disky", "--no-disks")
        run("snapshot", "create", "disky", "kept")
        files = f"{folder}/data/doppel/snapshots/disky/.disks"
        top = json.load(open(f"{files}/map.json"))
        assert list(top) == [f"{folder}/disk", "checksum"] and snapshots("disky")["kept"]["disk_files"][0]["file"] == f"{folder}/disk"
        run("kill", "disky")
        run("start", "disky")  # goes on in the overlay
        run("snapshot", "create", "disky", "again")
        assert snapshots("disky")["again"]["disk_files"][0]["file"] == top[f"{folder}/disk"]
        run("snapshot", "export", "disky", "again", "disky.tar")
        good = pathlib.Path("disky.tar").read_bytes()
        for bad in good.replace(b"again/disk0", b"again/disk1"), good.replace(b'"size_bytes": 1048576', b'"size_bytes": 1048064'), good[:-30000]:
            pathlib.Path("bad.tar").write_bytes(bad)
            run("snapshot", "import", "bad.tar", "worse", status=1)
            assert "bad.tar" in run.errors and not snapshots("worse"), run.errors
        run("snapshot", "import", "disky.tar", "copy")
        run("snapshot", "restore", "copy", "again")
        assert list(json.load(open(f"{folder}/data/doppel/snapshots/copy/.disks/map.json"))) == [f"{folder}/disk", "checksum"]
        run("snapshot", "restore", "disky", "kept")
        with open("plain.img", "wb") as file:
            file.truncate(2 << 20)
        start(KEEPS, "--pmem", "plain.img", name="plain")
        run("snapshot", "create", "plain", status=1)
        assert "persistent memory plain.img" in run.errors and "--no-disks" in run.errors
        assert not [name for name in os.listdir(f"{folder}/data/doppel/snapshots/vm") if name.startswith(".") and name != ".lock"]


def ahead():
    """What a machine touches first is recorded once and read ahead; a file of it that is damaged is made anew. All ways to load have the same memory."""
    with runtime() as folder:
        start(KEEPS, name="vm")
        type_in("vm", "ab")
        assert knows("vm", "ab")
        run("snapshot", "create", "vm", "one", "--compress", "zstd")
        path = pathlib.Path(folder, "data/doppel/snapshots/vm/one/working-set")

        def restored(*options):
            run("snapshot", "restore", "vm", "one", *options)
            return knows("vm", "ab")

        def recorded():
            return path.exists() and len(data := path.read_bytes()) > 64 and data.startswith(b"DOPPELWS") and data
        assert restored()
        good = wait_for("a record", recorded)
        assert restored() and path.read_bytes() == good
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        assert restored()
        wait_for("a new record", lambda: (data := recorded()) and data[-1] == good[-1])
        for load in "lazy", "fill", "whole":
            assert restored("--load", load)
        path.unlink()
        path.mkdir()
        assert restored()
        path.rmdir()
        run("snapshot", "restore", "vm", "one", "--load", "all", status=2)
        assert "lazy, fill, whole" in run.errors


def damage(data, generator, count):
    """The places and what becomes of them: a bit of each of some bytes."""
    for at in generator.sample(range(len(data)), min(count, len(data))):
        yield at, data[:at] + bytes([data[at] ^ 1 << generator.randrange(8)]) + data[at + 1:]


def disks():
    """What tells which image is on top of a disk: damaged it ends in an error, not in a machine whose disk is that of long ago, and nothing that it names is removed."""
    generator = random.Random(int(os.environ.get("SEED", "1")))
    with runtime() as folder:
        with open("disk", "wb") as disk:
            disk.truncate(1 << 20)
        start(KEEPS, "--disk", "disk", name="vm")
        type_in("vm", "a")
        run("snapshot", "create", "vm", "one")
        place = pathlib.Path(f"{folder}/data/doppel/snapshots/vm")
        map_file = place / ".disks/map.json"
        good, images = map_file.read_bytes(), set(os.listdir(place / ".disks"))
        assert knows("vm", "a")
        for at, bad in damage(good, generator, 60):
            map_file.write_bytes(bad)
            done = subprocess.run([doppel, "snapshot", "create", "vm", "two"], capture_output=True, text=True, timeout=60)
            if done.returncode == 0:  # white space
                assert json.loads(bad) == json.loads(good), at
                run("snapshot", "delete", "vm", "two")
                good = map_file.read_bytes()
                continue
            assert ".disks/map.json" in done.stderr and "is damaged" in done.stderr, done.stderr
            assert images <= set(os.listdir(place / ".disks")) and map_file.read_bytes() == bad
        run("snapshot", "restore", "vm", "one", status=1)
        assert "map.json" in run.errors and state("vm") == "running" and knows("vm", "a"), run.errors
        run("kill", "vm")
        run("start", "vm", status=1)
        assert "map.json" in run.errors, run.errors
        map_file.write_bytes(good)
        top = pathlib.Path(json.loads(good)[f"{folder}/disk"])
        assert top.exists()
        plain = json.loads(good)
        del plain["checksum"]  # the first versions had none
        map_file.write_text(json.dumps(plain))
        run("start", "vm")
        os.rename("disk", "elsewhere")  # before the machine is ended
        run("snapshot", "restore", "vm", "one", status=1)
        assert "disk" in run.errors and state("vm") == "running", run.errors
        os.rename("elsewhere", "disk")
        run("snapshot", "restore", "vm", "one")
        assert knows("vm", "a")


def check():
    """`snapshot check` finds each bit that changed, and says in what: state, memory of all kinds, tables of disks, descriptions; and that all is sound when it is."""
    generator = random.Random(int(os.environ.get("SEED", "1")))
    with runtime() as folder:
        place = pathlib.Path(f"{folder}/data/doppel/snapshots/vm")
        key = ("--key-file", "key")
        pathlib.Path("key").write_text("a phrase of some length\n")
        with open("disk", "wb") as disk:
            disk.truncate(1 << 20)
        start(KEEPS, "--disk", "disk", name="vm")
        for name, options in ("raw", ()), ("layer", ("--incremental",)), ("packed", ("--incremental", "--compress", "zstd")), ("secret", ("--incremental", "--encrypt", *key)), ("last", ("--no-disks",)):
            type_in("vm", name)
            run("snapshot", "create", "vm", name, *options)
        made = snapshots("vm")

        def told(*arguments, status=0):
            rows = json.loads(run("snapshot", "check", "vm", "--json", *arguments, status=status))
            return {(row["snapshot"], row["item"]): row["result"] for row in rows if row["result"] != "sound"}, len(rows)
        assert told(*key) == ({}, 5 * 3 + 3 + 4 + 1) and told("layer", *key) == ({}, 2 * 3 + 1 + 2 + 1)
        assert told("secret")[0] == {("secret", "state"): "not checked", ("secret", "memory"): "not checked"}
        run("snapshot", "check", "vm", "other", status=1)
        run("snapshot", "check", "other")

        def found(file, at, bit, *items, which=()):
            good = file.read_bytes()
            file.write_bytes(good[:at] + bytes([good[at] ^ bit]) + good[at + 1:])
            assert told(*which, *key, status=1)[0] == {item: "damaged" for item in items}, (file, at, bit)
            file.write_bytes(good)
        for name in made:
            content = (place / name / "state").read_bytes()
            sample = range(4096, len(content)) if content.startswith(b"DOPPELCF") else range(len(content))  # between header and parts there is nothing
            for at in generator.sample(sample, 6):
                found(place / name / "state", at, 1 << generator.randrange(8), (name, "state"), which=[name])
            packed = (place / name / "memory").stat().st_size < 4 << 20
            size = 144 if packed else 4 << 20  # of a chunk file the header, and what follows
            for at in [*generator.sample(range(size), 4), size - 1, *([4096, (place / name / "memory").stat().st_size - 1] if packed else [0, 4096])]:
                found(place / name / "memory", at, 1 << generator.randrange(8), (name, "memory"), which=[name])
        frozen = pathlib.Path(made["layer"]["disk_files"][0]["file"])
        header = struct.unpack_from(">QQ", frozen.read_bytes(), 40)  # of the L1 and the reference count table
        for at in 0, 31, header[0] + 3, header[1] + 3:
            found(frozen, at, 4, ("layer", "disk0"), ("packed", "disk0"), ("secret", "disk0"))
        os.rename(frozen, "elsewhere")
        assert told(*key, status=1)[0] == {(name, "disk0"): "damaged" for name in ("layer", "packed", "secret")}
        os.rename("elsewhere", frozen)
        found(place / ".disks/map.json", 5, 1, ("", "map of disks"))
        assert told(*key)[0] == {}
        os.rename(place / "layer", "elsewhere")
        assert told(*key, status=1)[0] == {("packed", "base"): "damaged"} and told("packed", *key, status=1)[0] == {("packed", "base"): "damaged"}
        os.rename("elsewhere", place / "layer")
        good = (place / "last/snapshot.json").read_bytes()
        (place / "last/snapshot.json").write_bytes(good.replace(b"memory", b"memorx"))
        assert told(*key, status=1)[0] == {("last", "snapshot.json"): "damaged"}
        plain = json.loads(good)
        for member in "checksum", "memory_xxh3", "state_xxh3":
            del plain[member]  # the first versions had none
        (place / "last/snapshot.json").write_text(json.dumps(plain))
        assert told(*key)[0] == {("last", "memory"): "not checked"}
        (place / "last/snapshot.json").write_bytes(good)
        run("snapshot", "delete", "vm", "raw", *key)  # what is merged has a checksum again
        assert snapshots("vm")["layer"]["memory_xxh3"] != made["raw"]["memory_xxh3"] and told(*key)[0] == {}
        run("snapshot", "delete", "vm", "layer", *key)
        assert "memory_xxh3" not in snapshots("vm")["packed"] and told(*key)[0] == {}


def sections_of(data, first=0, end=None, inside=()):
    """(names from the outermost on, places of their heads, first and end of the body) of each section of a state file, docs/formats.md."""
    end = len(data) if end is None else end
    at = first
    while at + 21 < end:
        name_end = at + 5 + data[at + 4]
        if data[at:at + 4] in (b"DPST", b"DPSO") and name_end + 16 <= end:
            size, = struct.unpack_from("<Q", data, name_end + 4)
            body = name_end + 12
            if body + size + 4 <= end and struct.unpack_from("<I", data, body + size)[0] == zlib.crc32(data[body:body + size]):
                here = (*inside, (at, data[at + 5:name_end].decode(), body, body + size))
                yield here
                yield from sections_of(data, body, body + size, here)
                at = body + size + 4
                continue
        assert inside, f"no section at {at}"
        at += 1  # values


def sections():
    """Every section of a state, damaged, cut off, or of a version to come, is refused by its name; the machine goes on as if nothing had been asked."""
    with runtime() as folder:
        with open("disk", "wb") as disk:
            disk.truncate(1 << 20)
        start(KEEPS, "--disk", "disk", "--net", "user", "--cpus", "2", name="vm")
        type_in("vm", "a")
        assert knows("vm", "a")
        run("snapshot", "create", "vm", "one")
        file = pathlib.Path(f"{folder}/data/doppel/snapshots/vm/one/state")
        good = file.read_bytes()
        found = list(sections_of(good))
        assert {"snapshot", "config", "machine", "virtio-net", "virtio-blk", "ioapic"} <= {path[-1][1] for path in found} and len(found) > 20, found

        parts_body, parts_end = next(path[0][2:] for path in found if path[0][1] == "parts")

        def refused(bad, names, *options, status=1):
            file.write_bytes(bad)
            run("snapshot", "restore", "vm", "one", *options, status=status)
            assert "one/state: " in run.errors and any(f'"{name}"' in run.errors for name in names), (names, run.errors)
            assert state("vm") == "running"
        for path in found:
            names = [name for _, name, _, _ in path]
            at, name, body, end = path[-1]
            middle = (body + end) // 2
            if body < end:
                refused(good[:middle] + bytes([good[middle] ^ 4]) + good[middle + 1:], names)
            refused(good[:end], names)
            if good[at:at + 4] == b"DPST":
                newer = bytearray(good)
                struct.pack_into("<I", newer, body - 12, 999)
                for _, _, first, last in reversed(path[:-1]):
                    struct.pack_into("<I", newer, last, zlib.crc32(newer[first:last]))
                refused(bytes(newer), [name], "--as", "other", status=1 if len(path) == 1 and name != "machine" else 2)  # found out by the process that would run it
                listed = b"\x01" + struct.pack("<I", len(name)) + name.encode()
                if (entry := newer.find(listed, parts_body, parts_end)) >= 0 or path[0][1] == "machine":
                    struct.pack_into("<I", newer, entry + len(listed), 999)
                    struct.pack_into("<I", newer, parts_end, zlib.crc32(newer[parts_body:parts_end]))
                    refused(bytes(newer), [name])  # before anything is ended
        file.write_bytes(good)
        print(f"{len(found)} sections")
        meta = file.parent / "snapshot.json"
        told, whole = run("snapshot", "show", "vm", "one"), meta.read_bytes()
        name = whole.index(b'"checksum"')  # with another name it is no checksum, and the rest is sound
        for at in (*range(name), *range(name + 10, len(whole))):
            meta.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 7]) + whole[at + 1:])
            said = subprocess.run([doppel, "snapshot", "show", "vm", "one"], capture_output=True, text=True, timeout=60)
            assert said.stdout == told or (said.returncode == 1 and "snapshot.json is missing, damaged" in said.stderr), (at, whole[at], said)
        plain = json.loads(whole)
        del plain["checksum"]  # the first versions had none
        meta.write_text(json.dumps(plain))
        assert run("snapshot", "show", "vm", "one") == told
        meta.write_bytes(whole)
        assert knows("vm", "a")
        run("snapshot", "restore", "vm", "one")
        assert knows("vm", "a")


def faults():
    """Full disks, damaged files, and processes killed at any moment: what was there before can be gone back to."""
    generator = random.Random(int(os.environ.get("SEED", "1")))
    with runtime() as folder:
        place = pathlib.Path(f"{folder}/data/doppel/snapshots/vm")
        start(KEEPS, name="vm")
        type_in("vm", "a")
        run("snapshot", "create", "vm", "one")
        type_in("vm", "b")
        assert knows("vm", "ab")
        pid = vms()["vm"]["pid"]
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        for option in ([], ["--incremental"], ["--incremental", "--compress", "zstd"]):
            run("snapshot", "create", "vm", "two", *option, status=1)
            assert "cannot write" in run.errors and "File too large" in run.errors, run.errors
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert list(snapshots("vm")) == ["one"] and knows("vm", "ab")
        run("snapshot", "create", "vm", "two", "--incremental")

        for name in ("one/memory", "two/memory", "two/state", "two/snapshot.json"):
            file = place / name
            good = file.read_bytes()
            for bad in (good[:len(good) // 2], good[:-3], good[:100] + bytes([good[100] ^ 1]) + good[101:]):
                if len(bad) == len(good) and name in ("one/memory", "two/snapshot.json"):
                    continue  # these have no checksum
                file.write_bytes(bad)
                run("snapshot", "restore", "vm", "two", status=1)
                assert name.split("/")[1] in run.errors or "two" in run.errors, run.errors
                assert state("vm") == "running"  # as if nothing had been asked
            file.write_bytes(good)
        assert knows("vm", "ab")
        run("snapshot", "restore", "vm", "two")
        assert knows("vm", "ab")

        described = (place / "two/snapshot.json").read_bytes()
        (place / "two/snapshot.json").write_bytes(described[:-9])
        run("snapshot", "delete", "vm", "one", status=1)  # which the other one needs
        assert "vm/two cannot be read" in run.errors, run.errors
        (place / "two/snapshot.json").write_bytes(described)
        assert set(snapshots("vm")) == {"one", "two"}

        for _ in range(8):  # the command, then the machine itself
            command = subprocess.Popen([doppel, "snapshot", "create", "vm", "x", *generator.choice(([], ["--incremental"]))], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                command.wait(generator.random() * 0.06)
            except subprocess.TimeoutExpired:
                pass
            if generator.random() < 0.5:
                command.kill()
            else:
                os.kill(vms()["vm"]["pid"], signal.SIGKILL)
            command.wait()
            there = set(snapshots("vm"))
            assert there in ({"one", "two"}, {"one", "two", "x"}), there
            run("snapshot", "restore", "vm", "x" if "x" in there else "two")
            assert knows("vm", "ab")
            if "x" in there:
                wait_for("lock", lambda: subprocess.run([doppel, "snapshot", "delete", "vm", "x"], capture_output=True).returncode == 0)
        command = subprocess.Popen([doppel, "snapshot", "delete", "vm", "one"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            command.wait(0.008)
        except subprocess.TimeoutExpired:
            command.kill()
        command.wait()
        run("snapshot", "restore", "vm", "two")
        assert knows("vm", "ab")
        run("snapshot", "create", "vm", "mapped")
        run("snapshot", "restore", "vm", "mapped")
        os.truncate(place / "mapped/memory", 0)  # under the guest, whose code it is
        wait_for("end", lambda: state("vm") != "running")
        assert "was cut short" in run("logs", "--messages", "vm")


if __name__ == "__main__":
    {"tree": tree, "faults": faults, "ahead": ahead, "sections": sections, "disks": disks, "check": check}[sys.argv[2]]()
