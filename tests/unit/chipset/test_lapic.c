/* Local APICs: priorities, EOI, timers, IPIs and messages, x2APIC MSR checks, LINT0, state. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "chipset/lapic.h"
#include "state/inputs.h"
#include "util/log.h"

#define CPUS 4
#define MS 1000000ull

enum { ID = 0x20, VERSION = 0x30, TPR = 0x80, PPR = 0xA0, EOI = 0xB0, LDR = 0xD0, DFR = 0xE0, SVR = 0xF0, ISR = 0x100,
       TMR = 0x180, IRR = 0x200, ESR = 0x280, ICR_LOW = 0x300, ICR_HIGH = 0x310, LVT_T = 0x320, LVT_LINT0 = 0x350,
       LVT_ERR = 0x370, INITIAL = 0x380, CURRENT = 0x390, DIVIDE = 0x3E0 };

struct rig {
    struct loop *loop;
    struct lapic_set *set;
    int wakes[CPUS], inits[CPUS], startups[CPUS], eois, pic_acks;
    uint8_t startup_vector, eoi_vector;
    int pic_vector;
};

static void on_wake(void *ctx, unsigned cpu)
{
    ((struct rig *)ctx)->wakes[cpu]++;
}
static void on_init(void *ctx, unsigned cpu)
{
    ((struct rig *)ctx)->inits[cpu]++;
}
static void on_startup(void *ctx, unsigned cpu, uint8_t vector)
{
    ((struct rig *)ctx)->startups[cpu]++;
    ((struct rig *)ctx)->startup_vector = vector;
}
static void on_eoi(void *ctx, uint8_t vector)
{
    ((struct rig *)ctx)->eois++;
    ((struct rig *)ctx)->eoi_vector = vector;
}
static int on_pic_ack(void *ctx)
{
    struct rig *rig = ctx;
    rig->pic_acks++;
    if (rig->pic_vector >= 0)
        lapic_set_extint(rig->set, false);
    return rig->pic_vector;
}
/* The test's TSC runs at 2 GHz. */
static uint64_t on_tsc_now(void *ctx, unsigned cpu)
{
    return inputs_now_ns() * 2;
}
static uint64_t on_tsc_to_ns(void *ctx, unsigned cpu, uint64_t tsc)
{
    return (tsc + 1) / 2;
}

static const struct lapic_ops ops = {
    .wake = on_wake, .init = on_init, .startup = on_startup, .eoi = on_eoi, .pic_ack = on_pic_ack, .tsc_now = on_tsc_now,
    .tsc_to_ns = on_tsc_to_ns};

static uint32_t rd(struct rig *rig, unsigned cpu, uint32_t offset)
{
    return (uint32_t)lapic_mmio_read(rig->set, cpu, offset, 4);
}
static void wr(struct rig *rig, unsigned cpu, uint32_t offset, uint32_t value)
{
    lapic_mmio_write(rig->set, cpu, offset, 4, value);
}

static int setup(void **state)
{
    static struct rig rig;
    memset(&rig, 0, sizeof(rig));
    rig.pic_vector = -1;
    assert_int_equal(loop_create(&rig.loop, NULL), 0);
    assert_int_equal(lapic_set_create(&rig.set, CPUS, rig.loop, &ops, &rig), 0);
    for (unsigned cpu = 0; cpu < CPUS; cpu++)
        wr(&rig, cpu, SVR, 0x1ff);
    *state = &rig;
    return 0;
}

static int teardown(void **state)
{
    struct rig *rig = *state;
    lapic_set_destroy(rig->set);
    loop_destroy(rig->loop);
    return 0;
}

static void to_x2apic(struct rig *rig, unsigned cpu)
{
    uint64_t base;
    assert_int_equal(lapic_msr_read(rig->set, cpu, 0x1B, &base), 0);
    assert_int_equal(lapic_msr_write(rig->set, cpu, 0x1B, base | 0xC00), 0);
}

static void message(struct rig *rig, uint64_t address, uint32_t data)
{
    struct msi_target target = lapic_msi_target(rig->set);
    msi_send(&target, address, data);
}

static void test_reset_values(void **state)
{
    struct rig *rig = *state;
    lapic_reset(rig->set, 1, false);
    assert_int_equal(rd(rig, 1, ID), 1u << 24);
    assert_int_equal(rd(rig, 1, VERSION), 0x00050014);
    assert_int_equal(rd(rig, 1, SVR), 0xff);
    assert_int_equal(rd(rig, 1, DFR), 0xffffffff);
    for (uint32_t lvt = LVT_T; lvt <= LVT_ERR; lvt += 0x10)
        assert_int_equal(rd(rig, 1, lvt), 0x10000);
    wr(rig, 1, LVT_T, 0x30); /* software-disabled: the mask sticks */
    assert_int_equal(rd(rig, 1, LVT_T), 0x10030);
    uint64_t base;
    assert_int_equal(lapic_msr_read(rig->set, 0, 0x1B, &base), 0);
    assert_int_equal(base, 0xFEE00900);
    assert_int_equal(lapic_mmio_base(rig->set, 0), 0xFEE00000);
    assert_int_equal(lapic_msr_read(rig->set, 0, 0x10, &base), -ENOENT);
}

