/*
 * The metadata service: what requests are answered with in both versions, tokens, requests in pieces and such as no client sends, and the data's bounds.
 */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "metadata/metadata_priv.h"

#define JSON_HEADER "Accept: application/json\r\n"

static struct metadata *m;
static char last[100000]; /* the reply */
static bool closed;

static void put(const char *text)
{
    json_t *value = json_loads(text, 0, NULL);
    assert_non_null(value);
    assert_int_equal(metadata_put(m, value, NULL), 0);
    json_decref(value);
}

static int setup(void **state)
{
    m = metadata_create(0);
    assert_non_null(m);
    put("{\"latest\": {\"z\": \"last\", \"meta-data\": {\"id\": \"i-1\", \"n\": 5, \"on\": true, \"list\": [\"a\", {\"b\": \"c\"}], \"net\": {}}, "
        "\"a/b\": \"slash\", \"t~\": \"tilde\", \"a b\": \"space\", \"\": \"nameless\", \"caf\xC3\xA9\": \"utf\"}, \"text\": \"line\\nline \\\"q\\\"\"}");
    return 0;
}

static int teardown(void **state)
{
    metadata_destroy(m);
    return 0;
}

static size_t feed(const char *text, size_t size_bytes, bool full)
{
    struct net_reply reply = {0};
    char *exact = malloc(size_bytes + 1); /* of its exact size, for sanitizers */
    memcpy(exact, text, size_bytes);
    exact = realloc(exact, size_bytes ? size_bytes : 1);
    size_t used = metadata_serve(m, exact, size_bytes, full, &reply);
    free(exact);
    assert_true(used <= size_bytes);
    last[0] = '\0';
    closed = reply.close;
    if (used) {
        assert_non_null(reply.data);
        assert_true(reply.size_bytes < sizeof last);
        memcpy(last, reply.data, reply.size_bytes);
        last[reply.size_bytes] = '\0';
    } else {
        assert_null(reply.data);
    }
    free(reply.data);
    return used;
}

static unsigned status_of(void)
{
    unsigned status = 0;
    assert_int_equal(sscanf(last, "HTTP/1.%*1u %u ", &status), 1);
    return status;
}

static const char *body_of(void)
{
    const char *body = strstr(last, "\r\n\r\n"), *length = strstr(last, "Content-Length: ");
    assert_true(body && length);
    assert_int_equal(strtoul(length + 16, NULL, 10), strlen(body + 4));
    return body + 4;
}

/* One whole request; `headers` each end a line. */
static void ask(const char *method, const char *path, const char *headers)
{
    char request[4096];
    int length = snprintf(request, sizeof request, "%s %s HTTP/1.1\r\nHost: 169.254.169.254\r\n%s\r\n", method, path, headers);
    assert_int_equal(feed(request, (size_t)length, false), length);
}

static void expect(unsigned status, const char *body)
{
    assert_string_equal(body_of(), body);
    assert_int_equal(status_of(), status);
}

static void get(const char *path, const char *headers, unsigned status, const char *body)
{
    ask("GET", path, headers);
    expect(status, body);
}

