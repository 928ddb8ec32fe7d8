#!/usr/bin/env python3
"""The metadata service as Debian's kernel and busybox see it: through user networking and through a tap. `metadata.py SCENARIO` is one test."""
import ctypes
import json
import os
import shutil
import socket
import subprocess
import tempfile

import guest
from api import serve
from guest import busybox, cached, need, wait_for_shell

ADDRESS = "169.254.169.254"
DATA = {"latest": {"meta-data": {"instance-id": "i-0123", "network": {"mac": "x"}, "cores": 4, "names": ["a", {"b": "c"}]}, "user-data": "#!/bin/sh\necho hello\n"},
        "large": "0123456789abcdef" * 2500}


def http(vm, request, address=ADDRESS):
    """What comes on a connection of its own: status, head and body."""
    text = request.replace("\n", "\\r\\n")
    answer = vm.run(f"printf '{text}\\r\\n\\r\\n' | nc -w 20 {address} 80", 60)
    head, _, body = answer.partition("\n\n")
    return int(head.split()[1]), head, body


def get(vm, path, *headers, **more):
    return http(vm, "\n".join([f"GET {path} HTTP/1.1", "Connection: close", *headers]), **more)


def token(vm, seconds=60, name="X-metadata-token-ttl-seconds", **more):
    return http(vm, f"PUT /latest/api/token HTTP/1.1\nConnection: close\n{name}: {seconds}", **more)


def version_1(vm):
    assert vm.run(f"wget -q -O - http://{ADDRESS}/latest/meta-data/") == "cores\ninstance-id\nnames\nnetwork/"
    assert vm.run(f"wget -q -O - http://{ADDRESS}/latest/user-data") == "#!/bin/sh\necho hello"
    text = vm.run(f"wget -q -O - --header 'Accept: application/json' http://{ADDRESS}/latest/meta-data")
    assert json.loads(text) == DATA["latest"]["meta-data"], text
    # Several at once, each longer than a window.
    vm.run(f"for i in 1 2 3 4 5 6; do wget -q -O /tmp/large$i http://{ADDRESS}/large & done; wait", 60)
    assert vm.run("cat /tmp/large? | wc -c") == str(6 * len(DATA["large"]))
    assert vm.run("md5sum /tmp/large? | cut -d' ' -f1 | sort -u | wc -l") == "1"
    status, head, body = token(vm)
    assert status == 200 and "X-metadata-token-ttl-seconds: 60" in head and body, head
    assert get(vm, "/latest/nothing")[0::2] == (404, "Resource not found: /latest/nothing.")
    assert get(vm, "/latest/meta-data/cores")[0] == 501


def file_of(folder):
    path = f"{folder}/data.json"
    with open(path, "w") as out:
        json.dump(DATA, out)
    return path


def with_curl(vm):
    """The host's own, on the host's files."""
    if not shutil.which("curl"):
        print("without curl: the host has none")
        return
    vm.run("mkdir -p /host && mount -t virtiofs host /host")
    curl = f"chroot /host {shutil.which('curl')} -sS -i --max-time 20 http://{ADDRESS}"
    answer = vm.run(f"{curl}/latest/user-data {curl.split()[-1]}/large")  # one connection, kept
    assert answer.endswith(DATA["large"]) and answer.count("200 OK") == 2 and "hello" in answer, answer[:500]
    made = vm.run(f"chroot /host {shutil.which('curl')} -sS -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' http://{ADDRESS}/latest/api/token")
    answer = vm.run(f"{curl}/latest/meta-data/instance-id -H 'X-aws-ec2-metadata-token: {made}'")
    assert answer.endswith("i-0123"), answer
    assert "413" in vm.run(f"{curl}/large -d {'x' * 300} -H 'Content-Length: 5000' || true")


def user():
    """By the command line, through user networking, version 1; the back end still works beside it."""
    with tempfile.TemporaryDirectory() as folder:
        with busybox("--net", "user", "--metadata", file_of(folder), "--share", "/:host,ro", "--sandbox", "on") as vm:
            version_1(vm)
            with_curl(vm)
            vm.run("ping -c 1 -W 5 10.0.2.2")
            vm.run(f"ip route add {ADDRESS} dev eth0 && wget -q -O /dev/null http://{ADDRESS}/large")  # now by ARP for itself
            assert "06:44:a9:fe:a9:fe" in vm.run(f"ip neigh show {ADDRESS}")
            vm.type("poweroff\n")
            vm.finish(0)


