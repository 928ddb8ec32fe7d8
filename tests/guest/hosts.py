"""Two hosts on one network, as namespaces of this one."""
import contextlib
import ctypes
import os
import subprocess

SKIP = 77


def host(*words, need=True):
    done = subprocess.run([word for text in words for word in text.split()], capture_output=True, text=True)
    if need and done.returncode:
        print(f"skipped: {words}: {done.stderr.strip()}")
        raise SystemExit(SKIP)


@contextlib.contextmanager
def two_hosts():
    """Two network namespaces with a bridge each and a wire between them, and in each a tap0 for the guest; this process is in the first, at 172.16.0.1."""
    names = [f"doppel-{os.getpid()}-{n}" for n in range(2)]
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        for name in names:
            host("ip netns add", name)
        host("ip -n", names[0], "link add wire type veth peer name wire netns", names[1])
        for name in names:
            host("ip -n", name, "link add bridge type bridge")
            host("ip -n", name, "tuntap add tap0 mode tap")
            for port in "wire", "tap0":
                host("ip -n", name, f"link set {port} master bridge up")
            host("ip -n", name, "link set bridge up")
        host("ip -n", names[0], "addr add 172.16.0.1/24 dev bridge")
        with open(f"/run/netns/{names[0]}") as place:
            if libc.setns(place.fileno(), 0):
                print("skipped: cannot enter a network namespace")
                raise SystemExit(SKIP)
        yield names
    finally:
        for name in names:
            host("ip netns del", name, need=False)
