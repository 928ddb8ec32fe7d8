/*
 * The rig of native_rig.h: a trampoline that executes one instruction with all registers loaded, and stand-ins for the interpreter around native.c.
 * Threading: one thread.
 */
#include "native_rig.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include "arch/host.h"

struct rig rig;

/* ---- stand-ins ---- */

static enum rig_path memory_path;

static _Noreturn void fault(struct icpu *c, unsigned vector, uint32_t error, uint64_t address)
{
    simd_save(c); /* unlike the interpreter's, this file is compiled with vector code */
    c->fault = (struct fault){.vector = (uint8_t)vector, .error = error, .address = address};
    longjmp(c->escape, INTERP_FAULT);
}

void raise_fault(struct icpu *c, unsigned vector)
{
    fault(c, vector, 0, 0);
}
void raise_error(struct icpu *c, unsigned vector, uint32_t error)
{
    fault(c, vector, error, 0);
}
void raise_page_fault(struct icpu *c, gva_t address, uint32_t error)
{
    fault(c, VECTOR_PF, error, address);
}
void raise_gp0(struct icpu *c)
{
    fault(c, VECTOR_GP, 0, 0);
}

static void check_range(struct icpu *c, gva_t gva, unsigned length)
{
    simd_save(c);
    uint64_t from = gva - (uintptr_t)rig.ram;
    if (!gva_is_canonical(gva))
        raise_gp0(c);
    if (from >= RIG_RAM_BYTES || from + length > RIG_RAM_BYTES)
        raise_page_fault(c, from < RIG_RAM_BYTES ? (uintptr_t)rig.ram + RIG_RAM_BYTES : gva, 0);
}

void mem_read_bytes(struct icpu *c, enum tlb_view view, gva_t gva, void *data, unsigned length)
{
    check_range(c, gva, length);
    memcpy(data, (const void *)gva, length);
}
void mem_write_bytes(struct icpu *c, enum tlb_view view, gva_t gva, const void *data, unsigned length)
{
    check_range(c, gva, length);
    memcpy((void *)gva, data, length);
}
void mem_check_alignment(struct icpu *c, enum tlb_view view, gva_t gva, unsigned alignment)
{
}
void mem_probe_write(struct icpu *c, enum tlb_view view, gva_t gva, unsigned length)
{
    check_range(c, gva, length);
}
uint64_t mem_read_slow(struct icpu *c, enum tlb_view view, gva_t gva, unsigned size)
{
    uint64_t value = 0;
    mem_read_bytes(c, view, gva, &value, size);
    return value;
}
void mem_write_slow(struct icpu *c, enum tlb_view view, gva_t gva, unsigned size, uint64_t value)
{
    mem_write_bytes(c, view, gva, &value, size);
}
void *mem_host(struct icpu *c, enum tlb_view view, gva_t gva, unsigned size, bool write)
{
    if (memory_path == RIG_BOUNCE || (gva & 4095) + size > 4096)
        return NULL;
    check_range(c, gva, size);
    return (void *)gva;
}
gva_t segment_linear(struct icpu *c, unsigned segment, uint64_t offset, unsigned size, bool write)
{
    return offset + c->segment_base[segment];
}
void interp_self_modified(struct icpu *c)
{
    rig.self_modified++;
}
void block_cache_flush(struct icpu *c)
{
    native_flush(c);
}
struct cpuid_regs cpuid_query(const struct cpuid_table *table, const struct cpu_state *cpu, unsigned apic_id, uint32_t leaf, uint32_t subleaf)
{
    return (struct cpuid_regs){.eax = 7}; /* XSAVEOPT, XSAVEC, XGETBV */
}
bool op_integer_select(struct icpu *c, const struct decode *d, struct insn *i)
{
    return false;
}
bool op_control_select(struct icpu *c, const struct decode *d, struct insn *i)
{
    return false;
}
bool op_string_select(struct icpu *c, const struct decode *d, struct insn *i)
{
    return false;
}
bool op_system_select(struct icpu *c, const struct decode *d, struct insn *i)
{
    return false;
}

/* ---- the trampoline ---- */

/* Behind the code page; the trampoline reaches it relative to RIP. */
struct frame {
    uint64_t in[16], out[16];
    uint64_t flags_in, flags_out;
    uint64_t host_rsp;
    _Alignas(64) uint8_t image[CPU_XSAVE_BYTES];
    _Alignas(64) uint8_t idle[CPU_XSAVE_BYTES];
};

#define INSN_OFFSET 256u

static uint8_t *page;
static struct frame *frame;
static unsigned at;
static int direct_trap;
static uintptr_t direct_after;
static uint8_t *alternate_stack;

