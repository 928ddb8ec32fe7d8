/*
 * Raising faults, and delivering exceptions and interrupts through the IDT.
 *
 * raise_* leave the handler by longjmp; the run loop puts rip back (when an instruction was executing) and calls exception_deliver. Delivery checks
 * everything and writes the new stack before it changes a register, so a fault in the middle (which comes back to
 * exception_deliver with c->delivering still set) finds the old state.
 * Sources: SDM vol. 3, ch. 6 (table 6-5 for double faults), 17.3.1.1 for RF; vol. 2, INT n. Threading: as interp_priv.h.
 */
#include "engine/interp/system_priv.h"

#include "util/log.h"

/* ---- raising ---- */

static _Noreturn void escape(struct icpu *c, struct fault fault)
{
    c->fault = fault;
    longjmp(c->escape, INTERP_FAULT);
}

_Noreturn void raise_fault(struct icpu *c, unsigned vector)
{
    escape(c, (struct fault){.vector = (uint8_t)vector});
}

_Noreturn void raise_error(struct icpu *c, unsigned vector, uint32_t error)
{
    escape(c, (struct fault){.vector = (uint8_t)vector, .has_error = true, .error = error});
}

_Noreturn void raise_page_fault(struct icpu *c, gva_t address, uint32_t error)
{
    escape(c, (struct fault){.vector = VECTOR_PF, .has_error = true, .error = error, .address = address});
}

_Noreturn void raise_gp0(struct icpu *c)
{
    raise_error(c, VECTOR_GP, 0);
}

_Noreturn void raise_debug_fault(struct icpu *c, uint64_t dr6)
{
    escape(c, (struct fault){.vector = VECTOR_DB, .dr6 = dr6});
}

_Noreturn void raise_debug_trap(struct icpu *c, uint64_t dr6)
{
    c->current = NULL; /* the instruction is complete: rip stays */
    raise_debug_fault(c, dr6);
}

/* ---- events ---- */

struct event {
    uint8_t vector;
    bool has_error;
    uint32_t error;
    uint32_t ext;     /* ERROR_EXT unless the program asked for it: INT n, INT3, INTO */
    bool check_dpl;   /* the same three */
    bool sets_rf;     /* fault class: the pushed RF is one */
};

static uint32_t idt_error(const struct event *e)
{
    return (uint32_t)e->vector << 3 | ERROR_IDT | e->ext;
}

static uint64_t pushed_flags(const struct icpu *c, const struct event *e)
{
    return flags_get(c) | (e->sets_rf ? RFLAGS_RF : 0);
}

/* Real mode: four-byte vectors, 16-bit frame, no error codes (SDM vol. 3, 20.1.4). */
static void deliver_real(struct icpu *c, const struct event *e)
{
    struct cpu_state *s = &c->v.cpu;
    if (e->vector * 4u + 3 > s->idtr.limit)
        raise_error(c, VECTOR_GP, idt_error(e));
    uint32_t target = (uint32_t)table_read(c, table_address(c, s->idtr.base, e->vector * 4u), 4);

    struct frame f;
    frame_init(c, &f, &s->seg[SEG_SS], s->gpr[GPR_RSP], false, c->cpl, 2);
    frame_push(&f, flags_get(c));
    frame_push(&f, s->seg[SEG_CS].selector);
    frame_push(&f, s->gpr[GPR_RIP]);
    frame_write(c, &f, 0);
    s->gpr[GPR_RSP] = f.sp;
    s->seg[SEG_CS] = segment_real(c, SEG_CS, (uint16_t)(target >> 16));
    s->gpr[GPR_RIP] = target & 0xFFFF;
    flags_set(c, flags_get(c) & ~(RFLAGS_IF | RFLAGS_TF | RFLAGS_RF | RFLAGS_AC));
}

