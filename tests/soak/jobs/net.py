"""net.py SEED HOST:PORT: transfers to and from the server on the host (../server.py), large and small, one after the other and at once; all content is checked."""
import hashlib
import random
import socket
import sys
import threading

rng = random.Random(int(sys.argv[1]))
host, port = sys.argv[2].split(":")


def ask(line):
    peer = socket.create_connection((host, int(port)), timeout=60)
    peer.sendall(line.encode() + b"\n")
    return peer


def exactly(peer, size):
    parts = []
    while size:
        data = peer.recv(min(size, 65536))
        assert data, f"{size} bytes are missing"
        parts.append(data)
        size -= len(data)
    return b"".join(parts)


def download(seed, size):
    with ask(f"get {seed} {size}") as peer:
        data = exactly(peer, size)
        assert not peer.recv(1)
    assert data == random.Random(seed).randbytes(size)
    return hashlib.sha256(data).hexdigest()


def upload(seed, size):
    data = random.Random(seed).randbytes(size)
    with ask(f"put {size}") as peer:
        peer.sendall(data)
        answer = exactly(peer, 64).decode()
    assert answer == hashlib.sha256(data).hexdigest(), "the server got something else"
    return answer


def echo(seed, rounds):
    source = random.Random(seed)
    digest = hashlib.sha256()
    with ask("echo") as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(rounds):
            data = source.randbytes(source.choice([1, 7, 600, 1460, 1461, 9000]))
            peer.sendall(data)
            assert exactly(peer, len(data)) == data
            digest.update(data)
    return digest.hexdigest()


def at_once(work):
    results, troubles = {}, []

    def one(place, function, arguments):
        try:
            results[place] = function(*arguments)
        except (OSError, AssertionError) as trouble:
            troubles.append(trouble)

    threads = [threading.Thread(target=one, args=(place, *item)) for place, item in enumerate(work)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if troubles:
        raise troubles[0]
    return [results[place] for place in sorted(results)]


print(download(rng.randrange(1000), 8 << 20))
print(upload(rng.randrange(1000), 8 << 20))
print(echo(rng.randrange(1000), 300))
for result in at_once([(download, (rng.randrange(1000), 2 << 20)) for _ in range(4)] + [(upload, (rng.randrange(1000), 2 << 20)) for _ in range(4)]
                      + [(echo, (rng.randrange(1000), 100)) for _ in range(2)]):
    print(result)
for _ in range(40):
    print(download(rng.randrange(1000), rng.randrange(3000)))
