#!/usr/bin/env python3
"""Shared directories with Debian's kernel: what one side does is what the other sees. `share.py SCENARIO` is one test; SHARE_LOAD names the program share_load."""
import hashlib
import os
import re
import resource
import shutil
import tempfile

import guest
from guest import busybox

load = os.environ.get("SHARE_LOAD")


def digests(folder):
    """What is in a tree: files by content, links by target, directories; with modes."""
    found = {}
    for path, folders, files in os.walk(folder):
        for name in folders + files:
            full = os.path.join(path, name)
            key = os.path.relpath(full, folder)
            mode = os.lstat(full).st_mode
            if os.path.islink(full):
                found[key] = os.readlink(full)
            elif os.path.isdir(full):
                found[key] = oct(mode)
            else:
                with open(full, "rb") as file:
                    found[key] = (oct(mode), hashlib.sha256(file.read()).hexdigest())
    return found


def make_tree(folder):
    """Some hundred files of all sizes, links of both kinds, names in need of care."""
    for number in range(300):
        path = f"{folder}/dir{number % 7}/sub{number % 3}"
        os.makedirs(path, exist_ok=True)
        with open(f"{path}/file {number}", "wb") as file:
            file.write(os.urandom(number * number % 70000))
        os.chmod(file.name, 0o644 if number % 5 else 0o755)
    os.symlink("dir1/sub1", f"{folder}/link")
    os.link(f"{folder}/dir1/sub1/file 1", f"{folder}/hard")
    with open(f"{folder}/" + "\u00e4" * 120, "w") as file:
        file.write("a long name")


def mount(vm, options="", tag="work", where="/mnt"):
    vm.run(f"mkdir -p {where}; mount -t virtiofs {options} {tag} {where}")


def complaints(vm):
    found = vm.run("dmesg | grep -E 'BUG:|Oops|Call Trace|soft lockup|(fuse|virtio.*): .*(fail|error)' || true")
    assert not found, f"the kernel complains:\n{found}"


def trees(vm, work):
    """Both ways, by the tools that people use."""
    make_tree(f"{work}/from-host")
    sums = vm.run("cd /mnt/from-host; find . -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum; cd /", 60).split()[0]
    lines = []
    for key, value in sorted(digests(f"{work}/from-host").items(), key=lambda item: os.fsencode("./" + item[0])):
        if isinstance(value, tuple):
            lines.append(f"{value[1]}  ./{key}\n")
    assert sums == hashlib.sha256("".join(lines).encode()).hexdigest(), "the guest reads other files than the host wrote"
    vm.run("tar -C /mnt/from-host -cf /tmp/tree.tar . && mkdir /mnt/unpacked && tar -C /mnt/unpacked -xf /tmp/tree.tar", 60)
    assert digests(f"{work}/unpacked") == digests(f"{work}/from-host"), "what was unpacked in the guest differs"
    assert os.stat(f"{work}/unpacked/hard").st_nlink == 2
    vm.run("cp -a /mnt/unpacked /mnt/copy && mv /mnt/copy/dir1 /mnt/copy/dir2/moved && mv /mnt/copy /mnt/renamed && find /mnt/renamed | wc -l", 60)
    assert digests(f"{work}/renamed/dir2/moved") == digests(f"{work}/from-host/dir1")
    vm.run("rm -r /mnt/renamed /mnt/unpacked /mnt/from-host && test -z \"$(ls /mnt)\"", 60)
    assert os.listdir(work) == []


def many(vm, work):
    vm.run("mkdir /mnt/many; for d in 0 1 2 3 4 5 6 7 8 9; do for n in $(seq 200); do echo $n >/mnt/many/$d-$n; done; done", 120)
    assert len(os.listdir(f"{work}/many")) == 2000
    assert vm.run("ls /mnt/many | wc -l") == "2000"
    assert vm.run("cat /mnt/many/* | sort -n | uniq -c | grep -vc '^ *10 '; true") == "0"
    vm.run("rm -r /mnt/many", 60)


def large(vm, work):
    """Offsets beyond 4 GiB, holes, data in pieces of all sizes."""
    vm.run("echo beyond | dd of=/mnt/large bs=1M seek=5000 conv=notrunc 2>/dev/null")
    found = os.stat(f"{work}/large")
    assert found.st_size == (5000 << 20) + 7 and found.st_blocks < 1000, f"{found}"
    assert vm.run("dd if=/mnt/large bs=1M skip=5000 2>/dev/null") == "beyond"
    os.truncate(f"{work}/large", 6 << 30)
    body = os.urandom(9 << 20)
    with open(f"{work}/body", "wb") as file:
        file.write(body)
    assert vm.run("sleep 1; stat -c %s /mnt/large") == str(6 << 30)
    vm.run("cp /mnt/body /mnt/back && dd if=/mnt/body of=/mnt/odd bs=12345 2>/dev/null && cmp /mnt/back /mnt/odd && sync", 60)
    for name in "back", "odd":
        with open(f"{work}/{name}", "rb") as file:
            assert file.read() == body, f"{name} differs"
    vm.run("rm /mnt/large /mnt/body /mnt/back /mnt/odd")


