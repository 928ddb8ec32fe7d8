/*
 * Raw images with both I/O back ends: data, zeroing, flush, locks, refusals, a full host.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "block/block_priv.h"
#include "util/log.h"

#define KIB 1024ull
#define MIB (1024 * KIB)
#define IMAGE_BYTES (8 * MIB)

struct fixture {
    const char *io;
    char dir[64], path[96];
    struct loop *loop;
    struct block *block;
};

struct tracked {
    struct block_request request; /* first */
    bool done;
    int result;
};

static void on_done(struct block_request *request, int result)
{
    struct tracked *tracked = (struct tracked *)request;

    assert_false(tracked->done);
    tracked->done = true;
    tracked->result = result;
}

static void wait_idle(struct fixture *f)
{
    for (unsigned i = 0; block_in_flight(f->block); i++) {
        assert_true(i < 100000);
        assert_true(loop_run_once(f->loop, 1000) >= 0);
    }
}

static int run(struct fixture *f, enum block_op op, uint64_t offset, struct iovec *iov, unsigned count, uint64_t length, bool unmap)
{
    struct tracked tracked = {.request = {.op = op,
                                          .may_unmap = unmap,
                                          .offset_bytes = offset,
                                          .length_bytes = length,
                                          .iov = iov,
                                          .iov_count = count,
                                          .done = on_done}};

    block_submit(f->block, &tracked.request);
    assert_false(tracked.done); /* never from inside submit */
    wait_idle(f);
    assert_true(tracked.done);
    return tracked.result;
}

static int run_one(struct fixture *f, enum block_op op, uint64_t offset, void *data, uint64_t length)
{
    struct iovec iov = {data, length};

    return run(f, op, offset, &iov, 1, length, false);
}

static int try_open(struct fixture *f, const char *path, bool readonly, struct block **block, struct error *err)
{
    struct block_config config = {.path = path, .readonly = readonly, .io = f->io};

    memset(err, 0, sizeof(*err));
    return block_open(block, &config, f->loop, err);
}

static void make_file(const char *path, uint64_t bytes)
{
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);

    assert_true(fd >= 0);
    assert_int_equal(ftruncate(fd, (off_t)bytes), 0);
    close(fd);
}

static int setup(void **state, const char *io)
{
    struct fixture *f = calloc(1, sizeof(*f));
    struct error err;

    f->io = io;
    snprintf(f->dir, sizeof(f->dir), "/tmp/doppel-block-XXXXXX");
    assert_non_null(mkdtemp(f->dir));
    snprintf(f->path, sizeof(f->path), "%s/disk", f->dir);
    make_file(f->path, IMAGE_BYTES);
    assert_int_equal(loop_create(&f->loop, NULL), 0);
    *state = f;
    if (try_open(f, f->path, false, &f->block, &err) < 0) {
        print_message("%s\n", err.text); /* no io_uring here: its tests are skipped */
        f->block = NULL;
    }
    return 0;
}

static int setup_uring(void **state)
{
    return setup(state, "uring");
}

static int setup_threads(void **state)
{
    return setup(state, "threads");
}

static int teardown(void **state)
{
    struct fixture *f = *state;

    block_close(f->block);
    loop_destroy(f->loop);
    unlink(f->path);
    rmdir(f->dir);
    free(f);
    return 0;
}

static struct fixture *ready(void **state)
{
    struct fixture *f = *state;

    if (!f->block)
        skip();
    return f;
}

