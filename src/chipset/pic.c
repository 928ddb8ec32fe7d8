/*
 * The 8259A pair. Intel 8259A data sheet.
 *
 * Each chip keeps the levels of its eight inputs, the request latch of those that are edge-triggered, the in-service and mask registers and the
 * initialisation sequence. After every change chip_update works out the chip's INT output: the slave's drives the master's
 * IR2, the master's the line to the processors. Level inputs (ELCR) request as long as they are high.
 * An edge stays latched when its input falls again before the acknowledgement (the real chip would then answer IR7), so that devices may pulse;
 * spurious interrupts 7 and 15 come from requests that were masked or cleared between INT and INTA.
 * Threading: with the device lock held.
 */
#include "chipset/pic.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define MASTER 0
#define SLAVE 1
#define CASCADE_IR 2
#define SPURIOUS_IR 7

#define ICW1_IC4 0x01
#define ICW1_SNGL 0x02
#define ICW1_LTIM 0x08
#define ICW1_INIT 0x10
#define ICW4_AEOI 0x02
#define ICW4_SFNM 0x10
#define OCW3_SELECT 0x08
#define OCW3_READ_ISR 0x01
#define OCW3_READ 0x02
#define OCW3_POLL 0x04
#define OCW3_SMM 0x20
#define OCW3_ESMM 0x40

#define PORT_ELCR 0x4D0

static const uint16_t chip_ports[2] = {0x20, 0xA0};
/* IRQ 0, 1, 2, 8 and 13 are edge-triggered for good (PIIX4 data sheet, 4.2.4). */
static const uint8_t elcr_writable[2] = {0xf8, 0xde};

enum init_step { INIT_DONE, INIT_ICW2, INIT_ICW3, INIT_ICW4 };

struct pic_chip {
    struct pic *pic;
    uint8_t index; /* MASTER or SLAVE */
    uint8_t lines; /* input levels */
    uint8_t latch; /* edges seen and not acknowledged */
    uint8_t isr, imr;
    uint8_t elcr;
    uint8_t base;     /* ICW2, bits 7:3 */
    uint8_t icw1, icw3, icw4;
    uint8_t step;     /* enum init_step */
    uint8_t priority; /* the input with the highest priority */
    bool rotate_on_aeoi;
    bool special_mask;
    bool poll;
    bool read_isr;
};

struct pic {
    struct bus *bus;
    struct irq_line intr;
    struct pic_chip chips[2];
};

/* ---- Requests and priorities ---- */

/* The slave's INT output stays up while it has a request, so the master's IR2 is taken as a level. */
static uint8_t level_mode(const struct pic_chip *chip)
{
    if (chip->icw1 & ICW1_LTIM)
        return 0xff;
    return chip->elcr | (chip->index == MASTER ? 1u << CASCADE_IR : 0);
}

static uint8_t chip_irr(const struct pic_chip *chip)
{
    uint8_t level = level_mode(chip);
    return (chip->latch & ~level) | (chip->lines & level);
}

/* The set input with the highest priority, or -1. */
static int highest(const struct pic_chip *chip, uint8_t inputs)
{
    for (unsigned i = 0; i < 8; i++) {
        unsigned input = (chip->priority + i) & 7;
        if (inputs >> input & 1)
            return (int)input;
    }
    return -1;
}

static unsigned rank(const struct pic_chip *chip, int input)
{
    return input < 0 ? 8 : ((unsigned)input - chip->priority) & 7;
}

/* The input that requests service now, or -1. */
static int chip_pending(const struct pic_chip *chip)
{
    if (chip->step != INIT_DONE)
        return -1;
    int request = highest(chip, chip_irr(chip) & ~chip->imr);
    if (request < 0)
        return -1;
    uint8_t blocking = chip->isr;
    if (chip->special_mask) /* what is masked does not block those below it */
        blocking &= ~chip->imr;
    /* Special fully nested: the slave may interrupt again while one of its requests is in service. */
    if ((chip->icw4 & ICW4_SFNM) && chip->index == MASTER)
        blocking &= ~(1u << CASCADE_IR);
    return rank(chip, request) < rank(chip, highest(chip, blocking)) ? request : -1;
}

static void input_set(struct pic_chip *chip, unsigned input, bool level)
{
    uint8_t bit = 1u << input;
    if (level && !(chip->lines & bit)) {
        chip->lines |= bit;
        chip->latch |= bit;
    } else if (!level) {
        chip->lines &= ~bit;
    }
}

static void pic_update(struct pic *pic)
{
    input_set(&pic->chips[MASTER], CASCADE_IR, chip_pending(&pic->chips[SLAVE]) >= 0);
    irq_line_set(&pic->intr, chip_pending(&pic->chips[MASTER]) >= 0);
}