def both_sides(vm, work):
    """Changes on the host are seen, and both may append."""
    with open(f"{work}/log", "w") as log:
        log.write("host 1\n")
        log.flush()
        vm.run("cat /mnt/log && echo guest 1 >>/mnt/log")
        os.write(os.open(log.name, os.O_WRONLY | os.O_APPEND), b"host 2\n")
        vm.run("echo guest 2 >>/mnt/log")
    with open(f"{work}/log") as log:
        assert log.read() == "host 1\nguest 1\nhost 2\nguest 2\n"
    assert vm.run("sleep 1; cat /mnt/log") == "host 1\nguest 1\nhost 2\nguest 2"
    os.rename(f"{work}/log", f"{work}/renamed")
    assert vm.run("sleep 1.1; ls /mnt") == "renamed"
    with open(f"{work}/renamed", "w") as log:
        log.write("all new")
    assert vm.run("cat /mnt/renamed") == "all new", "data from before the file was opened"
    with open(f"{work}/new", "w") as file:
        file.write("new")
    os.remove(f"{work}/renamed")
    assert vm.run("sleep 1.1; ls /mnt; cat /mnt/new") == "new\nnew"
    vm.run("rm /mnt/new")


def programs(vm, work):
    vm.run("cp /tmp/share_load /mnt/program && /mnt/program mmap /mnt/mapped && /mnt/program locks /mnt/locked", 60)
    with open(f"{work}/mapped", "rb") as file:
        assert file.read() == bytes(n * 31 >> 8 & 255 for n in range(1 << 20)), "what was written through a mapping differs"
    vm.run("mkfifo /mnt/fifo && (echo through >/mnt/fifo &) && test $(cat /mnt/fifo) = through")
    vm.run("exec 5>/mnt/open; rm /mnt/open; echo still >&5; test $(cat /proc/self/fd/5) = still; exec 5>&-")
    for refused in "mknod /mnt/null c 1 3", "mknod /mnt/disk b 8 0":
        assert vm.attempt(refused)[0] != 0, f"{refused} worked"
    vm.run("chmod 4755 /mnt/program")
    assert os.stat(f"{work}/program").st_mode & 0o6000 == 0
    vm.run("rm /mnt/program /mnt/mapped /mnt/locked /mnt/fifo")


def readonly(vm, work):
    with open(f"{work}/file", "w") as file:
        file.write("kept")
    mount(vm, tag="fixed", where="/ro")
    assert vm.run("cat /ro/file") == "kept"
    for refused in "echo x >/ro/file", "touch /ro/new", "rm /ro/file", "mkdir /ro/dir", "mv /ro/file /ro/other", "ln /ro/file /ro/hard", "chmod 600 /ro/file", "truncate -s 0 /ro/file":
        status, said = vm.attempt(refused)
        assert status != 0 and "Read-only file system" in said, f"{refused}: status {status}, {said}"
    assert os.listdir(work) == ["file"] and os.path.getsize(f"{work}/file") == 4
    vm.run("umount /ro")


def again(vm):
    """Mounted anew, and with the driver loaded anew: everything was given back."""
    vm.run("umount /mnt && mount -t virtiofs work /mnt && ls /mnt && umount /mnt")
    vm.run("rmmod virtiofs && insmod /lib/modules/*/virtiofs.ko")
    mount(vm)
    vm.run("ls /mnt")


def share():
    guest.need(load)
    with tempfile.TemporaryDirectory() as folder:
        work = f"{folder}/a, b:c"
        fixed = f"{folder}/fixed"
        os.mkdir(work)
        os.mkdir(fixed)
        shutil.copy(load, f"{work}/share_load")
        with busybox("--share", f"{work.replace(',', ',,')}:work", "--share", f"{fixed}:fixed,ro", "--cpus", 2) as vm:
            mount(vm)
            vm.run("cp /mnt/share_load /tmp && rm /mnt/share_load")
            trees(vm, work)
            many(vm, work)
            large(vm, work)
            both_sides(vm, work)
            programs(vm, work)
            readonly(vm, fixed)
            again(vm)
            complaints(vm)
            vm.type("poweroff\n")
            vm.finish(0)
        assert os.listdir(work) == []


def compared():
    """Random operations in a share and in a tmpfs of the guest: the same results, in every mode, with few descriptors, on both transports."""
    guest.need(load)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for number, (options, more) in enumerate([("", []), (",cache=none", ["--transport", "mmio"]), (",cache=always,writeback,xattr", ["--cpus", 2, "--sandbox", "on"])]):
        resource.setrlimit(resource.RLIMIT_NOFILE, (330 if number else 1024, hard if os.geteuid() == 0 or number == 0 else 330))
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            shutil.copy(load, folder)
            os.mkdir(f"{folder}/side")
            with busybox("--share", f"{folder}:work{options}", *more) as vm:
                mount(vm)
                vm.run("cp /mnt/share_load /tmp && mkdir /tmp/side")
                seed = int.from_bytes(os.urandom(4), "little")
                said = vm.run(f"/tmp/share_load compare /mnt/side /tmp/side {seed} 12000 || echo seed {seed}", 120)
                succeeded = re.search(r"agree, (\d+) of", said)
                assert succeeded and int(succeeded[1]) > 2000, f"{options}: {said}"
                complaints(vm)
                vm.type("poweroff\n")
                vm.finish(0)


guest.main({"share": share, "share-compared": compared})
