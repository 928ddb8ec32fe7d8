/*
 * virtio-fs driven by a guest's driver: on the loop's thread, on the thread that notifies, and by workers.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "device/virtio_fs.h"
#include "guest_driver.h"

extern const struct device_class virtio_fs_class;

enum mode { ALONE, AT_ONCE, WORKERS };

static struct fixture {
    struct guest g;
    pthread_mutex_t guard;
    enum mode mode;
    char folder[64];
    struct device *device;
    gpa_t request, answer;
    struct fuse_out_header *out; /* the last answer's */
    void *body;
} f;

/* Storage that takes its time: one message, when `hold` is set, until `release`. */
static atomic_bool hold;
static sem_t release;
uint64_t __real_fs_serve(struct fs *fs, const struct fs_message *message);
uint64_t __wrap_fs_serve(struct fs *fs, const struct fs_message *message);

uint64_t __wrap_fs_serve(struct fs *fs, const struct fs_message *message)
{
    if (atomic_exchange(&hold, false))
        sem_wait(&release);
    return __real_fs_serve(fs, message);
}

static void lock(void)
{
    if (f.mode != ALONE)
        pthread_mutex_lock(&f.guard);
}

static void unlock(void)
{
    if (f.mode != ALONE)
        pthread_mutex_unlock(&f.guard);
}

static void plug(const char *tag)
{
    const struct virtio_fs_config config = {.fs = {.path = f.folder, .uid = FS_ID_AS_ON_HOST, .gid = FS_ID_AS_ON_HOST},
                                            .tag = tag, .at_once = f.mode == AT_ONCE, .queues = 2, .slot = 7};
    struct error err;

    assert_int_equal(virtio_fs_class.create(&f.device, &f.g.host, &config, &err), 0);
    guest_attach(&f.g, 7);
}

static void settle(void)
{
    for (bool quiet = false; !quiet;) {
        loop_run_once(f.g.loop, 1);
        lock();
        quiet = virtio_fs_class.quiesce(f.device);
        unlock();
    }
}

/* As a machine does it when a device goes: with the device lock. */
static void unplug(void)
{
    settle();
    lock();
    virtio_fs_class.destroy(f.device);
    unlock();
}

static int start(enum mode mode)
{
    guest_init(&f.g);
    f.mode = mode;
    pthread_mutex_init(&f.guard, NULL);
    if (mode != ALONE) {
        loop_destroy(f.g.loop);
        assert_int_equal(loop_create(&f.g.loop, &f.guard), 0);
        f.g.host.loop = f.g.loop;
    }
    strcpy(f.folder, "/tmp/doppel-virtio-fs-XXXXXX");
    assert_non_null(mkdtemp(f.folder));
    plug("work");
    return 0;
}

static int stop(void **state)
{
    char path[128];

    unplug();
    guest_fini(&f.g);
    for (char name = 'a'; name <= 'c'; name++) {
        snprintf(path, sizeof(path), "%s/%c", f.folder, name);
        unlink(path);
    }
    assert_int_equal(rmdir(f.folder), 0);
    return 0;
}

static int start_alone(void **state)
{
    return start(ALONE);
}

static int start_at_once(void **state)
{
    return start(AT_ONCE);
}

static int start_workers(void **state)
{
    return start(WORKERS);
}

/* Nothing is under way, so nobody else wants the lock; the loop takes it itself. */
static void begin(void)
{
    guest_start(&f.g, F_EVENT_IDX | F_INDIRECT_DESC, 3);
    f.request = guest_alloc(&f.g, 4096);
    f.answer = guest_alloc(&f.g, 65536);
}

/* Puts a message together; returns its length. */
static uint32_t compose(uint32_t opcode, uint64_t node, const void *arg, unsigned arg_bytes, const char *name)
{
    uint8_t *at = guest_at(&f.g, f.request, 4096);
    struct fuse_in_header header = {.opcode = opcode, .unique = 3, .nodeid = node};

    header.len = (uint32_t)(sizeof(header) + arg_bytes + (name ? strlen(name) + 1 : 0));
    memcpy(at, &header, sizeof(header));
    if (arg_bytes)
        memcpy(at + sizeof(header), arg, arg_bytes);
    if (name)
        strcpy((char *)at + sizeof(header) + arg_bytes, name);
    return header.len;
}

/* Waits for the next used entry of the queue; returns its length. */
static uint32_t wait_used(struct guest_queue *q)
{
    for (unsigned i = 0;; i++) {
        uint32_t length;
        bool used;

        lock();
        used = guest_has_used(q);
        length = used ? guest_take_used(q, NULL) : 0;
        unlock();
        if (used)
            return length;
        assert_true(i < 10000);
        assert_true(loop_run_once(f.g.loop, 1) >= 0);
    }
}

