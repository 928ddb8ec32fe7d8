/*
 * Small loops of one kind each: `kernels NAME COUNT` prints a checksum that depends on all the work. Written for this project; list, matrix, state and crc are the
 * four kinds of work that embedded-processor benchmarks usually mix. No system calls but for memory and the final line.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t random_state = 88172645463325252u;

static uint64_t next_random(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

static void *allocate(size_t bytes)
{
    void *memory = malloc(bytes);
    if (!memory)
        exit(3);
    return memory;
}

struct node {
    struct node *next;
    uint32_t key, value;
};

/* Merges two sorted lists. */
static struct node *list_merge(struct node *a, struct node *b)
{
    struct node head = {0}, *tail = &head;
    while (a && b) {
        struct node **least = a->key <= b->key ? &a : &b;
        tail = tail->next = *least;
        *least = (*least)->next;
    }
    tail->next = a ? a : b;
    return head.next;
}

static struct node *list_sort(struct node *list, unsigned length)
{
    if (length < 2)
        return list;
    struct node *middle = list;
    for (unsigned i = 1; i < length / 2; i++)
        middle = middle->next;
    struct node *second = middle->next;
    middle->next = NULL;
    return list_merge(list_sort(list, length / 2), list_sort(second, length - length / 2));
}

/* Builds, sorts, reverses and searches lists of 512 nodes. */
static uint64_t run_list(unsigned count)
{
    enum { NODES = 512 };
    struct node *nodes = allocate(NODES * sizeof *nodes);
    uint64_t sum = 0;
    for (unsigned round = 0; round < count; round++) {
        for (unsigned i = 0; i < NODES; i++)
            nodes[i] = (struct node){i + 1 < NODES ? &nodes[i + 1] : NULL, (uint32_t)(next_random() & 0xfff), i};
        struct node *list = list_sort(nodes, NODES), *reversed = NULL;
        while (list) {
            struct node *next = list->next;
            list->next = reversed;
            reversed = list;
            list = next;
        }
        for (unsigned key = 0; key < 16; key++) {
            struct node *at = reversed;
            while (at && at->key != key * 256)
                at = at->next;
            sum += at ? at->value : key;
        }
        sum = sum * 31 + reversed->key;
    }
    return sum;
}

/* 16-bit integer matrices, 48 by 48. */
static uint64_t run_matrix(unsigned count)
{
    enum { SIDE = 48 };
    static int16_t a[SIDE][SIDE], b[SIDE][SIDE];
    static int32_t c[SIDE][SIDE];
    uint64_t sum = 0;
    for (unsigned i = 0; i < SIDE * SIDE; i++) {
        a[i / SIDE][i % SIDE] = (int16_t)next_random();
        b[i / SIDE][i % SIDE] = (int16_t)next_random();
    }
    for (unsigned round = 0; round < count; round++) {
        for (unsigned i = 0; i < SIDE; i++) {
            for (unsigned j = 0; j < SIDE; j++) {
                uint32_t cell = 0;
                for (unsigned k = 0; k < SIDE; k++)
                    cell += (uint32_t)(a[i][k] * b[k][j]);
                c[i][j] = (int32_t)cell;
            }
        }
        a[round % SIDE][round * 7 % SIDE] = (int16_t)(c[round % SIDE][0] >> 3);
        sum = sum * 33 + (uint32_t)c[round * 5 % SIDE][round % SIDE];
    }
    return sum;
}

