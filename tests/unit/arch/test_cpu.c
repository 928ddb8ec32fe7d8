/* Reset values, startup, and the saved form of a processor with hostile contents. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <string.h>

#include "arch/cpu.h"
#include "state/state.h"

static void power_on_values(void **state)
{
    struct cpu_state cpu;
    memset(&cpu, 0xAA, sizeof(cpu));
    cpu_reset(&cpu, CPU_RESET_POWER_ON);
    assert_int_equal(cpu.gpr[GPR_RIP], 0xFFF0);
    assert_int_equal(cpu.seg[SEG_CS].base, 0xFFFF0000);
    assert_int_equal(cpu.seg[SEG_CS].selector, 0xF000);
    assert_int_equal(cpu.rflags, 2);
    assert_int_equal(cpu.cr0, 0x60000010);
    assert_int_equal(cpu.dr[6], 0xFFFF0FF0);
    assert_int_equal(cpu.dr[7], 0x400);
    assert_int_equal(cpu.xcr0, 1);
    assert_int_equal(cpu.msr_pat, 0x0007040600070406);
    assert_int_equal(cpu_cpl(&cpu), 0);
    assert_int_equal(cpu.activity, CPU_RUNNING);
}

static void init_keeps(void **state)
{
    struct cpu_state cpu;
    cpu_reset(&cpu, CPU_RESET_POWER_ON);
    cpu.cr0 = CR0_PE | CR0_PG | CR0_ET;
    cpu.msr_lstar = 0x1234;
    cpu.tsc_offset = 77;
    cpu.xsave[0] = 0x7F;
    cpu.nmi_blocked = true;
    cpu_reset(&cpu, CPU_RESET_INIT);
    assert_int_equal(cpu.cr0, CR0_ET); /* CD and NW unchanged */
    assert_int_equal(cpu.msr_lstar, 0x1234);
    assert_int_equal(cpu.tsc_offset, 77);
    assert_int_equal(cpu.xsave[0], 0x7F);
    assert_false(cpu.nmi_blocked);
    cpu_start_at(&cpu, 0x9A);
    assert_int_equal(cpu.seg[SEG_CS].selector, 0x9A00);
    assert_int_equal(cpu.seg[SEG_CS].base, 0x9A000);
    assert_int_equal(cpu.gpr[GPR_RIP], 0);
}

static void long_mode_state(struct cpu_state *cpu)
{
    cpu_reset(cpu, CPU_RESET_POWER_ON);
    cpu->cr0 = CR0_PE | CR0_PG | CR0_ET | CR0_WP;
    cpu->cr4 = CR4_PAE | CR4_PCIDE;
    cpu->efer = EFER_LME | EFER_LMA | EFER_SCE;
    cpu->seg[SEG_CS] = (struct segment){.selector = 8, .attributes = 0xA09B, .limit = 0xFFFFFFFF};
    cpu->gpr[GPR_RIP] = 0xFFFFFFFF81000000;
    cpu->gpr[GPR_RBX] = 0x1122334455667788;
    cpu->seg[SEG_GS].base = 0xFFFF888000000000;
    cpu->msr_lstar = 0xFFFFFFFF81000100;
    cpu->activity = CPU_HALTED;
}

/* Saves *cpu and loads it into *loaded; returns the loader's result. */
static int round_trip(struct cpu_state *cpu, struct cpu_state *loaded)
{
    size_t size;
    struct state_io *writer = state_writer_create();
    assert_int_equal(cpu_state_state(cpu, writer), 0);
    const void *data = state_writer_data(writer, &size);
    struct state_io *reader = state_reader_create(data, size);
    memset(loaded, 0x55, sizeof(*loaded));
    int result = cpu_state_state(loaded, reader);
    state_io_destroy(reader);
    state_io_destroy(writer);
    return result;
}