static void test_priorities_and_eoi(void **state)
{
    struct rig *rig = *state;
    assert_int_equal(lapic_interrupt_peek(rig->set, 0), -1);
    message(rig, 0xFEE00000, 0x41);
    assert_int_equal(rig->wakes[0], 1);
    assert_int_equal(lapic_interrupt_peek(rig->set, 0), 0x41);
    message(rig, 0xFEE00000, 0x85);
    assert_int_equal(lapic_interrupt_ack(rig->set, 0), 0x85);
    assert_int_equal(rd(rig, 0, PPR), 0x80);
    assert_int_equal(lapic_interrupt_peek(rig->set, 0), -1); /* 0x41 waits below 0x85 in service */
    assert_int_equal(lapic_interrupt_ack(rig->set, 0), -1);
    message(rig, 0xFEE00000, 0x89); /* the same class does not nest */
    assert_int_equal(lapic_interrupt_peek(rig->set, 0), -1);
    message(rig, 0xFEE00000, 0x91);
    assert_int_equal(lapic_interrupt_ack(rig->set, 0), 0x91);
    assert_int_equal(rd(rig, 0, ISR + 0x40), 1u << 5 | 1u << 17);
    wr(rig, 0, EOI, 0);
    assert_int_equal(lapic_interrupt_peek(rig->set, 0), -1);
    wr(rig, 0, EOI, 0);
    assert_int_equal(lapic_interrupt_peek(rig->set, 0), 0x89);
    lapic_cr8_write(rig->set, 0, 8);
    assert_int_equal(rd(rig, 0, TPR), 0x80);
    assert_int_equal(lapic_interrupt_peek(rig->set, 0), -1);
    int wakes = rig->wakes[0];
    lapic_cr8_write(rig->set, 0, 7);
    assert_int_equal(rig->wakes[0], wakes + 1);
    assert_int_equal(lapic_cr8_read(rig->set, 0), 7);
    assert_int_equal(lapic_interrupt_ack(rig->set, 0), 0x89);
    wr(rig, 0, EOI, 0);
    assert_int_equal(lapic_interrupt_peek(rig->set, 0), -1); /* 0x41 is below CR8 */
    lapic_cr8_write(rig->set, 0, 0);
    assert_int_equal(lapic_interrupt_ack(rig->set, 0), 0x41);
    wr(rig, 0, EOI, 0);
    wr(rig, 0, EOI, 0); /* nothing in service: no effect */
    assert_int_equal(rig->eois, 0);
}

static void test_level_eoi_broadcast(void **state)
{
    struct rig *rig = *state;
    message(rig, 0xFEE02000, 0xC050); /* level, assert */
    assert_int_equal(rd(rig, 2, TMR + 0x20), 1u << 16);
    assert_int_equal(lapic_interrupt_ack(rig->set, 2), 0x50);
    wr(rig, 2, EOI, 0);
    assert_int_equal(rig->eois, 1);
    assert_int_equal(rig->eoi_vector, 0x50);
    message(rig, 0xFEE02000, 0x8050); /* de-assert says nothing */
    assert_int_equal(lapic_interrupt_peek(rig->set, 2), -1);
}

static void test_ipi_destinations(void **state)
{
    struct rig *rig = *state;
    wr(rig, 0, ICR_HIGH, 3u << 24);
    wr(rig, 0, ICR_LOW, 0x40);
    assert_int_equal(lapic_interrupt_ack(rig->set, 3), 0x40);
    wr(rig, 0, ICR_LOW, 0xC0041); /* others */
    assert_int_equal(lapic_interrupt_peek(rig->set, 0), -1);
    assert_int_equal(lapic_interrupt_peek(rig->set, 1), 0x41);
    assert_int_equal(lapic_interrupt_peek(rig->set, 2), 0x41);
    wr(rig, 0, ICR_LOW, 0x80062); /* all */
    for (unsigned cpu = 0; cpu < CPUS; cpu++)
        assert_int_equal(lapic_interrupt_ack(rig->set, cpu), 0x62);
    wr(rig, 1, ICR_LOW, 0x40073); /* self */
    assert_int_equal(lapic_interrupt_ack(rig->set, 1), 0x73);
    assert_int_equal(rd(rig, 1, ICR_LOW), 0x40073);

    /* Flat logical: 1 << cpu. */
    for (unsigned cpu = 0; cpu < CPUS; cpu++)
        wr(rig, cpu, LDR, 1u << (24 + cpu));
    wr(rig, 0, ICR_HIGH, 6u << 24);
    wr(rig, 0, ICR_LOW, 0x884);
    assert_int_equal(lapic_interrupt_peek(rig->set, 0), -1);
    assert_int_equal(lapic_interrupt_ack(rig->set, 1), 0x84);
    assert_int_equal(lapic_interrupt_ack(rig->set, 2), 0x84);
    assert_int_equal(lapic_interrupt_peek(rig->set, 3), -1);

    /* Cluster: cpu 2 and 3 are members 0 and 1 of cluster 5. */
    for (unsigned cpu = 2; cpu < CPUS; cpu++) {
        wr(rig, cpu, DFR, 0);
        wr(rig, cpu, LDR, 0x50000000u | 1u << (24 + cpu - 2));
    }
    wr(rig, 0, ICR_HIGH, 0x52u << 24);
    wr(rig, 0, ICR_LOW, 0x894);
    assert_int_equal(lapic_interrupt_peek(rig->set, 2), -1);
    assert_int_equal(lapic_interrupt_ack(rig->set, 3), 0x94);
}

