/* The page-table walk: modes, rights, reserved bits, accessed and dirty bits. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <string.h>

#include "arch/paging.h"

#define P 1ull
#define RW 2ull
#define US 4ull
#define A 0x20ull
#define D 0x40ull
#define PS 0x80ull
#define G 0x100ull
#define NX (1ull << 63)
#define PHYS_BITS 46

struct fixture {
    struct physmap *memory;
    struct cpu_state cpu;
    struct paging_result result;
    uint32_t error;
};

static int setup(void **state)
{
    struct fixture *f = test_calloc(1, sizeof(*f));
    if (physmap_create(&f->memory, 4 << 20, NULL))
        return -1;
    f->cpu.cr0 = CR0_PE | CR0_PG | CR0_WP;
    f->cpu.cr3 = 0x1000;
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    physmap_destroy(f->memory);
    test_free(f);
    return 0;
}

static void put64(struct fixture *f, gpa_t gpa, uint64_t value)
{
    assert_int_equal(physmap_write(f->memory, gpa, &value, 8), 0);
}
static uint64_t get64(struct fixture *f, gpa_t gpa)
{
    uint64_t value;
    assert_int_equal(physmap_read(f->memory, gpa, &value, 8), 0);
    return value;
}
static void put32(struct fixture *f, gpa_t gpa, uint32_t value)
{
    assert_int_equal(physmap_write(f->memory, gpa, &value, 4), 0);
}
static uint32_t get32(struct fixture *f, gpa_t gpa)
{
    uint32_t value;
    assert_int_equal(physmap_read(f->memory, gpa, &value, 4), 0);
    return value;
}

static int walk(struct fixture *f, gva_t gva, unsigned access)
{
    f->error = 0;
    memset(&f->result, 0, sizeof(f->result));
    return paging_walk(f->memory, &f->cpu, PHYS_BITS, gva, access, &f->result, &f->error);
}

static void assert_fault(struct fixture *f, gva_t gva, unsigned access, uint32_t error)
{
    assert_int_equal(walk(f, gva, access), -EFAULT);
    assert_int_equal(f->error, error);
}

/* gva 0xffff800000201000 -> 0x9000 through tables at 0x1000, 0x2000, 0x3000, 0x4000. */
#define GVA4 0xffff800000201234ull
static void map_4level(struct fixture *f, uint64_t upper, uint64_t leaf)
{
    f->cpu.cr4 = CR4_PAE | CR4_PGE;
    f->cpu.efer = EFER_LMA | EFER_LME | EFER_NXE;
    put64(f, 0x1000 + 256 * 8, 0x2000 | upper);
    put64(f, 0x2000, 0x3000 | upper);
    put64(f, 0x3000 + 8, 0x4000 | upper);
    put64(f, 0x4000 + 8, 0x9000 | leaf);
}

static void paging_off_is_identity(void **state)
{
    struct fixture *f = *state;
    f->cpu.cr0 = CR0_PE;
    assert_int_equal(walk(f, 0x12345678, PAGING_WRITE), 0);
    assert_int_equal(f->result.gpa, 0x12345678);
    assert_true(f->result.writable && f->result.executable && f->result.dirty);
}

static void four_levels(void **state)
{
    struct fixture *f = *state;
    map_4level(f, P | RW | US, P | RW | G);
    assert_int_equal(walk(f, GVA4, PAGING_READ), 0);
    assert_int_equal(f->result.gpa, 0x9234);
    assert_int_equal(f->result.page_bytes, 4096);
    assert_true(f->result.writable && !f->result.user && f->result.executable && f->result.global && !f->result.dirty);
    assert_int_equal(get64(f, 0x4008), 0x9000 | P | RW | G | A);
    assert_int_equal(get64(f, 0x1000 + 256 * 8), 0x2000 | P | RW | US | A);
    assert_int_equal(walk(f, GVA4, PAGING_WRITE), 0);
    assert_true(f->result.dirty);
    assert_int_equal(get64(f, 0x4008), 0x9000 | P | RW | G | A | D);
    assert_int_equal(get64(f, 0x3008), 0x4000 | P | RW | US | A);
    assert_fault(f, GVA4, PAGING_READ | PAGING_USER, PF_P | PF_U);
    assert_fault(f, GVA4 + 0x1000, PAGING_WRITE, PF_W);
    assert_int_equal(walk(f, 0x800000000000, PAGING_READ), -EINVAL);
}

