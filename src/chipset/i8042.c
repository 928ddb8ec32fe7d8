/*
 * Keyboard controller and keyboard (IBM PS/2 Technical Reference, keyboard/auxiliary device controller; keyboard chapter). No auxiliary device.
 *
 * Invariants: the interrupt line is high exactly while the output buffer is full and its interrupt enabled; the keyboard's bytes wait in
 * `queue` until the buffer is free, the controller's own answers replace what is in it, as on the real part.
 * Threading: with the device lock held.
 */
#include "chipset/i8042.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>

#define DATA_PORT 0x60
#define COMMAND_PORT 0x64
#define SYSTEM_CONTROL_PORT 0x92

#define STATUS_OUTPUT_FULL 0x01
#define STATUS_SYSTEM 0x04
#define STATUS_COMMAND 0x08
#define STATUS_NOT_INHIBITED 0x10

#define MODE_INTERRUPT 0x01
#define MODE_SYSTEM 0x04
#define MODE_KEYBOARD_OFF 0x10
#define MODE_AUX_OFF 0x20
#define MODE_TRANSLATE 0x40
/* What firmware leaves: keyboard on, with interrupt and translation. */
#define MODE_DEFAULT (MODE_INTERRUPT | MODE_SYSTEM | MODE_AUX_OFF | MODE_TRANSLATE)

#define OUTPUT_NOT_RESET 0x01
#define OUTPUT_A20 0x02

#define KEYBOARD_ACK 0xFA
#define KEYBOARD_RESEND 0xFE
#define KEYBOARD_BREAK 0xF0

#define QUEUE_BYTES 32

struct i8042 {
    struct i8042_config config;
    uint8_t mode;        /* the command byte */
    uint8_t output_port;
    uint8_t out;         /* the output buffer */
    bool out_full;
    bool last_was_command;
    uint8_t parameter_of; /* controller command that waits for a byte at the data port; 0: none */
    uint8_t argument_of;  /* the same for a keyboard command */
    bool scanning;        /* the keyboard reports keys */
    bool broke;           /* a break prefix is being translated */
    uint8_t queue[QUEUE_BYTES];
    uint8_t queue_first, queue_count;
    struct i8042_counters counters; /* no part of the state */
};

/* Scan code set 2 to set 1, as the controller translates it. */
static const uint8_t set2_to_set1[128] = {
    0xFF, 0x43, 0x41, 0x3F, 0x3D, 0x3B, 0x3C, 0x58, 0x64, 0x44, 0x42, 0x40, 0x3E, 0x0F, 0x29, 0x59, /* 00 */
    0x65, 0x38, 0x2A, 0x70, 0x1D, 0x10, 0x02, 0x5A, 0x66, 0x71, 0x2C, 0x1F, 0x1E, 0x11, 0x03, 0x5B, /* 10 */
    0x67, 0x2E, 0x2D, 0x20, 0x12, 0x05, 0x04, 0x5C, 0x68, 0x39, 0x2F, 0x21, 0x14, 0x13, 0x06, 0x5D, /* 20 */
    0x69, 0x31, 0x30, 0x23, 0x22, 0x15, 0x07, 0x5E, 0x6A, 0x72, 0x32, 0x24, 0x16, 0x08, 0x09, 0x5F, /* 30 */
    0x6B, 0x33, 0x25, 0x17, 0x18, 0x0B, 0x0A, 0x60, 0x6C, 0x34, 0x35, 0x26, 0x27, 0x19, 0x0C, 0x61, /* 40 */
    0x6D, 0x73, 0x28, 0x74, 0x1A, 0x0D, 0x62, 0x6E, 0x3A, 0x36, 0x1C, 0x1B, 0x75, 0x2B, 0x63, 0x76, /* 50 */
    0x55, 0x56, 0x77, 0x78, 0x79, 0x7A, 0x0E, 0x7B, 0x7C, 0x4F, 0x7D, 0x4B, 0x47, 0x7E, 0x7F, 0x6F, /* 60 */
    0x52, 0x53, 0x50, 0x4C, 0x4D, 0x48, 0x01, 0x45, 0x57, 0x4E, 0x51, 0x4A, 0x37, 0x49, 0x46, 0x54, /* 70 */
};

static void update_irq(struct i8042 *i8042)
{
    irq_line_set(&i8042->config.irq, i8042->out_full && (i8042->mode & MODE_INTERRUPT));
}

static void put_out(struct i8042 *i8042, uint8_t byte)
{
    /* A new byte is a new edge, also when it replaces one that was not read. */
    irq_line_set(&i8042->config.irq, false);
    i8042->out = byte;
    i8042->out_full = true;
    update_irq(i8042);
}

static uint8_t translate(struct i8042 *i8042, uint8_t code)
{
    uint8_t broke = i8042->broke ? 0x80 : 0;

    i8042->broke = false;
    if (code == 0x83) /* F7 */
        return 0x41 | broke;
    if (code == 0x84) /* SysRq */
        return 0x54 | broke;
    return code < 0x80 ? set2_to_set1[code] | broke : code;
}

