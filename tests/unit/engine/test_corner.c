/* Corners of the interpreter: the ends of the address space, code that changes in odd places, alignment, odd states. */
#include <errno.h>
#include <signal.h>
#include <string.h>

#include "state/state.h"
#include "tiny_test.h"

#define CODE(...) (const uint8_t[]){__VA_ARGS__}
#define LOAD_BYTES(vm, mode, ...) tiny_vm_load(vm, mode, CODE(__VA_ARGS__), sizeof(CODE(__VA_ARGS__)))

static uint64_t *gpr(struct tiny_vm *vm)
{
    return vm->vcpu->cpu.gpr;
}

static void restart(struct tiny_vm *vm)
{
    gpr(vm)[GPR_RIP] = TINY_CODE;
    vm->vcpu->cpu.activity = CPU_RUNNING;
}

/* ---- code ---- */

/* LOCK MOV becomes LOCK ADD: the byte that changes is not the first. */
static void invalid_becomes_valid(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD_BYTES(vm, TINY_LONG, 0x90, 0xf0, 0x89, 0x03, 0xf4); /* nop; lock mov %eax, (%rbx); hlt */
    gpr(vm)[GPR_RAX] = 7;
    gpr(vm)[GPR_RBX] = TINY_DATA;
    run_to_vector(vm, VECTOR_UD);
    *(uint8_t *)tiny_vm_at(vm, TINY_CODE + 2) = 0x01;
    restart(vm);
    run_to_halt(vm);
    assert_int_equal(gpr(vm)[GPR_RIP], TINY_CODE + 5);
    assert_int_equal(*(uint32_t *)tiny_vm_at(vm, TINY_DATA), 7);
}

/* ---- the end of the 32-bit address space ---- */

#define TOP_PAGE 0x400000u /* physical, of the 4 MiB at the top */

/* The top of the linear space is at TOP_PAGE, its bottom at 0. */
static void map_top(struct tiny_vm *vm, bool compatibility)
{
    struct cpu_state *cpu = &vm->vcpu->cpu;
    if (compatibility) {
        *(uint64_t *)tiny_vm_at(vm, TINY_PDPT + 3 * 8) = 0xb0000 | 7;
        *(uint64_t *)tiny_vm_at(vm, 0xb0000 + 511 * 8) = (TOP_PAGE + 0x200000) | 0x87;
        cpu->seg[SEG_CS].attributes = (uint16_t)((cpu->seg[SEG_CS].attributes & ~SEG_ATTR_L) | SEG_ATTR_DB);
    } else {
        *(uint32_t *)tiny_vm_at(vm, 0xb0000) = 0x87;
        *(uint32_t *)tiny_vm_at(vm, 0xb0000 + 1023 * 4) = TOP_PAGE | 0x87;
        cpu->cr4 |= CR4_PSE;
        cpu->cr3 = 0xb0000;
        cpu->cr0 |= CR0_PG;
    }
    interp_engine.state_changed(vm->vcpu);
}

static void wrap(struct tiny_vm *vm, enum tiny_mode mode)
{
    /* mov 0xfffffffe, %eax; push 0xfffffffd; jmp *%ecx */
    LOAD_BYTES(vm, mode, 0xa1, 0xfe, 0xff, 0xff, 0xff, 0xff, 0x35, 0xfd, 0xff, 0xff, 0xff, 0xff, 0xe1);
    map_top(vm, mode == TINY_LONG);
    memcpy(tiny_vm_at(vm, TOP_PAGE + 0x3ffffb), CODE(0x90, 0x90, 0xbb, 0x11, 0x22), 5); /* nop; nop; mov $..., %ebx */
    memcpy(tiny_vm_at(vm, 0), CODE(0x33, 0x44, 0xf4), 3);                               /* the rest of it; hlt */
    gpr(vm)[GPR_RCX] = 0xfffffffb;
    run_to_halt(vm);
    assert_int_equal(gpr(vm)[GPR_RIP], 3);
    assert_int_equal(gpr(vm)[GPR_RAX], 0x44332211);
    assert_int_equal(gpr(vm)[GPR_RBX], 0x44332211);
    assert_int_equal(*(uint32_t *)tiny_vm_at(vm, gpr(vm)[GPR_RSP]), 0x332211bb);
}

static void accesses_wrap_at_4_gib(void **state)
{
    wrap(*state, TINY_PROTECTED);
    wrap(*state, TINY_LONG);
}

/* Bytes from offset 0 upwards, and from the last downwards: all 2^64 of them are in reach, which is no number of 64 bits. */
static void bytes_from_the_ends_of_the_offsets(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD_BYTES(vm, TINY_LONG, 0x64, 0xf3, 0xa4, 0xf4); /* rep movsb fs:; hlt */
    for (unsigned down = 0; down < 2; down++) {
        memcpy(tiny_vm_at(vm, TINY_DATA), "doppel", 6);
        memset(tiny_vm_at(vm, TINY_DATA + 0x100), 0, 8);
        vm->vcpu->cpu.seg[SEG_FS].base = down ? TINY_DATA + 6 : TINY_DATA;
        vm->vcpu->cpu.rflags = RFLAGS_FIXED | (down ? RFLAGS_DF : 0);
        interp_engine.state_changed(vm->vcpu);
        gpr(vm)[GPR_RSI] = down ? ~0ull : 0;
        gpr(vm)[GPR_RDI] = TINY_DATA + (down ? 0x105 : 0x100);
        gpr(vm)[GPR_RCX] = 6;
        restart(vm);
        run_to_halt(vm);
        assert_memory_equal(tiny_vm_at(vm, TINY_DATA + 0x100), "doppel\0", 8);
        assert_int_equal(gpr(vm)[GPR_RCX], 0);
        assert_int_equal(gpr(vm)[GPR_RSI], down ? ~6ull : 6);
    }
}

