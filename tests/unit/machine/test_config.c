/* Options and configuration files: what is taken, what is refused, and that each refusal names the thing. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "machine/config.h"

static void sizes(void **state)
{
    static const struct {
        const char *text;
        uint64_t bytes; /* 0: refused */
    } cases[] = {
        {"512M", 512ull << 20}, {"2G", 2ull << 30},     {"1048576K", 1ull << 30}, {"64", 64ull << 20}, {"1GiB", 1ull << 30},
        {"1gb", 1ull << 30},    {"1T", 1ull << 40},     {"", 0},                  {"M", 0},            {"-5M", 0},
        {"12Q", 0},             {"1Mx", 0},             {"99999999999999999999", 0}, {"17592186044416M", 0}, {"0x10", 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint64_t bytes = 0;
        int r = parse_size(cases[i].text, &bytes);
        assert_int_equal(r == 0, cases[i].bytes != 0);
        if (r == 0)
            assert_int_equal(bytes, cases[i].bytes);
    }
}

static void refusals(void **state)
{
    static const struct {
        const char *key, *value, *mentions;
    } cases[] = {
        {"memory", "lots", "lots"},        {"memory", "4095K", "4095K"}, {"memory", "1K", "too small"},
        {"cpus", "0", "1 to"},             {"cpus", "two", "two"},       {"cpus", "65", "1 to"},
        {"engine", "warp", "interp"},      {"on-reset", "x", "restart"}, {"console", "tty", "stdio"},
        {"console", "file:", "stdio"},     {"disk", "", "file name"},    {"disk", "a,sector=1", "sector=1"},
        {"disk", "a,format=vmdk", "raw"}, {"disk", "a,backing=some", "near"}, {"disk", "a,serial=123456789012345678901", "20"},
        {"disk", "a,root=1", "no value"},  {"disk", "a,cache=none", "writeback"}, {"disk", "a,bps=fast", "bps=fast"}, {"disk", "a,iops=0", "iops=0"},
        {"disk", "a,bps=", "bps="},        {"disk", "a,id=", "1 to 64"}, {"disk", "a,id=../x", "letters"}, {"disk", "a,bps=99999999999T", "bps="},
        {"net", "user,id=a b", "letters"}, {"net", "user,tx-bps=x", "tx-bps=x"}, {"net", "user,id=x,colour=red", "colour"}, {"transport", "isa", "mmio"},
        {"vsock", "cid=3", "path"},        {"vsock", "path=a,cid=2", "cid=2"}, {"vsock", "path=a,cid=4294967295", "4294967294"}, {"vsock", "path=a,x=1", "x=1"},
        {"colour", "red", "colour"},       {"kernel", NULL, "needs a value"}, {"boot", "slow", "fast"},
        {"net", "carrier-pigeon", "carrier-pigeon"}, {"perf-map", "2", "true"}, {"dump-code", "xyz", "xyz"},
        {"dump-code", "", "address"},      {"dump-code", "phys:", "phys:"}, {"dump-code", "12 34", "12 34"}, {"dump-code", "-1", "-1"},
        {"dump-code", "12345678123456781", "hexadecimal"},
    };
    struct machine_config config;
    machine_config_init(&config);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct error err = {0};
        assert_true(machine_config_set(&config, cases[i].key, cases[i].value, &err) < 0);
        if (!strstr(err.text, cases[i].mentions))
            fail_msg("\"%s\" does not mention \"%s\"", err.text, cases[i].mentions);
    }
    assert_int_equal(config.disk_count, 0);
    machine_config_clear(&config);
}