/* A scanner of numbers as a switch over states. */
static uint64_t run_state(unsigned count)
{
    enum { BYTES = 4096 };
    enum state { START, SIGN, DIGITS, POINT, FRACTION, EXPONENT, POWER, WRONG };
    static const char alphabet[] = "0123456789+-.eE, x,7";
    char *text = allocate(BYTES);
    uint64_t seen[8] = {0}, sum = 0;
    for (unsigned i = 0; i < BYTES; i++)
        text[i] = alphabet[next_random() % (sizeof alphabet - 1)];
    for (unsigned round = 0; round < count; round++) {
        enum state state = START;
        for (unsigned i = 0; i < BYTES; i++) {
            char c = text[i];
            int digit = c >= '0' && c <= '9';
            if (c == ',') {
                seen[state]++;
                state = START;
                continue;
            }
            switch (state) {
            case START: state = digit ? DIGITS : c == '+' || c == '-' ? SIGN : c == '.' ? POINT : c == ' ' ? START : WRONG; break;
            case SIGN: state = digit ? DIGITS : c == '.' ? POINT : WRONG; break;
            case DIGITS: state = digit ? DIGITS : c == '.' ? FRACTION : c == 'e' || c == 'E' ? EXPONENT : WRONG; break;
            case POINT: state = digit ? FRACTION : WRONG; break;
            case FRACTION: state = digit ? FRACTION : c == 'e' || c == 'E' ? EXPONENT : WRONG; break;
            case EXPONENT: state = digit || c == '-' || c == '+' ? POWER : WRONG; break;
            case POWER: state = digit ? POWER : WRONG; break;
            case WRONG: break;
            }
        }
        text[round * 31 % BYTES] = alphabet[round % (sizeof alphabet - 1)];
    }
    for (unsigned i = 0; i < 8; i++)
        sum = sum * 1000003 + seen[i];
    return sum;
}

/* CRC-32 by bits and by table. */
static uint64_t run_crc(unsigned count)
{
    enum { BYTES = 4096 };
    uint32_t table[256], by_table = ~0u, by_bits = ~0u;
    unsigned char *data = allocate(BYTES);
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t value = i;
        for (unsigned bit = 0; bit < 8; bit++)
            value = value & 1 ? value >> 1 ^ 0xedb88320u : value >> 1;
        table[i] = value;
    }
    for (unsigned i = 0; i < BYTES; i++)
        data[i] = (unsigned char)next_random();
    for (unsigned round = 0; round < count; round++) {
        for (unsigned i = 0; i < BYTES; i++)
            by_table = table[(by_table ^ data[i]) & 255] ^ by_table >> 8;
        for (unsigned i = 0; i < BYTES / 8; i++) {
            by_bits ^= data[i];
            for (unsigned bit = 0; bit < 8; bit++)
                by_bits = by_bits >> 1 ^ (0xedb88320u & -(by_bits & 1));
        }
    }
    return (uint64_t)by_table << 32 | by_bits;
}

/* Product of two matrices of doubles, 160 by 160. */
static uint64_t run_matmul(unsigned count)
{
    enum { SIDE = 160 };
    static double a[SIDE][SIDE], b[SIDE][SIDE], c[SIDE][SIDE];
    for (unsigned i = 0; i < SIDE * SIDE; i++) {
        a[i / SIDE][i % SIDE] = (double)(next_random() & 0xffff) / 1024;
        b[i / SIDE][i % SIDE] = (double)(next_random() & 0xffff) / 4096;
    }
    uint64_t sum = 0;
    for (unsigned round = 0; round < count; round++) {
        for (unsigned i = 0; i < SIDE; i++) {
            for (unsigned j = 0; j < SIDE; j++) {
                double cell = 0;
                for (unsigned k = 0; k < SIDE; k++)
                    cell += a[i][k] * b[k][j];
                c[i][j] = cell;
            }
        }
        a[round % SIDE][0] = c[0][round % SIDE] / 65536;
        uint64_t bits;
        memcpy(&bits, &c[round * 7 % SIDE][round % SIDE], sizeof bits);
        sum = sum * 31 + bits;
    }
    return sum;
}

/* Open addressing, 2^19 slots of 16 bytes (8 MiB); inserts random keys and counts repetitions. */
static uint64_t run_hash(unsigned count)
{
    enum { SLOTS = 1 << 19 };
    struct slot {
        uint64_t key, value;
    } *slots = calloc(SLOTS, sizeof *slots);
    if (!slots)
        exit(3);
    uint64_t sum = 0, used = 0;
    for (unsigned i = 0; i < count; i++) {
        uint64_t key = next_random() % 300007 + 1;
        unsigned at = (unsigned)(key * 0x9e3779b97f4a7c15u >> 45);
        while (slots[at].key && slots[at].key != key)
            at = (at + 1) & (SLOTS - 1);
        used += !slots[at].key;
        slots[at].key = key;
        sum += ++slots[at].value * key;
    }
    return sum ^ used << 40;
}