/* Reads the gate and checks it. Interrupt, trap and task gates pass. */
static void gate_read(struct icpu *c, const struct event *e, struct descriptor *gate)
{
    const struct cpu_state *s = &c->v.cpu;
    bool lm = is_long(c);
    unsigned offset = e->vector * (lm ? 16u : 8u);
    if (offset + (lm ? 15 : 7) > s->idtr.limit)
        raise_error(c, VECTOR_GP, idt_error(e));
    gva_t address = table_address(c, s->idtr.base, offset);
    *gate = (struct descriptor){.address = address, .low = table_read(c, address, 8)};
    if (lm)
        gate->high = table_read(c, address + 8, 8) & 0xFFFFFFFF;
    gate->attributes = (uint16_t)(gate->low >> 40 & 0xFF);

    bool valid;
    switch (gate->attributes & 0x1F) {
    case SYSTEM_INTERRUPT_GATE:
    case SYSTEM_TRAP_GATE:
        valid = true;
        break;
    case SYSTEM_TASK_GATE:
    case SYSTEM_INTERRUPT_GATE16:
    case SYSTEM_TRAP_GATE16:
        valid = !lm;
        break;
    default:
        valid = false;
    }
    if (!valid || (e->check_dpl && descriptor_dpl(gate) < c->cpl))
        raise_error(c, VECTOR_GP, idt_error(e));
    if (!descriptor_is_present(gate))
        raise_error(c, VECTOR_NP, idt_error(e));
}

/* The handler's code segment; returns the CPL that it runs at. */
static unsigned handler_segment(struct icpu *c, const struct event *e, uint16_t selector, struct descriptor *cs)
{
    uint32_t error = SELECTOR_ERROR(selector) | e->ext;
    if (SELECTOR_IS_NULL(selector))
        raise_error(c, VECTOR_GP, e->ext);
    if (!descriptor_read(c, selector, cs) || !descriptor_is_code(cs) || descriptor_dpl(cs) > c->cpl)
        raise_error(c, VECTOR_GP, error);
    if (is_long(c) && (cs->attributes & (SEG_ATTR_L | SEG_ATTR_DB)) != SEG_ATTR_L)
        raise_error(c, VECTOR_GP, error);
    if (!descriptor_is_present(cs))
        raise_error(c, VECTOR_NP, error);
    unsigned cpl = descriptor_is_conforming(cs) ? c->cpl : descriptor_dpl(cs);
    if ((c->v.cpu.rflags & RFLAGS_VM) && cpl != 0)
        raise_error(c, VECTOR_GP, error);
    return cpl;
}

/* RFLAGS inside the handler. */
static uint64_t handler_flags(const struct icpu *c, const struct descriptor *gate)
{
    uint64_t clear = RFLAGS_TF | RFLAGS_NT | RFLAGS_RF | RFLAGS_VM;
    if (!(descriptor_type(gate) & 1))
        clear |= RFLAGS_IF;
    return flags_get(c) & ~clear;
}

/* What the handler returns to, and the error code. */
static void push_return(const struct icpu *c, struct frame *f, const struct event *e)
{
    const struct cpu_state *s = &c->v.cpu;
    frame_push(f, pushed_flags(c, e));
    frame_push(f, s->seg[SEG_CS].selector);
    frame_push(f, s->gpr[GPR_RIP]);
    if (e->has_error)
        frame_push(f, e->error);
}

static void enter_handler(struct icpu *c, const struct descriptor *gate, const struct descriptor *cs, unsigned cpl,
                          const struct segment *ss, uint64_t sp)
{
    struct cpu_state *s = &c->v.cpu;
    uint64_t flags = handler_flags(c, gate);
    s->seg[SEG_CS] = descriptor_segment(cs, (uint16_t)((gate_selector(gate) & ~3u) | cpl));
    s->seg[SEG_SS] = *ss;
    s->gpr[GPR_RSP] = sp;
    s->gpr[GPR_RIP] = gate_offset(c, gate);
    flags_set(c, flags);
}

static void deliver_long(struct icpu *c, const struct event *e, const struct descriptor *gate)
{
    struct cpu_state *s = &c->v.cpu;
    struct descriptor cs;
    unsigned cpl = handler_segment(c, e, gate_selector(gate), &cs);
    unsigned ist = gate->low >> 32 & 7;
    struct segment ss = s->seg[SEG_SS];
    uint64_t sp = s->gpr[GPR_RSP];

    if (ist)
        sp = tss_stack_pointer64(c, TSS64_IST(ist), e->ext);
    else if (cpl != c->cpl)
        sp = tss_stack_pointer64(c, TSS64_RSP(cpl), e->ext);
    if (cpl != c->cpl)
        ss = segment_null((uint16_t)cpl, cpl);
    code_offset_check(c, &cs, gate_offset(c, gate), e->ext);
    descriptor_set_accessed(c, &cs);

    struct frame f;
    frame_init(c, &f, &ss, sp & ~0xFull, true, cpl, 8);
    frame_push(&f, s->seg[SEG_SS].selector);
    frame_push(&f, s->gpr[GPR_RSP]);
    push_return(c, &f, e);
    frame_write(c, &f, e->ext);
    enter_handler(c, gate, &cs, cpl, &ss, f.sp);
}

