/* What a guest reads from CPUID: nothing that engines cannot do, consistent topology, sizes, frequencies, hypervisor leaves. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "arch/cpuid.h"
#include "state/state.h"

#define TSC_KHZ 2299998u

struct fixture {
    struct cpuid_config config;
    struct cpuid_table *table;
    struct cpu_state cpu;
};

static int setup(void **state)
{
    struct fixture *f = test_calloc(1, sizeof(*f));
    f->config = (struct cpuid_config){.cpu_count = 6, .tsc_khz = TSC_KHZ, .apic_bus_hz = 1000000000};
    f->table = cpuid_table_build(&f->config);
    cpu_reset(&f->cpu, CPU_RESET_POWER_ON);
    *state = f;
    return f->table ? 0 : -1;
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    cpuid_table_destroy(f->table);
    test_free(f);
    return 0;
}

static struct cpuid_regs query(struct fixture *f, uint32_t leaf, uint32_t subleaf)
{
    return cpuid_query(f->table, &f->cpu, 3, leaf, subleaf);
}

static bool is_intel(struct fixture *f)
{
    return query(f, 0, 0).ebx == 0x756E6547;
}

static void features(void **state)
{
    struct fixture *f = *state;
    struct cpuid_regs r = query(f, 1, 0);
    assert_int_equal(r.ecx & (1u << 3 | 1u << 5 | 1u << 6 | 1u << 15 | 1u << 27), 0); /* MONITOR VMX SMX PDCM OSXSAVE */
    assert_int_equal(r.ecx >> 31, 1);
    assert_int_equal(r.ecx & (1u << 17 | 1u << 21 | 1u << 24), 1u << 17 | 1u << 21 | 1u << 24);
    assert_int_equal(r.ebx >> 24, 3);
    assert_int_equal(r.ebx >> 16 & 0xFF, 6);
    f->cpu.cr4 = CR4_OSXSAVE;
    assert_int_equal(query(f, 1, 0).ecx >> 27 & 1, 1);
    r = query(f, 7, 0);
    assert_int_equal(r.ebx & (1u << 2 | 1u << 4 | 1u << 11 | 1u << 14), 0); /* SGX HLE MPX RTM */
    assert_int_equal(r.ecx & (1u << 3 | 1u << 4 | 1u << 5 | 1u << 7 | 1u << 16), 0); /* PKU OSPKE WAITPKG CET LA57 */
    assert_int_equal(r.edx & (1u << 20 | 1u << 22 | 1u << 24 | 1u << 25), 0);         /* IBT AMX */
    assert_int_equal(query(f, 10, 0).eax, 0);
    r = query(f, 0x80000001, 0);
    assert_int_equal(r.edx & (1u << 29 | 1u << 20), 1u << 29 | 1u << 20);
    assert_int_equal(r.ecx & (1u << 2), 0); /* SVM */
}

static void allowed_control_bits(void **state)
{
    struct fixture *f = *state;
    uint64_t cr4 = cpuid_cr4_allowed(f->table);
    assert_true(cr4 & CR4_PAE);
    assert_int_equal(cr4 & (CR4_LA57 | CR4_PKE | CR4_VME | 1ull << 13), 0);
    bool automatic_ibrs = !is_intel(f) && query(f, 0x80000000, 0).eax >= 0x80000021;
    assert_int_equal(query(f, 0x80000021, 0).eax >> 8 & 1 && automatic_ibrs, automatic_ibrs);
    assert_int_equal(cpuid_efer_allowed(f->table), EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE | (automatic_ibrs ? EFER_AIBRSE : 0));
    assert_int_equal(cpuid_xcr0_allowed(f->table), f->config.xcr0_supported);
    unsigned bits = cpuid_physical_address_bits(f->table);
    assert_in_range(bits, 36, 52);
    assert_int_equal(query(f, 0x80000008, 0).eax & 0xFF, bits);
}

static void topology(void **state)
{
    struct fixture *f = *state;
    if (query(f, 0, 0).eax >= 0xB) {
        assert_int_equal(query(f, 0xB, 0).ebx, 1);
        assert_int_equal(query(f, 0xB, 1).eax, 3); /* six processors need three bits */
        assert_int_equal(query(f, 0xB, 1).ebx, 6);
        assert_int_equal(query(f, 0xB, 1).edx, 3);
        assert_int_equal(query(f, 0xB, 2).ecx, 2); /* no more levels; the subleaf is echoed */
        assert_int_equal(query(f, 0xB, 2).edx, 3);
    }
    if (!is_intel(f))
        return;
    assert_int_equal(query(f, 4, 0).eax >> 26, 7);
    for (uint32_t n = 0; query(f, 4, n).eax & 0x1F; n++) {
        uint32_t eax = query(f, 4, n).eax;
        assert_int_equal(eax >> 14 & 0xFFF, (eax >> 5 & 7) >= 3 ? 7 : 0);
        assert_true(n < 8);
    }
}

