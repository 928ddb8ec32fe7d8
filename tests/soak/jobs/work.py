"""work.py SEED: interpreter loops, classes, generators, big numbers, the C libraries behind it, threads, processes, signals, callbacks from C."""
import collections
import ctypes
import decimal
import fractions
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib

rng = random.Random(int(sys.argv[1]))


def sha(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def objects():
    class Node:
        def __init__(self, value):
            self.value, self.left, self.right = value, None, None

        def add(self, value):
            side = "left" if value < self.value else "right"
            child = getattr(self, side)
            child.add(value) if child else setattr(self, side, Node(value))

        def walk(self):
            if self.left:
                yield from self.left.walk()
            yield self.value
            if self.right:
                yield from self.right.walk()

    root = Node(500000)
    for _ in range(6000):
        root.add(rng.randrange(1000000))
    return sha(list(root.walk()))


def texts():
    text = " ".join(f"{rng.choice('abcdef')}{rng.randrange(9999)}={rng.random():.5f}" for _ in range(20000))
    counts = collections.Counter(m.group(1)[0] for m in re.finditer(r"([a-f]\d+)=0\.(\d*7\d*)\b", text))
    data = json.loads(json.dumps([dict(zip("abc", row)) for row in itertools.batched(text.split(), 3)] if hasattr(itertools, "batched")
                                 else [{"k": word} for word in text.split()]))
    return sha(sorted(counts.items())), sha(data), zlib.crc32(zlib.compress(text.encode(), 6))


def numbers():
    decimal.getcontext().prec = 300
    root = decimal.Decimal(rng.randrange(2, 1000)).sqrt().exp()
    total = sum((fractions.Fraction(1, n * n + 1) for n in range(1, 250)), fractions.Fraction(0))
    power = pow(rng.getrandbits(2000), rng.getrandbits(500), rng.getrandbits(2000) | 1)
    floats = 0.0
    for i in range(200000):
        floats = floats * 0.999 + i % 7 / (i % 11 + 1)
    return sha(root), sha(total), sha(power), repr(floats), sha(struct.unpack("<50d", struct.pack("<50d", *(rng.random() for _ in range(50)))))


def threads():
    lock, results = threading.Lock(), collections.Counter()

    def work(n):
        for i in range(4000):
            with lock:
                results[n % 3] += i % 5

    started = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    return sorted(results.items())


def job(n):
    return hashlib.sha512(str(n).encode() * 2000).hexdigest()[:8]


def processes():
    with multiprocessing.Pool(3) as pool:
        parts = pool.map(job, range(100))
    piped = subprocess.run(["sort", "-n"], input="\n".join(str(rng.randrange(10000)) for _ in range(3000)), capture_output=True, text=True, check=True).stdout
    statuses = []
    for status in range(10):
        child = os.fork()
        if not child:
            os._exit(status)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return sha(parts), sha(piped), statuses


def signals():
    """A timer's signals while it computes: the result must not notice."""
    ticks = []
    signal.signal(signal.SIGALRM, lambda number, frame: ticks.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    value = 1
    until = time.monotonic() + 0.2
    while time.monotonic() < until or not ticks:
        value = 1
        for i in range(2000):
            value = (value * 69069 + i) % 4294967296
    signal.setitimer(signal.ITIMER_REAL, 0)
    return value, len(ticks) > 0


def callbacks():
    libc = ctypes.CDLL(None)
    values = (ctypes.c_int * 3000)(*(rng.randrange(1 << 30) for _ in range(3000)))
    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_int))
    libc.qsort(values, len(values), 4, kind(lambda a, b: (a[0] > b[0]) - (a[0] < b[0])))
    return sha(list(values))


for function in (objects, texts, numbers, threads, processes, signals, callbacks):
    print(function.__name__, function(), flush=True)
