/*
 * Fuzz target: virtio-vsock between a hostile driver and erratic programs of the host.
 *
 * The input is a list of 8-byte steps {op, a, b, c}: packets of any kind from the guest, receive buffers of any size, programs that connect, listen, write, read, close,
 * and saving and loading. Ports are few, so that packets meet connections. What must hold: nothing crashes, connections stay within the limit, and nothing is left at the end.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "../unit/device/guest_driver.h"
#include "device/vsock_priv.h"
#include "util/log.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

extern const struct device_class virtio_vsock_class;

#define CID 42u
#define PROGRAMS 8u
#define STEPS_MAX 2048u
#define RING 64u
#define RX_AT 0x400000ull /* buffers, apart from what guest_alloc gives out */
#define TX_AT 0x800000ull
#define AREA_BYTES 0x10000ull

struct step {
    uint8_t op, a;
    uint16_t b;
    uint32_t c;
};

struct target {
    struct guest g;
    struct device *device;
    char path[64];
    int listener, program[PROGRAMS];
    unsigned rx_count;
};

static void must(int condition)
{
    if (!condition)
        abort();
}

static struct sockaddr_un address_of(const struct target *t, const char *suffix)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s%s", t->path, suffix);
    return address;
}

static void start_driver(struct target *t)
{
    guest_start(&t->g, F_EVENT_IDX, 3);
    t->g.next_page = 0x10000; /* the rings were put there; the next start may have the place again */
    t->rx_count = 0;
}

static void build(struct target *t)
{
    snprintf(t->path, sizeof t->path, "/tmp/doppel-fuzz-vsock-%d", (int)getpid());
    const struct virtio_vsock_config config = {.cid = CID, .path = t->path, .slot = -1};
    const struct sockaddr_un address = address_of(t, "_7");
    guest_init(&t->g);
    must(virtio_vsock_class.create(&t->device, &t->g.host, &config, NULL) == 0);
    ((struct virtio_vsock *)t->device)->connections_max = 6;
    guest_attach(&t->g, 1);
    start_driver(t);
    t->listener = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    unlink(address.sun_path);
    must(t->listener >= 0 && bind(t->listener, (const struct sockaddr *)&address, sizeof address) == 0 && listen(t->listener, 16) == 0);
    for (unsigned i = 0; i < PROGRAMS; i++)
        t->program[i] = -1;
}

static void tear_down(struct target *t)
{
    struct virtio_vsock_counters counters;
    bus_write(t->g.bus, BUS_MMIO, t->g.common + C_STATUS, 1, 0);
    virtio_vsock_get_counters(t->device, &counters);
    must(counters.open == 0);
    virtio_vsock_class.destroy(t->device);
    for (unsigned i = 0; i < PROGRAMS; i++)
        if (t->program[i] >= 0)
            close(t->program[i]);
    close(t->listener);
    unlink(address_of(t, "_7").sun_path);
    guest_fini(&t->g);
}

/* Takes what has come back, so that the rings never overflow. */
static void take_used(struct target *t)
{
    for (unsigned i = 0; i < 2; i++) {
        while (guest_has_used(&t->g.queue[i])) {
            guest_take_used(&t->g.queue[i], NULL);
            t->rx_count -= i == 0;
        }
    }
}

static void add_buffer(struct target *t, const struct step *s)
{
    static const uint32_t sizes[] = {44 + 4096, 45, 44, 43, 100, 65536};
    const struct guest_buffer whole = {RX_AT + (s->b % 16) * AREA_BYTES, sizes[s->c % 64 ? 0 : s->a % 6], true};
    const struct guest_buffer parts[2] = {{whole.gpa, 20 + s->c % 40, true}, {whole.gpa + 0x1000, s->b, true}};
    if (t->rx_count + 2 >= RING / 2)
        return;
    if (s->c % 64 == 1)
        guest_add(&t->g.queue[0], parts, 2);
    else
        guest_add(&t->g.queue[0], &whole, 1);
    t->rx_count++;
    guest_kick(&t->g.queue[0]);
}