static void xsave_sizes(void **state)
{
    struct fixture *f = *state;
    if (!f->config.xcr0_supported)
        return;
    assert_int_equal(query(f, 0xD, 0).eax, (uint32_t)f->config.xcr0_supported);
    assert_int_equal(query(f, 0xD, 0).ebx, 576);
    assert_true(query(f, 0xD, 0).ecx >= 576 && query(f, 0xD, 0).ecx <= CPU_XSAVE_BYTES);
    assert_int_equal(query(f, 0xD, 1).eax & 8, 0); /* XSAVES */
    if (f->config.xcr0_supported & XCR0_AVX) {
        f->cpu.xcr0 = XCR0_X87 | XCR0_SSE | XCR0_AVX;
        assert_int_equal(query(f, 0xD, 0).ebx, 832);
    }
}

static void frequencies(void **state)
{
    struct fixture *f = *state;
    if (query(f, 0, 0).eax < 0x16)
        return;
    struct cpuid_regs r = query(f, 0x15, 0);
    assert_int_equal(r.ecx, 1000000000);
    assert_true((uint64_t)r.ecx / 1000 * r.ebx <= UINT32_MAX); /* as Linux multiplies */
    uint64_t khz = (uint64_t)r.ecx / 1000 * r.ebx / r.eax;
    assert_in_range(khz, TSC_KHZ - TSC_KHZ / 100000, TSC_KHZ + TSC_KHZ / 100000);
    assert_int_equal(query(f, 0x16, 0).eax, TSC_KHZ / 1000);
}

static void hypervisor_leaves(void **state)
{
    struct fixture *f = *state;
    struct cpuid_regs r = query(f, 0x40000000, 0);
    char signature[13] = {0};
    memcpy(signature, &r.ebx, 4);
    memcpy(signature + 4, &r.ecx, 4);
    memcpy(signature + 8, &r.edx, 4);
    assert_string_equal(signature, "KVMKVMKVM");
    assert_int_equal(r.eax, 0x40000010);
    assert_int_equal(query(f, 0x40000001, 0).eax, 1u << 24 | 1u << 3 | 1u << 1);
    assert_int_equal(query(f, 0x40000010, 0).eax, TSC_KHZ);
    assert_int_equal(query(f, 0x40000010, 0).ebx, 1000000);
}

static void out_of_range(void **state)
{
    struct fixture *f = *state;
    struct cpuid_regs r = query(f, 0x12345, 0), highest = query(f, query(f, 0, 0).eax, 0);
    if (is_intel(f))
        assert_memory_equal(&r, &highest, sizeof(r));
    else
        assert_int_equal(r.eax | r.ebx | r.ecx | r.edx, 0);
}

/* Masks take features away, and what switches them on goes with them; they give nothing that is not there. */
static void masks(void **state)
{
    struct fixture *f = *state;
    struct error err = {0};
    uint32_t signature = query(f, 1, 0).eax;
    const struct cpuid_mask take[] = {{7, 0, 1, 1u << 20 | 1u << 7, 0}, {7, 0, 2, ~0u, 0}, {1, 0, 0, 0xF, ~signature & 0xF}, {0xB, 1, 1, 0xFFFF, 77}};
    for (size_t i = 0; i < sizeof take / sizeof *take; i++)
        assert_int_equal(cpuid_table_mask(f->table, &take[i], &err), 0);
    assert_int_equal(cpuid_table_mask(f->table, &(struct cpuid_mask){0x77, 0, 0, 1, 1}, &err), -ENOENT);
    assert_int_equal(cpuid_table_mask(f->table, &(struct cpuid_mask){1, 0, 2, 1u << 5, 1u << 5}, &err), -ENOTSUP); /* VMX */
    assert_non_null(strstr(err.text, "0x1.0 ECX: this host or the engine lacks vmx"));
    assert_int_equal(cpuid_table_seal(f->table, &err), 0);
    assert_int_equal(query(f, 7, 0).ebx & (1u << 20 | 1u << 7), 0);
    assert_int_equal(query(f, 7, 0).ecx, 0);
    assert_int_equal(query(f, 1, 0).eax, signature ^ 0xF);
    assert_int_equal(query(f, 0xB, 1).ebx, 77);
    assert_int_equal(cpuid_cr4_allowed(f->table) & (CR4_SMAP | CR4_SMEP | CR4_UMIP), 0);
    assert_int_equal(cpuid_cr4_allowed(f->table) & CR4_PCIDE, CR4_PCIDE);
    if (!cpuid_xcr0_allowed(f->table))
        return;
    assert_int_equal(cpuid_table_mask(f->table, &(struct cpuid_mask){0xD, 0, 0, XCR0_AVX512, 0}, &err), 0);
    assert_int_equal(cpuid_table_seal(f->table, &err), 0);
    assert_int_equal(cpuid_xcr0_allowed(f->table) & XCR0_AVX512, 0);
    assert_int_equal(cpuid_table_mask(f->table, &(struct cpuid_mask){0xD, 0, 0, 2, 0}, &err), 0); /* AVX without SSE */
    assert_int_equal(cpuid_table_seal(f->table, &err), -EINVAL);
}

