/*
 * The KVM engine: conversion of state without KVM; with /dev/kvm, whatever is behind it, a few instructions in real mode: memory slots, ROM, doorbells, the dirty log,
 * interrupts and kicks from another thread of which none is lost.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "engine/kvm/kvm_priv.h"

#define RAM_BYTES 0x10000u
#define CODE 0x1000u
#define WRITTEN 0x3000u
#define ROM 0x5000u
#define OUTSIDE 0x20000u
#define VECTOR 0x21u
#define ROUNDS 150u

/* ---- conversion ---- */

static uint64_t random_next(uint64_t *seed)
{
    *seed = *seed * 6364136223846793005ull + 1442695040888963407ull;
    return *seed ^ *seed >> 29;
}

static void random_cpu(struct cpu_state *cpu, uint64_t *seed)
{
    cpu_reset(cpu, CPU_RESET_POWER_ON);
    for (unsigned n = 0; n <= GPR_RIP; n++)
        cpu->gpr[n] = random_next(seed);
    for (unsigned n = 0; n < SEG_COUNT; n++)
        cpu->seg[n] = (struct segment){.base = random_next(seed), .limit = (uint32_t)random_next(seed), .selector = (uint16_t)random_next(seed),
                                       .attributes = (uint16_t)(random_next(seed) & 0xf0ff)};
    cpu->seg[SEG_DS].unusable = true; /* which cannot be present then */
    cpu->seg[SEG_DS].attributes &= ~SEG_ATTR_P;
    cpu->gdtr = (struct descriptor_table){random_next(seed), (uint16_t)random_next(seed)};
    uint64_t *const fields[] = {&cpu->cr2, &cpu->cr3, &cpu->efer, &cpu->dr[0], &cpu->dr[3], &cpu->dr[6], &cpu->dr[7], &cpu->msr_star, &cpu->msr_lstar, &cpu->msr_cstar,
                                &cpu->msr_sfmask, &cpu->msr_kernel_gs_base, &cpu->msr_sysenter_cs, &cpu->msr_sysenter_esp, &cpu->msr_sysenter_eip, &cpu->msr_pat,
                                &cpu->msr_tsc_aux, &cpu->msr_spec_ctrl, &cpu->msr_tsc_adjust, &cpu->msr_mtrr_def_type, &cpu->tsc_offset};
    for (unsigned n = 0; n < sizeof fields / sizeof *fields; n++)
        *fields[n] = random_next(seed);
    if (random_next(seed) & 1) { /* PAE paging outside long mode: the PDPTEs are state */
        cpu->cr0 |= CR0_PG | CR0_PE;
        cpu->cr4 |= CR4_PAE;
        cpu->efer &= ~EFER_LMA;
        for (unsigned n = 0; n < 4; n++)
            cpu->pdpte[n] = random_next(seed);
    }
    cpu->interrupt_shadow = random_next(seed) & 1;
    cpu->nmi_blocked = random_next(seed) & 1;
    cpu->activity = (enum cpu_activity)(random_next(seed) % 3);
    for (unsigned n = 0; n < 512; n++)
        cpu->xsave[n] = (uint8_t)random_next(seed);
}

static void conversion(void **state)
{
    struct engine engine = {.xsave_bytes = 8192, .has_tsc_aux = true, .has_spec_ctrl = true};
    struct kvm_image image = {.xsave = calloc(1, engine.xsave_bytes)};
    uint64_t seed = 4711;
    assert_non_null(image.xsave);
    for (unsigned n = 0; n < 1000; n++) {
        static struct cpu_state cpu, back;
        random_cpu(&cpu, &seed);
        kvm_image_from(&image, &engine, &cpu);
        back = cpu; /* what KVM does not keep */
        memset(back.gpr, 0x55, sizeof back.gpr);
        memset(back.seg, 0x55, sizeof back.seg);
        memset(back.pdpte, 0x55, sizeof back.pdpte);
        back.msr_star = back.msr_spec_ctrl = back.cr3 = back.tsc_offset = back.dr[7] = 0;
        back.activity = CPU_RUNNING;
        kvm_image_to(&image, &back);
        assert_memory_equal(cpu.gpr, back.gpr, sizeof cpu.gpr);
        for (unsigned s = 0; s < SEG_COUNT; s++) {
            assert_int_equal(cpu.seg[s].base, back.seg[s].base);
            assert_int_equal(cpu.seg[s].limit, back.seg[s].limit);
            assert_int_equal(cpu.seg[s].selector, back.seg[s].selector);
            assert_int_equal(cpu.seg[s].attributes, back.seg[s].attributes);
            assert_int_equal(cpu.seg[s].unusable, back.seg[s].unusable);
        }
        assert_memory_equal(&cpu.cr0, &back.cr0, offsetof(struct cpu_state, activity) - offsetof(struct cpu_state, cr0));
        assert_int_equal(cpu.activity, back.activity);
        assert_int_equal(cpu.interrupt_shadow, back.interrupt_shadow);
        assert_int_equal(cpu.nmi_blocked, back.nmi_blocked);
        assert_memory_equal(cpu.xsave, back.xsave, sizeof cpu.xsave);
    }
    free(image.xsave);
}

