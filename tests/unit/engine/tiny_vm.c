/* See tiny_vm.h. */
#include "tiny_vm.h"

#include <errno.h>
#include <string.h>

#define PAGE_P 1ull
#define PAGE_RW 2ull
#define PAGE_US 4ull
#define PAGE_PS 0x80ull
#define PAGE_TABLES 0xa0000u
#define HLT 0xf4

static uint32_t port_read(void *host, uint16_t port, unsigned size_bytes)
{
    struct tiny_vm *vm = host;
    vm->port = port;
    return vm->port_value;
}
static void port_write(void *host, uint16_t port, unsigned size_bytes, uint32_t value)
{
    struct tiny_vm *vm = host;
    vm->port = port;
    vm->port_value = value;
    vm->port_writes++;
}
static uint64_t mmio_read_op(void *host, gpa_t gpa, unsigned size_bytes)
{
    struct tiny_vm *vm = host;
    vm->mmio_gpa = gpa;
    vm->mmio_size = size_bytes;
    vm->mmio_reads++;
    return vm->mmio_value;
}
static void mmio_write_op(void *host, gpa_t gpa, unsigned size_bytes, uint64_t value)
{
    struct tiny_vm *vm = host;
    vm->mmio_gpa = gpa;
    vm->mmio_size = size_bytes;
    vm->mmio_value = value;
    vm->mmio_writes++;
}
static int msr_read(void *host, uint32_t index, uint64_t *value)
{
    return -ENOENT;
}
static int msr_write(void *host, uint32_t index, uint64_t value)
{
    return -ENOENT;
}
static int interrupt_peek(void *host)
{
    return ((struct tiny_vm *)host)->pending_vector;
}
static int interrupt_ack(void *host)
{
    struct tiny_vm *vm = host;
    int vector = vm->pending_vector;
    vm->pending_vector = -1;
    return vector;
}
static bool nmi_take(void *host)
{
    struct tiny_vm *vm = host;
    bool pending = vm->pending_nmi;
    vm->pending_nmi = false;
    return pending;
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
    return ((struct tiny_vm *)host)->exit_wanted;
}

static const struct vcpu_host_ops tiny_ops = {
    .port_read = port_read,
    .port_write = port_write,
    .mmio_read = mmio_read_op,
    .mmio_write = mmio_write_op,
    .msr_read = msr_read,
    .msr_write = msr_write,
    .interrupt_peek = interrupt_peek,
    .interrupt_ack = interrupt_ack,
    .nmi_take = nmi_take,
    .cr8_read = cr8_read,
    .cr8_write = cr8_write,
    .must_exit = must_exit,
};

int tiny_vm_create_with(struct tiny_vm *vm, const struct engine_ops *ops)
{
    *vm = (struct tiny_vm){.ops = ops, .pending_vector = -1};
    struct cpuid_config config = {.cpu_count = 1, .tsc_khz = 1000000, .apic_bus_hz = 1000000000};
    int rc = physmap_create(&vm->memory, TINY_RAM_BYTES, NULL);
    if (rc)
        return rc;
    vm->cpuid = cpuid_table_build(&config);
    rc = vm->cpuid ? ops->create(&vm->engine, vm->memory, NULL) : -ENOMEM;
    if (!rc) {
        struct vcpu_config vcpu = {.host_ops = &tiny_ops, .host = vm, .memory = vm->memory, .cpuid = vm->cpuid};
        rc = ops->vcpu_create(vm->engine, &vcpu, &vm->vcpu, NULL);
    }
    if (rc)
        tiny_vm_destroy(vm);
    return rc;
}

int tiny_vm_create(struct tiny_vm *vm)
{
    return tiny_vm_create_with(vm, &interp_engine);
}

void tiny_vm_destroy(struct tiny_vm *vm)
{
    if (vm->vcpu)
        vm->ops->vcpu_destroy(vm->vcpu);
    if (vm->engine)
        vm->ops->destroy(vm->engine);
    if (vm->cpuid)
        cpuid_table_destroy(vm->cpuid);
    physmap_destroy(vm->memory);
}

void *tiny_vm_at(struct tiny_vm *vm, gpa_t gpa)
{
    return physmap_get(vm->memory, gpa, 8, PHYSMAP_READ);
}

static void put64(struct tiny_vm *vm, gpa_t gpa, uint64_t value)
{
    memcpy(tiny_vm_at(vm, gpa), &value, 8);
}

void tiny_vm_map(struct tiny_vm *vm, unsigned n, uint64_t entry)
{
    put64(vm, TINY_PDPT + 8, (PAGE_TABLES + 0x1000) | PAGE_P | PAGE_RW | PAGE_US);
    put64(vm, PAGE_TABLES + 0x1000, PAGE_TABLES | PAGE_P | PAGE_RW | PAGE_US);
    put64(vm, PAGE_TABLES + 8 * n, entry);
}

static void build_page_tables(struct tiny_vm *vm)
{
    uint64_t rights = PAGE_P | PAGE_RW | PAGE_US;
    put64(vm, TINY_PML4, TINY_PDPT | rights);
    put64(vm, TINY_PDPT, TINY_PD | rights);
    for (unsigned n = 0; n < 512; n++)
        put64(vm, TINY_PD + 8 * n, (uint64_t)n << 21 | rights | PAGE_PS);
}

static uint64_t flat_descriptor(unsigned access, unsigned flags)
{
    return 0xffffull | (uint64_t)access << 40 | (uint64_t)(flags << 4 | 0xf) << 48;
}