static void test_data(void **state)
{
    struct fixture *f = ready(state);
    uint8_t *out = malloc(MIB), *in = malloc(MIB);
    struct iovec iov[5];

    for (unsigned i = 0; i < MIB; i++)
        out[i] = (uint8_t)(i * 31 + (i >> 10));
    assert_int_equal(block_size_bytes(f->block), IMAGE_BYTES);
    /* Odd pieces, an empty one among them. */
    iov[0] = (struct iovec){out, 3};
    iov[1] = (struct iovec){out + 3, 0};
    iov[2] = (struct iovec){out + 3, 70000};
    iov[3] = (struct iovec){out + 70003, 1};
    iov[4] = (struct iovec){out + 70004, MIB - 70004};
    assert_int_equal(run(f, BLOCK_WRITE, 512, iov, 5, MIB, false), 0);
    assert_int_equal(run(f, BLOCK_FLUSH, 0, NULL, 0, 0, false), 0);
    assert_int_equal(run_one(f, BLOCK_READ, 512, in, MIB), 0);
    assert_memory_equal(in, out, MIB);

    int fd = open(f->path, O_RDONLY);
    assert_int_equal(pread(fd, in, MIB, 512), MIB);
    assert_memory_equal(in, out, MIB);
    close(fd);
    free(out);
    free(in);
}

static void test_parallel(void **state)
{
    struct fixture *f = ready(state);
    enum { COUNT = 600 }; /* more than fit in the ring */
    struct tracked *tracked = calloc(COUNT, sizeof(*tracked));
    struct iovec *iov = calloc(COUNT, sizeof(*iov));
    uint8_t *data = malloc(COUNT * 4096), sector[512];

    for (unsigned i = 0; i < COUNT; i++) {
        memset(data + i * 4096, (int)(i % 251 + 1), 4096);
        iov[i] = (struct iovec){data + i * 4096, 4096};
        tracked[i].request = (struct block_request){
            .op = BLOCK_WRITE, .offset_bytes = i * 4096, .length_bytes = 4096, .iov = &iov[i], .iov_count = 1, .done = on_done};
        block_submit(f->block, &tracked[i].request);
    }
    assert_int_equal(block_in_flight(f->block), COUNT);
    wait_idle(f);
    for (unsigned i = 0; i < COUNT; i++) {
        assert_true(tracked[i].done && tracked[i].result == 0);
        assert_int_equal(run_one(f, BLOCK_READ, i * 4096 + 512, sector, 512), 0);
        assert_int_equal(sector[511], i % 251 + 1);
    }
    free(tracked);
    free(iov);
    free(data);
}

/* More vectors than one system call takes: the rest is continued. */
static void test_many_vectors(void **state)
{
    struct fixture *f = ready(state);
    enum { COUNT = 2048 };
    struct iovec *iov = calloc(COUNT, sizeof(*iov));
    uint8_t *data = malloc(COUNT * 512), *back = malloc(COUNT * 512);

    for (unsigned i = 0; i < COUNT; i++) {
        memset(data + i * 512, (int)(i % 253), 512);
        iov[i] = (struct iovec){data + i * 512, 512};
    }
    assert_int_equal(run(f, BLOCK_WRITE, 4096, iov, COUNT, COUNT * 512, false), 0);
    assert_int_equal(run_one(f, BLOCK_READ, 4096, back, COUNT * 512), 0);
    assert_memory_equal(data, back, COUNT * 512);
    free(iov);
    free(data);
    free(back);
}

static void test_zeroing(void **state)
{
    struct fixture *f = ready(state);
    uint8_t *data = malloc(2 * MIB);

    for (unsigned unmap = 0; unmap < 2; unmap++) {
        memset(data, 0xAA, 2 * MIB);
        assert_int_equal(run_one(f, BLOCK_WRITE, 0, data, 2 * MIB), 0);
        assert_int_equal(run(f, BLOCK_WRITE_ZEROES, 512, NULL, 0, 2 * MIB - 1024, unmap), 0);
        assert_int_equal(run_one(f, BLOCK_READ, 0, data, 2 * MIB), 0);
        assert_int_equal(data[511], 0xAA);
        for (unsigned i = 512; i < 2 * MIB - 512; i++)
            assert_int_equal(data[i], 0);
        assert_int_equal(data[2 * MIB - 512], 0xAA);
    }
    memset(data, 0xBB, 2 * MIB);
    assert_true(block_can_discard(f->block));
    assert_int_equal(run_one(f, BLOCK_WRITE, 0, data, 2 * MIB), 0);
    assert_int_equal(run(f, BLOCK_DISCARD, 0, NULL, 0, MIB, false), 0);
    assert_int_equal(run_one(f, BLOCK_READ, 0, data, 2 * MIB), 0);
    assert_int_equal(data[MIB], 0xBB);
    free(data);
}