/* One cycle through 2^16 nodes of 64 bytes (4 MiB), each load depending on the one before. */
static uint64_t run_chase(unsigned count)
{
    enum { NODES = 1 << 16 };
    struct {
        uint32_t next, pad[15];
    } *nodes = allocate(NODES * sizeof *nodes);
    uint32_t *order = allocate(NODES * sizeof *order);
    for (uint32_t i = 0; i < NODES; i++)
        order[i] = i;
    for (uint32_t i = NODES - 1; i; i--) {
        uint32_t j = (uint32_t)(next_random() % (i + 1)), swap = order[i];
        order[i] = order[j];
        order[j] = swap;
    }
    for (uint32_t i = 0; i < NODES; i++)
        nodes[order[i]].next = order[(i + 1) % NODES];
    uint32_t at = 0;
    for (unsigned i = 0; i < count; i++)
        at = nodes[at].next;
    return at;
}

static void quicksort(int32_t *first, int32_t *last)
{
    while (last - first > 16) {
        int32_t pivot = first[(last - first) / 2], *i = first, *j = last;
        while (i <= j) {
            while (*i < pivot)
                i++;
            while (*j > pivot)
                j--;
            if (i <= j) {
                int32_t swap = *i;
                *i++ = *j;
                *j-- = swap;
            }
        }
        if (j - first < last - i) {
            quicksort(first, j);
            first = i;
        } else {
            quicksort(i, last);
            last = j;
        }
    }
    for (int32_t *at = first + 1; at <= last; at++) {
        int32_t value = *at, *to = at;
        for (; to > first && to[-1] > value; to--)
            *to = to[-1];
        *to = value;
    }
}

static uint64_t run_qsort(unsigned count)
{
    enum { NUMBERS = 100000 };
    int32_t *numbers = allocate(NUMBERS * sizeof *numbers);
    uint64_t sum = 0;
    for (unsigned round = 0; round < count; round++) {
        for (unsigned i = 0; i < NUMBERS; i++)
            numbers[i] = (int32_t)next_random();
        quicksort(numbers, numbers + NUMBERS - 1);
        for (unsigned i = 0; i < NUMBERS; i += 997)
            sum = sum * 31 + (uint32_t)numbers[i];
    }
    return sum;
}

/* Sums an array of 1 MiB over and over. */
static uint64_t run_sum(unsigned count)
{
    enum { NUMBERS = 1 << 18 };
    uint32_t *numbers = allocate(NUMBERS * sizeof *numbers);
    uint64_t sum = 0;
    for (unsigned i = 0; i < NUMBERS; i++)
        numbers[i] = (uint32_t)next_random();
    for (unsigned round = 0; round < count; round++) {
        numbers[round % NUMBERS] += round;
        for (unsigned i = 0; i < NUMBERS; i++)
            sum += numbers[i];
    }
    return sum;
}

static const struct {
    const char *name;
    uint64_t (*run)(unsigned count);
} kernels[] = {
    {"list", run_list}, {"matrix", run_matrix}, {"state", run_state}, {"crc", run_crc},     {"matmul", run_matmul},
    {"hash", run_hash}, {"chase", run_chase},   {"qsort", run_qsort}, {"sum", run_sum},
};

int main(int argc, char **argv)
{
    for (size_t i = 0; argc == 3 && i < sizeof kernels / sizeof *kernels; i++) {
        if (strcmp(argv[1], kernels[i].name) == 0) {
            printf("%s %016" PRIx64 "\n", argv[1], kernels[i].run((unsigned)atoi(argv[2])));
            return 0;
        }
    }
    fprintf(stderr, "usage: kernels NAME COUNT\n");
    return 2;
}
