/*
 * qcow2 images against a model in memory and against qemu-img: random requests side by side, hosts that stop at any moment, overlays, images that lie.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "block/block_priv.h"
#include "block/qcow2.h"
#include "util/log.h"

#define SECTOR 512u
#define SECTORS 12289u /* 6 MiB and a sector: the last cluster is not whole */
#define AT_ONCE 12u

/* ---- a host's disk that forgets what was not flushed ---- */

struct event {
    STAILQ_ENTRY(event) link;
    uint64_t offset, bytes;
    bool zero;
    uint8_t data[];
};

struct cache {
    struct block_io io; /* first */
    struct loop_event *wake;
    struct block_task_list queue;
    STAILQ_HEAD(, event) unflushed;
    int disk; /* what is on it for sure */
    uint64_t *random;
    unsigned done, stop_after; /* tasks */
};

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state * 0x2545f4914f6cdd1dull;
}

static void cache_apply(int fd, const struct event *event, uint64_t bytes)
{
    if (event->zero)
        assert_int_equal(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)event->offset, (off_t)bytes), 0);
    else
        assert_int_equal(pwrite(fd, event->data, bytes, (off_t)event->offset), bytes);
}

static void cache_note(struct cache *cache, const struct block_task *task)
{
    bool zero = task->kind == TASK_FALLOCATE;
    struct event *event = malloc(sizeof(*event) + (zero ? 0 : task->length_bytes));
    uint8_t *at = event->data;

    *event = (struct event){.offset = task->offset_bytes, .bytes = task->length_bytes, .zero = zero};
    for (unsigned i = 0; !zero && i < task->iov_count; i++) {
        memcpy(at, task->iov[i].iov_base, task->iov[i].iov_len);
        at += task->iov[i].iov_len;
    }
    if (!zero)
        event->bytes = (uint64_t)(at - event->data);
    STAILQ_INSERT_TAIL(&cache->unflushed, event, link);
}

/* Everything, or, at the end, what the disk happened to write: each thing, nothing of it or its first sectors. */
static void cache_write_back(struct cache *cache, bool all)
{
    struct event *event;

    while ((event = STAILQ_FIRST(&cache->unflushed))) {
        uint64_t dice = next_random(cache->random) % 3, sectors = event->bytes / SECTOR;

        if (all || dice == 0)
            cache_apply(cache->disk, event, event->bytes);
        else if (dice == 1 && sectors > 1)
            cache_apply(cache->disk, event, (next_random(cache->random) % sectors) * SECTOR);
        STAILQ_REMOVE_HEAD(&cache->unflushed, link);
        free(event);
    }
}

static void cache_run(void *ctx)
{
    struct cache *cache = ctx;
    unsigned count = 0;
    struct block_task *task;

    TAILQ_FOREACH(task, &cache->queue, link)
        count++;
    if (!count)
        return;
    task = TAILQ_FIRST(&cache->queue); /* in any order */
    for (uint64_t skip = next_random(cache->random) % count; skip; skip--)
        task = TAILQ_NEXT(task, link);
    TAILQ_REMOVE(&cache->queue, task, link);
    switch (task->kind) {
    case TASK_READ:
        task->result = preadv(task->fd, task->iov, (int)task->iov_count, (off_t)task->offset_bytes);
        break;
    case TASK_WRITE:
        task->result = pwritev(task->fd, task->iov, (int)task->iov_count, (off_t)task->offset_bytes);
        cache_note(cache, task);
        break;
    case TASK_SYNC:
        task->result = 0;
        cache_write_back(cache, true);
        break;
    case TASK_FALLOCATE:
        task->result = fallocate(task->fd, task->mode, (off_t)task->offset_bytes, (off_t)task->length_bytes);
        cache_note(cache, task);
        break;
    }
    cache->done++;
    if (!TAILQ_EMPTY(&cache->queue))
        loop_event_raise(cache->wake);
    task->done(task, task->result);
}