static unsigned take_all(struct fixture *f, uint64_t expected[8], uint64_t most)
{
    unsigned count = 0;
    for (uint64_t offset = 0, length; block_take_written(f->block, &offset, &length, most); offset += length, count++) {
        assert_in_range(count, 0, 3);
        expected[2 * count] = offset;
        expected[2 * count + 1] = length;
    }
    assert_int_equal(block_written_bytes(f->block), 0);
    return count;
}

static void test_written(void **state)
{
    struct fixture *f = ready(state);
    uint64_t parts[8], unit = BLOCK_WRITTEN_BYTES;
    uint8_t *data = calloc(1, MIB);
    assert_int_equal(block_written_bytes(f->block), 0);
    assert_int_equal(block_track_writes(f->block, true), 0);
    assert_int_equal(block_written_bytes(f->block), IMAGE_BYTES); /* all of it at first */
    assert_int_equal(take_all(f, parts, IMAGE_BYTES), 1);
    assert_int_equal(parts[1], IMAGE_BYTES);
    assert_int_equal(run_one(f, BLOCK_READ, 0, data, MIB), 0);
    assert_int_equal(run(f, BLOCK_FLUSH, 0, NULL, 0, 0, false), 0);
    assert_int_equal(take_all(f, parts, IMAGE_BYTES), 0);

    assert_int_equal(run_one(f, BLOCK_WRITE, unit - 512, data, 1024), 0);           /* two parts */
    assert_int_equal(run(f, BLOCK_WRITE_ZEROES, IMAGE_BYTES - 512, NULL, 0, 512, false), 0); /* the last */
    assert_int_equal(run(f, BLOCK_DISCARD, 70 * unit, NULL, 0, 4 * unit, true), 0);
    assert_int_equal(run_one(f, BLOCK_WRITE, IMAGE_BYTES, data, 512), -EINVAL);
    assert_int_equal(block_written_bytes(f->block), 7 * unit);
    assert_int_equal(take_all(f, parts, 3 * unit), 4);
    const uint64_t wanted[] = {0, 2 * unit, 70 * unit, 3 * unit, 73 * unit, unit, IMAGE_BYTES - unit, unit};
    assert_memory_equal(parts, wanted, sizeof wanted);

    /* What is under way when it is taken counts again when it has ended. */
    struct iovec iov = {data, 512};
    struct tracked tracked = {.request = {.op = BLOCK_WRITE, .offset_bytes = 5 * unit, .length_bytes = 512, .iov = &iov, .iov_count = 1, .done = on_done}};
    block_submit(f->block, &tracked.request);
    assert_int_equal(take_all(f, parts, IMAGE_BYTES), 1);
    wait_idle(f);
    assert_int_equal(take_all(f, parts, IMAGE_BYTES), 1);
    assert_int_equal(parts[0], 5 * unit);
    assert_int_equal(block_track_writes(f->block, false), 0);
    assert_int_equal(run_one(f, BLOCK_WRITE, 0, data, 512), 0);
    assert_int_equal(block_written_bytes(f->block), 0);
    free(data);
}