static void memory_options(void **state)
{
    static const struct {
        const char *key, *value;
    } wrong[] = {
        {"balloon", ""}, {"balloon", "1K"}, {"balloon", "999999G"}, {"balloon", "64,report"}, {"balloon", "64,stats"}, {"balloon", "64,stats=x"},
        {"balloon", "64,stats=99999999999999999999"}, {"balloon", "64,"}, {"balloon", "64,reporting=maybe"},
        {"pmem", ""}, {"pmem", ",readonly"}, {"pmem", "a,writable"}, {"pmem", "a,id="}, {"memory-hotplug", ""}, {"memory-hotplug", "1G"},
        {"memory-hotplug", "total=1K"}, {"memory-hotplug", "total=1G,size=1G"},
    };
    struct machine_config config;
    struct error err = {0};
    machine_config_init(&config);
    for (size_t n = 0; n < sizeof wrong / sizeof *wrong; n++) {
        assert_int_equal(machine_config_set(&config, wrong[n].key, wrong[n].value, &err), -EINVAL);
        assert_non_null(strstr(err.text, wrong[n].key));
    }
    assert_false(config.balloon.present || config.pmem_count);
    assert_int_equal(machine_config_set(&config, "balloon", "1G,deflate-on-oom,reporting=on,hinting,stats=7", &err), 0);
    assert_true(config.balloon.present && config.balloon.deflate_on_oom && config.balloon.reporting && config.balloon.hinting);
    assert_int_equal(config.balloon.amount_mib, 1024);
    assert_int_equal(config.balloon.statistics_interval_s, 7);
    assert_int_equal(machine_config_set(&config, "kernel", "k", &err), 0);
    assert_int_equal(machine_config_check(&config, &err), -EINVAL);
    assert_non_null(strstr(err.text, "more than the guest's memory"));
    assert_int_equal(machine_config_set(&config, "balloon", "0,reporting=off", &err), 0);
    assert_false(config.balloon.reporting || config.balloon.hinting);
    static const char *const unfit[] = {"total=0", "total=64M", "total=1G,block=3M", "total=1G,block=1M", "total=1G,slot=64M", "total=512G", "total=1G,slot=130M,block=4M"};
    for (size_t n = 0; n < sizeof unfit / sizeof *unfit; n++) {
        assert_int_equal(machine_config_set(&config, "memory-hotplug", unfit[n], &err), 0);
        assert_int_equal(machine_config_check(&config, &err), -EINVAL);
        assert_non_null(strstr(err.text, "memory-hotplug"));
    }
    assert_int_equal(machine_config_set(&config, "memory-hotplug", "total=1G,block=4M", &err), 0);
    assert_int_equal(config.memory_hotplug.total_mib, 1024);
    assert_int_equal(config.memory_hotplug.block_mib, 4);
    assert_int_equal(machine_config_set(&config, "pmem", "a,,b,readonly,root,id=x", &err), 0);
    assert_int_equal(machine_config_set(&config, "pmem", "c", &err), 0);
    assert_string_equal(config.pmem[0].path, "a,b");
    assert_string_equal(config.pmem[0].id, "x");
    assert_true(config.pmem[0].readonly && config.pmem[0].root && !config.pmem[1].readonly && !config.pmem[1].root);
    assert_int_equal(machine_config_check(&config, &err), 0);
    config.pmem[1].root = true;
    assert_int_equal(machine_config_check(&config, &err), -EINVAL);
    for (unsigned n = 2; n < CONFIG_PMEMS_MAX; n++)
        assert_int_equal(machine_config_set(&config, "pmem", "c", &err), 0);
    assert_int_equal(machine_config_set(&config, "pmem", "c", &err), -E2BIG);
    machine_config_clear(&config);
}

static void shares(void **state)
{
    struct machine_config config;
    static const char *const wrong[] = {"", "dir", "dir:", ":tag", "a:0123456789012345678901234567890123456", "a:t,rw", "a:t,cache=some", "a:t,uid=-1", "a:t,uid=x",
                                        "a:t,gid=4294967295", "a:t,ro,writeback", "a:t,cache=none,writeback"};
    machine_config_init(&config);
    assert_int_equal(machine_config_set(&config, "share", "/a:b,,c:tag,ro,cache=always,uid=0,gid=7", NULL), 0);
    assert_string_equal(config.share[0].path, "/a:b,c");
    assert_string_equal(config.share[0].tag, "tag");
    assert_true(config.share[0].readonly);
    assert_int_equal(config.share[0].cache, FS_CACHE_ALWAYS);
    assert_int_equal(config.share[0].uid, 0);
    assert_int_equal(config.share[0].gid, 7);
    assert_int_equal(machine_config_set(&config, "share", "b:tag", NULL), -EEXIST);
    assert_int_equal(machine_config_set(&config, "share", "b:012345678901234567890123456789012345,writeback,xattr", NULL), 0);
    assert_int_equal(config.share[1].uid, FS_ID_AS_ON_HOST);
    assert_true(config.share[1].writeback && config.share[1].xattr);
    for (unsigned i = 0; i < sizeof wrong / sizeof *wrong; i++)
        assert_true(machine_config_set(&config, "share", wrong[i], NULL) < 0);
    assert_int_equal(config.share_count, 2);
    machine_config_clear(&config);
}

