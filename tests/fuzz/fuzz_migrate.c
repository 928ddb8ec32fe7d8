/*
 * Fuzz target: a migration's hostile source. Byte 0, bit 7: the rest is the stream as it is. Otherwise the rest is a sequence of messages, u8 type, u16 length (little endian), body, framed as they should
 * be; a HELLO's body becomes that of its section "config". The target reads a HELLO, and then whatever comes.
 */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "machine/migrate_disks.h"
#include "machine/post_copy.h"
#include "machine/migrate_priv.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define AS_IT_IS 0x80u
#define RAM_BYTES ((1u << 20) + (3u << 12)) /* the last chunk is not whole */

static void must(bool condition)
{
    if (!condition)
        abort();
}

static void put_hello(struct stream *stream, const uint8_t *config, size_t size)
{
    struct state_io *io = state_writer_create();
    struct migrate_hello hello = {.version = (char *)"0", .ram_bytes = RAM_BYTES, .about = (char *)"{}"};
    struct error err = {0};
    size_t total;
    must(io && migrate_hello_state(&hello, io) == 0);
    state_begin(io, "config", 1);
    state_bytes(io, (void *)(uintptr_t)config, size);
    must(state_end(io) == 0);
    const void *bytes = state_writer_data(io, &total);
    must(stream_put(stream, MIGRATE_HELLO, bytes, total, NULL, 0, &err) == 0);
    state_io_destroy(io);
}

static void write_messages(int fd, const uint8_t *data, size_t size)
{
    struct error err = {0};
    struct stream *stream = stream_create(dup(fd), "fuzzer");
    must(stream);
    while (size >= 3) {
        size_t length = data[1] | (size_t)data[2] << 8;
        unsigned type = data[0];
        data += 3;
        size -= 3;
        length = length < size ? length : size;
        if (type == MIGRATE_HELLO)
            put_hello(stream, data, length);
        else
            must(stream_put(stream, type, data, length, NULL, 0, &err) == 0);
        data += length;
        size -= length;
    }
    must(stream_flush(stream, &err) == 0);
    stream_destroy(stream);
}

static void read_hello(int fd)
{
    struct machine_config config;
    struct machine_incoming *incoming = NULL;
    struct error err = {0};
    machine_config_init(&config);
    if (machine_incoming_open(&incoming, fd, &config, &err))
        must(err.text[0]);
    else
        must(machine_incoming_about(incoming) != NULL);
    machine_incoming_close(incoming);
    machine_config_clear(&config);
}

/* One disk, in a file without a name. */
static struct disks_in *the_disks(void)
{
    static struct disks_in *disks;
    const struct migrate_hello hello = {.disk_count = 1, .disk = {{0, 1 << 20}}};
    struct machine_config config;
    struct error err = {0};
    char directory[] = "/tmp/doppel-fuzz-XXXXXX";
    if (disks)
        return disks;
    machine_config_init(&config);
    config.disk_count = 1;
    config.disk[0].path = strdup("/a/b");
    must(mkdtemp(directory) && disks_in_make(&disks, &hello, directory, &config, &err) == 0);
    must(unlink(config.disk[0].path) == 0 && rmdir(directory) == 0);
    machine_config_clear(&config);
    return disks;
}

/* As much of one as frames of the network need; its loop never comes to them. */
static struct machine *a_machine(void)
{
    static struct machine machine;
    must(machine.loop || loop_create(&machine.loop, NULL) == 0);
    return &machine;
}

static void read_messages(int fd)
{
    static uint8_t ram[RAM_BYTES];
    struct stream *stream = stream_create(fd, "fuzzer");
    struct error err = {0};
    const uint8_t *body;
    unsigned type;
    size_t size;
    struct unpacker *unpacker = unpacker_create();
    must(stream && unpacker);
    while (stream_get(stream, &type, &body, &size, &err) == 0) {
        uint64_t remote[3] = {0};
        bool last = false;
        int r = type == MIGRATE_PAGES    ? unpacker_take(unpacker, ram, sizeof ram, body, size, &err)
                : type == MIGRATE_FRAME  ? migrate_take_frame(a_machine(), body, size, &err)
                : type == MIGRATE_DISK   ? disks_in_take(the_disks(), body, size, &err)
                : type == MIGRATE_REMOTE ? post_copy_take_remote(remote, 3, body, size, &last, &err)
                                         : migrate_unexpected(type, body, size, &err);
        must(r == 0 || err.text[0]);
    }
    must(err.text[0]);
    unpacker_destroy(unpacker);
    stream_destroy(stream);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 1)
        return 0;
    for (unsigned pass = 0; pass < 2; pass++) {
        int fd = memfd_create("stream", MFD_CLOEXEC);
        must(fd >= 0);
        if (data[0] & AS_IT_IS)
            must(write(fd, data + 1, size - 1) == (ssize_t)(size - 1));
        else
            write_messages(fd, data + 1, size - 1);
        must(lseek(fd, 0, SEEK_SET) == 0);
        if (pass)
            read_messages(fd);
        else
            read_hello(fd);
    }
    return 0;
}