static void test_bad_requests(void **state)
{
    struct fixture *f = ready(state);
    uint8_t data[1024];
    struct iovec iov = {data, 512};

    assert_int_equal(run_one(f, BLOCK_READ, 1, data, 512), -EINVAL);
    assert_int_equal(run_one(f, BLOCK_READ, 0, data, 100), -EINVAL);
    assert_int_equal(run_one(f, BLOCK_READ, IMAGE_BYTES - 512, data, 1024), -EINVAL);
    assert_int_equal(run_one(f, BLOCK_WRITE, UINT64_MAX & ~511ull, data, 512), -EINVAL);
    assert_int_equal(run(f, BLOCK_WRITE, 0, &iov, 1, 1024, false), -EINVAL);
    assert_int_equal(run(f, BLOCK_WRITE, 0, NULL, 0, 0, false), 0);
    assert_int_equal(run_one(f, BLOCK_READ, IMAGE_BYTES - 512, data, 512), 0);
}

/* Somebody cuts the file underneath: errors, no invented data. */
static void test_cut_file(void **state)
{
    struct fixture *f = ready(state);
    uint8_t data[4096];

    log_set_level(LOG_ERROR);
    assert_int_equal(truncate(f->path, 1024), 0);
    assert_int_equal(run_one(f, BLOCK_READ, 0, data, 4096), -EIO);
    assert_int_equal(run_one(f, BLOCK_READ, 0, data, 1024), 0);
}

static void test_locks(void **state)
{
    struct fixture *f = ready(state);
    struct block *other, *third;
    struct error err;

    assert_int_equal(try_open(f, f->path, false, &other, &err), -EBUSY);
    assert_non_null(strstr(err.text, "in use"));
    assert_int_equal(try_open(f, f->path, true, &other, &err), -EBUSY);
    block_close(f->block);
    assert_int_equal(try_open(f, f->path, true, &f->block, &err), 0);
    assert_int_equal(try_open(f, f->path, true, &other, &err), 0);
    assert_int_equal(try_open(f, f->path, false, &third, &err), -EBUSY);
    block_close(other);

    uint8_t data[512];
    assert_true(block_readonly(f->block));
    assert_false(block_can_discard(f->block));
    assert_int_equal(run_one(f, BLOCK_READ, 0, data, 512), 0);
    assert_int_equal(run_one(f, BLOCK_WRITE, 0, data, 512), -EROFS);
    assert_int_equal(run(f, BLOCK_FLUSH, 0, NULL, 0, 0, false), 0);
}

static void expect_refusal(struct fixture *f, const char *path, bool readonly, int code, const char *text)
{
    struct block *block;
    struct error err;

    assert_int_equal(try_open(f, path, readonly, &block, &err), code);
    assert_null(block);
    if (!strstr(err.text, text) || !strstr(err.text, path))
        fail_msg("unexpected message: %s", err.text);
}

static void test_refusals(void **state)
{
    struct fixture *f = ready(state);
    char path[128];
    struct block_config config = {.path = f->path, .format = "qcow9"};
    struct block *block;
    struct error err;

    assert_int_equal(block_open(&block, &config, f->loop, &err), -EINVAL);
    config = (struct block_config){.path = f->path, .io = "carrier-pigeon", .readonly = true};
    block_close(f->block);
    f->block = NULL;
    assert_int_equal(block_open(&block, &config, f->loop, &err), -EINVAL);

    snprintf(path, sizeof(path), "%s/odd", f->dir);
    expect_refusal(f, path, false, -ENOENT, "no such file");
    make_file(path, 1000);
    expect_refusal(f, path, false, -EINVAL, "multiple of 512");
    make_file(path, 0);
    expect_refusal(f, path, true, -EINVAL, "is empty");
    unlink(path);
    assert_int_equal(mkfifo(path, 0600), 0);
    expect_refusal(f, path, true, -EINVAL, "neither a file nor a block device");
    unlink(path);
    expect_refusal(f, f->dir, true, -EISDIR, "directory");
    expect_refusal(f, f->dir, false, -EISDIR, "directory");
    if (getuid() != 0) {
        make_file(path, 512);
        chmod(path, 0400);
        expect_refusal(f, path, false, -EACCES, "readonly");
        unlink(path);
    }
}