static void test_lowest_priority(void **state)
{
    struct rig *rig = *state;
    for (unsigned cpu = 0; cpu < CPUS; cpu++) {
        wr(rig, cpu, LDR, 1u << (24 + cpu));
        wr(rig, cpu, TPR, cpu == 2 ? 0x10 : 0x20);
    }
    for (int i = 0; i < 3; i++) {
        message(rig, 0xFEE0F004 | 0xF << 12, 0x150); /* logical, lowest priority */
        for (unsigned cpu = 0; cpu < CPUS; cpu++)
            assert_int_equal(lapic_interrupt_peek(rig->set, cpu), cpu == 2 ? 0x50 : -1);
        assert_int_equal(lapic_interrupt_ack(rig->set, 2), 0x50);
        wr(rig, 2, EOI, 0);
    }
    /* Ties go round. */
    int taken[CPUS] = {0};
    wr(rig, 2, TPR, 0x20);
    for (int i = 0; i < 8; i++) {
        message(rig, 0xFEEFF00C, 0x60);
        for (unsigned cpu = 0; cpu < CPUS; cpu++) {
            if (lapic_interrupt_ack(rig->set, cpu) == 0x60) {
                taken[cpu]++;
                wr(rig, cpu, EOI, 0);
            }
        }
    }
    for (unsigned cpu = 0; cpu < CPUS; cpu++)
        assert_int_equal(taken[cpu], 2);
}

static void test_init_startup_nmi(void **state)
{
    struct rig *rig = *state;
    wr(rig, 0, ICR_HIGH, 1u << 24);
    wr(rig, 0, ICR_LOW, 0xC500);
    assert_int_equal(rig->inits[1], 1);
    wr(rig, 0, ICR_LOW, 0x8500); /* level de-assert */
    assert_int_equal(rig->inits[1], 1);
    wr(rig, 0, ICR_LOW, 0x69A);
    assert_int_equal(rig->startups[1], 1);
    assert_int_equal(rig->startup_vector, 0x9A);
    wr(rig, 0, ICR_LOW, 0xC0500 | 0x4000); /* INIT to all others */
    assert_int_equal(rig->inits[0], 0);
    assert_int_equal(rig->inits[3], 1);

    wr(rig, 0, ICR_LOW, 0x400);
    assert_true(lapic_nmi_take(rig->set, 1));
    assert_false(lapic_nmi_take(rig->set, 1));
    lapic_inject_nmi(rig->set, 2);
    assert_true(lapic_nmi_take(rig->set, 2));
    lapic_inject_nmi(rig->set, 77);
}

static void test_errors(void **state)
{
    struct rig *rig = *state;
    wr(rig, 0, LVT_ERR, 0xE0);
    wr(rig, 0, ICR_LOW, 0x40005); /* vector 5 */
    assert_int_equal(lapic_interrupt_ack(rig->set, 0), 0xE0);
    wr(rig, 0, EOI, 0);
    assert_int_equal(rd(rig, 0, ESR), 0);
    wr(rig, 0, ESR, 0);
    assert_int_equal(rd(rig, 0, ESR), 0x20);
    message(rig, 0xFEE00000, 0x0F);
    rd(rig, 0, 0x3F0);
    wr(rig, 0, ESR, 0);
    assert_int_equal(rd(rig, 0, ESR), 0xC0);
    wr(rig, 0, ESR, 0);
    assert_int_equal(rd(rig, 0, ESR), 0);
    message(rig, 0x12345678, 0x40); /* not for any local APIC */
}