/* Lets the keyboard's next byte through when there is room for it. */
static void pump(struct i8042 *i8042)
{
    while (i8042->queue_count && !i8042->out_full && !(i8042->mode & MODE_KEYBOARD_OFF)) {
        uint8_t byte = i8042->queue[i8042->queue_first];

        i8042->queue_first = (i8042->queue_first + 1) % QUEUE_BYTES;
        i8042->queue_count--;
        if (!(i8042->mode & MODE_TRANSLATE))
            put_out(i8042, byte);
        else if (byte == KEYBOARD_BREAK)
            i8042->broke = true;
        else
            put_out(i8042, translate(i8042, byte));
    }
}

static void keyboard_send(struct i8042 *i8042, uint8_t byte)
{
    if (i8042->queue_count < QUEUE_BYTES)
        i8042->queue[(i8042->queue_first + i8042->queue_count++) % QUEUE_BYTES] = byte;
}

size_t i8042_key(struct i8042 *i8042, const uint8_t *scan_codes, size_t count)
{
    size_t room = QUEUE_BYTES - i8042->queue_count, taken = count < room ? count : room;

    if (!i8042->scanning)
        return count; /* a keyboard that does not scan loses keys */
    for (size_t i = 0; i < taken; i++)
        keyboard_send(i8042, scan_codes[i]);
    pump(i8042);
    return taken;
}

static void keyboard_argument(struct i8042 *i8042, uint8_t value)
{
    keyboard_send(i8042, KEYBOARD_ACK);
    /* F0 00 asks which scan code set is in use; always the second. */
    if (i8042->argument_of == 0xF0 && value == 0)
        keyboard_send(i8042, 2);
    i8042->argument_of = 0;
}

static void keyboard_command(struct i8042 *i8042, uint8_t command)
{
    uint8_t reply = KEYBOARD_ACK;

    if (command == 0xF4 || command == 0xF6 || command == 0xFF)
        i8042->scanning = true;
    else if (command == 0xF5)
        i8042->scanning = false;
    else if (command == 0xED || command == 0xF0 || command == 0xF3) /* LEDs, scan code set, typematic rate */
        i8042->argument_of = command;
    else if (command == 0xEE) /* echo */
        reply = 0xEE;
    else if (command != 0xF2)
        reply = KEYBOARD_RESEND;
    if (command == 0xFF)
        i8042->queue_count = 0;
    keyboard_send(i8042, reply);
    if (command == 0xFF)
        keyboard_send(i8042, 0xAA); /* self test passed */
    if (command == 0xF2) {
        keyboard_send(i8042, 0xAB);
        keyboard_send(i8042, 0x83);
    }
}

static void pulse_reset(struct i8042 *i8042)
{
    i8042->counters.resets++;
    i8042->config.reset(i8042->config.ctx);
}

static void write_output_port(struct i8042 *i8042, uint8_t value)
{
    i8042->output_port = value | OUTPUT_NOT_RESET;
    if (!(value & OUTPUT_NOT_RESET))
        pulse_reset(i8042);
}

static void write_data(struct i8042 *i8042, uint8_t value)
{
    uint8_t command = i8042->parameter_of;

    i8042->last_was_command = false;
    i8042->parameter_of = 0;
    switch (command) {
    case 0:
        /* Bytes for the keyboard switch it on. */
        i8042->mode &= ~MODE_KEYBOARD_OFF;
        if (i8042->argument_of)
            keyboard_argument(i8042, value);
        else
            keyboard_command(i8042, value);
        break;
    case 0x60:
        i8042->mode = value;
        update_irq(i8042);
        break;
    case 0xD1: write_output_port(i8042, value); break;
    /* D3 answers as a controller without auxiliary port: not marked as the auxiliary device's. */
    case 0xD2:
    case 0xD3: put_out(i8042, value); break;
    }
    pump(i8042);
}

static void write_command(struct i8042 *i8042, uint8_t command)
{
    i8042->last_was_command = true;
    i8042->parameter_of = 0;
    switch (command) {
    case 0x20: put_out(i8042, i8042->mode); break;
    case 0x60:
    case 0xD1:
    case 0xD2:
    case 0xD3:
    case 0xD4: i8042->parameter_of = command; break;
    case 0xA7: i8042->mode |= MODE_AUX_OFF; break;
    case 0xA8: i8042->mode &= ~MODE_AUX_OFF; break;
    case 0xA9: put_out(i8042, 0x01); break; /* auxiliary clock line stuck: nothing there */
    case 0xAA:
        i8042->mode |= MODE_SYSTEM;
        put_out(i8042, 0x55);
        break;
    case 0xAB: put_out(i8042, 0x00); break;
    case 0xAD: i8042->mode |= MODE_KEYBOARD_OFF; break;
    case 0xAE: i8042->mode &= ~MODE_KEYBOARD_OFF; break;
    case 0xC0: put_out(i8042, 0x80); break; /* input port: keyboard not locked */
    case 0xD0: put_out(i8042, i8042->output_port); break;
    case 0xDD: i8042->output_port &= ~OUTPUT_A20; break;
    case 0xDF: i8042->output_port |= OUTPUT_A20; break;
    default:
        /* F0..FF pulse the output bits that are zero in the command; bit 0 is the processor's reset. */
        if (command < 0xF0)
            i8042->counters.errors++;
        else if (!(command & OUTPUT_NOT_RESET))
            pulse_reset(i8042);
        break;
    }
    pump(i8042);
}