static int ask(uint32_t opcode, uint64_t node, const void *arg, unsigned arg_bytes, const char *name)
{
    uint32_t bytes = compose(opcode, node, arg, arg_bytes, name), length;
    struct guest_buffer buffers[] = {{f.request, 40, false}, {f.request + 40, bytes - 40, false}, {f.answer, 16, true}, {f.answer + 4096, 8192, true}};

    f.out = guest_at(&f.g, f.answer, 16);
    f.body = guest_at(&f.g, f.answer + 4096, 8192);
    lock();
    guest_add(&f.g.queue[1], buffers, 4);
    guest_kick(&f.g.queue[1]);
    if (f.mode == AT_ONCE && opcode != FUSE_FSYNC)
        assert_true(guest_has_used(&f.g.queue[1])); /* the doorbell has done it */
    unlock();
    length = wait_used(&f.g.queue[1]);
    assert_int_equal(length, f.out->len);
    assert_int_equal(f.out->unique, 3);
    return f.out->error;
}

static void mount(void)
{
    const struct fuse_init_in init = {.major = 7, .minor = 36, .flags = ~0u};

    assert_int_equal(ask(FUSE_INIT, 0, &init, sizeof(init), NULL), 0);
    assert_int_equal(((struct fuse_init_out *)f.body)->major, 7);
}

static uint64_t make(const char *name, uint64_t *handle)
{
    const struct fuse_create_in in = {.flags = O_RDWR | O_CREAT, .mode = 0644};

    assert_int_equal(ask(FUSE_CREATE, FUSE_ROOT_ID, &in, sizeof(in), name), 0);
    *handle = ((struct fuse_open_out *)((struct fuse_entry_out *)f.body + 1))->fh;
    return ((struct fuse_entry_out *)f.body)->nodeid;
}

static void test_requests(void **state)
{
    struct fuse_forget_in forget = {1};
    uint64_t node, handle;
    uint32_t bytes;

    assert_int_equal(guest_config_read(&f.g, 2, 2), 0x105A);
    for (unsigned i = 0; i < 5; i++)
        assert_int_equal(bus_read(f.g.bus, BUS_MMIO, f.g.config + i, 1), "work"[i]);
    assert_int_equal(bus_read(f.g.bus, BUS_MMIO, f.g.config + 36, 4), 2);
    assert_int_equal(common_read(&f.g, C_NUM_QUEUES, 2), 3);
    begin();
    mount();
    node = make("a", &handle);
    const struct fuse_write_in write = {.fh = handle, .size = 8};
    struct {
        struct fuse_write_in in;
        char data[8];
    } both = {write, {'s', 'o', 'm', 'e', 't', 'e', 'x', 't'}};
    assert_int_equal(ask(FUSE_WRITE, node, &both, sizeof(both), NULL), 0);
    const struct fuse_read_in read = {.fh = handle, .offset = 4, .size = 100};
    assert_int_equal(ask(FUSE_READ, node, &read, sizeof(read), NULL), 0);
    assert_int_equal(f.out->len, 16 + 4);
    assert_memory_equal(f.body, "text", 4);
    lock();
    assert_true(physmap_take_dirty(f.g.memory, f.answer + 4096));
    unlock();
    const struct fuse_fsync_in sync = {.fh = handle};
    assert_int_equal(ask(FUSE_FSYNC, node, &sync, sizeof(sync), NULL), 0);

    /* FORGET has no answer. Neither has a request without room for one; the queue goes on. */
    bytes = compose(FUSE_FORGET, node, &forget, sizeof(forget), NULL);
    lock();
    guest_add(&f.g.queue[0], &(struct guest_buffer){f.request, bytes, false}, 1);
    if (guest_kick_is_wanted(&f.g.queue[0])) /* else it is found without: a request came just now */
        guest_kick(&f.g.queue[0]);
    unlock();
    assert_int_equal(wait_used(&f.g.queue[0]), 0);
    bytes = compose(FUSE_GETATTR, FUSE_ROOT_ID, (uint64_t[2]){0}, 16, NULL);
    lock();
    guest_add(&f.g.queue[1], &(struct guest_buffer){f.request, bytes, false}, 1);
    guest_add(&f.g.queue[1], &(struct guest_buffer){f.answer, 100, true}, 1);
    guest_kick(&f.g.queue[1]);
    unlock();
    assert_int_equal(wait_used(&f.g.queue[1]), 0);
    assert_int_equal(wait_used(&f.g.queue[1]), 0);
    assert_int_equal(ask(FUSE_GETATTR, FUSE_ROOT_ID, (uint64_t[2]){0}, 16, NULL), 0);
    assert_int_equal(ask(FUSE_GETATTR, node, (uint64_t[2]){0}, 16, NULL), -ESTALE);
}

