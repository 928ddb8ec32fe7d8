#!/usr/bin/env python3
"""A complete Debian with systemd: boots to a login prompt, everything starts, installs a package over the network, powers off."""
import os
import subprocess
import tempfile

import guest
from guest import Guest, cached


def debian(cpus):
    guest.need(guest.doppel, guest.cache)
    with tempfile.TemporaryDirectory(dir=guest.cache) as folder:
        image = os.path.join(folder, "debian.img")
        subprocess.run(["cp", "--sparse=always", "--reflink=auto", cached("debian.img"), image], check=True, timeout=120)
        arguments = ["--kernel", cached("debian-vmlinuz"), "--initrd", cached("debian-initrd"), "--memory", "1G", "--cpus", cpus,
                     "--append", "console=ttyS0 root=LABEL=root rw quiet", "--disk", image]
        with Guest(arguments) as vm:
            vm.expect("login: ", 300)
            print(f"login prompt after {vm.seconds():.1f} s")
            vm.type("root\n")
            vm.expect(r"root@doppel:~#", 60)
            vm.run("stty -echo; PS1=", 60)
            status, state = vm.attempt("systemctl is-system-running --wait", 120)
            if status:
                print(vm.attempt("systemctl --failed --no-pager; systemctl list-jobs --no-pager; journalctl -b -p warning --no-pager | tail -40", 60)[1])
            assert status == 0, f"systemd says: {state}"
            print(f"everything started after {vm.seconds():.1f} s")
            assert vm.run("nproc") == str(cpus)
            vm.run("DEBIAN_FRONTEND=noninteractive; export DEBIAN_FRONTEND; apt-get -q update && apt-get -q install -y hello", 300)
            assert "Hello, world!" in vm.run("hello")
            print(f"package installed after {vm.seconds():.1f} s")
            vm.type("poweroff\n")
            vm.finish(0, 120)
        done = subprocess.run(["/sbin/e2fsck", "-fn", image], capture_output=True, timeout=120)
        assert done.returncode == 0, f"the disk is damaged:\n{done.stdout.decode()}"
        print(f"powered off after {vm.seconds():.1f} s")


guest.main({
    "one-processor": lambda: debian(1),
    "two-processors": lambda: debian(2),
})