static void disks(void **state)
{
    struct machine_config config;
    machine_config_init(&config);
    assert_int_equal(machine_config_set(&config, "disk", "a,,b.img,readonly,serial=root", NULL), 0);
    assert_string_equal(config.disk[0].path, "a,b.img");
    assert_true(config.disk[0].readonly);
    assert_string_equal(config.disk[0].serial, "root");
    for (unsigned i = 1; i < CONFIG_DISKS_MAX; i++)
        assert_int_equal(machine_config_set(&config, "disk", "x", NULL), 0);
    assert_true(machine_config_set(&config, "disk", "x", NULL) < 0);
    machine_config_clear(&config);
}

static void vsock(void **state)
{
    struct machine_config config;
    machine_config_init(&config);
    assert_int_equal(machine_config_set(&config, "vsock", "path=a,,b.sock,cid=77", NULL), 0);
    assert_string_equal(config.vsock.path, "a,b.sock");
    assert_int_equal(config.vsock.cid, 77);
    assert_int_equal(machine_config_set(&config, "vsock", "path=c", NULL), 0);
    assert_int_equal(config.vsock.cid, 3);
    assert_true(machine_config_set(&config, "vsock", "path=", NULL) < 0);
    assert_string_equal(config.vsock.path, "c");
    machine_config_clear(&config);
}

static void metadata(void **state)
{
    struct machine_config config, copy;
    machine_config_init(&config);
    assert_int_equal(machine_config_set(&config, "metadata", "a,,b.json,version=2,address=169.254.170.2,imds", NULL), 0);
    assert_string_equal(config.metadata.path, "a,b.json");
    assert_string_equal(config.metadata.address, "169.254.170.2");
    assert_true(config.metadata.present && config.metadata.version_2 && config.metadata.imds_compatible && config.metadata.everywhere);
    assert_int_equal(machine_config_copy(&copy, &config), 0);
    assert_true(machine_config_set(&config, "metadata", "c,address=169.254.255.1", NULL) < 0);
    assert_string_equal(config.metadata.path, "a,b.json");
    assert_int_equal(machine_config_set(&config, "metadata", "c", NULL), 0);
    assert_null(config.metadata.address);
    assert_false(config.metadata.version_2 || config.metadata.imds_compatible);
    assert_string_equal(copy.metadata.path, "a,b.json");
    machine_config_clear(&copy);
    machine_config_clear(&config);
}

static void properties(void **state)
{
    struct machine_config config;
    machine_config_init(&config);
    assert_int_equal(machine_config_set(&config, "disk", "a,id=one,root,cache=unsafe,bps=10M,iops=55", NULL), 0);
    const struct disk_config *disk = &config.disk[0];
    assert_string_equal(disk->id, "one");
    assert_true(disk->root && !disk->writeback && !disk->readonly);
    assert_int_equal(disk->limit.bandwidth.size, (10 << 20) / 10);
    assert_int_equal(disk->limit.bandwidth.refill_ms, 100);
    assert_int_equal(disk->limit.ops.size, 55); /* not a multiple of ten: a whole second's */
    assert_int_equal(disk->limit.ops.refill_ms, 1000);
    assert_true(machine_config_set(&config, "disk", "b,id=one", NULL) < 0);
    assert_true(machine_config_set(&config, "disk", "b,root", NULL) < 0);
    assert_int_equal(machine_config_set(&config, "disk", "b,readonly=off,cache=writeback", NULL), 0);
    assert_true(config.disk[1].writeback);
    assert_int_equal(config.disk_count, 2);

    assert_int_equal(machine_config_set(&config, "net", "user,bps=1000,mtu=1400,rx-pps=70,id=eth", NULL), 0);
    assert_string_equal(config.net[0], "user,mtu=1400");
    assert_string_equal(config.net_card[0].id, "eth");
    assert_int_equal(config.net_card[0].receive.bandwidth.size, 100);
    assert_int_equal(config.net_card[0].transmit.bandwidth.size, 100);
    assert_int_equal(config.net_card[0].receive.ops.size, 7);
    assert_int_equal(config.net_card[0].transmit.ops.size, 0);
    assert_true(machine_config_set(&config, "net", "none,id=eth", NULL) < 0);
    assert_int_equal(config.net_count, 1);
    assert_int_equal(machine_config_set(&config, "transport", "mmio", NULL), 0);
    assert_int_equal(config.transport, TRANSPORT_MMIO);
    machine_config_clear(&config);
}