class Tap:
    """A tap in a network namespace of this test's own, and all that the host's kernel gets from it."""

    def __init__(self, name, address):
        new_net, new_user = 0x40000000, 0x10000000
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(new_net) and libc.unshare(new_net | new_user):
            print("skipped: may not have a network namespace")
            raise SystemExit(guest.SKIP)
        for command in (f"ip tuntap add {name} mode tap", f"ip addr add {address} dev {name}", f"ip link set {name} up"):
            if subprocess.run(command.split(), capture_output=True).returncode:
                print(f"skipped: {command}")
                raise SystemExit(guest.SKIP)
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        self.socket.bind((name, 0))
        self.socket.setblocking(False)

    def frames(self):
        while True:
            try:
                yield self.socket.recv(65536)
            except BlockingIOError:
                return


def configure(api, data):
    card = {"iface_id": "inner", "host_dev_name": "tap0", "guest_mac": "06:00:ac:10:00:02"}
    api.call("PUT", "/boot-source", {"kernel_image_path": guest.kernel, "initrd_path": cached("demo-initrd.gz"), "boot_args": "console=ttyS0 quiet reboot=k panic=1"})
    api.call("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 192})
    api.call("PUT", "/network-interfaces/outer", {"iface_id": "outer", "host_dev_name": "user"})
    api.call("PUT", "/network-interfaces/inner", card)
    api.call("PUT", "/mmds/config", {"version": "V2", "network_interfaces": ["inner"], "ipv4_address": "169.254.170.2"})
    api.call("PUT", "/mmds", data)


def tap():
    """By the API, through one of two cards, version 2; data that changes; a snapshot, which has neither data nor tokens."""
    need(guest.doppel, guest.kernel, guest.cache)
    wire = Tap("tap0", "172.16.0.1/24")
    at = {"address": "169.254.170.2"}
    with tempfile.TemporaryDirectory() as work:
        files = {"snapshot_path": f"{work}/state", "mem_file_path": f"{work}/memory"}
        machine, api = serve(f"{work}/socket", "--metrics-path", f"{work}/metrics", name="first")
        with machine:
            configure(api, DATA)
            api.call("PUT", "/actions", {"action_type": "InstanceStart"})
            wait_for_shell(machine)
            machine.run("ip addr add 172.16.0.2/24 dev eth1 && ip link set eth1 up && ip route add 169.254.170.2 dev eth1")
            machine.run("ping -c 1 -W 5 172.16.0.1")
            assert get(machine, "/latest/user-data", **at)[0] == 401
            _, _, first = token(machine, **at)
            with_token = f"X-metadata-token: {first}"
            assert get(machine, "/latest/user-data", with_token, **at)[0::2] == (200, "#!/bin/sh\necho hello")
            assert get(machine, "/large", with_token, **at)[2] == DATA["large"]
            assert get(machine, "/latest/user-data", with_token + "0", **at)[0] == 401
            api.call("PATCH", "/mmds", {"latest": {"user-data": "changed"}})
            assert get(machine, "/latest/user-data", with_token, **at)[2] == "changed"
            api.call("PUT", "/actions", {"action_type": "FlushMetrics"})
            counted = json.loads(open(f"{work}/metrics").read().splitlines()[-1])["mmds"]
            assert (counted["rx_no_token"], counted["rx_invalid_token"], counted["connections_created"]) == (1, 1, 6), counted
            assert counted["tx_bytes"] > 40000 and counted["rx_accepted_err"] == 0 and counted["connections_destroyed"] == 6, counted
            api.call("PATCH", "/vm", {"state": "Paused"})
            api.call("PUT", "/snapshot/create", files)
            configuration = api.call("GET", "/vm/config")
        machine, api = serve(f"{work}/socket", name="second")
        with machine:
            api.call("PUT", "/snapshot/load", {"snapshot_path": files["snapshot_path"], "mem_backend": {"backend_type": "File", "backend_path": files["mem_file_path"]}})
            assert api.call("GET", "/vm/config")["mmds-config"] == configuration["mmds-config"]
            api.call("PUT", "/mmds", {"latest": {"user-data": "another"}})
            api.call("PATCH", "/vm", {"state": "Resumed"})
            assert get(machine, "/latest/user-data", with_token, **at)[0] == 401, "a token from before the snapshot was loaded is valid"
            assert get(machine, "/latest/user-data", f"X-metadata-token: {token(machine, **at)[2]}", **at)[2] == "another"
            machine.run("ping -c 1 -W 5 172.16.0.1")
            machine.type("poweroff\n")
            machine.finish(0)
        frames = list(wire.frames())
        assert frames, "nothing at all was seen on the tap"
        assert not any(bytes([169, 254, 170, 2]) in frame for frame in frames), "something for the metadata's address left the machine"


if __name__ == "__main__":
    guest.main({"metadata": user, "metadata-tap": tap})
