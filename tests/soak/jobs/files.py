"""files.py SEED: random operations on files (write, append, truncate, rename, link, map, sync, drop the page cache) against a model in memory; everything is compared."""
import hashlib
import mmap
import os
import random
import sys

rng = random.Random(int(sys.argv[1]))
model = {}
number = 0


def compare(name):
    with open(name, "rb") as file:
        got = file.read()
    assert got == bytes(model[name]), f"{name}: {len(got)} bytes differ from the {len(model[name])} that were written"


def write(name):
    data = rng.randbytes(rng.choice([1, 100, 4096, 5000, 70000, 300000]))
    at = rng.randrange(len(model[name]) + 5000) if model[name] else 0
    with open(name, "r+b") as file:
        os.pwrite(file.fileno(), data, at)
        if rng.random() < 0.1:
            os.fsync(file.fileno())
    if at > len(model[name]):
        model[name].extend(bytes(at - len(model[name])))
    model[name][at:at + len(data)] = data


def write_mapped(name):
    if not model[name]:
        return
    with open(name, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        for _ in range(rng.randrange(1, 30)):
            at = rng.randrange(len(model[name]))
            data = rng.randbytes(min(rng.randrange(1, 3000), len(model[name]) - at))
            memory[at:at + len(data)] = data
            model[name][at:at + len(data)] = data


def truncate(name):
    size = rng.randrange(200000)
    os.truncate(name, size)
    del model[name][size:]
    model[name].extend(bytes(size - len(model[name])))


def rename(name):
    global number
    number += 1
    os.rename(name, f"f{number}")
    model[f"f{number}"] = model.pop(name)


def drop(name):
    """Out of the page cache, so that the next reader gets it from the disk."""
    with open(name, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    compare(name)


def remove(name):
    os.unlink(name)
    del model[name]


for step in range(1500):
    if len(model) < 5 or rng.random() < 0.05:
        number += 1
        model[f"f{number}"] = bytearray()
        open(f"f{number}", "wb").close()
    action = rng.choices([write, write_mapped, truncate, rename, drop, compare, remove], [40, 15, 5, 10, 8, 15, 3])[0]
    action(rng.choice(sorted(model)))
os.sync()
for name in sorted(model):
    drop(name)
    print(name, len(model[name]), hashlib.sha256(model[name]).hexdigest())
assert sorted(os.listdir(".")) == sorted(model)