static void deliver_legacy(struct icpu *c, const struct event *e, const struct descriptor *gate)
{
    struct cpu_state *s = &c->v.cpu;
    bool v86 = s->rflags & RFLAGS_VM;
    struct descriptor cs;
    unsigned cpl = handler_segment(c, e, gate_selector(gate), &cs);
    bool inner = cpl != c->cpl;
    struct segment ss = s->seg[SEG_SS];
    uint64_t sp = s->gpr[GPR_RSP];

    if (inner)
        tss_inner_stack(c, cpl, e->ext, &ss, &sp);
    code_offset_check(c, &cs, gate_offset(c, gate), e->ext);
    descriptor_set_accessed(c, &cs);

    struct frame f;
    frame_init(c, &f, &ss, sp, false, cpl, descriptor_type(gate) & 8 ? 4 : 2);
    if (v86) {
        frame_push(&f, s->seg[SEG_GS].selector);
        frame_push(&f, s->seg[SEG_FS].selector);
        frame_push(&f, s->seg[SEG_DS].selector);
        frame_push(&f, s->seg[SEG_ES].selector);
    }
    if (inner) {
        frame_push(&f, s->seg[SEG_SS].selector);
        frame_push(&f, s->gpr[GPR_RSP]);
    }
    push_return(c, &f, e);
    frame_write(c, &f, (inner ? SELECTOR_ERROR(ss.selector) : 0) | e->ext);

    if (v86) {
        static const uint8_t data[] = {SEG_ES, SEG_DS, SEG_FS, SEG_GS};
        for (unsigned n = 0; n < sizeof(data); n++)
            s->seg[data[n]] = segment_null(0, 0);
    }
    enter_handler(c, gate, &cs, cpl, &ss, f.sp);
}

/* A task gate: the error code goes on the new task's stack. */
static void deliver_task(struct icpu *c, const struct event *e, const struct descriptor *gate)
{
    struct cpu_state *s = &c->v.cpu;
    if (e->sets_rf) /* the outgoing task's image holds it */
        s->rflags |= RFLAGS_RF;
    task_gate(c, gate, TASK_EVENT, e->ext);
    if (!e->has_error)
        return;
    struct frame f;
    bool v86 = s->rflags & RFLAGS_VM;
    frame_init(c, &f, &s->seg[SEG_SS], s->gpr[GPR_RSP], false, v86 ? 3 : c->cpl, s->tr.attributes & 8 ? 4 : 2);
    frame_push(&f, e->error);
    frame_write(c, &f, e->ext);
    s->gpr[GPR_RSP] = f.sp;
}

static void deliver(struct icpu *c, const struct event *e)
{
    struct cpu_state *s = &c->v.cpu;
    if (c->code_bits != 64)
        s->gpr[GPR_RIP] = (uint32_t)s->gpr[GPR_RIP]; /* the last instruction may have ended at 4 GiB */
    if (!(s->cr0 & CR0_PE)) {
        deliver_real(c, e);
    } else {
        struct descriptor gate;
        gate_read(c, e, &gate);
        if (descriptor_type(&gate) == SYSTEM_TASK_GATE)
            deliver_task(c, e, &gate);
        else if (is_long(c))
            deliver_long(c, e, &gate);
        else
            deliver_legacy(c, e, &gate);
    }
    s->interrupt_shadow = false;
    interp_mode_changed(c);
}

/* ---- entry points ---- */

enum fault_class { BENIGN, CONTRIBUTORY, PAGE_FAULT };

static enum fault_class class_of(int vector)
{
    switch (vector) {
    case VECTOR_DE:
    case VECTOR_TS:
    case VECTOR_NP:
    case VECTOR_SS:
    case VECTOR_GP:
        return CONTRIBUTORY;
    case VECTOR_PF:
        return PAGE_FAULT;
    default:
        return BENIGN;
    }
}