/* An instruction that ends there: the state that is left and saved has EIP 0, whether run returns or an exception is delivered. */
static void eip_wraps_at_4_gib(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD_BYTES(vm, TINY_PROTECTED, 0xf4);
    map_top(vm, false);
    *(uint8_t *)tiny_vm_at(vm, TOP_PAGE + 0x3fffff) = 0xf4;
    gpr(vm)[GPR_RIP] = 0xffffffff;
    run_to_halt(vm);
    assert_int_equal(gpr(vm)[GPR_RIP], 0);

    *(uint8_t *)tiny_vm_at(vm, TOP_PAGE + 0x3fffff) = 0x90;
    gpr(vm)[GPR_RIP] = 0xffffffff;
    vm->vcpu->cpu.activity = CPU_RUNNING;
    vm->vcpu->cpu.rflags |= RFLAGS_TF;
    run_to_vector(vm, VECTOR_DB);
    assert_int_equal(*(uint32_t *)tiny_vm_at(vm, gpr(vm)[GPR_RSP]), 0);
}

/* 16-bit code does not wrap: IP 0x10000 is beyond the limit. */
static void ip_stops_at_64_kib(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD_BYTES(vm, TINY_REAL, 0xf4);
    memset(tiny_vm_at(vm, TINY_CODE + 0xfff0), 0x90, 0x20);
    gpr(vm)[GPR_RIP] = 0xfff0;
    run_to_halt(vm);
    assert_int_equal(gpr(vm)[GPR_RIP] + vm->vcpu->cpu.seg[SEG_CS].base, TINY_HANDLER + 16 * VECTOR_GP + 1);
    assert_int_equal(vm->vcpu->counters[COUNTER_exceptions], 1);
}

/* ---- what run leaves can be saved and loaded ---- */

static int round_trip(struct cpu_state *cpu)
{
    size_t size;
    struct state_io *writer = state_writer_create();
    assert_int_equal(cpu_state_state(cpu, writer), 0);
    const void *data = state_writer_data(writer, &size);
    struct state_io *reader = state_reader_create(data, size);
    struct cpu_state loaded;
    int result = cpu_state_state(&loaded, reader);
    if (!result)
        assert_memory_equal(loaded.gpr, cpu->gpr, sizeof(loaded.gpr));
    state_io_destroy(reader);
    state_io_destroy(writer);
    return result;
}

static void state_at_the_end_of_the_lower_half(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD_BYTES(vm, TINY_LONG, 0xf4);
    *(uint64_t *)tiny_vm_at(vm, TINY_PML4 + 255 * 8) = 0xb0000 | 7;
    *(uint64_t *)tiny_vm_at(vm, 0xb0000 + 511 * 8) = 0xb1000 | 7;
    *(uint64_t *)tiny_vm_at(vm, 0xb1000 + 511 * 8) = TOP_PAGE | 0x87;
    *(uint8_t *)tiny_vm_at(vm, TOP_PAGE + 0x1fffff) = 0xf4;
    gpr(vm)[GPR_RIP] = 0x7fffffffffffull;
    run_to_halt(vm);
    assert_int_equal(gpr(vm)[GPR_RIP], 0x800000000000ull);
    assert_int_equal(round_trip(&vm->vcpu->cpu), 0);
    vm->vcpu->cpu.activity = CPU_RUNNING;
    run_to_vector(vm, VECTOR_GP);
}

/* A task switch whose new CS cannot be loaded, with no handler for the #TS. */
static void state_after_a_lost_task_switch(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD_BYTES(vm, TINY_PROTECTED, 0xea, 0, 0, 0, 0, 0x48, 0); /* ljmp $0x48, $0 */
    struct cpu_state *cpu = &vm->vcpu->cpu;
    *(uint64_t *)tiny_vm_at(vm, TINY_GDT + 0x48) = 0x00008900c0000067ull | 0x0b0000ull << 16; /* TSS at 0xbc000 or so: all zero */
    cpu->gdtr.limit = 0x4f;
    cpu->idtr.limit = 0;
    interp_engine.state_changed(vm->vcpu);
    assert_int_equal(interp_engine.run(vm->vcpu), ENGINE_EXIT_SHUTDOWN);
    assert_true(cpu->seg[SEG_CS].unusable);
    assert_int_equal(round_trip(cpu), 0);
    cpu->activity = CPU_RUNNING;
    assert_int_equal(round_trip(cpu), -EINVAL);
}