static void test_software_disabled(void **state)
{
    struct rig *rig = *state;
    wr(rig, 0, LVT_T, 0x30);
    wr(rig, 0, SVR, 0xff);
    assert_int_equal(rd(rig, 0, LVT_T), 0x10030);
    message(rig, 0xFEE00000, 0x40);
    assert_int_equal(lapic_interrupt_peek(rig->set, 0), -1);
    message(rig, 0xFEE00000, 0x400);
    assert_true(lapic_nmi_take(rig->set, 0)); /* NMI and INIT still arrive */
    message(rig, 0xFEE00000, 0x500);
    assert_int_equal(rig->inits[0], 1);
}

static void test_mode_changes(void **state)
{
    struct rig *rig = *state;
    const uint64_t base = 0xFEE00000;
    uint64_t value;
    assert_int_equal(lapic_msr_read(rig->set, 1, 0x802, &value), -EINVAL); /* xAPIC mode */
    assert_int_equal(lapic_msr_write(rig->set, 1, 0x1B, base | 0x400), -EINVAL);
    assert_int_equal(lapic_msr_write(rig->set, 1, 0x1B, base | 0x801), -EINVAL);
    assert_int_equal(lapic_msr_write(rig->set, 1, 0x1B, base | 1ull << 60), -EINVAL);
    assert_int_equal(lapic_msr_write(rig->set, 1, 0x1B, base | 0xC00), 0);
    assert_int_equal(lapic_mmio_base(rig->set, 1), UINT64_MAX);
    assert_int_equal(lapic_msr_write(rig->set, 1, 0x1B, base | 0x800), -EINVAL);
    assert_int_equal(lapic_msr_write(rig->set, 1, 0x1B, base), 0);
    assert_int_equal(lapic_msr_write(rig->set, 1, 0x1B, base | 0xC00), -EINVAL);
    assert_int_equal(lapic_msr_write(rig->set, 1, 0x1B, base | 0x800), 0);
    assert_int_equal(rd(rig, 1, SVR), 0xff); /* going through disabled reset it */
    assert_int_equal(lapic_msr_write(rig->set, 1, 0x1B, 0xD0000000 | 0x800), 0);
    assert_int_equal(lapic_mmio_base(rig->set, 1), 0xD0000000);
}

static void test_x2apic_msrs(void **state)
{
    struct rig *rig = *state;
    struct lapic_set *set = rig->set;
    uint64_t value;
    for (unsigned cpu = 0; cpu < CPUS; cpu++)
        to_x2apic(rig, cpu);
    assert_int_equal(lapic_msr_read(set, 3, 0x802, &value), 0);
    assert_int_equal(value, 3);
    assert_int_equal(lapic_msr_read(set, 3, 0x80D, &value), 0);
    assert_int_equal(value, 8);
    static const struct {
        uint32_t index;
        uint64_t value;
        int rc;
    } writes[] = {
        {0x802, 0, -EINVAL},  {0x803, 0, -EINVAL},       {0x808, 0x20, 0},      {0x808, 0x100, -EINVAL},
        {0x80B, 0, 0},        {0x80B, 1, -EINVAL},       {0x80D, 0, -EINVAL},   {0x80E, 0, -EINVAL},
        {0x80F, 0x1ff, 0},    {0x80F, 0x11ff, -EINVAL},  {0x828, 0, 0},         {0x828, 1, -EINVAL},
        {0x831, 0, -EINVAL},  {0x832, 0x500ff, 0},       {0x832, 1u << 20, -EINVAL}, {0x835, 0x10700, 0},
        {0x838, 1ull << 32, -EINVAL}, {0x83E, 0xB, 0},   {0x83E, 4, -EINVAL},   {0x83F, 0x100, -EINVAL},
        {0x830, 1u << 12, -EINVAL}, {0x830, 1u << 20, -EINVAL}, {0x840, 0, -EINVAL}, {0x8FF, 0, -EINVAL},
        {0x900, 0, -ENOENT},  {0x810, 0, -EINVAL},       {0x839, 0, -EINVAL},
    };
    for (size_t i = 0; i < sizeof(writes) / sizeof(writes[0]); i++)
        assert_int_equal(lapic_msr_write(set, 0, writes[i].index, writes[i].value), writes[i].rc);
    static const uint32_t unreadable[] = {0x80B, 0x83F, 0x809, 0x80C, 0x80E, 0x831, 0x800, 0x8A0};
    for (size_t i = 0; i < sizeof(unreadable) / sizeof(unreadable[0]); i++)
        assert_int_equal(lapic_msr_read(set, 0, unreadable[i], &value), -EINVAL);

    lapic_cr8_write(set, 0, 0);
    assert_int_equal(lapic_msr_write(set, 0, 0x83F, 0x55), 0);
    assert_int_equal(lapic_interrupt_ack(set, 0), 0x55);
    assert_int_equal(lapic_msr_write(set, 0, 0x80B, 0), 0);
    assert_int_equal(lapic_msr_write(set, 0, 0x830, 2ull << 32 | 0x66), 0);
    assert_int_equal(lapic_interrupt_ack(set, 2), 0x66);
    assert_int_equal(lapic_msr_read(set, 0, 0x830, &value), 0);
    assert_int_equal(value, 2ull << 32 | 0x66);
    assert_int_equal(lapic_msr_write(set, 0, 0x830, 0xAull << 32 | 0x877), 0); /* logical: cpus 1 and 3 */
    assert_int_equal(lapic_interrupt_ack(set, 1), 0x77);
    assert_int_equal(lapic_interrupt_peek(set, 0), -1);
    assert_int_equal(lapic_interrupt_ack(set, 3), 0x77);
    assert_int_equal(lapic_msr_write(set, 0, 0x830, 0xffffffffull << 32 | 0x88), 0); /* everybody */
    for (unsigned cpu = 0; cpu < CPUS; cpu++)
        assert_int_equal(lapic_interrupt_ack(set, cpu), 0x88);
    assert_int_equal(lapic_msr_write(set, 0, 0x830, 0xffull << 32 | 0x99), 0); /* id 255: nobody */
    for (unsigned cpu = 0; cpu < CPUS; cpu++)
        assert_int_equal(lapic_interrupt_peek(set, cpu), -1);
    lapic_reset(set, 3, true);
    assert_int_equal(lapic_msr_read(set, 3, 0x802, &value), 0); /* INIT keeps the mode */
}

