/*
 * Signals that translated code causes, turned into table entries or exits.
 *
 * A fault in translated code finds its site, and with it the precise guest state. Whatever the tables can answer is filled in and the instruction starts again; everything
 * else leaves translated code at the instruction's boundary, for the run loop to deal with. A store of C code or of a native stub into a page with translations drops these
 * and happens again.
 * While translated code runs, RSP is the guest's. So every handler that can run then must have the alternate stack, and all asynchronous signals are blocked from
 * fault_thread_enter to fault_thread_leave: a handler without SA_ONSTACK, somebody's library's, would push its frame at an address that the guest chose. The alternate
 * stack disarms itself (SS_AUTODISARM), or the kernel would compare the guest's RSP with its bounds to find out whether it is in use.
 * The kernel keeps the guest's vector registers in the signal frame; the handler's own are clean, and simd_live is false meanwhile.
 * Threading: the table of engines is written under no vCPU's feet: before its first vCPU and after its last. The rest is the thread's own.
 */
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include "engine/bt/bt_priv.h"
#include "util/sandbox_rules.h"

SANDBOX_ALLOW(IN_VCPU, sigaltstack);
SANDBOX_ALLOW(IN_VCPU, rt_sigreturn);

#ifndef SS_AUTODISARM /* in <linux/signal.h>, which <signal.h> does not bear */
#define SS_AUTODISARM (1u << 31)
#endif
#define ENGINES_MAX 64
#define STACK_BYTES (128u << 10)
#define INSN_BYTES_MAX 15u
#define RETRIES_MAX 4
#define ERROR_WRITE 2u /* of a host page fault */
#define FLAGS_GUEST (RFLAGS_OSZAPC | RFLAGS_DF)
#define FLAGS_HOST (RFLAGS_IF | RFLAGS_FIXED)
#define SIGNAL_BIT(n) (1ull << ((n) - 1))

static _Atomic(struct bt_engine *) engines[ENGINES_MAX];

/* The vCPU that this thread runs, and what of the thread comes back after it. */
static _Thread_local struct {
    struct bt_vcpu *vcpu;
    uint64_t mask;
    stack_t stack;
} thread;

/* Where the general registers are in a signal frame. */
static const uint8_t greg_of[16] = {
    REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
    REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15,
};

struct bt_fault {
    struct bt_vcpu *b;
    greg_t *regs;
    uintptr_t rip, address;
    const struct bt_block *block; /* NULL: in a stub */
    const struct bt_site *site;
    bool memory; /* `address` is valid */
    bool write;
};

/* The lookup stub faults like any dynamic transfer. */
static const struct bt_site stub_site = {.spilled = 1u << GPR_R10 | 1u << GPR_R11, .kind = SITE_JUMP};

static bool locate(struct bt_fault *f)
{
    struct bt_engine *e = f->b->engine;
    if (f->rip - (uintptr_t)e->layout.tc_exec < e->stubs.end) {
        f->site = &stub_site;
        return true;
    }
    f->block = cache_find(e, f->rip);
    f->site = f->block ? cache_site(e, f->block, f->rip) : NULL;
    return f->site != NULL;
}

/* The guest's general registers as they were before the site's instruction. RIP is a code address until translated code is left. */
static void registers_save(const struct bt_fault *f)
{
    uint64_t *gpr = f->b->c.v.cpu.gpr;
    for (unsigned n = 0; n < 16; n++)
        if (!(f->site->spilled >> n & 1))
            gpr[n] = (uint64_t)f->regs[greg_of[n]];
}

static void insn_save(const struct bt_fault *f)
{
    uint64_t *gpr = f->b->c.v.cpu.gpr;
    registers_save(f);
    gpr[GPR_RSP] -= (uint64_t)(int64_t)f->site->rsp_adjust;
    gpr[GPR_RIP] = f->b->page_va + f->site->page_offset;
}

/* The guest's registers are saved; returning from the signal is now leaving translated code. */
static bool leave(struct bt_fault *f, enum bt_exit why)
{
    struct bt_vcpu *b = f->b;
    const struct bt_engine *e = b->engine;
    b->host_flags = ((uint64_t)f->regs[REG_EFL] & FLAGS_GUEST) | FLAGS_HOST;
    b->fault_tc = (uint32_t)(f->rip - (uintptr_t)e->layout.tc_exec);
    f->regs[REG_EFL] = FLAGS_HOST;
    f->regs[REG_RIP] = (greg_t)((uintptr_t)e->layout.tc_exec + e->stubs.leave_saved);
    f->regs[REG_RSP] = (greg_t)b->host_rsp;
    f->regs[REG_RAX] = why;
    return true;
}