static void put(const void *bytes, unsigned length)
{
    memcpy(page + at, bytes, length);
    at += length;
}
#define PUT(...) put((const uint8_t[]){__VA_ARGS__}, sizeof((const uint8_t[]){__VA_ARGS__}))

static void put_relative(const void *target)
{
    int32_t offset = (int32_t)((const uint8_t *)target - (page + at + 4));
    put(&offset, 4);
}

static void put_component_mask(void)
{
    uint32_t mask = (uint32_t)rig.xsave_mask;
    PUT(0xb8);
    put(&mask, 4);
    PUT(0x31, 0xd2);
}

static void build(const uint8_t *code, unsigned length)
{
    at = 0;
    PUT(0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57); /* push callee-saved */
    PUT(0x48, 0x89, 0x25), put_relative(&frame->host_rsp);
    put_component_mask();
    PUT(0x48, 0x0f, 0xae, 0x2d), put_relative(frame->image); /* xrstor64 */
    PUT(0xff, 0x35), put_relative(&frame->flags_in);
    PUT(0x9d);
    for (unsigned n = 0; n < 16; n++)
        PUT(0x48 | (n >> 3) << 2, 0x8b, 0x05 | (n & 7) << 3), put_relative(&frame->in[n]);
    while (at < INSN_OFFSET)
        PUT(0x90);
    put(code, length);
    direct_after = (uintptr_t)(page + at);
    for (unsigned n = 0; n < 16; n++)
        PUT(0x48 | (n >> 3) << 2, 0x89, 0x05 | (n & 7) << 3), put_relative(&frame->out[n]);
    PUT(0x48, 0x8b, 0x25), put_relative(&frame->host_rsp);
    PUT(0x9c, 0x8f, 0x05), put_relative(&frame->flags_out);
    put_component_mask();
    PUT(0x48, 0x0f, 0xae, 0x25), put_relative(frame->image); /* xsave64 */
    PUT(0x48, 0x0f, 0xae, 0x2d), put_relative(frame->idle);
    PUT(0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3);
}

static const int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
static struct sigaction installed[4];

static void direct_fault(int sig, siginfo_t *info, void *context)
{
    greg_t *regs = ((ucontext_t *)context)->uc_mcontext.gregs;
    if ((uintptr_t)regs[REG_RIP] != rig.code_address) {
        signal(sig, SIG_DFL);
        return;
    }
    direct_trap = (int)regs[REG_TRAPNO];
    regs[REG_RIP] = (greg_t)direct_after;
}

/* ---- running ---- */

void rig_run_direct(const uint8_t *code, unsigned length, const struct rig_state *from, const uint8_t *ram, struct rig_result *result)
{
    memcpy(rig.ram, ram, RIG_RAM_BYTES);
    build(code, length);
    memcpy(frame->in, from->gpr, sizeof(frame->in));
    frame->flags_in = from->flags | 0x202;
    memcpy(frame->image, from->xsave, sizeof(frame->image));
    direct_trap = -1;
    ((void (*)(void))(uintptr_t)page)();
    result->vector = direct_trap;
    memcpy(result->state.gpr, frame->out, sizeof(frame->out));
    result->state.flags = frame->flags_out & RFLAGS_OSZAPC;
    memcpy(result->state.xsave, frame->image, sizeof(frame->image));
    memcpy(result->ram, rig.ram, RIG_RAM_BYTES);
}

static void views_set(struct icpu *c, enum rig_path path)
{
    for (unsigned n = 0; n < TLB_ENTRIES; n++)
        c->tlb[n] = (struct tlb_entry){TLB_NEVER, TLB_NEVER, TLB_NEVER, 0};
    memory_path = path;
    if (path != RIG_TLB)
        return;
    for (unsigned n = 0; n < RIG_RAM_PAGES; n++) {
        gva_t gva = (uintptr_t)rig.ram + n * 4096;
        struct tlb_entry *e = tlb_slot(c, gva);
        e->read = e->write = gva | c->tlb_generation;
    }
}

void rig_run_interp(const struct insn *insn, enum rig_path path, const struct rig_state *from, const uint8_t *ram, struct rig_result *result)
{
    struct icpu *c = rig.c;
    memcpy(rig.ram, ram, RIG_RAM_BYTES);
    memcpy(c->v.cpu.gpr, from->gpr, sizeof(from->gpr));
    memcpy(c->v.cpu.xsave, from->xsave, sizeof(from->xsave));
    flags_set_arithmetic(c, from->flags);
    c->v.cpu.gpr[GPR_RIP] = rig.code_address + insn->length;
    views_set(c, path);
    volatile int vector = -1;
    if (setjmp(c->escape) == 0)
        insn->fn(c, insn);
    else
        vector = c->fault.vector;
    simd_save(c);
    result->vector = vector;
    memcpy(result->state.gpr, c->v.cpu.gpr, sizeof(from->gpr));
    result->state.flags = flags_arithmetic(c);
    memcpy(result->state.xsave, c->v.cpu.xsave, sizeof(from->xsave));
    memcpy(result->ram, rig.ram, RIG_RAM_BYTES);
}