static void wait_for(struct rig *rig, unsigned cpu, int vector)
{
    uint64_t end = inputs_now_ns() + 1000 * MS;
    while (lapic_interrupt_peek(rig->set, cpu) != vector && inputs_now_ns() < end)
        assert_int_equal(loop_run_once(rig->loop, 100), 0);
    assert_int_equal(lapic_interrupt_ack(rig->set, cpu), vector);
    wr(rig, cpu, EOI, 0);
}

static void test_timer_one_shot(void **state)
{
    struct rig *rig = *state;
    uint64_t start = inputs_now_ns();
    wr(rig, 0, LVT_T, 0x31);
    wr(rig, 0, DIVIDE, 0x3); /* by 16 */
    wr(rig, 0, INITIAL, 16 * MS / 16);
    uint32_t current = rd(rig, 0, CURRENT);
    assert_true(current > 0 && current <= 16 * MS / 16);
    wait_for(rig, 0, 0x31);
    assert_true(inputs_now_ns() >= start + 16 * MS);
    assert_int_equal(rd(rig, 0, CURRENT), 0);
    assert_int_equal(rd(rig, 0, INITIAL), 16 * MS / 16);
    loop_run_once(rig->loop, 4);
    assert_int_equal(lapic_interrupt_peek(rig->set, 0), -1);
}

static void test_timer_masked_counts(void **state)
{
    struct rig *rig = *state;
    wr(rig, 0, LVT_T, 0x10031);
    wr(rig, 0, DIVIDE, 0xB);
    wr(rig, 0, INITIAL, 1000000);
    loop_run_once(rig->loop, 3);
    assert_int_equal(rd(rig, 0, CURRENT), 0);
    wr(rig, 0, LVT_T, 0x31); /* what expired while masked is gone */
    assert_int_equal(lapic_interrupt_peek(rig->set, 0), -1);
}

static void test_timer_periodic(void **state)
{
    struct rig *rig = *state;
    uint64_t start = inputs_now_ns();
    wr(rig, 1, LVT_T, 0x20032);
    wr(rig, 1, DIVIDE, 0xB);
    wr(rig, 1, INITIAL, 1 * MS);
    for (int i = 1; i <= 4; i++)
        wait_for(rig, 1, 0x32);
    assert_true(inputs_now_ns() >= start + 4 * MS);
    wr(rig, 1, INITIAL, 1); /* a nanosecond: interrupts, but no storm */
    int rounds = 0;
    start = inputs_now_ns();
    while (inputs_now_ns() < start + 5 * MS) {
        loop_run_once(rig->loop, 5);
        rounds++;
    }
    assert_true(rounds < 120);
    wr(rig, 1, INITIAL, 0);
    loop_run_once(rig->loop, 1);
    if (lapic_interrupt_ack(rig->set, 1) >= 0)
        wr(rig, 1, EOI, 0);
    loop_run_once(rig->loop, 1);
    assert_int_equal(lapic_interrupt_peek(rig->set, 1), -1);
}