static bool leave_insn(struct bt_fault *f, enum bt_exit why)
{
    insn_save(f);
    return leave(f, why);
}

/* Every table entry says "no" to an address that is not canonical, and the branch that used it then has not happened. */
static bool leave_jump(struct bt_fault *f)
{
    struct bt_vcpu *b = f->b;
    uint64_t target = (uint64_t)f->regs[REG_R11];
    if (f->block && b->mode.code_bits == 64 && !gva_is_canonical(target)) {
        insn_save(f);
        return leave(f, BT_EXIT_interp);
    }
    registers_save(f);
    b->c.v.cpu.gpr[GPR_RIP] = target;
    return leave(f, atomic_load(&b->exec_mask) ? BT_EXIT_miss : BT_EXIT_attention);
}

static bool start_again(struct bt_fault *f)
{
    f->regs[REG_RIP] = (greg_t)((uintptr_t)f->b->engine->layout.tc_exec + f->block->tc_start + f->site->tc_offset);
    return true;
}

/* Polls lie in the poison area, like empty entries: leaving before the instruction is right for both as long as the vCPU does get on afterwards. It does not when an
 * interrupt that waits for IF is the reason and IF is clear. */
static bool polled(const struct bt_fault *f)
{
    const struct bt_vcpu *b = f->b;
    uintptr_t poison = b->engine->layout.poison;
    if (f->address - (poison - BT_GUARD_BYTES) >= 2 * BT_GUARD_BYTES + PAGE_SIZE_BYTES)
        return false;
    return !atomic_load(&b->exec_mask) || (b->c.interrupt_waiting && (b->c.v.cpu.rflags & RFLAGS_IF));
}

static bool crossing_check(const struct bt_fault *f)
{
    uintptr_t check = (uintptr_t)f->b->table + (intptr_t)BT_CHECK + PAGE_SIZE_BYTES;
    return f->address - check < PAGE_SIZE_BYTES;
}

/* True when the address is in window W and its page was read-only because of translations, which are gone now. Or somebody else was faster. */
static bool code_dropped(struct bt_engine *e, uintptr_t address)
{
    uint64_t offset = address - (uintptr_t)e->layout.window_w;
    if (offset >= e->layout.ram_bytes)
        return false;
    pthread_mutex_lock(&e->lock);
    if (e->code_flags[offset / PAGE_SIZE_BYTES] & BT_CODE_PRESENT)
        cache_page_drop(e, offset & ~PAGE_MASK_BITS);
    pthread_mutex_unlock(&e->lock);
    return true;
}

/* The same accesses at the same site again and again: entries that drive each other out, or something that filling does not cure. */
static bool retries_exhausted(struct bt_fault *f, const struct bt_access *access, int count)
{
    struct bt_vcpu *b = f->b;
    uint64_t key = f->block->tc_start + f->site->tc_offset;
    for (int n = 0; n < count; n++)
        key = (key << 7 | key >> 57) ^ access[n].gva;
    if (b->retry_rip != key) {
        b->retry_rip = key;
        b->retry_count = 0;
    }
    if (++b->retry_count <= RETRIES_MAX)
        return false;
    b->retry_count = 0;
    return true;
}

/* The bytes of the instruction, up to 15, also those in the next page when it was translated with that. */
static unsigned insn_fetch(const struct bt_engine *e, const struct bt_page *page, unsigned offset, uint8_t bytes[INSN_BYTES_MAX])
{
    unsigned here = (unsigned)PAGE_SIZE_BYTES - offset;
    if (here > INSN_BYTES_MAX)
        here = INSN_BYTES_MAX;
    memcpy(bytes, e->layout.window_r + page->offset + offset, here);
    if (here == INSN_BYTES_MAX || !page->crosses)
        return here;
    memcpy(bytes + here, e->layout.window_r + page->crosses->offset, INSN_BYTES_MAX - here);
    return INSN_BYTES_MAX;
}

/*
 * Is that the page which the site accessed by way of V in register v? Not so when the bytes that `gva` was decoded from have changed since they were translated, by a device
 * that has not said so yet: V of one page must not meet an address in another.
 */
