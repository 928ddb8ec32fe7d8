#!/usr/bin/env python3
"""doppel clone: copies of a guest that keeps what is typed, each with what it had at that moment and with its own from then on. `clones.py DOPPEL` is one test."""
import json
import os
import pathlib

from vms import KEEPS, knows, run, runtime, snapshots, start, state, type_in, vms, wait_for


def clones():
    with runtime() as folder:
        place = pathlib.Path(f"{folder}/data/doppel/snapshots")
        start(KEEPS, name="vm")
        type_in("vm", "a")
        assert knows("vm", "a")
        assert sorted(run("clone", "vm", "--count", "3").split()) == ["vm-clone-1", "vm-clone-2", "vm-clone-3"]
        assert "no agent answers" in run.errors
        for name in "123":
            type_in(f"vm-clone-{name}", name)
        type_in("vm", "b")
        assert knows("vm", "ab")
        for name in "123":
            assert knows(f"vm-clone-{name}", "a" + name)
        assert snapshots("vm")["clones-1"]["kind"] == "full"

        assert run("clone", "vm", "--name", "copy").strip() == "copy"
        assert knows("copy", "ab") and snapshots("vm")["clones-2"]["kind"] == "incremental"
        assert run("clone", "copy").strip() == "copy-clone-1"  # of a clone
        assert knows("copy-clone-1", "ab")
        run("snapshot", "create", "vm", "--incremental", status=1)
        assert "full" in run.errors
        run("snapshot", "create", "vm", "kept")
        type_in("vm", "c")
        run("clone", "vm/kept", "--name", "old", "-n", "2")
        assert knows("old-1", "ab") and knows("old-2", "ab")
        for number in range(6):
            run("clone", "vm", "--name", f"many{number}")
            assert knows(f"many{number}", "abc")
        made = snapshots("vm")
        assert "kept" in made and len(made) < 8, made  # of those that were made for clones, old ones have gone
        for wrong in (["vm", "--name", "copy"], ["nobody"], ["vm/nothing"]):
            run("clone", *wrong, status=1)
        for wrong in ([], ["vm", "-n", "0"], ["vm", "-n", "x"], ["vm", "--name", "a/b"], ["a b/c"], ["vm", "--name", "x" * 48, "-n", "2"], ["vm", "copy"]):
            run("clone", *wrong, status=2)
        assert state("copy") == "running"
        run("kill", "vm")
        run("clone", "vm", status=1)
        assert "vm/NAME" in run.errors
        assert knows("vm-clone-2", "a2")  # nothing of theirs was the source's
        start(KEEPS, name="another")
        assert [entry.name for entry in (place / "vm").iterdir() if not entry.name.startswith(".")] == ["kept"]
        type_in("another", "z")
        run("clone", "another", "--name", "later")
        meta = place / "another/clones-1/snapshot.json"
        meta.write_text(meta.read_text().replace(json.loads(meta.read_text())["boot_id"], "an-earlier-start-of-the-host"))
        assert not snapshots("another")
        assert knows("later", "z")


def filters(name):
    """How the system calls of the machine's threads are filtered, as numbers."""
    pid = vms()[name]["pid"]
    return {status.read_text().split("Seccomp:")[1].split()[0] for status in pathlib.Path(f"/proc/{pid}/task").glob("*/status")}


def sandbox():
    """What goes on from a snapshot is as shut in as what was started."""
    with runtime():
        start(KEEPS, name="vm")
        run("snapshot", "create", "vm", "kept")
        run("clone", "vm", "--name", "clone")
        run("snapshot", "restore", "vm", "kept", "--as", "restored")
        for name in "vm", "clone", "restored":  # the last one when the machine's socket is served
            wait_for("sandbox", lambda: filters(name) == {"2"})
        start(KEEPS, "--sandbox", "off", name="open")
        run("clone", "open", "--name", "as-open")
        assert knows("as-open", "") and filters("as-open") == {"0"}


def disks():
    """Each clone writes to an overlay of its own; the source goes on with its."""
    with runtime() as folder:
        pathlib.Path("image").write_bytes(bytes(1 << 20))
        start(KEEPS, "--disk", "image", name="vm")
        type_in("vm", "a")
        assert knows("vm", "a")
        run("clone", "vm", "--count", "2")
        top = {}
        for name in ("vm", "vm-clone-1", "vm-clone-2"):
            top[name] = json.loads(pathlib.Path(f"{folder}/data/doppel/snapshots/{name}/.disks/map.json").read_text())
            assert len(top[name]) == 2  # and its checksum
            assert os.path.exists(list(top[name].values())[0])
        assert len({list(map.values())[0] for map in top.values()}) == 3
        for name in top:
            assert knows(name, "a")
        run("kill", "vm-clone-1")
        run("start", "vm-clone-1")  # boots, with the disk that it had
        wait_for("start", lambda: state("vm-clone-1") == "running")


sandbox()
disks()
clones()