static void test_timer_deadline(void **state)
{
    struct rig *rig = *state;
    uint64_t value;
    assert_int_equal(lapic_msr_write(rig->set, 0, 0x6E0, 12345), 0); /* another mode: ignored */
    assert_int_equal(lapic_msr_read(rig->set, 0, 0x6E0, &value), 0);
    assert_int_equal(value, 0);
    wr(rig, 0, LVT_T, 0x40033);
    wr(rig, 0, INITIAL, 100); /* ignored in this mode */
    assert_int_equal(rd(rig, 0, CURRENT), 0);
    uint64_t deadline = on_tsc_now(NULL, 0) + 2 * 15 * MS;
    assert_int_equal(lapic_msr_write(rig->set, 0, 0x6E0, deadline), 0);
    assert_int_equal(lapic_msr_read(rig->set, 0, 0x6E0, &value), 0);
    assert_int_equal(value, deadline);
    wait_for(rig, 0, 0x33);
    assert_true(on_tsc_now(NULL, 0) >= deadline);
    assert_int_equal(lapic_msr_read(rig->set, 0, 0x6E0, &value), 0);
    assert_int_equal(value, 0);
    /* In the past: at once, without the loop. */
    assert_int_equal(lapic_msr_write(rig->set, 0, 0x6E0, 1), 0);
    assert_int_equal(lapic_interrupt_ack(rig->set, 0), 0x33);
    wr(rig, 0, EOI, 0);
    /* Leaving the mode disarms. */
    assert_int_equal(lapic_msr_write(rig->set, 0, 0x6E0, on_tsc_now(NULL, 0) + 2 * MS), 0);
    wr(rig, 0, LVT_T, 0x33);
    loop_run_once(rig->loop, 3);
    assert_int_equal(lapic_interrupt_peek(rig->set, 0), -1);
}

static void test_extint(void **state)
{
    struct rig *rig = *state;
    lapic_reset(rig->set, 0, false);
    lapic_set_extint(rig->set, true);
    assert_int_equal(lapic_interrupt_peek(rig->set, 0), -1); /* masked */
    lapic_set_virtual_wire(rig->set, 0);
    lapic_set_virtual_wire(rig->set, 1);
    assert_true(lapic_interrupt_peek(rig->set, 0) >= 0);
    assert_int_equal(lapic_interrupt_peek(rig->set, 1), -1);
    rig->pic_vector = 0x08;
    assert_int_equal(lapic_interrupt_ack(rig->set, 0), 0x08);
    assert_int_equal(lapic_interrupt_peek(rig->set, 0), -1);
    assert_int_equal(rd(rig, 0, ISR), 0);
    /* Globally disabled, the pin is INTR. */
    assert_int_equal(lapic_msr_write(rig->set, 0, 0x1B, 0xFEE00100), 0);
    lapic_set_extint(rig->set, true);
    assert_int_equal(lapic_interrupt_ack(rig->set, 0), 0x08);
    /* LINT0 in fixed mode: one interrupt an edge. */
    wr(rig, 2, LVT_LINT0, 0x45);
    lapic_set_extint(rig->set, true);
    lapic_set_extint(rig->set, true);
    assert_int_equal(lapic_interrupt_ack(rig->set, 2), 0x45);
    wr(rig, 2, EOI, 0);
    assert_int_equal(lapic_interrupt_peek(rig->set, 2), -1);
    /* And level: again after each EOI while high. */
    wr(rig, 2, LVT_LINT0, 0x8045);
    assert_int_equal(lapic_interrupt_ack(rig->set, 2), 0x45);
    assert_int_equal(rd(rig, 2, LVT_LINT0), 0xC045);
    wr(rig, 2, EOI, 0);
    assert_int_equal(lapic_interrupt_ack(rig->set, 2), 0x45);
    lapic_set_extint(rig->set, false);
    wr(rig, 2, EOI, 0);
    assert_int_equal(lapic_interrupt_peek(rig->set, 2), -1);
}

static void test_odd_accesses(void **state)
{
    struct rig *rig = *state;
    wr(rig, 0, TPR, 0x5A);
    assert_int_equal(lapic_mmio_read(rig->set, 0, TPR, 1), 0x5A);
    assert_int_equal(lapic_mmio_read(rig->set, 0, SVR + 1, 1), 1);
    assert_int_equal(lapic_mmio_read(rig->set, 0, SVR, 8), 0x1ff);
    assert_int_equal(lapic_mmio_read(rig->set, 0, TPR + 4, 4), 0);
    lapic_mmio_write(rig->set, 0, TPR, 1, 0xff);
    lapic_mmio_write(rig->set, 0, TPR + 4, 4, 0xff);
    assert_int_equal(rd(rig, 0, TPR), 0x5A);
}