static bool is_fault_class(const struct fault *fault)
{
    switch (fault->vector) {
    case VECTOR_DB:
        return fault->dr6 & 1u << 13; /* general detect is a fault; breakpoints on execution push RF as it is */
    case VECTOR_NMI:
    case VECTOR_BP:
    case VECTOR_OF:
    case VECTOR_DF:
    case VECTOR_MC:
        return false;
    default:
        return true;
    }
}

static void record_registers(struct icpu *c, const struct fault *fault)
{
    struct cpu_state *s = &c->v.cpu;
    if (fault->vector == VECTOR_PF)
        s->cr2 = fault->address;
    if (fault->vector == VECTOR_DB) {
        s->dr[6] = (s->dr[6] & ~0xFull) | fault->dr6;
        s->dr[7] &= ~(1ull << 13); /* GD */
    }
}

static void shut_down(struct icpu *c)
{
    struct cpu_state *s = &c->v.cpu;
    c->delivering = -1;
    s->activity = CPU_SHUTDOWN;
    simd_save(c);
    LOG_GUEST(LOG_WARNING, "processor %u shut down (triple fault) at %04x:%#llx, CR2 %#llx", c->v.index,
              s->seg[SEG_CS].selector, (unsigned long long)s->gpr[GPR_RIP], (unsigned long long)s->cr2);
}

void exception_deliver(struct icpu *c)
{
    struct cpu_state *s = &c->v.cpu;
    struct fault fault = c->fault;
    enum fault_class first = class_of(c->delivering), second = class_of(fault.vector);

    record_registers(c, &fault);
    TRACE(c, "exception %u error %#x address %#llx at %04x:%#llx\n", fault.vector, fault.error,
          (unsigned long long)fault.address, s->seg[SEG_CS].selector, (unsigned long long)s->gpr[GPR_RIP]);
    if (c->delivering == VECTOR_DF && second != BENIGN) {
        shut_down(c);
        return;
    }
    if (second != BENIGN && (first == PAGE_FAULT || (first == CONTRIBUTORY && second == CONTRIBUTORY)))
        fault = (struct fault){.vector = VECTOR_DF, .has_error = true};

    struct event e = {.vector = fault.vector, .has_error = fault.has_error, .error = fault.error,
                      .ext = ERROR_EXT, .sets_rf = is_fault_class(&fault)};
    vcpu_count(&c->v, COUNTER_exceptions);
    if (fault.vector == VECTOR_PF)
        vcpu_count(&c->v, COUNTER_page_faults);
    c->delivering = fault.vector;
    deliver(c, &e);
    c->delivering = -1;
}

void exception_software(struct icpu *c, uint8_t vector, bool is_int_n)
{
    /* Without CR4.VME, INT n in virtual-8086 mode is sensitive to IOPL; INT3 and INTO are not. */
    if (is_int_n && (c->v.cpu.rflags & RFLAGS_VM) && flags_iopl(c) < 3)
        raise_gp0(c);
    bool icebp = vector == VECTOR_DB && !is_int_n; /* INT1: hardware exception in all but name */
    struct event e = {.vector = vector, .ext = icebp ? ERROR_EXT : 0, .check_dpl = !icebp};
    vcpu_count(&c->v, COUNTER_software_interrupts);
    TRACE(c, "int %#x at %04x:%#llx\n", vector, c->v.cpu.seg[SEG_CS].selector,
          (unsigned long long)c->v.cpu.gpr[GPR_RIP]);
    c->delivering = -1;
    c->v.cpu.rflags &= ~RFLAGS_RF; /* successful completion of an instruction clears it before the push */
    deliver(c, &e);
}

void exception_interrupt(struct icpu *c, uint8_t vector)
{
    struct event e = {.vector = vector, .ext = ERROR_EXT};
    if (vector == VECTOR_NMI)
        c->v.cpu.nmi_blocked = true;
    vcpu_count(&c->v, COUNTER_interrupts);
    TRACE(c, "interrupt %#x at %04x:%#llx\n", vector, c->v.cpu.seg[SEG_CS].selector,
          (unsigned long long)c->v.cpu.gpr[GPR_RIP]);
    c->delivering = -1;
    deliver(c, &e);
}