static void test_get(void **state)
{
    static const char id_not_found[] = "Resource not found: /latest/nothing.";
    get("/latest/meta-data", "", 200, "id\nlist\nn\nnet/\non");
    assert_non_null(strstr(last, "Content-Type: text/plain\r\n"));
    assert_non_null(strstr(last, "Connection: keep-alive\r\n"));
    assert_false(closed);
    get("/latest/meta-data/", JSON_HEADER, 200, "{\"id\":\"i-1\",\"list\":[\"a\",{\"b\":\"c\"}],\"n\":5,\"net\":{},\"on\":true}");
    assert_non_null(strstr(last, "Content-Type: application/json\r\n"));
    get("/latest/meta-data/id", "Accept: */*\r\n", 200, "i-1");
    get("/latest/meta-data/id", "accept: text/html, application/json;q=0.9\r\n", 200, "\"i-1\"");
    get("/latest/meta-data/id", "Accept: application/jsonx\r\n", 200, "i-1");
    get("/latest/meta-data/net", "", 200, "");
    get("/latest/meta-data/list/1/b", "", 200, "c");
    get("/latest/meta-data/list/01/b", "", 404, "Resource not found: /latest/meta-data/list/01/b.");
    get("/latest/meta-data/list/2", "", 404, "Resource not found: /latest/meta-data/list/2.");
    get("/latest/meta-data/n", "", 501, "Cannot retrieve value. The value has an unsupported type.");
    get("/latest/meta-data/list", "", 501, "Cannot retrieve value. The value has an unsupported type.");
    get("/latest/meta-data/n", JSON_HEADER, 200, "5");
    get("/latest/nothing", "", 404, id_not_found);
    get("/latest/meta-data/id/more", "", 404, "Resource not found: /latest/meta-data/id/more.");
    get("/", "", 200, "latest/\ntext");
    get("//latest///meta-data//id?x=1", "", 200, "i-1");
    get("http://169.254.169.254/latest/meta-data/id", "", 200, "i-1");
    get("http://169.254.169.254", "", 200, "latest/\ntext");
    get("/text", "", 200, "line\nline \"q\"");
    get("/text", JSON_HEADER, 200, "\"line\\nline \\\"q\\\"\"");
    get("/latest/a%2Fb", "", 200, "slash");
    get("/latest/a~1b", "", 200, "slash");
    get("/latest/t~0", "", 200, "tilde");
    get("/latest/a%20b", "", 200, "space");
    get("/latest/caf%C3%a9", "", 200, "utf");
    get("/latest/a%zzb", "", 404, "Resource not found: /latest/a%zzb.");
    get("/latest/z%", "", 404, "Resource not found: /latest/z%.");
    metadata_set(m, &(struct metadata_settings){.imds_compatible = true});
    get("/latest/meta-data/id", JSON_HEADER, 200, "i-1");
    struct metadata_counters counters;
    metadata_get_counters(m, &counters);
    assert_int_equal(counters.rx_invalid_token, 0);
    assert_int_equal(counters.rx_no_token, 28);
}

static void get_token(char *token, const char *header)
{
    ask("PUT", "/latest/api/token", header);
    assert_int_equal(status_of(), 200);
    strcpy(token, body_of());
    assert_int_equal(strlen(token), TOKEN_ROOM - 1);
}

static void test_tokens(void **state)
{
    char token[200], header[300];
    struct metadata *other = metadata_create(0);
    metadata_set(m, &(struct metadata_settings){.version_2 = true});
    get("/text", "", 401, "No MMDS token provided. Use `X-metadata-token` or `X-aws-ec2-metadata-token` header to specify the session token.");
    get("/text", "X-metadata-token: x\r\n", 401, "MMDS token not valid.");
    get_token(token, "X-metadata-token-ttl-seconds: 21600\r\n");
    assert_non_null(strstr(last, "\r\nX-metadata-token-ttl-seconds: 21600\r\n"));
    snprintf(header, sizeof header, "x-metadata-Token:  %s \r\n", token);
    get("/latest/meta-data/id", header, 200, "i-1");
    get_token(token, "X-aws-ec2-metadata-token-ttl-seconds: 1\r\n");
    assert_non_null(strstr(last, "\r\nX-aws-ec2-metadata-token-ttl-seconds: 1\r\n"));
    snprintf(header, sizeof header, "X-aws-ec2-metadata-token: %s\r\n", token);
    get("/latest/meta-data/id", header, 200, "i-1");
    /* Each digit matters. */
    for (size_t i = 0; i < strlen(token); i++) {
        char forged[TOKEN_ROOM];
        strcpy(forged, token);
        forged[i] = forged[i] == '0' ? '1' : '0';
        assert_false(token_is_valid(m->key, forged));
    }
    assert_true(token_is_valid(m->key, token));
    assert_false(token_is_valid(other->key, token));
    token[TOKEN_ROOM - 2] = '\0';
    assert_false(token_is_valid(m->key, token));
    assert_false(token_is_valid(m->key, ""));
    assert_true(token_make(m->key, 0, token)); /* over at once */
    assert_false(token_is_valid(m->key, token));
    metadata_set(m, &(struct metadata_settings){.version_2 = false});
    get("/latest/meta-data/id", "X-metadata-token: x\r\n", 200, "i-1");
    struct metadata_counters counters;
    metadata_get_counters(m, &counters);
    assert_int_equal(counters.rx_no_token, 1);
    assert_int_equal(counters.rx_invalid_token, 2);
    metadata_destroy(other);
}