static void debugging(void **state)
{
    struct machine_config config;
    machine_config_init(&config);
    assert_int_equal(machine_config_set(&config, "perf-map", NULL, NULL), 0);
    assert_true(config.perf_map && !config.stats);
    assert_int_equal(machine_config_set(&config, "dump-code", "ffffffff81001230", NULL), 0);
    assert_int_equal(machine_config_set(&config, "dump-code", "phys:0x1000", NULL), 0);
    assert_int_equal(config.dump_code_count, 2);
    assert_int_equal(config.dump_code[0].address, 0xffffffff81001230);
    assert_false(config.dump_code[0].physical);
    assert_int_equal(config.dump_code[1].address, 0x1000);
    assert_true(config.dump_code[1].physical);
    assert_true(config.stats);
    for (unsigned i = 2; i < CONFIG_DUMPS_MAX; i++)
        assert_int_equal(machine_config_set(&config, "dump-code", "1", NULL), 0);
    assert_true(machine_config_set(&config, "dump-code", "1", NULL) < 0);
    machine_config_clear(&config);
    assert_int_equal(config.dump_code_count, 0);
}

static int load(struct machine_config *config, const char *json, struct error *err)
{
    char path[] = "/tmp/doppel-config-XXXXXX";
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, json, strlen(json)), strlen(json));
    close(fd);
    int r = machine_config_load(config, path, err);
    unlink(path);
    return r;
}

static void json(void **state)
{
    struct machine_config config;
    struct error err = {0};
    machine_config_init(&config);
    assert_int_equal(load(&config, "{\"kernel\": \"k\", \"cpus\": 2, \"memory\": \"1G\", \"disk\": [\"a\", \"b,readonly\"], \"stats\": true}", &err), 0);
    assert_string_equal(config.kernel, "k");
    assert_int_equal(config.cpus, 2);
    assert_int_equal(config.memory_bytes, 1ull << 30);
    assert_int_equal(config.disk_count, 2);
    assert_true(config.stats);
    static const char *const bad[] = {"", "[]", "{", "{\"colour\": 1}", "{\"cpus\": [1]}", "{\"disk\": [[\"a\"]]}", "{\"cpus\": 1.5}", "{\"kernel\": null}",
                                      "{\"stats\": \"maybe\"}", "{\"config\": \"x\"}", "{\"cpus\": 1, \"cpus\": 2}"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        err = (struct error){0};
        assert_true(load(&config, bad[i], &err) < 0);
        assert_true(err.text[0]);
    }
    machine_config_clear(&config);
}

static void whole(void **state)
{
    struct machine_config config;
    struct error err = {0};
    machine_config_init(&config);
    assert_true(machine_config_check(&config, &err) < 0);
    assert_non_null(strstr(err.text, "--kernel"));
    assert_int_equal(machine_config_set(&config, "kernel", "k", NULL), 0);
    assert_int_equal(machine_config_check(&config, &err), 0);
    assert_true(machine_config_set(&config, "memory", "1000T", &err) < 0);
    assert_non_null(strstr(err.text, "240G"));
    assert_int_equal(machine_config_set(&config, "memory", "240G", NULL), 0);
    assert_true(machine_config_check(&config, &err) < 0);
    assert_non_null(strstr(err.text, "host"));
    assert_int_equal(machine_config_set(&config, "memory", "64M", NULL), 0);
    assert_int_equal(machine_config_set(&config, "virtio-console", "stdio", NULL), 0);
    assert_true(machine_config_check(&config, &err) < 0);
    machine_config_clear(&config);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(sizes), cmocka_unit_test(refusals), cmocka_unit_test(shares), cmocka_unit_test(disks), cmocka_unit_test(memory_options), cmocka_unit_test(vsock), cmocka_unit_test(metadata), cmocka_unit_test(properties), cmocka_unit_test(debugging),
                                       cmocka_unit_test(json), cmocka_unit_test(whole)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
