/* codegen SEED: programs that write programs: code written into fresh pages, patched in place, moved, in pages mapped twice, in pages that also hold data,
   by one thread while another runs it. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef uint32_t (*function)(uint32_t);

static uint32_t seed;

static uint32_t next(void)
{
    seed = seed * 69069 + 1;
    return seed >> 16;
}

/* mov eax, edi; then operations on eax; ret. */
static uint8_t *write_code(uint8_t *at, unsigned operations)
{
    *at++ = 0x89, *at++ = 0xf8;
    for (unsigned i = 0; i < operations; i++) {
        uint32_t value = next() << 16 | next();
        static const uint8_t with_eax[] = {0x05, 0x2d, 0x35, 0x0d, 0x25};     /* add, sub, xor, or, and */
        switch (next() % 4) {
        case 0:
            *at++ = 0x69, *at++ = 0xc0;                                       /* imul eax, eax, imm32 */
            value |= 1;
            break;
        case 1:
            *at++ = 0xc1, *at++ = 0xc0, *at++ = (uint8_t)value;               /* rol eax, imm8 */
            continue;
        default:
            *at++ = with_eax[next() % 3];
        }
        memcpy(at, &value, 4);
        at += 4;
    }
    *at++ = 0xc3;
    return at;
}

static uint8_t *pages(size_t count, int file)
{
    void *p = mmap(NULL, count * 4096, PROT_READ | PROT_WRITE | PROT_EXEC, file < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED, file, 0);
    if (p == MAP_FAILED)
        exit(1);
    return p;
}

static uint32_t call(const uint8_t *code, uint32_t value)
{
    function f;
    memcpy(&f, &code, sizeof(f));
    return f(value);
}

/* New code at the same place, again and again; also in the middle of a page and across a page's end. */
static uint32_t rewrite(unsigned rounds)
{
    uint8_t *p = pages(4, -1);
    uint32_t h = 1;
    for (unsigned i = 0; i < rounds; i++) {
        uint8_t *at = p + (i % 3 == 0 ? 0 : i % 3 == 1 ? 4096 - 9 : next() % 12000);
        write_code(at, next() % 30);
        for (unsigned k = 0; k < 5; k++)
            h = call(at, h);
    }
    munmap(p, 4 * 4096);
    return h;
}

/* One immediate is changed between calls, through the same and through another mapping. */
static uint32_t patch(unsigned rounds)
{
    int file = memfd_create("code", 0);
    if (file < 0 || ftruncate(file, 4096))
        exit(1);
    uint8_t *run = pages(1, file), *other = pages(1, file);
    static const uint8_t code[] = {0x89, 0xf8, 0x05, 0, 0, 0, 0, 0x35, 0x11, 0x22, 0x33, 0x44, 0xc3};
    memcpy(run + 100, code, sizeof(code));
    uint32_t h = 1;
    for (unsigned i = 0; i < rounds; i++) {
        uint32_t value = next();
        memcpy((i & 1 ? other : run) + 103, &value, 4);
        h = call(run + 100, h) * 31;
    }
    munmap(run, 4096);
    munmap(other, 4096);
    close(file);
    return h;
}

/* A counter beside the code that counts it. */
static uint32_t data_in_page(unsigned rounds)
{
    uint8_t *p = pages(1, -1);
    static const uint8_t code[] = {0xff, 0x05, 0xfa, 0x07, 0, 0, 0x8b, 0x05, 0xf4, 0x07, 0, 0, 0xc3};   /* inc [rip+..]; mov eax, [rip+..]; ret */
    memcpy(p, code, sizeof(code));
    uint32_t h = 0;
    for (unsigned i = 0; i < rounds; i++)
        h = h * 31 + call(p, 0);
    munmap(p, 4096);
    return h;
}

/* Written without execute permission, then flipped, as careful just-in-time compilers do. */
static uint32_t flip(unsigned rounds)
{
    uint8_t *p = pages(2, -1);
    uint32_t h = 1;
    for (unsigned i = 0; i < rounds; i++) {
        mprotect(p, 8192, PROT_READ | PROT_WRITE);
        write_code(p + 4090 - i % 50, 10);
        mprotect(p, 8192, PROT_READ | PROT_EXEC);
        h = call(p + 4090 - i % 50, h);
    }
    munmap(p, 8192);
    return h;
}

/* One thread changes what another runs: the callee returns one of the values it has been given, never anything else. */
static uint8_t *shared_code;
static atomic_uint errors, stop;

static void *runner(void *unused)
{
    while (!atomic_load(&stop)) {
        uint32_t value = call(shared_code, 0);
        if (value >> 16 != (value & 0xffff))
            atomic_fetch_add(&errors, 1);
    }
    return unused;
}

static uint32_t cross(unsigned rounds)
{
    shared_code = pages(1, -1) + 64;
    static const uint8_t code[] = {0x90, 0x90, 0x90, 0xb8, 0, 0, 0, 0, 0xc3};       /* mov eax, imm32, the immediate aligned */
    memcpy(shared_code, code, sizeof(code));
    pthread_t thread;
    pthread_create(&thread, NULL, runner, NULL);
    for (uint32_t i = 0; i < rounds; i++) {
        uint32_t value = (i & 0xffff) << 16 | (i & 0xffff);
        atomic_store((_Atomic uint32_t *)(shared_code + 4), value);
        if (call(shared_code, 0) != value)
            atomic_fetch_add(&errors, 1);
    }
    atomic_store(&stop, 1);
    pthread_join(thread, NULL);
    return atomic_load(&errors);
}

int main(int argc, char **argv)
{
    seed = argc > 1 ? (uint32_t)atoi(argv[1]) : 0;
    printf("rewrite %08x\n", rewrite(3000));
    printf("patch %08x\n", patch(3000));
    printf("data in page %08x\n", data_in_page(20000));
    printf("flip %08x\n", flip(1500));
    printf("cross %u\n", cross(5000));
    return 0;
}
