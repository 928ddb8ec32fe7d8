# Classes, dictionaries, lists, strings, integers.
import sys


class Point:
    def __init__(self, x, y):
        self.x, self.y = x, y

    def moved(self, dx, dy):
        return Point(self.x + dx, self.y + dy)


def sieve(limit):
    flags = [True] * limit
    for i in range(2, int(limit ** 0.5) + 1):
        if flags[i]:
            for j in range(i * i, limit, i):
                flags[j] = False
    return sum(flags[2:])


def words(count):
    seen = {}
    for i in range(count):
        word = "w%d" % (i * 7919 % 1013)
        seen[word] = seen.get(word, 0) + len(word)
    return sum(value for key, value in sorted(seen.items()) if "1" in key)


def walk(count):
    at = Point(0, 0)
    for i in range(count):
        at = at.moved(i & 3, i % 5)
    return at.x * 1000003 + at.y


n = int(sys.argv[1])
print(sieve(n), words(n), walk(n), pow(3, n, 10 ** 40 + 7))