static void cache_submit(struct block_io *io, struct block_task *task)
{
    struct cache *cache = (struct cache *)io;

    TAILQ_INSERT_TAIL(&cache->queue, task, link);
    loop_event_raise(cache->wake);
}

static void cache_destroy(struct block_io *io)
{
    (void)io;
}

static const struct block_io_ops cache_ops = {.name = "cache", .submit = cache_submit, .destroy = cache_destroy};

/* ---- the model ---- */

struct fixture {
    char dir[64], path[128];
    struct loop *loop;
    struct block *block;
    struct cache cache;
    uint64_t random, version, flush; /* `flush`: the last one that ended, as a version */
    uint64_t now[SECTORS];     /* what a sector holds; 0: zeroes */
    uint64_t flushed[SECTORS]; /* what it held at the last flush */
    uint64_t touched[SECTORS], settled[SECTORS]; /* when a change of it began and ended last, as versions */
    bool loose[SECTORS];       /* something since the last flush */
    bool any[SECTORS];         /* discarded: anything it ever held may be there */
};

struct job {
    struct block_request request; /* first */
    struct fixture *f;
    bool active, done;
    int result;
    struct iovec iov[3];
    uint8_t *data;
    uint64_t first, count, version;
};

static void fill(uint8_t *data, uint64_t first, uint64_t count, uint64_t version)
{
    for (uint64_t i = 0; i < count; i++)
        for (unsigned word = 0; word < SECTOR / 8; word++)
            ((uint64_t *)data)[i * (SECTOR / 8) + word] = version ? version << 20 | (first + i) : 0;
}

static bool sector_is(const uint8_t *data, uint64_t sector, uint64_t version)
{
    uint8_t want[SECTOR] __attribute__((aligned(8)));

    fill(want, sector, 1, version);
    return !memcmp(data, want, SECTOR);
}

