/* What the configuration adds to the kernel's command line. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdlib.h>

#include "machine/machine_priv.h"

static void check(const struct machine_config *config, const char *expected)
{
    struct machine machine = {.config = config, .mmio = {.base = 0xD0000000, .device_count = 2, .line_count = 2, .shared_first = 1}};
    machine.mmio.line[0].pin = 5;
    machine.mmio.line[1].pin = 16;
    char *line = machine_command_line(&machine);
    assert_non_null(line);
    assert_string_equal(line, expected);
    free(line);
}

static void lines(void **state)
{
    struct machine_config config;
    machine_config_init(&config);
    check(&config, "console=ttyS0");
    config.console = "none";
    check(&config, "");
    config.append = "quiet -- shell";
    check(&config, "quiet -- shell");
    config.transport = TRANSPORT_MMIO;
    check(&config, "quiet virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:16 -- shell");
}

static void roots(void **state)
{
    struct machine_config config;
    machine_config_init(&config);
    config.append = "quiet";
    config.disk_count = 2;
    check(&config, "quiet");
    config.disk[1].root = true;
    check(&config, "quiet root=/dev/vda rw");
    config.disk[1].readonly = true;
    check(&config, "quiet root=/dev/vda ro");
    config.disk[1].partuuid = "1-2";
    check(&config, "quiet root=PARTUUID=1-2 ro");
    config.append = "noroot=1";
    check(&config, "noroot=1 root=PARTUUID=1-2 ro");
    config.append = "x root=/dev/sda";
    check(&config, "x root=/dev/sda");
    config.append = "root=/dev/sda";
    check(&config, "root=/dev/sda");
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(lines), cmocka_unit_test(roots)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
