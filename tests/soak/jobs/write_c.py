"""write_c.py SEED FUNCTIONS: prints a C program of random but defined arithmetic, loops, switches, tables, structures, strings and calls; it prints its results."""
import random
import sys

rng = random.Random(int(sys.argv[1]))
functions = int(sys.argv[2])
TYPES = ["uint8_t", "uint16_t", "uint32_t", "uint64_t", "int32_t", "int64_t"]


def operand(names):
    return rng.choice(names) if rng.random() < 0.75 else str(rng.randrange(1 << rng.choice([3, 8, 16, 31]))) + "u"


def expression(names, depth=0):
    """Of type uint64_t, without undefined behaviour: unsigned arithmetic, shifts and divisors in range."""
    if depth > 3 or rng.random() < 0.2:
        return f"(uint64_t){operand(names)}"
    a, b = expression(names, depth + 1), expression(names, depth + 1)
    kind = rng.randrange(9)
    if kind < 4:
        return f"({a} {rng.choice('+-*^&|')} {b})"
    if kind == 4:
        return f"({a} {rng.choice(['<<', '>>'])} ({b} & 63))"
    if kind == 5:
        return f"({a} {rng.choice('/%')} (({b} & 0xffff) + 1))"
    if kind == 6:
        return f"({a} {rng.choice(['<', '==', '>='])} {b} ? {expression(names, depth + 1)} : ~{a})"
    if kind == 7:
        return f"(uint64_t)({rng.choice(TYPES)})({a})"
    return f"(uint64_t)__builtin_{rng.choice(['popcountll', 'bswap64'])}({a})"


def statement(names, number, depth=0):
    kind = rng.randrange(7 if depth < 2 else 3)
    pad = "    " * (depth + 1)
    if kind < 2:
        return f"{pad}{rng.choice(names[:4])} += {expression(names)};\n"
    if kind == 2:
        return f"{pad}table[{expression(names)} % 256] ^= {expression(names)};\n"
    body = "".join(statement(names, number, depth + 1) for _ in range(rng.randrange(1, 4)))
    if kind == 3:
        return f"{pad}for (unsigned i{depth} = 0; i{depth} < {rng.randrange(1, 9)}; i{depth}++) {{\n{body}{pad}    a ^= i{depth};\n{pad}}}\n"
    if kind == 4:
        return f"{pad}if ({expression(names)} & {1 << rng.randrange(8)}) {{\n{body}{pad}}}\n"
    if kind == 5:
        cases = "".join(f"{pad}case {i}:\n{statement(names, number, depth + 1)}{pad}    break;\n" for i in range(rng.randrange(3, 9)))
        return f"{pad}switch ({expression(names)} % 9) {{\n{cases}{pad}default:\n{pad}    b++;\n{pad}}}\n"
    call = f"f{rng.randrange(number)}({operand(names)}, {operand(names)}, s)" if number else "a * 3"
    return f"{pad}if (budget && budget--)\n{pad}    c += {call};\n"


print("#include <inttypes.h>\n#include <stdio.h>\n#include <string.h>\n")
print("struct state { uint8_t bytes[40]; uint32_t words[6]; double sum; uint64_t (*next)(uint64_t, uint64_t, struct state *); };")
print("static uint64_t table[256];\nstatic unsigned budget;\n")
for number in range(functions):
    names = ["a", "b", "c", "d", "s->words[2]", "s->bytes[7]", f"table[{rng.randrange(256)}]"]
    keyword = rng.choice(["static", "static", "static __attribute__((noinline))"])
    print(f"{keyword} uint64_t f{number}(uint64_t a, uint64_t b, struct state *s)\n{{\n    uint64_t c = {rng.randrange(1 << 30)}u, d = a - b;")
    print("".join(statement(names, number) for _ in range(rng.randrange(5, 12))), end="")
    print(f"    s->words[a % 6] += (uint32_t)c;\n    s->bytes[b % 40] ^= (uint8_t)d;\n    s->sum = s->sum / 2 + (double)(c % 1000);\n    return a + b * 3 + c * 5 + d * 7;\n}}\n")
print("static uint64_t (*const all[])(uint64_t, uint64_t, struct state *) = {" + ", ".join(f"f{i}" for i in range(functions)) + "};\n")
print(f"""int main(void)
{{
    struct state s = {{0}};
    uint64_t sum = 0;
    for (unsigned round = 0; round < 300; round++) {{
        for (unsigned i = 0; i < {functions}; i++) {{
            budget = 12;
            s.next = all[(i + round) % {functions}];
            sum = sum * 31 + s.next(sum, i, &s);
            memmove(s.bytes + 1, s.bytes, sizeof(s.bytes) - 1);
        }}
        if (round % 100 == 0)
            printf("%u %" PRIx64 " %.17g %u\\n", round, sum, s.sum, s.words[3]);
    }}
    for (unsigned i = 0; i < 256; i++)
        sum = sum * 31 + table[i];
    printf("%" PRIx64 " %.17g\\n", sum, s.sum);
    return 0;
}}""")
