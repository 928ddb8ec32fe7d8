/*
 * Where stubs live: a memfd mapped twice, once writable and once executable, and beside it their records.
 *
 * Equal stubs are made once: a record is found by a hash of its fields and code bytes, so that arenas fill slowly however often blocks are decoded. Records and
 * stubs are never moved or changed; native_code_flush may drop them all, which is right only when no decoded instruction refers to them.
 * Threading: the vCPU's thread.
 */
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "engine/interp/native_priv.h"

struct record {
    uint32_t next; /* offset + 1 of the next in the bucket */
    uint32_t hash;
    struct native_code code;
};

int native_code_create(struct native_arena *a)
{
    size_t length = a->arena_bytes;
    int error = 0, fd = memfd_create("doppel-stubs", MFD_CLOEXEC);
    if (fd < 0)
        return -errno;
    void *rw = MAP_FAILED, *rx = MAP_FAILED, *records = MAP_FAILED;
    if (ftruncate(fd, (off_t)length))
        goto fail;
    rw = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    rx = mmap(NULL, length, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0);
    records = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (rw == MAP_FAILED || rx == MAP_FAILED || records == MAP_FAILED)
        goto fail;
    error = native_fault_register(rx, length);
    if (error)
        goto fail_registered;
    close(fd);
    a->code_rw = rw;
    a->code_rx = rx;
    a->records = records;
    return 0;

fail:
    error = -errno;
fail_registered:
    if (records != MAP_FAILED)
        munmap(records, length);
    if (rx != MAP_FAILED)
        munmap(rx, length);
    if (rw != MAP_FAILED)
        munmap(rw, length);
    close(fd);
    return error;
}

void native_code_destroy(struct native_arena *a)
{
    if (!a->code_rx)
        return;
    native_fault_unregister(a->code_rx);
    munmap((void *)a->code_rx, a->arena_bytes);
    munmap(a->code_rw, a->arena_bytes);
    munmap(a->records, a->arena_bytes);
}

void native_code_flush(struct native_arena *a)
{
    /* Stubs that the next blocks will want again are worth keeping while there is room. */
    if (a->code_used < a->arena_bytes / 2 && a->records_used < a->arena_bytes / 2)
        return;
    a->code_used = a->records_used = 0;
    a->code_reused = true;
    memset(a->bucket, 0, sizeof(a->bucket));
}

/* Code written through another address than it is executed at needs a serialising instruction (SDM vol. 3, 9.1.3); IRET is the one that no hypervisor
 * intercepts. */
void native_serialize(void)
{
    uint64_t scratch;
    __asm__ volatile("mov %%rsp, %0\n\t"
                     "lea -256(%%rsp), %%rsp\n\t"
                     "mov %%ss, %%eax\n\t"
                     "push %%rax\n\t"
                     "push %0\n\t"
                     "pushfq\n\t"
                     "mov %%cs, %%eax\n\t"
                     "push %%rax\n\t"
                     "lea 1f(%%rip), %%rax\n\t"
                     "push %%rax\n\t"
                     "iretq\n"
                     "1:"
                     : "=&r"(scratch)
                     :
                     : "rax", "memory", "cc");
}

static uint32_t hash_bytes(uint32_t hash, const void *data, size_t length)
{
    const uint8_t *p = data;
    for (size_t n = 0; n < length; n++)
        hash = (hash ^ p[n]) * 0x01000193u;
    return hash;
}

#define FIELDS_START offsetof(struct native_code, fop)
#define FIELDS_BYTES (offsetof(struct native_code, code) - FIELDS_START)

const struct native_code *native_code_intern(struct icpu *c, const struct native_code *wanted, const struct stub_code *stub)
{
    struct native_arena *a = c->native;
    const char *fields = (const char *)wanted + FIELDS_START;
    uint32_t hash = hash_bytes(0x811c9dc5u, fields, FIELDS_BYTES);
    hash = hash_bytes(hash, stub->bytes, stub->length);
    uint32_t *bucket = &a->bucket[hash % STUB_BUCKETS];

    for (uint32_t at = *bucket; at;) {
        const struct record *r = (const struct record *)(a->records + at - 1);
        if (r->hash == hash && r->code.code_bytes == stub->length &&
            !memcmp((const char *)&r->code + FIELDS_START, fields, FIELDS_BYTES - 1) &&
            !memcmp(r->code.code, stub->bytes, stub->length))
            return &r->code;
        at = r->next;
    }

    uint32_t record_bytes = (uint32_t)((sizeof(struct record) + stub->length + 15) & ~15ul);
    uint32_t code_bytes = (stub->length + 15) & ~15u;
    if (a->records_used + record_bytes > a->arena_bytes || a->code_used + code_bytes > a->arena_bytes)
        return NULL;
    struct record *r = (struct record *)(a->records + a->records_used);
    *r = (struct record){.next = *bucket, .hash = hash, .code = *wanted};
    r->code.code_bytes = (uint8_t)stub->length;
    memcpy(r->code.code, stub->bytes, stub->length);
    if (stub->length) {
        memcpy(a->code_rw + a->code_used, stub->bytes, stub->length);
        memset(a->code_rw + a->code_used + stub->length, 0xcc, code_bytes - stub->length);
        r->code.entry = (native_entry *)(uintptr_t)(a->code_rx + a->code_used);
        if (a->code_reused)
            native_serialize();
    }
    *bucket = a->records_used + 1;
    a->records_used += record_bytes;
    a->code_used += code_bytes;
    vcpu_count(&c->v, COUNTER_native_stubs);
    return &r->code;
}
