/*
 * Checksums and segmentation against slow, plain computations of the same, over random packets; and headers that lie.
 */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "net/offload.h"

#define ROUNDS 400

static uint64_t random_state = 0x9E3779B97F4A7C15ull;

static uint32_t random_below(uint32_t limit)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (uint32_t)(random_state >> 32) % limit;
}

static void random_fill(uint8_t *data, size_t size_bytes)
{
    while (size_bytes--)
        *data++ = (uint8_t)random_below(256);
}

static unsigned get16(const uint8_t *p)
{
    return p[0] * 256u + p[1];
}

static uint32_t get32(const uint8_t *p)
{
    return get16(p) * 65536u + get16(p + 2);
}

static void put16(uint8_t *p, unsigned value)
{
    p[0] = (uint8_t)(value / 256);
    p[1] = (uint8_t)(value % 256);
}

/* RFC 1071 as written: big-endian words, one at a time. */
static unsigned plain_sum(unsigned sum, const uint8_t *data, size_t length_bytes)
{
    for (size_t i = 0; i < length_bytes; i++) {
        sum += i % 2 ? data[i] : data[i] * 256u;
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    return sum;
}

struct made {
    uint8_t frame[70000];
    size_t length_bytes, ip, tcp, payload, payload_bytes;
    bool ipv6;
};

static struct made made;

/* A TCP segment with random addresses, options, tags and payload; the checksum field holds the pseudo header's sum. */
static void make_tcp(bool ipv6, size_t payload_bytes, uint8_t flags)
{
    unsigned tags = random_below(3), option_words = random_below(11), ip_option_words = ipv6 ? 0 : random_below(11);
    unsigned extension = ipv6 && random_below(2) ? 8 * (1 + random_below(3)) : 0;
    uint8_t *f = made.frame;
    made.ipv6 = ipv6;
    made.ip = 14 + 4 * tags;
    made.tcp = made.ip + (ipv6 ? 40 + extension : 20 + 4 * ip_option_words);
    made.payload = made.tcp + 20 + 4 * option_words;
    made.payload_bytes = payload_bytes;
    made.length_bytes = made.payload + payload_bytes;
    random_fill(f, made.length_bytes);
    for (unsigned i = 0; i < tags; i++)
        put16(f + 12 + 4 * i, i || tags == 1 ? 0x8100 : 0x88A8);
    put16(f + 12 + 4 * tags, ipv6 ? 0x86DD : 0x0800);

    uint8_t *ip = f + made.ip, *tcp = f + made.tcp;
    size_t tcp_bytes = made.length_bytes - made.tcp;
    if (ipv6) {
        ip[0] = 0x60;
        put16(ip + 4, (unsigned)(made.length_bytes - made.ip - 40));
        ip[6] = extension ? 60 : 6;
        if (extension) {
            ip[40] = 6;
            ip[41] = (uint8_t)(extension / 8 - 1);
        }
    } else {
        ip[0] = (uint8_t)(0x45 + ip_option_words);
        put16(ip + 2, (unsigned)(made.length_bytes - made.ip));
        put16(ip + 6, 0x4000);
        ip[9] = 6;
    }
    tcp[12] = (uint8_t)((5 + option_words) << 4);
    tcp[13] = flags;
    unsigned sum = ipv6 ? plain_sum(0, ip + 8, 32) : plain_sum(0, ip + 12, 8);
    sum = plain_sum(sum + 6, NULL, 0) + (unsigned)tcp_bytes;
    put16(tcp + 16, (sum & 0xFFFF) + (sum >> 16));
}

/* Checks one whole frame's lengths and checksums. */
static void check_frame(const uint8_t *frame, size_t length_bytes)
{
    const uint8_t *ip = frame + made.ip, *tcp = frame + made.tcp;
    size_t tcp_bytes = length_bytes - made.tcp;
    unsigned sum;
    if (made.ipv6) {
        assert_int_equal(get16(ip + 4), length_bytes - made.ip - 40);
        sum = plain_sum(0, ip + 8, 32);
    } else {
        assert_int_equal(get16(ip + 2), length_bytes - made.ip);
        sum = plain_sum(0, ip + 12, 8);
    }
    uint8_t rest[4] = {0, 6, (uint8_t)(tcp_bytes >> 8), (uint8_t)tcp_bytes};
    sum = plain_sum(sum, rest, 4);
    assert_int_equal(plain_sum(sum, tcp, tcp_bytes), 0xFFFF);
}

struct seen {
    struct made original;
    struct net_header header;
    unsigned frames, expected_frames;
    size_t payload_bytes;
};

static struct seen seen;

static void see_segment(void *ctx, const uint8_t *frame, size_t length_bytes)
{
    const struct made *original = &seen.original;
    const uint8_t *first_tcp = original->frame + original->tcp, *tcp = frame + made.tcp;
    bool last = ++seen.frames == seen.expected_frames;
    size_t part = length_bytes - made.payload;
    check_frame(frame, length_bytes);
    assert_true(last || part == seen.header.gso_size);
    assert_memory_equal(frame + made.payload, original->frame + original->payload + seen.payload_bytes, part);
    assert_int_equal(get32(tcp + 4), (uint32_t)(get32(first_tcp + 4) + seen.payload_bytes));
    unsigned cleared = (last ? 0 : 0x09) | (seen.frames > 1 ? 0x80 : 0);
    assert_int_equal(tcp[13], first_tcp[13] & ~cleared);
    if (!made.ipv6) {
        const uint8_t *ip = frame + made.ip;
        assert_int_equal(plain_sum(0, ip, made.tcp - made.ip), 0xFFFF);
        assert_int_equal(get16(ip + 4), (get16(original->frame + original->ip + 4) + seen.frames - 1) & 0xFFFF);
    }
    seen.payload_bytes += part;
}

static void segment_once(bool ipv6)
{
    static const unsigned sizes[] = {536, 1220, 1448, 1460, 8960};
    make_tcp(ipv6, random_below(4) ? random_below(65000) : random_below(3000), (uint8_t)random_below(256));
    seen = (struct seen){.header = {.flags = NET_HEADER_F_NEEDS_CSUM, .gso_type = ipv6 ? NET_GSO_TCPV6 : NET_GSO_TCPV4}};
    seen.original = made;
    seen.header.gso_size = (uint16_t)(random_below(8) ? sizes[random_below(5)] : 8 + random_below(200));
    if (made.frame[made.tcp + 13] & 0x80)
        seen.header.gso_type |= NET_GSO_ECN;
    seen.header.csum_start = (uint16_t)made.tcp;
    seen.header.csum_offset = 16;
    size_t size = seen.header.gso_size;
    seen.expected_frames = made.payload_bytes ? (unsigned)((made.payload_bytes + size - 1) / size) : 1;
    assert_int_equal(net_offload_finish(&seen.header, made.frame, made.length_bytes, see_segment, NULL), 0);
    assert_int_equal(seen.frames, seen.expected_frames);
    assert_int_equal(seen.payload_bytes, made.payload_bytes);
}

static void test_segments(void **state)
{
    for (unsigned round = 0; round < ROUNDS; round++)
        segment_once(round % 2);
}

static void see_checksum(void *ctx, const uint8_t *frame, size_t length_bytes)
{
    seen.frames++;
    assert_int_equal(length_bytes, made.length_bytes);
    check_frame(frame, length_bytes);
}

static void test_checksum(void **state)
{
    for (unsigned round = 0; round < ROUNDS; round++) {
        make_tcp(round % 2, random_below(2000), 0x10);
        seen.frames = 0;
        struct net_header header = {.flags = NET_HEADER_F_NEEDS_CSUM, .csum_start = (uint16_t)made.tcp, .csum_offset = 16};
        assert_int_equal(net_offload_finish(&header, made.frame, made.length_bytes, see_checksum, NULL), 0);
        assert_int_equal(seen.frames, 1);
    }
}

static void count_frame(void *ctx, const uint8_t *frame, size_t length_bytes)
{
    ++*(unsigned *)ctx;
}

/* A UDP checksum that comes out as zero is sent as all ones (RFC 768). */
static void test_zero_checksum(void **state)
{
    uint8_t frame[64] = {0};
    unsigned frames = 0;
    put16(frame + 34, 0xFFFF); /* the rest of the range is zero, and so is the complement of the sum */
    struct net_header header = {.flags = NET_HEADER_F_NEEDS_CSUM, .csum_start = 34, .csum_offset = 6};
    assert_int_equal(net_offload_finish(&header, frame, sizeof frame, count_frame, &frames), 0);
    assert_int_equal(get16(frame + 40), 0xFFFF);
}

/* Without anything to do the frame goes through as it is, trailing padding included. */
static void test_untouched(void **state)
{
    uint8_t frame[60], copy[60];
    unsigned frames = 0;
    random_fill(frame, sizeof frame);
    memcpy(copy, frame, sizeof copy);
    struct net_header header = {0};
    assert_int_equal(net_offload_finish(&header, frame, sizeof frame, count_frame, &frames), 0);
    assert_int_equal(frames, 1);
    assert_memory_equal(frame, copy, sizeof copy);
}

static void refuse(struct net_header header, size_t length_bytes)
{
    unsigned frames = 0;
    assert_int_equal(net_offload_finish(&header, made.frame, length_bytes, count_frame, &frames), -EINVAL);
    assert_int_equal(frames, 0);
}

static void test_lies(void **state)
{
    struct net_header tso = {.flags = NET_HEADER_F_NEEDS_CSUM, .gso_type = NET_GSO_TCPV4, .gso_size = 1460};
    struct net_header none = {0}, outside = {.flags = NET_HEADER_F_NEEDS_CSUM, .csum_start = 0xFFFF, .csum_offset = 0xFFFF};
    make_tcp(false, 4000, 0x18);
    size_t length = made.length_bytes;
    refuse(none, 13);
    refuse(outside, length);
    outside = (struct net_header){.flags = NET_HEADER_F_NEEDS_CSUM, .csum_start = (uint16_t)(length - 1)};
    refuse(outside, length);
    refuse(tso, length - 1); /* the IP length is longer than the frame */
    refuse(tso, made.payload - 1);
    refuse(tso, made.tcp);
    refuse(tso, made.ip);

    struct net_header changed = tso;
    changed.gso_size = 0;
    refuse(changed, length);
    changed = tso;
    changed.gso_type = NET_GSO_UDP;
    refuse(changed, length);
    changed.gso_type = NET_GSO_TCPV6;
    refuse(changed, length);

    static const struct {
        bool ipv6, from_tcp;
        unsigned offset, value; /* of the byte to spoil */
    } spoils[] = {
        {false, false, 0, 0x44}, {false, false, 0, 0x65}, {false, false, 6, 0x20}, {false, false, 7, 1}, {false, false, 9, 17},
        {false, false, 2, 0},    {false, true, 12, 0x40}, {true, false, 0, 0x45},  {true, false, 6, 44}, {true, false, 6, 43},
        {true, true, 12, 0},
    };
    for (size_t i = 0; i < sizeof spoils / sizeof spoils[0]; i++) {
        do
            make_tcp(spoils[i].ipv6, 40, 0x18);
        while (made.ip > 14); /* the length's high byte above counts on a short header */
        made.frame[(spoils[i].from_tcp ? made.tcp : made.ip) + spoils[i].offset] = (uint8_t)spoils[i].value;
        if (spoils[i].offset == 2)
            made.frame[made.ip + 3] = 10;
        changed = tso;
        changed.gso_type = spoils[i].ipv6 ? NET_GSO_TCPV6 : NET_GSO_TCPV4;
        refuse(changed, made.length_bytes);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_segments),      cmocka_unit_test(test_checksum), cmocka_unit_test(test_zero_checksum),
        cmocka_unit_test(test_untouched),     cmocka_unit_test(test_lies),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