void pic_set_irq(void *ctx, unsigned irq, bool level)
{
    struct pic *pic = ctx;
    if (irq > 15 || irq == CASCADE_IR)
        return;
    input_set(&pic->chips[irq >> 3], irq & 7, level);
    pic_update(pic);
}

/* The chip's part of an INTA cycle (or of a poll): the input now in service; -1: spurious. */
static int chip_acknowledge(struct pic_chip *chip)
{
    int input = chip_pending(chip);
    if (input < 0)
        return -1;
    uint8_t bit = 1u << input;
    chip->latch &= ~bit;
    if (!(chip->icw4 & ICW4_AEOI))
        chip->isr |= bit;
    else if (chip->rotate_on_aeoi)
        chip->priority = (input + 1) & 7;
    return input;
}

int pic_ack(struct pic *pic)
{
    struct pic_chip *chip = &pic->chips[MASTER];
    int input = chip_acknowledge(chip);
    if (input == CASCADE_IR) {
        chip = &pic->chips[SLAVE];
        input = chip_acknowledge(chip);
    }
    int vector = chip->base | (input < 0 ? SPURIOUS_IR : input);
    pic_update(pic);
    return vector;
}

/* ---- Command words ---- */

static void init_begin(struct pic_chip *chip, uint8_t value)
{
    chip->icw1 = value;
    chip->icw3 = chip->icw4 = 0;
    chip->latch = 0; /* the edge sense circuit is reset: an input must rise again */
    chip->imr = chip->isr = 0;
    chip->priority = 0;
    chip->rotate_on_aeoi = chip->special_mask = chip->poll = chip->read_isr = false;
    chip->step = INIT_ICW2;
}

/* OCW2: end of interrupt and rotation. The three high bits are R, SL, EOI. */
static void ocw2_write(struct pic_chip *chip, uint8_t value)
{
    unsigned level = value & 7;
    switch (value >> 5) {
    case 0: /* rotate in automatic EOI mode: clear */
    case 4: /* and set */
        chip->rotate_on_aeoi = value & 0x80;
        break;
    case 1:   /* non-specific EOI */
    case 5: { /* and rotate */
        uint8_t candidates = chip->special_mask ? chip->isr & ~chip->imr : chip->isr;
        int input = highest(chip, candidates);
        if (input < 0)
            break;
        chip->isr &= ~(1u << input);
        if (value & 0x80)
            chip->priority = (input + 1) & 7;
        break;
    }
    case 3: /* specific EOI */
        chip->isr &= ~(1u << level);
        break;
    case 7: /* and rotate */
        chip->isr &= ~(1u << level);
        chip->priority = (level + 1) & 7;
        break;
    case 6: /* set priority: this input becomes the lowest */
        chip->priority = (level + 1) & 7;
        break;
    }
}

static void ocw3_write(struct pic_chip *chip, uint8_t value)
{
    if (value & OCW3_POLL)
        chip->poll = true;
    if (value & OCW3_READ)
        chip->read_isr = value & OCW3_READ_ISR;
    if (value & OCW3_ESMM)
        chip->special_mask = value & OCW3_SMM;
}

static void data_write(struct pic_chip *chip, uint8_t value)
{
    switch (chip->step) {
    case INIT_DONE:
        chip->imr = value;
        return;
    case INIT_ICW2:
        chip->base = value & 0xf8;
        chip->step = !(chip->icw1 & ICW1_SNGL) ? INIT_ICW3 : (chip->icw1 & ICW1_IC4) ? INIT_ICW4 : INIT_DONE;
        return;
    case INIT_ICW3: /* how the chips are wired; here that is fixed */
        chip->icw3 = value;
        chip->step = (chip->icw1 & ICW1_IC4) ? INIT_ICW4 : INIT_DONE;
        return;
    case INIT_ICW4:
        chip->icw4 = value;
        chip->step = INIT_DONE;
        return;
    }
}

static void chip_write(void *ctx, uint64_t offset, unsigned size_bytes, uint64_t value64)
{
    struct pic_chip *chip = ctx;
    uint8_t value = (uint8_t)value64;
    if (offset == 1)
        data_write(chip, value);
    else if (value & ICW1_INIT)
        init_begin(chip, value);
    else if (value & OCW3_SELECT)
        ocw3_write(chip, value);
    else
        ocw2_write(chip, value);
    pic_update(chip->pic);
}

/* A poll is an acknowledgement by reading: bit 7 tells whether there was a request, bits 2:0 which. */
static uint8_t chip_poll(struct pic_chip *chip)
{
    chip->poll = false;
    int input = chip_acknowledge(chip);
    pic_update(chip->pic);
    return input < 0 ? 0 : 0x80 | (uint8_t)input;
}