static bool was_accessed(const struct bt_fault *f, unsigned v, gva_t gva)
{
    return f->memory && !(((f->address - (uintptr_t)f->regs[greg_of[v]]) ^ gva) & ~PAGE_MASK_BITS);
}

/* Register v, which had V of the page of gva from an instruction before, gets the one that was filled in. In 32-bit code it had a host address in that page (struct group). */
static void register_refresh(struct bt_fault *f, unsigned v, gva_t gva)
{
    struct bt_vcpu *b = f->b;
    greg_t *reg = &f->regs[greg_of[v]];
    uintptr_t held = (uintptr_t)*reg;
    if (b->mode.code_bits == 64 && was_accessed(f, v, gva))
        *reg = (greg_t)tables_v(b, gva);
    else if (b->mode.code_bits == 32 && f->memory && !((f->address ^ held) & ~PAGE_MASK_BITS))
        *reg = (greg_t)((gva & ~PAGE_MASK_BITS) + tables_v(b, gva) + (held & PAGE_MASK_BITS));
}

static bool fill(struct bt_fault *f)
{
    struct bt_vcpu *b = f->b;
    struct bt_access access[4];
    unsigned offset = f->site->page_offset;
    insn_save(f);
    uint8_t bytes[INSN_BYTES_MAX];
    unsigned available = insn_fetch(b->engine, f->block->page, offset, bytes);
    int count = translate_accesses(b, bytes, available, access);
    b->fault_opaque = count < 0;
    if (count <= 0 || retries_exhausted(f, access, count))
        return leave(f, BT_EXIT_data);
    for (int n = 0; n < count; n++)
        if (tables_fill(b, access[n].gva, access[n].size, access[n].write) != BT_FILL_DONE) {
            b->fault_address = access[n].gva;
            return leave(f, b->fill_error && access[n].exact ? BT_EXIT_page_fault : BT_EXIT_data);
        }
    for (int n = 0; n < count; n++) {
        unsigned v = access[n].stack ? f->site->v_stack : f->site->v_memory;
        if (v != BT_NO_REGISTER)
            register_refresh(f, v, access[n].gva);
    }
    return start_again(f);
}

/* As if the elements so far had been one instruction and the rest were the next. */
static void string_stop(struct bt_fault *f)
{
    const uint64_t *end = f->b->scratch;
    uint64_t left = (uint64_t)f->regs[REG_RCX] * f->site->v_memory, mask = f->b->mode.code_bits == 64 ? ~0ull : UINT32_MAX;
    f->regs[REG_RDI] = (greg_t)((end[STRING_RDI_END] - left) & mask);
    if (f->site->v_stack)
        f->regs[REG_RSI] = (greg_t)((end[STRING_RSI_END] - left) & mask);
    f->site--;
}

static bool memory_fault(struct bt_fault *f)
{
    struct bt_vcpu *b = f->b;
    bool jump = f->site->kind == SITE_JUMP, next_page = f->site->kind == SITE_NEXT_PAGE;
    bool committed = f->memory && tables_commit(b, f->address, jump ? (gva_t)f->regs[REG_R11] : b->page_va, jump || next_page);
    if (jump)
        return leave_jump(f);
    if (committed)
        return start_again(f);
    if (next_page)
        return leave_insn(f, atomic_load(&b->exec_mask) ? BT_EXIT_interp : BT_EXIT_attention);
    if (f->memory && crossing_check(f)) {
        b->fault_crossing = true;
        return leave_insn(f, BT_EXIT_data);
    }
    if (f->memory && polled(f))
        return leave_insn(f, BT_EXIT_attention);
    if (f->memory && f->write && code_dropped(b->engine, f->address))
        return leave_insn(f, BT_EXIT_code_write);
    return fill(f);
}

/* SDM vol. 3, 6.15: what the trap number says. Wrong table entries make addresses that are not canonical, so #GP and #SS are memory's too. */
static bool translated_fault(struct bt_vcpu *b, greg_t *regs, uintptr_t address)
{
    unsigned trap = (unsigned)regs[REG_TRAPNO];
    struct bt_fault f = {.b = b, .regs = regs, .rip = (uintptr_t)regs[REG_RIP], .address = address};
    f.memory = trap == VECTOR_PF;
    f.write = regs[REG_ERR] & ERROR_WRITE;
    if (!locate(&f))
        return false;
    vcpu_count(&b->c.v, COUNTER_signals);
    bt_settle(b);
    if (f.site->kind == SITE_STRING)
        string_stop(&f);
    bool live = b->c.simd_live;
    b->c.simd_live = false;
    b->fault_crossing = b->fault_opaque = false;
    bool ours;
    if (trap == VECTOR_PF || trap == VECTOR_GP || trap == VECTOR_SS)
        ours = memory_fault(&f);
    else
        ours = f.block && leave_insn(&f, BT_EXIT_trap);
    b->c.simd_live = live;
    return ours;
}