/* ---- comparison ---- */

/* Initial components get their values, so that images compare. */
static void normalize(struct rig_state *state)
{
    uint8_t keep[CPU_XSAVE_BYTES];
    struct icpu *c = rig.c;
    memcpy(keep, c->v.cpu.xsave, sizeof(keep));
    memcpy(c->v.cpu.xsave, state->xsave, sizeof(keep));
    native_state_materialize(c, rig.xsave_mask);
    memcpy(state->xsave, c->v.cpu.xsave, sizeof(keep));
    memcpy(c->v.cpu.xsave, keep, sizeof(keep));
    if (c->amd && !(get16(state->xsave + XSAVE_FSW) & FSW_ES)) /* then nobody is shown the pointers */
        memset(state->xsave + XSAVE_FOP, 0, XSAVE_MXCSR - XSAVE_FOP);
}

const char *rig_compare(const struct rig_result *a, const struct rig_result *b)
{
    static struct rig_state x, y;
    if (a->vector != b->vector)
        return "fault";
    if (memcmp(a->state.gpr, b->state.gpr, sizeof(a->state.gpr)))
        return "general registers";
    if (a->state.flags != b->state.flags)
        return "flags";
    if (memcmp(a->ram, b->ram, RIG_RAM_BYTES))
        return "memory";
    x = a->state;
    y = b->state;
    normalize(&x);
    normalize(&y);
    if (memcmp(x.xsave, y.xsave, 8))
        return "x87 control, status, tags, opcode";
    if (memcmp(x.xsave + XSAVE_FIP, y.xsave + XSAVE_FIP, 16))
        return "x87 pointers";
    if (memcmp(x.xsave + XSAVE_MXCSR, y.xsave + XSAVE_MXCSR, 4))
        return "MXCSR";
    for (unsigned n = 0; n < 8; n++)
        if (memcmp(x.xsave + XSAVE_ST + n * 16, y.xsave + XSAVE_ST + n * 16, 10))
            return "x87 stack";
    if (memcmp(x.xsave + XSAVE_XMM, y.xsave + XSAVE_XMM, 256))
        return "XMM";
    static const char *const names[XSAVE_COMPONENTS] = {[2] = "YMM", [5] = "opmask", [6] = "ZMM", [7] = "ZMM16-31"};
    for (unsigned n = 2; n < XSAVE_COMPONENTS; n++) {
        const struct native_component *component = &rig.c->native->component[n];
        if (component->size && memcmp(x.xsave + component->offset, y.xsave + component->offset, component->size))
            return names[n];
    }
    return NULL;
}

/* ---- random states ---- */

uint64_t rig_random(void)
{
    static uint64_t seed = 0x9e3779b97f4a7c15ull;
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed;
}

void rig_random_bytes(void *data, size_t length)
{
    uint8_t *p = data;
    for (size_t n = 0; n < length; n += 8) {
        uint64_t value = rig_random();
        memcpy(p + n, &value, length - n < 8 ? length - n : 8);
    }
}

/* Bytes of which a good part are numbers of ordinary size, in either precision. */
static void random_numbers(uint8_t *data, size_t length)
{
    rig_random_bytes(data, length);
    for (size_t n = 0; n + 8 <= length; n += 8) {
        float single[2] = {(float)(int32_t)rig_random() / 65536, (float)(int16_t)rig_random()};
        double number = (double)(int64_t)rig_random() / 4294967296.0;
        switch (rig_random() % 6) {
        case 0:
        case 1:
            memcpy(data + n, single, 8);
            break;
        case 2:
        case 3:
            memcpy(data + n, &number, 8);
            break;
        default:
            break;
        }
    }
}

void rig_random_state(struct rig_state *state)
{
    memset(state, 0, sizeof(*state));
    for (unsigned n = 0; n < 16; n++)
        state->gpr[n] = rig_random() >> (rig_random() & 63);
    state->gpr[GPR_RSI] = (uintptr_t)rig.ram + 4096 + (rig_random() % 16) * 64;
    state->gpr[GPR_RDI] = (uintptr_t)rig.ram + 64 * (rig_random() % 32);
    state->flags = rig_random() & RFLAGS_OSZAPC;
    uint8_t *image = state->xsave;
    put16(image + XSAVE_FCW, (uint16_t)(0x37f | (rig_random() & 0xc00)));
    put16(image + XSAVE_FSW, rig_random() & 0x7f00);
    image[XSAVE_FTW] = (uint8_t)(rig_random() | rig_random());
    put32(image + XSAVE_MXCSR, 0x1f80 | (rig_random() & 0xe000));
    for (unsigned n = 0; n < 8; n++) {
        uint8_t *st = image + XSAVE_ST + n * 16;
        rig_random_bytes(st, 10);
        if (rig_random() % 4) {
            st[7] |= 0x80;
            put16(st + 8, (uint16_t)((0x3ff0 + rig_random() % 64) | (rig_random() & 0x8000)));
        }
    }
    random_numbers(image + XSAVE_XMM, 256);
    for (unsigned n = 2; n < XSAVE_COMPONENTS; n++)
        random_numbers(image + rig.c->native->component[n].offset, rig.c->native->component[n].size);
    put64(image + XSAVE_BV, rig.xsave_mask);
}