static void build_gdt(struct tiny_vm *vm)
{
    put64(vm, TINY_GDT + TINY_CS64, flat_descriptor(0x9b, 0xa));
    put64(vm, TINY_GDT + TINY_DS, flat_descriptor(0x93, 0xc));
    put64(vm, TINY_GDT + TINY_CS32, flat_descriptor(0x9b, 0xc));
    put64(vm, TINY_GDT + (TINY_USER_DS & ~3), flat_descriptor(0xf3, 0xc));
    put64(vm, TINY_GDT + (TINY_USER_CS64 & ~3), flat_descriptor(0xfb, 0xa));
    put64(vm, TINY_GDT + (TINY_USER_CS32 & ~3), flat_descriptor(0xfb, 0xc));
    put64(vm, TINY_GDT + TINY_CS16, flat_descriptor(0x9b, 0x0) & ~(0xfull << 48));
    put64(vm, TINY_GDT + TINY_TR, 0x67 | (uint64_t)TINY_TSS << 16 | 0x8bull << 40);
}

static void build_vectors(struct tiny_vm *vm, enum tiny_mode mode)
{
    for (unsigned n = 0; n < 256; n++) {
        uint64_t handler = TINY_HANDLER + 16 * n;
        *(uint8_t *)tiny_vm_at(vm, handler) = HLT;
        if (mode == TINY_REAL) {
            uint32_t vector = (uint32_t)handler;
            memcpy(tiny_vm_at(vm, 4 * n), &vector, 4);
        } else {
            uint64_t selector = mode == TINY_LONG ? TINY_CS64 : TINY_CS32;
            uint64_t gate = (handler & 0xffff) | selector << 16 | 0xeeull << 40 | (handler >> 16) << 48;
            put64(vm, TINY_IDT + (mode == TINY_LONG ? 16 : 8) * n, gate);
        }
    }
}

static struct segment flat(uint16_t selector, uint16_t attributes)
{
    return (struct segment){.selector = selector, .attributes = attributes, .limit = 0xffffffff};
}

static void load_segments(struct cpu_state *cpu, enum tiny_mode mode)
{
    for (unsigned n = 0; n < SEG_COUNT; n++)
        cpu->seg[n] = mode == TINY_REAL ? (struct segment){.limit = 0xffff, .attributes = 0x93} : flat(TINY_DS, 0xc093);
    if (mode == TINY_REAL) {
        cpu->seg[SEG_CS] = (struct segment){.selector = TINY_CODE >> 4, .base = TINY_CODE, .limit = 0xffff, .attributes = 0x9b};
        cpu->seg[SEG_DS].selector = TINY_DATA >> 4;
        cpu->seg[SEG_DS].base = TINY_DATA;
    } else {
        cpu->seg[SEG_CS] = mode == TINY_LONG ? flat(TINY_CS64, 0xa09b) : flat(TINY_CS32, 0xc09b);
        cpu->gdtr = (struct descriptor_table){TINY_GDT, 0x4f};
        cpu->idtr = (struct descriptor_table){TINY_IDT, 0xfff};
        cpu->tr = (struct segment){.selector = TINY_TR, .base = TINY_TSS, .limit = 0x67, .attributes = 0x8b};
    }
}

void tiny_vm_load(struct tiny_vm *vm, enum tiny_mode mode, const void *code, uint64_t size_bytes)
{
    struct cpu_state *cpu = &vm->vcpu->cpu;
    physmap_zero(vm->memory);
    build_page_tables(vm);
    build_gdt(vm);
    build_vectors(vm, mode);
    put64(vm, TINY_TSS + 4, TINY_STACK); /* RSP0, or ESP0 */
    if (mode == TINY_PROTECTED)
        put64(vm, TINY_TSS + 8, TINY_DS);
    memcpy(physmap_get(vm->memory, TINY_CODE, size_bytes, PHYSMAP_WRITE), code, size_bytes);
    cpu_reset(cpu, CPU_RESET_POWER_ON);
    load_segments(cpu, mode);
    cpu->gpr[GPR_RIP] = mode == TINY_REAL ? 0 : TINY_CODE;
    cpu->gpr[GPR_RSP] = TINY_STACK;
    if (mode != TINY_REAL)
        cpu->cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_WP;
    if (mode == TINY_LONG) {
        cpu->cr0 |= CR0_PG;
        cpu->cr3 = TINY_PML4;
        cpu->cr4 = CR4_PAE | CR4_PGE | CR4_OSFXSR | CR4_OSXSAVE;
        cpu->efer = EFER_LME | EFER_LMA | EFER_NXE | EFER_SCE;
        cpu->xcr0 = cpuid_xcr0_allowed(vm->cpuid);
    }
    vm->ops->state_changed(vm->vcpu);
}

void tiny_vm_enter_user(struct tiny_vm *vm, bool bits64)
{
    struct cpu_state *cpu = &vm->vcpu->cpu;
    for (unsigned n = 0; n < SEG_COUNT; n++)
        cpu->seg[n] = flat(TINY_USER_DS, 0xc0f3);
    cpu->seg[SEG_CS] = bits64 ? flat(TINY_USER_CS64, 0xa0fb) : flat(TINY_USER_CS32, 0xc0fb);
    cpu->gpr[GPR_RSP] = TINY_USER_STACK;
    vm->ops->state_changed(vm->vcpu);
}
