/*
 * The --net option's text: what is accepted, and that a refusal names the option and shows a valid one.
 */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "net/net.h"

static const char *const good[] = {
    "none",
    "user",
    "user,restrict=on",
    "user,restrict=off,ipv6=off,loopback=off",
    "user,forward=tcp:8080:80,forward=udp::5353:53",
    "user,forward=tcp:127.0.0.1:8080:80",
    "user,forward=tcp:8080:10.0.2.20:80",
    "user,forward=tcp:8080::80",
    "user,forward=udp:0.0.0.0:8080:10.0.2.20:80",
    "user,net=192.168.5.0/24,dhcpstart=192.168.5.100,host=192.168.5.1,dns=192.168.5.53,hostname=box-1",
    "user,net=192.168.5.0/29,dhcpstart=192.168.5.4",
    "user,mtu=9000,mac=52:54:00:aB:cD:eF",
    "tap:tap0",
    "tap:tap0,mac=02:00:00:00:00:01",
};

/* A spec and a word that the message must have. */
static const struct {
    const char *spec, *word;
} bad[] = {
    {"", "user"},
    {"bridge", "bridge"},
    {"user:x", "takes no"},
    {"none:x", "takes no"},
    {"none,forward=tcp:1:2", "forward"},
    {"user,", "name=value"},
    {"user,restrict", "restrict"},
    {"user,restrict=maybe", "restrict=on"},
    {"user,ipv6=", "ipv6=off"},
    {"user,colour=red", "colour"},
    {"user,forward=", "forward=tcp:2222:22"},
    {"user,forward=tcp", "host port"},
    {"user,forward=sctp:1:2", "tcp: or udp:"},
    {"user,forward=tcp:0:80", "host port"},
    {"user,forward=tcp:65536:80", "host port"},
    {"user,forward=tcp:80:", "guest port"},
    {"user,forward=tcp:80:99999999999", "guest port"},
    {"user,forward=tcp:80: 80", "guest port"},
    {"user,forward=tcp:1.2.3:80:80", "host address"},
    {"user,forward=tcp:80:guest:80", "guest address"},
    {"user,forward=tcp:80:192.168.1.1:80", "192.168.1.1"},
    {"user,forward=tcp:a:b:c:d:e:f", "too many"},
    {"user,net=10.0.2.0", "prefix"},
    {"user,net=10.0.2.0/33", "8 to 29"},
    {"user,net=10.0.2.1/24", "behind the prefix"},
    {"user,net=0.0.0.0/8", "network"},
    {"user,net=10.0.2.0/29", "dhcpstart"},
    {"user,host=10.0.3.1", "host=10.0.3.1"},
    {"user,host=10.0.2.255", "host="},
    {"user,host=10.0.2.3", "different"},
    {"user,dns=nowhere", "dns=10.0.2.3"},
    {"user,hostname=", "hostname=guest"},
    {"user,hostname=a_b", "hostname=guest"},
    {"user,hostname=abcdefghijklmnopqrstuvwxyz1234567", "32"},
    {"user,mac=52:54:00:12:34", "mac="},
    {"user,mac=52:54:00:12:34:5g", "mac="},
    {"user,mac=5:54:00:12:34:566", "mac="},
    {"user,mac=53:54:00:12:34:56", "multicast"},
    {"user,mac=00:00:00:00:00:00", "zero"},
    {"user,mtu=67", "68"},
    {"user,mtu=70000", "65520"},
    {"tap", "name"},
    {"tap:", "name"},
    {"tap:a/b", "interface"},
    {"tap:tap%d", "interface"},
    {"tap:abcdefghijklmnop", "15"},
    {"tap:tap0,restrict=on", "restrict"},
};

static void test_good(void **state)
{
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        struct error err = {0};
        if (net_check(good[i], &err) != 0)
            fail_msg("'%s': %s", good[i], err.text);
    }
}

static void test_bad(void **state)
{
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct error err = {0};
        int result = net_check(bad[i].spec, &err);
        if (result != -EINVAL || !strstr(err.text, bad[i].word) || strchr(err.text, '\n'))
            fail_msg("'%s': %d, \"%s\" does not have \"%s\"", bad[i].spec, result, err.text, bad[i].word);
        assert_int_equal(net_check(bad[i].spec, NULL), -EINVAL);
    }
}

/* The 65th forward is one too many. */
static void test_many_forwards(void **state)
{
    char spec[8192] = "user";
    for (unsigned i = 0; i < 64; i++)
        strcat(spec, ",forward=tcp:8080:80");
    assert_int_equal(net_check(spec, NULL), 0);
    strcat(spec, ",forward=tcp:8080:80");
    assert_int_equal(net_check(spec, NULL), -EINVAL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_good),
        cmocka_unit_test(test_bad),
        cmocka_unit_test(test_many_forwards),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