static void shell(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void shell(const char *format, ...)
{
    char command[2048];
    va_list list;

    va_start(list, format);
    vsnprintf(command, sizeof(command), format, list);
    va_end(list);
    if (system(command))
        fail_msg("%s", command);
}

/* qemu-img check: 0 sound, 3 with leaks. */
static int check_image(const char *path)
{
    char command[512];
    int status;

    snprintf(command, sizeof(command), "qemu-img check -f qcow2 %s >%s.check 2>&1", path, path);
    status = system(command);
    assert_true(WIFEXITED(status));
    if (WEXITSTATUS(status) != 0 && WEXITSTATUS(status) != 3)
        shell("cat %s.check >&2", path);
    return WEXITSTATUS(status);
}

static void job_done(struct block_request *request, int result)
{
    struct job *job = (struct job *)request;

    assert_false(job->done);
    job->done = true;
    job->result = result;
}

static bool overlaps(const struct job *jobs, uint64_t first, uint64_t count)
{
    for (unsigned i = 0; i < AT_ONCE; i++)
        if (jobs[i].active && jobs[i].first < first + count && first < jobs[i].first + jobs[i].count)
            return true;
    return false;
}

/* Cuts the data into up to three vectors. */
static void cut(struct job *job, uint64_t bytes)
{
    uint64_t at = 0, part;
    unsigned n = 0;

    for (; n < 2 && bytes - at > SECTOR; n++, at += part) {
        part = next_random(&job->f->random) % (bytes - at - 1) + 1;
        job->iov[n] = (struct iovec){job->data + at, part};
    }
    job->iov[n++] = (struct iovec){job->data + at, bytes - at};
    job->request.iov = job->iov;
    job->request.iov_count = n;
}

static void start(struct fixture *f, struct job *jobs, struct job *job)
{
    static const enum block_op kinds[] = {BLOCK_WRITE, BLOCK_WRITE, BLOCK_WRITE, BLOCK_READ, BLOCK_READ, BLOCK_DISCARD, BLOCK_WRITE_ZEROES, BLOCK_FLUSH};
    enum block_op kind = kinds[next_random(&f->random) % 8];
    uint64_t most = next_random(&f->random) % 16 ? 64 : 2000, count = next_random(&f->random) % most + 1, first = next_random(&f->random) % SECTORS;

    if (next_random(&f->random) % 4 == 0)
        first = first / 128 * 128;
    if (count > SECTORS - first)
        count = SECTORS - first;
    if (kind == BLOCK_FLUSH ? next_random(&f->random) % 4 : overlaps(jobs, first, count))
        return;
    *job = (struct job){.f = f, .active = true, .first = first, .count = kind == BLOCK_FLUSH ? 0 : count, .version = ++f->version};
    job->request = (struct block_request){.op = kind, .offset_bytes = first * SECTOR, .length_bytes = count * SECTOR, .done = job_done,
                                          .may_unmap = next_random(&f->random) % 2};
    if (kind == BLOCK_FLUSH) { /* what is written now will be there */
        job->request.offset_bytes = job->request.length_bytes = 0;
        job->data = malloc(sizeof(f->now));
        memcpy(job->data, f->now, sizeof(f->now));
    } else if (kind == BLOCK_READ || kind == BLOCK_WRITE) {
        job->data = malloc(count * SECTOR);
        fill(job->data, first, count, kind == BLOCK_WRITE ? job->version : 0xabc);
        cut(job, count * SECTOR);
    }
    for (uint64_t i = first; kind != BLOCK_READ && kind != BLOCK_FLUSH && i < first + count; i++) {
        f->loose[i] = true;
        f->touched[i] = job->version;
        f->any[i] = kind == BLOCK_DISCARD;
    }
    block_submit(f->block, &job->request);
    assert_false(job->done);
}

/* A discarded sector is what reading says, from then on. */
static void settle_discarded(struct fixture *f, uint64_t first, uint64_t count)
{
    uint8_t *data = malloc(count * SECTOR);
    struct iovec iov = {data, count * SECTOR};
    struct job job = {.request = {.op = BLOCK_READ, .offset_bytes = first * SECTOR, .length_bytes = count * SECTOR, .iov = &iov, .iov_count = 1, .done = job_done}};

    block_submit(f->block, &job.request);
    while (!job.done)
        assert_true(loop_run_once(f->loop, 1000) >= 0);
    assert_int_equal(job.result, 0);
    for (uint64_t i = 0; i < count; i++) {
        bool zero = sector_is(data + i * SECTOR, first + i, 0);

        assert_true(zero || sector_is(data + i * SECTOR, first + i, f->now[first + i]));
        if (zero)
            f->now[first + i] = 0;
    }
    free(data);
}

static void finish(struct job *job)
{
    struct fixture *f = job->f;

    assert_int_equal(job->result, 0);
    switch (job->request.op) {
    case BLOCK_READ:
        for (uint64_t i = 0; i < job->count; i++)
            if (!sector_is(job->data + i * SECTOR, job->first + i, f->now[job->first + i]))
                fail_msg("sector %llu is not what was written", (unsigned long long)(job->first + i));
        break;
    case BLOCK_WRITE:
    case BLOCK_WRITE_ZEROES:
        for (uint64_t i = job->first; i < job->first + job->count; i++)
            f->now[i] = job->request.op == BLOCK_WRITE ? job->version : 0;
        break;
    case BLOCK_DISCARD:
        settle_discarded(f, job->first, job->count);
        break;
    case BLOCK_FLUSH:
        for (uint64_t i = 0; job->version > f->flush && i < SECTORS; i++) { /* not when a later one has ended first */
            f->flushed[i] = ((uint64_t *)job->data)[i];
            f->loose[i] = f->touched[i] > f->settled[i] || f->settled[i] > job->version;
        }
        f->flush = job->version > f->flush ? job->version : f->flush;
        break;
    }
    for (uint64_t i = job->first; job->request.op != BLOCK_READ && i < job->first + job->count; i++)
        f->settled[i] = ++f->version;
    free(job->data);
    job->data = NULL;
    job->active = false;
}

/* So many requests, several at a time. False: the host stopped meanwhile. */
static bool work(struct fixture *f, unsigned count)
{
    struct job jobs[AT_ONCE] = {0};
    bool some = true;

    while (count || some) {
        some = false;
        for (unsigned i = 0; i < AT_ONCE; i++) {
            if (!jobs[i].active && count) {
                start(f, jobs, &jobs[i]);
                count--;
            }
        }
        if (f->cache.stop_after && f->cache.done >= f->cache.stop_after)
            return false;
        assert_true(loop_run_once(f->loop, block_in_flight(f->block) ? 5000 : 0) >= 0);
        for (unsigned i = 0; i < AT_ONCE; i++) {
            if (jobs[i].active && jobs[i].done)
                finish(&jobs[i]);
            some = some || jobs[i].active;
        }
    }
    return true;
}

static void read_back(struct fixture *f, bool after_stop)
{
    uint8_t *data = malloc((size_t)SECTORS * SECTOR);
    char raw[192];
    int fd;

    snprintf(raw, sizeof(raw), "%s.raw", f->path);
    shell("qemu-img convert -f qcow2 -O raw %s %s", f->path, raw);
    fd = open(raw, O_RDONLY);
    assert_int_equal(pread(fd, data, (size_t)SECTORS * SECTOR, 0), SECTORS * SECTOR);
    close(fd);
    for (uint64_t i = 0; i < SECTORS; i++) {
        uint64_t version = ((uint64_t *)(data + i * SECTOR))[0] >> 20;

        assert_true(sector_is(data + i * SECTOR, i, version)); /* something that was written here, whole */
        if (after_stop ? version == f->flushed[i] || f->loose[i] || f->any[i] : version == f->now[i])
            continue;
        fail_msg("sector %llu is of write %llu, not of %llu (%llu)", (unsigned long long)i, (unsigned long long)version, (unsigned long long)f->flushed[i],
                 (unsigned long long)f->now[i]);
    }
    free(data);
}

static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof(*f));

    f->random = 88172645463325252ull;
    snprintf(f->dir, sizeof(f->dir), "/tmp/doppel-qcow2-XXXXXX");
    assert_non_null(mkdtemp(f->dir));
    snprintf(f->path, sizeof(f->path), "%s/disk.qcow2", f->dir);
    assert_int_equal(loop_create(&f->loop, NULL), 0);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;

    block_close(f->block);
    loop_destroy(f->loop);
    shell("rm -rf %s", f->dir);
    free(f);
    return 0;
}

