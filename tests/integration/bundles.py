#!/usr/bin/env python3
"""doppel export and import: machines, with and without their state, and appliances, from one directory of data to another. `bundles.py DOPPEL SCENARIO` is one test."""
import hashlib
import io
import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import tarfile

import small_guests
from vms import KEEPS, doppel, knows, run, runtime, snapshots, start, state, type_in

KIB, MIB = 1 << 10, 1 << 20


def image(path, size, seed=1):
    """Mostly holes."""
    generator = random.Random(seed)
    with open(path, "wb") as file:
        file.truncate(size)
        for _ in range(20):
            file.seek(generator.randrange(size // 512) * 512)
            file.write(generator.randbytes(512))
    return pathlib.Path(path).read_bytes()


def repack(path, to, change, twice=None, link=None):
    """A bundle with entries changed: change(name, content) gives the content, or None to leave it out; one comes twice, or is a link."""
    with tarfile.open(path) as old, tarfile.open(to, "w") as new:
        for entry in [*old, *(entry for entry in old if entry.name == twice)]:
            content = change(entry.name, old.extractfile(entry).read())
            if entry.name == link:
                made = tarfile.TarInfo(entry.name)
                made.type, made.linkname = tarfile.SYMTYPE, "/etc/passwd"
                new.addfile(made)
            elif content is not None:
                made = tarfile.TarInfo(entry.name)
                made.size = len(content)
                new.addfile(made, io.BytesIO(content))


def leftovers(folder):
    there = pathlib.Path(f"{folder}/data/doppel/machines")
    return sorted(name for name in os.listdir(there) if name.startswith(".")) if there.exists() else []


def limited(size, *arguments):
    """With files that may not grow beyond this size; what it said."""
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    done = subprocess.run([doppel, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 1, done
    return done.stderr


def bundles():
    with runtime() as folder:
        disk = image("a,b.img", 8 * MIB)
        iso = image("second", 64 * KIB, 2)
        pathlib.Path("options.json").write_text(json.dumps({"disk": ["second,readonly,serial=S"], "cpus": 1}))
        os.mkdir("shared")
        start(KEEPS, "--disk=a,,b.img,id=first,iops=5000", "--config", "options.json", "--share", "shared:tag", "--restart", "on-failure:2", name="vm")
        type_in("vm", "abc")
        assert knows("vm", "abc")
        run("export", "vm", "vm.bundle", status=1)
        assert "a,b.img is in use" in run.errors and not os.path.exists("vm.bundle") and not os.path.exists("vm.bundle.part"), run.errors
        run("kill", "vm")
        run("export", "vm", "vm.bundle")
        assert "left out, because it is this host's: share" in run.errors, run.errors
        assert os.stat("vm.bundle").st_size < MIB  # holes are none of it
        run("export", "vm", "small.bundle", "--compress", "zstd=19")
        assert os.stat("small.bundle").st_size < os.stat("vm.bundle").st_size

        os.environ["XDG_DATA_HOME"] = f"{folder}/else,where"
        for bundle, name in (("vm.bundle", "vm"), ("small.bundle", "copy")):
            path = pathlib.Path(run("import", bundle, *([name] if name != "vm" else [])).strip())
            assert path == pathlib.Path(f"{folder}/else,where/doppel/machines/{name}/machine.json"), path
            config = json.loads(path.read_text())
            assert config["memory"] == "4M" and config["cpus"] == "1" and config["net"] == ["none"] and "share" not in config
            assert [value.split("/")[-1] for value in config["disk"]] == ["disk0,id=first,iops=5000", "disk1,readonly,serial=S"], config
            assert (path.parent / "disk0").read_bytes() == disk and (path.parent / "disk1").read_bytes() == iso
            assert os.stat(path.parent / "disk0").st_blocks * 512 < MIB
            run("run", "-d", "--name", name, "--config", path)
            type_in(name, "xy")
            assert knows(name, "xy")
            run("kill", name)
        run("import", "vm.bundle", status=1)
        assert "is there already" in run.errors
        with open("small.bundle", "rb") as file:
            assert run("import", "-", "third", "--directory", "here/", input=None, stdin=file).strip() == f"{folder}/here/machine.json"

        os.environ["XDG_DATA_HOME"] = f"{folder}/data"
        good = pathlib.Path("vm.bundle").read_bytes()
        for bad in (b"", b"x" * 9000, good[:700], good[:len(good) // 2], good[:-9 * KIB]):
            pathlib.Path("bad.bundle").write_bytes(bad)
            run("import", "bad.bundle", status=1)
            assert "bad.bundle" in run.errors

        def hostile(option, value):
            def change(name, content):
                if name != ".bundle/bundle.json":
                    return content
                root = json.loads(content)
                root["config"][option] = value
                return json.dumps(root).encode()
            return change

        def flip(name, content):
            return content[:5] + bytes([content[5] ^ 1]) + content[6:] if name == ".bundle/disk1" else content

        for what, change in (("is not what was exported", flip), ("files are missing", lambda name, content: None if name == ".bundle/kernel" else content),
                             ("another size", lambda name, content: content + b"x" if name == ".bundle/disk0" else content),
                             ("cannot have", hostile("share", ["/:all"])), ("cannot have", hostile("console", "file:/tmp/x")), ("cannot have", hostile("net", ["tap:tap0"])),
                             ("no name of a file", hostile("kernel", "/etc/passwd")), ("no name of a file", hostile("disk", ["../x"])), ("has to be", hostile("disk", "disk0")),
                             ("cannot have", hostile("disk", ["disk0,backing=any"])), ("has to be", hostile("memory", ["1M"])), ("cannot have", hostile("pid-file", "x")),
                             ("memory", hostile("memory", "x"))):
            repack("vm.bundle", "bad.bundle", change)
            run("import", "bad.bundle", status=1)
            assert what in run.errors, (what, run.errors)
            assert not leftovers(folder) and not os.path.exists("data/doppel/machines/vm"), leftovers(folder)
        for options in ({"twice": ".bundle/disk0"}, {"twice": ".bundle/bundle.json"}, {"link": ".bundle/disk0"}):
            repack("vm.bundle", "bad.bundle", lambda name, content: content, **options)
            run("import", "bad.bundle", status=1)
            assert ("does not belong" in run.errors or "two descriptions" in run.errors) and not leftovers(folder), (options, run.errors)
        assert "File too large" in limited(MIB, "import", "vm.bundle") and not leftovers(folder)
        assert "cannot write" in limited(16 * KIB, "export", "vm", "x.bundle") and not os.path.exists("x.bundle") and not os.path.exists("x.bundle.part")
        draft = pathlib.Path("data/doppel/machines/.importing-vm/.source")  # as if it had been killed
        os.makedirs(draft)
        (draft / "x").write_text("x")
        (draft.parent / "disk0").write_text("x")
        run("import", "vm.bundle")
        assert not leftovers(folder)
        for wrong in (["export"], ["export", "vm"], ["export", "vm", "x", "y"], ["export", "vm", "x", "--compress", "lz4"], ["import"], ["import", "vm.bundle", "a/b"]):
            run(*wrong, status=2)
        for wrong in (["export", "nobody", "x"], ["export", "vm/none", "x"], ["import", "missing"]):
            run(*wrong, status=1)


def state_too():
    """A snapshot and the one that it needs, with the machine's read-only disk."""
    with runtime() as folder:
        image("disk", 64 * KIB)
        start(KEEPS, "--disk", "disk,readonly", name="vm")
        type_in("vm", "ab")
        assert knows("vm", "ab")
        run("snapshot", "create", "vm", "one")
        type_in("vm", "c")
        assert knows("vm", "abc")
        run("snapshot", "create", "vm", "two", "--incremental", "--compress", "zstd")
        run("export", "vm/two", "vm.bundle")
        run("kill", "vm")
        os.rename("disk", "hidden")  # the other host has neither
        os.rename("kernel", "hidden-kernel")
        os.environ["XDG_DATA_HOME"] = f"{folder}/elsewhere"
        path = f"{folder}/elsewhere/doppel/machines/new/machine.json"
        assert run("import", "vm.bundle", "new").split() == [path, "new/one", "new/two"]
        for name, text in (("two", "abc"), ("one", "ab")):
            run("snapshot", "restore", "new", name)
            assert knows("new", text)
        run("kill", "new")
        run("start", "new")  # as it was booted at first
        type_in("new", "z")
        assert knows("new", "z")
        run("snapshot", "create", "new", "three")
        with open("piped", "wb") as file:
            subprocess.run([doppel, "export", "new/three", "-", "--compress", "zstd"], stdout=file, check=True)
        run("import", "piped", "again")
        run("snapshot", "restore", "again", "three")
        assert knows("again", "z")
        repack("vm.bundle", "bad.bundle", lambda name, content: None if name.startswith("two/") else content)
        run("import", "bad.bundle", "bad", status=1)
        assert "the last snapshot is missing" in run.errors and set(snapshots("bad")) == {"one"}
        repack("vm.bundle", "bad.bundle", lambda name, content: content[:-9] if name == "one/state" else content)
        run("import", "bad.bundle", "less")  # it is looked at when it is restored
        run("snapshot", "restore", "less", "one", status=1)
        pathlib.Path("bad.bundle").write_bytes(pathlib.Path("vm.bundle").read_bytes()[:-20 * KIB])
        run("import", "bad.bundle", "less", status=1)
        repack("vm.bundle", "bad.bundle", lambda name, content: None if not name.startswith(".bundle") else content)
        run("import", "bad.bundle", "worse", status=1)
        assert "the snapshot is missing" in run.errors and not os.path.exists(f"{folder}/elsewhere/doppel/machines/worse")


def disks():
    """Images that lie upon others, and disks of snapshots, come out whole."""
    with runtime() as folder:
        raw = image("disk", MIB)
        extra = image("below", MIB, 3)
        qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", "below", "upper.qcow2")
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 0x11 64k 64k", "upper.qcow2"], check=True, stdout=subprocess.DEVNULL)
        extra = extra[:64 * KIB] + b"\x11" * (64 * KIB) + extra[128 * KIB:]
        start(KEEPS, "--disk", "disk,id=a", "--disk", "upper.qcow2,serial=u", "--disk", "below,readonly", name="vm")
        type_in("vm", "ab")
        assert knows("vm", "ab")
        run("snapshot", "create", "vm", "one")
        type_in("vm", "c")
        assert knows("vm", "abc")
        run("snapshot", "create", "vm", "two", "--incremental")
        run("snapshot", "create", "vm", "bare", "--no-disks")
        run("export", "vm", "x", status=1)
        assert "in use" in run.errors and not os.path.exists("x"), run.errors
        run("export", "vm/bare", "x", status=1)
        assert "has no copy of" in run.errors, run.errors
        run("export", "vm/two", "two.bundle")  # while it runs
        run("kill", "vm")
        tops = json.loads(pathlib.Path("data/doppel/snapshots/vm/.disks/map.json").read_text())
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 0x22 0 64k", tops[f"{folder}/disk"]], check=True, stdout=subprocess.DEVNULL)
        run("export", "vm", "vm.bundle")
        run("export", "vm/one", "one.bundle", "--compress", "zstd")

        os.environ["XDG_DATA_HOME"] = f"{folder}/else"
        for bundle, expected in (("vm.bundle", b"\x22" * (64 * KIB) + raw[64 * KIB:]), ("two.bundle", raw), ("one.bundle", raw)):
            name = bundle.split(".")[0]
            path = pathlib.Path(run("import", bundle, "of-" + name).split()[0])
            config = json.loads(path.read_text())
            assert [value.split("/")[-1] for value in config["disk"]] == ["disk0,id=a", "disk1,serial=u", "disk2,readonly"], config
            assert (path.parent / "disk0").read_bytes() == expected and (path.parent / "disk1").read_bytes() == extra, bundle
        for name in ("disk", "below", "upper.qcow2", "kernel"):
            os.rename(name, name + ".hidden")
        os.rename("data", "hidden")
        run("snapshot", "restore", "of-two", "one", status=1)
        assert "its disks did not" in run.errors
        for vm, name, text in (("of-two", "two", "abc"), ("of-one", "one", "ab")):
            run("snapshot", "restore", vm, name)
            assert knows(vm, text)
            tops = json.loads(pathlib.Path(f"else/doppel/snapshots/{vm}/.disks/map.json").read_text())
            assert set(tops) - {"checksum"} == {f"{folder}/else/doppel/machines/{vm}/disk{i}" for i in (0, 1)}, tops
        run("export", "of-one/one", "again.bundle")
        run("kill", "of-two", "of-one")
        run("run", "-d", "--name", "of-vm", "--config", f"{folder}/else/doppel/machines/of-vm/machine.json")

        def change(name, content):
            if name != ".bundle/bundle.json":
                return content
            root = json.loads(content)
            root["disk_files"] = ["disk2"]
            return json.dumps(root).encode()
        repack("two.bundle", "bad.bundle", change)
        run("import", "bad.bundle", "bad", status=1)
        assert "not among its disks" in run.errors and not os.path.exists("else/doppel/machines/bad"), run.errors


OVF = """<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData">
 <References><File ovf:id="file1" ovf:href="{href}" ovf:size="1"/></References>
 <DiskSection><Info>Disks</Info>
  <Disk ovf:diskId="d1" ovf:fileRef="file1" ovf:capacity="8" ovf:capacityAllocationUnits="byte * 2^20" ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"/>
  <Disk ovf:diskId="d2" ovf:capacity="{capacity}"/></DiskSection>
 <VirtualSystem ovf:id="Web Server &amp; 1"><Info/>
  <VirtualHardwareSection>
   <Item><rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>2</rasd:VirtualQuantity></Item>
   <Item ovf:bound="max"><rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>9</rasd:VirtualQuantity></Item>
   <Item><rasd:AllocationUnits>{units}</rasd:AllocationUnits><rasd:ResourceType>4</rasd:ResourceType><rasd:VirtualQuantity>64</rasd:VirtualQuantity></Item>
   <Item><rasd:HostResource>ovf:/disk/d1</rasd:HostResource><rasd:ResourceType>17</rasd:ResourceType></Item>
   <Item><rasd:HostResource>/disk/d2</rasd:HostResource><rasd:ResourceType>17</rasd:ResourceType></Item>
   <Item><rasd:ResourceType>10</rasd:ResourceType></Item><Item><rasd:ResourceType>15</rasd:ResourceType></Item>
   <Item><rasd:ResourceType>6</rasd:ResourceType></Item>
  </VirtualHardwareSection>{more}
 </VirtualSystem>
</Envelope>
"""


def ovf(href="disk.vmdk", capacity=MIB, units="byte * 2^20", more=""):
    return OVF.format(href=href, capacity=capacity, units=units, more=more).encode()


def pack(path, *entries):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in entries:
            made = tarfile.TarInfo(name)
            made.size = len(content)
            tar.addfile(made, io.BytesIO(content))


def qemu_img(*arguments):
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def appliances():
    with runtime() as folder:
        disk = image("raw", 8 * MIB)
        machines = pathlib.Path(f"{folder}/data/doppel/machines")
        number = 0
        for form, options in (("vmdk", ["-o", "subformat=streamOptimized"]), ("vmdk", []), ("vdi", []), ("vhdx", []), ("vpc", ["-o", "force_size=on"]), ("qcow2", []), ("raw", [])):
            qemu_img("convert", "-f", "raw", "-O", form, *options, "raw", "disk.vmdk")
            content = pathlib.Path("disk.vmdk").read_bytes()
            sums = f"SHA256(x.ovf)= {hashlib.sha256(ovf()).hexdigest()}\nSHA1(disk.vmdk)= {hashlib.sha1(content).hexdigest()}\n".encode()
            pack("x.ova", ("x.ovf", ovf()), ("x.mf", sums), ("disk.vmdk", content), ("x.cert", b"?"))
            path = pathlib.Path(run("import", "x.ova", *(["n" + str(number)] if number else [])).strip())
            number += 1
            assert "name a kernel" in run.errors
            config = json.loads(path.read_text())
            assert path.parent == machines / ("WebServer1" if number == 1 else f"n{number - 1}"), path
            assert config == {"memory": "65536K", "cpus": "2", "disk": [f"{path.parent}/disk0", f"{path.parent}/disk1"], "net": ["user"]}, config
            assert (path.parent / "disk0").read_bytes()[:8 * MIB] == disk, form
            assert os.stat(path.parent / "disk1").st_size == MIB and sorted(os.listdir(path.parent)) == ["disk0", "disk1", "machine.json"]
        pathlib.Path("x.ovf").write_bytes(ovf())
        pathlib.Path("x.mf").write_bytes(sums)
        config = run("import", "x.ovf", "files").strip()
        assert sorted(os.listdir(os.path.dirname(config))) == ["disk0", "disk1", "machine.json"] and os.path.exists("disk.vmdk")
        run("run", "-d", "--name", "imported", "--config", config, "--kernel", small_guests.write(f"{folder}/kernel", small_guests.HALT), "--engine", "interp", "--net", "none")
        assert state("imported") == "running"

        qemu_img("convert", "-f", "raw", "-O", "vdi", "raw", "My disk.vdi")
        path = pathlib.Path(run("import", "My disk.vdi").strip())
        assert path.parent == machines / "Mydisk" and (path.parent / "disk0").read_bytes() == disk and json.loads(path.read_text())["disk"] == [f"{path.parent}/disk0"]

        qemu_img("convert", "-f", "raw", "-O", "vmdk", "raw", "good.vmdk")
        good = bytearray(pathlib.Path("good.vmdk").read_bytes())
        parent = good.replace(b'ddb.adapterType = "ide"', b'parentFileNameHint="/e"')
        assert parent != good
        flat = b'# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="monolithicFlat"\nRW 8 FLAT "/etc/passwd" 0\n'
        hidden = bytes(good[:12]) + bytes(8) + bytes(good[20:512]) + flat + bytes(8 * KIB)
        qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", f"{folder}/raw", "above")
        above = pathlib.Path("above").read_bytes()
        cases = [("lies upon", ovf(), parent), ("names other files", ovf(), flat), ("several files", ovf(), hidden), ("needs another file", ovf(), above),
                 ("no name of a file", ovf("../raw"), good), ("no name of a file", ovf("/etc/passwd"), good), ("no name of a file", ovf("nbd://x"), good), ("missing", ovf("other"), good),
                 ("capacity", ovf(capacity="x"), good), ("neither a file", ovf(capacity=7), good), ("memory", ovf(units="bushels"), good), ("memory", ovf(units="byte * 2^50"), good),
                 ("several machines", ovf(more='<VirtualSystem ovf:id="b"/>'), good), ("too deeply", ovf(more="<a>" * 100 + "</a>" * 100), good),
                 ("too long", ovf(more="<Item><ResourceType>" + "1" * 200 + "</ResourceType></Item>"), good), ("x.ova", ovf()[:-20], good), ("x.ova", b"", good),
                 ("Entity", ovf(more="&xxe;").replace(b"<Envelope", b'<!DOCTYPE a [<!ENTITY xxe SYSTEM "file:///etc/passwd">]><Envelope'), good), ("too large", ovf(more=" " * MIB), good)]
        for what, text, content in cases:
            pack("x.ova", ("x.ovf", text), ("disk.vmdk", bytes(content)))
            run("import", "x.ova", "bad", status=1)
            assert what in run.errors, (what, run.errors)
            assert "bad" not in os.listdir(machines) and not leftovers(folder), os.listdir(machines)
            pathlib.Path("bad.img").write_bytes(content)
            if content is not good:
                run("import", "bad.img", status=1)
                assert what in run.errors and not leftovers(folder), (what, run.errors)
        for what, sums in (("is not what its manifest says", b"SHA1(disk.vmdk)= 00\n"), ("unknown kind", b"MD4(disk.vmdk)= 00\n"), ("is not what its manifest says", b"SHA256(x.ovf)= 00\n")):
            pack("x.ova", ("x.ovf", ovf()), ("x.mf", sums), ("disk.vmdk", bytes(good)))
            run("import", "x.ova", "bad", status=1)
            assert what in run.errors, (what, run.errors)
        pack("x.ova", ("x.ovf", ovf()), ("disk.vmdk", bytes(good)))
        run("import", "x.ova", "bad", status=1, env={**os.environ, "PATH": "/nonexistent"})
        assert "qemu-utils" in run.errors


if __name__ == "__main__":
    {"bundles": bundles, "state": state_too, "disks": disks, "appliances": appliances}[sys.argv[2]]()