static void test_token_refused(void **state)
{
    static const struct {
        const char *path, *headers;
        unsigned status;
        const char *body;
    } cases[] = {
        {"/latest/api/token", "", 400,
         "Token time to live value not found. Use `X-metadata-token-ttl-seconds` or `X-aws-ec2-metadata-token-ttl-seconds` header to specify the token's lifetime."},
        {"/latest/api/token", "X-metadata-token-ttl-seconds: 0\r\n", 400, "Invalid time to live value provided for token: 0. Please provide a value between 1 and 21600."},
        {"/latest/api/token", "X-metadata-token-ttl-seconds: 21601\r\n", 400, "Invalid time to live value provided for token: 21601. Please provide a value between 1 and 21600."},
        {"/latest/api/token", "X-metadata-token-ttl-seconds: 4294967296\r\n", 400,
         "Invalid header. Reason: Invalid value. Key:X-metadata-token-ttl-seconds; Value:4294967296"},
        {"/latest/api/token", "x-aws-ec2-metadata-token-ttl-seconds: -1\r\n", 400, "Invalid header. Reason: Invalid value. Key:X-aws-ec2-metadata-token-ttl-seconds; Value:-1"},
        {"/latest/api/token", "X-metadata-token-ttl-seconds:\r\n", 400, "Invalid header. Reason: Invalid value. Key:X-metadata-token-ttl-seconds; Value:"},
        {"/latest/api/token", "X-metadata-token-ttl-seconds: 60\r\nX-Forwarded-For: 1.2.3.4\r\n", 400, "Invalid header. Reason: Unsupported header name. Key: X-Forwarded-For"},
        {"/latest/api/tokens", "X-metadata-token-ttl-seconds: 60\r\n", 404, "Resource not found: /latest/api/tokens."},
        {"/latest/api", "X-metadata-token-ttl-seconds: 60\r\n", 404, "Resource not found: /latest/api."},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        ask("PUT", cases[i].path, cases[i].headers);
        expect(cases[i].status, cases[i].body);
    }
    ask("PUT", "//latest/api//token/", "X-metadata-token-ttl-seconds: 60\r\n");
    assert_int_equal(status_of(), 200);
    get("/latest/meta-data/id", "X-Forwarded-For: 1.2.3.4\r\n", 200, "i-1"); /* only tokens are refused */
}

static void test_methods(void **state)
{
    static const char *const methods[] = {"POST", "PATCH", "DELETE", "get", "OPTIONS"};
    for (size_t i = 0; i < sizeof methods / sizeof *methods; i++) {
        ask(methods[i], "/text", "");
        expect(405, "Not allowed HTTP method.");
        assert_non_null(strstr(last, "\r\nAllow: GET, PUT\r\n"));
    }
    ask("HEAD", "/text", "");
    assert_int_equal(status_of(), 405);
    assert_string_equal(strstr(last, "\r\n\r\n"), "\r\n\r\n");
}

static void test_pieces(void **state)
{
    static const char two[] = "\r\nPUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 5\r\nContent-Length: 3\r\n\r\nabcGET /text HTTP/1.1\n\nrest";
    size_t first = strlen(two) - strlen("GET /text HTTP/1.1\n\nrest"), all = strlen(two) - 4;
    for (size_t n = 0; n < first; n++)
        assert_int_equal(feed(two, n, false), 0);
    for (size_t n = first; n <= strlen(two); n++)
        assert_int_equal(feed(two, n, false), first);
    assert_int_equal(status_of(), 200);
    assert_int_equal(feed(two + first, all - first, false), all - first);
    expect(200, "line\nline \"q\"");
    assert_int_equal(feed("rest", 4, false), 0);
}

static void refused(const char *text, unsigned status)
{
    assert_int_equal(feed(text, strlen(text), false), strlen(text));
    assert_int_equal(status_of(), status);
    assert_true(closed);
    assert_non_null(strstr(last, "\r\nConnection: close\r\n"));
}