static void no_update_leaves_tables_alone(void **state)
{
    struct fixture *f = *state;
    map_4level(f, P | RW, P | RW);
    assert_int_equal(walk(f, GVA4, PAGING_WRITE | PAGING_NO_UPDATE), 0);
    assert_false(f->result.dirty);
    assert_int_equal(get64(f, 0x4008), 0x9000 | P | RW);
}

static void write_protection(void **state)
{
    struct fixture *f = *state;
    map_4level(f, P | RW | US, P | US);
    assert_fault(f, GVA4, PAGING_WRITE, PF_P | PF_W);
    assert_fault(f, GVA4, PAGING_WRITE | PAGING_USER, PF_P | PF_W | PF_U);
    f->cpu.cr0 &= ~CR0_WP;
    assert_int_equal(walk(f, GVA4, PAGING_WRITE), 0);
    assert_false(f->result.writable);
    assert_fault(f, GVA4, PAGING_WRITE | PAGING_USER, PF_P | PF_W | PF_U);
    map_4level(f, P | US, P | RW | US); /* rights of every level count */
    assert_fault(f, GVA4, PAGING_WRITE | PAGING_USER, PF_P | PF_W | PF_U);
}

static void execution_rights(void **state)
{
    struct fixture *f = *state;
    map_4level(f, P | RW | US, P | RW | US | NX);
    assert_fault(f, GVA4, PAGING_FETCH | PAGING_USER, PF_P | PF_U | PF_I);
    assert_int_equal(walk(f, GVA4, PAGING_READ | PAGING_USER), 0);
    assert_false(f->result.executable);
    map_4level(f, P | RW | US, P | RW | US);
    assert_int_equal(walk(f, GVA4, PAGING_FETCH), 0);
    f->cpu.cr4 |= CR4_SMEP;
    assert_fault(f, GVA4, PAGING_FETCH, PF_P | PF_I);
    assert_int_equal(walk(f, GVA4, PAGING_FETCH | PAGING_USER), 0);
    f->cpu.cr4 &= ~CR4_SMEP;
    f->cpu.efer &= ~EFER_NXE; /* now bit 63 is reserved, and fetches are not reported */
    map_4level(f, P | RW | US, P | RW | US | NX);
    f->cpu.efer &= ~EFER_NXE;
    assert_fault(f, GVA4, PAGING_FETCH | PAGING_USER, PF_P | PF_RSVD | PF_U);
}

static void supervisor_mode_access_prevention(void **state)
{
    struct fixture *f = *state;
    map_4level(f, P | RW | US, P | RW | US);
    f->cpu.cr4 |= CR4_SMAP;
    assert_fault(f, GVA4, PAGING_READ, PF_P);
    assert_fault(f, GVA4, PAGING_WRITE, PF_P | PF_W);
    assert_int_equal(walk(f, GVA4, PAGING_READ | PAGING_AC), 0);
    assert_int_equal(walk(f, GVA4, PAGING_READ | PAGING_USER), 0);
    assert_int_equal(walk(f, GVA4, PAGING_FETCH), 0);
}

static void reserved_bits(void **state)
{
    struct fixture *f = *state;
    map_4level(f, P | RW, P | RW | 1ull << PHYS_BITS);
    assert_fault(f, GVA4, PAGING_READ, PF_P | PF_RSVD);
    map_4level(f, P | RW, P | RW);
    put64(f, 0x1000 + 256 * 8, 0x2000 | P | RW | PS); /* no 512 GiB pages */
    assert_fault(f, GVA4, PAGING_READ, PF_P | PF_RSVD);
    map_4level(f, P | RW, P | RW);
    put64(f, 0x3008, 0x202000 | P | RW | PS); /* a 2 MiB page off its boundary */
    assert_fault(f, GVA4, PAGING_WRITE, PF_P | PF_RSVD | PF_W);
}