/* ---- a machine of a few pages ---- */

struct rig {
    struct physmap *memory;
    struct engine *engine;
    struct cpuid_table *cpuid;
    struct vcpu *vcpu;
    uint64_t mmio_gpa, mmio_value;
    unsigned mmio_writes, port_writes;
    pthread_mutex_t lock; /* the rest */
    pthread_cond_t changed;
    bool pending, leave, end;
    unsigned acknowledged, handled, left;
};

static uint32_t port_read(void *host, uint16_t port, unsigned size)
{
    return 0xff;
}

static void port_write(void *host, uint16_t port, unsigned size, uint32_t value)
{
    struct rig *rig = host;
    pthread_mutex_lock(&rig->lock);
    rig->port_writes++;
    rig->handled += port == 0xEA;
    pthread_cond_broadcast(&rig->changed);
    pthread_mutex_unlock(&rig->lock);
}

static uint64_t mmio_read(void *host, gpa_t gpa, unsigned size)
{
    return 0;
}

static void mmio_write(void *host, gpa_t gpa, unsigned size, uint64_t value)
{
    struct rig *rig = host;
    rig->mmio_writes++;
    rig->mmio_gpa = gpa;
    rig->mmio_value = value;
}

static int msr_read(void *host, uint32_t index, uint64_t *value)
{
    *value = 0xFEE00900;
    return index == 0x1B ? 0 : -ENOENT;
}

static int msr_write(void *host, uint32_t index, uint64_t value)
{
    return -ENOENT;
}

static int interrupt_peek(void *host)
{
    struct rig *rig = host;
    pthread_mutex_lock(&rig->lock);
    int vector = rig->pending ? (int)VECTOR : -1;
    pthread_mutex_unlock(&rig->lock);
    return vector;
}

static int interrupt_ack(void *host)
{
    struct rig *rig = host;
    pthread_mutex_lock(&rig->lock);
    int vector = rig->pending ? (int)VECTOR : -1;
    rig->acknowledged += rig->pending;
    rig->pending = false;
    pthread_mutex_unlock(&rig->lock);
    return vector;
}

static bool nmi_take(void *host)
{
    return false;
}

static void nmi_return(void *host)
{
}

static uint8_t cr8_read(void *host)
{
    return 0;
}

static void cr8_write(void *host, uint8_t value)
{
}

static bool must_exit(void *host)
{
    struct rig *rig = host;
    pthread_mutex_lock(&rig->lock);
    bool leave = rig->leave || rig->end;
    rig->leave = false;
    pthread_mutex_unlock(&rig->lock);
    return leave;
}

static const struct vcpu_host_ops host_ops = {
    .port_read = port_read,
    .port_write = port_write,
    .mmio_read = mmio_read,
    .mmio_write = mmio_write,
    .msr_read = msr_read,
    .msr_write = msr_write,
    .interrupt_peek = interrupt_peek,
    .interrupt_ack = interrupt_ack,
    .nmi_take = nmi_take,
    .nmi_return = nmi_return,
    .cr8_read = cr8_read,
    .cr8_write = cr8_write,
    .must_exit = must_exit,
};