static void test_full_host(void **state)
{
    struct fixture *f = ready(state);
    struct rlimit before, small;
    uint8_t *data = calloc(1, 2 * MIB);

    /* A file may not grow past the limit: EFBIG, after a short write. Stands for a full disk, which needs no privilege this way. */
    signal(SIGXFSZ, SIG_IGN);
    log_set_level(LOG_ERROR);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
    small = (struct rlimit){MIB, before.rlim_max};
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    int result = run_one(f, BLOCK_WRITE, MIB / 2, data, 2 * MIB);
    setrlimit(RLIMIT_FSIZE, &before);
    assert_int_equal(result, -EFBIG);
    assert_int_equal(run_one(f, BLOCK_WRITE, MIB / 2, data, 2 * MIB), 0);
    assert_int_equal(run(f, BLOCK_FLUSH, 0, NULL, 0, 0, false), 0);
    free(data);
}

/* A real ENOSPC and file systems without ZERO_RANGE, in a mount namespace of a child, when that is allowed. */
static int full_tmpfs(struct fixture *f)
{
    char path[128];
    struct error err;
    uint8_t *data = malloc(4 * MIB);

    if (mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 || mount("tmpfs", f->dir, "tmpfs", 0, "size=2M") < 0)
        return 77;
    snprintf(path, sizeof(path), "%s/small", f->dir);
    make_file(path, 4 * MIB);
    struct fixture inner = *f;
    if (loop_create(&inner.loop, NULL) < 0 || try_open(&inner, path, false, &inner.block, &err) < 0)
        return 1;
    memset(data, 0x55, 4 * MIB);
    if (run_one(&inner, BLOCK_WRITE, 0, data, 4 * MIB) != -ENOSPC)
        return 2;
    if (run_one(&inner, BLOCK_WRITE, 0, data, MIB) != 0) /* that part has its pages */
        return 3;
    if (run(&inner, BLOCK_WRITE_ZEROES, 512, NULL, 0, MIB - 512, false) != 0)
        return 4;
    if (run_one(&inner, BLOCK_READ, 0, data, MIB) != 0 || data[511] != 0x55 || data[512] != 0 || data[MIB - 1] != 0)
        return 5;
    if (run(&inner, BLOCK_DISCARD, 0, NULL, 0, 4 * MIB, false) != 0)
        return 6;
    if (run_one(&inner, BLOCK_WRITE, 3 * MIB, data, MIB) != 0) /* room again */
        return 7;
    block_close(inner.block);
    loop_destroy(inner.loop);
    free(data);
    return 0;
}

static void test_enospc(void **state)
{
    struct fixture *f = ready(state);
    int status;
    pid_t child;

    block_close(f->block); /* its threads do not survive the fork */
    f->block = NULL;
    child = fork();
    if (child == 0) {
        log_set_level(LOG_ERROR);
        _exit(unshare(CLONE_NEWNS) < 0 ? 77 : full_tmpfs(f));
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status));
    if (WEXITSTATUS(status) == 77)
        skip();
    assert_int_equal(WEXITSTATUS(status), 0);
}

/* Without naming one, some back end is found. */
static void test_auto(void **state)
{
    struct fixture *f = *state;
    struct error err;

    block_close(f->block);
    f->io = NULL;
    assert_int_equal(try_open(f, f->path, false, &f->block, &err), 0);
    test_data(state);
}

#define BOTH(test)                                                                                 \
    {"uring: " #test, test, setup_uring, teardown, NULL}, {"threads: " #test, test, setup_threads, teardown, NULL}

int main(void)
{
    const struct CMUnitTest tests[] = {
        BOTH(test_data),     BOTH(test_parallel),  BOTH(test_many_vectors), BOTH(test_zeroing),   BOTH(test_bad_requests), BOTH(test_written),
        BOTH(test_cut_file), BOTH(test_locks),     BOTH(test_refusals),     BOTH(test_full_host), BOTH(test_enospc),
        {"auto", test_auto, setup_uring, teardown, NULL},
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