/* ---- decoding ---- */

bool rig_decode(const uint8_t *code, unsigned length, unsigned code_bits, struct insn *insn, ZydisDecodedInstruction *zi,
                ZydisDecodedOperand op[ZYDIS_MAX_OPERAND_COUNT])
{
    ZydisDecoder decoder;
    ZydisDecoderInit(&decoder, code_bits == 64 ? ZYDIS_MACHINE_MODE_LONG_64 : code_bits == 32 ? ZYDIS_MACHINE_MODE_LEGACY_32 : ZYDIS_MACHINE_MODE_LEGACY_16,
                     code_bits == 64 ? ZYDIS_STACK_WIDTH_64 : code_bits == 32 ? ZYDIS_STACK_WIDTH_32 : ZYDIS_STACK_WIDTH_16);
    if (!ZYAN_SUCCESS(ZydisDecoderDecodeFull(&decoder, code, length, zi, op)))
        return false;
    struct insn unknown;
    struct decode d = {.zi = *zi, .code_bits = code_bits, .bytes = code};
    memcpy(d.op, op, sizeof(d.op));
    memset(&unknown, 0, sizeof(unknown));
    if (!op_xsave_select(rig.c, &d, &unknown) && !native_select(rig.c, &d, &unknown))
        return false;
    return decode_insn(rig.c, code, length, code_bits, insn) == zi->length && insn->fn != op_undefined;
}

/* ---- set-up ---- */

static int trampoline_create(void)
{
    size_t frame_bytes = (sizeof(*frame) + 4095) & ~4095ul;
    page = mmap(NULL, 4096 + frame_bytes, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED)
        return -errno;
    frame = (struct frame *)(page + 4096);
    put16(frame->idle + XSAVE_FCW, FCW_DEFAULT);
    put32(frame->idle + XSAVE_MXCSR, MXCSR_DEFAULT);
    rig.code_address = (uintptr_t)page + INSN_OFFSET;

    alternate_stack = malloc(65536);
    stack_t stack = {.ss_sp = alternate_stack, .ss_size = 65536};
    if (!alternate_stack || sigaltstack(&stack, NULL))
        return -ENOMEM;
    for (unsigned n = 0; n < 4; n++) {
        struct sigaction action = {.sa_sigaction = direct_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK};
        sigaction(signals[n], &action, NULL);
    }
    int error = native_install_handlers();
    for (unsigned n = 0; n < 4; n++)
        sigaction(signals[n], NULL, &installed[n]);
    return error;
}

void rig_arm(void)
{
    for (unsigned n = 0; n < 4; n++)
        sigaction(signals[n], &installed[n], NULL);
}

int rig_create(void)
{
    int error = trampoline_create();
    rig.ram = mmap(NULL, RIG_RAM_BYTES + 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (error || rig.ram == MAP_FAILED || mprotect(rig.ram, RIG_RAM_BYTES, PROT_READ | PROT_WRITE))
        return -ENOMEM;
    struct icpu *c = aligned_alloc(64, (sizeof(*c) + 63) & ~63ul);
    if (!c)
        return -ENOMEM;
    memset(c, 0, sizeof(*c));
    rig.c = c;
    c->code_bits = 64;
    c->amd = host_is_amd();
    c->tlb = calloc(TLB_ENTRIES, sizeof(*c->tlb));
    c->tlb_generation = 1;
    error = native_create(c, 8u << 20);
    if (error)
        return error;
    rig.xsave_mask = c->native->xsave_mask;
    c->v.cpu.cr0 = CR0_PE | CR0_MP | CR0_NE;
    c->v.cpu.cr4 = CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_OSXSAVE;
    c->v.cpu.xcr0 = rig.xsave_mask;
    return 0;
}

void rig_destroy(void)
{
    native_destroy(rig.c);
    free(rig.c->tlb);
    free(rig.c);
    free(alternate_stack);
    munmap(rig.ram, RIG_RAM_BYTES + 4096);
}
