/* The generation ID: its text, where it is, the event, and states with and without it. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "chipset/acpi.h"
#include "chipset/chipset.h"
#include "chipset/vmgenid.h"

static const struct vmgenid_guid some = {{0xAF, 0x6E, 0x4E, 0x32, 0xD1, 0xD1, 0xF6, 0x4B, 0xBF, 0x41, 0xB9, 0xBB, 0x6C, 0x91, 0xFB, 0x87}};

struct fixture {
    struct bus *bus;
    struct physmap *memory;
    struct pm *pm;
    struct vmgenid *vmgenid;
    bool sci;
};

static void set_sci(void *ctx, unsigned pin, bool level)
{
    ((struct fixture *)ctx)->sci = level;
}

static void make(struct fixture *f)
{
    struct acpi_config acpi = {.cpu_count = 1, .generation = &some};
    gpa_t rsdp;

    *f = (struct fixture){.bus = bus_create()};
    assert_int_equal(physmap_create(&f->memory, 2 << 20, NULL), 0);
    assert_int_equal(pm_create(&f->pm, &(struct pm_config){.bus = f->bus, .sci = {set_sci, f, 9, false}}), 0);
    assert_int_equal(vmgenid_create(&f->vmgenid, &(struct vmgenid_config){f->memory, f->pm, some}), 0);
    assert_int_equal(acpi_build(f->memory, &acpi, &rsdp, NULL), 0);
}

static void destroy(struct fixture *f)
{
    vmgenid_destroy(f->vmgenid);
    pm_destroy(f->pm);
    physmap_destroy(f->memory);
    bus_destroy(f->bus);
}

static void assert_in_memory(struct fixture *f, const struct vmgenid_guid *guid)
{
    struct vmgenid_guid seen;

    assert_int_equal(physmap_read(f->memory, ACPI_GENERATION_ID, &seen, sizeof(seen)), 0);
    assert_memory_equal(&seen, guid, sizeof(seen));
    assert_memory_equal(vmgenid_get(f->vmgenid), guid, sizeof(seen));
}

static void test_text(void **state)
{
    static const char *const wrong[] = {"", "auto", "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb8", "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb870", "324e6eaf-d1d14-bf6-bf41-b9bb6c91fb87",
                                        "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb8g", "-24e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87"};
    struct vmgenid_guid guid;
    char text[VMGENID_TEXT_BYTES];

    assert_int_equal(vmgenid_parse("324e6eaf-D1D1-4bf6-bf41-b9bb6c91fb87", &guid), 0);
    assert_memory_equal(&guid, &some, sizeof(guid));
    vmgenid_format(&some, text);
    assert_string_equal(text, "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87");
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++)
        assert_int_equal(vmgenid_parse(wrong[i], &guid), -EINVAL);
    assert_int_equal(vmgenid_draw(&guid), 0);
    vmgenid_format(&guid, text);
    assert_int_equal(text[14], '4');
}

static void test_renew(void **state)
{
    struct fixture f;
    struct vmgenid_guid other;

    make(&f);
    assert_in_memory(&f, &some);
    bus_write(f.bus, BUS_PORT, CHIPSET_GPE_PORT + 1, 1, 1 << CHIPSET_GPE_GENERATION);
    assert_false(f.sci);
    assert_int_equal(vmgenid_draw(&other), 0);
    assert_int_equal(vmgenid_renew(f.vmgenid, &other), 0);
    assert_true(f.sci);
    assert_in_memory(&f, &other);
    bus_write(f.bus, BUS_PORT, CHIPSET_GPE_PORT, 1, 1 << CHIPSET_GPE_GENERATION);
    assert_false(f.sci);
    destroy(&f);
}

static void test_state(void **state)
{
    struct fixture f;
    struct state_io *writer = state_writer_create(), *reader;
    struct vmgenid_guid other = {{1}};
    const void *data;
    size_t size;

    make(&f);
    assert_int_equal(vmgenid_state(f.vmgenid, writer), 0);
    assert_int_equal(pm_state(f.pm, writer), 0);
    data = state_writer_data(writer, &size);
    assert_int_equal(vmgenid_renew(f.vmgenid, &other), 0);
    reader = state_reader_create(data, size);
    assert_int_equal(vmgenid_state(f.vmgenid, reader), 0);
    assert_memory_equal(vmgenid_get(f.vmgenid), &some, sizeof(some));
    assert_int_equal(vmgenid_state(f.vmgenid, reader), 0); /* a state without: the next section is another's */
    assert_int_equal(pm_state(f.pm, reader), 0);
    state_io_destroy(reader);
    state_io_destroy(writer);
    destroy(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_text), cmocka_unit_test(test_renew), cmocka_unit_test(test_state)};

    return cmocka_run_group_tests(tests, NULL, NULL);
}