/* ---- events ---- */

/* The interrupt came while IF was clear: the flags that IRET takes into virtual-8086 mode let it in. */
static void interrupt_waits_for_v86(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD_BYTES(vm, TINY_PROTECTED, 0xcf);
    const uint32_t frame[9] = {0, TINY_DATA >> 4, RFLAGS_VM | RFLAGS_IF | RFLAGS_FIXED, 0x1000, 0x3000, 0, 0, 0, 0};
    memcpy(tiny_vm_at(vm, TINY_STACK - 0x100), frame, sizeof(frame));
    memset(tiny_vm_at(vm, TINY_DATA), 0x90, 64);
    *(uint8_t *)tiny_vm_at(vm, TINY_DATA + 64) = 0xf4; /* HLT is not for CPL 3 */
    gpr(vm)[GPR_RSP] = TINY_STACK - 0x100;
    vm->pending_vector = 0x44;
    run_to_vector(vm, 0x44);
    assert_int_equal(*(uint32_t *)tiny_vm_at(vm, gpr(vm)[GPR_RSP]), 0);
    assert_int_equal(*(uint16_t *)tiny_vm_at(vm, gpr(vm)[GPR_RSP] + 4), TINY_DATA >> 4);
}

/* ---- signals ---- */

/* Of the process that the library is part of. */
static void ignored_signals_stay_ignored(void **state)
{
    struct sigaction old, ignore = {.sa_handler = SIG_IGN};
    struct tiny_vm vm = {0};
    assert_int_equal(sigaction(SIGBUS, &ignore, &old), 0);
    assert_int_equal(tiny_vm_create(&vm), 0); /* takes the signal */
    raise(SIGBUS);
    tiny_vm_destroy(&vm);
    sigaction(SIGBUS, &old, NULL);
}

/* ---- alignment ---- */

static void user_runs(struct tiny_vm *vm, uint64_t address)
{
    vm->vcpu->cpu.cr0 |= CR0_AM;
    tiny_vm_enter_user(vm, true);
    vm->vcpu->cpu.rflags |= RFLAGS_AC;
    gpr(vm)[GPR_RBX] = address;
}

static void alignment_of_long_operands(void **state)
{
    struct tiny_vm *vm = *state;
    static const struct {
        uint8_t code[5];
        uint8_t aligned, misaligned; /* low address bits */
    } cases[] = {
        {{0xd9, 0x33}, 4, 2},       /* fnstenv (%rbx) */
        {{0x66, 0xd9, 0x33}, 2, 1}, /* with 16-bit operands */
        {{0xd9, 0x23}, 4, 2},       /* fldenv */
        {{0xdd, 0x33}, 4, 2},       /* fnsave */
        {{0xdd, 0x23}, 4, 2},       /* frstor */
        {{0x0f, 0x01, 0x03}, 6, 4}, /* sgdt: the base is what has to be aligned */
    };
    for (unsigned n = 0; n < sizeof(cases) / sizeof(cases[0]); n++) {
        for (unsigned misaligned = 0; misaligned < 2; misaligned++) {
            LOAD_BYTES(vm, TINY_LONG, 0);
            memcpy(tiny_vm_at(vm, TINY_CODE), CODE(0x90, 0x90, 0x90, 0x90, 0x90, 0x0f, 0x0b), 7); /* ...; ud2 */
            for (unsigned at = 0; at < 5 && cases[n].code[at]; at++)
                *(uint8_t *)tiny_vm_at(vm, TINY_CODE + at) = cases[n].code[at];
            user_runs(vm, TINY_DATA + (misaligned ? cases[n].misaligned : cases[n].aligned));
            run_to_vector(vm, misaligned ? VECTOR_AC : VECTOR_UD);
        }
    }
}

/* A far call's pushes, to the same level. */
static void alignment_of_far_calls(void **state)
{
    struct tiny_vm *vm = *state;
    for (unsigned misaligned = 0; misaligned < 2; misaligned++) {
        LOAD_BYTES(vm, TINY_LONG, 0x48, 0xff, 0x1b, 0x0f, 0x0b, 0x0f, 0x0b); /* rex.w lcall *(%rbx); ud2; ud2 */
        *(uint64_t *)tiny_vm_at(vm, TINY_DATA) = TINY_CODE + 5;
        *(uint16_t *)tiny_vm_at(vm, TINY_DATA + 8) = TINY_USER_CS64;
        user_runs(vm, TINY_DATA);
        gpr(vm)[GPR_RSP] -= misaligned;
        run_to_vector(vm, misaligned ? VECTOR_AC : VECTOR_UD);
    }
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(invalid_becomes_valid), T(accesses_wrap_at_4_gib), T(bytes_from_the_ends_of_the_offsets), T(eip_wraps_at_4_gib), T(ip_stops_at_64_kib),
        T(state_at_the_end_of_the_lower_half), T(state_after_a_lost_task_switch),
        T(interrupt_waits_for_v86), T(ignored_signals_stay_ignored),
        T(alignment_of_long_operands), T(alignment_of_far_calls),
    };
    return cmocka_run_group_tests_name("corner", tests, NULL, NULL);
}