static void test_state(void **state)
{
    struct rig *rig = *state;
    to_x2apic(rig, 3);
    message(rig, 0xFEE00000, 0x41);
    message(rig, 0xFEE00000, 0xC085);
    assert_int_equal(lapic_interrupt_ack(rig->set, 0), 0x85);
    wr(rig, 1, LVT_T, 0x20044);
    wr(rig, 1, DIVIDE, 0xB);
    wr(rig, 1, INITIAL, 50 * MS);
    lapic_inject_nmi(rig->set, 2);

    struct state_io *writer = state_writer_create();
    assert_int_equal(lapic_state(rig->set, writer), 0);
    size_t size;
    const void *data = state_writer_data(writer, &size);

    struct lapic_set *old = rig->set;
    assert_int_equal(lapic_set_create(&rig->set, CPUS, rig->loop, &ops, rig), 0);
    lapic_set_destroy(old);
    struct state_io *reader = state_reader_create(data, size);
    assert_int_equal(lapic_state(rig->set, reader), 0);
    state_io_destroy(reader);

    assert_int_equal(rd(rig, 0, PPR), 0x80);
    wr(rig, 0, EOI, 0);
    assert_int_equal(rig->eois, 1);
    assert_int_equal(lapic_interrupt_ack(rig->set, 0), 0x41);
    assert_int_equal(lapic_mmio_base(rig->set, 3), UINT64_MAX);
    assert_true(lapic_nmi_take(rig->set, 2));
    uint32_t current = rd(rig, 1, CURRENT);
    assert_true(current > 0 && current <= 50 * MS);
    wait_for(rig, 1, 0x44);

    /* Not for a machine with another number of processors; nothing half-loaded remains. */
    struct lapic_set *other;
    assert_int_equal(lapic_set_create(&other, CPUS + 1, rig->loop, &ops, rig), 0);
    reader = state_reader_create(data, size);
    assert_true(lapic_state(other, reader) < 0);
    assert_int_equal(lapic_mmio_base(other, 3), 0xFEE00000);
    state_io_destroy(reader);
    lapic_set_destroy(other);
    state_io_destroy(writer);
}

static void sleep_until(uint64_t ns)
{
    while (inputs_now_ns() < ns)
        continue;
}

/* A timer that expired while nobody looked: its interrupt comes where the state goes, once. */
static void test_expired_when_saved(void **state)
{
    struct rig *rig = *state;
    static const struct {
        uint32_t lvt;
        bool deadline;
    } modes[] = {{0x31, false}, {0x20031, false}, {0x40031, true}};
    for (unsigned i = 0; i < sizeof modes / sizeof *modes; i++) {
        wr(rig, 1, LVT_T, modes[i].lvt);
        wr(rig, 1, DIVIDE, 0xB);
        uint64_t now = inputs_now_ns();
        if (modes[i].deadline)
            assert_int_equal(lapic_msr_write(rig->set, 1, 0x6E0, on_tsc_now(NULL, 1) + 2 * MS), 0);
        else
            wr(rig, 1, INITIAL, 20 * MS);
        sleep_until(now + 21 * MS);

        struct state_io *writer = state_writer_create();
        assert_int_equal(lapic_state(rig->set, writer), 0);
        size_t size;
        const void *data = state_writer_data(writer, &size);
        struct lapic_set *old = rig->set;
        assert_int_equal(lapic_set_create(&rig->set, CPUS, rig->loop, &ops, rig), 0);
        struct state_io *reader = state_reader_create(data, size);
        assert_int_equal(lapic_state(rig->set, reader), 0);
        wait_for(rig, 1, 0x31);
        assert_int_equal(lapic_interrupt_peek(rig->set, 1), -1);

        lapic_set_destroy(rig->set);
        rig->set = old; /* and it is not lost where it was */
        wait_for(rig, 1, 0x31);
        if (!modes[i].deadline)
            wr(rig, 1, INITIAL, 0);
        state_io_destroy(reader);
        state_io_destroy(writer);
    }
}

/* The same on the way to an engine that has the APICs itself. */
static void test_expired_when_given(void **state)
{
    struct rig *rig = *state;
    struct apic_state given;
    wr(rig, 1, LVT_T, 0x40031);
    uint64_t now = inputs_now_ns();
    assert_int_equal(lapic_msr_write(rig->set, 1, 0x6E0, on_tsc_now(NULL, 1) + 2 * MS), 0);
    sleep_until(now + 2 * MS);
    lapic_give(rig->set, 1, &given);
    assert_int_equal(given.tsc_deadline, 0);
    lapic_take(rig->set, 1, &given);
    assert_int_equal(lapic_interrupt_ack(rig->set, 1), 0x31);
}

/* From one that has not raised it yet when its state is taken: a count of zero is all that it tells. A periodic timer goes on, too. */
static void test_expired_when_taken(void **state)
{
    struct rig *rig = *state;
    for (unsigned periodic = 0; periodic < 2; periodic++) {
        struct apic_state given;
        wr(rig, 1, LVT_T, periodic << 17 | 0x31);
        wr(rig, 1, INITIAL, 1000000000);
        lapic_give(rig->set, 1, &given);
        given.reg[CURRENT >> 4] = 0;
        lapic_take(rig->set, 1, &given);
        uint32_t left = rd(rig, 1, CURRENT);
        assert_int_equal(left != 0, periodic);
        assert_int_equal(lapic_interrupt_ack(rig->set, 1), 0x31);
        wr(rig, 1, EOI, 0);
        wr(rig, 1, INITIAL, 0);
    }
}

/* ---- Anything at all, from several threads ---- */