static void rig_make(struct rig *rig, const uint8_t *code, size_t code_bytes)
{
    struct error err = {0};
    struct cpuid_config cpuid = {.cpu_count = 1, .tsc_khz = 1000000, .apic_bus_hz = 1000000000};
    *rig = (struct rig){.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};
    if (kvm_engine_ops.probe(&err)) {
        print_message("%s\n", err.text);
        skip();
    }
    assert_int_equal(physmap_create(&rig->memory, RAM_BYTES, &err), 0);
    assert_int_equal(physmap_set_rom(rig->memory, ROM, PAGE_SIZE_BYTES), 0);
    assert_int_equal(physmap_write(rig->memory, CODE, code, code_bytes), 0);
    rig->cpuid = cpuid_table_build(&cpuid);
    assert_non_null(rig->cpuid);
    assert_int_equal(kvm_engine_ops.create(&rig->engine, rig->memory, &err), 0);
    assert_int_equal(kvm_engine_ops.set_options(rig->engine, &(struct engine_options){.irqchip = IRQCHIP_USER}, &err), 0);
    assert_null(kvm_engine_ops.irqchip(rig->engine));
    assert_int_equal(kvm_engine_ops.limit_cpuid(rig->engine, rig->cpuid, &err), 0);
    struct vcpu_config config = {.host_ops = &host_ops, .host = rig, .memory = rig->memory, .cpuid = rig->cpuid};
    assert_int_equal(kvm_engine_ops.vcpu_create(rig->engine, &config, &rig->vcpu, &err), 0);
    struct cpu_state *cpu = &rig->vcpu->cpu;
    cpu_start_at(cpu, 0);
    cpu->gpr[GPR_RIP] = CODE;
    cpu->gpr[GPR_RSP] = 0x8000;
    cpu->seg[SEG_ES].selector = OUTSIDE >> 4;
    cpu->seg[SEG_ES].base = OUTSIDE;
}

static void rig_destroy(struct rig *rig)
{
    kvm_engine_ops.vcpu_destroy(rig->vcpu);
    kvm_engine_ops.destroy(rig->engine);
    cpuid_table_destroy(rig->cpuid);
    physmap_destroy(rig->memory);
}

static bool is_dirty(struct rig *rig, gpa_t gpa)
{
    return physmap_take_dirty(rig->memory, gpa);
}

static void memory(void **state)
{
    static const uint8_t code[] = {
        0x66, 0xb8, 0x78, 0x56, 0x34, 0x12, /* mov eax,0x12345678 */
        0x66, 0xa3, 0x00, 0x30,             /* mov [WRITTEN],eax */
        0x66, 0xa3, 0x00, 0x50,             /* mov [ROM],eax */
        0x26, 0x66, 0xa3, 0x00, 0x00,       /* mov es:[0],eax: the doorbell */
        0x26, 0x66, 0xa3, 0x08, 0x00,       /* mov es:[8],eax */
        0xe6, 0xe9,                         /* out 0xe9,al */
        0xf4,                               /* hlt */
    };
    struct rig rig;
    uint64_t count = 0;
    uint32_t written = 0, rom = 1;
    rig_make(&rig, code, sizeof code);
    int fd = eventfd(0, EFD_NONBLOCK);
    struct engine_doorbell doorbell = {.gpa = OUTSIDE, .size_bytes = 4, .match = true, .value = 0x12345678, .fd = fd};
    assert_true(fd >= 0);
    assert_int_equal(kvm_engine_ops.doorbell(rig.engine, &doorbell, true), 0);
    assert_int_equal(kvm_engine_ops.collect_dirty(rig.engine, true), 0);
    for (gpa_t gpa = 0; gpa < RAM_BYTES; gpa += PAGE_SIZE_BYTES)
        assert_int_equal(is_dirty(&rig, gpa), gpa != ROM); /* the first call marks all that can be written */

    assert_int_equal(kvm_engine_ops.run(rig.vcpu), ENGINE_EXIT_HALT);
    assert_int_equal(rig.vcpu->cpu.activity, CPU_HALTED);
    assert_int_equal(rig.vcpu->cpu.gpr[GPR_RIP], CODE + sizeof code);
    assert_int_equal(rig.vcpu->cpu.gpr[GPR_RAX], 0x12345678);
    assert_int_equal(physmap_read(rig.memory, WRITTEN, &written, 4) | physmap_read(rig.memory, ROM, &rom, 4), 0);
    assert_int_equal(written, 0x12345678);
    assert_int_equal(rom, 0);
    assert_int_equal(read(fd, &count, sizeof count), sizeof count);
    assert_int_equal(count, 1);
    assert_int_equal(rig.mmio_writes, 1);
    assert_int_equal(rig.mmio_gpa, OUTSIDE + 8);
    assert_int_equal(rig.mmio_value, 0x12345678);
    assert_int_equal(rig.port_writes, 1);
    assert_int_equal(kvm_engine_ops.collect_dirty(rig.engine, true), 0);
    assert_true(is_dirty(&rig, WRITTEN));
    assert_false(is_dirty(&rig, CODE + 0x6000));
    assert_int_equal(kvm_engine_ops.collect_dirty(rig.engine, true), 0);
    assert_false(is_dirty(&rig, WRITTEN)); /* told once */

    /* Without the doorbell the write comes out; and other memory can become ROM while the machine exists. */
    assert_int_equal(kvm_engine_ops.doorbell(rig.engine, &doorbell, false), 0);
    assert_int_equal(physmap_set_rom(rig.memory, WRITTEN, PAGE_SIZE_BYTES), 0);
    memset(physmap_get(rig.memory, WRITTEN, 4, PHYSMAP_READ), 0, 4);
    rig.vcpu->cpu.gpr[GPR_RIP] = CODE;
    rig.vcpu->cpu.activity = CPU_RUNNING;
    kvm_engine_ops.state_changed(rig.vcpu);
    assert_int_equal(kvm_engine_ops.run(rig.vcpu), ENGINE_EXIT_HALT);
    assert_int_equal(rig.mmio_writes, 3);
    assert_int_equal(physmap_read(rig.memory, WRITTEN, &written, 4), 0);
    assert_int_equal(written, 0);
    close(fd);
    rig_destroy(&rig);
}