/* C code or a native stub, on any thread, stores into window W. */
static bool store_fault(const greg_t *regs, uintptr_t address)
{
    if (regs[REG_TRAPNO] != VECTOR_PF || !(regs[REG_ERR] & ERROR_WRITE))
        return false;
    for (unsigned n = 0; n < ENGINES_MAX; n++) {
        struct bt_engine *e = atomic_load_explicit(&engines[n], memory_order_acquire);
        if (e && code_dropped(e, address))
            return true;
    }
    return false;
}

static bool fault_first(int sig, siginfo_t *info, void *context)
{
    greg_t *regs = ((ucontext_t *)context)->uc_mcontext.gregs;
    struct bt_vcpu *b = thread.vcpu;
    if (info->si_code <= 0) /* sent by somebody */
        return false;
    if (b && (uintptr_t)regs[REG_RIP] - (uintptr_t)b->engine->layout.tc_exec < b->engine->layout.tc_bytes)
        return translated_fault(b, regs, (uintptr_t)info->si_addr);
    return store_fault(regs, (uintptr_t)info->si_addr);
}

int fault_install(struct error *err)
{
    native_fault_first(fault_first);
    int rc = native_install_handlers();
    return rc ? error_set(err, rc, "cannot install fault handlers: %s", strerror(-rc)) : 0;
}

int fault_engine_add(struct bt_engine *e)
{
    for (unsigned n = 0; n < ENGINES_MAX; n++) {
        struct bt_engine *none = NULL;
        if (atomic_compare_exchange_strong(&engines[n], &none, e))
            return 0;
    }
    return -ENOSPC;
}

void fault_engine_remove(struct bt_engine *e)
{
    for (unsigned n = 0; n < ENGINES_MAX; n++) {
        struct bt_engine *expected = e;
        atomic_compare_exchange_strong(&engines[n], &expected, NULL);
    }
}

/* ---- threads ---- */

int fault_vcpu_create(struct bt_vcpu *b)
{
    uint8_t *stack = mmap(NULL, STACK_BYTES + BT_GUARD_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED)
        return -errno;
    if (mprotect(stack + BT_GUARD_BYTES, STACK_BYTES, PROT_READ | PROT_WRITE)) {
        int rc = -errno;
        munmap(stack, STACK_BYTES + BT_GUARD_BYTES);
        return rc;
    }
    b->signal_stack = stack;
    return 0;
}

void fault_vcpu_destroy(struct bt_vcpu *b)
{
    if (b->signal_stack)
        munmap(b->signal_stack, STACK_BYTES + BT_GUARD_BYTES);
    b->signal_stack = NULL;
}

/* By the system call itself: the library's functions keep two signals of its own out of every mask. */
static void mask_set(const uint64_t *mask, uint64_t *old)
{
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, mask, old, sizeof(*mask));
}

int fault_thread_enter(struct bt_vcpu *b)
{
    static const uint64_t blocked = ~(SIGNAL_BIT(SIGSEGV) | SIGNAL_BIT(SIGBUS) | SIGNAL_BIT(SIGFPE) | SIGNAL_BIT(SIGILL) | SIGNAL_BIT(SIGTRAP) | SIGNAL_BIT(SIGSYS));
    int rc = 0;
    stack_t stack = {.ss_sp = (uint8_t *)b->signal_stack + BT_GUARD_BYTES, .ss_size = STACK_BYTES, .ss_flags = (int)SS_AUTODISARM};
    mask_set(&blocked, &thread.mask);
    if (sigaltstack(&stack, &thread.stack)) {
        rc = -errno;
        mask_set(&thread.mask, NULL);
        return rc;
    }
    thread.vcpu = b;
    return 0;
}

void fault_thread_leave(struct bt_vcpu *b)
{
    thread.vcpu = NULL;
    sigaltstack(&thread.stack, NULL);
    mask_set(&thread.mask, NULL);
}