static void open_image(struct fixture *f, const char *io)
{
    const struct block_config config = {.path = f->path, .format = "qcow2", .io = io};
    struct error err;

    if (block_open(&f->block, &config, f->loop, &err) < 0)
        fail_msg("%s", err.text);
    assert_int_equal(block_size_bytes(f->block), SECTORS * SECTOR);
}

static void close_image(struct fixture *f)
{
    block_close(f->block);
    f->block = NULL;
}

/* What is beneath: a chain of `depth` compressed images over a raw one that is shorter than the disk. */
static void make_chain(struct fixture *f, const char *options, const char *compression)
{
    uint64_t sectors = compression ? 9001 : SECTORS;
    uint8_t *data = malloc(sectors * SECTOR);
    char name[192];
    int fd;

    memset(f->now, 0, sizeof(f->now));
    if (!compression) {
        shell("qemu-img create -q -f qcow2 -o %s %s %llu", options, f->path, (unsigned long long)SECTORS * SECTOR);
        free(data);
        return;
    }
    f->version = 1;
    fill(data, 0, sectors, 1);
    for (uint64_t i = 3000; i < 5000; i++)
        fill(data + i * SECTOR, i, 1, 0);
    for (uint64_t i = 0; i < sectors; i++)
        f->now[i] = i >= 3000 && i < 5000 ? 0 : 1;
    snprintf(name, sizeof(name), "%s/base.raw", f->dir);
    fd = open(name, O_RDWR | O_CREAT, 0600);
    assert_int_equal(pwrite(fd, data, sectors * SECTOR, 0), sectors * SECTOR);
    close(fd);
    shell("cd %s && qemu-img convert -q -c -f raw -O qcow2 -o compression_type=%s base.raw packed.qcow2", f->dir, compression);
    shell("cd %s && qemu-img create -q -f qcow2 -o %s -F qcow2 -b packed.qcow2 disk.qcow2 %llu", f->dir, options, (unsigned long long)SECTORS * SECTOR);
    memcpy(f->flushed, f->now, sizeof(f->now));
    free(data);
}