static uint64_t random_next(uint64_t *seed)
{
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    return *seed;
}

struct worker {
    struct lapic_set *set;
    unsigned cpu;
};

/* One processor's accesses: the registers of its own APIC, and messages to all. */
static void *random_worker(void *ctx)
{
    struct worker *worker = ctx;
    uint64_t seed = 88172645463325252ull + worker->cpu, value;
    struct msi_target target = lapic_msi_target(worker->set);
    for (int i = 0; i < 20000; i++) {
        uint64_t r = random_next(&seed);
        uint32_t msr = (r >> 56 & 15) == 0 ? 0x1B : (r >> 56 & 15) == 1 ? 0x6E0 : 0x800 + (r >> 8 & 0x3f);
        uint64_t bits = (r & 128) ? r >> 16 : r >> 16 & 0xfffff;
        if (msr == 0x1B)
            bits = 0xFEE00000 | (r >> 16 & 0xD00) | ((r & 128) ? 0x800 : 0);
        switch (r & 7) {
        case 0:
        case 1:
            lapic_mmio_write(worker->set, worker->cpu, r >> 8 & 0xff0, 4, bits);
            break;
        case 2:
            lapic_mmio_read(worker->set, worker->cpu, r >> 8 & 0xfff, 1u << (r >> 20 & 3));
            break;
        case 3:
            (void)lapic_msr_write(worker->set, worker->cpu, msr, bits);
            break;
        case 4:
            (void)lapic_msr_read(worker->set, worker->cpu, msr, &value);
            break;
        case 5:
            msi_send(&target, 0xFEE00000 | (r >> 8 & 0xffffc), (uint32_t)(r >> 32));
            break;
        case 6:
            lapic_set_extint(worker->set, r & 256);
            lapic_mmio_write(worker->set, worker->cpu, SVR, 4, 0x1ff);
            break;
        default:
            lapic_cr8_write(worker->set, worker->cpu, r >> 8 & 3);
            lapic_nmi_take(worker->set, worker->cpu);
            int vector = lapic_interrupt_ack(worker->set, worker->cpu);
            if (vector < -1 || vector > 255)
                return ctx;
            lapic_mmio_write(worker->set, worker->cpu, EOI, 4, 0);
        }
    }
    return NULL;
}

static void ignore_wake(void *ctx, unsigned cpu)
{
}
static void ignore_startup(void *ctx, unsigned cpu, uint8_t vector)
{
}
static void ignore_eoi(void *ctx, uint8_t vector)
{
}
static int no_pic(void *ctx)
{
    return -1;
}

static void test_random_accesses(void **state)
{
    static const struct lapic_ops quiet = {.wake = ignore_wake, .init = ignore_wake, .startup = ignore_startup,
                                           .eoi = ignore_eoi, .pic_ack = no_pic, .tsc_now = on_tsc_now,
                                           .tsc_to_ns = on_tsc_to_ns};
    struct rig *rig = *state;
    struct lapic_set *set;
    log_set_level(LOG_ERROR);
    assert_int_equal(lapic_set_create(&set, CPUS, rig->loop, &quiet, NULL), 0);
    struct worker workers[3];
    pthread_t threads[3];
    for (unsigned i = 0; i < 3; i++) {
        workers[i] = (struct worker){set, i};
        pthread_create(&threads[i], NULL, random_worker, &workers[i]);
    }
    for (int i = 0; i < 20; i++)
        loop_run_once(rig->loop, 1);
    for (unsigned i = 0; i < 3; i++) {
        void *failed;
        pthread_join(threads[i], &failed);
        assert_null(failed);
    }
    struct state_io *writer = state_writer_create();
    assert_int_equal(lapic_state(set, writer), 0);
    size_t size;
    const void *data = state_writer_data(writer, &size);
    struct state_io *reader = state_reader_create(data, size);
    assert_int_equal(lapic_state(set, reader), 0);
    state_io_destroy(reader);
    state_io_destroy(writer);
    FILE *sink = fopen("/dev/null", "w");
    lapic_dump(set, sink);
    fclose(sink);
    lapic_set_destroy(set);
    log_set_level(LOG_INFO);
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(test_reset_values),   T(test_priorities_and_eoi),  T(test_level_eoi_broadcast), T(test_ipi_destinations),
        T(test_lowest_priority), T(test_init_startup_nmi),   T(test_errors),              T(test_software_disabled),
        T(test_mode_changes),   T(test_x2apic_msrs),         T(test_timer_one_shot),      T(test_timer_masked_counts),
        T(test_timer_periodic), T(test_timer_deadline),      T(test_extint),              T(test_odd_accesses),
        T(test_state),          T(test_expired_when_saved),  T(test_expired_when_given),  T(test_random_accesses),
        T(test_state),          T(test_expired_when_saved),  T(test_expired_when_taken),  T(test_random_accesses),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