/* A reset with everything in flight: it ends, nothing is held, and the driver begins again. */
static void test_reset(void **state)
{
    uint64_t node, handle;

    begin();
    mount();
    for (unsigned round = 0; round < 20; round++) {
        uint32_t bytes;

        node = make("a", &handle);
        const struct fuse_fsync_in sync = {.fh = handle};
        bytes = compose(FUSE_FSYNC, node, &sync, sizeof(sync), NULL);
        struct guest_buffer buffers[] = {{f.request, bytes, false}, {f.answer, 16, true}};
        lock();
        for (unsigned i = 0; i < 7; i++)
            guest_add(&f.g.queue[1], buffers, 2);
        guest_kick(&f.g.queue[1]);
        common_write(&f.g, C_STATUS, 1, 0);
        unlock();
        for (unsigned status = 1; status;) {
            lock();
            status = (unsigned)common_read(&f.g, C_STATUS, 1);
            unlock();
            loop_run_once(f.g.loop, 1);
        }
        begin();
        assert_int_equal(ask(FUSE_GETATTR, FUSE_ROOT_ID, (uint64_t[2]){0}, 16, NULL), -EIO);
        mount();
        assert_int_equal(ask(FUSE_GETATTR, node, (uint64_t[2]){0}, 16, NULL), -ESTALE);
        const struct fuse_read_in read = {.fh = handle, .size = 1};
        assert_int_equal(ask(FUSE_READ, node, &read, sizeof(read), NULL), -EBADF);
    }
}

static void add_getattr(uint32_t at)
{
    static const struct fuse_getattr_in any;
    uint32_t bytes = compose(FUSE_GETATTR, FUSE_ROOT_ID, &any, sizeof(any), NULL);
    struct guest_buffer buffers[] = {{f.request + at, bytes, false}, {f.answer + at, 128, true}};

    if (at)
        memcpy(guest_at(&f.g, f.request + at, bytes), guest_at(&f.g, f.request, bytes), bytes);
    lock();
    guest_add(&f.g.queue[1], buffers, 2);
    guest_kick(&f.g.queue[1]);
    unlock();
}

/* Threads that may not touch files have the answer when the doorbell returns, too, as a rule (a host may be busy); but not from storage that takes its time, which holds nothing else up. */
static void test_doorbell(void **state)
{
    unsigned there = 0;

    begin();
    mount();
    for (unsigned i = 0; i < 100 || (!there && i < 1000); i++) {
        add_getattr(0);
        lock();
        there += guest_has_used(&f.g.queue[1]);
        unlock();
        wait_used(&f.g.queue[1]);
    }
    assert_true(there > 0);
    if (f.mode != WORKERS)
        return;
    memset(guest_at(&f.g, f.answer, 16), 0, 16);
    atomic_store(&hold, true);
    add_getattr(0);
    while (atomic_load(&hold))
        sched_yield();
    add_getattr(1024);
    assert_int_equal(wait_used(&f.g.queue[1]), 16 + sizeof(struct fuse_attr_out));
    assert_int_equal(((struct fuse_out_header *)guest_at(&f.g, f.answer, 16))->len, 0);
    assert_int_equal(((struct fuse_out_header *)guest_at(&f.g, f.answer + 1024, 16))->unique, 3);
    sem_post(&release);
    assert_int_equal(wait_used(&f.g.queue[1]), 16 + sizeof(struct fuse_attr_out));
    assert_int_equal(((struct fuse_out_header *)guest_at(&f.g, f.answer, 16))->unique, 3);
}

static void test_state(void **state)
{
    struct state_io *writer = state_writer_create(), *reader;
    uint64_t node, handle;
    size_t size;

    begin();
    mount();
    node = make("b", &handle);
    settle();
    lock();
    assert_int_equal(virtio_fs_class.state(f.device, writer), 0);
    unlock();
    unplug();
    plug("work");
    const void *saved = state_writer_data(writer, &size);
    reader = state_reader_create(saved, size);
    lock();
    assert_int_equal(virtio_fs_class.state(f.device, reader), 0);
    unlock();
    state_io_destroy(reader);
    const struct fuse_read_in read = {.fh = handle, .size = 1};
    assert_int_equal(ask(FUSE_READ, node, &read, sizeof(read), NULL), 0);
    assert_int_equal(ask(FUSE_GETATTR, node, (uint64_t[2]){0}, 16, NULL), 0);
    unplug();
    plug("other");
    saved = state_writer_data(writer, &size);
    reader = state_reader_create(saved, size);
    lock();
    assert_true(virtio_fs_class.state(f.device, reader) < 0);
    unlock();
    assert_non_null(strstr(state_error(reader), "another tag"));
    state_io_destroy(reader);
    state_io_destroy(writer);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
#define TEST(name) \
    cmocka_unit_test_setup_teardown(name, start_alone, stop), cmocka_unit_test_setup_teardown(name, start_at_once, stop), cmocka_unit_test_setup_teardown(name, start_workers, stop)
        TEST(test_requests),
        TEST(test_reset),
        TEST(test_doorbell),
        TEST(test_state),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
