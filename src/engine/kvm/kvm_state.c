/*
 * A processor's state between struct cpu_state and KVM's structures.
 *
 * What KVM keeps: registers, control and debug registers, x87 to AVX-512, the MSRs below, the TSC's offset, events. MTRRs, machine check registers, IA32_MISC_ENABLE and
 * IA32_TSC_ADJUST stay in cpu_state (kvm_msr.c), for nothing in KVM depends on them. Conversion is apart from the calls, so that it can be tested without KVM.
 * KVM's structures: Documentation/virt/kvm/api.rst. Threading: the vCPU's thread, or any while it stands still.
 */
#include <stddef.h>
#include <string.h>

#include "arch/host.h"
#include "engine/kvm/kvm_priv.h"
#include "util/log.h"

#define MSR_APIC_BASE 0x1B
#define MSR_SPEC_CTRL 0x48
#define MSR_TSC_AUX 0xC0000103

#define XSAVE_BV 512
#define XSAVE_HEADER_END 576

static const struct {
    uint32_t index;
    uint32_t offset; /* in struct cpu_state */
} kept[] = {
#define KEPT(number, name) {number, offsetof(struct cpu_state, name)}
    KEPT(0x174, msr_sysenter_cs),
    KEPT(0x175, msr_sysenter_esp),
    KEPT(0x176, msr_sysenter_eip),
    KEPT(0x277, msr_pat),
    KEPT(0xC0000081, msr_star),
    KEPT(0xC0000082, msr_lstar),
    KEPT(0xC0000083, msr_cstar),
    KEPT(0xC0000084, msr_sfmask),
    KEPT(0xC0000102, msr_kernel_gs_base),
    KEPT(MSR_SPEC_CTRL, msr_spec_ctrl),
    KEPT(MSR_TSC_AUX, msr_tsc_aux),
};
_Static_assert(sizeof kept / sizeof *kept <= KVM_MSRS_MAX, "room for each");

/* ---- conversion ---- */

static struct kvm_segment segment_from(const struct segment *s)
{
    uint16_t a = s->attributes;
    return (struct kvm_segment){
        .base = s->base,
        .limit = s->limit,
        .selector = s->selector,
        .type = SEG_ATTR_TYPE(a),
        .present = !!(a & SEG_ATTR_P) && !s->unusable,
        .dpl = SEG_ATTR_DPL(a),
        .db = !!(a & SEG_ATTR_DB),
        .s = !!(a & SEG_ATTR_S),
        .l = !!(a & SEG_ATTR_L),
        .g = !!(a & SEG_ATTR_G),
        .avl = !!(a & SEG_ATTR_AVL),
        .unusable = s->unusable,
    };
}

static struct segment segment_to(const struct kvm_segment *k)
{
    uint16_t a = (uint16_t)((k->type & 0xf) | (k->dpl & 3) << 5);
    a |= (k->s ? SEG_ATTR_S : 0) | (k->present ? SEG_ATTR_P : 0) | (k->avl ? SEG_ATTR_AVL : 0) | (k->l ? SEG_ATTR_L : 0) | (k->db ? SEG_ATTR_DB : 0) |
         (k->g ? SEG_ATTR_G : 0);
    return (struct segment){.base = k->base, .limit = k->limit, .selector = k->selector, .attributes = a, .unusable = k->unusable};
}

/* KVM names the general registers; in the order of enum gpr_index. */
static void registers_list(struct kvm_regs *regs, __u64 *list[16])
{
    __u64 *const named[] = {&regs->rax, &regs->rcx, &regs->rdx, &regs->rbx, &regs->rsp, &regs->rbp, &regs->rsi, &regs->rdi,
                            &regs->r8,  &regs->r9,  &regs->r10, &regs->r11, &regs->r12, &regs->r13, &regs->r14, &regs->r15};
    memcpy(list, named, sizeof named);
}

static void segments_list(struct kvm_sregs2 *sregs, struct kvm_segment *list[SEG_COUNT])
{
    struct kvm_segment *const named[SEG_COUNT] = {
        [SEG_ES] = &sregs->es, [SEG_CS] = &sregs->cs, [SEG_SS] = &sregs->ss, [SEG_DS] = &sregs->ds, [SEG_FS] = &sregs->fs, [SEG_GS] = &sregs->gs};
    memcpy(list, named, sizeof named);
}