static uint64_t chip_read(void *ctx, uint64_t offset, unsigned size_bytes)
{
    struct pic_chip *chip = ctx;
    if (chip->poll)
        return chip_poll(chip);
    if (offset == 1)
        return chip->imr;
    return chip->read_isr ? chip->isr : chip_irr(chip);
}

static uint64_t elcr_read(void *ctx, uint64_t offset, unsigned size_bytes)
{
    struct pic *pic = ctx;
    return pic->chips[offset].elcr;
}

static void elcr_write(void *ctx, uint64_t offset, unsigned size_bytes, uint64_t value)
{
    struct pic *pic = ctx;
    pic->chips[offset].elcr = (uint8_t)value & elcr_writable[offset];
    pic_update(pic);
}

static const struct region_ops chip_ops = {
    .name = "pic", .read = chip_read, .write = chip_write, .size_min = 1, .size_max = 1};
static const struct region_ops elcr_ops = {
    .name = "pic-elcr", .read = elcr_read, .write = elcr_write, .size_min = 1, .size_max = 1};

/* ---- Life ---- */

void pic_reset(struct pic *pic)
{
    for (unsigned i = 0; i < 2; i++) {
        struct pic_chip *chip = &pic->chips[i];
        uint8_t lines = chip->lines;
        *chip = (struct pic_chip){.pic = pic, .index = (uint8_t)i, .lines = lines};
    }
    /* Nothing requests before software initialised the chips. */
    pic->chips[MASTER].imr = pic->chips[SLAVE].imr = 0xff;
    pic_update(pic);
}

int pic_create(struct pic **out, const struct pic_config *config)
{
    *out = NULL;
    struct pic *pic = calloc(1, sizeof(*pic));
    if (!pic)
        return -ENOMEM;
    pic->bus = config->bus;
    pic->intr = config->intr;
    pic_reset(pic);
    int rc = 0;
    for (unsigned i = 0; i < 2 && rc == 0; i++)
        rc = bus_add(pic->bus, BUS_PORT, chip_ports[i], 2, &chip_ops, &pic->chips[i]);
    if (rc == 0)
        rc = bus_add(pic->bus, BUS_PORT, PORT_ELCR, 2, &elcr_ops, pic);
    if (rc < 0) {
        pic_destroy(pic);
        return rc;
    }
    *out = pic;
    return 0;
}

void pic_destroy(struct pic *pic)
{
    if (!pic)
        return;
    for (unsigned i = 0; i < 2; i++)
        bus_remove(pic->bus, BUS_PORT, chip_ports[i], &pic->chips[i]);
    bus_remove(pic->bus, BUS_PORT, PORT_ELCR, pic);
    free(pic);
}

static void chip_state(struct pic_chip *chip, struct state_io *io)
{
    uint8_t *const bytes[] = {&chip->lines, &chip->latch, &chip->isr,  &chip->imr,  &chip->elcr, &chip->base,
                              &chip->icw1,  &chip->icw3,  &chip->icw4, &chip->step, &chip->priority};
    bool *const flags[] = {&chip->rotate_on_aeoi, &chip->special_mask, &chip->poll, &chip->read_isr};
    for (size_t i = 0; i < sizeof(bytes) / sizeof(bytes[0]); i++)
        state_u8(io, bytes[i]);
    for (size_t i = 0; i < sizeof(flags) / sizeof(flags[0]); i++)
        state_bool(io, flags[i]);
    if (state_loading(io) && (chip->step > INIT_ICW4 || chip->priority > 7 || (chip->base & 7) ||
                              (chip->elcr & ~elcr_writable[chip->index])))
        state_fail(io, "8259 in an impossible state");
}

int pic_state(struct pic *pic, struct state_io *io)
{
    state_begin(io, "pic", 1);
    chip_state(&pic->chips[MASTER], io);
    chip_state(&pic->chips[SLAVE], io);
    int rc = state_end(io);
    if (!state_loading(io))
        return rc;
    if (rc < 0) {
        pic->chips[MASTER].lines = pic->chips[SLAVE].lines = 0;
        pic_reset(pic);
    }
    /* The processors may not know this level yet. */
    bool level = chip_pending(&pic->chips[MASTER]) >= 0;
    pic->intr.level = !level;
    irq_line_set(&pic->intr, level);
    return rc;
}

void pic_dump(const struct pic *pic, FILE *out)
{
    for (unsigned i = 0; i < 2; i++) {
        const struct pic_chip *chip = &pic->chips[i];
        fprintf(out, "pic %s: irr %02x isr %02x imr %02x lines %02x elcr %02x base %02x init step %u%s\n",
                i == MASTER ? "master" : "slave", chip_irr(chip), chip->isr, chip->imr, chip->lines, chip->elcr, chip->base,
                chip->step, i == MASTER && pic->intr.level ? " intr" : "");
    }
}