static void large_pages(void **state)
{
    struct fixture *f = *state;
    map_4level(f, P | RW, P | RW);
    put64(f, 0x3008, 0x201000 | P | RW | PS); /* bit 12 is PAT */
    assert_int_equal(walk(f, GVA4, PAGING_WRITE), 0);
    assert_int_equal(f->result.gpa, 0x201234);
    assert_int_equal(f->result.page_bytes, 2 << 20);
    assert_int_equal(get64(f, 0x3008), 0x201000 | P | RW | PS | A | D);
    put64(f, 0x2000, 0x40000000 | P | RW | PS);
    assert_int_equal(walk(f, GVA4, PAGING_READ), 0);
    assert_int_equal(f->result.gpa, 0x40201234);
    assert_int_equal(f->result.page_bytes, 1 << 30);
}

static void tables_outside_ram(void **state)
{
    struct fixture *f = *state;
    map_4level(f, P | RW, P | RW);
    put64(f, 0x2000, 0x80000000 | P | RW);
    assert_fault(f, GVA4, PAGING_READ, PF_P | PF_RSVD);
}

static void thirty_two_bits(void **state)
{
    struct fixture *f = *state;
    put32(f, 0x1000 + 4, 0x2000 | P | RW | US);
    put32(f, 0x2000 + 4, 0x7000 | P | RW);
    assert_int_equal(walk(f, 0x401234, PAGING_WRITE), 0);
    assert_int_equal(f->result.gpa, 0x7234);
    assert_int_equal(get32(f, 0x2004), 0x7000 | P | RW | A | D);
    assert_int_equal(get32(f, 0x1004), 0x2000 | P | RW | US | A);
    assert_fault(f, 0x401234, PAGING_FETCH | PAGING_USER, PF_P | PF_U);
    assert_fault(f, 0x801234, PAGING_READ, 0);

    put32(f, 0x1000 + 12, 0x800000 | P | RW | PS | 3 << 13); /* PSE-36: address bits 33:32 */
    f->cpu.cr4 = CR4_PSE;
    assert_int_equal(walk(f, 0xc01234, PAGING_READ), 0);
    assert_int_equal(f->result.gpa, 0x300801234);
    assert_int_equal(f->result.page_bytes, 4 << 20);
    put32(f, 0x1000 + 12, 0x800000 | P | RW | PS | 1 << 21);
    assert_fault(f, 0xc01234, PAGING_READ, PF_P | PF_RSVD);
}

static void physical_address_extension(void **state)
{
    struct fixture *f = *state;
    f->cpu.cr4 = CR4_PAE;
    f->cpu.efer = EFER_NXE;
    f->cpu.pdpte[1] = 0x2000 | P;
    put64(f, 0x2000 + 8, 0x3000 | P | RW | US);
    put64(f, 0x3000, 0x8000 | P | RW | US | NX);
    assert_int_equal(walk(f, 0x40200010, PAGING_WRITE | PAGING_USER), 0);
    assert_int_equal(f->result.gpa, 0x8010);
    assert_fault(f, 0x40200010, PAGING_FETCH | PAGING_USER, PF_P | PF_U | PF_I);
    assert_fault(f, 0x80200010, PAGING_READ, 0);
    put64(f, 0x3000, 0x8000 | P | RW | US | 1ull << 55);
    assert_fault(f, 0x40200010, PAGING_READ, PF_P | PF_RSVD);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(paging_off_is_identity, setup, teardown),
        cmocka_unit_test_setup_teardown(four_levels, setup, teardown),
        cmocka_unit_test_setup_teardown(no_update_leaves_tables_alone, setup, teardown),
        cmocka_unit_test_setup_teardown(write_protection, setup, teardown),
        cmocka_unit_test_setup_teardown(execution_rights, setup, teardown),
        cmocka_unit_test_setup_teardown(supervisor_mode_access_prevention, setup, teardown),
        cmocka_unit_test_setup_teardown(reserved_bits, setup, teardown),
        cmocka_unit_test_setup_teardown(large_pages, setup, teardown),
        cmocka_unit_test_setup_teardown(tables_outside_ram, setup, teardown),
        cmocka_unit_test_setup_teardown(thirty_two_bits, setup, teardown),
        cmocka_unit_test_setup_teardown(physical_address_extension, setup, teardown),
    };
    return cmocka_run_group_tests_name("paging", tests, NULL, NULL);
}