static void send_packet(struct target *t, const struct step *s)
{
    const uint32_t last = ((struct virtio_vsock *)t->device)->next_port - 1; /* given to a program of the host */
    const uint32_t ports[][2] = {{1, 7}, {2, 7}, {3, 7}, {1, last}, {2, last}, {1, last - 1}, {2, last - 1}, {1, last - 2}};
    const bool data = s->a & 8;
    struct vsock_header header = {
        .src_cid = s->c % 97 ? CID : s->c,
        .dst_cid = s->c % 89 ? 2 : s->c,
        .src_port = ports[s->a & 7][0],
        .dst_port = ports[s->a & 7][1],
        .len = data ? s->b % 0x8000 : s->c % 67 ? 0 : s->b,
        .type = s->c % 83 ? 1 : (uint16_t)s->c,
        .op = data ? VSOCK_OP_RW : s->c % 79 ? (s->c >> 8) % 8 : (uint16_t)s->b,
        .flags = s->c >> 12 & 3,
        .buf_alloc = s->c >> 16 & 1 ? 1 << 20 : s->c >> 17,
        .fwd_cnt = s->c >> 18 & 1 ? 0 : s->c >> 20,
    };
    const struct guest_buffer parts[2] = {{TX_AT, s->c % 73 ? 44 : s->b % 45, false}, {TX_AT + 0x1000, s->c % 71 ? header.len : s->c & 0xFFFF, false}};
    memcpy(guest_at(&t->g, TX_AT, sizeof header), &header, sizeof header);
    guest_add(&t->g.queue[1], parts, parts[1].length ? 2 : 1);
    guest_kick(&t->g.queue[1]);
    guest_run(&t->g);
}

static void use_program(struct target *t, const struct step *s)
{
    static const char *const lines[] = {"CONNECT 1\n", "CONNECT 2\n", "CONN", "ECT 7\n", "CONNECT 4294967295\n", "\n", "connect 1\nmore"};
    static char bytes[65536];
    int *fd = &t->program[s->b % PROGRAMS];
    const struct sockaddr_un address = address_of(t, "");
    switch (s->a % 6) {
    case 0:
        if (*fd >= 0)
            close(*fd);
        *fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        must(*fd >= 0);
        (void)!connect(*fd, (const struct sockaddr *)&address, sizeof address);
        (void)!send(*fd, lines[s->c % 7], strlen(lines[s->c % 7]), MSG_NOSIGNAL);
        break;
    case 1:
        if (*fd < 0)
            *fd = accept4(t->listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        break;
    case 2:
        (void)!send(*fd, bytes, s->c % sizeof bytes, MSG_NOSIGNAL | MSG_DONTWAIT);
        break;
    case 3:
        (void)!recv(*fd, bytes, s->c % sizeof bytes, MSG_DONTWAIT);
        break;
    case 4:
        (void)shutdown(*fd, (int)(s->c % 3));
        break;
    case 5:
        if (*fd >= 0)
            close(*fd);
        *fd = -1;
        break;
    }
}

static void save_and_load(struct target *t, const struct step *s)
{
    struct state_io *writer = state_writer_create(), *reader;
    size_t size = 0;
    must(writer && virtio_vsock_class.state(t->device, writer) == 0);
    const void *saved = state_writer_data(writer, &size);
    uint8_t *copy = malloc(size);
    must(copy != NULL);
    memcpy(copy, saved, size);
    if (s->a & 1)
        copy[s->c % size] ^= 1u << (s->b % 8);
    reader = state_reader_create(copy, size);
    must(reader != NULL);
    if (virtio_vsock_class.state(t->device, reader) < 0)
        start_driver(t);
    state_io_destroy(reader);
    state_io_destroy(writer);
    free(copy);
}

static void run_step(struct target *t, const struct step *s)
{
    struct virtio_vsock *vsock = (struct virtio_vsock *)t->device;
    switch (s->op >> 1 & 15) {
    case 0:
        save_and_load(t, s);
        break;
    case 1:
        if (s->a < 16)
            start_driver(t);
        break;
    case 2:
        if (!TAILQ_EMPTY(&vsock->waiting)) {
            TAILQ_FIRST(&vsock->waiting)->deadline_ns = 1;
            vsock_host_arm(vsock);
        }
        break;
    case 3:
    case 4:
    case 5:
        add_buffer(t, s);
        break;
    case 6:
    case 7:
    case 8:
    case 9:
        use_program(t, s);
        break;
    default:
        send_packet(t, s);
    }
    guest_run(&t->g);
    take_used(t);
    if (common_read(&t->g, C_STATUS, 1) & STATUS_NEEDS_RESET && s->b % 4 == 0)
        start_driver(t);
    must(vsock->connection_count <= vsock->connections_max);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct target target;
    log_set_level(LOG_ERROR);
    target = (struct target){0};
    build(&target);
    for (size_t i = 0; i < STEPS_MAX && (i + 1) * sizeof(struct step) <= size; i++) {
        struct step step;
        memcpy(&step, data + i * sizeof step, sizeof step);
        run_step(&target, &step);
    }
    tear_down(&target);
    return 0;
}