static void saved_and_loaded(void **state)
{
    struct cpu_state cpu, loaded;
    long_mode_state(&cpu);
    assert_int_equal(round_trip(&cpu, &loaded), 0);
    assert_memory_equal(cpu.gpr, loaded.gpr, sizeof(cpu.gpr));
    assert_int_equal(loaded.seg[SEG_GS].base, cpu.seg[SEG_GS].base);
    assert_int_equal(loaded.seg[SEG_CS].attributes, 0xA09B);
    assert_int_equal(loaded.msr_lstar, cpu.msr_lstar);
    assert_int_equal(loaded.activity, CPU_HALTED);
    assert_memory_equal(cpu.xsave, loaded.xsave, sizeof(cpu.xsave));

    cpu_reset(&cpu, CPU_RESET_POWER_ON);
    assert_int_equal(round_trip(&cpu, &loaded), 0);
}

typedef void corrupt_fn(struct cpu_state *cpu);
static void corrupt_zero(struct cpu_state *cpu) { cpu->gpr[GPR_ZERO] = 1; }
static void corrupt_rflags(struct cpu_state *cpu) { cpu->rflags |= 1ull << 40; }
static void corrupt_vm(struct cpu_state *cpu) { cpu->rflags |= RFLAGS_VM; }
static void corrupt_pg(struct cpu_state *cpu) { cpu->cr0 &= ~CR0_PE; }
static void corrupt_cr4(struct cpu_state *cpu) { cpu->cr4 |= CR4_LA57; }
static void corrupt_vme(struct cpu_state *cpu) { cpu->cr4 |= CR4_VME; } /* not offered by any engine */
static void corrupt_lma(struct cpu_state *cpu) { cpu->efer &= ~EFER_LMA; }
static void corrupt_rip(struct cpu_state *cpu) { cpu->gpr[GPR_RIP] = 1ull << 50; }
static void corrupt_base(struct cpu_state *cpu) { cpu->seg[SEG_FS].base = 1ull << 60; }
static void corrupt_lstar(struct cpu_state *cpu) { cpu->msr_lstar = 1ull << 47; }
static void corrupt_cs(struct cpu_state *cpu) { cpu->seg[SEG_CS].attributes |= SEG_ATTR_DB; }
static void corrupt_pat(struct cpu_state *cpu) { cpu->msr_pat = 2; }
static void corrupt_mtrr(struct cpu_state *cpu) { cpu->msr_mtrr_fixed[3] = 0xFF; }
static void corrupt_activity(struct cpu_state *cpu) { cpu->activity = (enum cpu_activity)9; }
static void corrupt_xcr0(struct cpu_state *cpu) { cpu->xcr0 = 0; }
static void corrupt_xcr0_pkru(struct cpu_state *cpu) { cpu->xcr0 |= 1u << 9; }
static void corrupt_xstate_bv(struct cpu_state *cpu) { cpu->xsave[519] = 0x40; }
static void corrupt_xcomp_bv(struct cpu_state *cpu) { cpu->xsave[527] = 0x80; }
static void corrupt_mxcsr(struct cpu_state *cpu) { cpu->xsave[27] = 0x80; }
static void corrupt_dr7(struct cpu_state *cpu) { cpu->dr[7] = 1ull << 32; }

static void hostile_states_are_refused(void **state)
{
    static corrupt_fn *const corrupt[] = {
        corrupt_zero, corrupt_rflags, corrupt_vm, corrupt_pg, corrupt_cr4, corrupt_vme, corrupt_lma, corrupt_rip,
        corrupt_base, corrupt_lstar, corrupt_cs, corrupt_pat, corrupt_mtrr, corrupt_activity, corrupt_xcr0,
        corrupt_xcr0_pkru, corrupt_xstate_bv, corrupt_xcomp_bv, corrupt_mxcsr, corrupt_dr7,
    };
    for (unsigned n = 0; n < sizeof(corrupt) / sizeof(corrupt[0]); n++) {
        struct cpu_state cpu, loaded;
        long_mode_state(&cpu);
        corrupt[n](&cpu);
        if (round_trip(&cpu, &loaded) == 0)
            fail_msg("corruption %u was accepted", n);
        assert_int_equal(loaded.gpr[GPR_RIP], 0xFFF0); /* what was refused is not left behind */
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(power_on_values),
        cmocka_unit_test(init_keeps),
        cmocka_unit_test(saved_and_loaded),
        cmocka_unit_test(hostile_states_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