static bool engine_keeps(const struct engine *e, uint32_t msr)
{
    return msr == MSR_SPEC_CTRL ? e->has_spec_ctrl : msr == MSR_TSC_AUX ? e->has_tsc_aux : true;
}

static void sregs_from(struct kvm_sregs2 *sregs, const struct cpu_state *cpu)
{
    struct kvm_segment *segment[SEG_COUNT];
    segments_list(sregs, segment);
    for (unsigned n = 0; n < SEG_COUNT; n++)
        *segment[n] = segment_from(&cpu->seg[n]);
    sregs->ldt = segment_from(&cpu->ldtr);
    sregs->tr = segment_from(&cpu->tr);
    sregs->gdt = (struct kvm_dtable){.base = cpu->gdtr.base, .limit = cpu->gdtr.limit};
    sregs->idt = (struct kvm_dtable){.base = cpu->idtr.base, .limit = cpu->idtr.limit};
    sregs->cr0 = cpu->cr0;
    sregs->cr2 = cpu->cr2;
    sregs->cr3 = cpu->cr3;
    sregs->cr4 = cpu->cr4;
    sregs->efer = cpu->efer;
    if ((cpu->cr0 & CR0_PG) && (cpu->cr4 & CR4_PAE) && !(cpu->efer & EFER_LMA)) {
        sregs->flags = KVM_SREGS2_FLAGS_PDPTRS_VALID;
        memcpy(sregs->pdptrs, cpu->pdpte, sizeof sregs->pdptrs);
    }
}

void kvm_image_from(struct kvm_image *image, const struct engine *e, const struct cpu_state *cpu)
{
    __u64 *reg[16];
    struct kvm_xsave *xsave = image->xsave;
    *image = (struct kvm_image){.xsave = xsave};
    registers_list(&image->regs, reg);
    for (unsigned n = 0; n < 16; n++)
        *reg[n] = cpu->gpr[n];
    image->regs.rip = cpu->gpr[GPR_RIP];
    image->regs.rflags = cpu->rflags;
    sregs_from(&image->sregs, cpu);
    memcpy(image->debug.db, cpu->dr, sizeof image->debug.db);
    image->debug.dr6 = cpu->dr[6];
    image->debug.dr7 = cpu->dr[7];
    image->events.flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW;
    image->events.interrupt.shadow = cpu->interrupt_shadow ? KVM_X86_SHADOW_INT_STI : 0;
    image->events.nmi.masked = cpu->nmi_blocked;
    image->xcrs.nr_xcrs = 1;
    image->xcrs.xcrs[0].value = cpu->xcr0;
    image->mp.mp_state = cpu->activity == CPU_HALTED          ? KVM_MP_STATE_HALTED
                         : cpu->activity == CPU_WAIT_FOR_SIPI ? KVM_MP_STATE_INIT_RECEIVED
                                                              : KVM_MP_STATE_RUNNABLE;
    for (unsigned n = 0; n < sizeof kept / sizeof *kept; n++)
        if (engine_keeps(e, kept[n].index))
            image->msr[image->msr_count++] =
                (struct kvm_msr_entry){.index = kept[n].index, .data = *(const uint64_t *)((const char *)cpu + kept[n].offset)};
    image->tsc_offset = cpu->tsc_offset;
    memset(xsave, 0, e->xsave_bytes);
    memcpy(xsave, cpu->xsave, CPU_XSAVE_BYTES);
}

static void sregs_to(const struct kvm_sregs2 *from, struct cpu_state *cpu)
{
    struct kvm_sregs2 sregs = *from;
    struct kvm_segment *segment[SEG_COUNT];
    segments_list(&sregs, segment);
    for (unsigned n = 0; n < SEG_COUNT; n++)
        cpu->seg[n] = segment_to(segment[n]);
    cpu->ldtr = segment_to(&sregs.ldt);
    cpu->tr = segment_to(&sregs.tr);
    cpu->gdtr = (struct descriptor_table){sregs.gdt.base, sregs.gdt.limit};
    cpu->idtr = (struct descriptor_table){sregs.idt.base, sregs.idt.limit};
    cpu->cr0 = sregs.cr0;
    cpu->cr2 = sregs.cr2;
    cpu->cr3 = sregs.cr3;
    cpu->cr4 = sregs.cr4;
    cpu->efer = sregs.efer;
    memset(cpu->pdpte, 0, sizeof cpu->pdpte);
    if (sregs.flags & KVM_SREGS2_FLAGS_PDPTRS_VALID)
        memcpy(cpu->pdpte, sregs.pdptrs, sizeof cpu->pdpte);
}