/* ---- interrupts and kicks ---- */

static void *run_vcpu(void *arg)
{
    struct rig *rig = arg;
    for (;;) {
        enum engine_exit why = kvm_engine_ops.run(rig->vcpu);
        pthread_mutex_lock(&rig->lock);
        bool end = rig->end || why != ENGINE_EXIT_ATTENTION;
        rig->left++;
        pthread_cond_broadcast(&rig->changed);
        pthread_mutex_unlock(&rig->lock);
        kvm_engine_ops.state_changed(rig->vcpu); /* all of it goes out and in again */
        if (end)
            return NULL;
    }
}

static void kicks(void **state)
{
    static const uint8_t code[] = {
        0xfb,             /* sti */
        0x66, 0xff, 0xc3, /* 1: inc ebx */
        0xeb, 0xfb,       /* jmp 1b */
        0xe6, 0xea, 0xcf, /* out 0xea,al; iret */
    };
    struct rig rig;
    pthread_t thread;
    uint64_t before = 0;
    rig_make(&rig, code, sizeof code);
    const uint16_t handler[] = {CODE + 6, 0};
    assert_int_equal(physmap_write(rig.memory, VECTOR * 4, handler, sizeof handler), 0);
    assert_int_equal(pthread_create(&thread, NULL, run_vcpu, &rig), 0);
    for (unsigned n = 0; n < ROUNDS; n++) {
        pthread_mutex_lock(&rig.lock);
        unsigned left = rig.left;
        rig.pending = true;
        rig.leave = n % 3 == 0;
        bool leave = rig.leave;
        pthread_mutex_unlock(&rig.lock);
        vcpu_kick(rig.vcpu);
        pthread_mutex_lock(&rig.lock);
        while (rig.handled < n + 1 || (leave && rig.left == left))
            pthread_cond_wait(&rig.changed, &rig.lock);
        pthread_mutex_unlock(&rig.lock);
    }
    pthread_mutex_lock(&rig.lock);
    rig.end = true;
    pthread_mutex_unlock(&rig.lock);
    vcpu_kick(rig.vcpu);
    pthread_join(thread, NULL);
    before = rig.vcpu->cpu.gpr[GPR_RBX];
    assert_int_equal(rig.acknowledged, ROUNDS);
    assert_int_equal(rig.handled, ROUNDS);
    assert_true(before > 0); /* it did run */
    assert_true(rig.vcpu->cpu.gpr[GPR_RIP] >= CODE && rig.vcpu->cpu.gpr[GPR_RIP] < CODE + sizeof code);
    rig_destroy(&rig);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(conversion),
        cmocka_unit_test(memory),
        cmocka_unit_test(kicks),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