static uint64_t data_read(void *ctx, uint64_t offset, unsigned size_bytes)
{
    struct i8042 *i8042 = ctx;
    uint8_t value = i8042->out;

    i8042->counters.reads++;
    i8042->out_full = false;
    update_irq(i8042);
    pump(i8042);
    return value;
}

static void data_write(void *ctx, uint64_t offset, unsigned size_bytes, uint64_t value)
{
    struct i8042 *i8042 = ctx;

    i8042->counters.writes++;
    write_data(i8042, (uint8_t)value);
}

static uint64_t status_read(void *ctx, uint64_t offset, unsigned size_bytes)
{
    struct i8042 *i8042 = ctx;

    i8042->counters.reads++;
    return STATUS_NOT_INHIBITED | (i8042->out_full ? STATUS_OUTPUT_FULL : 0) | (i8042->mode & MODE_SYSTEM ? STATUS_SYSTEM : 0) |
           (i8042->last_was_command ? STATUS_COMMAND : 0);
}

static void command_write(void *ctx, uint64_t offset, unsigned size_bytes, uint64_t value)
{
    struct i8042 *i8042 = ctx;

    i8042->counters.writes++;
    write_command(i8042, (uint8_t)value);
}

static uint64_t system_control_read(void *ctx, uint64_t offset, unsigned size_bytes)
{
    struct i8042 *i8042 = ctx;

    return i8042->output_port & OUTPUT_A20;
}

static void system_control_write(void *ctx, uint64_t offset, unsigned size_bytes, uint64_t value)
{
    struct i8042 *i8042 = ctx;

    i8042->output_port = (i8042->output_port & ~OUTPUT_A20) | (value & OUTPUT_A20);
    if (value & 1)
        pulse_reset(i8042);
}

void i8042_get_counters(const struct i8042 *i8042, struct i8042_counters *counters)
{
    *counters = i8042->counters;
}

static const struct {
    uint16_t port;
    struct region_ops ops;
} ports[] = {
    {DATA_PORT, {"i8042-data", data_read, data_write, 1, 1}},
    {COMMAND_PORT, {"i8042-command", status_read, command_write, 1, 1}},
    {SYSTEM_CONTROL_PORT, {"system-control", system_control_read, system_control_write, 1, 1}},
};

#define PORTS (sizeof(ports) / sizeof(ports[0]))

int i8042_create(struct i8042 **out, const struct i8042_config *config)
{
    struct i8042 *i8042 = calloc(1, sizeof(*i8042));
    int rc = 0;

    if (!i8042)
        return -ENOMEM;
    i8042->config = *config;
    for (unsigned i = 0; rc == 0 && i < PORTS; i++)
        rc = bus_add(config->bus, BUS_PORT, ports[i].port, 1, &ports[i].ops, i8042);
    if (rc < 0) {
        i8042_destroy(i8042);
        return rc;
    }
    i8042_reset(i8042);
    *out = i8042;
    return 0;
}

void i8042_destroy(struct i8042 *i8042)
{
    if (!i8042)
        return;
    for (unsigned i = 0; i < PORTS; i++)
        bus_remove(i8042->config.bus, BUS_PORT, ports[i].port, i8042);
    free(i8042);
}

void i8042_reset(struct i8042 *i8042)
{
    i8042->mode = MODE_DEFAULT;
    i8042->output_port = OUTPUT_NOT_RESET | OUTPUT_A20;
    i8042->out = 0;
    i8042->out_full = i8042->last_was_command = false;
    i8042->parameter_of = i8042->argument_of = 0;
    i8042->scanning = true;
    i8042->broke = false;
    i8042->queue_first = i8042->queue_count = 0;
    update_irq(i8042);
}

int i8042_state(struct i8042 *i8042, struct state_io *io)
{
    state_begin(io, "i8042", 1);
    state_u8(io, &i8042->mode);
    state_u8(io, &i8042->output_port);
    state_u8(io, &i8042->out);
    state_bool(io, &i8042->out_full);
    state_bool(io, &i8042->last_was_command);
    state_u8(io, &i8042->parameter_of);
    state_u8(io, &i8042->argument_of);
    state_bool(io, &i8042->scanning);
    state_bool(io, &i8042->broke);
    state_bytes(io, i8042->queue, sizeof(i8042->queue));
    state_u8(io, &i8042->queue_first);
    state_u8(io, &i8042->queue_count);
    if (state_loading(io)) {
        if (i8042->queue_first >= QUEUE_BYTES || i8042->queue_count > QUEUE_BYTES) {
            i8042->queue_first = i8042->queue_count = 0;
            state_fail(io, "more bytes than the queue holds");
        }
        update_irq(i8042);
    }
    return state_end(io);
}