/* Components that guests are never offered do not leave KVM's image (protection keys are the host's own default value there). */
static void xsave_to(const struct kvm_xsave *xsave, struct cpu_state *cpu)
{
    uint64_t present;
    memcpy(cpu->xsave, xsave, CPU_XSAVE_BYTES);
    memcpy(&present, cpu->xsave + XSAVE_BV, sizeof present);
    present &= (host_xcr0() & XCR0_SUPPORTED) | XCR0_X87 | XCR0_SSE;
    memset(cpu->xsave + XSAVE_BV, 0, XSAVE_HEADER_END - XSAVE_BV);
    memcpy(cpu->xsave + XSAVE_BV, &present, sizeof present);
}

void kvm_image_to(const struct kvm_image *image, struct cpu_state *cpu)
{
    struct kvm_regs regs = image->regs;
    __u64 *reg[16];
    registers_list(&regs, reg);
    for (unsigned n = 0; n < 16; n++)
        cpu->gpr[n] = *reg[n];
    cpu->gpr[GPR_RIP] = regs.rip;
    cpu->gpr[GPR_ZERO] = 0;
    cpu->rflags = regs.rflags;
    sregs_to(&image->sregs, cpu);
    memcpy(cpu->dr, image->debug.db, sizeof image->debug.db);
    cpu->dr[6] = image->debug.dr6;
    cpu->dr[7] = image->debug.dr7;
    cpu->interrupt_shadow = image->events.interrupt.shadow;
    cpu->nmi_blocked = image->events.nmi.masked;
    cpu->xcr0 = image->xcrs.xcrs[0].value;
    cpu->activity = image->mp.mp_state == KVM_MP_STATE_HALTED                                                                     ? CPU_HALTED
                    : image->mp.mp_state == KVM_MP_STATE_INIT_RECEIVED || image->mp.mp_state == KVM_MP_STATE_UNINITIALIZED ? CPU_WAIT_FOR_SIPI
                                                                                                                           : CPU_RUNNING;
    for (unsigned i = 0; i < image->msr_count; i++)
        for (unsigned n = 0; n < sizeof kept / sizeof *kept; n++)
            if (kept[n].index == image->msr[i].index)
                *(uint64_t *)((char *)cpu + kept[n].offset) = image->msr[i].data;
    cpu->tsc_offset = image->tsc_offset;
    xsave_to(image->xsave, cpu);
}

/* ---- calls ---- */

static int report(const struct kvm_cpu *c, int r, const char *call)
{
    if (r)
        log_error("kvm: processor %u: %s: %s", c->v.index, call, strerror(-r));
    return r;
}
#define CALL(c, request, argument) report(c, kvm_call((c)->fd, request, argument), #request)

struct msrs {
    struct kvm_msrs header;
    struct kvm_msr_entry entries[KVM_MSRS_MAX];
};

/* KVM_GET_MSRS and KVM_SET_MSRS answer how many they came through. */
static int transfer_msrs(struct kvm_cpu *c, struct kvm_image *image, unsigned long request)
{
    struct msrs msrs = {.header.nmsrs = image->msr_count};
    memcpy(msrs.entries, image->msr, image->msr_count * sizeof *image->msr);
    int done = ioctl(c->fd, request, &msrs);
    if (done < 0)
        return report(c, -errno, "MSRs");
    if ((unsigned)done < image->msr_count) {
        log_error("kvm: processor %u: MSR 0x%x cannot be %s", c->v.index, image->msr[done].index, request == KVM_SET_MSRS ? "set" : "read");
        return -EIO;
    }
    memcpy(image->msr, msrs.entries, image->msr_count * sizeof *image->msr);
    return 0;
}

static int transfer_tsc_offset(struct kvm_cpu *c, uint64_t *offset, unsigned long request)
{
    struct kvm_device_attr attribute = {.group = KVM_VCPU_TSC_CTRL, .attr = KVM_VCPU_TSC_OFFSET, .addr = (uintptr_t)offset};
    return report(c, kvm_call(c->fd, request, &attribute), "the TSC's offset");
}