/* ---- tests ---- */

static void test_random(void **state)
{
    static const struct {
        const char *options, *compression, *io;
    } cases[] = {
        {"cluster_size=64k", NULL, "threads"},
        {"cluster_size=64k", "zlib", NULL},
        {"cluster_size=4k,refcount_bits=1", "zstd", "threads"},
        {"cluster_size=512", "zlib", NULL},
        {"cluster_size=2M,refcount_bits=64", "zlib", "threads"},
        {"compat=0.10", "zlib", "threads"},
        {"compat=0.10", NULL, NULL},
        {"cluster_size=64k,preallocation=metadata", NULL, "threads"},
    };
    struct fixture *f = *state;

    for (unsigned i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        make_chain(f, cases[i].options, cases[i].compression);
        for (unsigned round = 0; round < 2; round++) {
            open_image(f, cases[i].io);
            assert_true(work(f, 300));
            close_image(f);
            assert_int_equal(check_image(f->path), 0);
            read_back(f, false);
        }
    }
}

/* The host stops after so many of its tasks; what was not flushed is there or is not. */
static void stop_once(struct fixture *f, unsigned n, const char *options, const char *compression)
{
    const struct block_config config = {.path = f->path, .format = "qcow2"};
    char durable[192];
    struct cache *cache = &f->cache;
    struct block_below below = {.io = &cache->io};
    struct error err;
    pid_t child;
    int status;

    snprintf(durable, sizeof(durable), "%s.durable", f->path);
    make_chain(f, options, compression);
    memset(f->flushed, 0, sizeof(f->flushed));
    memcpy(f->flushed, f->now, sizeof(f->now));
    shell("cp %s %s", f->path, durable);
    /* What is in flight at the end is never cleaned up: that is a process's own end. */
    child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        f->random += n * 0x9e3779b97f4a7c15ull;
        *cache = (struct cache){.io = {.ops = &cache_ops, .users = 1}, .random = &f->random, .stop_after = 5 + n * 7};
        TAILQ_INIT(&cache->queue);
        STAILQ_INIT(&cache->unflushed);
        cache->wake = loop_event_create(f->loop, cache_run, cache);
        cache->disk = open(durable, O_RDWR | O_CLOEXEC);
        if (block_open_beneath(&f->block, &config, &below, f->loop, &err) < 0)
            fail_msg("%s", err.text);
        while (work(f, 200))
            ;
        cache_write_back(cache, false);
        close(cache->disk);
        for (const struct qcow2 *image = f->block->private; image; image = image->backing ? image->backing->private : NULL) { /* qemu-img wants its own locks */
            if (image->block->ops != &block_qcow2_ops)
                break;
            close(block_raw_fd(image->file));
        }
        shell("mv %s %s", durable, f->path);
        if (check_image(f->path) != 0 && check_image(f->path) != 3)
            fail_msg("stopped after %u tasks: the image is damaged", cache->stop_after);
        read_back(f, true);
        _exit(0);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void test_stops(void **state)
{
    struct fixture *f = *state;

    for (unsigned n = 0; n < 12; n++)
        stop_once(f, n, n % 3 == 0 ? "cluster_size=4k" : n % 3 == 1 ? "cluster_size=64k" : "cluster_size=512", n % 2 ? "zlib" : NULL);
}

/* ---- overlays ---- */

static int make_overlay(const struct fixture *f, const char *name, uint64_t bytes, const char *backing, const char *format, char path[192])
{
    struct error err;
    int fd;

    snprintf(path, 192, "%s/%s", f->dir, name);
    fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    assert_true(fd >= 0);
    assert_int_equal(block_image_format(fd, path, bytes, backing, format, &err), 0);
    return fd;
}

/* A chain that grows under a disk that is in use; each file stays as it was at its moment. */
static void test_overlays(void **state)
{
    struct fixture *f = *state;
    char path[192], before[192], copy[200];
    struct block_config config = {.path = f->path, .format = "raw", .io = "threads"};
    struct block *other, *below;
    struct error err;

    shell("truncate -s %llu %s", (unsigned long long)SECTORS * SECTOR, f->path);
    assert_int_equal(block_open(&f->block, &config, f->loop, NULL), 0);
    snprintf(path, sizeof(path), "%s", f->path);
    for (unsigned i = 0; i < 4; i++) {
        char name[32];

        assert_true(work(f, 150));
        snprintf(before, sizeof(before), "%s", path);
        snprintf(name, sizeof(name), "over%u.qcow2", i);
        below = f->block;
        if (block_overlay(&f->block, below, path, make_overlay(f, name, SECTORS * SECTOR, before, i ? "qcow2" : "raw", path), &err))
            fail_msg("%s", err.text);
        snprintf(copy, sizeof(copy), "%s.then", before);
        shell("cp %s %s", before, copy);
        /* Others may read what is frozen, and write no more than we. */
        config = (struct block_config){.path = before, .format = i ? "qcow2" : "raw", .readonly = true};
        assert_int_equal(block_open(&other, &config, f->loop, NULL), 0);
        block_close(other);
        config.readonly = false;
        assert_int_equal(block_open(&other, &config, f->loop, &err), -EBUSY);
        assert_true(work(f, 150));
        shell("cmp %s %s", before, copy);
    }
    /* One that is of no use leaves all as it is, and so does one that is taken away. */
    assert_int_equal(block_overlay(&other, f->block, path, make_overlay(f, "small.qcow2", SECTOR, path, "qcow2", before), &err), -EINVAL);
    assert_true(work(f, 50));
    assert_int_equal(block_overlay(&other, f->block, before, make_overlay(f, "undone.qcow2", SECTORS * SECTOR, path, "qcow2", before), &err), 0);
    assert_ptr_equal(block_overlay_undo(other), f->block);
    assert_true(work(f, 150));
    close_image(f);
    snprintf(f->path, sizeof(f->path), "%.120s", path);
    assert_int_equal(check_image(f->path), 0);
    read_back(f, false);
    open_image(f, "threads");
    assert_true(work(f, 50));
    close_image(f);
    read_back(f, false);
}

/* ---- images that are refused ---- */

static void expect_refusal(struct fixture *f, const struct block_config *config, int code, const char *words)
{
    struct block *block;
    struct error err;
    int ret = block_open(&block, config, f->loop, &err);

    if (ret == 0 || ret != code || !strstr(err.text, words))
        fail_msg("%d %s; not %d with \"%s\"", ret, ret ? err.text : "", code, words);
}

static void patch(const struct fixture *f, uint64_t offset, uint64_t value, unsigned bytes)
{
    uint64_t big = htobe64(value << (64 - 8 * bytes));
    int fd = open(f->path, O_WRONLY);

    assert_int_equal(pwrite(fd, &big, bytes, (off_t)offset), bytes);
    close(fd);
}

static void test_fields(void **state)
{
    static const struct {
        unsigned offset, bytes;
        uint64_t value;
        int code;
        const char *words;
    } cases[] = {
        {0, 4, 0x51464900, -EINVAL, "is not a qcow2 image"},
        {4, 4, 4, -EINVAL, "version (4)"},
        {20, 4, 8, -EINVAL, "cluster bits (8)"},
        {20, 4, 31, -EINVAL, "cluster bits (31)"},
        {24, 8, 0, -EINVAL, "size (0)"},
        {24, 8, 1ull << 62, -EINVAL, "L1 table's entries"},
        {24, 8, ~0ull, -EINVAL, "size"},
        {32, 4, 1, -ENOTSUP, "encrypted"},
        {36, 4, 0xffffffff, -EINVAL, "L1 table's entries"},
        {40, 8, 0, -EINVAL, "L1 table"},
        {40, 8, 512, -EINVAL, "L1 table (512)"},
        {40, 8, 1ull << 40, -EINVAL, "was cut"},
        {40, 8, 0x10000, -EINVAL, "lies on another table"},
        {48, 8, 0, -EINVAL, "refcount table"},
        {48, 8, 1ull << 50, -EINVAL, "was cut"},
        {56, 4, 0, -EINVAL, "refcount table's clusters"},
        {56, 4, 0xffffffff, -EINVAL, "refcount table"},
        {60, 4, 1, -EINVAL, "snapshot table"},
        {72, 8, 4, -ENOTSUP, "data file"},
        {72, 8, 16, -ENOTSUP, "extended L2"},
        {72, 8, 1ull << 40, -ENOTSUP, "bit 40"},
        {72, 8, 1, -EINVAL, "was not closed"},
        {72, 8, 2, -EINVAL, "marked as damaged"},
        {96, 4, 7, -EINVAL, "refcount order"},
        {100, 4, 96, -EINVAL, "header length"},
        {104, 1, 1, -EINVAL, "compression type"},
        {8, 8, 1ull << 20, 0, NULL},
        {116, 4, 0x7fffffff, -EINVAL, "header extension"},
        {0x10000, 8, 1ull << 40, -EFBIG, "refcount block"},
        {0x10000, 8, 0x10000, -EINVAL, "lies on another table"},
        {0x30000, 8, 0x20000, -EINVAL, "lies on another table"},
    };
    struct fixture *f = *state;
    const struct block_config config = {.path = f->path, .format = "qcow2"};

    for (unsigned i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        shell("qemu-img create -q -f qcow2 %s 6M", f->path);
        patch(f, cases[i].offset, cases[i].value, cases[i].bytes);
        if (cases[i].code) {
            expect_refusal(f, &config, cases[i].code, cases[i].words);
            continue;
        }
        assert_int_equal(block_open(&f->block, &config, f->loop, NULL), 0);
        close_image(f);
    }
    shell("qemu-img create -q -f qcow2 %s 6M && qemu-img snapshot -c one %s", f->path, f->path);
    expect_refusal(f, &config, -ENOTSUP, "has 1 snapshots inside it");
    shell("truncate -s 300 %s", f->path);
    expect_refusal(f, &config, -EINVAL, "was cut");
}

static void test_backing(void **state)
{
    struct fixture *f = *state;
    struct block_config config = {.path = f->path, .format = "qcow2"};

    shell("cd %s && mkdir near && truncate -s 1M base.raw near/base.raw && qemu-img create -q -f qcow2 -F raw -b near/base.raw disk.qcow2", f->dir);
    assert_int_equal(block_open(&f->block, &config, f->loop, NULL), 0);
    close_image(f);
    config.backing = BLOCK_BACKING_NONE;
    expect_refusal(f, &config, -EPERM, "is not opened");
    config.backing = BLOCK_BACKING_NEAR;
    config.format = "auto";
    expect_refusal(f, &config, -EPERM, "is not opened");
    config.format = "qcow2";
    shell("cd %s && qemu-img rebase -q -u -F raw -b /etc/hostname disk.qcow2", f->dir);
    expect_refusal(f, &config, -EPERM, "add backing=any");
    shell("cd %s && ln -s /etc near/etc && qemu-img rebase -q -u -F raw -b near/etc/hostname disk.qcow2", f->dir);
    expect_refusal(f, &config, -EPERM, "add backing=any");
    shell("cd %s && qemu-img rebase -q -u -F vmdk -b base.raw disk.qcow2", f->dir);
    expect_refusal(f, &config, -ENOTSUP, "\"vmdk\"");
    shell("cd %s && qemu-img rebase -q -u -F raw -b nothing disk.qcow2", f->dir);
    expect_refusal(f, &config, -ENOENT, "no such file");
    shell("cd %s && qemu-img rebase -q -u -F qcow2 -b disk.qcow2 disk.qcow2", f->dir);
    expect_refusal(f, &config, -ELOOP, "is itself");
    shell("cd %s && qemu-img create -q -u -f qcow2 -F qcow2 -b disk.qcow2 b.qcow2 1M && qemu-img rebase -q -u -F qcow2 -b b.qcow2 disk.qcow2", f->dir);
    expect_refusal(f, &config, -ELOOP, "above it");
    shell("cd %s && qemu-img create -q -f qcow2 0.qcow2 1M && for i in $(seq 70); do qemu-img create -q -u -f qcow2 -F qcow2 -b $((i-1)).qcow2 $i.qcow2 1M; done && mv 70.qcow2 disk.qcow2",
          f->dir);
    expect_refusal(f, &config, -ELOOP, "more than");
}

/* What a guest writes into a raw disk decides nothing. */
static void test_formats(void **state)
{
    struct fixture *f = *state;
    struct block_config config = {.path = f->path};
    char other[192];

    snprintf(other, sizeof(other), "%s/disk.img", f->dir);
    shell("qemu-img create -q -f qcow2 %s 6M && cp %s %s && truncate -s %%512 %s", f->path, f->path, other, other);
    assert_int_equal(block_open(&f->block, &config, f->loop, NULL), 0);
    assert_string_equal(block_format(f->block), "qcow2");
    close_image(f);
    config.path = other;
    log_set_level(LOG_OFF);
    assert_int_equal(block_open(&f->block, &config, f->loop, NULL), 0);
    log_set_level(LOG_ERROR);
    assert_string_equal(block_format(f->block), "raw");
    close_image(f);
    config.format = "auto";
    assert_int_equal(block_open(&f->block, &config, f->loop, NULL), 0);
    assert_string_equal(block_format(f->block), "qcow2");
    close_image(f);
    shell("truncate -s 0 %s && truncate -s 1M %s", other, other);
    assert_int_equal(block_open(&f->block, &config, f->loop, NULL), 0);
    assert_string_equal(block_format(f->block), "raw");
    close_image(f);
}

/* A table that is wrong is found when it is used; nothing is written after that, and the image says so. */
static void test_damage(void **state)
{
    struct fixture *f = *state;
    uint8_t sector[SECTOR] = {1};
    struct iovec iov = {sector, SECTOR};
    struct job job = {.request = {.op = BLOCK_WRITE, .length_bytes = SECTOR, .iov = &iov, .iov_count = 1, .done = job_done}};
    struct block_config config = {.path = f->path, .format = "qcow2"};

    shell("qemu-img create -q -f qcow2 %s %llu && qemu-io -c 'write 0 1M' %s >/dev/null", f->path, (unsigned long long)SECTORS * SECTOR, f->path);
    patch(f, 0x40000, 0x8000000000010000ull, 8); /* the first cluster's data is the refcount table */
    open_image(f, "threads");
    log_set_level(LOG_OFF);
    for (unsigned i = 0; i < 2; i++) {
        job.done = false;
        block_submit(f->block, &job.request);
        while (!job.done)
            assert_true(loop_run_once(f->loop, 1000) >= 0);
        assert_int_equal(job.result, -EIO);
        job.request.op = BLOCK_FLUSH;
    }
    close_image(f);
    log_set_level(LOG_ERROR);
    expect_refusal(f, &config, -EINVAL, "marked as damaged");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_random, setup, teardown),  cmocka_unit_test_setup_teardown(test_stops, setup, teardown),
        cmocka_unit_test_setup_teardown(test_overlays, setup, teardown),
        cmocka_unit_test_setup_teardown(test_fields, setup, teardown),  cmocka_unit_test_setup_teardown(test_backing, setup, teardown),
        cmocka_unit_test_setup_teardown(test_formats, setup, teardown), cmocka_unit_test_setup_teardown(test_damage, setup, teardown),
    };

    log_set_level(LOG_ERROR);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