static void msr_masks(void **state)
{
    struct fixture *f = *state;
    for (unsigned i = 0; i < CPUID_MSR_MASKS_MAX; i++)
        assert_int_equal(cpuid_table_mask_msr(f->table, &(struct msr_mask){0x100 + i, 0xFF, i}, NULL), 0);
    assert_int_equal(cpuid_table_mask_msr(f->table, &(struct msr_mask){0x200, 0xFF, 1}, NULL), -E2BIG);
    assert_int_equal(cpuid_msr_value(f->table, 0x103, 0x1234), 0x1203);
    assert_int_equal(cpuid_msr_value(f->table, 0x99, 0x1234), 0x1234);
}

/* `host` loads what was saved; "": it takes it. */
static void check_load(struct cpuid_table *host, struct state_io *saved, const char *reason)
{
    size_t bytes;
    const void *data = state_writer_data(saved, &bytes);
    struct state_io *io = state_reader_create(data, bytes);
    assert_int_equal(cpuid_state(host, io), *reason ? -EINVAL : 0);
    assert_non_null(strstr(state_error(io), reason));
    state_io_destroy(io);
    state_io_destroy(saved);
}

static struct state_io *saved_table(struct cpuid_table *table)
{
    struct state_io *io = state_writer_create();
    assert_int_equal(cpuid_state(table, io), 0);
    return io;
}

/* A processor by somebody else, whose control registers have every bit. */
static struct state_io *saved_other_vendor(void)
{
    struct state_io *io = state_writer_create();
    uint32_t count = 1, zero = 0, vendor = 0x21212121;
    uint64_t all = ~0ull;
    uint32_t *const words[] = {&count, &zero, &(uint32_t){~0u}, &zero, &vendor, &zero, &zero, &zero, &zero, &zero};
    state_begin(io, "cpuid", 2);
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        state_u32(io, words[i]);
    for (unsigned i = 0; i < 3; i++)
        state_u64(io, &all);
    assert_int_equal(state_end(io), 0);
    return io;
}

/* Of all that a host lacks, what is told is what matters most. */
static void other_hosts(void **state)
{
    struct fixture *f = *state;
    struct error err = {0};
    check_load(f->table, saved_table(f->table), "");
    check_load(f->table, saved_other_vendor(), "vendor differs");
    struct state_io *saved = saved_table(f->table);
    assert_int_equal(cpuid_table_mask(f->table, &(struct cpuid_mask){0x80000001, 0, 3, 1u << 20, 0}, &err), 0); /* and EFER.NXE */
    assert_int_equal(cpuid_table_seal(f->table, &err), 0);
    check_load(f->table, saved, "features of a processor that this host lacks: nx");
}

/* A template for one vendor's processors is none for the other's, of which a guest would see half. */
static void other_vendor(void **state)
{
    struct fixture *f = *state;
    struct error err = {0};
    struct cpuid_mask vendor = cpuid_vendor(f->table);
    assert_int_equal(cpuid_table_mask(f->table, &vendor, &err), 0);
    vendor.value ^= 1;
    assert_int_equal(cpuid_table_mask(f->table, &vendor, &err), -ENOTSUP);
    assert_non_null(strstr(err.text, "another vendor"));
}

static void names(void **state)
{
    char text[60] = "";
    cpuid_feature_names(7, 0, 1, 1u << 16 | 1u << 31 | 1u << 5, text, sizeof text);
    assert_string_equal(text, "avx2, avx512f, avx512vl");
    cpuid_feature_names(7, 0, 3, 1, text, sizeof text);
    assert_string_equal(text, "avx2, avx512f, avx512vl, cpuid.7.0:edx[0]");
    cpuid_feature_names(1, 0, 2, ~0u, text, sizeof text);
    assert_true(strlen(text) < sizeof text && strcmp(text + strlen(text) - 5, ", ...") == 0);
    char all[2000] = "";
    for (unsigned reg = 0; reg < 4; reg++) /* each table has all of its bits */
        cpuid_feature_names(1, 0, reg, 1u << 31, all, sizeof all);
    assert_string_equal(all, "cpuid.1.0:eax[31], cpuid.1.0:ebx[31], hypervisor, pbe");
    cpuid_feature_names(0x80000001, 0, 3, 1u << 20 | 1u << 29 | 1u << 31, all, sizeof all);
    assert_non_null(strstr(all, "nx, lm, 3dnow"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(features, setup, teardown),
        cmocka_unit_test_setup_teardown(allowed_control_bits, setup, teardown),
        cmocka_unit_test_setup_teardown(topology, setup, teardown),
        cmocka_unit_test_setup_teardown(xsave_sizes, setup, teardown),
        cmocka_unit_test_setup_teardown(frequencies, setup, teardown),
        cmocka_unit_test_setup_teardown(hypervisor_leaves, setup, teardown),
        cmocka_unit_test_setup_teardown(out_of_range, setup, teardown),
        cmocka_unit_test_setup_teardown(masks, setup, teardown),
        cmocka_unit_test_setup_teardown(msr_masks, setup, teardown),
        cmocka_unit_test_setup_teardown(other_hosts, setup, teardown),
        cmocka_unit_test_setup_teardown(other_vendor, setup, teardown),
        cmocka_unit_test(names),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