static void test_malformed(void **state)
{
    static const struct {
        const char *text;
        unsigned status;
    } cases[] = {
        {"GET\r\n\r\n", 400},
        {"GET /\r\n\r\n", 400},
        {" / HTTP/1.1\r\n\r\n", 400},
        {"GET  HTTP/1.1\r\n\r\n", 400},
        {"GET x HTTP/1.1\r\n\r\n", 400},
        {"GET / HTTP/1.2\r\n\r\n", 505},
        {"GET / HTTP/2.0\r\n\r\n", 505},
        {"GET / x\r\n\r\n", 400},
        {"GET / HTTP/1.1 x\r\n\r\n", 505},
        {"GET / HTTP/1.1\r\nx\r\n\r\n", 400},
        {"GET / HTTP/1.1\r\n: x\r\n\r\n", 400},
        {"GET / HTTP/1.1\r\na: x\r\n b: x\r\n\r\n", 400},
        {"GET / HTTP/1.1\r\na : x\r\n\r\n", 400},
        {"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400},
        {"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400},
        {"GET / HTTP/1.1\r\nContent-Length:\r\n\r\n", 400},
        {"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400},
        {"GET / HTTP/1.1\r\nContent-Length: 4097\r\n\r\n", 413},
        {"GET / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n", 413},
        {"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 501},
        {"GET / HTTP/1.1\r\nX-metadata-token-ttl-seconds 5\r\n\r\n", 400},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        refused(cases[i].text, cases[i].status);
    static char nul[] = "GET / HTTP/1.1\r\na: \0\r\n\r\n";
    assert_int_equal(feed(nul, sizeof nul - 1, false), sizeof nul - 1);
    assert_int_equal(status_of(), 400);
    /* What does not fit. */
    char much[8192];
    memset(much, 'x', sizeof much);
    assert_int_equal(feed(much, sizeof much, false), 0);
    assert_int_equal(feed(much, sizeof much, true), sizeof much);
    assert_int_equal(status_of(), 431);
    memcpy(much, "GET / HTTP/1.1\r\nContent-Length: 4000\r\na: ", 41);
    memcpy(much + 6000, "\r\n\r\n", 4);
    assert_int_equal(feed(much, sizeof much, true), sizeof much);
    assert_int_equal(status_of(), 413);
    /* A path longer than any name is none, and is cut in the answer. */
    char path[3000] = "/";
    memset(path + 1, 'p', sizeof path - 2);
    path[sizeof path - 1] = '\0';
    ask("GET", path, "");
    assert_int_equal(status_of(), 404);
    assert_true(strlen(body_of()) < 600);
}

static void test_connection(void **state)
{
    static const struct {
        const char *text;
        bool close;
    } cases[] = {{"GET /text HTTP/1.1\r\n\r\n", false},
                 {"GET /text HTTP/1.1\r\nConnection: close\r\n\r\n", true},
                 {"GET /text HTTP/1.1\r\nConnection: TE, Close\r\n\r\n", true},
                 {"GET /text HTTP/1.0\r\n\r\n", true},
                 {"GET /text HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", false}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        assert_int_equal(feed(cases[i].text, strlen(cases[i].text), false), strlen(cases[i].text));
        expect(200, "line\nline \"q\"");
        assert_int_equal(closed, cases[i].close);
        assert_int_equal(last[7], strstr(cases[i].text, "HTTP/1.")[7]);
    }
}

static void test_data(void **state)
{
    struct error err = {0};
    json_t *value = json_string("x"), *all = metadata_get(m), *patch = json_pack("{s:{s:n, s:{s:s}}, s:n}", "latest", "meta-data", "new", "k", "v", "text");
    assert_int_equal(metadata_put(m, value, &err), -EINVAL);
    assert_int_equal(metadata_patch(m, value, &err), -EINVAL);
    json_decref(value);
    assert_int_equal(metadata_patch(m, patch, &err), 0);
    get("/latest/new/k", "", 200, "v");
    get("/text", "", 404, "Resource not found: /text.");
    get("/latest/meta-data", "", 404, "Resource not found: /latest/meta-data.");
    assert_int_equal(metadata_put(m, all, &err), 0);
    get("/latest/meta-data/id", "", 200, "i-1");
    /* As long as allowed, and a byte more. */
    char *large = malloc(METADATA_BYTES_DEFAULT);
    memset(large, 'x', METADATA_BYTES_DEFAULT);
    value = json_pack("{s:s%}", "a", large, (size_t)METADATA_BYTES_DEFAULT - 8);
    assert_int_equal(metadata_put(m, value, &err), 0);
    json_decref(value);
    value = json_pack("{s:s%}", "a", large, (size_t)METADATA_BYTES_DEFAULT - 7);
    assert_int_equal(metadata_put(m, value, &err), -EFBIG);
    json_decref(value);
    ask("GET", "/a", "");
    assert_int_equal(strlen(body_of()), METADATA_BYTES_DEFAULT - 8);
    free(large);
    json_decref(all);
    json_decref(patch);
    /* Nothing was put. */
    metadata_destroy(m);
    m = metadata_create(10);
    get("/", JSON_HEADER, 200, "{}");
    get("/", "", 200, "");
    get("/x", "", 404, "Resource not found: /x.");
    patch = json_object();
    assert_int_equal(metadata_patch(m, patch, &err), -ENODATA);
    json_decref(patch);
    assert_int_equal(metadata_load(m, "/nonexistent", &err), -EINVAL);
    assert_non_null(strstr(err.text, "/nonexistent"));
}

/* Loads what `from` saves. */
static int pass_on(struct metadata *from, struct metadata *to, bool take)
{
    size_t size_bytes;
    struct state_io *writer = state_writer_create();
    assert_int_equal(metadata_state(from, true, writer), 0);
    const void *data = state_writer_data(writer, &size_bytes);
    struct state_io *reader = state_reader_create(data, size_bytes);
    int r = metadata_state(to, take, reader);
    if (r == 0)
        r = metadata_state(to, take, reader); /* the end: there is none any more, which is no error */
    state_io_destroy(reader);
    state_io_destroy(writer);
    return r;
}

static void test_state(void **state)
{
    /* Longer than a piece, cut inside a character. */
    json_t *value = metadata_get(m);
    char *large = malloc(40001);
    for (size_t i = 0; i < 20000; i++)
        memcpy(large + 2 * i, "\xC3\xA9", 3);
    json_object_set_new(value, "large", json_string(large));
    assert_int_equal(metadata_put(m, value, NULL), 0);
    struct metadata *other = metadata_create(0), *kept = metadata_create(0), *unwanted = metadata_create(0), *small = metadata_create(100), *empty = metadata_create(0);
    assert_int_equal(pass_on(m, other, true), 0);
    json_t *own = json_pack("{s:s}", "own", "x"), *loaded = metadata_get(other);
    assert_true(json_equal(value, loaded));
    json_decref(loaded);
    /* What was put stays, and what was not wanted does not come. */
    assert_int_equal(metadata_put(kept, own, NULL), 0);
    assert_int_equal(pass_on(m, kept, true), 0);
    loaded = metadata_get(kept);
    assert_true(json_equal(loaded, own));
    json_decref(loaded);
    assert_int_equal(pass_on(m, unwanted, false), 0);
    assert_int_equal(pass_on(empty, unwanted, true), 0);
    loaded = metadata_get(unwanted);
    assert_int_equal(json_object_size(loaded), 0);
    json_decref(loaded);
    assert_int_not_equal(pass_on(m, small, true), 0);
    json_decref(value);
    json_decref(own);
    free(large);
    struct metadata *all[] = {other, kept, unwanted, small, empty};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        metadata_destroy(all[i]);
}

static void test_address(void **state)
{
    uint8_t address[4];
    assert_true(metadata_parse_address("169.254.169.254", address));
    assert_memory_equal(address, ((uint8_t[4]){169, 254, 169, 254}), 4);
    assert_true(metadata_parse_address("169.254.1.0", address));
    assert_true(metadata_parse_address("169.254.254.255", address));
    static const char *const wrong[] = {"169.254.0.1", "169.254.255.1", "169.253.1.1", "10.0.0.1", "", "169.254.1", "x", "169.254.1.256", "::1"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        assert_false(metadata_parse_address(wrong[i], address));
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(test_##name, setup, teardown)
    const struct CMUnitTest tests[] = {TEST(get),       TEST(tokens),     TEST(token_refused), TEST(methods), TEST(pieces),
                                       TEST(malformed), TEST(connection), TEST(data),          TEST(state), TEST(address)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