/* There are kernels that take an offset and have none: the guest's counter is the host's then, and everybody is to reckon with that. */
int kvm_push_tsc_offset(struct kvm_cpu *c)
{
    uint64_t *offset = &c->v.cpu.tsc_offset, wanted = *offset;
    int r = transfer_tsc_offset(c, &wanted, KVM_SET_DEVICE_ATTR);
    r = r ? r : transfer_tsc_offset(c, offset, KVM_GET_DEVICE_ATTR);
    if (r == 0 && *offset != wanted && !atomic_exchange(&c->engine->told_no_offset, true))
        log_warning("kvm: this kernel does not offset the guest's time-stamp counter: it shows the host's");
    return r;
}

/* What the kernel knows about CPUID bit 9 of leaf 1, and IA32_APIC_BASE where it has the APIC. */
static uint64_t apic_base(struct kvm_cpu *c)
{
    uint64_t base = 0xFEE00900;
    struct kvm_sregs2 now;
    if (!c->engine->split)
        c->v.host_ops->msr_read(c->v.host, MSR_APIC_BASE, &base);
    else if (kvm_call(c->fd, KVM_GET_SREGS2, &now) == 0)
        base = now.apic_base; /* the APIC's own state sets it: kvm_irqchip.c */
    return base;
}

int kvm_state_push(struct kvm_cpu *c)
{
    struct engine *e = c->engine;
    struct kvm_image image = {.xsave = c->xsave};
    int r = 0;
    kvm_image_from(&image, e, &c->v.cpu);
    image.sregs.apic_base = apic_base(c);
    image.sregs.cr8 = e->split ? 0 : c->v.host_ops->cr8_read(c->v.host);
    if (e->split) { /* CR8 is the APIC's task priority, which stays */
        struct kvm_sregs2 now;
        r = CALL(c, KVM_GET_SREGS2, &now);
        image.sregs.cr8 = now.cr8;
    } else {
        image.mp.mp_state = KVM_MP_STATE_RUNNABLE; /* halting is ours */
    }
    /* XCR0 before what it enables; events last, since setting registers drops pending exceptions. */
    r = r ? r : CALL(c, KVM_SET_MP_STATE, &image.mp);
    r = r ? r : CALL(c, KVM_SET_REGS, &image.regs);
    r = r ? r : CALL(c, KVM_SET_SREGS2, &image.sregs);
    r = r ? r : CALL(c, KVM_SET_XCRS, &image.xcrs);
    r = r ? r : CALL(c, KVM_SET_XSAVE, image.xsave);
    r = r ? r : transfer_msrs(c, &image, KVM_SET_MSRS);
    r = r ? r : CALL(c, KVM_SET_DEBUGREGS, &image.debug);
    r = r ? r : kvm_push_tsc_offset(c);
    return r ? r : CALL(c, KVM_SET_VCPU_EVENTS, &image.events);
}

int kvm_state_pull(struct kvm_cpu *c)
{
    struct kvm_image image = {.xsave = c->xsave};
    enum cpu_activity activity = c->v.cpu.activity;
    kvm_image_from(&image, c->engine, &c->v.cpu); /* which MSRs */
    int r = CALL(c, KVM_GET_MP_STATE, &image.mp); /* takes INIT and startup messages, which change registers */
    r = r ? r : CALL(c, KVM_GET_REGS, &image.regs);
    r = r ? r : CALL(c, KVM_GET_SREGS2, &image.sregs);
    r = r ? r : CALL(c, KVM_GET_XCRS, &image.xcrs);
    r = r ? r : CALL(c, c->engine->xsave_bytes > CPU_XSAVE_BYTES ? KVM_GET_XSAVE2 : KVM_GET_XSAVE, image.xsave);
    r = r ? r : transfer_msrs(c, &image, KVM_GET_MSRS);
    r = r ? r : CALL(c, KVM_GET_DEBUGREGS, &image.debug);
    r = r ? r : transfer_tsc_offset(c, &image.tsc_offset, KVM_GET_DEVICE_ATTR);
    r = r ? r : CALL(c, KVM_GET_VCPU_EVENTS, &image.events);
    if (r)
        return r;
    kvm_image_to(&image, &c->v.cpu);
    if (!c->engine->split || activity == CPU_SHUTDOWN)
        c->v.cpu.activity = activity;
    return 0;
}
